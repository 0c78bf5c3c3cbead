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
from functools import cache
from typing import Any

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

__all__ = ["TINY", "U", "enclose", "enclose_flow", "gamma", "residual", "row_sums", "widen"]

U = 2.0**-53
TINY = 2.0**-1074  # what a single operation can lose to underflow
HUGE = 1.7e308  # a lower end that overflowed is at least this
ROUNDS = 4

Check = Callable[[NDArray], tuple[NDArray, NDArray]]
Lift = tuple[NDArray, NDArray]


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

    Let ``r_i = sum_j w_ij (x_j - x_i) + c_i`` be the residual of the candidate and D the diagonal of total rates. If
    ``v >= 0`` has ``(D - W) v >= |r|``, then ``x + v`` has the residual ``r - (D - W) v <= 0`` and is a super-solution,
    ``x - v`` a sub-solution, so that the solution is within v of x. Such a v is looked for by solving with the residual
    and its rounding bound g on the right, and, where that fails, as a multiple of the mean absorption time m, for which
    ``(D - W) m`` is near 1 (see `_end`). The inequalities verified in the end are those of ``x - v`` and ``x + v`` as
    stored, with the error of evaluating them.

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

    @cache
    def lift() -> Lift:
        m = solve(np.ones(len(own)))
        r, error = residual(W, _with(np.zeros(len(X)), own, m), m, np.zeros(len(own)))
        return m, -r - error

    around = np.abs(_with(X[:, 0], own, x))
    size = row_sums(W.data * (around[W.indices] + np.repeat(np.abs(x), np.diff(W.indptr))), W.indptr)
    ends = []
    for side, sign in ((1, -1.0), (2, 1.0)):

        def check(y: NDArray, side: int = side, sign: float = sign) -> tuple[NDArray, NDArray]:
            r, error = residual(W, _with(X[:, side], own, y), y, gain[:, side])
            return np.maximum(sign * r + error, 0.0), error

        ends.append(_end(x, sign, check, solve, lift, size))
    return None if ends[0] is None or ends[1] is None else (np.maximum(ends[0], 0.0), np.minimum(ends[1], ceiling))


def _end(
    x: NDArray, sign: float, check: Check, solve: Callable[[NDArray], NDArray], lift: Callable[[], Lift], size: NDArray
) -> NDArray | None:
    """Move a candidate down or up until its inequality is verified.

    Parameters
    ----------
    x : array, shape (m,)
        The candidate.
    sign : {-1.0, 1.0}
        -1: look for a sub-solution, 1: for a super-solution.
    check : callable
        Gives for a vector y by how much each inequality is missed, rounding included (all 0: y is proven), and the
        rounding error in that.
    solve : callable
        Approximate solver; a move ``v`` with ``(D - W) v = g`` improves the inequalities by g.
    lift : callable
        A vector m and proven lower bounds t of ``(D - W) m``.
    size : array, shape (m,)
        Size of the terms of each inequality, for the rounding of storing y.

    Returns
    -------
    array, shape (m,), or None

    Notes
    -----
    The move found by `solve` keeps small values small, but is only as good as the solver: where the solver leaves more
    than it was asked to remove, a few states keep missing by a little. Adding a multiple of m cannot miss: if
    ``t_i > 0`` for all i, the move ``k m`` with ``k >= missing_i / t_i`` improves every inequality by what it misses,
    at a cost of k times the mean absorption time. Whatever was moved, the result is believed only after `check`.
    """
    move = np.zeros(len(x))
    missing, error = check(x)
    best = (move, missing, error)
    for attempt in range(ROUNDS):
        # Ask for a little more than the inequality needs: storing x + v rounds, and so does evaluating it again.
        short = 2 * missing + 2 * error if attempt else missing + error + 4 * U * size + 8 * TINY
        move = move + solve(short) * (1 + 2.0**-10)
        if not np.isfinite(move).all():
            break
        y = x + sign * move
        missing, error = check(y)
        if not missing.any():
            return y
        if not best[1].max() <= missing.max():
            best = (move, missing, error)
    move, missing, error = best
    m, t = lift()
    if not (np.isfinite(m).all() and (t > 0).all()):
        return None
    k = float(np.max((missing + 2 * error + 4 * U * size + 8 * TINY) / t))
    for _ in range(ROUNDS):
        y = x + sign * (move + k * m)
        if np.isfinite(y).all() and not check(y)[0].any():
            return y
        k *= 2
    return None


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

    Returns
    -------
    (lower, upper) or None
        None if no pair could be verified.

    Notes
    -----
    There is no difference form for columns, so the rounding bound is that of the plain residual, and the enclosure
    widens as 1 / leak sooner than that of `enclose`.
    """
    k = np.diff(inflow.indptr) + terms

    def shortfall(y: NDArray, sign: float, source: NDArray) -> tuple[NDArray, NDArray]:
        """``sign (source + arrivals - departures)`` and its rounding error."""
        r = row_sums(inflow.data * y[inflow.indices], inflow.indptr) + source - out * y
        return sign * r, gamma(k + 8) * (_flow_size(inflow, out, y) + source) + (k + 4) * TINY

    @cache
    def lift() -> Lift:
        m = solve(np.ones(len(z)))
        r, error = shortfall(m, -1.0, np.zeros(len(z)))
        return m, r - error

    ends = []
    for side, sign in ((1, -1.0), (2, 1.0)):

        def check(y: NDArray, side: int = side, sign: float = sign) -> tuple[NDArray, NDArray]:
            r, error = shortfall(y, sign, source[:, side])
            return np.maximum(r + error, 0.0), error

        ends.append(_end(z, sign, check, solve, lift, _flow_size(inflow, out, z)))
    return None if ends[0] is None or ends[1] is None else (np.maximum(ends[0], 0.0), ends[1])


def _flow_size(inflow: sp.csr_array, out: NDArray, y: NDArray) -> NDArray[np.float64]:
    y = np.abs(y)
    return row_sums(inflow.data * y[inflow.indices], inflow.indptr) + out * y
