"""Compiled loops behind counting: cells of a transition table, and a stable radix sort.

A *cell* is the number of a (context, token) pair. A context of order k is written in base V + 1, oldest symbol first,
with 0 for "before the answer began" and token + 1 otherwise; its cell with the next token is context * V + token. So
cells in rising order are rows in the order of their contexts, and columns in the order of tokens.

All sums of float64 values run in the order of the data, from 0.0 on.
"""

from __future__ import annotations

import numpy as np

from ..compiled_kernels import njit

__all__ = ["DIGIT", "cells", "context_at", "merge", "radix", "scan", "scan_buckets", "scatter", "sum_runs", "tally"]

DIGIT = 11  # bits by which one pass of the radix sort sorts
BLOCK = 16  # cells that are tested for emptiness at once


@njit(cache=True, error_model="numpy", inline="never")
def context_at(tokens, begin, i, order, base):
    """Number of the context in front of token i of an answer that begins at `begin`."""
    context = 0
    for p in range(i - order, i):
        context *= base
        if p >= begin:
            context += tokens[p] + 1
    return context


@njit(cache=True, error_model="numpy")
def tally(tokens, starts, lo, hi, order, base, vocabulary, origin, shift, table):
    """Add one to ``table[(cell - origin) >> shift]`` for each token in [lo, hi); the last entry takes what is outside.

    Returns the position of the first token outside the vocabulary, or -1.
    """
    top, keep, outside = base ** max(order - 1, 0), np.int64(order > 0), np.uint64(len(table) - 1)
    for r in range(len(starts) - 1):
        begin, end = starts[r], min(starts[r + 1], hi)
        i = max(begin, lo)
        context = context_at(tokens, begin, i, order, base)
        while i < end:
            token = np.int64(tokens[i])
            if token < 0 or token >= vocabulary:
                return i
            slot = np.uint64((context * vocabulary + token - origin) >> shift)  # negative: beyond every slot
            table[min(slot, outside)] += 1
            oldest = i - order
            gone = (np.int64(tokens[oldest]) + 1) * keep if oldest >= begin else 0
            context = ((context - gone * top) * base + token + 1) * keep
            i += 1
    return -1


@njit(cache=True, error_model="numpy")
def scatter(tokens, starts, lo, hi, order, base, vocabulary, origin, shift, cursor, out):
    """Write each cell into its bucket ``(cell - origin) >> shift``, at its cursor, which moves on.

    ``out`` holds the offset of the cell within its bucket. The last cursor is for cells outside all buckets and never
    moves: writing there and forgetting it costs less than a branch that cannot be predicted.
    """
    top, keep, outside = base ** max(order - 1, 0), np.int64(order > 0), np.uint64(len(cursor) - 1)
    mask = (np.int64(1) << shift) - 1
    for r in range(len(starts) - 1):
        begin, end = starts[r], min(starts[r + 1], hi)
        i = max(begin, lo)
        context = context_at(tokens, begin, i, order, base)
        while i < end:
            token = np.int64(tokens[i])
            cell = context * vocabulary + token - origin
            slot = min(np.uint64(cell >> shift), outside)
            p = cursor[slot]
            out[p] = cell & mask
            cursor[slot] = p + (slot < outside)
            oldest = i - order
            gone = (np.int64(tokens[oldest]) + 1) * keep if oldest >= begin else 0
            context = ((context - gone * top) * base + token + 1) * keep
            i += 1


@njit(cache=True, error_model="numpy")
def cells(tokens, starts, lo, hi, order, base, vocabulary, out):
    """The cell of each token in [lo, hi), in the order of the tokens."""
    top, keep, n = base ** max(order - 1, 0), np.int64(order > 0), 0
    for r in range(len(starts) - 1):
        begin, end = starts[r], min(starts[r + 1], hi)
        i = max(begin, lo)
        context = context_at(tokens, begin, i, order, base)
        while i < end:
            token = np.int64(tokens[i])
            out[n] = context * vocabulary + token
            n += 1
            oldest = i - order
            gone = (np.int64(tokens[oldest]) + 1) * keep if oldest >= begin else 0
            context = ((context - gone * top) * base + token + 1) * keep
            i += 1


@njit(cache=True, error_model="numpy")
def scan(table, origin, vocabulary, at, indices, data, contexts, begins):
    """Append the non-zero entries of a table of cells to a CSR matrix, and empty the table.

    ``at`` is (entries, rows, last row) so far, and moves on. `indices` and `data` have room for one entry more than
    there will be: zeros are written too, and overwritten by the next entry, because no branch can foresee them.
    """
    entries, rows, last = at[0], at[1], at[2]
    width, cell, behind = np.uint64(BLOCK), origin, origin + len(table)
    while cell < behind:
        row = cell // vocabulary
        stop = min((row + 1) * vocabulary, behind)
        k, end, before = np.uint64(cell - origin), np.uint64(stop - origin), entries
        column = np.uint64(cell - row * vocabulary) - k
        while k < end:
            many = min(width, end - k)
            if many == width:
                any_of = table[k]
                for j in range(width):
                    any_of |= table[k + np.uint64(j)]
                if any_of == 0:
                    k += width
                    continue
            for j in range(many):
                here = k + np.uint64(j)
                indices[np.uint64(entries)] = column + here
                data[np.uint64(entries)] = table[here]
                entries += table[here] != 0
                table[here] = 0
            k += many
        if entries > before and row != last:
            contexts[rows], begins[rows] = row, before
            rows, last = rows + 1, row
        cell = stop
    at[0], at[1], at[2] = entries, rows, last


@njit(cache=True, error_model="numpy")
def scan_buckets(keys, ends, origin, vocabulary, table, at, indices, data, contexts, begins):
    """Count each bucket of keys in a table that fits the cache, and append it to a CSR matrix; see `scan`."""
    lo = 0
    for bucket in range(len(ends)):
        hi = ends[bucket]
        if hi > lo:
            for i in range(lo, hi):
                table[keys[i]] += 1
            scan(table, origin + bucket * len(table), vocabulary, at, indices, data, contexts, begins)
        lo = hi


@njit(cache=True, error_model="numpy")
def radix(keys, order, spare_keys, spare_order, bits):
    """Stable sort of non-negative keys below 2**bits, and of what goes with them (nothing, if `order` is empty).

    Returns whether the result lies in the spare arrays.
    """
    size, with_order, swapped = 1 << DIGIT, len(order) > 0, False
    counts = np.empty(size, dtype=np.int64)
    for shift in range(0, bits, DIGIT):
        counts[:] = 0
        for i in range(len(keys)):
            counts[(keys[i] >> shift) & (size - 1)] += 1
        if counts[(keys[0] >> shift) & (size - 1)] == len(keys):
            continue
        total = 0
        for digit in range(size):
            total, counts[digit] = total + counts[digit], total
        for i in range(len(keys)):
            digit = (keys[i] >> shift) & (size - 1)
            p = counts[digit]
            counts[digit] = p + 1
            spare_keys[p] = keys[i]
            if with_order:
                spare_order[p] = order[i]
        keys, spare_keys = spare_keys, keys
        order, spare_order = spare_order, order
        swapped = not swapped
    return swapped


@njit(cache=True, error_model="numpy")
def sum_runs(values, order, first, out):
    """``out[r]``: sum of ``values[order[i]]`` for i from ``first[r]`` to the next, in this order."""
    for r in range(len(first)):
        stop = first[r + 1] if r + 1 < len(first) else len(order)
        total = 0.0
        for i in range(first[r], stop):
            total += values[order[i]]
        out[r] = total


@njit(cache=True, error_model="numpy")
def merge(a, x, b, y, keys, sums):
    """Merge two sorted lists of distinct keys, adding the values of keys that both have; returns the length."""
    i = j = n = 0
    while i < len(a) or j < len(b):
        left = j == len(b) or (i < len(a) and a[i] <= b[j])
        right = i == len(a) or (j < len(b) and b[j] <= a[i])
        keys[n] = a[i] if left else b[j]
        sums[n] = (x[i] if left else 0) + (y[j] if right else 0)
        i += left
        j += right
        n += 1
    return n
