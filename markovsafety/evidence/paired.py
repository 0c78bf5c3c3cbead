"""Intervals for differences of rates: clustered by prompt, paired where prompts are the same, fit for zero events."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..bound import Bound
from .cells import Cell

__all__ = ["FEW", "benjamini_hochberg", "cluster_t", "mover", "paired"]

FEW = 5  # with fewer harmful, or harmless, rollouts than this a normal-theory interval is not trusted


def cluster_t(sums: NDArray, level: float) -> float:
    """Half-width of the t-interval of a mean whose K clusters contribute `sums`, deviations that add up to 0."""
    from scipy.special import stdtrit

    K = len(sums)
    spread = np.sqrt(K / (K - 1) * np.sum(sums**2))
    return float(stdtrit(K - 1.0, (1 + level) / 2) * spread)


def rare(events: float, total: float) -> bool:
    """Whether a cell holds too few harmful or harmless rollouts for normal theory."""
    return min(events, total - events) < FEW


def deviations(c: Cell) -> NDArray:
    """What each prompt contributes to the linearised error of the pooled rate, shape (K,)."""
    total = c.totals.sum()
    return (c.events - c.events.sum() / total * c.totals) / total


def mover(before: Bound, after: Bound) -> tuple[float, float]:
    """Interval of ``after - before`` from the intervals of two independent rates.

    Notes
    -----
    The method of variance estimates recovery: R. G. Newcombe, Statistics in Medicine 17 (1998) 873, method 10, here
    with clustered intervals in place of Wilson's.
    """
    d = after.value - before.value
    lower = d - np.hypot(after.value - after.lower, before.upper - before.value)
    upper = d + np.hypot(after.upper - after.value, before.value - before.lower)
    return max(float(lower), -1.0), min(float(upper), 1.0)


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
        "paired t" where the prompts are the same and neither cell is rare, else "MOVER".
    """
    from scipy.special import stdtr

    d = after.events.sum() / after.totals.sum() - before.events.sum() / before.totals.sum()
    same = np.array_equal(before.prompt_id, after.prompt_id)
    common = not any(rare(c.events.sum(), c.totals.sum()) for c in (before, after))
    if same and common and len(before.prompt_id) > 1:
        z = deviations(after) - deviations(before)
        half = cluster_t(z, level)
        if half > 1e-12:  # prompts that all changed alike leave rounding only, which is no interval
            K = len(z)
            p = 2 * stdtr(K - 1.0, -abs(d) / np.sqrt(K / (K - 1) * np.sum(z**2)))
            return max(d - half, -1.0), min(d + half, 1.0), float(p), "paired t"
    lower, upper = mover(before.bound(level), after.bound(level))
    return lower, upper, _inverted(before, after, d), "MOVER"


def _inverted(before: Cell, after: Cell, d: float) -> float:
    """Smallest 1 - level at which the interval still excludes no change, by bisection on a logarithmic scale."""

    def excluded(alpha: float) -> bool:
        lower, upper = mover(before.bound(1 - alpha), after.bound(1 - alpha))
        return lower > 0 or upper < 0

    if d == 0 or not excluded(0.999):
        return 1.0
    low, high = -27.0, np.log(0.999)  # natural logarithms of alpha
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (low, middle) if excluded(float(np.exp(middle))) else (middle, high)
    return float(np.exp(high))


def benjamini_hochberg(p: NDArray) -> NDArray:
    """Adjusted p-values: at most a share q of what is called below q is expected to be false.

    Notes
    -----
    Y. Benjamini, Y. Hochberg, J. R. Stat. Soc. B 57 (1995) 289.
    """
    m = len(p)
    order = np.argsort(p)[::-1]
    adjusted = np.empty(m)
    adjusted[order] = np.minimum.accumulate(p[order] * m / np.arange(m, 0, -1))
    return np.minimum(adjusted, 1.0)
