"""What is left of rollouts that were added up where they were sampled: arrays, which `count` turns into Counts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import InputError
from ..files import atomic
from ..outcomes import OUTCOMES

__all__ = ["Added", "Sums", "read_added", "write_added"]


@dataclass(frozen=True, eq=False)
class Added:
    """Sums over the rollouts of some groups.

    Parameters
    ----------
    grams : int32 array, shape (S, order)
        The visited states: their last tokens, oldest first, -1 before the answer began; sorted.
    outcomes : int64 array, shape (groups, 4)
        Rollouts of each group by outcome, in the order of ``OUTCOMES``.
    tables : dict of name -> dict of arrays
        ``transitions`` and ``passages`` with ``group``, ``source``, ``target`` (a state, or S plus the code of an
        outcome) and ``count``; ``mass_<outcome>`` with ``group``, ``source``, ``total``, ``steps``, ``surprise`` and
        ``variance``. They mean what they mean in `Counts`.
    info : dict
        JSON-able facts of the run, as in an engine's `Output`.
    """

    grams: np.ndarray
    outcomes: np.ndarray
    tables: dict[str, dict[str, np.ndarray]]
    info: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def empty(cls, order: int) -> Added:
        """No rollouts."""
        keys = ("group", "source", "target", "count")
        tables = {name: {key: np.zeros(0, np.int64) for key in keys} for name in ("transitions", "passages")}
        return cls(np.zeros((0, order), np.int32), np.zeros((0, len(OUTCOMES)), np.int64), tables)

    @classmethod
    def of(cls, parts: Sequence[Added], info: dict[str, Any] | None = None) -> Added:
        """One of several, over the same groups; rows with equal keys are left beside each other."""
        if len(parts) == 1:
            return cls(parts[0].grams, parts[0].outcomes, parts[0].tables, info or parts[0].info)
        grams, place = np.unique(np.concatenate([p.grams for p in parts]), axis=0, return_inverse=True)
        at, moved = 0, []
        for part in parts:
            old = len(part.grams)
            number = np.concatenate([place.reshape(-1)[at : at + old], len(grams) + np.arange(len(OUTCOMES))])
            at += old
            moved.append(
                {
                    name: {key: number[x] if key in ("source", "target") else x for key, x in table.items()}
                    for name, table in part.tables.items()
                }
            )
        names = dict.fromkeys(name for tables in moved for name in tables)
        tables = {n: {k: np.concatenate([t[n][k] for t in moved if n in t]) for k in _columns(moved, n)} for n in names}
        return cls(grams, np.sum([p.outcomes for p in parts], axis=0), tables, info or {})

    def within(self, groups: int, first: int) -> Added:
        """The same sums where the groups are those from `first` on, of `groups` in all."""
        outcomes = np.zeros((groups, len(OUTCOMES)), np.int64)
        outcomes[first : first + len(self.outcomes)] = self.outcomes
        tables = {name: {**table, "group": table["group"] + first} for name, table in self.tables.items()}
        return Added(self.grams, outcomes, tables, self.info)


def _columns(tables: Sequence[dict[str, dict[str, np.ndarray]]], name: str) -> list[str]:
    return list(next(t[name] for t in tables if name in t))


@dataclass(frozen=True, eq=False)
class Sums:
    """Rollouts added up by prompt, category, prefill and state: what `tally` returns and `count` takes.

    Parameters
    ----------
    order : int
        Tokens in a state, as in ``KGram(order)``.
    prompt_id : int64 array, shape (groups,)
    category : object array of str, shape (groups,)
    prefill : int32 array, shape (groups,)
    entry : int32 array, shape (groups, order)
        The state after the forced tokens.
    added : Added
    provenance : dict
        As that of `Rollouts`.
    info : dict
        ``sampled_tokens``, ``fetched_bytes`` (what left the device), ``seconds``: of what was sampled by this call.

    Examples
    --------
    >>> model, asked = ms.organism.model_path("shallow"), ms.organism.prompts(n=2)
    >>> ask = dict(judge="organism", n=8, max_tokens=16, prefill=[0, 5])
    >>> sums = ms.rollouts.tally(model, asked, ms.KGram(1), **ask)
    >>> sums
    <Sums of order 1: 32 rollouts (... harm + ... refusal + ... benign + ... truncated); ...
        states>
    >>> sums.prompt_id, sums.prefill
    (array([0, 0, 1, 1]), array([0, 5, 0, 5], dtype=int32))
    """

    order: int
    prompt_id: np.ndarray
    category: np.ndarray
    prefill: np.ndarray
    entry: np.ndarray
    added: Added
    provenance: dict[str, Any] = field(default_factory=dict)
    info: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        """Number of rollouts."""
        return int(self.added.outcomes.sum())

    def __repr__(self) -> str:
        told = " + ".join(f"{n} {name}" for n, name in zip(self.added.outcomes.sum(axis=0), OUTCOMES))
        return f"<Sums of order {self.order}: {len(self)} rollouts ({told}); {len(self.added.grams)} states>"


def write_added(added: Added, path: Path) -> None:
    """Write sums to an .npz file that is whole or not there."""
    arrays: dict[str, Any] = {f"{name}.{key}": x for name, table in added.tables.items() for key, x in table.items()}
    arrays |= {"grams": added.grams, "outcomes": added.outcomes, "info": np.array(json.dumps(added.info))}
    with atomic(path) as part, part.open("wb") as file:
        np.savez(file, **arrays)


def read_added(path: Path, rollouts: int) -> Added:
    """Read what `write_added` wrote.

    Raises
    ------
    InputError
        The file is damaged, or holds another number of rollouts.
    """
    try:
        # numpy leaves a file open that it was given by name and cannot read
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
            arrays = dict(file)
        grams, outcomes, info = arrays.pop("grams"), arrays.pop("outcomes"), json.loads(str(arrays.pop("info")[()]))
        tables: dict[str, dict[str, np.ndarray]] = {}
        for name, x in arrays.items():
            table, _, key = name.partition(".")
            tables.setdefault(table, {})[key] = x
        if int(outcomes.sum()) == rollouts:
            return Added(grams, outcomes, tables, info)
        cause = f"it has {int(outcomes.sum())} rollouts instead of {rollouts}"
    except Exception as error:  # zipfile and numpy raise errors of many kinds for a broken archive
        cause = str(error)
    raise InputError(f"{path} is damaged", cause=cause, next="delete it and call again: it is sampled anew")
