"""What the graph alone decides: who can reach the target, which states form a cycle, in which order to solve.

Everything here looks at the pattern of positive rates only, so its answers are exact: a probability that the graph says
is 0 or 1 never meets floating point. One search cuts the states into strongly connected classes, sinks first; whatever
a state can come to is then known before the state itself, so who can hit and who can miss needs one pass in this order
and no transposed matrix."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from . import graph_kernels as kernels

__all__ = [
    "Decided",
    "Order",
    "Plan",
    "closed_classes",
    "decided",
    "index_type",
    "order_of",
    "plan",
    "reachable",
    "reaching",
    "slices",
]

KEPT = 4  # orders kept per chain; one for most chains, whose outcomes never move
SWEEPS, STEPS = 40, 1000  # how long a class that holds most states is looked for, and how long a walk hints at one


@dataclass(frozen=True)
class Plan:
    """An order in which every state comes after all states it can move to, cycles apart.

    Attributes
    ----------
    levels : list of (single, cyclic)
        `single`, an int array: states that are on no cycle and need only earlier levels and earlier states of the
        array; `cyclic`, a list of sorted int arrays: strongly connected classes (two states or more) that need only
        earlier levels and the `single` of this one.
    """

    levels: list[tuple[NDArray[np.integer], list[NDArray[np.integer]]]]

    @property
    def cyclic(self) -> list[NDArray[np.integer]]:
        """All classes with a cycle, first solved first."""
        return [c for _, classes in self.levels for c in classes]

    @property
    def n_single(self) -> int:
        """Number of states that are on no cycle."""
        return sum(len(single) for single, _ in self.levels)


@dataclass(frozen=True)
class Order:
    """Some states, class by class, every class behind all classes that it can move to.

    Attributes
    ----------
    sequence : int array, shape (m,)
    first : int array, shape (classes + 1,)
        Where every class begins in the sequence, and its end.
    """

    sequence: NDArray[np.integer]
    first: NDArray[np.integer]

    @property
    def cyclic(self) -> bool:
        """Whether any class has two states or more."""
        return len(self.first) - 1 < len(self.sequence)


def _by_stage(part: NDArray, stage: NDArray, depth: int) -> list[NDArray]:
    """The parts with stage 0 .. depth - 1, each in the given order."""
    ends = np.cumsum(np.bincount(stage, minlength=depth))[:-1]
    return np.split(part[np.argsort(stage, kind="stable")], ends)


@dataclass(frozen=True)
class Decided:
    """What the graph says of a hitting problem.

    Attributes
    ----------
    can : bool array, shape (n,)
        States from which the target can be hit, target included.
    sure : bool array, shape (n,)
        Moving states from which nothing else can happen.
    order : Order
        Of all states whose rows are read.
    level : int array, shape (n,)
        States on the longest way from each state to one that does not move; if there are cycles, cyclic classes only.
    """

    can: NDArray[np.bool_]
    sure: NDArray[np.bool_]
    order: Order
    level: NDArray[np.integer]

    @property
    def levels(self) -> int:
        """The largest level."""
        return int(self.level.max(initial=0))

    def plan(self, free: NDArray[np.bool_]) -> Plan:
        """An order to solve some of the states in, a union of classes."""
        sequence, first = self.order.sequence, self.order.first
        if not self.order.cyclic:
            some = sequence[free[sequence]]
            return Plan([(some, [])] if some.size else [])
        size = np.diff(first)
        single = sequence[first[:-1][size == 1]]
        single = single[free[single]]
        start = np.flatnonzero(size > 1)
        start = start[free[sequence[first[start]]]]
        # A cyclic class counts itself, so that states of its level come after it, and before the next class.
        level, behind = self.level[single], self.level[sequence[first[start]]] - 1
        used, place = np.unique(np.concatenate([level, behind]), return_inverse=True)
        singles = _by_stage(single, place[: len(single)], len(used))
        classes = _by_stage(start, place[len(single) :], len(used))
        members = lambda c: sequence[first[c] : first[c + 1]]  # noqa: E731
        return Plan([(one, [members(c) for c in many]) for one, many in zip(singles, classes)])


def index_type(*sizes: int) -> type[np.signedinteger[Any]]:
    """The smallest integer type of a sparse matrix's indices that holds all the sizes."""
    return np.int32 if max(sizes) <= np.iinfo(np.int32).max else np.int64


def slices(indptr: NDArray, rows: NDArray) -> NDArray[np.intp]:
    """Positions ``indptr[r] .. indptr[r + 1] - 1`` of all `rows`, one after the other."""
    start, length = indptr[rows], np.diff(indptr)[rows]
    before = np.cumsum(length) - length
    return np.repeat(start - before, length) + np.arange(length.sum())


def order_of(W: sp.csr_array, rows: NDArray[np.bool_]) -> Order:
    """Strongly connected classes of the marked states, sinks first, each sorted; only their rows are read."""
    kind = index_type(len(rows) + 2)
    for goes, turn in ((kernels.goes_up, -1), (kernels.goes_down, 1)):  # most acyclic chains are numbered in order
        if goes(W.indptr, W.indices, rows):
            sequence = np.flatnonzero(rows)[::turn].astype(kind)
            return Order(sequence, np.arange(len(sequence) + 1, dtype=kind))
    return _around_giant(W, rows) or _searched(W, rows)


def _searched(W: sp.csr_array, rows: NDArray[np.bool_]) -> Order:
    """By depth-first search."""
    n, m = len(rows), int(np.count_nonzero(rows))
    kind = index_type(n + 2)
    sequence, first = np.empty(m, dtype=kind), np.empty(m + 1, dtype=kind)
    path, born, waiting = (np.empty(m, dtype=kind) for _ in range(3))
    at = np.empty(m, dtype=W.indptr.dtype)
    low = np.zeros(n, dtype=kind)
    classes = kernels.components(W.indptr, W.indices, rows, low, sequence, first, path, born, at, waiting)
    first = first[: classes + 1].copy()
    for c in np.flatnonzero(np.diff(first) > 1):
        sequence[first[c] : first[c + 1]].sort()
    return Order(sequence, first)


def _around_giant(W: sp.csr_array, rows: NDArray[np.bool_]) -> Order | None:
    """The order where one class holds most states; sweeps over the matrix find it faster than a depth-first search.

    None if a walk ends soon, which hints at few cycles, or the sweeps do not come to an end, or find no such class.
    """
    marked = np.flatnonzero(rows)
    root = int(marked[len(marked) // 2])
    moves = W.indptr[root + 1] > W.indptr[root]
    if not moves or not kernels.survives(W.indptr, W.indices, rows, root, STEPS):
        return None
    back, on = np.zeros(len(rows), dtype=bool), np.zeros(len(rows), dtype=bool)
    back[root] = on[root] = True
    found = kernels.sweep_back(W.indptr, W.indices, rows, back, SWEEPS, len(marked) // 2)
    if not found or not kernels.sweep_on(W.indptr, W.indices, rows, on, np.zeros_like(on), SWEEPS):
        return None
    giant = back & on
    if 2 * np.count_nonzero(giant) < len(marked):
        return None
    # What cannot come to the giant is before it, what can and is not in it behind it.
    before, behind = _searched(W, rows & ~back), _searched(W, back & ~on)
    own = np.flatnonzero(giant).astype(before.sequence.dtype)
    ends = behind.first + (before.first[-1] + len(own))
    return Order(np.concatenate([before.sequence, own, behind.sequence]), np.concatenate([before.first, ends]))


def _labelled(W: sp.csr_array, order: Order, target: NDArray[np.bool_]) -> NDArray[np.integer]:
    """`kernels.label` for a target and any other way to end."""
    code = np.where(target, kernels.CAN | kernels.DONE, kernels.MISS | kernels.DONE)
    code = code.astype(index_type(8 * (len(target) + 2)))
    code[order.sequence] = 0
    kernels.label(W.indptr, W.indices, order.sequence, order.first, code, not order.cyclic)
    return code


def decided(
    W: sp.csr_array, target: NDArray[np.bool_], moving: NDArray[np.bool_], memo: dict[Any, Any] | None = None
) -> Decided:
    """Who can hit, who must, and an order to solve in.

    Parameters
    ----------
    W : sparse array, shape (n, n)
        Positive entries are possible moves.
    target, moving : bool array, shape (n,)
        Where the walk ends with a hit, and the states whose rows are read; disjoint. Any other state stays where it is.
    memo : dict, optional
        Keeps the order for the next question about the same rows.
    """
    rows = moving & (np.diff(W.indptr) > 0)
    kept = {} if memo is None else memo.setdefault("orders", {})
    key = np.packbits(rows).tobytes()
    order = kept.get(key)
    if order is None:
        order = order_of(W, rows)
        while len(kept) >= KEPT:
            del kept[next(iter(kept))]
        kept[key] = order
    return _decided(W, order, target, moving)


def _decided(W: sp.csr_array, order: Order, target: NDArray, moving: NDArray) -> Decided:
    code = _labelled(W, order, target)
    can = (code & kernels.CAN) > 0
    return Decided(can, can & ((code & kernels.MISS) == 0) & moving, order, code >> 3)


def reaching(W: sp.csr_array, target: NDArray[np.bool_], moving: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """States from which the target can be reached, target included.

    Parameters
    ----------
    W : sparse array, shape (n, n)
        Positive entries are possible moves.
    target, moving : bool array, shape (n,)
        Only rows of `moving` states are read; any other state stays where it is.

    Returns
    -------
    bool array, shape (n,)
    """
    order = order_of(W, moving & ~target)
    return (_labelled(W, order, target) & kernels.CAN) > 0


def reachable(W: sp.csr_array, seeds: NDArray[np.bool_], moving: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """States that can be reached from the seeds, seeds included; only rows of `moving` states are read."""
    found = seeds.copy()
    kernels.spread(W.indptr, W.indices, moving, found, np.empty(len(seeds), dtype=index_type(len(seeds))))
    return found


def closed_classes(W: sp.csr_array) -> NDArray[np.bool_]:
    """States of classes that are never left (an absorbing state is a class of one)."""
    order = order_of(W, np.ones(len(W.indptr) - 1, dtype=bool))
    closed = np.ones(len(W.indptr) - 1, dtype=bool)
    kernels.leaving(W.indptr, W.indices, order.sequence, order.first, closed)
    return closed


def plan(W: sp.csr_array, free: NDArray[np.bool_]) -> Plan:
    """Order the free states by strongly connected classes, sinks first.

    Parameters
    ----------
    W : sparse array, shape (n, n)
    free : bool array, shape (n,)
        The unknown states; all others count as known.
    """
    return _decided(W, order_of(W, free), ~free, free).plan(free)
