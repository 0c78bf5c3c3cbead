"""Intervals for differences of rates: clustered by prompt, paired where prompts are the same, fit for zero events."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..bound import Bound
from ..clusters import Spread, freedom, kish, spread
from .cells import Cell

__all__ = ["FEW", "PROMPTS", "benjamini_hochberg", "change", "cluster_t", "mover", "paired"]

FEW = 5  # with fewer harmful, or harmless, rollouts than this a normal-theory interval is not trusted
PROMPTS = 10  # the paired t-interval needs this many harmful prompts on both sides
ALIKE = 5  # the correlation between two models is believed from this many harmful prompts on


def cluster_t(sums: NDArray, level: float) -> float:
    """Half-width of the t-interval of a mean whose K clusters contribute `sums`, deviations that add up to 0."""
    from scipy.special import stdtrit

    K = len(sums)
    spread_ = np.sqrt(K / (K - 1) * np.sum(sums**2))
    return float(stdtrit(K - 1.0, (1 + level) / 2) * spread_)


def rare(events: float, total: float) -> bool:
    """Whether a cell holds too few harmful or harmless rollouts for normal theory."""
    return min(events, total - events) < FEW


def deviations(c: Cell) -> NDArray:
    """What each prompt contributes to the linearised error of the pooled rate, shape (K,)."""
    total = c.totals.sum()
    return (c.events - c.events.sum() / total * c.totals) / total


def mover(before: Bound, after: Bound, correlation: float = 0.0) -> tuple[float, float]:
    """Interval of ``after - before`` from the intervals of two rates.

    Parameters
    ----------
    before, after : Bound
        Scalars.
    correlation : float
        Of the two estimates.

    Notes
    -----
    The method of variance estimates recovery: R. G. Newcombe, Statistics in Medicine 17 (1998) 873, method 10, here
    with clustered intervals in place of Wilson's; with a correlation G. Y. Zou, Psychological Methods 12 (2007) 399.
    """
    sides = [tuple(np.asarray(getattr(b, end), float) for end in ("value", "lower", "upper")) for b in (before, after)]
    lower, upper = _recovered(sides[0], sides[1], np.asarray(correlation))
    return float(lower), float(upper)


def _recovered(before: tuple[NDArray, ...], after: tuple[NDArray, ...], r: NDArray) -> tuple[NDArray, NDArray]:
    (p, p_low, p_up), (q, q_low, q_up) = before, after
    d = q - p
    down = (q - q_low) ** 2 + (p_up - p) ** 2 - 2 * r * (q - q_low) * (p_up - p)
    up = (q_up - q) ** 2 + (p - p_low) ** 2 - 2 * r * (q_up - q) * (p - p_low)
    lower, upper = d - np.sqrt(np.maximum(down, 0.0)), d + np.sqrt(np.maximum(up, 0.0))
    return np.maximum(lower, -1.0), np.minimum(upper, 1.0)


def paired(before: Cell, after: Cell, level: float) -> tuple[float, float, float, str]:
    """Interval and p-value of the change of a rate.

    Parameters
    ----------
    before, after : Cell
        With at least one prompt each.
    level : float

    Returns
    -------
    lower, upper, p : float
        p is two-sided, against no change.
    method : str
        "paired t", "paired MOVER" (prompts are the same) or "MOVER".
    """
    same = np.array_equal(before.prompt_id, after.prompt_id)
    lower, upper, p, code = change(before.events, before.totals, after.events, after.totals, level, same=same)
    return float(lower), float(upper), float(p), METHODS[int(code)]


METHODS = ("MOVER", "paired MOVER", "paired t")


def change(
    x: ArrayLike, n: ArrayLike, y: ArrayLike, m: ArrayLike, level: float, *, same: bool, test: bool = True
) -> tuple[NDArray, NDArray, NDArray, NDArray]:
    """Interval and p-value of the change from x of n to y of m, for many experiments at once.

    Parameters
    ----------
    x, n, y, m : array, shape (..., K) and (..., J)
        Events and totals of every prompt, before and after.
    level : float
    same : bool
        Whether the prompts are the same, in the same order (J = K).
    test : bool
        Whether p-values are asked for; nan otherwise.

    Returns
    -------
    lower, upper, p : array, shape (...)
    method : int array, shape (...)
        Index into `METHODS`.

    Notes
    -----
    From `PROMPTS` harmful prompts on, on both sides (and as many harmless ones), the interval is Student's of the
    paired, linearised differences; degrees of freedom are the prompts with an event on either side, less one, or what
    the kurtosis of the differences leaves, if less. With fewer prompts it is made from the two clustered intervals,
    with the correlation of the two sides between prompts, shrunk by 2 / c when it was seen on c harmful prompts; with
    fewer than `ALIKE`, or other prompts, with none: no correlation costs width only, as answers to one prompt go
    together rather than apart.
    """
    from scipy.special import stdtr, stdtrit

    x, n, y, m = (np.asarray(a, dtype=np.float64) for a in (x, n, y, m))
    a, b = spread(x, n), spread(y, m)
    d = b.value - a.value
    seen = np.minimum(a.seen, b.seen)
    correlation, student = np.zeros(d.shape), np.zeros(d.shape, dtype=bool)
    half = df = tail = np.ones(d.shape)
    if same and x.shape[-1] > 1:
        e, f = _deviations(x, n, a), _deviations(y, m, b)
        between = np.sqrt(np.sum(e**2, axis=-1) * np.sum(f**2, axis=-1))
        r = np.sum(e * f, axis=-1) / np.where(between > 0, between, 1.0)
        # Shrunk, for it is seen on few prompts; and two sides that are equal by chance leave an interval.
        correlation = np.where(seen >= ALIKE, r * (1 - 2 / np.maximum(seen, ALIKE)), 0.0)
        K = np.maximum(np.minimum(a.even, b.even), 1 + 1e-9)
        error = np.sqrt(K / (K - 1) * np.sum((f - e) ** 2, axis=-1))
        # Prompts that all changed alike leave rounding only, which is no interval.
        student = (seen >= PROMPTS) & (error > 1e-12)
        weight = n / a.total[..., None] + m / b.total[..., None]
        either = np.minimum(*(kish(np.where(mask, weight, 0.0)) for mask in ((x > 0) | (y > 0), (x < n) | (y < m))))
        df = np.maximum(np.minimum(either - 1, freedom(f - e, np.minimum(a.prompts, b.prompts))), 1.0)
        half = stdtrit(df, (1 + level) / 2) * error
        tail = 2 * stdtr(df, -np.abs(d) / np.where(error > 0, error, 1.0))

    def recovered(at: Any) -> tuple[NDArray, NDArray]:
        return _recovered((a.value, *a.ends(at)), (b.value, *b.ends(at)), correlation)

    lower, upper = recovered(level)
    lower = np.where(student, np.maximum(d - half, -1.0), lower)
    upper = np.where(student, np.minimum(d + half, 1.0), upper)
    p = tail if test else np.full(d.shape, np.nan)
    if test and not student.all():
        p = np.where(student, tail, _inverted(recovered, d))
    return lower, upper, p, np.where(student, 2, int(same))


def _deviations(x: NDArray, n: NDArray, s: Spread) -> NDArray:
    return (x - s.value[..., None] * n) / s.total[..., None]


def _inverted(ends: Callable[[Any], tuple[NDArray, NDArray]], d: NDArray) -> NDArray:
    """Smallest 1 - level at which the interval still excludes no change, by bisection on a logarithmic scale."""

    def excluded(alpha: NDArray) -> NDArray:
        lower, upper = ends(1 - alpha)
        return (lower > 0) | (upper < 0)

    low, high = np.full(d.shape, -27.0), np.full(d.shape, np.log(0.999))  # natural logarithms of alpha
    never = (d == 0) | ~excluded(np.exp(high))
    for _ in range(30):
        middle = (low + high) / 2
        out = excluded(np.exp(middle))
        low, high = np.where(out, low, middle), np.where(out, middle, high)
    return np.where(never, 1.0, np.exp(high))


def benjamini_hochberg(p: NDArray) -> NDArray:
    """Adjusted p-values: at most a share q of what is called below q is expected to be false.

    Parameters
    ----------
    p : array, shape (..., m)
        Over the last axis.

    Notes
    -----
    Y. Benjamini, Y. Hochberg, J. R. Stat. Soc. B 57 (1995) 289.
    """
    m = p.shape[-1]
    order = np.argsort(p, axis=-1)[..., ::-1]
    rising = np.minimum.accumulate(np.take_along_axis(p, order, axis=-1) * m / np.arange(m, 0, -1), axis=-1)
    adjusted = np.empty(p.shape)
    np.put_along_axis(adjusted, order, rising, axis=-1)
    return np.minimum(adjusted, 1.0)
