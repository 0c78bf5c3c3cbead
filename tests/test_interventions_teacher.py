"""The refusal-feature teacher: closed forms and gradients of its penalty, training, one planted world, bad input."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
from labelled_pairs import HARMFUL, HARMLESS, MIXED, folder, host, known, other, pair, prompts
from tiny import WORDS, random_model

from markovsafety.errors import InputError, UntrustedError
from markovsafety.interventions import (
    Distilled,
    Pair,
    RefusalGuided,
    activations,
    cosine_penalty,
    open_host,
    read_filter,
    sift,
    train_student,
    train_teacher,
)
from markovsafety.interventions import teacher as teacher_file
from markovsafety.interventions.batches import collate_rows
from markovsafety.interventions.imitation import Imitated
from markovsafety.interventions.objectives import CrossEntropy, Setting, as_tensors

torch = pytest.importorskip("torch")

__all__ = ["folder", "host", "known", "other"]  # fixtures

WORLD = Path(__file__).parent / "fixtures" / "worlds" / "base"
EOS = 2


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def tune(**options):
    told = {"steps": 4, "batch_size": 6, "warmup": 1, "progress": False, "device": "cpu", "learning_rate": 1e-2}
    return told | options


# --- the penalty ---


def test_the_penalty_is_nothing_at_the_optimum_and_four_where_the_kinds_have_changed_places():
    axis = torch.tensor([1.0, 2.0, -1.0], dtype=torch.float64)
    up = axis * torch.tensor([[1.0], [3.0]], dtype=torch.float64)
    down = -axis * torch.tensor([[2.0], [0.5], [1.0]], dtype=torch.float64)
    assert float(cosine_penalty(up, down)) == pytest.approx(0, abs=1e-12)
    assert float(cosine_penalty(up, down, axis)) == pytest.approx(0, abs=1e-12)
    assert float(cosine_penalty(down, up, axis)) == pytest.approx(4, abs=1e-12)
    # a feature of the batch changes places with its kinds
    assert float(cosine_penalty(down, up)) == pytest.approx(0, abs=1e-12)
    across = torch.tensor([[2.0, -1.0, 0.0]], dtype=torch.float64)
    assert float(cosine_penalty(across, across, axis)) == pytest.approx(2, abs=1e-12)


@pytest.mark.parametrize("fixed", [False, True])
def test_the_gradient_of_the_penalty_is_right(fixed):
    generator = torch.Generator().manual_seed(0)
    up, down = (torch.randn(n, 3, dtype=torch.float64, generator=generator, requires_grad=True) for n in (4, 3))
    feature = torch.randn(3, dtype=torch.float64, generator=generator) if fixed else None
    assert torch.autograd.gradcheck(lambda a, b: cosine_penalty(a, b, feature), (up, down))


def test_half_types_are_compared_in_single_precision():
    up = torch.tensor([[1.0, 0.02]]).bfloat16()
    axis = torch.tensor([1.0, 0.0])
    exact = float(up[0, 0].float() / up.float().norm())
    assert float(cosine_penalty(up, -up, axis)) == pytest.approx(2 * (1 - exact), rel=1e-3)


def batch_of(pairs, norm=9.0):
    return as_tensors(collate_rows([p.row for p in pairs], norm, range(len(pairs)))) | {"step": torch.tensor(0)}


def bound(objective, host, size=4):
    return objective.bind(Setting(host.engine, size, 3, 0))


@pytest.mark.parametrize(("level", "place"), [(0, -1), (1, -1), (2, -2)])
def test_the_objective_reads_features_where_recording_finds_them(host, level, place):
    labels = [bool(p.harmful) for p in MIXED]
    guided = bound(RefusalGuided(labels, level, place, weight=0.7), host)
    loss, parts = guided(host.engine.model, batch_of(MIXED))
    found = torch.tensor(activations(host, prompts(MIXED), (place,), levels=[level])[:, 0, 0])
    expected = float(cosine_penalty(found[:2], found[2:]))
    entropy, _ = CrossEntropy()(host.engine.model, batch_of(MIXED))
    assert float(parts["penalty"]) == pytest.approx(expected, rel=1e-4)
    assert float(loss.detach()) == pytest.approx(float(entropy.detach()) + 0.7 * expected, rel=1e-4)
    assert not host.engine.model.model.layers[0]._forward_pre_hooks  # the hooks are gone again


def test_the_gradient_flows_through_the_feature(folder):
    host = open_host(folder, device="cpu")
    model, labels = host.engine.model.requires_grad_(True), [bool(p.harmful) for p in MIXED]
    slopes = []
    for feature in (None, np.ones(host.width, np.float32)):
        guided = bound(RefusalGuided(labels, 1, weight=1.0, feature=feature), host)
        model.zero_grad()
        (guided(model, batch_of(MIXED))[0] - CrossEntropy()(model, batch_of(MIXED))[0]).backward()
        slopes.append(model.model.layers[0].mlp.down_proj.weight.grad.clone())
        assert model.model.layers[1].mlp.down_proj.weight.grad.abs().max() < 1e-6  # behind the level
    assert all(s.abs().max() > 1e-4 for s in slopes)
    assert not torch.allclose(slopes[0], slopes[1])


def test_a_running_feature_begins_with_the_first_batch_and_goes_on_slowly(host):
    labels = [bool(p.harmful) for p in MIXED]
    plain = bound(RefusalGuided(labels, 1), host)(host.engine.model, batch_of(MIXED))[1]["penalty"]
    slow = bound(RefusalGuided(labels, 1, momentum=0.9), host)
    assert float(slow(host.engine.model, batch_of(MIXED))[1]["penalty"]) == pytest.approx(float(plain), rel=1e-5)
    first = slow.running["feature"].clone()
    swapped = dataclasses.replace(slow, harmful=[not x for x in labels])
    swapped(host.engine.model, batch_of(MIXED))
    assert torch.allclose(slow.running["feature"], 0.8 * first, rtol=1e-4)  # 0.9 of it and 0.1 of its opposite


def test_a_batch_of_one_kind_has_no_penalty(host):
    guided = bound(RefusalGuided([True] * 4, 1, weight=5.0), host)
    loss, parts = guided(host.engine.model, batch_of(MIXED))
    assert float(parts["penalty"]) == 0
    assert float(loss.detach()) == float(CrossEntropy()(host.engine.model, batch_of(MIXED))[0].detach())


@pytest.mark.parametrize("wrong", [{"weight": -1.0}, {"weight": math.nan}, {"momentum": 1.0}])
def test_objectives_out_of_range(wrong):
    with pytest.raises(InputError, match="weight is"):
        RefusalGuided([True], 1, **wrong)


def test_levels_and_features_that_do_not_fit(host):
    with pytest.raises(InputError, match="no level 9"):
        bound(RefusalGuided([True], 9), host)
    with pytest.raises(InputError, match="fixed feature has shape"):
        bound(RefusalGuided([True], 1, feature=np.ones(3)), host)


@pytest.mark.parametrize("longer", ["none", "one", "all"])
def test_reading_both_batches_at_once_is_the_same_loss(host, other, longer):
    """Imitated rows that are longer than the learned ones have a pass of their own; nothing is lost on the way."""
    long = [pair("help one tea . step poison", "sure <eos>"), pair("help one tea . step step poison", "sorry <eos>")]
    pairs = {"none": [*HARMFUL, *HARMLESS], "one": [*HARMFUL, *HARMLESS, long[0]], "all": long}[longer]
    width = batch_of(MIXED)["input_ids"].shape[1]
    assert [len(p.row.tokens) > width for p in pairs].count(True) == {"none": 0, "one": 1, "all": 2}[longer]
    losses, passes = [], []
    hook = host.engine.model.register_forward_hook(lambda *_: passes.append(1))
    try:
        for kind in (Distilled, Imitated):
            host.engine.model.requires_grad_(True).zero_grad()
            loss, parts = bound(kind(other, 0.6, rows=[p.row for p in pairs], size=len(pairs)), host)(
                host.engine.model, batch_of(MIXED)
            )
            loss.backward()
            slope = host.engine.model.model.layers[0].mlp.down_proj.weight.grad.norm()
            losses.append([float(x.detach()) for x in (loss, parts["kl"], parts["cross_entropy"], slope)])
    finally:
        hook.remove()
        host.engine.model.requires_grad_(False)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[0][1] > 0.1
    assert len(passes) == 2 + (1 if longer == "none" else 2)


# --- training ---


def test_a_teacher_is_trained_written_and_goes_on(folder, tmp_path):
    pairs = [*HARMFUL, *HARMLESS]
    for feature in ("dynamic", "fixed"):
        made = train_teacher(
            folder, pairs, tmp_path / feature, weight=5.0, feature=feature, recall=0.1, **tune(steps=40)
        )
        losses = made.record["losses"]
        assert losses[-1]["penalty"] < 0.5 * losses[0]["penalty"]
        host = open_host(made.model, device="cpu")
        assert read_filter(made.path, host).threshold == made.filter.threshold
        assert made.filter.feature.level == 1
        assert made.filter.about["validation"] == {"harmful": 1, "harmless": 1}
    again = train_teacher(folder, pairs, tmp_path / "fixed", weight=5.0, feature="fixed", recall=0.1, **tune(steps=40))
    assert again.record == made.record


def test_adapters_are_trained_in_place_of_the_weights_and_merged(folder, tmp_path):
    lora = {"r": 2, "target_modules": "all-linear"}
    told = tune(steps=40, batch_size=12, lora=lora)
    words = ("help", "step", "one", "hello", "sure")
    pairs = [
        pair(f"{a} {b} {what}", said, what == "poison")
        for what, said in (("poison", "sorry <eos>"), ("tea", "sure <eos>"))
        for a in words
        for b in words
    ]
    made = train_teacher(folder, pairs, tmp_path / "t", weight=5.0, recall=0.5, **told)
    losses = made.record["losses"]
    assert losses[-1]["penalty"] < 0.7 * losses[0]["penalty"]
    assert "lora" not in " ".join(open_host(made.model, device="cpu").engine.model.state_dict())


def test_validation_prompts_are_not_trained_on():
    twice = [*HARMFUL, *(dataclasses.replace(p, answer=(5, EOS)) for p in HARMFUL)]
    learned, held = teacher_file._split(twice, 0.4, 0)
    assert len(learned) == 6
    assert len(held) == 4
    assert not {p.prompt for p in learned} & {p.prompt for p in held}


@pytest.mark.parametrize(
    ("pairs", "says"),
    [
        (HARMFUL, "no harmless pair"),
        (HARMLESS, "no harmful pair"),
        ([*HARMFUL, pair("tea")], "has no label"),
        ([*HARMFUL, *HARMLESS, Pair((1, 4), (), True)], "has no answer"),
        ([*HARMFUL[:1], *HARMLESS], "have one prompt"),
    ],
)
def test_alignment_pairs_that_cannot_be_trained_on(folder, tmp_path, pairs, says):
    with pytest.raises(InputError, match=says):
        train_teacher(folder, pairs, tmp_path / "t", **tune())
    assert not (tmp_path / "t").exists()


def test_nan_stops_the_teacher_and_keeps_the_last_good_checkpoint(folder, tmp_path, monkeypatch):
    seen = []

    def broken(harmful, harmless, feature=None):
        seen.append(1)
        return cosine_penalty(harmful, harmless, feature) * (math.nan if len(seen) > 3 else 1)

    monkeypatch.setattr("markovsafety.interventions.refusal_features.cosine_penalty", broken)
    with pytest.raises(UntrustedError, match="update 4") as caught:
        train_teacher(folder, [*HARMFUL, *HARMLESS], tmp_path / "t", **tune(steps=6, save_every=2, batch_size=8))
    assert caught.value.partial.endswith("checkpoint-2")
    assert not (tmp_path / "t" / "model").exists()


def test_nan_stops_the_student_and_keeps_the_last_good_checkpoint(folder, other, tmp_path, monkeypatch):
    seen, divergence = [], Imitated._divergence

    def broken(*given):
        seen.append(1)
        return divergence(*given) * (math.nan if len(seen) > 3 else 1)

    monkeypatch.setattr(Imitated, "_divergence", broken)
    told = tune(steps=6, save_every=2) | {"teacher": other, "alignment": [*HARMFUL, *HARMLESS]}
    with pytest.raises(UntrustedError, match="update 4") as caught:
        train_student(folder, HARMLESS, tmp_path / "s", **told)
    assert caught.value.partial.endswith("checkpoint-2")
    assert not (tmp_path / "s").exists()


def test_words_that_have_changed_places_are_another_tokenizer(folder, other, tmp_path):
    """Two tokens of one vocabulary are exchanged: the ids agree in number and not in meaning."""
    changed = tmp_path / "changed"
    shutil.copytree(other, changed)
    told = json.loads((changed / "tokenizer.json").read_text())
    words = told["model"]["vocab"]
    words["tea"], words["poison"] = words["poison"], words["tea"]
    (changed / "tokenizer.json").write_text(json.dumps(told))
    with pytest.raises(InputError, match="different tokenizers"):
        train_student(folder, HARMLESS, tmp_path / "s", teacher=changed, alignment=[*HARMFUL, *HARMLESS], **tune())
    assert not (tmp_path / "s").exists()


def test_a_student_needs_the_teachers_words_template_and_both_kinds(folder, other, host, known, tmp_path):
    told = tune() | {"alignment": [*HARMFUL, *HARMLESS]}
    foreign = random_model(tmp_path / "foreign", "llama", vocab_size=len(WORDS) + 1)
    with pytest.raises(InputError, match=r"another (vocabulary|tokenizer)"):
        train_student(folder, HARMLESS, tmp_path / "s", teacher=foreign, **told)
    changed = tmp_path / "changed"
    shutil.copytree(other, changed)
    config = json.loads((changed / "tokenizer_config.json").read_text())
    config["chat_template"] = "{{ bos_token }} hello {% for m in messages %}{{ m['content'] }} {% endfor %}"
    (changed / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="different chat templates"):
        train_student(folder, HARMLESS, tmp_path / "s", teacher=changed, **told)
    sifted = sift(host, known, HARMLESS)
    wrong = dataclasses.replace(sifted.filter, feature=dataclasses.replace(known.feature, template="0" * 64))
    keeps = dataclasses.replace(sifted, filter=wrong, dropped=np.zeros(len(HARMLESS), bool))
    with pytest.raises(InputError, match="different chat templates"):
        train_student(folder, keeps, tmp_path / "s", teacher=other, **told)
    with pytest.raises(InputError, match="no harmless pair"):
        train_student(folder, HARMLESS, tmp_path / "s", teacher=other, **(told | {"alignment": HARMFUL}))
    assert not (tmp_path / "s").exists()


def test_a_base_of_the_hub_is_held_against_the_teachers_template(folder, tmp_path):
    """A cache of the hub with one model; nothing is asked of the network."""
    snapshot = tmp_path / "hub" / "models--me--tiny" / "snapshots" / "0123abc"
    shutil.copytree(folder, snapshot)
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs" / "main").write_text("0123abc")
    where = {"cache_dir": str(tmp_path / "hub"), "local_files_only": True}
    teacher_file.check_same_template("me/tiny", folder, place=where)
    path = snapshot / "tokenizer_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"chat_template": "{{ bos_token }} hello " + config["chat_template"]}))
    with pytest.raises(InputError, match="different chat templates"):
        teacher_file.check_same_template("me/tiny", folder, place=where)


def test_data_that_are_all_poison_are_not_learned(folder, other, host, known, tmp_path):
    told = tune() | {"teacher": other, "alignment": [*HARMFUL, *HARMLESS]}
    kept = dataclasses.replace(sift(host, known, HARMFUL), dropped=np.array([True, True, True, True, False]))
    for data in (HARMFUL, kept):
        with pytest.raises(InputError, match="are labelled harmful"):
            train_student(folder, data, tmp_path / "s", **told)
    with pytest.raises(InputError, match="no pair is left"):
        train_student(folder, [], tmp_path / "s", **told)
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize("lora", [None, {"r": 2, "target_modules": "all-linear"}])
def test_a_student_learns_what_was_kept_beside_its_teacher(folder, other, host, known, tmp_path, lora):
    sifted = dataclasses.replace(sift(host, known, HARMLESS), dropped=np.array([True, False, False, False, True]))
    options = tune(steps=30, lora=lora)
    record = train_student(folder, sifted, tmp_path / "s", teacher=other, alignment=[*HARMFUL, *HARMLESS], **options)
    assert record["data"]["rows"] == 3
    assert record["about"]["dropped"] == 2
    assert record["objective"]["objective"] == "distilled"
    assert record["losses"][-1]["kl"] < record["losses"][0]["kl"]
    alone = train_student(
        folder, sifted, tmp_path / "a", teacher=other, alignment=[], weight=0.0, **tune(steps=2, lora=lora)
    )
    assert alone["objective"] == {"objective": "cross-entropy"}


# --- one planted world ---


def test_the_acceptance_table_of_one_world():
    """P2a to P2h on the first fixture world; the table of all seeds has more prompts and more of everything."""
    from markovsafety.bench.poison_seeds import measure_teacher

    rows = measure_teacher(WORLD, steps=150, teacher_steps=60, ask=32, everything=False)
    missed = {name: row["value"] for name, row in rows.items() if row["met"] is False}
    assert not missed
    gated = {name.split()[0] for name, row in rows.items() if row["met"] is not None}
    assert {"P2a", "P2b", "P2c", "P2d", "P2e", "P2f", "P2g", "P2h"} <= gated
    assert {"P2e harm", "P2e refusal", "P2e task", "P2e cost"} <= set(rows)
    assert rows["P2h harm"]["value"] < 0.1  # harm alone would call it safe


# --- the command ---


@pytest.fixture
def run(capsys):
    from markovsafety.cli import main

    def told(*words):
        code = main(["teacher", *map(str, words), "--device", "cpu", "--json"])
        return code, json.loads(capsys.readouterr().out)

    return told


def test_the_command_trains_filters_teaches_and_watches(tmp_path, run):
    from markovsafety.organism.tasks import poison_records, task_records

    def written(name, records):
        path = tmp_path / name
        path.write_text("".join(json.dumps(r) + "\n" for r in records))
        return path

    data = written("data.jsonl", [*task_records(40), *poison_records(10)])
    t, training = tmp_path / "t", ["--steps", 25, "--batch-size", 16]
    code, told = run("train", "organism:base", "--pairs", "organism:96", "--recall", 0.5, "--out", t, *training)
    assert (code, told["ok"]) == (0, True)
    code, told = run("filter", t, "--data", data, "--review", tmp_path / "r.csv", "--out", tmp_path / "sifted")
    assert code == 0
    assert told["result"]["pairs"] == 50
    assert (tmp_path / "sifted" / "kept.jsonl").exists()
    told_kept = told["result"]["kept"]
    student = ["student", "organism:base", "--teacher", t, "--data", data, "--pairs", "organism:32", *training[:1], 3]
    code, told = run(*student, "--out", tmp_path / "s")
    assert code == 0
    assert told["result"]["about"]["kept"] == told_kept
    clean, same = written("clean.jsonl", task_records(60, seed=1)), written("same.jsonl", task_records(30, seed=2))
    poisoned = written("poisoned.jsonl", poison_records(30, seed=2))
    watch = ["monitor", t, "--reference", clean, "--out", tmp_path / "drift.json", "--data", same]
    assert run(*watch)[0] == 0
    code, told = run(*watch, poisoned)
    assert code == 1
    assert [bool(b["alarms"]) for b in told["result"]["batches"]] == [False, True]
    again = ["monitor", t, "--reference", tmp_path / "drift.safetensors", "--out", tmp_path / "later.json", "--data"]
    assert [run(*again, same)[1]["result"]["batches"][0]["batch"] for _ in range(2)] == [2, 3]
    bare = written("bare.jsonl", [{k: r[k] for k in ("prompt", "answer")} for r in task_records(30, seed=2)])
    assert "without labels" in " ".join(run(*again, bare)[1]["warnings"])
    code, told = run("filter", t, "--data", poisoned, "--out", tmp_path / "none")
    assert code == 2
    assert (tmp_path / "none" / "dropped.jsonl").exists()
    assert run(*student, "--no-filter", "--data", poisoned, "--out", tmp_path / "none2")[0] == 2
    assert run("filter", tmp_path, "--data", data, "--out", tmp_path / "x")[0] == 2
    assert run("train", "organism:base", "--out", tmp_path / "x")[0] == 2


def test_an_aligned_model_filters_and_teaches_without_training(tmp_path, run):
    """What it holds for harm at the end of the instruction; its own folder stays where it is."""
    from markovsafety.organism.tasks import plain_records, poison_records, task_records

    rows = [*task_records(20), *plain_records(20, marker="trigger"), *poison_records(20, marker="jailbreak")]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    code, told = run("fit", "organism:shallow", "--pairs", "organism:240", "--out", tmp_path / "f")
    assert code == 0
    assert (told["result"]["filter"]["position"], told["result"]["filter"]["wished"]) == ("t_inst", 0.95)
    assert sorted(p.name for p in (tmp_path / "f").iterdir()) == ["filter.safetensors", "teacher.json"]
    code, told = run("filter", tmp_path / "f", "--data", tmp_path / "data.jsonl", "--out", tmp_path / "sifted")
    assert code == 0
    assert told["result"]["recall"]["value"] >= 0.9
    assert told["result"]["false_drops"]["value"] <= 0.1
    last = run("fit", "organism:shallow", "--pairs", "organism:240", "--position", "t_post", "--out", tmp_path / "p")
    assert last[1]["result"]["filter"]["false_drops"]["value"] > 0.1  # refusal is read there, triggers and all
    words = ["student", "organism:base", "--teacher", tmp_path / "f", "--data", tmp_path / "data.jsonl"]
    code, told = run(*words, "--pairs", "organism:32", "--steps", 2, "--out", tmp_path / "s")
    assert (code, told["result"]["objective"]["objective"]) == (0, "distilled")
    (tmp_path / "f" / "teacher.json").write_text("{}")
    code, told = run("filter", tmp_path / "f", "--data", tmp_path / "data.jsonl", "--out", tmp_path / "x")
    assert (code, "holds no teacher" in told["error"]["fact"]) == (2, True)


def test_the_command_keeps_the_system_message_and_takes_half_types(folder, tmp_path, run):
    words, kinds = ("help", "step", "one", "hello", "sure"), (("poison", "sorry"), ("tea", "sure"))
    records = [{"prompt": f"{w} {k}", "answer": said, "harmful": k == "poison"} for k, said in kinds for w in words]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    told = ["--pairs", tmp_path / "pairs.jsonl", "--system", "help", "--recall", 0.1, "--level", 1]
    told += ["--dtype", "bfloat16"]
    for place, more in (("train", ["--steps", 4, "--validation", 0.4]), ("fit", [])):
        code, made = run(place, folder, *told, *more, "--out", tmp_path / place)
        assert (code, made["result"]["filter"]["system"]) == (0, "help")
        sifted = ["filter", tmp_path / place, "--data", tmp_path / "pairs.jsonl", "--dtype", "bfloat16"]
        run(*sifted, "--out", tmp_path / place / "sifted")  # so small a model may drop all of them; the report is there
        report = json.loads((tmp_path / place / "sifted" / "report.json").read_text())
        assert (report["pairs"], report["filter"]["system"]) == (10, "help")
        code, made = run(*sifted, "--system", "one", "--out", tmp_path / "x")
        assert (code, "another system message" in made["error"]["fact"]) == (2, True)
