"""Rules and unlike members: what lets harm through, by enumeration of all answers."""

from __future__ import annotations

from fractions import Fraction
from itertools import product
from math import comb

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

import markovsafety as ms
from markovsafety.depth import (
    chernoff,
    ensemble_harm,
    hoeffding,
    least_correlation,
    members_harm,
    members_over_refusal,
    over_refusal,
    pair_limits,
    paired_range,
    poisson_binomial,
    token_average,
    unassumed_harm,
    unbiased_failure,
)
from markovsafety.depth.rules import harmful_needed, refusals_needed

quick = settings(deadline=None, derandomize=True, max_examples=60)
probability = st.integers(0, 20).map(lambda k: k / 20)
members = st.lists(probability, min_size=1, max_size=6)


def gets_through(rule: str, harmful: tuple[int, ...]) -> bool:
    """The rules in words."""
    m, h = len(harmful), sum(harmful)
    if rule == "majority":
        return 2 * h > m
    return m - h < (1 if rule == "any-refusal" else int(rule[0]))


def by_enumeration(q: list[float], rule: str) -> float:
    law = [
        (answer, np.prod([x if a else 1 - x for x, a in zip(q, answer)])) for answer in product((0, 1), repeat=len(q))
    ]
    return float(sum(w for answer, w in law if gets_through(rule, answer)))


def test_rules_count_refusals():
    assert refusals_needed("any-refusal", [1, 2, 9]).tolist() == [1, 1, 1]
    assert refusals_needed("majority", [1, 2, 3, 4, 5]).tolist() == [1, 1, 2, 2, 3]
    assert refusals_needed("3-refusals", [3, 7]).tolist() == [3, 3]
    assert harmful_needed("majority", [1, 2, 3, 4, 5]).tolist() == [1, 2, 2, 3, 3]
    assert ensemble_harm(0.3, 5, 0.2, "1-refusal") == ensemble_harm(0.3, 5, 0.2)
    with pytest.raises(ms.InputError, match="Leave out widths below 3"):
        ensemble_harm(0.1, [2, 4], rule="3-refusals")


@quick
@given(members, st.sampled_from(["any-refusal", "majority", "2-refusals", "3-refusals"]))
def test_members_by_enumeration(q, rule):
    if rule[0].isdigit() and len(q) < int(rule[0]):
        return
    assert members_harm(q, rule) == pytest.approx(by_enumeration(q, rule), abs=1e-12)
    k = int(refusals_needed(rule, len(q)))
    law = poisson_binomial(q)
    assert law.sum() == pytest.approx(1, abs=1e-12)
    assert members_over_refusal(q, rule) == pytest.approx(float(law[k:].sum()), abs=1e-12)
    equal = [q[0]] * len(q)
    assert members_harm(equal, rule) == pytest.approx(ensemble_harm(q[0], len(q), 0.0, rule), abs=1e-12)


def test_members_keep_small_digits():
    q = np.array([1e-30, 1e-40, 0.5, 1e-20])
    exact = Fraction(0)
    parts = [Fraction(float(x)) for x in q]
    for answer in product((0, 1), repeat=4):
        if 2 * sum(answer) > 4:
            weight = Fraction(1)
            for x, a in zip(parts, answer):
                weight *= x if a else 1 - x
            exact += weight
    assert members_harm(q, "majority") == pytest.approx(float(exact), rel=1e-13)
    many = np.full((3, 40), 0.2)  # leading axes are cells
    assert members_harm(many, "majority") == pytest.approx([ensemble_harm(0.2, 40, 0.0, "majority")] * 3, rel=1e-12)


def test_golden_table_of_nine():
    # k of 9 at q = .2 and nu = .02: two or three refusals are the sensible rules.
    found = [
        (k, ensemble_harm(0.2, 9, 0.0, f"{k}-refusals"), over_refusal(0.02, 9, f"{k}-refusals")) for k in (1, 2, 3, 5)
    ]
    printed = [(1, 5.1e-7, 0.166), (2, 1.9e-5, 0.013), (3, 3.1e-4, 6.1e-4), (5, 0.0196, 0.0)]
    for (k, harm, refused), (_, h, r) in zip(found, printed):
        assert float(f"{harm:.3g}" if k == 5 else f"{harm:.2g}") == h
        assert refused == pytest.approx(r, abs=5e-4 if k == 1 else 5e-6 if k == 3 else 5e-4)
    assert over_refusal(0.02, 9, "5-refusals") < 1e-6


def test_golden_bounds():
    assert round(ensemble_harm(0.2, 11, 0.0, "majority"), 5) == 0.01165
    assert round(chernoff(0.2, 11), 4) == 0.0859
    assert round(hoeffding(0.2, 11), 3) == 0.138
    assert float(f"{ensemble_harm(0.2, 11):.1e}") == 2.0e-8


@quick
@given(probability, st.integers(2, 30), st.sampled_from(["any-refusal", "majority", "2-refusals"]))
def test_bounds_bound(q, m, rule):
    exact = ensemble_harm(q, m, 0.0, rule)
    assert exact <= chernoff(q, m, rule) * (1 + 1e-12)
    assert chernoff(q, m, rule) <= hoeffding(q, m, rule) * (1 + 1e-12)
    if rule == "majority" and q < 0.5:
        assert chernoff(q, m) == pytest.approx((4 * q * (1 - q)) ** (m / 2), rel=1e-12)


def test_majority_amplifies_what_is_likely():
    assert np.all(np.diff(ensemble_harm(0.57, [1, 3, 11, 51], 0.0, "majority")) > 0)
    assert ensemble_harm(0.57, 2001, 0.0, "majority") > 0.999


def joint_ends(q: list[float], rule: str) -> list[float]:
    """Least and most over all joint laws, by a linear programme with an unknown for every pattern of answers."""
    patterns = list(product((0, 1), repeat=len(q)))
    rows = [[1.0] * len(patterns), *([float(p[i]) for p in patterns] for i in range(len(q)))]
    goal = np.array([float(gets_through(rule, p)) for p in patterns])
    ends = []
    for sign in (1, -1):
        found = linprog(sign * goal, A_eq=rows, b_eq=[1.0, *q], bounds=(0, 1), method="highs")
        assert found.status == 0
        ends.append(sign * found.fun)
    return ends


@settings(deadline=None, derandomize=True, max_examples=25)
@given(st.lists(probability, min_size=2, max_size=5), st.sampled_from(["any-refusal", "majority", "2-refusals"]))
def test_nothing_assumed_is_sharp(q, rule):
    b = unassumed_harm(q, rule)
    low, high = joint_ends(q, rule)
    assert (b.lower, b.upper) == (pytest.approx(low, abs=1e-9), pytest.approx(high, abs=1e-9))
    assert b.level == 1
    assert b.value == pytest.approx(members_harm(q, rule))


def test_frechet():
    b = unassumed_harm([[0.9, 0.8, 0.6], [0.1, 0.2, 0.3]])
    assert b.lower == pytest.approx([0.3, 0.0])
    assert b.upper == pytest.approx([0.6, 0.1])


@settings(deadline=None, derandomize=True, max_examples=25)
@given(st.integers(1, 9).map(lambda k: k / 10), st.integers(2, 12), st.floats(0.02, 0.9))
def test_pair_correlation_leaves_a_range_that_holds_every_model(q, m, rho):
    for rule in ("any-refusal", "majority"):
        b = paired_range(q, m, rho, rule)
        for model in ("beta-binomial", "copula", "common-shock"):
            assert b.lower - 1e-8 <= ensemble_harm(q, m, rho, rule, model) <= b.upper + 1e-8
    if m == 2:
        assert b.upper == pytest.approx(q * q + rho * q * (1 - q), abs=1e-8)


def test_impossible_correlations():
    assert least_correlation(0.5, 2) == pytest.approx(-1)
    assert least_correlation(0.5, 4) == pytest.approx(-1 / 3)
    assert least_correlation([0.2, 0.0], 2).tolist() == pytest.approx([-0.25, 0.0])  # never both: -q / (1 - q)
    low, high = pair_limits(0.2, 0.6)
    assert low == pytest.approx(-0.12 / np.sqrt(0.16 * 0.24))
    assert high == pytest.approx(0.08 / np.sqrt(0.16 * 0.24))
    assert pair_limits(0.2, 0.2)[1] == pytest.approx(1)
    assert pair_limits(0.0, 0.4) == (0.0, 0.0)
    at_least = paired_range(0.2, 2, -0.25)
    assert at_least.upper == pytest.approx(0, abs=1e-9)
    for call in (
        lambda: paired_range(0.2, 2, -0.26),
        lambda: paired_range(0.2, 2, 1.01),
        lambda: paired_range(0.2, 201, 0.1),
        lambda: ensemble_harm(0.2, 3, -0.1),
        lambda: over_refusal(0.2, 3, icc=-0.1),
        lambda: members_harm([]),
        lambda: members_harm(0.3),
        lambda: members_harm([0.3, 1.2]),
        lambda: members_over_refusal([]),
        lambda: token_average([0.7], [0.4]),
        lambda: token_average([], []),
    ):
        with pytest.raises(ms.InputError):
            call()
    with pytest.raises(ms.InputError, match="never correlate negatively"):
        ensemble_harm(0.5, 4, -0.2)


def test_token_average_is_neither_product_nor_mean():
    a, r = np.array([0.05, 0.05, 0.0]), np.array([0.01, 0.01, 0.5])
    h = a / (a + r)
    found = token_average(a, r)
    assert found == pytest.approx(0.1 / 0.62)
    assert abs(found - h.prod()) > 0.1
    assert abs(found - h.mean()) > 0.3
    # The chain with the averaged rows says the same.
    rows = np.zeros((3, 3))
    rows[0] = [1 - a.mean() - r.mean(), a.mean(), r.mean()]
    rows[1, 1] = rows[2, 2] = 1
    chain = ms.Chain(rows, outcomes={"harm": 1, "refusal": 2}, start=0)
    assert ms.hitting_probability(chain, "harm").at_start.value == pytest.approx(found, rel=1e-12)
    assert token_average([0.0, 0.0], [0.0, 0.0]) == 0
    assert token_average(np.stack([a, a]), r).shape == (2,)


@pytest.mark.parametrize("rule", ["any-refusal", "majority", "2-refusals"])
def test_failure_estimate_is_unbiased(rule):
    for n in (2, 5, 9):
        for m in range(2, n + 1):
            estimate = unbiased_failure(range(n + 1), n, m, rule)
            mean = sum(comb(n, x) * 0.37**x * 0.63 ** (n - x) * estimate[x] for x in range(n + 1))
            assert mean == pytest.approx(ensemble_harm(0.37, m, 0.0, rule), rel=1e-12)
    assert unbiased_failure([0, 9], 9, 4, rule).tolist() == pytest.approx([0, 1])
