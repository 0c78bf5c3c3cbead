"""What a step of decoding is made of, piece by piece: which of them falls short of the bandwidth?"""

from __future__ import annotations

import functools
from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from .gpu_parts import Size

__all__ = ["pieces"]


def pieces(size: Size, place: Any, tell: Callable[[dict[str, Any]], None]) -> None:
    """Attention in both forms, the products of one layer, drawing a token, and what the compiler says of a step."""
    jax: Any = import_module("jax")
    from ..rollouts.engines import jax_attention
    from ..rollouts.engines.jax_sampling import Draw, _pick
    from .gpu_parts import fastest

    c, jnp, rows = size.config, jax.numpy, size.batch
    rng, length = np.random.default_rng(0), -(-(size.prompt + size.new) // 64) * 64

    def array(*shape: int, dtype: str = size.dtype) -> Any:
        with jax.default_device(place):
            return jax.random.normal(jax.random.key(0), shape, dtype)

    def timed(run: Callable[..., Any], *arguments: Any) -> float:
        program = jax.jit(run)
        return fastest(lambda: jax.block_until_ready(program(*arguments)))

    q = array(rows, c.kv_heads, c.heads // c.kv_heads, c.head_dim)
    keys, values = (array(rows, c.kv_heads, length, c.head_dim) for _ in range(2))
    position = jax.device_put(rng.integers(size.prompt, length, rows).astype(np.int32), place)
    tell({"positions": length, "mean_position": float(np.mean(position))})
    seconds = timed(jax_attention.plain, q, keys, values, position)
    tell({"plain_seconds": seconds, "plain_gigabytes": 2 * keys.nbytes / seconds / 1e9})
    if size.dtype == "bfloat16" and place.platform != "cpu":
        seconds = timed(jax_attention.kernel, q, keys, values, position)
        living = 2 * keys.nbytes * float(np.mean(position) + 1) / length
        tell({"kernel_seconds": seconds, "kernel_gigabytes": living / seconds / 1e9})
    weights = [
        array(c.width, (c.heads + 2 * c.kv_heads) * c.head_dim),
        array(c.width, 2 * c.mlp),
        array(c.vocab, c.width).T,
    ]
    x = array(rows, c.width)
    seconds = timed(lambda x, *ws: [x @ w for w in ws], x, *weights)
    tell({"layers_seconds": seconds, "layers_gigabytes": sum(w.nbytes for w in weights) / seconds / 1e9})
    logits, u = array(rows, c.vocab, dtype="float32"), array(rows, dtype="float32") % 1
    pick = functools.partial(_pick, Draw("raw", False, 0))
    member = jax.device_put(jnp.zeros((c.vocab, 0), jnp.float32), place)
    one = jax.device_put(np.float32(1), place)
    tell({"sampling_seconds": timed(pick, logits, u, member, one, one)})
    tell(_said(size, place, length))


def _said(size: Size, place: Any, length: int) -> dict[str, Any]:
    """Bytes that one step moves as the compiler counts them, from two depths, beside weights and cache read once."""
    import dataclasses

    jax: Any = import_module("jax")
    from ..rollouts.engines.jax_home import Home
    from ..rollouts.engines.jax_llama import decode, param_shapes

    home, dtype = Home((place,)), jax.numpy.dtype(size.dtype)

    def shape(*dims: int, dtype: Any = "int32") -> Any:
        return jax.ShapeDtypeStruct(dims, dtype, sharding=home.sharding())

    moved, least = [], []
    for layers in (1, 2):
        c = dataclasses.replace(size.config, layers=layers)
        params = param_shapes(c, dtype, home)
        cache = (shape(size.batch, c.kv_heads, length, c.head_dim, dtype=dtype),) * (2 * layers)
        step = jax.jit(functools.partial(_step, decode, c), donate_argnums=3)
        told = step.lower(params, shape(size.batch), shape(size.batch), cache).compile().cost_analysis() or {}
        moved.append(told.get("bytes accessed", float("nan")))
        arrays = [*jax.tree.leaves({k: v for k, v in params.items() if k != "embed"}), *cache]
        least.append(sum(int(np.prod(a.shape)) * a.dtype.itemsize for a in arrays))
    more = size.config.layers - 1
    whole, bound = (x[0] + more * (x[1] - x[0]) for x in (moved, least))
    if not np.isfinite(whole):
        return {}
    return {"compiler_bytes": whole, "least_bytes": bound, "compiler_ratio": whole / bound}


def _step(decode: Any, config: Any, params: Any, token: Any, position: Any, cache: Any) -> Any:
    return decode(params, config, token, position, cache)
