"""Derivations about rotations: harm of a twirled chain, what pooling leaves of the variance, hazard that is spread."""

from __future__ import annotations

from typing import Any

import sympy

from .symbolic import Derivation

__all__ = ["hazard_budget", "participation_ratio", "twirled_harm"]

OWN = "our own; the setting is the cyclic augmentation of arXiv 2502.00669, whose proofs we could not read"


def twirled_harm() -> Derivation:
    """Harm of a chain averaged over rotations: a / (a + r)."""
    a, r, h = sympy.symbols("a r h", positive=True)
    n = 3
    P: Any = sympy.Matrix(n, n, lambda i, j: sympy.Symbol(f"p{i}{j}"))
    harm: Any = sympy.Matrix(n, 1, lambda i, _: sympy.Symbol(f"a{i}"))
    ends: Any = sympy.Matrix(n, 1, lambda i, _: sympy.Symbol(f"r{i}"))
    shift: Any = sympy.Matrix(n, n, lambda i, j: int((i + 1) % n == j))
    turns = [shift**g for g in range(n)]
    mean: Any = sum((T.T * P * T for T in turns), sympy.zeros(n)) / n
    mean_harm: Any = sum((T.T * harm for T in turns), sympy.zeros(n, 1)) / n
    commute = sympy.simplify((mean * shift - shift * mean).norm() ** 2)
    closed = {P[i, 0]: 1 - harm[i] - ends[i] - sum(P[i, 1:]) for i in range(n)}
    rows: Any = [sum(mean[i, :]) for i in range(n)]
    stay: Any = [sympy.expand(row.subs(closed)) for row in rows]
    means = {a: sum(harm) / n, r: sum(ends) / n}
    formula = a / (a + r)
    return Derivation(
        name="twirled harm",
        statement=sympy.Eq(sympy.Symbol("h"), formula),
        symbols={"a": a, "r": r},
        assumptions="one cycle of states and ends beside it; a, r are means over the cycle of the probabilities to end",
        steps=(
            ("the averaged chain is the same after a rotation (three states)", commute),
            ("each of its states is harmful with the mean probability", mean_harm[0] - means[a]),
            ("and so is the next", mean_harm[1] - mean_harm[0]),
            ("and it goes on within the cycle with the rest", stay[0] - (1 - a - r).subs(means)),
            ("from whichever state", stay[2] - stay[0]),
            (
                "so one number h for all states solves h = a + (1 - a - r) h",
                sympy.Eq(sympy.solve(sympy.Eq(h, a + (1 - a - r) * h), h)[0], formula),
            ),
        ),
        source=OWN,
    )


def participation_ratio() -> Derivation:
    """What pooling n symmetric rows leaves of the variance of harm, on a ring that moves on with ratio q."""
    q, v = sympy.symbols("q v", positive=True)
    n = sympy.Symbol("n", integer=True, positive=True)
    size = 3
    N = sympy.symbols(f"N0:{size}", positive=True)
    plain, pooled = sum(x**2 for x in N) * v, sum(N) ** 2 * v / size
    w = [x / sum(N) for x in N]
    geometric = lambda x: (1 - x**n) / (1 - x)  # noqa: E731
    formula = (1 - q**n) * (1 + q) / (n * (1 - q) * (1 + q**n))
    return Derivation(
        name="participation ratio of a ring",
        statement=sympy.Eq(sympy.Symbol("V_pooled") / sympy.Symbol("V_plain"), formula),
        symbols={"q": q, "n": n},
        assumptions="a symmetric ring of n states, first-order variance, as many samples of every row; state k has "
        "q^k of the visits of the first, 0 < q < 1",
        steps=(
            (
                "pooled over plain variance is 1 / (n sum w^2) (three states)",
                sympy.Eq(pooled / plain, 1 / (size * sum(x**2 for x in w))),
            ),
            ("it is 1 for even visits", (pooled / plain).subs(dict.fromkeys(N, N[0])) - 1),
            ("the sum of q^k over k < n: induction step", geometric(q).subs(n, n + 1) - geometric(q) - q**n),
            ("and its first term", geometric(q).subs(n, 1) - 1),
            (
                "square of the sum over n times the sum of squares",
                sympy.Eq(geometric(q) ** 2 / (n * geometric(q**2)), formula),
            ),
            ("slow ring, q to 1: nothing is gained", sympy.Eq(sympy.limit(formula.subs(n, 8), q, 1), 1)),
            (
                "all visits at the start, q to 0: all is gained",
                sympy.Eq(sympy.limit(formula.subs(n, 8), q, 0), sympy.Rational(1, 8)),
            ),
        ),
        source=OWN,
    )


def hazard_budget() -> Derivation:
    """A sum rho of refusal hazards, spread evenly over n positions of which k are forced."""
    rho, x, y = sympy.symbols("rho x y", positive=True)
    n = sympy.Symbol("n", integer=True, positive=True)
    j, k = sympy.symbols("j k", integer=True, nonnegative=True)
    formula = (1 - rho / n) ** (n - k)
    leak = sympy.Function("S")
    recursion: Any = sympy.rsolve(leak(j + 1) - (1 - rho / n) * leak(j), leak(j), {leak(0): 1})
    return Derivation(
        name="spread hazard",
        statement=sympy.Eq(sympy.Symbol("S"), formula),
        symbols={"rho": rho, "n": n, "k": k},
        assumptions="every position refuses with probability rho / n; k of n positions are forced",
        steps=(
            (
                "j = n - k positions are left: S_(j+1) = (1 - rho / n) S_j, S_0 = 1",
                sympy.Eq(recursion.subs(j, n - k), formula),
            ),
            (
                "evening out two hazards lets more through, by a square",
                ((1 - (x + y) / 2) ** 2 - (1 - x) * (1 - y)) - (x - y) ** 2 / 4,
            ),
            ("many positions", sympy.Eq(sympy.limit((1 - rho / n) ** n, n, sympy.oo), sympy.exp(-rho))),
            ("a fixed product changes nothing", ((1 - rho) ** (1 / n)) ** n - (1 - rho)),
        ),
        source="our own",
    )
