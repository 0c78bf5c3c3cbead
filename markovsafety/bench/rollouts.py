"""Tokens per second of the JAX engine and of transformers' `generate`, in turn on the same cores.

Counted are sampled tokens up to and including the one that ends the answer. Both engines get the same prompts, dtype,
limit of tokens and cores, and each its best batch size out of a grid; compiling is reported and not counted. `generate`
gets its prompts sorted by length, so that it pads little. The engines take turns, so that a busy machine is busy for
both; of several turns each keeps its fastest.
"""

from __future__ import annotations

import contextlib
import json as json_module
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from ..errors import InputError
from ..rollouts.engines import Job, open_engine, rollout_keys
from ..rollouts.provenance import versions
from .machine import processor

__all__ = ["run"]

FIXED = 64
"""The batch size that both are measured at besides their best."""


def run(
    model: str | Path | None = None,
    *,
    rollouts: int = 8192,
    max_tokens: int = 80,
    ours: Sequence[int] = (128, 256),
    theirs: Sequence[int] = (256, 1024, 2048),
    turns: int = 3,
    seed: int = 0,
    json: str | Path | None = None,
) -> dict[str, Any]:
    """Measure both engines.

    Parameters
    ----------
    model : str or Path, optional
        Llama-family folder; by default the shipped organism "shallow".
    rollouts : int
        Rollouts of the JAX engine; `generate` takes as many of them as fill its batches, at least 1024.
    max_tokens : int
    ours, theirs : sequence of int
        Batch sizes to try besides 64.
    turns : int
        Measurements of each batch size.
    seed : int
    json : str or Path, optional
        Where to write the result as well.

    Returns
    -------
    dict
        ``ratio_best``, ``ratio_64``; ``jax`` and ``generate``: batch size -> tokens per second of every turn;
        ``compile_seconds``, ``cores``, ``tokens_per_rollout``, ``versions``; ``line``: all of it to read.

    Raises
    ------
    InputError
        transformers is not installed.
    ModelError
        The JAX engine cannot read the model.
    """
    if model is None:
        from ..organism import model_path

        model = model_path("shallow")
    job = _job(model, rollouts, max_tokens, seed)
    batches = {"jax": sorted({FIXED, *ours}), "generate": sorted({FIXED, *theirs})}
    rates: dict[str, dict[int, list[float]]] = {name: {b: [] for b in sizes} for name, sizes in batches.items()}
    lengths: dict[str, list[float]] = {name: [] for name in batches}
    engines = {b: open_engine("jax", model, batch_size=b, device="cpu") for b in batches["jax"]}
    compiled = sum(engine.run(job).info["compile_seconds"] for engine in engines.values())
    with _peer(model, job) as generate, tqdm(total=turns * sum(map(len, batches.values())), disable=None) as bar:
        generate(FIXED, FIXED)  # warm up
        for _ in range(turns):
            for name, sizes in batches.items():
                for size in sizes:
                    if name == "jax":
                        info = engines[size].run(job).info
                        tokens, seconds, n = info["sampled_tokens"], info["seconds"], len(job)
                    else:
                        n = min(len(job), size * -(-1024 // size))
                        tokens, seconds = generate(size, n)
                    rates[name][size].append(tokens / seconds)
                    lengths[name].append(tokens / n)
                    bar.update()
    result = _summary(rates, lengths, compiled, job)
    if json is not None:
        Path(json).write_text(json_module.dumps(result, indent=1) + "\n", encoding="utf-8")
    return result


def _job(model: str | Path, rollouts: int, max_tokens: int, seed: int) -> Job:
    from ..organism import prompts
    from ..rollouts.template import Template

    template = Template.load(model)
    ids = [template.prompt_ids(prompt["prompt"]) for prompt in prompts(n=128, seed=seed)]
    none = np.zeros(0, np.int32)
    keys = rollout_keys(seed, np.arange(rollouts))
    return Job(ids, np.arange(rollouts) % 128, [none] * rollouts, keys, max_tokens, eos_ids=template.eos_ids)


@contextlib.contextmanager
def _peer(model: str | Path, job: Job) -> Iterator[Any]:
    """generate(batch size, number of rollouts) -> (tokens, seconds), on all cores in float32."""
    try:
        import torch
        import transformers
    except ImportError as error:
        raise InputError(
            "the benchmark compares with transformers, which is not installed",
            cause=f"importing {error.name or 'it'} failed",
            next="pip install 'markovsafety[models]'",
        ) from error
    from ..rollouts.engines.jax_plan import cores

    peer: Any = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    pad = peer.config.pad_token_id if peer.config.pad_token_id is not None else job.eos_ids[0]
    peer.generation_config = transformers.GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=job.max_tokens,
        eos_token_id=list(job.eos_ids),
        pad_token_id=pad,
    )

    def generate(size: int, n: int) -> tuple[int, float]:
        rows = [job.prompts[p] for p in job.prompt_of[:n]]
        rows.sort(key=len)
        tokens, start = 0, time.perf_counter()
        for at in range(0, len(rows), size):
            part = rows[at : at + size]
            width = max(map(len, part))
            ids = torch.tensor(np.stack([np.pad(r, (width - len(r), 0), constant_values=pad) for r in part])).long()
            mask = torch.tensor(np.stack([np.arange(width) >= width - len(r) for r in part])).long()
            new = peer.generate(ids, attention_mask=mask)[:, width:]
            ends = torch.isin(new, torch.tensor(job.eos_ids))
            stop = torch.where(ends.any(1), ends.int().argmax(1) + 1, new.shape[1])
            tokens += int(stop.sum())
        return tokens, time.perf_counter() - start

    before = torch.get_num_threads()
    torch.set_num_threads(cores())
    try:
        with torch.inference_mode():
            yield generate
    finally:
        torch.set_num_threads(before)


def _summary(
    rates: dict[str, dict[int, list[float]]], lengths: dict[str, list[float]], compiled: float, job: Job
) -> dict[str, Any]:
    from ..rollouts.engines.jax_plan import cores

    fastest = {name: {size: max(turns) for size, turns in sizes.items()} for name, sizes in rates.items()}
    best = {name: max(sizes, key=lambda b, s=sizes: s[b]) for name, sizes in fastest.items()}
    ours, theirs = fastest["jax"], fastest["generate"]
    ratio_best = ours[best["jax"]] / theirs[best["generate"]]
    ratio_fixed = ours[FIXED] / theirs[FIXED]
    per_rollout = {name: float(np.mean(values)) for name, values in lengths.items()}
    have = {k: v for k, v in versions().items() if k in ("python", "jax", "torch", "transformers", "markovsafety")}
    lines = [
        f"sampled tokens per second on {cores()} cores, float32: {len(job)} rollouts of {len(job.prompts)} prompts, "
        f"{per_rollout['jax']:.1f} tokens each (generate: {per_rollout['generate']:.1f}), at most {job.max_tokens}",
        f"{'batch size':<16}{'jax':>16}{'generate':>16}{'ratio':>8}",
        f"{FIXED:<16}{ours[FIXED]:>16,.0f}{theirs[FIXED]:>16,.0f}{ratio_fixed:>8.1f}",
        f"{'each its best':<16}{ours[best['jax']]:>16,.0f}{theirs[best['generate']]:>16,.0f}{ratio_best:>8.1f}"
        f"   (batch {best['jax']} and {best['generate']})",
        f"compiling took {compiled:.1f} s and is not counted; " + ", ".join(f"{k} {v}" for k, v in have.items()),
    ]
    return {
        "line": "\n".join(lines),
        "ratio_best": ratio_best,
        f"ratio_{FIXED}": ratio_fixed,
        "best_batch": best,
        **{name: {str(size): turns for size, turns in sizes.items()} for name, sizes in rates.items()},
        "compile_seconds": compiled,
        "cores": cores(),
        "dtype": "float32",
        "max_tokens": job.max_tokens,
        "rollouts": len(job),
        "tokens_per_rollout": per_rollout,
        "versions": have,
        "date": datetime.now(UTC).date().isoformat(),
        "processor": processor(),
    }
