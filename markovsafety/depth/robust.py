"""The most and the least harm of all chains whose rows lie near those of a given one.

Every row may move within a ball of total variation, each on its own. The worst chain exists and is one chain, the same
row at every visit, so the largest harm solves the robust Bellman equation

    h(s) = max over rows p with TV(p, P_s) <= r_s of sum_j p_j h(j),

and the best row is found by sorting: mass r_s leaves the states of least harm and goes to the state of most. See A.
Nilim and L. El Ghaoui, Operations Research 53 (2005) 780; G. N. Iyengar, Mathematics of Operations Research 30 (2005)
257. The equation has many solutions where a walk can be kept from ending; the least is meant, and the graph says where
harm can be avoided altogether.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..bound import Bound
from ..chains import Chain
from ..errors import InputError, UntrustedError
from ..hitting import hitting_probability
from ..hitting.core import Walk, walk
from .capacity import plain_chain, radii

__all__ = ["robust_harm"]

LARGEST = 4000  # states; rows are dense
ROUNDS = 200
GAIN = 1e-13  # a row is exchanged for a gain beyond rounding only


def robust_harm(
    chain: Chain, radius: ArrayLike, target: Any = "harm", *, support: str = "any", level: float = 1.0
) -> Bound:
    """Enclose harm when every row is known up to a distance.

    Parameters
    ----------
    chain : Chain
        Homogeneous or layered; up to 4000 states.
    radius : float or array of shape (n,), layered (L, n)
        Total variation (half the L1 distance) within which each row lies, e.g. from `row_concentration`. One number
        leaves the rows of outcomes as they are.
    target : as in `hitting_probability`
    support : {"any", "row"}
        Where mass may go: to any state, harm included, since what was never seen is not impossible; or only to states
        that the row leads to already.
    level : float
        Probability that all rows lie within their distances; 1 if that is proven.

    Returns
    -------
    Bound
        Shape (n,), layered (L + 1, n). Value: harm of the chain as given; lower and upper: the extremes, attained by
        chains within the distances (to about 1e-12). Never wider than `perturbation_bound` from the same distances
        where mass may go anywhere, and usually far narrower than that.

    Raises
    ------
    InputError
        If a distance is outside [0, 1], the chain is too large, or `support` is unknown.
    UntrustedError
        If no extreme was found; `partial` encloses by 0 and 1 what it has to.

    Examples
    --------
    Every row is known up to 1 % in total variation:

    >>> print(ms.depth.robust_harm(ms.toy.shallow(3), 0.01).at_start)
    P(harm) = 0.284   proven [0.23, 0.339]   because: model 0.055; sampling, judge,
        lumping, truncation, rounding not assessed
    """
    if support not in ("any", "row"):
        raise InputError(
            f"support is {support!r}.", cause="Mass goes to any state or within its row.", next='Pass "any" or "row".'
        )
    if chain.n_states > LARGEST:
        raise InputError(
            f"The chain has {chain.n_states} states.",
            cause=f"Every row is sorted as a whole, which is done for up to {LARGEST}.",
            next="Use perturbation_bound, or lump states.",
        )
    bare = plain_chain(chain)
    w = walk(bare, target)
    r = radii(bare, radius, w.hit, "the radius")
    value = hitting_probability(bare, target, certify=False)
    h = np.asarray(value.value)
    if bare.is_layered:
        ends = [_backward(w, r, support, most) for most in (False, True)]
    else:
        ends = [_least(w, r, support, h), _most(w, r, support, h)]
    lower, upper = np.minimum(np.clip(ends[0], 0, 1), h), np.maximum(np.clip(ends[1], 0, 1), h)
    start = None
    if bare.start is not None:
        mid, low, high = (float(bare.start @ (x[0] if bare.is_layered else x)) for x in (h, lower, upper))
        low, high = min(low, mid), max(high, mid)
        start = Bound(mid, low, high, level, {"model": (high - low) / 2}, None, {"name": "P(harm)", "method": "robust"})
    info = {"name": "P(harm)", "method": "robust Bellman equation, policy iteration", "support": support}
    return Bound(h, lower, upper, level, {"model": (upper - lower) / 2}, start, info)


def _extreme(P: NDArray, r: NDArray, x: NDArray, most: bool, support: str) -> NDArray[np.float64]:
    """The rows within r of those of P that make ``row @ x`` largest, or smallest."""
    y = x if most else -x
    order = np.argsort(y, kind="stable")
    sorted_rows = P[:, order]
    before = np.cumsum(sorted_rows, axis=1) - sorted_rows
    taken = np.clip(r[:, None] - before, 0.0, sorted_rows)
    if support == "any":
        to = np.full(len(P), len(order) - 1)
    else:  # the last place of the order that the row leads to
        to = len(order) - 1 - np.argmax(sorted_rows[:, ::-1] > 0, axis=1)
    moved = sorted_rows - taken
    moved[np.arange(len(P)), to] += taken.sum(axis=1)
    out = np.empty_like(P)
    out[:, order] = moved
    return out


def _backward(w: Walk, r: NDArray, support: str, most: bool) -> NDArray[np.float64]:
    layers = w.chain.layers
    x = np.empty((len(layers) + 1, w.chain.n_states))
    x[-1] = w.last(1)[:, 0]
    for t in range(len(layers) - 1, -1, -1):
        rows = _extreme(layers[t].toarray(), r[t], x[t + 1], most, support)
        x[t] = np.where(w.hit, 1.0, np.einsum("ij,j->i", rows, x[t + 1]))
    return x


def _harm(P: NDArray, hit: NDArray, safe: NDArray) -> NDArray[np.float64]:
    """Least solution for a dense matrix; `safe` states end without a hit."""
    P = P.copy()
    P[hit | safe] = 0.0
    outcomes = {"harm": hit} | ({"safe": safe} if safe.any() else {})
    rest = ~(hit | safe)
    P[rest] /= P[rest].sum(axis=1, keepdims=True)
    return np.asarray(hitting_probability(Chain(P, outcomes), "harm", certify=False).value)


def _most(w: Walk, r: NDArray, support: str, h: NDArray) -> NDArray[np.float64]:
    """From below by better and better rows; what no row improves is the least fixed point (it is one, and below it)."""
    P, rows, none = w.chain.P.toarray(), w.chain.P.toarray(), np.zeros(len(h), dtype=bool)
    x = h
    for _ in range(ROUNDS):
        best = _extreme(P, r, x, True, support)
        better = (best @ x > x + GAIN) & ~w.hit
        if not better.any():
            return x
        rows[better] = best[better]
        x = np.maximum(x, _harm(rows, w.hit, none))
    raise _lost(h)


def _least(w: Walk, r: NDArray, support: str, h: NDArray) -> NDArray[np.float64]:
    """Harm is 0 where it can be avoided for ever; from elsewhere every chain ends, so that one fixed point is left."""
    P = w.chain.P.toarray()
    safe = _avoiding(P, r, w.hit, support)
    rows = P.copy()
    x = _harm(rows, w.hit, safe)
    for _ in range(ROUNDS):
        best = _extreme(P, r, x, False, support)
        better = (best @ x < x - GAIN) & ~w.hit & ~safe
        if not better.any():
            return x
        rows[better] = best[better]
        x = np.minimum(x, _harm(rows, w.hit, safe))
    raise _lost(h)


def _avoiding(P: NDArray, r: NDArray, hit: NDArray, support: str) -> NDArray[np.bool_]:
    """The largest set without the target that each of its rows can be kept in."""
    safe = ~hit
    while True:
        out = P[:, ~safe].sum(axis=1)
        inside = np.ones(len(P), dtype=bool) if support == "any" else (P[:, safe] > 0).any(axis=1)
        fewer = safe & inside & (out <= r + 1e-15)
        if np.array_equal(fewer, safe):
            return safe
        safe = fewer


def _lost(h: NDArray) -> UntrustedError:
    return UntrustedError(
        f"No extreme chain was found in {ROUNDS} rounds.",
        cause="Rows are exchanged for gains at the limit of rounding.",
        next="Use perturbation_bound, which needs no search.",
        partial=Bound(h, np.zeros_like(h), np.ones_like(h), 1.0),
    )
