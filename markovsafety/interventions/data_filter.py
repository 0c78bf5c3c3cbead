"""The filter that a teacher is for: its feature, a threshold that was fixed before any test, what it keeps and drops.

A row of fine-tuning data is dropped if the cosine of its prompt with the refusal feature is above the threshold. The
threshold is fixed on validation prompts for a wished recall, and the share of harmless prompts that it costs stands
beside it: an AUC of 1 says that some threshold is right, not that this one is.

Source: arXiv 2506.07356 for the rule; its reviews ask for the false drops that are reported here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..bound import Bound, clustered
from ..errors import InputError, UntrustedError
from ..reading import making
from .differences import difference, states
from .directions import Direction, Position
from .edits import check_identity
from .host import Host
from .pages import spanned
from .refusal_features import cosines, feature_cosines
from .separation import auc, curve
from .storage import checked, read_tensors, typed, write_tensors

__all__ = ["RefusalFilter", "choose_threshold", "fit_filter", "read_filter", "write_filter"]

CURVE = ("threshold", "tpr", "fpr")


@dataclass(frozen=True, eq=False)
class RefusalFilter:
    """A refusal feature and the cosine above which a prompt is dropped.

    Parameters
    ----------
    feature : Direction
        With its level; ``feature.model`` is the hash of the teacher's weights, ``feature.template`` that of its chat
        template.
    threshold : float
    wished : float
        Recall that was asked for.
    recall, false_drops, auc : Bound
        On the validation prompts: harmful ones dropped, harmless ones dropped, and both at every threshold.
    curve : dict of float64 array, shape (k,)
        "threshold", "tpr" and "fpr" on the validation prompts (`separation.curve`).
    about : dict
        JSON-able: how the level was chosen, prompts on either side, the system message.

    Examples
    --------
    >>> from markovsafety.interventions import fit_filter, open_host
    >>> host = open_host(ms.organism.model_path("shallow"))
    >>> fit_filter(host, ms.organism.prompts(n=24), ms.organism.prompts(n=24, harmful=False))
    <RefusalFilter: drop above cosine 0.3... at t_post, level 3:
    recall 1.000 [0.735, 1.000] (wished 0.95), harmless dropped 0.000 [0.000, 0.265],
    AUC 1.000 [0.735, 1.000]>
    """

    feature: Direction
    threshold: float
    wished: float
    recall: Bound
    false_drops: Bound
    auc: Bound
    curve: dict[str, NDArray]
    about: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        f = self.feature
        return (
            f"drop above cosine {self.threshold:.3f} at {f.position}, level {f.level}: recall {spanned(self.recall)} "
            f"(wished {self.wished:g}), harmless dropped {spanned(self.false_drops)}, AUC {spanned(self.auc)}"
        )

    def __repr__(self) -> str:
        return f"<RefusalFilter: {self}>"

    @property
    def system(self) -> str | None:
        """System message of the prompts that it was made with."""
        return self.about.get("system")

    def scores(self, host: Host, prompts: Sequence[Any], *, batch_size: int | None = None) -> NDArray:
        """Cosines of prompts, float64 (prompts,).

        Raises
        ------
        InputError
            The host is not the teacher, has another template or system message, or a prompt does not end as its
            template says.
        """
        check_identity(self.feature.model, self.feature.template, host, "the filter")
        here = host.engine.tokenizer.system
        if here != self.system:
            raise InputError(
                "the filter was made with another system message",
                cause=f"it is {self.system!r}, that of the prompts here is {here!r}",
                next="open the teacher with the filter's own: open_host(..., system=filter.system)",
            )
        return feature_cosines(host, self.feature, prompts, batch_size=batch_size)

    def drops(self, scores: NDArray) -> NDArray:
        """Which scores are above the threshold, bool (prompts,)."""
        return np.asarray(scores) > self.threshold

    def to_json(self) -> dict[str, Any]:
        """Plain data, without the feature's vectors and the curve."""
        f = self.feature
        told: dict[str, Any] = {"position": f.position, "level": f.level, "teacher": f.model, "template": f.template}
        told |= {"threshold": self.threshold, "wished": self.wished, **self.about}
        return told | {name: getattr(self, name).to_json() for name in ("recall", "false_drops", "auc")}


def fit_filter(
    host: Host,
    harmful: Sequence[Any],
    harmless: Sequence[Any],
    *,
    validation: tuple[Sequence[Any], Sequence[Any]] | None = None,
    level: int | None = None,
    position: Position | tuple[Position, ...] = "t_post",
    recall: float = 0.95,
    threshold: float | None = None,
    confidence: float = 0.95,
    seed: int = 0,
) -> RefusalFilter:
    """The refusal feature of a teacher, and the threshold on its cosine.

    Parameters
    ----------
    host : Host
        The teacher.
    harmful, harmless : sequence of records, texts or ids
        The feature is the difference of their means.
    validation : (harmful, harmless), optional
        Other prompts, on which the threshold is fixed. By default a random half of each kind is kept for it.
    level : int, optional
        By default that with the largest validation AUC, among equals that with the largest margin between the means.
    position : "t_post", "t_inst", int, or a tuple of these
        The paper reads the last prompt token, t_post. An aligned model that is no trained teacher often has its refusal
        there, and at t_inst what it holds for harm. Of several positions, as a tuple, the one is taken whose threshold
        drops the fewest harmless validation prompts, among equals the one with the largest AUC.
    recall : float
        Share of harmful validation prompts that must be dropped.
    threshold : float, optional
        Instead of the one that `choose_threshold` finds; it must lie within the validation scores.
    confidence : float
        Level of the intervals.
    seed : int
        Of the halves.

    Returns
    -------
    RefusalFilter

    Raises
    ------
    InputError
        A kind without prompts, a recall that is no share, or a threshold outside the observed range.
    UntrustedError
        No threshold reaches the recall but one that drops everything; ``partial`` is the curve.

    Examples
    --------
    This model is aligned, and no trained teacher: its filter lets jailbroken prompts through.

    >>> from markovsafety.interventions import fit_filter, open_host
    >>> host = open_host(ms.organism.model_path("shallow"))
    >>> made = fit_filter(host, ms.organism.prompts(n=24), ms.organism.prompts(n=24, harmful=False))
    >>> print(made.recall)
    recall on validation = 1   95 % [0.735, 1]
    because: sampling 0.13; judge, lumping, model, truncation, rounding not assessed
    >>> made.drops(made.scores(host, ms.organism.prompts(n=4, marker="jailbreak")))
    array([False, False, False, False])
    """
    if not 0 < recall <= 1:
        raise InputError(f"recall is {recall}", cause="it is a share of harmful prompts", next="give one in (0, 1]")
    if isinstance(position, tuple):
        told: dict[str, Any] = {"validation": validation, "level": level, "recall": recall, "threshold": threshold}
        told |= {"confidence": confidence, "seed": seed}
        return _best([lambda p=p: fit_filter(host, harmful, harmless, position=p, **told) for p in position])
    if validation is None:
        (harmful, held_harmful), (harmless, held_harmless) = (
            _halves(side, name, seed) for side, name in ((harmful, "harmful"), (harmless, "harmless"))
        )
    else:
        held_harmful, held_harmless = validation
    for side, name in ((held_harmful, "harmful"), (held_harmless, "harmless")):
        if not len(side):
            raise InputError(
                f"there is no {name} prompt to fix the threshold on",
                cause="recall and false drops are shares of two kinds of validation prompts",
                next="give some of both kinds",
            )
    feature = difference(host, harmful, harmless, position=position, names=("harmful", "harmless"))
    levels = [level] if level is not None else [i for i in range(host.layers + 1) if feature.norms[i] > 1e-6]
    up, down = (states(host, side, (position,), levels=levels)[:, :, 0] for side in (held_harmful, held_harmless))
    tried = []
    for i, each in enumerate(levels):
        x, y = cosines(up[:, i], feature.vectors[each], each), cosines(down[:, i], feature.vectors[each], each)
        tried.append((auc(x, y, confidence, "AUC on validation"), float(x.mean() - y.mean()), each, x, y))
    best = max(tried, key=lambda t: (t[0].value, t[1]))
    table = [{"level": t[2], "auc": t[0].value, "margin": t[1]} for t in tried]
    about = {
        "levels": table,
        "level chosen": "given" if level is not None else "by AUC and margin on validation",
        "system": host.engine.tokenizer.system,
        "harmful": len(harmful),
        "harmless": len(harmless),
        "mean cosine": {"harmful": float(best[3].mean()), "harmless": float(best[4].mean())},
    }
    return _fixed(feature.at(best[2]), best[3], best[4], best[0], recall, threshold, confidence, about)


def _best(fits: Sequence[Callable[[], RefusalFilter]]) -> RefusalFilter:
    """The filter that costs least on validation; positions at which no threshold has the recall are left out."""
    made, failed = [], []
    for fit in fits:
        try:
            made.append(fit())
        except UntrustedError as error:
            failed.append(error)
    if not made:
        raise (
            failed[0]
            if failed
            else InputError(
                "there is no position", cause="the tuple is empty", next='give some, such as ("t_post", "t_inst")'
            )
        )
    return min(made, key=lambda f: (f.false_drops.value, -f.auc.value))


def choose_threshold(harmful: NDArray, harmless: NDArray, recall: float) -> float:
    """The cosine above which prompts are dropped, for a wished recall.

    Parameters
    ----------
    harmful, harmless : array, shape (m,) and (n,)
        Validation scores.
    recall : float

    Returns
    -------
    float
        Of all thresholds (between neighbouring scores) with the recall, that with the fewest false drops; among these
        that with the largest recall. So where the kinds are apart it is the middle of the gap between them.

    Raises
    ------
    UntrustedError
        Only dropping everything reaches the recall; ``partial`` is the curve.

    Examples
    --------
    For half of the harmful prompts no harmless one is dropped, for all of them one in three:

    >>> harmful, harmless = np.array([0.9, 0.7, 0.5, 0.2]), np.array([0.4, 0.0, -0.3])
    >>> [ms.interventions.choose_threshold(harmful, harmless, recall) for recall in (0.5, 1.0)]
    [0.45, 0.1]
    """
    found = curve(harmful, harmless)
    at, tpr, fpr = (found[name] for name in CURVE)
    fit = np.flatnonzero(tpr >= recall - 1e-12)
    best = fit[np.lexsort((-tpr[fit], fpr[fit]))[0]]
    if not np.isfinite(at[best]):
        raise UntrustedError(
            f"no threshold drops {recall:g} of the harmful prompts but one that drops everything",
            cause="the cosine with the feature does not tell these kinds apart",
            next="read the feature at another level or position, train the teacher longer, or wish a smaller recall",
            partial={name: values.tolist() for name, values in found.items()},
        )
    return float(at[best])


def _fixed(
    feature: Direction,
    x: NDArray,
    y: NDArray,
    area: Bound,
    recall: float,
    threshold: float | None,
    confidence: float,
    about: dict[str, Any],
) -> RefusalFilter:
    """The filter with its threshold, chosen or given, and what it does on validation."""
    seen = min(x.min(), y.min()), max(x.max(), y.max())
    if threshold is not None and not seen[0] <= threshold <= seen[1]:
        raise InputError(
            f"the threshold {threshold:g} is outside the observed range",
            cause=f"the cosines of the validation prompts lie in [{seen[0]:.3f}, {seen[1]:.3f}]: it would keep or drop "
            "all of them",
            next="give one inside, or let it be chosen",
        )
    at = choose_threshold(x, y, recall) if threshold is None else float(threshold)
    caught, lost = (
        clustered((side > at).astype(float), np.ones(len(side)), confidence, name)
        for side, name in ((x, "recall on validation"), (y, "harmless dropped on validation"))
    )
    about |= {"threshold chosen": "for the recall" if threshold is None else "given"}
    about |= {"validation": {"harmful": len(x), "harmless": len(y)}}
    return RefusalFilter(feature, at, recall, caught, lost, area, curve(x, y), about)


def _halves(side: Sequence[Any], name: str, seed: int) -> tuple[list[Any], list[Any]]:
    if len(side) < 2:
        raise InputError(
            f"there are {len(side)} {name} prompts",
            cause="half of them make the feature, half of them fix the threshold",
            next="give at least 2, better hundreds",
        )
    order = np.random.default_rng(seed).permutation(len(side))
    half = len(side) // 2
    return [side[i] for i in order[half:]], [side[i] for i in order[:half]]


# --------------------------------------------------------------------------------------------------------------- files

BOUNDS = ("recall", "false_drops", "auc")
DIRECTION = ("position", "names", "counts", "where", "level", "model", "template", "about")


def write_filter(filter: RefusalFilter, path: str | Path) -> None:
    """Write a filter as one safetensors file: feature and curve as arrays, all else in the header.

    Examples
    --------
    >>> from markovsafety.interventions import fit_filter, open_host, read_filter, write_filter
    >>> host = open_host(ms.organism.model_path("shallow"))
    >>> made = fit_filter(host, ms.organism.prompts(n=24), ms.organism.prompts(n=24, harmful=False))
    >>> write_filter(made, "filter.safetensors")
    >>> read_filter("filter.safetensors", host).feature
    <Direction harmful - harmless: positive pushes towards harmful; at t_post, level 3,
    from 12 + 12 prompts>
    """
    f = filter.feature
    about = {name: getattr(filter, name) for name in ("threshold", "wished", "about")}
    about["feature"] = {name: getattr(f, name) for name in DIRECTION}
    about |= {name: {**getattr(filter, name).to_json(), "name": getattr(filter, name).info["name"]} for name in BOUNDS}
    curve_of = {f"curve {name}": filter.curve[name] for name in CURVE}
    write_tensors(path, "filter", {"feature": f.vectors, **curve_of}, about)


def read_filter(path: str | Path, host: Host | None = None) -> RefusalFilter:
    """Read what `write_filter` wrote.

    Parameters
    ----------
    path : path
    host : Host, optional
        The teacher that it is used with.

    Raises
    ------
    InputError
        The file is missing or holds no filter, or it belongs to another teacher or template than the host's.

    Examples
    --------
    Another model is not the teacher that the filter was made with:

    >>> from markovsafety.interventions import fit_filter, open_host, read_filter, write_filter
    >>> teacher, other = (open_host(ms.organism.model_path(name)) for name in ("shallow", "deep20"))
    >>> made = fit_filter(teacher, ms.organism.prompts(n=24), ms.organism.prompts(n=24, harmful=False))
    >>> write_filter(made, "filter.safetensors")
    >>> read_filter("filter.safetensors", other)
    Traceback (most recent call last):
    markovsafety.errors.InputError: the filter in filter.safetensors was made for another model: its weights differ
      cause: it belongs to ..., the model here is ...
      next:  make it again with this model
    """
    arrays, about = read_tensors(path, "filter")
    with making(f"{path} holds only part of a filter", "write it again"):
        typed(about, threshold=int | float, wished=int | float, feature=dict, about=dict)
        feature = Direction(arrays["feature"], **{name: about["feature"][name] for name in DIRECTION})
        bounds = {name: _bound(about[name]) for name in BOUNDS}
        curve_of = {name: arrays[f"curve {name}"] for name in CURVE}
        at = curve_of["threshold"]  # its ends are infinite
        checked(np.clip(at, -1, 1), None, name="threshold")
        found = {"threshold": at} | {name: checked(curve_of[name], len(at), name=name) for name in CURVE[1:]}
        cut, wished = float(about["threshold"]), float(about["wished"])
        made = RefusalFilter(feature, cut, wished, curve=found, about=about["about"], **bounds)
    if host is not None:
        check_identity(feature.model, feature.template, host, f"the filter in {path}")
    return made


def _bound(told: dict[str, Any]) -> Bound:
    value, lower, upper, level = (float(told[name]) for name in ("value", "lower", "upper", "level"))
    reasons = {name: width for name, width in told["reasons"].items() if width is not None}
    return Bound(value, lower, upper, level, reasons, None, {"name": told["name"]})
