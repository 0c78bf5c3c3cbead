"""Run the operations of a sparse elimination for many samples side by side."""

from __future__ import annotations

import numpy as np

from ..compiled_kernels import njit

__all__ = ["run"]

WIDTH = 8  # samples side by side: doubles of one AVX-512 register


@njit(cache=True, error_model="numpy", nogil=True)
def run(
    values, ptr, source, outer_ptr, outer, hit,
    order, out_ptr, out_slot, out_state, in_ptr, in_slot, in_state, into, slots, X, least,
):  # fmt: skip
    """Subtraction-free elimination in a planned order; NaN or infinity where a pivot is 0.

    Parameters
    ----------
    values : array, shape (B, nnz)
    ptr, source : int arrays, shape (m + 1,), (e,)
        Where the entries between the m unknown states are stored.
    outer_ptr, outer, hit : arrays, shape (m + 1,), (o,), (o,)
        Entries to known states, and whether they hit.
    order ... slots
        Of `Program`.
    X : array, shape (B, m)
        The answer.
    least : array, shape (B,)
        Smallest pivot.
    """
    m, e = len(order), len(source)
    W = np.empty((slots, WIDTH))
    leave, right, pivot, x = np.empty((m, WIDTH)), np.empty((m, WIDTH)), np.empty((m, WIDTH)), np.empty((m, WIDTH))
    share = np.empty(WIDTH)
    for begin in range(0, values.shape[0], WIDTH):
        # A last block that is not full repeats its last sample.
        width = min(WIDTH, values.shape[0] - begin)
        W[e:] = 0.0
        for s in range(WIDTH):
            v = values[begin + min(s, width - 1)]
            for p in range(e):
                W[p, s] = v[source[p]]
            for i in range(m):
                gone, gain = 0.0, 0.0
                for p in range(outer_ptr[i], outer_ptr[i + 1]):
                    gone += v[outer[p]]
                    gain += v[outer[p]] * hit[p]
                leave[i, s], right[i, s] = gone, gain
        at = 0
        for t in range(m):
            k = order[t]
            for s in range(WIDTH):
                pivot[t, s] = leave[k, s]
            for p in range(out_ptr[t], out_ptr[t + 1]):
                for s in range(WIDTH):
                    pivot[t, s] += W[out_slot[p], s]
            for q in range(in_ptr[t], in_ptr[t + 1]):
                i = in_state[q]
                for s in range(WIDTH):
                    share[s] = W[in_slot[q], s] / pivot[t, s]
                for s in range(WIDTH):
                    leave[i, s] += share[s] * leave[k, s]
                    right[i, s] += share[s] * right[k, s]
                for p in range(out_ptr[t], out_ptr[t + 1]):
                    goal = into[at]
                    at += 1
                    if goal >= 0:
                        for s in range(WIDTH):
                            W[goal, s] += share[s] * W[out_slot[p], s]
        for t in range(m - 1, -1, -1):
            k = order[t]
            for s in range(WIDTH):
                x[k, s] = right[k, s]
            for p in range(out_ptr[t], out_ptr[t + 1]):
                j = out_state[p]
                for s in range(WIDTH):
                    x[k, s] += W[out_slot[p], s] * x[j, s]
            for s in range(WIDTH):
                x[k, s] /= pivot[t, s]
        for s in range(width):
            low = np.inf
            for t in range(m):
                X[begin + s, t] = x[t, s]
                low = pivot[t, s] if pivot[t, s] < low else low
            least[begin + s] = low
