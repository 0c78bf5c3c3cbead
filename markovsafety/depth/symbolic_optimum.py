"""Derivations about the KL-regularised optimum, harm information, gradients by depth, and the penalty on recovery."""

from __future__ import annotations

from typing import Any

import sympy

from .symbolic import Derivation

__all__ = [
    "attack_length",
    "gradient_by_depth",
    "harm_information",
    "kl_of_the_optimum",
    "kl_second_order",
    "odds_of_the_optimum",
    "recovery_law",
]

OWN = "our own statement of a classical transform"
YOUNG = "arXiv 2603.04851 (read in summaries), derived again"
lam, h = sympy.symbols("lambda h", positive=True)
KAPPA = 1 - sympy.exp(-lam)
TILTED = sympy.exp(-lam) * h / (1 - KAPPA * h)
P: Any = sympy.symbols("p0 p1 p2", positive=True)
HARMS: Any = sympy.symbols("h0 h1 h2", positive=True)
LAST = {P[2]: 1 - P[0] - P[1]}
MEAN: Any = sum(p * x for p, x in zip(P, HARMS))


def _weight(x: Any) -> Any:
    return 1 - KAPPA * x


def odds_of_the_optimum() -> Derivation:
    """The optimum multiplies the odds of harm by e^-lambda at every prefix."""
    total: Any = sum  # of terms
    new: Any = [p * _weight(x) / _weight(MEAN) for p, x in zip(P, HARMS)]
    tilt: Any = lambda x: TILTED.subs(h, x)  # noqa: E731
    q = sympy.Symbol("q", positive=True)
    cost = lam * q + q * sympy.log(q / h) + (1 - q) * sympy.log((1 - q) / (1 - h))
    return Derivation(
        name="odds of the optimum",
        statement=sympy.Eq(sympy.Symbol("h*"), TILTED),
        symbols={"strength": lam, "h": h},
        assumptions="0 < h < 1; strength lambda = 1 / beta; M = 1 - (1 - e^-lambda) h",
        steps=(
            (
                "the weights of a row average to the weight of its state (three ways on)",
                (total(p * _weight(x) for p, x in zip(P, HARMS)) - _weight(MEAN)).subs(LAST),
            ),
            ("so the new row sums to one", (total(new) - 1).subs(LAST)),
            (
                "and h* of the state is the new mean of h* ahead",
                sympy.together((total(p * tilt(x) for p, x in zip(new, HARMS)) - tilt(MEAN)).subs(LAST)),
            ),
            ("at the ends: harm stays harm", tilt(sympy.S.One) - 1),
            ("no harm stays none", tilt(sympy.S.Zero)),
            ("odds", TILTED / (1 - TILTED) - sympy.exp(-lam) * h / (1 - h)),
            (
                "among coins: the slope of lambda q + kl(q || h)",
                sympy.diff(cost, q) - (lam + sympy.log(q / h) - sympy.log((1 - q) / (1 - h))),
            ),
            ("is zero there (its exponential is 1)", sympy.exp(lam) * TILTED / h * (1 - h) / (1 - TILTED) - 1),
            ("and rises everywhere", sympy.diff(cost, q, 2) - 1 / (q * (1 - q))),
            ("no end of strength", sympy.Eq(sympy.limit(TILTED, lam, sympy.oo), 0)),
        ),
        source=OWN,
    )


def kl_of_the_optimum() -> Derivation:
    """What the optimum costs in KL over whole answers: as much as between two coins."""
    formula = -lam * TILTED - sympy.log(1 - KAPPA * h)
    ratio = lambda harm: sympy.exp(-lam * harm) / (1 - KAPPA * h)  # noqa: E731
    product = _weight(HARMS[0]) / _weight(h) * _weight(1) / _weight(HARMS[0])
    numbers = {h: sympy.Rational(1, 3)}
    return Derivation(
        name="KL of the optimum",
        statement=sympy.Eq(sympy.Symbol("KL"), formula),
        symbols={"strength": lam, "h": h},
        assumptions="0 < h < 1; nats",
        steps=(
            ("along an answer the ratios telescope to e^-lambda / M for harm (two steps)", product - ratio(1)),
            ("and to 1 / M for none", _weight(HARMS[0]) / _weight(h) * _weight(0) / _weight(HARMS[0]) - ratio(0)),
            (
                "their logs, averaged over the optimum",
                sympy.expand_log(
                    TILTED * sympy.log(ratio(1)) + (1 - TILTED) * sympy.log(ratio(0)) - formula, force=True
                ),
            ),
            ("between the coins h* and h the ratios are the same: harm", TILTED / h - ratio(1)),
            ("no harm", (1 - TILTED) / (1 - h) - ratio(0)),
            (
                "no end of strength (h = 1/3): -log(1 - h)",
                sympy.Eq(sympy.limit(formula.subs(numbers), lam, sympy.oo), -sympy.log(sympy.Rational(2, 3))),
            ),
        ),
        source=OWN,
    )


def kl_second_order() -> Derivation:
    """KL spent by one token of the optimum: lambda^2 / 2 times the harm information, to second order."""
    p, x, y = sympy.symbols("p x y", positive=True)
    mean = p * x + (1 - p) * y
    row = [(p, x), (1 - p, y)]
    ratio = lambda value: _weight(value) / _weight(mean)  # noqa: E731
    kl = sum(w * ratio(v) * sympy.log(ratio(v)) for w, v in row)
    orders: Any = [sympy.simplify(sympy.diff(kl, lam, n).subs(lam, 0)) for n in range(3)]
    variance = sum(w * (v - mean) ** 2 for w, v in row)
    formula = lam**2 / 2 * p * (1 - p) * (x - y) ** 2
    return Derivation(
        name="KL to second order",
        statement=sympy.Eq(sympy.Symbol("KL_t"), formula),
        symbols={"strength": lam, "p": p, "x": x, "y": y},
        assumptions="one row with two ways on, of probability p and 1 - p, after which harm is x and y; lambda small: "
        "at lambda = 20 the true KL is a hundredth of it",
        steps=(
            ("no strength, no KL", orders[0]),
            ("nor to first order", orders[1]),
            ("second order: the variance of harm ahead", sympy.expand(orders[2] - variance)),
            ("which is p (1 - p) (x - y)^2", sympy.expand(variance - p * (1 - p) * (x - y) ** 2)),
        ),
        source=f"the order: {YOUNG}; the factor: our own",
    )


def harm_information() -> Derivation:
    """What all tokens decide sums to the variance of the outcome."""
    q: Any = sympy.symbols("q0 q1 q2", positive=True)  # harm from the three places that the first token leads to
    now: Any = sum(p * x for p, x in zip(P, q))
    first: Any = sum(p * (x - now) ** 2 for p, x in zip(P, q))
    second: Any = sum(p * x * (1 - x) for p, x in zip(P, q))
    return Derivation(
        name="harm information",
        statement=sympy.Eq(sympy.Symbol("I_0") + sympy.Symbol("I_1"), h * (1 - h)),
        symbols={"h": h},
        assumptions="one start state, whole answers",
        steps=(
            (
                "two tokens, the second of which decides all",
                sympy.expand((first + second - now * (1 - now)).subs(LAST)),
            ),
            (
                "each token adds I_t to the second moment of h, as the mean of the squares ahead less the square here",
                sympy.expand((sum(p * x**2 for p, x in zip(P, q)) - now**2 - first).subs(LAST)),
            ),
            (
                "from h^2 at the start to E harm^2 = E harm = h at the end",
                h * 1**2 + (1 - h) * 0**2 - h**2 - h * (1 - h),
            ),
        ),
        source=YOUNG,
    )


def gradient_by_depth() -> Derivation:
    """Gradient of harm in the logit of one step from one state at one depth."""
    visit, prob, ahead, now = sympy.symbols("pi P a h", real=True)
    z: Any = sympy.symbols("z0:3", real=True)
    total = sum(sympy.exp(x) for x in z)
    row = [sympy.exp(x) / total for x in z]
    here = sum(w * x for w, x in zip(row, HARMS))
    came, other = sympy.symbols("c d", positive=True)  # probability of coming here; harm of all other answers
    start = came * here + other
    formula = visit * prob * (ahead - now)
    parts = {visit: came, now: here}
    return Derivation(
        name="gradient by depth",
        statement=sympy.Eq(sympy.Derivative(sympy.Symbol("h_0"), sympy.Symbol("z_t")), formula),
        symbols={"visits": visit, "P": prob, "ahead": ahead, "now": now},
        assumptions="logits of their own for every depth; softmax rows (three ways on)",
        steps=(
            *(
                (text, sympy.diff(start, z[j]) - formula.subs({**parts, prob: row[j], ahead: HARMS[j]}))
                for j, text in enumerate(("the first logit", "the second", "the third"))
            ),
            ("moving all logits alike moves nothing", sum(w * (x - here) for w, x in zip(row, HARMS))),
            (
                "the gradients sum in squares to at most I_t, since (pi P)^2 <= pi P",
                prob * visit * (ahead - now) ** 2 * (1 - prob * visit)
                - (prob * visit * (ahead - now) ** 2 - formula**2),
            ),
        ),
        source="our own; for score functions in general 2603.04851",
    )


def recovery_law() -> Derivation:
    """The best recovery probability of a position under a penalty of mu gamma^(t - 1)."""
    p, p0, mu, gamma, t = sympy.symbols("p p0 mu gamma t", positive=True)
    gain = mu * gamma ** (t - 1)
    cost = gain * (1 - p) + p * sympy.log(p / p0) + (1 - p) * sympy.log((1 - p) / (1 - p0))
    odds = p0 / (1 - p0) * sympy.exp(gain)
    formula = 1 / (1 + (1 - p0) / p0 * sympy.exp(-gain))
    at_best = sympy.diff(cost, p).subs(p, odds / (1 + odds))
    return Derivation(
        name="recovery law",
        statement=sympy.Eq(sympy.Symbol("p*"), formula),
        symbols={"base": p0, "weight": mu, "discount": gamma, "position": t},
        assumptions="harm is decided; penalty and KL weigh a prefix alike; 0 < base < 1",
        steps=(
            ("the slope of penalty and KL is zero there", sympy.expand_log(sympy.simplify(at_best), force=True)),
            ("and rises everywhere", sympy.diff(cost, p, 2) - 1 / (p * (1 - p))),
            ("odds as a probability", odds / (1 + odds) - formula),
        ),
        source=YOUNG,
    )


def attack_length() -> Derivation:
    """The position at which recovery has fallen to delta."""
    p0, mu, delta, t = sympy.symbols("p0 mu delta t", positive=True)
    gamma = sympy.Symbol("gamma", positive=True)
    logit = lambda x: sympy.log(x / (1 - x))  # noqa: E731
    need = logit(delta) - logit(p0)
    formula = 1 + (sympy.log(mu) - sympy.log(need)) / sympy.log(1 / gamma)
    g = sympy.Symbol("g", positive=True)  # the gain of the position that is found
    found = formula.subs(need, g)
    gained = sympy.exp(sympy.log(mu) + sympy.expand_log(found - 1, force=True) * sympy.log(gamma))
    return Derivation(
        name="attack length",
        statement=sympy.Eq(t, formula),
        symbols={"base": p0, "weight": mu, "discount": gamma, "recovery": delta},
        assumptions="base < recovery, weight > logit recovery - logit base, 0 < discount < 1",
        steps=(
            ("there mu gamma^(t - 1) is logit delta - logit p0", sympy.simplify(sympy.expand(gained)) - g),
            ("which brings recovery to delta", 1 / (1 + (1 - p0) / p0 * sympy.exp(-need)) - delta),
            (
                "and falls from there on: the gain shrinks",
                sympy.diff(mu * gamma ** (t - 1), t) - mu * gamma ** (t - 1) * sympy.log(gamma),
            ),
        ),
        source=YOUNG,
    )
