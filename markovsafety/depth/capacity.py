"""Certificates: how far harm can be from what a chain says if its rows are only nearly right.

Two chains with probabilities of harm h and h' (1 on harm, 0 on the other ends), visits N and N' before the end, satisfy

    h' - h = N' dP h = N dP h',    dP = P' - P,

the resolvent identity. A row that is off by TV (total variation, half the L1 distance) therefore moves harm by at most
TV per visit, and

    |h'(s0) - h(s0)| <= sum over s of N(s0, s) TV_s:

the N-TV certificate. It is sharp (move the mass from refusal to harm), needs the visits of one of the two chains only,
and weighs every row by how often it is used, unlike ``||(I - Q)^-1|| ||dP||``, of which it is at most half. It says
nothing once rows are off by more than one over the expected length; `perturbation_bound` says so.

The same may be asked exactly: `robust_harm` is the largest and the smallest harm of all chains whose rows lie within a
given distance. Our own statements throughout; TV is the unit of every distance here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..bound import Bound
from ..chains import Chain
from ..errors import InputError
from ..hitting import hitting_probability, hitting_time
from ..hitting.graph import closed_classes
from ..hitting.rates import rates_of

__all__ = ["Perturbation", "perturbation_bound", "row_concentration", "row_distance"]


@dataclass(frozen=True, eq=False)
class Perturbation:
    """What a change of rows may do to harm.

    Parameters
    ----------
    harm : Bound, shape (n,), layered (L + 1, n)
        Harm of the chain before; the interval holds harm after the change, at every state (level 1).
    change : array, same shape
        The certificate: no less than the change of harm from each state, at most 1.
    plain : array, same shape
        ``sum N TV`` itself, which may exceed 1. `change` is the smallest of this, with the visits of either chain, and
        of its refinement by the range of harm over the states that a row leads to.
    distance : array, shape (n,), layered (L, n)
        Total variation by row.
    naive : float
        ``||(I - Q)^-1|| ||dP||`` in the maximum norm, the bound that is usually quoted; layered: L times the largest.
    start : float or None
        `change` at the start law.
    plain_start : float or None
        `plain` at the start law.
    vacuous : bool
        Whether the interval at the start (without one, at every state) says nothing that was not known before.
    reason : str
        Why it is vacuous, or how much it leaves.

    Examples
    --------
    Where only distances are known: an error of 1 % in every row leaves something to know, one of 20 % does not.

    >>> small, large = (ms.depth.perturbation_bound(ms.toy.shallow(3), tv) for tv in (0.01, 0.2))
    >>> print(type(small).__name__, small.harm.at_start)
    Perturbation P(harm) after the change = 0.284   proven [0.23, 0.339]   because: model
        0.055; sampling, judge, lumping, truncation, rounding not assessed
    >>> print(large)
    |change of P(harm)| <= 1 at the start (vacuous: rows that are off by up to 0.2 per
        token may move harm by 1)
    """

    harm: Bound
    change: NDArray[np.float64]
    plain: NDArray[np.float64]
    distance: NDArray[np.float64]
    naive: float
    start: float | None
    plain_start: float | None
    vacuous: bool
    reason: str

    def __str__(self) -> str:
        where = "at every state" if self.start is None else "at the start"
        size = float(self.change.max()) if self.start is None else self.start
        return f"|change of P(harm)| <= {size:.3g} {where} ({self.reason})"

    __repr__ = __str__


def row_distance(before: Chain, after: Chain) -> NDArray[np.float64]:
    """Total variation between the rows of two chains on the same states.

    Parameters
    ----------
    before, after : Chain

    Returns
    -------
    array, shape (n,), layered (L, n)

    Raises
    ------
    InputError
        If the chains differ in states or layers.

    Examples
    --------
    >>> before, after = ms.toy.shallow(3), ms.toy.shallow(3, aligned=(0.03, 0.28))
    >>> ms.depth.row_distance(before, after).round(3)
    array([0.02, 0.02, 0.02, 0.  , 0.  , 0.  ])
    """
    same_states(before, after)
    found = [np.asarray(abs(P - Q).sum(axis=1)).ravel() / 2 for P, Q in zip(before.layers, after.layers)]
    return np.stack(found) if before.is_layered else found[0]


def perturbation_bound(before: Chain, after: Chain | ArrayLike, target: Any = "harm") -> Perturbation:
    """Certify how far harm moves when rows change.

    Parameters
    ----------
    before : Chain
        Homogeneous or layered.
    after : Chain, float or array of shape (n,), layered (L, n)
        The changed chain; or, where only distances are known, the total variation of every row, one number for all of
        them. Numbers leave the rows of outcomes as they are; an array may change those too.
    target : as in `hitting_probability`

    Returns
    -------
    Perturbation

    Raises
    ------
    InputError
        If the chains differ in states, layers or target, or a distance is outside [0, 1].

    Notes
    -----
    States of a class that is never left and has no harm count as ends. If a row of such a class changes, whatever
    arrives there counts in full, since then harm may follow with any probability.

    With both chains known the certificate is of use as an explanation (which rows matter), not as a bound: `attribute`
    splits the change exactly.

    Examples
    --------
    Aligned positions do harm where they refused. Then the certificate is sharp: it is the true change of harm.

    >>> before, after = ms.toy.shallow(3), ms.toy.shallow(3, aligned=(0.03, 0.28))
    >>> print(ms.depth.perturbation_bound(before, after))
    |change of P(harm)| <= 0.0433 at the start (leaves an interval of width 0.0866)
    >>> harm = [ms.hitting_probability(chain, "harm").at_start.value for chain in (before, after)]
    >>> print(f"{harm[0]:.4f} to {harm[1]:.4f}, by {harm[1] - harm[0]:.4f}")
    0.2845 to 0.3278, by 0.0433
    """
    hit = before.mask(target)
    other = after if isinstance(after, Chain) else None
    if other is not None:
        same_states(before, other)
        if not np.array_equal(hit, other.mask(target)):
            raise InputError(
                "The target is not the same set of states in both chains.",
                cause="A change of harm compares one event.",
                next="Name the target by states that both chains have.",
            )
        tv = row_distance(before, other)
    else:
        tv = radii(before, after, hit)
    tv = np.where(hit, 0.0, tv)
    bare = plain_chain(before)
    value = hitting_probability(bare, target)
    h = np.asarray(value.value)
    plain = _spent(bare, tv, tv, hit)
    change = np.minimum(plain, 1.0)
    if other is not None:
        later = plain_chain(other)
        g = np.asarray(hitting_probability(later, target).value)
        change = np.minimum(change, _spent(later, tv, tv, hit))
        for chain, x in ((bare, g), (later, h)):
            change = np.minimum(change, _spent(chain, tv * _range(bare, later, x), tv, hit))
    change = np.where(hit, 0.0, change)
    lower = np.maximum(np.asarray(value.lower) - change, 0.0)
    upper = np.minimum(np.asarray(value.upper) + change, 1.0)
    at = None if before.start is None else before.start
    first = (lambda x: x[0]) if before.is_layered else (lambda x: x)
    start, plain_start = (None, None) if at is None else (_mean(at, first(change)), _mean(at, first(plain)))
    start_bound = None
    if at is not None:
        middle = value.at_start
        start_bound = Bound(
            middle.value,
            min(middle.value, max(middle.lower - start, 0.0)),
            max(middle.value, min(middle.upper + start, 1.0)),
            1.0,
            {"model": start},
            None,
            {"name": "P(harm) after the change", "method": "N-TV certificate"},
        )
    info = {"name": "P(harm) after the change", "method": "N-TV certificate"}
    harm = Bound(h, np.minimum(lower, h), np.maximum(upper, h), 1.0, {"model": change}, start_bound, info)
    vacuous, reason = _verdict(bare, tv, h if at is None else _mean(at, first(h)), change if at is None else start, hit)
    return Perturbation(harm, change, plain, tv, _naive(bare, tv, hit), start, plain_start, vacuous, reason)


def plain_chain(chain: Chain) -> Chain:
    """The numbers of a chain without the evidence behind them: a certificate takes them as given."""
    if chain.evidence is None:
        return chain
    if chain.is_layered:
        return Chain.layered(list(chain.layers), dict(chain.outcomes), chain.start, chain.states)
    return Chain(chain.P, dict(chain.outcomes), chain.start, chain.states, entry=dict(chain.entry))


def same_states(before: Chain, after: Chain) -> None:
    """Raise unless two chains have the same states and equally many layers."""
    if before.n_layers != after.n_layers or tuple(before.states) != tuple(after.states):
        raise InputError(
            f"The chains have {before.n_states} and {after.n_states} states, {before.n_layers} and {after.n_layers} "
            "layers, or differ in labels.",
            cause="Rows are compared one by one.",
            next="Give both chains the same states in the same order, and equally many layers.",
        )


def radii(chain: Chain, radius: Any, hit: NDArray, name: str = "the distance") -> NDArray[np.float64]:
    """Distances by row, checked; one number leaves the rows of outcomes as they are."""
    shape = (chain.n_layers, chain.n_states) if chain.is_layered else (chain.n_states,)
    try:
        given = np.asarray(radius, dtype=np.float64)
        found = np.array(np.broadcast_to(given, shape))
    except (TypeError, ValueError):
        found = np.full(shape, np.nan)
        given = found
    if not np.all((found >= 0) & (found <= 1)):
        raise InputError(
            f"{name} is {radius!r}.",
            cause=f"Total variation lies in [0, 1]: one number, or an array of shape {shape}.",
            next="Pass half the L1 distance of each row.",
        )
    if given.ndim == 0:
        found[..., chain.outcome_mask] = 0.0
    found[..., hit] = 0.0
    return found


def _mean(law: NDArray, x: NDArray) -> float:
    on = law > 0
    return float(law[on] @ x[on])


def _ends(chain: Chain, hit: NDArray) -> NDArray[np.bool_]:
    """Where a walk is over: the target, and classes that are never left."""
    rates = rates_of(chain)
    W = rates.W.copy()
    W.data[np.repeat(hit, np.diff(W.indptr))] = 0.0
    W.eliminate_zeros()
    return hit | closed_classes(W)


def _spent(chain: Chain, cost: NDArray, tv: NDArray, hit: NDArray) -> NDArray[np.float64]:
    """Expected sum of the costs of the rows that a walk uses, from every state, rounded up."""
    if not tv.any():
        return np.zeros((chain.n_layers + 1, chain.n_states) if chain.is_layered else chain.n_states)
    if chain.is_layered:
        total = np.zeros((chain.n_layers + 1, chain.n_states))
        for t in range(chain.n_layers - 1, -1, -1):
            total[t] = np.where(hit, 0.0, cost[t] + chain.layers[t] @ total[t + 1])
        return total * (1 + 1e-13 * (chain.n_layers + 1))
    ends = _ends(chain, hit)
    total = np.asarray(hitting_time(chain, ends, reward=np.where(ends, 0.0, cost)).upper)
    touched = ends & ~hit & (_reached(chain, tv > 0, ends & ~hit))
    if touched.any():
        total = total + np.asarray(hitting_probability(chain, touched).upper)
    return total


def _reached(chain: Chain, marked: NDArray, within: NDArray) -> NDArray[np.bool_]:
    """States of `within` whose closed class has a marked row."""
    from scipy.sparse.csgraph import connected_components

    where = np.flatnonzero(within)
    found = np.zeros(chain.n_states, dtype=bool)
    if len(where):
        _, label = connected_components(chain.P[where][:, where], directed=True, connection="strong")
        bad = np.unique(label[marked[where]])
        found[where] = np.isin(label, bad)
    return found


def _range(before: Chain, after: Chain, x: NDArray) -> NDArray[np.float64]:
    """Largest minus smallest x over the states that a row leads to in either chain."""
    out = []
    for t, (P, Q) in enumerate(zip(before.layers, after.layers)):
        values = x[t + 1] if before.is_layered else x
        support = (abs(P) + abs(Q)).tocsr()
        ends = [np.full(before.n_states, fill) for fill in (-np.inf, np.inf)]
        rows = np.repeat(np.arange(before.n_states), np.diff(support.indptr))
        np.maximum.at(ends[0], rows, values[support.indices])
        np.minimum.at(ends[1], rows, values[support.indices])
        out.append(np.where(np.isfinite(ends[0]), np.maximum(ends[0] - ends[1], 0.0), 0.0))
    return np.stack(out) if before.is_layered else out[0]


def _naive(chain: Chain, tv: NDArray, hit: NDArray) -> float:
    worst = 2 * float(tv.max(initial=0.0))
    if chain.is_layered or worst == 0:
        return worst * max(chain.n_layers, 0)
    return worst * float(np.max(hitting_time(chain, _ends(chain, hit)).value))


def _verdict(chain: Chain, tv: NDArray, h: Any, change: Any, hit: NDArray) -> tuple[bool, str]:
    """Whether nothing is left of [0, 1] that the certificate excludes, and why."""
    trivial = np.maximum(h, 1 - np.asarray(h))
    live = ~hit if np.ndim(h) else True
    vacuous = bool(np.all((np.asarray(change) >= trivial) | ~np.asarray(live)))
    if np.ndim(h):
        return vacuous, "vacuous at every state" if vacuous else "informative from some states"
    if not vacuous:
        left = min(h + change, 1.0) - max(h - change, 0.0)
        side = "" if h - change > 0 else "; it bounds harm from above only" if h + change < 1 else "; from below only"
        return False, f"leaves an interval of width {left:.3g}{side if h - change <= 0 or h + change >= 1 else ''}"
    if not chain.is_layered and not np.isfinite(change):
        return True, "vacuous: a row that changes is visited for ever"
    length = chain.n_layers if chain.is_layered else None
    per = float(tv.max(initial=0.0))
    where = f" over at most {length} tokens" if length else ""
    what = "1" if change >= 1 else f"{trivial:.3g}, what any change could do"
    return True, f"vacuous: rows that are off by up to {per:.3g} per token{where} may move harm by {what}"


def row_concentration(n: ArrayLike, k: int, rows: int = 1, delta: float = 0.05) -> Any:
    """Total variation within which n samples leave a row of k entries, for all of so many rows at once.

    Parameters
    ----------
    n : int or array
        Samples of the row, at least 1.
    k : int
        Number of states that the row may lead to.
    rows : int
        Number of rows that must hold together.
    delta : float
        Probability that one of them does not, in (0, 1).

    Returns
    -------
    float or array
        ``sqrt(ln(rows (2^k - 2) / delta) / (2 n))``, at most 1; half of the L1 distance.

    Raises
    ------
    InputError
        If a number is out of range.

    Notes
    -----
    T. Weissman, E. Ordentlich, G. Seroussi, S. Verdu and M. J. Weinberger, Inequalities for the L1 deviation of the
    empirical distribution, HP Labs HPL-2003-97R1 (2003). It takes every number of samples as fixed before sampling:
    rows that are visited by a walk need a union over the numbers of visits as well.

    Examples
    --------
    Ten rows of ten entries each, all within this distance at 95 %, by the number of samples of a row:

    >>> ms.depth.row_concentration([100, 1000, 10_000], k=10, rows=10).round(3)
    array([0.247, 0.078, 0.025])
    """
    size = np.asarray(n, dtype=np.float64)
    if not (np.all(size >= 1) and k >= 1 and k == int(k) and rows >= 1 and 0 < delta < 1):
        raise InputError(
            f"n={n!r}, k={k!r}, rows={rows!r}, delta={delta!r}.",
            cause="Samples, entries and rows are counted from 1; delta is a probability.",
            next="Pass numbers in range.",
        )
    if k == 1:
        found = np.zeros_like(size)
    else:
        log = k * np.log(2.0) + np.log1p(-(2.0 ** (1 - k))) + np.log(rows) - np.log(delta)
        found = np.minimum(np.sqrt(max(log, 0.0) / (2 * size)), 1.0)
    return float(found) if found.ndim == 0 else found
