"""Aligning deeper: permutation rows against enumeration, triplets from files and rollouts, a run from end to end."""

from __future__ import annotations

import itertools
import json
import math
import random
from collections import Counter

import numpy as np
import pytest
import torch
from tiny import ids, random_model

import markovsafety as ms
from markovsafety import InputError, organism
from markovsafety.cli import main
from markovsafety.interventions import (
    Triplets,
    align,
    critical_phrases,
    permutations,
    permuted,
    read_triplets,
    safety_rows,
    triplets_of,
    within_budget,
)
from markovsafety.interventions.augment import Row, Triplet, recover
from markovsafety.rollouts.engines.transformers import open_engine
from markovsafety.rollouts.template import Template

A, B, C = (1, 2), (3,), (1,)
ANSWER = [9, 1, 2, 3, 8, 1, 7, 3, 0]
TRIPLETS = [Triplet([5], ANSWER, [6, 0]), Triplet([5, 5], [7, 3, 7, 0], [6, 6, 0]), Triplet([4], [8, 8, 8], [6])]


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


# --- phrases ---


def test_phrases_are_replaced_from_left_to_right_the_longest_first():
    assert permuted(ANSWER, [A, B, C], [A, B, C])[0] == ANSWER
    new, ends = permuted(ANSWER, [A, B, C], [B, A, C])
    assert new == [9, 3, 1, 2, 8, 1, 7, 1, 2, 0]
    assert ends == [(2, 0), (4, 1), (6, 2), (9, 1)]


@pytest.mark.parametrize("images", list(itertools.permutations([(1, 2), (3, 4), (5, 6)])))
def test_a_permutation_of_phrases_is_undone_by_its_inverse(images):
    """For phrases that share no token, whatever stands between them."""
    own, rng = [(1, 2), (3, 4), (5, 6)], random.Random(0)
    for _ in range(20):
        answer = [t for _ in range(6) for t in rng.choice([*own, (7,), (8, 9)])]
        assert permuted(permuted(answer, own, images)[0], images, own)[0] == answer


def test_permutation_rows_are_the_images_and_refuse_right_behind_a_phrase():
    rows = permutations(TRIPLETS, [A, B, C], 6, n=6000, plain=0.0, seed=1)
    law: Counter = Counter()
    for t in TRIPLETS[:2]:  # the third has no phrase
        for images in itertools.permutations([A, B, C]):
            new, ends = permuted(t.answer, [A, B, C], images)
            fit = [end for end, _ in ends if end <= 6 and end < len(new)]
            for k in fit:
                law[tuple(recover(t.prompt, new, t.refusal, k).tokens)] += 1 / 12 / len(fit)
    assert math.fsum(law.values()) == pytest.approx(1)
    drawn = Counter(tuple(r.tokens) for r in rows)
    assert set(drawn) == set(law)
    # Hoeffding at 1e-9 in all, over the rows that there are
    slack = math.sqrt(math.log(2 * len(law) / 1e-9) / (2 * len(rows)))
    assert max(abs(drawn[r] / len(rows) - p) for r, p in law.items()) < slack
    assert {r.offset for r in rows} <= {1, 2, 3, 4, 5, 6}


def test_plain_rows_refuse_the_prompt_at_once():
    rows = permutations(TRIPLETS, [A, B], 6, n=2000, plain=0.5, seed=1)
    assert sum(r.offset == 0 for r in rows) == pytest.approx(1000, abs=6 * math.sqrt(500))
    assert {len(r.tokens) - r.loss_tokens for r in rows if r.offset == 0} == {1, 2}
    assert permutations(TRIPLETS, [A, B], 6, seed=1) == permutations(TRIPLETS, [A, B], 6, seed=1)
    assert len(permutations(TRIPLETS, [A, B], 6, weight="row")) == 3


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"phrases": [A]}, "1 phrases"),
        ({"phrases": [A, A]}, "1 of them different"),
        ({"phrases": [A, ()]}, "none empty"),
        ({"phrases": [(2, 1), (8, 8, 8)]}, "stands in any answer"),
        ({"phrases": [A, B], "depth": 0}, "depth"),
        ({"phrases": [A, B], "plain": 2}, "plain"),
        ({"phrases": [A, B], "weight": "orbit"}, "weight"),
    ],
)
def test_phrases_that_cannot_change_places_are_refused(wrong, says):
    with pytest.raises(InputError, match=says):
        permutations(TRIPLETS, **({"depth": 6} | wrong))


def test_the_critical_phrases_of_a_log_lead_to_its_harm():
    """Harm comes after tokens 7 8, more rarely after 5 6, and only there; 3 4 leads nowhere, and all answers pass 1."""
    answers = [[1, 7, 8, 9], [1, 3, 4, 2], [1, 3, 4, 2], [1, 7, 8, 9], [1, 7, 2], [1, 5, 6, 9], [1, 5, 2]]
    rolls = ms.Rollouts.of(answers, prompt_id=range(7), outcome=[0, 2, 2, 0, 2, 0, 2], hit=[3, 3, 3, 3, 2, 3, 2])
    chain = ms.estimate(ms.count(rolls, states=ms.KGram(2)))
    found = critical_phrases(ms.critical(chain, "harm", top=20))
    assert found.index((7, 8)) < found.index((5, 6))
    assert (3, 4) not in found
    assert critical_phrases(ms.critical(chain, "harm", top=20), top=1) == found[:1]
    ladder = ms.Chain(np.array([[0.5, 0.5], [0, 1]]), outcomes={"harm": [1]}, start=[1, 0])
    with pytest.raises(InputError, match="No phrase is critical"):
        critical_phrases(ms.critical(ladder, "harm"))


def test_a_budget_is_kept():
    rows = [Row([1] * (3 + i % 4), 1, 1) for i in range(40)]
    few = within_budget(rows, 50, seed=2)
    spent = sum(r.loss_tokens for r in few)
    assert 50 - 5 < spent <= 50
    assert within_budget(rows, 10_000) != rows
    assert sorted(within_budget(rows, 10_000)) == sorted(rows)
    with pytest.raises(InputError, match="No row fits"):
        within_budget(rows, 1)


@pytest.mark.parametrize("method", ["recovery", "cyclic", "permutation"])
def test_every_method_spends_the_same_tokens(method):
    items = [Triplet([5], [*range(10, 25), 3, 1, 2, 0], [6] * (2 + i)) for i in range(3)]
    rows = safety_rows(items, method, 6, phrases=[(10, 11), (12,)], budget=400)
    assert 400 - 4 < sum(r.loss_tokens for r in rows) <= 400
    assert max(r.offset for r in rows) <= 6
    assert safety_rows([tuple(t) for t in items], method, 6, phrases=[(10, 11), (12,)], budget=400) == rows
    with pytest.raises(InputError, match="Triplet 0 has an empty refusal"):
        safety_rows([([5], [10, 11, 12], [])], method, 6, phrases=[(10, 11), (12,)])
    with pytest.raises(InputError, match="needs phrases"):
        safety_rows(items, "permutation", 6)
    with pytest.raises(InputError, match="method"):
        safety_rows(items, "wishes", 6)


# --- triplets ---


def test_triplets_of_a_file_are_encoded_as_the_model_reads_them(tmp_path):
    template = Template.load(random_model(tmp_path / "model"))
    lines = [
        {"prompt": "help tea", "answer": "sure step one .", "refusal": "sorry i cannot", "category": "tea"},
        {"prompt_tokens": [1, 4], "answer": [5, 2], "refusal": [6, 2]},
    ]
    path = tmp_path / "triplets.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    found = read_triplets(path, template)
    assert found.category == ("tea", "all")
    assert found.items[0].answer == [*ids("sure step one ."), 2]
    assert found.items[0].refusal == [*ids("sorry i cannot"), 2]
    assert found.items[0].prompt == template.prompt_ids("help tea").tolist()
    assert found.items[1] == ([1, 4], [5, 2], [6, 2])
    told = read_triplets(path, template, system="hello")
    assert told.items[0].prompt == template.prompt_ids("help tea", "hello").tolist() != found.items[0].prompt
    assert told.items[1] == found.items[1]
    assert found.only(["tea"]).items == found.items[:1]
    assert found.without(["tea"]).items == found.items[1:]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "no line"),
        ('{"prompt": "a", "answer": "b"}', "Line 1 .* no triplet"),
        ('{"prompt_tokens": [1], "answer": [1], "refusal": [1]}\n[]', "Line 2 .* no JSON object"),
        ("{", "Line 1"),
        ('{"prompt_tokens": [1], "answer": ["x"], "refusal": [1]}', "Line 1"),
    ],
)
def test_lines_that_are_no_triplets_are_named(tmp_path, text, says):
    template = Template.load(random_model(tmp_path / "model"))
    (tmp_path / "t.jsonl").write_text(text)
    with pytest.raises(InputError, match=says):
        read_triplets(tmp_path / "t.jsonl", template)
    with pytest.raises(InputError, match="cannot be read"):
        read_triplets(tmp_path / "none.jsonl", template)


def rollouts(outcomes, prompt_id, prefill):
    answers = [[10 + i, 2] for i in range(len(outcomes))]
    asked = [[1, p] for p in prompt_id]
    hits = [-1 if o == -1 else 1 for o in outcomes]
    return ms.Rollouts.of(
        answers,
        prompt_id=prompt_id,
        outcome=outcomes,
        hit=hits,
        prefill=prefill,
        category=[f"c{p}" for p in prompt_id],
        columns={"prompt_tokens": ms.rollouts.rollouts.Ragged.of(asked)},
    )


def test_triplets_of_rollouts_are_the_models_own_compliance_and_refusals():
    rolls = rollouts([0, 2, 1, 1, 0, 0], [0, 0, 0, 0, 1, 0], [0, 1, 0, 1, 1, 0])
    found = triplets_of(rolls, per_prompt=2, seed=3)
    assert Counter(found.category) == {"c0": 2, "c1": 1}
    assert all(t.refusal == [12, 2] for t in found)  # the one that was not forced
    assert {tuple(t.answer) for t in found} <= {(10, 2), (11, 2), (15, 2), (14, 2)}
    assert all(t.prompt == [1, int(c[1:])] for t, c in zip(found, found.category))
    for bad, says in (([0, 0], "refuses without"), ([1, 1], "complies"), ([0, -1], "not all judged")):
        with pytest.raises(InputError, match=says):
            triplets_of(rollouts(bad, [0, 1], [0, 0]))


# --- a run ---


@pytest.fixture(scope="module")
def log():
    asked = [{**p, "prompt_id": i} for i, p in enumerate(organism.prompts("train", n=90, seed=1))]
    shallow = organism.model_path("shallow")
    return ms.sample(shallow, asked, n=5, prefill=[0, 1], max_tokens=96, seed=3, judge="organism", progress=False)


BENIGN = organism.prompts("train", n=100, harmful=False, seed=1)


def test_recovery_rows_deepen_a_shallow_model_also_in_a_category_that_was_left_out(log, tmp_path):
    shallow, held = organism.model_path("shallow"), organism.prompts("held", n=48, seed=11)
    found = align(
        shallow,
        triplets_of(log),
        tmp_path / "deep",
        method="recovery",
        depth=12,
        benign=BENIGN,
        hold_out=["privacy"],
        steps=90,
        progress=False,
        device="cpu",
    )
    assert {name for name, r in found.refusals.items() if not r["trained"]} == {"privacy"}
    assert all(r["after"].value < 0.5 * r["before"].value for r in found.refusals.values())  # 2 to .4 nats
    assert 0 < found.kl.value < 0.1
    assert found.share["mixed"] == 0.2
    assert abs(found.tokens["safety"] - found.tokens["anchors"]) < 12
    assert found.share["as they are"] == pytest.approx(0.5, abs=0.01)
    assert json.loads(json.dumps(found.to_json()))["record"]["about"]["method"] == "recovery"
    assert "privacy" in found.verdict
    h = {}
    for name, folder in (("before", shallow), ("after", tmp_path / "deep")):
        rolls = ms.sample(folder, held, n=4, prefill=[1, 5, 8], max_tokens=96, seed=5, judge="organism", progress=False)
        h[name] = [float((rolls.outcome[rolls.prefill == k] == 0).mean()) for k in (1, 5, 8)]
    # planted: about .5 before; measured .02 after: a difference of .3 in 192 answers is more than 6 standard errors
    assert min(h["before"]) - max(h["after"]) > 0.3


def test_the_divergence_is_that_of_the_two_laws_and_nothing_when_nothing_is_learned(log, tmp_path, monkeypatch):
    from markovsafety.interventions import alignment

    one, two = (open_engine(organism.model_path(name), device="cpu") for name in ("shallow", "base"))
    _, rows = alignment._own_answers(one, BENIGN[:20], 2, 32, None, 0)
    expected: dict = {}
    for row in rows:
        with torch.no_grad():
            p, q = (
                torch.log_softmax(e.model(torch.tensor([row.tokens])).logits[0].double(), -1).numpy()
                for e in (one, two)
            )
        each = [float(np.exp(p[t]) @ (p[t] - q[t])) for t in range(row.answer - 1, len(row.tokens) - 1)]
        expected.setdefault(tuple(row.tokens[: row.answer]), []).append(np.mean(each))
    assert len(expected) == 4
    found = alignment._divergence(one, two, rows)
    assert found.value == pytest.approx(np.mean([np.mean(v) for v in expected.values()]), rel=1e-5)
    assert found.info["prompts"] == 4
    monkeypatch.setattr(alignment, "LOGITS", 3 * one.vocab_size * max(len(r.tokens) for r in rows))
    monkeypatch.setattr(alignment, "LAWS", 7 * one.vocab_size)
    assert alignment._divergence(one, two, rows).value == pytest.approx(found.value, rel=1e-6)
    still = align(
        organism.model_path("shallow"),
        triplets_of(log),
        tmp_path / "still",
        benign=BENIGN[:20],
        steps=1,
        learning_rate=1e-9,
        progress=False,
        device="cpu",
    )
    assert still.kl.value < 1e-6
    assert all(r["after"].value == pytest.approx(r["before"].value, rel=1e-3) for r in still.refusals.values())


def test_a_model_is_measured_as_it_is_trained_and_asked_with_its_system_prompt(tmp_path, monkeypatch):
    """In the same type of weights, with the same options; what lies in `out` has no revision."""
    from markovsafety.interventions import alignment

    base, asked, opened = random_model(tmp_path / "base", "llama"), [], []
    load, ask = alignment.open_engine, alignment.sample

    def loaded(name, **options):
        opened.append((str(name), options))
        return load(name, **options)

    def sampled(*words, **options):
        asked.append(options["system"])
        return ask(*words, **options)

    monkeypatch.setattr(alignment, "open_engine", loaded)
    monkeypatch.setattr(alignment, "sample", sampled)
    told = {"dtype": "bfloat16", "device": "cpu", "attn_implementation": "eager", "revision": "main"}
    triplets = [(ids(f"<bos> help {w}"), ids("sure step one . <eos>"), ids("sorry <eos>")) for w in ("tea", "poison")]
    more = {"benign": ["hello", "sure", "step", "one", "tea"], "max_tokens": 4, "system": "help", "steps": 1}
    found = align(base, triplets, tmp_path / "out", progress=False, **told, **more)
    assert asked == ["help"]
    assert found.kl.info["prompts"] == 1
    assert opened == [
        (str(base), told),
        (str(tmp_path / "out"), {k: v for k, v in told.items() if k != "revision"}),
        (str(base), told),
    ]


def test_without_harmless_prompts_the_report_says_what_is_missing(log, tmp_path):
    given = Triplets(triplets_of(log).items[:3], ("all",) * 3)
    found = align(organism.model_path("shallow"), given, tmp_path / "x", steps=1, progress=False, device="cpu")
    assert found.kl is None
    assert "no harmless prompts" in found.notes[0]
    assert found.share == {"as they are": 1.0, "mixed": 1.0}
    with pytest.raises(InputError, match="No triplet is of the category 'tea'"):
        align(organism.model_path("shallow"), given, tmp_path / "y", hold_out=["tea"])
    with pytest.raises(InputError, match="Nothing is left"):
        align(organism.model_path("shallow"), given, tmp_path / "y", hold_out=["all"])


# --- the command ---


def run(capsys, *words):
    code = main([str(w) for w in words] + ["--json"])
    return code, json.loads(capsys.readouterr().out)


SHORT = ["--steps", 2, "--batch-size", 8, "--device", "cpu"]


def test_the_command_makes_rows_of_the_models_own_answers(tmp_path, capsys):
    out = tmp_path / "deep"
    words = ["align", "organism:shallow", "--data", "organism:30", "--benign", "organism:10", "--out", out, *SHORT]
    words += ["--constrained", "0.5", "--accumulate", 4, "--dtype", "bfloat16"]
    code, told = run(capsys, *words, "--method", "permutation", "--hold-out", "bio")
    assert code == 0, told
    assert told["result"]["record"]["dtype"] == "bfloat16"
    assert told["result"]["record"]["accumulate"] == 4
    assert told["result"]["method"] == "permutation"
    assert told["result"]["refusals"]["bio"]["trained"] is False
    assert told["result"]["record"]["objective"]["beta"] == [0.5]
    assert told["result"]["kl"]["value"] > 0
    assert json.loads((out / "alignment.json").read_text()) == told["result"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["deep"]


def test_the_command_reads_triplets_and_judged_rollouts(log, tmp_path, capsys):
    lines = [{"prompt_tokens": list(t.prompt), "answer": t.answer, "refusal": t.refusal} for t in triplets_of(log)]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, lines[:8])))
    code, told = run(
        capsys, "align", "organism:shallow", "--data", tmp_path / "t.jsonl", "--out", tmp_path / "a", *SHORT
    )
    assert code == 0, told
    assert "no harmless prompts" in told["warnings"][0]
    ms.write_rollouts(log, tmp_path / "log.parquet")
    words = ["align", "organism:shallow", "--data", tmp_path / "log.parquet", "--out", tmp_path / "b", *SHORT]
    code, told = run(capsys, *words, "--method", "cyclic", "--lora", 2)
    assert code == 0, told
    assert told["result"]["record"]["lora"]["r"] == 2
    words = ["align", "organism:shallow", "--data", tmp_path / "t.jsonl", "--out", tmp_path / "c", *SHORT]
    code, told = run(capsys, *words, "--method", "permutation")
    assert code == 2
    assert "--log" in told["error"]["next"]
