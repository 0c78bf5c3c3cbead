"""Compiled passes over one matrix: rates, strongly connected classes, who can reach what, and an order to solve in.

Sizes decide the types of the arrays (`graph.index_type`); positions in the matrix have the type of `indptr`.
"""

from __future__ import annotations

from math import frexp, ldexp

import numpy as np

from ..compiled_kernels import njit
from .level_kernels import prefetch

ONE = np.uint64(1)
LINE = np.uint64(16)  # columns that come from memory at once
STATES = 16  # of a sequence, between what is read and what is asked for
CAN, MISS, DONE = 1, 2, 4  # a state may hit; may miss; is labelled


@njit(cache=True, error_model="numpy")
def count_rates(indptr, indices, data, ends):
    """Positions where the rows of the rates end: positive entries off the diagonal."""
    total = 0
    for i in range(len(indptr) - 1):
        for k in range(np.uint64(indptr[i]), np.uint64(indptr[i + 1])):
            total += indices[k] != i and data[k] > 0
        ends[i + 1] = total


@njit(cache=True, error_model="numpy")
def fill_rates(indptr, indices, data, total, ends, columns, rates, out, step):
    """Copy the rates, every row times the power of two that brings its sum, as computed, into [1/2, 1).

    A row of k rates is added up in order, k - 1 roundings. Scaling is exact but for what becomes subnormal.
    """
    for i in range(len(out)):
        at = np.uint64(ends[i])
        size = 0.0
        for k in range(np.uint64(indptr[i]), np.uint64(indptr[i + 1])):
            if indices[k] != i and data[k] > 0:
                columns[at] = indices[k]
                rates[at] = data[k]
                size += data[k]
                at += ONE
        exponent = -frexp(size)[1]
        out[i], step[i] = ldexp(size, exponent), ldexp(total[i], exponent)
        if abs(exponent) < 1000:
            scale = ldexp(1.0, exponent)
            for k in range(np.uint64(ends[i]), np.uint64(ends[i + 1])):
                rates[k] *= scale
        else:
            for k in range(np.uint64(ends[i]), np.uint64(ends[i + 1])):
                rates[k] = ldexp(rates[k], exponent)


@njit(cache=True, error_model="numpy")
def goes_up(indptr, indices, rows):
    """Whether every move from a marked row to a marked row is to a larger number."""
    for i in range(len(rows)):
        if rows[i]:
            for k in range(np.uint64(indptr[i]), np.uint64(indptr[i + 1])):
                j = indices[k]
                if j <= i and rows[np.uint64(j)]:
                    return False
    return True


@njit(cache=True, error_model="numpy")
def goes_down(indptr, indices, rows):
    """Whether every move from a marked row to a marked row is to a smaller number."""
    for i in range(len(rows)):
        if rows[i]:
            for k in range(np.uint64(indptr[i]), np.uint64(indptr[i + 1])):
                j = indices[k]
                if j >= i and rows[np.uint64(j)]:
                    return False
    return True


@njit(cache=True, error_model="numpy")
def components(indptr, indices, rows, low, sequence, first, path, born, at, waiting):
    """Strongly connected classes of the marked rows, sinks first (R. Tarjan 1972; one number per state as D. J. Pearce
    2016; without recursion).

    Parameters
    ----------
    rows : bool array, shape (n,)
    low : int array, shape (n,), zero
        Room: when a state was found, lowered to the earliest time that it leads back to.
    sequence, first : int arrays
        Filled with the states, class by class, and where every class begins; room for the marked rows, and one more.
    path, born, at, waiting : int arrays
        Room for the marked rows: states being searched, when they were found, the next position in their rows; states
        without a class.

    Returns
    -------
    int
        Number of classes.
    """
    far = len(low) + 1  # later than every state: what has a class, or is not marked
    for v in range(len(low)):
        if not rows[v]:
            low[v] = far
    clock, classes, filled, without = 0, 0, 0, 0
    first[0] = 0
    for root in range(len(low)):
        down, depth = np.int64(root), np.int64(-1)
        if low[root] != 0:
            continue
        while True:
            if down >= 0:
                depth += 1
                clock += 1
                low[np.uint64(down)] = clock
                path[depth], born[depth], at[depth] = down, clock, indptr[down]
                waiting[without] = down
                without += 1
            v = np.int64(path[depth])
            k, end, least = np.uint64(at[depth]), np.uint64(indptr[v + 1]), np.int64(low[v])
            down = np.int64(-1)
            while k < end:
                w = np.uint64(indices[k])
                k += ONE
                seen = np.int64(low[w])
                if seen == 0:
                    down = np.int64(w)
                    break
                least = min(least, seen)
            low[v] = least
            if down >= 0:
                at[depth] = k
                continue
            if least == born[depth]:  # nothing leads back before v: what was found since and has no class is its class
                w = np.int64(-1)
                while w != v:
                    without -= 1
                    w = np.int64(waiting[without])
                    low[w] = far
                    sequence[filled] = w
                    filled += 1
                classes += 1
                first[classes] = filled
            depth -= 1
            if depth < 0:
                break
            v = np.int64(path[depth])
            low[v] = min(np.int64(low[v]), least)
    return classes


@njit(cache=True, error_model="numpy")
def survives(indptr, indices, rows, root, steps):
    """Whether one walk over marked rows goes on for some steps; where it does, a cycle is likely."""
    v, turn = np.int64(root), np.uint64(1)
    for _ in range(steps):
        start, k = np.int64(indptr[v]), np.int64(indptr[v + 1]) - np.int64(indptr[v])
        turn = turn * np.uint64(6364136223846793005) + np.uint64(1442695040888963407)
        first, down = np.int64(turn >> np.uint64(33)) % k, np.int64(-1)
        for move in range(k):
            w = np.int64(indices[start + (first + move) % k])
            if rows[w]:
                down = w
                break
        if down < 0:
            return False
        v = down
    return True


@njit(cache=True, error_model="numpy")
def sweep_back(indptr, indices, rows, found, sweeps, half):
    """Mark rows with a move to a marked state, forth and back over all rows. Returns whether nothing is left.

    Gives up after all the sweeps, or after a few of them if fewer than `half` are marked.
    """
    n, count = len(rows), 0
    for sweep in range(sweeps):
        before = count
        for s in range(n):
            i = s if sweep % 2 == 0 else n - 1 - s
            if rows[i] and not found[i]:
                for k in range(np.uint64(indptr[i]), np.uint64(indptr[i + 1])):
                    if found[np.uint64(indices[k])]:
                        found[i] = True
                        count += 1
                        break
        if count == before:
            return True
        if sweep == 3 and count < half:
            break
    return False


@njit(cache=True, error_model="numpy")
def sweep_on(indptr, indices, rows, found, done, sweeps):
    """Find the marked rows that found states move to, forth and back. Returns whether nothing is left."""
    n = len(rows)
    for sweep in range(sweeps):
        changed = False
        for s in range(n):
            i = s if sweep % 2 == 0 else n - 1 - s
            if found[i] and not done[i]:
                done[i] = changed = True
                for k in range(np.uint64(indptr[i]), np.uint64(indptr[i + 1])):
                    j = np.uint64(indices[k])
                    if rows[j]:
                        found[j] = True
        if not changed:
            return True
    return False


@njit(cache=True, error_model="numpy")
def label(indptr, indices, sequence, first, code, acyclic):
    """Who can hit and who can miss, and how far a class is from the states that are not in the sequence.

    Parameters
    ----------
    sequence : int array
        States class by class, sinks first.
    first : int array
        Where every class begins, and the end.
    code : int array, shape (n,)
        CAN or MISS, and DONE, for states not in the sequence, 0 for those in it; these get their marks and 8 times
        their level. What cannot hit misses.
    acyclic : bool
        Whether levels count classes or, if there are cycles, only the cyclic classes on the longest way.
    """
    m = len(sequence)
    for c in range(len(first) - 1):
        marks, level = np.int64(0), np.int64(0)
        for s in range(first[c], first[c + 1]):
            prefetch(indptr, np.uint64(sequence[min(s + 2 * STATES, m - 1)]))
            row = np.uint64(indptr[np.uint64(sequence[min(s + STATES, m - 1)])])
            prefetch(indices, row)
            prefetch(indices, row + LINE)
            v = np.uint64(sequence[s])
            for k in range(np.uint64(indptr[v]), np.uint64(indptr[v + ONE])):
                seen = np.int64(code[np.uint64(indices[k])])
                marks |= seen
                level = max(level, seen)
        marks &= CAN | MISS
        if not marks & CAN:
            marks |= MISS
        level = (level >> 3) + (acyclic or first[c + 1] - first[c] > 1)
        for s in range(first[c], first[c + 1]):
            code[np.uint64(sequence[s])] = level << 3 | marks | DONE


@njit(cache=True, error_model="numpy")
def leaving(indptr, indices, sequence, first, closed):
    """Clear `closed` for the states of classes with a move to another class."""
    mine = np.zeros(len(closed), dtype=np.bool_)
    for c in range(len(first) - 1):
        start, end = first[c], first[c + 1]
        for s in range(start, end):
            mine[sequence[s]] = True
        stays = True
        for s in range(start, end):
            v = np.uint64(sequence[s])
            for k in range(np.uint64(indptr[v]), np.uint64(indptr[v + ONE])):
                stays = stays and mine[np.uint64(indices[k])]
        for s in range(start, end):
            mine[sequence[s]] = False
            closed[sequence[s]] = stays


@njit(cache=True, error_model="numpy")
def spread(indptr, indices, rows, found, queue):
    """Mark everything that can be reached from the states in `found`, reading marked rows only."""
    filled = 0
    for v in range(len(found)):
        if found[v]:
            queue[filled] = v
            filled += 1
    done = 0
    while done < filled:
        v = np.uint64(queue[done])
        done += 1
        if rows[v]:
            for k in range(np.uint64(indptr[v]), np.uint64(indptr[v + ONE])):
                w = np.uint64(indices[k])
                if not found[w]:
                    found[w] = True
                    queue[filled] = w
                    filled += 1
