"""Debiasing: the bias of random prompts, the edit that takes it off, and what it does, predicted before it is run."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

import markovsafety as ms
from markovsafety import interventions as iv
from markovsafety import organism
from markovsafety.cli import _parser, main
from markovsafety.errors import InputError, UntrustedError
from markovsafety.interventions.debias import _Sums
from markovsafety.interventions.debias_report import _chosen
from markovsafety.interventions.edits import Edit, Part
from markovsafety.interventions.tilt_prediction import tilt_weights
from markovsafety.rollouts import Rollouts
from markovsafety.rollouts.engines import Job, rollout_keys

ids = organism.WORDS.index
OPENERS = [ids(w) for w in ("sure", "okay", "certainly", "yes")]


@pytest.fixture(scope="module")
def hosts():
    return {name: iv.open_host(organism.model_path(name), device="cpu") for name in ("base", "shallow")}


@pytest.fixture(scope="module")
def table(hosts):
    return iv.bias_table(hosts["shallow"], hosts["base"], length=3, n=128, seed=1)


def planted(vocab: int) -> np.ndarray:
    """A known bias: 6 nats on refusals at the first token, some on other words at the second."""
    bias = np.zeros((2, vocab), np.float32)
    bias[0, organism.REFUSAL_IDS], bias[1, [ids("here"), ids("i")]] = 6.0, (-1.5, 2.0)
    return bias


# ------------------------------------------------------------------------------------------------------ the bias itself


def test_a_known_bias_is_found_and_taken_off():
    """The tuned model is the reference with known numbers on its logits, in float64: P4a and P4b."""
    host = iv.open_host(organism.model_path("base"), device="cpu")
    host.engine.model.double()
    truth = planted(host.vocab_size)
    tuned = Edit((Part("tilt", truth, when="answer"),))
    found = iv.bias_table(host, host, length=2, n=64, edit=tuned)
    host.engine.model.float()
    gap = np.where(found.counted, found.bias - truth, np.nan)
    assert np.nanmax(np.abs(gap - np.nanmean(gap, axis=1, keepdims=True))) < 1e-6
    assert found.counted[0, organism.REFUSAL_IDS].all()
    asked = organism.prompts("held", n=48, harmful=False)

    def said(edit):
        rolls = ms.sample(host.engine, asked, n=1, max_tokens=6, temperature=0, edit=edit)
        return [answer.tolist() for answer in rolls.answers()]

    plain = said(None)
    assert sum(a == b for a, b in zip(plain, said(tuned))) <= 0.05 * len(plain)
    assert said(tuned + found.edit().transferred()) == plain


def test_the_definition_holds_number_by_number(hosts):
    """One position, by hand: recorded laws of both models on the same random prompts."""
    from markovsafety.interventions.debias import random_prompts, token_pool

    made = iv.bias_table(hosts["shallow"], hosts["base"], ["sure please hack"], length=1, n=16, seed=5)
    pool = token_pool(hosts["shallow"], ["sure please hack"], hosts["base"].vocab_size)
    asked = random_prompts(hosts["shallow"], pool, 16, (3, 12), np.random.default_rng(5))
    laws = [iv.laws(hosts[name], asked)[:, 0].astype(float) for name in ("shallow", "base")]
    mean = (laws[0] - laws[1]).mean(axis=0)
    kept = made.counted[0]
    assert np.array_equal(kept, np.maximum(*(np.exp(law).mean(axis=0) for law in laws)) >= 1e-6)
    weight = sum(np.exp(law).mean(axis=0) for law in laws)[~kept]
    rest = (mean[~kept] * weight).sum() / weight.sum()  # tokens that do not count are one block
    np.testing.assert_allclose(made.bias[0, kept], mean[kept] - rest, atol=1e-4)
    assert not made.bias[0, ~kept].any()
    assert kept.any()
    assert not kept.all()


def test_safety_tuning_put_its_bias_on_the_first_token(table):
    """The organism's alignment changed start rows only; random words are half of them refused."""
    assert table.gap(organism.REFUSAL_IDS, OPENERS) > 3
    assert all(abs(table.gap(organism.REFUSAL_IDS, OPENERS, i)) < 1 for i in (1, 2))
    again = [table.bias[0, organism.REFUSAL_IDS] - table.bias[0, OPENERS].mean()]
    assert (np.array(again) > 8 * table.error[0, organism.REFUSAL_IDS]).all()


def test_tokens_that_do_not_count_keep_their_share():
    """Fifty rare tokens just above the floor must not decide what the tilt does to those below it."""
    ref = np.array([0.4, 0.4, *[1e-5] * 50, *[0.1999 / 200] * 200])
    ref /= ref.sum()
    bias = np.array([2.0, -2.0, *[-5.0] * 50, *[0.0] * 200])
    safe = ref * np.exp(bias)
    safe /= safe.sum()
    sums = _Sums.of(1, len(ref))
    for _ in range(3):
        laws = (torch.log(torch.tensor(p))[None, None] for p in (safe, ref))
        sums.add(*laws, torch.ones(1, 1, dtype=torch.bool))
    told = {"safe": "m", "ref": "r", "pool": "p", "n": 3, "response": "random"}
    made = sums.table(2e-3, told)
    assert made.counted[0].sum() == 2
    tilted = safe * np.exp(-made.bias[0])
    tilted /= tilted.sum()
    np.testing.assert_allclose(tilted[:2], ref[:2], rtol=0.01)
    np.testing.assert_allclose(tilted[2:].sum(), ref[2:].sum(), rtol=0.01)


@pytest.mark.parametrize("response", ["ref", "safe"])
def test_sampled_answers_count_up_to_their_end(hosts, response):
    made = iv.bias_table(hosts["shallow"], hosts["base"], length=8, n=48, response=response)
    assert (np.diff(made.seen) <= 0).all()
    assert made.seen[0] == 48
    assert (made.seen[-1] < 48) or response == "ref"


def test_answers_that_all_end_leave_a_shorter_table(hosts):
    """The first token ends every answer, because all words but two are made to end one."""
    host = hosts["shallow"]
    others = set(range(host.vocab_size)) - {ids("please"), ids("kindly")}
    template = dataclasses.replace(host.engine.tokenizer, eos_ids=tuple(sorted(others)))
    short = dataclasses.replace(host, engine=dataclasses.replace(host.engine, tokenizer=template))
    with pytest.raises(UntrustedError, match="reach position 2") as told:
        iv.bias_table(short, hosts["base"], length=4, n=8, response="safe")
    assert told.value.partial.length == 1
    assert told.value.partial.seen.tolist() == [8]


def test_files_and_edits(table, hosts, tmp_path):
    iv.write_bias_table(table, tmp_path / "bias.safetensors")
    again = iv.read_bias_table(tmp_path / "bias.safetensors")
    assert again.describe() == table.describe()
    assert np.array_equal(again.error, table.error)
    edit = again.edit(0.5, 2)
    part = edit.parts[0]
    assert part.vector.shape == (2, hosts["base"].vocab_size)
    assert part.scale == -0.5
    assert part.kind == "tilt"
    np.testing.assert_allclose(part.scale * part.vector, table.tilt(0.5, 2), atol=1e-6)
    with pytest.raises(InputError, match="another model"):
        edit.bind(hosts["base"])
    shuffled = edit.control(3).parts[0].vector
    assert np.array_equal(np.sort(shuffled, axis=1), np.sort(part.vector, axis=1))


def test_the_processor_does_what_the_edit_does(table, hosts):
    """Greedy answers of `generate`, with prompts of different lengths, padded on the left."""
    engine = hosts["shallow"].engine
    asked = organism.prompts("held", n=12)
    rolls = ms.sample(engine, asked, n=1, max_tokens=5, temperature=0, edit=table.edit(1.2))
    rows = [engine.tokenizer.prompt_ids(a["prompt"]) for a in asked]
    width = max(map(len, rows))
    given = torch.tensor([[0] * (width - len(r)) + r.tolist() for r in rows])
    config = transformers.GenerationConfig(do_sample=False, max_new_tokens=5, eos_token_id=2, pad_token_id=0)
    with torch.inference_mode():
        told = engine.model.generate(
            given,
            attention_mask=(torch.arange(width) >= width - torch.tensor([len(r) for r in rows])[:, None]).long(),
            generation_config=config,
            logits_processor=transformers.LogitsProcessorList([table.processor(width, 1.2)]),
        )
    for row, answer in zip(told[:, width:].tolist(), rolls.answers()):
        assert row[: len(answer)] == answer.tolist()
    with pytest.raises(InputError, match="columns"):
        table.processor(9)(torch.zeros(1, 4, dtype=torch.long), torch.zeros(1, hosts["base"].vocab_size))
    with pytest.raises(InputError, match="shape"):
        iv.TiltProcessor(np.zeros(3), 4)


# ------------------------------------------------------------------------------------------------------ the prediction


@pytest.fixture(scope="module")
def explored(hosts, table):
    asked = organism.prompts("held", n=48)
    strengths = (0.0, 0.5, 1.0)
    rolls = iv.explore(
        hosts["shallow"], asked, table, strengths, n=24, max_tokens=48, judge="organism", share=0.5, seed=3
    )
    return asked, strengths, rolls


def test_weights_are_ratios_of_probabilities(hosts, table, explored):
    """The engine scores the same answers with and without the edit, which knows nothing of weights."""
    rolls = explored[2][:64]
    engine = hosts["shallow"].engine
    answers = list(rolls.answers())
    none = [np.zeros(0, np.int32)] * len(answers)
    prompts = list(rolls.columns["prompt_tokens"])
    job = Job(
        prompts=prompts,
        prompt_of=np.arange(len(answers)),
        forced=none,
        keys=rollout_keys(0, np.arange(len(answers)), np.zeros(len(answers)), np.zeros(len(answers))),
        max_tokens=64,
        temperature=1.0,
        top_p=1.0,
        eos_ids=(2,),
        classes={},
    )
    scores = [e.score(job, answers).logprob for e in (engine, engine.edited(table.edit(0.7)))]
    wanted = [float(b.sum() - a.sum()) for a, b in zip(*scores)]
    np.testing.assert_allclose(tilt_weights(hosts["shallow"], rolls, [table.tilt(0.7)])[0], wanted, atol=1e-4)


def test_predicted_harm_is_what_is_sampled(hosts, table, explored):
    """All categories, three strengths; a sum of 21 squares of z, of which categories are 18 and nearly independent.

    A false alarm needs one of 21 normal numbers beyond 5.6: probability below 1e-6.
    """
    asked, strengths, rolls = explored
    predicted = iv.predict_tilt(hosts["shallow"], rolls, table, strengths)
    how: dict[str, Any] = {"n": 24, "max_tokens": 48, "judge": "organism"}
    sampled = {
        a: ms.sample(hosts["shallow"].engine, asked, edit=table.edit(a), seed=40 + i, **how)
        for i, a in enumerate(strengths)
    }
    rows = predicted.beside(sampled)
    assert len(rows) == 21
    assert max(abs(r["z"]) for r in rows) < 5.6
    assert predicted.at("all", 1.0)["predicted"].lower > predicted.at("all", 0.0)["predicted"].upper + 0.1
    assert "effective" in str(predicted)
    assert len(predicted.to_json()["table"]) == 21
    # Weights have the mean 1: the tilted law is a law.
    mean = predicted.terms[:, :, 0].mean(axis=1)
    assert (np.abs(mean - 1) < 0.25).all()


def test_exploring_covers_what_the_tilt_makes_likely(hosts, table, explored):
    """The weights of plain answers alone are worth fewer answers, and a harsh tilt cannot be told from them."""
    asked, _, rolls = explored
    free = ms.sample(hosts["shallow"].engine, asked, n=24, max_tokens=48, judge="organism", seed=3)
    strong = [2.5]
    alone = iv.predict_tilt(hosts["shallow"], free, table, strong).at("all", 2.5)
    both = iv.predict_tilt(hosts["shallow"], rolls, table, strong).at("all", 2.5)
    assert both["effective"] > 1.5 * alone["effective"]
    assert both["trusted"]
    few = iv.predict_tilt(hosts["shallow"], free[::12], table, strong)
    assert "cannot tell" in str(few)
    assert not few.at("all", 2.5)["trusted"]


def test_weights_of_explored_answers_are_bounded_and_have_the_mean_1(explored, table):
    rolls = explored[2]
    assert rolls.weight.max() <= 2 + 1e-9  # 1 / (1 - share)
    assert abs(rolls.weight.mean() - 1) < 0.2


def test_what_answers_hardly_show_is_said(hosts, explored, table):
    """A tilt of 16 nats towards a word that is hardly ever said second: plain answers cannot tell, and say so."""
    tilt = np.zeros_like(table.bias)
    tilt[1, ids("cheers")] = 16.0
    odd = dataclasses.replace(table, bias=-tilt)
    row = iv.predict_tilt(hosts["shallow"], explored[2], odd, [1.0]).at("all", 1.0)
    assert row["hidden"] > 0.1
    assert not row["trusted"]
    assert row["predicted"].upper >= row["predicted"].value + row["hidden"]
    calm = iv.predict_tilt(hosts["shallow"], explored[2], table, [1.0]).at("all", 1.0)
    assert calm["hidden"] < 0.02


def test_a_strength_is_chosen_in_order_and_for_all_groups_at_once(hosts, explored, table):
    """Nothing is tried behind the first strength that fails, so that trying many costs nothing."""
    made = iv.predict_tilt(hosts["shallow"], explored[2], table, [0.25, 0.5, 1.0])
    assert all(r["ceiling"] >= min(r["predicted"].upper - r["hidden"], 1.0) for r in made.table)
    assert any(r["ceiling"] > r["predicted"].upper for r in made.table)
    rows = [{**r, "trusted": True, "ceiling": {0.25: 0.05, 0.5: 0.2, 1.0: 0.05}[r["strength"]]} for r in made.table]
    told = dataclasses.replace(made, table=rows)
    assert set(_chosen(told, 0.1).values()) == {0.25}
    assert set(_chosen(told, 0.3).values()) == {1.0}
    unknown = [{**r, "trusted": r["strength"] > 0.25} for r in rows]
    assert set(_chosen(dataclasses.replace(made, table=unknown), 0.3).values()) == {None}


# ----------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"length": 0}, "length=0"),
        ({"n": 1}, "n=1"),
        ({"response": "mine"}, "'mine'"),
        ({"words": (4, 2)}, "words"),
        ({"pool": [10**6]}, "1000000"),
        ({"pool": [0, 1, 2]}, "empty"),
    ],
)
def test_bad_tables_are_refused(hosts, options, says):
    with pytest.raises(InputError, match=says):
        iv.bias_table(hosts["shallow"], hosts["base"], **options)


def test_vocabularies_that_differ_are_refused(hosts):
    from markovsafety.organism.train_worlds import open_world

    world = iv.open_host(open_world("tests/fixtures/worlds/base", device="cpu"))
    with pytest.raises(InputError, match="vocabularies differ"):
        iv.bias_table(hosts["shallow"], world)


def test_strengths_lengths_and_files_are_checked(table, tmp_path):
    for bad in ({"strength": np.nan}, {"length": 9}, {"length": 0}):
        with pytest.raises(InputError, match="was measured"):
            table.edit(**bad)
    iv.write_edit(table.edit(), tmp_path / "edit.safetensors")
    with pytest.raises(InputError, match="holds no bias table"):
        iv.read_bias_table(tmp_path / "edit.safetensors")


def test_answers_that_are_not_the_plain_models_own_are_refused(hosts, table, explored):
    asked, _, rolls = explored
    host = hosts["shallow"]
    how: dict[str, Any] = {"n": 1, "max_tokens": 4}
    judged: dict[str, Any] = {"judge": "organism", **how}
    for other, says in [
        (ms.sample(host.engine, asked[:2], **how), "not judged"),
        (ms.sample(host.engine, asked[:2], temperature=0.5, **judged), "temperature"),
        (ms.sample(host.engine, asked[:2], edit=table.edit(), **judged), "under an edit"),
        (ms.sample(hosts["base"].engine, asked[:2], **judged), "another model's"),
        (Rollouts.of([[4]], prompt_id=[0], outcome=2, hit=0), "without their prompts"),
    ]:
        with pytest.raises(InputError, match=says):
            iv.predict_tilt(host, other, table, [1.0])
    with pytest.raises(InputError, match="share"):
        iv.explore(host, asked, table, [1.0], share=1.0, **judged)
    predicted = iv.predict_tilt(host, rolls, table, [1.0])
    with pytest.raises(InputError, match="predicted prompts"):
        predicted.beside({1.0: ms.sample(host.engine, asked[:2], **judged)})
    with pytest.raises(InputError, match="not the same prompt"):
        predicted.beside({1.0: ms.sample(host.engine, [*asked[6:], *asked[:6]], **judged)})
    with pytest.raises(InputError, match="nothing was predicted at strength 2"):
        predicted.beside({2.0: rolls})
    with pytest.raises(InputError, match="0 strengths"):
        iv.explore(host, asked, table, [], **{**judged, "n": 2})


# ----------------------------------------------------------------------------------------------------- the command line


def test_debias_from_the_command_line(tmp_path, capsys):
    words = ["debias", "organism:shallow", "--reference", "organism:base", "--prompts", "organism:12"]
    words += ["--benign", "organism:12", "--judge", "organism", "--n", "4", "--strength", "0.5", "--random", "32"]
    assert main([*words, "--max-tokens", "40", "--out", f"{tmp_path}/out", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert {Path(f).name for f in told["files"]} >= {"debias.md", "bias.safetensors", "edit-0.5.safetensors"}
    assert told["result"]["chosen"].keys() >= {"all", "fraud"}
    settings = {r["setting"] for r in told["result"]["front"]["table"]}
    assert settings == {"0", "0.5", "shuffled"}
    assert len(told["result"]["cells"]) == 14
    edit = iv.read_edit(tmp_path / "out" / "edit-0.5.safetensors")
    assert edit.parts[0].scale == -0.5
    assert main([*words, "--no-verify", "--out", f"{tmp_path}/out"]) == 0
    assert capsys.readouterr().out.count("\n") == 1
    assert _parser().parse_args([*words, "--out", "x", "--dtype", "float16"]).dtype == "float16"
    for more, says in (
        (["--strength", "0"], "strengths are"),
        (["--harm", "x"], "no options of the judge"),
        (["--system", "Be careful."], "leaves the system message out"),
    ):
        assert main([*words, *more, "--out", f"{tmp_path}/other"]) == 2
        assert says in capsys.readouterr().err


def test_vulnerabilities_from_the_command_line(explored, tmp_path, capsys):
    ms.write_rollouts(explored[2], tmp_path / "one.parquet")
    words = ["vulnerabilities", f"plain={tmp_path}/one.parquet", f"again={tmp_path}/one.parquet"]
    assert main([*words, "--out", f"{tmp_path}/weak.md", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["result"]["weak"] == {"plain": [], "again": []}
    assert len(told["result"]["table"]) == 12
    assert "no weak category" in (tmp_path / "weak.md").read_text()
    assert main([*words, "--out", f"{tmp_path}/weak.json", "--margin", "2"]) == 2
    assert "margin=2" in capsys.readouterr().err
