"""Compiled loops of pooling: judged rollouts, straight from the buffers that they were decoded into.

A *cell* is a state and what came next: a token, or behind all tokens one of the four outcomes. States are grams as
numbers in base V + 1 (see `counting_kernels`), so a table of cells has V + 4 columns.

Rollouts of one prompt follow each other. While they pass by, ``n`` and ``x`` hold for each state how many of them
passed through it, and how many of these ended in each outcome; when the next prompt begins they are added to ``sums``
and emptied. Columns of `sums`: n, whether any, n^2; then for each outcome x, whether any, x^2, x n.
"""

from __future__ import annotations

import numpy as np

from ..compiled_kernels import njit
from .counting_kernels import context_at

__all__ = ["SUMS", "emit", "flush", "gather", "pool"]

SUMS = 19
OUTCOMES = 4


@njit(cache=True, error_model="numpy")
def _close(many, x, row):
    """Add to the sums of a state a prompt's rollouts through it, and empty ``x``, those of each outcome."""
    row[0] += many
    row[1] += 1
    row[2] += many * many
    for o in range(OUTCOMES):
        some = x[o]
        if some:
            row[3 + o] += some
            row[7 + o] += 1
            row[11 + o] += some * some
            row[15 + o] += some * many
            x[o] = 0


@njit(cache=True, error_model="numpy")
def gather(a, b, many, sums):
    """Sums of each state from sorted passages: ``a`` is the state, ``b`` four times the prompt plus the outcome."""
    row, n, x = -1, 0, np.zeros(OUTCOMES, dtype=np.int64)
    for i in range(len(a)):
        row += i == 0 or a[i] != a[i - 1]
        n += many[i]
        x[b[i] % OUTCOMES] += many[i]
        if i + 1 == len(a) or a[i + 1] != a[i] or b[i + 1] // OUTCOMES != b[i] // OUTCOMES:
            _close(n, x, sums[row])
            n = 0


@njit(cache=True, error_model="numpy")
def flush(held, n, x, touched, sums):
    """Add a prompt to the sums of its states, and begin anew. ``held`` is (touched states, rollouts so far)."""
    for i in range(held[0]):
        state = touched[i]
        _close(n[state], x[state], sums[state])
        n[state] = 0
    held[0] = 0


@njit(cache=True, error_model="numpy")
def pool(tokens, begin, prefill, stop, outcome, fresh, order, base, entered, moves, held, seen, n, x, touched, sums):
    """Count rollouts into a dense table, shape (states, V + 4).

    ``entered`` gets the state in which sampling began, or -1 - outcome where nothing was sampled before the hit.
    ``fresh`` marks the first rollout of each prompt, ``seen`` holds the last rollout that came through each state.
    Returns the position of a token outside the vocabulary, or -1.
    """
    top, keep, vocabulary = base ** max(order - 1, 0), order > 0, base - 1
    for r in range(len(begin)):
        if fresh[r]:
            flush(held, n, x, touched, sums)
        first, o = begin[r], outcome[r]
        i, end = first + prefill[r], first + stop[r]
        if end < i:
            entered[r] = -1 - o
            continue
        held[1] += 1
        for j in range(max(i - order, first), i):
            if tokens[j] < 0 or tokens[j] >= vocabulary:
                return j
        context = context_at(tokens, first, i, order, base)
        entered[r] = context
        while True:
            if seen[context] != held[1]:
                seen[context] = held[1]
                if n[context] == 0:
                    touched[held[0]] = context
                    held[0] += 1
                n[context] += 1
                x[context, o] += 1
            if i == end:
                moves[context, vocabulary + o] += 1
                break
            token = tokens[i]
            if token < 0 or token >= vocabulary:
                return i
            moves[context, token] += 1
            if keep:
                oldest = i - order
                if order == 1:
                    context = token + 1
                else:
                    gone = tokens[oldest] + 1 if oldest >= first else 0
                    context = (context - gone * top) * base + token + 1
            i += 1
    return -1


@njit(cache=True, error_model="numpy")
def emit(tokens, begin, prefill, stop, outcome, order, base, entered, state, symbol, who):
    """Write the cell of every visited state, and whose it is; returns a bad position as `pool` does, or -1."""
    top, keep, vocabulary, many = base ** max(order - 1, 0), order > 0, base - 1, 0
    for r in range(len(begin)):
        first, o = begin[r], outcome[r]
        i, end = first + prefill[r], first + stop[r]
        if end < i:
            entered[r] = -1 - o
            continue
        for j in range(max(i - order, first), i):
            if tokens[j] < 0 or tokens[j] >= vocabulary:
                return j
        context = context_at(tokens, first, i, order, base)
        entered[r] = context
        while True:
            state[many], who[many] = context, r
            if i == end:
                symbol[many] = vocabulary + o
                many += 1
                break
            token = tokens[i]
            if token < 0 or token >= vocabulary:
                return i
            symbol[many] = token
            many += 1
            if keep:
                oldest = i - order
                gone = tokens[oldest] + 1 if oldest >= first else 0
                context = (context - gone * top) * base + token + 1
            i += 1
    return -1
