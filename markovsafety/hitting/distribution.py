"""When the hit comes: the law of the time of a first hit, its hazard, and how fast what is left runs out.

The law of the state is pushed forward token by token: what arrives at the target at time t is P(tau = t). All numbers
are sums and products of non-negative ones, carried as value, lower and upper and moved outward by the counted
roundings, like every recursion of this room."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from ..bound import Bound
from ..chains import Chain
from ..errors import InputError
from . import graph, layered
from .blocks import potential
from .certify import TINY, gamma, widen
from .core import Answer, Walk, check_chain, occupation, probability, without_start
from .intervals import proven, refuse_unproven
from .rates import Rates, rates_of
from .several import beside, laws_of
from .times import ending
from .waiting import in_tokens, waiting

__all__ = ["Distribution", "hitting_distribution"]

BLOCK = 64  # sums are made of blocks of so many terms, so that few roundings act on each
LONGEST = 2**31  # a horizon must stay below
STEPS = 30  # inverse iterations for the decay
CLOSE = 1e-10  # relative width at which they end


@dataclass(frozen=True)
class Distribution:
    """The law of the time tau of a first hit, in tokens; tau is infinite on walks that never hit.

    Every array has one entry for each time 0, 1, ..., horizon; several starts stand in a first axis.

    Attributes
    ----------
    time : int array, shape (horizon + 1,)
    probability : Bound
        P(tau = t).
    cumulative : Bound
        P(tau <= t); less than 1 in the end where a hit is not certain.
    survival : Bound
        P(tau > t), walks that never hit included.
    open : Bound
        P(tau > t, and a hit is still possible): survival without what has ended elsewhere.
    hazard : Bound
        P(tau = t | tau >= t): among all walks that have not hit. Where the walk may end elsewhere it falls as these
        gather. nan where no walk is left.
    rate : Bound
        P(tau = t | open at t - 1): the hazard among the walks that could still hit (at t = 0: among all).
    tail : Bound
        P(horizon < tau < infinity), so that cumulative at the horizon and tail add up to the probability of the hit.
    escape : Bound or None
        The share of the open walks that ends per token, in the long run: 1 minus the largest spectral radius of a class
        of states that can be met before the hit and from which it is possible. ``log(2) / escape`` tokens are the
        half-life of what is left. None on a layered chain, which ends with its last layer.
    name : str

    Examples
    --------
    >>> chain = ms.toy.shallow(3)
    >>> law: ms.hitting.Distribution = ms.hitting_distribution(chain, "harm", horizon=20)
    >>> np.round(law.rate.value[1:6], 3)  # the hazard, among answers that may still do harm
    array([0.01, 0.01, 0.01, 0.08, 0.08])
    >>> print(law.tail)
    P(harm after the horizon) = 0.0438288   proven [0.0438288, 0.0438288]
        because: rounding 3e-15; sampling, judge, lumping, model, truncation not assessed
    >>> print(f"half-life of what is open: {np.log(2) / law.escape.value:.2f} tokens")
    half-life of what is open: 6.93 tokens
    """

    time: NDArray[np.int64]
    probability: Bound
    cumulative: Bound
    survival: Bound
    open: Bound
    hazard: Bound
    rate: Bound
    tail: Bound
    escape: Bound | None
    name: str = "the hit"

    @property
    def horizon(self) -> int:
        """The last time."""
        return int(self.time[-1])

    def to_json(self) -> dict[str, Any]:
        """Every array as plain JSON data."""
        names = ("probability", "cumulative", "survival", "open", "hazard", "rate", "tail", "escape")
        parts = {name: getattr(self, name) for name in names}
        return {"time": self.time.tolist()} | {k: None if b is None else b.to_json() for k, b in parts.items()}

    def __str__(self) -> str:
        lines = [f"time to {self.name}, {self.horizon} tokens", str(self.cumulative), str(self.hazard), str(self.tail)]
        return "\n".join([*lines, *([] if self.escape is None else [str(self.escape)])])

    __repr__ = __str__


def hitting_distribution(
    chain: Chain, target: Any = None, *, horizon: int | None = None, start: Any = None
) -> Distribution:
    """Probability, hazard and survival of the time of the first hit, token by token.

    Parameters
    ----------
    chain : Chain
    target : as in `hitting_time`, optional
        None: any outcome; on a layered chain the end of the last layer counts as one.
    horizon : int, optional
        Last time asked for, in tokens; a layered chain has its number of layers by default.
    start : as in `visits`, optional
        Where to start instead of the chain's start law; several starts stand in a new first axis.

    Returns
    -------
    Distribution
        Enclosures of rounding (level 1). Sampling is not assessed, since counts do not keep when rollouts hit.

    Raises
    ------
    InputError
        If there is no start, the horizon is missing or no whole number, or the target is unknown or empty.
    UntrustedError
        If no enclosure of the tail could be proven; `partial` is that Bound.

    Notes
    -----
    The law is that of a phase-type variable, defective where a hit is not certain (M. F. Neuts, Matrix-Geometric
    Solutions in Stochastic Models (1981), chapter 2). `escape` is enclosed by the quotients of Collatz and Wielandt
    (Math. Z. 52 (1950) 642) of a vector whose defect is known, so that it keeps its digits however small it is.

    Examples
    --------
    Half of the harm that comes at all comes within nine tokens:

    >>> law = ms.hitting_distribution(ms.toy.shallow(3), "harm", horizon=9)
    >>> np.round(law.cumulative.value, 3)
    array([0.   , 0.01 , 0.017, 0.022, 0.048, 0.072, 0.093, 0.112, 0.129,
           0.145])
    >>> print(f"{law.cumulative[9].value + law.tail.value:.3f}")
    0.284
    """
    check_chain(chain)
    if start is None and chain.start is None:
        raise without_start("The law of the time of a hit")
    w = ending(chain, target)
    last = _horizon(chain, horizon)
    laws, several = laws_of(chain, start)
    found = probability(w)
    moves = None if chain.is_layered else _moves(w)
    each = [
        _columns(_push_layers(w, law, last, found.X) if moves is None else _push(moves, w, law, last, found.X))
        for law in laws
    ]
    info: dict[str, Any] = {"method": "layered" if chain.is_layered else "recursion"}
    info["why"] = "the law of the state token by token, no linear solve but for the tail"
    if chain.evidence is not None:
        info["sampling"] = "not assessed: counts do not keep when rollouts hit"
    parts = {}
    for part, label in LABELS.items():
        bounds = [proven(columns[part], info | {"name": label.format(w.name)}) for columns in each]
        parts[part] = beside(bounds, 0) if several else bounds[0]
    escapes = [None if chain.is_layered else _escape(w, law, found.X[:, 2] > 0) for law in laws]
    known = [e for e in escapes if e is not None]
    escape = None if not known else beside(known, 0) if several else known[0]
    refuse_unproven(Answer(found.X, found.method, found.why, None, found.failed), parts["tail"])
    return Distribution(np.arange(last + 1), **parts, escape=escape, name=w.name)


LABELS = {
    "probability": "P(time to {} = t)",
    "cumulative": "P(time to {} <= t)",
    "survival": "P(time to {} > t)",
    "open": "P({} after t, still possible)",
    "hazard": "P(time to {} = t | not before)",
    "rate": "P(time to {} = t | open before)",
    "tail": "P({} after the horizon)",
}


def _horizon(chain: Chain, horizon: Any) -> int:
    if horizon is None and chain.is_layered:
        return chain.n_layers
    if isinstance(horizon, (int, np.integer)) and not isinstance(horizon, bool) and 0 <= horizon < LONGEST:
        return int(horizon)
    raise InputError(
        f"horizon is {horizon!r}.",
        cause="It is the last time that is asked for, in tokens; a chain with one matrix has no natural one.",
        next=f"Pass a whole number from 0 to {LONGEST - 1}, for instance horizon=64.",
    )


@dataclass(frozen=True)
class _Passed:
    """What one push gives: columns value, lower, upper over time, and of the tail."""

    hits: NDArray[np.float64]  # (T + 1, 3): arrivals at the target
    lost: NDArray[np.float64]  # (T + 1, 3): walks that can hit no more, up to t
    open: NDArray[np.float64]  # (T + 1, 3): walks that still can
    tail: NDArray[np.float64]  # (3,)


def _total(X: NDArray) -> NDArray[np.float64]:
    """Sum over the first axis with its rounding: blocks of `BLOCK` terms, then blocks of these."""
    levels = 0
    while len(X) > 1:
        full = np.zeros((-(-len(X) // BLOCK) * BLOCK, *X.shape[1:]))
        full[: len(X)] = X
        X, levels = full.reshape(-1, BLOCK, *X.shape[1:]).sum(axis=1), levels + 1
    x = X.reshape(-1, 3).copy() if len(X) else np.zeros((1, 3))
    widen(x, gamma((BLOCK - 1) * levels))
    return x[0]


@dataclass(frozen=True)
class _Moves:
    """What an open state does with a token on a homogeneous chain, and the roundings of it.

    Attributes
    ----------
    live : bool array, shape (n,)
        The m open states: they move, and can still hit.
    into : csr array, shape (m, m)
        Row j holds the rates into j from the open states.
    exits : array, shape (2, m)
        Rates to the target, and to where it is lost.
    stay : array, shape (m, 3)
    step : array, shape (m,)
    out_error, error : array, shape (m,)
    """

    live: NDArray[np.bool_]
    into: sp.csr_array
    exits: NDArray[np.float64]
    stay: NDArray[np.float64]
    step: NDArray[np.float64]
    out_error: NDArray[np.float64]
    error: NDArray[np.float64]


def _moves(w: Walk) -> _Moves:
    rates = rates_of(w.chain)
    live = w.moving & graph.reaching(rates.W, w.hit, w.moving)
    in_tokens(rates, live)
    states = np.flatnonzero(live)
    rows = sp.csr_array(rates.W[states])
    lost = ~(w.hit | live)
    exits = np.stack([rows @ w.hit.astype(np.float64), rows @ lost.astype(np.float64)])
    into = sp.csr_array(rows[:, states].T.tocsr())
    stay = waiting(rates)[states] / rates.step[states, None]
    widen(stay, gamma(1))
    out_error = gamma(rates.terms[states] + 4 + 2 * rates.errors)
    return _Moves(
        live, into, exits, stay, rates.step[states], out_error, gamma(np.diff(into.indptr) + 5 + 2 * rates.errors)
    )


def _push(m: _Moves, w: Walk, law: NDArray, last: int, h: NDArray) -> _Passed:
    """Token by token from a start law on a homogeneous chain."""
    hits, lost, free = np.zeros((3, last + 1, 3))
    first = np.repeat(law[:, None], 3, axis=1)
    Z = first[m.live]
    hits[0], lost[0], free[0] = _total(first[w.hit]), _total(first[~(w.hit | m.live)]), _total(Z)
    here = Z[:, 2] > 0  # states that walks can be in by now: products there may underflow, all others are exactly 0
    slack = 4 * (np.diff(m.into.indptr) + 2) * TINY
    for t in range(1, last + 1):
        y = Z / m.step[:, None]
        out = m.exits[:, :, None] * y
        for part, rate in zip(out, m.exits):
            widen(part, m.out_error, np.where(here & (rate > 0), 4 * TINY, 0.0))
        hits[t], lost[t] = _total(out[0]), lost[t - 1] + _total(out[1])
        moved = m.into @ np.column_stack([y, here])
        Z = moved[:, :3] + m.stay * Z
        here = (moved[:, 3] > 0) | (here & (m.stay[:, 2] > 0))
        widen(Z, m.error, np.where(here, slack, 0.0))
        free[t] = _total(Z)
    widen(lost, gamma(np.arange(last + 1)))
    tail = Z * h[m.live]
    widen(tail, gamma(1), np.where(here, TINY, 0.0))
    return _Passed(hits, lost, free, _total(tail))


def _push_layers(w: Walk, law: NDArray, last: int, h: NDArray) -> _Passed:
    """The same on a layered chain, where nothing is left after the last layer."""
    chain, L = w.chain, w.chain.n_layers
    Z = occupation(chain, law, w.moving).Z
    alive = layered.reaching_layers(chain.layers, w.hit, w.avoid, w.last(1)[:, 0] > 0) & w.moving
    ended = alive[L].copy()  # what the last layer leaves is the hit itself
    alive[L] = False
    hits, lost, free = np.zeros((3, last + 1, 3))
    for t in range(min(L, last) + 1):
        now = w.hit | (ended & (t == L))
        hits[t], lost[t], free[t] = _total(Z[t][now]), _total(Z[t][~now & ~alive[t]]), _total(Z[t][alive[t]])
    lost[L + 1 :] = lost[min(L, last)]
    tail = np.zeros(3)
    if last < L:
        rest = Z[last][alive[last]] * h[last][alive[last]]
        widen(rest, gamma(1), np.where(rest[:, 2] > 0, TINY, 0.0))
        tail = _total(rest)
    return _Passed(hits, lost, free, tail)


def _columns(p: _Passed) -> dict[str, NDArray[np.float64]]:
    """All numbers of the distribution, from non-negative sums and quotients that are monotone in both parts."""
    sum_of = np.cumsum(p.hits, axis=0)
    widen(sum_of, gamma(np.arange(len(sum_of))), 0.0, 1.0)
    left = p.open + p.lost
    widen(left, gamma(1))
    with np.errstate(invalid="ignore", divide="ignore"):
        rate = p.hits[1:] / p.open[:-1][:, [0, 2, 1]]
    widen(rate, gamma(1), 0.0, 1.0)
    rate[p.open[:-1, 2] == 0] = np.nan
    return {
        "probability": np.minimum(p.hits, 1.0),
        "cumulative": sum_of,
        "survival": np.minimum(left, 1.0),
        "open": np.minimum(p.open, 1.0),
        "hazard": _share(p.hits, left),
        "rate": np.concatenate([_share(p.hits[:1], left[:1]), rate]),
        "tail": np.minimum(p.tail, 1.0),
    }


def _share(part: NDArray, rest: NDArray) -> NDArray[np.float64]:
    """``part / (part + rest)``, which grows with the part and falls with the rest; nan where both are 0."""
    with np.errstate(invalid="ignore", divide="ignore"):
        other = rest[:, [0, 2, 1]]
        X = part / (part + other)
    none = (part[:, 2] == 0) & (rest[:, 2] == 0)
    widen(X, gamma(2), 0.0, 1.0)
    X[none] = np.nan
    return X


def _escape(w: Walk, law: NDArray, can: NDArray) -> Bound:
    """1 minus the spectral radius of the open states within reach of a law."""
    rates = rates_of(w.chain)
    free = w.moving & can
    free &= graph.reachable(rates.W, (law > 0) & free, free)
    order = graph.plan(rates.W, free)
    slowest = np.array([1.0, 1.0, 1.0])
    if order.n_single:
        alone = np.concatenate([single for single, _ in order.levels])
        out = rates.out[alone] / rates.step[alone]
        ends = np.column_stack([out, out, out])
        widen(ends, gamma(rates.terms[alone] + 2 + 2 * rates.errors), 0.0, 1.0)
        slowest = np.minimum(slowest, ends.min(axis=0))
    place = np.full(rates.n, -1)
    for own in order.cyclic:
        slowest = np.minimum(slowest, _leaving(_alone(rates, own, place), len(own), float(slowest[2])))
    about = {"name": f"share of what is open that ends per token, before {w.name}", "certified": True}
    return proven(slowest, about | {"method": "inverse iteration", "why": "quotients of Collatz and Wielandt"})


def _alone(rates: Rates, own: NDArray, place: NDArray) -> Rates:
    """The rates of a class on their own; the states that they lead to outside stand behind the class, at rest."""
    m, rows = len(own), sp.csr_array(rates.W[own])
    place[own] = np.arange(m)
    column = place[rows.indices]
    place[own] = -1
    ends, number = np.unique(rows.indices[column < 0], return_inverse=True)
    column[column < 0] = m + number.reshape(-1)
    indptr = np.append(rows.indptr, np.full(len(ends), rows.nnz))
    W = sp.csr_array((rows.data, column, indptr), shape=(m + len(ends), m + len(ends)))
    W.sort_indices()
    rest = np.zeros(len(ends))
    return Rates(W, np.concatenate([rates.out[own], rest]), np.concatenate([rates.step[own], rest + 1]), rates.errors)


def _leaving(alone: Rates, m: int, least: float) -> NDArray[np.float64]:
    """1 minus the spectral radius of the first m states, a class; the search ends where it is proven above `least`.

    For any positive y, the least and the largest ``(y_i - (P y)_i) / y_i``, y = 0 outside the class, are below and
    above the answer. If y solves ``y - P y = x``, that is ``x_i / y_i``, and the solver's ends of y keep their digits
    where 1 minus a quotient would not. Putting y in the place of x brings both bounds together (inverse iteration)."""
    inside = np.arange(alone.n) < m
    x, known = inside.astype(np.float64), np.zeros((alone.n, 1))
    for _ in range(STEPS):
        y = potential(alone, inside, known, (alone.step * x)[:, None])[0][:, 0]
        if not (np.isfinite(y).all() and (y[:m] > 0).all()):
            break
        share = (x / np.where(inside, y, 1.0))[:m]
        if share.max() - share.min() <= CLOSE * share.max() or share.min() > 2 * least:
            break
        x = y / y.max()
    with np.errstate(divide="ignore"):
        gain = np.repeat((alone.step * x)[:, None], 3, axis=1)
        widen(gain, 2.0**-52)
        y = potential(alone, inside, np.zeros_like(gain), gain)[0][:m]
        low, high = float(np.min(x[:m] / y[:, 2])), float(np.max(x[:m] / y[:, 1]))
    low, high = low * (1 - 2.0**-50), min(high * (1 + 2.0**-50), 1.0)
    return np.array([min(max((low + high) / 2, low), high), low, high])
