"""Best-of-N attackers and the exchange of width for depth."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import betaln
from scipy.stats import betabinom, chi2

import markovsafety as ms
from markovsafety.depth import (
    Profile,
    anchored,
    best_of_n,
    cheapest,
    ensemble_harm,
    fit_best_of_n,
    hyperbola,
    iso_widths,
    needed_width,
    worth_in_tokens,
)

quick = settings(deadline=None, derandomize=True, max_examples=60)
shape = st.floats(0.05, 20)

# --- best of N ---


def test_golden_forms():
    failures = [1 - best_of_n(0.3, 4, 20, form) for form in ("exact", "asymptotic", "corrected")]
    assert [round(x, 6) for x in failures] == [0.571342, 0.600821, 0.571353]


@quick
@given(shape, shape, st.integers(1, 200))
def test_exact_law(a, b, n):
    assert best_of_n(a, b, n) == pytest.approx(-np.expm1(betaln(a, b + n) - betaln(a, b)), rel=1e-9)
    # The other side of the same ensemble: no refusal at all among "harmful" ones.
    mean, icc = a / (a + b), 1 / (a + b + 1)
    assert 1 - best_of_n(a, b, n) == pytest.approx(ensemble_harm(b / (a + b), n, icc), rel=1e-9, abs=1e-12)
    assert mean * (1 - 1e-12) <= best_of_n(a, b, n) <= 1 - (1 - mean) ** n + 1e-12


@quick
@given(st.floats(0.1, 2), st.floats(0.3, 6))
def test_approximations_get_better(a, b):
    n = np.array([10_000, 100_000])
    left = 1 - best_of_n(a, b, n)
    for form, order in (("asymptotic", 1), ("corrected", 2)):
        off = np.abs((1 - best_of_n(a, b, n, form)) / left - 1)
        # The first neglected term is of that order in 1 / N; below it is rounding.
        assert (off <= 1e-9 + (40.0 / n) ** order * 10).all()
    # At the next order the corrected form is exact for one and two factors, so it never does worse than the plain one.
    assert abs((1 - best_of_n(a, b, 50, "corrected")) / (1 - best_of_n(a, b, 50)) - 1) < 0.01


def test_anchored():
    exact = best_of_n(0.4, 2.0, [200, 20_000])
    assert 1 - anchored(exact[0], 200, 20_000, 0.4) == pytest.approx(1 - exact[1], rel=0.005)
    assert anchored(0.3, 10, 10, 0.5) == pytest.approx(0.3)


def test_fit_is_the_maximum():
    rng = np.random.default_rng(2)
    n = rng.integers(5, 30, 150)
    x = rng.binomial(n, rng.beta(0.5, 2.0, 150))
    f = fit_best_of_n(x, n)
    logl = lambda a, b: betabinom.logpmf(x, n, a, b).sum()  # noqa: E731
    top = logl(f.alpha.value, f.beta.value)
    for da, db in ((1.01, 1), (0.99, 1), (1, 1.01), (1, 0.99), (1.01, 1.01), (0.99, 0.99), (1.01, 0.99)):
        assert logl(f.alpha.value * da, f.beta.value * db) < top
    assert f.mean.value == pytest.approx(f.alpha.value / (f.alpha.value + f.beta.value))
    assert f.icc.value == pytest.approx(1 / (f.alpha.value + f.beta.value + 1))
    assert abs(f.info["gap"]) < 0.02
    assert not f.info["open"]
    assert "alpha" in str(f)
    # The profile interval of alpha, found by maximising over beta at its ends.
    for end in (f.alpha.lower, f.alpha.upper):
        best = max(logl(end, b) for b in f.beta.value * np.geomspace(0.3, 3, 4000))
        assert top - best == pytest.approx(chi2.ppf(0.95, 1) / 2, abs=0.01)  # rays are two degrees apart


def test_extrapolation_covers():
    """ASR at 1000 tries from 15 tries of each of 80 prompts. A 95 % interval: more than 11 misses of 30 have
    probability < 1e-8."""
    rng, misses, wrong = np.random.default_rng(5), 0, 0
    truth = best_of_n(0.4, 3.0, 1000)
    for _ in range(30):
        b = fit_best_of_n(rng.binomial(15, rng.beta(0.4, 3.0, 80)), np.full(80, 15)).asr(1000)
        misses += not b.lower <= truth <= b.upper
        wrong += b.upper >= 1 - (1 - 0.4 / 3.4) ** 1000  # independent tries would always succeed
    assert misses <= 11
    assert wrong < 6


def test_what_data_cannot_support():
    for x, n, why in (
        ([0, 0, 0], [5, 5, 5], "no harm"),
        ([5, 5], [5, 5], "but harm"),
        ([1, 0, 1], [1, 1, 1], "one rollout per prompt"),
        ([3, 2, 2, 3], [5, 5, 5, 5], "do not differ"),
        ([2], [5], "two prompts"),
        ([], [], "two prompts"),
    ):
        f = fit_best_of_n(x, n)
        assert why in f.why
        assert why in str(f)
        b = f.asr([1, 10, 1000])
        assert np.isnan(b.value).all()
        assert b.lower == pytest.approx([f.mean.lower] * 3)  # any law: no less than one try
        assert b.upper == pytest.approx(1 - (1 - f.mean.upper) ** np.array([1, 10, 1000]))  # no more than independent
        assert why in b.info["why"]


def test_attacker_refuses():
    for call in (
        lambda: best_of_n(0.0, 1, 5),
        lambda: best_of_n(1, np.inf, 5),
        lambda: best_of_n(1, 1, 0),
        lambda: best_of_n(1, 1, 5, "guess"),
        lambda: anchored(0.3, 10, 5, 1),
        lambda: anchored(1.3, 10, 50, 1),
        lambda: fit_best_of_n([1.5, 1], [2, 2]),
        lambda: fit_best_of_n([3], [2]),
        lambda: fit_best_of_n([1, 2], [3, 3], level=1.5),
    ):
        with pytest.raises(ms.InputError):
            call()


# --- depth for width ---


def test_golden_exchange():
    free = Profile(0.8, 0.2, 0.0, 0.3)
    assert iso_widths(free, 1e-6, [0, 1, 2, 5, 10, 20, 40]).tolist() == [62, 24, 15, 7, 4, 2, 1]
    h = hyperbola(0.8, 0.7, 1e-6)
    m, d = h.optimum(1, 3)
    assert (round(m, 2), round(d, 2)) == (3.59, 10.15)
    best = cheapest(free, 1e-6, 1, 3)
    assert (best.width, best.depth, best.cost) == (3, 13, 22)
    assert best.possible
    assert "width 3, depth 13" in str(best)


@quick
@given(st.floats(0.1, 1), st.floats(0.1, 0.95), st.floats(-9, -1))
def test_hyperbola_is_where_harm_is_the_budget(f0, c, power):
    eps = 10.0**power
    h = hyperbola(f0, c, eps)
    for d in (0, 1, 7.5):
        m = h.C / (d + h.d0) if d + h.d0 > 0 else np.inf
        if 1 <= m < 1e6:
            assert h.width(d) == pytest.approx(m)
            assert m * (np.log(f0) + d * np.log(c)) == pytest.approx(np.log(eps), rel=1e-9)
    d = h.depth([1, 2, 4])
    assert (np.diff(d) <= 0).all()
    for prices in ((1.0, 3.0), (5.0, 0.2)):
        m, d = h.optimum(*prices)
        cost = prices[0] * d + prices[1] * m
        for other in np.linspace(0, h.C, 50):
            assert cost <= prices[0] * other + prices[1] * h.width(other) + 1e-9


@settings(deadline=None, derandomize=True, max_examples=20)
@given(st.floats(0.5, 5), st.floats(0.5, 5), st.sampled_from([0.0, 0.2]), st.sampled_from(["any-refusal", "majority"]))
def test_cheapest_by_trying_all(a, b, rho, rule):
    p = Profile(0.08, 0.02, 0.002, 0.3)
    best = cheapest(p, 0.02, a, b, rho, rule)
    depth, width = np.meshgrid(np.arange(60), np.arange(1, 60), indexing="ij")
    good = ensemble_harm(p.harm(depth).value, width, rho, rule) <= 0.02 * (1 + 1e-12)
    cost = np.where(good, a * depth + b * width, np.inf)
    assert best.cost == pytest.approx(cost.min())
    assert best.harm <= 0.02 * (1 + 1e-12)


def test_floors_and_correlation_break_the_exchange():
    p = Profile(0.8, 0.2, 0.01, 0.3)
    floor = p.floor().value
    assert iso_widths(p, 1e-6, 500) == needed_width(floor, 1e-6)  # no depth gets below this width
    never = cheapest(p, 1e-3, 1, 3, 0.2, "majority")
    assert not never.possible
    assert "floor" in str(never)
    assert "never exactly zero" in cheapest(Profile(0.8, 0.2, 0.0, 0.3), 0.0, 1, 1).reason
    # Correlated answers are worth a fixed number of tokens, however deep; independent ones ever more.
    free = Profile(0.8, 0.2, 0.0, 0.3)
    for m in (2, 4, 16):
        worth = worth_in_tokens(m, 0.7, 0.1)
        gain = [
            np.log(free.harm(d).value / ensemble_harm(free.harm(d).value, m, 0.1)) / -np.log(0.7) for d in (5, 20, 60)
        ]
        assert gain[0] < gain[1] < gain[2] <= worth * (1 + 1e-9)
        assert gain[2] == pytest.approx(worth, rel=1e-6)
    assert worth_in_tokens([1, 3], 0.7, 1.0).tolist() == [0, 0]


def test_intervals_cost_width():
    p = Profile(0.8, 0.2, 0.0, 0.3, intervals={"r1": (0.2, 0.4)}, level=0.95)
    upper, value = iso_widths(p, 1e-4, [5, 10]), iso_widths(p, 1e-4, [5, 10], side="value")
    assert (upper >= value).all()
    assert upper.sum() > value.sum()
    assert (iso_widths(p, 1e-4, [5, 10], prefill=3) >= upper).all()


def test_exchange_refuses():
    p = Profile(0.8, 0.2, 0.0, 0.3)
    for call in (
        lambda: hyperbola(0.8, 0.7, 0.0),
        lambda: hyperbola(0.8, 1.0, 0.1),
        lambda: hyperbola(0.0, 0.5, 0.1),
        lambda: hyperbola(0.8, 0.7, 1e-6).optimum(0, 1),
        lambda: cheapest(p, 0.1, 1, -1),
        lambda: cheapest(p, 1.1, 1, 1),
        lambda: iso_widths(p, 0.1, 1, side="middle"),
        lambda: worth_in_tokens(3, 0.7, 0.0),
        lambda: worth_in_tokens(0, 0.7, 0.1),
    ):
        with pytest.raises(ms.InputError):
            call()
