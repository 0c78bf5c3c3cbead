"""Memory of a run of the JAX engine, planned before anything is computed: weights, keys and values, logits."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import jax
import jax.numpy as jnp

from ...errors import ModelError
from .jax_home import Home
from .jax_llama import param_shapes
from .llama_folder import LlamaConfig

__all__ = ["MOST", "Memory", "cache_bytes", "check_weights", "fitting", "free_bytes", "weight_bytes"]

MOST = 256
"""Rows of a batch on a GPU when nobody says how many: more answers cost more keys and values, not fewer weights."""
SHARE = 0.95
"""Of the free memory, for what the allocator cannot place."""
SPARE = 1024
"""Positions of one rollout that a device must have room for besides its weights, when a model is opened."""


@dataclass(frozen=True)
class Memory:
    """Bytes on each device, as planned.

    Parameters
    ----------
    weights : int
    cache_per_rollout : int
        Keys and values of one row, in the caches of every length that its worker keeps.
    batch : int
        Rows of a worker.
    workers : int
        On this device.
    workspace_per_rollout : int
        Logits and what is made of them, activations.
    prompts : int
        Contexts that a worker reads at one time: fewer where they would take more than an eighth of what is free.
    workspace : int
        Of reading them: activations, scores, keys and values.
    free : int or None
        What the device had left beside the weights, or was allowed to take; None if it does not say.
    """

    weights: int
    cache_per_rollout: int
    batch: int
    workers: int
    workspace_per_rollout: int
    prompts: int
    workspace: int
    free: int | None

    @property
    def row(self) -> int:
        return self.cache_per_rollout + self.workspace_per_rollout

    @property
    def needed(self) -> int:
        """Beside the weights."""
        return self.workers * (self.batch * self.row + self.workspace)

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "caches": self.workers * self.batch * self.cache_per_rollout, "needed": self.needed}


def weight_bytes(config: LlamaConfig, dtype: str, home: Home) -> int:
    """Of a copy's parameters on each of its devices."""
    shapes = jax.tree.leaves(param_shapes(config, jnp.dtype(dtype), home))
    return sum(math.prod(s.sharding.shard_shape(s.shape)) * s.dtype.itemsize for s in shapes)


def cache_bytes(config: LlamaConfig, dtype: str, ways: int = 1) -> int:
    """Keys and values of one position of one rollout, on each device."""
    return 2 * config.layers * config.kv_heads * config.head_dim * jnp.dtype(dtype).itemsize // ways


def free_bytes(home: Home, limit: int | None = None, taken: int = 0) -> int | None:
    """What the fullest device of a home has left, or what a limit leaves of it; None if nothing is known.

    Parameters
    ----------
    limit : int, optional
        Bytes that the engine may take on each device, `taken` of which it has taken already.
    """
    told = [d.memory_stats() or {} for d in home.devices]
    left = [t["bytes_limit"] - t.get("bytes_in_use", 0) for t in told if "bytes_limit" in t]
    left = [int(SHARE * x) for x in left] + ([] if limit is None else [limit - taken])
    return min(left) if left else None


def check_weights(config: LlamaConfig, dtype: str, home: Home, free: int | None, devices: int) -> None:
    """Refuse a model before it is read if its weights and one rollout do not fit.

    Raises
    ------
    ModelError
    """
    own = weight_bytes(config, dtype, home)
    need = own + SPARE * cache_bytes(config, dtype, home.ways) + 16 * config.vocab
    if free is None or need <= free:
        return
    raise ModelError(
        f"the model needs {gigabytes(need)} on each of {home.ways} device{'s' * (home.ways > 1)}, "
        f"which {'have' if home.ways > 1 else 'has'} {gigabytes(free)} free",
        cause=f"its weights take {gigabytes(own)} in {dtype}, one rollout of {SPARE} tokens "
        f"{gigabytes(SPARE * cache_bytes(config, dtype, home.ways))}",
        next=_cure(dtype, home, devices, "a smaller model"),
    )


def fitting(
    config: LlamaConfig, dtype: str, home: Home, *, lengths: tuple[int, ...], prompts: int, width: int,
    workers: int, batch: int | None, free: int | None, most: int, devices: int,
) -> Memory:  # fmt: skip
    """The largest batch that fits, up to `most`, or the one that is asked for.

    Parameters
    ----------
    lengths : tuple of int
        Positions of the caches that a worker keeps.
    prompts, width : int
        Contexts that are read at one time, at most, and their longest, in tokens.
    batch : int or None
        As asked for.

    Raises
    ------
    ModelError
        Not even one row fits, or not as many as asked for.
    """
    c, size = config, jnp.dtype(dtype).itemsize
    position = cache_bytes(c, dtype, home.ways)
    columns = (2 * c.mlp + (c.heads + 2 * c.kv_heads) * c.head_dim) // home.ways + 4 * c.width
    context = width * (2 * position + size * columns) + 8 * width * width * c.heads // home.ways + 8 * c.vocab
    if free is not None:
        prompts = max(1, min(prompts, free // (8 * context * workers)))
    memory = Memory(
        weights=weight_bytes(c, dtype, home),
        cache_per_rollout=position * sum(lengths),
        batch=batch or 1,
        workers=workers,
        workspace_per_rollout=16 * c.vocab + size * columns,
        prompts=prompts,
        workspace=prompts * context,
        free=free,
    )
    if free is not None and memory.needed > free:
        side = memory.batch * workers
        raise ModelError(
            f"{side} rollout{'s' * (side > 1)} side by side need {gigabytes(memory.needed)}, "
            f"a device has {gigabytes(free)} free",
            cause=f"keys and values of one rollout of {max(lengths)} tokens take "
            f"{gigabytes(memory.cache_per_rollout)} in {dtype}, reading prompts of up to {width} tokens "
            f"{gigabytes(memory.workspace)}; the weights took {gigabytes(memory.weights)}",
            next=_cure(dtype, home, devices, "a smaller batch_size" if memory.batch > 1 else "a smaller max_tokens"),
        )
    if batch is not None:
        return memory
    room = most if free is None else (free // workers - memory.workspace) // memory.row
    rows = max(1, min(most, room))
    return Memory(**{**asdict(memory), "batch": rows - rows % 8 if rows > 8 else rows})


def _cure(dtype: str, home: Home, devices: int, smaller: str) -> str:
    ways = [smaller]
    if home.ways < devices:
        ways.insert(0, f"shard='tensor' over {devices} devices")
    if dtype == "float32":
        ways.insert(0, "dtype='bfloat16'")
    return f"try {', or '.join(ways)}, or more devices"


def gigabytes(size: float) -> str:
    return f"{size / 1e9:.3g} GB"
