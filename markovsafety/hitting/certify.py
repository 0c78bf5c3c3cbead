"""Proofs about floating-point answers: rounding counts, and enclosures by sub- and super-solutions.

The equation behind every number of this room is, for rates ``w_ij >= 0`` and a gain ``c_i >= 0``,

    sum_j w_ij (x_j - x_i) + c_i = 0   for every free state i,      x_j known for all others.

Two proofs are used.

*Counting* (a priori). When an answer is made by additions, multiplications and divisions of non-negative numbers alone,
each operation changes it by a factor ``1 + d`` with ``|d| <= u = 2^-53``, nothing cancels, and N operations in sequence
by a factor within ``1 +- gamma(N)``, ``gamma(N) = N u / (1 - N u)`` (N. J. Higham, Accuracy and Stability of Numerical
Algorithms, 2nd ed., lemma 3.1).

*Comparison* (a posteriori). If from every free state the known ones can be reached, the matrix M of the equation is a
nonsingular M-matrix and its inverse is non-negative. So if a candidate y misses its equations by at most g, and a
vector v has ``M v >= t > 0``, the solution is within ``max(g / t) v`` of y. Candidate and v are pairs ``high + low`` of
doubles, and what they miss is evaluated to about 2^-106: the enclosure is narrow at leaks at which doubles have no
digits left."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from .certify_kernels import exact_sums, flow_residuals, move_out, quick_residuals, residuals, swept

__all__ = ["TINY", "U", "enclose", "enclose_flow", "gamma", "residual", "row_sums", "widen"]

U = 2.0**-53
TINY = 2.0**-1074  # what a single operation can lose to underflow
HUGE = 1.7e308  # a lower end that overflowed is at least this
SWEEPS = 8  # jumps over which exits are gathered
ROUNDS = 8  # corrections of a candidate, as long as each halves what is missed
FINE = 2.0**-44  # a radius below this, relative to every value, is not improved
GOOD = 2.0**-52  # nor, once doubles in pairs are used, one below this

Vector = NDArray[np.float64]
Solver = Callable[[NDArray], NDArray]
Missed = tuple[Vector, Vector]  # what a candidate misses, and a bound on the error of that
Lift = tuple[Vector, Vector]  # a vector v >= 0 (rounded up) and proven lower bounds t of M v


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
    X[:, 1] = np.clip(np.where(np.isnan(lower), 0.0, lower), 0.0, min(HUGE, ceiling))
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
    W: sp.csr_array | None,
    own: NDArray[np.intp],
    X: NDArray,
    x: NDArray,
    gain: NDArray,
    solve: Solver,
    ceiling: float = np.inf,
    *,
    low: NDArray | None = None,
    parts: tuple[sp.csr_array, sp.csr_array] | None = None,
    errors: int = 2,
) -> tuple[NDArray, NDArray] | None:
    """Find and verify a proven enclosure around a candidate on one class of states.

    Let ``r_i = sum_j w_ij (y_j - y_i) + c_i`` be what the candidate y misses and ``M v = sum_j w_ij (v_i - v_j)`` with
    ``v = 0`` outside the class. If ``|r| <= g`` and ``M v >= t > 0``, the solution is within ``max(g / t) v`` of y
    (papers/markovsafety/certificates.md, theorem 3). As v serves the probability of still being in the class, averaged
    over a few jumps, which takes no solve; where that proves little, a solution of ``M v = g`` or ``M v = 1``.

    Parameters
    ----------
    W : csr array, shape (m, n), optional
        Rates of the m states of the class; not read if `parts` are given.
    own : int array, shape (m,)
        Their numbers, ascending if `parts` are not given.
    X : array, shape (n, 3)
        Value, lower and upper of every state outside the class.
    x : array, shape (m,)
        The candidate.
    gain : array, shape (m, 3)
    solve : callable
        An approximate solver of ``M v = g`` on the class; its accuracy does not matter for the proof.
    ceiling : float
        A known upper bound of the solution.
    low : array, shape (m,), optional
        Low part of the candidate ``x + low``; with it, a good candidate needs no further solve.
    parts : (inside, outside), csr arrays of shapes (m, m) and (m, n), optional
        The rates within the class, and to all other states.
    errors : int
        Roundings already in each rate (`Rates.errors`, of which 2 is the largest).

    Returns
    -------
    (lower, upper) or None
        None if nothing could be proven, or nothing that was not known: the candidate must not be believed.
    """
    inside, outside = _parts(W, own, X) if parts is None else parts
    near, far, exits = _arrays(inside), _arrays(outside)[::2], outside.indices
    zero, away = np.zeros(len(x)), np.zeros(outside.nnz)
    v = swept(near, far, SWEEPS)
    base = _lift(v, quick_residuals(near, far, away, v, zero, 0.0 + errors))

    def lift(right: NDArray) -> Lift | None:
        return _solved_lift(solve, right, lambda v, c: residuals(near, far, away, v, c, 0.0 + errors))

    ends = []
    for side in _sides((X[exits, 1], X[exits, 2]), (gain[:, 1], gain[:, 2])):
        values, c = np.ascontiguousarray(X[exits, side]), np.ascontiguousarray(gain[:, side])

        def missed(y: Vector, kernel: Any, values: NDArray = values, c: NDArray = c) -> Missed:
            return kernel(near, far, values, y, c, 0.0 + errors)

        y = _pairs(x, low)
        radius = _radius(_size(missed(y, quick_residuals)), base)
        if _small(radius, y, FINE):
            ends.append((y, radius))
        else:
            ends.append(_search(y, lambda y, f=missed: f(y, residuals), solve, lambda g: _radius(g, base), lift))
    return _ends(ends, ceiling)


def enclose_flow(
    inflow: sp.csr_array,
    out: NDArray,
    z: NDArray,
    source: NDArray,
    solve: Solver,
    terms: NDArray,
    *,
    low: NDArray | None = None,
    parts: tuple[sp.csr_array, sp.csr_array] | None = None,
    errors: int = 2,
) -> tuple[NDArray, NDArray] | None:
    """The same for the transposed equation ``d_j z_j = s_j + sum_i z_i w_ij`` of expected visits.

    With v and t as for `enclose`, ``sum_j t_j |z_j - y_j| <= sum_i v_i g_i`` (theorem 8): no solve either.

    Parameters
    ----------
    inflow : csr array, shape (m, m)
        Row j holds the rates into state j from the class.
    out : array, shape (m,)
        Computed total rates d_j out of every state, each from `terms` summands; not read if `parts` are given.
    z : array, shape (m,)
        The candidate.
    source : array, shape (m, 3)
        What arrives from outside the class: value, lower, upper.
    solve : callable
        An approximate solver of the transposed equation.
    low : array, shape (m,), optional
        Low part of the candidate.
    parts : (inside, outside), optional
        Rates from the class to itself and to all others: with them total rates are summed exactly, and small leaks
        cost nothing.
    errors : int
        Roundings already in each rate.

    Returns
    -------
    (lower, upper) or None
        None if nothing could be proven.
    """
    into = _arrays(inflow)
    zero, base = np.zeros(len(z)), None
    if parts is None:
        total = out, zero, (gamma(terms + 2) * out + terms * TINY)
    else:
        near, far = _arrays(parts[0]), _arrays(parts[1])[::2]
        total = exact_sums(near, far)
        v = swept(near, far, SWEEPS)
        base = _lift(v, quick_residuals(near, far, np.zeros(parts[1].nnz), v, zero, 0.0 + errors))

    def lift(right: NDArray) -> Lift | None:
        return _solved_lift(solve, right, lambda v, c: flow_residuals(into, total, v, c, 0.0 + errors))

    ends = []
    for side in _sides((source[:, 1], source[:, 2])):
        s = np.ascontiguousarray(source[:, side])

        def missed(y: Vector, s: NDArray = s) -> Missed:
            return flow_residuals(into, total, y, s, 0.0 + errors)

        ends.append(_search(_pairs(z, low), missed, solve, lambda g: _summed_radius(g, base), lift))
    return _ends(ends, np.inf)


def _arrays(A: sp.csr_array) -> tuple[NDArray, NDArray, NDArray]:
    """indptr and indices as unsigned integers, data."""
    ptr, index = A.indptr, A.indices
    return ptr.view(f"u{ptr.itemsize}"), index.view(f"u{index.itemsize}"), A.data


def _parts(W: sp.csr_array | None, own: NDArray, X: NDArray) -> tuple[sp.csr_array, sp.csr_array]:
    """Rates of the class to itself and to all others."""
    assert W is not None
    m, line = len(own), np.repeat(np.arange(len(own)), np.diff(W.indptr))
    local = np.minimum(np.searchsorted(own, W.indices), m - 1)
    here = own[local] == W.indices
    inside = sp.csr_array((W.data[here], (line[here], local[here])), shape=(m, m))
    outside = sp.csr_array((W.data[~here], (line[~here], W.indices[~here])), shape=(m, len(X)))
    return inside, outside


def _sides(*ends: tuple[NDArray, NDArray]) -> tuple[int, ...]:
    """Columns to be solved for: one if lower and upper inputs agree."""
    return (1,) if all(np.array_equal(lower, upper) for lower, upper in ends) else (1, 2)


def _pairs(x: NDArray, low: NDArray | None = None) -> Vector:
    return np.column_stack([x, np.zeros(len(x)) if low is None else low])


def _added(y: Vector, step: NDArray) -> Vector:
    s, e = _sum(y[:, 0], step)
    return np.column_stack(_sum(s, e + y[:, 1]))


def _sum(a: NDArray, b: NDArray) -> tuple[NDArray, NDArray]:
    s = a + b
    t = s - a
    return s, (a - (s - t)) + (b - t)


def _size(missed: Missed) -> Vector:
    return (np.abs(missed[0]) + missed[1]) * (1 + 4 * U)


def _lift(v: Vector, missed: Missed) -> Lift | None:
    """v with the proven lower bounds of ``M v``, or None if one is not positive."""
    whole, t = (v[:, 0] + v[:, 1]) * (1 + 4 * U), (-missed[0] - missed[1]) * (1 - 4 * U)
    return (whole, t) if (t > 0).all() and np.isfinite(whole).all() else None


def _solved_lift(solve: Solver, right: NDArray, missed: Callable[[Vector, NDArray], Missed]) -> Lift | None:
    """A vector with ``M v`` near `right`, corrected once if need be."""
    v, zero = _pairs(solve(right)), np.zeros(len(right))
    found = _lift(v, missed(v, zero))
    if found is None:
        v = _added(v, solve(missed(v, right)[0]))
        found = _lift(v, missed(v, zero))
    return found


def _radius(g: NDArray, lift: Lift | None) -> NDArray | None:
    """``max(g / t) v``, rounded up."""
    if lift is None:
        return None
    v, t = lift
    return (float(np.max(g / t)) * (1 + 4 * U) + TINY) * v * (1 + 4 * U) + TINY


def _summed_radius(g: NDArray, lift: Lift | None) -> NDArray | None:
    """``sum(v g) / t``, rounded up."""
    if lift is None:
        return None
    v, t = lift
    return (float(np.sum(v * g)) * (1 + 2 * len(g) * U) + len(g) * TINY) * (1 + 4 * U) / t * (1 + 4 * U) + TINY


def _search(
    y: Vector,
    missed: Callable[[Vector], Missed],
    solve: Solver,
    cheap: Callable[[NDArray], NDArray | None],
    lift: Callable[[NDArray], Lift | None],
) -> tuple[Vector, NDArray] | None:
    """Correct a candidate until it is proven to its last digit, or as far as that goes.

    Parameters
    ----------
    y : array, shape (m, 2)
        The candidate, as pairs.
    missed : callable
        What pairs miss.
    solve : callable
        Approximate solver.
    cheap : callable
        The radius that the swept vector proves for missing g; None if it proves nothing.
    lift : callable
        A vector from the solver, for the radii that need one.

    Returns
    -------
    y, radius : arrays of shapes (m, 2) and (m,); or None
    """
    best: tuple[float, Vector, NDArray] | None = None
    for _ in range(ROUNDS):
        now = missed(y)
        g = _size(now)
        size = float(np.max(g))
        if not size < (np.inf if best is None else best[0]):
            break
        slow = best is not None and size > best[0] / 2
        best = size, y, g
        if slow or _small(cheap(g), y, GOOD):
            break
        y = _added(y, solve(now[0]))
    if best is None:
        return None
    _, y, g = best
    radius = cheap(g)
    for right in (g, np.ones(len(g))):
        if _small(radius, y, GOOD):
            break
        other = _radius(g, lift(right))
        radius = other if radius is None else radius if other is None else np.fmin(radius, other)
    return None if radius is None or not np.isfinite(radius).all() else (y, radius)


def _small(radius: NDArray | None, y: Vector, share: float) -> bool:
    return radius is not None and bool((radius <= share * np.abs(y[:, 0])).all())


def _ends(found: list[tuple[Vector, NDArray] | None], ceiling: float) -> tuple[NDArray, NDArray] | None:
    """The lower end of the first and the upper end of the last, unless they say nothing."""
    if found[0] is None or found[-1] is None:
        return None
    lower, upper = (move_out(y, radius, ceiling) for y, radius in (found[0], found[-1]))
    empty = not (lower[0] > 0).any() and not (upper[1] < ceiling).any()
    return None if empty else (lower[0], upper[1])
