"""Rational arithmetic: the same equations in `fractions.Fraction`, from integer counts or from the floats as given.

For tests, for small chains and as the last resort where floating point proves nothing. Small cyclic classes are solved
by fraction-free elimination (E. H. Bareiss, Math. Comp. 22 (1968) 565), others by p-adic lifting; the numbers grow with
the size of a class and with the depth of the graph, so hundreds of states are comfortable and thousands are not.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from math import gcd, lcm
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..chains import Chain
from ..errors import InputError
from . import padic
from .graph import plan
from .rates import Rates

__all__ = ["CYCLE_LIMIT", "backward", "potential", "probability", "rows_of", "to_columns"]

CYCLE_LIMIT = 600  # states in one cyclic class
SHORT = 16  # classes up to this size are eliminated, larger ones solved by p-adic lifting
ZERO, ONE = Fraction(0), Fraction(1)

Rows = list[dict[int, Fraction]]


def rows_of(chain: Chain) -> tuple[Rows, list[Fraction]]:
    """Off-diagonal rates and the rate of one token, per state: integer counts if there are any, else the floats."""
    matrix = chain.P if chain.integer_counts is None else chain.integer_counts
    rows: Rows = []
    step: list[Fraction] = []
    for i in range(chain.n_states):
        span = slice(matrix.indptr[i], matrix.indptr[i + 1])
        entries = [(j, Fraction(v)) for j, v in zip(matrix.indices[span].tolist(), matrix.data[span].tolist()) if v]
        rows.append({j: v for j, v in entries if j != i})
        total = sum((v for _, v in entries), ZERO)
        step.append(ONE if chain.integer_counts is None else total)
    return rows, step


def potential(
    rates: Rates, rows: Rows, free: NDArray, known: Sequence[Fraction], gain: Sequence[Fraction] | None = None
) -> list[Fraction]:
    """Solve ``sum_j w_ij (x_j - x_i) + c_i = 0`` on the free states.

    Parameters
    ----------
    rates : Rates
        Only its pattern is used, for the order.
    rows : list of dict
        Exact rates, from `rows_of`.
    free : bool array, shape (n,)
    known, gain : sequences of Fraction, length n
        Values of the other states, and the constant c on the scale of `rows`.
    """
    x = list(known)
    c = list(gain) if gain is not None else [ZERO] * len(x)
    for single, cyclic in plan(rates.W, free).levels:
        for i in single.tolist():
            x[i] = (c[i] + sum((w * x[j] for j, w in rows[i].items()), ZERO)) / sum(rows[i].values(), ZERO)
        for own in cyclic:
            members = own.tolist()
            for i, value in zip(members, _solve_class(rows, members, x, c)):
                x[i] = value
    return x


def _solve_class(rows: Rows, own: list[int], x: list[Fraction], c: list[Fraction]) -> list[Fraction]:
    if len(own) > CYCLE_LIMIT:
        raise InputError(
            f"The chain has a cyclic class of {len(own)} states.",
            cause=f"Rational elimination is limited to {CYCLE_LIMIT} states per class.",
            next='Use method="auto": its enclosure is proven as well.',
        )
    place = {i: k for k, i in enumerate(own)}
    table, right = [], []
    for k, i in enumerate(own):
        line, gain = {k: ZERO}, c[i]
        for j, w in rows[i].items():
            line[k] += w
            if j in place:
                line[place[j]] = -w
            elif x[j]:
                gain += w * x[j]
        scale = Fraction(lcm(*(v.denominator for v in line.values())), gcd(*(v.numerator for v in line.values())))
        table.append({j: int(v * scale) for j, v in line.items()})
        right.append(gain * scale)
    # One denominator for the whole right-hand side: those of earlier classes are long, and belong to no row.
    common = lcm(*(v.denominator for v in right))
    whole = [int(v * common) for v in right]
    if len(own) > SHORT:
        return [v / common for v in padic.solve(table, whole)]
    dense = [[row.get(j, 0) for j in range(len(own))] + [v] for row, v in zip(table, whole)]
    return [v / common for v in _bareiss(dense)]


def _bareiss(A: list[list[int]]) -> list[Fraction]:
    """Solve an integer system ``[A | b]`` whose leading minors are positive (every M-matrix here has them)."""
    m, last = len(A), 1
    for k in range(m):
        pivot, row = A[k][k], A[k]
        for i in range(m):
            if i != k:
                factor, other = A[i][k], A[i]
                A[i] = [(pivot * a - factor * b) // last for a, b in zip(other, row)]
        last = pivot
    return [Fraction(A[i][m], A[i][i]) for i in range(m)]


def probability(chain: Chain, rates: Rates, free: NDArray, one: NDArray) -> list[Fraction]:
    """Hitting probabilities of a homogeneous chain; `one` marks the states known to be 1, the rest off `free` is 0."""
    known = [ONE if hit else ZERO for hit in one.tolist()]
    return potential(rates, rows_of(chain)[0], free, known)


def backward(layers: Sequence[Any], fixed: NDArray, known: NDArray, last: NDArray) -> list[list[Fraction]]:
    """Hitting probabilities of a layered chain, never above 1 (rows may sum to 1 + 1e-9); shape (L + 1, n) as lists."""
    held, ends = fixed.tolist(), [Fraction(v) for v in known.tolist()]
    x = [[end if f else Fraction(v) for end, f, v in zip(ends, held, last.tolist())]]
    for P in reversed(layers):
        here = []
        for i in range(P.shape[0]):
            span = slice(P.indptr[i], P.indptr[i + 1])
            moves = zip(P.indices[span].tolist(), P.data[span].tolist())
            here.append(ends[i] if held[i] else min(ONE, sum((Fraction(v) * x[-1][j] for j, v in moves), ZERO)))
        x.append(here)
    return x[::-1]


def to_columns(exact: Sequence[Fraction]) -> NDArray[np.float64]:
    """Nearest floats and the tightest floats around each fraction, shape (n, 3)."""
    value = np.array([float(f) for f in exact])
    below = np.array([Fraction(v) < f for v, f in zip(value.tolist(), exact)], dtype=bool)
    above = np.array([Fraction(v) > f for v, f in zip(value.tolist(), exact)], dtype=bool)
    lower = np.where(above, np.nextafter(value, -np.inf), value)
    upper = np.where(below, np.nextafter(value, np.inf), value)
    return np.column_stack([value, lower, upper])
