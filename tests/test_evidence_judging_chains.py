"""Chains from a judge that errs: the correction commutes with the solve, and holds where it is said to hold."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from judges_that_err import HARM, MILD, answers, judged, some, spread_out

from markovsafety import InputError, KGram, Position, UntrustedError, count, estimate, hitting_probability, write_chain
from markovsafety.chains import read_chain
from markovsafety.evidence import Confusion, confusion, corrected, corrected_counts, corrected_harm
from markovsafety.evidence.judging_chains import full_rates, true_outcomes

HARMS = {"a": 0.3, "b": 0.1}
# Everything that is not harm is mistaken for harm alike, so that harm against the rest is the whole matrix.
EVEN = np.array([[0.7, 0.1, 0.2, 0], [0.1, 0.8, 0.1, 0], [0.1, 0.1, 0.8, 0], [0, 0, 0, 1.0]])
SHARP = np.array([[0.95, 0.05, 0, 0], [0.3, 0.7, 0, 0], [0.3, 0.1, 0.6, 0], [0, 0, 0, 1.0]])
BY = {"a": EVEN, "b": SHARP}


def known(rates, by=None, labels=1e7):
    """The confusion matrix of a judge whose errors are known; nothing that is truncated is labelled."""
    table = rates if isinstance(rates, dict) else {"all": rates}
    return Confusion.of({name: np.r_[m[:3], [[0] * 4]] * labels for name, m in table.items()}, by)


@pytest.fixture(scope="module")
def truth():
    return answers(np.random.default_rng(4), 30, 6, harm=HARMS, prefill=(0, 2, 4))


@pytest.mark.parametrize(("rates", "by"), [(EVEN, None), (BY, "category")])
@pytest.mark.parametrize("states", [KGram(1), Position()])
def test_expected_verdicts_give_back_the_chain_of_the_truth(truth, rates, by, states):
    """Every rollout stands once for each verdict, weighted, hit where it was: then all states come back exactly."""
    right = estimate(count(truth, states))
    said = count(spread_out(truth, rates), states)
    found = corrected_harm(said, known(rates, by))
    h = hitting_probability(right, "harm")
    assert estimate(said).states == right.states
    assert np.allclose(found.value, h.value, atol=1e-9)
    assert np.abs(hitting_probability(estimate(said), "harm").value - h.value).max() > 0.03  # without it they do not
    for k in (0, 2, 4):
        rows = truth.prefill == k
        assert found.info["entry"][k].value == pytest.approx((truth.outcome[rows] == HARM).mean(), abs=1e-9)
    assert found.at_start.value == found.info["entry"][0].value
    S = len(said.states)
    assert found.lower[S:].tolist() == found.upper[S:].tolist() == [1, 0, 0, 0]  # outcomes are what they are called
    assert np.all((found.lower <= h.value + 1e-9) & (h.value <= found.upper + 1e-9))


def test_the_start_is_the_corrected_share_whatever_the_states(truth):
    """The chain adds nothing there: its value and interval are those of the rollouts."""
    rng = np.random.default_rng(8)
    said = judged(truth, MILD, rng)
    found = confusion(said, some(rng, truth, 200))
    rates = corrected(said, found)
    for states in (KGram(1), KGram(3), Position()):
        start = corrected_harm(count(said, states), found)
        for k, b in start.info["entry"].items():
            i = rates.info["coords"]["depth"].index(k)
            assert (b.value, b.lower, b.upper) == (rates.value[i], rates.lower[i], rates.upper[i])
        assert start.at_start.reasons["judge"] > 0
        assert start.at_start.reasons["sampling"] > 0


def test_a_file_of_a_chain_keeps_enough(truth, tmp_path):
    said = judged(truth, MILD, np.random.default_rng(1))
    chain, found = estimate(count(said, KGram(1))), confusion(said, truth)
    write_chain(chain, tmp_path / "c.npz")
    again = read_chain(tmp_path / "c.npz")
    if again.counts is None:
        with pytest.raises(InputError, match="does not say what its outcomes were counted from"):
            corrected_harm(again, found)
    else:
        assert np.allclose(corrected_harm(again, found).value, corrected_harm(chain, found).value)


def test_few_labels_widen_every_state_and_a_coin_is_refused(truth):
    said = judged(truth, MILD, np.random.default_rng(3))
    counts = count(said, KGram(1))
    few, many = (corrected_harm(counts, known(MILD, labels=n)) for n in (30, 3000))
    S = len(counts.states)
    assert np.all(few.upper[:S] - few.lower[:S] >= many.upper[:S] - many.lower[:S] - 1e-12)
    assert np.all(few.reasons["judge"][:S] > many.reasons["judge"][:S])
    with pytest.raises(UntrustedError) as caught:
        corrected_harm(counts, Confusion.of([[1, 1], [10, 10]]))
    assert caught.value.partial.shape == few.shape


def test_errors_that_follow_the_position_are_right_at_the_start_only():
    """A judge that misses late harm: labels at random from the same depth still correct that depth, not another."""
    rng = np.random.default_rng(21)
    truth = answers(rng, 200, 12, harm={"a": 0.4, "b": 0.4}, prefill=(0,), spread=8)
    said = judged(truth, MILD, rng, late=0.9)
    real = (truth.outcome == HARM).mean()
    found = confusion(said, truth)
    assert found.rates()[HARM, HARM] < 0.72  # 0.75 without what comes late
    harm = corrected_harm(count(said, Position()), found)
    assert harm.at_start.lower < real < harm.at_start.upper
    assert abs(harm.at_start.value - real) < 1e-9  # all are labelled: the correction undoes what it was made from
    late = hitting_probability(estimate(count(truth, Position())), "harm")
    deep = list(estimate(count(truth, Position())).states).index(4)
    assert harm.value[deep] < late.value[deep] - 0.05


@settings(deadline=None, derandomize=True, max_examples=60)
@given(st.integers(0, 2**32 - 1))
def test_true_outcomes_are_a_law_and_the_inverse_where_that_is_one(seed):
    rng = np.random.default_rng(seed)
    M = 0.6 * np.eye(4) + 0.4 * rng.dirichlet(np.ones(4), 4)
    x = rng.dirichlet(np.ones(4))
    assert np.allclose(true_outcomes(x @ M, M), x, atol=1e-9)
    odd = true_outcomes([0.0, 0.5, 0.5, 0.0], M)  # no law explains that nothing is judged harmful
    assert odd.min() >= 0
    assert odd.sum() == pytest.approx(1)

    def likelihood(law):
        return np.sum([0.5, 0.5] * np.log((law @ M)[1:3]))

    for _ in range(20):
        other = 0.9 * odd + 0.1 * rng.dirichlet(np.ones(4))
        assert likelihood(other) <= likelihood(odd) + 1e-9


@pytest.mark.parametrize(("rates", "by"), [(EVEN, None), (BY, "category")])
def test_corrected_counts_carry_the_corrected_share_at_every_depth(truth, rates, by):
    said = spread_out(truth, rates)
    counts, found = count(said, KGram(1)), known(rates, by)
    right = corrected_counts(counts, found)
    assert right.rollouts == pytest.approx(counts.rollouts)
    assert right.transitions.count.min() > 0
    assert right.transitions.count.sum() == pytest.approx(counts.transitions.count.sum())
    assert right.passages.count.sum() == pytest.approx(counts.passages.count.sum())
    t = right.tally
    for k in (0, 2, 4):
        rows = t.prefill == k
        real = (truth.outcome[truth.prefill == k] == HARM).mean()
        assert t.outcomes[rows, HARM].sum() / t.outcomes[rows].sum() == pytest.approx(real, abs=1e-9)
        own = counts.tally.outcomes[counts.tally.prefill == k]
        assert abs(own[:, HARM].sum() / own.sum() - real) > 0.02
    only = right.select(prefill=0)
    start = hitting_probability(estimate(only), "harm").at_start.value
    assert start == pytest.approx((truth.outcome[truth.prefill == 0] == HARM).mean(), abs=1e-9)
    assert np.array_equal(counts.select(prefill=0).entry[0][: len(only.states)].round(12), only.entry[0][:-4].round(12))


def test_a_perfect_judge_changes_no_counts(truth):
    counts = count(truth, KGram(2))
    assert corrected_counts(counts, known(np.eye(4))).equals(counts)


def test_gaps_of_the_labels_are_filled_with_what_is_known():
    M = full_rates(Confusion.of([[8, 2], [1, 9]]))
    assert M[1].tolist() == [0.1, 0.9, 0, 0]
    assert M[3].tolist() == [0.1, 0, 0, 0.9]
    assert full_rates(Confusion.of([[8, 2], [0, 0]]))[2].tolist() == [0, 0, 1, 0]


def test_bad_input(truth):
    found = known(MILD)
    with pytest.raises(InputError, match="does not say what its outcomes"):
        corrected_harm(truth, found)
    with pytest.raises(InputError, match="are no Counts"):
        corrected_counts(truth, found)
    with pytest.raises(InputError, match="no confusion matrix"):
        corrected_counts(count(truth, KGram(1)), np.eye(4))
    with pytest.raises(InputError, match="level"):
        corrected_harm(count(truth, KGram(1)), found, level=0)
    silent = Confusion.of(np.diag([5.0, 0, 5, 0]) + np.eye(4, k=1) * [[0], [9], [0], [0]])
    with pytest.raises(InputError, match="do not explain the verdict 'refusal'"):
        corrected_counts(count(truth, KGram(1)), silent)
