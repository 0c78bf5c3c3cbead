"""Kernels for many chains with one pattern, four samples side by side: four streams of entries share every index load.

Rounding model. Numba without fastmath keeps the order as written and fuses nothing. `substitute`: a row of k entries
costs at most k products and k - 1 sums in sequence, and where the diagonal is implied k - 1 sums below and one division
more. `krylov` proves its answer afterwards, see there."""

from __future__ import annotations

import numpy as np

from ..compiled_kernels import njit

__all__ = ["eliminate", "krylov", "levels", "substitute"]

U = 2.0**-53
ITERATIONS = 60  # of BiCGStab per pass
PASSES = 6
FAINT = 2.0**-1000  # more than all that underflow can take from a sum
WIDTH = 16  # samples side by side in `krylov`
SWEEPS = 8  # of a lift that does not fit
INNER = 1e-5  # what a pass in float32 leaves of the residual


@njit(cache=True, error_model="numpy", nogil=True)
def levels(indptr, indices, sequence, level):
    """Longest ways from the states of a sequence, each behind all it can move to; `level` is -1 on all others."""
    for i in sequence:
        top = -1
        for p in range(indptr[i], indptr[i + 1]):
            top = max(top, level[indices[p]])
        level[i] = top + 1


@njit(cache=True, error_model="numpy", nogil=True)
def substitute(values, rows, first, middle, last, cols, implied, known, X, sums):
    """``x_i = sum_j v_ij x_j``, divided by ``sum_j v_ij`` where the diagonal is implied, for every sample.

    Parameters
    ----------
    values : array, shape (B, nnz)
        One row of stored entries per sample.
    rows : int array, shape (R,)
        The unknown nodes, each after all nodes it reads.
    first, middle, last : int array, shape (R,)
        Entries ``first .. middle`` and ``middle + 1 .. last`` of a row are read: `middle` is where an implied diagonal
        is stored, or `last`.
    cols : int array, shape (nnz,)
        Node that an entry leads to.
    implied : bool
    known : array, shape (N,)
        Values of the known nodes, 0 elsewhere.
    X : array, shape (B, N)
        Out: values of all nodes.
    sums : array, shape (B, 3)
        Out: least entry read (or 0), least and largest sum of a row. A NaN among the entries makes its row's value NaN.
    """
    B, N = values.shape[0], len(known)
    x = np.empty((N, 4))
    for b in range(0, B, 4):
        b1, b2, b3 = min(b + 1, B - 1), min(b + 2, B - 1), min(b + 3, B - 1)
        v0, v1, v2, v3 = values[b], values[b1], values[b2], values[b3]
        least0, least1, least2, least3 = 0.0, 0.0, 0.0, 0.0
        low0, low1, low2, low3 = np.inf, np.inf, np.inf, np.inf
        high0, high1, high2, high3 = 0.0, 0.0, 0.0, 0.0
        for i in range(N):
            for s in range(4):
                x[i, s] = known[i]
        for r in range(len(rows)):
            dot0, dot1, dot2, dot3 = 0.0, 0.0, 0.0, 0.0
            sum0, sum1, sum2, sum3 = 0.0, 0.0, 0.0, 0.0
            start, stop = first[r], middle[r]
            for _ in range(2):  # before and behind the diagonal
                for p in range(start, stop):
                    j = cols[p]
                    a0, a1, a2, a3 = v0[p], v1[p], v2[p], v3[p]
                    dot0 += a0 * x[j, 0]
                    dot1 += a1 * x[j, 1]
                    dot2 += a2 * x[j, 2]
                    dot3 += a3 * x[j, 3]
                    sum0 += a0
                    sum1 += a1
                    sum2 += a2
                    sum3 += a3
                    least0 = a0 if a0 < least0 else least0
                    least1 = a1 if a1 < least1 else least1
                    least2 = a2 if a2 < least2 else least2
                    least3 = a3 if a3 < least3 else least3
                start, stop = stop + 1, last[r]
            i = rows[r]
            if implied:
                x[i, 0], x[i, 1], x[i, 2], x[i, 3] = dot0 / sum0, dot1 / sum1, dot2 / sum2, dot3 / sum3
            else:  # comparisons that keep a NaN
                x[i, 0] = 1.0 if dot0 > 1 else dot0
                x[i, 1] = 1.0 if dot1 > 1 else dot1
                x[i, 2] = 1.0 if dot2 > 1 else dot2
                x[i, 3] = 1.0 if dot3 > 1 else dot3
            low0 = sum0 if sum0 < low0 else low0
            low1 = sum1 if sum1 < low1 else low1
            low2 = sum2 if sum2 < low2 else low2
            low3 = sum3 if sum3 < low3 else low3
            high0 = sum0 if sum0 > high0 else high0
            high1 = sum1 if sum1 > high1 else high1
            high2 = sum2 if sum2 > high2 else high2
            high3 = sum3 if sum3 > high3 else high3
        for s, line, least, low, high in (
            (3, b3, least3, low3, high3),
            (2, b2, least2, low2, high2),
            (1, b1, least1, low1, high1),
            (0, b, least0, low0, high0),
        ):
            sums[line, 0], sums[line, 1], sums[line, 2] = least, low, high
            for i in range(N):
                X[line, i] = x[i, s]


@njit(cache=True, error_model="numpy", nogil=True)
def eliminate(values, ptr, source, col, outer_ptr, outer, hit, X, least):
    """Subtraction-free elimination of a small class for every sample; NaN where a pivot is 0. Parameters are those of
    `krylov`; X, shape (B, m), is the answer, and least, shape (B,), the smallest pivot."""
    m = len(ptr) - 1
    W = np.empty((m, m))
    leave, right, pivot = np.empty(m), np.empty(m), np.empty(m)
    for b in range(values.shape[0]):
        W[:] = 0.0
        for i in range(m):
            leave[i], right[i] = 0.0, 0.0
            for p in range(ptr[i], ptr[i + 1]):
                W[i, col[p]] = values[b, source[p]]
            for p in range(outer_ptr[i], outer_ptr[i + 1]):
                leave[i] += values[b, outer[p]]
                right[i] += values[b, outer[p]] * hit[p]
        for k in range(m - 1, -1, -1):
            total = leave[k]
            for j in range(k):
                total += W[k, j]
            pivot[k] = total
            for i in range(k):
                share = W[i, k] / total
                if share != 0:  # a NaN is not 0 either
                    for j in range(k):
                        W[i, j] += share * W[k, j]
                    leave[i] += share * leave[k]
                    right[i] += share * right[k]
        for k in range(m):
            total = right[k]
            for j in range(k):
                total += W[k, j] * X[b, j]
            X[b, k] = total / pivot[k]
        least[b] = pivot.min()


@njit(cache=True, error_model="numpy", nogil=True)
def _dot(x, y, out):
    """Inner products of the columns of (m, S) arrays."""
    out[:] = 0.0
    for i in range(x.shape[0]):
        for s in range(len(out)):
            out[s] += x[i, s] * y[i, s]


@njit(cache=True, error_model="numpy", nogil=True)
def _deflated(ptr, col, V, leave, w, coarse, c, x, y):
    """``P (x - V x)`` with ``P r = r - leave (w . r) / coarse``, in float32."""
    S = len(c)
    c[:] = 0.0
    for i in range(len(w)):
        for s in range(S):
            y[i, s] = x[i, s]
        for p in range(ptr[i], ptr[i + 1]):
            j = col[p]
            for s in range(S):
                y[i, s] -= V[p, s] * x[j, s]
        for s in range(S):
            c[s] += w[i] * y[i, s]
    for s in range(S):
        c[s] /= coarse[s]
    for i in range(len(w)):
        for s in range(S):
            y[i, s] -= leave[i, s] * c[s]


@njit(cache=True, error_model="numpy", nogil=True)
def _residual(ptr, col, V, leave, right, x, r):
    """``right - leave x + sum_j V_ij (x_j - x_i)``"""
    S = x.shape[1]
    for i in range(len(ptr) - 1):
        for s in range(S):
            r[i, s] = right[i, s] - leave[i, s] * x[i, s]
        for p in range(ptr[i], ptr[i + 1]):
            j = col[p]
            for s in range(S):
                r[i, s] += V[p, s] * (x[j, s] - x[i, s])


@njit(cache=True, error_model="numpy", nogil=True)
def _coarse_step(leave, w, coarse, x, r):
    """Add to x, in place, the constant that makes ``w . r`` zero; ``A 1 = leave`` exactly."""
    c = np.zeros(x.shape[1])
    for i in range(len(w)):
        for s in range(len(c)):
            c[s] += w[i] * r[i, s]
    c /= coarse
    for i in range(len(w)):
        for s in range(len(c)):
            x[i, s] += c[s]
        for s in range(len(c)):
            r[i, s] -= leave[i, s] * c[s]


@njit(cache=True, error_model="numpy", nogil=True)
def _bicgstab(ptr, col, V, leave, w, coarse, work, small, goal):
    """Deflated BiCGStab on ``P (I - V) x = r`` from x = 0 in float32; a column that is done stands still.

    ``work[0]`` is r in and garbage out, ``work[1]`` is x; `goal` are squared norms."""
    r, x, shadow, p, v, t = work[0], work[1], work[2], work[3], work[4], work[5]
    rho, alpha, omega, now = small[0], small[1], small[2], small[3]
    den, norm, beta, c = small[4], small[5], small[6], small[7]
    m, S = r.shape
    shadow[:] = r
    x[:] = 0.0
    p[:] = 0.0
    v[:] = 0.0
    rho[:], alpha[:], omega[:] = 1.0, 1.0, 1.0
    done = np.zeros(S, dtype=np.bool_)
    _dot(r, r, norm)
    now[:] = norm
    for _ in range(ITERATIONS):
        for s in range(S):
            done[s] |= not (norm[s] > goal[s] and now[s] != 0 and rho[s] != 0 and omega[s] != 0)
            beta[s] = np.float32(0) if done[s] else now[s] / rho[s] * (alpha[s] / omega[s])
            rho[s] = now[s]
        if done.all():
            break
        for i in range(m):
            for s in range(S):
                p[i, s] = r[i, s] + beta[s] * (p[i, s] - omega[s] * v[i, s])
        _deflated(ptr, col, V, leave, w, coarse, c, p, v)
        _dot(shadow, v, den)
        for s in range(S):
            done[s] |= den[s] == 0
            alpha[s] = np.float32(0) if done[s] else now[s] / den[s]
        for i in range(m):
            for s in range(S):
                r[i, s] -= alpha[s] * v[i, s]
        _deflated(ptr, col, V, leave, w, coarse, c, r, t)
        _dot(t, r, omega)
        _dot(t, t, den)
        for s in range(S):
            omega[s] = np.float32(0) if done[s] or den[s] == 0 else omega[s] / den[s]
        norm[:] = 0.0
        now[:] = 0.0
        for i in range(m):
            for s in range(S):
                x[i, s] += alpha[s] * p[i, s] + omega[s] * r[i, s]
            for s in range(S):
                r[i, s] -= omega[s] * t[i, s]
            for s in range(S):
                norm[s] += r[i, s] * r[i, s]
            for s in range(S):
                now[s] += shadow[i, s] * r[i, s]


@njit(cache=True, error_model="numpy", nogil=True)
def _load(values, line, ptr, source, outer_ptr, outer, hit, w, V, V32, leave, leave32, right, coarse, bad):
    """Rates of S samples, every row divided by its total; NaN in `bad` where an entry is not a number >= 0."""
    coarse[:] = 0.0
    bad[:] = 0.0
    for i in range(len(w)):
        for s in range(len(line)):
            v = values[line[s]]
            out, into, least = 0.0, 0.0, 0.0
            for p in range(outer_ptr[i], outer_ptr[i + 1]):
                a = v[outer[p]]
                out += a
                into += a * hit[p]
                least = a if a < least else least
            total = out
            for p in range(ptr[i], ptr[i + 1]):
                a = v[source[p]]
                total += a
                least = a if a < least else least
            scale = 1 / total  # a NaN spreads from here
            for p in range(ptr[i], ptr[i + 1]):
                V[p, s] = v[source[p]] * scale
                V32[p, s] = V[p, s]
            leave[i, s], right[i, s] = out * scale, into * scale
            leave32[i, s] = leave[i, s]
            coarse[s] += w[i] * leave[i, s]
            if least < 0:
                bad[s] = np.nan


@njit(cache=True, error_model="numpy", nogil=True)
def _sizes(x, top, spread):
    """Largest magnitude and spread of every column.

    The terms of row i of a residual add up to at most ``leave_i (1 + top) + spread`` in magnitude, as `right` is at
    most `leave` and the rates of a row at most 1."""
    low, high = np.full(len(top), np.inf), np.full(len(top), -np.inf)
    for i in range(len(x)):
        for s in range(len(top)):
            low[s] = min(low[s], x[i, s])
            high[s] = max(high[s], x[i, s])
    for s in range(len(top)):
        top[s], spread[s] = max(abs(low[s]), abs(high[s])), high[s] - low[s]


@njit(cache=True, error_model="numpy", nogil=True)
def _bounds(terms, lifted, leave, x, r, worst):
    """``max_i |r_i| / t_i`` with the rounding of r, and that of adding a constant to x after r was known.

    Adding rounds x by at most ``u |x|``, which moves a residual by twice that."""
    worst[:] = 0.0
    top, spread = np.empty(len(worst)), np.empty(len(worst))
    _sizes(x, top, spread)
    for i in range(len(terms)):
        slack = (terms[i] + 16) * U * 1.01
        for s in range(len(worst)):
            gap = abs(r[i, s]) + slack * (leave[i, s] * (1 + top[s]) + spread[s]) + 4 * U * top[s] + FAINT
            gap /= lifted[i, s]
            worst[s] = worst[s] if gap <= worst[s] else gap  # a NaN stays


@njit(cache=True, error_model="numpy", nogil=True)
def _lifted(ptr, col, V, leave, terms, x, r, top, spread, lifted):
    """``r = -A x``, and in `lifted` what ``A x`` is at least, its rounding taken off; 0 where that is not positive."""
    m, S = x.shape
    for i in range(m):
        for s in range(S):
            r[i, s] = -leave[i, s] * x[i, s]
        for p in range(ptr[i], ptr[i + 1]):
            j = col[p]
            for s in range(S):
                r[i, s] += V[p, s] * (x[j, s] - x[i, s])
    _sizes(x, top, spread)
    for i in range(m):
        slack = (terms[i] + 16) * U * 1.01
        for s in range(S):
            t = -r[i, s] - slack * (leave[i, s] * (1 + top[s]) + spread[s]) - FAINT
            lifted[i, s] = t if t > 0 and x[i, s] > 0 else 0.0


@njit(cache=True, error_model="numpy", nogil=True)
def krylov(values, ptr, source, col, outer_ptr, outer, hit, w, lift, tol, X, bound):
    """Deflated BiCGStab with difference-form refinement for every sample, and a proven bound of its error.

    Parameters
    ----------
    values : array, shape (B, nnz)
    ptr, source, col : int arrays, shape (m + 1,), (e,), (e,)
        Entries between the m unknown states: where they are stored, and the state they lead to.
    outer_ptr, outer, hit : arrays, shape (m + 1,), (f,), (f,)
        Entries to known states, and the known value (0 or 1).
    w : array, shape (m,)
        Nearly the law of the walk while it has not left: the coarse space is (1, w).
    lift : array, shape (m,)
        Nearly the mean number of steps until the walk leaves; positive.
    tol : float
        Passes end where the bound is below it.
    X : array, shape (B, m)
        Out.
    bound : array, shape (B,)
        Out: with A = I - V, V the entries divided by the row's total, and r the residual of x, any m >= 0 with
        ``A m >= t > 0`` shows that A is a nonsingular M-matrix and that ``|x - h| <= max_i(|r_i| / t_i) m``. Rounding
        of V, r and t is included; inf where no such t was found, NaN where an entry is not a number >= 0.
    """
    m, B = len(w), values.shape[0]
    S = min(WIDTH, B)
    V, V32 = np.empty((len(source), S)), np.empty((len(source), S), dtype=np.float32)
    leave, right, x = np.empty((m, S)), np.empty((m, S)), np.empty((m, S))
    r, lifted = np.empty((m, S)), np.empty((m, S))
    leave32, w32 = np.empty((m, S), dtype=np.float32), w.astype(np.float32)
    work, small = np.empty((6, m, S), dtype=np.float32), np.empty((8, S), dtype=np.float32)
    goal, worst, unit, coarse, bad = np.empty(S), np.empty(S), np.empty(S), np.empty(S), np.empty(S)
    line = np.empty(S, dtype=np.int64)
    terms = np.diff(ptr) + np.diff(outer_ptr)
    top, spread = np.empty(S), np.empty(S)
    for b in range(0, B, S):
        for s in range(S):
            line[s] = min(b + s, B - 1)
            for i in range(m):
                x[i, s] = lift[i]
        _load(values, line, ptr, source, outer_ptr, outer, hit, w, V, V32, leave, leave32, right, coarse, bad)
        _lifted(ptr, col, V, leave, terms, x, r, top, spread, lifted)
        if not (
            lifted > 0
        ).all():  # these samples are too far from the chain that the lift is of: sweeps make it theirs
            for _ in range(SWEEPS):
                for i in range(m):
                    for s in range(S):
                        x[i, s] += r[i, s] + 1.0
                _lifted(ptr, col, V, leave, terms, x, r, top, spread, lifted)
        x[:] = 0.0
        r[:] = right
        worst[:] = np.inf
        for _ in range(PASSES):
            _coarse_step(leave, w, coarse, x, r)
            unit[:] = 0.0
            for i in range(m):
                for s in range(S):
                    unit[s] = abs(r[i, s]) if abs(r[i, s]) > unit[s] else unit[s]
            for s in range(S):
                unit[s] = unit[s] if unit[s] > 0 else 1.0
            goal[:] = 0.0
            for i in range(m):
                for s in range(S):
                    work[0, i, s] = r[i, s] / unit[s]
                    goal[s] += work[0, i, s] * work[0, i, s]
            for s in range(S):  # as far as float32 goes, or as tol needs
                goal[s] *= max(INNER, min(0.1 * tol / (worst[s] * top[s]), 0.1)) ** 2
            _bicgstab(ptr, col, V32, leave32, w32, coarse.astype(np.float32), work, small, goal)
            for i in range(m):
                for s in range(S):
                    x[i, s] += work[1, i, s] * unit[s]
            _residual(ptr, col, V, leave, right, x, r)
            _coarse_step(leave, w, coarse, x, r)
            _bounds(terms, lifted, leave, x, r, worst)
            if not (worst * top > tol).any():
                break
        for s in range(S - 1, -1, -1):
            bound[line[s]] = worst[s] * top[s] * (1 + 4 * U) + bad[s]
            for i in range(m):
                X[line[s], i] = x[i, s]
