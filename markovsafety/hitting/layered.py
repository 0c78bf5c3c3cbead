"""Chains with one matrix per position: backward recursion for values, forward for occupation; no linear solve.

``x_t = c_t + P_t x_(t+1)``, with every entry of P_t taken as given. All operations are additions and multiplications of
non-negative numbers, so a row with k entries adds k + 1 roundings to what the layer behind it has, and nothing cancels.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from .certify import TINY, gamma, widen

__all__ = ["backward", "forward", "reaching_layers", "staying", "sure_layers"]

Layers = Sequence[sp.csr_array]


def reaching_layers(layers: Layers, target: NDArray, avoid: NDArray, last: NDArray) -> NDArray[np.bool_]:
    """Whether the target can be hit from each state of each layer, shape (L + 1, n), target included.

    Parameters
    ----------
    layers : L csr arrays of shape (n, n)
    target, avoid : bool array, shape (n,)
        Where a walk ends, at any layer.
    last : bool array, shape (n,)
        States that count as a hit after the last layer.
    """
    can = np.empty((len(layers) + 1, len(target)), dtype=bool)
    can[-1] = (last | target) & ~avoid
    for t in range(len(layers) - 1, -1, -1):
        step = _pattern(layers[t]) @ can[t + 1].astype(np.float64) > 0
        can[t] = target | (step & ~avoid)
    return can


def sure_layers(layers: Layers, target: NDArray, last: NDArray) -> NDArray[np.bool_]:
    """Whether every walk from each state of each layer hits the target, shape (L + 1, n)."""
    sure = np.empty((len(layers) + 1, len(target)), dtype=bool)
    sure[-1] = last | target
    for t in range(len(layers) - 1, -1, -1):
        miss = _pattern(layers[t]) @ (~sure[t + 1]).astype(np.float64) > 0
        sure[t] = target | ~miss
    return sure


def _pattern(P: sp.csr_array) -> sp.csr_array:
    return sp.csr_array(((P.data > 0).astype(np.float64), P.indices, P.indptr), shape=P.shape)


def backward(
    layers: Layers,
    fixed: NDArray,
    known: NDArray,
    last: NDArray,
    live: NDArray,
    gain: NDArray | None = None,
    ceiling: float = np.inf,
) -> NDArray[np.float64]:
    """The recursion.

    Parameters
    ----------
    layers : L csr arrays of shape (n, n)
    fixed : bool array, shape (n,)
        States whose rows are never read (target, avoided).
    known : array, shape (n, c)
        Their values; c is 1, or 3 for value, lower, upper.
    last : array, shape (n, c)
        Values of all states after the last layer.
    live : bool array, shape (L + 1, n)
        States whose value is not zero by the graph alone.
    gain : array, shape (L, n, c), optional
        What a step from each state adds.
    ceiling : float
        A known upper bound of the answer; 1 for probabilities, whose rows may sum to 1 + 1e-9.

    Returns
    -------
    array, shape (L + 1, n, c)
    """
    X = np.empty((len(layers) + 1, *known.shape))
    X[-1] = np.where(fixed[:, None], known, last)
    for t in range(len(layers) - 1, -1, -1):
        P = layers[t]
        k = np.diff(P.indptr)
        x = P @ X[t + 1]
        if gain is not None:
            x += gain[t]
        # 2 TINY for every product, on both ends: what underflow can cost where a value is not exactly zero.
        widen(x, gamma(k + 2), 2 * (k + 1) * TINY, ceiling)
        X[t] = np.where(fixed[:, None], known, np.where(live[t][:, None], np.minimum(x, ceiling), 0.0))
    return X


def staying(layers: Layers) -> NDArray[np.bool_]:
    """States that no layer ever leaves, shape (n,)."""
    n = len(layers[0].indptr) - 1
    stay = np.ones(n, dtype=bool)
    for P in layers:
        row = np.repeat(np.arange(n), np.diff(P.indptr))
        stay[row[(P.indices != row) & (P.data > 0)]] = False
    return stay


def forward(layers: Layers, moving: NDArray, start: NDArray) -> NDArray[np.float64]:
    """Law of the state at every position; mass on states that are not `moving` is reported once and goes no further.

    Parameters
    ----------
    moving : bool array, shape (n,)
    start : array, shape (n, c)

    Returns
    -------
    array, shape (L + 1, n, c)
    """
    Z = np.empty((len(layers) + 1, *start.shape))
    Z[0] = start
    for t, P in enumerate(layers):
        here = np.where(moving[:, None], Z[t], 0.0)
        into = sp.csr_array(P.T.tocsr())
        k = np.diff(into.indptr)
        z = into @ here
        reached = _pattern(into) @ (here[:, -1] > 0).astype(np.float64) > 0
        widen(z, gamma(k + 1), np.where(reached, 2 * (k + 1) * TINY, 0.0))
        Z[t + 1] = z
    return Z
