"""One part of `gpu` in a process of its own: reads its order from standard input, writes JSON objects line by line."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np

from ..errors import MarkovsafetyError
from ..rollouts.engines import Job, rollout_keys
from ..rollouts.engines.llama_folder import LlamaConfig

__all__ = ["Size", "main", "size_of"]

Tell = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Size:
    """A model's shape and what is asked of it.

    Parameters
    ----------
    batch, prompt, new, rollouts, prompts : int
        Rows side by side; tokens of a prompt and of an answer; answers, and distinct prompts that they are given to.
    stream : int
        Numbers that the bandwidth is measured with.
    """

    config: LlamaConfig
    dtype: str
    batch: int
    prompt: int
    new: int
    rollouts: int
    prompts: int
    stream: int

    @property
    def bound_bytes(self) -> int:
        """Weights and living keys and values, read once a step, over the decoding of all rollouts in full batches."""
        from ..rollouts.engines.jax_memory import cache_bytes

        c, item = self.config, 2 if self.dtype == "bfloat16" else 4
        layer = c.width * (c.heads + 2 * c.kv_heads) * c.head_dim + c.heads * c.head_dim * c.width + 3 * c.width * c.mlp
        weights = item * (c.layers * layer + c.vocab * c.width)  # of the embedding only some rows are read
        tokens = sum(self.prompt + t for t in range(1, self.new))
        waves = -(-self.rollouts // self.batch)
        return waves * (self.new - 1) * weights + self.rollouts * tokens * cache_bytes(c, self.dtype)


def size_of(quick: bool, device: str) -> Size:
    """Llama-2-7B in bfloat16 and 256 rows, or something tiny."""
    head = 16 if quick else 128
    freq = tuple(float(10000.0 ** (-i / head)) for i in range(0, head, 2))

    def config(vocab: int, width: int, layers: int, heads: int, mlp: int) -> LlamaConfig:
        return LlamaConfig("llama", vocab, width, layers, heads, heads, head, mlp, 1e-5, False, 4096, None, freq)

    if quick:
        return Size(config(300, 64, 2, 4, 96), "float32" if device == "cpu" else "bfloat16", 16, 8, 6, 32, 4, 1 << 16)
    return Size(config(32000, 4096, 32, 32, 11008), "bfloat16", 256, 64, 128, 1024, 128, 1 << 29)


def job_of(size: Size, rollouts: int, new: int) -> Job:
    """Random prompts of one length, each asked for as many answers as the others; nothing ends an answer early."""
    rng = np.random.default_rng(0)
    prompts = [rng.integers(3, size.config.vocab, size.prompt).astype(np.int32) for _ in range(size.prompts)]
    none = np.zeros(0, np.int32)
    asked = np.arange(rollouts) * size.prompts // rollouts
    return Job(prompts, asked, [none] * rollouts, rollout_keys(0, np.arange(rollouts)), new, processed=False)


def fastest(run: Callable[[], Any], times: int = 10) -> float:
    """Seconds of the fastest of some runs, after one that is not counted."""
    run()
    best = np.inf
    for _ in range(times):
        begun = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - begun)
    return float(best)


def bandwidth(size: Size, place: Any, tell: Tell) -> None:
    """Bytes per second of copying, of a triad and of reading alone."""
    jax: Any = import_module("jax")
    jnp, n = jax.numpy, size.stream
    x, y = (jax.device_put(jnp.full(n, v, jnp.float32), place) for v in (1.0, 2.0))
    copy, triad, read = jax.jit(lambda x: x + 1), jax.jit(lambda x, y: x + 3 * y), jax.jit(jnp.sum)
    tell({"copy": 8 * n / fastest(lambda: jax.block_until_ready(copy(x)))})
    tell({"triad": 12 * n / fastest(lambda: jax.block_until_ready(triad(x, y)))})
    tell({"read": 4 * n / fastest(lambda: jax.block_until_ready(read(x)))})


def drawn(size: Size, place: Any) -> Any:
    """Random parameters, made where they are to lie."""
    jax: Any = import_module("jax")
    from ..rollouts.engines.jax_home import Home
    from ..rollouts.engines.jax_llama import param_shapes

    shapes, tree = jax.tree.flatten(param_shapes(size.config, jax.numpy.dtype(size.dtype), Home((place,))))

    def made(key: Any, shape: tuple[int, ...]) -> Any:
        return jax.random.uniform(key, shape, size.dtype, -0.035, 0.035) + (len(shape) == 1)  # norms are about 1

    with jax.default_device(place):
        program = jax.jit(made, static_argnums=1)
        leaves = [program(jax.random.key(i, impl="rbg"), tuple(s.shape)) for i, s in enumerate(shapes)]
    return jax.tree.unflatten(tree, jax.block_until_ready(leaves))


def engine(size: Size, place: Any, tell: Tell, other: bool = False) -> None:
    """Sampling with the JAX engine; `other`: with the form of attention that it would not choose."""
    from ..rollouts.engines.jax_attention import chosen
    from ..rollouts.engines.jax_engine import JaxEngine
    from ..rollouts.engines.jax_home import Home

    home = Home((place,))
    nobody: Any = None  # no prompt is in words
    form = chosen("auto", home, size.dtype, size.config)
    if other:
        if form == "plain":  # then the kernel cannot be had, and this says why
            chosen("kernel", home, size.dtype, size.config)
        form = "plain"
    begun = time.perf_counter()
    params = drawn(size, place)
    tell({"attention": form, "draw_seconds": time.perf_counter() - begun})
    model = JaxEngine(nobody, size.config, params, (home,), size.dtype, "", size.batch, 1, attention=form)
    one, job = job_of(size, size.rollouts, 1), job_of(size, size.rollouts, size.new)
    begun = time.perf_counter()
    info = model.run(job).info
    tell({"compile_seconds": info["compile_seconds"], "first_seconds": time.perf_counter() - begun})
    tell({"memory": info["memory"], "cache_lengths": info["cache_lengths"], "rows": info["rows"]})
    model.run(one)
    turns = [model.run(job).info["seconds"] for _ in range(3)]
    reading = min(model.run(one).info["seconds"] for _ in range(3))
    tell(_rates(size, size.rollouts, min(turns), reading))


def _rates(size: Size, rollouts: int, seconds: float, reading: float) -> dict[str, Any]:
    decoding = seconds - reading
    return {
        "batch": size.batch,
        "rollouts": rollouts,
        "prompt_tokens": size.prompt,
        "new_tokens": size.new,
        "dtype": size.dtype,
        "tokens_per_second": rollouts * size.new / seconds,
        "decode_tokens_per_second": rollouts * (size.new - 1) / decoding,
        "decode_seconds": decoding,
        "first_token_seconds": reading,
        "bound_bytes": size.bound_bytes * rollouts // size.rollouts,
    }


def generate(size: Size, place: Any, tell: Tell) -> None:
    """The same with transformers' `generate`: one full batch at a time."""
    torch: Any = import_module("torch")
    transformers: Any = import_module("transformers")
    device = "cuda" if place == "gpu" else "cpu"
    c, kind = size.config, getattr(torch, size.dtype)
    config = transformers.LlamaConfig(
        vocab_size=c.vocab, hidden_size=c.width, num_hidden_layers=c.layers, num_attention_heads=c.heads,
        num_key_value_heads=c.kv_heads, intermediate_size=c.mlp, max_position_embeddings=c.context,
        rms_norm_eps=c.eps, bos_token_id=1, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    config.dtype = kind
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=kind, attn_implementation="sdpa")
    model = model.to_empty(device=device).eval()
    with torch.no_grad():
        for name, value in model.named_parameters():
            value.normal_(1.0 if "norm" in name else 0.0, 0.02)
        for module in model.modules():  # buffers that are computed have to be computed anew where they were empty
            if hasattr(module, "inv_freq"):
                again = type(module)(config).to(device)
                module.inv_freq, module.original_inv_freq = again.inv_freq, again.inv_freq
    if device == "cuda":
        tell({"device": torch.cuda.get_device_name()})
    job = job_of(size, size.batch, size.new)
    ids = torch.tensor(np.stack([job.prompts[p] for p in job.prompt_of])).long().to(device)
    fixed = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "pad_token_id": 0, "eos_token_id": None}

    def run(new: int) -> None:
        settings = transformers.GenerationConfig(max_new_tokens=new, min_new_tokens=new, **fixed)
        with torch.inference_mode():
            found = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings)
        if found.shape != (size.batch, size.prompt + new):
            raise MarkovsafetyError(f"generate gave {tuple(found.shape)}", cause="an answer ended early", next="report")
        if device == "cuda":
            torch.cuda.synchronize()

    seconds = fastest(lambda: run(size.new), 2)
    tell(_rates(size, size.batch, seconds, fastest(lambda: run(1), 2)))


def hitting(size: Size, place: Any, tell: Tell, quick: bool = False) -> None:
    """The cases of ``bench hitting --gpu``, one after the other."""
    from .catalogue import cases
    from .hitting import run
    from .table import as_text

    rows: dict[str, str] = {}
    for case in [c.name for c in cases().values() if c.gpu]:
        result = run(case=[case], quick=quick, gpu=True, turns=1 if quick else 3)
        entry = result["cases"][case]
        ours = next(row for row in entry["rows"] if row["who"].startswith("markovsafety"))
        rows[case] = f"{ours['median'] * 1e3:.4g} ms" if "median" in ours else ours["status"]
        told = {case: entry, "cases": rows, "faults": result["faults"], "table": as_text(result)}
        copy = entry["numbers"].get("copy")
        tell(told | ({} if copy is None else {"copy": copy}))


def main() -> None:
    """Do what the order on standard input says."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever libraries print
    order = json.loads(sys.stdin.read())

    def tell(message: dict[str, Any]) -> None:
        print(json.dumps(message), file=out, flush=True)

    size, name = size_of(order["quick"], order["device"]), order["part"]
    if name == "generate":
        generate(size, order["device"], tell)
        return
    from ..rollouts.engines.jax_home import devices_named
    from .gpu_pieces import pieces

    place = devices_named(order["device"])[0]
    tell({"device": str(place.device_kind)})
    parts: dict[str, Callable[[], None]] = {
        "bandwidth": lambda: bandwidth(size, place, tell),
        "engine": lambda: engine(size, place, tell),
        "other_form": lambda: engine(size, place, tell, other=True),
        "pieces": lambda: pieces(size, place, tell),
        "hitting": lambda: hitting(size, place, tell, order["quick"]),
    }
    parts[name]()


if __name__ == "__main__":
    try:
        main()
    except MarkovsafetyError as error:
        sys.exit(f"{error.fact} ({error.cause})")
