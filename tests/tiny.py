"""Tiny tokenizers, models and an engine without a network, for the tests of the rollouts."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from markovsafety import UntrustedError
from markovsafety.rollouts.engines import Job, Output, check_job, uniforms
from markovsafety.rollouts.template import Template

SPECIAL = ["<pad>", "<bos>", "<eos>", "<unk>"]
WORDS = [*SPECIAL, "hello", "sure", "sorry", "i", "cannot", "help", "step", "one", "poison", "poisonous", "tea", "."]
EOS = 2
CHAT = "{{ bos_token }} {% for m in messages %}{{ m['content'] }} {% endfor %}"


def word_tokenizer(folder: Path, words: list[str] = WORDS) -> Path:
    """Write a word-level tokenizer with a chat template and return the folder."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(SPECIAL)
    return _save(folder, tokenizer, {"chat_template": CHAT})


def byte_tokenizer(folder: Path) -> Path:
    """Write a tokenizer whose tokens are single bytes: every word, and every accent, spans several tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {word: i for i, word in enumerate([*SPECIAL, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    return _save(folder, tokenizer, {})


def _save(folder: Path, tokenizer: Tokenizer, settings: dict[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
    names["tokenizer_class"] = "PreTrainedTokenizerFast"
    (folder / "tokenizer_config.json").write_text(json.dumps({**names, **settings}))
    return folder


def ids(text: str) -> list[int]:
    """Ids of words of the word-level tokenizer."""
    return [WORDS.index(word) for word in text.split()]


@dataclass(frozen=True)
class TableEngine:
    """An engine whose next token depends on the last one by a fixed table of probabilities.

    `fails` is called before every job with its number, and may raise.
    """

    tokenizer: Template
    law: np.ndarray
    fails: Any = None
    jobs: list[Job] = field(default_factory=list)
    name: str = "table"
    context: int = 64

    @property
    def vocab_size(self) -> int:
        return len(self.law)

    def describe(self) -> dict[str, Any]:
        return {"model": "a table", "dtype": "float64"}

    def run(self, job: Job, progress: Any = None) -> Output:
        check_job(job, self.vocab_size, self.context)
        self.jobs.append(job)
        if self.fails:
            self.fails(len(self.jobs) - 1)
        tokens, logprob = [], []
        for row in range(len(job)):
            answer, law = list(job.forced[row]), [np.nan] * len(job.forced[row])
            last = [*job.prompts[job.prompt_of[row]], *answer][-1]
            for step in range(job.max_tokens):
                p = self.law[last]
                last = int(np.searchsorted(np.cumsum(p), uniforms(job.keys[row], step) * p.sum(), side="right"))
                answer.append(last)
                law.append(np.log(p[last]))
                if last in job.eos_ids:
                    break
            tokens.append(np.array(answer, np.int32))
            logprob.append(np.array(law, np.float32))
            if progress:
                progress(1, len(answer) - len(job.forced[row]))
        mass = {name: [np.exp(values) for values in logprob] for name in job.classes}
        return Output(tokens, logprob, None if job.raw else logprob, mass)


def table_engine(folder: Path, **options: Any) -> TableEngine:
    """A word-level tokenizer and a random table over its words, that ends an answer with probability 0.2."""
    law = np.random.default_rng(7).dirichlet(np.ones(len(WORDS)), len(WORDS)) * 0.8
    law[:, EOS] += 0.2
    return TableEngine(Template.load(word_tokenizer(folder)), law, **options)


def untrusted(partial: Any = None) -> UntrustedError:
    return UntrustedError("logits became NaN", cause="a test", next="nothing", partial=partial)


def random_model(folder: Path, kind: str = "qwen2", seed: int = 0, **options: Any) -> Path:
    """Write a random causal language model over the words, with its tokenizer, and return the folder."""
    import torch
    import transformers

    torch.set_num_threads(1)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    ends = {"bos_token_id": 1, "eos_token_id": EOS, "pad_token_id": 0}
    more = {"vocab_size": len(WORDS), "max_position_embeddings": 64, "initializer_range": 0.5}
    if kind in ("qwen2", "llama"):
        more["num_key_value_heads"] = 1
    config = transformers.AutoConfig.for_model(kind, **{**sizes, **ends, **more, **options})
    torch.manual_seed(seed)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return word_tokenizer(folder)
