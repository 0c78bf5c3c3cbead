"""Hitting probabilities as formulas: small chains whose entries are rational functions of named parameters.

The graph speaks first: an entry that is identically zero is no arrow, and what cannot reach the target is exactly 0.
The rest is eliminated without subtraction (`symbolic_elimination`), the diagonal being implied as everywhere here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import reduce
from math import lcm
from typing import Any

import numpy as np
import scipy.sparse as sp
import sympy
from numpy.typing import NDArray
from sympy.polys.polyerrors import CoercionFailed

from ..bound import Bound
from ..chains import Chain
from ..errors import InputError
from . import core, graph
from .exact import to_columns
from .intervals import proven
from .symbolic_elimination import solve
from .symbolic_entries import number, read

__all__ = ["Rational", "fractions", "rational"]

FACTOR_LIMIT = 100  # terms; below it a formula is factored, above it only cancelled


@dataclass(frozen=True, eq=False, repr=False)
class Rational:
    """Hitting probabilities as rational functions of the parameters of a chain; made by `rational`.

    Attributes
    ----------
    expressions : tuple of n sympy expressions
        By state, cancelled, factored where that is cheap; 1 on the target, 0 where it cannot be reached.
    parameters : tuple of sympy symbols
        Sorted by name.
    P : tuple of rows of sympy expressions
        The chain, with absorbing outcomes made explicit.
    start : tuple of n sympy expressions, or None
        The start law.
    states : sequence
        Labels.
    name : str
        What is hit.

    Notes
    -----
    The formulas hold wherever no entry of the chain becomes 0 that is not 0 everywhere. On such an edge a state may
    lose its way to the target, and the probability may jump; `evaluate` knows, a plain substitution does not.
    """

    expressions: tuple[Any, ...]
    parameters: tuple[Any, ...]
    P: tuple[tuple[Any, ...], ...]
    start: tuple[Any, ...] | None
    states: Sequence[Any]
    name: str
    _hit: NDArray[np.bool_] = field(kw_only=True)

    @property
    def at_start(self) -> Any:
        """The formula at the start law.

        Raises
        ------
        InputError
            If there is no start.
        """
        if self.start is None:
            raise core.without_start("A formula at the start")
        return _tidy(sum((p * h for p, h in zip(self.start, self.expressions) if p != 0), sympy.S.Zero))

    def diff(self, name: Any) -> tuple[Any, ...]:
        """Derivative of every state's formula with respect to one parameter.

        Parameters
        ----------
        name : str or sympy symbol

        Returns
        -------
        tuple of n sympy expressions

        Raises
        ------
        InputError
            If there is no such parameter.
        """
        symbol = self._symbols([name])[str(name)]
        return tuple(_tidy(sympy.diff(h, symbol)) for h in self.expressions)

    def evaluate(self, **values: Any) -> Bound:
        """Numbers from the formulas, in rational arithmetic.

        Parameters
        ----------
        **values : int, Fraction, str, float or sympy number
            One for each parameter. A string is a number like "1/3"; a float means the decimal that it prints as, so
            that 0.1 and 0.9 add up to one.

        Returns
        -------
        Bound
            Shape (n,), proven, with the fractions as ``exact``. Where an entry of the chain becomes 0 at these values
            that is not 0 everywhere, the chain of these values is solved anew.

        Raises
        ------
        InputError
            If a parameter is missing or unknown, or an entry of the chain or the start is no probability.
        """
        symbols = self._symbols(values)
        missing = [s.name for s in self.parameters if s.name not in values]
        if missing:
            raise InputError(
                f"The parameter {missing[0]!r} has no value.",
                cause=f"The parameters are {', '.join(s.name for s in self.parameters)}.",
                next="Give every parameter a value.",
            )
        at = {symbols[k]: number(v, f"The parameter {k!r}") for k, v in values.items()}
        rows = [
            [_probability(p, at, f"The entry from {_at(i, self.states)} to {_at(j, self.states)}") for j, p in _on(row)]
            for i, row in enumerate(self.P)
        ]
        law = None if self.start is None else [_probability(p, at, "A weight of the start law") for p in self.start]
        edge = any(p == 0 for i, row in enumerate(rows) if not self._hit[i] for p in row)
        if edge:
            dense = [[sympy.S.Zero] * len(rows) for _ in rows]
            for i, row in enumerate(rows):
                for (j, _), p in zip(_on(self.P[i]), row):
                    dense[i][j] = p
            again, why = _formulas(dense, self._hit, ()), "solved at these values, where an arrow of the chain is 0"
        else:
            again, why = [h.xreplace(at) for h in self.expressions], "the formulas at these values"
        exact = [Fraction(int(h.p), int(h.q)) for h in again]
        info = {"name": f"P({self.name})", "method": "symbolic", "why": why}
        start = None
        if law is not None:
            mean = sum((Fraction(int(p.p), int(p.q)) * h for p, h in zip(law, exact)), Fraction(0))
            start = proven(to_columns([mean])[0], info | {"exact": mean})
        return proven(to_columns(exact), info | {"exact": exact}, start)

    def latex(self, state: Any = None) -> str:
        """The formulas in LaTeX, without dollar signs.

        Parameters
        ----------
        state : label, optional
            Its formula alone; if not given, that of the start, or of all states in an `aligned` block if there is no
            start.
        """
        if state is not None:
            if state not in self.states:
                raise InputError(
                    f"{state!r} is no state.",
                    cause=f"The states are {', '.join(map(repr, self.states))}.",
                    next="Pass one of these labels.",
                )
            return sympy.latex(self.expressions[list(self.states).index(state)])
        if self.start is not None:
            return sympy.latex(self.at_start)
        lines = [rf"h_{{{i}}} &= {sympy.latex(h)}" for i, h in enumerate(self.expressions)]
        return "\\begin{aligned}\n" + " \\\\\n".join(lines) + "\n\\end{aligned}"

    def __repr__(self) -> str:
        names = ", ".join(s.name for s in self.parameters) or "no parameters"
        text = "" if self.start is None else sympy.sstr(self.at_start)
        start = f"; at start {text if len(text) <= 120 else text[:120] + '...'}" if text else ""
        return f"<Rational P({self.name}) of {len(self.states)} states in {names}{start}>"

    def _symbols(self, names: Any) -> dict[str, Any]:
        known = {s.name: s for s in self.parameters}
        for name in map(str, names):
            if name not in known:
                raise InputError(
                    f"There is no parameter {name!r}.",
                    cause=f"The parameters are {', '.join(known)}." if known else "The chain has no parameters.",
                    next="Use one of these names." if known else "Read `expressions`: they are numbers.",
                )
        return known


def rational(
    P: Any,
    outcomes: Mapping[str, Any],
    target: Any = "harm",
    start: Any = None,
    states: Sequence[Any] | None = None,
) -> Rational:
    """Probability of ever hitting a target, as a rational function of named parameters.

    Parameters
    ----------
    P : nested lists or sympy Matrix, shape (n, n)
        Entries are numbers, sympy expressions, or texts like ``"1 - a - r"`` made of numbers, names, ``+ - * / **`` and
        parentheses. A float means the decimal that it prints as. Rows must sum to one identically; an outcome row of
        zeros means absorbing.
    outcomes, states
        As for `Chain`.
    target : as in `hitting_probability`
    start : int, label, or law of n entries like those of P, optional

    Returns
    -------
    Rational

    Raises
    ------
    InputError
        If a row does not sum to one, an entry is no rational function with rational coefficients, or outcomes, target
        or start do not fit.

    Notes
    -----
    Formulas grow: tens of states with a few parameters are comfortable if the chain is sparse; a dense cyclic class
    of m states has a denominator of degree up to m in every parameter.
    """
    entries, law, parameters = read(P, start)
    n = len(entries)
    pattern = np.array([[float(p != 0) for p in row] for row in entries])
    sizes = np.maximum(pattern.sum(axis=1, keepdims=True), 1)
    # The same arrows with arbitrary numbers: names, targets and the graph are looked up where every chain's are.
    shape = Chain(pattern / sizes, outcomes, None if law is not None else start, states)
    for i in np.flatnonzero(shape.outcome_mask & ~pattern.any(axis=1)):
        entries[i][i] = sympy.S.One
    if law is None and shape.start is not None:
        law = [sympy.Integer(int(p)) for p in shape.start]
    w = core.walk(shape, target)
    domain = _domain(parameters)
    for i, row in enumerate(entries):
        _check_sum(row, domain, f"The row of {_at(i, shape.states)}")
    if law is not None:
        if len(law) != n:
            raise InputError(
                f"The start law has {len(law)} entries for {n} states.",
                cause="A law has one weight per state.",
                next="Pass one weight per state, a label or an index.",
            )
        _check_sum(law, domain, "The start law")
    expressions = _formulas(entries, w.hit, parameters)
    return Rational(
        tuple(expressions),
        parameters,
        tuple(tuple(row) for row in entries),
        None if law is None else tuple(law),
        shape.states,
        w.name,
        _hit=w.hit,
    )


def fractions(
    rows: Sequence[Mapping[int, Fraction]], W: Any, free: NDArray[np.bool_], one: NDArray[np.bool_]
) -> tuple[list[Fraction], list[Any]]:
    """Hitting probabilities of a chain without parameters, by the same elimination.

    Parameters
    ----------
    rows : list of dict
        Exact off-diagonal rates, from `exact.rows_of`.
    W : csr array, shape (n, n)
        Their pattern.
    free, one : bool array, shape (n,)
        Unknown states, and those known to be 1.

    Returns
    -------
    list of Fraction, list of sympy Rational
    """
    integers = []
    for row in rows:
        scale = lcm(*(v.denominator for v in row.values()))
        integers.append({j: sympy.ZZ(int(v * scale)) for j, v in row.items()})
    exact = [Fraction(int(p), int(q)) for p, q in solve(integers, W, free, one, sympy.ZZ)]
    return exact, [sympy.Rational(x.numerator, x.denominator) for x in exact]


def _at(i: int, states: Sequence[Any]) -> str:
    return f"state {i}" if isinstance(states, range) else f"state {i} ({states[i]!r})"


def _on(row: Sequence[Any]) -> list[tuple[int, Any]]:
    return [(j, p) for j, p in enumerate(row) if p != 0]


def _domain(parameters: Sequence[Any]) -> Any:
    return sympy.ZZ[tuple(parameters)] if parameters else sympy.ZZ


def _in_field(expression: Any, domain: Any, what: str) -> Any:
    try:
        return domain.get_field().from_sympy(expression)
    except (CoercionFailed, ValueError, ZeroDivisionError):
        raise InputError(
            f"{what} is {expression}.",
            cause="Only rational functions of the parameters, with rational coefficients, can be eliminated.",
            next="Name the irrational part as a parameter of its own.",
        ) from None


def _check_sum(row: Sequence[Any], domain: Any, what: str) -> None:
    total = sum(
        (_in_field(p, domain, f"An entry of {what[0].lower()}{what[1:]}") for p in row), domain.get_field().zero
    )
    if total != domain.get_field().one:
        raise InputError(
            f"{what} sums to {domain.get_field().to_sympy(total)}.",
            cause="A law sums to one whatever the parameters are; floats count as the decimals they print as.",
            next='Write the last entry as the rest, e.g. "1 - a - r", and fractions as "1/3".',
        )


def _probability(expression: Any, at: Mapping[Any, Any], what: str) -> Any:
    value = expression.xreplace(at)
    if not (value.is_Rational and 0 <= value <= 1):
        raise InputError(
            f"{what} is {value} at these values ({expression}).",
            cause="A probability lies in [0, 1].",
            next="Pass parameters for which every entry is a probability.",
        )
    return value


def _tidy(expression: Any) -> Any:
    whole = sympy.cancel(expression)
    top, bottom = sympy.fraction(whole)
    small = len(sympy.Add.make_args(top)) + len(sympy.Add.make_args(bottom)) <= FACTOR_LIMIT
    return sympy.factor(whole) if small else whole


def _formulas(entries: Sequence[Sequence[Any]], hit: NDArray, parameters: Sequence[Any]) -> list[Any]:
    domain = _domain(parameters)
    rows = []
    for i, row in enumerate(entries):
        off = {j: _in_field(p, domain, "An entry") for j, p in _on(row) if j != i}
        rows.append(_polynomials(off, domain))
    pattern = np.array([[float(j in row) for j in range(len(rows))] for row in rows])
    W, moving = sp.csr_array(pattern), ~hit
    can = graph.reaching(W, hit, moving)
    sure = can & moving & ~graph.reaching(W, ~can, moving)
    pairs = solve(rows, W, can & moving & ~sure, hit | sure, domain)
    return [_formula(p, q, domain, bool(parameters)) for p, q in pairs]


def _polynomials(row: Mapping[int, Any], domain: Any) -> dict[int, Any]:
    """A row times the denominators of its entries, which changes no hitting probability."""
    over = domain.get_field()
    scale = reduce(domain.lcm, (over.denom(v) for v in row.values()), domain.one)
    return {j: over.numer(v) * domain.exquo(scale, over.denom(v)) for j, v in row.items()}


def _formula(top: Any, bottom: Any, domain: Any, factored: bool) -> Any:
    value = domain.to_sympy(top) / domain.to_sympy(bottom)
    return sympy.factor(value) if factored and len(top) + len(bottom) <= FACTOR_LIMIT else value
