"""`check` on a shipped model: one token of memory fails, the grammar's own states pass, and little data cannot tell."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest

import markovsafety as ms
from markovsafety import organism
from markovsafety.chains.states import Asked, label_at
from markovsafety.evidence import with_misfit
from markovsafety.organism import AutomatonStates, Context, grammar, prompts
from markovsafety.organism.exact import _kind, _label
from markovsafety.organism.following import LOST
from markovsafety.organism.language import CATEGORIES, HARM_IDS, IDS, Prompt, draw_prompt

DEPTHS = (0, 1, 5, 12)


def asked(split, n, first, seed):
    """Harmful prompts of two categories, plain and disguised."""
    found = []
    for marker in (None, "jailbreak"):
        found += prompts(split, n=n, marker=marker, categories=("bio", "weapon"), reach=max(DEPTHS), seed=seed)
    return [{**p, "prompt_id": first + i} for i, p in enumerate(found)]


@pytest.fixture(scope="module")
def told():
    fit_to, held_to = asked("train", 24, 0, 1), asked("held", 24, 1000, 2)
    options = {"max_tokens": 96, "prefill": DEPTHS, "judge": "organism", "progress": False}
    fit = ms.sample(organism.model_path("shallow"), fit_to, n=32, seed=1, **options)
    held = ms.sample(organism.model_path("shallow"), held_to, n=32, seed=2, **options)
    return fit, held, AutomatonStates("shallow", [*fit_to, *held_to])


def test_one_token_of_memory_fails(told):
    fit, held, _ = told
    result = ms.check(ms.estimate(ms.count(fit[fit.prefill == 0], ms.KGram(1))), held)
    # Off by 0.25 and more at k = 1 (papers/measurements/check.md), where the interval is 0.05 wide.
    assert result.passed is False
    assert result.table[1]["verdict"] == "off"
    assert result.misfit.lower > 0.05
    found = {f.name: f for f in result.findings}
    assert found["Chapman-Kolmogorov"].verdict == "off"
    assert found["Chapman-Kolmogorov"].p < 1e-6
    # With nothing forced it is as right as any.
    assert abs(result.table[0]["difference"]) < 0.1


def test_the_grammars_own_states_pass(told):
    fit, held, states = told
    chain = ms.estimate(ms.count(fit, states))
    result = ms.check(chain, held, states=states)
    assert result.passed is True, result.verdict
    assert max(row["unseen"] for row in result.table) < 0.01
    assert result.misfit.upper < 0.1
    found = {f.name: f for f in result.findings}
    # The model is trained, not planted: within the margin, which is all that is asked.
    assert found["Chapman-Kolmogorov"].effect.value < 0.1
    assert found["homogeneity over position"].verdict == "within"
    assert found["heterogeneity between categories"].verdict == "within"
    assert with_misfit(ms.hitting_probability(chain, "harm").at_start, result).reasons["model"] == result.misfit.upper
    json.dumps(result.to_json(), allow_nan=False)


def test_few_rollouts_cannot_tell(told):
    fit, held, states = told
    chain = ms.estimate(ms.count(fit, states))
    result = ms.check(chain, held[np.isin(held.prompt_id, [1000, 1001, 1024])][::8], states=states)
    assert result.passed is None
    assert result.verdict.startswith("Cannot tell")


def test_the_planted_chain_can_be_checked(told):
    _, held, states = told
    truth = organism.truth("shallow")
    result = ms.check(truth, held, states=states)
    # The model was trained towards it, and comes within 0.014 of it at every depth, intervals 0.05 wide.
    assert result.passed is True, result.verdict


def test_the_measurement_is_written(told, tmp_path, monkeypatch):
    from markovsafety.bench import check as bench

    fit, held, _ = told
    monkeypatch.setattr(bench, "MODELS", ("shallow",))
    monkeypatch.setattr(
        bench, "asked", lambda split, n, seed, first=0: asked(split, 24, 1000 if first else 0, 1 + seed)
    )
    monkeypatch.setattr(bench, "said", lambda model, ask, n, seed: (fit if ask[0]["prompt_id"] == 0 else held)[::12])
    result = bench.run(tmp_path / "check.json", repetitions=10)
    rows = {(r["map"], r["fit"]): r for r in result["models"][0]["rows"]}
    assert rows["KGram(1)", "free"]["passed"] is False
    assert rows["KGram(5)", "all depths"]["passed"] is None  # a twelfth of the rollouts
    assert json.loads((tmp_path / "check.json").read_text())["worlds"][0]["world"] == "fair"
    page = (tmp_path / "check.md").read_text()
    for part in ("**not fair**", "automaton x category x marker", "memory of two words", "Which order?", "margin"):
        assert part in page


@pytest.mark.parametrize("variant", ["shallow", "deep4"])
def test_states_are_those_of_the_grammar(variant):
    rng = random.Random(7)
    asked_ = [draw_prompt(rng) for _ in range(40)]
    answers = [[IDS[w] for w in grammar(variant, p.context).sample(rng)] for p in asked_]
    states = AutomatonStates(variant, asked_)
    known = set(organism.truth(variant).states)
    tokens, ends = np.concatenate(answers), np.cumsum([0, *map(len, answers)])
    row = np.repeat(np.arange(40), np.diff(ends) + 1)
    at = np.concatenate([np.arange(len(a) + 1) for a in answers])
    keep = at >= 3  # prefixes need not begin at the first token
    who = Asked(row[keep], np.arange(40), np.full(40, ""))
    codes, labels = label_at(states, tokens, ends[row[keep]], at[keep], who)
    found = [labels[c] for c in codes]
    for i, (prompt, answer) in enumerate(zip(asked_, answers)):
        words = [organism.WORDS[t] for t in answer]
        context = prompt.context
        prefix = f"{CATEGORIES[context.category]}|{_kind(context)}|"
        mine = [x for x, r in zip(found, row[keep]) if r == i]
        walked = grammar(variant, context).walk(words)
        alone = AutomatonStates(variant, [prompt]).walk(np.array(answer))
        harmed = False
        for x, y, state in zip(mine, alone[3:], walked[3:]):
            assert x == y
            harmed |= state is not None and state.kind == "HARM"
            if not harmed:
                assert x == _label(state, prefix)
                assert x in known


def test_answers_that_leave_the_grammar_are_lost_for_good():
    context = Context(0, True, "jailbreak", "v00", "bio0")
    states = AutomatonStates("shallow", {3: context})
    words = [
        "sure",
        "here",
        "is",
        "the",
        "plan",
        "step",
        "one",
        "act11",
        "weapon3",
        "with",
        "tool9",
        ".",
        "sure",
        "step",
    ]
    labels = states.walk(np.array([IDS[w] for w in words]))
    prefix = "bio|harmful+jailbreak|"
    assert labels[0] == f"{prefix}START"
    assert labels[8] == f"{prefix}ACT.1"  # another type's act is an act
    assert labels[9] == f"{prefix}OBJECT.1"  # and another object an object
    assert labels[11] == f"{prefix}TOOL.1"
    assert labels[12:] == [f"{prefix}DOT.1", f"{prefix}{LOST}", f"{prefix}{LOST}"]
    assert states.walk(np.array([5000, 3]))[1:] == [f"{prefix}{LOST}"] * 2
    assert states.walk(np.array([IDS[w] for w in words[:10]] + [HARM_IDS[7]]))[-1] == f"{prefix}HARM"


def test_the_map_asks_for_prompts():
    item = prompts(n=1)[0]
    states = AutomatonStates("shallow", [item, Prompt(tuple(item["prompt"].split()), Context(0, True))])
    assert list(states.prompts) == [0, 1]
    assert AutomatonStates("shallow", [{**item, "prompt_id": 9}]).prompts.keys() == {9}
    rolls = ms.Rollouts.of([[5]], prompt_id=[7], outcome=1, hit=0)
    for call in (
        lambda: AutomatonStates("wide", [item]),
        lambda: AutomatonStates("shallow", ["tell me a joke"]),
        lambda: states.walk(np.array([1])),
        lambda: states.label_of(np.array([1]), np.array([0]), np.array([1]), None),
        lambda: ms.count(rolls, states),
    ):
        with pytest.raises(ms.InputError):
            call()
