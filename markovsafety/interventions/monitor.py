"""Has somebody edited this model? A monitor that knows clean activations and watches for others while the model runs.

An edit adds vectors to the stream. A monitor is fitted on clean activations, level by level: their mean and their
covariance, shrunk, whose Mahalanobis distance sees any unusual direction; or projections on known directions, which
see those directions better and no other. Its threshold is the quantile that a wished rate of false alarms asks for,
and the rate it really has is measured on other clean texts.

What it can see is limited, and reported: an edit as small as the natural spread is invisible in principle, an edit
above the highest level that is watched is invisible altogether, and an edit by just the difference between two kinds of
clean text makes one look like the other: it is caught less often than half of it and twice of it (`detection`).

Sources: shrinkage after O. Ledoit and M. Wolf, J. Multivariate Anal. 88 (2004) 365; the distance as detector after
K. Lee et al., A Simple Unified Framework for Detecting Out-of-Distribution Samples, arXiv 1807.03888 (one class here).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..bound import Bound, clustered
from ..brief import brief
from ..errors import InputError
from ..reading import making
from .edits import check_identity
from .host import Host
from .storage import checked, read_tensors, typed, write_tensors

__all__ = ["Monitor", "check_monitor", "fit_monitor", "read_monitor", "write_monitor"]

FOLDS = 5
ARRAYS = ("mean", "whiten", "rest", "centre", "spread")


@dataclass(frozen=True, eq=False)
class Monitor:
    """What clean activations look like.

    Parameters
    ----------
    levels : tuple of int
        Of the residual stream.
    mean : float64 array, shape (levels, width)
    whiten : float64 array, shape (levels, features, width)
        Rows that turn ``x - mean`` into features of about unit variance; rows of zeros fill up where levels have
        unequally many. No more than there were texts: the covariance of n texts is known in n directions.
    rest : float64 array, shape (levels,)
        Factor, one over the standard deviation, of the part of ``x - mean`` orthogonal to all rows of `whiten`; 0 where
        that part is not watched.
    threshold : float
        Of the largest score over levels, after `centre` and `spread`.
    centre, spread : float64 array, shape (levels,)
        Median of clean scores of each level, and their upper quartile less the median: levels are compared in these.
    rate : float
        Wished share of false alarms.
    kind : str
        "mahalanobis" or "projections".
    model, template : str or None
        See `Edit`.

    Examples
    --------
    >>> clean, new = np.random.default_rng(0).standard_normal((2, 400, 1, 8))
    >>> monitor = ms.interventions.fit_monitor(clean, levels=[2], rate=0.05)
    >>> print(monitor.false_alarms(new))
    P(false alarm) = 0.04   95 % [0.023, 0.0641]   because: sampling 0.021; judge, lumping, model, truncation,
        rounding not assessed

    An activation that was moved by five standard deviations raises an alarm:

    >>> moved = np.zeros((1, 1, 8))
    >>> moved[0, 0, 3] = 5.0
    >>> print(f"score {monitor.scores(moved)[0]:.1f}, Monitor.threshold {monitor.threshold:.1f}")
    score 4.6, Monitor.threshold 2.6
    """

    levels: tuple[int, ...]
    mean: NDArray
    whiten: NDArray
    rest: NDArray
    centre: NDArray
    spread: NDArray
    threshold: float
    rate: float
    kind: str
    model: str | None = None
    template: str | None = None

    __repr__ = brief

    def level_scores(self, values: NDArray) -> NDArray:
        """Root mean square of the features of activations (rows, levels, width), (rows, levels); about 1 if clean.

        Features are all `width` directions for "mahalanobis", else those of `whiten`.
        """
        x = np.asarray(values, dtype=np.float64)
        if x.ndim != 3 or x.shape[1:] != self.mean.shape:
            raise InputError(
                f"activations have shape {x.shape}",
                cause=f"the monitor watches {self.mean.shape[0]} levels of width {self.mean.shape[1]}",
                next=f"record the levels {self.levels} at one position",
            )
        out = np.empty(x.shape[:2])
        for i, (rows, rest) in enumerate(zip(self.whiten, self.rest)):
            y = x[:, i] - self.mean[i]
            z = y @ rows.T
            total = np.sum(z**2, axis=1)
            if rest:
                size = np.maximum(np.sum(rows**2, axis=1), 1e-300)
                total += rest**2 * np.sum((y - (z / size) @ rows) ** 2, axis=1)
            out[:, i] = total / (x.shape[2] if self.kind == "mahalanobis" else len(rows))
        return np.sqrt(out)

    def scores(self, values: NDArray) -> NDArray:
        """The largest score over levels, in upper quartiles above the median of clean text, shape (rows,)."""
        return ((self.level_scores(values) - self.centre) / self.spread).max(axis=1)

    def alarms(self, values: NDArray) -> NDArray:
        """Which activations raise an alarm, bool (rows,)."""
        return self.scores(values) > self.threshold

    def false_alarms(self, values: NDArray, level: float = 0.95) -> Bound:
        """Rate of alarms on clean activations that the monitor was not fitted on, one per prompt (Clopper-Pearson)."""
        raised = self.alarms(values)
        return clustered(raised.astype(float), np.ones(len(raised)), level, "P(false alarm)")


def fit_monitor(
    clean: NDArray,
    levels: Sequence[int],
    *,
    rate: float = 0.01,
    directions: Mapping[str, tuple[int, NDArray]] | None = None,
    host: Host | None = None,
) -> Monitor:
    """Learn what clean activations look like, and where to raise an alarm.

    Parameters
    ----------
    clean : array, shape (texts, levels, width)
        Of `activations` at one position: ``activations(host, prompts, levels=levels)[:, :, 0]``. The more kinds of text
        they come from, the fewer surprises: what is unusual raises an alarm too.
    levels : sequence of int
        To which the second axis belongs.
    rate : float
        Wished share of false alarms; fitting it needs about 10 / rate texts.
    directions : mapping of name -> (level, vector), optional
        Watch these projections only.
    host : Host, optional
        Whose identity the monitor keeps.

    Returns
    -------
    Monitor

    Raises
    ------
    InputError
        Too few texts, activations that do not vary at any level, a rate that cannot be reached, or a direction at a
        level that is not among `levels`.

    Notes
    -----
    The threshold is the (1 - rate) quantile of the scores of clean texts under monitors that were fitted on others, by
    cross-validation over random folds, for a covariance always fits its own texts best.

    Examples
    --------
    >>> from markovsafety import interventions as inside, organism
    >>> host = inside.open_host(organism.model_path("shallow"))
    >>> clean = inside.activations(host, organism.prompts("train", n=300), levels=[2, 3])[:, :, 0]
    >>> monitor = inside.fit_monitor(clean, [2, 3], rate=0.05, host=host)
    >>> prompts = organism.prompts(n=100)  # others than those of the fit
    >>> print(monitor.false_alarms(inside.activations(host, prompts, levels=[2, 3])[:, :, 0]))
    P(false alarm) = 0.04   95 % [0.011, 0.0993]   because: sampling 0.044; judge, lumping, model, truncation,
        rounding not assessed
    >>> edit = inside.difference(host, prompts, organism.prompts(n=100, harmful=False), position="t_post").edit(-0.5, 2)
    >>> edited = inside.activations(host, prompts, levels=[2, 3], edit=edit)[:, :, 0]
    >>> print(f"{monitor.alarms(edited).sum()} of {len(edited)} edited prompts raise an alarm")
    100 of 100 edited prompts raise an alarm
    """
    x, known = np.asarray(clean, dtype=np.float64), tuple(int(level) for level in levels)
    if x.ndim != 3 or x.shape[1] != len(known) or not 0 < rate < 1 or len(x) * rate < 1 or len(x) < 8:
        raise InputError(
            f"no monitor is fitted on activations of shape {x.shape} at {len(known)} levels for a rate of {rate}",
            cause="it takes (texts, levels, width), at least 8 texts, and 1 / rate of them to see the threshold",
            next="record more clean texts, or ask for a larger rate",
        )
    # A level where nothing varies (the template's own token at level 0) sees every edit there is, or none.
    varies = x.std(axis=0).max(axis=1) > 1e-6 * np.abs(x).max(axis=(0, 2))
    used = _used(known, varies, directions)
    x, kept = x[:, used], tuple(known[i] for i in used)
    chosen = None if directions is None else _vectors(directions, kept, x.shape[-1])
    kind = "mahalanobis" if directions is None else "projections"
    model, template = (None, None) if host is None else host.identity

    def made(part: NDArray, threshold: float, centre: NDArray, spread: NDArray) -> Monitor:
        mean, (whiten, rest) = part.mean(axis=0), _whiten(part, chosen)
        return Monitor(kept, mean, whiten, rest, centre, spread, threshold, rate, kind, model, template)

    plain = np.zeros(len(kept)), np.ones(len(kept))
    fold = np.random.default_rng(0).permutation(len(x)) % FOLDS
    crossed = np.concatenate([made(x[fold != k], 0.0, *plain).level_scores(x[fold == k]) for k in range(FOLDS)])
    centre = np.median(crossed, axis=0)
    spread = np.maximum(np.quantile(crossed, 0.75, axis=0) - centre, 1e-9)
    threshold = float(np.quantile(((crossed - centre) / spread).max(axis=1), 1 - rate, method="higher"))
    return made(x, threshold, centre, spread)


def _used(levels: tuple[int, ...], varies: NDArray, directions: Mapping[str, tuple[int, Any]] | None) -> list[int]:
    wanted = levels if directions is None else tuple(sorted({int(level) for level, _ in directions.values()}))
    used = [i for i, level in enumerate(levels) if level in wanted and varies[i]]
    if not used or not set(wanted) <= set(levels):
        raise InputError(
            f"nothing can be watched at the levels {wanted}",
            cause="they were not recorded, or no activation varies there: at level 0 the last token of a template is "
            "the same for all texts",
            next="record higher levels",
        )
    return used


def _vectors(directions: Mapping[str, tuple[int, NDArray]], levels: tuple[int, ...], width: int) -> list[NDArray]:
    """Unit vectors of every level, (features, width)."""
    out = []
    for level in levels:
        rows = np.array([np.asarray(v, dtype=np.float64) for at, v in directions.values() if at == level])
        norm = np.linalg.norm(rows, axis=1, keepdims=True)
        if rows.shape[1:] != (width,) or not norm.all():
            raise InputError(
                f"a direction at level {level} has shape {rows.shape[1:]}",
                cause=f"a vector of {width} numbers that are not all zero is needed",
                next="take the vectors of directions of this model",
            )
        out.append(rows / norm)
    return out


def _whiten(x: NDArray, chosen: list[NDArray] | None) -> tuple[NDArray, NDArray]:
    """`Monitor.whiten` and `Monitor.rest` of activations (texts, levels, width)."""
    centred = x - x.mean(axis=0)
    if chosen is None:
        roots = [_root(centred[:, i]) for i in range(x.shape[1])]
        rows, rest = [root for root, _ in roots], np.array([rest for _, rest in roots])
    else:
        most, rest = max(map(len, chosen)), np.zeros(x.shape[1])
        sizes = [(centred[:, i] @ v.T).std(axis=0) + 1e-12 for i, v in enumerate(chosen)]
        rows = [v / size[:, None] * np.sqrt(most / len(v)) for v, size in zip(chosen, sizes)]
    out = np.zeros((x.shape[1], max(map(len, rows)), x.shape[2]))
    for i, some in enumerate(rows):
        out[i, : len(some)] = some
    return out, rest


def _root(x: NDArray) -> tuple[NDArray, float]:
    """Inverse square root of the shrunk covariance of centred rows, (1 - s) S + s tr(S)/d, s of Ledoit and Wolf.

    Its rows are the eigenvectors of S over the roots of the shrunk eigenvalues, and one factor for all the directions
    in which S has none: with fewer rows than dimensions they come from the n x n Gram matrix; nothing is d x d then.
    """
    n, d = x.shape
    few = n < d
    values, vectors = np.linalg.eigh((x @ x.T if few else x.T @ x) / n)
    values = np.maximum(values, 0.0)
    scale = values.sum() / d
    distance = np.sum(values**2) - d * scale**2
    noise = (np.sum(np.sum(x**2, axis=1) ** 2) / n - np.sum(values**2)) / n
    share = 1.0 if distance <= 0 else float(np.clip(noise / distance, 1e-6, 1.0))
    floor = max(share * scale, 1e-12 * max(scale, 1e-30))
    # Eigenvectors of nothing but rounding belong to the rest, whose variance is the floor too.
    kept = values > 1e-12 * values.max(initial=0.0) if few else np.ones(d, bool)
    rows = vectors[:, kept].T
    if few:
        rows = (rows @ x) / np.sqrt(n * values[kept])[:, None]
    return rows / np.sqrt((1 - share) * values[kept] + floor)[:, None], float(few) / np.sqrt(floor)


def check_monitor(host: Host, monitor: Monitor) -> None:
    """Raise unless a monitor belongs to a model.

    Raises
    ------
    InputError
        It was fitted on other weights, or watches what the model does not have.
    """
    check_identity(monitor.model, monitor.template, host, "the monitor")
    if max(monitor.levels) > host.layers or monitor.mean.shape[1] != host.width:
        raise InputError(
            f"the monitor watches levels {monitor.levels} of width {monitor.mean.shape[1]}",
            cause=f"the model has levels 0 to {host.layers} of width {host.width}",
            next="fit it on this model",
        )


def write_monitor(monitor: Monitor, path: str | Path) -> None:
    """Write a monitor as one safetensors file, its threshold and its model's identity in the header.

    Examples
    --------
    >>> clean = np.random.default_rng(0).standard_normal((400, 2, 8))
    >>> monitor = ms.interventions.fit_monitor(clean, levels=[2, 3], rate=0.05)
    >>> ms.interventions.write_monitor(monitor, "monitor.safetensors")
    >>> ms.interventions.read_monitor("monitor.safetensors").levels
    (2, 3)
    """
    about = {k: getattr(monitor, k) for k in ("threshold", "rate", "kind", "model", "template")}
    about["levels"] = list(monitor.levels)
    write_tensors(path, "monitor", {name: getattr(monitor, name) for name in ARRAYS}, about)


def read_monitor(path: str | Path) -> Monitor:
    """Read what `write_monitor` wrote.

    Raises
    ------
    InputError
        The file is missing or holds something else.

    Examples
    --------
    >>> clean, new = np.random.default_rng(0).standard_normal((2, 400, 1, 8))
    >>> monitor = ms.interventions.fit_monitor(clean, levels=[2], rate=0.05)
    >>> ms.interventions.write_monitor(monitor, "monitor.safetensors")
    >>> print(ms.interventions.read_monitor("monitor.safetensors").false_alarms(new))
    P(false alarm) = 0.04   95 % [0.023, 0.0641]   because: sampling 0.021; judge, lumping, model, truncation,
        rounding not assessed
    """
    arrays, about = read_tensors(path, "monitor")
    with making(f"{path} holds only part of a monitor", "write it again"):
        typed(about, levels=list, threshold=int | float, rate=int | float, kind=str)
        n = len(about["levels"])
        width = checked(arrays["mean"], n, None, name="mean").shape[1]
        checked(arrays["whiten"], n, None, width, name="whiten")
        for name in ("rest", "centre", "spread"):
            checked(arrays[name], n, name=name)
        return Monitor(
            tuple(int(level) for level in about.pop("levels")), **{name: arrays[name] for name in ARRAYS}, **about
        )
