"""Counts of rollouts on disk: batches are counted one by one and added, so that only the counts must fit in memory."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from ..errors import InputError
from ..outcomes import OUTCOMES
from .counts import Counts, Table, canonical, group
from .shards import opened
from .states import JudgedPrefix, KGram, Position

__all__ = ["count_stream"]

ENTRY = 192  # bytes that an entry of a table takes while tables are added
ROOM = 1 << 22  # entries by which counts may grow before they are added up
TOKENS = 1 << 22  # tokens of a batch
PIECES = 64  # into which the shards are dealt out where they are counted by several processes


def count_stream(source: Any, states: Any, memory: int | None, skip_corrupt: bool, spread: Any = None) -> Counts:
    """Counts of what lies on disk, as `count` makes them of rollouts in memory.

    Parameters
    ----------
    source : path or Stream
    states : StateMap
    memory : int or None
        Bytes that counts may take; None: no limit.
    skip_corrupt : bool
    spread : callable, optional
        ``spread(function, items)`` returns a list as ``map`` would, over several processes.

    Raises
    ------
    InputError
        As `count`, with the shard and the row from which on its batch begins; if the counts outgrow the memory
        (``partial`` holds those of the batches before).
    """
    stream = opened(source, skip_corrupt)
    if spread is None:
        found = [_counted(states, memory, stream)]
    else:
        found = spread(functools.partial(_counted, states, memory), stream.parts(PIECES))
    parts = [part for part in found if part is not None]
    if not parts:
        raise _nothing(stream.rows)
    whole = _joined(parts)
    if len(found) > 1:
        _check([whole], memory)
    return whole


def _nothing(rows: int) -> InputError:
    if rows:
        return InputError("All weights are zero.", cause="Nothing would be counted.", next="Correct the column weight.")
    return InputError("There are no rollouts.", cause="The files are empty.", next="Sample some.")


def _counted(states: Any, memory: int | None, stream: Any) -> Counts | None:
    """Counts of a stream; None where there is nothing to count, as in shards of a folder whose others hold it all."""
    from .counting import count

    blind = isinstance(states, KGram | Position | JudgedPrefix)  # reads no activations
    wanted = [
        name for name in stream.columns if name.startswith(("weight", "mass_", *(() if blind else ("activation_",))))
    ]
    parts: list[Counts] = []
    room = ROOM if memory is None else min(ROOM, memory // ENTRY)
    least = room
    for batch in stream.batches(wanted, TOKENS):
        if not np.any(batch.columns.get("weight", 1)):
            continue  # what weighs nothing is not counted
        try:
            parts.append(count(batch, states))
        except InputError as error:
            where = f"{batch.shard}, rows from {batch.first} on: "
            told = _joined(parts) if parts else None
            raise InputError(where + error.fact, cause=error.cause, next=error.next, partial=told) from error
        if _entries(parts) > least:
            parts = [_joined(parts)]
            least = 2 * _entries(parts) + room
            _check(parts, memory)
    if not parts:
        return None
    parts = [_joined(parts)]
    _check(parts, memory)
    return parts[0]


def _joined(parts: list[Counts]) -> Counts:
    """The sum of counts, each table added up once."""
    if len(parts) == 1:
        return parts[0]
    states = canonical({label for part in parts for label in part.states})
    number = {label: i for i, label in enumerate(states)}
    ends = len(states) + np.arange(len(OUTCOMES))
    places = [np.concatenate([np.array([number[x] for x in part.states], np.int64), ends]) for part in parts]
    names = ("prompt_id", "category", "prefill", "outcomes")
    prompt_id, category, prefill, outcomes = (np.concatenate([getattr(p.tally, x) for p in parts]) for x in names)
    tally, rows = group(prompt_id, category, prefill, outcomes)
    groups = np.split(rows, np.cumsum([len(part.tally) for part in parts])[:-1])

    def table(pick: Callable[[Counts], Table | None]) -> Table:
        found = [(t, g, place) for part, g, place in zip(parts, groups, places) if (t := pick(part)) is not None]
        keys = [np.concatenate([g[t.group] for t, g, _ in found]), np.concatenate([p[t.source] for t, _, p in found])]
        flat = found[0][0].target is None
        target = None if flat else np.concatenate([p[t.target] for t, _, p in found])
        values = {k: np.concatenate([t.values[k] for t, *_ in found]) for k in found[0][0].values}
        return Table(keys[0], keys[1], target, values)

    mass = {name: table(lambda c, name=name: c.mass.get(name)) for name in sorted({k for c in parts for k in c.mass})}
    moves, entries, passages = table(lambda c: c.transitions), table(lambda c: c.entries), table(lambda c: c.passages)
    return Counts(parts[0].kind, states, tally, moves, entries, passages, mass)


def _entries(parts: list[Counts]) -> int:
    return sum(len(t.source) for c in parts for t in (c.transitions, c.entries, c.passages, *c.mass.values()))


def _check(parts: list[Counts], memory: int | None) -> None:
    entries = _entries(parts)
    if memory is not None and entries * ENTRY > memory:
        raise InputError(
            f"The counts of {parts[0].rollouts:,g} rollouts already take about {entries * ENTRY / 2**20:,.0f} MB.",
            cause=f"They keep {entries:,} numbers, one for every prompt and transition; {memory / 2**20:,.0f} MB were "
            "granted.",
            next="Grant more, or use chains.pool(path, KGram(k)), which adds up over prompts.",
            partial=parts[0],
        )
