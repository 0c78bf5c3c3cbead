"""From judged rollouts to counts, in flat arrays.

Only sampled tokens are counted. The forced tokens of a prefill set the state in which sampling begins (`Counts.entry`),
and tokens behind the first hit do not count. What the token limit cut off ends in the outcome "truncated".

Rollouts are counted in blocks, group by group (prompt, category and prefill), so that the memory beside the result does
not grow with their number, and what is sorted stays in the cache.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import InputError
from ..outcomes import CODES, NOT_JUDGED, OUTCOMES
from .checks import index_dtype
from .counts import Counts, Table, canonical, group
from .shards import is_path
from .states import Asked, KGram, label_at, map_name
from .streaming import count_stream
from .sums import from_sums
from .tally import NO_ORDER, collect, dense_codes, runs_of, sorted_by

__all__ = ["count"]

_LAST = CODES["truncated"]
_TABLES = ("transitions", "entries", "passages")
VISITS = 1 << 18  # visited states of rollouts that are counted at once
_NEEDED = ("tokens", "offsets", "prompt_id", "category", "prefill", "outcome", "hit")


def count(
    rolls: Any, states: Any = None, *, memory: int | None = None, skip_corrupt: bool = False, spread: Any = None
) -> Counts:
    """Count the transitions of judged rollouts.

    Parameters
    ----------
    rolls : Rollouts, Sums or path
        Judged, or what `markovsafety.rollouts.tally` added up on a device, or a Parquet file or folder of shards, which
        is then counted batch by batch and never held as a whole. A column ``weight`` weighs rollouts, columns
        ``mass_harm``, ``mass_refusal`` and ``mass_benign`` are summed by state.
    states : StateMap, optional
        `KGram`, `Position`, `JudgedPrefix`, `ActivationBins`, or anything with ``walk(tokens, prefill)``; by default
        ``KGram(2)``, and of sums the map that they were added up by.
    memory : int, optional
        Of a path: bytes that the counts may take. They hold a number for every prompt and transition that occurs;
        `markovsafety.chains.pool` holds one for every transition.
    skip_corrupt : bool
        Of a path: leave out damaged shards instead of refusing them; every shard is then decoded twice.
    spread : callable, optional
        Of a folder: ``spread(function, items)`` returns a list as ``map`` would, over several processes: for a Ray
        cluster ``functools.partial(markovsafety.rollouts.spread, workers=8)``. `memory` then holds for each of them.

    Returns
    -------
    Counts

    Raises
    ------
    InputError
        If `rolls` are no rollouts, there are none, one is not judged, or a column contradicts another; if sums were
        added up by another map; if a shard is damaged, or counts outgrow `memory`.

    Notes
    -----
    Token i of a rollout is counted if it was sampled (i >= prefill) and stands no later than the hit; at the hit the
    transition goes to the outcome. A truncated rollout makes one last transition, from its last state to "truncated". A
    benign rollout without a recorded hit ends at its last token; if nothing was sampled, it enters in the outcome
    itself, without a transition. A hit among the forced tokens is refused: the model did not choose them. A state
    label that equals an outcome's name gets "after " in front, because
    that name belongs to the outcome. Of a path, sums of weights and masses that are no whole numbers may differ
    by their rounding from those counted in memory.

    Examples
    --------
    >>> rolls = ms.Rollouts.of(
    ...     [[5, 9], [7, 2], [5, 8, 2], [7, 2]],
    ...     prompt_id=[0, 0, 1, 1],
    ...     outcome=["harm", "refusal", "benign", "refusal"],
    ...     hit=[1, 1, 2, 1],
    ... )
    >>> counts = ms.count(rolls, states=ms.KGram(1))
    >>> counts
    <Counts KGram(1): 4 rollouts (1 harm + 2 refusal + 1 benign + 0 truncated) of 2 prompts,
        prefill 0; 4 states, 9 transitions>
    >>> for state, row in zip(counts.states, counts.matrix.toarray()):
    ...     print(state, row)
    (-1,) [0. 2. 2. 0. 0. 0. 0. 0.]
    (5,) [0. 0. 0. 1. 1. 0. 0. 0.]
    (7,) [0. 0. 0. 0. 0. 2. 0. 0.]
    (8,) [0. 0. 0. 0. 0. 0. 1. 0.]
    """
    if all(hasattr(rolls, name) for name in ("added", "entry", "order")):
        return from_sums(rolls, states)
    states = KGram(2) if states is None else states
    if is_path(rolls):
        return count_stream(rolls, states, memory, skip_corrupt, spread)
    r = _read(rolls)
    tally, rows = group(
        r["prompt_id"], r["category"], r["prefill"], np.eye(len(OUTCOMES))[r["outcome"]] * r["weight"][:, None]
    )
    columns = getattr(rolls, "columns", {})
    masses = _masses(columns, len(r["tokens"]))
    base = states.base(r["tokens"]) if isinstance(states, KGram) else 0
    base = base if isinstance(states, KGram) and base**states.k < 2**62 else 0
    order = np.argsort(rows, kind="stable")  # group by group: what is added up lies together
    blocks = [
        _block(r, rows, which, states, base, masses, columns) for which in _cut(r, rows[order], order, bool(masses))
    ]
    if base:
        known, _ = sorted_by(np.concatenate([b.names for b in blocks]), (base**states.k).bit_length(), NO_ORDER)
        known = known[runs_of(known)]
        names, places = tuple(states.labels_of(known, base)), [np.searchsorted(known, b.names) for b in blocks]
    else:
        names = canonical({x for b in blocks for x in b.names})
        lookup = {label: i for i, label in enumerate(names)}
        places = [np.array([lookup[x] for x in b.names], dtype=np.int64) for b in blocks]
    ends = len(names) + np.arange(len(OUTCOMES))
    places = [np.concatenate([place, ends]) for place in places]
    tables = {name: _join([b.tables.pop(name) for b in blocks], places) for name in list(blocks[0].tables)}
    moves, entries, passages = (tables.pop(name) for name in _TABLES)
    return Counts(map_name(states), names, tally, moves, entries, passages, tables)


@dataclass(frozen=True)
class _Block:
    """Sums over some rollouts; states are numbered within the block, in the order of their names."""

    names: Any
    tables: dict[str, tuple[list[NDArray], dict[str, NDArray]]]


def _cut(r: dict[str, NDArray], rows: NDArray, order: NDArray, masses: bool) -> list[NDArray]:
    """Rollouts of each block: whole groups if they fit, parts of larger ones if sums are exact.

    Sums that round are not cut: adding up parts could change them by an ulp.
    """
    ends = np.cumsum(np.where(r["stop"] < r["prefill"], 0, r["stop"] - r["prefill"] + 1)[order])
    exact = not masses and bool((r["weight"] == np.floor(r["weight"])).all()) and r["weight"].sum() < 2**53
    groups, cuts = np.flatnonzero(np.append(rows[1:] != rows[:-1], True)) + 1, [0]
    while cuts[-1] < len(order):
        begin = int(ends[cuts[-1] - 1]) if cuts[-1] else 0
        fits = int(np.searchsorted(ends, begin + VISITS, "right"))
        whole = int(np.searchsorted(groups, fits, "right")) - 1  # the last group that fits
        if whole >= 0 and groups[whole] > cuts[-1]:
            cuts.append(int(groups[whole]))
        elif exact:
            cuts.append(max(fits, cuts[-1] + 1))
        else:
            cuts.append(int(groups[whole + 1]))
    return np.split(order, cuts[1:-1])


def _block(
    r: dict[str, NDArray],
    rows: NDArray,
    which: NDArray,
    states: Any,
    base: int,
    masses: dict[str, NDArray],
    columns: Any,
) -> _Block:
    r = {k: v[which] for k, v in r.items() if k != "tokens"} | {"tokens": r["tokens"]}
    first, group = int(rows[which[0]]), rows[which] - rows[which[0]]
    outcome, stop = r["outcome"].astype(np.int64), r["stop"]
    walks = np.where(stop < r["prefill"], 0, stop - r["prefill"] + 1)  # visited states of each rollout
    who, at = _ramp(walks, r["prefill"])
    seen = np.maximum(stop, 0)
    mine, inside = _ramp(seen, np.zeros_like(seen))  # the tokens that the block can see
    tokens, begin = r["tokens"][r["begin"][mine] + inside], (np.cumsum(seen) - seen)[who]
    if base:
        keys = states.keys_at(tokens, begin, at, base)
        codes, where = dense_codes([keys], len(keys))
        names: Any = keys[where]
    else:
        codes, names = _states(states, tokens, begin, at, _asked(who, r, columns))
    ends = np.cumsum(walks)
    last = np.zeros(len(who), dtype=bool)
    last[ends[walks > 0] - 1] = True
    target = np.empty_like(codes)
    target[:-1] = codes[1:]
    target[last] = len(names) + outcome[who[last]]
    entered = len(names) + outcome  # where nothing was sampled before the hit
    entered[walks > 0] = codes[(ends - walks)[walks > 0]]
    weight = None if (r["weight"] == 1).all() else r["weight"]
    size = int(group[-1]) + 1, len(names), len(names) + len(OUTCOMES)
    moves = _summed([group[who], codes, target], size, None if weight is None else weight[who])
    tables = {
        "transitions": moves,
        "entries": _summed([group, entered], (size[0], size[2]), weight),
        "passages": _passages(group, who, codes, outcome, size, weight),
    }
    tables |= _surprises(masses, r, who, at, last, codes, group)
    small = index_dtype(first + size[0], size[2])  # blocks wait for each other; half the size is enough
    return _Block(
        names, {k: ([c.astype(small) for c in (x[0] + first, *x[1:])], sums) for k, (x, sums) in tables.items()}
    )


def _ramp(lengths: NDArray, start: NDArray) -> tuple[NDArray, NDArray]:
    """Row and running number, from its start on, of every item of rows of these lengths."""
    row = np.repeat(np.arange(len(lengths)), lengths)
    number = np.arange(len(row)) + np.repeat(start - (np.cumsum(lengths) - lengths), lengths)
    return row, number


def _pack(columns: Sequence[NDArray], size: Sequence[int]) -> tuple[NDArray, int]:
    """One number for every row, and the bits it takes."""
    packed, bits = columns[0].astype(np.int64), math.prod(size).bit_length()
    assert bits < 64, "a block has too many states"
    for column, span in zip(columns[1:], size[1:]):
        packed *= span
        packed += column
    return packed, bits


def _unpack(packed: NDArray, size: Sequence[int]) -> list[NDArray]:
    columns = []
    for span in reversed(size[1:]):
        packed, column = np.divmod(packed, span)
        columns.append(column)
    return [packed, *reversed(columns)]


def _summed(columns: list[NDArray], size: Sequence[int], weight: NDArray | None) -> Any:
    """Distinct rows in lexicographic order, and the sum of their weights (None: all are one)."""
    if weight is not None:
        keys, (sums,) = collect(columns, [weight])
        return keys, {"count": sums}
    packed, _ = sorted_by(*_pack(columns, size), NO_ORDER)
    first = runs_of(packed)
    return _unpack(packed[first], size), {"count": np.diff(first, append=len(packed)).astype(index_dtype(len(packed)))}


def _passages(
    group: NDArray, who: NDArray, codes: NDArray, outcome: NDArray, size: Sequence[int], weight: NDArray | None
) -> Any:
    """Every rollout once for each state it passed through, with the outcome it ended in."""
    spans = size[0], size[1], len(OUTCOMES), max(len(group), 1)
    packed, _ = sorted_by(*_pack([group[who], codes, outcome[who], who], spans), NO_ORDER)
    once, rollout = np.divmod(packed[runs_of(packed)], spans[3])
    first = runs_of(once)
    number = np.diff(first, append=len(once))
    if weight is None:
        sums = number.astype(index_dtype(len(once)))
    else:
        sums = np.bincount(np.repeat(np.arange(len(first)), number), weight[rollout], len(first))
    source, state, end = _unpack(once[first], spans[:3])
    return [source, state, size[1] + end], {"count": sums}


def _join(parts: list[Any], places: list[NDArray]) -> Table:
    """One table of those of all blocks, whose columns are let go as they are joined."""
    columns = [np.concatenate([keys.pop(0) for keys, _ in parts]).astype(np.int64)]
    while parts[0][0]:
        # The states of a block are numbered below those of its outcomes, so one list of places serves both.
        columns.append(np.concatenate([place[keys.pop(0)] for (keys, _), place in zip(parts, places)]))
    values = {k: np.concatenate([v.pop(k) for _, v in parts]).astype(np.float64) for k in list(parts[0][1])}
    return Table(columns[0], columns[1], columns[2] if len(columns) > 2 else None, values)


def _asked(row: NDArray, r: dict[str, NDArray], columns: Any) -> Asked:
    """What a map is told of rollouts that `_read` has checked."""
    where = r["begin"], r["length"], r["prefill"]
    return Asked(row, r["prompt_id"], r["category"], columns, *where, len(r["tokens"]))


def _states(states: Any, tokens: NDArray, begin: NDArray, at: NDArray, asked: Asked) -> tuple[NDArray, tuple[Any, ...]]:
    """Codes and canonical labels of the visited states."""
    codes, labels = label_at(states, tokens, begin, at, asked)
    named = [f"after {x}" if isinstance(x, str) and x in OUTCOMES else x for x in labels]
    names = canonical(set(named))
    if names != tuple(named):
        lookup = {label: i for i, label in enumerate(names)}
        codes = np.array([lookup[x] for x in named], dtype=np.int64)[codes]
    return codes, names


def _masses(columns: Any, total: int) -> dict[str, NDArray]:
    """The recorded class masses by outcome, each of shape (total,)."""
    result = {}
    for name in sorted(OUTCOMES[:_LAST]):
        if f"mass_{name}" not in columns:
            continue
        flat = np.asarray(columns[f"mass_{name}"])
        if flat.shape != (total,):
            raise InputError(
                f"mass_{name} has shape {flat.shape}, there are {total} tokens.",
                cause="Masses are recorded token by token.",
                next="Sample again, or drop the column.",
            )
        result[name] = flat
    return result


def _surprises(
    masses: dict[str, NDArray],
    r: dict[str, NDArray],
    who: NDArray,
    at: NDArray,
    last: NDArray,
    codes: NDArray,
    group: NDArray,
) -> dict[str, Any]:
    """What was recorded of class masses at the visited states."""
    token = np.flatnonzero(~(last & (r["outcome"][who] == _LAST)))  # the transition to "truncated" is no token
    place, result = (r["begin"][who] + at)[token], {}
    for name, flat in masses.items():
        mass = np.asarray(flat[place], dtype=np.float64)
        use, mass = token[np.isfinite(mass)], mass[np.isfinite(mass)]
        if mass.size and (mass.min() < 0 or mass.max() > 1 + 1e-4):  # float32 sums of a softmax stray by 1e-6
            raise InputError(
                f"mass_{name} runs from {mass.min():g} to {mass.max():g}.",
                cause="A class mass is a probability.",
                next="Sample again, or drop the column.",
            )
        mass = np.minimum(mass, 1.0)
        hit = last[use] & (r["outcome"][who[use]] == CODES[name])
        weight = r["weight"][who[use]]
        values = {"total": weight * mass, "steps": weight, "surprise": hit - mass, "variance": mass * (1 - mass)}
        keys, sums = collect([group[who[use]], codes[use]], list(values.values()))
        result[name] = keys, dict(zip(values, sums))
    return result


def _read(rolls: Any) -> dict[str, NDArray]:
    """The checked arrays of the rollouts with positive weight; `stop` is the index of the last visited state."""
    lacks = [name for name in _NEEDED if not hasattr(rolls, name)]
    if lacks:
        raise InputError(
            f"count() was given a {type(rolls).__name__}, not rollouts.",
            cause=f"It has no {lacks[0]}.",
            next="Pass Rollouts: from sample(...), read_rollouts(path), or judge(...) of these.",
        )
    offsets = np.asarray(rolls.offsets, dtype=np.int64)
    columns = getattr(rolls, "columns", {})
    tokens, begin, length = np.asarray(rolls.tokens), offsets[:-1], np.diff(offsets)
    outcome, hit, prefill = (np.asarray(getattr(rolls, k)).astype(np.int64) for k in ("outcome", "hit", "prefill"))
    weight = np.asarray(columns.get("weight", np.ones(len(begin))), dtype=np.float64)
    if len(begin) == 0:
        raise InputError("There are no rollouts.", cause="The set is empty.", next="Sample some, or check the filter.")
    _refuse(outcome == NOT_JUDGED, "is not judged", "A count needs the outcome.", 'Call judge(rolls, "lexicon") first.')
    _refuse((outcome < 0) | (outcome > _LAST), "has an unknown outcome code", "Codes are 0 to 3.", "Judge again.")
    _refuse(
        (prefill < 0) | (prefill > length),
        "has more forced tokens than tokens",
        "prefill is part of tokens.",
        "Check it.",
    )
    _refuse(
        ~np.isfinite(weight) | (weight < 0), "has a bad weight", "Weights are finite and >= 0.", "Correct the column."
    )
    cut = outcome == _LAST
    _refuse(
        ~cut & (hit >= 0) & (hit < prefill),
        "has its hit among the forced tokens",
        "The model did not choose these; only a sampled token can be a hit.",
        "Judge the sampled tokens, or lower the prefill.",
    )
    hit = np.where((outcome == CODES["benign"]) & (hit < 0), length - 1, hit)
    lost = ~cut & (hit < 0) & ~((outcome == CODES["benign"]) & (length == 0))
    _refuse(
        lost, "has an outcome but no hit", "The hit says at which token the outcome fell.", "Judge the rollouts again."
    )
    _refuse(
        hit >= np.maximum(length, 1),
        "has its hit behind its last token",
        "hit is an index into tokens.",
        "Judge again.",
    )
    _refuse(
        cut & (hit >= 0), "is truncated and has a hit", "A rollout ends in one outcome.", "Judge the rollouts again."
    )
    keep = weight > 0
    if not keep.any():
        raise InputError("All weights are zero.", cause="Nothing would be counted.", next="Correct the column weight.")
    table = {
        "prompt_id": np.asarray(rolls.prompt_id),
        "category": np.asarray(rolls.category, dtype=str),
        "prefill": prefill,
    }
    table |= {"outcome": outcome, "weight": weight, "begin": begin, "length": length}
    table["stop"] = np.where(cut, length, hit)
    return {k: v[keep] for k, v in table.items()} | {"tokens": tokens}


def _refuse(wrong: NDArray, what: str, cause: str, next: str) -> None:
    if wrong.any():
        i, n = int(np.argmax(wrong)), int(wrong.sum())
        more = f" ({n} of {len(wrong)} rollouts are like this)" if n > 1 else ""
        raise InputError(f"Rollout {i} {what}{more}.", cause=cause, next=next)
