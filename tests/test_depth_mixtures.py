"""Alike answers: tails against exact arithmetic and quadrature of mpmath, limits, prices, and how wide is enough."""

from __future__ import annotations

from fractions import Fraction
from math import comb

import mpmath as mp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import multivariate_normal, norm

import markovsafety as ms
from markovsafety.depth import (
    ensemble_floor,
    ensemble_harm,
    latent_correlation,
    measured_width,
    needed_width,
    over_refusal,
    why_no_width,
)
from markovsafety.depth.mixtures import MODELS, at_least, log_moment

quick = settings(deadline=None, derandomize=True, max_examples=60)
twelfth = st.integers(1, 11).map(lambda k: Fraction(k, 12))


def exact_tail(p: Fraction, rho: Fraction, m: int, t: int) -> Fraction:
    """Beta-binomial in rationals."""
    total = Fraction(0)
    for j in range(t, m + 1):
        term = Fraction(comb(m, j))
        for i in range(m):
            top = p * (1 - rho) + i * rho if i < j else (1 - p) * (1 - rho) + (i - j) * rho
            term *= top / ((1 - rho) + i * rho)
        total += term
    return total


@quick
@given(twelfth, twelfth, st.integers(2, 30), st.data())
def test_beta_tails_in_rationals(p, rho, m, data):
    t = data.draw(st.integers(1, m))
    assert float(at_least(float(p), float(rho), m, t)) == pytest.approx(float(exact_tail(p, rho, m, t)), rel=1e-12)


def big_tail(p: float, rho: float, m: int, t: int) -> mp.mpf:
    with mp.workdps(60):
        s = (1 - mp.mpf(rho)) / mp.mpf(rho)
        a, b = mp.mpf(p) * s, (1 - mp.mpf(p)) * s
        term = mp.binomial(m, t) * mp.beta(a + t, b + m - t) / mp.beta(a, b)
        total = term
        for j in range(t, m):
            term *= (m - j) * (a + j) / ((j + 1) * (b + m - j - 1))
            total += term
        return total


@pytest.mark.parametrize("m", [64, 65, 200, 501])
def test_beta_tails_at_extremes(m):
    """Tiny and nearly certain probabilities, tiny and large correlations."""
    rng = np.random.default_rng(m)
    for t in {1, 2, m // 2 + 1, m - 1, m}:
        p = float(rng.choice([rng.uniform(), 10.0 ** rng.uniform(-12, -1), 1 - 10.0 ** rng.uniform(-9, -1)]))
        rho = float(rng.choice([rng.uniform(0.001, 0.95), 10.0 ** rng.uniform(-14, -2)]))
        exact = big_tail(p, rho, m, t)
        if exact > 1e-250:
            # the logarithms of tails this far out lose a digit or two
            assert float(at_least(p, rho, m, t)) == pytest.approx(float(exact), rel=1e-10)


def test_wide_beta_tails_meet_their_limit():
    """Beyond sums of 4096 terms: quadrature, against the sum at the seam, then the limit."""
    assert float(at_least(0.2, 0.3, 9001, 4501)) == pytest.approx(float(big_tail(0.2, 0.3, 9001, 4501)), rel=1e-10)
    assert float(at_least(0.2, 1e-5, 9001, 1900)) == pytest.approx(float(big_tail(0.2, 1e-5, 9001, 1900)), rel=1e-8)
    floor = ensemble_floor([0.2, 0.7], 0.3, "majority")
    assert at_least([0.2, 0.7], 0.3, 10**9 + 1, 5 * 10**8 + 1) == pytest.approx(floor, rel=1e-7)


@quick
@given(st.floats(-8, 8), st.floats(-8, 8), st.floats(-6, 9))
def test_log_moment(a, b, m):
    a, b, m = 10.0**a, 10.0**b, 10.0**m
    with mp.workdps(60):
        exact = (
            mp.loggamma(mp.mpf(a) + m) + mp.loggamma(mp.mpf(a) + b) - mp.loggamma(a) - mp.loggamma(mp.mpf(a) + b + m)
        )
    # An absolute error of a logarithm: some roundings times the smaller of m and b.
    assert abs(float(log_moment(a, b, m)) - float(exact)) <= 1e-14 * (1 + min(m, b)) * 30


def test_latent_correlation():
    assert round(latent_correlation(0.1, 0.3), 3) == 0.571
    for p, rho in ((0.1, 0.3), (0.5, 0.2), (0.8, 0.7), (0.01, 0.05)):
        r = latent_correlation(p, rho)
        c = norm.ppf(p)
        both = multivariate_normal.cdf([c, c], mean=[0, 0], cov=[[1, r], [r, 1]])
        assert (both - p * p) / (p * (1 - p)) == pytest.approx(rho, abs=1e-6)  # its cdf is good to about 1e-8
    assert latent_correlation(0.5, 1 / 3) == pytest.approx(0.5, rel=1e-12)  # arcsine law: 2 asin(r) / pi
    assert latent_correlation([0.1, 0.1, 0.0, 1.0], [0.0, 1.0, 0.4, 0.4]).tolist() == [0.0, 1.0, 0.4, 0.4]


@pytest.mark.parametrize(
    ("p", "rho", "m", "t"),
    [(0.1, 0.3, 10, 10), (0.2, 0.1, 8, 5), (0.4, 0.7, 8, 5), (0.3, 0.9, 5, 3), (0.2, 0.02, 20, 2), (0.02, 0.3, 20, 1)],
)
def test_copula_by_quadrature(p, rho, m, t):
    with mp.workdps(25):
        r, c = mp.mpf(latent_correlation(p, rho)), mp.sqrt(2) * mp.erfinv(2 * mp.mpf(p) - 1)

        def inside(z):
            x = mp.ncdf((c + mp.sqrt(r) * z) / mp.sqrt(1 - r))
            return mp.npdf(z) * mp.fsum(mp.binomial(m, j) * x**j * (1 - x) ** (m - j) for j in range(t, m + 1))

        exact = mp.quad(inside, [-12, -6, -4, -2, -1, 0, 1, 2, 4, 6, 12])
    assert float(at_least(p, rho, m, t, "copula")) == pytest.approx(float(exact), rel=1e-11)


def test_golden_tails():
    """Equal q and pair correlation, three tails; majority floors; what independence promises."""
    tails = [ensemble_harm(0.1, 10, 0.3, model=m) for m in ("beta-binomial", "copula", "common-shock")]
    assert [float(f"{x:.3g}") for x in tails[:2]] == [2.08e-3, 3.11e-3]
    assert float(f"{tails[2]:.2g}") == 3.0e-2
    floors = ensemble_floor([0.05, 0.2, 0.4], 0.3, "majority")
    assert np.round(floors, 4).tolist() == [0.0191, 0.1211, 0.3567]
    assert float(f"{ensemble_harm(0.2, 20, 0.3):.3g}") == 2.16e-3
    assert float(f"{ensemble_harm(0.2, 20):.1e}") == 1.0e-14
    rho = [0, 0.05, 0.1, 0.2, 0.3, 0.5]
    assert needed_width(0.1, 1e-4, rho).tolist() == [4, 6, 8, 16, 45, 2278]
    assert round(over_refusal(0.02, 20), 3) == 0.332


@quick
@given(st.floats(0.01, 0.99), st.floats(0, 1), st.integers(1, 12), st.sampled_from(MODELS[:3]), st.data())
def test_models_agree_where_they_must(p, rho, m, model, data):
    rule = data.draw(
        st.sampled_from(["any-refusal", "majority", "2-refusals"] if m > 1 else ["any-refusal", "majority"])
    )
    here = ensemble_harm(p, m, rho, rule, model)
    assert 0 <= here <= 1
    assert ensemble_harm(p, 1, rho, "majority", model) == p
    assert ensemble_harm(p, 2, rho, model=model) == pytest.approx(p * p + rho * p * (1 - p), rel=1e-9)  # the pair
    assert ensemble_harm(p, m, 1.0, rule, model) == pytest.approx(p)
    assert ensemble_harm(p, m, 0.0, rule, model) == pytest.approx(ensemble_harm(p, m, 0.0, rule, "independent"))
    assert here <= ensemble_harm(min(p + 0.01, 1.0), m, rho, rule, model) + 1e-12  # ends of q stay ends
    # Whatever the law: as many events as trials at least with probability p^m (Jensen), any with at most independence.
    assert at_least(p, rho, m, m, model) >= p**m * (1 - 1e-10)
    assert at_least(p, rho, m, 1, model) <= 1 - (1 - p) ** m + 1e-12


def test_price_of_width():
    """Answers that agree refuse harmless prompts less under any-refusal, more under a majority."""
    for model in MODELS[:3]:
        assert over_refusal(0.02, 20, icc=0.3, model=model) < over_refusal(0.02, 20)
        assert over_refusal(0.02, 20, "majority", 0.3, model) > over_refusal(0.02, 20, "majority")
    assert over_refusal(1e-18, 3) == pytest.approx(3e-18, rel=1e-12)
    assert over_refusal([0.0, 1.0], 3).tolist() == [0, 1]


@pytest.mark.parametrize("model", MODELS)
def test_needed_width_of_a_majority_by_trying_all(model):
    rng = np.random.default_rng(3)
    widths = np.arange(1, 300)
    for _ in range(25 if model != "copula" else 8):
        q, rho = rng.uniform(0, 0.7), 0.0 if model == "independent" else rng.choice([0.0, rng.uniform(0, 0.5)])
        eps = q * rng.uniform()
        good = np.flatnonzero(ensemble_harm(q, widths, rho, "majority", model) <= eps * (1 + 1e-12))
        found = needed_width(q, eps, rho, "majority", model)
        if len(good):
            assert found == widths[good[0]]
        else:
            assert found is None or found >= 300
            if found is None:
                assert "impossible" in why_no_width(q, eps, rho, "majority", model)


@pytest.mark.parametrize("rule", ["any-refusal", "3-refusals"])
def test_needed_width_is_the_smallest(rule):
    rng = np.random.default_rng(4)
    q, rho, eps = rng.uniform(0, 0.9, 200), rng.uniform(0, 0.4, 200), 10.0 ** rng.uniform(-4, -0.5, 200)
    m = needed_width(q, eps, rho, rule)
    on = np.isfinite(m) & (m < 1e6)
    assert on.sum() > 100
    at = m[on].astype(int)
    least = 1 if rule == "any-refusal" else 3
    assert (ensemble_harm(q[on], at, rho[on], rule) <= eps[on] * (1 + 1e-12)).all()
    more = at > least
    assert (ensemble_harm(q[on][more], at[more] - 1, rho[on][more], rule) > eps[on][more]).all()


def test_even_majorities_first_get_worse():
    """Two answers beat the floor, four do not: no width in between 4 and the limit helps."""
    h = ensemble_harm(0.2, [1, 2, 3, 4, 6, 8], 0.3, "majority")
    assert h[1] < h[3] < h[4] < h[5] < ensemble_floor(0.2, 0.3, "majority") < h[2] < h[0]
    assert needed_width(0.2, 0.09, 0.3, "majority") == 2
    widths = np.arange(1, 600)  # worse up to ten answers, then better; two are not enough
    h = ensemble_harm(0.45, widths, 0.002, "majority")
    assert h[1] < h[3] < h[7] > h[31]
    assert needed_width(0.45, 0.19, 0.002, "majority") == widths[np.flatnonzero(h <= 0.19)[0]] > 20
    assert needed_width(0.2, 0.08, 0.3, "majority") is None
    assert "two leave 0.088" in why_no_width(0.2, 0.08, 0.3, "majority")


def test_reasons():
    assert why_no_width(0.1, 1e-4) == ""
    assert "floor 0.09" in why_no_width(0.3, 0.01, 0.3, model="common-shock")
    assert "power -0.0778" in why_no_width(0.3, 1e-9, 0.9)
    assert "never harmless with certainty" in why_no_width(0.3, 0.0)
    assert "floor 0.3" in why_no_width(0.3, 0.1, 1.0)
    assert needed_width(0.0, 0.0, rule="3-refusals") == 3
    assert needed_width([], 0.1).shape == (0,)


def test_bad_input():
    for call in (
        lambda: ensemble_harm(0.2, 3, 0.1, model="guess"),
        lambda: ensemble_harm(0.2, 3, 0.1, model="independent"),
        lambda: ensemble_floor(0.2, 0.1, "majority", "independent"),
        lambda: ensemble_harm(0.2, 3, 1.1),
        lambda: ensemble_harm(np.nan, 3),
        lambda: ensemble_harm(0.2, 0),
        lambda: needed_width(0.2, -0.1),
        lambda: needed_width(0.2, 0.1, 0.1, "guess"),
    ):
        with pytest.raises(ms.InputError):
            call()


@quick
@given(st.lists(st.integers(0, 6), min_size=2, max_size=9), st.sampled_from(["majority", "2-refusals", "3-refusals"]))
def test_measured_width_of_other_rules(x, rule):
    widths = [m for m in (2, 3, 5, 6, 9) if rule == "majority" or m >= int(rule[0])]
    b = measured_width(x, [6] * len(x), widths, rule=rule)
    assert ((b.lower <= b.value) & (b.value <= b.upper) & (b.lower >= 0) & (b.upper <= 1)).all()
    assert (b.upper > 0).all()
    if rule != "majority":
        assert (np.diff(b.value) <= 1e-12).all()
        assert (np.diff(b.upper) <= 1e-12).all()


def test_measured_majority_covers():
    """Beta-distributed prompts: at most 5 % misses each; more than 18 of 60 has probability < 1e-9."""
    rng, misses = np.random.default_rng(11), np.zeros(6)
    widths = [3, 4, 5]
    truth = {r: ensemble_harm(0.25, widths, 0.5, r) for r in ("majority", "2-refusals")}
    for _ in range(60):
        x = rng.binomial(6, rng.beta(0.25, 0.75, 30))
        for i, (rule, t) in enumerate(truth.items()):
            b = measured_width(x, np.full(30, 6), widths, rule=rule)
            misses[3 * i : 3 * i + 3] += (b.lower > t) | (b.upper < t)
    assert (misses <= 18).all()
