"""A chain made small enough to look at: its busiest states, with everything else folded into the roads between them.

The folding is exact. The chain is watched only while it is in one of the states shown (or an outcome); what it does in
between becomes a direct transition of the watched chain: P_ss + P_sh (I - P_hh)^-1 P_hs for shown s and hidden h
(J. G. Kemeny and J. L. Snell, Finite Markov Chains, 1960, section 6.1). Flows in and out of every shown state and the
probabilities of the outcomes are those of the whole chain.
"""

from __future__ import annotations

from typing import Any

import networkx as nx
import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray
from scipy.sparse import csgraph
from scipy.sparse.linalg import splu

from ..bound import Bound
from ..chains import Chain
from ..errors import InputError
from ..hitting import hitting_probability

__all__ = ["first_hits", "folded"]

_HEIGHT = {"harm": 1.0, "truncated": 0.6, "benign": 0.35, "refusal": 0.0}


def folded(chain: Chain, top: int = 12, target: str = "harm") -> nx.DiGraph:
    """The chain as a small directed graph.

    Parameters
    ----------
    chain : Chain
        With a start law.
    top : int
        Number of transient states shown: two thirds those through which most harm passes, the others the most visited
        ones besides. Of states that follow each other with probability 0.9 or more, only the first is shown.
    target : str
        Outcome that counts as harm.

    Returns
    -------
    networkx.DiGraph
        Nodes are state indices, outcome names, and "start" where the start law is spread over several states. Node
        attributes: visits (expected per rollout), harm (Bound; None for outcomes), time (mean position in tokens) and
        height (where outcomes pull it: harm 1, refusal 0). Edge attributes: flow (expected passages per rollout) and
        hidden (share of it through states not shown).

    Raises
    ------
    InputError
        If the chain has no start law, or top is negative.
    """
    if chain.start is None:
        raise InputError(
            "The chain has no start law.",
            cause="Roads lead from a start to an outcome.",
            next="Give the chain start= (an index, a label or a law).",
        )
    if top < 0:
        raise InputError(f"top is {top}.", cause="It counts states.", next="Pass 0 or more.")
    harm = hitting_probability(chain, target, certify=False)
    risk = _per_state(chain, harm)
    chain = first_hits(chain, target)
    visits, F, law, time = _passages(chain)
    shown = _busiest(chain, F, visits, np.asarray(risk.value), time, top)
    direct, folded, entry = _watched(visits, F, law, shown)
    graph, names = nx.DiGraph(), _names(chain, shown)
    for place, i in enumerate(shown):
        if isinstance(names[place], str):
            graph.add_node(names[place], visits=0.0, harm=None, time=np.inf, height=_HEIGHT.get(names[place], 0.5))
        else:
            graph.add_node(names[place], visits=float(visits[i]), harm=risk[int(i)], time=float(time[i]))
    if entry.max(initial=0.0) < 0.98:
        graph.add_node("start", visits=1.0, harm=None, time=-1.0)
        for place in np.flatnonzero(entry > 0):
            first = float(entry[place])
            _add(graph, "start", names[place], first, first - float(law[shown[place]]))
    for a, b in zip(*np.nonzero(direct + folded)):
        if names[a] != names[b]:
            _add(graph, names[a], names[b], float(direct[a, b] + folded[a, b]), float(folded[a, b]))
    _heights(graph)
    return graph


def first_hits(chain: Chain, target: str) -> Chain:
    """The chain with an absorbing target: what arrives there stays, whatever its row says."""
    hit = chain.outcomes[target]
    if all((P.diagonal()[hit] >= 1).all() for P in chain.layers):
        return chain
    keep = np.ones(chain.n_states)
    keep[hit] = 0.0
    layers = [sp.csr_array(sp.diags_array(keep) @ P + sp.diags_array(1 - keep)) for P in chain.layers]
    told = (chain.outcomes, chain.start, chain.states)
    return Chain.layered(layers, *told) if chain.is_layered else Chain(layers[0], *told)


def _add(graph: nx.DiGraph, a: Any, b: Any, passages: float, hidden: float) -> None:
    old = graph.edges[a, b] if graph.has_edge(a, b) else {"flow": 0.0, "hidden": 0.0}
    total, unseen = old["flow"] + passages, old["flow"] * old["hidden"] + hidden
    graph.add_edge(a, b, flow=float(total), hidden=float(np.clip(unseen / total, 0, 1)))


def _names(chain: Chain, shown: NDArray) -> list[Any]:
    outcome = {int(i): name for name, index in chain.outcomes.items() for i in index} | {chain.n_states: "truncated"}
    return [outcome.get(int(i), int(i)) for i in shown]


def _passages(chain: Chain) -> tuple[NDArray, sp.csr_array, NDArray, NDArray]:
    """Expected visits (n,) and transitions (n, n) per rollout, the start law, and the mean time of a visit (n,).

    A layered chain gets one more state, where the mass goes that is in no outcome after the last layer.
    """
    law = np.asarray(chain.start)
    if chain.is_layered:
        now, visits, moments, F = law, np.zeros_like(law), np.zeros_like(law), sp.csr_array((len(law),) * 2)
        for t, P in enumerate(chain.layers):
            alive = np.where(_absorbing(P), 0.0, now)
            visits, moments, F = visits + now, moments + t * now, F + sp.diags_array(alive) @ P
            now = alive @ P
        visits, moments = visits + now, moments + chain.n_layers * now
        # What is left after the last layer goes to one more state, "truncated".
        left = np.where(chain.outcome_mask, 0.0, now)
        F = sp.block_array([[F, left[:, None]], [None, sp.csr_array((1, 1))]], format="csr")
        visits, law, moments = np.append(visits, left.sum()), np.append(law, 0.0), np.append(moments, 0.0)
        return visits, sp.csr_array(F), law, moments / np.maximum(visits, 1e-300)
    P = chain.layers[0]
    Q = sp.csr_array(sp.diags_array((~_stuck(P)).astype(float)) @ P)
    solver = splu(sp.csc_array(sp.eye_array(len(law)) - Q).T.tocsc())
    visits = np.maximum(solver.solve(law), 0)
    time = np.maximum(solver.solve(Q.T @ visits), 0) / np.maximum(visits, 1e-300)
    return visits, sp.csr_array(sp.diags_array(visits) @ Q), law, time


def _absorbing(P: sp.csr_array) -> NDArray:
    return P.diagonal() >= 1


def _stuck(P: sp.csr_array) -> NDArray:
    """States that end a walk: absorbing ones, and those from which no absorbing one can be reached."""
    ends = _absorbing(P)
    support, reach = sp.csr_array(P != 0), ends.copy()
    while True:
        more = reach | (support @ reach.astype(np.int64) > 0)
        if (more == reach).all():
            return ends | ~reach
        reach = more


def _per_state(chain: Chain, harm: Any) -> Any:
    """Harm by state; of a layered chain, averaged over the layers in which the state is visited."""
    if not chain.is_layered:
        return harm
    now, weights = np.asarray(chain.start), []
    for P in chain.layers:
        weights.append(now)
        now = np.where(_absorbing(P), 0.0, now) @ P
    weights = np.array([*weights, now])
    share = weights / np.maximum(weights.sum(axis=0), 1e-300)
    parts = [(share * part).sum(axis=0) for part in (harm.value, harm.lower, harm.upper)]
    return Bound(parts[0], np.minimum(parts[1], parts[0]), np.maximum(parts[2], parts[0]), harm.level)


def _busiest(chain: Chain, F: sp.csr_array, visits: NDArray, risk: NDArray, time: NDArray, top: int) -> NDArray:
    """Indices of the states shown: starts, the busiest transient states, and the outcomes that are reached."""
    extra = len(visits) - chain.n_states
    done, risk = np.concatenate([chain.outcome_mask, np.ones(extra, bool)]), np.concatenate([risk, np.zeros(extra)])
    transient = np.flatnonzero(~done & (visits > 1e-9))
    leading = _corridors(F, visits, time, transient)
    by_harm = leading[np.argsort(-(visits * risk)[leading], kind="stable")]
    by_harm = by_harm[(visits * risk)[by_harm] > 0]
    by_rest = leading[np.argsort(-(visits * (1 - risk))[leading], kind="stable")]
    starts = np.flatnonzero((np.asarray(chain.start) >= 0.2) & ~chain.outcome_mask)
    order = [*starts, *by_harm[: max(0, 2 * top // 3 - len(starts))], *by_rest]
    chosen = list(dict.fromkeys(int(i) for i in order))[:top]
    return np.array(chosen + [int(i) for i in np.flatnonzero(done & (visits > 0))], dtype=np.int64)


def _corridors(F: sp.csr_array, visits: NDArray, time: NDArray, transient: NDArray) -> NDArray:
    """The first state of every corridor, a set of states joined by near-certain transitions."""
    inside = sp.coo_array(F[transient][:, transient])
    sure = inside.data >= 0.9 * visits[transient][inside.row]
    joined = sp.csr_array((np.ones(sure.sum()), (inside.row[sure], inside.col[sure])), shape=inside.shape)
    number, which = csgraph.connected_components(joined, directed=False)
    order = np.argsort(time[transient], kind="stable")
    first = np.full(number, -1)
    first[which[order[::-1]]] = order[::-1]
    return transient[first]


def _watched(visits: NDArray, F: sp.csr_array, law: NDArray, shown: NDArray) -> tuple[NDArray, NDArray, NDArray]:
    """Direct and folded flows between the shown states, and the law of the first shown state."""
    hidden = np.setdiff1d(np.flatnonzero(visits > 0), shown)
    direct = F[shown][:, shown].toarray()
    if len(hidden) == 0:
        return direct, np.zeros_like(direct), law[shown]
    P = sp.csr_array(sp.diags_array(1 / visits[hidden]) @ F[hidden])
    onward = splu(sp.csc_array(sp.eye_array(len(hidden)) - P[:, hidden])).solve(P[:, shown].toarray())
    folded = F[shown][:, hidden] @ onward
    return direct, np.where(folded > 1e-12, folded, 0.0), law[shown] + law[hidden] @ onward


def _heights(graph: nx.DiGraph) -> None:
    """Give every state the mean height of the outcomes it leads to, along the folded chain."""
    nodes = [n for n, at in graph.nodes.items() if "height" not in at]
    place = {n: i for i, n in enumerate(nodes)}
    A, b = np.eye(len(nodes)), np.zeros(len(nodes))
    for n in nodes:
        out = sum(at["flow"] for _, _, at in graph.out_edges(n, data=True))
        for _, to, at in graph.out_edges(n, data=True):
            if to in place:
                A[place[n], place[to]] -= at["flow"] / out
            else:
                b[place[n]] += at["flow"] / out * graph.nodes[to]["height"]
    height = np.linalg.lstsq(A, b, rcond=None)[0] if nodes else b
    for n, y in zip(nodes, height):
        graph.nodes[n]["height"] = float(np.clip(y, 0, 1))
