"""The products of a factored derivative, written out in one pass."""

from __future__ import annotations

from numba import njit

__all__ = ["dyad"]


@njit(cache=True, error_model="numpy")
def dyad(indptr, indices, visits, h, out):
    """``out_e = visits_i h_j`` for every entry e from i to j of a sparse pattern; a row without visits is not read."""
    for i in range(len(indptr) - 1):
        v = visits[i]
        if v == 0.0:
            for e in range(indptr[i], indptr[i + 1]):
                out[e] = 0.0
        else:
            for e in range(indptr[i], indptr[i + 1]):
                out[e] = v * h[indices[e]]
