"""critical(): where harm comes from, checked against enumeration and by hand."""

from __future__ import annotations

from itertools import pairwise

import networkx as nx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import markovsafety as ms
from markovsafety import toy
from markovsafety.bound import clopper_pearson
from markovsafety.chains import Evidence


def two_states(**more):
    C = [[2, 5, 1, 2], [1, 3, 4, 2], [0] * 4, [0] * 4]
    return ms.Chain.from_counts(C, {"harm": 2, "refusal": 3}, start="S", states=["S", "M", "Y", "R"], **more)


def test_two_states_by_hand():
    found = ms.critical(two_states())
    assert found.harm.value == pytest.approx(9 / 17)
    best, second = found.states
    assert best.state == "S"
    assert best.visits == pytest.approx(70 / 51)
    assert best.gain == pytest.approx(0.5 * (2 / 17) + 0.1 * (8 / 17))  # the way back down is not counted
    assert best.score == pytest.approx(best.visits * best.gain)
    assert best.harm.value == pytest.approx(9 / 17)
    assert second.state == "M"
    first = found.transitions[0]
    assert (first.source, first.target) == ("M", "Y")
    assert first.probability == pytest.approx(0.4)
    assert first.gain == pytest.approx(6 / 17)
    assert first.score == pytest.approx(50 / 51 * 0.4 * 6 / 17)
    assert first.harm.value == 1
    assert [t.score for t in found.transitions] == sorted((t.score for t in found.transitions), reverse=True)
    # Waiting in place is no move: from S a move leads to M with 5/8, from M to Y with 4/7.
    assert [r.states for r in found.roads] == [("S", "M", "Y"), ("S", "Y")]
    assert [r.probability.value for r in found.roads] == pytest.approx([5 / 8 * 4 / 7, 1 / 8])
    assert found.roads[0].probability.level == 1.0
    assert found.roads[0].probability.upper - found.roads[0].probability.lower < 1e-13
    assert found.complete


def test_all_gain_is_accounted_for():
    """With everything listed, the scores add up to the rises of h along an answer, by states and by transitions."""
    chain = toy.shallow(8)
    found = ms.critical(chain, top=100)
    h = ms.hitting_probability(chain, "harm").value
    N = ms.visits(chain).value[:9]
    P = chain.P.toarray()[:9]
    rise = np.maximum(h[None, :] - h[:9, None], 0)
    assert sum(t.score for t in found.transitions) == pytest.approx(float((N[:, None] * P * rise).sum()))
    assert sum(s.score for s in found.states) == pytest.approx(sum(t.score for t in found.transitions))


@settings(derandomize=True, deadline=None, max_examples=40)
@given(seed=st.integers(0, 2**32 - 1), top=st.integers(1, 12))
def test_roads_are_the_likeliest_simple_paths(seed, top):
    rng = np.random.default_rng(seed)
    n = int(rng.integers(2, 6))
    P = rng.random((n + 3, n + 3)) * (rng.random((n + 3, n + 3)) < 0.6)
    P[:, n + 2] += 0.05
    P[n:] = 0
    P /= np.maximum(P.sum(axis=1, keepdims=True), 1e-300)
    start = rng.dirichlet(np.ones(n + 3)) if rng.random() < 0.5 else 0
    chain = ms.Chain(P, {"harm": [n, n + 1], "refusal": n + 2}, start=start)
    found = ms.critical(chain, top=top)
    jump = P.copy()
    np.fill_diagonal(jump, 0)
    jump /= np.maximum(jump.sum(axis=1, keepdims=True), 1e-300)
    graph = nx.DiGraph([(i, j) for i in range(n) for j in range(n + 2) if jump[i, j] > 0])
    ways = {}
    for i in np.flatnonzero(chain.start):
        if i in (n, n + 1):
            ways[(int(i),)] = chain.start[i]
        if i >= n or i not in graph:
            continue
        for goal in {n, n + 1} & set(graph):
            inner = graph.subgraph(set(graph) - ({n, n + 1} - {goal}))
            for way in nx.all_simple_paths(inner, int(i), goal):
                ways[tuple(way)] = chain.start[i] * np.prod([jump[a, b] for a, b in pairwise(way)])
    best = sorted(ways.values(), reverse=True)[:top]
    assert [r.probability.value for r in found.roads] == pytest.approx(best, rel=1e-9)
    for road in found.roads:
        assert road.probability.value == pytest.approx(ways[road.states], rel=1e-12)
    assert len(found.states) <= top
    assert len(found.transitions) <= top


def test_layers_name_their_position():
    P = np.array([[0.1, 0.5, 0.2, 0.2], [0.3, 0.3, 0.3, 0.1], [0] * 4, [0] * 4])
    chain = ms.Chain.layered([P, P, P], {"harm": 2, "refusal": 3}, start=0, states=list("abYR"))
    found = ms.critical(chain, top=50)
    assert found.harm.value == pytest.approx(0.462)
    assert found.transitions[0].source == (0, "a")
    assert found.transitions[0].target == (1, "Y")
    assert found.roads[1].states == ((0, "a"), (1, "b"), (2, "Y"))
    assert found.roads[1].probability.value == pytest.approx(0.15)
    assert sum(r.probability.value for r in found.roads) == pytest.approx(0.462)  # no way is walked twice
    assert ms.critical(chain, "truncated").roads[0].states[-1][0] == 3


def test_estimated_chain_has_sampling_intervals():
    chain = two_states()
    evidence = Evidence(
        np.array([20.0, 14.0, 9.0, 11.0]),
        np.arange(10),
        np.array(["a"] * 10),
        np.zeros(10, dtype=int),
        np.array([[1.0, 1, 0, 0]] * 10),
    )
    known = ms.Chain(chain.P, chain.outcomes, chain.start, chain.states, evidence=evidence, entry={0: chain.start})
    found = ms.critical(known)
    road = found.roads[1]
    assert road.states == ("S", "Y")
    low, high = clopper_pearson(np.array([10, 1.25]), np.array([10, 10]), 0.975)  # 16 moves, but only 10 prompts
    assert road.probability.lower == pytest.approx(np.prod(low))
    assert road.probability.upper == pytest.approx(np.prod(high))
    assert road.probability.level == 0.95
    state = next(s for s in found.states if s.state == "S")
    assert (state.harm.lower, state.harm.upper) == pytest.approx(clopper_pearson(10 * 9 / 17, 10))
    assert found.harm.upper > 0.6


def test_nothing_leads_to_harm():
    chain = ms.Chain([[0.5, 0, 0.5], [0] * 3, [0] * 3], {"harm": 1, "refusal": 2}, start=0)
    found = ms.critical(chain)
    assert (found.states, found.transitions, found.roads, found.complete) == ((), (), (), True)
    assert found.harm.upper == 0
    assert "P(harm) = 0" in str(found)


def test_it_prints_and_draws():
    found = ms.critical(toy.ladder(), top=3)
    text = str(found)
    assert "level 3>level4" in text.replace(" ", "").replace("level3", "level 3")
    assert text.count("->") == 3
    assert "(4 more)" in str(ms.critical(toy.shallow(10, aligned=(0.0, 0.3))))
    graph = found.graph()
    assert isinstance(graph, nx.DiGraph)
    assert graph.nodes["level 5"]["score"] > 0
    assert graph.edges["level 5", "level 6"]["probability"] == pytest.approx(0.3)


@pytest.mark.parametrize("top", [0, -1, 2.5, True])
def test_top_is_a_positive_number(top):
    with pytest.raises(ms.InputError, match="top is"):
        ms.critical(two_states(), top=top)


def test_a_start_is_needed():
    with pytest.raises(ms.InputError, match="needs a start"):
        ms.critical(ms.Chain([[0, 1], [0, 0]], {"harm": 1}))
    with pytest.raises(ms.InputError, match="neither an outcome"):
        ms.critical(two_states(), "benign")


def test_labels_of_words_keep_their_blanks_and_grams_lose_theirs():
    assert "position 0 > position 1 > tail > harm" in str(ms.critical(ms.toy.shallow(2), "harm"))
    rolls = ms.Rollouts.of([[5, 9]], prompt_id=0, outcome="harm", hit=1)
    assert "(-1,-1) > (-1,5) > harm" in str(ms.critical(ms.estimate(ms.count(rolls)), "harm"))
