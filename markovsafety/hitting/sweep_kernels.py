"""Compiled Gauss-Seidel sweeps in single precision for classes that mix fast, of the equation and of its transpose.

On a class without structure the eigenvalues of a sweep fill a disc around 0, next to one near 1; on a disc no
polynomial in the sweep beats its powers (so no Krylov method does, and none is needed), and the one eigenvalue is taken
out by a second vector. Nothing here enters a proof but what `defect` of `krylov_kernels` finds afterwards.
"""

from __future__ import annotations

import numpy as np

from ..compiled_kernels import njit
from .krylov_kernels import defect

__all__ = ["SETTLED", "SLOW", "TRIED", "settle", "settle_flow", "smooth", "turned"]

U = 2.0**-53
OUTER = 8
SETTLED, SLOW = 0, 1  # states of `settle`
TRIED = 6  # sweeps after which a class that mixes too slowly is given up
MOST = 26  # sweeps per correction
PACE = 0.6  # shrinking per sweep that is fast enough
FINE = 1e-6  # what one correction can gain in single precision


@njit(cache=True, error_model="numpy")
def _both(small, B, G, Y, tol):
    """Sum up the sweeps from two right-hand sides at once, until what is left of them is parallel.

    G and Y are 0 at first; then G holds what is left after the last sweep, Y the sum of all before it. Returns s, such
    that G[:, 0] is nearly s G[:, 1], and whether that was reached.
    """
    ptr, cols, vals = small
    m = len(B)
    none = np.float32(0.0)
    start, least = 0.0, np.inf
    for sweep in range(MOST):
        aa, ab, bb = 0.0, 0.0, 0.0
        begin = ptr[0]
        for i in range(m):
            end = ptr[i + 1]
            if sweep == 0:  # later states are still 0
                s, t = B[i, 0], B[i, 1]
            else:
                s, t = none, none
                Y[i, 0] += G[i, 0]
                Y[i, 1] += G[i, 1]
            for k in range(begin, end):
                j = cols[k]
                s += vals[k] * G[j, 0]
                t += vals[k] * G[j, 1]
            begin = end
            G[i, 0], G[i, 1] = s, t
            x, y = np.float64(s), np.float64(t)
            aa += x * x
            ab += x * y
            bb += y * y
        if not (0.0 < bb < np.inf and aa < np.inf):
            return 0.0, False
        left = aa - ab * ab / bb
        if sweep == 0:
            start = aa
        if left <= tol * tol * start:
            return ab / bb, True
        if sweep % TRIED == 0:
            if left > least * PACE ** (2 * TRIED):
                return 0.0, False
            least = left
    return 0.0, False


@njit(cache=True, error_model="numpy")
def _one(small, b, w, g, y, tol):
    """The same for one right-hand side, w being what a second one left."""
    ptr, cols, vals = small
    m = len(b)
    ww = 0.0
    for i in range(m):
        ww += np.float64(w[i]) * w[i]
        g[i], y[i] = 0.0, 0.0
    start, least = 0.0, np.inf
    for sweep in range(MOST):
        aa, ab = 0.0, 0.0
        begin = ptr[0]
        for i in range(m):
            end = ptr[i + 1]
            s = b[i] if sweep == 0 else np.float32(0.0)
            y[i] += g[i]
            for k in range(begin, end):
                s += vals[k] * g[cols[k]]
            begin = end
            g[i] = s
            x = np.float64(s)
            aa += x * x
            ab += x * w[i]
        if not aa < np.inf:
            return 0.0, False
        left = aa - ab * ab / ww
        if sweep == 0:
            start = aa
        if left <= tol * tol * start:
            return ab / ww, True
        if sweep % TRIED == 0:
            if left > least * PACE ** (2 * TRIED):
                return 0.0, False
            least = left
    return 0.0, False


@njit(cache=True, error_model="numpy")
def settle(chain, own, out, small, leave, shared, z, w, near, known, gain, D, r, size, tight):
    """Correct ``x = c + D`` until nothing moves; D is 0 on the class at first.

    Parameters
    ----------
    chain : (starts, ends, indices, data)
    small, leave : tuple, array
        From `localize`.
    shared : bool
        Whether z, the sum of the sweeps from `leave`, and w, what they left, are known; else they are filled in.
    near, known : arrays
        The states next to the class and their values.
    tight : bool
        End with r and size, the residual of the answer.

    Returns
    -------
    c, state

    Notes
    -----
    With ``A 1 = leave``, the sum z of k sweeps G from the right-hand side `leave` has ``A (1 - z)`` equal to what is
    left of it, ``G^k leave``. If the same number from a residual leaves s times that, subtracting ``s (1 - z)`` removes
    it.
    """
    starts, ends, indices, data = chain
    m = len(own)
    b, g, y = np.empty(m, np.float32), np.empty(m, np.float32), np.empty(m, np.float32)
    goal = U if tight else 8 * U  # relative error left
    most, scale = 0.0, np.empty(m)
    for i in range(m):
        most = max(most, leave[i])
        scale[i] = 1.0 / out[own[i]]
    c, change, value, last = 0.0, np.inf, 0.0, np.inf
    for outer in range(OUTER):
        for q in range(len(near)):
            D[near[q]] = known[q] - c
        defect(starts, ends, indices, data, own, D, gain, r, size)
        top = 0.0
        for i in range(m):
            top = max(top, abs(r[i]) * scale[i])
        if not top < np.inf:
            return c, SLOW
        if top == 0.0:
            return c, SETTLED
        rate = top / last
        tol = FINE
        if outer > 0:
            if change * rate <= 0.25 * goal * value:
                return c, SETTLED
            if rate > 0.1:  # at rest: fine at the level of rounding only
                return c, SETTLED if change <= 64 * U * value else SLOW
            tol = min(1e-1, max(FINE, goal * value / (change * rate)))
        if shared:
            for i in range(m):
                b[i] = r[i] * scale[i] / top
            s, fine = _one(small, b, w, g, y, tol)
        else:
            B, G, Y = np.empty((m, 2), np.float32), np.zeros((m, 2), np.float32), np.zeros((m, 2), np.float32)
            for i in range(m):
                B[i, 0], B[i, 1] = r[i] * scale[i] / top, leave[i] / most
            s, fine = _both(small, B, G, Y, tol)
            for i in range(m):
                y[i], w[i], z[i] = Y[i, 0], G[i, 1], Y[i, 1] * most
            shared = True
        if not fine:
            return c, SLOW
        s *= top / most
        moved, value = abs(s), 0.0
        c += s
        for i in range(m):
            step = y[i] * top - s * z[i]
            here = D[own[i]] + step
            D[own[i]] = here
            moved = max(moved, abs(step))
            value = max(value, abs(c + here))
        change, last = moved, top
        if not change < np.inf:
            return c, SLOW
        if not tight and outer > 0 and change * tol <= 2.0 * goal * value:
            return c, SETTLED
    return c, SLOW


@njit(cache=True, error_model="numpy")
def smooth(small, leave, z, v):
    """``v = leave + B z``: one sweep that takes all its values from the last."""
    ptr, cols, vals = small
    begin = ptr[0]
    for i in range(len(z)):
        s = leave[i]
        for k in range(begin, ptr[i + 1]):
            s += vals[k] * z[cols[k]]
        begin = ptr[i + 1]
        v[i] = s


@njit(cache=True, error_model="numpy")
def turned(small):
    """Rows become columns."""
    ptr, cols, vals = small
    m = len(ptr) - 1
    at = np.zeros(m + 1, np.uint64)
    for j in cols:
        at[j + np.uint32(1)] += np.uint64(1)
    at = np.cumsum(at)
    begin = at.copy()
    rows, turned_vals = np.empty(len(cols), np.uint32), np.empty(len(cols), np.float32)
    for i in range(m):
        for k in range(ptr[i], ptr[i + 1]):
            q = at[cols[k]]
            rows[q], turned_vals[q] = i, vals[k]
            at[cols[k]] = q + np.uint64(1)
    return begin, rows, turned_vals


@njit(cache=True, error_model="numpy")
def settle_flow(inside, out, back, leave, shared, w, source, u, rounds):
    """Solve ``u_j = s_j + sum_i u_i w_ij / d_i``: all that moves out of the states of a class.

    Parameters
    ----------
    inside : (indptr, indices, data)
        Rates inside the class.
    back : tuple
        From `turned`.
    shared : bool
        Whether w, what sweeps leave of equal mass everywhere, is known; else it is filled in.
    u : array
        0 at first.
    rounds : int
        Most corrections; with 1 what is left is not looked at.

    Returns
    -------
    state

    Notes
    -----
    What sweeps leave is near the one vector that they hardly change. How much of it is missing follows from the
    balance: all mass leaves in the end, ``sum_i u_i leave_i = sum_i s_i``; no leak is too small for that.
    """
    ptr, cols, vals = inside
    m = len(u)
    b, g, y, r = np.empty(m, np.float32), np.empty(m, np.float32), np.empty(m, np.float32), np.empty(m)
    supply = 0.0
    for i in range(m):
        supply += source[i]
    last = np.inf
    for outer in range(rounds):
        gone = 0.0
        for i in range(m):
            r[i] = source[i] - u[i]
            gone += u[i] * leave[i]
        if outer > 0:
            for i in range(m):
                x = u[i] / out[i]
                for k in range(ptr[i], ptr[i + 1]):
                    r[cols[k]] += x * vals[k]
        top = 0.0
        for i in range(m):
            top = max(top, abs(r[i]))
        if top == 0.0:
            return SETTLED if shared else SLOW
        if not top < np.inf:
            return SLOW
        if shared:
            for i in range(m):
                b[i] = r[i] / top
            s, fine = _one(back, b, w, g, y, FINE)
        else:
            B, G, Y = np.ones((m, 2), np.float32), np.zeros((m, 2), np.float32), np.zeros((m, 2), np.float32)
            for i in range(m):
                B[i, 0] = r[i] / top
            s, fine = _both(back, B, G, Y, FINE)
            for i in range(m):
                y[i], w[i] = Y[i, 0], G[i, 1]
            shared = True
        if not fine:
            return SLOW
        shed, due = 0.0, 0.0
        for i in range(m):
            shed += np.float64(y[i]) * leave[i]
            due += np.float64(w[i]) * leave[i]
        s = (supply - gone - top * shed) / due
        moved = 0.0
        for i in range(m):
            step = y[i] * top + s * w[i]
            u[i] += step
            moved = max(moved, abs(step) / abs(u[i]))
        if rounds == 1 or moved <= 16 * U:
            return SETTLED
        if outer > 0 and moved > 0.1 * last:
            return SETTLED if last <= 1e-13 else SLOW
        if outer > 0 and moved * moved <= 1e-15 * last:
            return SETTLED
        last = moved
    return SLOW
