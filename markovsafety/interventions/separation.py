"""How well numbers or activations tell two kinds of prompts apart: AUC, silhouette, and a probe that is not linear."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..bound import Bound, check_level, clopper_pearson, clustered
from ..brief import brief
from ..errors import InputError

__all__ = ["Probed", "auc", "curve", "probe", "silhouette"]


def auc(positive: ArrayLike, negative: ArrayLike, level: float = 0.95, name: str = "AUC") -> Bound:
    """Probability that a positive prompt scores higher than a negative one; ties count one half.

    Parameters
    ----------
    positive, negative : array, shape (m,) and (n,)
        One score per prompt.
    level : float
    name : str

    Returns
    -------
    Bound

    Raises
    ------
    InputError
        A side is empty, or a score is not finite.

    Notes
    -----
    Variance after E. R. DeLong, D. M. DeLong and D. L. Clarke-Pearson (Biometrics 44 (1988) 837). It is 0 where the
    kinds separate perfectly, so we depart from their normal interval: it is Clopper-Pearson's at the number of trials
    that the variance is worth, A (1 - A) / var, kept within min(m, n) and m + n. An AUC's variance is never above that
    of min(m, n) independent trials (Z. W. Birnbaum and O. M. Klose, Ann. Math. Stat. 28 (1957) 933).

    Examples
    --------
    >>> print(ms.interventions.auc([0.9, 0.8, 0.7, 0.3], [0.6, 0.4, 0.2, 0.1]))
    AUC = 0.875   95 % [0.362, 0.999]   because: sampling 0.32; judge, lumping, model, truncation, rounding not
        assessed

    Kinds that are separated perfectly keep an interval, that of ten prompts on either side:

    >>> print(ms.interventions.auc(np.arange(10) + 10, np.arange(10)))
    AUC = 1   95 % [0.692, 1]   because: sampling 0.15; judge, lumping, model, truncation, rounding not assessed
    """
    check_level(level)
    x, y = (_scores(side, which) for side, which in ((positive, "positive"), (negative, "negative")))
    m, n = len(x), len(y)
    ordered_y, ordered_x = np.sort(y), np.sort(x)
    above = (np.searchsorted(ordered_y, x) + np.searchsorted(ordered_y, x, side="right")) / (2 * n)
    below = 1 - (np.searchsorted(ordered_x, y) + np.searchsorted(ordered_x, y, side="right")) / (2 * m)
    value = float(above.mean())
    variance = sum(float(v.var(ddof=1)) / len(v) if len(v) > 1 else 0.25 for v in (above, below))
    size = np.clip(value * (1 - value) / variance if variance else np.inf, min(m, n), m + n) if value % 1 else min(m, n)
    lower, upper = clopper_pearson(min(value * size, size), size, level)
    lower, upper = min(lower, value), max(upper, value)
    info = {"name": name, "method": "DeLong's variance, Clopper-Pearson", "positive": m, "negative": n}
    return Bound(value, lower, upper, level, {"sampling": (upper - lower) / 2}, None, info)


def curve(positive: ArrayLike, negative: ArrayLike) -> dict[str, NDArray]:
    """Receiver operating characteristic: what share of either kind scores above each threshold.

    Parameters
    ----------
    positive, negative : array, shape (m,) and (n,)

    Returns
    -------
    dict of array, shape (k,)
        "threshold" (falling, first infinity: nothing is above), "tpr" and "fpr"; above means strictly above.

    Examples
    --------
    >>> found = ms.interventions.curve([0.9, 0.8, 0.3], [0.6, 0.2, 0.1])
    >>> for name, values in found.items():
    ...     print(f"{name:>9}", values.round(2))
    threshold [ inf 0.85 0.7  0.45 0.25 0.15 -inf]
          tpr [0.   0.33 0.67 0.67 1.   1.   1.  ]
          fpr [0.   0.   0.   0.33 0.33 0.67 1.  ]
    """
    x, y = (np.sort(_scores(side, which)) for side, which in ((positive, "positive"), (negative, "negative")))
    # Between neighbouring scores, so that no prompt sits on a threshold.
    seen = np.unique(np.concatenate([x, y]))
    middle = (seen[1:] + seen[:-1]) / 2
    threshold = np.concatenate([[np.inf], middle[::-1], [-np.inf]])
    return {
        "threshold": threshold,
        "tpr": 1 - np.searchsorted(x, threshold, side="right") / len(x),
        "fpr": 1 - np.searchsorted(y, threshold, side="right") / len(y),
    }


def silhouette(points: ArrayLike, labels: ArrayLike) -> float:
    """Mean silhouette of two clusters: (distance to the other - to the own) / the larger, Euclidean.

    Parameters
    ----------
    points : array, shape (n, width)
    labels : bool array, shape (n,)

    Returns
    -------
    float
        In [-1, 1]; a cluster of one point counts 0.

    Raises
    ------
    InputError
        One of the clusters is empty.

    Notes
    -----
    P. J. Rousseeuw, J. Comput. Appl. Math. 20 (1987) 53.

    Examples
    --------
    >>> points = np.array([[0.0, 0.0], [0.0, 1.0], [5.0, 0.0], [5.0, 1.0]])
    >>> round(ms.interventions.silhouette(points, [True, True, False, False]), 3)
    0.802
    >>> round(ms.interventions.silhouette(points, [True, False, True, False]), 3)
    -0.39
    """
    x, mine = np.asarray(points, dtype=np.float64), np.asarray(labels, dtype=bool)
    if mine.all() or not mine.any():
        raise InputError(
            "all points have one label",
            cause="a silhouette compares the distance to the own cluster with that to the other",
            next="give points of both kinds",
        )
    squares = (x**2).sum(axis=1)
    distance = np.sqrt(np.maximum(squares[:, None] + squares[None] - 2 * x @ x.T, 0.0))
    np.fill_diagonal(distance, 0.0)
    totals = np.stack([distance[:, ~mine].sum(axis=1), distance[:, mine].sum(axis=1)])
    sizes = np.array([(~mine).sum(), mine.sum()])
    which, row = mine.astype(int), np.arange(len(x))
    own = totals[which, row] / np.maximum(sizes[which] - 1, 1)
    other = totals[1 - which, row] / sizes[1 - which]
    top = np.maximum(own, other)
    value = np.divide(other - own, top, out=np.zeros(len(x)), where=(top > 0) & (sizes[which] > 1))
    return float(value.mean())


@dataclass(frozen=True, eq=False)
class Probed:
    """A probe that is not linear, on prompts that it was not fitted to.

    Attributes
    ----------
    accuracy, auc : Bound
    shuffled : float64 array, shape (draws,)
        AUC of the same probe fitted to shuffled labels: what its flexibility alone gives.
    scores : float64 array, shape (held-out prompts,)
    """

    accuracy: Bound
    auc: Bound
    shuffled: NDArray
    scores: NDArray

    __repr__ = brief

    @property
    def p(self) -> float:
        """Probability of so high an AUC if the labels said nothing; at least 1 / (draws + 1)."""
        return float(1 + (self.shuffled >= self.auc.value).sum()) / (1 + len(self.shuffled))

    def __str__(self) -> str:
        return (
            f"{self.accuracy}\n{self.auc}\nshuffled labels: AUC {self.shuffled.mean():.2f} on average, p = {self.p:.2g}"
        )


def probe(
    points: ArrayLike,
    labels: ArrayLike,
    held_points: ArrayLike,
    held_labels: ArrayLike,
    *,
    ridge: float = 1e-2,
    draws: int = 19,
    seed: int = 0,
    level: float = 0.95,
) -> Probed:
    """Kernel ridge regression on the labels: can they be read at all, if not by a direction?

    Parameters
    ----------
    points, held_points : array, shape (n, width) and (m, width)
        Activations of some prompts to fit to, and of others to be right on.
    labels, held_labels : bool array, shape (n,) and (m,)
    ridge : float
        Times n, added to the kernel's diagonal.
    draws, seed : int
        Shuffles of the labels, and their seed.
    level : float

    Returns
    -------
    Probed

    Raises
    ------
    InputError
        One kind alone, or arrays that do not fit.

    Notes
    -----
    Gaussian kernel at the median distance, coordinates scaled to unit variance; it decides in the middle between the
    mean scores of the two kinds that it was fitted to. It is a control: where it reads a label that the difference in
    means does not, the belief is there but not along a line; where its AUC is high and steering does nothing, the
    belief is not used.

    Examples
    --------
    The label is whether two coordinates have the same sign: no direction reads it, the probe does.

    >>> points = np.random.default_rng(0).standard_normal((400, 2))
    >>> same = points.prod(axis=1) > 0
    >>> found = ms.interventions.probe(points[:200], same[:200], points[200:], same[200:])
    >>> print(ms.interventions.auc(points[same, 0], points[~same, 0], name="AUC of one coordinate"))
    AUC of one coordinate = 0.512   95 % [0.454, 0.57]   because: sampling 0.058; judge, lumping, model,
        truncation, rounding not assessed
    >>> print(found)
    accuracy of the probe = 0.95   95 % [0.91, 0.976]   because: sampling 0.033; judge, lumping, model,
        truncation, rounding not assessed
    AUC of the probe = 0.997   95 % [0.975, 1]   because: sampling 0.012; judge, lumping, model, truncation,
        rounding not assessed
    shuffled labels: AUC 0.46 on average, p = 0.05
    """
    x, held = (np.asarray(p, dtype=np.float64) for p in (points, held_points))
    mine, theirs = (np.asarray(v, dtype=bool) for v in (labels, held_labels))
    both = all(v.any() and not v.all() for v in (mine, theirs))
    if x.ndim != 2 or held.ndim != 2 or len(x) != len(mine) or len(held) != len(theirs) or not both:
        raise InputError(
            f"a probe cannot be fitted to points of shape {x.shape} and tested on {held.shape}",
            cause="each point needs a label, and both kinds must be among those fitted to and those held out",
            next="give prompts of both kinds on both sides",
        )
    spread = x.std(axis=0)
    mean, scale = x.mean(axis=0), np.where(spread > 0, spread, 1.0)
    x, held = (x - mean) / scale, (held - mean) / scale
    inner, outer = _squares(x, x), _squares(held, x)
    width = np.median(inner[np.triu_indices(len(x), 1)]) or 1.0
    kernel, across = np.exp(-inner / width), np.exp(-outer / width)
    told = np.where(mine, 1.0, -1.0)
    rng = np.random.default_rng(seed)
    targets = np.stack([told, *(rng.permutation(told) for _ in range(draws))], axis=1)
    fitted = np.linalg.solve(kernel + ridge * len(x) * np.eye(len(x)), targets)
    scores, own = across @ fitted, (kernel @ fitted)[:, 0]
    cut = (own[mine].mean() + own[~mine].mean()) / 2
    right = (scores[:, 0] > cut) == theirs
    shuffled = [auc(s[theirs], s[~theirs]).value for s in scores.T[1:]]
    return Probed(
        clustered(right, np.ones(len(right)), level, "accuracy of the probe"),
        auc(scores[theirs, 0], scores[~theirs, 0], level, "AUC of the probe"),
        np.array(shuffled, dtype=np.float64),
        scores[:, 0] - cut,
    )


def _squares(a: NDArray, b: NDArray) -> NDArray:
    """Squared distances, shape (len(a), len(b))."""
    return np.maximum((a**2).sum(1)[:, None] + (b**2).sum(1)[None] - 2 * a @ b.T, 0.0)


def _scores(values: Any, which: str) -> NDArray:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or not array.size or not np.isfinite(array).all():
        raise InputError(
            f"the {which} scores have shape {array.shape}, or are not finite",
            cause="an AUC compares two lists of numbers, and neither may be empty",
            next="give one score per prompt of either kind",
        )
    return array
