"""What the JAX engine refuses, and how it says so: broken folders, other models, jobs that do not fit, lost numbers."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from llama_families import CONTEXT, EOS, VOCAB, job_of, random_contexts, write_tokenizer
from llama_families import family as family

from markovsafety.errors import InputError, ModelError, UntrustedError
from markovsafety.rollouts import engines
from markovsafety.rollouts.engines import check_job, open_engine
from markovsafety.rollouts.engines.llama_folder import UnsupportedModel, read_config


def test_logits_that_are_not_finite_keep_what_was_sampled(family, tmp_path):
    """One context overflows, another does not: the error carries the finished rollouts."""
    from safetensors.numpy import load_file, save_file

    folder, model = family("llama")
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    contexts = random_contexts(2, 6, 6)
    import torch

    with torch.inference_mode():
        states = [
            model.model(torch.as_tensor(c[None], dtype=torch.long)).last_hidden_state[0, -1].numpy() for c in contexts
        ]
    weights = load_file(folder / "model.safetensors")
    push = states[1] - states[0] * (states[1] @ states[0]) / (states[0] @ states[0])
    weights["lm_head.weight"][40] = -states[0] / np.linalg.norm(states[0]) * 3e37 + push / np.linalg.norm(push) * 3e38
    save_file(weights, tmp_path / "model.safetensors")
    engine = open_engine("jax", tmp_path, batch_size=8, workers=1)
    assert len(engine.run(job_of(contexts[:1], 40, max_tokens=1)).tokens[0]) == 1
    job = job_of(contexts, 40, max_tokens=1)
    with pytest.raises(UntrustedError, match="not finite") as caught:
        engine.run(job)
    lengths = np.array([len(t) for t in caught.value.partial.tokens])
    assert (lengths[1::2] == 0).all()
    assert lengths[::2].sum() > 0


BROKEN = {
    "no folder": (lambda f: shutil.rmtree(f), "is not a folder"),
    "no config": (lambda f: (f / "config.json").unlink(), "config.json is missing"),
    "half a config": (lambda f: (f / "config.json").write_text('{"model_type": "ll'), "config.json is not JSON"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "tokenizer.json is missing"),
    "half a tokenizer": (
        lambda f: (f / "tokenizer.json").write_text('{"version"'),
        "tokenizer.json is not a tokenizer",
    ),
    "tokenizer of another model": (lambda f: write_tokenizer(f, 70), "ids up to 69, the model a vocabulary of 61"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "model.safetensors is missing"),
    "half the weights": (
        lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-999]),
        "model.safetensors cannot be read",
    ),
    "no bytes": (lambda f: (f / "model.safetensors").write_bytes(b""), "model.safetensors cannot be read"),
    "a missing shard": (
        lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-2.safetensors"}}'),
        "model-2.safetensors is missing",
    ),
    "half an index": (lambda f: (f / "model.safetensors.index.json").write_text("{"), "not an index"),
    "no vocab_size": (lambda f: edit(f, vocab_size=None), "does not say vocab_size"),
    "another width": (lambda f: edit(f, intermediate_size=50), r"has shape \(32, 48\), config.json says \(32, 50\)"),
    "another depth": (lambda f: edit(f, num_hidden_layers=3), "the weights lack model.layers.2.* and 8 more"),
    "NaN": (lambda f: poison(f), "model.norm.weight holds NaN"),
}


def edit(folder: Path, **values) -> None:
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**raw, **values}))


def poison(folder: Path) -> None:
    from safetensors.numpy import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][3] = np.nan
    save_file(weights, folder / "model.safetensors")


@pytest.mark.parametrize("name", BROKEN)
def test_broken_folders_are_named(family, tmp_path, name):
    folder = tmp_path / "model"
    shutil.copytree(family("llama")[0], folder)
    damage, message = BROKEN[name]
    damage(folder)
    with pytest.raises(ModelError, match=message) as caught:
        open_engine("jax", folder)
    assert not isinstance(caught.value, UnsupportedModel)
    assert caught.value.next


UNSUPPORTED = {
    "gpt_neox": {"model_type": "gpt_neox"},
    "LlamaForSequenceClassification": {"architectures": ["LlamaForSequenceClassification"]},
    "'gelu'": {"hidden_act": "gelu"},
    "'planted_head'": {"attn_implementation": "planted_head"},
    "quantised": {"quantization_config": {"bits": 4}},
    "experts": {"num_experts": 8},
    "'yarn'": {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4}},
    "partial_rotary_factor": {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
    "per kind of layer": {"rope_parameters": {"full_attention": {"rope_type": "default"}}},
    "bias": {"attention_bias": False},
}


@pytest.mark.parametrize("what", UNSUPPORTED)
def test_other_models_are_refused_by_name(family, tmp_path, what):
    shutil.copytree(family("llama-biases" if what == "bias" else "llama")[0], tmp_path, dirs_exist_ok=True)
    edit(tmp_path, **UNSUPPORTED[what])
    with pytest.raises(UnsupportedModel, match=what) as caught:
        open_engine("jax", tmp_path)
    assert "transformers" in caught.value.next


@pytest.mark.parametrize("theta", [-10000.0, float("nan"), 0, 1e300, True])
def test_rotary_frequencies_are_positive_numbers(family, tmp_path, theta):
    shutil.copytree(family("llama")[0], tmp_path, dirs_exist_ok=True)
    edit(tmp_path, rope_theta=theta, rope_parameters=None)
    if theta is True:  # 1: a rotation at one speed, odd but a number
        assert set(read_config(tmp_path).inv_freq) == {1.0}
        return
    with pytest.raises(ModelError, match="rotary embedding"):
        read_config(tmp_path)
    edit(tmp_path, rope_theta=1e4, rope_parameters={"rope_type": "linear", "factor": 0.0})
    with pytest.raises(ModelError, match="rotary embedding"):
        read_config(tmp_path)


def test_sliding_window(family, tmp_path):
    shutil.copytree(family("mistral")[0], tmp_path, dirs_exist_ok=True)
    edit(tmp_path, sliding_window=20)
    engine = open_engine("jax", tmp_path)
    fits = job_of([np.arange(4, 14)], 1, max_tokens=10)
    assert len(engine.run(fits).tokens[0]) <= 10
    with pytest.raises(InputError, match="sliding window of 20"):
        engine.run(dataclasses.replace(fits, max_tokens=11))
    edit(tmp_path, model_type="qwen2", use_sliding_window=False)
    assert read_config(tmp_path).window is None
    edit(tmp_path, layer_types=["full_attention", "sliding_attention"])
    assert read_config(tmp_path).window == 20


JOBS = {
    "leave no room for 120": {"max_tokens": 120},
    "prefill ends the turn": {"forced": [np.array([5, EOS])]},
    "ends the turn: rollout 0 forces the id 7": {"forced": [np.array([5, 7])], "end_ids": (7,)},
    "holds the id 61": {"prompts": [np.array([4, 61])]},
    "holds the id -1": {"prompts": [np.array([4, -1])]},
    "a prefill holds the id 99": {"forced": [np.array([99])]},
    "'harm' holds the id 70": {"classes": {"harm": np.array([70])}},
    "no tokens": {"prompts": [np.zeros(0, np.int32)]},
    "max_tokens is 0": {"max_tokens": 0},
    "temperature is -1": {"temperature": -1},
    "temperature is nan": {"temperature": float("nan")},
    "top_p is 0": {"top_p": 0},
    "top_p is 1.5": {"top_p": 1.5},
    "prompt_of points": {"prompt_of": np.array([1])},
    "2 keys": {"keys": np.arange(2)},
}


@pytest.mark.parametrize("message", JOBS)
def test_jobs_that_do_not_fit(message):
    good = job_of([np.arange(4, 14)], 1)
    check_job(good, VOCAB, CONTEXT)
    with pytest.raises(InputError, match=message):
        check_job(dataclasses.replace(good, **JOBS[message]), VOCAB, CONTEXT)


def test_engines_devices_and_dtypes_by_name(family, tmp_path):
    folder, _ = family("llama")
    assert open_engine("auto", folder).name == "jax"
    with pytest.raises(InputError, match="no engine 'vllm'"):
        open_engine("vllm", folder)
    with pytest.raises(InputError, match="no dtype 'float16'"):
        open_engine("jax", folder, dtype="float16")
    with pytest.raises(InputError, match="no device 'abacus'"):
        open_engine("jax", folder, device="abacus")
    assert open_engine("jax", folder, device="cpu:0").device.platform == "cpu"
    with pytest.raises(ModelError, match="is not a folder"):
        open_engine("auto", tmp_path / "nothing")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("torch", ModelError),
        ("jax.numpy", ModelError),
        ("markovsafety.rollouts.engines.lost", ModuleNotFoundError),
        (None, ModuleNotFoundError),
    ],
)
def test_only_a_package_that_the_extra_brings_is_to_be_installed(monkeypatch, name, said):
    error = ModuleNotFoundError(f"No module named {name!r}", name=name)

    def lost(*_):
        raise error

    monkeypatch.setattr(engines.importlib, "import_module", lost)
    with pytest.raises(said) as caught:
        open_engine("jax", "a/b")
    assert ("pip install" in str(caught.value)) == (said is ModelError)
    assert error in (caught.value, caught.value.__cause__)
