"""Derivations about width: products, beta moments, majorities, shocks, the exchange with depth, best-of-N."""

from __future__ import annotations

from typing import Any

import sympy
from sympy import Eq, Rational, binomial, gamma, log, sqrt

from .symbolic import Derivation

__all__ = [
    "any_refusal",
    "best_of_n",
    "beta_binomial",
    "common_shock",
    "cost_optimum",
    "even_majority",
    "hyperbola",
    "majority_floor",
    "odd_majority",
    "power_tail",
    "token_average",
    "worth_in_tokens",
]

OWN = "our own"
q, icc, alpha, beta, p = sympy.symbols("q rho alpha beta p", positive=True)
m, n, N = sympy.symbols("m n N", integer=True, positive=True)
j = sympy.Symbol("j", integer=True, nonnegative=True)


def _moment(a: Any, b: Any, k: Any) -> Any:
    """E[p^k] for p ~ Beta(a, b)."""
    return gamma(a + k) * gamma(a + b) / (gamma(a) * gamma(a + b + k))


def _beta(a: Any, b: Any) -> Any:
    return gamma(a) * gamma(b) / gamma(a + b)


def _majority(size: int) -> Any:
    """P(more than half of `size` independent answers), as a polynomial in p."""
    return sum(binomial(size, i) * p**i * (1 - p) ** (size - i) for i in range(size // 2 + 1, size + 1))


def any_refusal() -> Derivation:
    """Independent answers, one refusal is enough: q^m."""
    S = sympy.Function("S")
    solved: Any = sympy.rsolve(S(j + 1) - q * S(j), S(j), {S(0): 1})
    return Derivation(
        name="any refusal",
        statement=Eq(sympy.Symbol("h_m"), q**m),
        symbols={"q": q, "width": m},
        assumptions="m independent answers, each harmful with probability q; harm only if all are",
        steps=(("one more answer has to be harmful too: h_(m+1) = q h_m, h_0 = 1", Eq(solved.subs(j, m), q**m)),),
        source="folklore",
    )


def beta_binomial() -> Derivation:
    """Alike answers: a ratio of beta functions."""
    s = (1 - icc) / icc
    law = _moment(alpha, beta, j)
    formula = _moment(q * s, (1 - q) * s, m)
    pair = _moment(q * s, (1 - q) * s, 2)
    return Derivation(
        name="beta-binomial any refusal",
        statement=Eq(sympy.Symbol("h_m"), formula),
        symbols={"q": q, "icc": icc, "width": m},
        assumptions="p ~ Beta(q s, (1 - q) s) with s = (1 - rho) / rho, then m independent answers; 0 < rho < 1",
        steps=(
            (
                "after j harmful answers p is Beta(alpha + j, beta), with this mean",
                (alpha + j) / (alpha + beta + j) - _beta(alpha + j + 1, beta) / _beta(alpha + j, beta),
            ),
            (
                "so the next factor of the product is that",
                sympy.gammasimp(law.subs(j, j + 1) / law) - (alpha + j) / (alpha + beta + j),
            ),
            ("and the product of none is one", law.subs(j, 0) - 1),
            ("one answer: q", sympy.gammasimp(formula.subs(m, 1)) - q),
            ("two answers correlate by rho", (sympy.gammasimp(pair) - q**2) / (q * (1 - q)) - icc),
            (
                "rho to 0: independence (three answers)",
                Eq(sympy.limit(sympy.gammasimp(formula.subs(m, 3)), icc, 0), q**3),
            ),
            ("rho to 1: all alike (three answers)", Eq(sympy.limit(sympy.gammasimp(formula.subs(m, 3)), icc, 1), q)),
        ),
        source="J. G. Skellam, J. R. Stat. Soc. B 10 (1948) 257",
    )


def power_tail() -> Derivation:
    """The beta-binomial falls like a power of the width."""
    formula = gamma(alpha + beta) / gamma(alpha) * m ** (-beta)
    x = sympy.Symbol("x", positive=True)
    steps = []
    for b in (1, 2, 3):
        exact = sympy.gammasimp(_moment(alpha, sympy.Integer(b), x))
        ratio = sympy.combsimp(sympy.gammasimp(exact / formula.subs({beta: b, m: x})))
        steps.append((f"width to infinity, beta = {b}", Eq(sympy.limit(ratio, x, sympy.oo), 1)))
    step = sympy.series(log((1 + alpha * x) / (1 + (alpha + beta) * x)) + beta * log(1 + x), x, 0, 2).removeO()
    return Derivation(
        name="power tail of width",
        statement=Eq(sympy.Symbol("h_m"), formula),
        symbols={"alpha": alpha, "beta": beta, "width": m},
        assumptions="p ~ Beta(alpha, beta), leading term as m grows: never exponential",
        steps=(
            (
                "the factor (alpha + m) / (alpha + beta + m) is (m / (m + 1))^beta up to 1 / m^2; x = 1 / m",
                step,
            ),
            *steps,
        ),
        source=OWN,
    )


def majority_floor() -> Derivation:
    """Unlimited majority: the share of prompts whose own harm exceeds one half."""
    x = sympy.Symbol("x", positive=True)
    inside = sympy.betainc_regularized(alpha, beta, x, 1)
    formula = sympy.betainc_regularized(alpha, beta, Rational(1, 2), 1)
    density = p * (1 - p) ** 2 / sympy.beta(2, 3).doit()
    few = [sympy.integrate(sympy.expand(_majority(k) * density), (p, 0, 1)) for k in (1, 3, 5, 41)]
    limit = sympy.integrate(sympy.expand(density), (p, Rational(1, 2), 1))
    return Derivation(
        name="majority floor",
        statement=Eq(sympy.Symbol("h_oo"), formula),
        symbols={"alpha": alpha, "beta": beta},
        assumptions="p ~ Beta(alpha, beta); more than half of m answers harmful, m to infinity",
        steps=(
            (
                "a majority of many is right about p: p (1 - p) / m is the variance of the share",
                Eq(sympy.limit(p * (1 - p) / m, m, sympy.oo), 0),
            ),
            (
                "so what is left is the mass above 1/2: its derivative is minus the density",
                sympy.diff(inside, x) + x ** (alpha - 1) * (1 - x) ** (beta - 1) / sympy.beta(alpha, beta),
            ),
            ("an example, alpha = 2, beta = 3", Eq(limit, Rational(5, 16))),
            (
                "a majority of 1, 3, 5 and 41 approaches it from above",
                sympy.true if all(a > b for a, b in zip(few, [*few[1:], limit])) else sympy.false,
            ),
        ),
        source=OWN,
    )


def odd_majority() -> Derivation:
    """Two more answers to an odd majority: the change has the sign of alpha - beta."""
    one = binomial(2 * n - 1, n) * p**n * (1 - p) ** n * (2 * p - 1)
    mean = _beta(alpha + n + 1, beta + n) - _beta(alpha + n, beta + n + 1)
    formula = (
        binomial(2 * n - 1, n)
        * _beta(alpha + n, beta + n)
        / _beta(alpha, beta)
        * (alpha - beta)
        / (alpha + beta + 2 * n)
    )
    few = [
        (
            f"from {2 * k - 1} to {2 * k + 1} answers with one p",
            sympy.expand(_majority(2 * k + 1) - _majority(2 * k - 1) - one.subs(n, k)),
        )
        for k in (1, 2, 3)
    ]
    return Derivation(
        name="odd majority",
        statement=Eq(sympy.Symbol("h_(2n+1)") - sympy.Symbol("h_(2n-1)"), formula),
        symbols={"alpha": alpha, "beta": beta, "n": n},
        assumptions="p ~ Beta(alpha, beta); more than half of the answers harmful",
        steps=(
            *few,
            (
                "its mean: 2p - 1 is p less 1 - p",
                sympy.gammasimp(mean - _beta(alpha + n, beta + n) * (alpha - beta) / (alpha + beta + 2 * n)),
            ),
        ),
        source=OWN,
    )


def even_majority() -> Derivation:
    """Two more answers to an even majority, at which a tie refuses."""
    one = binomial(2 * n, n) * p ** (n + 1) * (1 - p) ** n * (p - (1 - p) * n / (n + 1))
    mean = _beta(alpha + n + 2, beta + n) - n / (n + 1) * _beta(alpha + n + 1, beta + n + 1)
    tail = ((n + 1) * (alpha + n + 1) - n * (beta + n)) / ((n + 1) * (alpha + beta + 2 * n + 1))
    formula = binomial(2 * n, n) * _beta(alpha + n + 1, beta + n) / _beta(alpha, beta) * tail
    few = [
        (
            f"from {2 * k} to {2 * k + 2} answers with one p",
            sympy.expand(_majority(2 * k + 2) - _majority(2 * k) - one.subs(n, k)),
        )
        for k in (1, 2, 3)
    ]
    return Derivation(
        name="even majority",
        statement=Eq(sympy.Symbol("h_(2n+2)") - sympy.Symbol("h_(2n)"), formula),
        symbols={"alpha": alpha, "beta": beta, "n": n},
        assumptions="p ~ Beta(alpha, beta); more than half of the answers harmful",
        steps=(
            *few,
            ("its mean", sympy.gammasimp(mean / _beta(alpha + n + 1, beta + n)) - tail),
            (
                "it has the sign of n (alpha - beta + 2) + alpha + 1",
                (n + 1) * (alpha + n + 1) - n * (beta + n) - (n * (alpha - beta + 2) + alpha + 1),
            ),
        ),
        source=OWN,
    )


def common_shock() -> Derivation:
    """With probability rho all answers are one: never below rho q."""
    formula = icc * q + (1 - icc) * q**m
    x, small = sympy.symbols("x k", positive=True)
    return Derivation(
        name="common shock",
        statement=Eq(sympy.Symbol("h_m"), formula),
        symbols={"q": q, "icc": icc, "width": m},
        assumptions="with probability rho all answers are the same one, else independent; harm only if all are harmful",
        steps=(
            ("one answer: q", formula.subs(m, 1) - q),
            ("two answers correlate by rho", (formula.subs(m, 2) - q**2) / (q * (1 - q)) - icc),
            (
                "unlimited width, q = 1 / (1 + k)",
                Eq(sympy.limit((icc * q + (1 - icc) * (1 + small) ** (-x)), x, sympy.oo), icc * q),
            ),
        ),
        source=OWN,
    )


def hyperbola() -> Derivation:
    """Width and depth that leave the same harm: m (d + d0) = C."""
    f0, c, eps, d = sympy.symbols("f0 c epsilon d", positive=True)
    C, d0 = log(1 / eps) / log(1 / c), log(1 / f0) / log(1 / c)
    formula = C / (d + d0)
    return Derivation(
        name="iso-safety hyperbola",
        statement=Eq(sympy.Symbol("m"), formula),
        symbols={"f0": f0, "c": c, "eps": eps, "depth": d},
        assumptions="one answer: f0 c^d, without a floor; m independent answers, all harmful with probability eps",
        steps=(
            ("ln of (f0 c^d)^m at that m", sympy.expand_log(formula * (log(f0) + d * log(c)) - log(eps), force=True)),
            ("the product with d + d0 does not depend on d", sympy.diff(formula * (d + d0), d)),
            ("nor on f0 where d counts from -d0", sympy.diff(formula.subs(d, d - d0), f0)),
        ),
        source="our own; the exchange of width for depth is claimed in arXiv 2502.00669, whose body we could not read",
    )


def cost_optimum() -> Derivation:
    """The cheapest point of the hyperbola."""
    C, d0, a, b, x = sympy.symbols("C d0 lambda_d lambda_m m", positive=True)
    cost = a * (C / x - d0) + b * x
    best = sqrt(C * a / b)
    return Derivation(
        name="cost optimum",
        statement=Eq(sympy.Symbol("m*"), best),
        symbols={"C": C, "depth_price": a, "width_price": b},
        assumptions="cost lambda_d d + lambda_m m on m (d + d0) = C, d = C / m - d0 >= 0",
        steps=(
            ("the cost is stationary there", sympy.diff(cost, x).subs(x, best)),
            ("and convex: the second derivative", sympy.diff(cost, x, 2) - 2 * a * C / x**3),
            ("the depth", Eq(C / best - d0, sqrt(C * b / a) - d0)),
            ("the cost", Eq(cost.subs(x, best), 2 * sqrt(C * a * b) - a * d0)),
        ),
        source=OWN,
    )


def best_of_n() -> Derivation:
    """N tries, one harmful answer is enough."""
    formula = 1 - gamma(alpha + beta) * gamma(beta + N) / (gamma(beta) * gamma(alpha + beta + N))
    left = _moment(beta, alpha, j)
    x, shift = sympy.symbols("x c", positive=True)
    expansions = []
    for k in (1, 2, 3):
        # Gamma(beta + N) / Gamma(k + beta + N) is one over a product of k terms; x = 1 / N.
        product = sympy.prod([1 + (beta + i) * x for i in range(k)])
        moved = (1 + (beta + Rational(k - 1, 2)) * x) ** k
        expansions.append(
            (f"the shifted power is right up to 1 / N^2, alpha = {k}", sympy.series(product - moved, x, 0, 2).removeO())
        )
    first = -alpha * (alpha + 2 * beta - 1) / 2
    return Derivation(
        name="best of N",
        statement=Eq(sympy.Symbol("ASR_N"), formula),
        symbols={"alpha": alpha, "beta": beta, "N": N},
        assumptions="p ~ Beta(alpha, beta), N independent answers given p, harm if any of them is harmful",
        steps=(
            (
                "after j harmless answers p is Beta(alpha, beta + j): the next factor of the failures",
                sympy.gammasimp(left.subs(j, j + 1) / left) - (beta + j) / (alpha + beta + j),
            ),
            ("no tries: no success", left.subs(j, 0) - 1),
            ("one try", sympy.gammasimp(formula.subs(N, 1)) - alpha / (alpha + beta)),
            *expansions,
            (
                "which is what moves N^-alpha by the ratio's first term",
                sympy.solve(first + alpha * shift, shift)[0] - (beta + (alpha - 1) / 2),
            ),
        ),
        source="arXiv 2601.22636; the correction is our own",
    )


def worth_in_tokens() -> Derivation:
    """What m correlated answers are worth in tokens of depth, where one answer's harm is small."""
    c = sympy.Symbol("c", positive=True)
    s = (1 - icc) / icc
    factor = gamma(s + 1) * gamma(m) / gamma(s + m)
    product = [sympy.prod([(q * (1 - icc) + i * icc) / (1 - icc + i * icc) for i in range(1, k)]) for k in (2, 3, 5)]
    few = [
        (f"harm of {k} answers over that of one, q to 0", Eq(sympy.limit(f, q, 0), sympy.gammasimp(factor.subs(m, k))))
        for k, f in zip((2, 3, 5), product)
    ]
    return Derivation(
        name="worth of width in tokens",
        statement=Eq(sympy.Symbol("w"), log(factor) / log(c)),
        symbols={"width": m, "c": c, "icc": icc},
        assumptions="any refusal, beta-binomial with one rho at every depth; harm of one answer falls by c per token",
        steps=(
            *few,
            (
                "the factor falls with q: every term of the product does (second term)",
                sympy.simplify(sympy.diff(product[0], q) - (1 - icc)),
            ),
            ("c^w is that factor", Eq(sympy.exp(log(c) * (log(factor) / log(c))), factor)),
        ),
        source=OWN,
    )


def token_average() -> Derivation:
    """Two members merged token by token."""
    a, r, b, t, h = sympy.symbols("a1 r1 a2 r2 h", positive=True)
    formula = (a + b) / (a + b + r + t)
    solved = sympy.solve(Eq(h, (a + b) / 2 + (1 - (a + b + r + t) / 2) * h), h)[0]
    first, second = a / (a + r), b / (b + t)
    return Derivation(
        name="token average",
        statement=Eq(sympy.Symbol("h"), formula),
        symbols={"a1": a, "r1": r, "a2": b, "r2": t},
        assumptions="two members with harm a and refusal r per token; their next-token laws are averaged",
        steps=(
            ("one step of the averaged chain", Eq(solved, formula)),
            (
                "it is the members' harm weighted by how fast they decide",
                ((a + r) * first + (b + t) * second) / (a + r + b + t) - formula,
            ),
            (
                "not their mean: an example",
                Eq(
                    formula.subs({a: Rational(1, 20), r: Rational(1, 100), b: 0, t: Rational(1, 2)})
                    - (first / 2).subs({a: Rational(1, 20), r: Rational(1, 100)}),
                    Rational(5, 56) - Rational(5, 12),
                ),
            ),
        ),
        source=OWN,
    )
