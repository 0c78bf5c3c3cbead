"""Attention of one new token per row over a cache of keys and values, in two forms.

"plain" is written in JAX and looks at the whole cache, hiding what is not there yet. "kernel" is JAX's own Pallas
kernel for decoding (`jax.experimental.pallas.ops.gpu.decode_attention`), which stops at each row's length: on a GPU,
where reading keys and values is most of a step, rows that are half as long as the cache take half the time.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ...errors import InputError
from .jax_home import Home, first_line
from .llama_folder import LlamaConfig

__all__ = ["ATTENTIONS", "chosen", "kernel", "mean_of", "plain", "precision"]

ATTENTIONS = ("auto", "plain", "kernel")
HIDDEN = -1e30
"""Score of a position that must not be seen; finite, so that padding, which sees nothing, gives no NaN."""
TILE = 128
"""Positions that the kernel reads at a time, at most."""
LEAST = 16
"""Sides of the smallest tiles that tensor cores multiply."""
AGREE = 0.05
"""Largest difference of both forms on normal numbers in bfloat16, whose own rounding is a tenth of it."""


def precision(x: jax.Array) -> str | None:
    """Of products with x: on GPUs the default would cut float32 to 10 bits of mantissa; bfloat16 has 7 anyway."""
    return "highest" if x.dtype == jnp.float32 else None


def mean_of(scores: jax.Array, visible: jax.Array, product: str, v: jax.Array) -> jax.Array:
    """Mean of the values under the softmax of float32 scores, which are scaled and hidden here."""
    scores = jnp.where(visible, scores * v.shape[-1] ** -0.5, HIDDEN)
    weight = jnp.exp(scores - jnp.max(scores, -1, keepdims=True))
    mean = jnp.einsum(product, weight.astype(v.dtype), v, precision=precision(v), preferred_element_type=jnp.float32)
    return (mean / jnp.sum(weight, -1, keepdims=True)).astype(v.dtype)  # divided last: head_dim numbers, not positions


def plain(q: jax.Array, keys: jax.Array, values: jax.Array, position: jax.Array) -> jax.Array:
    """Attention of the newest position of each row to those up to it.

    Parameters
    ----------
    q : array, shape (batch, kv_heads, heads / kv_heads, head_dim)
    keys, values : arrays, shape (batch, kv_heads, positions, head_dim)
    position : int array, shape (batch,)
        Of the newest token.

    Returns
    -------
    array, shape (batch, kv_heads, heads / kv_heads, head_dim)
    """
    visible = (jnp.arange(keys.shape[2]) <= position[:, None])[:, None, None]
    scores = jnp.einsum("bgrd,bgsd->bgrs", q, keys, precision=precision(q), preferred_element_type=jnp.float32)
    return mean_of(scores, visible, "bgrs,bgsd->bgrd", values)


def kernel(q: jax.Array, keys: jax.Array, values: jax.Array, position: jax.Array, interpret: bool = False) -> jax.Array:
    """The same by JAX's kernel for decoding; positions are a multiple of 16."""
    decoding: Any = import_module("jax.experimental.pallas.ops.gpu.decode_attention")
    batch, groups, length, size = keys.shape
    found = decoding.mqa(
        q.reshape(batch * groups, -1, size),
        keys.reshape(batch * groups, length, size),
        values.reshape(batch * groups, length, size),
        kv_seq_len=jnp.repeat(position + 1, groups),
        block_h=LEAST,
        block_k=min(TILE, length & -length),
        k_splits=1,
        interpret=interpret,
    )
    return found.astype(q.dtype).reshape(q.shape)


def chosen(name: str, home: Home, dtype: str, config: LlamaConfig) -> str:
    """The form to use: as named; "auto" is the kernel on a GPU where it works, proven by a small case there.

    Raises
    ------
    InputError
        The kernel was named, and cannot be had.
    """
    size = config.head_dim
    why = ""
    if home.ways > 1:
        why = "one copy of the model is split over several devices, and the compiler cannot split the kernel"
    elif dtype != "bfloat16":
        why = f"it multiplies in bfloat16, and the model is held in {dtype}"
    elif size < LEAST or size & (size - 1):
        why = f"it takes heads whose size is a power of two from {LEAST} on, not {size}"
    elif home.platform not in ("gpu", "cuda"):
        why = f"it is compiled for GPUs, not for {home.platform}"
    if name == "plain" or (name == "auto" and why):
        return "plain"
    if not why:
        why = _fault(home, size, config.heads // config.kv_heads)
        if not why:
            return "kernel"
    if name == "auto":
        return "plain"
    raise InputError("the attention kernel cannot be used", cause=why, next="leave attention='auto'")


def _fault(home: Home, size: int, group: int) -> str:
    """What is wrong with the kernel on this device, "" if nothing is."""
    rng = np.random.default_rng(0)
    shapes = (3, 2, group, size), (3, 2, 4 * LEAST, size), (3, 2, 4 * LEAST, size)
    place = home.sharding()
    try:
        arrays = [jax.device_put(rng.normal(size=s).astype(jnp.bfloat16), place) for s in shapes]
        position = jax.device_put(np.array([0, LEAST, 4 * LEAST - 1], np.int32), place)
        one, two = (np.asarray(jax.jit(form)(*arrays, position), np.float32) for form in (kernel, plain))
    except Exception as error:  # whatever this version of JAX, its Triton or this GPU has against it
        return f"{type(error).__name__}: {first_line(error)}"
    apart = float(np.abs(one - two).max())
    return "" if apart < AGREE else f"on a small case it differs from plain attention by {apart:.2g}"
