"""The device side of sampling: a few compiled programs of fixed shape, and the memory of what was compiled.

One uniform number and one cumulative sum pick a token; there is no noise over the vocabulary. The uniform belongs to
(rollout key, token index), bit for bit that of `engines.uniforms`.
"""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from . import PARITY, ROTATIONS
from .jax_edits import Signature, with_shapes
from .jax_home import Home
from .jax_llama import Cache, LlamaConfig, Params, decode, forward, param_shapes, prefill

__all__ = [
    "GROUP",
    "Draw",
    "Shape",
    "chunk_program",
    "compiled",
    "fill_program",
    "first_program",
    "prefill_program",
    "score_program",
]


GROUP = 16
"""Rows copied from one cache to another at a time."""
LONG, BLOCK = 8192, 256
"""Tokens from which on a vocabulary is summed in blocks, and of a block."""


@dataclass(frozen=True)
class Draw:
    """How tokens are drawn, as far as it changes the program.

    Parameters
    ----------
    kind : {"raw", "greedy", "tempered", "nucleus"}
        From the model's distribution, its most probable token, after a temperature, after a cut at top_p.
    processed : bool
        Record log-probabilities under the distribution drawn from as well.
    classes : int
        Number of token classes.
    fine : bool
        See `Job`.
    """

    kind: str
    processed: bool
    classes: int
    fine: bool = False


@dataclass(frozen=True)
class Shape:
    """What every program of a run shares."""

    config: LlamaConfig
    dtype: str
    home: Home
    draw: Draw
    batch: int
    edit: Signature = ()
    attention: str = "plain"

    def spec(self, *size: int, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(size, dtype, sharding=self.home.sharding())

    def cache(self, rows: int, length: int) -> tuple[jax.ShapeDtypeStruct, ...]:
        c = self.config
        size, dtype = (rows, c.kv_heads, length, c.head_dim), jnp.dtype(self.dtype)
        return (jax.ShapeDtypeStruct(size, dtype, sharding=self.home.cache()),) * (2 * c.layers)

    def params(self) -> Params:
        plain = param_shapes(self.config, jnp.dtype(self.dtype), self.home)
        return with_shapes(plain, self.config, self.edit, self.home.sharding()) if self.edit else plain

    def jit(self, run: Callable[..., Any], *, out: tuple[str, ...] = (), donate: tuple[int, ...] = ()) -> Any:
        """A program; where several devices share the model, `out` says which results are caches ("cache") and which
        are whole on every device ("whole"), so that donated caches are written in place."""
        if self.home.ways == 1 or not out:
            return jax.jit(run, donate_argnums=donate)
        kinds = {"cache": self.home.cache(), "whole": self.home.sharding()}
        shardings = tuple(kinds[name] for name in out)
        return jax.jit(run, donate_argnums=donate, out_shardings=shardings if len(out) > 1 else shardings[0])

    def knobs(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Class membership, temperature, top_p."""
        c = self.config
        real = functools.partial(self.spec, dtype=jnp.float32)
        return real(c.vocab, self.draw.classes), real(), real()


def _uniforms(keys: jax.Array, step: jax.Array, fine: bool = False) -> jax.Array:
    """`engines.uniforms` on the device; keys (batch, 2) are the high and low words, step any shape ending in batch."""
    words = (keys[:, 0], keys[:, 1], keys[:, 0] ^ keys[:, 1] ^ jnp.uint32(PARITY))
    a, b = step.astype(jnp.uint32) + words[0], jnp.zeros_like(step, jnp.uint32) + words[1]
    for group in range(5):
        for r in ROTATIONS[group % 2]:
            a = a + b
            b = ((b << r) | (b >> (32 - r))) ^ a
        a = a + words[(group + 1) % 3]
        b = b + words[(group + 2) % 3] + jnp.uint32(group + 1)
    if fine:
        return (a.astype(jnp.float32) + b.astype(jnp.float32) * jnp.float32(2.0**-32)) * jnp.float32(2.0**-32)
    return (a >> 8).astype(jnp.float32) * jnp.float32(2.0**-24)


def _pick(
    draw: Draw, logits: jax.Array, u: jax.Array, member: jax.Array, temperature: jax.Array, top_p: jax.Array
) -> dict[str, jax.Array]:
    """One token per row of logits (batch, vocab), and what is recorded about it."""
    top = jnp.max(logits, -1, keepdims=True)
    weight = jnp.exp(logits - top)
    total = jnp.sum(weight, -1)
    record = {"finite": jnp.isfinite(total) & (total > 0)}
    if draw.kind == "greedy":
        chosen, token = weight, jnp.argmax(logits, -1).astype(jnp.int32)
    else:
        chosen = weight if draw.kind == "raw" else jnp.exp((logits - top) / temperature)
        if draw.kind == "nucleus":
            chosen = jnp.where(_nucleus(chosen, top_p), chosen, 0)
        line, ids = _rising(chosen) if draw.fine else (chosen, None)
        token = _place(line, u)
        token = token if ids is None else jnp.take_along_axis(ids, token[:, None], -1)[:, 0]
    at = functools.partial(jnp.take_along_axis, indices=token[:, None], axis=-1)
    record["token"] = token
    record["logprob"] = (at(logits) - top)[:, 0] - jnp.log(total)
    if draw.processed:
        zero = jnp.zeros_like(total)
        record["processed"] = zero if draw.kind == "greedy" else jnp.log(at(chosen)[:, 0] / jnp.sum(chosen, -1))
    if draw.classes:  # of the distribution drawn from: only that one makes hits minus summed mass a martingale
        inside = jnp.matmul(chosen, member, precision="highest") / jnp.sum(chosen, -1, keepdims=True)
        record["mass"] = member[token] if draw.kind == "greedy" else inside
    return record


def _place(line: jax.Array, u: jax.Array) -> jax.Array:
    """Index of the first weight of each row (batch, size) at which the cumulative sum passes u times the whole.

    Long rows are summed block by block first, so that only one block of each is gone through one by one.
    """
    batch, size = line.shape
    if size >= LONG:
        blocks = jnp.pad(line, ((0, 0), (0, -size % BLOCK))).reshape(batch, -1, BLOCK)
        sums = jnp.cumsum(jnp.sum(blocks, -1), -1)
        mark = u[:, None] * sums[:, -1:]
        block = jnp.sum((sums <= mark) & (sums < sums[:, -1:]), -1, dtype=jnp.int32)[:, None]
        before = jnp.where(block > 0, jnp.take_along_axis(sums, jnp.maximum(block - 1, 0), -1), 0)
        inside = jnp.cumsum(jnp.take_along_axis(blocks, block[..., None], 1)[:, 0], -1)
        return block[:, 0] * BLOCK + jnp.sum((inside <= mark - before) & (inside < inside[:, -1:]), -1, dtype=jnp.int32)
    sums = jnp.cumsum(line, -1)
    mark = u[:, None] * sums[:, -1:]
    # The second condition keeps a rounded-up mark from running past the last token that has any probability.
    return jnp.sum((sums <= mark) & (sums < sums[:, -1:]), -1, dtype=jnp.int32)


def _rising(weight: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Weights from the smallest to the largest, and their ids; equal ones go by the smaller id."""
    ids = jnp.broadcast_to(jnp.arange(weight.shape[-1], dtype=jnp.int32), weight.shape)
    line, order = jax.lax.sort((weight, ids), num_keys=2)
    return line, order


def _nucleus(weight: jax.Array, top_p: jax.Array) -> jax.Array:
    """Mask of the most probable tokens whose mass before them is below top_p; equal ones go by the smaller id."""
    ids = jnp.broadcast_to(jnp.arange(weight.shape[-1], dtype=jnp.int32), weight.shape)
    falling, order = jax.lax.sort((-weight, ids), num_keys=2)
    sums = jnp.cumsum(-falling, -1)
    last = jnp.sum(sums + falling < top_p * sums[:, -1:], -1, keepdims=True) - 1
    last = jnp.maximum(last, 0)
    value, index = -jnp.take_along_axis(falling, last, -1), jnp.take_along_axis(order, last, -1)
    return (weight > value) | ((weight == value) & (ids <= index))


def _chunk(
    params: Params,
    cache: Cache,
    row: jax.Array,
    keys: jax.Array,
    ends: jax.Array,
    member: jax.Array,
    temperature: jax.Array,
    top_p: jax.Array,
    *,
    shape: Shape,
    steps: int,
) -> tuple[Cache, dict[str, jax.Array]]:
    """Sample up to `steps` tokens for each row.

    ``row`` (4, batch) holds the last token, its position, the number of tokens sampled before and how many may follow;
    a row that has ended stays where it is and its records mean nothing.
    """
    token, position, count, left = row
    u = _uniforms(keys, count + jnp.arange(steps)[:, None], shape.draw.fine)

    def body(carry: Any, step: Any) -> Any:
        token, position, alive, cache = carry
        logits, cache = decode(params, shape.config, token, position, cache, shape.attention)
        record = _pick(shape.draw, logits, step[0], member, temperature, top_p)
        alive = alive & ~ends[record["token"]] & (step[1] + 1 < left)
        return (jnp.where(alive, record["token"], token), position + alive, alive, cache), record

    carry, records = jax.lax.scan(body, (token, position, left > 0, cache), (u, jnp.arange(steps)))
    return carry[3], records


def _first(
    logits: jax.Array, source: jax.Array, keys: jax.Array, member: jax.Array, temperature: jax.Array, top_p: jax.Array,
    *, shape: Shape,
) -> dict[str, jax.Array]:  # fmt: skip
    """The first token of rollouts whose contexts are the rows `source` of a prefill; records have one step."""
    u = _uniforms(keys, jnp.zeros_like(source), shape.draw.fine)
    record = _pick(shape.draw, logits[source], u, member, temperature, top_p)
    return jax.tree.map(lambda x: x[None], record)


def _fill(cache: Cache, source: Cache, index: jax.Array, slots: jax.Array) -> Cache:
    """Copy rows `index` of one cache into rows `slots` of a longer one; slots beyond the end are skipped."""
    width = source[0].shape[2]
    return tuple(c.at[slots, :, :width].set(s[index], mode="drop") for c, s in zip(cache, source))


def _score(
    params: Params, tokens: jax.Array, lengths: jax.Array, prompt: jax.Array, member: jax.Array, *, shape: Shape
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Log-probability of every next token, class masses before it, and whether all was finite."""
    logits = forward(params, shape.config, tokens, lengths, prompt=prompt)[:, :-1]
    law = jax.nn.log_softmax(logits, -1)
    picked = jnp.take_along_axis(law, tokens[:, 1:, None], -1)[..., 0]
    return picked, jnp.matmul(jnp.exp(law), member, precision="highest"), jnp.isfinite(jnp.max(law, -1))


_programs: dict[Any, Future[tuple[Any, float]]] = {}
_lock = threading.Lock()


def compiled(key: tuple[Any, ...], lower: Callable[[], Any]) -> Any:
    """The program of a key, compiled once per process, whichever thread asks first."""
    with _lock:
        mine = key not in _programs
        future = _programs.setdefault(key, Future())
    if mine:
        start = time.perf_counter()
        try:
            future.set_result((lower().compile(), time.perf_counter() - start))
        except BaseException as error:
            with _lock:
                del _programs[key]
            future.set_exception(error)
    return future.result()[0]


def prefill_program(shape: Shape, rows: int, width: int) -> Any:
    """(params, tokens, lengths, prompt) -> logits, cache."""

    def lower() -> Any:
        def run(params: Params, tokens: jax.Array, lengths: jax.Array, prompt: jax.Array) -> Any:
            return prefill(params, shape.config, tokens, lengths, prompt)

        program = shape.jit(run, out=("whole", "cache"))
        return program.lower(shape.params(), shape.spec(rows, width), shape.spec(rows), shape.spec(rows))

    return compiled(("prefill", shape.config, shape.dtype, shape.home, shape.edit, rows, width), lower)


def first_program(shape: Shape, rows: int) -> Any:
    """(logits, source, keys, member, temperature, top_p) -> records, for logits of `rows` contexts."""

    def lower() -> Any:
        logits = shape.spec(rows, shape.config.vocab, dtype=jnp.float32)
        keys = shape.spec(shape.batch, 2, dtype=jnp.uint32)
        run = jax.jit(functools.partial(_first, shape=shape))
        return run.lower(logits, shape.spec(shape.batch), keys, *shape.knobs())

    return compiled(("first", shape, rows), lower)


def chunk_program(shape: Shape, length: int, steps: int) -> Any:
    """(params, cache, row, keys, ends, member, temperature, top_p) -> cache, records."""

    def lower() -> Any:
        keys, ends = shape.spec(shape.batch, 2, dtype=jnp.uint32), shape.spec(shape.config.vocab, dtype=jnp.bool_)
        cache, row = shape.cache(shape.batch, length), shape.spec(4, shape.batch)
        run = shape.jit(functools.partial(_chunk, shape=shape, steps=steps), out=("cache", "whole"), donate=(1,))
        return run.lower(shape.params(), cache, row, keys, ends, *shape.knobs())

    return compiled(("chunk", shape, length, steps), lower)


def fill_program(shape: Shape, rows: int, width: int, length: int) -> Any:
    """(cache, source, index, slots) -> cache, `GROUP` rows from a source of `rows` rows and `width` positions."""

    def lower() -> Any:
        index = shape.spec(GROUP)
        run = shape.jit(_fill, out=("cache",), donate=(0,))
        return run.lower(shape.cache(shape.batch, length), shape.cache(rows, width), index, index)

    return compiled(("fill", shape.config, shape.dtype, shape.home, shape.batch, rows, width, length), lower)


def score_program(shape: Shape, rows: int, width: int) -> Any:
    """(params, tokens, lengths, prompt, member) -> log-probabilities, masses, finite."""

    def lower() -> Any:
        run = jax.jit(functools.partial(_score, shape=shape))
        tokens, size = shape.spec(rows, width), shape.spec(rows)
        return run.lower(shape.params(), tokens, size, size, shape.knobs()[0])

    return compiled(("score", shape, rows, width), lower)


def split_keys(keys: np.ndarray) -> np.ndarray:
    """64-bit keys as (n, 2) words, high and low."""
    keys = np.asarray(keys, dtype=np.uint64)
    return np.stack([keys >> np.uint64(32), keys & np.uint64(0xFFFFFFFF)], axis=-1).astype(np.uint32)
