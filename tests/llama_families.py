"""Random models of every family the JAX engine reads, and jobs for them."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from markovsafety.rollouts.engines import Job, open_engine, rollout_keys

VOCAB, CONTEXT, EOS = 61, 128, 2
BASE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": CONTEXT,
    "bos_token_id": 1,
    "eos_token_id": EOS,
    "pad_token_id": 0,
    "initializer_range": 0.3,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LINEAR = {"rope_type": "linear", "rope_theta": 1000.0, "factor": 2.5}
FAMILIES = {
    "llama": ("llama", {}),
    "llama-tied": ("llama", {"tie_word_embeddings": True, "num_key_value_heads": 4}),
    "llama-biases": (
        "llama",
        {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 1, "rms_norm_eps": 1e-3},
    ),
    "llama-linear": ("llama", {"rope_parameters": LINEAR}),
    "llama-llama3": ("llama", {"rope_parameters": LLAMA3, "head_dim": 16}),
    "mistral": ("mistral", {"sliding_window": None, "head_dim": 12}),
    "mistral-window": ("mistral", {"sliding_window": CONTEXT}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {"head_dim": 16}),
}


def write_tokenizer(folder: Path, vocab: int = VOCAB) -> None:
    names = ["<pad>", "<bos>", "<eos>", "<unk>", *(f"w{i}" for i in range(4, vocab))]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(names)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["<pad>", "<bos>", "<eos>", "<unk>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<bos>", "eos_token": "<eos>"}))


def old_spelling(options: dict) -> dict:
    """The options of a config as transformers 4 spells them: rope_theta and rope_scaling."""
    options = dict(options)
    rope = dict(options.pop("rope_parameters", {}))
    if rope:
        options |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope}
    return options


@pytest.fixture(scope="session")
def family(tmp_path_factory):
    """A random model of a family, made by transformers and saved: (folder, the torch model)."""
    import torch
    import transformers

    torch.set_num_threads(1)

    @lru_cache
    def make(name: str):
        kind, options = FAMILIES[name]
        if transformers.__version__.startswith("4."):
            options = old_spelling(options)
        config = transformers.AutoConfig.for_model(kind, **{**BASE, **options})
        torch.manual_seed(len(name))
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
        with torch.no_grad():  # norms and biases start at 1 and 0, where a mistake would not show
            for key, value in model.named_parameters():
                if "norm" in key or key.endswith("bias"):
                    value.add_(torch.randn_like(value) * 0.3)
        folder = tmp_path_factory.mktemp(name)
        model.save_pretrained(folder)
        write_tokenizer(folder)
        return folder, model

    return make


@pytest.fixture(scope="session")
def engine(family):
    return open_engine("jax", family("llama")[0], batch_size=16)


def torch_logits(model, tokens, **kwargs) -> np.ndarray:
    import torch

    with torch.inference_mode():
        return model(torch.as_tensor(np.asarray(tokens), dtype=torch.long), **kwargs).logits.numpy()


def job_of(contexts, repeat, *, seed=0, forced=None, max_tokens=24, **options) -> Job:
    n = len(contexts) * repeat
    forced = [np.zeros(0, np.int32)] * n if forced is None else forced
    prompts = [np.asarray(c, np.int32) for c in contexts]
    options = {"eos_ids": (EOS,), **options}
    return Job(prompts, np.arange(n) % len(prompts), forced, rollout_keys(seed, np.arange(n)), max_tokens, **options)


def random_contexts(count, low, high, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(4, VOCAB, rng.integers(low, high + 1)).astype(np.int32) for _ in range(count)]
