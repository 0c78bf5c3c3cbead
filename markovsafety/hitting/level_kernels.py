"""Compiled recursions without a linear solve: one layer of a layered chain, or states on no cycle in their order.

Every kernel only adds and multiplies non-negative numbers in the order written here; the counts of roundings that it
reports are theorems about this order. Where multiply-adds may be fused (`FUSED`, by the machine's instructions) a
product and the addition behind it round once instead of twice, which only lowers the counts. Sums run in two
interleaved parts, which is faster and rounds less: a term of a row of k costs `_row_count` roundings instead of k.
Unsigned positions keep the compiler from testing every index for a negative sign. Rows are asked for ahead
(`prefetch`), because a matrix comes from memory once and a row ends before the machine has seen a pattern.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from ..compiled_kernels import njit

U = 2.0**-53
HUGE = 1.7e308
FUSED = {"contract"}
ONE, TWO, EIGHT = np.uint64(1), np.uint64(2), np.uint64(8)
AHEAD = np.uint64(512)  # entries between what is read and what is asked for: some pages of values and of columns
STATES = 12  # of an order, between what is solved and what is asked for


def _asking(typing, array, index):
    """Ask for the memory of an entry; an index that is out of range does no harm."""

    def generate(context, builder, signature, args):
        byte, word = ir.IntType(8).as_pointer(), ir.IntType(32)
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        where = builder.bitcast(builder.gep(data, [args[1]]), byte)
        kind = ir.FunctionType(ir.VoidType(), [byte, word, word, word])
        ask = builder.module.declare_intrinsic("llvm.prefetch", [byte], kind)
        builder.call(ask, [where, word(0), word(3), word(1)])  # to read, to be kept, data
        return context.get_dummy_value()

    return types.void(array, index), generate


prefetch: Any = intrinsic(_asking)


@njit(cache=True, error_model="numpy")
def room(n):
    """``gamma(n)`` and what applying it rounds, as `certify.gamma` and `certify.widen` have it."""
    x = n * (U * (1 + 4 * U))
    if not x < 0.5:
        return np.inf
    return x / (1 - x) * (1 + 8 * U) * (1 + 8 * U) + 8 * U


@njit(cache=True, error_model="numpy")
def below(x, error, slack):
    """A lower end; never above 1.7e308, so that an overflow of the value stays enclosed."""
    low = x * max(1 - error, 0.0) - slack
    return min(low, HUGE) if low > 0 else 0.0


@njit(cache=True, error_model="numpy")
def above(x, error, slack, ceiling):
    """An upper end, at most the ceiling."""
    high = x * (1 + error) + slack
    return high if high < ceiling else ceiling


@njit(cache=True, error_model="numpy")
def _row_count(k):
    """Roundings of a term in `_dot`: its product, the additions of its part (the first adds to 0), one that joins."""
    return k if k < 2 else (k + 1) // 2 + 1


@njit(cache=True, error_model="numpy", fastmath=FUSED)
def _dot(start, end, indices, data, x):
    """``sum_k data_k x[indices_k]`` over the positions start to end of a row."""
    whole = start + ((end - start) & ~1)
    a = b = 0.0
    for k in range(np.uint64(start), np.uint64(whole), TWO):
        a += data[k] * x[np.uint64(indices[k])]
        b += data[k + ONE] * x[np.uint64(indices[k + ONE])]
    if whole < end:
        a += data[np.uint64(whole)] * x[np.uint64(indices[np.uint64(whole)])]
    return a + b


@njit(cache=True, error_model="numpy", fastmath=FUSED)
def _dots(indptr, indices, data, fixed, x, y):
    """`_dot` with x of every row that is not fixed, at most 1.

    It is written out because the compiler counts references of arrays row by row where a call and `prefetch` meet.
    """
    for i in range(len(y)):
        if fixed[i]:
            continue
        start, end = np.intp(indptr[i]), np.intp(indptr[i + 1])
        ahead = np.uint64(start) + AHEAD
        prefetch(indices, ahead)
        prefetch(data, ahead)
        prefetch(data, ahead + EIGHT)
        whole = start + ((end - start) & ~1)
        a = b = 0.0
        for k in range(np.uint64(start), np.uint64(whole), TWO):
            a += data[k] * x[np.uint64(indices[k])]
            b += data[k + ONE] * x[np.uint64(indices[k + ONE])]
        if whole < end:
            a += data[np.uint64(whole)] * x[np.uint64(indices[np.uint64(whole)])]
        y[i] = a + b if a + b < 1 else 1.0


@njit(cache=True, error_model="numpy")
def _any(start, end, indices, data, marked):
    for k in range(np.uint64(start), np.uint64(end)):  # noqa: SIM110 (a generator would not compile)
        if marked[np.uint64(indices[k])] and data[k] > 0:
            return True
    return False


@njit(cache=True, error_model="numpy")
def hit_back(indptr, indices, data, fixed, t, X, live, error):
    """One layer of ``x_t = min(1, P_t x_(t+1))``: value, whether it is zero by the graph, and the enclosure.

    Parameters
    ----------
    fixed : bool array, shape (n,)
        States whose value is the same at every layer; ``X[:, t]`` and ``live[t]`` hold it already.
    X : array, shape (c, L + 1, n)
        Value, or value, lower, upper; rows behind t are done.
    live : bool array, shape (L + 1, n)
    error : array, shape (2,)
        Roundings in, and units of 2^-1074 lost by, the values behind t; moved on to t.
    """
    x = X[0, t]
    _dots(indptr, indices, data, fixed, X[0, t + 1], x)
    if len(X) == 1:
        return
    alive, last, most = live[t + 1], live[t], 0
    for i in range(len(fixed)):
        if not fixed[i]:
            start, end = np.intp(indptr[i]), np.intp(indptr[i + 1])
            most = max(most, end - start)
            # A positive sum is proof of a path; a zero may be a product that was lost.
            last[i] = x[i] > 0 or _any(start, end, indices, data, alive)
    error[0] += _row_count(most)
    # Rows sum to at most 1 + 1e-9, a product loses at most half a unit: (1 + 2^-20) covers both and what rounds them.
    error[1] = error[1] * (1 + 2.0**-20) + most
    gap, slack = room(error[0]), 2 * np.ceil(error[1]) * 2.0**-1074
    for i in range(len(fixed)):
        if not fixed[i]:
            X[1, t, i] = below(x[i], gap, slack)
            X[2, t, i] = above(x[i], gap, slack, 1.0) if last[i] else 0.0


@njit(cache=True, error_model="numpy")
def gain_back(indptr, indices, data, fixed, live, t, X, gain):
    """One layer of ``x_t = P_t x_(t+1) + c_t`` where live, 0 elsewhere; every column has its own gain.

    A term costs what it costs in `_dot` and the addition of the gain; the ends are moved outward by this at every
    layer, with 2 units of underflow for every product.
    """
    for i in range(len(fixed)):
        if fixed[i]:
            continue
        if not live[t, i]:
            X[:, t, i] = 0.0
            continue
        start, end = np.intp(indptr[i]), np.intp(indptr[i + 1])
        for c in range(len(X)):
            X[c, t, i] = _dot(start, end, indices, data, X[c, t + 1]) + gain[i, c]
        if len(X) == 3:
            k = end - start
            gap, slack = room(_row_count(k) + 1), 2 * (k + 1) * 2.0**-1074
            X[1, t, i] = below(X[1, t, i], gap, slack)
            X[2, t, i] = above(X[2, t, i], gap, slack, np.inf)
            X[0, t, i] = min(max(X[0, t, i], X[1, t, i]), X[2, t, i])


@njit(cache=True, error_model="numpy")
def some_back(indptr, indices, data, fixed, t, marked):
    """``marked[t]``: which rows have a positive entry to a state marked behind; fixed states are left alone."""
    for i in range(len(fixed)):
        if not fixed[i]:
            marked[t, i] = _any(np.intp(indptr[i]), np.intp(indptr[i + 1]), indices, data, marked[t + 1])


@njit(cache=True, error_model="numpy")
def leave(indptr, indices, data, stay):
    """Clear `stay` where a row has a positive entry off the diagonal."""
    for i in range(len(stay)):
        for k in range(indptr[i], indptr[i + 1]):
            if indices[k] != i and data[k] > 0:
                stay[i] = False


@njit(cache=True, error_model="numpy")
def push(indptr, indices, data, moving, t, Z, count, lost):
    """One layer of ``z_(t+1) = z_t P_t``, scattered row by row, with enclosure.

    Parameters
    ----------
    Z : array, shape (c, L + 1, n)
        Value, or value, lower, upper; zero behind t.
    count : int array, shape (2, n)
        Roundings in every value at t, -1 where the graph says it is zero; moved on to t + 1. The second row is room.
    lost : float
        Units of 2^-1074 that all values at t together may have lost.

    Returns
    -------
    float
        `lost` at t + 1.
    """
    here, z, top, terms = Z[0, t], Z[0, t + 1], count[1], np.zeros(len(moving), dtype=np.int64)
    top[:] = -1
    moved = 0
    for i in range(len(moving)):
        if not moving[i] or count[0, i] < 0:
            continue
        moved += indptr[i + 1] - indptr[i]
        for k in range(np.uint64(indptr[i]), np.uint64(indptr[i + 1])):
            j = np.uint64(indices[k])
            z[j] += here[i] * data[k]
            terms[j] += 1
            top[j] = max(top[j], count[0, i])
    lost = np.ceil(lost * (1 + 2.0**-20)) + moved
    for j in range(len(moving)):
        # A sum of m products: one rounding each and m - 1 additions, the first being to 0.
        count[0, j] = top[j] + terms[j] if terms[j] else -1
        if len(Z) == 3 and terms[j]:
            gap, slack = room(count[0, j]), 2 * lost * 2.0**-1074
            Z[1, t + 1, j] = below(z[j], gap, slack)
            Z[2, t + 1, j] = above(z[j], gap, slack, np.inf)
    return lost


@njit(cache=True, error_model="numpy", fastmath=FUSED)
def values(indptr, indices, data, out, order, gain, ceiling, x):
    """The values of `substitute` alone; its sums are those of `_dot`. States further on in the order are asked for."""
    m = len(order)
    for s in range(m):
        far = np.uint64(order[min(s + 2 * STATES, m - 1)])
        prefetch(indptr, far)
        prefetch(out, far)
        row = np.uint64(indptr[np.uint64(order[min(s + STATES, m - 1)])])
        prefetch(indices, row)
        prefetch(indices, row + TWO * EIGHT)
        prefetch(data, row)
        prefetch(data, row + EIGHT)
        prefetch(data, row + TWO * EIGHT)
        i = np.int64(order[s])
        start, end = np.int64(indptr[i]), np.int64(indptr[i + 1])
        whole = start + ((end - start) & ~1)
        a = b = 0.0
        for k in range(np.uint64(start), np.uint64(whole), TWO):
            a += data[k] * x[np.uint64(indices[k])]
            b += data[k + ONE] * x[np.uint64(indices[k + ONE])]
        if whole < end:
            a += data[np.uint64(whole)] * x[np.uint64(indices[np.uint64(whole)])]
        total = a + b
        if len(gain):
            total += gain[i]
        x[i] = min(total / out[i], ceiling)


@njit(cache=True, error_model="numpy")
def ends(indptr, order, level, levels, errors, x, low, high):
    """Enclose probabilities that `values` found from exact ones, by the roundings on the way to each level.

    A state of k rates at some level adds `_row_count` of k for the sum, k - 1 for its total rate, one for the quotient
    and twice the errors of the rates to the most of the level below; and 4 (k + 1) units of underflow to what is lost
    there, which arrives with weights that add up to 1, but for roundings.
    """
    longest = np.zeros(levels + 1, dtype=np.int64)
    for s in range(len(order)):
        i = np.uint64(order[s])
        longest[level[i]] = max(longest[level[i]], np.int64(indptr[i + ONE]) - np.int64(indptr[i]))
    gap, slack = np.zeros(levels + 1), np.zeros(levels + 1)
    count, lost = 0, 0.0
    for step in range(1, levels + 1):
        k = longest[step]
        count += _row_count(k) + k + 2 * errors
        lost = lost * (1 + 2.0**-20) + 4 * (k + 1)
        gap[step], slack[step] = room(count), 2 * np.ceil(lost) * 2.0**-1074
    for s in range(len(order)):
        i = np.uint64(order[s])
        low[i] = below(x[i], gap[level[i]], slack[level[i]])
        high[i] = above(x[i], gap[level[i]], slack[level[i]], 1.0)


@njit(cache=True, error_model="numpy")
def substitute(indptr, indices, data, out, order, gain, errors, ceiling, X):
    """``x_i = (c_i + sum_j w_ij x_j) / d_i`` for the states in `order`, in this order, in place; ends moved outward.

    X and gain (empty: 0) have the columns value, lower, upper. A sum of k terms runs in two parts, evens and odds: a
    product, at most (k + 1) // 2 - 1 additions, one that joins, that of the gain. The total rate has k - 1 additions,
    the quotient one more rounding; rates that were rounded count above and below.
    """
    for s in range(len(order)):
        i = np.int64(order[s])
        start, end = np.int64(indptr[i]), np.int64(indptr[i + 1])
        d, k = out[i], end - start
        x = low = high = y = bottom = top = 0.0
        whole = start + ((end - start) & ~1)
        for p in range(np.uint64(start), np.uint64(whole), TWO):
            j, w = np.uint64(indices[p]), data[p]
            x += w * X[j, 0]
            low += w * X[j, 1]
            high += w * X[j, 2]
            j, w = np.uint64(indices[p + ONE]), data[p + ONE]
            y += w * X[j, 0]
            bottom += w * X[j, 1]
            top += w * X[j, 2]
        if whole < end:
            j, w = np.uint64(indices[np.uint64(whole)]), data[np.uint64(whole)]
            x += w * X[j, 0]
            low += w * X[j, 1]
            high += w * X[j, 2]
        x, low, high = x + y, low + bottom, high + top
        if len(gain):
            x, low, high = x + gain[i, 0], low + gain[i, 1], high + gain[i, 2]
        x, low, high = x / d, low / d, high / d
        error, slack = room((k + 1) // 2 + 2 + k + 2 * errors), 4 * (k + 1) * 2.0**-1074
        X[i, 1] = below(low, error, slack)
        X[i, 2] = above(high, error, slack, ceiling)
        X[i, 0] = min(max(x, X[i, 1]), X[i, 2])


@njit(cache=True, error_model="numpy")
def _settle(Z, i, arrivals, divisor, more):
    """Divide what has arrived in state i by its total rate and move the ends outward.

    A sum of m products and the source has m + 1 roundings, `more` are those in the rates, the divisor and the quotient.
    """
    if Z.shape[1] == 1:
        Z[i, 0] /= divisor
        return
    error, slack = room(arrivals + 1 + more), 4 * (arrivals + 1) * 2.0**-1074 if arrivals else 0.0
    x = Z[i, 0] / divisor
    Z[i, 1] = below(Z[i, 1] / divisor, error, slack)
    Z[i, 2] = above(Z[i, 2] / divisor, error, slack, np.inf)
    Z[i, 0] = min(max(x, Z[i, 1]), Z[i, 2])


@njit(cache=True, error_model="numpy")
def settle(states, errors, Z, arrived):
    """`_settle` for states that do not pass on what has arrived, or not yet."""
    for s in range(len(states)):
        _settle(Z, states[s], arrived[states[s]], 1.0, errors)


@njit(cache=True, error_model="numpy")
def pass_on(indptr, indices, data, states, Z, arrived):
    """Add ``z_i w_ij`` to every state j; row s of the rates belongs to ``states[s]``."""
    for s in range(len(states)):
        i = np.int64(states[s])
        if Z[i, Z.shape[1] - 1] > 0:
            for k in range(np.uint64(indptr[s]), np.uint64(indptr[s + 1])):
                j = np.uint64(indices[k])
                arrived[j] += 1
                for c in range(Z.shape[1]):
                    Z[j, c] += Z[i, c] * data[k]


@njit(cache=True, error_model="numpy")
def flow(indptr, indices, data, out, order, errors, Z, arrived):
    """``d_j z_j = s_j + sum_i z_i w_ij`` for states on no cycle, last of the order first, in place.

    Parameters
    ----------
    Z : array, shape (n, c)
        Source and what has arrived; on the states of the order, z in the end.
    arrived : int array, shape (n,)
        How many products are in every sum.
    """
    for s in range(len(order) - 1, -1, -1):
        i = np.int64(order[s])
        start, end = np.uint64(indptr[i]), np.uint64(indptr[i + 1])
        _settle(Z, i, arrived[i], out[i], np.int64(end - start) + 2 * errors)
        if not Z[i, Z.shape[1] - 1] > 0:
            continue
        if Z.shape[1] == 1:
            for k in range(start, end):
                Z[np.uint64(indices[k]), 0] += Z[i, 0] * data[k]
            continue
        z, low, high = Z[i, 0], Z[i, 1], Z[i, 2]
        for k in range(start, end):
            j, w = np.uint64(indices[k]), data[k]
            Z[j, 0] += z * w
            Z[j, 1] += low * w
            Z[j, 2] += high * w
            arrived[j] += 1
