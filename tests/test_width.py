"""What several answers are worth: rules, correlation, unbiased estimates and their intervals."""

from __future__ import annotations

from fractions import Fraction
from math import comb

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import markovsafety as ms
from markovsafety.depth import ensemble_harm, icc, measured_width, needed_width, over_refusal, unbiased_power

quick = settings(deadline=None, derandomize=True, max_examples=60)
counts = st.lists(st.integers(1, 9).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))), min_size=1, max_size=9)


def test_golden_numbers():
    rho = [0, 0.05, 0.1, 0.2, 0.3, 0.5]
    assert [needed_width(0.1, 1e-4, r) for r in rho] == [4, 6, 8, 16, 45, 2278]
    assert ensemble_harm(0.2, 20, 0.3) == pytest.approx(2.16e-3, abs=5e-6)
    assert ensemble_harm(0.2, 20) == pytest.approx(0.2**20, rel=1e-12)
    assert ensemble_harm(0.1, 10, 0.3) == pytest.approx(2.08e-3, abs=5e-6)
    assert over_refusal(0.02, 20) == pytest.approx(0.332, abs=5e-4)


@quick
@given(st.integers(0, 12), st.integers(0, 12), st.integers(1, 40))
def test_beta_binomial_in_rationals(a, b, m):
    q, rho = Fraction(a, 12), Fraction(b, 12)
    exact = Fraction(1)
    for j in range(m):
        bottom = (1 - rho) + j * rho
        exact *= (q * (1 - rho) + j * rho) / bottom if bottom else q  # icc 1: all alike
    assert ensemble_harm(float(q), m, float(rho)) == pytest.approx(float(exact), rel=1e-12, abs=1e-300)


def test_iso_safety_hyperbola():
    # Without a floor, width times depth is constant: m (d + d0) = ln(1 / eps) / ln(1 / c), here f0 = .8, c = .7.
    harm = ms.Profile(0.8, 0.2, 0.0, 0.3).harm([0, 1, 2, 5, 10, 20, 40]).value
    assert [needed_width(q, 1e-6) for q in harm] == [62, 24, 15, 7, 4, 2, 1]


def test_beta_binomial_agrees_with_scipy_far_out():
    from scipy.special import betaln

    for m in (1000, 65_536, 65_537, 3_000_000):
        a, b = 0.1 * 0.5 / 0.5, 0.9 * 0.5 / 0.5
        assert ensemble_harm(0.1, m, 0.5) == pytest.approx(np.exp(betaln(a + m, b) - betaln(a, b)), rel=1e-9)
    # A tiny correlation is nearly independence, not a cancellation of huge log-gammas.
    assert ensemble_harm(0.5, 10, 1e-14) == pytest.approx(0.5**10, rel=1e-10)


@quick
@given(st.floats(0, 1), st.floats(0, 1), st.integers(1, 60))
def test_ensemble_is_monotone(q, rho, m):
    h = ensemble_harm(q, [m, m + 1], rho)
    assert h[1] <= h[0] * (1 + 1e-12)
    assert ensemble_harm(q, m, 0.0) <= h[0] * (1 + 1e-12) <= q * (1 + 1e-12) ** 2  # independence promises the most
    assert h[0] <= ensemble_harm(min(q + 0.01, 1), m, rho) * (1 + 1e-12)


def test_needed_width_edges():
    assert needed_width(0.3, 0.3) == 1
    assert needed_width(0.0, 0.0) == 1
    assert needed_width(0.3, 0.0) is None
    assert needed_width(1.0, 0.5) is None
    assert needed_width(0.3, 0.2, icc=1.0) is None
    assert needed_width(0.3, 1e-9, icc=0.9) is None  # a tail that decays like m ** -0.08


def test_shapes_and_refusals():
    assert ensemble_harm([0.1, 0.2], [[1], [2], [3]], 0.1).shape == (3, 2)
    assert isinstance(ensemble_harm(0.1, 2), float)
    for call in (
        lambda: ensemble_harm(1.1, 2),
        lambda: ensemble_harm(0.1, 0),
        lambda: ensemble_harm(0.1, 1.5),
        lambda: ensemble_harm(0.1, 2, -0.1),
        lambda: ensemble_harm(0.1, 2, np.nan),
        lambda: needed_width(0.1, 2),
        lambda: over_refusal(0.1, 2, rule="3-refusals"),
        lambda: unbiased_power([1], [2], 3),
        lambda: unbiased_power([3], [2], 1),
        lambda: unbiased_power([0.5], [2], 1),
        lambda: measured_width([1], [2], 2, "guess"),
        lambda: measured_width([1], [2], 2, 1.5),
        lambda: measured_width([1.5, 1], [2, 2], 2),
    ):
        with pytest.raises(ms.InputError):
            call()
    for rule in ("k-of-m", "0-refusals", "2-refusal-s", ("k-of-m", 2), None):
        with pytest.raises(ms.InputError, match="any-refusal"):
            ensemble_harm(0.1, 2, rule=rule)
    assert measured_width([1.5, 1], [2, 2], 2, 0.0).shape == (
        1,
    )  # weights are fine where nothing is measured from them


@pytest.mark.parametrize("n", [1, 2, 5, 8])
def test_power_estimate_is_unbiased(n):
    p = Fraction(3, 7)
    law = [comb(n, x) * p**x * (1 - p) ** (n - x) for x in range(n + 1)]
    for m in range(1, n + 1):
        values = [Fraction(comb(x, m), comb(n, m)) for x in range(n + 1)]
        assert sum(w * v for w, v in zip(law, values)) == p**m
        assert unbiased_power(range(n + 1), n, m) == pytest.approx([float(v) for v in values], rel=1e-12)


@quick
@given(counts, st.sampled_from([None, "measured", 0.0, 0.2]))
def test_measured_harm_never_rises_with_width(rows, correlation):
    x, n = (np.array(c) for c in zip(*rows))
    b = measured_width(x, n, range(1, 13), correlation)
    for end in (b.value, b.upper):
        assert (np.diff(end) <= 1e-12).all()
    assert ((b.lower >= 0) & (b.upper <= 1)).all()
    assert (b.upper > 0).all()  # zero events never close the interval
    assert b.value[0] == pytest.approx(x.sum() / n.sum())


def test_zero_harm_leaves_room():
    b = measured_width([0] * 50, [8] * 50, [1, 4, 8, 9])
    top = 1 - 0.025 ** (1 / 50)
    assert b.value.tolist() == [0] * 4
    assert b.upper == pytest.approx([top] * 4)
    assert b.info["estimate"][1] == "unbiased"
    assert "no credit" in b.info["estimate"][3]
    assert not b.info["icc"].info["assessed"]
    assert np.isnan(b.info["icc"].value)


def test_alike_prompts_get_no_credit():
    # Ten prompts are always harmful, ten never: no number of answers helps.
    b = measured_width([6] * 10 + [0] * 10, [6] * 20, [1, 2, 6, 50])
    assert b.value == pytest.approx([0.5] * 4)
    assert b.info["icc"].value == pytest.approx(1.0)
    assert b.info["estimate"] == ["measured rate", "unbiased", "unbiased", "beta-binomial, measured ICC"]
    independent = measured_width([6] * 10 + [0] * 10, [6] * 20, [1, 2, 6, 50], 0.0)
    assert independent.upper[2] < 0.2
    assert independent.info["estimate"][1] == "independent answers"


def test_beyond_the_rollouts_the_upper_end_earns_nothing():
    b = measured_width([3, 1, 4, 0, 2], [4] * 5, [4, 40])
    assert b.value[1] < b.value[0]
    assert b.upper[1] == b.upper[0]


def test_one_prompt():
    b = measured_width([3], [10], [1, 2, 20])
    low, high = ms.bound.clopper_pearson(3, 10)
    assert b.value == pytest.approx([0.3, 3 * 2 / 90, 0.3**20])
    assert b.lower == pytest.approx([low, low**2, low**20])
    assert b.upper == pytest.approx([high] * 3)  # one prompt is one trial: how prompts differ cannot be seen
    assert "one prompt only" in b.info["note"]
    assert measured_width([3], [10], 20, 0.0).upper == pytest.approx([high**20])  # unless that is assumed
    assert "note" not in measured_width([3, 2], [10, 10], 2).info
    assert all("one prompt" in how for how in b.info["estimate"][1:])


def test_interval_of_the_unbiased_estimate():
    x, n = [3, 3, 2, 3, 3, 2], [4] * 6
    b = measured_width(x, n, [1, 2])
    low, high = ms.bound.clopper_pearson(b.value[1] * 6, 6)  # one trial per prompt
    assert b.lower[1] == pytest.approx(max(low, b.lower[0] ** 2))
    assert b.upper[1] == pytest.approx(min(high, b.upper[0]))
    assert b.lower[0] ** 2 > low  # Jensen's end is the sharper one here
    uneven = measured_width([2, 2, 6], [4, 4, 8], 2)
    size = 16**2 / (16 + 16 + 64)
    value = (4 * 1 / 6 + 4 * 1 / 6 + 8 * 15 / 28) / 16
    assert uneven.value[0] == pytest.approx(value)
    assert uneven.upper[0] <= ms.bound.clopper_pearson(value * size, size)[1]


def test_nothing_measured():
    b = measured_width([], [], [1, 2])
    assert np.isnan(b.value).all()
    assert b.lower.tolist() == [0, 0]
    assert b.upper.tolist() == [1, 1]
    assert measured_width([], [], [1, 2], 0.1).upper.tolist() == [1, 1]


def test_icc_of_known_tables():
    # Prompts with 4, 0 and 2 harms of 4: squares between prompts 4 (1/4 + 1/4 + 0) / 2, within them 1 / 9.
    x, n = np.array([4, 0, 2]), np.array([4, 4, 4])
    between, within = (4 * 0.25 + 4 * 0.25) / 2, 1.0 / 9
    assert icc(x, n).value == pytest.approx((between - within) / (between + 3 * within))
    b = icc(x, n)
    assert b.lower <= b.value <= b.upper
    assert b.info["assessed"]
    assert icc(x, n).upper == b.upper  # fixed seed
    for x, n, why in (([0, 0], [3, 3], "no harm"), ([3, 3], [3, 3], "but harm"), ([1], [3], "two prompts")):
        nothing = icc(x, n)
        assert np.isnan(nothing.value)
        assert (nothing.lower, nothing.upper) == (0, 1)
        assert why in nothing.info["why"]
    assert "one rollout" in icc([1, 0], [1, 1]).info["why"]
    # All harm at one prompt: resamples often miss it, and then say nothing; the interval must not pretend otherwise.
    lone = icc([2] + [0] * 19, [4] * 20)
    assert lone.lower == 0
    assert lone.upper == 1


def test_intervals_cover():
    """E[h^m] for beta-distributed prompts: at most 5 % misses each; more than 35 of 200 has probability < 1e-9."""
    rng, misses = np.random.default_rng(7), np.zeros(3)
    second = 0.25 * 1.25 / 2
    truth = np.array([0.25, second, second * 2.25 / 3 * 3.25 / 4])  # moments 1, 2, 4 of Beta(1/4, 3/4)
    for _ in range(200):
        x = rng.binomial(6, rng.beta(0.25, 0.75, 30))
        b = measured_width(x, np.full(30, 6), [1, 2, 4])
        misses += (b.lower > truth) | (b.upper < truth)
    assert (misses <= 35).all()


def test_icc_finds_the_planted_correlation():
    rng = np.random.default_rng(1)
    x = rng.binomial(8, rng.beta(0.5, 0.5, 3000))  # icc = 1 / (1 + 0.5 + 0.5)
    b = icc(x, np.full(3000, 8))
    # The standard error is about 0.008 here; ten of them.
    assert abs(b.value - 0.5) < 0.08
    assert b.upper - b.lower < 0.1
