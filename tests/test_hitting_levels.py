"""Chains without cycles, known or discovered: recursion against rationals, order of solving, sizes of indices."""

from __future__ import annotations

import gc
import weakref
from fractions import Fraction as F

import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csgraph

import markovsafety as ms
from markovsafety.hitting import core, graph, layered, level_kernels, rates

quick = settings(derandomize=True, deadline=None, max_examples=40)
SEEDS = st.integers(0, 10**6)
HOSTILE = (5e-324, 3e-310, 1e-300, 1.1e-160, 2.0**-1022)


def inside(lower, known, upper):
    return F(float(lower)) <= known <= F(float(upper))


def random_layers(seed, hostile=False):
    """Layers of 3 to 7 states, the last two harm and refusal; with `hostile`, most probabilities are tiny."""
    rng = np.random.default_rng(seed)
    n, L = int(rng.integers(3, 8)), int(rng.integers(1, 7))
    layers = []
    for _ in range(L):
        P = np.zeros((n, n))
        for i in range(n - 2):
            to = rng.choice(n, int(rng.integers(1, n + 1)), replace=False)
            P[i, to] = rng.choice(HOSTILE, len(to)) if hostile else rng.random(len(to))
            P[i] /= 1 if hostile else P[i].sum()
            keep = int(rng.integers(n))
            P[i, keep] += max(1 - P[i].sum(), 0)
        layers.append(P)
    return layers, {"harm": n - 2, "refusal": n - 1}


def unrolled(layers):
    """The same as one matrix: state i at layer t is t n + i; what the last layer leaves is an outcome of its own."""
    L, n = len(layers), len(layers[0])
    harm, refusal, left = L * n, L * n + 1, L * n + 2
    P = np.zeros((L * n + 3, L * n + 3))
    for t, layer in enumerate(layers):
        for i in range(n - 2):
            here = P[t * n + i]
            here[harm], here[refusal] = layer[i, n - 2], layer[i, n - 1]
            if t + 1 < L:
                here[(t + 1) * n : (t + 1) * n + n - 2] = layer[i, : n - 2]
            else:
                here[left] = layer[i, : n - 2].sum()
        P[t * n + n - 2, harm] = P[t * n + n - 1, refusal] = 1
    return ms.Chain(P, {"harm": harm, "refusal": refusal, "truncated": left}, start=0)


@quick
@given(seed=SEEDS, hostile=st.booleans(), target=st.sampled_from(["harm", ("harm", "truncated")]))
def test_layers_known_and_discovered_hold_the_rational_answer(seed, hostile, target):
    layers, ends = random_layers(seed, hostile)
    chain, flat = ms.Chain.layered(layers, ends, start=0), unrolled(layers)
    known = ms.hitting_probability(chain, target, method="exact").exact
    again = ms.hitting_probability(flat, target, method="exact").exact
    layered_bound = ms.hitting_probability(chain, target)
    flat_bounds = [ms.hitting_probability(flat, target, method=m) for m in ("auto", "layered", "elimination")]
    n = chain.n_states
    for t in range(len(layers)):
        for i in range(n):
            exact = known[t][i]
            assert inside(layered_bound.lower[t, i], exact, layered_bound.upper[t, i])
            assert (layered_bound.upper[t, i] == 0) == (exact == 0)
            for bound in flat_bounds:
                assert inside(bound.lower[t * n + i], again[t * n + i], bound.upper[t * n + i])
                assert (bound.upper[t * n + i] == 0) == (again[t * n + i] == 0)
            if not hostile and exact:
                assert abs(F(float(layered_bound.value[t, i])) / exact - 1) < 1e-15
                assert layered_bound.upper[t, i] - layered_bound.lower[t, i] < 1e-14 * len(layers) * float(exact)
    bare = ms.hitting_probability(chain, target, certify=False)
    assert (bare.value == layered_bound.value).all()
    assert not bare.info["certified"]


@quick
@given(seed=SEEDS, hostile=st.booleans())
def test_layered_visits_and_times_hold_the_rational_answer(seed, hostile):
    layers, ends = random_layers(seed, hostile)
    n = len(layers[0])
    start = np.zeros(n)
    start[: n - 2] = 1 / (n - 2)
    chain = ms.Chain.layered(layers, ends, start=start)
    moving = [
        i for i in range(n) if any(P.indices[P.indptr[i] : P.indptr[i + 1]].tolist() != [i] for P in chain.layers)
    ]
    seen, z = ms.visits(chain), [F(float(x)) for x in start]
    for t, P in enumerate(chain.layers):
        dense, after = P.toarray(), [F(0)] * n
        for i in moving:
            for j in np.flatnonzero(dense[i]):
                after[j] += z[i] * F(float(dense[i, j]))
        z = after
        for j in range(n):
            assert inside(seen.lower[t + 1, j], z[j], seen.upper[t + 1, j])
            assert (seen.upper[t + 1, j] == 0) == (z[j] == 0)
    x, time = [F(0)] * n, ms.hitting_time(chain)
    for t in range(len(layers) - 1, -1, -1):
        dense = chain.layers[t].toarray()
        x = [1 + sum((F(float(p)) * v for p, v in zip(dense[i], x)), F(0)) if i < n - 2 else F(0) for i in range(n)]
        assert all(inside(time.lower[t, i], x[i], time.upper[t, i]) for i in range(n))


def test_many_lost_products_stay_enclosed():
    """A row of 300 products that all underflow, at every one of 20 layers."""
    n = 302
    P = np.zeros((n, n))
    P[: n - 2, : n - 2] = 1 / (n - 2)
    first = np.zeros((n, n))
    first[: n - 2, n - 2], first[: n - 2, n - 1] = 2e-322, 1.0
    chain = ms.Chain.layered([P] * 20 + [first], {"harm": n - 2, "refusal": n - 1})
    h = ms.hitting_probability(chain, "harm")
    known, row = F(2e-322), sum((F(float(p)) for p in P[0]), F(0))
    for t in range(20, -1, -1):
        assert inside(h.lower[t, 0], known, h.upper[t, 0])
        known *= row
    assert h.value[0, 0] == 0 or h.lower[0, 0] < h.upper[0, 0] < 1e-300


@pytest.mark.parametrize("shuffled", [False, True])
def test_a_deep_thin_chain_has_its_closed_form(shuffled):
    """100000 levels of one state each: going on with 1 - p, harm with p."""
    n, p = 100_000, 2.0**-17
    i = np.arange(n)
    rows, columns = np.concatenate([i, i]), np.concatenate([i + 1, np.full(n, n + 1)])
    P = sp.csr_array((np.repeat([1 - p, p], n), (rows, columns)), shape=(n + 2, n + 2))
    name = np.random.default_rng(0).permutation(n + 2) if shuffled else np.arange(n + 2)
    back = np.argsort(name)
    chain = ms.Chain(P[name][:, name], {"refusal": back[n], "harm": back[n + 1]}, start=int(back[0]))
    h = ms.hitting_probability(chain, "harm")
    assert h.info["why"].startswith("no cycle, 100000 levels found; ")
    assert h.info["method"] == "layered"
    exact = -np.expm1(n * np.log1p(-p))
    assert h.at_start.lower <= exact <= h.at_start.upper
    assert h.at_start.upper - h.at_start.lower < 1e-9
    assert abs(ms.visits(chain).value[back[n + 1]] - exact) < 1e-12
    assert abs(ms.hitting_time(chain).at_start.value / (exact / p) - 1) < 1e-12


def random_pattern(seed, n=None):
    """A digraph with cycles, sinks and states without moves; sometimes with one class that holds most states."""
    rng = np.random.default_rng(seed)
    n = n or int(rng.integers(1, 40))
    W = sp.random_array((n, n), density=float(rng.choice([0.02, 0.05, 0.1, 0.3])), rng=rng, format="csr")
    W.setdiag(0)
    W.eliminate_zeros()
    return sp.csr_array(W), rng


def closure(W, moving):
    """Who can come to whom, by powers of the pattern."""
    A = (np.where(moving[:, None], W.toarray(), 0) > 0) | np.eye(len(moving), dtype=bool)
    for _ in range(len(moving).bit_length()):
        A = (A.astype(float) @ A) > 0
    return A


@settings(derandomize=True, deadline=None, max_examples=150)
@given(seed=SEEDS)
def test_graph_against_the_closure(seed):
    W, rng = random_pattern(seed)
    n = len(W.indptr) - 1
    target, moving = rng.random(n) < 0.2, rng.random(n) < 0.8
    A = closure(W, moving & ~target)
    can = A[:, target].any(axis=1)
    assert (graph.reaching(W, target, moving) == can).all()
    assert (graph.reachable(W, target, moving) == closure(W, moving)[target].any(axis=0)).all()
    moving &= ~target
    found = graph.decided(W, target, moving)
    assert (found.can == can).all()
    assert (found.sure == (can & moving & ~A[:, ~can].any(axis=1))).all()
    both = closure(W, np.ones(n, dtype=bool))
    assert (graph.closed_classes(W) == (both <= both.T).all(axis=1)).all()


def test_a_closed_class_is_a_way_to_miss():
    W = sp.csr_array(np.array([[0, 1, 0, 1], [0, 0, 1, 0], [0, 1, 0, 0], [0, 0, 0, 0]], dtype=float))
    target = np.array([False, False, False, True])
    found = graph.decided(W, target, ~target)
    assert found.can.tolist() == [True, False, False, True]
    assert not found.sure.any()


def check_plan(W, free, plan):
    """Every free state once; what a state moves to is known, in its class, or before it."""
    label = csgraph.connected_components(W[free][:, free], connection="strong")[1]
    name = np.full(len(free), -1)
    name[free] = label
    done = ~free
    for single, cyclic in plan.levels:
        for own in [*([i] for i in single), *cyclic]:
            assert not done[own].any()
            assert len(own) == (name == name[own[0]]).sum()
            assert len(set(name[own])) == 1
            done[own] = True
            assert (np.diff(own) > 0).all()
            assert all(done[W.indices[W.indptr[i] : W.indptr[i + 1]]].all() for i in own)
    assert done.all()
    assert plan.n_single == sum(len(single) for single, _ in plan.levels)


@settings(derandomize=True, deadline=None, max_examples=150)
@given(seed=SEEDS)
def test_plans_are_orders_to_solve_in(seed):
    W, rng = random_pattern(seed)
    check_plan(W, free := rng.random(len(W.indptr) - 1) < 0.8, graph.plan(W, free))
    target = rng.random(len(W.indptr) - 1) < 0.2
    found = graph.decided(W, target, ~target)
    check_plan(W, free := found.can & ~target, found.plan(free))
    up = sp.csr_array(sp.triu(W, 1))
    for A in (up, sp.csr_array(up.T)):
        free = np.ones(len(W.indptr) - 1, dtype=bool)
        plan = graph.plan(A, free)
        check_plan(A, free, plan)
        assert not plan.cyclic
    wide = W.copy()
    wide.indices, wide.indptr = wide.indices.astype(np.int64), wide.indptr.astype(np.int64)
    assert (graph.order_of(wide, ~target).sequence == graph.order_of(W, ~target).sequence).all()


def test_a_class_that_holds_most_states_is_found_by_sweeps():
    rng = np.random.default_rng(3)
    n, m = 600, 450  # a class in the middle of the numbers, states before and behind it, some with cycles of their own
    rows, columns = [np.arange(80, 80 + m)], [80 + (np.arange(m) * 7 + 1) % m]
    rows.append(np.arange(80, 80 + m))
    columns.append(80 + (np.arange(m) + 1) % m)
    other = np.concatenate([np.arange(80), np.arange(80 + m, n)])
    behind, before = other[::2], other[1::2]
    for part, to in ((behind, np.concatenate([behind, np.arange(80, 80 + m)])), (before, before)):
        rows.append(np.repeat(part, 2))
        columns.append(rng.choice(to, 2 * len(part)))
    rows.append(np.arange(80, 120))
    columns.append(rng.choice(before, 40))
    W = sp.csr_array((np.ones(sum(map(len, rows))), (np.concatenate(rows), np.concatenate(columns))), shape=(n, n))
    W.setdiag(0)
    W.eliminate_zeros()
    free = np.ones(n, dtype=bool)
    order = graph._around_giant(W, free)
    assert order is not None
    assert max(np.diff(order.first)) >= m
    check_plan(W, free, graph._decided(W, order, ~free, free).plan(free))
    check_plan(W, free, graph._decided(W, graph._searched(W, free), ~free, free).plan(free))
    up = sp.csr_array(sp.triu(W, 1))
    assert graph._around_giant(up, free) is None


def test_indices_grow_where_they_must():
    assert graph.index_type(10, 2**31 - 1) is np.int32
    assert graph.index_type(10, 2**31) is np.int64


def test_wide_indices_give_the_same_answer():
    layers, ends = random_layers(4)
    chains = [ms.Chain.layered(layers, ends, start=0), unrolled(layers)]
    for chain in chains:
        before = ms.hitting_probability(chain, "harm"), ms.visits(chain)
        for P in chain.layers:
            P.indices, P.indptr = P.indices.astype(np.int64), P.indptr.astype(np.int64)
        rates._KNOWN.clear()
        for old, new in zip(before, (ms.hitting_probability(chain, "harm"), ms.visits(chain)), strict=True):
            assert (old.value == new.value).all()
            assert (old.upper == new.upper).all()


def test_rates_are_made_once_and_go_with_their_chain():
    chain = unrolled(random_layers(1)[0])
    made = weakref.ref(rates.rates_of(chain))
    assert rates.rates_of(chain) is made()
    ms.hitting_probability(chain, "harm")
    orders = rates.rates_of(chain).memo["orders"]
    kept = list(orders.values())
    ms.hitting_time(chain, "refusal")
    assert all(a is b for a, b in zip(kept, orders.values()))
    for state in range(10):
        ms.hitting_probability(chain, state)
    assert len(orders) <= graph.KEPT
    del chain
    gc.collect()
    assert made() is None


@quick
@given(seed=SEEDS)
def test_rates_are_scaled_exactly(seed):
    rng = np.random.default_rng(seed)
    P = np.zeros((4, 4))
    P[0, 1:] = rng.choice([5e-324, 1e-320, 1e-310, 1e-200, 0.3], 3)
    P[0, 0] = max(1 - P[0, 1:].sum(), 0)
    P[1, [0, 2]] = 0.25, 0.75
    r = rates.rates_of(ms.Chain(P, {"harm": 2, "refusal": 3}))
    assert 0.5 <= r.out[0] < 1
    assert r.out[2] == 0
    scale = F(2) ** -int(np.frexp(P[0, 1:].sum())[1])  # what one token is on this scale may overflow
    for j, w in zip(r.W.indices[:3], r.W.data[:3]):
        assert F(float(w)) == F(float(P[0, j])) * scale
    assert (r.terms == [3, 2, 0, 0]).all()


@quick
@given(k=st.integers(1, 40), seed=SEEDS)
def test_a_row_rounds_no_more_than_counted(k, seed):
    rng = np.random.default_rng(seed)
    data, x = rng.random(k), rng.random(k)
    known = sum((F(float(a)) * F(float(b)) for a, b in zip(data, x)), F(0))
    value = F(float(level_kernels._dot(0, k, np.arange(k, dtype=np.int32), data, x)))
    limit = F(1) / (1 - F(1, 2**53)) ** int(level_kernels._row_count(k))
    assert 1 / limit <= value / known <= limit


def test_layered_masks():
    layers, ends = random_layers(8)
    chain = ms.Chain.layered(layers, ends)
    w = core.walk(chain, "harm")
    none = np.zeros(chain.n_states, dtype=bool)
    can = layered.reaching_layers(chain.layers, w.hit, w.avoid, none)
    known = ms.hitting_probability(chain, "harm", method="exact").exact
    assert can.tolist() == [[x > 0 for x in row] for row in known]
    sure = layered.sure_layers(chain.layers, w.hit, none)
    assert (sure <= can).all()
    assert not (sure & (ms.hitting_probability(chain, "harm").value < 1 - 1e-12)).any()


@pytest.mark.parametrize("narrow", [0, 256])
@pytest.mark.parametrize("hostile", [False, True])
def test_counted_and_carried_ends_hold_the_rational_answer(narrow, hostile, monkeypatch):
    """A chain without cycles, with one column and ends by level, and with three columns."""
    monkeypatch.setattr(core, "NARROW", narrow)
    for seed in range(12):
        chain = unrolled(random_layers(seed, hostile)[0])
        found = ms.hitting_probability(chain, "harm")
        known = ms.hitting_probability(chain, "harm", method="exact").exact
        assert all(map(inside, found.lower, known, found.upper))
        assert ((found.upper == 0) == np.array([x == 0 for x in known])).all()
        assert hostile or (found.upper - found.lower <= 1e-13 * found.upper).all()
