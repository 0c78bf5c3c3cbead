"""Iterated updates: closed forms against plain iteration, other tools, and what they do to harm."""

from __future__ import annotations

import math

import mpmath
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import solve_ivp

import markovsafety as ms
from markovsafety import toy
from markovsafety.depth import (
    AdditiveBias,
    BiasMatrix,
    ConstantSteps,
    ConvexMix,
    CrossEntropyFlow,
    GeometricSteps,
    GivenSteps,
    HarmonicSteps,
    LogitSteps,
    absorbing_when,
    cross_entropy_path,
    fit_attack_curve,
    residual_after,
    steps_to,
    trace,
    updated,
    verdict_of,
)
from markovsafety.depth.schedules import log_product, sizes, total

quick = settings(deadline=None, derandomize=True, max_examples=60)
unit = st.floats(0.001, 0.999)
schedules = st.one_of(
    st.floats(0, 3).map(ConstantSteps),
    st.builds(GeometricSteps, st.floats(0, 3), st.floats(0, 0.99)),
    st.floats(0, 3).map(HarmonicSteps),
    st.lists(st.floats(0, 3), max_size=6).map(lambda a: GivenSteps(tuple(a))),
)


def iterated(row, bias, schedule, steps):
    """Add bias, renormalise, step by step."""
    for alpha in sizes(schedule, steps):
        row = row + alpha * bias
        row = row / row.sum(axis=-1, keepdims=True)
    return row


# --- schedules ---


@quick
@given(schedules, st.floats(-0.3, 5), st.integers(0, 200))
def test_products_and_sums_are_those_of_the_steps(schedule, x, steps):
    alphas = sizes(schedule, steps)
    assert float(log_product(schedule, x, steps)) == pytest.approx(np.log1p(x * alphas).sum(), rel=1e-12, abs=1e-12)
    assert float(total(schedule, steps)) == pytest.approx(alphas.sum(), rel=1e-12, abs=1e-14)


def test_geometric_limit_is_the_q_pochhammer_symbol():
    factor = math.exp(-float(log_product(GeometricSteps(0.2, 0.9), 1.0, math.inf)))
    assert factor == pytest.approx(float(1 / mpmath.qp(-mpmath.mpf("0.2"), mpmath.mpf("0.9"))), rel=1e-14)
    assert round(factor, 7) == 0.1490385
    assert factor > math.exp(-0.2 / 0.1)  # the bound by the sum of the steps
    for alpha, gamma in ((2.5, 0.5), (0.01, 0.95), (1.0, 0.0)):
        want = mpmath.log(mpmath.qp(-mpmath.mpf(alpha), mpmath.mpf(gamma)))
        assert float(log_product(GeometricSteps(alpha, gamma), 1.0, math.inf)) == pytest.approx(float(want), rel=1e-13)


@pytest.mark.parametrize("y", [0.2, 5.0, -0.7])
def test_a_geometric_schedule_too_slow_to_sum_is_summed_all_the_same(y):
    gamma = 1 - 1e-6
    a, slow = mpmath.mpf(y), -mpmath.log(mpmath.mpf(gamma))
    term = lambda s: mpmath.log1p(a * mpmath.exp(-slow * s))  # noqa: E731
    want = -mpmath.polylog(2, -a) / slow + term(0) / 2 - mpmath.diff(term, 0) / 12 + mpmath.diff(term, 0, 3) / 720
    schedule, sign = GeometricSteps(abs(y), gamma), math.copysign(1, y)
    assert float(log_product(schedule, sign, math.inf)) == pytest.approx(float(want), rel=1e-13)
    steps = 300_000
    direct = math.fsum(np.log1p(y * gamma ** np.arange(steps)))
    assert float(log_product(schedule, sign, steps)) == pytest.approx(direct, rel=1e-12)


@pytest.mark.parametrize("y", [0.2, 3.0, -0.5, 100.0])
@pytest.mark.parametrize("steps", [1, 64, 65, 1000, 10**12])
def test_harmonic_product_is_a_ratio_of_gammas(y, steps):
    with mpmath.workdps(50):
        want = mpmath.loggamma(steps + 1 + mpmath.mpf(y)) - mpmath.loggamma(1 + mpmath.mpf(y))
        want = float(want - mpmath.loggamma(steps + 1))
    found = float(log_product(HarmonicSteps(abs(y)), math.copysign(1, y), steps))
    assert found == pytest.approx(want, rel=1e-13)


# --- one probability ---


@quick
@given(schedules, unit, st.floats(0, 2), st.floats(0, 2), st.integers(0, 60))
def test_additive_bias_is_the_iteration(schedule, p, bias, elsewhere, steps):
    row = iterated(np.array([p, 1 - p]), np.array([bias, elsewhere]), schedule, steps)
    found = residual_after(AdditiveBias(schedule, bias, elsewhere), p, steps)
    assert found == pytest.approx(row[1], rel=1e-11, abs=1e-14)


def test_bias_of_which_a_share_is_on_refusal_ends_at_that_share():
    update = AdditiveBias(ConstantSteps(0.3), 0.7, 0.3)
    for p in (0.0, 0.2, 0.9, 1.0):
        assert residual_after(update, p, math.inf) == pytest.approx(0.3, rel=1e-14)
    verdict = verdict_of(update, 0.2)
    assert not verdict
    assert verdict.limit == pytest.approx(0.7)
    assert "share 0.7" in verdict.reason


@quick
@given(st.floats(0.01, 0.99), st.floats(0.01, 0.99), unit, st.integers(0, 40))
def test_convex_mix_and_logit_steps_are_the_iteration(eta, gamma, p, steps):
    schedule = GeometricSteps(eta, gamma)
    mixed, odds = p, p / (1 - p)
    for alpha in sizes(schedule, steps):
        mixed += alpha * (1 - mixed)
        odds *= math.exp(alpha)
    assert residual_after(ConvexMix(schedule), p, steps) == pytest.approx(1 - mixed, rel=1e-10, abs=1e-14)
    assert residual_after(LogitSteps(schedule), p, steps) == pytest.approx(1 / (1 + odds), rel=1e-11, abs=0)
    # Adding bias is mixing, with the shares alpha / (1 + alpha).
    shares = GivenSteps(tuple(sizes(schedule, steps) / (1 + sizes(schedule, steps))))
    same = residual_after(ConvexMix(shares), p, steps)
    assert same == pytest.approx(residual_after(AdditiveBias(schedule), p, steps), rel=1e-12, abs=0)


def test_only_steps_with_an_infinite_sum_absorb():
    endless = ConstantSteps(0.1), HarmonicSteps(0.1)
    short = GeometricSteps(0.5, 0.9), GivenSteps((0.5, 0.5)), ConstantSteps(0.0)
    for make in (AdditiveBias, ConvexMix, LogitSteps):
        for schedule in endless:
            verdict = verdict_of(make(schedule), 0.3)
            assert verdict.absorbing
            assert verdict.limit == 1
            assert residual_after(make(schedule), 0.3, math.inf) == 0
        for schedule in short:
            verdict = verdict_of(make(schedule), 0.3)
            assert not verdict.absorbing
            assert verdict.limit == pytest.approx(1 - residual_after(make(schedule), 0.3, 10**6), rel=1e-12)
            assert verdict.limit < 1
            steps, reason = steps_to(make(schedule), 0.3, 1e-3)
            assert steps is None
            assert verdict.reason in reason
    assert verdict_of(ConvexMix(GivenSteps((1.0,))), 0.3).absorbing
    assert steps_to(ConvexMix(GivenSteps((0.5, 1.0))), 0.3, 0.0) == (2, "")
    assert not verdict_of(LogitSteps(ConstantSteps(1.0)), 0.0)  # no odds, nothing to multiply
    assert not verdict_of(AdditiveBias(ConstantSteps(1.0), 0.0), 0.4)
    assert "never moves" in verdict_of(AdditiveBias(ConstantSteps(1.0), 0.0), 0.4).reason


@quick
@given(st.floats(0.01, 2), unit, st.floats(1e-6, 0.5))
def test_steps_to_is_the_smallest(alpha, p, eps):
    updates = AdditiveBias(ConstantSteps(alpha)), ConvexMix(ConstantSteps(alpha / 2)), CrossEntropyFlow(50, alpha)
    for update in (*updates, LogitSteps(ConstantSteps(alpha)), AdditiveBias(HarmonicSteps(1 + alpha))):
        steps, reason = steps_to(update, p, eps)
        assert reason == ""
        assert residual_after(update, p, steps) <= eps
        assert steps == 0 or residual_after(update, p, steps - 1) > eps


def test_steps_of_logit_and_flow_by_formula():
    p, eps, eta = 0.2, 1e-3, 0.7
    want = math.log((1 - eps) / (eps * (p / (1 - p)))) / eta
    assert steps_to(LogitSteps(ConstantSteps(eta)), p, eps)[0] == math.ceil(want)
    # Cross-entropy needs about (K - 1) / (K eps): a thousand steps where logit steps need a dozen.
    found = steps_to(CrossEntropyFlow(50), p, eps)[0]
    assert found == pytest.approx(0.98 / eps, rel=0.02)
    assert steps_to(LogitSteps(ConstantSteps(eta)), 0.9995, eps) == (0, "")
    assert steps_to(AdditiveBias(ConstantSteps(1.0)), 0.5, 0.0)[0] is None


def test_cross_entropy_flow_against_an_ode_solver_and_the_asymptote():
    found = residual_after(CrossEntropyFlow(50), 1 / 50, [0, 10, 2000])
    assert f"{found[2]:.3e}" == "4.925e-04"
    assert f"{49 / 50 / 2000:.3e}" == "4.900e-04"
    solved = cross_entropy_path(np.full(50, 1 / 50), 3, [0, 10, 2000])
    assert found == pytest.approx(solved[:, [*range(3), *range(4, 50)]].sum(axis=1), rel=1e-7)
    u = solve_ivp(lambda _, u: 50 / (49 + np.exp(u)), (0, 2000), [0.0], "DOP853", rtol=1e-12, atol=1e-12).y[0, -1]
    assert found[2] == pytest.approx(49 / (49 + math.exp(u)), rel=1e-9)
    late = residual_after(CrossEntropyFlow(7), 0.3, 10**9)
    assert late * 10**9 == pytest.approx(6 / 7, rel=1e-6)


def test_the_flow_of_any_row_lies_between_two_symmetric_ones():
    """o + log o grows between K / (K - 1) and 2 per unit of time."""
    rng = np.random.default_rng(3)
    times = [0, 1, 10, 300]
    for conc in (0.05, 0.5, 50):
        row = rng.dirichlet(np.full(20, conc)) + 1e-9
        row /= row.sum()
        left = np.delete(cross_entropy_path(row, 4, times), 4, axis=1).sum(axis=1)
        slow, fast = (residual_after(CrossEntropyFlow(K), row[4], times) for K in (20, 2))
        assert (left <= slow * (1 + 1e-7)).all()
        assert (left >= fast * (1 - 1e-7)).all()
    # All the rest on one token: the two-token flow itself.
    two = cross_entropy_path([0.2, 0.8, 0.0], 0, times)
    assert two[:, 1] == pytest.approx(residual_after(CrossEntropyFlow(2), 0.2, times), rel=1e-7)
    assert (two[:, 2] == 0).all()


def test_small_residuals_keep_their_digits():
    assert residual_after(AdditiveBias(ConstantSteps(1.0)), 0.5, 900) == pytest.approx(2.0**-901, rel=1e-12, abs=0)
    assert residual_after(LogitSteps(ConstantSteps(1.0)), 0.5, 600) == pytest.approx(math.exp(-600), rel=1e-12, abs=0)


# --- chains ---


@quick
@given(st.integers(0, 10**6), schedules, st.integers(0, 12), st.booleans())
def test_a_chain_under_a_bias_matrix_is_the_iteration(seed, schedule, steps, layered):
    rng = np.random.default_rng(seed)
    P = [np.vstack([rng.dirichlet(np.ones(5), 3), np.eye(5)[3:]]) for _ in range(2 if layered else 1)]
    B = [rng.random((5, 5)) * (rng.random((5, 1)) < 0.6) * (rng.random((5, 5)) < 0.5) for _ in P]
    want = [iterated(p, b, schedule, steps) for p, b in zip(P, B)]
    if layered:
        chain = ms.Chain.layered(P, {"harm": 3, "refusal": 4}, 0)
        found = updated(chain, BiasMatrix(schedule, B), steps)
    else:
        found = updated(ms.Chain(P[0], {"harm": 3, "refusal": 4}, 0), BiasMatrix(schedule, B[0]), steps)
    for Q, p, b, w in zip(found.layers, P, B, want):
        assert Q.toarray() == pytest.approx(w, abs=1e-12)
        assert (Q.toarray()[b.sum(axis=1) == 0] == p[b.sum(axis=1) == 0]).all()  # rows without bias never move
    rows = updated(P[0], BiasMatrix(schedule, B[0]), steps)
    assert rows == pytest.approx(want[0], abs=1e-12)
    assert updated(P[0][0], BiasMatrix(schedule, B[0][0]), steps) == pytest.approx(want[0][0], abs=1e-12)


def test_updates_of_one_probability_keep_the_proportions_of_the_rest():
    chain = toy.shallow(3)
    for update in (AdditiveBias(ConstantSteps(0.4)), ConvexMix(ConstantSteps(0.2)), LogitSteps(ConstantSteps(0.5))):
        P, Q = chain.P.toarray(), updated(chain, update, 7).P.toarray()
        for i in range(4):
            left = residual_after(update, P[i, 5], 7)
            assert Q[i, 5] == pytest.approx(1 - left, rel=1e-12)
            assert np.delete(Q[i], 5) == pytest.approx(np.delete(P[i], 5) * left / (1 - P[i, 5]), rel=1e-12)
    one = updated(chain, LogitSteps(ConstantSteps(0.5)), 2, rows=["position 1"]).P.toarray()
    assert [i for i in range(6) if not np.array_equal(one[i], P[i])] == [1]
    # A row that never refuses learns to by mixing, not by multiplying its odds.
    mute = ms.Chain([[0.5, 0.5, 0], [0, 1, 0], [0, 0, 1]], {"harm": 1, "refusal": 2}, 0)
    assert updated(mute, ConvexMix(ConstantSteps(0.2)), 1).P.toarray()[0] == pytest.approx([0.4, 0.4, 0.2])
    assert updated(mute, LogitSteps(ConstantSteps(0.2)), 9).equals(mute)
    flowed = updated(chain, CrossEntropyFlow(3), 5).P.toarray()
    assert flowed[0][[1, 4, 5]] == pytest.approx(cross_entropy_path([0.69, 0.01, 0.3], 2, [5])[0], rel=1e-9)


def test_a_row_that_almost_always_refuses_keeps_its_leak():
    P = [[0.5, 0.2, 0.3, 0], [1e-18, 1 - 2e-18, 0, 1e-18], [0] * 4, [0] * 4]
    chain = ms.Chain(P, {"refusal": 1, "harm": 2, "benign": 3}, 0)
    for update in (AdditiveBias(ConstantSteps(1.0)), LogitSteps(ConstantSteps(1.0)), ConvexMix(ConstantSteps(0.5))):
        row = updated(chain, update, 3, rows="refusal").P.toarray()[1]
        assert row[0] == pytest.approx(
            1e-18 * (math.exp(-3) if isinstance(update, LogitSteps) else 1 / 8), rel=1e-12, abs=0
        )


def test_trace_records_residual_and_harm_at_every_step():
    chain = toy.shallow(3)
    found = trace(chain, AdditiveBias(ConstantSteps(0.25)), 20)
    assert found.steps == tuple(range(21))
    assert found.residual.shape == found.harm.shape == (21, 6)
    for T in (0, 1, 20):
        now = updated(chain, AdditiveBias(ConstantSteps(0.25)), T)
        assert found.at_start.value[T] == ms.hitting_probability(now, "harm").at_start.value
        assert found.residual[T, 0] == pytest.approx(0.7 * 0.8**T, rel=1e-12)
    assert (np.diff(found.at_start.value) < 0).all()
    assert found.at_start.lower[3] <= found.at_start.value[3] <= found.at_start.upper[3]
    worst = 0.98  # unaligned rows refuse with .02
    assert found.first(0.1) == steps_to(AdditiveBias(ConstantSteps(0.25)), 1 - worst, 0.1)[0]
    assert found.first(1e-9) is None
    layers = trace(ms.Chain.layered([chain.P] * 3, chain.outcomes, 0), AdditiveBias(ConstantSteps(1.0)), [0, 4])
    assert layers.residual.shape == (2, 3, 6)
    assert layers.harm.shape == (2, 4, 6)
    assert layers.at_start.value[1] < layers.at_start.value[0]


def test_almost_absorbing_is_empty_where_refusal_leaks():
    """The counter-example: refusal comes as close to absorbing as one likes and harm does not move at all."""
    chain, update = toy.leak(), AdditiveBias(ConstantSteps(0.2))
    found = trace(chain, update, [0, 1, 10, 100, 1000], rows="refusal")
    assert found.residual[-1, 1] < 1e-75
    assert found.harm.value[:, 1] == pytest.approx(np.full(5, toy.leak_harm()[1]), rel=1e-12)
    assert found.at_start.value == pytest.approx(np.full(5, 1 / 6), rel=1e-12)
    end = found.absorption
    assert end.empty
    assert end.absorbing.tolist() == [False, True, False, False]
    assert end.harm_limit == pytest.approx([1 / 6, 1 / 36, 1, 0], rel=1e-12)
    assert "bias slows both alike" in str(end)
    # The limit chain itself has no leak: its harm is not the limit of the harm.
    assert ms.hitting_probability(updated(chain, update, math.inf, rows="refusal"), "harm").value[1] == 0
    # Without an end of the answer every leak is fatal, however small bias makes it.
    endless = absorbing_when(toy.leak(end=0.0), update, rows=[0, 1])
    assert endless.harm_limit == pytest.approx([1, 1, 1, 0])
    assert endless.empty
    # Where the trajectory's row is biased as well, harm goes to 0, by that row alone.
    both = absorbing_when(chain, update, rows=[0, 1])
    assert both.harm_limit.tolist() == [0, 0, 1, 0]
    assert not both.empty
    alone = absorbing_when(chain, update)
    assert alone.harm_limit[0] == 0
    assert alone.reasons["a row without bias never moves"] == ["refusal"]
    assert alone.limit[1] == pytest.approx(0.88)


def test_two_refusal_states_that_hold_each_other_leak_as_before():
    """No row is biased on itself, and still only the proportions of leaving count."""
    P = np.array([[0.5, 0.3, 0, 0.2, 0], [0.02, 0, 0.9, 0, 0.08], [0.04, 0.9, 0, 0, 0.06], [0] * 5, [0] * 5])
    chain = ms.Chain(P, {"refusal": [1, 2], "harm": 3, "benign": 4}, 0)
    B = np.zeros((5, 5))
    B[1, 2] = B[2, 1] = 1
    end = absorbing_when(chain, BiasMatrix(ConstantSteps(1.0), B))
    late = trace(chain, BiasMatrix(ConstantSteps(1.0), B), [200]).harm.value[0]
    assert end.harm_limit == pytest.approx(late, rel=1e-9)
    leave = (0.02 + 0.04) / (0.02 + 0.08 + 0.04 + 0.06)  # both are visited alike in the long run
    assert end.harm_limit[1] == pytest.approx(leave * end.harm_limit[0], rel=1e-9)
    assert end.empty


def test_summable_steps_leave_harm():
    end = absorbing_when(toy.shallow(3), AdditiveBias(GeometricSteps(0.2, 0.9)))
    assert not end.absorbing[:4].any()
    assert end.harm_limit[0] == pytest.approx(
        trace(toy.shallow(3), AdditiveBias(GeometricSteps(0.2, 0.9)), [500]).at_start.value[0]
    )
    assert 0 < end.harm_limit[0] < end.harm_before[0]


def test_what_is_refused():
    chain, flow = toy.leak(), CrossEntropyFlow(3)
    faults = [
        lambda: ConstantSteps(-1.0),
        lambda: GeometricSteps(1.0, 1.0),
        lambda: GivenSteps((0.1, math.nan)),
        lambda: ConvexMix(ConstantSteps(1.5)),
        lambda: ConvexMix(GivenSteps((0.1, 2.0))),
        lambda: AdditiveBias(ConstantSteps(1.0), -1.0),
        lambda: CrossEntropyFlow(1),
        lambda: CrossEntropyFlow(3, 0.0),
        lambda: residual_after(AdditiveBias(ConstantSteps(1.0)), 1.2, 3),
        lambda: residual_after(AdditiveBias(ConstantSteps(1.0)), 0.2, -3),
        lambda: residual_after(AdditiveBias(ConstantSteps(1.0)), 0.2, 1.5),
        lambda: residual_after(BiasMatrix(ConstantSteps(1.0), np.eye(4)), 0.2, 1),
        lambda: steps_to(AdditiveBias(ConstantSteps(1.0)), 0.2, 1.5),
        lambda: updated(chain, BiasMatrix(ConstantSteps(1.0), np.eye(3)), 1),
        lambda: updated(chain, BiasMatrix(ConstantSteps(1.0), -np.eye(4)), 1),
        lambda: updated(chain, BiasMatrix(ConstantSteps(1.0), [np.eye(4)] * 2), 1),
        lambda: updated(chain, AdditiveBias(ConstantSteps(1.0), 0.5, 0.5), 1),
        lambda: updated(np.eye(2), AdditiveBias(ConstantSteps(1.0)), 1),
        lambda: updated(np.ones((2, 2)), BiasMatrix(ConstantSteps(1.0), np.eye(2)), 1),
        lambda: updated(chain, flow, math.inf),
        lambda: updated(chain, flow, 1, to=[1, 3]),
        lambda: absorbing_when(chain, flow),
        lambda: trace(chain, flow, [1, math.inf]),
        lambda: cross_entropy_path([0.0, 1.0], 0, [1.0]),
        lambda: cross_entropy_path([0.5, 0.5], 0, [2.0, 1.0]),
    ]
    for fault in faults:
        with pytest.raises(ms.InputError):
            fault()


# --- the fine-tuning attack ---

STEPS, RATES = [0, 2, 4, 6], [0.015, 0.224, 0.764, 0.879]  # 2406.05946, Llama-2-7B-Chat, harmful examples


def test_attack_curve_of_2406_05946():
    curve = fit_attack_curve(STEPS, RATES, 0.889, n=330, ceilings=[0.885, 0.95])
    assert round(curve.slope.value, 3) == 1.426
    assert round(curve.intercept.value, 3) == -3.995
    assert np.round(100 * curve.fitted, 1).tolist() == [1.6, 21.5, 75.3, 88.0]
    assert round(100 * curve.error, 1) == 1.1
    (low, *_, low_error), (high, *_, high_error) = curve.sensitivity
    assert (low, round(100 * low_error, 1)) == (0.885, 0.8)
    assert (high, round(100 * high_error)) == (0.95, 11)
    assert curve.slope.lower < 1.127 < curve.slope.upper  # what the other ceiling says lies within the interval
    assert curve.harm(2) == pytest.approx(curve.fitted[1])
    assert curve.steps_to(curve.harm(3.3))[0] == pytest.approx(3.3)
    assert "impossible" in curve.steps_to(0.9)[1]
    assert "ceiling 0.95" in str(curve)


def test_attack_curve_of_its_own_data_and_its_intervals():
    n, x = 330, np.array([0, 1, 2, 3, 4, 6])
    truth = 0.9 / (1 + np.exp(-(1.2 * x - 3)))
    exact = fit_attack_curve(x, truth, 0.9)
    assert exact.slope.value == pytest.approx(1.2, rel=1e-10)
    assert exact.slope.upper - exact.slope.lower < 1e-9
    assert exact.slope.reasons["sampling"] is None
    rng, held = np.random.default_rng(0), 0
    for _ in range(400):
        rates = rng.binomial(n, truth) / n
        if ((rates > 0) & (rates < 0.9)).all():
            curve = fit_attack_curve(x, rates, 0.9, n=n)
            held += curve.slope.lower <= 1.2 <= curve.slope.upper
        else:
            held += 1
    # The two widths overlap, so the interval holds at least its level: P(Bin(400, .95) < 350) < 1e-9.
    assert held >= 350


def test_attack_curve_refuses():
    for steps, rates, ceiling in (
        ([0, 2], [0.1, 0.2], 0.9),
        ([0, 2, 4], [0.1, 0.2], 0.9),
        ([0, 2, 4], [0.1, 0.2, 0.95], 0.9),
        ([0, 2, 4], [0.0, 0.2, 0.5], 0.9),
        ([0, 2, 4], [0.1, 0.2, 0.5], 1.1),
        ([0, 2, 2], [0.1, 0.2, 0.5], 0.9),
    ):
        with pytest.raises(ms.InputError):
            fit_attack_curve(steps, rates, ceiling)
    with pytest.raises(ms.InputError):
        fit_attack_curve(STEPS, RATES, 0.889, n=0)
    falling = fit_attack_curve(STEPS, RATES[::-1], 0.9)
    assert "does not rise" in falling.steps_to(0.5)[1]
