"""Where harm comes from: the states and transitions that carry the most of it, and the likeliest roads there."""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray
from scipy.sparse import csgraph

from ..bound import Bound, check_level, clopper_pearson
from ..chains import Chain
from ..errors import InputError
from .certify import gamma
from .core import Walk, probability, walk, without_start
from .intervals import bound_of, prompt_tally
from .sensitivity import visits_before

__all__ = ["Critical", "CriticalState", "CriticalTransition", "Road", "critical"]

POPS = 100_000  # steps of the search for roads


@dataclass(frozen=True)
class CriticalState:
    """A state at which much of the target's probability is gained.

    Attributes
    ----------
    state : label (layered: (layer, label))
    visits : float
        Expected visits before the hit, in tokens.
    gain : float
        Expected increase of h per token from here, falls not counted.
    score : float
        visits x gain.
    harm : Bound
        Probability of the target from here.
    """

    state: Any
    visits: float
    gain: float
    score: float
    harm: Bound


@dataclass(frozen=True)
class CriticalTransition:
    """A transition that carries much of the target's probability.

    Attributes
    ----------
    source, target : labels
    probability : float
        Of this transition, per token.
    visits : float
        Expected visits of the source.
    gain : float
        ``h(target) - h(source)``.
    score : float
        visits x probability x gain.
    harm : Bound
        Probability of the target from where the transition leads.
    """

    source: Any
    target: Any
    probability: float
    visits: float
    gain: float
    score: float
    harm: Bound


@dataclass(frozen=True)
class Road:
    """A way from the start to the target that meets no state twice.

    Attributes
    ----------
    states : tuple of labels
    probability : Bound
        That the walk visits these states in this order, waiting in place allowed.
    """

    states: tuple[Any, ...]
    probability: Bound


@dataclass(frozen=True)
class Critical:
    """What `critical` found, likeliest first.

    Attributes
    ----------
    states, transitions, roads : tuples of records
    harm : Bound
        Probability of the target at the start.
    complete : bool
        False if the search for roads was cut short; the roads found are the likeliest ones all the same.

    Examples
    --------
    >>> found: ms.hitting.Critical = ms.critical(ms.toy.shallow(3), "harm", top=2)
    >>> print(found.harm)
    P(harm) = 0.284468   proven [0.284468, 0.284468]
        because: rounding 9e-16; sampling, judge, lumping, model, truncation not assessed
    >>> for road in found.roads:
    ...     print(" > ".join(road.states), f"{road.probability.value:.3f}")
    position 0 > position 1 > position 2 > tail > harm 0.263
    position 0 > harm 0.010
    """

    states: tuple[CriticalState, ...]
    transitions: tuple[CriticalTransition, ...]
    roads: tuple[Road, ...]
    harm: Bound
    complete: bool = True

    def graph(self) -> Any:
        """The critical states, transitions and roads as a `networkx.DiGraph`, scores and h on nodes and edges."""
        import networkx as nx

        g = nx.DiGraph()
        for s in self.states:
            g.add_node(s.state, score=s.score, visits=s.visits, harm=s.harm.value)
        for road in self.roads:
            nx.add_path(g, road.states)
        for t in self.transitions:
            g.add_edge(t.source, t.target, score=t.score, probability=t.probability)
        return g

    def __str__(self) -> str:
        if not self.roads:
            return f"{self.harm}\nnothing leads to the target"
        lines = [str(self.harm), "", "states            visits      gain     score   h"]
        lines += [
            f"  {_short(s.state):<14} {s.visits:>8.3g}  {s.gain:>8.3g}  {s.score:>8.3g}   {_range(s.harm)}"
            for s in self.states
        ]
        lines += ["", "transitions                       p      gain     score   h behind it"]
        lines += [
            f"  {_short(t.source):>14} -> {_short(t.target):<14} {t.probability:>6.3g}  {t.gain:>8.3g}  {t.score:>8.3g}"
            f"   {_range(t.harm)}"
            for t in self.transitions
        ]
        lines += ["", "roads" + ("" if self.complete else " (search cut short)")]
        lines += [f"  {_range(r.probability)}  " + _way(r.states) for r in self.roads]
        return "\n".join(lines)

    __repr__ = __str__


def _short(label: Any) -> str:
    return label if isinstance(label, str) else str(label).replace(" ", "")


def _way(states: tuple[Any, ...]) -> str:
    names = [_short(s) for s in states]
    if len(names) > 9:
        names = [*names[:4], f"({len(names) - 8} more)", *names[-4:]]
    return " > ".join(names)


def _range(b: Bound) -> str:
    return f"{b.value:.3g} [{b.lower:.3g}, {b.upper:.3g}]"


def critical(chain: Chain, target: Any = "harm", top: int = 20, *, level: float = 0.95) -> Critical:
    """Prefixes and transitions through which the target is reached, and the likeliest roads to it.

    Parameters
    ----------
    chain : Chain
        With a start law.
    target : as in `hitting_probability`
    top : int
        How many states, transitions and roads at most.
    level : float
        Confidence level of the intervals of an estimated chain.

    Returns
    -------
    Critical
        States ranked by expected visits x expected gain in h per token, transitions by visits x probability x gain
        (only gains count: mass that moves towards the target), roads by probability.

    Raises
    ------
    InputError
        If the chain has no start law, or the target is unknown or empty, or `top` is not positive.

    Notes
    -----
    A road's probability is a product over its moves; on an estimated chain its interval is made of Clopper-Pearson
    intervals of the moves, each at a level that makes all of them hold together (Bonferroni). Roads are found
    best-first with the exact remaining cost as guide, so they come out in order and the search expands little else.

    Examples
    --------
    Harm is mostly gained on the trajectory, some of it by refusals that are taken back:

    >>> ms.critical(ms.toy.leak(), "harm", top=2)
    P(harm) = 0.166667   proven [0.166667, 0.166667]
        because: rounding 5e-16; sampling, judge, lumping, model, truncation not assessed
    <BLANKLINE>
    states            visits      gain     score   h
      trajectory         3.33    0.0417     0.139   0.167 [0.167, 0.167]
      refusal            8.33   0.00278    0.0231   0.0278 [0.0278, 0.0278]
    <BLANKLINE>
    transitions                       p      gain     score   h behind it
          trajectory -> harm             0.05     0.833     0.139   1 [1, 1]
             refusal -> trajectory       0.02     0.139    0.0231   0.167 [0.167, 0.167]
    <BLANKLINE>
    roads
      0.143 [0.143, 0.143]  trajectory > harm
    """
    if isinstance(top, bool) or not isinstance(top, (int, np.integer)) or top < 1:
        raise InputError(f"top is {top!r}.", cause="It is how many to return.", next="Pass a positive whole number.")
    check_level(level)
    w = walk(chain, target)
    if chain.start is None:
        raise without_start("A ranking by visits")
    bound = bound_of(w, probability(w), level)
    arrows = _arrows(w, bound)
    gain = arrows.p * np.maximum(arrows.h[arrows.head] - arrows.h[arrows.tail], 0.0)
    flow = arrows.visits[arrows.tail] * gain
    per_state = np.bincount(arrows.tail, gain, minlength=len(arrows.h))
    states = tuple(
        CriticalState(arrows.label(i), float(arrows.visits[i]), float(per_state[i]), float(v), bound[arrows.key(i)])
        for i, v in _best(arrows.visits * per_state, top)
    )
    transitions = tuple(_transition(arrows, bound, e, v) for e, v in _best(flow, top))
    ways, complete = _roads(arrows, top)
    roads = tuple(Road(tuple(arrows.label(i) for i in way), _road(arrows, way, level)) for way in ways)
    return Critical(states, transitions, roads, bound.at_start, complete)


@dataclass(frozen=True)
class _Arrows:
    """All moves of states that move, a layered chain unrolled: state i at layer t has the number t n + i."""

    w: Walk
    tail: NDArray[np.intp]
    head: NDArray[np.intp]
    p: NDArray[np.float64]
    h: NDArray[np.float64]
    visits: NDArray[np.float64]
    goal: NDArray[np.bool_]

    def key(self, i: int) -> Any:
        n = self.w.chain.n_states
        return (i // n, i % n) if self.w.chain.is_layered else i

    def label(self, i: int) -> Any:
        n = self.w.chain.n_states
        return (i // n, self.w.chain.states[i % n]) if self.w.chain.is_layered else self.w.chain.states[i]


def _arrows(w: Walk, bound: Bound) -> _Arrows:
    chain, n = w.chain, w.chain.n_states
    N, live = visits_before(w, chain.start, np.asarray(bound.value))
    tails, heads, ps = [], [], []
    for t, P in enumerate(chain.layers):
        row = np.repeat(np.arange(n), np.diff(P.indptr))
        on = (live[t] if chain.is_layered else live)[row]
        tails.append(row[on] + t * n)
        heads.append(P.indices[on] + (t + 1) * n * chain.is_layered)
        ps.append(P.data[on])
    goal = np.tile(w.hit, chain.n_layers + 1)
    if chain.is_layered:
        goal[-n:] |= w.last(1)[:, 0] > 0
    h, visits = np.asarray(bound.value).ravel(), np.where(live, N, 0.0).ravel()
    return _Arrows(w, np.concatenate(tails), np.concatenate(heads), np.concatenate(ps), h, visits, goal)


def _best(score: NDArray, top: int) -> list[tuple[int, float]]:
    order = np.argsort(-score, kind="stable")[:top]
    return [(int(i), float(score[i])) for i in order if score[i] > 0]


def _transition(a: _Arrows, bound: Bound, e: int, score: float) -> CriticalTransition:
    i, j = int(a.tail[e]), int(a.head[e])
    gain = float(a.h[j] - a.h[i])
    return CriticalTransition(a.label(i), a.label(j), float(a.p[e]), float(a.visits[i]), gain, score, bound[a.key(j)])


def _roads(a: _Arrows, top: int) -> tuple[list[tuple[int, ...]], bool]:
    """The `top` likeliest simple roads, as state numbers, and whether the search was completed."""
    n = len(a.h)
    graph, cost, left, following = _costs(a)
    heap: list[tuple[float, int, float, tuple[int, ...], int]] = []
    ways: list[tuple[int, ...]] = []
    number = 0

    def offer(path: tuple[int, ...], spent: float, sibling: int) -> None:
        nonlocal number
        last = path[-1] if path else n
        for place in range(sibling, graph[last + 1] - graph[last]):
            e = following[graph[last] + place]
            if int(cost[0][e]) not in path:
                number += 1
                heapq.heappush(heap, (spent + cost[1][e] + left[int(cost[0][e])], number, spent, path, place))
                return

    offer((), 0.0, 0)
    for _ in range(POPS):
        if not heap or len(ways) == top:
            return ways, True
        _, _, spent, path, place = heapq.heappop(heap)
        last = path[-1] if path else n
        e = following[graph[last] + place]
        offer(path, spent, place + 1)
        longer = (*path, int(cost[0][e]))
        if a.goal[longer[-1]]:
            ways.append(longer)
        else:
            offer(longer, spent + float(cost[1][e]), 0)
    return ways, not heap or len(ways) == top


def _costs(a: _Arrows) -> tuple[NDArray, tuple[NDArray, NDArray], NDArray, NDArray]:
    """Moves as a graph with a hub for the start; every move costs -log of its probability, each node's moves best
    first.

    Returns
    -------
    indptr : int array, shape (N + 2,)
    heads, costs : arrays
    left : array, shape (N + 1,)
        Least cost from each node to the target.
    following : int array
        Positions in heads and costs, each node's sorted by cost to go.
    """
    n, chain = len(a.h), a.w.chain
    p = _jump(a)
    first = np.flatnonzero(chain.start)
    use = (p > 0) & ((a.h[a.head] > 0) | a.goal[a.head])
    tail = np.concatenate([a.tail[use], np.full(len(first), n)])
    head = np.concatenate([a.head[use], first])
    # A whiff per move keeps certain moves from being free, so that no circle costs nothing.
    cost = np.concatenate([-np.log(p[use]), -np.log(chain.start[first])]) + 1e-12
    cost = np.maximum(cost, 1e-12)
    order = np.argsort(tail, kind="stable")
    tail, head, cost = tail[order], head[order], cost[order]
    indptr = np.concatenate([[0], np.cumsum(np.bincount(tail, minlength=n + 1))])
    backward = sp.csr_array((cost, (head, tail)), shape=(n + 1, n + 1))
    goals = np.flatnonzero(a.goal)
    left = np.full(n + 1, np.inf)
    if goals.size:
        left = csgraph.dijkstra(backward, directed=True, indices=goals, min_only=True)
    togo = cost + left[head]
    following = np.lexsort((togo, tail))
    keep = np.isfinite(togo[following])
    following = following[keep]
    indptr = np.concatenate([[0], np.cumsum(np.bincount(tail[following], minlength=n + 1))])
    return indptr, (head, cost), left, following


def _jump(a: _Arrows) -> NDArray[np.float64]:
    """Probability of each move when a move is made: waiting in place is no move on a homogeneous chain."""
    if a.w.chain.is_layered:
        return a.p
    p = np.where(a.tail == a.head, 0.0, a.p)
    out = np.bincount(a.tail, p, minlength=len(a.h))
    return np.divide(p, out[a.tail], out=np.zeros_like(p), where=out[a.tail] > 0)


def _road(a: _Arrows, way: tuple[int, ...], level: float) -> Bound:
    chain = a.w.chain
    jump = _jump(a)
    steps = []
    for i, j in pairwise(way):
        steps.append(float(jump[np.flatnonzero((a.tail == i) & (a.head == j))[0]]))
    chance = np.array([float(chain.start[way[0]]), *steps])
    value = float(np.prod(chance))
    info = {"name": "P(road)"}
    if chain.evidence is None:
        room = float(gamma(len(chance) * 4 + len(a.p)))
        lower, upper = value * (1 - room), value * (1 + room)
        upper = min(1.0, upper)
        return Bound(value, min(lower, value), max(upper, value), 1.0, {"rounding": (upper - lower) / 2}, None, info)
    stay = np.array([_stays(a, i) for i in way[:-1]])
    inner = list(way[:-1])
    moves = chain.evidence.visits[inner] * (1 - stay)  # moves of one rollout, or one prompt, are not independent
    trials = np.concatenate([[_started(chain)], np.minimum(moves, chain.evidence.trials()[inner])])
    each = 1 - (1 - level) / len(chance)
    lower, upper = clopper_pearson(chance * trials, trials, each)
    lower, upper = min(float(np.prod(lower)), value), max(float(np.prod(upper)), value)
    return Bound(value, lower, upper, level, {"sampling": (upper - lower) / 2}, None, info)


def _stays(a: _Arrows, i: int) -> float:
    return float(a.p[(a.tail == i) & (a.head == i)].sum())


def _started(chain: Chain) -> float:
    tally = prompt_tally(chain)
    if tally is None:
        return 0.0
    return float(tally[0].sum()) if chain.evidence is not None and chain.evidence.one_prompt else float(len(tally[0]))
