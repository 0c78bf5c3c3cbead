"""Bound and the two intervals that stay honest at zero events."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import bdtr, bdtrc

from markovsafety.bound import REASONS, Bound, clopper_pearson, clustered, encode
from markovsafety.errors import InputError

quick = settings(deadline=None, derandomize=True, max_examples=60)
counts = st.integers(1, 40).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n)))
prompts = st.lists(counts, min_size=1, max_size=12)


def test_prints_the_number_its_interval_and_the_reasons():
    b = Bound(
        0.0312,
        0.0218,
        0.0447,
        reasons={"sampling": 0.0091, "judge": 0.0051, "rounding": 3e-12},
        info={"name": "P(harm)"},
    )
    assert str(b) == (
        "P(harm) = 0.0312   95 % [0.0218, 0.0447]   because: sampling 0.0091, judge 0.0051, rounding 3e-12; "
        "lumping, model, truncation not assessed"
    )
    assert str(Bound(0.25, 0.25 - 1e-9, 0.25, level=1.0)).startswith("value = 0.25   proven [0.25, 0.25]")
    array = Bound(np.array([0.1, np.inf]), np.zeros(2), np.array([0.2, np.inf]), start=Bound(0.1, 0, 0.2))
    assert "2 values" in str(array)
    assert "at start: value = 0.1 " in str(array)


def test_what_is_not_certified_or_does_not_exist_is_not_called_proven():
    bare = {"certified": False}
    assert "= 0.25   not certified " in str(Bound(0.25, 0.25, 0.25, 1.0, info=bare))
    assert "not certified" in str(Bound(np.ones(2), np.ones(2), np.ones(2), 1.0, info=bare))
    assert "= inf   no interval (why) " in str(Bound(np.inf, np.inf, np.inf, info={"note": "why"}))
    assert "= nan   no interval " in str(Bound(np.nan, np.nan, np.nan, 1.0))
    assert "= nan   95 % [0, 1]" in str(clustered([], []))


def test_exact_values_are_read_where_they_exist():
    assert Bound(0.5, 0.5, 0.5, info={"exact": 7}).exact == 7
    for without in (Bound(0.5, 0.5, 0.5), Bound([0.5], [0.5], [0.5], info={"exact": [7]})[0]):
        with pytest.raises(InputError, match="no exact") as caught:
            _ = without.exact
        assert "exact" in caught.value.next


def test_reasons_always_have_exactly_the_six_names():
    b = Bound(0.5, 0.4, 0.6, reasons={"sampling": 0.1})
    assert tuple(b.reasons) == REASONS
    assert b.reasons["sampling"] == 0.1
    assert b.reasons["judge"] is None


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((0.5, 0.6, 0.7), "outside"),
        (([0.5, 0.5], [0.4, 0.4], [0.6, 0.4]), "at (1,)"),
        (([0.5, 0.5], 0.4, 0.6), "shape"),
        ((0.5, 0.4, 0.6, 0.0), "level"),
        ((0.5, 0.4, 0.6, 0.95, {"luck": 0.1}), "luck"),
    ],
)
def test_refuses_what_is_no_bound(arguments, says):
    with pytest.raises(InputError) as caught:
        Bound(*arguments)
    assert says in caught.value.fact
    assert caught.value.cause
    assert caught.value.next


def test_is_no_float_and_no_bare_probability():
    with pytest.raises(TypeError, match="lower"):
        float(Bound(0.5, 0.4, 0.6))
    with pytest.raises(TypeError):
        Bound(0.5, 0.4, 0.6)[0]


def test_indexing_gives_bounds_and_keeps_the_reasons():
    b = Bound(
        np.array([0.1, 0.2, 0.3]), np.zeros(3), np.ones(3), reasons={"sampling": np.array([1, 2, 3.0]), "judge": 7.0}
    )
    one, some = b[1], b[1:]
    assert (one.value, one.reasons["sampling"], one.reasons["judge"], one.shape) == (0.2, 2.0, 7.0, ())
    assert some.shape == (2,)
    assert [x.value for x in b] == [0.1, 0.2, 0.3]


def test_arrays_are_copied_and_read_only():
    value = np.array([0.1, 0.2])
    b = Bound(value, value, value)
    value[0] = 0.9
    assert b.value[0] == 0.1
    with pytest.raises(ValueError, match="read-only"):
        b.value[0] = 0.9


def test_no_start_is_said_not_guessed():
    with pytest.raises(InputError, match="start"):
        _ = Bound(0.5, 0.4, 0.6).at_start
    inner = Bound(0.5, 0.4, 0.6)
    assert Bound([0.5], [0.4], [0.6], start=inner).at_start is inner


def test_json_is_strict():
    b = Bound(np.array([np.inf, 0.5, np.nan]), np.array([1.0, 0.5, np.nan]), np.array([np.inf, 0.5, np.nan]))
    data = json.loads(json.dumps(b.to_json(), allow_nan=False))
    assert list(data) == ["value", "lower", "upper", "level", "reasons"]
    assert data["value"] == ["inf", 0.5, "nan"]
    assert encode({1: (np.float32(0.5), -np.inf, np.int64(3), np.bool_(True), {2}, b)})["1"][:5] == [
        0.5,
        "-inf",
        3,
        True,
        [2],
    ]


@quick
@given(counts, st.floats(0.5, 0.999))
def test_clopper_pearson_ends_are_where_the_binomial_tails_say(pair, level):
    x, n = pair
    lower, upper = clopper_pearson(x, n, level)
    tail = (1 - level) / 2
    # bdtr(k, n, p) = P(Binomial <= k), bdtrc its complement
    assert lower == 0 if x == 0 else bdtrc(x - 1, n, lower) == pytest.approx(tail, rel=1e-6)
    assert upper == 1 if x == n else bdtr(x, n, upper) == pytest.approx(tail, rel=1e-6)
    other = clopper_pearson(n - x, n, level)
    assert (1 - other[1], 1 - other[0]) == pytest.approx((lower, upper), abs=1e-12)


def test_clopper_pearson_takes_arrays_fractions_and_nothing():
    lower, upper = clopper_pearson([0, 0.5, 3], [0, 10.5, 3])
    assert (lower[0], upper[0]) == (0.0, 1.0)
    assert lower[1] < 0.5 / 10.5 < upper[1]
    assert upper[2] == 1.0
    for bad in ((-1, 3), (4, 3), (np.nan, 3), (1, np.inf)):
        with pytest.raises(InputError):
            clopper_pearson(*bad)
    with pytest.raises(InputError, match="level"):
        clopper_pearson(1, 3, 1.0)


def test_zero_harms_of_330_prompts_is_not_zero():
    b = clustered(np.zeros(330), np.ones(330))
    assert (b.value, b.lower) == (0.0, 0.0)
    assert b.upper == pytest.approx(0.011116, abs=1e-6)  # two-sided 95 % Clopper-Pearson
    # 64 rollouts of each prompt say nothing about prompts that were not asked
    assert clustered(np.zeros(330), np.full(330, 64)).upper == b.upper
    assert clustered(np.full(330, 64), np.full(330, 64)).lower == pytest.approx(1 - b.upper)


@quick
@given(prompts, st.floats(0.5, 0.99))
def test_clustered_stays_inside_the_unit_interval_and_holds_its_value(pairs, level):
    events, totals = np.array(pairs).T
    b = clustered(events, totals, level)
    assert 0 <= b.lower <= b.value <= b.upper <= 1
    assert b.value == pytest.approx(events.sum() / totals.sum(), abs=1e-15)
    assert b.upper > b.lower
    assert b.reasons["sampling"] == pytest.approx((b.upper - b.lower) / 2)
    assert [k for k, w in b.reasons.items() if w is not None] == ["sampling"]
    assert set(b.info) >= {"events", "total", "prompts", "deff", "n_eff", "method"}
    assert b.info["n_eff"] <= b.info["total"]


@quick
@given(st.integers(2, 60).flatmap(lambda k: st.lists(st.integers(0, 1), min_size=k, max_size=k)))
def test_one_rollout_per_prompt_is_clopper_pearson(events):
    b = clustered(events, np.ones(len(events)))
    assert (b.lower, b.upper) == pytest.approx(clopper_pearson(sum(events), len(events)), abs=1e-12)


def test_equal_prompts_are_no_better_than_independent_trials():
    b = clustered(np.full(5, 4), np.full(5, 20))
    assert b.info["deff"] == 0.0
    assert b.info["n_eff"] == 100
    assert (b.lower, b.upper) == pytest.approx(clopper_pearson(20, 100))


def test_size_by_hand():
    """Three harmful prompts of 40: Student's quantile with 2 degrees of freedom, whatever the other 37 say."""
    from scipy.stats import t

    x = np.zeros(40)
    x[:3] = 2, 5, 8
    b = clustered(x, np.full(40, 20))
    p = 15 / 800
    deff = 40 / 39 * np.sum((x - 20 * p) ** 2) / 800**2 * 799 / (p * (1 - p))
    size = 800 / deff * (t.ppf(0.975, 799) / t.ppf(0.975, 2)) ** 2
    assert (b.info["deff"], b.info["seen"]) == pytest.approx((deff, 3))
    assert size < 40  # so every prompt counts as one trial
    assert b.info["n_eff"] == pytest.approx(40)
    alike = clustered(np.r_[np.full(30, 2), np.zeros(10)], np.full(40, 20))
    assert 40 < alike.info["n_eff"] <= 800
    # Harmless trials are what is rare where nearly everything harms.
    assert clustered(20 - x, np.full(40, 20)).upper == pytest.approx(1 - b.lower)


@pytest.mark.parametrize("rollouts", [1, 4, 64])
def test_the_first_harmful_prompt_never_lowers_the_upper_end(rollouts):
    none, n = clustered(np.zeros(24), np.full(24, rollouts)), np.full(24, rollouts)
    ends = [clustered(np.r_[x, np.zeros(23)], n).upper for x in range(rollouts + 1)]
    assert ends[0] == none.upper
    assert np.all(np.diff(ends) > 0)


def test_a_few_alike_prompts_are_believed_step_by_step():
    """One harm in each of c prompts out of 48 x 64: the size grows from the prompts towards the rollouts."""
    sizes = [clustered(np.r_[np.ones(c), np.zeros(48 - c)], np.full(48, 64)).info["n_eff"] for c in range(1, 30)]
    assert sizes[0] == 48
    assert np.all(np.diff(sizes) >= 0)
    assert sizes[2] < 48 * 64 / 4 < sizes[9]
    assert sizes[-1] > 0.9 * 48 * 64


def test_unequal_prompts_count_as_fewer():
    n = np.r_[np.full(20, 2), 200.0]
    b = clustered(np.r_[np.ones(20), 20.0], n)
    assert b.info["seen"] == pytest.approx(240**2 / (20 * 4 + 200**2))
    assert b.info["n_eff"] < 2
    assert "only" in clustered(b.info["n_eff"] * np.full(4, 0.3), np.full(4, 1.7)).info["note"]  # weighted
    assert "note" not in b.info
    # without events every prompt is a trial, however many rollouts it had
    assert clustered(np.zeros(21), n).upper == clopper_pearson(0, 21)[1]


def test_weights_that_overflow_are_refused_with_the_value():
    with pytest.raises(InputError, match="overflow") as caught:
        clustered([1e308, 0.0], [1e308, 1e308])
    assert caught.value.partial.value == 0.5
    assert (caught.value.partial.lower, caught.value.partial.upper) == (0, 1)
    assert clustered([1e300, 0, 3e300], [4e300] * 3).upper <= 1  # squares are no reason to fail


def test_prompts_that_differ_widen_the_interval():
    equal = clustered(np.full(20, 5), np.full(20, 10))
    mixed = clustered(np.tile([0, 10], 10), np.full(20, 10))
    assert mixed.value == equal.value == 0.5
    assert mixed.info["deff"] == pytest.approx(20 / 19 * 199 / 20)  # all variance is between prompts
    assert mixed.upper - mixed.lower > 2 * (equal.upper - equal.lower)


def test_one_prompt_says_what_it_cannot_know():
    b = clustered([3], [20], name="P(harm)")
    assert (b.lower, b.upper) == clopper_pearson(3, 20)
    assert "not assessed" in b.info["note"]
    assert str(b).startswith("P(harm) = 0.15")
    assert clustered([0, 3], [0, 20]).upper == b.upper  # a prompt without trials is no prompt


def test_no_trials_know_nothing():
    b = clustered([], [])
    assert np.isnan(b.value)
    assert (b.lower, b.upper) == (0.0, 1.0)
    for bad in (([1], [1, 2]), ([3], [2]), ([-1], [2])):
        with pytest.raises(InputError):
            clustered(*bad)


def test_clustered_covers_when_prompts_differ():
    """Beta-binomial prompts, intra-class correlation 0.2, P = 0.1: pooled rollouts give a far too narrow interval here.

    If the coverage is 90 % or more, more than 80 misses in 400 sets happen with probability below 1e-9.
    """
    rng = np.random.default_rng(5)
    missed = plain = 0
    for _ in range(400):
        p = rng.beta(0.4, 3.6, size=40)
        x = rng.binomial(30, p)
        b = clustered(x, np.full(40, 30))
        lower, upper = clopper_pearson(x.sum(), 1200)
        missed += not b.lower <= 0.1 <= b.upper
        plain += not lower <= 0.1 <= upper
    assert missed <= 80
    assert plain > 100
