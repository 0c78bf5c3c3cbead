"""Sparse solves of one cyclic class, refined with a residual that does not cancel.

Two inner solvers: BiCGStab, right for the large classes of estimated chains, which leave within some hundred tokens and
whose LU factors would be dense; and sparse LU without pivoting, right where the class is long and thin.

Forming ``d_i - w_ii`` loses the leak of a nearly closed class: at a leak of 1e-15 a plain solve has one digit.
Refinement with the difference-form residual ``sum_j w_ij (x_j - x_i) + c_i`` gets the digits back as long as each step
shrinks the correction; one that does not is reported, never ignored.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray
from scipy.sparse import csgraph
from scipy.sparse.linalg import splu

from .certify import U, residual, row_sums

__all__ = ["Factors", "Solver", "factor", "factors", "krylov", "refined", "refined_flow", "thin"]

STEPS = 12
SHRINK = 0.5  # a correction must be at most this fraction of the one before
INNER = 200  # BiCGStab iterations per correction
RTOL = 1e-8  # and the residual, relative to the right-hand side, at which they end
SWEEPS = 8
WORK = 2e7  # multiplications

Solver = Callable[[NDArray], NDArray]


def _matrix(inside: sp.csr_array, out: NDArray) -> sp.csr_array:
    return sp.csr_array(sp.dia_array((out[None], [0]), shape=inside.shape) - inside)


def thin(inside: sp.csr_array) -> bool:
    """Whether a class is long and thin enough for LU: work of a banded solve in reverse Cuthill-McKee order."""
    order = csgraph.reverse_cuthill_mckee(sp.csr_matrix(inside), symmetric_mode=False)
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    row = np.repeat(np.arange(len(order)), np.diff(inside.indptr))
    band = int(np.max(np.abs(place[row] - place[inside.indices]), initial=0))
    return len(order) * band**2 <= WORK


@dataclass(frozen=True)
class Factors:
    """LU factors of ``diag(out) - inside``.

    Attributes
    ----------
    lu : scipy SuperLU
    """

    lu: Any

    @property
    def nbytes(self) -> int:
        """Bytes held, indices included."""
        return 16 * int(self.lu.nnz)

    def solver(self, flow: bool) -> Solver:
        """Of ``(diag(out) - inside) x = b``, or of its transpose."""
        return lambda b: self.lu.solve(b, trans="T" if flow else "N")


def factors(inside: sp.csr_array, out: NDArray) -> Factors | None:
    """LU factors; None if they break down."""
    try:
        return Factors(splu(sp.csc_array(_matrix(inside, out)), permc_spec="COLAMD", diag_pivot_thresh=0.0))
    except RuntimeError:  # "Factor is exactly singular"
        return None


def factor(inside: sp.csr_array, out: NDArray, flow: bool = False) -> Solver | None:
    """Solver of ``(diag(out) - inside) x = b`` (flow: of its transpose) by LU; None if it breaks down."""
    found = factors(inside, out)
    return None if found is None else found.solver(flow)


def krylov(inside: sp.csr_array, out: NDArray, flow: bool = False) -> Solver:
    """The same by BiCGStab; what it returns may be poor, which the refinement and the certificate find out."""
    A = _matrix(inside, out)
    A = sp.csr_array(A.T.tocsr()) if flow else A
    scale = 1 / out

    def solve(b: NDArray) -> NDArray:
        size = float(np.max(np.abs(b), initial=0.0))
        if not 0 < size < np.inf:
            return b * scale
        unit = int(np.frexp(size)[1])  # corrections and rounding bounds are tiny: their squares must not underflow
        b = np.ldexp(b, -unit)
        # Some sweeps first: from a right-hand side on a few states BiCGStab can break down at once.
        x = b * scale
        for _ in range(SWEEPS):
            x = x + scale * (b - A @ x)
        with np.errstate(all="ignore"):
            return np.ldexp(_bicgstab(A, b, x, scale), unit)

    return solve


def _dot(a: NDArray, b: NDArray) -> np.float64:
    return np.float64(np.einsum("i,i->", a, b))  # BLAS would start threads, which cost more than they bring


def _bicgstab(A: sp.csr_array, b: NDArray, x: NDArray, scale: NDArray) -> NDArray:
    """BiCGStab (H. A. van der Vorst, SIAM J. Sci. Stat. Comput. 13 (1992) 631), preconditioned from the right by scale.

    Where the recurrence breaks down, or stands still, it starts again from the residual it has; breaking down is judged
    relative to the sizes of the vectors, so that the answer to ``c b`` is c times the answer to b."""
    r = b - A @ x
    goal, fresh = RTOL**2 * _dot(b, b), True
    best, least = x, np.inf
    shadow, p, v, rho, alpha, omega, length = r, r, r, np.float64(1), np.float64(1), np.float64(1), np.float64(1)
    for _ in range(INNER):
        size = _dot(r, r)
        if size < least:
            best, least = x, size
        if not goal < size < np.inf:
            break
        now = size if fresh else _dot(shadow, r)
        if fresh or not now * now > U * length * size * U:
            shadow, p, now, length = r, r, size, size
        else:
            p = r + (now / rho * alpha / omega) * (p - omega * v)
        rho, direction = now, scale * p
        v = A @ direction
        alpha = rho / _dot(shadow, v)
        s = r - alpha * v
        second = scale * s
        t = A @ second
        norm = _dot(t, t)
        omega = _dot(t, s) / norm if norm > 0 else np.float64(0)
        x = x + alpha * direction + omega * second
        r = s - omega * t
        fresh = omega == 0
    return best


def refined(
    solve: Solver, rows: sp.csr_array, own: NDArray, x_all: NDArray, right: NDArray, gain: NDArray
) -> NDArray | None:
    """Solution on a class, corrected until the corrections are below rounding.

    Parameters
    ----------
    solve : callable
        Approximate solver on the class.
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

    return _refine(solve, defect, right)


def refined_flow(solve: Solver, inflow: sp.csr_array, out: NDArray, source: NDArray) -> NDArray | None:
    """The same for ``d_j z_j = s_j + sum_i z_i w_ij``; `inflow` holds in row j the rates into j, shape (m, m)."""

    def defect(z: NDArray) -> NDArray:
        return row_sums(inflow.data * z[inflow.indices], inflow.indptr) + source - out * z

    return _refine(solve, defect, source)


def _refine(solve: Solver, defect: Solver, right: NDArray) -> NDArray | None:
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
