"""Sparse LU of one cyclic class, refined with a residual that does not cancel.

Forming ``d_i - w_ii`` loses the leak of a nearly closed class: at a leak of 1e-15 a plain LU has one digit. Refinement
with the difference-form residual ``sum_j w_ij (x_j - x_i) + c_i`` gets the digits back as long as each step shrinks the
correction; a step that does not is reported, never ignored. """

from __future__ import annotations

from typing import Any

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray
from scipy.sparse.linalg import splu

from .certify import U, residual, row_sums

__all__ = ["factor", "refined", "refined_flow"]

STEPS = 12
SHRINK = 0.5  # a correction must be at most this fraction of the one before


def factor(inside: sp.csr_array, out: NDArray) -> Any | None:
    """LU of ``diag(out) - inside`` without pivoting (an M-matrix needs none); None if it breaks down."""
    matrix = sp.csc_array(sp.dia_array((out[None], [0]), shape=inside.shape) - inside)
    try:
        return splu(matrix, permc_spec="COLAMD", diag_pivot_thresh=0.0)
    except RuntimeError:  # "Factor is exactly singular"
        return None


def refined(lu: Any, rows: sp.csr_array, own: NDArray, x_all: NDArray, right: NDArray, gain: NDArray) -> NDArray | None:
    """Solution on a class, corrected until the corrections are below rounding.

    Parameters
    ----------
    lu : the factors
    rows : sparse array, shape (m, n)
        Rates from the class to every state.
    own : int array, shape (m,)
    x_all : array, shape (n,)
        Known values outside the class.
    right : array, shape (m,)
        The whole right-hand side, gain and known neighbours.
    gain : array, shape (m,)

    Returns
    -------
    x : array, shape (m,), or None if the corrections do not shrink
    """
    full = x_all.copy()

    def defect(x: NDArray) -> NDArray:
        full[own] = x
        return residual(rows, full, x, gain)[0]

    return _refine(lu.solve, defect, right)


def refined_flow(lu: Any, inflow: sp.csr_array, out: NDArray, source: NDArray) -> NDArray | None:
    """The same for ``d_j z_j = s_j + sum_i z_i w_ij``; `inflow` holds in row j the rates into j, shape (m, m)."""

    def defect(z: NDArray) -> NDArray:
        return row_sums(inflow.data * z[inflow.indices], inflow.indptr) + source - out * z

    return _refine(lambda b: lu.solve(b, trans="T"), defect, source)


def _refine(solve: Any, defect: Any, right: NDArray) -> NDArray | None:
    x = solve(right)
    if not np.isfinite(x).all():
        return None
    last = np.inf
    for _ in range(STEPS):
        step = solve(defect(x))
        size, scale = float(np.max(np.abs(step))), float(np.max(np.abs(x)))
        if not size < np.inf:
            return None
        if size > SHRINK * last:  # no longer shrinking: fine at the level of rounding only
            return x if size <= 1e-6 * scale else None
        x, last = x + step, size
        if size <= 4 * U * scale:
            break
    return x
