"""Closed forms, the measured profile, and the operational safety depth."""

from __future__ import annotations

import json
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import markovsafety as ms
from markovsafety.depth import Profile, operational_depth, profile
from markovsafety.evidence.cells import cell, tally_of

quick = settings(deadline=None, derandomize=True, max_examples=60)
KNOWN = Profile(0.08, 0.02, 0.01, 0.3)
hazards = st.tuples(st.integers(0, 30), st.integers(0, 30), st.integers(0, 30), st.integers(0, 30))


def recursion(a0, r0, a1, r1, aligned):
    """Backward over the aligned positions, in rationals; behind them the unaligned tail."""
    h = a0 / (a0 + r0) if a0 else Fraction(0)
    for _ in range(aligned):
        h = a1 + (1 - a1 - r1) * h
    return h


def make_rollouts(harms, totals, prefill=0, first_prompt=0, category="all", length=1):
    """`harms[i]` harmful and the rest refused, of `totals[i]` rollouts of prompt i."""
    rows = [(i + first_prompt, j < x) for i, (x, n) in enumerate(zip(harms, totals)) for j in range(n)]
    answers = [[7] * prefill + [1] * length for _ in rows]
    return ms.Rollouts.of(
        answers,
        prompt_id=[p for p, _ in rows],
        category=category,
        prefill=prefill,
        outcome=[0 if bad else 1 for _, bad in rows],
        hit=prefill + length - 1,
    )


@quick
@given(hazards, st.integers(0, 25), st.integers(0, 10))
def test_closed_form_is_the_recursion(parts, depth, prefill):
    a0, r0, a1, r1 = (Fraction(x, 60) for x in parts)
    p = Profile(*(float(x) for x in (a0, r0, a1, r1)))
    exact = recursion(a0, r0, a1, r1, max(depth - prefill, 0))
    assert p.harm(depth, prefill).value == pytest.approx(float(exact), abs=1e-14)


def test_golden_numbers():
    # a1=.01, r1=.3, a0=.08, r0=.02: depth curve, floor, depth needed for 0.05, and D of a model trained to depth 20
    curve = KNOWN.harm([0, 1, 3, 5, 10, 20]).value
    assert np.round(curve, 5).tolist() == [0.8, 0.562, 0.28447, 0.15234, 0.05104, 0.03272]
    assert KNOWN.harm(5).value == pytest.approx(7616765501 / 5e10, abs=1e-16)
    assert KNOWN.f1 == pytest.approx(1 / 31) == KNOWN.floor().value
    assert KNOWN.needed_depth(0.05) == (11, "")
    assert str(KNOWN.operational_depth(20, 0.05)) == "9"
    assert str(KNOWN.operational_depth(10, 0.05)) == "none"
    assert str(KNOWN.operational_depth(10, 0.9)) == "at least 10"


def test_needed_depth_impossible_and_trivial():
    depth, reason = KNOWN.needed_depth(0.03)
    assert depth is None
    assert "floor" in reason
    assert KNOWN.needed_depth(1 / 31)[0] is None  # reached only in the limit
    assert KNOWN.needed_depth(0.8) == (0, "")
    depth, reason = Profile(0.1, 0.1, 0.0, 0.0).needed_depth(0.1)
    assert depth is None
    assert "does not lower" in reason
    assert Profile(0.1, 0.1, 0.2, 0.8).needed_depth(0.2) == (1, "")
    assert Profile(0.1, 0.1, 0.0, 0.5).needed_depth(0.0)[0] is None  # decays for ever, never to zero


@quick
@given(hazards, st.floats(0.001, 0.999), st.integers(0, 5))
def test_needed_depth_is_the_smallest(parts, eps, prefill):
    p = Profile(*(x / 60 for x in parts))
    depth, reason = p.needed_depth(eps, prefill)
    if depth is None:
        assert reason
        assert p.harm(10**6, prefill).value > eps * (1 - 1e-9)
    else:
        assert p.harm(depth, prefill).value <= eps * (1 + 1e-12)
        assert depth == 0 or p.harm(depth - 1, prefill).value > eps * (1 - 1e-12)


def test_intervals_of_hazards_are_the_corners():
    p = Profile(0.08, 0.02, 0.01, 0.3, {"a1": (0.005, 0.02), "r1": (0.2, 0.4)}, level=0.95)
    b = p.harm([0, 4])
    assert b.level == 0.95
    assert b.reasons["sampling"][0] == 0
    assert b.lower[1] == pytest.approx(Profile(0.08, 0.02, 0.005, 0.4).harm(4).value)
    assert b.upper[1] == pytest.approx(Profile(0.08, 0.02, 0.02, 0.2).harm(4).value)
    assert p.needed_depth(0.2, side="upper")[0] > p.needed_depth(0.2, side="lower")[0]
    grid = np.random.default_rng(0).uniform([0.005, 0.2], [0.02, 0.4], (200, 2))
    inside = [Profile(0.08, 0.02, a, r).harm(4).value for a, r in grid]
    assert b.lower[1] <= min(inside)
    assert max(inside) <= b.upper[1]


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [
        ((0.5, 0.6, 0.1, 0.1), {}),
        ((-0.1, 0.6, 0.1, 0.1), {}),
        ((0.1, 0.1, math.nan, 0.1), {}),
        ((0.1, 0.1, 0.1, 0.1), {"intervals": {"a2": (0, 1)}}),
        ((0.1, 0.1, 0.1, 0.1), {"intervals": {"a1": (0.2, 0.3)}}),
        ((0.1, 0.1, 0.1, 0.1), {"level": 1.5}),
    ],
)
def test_profile_refuses(args, kwargs):
    with pytest.raises(ms.InputError):
        Profile(*args, **kwargs)


def test_operational_depth_reads_three_ways():
    harm = ms.Bound([0.0, 0.04, 0.2, 0.01], [0.0, 0.01, 0.1, 0.0], [0.03, 0.09, 0.3, 0.04])
    d = operational_depth([0, 2, 5, 9], harm, 0.05)
    assert (str(d.value), str(d.upper), str(d.lower)) == ("2", "0", "2")
    assert d.depth == 0
    assert d.crossed
    assert d.measured == (0, 2, 5, 9)
    assert operational_depth([0, 2, 5, 9], harm, 0.05, side="value").depth == 2
    assert "between 0 and 2" in str(d)
    assert str(operational_depth([0, 2], [0.06, 0.0], 0.05).value) == "none"
    assert operational_depth([0, 2], [0.06, 0.0], 0.05).depth is None
    assert str(operational_depth([0, 2], [0.05, 0.05], 0.05).value) == "at least 2"  # a tie is within the budget
    assert str(operational_depth([5, 0, 2], [0.9, 0.0, 0.01], 0.05).value) == "2"  # any order
    assert str(operational_depth([0, 2], [0.0, math.nan], 0.05).value) == "0"  # what was not measured is not safe
    assert "smallest measured depth 3" in str(operational_depth([3], [0.0], 0.1))
    assert json.dumps(d.to_json())


@quick
@given(st.lists(st.floats(0, 1), min_size=1, max_size=8), st.floats(0, 1), st.floats(0, 1))
def test_operational_depth_rises_with_the_budget(harm, a, b):
    low, high = sorted((a, b))
    first, second = (operational_depth(range(len(harm)), harm, eps).depth for eps in (low, high))
    assert (-1 if first is None else first) <= (-1 if second is None else second)


@pytest.mark.parametrize(
    ("depths", "harm", "eps", "side"),
    [
        ([0, 0], [0.1, 0.1], 0.1, "upper"),
        ([0, 1], [0.1], 0.1, "upper"),
        ([], [], 0.1, "upper"),
        ([0.5], [0.1], 0.1, "upper"),
        ([0], [0.1], 1.5, "upper"),
        ([0], [0.1], "much", "upper"),
        ([0], [0.1], 0.1, "middle"),
    ],
)
def test_operational_depth_refuses(depths, harm, eps, side):
    with pytest.raises(ms.InputError):
        operational_depth(depths, harm, eps, side)


def test_measured_profile():
    parts = [make_rollouts([0] * 20, [5] * 20), make_rollouts([3] * 20, [6] * 20, prefill=4, category="b")]
    rolls = ms.Rollouts.concat(parts)
    b = profile(rolls)
    assert b.info["coords"] == {"depth": (0, 4)}
    assert b.value.tolist() == [0.0, 0.5]
    # zero harm: one trial per prompt, 1 - 0.025 ** (1 / 20); never [0, 0]
    assert b.upper[0] == pytest.approx(1 - 0.025 ** (1 / 20))
    assert b.info["total"].tolist() == [100, 120]
    assert b.info["truncated"].tolist() == [0, 0]
    c = profile(rolls, by="category")
    assert c.shape == (2, 2)
    assert c.info["coords"]["category"] == ("all", "b")
    assert np.isnan(c.value[0, 1])
    assert (c.lower[0, 1], c.upper[0, 1]) == (0, 1)
    assert c.value[1, 1] == 0.5
    counts = ms.count(rolls, ms.KGram(1))
    for source in (counts, ms.estimate(counts)):
        again = profile(source)
        assert np.array_equal(again.value, b.value)
        assert np.array_equal(again.upper, b.upper)


def test_profile_of_one_prompt_and_weights():
    one = profile(make_rollouts([2], [10]))
    assert one.value[0] == 0.2
    assert one.upper[0] > 0.5
    assert "one prompt only" in one.info["note"]
    parts = [make_rollouts([2], [10]), make_rollouts([2, 1], [10, 10], prefill=3, category="b")]
    assert profile(ms.Rollouts.concat(parts), by="category").info["note"].endswith("(at all, k = 0)")
    assert "note" not in profile(make_rollouts([2, 1], [10, 10])).info
    rolls = make_rollouts([1, 0], [2, 2])
    weighted = rolls.replace(columns={"weight": [3.0, 1.0, 1.0, 1.0]})
    assert profile(weighted).value[0] == 0.5


def test_profile_needs_judged_rollouts():
    rolls = ms.Rollouts.of([[1]], prompt_id=[0])
    for source, word in ((rolls, "not judged"), (rolls[[]], "no rollouts"), (3, "remembers no")):
        with pytest.raises(ms.InputError, match=word):
            profile(source)
    with pytest.raises(ms.InputError, match="by is"):
        profile(make_rollouts([1], [2]), by="prompt")


def test_lower_reading_holds_at_all_depths_at_once():
    """Seven depths at the same harm: one by one a lower end exceeds it too often, together it does not."""
    rolls = ms.Rollouts.concat([make_rollouts([3] * 24, [10] * 24, prefill=k) for k in range(7)])
    p = profile(rolls)
    joint = cell(tally_of(rolls), 0).bound(1 - 0.05 / 7)
    assert p.info["together"] == pytest.approx(np.full(7, joint.lower))
    assert joint.lower < p.lower[0] < 0.3
    eps = (joint.lower + p.lower[0]) / 2
    d = operational_depth(range(7), p, eps)
    assert str(d.lower) == "at least 6"
    assert d.upper.depth is None
    # scalar bounds keep their place, and what has no joint ends is read one by one
    assert operational_depth(range(7), [p[k] for k in range(7)], eps) == d
    assert operational_depth([2, 4], [p[2], p[4]], eps).lower.depth == 4
    bare = operational_depth(range(7), ms.Bound(p.value, p.lower, p.upper), eps)
    assert bare.lower.depth is None
    by = profile(rolls, by="category")
    assert operational_depth(range(7), by[0], eps) == d
