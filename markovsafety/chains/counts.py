"""Counts: how often rollouts went from state to state, kept by prompt so that they can be added, split, resampled."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from ..errors import InputError
from ..outcomes import OUTCOMES
from ..rich import few, shown
from .checks import freeze
from .tally import Tally, collect

__all__ = ["Counts", "Table", "canonical", "group"]


@dataclass(frozen=True, eq=False)
class Table:
    """Sums over (group, state[, state]): a sparse table in coordinate form, sorted, without duplicates.

    Parameters
    ----------
    group : int array, shape (m,)
        Row of the tally: which prompt, category and prefill.
    source : int array, shape (m,)
        State index.
    target : int array, shape (m,) or None
        State index, or number of states plus outcome code.
    values : dict of str to array of shape (m,)
    """

    group: NDArray
    source: NDArray
    target: NDArray | None
    values: dict[str, NDArray]

    def __post_init__(self):
        keys = [self.group, self.source] + ([] if self.target is None else [self.target])
        keys, sums = collect(keys, list(self.values.values()))
        for name, key in zip(("group", "source", "target"), keys):
            object.__setattr__(self, name, freeze(key))
        object.__setattr__(self, "values", {name: freeze(v) for name, v in zip(self.values, sums)})

    @property
    def count(self) -> NDArray:
        """The weighted counts, shape (m,)."""
        return self.values["count"]

    def moved(self, groups: NDArray, states: NDArray) -> Table:
        """The same sums under other numbers for groups and states; rows whose group becomes -1 are dropped."""
        keep = groups[self.group] >= 0
        target = None if self.target is None else states[self.target[keep]]
        values = {name: v[keep] for name, v in self.values.items()}
        return Table(groups[self.group[keep]], states[self.source[keep]], target, values)

    def __add__(self, other: Table) -> Table:
        both = lambda a, b: np.concatenate([a, b])  # noqa: E731
        target = None if self.target is None or other.target is None else both(self.target, other.target)
        values = {name: both(v, other.values[name]) for name, v in self.values.items()}
        return Table(both(self.group, other.group), both(self.source, other.source), target, values)


@dataclass(frozen=True, eq=False)
class Counts:
    """Transition counts by prompt. Counts of shards add up with ``+`` (and `sum`) to the counts of the whole.

    Parameters
    ----------
    kind : str
        Name of the state map; only counts of one kind are added.
    states : tuple
        Labels of the S visited transient states, sorted.
    tally : Tally
        Raw rollouts by group (prompt, category, prefill) and outcome.
    transitions : Table
        Weighted counts by (group, source, target); targets S, S + 1, S + 2, S + 3 are harm, refusal, benign, truncated.
    entries : Table
        Weighted number of rollouts by (group, source) where source is the state after the forced tokens.
    passages : Table
        Weighted number of distinct rollouts by (group, source, target): those that passed through the state at least
        once, and the outcome (S to S + 3) they ended in. A rollout that stays 200 tokens in a state is one trial of
        what happens from there, not 200.
    mass : dict of str to Table
        By outcome with a recorded class mass, over (group, source): ``total`` (weighted sum of the probability of the
        class), ``steps`` (weighted number of tokens with a recorded mass), and, unweighted, ``surprise`` (hits minus
        mass) and ``variance`` (sum of m (1 - m)), which tell whether a hit of that outcome is the event "a token of the
        class is sampled".

    Examples
    --------
    Two shards of a run are counted apart, and added:

    >>> asked = {"prompt_id": [0, 1], "outcome": ["harm", "refusal"], "hit": 1}
    >>> shards = [[5, 9], [7, 2]], [[5, 6], [5, 2]]
    >>> one, two = (ms.count(ms.Rollouts.of(said, **asked)) for said in shards)
    >>> one + two
    <Counts KGram(2): 4 rollouts (2 harm + 2 refusal + 0 benign + 0 truncated) of 2 prompts,
        prefill 0; 3 states, 8 transitions>
    >>> (one + two).select(prompts=0)
    <Counts KGram(2): 2 rollouts (2 harm + 0 refusal + 0 benign + 0 truncated) of 1 prompts,
        prefill 0; 2 states, 4 transitions>
    """

    kind: str
    states: tuple[Any, ...]
    tally: Tally
    transitions: Table
    entries: Table
    passages: Table
    mass: dict[str, Table] = field(default_factory=dict)

    @cached_property
    def matrix(self) -> sp.csr_array:
        """Counts over all groups, shape (S, S + 4); the last columns are the outcomes."""
        t, S = self.transitions, len(self.states)
        matrix = sp.csr_array(sp.coo_array((t.count, (t.source, t.target)), shape=(S, S + len(OUTCOMES))))
        matrix.sum_duplicates()
        return freeze(matrix)

    @property
    def visits(self) -> NDArray:
        """Weighted visits of every transient state, shape (S,)."""
        return np.bincount(self.transitions.source, self.transitions.count, len(self.states))

    @cached_property
    def entry(self) -> dict[int, NDArray]:
        """State law after k forced tokens, shape (S + 4,), for every measured k."""
        e, laws = self.entries, {}
        for k in np.unique(self.tally.prefill).tolist():
            rows = self.tally.prefill[e.group] == k
            law = np.bincount(e.source[rows], e.count[rows], len(self.states) + len(OUTCOMES))
            laws[k] = freeze(law / law.sum())
        return laws

    @property
    def rollouts(self) -> float:
        """Weighted number of rollouts."""
        return float(self.tally.outcomes.sum())

    @property
    def prompts(self) -> int:
        """Number of prompts."""
        return len(self.tally.clusters(prefill=None)[0])

    @property
    def categories(self) -> tuple[str, ...]:
        """The prompt categories, sorted."""
        return tuple(np.unique(self.tally.category).tolist())

    @property
    def prefills(self) -> tuple[int, ...]:
        """The measured prefill lengths, sorted."""
        return tuple(np.unique(self.tally.prefill).tolist())

    def select(self, *, categories: Any = None, prefill: Any = None, prompts: Any = None) -> Counts:
        """Counts of some rollouts only; each filter is a value or several, all given ones must match.

        Raises
        ------
        InputError
            If a value occurs in no rollout, or no rollout matches all filters.
        """
        mask = self.tally.where(categories, prefill, prompts)
        if not mask.any():
            raise InputError(
                "No rollout matches all filters.", cause="They exclude each other.", next="Relax one of them."
            )
        groups = np.where(mask, np.cumsum(mask) - 1, -1)
        t = self.tally
        tally = Tally(t.prompt_id[mask], t.category[mask], t.prefill[mask], t.outcomes[mask])
        used = np.unique(self.transitions.source[mask[self.transitions.group]])
        return self._moved(groups, tally, tuple(self.states[i] for i in used), _renumber(used, len(self.states)))

    def _moved(self, groups: NDArray, tally: Tally, states: tuple[Any, ...], old_to_new: NDArray) -> Counts:
        outcome = len(states) + np.arange(len(OUTCOMES))
        numbers = np.concatenate([old_to_new, outcome]).astype(np.int64)
        move = lambda table: table.moved(groups, numbers)  # noqa: E731
        mass = {name: move(table) for name, table in self.mass.items()}
        tables = move(self.transitions), move(self.entries), move(self.passages)
        return Counts(self.kind, states, tally, *tables, mass)

    def __add__(self, other: Counts) -> Counts:
        if not isinstance(other, Counts):
            return NotImplemented
        if self.kind != other.kind:
            raise InputError(
                f"Counts of {self.kind} and of {other.kind} cannot be added.",
                cause="Their states mean different things.",
                next="Count all rollouts with one state map.",
            )
        states = canonical({*self.states, *other.states})
        lookup = {label: i for i, label in enumerate(states)}
        tally, numbers = _join(self.tally, other.tally)
        a, b = (
            part._moved(rows, tally, states, np.array([lookup[x] for x in part.states], dtype=np.int64))
            for part, rows in ((self, numbers[: len(self.tally)]), (other, numbers[len(self.tally) :]))
        )
        mass = dict(sorted((a.mass | b.mass).items()))
        mass |= {name: a.mass[name] + b.mass[name] for name in a.mass.keys() & b.mass.keys()}
        tables = {name: getattr(a, name) + getattr(b, name) for name in ("transitions", "entries", "passages")}
        return replace(a, **tables, mass=mass)

    def __radd__(self, other: Any) -> Counts:
        """Let ``sum(shards)`` work, which begins at 0."""
        return self if isinstance(other, int) and other == 0 else NotImplemented

    def equals(self, other: Counts, rtol: float = 0.0) -> bool:
        """Whether both hold the same states, groups and, up to a relative rounding of sums, the same numbers."""
        if (self.kind, self.states, list(self.mass)) != (other.kind, other.states, list(other.mass)):
            return False
        pairs = zip(_arrays(self), _arrays(other))
        return all(
            x.shape == y.shape and (np.allclose(x, y, rtol, rtol) if x.dtype.kind == "f" else bool(np.all(x == y)))
            for x, y in pairs
        )

    def __repr__(self) -> str:
        return (
            f"<Counts {self.kind}: {self.tally.told} of {self.prompts} prompts, "
            f"prefill {', '.join(map(str, self.prefills))}; {len(self.states)} states, "
            f"{self.transitions.count.sum():g} transitions>"
        )

    def _repr_html_(self) -> str:
        """What a notebook shows: rollouts by forced tokens and outcome, and the size of the table of transitions."""
        depths = list(self.prefills)
        which, more = few(len(depths))
        at = [self.tally.outcomes[self.tally.prefill == depths[i]].sum(axis=0) for i in which]
        rows = [(depths[i], *(f"{x:,g}" for x in sums)) for i, sums in zip(which, at)]
        size = f"{len(self.states):,} states, {self.transitions.count.sum():,g} transitions"
        title = f"Counts by {self.kind}: {self.rollouts:,g} rollouts of {self.prompts:,} prompts"
        return shown(title, rows, head=["forced tokens", *OUTCOMES], notes=[more, size])


def _arrays(counts: Counts) -> list[NDArray]:
    arrays = list(vars(counts.tally).values())
    for table in (counts.transitions, counts.entries, counts.passages, *counts.mass.values()):
        arrays += [table.group, table.source, *([] if table.target is None else [table.target]), *table.values.values()]
    return arrays


def _renumber(used: NDArray, size: int) -> NDArray:
    numbers = np.full(size, -1, dtype=np.int64)
    numbers[used] = np.arange(len(used))
    return numbers


def _join(a: Tally, b: Tally) -> tuple[Tally, NDArray]:
    """One tally of both, and the row in it of every row of a, then of b."""
    prompt_id, category, prefill, outcomes = (
        np.concatenate([getattr(a, name), getattr(b, name)])
        for name in ("prompt_id", "category", "prefill", "outcomes")
    )
    return group(prompt_id, category, prefill, outcomes)


def group(prompt_id: NDArray, category: NDArray, prefill: NDArray, outcomes: NDArray) -> tuple[Tally, NDArray]:
    """Tally of rollouts (or of rows of tallies), and the row each of them went to."""
    columns = [np.unique(c, return_inverse=True) for c in (prompt_id, category, prefill)]
    keys, (sums,) = collect([inverse.reshape(-1) for _, inverse in columns], [outcomes])
    ids, kinds, forced = (values[key] for (values, _), key in zip(columns, keys))
    size = [len(values) for values, _ in columns]
    # Rows of the tally are sorted by key, so a search finds the row of every rollout without a dictionary.
    flat = lambda k: (k[0] * size[1] + k[1]) * size[2] + k[2]  # noqa: E731
    row = np.searchsorted(flat(keys), flat([inverse.reshape(-1) for _, inverse in columns]))
    return Tally(ids, kinds, forced, sums), row


def canonical(labels: Any) -> tuple[Any, ...]:
    """Labels in an order that depends on nothing but the set of them."""
    labels = list(labels)
    try:
        return tuple(sorted(labels))
    except TypeError:
        return tuple(sorted(labels, key=_rank))


def _rank(label: Any) -> Any:
    if isinstance(label, tuple):
        return (2, tuple(_rank(x) for x in label))
    if isinstance(label, (bool, int, float)):
        return (0, label)
    return (1, f"{type(label).__name__} {label}")
