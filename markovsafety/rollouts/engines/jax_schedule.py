"""The host side of the JAX engine: which rollout sits in which row of which batch, and where its tokens go.

Rollouts that share prompt and prefill share one context, run once; its keys and values are copied to each of its
rollouts. A worker keeps a few batches of equally many slots, one per cache length. A batch advances by `STEPS` tokens
at a time; between two advances, ended rollouts leave their slots to waiting ones, and those that outgrow their cache
move to the next longer one, which advances only when it is full or nothing shorter is left. So almost every row of
every step belongs to a living rollout, and attention looks at about as many positions as there are.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol

import jax.numpy as jnp
import numpy as np

from ...errors import UntrustedError
from . import Job, Output, Progress
from .jax_plan import STEPS, Block, Plan, Programs
from .jax_sampling import GROUP, Cache

__all__ = ["Batch", "Keeper", "Store", "not_finite", "pad", "work"]


class Keeper(Protocol):
    """Where a worker puts what was sampled: `Store` on the host, `jax_keep.Kept` on the device."""

    def row(self, batch: Batch, left: np.ndarray) -> Any: ...

    def keep(
        self, plan: Plan, records: dict[str, Any], rollout: np.ndarray, count: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]: ...


@dataclass(frozen=True)
class Store:
    """Where sampled values go: one row of `max_tokens` per rollout, filled from the left.

    Parameters
    ----------
    length : int array, shape (n,)
        Sampled tokens of each rollout that has ended; 0 before.
    values : dict of name -> array, shape (n * max_tokens,) or (n * max_tokens, classes)
        "token", "logprob", and "processed" and "mass" where asked for.
    """

    length: np.ndarray
    values: dict[str, np.ndarray]
    fetched: list[int] = field(default_factory=list)
    """Bytes that came from the device, look by look."""

    @classmethod
    def empty(cls, job: Job) -> Store:
        n = len(job) * job.max_tokens
        values = {"token": np.empty(n, np.int32), "logprob": np.empty(n, np.float32)}
        if job.processed and not job.raw:
            values["processed"] = np.empty(n, np.float32)
        if job.classes:
            values["mass"] = np.empty((n, len(job.classes)), np.float32)
        return cls(np.zeros(len(job), np.int64), values)

    def row(self, batch: Batch, left: np.ndarray) -> Any:
        """What a program is told of each row: last token, its position, tokens sampled, how many may follow."""
        return np.stack([batch.token, batch.position, batch.count, left]).astype(np.int32)

    def keep(
        self, plan: Plan, records: dict[str, Any], rollout: np.ndarray, count: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Store what the rows sampled; which of them ended, how many tokens each took, and its last token."""
        fetched = {name: np.asarray(values) for name, values in records.items()}
        job, token = plan.job, fetched["token"]
        step, living = np.arange(len(token))[:, None], rollout >= 0
        stops = plan.ends[token] | (count + step + 1 >= job.max_tokens)
        ended = stops.any(0) & living
        size = np.where(living, np.where(ended, stops.argmax(0) + 1, len(token)), 0)
        used = step < size
        if not fetched["finite"][used].all():
            raise not_finite()
        place = (rollout * job.max_tokens + count + step)[used]
        for name, values in self.values.items():
            values[place] = fetched[name][used]
        self.length[rollout[ended]] = (count + size)[ended]
        self.fetched.append(sum(values.nbytes for values in fetched.values()))
        return ended, size, token[-1].copy()

    def output(self, job: Job, info: dict[str, Any]) -> Output:
        """Forced and sampled tokens joined, one array per rollout; nothing at all for rollouts that have not ended."""
        forced = np.array([len(f) for f in job.forced], np.int64) * (self.length > 0)
        ends = np.cumsum(forced + self.length)
        starts = ends - forced - self.length
        sampled = np.arange(job.max_tokens) < self.length[:, None]
        # where each sampled value goes in the joined array: its rollout's start, its prefill, its own index
        target = np.broadcast_to((starts + forced)[:, None] + np.arange(job.max_tokens), sampled.shape)[sampled]
        total = int(ends[-1]) if len(ends) else 0
        cuts = list(zip(starts.tolist(), ends.tolist()))

        def join(values: np.ndarray, blank: Any) -> list[np.ndarray]:
            flat = np.full(total, blank, values.dtype)
            flat[target] = values.reshape(sampled.shape)[sampled]
            return [flat[a:b] for a, b in cuts]

        tokens = join(self.values["token"], 0)
        for row in np.flatnonzero(forced):
            tokens[row][: forced[row]] = job.forced[row]
        mass = {name: join(self.values["mass"][:, c], np.nan) for c, name in enumerate(job.classes)}
        processed = join(self.values["processed"], np.nan) if "processed" in self.values else None
        return Output(tokens, join(self.values["logprob"], np.nan), processed, mass, info)


@dataclass
class Batch:
    """Slots of one cache length, and who sits in them; changes as rollouts come and go."""

    length: int
    cache: Cache
    rollout: np.ndarray
    """Index of the rollout in each slot, -1 if free."""
    token: np.ndarray
    position: np.ndarray
    count: np.ndarray

    def seat(self, slots: np.ndarray, rollout: Any, token: Any, position: Any, count: Any) -> None:
        self.rollout[slots], self.token[slots], self.position[slots], self.count[slots] = (
            rollout,
            token,
            position,
            count,
        )

    def free(self) -> np.ndarray:
        return np.flatnonzero(self.rollout < 0)


@dataclass
class Waiting:
    """Rollouts of a block that have their first token and wait for a slot."""

    source: Cache
    block: Block
    rollout: np.ndarray
    row: np.ndarray
    token: np.ndarray
    position: np.ndarray


@dataclass
class Worker:
    """One thread's batches."""

    plan: Plan
    programs: Programs
    store: Keeper
    report: Callable[[int, int], None]
    batches: list[Batch]
    waiting: Waiting | None = None
    steps: int = field(default=0)


def work(
    plans: Sequence[Plan], programs: Sequence[Programs], own: Callable[[Plan], Keeper], progress: Progress | None
) -> int:
    """Sample every rollout of a plan into the stores of its workers; the number of rows computed, used or not.

    Parameters
    ----------
    plans, programs : sequences of the same length
        The plan as it is in every home. Workers are shared out over the homes and take blocks of work from one queue.
    own : callable
        Where a worker with this plan puts what it samples.

    Raises
    ------
    UntrustedError
        Logits that are not finite.
    """
    lock, stop = threading.Lock(), threading.Event()
    plan = plans[0]
    blocks = iter(plan.blocks)

    def take() -> Block | None:
        with lock:
            return next(blocks, None)

    def report(rollouts: int, tokens: int) -> None:
        if progress is not None and (rollouts or tokens):
            with lock:
                progress(rollouts, tokens)

    def one(number: int) -> int:
        plan = plans[number % len(plans)]
        worker = Worker(
            plan, programs[number % len(plans)], own(plan), report, [_batch(plan, length) for length in plan.lengths]
        )
        try:
            while not stop.is_set() and (level := _admit(worker, take)) is not None:
                _advance(worker, level)
        except BaseException:
            stop.set()
            raise
        return worker.steps * plan.shape.batch

    if plan.workers == 1:
        return one(0)
    with ThreadPoolExecutor(plan.workers) as pool:
        futures = [pool.submit(one, number) for number in range(plan.workers)]
        try:
            return sum(future.result() for future in futures)
        finally:
            stop.set()


def _batch(plan: Plan, length: int) -> Batch:
    c, size = plan.shape.config, plan.shape.batch
    shape, dtype = (size, c.kv_heads, length, c.head_dim), jnp.dtype(plan.shape.dtype)
    place = plan.shape.home.cache()
    cache = tuple(jnp.zeros(shape, dtype, device=place) for _ in range(2 * c.layers))
    token, position, count = np.zeros((3, size), np.int32)
    return Batch(length, cache, np.full(size, -1), token, position, count)


def _admit(worker: Worker, take: Callable[[], Block | None]) -> int | None:
    """Seat waiting rollouts, beginning new blocks as needed; the batch to advance next, None when all is done."""
    while True:
        if worker.waiting is None:
            block = take()
            if block is None:
                living = [i for i, batch in enumerate(worker.batches) if (batch.rollout >= 0).any()]
                return living[0] if living else None
            worker.waiting = _begin(worker, block)
            continue
        wait = worker.waiting
        level = wait.block.level
        batch = worker.batches[level]
        slots = batch.free()[: len(wait.rollout)]
        if len(slots) == 0:
            return level
        n = len(slots)
        _copy(worker, batch, wait.source, wait.row[:n], slots, worker.plan.rows, wait.block.width)
        batch.seat(slots, wait.rollout[:n], wait.token[:n], wait.position[:n], 1)
        rest = [array[n:] for array in (wait.rollout, wait.row, wait.token, wait.position)]
        worker.waiting = Waiting(wait.source, wait.block, *rest) if len(rest[0]) else None


def _copy(
    worker: Worker, batch: Batch, source: Cache, rows: np.ndarray, slots: np.ndarray, size: int, width: int
) -> None:
    program, nowhere = worker.programs.fill[size, width, batch.length], worker.plan.shape.batch
    for at in range(0, len(slots), GROUP):
        group = slots[at : at + GROUP]
        index, to = np.zeros(GROUP, np.int32), np.full(GROUP, nowhere, np.int32)
        index[: len(group)], to[: len(group)] = rows[at : at + GROUP], group
        batch.cache = program(batch.cache, source, index, to)


def _begin(worker: Worker, block: Block) -> Waiting | None:
    """Run the contexts of a block and draw the first token of each of its rollouts."""
    plan, size = worker.plan, worker.plan.shape.batch
    tokens, lengths = pad([plan.contexts[c] for c in block.contexts], plan.rows, block.width)
    prompt = np.ones(plan.rows, np.int32)
    prompt[: len(block.contexts)] = plan.prompts[block.contexts]
    logits, source = worker.programs.prefill[block.width](plan.params, tokens, lengths, prompt)
    drawn, alive = [], []
    for at in range(0, len(block.rollouts), size):
        rollout, row = block.rollouts[at : at + size], np.zeros(size, np.int32)
        row[: len(rollout)] = block.row[at : at + size]
        keys = plan.keys[np.resize(rollout, size)]
        records = worker.programs.first(logits, row, keys, *plan.knobs[1:])
        seats = np.full(size, -1)
        seats[: len(rollout)] = rollout
        ended, taken, token = worker.store.keep(plan, records, seats, np.zeros(size, np.int64))
        worker.report(int(ended.sum()), int(taken.sum()))
        drawn.append(token[: len(rollout)])
        alive.append(~ended[: len(rollout)])
    keep = np.concatenate(alive)
    if not keep.any():
        return None
    row = block.row[keep]
    return Waiting(source, block, block.rollouts[keep], row, np.concatenate(drawn)[keep], lengths[row])


def _advance(worker: Worker, level: int) -> None:
    """Sample up to `STEPS` tokens for each row of a batch, then move on those that need a longer cache."""
    plan, batch = worker.plan, worker.batches[level]
    left = np.where(batch.rollout >= 0, plan.job.max_tokens - batch.count, 0)
    row = worker.store.row(batch, left)
    program = worker.programs.chunk[batch.length]
    batch.cache, records = program(plan.params, batch.cache, row, plan.keys[batch.rollout], *plan.knobs)
    worker.steps += STEPS
    ended, size, batch.token = worker.store.keep(plan, records, batch.rollout, batch.count)
    worker.report(int(ended.sum()), int(size.sum()))
    batch.position += size
    batch.count += size
    batch.rollout[ended] = -1
    if level + 1 < len(worker.batches):
        _promote(worker, level)


def _promote(worker: Worker, level: int) -> None:
    batch, longer = worker.batches[level], worker.batches[level + 1]
    stuck = np.flatnonzero((batch.rollout >= 0) & (batch.position + STEPS > batch.length))
    while len(stuck):
        slots = longer.free()[: len(stuck)]
        if len(slots) == 0:
            _advance(worker, level + 1)
            continue
        move, stuck = stuck[: len(slots)], stuck[len(slots) :]
        _copy(worker, longer, batch.cache, move, slots, worker.plan.shape.batch, batch.length)
        longer.seat(slots, batch.rollout[move], batch.token[move], batch.position[move], batch.count[move])
        batch.rollout[move] = -1


def pad(rows: list[np.ndarray], size: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows padded on the right into (size, width), and their lengths; spare rows have length 1."""
    tokens, lengths = np.zeros((size, width), np.int32), np.ones(size, np.int32)
    for i, row in enumerate(rows):
        tokens[i, : len(row)], lengths[i] = row, len(row)
    return tokens, lengths


def not_finite() -> UntrustedError:
    return UntrustedError(
        "the model's logits are not finite",
        cause="weights that overflow, or a precision too low for this model",
        next="try dtype='float32', or another checkpoint",
    )
