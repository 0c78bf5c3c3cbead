"""The plan of a run of the JAX engine: contexts, cache lengths, blocks of work, and the programs compiled for them."""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from . import Job
from .jax_home import Home
from .jax_memory import Memory
from .jax_sampling import Shape, chunk_program, fill_program, first_program, prefill_program, split_keys

__all__ = ["STEPS", "Block", "Plan", "Programs", "compile_plans", "cores", "make_plan", "member_of", "round_up"]

STEPS = 6
"""Tokens between two looks at who has ended: fewer waste fewer rows on the ended, more waste less time on looking."""
FEW = 16
"""Rows of a batch when there are not more rollouts. Few sizes mean that shards and small jobs share their programs."""
SMALL = 50_000_000
"""Below this many parameters one core runs a step alone, so each core gets its own worker."""


@dataclass(frozen=True)
class Block:
    """Contexts that are run together, and the rollouts that start from them."""

    contexts: np.ndarray
    rollouts: np.ndarray
    row: np.ndarray
    """For each rollout, which of the contexts is its own."""
    width: int
    level: int
    """Index of the cache length it starts in."""


@dataclass(frozen=True)
class Plan:
    """Everything about a run that is fixed before the first token."""

    job: Job
    params: Any
    shape: Shape
    workers: int
    lengths: tuple[int, ...]
    rows: int
    """Contexts in a block."""
    contexts: list[np.ndarray]
    prompts: np.ndarray
    """Tokens of each context that are prompt; the rest is forced."""
    blocks: list[Block]
    keys: np.ndarray
    ends: np.ndarray
    knobs: tuple[Any, ...]
    memory: Memory

    def at(self, home: Home, params: Any) -> Plan:
        """The same plan for a worker in another home, with that home's copy of the parameters."""
        if home == self.shape.home:
            return self
        knobs = tuple(jax.device_put(knob, home.sharding()) for knob in self.knobs)
        return dataclasses.replace(self, params=params, shape=dataclasses.replace(self.shape, home=home), knobs=knobs)


def make_plan(job: Job, params: Any, shape: Shape, *, batch: int | None, workers: int, homes: int, limit: Any) -> Plan:
    """Choose cache lengths and a batch that fits, and cut the job into blocks.

    Parameters
    ----------
    shape : Shape
        Of the programs, whatever its number of rows.
    batch : int or None
        Largest number of rows of a worker's batch; None chooses.
    workers, homes : int
        Workers in all, and homes that they are shared out over.
    limit : callable
        Bytes that a home has left for caches and workspace, given to `fitting` with the largest batch worth having.

    Raises
    ------
    ModelError
        Too little memory.
    """
    contexts, prompts, context_of = _contexts(job)
    sizes = np.array([len(c) for c in contexts])
    n = len(job)
    workers = max(1, min(workers, n // 16))
    # The kernel stops at each row's length, so that one cache for all costs nothing; else short ones are read faster.
    one = (round_up(int(sizes.max()) + job.max_tokens, 64),)
    lengths = one if shape.attention == "kernel" else _lengths(int(sizes.min()), int(sizes.max()) + job.max_tokens)
    room = max(1, (1 << 28) // (4 * max(shape.config.vocab, shape.config.heads * int(sizes.max()) ** 2)))
    memory = limit(lengths, min(32, room), round_up(int(sizes.max()), 16), -(-workers // homes), batch)
    side = min(memory.batch, FEW) if n <= FEW * workers else memory.batch
    shape = dataclasses.replace(shape, batch=side)
    most = int(np.clip(n // (4 * workers), min(side, 32), 4 * side))
    rows = max(1, min(8 if most * len(contexts) <= 8 * n else 32, memory.prompts))
    ends = np.zeros(shape.config.vocab, bool)
    ends[list(job.eos_ids)] = True
    knobs = (ends, member_of(job, shape.config.vocab), np.float32(job.temperature), np.float32(job.top_p))
    return Plan(
        job=job,
        params=params,
        shape=shape,
        workers=workers,
        lengths=lengths,
        rows=rows,
        contexts=contexts,
        prompts=prompts,
        blocks=list(_blocks(context_of, sizes, rows, most, lengths)),
        keys=split_keys(job.keys),
        ends=ends,
        knobs=tuple(jax.device_put(knob, shape.home.sharding()) for knob in knobs),
        memory=dataclasses.replace(memory, batch=side),
    )


def _contexts(job: Job) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
    """Distinct prompt + forced sequences, shortest first, their prompts' lengths, and the one of each rollout."""
    found: dict[tuple[int, bytes], int] = {}
    context_of = np.empty(len(job), np.int64)
    contexts: list[np.ndarray] = []
    sizes: list[int] = []
    for i, (prompt, forced) in enumerate(zip(np.asarray(job.prompt_of).tolist(), job.forced)):
        key = (prompt, np.asarray(forced, np.int32).tobytes())
        place = found.setdefault(key, len(contexts))
        if place == len(contexts):
            contexts.append(np.concatenate([job.prompts[prompt], forced]).astype(np.int32))
            sizes.append(len(job.prompts[prompt]))
        context_of[i] = place
    order = np.argsort([len(c) for c in contexts], kind="stable")
    rank = np.empty(len(contexts), np.int64)
    rank[order] = np.arange(len(contexts))
    return [contexts[i] for i in order], np.array(sizes, np.int64)[order], rank[context_of]


def _power(number: int) -> int:
    """The smallest power of two that is not below."""
    return 1 << max(0, number - 1).bit_length()


def round_up(number: int, step: int) -> int:
    return -(-number // step) * step


def _lengths(shortest: int, total: int) -> tuple[int, ...]:
    """Cache lengths, each about twice the one before; the last holds the longest rollout."""
    lengths = [round_up(total, 32)]
    while len(lengths) < 3:
        half = round_up(lengths[0] // 2, 16)
        if half < 32 or half >= lengths[0] or half < round_up(shortest, 16) + STEPS:
            break
        lengths.insert(0, half)
    return tuple(lengths)


def _blocks(
    context_of: np.ndarray, sizes: np.ndarray, rows: int, most: int, lengths: tuple[int, ...]
) -> Iterator[Block]:
    """At most `rows` contexts and `most` rollouts each, of one width, shortest first."""
    order = np.argsort(context_of, kind="stable")
    widths = np.array([max(16, _power(int(size))) for size in sizes])
    widths = np.minimum(widths, round_up(int(sizes.max()), 16))
    at = 0
    while at < len(order):
        first = context_of[order[at]]
        part = order[at : at + most]
        part = part[(context_of[part] < first + rows) & (widths[context_of[part]] == widths[first])]
        contexts = np.unique(context_of[part])
        width, need = int(widths[first]), int(sizes[contexts].max()) + STEPS
        fits = [i for i, length in enumerate(lengths) if length >= max(need, width)]
        level = fits[0] if fits else len(lengths) - 1
        yield Block(contexts, part, np.searchsorted(contexts, context_of[part]).astype(np.int32), width, level)
        at += len(part)


@dataclass(frozen=True)
class Programs:
    """The compiled programs of a plan."""

    first: Any
    prefill: dict[int, Any]
    """By width of the contexts."""
    chunk: dict[int, Any]
    """By length of the cache."""
    fill: dict[tuple[int, int, int], Any]
    """By rows and width of the source and length of the cache."""


def compile_plans(plans: list[Plan]) -> list[Programs]:
    """Compile every program that plans of several homes can need; those of one home are compiled once per process."""
    with ThreadPoolExecutor(len(plans)) as pool:
        return list(pool.map(_compiled, plans))


def _compiled(plan: Plan) -> Programs:
    """Several programs at a time."""
    shape, lengths = plan.shape, plan.lengths if plan.job.max_tokens > 1 else ()
    lengths = lengths[min(block.level for block in plan.blocks) :]
    widths = sorted({block.width for block in plan.blocks})
    fills = {(plan.rows, block.width, plan.lengths[block.level]) for block in plan.blocks} if lengths else set()
    fills |= {(shape.batch, short, long) for short, long in itertools.pairwise(lengths)}
    with ThreadPoolExecutor(min(4, cores())) as pool:
        chunk = {length: pool.submit(chunk_program, shape, length, STEPS) for length in reversed(lengths)}
        prefill = {width: pool.submit(prefill_program, shape, plan.rows, width) for width in widths}
        first = pool.submit(first_program, shape, plan.rows)
        fill = {key: pool.submit(fill_program, shape, *key) for key in sorted(fills)}

        def ready(futures: dict[Any, Future[Any]]) -> dict[Any, Any]:
            return {key: future.result() for key, future in futures.items()}

        return Programs(first.result(), ready(prefill), ready(chunk), ready(fill))


def member_of(job: Job, vocab: int) -> np.ndarray:
    """Which token belongs to which class, shape (vocab, classes)."""
    member = np.zeros((vocab, len(job.classes)), np.float32)
    for column, ids in enumerate(job.classes.values()):
        member[np.asarray(ids, dtype=np.int64), column] = 1
    return member


def cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
