"""State elimination without subtraction over any domain of polynomials (or the integers), row by row.

A row of rates says ``sum_j w_ij (x_j - x_i) = 0`` and may be multiplied by anything, so rows are kept as polynomials
and divided by what their entries have in common. See W. K. Grassmann, M. I. Taksar and D. P. Heyman, Oper. Res. 33
(1985) 1107, for the elimination, and C. Daws, ICTAC 2004, LNCS 3407, 280, for parametric chains.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from typing import Any

from numpy.typing import NDArray

from ..errors import InputError
from .graph import plan

__all__ = ["solve"]

CYCLE_LIMIT = 300  # states in one cyclic class; about a minute
Pair = tuple[Any, Any]  # numerator, denominator


@dataclass
class _Line:
    """One row: rates to states that are still there, the total rate to known states, and that rate times values."""

    to: dict[int, Any]
    known: Any
    gain: Any

    def total(self) -> Any:
        return sum(self.to.values(), self.known)


def solve(rows: list[dict[int, Any]], W: Any, free: NDArray, one: NDArray, domain: Any) -> list[Pair]:
    """Solve ``sum_j w_ij (x_j - x_i) = 0`` on the free states.

    Parameters
    ----------
    rows : list of dict
        Off-diagonal rates, elements of the domain; each row on a scale of its own.
    W : csr array, shape (n, n)
        Their pattern.
    free, one : bool array, shape (n,)
        Unknown states, and those whose value is 1; the rest is 0. Every free state can reach a state of value 1.
    domain : sympy domain
        ZZ, or ZZ with parameters.

    Returns
    -------
    list of (numerator, denominator), in lowest terms
    """
    x: list[Pair] = [(domain.one if hit else domain.zero, domain.one) for hit in one.tolist()]
    for single, cyclic in plan(W, free).levels:
        for own in [[i] for i in single.tolist()] + [c.tolist() for c in cyclic]:
            _solve_class(rows, own, x, domain)
    return x


def _solve_class(rows: list[dict[int, Any]], own: list[int], x: list[Pair], domain: Any) -> None:
    if len(own) > CYCLE_LIMIT:
        raise InputError(
            f"The chain has a cyclic class of {len(own)} states.",
            cause=f"Symbolic elimination is limited to {CYCLE_LIMIT} states per class.",
            next='Use method="auto" on a numeric chain.',
        )
    lines = {i: _line(rows[i], set(own), x, domain) for i in own}
    done: list[tuple[int, _Line]] = []
    while lines:
        k = _cheapest(lines)
        line = lines.pop(k)
        done.append((k, line))
        total = line.total()
        for i, other in lines.items():
            if k in other.to:
                lines[i] = _without(i, other, k, line, total, domain)
    for k, line in reversed(done):
        scale = reduce(domain.lcm, (x[j][1] for j in line.to), domain.one)
        top = line.gain * scale
        for j, w in line.to.items():
            top += w * x[j][0] * domain.exquo(scale, x[j][1])
        x[k] = _lowest(top, line.total(), scale, domain)


def _line(row: dict[int, Any], inside: set[int], x: list[Pair], domain: Any) -> _Line:
    """A row with what leaves the class gathered, scaled by the denominators of the values out there."""
    scale = reduce(domain.lcm, (x[j][1] for j in row if j not in inside), domain.one)
    known = gain = domain.zero
    for j, w in row.items():
        if j not in inside:
            known += w * scale
            gain += w * x[j][0] * domain.exquo(scale, x[j][1])
    return _Line({j: w * scale for j, w in row.items() if j in inside}, known, gain)


def _cheapest(lines: dict[int, _Line]) -> int:
    """The state whose elimination joins the fewest pairs of neighbours."""
    into = dict.fromkeys(lines, 0)
    for line in lines.values():
        for j in line.to:
            into[j] += 1
    return min(lines, key=lambda k: (into[k] * len(lines[k].to), k))


def _without(i: int, other: _Line, k: int, line: _Line, total: Any, domain: Any) -> _Line:
    """The row of i after its arrow to k has been replaced by where k goes; what comes back to i is dropped."""
    w = other.to[k]
    to = {j: total * v for j, v in other.to.items() if j != k}
    for j, v in line.to.items():
        if j != i:
            to[j] = to[j] + w * v if j in to else w * v
    known, gain = total * other.known + w * line.known, total * other.gain + w * line.gain
    common = known
    for v in (gain, *to.values()):
        if common == domain.one:
            break
        common = domain.gcd(common, v)
    if common == domain.one or not common:
        return _Line(to, known, gain)
    cut = lambda v: domain.exquo(v, common)  # noqa: E731
    return _Line({j: cut(v) for j, v in to.items()}, cut(known), cut(gain))


def _lowest(top: Any, total: Any, scale: Any, domain: Any) -> Pair:
    """``top / (total * scale)`` in lowest terms."""
    if not total:
        raise InputError(
            "The rates out of a state cancel identically.",
            cause="Entries such as a and -a cannot both be probabilities.",
            next="Correct the entries.",
        )
    # By Cramer's rule the total mostly divides, and then what is left for the greatest common divisor is small.
    quotient, rest = domain.div(top, total)
    top, bottom = (quotient, scale) if not rest else (top, total * scale)
    common = domain.gcd(top, bottom)
    return domain.exquo(top, common), domain.exquo(bottom, common)
