"""Passes over the entries of sparse rows: products of a factored derivative, differences of two chains."""

from __future__ import annotations

from ..compiled_kernels import njit

__all__ = ["dyad", "moved", "overlooked"]


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


@njit(cache=True, error_model="numpy")
def overlooked(indptr, indices, moving, h, ahead):
    """Whether a state that moves has h = 0 although one that it leads to has not: underflow."""
    for i in range(len(indptr) - 1):
        if moving[i] and h[i] == 0.0:
            for e in range(indptr[i], indptr[i + 1]):
                if ahead[indices[e]] > 0.0:
                    return True
    return False


@njit(cache=True, error_model="numpy")
def moved(ap, ai, ad, bp, bi, bd, x, base, out):
    """``out_i = sum_j (b_ij - a_ij) (x_j - base_i)`` of two sparse matrices with sorted rows.

    Entries are subtracted before anything is added, so that a row that did not change gives exactly 0."""
    for i in range(len(ap) - 1):
        a, b, total, c = ap[i], bp[i], 0.0, base[i]
        while a < ap[i + 1] or b < bp[i + 1]:
            if b == bp[i + 1] or (a < ap[i + 1] and ai[a] < bi[b]):
                total -= ad[a] * (x[ai[a]] - c)
                a += 1
            elif a == ap[i + 1] or bi[b] < ai[a]:
                total += bd[b] * (x[bi[b]] - c)
                b += 1
            else:
                total += (bd[b] - ad[a]) * (x[ai[a]] - c)
                a += 1
                b += 1
        out[i] = total
