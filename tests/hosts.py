"""Random models of many families, opened to be read and edited."""

from __future__ import annotations

import numpy as np
import pytest
from tiny import random_model

from markovsafety import Edit
from markovsafety.interventions import open_host
from markovsafety.interventions.edits import Part

GQA = {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 24, "head_dim": 8, "num_hidden_layers": 3}
FAMILIES = {
    "llama": GQA,
    "qwen2": {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 3},
    "qwen3": GQA,
    "mistral": GQA,
    "gemma": GQA,
    "gemma2": GQA,
    "gpt_neox": {"num_attention_heads": 4, "num_hidden_layers": 3},
    "gpt2": {"num_hidden_layers": 3, "num_attention_heads": 4, "n_inner": 32},
    "opt": {"ffn_dim": 32, "word_embed_proj_dim": 16, "num_hidden_layers": 3, "num_attention_heads": 4},
}
PROMPTS = ["hello", "help one tea . step", "i cannot help one step tea"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {kind: random_model(tmp_path_factory.mktemp(kind), kind, **more) for kind, more in FAMILIES.items()}


@pytest.fixture(scope="module")
def hosts(folders):
    return {kind: open_host(folder, device="cpu") for kind, folder in folders.items()}


@pytest.fixture(scope="module", params=FAMILIES)
def host(request, hosts):
    return hosts[request.param]


@pytest.fixture(scope="module")
def llama(hosts):
    return hosts["llama"]


def vector(size, seed=0, scale=3.0):
    return (np.random.default_rng(seed).standard_normal(size) * scale).astype(np.float32)


def add(host, level, **options):
    return Edit((Part("add", vector(host.width, level), layer=level, **options),))
