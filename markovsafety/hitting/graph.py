"""What the graph alone decides: who can reach the target, which states form a cycle, in which order to solve.

Everything here looks at the pattern of positive rates only, so its answers are exact: a probability that the graph says
is 0 or 1 never meets floating point."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray
from scipy.sparse import csgraph

__all__ = ["Plan", "closed_classes", "plan", "reachable", "reaching", "slices"]


@dataclass(frozen=True)
class Plan:
    """An order in which every state comes after all states it can move to, cycles apart.

    Attributes
    ----------
    levels : list of (single, cyclic)
        `single`, an int array: states that are on no cycle and need only earlier levels; `cyclic`, a list of int
        arrays: the strongly connected classes (two states or more) of this level.
    """

    levels: list[tuple[NDArray[np.intp], list[NDArray[np.intp]]]]

    @property
    def cyclic(self) -> list[NDArray[np.intp]]:
        """All classes with a cycle, first solved first."""
        return [c for _, classes in self.levels for c in classes]

    @property
    def n_single(self) -> int:
        """Number of states that are on no cycle."""
        return sum(len(single) for single, _ in self.levels)


def slices(indptr: NDArray, rows: NDArray) -> NDArray[np.intp]:
    """Positions ``indptr[r] .. indptr[r + 1] - 1`` of all `rows`, one after the other."""
    start, length = indptr[rows], np.diff(indptr)[rows]
    before = np.cumsum(length) - length
    return np.repeat(start - before, length) + np.arange(length.sum())


def _kept(W: sp.csr_array, rows: NDArray[np.bool_]) -> sp.csr_array:
    """The pattern of W with only the given rows left, as ones."""
    length = np.where(rows, np.diff(W.indptr), 0)
    keep = np.repeat(rows, np.diff(W.indptr))
    indptr = np.concatenate([[0], np.cumsum(length)])
    return sp.csr_array((np.ones(int(indptr[-1])), W.indices[keep], indptr), shape=W.shape)


def _spread(pattern: sp.csr_array, seeds: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The states that can be reached along the pattern from the seeds, seeds included."""
    n = len(seeds)
    hub = sp.csr_array(seeds[None, :].astype(float))
    graph = sp.vstack([sp.hstack([pattern, sp.csr_array((n, 1))]), sp.hstack([hub, sp.csr_array((1, 1))])]).tocsr()
    order = csgraph.breadth_first_order(graph, n, directed=True, return_predecessors=False)
    found = np.zeros(n + 1, dtype=bool)
    found[order] = True
    return found[:n]


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
    return _spread(_kept(W, moving).T.tocsr(), target)


def reachable(W: sp.csr_array, seeds: NDArray[np.bool_], moving: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """States that can be reached from the seeds, seeds included; only rows of `moving` states are read."""
    return _spread(_kept(W, moving), seeds)


def closed_classes(W: sp.csr_array) -> NDArray[np.bool_]:
    """States of classes that are never left (an absorbing state is a class of one)."""
    count, label = csgraph.connected_components(W, directed=True, connection="strong")
    row = np.repeat(label, np.diff(W.indptr))
    leaves = np.zeros(count, dtype=bool)
    leaves[row[row != label[W.indices]]] = True
    return ~leaves[label]


def plan(W: sp.csr_array, free: NDArray[np.bool_]) -> Plan:
    """Order the free states by strongly connected classes, sinks first (Tarjan's classes, Kahn's layers).

    Parameters
    ----------
    W : sparse array, shape (n, n)
    free : bool array, shape (n,)
        The unknown states; all others count as known.
    """
    states = np.flatnonzero(free)
    if states.size == 0:
        return Plan([])
    A = W[states][:, states].tocsr()
    count, label = csgraph.connected_components(A, directed=True, connection="strong")
    members = np.argsort(label, kind="stable")
    size = np.bincount(label, minlength=count)
    first = np.concatenate([[0], np.cumsum(size)])
    head, tail = np.repeat(label, np.diff(A.indptr)), label[A.indices]
    across = head != tail
    head, tail = head[across], tail[across]
    waiting = np.bincount(head, minlength=count)
    into = sp.csr_array((np.ones(len(head), dtype=np.int8), (tail, np.arange(len(head)))), shape=(count, len(head)))
    levels = []
    front = np.flatnonzero(waiting == 0)
    while front.size:
        single = members[first[front[size[front] == 1]]]
        cyclic = [states[members[first[c] : first[c + 1]]] for c in front[size[front] > 1]]
        levels.append((states[single], cyclic))
        heads, times = np.unique(head[into.indices[slices(into.indptr, front)]], return_counts=True)
        waiting[heads] -= times
        front = heads[waiting[heads] == 0]
    return Plan(levels)
