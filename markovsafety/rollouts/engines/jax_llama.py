"""The Llama family in JAX: parameters on a device, prompts in one pass, then one token per row with a key-value cache.

A cache is a tuple of 2 x layers arrays, keys and values alternating, each of shape (batch, kv_heads, positions,
head_dim). Rows start at position 0 whatever their length: a row's own position says where its next key goes and how far
it looks, so rows of different ages share a batch without padding on the left.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .jax_attention import kernel, mean_of, plain, precision
from .jax_edits import Place, shifted
from .jax_home import Home
from .llama_folder import LlamaConfig, UnsupportedModel, read_config, read_weights

__all__ = [
    "LlamaConfig",
    "UnsupportedModel",
    "decode",
    "forward",
    "load_params",
    "param_shapes",
    "prefill",
    "read_config",
]

Params = dict[str, Any]
Cache = tuple[jax.Array, ...]


def load_params(folder: str | Path, config: LlamaConfig, dtype: Any, home: Home) -> Params:
    """Read a checkpoint into parameters on a home: projections transposed, query-key-value and gate-up fused.

    Raises
    ------
    ModelError
        As `read_weights`.
    """
    weights = read_weights(folder, config)

    def put(name: str, *sources: str) -> jax.Array:
        parts = [weights.pop(source) for source in sources]
        whole = parts[0]
        if name.startswith(FUSED):  # of every part, each device's share stands together
            parts = [part.reshape(home.ways, -1, *part.shape[1:]) for part in parts]
            whole = np.concatenate(parts, axis=1) if len(parts) > 1 else parts[0]
        if name not in ("embed", "head") and not name.endswith("_bias"):
            whole = np.moveaxis(whole, -1, 0)
        return jax.device_put(np.ascontiguousarray(whole).astype(dtype), home.of(name, config))

    params: Params = {"embed": put("embed", "model.embed_tokens.weight"), "norm": put("norm", "model.norm.weight")}
    if not config.tied:
        params["head"] = put("head", "lm_head.weight")
    params["layers"] = [
        {name: put(name, *sources) for name, sources in _sources(config, i).items()} for i in range(config.layers)
    ]
    return params


FUSED = ("qkv", "gate_up")


def _sources(config: LlamaConfig, layer: int) -> dict[str, list[str]]:
    """Names of the checkpoint's tensors behind each parameter of a layer."""
    p = f"model.layers.{layer}."
    names = {
        "norm1": [p + "input_layernorm.weight"],
        "qkv": [f"{p}self_attn.{x}_proj.weight" for x in "qkv"],
        "out": [p + "self_attn.o_proj.weight"],
        "norm2": [p + "post_attention_layernorm.weight"],
        "gate_up": [p + "mlp.gate_proj.weight", p + "mlp.up_proj.weight"],
        "down": [p + "mlp.down_proj.weight"],
    }
    if config.qkv_bias:
        names["qkv_bias"] = [f"{p}self_attn.{x}_proj.bias" for x in "qkv"]
    if config.out_bias:
        names["out_bias"] = [p + "self_attn.o_proj.bias"]
    if config.mlp_bias:
        names["gate_up_bias"] = [p + "mlp.gate_proj.bias", p + "mlp.up_proj.bias"]
        names["down_bias"] = [p + "mlp.down_proj.bias"]
    if config.qk_norm:
        names["q_norm"], names["k_norm"] = [p + "self_attn.q_norm.weight"], [p + "self_attn.k_norm.weight"]
    return names


def param_shapes(config: LlamaConfig, dtype: Any, home: Home) -> Params:
    """Shapes of `load_params`, for compiling before the weights are there."""
    c, ways = config, home.ways
    query, key = c.heads * c.head_dim, c.kv_heads * c.head_dim
    sizes: dict[str, tuple[int, ...]] = {
        "embed": (c.vocab, c.width),
        "head": (c.vocab, c.width),
        "norm": (c.width,),
        "norm1": (c.width,),
        "qkv": (c.width, ways, (query + 2 * key) // ways),
        "out": (query, c.width),
        "norm2": (c.width,),
        "gate_up": (c.width, ways, 2 * c.mlp // ways),
        "down": (c.mlp, c.width),
        "qkv_bias": (ways, (query + 2 * key) // ways),
        "out_bias": (c.width,),
        "gate_up_bias": (ways, 2 * c.mlp // ways),
        "down_bias": (c.width,),
        "q_norm": (c.head_dim,),
        "k_norm": (c.head_dim,),
    }

    def shape(name: str) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(sizes[name], dtype, sharding=home.of(name, c))

    params: Params = {name: shape(name) for name in ("embed", "norm", *(() if c.tied else ("head",)))}
    params["layers"] = [{name: shape(name) for name in _sources(c, i)} for i in range(c.layers)]
    return params


def _norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    wide = x.astype(jnp.float32)
    wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, -1, keepdims=True) + eps)
    return scale * wide.astype(x.dtype)


def _dot(x: jax.Array, w: jax.Array, bias: jax.Array | None = None) -> jax.Array:
    y = jnp.matmul(x, w, precision=precision(x))
    return y if bias is None else y + bias


def _fused(x: jax.Array, w: jax.Array, bias: jax.Array | None, sizes: list[int], last: int) -> list[jax.Array]:
    """Several projections at once, each device's share of every one side by side; (..., size, last) each."""
    ways = w.shape[1]
    y = _dot(x, w.reshape(len(w), -1), None if bias is None else bias.reshape(-1))
    y = y.reshape(*x.shape[:-1], ways, -1, last)
    parts = jnp.split(y, np.cumsum(sizes)[:-1] // ways, axis=-2)
    return [part.reshape(*x.shape[:-1], -1, last) for part in parts]


def _angles(config: LlamaConfig, positions: jax.Array, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine of the rotary angles, shape (..., 1, head_dim / 2)."""
    angle = positions[..., None, None].astype(jnp.float32) * jnp.array(config.inv_freq, jnp.float32)
    return jnp.cos(angle).astype(dtype), jnp.sin(angle).astype(dtype)


def _rotate(x: jax.Array, angles: tuple[jax.Array, jax.Array]) -> jax.Array:
    cos, sin = angles
    a, b = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def _qkv(p: Params, c: LlamaConfig, x: jax.Array, angles: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, ...]:
    """Rotated queries and keys, and values, each (..., heads, head_dim)."""
    sizes = [c.heads, c.kv_heads, c.kv_heads]
    q, k, v = _fused(_norm(x, p["norm1"], c.eps), p["qkv"], p.get("qkv_bias"), sizes, c.head_dim)
    if c.qk_norm:
        q, k = _norm(q, p["q_norm"], c.eps), _norm(k, p["k_norm"], c.eps)
    return _rotate(q, angles), _rotate(k, angles), v


def _close(p: Params, c: LlamaConfig, x: jax.Array, attended: jax.Array, place: Place | None) -> jax.Array:
    """Second half of a layer: what attention found is added, then the MLP."""
    heads = shifted(attended.reshape(*x.shape[:-1], -1), p.get("heads", ()), place)
    x = x + _dot(heads, p["out"], p.get("out_bias"))
    gate, up = _fused(_norm(x, p["norm2"], c.eps), p["gate_up"], p.get("gate_up_bias"), [c.mlp, c.mlp], 1)
    inner = (jax.nn.silu(gate) * up).reshape(*x.shape[:-1], -1)
    return x + _dot(inner, p["down"], p.get("down_bias"))


def _logits(params: Params, c: LlamaConfig, x: jax.Array) -> jax.Array:
    """Logits in float32, shape (..., vocab)."""
    table = params["embed"] if c.tied else params["head"]
    x = _norm(x, params["norm"], c.eps)
    logits = jnp.einsum("...d,vd->...v", x, table, precision=precision(x), preferred_element_type=jnp.float32)
    return sum(params.get("tilt", ()), logits)


def _body(
    params: Params, c: LlamaConfig, tokens: jax.Array, place: Place, visible: jax.Array
) -> tuple[jax.Array, Cache]:
    """Every layer over whole sequences; the residual stream (batch, token, width) and the cache."""
    x = params["embed"][tokens]
    angles = _angles(c, place.positions, x.dtype)
    cache: list[jax.Array] = []
    for p in params["layers"]:
        x = shifted(x, p.get("shift", ()), place)
        q, k, v = _qkv(p, c, x, angles)
        q = q.reshape(*q.shape[:2], c.kv_heads, c.heads // c.kv_heads, c.head_dim)
        scores = jnp.einsum("btgrd,bsgd->bgrts", q, k, precision=precision(q), preferred_element_type=jnp.float32)
        found = mean_of(scores, visible[:, None, None], "bgrts,bsgd->bgrtd", v)
        x = _close(p, c, x, jnp.moveaxis(found, 3, 1), place)
        cache += [jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2)]
    return shifted(x, params.get("shift", ()), place), tuple(cache)


def forward(
    params: Params,
    config: LlamaConfig,
    tokens: jax.Array,
    lengths: jax.Array | None = None,
    left: bool = False,
    prompt: jax.Array | None = None,
) -> jax.Array:
    """Logits at every position of padded sequences.

    Parameters
    ----------
    tokens : int array, shape (batch, token)
    lengths : int array, shape (batch,), optional
        True length of each sequence; all of it by default.
    left : bool
        Padding stands before the sequence instead of after it.
    prompt : int array, shape (batch,), optional
        Tokens of the prompt, which edits tell from the answer; everything by default.

    Returns
    -------
    float32 array, shape (batch, token, vocab)
        Meaningless at padding.
    """
    place, visible = _padding(tokens.shape, lengths, prompt, left)
    x, _ = _body(params, config, tokens, place, visible)
    return _logits(params, config, x)


def _padding(
    shape: tuple[int, ...], lengths: jax.Array | None, prompt: jax.Array | None, left: bool
) -> tuple[Place, jax.Array]:
    batch, width = shape
    lengths = jnp.full(batch, width) if lengths is None else lengths
    index = jnp.arange(width)
    first = (width - lengths if left else jnp.zeros_like(lengths))[:, None]
    real = (index >= first) & (index < first + lengths[:, None])
    visible = real[:, None, :] & (index[None, :, None] >= index[None, None, :])
    positions = jnp.broadcast_to(jnp.maximum(index - first, 0), shape)
    return Place(positions, lengths, lengths if prompt is None else prompt), visible


def prefill(
    params: Params, config: LlamaConfig, tokens: jax.Array, lengths: jax.Array, prompt: jax.Array | None = None
) -> tuple[jax.Array, Cache]:
    """Run whole prompts, padded on the right.

    Parameters
    ----------
    tokens : int array, shape (batch, token)
    lengths : int array, shape (batch,)
        At least 1.
    prompt : int array, shape (batch,), optional
        As in `forward`.

    Returns
    -------
    float32 array, shape (batch, vocab)
        Logits after the last token of each prompt.
    tuple of 2 x layers arrays, shape (batch, kv_heads, token, head_dim)
        Keys and values; those at padding are never looked at.
    """
    place, visible = _padding(tokens.shape, lengths, prompt, left=False)
    x, cache = _body(params, config, tokens, place, visible)
    last = jnp.take_along_axis(x, (lengths - 1)[:, None, None], axis=1)[:, 0]
    return _logits(params, config, last), cache


def decode(
    params: Params,
    config: LlamaConfig,
    token: jax.Array,
    position: jax.Array,
    cache: Cache,
    attention: str = "plain",
) -> tuple[jax.Array, Cache]:
    """Append one token to each row.

    Parameters
    ----------
    token, position : int array, shape (batch,)
        The token and where it stands in its row, counted from 0; everything before it is in the cache. Nothing is
        written for a position beyond the cache.
    cache : tuple of 2 x layers arrays, shape (batch, kv_heads, positions, head_dim)
    attention : {"plain", "kernel"}
        See `jax_attention`.

    Returns
    -------
    float32 array, shape (batch, vocab)
        Logits after the token.
    tuple
        The cache with the token in it.
    """
    c = config
    x = params["embed"][token]
    rows = jnp.arange(token.shape[0])
    angles = _angles(c, position, x.dtype)
    attend = kernel if attention == "kernel" else plain
    new: list[jax.Array] = []
    for i, p in enumerate(params["layers"]):
        x = shifted(x, p.get("shift", ()), None)
        q, k, v = _qkv(p, c, x, angles)
        keys = cache[2 * i].at[rows, :, position].set(k, mode="drop", unique_indices=True)
        values = cache[2 * i + 1].at[rows, :, position].set(v, mode="drop", unique_indices=True)
        q = q.reshape(-1, c.kv_heads, c.heads // c.kv_heads, c.head_dim)
        x = _close(p, c, x, attend(q, keys, values, position), None)
        new += [keys, values]
    return _logits(params, c, shifted(x, params.get("shift", ()), None)), tuple(new)
