"""The compiled half of batches on a JAX device: samples are the innermost axis of everything."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from numpy.typing import NDArray

from .device_function import leaving, stored
from .device_pack import Ell, Pattern
from .device_solve import UNROLL, krylov, residual

__all__ = ["KRYLOV_BLOCK", "cyclic_samples", "substituted_samples"]

KRYLOV_BLOCK = (64, 8)  # samples side by side on a GPU and on a CPU, where a block should stay in the cache

Array = Any


def substituted_samples(p: Pattern, data: Array, slots: NDArray) -> tuple[Array, Array]:
    """Substitution for data of shape (nnz, S): values of some slots (len(slots), S), and what was read (3, S):
    least entry, least and largest sum of a row."""
    lanes = np.zeros((p.steps, p.width), dtype=bool)
    lanes.ravel()[p.slot[p.slot < p.size]] = True
    return _substituted(data, tuple(vars(p.forward).values())[:5], lanes, jnp.asarray(slots), p.nnz, p.implied)


@partial(jax.jit, static_argnames=("nnz", "implied"))
def _substituted(data: Array, ell: Any, lanes: Array, slots: Array, nnz: int, implied: bool) -> tuple[Array, Array]:
    parts = Ell(*ell)
    steps, k, width = parts.source.shape
    S = data.shape[1]
    take = lambda x, i: x.at[i].get(mode="promise_in_bounds")  # noqa: E731

    def entry(source: Array) -> Array:
        # Read where it lies, no packed copy; places without an entry read a neighbour's and forget it.
        return jnp.where((source < nnz)[:, None], take(data, jnp.minimum(source, nnz - 1)), 0)

    def step(x: Array, at: Any) -> tuple[Array, Any]:
        t, ell, real = at
        part = Ell(*ell)

        def add(j: Any, state: Any) -> Any:
            y, total, least = state
            a = entry(part.source[j])
            return y + a * take(x, part.col[j]), total + a, jnp.minimum(least, a)

        state = (jnp.zeros((width, S), data.dtype),) * 3
        if k <= UNROLL:
            for j in range(k):
                state = add(j, state)
        else:
            state = lax.fori_loop(0, k, add, state)
        y, total, least = state
        if part.tail_col.shape[0]:
            a = entry(part.tail_source)
            y = y.at[part.tail_row].add(a * take(x, part.tail_col))
            total, least = total.at[part.tail_row].add(a), least.at[part.tail_row].min(a)
        y = y / jnp.where(real[:, None], total, 1) if implied else jnp.where(y > 1, 1, y)
        low, high = jnp.where(real[:, None], total, jnp.inf).min(0), jnp.where(real[:, None], total, 0).max(0)
        x = lax.dynamic_update_slice_in_dim(x, y, t * width, 0)
        return x, (jnp.where(real[:, None], least, 0).min(0), low, high)

    x = jnp.zeros((steps * width + 2, S), data.dtype).at[-1].set(1)
    x, (least, low, high) = lax.scan(step, x, (jnp.arange(steps), tuple(parts.__dict__.values())[:5], lanes))
    return take(x, slots), jnp.stack([least.min(0), low.min(0), high.max(0)])


def cyclic_samples(p: Pattern, data: Array, law: Array, lift: Array, slots: NDArray, block: int) -> tuple[Array, Array]:
    """Deflated BiCGStab for data of shape (nnz, S): values of some slots (len(slots), S), bounds of the error (S,).

    The bound is that of `batch_kernels.krylov`; NaN where an entry is not a number >= 0."""
    run = _program(p, block)
    return run(data, law, lift, jnp.asarray(slots))


def _program(p: Pattern, block: int) -> Any:
    known = p.__dict__.setdefault("_programs", {})
    if block not in known:
        known[block] = jax.jit(partial(_cyclic, p, block))
    return known[block]


def _cyclic(p: Pattern, block: int, data: Array, law: Array, lift: Array, slots: Array) -> tuple[Array, Array]:
    unit = jnp.finfo(data.dtype).eps / 2
    real = np.zeros((p.size, 1), dtype=bool)
    real[p.slot[p.slot < p.size]] = True

    def some(data: Array) -> tuple[Array, Array]:
        v, _, _ = stored(p, data)
        leave = leaving(p, v)
        zero = jnp.zeros_like(leave)
        slack = unit * (v.col.shape[1] + v.tail_col.shape[1] + 16)
        m = jnp.broadcast_to(lift[:, None], leave.shape)
        # Terms of a row's residual add up to at most the spread of x, plus what leads out times x.
        t = -residual(v, m, zero, 0.0) - slack * (lift.max() - lift.min() + leave * lift.max())
        x, _ = krylov(v, leave, law, zero, 1.0)
        gap = jnp.abs(residual(v, x, zero, 1.0)) + slack * (x.max(0) - x.min(0) + leave * (1 + jnp.abs(x).max(0)))
        worst = jnp.where(real, jnp.where(t > 0, gap / t, jnp.inf), 0).max(0)
        fine = jnp.all(data >= 0, axis=0) & jnp.all(jnp.isfinite(data), axis=0) & jnp.isfinite(worst)
        x = jnp.concatenate([x, jnp.zeros((1, x.shape[1]), x.dtype), jnp.ones((1, x.shape[1]), x.dtype)])
        return x[slots], jnp.where(fine, worst * lift.max(), jnp.nan)

    many = data.shape[1] // block
    if many == 1:
        return some(data)
    data = jnp.moveaxis(data.reshape(data.shape[0], many, block), 1, 0)
    x, error = lax.map(some, data)
    return jnp.moveaxis(x, 0, 1).reshape(len(slots), -1), error.reshape(-1)
