"""The tests behind `check` hold their level where all assumptions hold, and speak where one is broken."""

from __future__ import annotations

import numpy as np
import pytest

from markovsafety.bench.check import equivalence
from markovsafety.bench.check_worlds import TESTS, WORLDS, outcomes_of_tests, speak
from markovsafety.evidence.prefill import misfit_of

FAIR = 100
SPOKEN = dict.fromkeys(WORLDS, 5) | {"fair": FAIR}


def spoken(world):
    """(experiments, 2): by test, whether p is below 5 %, and whether the interval excludes 0."""
    found = {}
    for r in range(SPOKEN[world]):
        for test, outcome in outcomes_of_tests(speak(np.random.default_rng([11, r]), WORLDS[world], 40, 20)).items():
            found.setdefault(test, []).append(outcome)
    return {test: np.array(rows) for test, rows in found.items()}


def test_level_holds_in_a_fair_world():
    from scipy.stats import binom

    # A test of level 5 % speaks more often than this with probability 1e-9; twelve of them, false alarm below 2e-8.
    most = binom.isf(1e-9, FAIR, 0.05)
    assert most < 0.3 * FAIR
    found = spoken("fair")
    assert set(found) == {*TESTS, "time of the first hit"}
    for test, rows in found.items():
        assert (rows.sum(axis=0) <= most).all(), test


@pytest.mark.parametrize(
    ("world", "test", "by"),
    [
        ("memory of two words", "order", 0),
        ("hazard changes with position", "homogeneity over position", 0),
        ("hazard changes with position", "homogeneity over position", 1),
        ("hazard changes with position", "Chapman-Kolmogorov", 1),
        ("prompts differ", "prompt heterogeneity", 0),
        ("categories differ", "heterogeneity between categories", 1),
        ("more harmful", "time of the first hit", 1),
        ("half as fast", "time of the first hit", 1),
    ],
)
def test_power_where_an_assumption_is_broken(world, test, by):
    # Each of these speaks in 92 % of experiments or more (papers/measurements/check.md); here in four of five or all.
    assert spoken(world)[test][:, by].sum() >= 4


def test_what_is_not_broken_stays_silent():
    # The wrong chain in a fair world: only the comparison with the chain may speak. At most 3 of 5 by chance at level
    # 5 % has probability 1 - 3e-5; by the interval, which never spoke in a thousand, all must be silent.
    found = spoken("half as fast")
    assert not found["Chapman-Kolmogorov"][:, 1].all()
    assert found["order"][:, 1].sum() == 0


def test_equivalence_holds_its_level():
    from scipy.stats import binom

    n = 100
    shares = equivalence(n, seed=3)
    # Wrong by just the margin, each side of the verdict is due in 2.5 %; false alarm 1e-9 each.
    assert shares["within_at_margin"] * n <= binom.isf(1e-9, n, 0.025)
    assert shares["off_at_margin"] * n <= binom.isf(1e-9, n, 0.025)
    assert shares["off_if_right"] == 0  # five standard errors and more
    assert shares["within_if_right"] > 0.5  # measured: 85 %


def test_misfit_is_the_largest_over_counted_depths():
    rows = [{"k": 0, "difference": 0.9}, {"k": 2, "difference": -0.1}, {"k": 3, "difference": 0.05}]
    ends = [(0.8, 1.0), (-0.3, 0.1), (0.02, 0.08)]
    b = misfit_of(rows, ends, 0.9)
    assert (b.value, b.lower, b.upper, b.level) == (0.1, 0.02, 0.3, 0.9)
    assert b.info["depths"] == [2, 3]
    assert misfit_of(rows[:1], ends[:1], 0.9) is None
