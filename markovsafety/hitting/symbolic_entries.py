"""From what people write to sympy: texts without evaluating code, floats as the decimals they print as."""

from __future__ import annotations

import ast
from fractions import Fraction
from numbers import Integral, Real
from typing import Any

import numpy as np
import sympy

from ..errors import InputError

__all__ = ["number", "read"]

OPERATIONS = {
    ast.Add: lambda a, b: a + b,
    ast.Sub: lambda a, b: a - b,
    ast.Mult: lambda a, b: a * b,
    ast.Div: lambda a, b: a / b,
    ast.Pow: lambda a, b: a**b,
}


def read(P: Any, start: Any) -> tuple[list[list[Any]], list[Any] | None, tuple[Any, ...]]:
    """Entries of a matrix, of the start if it is a law, and the parameters sorted by name.

    Raises
    ------
    InputError
        If the matrix is not square, or an entry cannot be read.
    """
    raw = P.tolist() if isinstance(P, (sympy.MatrixBase, np.ndarray)) else P
    if not isinstance(raw, (list, tuple)) or not raw or not all(isinstance(r, (list, tuple)) for r in raw):
        raise _shape("it is not a list of rows")
    if any(len(r) != len(raw) for r in raw):
        raise _shape(f"rows have {', '.join(map(str, sorted({len(r) for r in raw})))} entries, there are {len(raw)}")
    law = None
    if isinstance(start, (list, np.ndarray, sympy.MatrixBase)):
        law = list(np.ravel(np.array(start, dtype=object)))
    given = [p for row in raw for p in row] + (law or [])
    symbols: dict[str, Any] = {}
    for p in given:
        used: Any = p.free_symbols if isinstance(p, sympy.Basic) else ()
        for s in sorted(used, key=str):
            if symbols.setdefault(s.name, s) != s:
                raise InputError(
                    f"Two different parameters are named {s.name!r}.",
                    cause="Sympy symbols with different assumptions are different.",
                    next="Use one symbol throughout.",
                )
    rows = [[_entry(p, symbols, f"P[{i}][{j}]") for j, p in enumerate(row)] for i, row in enumerate(raw)]
    weights = None if law is None else [_entry(p, symbols, f"start[{i}]") for i, p in enumerate(law)]
    for i, j in np.ndindex(len(rows), len(rows)):
        if rows[i][j].is_Rational and not 0 <= rows[i][j] <= 1:
            raise _unreadable(f"P[{i}][{j}]", raw[i][j], "A probability lies in [0, 1].")
    used = set().union(*(p.free_symbols for row in [*rows, weights or []] for p in row))
    return rows, weights, tuple(sorted(used, key=lambda s: s.name))


def number(x: Any, what: str) -> Any:
    """A sympy Rational.

    Raises
    ------
    InputError
        If it is none.
    """
    value = _entry(x, {}, what)
    if not value.is_Rational:
        raise _unreadable(what, x, "It is no rational number.")
    return value


def _shape(cause: str) -> InputError:
    return InputError("P is not a square matrix.", cause=f"{cause[0].upper()}{cause[1:]}.", next="Pass n rows of n.")


def _unreadable(what: str, x: Any, cause: str) -> InputError:
    return InputError(
        f"{what} is {x!r}.",
        cause=cause,
        next='Write numbers, sympy expressions, or texts of numbers, names, + - * / ** and parentheses: "1 - a - r".',
    )


def _entry(x: Any, symbols: dict[str, Any], what: str) -> Any:
    try:
        value = _convert(x, symbols)
        value = value if value.is_Rational else sympy.cancel(value)
    except InputError:
        raise
    except (SyntaxError, TypeError, ValueError, ZeroDivisionError, AttributeError, sympy.PolynomialError) as error:
        raise _unreadable(what, x, str(error) or "It cannot be read.") from None
    if value.is_number and not value.is_Rational:
        raise _unreadable(what, x, "Numbers must be rational and finite.")
    return value


def _convert(x: Any, symbols: dict[str, Any]) -> Any:
    if isinstance(x, str):
        return _parse(ast.parse(x.strip(), mode="eval").body, x.strip(), symbols)
    if isinstance(x, sympy.Expr):
        floats = {f: _decimal(str(f) if f._prec > 53 else repr(float(f))) for f in x.atoms(sympy.Float)}
        return x.xreplace(floats)
    if isinstance(x, Fraction):
        return sympy.Rational(x.numerator, x.denominator)
    if isinstance(x, (bool, np.bool_)):
        raise TypeError("A truth value is no probability.")
    if isinstance(x, Integral):
        return sympy.Integer(int(x))
    if isinstance(x, Real):
        return _decimal(repr(float(x)))
    raise TypeError(f"A {type(x).__name__} is no number.")


def _decimal(text: str) -> Any:
    value = Fraction(text)  # refuses nan and inf
    return sympy.Rational(value.numerator, value.denominator)


def _parse(node: ast.expr, text: str, symbols: dict[str, Any]) -> Any:
    if isinstance(node, ast.Name):
        return symbols.setdefault(node.id, sympy.Symbol(node.id))
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return _decimal((ast.get_source_segment(text, node) or "").replace("_", ""))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.UAdd)):
        value = _parse(node.operand, text, symbols)
        return -value if isinstance(node.op, ast.USub) else value
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATIONS:
        left, right = _parse(node.left, text, symbols), _parse(node.right, text, symbols)
        if isinstance(node.op, ast.Pow) and not (right.is_Integer and abs(right) <= 100):
            raise ValueError("Exponents are whole numbers up to 100.")
        return OPERATIONS[type(node.op)](left, right)
    raise ValueError(f"{ast.get_source_segment(text, node)!r} is not read.")
