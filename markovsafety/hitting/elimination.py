"""Subtraction-free elimination (Grassmann, Taksar and Heyman): entrywise accurate however small the leak.

States are removed one after the other; removing k redirects every path through k, ``w_ij += w_ik w_kj / d_k``, with
``d_k = exit_k + sum_j<k w_kj`` formed as a sum of what leaves k, never as 1 minus what stays. No operation subtracts,
so each rate of each smaller chain has a small *relative* error.

Why that is enough: by the matrix-tree theorem the solution of ``d_i x_i = c_i + sum_j w_ij x_j`` is a ratio of two
polynomials of degree m in the rates, exits and gains with non-negative coefficients; relative changes of all of them by
``1 + delta`` change x by at most ``(1 + delta)^2m`` (C. A. O'Cinneide, Numer. Math. 65 (1993) 109; A. S. Alfa, J. Xue
and Q. Ye, Math. Comp. 71 (2002) 217). `roundings` adds this up over all smaller chains."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .certify import TINY, gamma

__all__ = ["Eliminated", "eliminate", "enclosed_flow", "enclosed_solve", "roundings", "solve", "solve_flow"]

PANEL = 16


@dataclass(frozen=True)
class Eliminated:
    """Factors of an eliminated class.

    Attributes
    ----------
    factors : array, shape (m, m)
        Above the diagonal ``w_ik / d_k``, below it the rates ``w_kj`` at the moment k was removed; the diagonal is
        unused.
    pivots : array, shape (m,)
        ``d_k``.
    """

    factors: NDArray[np.float64]
    pivots: NDArray[np.float64]


def eliminate(rates: NDArray, exit: NDArray) -> Eliminated | None:
    """Eliminate a class of m states.

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

    Notes
    -----
    Work is done in panels of `PANEL` states, whose updates to the rest are one matrix product; the operations are those
    of the textbook algorithm in another order.
    """
    m = len(exit)
    A = np.empty((m, m + 1))
    A[:, :m], A[:, m] = rates, exit
    pivots = np.empty(m)
    for high in range(m, 0, -PANEL):
        low = max(high - PANEL, 0)
        for k in range(high - 1, low - 1, -1):
            done = slice(k + 1, high)
            if k + 1 < high:
                A[k, :k] += A[k, done] @ A[done, :k]
                A[k, m] += A[k, done] @ A[done, m]
                A[:k, k] += A[:k, done] @ A[done, k]
            pivots[k] = math.fsum([*A[k, :k].tolist(), A[k, m]])  # one rounding, whatever the length
            if not 0 < pivots[k] < np.inf:
                return None
            A[:k, k] /= pivots[k]
        A[:low, :low] += A[:low, low:high] @ A[low:high, :low]
        A[:low, m] += A[:low, low:high] @ A[low:high, m]
    return Eliminated(A[:, :m], pivots)


def solve(eliminated: Eliminated, gain: NDArray) -> NDArray[np.float64]:
    """Solve ``d_i x_i = c_i + sum_j w_ij x_j`` for non-negative gains c of shape (m,) or (m, r)."""
    F, d = eliminated.factors, eliminated.pivots
    x = np.array(gain, dtype=np.float64)
    for k in range(len(d) - 1, 0, -1):
        x[:k] += np.multiply.outer(F[:k, k], x[k])
    for k in range(len(d)):
        x[k] = (x[k] + F[k, :k] @ x[:k]) / d[k]
    return x


def solve_flow(eliminated: Eliminated, source: NDArray) -> NDArray[np.float64]:
    """Solve the transposed equation ``d_j z_j = s_j + sum_i z_i w_ij`` for non-negative sources s."""
    F, d = eliminated.factors, eliminated.pivots
    z = np.array(source, dtype=np.float64)
    for k in range(len(d) - 1, -1, -1):
        z[k] = z[k] / d[k]
        z[:k] += np.multiply.outer(F[k, :k], z[k])
    for k in range(1, len(d)):
        z[k] += F[:k, k] @ z[:k]
    return z


def roundings(m: int) -> float:
    """Number N such that a solution for m states is within a factor ``1 +- gamma(N)`` of the exact one, entry by entry.

    Let ``p`` be the position of k in its panel. A rate read when k is removed is an exact sum of ``p + 1`` terms with
    at most ``p + 1`` roundings on each; the redirected rate ``w_ik w_kj / d_k`` has two such factors, a divisor made of
    such rates by one more rounding, and the division: ``3 p + 5``, one added for the same step on the gains. In the
    remaining chain of k states this is a relative change of every rate, hence ``2 k (3 p + 6)`` in the solution. Adding
    a finished panel rounds every remaining rate ``PANEL + 1`` times at most. The final back-substitution of k divides a
    sum of ``k + 1`` terms: ``2 p + k + 6``. Fused multiply-adds only lower the counts."""
    k = np.arange(m)
    place = (m - 1 - k) % PANEL
    low = np.arange(m - PANEL, 0, -PANEL)
    return float(np.sum(2.0 * k * (3 * place + 6) + 2 * place + k + 6) + 2.0 * (PANEL + 1) * low.sum())


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
    relative = float(gamma(roundings(m) + 2 * m * errors))
    with np.errstate(over="ignore"):
        scale = TINY * (64.0 * m**3 + errors) / min(1.0, float(eliminated.pivots.min()))
        absolute = scale * (1 + x.max(initial=0.0)) * time * 2
    return x, relative, absolute


def enclosed_flow(eliminated: Eliminated, source: NDArray, errors: float) -> tuple[NDArray, float, float]:
    """`solve_flow` with proven errors; the transposed solution is a ratio of the same kind."""
    m = len(eliminated.pivots)
    z = solve_flow(eliminated, source)
    time = float(solve(eliminated, np.ones(m)).max())
    relative = float(gamma(roundings(m) + 2 * m * errors))
    with np.errstate(over="ignore"):
        scale = TINY * 64.0 * m**3 / min(1.0, float(eliminated.pivots.min()))
        absolute = scale * (1 + float(z.sum(axis=0).max(initial=0.0))) * time * 2
    return z, relative, absolute
