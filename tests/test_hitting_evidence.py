"""The front doors on estimated chains, and what they refuse."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from scipy.stats import t as student

import markovsafety as ms
from markovsafety.bound import clopper_pearson, clustered
from markovsafety.chains import Evidence
from markovsafety.hitting import blocks
from markovsafety.rollouts import Rollouts

ENDS = {3: 0, 4: 1, 5: 2}  # tokens 3, 4, 5 end an answer in harm, refusal, benign


def answers(n=600, prompts=12, prefill=0, seed=0):
    """Rollouts of a chain on tokens 0 .. 2 whose prompts differ in how harmful they are."""
    rng = np.random.default_rng(seed)
    tokens, hits, ends, who = [], [], [], []
    for i in range(n):
        prompt = i % prompts
        harm = 0.02 + 0.02 * prompt
        answer = rng.integers(3, size=prefill).tolist()
        while len(answer) < 25 + prefill:
            last = answer[-1] if answer else 0
            stop = 0.3 if last == 2 else 0.15
            p = np.array([0.3, 0.3 + 0.1 * (last == 0), 0.4 - 0.1 * (last == 0)]) * (1 - stop)
            answer.append(int(rng.choice(6, p=[*p, stop * harm, stop * (1 - harm) / 2, stop * (1 - harm) / 2])))
            if answer[-1] in ENDS:
                break
        done = answer[-1] in ENDS
        tokens.append(answer)
        ends.append(ENDS.get(answer[-1], 3))
        hits.append(len(answer) - 1 if done else -1)
        who.append(prompt)
    size = np.array([len(a) for a in tokens])
    return Rollouts(
        np.concatenate(tokens).astype(np.int32),
        np.concatenate([[0], np.cumsum(size)]),
        np.array(who),
        np.array(["a" if i % 2 else "b" for i in who]),
        np.full(n, prefill, dtype=np.int32),
        np.array(ends, dtype=np.int8),
        np.array(hits, dtype=np.int32),
    )


@pytest.fixture(scope="module")
def rolls():
    return answers()


@pytest.fixture(scope="module")
def chain(rolls):
    return ms.estimate(ms.count(rolls, states=ms.KGram(1)))


def lengths(rolls):
    size = np.diff(rolls.offsets) - rolls.prefill
    return np.where(rolls.hit >= 0, rolls.hit + 1 - rolls.prefill, size + 1)  # truncation is a transition as well


def test_start_is_the_raw_fraction_with_its_clustered_interval(rolls, chain):
    bound = ms.hitting_probability(chain, "harm").at_start
    per_prompt = [(rolls.outcome[rolls.prompt_id == k] == 0).sum() for k in range(12)]
    raw = clustered(per_prompt, [50] * 12)
    assert bound.value == pytest.approx(raw.value, abs=1e-12)
    assert (bound.lower, bound.upper) == pytest.approx((raw.lower, raw.upper), abs=1e-12)
    assert bound.level == 0.95
    assert bound.reasons["sampling"] == pytest.approx((raw.upper - raw.lower) / 2, abs=1e-12)
    assert 0 < bound.reasons["rounding"] < 1e-12
    assert bound.reasons["judge"] is None
    wide = ms.hitting_probability(chain, "harm", level=0.999).at_start
    assert wide.level == 0.999
    assert wide.upper > bound.upper
    both = ms.hitting_probability(chain, ["harm", "refusal"]).at_start
    assert both.value == pytest.approx((rolls.outcome <= 1).mean(), abs=1e-12)
    assert ms.committor(chain, "refusal", "harm").at_start.lower == pytest.approx(raw.lower, abs=1e-12)


def test_states_have_the_interval_of_their_visits(chain):
    bound = ms.hitting_probability(chain, "harm")
    n = chain.evidence.visits
    lower, upper = clopper_pearson(bound.value[:4] * n[:4], n[:4])
    assert bound.lower[:4] == pytest.approx(lower, abs=1e-10)
    assert bound.upper[:4] == pytest.approx(upper, abs=1e-10)
    assert bound.value[-4:].tolist() == [1, 0, 0, 0]  # outcomes are what they are by definition
    assert bound.lower[-4:].tolist() == bound.upper[-4:].tolist() == [1, 0, 0, 0]
    assert "sampling" in bound.info


def test_unseen_is_not_impossible(chain):
    """A target that was never reached, and a state that was never visited."""
    never = ms.hitting_probability(ms.estimate(ms.count(answers(40, prompts=1, seed=4), states=ms.KGram(1))), "harm")
    if never.at_start.value == 0:
        assert never.at_start.upper > 0.05
        assert (never.upper[:4] > 0).all()
    visits = np.array(chain.evidence.visits)
    visits[1] = 0
    evidence = Evidence(visits, *(getattr(chain.evidence, k) for k in ("prompt_id", "category", "prefill", "outcomes")))
    bound = ms.hitting_probability(dataclasses.replace(chain, evidence=evidence, counts=None), "harm")
    assert (bound.lower[1], bound.upper[1]) == (0, 1)


def test_a_target_the_rollouts_do_not_record_counts_prompts(chain):
    bound = ms.hitting_probability(chain, [(2,)]).at_start
    low, high = clopper_pearson(bound.value * 12, 12)
    assert (bound.lower, bound.upper) == pytest.approx((low, high), abs=1e-9)
    assert "prompt" in bound.info["sampling"]


def test_other_starts_use_their_own_rollouts(rolls, chain):
    both = ms.estimate(ms.count(rolls, states=ms.KGram(1)) + ms.count(answers(prefill=2, seed=1), states=ms.KGram(1)))
    forced = dataclasses.replace(both, start=both.entry[2])
    bound = ms.hitting_probability(forced, "harm").at_start
    assert bound.info["sampling"]["prefill"] == 2
    assert bound.info["sampling"]["total"] == 600
    mixed = np.full(both.n_states, 1 / both.n_states)
    other = ms.hitting_probability(dataclasses.replace(both, start=mixed), "harm")
    assert "no rollouts were started" in other.at_start.info["sampling"]
    assert other.at_start.lower == pytest.approx(other.lower.mean())


def test_expected_length_is_the_mean_length_with_its_variance_between_prompts(rolls, chain):
    bound = ms.hitting_time(chain).at_start
    size = lengths(rolls)
    assert bound.value == pytest.approx(size.mean(), rel=1e-12)
    means = np.array([size[rolls.prompt_id == k].mean() for k in range(12)])
    reach = student.ppf(0.975, 11) * means.std(ddof=1) / np.sqrt(12)
    assert (bound.upper - bound.lower) / 2 == pytest.approx(reach, rel=1e-9)
    assert bound.reasons["sampling"] == pytest.approx(reach, rel=1e-6)


def test_expected_length_from_a_law_of_starts():
    """Forced tokens leave the answers in different states; the variance of where they start counts as well."""
    rolls = answers(prefill=2, seed=1)
    counted = ms.estimate(ms.count(rolls, states=ms.KGram(1)))
    chain = dataclasses.replace(counted, start=counted.entry[2])
    assert np.count_nonzero(chain.start) == 3
    bound = ms.hitting_time(chain).at_start
    size = lengths(rolls)
    assert bound.value == pytest.approx(size.mean(), rel=1e-12)
    means = np.array([size[rolls.prompt_id == k].mean() for k in range(12)])
    reach = student.ppf(0.975, 11) * means.std(ddof=1) / np.sqrt(12)
    assert (bound.upper - bound.lower) / 2 == pytest.approx(reach, rel=1e-9)


def test_expected_length_of_harmful_answers(rolls, chain):
    bound = ms.hitting_time(chain, "harm", given=True).at_start
    size = lengths(rolls)[rolls.outcome == 0]
    assert bound.value == pytest.approx(size.mean(), rel=0.25)  # equal only if the chain is Markov: a sanity check
    assert bound.lower < bound.value < bound.upper
    assert bound.upper - bound.lower < 4
    kept = dataclasses.replace(chain, counts=None)  # as read from a file
    coarse = ms.hitting_time(kept, "harm", given=True).at_start
    assert coarse.value == bound.value
    assert coarse.upper - coarse.lower > bound.upper - bound.lower


def test_times_of_states_narrow_with_their_visits(rolls, chain):
    bound = ms.hitting_time(chain)
    few = ms.hitting_time(ms.estimate(ms.count(answers(60), states=ms.KGram(1))))
    assert (bound.lower <= bound.value).all()
    width = (bound.upper - bound.lower)[:4] / (few.upper - few.lower)[:4]
    assert (width < 0.6).all()  # ten times the rollouts: about 0.3
    assert (bound.lower[:4] > 0).all()


def test_visits_are_mean_visits(rolls, chain):
    bound = ms.visits(chain)
    assert bound.value == pytest.approx(chain.evidence.visits / 600, rel=1e-10)
    harm = ms.hitting_probability(chain, "harm").at_start
    where = chain.outcomes["harm"][0]
    assert (bound.lower[where], bound.upper[where]) == pytest.approx((harm.lower, harm.upper), abs=1e-9)
    assert (bound.lower[1:4] < bound.value[1:4]).all()
    assert (bound.upper[1:4] > bound.value[1:4]).all()
    assert (bound.lower[0], bound.upper[0]) == pytest.approx((1, 1), abs=1e-12)  # every answer begins there
    kept = ms.visits(dataclasses.replace(chain, counts=None))
    assert kept.reasons["sampling"] is None
    assert "not assessed" in kept.info["sampling"]


def test_harm_by_category(rolls):
    split = ms.estimate(ms.count(rolls, states=ms.KGram(1)), categories=True)
    bound = ms.hitting_probability(split, "harm").at_start
    assert bound.value == pytest.approx((rolls.outcome == 0).mean(), abs=1e-12)
    seen = ms.visits(split)
    odd = (rolls.outcome == 0) & (rolls.prompt_id % 2 == 1)
    assert seen.value[split.index("harm: a")] == pytest.approx(odd.mean(), abs=1e-12)
    time = ms.hitting_time(split, "harm: a", given=True).at_start
    assert time.lower < time.value < time.upper


COIN = ms.Chain([[0, 0.5, 0.5], [0, 0, 0], [0, 0, 0]], {"harm": 1, "refusal": 2})


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: ms.hitting_probability(COIN, "benign"), "neither an outcome nor a state"),
        (lambda: ms.hitting_probability(COIN, []), "target is empty"),
        (lambda: ms.hitting_probability(COIN, np.zeros(3, bool)), "target is empty"),
        (lambda: ms.hitting_probability(COIN, "harm", method="device"), "does not exist yet"),
        (lambda: ms.hitting_probability(COIN, "harm", method="symbolic"), "does not exist yet"),
        (lambda: ms.hitting_probability(COIN, "harm", method="guess"), "does not exist"),
        (lambda: ms.committor(COIN, [1, 2], "harm"), "belongs both"),
        (lambda: ms.committor(COIN, "harm", "harm"), "belongs both"),
        (lambda: ms.visits(COIN), "needs a start"),
        (lambda: ms.sensitivity(COIN, "harm"), "needs a start"),
        (lambda: ms.attribute(COIN, COIN, "harm"), "needs a start"),
        (lambda: ms.hitting_probability(COIN, "harm").at_start, "no value at a start"),
        (lambda: ms.hitting_probability(ms.toy.ladder(), "harm", method="layered"), "has cycles"),
        (lambda: ms.attribute(ms.toy.ladder(), ms.toy.ladder(7), "harm"), "different states"),
        (lambda: ms.attribute(ms.toy.ladder(), ms.Chain.layered([COIN.P], COIN.outcomes), "harm"), "layers"),
    ],
)
def test_what_is_refused(call, text):
    with pytest.raises(ms.InputError, match=text) as caught:
        call()
    assert caught.value.cause
    assert caught.value.next


def test_small_and_empty_cases():
    only = ms.Chain([[1.0]], {"harm": 0}, start=0)
    assert ms.hitting_probability(only, "harm").at_start.value == 1
    assert ms.hitting_time(only).at_start.value == 0
    assert ms.visits(only).value.tolist() == [1]
    # An outcome without states is declared but out of reach: 0 exactly, not an error.
    chain = ms.Chain(COIN.P, {"harm": [], "refusal": [1, 2]}, start=0)
    bound = ms.hitting_probability(chain, "harm")
    assert bound.value.tolist() == bound.upper.tolist() == [0, 0, 0]
    trap = ms.Chain([[1.0, 0], [0, 0]], {"harm": 1}, start=0)
    assert ms.hitting_probability(trap, "harm").at_start.upper == 0
    assert ms.hitting_time(trap).at_start.value == np.inf
    assert ms.hitting_probability(COIN, "harm").info["why"]


def nearly_closed(n=30):
    rng = np.random.default_rng(0)
    P = np.zeros((n + 2, n + 2))
    P[:n, :n] = rng.dirichlet(np.ones(n), size=n)
    P[0, n:] = 1e-17, 2e-17
    return ms.Chain(P, {"harm": n, "refusal": n + 1}, start=3)


def test_what_cannot_be_proven_is_not_returned(monkeypatch):
    assert ms.hitting_probability(nearly_closed(), "harm").at_start.value == pytest.approx(1 / 3, rel=1e-13)
    monkeypatch.setattr(blocks, "DENSE_LIMIT", 10)
    for certify in (True, False):
        with pytest.raises(ms.UntrustedError, match="No enclosure") as caught:
            ms.hitting_probability(nearly_closed(), "harm", certify=certify)
    with pytest.raises(ms.UntrustedError, match="No enclosure") as caught:
        ms.hitting_probability(nearly_closed(), "harm")
    partial = caught.value.partial
    assert (partial.lower[:30] == 0).all()
    assert (partial.upper[:30] == 1).all()
    assert partial.value[30:].tolist() == [1, 0]
    with pytest.raises(ms.InputError, match="limited to 10 states"):
        ms.hitting_probability(nearly_closed(), "harm", method="elimination")


@pytest.mark.parametrize("bridge", [1e-3, 1e-7])
def test_large_class_iterative_and_long_class_direct(bridge):
    """Classes too large to be eliminated at first choice: a random one, and a long thin one."""
    rng = np.random.default_rng(2)
    n, k = 350, 8
    P = np.zeros((n + 2, n + 2))
    for i in range(n):
        P[i, rng.choice(n, k, replace=False)] = rng.dirichlet(np.ones(k)) * (1 - bridge)
        P[i, n:] = bridge * rng.dirichlet([1, 1])
    chain = ms.Chain(P / np.maximum(P.sum(axis=1, keepdims=True), 1e-300), {"harm": n, "refusal": n + 1}, start=0)
    fast, slow = (ms.hitting_probability(chain, "harm", method=m) for m in ("auto", "elimination"))
    assert fast.value == pytest.approx(slow.value, rel=1e-9)
    assert (fast.lower <= slow.upper).all()
    assert (slow.lower <= fast.upper).all()
    if bridge == 1e-3:
        assert "BiCGStab" in fast.info["why"]
        assert (fast.upper - fast.lower).max() < 1e-10
    seen = ms.visits(chain)
    assert seen.value[n] == pytest.approx(fast.at_start.value, rel=1e-8)
    thin = ms.hitting_probability(ms.toy.ladder(900, 0.5), "harm")
    assert "LU" in thin.info["why"]
    assert thin.value == pytest.approx(np.arange(901) / 900, rel=1e-9)
