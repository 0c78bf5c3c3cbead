"""A judge's errors: counted from labels, taken out of rates, and put into the interval."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from judges_that_err import HARM, MILD, STERN, answers, judged, some
from scipy.stats import binom, norm

from markovsafety import InputError, Rollouts, UntrustedError, profile
from markovsafety.bound import Bound, clopper_pearson, clustered
from markovsafety.evidence import Confusion, confusion, corrected
from markovsafety.evidence.judging import better_than_chance, error_rates
from markovsafety.evidence.judging_rates import corrected_rate

BY = {"a": MILD, "b": STERN}
HARMS = {"a": 0.3, "b": 0.1}


def two(sees, misses, alarms, quiet):
    """A confusion matrix of harm against the rest."""
    return Confusion.of([[sees, misses], [alarms, quiet]])


def fixed(value, lower=None, upper=None):
    return Bound(value, value if lower is None else lower, value if upper is None else upper)


# --- counting errors ---


def test_labels_are_counted_by_truth_and_verdict():
    rolls = Rollouts.of([[5, 2]] * 6, prompt_id=[0, 0, 1, 1, 2, 2], category=list("aabbaa"),
                        outcome=[0, 2, 0, 1, -1, 2], hit=[0, 1, 1, 1, -1, 1])  # fmt: skip
    named = confusion(rolls, ["harm", "harm", "Benign", "refusal", "harm", None])
    expected = np.zeros((4, 4))
    expected[0, 0] = expected[0, 2] = expected[2, 0] = expected[1, 1] = 1  # the fifth is not judged, the sixth no label
    assert np.array_equal(named.matrix(), expected)
    assert named.labels == 4
    by_code = confusion(rolls, np.array([0, 0, 2, 1, 0, -1]), by="category")
    by_row = confusion(rolls, {0: "harm", 1: 0, 2: "benign", 3: "refusal", 5: ""}, by="category")
    twice = confusion(rolls, rolls.replace(outcome=[0, 0, 2, 1, 0, -1], hit=[0, 0, 1, 1, 0, -1]), by="category")
    for found in (by_code, by_row, twice):
        assert np.array_equal(found.matrix("a"), [[1, 0, 1, 0], *[[0] * 4] * 3])
        assert np.array_equal(found.matrix("a") + found.matrix("b"), expected)
    assert np.isnan(named.rates()[3]).all()
    assert named.rates()[0].tolist() == [0.5, 0, 0.5, 0]


def test_rates_of_labels_cluster_by_prompt_and_zero_is_not_certain():
    rng = np.random.default_rng(0)
    truth = answers(rng, 40, 5, harm={"a": 0.5, "b": 0.5})
    found = confusion(truth, truth)
    sees, alarms = error_rates(found)
    assert (sees.value, alarms.value) == (1.0, 0.0)
    prompts = len(np.unique(truth.prompt_id[truth.outcome != HARM]))
    assert alarms.upper == clopper_pearson(0, prompts)[1]  # prompts are the trials, not their rollouts
    alone = Confusion.of(found.matrix())
    assert error_rates(alone)[1].upper == clopper_pearson(0, float((truth.outcome != HARM).sum()))[1]
    nothing = error_rates(two(0, 0, 3, 50))[0]
    assert np.isnan(nothing.value)
    assert (nothing.lower, nothing.upper) == (0, 1)
    assert error_rates(two(0, 7, 3, 50))[0].upper == clopper_pearson(0, 7)[1]


@settings(deadline=None, derandomize=True, max_examples=40)
@given(st.integers(0, 2**32 - 1), st.integers(1, 60))
def test_parts_add_up_and_json_comes_back(seed, cut):
    rng = np.random.default_rng(seed)
    truth = answers(rng, 6, 10, harm=HARMS)
    said = judged(truth, BY, rng)
    at = min(cut, 59)
    whole = confusion(said, truth, by="category")
    parts = sum(confusion(s, t, by="category") for s, t in ((said[:at], truth[:at]), (said[at:], truth[at:])))
    again = Confusion.from_json(json.loads(json.dumps(parts.to_json())))
    for found in (parts, again):
        assert found.categories == whole.categories
        assert found.by == "category"
        for name in whole.categories:
            assert np.allclose(found.matrix(name), whole.matrix(name), rtol=1e-12)
            for x, y in zip(error_rates(found, name), error_rates(whole, name)):
                assert x.upper == pytest.approx(y.upper, rel=1e-9)


def test_draws_have_the_spread_of_the_labels():
    found = Confusion.of({"a": [[18, 1, 1, 0], [0, 30, 0, 0], [2, 0, 28, 0], [0, 0, 0, 5]]})
    drawn = found.draws(20_000, seed=3)
    assert np.allclose(drawn.sum(axis=2), 1)
    a, b = 18.5, 3.5
    mean, sd = a / (a + b), np.sqrt(a * b / (a + b) ** 2 / (a + b + 1))
    # Normal mean of 20000 draws: false alarm 1e-8; the standard deviation within 5 %.
    assert abs(drawn[:, 0, 0].mean() - mean) < norm.isf(5e-9) * sd / np.sqrt(20_000)
    assert drawn[:, 0, 0].std() == pytest.approx(sd, rel=0.05)
    assert np.array_equal(drawn, found.draws(20_000, seed=3))


def test_draws_know_that_labels_of_one_prompt_resemble_each_other():
    """Ten prompts, whose answers are all judged alike: ten labels, not a hundred."""
    said = np.repeat([0] * 8 + [2] * 2, 10)
    rolls = Rollouts.of([[5, 2]] * 100, prompt_id=np.repeat(range(10), 10), outcome=said, hit=np.where(said, 1, 0))
    clustered_, alone = confusion(rolls, [0] * 100), Confusion.of(confusion(rolls, [0] * 100).matrix())
    spread = [found.draws(4000, seed=1)[:, 0, 0].std() for found in (clustered_, alone)]
    assert spread[0] > 2.5 * spread[1]


def test_labels_chosen_by_their_verdict_are_weighted():
    """Truth: 10 % harm, sensitivity 0.8, alarms 0.1. As many flagged as unflagged answers are labelled."""
    flagged, quiet = [0] * 80 + [2] * 90, [0] * 20 + [2] * 810
    truth = np.array((flagged + quiet) * 4)
    said = np.array(([0] * 170 + [2] * 830) * 4)
    rolls = Rollouts.of([[5, 2]] * 4000, prompt_id=range(4000), outcome=said, hit=np.where(said == 0, 0, 1))
    labels, rng = np.full(4000, -1), np.random.default_rng(1)
    for code in (0, 2):
        at = rng.choice(np.flatnonzero(said == code), 400, replace=False)
        labels[at] = truth[at]
    naive = error_rates(confusion(rolls, labels))[0]
    assert naive.lower > 0.85  # what the verdict selected looks like skill
    weight = np.where(said == 0, (said == 0).sum(), (said == 2).sum()) / 400
    sees, alarms = error_rates(confusion(rolls, labels, weight=weight))
    assert sees.lower < 0.8 < sees.upper
    assert alarms.lower < 0.1 < alarms.upper
    assert np.isclose(
        confusion(rolls, labels, weight=weight).labels, confusion(rolls, labels, weight=9 * weight).labels
    )


# --- correcting a rate ---


def test_the_estimate_is_that_of_rogan_and_gladen():
    rate = corrected_rate(fixed(0.2), fixed(0.8), fixed(0.1))
    assert rate.raw == pytest.approx(0.1 / 0.7, rel=1e-15)
    assert rate.lower == pytest.approx(rate.value, rel=1e-12)
    assert rate.upper == pytest.approx(rate.value, rel=1e-12)


@settings(deadline=None, derandomize=True, max_examples=200)
@given(st.lists(st.floats(0.02, 0.98), min_size=3, max_size=3), st.lists(st.floats(0, 0.3), min_size=6, max_size=6))
def test_intervals_solve_their_own_equation(rates, gaps):
    """Each end is where MOVER's interval of q - p s - (1 - p) a first holds 0, checked on a grid of p."""
    q, s, a = rates
    if s - a < 0.1 or not a <= q <= s:
        return
    ends = [fixed(v, max(v - g, 0), min(v + h, 1)) for v, g, h in zip((q, s, a), gaps[:3], gaps[3:])]
    rate = corrected_rate(*ends)
    Q, S, A = ends
    p = np.linspace(0, 1, 4001)
    middle = q - p * s - (1 - p) * a
    up = np.sqrt((Q.upper - q) ** 2 + (p * (s - S.lower)) ** 2 + ((1 - p) * (a - A.lower)) ** 2)
    down = np.sqrt((q - Q.lower) ** 2 + (p * (S.upper - s)) ** 2 + ((1 - p) * (A.upper - a)) ** 2)
    inside = (middle + up >= 0) & (middle - down <= 0)
    assert np.all((rate.lower - 1e-9 <= p[inside]) & (p[inside] <= rate.upper + 1e-9))
    assert p[inside].min() - rate.lower < 1e-3
    assert rate.upper - p[inside].max() < 1e-3
    assert rate.lower <= rate.value <= rate.upper
    # More doubt in anything never makes the interval narrower.
    wider = corrected_rate(Q, fixed(s, max(S.lower - 0.1, 0), min(S.upper + 0.1, 1)), A)
    assert wider.lower <= rate.lower + 1e-12
    assert wider.upper >= rate.upper - 1e-12


def test_harm_and_its_absence_are_mirror_images():
    q, s, a = fixed(0.3, 0.22, 0.41), fixed(0.8, 0.7, 0.88), fixed(0.1, 0.05, 0.2)
    flip = lambda b: Bound(1 - b.value, 1 - b.upper, 1 - b.lower)  # noqa: E731
    one, other = corrected_rate(q, s, a), corrected_rate(flip(q), flip(a), flip(s))
    assert one.lower == pytest.approx(1 - other.upper, abs=1e-12)
    assert one.sampling == pytest.approx(other.sampling, abs=1e-12)


def test_sampling_and_judge_are_named_apart():
    q, s, a = fixed(0.3, 0.25, 0.35), fixed(0.8, 0.7, 0.88), fixed(0.1, 0.05, 0.2)
    rate, known = corrected_rate(q, s, a), corrected_rate(q, fixed(0.8), fixed(0.1))
    assert rate.sampling == pytest.approx(0.05 / 0.7, rel=1e-9)
    assert known.judge == pytest.approx(0, abs=1e-12)
    assert known.upper - known.lower == pytest.approx(2 * rate.sampling, rel=1e-9)
    total = (rate.upper - rate.lower) / 2
    assert np.hypot(rate.sampling, rate.judge) == pytest.approx(total, rel=0.1)
    assert rate.judge > rate.sampling


def test_an_estimate_below_zero_never_claims_certainty():
    """Fewer verdicts of harm than the labels' false alarms: a set of possible p would be empty."""
    rate = corrected_rate(fixed(0.002, 0.0002, 0.007), fixed(0.9, 0.8, 0.96), fixed(0.05, 0.016, 0.113))
    assert rate.raw < 0
    assert rate.value == 0
    assert rate.lower == 0
    assert 0.007 < rate.upper <= 0.007 / 0.8 + 1e-3  # alarms are not negative: at most q / s
    top = corrected_rate(fixed(0.99, 0.97, 0.999), fixed(0.9, 0.8, 0.96), fixed(0.05, 0.016, 0.113))
    assert (top.value, top.upper) == (1, 1)
    assert top.lower < 0.995


def simulate(rng, p, s, a, *, prompts, n, icc, labels, share, runs):
    """Raw estimates, and whether the corrected and the plain interval hold p."""
    raw, held, plain = [], 0, 0
    pseudo = (1 - icc) / icc
    for _ in range(runs):
        bad = rng.binomial(n, rng.beta(p * pseudo, (1 - p) * pseudo, prompts))
        said = rng.binomial(bad, s) + rng.binomial(n - bad, a)
        harms = rng.binomial(labels, share)
        sees, alarms = rng.binomial(harms, s), rng.binomial(labels - harms, a)
        found = two(sees, harms - sees, alarms, labels - harms - alarms)
        q = clustered(said, np.full(prompts, n))
        rate = corrected_rate(q, *error_rates(found))
        raw.append(float(rate.raw))
        held += rate.lower <= p <= rate.upper
        plain += q.lower <= p <= q.upper
    return np.array(raw), held, plain


@pytest.mark.parametrize(
    ("p", "s", "a", "prompts", "n", "icc", "labels", "share"),
    [(0.3, 0.85, 0.05, 60, 20, 0.1, 200, 0.3), (0.03, 0.9, 0.04, 100, 8, 0.2, 200, 0.3)],
)
def test_coverage_and_bias_under_judges_of_known_error(p, s, a, prompts, n, icc, labels, share):
    """600 experiments each: at a coverage of 95 % (it is more) fewer than binom.ppf(1e-8) = 530 of them hold p with a
    false alarm of 1e-8. The mean estimate is tested at 1e-8 by its own standard error."""
    runs = 600
    raw, held, plain = simulate(
        np.random.default_rng(7), p, s, a, prompts=prompts, n=n, icc=icc, labels=labels, share=share, runs=runs
    )
    assert held >= binom.ppf(1e-8, runs, 0.95)
    # The ratio of estimates is biased by about var(s) / J^2 of itself: 1 % of p, and as much of the alarms, is allowed.
    assert abs(raw.mean() - p) < norm.isf(5e-9) * raw.std() / np.sqrt(runs) + 0.01 * (p + a)
    if p < 0.1:
        assert plain < held - 200  # the interval that believes its judge misses


def test_errors_that_differ_by_category_need_a_matrix_by_category():
    """Rates of the judge itself, without sampling error: a pooled matrix from labels of another mix is wrong."""
    rng = np.random.default_rng(5)
    truth = answers(rng, 300, 10, harm=HARMS, spread=6)
    said = judged(truth, BY, rng)
    more_of_a = some(rng, truth[truth.category == "a"], 1000)
    labels = np.full(len(truth), -1)
    labels[truth.category == "a"] = more_of_a
    labels[np.flatnonzero(truth.category == "b")[:100]] = truth.outcome[truth.category == "b"][:100]
    real = (truth.outcome == HARM).mean()
    pooled = corrected(said, confusion(said, labels)).start
    apart = corrected(said, confusion(said, labels, by="category")).start
    assert apart.lower <= real <= apart.upper
    assert abs(apart.value - real) < abs(pooled.value - real) / 2
    assert not pooled.lower <= real <= pooled.upper
    assert apart.reasons["judge"] > 0
    rows = corrected(said, confusion(said, labels, by="category"), by="category")
    for i, name in enumerate(rows.info["coords"]["category"]):
        assert rows.lower[i, 0] <= (truth.outcome[truth.category == name] == HARM).mean() <= rows.upper[i, 0]


def test_a_pooled_rate_weighs_categories_with_their_rollouts():
    outcome = np.array([0] * 30 + [1] * 30 + [0] * 2 + [1] * 18)
    rolls = Rollouts.of([[5, 2]] * 80, prompt_id=range(80), category=["a"] * 60 + ["b"] * 20, outcome=outcome,
                        hit=np.where(outcome == 0, 0, 1))  # fmt: skip
    found = Confusion.of({"a": [[900, 100], [200, 800]], "b": [[800, 200], [50, 950]]}, by="category")
    a, b = (0.5 - 0.2) / 0.7, (0.1 - 0.05) / 0.75
    pooled, rows = corrected(rolls, found).start, corrected(rolls, found, by="category")
    assert pooled.value == pytest.approx(0.75 * a + 0.25 * b, rel=1e-12)
    assert rows.value[:, 0] == pytest.approx([a, b], rel=1e-12)
    assert pooled.info["apparent"] == pytest.approx(0.4)
    down = np.hypot(0.75 * (rows.value - rows.lower)[0, 0], 0.25 * (rows.value - rows.lower)[1, 0])
    assert pooled.value - pooled.lower == pytest.approx(down, rel=1e-12)


def test_a_profile_is_corrected_depth_by_depth():
    rng = np.random.default_rng(11)
    truth = answers(rng, 60, 6, harm=HARMS, prefill=(0, 2, 5))
    said = judged(truth, MILD, rng)
    found = confusion(said, some(rng, truth, 200))
    whole = corrected(said, found)
    assert whole.info["coords"] == {"depth": (0, 2, 5)}
    assert np.array_equal(whole.info["apparent"], profile(said).value)
    from_bound = corrected(profile(said), found)
    for name in ("value", "lower", "upper"):
        assert np.allclose(getattr(whole, name), getattr(from_bound, name), atol=1e-12)
    assert whole.start.value == whole.value[0]
    assert np.all(np.diff(whole.value) > 0)
    split = confusion(said, truth, by="category")
    rows, again = corrected(said, split, by="category"), corrected(profile(said, by="category"), split)
    assert rows.shape == again.shape == (2, 3)
    assert np.allclose(rows.upper, again.upper, atol=1e-12)
    wide = corrected(said, found, bias="widened")
    assert np.array_equal(wide.value, profile(said).value)
    assert np.all((wide.lower <= whole.lower) & (wide.upper >= whole.upper))
    with pytest.raises(InputError, match="pool categories"):
        corrected(profile(said), split)
    with pytest.raises(InputError, match="corrected for its judge already"):
        corrected(whole, found)


def test_no_harm_seen_is_not_no_harm():
    rolls = Rollouts.of([[5, 2]] * 330, prompt_id=range(330), outcome=[1] * 330, hit=[1] * 330)
    found = corrected(rolls, two(40, 10, 0, 150)).start
    assert (found.value, found.lower) == (0, 0)
    assert found.upper > profile(rolls).upper[0] / 0.8  # harm that was missed is on top of harm that was not sampled
    assert found.upper < 0.03


def test_one_prompt_says_so():
    rolls = Rollouts.of([[5, 2]] * 20, prompt_id=3, outcome=[0] * 5 + [1] * 15, hit=[0] * 5 + [1] * 15)
    assert "one prompt only" in corrected(rolls, two(40, 10, 5, 150)).info["note"]


# --- refusals ---


@pytest.mark.parametrize(
    ("counts", "says"),
    [
        ((2, 8, 30, 70), "no better than chance"),
        ((5, 5, 50, 50), "no better than chance"),
        ((3, 2, 20, 40), "do not show"),
        ((0, 0, 2, 150), "No rollout is labelled harm"),
        ((20, 2, 0, 0), "No rollout is labelled no harm"),
    ],
)
def test_a_judge_that_may_be_a_coin_is_refused_with_the_wide_answer(counts, says):
    rolls = Rollouts.of([[5, 2]] * 200, prompt_id=range(200), outcome=[0] * 40 + [1] * 160, hit=[0] * 40 + [1] * 160)
    with pytest.raises(UntrustedError, match=says) as caught:
        corrected(rolls, two(*counts))
    wide = caught.value.partial
    assert isinstance(wide, Bound)
    assert wide.upper[0] == 1.0 or wide.lower[0] == 0.0
    assert wide.upper[0] - wide.lower[0] > 0.3
    assert np.array_equal(wide.upper, corrected(rolls, two(*counts), doubtful="keep").upper)
    assert not better_than_chance(*error_rates(two(*counts))).lower > 0


def test_few_labels_are_wide_and_a_category_without_is_refused():
    rng = np.random.default_rng(2)
    truth = answers(rng, 40, 5, harm=HARMS)
    said = judged(truth, MILD, rng)
    few, many = corrected(said, two(6, 1, 1, 40)).start, corrected(said, two(600, 100, 100, 4000)).start
    assert few.reasons["judge"] > 4 * many.reasons["judge"]
    assert few.reasons["sampling"] == pytest.approx(many.reasons["sampling"], rel=0.2)
    only = truth.category == "a"
    found = confusion(said[only], truth[only], by="category")
    with pytest.raises(InputError, match="No rollout of category 'b' was labelled"):
        corrected(said, found)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda r: confusion(r, ["harm"]), "1 labels for 3"),
        (lambda r: confusion(r, ["harm", "evil", None]), "row 1 is 'evil'"),
        (lambda r: confusion(r, {7: "harm"}), "Rows are 0 to 2"),
        (lambda r: confusion(r, [None] * 3), "both labelled and judged"),
        (lambda r: confusion(r, r[::-1]), "not about the same rollouts"),
        (lambda r: confusion(r, r, by="prompt"), "by is 'prompt'"),
        (lambda r: confusion([1], [1]), "holds no verdicts"),
        (lambda r: confusion(r, r, weight=[1.0]), "1 weights for 3"),
        (lambda r: confusion(r, r, weight=[1.0, np.nan, 1.0]), "no count"),
        (lambda r: Confusion.of([[1, -1], [0, 2]]), "no count"),
        (lambda r: Confusion.of(np.ones((3, 3))), "shape"),
        (lambda r: Confusion.from_json({"counts": []}), "no confusion matrix"),
        (lambda r: two(1, 1, 1, 1) + Confusion.of(np.eye(2), by="category"), "cannot be added"),
        (lambda r: corrected(r, [[1, 0], [0, 1]]), "list is no confusion matrix"),
        (lambda r: corrected(r, two(9, 1, 1, 9), bias="none"), "bias is 'none'"),
        (lambda r: corrected(r, two(9, 1, 1, 9), level=1.0), "level is 1.0"),
    ],
)
def test_what_does_not_fit_is_named(make, says):
    rolls = Rollouts.of([[5, 2], [6, 2], [7, 2]], prompt_id=[0, 1, 2], outcome=[0, 1, 2], hit=[0, 1, 1])
    with pytest.raises(InputError) as caught:
        make(rolls)
    assert says in str(caught.value)
