"""Compiled loops of `elimination`: the dense elimination of a front, and the walk over the fronts of a dissection.

The proof of papers/markovsafety/certificates.md, section 3, counts the operations of `reduce` as they stand: an update
``w_ij += w_ik w_kj / d_k`` is one quotient, one product and one sum, sums of a row are made in the order of k, and d_k
is a compensated sum.
"""

from __future__ import annotations

import numpy as np

from ..compiled_kernels import njit

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
def _add(A, here, f, first, count, low, width):
    """``row[j] += f[0] A[first, j] + ...`` for j >= low, one product after the other; the row begins at `here`."""
    row = A[here + low : here + width]
    p = 0
    while p + 4 <= count:
        a, b, c, d = f[p], f[p + 1], f[p + 2], f[p + 3]
        k = (first + p) * width
        A0, A1 = A[k + low : k + width], A[k + width + low : k + 2 * width]
        k += 2 * width
        A2, A3 = A[k + low : k + width], A[k + width + low : k + 2 * width]
        for j in range(len(row)):
            row[j] = (((row[j] + a * A0[j]) + b * A1[j]) + c * A2[j]) + d * A3[j]
        p += 4
    while p < count:
        k = (first + p) * width
        a, A0 = f[p], A[k + low : k + width]
        for j in range(len(row)):
            row[j] += a * A0[j]
        p += 1


@njit(cache=True, error_model="numpy")
def reduce(A, f, count, pivots, base):
    """Eliminate the first `count` states of a front.

    A holds, row after row, the f x (f + 1) rates among the f states of the front, the diagonal unused, and in the last
    column their exits. Afterwards row k < count holds the rates of k at the moment it was removed, column k ``w_ik /
    d_k``, and the rest the rates that remain; d_k is ``pivots[base + k]``. Returns False if a pivot vanished or
    overflowed.
    """
    w = f + 1
    ratio = np.empty(PANEL)
    for first in range(0, count, PANEL):
        end = min(first + PANEL, count)
        for k in range(first, end):
            for p in range(first, k):
                ratio[0] = A[k * w + p] / pivots[base + p]
                A[k * w + p] = ratio[0]
                _add(A, k * w, ratio, p, 1, p + 1, w)
            pivots[base + k] = _total(A[k * w + k + 1 : k * w + f], A[k * w + f])
            if not 0.0 < pivots[base + k] < np.inf:
                return False
        for i in range(end, f):
            for p in range(first, end):
                v = A[i * w + p]
                for q in range(first, p):
                    v += ratio[q - first] * A[q * w + p]
                ratio[p - first] = v / pivots[base + p]
                A[i * w + p] = ratio[p - first]
            _add(A, i * w, ratio, first, end - first, end, w)
    return True


@njit(cache=True, error_model="numpy")
def eliminate(begin, parent, edge, border, entries, rows, cols, vals, exit, factors, offset, pivots, pending, A):
    """Eliminate all fronts, children before parents.

    Front a has the pivots ``begin[a] .. begin[a + 1] - 1`` and the border ``border[edge[a] : edge[a + 1]]``, all in the
    order of elimination, and the rates ``entries[a] .. entries[a + 1]`` of (rows, cols, vals). `factors` receives from
    ``offset[a]`` on the pivot rows, then the border's columns. `pending` is room for updates, A for a front. Returns
    False if a pivot vanished. (Flat arrays and plain loops: reshaping takes numba ten seconds to compile.)
    """
    n_fronts = len(parent)
    place = np.zeros(len(exit), np.int64)
    head = 0  # pending updates are a stack: fronts come in post-order
    bottom, stack = np.empty(n_fronts + 1, np.int64), np.empty(n_fronts + 1, np.int64)
    depth = 0
    for a in range(n_fronts):
        s, b, low = begin[a + 1] - begin[a], edge[a + 1] - edge[a], begin[a]
        f = s + b
        w = f + 1
        for p in range(f * w):
            A[p] = 0.0
        for k in range(s):
            place[low + k] = k
            A[k * w + f] = exit[low + k]
        for k in range(b):
            place[border[edge[a] + k]] = s + k
        for p in range(entries[a], entries[a + 1]):
            A[place[rows[p]] * w + place[cols[p]]] = vals[p]
        while depth and parent[stack[depth - 1]] == a:
            depth -= 1
            c = stack[depth]
            r = edge[c + 1] - edge[c]
            head = bottom[c]
            at = head
            for i in range(r):
                to = place[border[edge[c] + i]] * w
                for j in range(r):
                    A[to + place[border[edge[c] + j]]] += pending[at + j]
                A[to + f] += pending[at + r]
                at += r + 1
        if not reduce(A, f, s, pivots, low):
            return False
        at = offset[a]
        for i in range(s):
            for j in range(f):
                factors[at + j] = A[i * w + j]
            at += f
        for i in range(s, f):
            for j in range(s):
                factors[at + j] = A[i * w + j]
            at += s
        if b:
            bottom[a] = head
            for i in range(s, f):
                for j in range(s, w):
                    pending[head + j - s] = A[i * w + j]
                head += b + 1
            stack[depth] = a
            depth += 1
    return True


@njit(cache=True, error_model="numpy")
def forward(begin, edge, border, factors, offset, x):
    """Redirect gains: ``x_i += x_k w_ik / d_k`` for all i after k."""
    for a in range(len(begin) - 1):
        s, b, low, at = begin[a + 1] - begin[a], edge[a + 1] - edge[a], begin[a], offset[a]
        for i in range(1, s):
            for k in range(i):
                x[low + i] += factors[at + i * (s + b) + k] * x[low + k]
        at += s * (s + b)
        for i in range(b):
            to = border[edge[a] + i]
            for k in range(s):
                x[to] += factors[at + i * s + k] * x[low + k]


@njit(cache=True, error_model="numpy")
def backward(begin, edge, border, factors, offset, pivots, x):
    """Values: ``x_k = (x_k + sum_j w_kj x_j) / d_k`` over the j after k, last k first."""
    for a in range(len(begin) - 2, -1, -1):
        s, b, low = begin[a + 1] - begin[a], edge[a + 1] - edge[a], begin[a]
        for k in range(s - 1, -1, -1):
            at = offset[a] + k * (s + b)
            total = x[low + k]
            for j in range(k + 1, s):
                total += factors[at + j] * x[low + j]
            for j in range(b):
                total += factors[at + s + j] * x[border[edge[a] + j]]
            x[low + k] = total / pivots[low + k]


@njit(cache=True, error_model="numpy")
def forward_flow(begin, edge, border, factors, offset, pivots, z):
    """Push what a state holds to the states after it: ``z_k /= d_k; z_j += w_kj z_k``."""
    for a in range(len(begin) - 1):
        s, b, low = begin[a + 1] - begin[a], edge[a + 1] - edge[a], begin[a]
        for k in range(s):
            at = offset[a] + k * (s + b)
            here = z[low + k] / pivots[low + k]
            z[low + k] = here
            for j in range(k + 1, s):
                z[low + j] += factors[at + j] * here
            for j in range(b):
                z[border[edge[a] + j]] += factors[at + s + j] * here


@njit(cache=True, error_model="numpy")
def backward_flow(begin, edge, border, factors, offset, z):
    """Visits on the way back: ``z_k += sum_i z_i w_ik / d_k`` over the i after k, last k first."""
    for a in range(len(begin) - 2, -1, -1):
        s, b, low = begin[a + 1] - begin[a], edge[a + 1] - edge[a], begin[a]
        at = offset[a] + s * (s + b)
        for i in range(b):
            there = z[border[edge[a] + i]]
            for k in range(s):
                z[low + k] += factors[at + i * s + k] * there
        for i in range(s - 1, 0, -1):
            at = offset[a] + i * (s + b)
            there = z[low + i]
            for k in range(i):
                z[low + k] += factors[at + k] * there
