"""Chains whose answers are known: rationals by hand, closed forms, and the hard cases of the numerical literature."""

from __future__ import annotations

from fractions import Fraction as F

import numpy as np
import pytest

import markovsafety as ms
from markovsafety import toy
from markovsafety.hitting import core, exact, rates

TWO = [[2, 5, 1, 2], [1, 3, 4, 2], [0, 0, 0, 0], [0, 0, 0, 0]]
FLOATS = ("auto", "elimination", "sparse")


def two_states(**more):
    return ms.Chain.from_counts(TWO, {"harm": 2, "refusal": 3}, states=["S", "M", "Y", "R"], **more)


def inside(bound, fraction, i=()):
    """Whether the proven enclosure holds the rational answer, decided in rationals."""
    lower, upper = np.asarray(bound.lower)[i], np.asarray(bound.upper)[i]
    return (lower == -np.inf or F(float(lower)) <= fraction) and (upper == np.inf or fraction <= F(float(upper)))


def test_two_states_in_rationals():
    bound = ms.hitting_probability(two_states(), "harm", method="exact")
    assert bound.info["exact"] == [F(9, 17), F(11, 17), 1, 0]
    assert bound.value.tolist() == [9 / 17, 11 / 17, 1, 0]
    assert (bound.upper - bound.lower).max() <= 2.0**-52


@pytest.mark.parametrize("method", FLOATS)
def test_two_states_in_floats(method):
    bound = ms.hitting_probability(two_states(start="M"), "harm", method=method)
    for i, known in enumerate([F(9, 17), F(11, 17), F(1), F(0)]):
        assert inside(bound, known, i)
    assert bound.level == 1.0
    assert (bound.upper - bound.lower).max() < 1e-13
    assert inside(bound.at_start, F(11, 17))
    assert bound.at_start.value == pytest.approx(11 / 17, rel=1e-15)
    assert bound.lower[3] == bound.upper[3] == 0
    assert bound.info["certified"]
    assert bound.reasons["rounding"].max() < 1e-13
    assert bound.reasons["sampling"] is None


def test_two_states_visits_and_times():
    for start, row in (("S", [70, 50]), ("M", [10, 80])):
        seen = ms.visits(two_states(start=start))
        for i, n in enumerate(row):
            assert inside(seen, F(n, 51), i)
        assert seen.value[:2] == pytest.approx(np.array(row) / 51, rel=1e-14)
        assert seen.value[2] == pytest.approx({"S": 9 / 17, "M": 11 / 17}[start], rel=1e-14)
    length = ms.hitting_time(two_states(start=0))
    assert inside(length, F(40, 17), 0)
    assert inside(length.at_start, F(40, 17))
    assert length.value[2:].tolist() == [0, 0]
    chain = two_states()
    free = np.array([True, True, False, False])
    rows, step = exact.rows_of(chain)
    assert exact.potential(rates.rates_of(chain), rows, free, [F(0)] * 4, step)[:2] == [F(40, 17), F(30, 17)]


def test_time_given_the_hit_by_enumeration():
    """E[steps; harm] is the derivative of the generating function at 1; two states allow it by hand."""
    # u = h + P u on {S, M}: 8 u_S - 5 u_M = 10 h_S, -u_S + 7 u_M = 10 h_M.
    h = [F(9, 17), F(11, 17)]
    u_s, u_m = (70 * h[0] + 50 * h[1]) / 51, (10 * h[0] + 80 * h[1]) / 51
    bound = ms.hitting_time(two_states(start=0), "harm", given=True)
    assert inside(bound, u_s / h[0], 0)
    assert inside(bound, u_m / h[1], 1)
    assert bound.value[2] == 0
    assert np.isnan(bound.value[3])
    assert bound.at_start.value == pytest.approx(float(u_s / h[0]), rel=1e-14)
    law = two_states(start=[0.5, 0.5, 0, 0])
    both = ms.hitting_time(law, "harm", given=True).at_start  # over all answers that hit, not over states
    assert both.value == pytest.approx(float((u_s + u_m) / (h[0] + h[1])), rel=1e-14)
    assert (ms.hitting_time(two_states(), "harm").value == [np.inf, np.inf, 0, np.inf]).all()


def test_reward_replaces_tokens():
    chain = two_states(start=0)
    tokens = ms.hitting_time(chain, reward=[3.0, 0, 0, 0]).at_start
    assert tokens.value == pytest.approx(3 * 70 / 51, rel=1e-14)
    signed = ms.hitting_time(chain, reward=[3.0, -2.0, 0, 0])
    assert inside(signed.at_start, F(3 * 70 - 2 * 50, 51))
    with pytest.raises(ms.InputError, match="reward has shape"):
        ms.hitting_time(chain, reward=[1.0])


def test_ladder_in_rationals():
    n = 6
    C = np.zeros((n + 1, n + 1), dtype=int)
    for i in range(1, n):
        C[i, i + 1], C[i, i - 1] = 3, 7
    chain = ms.Chain.from_counts(C, {"harm": n, "refusal": 0}, start=3)
    h = ms.hitting_probability(chain, "harm", method="exact").info["exact"]
    assert (h[1], h[3], h[5]) == (F(243, 29230), F(27, 370), F(12423, 29230))


def test_aligned_positions_in_rationals():
    """Five aligned positions (harm .01, refusal .3), then .08 and .02."""
    d = 5
    C = np.zeros((d + 3, d + 3), dtype=int)
    for i in range(d + 1):
        a, r = (1, 30) if i < d else (8, 2)
        C[i, d + 1], C[i, d + 2], C[i, min(i + 1, d)] = a, r, 100 - a - r
    chain = ms.Chain.from_counts(C, {"harm": d + 1, "refusal": d + 2}, start=0)
    bound = ms.hitting_probability(chain, "harm", method="exact")
    assert bound.at_start.info["exact"] == F(7616765501, 50_000_000_000)
    fast = ms.hitting_probability(chain, "harm", method="layered")  # no cycle but a loop in place: recursion does it
    assert inside(fast.at_start, F(7616765501, 50_000_000_000))
    assert toy.prefilled_harm(d) == pytest.approx(7616765501 / 5e10, rel=1e-14)


def test_leaky_refusal_in_rationals():
    C = [[65, 30, 5, 0], [2, 88, 0, 10], [0] * 4, [0] * 4]
    chain = ms.Chain.from_counts(C, {"harm": 2, "refusal": 1, "benign": 3}, start=0)
    bound = ms.hitting_probability(chain, "harm", method="exact")
    assert bound.info["exact"] == [F(1, 6), F(1, 36), 1, 0]
    assert toy.leak_harm() == pytest.approx([1 / 6, 1 / 36], rel=1e-14)
    for end in (0.1, 1e-3, 0.0):  # without an end every leak is fatal
        h = ms.hitting_probability(toy.leak(0.02, end=end), "harm").value[:2]
        assert h == pytest.approx(toy.leak_harm(0.02, end=end), rel=1e-13)
    assert ms.hitting_probability(toy.leak(0.02, end=0.0), "harm").lower[:2].tolist() == [1, 1]  # the graph proves it
    assert ms.hitting_probability(toy.leak(0.0, end=0.0), "harm").value[:2] == pytest.approx(toy.leak_harm(0, end=0))


def test_closed_class_that_is_no_outcome():
    """States 2 and 3 hand each other on for ever: solving on all non-harm states would be singular."""
    P = np.zeros((8, 8))
    P[0, [1, 2, 6, 7]] = 0.25
    P[1, [0, 4, 6]] = 0.5, 0.25, 0.25
    P[2, [3]] = 1
    P[3, [2, 3]] = 0.5, 0.5
    P[4, [5, 7, 1]] = 0.25, 0.5, 0.25
    P[5, [4, 6]] = 0.75, 0.25
    chain = ms.Chain(P, {"harm": 6, "refusal": 7}, start=0)
    # h4 = h5/4 + h1/4, h5 = 3/4 h4 + 1/4, h1 = h0/2 + h4/4 + 1/4, h0 = h1/4 + 1/4
    h1 = (F(3, 8) + F(1, 52)) / (F(7, 8) - F(1, 13))  # from h4 = (1/16 + h1/4) / (13/16)
    h4 = (F(1, 16) + h1 / 4) / F(13, 16)
    known = [h1 / 4 + F(1, 4), h1, F(0), F(0), h4, F(3, 4) * h4 + F(1, 4), F(1), F(0)]
    assert ms.hitting_probability(chain, "harm", method="exact").info["exact"] == known
    for method in FLOATS:
        bound = ms.hitting_probability(chain, "harm", method=method)
        assert all(inside(bound, h, i) for i, h in enumerate(known))
        assert (bound.upper[[2, 3, 7]] == 0).all()
    assert ms.hitting_time(chain).value[[0, 2, 3]].tolist() == [np.inf] * 3
    assert ms.hitting_time(chain).value[[6, 7]].tolist() == [0, 0]
    seen = ms.visits(chain).value
    assert seen[[2, 3]].tolist() == [np.inf, np.inf]
    assert seen[6] == pytest.approx(float(known[0]), rel=1e-14)
    given = ms.hitting_time(chain, "harm", given=True)
    assert np.isfinite(given.value[[0, 1, 4, 5]]).all()
    assert np.isnan(given.value[[2, 3, 7]]).all()


@pytest.mark.parametrize(("n", "p"), [(6, 0.3), (2, 0.5), (40, 0.5), (300, 0.49), (150, 0.2), (30, 0.7)])
def test_ladders_and_ruin(n, p):
    bound = ms.hitting_probability(toy.ladder(n, p), "harm")
    # 0.3 and 1 - 0.3 do not sum to the exact odds; the closed form sees another ladder in the last digits.
    assert bound.value == pytest.approx(toy.ladder_harm(n, p), rel=1e-12)
    assert bound.value[0] == bound.upper[0] == 0
    if p == 0.5:
        assert ms.hitting_time(toy.ruin(n)).value == pytest.approx(toy.ruin_time(n), rel=1e-12)
        assert ms.hitting_probability(toy.ruin(n), "harm").value == pytest.approx(toy.ruin_harm(n), rel=1e-13)


@pytest.mark.parametrize("depth", [0, 1, 3, 20])
def test_trajectories_after_forced_tokens(depth):
    chain = toy.shallow(depth)
    h = ms.hitting_probability(chain, "harm")
    at = np.array([float(chain.entry[k] @ h.value) for k in range(depth + 1)])
    assert at == pytest.approx(toy.prefilled_harm(depth, np.arange(depth + 1)), rel=1e-13)
    assert h.at_start.value == pytest.approx(float(toy.prefilled_harm(depth)), rel=1e-13)


def test_the_published_depth_curve():
    harm = [ms.hitting_probability(toy.deep(d), "harm").at_start.value for d in (0, 1, 3, 5, 10, 20)]
    # Five digits of a table computed independently.
    assert harm == pytest.approx([0.8, 0.562, 0.28447, 0.15234, 0.05104, 0.03272], abs=1e-5)


def test_a_deeper_checkpoint_is_worse_without_an_attack():
    harm = [ms.hitting_probability(toy.checkpoint(d), "harm").at_start.value for d in (1, 5, 10, 20)]
    assert harm == sorted(harm)
    assert harm == pytest.approx([float(toy.checkpoint_harm(d)) for d in (1, 5, 10, 20)], rel=1e-13)
    chain = toy.checkpoint(10)
    h = ms.hitting_probability(chain, "harm").value[:11]
    assert h == pytest.approx(toy.checkpoint_harm(10, np.arange(11)), rel=1e-13)


def leaky_class(n, leak, seed=0):
    """A dense class of n states that is left with probability about `leak` per token."""
    rng = np.random.default_rng(seed)
    P = np.zeros((n + 2, n + 2))
    P[:n, :n] = rng.dirichlet(np.ones(n), size=n) * (1 - leak)
    P[:n, n:] = rng.dirichlet([1, 1], size=n) * leak * rng.random((n, 1))
    P[np.arange(n), np.arange(n)] += 1 - P[:n].sum(axis=1)
    return ms.Chain(P, {"harm": n, "refusal": n + 1}, start=0)


@pytest.mark.parametrize("leak", [1e-2, 1e-6, 1e-12, 1e-15])
def test_small_leaks_cost_no_digits(leak):
    chain = leaky_class(24, leak)
    known = ms.hitting_probability(chain, "harm", method="exact").info["exact"]
    for method in FLOATS:
        bound = ms.hitting_probability(chain, "harm", method=method)
        error = max(abs(F(v) / h - 1) for v, h in zip(bound.value.tolist()[:24], known))
        assert error < 1e-14
        assert all(inside(bound, h, i) for i, h in enumerate(known))
        assert (bound.upper - bound.lower).max() < 1e-10


def test_a_large_leaky_class_keeps_its_digits():
    """260 states at a leak of 1e-15: a plain solve has no digit left, and the enclosure is as narrow as ever."""
    chain = leaky_class(260, 1e-15)
    bound = ms.hitting_probability(chain, "harm")
    assert (bound.upper - bound.lower).max() < 1e-12
    known = ms.hitting_probability(chain, "harm", method="elimination")
    assert (known.lower <= bound.upper).all()
    assert (bound.lower <= known.upper).all()
    other = ms.committor(chain, "harm", "refusal")
    assert bound.value[:260] + other.value[:260] == pytest.approx(1, abs=1e-13)


def arms(N, p):
    """Two arms of N states, each step forward or back to the start by a coin: about 2^N tries, condition number 4^N."""
    n = 2 * N + 1
    P = np.zeros((n + 2, n + 2))
    P[0, 1], P[0, N + 1] = p, 1 - p
    for first, end in ((1, n), (N + 1, n + 1)):
        for i in range(first, first + N):
            P[i, i + 1 if i < first + N - 1 else end] += 0.5
            P[i, 0] += 0.5
    return ms.Chain(P, {"harm": n, "refusal": n + 1}, start=0)


@pytest.mark.parametrize("method", FLOATS)
def test_condition_number_of_1e30(method):
    chain = arms(100, 0.7)
    bound = ms.hitting_probability(chain, "harm", method=method).at_start
    known = F(0.7) / (F(0.7) + F(1 - 0.7))
    assert abs(F(bound.value) / known - 1) < 1e-14
    assert inside(bound, known)
    assert bound.upper - bound.lower < 1e-9
    steps = ms.hitting_time(chain)
    # 2^N tries on average, each one step into an arm and 2 (1 - 2^-N) tosses there.
    assert steps.at_start.value == pytest.approx(3 * 2.0**100, rel=1e-12)


def test_time_and_visits_in_rationals_on_a_leaky_class():
    chain = leaky_class(12, 1e-9, seed=3)
    w = core.walk(chain, tuple(chain.outcomes))
    r = rates.rates_of(chain)
    rows, step = exact.rows_of(chain)
    known = exact.potential(r, rows, w.moving, [F(0)] * 14, step)
    bound = ms.hitting_time(chain)
    assert all(inside(bound, known[i], i) for i in range(12))
    assert sum(map(F, ms.visits(chain).value[:12].tolist())) == pytest.approx(known[0], rel=1e-13)
