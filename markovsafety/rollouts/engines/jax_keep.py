"""Sampling that leaves nothing on the host: tokens and class masses stay on the device, one row per rollout.

The host learns one byte a row and advance: how many tokens it took, and whether it ended. The programs that sample are
those of `JaxEngine.run`, so the tokens are the same to the bit; what they record is written into one array of the
device per worker.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .jax_plan import Plan
from .jax_sampling import compiled
from .jax_schedule import Batch, not_finite

__all__ = ["Kept", "Shelf"]


@dataclass(frozen=True)
class Shelf:
    """What the workers of a run keep on the device.

    Parameters
    ----------
    plan : Plan
    length : int array, shape (n,)
        Sampled tokens of each rollout that has ended; 0 before.
    kept : list of Kept
        One per worker.
    fetched : list of int
        Bytes that came from the device, look by look.
    """

    plan: Plan
    kept: list[Kept] = field(default_factory=list)
    fetched: list[int] = field(default_factory=list)
    length: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "length", np.zeros(len(self.plan.job), np.int64))

    @property
    def rows(self) -> int:
        """Rollouts, rounded up to a power of two: shards share their programs."""
        return 1 << max(0, len(self.plan.job) - 1).bit_length()

    def own(self, plan: Plan | None = None) -> Kept:
        """An empty place for one more worker, of `plan.workers`; in the home of its own plan."""
        plan = plan or self.plan
        size, home = (self.rows, plan.job.max_tokens), plan.shape.home.sharding()
        token = jnp.zeros(size, jnp.int32, device=home)
        mass = jnp.zeros((*size, len(plan.job.classes)), jnp.float32, device=home)
        self.kept.append(Kept(self, plan, token, mass))
        return self.kept[-1]


@dataclass
class Kept:
    """A worker's sampled values on the device, one row per rollout (the protocol `Keeper`).

    Parameters
    ----------
    shelf : Shelf
    plan : Plan
        Of its worker.
    token : jax int32 array, shape (rows, max_tokens)
        0 where nothing was sampled.
    mass : jax float32 array, shape (rows, max_tokens, classes)
    """

    shelf: Shelf
    plan: Plan
    token: Any
    mass: Any

    def row(self, batch: Batch, left: np.ndarray) -> Any:
        """See `Keeper`; the last token is looked up on the device."""
        seats = np.stack([batch.rollout, batch.position, batch.count, left]).astype(np.int32)
        return _row_program(self.plan, self.shelf.rows)(self.token, seats)

    def keep(
        self, plan: Plan, records: dict[str, Any], rollout: np.ndarray, count: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """See `Keeper`; the last tokens are not told (all 0)."""
        steps = records["token"].shape[0]
        picked = {name: records[name] for name in ("token", "finite", *(["mass"] if plan.job.classes else []))}
        seats = np.stack([rollout, count]).astype(np.int32)
        program = _keep_program(plan, self.shelf.rows, steps)
        self.token, self.mass, told = program(self.token, self.mass, picked, seats, plan.knobs[0])
        told = np.asarray(told)
        self.shelf.fetched.append(told.nbytes)
        if not told[-1]:
            raise not_finite()
        ended, size = (told[:-1] & 1).astype(bool), (told[:-1] >> 1).astype(np.int64)
        self.shelf.length[rollout[ended]] = (count + size)[ended]
        return ended, size, np.zeros(len(rollout), np.int32)


def _row(token: jax.Array, seats: jax.Array) -> jax.Array:
    rollout, position, count, left = seats
    last = token[jnp.maximum(rollout, 0), jnp.maximum(count - 1, 0)]
    return jnp.stack([last, position, count, left])


def _keep(
    token: jax.Array, mass: jax.Array, records: dict[str, jax.Array], seats: jax.Array, ends: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    rollout, count = seats
    new, most = records["token"], token.shape[1]
    at = count + jnp.arange(len(new))[:, None]
    living = rollout >= 0
    stops = ends[new] | (at + 1 >= most)
    ended = stops.any(0) & living
    size = jnp.where(living, jnp.where(ended, stops.argmax(0) + 1, len(new)), 0)
    used = jnp.arange(len(new))[:, None] < size
    place = jnp.where(used, rollout, len(token)), at
    token = token.at[place].set(new, mode="drop")
    if "mass" in records:
        mass = mass.at[place].set(records["mass"], mode="drop")
    finite = (records["finite"] | ~used).all()
    told = jnp.concatenate([size * 2 + ended, finite[None]]).astype(jnp.uint8)
    return token, mass, told


def _row_program(plan: Plan, rows: int) -> Any:
    shape, most = plan.shape, plan.job.max_tokens

    def lower() -> Any:
        return jax.jit(_row).lower(shape.spec(rows, most), shape.spec(4, shape.batch))

    return compiled(("row", shape.home, shape.batch, rows, most), lower)


def _keep_program(plan: Plan, rows: int, steps: int) -> Any:
    shape, most, classes = plan.shape, plan.job.max_tokens, len(plan.job.classes)

    def lower() -> Any:
        records = {"token": shape.spec(steps, shape.batch), "finite": shape.spec(steps, shape.batch, dtype=jnp.bool_)}
        if classes:
            records["mass"] = shape.spec(steps, shape.batch, classes, dtype=jnp.float32)
        kept = shape.spec(rows, most), shape.spec(rows, most, classes, dtype=jnp.float32)
        ends = shape.spec(shape.config.vocab, dtype=jnp.bool_)
        run = jax.jit(_keep, donate_argnums=(0, 1))
        return run.lower(*kept, records, shape.spec(2, shape.batch), ends)

    return compiled(("keep", shape.home, shape.config.vocab, shape.batch, rows, most, classes, steps), lower)
