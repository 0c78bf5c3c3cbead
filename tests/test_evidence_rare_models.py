"""Rare harm of language models: prefixes that are split, rollouts that are weighted; statistical tests as beside."""

from __future__ import annotations

import numpy as np
import pytest
from tiny import ids, table_engine

import markovsafety as ms
from markovsafety import InputError, Rollouts, UntrustedError
from markovsafety.evidence import rare
from markovsafety.outcomes import CODES
from markovsafety.rollouts import LexiconJudge
from markovsafety.rollouts.continuing import continuing

SURE = 1 - 1e-8


def poisoned(tmp_path):
    """A table of words in which `poison` is rare, and the exact chance to hear it within 12 tokens of each prompt."""
    engine = table_engine(tmp_path)
    law = engine.law.copy()
    bad, near = ids("poison")[0], ids("step")[0]
    law[:, bad] = 1e-6
    law[near, bad] = 0.05
    law[:, near] *= 0.2
    law /= law.sum(axis=1, keepdims=True)
    engine.law[:] = law
    alive = law.copy()
    alive[:, bad] = alive[:, 2] = 0
    value = law[:, bad].copy()
    for _ in range(11):
        value = law[:, bad] + alive @ value
    prompts = ["hello", "tea"]
    first = [int(engine.tokenizer.prompt_ids(p)[-1]) for p in prompts]
    return engine, prompts, float(value[first].mean()), near


def test_splitting_continues_a_language_model(tmp_path):
    """One interval at level 1 - 1e-8, against the exact chain of the table."""
    engine, prompts, p, near = poisoned(tmp_path)
    go = continuing(engine, prompts, max_tokens=12, judge=LexiconJudge(harm=("poison",)))

    def score(rolls):
        rows = [np.concatenate([[0.0], a == near]) for a in rolls.answers()]
        return np.concatenate(rows)

    source = rare.Prefixes(go, score, prompts=2)
    bound = rare.splitting(source, n=60, replications=40, level=SURE)
    assert bound.lower <= p <= bound.upper < 10 * bound.lower
    assert 1.0 in bound.info["levels"]
    assert "2 prompts" in bound.info["note"]
    free = go(np.arange(400) % 2, [[]] * 400, 1)
    assert (free.outcome == CODES["harm"]).mean() < 0.05


def test_committor_scores_prefixes_by_their_state(tmp_path):
    engine, prompts, _, _ = poisoned(tmp_path)
    rolls = ms.sample(engine, prompts, n=200, max_tokens=12, judge=LexiconJudge(harm=("poison", "help")))
    states = ms.KGram(1)
    chain = ms.estimate(ms.count(rolls, states))
    value = rare.committor_score(chain, states)(rolls[:20])
    h = ms.hitting_probability(chain, "harm").value
    at = 0
    for answer in rolls[:20].answers():
        for i in range(len(answer) + 1):
            label = states.walk(answer)[i]
            known = label in chain.states
            assert value[at + i] == pytest.approx(h[chain.index(label)] if known else -np.inf)
        at += len(answer) + 1
    assert at == len(value)
    with pytest.raises(InputError, match="one matrix per position"):
        rare.committor_score(ms.Chain.layered([chain.P], chain.outcomes), states)


def test_continuations_are_checked():
    answers = Rollouts.of([[1, 2], [1, 2]], prompt_id=[0, 0], outcome=[1, 1], hit=[1, 1])
    rng = np.random.default_rng(0)
    start = rare.Prefixes(lambda *_: answers, lambda r: np.zeros(6)).begin(2, 1, rng)
    for made, score, says in (
        (answers[:1], np.zeros(6), "do not begin"),
        (answers.replace(outcome=[-1, -1], hit=[-1, -1]), np.zeros(6), "not judged"),
        (answers, np.zeros(4), "score has shape"),
    ):
        with pytest.raises(InputError, match=says):
            rare.Prefixes(lambda *_, m=made: m, lambda r, s=score: s).run(start, 1.0, rng)


def test_a_prefix_ends_where_it_first_counts():
    """Answers 0: level before the harm; 1: harm before the level; 2: neither, though its last token would reach it."""
    answers = Rollouts.of([[1, 2, 3]] * 3, prompt_id=[0] * 3, outcome=[0, 0, 1], hit=[2, 0, 2])
    scores = np.array([0, 0, 5, 0, 0, 0, 5, 5, 0, 0, 0, 5.0])
    rng = np.random.default_rng(0)
    source = rare.Prefixes(lambda *_: answers, lambda r: scores)
    hits, entered, tokens = source.run(source.begin(3, 1, rng), 5.0, rng)
    assert hits.tolist() == [0, 1]
    assert [p.tolist() for p in entered.prefixes] == [[1, 2], [1]]
    assert entered.score.tolist() == [5, np.inf]
    assert tokens == 9
    assert source.peak(source.begin(3, 1, rng), rng)[0].tolist() == [np.inf, np.inf, 0]


def test_continuations_keep_the_length_of_an_answer(tmp_path):
    engine, prompts, _, near = poisoned(tmp_path)
    go = continuing(engine, prompts, max_tokens=8, judge=LexiconJudge(harm=("poison",)))
    prefixes = [[near] * k for k in (0, 3, 7, 5)] * 10
    rolls = go(np.arange(40) % 2, prefixes, 3)
    assert rolls.lengths.max() == 8
    assert all(a[: len(p)].tolist() == p for a, p in zip(rolls.answers(), prefixes))
    assert (rolls.prefill == 0).all()
    assert go(np.arange(40) % 2, prefixes, 3) == rolls
    with pytest.raises(InputError, match="a prefix has 8 tokens"):
        go([0], [[near] * 8], 0)


def logged(law, tokens=((5, 6, 7, 8),) * 12, **sampling):
    n = len(tokens)
    flat = np.tile(np.asarray(law, np.float32), n)
    return Rollouts.of(
        tokens, prompt_id=np.arange(n) % 3, prefill=1, outcome=[0] * (n - 1) + [1], hit=[2] * (n - 1) + [3],
        columns={"logprob": flat}, provenance={"sampling": sampling},
    )  # fmt: skip


def test_weights_of_rollouts_stop_at_the_hit():
    truth, proposal = logged([np.nan, -2, -3, -90]), logged([np.nan, -1, -1, -1])
    bound = rare.importance(truth, proposal, prompts="fixed")
    assert bound.value == pytest.approx(11 / 12 * np.exp(-3.0))
    assert bound.info["prompts"] == 3
    mixed = rare.importance(truth, proposal, prompts="fixed", own=0.25)
    assert mixed.value == pytest.approx(11 / 12 * np.exp(-5) / (0.25 * np.exp(-5) + 0.75 * np.exp(-2)), rel=1e-6)
    heavy = rare.importance(proposal, truth, prompts="fixed", own=0.25)
    assert heavy.value <= 11 / 12 / 0.25


def test_rollouts_that_do_not_fit_are_refused():
    truth, proposal = logged([np.nan, -2, -3, -90]), logged([np.nan, -1, -1, -1])
    with pytest.raises(UntrustedError, match="cut off") as caught:
        rare.importance(truth, logged([np.nan, -1, -1, -1], top_p=0.9), prompts="fixed")
    assert caught.value.partial.value == pytest.approx(11 / 12 * np.exp(-3.0))
    with pytest.raises(InputError, match="not the same answers"):
        rare.importance(truth[:5], proposal)
    with pytest.raises(InputError, match="outcome 'harmless'"):
        rare.importance(truth, proposal, "harmless")
    with pytest.raises(InputError, match="own is 1"):
        rare.importance(truth, proposal, own=1)
    with pytest.raises(InputError, match="log-weight of rollout 0 is nan"):
        rare.importance(logged([np.nan, np.nan, -3, -90]), proposal)
