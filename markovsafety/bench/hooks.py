"""What reading and editing activations costs: recording beside a plain forward pass, edited generation beside plain.

Both sides of a comparison are run in turns on the same batches; the fastest turn of each counts. The models are random
Llamas of a size whose decoding step takes tens of milliseconds on a core, and the shipped organism.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from .machine import machine, versions
from .markdown import markdown_table

__all__ = ["run"]

SIZES = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12}
BARS = {"recording": 1.2, "generation": 1.05}


def run(out: str | Path | None = None, *, quick: bool = False, turns: int = 5) -> dict[str, Any]:
    """Measure recording and generation.

    Parameters
    ----------
    out : path, optional
        JSON; a page of Markdown goes beside it.
    quick : bool
        Small sizes, one turn: only whether it runs.
    turns : int

    Returns
    -------
    dict
        rows: name, plain and hooked (seconds), ratio, bar, met; ``line``.
    """
    with tempfile.TemporaryDirectory() as folder:
        rows = _rows(Path(folder), quick, 1 if quick else turns)
    result = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "versions": versions(("numpy", "torch", "transformers")),
        "turns": 1 if quick else turns,
        "rows": rows,
    }
    worst = max(rows, key=lambda r: r["ratio"] / r["bar"])
    result["line"] = f"dearest: {worst['name']}, {worst['ratio']:.3f} of the plain pass (bar {worst['bar']})"
    if out is not None:
        Path(out).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        Path(out).with_suffix(".md").write_text(_page(result), encoding="utf-8")
    return result


def _rows(folder: Path, quick: bool, turns: int) -> list[dict[str, Any]]:
    from ..interventions.host import open_host
    from ..organism import model_path, prompts

    rows = []
    organism = open_host(model_path("shallow"), device="cpu")
    asked = organism.prompt_ids(prompts(n=48 if quick else 1000))
    rows.append(_recording("organism, 4 layers of 64", organism, asked, turns))
    host = open_host(_model(folder, {**SIZES, "num_hidden_layers": 2} if quick else SIZES), device="cpu")
    rng = np.random.default_rng(0)
    asked = [rng.integers(4, 199, size=24) for _ in range(4 if quick else 64)]
    rows.append(_recording(f"{host.layers} layers of {host.width}", host, asked, turns))
    rows += _generation(host, 2 if quick else 16, 2 if quick else 24, turns)
    return rows


def _model(folder: Path, sizes: dict[str, Any]) -> Path:
    """A Llama of random weights with the organism's tokenizer."""
    import shutil

    import torch
    import transformers

    from ..organism import WORDS, model_path

    torch.manual_seed(0)
    config = transformers.LlamaConfig(vocab_size=len(WORDS), max_position_embeddings=256, **sizes)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (model_path("shallow") / name).exists():
            shutil.copy(model_path("shallow") / name, folder / name)
    return folder


def _recording(name: str, host: Any, asked: list[np.ndarray], turns: int) -> dict[str, Any]:
    """All levels at two positions of every prompt, beside the blocks alone (no logits) on the same batches."""
    from ..interventions.record import activations

    def plain() -> None:
        for _, batch in host.batches(asked):
            host.forward(batch)

    plain_s, hooked_s = _turns(plain, lambda: activations(host, asked, (-4, -1)), turns)
    what = f"recording {len(asked)} prompts, all levels, 2 positions: {name}"
    return _row(what, plain_s, hooked_s, BARS["recording"])


def _generation(host: Any, batch: int, steps: int, turns: int) -> list[dict[str, Any]]:
    """Batched generation under edits, beside the same without."""
    from ..interventions.edits import Edit, Part
    from ..rollouts.engines import Job, rollout_keys

    rng = np.random.default_rng(1)
    prompts = [rng.integers(4, 199, size=16) for _ in range(batch)]
    none = np.zeros(0, np.int32)
    job = Job(prompts, np.arange(batch), [none] * batch, rollout_keys(0, np.arange(batch)), steps)
    small = rng.standard_normal(host.width) * 1e-3
    head = rng.standard_normal(host.head_dim) * 1e-3
    edits = {
        "one addition at every step": Edit((Part("add", small, layer=host.layers // 2, when="every"),)),
        "four heads at every step": Edit(
            tuple(Part("head", head, layer=i % host.layers, head=i, when="every") for i in range(4))
        ),
        "an addition while the prompt is read": Edit((Part("add", small, layer=1, where=(0, None)),)),
    }
    rows = []
    for name, edit in edits.items():
        engine = host.engine.edited(edit)
        plain, hooked = _turns(lambda: host.engine.run(job), lambda engine=engine: engine.run(job), turns)
        row = _row(f"generating {batch} x {steps} tokens, {name}", plain, hooked, BARS["generation"])
        rows.append({**row, "step_ms": 1e3 * min(plain) / steps})
    return rows


def _turns(plain: Callable[[], Any], hooked: Callable[[], Any], turns: int) -> tuple[list[float], list[float]]:
    plain()  # warm up
    hooked()
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(turns):
        for place, call in enumerate((plain, hooked)):
            begun = time.perf_counter()
            call()
            seconds[place].append(time.perf_counter() - begun)
    return seconds


def _row(name: str, plain: list[float], hooked: list[float], bar: float) -> dict[str, Any]:
    ratio = min(hooked) / min(plain)
    return {"name": name, "plain": min(plain), "hooked": min(hooked), "ratio": ratio, "bar": bar} | {
        "met": ratio <= bar,
        "turns": {"plain": plain, "hooked": hooked},
    }


def _page(result: dict[str, Any]) -> str:
    rows = [
        [
            r["name"],
            f"{1e3 * r['plain']:.0f}",
            f"{1e3 * r['hooked']:.0f}",
            f"{r['ratio']:.3f}",
            f"{r['bar']:g}",
            f"{r['step_ms']:.0f}" if "step_ms" in r else "",
        ]
        for r in result["rows"]
    ]
    head = ["what", "plain, ms", "with hooks, ms", "ratio", "bar", "plain step, ms"]
    return (
        "# What reading and editing activations costs\n\n"
        f"`markovsafety bench hooks --out hooks.json`, {result['date'][:10]}, {result['machine']}, "
        + ", ".join(f"{k} {v}" for k, v in result["versions"].items())
        + f". Both sides in {result['turns']} turns on the same batches, the fastest of each counts; a plain forward "
        "pass is the blocks without the logits.\n\n" + markdown_table(head, rows) + "\n"
    )
