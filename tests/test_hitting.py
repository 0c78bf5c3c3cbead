"""Properties of hitting probabilities, times and visits: proven enclosures against rationals, and symmetries."""

from __future__ import annotations

from fractions import Fraction as F

import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st

import markovsafety as ms
from markovsafety.hitting import certify, core, elimination, exact, graph, rates

SEEDS = st.integers(0, 2**32 - 1)
quick = settings(derandomize=True, deadline=None, max_examples=60)
FLOATS = ("auto", "elimination", "sparse")


def random_chain(seed, *, spread=None, size=9):
    """A chain with cycles, one-way states, traps and leaks; rates span `spread` orders of magnitude."""
    rng = np.random.default_rng(seed)
    n = int(rng.integers(1, size))
    m = n + int(rng.integers(2, 4))
    spread = float(rng.choice([0.1, 3, 15, 60])) if spread is None else spread
    P, dense = np.zeros((m, m)), rng.random()
    rows = [*range(n), *([n + 1] if rng.random() < 0.3 else [])]  # sometimes the refusal leaks
    for i in rows:
        on = rng.random(m) < dense
        on[rng.integers(m)] = True
        P[i, on] = 10.0 ** -rng.uniform(0, spread, int(on.sum()))
        P[i] /= P[i].sum()
    start = rng.random(m) * (rng.random(m) < 0.7) + 1e-3
    outcomes = {"harm": n, "refusal": n + 1} | ({"benign": n + 2} if m > n + 2 else {})
    return ms.Chain(P, outcomes, start=start / start.sum())


def inside(lower, value, upper):
    return (lower == -np.inf or F(float(lower)) <= value) and (upper == np.inf or value <= F(float(upper)))


def contains(bound, known):
    return all(inside(lo, v, up) for lo, v, up in zip(bound.lower, known, bound.upper))


@quick
@given(seed=SEEDS)
def test_enclosures_hold_the_rational_answer(seed):
    chain = random_chain(seed)
    known = ms.hitting_probability(chain, "harm", method="exact")
    for method in FLOATS:
        bound = ms.hitting_probability(chain, "harm", method=method)
        assert contains(bound, known.info["exact"])
        assert inside(bound.at_start.lower, known.at_start.info["exact"], bound.at_start.upper)
        assert ((bound.upper == 0) == np.array([v == 0 for v in known.info["exact"]])).all()
        loose = ms.hitting_probability(chain, "harm", method=method, certify=False)
        assert loose.value == pytest.approx(bound.value, rel=1e-9, abs=1e-300)
        assert loose.reasons["rounding"] is None
        assert (loose.lower == loose.value).all()
        assert not loose.info["certified"]


@quick
@given(seed=SEEDS)
def test_elimination_keeps_every_digit(seed):
    chain = random_chain(seed)
    known = ms.hitting_probability(chain, "harm", method="exact").info["exact"]
    bound = ms.hitting_probability(chain, "harm", method="elimination")
    for i, v in enumerate(known):
        assert (v < F(1, 10**290)) or abs(F(float(bound.value[i])) / v - 1) < 3e-15
        assert (v < F(1, 10**290)) or bound.upper[i] - bound.lower[i] <= 3e-12 * bound.upper[i]


@settings(derandomize=True, deadline=None, max_examples=25)
@given(seed=SEEDS, spread=st.sampled_from([150.0, 300.0]))
def test_underflow_is_part_of_the_enclosure(seed, spread):
    chain = random_chain(seed, spread=spread, size=6)
    known = ms.hitting_probability(chain, "harm", method="exact").info["exact"]
    for method in FLOATS:
        try:
            bound = ms.hitting_probability(chain, "harm", method=method)
        except ms.UntrustedError as error:
            bound = error.partial
        assert contains(bound, known)


def test_products_that_underflow_are_not_impossible():
    P = np.zeros((5, 5))
    P[[0, 1, 2], [1, 2, 3]] = 1.1e-160
    P[:3, 4] = 1
    ends = {"harm": 3, "refusal": 4}
    for chain in (ms.Chain(P, ends, start=0), ms.Chain.layered([P] * 3, ends, start=0)):
        bound = ms.hitting_probability(chain, "harm")
        known = ms.hitting_probability(chain, "harm", method="exact").info["exact"]
        first, second = (bound[0, 0], bound[1, 1]) if chain.is_layered else (bound[0], bound[1])
        assert first.value == 0 < first.upper < 1e-300
        assert inside(second.lower, known[1][1] if chain.is_layered else known[1], second.upper)
        assert second.lower < second.upper
    mixed = ms.Chain(P, ends, start=[0.3, 0, 0, 0, 0.7])
    assert 0 < ms.hitting_probability(mixed, "harm").at_start.upper < 1e-300
    flat = ms.Chain(P, ends, start=0)
    assert 0 < ms.visits(flat).upper[3] < 1e-300


def test_underflow_of_many_small_exits_adds_up():
    """A cyclic class of two states; one has N exits whose products with what lies behind them are all lost."""
    N = 40_000
    away, z, o = np.arange(4, N + 4), np.zeros(N, int), np.ones(N, int)
    entries = [(2, 3, 0.5), (3, 2, 0.5), (3, 1, 0.25)]
    rows, columns, values = (np.array(x) for x in zip(*entries))
    rows = np.concatenate([rows, 2 * o, away, away])
    columns = np.concatenate([columns, away, z, o])
    values = np.concatenate([values, np.full(N, 2e-154), np.full(N, 1e-170), np.full(N, 1.0)])
    rows, columns, values = np.append(rows, [2, 3]), np.append(columns, [2, 3]), np.append(values, [0.5, 0.25])
    chain = ms.Chain(sp.csr_array((values, (rows, columns)), shape=(N + 4, N + 4)), {"harm": 0, "refusal": 1})
    known = ms.hitting_probability(chain, "harm", method="exact").info["exact"]
    bound = ms.hitting_probability(chain, "harm")
    assert all(inside(bound.lower[i], known[i], bound.upper[i]) for i in (2, 3, 4))
    assert bound.upper[2] < 1e-300


@quick
@given(seed=SEEDS)
def test_times_and_visits_hold_the_rational_answer(seed):
    chain = random_chain(seed)
    r = rates.rates_of(chain)
    rows, step = exact.rows_of(chain)
    n, zero = chain.n_states, [F(0)] * chain.n_states
    anything = core.walk(chain, tuple(chain.outcomes))
    can = graph.reaching(r.W, anything.hit, anything.moving)
    sure = can & anything.moving & ~graph.reaching(r.W, ~can, anything.moving)
    known = exact.potential(r, rows, sure, zero, step)
    bound = ms.hitting_time(chain)
    assert all(inside(bound.lower[i], known[i], bound.upper[i]) for i in np.flatnonzero(sure))
    assert (np.isinf(bound.value) == ~(sure | anything.hit)).all()
    h = ms.hitting_probability(chain, "harm", method="exact").info["exact"]
    w = core.walk(chain, "harm")
    live = graph.reaching(r.W, w.hit, w.moving) & w.moving
    u = exact.potential(r, rows, live, zero, [s * v for s, v in zip(step, h)])
    given_hit = ms.hitting_time(chain, "harm", given=True)
    assert all(inside(given_hit.lower[i], u[i] / h[i], given_hit.upper[i]) for i in np.flatnonzero(live))
    assert np.isnan(given_hit.value[~(live | w.hit)]).all()
    # Visits of k from i are a potential as well: one gain at k.
    closed = graph.closed_classes(r.W)
    seen = ms.visits(chain)
    for k in np.flatnonzero(~closed)[:3]:
        N = exact.potential(r, rows, ~closed, zero, [step[k] if i == k else F(0) for i in range(n)])
        total = sum((F(float(s)) * v for s, v in zip(chain.start, N)), F(0))
        assert inside(seen.lower[k], total, seen.upper[k])


def test_a_wrong_candidate_is_never_certified():
    """Whatever the candidate and the solver: an enclosure that is returned contains the truth."""
    rng, accepted, outside = np.random.default_rng(5), 0, 0
    for trial in range(150):
        chain = random_chain(trial, spread=2.0)
        r = rates.rates_of(chain)
        w = core.walk(chain, "harm")
        can = graph.reaching(r.W, w.hit, w.moving)
        own = np.flatnonzero(can & w.moving)
        if not own.size:
            continue
        known = ms.hitting_probability(chain, "harm", method="exact").info["exact"]
        X = np.repeat(w.hit.astype(float)[:, None], 3, axis=1)
        x = rng.random(len(own))
        scale = 10.0 ** rng.uniform(-2, 2, len(own))
        ends = certify.enclose(r.W[own], own, X, x, np.zeros((len(own), 3)), lambda g, scale=scale: g * scale)
        if ends is None:
            continue
        accepted += 1
        assert all(inside(lo, known[i], up) for lo, i, up in zip(ends[0], own, ends[1]))
        outside += bool(((x < ends[0]) | (x > ends[1])).any())
    assert accepted > 5
    assert outside > 5  # candidates that were off, and were not believed


def test_rounding_count_covers_what_happens():
    rng = np.random.default_rng(1)
    for m in (1, 2, 15, 19):  # within one panel, and over its edge
        W, leave, gain = rng.random((m, m)), rng.random(m) * 1e-9, rng.random(m)
        np.fill_diagonal(W, 0)
        factors = elimination.eliminate(W, leave)
        x = elimination.solve(factors, gain)
        z = elimination.solve_flow(factors, gain)
        rows = [{j: F(v) for j, v in enumerate(row.tolist()) if v} for row in W]
        out = [sum(row.values(), F(0)) + F(e) for row, e in zip(rows, leave.tolist())]
        table = [[out[i] if i == j else -rows[i].get(j, F(0)) for j in range(m)] + [F(gain[i])] for i in range(m)]
        turned = [[table[j][i] for j in range(m)] + [F(gain[i])] for i in range(m)]
        for got, system in ((x, table), (z, turned)):
            whole = [[int(v * 2**170) for v in row] for row in system]
            assert all(F(a, 2**170) == v for left, right in zip(whole, system) for a, v in zip(left, right))
            error = max(abs(F(a) / b - 1) for a, b in zip(got.tolist(), exact._bareiss(whole)))
            assert error <= certify.gamma(elimination.roundings(m))
            assert error < 1e-15 * (m + 10)


def layered_chain(seed, L=4):
    rng = np.random.default_rng(seed)
    n = int(rng.integers(2, 5))
    blocks_, spread = [], float(rng.choice([0.5, 8]))
    for _ in range(L):
        P = 10.0 ** -rng.uniform(0, spread, (n + 2, n + 2)) * (rng.random((n + 2, n + 2)) < 0.6)
        P[:, 0] += 1e-3
        P[n:] = 0
        blocks_.append(P / np.maximum(P.sum(axis=1, keepdims=True), 1e-300))
    start = rng.dirichlet(np.ones(n + 2))
    return ms.Chain.layered(blocks_, {"harm": n, "refusal": n + 1}, start=start)


def unrolled(chain):
    """The same walk as a homogeneous chain on (layer, state)."""
    L, n = chain.n_layers, chain.n_states
    grid = [[None] * (L + 1) for _ in range(L + 1)]
    for t, P in enumerate(chain.layers):
        A = P.toarray()
        A[chain.outcome_mask] = 0
        grid[t][t + 1] = sp.csr_array(A)
    grid[0][0] = grid[L][L] = sp.csr_array((n, n))
    P = sp.block_array(grid).tocsr()
    index = {name: [t * n + i for t in range(L + 1) for i in where] for name, where in chain.outcomes.items()}
    index["truncated"] = [L * n + i for i in range(n) if not chain.outcome_mask[i]]
    start = np.zeros((L + 1) * n)
    start[:n] = chain.start
    return ms.Chain(P, index, start=start)


@quick
@given(seed=SEEDS)
def test_layered_is_unrolled_is_exact(seed):
    chain = layered_chain(seed)
    flat, shape = unrolled(chain), (chain.n_layers + 1, chain.n_states)
    for target in ("harm", "truncated"):
        known = ms.hitting_probability(chain, target, method="exact")
        bound = ms.hitting_probability(chain, target)
        for row, lower, upper in zip(known.info["exact"], bound.lower, bound.upper):
            assert all(inside(lo, v, up) for lo, v, up in zip(lower, row, upper))
        assert inside(bound.at_start.lower, known.at_start.info["exact"], bound.at_start.upper)
        assert (bound.upper - bound.lower).max() < 1e-13
        for method in ("auto", "layered", "elimination", "sparse"):
            # Rows of random floats sum to 1 only up to 2^-52, which the unrolled chain makes up for.
            other = ms.hitting_probability(flat, target, method=method).value.reshape(shape)
            # An outcome entered earlier is an end in both; where the walk cannot be, the unrolled one may differ.
            alive = np.broadcast_to(~chain.outcome_mask, shape)
            assert other[alive] == pytest.approx(bound.value[alive], rel=1e-13, abs=1e-300)
    time, flat_time = ms.hitting_time(chain), ms.hitting_time(flat)
    assert time.value.ravel() == pytest.approx(flat_time.value, rel=1e-13)
    assert time.at_start.value == pytest.approx(flat_time.at_start.value, rel=1e-13)
    mine = ms.hitting_time(chain, "harm", given=True)
    theirs = ms.hitting_time(flat, "harm", given=True)
    alive = np.broadcast_to(~chain.outcome_mask, shape)
    assert mine.value[alive] == pytest.approx(theirs.value.reshape(shape)[alive], rel=1e-12, nan_ok=True)
    assert mine.at_start.value == pytest.approx(theirs.at_start.value, rel=1e-12, nan_ok=True)
    assert ms.visits(chain).value.ravel() == pytest.approx(ms.visits(flat).value, rel=1e-13, abs=1e-300)
    inner = ms.sensitivity(chain, "harm")
    dense = ms.sensitivity(flat, "harm").toarray()
    n = chain.n_states
    for t, S in enumerate(inner):
        block = dense[t * n : (t + 1) * n, (t + 1) * n : (t + 2) * n]
        assert S.toarray()[~chain.outcome_mask] == pytest.approx(block[~chain.outcome_mask], rel=1e-12, abs=1e-300)


@quick
@given(seed=SEEDS)
def test_numbering_of_states_does_not_matter(seed):
    chain = random_chain(seed)
    order = np.random.default_rng(seed).permutation(chain.n_states)
    back = np.argsort(order)
    P = chain.P[order][:, order]
    other = ms.Chain(P, {name: back[where] for name, where in chain.outcomes.items()}, start=chain.start[order])
    for f in (
        lambda c: ms.hitting_probability(c, "harm"),
        lambda c: ms.hitting_time(c, "harm", given=True),
        ms.hitting_time,
        ms.visits,
    ):
        # Implied diagonals: every way to solve has all its digits, so any order gives the same up to a few ulps.
        assert f(other).value == pytest.approx(f(chain).value[order], rel=1e-12, abs=1e-290, nan_ok=True)


@quick
@given(seed=SEEDS)
def test_more_harm_in_a_row_is_more_harm_everywhere(seed):
    rng = np.random.default_rng(seed)
    chain = random_chain(seed, spread=3.0)
    n = chain.outcomes["harm"][0]
    P = chain.P.toarray()
    i = int(rng.integers(n))
    share = rng.random() * P[i]
    share[n] = 0
    P[i] -= share
    P[i, n] += share.sum()
    more = ms.Chain(P, chain.outcomes, start=chain.start)
    a, b = ms.hitting_probability(chain, "harm"), ms.hitting_probability(more, "harm")
    assert (b.upper >= a.lower).all()
    assert b.at_start.value >= a.at_start.value * (1 - 1e-13)


@quick
@given(seed=SEEDS)
def test_committors_of_two_outcomes_add_up(seed):
    chain = random_chain(seed, spread=3.0)
    one, two = ms.committor(chain, "refusal", "harm"), ms.committor(chain, "harm", "refusal")
    some = core.walk(chain, ("harm", "refusal"))
    either = ms.hitting_probability(chain, some.hit)
    assert one.value + two.value == pytest.approx(either.value, abs=1e-13)
    assert (one.value[chain.outcomes["refusal"]] == 0).all()
    assert (one.value <= ms.hitting_probability(chain, "harm").upper).all()


def harm(chain):
    return ms.hitting_probability(chain, "harm").at_start.value


@quick
@given(seed=SEEDS)
def test_attribution_sums_to_the_change(seed):
    rng = np.random.default_rng(seed)
    before = random_chain(seed, spread=2.0)
    P = before.P.toarray()
    changed = np.flatnonzero((rng.random(len(P)) < 0.5) & ~before.outcome_mask)
    for i in changed:
        on = rng.random(len(P)) < 0.6  # may close the way to harm, or open it
        on[rng.integers(len(P))] = True
        P[i] = rng.random(len(P)) * on
        P[i] /= P[i].sum()
    start = before.start if rng.random() < 0.5 else rng.dirichlet(np.ones(len(P)))
    after = ms.Chain(P, before.outcomes, start=start)
    share = ms.attribute(before, after, "harm")
    change = harm(after) - harm(before)
    assert share.sum() == pytest.approx(change, abs=1e-12)
    if start is before.start:
        live = graph.reaching(rates.rates_of(before).W, before.mask("harm"), ~before.mask("harm"))
        live &= graph.reaching(rates.rates_of(after).W, after.mask("harm"), ~after.mask("harm"))
        same = live & ~np.isin(np.arange(len(P)), changed)
        assert (share[same] == 0).all()
    assert ms.attribute(after, before, "harm") == pytest.approx(-share, abs=1e-12)


@quick
@given(seed=SEEDS)
def test_attribution_of_layers_sums_to_the_change(seed):
    before = layered_chain(seed)
    mixed = [(P.toarray() + np.eye(before.n_states)[np.argmax(P.toarray(), axis=1)]) / 2 for P in before.layers]
    after = ms.Chain.layered(mixed, before.outcomes, start=np.roll(before.start, 1))
    share = ms.attribute(before, after, "harm")
    change = harm(after) - harm(before)
    assert share.shape == (before.n_layers + 1, before.n_states)
    assert share.sum() == pytest.approx(change, abs=1e-13)


def test_sensitivity_is_visits_times_h():
    C = [[2, 5, 1, 2], [1, 3, 4, 2], [0] * 4, [0] * 4]
    chain = ms.Chain.from_counts(C, {"harm": 2, "refusal": 3}, start=0)
    S = ms.sensitivity(chain, "harm")
    h, N = np.array([9 / 17, 11 / 17, 1, 0]), np.array([70, 50, 0, 0]) / 51
    assert S.toarray() == pytest.approx(np.outer(N, h), rel=1e-13)
    assert (S.indices == chain.P.indices).all()
    assert (S.indptr == chain.P.indptr).all()
