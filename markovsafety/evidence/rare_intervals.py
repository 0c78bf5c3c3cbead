"""Intervals for products of resampled fractions and for weighted hits."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["clusters", "effective", "pooled", "weighted_interval"]


def pooled(hits: NDArray, n: int, level: float) -> tuple[float, float, float, float]:
    """Interval of a splitting estimate from independent replications.

    Parameters
    ----------
    hits : int array, shape (replications, levels)
        Particles that reached each level, of n; a replication that died out has zeros from there on.
    n : int
        Particles per level and replication.
    level : float

    Returns
    -------
    value, lower, upper, error : float
        Mean over the replications of the product of their fractions (unbiased), its interval, and its relative
        standard error. Nothing is said (0, 0, 1, inf) if no replication reached the last level.

    Notes
    -----
    Two intervals are joined. The first is that of the logarithm of the product of the fractions of all replications
    together, linearised: replication r adds ``sum_i k_ri / k_i - 1``, so that whatever correlates its levels (common
    ancestors, unlike entrances) is in the variance between replications. Its logarithm is nearly normal, which the
    mean of the products is not; but it would not see a bias of order 1/n from entrances of unlike worth. The second is
    that of the mean of products, with a Student quantile on the scale of the logarithm (the delta method).
    """
    from scipy.special import stdtrit

    R = len(hits)
    with np.errstate(divide="ignore", invalid="ignore"):
        product = np.exp(np.log(hits / n).sum(axis=1))  # in logs: 60 levels of .2 are 1e-42
    value = float(product.mean())
    total = hits.sum(axis=0)
    if value == 0 or R < 2:
        return value, 0.0, 1.0, np.inf
    t = float(stdtrit(R - 1.0, (1 + level) / 2))
    active = np.column_stack([np.full(R, True), hits[:, :-1] > 0])
    share = total / (n * active.sum(axis=0))
    influence = ((hits - share * n * active) / total).sum(axis=1)
    width = t * float(np.sqrt(R / (R - 1) * np.sum(influence**2)))
    centre = float(np.exp(np.log(share).sum()))
    error = float(product.std(ddof=1) / value / np.sqrt(R))
    with np.errstate(over="ignore"):
        lower = min(centre * np.exp(-width), value * np.exp(-t * error))
        upper = max(centre * np.exp(width), value * np.exp(t * error))
    return value, float(min(lower, value)), float(min(max(upper, value), 1.0)), error


def effective(z: NDArray) -> float:
    """Kish's effective number of weighted hits, ``(sum z)^2 / sum z^2``; 0 without any."""
    square = float(np.sum(z**2))
    return float(np.sum(z)) ** 2 / square if square > 0 else 0.0


def clusters(z: NDArray, prompt: NDArray, fixed: bool) -> tuple[float, float, float]:
    """Variance of the mean of z, its degrees of freedom, and the share that one more large unit would have in the mean.

    Parameters
    ----------
    z : float array, shape (n,)
    prompt : int array, shape (n,)
        Codes from 0.
    fixed : bool
        Whether these prompts are the ones meant (strata), rather than a sample of prompts (clusters).

    Returns
    -------
    variance, degrees, share : float
        Degrees of freedom of the variance; inf where rollouts are the units. The share is that of the largest unit,
        times up to three where it stands out from the median: with long tails the largest weight is still to come.
    """
    n, size = len(z), np.bincount(prompt)
    sums = np.bincount(prompt, z)
    K = len(size)
    if K > 1 and not fixed:
        error = sums - z.mean() * size
        return float(K / (K - 1) * np.sum(error**2)) / n**2, float(K - 1), _largest(sums) / n
    inner = z - (sums / size)[prompt]
    weight = (size / np.maximum(size - 1, 1))[prompt]
    return float(np.sum(weight * inner**2)) / n**2, np.inf, _largest(z) / n


def _largest(z: NDArray) -> float:
    top = float(z.max())
    return top * min(3.0, top / float(np.median(z[z > 0])))


def weighted_interval(
    mean: float, variance: float, degrees: float, share: float, n: int, level: float
) -> tuple[float, float]:
    """Interval of a mean of weighted hits that stays honest when few of them carry it.

    Parameters
    ----------
    mean, variance : float
        Of the mean; on any scale.
    degrees : float
        Of freedom of the variance.
    share : float
        What one more large unit would contribute to the mean.
    n : int
        Rollouts.
    level : float

    Notes
    -----
    M. P. Fay and E. J. Feuer, Statistics in Medicine 16 (1997) 791: gamma quantiles with the moments of the weighted
    sum, for the upper end after one more hit of the largest weight; with equal weights the exact Poisson interval. We
    take up to three times that weight where weights are unlike (`clusters`), put the variance between rollouts, or
    prompts, in place of the Poisson variance, count one more rollout as a miss, and widen by the Student quantile's
    ratio where prompts are few.
    """
    from scipy.special import gammaincinv, ndtri, stdtrit

    tail = (1 - level) / 2
    if np.isfinite(degrees):
        variance *= float(stdtrit(degrees, 1 - tail) / ndtri(1 - tail)) ** 2
    variance += (mean / n) ** 2
    lower = float(gammaincinv(mean**2 / variance, tail)) * variance / mean
    more, spread = mean + share, variance + share**2
    upper = float(gammaincinv(more**2 / spread, 1 - tail)) * spread / more
    return min(lower, mean), max(upper, mean)


def json_ready(info: dict[str, Any]) -> dict[str, Any]:
    """Arrays as lists, so that what an answer says of itself can be written down."""
    return {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in info.items()}
