"""The front doors on estimated chains, and what they refuse."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from made import BENIGN, HARM, REFUSAL, TRUNCATED, ended, make, quick, rows
from scipy.stats import t as student

import markovsafety as ms
from markovsafety.bound import clopper_pearson, clustered
from markovsafety.chains import Evidence
from markovsafety.hitting import blocks, dissection, elimination, krylov
from markovsafety.rollouts import Rollouts

ENDS = {3: 0, 4: 1, 5: 2}  # tokens 3, 4, 5 end an answer in harm, refusal, benign


def answers(n=600, prompts=12, prefill=0, seed=0):
    """Rollouts of a chain on tokens 0 .. 2 whose prompts differ in how harmful they are."""
    rng = np.random.default_rng(seed)
    tokens, hits, ends, who = [], [], [], []
    for i in range(n):
        prompt = i % prompts
        harm = 0.02 + 0.02 * (prompt % 12)
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


def test_states_have_the_interval_of_what_their_rollouts_are_worth(chain):
    bound = ms.hitting_probability(chain, "harm")
    n = chain.evidence.trials(0)
    assert (n[:4] < chain.evidence.visits[:4]).all()
    lower, upper = clopper_pearson(bound.value[:4] * n[:4], n[:4])
    assert bound.lower[:4] == pytest.approx(lower, abs=1e-10)
    assert bound.upper[:4] == pytest.approx(upper, abs=1e-10)
    assert bound.value[-4:].tolist() == [1, 0, 0, 0]  # outcomes are what they are by definition
    assert bound.lower[-4:].tolist() == bound.upper[-4:].tolist() == [1, 0, 0, 0]
    assert "sampling" in bound.info


def test_visits_are_no_trials():
    """One rollout is one trial, however long it stays in a state."""
    chain = ms.estimate(ms.count(make([([1] * 200 + [9], HARM, 200, 0, 0)]), ms.KGram(1)))
    bound = ms.hitting_probability(chain, "harm")
    stay = bound[chain.index((1,))]
    assert stay.lower == pytest.approx(0.025, abs=1e-12)
    assert (stay.lower, stay.upper) == pytest.approx((bound.at_start.lower, bound.at_start.upper), abs=1e-12)
    assert "one prompt only" in str(stay)


def test_rollouts_of_one_prompt_are_no_independent_trials(tmp_path):
    data = [([1, 9], HARM, 1, 0, 0)] * 100 + [([1, 9], REFUSAL, 1, 0, 1)] * 100
    chain = ms.estimate(ms.count(make(data), ms.KGram(1)))
    back = ms.read_chain(ms.write_chain(chain, tmp_path / "c.npz"))
    for known in (chain, back):
        bound = ms.hitting_probability(known, "harm")
        state = bound[known.index((1,))]
        assert state.value == pytest.approx(0.5)
        assert (state.lower, state.upper) == pytest.approx((bound.at_start.lower, bound.at_start.upper), abs=1e-9)
        assert (state.lower, state.upper) == pytest.approx(clopper_pearson(1, 2), abs=1e-9)  # two coins
        # 2 of 2 prompts never were benign
        assert ms.hitting_probability(known, "benign").upper[0] == pytest.approx(clopper_pearson(0, 2)[1])
        # a state where one prompt of two came by counts as one trial, not as its rollouts
    alone = ms.estimate(ms.count(make([*data, *[([2, 9], HARM, 1, 0, 1)] * 50]), ms.KGram(1)))
    assert ms.hitting_probability(alone, "harm").lower[alone.index((2,))] == pytest.approx(0.025)


@quick
@given(rows())
def test_no_state_is_known_better_than_its_rollouts_allow(data):
    if not ended(data):
        return
    chain = ms.estimate(ms.count(make(data), ms.KGram(1)))
    bounds = [ms.hitting_probability(chain, name) for name in ms.OUTCOMES]
    walks = []
    for tokens, outcome, hit, forced, _ in data:
        stop = len(tokens) if outcome == TRUNCATED else hit
        walks.append({([-1, *tokens][i],) for i in range(forced, stop + 1)})
    for i, label in enumerate(chain.states[:-4]):
        rolls = [row for row, walk in zip(data, walks) if label in walk]
        assert chain.evidence.through[i] == len(rolls)
        prompts = sorted({row[4] for row in rolls})
        totals = np.array([sum(row[4] == p for row in rolls) for p in prompts])
        for code, bound in enumerate(bounds):
            low, high = clopper_pearson(np.clip(bound.value[i], 0, 1) * len(rolls), len(rolls))
            assert bound.lower[i] <= low + 1e-9
            assert bound.upper[i] >= high - 1e-9
            events = np.array([sum(row[4] == p and row[1] == code for row in rolls) for p in prompts])
            worth = chain.evidence.trials(code)[i]
            if len({row[4] for row in data}) == 1:
                assert worth == len(rolls)
                continue
            assert min(len(prompts), len(rolls)) <= worth <= len(rolls)
            alike = clustered(events, totals)
            if len(prompts) > 1 and len(set(totals)) == 1 and (alike.info["deff"] or 1.0) >= 1:
                others = [{row[4] for row in rolls if row[1] == c} for c in range(4) if c != code]
                if max(map(len, others)) == (events < totals).sum():  # else some are not known to have two outcomes
                    assert worth == pytest.approx(alike.info["n_eff"], rel=1e-9)


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
    before = ms.committor(chain, [(2,)], "harm").at_start  # harm is recorded, harm before a state is not
    assert before.upper == pytest.approx(clopper_pearson(before.value * 12, 12)[1], abs=1e-9)


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


def test_times_of_states_narrow_with_their_prompts(rolls, chain):
    bound = ms.hitting_time(chain)
    many = answers(600, prompts=120)  # ten times the prompts
    few, bound = bound, ms.hitting_time(ms.estimate(ms.count(many, states=ms.KGram(1))))
    more = ms.hitting_time(ms.estimate(ms.count(answers(120, prompts=12), states=ms.KGram(1))))
    assert more.upper[:4] - more.lower[:4] == pytest.approx(few.upper[:4] - few.lower[:4], rel=0.3)  # same prompts
    assert (bound.lower <= bound.value).all()
    width = (bound.upper - bound.lower)[:4] / (few.upper - few.lower)[:4]
    assert (width < 0.6).all()  # about 0.3
    assert (bound.lower[:4] > 0).all()


def test_times_without_spread_are_not_certain():
    data = [([1, 9], BENIGN, 1, 0, k) for k in range(3)]
    chain = ms.estimate(ms.count(make(data), ms.KGram(1)))
    bound = ms.hitting_time(chain)
    share = 1 - clopper_pearson(0, 3)[1]
    assert (bound.at_start.value, bound.at_start.lower) == pytest.approx((2, 2 * share))
    assert bound.at_start.upper == np.inf
    assert "no spread seen among 3 prompts" in str(bound.at_start)
    assert bound.lower[:2] == pytest.approx([2 * share, share])
    assert (bound.upper[:2] == np.inf).all()
    seen = ms.visits(chain)
    assert seen.lower[1] < seen.value[1] < seen.upper[1]
    zero = ms.hitting_time(chain, reward=np.zeros(chain.n_states))
    assert zero.at_start.upper < 1e-300  # by definition, up to underflow
    assert zero.upper[0] < 1e-300


def test_times_to_what_never_happened_are_not_called_proven():
    chain = ms.estimate(ms.count(make([([1, 9], BENIGN, 1, 0, k) for k in range(3)]), ms.KGram(1)))
    for given_hit, value in ((False, "inf"), (True, "nan")):
        start = ms.hitting_time(chain, "harm", given=given_hit).at_start
        assert str(start.value) == value
        assert start.level == 0.95
        assert "proven" not in str(start)
        assert "no interval (" in str(start)


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


def named(states):
    return ms.Chain(COIN.P, COIN.outcomes, 0, list(states))


COIN = ms.Chain([[0, 0.5, 0.5], [0, 0, 0], [0, 0, 0]], {"harm": 1, "refusal": 2})


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: ms.hitting_probability(COIN, "benign"), "neither an outcome nor a state"),
        (lambda: ms.hitting_probability(COIN, []), "target is empty"),
        (lambda: ms.hitting_probability(COIN, np.zeros(3, bool)), "target is empty"),
        (lambda: ms.hitting_probability(COIN, "harm", method="magic"), "does not exist"),
        (lambda: ms.hitting_probability(COIN, "harm", method="guess"), "does not exist"),
        (lambda: ms.committor(COIN, [1, 2], "harm"), "belongs both"),
        (lambda: ms.committor(COIN, "harm", "harm"), "belongs both"),
        (lambda: ms.visits(COIN), "needs a start"),
        (lambda: ms.sensitivity(COIN, "harm"), "needs a start"),
        (lambda: ms.attribute(COIN, COIN, "harm"), "needs a start"),
        (lambda: ms.hitting_probability(COIN, "harm").at_start, "no value at a start"),
        (lambda: ms.hitting_probability(ms.toy.ladder(), "harm", method="layered"), "has cycles"),
        (lambda: ms.attribute(ms.toy.ladder(), ms.toy.ladder(7), "harm"), "different states: 7 and 8"),
        (lambda: ms.attribute(named("abc"), named("abd"), "harm"), "only the first chain has 'c'"),
        (lambda: ms.attribute(named("abc"), named("acb"), "harm"), "another order, state 1 is 'b' in the first"),
        *((lambda f=f: f(COIN, level=1.5), "level is 1.5") for f in (ms.hitting_time, ms.visits)),
        *((lambda f=f: f(COIN, "harm", level=1.0), "level is 1.0") for f in (ms.hitting_probability, ms.critical)),
        (lambda: ms.committor(COIN, "refusal", "harm", level=0), "level is 0"),
        *((lambda f=f: f(np.eye(2), "harm"), "given a ndarray") for f in (ms.hitting_probability, ms.hitting_time)),
        (lambda: ms.visits(np.eye(2)), "given a ndarray"),
        (lambda: ms.attribute(COIN, ms.count(make([([1], 0, 0, 0, 0)])), "harm"), "given a Counts"),
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
    monkeypatch.setattr(elimination, "eliminate_class", lambda *a: None)
    monkeypatch.setattr(krylov, "solve", lambda *a: None)
    for certify in (True, False):
        with pytest.raises(ms.UntrustedError, match="No enclosure") as caught:
            ms.hitting_probability(nearly_closed(), "harm", certify=certify)
    with pytest.raises(ms.UntrustedError, match="No enclosure") as caught:
        ms.hitting_probability(nearly_closed(), "harm")
    partial = caught.value.partial
    assert (partial.lower[:30] == 0).all()
    assert (partial.upper[:30] == 1).all()
    assert partial.value[30:].tolist() == [1, 0]
    monkeypatch.setattr(dissection, "fronts", lambda *a: None)
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
    assert "nested dissection" in thin.info["why"]
    assert thin.value == pytest.approx(np.arange(901) / 900, rel=1e-9)
