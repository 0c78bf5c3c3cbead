"""The cases for a GPU: the same chains through JAX on the device, against the host and against a copy on the device.

A batch of layers reads every value once and writes almost nothing, so the time of copying as many bytes is what a
device could do at best. Values lie on the device before the clock starts, samples innermost; answers come back at the
start state only.
"""

from __future__ import annotations

import time
from functools import partial
from importlib import import_module
from typing import Any

import numpy as np

from . import families, references
from .cases import EXACT, Case
from .families import Batch, Problem
from .goals import Goal
from .measure import Contender, Found
from .ours import BATCH, batch_solver, layers, solver

__all__ = ["copy_bandwidth", "on_device"]

DEVICE = "markovsafety, batch on the device"
REPEATED = 16
"""How often the samples of the layered batch are repeated, so that the device has something to do."""


def on_device() -> list[Case]:
    """All cases that run on a GPU."""
    return [_layered_batch(), _kgram_batch(), _single("layered"), _single("kgram")]


def copy_bandwidth(size: int) -> float:
    """Bytes read and written per second by adding 1 to `size` float64 on JAX's default device, the best of ten."""
    jax: Any = import_module("jax")
    with jax.enable_x64(True):
        step = jax.jit(lambda x: x + 1.0)
        x = jax.block_until_ready(step(jax.numpy.zeros(size)))
        best = np.inf
        for _ in range(10):
            begun = time.perf_counter()
            jax.block_until_ready(step(x))
            best = min(best, time.perf_counter() - begun)
    return 16 * size / best


def _resident(name: str, times: int = 1) -> Contender:
    """`device.batch` with values that lie on the device, answers at the start."""

    def prepare(batch: Batch) -> Any:
        from ..hitting import device

        jax: Any = import_module("jax")
        chain = layers(batch.problem) if batch.problem.widths else batch.problem.chain()
        where = jax.devices()[0]
        with jax.enable_x64(True):
            values = jax.numpy.asarray(np.ascontiguousarray(batch.entries().T))
            values = jax.block_until_ready(jax.device_put(jax.numpy.tile(values, (1, times)), where))
        return device.batch(chain, "harm"), values, where

    def solve(ready: Any) -> Any:
        batch, values, where = ready
        return batch.solve(values, at_start=True, device=where, innermost=True)

    def read(raw: Any, batch: Batch) -> Found:
        first = batch.harm.shape[1]
        value, error = np.asarray(raw.value)[:first], np.asarray(raw.error)[:first]
        return Found(value, value - error, value + error, f"{len(raw.value)} samples")

    return Contender(name, prepare, solve, read, of="start", ours=True)


def _reference(batch: Batch) -> dict[str, Any]:
    some = [batch.sample(b) for b in range(batch.harm.shape[1])]
    if batch.problem.widths:
        whole = references.back_substitution(batch.problem, batch.data, batch.harm)
        return {"start": whole[0], "h": whole[:, :4].T}
    found = [references.refined(one, "bicgstab") for one in some]
    return {"start": np.array([h[0] for h in found]), "h": np.stack(found[:4])}


def _layered_batch() -> Case:
    def make(quick: bool) -> Batch:
        problem = families.layered(8, 32, 4) if quick else families.layered(64, 256, 16)
        return families.posterior(problem, 8 if quick else 256)

    def numbers(batch: Batch, rows: dict[str, Any]) -> dict[str, float]:
        bandwidth = copy_bandwidth(1 << 16 if batch.problem.n < 10_000 else 1 << 28)
        values = 8.0 * batch.entries().size * REPEATED
        took = rows.get(DEVICE, {}).get("median")
        return {"copy_bytes_per_second": bandwidth, **({"copy": values / took / bandwidth} if took else {})}

    goals = (
        Goal("copy", f"{DEVICE}: values read per second as a share of the copy bandwidth of this run", least=0.5),
        Goal("relative", DEVICE, most=1e-12),
    )
    contenders = _resident(DEVICE, REPEATED), batch_solver(f"{BATCH}, on the host")
    title = f"GPU: {REPEATED} x 256 samples, layered 64 x 256 x 16 (host: 256 samples)"
    return Case(
        "gpu-batch-layered", title, make, contenders, _reference, "long-double back-substitution", goals, numbers, True
    )


def _kgram_batch() -> Case:
    def make(quick: bool) -> Batch:
        problem = families.kgram(16 if quick else 64, 2, 5 if quick else 12, 1e-3)
        return families.posterior(problem, 8 if quick else 256)

    contenders = _resident(DEVICE), batch_solver(f"{BATCH}, on the host")
    goals = (Goal("relative", DEVICE, most=1e-9),)
    source = "scipy's bicgstab refined in long double, residuals in difference form"
    title = "GPU: 256 samples, k-gram order 2, leak 1e-3"
    return Case("gpu-batch-kgram", title, make, contenders, _reference, source, goals, gpu=True)


def _single(kind: str) -> Case:
    def make(quick: bool) -> Problem:
        if kind == "layered":
            return families.layered(8, 64, 4) if quick else families.layered(64, 4096, 16)
        return families.kgram(8 if quick else 64, 3, 4 if quick else 12, 1e-4)

    def reference(problem: Problem) -> dict[str, Any]:
        if problem.widths:
            return {"h": references.back_substitution(problem)}
        return {"h": references.refined(problem, "bicgstab")}

    known = kind == "layered"
    name = "markovsafety, method device"
    make_solver = partial(solver, layered=known)
    contenders = make_solver(name, method="device"), make_solver(f"{EXACT}, on the host")
    goals = (Goal("relative", name, most=1e-14), Goal("inside", name, least=1))
    title = f"GPU: one chain, {'layered 64 x 4096 x 16' if known else 'k-gram order 3, leak 1e-4'}, certified"
    source = "long-double back-substitution" if known else "scipy's bicgstab refined in long double"
    return Case(f"gpu-{kind}", title, make, contenders, reference, source, goals, gpu=True)
