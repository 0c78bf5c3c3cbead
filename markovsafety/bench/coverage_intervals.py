"""Intervals of today's tools, beside which the coverage benchmark sets ours; many experiments at once."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..clusters import clopper_pearson, spread

__all__ = ["TOOLS", "bootstrap", "bootstrap_change", "exact", "oracle", "wald", "wald_change", "wilson"]

TOOLS = ("Wald", "Wilson", "Clopper-Pearson", "bootstrap")
Z = 1.959963984540054  # normal quantile .975
RESAMPLES = 400


def wald(x: NDArray, n: NDArray) -> tuple[NDArray, NDArray]:
    """``p +- z sqrt(p (1 - p) / N)`` of all rollouts as independent trials."""
    N = n.sum()
    p = x.sum(axis=-1) / N
    half = Z * np.sqrt(p * (1 - p) / N)
    return p - half, p + half


def wilson(x: NDArray, n: NDArray) -> tuple[NDArray, NDArray]:
    """Wilson's score interval of all rollouts as independent trials."""
    N = n.sum()
    p = x.sum(axis=-1) / N
    middle, half = p + Z**2 / (2 * N), Z * np.sqrt(p * (1 - p) / N + (Z / (2 * N)) ** 2)
    return (middle - half) / (1 + Z**2 / N), (middle + half) / (1 + Z**2 / N)


def exact(x: NDArray, n: NDArray) -> tuple[NDArray, NDArray]:
    """Clopper-Pearson of all rollouts as independent trials."""
    return clopper_pearson(x.sum(axis=-1), np.broadcast_to(n.sum(), x.shape[:-1]))


def _resampled(K: int) -> NDArray[np.float64]:
    """How often each prompt is drawn in each resample, shape (K, RESAMPLES): the same for all experiments."""
    return np.random.default_rng(K).multinomial(K, np.full(K, 1 / K), RESAMPLES).T.astype(np.float64)


def bootstrap(x: NDArray, n: NDArray) -> tuple[NDArray, NDArray]:
    """Percentiles of the rate over resampled prompts."""
    W = _resampled(len(n))
    low, high = np.quantile(x @ W / (n @ W), [0.025, 0.975], axis=-1)
    return low, high


def wald_change(x: NDArray, y: NDArray, n: NDArray) -> tuple[NDArray, NDArray]:
    """Wald's interval of a difference of two sets of independent trials."""
    N = n.sum()
    p, q = x.sum(axis=-1) / N, y.sum(axis=-1) / N
    half = Z * np.sqrt((p * (1 - p) + q * (1 - q)) / N)
    return q - p - half, q - p + half


def bootstrap_change(x: NDArray, y: NDArray, n: NDArray) -> tuple[NDArray, NDArray]:
    """Percentiles of the difference over resampled prompts, paired."""
    W = _resampled(len(n))
    low, high = np.quantile((y - x) @ W / (n @ W), [0.025, 0.975], axis=-1)
    return low, high


def oracle(x: NDArray, n: NDArray, icc: float) -> NDArray[np.float64]:
    """Width of Clopper-Pearson at the effective size that whoever knows the correlation would take."""
    N = n.sum()
    size = N / (1 + icc * (np.sum(n**2) / N - 1))
    value = spread(x, n).value
    lower, upper = clopper_pearson(np.minimum(value * size, size), np.broadcast_to(size, value.shape))
    return upper - lower
