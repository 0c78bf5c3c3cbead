"""Compiled loops of `elimination`: the dense elimination of a front, and the walk over the fronts of a dissection.

The proof of papers/markovsafety/certificates.md, section 3, counts the operations of `reduce` as they stand: an update
``w_ij += w_ik w_kj / d_k`` is one quotient, one product and one sum, sums of a row are made in the order of k, and d_k
is a compensated sum.
"""

from __future__ import annotations

import numpy as np
from numba import njit

__all__ = ["backward", "backward_flow", "eliminate", "forward", "forward_flow", "reduce"]

PANEL = 16


@njit(cache=True, error_model="numpy")
def _total(row, exit):
    """Sum of a row and its exit, all non-negative; compensated: two roundings at most, whatever the length."""
    s, lost = exit, 0.0
    for j in range(len(row)):
        t = s + row[j]
        back = t - s
        lost += (s - (t - back)) + (row[j] - back)
        s = t
    return s + lost


@njit(cache=True, error_model="numpy")
def _add(row, f, A, first, count, low):
    """``row[j] += f[0] A[first, j] + ...`` for j >= low, one product after the other."""
    here = row[low:]
    p = 0
    while p + 4 <= count:
        a, b, c, d = f[p], f[p + 1], f[p + 2], f[p + 3]
        k = first + p
        A0, A1, A2, A3 = A[k, low:], A[k + 1, low:], A[k + 2, low:], A[k + 3, low:]
        for j in range(len(here)):
            here[j] = (((here[j] + a * A0[j]) + b * A1[j]) + c * A2[j]) + d * A3[j]
        p += 4
    while p < count:
        a, A0 = f[p], A[first + p, low:]
        for j in range(len(here)):
            here[j] += a * A0[j]
        p += 1


@njit(cache=True, error_model="numpy")
def reduce(A, count, pivots):
    """Eliminate the first `count` states of a front.

    A, of shape (f, f + 1), holds the rates among the f states of the front, the diagonal unused, and in the last column
    their exits. Afterwards row k < count holds the rates of k at the moment it was removed, column k ``w_ik / d_k``,
    and the rest the rates that remain. Returns False if a pivot vanished or overflowed.
    """
    f = len(A)
    ratio = np.empty(PANEL)
    for first in range(0, count, PANEL):
        end = min(first + PANEL, count)
        for k in range(first, end):
            for p in range(first, k):
                ratio[0] = A[k, p] / pivots[p]
                A[k, p] = ratio[0]
                _add(A[k], ratio, A, p, 1, p + 1)
            pivots[k] = _total(A[k, k + 1 : f], A[k, f])
            if not 0.0 < pivots[k] < np.inf:
                return False
        for i in range(end, f):
            for p in range(first, end):
                v = A[i, p]
                for q in range(first, p):
                    v += ratio[q - first] * A[q, p]
                ratio[p - first] = v / pivots[p]
                A[i, p] = ratio[p - first]
            _add(A[i], ratio, A, first, end - first, end)
    return True


@njit(cache=True, error_model="numpy")
def eliminate(begin, parent, edge, border, entries, rows, cols, vals, exit, factors, offset, pivots, deepest, largest):
    """Eliminate all fronts, children before parents.

    Front a has the pivots ``begin[a] .. begin[a + 1] - 1`` and the border ``border[edge[a] : edge[a + 1]]``, all in the
    order of elimination, and the rates ``entries[a] .. entries[a + 1]`` of (rows, cols, vals). `factors` receives from
    ``offset[a]`` on the pivot rows, then the border's columns. Room for the pending updates is `deepest`, for a front
    `largest`. Returns False if a pivot vanished.
    """
    n_fronts = len(parent)
    place = np.zeros(len(exit), np.int64)
    pending, work = np.empty(deepest), np.empty(largest)
    head, bottom = 0, np.full(n_fronts + 1, -1, np.int64)  # pending updates are a stack: fronts come in post-order
    stack = np.empty(n_fronts + 1, np.int64)
    depth = 0
    for a in range(n_fronts):
        s, b = begin[a + 1] - begin[a], edge[a + 1] - edge[a]
        f = s + b
        A = work[: f * (f + 1)].reshape((f, f + 1))
        A[:] = 0.0
        for k in range(s):
            place[begin[a] + k] = k
            A[k, f] = exit[begin[a] + k]
        for k in range(b):
            place[border[edge[a] + k]] = s + k
        for p in range(entries[a], entries[a + 1]):
            A[place[rows[p]], place[cols[p]]] = vals[p]
        while depth and parent[stack[depth - 1]] == a:
            depth -= 1
            c = stack[depth]
            r = edge[c + 1] - edge[c]
            head = bottom[c]
            U = pending[head : head + r * (r + 1)].reshape((r, r + 1))
            for i in range(r):
                to = place[border[edge[c] + i]]
                for j in range(r):
                    A[to, place[border[edge[c] + j]]] += U[i, j]
                A[to, f] += U[i, r]
        if not reduce(A, s, pivots[begin[a] : begin[a + 1]]):
            return False
        at = offset[a]
        factors[at : at + s * f].reshape((s, f))[:] = A[:s, :f]
        factors[at + s * f : at + s * (f + b)].reshape((b, s))[:] = A[s:, :s]
        if b:
            pending[head : head + b * (b + 1)].reshape((b, b + 1))[:] = A[s:, s:]
            bottom[a] = head
            head += b * (b + 1)
            stack[depth] = a
            depth += 1
    return True


@njit(cache=True, error_model="numpy")
def forward(begin, edge, border, factors, offset, x):
    """Redirect gains: ``x_i += x_k w_ik / d_k`` for all i after k."""
    for a in range(len(begin) - 1):
        s, b, low = begin[a + 1] - begin[a], edge[a + 1] - edge[a], begin[a]
        rows = factors[offset[a] : offset[a] + s * (s + b)].reshape((s, s + b))
        side = factors[offset[a] + s * (s + b) : offset[a] + s * (s + 2 * b)].reshape((b, s))
        for i in range(1, s):
            for k in range(i):
                x[low + i] += rows[i, k] * x[low + k]
        for i in range(b):
            to = border[edge[a] + i]
            for k in range(s):
                x[to] += side[i, k] * x[low + k]


@njit(cache=True, error_model="numpy")
def backward(begin, edge, border, factors, offset, pivots, x):
    """Values: ``x_k = (x_k + sum_j w_kj x_j) / d_k`` over the j after k, last k first."""
    for a in range(len(begin) - 2, -1, -1):
        s, b, low = begin[a + 1] - begin[a], edge[a + 1] - edge[a], begin[a]
        rows = factors[offset[a] : offset[a] + s * (s + b)].reshape((s, s + b))
        for k in range(s - 1, -1, -1):
            total = x[low + k]
            for j in range(k + 1, s):
                total += rows[k, j] * x[low + j]
            for j in range(b):
                total += rows[k, s + j] * x[border[edge[a] + j]]
            x[low + k] = total / pivots[low + k]


@njit(cache=True, error_model="numpy")
def forward_flow(begin, edge, border, factors, offset, pivots, z):
    """Push what a state holds to the states after it: ``z_k /= d_k; z_j += w_kj z_k``."""
    for a in range(len(begin) - 1):
        s, b, low = begin[a + 1] - begin[a], edge[a + 1] - edge[a], begin[a]
        rows = factors[offset[a] : offset[a] + s * (s + b)].reshape((s, s + b))
        for k in range(s):
            here = z[low + k] / pivots[low + k]
            z[low + k] = here
            for j in range(k + 1, s):
                z[low + j] += rows[k, j] * here
            for j in range(b):
                z[border[edge[a] + j]] += rows[k, s + j] * here


@njit(cache=True, error_model="numpy")
def backward_flow(begin, edge, border, factors, offset, z):
    """Visits on the way back: ``z_k += sum_i z_i w_ik / d_k`` over the i after k, last k first."""
    for a in range(len(begin) - 2, -1, -1):
        s, b, low = begin[a + 1] - begin[a], edge[a + 1] - edge[a], begin[a]
        rows = factors[offset[a] : offset[a] + s * (s + b)].reshape((s, s + b))
        side = factors[offset[a] + s * (s + b) : offset[a] + s * (s + 2 * b)].reshape((b, s))
        for i in range(b):
            there = z[border[edge[a] + i]]
            for k in range(s):
                z[low + k] += side[i, k] * there
        for i in range(s - 1, 0, -1):
            there = z[low + i]
            for k in range(i):
                z[low + k] += rows[i, k] * there
