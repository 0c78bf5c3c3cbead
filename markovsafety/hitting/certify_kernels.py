"""Residuals of pairs ``high + low``, with proven bounds on their error, in one pass over the matrix.

A vector of pairs is an array of shape (m, 2): both parts of a neighbour lie in one cache line. Index arrays come as
unsigned integers, for which numba leaves out the check for negative ones.

What is computed, in which order, and with how much room, is what section 2 of papers/markovsafety/certificates.md
proves: change one and the other must follow. In short, per row: the large parts go into ``s`` by error-free sums, what
these lose and the small parts go into ``c`` by plain ones, ``size`` is the sum of the magnitudes of all that was
rounded, and ``mass`` that of the large parts.
"""

from __future__ import annotations

import numpy as np

from ..compiled_kernels import njit
from .double_double_kernels import SMALL, two_product, two_sum

__all__ = ["exact_sums", "flow_residuals", "move_out", "quick_residuals", "residuals", "swept"]

U = 2.0**-53
TINY = 2.0**-1074


@njit(cache=True, error_model="numpy")
def _top(x):
    """Largest magnitude."""
    top = 0.0
    for v in x:
        top = max(top, abs(v))
    return top


@njit(cache=True, error_model="numpy")
def _room(r, k, size, mass, top, errors):
    """Bound on the error of ``r = fl(s + c)``; the factor in front covers its own roundings."""
    lost = (3 * k + 8) * (1 + 2 * top) * TINY
    return (1 + 16 * U) * (U * abs(r) + 2 * (k + 8) * U * size + 2 * errors * U * (mass + size) + lost)


@njit(cache=True, error_model="numpy")
def quick_residuals(inside, outside, known, y, gain, errors):
    """`residuals` by plain sums of differences: several times faster, and wide where differences are large."""
    m = len(y)
    r, error = np.empty(m), np.empty(m)
    ptr, index, data = inside
    far_ptr, far_data = outside
    top = max(_top(y[:, 0]), _top(known))
    for i in range(m):
        yh, yl = y[i, 0], y[i, 1]
        s, size = gain[i], abs(gain[i])
        for p in range(ptr[i], ptr[i + 1]):
            j, w = index[p], data[p]
            d, small = y[j, 0] - yh, y[j, 1] - yl
            s += w * (d + small)
            size += w * (abs(d) + abs(small))
        for p in range(far_ptr[i], far_ptr[i + 1]):
            w, d = far_data[p], known[p] - yh
            s += w * (d - yl)
            size += w * (abs(d) + abs(yl))
        k = (ptr[i + 1] - ptr[i]) + (far_ptr[i + 1] - far_ptr[i])
        r[i] = s
        n = k + 6 + errors
        error[i] = (1 + 16 * U) * ((n + 4 * n * n * U) * U * size + (3 * k + 8) * (1 + 2 * top) * TINY)
    return r, error


@njit(cache=True, error_model="numpy")
def residuals(inside, outside, known, y, gain, errors):
    """``sum_j w_ij (y_j - y_i) + c_i`` for the states of a class, and a bound on its error.

    Parameters
    ----------
    inside : (indptr, indices, data) of a csr array, shape (m, m)
        Rates within the class.
    outside : (indptr, data)
        Rates to known states.
    known : array, one for each of these rates
        The value there.
    y : array, shape (m, 2)
        Pairs.
    gain : array, shape (m,)
    errors : float
        Roundings already in each rate.
    """
    m = len(y)
    r, error = np.empty(m), np.empty(m)
    ptr, index, data = inside
    far_ptr, far_data = outside
    top = max(_top(y[:, 0]), _top(known))
    for i in range(m):
        yh, yl = y[i, 0], y[i, 1]
        s, c, size, mass = gain[i], 0.0, 0.0, 0.0
        for p in range(ptr[i], ptr[i + 1]):
            j, w = index[p], data[p]
            d, lost = two_sum(y[j, 0], -yh)
            small = y[j, 1] - yl
            a, b = two_product(w, d)
            if abs(a) < SMALL:
                b = 0.0
                size += abs(a)
            s, e = two_sum(s, a)
            c += (b + e) + w * (small + lost)
            size += (abs(b) + abs(e)) + w * (abs(small) + abs(lost))
            mass += abs(a)
        for p in range(far_ptr[i], far_ptr[i + 1]):
            w = far_data[p]
            d, lost = two_sum(known[p], -yh)
            a, b = two_product(w, d)
            if abs(a) < SMALL:
                b = 0.0
                size += abs(a)
            s, e = two_sum(s, a)
            c += (b + e) + w * (lost - yl)
            size += (abs(b) + abs(e)) + w * (abs(yl) + abs(lost))
            mass += abs(a)
        k = (ptr[i + 1] - ptr[i]) + (far_ptr[i + 1] - far_ptr[i])
        r[i] = s + c
        error[i] = _room(r[i], k, size, mass, top, errors)
    return r, error


@njit(cache=True, error_model="numpy")
def exact_sums(inside, outside):
    """Row sums of all rates as pairs, and a bound on their error; arrays of shape (m,)."""
    ptr, _, data = inside
    far_ptr, far_data = outside
    m = len(ptr) - 1
    high, low, error = np.empty(m), np.empty(m), np.empty(m)
    for i in range(m):
        s, c, size = 0.0, 0.0, 0.0
        for p in range(ptr[i], ptr[i + 1]):
            s, e = two_sum(s, data[p])
            c += e
            size += abs(e)
        for p in range(far_ptr[i], far_ptr[i + 1]):
            s, e = two_sum(s, far_data[p])
            c += e
            size += abs(e)
        high[i], low[i] = two_sum(s, c)
        k = (ptr[i + 1] - ptr[i]) + (far_ptr[i + 1] - far_ptr[i])
        error[i] = (1 + 8 * U) * (2 * (k + 2) * U * size + k * TINY)
    return high, low, error


@njit(cache=True, error_model="numpy")
def flow_residuals(into, out, z, source, errors):
    """``s_j + sum_i z_i w_ij - d_j z_j`` for the states of a class, and a bound on its error.

    Parameters
    ----------
    into : (indptr, indices, data) of a csr array, shape (m, m)
        Row j holds the rates into j.
    out : (high, low, error), arrays of shape (m,)
        Total rates d.
    z : array, shape (m, 2)
        Pairs.
    source : array, shape (m,)
    errors : float
        Roundings already in each rate.
    """
    m = len(z)
    r, error = np.empty(m), np.empty(m)
    ptr, index, data = into
    out_high, out_low, out_error = out
    top = _top(z[:, 0])
    for j in range(m):
        zh, zl, dh, dl = z[j, 0], z[j, 1], out_high[j], out_low[j]
        a, b = two_product(dh, zh)
        size = 0.0
        if abs(a) < SMALL:
            b = 0.0
            size += abs(a)
        mass = abs(a)
        s, e = two_sum(source[j], -a)
        c = (e - b) - (dh * zl + dl * zh)
        size += (abs(e) + abs(b)) + (abs(dh * zl) + abs(dl * zh))
        for p in range(ptr[j], ptr[j + 1]):
            i, w = index[p], data[p]
            a, b = two_product(w, z[i, 0])
            if abs(a) < SMALL:
                b = 0.0
                size += abs(a)
            s, e = two_sum(s, a)
            small = w * z[i, 1]
            c += (b + e) + small
            size += (abs(b) + abs(e)) + abs(small)
            mass += abs(a)
        r[j] = s + c
        left = out_error[j] * (abs(zh) + abs(zl)) + abs(dl * zl)
        error[j] = _room(r[j], ptr[j + 1] - ptr[j] + 4, size, mass, top, errors) + 2 * left
    return r, error


@njit(cache=True, error_model="numpy", inline="always")
def _step(x):
    """More than half the distance from x to its neighbours: ``fl(x -+ step)`` lies beyond x."""
    return U * (1 + 4 * U) * abs(x) + TINY


@njit(cache=True, error_model="numpy")
def move_out(y, radius, ceiling):
    """Floats around ``y -+ radius``, at most one more than needed, within [0, ceiling]; shape (m,) each."""
    m = len(y)
    lower, upper = np.empty(m), np.empty(m)
    for i in range(m):
        away = y[i, 1] - radius[i]
        s, e = two_sum(y[i, 0], away - _step(away))
        lower[i] = max(s - _step(s) if e < 0 else s, 0.0)
        away = y[i, 1] + radius[i]
        s, e = two_sum(y[i, 0], away + _step(away))
        upper[i] = min(s + _step(s) if e > 0 else s, ceiling)
    return lower, upper


@njit(cache=True, error_model="numpy")
def swept(inside, outside, sweeps):
    """Pairs near the mean probability of being in the class still after 0, 1, ... jumps; no proof needs their digits.

    If q_k is the probability of having left within k jumps, ``v = 1 - mean(q_0 .. q_(K-1))`` has ``M v = D q_K / K``,
    positive where some exit is at most K jumps away. ``1 - q`` is never formed, so that no leak is too small.
    """
    ptr, index, data = inside
    far_ptr, far_data = outside
    m = len(ptr) - 1
    total, leave = np.zeros(m), np.zeros(m)
    for i in range(m):
        for p in range(far_ptr[i], far_ptr[i + 1]):
            leave[i] += far_data[p]
        for p in range(ptr[i], ptr[i + 1]):
            total[i] += data[p]
        total[i] = 1 / (total[i] + leave[i])
    q, after, v = np.empty(m), np.empty(m), np.ones((m, 2))
    for i in range(m):
        q[i] = leave[i] * total[i]
        v[i, 1] = -q[i] / sweeps
    for _ in range(2, sweeps):
        for i in range(m):
            s = leave[i]
            for p in range(ptr[i], ptr[i + 1]):
                s += data[p] * q[index[p]]
            after[i] = s * total[i]
            v[i, 1] -= after[i] / sweeps
        q, after = after, q
    return v
