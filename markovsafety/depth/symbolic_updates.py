"""Derivations about iterated updates: bias, mixtures, logit steps, the cross-entropy flow, and a refusal that leaks."""

from __future__ import annotations

from typing import Any

import sympy

from .symbolic import Derivation

__all__ = [
    "additive_bias",
    "convex_mix",
    "cross_entropy_flow",
    "geometric_bias",
    "harmonic_bias",
    "leak_under_bias",
    "logit_steps",
]

OWN = "our own; adding bias and renormalising is our reconstruction of Algorithm 1 of arXiv 2502.00669"
p, p0, alpha, beta, theta = sympy.symbols("p p0 alpha beta theta", positive=True)
T = sympy.Symbol("T", integer=True, nonnegative=True)
RESIDUAL = sympy.Symbol("R_T")  # 1 - p after T steps


def additive_bias() -> Derivation:
    """Adding bias of constant size: linear convergence to the share of the bias that is on refusal."""
    step = (p + alpha * beta * theta) / (1 + alpha * beta)
    x = sympy.Function("x")
    solved: Any = sympy.rsolve(x(T + 1) - (x(T) + alpha * beta * theta) / (1 + alpha * beta), x(T), {x(0): p0})
    formula = (1 - theta) + (theta - p0) * (1 + alpha * beta) ** (-T)
    rest = sympy.Symbol("q", positive=True)
    return Derivation(
        name="additive bias",
        statement=sympy.Eq(RESIDUAL, formula),
        symbols={"p0": p0, "alpha": alpha, "beta": beta, "theta": theta, "T": T},
        assumptions="constant step size alpha; bias beta in the row, a share theta of it on refusal",
        steps=(
            (
                "one step moves p towards theta by the factor 1 / (1 + alpha beta)",
                step - theta - (p - theta) / (1 + alpha * beta),
            ),
            (
                "and every other entry q without bias by the same factor",
                rest / (1 + alpha * beta) - rest * (step - theta) / (p - theta),
            ),
            ("T steps", sympy.Eq(1 - solved, formula)),
            (
                "all of the bias on refusal: what is left falls geometrically",
                formula.subs(theta, 1) - (1 - p0) / (1 + alpha * beta) ** T,
            ),
            ("for ever", sympy.Eq(sympy.limit(formula.subs({alpha: 1, beta: 1}), T, sympy.oo), 1 - theta)),
        ),
        source=OWN,
    )


def geometric_bias() -> Derivation:
    """Adding bias of geometric sizes: a q-Pochhammer symbol is left for ever."""
    a, gamma, x = sympy.symbols("a gamma x", positive=True)
    m = sympy.Symbol("m", integer=True, positive=True)
    term: Any = (-1) ** (m + 1) * a**m / (m * (1 - gamma**m))
    logarithm: Any = sympy.Sum(term, (m, 1, sympy.oo))
    formula = (1 - p0) * sympy.exp(-logarithm)
    product: Any = lambda y, n: sympy.prod([1 + y * gamma**k for k in range(n)])  # noqa: E731
    small = sympy.Rational(1, 3)
    logs: Any = sympy.summation((-1) ** (m + 1) * small**m / m, (m, 1, sympy.oo))
    k = sympy.Symbol("k", integer=True, nonnegative=True)
    powers: Any = sympy.summation(sympy.Rational(9, 10) ** k, (k, 0, sympy.oo))
    return Derivation(
        name="geometric bias",
        statement=sympy.Eq(sympy.Symbol("R_oo"), formula),
        symbols={"p0": p0, "a": a, "gamma": gamma},
        assumptions="sizes alpha gamma^t, all bias on refusal, a = alpha beta < 1, 0 < gamma < 1; for any a the "
        "product over t of 1 / (1 + a gamma^t)",
        steps=(
            (
                "the product f(a) of all 1 + a gamma^t has f(a) = (1 + a) f(a gamma) (six factors)",
                sympy.expand(product(a, 6) - (1 + a) * product(a * gamma, 5)),
            ),
            (
                "with log f = sum of these terms, log f(a) - log f(a gamma) has the terms",
                term - term.subs(a, a * gamma) - (-1) ** (m + 1) * a**m / m,
            ),
            ("which sum to log(1 + a) (a = 1/3)", sympy.Eq(sympy.simplify(logs), sympy.log(1 + small))),
            ("and f(0) = 1", product(sympy.S.Zero, 6) - 1),
            (
                "it never comes to 0: log(1 + x) <= x, equal at 0 and with a smaller slope",
                sympy.diff(x - sympy.log(1 + x), x) - x / (1 + x),
            ),
            (
                "so what is left is at least exp(-sum of the sizes) (gamma = 9/10: sum a / (1 - gamma))",
                sympy.Eq(powers, 10),
            ),
        ),
        source=OWN,
    )


def harmonic_bias() -> Derivation:
    """Adding bias of sizes alpha / (t + 1): a ratio of Gamma functions, falling like a power of T."""
    formula = (1 - p0) * sympy.gamma(T + 1) * sympy.gamma(1 + alpha * beta) / sympy.gamma(T + 1 + alpha * beta)
    ratio = sympy.gammasimp(formula.subs(T, T + 1) / formula)
    like = lambda y: sympy.limit(sympy.gammasimp(formula.subs({alpha: y, beta: 1, p0: 0})) * T**y, T, sympy.oo)  # noqa: E731
    return Derivation(
        name="harmonic bias",
        statement=sympy.Eq(RESIDUAL, formula),
        symbols={"p0": p0, "alpha": alpha, "beta": beta, "T": T},
        assumptions="sizes alpha / (t + 1), all bias on refusal",
        steps=(
            ("one step divides what is left by 1 + alpha beta / (T + 1)", ratio - 1 / (1 + alpha * beta / (T + 1))),
            ("at first 1 - p0 is left", sympy.gammasimp(formula.subs(T, 0)) - (1 - p0)),
            (
                "it falls like T^-(alpha beta): times that, the limit is Gamma(1 + alpha beta) (alpha beta = 2)",
                sympy.Eq(like(2), sympy.gamma(3)),
            ),
            ("(alpha beta = 3)", sympy.Eq(like(3), sympy.gamma(4))),
        ),
        source=OWN,
    )


def convex_mix() -> Derivation:
    """Mixing with certain refusal: geometric, and the same thing as adding bias."""
    eta = sympy.Symbol("eta", positive=True)
    x = sympy.Function("x")
    solved: Any = sympy.rsolve(x(T + 1) - (1 - eta) * x(T) - eta, x(T), {x(0): p0})
    formula = (1 - p0) * (1 - eta) ** T
    share = alpha * beta / (1 + alpha * beta)
    return Derivation(
        name="convex mix",
        statement=sympy.Eq(RESIDUAL, formula),
        symbols={"p0": p0, "eta": eta, "T": T},
        assumptions="constant share 0 < eta < 1",
        steps=(
            ("one step leaves 1 - eta of what was left", (1 - ((1 - eta) * p + eta)) - (1 - eta) * (1 - p)),
            ("T steps", sympy.Eq(1 - solved, formula)),
            (
                "adding bias is mixing with the share alpha beta / (1 + alpha beta)",
                (p + alpha * beta) / (1 + alpha * beta) - ((1 - share) * p + share),
            ),
        ),
        source="our own",
    )


def logit_steps() -> Derivation:
    """Steps on the logit of refusal: the odds grow by the same factor."""
    eta, o, eps = sympy.symbols("eta o epsilon", positive=True)
    step = p * sympy.exp(eta) / (1 - p + p * sympy.exp(eta))
    x = sympy.Function("x")
    solved: Any = sympy.rsolve(x(T + 1) - sympy.exp(eta) * x(T), x(T), {x(0): o})
    odds = p0 / (1 - p0)
    formula = 1 / (1 + odds * sympy.exp(eta * T))
    steps = sympy.log((1 - eps) / (eps * odds)) / eta
    return Derivation(
        name="logit steps",
        statement=sympy.Eq(RESIDUAL, formula),
        symbols={"p0": p0, "eta": eta, "T": T},
        assumptions="constant step eta on the logit of refusal",
        steps=(
            ("one step multiplies the odds by e^eta", step / (1 - step) - sympy.exp(eta) * p / (1 - p)),
            ("T steps", sympy.Eq(solved, o * sympy.exp(eta * T))),
            ("odds as a residual", 1 / (1 + odds * sympy.exp(eta * T)) - formula),
            ("steps to a residual eps", sympy.Eq(formula.subs(T, steps), eps)),
        ),
        source="our own; exponentiated gradient (J. Kivinen and M. K. Warmuth, Inf. Comput. 132 (1997) 1)",
    )


def cross_entropy_flow() -> Derivation:
    """Gradient flow of -log p on the logits of K tokens: what is left falls like (K - 1) / (K t)."""
    K, t, o = sympy.symbols("K t o", positive=True)
    u = sympy.Symbol("u", real=True)
    z: Any = sympy.symbols("z0:3", real=True)
    weights = [sympy.exp(x) for x in z]
    probs = [w / sum(weights) for w in weights]
    slope = [sympy.simplify(sympy.diff(sympy.log(probs[0]), x)) for x in z]
    even = sympy.exp(u) / (sympy.exp(u) + K - 1)
    speed = K / (K - 1 + sympy.exp(u))  # du / dt
    by_u = sympy.diff(sympy.exp(u) / (K - 1) + u - sympy.log(K - 1), u) * speed
    any_row = sum(sympy.diff(sympy.log(probs[0] / (1 - probs[0])), x) * s for x, s in zip(z, slope))
    others = sum((q / (1 - probs[0])) ** 2 for q in probs[1:])
    start = p0 / (1 - p0)
    formula = 1 / (1 + sympy.LambertW(sympy.exp(start + sympy.log(start) + K * t / (K - 1))))
    w = sympy.LambertW(sympy.exp(t))
    return Derivation(
        name="cross-entropy flow",
        statement=sympy.Eq(sympy.Symbol("R_t"), formula),
        symbols={"p0": p0, "K": K, "t": t},
        assumptions="K tokens, those other than refusal equally likely; o = p / (1 - p)",
        steps=(
            ("the logit of refusal rises by 1 - p (three tokens)", slope[0] - (1 - probs[0])),
            ("every other one falls by its probability", slope[1] + probs[1]),
            (
                "with even others their difference u moves by K / (K - 1 + e^u)",
                (1 - even) + (1 - even) / (K - 1) - speed,
            ),
            ("so o + log o, o = e^u / (K - 1), grows by K / (K - 1)", by_u - K / (K - 1)),
            (
                "in any row it grows by 1 + sum of the squares of the others' shares (three tokens)",
                any_row * (1 + probs[0] / (1 - probs[0])) - (1 + others),
            ),
            ("o + log o = x is solved by o = W(e^x)", sympy.Eq(sympy.diff(w + sympy.log(w), t), 1)),
            ("(at x = 1: o = 1)", sympy.LambertW(sympy.E) - 1),
            (
                "time over residual, o to infinity: 1 - p = 1 / (1 + o) is (K - 1) / (K t)",
                sympy.Eq(sympy.limit((K - 1) / K * (o + sympy.log(o)) / (1 + o), o, sympy.oo), (K - 1) / K),
            ),
        ),
        source="our own",
    )


def leak_under_bias() -> Derivation:
    """Harm with a refusal that leaks, both rows under bias: what bias does in the row of refusal cancels."""
    a, r, leak, end, kept, held, h, hr = sympy.symbols("a r l e k c h h_r", positive=True)
    trajectory = sympy.Eq(h, kept * a + (1 - kept * (1 - r)) * hr + kept * (1 - a - r) * h)
    refusal = sympy.Eq(hr, held * leak * h + (1 - held * (leak + end)) * hr)
    (found,) = sympy.solve([trajectory, refusal], [h, hr], dict=True)
    formula = kept * a / (kept * a + (1 - kept * (1 - r)) * end / (end + leak))
    return Derivation(
        name="leak under bias",
        statement=sympy.Eq(h, formula),
        symbols={"harm": a, "refuse": r, "leak": leak, "end": end, "kept": kept},
        assumptions="bias left a share k of what the trajectory's row had off refusal, and a share c of what refusal's "
        "row had off refusal: harm and refusal a, r per token, leak l and end e of a refusal",
        steps=(
            ("both rows solved", sympy.Eq(sympy.simplify(found[h]), formula)),
            ("the share c is not in it", sympy.diff(sympy.simplify(found[h]), held)),
            (
                "a refusal is taken back with l / (l + e), whatever c",
                sympy.simplify(found[hr] / found[h]) - leak / (leak + end),
            ),
            ("no end: every leak is fatal, however rare", sympy.Eq(sympy.limit(formula, end, 0), 1)),
            ("no share of the trajectory left: no harm", sympy.Eq(sympy.limit(formula, kept, 0), 0)),
            ("no bias at all", formula.subs(kept, 1) - a / (a + r * end / (end + leak))),
        ),
        source=OWN,
    )
