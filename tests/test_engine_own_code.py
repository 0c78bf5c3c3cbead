"""Models that bring Python code: refused unread, and run where that is asked for.

Here the code is a Llama under another name, which leaves a mark in the environment when it is loaded.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from tiny import EOS, WORDS, word_tokenizer
from transformers import dynamic_module_utils

import markovsafety as ms
from markovsafety import InputError, ModelError
from markovsafety.cli import main
from markovsafety.rollouts.engines import open_engine

MARK = "MARKOVSAFETY_TEST_CODE_RAN"
CODE = f"""
import os
from transformers import LlamaConfig, LlamaForCausalLM
os.environ["{MARK}"] = "1"

class OwnConfig(LlamaConfig):
    model_type = "own"

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""
ASK = {"n": 4, "max_tokens": 6, "progress": False}


@pytest.fixture(autouse=True)
def apart(tmp_path, monkeypatch):
    """Transformers copies such code into a folder of its own and imports it from there."""
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setenv(MARK, "")
    yield
    for name in [name for name in sys.modules if name.startswith("transformers_modules")]:
        del sys.modules[name]


@pytest.fixture
def folder(tmp_path):
    """A model folder with code, and the same weights as plain Llama beside it."""
    plain, own = tmp_path / "plain", tmp_path / "own_model"
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    config = transformers.LlamaConfig(vocab_size=len(WORDS), eos_token_id=EOS, max_position_embeddings=64, **size)
    transformers.LlamaForCausalLM(config).save_pretrained(plain)
    word_tokenizer(plain)
    own.mkdir()
    for file in plain.iterdir():
        (own / file.name).write_bytes(file.read_bytes())
    told = json.loads((plain / "config.json").read_text())
    names = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    (own / "config.json").write_text(
        json.dumps({**told, "model_type": "own", "architectures": ["OwnForCausalLM"], "auto_map": names})
    )
    (own / "modeling_own.py").write_text(CODE)
    return own


@pytest.mark.parametrize("engine", ["auto", "transformers"])
def test_code_of_a_folder_is_not_run_unless_asked(folder, tmp_path, engine):
    with pytest.raises(ModelError, match="brings Python code of its own") as caught:
        ms.sample(folder, ["hello"], engine=engine, out=tmp_path / "run", **ASK)
    assert "--trust-remote-code" in caught.value.next
    assert "trust_remote_code=True" in caught.value.next
    assert "somebody's program" in caught.value.cause
    assert not os.environ[MARK]
    assert not (tmp_path / "run").exists()


def test_asked_for_it_runs_and_is_told(folder, tmp_path):
    rolls = ms.sample(folder, ["hello", "tea"], trust_remote_code=True, out=tmp_path / "run", **ASK)
    assert os.environ[MARK]
    plain = ms.sample(folder.parent / "plain", ["hello", "tea"], engine="transformers", **ASK)
    assert np.array_equal(rolls.tokens, plain.tokens)
    told = rolls.provenance["engine"]
    assert told["architecture"] == "OwnForCausalLM"
    assert told["trust_remote_code"]["files"] == ["modeling_own.py"]
    assert "trust_remote_code" not in plain.provenance["engine"]


def test_a_run_goes_on_with_the_same_code_only(folder, tmp_path):
    words = ["sample", str(folder), str(tmp_path / "p.csv"), "--n", "4", "--max-tokens", "6"]
    words += ["--out", str(tmp_path / "run"), "--json"]
    (tmp_path / "p.csv").write_text("prompt,category\nhello,a\n")
    assert main([*words]) == 2
    assert main([*words, "--trust-remote-code"]) == 0
    whole = ms.read_rollouts(tmp_path / "run")
    (tmp_path / "run" / "part-00000.parquet").unlink()
    assert main([*words, "--trust-remote-code"]) == 0
    assert ms.read_rollouts(tmp_path / "run") == whole
    (folder / "modeling_own.py").write_text(CODE + "\n# changed\n")
    with pytest.raises(InputError, match="a run with other parameters") as caught:
        ms.sample(folder, tmp_path / "p.csv", trust_remote_code=True, out=tmp_path / "run", **ASK)
    assert "trust_remote_code" in caught.value.cause


@pytest.mark.parametrize(
    ("model", "options", "says"),
    [
        ("own", {"engine": "jax"}, "'jax' runs no code of a model's folder"),
        ("http://127.0.0.1:1/v1", {}, "'server' runs no code of a model's folder"),
        ("log", {"engine": "replay"}, "trust_remote_code is True"),
        ("open", {}, "trust_remote_code is True"),
        ("own", {"trust_remote_code": "yes"}, "trust_remote_code is 'yes'"),
    ],
)
def test_where_there_is_no_code_to_run_the_option_is_refused(folder, model, options, says):
    source = {"own": folder, "log": [], "open": object()}.get(model, model)
    prompts = None if model == "log" else ["hello"]
    with pytest.raises(InputError, match=says):
        ms.sample(source, prompts, **{"trust_remote_code": True, **ASK, **options})
    assert not os.environ[MARK]


def test_a_model_opened_in_python_takes_the_option_too(folder):
    with pytest.raises(ModelError, match="brings Python code"):
        open_engine("transformers", folder)
    engine = open_engine("auto", Path(folder), trust_remote_code=True, device="cpu")
    assert engine.name == "transformers"
    assert ms.sample(engine, ["hello"], **ASK).provenance["engine"]["trust_remote_code"]["sha256"]
