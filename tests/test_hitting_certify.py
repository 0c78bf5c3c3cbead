"""The parts of the certificate against rationals: error-free sums, residual bounds, enclosures of wrong candidates."""

from __future__ import annotations

from fractions import Fraction as F
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st

import markovsafety as ms
from markovsafety.hitting import certify, core, elimination, exact, padic, rates
from markovsafety.hitting.certify_kernels import (
    exact_sums,
    flow_residuals,
    move_out,
    quick_residuals,
    residuals,
    swept,
)
from markovsafety.hitting.double_double_kernels import two_product, two_sum

SEEDS = st.integers(0, 2**32 - 1)
quick = settings(derandomize=True, deadline=None, max_examples=40)
exactly = settings(derandomize=True, deadline=None, max_examples=300)
ORDINARY = st.floats(-1e290, 1e290)


@exactly
@given(a=ORDINARY, b=ORDINARY)
def test_two_sum_loses_nothing(a, b):
    s, e = two_sum(a, b)
    assert s == a + b
    assert F(s) + F(e) == F(a) + F(b)


@exactly
@given(a=st.floats(-1, 1), b=ORDINARY)
def test_two_product_loses_nothing(a, b):
    p, e = two_product(a, b)
    assert p == a * b
    assert abs(p) < 2.0**-900 or F(p) + F(e) == F(a) * F(b)


def test_pairs_are_not_contracted_or_reordered():
    """On numbers whose rounding errors are as large as they get."""
    rng = np.random.default_rng(0)
    for a, b in (rng.random((3000, 2)) + 1).tolist():
        p, e = two_product(a, b)
        s, f = two_sum(a, b * 2.0**-30)
        assert F(p) + F(e) == F(a) * F(b)
        assert F(s) + F(f) == F(a) + F(b * 2.0**-30)
    assert np.isnan(two_product(0.5, 1.7e308)[1])  # out of range is seen, not wrong


def system(seed, spread, m=7, n=10, known_spread=1.0):
    """Rates of a class, pairs, and values outside, over many orders of magnitude."""
    rng = np.random.default_rng(seed)
    rates_ = 10.0 ** -rng.uniform(0, spread, (m, n)) * (rng.random((m, n)) < 0.7)
    rates_[np.arange(m), np.arange(m)] = 0
    inside, outside = sp.csr_array(rates_[:, :m]), sp.csr_array(rates_[:, m:])
    base = 10.0 ** rng.uniform(-known_spread, known_spread)
    y = np.column_stack([base * (1 + rng.normal(size=m) * 10.0 ** -rng.uniform(0, 15)), np.zeros(m)])
    y[:, 1] = y[:, 0] * rng.uniform(-1, 1, m) * 2.0**-53
    known, gain = base * rng.random(n - m), rng.random(m) * base * (rng.random() < 0.5)
    return inside, outside, y, known, gain


def arrays(A):
    return certify._arrays(A)


@quick
@given(seed=SEEDS, spread=st.sampled_from([1.0, 20.0, 250.0, 320.0]))
def test_residual_bounds_hold(seed, spread):
    inside, outside, y, known, gain = system(seed, spread)
    W, V = inside.toarray(), outside.toarray()
    whole = [F(a) + F(b) for a, b in y.tolist()]
    near, far, values = arrays(inside), arrays(outside)[::2], known[outside.indices]
    found = [f(near, far, values, y, gain, 0.0) for f in (residuals, quick_residuals)]
    for i in range(len(y)):
        true = F(gain[i]) + sum(F(w) * (whole[j] - whole[i]) for j, w in enumerate(W[i].tolist()))
        true += sum((F(w) * (F(x) - whole[i]) for x, w in zip(known.tolist(), V[i].tolist())), F(0))
        for r, error in found:
            assert abs(F(r[i]) - true) <= F(error[i])


@quick
@given(seed=SEEDS, spread=st.sampled_from([1.0, 20.0, 250.0]))
def test_flow_residual_bounds_hold(seed, spread):
    inside, outside, z, _, source = system(seed, spread, known_spread=20)
    W = inside.toarray()
    total = exact_sums(arrays(inside), arrays(outside)[::2])
    d = [sum(map(F, row)) for row in np.hstack([W, outside.toarray()]).tolist()]
    for i, v in enumerate(d):
        assert abs(F(total[0][i]) + F(total[1][i]) - v) <= F(total[2][i])
    whole = [F(a) + F(b) for a, b in z.tolist()]
    r, error = flow_residuals(arrays(sp.csr_array(inside.T.tocsr())), total, z, source, 0.0)
    for j in range(len(z)):
        true = F(source[j]) - d[j] * whole[j] + sum(F(w) * v for w, v in zip(W[:, j].tolist(), whole))
        assert abs(F(r[j]) - true) <= F(error[j])


@quick
@given(seed=SEEDS)
def test_ends_are_outside_and_near(seed):
    rng = np.random.default_rng(seed)
    high = 10.0 ** rng.uniform(-310, 300, 8)
    y = np.column_stack([high, high * rng.uniform(-1, 1, 8) * 2.0**-53])
    radius = high * 10.0 ** -rng.uniform(10, 30, 8)
    lower, upper = move_out(y, radius, np.inf)
    for (h, l), d, a, b in zip(y.tolist(), radius.tolist(), lower.tolist(), upper.tolist()):
        assert F(a) <= F(h) + F(l) - F(d) <= F(h) + F(l) + F(d) <= F(b)
        assert F(b) - F(a) <= 2 * F(d) + 6 * F(np.spacing(h))
    assert (move_out(np.array([[0.5, 0.0]]), np.array([9.0]), 1.0)[0] == 0).all()
    assert (move_out(np.array([[0.5, 0.0]]), np.array([9.0]), 1.0)[1] == 1).all()


def leaky(seed, leak, n=24):
    """A cyclic class, left from a third of its states with probability `leak` at most; every state has three moves."""
    rng = np.random.default_rng(seed)
    P = np.zeros((n + 2, n + 2))
    P[np.arange(n), np.roll(np.arange(n), 1)] = 0.5
    for i in range(n):
        P[i, rng.choice(n, 3, replace=False)] += rng.random(3)
    P[np.arange(n), np.arange(n)] = 0
    P[:n] /= P[:n].sum(axis=1, keepdims=True)
    out = rng.choice(n, n // 3, replace=False)
    P[out] *= 1 - leak
    P[out, n + rng.integers(2, size=len(out))] += leak
    P /= np.maximum(P.sum(axis=1, keepdims=True), 1e-300)
    return ms.Chain(P, {"harm": n, "refusal": n + 1}, start=0)


def the_class(chain):
    r, walk = rates.rates_of(chain), core.walk(chain, "harm")
    own = np.flatnonzero(~chain.outcome_mask)
    rows = r.W[own]
    inside, outside = certify._parts(rows, own, np.empty(r.n))
    cut = SimpleNamespace(own=own, rows=rows, inside=inside, outside=outside, leave=outside.sum(axis=1), out=r.out[own])
    X = np.repeat(walk.hit.astype(float)[:, None], 3, axis=1)
    known = ms.hitting_probability(chain, "harm", method="exact").info["exact"]
    return r, cut, X, [known[i] for i in own]


def holds(ends, known):
    return all(F(float(lo)) <= v <= F(float(up)) for lo, v, up in zip(ends[0], known, ends[1]))


def rough(c, error=1e-4):
    """A solver good to some digits at any leak."""
    eliminated = elimination.eliminate(c.inside.toarray(), c.leave)
    return lambda g: elimination.solve(eliminated, g) * (1 + error)


@pytest.mark.parametrize("parts", [True, False])
@pytest.mark.parametrize("leak", [1e-1, 1e-4, 1e-8, 1e-12, 1e-15])
def test_narrow_at_every_leak(leak, parts):
    """Whatever leaks, the enclosure ends near the last digits if the inner solver has some digits of its own."""
    r, c, X, known = the_class(leaky(0, leak))
    zero, x = np.zeros((len(c.own), 3)), np.array([float(v) for v in known]) * (1 + 1e-5)
    W, given_parts = (None, (c.inside, c.outside)) if parts else (c.rows, None)
    ends = certify.enclose(W, c.own, X, x, zero, rough(c), 1.0, parts=given_parts, errors=r.errors)
    assert ends is not None
    assert holds(ends, known)
    assert ((ends[1] - ends[0]) / ends[1]).max() <= 1e-13
    good = np.array([float(v) for v in known])
    low = np.array([float(v - F(h)) for v, h in zip(known, good.tolist())])
    never = lambda g: g + np.nan  # noqa: E731
    ends = certify.enclose(None, c.own, X, good, zero, never, 1.0, low=low, parts=(c.inside, c.outside))
    assert ends is not None  # both parts of the truth need no solver
    assert holds(ends, known)
    assert ((ends[1] - ends[0]) / ends[1]).max() <= 1e-12


@pytest.mark.parametrize("leak", [1e-1, 1e-4, 1e-8, 1e-12, 1e-15])
def test_times_and_flows_are_narrow_at_every_leak(leak):
    r, c, X, _ = the_class(leaky(1, leak))
    m = len(c.own)
    rows = [{j: F(v) for j, v in enumerate(row) if v} for row in c.rows.toarray().tolist()]
    unit = [F(1) if i in set(c.own.tolist()) else F(0) for i in range(r.n)]
    free = np.isin(np.arange(r.n), c.own)
    known = exact.potential(
        r, [rows[c.own.tolist().index(i)] if f else {} for i, f in enumerate(free)], free, [F(0)] * r.n, unit
    )
    known = [known[i] for i in c.own]
    X, gain, solve = 0 * X, np.ones((m, 3)), rough(c)
    x = np.array([float(v) for v in known]) * (1 + 1e-5)
    ends = certify.enclose(c.rows, c.own, X, x, gain, solve, errors=0)
    assert ends is not None
    assert holds(ends, known)
    assert ((ends[1] - ends[0]) / ends[1]).max() <= 1e-13
    eliminated = elimination.eliminate(c.inside.toarray(), c.leave)
    source = np.zeros((m, 3))
    source[0] = 1
    inflow = sp.csr_array(c.inside.T.tocsr())
    back = lambda g: elimination.solve_flow(eliminated, g) * (1 + 1e-4)  # noqa: E731
    flows = certify.enclose_flow(
        inflow, c.out, back(source[:, 0]), source, back, r.terms[c.own], parts=(c.inside, c.outside), errors=0
    )
    assert flows is not None
    # The visits, each as long as 1 / d, add up to the time.
    assert sum(map(F, flows[0].tolist())) <= known[0] <= sum(map(F, flows[1].tolist()))
    assert ((flows[1] - flows[0]) / flows[1]).max() <= 1e-12


@quick
@given(seed=SEEDS, leak=st.sampled_from([1e-2, 1e-7, 1e-14]), off=st.sampled_from([1e-3, 1e-9, 1e-15]))
def test_a_perturbed_candidate_is_not_believed(seed, leak, off):
    """Without a solver to correct it, an answer that is off is outside of nothing that is returned."""
    _, c, X, known = the_class(leaky(seed, leak, n=12))
    rng = np.random.default_rng(seed)
    x = np.clip(np.array([float(v) for v in known]) + off * rng.normal(size=len(known)), 0, 1)
    useless = (lambda g: 0 * g, lambda g: g * 10.0 ** rng.uniform(-2, 2, len(g)), lambda g: -g, lambda g: g + np.nan)
    for solve in useless:
        for errors in (0, 2):
            ends = certify.enclose(c.rows, c.own, X, x, np.zeros((len(x), 3)), solve, 1.0, errors=errors)
            assert ends is None or holds(ends, known)


def test_an_enclosure_that_says_nothing_is_none():
    _, c, X, known = the_class(leaky(3, 1e-9))
    x = np.full(len(known), 0.5)
    assert certify.enclose(c.rows, c.own, X, x * np.nan, np.zeros((len(x), 3)), lambda g: 0 * g, 1.0) is None
    assert certify.enclose(c.rows, c.own, X, 1e9 * x, np.zeros((len(x), 3)), lambda g: 0 * g, 1.0) is None


def test_rounded_rates_are_paid_for():
    """If every rate may be off by two roundings, the enclosure holds the answers of all such chains."""
    _, c, X, _ = the_class(leaky(4, 1e-6))
    known = certify.enclose(c.rows, c.own, X, np.full(len(c.own), 0.5), np.zeros((len(c.own), 3)), rough(c), 1.0)
    assert known is not None
    rng = np.random.default_rng(0)
    for _ in range(5):
        W = c.rows.copy()
        W.data = W.data * (1 + rng.choice([-1, 1], W.nnz) * 2.0**-53 * 1.9)
        other = certify.enclose(
            W, c.own, X, np.full(len(c.own), 0.5), np.zeros((len(c.own), 3)), rough(c), 1.0, errors=0
        )
        assert other is not None
        assert (other[0] <= known[1]).all()
        assert (known[0] <= other[1]).all()
        assert (known[0] < other[0]).any()


def test_swept_vector_is_a_lift():
    for leak in (0.3, 1e-6, 1e-15):
        _, c, _, _ = the_class(leaky(5, leak))
        near, far = arrays(c.inside), arrays(c.outside)[::2]
        v = swept(near, far, 8)
        r, error = quick_residuals(near, far, np.zeros(c.outside.nnz), v, np.zeros(len(v)), 0.0)
        assert (-r - error > 0).all()
        assert (v[:, 0] + v[:, 1] > 0).all()


@settings(derandomize=True, deadline=None, max_examples=15)
@given(seed=SEEDS, bits=st.sampled_from([3, 60, 300]))
def test_lifting_solves_integer_systems(seed, bits):
    rng = np.random.default_rng(seed)
    m = int(rng.integers(1, 20))
    A = [[int(v) * 2 ** int(s) for v, s in zip(row, rng.integers(0, bits, m))] for row in rng.integers(-9, 10, (m, m))]
    for i in range(m):
        A[i][i] = sum(map(abs, A[i])) + 1
    b = [int(v) << bits for v in rng.integers(-5, 6, m)]
    x = padic.solve([{j: v for j, v in enumerate(row) if v} for row in A], b)
    assert [sum(a * v for a, v in zip(row, x)) for row in A] == b


def test_lifting_takes_another_prime():
    p = next(padic._primes())
    assert padic.solve([{0: p}], [3]) == [F(3, p)]
    assert padic.solve([{0: 7}, {1: 1}], [14, 0]) == [2, 0]


def test_lifting_does_not_stop_at_a_fraction_that_merely_fits():
    """One over a number far longer than the digits at the first look."""
    assert padic.solve([{0: 3**2000}], [1]) == [F(1, 3**2000)]
