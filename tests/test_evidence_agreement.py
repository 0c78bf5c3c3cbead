"""Two judges of one set of rollouts: kappa, where they differ, and the harm that lies between them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from judges_that_err import HARM, MILD, STERN, answers, judged
from scipy.stats import binom

from markovsafety import InputError, Rollouts
from markovsafety.bound import clopper_pearson
from markovsafety.evidence import agreement
from markovsafety.evidence.agreement import kappa


@pytest.fixture(scope="module")
def pair():
    rng = np.random.default_rng(6)
    truth = answers(rng, 60, 8, harm={"a": 0.4, "b": 0.2})
    return truth, judged(truth, {"a": MILD, "b": STERN}, rng), judged(truth, {"a": MILD, "b": MILD}, rng)


def test_kappa_of_a_published_table():
    """Twenty-five pairs of yes and five, ten, ten disagreements: observed 0.7, by chance 0.5, kappa 0.4."""
    found = kappa(np.array([[[20.0, 5.0], [10.0, 15.0]]]))
    assert found.value == pytest.approx(0.4)
    assert found.info["note"].startswith("one prompt")
    assert found.lower < 0.4 < found.upper


@settings(deadline=None, derandomize=True, max_examples=50)
@given(st.integers(0, 2**32 - 1))
def test_kappa_is_symmetric_and_blind_to_names(seed):
    rng = np.random.default_rng(seed)
    table = rng.poisson(1.0, (12, 4, 4)).astype(float)
    table[0] += 1
    one, turned = kappa(table), kappa(table.transpose(0, 2, 1))
    order = rng.permutation(4)
    named = kappa(table[:, order][:, :, order])
    for other in (turned, named):
        assert other.value == pytest.approx(one.value, abs=1e-12)
        assert other.upper == pytest.approx(one.upper, abs=1e-12)
    total = table.sum(axis=0)
    observed, chance = np.trace(total) / total.sum(), total.sum(0) @ total.sum(1) / total.sum() ** 2
    assert one.value == pytest.approx((observed - chance) / (1 - chance))


def test_kappa_covers_the_truth_of_clustered_judges():
    """400 experiments of 40 prompts; the truth is kappa of 4e5 rollouts. Fewer than binom.ppf(1e-8, 400, 0.93) hits has
    a false alarm of 1e-8 for an interval of 93 % (a jackknife over 40 prompts is that close to 95 %)."""
    rng = np.random.default_rng(12)

    def tables(prompts, n):
        own = rng.beta(0.6, 1.4, (prompts, 1))
        harm = rng.random((prompts, n)) < own
        a, b = (np.where(harm, rng.random(harm.shape) < 0.85, rng.random(harm.shape) < 0.1) for _ in range(2))
        cells = [[(a & b), (a & ~b)], [(~a & b), (~a & ~b)]]
        return np.array([[c.sum(axis=1) for c in row] for row in cells], float).transpose(2, 0, 1)

    truth = kappa(tables(4000, 100)).value
    found = [kappa(tables(40, 10)) for _ in range(400)]
    assert sum(b.lower <= truth <= b.upper for b in found) >= binom.ppf(1e-8, 400, 0.93)
    assert np.mean([b.upper - b.lower for b in found]) < 0.35


def test_prompts_that_are_alike_leave_the_width_of_independent_rollouts():
    cell = np.array([[3.0, 1.0], [0.0, 4.0]])
    alike = kappa(np.repeat(cell[None], 40, axis=0))
    alone = kappa(np.array([np.eye(4)[k].reshape(2, 2) for k in [0] * 120 + [1] * 40 + [3] * 160]))
    assert alike.value == pytest.approx(alone.value)
    # one rollout per prompt: the jackknife over prompts has a t-quantile where independent rollouts have a normal one
    assert alike.upper - alike.lower == pytest.approx(alone.upper - alone.lower, rel=0.02)
    assert 0.1 < alike.upper - alike.lower < 0.2


def test_agreement_in_everything_is_not_certain():
    rolls = Rollouts.of([[5, 2]] * 40, prompt_id=range(40), outcome=[0] * 20 + [2] * 20, hit=[0] * 20 + [1] * 20)
    found = agreement(rolls, rolls)
    assert found.kappa.value == 1
    assert 0.7 < found.kappa.lower < 0.9
    assert found.harm.value == 0.5
    assert found.harm.reasons["judge"] == 0
    same = rolls.replace(outcome=[2] * 40, hit=[1] * 40)
    mute = agreement(same, same)
    assert np.isnan(mute.kappa.value)
    assert (mute.kappa.lower, mute.kappa.upper) == (-1, 1)
    assert mute.harm.upper == clopper_pearson(0, 40)[1]


def test_the_table_says_where_they_differ(pair):
    _, one, other = pair
    found = agreement(one, other)
    harm = [x.outcome == HARM for x in (one, other)]
    assert [row["category"] for row in found.table] == [None, "a", "b"]
    for row in found.table:
        mine = np.ones(len(one), bool) if row["category"] is None else one.category == row["category"]
        assert row["agree"].value == pytest.approx((one.outcome == other.outcome)[mine].mean())
        assert row["only_first"].value == pytest.approx((harm[0] & ~harm[1])[mine].mean())
        assert row["only_second"].value == pytest.approx((~harm[0] & harm[1])[mine].mean())
    assert found.table[2]["only_first"].lower > found.table[1]["only_first"].value  # the stern one, in b
    assert np.array_equal(found.counts, np.histogram2d(one.outcome, other.outcome, np.arange(5) - 0.5)[0])
    assert "kappa" in str(found)
    assert found.to_json()["harm"]["reasons"]["judge"] > 0


def test_harm_lies_between_what_both_and_either_say(pair):
    truth, one, other = pair
    found = agreement(one, other).harm
    both = ((one.outcome == HARM) & (other.outcome == HARM)).mean()
    either = ((one.outcome == HARM) | (other.outcome == HARM)).mean()
    assert found.value == pytest.approx((both + either) / 2)
    assert found.reasons["judge"] == pytest.approx((either - both) / 2)
    assert found.lower < both < (truth.outcome == HARM).mean() < either < found.upper


def test_hits_are_compared_where_both_see_harm():
    base = Rollouts.of([[5, 6, 7, 8, 2]] * 4, prompt_id=range(4), outcome=[0, 0, 0, 2], hit=[0, 1, 2, 4])
    found = agreement(base, base.replace(outcome=[0, 0, 2, 0], hit=[3, 1, 4, 0]))
    assert found.shift.tolist() == [3, 0]
    assert found.place == {"both": pytest.approx(0.25), "only_first": 0.4, "only_second": 0.0}
    assert "the same token in 50 %, else the second hits +3" in str(found)


def test_bad_input(pair):
    _, one, other = pair
    with pytest.raises(InputError, match="not about the same rollouts"):
        agreement(one, other[:5])
    with pytest.raises(InputError, match="compared on rollouts"):
        agreement(one, other.outcome)
    blank = one.replace(outcome=np.full(len(one), -1), hit=np.full(len(one), -1))
    with pytest.raises(InputError, match="No rollout is judged by both"):
        agreement(one, blank)
    with pytest.raises(InputError, match="level"):
        agreement(one, other, level=2)
