"""Answers to compare with, made without the package's own solvers: closed forms, rationals, long double.

Where a reference is itself iterative, it starts from scipy and is refined in long double with residuals in difference
form, ``b_i - a_i x_i + sum_j q_ij (x_j - x_i)``, until the correction is below the last digit.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import scipy.sparse as sp
import scipy.sparse.linalg as sla
from numpy.typing import NDArray

from .families import Problem

__all__ = ["adjoint", "back_substitution", "rationals", "refined", "relative_errors"]


def back_substitution(
    problem: Problem, data: NDArray | None = None, harm: NDArray | None = None
) -> NDArray[np.longdouble]:
    """A layered problem in long double, last layer first.

    Parameters
    ----------
    data, harm : arrays, optional
        Other values on the same pattern; with further axes behind (samples) the answer has them too.
    """
    Q = problem.Q
    values = Q.data if data is None else data
    x = np.array(problem.harm if harm is None else harm, dtype=np.longdouble)
    last = problem.n
    for width in reversed(problem.widths):
        first = last - width
        here = slice(int(Q.indptr[first]), int(Q.indptr[last]))
        if here.stop > here.start:
            terms = values[here].astype(np.longdouble) * x[Q.indices[here]]
            x[first:last] += np.add.reduceat(terms, Q.indptr[first:last] - here.start, axis=0)
        last = first
    return x


def refined(problem: Problem, start: str = "superlu", data: NDArray | None = None) -> NDArray[np.longdouble]:
    """Long-double refinement in difference form, around SuperLU or scipy's bicgstab.

    Parameters
    ----------
    start : {"superlu", "bicgstab"}
        What corrects a residual.

    Raises
    ------
    ArithmeticError
        If the corrections do not get small.
    """
    problem = problem.probabilities()
    Q, n = problem.Q, problem.n
    row = np.repeat(np.arange(n, dtype=np.int32), np.diff(Q.indptr))
    starts, filled = Q.indptr[:-1], np.diff(Q.indptr) > 0
    off = np.bincount(row, Q.data, minlength=n)
    ends = problem.harm + problem.safe
    A = sp.csc_array(sp.diags_array(off + ends) - Q)
    if start == "superlu":
        correct = sla.splu(A, permc_spec="MMD_AT_PLUS_A", options={"SymmetricMode": True}).solve
    else:
        rows = A.tocsr()
        correct = lambda r: sla.bicgstab(rows, r, rtol=1e-8, maxiter=2000)[0]  # noqa: E731
    weight, leave = Q.data.astype(np.longdouble), ends.astype(np.longdouble)
    x, size = np.zeros(n, np.longdouble), np.inf
    for _ in range(30):
        moved = weight * (x[Q.indices] - x[row])
        residual = problem.harm - leave * x
        residual[filled] += np.add.reduceat(moved, starts[filled])
        scale = float(np.abs(residual).max())
        if scale == 0:
            return x
        step = correct((residual / scale).astype(np.float64)) * scale
        x = x + step
        before, size = size, float(np.abs(step / np.maximum(np.abs(x), 1e-300)).max())
        if size < 2e-18:
            return x
        if size > 0.5 * before and size < 1e-17:
            return x
    raise ArithmeticError(f"the reference of {problem.name} is still moving by {size:g}")


def adjoint(problem: Problem, start: int = 0) -> NDArray[np.longdouble]:
    """Expected visits from a start state, ``(I - Q)^T x = e``, by SuperLU refined in long double."""
    Q, n = problem.Q, problem.n
    row = np.repeat(np.arange(n, dtype=np.int32), np.diff(Q.indptr))
    order = "NATURAL" if problem.widths else "COLAMD"
    factors = sla.splu(sp.csc_array(sp.eye_array(n, format="csr") - Q), permc_spec=order)
    weight, x = Q.data.astype(np.longdouble), np.zeros(n, np.longdouble)
    for _ in range(10):
        residual = -x
        residual[start] += 1
        np.add.at(residual, Q.indices, weight * x[row])
        step = factors.solve(residual.astype(np.float64), "T")
        x = x + step
        if float(np.abs(step).max() / np.abs(x).max()) < 2e-18:
            return x
    raise ArithmeticError(f"the visits of {problem.name} are still moving")


def rationals(problem: Problem) -> tuple[list[Fraction], list[Fraction]]:
    """Probabilities of harm and expected steps of a problem in counts, exactly.

    Fraction-free elimination over the integers (E. H. Bareiss, Mathematics of Computation 22 (1968) 565): every
    division leaves no remainder, so that numbers grow only as fast as determinants do.
    """
    n = problem.n
    counts = problem.Q.toarray().astype(object)
    ends = [int(a) + int(b) for a, b in zip(problem.harm, problem.safe)]
    table: list[list[int]] = []
    for i in range(n):
        total = int(sum(counts[i])) + ends[i]
        line = [-int(c) for c in counts[i]]
        line[i] += total
        table.append([*line, int(problem.harm[i]), total])
    last = 1
    for k in range(n):  # the matrix is a non-singular M-matrix: no pivot is zero
        pivot = table[k][k]
        for i in range(n):
            if i != k and (table[i][k] or pivot != last):
                factor, upper = table[i][k], table[k]
                table[i] = [(pivot * a - factor * b) // last for a, b in zip(table[i], upper)]
        last = pivot
    return tuple([Fraction(line[-2 + j], line[i]) for i, line in enumerate(table)] for j in range(2))  # type: ignore


def relative_errors(found: NDArray, exact: Any) -> float:
    """Largest entrywise relative error against long doubles or fractions; a true zero must be zero."""
    if isinstance(exact, list):
        worst = Fraction(0)
        for a, b in zip(np.asarray(found, dtype=float).tolist(), exact):
            if not np.isfinite(a):
                return float("inf")
            if b:
                worst = max(worst, abs(Fraction(a) - b) / abs(b))
            elif a:
                return float("inf")
        return float(worst)
    far = np.abs(np.asarray(found, dtype=np.longdouble) - exact)
    if not np.isfinite(far).all():
        return float("inf")
    with np.errstate(divide="ignore"):
        return float((far[far > 0] / np.abs(exact[far > 0])).max(initial=0.0))
