"""Proofs about floating-point answers: rounding counts, and enclosures by sub- and super-solutions.

The equation behind every number of this room is, for rates ``w_ij >= 0`` and a gain ``c_i >= 0``,

    sum_j w_ij (x_j - x_i) + c_i = 0   for every free state i,      x_j known for all others.

Two proofs are used.

*Counting* (a priori). When an answer is made by additions, multiplications and divisions of non-negative numbers alone,
each operation changes it by a factor ``1 + d`` with ``|d| <= u = 2^-53``, nothing cancels, and N operations in sequence
by a factor within ``1 +- gamma(N)``, ``gamma(N) = N u / (1 - N u)`` (N. J. Higham, Accuracy and Stability of Numerical
Algorithms, 2nd ed., lemma 3.1).

*Comparison* (a posteriori). If from every free state the known ones can be reached, the matrix of the equation is a
nonsingular M-matrix, its inverse is non-negative, and so a vector ``y`` with ``sum_j w_ij (y_j - y_i) + c_i >= 0``
everywhere lies below the solution, one with ``<= 0`` above. The two inequalities are evaluated in difference form,
whose rounding error is small where neighbours agree, and must hold with that error to spare."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

__all__ = ["TINY", "U", "enclose", "enclose_flow", "gamma", "residual", "row_sums", "widen"]

U = 2.0**-53
TINY = 2.0**-1074  # what a single operation can lose to underflow
HUGE = 1.7e308  # a lower end that overflowed is at least this
ROUNDS = 4


def gamma(n: Any) -> NDArray[np.float64]:
    """Relative error after n roundings; inf where n is too large for a proof."""
    n = np.asarray(n, dtype=np.float64) * (U * (1 + 4 * U))
    return np.where(n < 0.5, n / np.where(n < 0.5, 1 - n, 1.0) * (1 + 8 * U), np.inf)


def widen(X: NDArray, error: Any, slack: Any = 0.0, ceiling: float = np.inf) -> None:
    """Move the enclosure columns of X outward in place: value, lower, upper are columns 0, 1, 2.

    Parameters
    ----------
    X : array, shape (n, 3) or (n, 1)
        A single column has no enclosure and is left alone.
    error : array_like
        Proven relative error of the columns (see `gamma`; the roundings made here are added).
    slack : array_like
        Proven absolute error (underflow).
    ceiling : float
        A bound known beforehand, 1 for probabilities.
    """
    if X.shape[1] == 1:
        return
    error = np.asarray(error) * (1 + 8 * U) + 8 * U
    with np.errstate(invalid="ignore"):  # 0 * inf, where no proof was possible
        lower = X[:, 1] * np.maximum(1 - error, 0.0) - slack
        upper = X[:, 2] * (1 + error) + slack
    X[:, 1] = np.clip(np.where(np.isnan(lower), 0.0, lower), 0.0, HUGE)
    X[:, 2] = np.minimum(np.where(np.isnan(upper), np.inf, upper), ceiling)
    X[:, 0] = np.clip(X[:, 0], X[:, 1], X[:, 2])


def row_sums(values: NDArray, indptr: NDArray) -> NDArray[np.float64]:
    """Sum of every row's values; 0 for an empty row."""
    out = np.zeros(len(indptr) - 1)
    filled = np.diff(indptr) > 0
    if filled.any():
        out[filled] = np.add.reduceat(values, indptr[:-1][filled])
    return out


def residual(W: sp.csr_array, x: NDArray, own: NDArray, gain: NDArray) -> tuple[NDArray, NDArray]:
    """Difference-form residual ``sum_j w_ij (x_j - x_i) + c_i`` of some rows, and a bound on its rounding error.

    Parameters
    ----------
    W : sparse array, shape (m, n)
        Rates of m states.
    x : array, shape (n,)
        Values of all states.
    own : array, shape (m,)
        Values of the m states themselves.
    gain : array, shape (m,)

    Returns
    -------
    residual, error : array, shape (m,)
    """
    k = np.diff(W.indptr)
    part = W.data * (x[W.indices] - np.repeat(own, k))
    r = row_sums(part, W.indptr) + gain
    error = gamma(k + 6) * (row_sums(np.abs(part), W.indptr) + np.abs(gain)) + (k + 4) * TINY
    return r, error


def enclose(
    W: sp.csr_array,
    own: NDArray[np.intp],
    X: NDArray,
    x: NDArray,
    gain: NDArray,
    solve: Callable[[NDArray], NDArray],
    ceiling: float = np.inf,
) -> tuple[NDArray, NDArray] | None:
    """Find and verify a sub- and a super-solution around a candidate on one class of states.

    Parameters
    ----------
    W : sparse array, shape (m, n)
        Rates of the m states of the class.
    own : int array, shape (m,)
        Their numbers.
    X : array, shape (n, 3)
        Value, lower and upper of every state outside the class.
    x : array, shape (m,)
        The candidate.
    gain : array, shape (m, 3)
    solve : callable
        An approximate solver of ``D v - W v = g`` on the class; its accuracy does not matter for the proof.
    ceiling : float
        A known upper bound of the solution.

    Returns
    -------
    (lower, upper) or None
        None if no pair could be verified: the candidate must not be believed.
    """
    ends = []
    around = np.abs(_with(X[:, 0], own, x))
    size = row_sums(W.data * (around[W.indices] + np.repeat(np.abs(x), np.diff(W.indptr))), W.indptr)
    for side, sign in ((1, -1.0), (2, 1.0)):
        around = _with(X[:, side], own, x)
        r, error = residual(W, around, x, gain[:, side])
        # Ask for a little more than the inequality needs: storing x + v rounds, and so does evaluating it again.
        move = np.zeros(len(own))
        short = np.maximum(sign * r, 0.0) + 2 * error + 4 * U * size + 8 * TINY
        for _ in range(ROUNDS):
            move = move + solve(short) * (1 + 2.0**-10)
            if not np.isfinite(move).all():
                return None
            y = x + sign * move
            r, error = residual(W, _with(X[:, side], own, y), y, gain[:, side])
            missing = np.maximum(sign * r + error, 0.0)
            if not missing.any():
                break
            short = 2 * missing + 2 * error
        else:
            return None
        ends.append(y)
    return np.maximum(ends[0], 0.0), np.minimum(ends[1], ceiling)


def _with(x: NDArray, own: NDArray, values: NDArray) -> NDArray:
    x = x.copy()
    x[own] = values
    return x


def enclose_flow(
    inflow: sp.csr_array, out: NDArray, z: NDArray, source: NDArray, solve: Callable[[NDArray], NDArray], terms: NDArray
) -> tuple[NDArray, NDArray] | None:
    """The same for the transposed equation ``d_j z_j = s_j + sum_i z_i w_ij`` of expected visits.

    Parameters
    ----------
    inflow : sparse array, shape (m, m)
        Row j holds the rates into state j from the class.
    out : array, shape (m,)
        Computed total rates d_j out of every state, each from `terms` summands.
    z : array, shape (m,)
        The candidate.
    source : array, shape (m, 3)
        What arrives from outside the class: value, lower, upper.
    solve : callable
        An approximate solver of the transposed equation.

    Notes ----- There is no difference form for columns, so the rounding bound is that of the plain residual, and the
    enclosure widens as 1 / leak sooner than that of `enclose`."""
    k = np.diff(inflow.indptr) + terms
    ends = []
    for side, sign in ((1, -1.0), (2, 1.0)):
        y, move, short = z, np.zeros(len(z)), None
        for attempt in range(ROUNDS + 1):
            arrive = row_sums(inflow.data * y[inflow.indices], inflow.indptr) + source[:, side]
            r = arrive - out * y
            error = (
                gamma(k + 8)
                * (row_sums(inflow.data * np.abs(y)[inflow.indices], inflow.indptr) + source[:, side] + out * np.abs(y))
                + (k + 4) * TINY
            )
            missing = np.maximum(sign * r + error, 0.0)
            if attempt and not missing.any():
                break
            short = missing + 2 * error + 8 * TINY
            move = move + solve(short) * (1 + 2.0**-10)
            if attempt == ROUNDS or not np.isfinite(move).all():
                return None
            y = z + sign * move
        ends.append(y)
    return np.maximum(ends[0], 0.0), ends[1]
