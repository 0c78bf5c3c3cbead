"""Counts of rollouts that were added up where they were sampled: their tokens never came here."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..errors import InputError
from ..outcomes import CODES, OUTCOMES
from .counts import Counts, Table, group
from .states import KGram, map_name

__all__ = ["from_sums"]


def from_sums(sums: Any, states: Any = None) -> Counts:
    """Counts from sums by group and state.

    Parameters
    ----------
    sums : Sums
        Arrays with the names of `markovsafety.rollouts.Sums`.
    states : KGram, optional
        The map that they were added up by.

    Raises
    ------
    InputError
        If they were added up by another map, or there are no rollouts.
    """
    made = KGram(sums.order)
    if states not in (None, made):
        raise InputError(
            f"The sums are of {map_name(made)}, not of {map_name(states)}.",
            cause="What was added up on a device cannot be told apart afterwards.",
            next=f"Count with {map_name(made)}, or sample rollouts and count these.",
        )
    outcomes, S = np.asarray(sums.added.outcomes), len(sums.added.grams)
    total = outcomes.sum(axis=1)
    there = np.flatnonzero(total)
    if len(there) == 0:
        raise InputError("There are no rollouts.", cause="Nothing was added up.", next="Sample some.")
    ids, category, prefill = (np.asarray(x)[there] for x in (sums.prompt_id, sums.category, sums.prefill))
    tally, rows = group(ids, category.astype(str), prefill, outcomes[there].astype(np.float64))
    place = np.full(len(total), -1)
    place[there] = rows
    grams, entry = (np.asarray(x, dtype=np.int64) for x in (sums.added.grams, sums.entry))
    labels, number = np.unique(np.concatenate([grams, entry[there]]), axis=0, return_inverse=True)
    number = number.reshape(-1)
    move = np.concatenate([number[:S], len(labels) + np.arange(len(OUTCOMES))])
    tables = {}
    for name, columns in sums.added.tables.items():
        keys = {k: columns[k] for k in ("group", "source", "target") if k in columns}
        values = {k: np.asarray(v, dtype=np.float64) for k, v in columns.items() if k not in keys}
        target = move[keys["target"]] if "target" in keys else None
        tables[name] = Table(place[keys["group"]], move[keys["source"]], target, values)
    entries = Table(rows, number[S:], None, {"count": total[there].astype(np.float64)})
    masses = {name: tables[f"mass_{name}"] for name in sorted(CODES) if f"mass_{name}" in tables}
    names = tuple(tuple(row) for row in labels.tolist())
    return Counts(map_name(made), names, tally, tables["transitions"], entries, tables["passages"], masses)
