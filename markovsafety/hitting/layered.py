"""Recursions without a linear solve: chains with one matrix per position, and states on no cycle in their order.

``x_t = c_t + P_t x_(t+1)``, with every entry of P_t taken as given. All operations are additions and multiplications of
non-negative numbers, so nothing cancels: for probabilities the roundings behind every layer are counted, and the ends
follow from the value alone; with gains, which have ends of their own, three columns go through the same steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from . import level_kernels as kernels
from .rates import Rates

__all__ = [
    "Flow",
    "acyclic",
    "backward",
    "forward",
    "hitting",
    "reaching_layers",
    "staying",
    "substitute",
    "sure_layers",
]

Layers = Sequence[sp.csr_array]


def _parts(P: sp.csr_array) -> tuple[NDArray, NDArray, NDArray]:
    """What the kernels read, without a copy."""
    return P.indptr, P.indices, P.data


def _columns(layers: Layers, n: int, columns: int) -> NDArray[np.float64]:
    """Room for an answer, every column contiguous: shape (columns, L + 1, n)."""
    return np.empty((columns, len(layers) + 1, n))


def _seen(planes: NDArray[np.float64]) -> NDArray[np.float64]:
    """The same memory as shape (L + 1, n, columns)."""
    return planes.transpose(1, 2, 0)


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
    can[:] = target
    can[-1] |= last & ~avoid
    return _marked(layers, target | avoid, can)


def sure_layers(layers: Layers, target: NDArray, last: NDArray) -> NDArray[np.bool_]:
    """Whether every walk from each state of each layer hits the target, shape (L + 1, n)."""
    miss = np.zeros((len(layers) + 1, len(target)), dtype=bool)
    miss[-1] = ~(last | target)
    return ~_marked(layers, target, miss)


def _marked(layers: Layers, fixed: NDArray, marked: NDArray) -> NDArray[np.bool_]:
    for t in range(len(layers) - 1, -1, -1):
        kernels.some_back(*_parts(layers[t]), fixed, t, marked)
    return marked


def hitting(layers: Layers, hit: NDArray, avoid: NDArray, last: NDArray, columns: int) -> NDArray[np.float64]:
    """Hitting probabilities; exactly 0 where the graph says so.

    Parameters
    ----------
    layers : L csr arrays of shape (n, n)
        Rows sum to at most 1 + 1e-9.
    hit, avoid : bool array, shape (n,)
        Where a walk ends with 1 and with 0, at any layer.
    last : array, shape (n,)
        Values after the last layer, 0 or 1.
    columns : {1, 3}
        3 for value, lower, upper.

    Returns
    -------
    array, shape (L + 1, n, columns)
        Read-only.
    """
    fixed = hit | avoid
    X = _columns(layers, len(hit), columns)
    X[:, :-1, fixed] = hit[fixed]
    X[:, -1] = last
    live = np.zeros((len(layers) + 1, len(hit)), dtype=bool)
    live[:, hit] = True
    live[-1] = last > 0
    error = np.zeros(2)
    for t in range(len(layers) - 1, -1, -1):
        P = layers[t]
        kernels.hit_back(P.indptr, P.indices, P.data, fixed, t, X, live, error)
    X.flags.writeable = False  # so that a `Bound` keeps it without a copy
    return _seen(X)


def backward(
    layers: Layers, fixed: NDArray, known: NDArray, last: NDArray, live: NDArray, gain: NDArray
) -> NDArray[np.float64]:
    """The recursion with gains.

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
    gain : array, shape (L, n, c)
        What a step from each state adds.

    Returns
    -------
    array, shape (L + 1, n, c)
    """
    X = _columns(layers, len(fixed), known.shape[1])
    X[:, :-1, fixed] = known[fixed].T[:, None]
    X[:, -1] = np.where(fixed[:, None], known, last).T
    for t in range(len(layers) - 1, -1, -1):
        kernels.gain_back(*_parts(layers[t]), fixed, live, t, X, gain[t])
    return _seen(X)


def staying(layers: Layers) -> NDArray[np.bool_]:
    """States that no layer ever leaves, shape (n,)."""
    stay = np.ones(len(layers[0].indptr) - 1, dtype=bool)
    for P in layers:
        kernels.leave(*_parts(P), stay)
    return stay


def forward(layers: Layers, moving: NDArray, start: NDArray) -> NDArray[np.float64]:
    """Law of the state at every position; mass on states that are not `moving` is reported once and goes no further.

    Parameters
    ----------
    layers : L csr arrays of shape (n, n)
        Rows sum to at most 1 + 1e-9.
    moving : bool array, shape (n,)
    start : array, shape (n, c)
        Exact: all columns are the same; c is 1, or 3 for value, lower, upper.

    Returns
    -------
    array, shape (L + 1, n, c)
    """
    n, columns = start.shape
    Z = np.zeros((columns, len(layers) + 1, n))
    Z[:, 0] = start.T
    count = np.zeros((2, n), dtype=np.int64)
    count[0] = np.where(start[:, -1] > 0, 0, -1)
    lost = 0.0
    for t, P in enumerate(layers):
        lost = kernels.push(*_parts(P), moving, t, Z, count, lost)
    return _seen(Z)


def substitute(rates: Rates, order: NDArray[np.integer], X: NDArray, gain: NDArray | None, ceiling: float) -> None:
    """``x_i = (c_i + sum_j w_ij x_j) / d_i`` in place, for states on no cycle, one after the other.

    Parameters
    ----------
    order : int array, shape (m,)
        The states, each after all states that it can move to.
    X : array, shape (n, 3) or (n, 1)
        Value, lower, upper of all states, or the value alone.
    gain : array, same shape, optional
        The constant c on the scale of the rates.
    ceiling : float
        A known upper bound of the solution.
    """
    W = rates.W
    if X.shape[1] == 1:
        alone = np.empty(0) if gain is None else np.ascontiguousarray(gain[:, 0])
        kernels.values(*_parts(W), rates.out, order, alone, ceiling, X[:, 0])
        return
    gain = np.empty((0, 3)) if gain is None else gain
    kernels.substitute(*_parts(W), rates.out, order, gain, rates.errors, ceiling, X)


def acyclic(rates: Rates, order: NDArray[np.integer], one: NDArray, level: NDArray | None) -> NDArray[np.float64]:
    """Hitting probabilities where no state comes back: one column of values, ends from the roundings on the way.

    Parameters
    ----------
    order : int array, shape (m,)
        States between 0 and 1, each after all states that it can move to.
    one : bool array, shape (n,)
        Where the probability is 1; it is 0 at all others that are not in the order.
    level : int array, shape (n,), optional
        For every state of the order, more than that of all states that it can move to, and 1 at least. None: values
        alone.

    Returns
    -------
    array, shape (n, 3) or (n, 1)
        Read-only.
    """
    X = np.empty((1 if level is None else 3, rates.n))
    X[:] = one
    kernels.values(*_parts(rates.W), rates.out, order, np.empty(0), 1.0, X[0])
    if level is not None:
        highest = int(level.max(initial=0))
        kernels.ends(rates.W.indptr, order, level, highest, rates.errors, *X)
    X.flags.writeable = False  # so that a `Bound` keeps it without a copy
    return X.T


@dataclass(frozen=True)
class Flow:
    """Expected visits in the making, in units of the rates: sums that states receive from all who move to them.

    Attributes
    ----------
    Z : array, shape (n, 3) or (n, 1)
        Source plus what has arrived so far; changed in place.
    arrived : int array, shape (n,)
        Number of terms in every sum, for its rounding.
    """

    rates: Rates
    Z: NDArray[np.float64]
    arrived: NDArray[np.int64]

    def settled(self, states: NDArray[np.integer]) -> NDArray[np.float64]:
        """What has arrived in some states, source included, with the rounding of its sum; call it once per state."""
        kernels.settle(states, self.rates.errors, self.Z, self.arrived)
        return self.Z[states]

    def single(self, order: NDArray[np.integer]) -> None:
        """Solve states on no cycle, last first, and pass on what leaves them."""
        kernels.flow(*_parts(self.rates.W), self.rates.out, order, self.rates.errors, self.Z, self.arrived)

    def pass_on(self, states: NDArray[np.integer], outside: sp.csr_array) -> None:
        """Add to all others what leaves some solved states at the rates `outside`, shape (m, n)."""
        kernels.pass_on(*_parts(outside), states, self.Z, self.arrived)
