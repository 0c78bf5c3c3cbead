"""Derivations about perturbed rows, the size of a language chain, and a bound that forgets what it bounds."""

from __future__ import annotations

from typing import Any

import sympy

from .symbolic import Derivation

__all__ = ["language_density", "language_size", "loose_factor", "shifted_mass"]

PAPER = "arXiv 2410.02724"


def shifted_mass() -> Derivation:
    """Mass eps moved from refusal to harm in both rows of a two-state chain: the N-TV certificate is attained."""
    eps = sympy.Symbol("eps", positive=True)
    q: Any = sympy.Matrix(2, 2, sympy.symbols("q11 q12 q21 q22", positive=True))
    b: Any = sympy.Matrix(2, 1, sympy.symbols("b1 b2", positive=True))
    q2: Any = sympy.Matrix(2, 2, sympy.symbols("u11 u12 u21 u22", positive=True))
    b2: Any = sympy.Matrix(2, 1, sympy.symbols("v1 v2", positive=True))
    one = sympy.eye(2)

    def visits(m: Any) -> Any:
        return (one - m).adjugate() / (one - m).det()

    N, N2 = visits(q), visits(q2)
    h, h2 = N * b, N2 * b2
    first, second = N2 * ((q2 - q) * h + (b2 - b)), N * ((q2 - q) * h2 + (b2 - b))
    q11, q12, q21, q22 = q
    formula = eps * (1 - q22 + q12) / ((1 - q11) * (1 - q22) - q12 * q21)
    moved = visits(q) * (b + eps * sympy.ones(2, 1)) - h
    return Derivation(
        name="shifted mass",
        statement=sympy.Eq(sympy.Symbol("h'") - sympy.Symbol("h"), formula),
        symbols={"eps": eps, "q11": q11, "q12": q12, "q21": q21, "q22": q22},
        assumptions="two states; eps of each row's mass moves from refusal to harm",
        steps=(
            ("any change: h' - h = N' dP h, state 1", sympy.together(h2[0] - h[0] - first[0])),
            ("and state 2", sympy.together(h2[1] - h[1] - first[1])),
            ("the other form: h' - h = N dP h', state 1", sympy.together(h2[0] - h[0] - second[0])),
            ("mass to harm changes h by eps per visit: the sum of N TV", moved[0] - eps * (N[0, 0] + N[0, 1])),
            ("which is", sympy.Eq(moved[0], formula)),
        ),
        source="resolvent identity; the certificate is our own",
    )


def _size() -> tuple[Any, Any, Any]:
    T = sympy.Symbol("T", integer=True, positive=True)
    K = sympy.Symbol("K", integer=True, positive=True)
    return T, K, T * (T**K - 1) / (T - 1)


def language_size() -> Derivation:
    """Number of strings of 1 to K of T tokens."""
    T, K, formula = _size()
    return Derivation(
        name="strings of a context",
        statement=sympy.Eq(sympy.Symbol("n"), formula),
        symbols={"T": T, "K": K},
        assumptions="T > 1 tokens, strings of 1 to K of them",
        steps=(
            ("strings of one token", formula.subs(K, 1) - T),
            (
                "one place more adds T^(K + 1) strings",
                sympy.expand((formula.subs(K, K + 1) - formula - T ** (K + 1)) * (T - 1)),
            ),
            ("one token only, T to 1: K strings", sympy.Eq(sympy.limit(formula.subs(K, 7), T, 1), 7)),
        ),
        source=f"{PAPER}, proposition 3.1",
    )


def language_density() -> Derivation:
    """Share of entries of a language chain that may be non-zero."""
    T, K, size = _size()
    formula = (T - 1) / (T**K - 1)
    return Derivation(
        name="density of a language chain",
        statement=sympy.Eq(sympy.Symbol("rho"), formula),
        symbols={"T": T, "K": K},
        assumptions="T > 1 tokens; from every string T strings follow",
        steps=(
            ("T entries in each of n rows of n", sympy.Eq(size * T / size**2, formula)),
            ("a context of one: every entry", formula.subs(K, 1) - 1),
        ),
        source=f"{PAPER}, proposition 3.1",
    )


def loose_factor() -> Derivation:
    """How many times the published deviation bound exceeds that from total variation at most 1."""
    T, r, tau, N, delta, gamma = sympy.symbols("T r tau N delta gamma", positive=True)
    inside = sympy.log(T) + 2 * T * sympy.sqrt(r) / tau
    formula = 2 * sympy.sqrt(2) * sympy.sqrt(inside)
    room = sympy.sqrt(sympy.log(2 / delta) / N)
    t, n = sympy.symbols("t n", positive=True)
    tail = 2 * sympy.exp(-2 * t**2 / (n * (1 / n) ** 2))  # McDiarmid, n differences of 1 / n each
    return Derivation(
        name="loose factor",
        statement=sympy.Eq(sympy.Symbol("B") * sympy.sqrt(2), formula),
        symbols={"T": T, "r": r, "tau": tau},
        assumptions="output norm T sqrt(r), the logarithm of the vocabulary the larger term",
        steps=(
            (
                "bounded differences 1 / n leave delta outside of sqrt(ln(2 / delta) / (2 n))",
                sympy.Eq(tail.subs(t, sympy.sqrt(sympy.log(2 / delta) / (2 * n))), delta),
            ),
            (
                "the ratio of both bounds, whatever N, delta and the mixing of the text",
                sympy.Eq(2 * gamma * sympy.sqrt(inside) * room / (gamma * room / sympy.sqrt(2)), formula),
            ),
        ),
        source=f"{PAPER}, theorem 4.2; the comparison is our own",
    )
