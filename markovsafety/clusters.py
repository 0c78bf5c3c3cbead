"""Intervals for rates from counts: independent trials, and trials that come in clusters, one cluster per prompt.

Numbers and arrays only; `markovsafety.bound.clustered` makes a `Bound` of them. Everything here works on many
experiments at once, one per entry of the leading axes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .errors import InputError

__all__ = ["Spread", "check_level", "clopper_pearson", "effective_size", "freedom", "kish", "spread"]

MANY = 1e9  # degrees of freedom from which on Student's quantile is the normal one


def check_level(level: Any) -> None:
    """Refuse what is no confidence level.

    Raises
    ------
    InputError
        If level is no number strictly between 0 and 1.

    Examples
    --------
    >>> from markovsafety.bound import check_level
    >>> check_level(0.95)
    >>> check_level(95)
    Traceback (most recent call last):
        ...
    markovsafety.errors.InputError: level is 95.
      cause: A confidence level lies strictly between 0 and 1.
      next:  Pass e.g. level=0.95.
    """
    if isinstance(level, bool) or not isinstance(level, (int, float, np.number)) or not 0 < level < 1:
        raise InputError(
            f"level is {level!r}.",
            cause="A confidence level lies strictly between 0 and 1.",
            next="Pass e.g. level=0.95.",
        )


def clopper_pearson(events: ArrayLike, total: ArrayLike, level: float = 0.95) -> tuple[Any, Any]:
    """Two-sided exact interval for a probability from independent trials.

    Parameters
    ----------
    events, total : float or array
        Number of events and of trials, broadcast together; fractions are allowed (effective sizes), by the beta-
        quantile form of the interval.
    level : float
        Confidence level, 0 < level < 1; each end misses with probability at most ``(1 - level) / 2``.

    Returns
    -------
    lower, upper : float or array
        ``[0, 1]`` where total is 0.

    Raises
    ------
    InputError
        If events are negative, exceed the total, or anything is not finite.

    Notes
    -----
    C. J. Clopper and E. S. Pearson, Biometrika 26 (1934) 404.

    Examples
    --------
    No harm in 100 independent answers is no proof that there is none:

    >>> from markovsafety.bound import clopper_pearson
    >>> lower, upper = clopper_pearson([0, 3], 100)
    >>> print(np.round(lower, 4), np.round(upper, 4))
    [0.     0.0062] [0.0362 0.0852]
    """
    x, n = np.broadcast_arrays(np.asarray(events, dtype=np.float64), np.asarray(total, dtype=np.float64))
    wrong = ~(np.isfinite(x) & np.isfinite(n) & (x >= 0) & (x <= n))
    if wrong.any():
        at = np.argmax(wrong)
        raise InputError(
            f"{x.flat[at]:g} events in {n.flat[at]:g} trials.",
            cause="Events must be finite, non-negative and at most the number of trials.",
            next="Check the counts.",
        )
    check_level(level)
    lower, upper = _exact(x, n, level)
    if x.ndim == 0:
        return float(lower), float(upper)
    return lower, upper


def _exact(x: NDArray, n: NDArray, level: Any) -> tuple[NDArray, NDArray]:
    """`clopper_pearson` of checked arrays; `level` may be an array too."""
    from scipy.special import betaincinv

    tail = (1 - level) / 2
    inner_low, inner_high = (x > 0), (x < n)
    # The dummies 1, 1 keep betaincinv off its undefined corner; np.where throws their results away.
    lower = np.where(inner_low, betaincinv(np.where(inner_low, x, 1.0), n - x + 1, tail), 0.0)
    upper = np.where(inner_high, betaincinv(x + 1, np.where(inner_high, n - x, 1.0), 1 - tail), 1.0)
    return lower, upper


def effective_size(
    total: ArrayLike, prompts: ArrayLike, deff: ArrayLike, level: ArrayLike = 0.95, seen: ArrayLike | None = None
) -> NDArray[np.float64]:
    """Number of independent trials that trials clustered by prompt are worth (see `markovsafety.bound.clustered`).

    Parameters
    ----------
    total : float or array
        Trials.
    prompts : float or array
        Prompts they belong to: the result is no smaller, for no trials vary more than one coin per prompt.
    deff : float or array
        Design effect.
    level : float or array
        Confidence level.
    seen : float or array, optional
        Prompts from which the design effect is known (its degrees of freedom, and one): those with an event, or those
        with a trial without one, whichever are fewer. Below 2 the size is `prompts`. Not given: all of them.

    Returns
    -------
    array
        Between `prompts` and `total`; `total` if that is less than `prompts`.

    Examples
    --------
    400 answers whose variance is 8 times that of independent ones, if 20 prompts or only 5 of them showed it:

    >>> from markovsafety.bound import effective_size
    >>> np.round(effective_size(400, 20, deff=8, seen=[20, 5]), 1)
    array([44.1, 25.1])
    """
    from scipy.special import stdtrit

    n, K = np.asarray(total, dtype=np.float64), np.asarray(prompts, dtype=np.float64)
    known, tail = np.asarray(K if seen is None else seen, dtype=np.float64), (1 + np.asarray(level)) / 2
    ratio = stdtrit(np.clip(n - 1, 1.0, MANY), tail) / stdtrit(np.clip(known - 1, 1.0, MANY), tail)
    size = n / np.maximum(deff, 1e-12) * ratio**2
    return np.minimum(np.where(known < 2, K, np.maximum(size, K)), n)


@dataclass(frozen=True, eq=False)
class Spread:
    """What the interval of a clustered rate is made of; every field has the shape of the leading axes.

    Parameters
    ----------
    value : array
        Rate; nan without trials.
    events, total, prompts : array
        Events, trials, and prompts with a trial.
    even : array
        Number of prompts of equal size that average as well: ``sum(n)^2 / sum(n^2)`` (Kish).
    seen : array
        The same number for the prompts with an event, or those with a trial without one, whichever is less.
    known : array
        Degrees of freedom of `deff`: ``seen - 1``, or what the kurtosis of the prompts' residuals leaves, if less.
    deff : array
        Design effect: linearised variance between prompts over that of independent trials; 1 where it cannot be seen.
    """

    value: NDArray
    events: NDArray
    total: NDArray
    prompts: NDArray
    even: NDArray
    seen: NDArray
    known: NDArray
    deff: NDArray

    def size(self, level: ArrayLike = 0.95) -> NDArray[np.float64]:
        """Independent trials that the rollouts are worth."""
        blind = (self.events <= 0) | (self.events >= self.total)
        size = effective_size(self.total, self.even, self.deff, level, 1 + self.known)
        size = np.where(blind, np.minimum(self.prompts, self.total), size)
        return np.where(self.prompts < 2, self.total, size)

    def ends(self, level: ArrayLike = 0.95) -> tuple[NDArray, NDArray]:
        """Lower and upper end of the interval; [0, 1] without trials."""
        size, value = self.size(level), np.where(self.total > 0, self.value, 0.0)
        lower, upper = _exact(np.minimum(value * size, size), size, np.asarray(level))
        lower, upper = np.minimum(lower, value), np.maximum(upper, value)  # against rounding
        empty = self.total <= 0
        return np.where(empty, 0.0, lower), np.where(empty, 1.0, upper)


def spread(events: ArrayLike, totals: ArrayLike) -> Spread:
    """How the events of clustered trials are spread over the prompts.

    Parameters
    ----------
    events, totals : array, shape (..., K)
        Events and trials of every prompt; totals may lack the leading axes.

    Returns
    -------
    Spread
        With the leading axes.
    """
    x, n = np.broadcast_arrays(np.asarray(events, dtype=np.float64), np.asarray(totals, dtype=np.float64))
    total, K = n.sum(axis=-1), (n > 0).sum(axis=-1)
    hits = np.minimum(x.sum(axis=-1), total)
    share = (
        n / np.maximum(n.max(axis=-1, initial=0.0), 1e-300)[..., None]
    )  # of the largest, so that squares stay finite
    value = np.divide(hits, total, out=np.full(total.shape, np.nan), where=total > 0)
    even = kish(share)
    residual = (x - np.nan_to_num(value)[..., None] * n) / np.maximum(total, 1e-300)[..., None]
    between = even / np.maximum(even - 1, 1e-12) * np.sum(residual**2, axis=-1)
    mixed = (K > 1) & (hits > 0) & (hits < total)
    alone = np.where(mixed, value * (1 - value), 1.0)
    # (total - 1) as in the unbiased variance, so that one trial per prompt gives exactly 1.
    deff = np.where(mixed, between * np.maximum(total - 1, 1.0) / alone, 1.0)
    seen = np.minimum(kish(np.where(x > 0, share, 0.0)), kish(np.where(x < n, share, 0.0)))
    known = np.minimum(seen - 1, freedom(residual, K))
    return Spread(value, hits, total, K.astype(np.float64), even, seen, known, deff)


def freedom(residual: NDArray, K: ArrayLike) -> NDArray[np.float64]:
    """Degrees of freedom of a variance estimated from K residuals with their kurtosis, ``2 K / (kurtosis - 1)``.

    The variance of a variance estimate from K values of kurtosis k is (k - 1) / K in units of its square, that of
    chi-square with f degrees of freedom 2 / f.
    """
    squares = residual**2
    second = squares.sum(axis=-1)
    kurtosis = K * (squares**2).sum(axis=-1) / np.maximum(second**2, 1e-300)
    return 2 * np.asarray(K) / np.maximum(kurtosis - 1, 1e-12)


def kish(n: NDArray) -> NDArray[np.float64]:
    """Number of equal weights that average as well as the weights n, over the last axis: ``sum(n)^2 / sum(n^2)``."""
    return n.sum(axis=-1) ** 2 / np.maximum((n**2).sum(axis=-1), 1e-300)
