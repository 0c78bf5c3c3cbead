"""The elimination of a sparse pattern as a list of operations, made once and run for many sets of numbers.

Chains of k-grams estimated from rollouts look cyclic as a whole and are almost paths in detail: most states have one
way in or one way out, and removing such a state adds no entry. Removing states in the order of least work, ways in
times ways out (H. M. Markowitz, Management Science 3 (1957) 255), leaves a small core; which entry is added to which is
the same for every sample, so only the arithmetic is repeated. It is that of `elimination`: nothing is subtracted."""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Program", "program"]

MOST = 16  # products per entry of the pattern; a class that needs more is left to other methods


@dataclass(frozen=True)
class Program:
    """Operations that eliminate a class of m states.

    Attributes
    ----------
    order : int array, shape (m,)
        States, first removed first.
    ways_out : (ptr, slot, state) int arrays
        The entries in the row of each removed state, at the moment it is removed.
    ways_in : (ptr, slot, state) int arrays
        The entries in its column.
    into : int array
        For each removed state, way in by way out, the slot that their product is added to; -1 on the diagonal.
    slots : int
        Entries in all, those of the pattern first.
    roundings : float
        Number N such that solutions are within a factor ``1 +- gamma(N)`` of the exact ones, if exits and gains are
        exact.
    """

    order: NDArray[np.int32]
    ways_out: tuple[NDArray, NDArray, NDArray]
    ways_in: tuple[NDArray, NDArray, NDArray]
    into: NDArray[np.int32]
    slots: int
    roundings: float


def program(ptr: NDArray, col: NDArray, most: int | None = None) -> Program | None:
    """Plan the elimination of a pattern.

    Parameters
    ----------
    ptr, col : int arrays, shape (m + 1,), (e,)
        Entries between the m states; entries on the diagonal are never read.
    most : int, optional
        Give up where about so many products are needed; `MOST` per entry if not given.

    Returns
    -------
    Program or None

    Notes
    -----
    *Roundings.* Removing k changes the rows of its ways in only. With o ways out, the pivot, a sum of o + 1 terms, has
    o roundings, the share one more, the product one, the addition one: every datum of a touched row is within o + 3
    roundings of that of exact removal. Numerator and denominator of the solution are sums of products with one datum
    of each row, so that a touched row counts twice: ``2 i (o + 3)`` for i ways in. Substitution divides a sum of o + 1
    terms, o of them products, by the pivot: ``2 o + 3``.
    """
    m = len(ptr) - 1
    most = MOST * len(col) if most is None else most
    out: list[dict[int, int]] = [{} for _ in range(m)]
    into: list[dict[int, int]] = [{} for _ in range(m)]
    columns = col.tolist()
    for i in range(m):
        for p in range(int(ptr[i]), int(ptr[i + 1])):
            j = columns[p]
            if j != i:
                out[i][j] = into[j][i] = p
    slots, work, count = len(columns), 0, 0.0
    heap = [(len(into[k]) * len(out[k]), k) for k in range(m)]
    heapq.heapify(heap)
    order: list[int] = []
    rows: tuple[list[Any], ...] = ([], [], [], [], [])
    gone = [False] * m
    while heap:
        cost, k = heapq.heappop(heap)
        if gone[k] or cost != len(into[k]) * len(out[k]):
            continue
        # Where the rest is full, a third of the present cost is the mean of those to come: such patterns are left.
        work += cost
        if work + cost * (m - len(order) - 1) / 3 > most:
            return None
        gone[k] = True
        order.append(k)
        before, behind = into[k], out[k]
        count += 2.0 * len(before) * (len(behind) + 3) + 2 * len(behind) + 3
        for i, part in zip((0, 2), (behind, before)):
            rows[i].append(list(part.values()))
            rows[i + 1].append(list(part.keys()))
        for i in before:
            row = out[i]
            del row[k]
            for j in behind:
                if j == i:
                    rows[4].append(-1)
                    continue
                at = row.get(j)
                if at is None:
                    at = row[j] = into[j][i] = slots
                    slots += 1
                rows[4].append(at)
        for j in behind:
            del into[j][k]
        for i in {*before, *behind}:
            heapq.heappush(heap, (len(into[i]) * len(out[i]), i))
    return Program(
        np.array(order, dtype=np.int32),
        _table(rows[0], rows[1]),
        _table(rows[2], rows[3]),
        np.array(rows[4], dtype=np.int32),
        slots,
        count,
    )


def _table(slots: list[list[int]], states: list[list[int]]) -> tuple[NDArray, NDArray, NDArray]:
    ptr = np.concatenate([[0], np.cumsum([len(x) for x in slots])]).astype(np.int64)
    flat = lambda rows: np.array([x for row in rows for x in row], dtype=np.int32)  # noqa: E731
    return ptr, flat(slots), flat(states)
