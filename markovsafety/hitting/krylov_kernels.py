"""Compiled loops of `krylov`: sweeps in single precision, residuals in double.

The inner solver may be as inexact as it likes; only `defect` enters a proof (papers/markovsafety/certificates.md,
section 3), and its docstring says what is rounded. Indices are unsigned: numba wraps signed ones around, which costs as
much again as the sweep itself.
"""

from __future__ import annotations

import numpy as np

from ..compiled_kernels import njit

__all__ = ["REFINED", "bicgstab", "defect", "localize", "refine"]

U = 2.0**-53
OUTER = 12
REFINED = 0  # state of `refine`: converged; 1: the corrections do not shrink
ONE, TWO, THREE = np.uint64(1), np.uint64(2), np.uint64(3)


@njit(cache=True, error_model="numpy")
def localize(starts, ends, indices, data, out, own, place, near, cols, vals):
    """Cut a class out of the chain, every row divided by its total rate.

    Row i of the chain is ``starts[i] .. ends[i]``; `place` holds the local number of every state, -1 outside. Returns
    where each row begins, columns and values inside (in `cols` and `vals`); the share of each row that leaves, the most
    rates of a row, and the states outside that are moved to (`near` is room for them).
    """
    m = len(own)
    most = np.uint64(0)
    ptr = np.empty(m + 1, np.uint64)
    leave = np.empty(m)
    found, at = 0, np.uint64(0)
    ptr[0] = 0
    for i in range(m):
        row = own[i]
        scale = 1.0 / out[row]
        gone = 0.0
        most = max(most, np.uint64(ends[row]) - np.uint64(starts[row]))
        for p in range(np.uint64(starts[row]), np.uint64(ends[row])):
            j = place[indices[p]]
            if j >= 0:
                cols[at] = j
                vals[at] = data[p] * scale
                at += ONE
            else:
                gone += data[p]
                if j == -1:  # -2 once noted, and -1 again below
                    place[indices[p]] = -2
                    near[found] = indices[p]
                    found += 1
        leave[i] = gone * scale
        ptr[i + 1] = at
    for p in range(found):
        place[near[p]] = -1
    return (ptr, cols[:at], vals[:at]), leave, most, near[:found].copy()


@njit(cache=True, error_model="numpy")
def defect(starts, ends, indices, data, own, D, gain, r, size):
    """Residual ``sum_j w_ij (D_j - D_i) + gain_i`` of the states `own`, and the sum of the magnitudes of its terms.

    Rounded are each difference, each product, and the sums, at most as many for each term as the row has rates.
    """
    for i in range(len(own)):
        row = own[i]
        here = D[row]
        total, weight = gain[i], abs(gain[i])
        for p in range(np.uint64(starts[row]), np.uint64(ends[row])):
            part = data[p] * (D[indices[p]] - here)
            total += part
            weight += abs(part)
        r[i], size[i] = total, weight


@njit(cache=True, error_model="numpy")
def _start(small, b):
    """``(I - L)^-1 b``."""
    ptr, cols, vals = small
    r = np.zeros(len(b), np.float32)
    begin = ptr[0]
    for i in range(len(b)):
        end = ptr[i + 1]
        s = np.float32(0.0)
        for k in range(begin, end):
            s += vals[k] * r[cols[k]]  # from i on r is still zero
        begin = end
        r[i] = b[i] + s
    return r


@njit(cache=True, error_model="numpy")
def _apply(small, p, g, v, mean, shadow):
    """``v = p - G p + mean``, G a Gauss-Seidel sweep; g holds a copy of p. Returns shadow.v, v.v and the sum of v."""
    ptr, cols, vals = small
    first, second, third = 0.0, 0.0, 0.0
    begin = ptr[0]
    for i in range(len(p)):
        end = ptr[i + 1]
        s = np.float32(0.0)
        for k in range(begin, end):
            s += vals[k] * g[cols[k]]
        begin = end
        g[i] = s
        x = p[i] - s + mean
        v[i] = x
        first += shadow[i] * x
        second += x * x
        third += x
    return first, second, third


@njit(cache=True, error_model="numpy")
def _dots(a, b):
    """a.a and a.b, in four strands."""
    m = len(a)
    a0, a1, a2, a3, b0, b1, b2, b3 = 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0
    for q in range(m // 4):
        i = np.uint64(4 * q)
        w, x, y, z = np.float64(a[i]), np.float64(a[i + ONE]), np.float64(a[i + TWO]), np.float64(a[i + THREE])
        a0 += w * w
        a1 += x * x
        a2 += y * y
        a3 += z * z
        b0 += w * b[i]
        b1 += x * b[i + ONE]
        b2 += y * b[i + TWO]
        b3 += z * b[i + THREE]
    for i in range(m - m % 4, m):
        a0 += np.float64(a[i]) * a[i]
        b0 += np.float64(a[i]) * b[i]
    return (a0 + a1) + (a2 + a3), (b0 + b1) + (b2 + b3)


@njit(cache=True, error_model="numpy")
def bicgstab(small, b, phi, tol, limit):
    """Solve ``(I - G) x + phi (sum x) 1 = (I - L)^-1 b``: G a Gauss-Seidel sweep, L the rates to earlier states.

    H. A. van der Vorst, SIAM J. Sci. Stat. Comput. 13 (1992) 631. Where the recurrence breaks down it starts again from
    the residual it has. Returns x, its sum, and the number of iterations.
    """
    m = len(b)
    r = _start(small, b)
    x, v, p = np.zeros(m, np.float32), np.zeros(m, np.float32), np.zeros(m, np.float32)
    t, g, shadow = np.empty(m, np.float32), np.empty(m, np.float32), r.copy()
    norm, total = _dots(r, np.ones(m, np.float32))
    goal, length, now = tol * tol * norm, norm, norm
    beta, omega, sum_p, sum_v = np.float32(0.0), np.float32(0.0), 0.0, 0.0
    done = 0
    while done < limit and norm > goal and norm < np.inf:
        done += 1
        if not now * now > 1e-12 * norm * length:
            shadow[:] = r
            length, now, beta = norm, norm, np.float32(0.0)
        for i in range(m):
            y = r[i] + beta * (p[i] - omega * v[i])
            p[i] = y
            g[i] = y
        sum_p = total + beta * (sum_p - omega * sum_v)
        along, _, sum_v = _apply(small, p, g, v, np.float32(phi * sum_p), shadow)
        if along == 0.0:
            break
        alpha = np.float32(now / along)
        for i in range(m):
            y = r[i] - alpha * v[i]
            r[i] = y
            g[i] = y
        total -= alpha * sum_v
        along, square, sum_t = _apply(small, r, g, t, np.float32(phi * total), r)
        omega = np.float32(along / square) if square > 0.0 else np.float32(0.0)
        total -= omega * sum_t
        for i in range(m):
            x[i] += alpha * p[i] + omega * r[i]
            r[i] -= omega * t[i]
        last = now
        norm, now = _dots(r, shadow)
        if omega == 0.0:
            now = 0.0
        else:
            beta = np.float32(now / last * alpha / omega)
    total = _dots(x, np.ones(m, np.float32))[1]
    return x, total, done


@njit(cache=True, error_model="numpy")
def refine(chain, own, out, small, z, phi, sum_z, near, known, gain, D, r, size, tight, limit):
    """Correct ``x = c + D`` until nothing moves; D is 0 on the class at first.

    Parameters
    ----------
    chain : (starts, ends, indices, data)
    small : tuple
        From `localize`.
    z, phi, sum_z : array, float, float
        The solution of `bicgstab` for the right side `leave`, the phi it used, and the sum of z.
    near, known : arrays
        The states next to the class and their values.
    tight : bool
        End with r and size, the residual of the answer.

    Returns
    -------
    c, state
    """
    starts, ends, indices, data = chain
    m = len(own)
    b = np.empty(m, np.float32)
    goal = U if tight else 8 * U  # relative error left
    c, change, value, last, tol = 0.0, np.inf, 0.0, np.inf, 1.0
    for outer in range(OUTER):
        for q in range(len(near)):
            D[near[q]] = known[q] - c
        defect(starts, ends, indices, data, own, D, gain, r, size)
        top = 0.0
        for i in range(m):
            top = max(top, abs(r[i]) / out[own[i]])
        if not top < np.inf:
            return c, 1
        if top == 0.0:
            return c, REFINED
        rate = top / last
        if outer > 0:
            if change * rate <= 0.25 * goal * value:
                return c, REFINED
            if rate > 0.1:  # at rest: fine at the level of rounding only
                return c, REFINED if change <= 64 * U * value else 1
            tol = min(1e-1, max(1e-6, goal * value / (change * rate)))
        else:
            tol = 1e-6
        for i in range(m):
            b[i] = r[i] / (top * out[own[i]])
        y, total, _ = bicgstab(small, b, phi, tol, limit)
        s = total * top / sum_z if phi > 0.0 else 0.0
        moved, value = abs(s), 0.0
        c += s
        for i in range(m):
            step = y[i] * top - s * z[i]
            D[own[i]] += step
            moved = max(moved, abs(step))
            value = max(value, abs(c + D[own[i]]))
        change, last = moved, top
        if not (change < np.inf):
            return c, 1
        if not tight and outer > 0 and change * tol <= 2.0 * goal * value:
            return c, REFINED
    return c, 1
