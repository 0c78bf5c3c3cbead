"""Laws of the attack, means over them, and optimal depths."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import markovsafety as ms
from markovsafety.depth import AttackLaw, Profile

quick = settings(deadline=None, derandomize=True, max_examples=50)
KNOWN = Profile(0.08, 0.02, 0.01, 0.3)
weights = st.dictionaries(st.integers(0, 12), st.integers(0, 9), min_size=1, max_size=5).filter(
    lambda w: sum(w.values()) > 0
)


def laws():
    whole = weights.map(AttackLaw.of)
    tails = st.integers(1, 20).map(lambda p: AttackLaw.geometric(p / 20))
    mixed = st.tuples(st.lists(st.integers(0, 5), min_size=1, max_size=4), st.integers(1, 9), st.integers(1, 10)).map(
        lambda x: AttackLaw(np.array(x[0]) / (sum(x[0]) + x[1]), x[1] / (sum(x[0]) + x[1]), x[2] / 10)
    )
    return st.one_of(whole, tails, mixed, st.integers(0, 15).map(AttackLaw.fixed))


@quick
@given(laws())
def test_a_law_is_a_law(law):
    k = np.arange(2000)
    p = law.probability(k)
    assert (p >= 0).all()
    assert p.sum() + law.survival(2000) == pytest.approx(1, abs=1e-12)
    assert law.survival(k[:60]) == pytest.approx([p[i:].sum() + law.survival(2000) for i in range(60)], abs=1e-12)
    assert law.mean == pytest.approx(p @ k, rel=1e-9, abs=1e-9)
    assert law.survival(0) == pytest.approx(1, abs=1e-12)
    assert law.probability(3).shape == ()


def test_a_geometric_law_keeps_its_digits_far_out():
    law = AttackLaw.geometric(0.1)
    assert law.survival(1000) == pytest.approx(0.9**1000, rel=1e-10)
    assert law.probability(1000) == pytest.approx(0.1 * 0.9**1000, rel=1e-10)
    assert law.mean == pytest.approx(9)
    assert AttackLaw.geometric(1).probability([0, 1]).tolist() == [1, 0]


@quick
@given(laws(), st.integers(0, 20), st.integers(0, 40))
def test_discount_is_the_mean(law, c, d):
    k = np.arange(d)
    expected = law.probability(k) @ (c / 20) ** (d - k).astype(float)
    assert law.discount(c / 20, d)[d] == pytest.approx(expected, abs=1e-14)
    exact = law.exact_discount(Fraction(c / 20), [d])[0]
    assert float(exact) == pytest.approx(expected, abs=1e-14)
    assert float(law.exact_survival([d])[0]) == pytest.approx(float(law.survival(d)), abs=1e-13)


@quick
@given(laws(), st.integers(0, 30))
def test_mean_of_a_profile_over_an_attack(law, d):
    bound = law.average(lambda k: KNOWN.harm(d, k).value)
    value = KNOWN.harm(d, attack=law).value
    assert bound.lower - 1e-13 <= value <= bound.upper + 1e-13
    assert bound.upper - bound.lower <= 2e-15 + 1e-15
    assert value >= KNOWN.harm(d).value - 1e-15  # an attack never helps
    shifted = law.average(lambda k: KNOWN.harm(d, k + 4).value)
    assert KNOWN.harm(d, 4, attack=law).value == pytest.approx(shifted.value, abs=1e-13)


def test_what_remains_of_an_average_is_bounded():
    law = AttackLaw.geometric(0.5)
    bound = law.average(np.array([[0.1, 0.4], [0.3, 0.6]]))
    left = 0.25
    assert bound.value == pytest.approx([0.05 + 0.075 + left * 0.3, 0.2 + 0.15 + left * 0.6])
    assert bound.lower == pytest.approx([0.125, 0.35])
    assert bound.upper == pytest.approx([0.375, 0.6])
    assert bound.info["remaining"] == left
    assert bound.reasons["truncation"] == pytest.approx(left / 2)
    assert AttackLaw.fixed(2).average([0.1, 0.2, 0.7]).value == 0.7
    slow = AttackLaw.geometric(1e-9).average(lambda k: np.full(len(k), 0.5))  # too long to sum, and it says so
    assert slow.upper - slow.lower > 0.9


@pytest.mark.parametrize(
    "make",
    [
        lambda: AttackLaw([0.5, 0.4]),
        lambda: AttackLaw([0.5, -0.5], 1.0),
        lambda: AttackLaw([0.5], 0.5, 0.0),
        lambda: AttackLaw([[1.0]]),
        lambda: AttackLaw.of({}),
        lambda: AttackLaw.of({0: 0}),
        lambda: AttackLaw.of({-1: 1}),
        lambda: AttackLaw.of({0: float("nan")}),
        lambda: AttackLaw.fixed(-1),
        lambda: AttackLaw.geometric(0),
        lambda: AttackLaw.geometric(1.5),
        lambda: AttackLaw.fixed(1).average([2.0]),
        lambda: AttackLaw.fixed(1).average(lambda k: 0.5),
        lambda: KNOWN.optimal_depth(-1),
        lambda: KNOWN.optimal_depth(float("nan")),
    ],
)
def test_what_is_no_law_is_refused(make):
    with pytest.raises(ms.InputError):
        make()


# --- optimal depth ---


def test_price_optimum_of_the_known_profile():
    found = KNOWN.optimal_depth(1e-3)
    assert found.depth == 15
    assert round(found.continuous, 2) == 15.23
    assert found.cost == pytest.approx(found.harm + 0.015, abs=1e-15)
    assert KNOWN.optimal_depth(1e-3, prefill=4).depth == 19
    assert KNOWN.optimal_depth(1e-3, prefill=4).continuous == pytest.approx(19.232, abs=1e-3)
    assert KNOWN.optimal_depth(0.5).depth == 0
    assert KNOWN.optimal_depth(0.5).continuous is None
    assert KNOWN.optimal_depth(0.1, prefill=50).depth == 0  # too expensive to go beyond the attack at all
    assert found.to_json()["depth"] == 15


def test_far_optima_are_found():
    slow = Profile(0.08, 0.02, 0.0001, 0.004)
    found = slow.optimal_depth(1e-8)
    assert found.depth > 2000
    assert abs(found.depth - found.continuous) < 1
    late = KNOWN.optimal_depth(1e-4, attack=AttackLaw.of({0: 1, 900: 9}))
    assert 900 < late.depth < 930


hazard = st.integers(0, 30)


@quick
@given(st.tuples(hazard, hazard, hazard, hazard), st.integers(1, 60), st.one_of(st.none(), laws()))
def test_optimal_depth_is_the_least_cost(parts, price, law):
    p = Profile(*(x / 60 for x in parts))
    found = p.optimal_depth(price / 600, attack=law)
    d = np.arange(601)
    cost = p.harm(d, attack=law).value + d * price / 600
    assert found.depth is not None
    assert found.cost == pytest.approx(cost.min(), abs=1e-13)
    assert cost[found.depth] == pytest.approx(cost.min(), abs=1e-13)
    if law is None and found.continuous is not None and found.depth > 0:
        assert abs(found.depth - found.continuous) < 1


def test_rounding_the_formula_is_not_enough():
    # Some price for which the nearer whole number is not the best one.
    wrong = [
        price
        for price in np.geomspace(1e-4, 0.1, 400)
        if (x := Profile(0.08, 0.02, 0.01, 0.6).optimal_depth(price)).continuous and round(x.continuous) != x.depth
    ]
    assert wrong


def test_without_a_price_more_is_always_as_good():
    found = KNOWN.optimal_depth()
    assert found.depth is None
    assert "at least as good" in found.reason
    assert found.harm == pytest.approx(1 / 31)
    assert "not lower" in Profile(0.1, 0.1, 0.2, 0.2).optimal_depth().reason
    assert Profile(0.1, 0.1, 0.3, 0.7).optimal_depth(prefill=3).depth == 4
    assert Profile(0.1, 0.1, 0.3, 0.7).optimal_depth(attack=AttackLaw.of({1: 1, 5: 2})).depth == 6
    assert Profile(0.1, 0.1, 0.3, 0.7).optimal_depth(attack=AttackLaw.geometric(0.5)).depth is None


def test_ties_are_decided_exactly():
    # c1 = 1/2, f1 = 0, f0 = 1: cost 2^-d + d / 2^n is the same at d = n - 1 and n; the smaller is taken.
    p = Profile(0.5, 0.0, 0.0, 0.5)
    for n in range(1, 30):
        assert p.optimal_depth(2.0**-n).depth == n - 1
