"""Cyclic classes: every method against rationals, at leaks and rates that leave ordinary solvers without digits."""

from __future__ import annotations

from fractions import Fraction as F

import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given
from hypothesis import strategies as st
from made import quick

import markovsafety as ms
from markovsafety.hitting import blocks, certify, dissection, elimination, krylov, rates, reuse
from markovsafety.hitting import dissection_kernels as orders
from markovsafety.hitting.cyclic import Cyclic, Room


def ring(seed, n, leak, power=0, k=3):
    """One cyclic class of n states, left with probability about `leak` from a third of them; rates down to 10^power."""
    rng = np.random.default_rng(seed)
    P = np.zeros((n + 2, n + 2))
    P[np.arange(n), (np.arange(n) + 1) % n] = 0.5
    for i in range(n):
        for j in rng.choice(n, min(k, n - 1), replace=False):
            P[i, j] += rng.random() * 10.0 ** rng.integers(power, 1)
    P[np.arange(n), np.arange(n)] = 0
    P[:n] /= P[:n].sum(axis=1, keepdims=True)
    out = rng.choice(n, n // 3 + 1, replace=False)
    P[out] *= 1 - leak
    P[out, n] += leak * rng.random(len(out))
    P[out, n + 1] += leak * rng.random(len(out))
    P[:n] /= P[:n].sum(axis=1, keepdims=True)
    return ms.Chain(P, {"harm": n, "refusal": n + 1}, start=0)


def line(n, up=0.5):
    """Gambler's ruin: harm above, refusal below."""
    P = sp.diags_array([np.full(n - 1, 1 - up), np.full(n - 1, up)], offsets=[-1, 1]).tolil()
    P.resize((n + 2, n + 2))
    P[n - 1, n], P[0, n + 1] = up, 1 - up
    return ms.Chain(sp.csr_array(P), {"harm": n, "refusal": n + 1}, start=n // 2)


def problem(chain, columns=3):
    """The class of all moving states, the known values and no gains."""
    r, n = rates.rates_of(chain), chain.n_states - 2
    X = np.zeros((n + 2, columns))
    X[n] = 1.0
    return Cyclic(r, np.arange(n), Room.of(n + 2)), X, np.zeros((n, columns))


def exact(chain):
    return ms.hitting_probability(chain, "harm", method="exact").info["exact"][: chain.n_states - 2]


def solved(which, c, X, gain):
    if which == "krylov":
        return krylov.solve(c.rates, c.mixer, X, gain, c.room.values, 1.0)
    if which == "lu":
        return blocks._factored_class(c, X, gain, 1.0)
    return blocks._eliminated_class(c, X, gain, 1.0, which == "dissection")


def error(found, known):
    return max(abs(F(float(x)) / v - 1) for x, v in zip(found, known))


def inside(x, known):
    return all(F(float(lo)) <= v <= F(float(up)) for lo, v, up in zip(x[:, 1], known, x[:, 2]))


@pytest.mark.parametrize("which", ["krylov", "dissection", "elimination"])
@pytest.mark.parametrize("leak", [1e-1, 1e-6, 1e-12, 1e-15])
def test_every_digit_at_every_leak(which, leak):
    c, X, gain = problem(chain := ring(1, 45, leak))
    known, x = exact(chain), solved(which, c, X, gain)
    assert x is not None
    assert inside(x, known)
    assert error(x[:, 0], known) <= F(1, 10**14)
    assert (x[:, 2] - x[:, 1]).max() <= 1e-12
    bare = solved(which, c, X[:, :1], gain[:, :1])
    assert error(bare[:, 0], known) <= F(1, 10**14)


@quick
@given(st.integers(0, 10**6), st.integers(2, 40), st.integers(-15, -1), st.sampled_from([0, -3, -12, -100, -290]))
def test_enclosures_hold_the_exact_answer(seed, n, leak, power):
    chain = ring(seed, n, 10.0**leak, power)
    c, X, gain = problem(chain)
    if len(c.rates.terms) < n or (c.rates.terms[:n] == 0).any():
        return
    known = exact(chain)
    for which in ("krylov", "lu", "dissection", "elimination"):
        x = solved(which, c, X, gain)
        if x is not None:  # refused is allowed, wrong is not
            assert inside(x, known), which
        if which == "elimination" and power > -100:
            assert error(x[:, 0], known) <= certify.gamma(elimination.roundings(n) + 8 * n)


def test_sparse_elimination_is_dense_elimination():
    rng = np.random.default_rng(0)
    side = 12
    P = np.zeros((side * side + 2, side * side + 2))
    for i in range(side * side):
        x, y = divmod(i, side)
        for a, b in ((x + 1, y), (x - 1, y), (x, y + 1), (x, y - 1)):
            w = rng.random() + 0.01
            j = a * side + b if 0 <= a < side and 0 <= b < side else side * side + (a >= 0)
            P[i, j] += w
        P[i] /= P[i].sum()
    chain = ms.Chain(P, {"harm": side * side, "refusal": side * side + 1}, start=0)
    c, X, gain = problem(chain)
    assert c.fronts is not None
    assert len(c.fronts.parent) > 5
    assert c.fronts.fill < 0.6 * side**4
    thin, full = solved("dissection", c, X[:, :1], gain[:, :1]), solved("elimination", c, X[:, :1], gain[:, :1])
    assert thin[:, 0] == pytest.approx(full[:, 0], rel=1e-13)
    assert error(thin[:, 0], exact(chain)) <= certify.gamma(elimination.roundings(c.fronts) + 4 * side**2)
    source = rng.random(side * side)
    z = [elimination.solve_flow(c.eliminated(sparse), source) for sparse in (True, False)]
    assert z[0] == pytest.approx(z[1], rel=1e-13)
    A = np.diag(c.out) - c.parts[0].toarray()
    assert A.T @ z[0] == pytest.approx(source, rel=1e-10)


@quick
@given(st.integers(0, 10**6), st.integers(2, 120), st.integers(1, 4))
def test_an_order_holds_every_state_once_and_its_borders_are_complete(seed, n, k):
    rng = np.random.default_rng(seed)
    A = sp.random_array((n, n), density=min(1.0, k / n), rng=rng, format="csr")
    adjacent = orders.symmetric(A.indptr, A.indices)
    order, begin, parent = orders.dissect(*adjacent, 6)
    edge, border = orders.borders(*adjacent, order, begin, parent)
    assert sorted(order) == list(range(n))
    assert ((parent > np.arange(len(parent))) | (parent < 0)).all()
    rank = np.argsort(order)
    front = np.repeat(np.arange(len(parent)), np.diff(begin))
    for i, j in zip(*A.nonzero()):
        a, b = sorted((rank[i], rank[j]))
        assert front[a] == front[b] or b in border[edge[front[a]] : edge[front[a] + 1]]
    for a, up in enumerate(parent):
        mine = set(border[edge[a] : edge[a + 1]])
        assert up >= 0 or not mine
        if up >= 0:
            theirs = set(range(begin[up], begin[up + 1])) | set(border[edge[up] : edge[up + 1]])
            assert mine <= theirs


def test_a_long_line_is_eliminated_sparsely():
    n = 3000
    bound = ms.hitting_probability(line(n), "harm")
    truth = np.arange(1, n + 1) / (n + 1)
    assert "nested dissection" in bound.info["why"]
    assert bound.value[:n] == pytest.approx(truth, rel=1e-14)
    assert (bound.upper - bound.lower).max() <= 1e-12
    asked = ms.hitting_probability(line(6000), "harm", method="elimination")  # too many to make dense
    assert asked.value[:6000] == pytest.approx(np.arange(1, 6001) / 6001, rel=1e-14)
    seen = ms.visits(line(n))
    assert seen.value[n] == pytest.approx(bound.at_start.value, rel=1e-11)


def test_numbering_of_states_does_not_matter():
    chain = ring(3, 60, 1e-9)
    turn = np.random.default_rng(0).permutation(60)
    P = chain.P.toarray()
    full = np.concatenate([turn, [60, 61]])
    other = ms.Chain(P[np.ix_(full, full)], {"harm": 60, "refusal": 61}, start=0)
    for which in ("krylov", "dissection", "lu"):
        x, y = (solved(which, *problem(one)) for one in (chain, other))
        assert y[:, 0] == pytest.approx(x[turn, 0], rel=1e-14)


def test_a_class_on_which_iteration_fails_falls_back_and_says_so(monkeypatch):
    """Two halves joined by a rate of 1e-14: the constant is not the only vector in the null space, nearly."""
    n, rng = 240, np.random.default_rng(4)
    P = np.zeros((n + 2, n + 2))
    for half in (0, n // 2):
        for i in range(half, half + n // 2):
            P[i, half + rng.choice(n // 2, 9, replace=False)] = rng.random(9)
    P[np.arange(n), np.arange(n)] = 0
    P[:n] /= P[:n].sum(axis=1, keepdims=True)
    P[0, n // 2] = P[n // 2, 0] = 1e-14
    P[1, n], P[n // 2 + 1, n + 1] = 1e-14, 2e-14
    P[:n] /= P[:n].sum(axis=1, keepdims=True)
    chain = ms.Chain(P, {"harm": n, "refusal": n + 1}, start=0)
    c, X, gain = problem(chain)
    assert krylov.solve(c.rates, c.mixer, X, gain, c.room.values, 1.0) is None
    monkeypatch.setattr(dissection, "fronts", lambda *a: None)
    bound = ms.hitting_probability(chain, "harm")
    assert "could not be trusted" in bound.info["why"]
    assert "subtraction-free elimination" in bound.info["why"]
    exit = ms.hitting_probability(chain, "harm", method="elimination")
    assert bound.value == pytest.approx(exit.value, rel=1e-12)
    assert 0 < bound.value[0] < 1
    assert (bound.upper - bound.lower).max() <= 1e-9


def test_factors_are_made_once_and_change_nothing(monkeypatch):
    made = []
    honest = elimination.eliminate_class
    monkeypatch.setattr(elimination, "eliminate_class", lambda *a: made.append(1) or honest(*a))
    chain = ring(5, 80, 1e-5)
    first = [ms.hitting_probability(chain, t) for t in ("harm", "refusal")]
    ms.visits(chain)
    ms.hitting_time(chain)
    assert len(made) == 1
    fresh = [ms.hitting_probability(ring(5, 80, 1e-5), t) for t in ("harm", "refusal")]
    for a, b in zip(first, fresh):
        assert (a.value == b.value).all()
        assert (a.lower == b.lower).all()
    # Another class with the same first state and size is another class.
    memo = {}

    class Kept:
        nbytes = reuse.BUDGET // 2

    one = reuse.kept(memo, "x", np.array([0, 1, 2]), Kept)
    assert reuse.kept(memo, "x", np.array([0, 1, 2]), Kept) is one
    assert reuse.kept(memo, "x", np.array([0, 1, 3]), Kept) is not one
    for first_state in (5, 6, 7):
        reuse.kept(memo, "x", np.array([first_state, 9]), Kept)
    assert sum(held.nbytes for _, held in memo["classes"].values()) <= reuse.BUDGET


def test_outside_ends_and_gains_widen_the_proof():
    """Lower and upper values outside, and gains with ends: the answer of any chain in between is enclosed."""
    c, X, gain = problem(ring(6, 50, 1e-4))
    X[50] = 0.5, 0.4, 0.6
    X[51] = 0.1, 0.05, 0.1
    gain[:] = 1e-6, 0.0, 2e-6
    x = krylov.solve(c.rates, c.mixer, X, gain, c.room.values, np.inf)
    for side in range(3):
        A = np.diag(c.out) - c.parts[0].toarray()
        y = np.linalg.solve(A, gain[:, side] + c.parts[1] @ X[:, side])
        assert (x[:, 1] <= y * (1 + 1e-9)).all()
        assert (y <= x[:, 2] * (1 + 1e-9)).all()


@pytest.mark.parametrize("leak", [1e-1, 1e-4, 1e-9, 1e-14])
def test_sweeps_of_the_transposed_equation_give_the_visits(leak):
    n = 60
    c, _, _ = problem(chain := ring(8, n, leak, k=8))
    P = [[F(float(x)) for x in row] for row in chain.P.toarray()]
    rows = [[c.rates.W[i, j] for j in range(n)] for i in range(n)]
    start = np.zeros(n)
    start[:3] = 0.5, 0.25, 0.25
    z = krylov.flow(c.mixer, c.parts[0], c.out, start)
    assert z is not None
    # Balance of every state in rationals, and of the class as a whole.
    z_exact = [F(float(x)) for x in z]
    out = [sum(F(float(w)) for w in c.rates.W[[i]].data) for i in range(n)]
    for j in range(n):
        into = F(float(start[j])) + sum(z_exact[i] * F(float(rows[i][j])) for i in range(n))
        assert abs(into / (z_exact[j] * out[j]) - 1) <= F(1, 10**14)
    left = [sum(P[i][n:]) / sum(P[i][:i] + P[i][i + 1 :]) for i in range(n)]
    assert abs(sum(z_exact[i] * out[i] * left[i] for i in range(n)) - 1) <= F(1, 10**14)
    again = krylov.flow(c.mixer, c.parts[0], c.out, start)
    assert again == pytest.approx(z, rel=1e-14)  # with what is kept
    solve = krylov.flow_solver(c.mixer, c.parts[0], c.out)
    assert solve(start) == pytest.approx(z, rel=1e-4)
    assert solve(-start) == pytest.approx(-z, rel=1e-4)


def test_visits_of_a_large_class_hold_the_exact_ones(monkeypatch):
    """The road of large classes, on one small enough for rationals."""
    chain = ring(9, 50, 1e-7, k=8)
    exact_visits = ms.visits(chain).value
    monkeypatch.setattr(blocks, "SMALL", 1)
    monkeypatch.setattr(dissection, "fronts", lambda *a: None)
    seen = ms.visits(ring(9, 50, 1e-7, k=8))
    assert "BiCGStab" in seen.info["why"]
    assert seen.value[:50] == pytest.approx(exact_visits[:50], rel=1e-13)
    A = [[F(float(w)) for w in row] for row in chain.P.toarray()]
    held = [F(float(x)) for x in seen.lower], [F(float(x)) for x in seen.upper]
    for j in range(50):  # with all other visits at one end, those of j are at most (least) what arrives
        move = sum(A[j]) - A[j][j]
        arrive = [int(j == 0) + sum(held[end][i] * A[i][j] for i in range(50) if i != j) for end in (0, 1)]
        assert arrive[0] <= held[1][j] * move
        assert held[0][j] * move <= arrive[1]
    assert ((seen.upper - seen.lower)[:50] <= 1e-12 * seen.value[:50]).all()


def test_what_sweeps_left_is_kept_and_changes_nothing_but_the_last_bit():
    c, X, gain = problem(ring(10, 70, 1e-6, k=8))
    first = solved("krylov", c, X, gain)
    assert c.mixer.memo["sweeps"] is not None
    again = solved("krylov", c, X, gain)
    assert again[:, 0] == pytest.approx(first[:, 0], rel=4e-16)
    assert (np.maximum(first[:, 1], again[:, 1]) <= np.minimum(first[:, 2], again[:, 2])).all()


def test_a_class_that_spreads_is_not_dissected():
    rng = np.random.default_rng(0)
    n = 4000
    A = sp.csr_array((np.ones(8 * n), rng.integers(n, size=8 * n), np.arange(0, 8 * n + 1, 8)), shape=(n, n))
    assert dissection.fronts(A.indptr, A.indices) is None
    assert dissection.fronts(A.indptr, A.indices, limit=0) is None
