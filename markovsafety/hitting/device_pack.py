"""Patterns for the device: which entries are read, in which order, packed so that one step is a few dense gathers.

The unknown nodes of a walk are states, or (layer, state) pairs. They are cut into *steps* of up to `width` nodes that
read only nodes of earlier steps (one step for everything if there is a cycle), and numbered by step and lane. Entries
are stored transposed (ELL), ``(steps, k, width)``: unrolled over k, every gather is as wide as a step. What rows have
beyond k entries goes to a list of its own, so that one long row does not pad all others."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from . import batch_kernels, graph, layered
from .core import Walk

__all__ = ["Ell", "Pattern", "bucket", "pack", "pattern"]

SPILL = 8  # what an entry outside the columns of an ELL costs, in entries


def bucket(n: int) -> int:
    """The next of 1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, ...: shapes that compiled programs are kept for."""
    unit = 1 << max((n - 1).bit_length() - 3, 0)
    return max(-(-n // unit) * unit, 1)


@dataclass(frozen=True)
class Ell:
    """Entries by step and lane.

    Attributes
    ----------
    source, col : int32 arrays, shape (steps, k, width)
        Where an entry is stored, and the slot it reads; where there is none, the number of entries and the zero slot.
    tail_source, tail_row, tail_col : int32 arrays, shape (steps, q)
        The entries beyond k, with their lane.
    """

    source: NDArray[np.int32]
    col: NDArray[np.int32]
    tail_source: NDArray[np.int32]
    tail_row: NDArray[np.int32]
    tail_col: NDArray[np.int32]


def pack(row: NDArray, col: NDArray, source: NDArray, steps: int, width: int, nnz: int) -> Ell:
    """Pack entries by the slot of their row (any order); slot ``steps * width`` is the zero slot."""
    order = np.argsort(row, kind="stable")
    row, col, source = row[order], col[order], source[order]
    count = np.bincount(row, minlength=steps * width)
    place = np.arange(len(row)) - (np.cumsum(count) - count)[row]
    beyond = np.cumsum(np.bincount(count)[::-1])[::-1]  # rows with at least c entries
    spilled = np.cumsum(beyond[1:][::-1])[::-1]  # entries beyond the first c, for c = 0, 1, ...
    cost = np.arange(len(spilled) + 1) * steps * width + SPILL * np.append(spilled, 0)
    k = bucket(max(int(np.argmin(cost)), 1))
    step, lane, tail = row // width, row % width, place >= k
    ell = [np.full((steps, k, width), fill, dtype=np.int32) for fill in (nnz, steps * width)]
    for out, values in zip(ell, (source, col)):
        out[step[~tail], place[~tail], lane[~tail]] = values[~tail]
    many = np.bincount(step[tail], minlength=steps)
    at = np.arange(int(tail.sum())) - (np.cumsum(many) - many)[step[tail]]
    q = bucket(int(many.max())) if tail.any() else 0
    rest = [np.full((steps, q), fill, dtype=np.int32) for fill in (nnz, 0, steps * width)]
    for out, values in zip(rest, (source, lane, col)):
        out[step[tail], at] = values[tail]
    return Ell(*ell, *rest)


@dataclass(frozen=True)
class Pattern:
    """What a hitting problem reads, independent of the numbers.

    Attributes
    ----------
    shape : tuple
        Of the answer: (n,) or (L + 1, n).
    nnz : int
        Stored entries, diagonal included; layered chains: those of all layers, concatenated.
    implied : bool
        Whether rows are divided by the sum of their entries (homogeneous chains: the diagonal is implied).
    cyclic : bool
    steps, width : int
    slot : int array, shape (N,)
        Slot of every node: its number, or ``steps * width`` where the answer is 0, one more where it is 1.
    row, col : int array, shape (nnz,)
        Slots of every stored entry; the row is ``steps * width`` where the entry is not read.
    roundings : int array, shape (N,)
        Roundings that a substitution makes for each node at most.
    level : list of int arrays
        Unknown nodes by level, for substitution; empty if cyclic.
    """

    shape: tuple[int, ...]
    nnz: int
    implied: bool
    cyclic: bool
    steps: int
    width: int
    slot: NDArray[np.intp]
    row: NDArray[np.intp]
    col: NDArray[np.intp]
    roundings: NDArray[np.int64]
    level: tuple[NDArray[np.intp], ...]

    @property
    def size(self) -> int:
        """Number of slots for unknowns."""
        return self.steps * self.width

    @cached_property
    def forward(self) -> Ell:
        """Rows by slot: what a node is computed from."""
        read = np.flatnonzero(self.row < self.size)
        return pack(self.row[read], self.col[read], read, self.steps, self.width, self.nnz)

    @cached_property
    def back(self) -> Ell:
        """Columns by slot: who reads a node, for transposed solves; the steps then run backwards."""
        read = np.flatnonzero((self.row < self.size) & (self.col < self.size))
        return pack(self.col[read], self.row[read], read, self.steps, self.width, self.nnz)


def pattern(w: Walk) -> Pattern:
    """The pattern of a walk: unknown are the states from which the hit can be reached."""
    chain = w.chain
    n, P = chain.n_states, chain.layers
    nnz = sum(p.nnz for p in P)
    length = np.concatenate([np.diff(p.indptr) for p in P])
    row = np.repeat(np.arange(len(length)), length)
    col = np.concatenate([p.indices + (t + 1) * n * chain.is_layered for t, p in enumerate(P)])
    if chain.is_layered:
        last = w.last(1)[:, 0] > 0
        live = layered.reaching_layers(P, w.hit, w.avoid, last)
        unknown = live & w.moving
        one = np.broadcast_to(w.hit, live.shape).copy()
        unknown[-1], one[-1] = False, last
        unknown, one = unknown.ravel(), one.ravel()
        level = [t * n + np.flatnonzero(unknown[t * n : t * n + n]) for t in range(len(P) - 1, -1, -1)]
        used, cyclic = unknown[row], False
    else:
        off = row != col
        W = sp.csr_array((np.ones(int(off.sum())), (row[off], col[off])), shape=(n, n))
        unknown, one = graph.reaching(W, w.hit, w.moving) & w.moving, w.hit
        order = graph.plan(W, unknown)
        cyclic, level = bool(order.cyclic), []
        if not cyclic and unknown.any():
            sequence, height = np.concatenate([single for single, _ in order.levels]), np.full(n, -1)
            batch_kernels.levels(W.indptr, W.indices, sequence, height)
            stage = np.argsort(height[sequence], kind="stable")
            level = np.split(sequence[stage], np.cumsum(np.bincount(height[sequence]))[:-1])
        used = off & unknown[row]
    level = [x for x in level if x.size] if not cyclic else []
    many = np.bincount(row[used], minlength=len(unknown))
    return _numbered(w, level, unknown, one, used, row, col, nnz, many, cyclic)


def _numbered(w, level, unknown, one, used, row, col, nnz, many, cyclic) -> Pattern:
    groups = [np.flatnonzero(unknown)] if cyclic else level
    width = _width([len(x) for x in groups])
    slot = np.empty(len(unknown), dtype=np.intp)
    steps = 0
    for x in groups:
        slot[x] = steps * width + np.arange(len(x))
        steps += -(-len(x) // width)
    slot[~unknown] = steps * width + one[~unknown]
    roundings, so_far = np.zeros(len(unknown), dtype=np.int64), 0
    for x in level:
        so_far += int(many[x].max()) * (1 if w.chain.is_layered else 2) + 5
        roundings[x] = so_far
    shape = (w.chain.n_layers + 1, w.chain.n_states) if w.chain.is_layered else (w.chain.n_states,)
    at = np.where(used, slot[row], steps * width)
    return Pattern(
        shape, nnz, not w.chain.is_layered, cyclic, steps, width, slot, at, slot[col], roundings, tuple(level)
    )


def _width(sizes: list[int]) -> int:
    """Lanes of a step: wide levels are cut rather than narrow ones padded; a step costs about as much as 64 lanes."""
    if not sizes:
        return 1
    every = np.array(sizes)
    options = sorted({bucket(int(s)) for s in every} | {64})
    return min(options, key=lambda m: (np.ceil(every / m).sum() * (m + 64), m))
