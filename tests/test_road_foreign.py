"""Any Hugging Face model walks the same road: random-weight Qwen2 and GPT-NeoX folders, from `sample` to `report`."""

from __future__ import annotations

import json

import pytest
from tiny import WORDS, word_tokenizer

from markovsafety.cli import main


def folder_of(kind, folder):
    """A tiny random-weight model folder with a word-level tokenizer and a chat template."""
    import torch
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    torch.set_num_threads(1)
    size = {"vocab_size": len(WORDS), "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    size |= {
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    if kind == "qwen2":
        model = Qwen2ForCausalLM(Qwen2Config(**size, num_key_value_heads=1))
    else:
        model = GPTNeoXForCausalLM(GPTNeoXConfig(**size))
    model.save_pretrained(folder)
    return word_tokenizer(folder)


@pytest.mark.parametrize("kind", ["qwen2", "gpt_neox"])
def test_sample_judge_report(kind, tmp_path, capsys):
    model = folder_of(kind, tmp_path / kind)
    prompts = tmp_path / "prompts.csv"
    prompts.write_text(
        "prompt,category,prefix\nhello i,one,sure i help\nhello step,two,sure step one\ntea,two,i help sure\n"
    )
    out = tmp_path / "run"
    words = ["sample", str(model), str(prompts), "--engine", "transformers", "--out", str(out)]
    assert main([*words, "--n", "6", "--max-tokens", "12", "--prefill", "0", "1", "3"]) == 0
    judged = tmp_path / "run.parquet"
    assert main(["judge", str(out), "--harm", "poison", "--refusal", "sorry", "i cannot", "--out", str(judged)]) == 0
    assert main(["report", f"{kind}={judged}", "--states", "kgram:1", "--out", str(tmp_path / "page")]) == 0
    summary = json.loads((tmp_path / "page" / "summary.json").read_text())
    assert summary["rollouts"] == 3 * 3 * 6
    assert summary["models"][kind]["harm"].keys() == {"all", "one", "two"}
    assert summary["models"][kind]["harm"]["all"].keys() == {"0", "1", "3"}
    assert (tmp_path / "page" / "index.html").stat().st_size > 10_000
