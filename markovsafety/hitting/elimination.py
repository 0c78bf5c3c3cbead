"""Subtraction-free elimination (Grassmann, Taksar and Heyman): entrywise accurate however small the leak.

States are removed one after the other; removing k redirects every path through k, ``w_ij += w_ik w_kj / d_k``, with
``d_k = exit_k + sum_j w_kj`` over the states that are left, formed as a sum of what leaves k, never as 1 minus what
stays. No operation subtracts, so each rate of each smaller chain has a small *relative* error. Only states next to k
are touched: a long and thin class, in the order of `dissection`, stays sparse, and is eliminated front by front (I. S.
Duff, J. K. Reid, ACM Trans. Math. Software 9 (1983) 302); a small one is a single front.

Why relative errors are enough: by the matrix-tree theorem the solution of ``d_i x_i = c_i + sum_j w_ij x_j`` is a ratio
of two polynomials with non-negative coefficients whose terms have one rate of each row; a relative change of r rows by
``1 + delta`` changes x by at most ``(1 + delta)^2r`` (C. A. O'Cinneide, Numer. Math. 65 (1993) 109; A. S. Alfa, J. Xue
and Q. Ye, Math. Comp. 71 (2002) 217). `roundings` adds this up over all smaller chains."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from . import dissection_kernels
from . import elimination_kernels as kernels
from .certify import TINY, gamma
from .dissection import Fronts, one_front
from .rates import Rates

__all__ = [
    "Eliminated",
    "eliminate",
    "eliminate_class",
    "enclosed_flow",
    "enclosed_solve",
    "roundings",
    "solve",
    "solve_flow",
]


@dataclass(frozen=True)
class Eliminated:
    """Factors of an eliminated class.

    Attributes
    ----------
    fronts : Fronts
    factors : array
        Of each front from `offset` on: the pivots' rows, with ``w_kj`` at the moment k was removed above the diagonal
        and ``w_ik / d_k`` below it; then ``w_ik / d_k`` of the border.
    offset : int array, shape (F,)
    pivots : array, shape (m,)
        ``d_k`` in the order of elimination.
    """

    fronts: Fronts
    factors: NDArray[np.float64]
    offset: NDArray[np.int64]
    pivots: NDArray[np.float64]

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.factors.nbytes + 4 * self.pivots.nbytes + self.fronts.border.nbytes


def eliminate(rates: NDArray, exit: NDArray) -> Eliminated | None:
    """Eliminate a class of m states, given as a dense matrix.

    Parameters
    ----------
    rates : array, shape (m, m)
        Non-negative rates inside the class; the diagonal is not read.
    exit : array, shape (m,)
        Total rate out of the class.

    Returns
    -------
    Eliminated or None
        None if a pivot underflowed to zero (rates spanning more than 300 orders of magnitude).
    """
    m = len(exit)
    row, col = np.nonzero(np.asarray(rates) * ~np.eye(m, dtype=bool))
    entries = np.array([0, len(row)])
    vals = np.ascontiguousarray(rates[row, col], dtype=np.float64)
    return _run(one_front(m), entries, row, col, vals, np.array(exit, dtype=np.float64))


def eliminate_class(rates: Rates, own: NDArray, place: NDArray, fronts: Fronts | None = None) -> Eliminated | None:
    """Eliminate a class of a chain, as one dense front or along a dissection; None if a pivot vanished.

    Parameters
    ----------
    own : int array, shape (m,)
    place : int array, shape (n,)
        -1 everywhere, and so again afterwards.
    fronts : Fronts, optional
    """
    W = rates.W
    if fronts is None:
        return _run(one_front(len(own)), *_in_one(W, own, place))
    parts = dissection_kernels.by_front(
        W.indptr[:-1], W.indptr[1:], W.indices, W.data, own, place, fronts.order, fronts.begin
    )
    return _run(fronts, *parts)


def _in_one(W: sp.csr_array, own: NDArray, place: NDArray) -> tuple[NDArray, ...]:
    """`dissection_kernels.by_front` for one front."""
    m, rows = len(own), W[own]
    place[own] = np.arange(m, dtype=place.dtype)
    row, col = np.repeat(np.arange(m), np.diff(rows.indptr)), place[rows.indices].astype(np.int64)
    place[own] = -1
    near = col >= 0
    exit = np.bincount(row[~near], rows.data[~near], m)
    return np.array([0, int(near.sum())]), row[near], col[near], rows.data[near], exit


def _run(
    fronts: Fronts, entries: NDArray, rows: NDArray, cols: NDArray, vals: NDArray, exit: NDArray
) -> Eliminated | None:
    s, b = fronts.pivots, fronts.borders
    offset = np.concatenate([[0], np.cumsum(s * (s + 2 * b))])
    m, pivots = len(exit), np.empty(len(exit))
    if len(s) == 1:  # spares small classes the compiling of all else
        A = np.zeros((m, m + 1))
        A[rows, cols], A[:, m] = vals, exit
        done = kernels.reduce(A.ravel(), m, m, pivots, 0)
        return Eliminated(fronts, A[:, :m].ravel(), offset, pivots) if done else None
    factors = np.empty(offset[-1])
    shape = fronts.begin, fronts.parent, fronts.edge, fronts.border
    pending, front = dissection_kernels.room(*shape[:3])
    work = np.empty(pending), np.empty(front)
    done = kernels.eliminate(*shape, entries, rows, cols, vals, exit, factors, offset, pivots, *work)
    return Eliminated(fronts, factors, offset, pivots) if done else None


def solve(eliminated: Eliminated, gain: NDArray) -> NDArray[np.float64]:
    """Solve ``d_i x_i = c_i + sum_j w_ij x_j`` for non-negative gains c of shape (m,) or (m, r)."""
    f, x = eliminated.fronts, np.empty(gain.shape)
    where = f.begin, f.edge, f.border, eliminated.factors, eliminated.offset
    for given, found in _columns(gain, x):
        y = np.asarray(given, dtype=np.float64)[f.order]
        kernels.forward(*where, y)
        kernels.backward(*where, eliminated.pivots, y)
        found[f.order] = y
    return x


def solve_flow(eliminated: Eliminated, source: NDArray) -> NDArray[np.float64]:
    """Solve the transposed equation ``d_j z_j = s_j + sum_i z_i w_ij`` for non-negative sources s."""
    f, z = eliminated.fronts, np.empty(source.shape)
    where = f.begin, f.edge, f.border, eliminated.factors, eliminated.offset
    for given, found in _columns(source, z):
        y = np.asarray(given, dtype=np.float64)[f.order]
        kernels.forward_flow(*where, eliminated.pivots, y)
        kernels.backward_flow(*where, y)
        found[f.order] = y
    return z


def _columns(given: NDArray, found: NDArray) -> list[tuple[NDArray, NDArray]]:
    return [(given, found)] if given.ndim == 1 else list(zip(given.T, found.T))


def roundings(fronts: Fronts | int) -> float:
    """Number N such that a solution is within a factor ``1 +- gamma(N)`` of the exact one, entry by entry.

    Removing k changes the rates, exit and gain of the r states that come after k in its front: a divisor that is a sum
    rounded twice, quotient, product and sum, 5 roundings, in r rows, hence ``10 r`` in the solution. Adding what a
    front left to its parent rounds the rows of its border once, ``2 b``. The last substitution of k is a product, r
    sums and a division by the pivot: ``r + 4``, one spare. An int stands for a class that is one front."""
    fronts = one_front(fronts) if isinstance(fronts, int) else fronts
    s, b = fronts.pivots.astype(np.float64), fronts.borders.astype(np.float64)
    after = s * (s - 1) / 2 + s * b
    return float(np.sum(11 * after + 5 * s + 2 * b))


def enclosed_solve(eliminated: Eliminated, gain: NDArray, errors: float) -> tuple[NDArray, float, NDArray]:
    """`solve`, with the proven relative and absolute error of its result.

    Parameters
    ----------
    gain : array, shape (m, r)
        Rows scaled so that every state's total rate is within [1/2, 1].
    errors : float
        Roundings already in each rate, exit and gain.

    Returns
    -------
    x : array, shape (m, r)
    relative : float
    absolute : array, shape (m, 1)
        What underflow can have cost. With the least pivot d, the products lost inside the class cost at most ``64 m^3
        TINY (1 + max x) T / d``, T the time spent in the class, and those lost in forming a gain, of which there are no
        more than `errors`, at most ``errors TINY T`` (papers/markovsafety/certificates.md, theorem 5).
    """
    m = len(eliminated.pivots)
    both = solve(eliminated, np.column_stack([gain, np.ones(m)]))
    x, time = both[:, :-1], both[:, -1:]
    relative = float(gamma(roundings(eliminated.fronts) + 2 * m * errors))
    with np.errstate(over="ignore"):
        scale = TINY * (64.0 * m**3 + errors) / min(1.0, float(eliminated.pivots.min()))
        absolute = scale * (1 + x.max(initial=0.0)) * time * 2
        if not 20.0 * m**2 * TINY * float(time.max()) <= 1e-6:  # the condition of theorem 5 on large classes
            absolute = np.full_like(absolute, np.inf)
    return x, relative, absolute


def enclosed_flow(eliminated: Eliminated, source: NDArray, errors: float) -> tuple[NDArray, float, float]:
    """`solve_flow` with proven errors; the transposed solution is a ratio of the same kind."""
    m = len(eliminated.pivots)
    z = solve_flow(eliminated, source)
    time = float(solve(eliminated, np.ones(m)).max())
    relative = float(gamma(roundings(eliminated.fronts) + 2 * m * errors))
    with np.errstate(over="ignore"):
        scale = TINY * 64.0 * m**3 / min(1.0, float(eliminated.pivots.min()))
        absolute = scale * (1 + float(z.sum(axis=0).max(initial=0.0))) * time * 2
    return z, relative, absolute
