"""Where a model lives: one device, or several that hold one copy of it together (tensor parallelism).

Copies of a model work side by side (data parallelism): each is a worker of its own, with its own batches, so that no
device waits for another and a rollout is computed by the very program that one device alone would run. Within one
copy, `jax.sharding` splits attention heads and the columns of the MLP over the devices of its mesh, and the compiler
puts the sums between them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from ...errors import InputError
from .llama_folder import LlamaConfig

__all__ = ["SHARDS", "Home", "devices_named", "divides", "first_line", "homes_of"]

SHARDS = ("auto", "data", "tensor")
AXIS = "model"
SPLIT: dict[str, tuple[str | None, ...]] = {
    "head": (AXIS, None),
    "qkv": (None, AXIS, None),
    "qkv_bias": (AXIS, None),
    "out": (AXIS, None),
    "gate_up": (None, AXIS, None),
    "gate_up_bias": (AXIS, None),
    "down": (AXIS, None),
}
"""Axes of the parameters that are split; the others are on every device."""


@dataclass(frozen=True)
class Home:
    """Devices that hold one copy of a model.

    Parameters
    ----------
    devices : tuple of jax.Device
    """

    devices: tuple[Any, ...]

    @property
    def ways(self) -> int:
        """Devices that share the copy."""
        return len(self.devices)

    @property
    def platform(self) -> str:
        return str(self.devices[0].platform)

    def sharding(self, *axes: str | None) -> jax.sharding.Sharding:
        """Of an array whose axes are split as named; without names it is whole on every device."""
        if self.ways == 1:
            return SingleDeviceSharding(self.devices[0])
        return NamedSharding(Mesh(np.array(self.devices), (AXIS,)), PartitionSpec(*axes))

    def of(self, name: str, config: LlamaConfig) -> jax.sharding.Sharding:
        """Of a parameter by its name in `jax_llama.param_shapes`."""
        axes = SPLIT.get(name, ())
        if name == "embed":  # tied, it is the output layer as well, which is split by rows
            axes = (AXIS, None) if config.tied else (None, AXIS)
        size = {"embed": config.vocab if config.tied else config.width, "head": config.vocab}.get(name, self.ways)
        return self.sharding(*(axes if size % self.ways == 0 else ()))

    def cache(self) -> jax.sharding.Sharding:
        """Of keys and values (batch, kv_heads, positions, head_dim)."""
        return self.sharding(None, AXIS, None, None)


def devices_named(name: str | None) -> list[Any]:
    """The devices of a name: all of a platform ("gpu"), or some of it ("gpu:1", "cpu:0,2"); JAX's own if None.

    Raises
    ------
    InputError
        There is no such device.
    """
    if name is None:
        return list(jax.local_devices())
    kind, _, index = name.partition(":")
    try:
        found = jax.local_devices(backend=kind)
        return [found[int(i)] for i in index.split(",")] if index else list(found)
    except (RuntimeError, IndexError, ValueError) as error:
        have = ", ".join(sorted({d.platform for d in jax.devices()} | {"cpu"}))
        raise InputError(
            f"there is no device {name!r}",
            cause=f"JAX finds none ({first_line(error)})",
            next=f"choose one of: {have}; a GPU needs JAX with CUDA (pip install 'jax[cuda12]')",
        ) from error


def first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)[:200]


def divides(config: LlamaConfig, ways: int) -> bool:
    """Whether a model can be split so many ways."""
    return math.gcd(config.heads, config.kv_heads, config.mlp) % ways == 0


def homes_of(
    devices: list[Any], shard: str | None, config: LlamaConfig, fits: Any = lambda ways: True
) -> tuple[Home, ...]:
    """Share a model out over devices.

    Parameters
    ----------
    devices : list of jax.Device
    shard : {"auto", "data", "tensor"} or None
        "data": a copy on every device; "tensor": one copy over all of them; "auto": copies on as few devices each as
        `fits` allows, on a CPU one device (whose cores are shared out among workers anyway). None: the first device.
    config : LlamaConfig
    fits : callable
        Whether a copy over so many devices fits into their memory.

    Raises
    ------
    InputError
        The name is unknown, or the model's heads cannot be split evenly.
    """
    if shard is not None and shard not in SHARDS:
        raise InputError(
            f"there is no sharding {shard!r}",
            cause="a model is copied to every device, split over all of them, or both as memory demands",
            next=f"choose one of: {', '.join(SHARDS)}",
        )
    if shard is None or (shard == "auto" and devices[0].platform == "cpu"):
        return (Home((devices[0],)),)
    ways = 1
    if shard == "tensor":
        ways = len(devices)
        if not divides(config, ways):
            able = [w for w in range(1, ways + 1) if divides(config, w)]
            raise InputError(
                f"the model cannot be split over {ways} devices",
                cause=f"it has {config.kv_heads} key-value heads, {config.heads} heads and {config.mlp} MLP columns, "
                "and every device takes as many of each",
                next=f"name {' or '.join(map(str, able))} of the devices (device='{devices[0].platform}:0,1'), or "
                "shard='auto'",
            )
    elif shard == "auto":
        able = [w for w in range(1, len(devices) + 1) if divides(config, w)]
        ways = next((w for w in able if fits(w)), able[-1])
    groups = len(devices) // ways
    return tuple(Home(tuple(devices[i * ways : (i + 1) * ways])) for i in range(groups))
