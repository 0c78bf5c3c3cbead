"""Counting rollouts that lie on disk, all prompts together, in bounded memory: tables in the cache, or sorted runs.

If all transitions that could occur fit a table, every token is one addition to it, made on the buffers that Parquet
was decoded into. Otherwise transitions are sorted batch by batch and added up out of core (`spill`). Either way the
rollouts through each state are gathered prompt by prompt, for the intervals.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import InputError
from ..outcomes import OUTCOMES
from .checks import freeze
from .counting import _read
from .counts import group
from .pooled import COLUMNS, GRANTED, Pooled, read_pooled, write_tally
from .shards import opened
from .spill import LEAST, Column, Spill, Sums, added_up, whole_folder
from .states import KGram, map_name
from .tally import Tally, runs_of

__all__ = ["pool"]

DENSE = 1 << 25  # cells up to which all are counted in one table
TOKENS = 1 << 21  # tokens of a batch, at most about
RECORD = 256  # bytes of memory per record that is kept before it is spilled: two tables, sorted with room to spare


def pool(
    path: Any,
    states: KGram | None = None,
    *,
    out: str | os.PathLike[str] | None = None,
    memory: int = GRANTED,
    categories: Any = None,
    prefill: Any = None,
    skip_corrupt: bool = False,
) -> Pooled:
    """Count rollouts on disk, all prompts together, in bounded memory.

    Parameters
    ----------
    path : path or Stream
        A Parquet file of judged rollouts, a folder of shards, or what `markovsafety.rollouts.streaming.stream` opened.
    states : KGram, optional
        ``KGram(1)`` if not given.
    out : path, optional
        A new folder for the table, written whole or not at all. Needed where there are more distinct transitions than
        `memory` holds.
    memory : int
        Bytes that counting may take beside the batch at hand and what is kept by prompt; see Notes.
    categories, prefill : value or several, optional
        Only rollouts of these.
    skip_corrupt : bool
        Leave out damaged shards, after decoding every shard once to find them; `Pooled.skipped` names them.

    Returns
    -------
    Pooled

    Raises
    ------
    InputError
        If the rollouts cannot be read, are not judged, have weights, or none matches; if the grams cannot be numbered,
        do not fit the memory and `out` is not given, or `out` cannot be written.

    Notes
    -----
    What counts, and what the numbers mean, is as for `count`. Beside `memory`, a batch takes some 100 MB, and every
    prompt, category and prefill about 100 bytes. Prompts whose rollouts do not lie together (files of another program)
    are read a second time, and their rollouts sorted by prompt.

    Examples
    --------
    >>> asked = {"prompt_id": [0, 1], "outcome": ["harm", "refusal"], "hit": 1}
    >>> path = ms.write_rollouts(ms.Rollouts.of([[5, 9], [5, 2]], **asked), "run.parquet")
    >>> chain = ms.chains.pool(path, ms.KGram(2)).chain()
    >>> print(ms.hitting_probability(chain, "harm").at_start)
    P(harm) = 0.5   95 % [0.0126, 0.987]
        because: sampling 0.49, rounding 8e-16; judge, lumping, model, truncation not assessed
    """
    states = KGram(1) if states is None else states
    if not isinstance(states, KGram):
        raise InputError(
            f"Pooled counting knows no states of {map_name(states)}.",
            cause="It numbers the last k tokens.",
            next="Pass KGram(k), or use count(path, states).",
        )
    source = opened(path, skip_corrupt)
    base = source.largest_token() + 2
    if base**states.k >= 2**62:
        most = next(k for k in range(states.k, -1, -1) if base**k < 2**62)
        raise InputError(
            f"Grams of {states.k} tokens out of {base - 1:,} cannot be numbered.",
            cause="There are more than 2**62 of them.",
            next=f"Pass KGram({most}) or less.",
        )
    road = _Road(source, states.k, base, _values(categories), _values(prefill), memory)
    with whole_folder(None if out is None else Path(out)) as folder, ExitStack() as stack:
        columns = {name: stack.enter_context(Column(folder, name, *kind)) for name, kind in COLUMNS.items()}
        dense = base**states.k * (base + 3) <= min(DENSE, memory // 16)
        told = _dense(road, columns, folder) if dense else _spilled(road, columns, folder)
        facts = {"order": states.k, "base": base, "skipped": source.skipped, "note": source.note}
        if folder is not None:
            write_tally(folder, facts, told.tally, told.entries)
    if out is not None:
        return read_pooled(out)
    return Pooled(tally=told.tally, entries=told.entries, **{k: c.array() for k, c in columns.items()}, **facts)


def _values(wanted: Any) -> list[Any] | None:
    if wanted is None:
        return None
    return [wanted] if isinstance(wanted, str) or not hasattr(wanted, "__iter__") else list(wanted)


@dataclass(frozen=True)
class _Road:
    """What is read, and how it is numbered."""

    source: Any
    order: int
    base: int
    categories: list[Any] | None
    prefill: list[Any] | None
    memory: int

    def rows(self) -> Iterator[dict[str, NDArray]]:
        """Checked columns of one batch after the other; ``fresh`` marks where another prompt begins."""
        last: tuple[Any, Any] | None = None
        wanted = [name for name in self.source.columns if name == "weight"]
        for batch in self.source.batches(wanted, min(TOKENS, max(self.memory // RECORD, LEAST))):
            try:
                r = _read(batch)
            except InputError as error:
                where = f"{batch.shard}, rows from {batch.first} on: "
                raise InputError(where + error.fact, cause=error.cause, next=error.next) from error
            if len(r["weight"]) < len(batch.prompt_id) or (r["weight"] != 1).any():
                raise InputError(
                    f"{batch.shard} holds weighted rollouts.",
                    cause="Pooled counts are whole numbers.",
                    next="Use count(path, states), or drop the column weight.",
                )
            keep = np.ones(len(r["begin"]), dtype=bool)
            for name, values in (("category", self.categories), ("prefill", self.prefill)):
                if values is not None:
                    keep &= np.isin(r[name], values)
            if not keep.all():
                r = {k: v[keep] for k, v in r.items() if k != "tokens"} | {"tokens": r["tokens"]}
            if len(r["begin"]) == 0:
                continue
            ids, kinds = r["prompt_id"], r["category"]
            same = (ids[1:] == ids[:-1]) & (kinds[1:] == kinds[:-1])
            r["fresh"] = np.concatenate([[last != (ids[0], kinds[0])], ~same])
            last = ids[-1], kinds[-1]
            r["tokens"] = freeze(np.ascontiguousarray(r["tokens"], dtype=np.int32).view())  # one type to compile
            yield r

    def refuse(self, r: dict[str, NDArray], position: int) -> None:
        """Raise for a token that was not there when the files were first read."""
        if position >= 0:
            raise InputError(
                f"A token is {int(r['tokens'][position])}.",
                cause=f"Ids ran from 0 to {self.base - 2} when the files were opened: they changed, or it is negative.",
                next="Pool them again, or write them again.",
            )


@dataclass
class _Told:
    """What is gathered by prompt and by prefill on the way."""

    parts: list[Tally] = field(default_factory=list)
    begun: dict[int, list[tuple[NDArray, NDArray]]] = field(default_factory=dict)
    prompts_seen: int = 0
    compact: int = 0

    def add(self, r: dict[str, NDArray], entered: NDArray) -> None:
        forced, outcome = r["prefill"], r["outcome"]
        change = r["fresh"].copy()
        change[0] = True
        change[1:] |= forced[1:] != forced[:-1]
        first = np.flatnonzero(change)
        ends = np.add.reduceat(np.eye(len(OUTCOMES))[outcome], first, axis=0)
        self.parts.append(group(r["prompt_id"][first], r["category"][first], forced[first], ends)[0])
        self.prompts_seen += int(r["fresh"].sum())
        if sum(map(len, self.parts)) > 2 * self.compact + (1 << 16):
            self.parts = [self.tally]
            self.compact = len(self.parts[0])
        for k in np.unique(forced).tolist():
            some = np.unique(entered[forced == k], return_counts=True)
            self.begun[k] = [_added([*self.begun.get(k, []), some])]

    @property
    def tally(self) -> Tally:
        if not self.parts:
            raise InputError("There are no rollouts.", cause="None matches.", next="Sample some, or check the filter.")
        names = ("prompt_id", "category", "prefill", "outcomes")
        prompt_id, category, prefill, outcomes = (np.concatenate([getattr(t, x) for t in self.parts]) for x in names)
        return group(prompt_id, category, prefill, outcomes)[0]

    @property
    def entries(self) -> dict[int, tuple[NDArray, NDArray]]:
        return {k: self.begun[k][0] for k in sorted(self.begun)}

    @property
    def together(self) -> bool:
        """Whether the rollouts of each prompt lay together."""
        return self.prompts_seen == len(self.tally.clusters(prefill=None)[0])


def _added(parts: list[tuple[NDArray, NDArray]]) -> tuple[NDArray, NDArray]:
    keys, inverse = np.unique(np.concatenate([k for k, _ in parts]), return_inverse=True)
    return keys, np.bincount(inverse, np.concatenate([n for _, n in parts]), len(keys)).astype(np.int64)


def _arguments(r: dict[str, NDArray]) -> tuple[NDArray, ...]:
    return r["tokens"], r["begin"], r["prefill"], r["stop"], r["outcome"].astype(np.int64)


def _dense(road: _Road, columns: dict[str, Column], folder: Path | None) -> _Told:
    from . import pooling_kernels as kernels  # compiled code is loaded where it pays

    S, told = road.base**road.order, _Told()
    moves = np.zeros((S, road.base + 3), dtype=np.int64)
    held, seen, n, touched = (np.zeros(size, dtype=np.int64) for size in (2, S, S, S))
    x, sums = np.zeros((S, len(OUTCOMES)), dtype=np.int64), np.zeros((S, kernels.SUMS), dtype=np.int64)
    for r in road.rows():
        entered = np.empty(len(r["begin"]), dtype=np.int64)
        table = moves, held, seen, n, x, touched, sums
        road.refuse(r, kernels.pool(*_arguments(r), r["fresh"], road.order, road.base, entered, *table))
        told.add(r, entered)
    kernels.flush(held, n, x, touched, sums)
    cells = np.flatnonzero(moves)
    state, symbol = np.divmod(cells, moves.shape[1])
    _write_cells([(state, symbol, moves.ravel()[cells])], columns)
    if told.together:
        _write_evidence([sums[sums[:, 0] > 0]], columns)
    else:
        passages = _Passages(road, folder)
        for r in road.rows():
            _, state, who, _ = _emitted(road, r)
            passages.add(r, state, who)
        _write_evidence(passages.sums(), columns)
    return told


def _emitted(road: _Road, r: dict[str, NDArray]) -> tuple[NDArray, NDArray, NDArray, NDArray]:
    """Where each rollout was entered; state, rollout and what came next of every visited state."""
    from . import pooling_kernels as kernels

    walks = np.where(r["stop"] < r["prefill"], 0, r["stop"] - r["prefill"] + 1)
    entered, m = np.empty(len(walks), dtype=np.int64), int(walks.sum())
    state, symbol, who = (np.empty(m, dtype=np.int64) for _ in range(3))
    road.refuse(r, kernels.emit(*_arguments(r), road.order, road.base, entered, state, symbol, who))
    return entered, state, who, symbol


def _spilled(road: _Road, columns: dict[str, Column], folder: Path | None) -> _Told:
    told, bits = _Told(), (road.base**road.order - 1).bit_length()
    cells = Spill(folder, "transitions", road.memory // RECORD, (bits, (road.base + 2).bit_length()))
    passages = _Passages(road, folder)
    for r in road.rows():
        entered, state, who, symbol = _emitted(road, r)
        cells.add(state, symbol)
        passages.add(r, state, who)
        told.add(r, entered)
    told.tally  # noqa: B018 - refuses an empty set before anything is merged
    _write_cells(cells.merged(), columns)
    _write_evidence(passages.sums(), columns)
    return told


class _Passages:
    """Rollouts by state, prompt and outcome, each counted once."""

    def __init__(self, road: _Road, folder: Path | None):
        self.states = (road.base**road.order - 1).bit_length()
        self.spill = Spill(folder, "passages", road.memory // RECORD, (self.states, 0))
        self.numbers: dict[tuple[int, str], int] = {}

    def add(self, r: dict[str, NDArray], state: NDArray, who: NDArray) -> None:
        """Add the rollouts of a batch, given by the states that they visited."""
        fresh = r["fresh"].copy()
        fresh[0] = True
        first = np.flatnonzero(fresh)
        keys = zip(r["prompt_id"][first].tolist(), r["category"][first].tolist())
        known = np.array([self.numbers.setdefault(key, len(self.numbers)) for key in keys])
        code = known[np.cumsum(fresh) - 1] * len(OUTCOMES) + r["outcome"]
        a, once, _ = added_up(state, who, None, (self.states, len(code).bit_length()))
        self.spill.bits = self.states, (len(OUTCOMES) * len(self.numbers)).bit_length()
        self.spill.add(a, code[once])

    def sums(self) -> Iterator[NDArray[np.int64]]:
        """The columns of `pooling_kernels.SUMS`, states in rising order."""
        from . import pooling_kernels as kernels

        for a, b, many in self.spill.merged():
            sums = np.zeros((len(runs_of(a)), kernels.SUMS), dtype=np.int64)
            kernels.gather(a, b, many, sums)
            yield sums


def _write_cells(pieces: Any, columns: dict[str, Column]) -> None:
    columns["indptr"].append(np.zeros(1, np.int64))
    done = 0
    piece: Sums
    for piece in pieces:
        state, symbol, count = piece
        first = runs_of(state)
        columns["contexts"].append(state[first])
        columns["indptr"].append(done + np.append(first[1:], len(state)))
        columns["symbols"].append(symbol)
        columns["counts"].append(count)
        done += len(state)


def _write_evidence(pieces: Any, columns: dict[str, Column]) -> None:
    for sums in pieces:
        n, prompts, squares = (sums[:, i] for i in range(3))
        x, some, xx, xn = (sums[:, i : i + len(OUTCOMES)] for i in range(3, sums.shape[1], len(OUTCOMES)))
        columns["through"].append(n)
        columns["prompts"].append(np.column_stack([prompts, some]))
        columns["deff"].append(_deff(n[:, None], prompts[:, None], squares[:, None], x, some, xx, xn))


def _deff(
    n: NDArray, prompts: NDArray, squares: NDArray, x: NDArray, some: NDArray, xx: NDArray, xn: NDArray
) -> NDArray[np.float64]:
    """Design effects from sums over prompts: the same numbers as those `estimate` finds prompt by prompt.

    The variance between prompts is ``sum (x - p n)^2``; from sums it is a difference, hence the longer floats.
    """
    deff = np.zeros(x.shape)
    state, end = np.nonzero((prompts >= 2) & (some > 0) & (n > x))
    n, prompts, squares = (column[state, 0] for column in (n, prompts, squares))
    x, xx, xn = (table[state, end] for table in (x, xx, xn))
    total = n.astype(np.longdouble)
    p = x / total
    spread = np.maximum(xx - 2 * p * xn + p * p * squares, 0)
    deff[state, end] = np.maximum(prompts / (prompts - 1) * spread / total**2 * (total - 1) / (p * (1 - p)), 1)
    return deff
