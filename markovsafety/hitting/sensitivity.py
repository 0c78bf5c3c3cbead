"""Derivatives of a hitting probability, and the exact attribution of a change between two chains to their states."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from ..chains import Chain
from ..errors import InputError
from . import graph, layered
from .core import Walk, occupation, probability, walk, without_start
from .rates import Rates, rates_of

__all__ = ["attribute", "sensitivity", "visits_before"]


def visits_before(w: Walk, start: NDArray) -> tuple[NDArray, NDArray]:
    """Expected visits before the hit, and the states that can still hit.

    Returns
    -------
    N : array, shape (n,) or (L + 1, n)
        In tokens; on states that do not move or cannot hit any more, the probability of arriving there.
    live : bool array, same shape
        States that move and can still hit.
    """
    if w.chain.is_layered:
        live = layered.reaching_layers(w.chain.layers, w.hit, w.avoid, w.last(1)[:, 0] > 0) & w.moving
        return occupation(w.chain, start, w.moving, 1).Z[..., 0], live
    rates = rates_of(w.chain)
    live = graph.reaching(rates.W, w.hit, w.moving) & w.moving
    return occupation(w.chain, start, live, 1).Z[:, 0], live


def sensitivity(chain: Chain, target: Any) -> sp.csr_array | tuple[sp.csr_array, ...]:
    """Derivative of the hitting probability at the start by every transition probability.

    Parameters
    ----------
    chain : Chain
        With a start law.
    target : as in `hitting_probability`

    Returns
    -------
    csr array, shape (n, n); layered: one per layer
        ``visits_i * h_j`` in the pattern of ``chain.P`` (so ``.data`` belong together), visits before the hit. These
        are raw partial derivatives; moving mass within a row from j to k changes the probability by the difference of
        two entries. Rows of the target are 0: they are never read.

    Raises
    ------
    InputError
        If the chain has no start law, or the target is unknown or empty.

    Notes
    -----
    C. D. Meyer, SIAM J. Algebraic Discrete Methods 1 (1980) 273, for the fundamental matrix; values, not bounds.
    """
    w = walk(chain, target)
    if chain.start is None:
        raise without_start("A derivative at the start")
    h = probability(w, certify=False).X[..., 0]
    N, live = visits_before(w, chain.start)
    N = np.where(live, N, 0.0)
    if not chain.is_layered:
        return _dyad(chain.P, N, h)
    return tuple(_dyad(P, N[t], h[t + 1]) for t, P in enumerate(chain.layers))


def _dyad(P: sp.csr_array, N: NDArray, h: NDArray) -> sp.csr_array:
    data = np.repeat(N, np.diff(P.indptr)) * h[P.indices]
    return sp.csr_array((data, P.indices.copy(), P.indptr.copy()), shape=P.shape)


def attribute(before: Chain, after: Chain, target: Any) -> NDArray[np.float64]:
    """Which states' rows account for the change of the hitting probability at the start.

    Parameters
    ----------
    before, after : Chain
        On the same states, both with a start law.
    target : as in `hitting_probability`

    Returns
    -------
    array, shape (n,), layered (L + 1, n)
        Sums to the change at the start, up to rounding. A row that did not change gets exactly 0.

    Raises
    ------
    InputError
        If the chains do not have the same states or targets, or one has no start law.

    Notes
    -----
    With the change dP of the rows, visits N and probabilities h before, N' and h' after, ``h' - h = N' dP h = N dP h'``
    holds exactly (the resolvent identity); the attribution is the mean of both, so it does not prefer one chain. A
    state that can no longer hit is taken as an end of value 0: what arrives there loses the h it had (and gains, the
    other way round). A changed start law adds its difference times the mean of h and h'.
    """
    a, b = walk(before, target), walk(after, target)
    _same_states(before, after, a, b)
    if before.start is None or after.start is None:
        raise without_start("Attribution")
    h, g = (probability(w, certify=False).X[..., 0] for w in (a, b))
    start = (before.start + after.start) / 2
    if before.is_layered:
        share = _layered_share(a, b, h, g, start)
    else:
        share = (_one_side(b, a, h, start) - _one_side(a, b, g, start)) / 2
    first = share[0] if before.is_layered else share
    first += (after.start - before.start) * ((h[0] + g[0]) if before.is_layered else (h + g)) / 2
    return share


def _one_side(w: Walk, other: Walk, h: NDArray, start: NDArray) -> NDArray:
    """``N_w (P_w - P_other) h`` by row, h harmonic for the other chain."""
    N, live = visits_before(w, start)
    change = sp.csr_array(_jumps(rates_of(w.chain)) - _jumps(rates_of(other.chain)))
    change.eliminate_zeros()
    row = np.repeat(np.arange(len(h)), np.diff(change.indptr))
    moved = np.bincount(row, change.data * (h[change.indices] - h[row]), minlength=len(h))
    return np.where(live, N * moved, np.where(w.moving, -N * h, 0.0))


def _jumps(rates: Rates) -> sp.csr_array:
    data = rates.W.data / np.repeat(rates.step, rates.terms)
    return sp.csr_array((data, rates.W.indices, rates.W.indptr), shape=rates.W.shape)


def _layered_share(a: Walk, b: Walk, h: NDArray, g: NDArray, start: NDArray) -> NDArray:
    share = np.zeros_like(h)
    N, M = (occupation(w.chain, start, w.moving, 1).Z[..., 0] for w in (a, b))
    for t, (P, R) in enumerate(zip(a.chain.layers, b.chain.layers)):
        change = sp.csr_array(R - P)
        share[t] = np.where(a.moving, (M[t] * (change @ h[t + 1]) + N[t] * (change @ g[t + 1])) / 2, 0.0)
    return share


def _difference(a: Sequence[Any], b: Sequence[Any]) -> str:
    """What tells two sequences of labels apart, in words."""
    for mine, other, which in ((a, set(b), "only the first chain has"), (b, set(a), "only the second chain has")):
        extra = [x for x in mine if x not in other]
        if extra:
            more = f" and {len(extra) - 1} more" if len(extra) > 1 else ""
            return f"{len(a)} and {len(b)} of them, {which} {extra[0]!r}{more}"
    i = next(i for i, (x, y) in enumerate(zip(a, b)) if x != y)
    return f"the same labels in another order, state {i} is {a[i]!r} in the first and {b[i]!r} in the second"


def _same_states(before: Chain, after: Chain, a: Walk, b: Walk) -> None:
    if before.n_layers != after.n_layers:
        raise InputError(
            f"One chain has {before.n_layers} layers, the other {after.n_layers}.",
            cause="Attribution compares the chains row by row (0 layers: homogeneous).",
            next="Use two chains with equally many layers.",
        )
    if tuple(before.states) != tuple(after.states):
        raise InputError(
            f"The chains have different states: {_difference(before.states, after.states)}.",
            cause="Attribution compares the chains row by row.",
            next="Give both chains the same states in the same order, seen or not.",
        )
    if not np.array_equal(a.hit, b.hit) or a.tail != b.tail:
        raise InputError(
            f"The target {a.name!r} is not the same set of states in both chains.",
            cause="Attribution explains the change of one probability.",
            next="Name the target by states that both chains have.",
        )
