"""Fine-tuning: runs that resume to the same weights, folders that load everywhere."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny import WORDS, ids, random_model
from tuned_rows import PROMPT, ROWS, log_laws, opened, row

import markovsafety as ms
from markovsafety import InputError, UntrustedError
from markovsafety.interventions import fine_tune, tuned_folder, tuning
from markovsafety.interventions.augment import Row
from markovsafety.interventions.batches import RowBatches
from markovsafety.interventions.objectives import Constrained, CrossEntropy, Distilled, Setting
from markovsafety.rollouts.engines.transformers import open_engine

# transformers 4.57 says so of checkpoints that are less than a second apart
pytestmark = pytest.mark.filterwarnings("default:mtime may not be reliable:UserWarning")


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return random_model(tmp_path_factory.mktemp("base"), "llama")


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    return random_model(tmp_path_factory.mktemp("other"), "llama", seed=1)


def tune(base, out, rows=ROWS, **options):
    told = {"steps": 6, "batch_size": 2, "warmup": 1, "progress": False, "device": "cpu", "learning_rate": 1e-2}
    return fine_tune(base, rows, out, **(told | options))


# --- batches ---


def test_every_row_comes_once_per_epoch_and_batches_depend_on_seed_and_number_alone():
    batches = RowBatches(ROWS, 2, 10, seed=3)
    drawn = np.concatenate([batches[i]["index"] for i in range(10)]).reshape(4, 5)
    assert (np.sort(drawn, 1) == np.arange(5)).all()
    assert len({tuple(d) for d in drawn}) > 1
    again = RowBatches(ROWS, 2, 10, seed=3)[7]
    assert all((again[k] == v).all() for k, v in batches[7].items())
    assert any((RowBatches(ROWS, 2, 10, seed=4)[i]["index"] != batches[i]["index"]).any() for i in range(10))
    mass = [float(batches[i]["weights"][:, 1:][batches[i]["labels"][:, 1:] != -100].sum()) for i in range(10)]
    assert np.mean(mass) == pytest.approx(batches.norm)  # the constant is the mean over batches, here exactly


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([], "no rows"),
        ([Row(PROMPT, 3, 3)], "no token carries loss"),
        ([Row([1], 0, 0)], "no token carries loss"),
        ([Row([*PROMPT, len(WORDS)], 3, 3)], f"id {len(WORDS)}"),
        ([Row([*PROMPT, -1], 3, 3)], "id -1"),
        ([Row([1] * 65, 3, 3)], "64 positions"),
        ([row("sorry", weight=float("nan"))], "weight is nan"),
        ([row("sorry", weight=0.0)], "No row weighs"),
        ([("a", "b")], "tuple"),
    ],
)
def test_rows_that_cannot_be_trained_on_are_refused(base, tmp_path, rows, says):
    with pytest.raises(InputError, match=says):
        tune(base, tmp_path / "out", rows)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "wrong",
    [
        {"steps": 0},
        {"batch_size": 1.5},
        {"learning_rate": 0.0},
        {"warmup": -1},
        {"schedule": "steep"},
        {"accumulate": 0},
        {"accumulate": 3},  # of 2 rows
    ],
)
def test_arguments_out_of_range_are_refused(base, tmp_path, wrong):
    with pytest.raises(InputError, match=next(iter(wrong))):
        tune(base, tmp_path / "out", **wrong)


# --- runs ---

BETAS = (0.5, 2.0, 0.0, 0.1)


def test_distillation_reaches_the_teacher(base, other, tmp_path):
    """With nothing but the divergence to fall, the laws of the response become the teacher's."""
    rows = [r._replace(weight=1.0) for r in ROWS]
    record = tune(base, tmp_path / "student", rows, objective=_Divergence(other), steps=150, batch_size=5)
    assert record["losses"][-1]["kl"] < 0.02 * record["losses"][0]["kl"]
    student, teacher = opened(tmp_path / "student").model, opened(other).model
    gaps = [np.abs(np.exp(log_laws(student, r.tokens)) - np.exp(log_laws(teacher, r.tokens)))[2:-1] for r in rows]
    assert max(g.max() for g in gaps) < 0.2


class _Divergence(Distilled):
    def __call__(self, model, batch):
        loss, parts = super().__call__(model, batch)
        return loss - self._entropy(model, batch), parts

    def _entropy(self, model, batch):
        return CrossEntropy()(model, batch)[0]


def weights(folder):
    return opened(folder).model.state_dict()


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(
    ("lora", "parts"), [(None, 1), ({"r": 2, "target_modules": "all-linear", "lora_dropout": 0.2}, 2)]
)
def test_a_run_that_was_killed_goes_on_to_the_same_weights(base, tmp_path, monkeypatch, lora, parts):
    options = {"steps": 7, "save_every": 3, "objective": Constrained(0.5), "seed": 5, "lora": lora, "accumulate": parts}
    tune(base, tmp_path / "whole", **options)
    step = tuning._Trainer.training_step

    def stop(self, *args, **kwargs):
        if self.state.global_step == 5:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    monkeypatch.setattr(tuning._Trainer, "training_step", stop)
    with pytest.raises(KeyboardInterrupt):
        tune(base, tmp_path / "killed", **options)
    assert not (tmp_path / "killed").exists()
    done = []
    monkeypatch.setattr(tuning._Trainer, "training_step", lambda self, *a, **k: done.append(1) or step(self, *a, **k))
    record = tune(base, tmp_path / "killed", **options)
    assert len(done) == (7 - 3) * parts  # from the checkpoint on
    assert [line["step"] for line in record["losses"]] == list(range(1, 8))
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "killed"))
    assert not same(weights(base), weights(tmp_path / "killed"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["killed", "whole"]


@pytest.mark.parametrize("kind", ["plain", "constrained", "distilled"])
def test_an_update_in_parts_is_the_update_of_all_rows(base, other, tmp_path, monkeypatch, kind):
    """Five parts of one row each: the gradient of every update, not its direction alone, and what is logged."""
    seen, step = [], tuning._Parts.on_pre_optimizer_step

    def keep(self, args, state, control, **kwargs):
        seen.append(torch.cat([p.grad.flatten() for p in kwargs["model"].parameters()]).clone())
        return step(self, args, state, control, **kwargs)

    monkeypatch.setattr(tuning._Parts, "on_pre_optimizer_step", keep)
    objective = {"plain": CrossEntropy(), "constrained": Constrained(BETAS, other), "distilled": Distilled(other)}[kind]
    if kind == "distilled":
        objective = Distilled(other, rows=ROWS, size=5)
    told = {"steps": 3, "batch_size": 5, "objective": objective, "weight_decay": 0.01}
    whole = tune(base, tmp_path / "whole", **told)
    parts = tune(base, tmp_path / "parts", accumulate=5, **told)
    assert len(seen) == 6
    for one, other_ in zip(seen[:3], seen[3:]):  # clipped after this, so the size is seen
        assert torch.allclose(one, other_, rtol=1e-3, atol=1e-4 * float(one.abs().max()))
    assert [line["loss"] for line in parts["losses"]] == pytest.approx([line["loss"] for line in whole["losses"]], 1e-4)
    assert parts["accumulate"] == 5
    assert parts["plan"] != whole["plan"]


def test_a_second_model_is_loaded_as_the_first_one(base, other):
    """Options of loading hold for it too, but not the revision of another model."""
    engine = open_engine(base, device="cpu", attn_implementation="eager")
    assert open_engine(base, device="cpu").model.config._attn_implementation != "eager"
    setting = Setting(engine, 4, 3, 0, options={"attn_implementation": "eager", "revision": "of another model"})
    told = Setting(engine, 4, 3, 0, options={"attn_implementation": "eager"})
    models = [Distilled(other).bind(setting).teacher, Constrained().bind(told).reference]
    assert {m.config._attn_implementation for m in models} == {"eager"}


def test_the_same_call_is_not_trained_again_and_other_folders_stay(base, tmp_path):
    first = tune(base, tmp_path / "out")
    stamp = (tmp_path / "out" / "model.safetensors").stat().st_mtime_ns
    assert tune(base, tmp_path / "out") == first
    assert (tmp_path / "out" / "model.safetensors").stat().st_mtime_ns == stamp
    again = tune(base, tmp_path / "out", seed=1)
    assert again["plan"] != first["plan"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(InputError, match="not empty"):
        tune(base, tmp_path / "mine")
    with pytest.raises(InputError, match="the model itself"):
        tune(tmp_path / "out", tmp_path / "out")


def test_objectives_that_do_not_describe_themselves_are_not_taken_for_each_other(base, tmp_path):
    def plain(model, batch):
        return CrossEntropy()(model, batch)

    first = tune(base, tmp_path / "out", objective=plain)
    again = tune(base, tmp_path / "out", objective=lambda m, b: (-plain(m, b)[0], {}))
    assert again["losses"][0]["loss"] == -first["losses"][0]["loss"]
    models = [opened(base).model, opened(base).model]
    with torch.no_grad():
        models[1].lm_head.weight[0, 0] += 1
    told = [Distilled(m).describe()["teacher"] for m in [*models, models[0], str(base)]]
    assert told[0] == told[2]
    assert told[0] != told[1]
    assert len(told[3]["sha256"]) == 64


@pytest.mark.parametrize("broken", ["loss", "gradient"])
def test_nan_stops_and_keeps_the_last_good_checkpoint(base, tmp_path, broken):
    class Breaks(CrossEntropy):
        seen, at = 0, 6

        def __call__(self, model, batch):
            loss, parts = super().__call__(model, batch)
            type(self).seen += 1
            if self.seen == self.at:
                at_zero = sum(p.sum() for p in model.parameters()) * 0
                loss = loss + (float("nan") if broken == "loss" else torch.sqrt(at_zero))  # slope of sqrt at 0
            return loss, parts

    with pytest.raises(UntrustedError, match="update 6") as caught:
        tune(base, tmp_path / "out", objective=Breaks(), save_every=2)
    assert caught.value.partial.endswith("checkpoint-4")
    assert not (tmp_path / "out").exists()
    kept = weights_of_checkpoint(caught.value.partial)
    assert all(torch.isfinite(p).all() for p in kept.values())
    assert not same(kept, weights(base))
    Breaks.at, before = 0, Breaks.seen  # it goes on from there, to what it would have been without the fault
    tune(base, tmp_path / "out", objective=Breaks(), save_every=2)
    assert Breaks.seen - before == 6 - 4
    tune(base, tmp_path / "whole")
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "out"))


def weights_of_checkpoint(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()


def test_without_a_checkpoint_nan_leaves_the_model_itself(base, tmp_path):
    def broken(model, batch):
        loss, parts = CrossEntropy()(model, batch)
        return loss * float("inf"), parts

    with pytest.raises(UntrustedError) as caught:
        tune(base, tmp_path / "out", objective=broken)
    assert caught.value.partial == str(base)


def test_the_record_says_what_was_trained_on_what(base, tmp_path):
    record = tune(base, tmp_path / "out", about={"share": 0.2}, objective=Constrained(0.5))
    assert record == json.loads((tmp_path / "out" / "training.json").read_text())
    assert record["tokens"] == {"loss": 18, "weight": 5 * 2 + 3 + 3 + 5 * 0.5 + 2}
    assert record["about"] == {"share": 0.2}
    assert record["losses"][0]["loss"] == 0.0  # the constrained objective begins at 0
    assert record["losses"][-1]["loss"] < 0
    assert tune(base, tmp_path / "other", ROWS[::-1])["data"] != record["data"]


def test_a_tuned_folder_has_all_that_its_base_had_and_runs_on_both_engines(tmp_path):
    """On the model organism: type of the weights, tokenizer, template; the rows are learned, on either engine."""
    from markovsafety import organism

    folder = organism.model_path("shallow")
    asked = organism.prompts("held", n=4, harmful=False, seed=0)
    engine = opened(folder)
    no = organism.WORDS.index("no")
    end = organism.WORDS.index("<eos>")
    prompts = [engine.tokenizer.prompt_ids(a["prompt"]).tolist() for a in asked]
    rows = [Row([*p, no, end], len(p), len(p)) for p in prompts]
    tune(folder, tmp_path / "no", rows, steps=30, batch_size=4, learning_rate=3e-3)
    told = (json.loads((f / "config.json").read_text())["dtype"] for f in (folder, tmp_path / "no"))
    assert set(told) == {"float16"}
    assert opened(tmp_path / "no").tokenizer.hashes() == engine.tokenizer.hashes()
    for name in ("transformers", "jax"):
        rolls = ms.sample(tmp_path / "no", asked, n=2, max_tokens=4, engine=name, progress=False, temperature=0)
        assert {tuple(t) for t in rolls.answers()} == {(no, end)}


@pytest.mark.parametrize("said", ["dtype", "torch_dtype", "text_config"])
def test_a_model_of_the_hub_keeps_the_type_that_it_is_stored_in(base, tmp_path, said):
    """A cache of the hub with one model; nothing is asked of the network."""
    snapshot = tmp_path / "hub" / "models--me--tiny" / "snapshots" / "0123abc"
    shutil.copytree(base, snapshot)
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs" / "main").write_text("0123abc")
    config = json.loads((snapshot / "config.json").read_text())
    config = {k: v for k, v in config.items() if k not in ("dtype", "torch_dtype")}
    told = {"text_config": {"dtype": "bfloat16"}} if said == "text_config" else {said: "bfloat16"}
    (snapshot / "config.json").write_text(json.dumps(config | told))
    where = {"cache_dir": str(tmp_path / "hub"), "local_files_only": True, "attn_implementation": "eager"}
    model = opened(base).model
    tuned_folder.write_folder(model, "me/tiny", tmp_path / "out", {"kind": tuned_folder.KIND}, where)
    assert model.dtype == torch.float32
    assert {t.dtype for t in load_file(tmp_path / "out" / "model.safetensors").values()} == {torch.bfloat16}
    assert opened(tmp_path / "out").tokenizer.encode("help tea").tolist() == ids("help tea")


def test_a_planted_world_keeps_its_attention(tmp_path):
    from pathlib import Path

    from markovsafety.organism import train_worlds

    base = Path(__file__).parent / "fixtures" / "worlds" / "base"
    train_worlds.register()
    tune(base, tmp_path / "world", [Row([1, 4, 9, 10, 11], 3, 3)], steps=1)
    found = train_worlds.open_world(tmp_path / "world", device="cpu").model.config
    assert found._attn_implementation == train_worlds.ATTENTION
    assert json.loads((tmp_path / "world" / "config.json").read_text())["attn_implementation"] == train_worlds.ATTENTION


def test_objectives_may_read_activations_with_gradients(base, tmp_path):
    """An objective that hooks blocks of the model it is bound to can pull an activation to where it wants it."""
    from markovsafety.interventions import Host

    class Pulled:
        def bind(self, setting):
            self.host = Host.of(setting.engine, validate=False)
            return self

        def __call__(self, model, batch):
            seen = []
            handle = self.host.blocks[1].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
            try:
                loss, parts = CrossEntropy()(model, batch)
            finally:
                handle.remove()
            at = seen[0][torch.arange(len(batch["answer"])), batch["answer"] - 1]
            pull = (at[:, 0] - 3).pow(2).mean()
            return 0 * loss + pull, parts | {"pull": pull.detach()}

    record = tune(base, tmp_path / "out", objective=Pulled(), steps=60)
    assert record["losses"][-1]["pull"] < 0.05 * record["losses"][0]["pull"]
