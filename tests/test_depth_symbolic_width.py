"""The derivations about width stand, and their formulas are what the numeric code computes."""

from __future__ import annotations

import numpy as np
import pytest
import sympy

from markovsafety.depth import (
    best_of_n,
    ensemble_floor,
    ensemble_harm,
    hyperbola,
    token_average,
    worth_in_tokens,
)
from markovsafety.depth.mixtures import at_least
from markovsafety.depth.symbolic import Derivation, derivation, derivations

NAMES = (
    "any refusal",
    "beta-binomial any refusal",
    "power tail of width",
    "majority floor",
    "odd majority",
    "even majority",
    "common shock",
    "iso-safety hyperbola",
    "cost optimum",
    "worth of width in tokens",
    "token average",
    "best of N",
)


def of_law(a: float, b: float) -> tuple[float, float]:
    return a / (a + b), 1 / (a + b + 1)


def majority(a: float, b: float, m: int) -> float:
    q, rho = of_law(a, b)
    return float(at_least(q, rho, m, m // 2 + 1))


@pytest.mark.parametrize("name", NAMES)
def test_derivation_stands(name):
    d = derivation(name)
    assert name in derivations()
    assert d.check() == []
    assert len(d.steps) >= 1
    assert d.name == name
    assert "boxed" in d.latex()


def test_a_false_step_is_noticed():
    d = derivation("odd majority")
    n = d.symbols["n"]
    text, step = d.steps[0]
    false = Derivation(d.name, d.statement, d.symbols, d.assumptions, ((text, step + 1 / n), *d.steps[1:]))
    assert false.check() == [text]


@pytest.mark.parametrize("seed", range(8))
def test_formulas_are_the_code(seed):
    rng = np.random.default_rng(seed)
    q, rho, m = float(rng.uniform(0.05, 0.95)), float(rng.uniform(0.02, 0.9)), int(rng.integers(2, 30))
    a, b, n = float(rng.uniform(0.2, 5)), float(rng.uniform(0.2, 5)), int(rng.integers(1, 12))
    c, eps, d = float(rng.uniform(0.2, 0.9)), float(10 ** rng.uniform(-6, -1)), float(rng.uniform(0.5, 9))
    prices = (float(rng.uniform(0.5, 3)), float(rng.uniform(0.5, 3)))
    curve = hyperbola(q, c, eps)
    hazards = rng.uniform(0.01, 0.5, 4)
    pairs = {
        "any refusal": ({"q": q, "width": m}, ensemble_harm(q, m)),
        "beta-binomial any refusal": ({"q": q, "icc": rho, "width": m}, ensemble_harm(q, m, rho)),
        "common shock": ({"q": q, "icc": rho, "width": m}, ensemble_harm(q, m, rho, model="common-shock")),
        "majority floor": ({"alpha": a, "beta": b}, ensemble_floor(*of_law(a, b), "majority")),
        "best of N": ({"alpha": a, "beta": b, "N": n}, best_of_n(a, b, n)),
        "worth of width in tokens": ({"width": m, "c": c, "icc": rho}, worth_in_tokens(m, c, rho)),
        "token average": (
            dict(zip(("a1", "r1", "a2", "r2"), map(float, hazards))),
            token_average(hazards[[0, 2]], hazards[[1, 3]]),
        ),
    }
    for name, (values, number) in pairs.items():
        assert derivation(name).evaluate(**values) == pytest.approx(number, rel=1e-12), name
    # Differences of two tails keep fewer digits than the tails.
    odd = derivation("odd majority").evaluate(alpha=a, beta=b, n=n)
    assert odd == pytest.approx(majority(a, b, 2 * n + 1) - majority(a, b, 2 * n - 1), abs=1e-13)
    even = derivation("even majority").evaluate(alpha=a, beta=b, n=n)
    assert even == pytest.approx(majority(a, b, 2 * n + 2) - majority(a, b, 2 * n), abs=1e-13)
    where = derivation("iso-safety hyperbola").evaluate(f0=q, c=c, eps=eps, depth=d)
    assert curve.C / (d + curve.d0) == pytest.approx(where, rel=1e-12)
    best = derivation("cost optimum").evaluate(C=curve.C, depth_price=prices[0], width_price=prices[1])
    width, depth = curve.optimum(*prices)
    if depth > 0 and width > 1:
        assert width == pytest.approx(best, rel=1e-12)


def test_power_tail_is_met():
    for a, b in ((0.3, 0.8), (2.0, 1.5)):
        tail = derivation("power tail of width").evaluate(alpha=a, beta=b, width=10**7)
        assert ensemble_harm(of_law(a, b)[0], 10**7, of_law(a, b)[1]) == pytest.approx(tail, rel=1e-6)


def test_formulas_can_be_differentiated():
    d = derivation("common shock")
    slope = sympy.diff(d.formula, d.symbols["icc"]).subs({d.symbols["q"]: sympy.Rational(1, 10), d.symbols["width"]: 3})
    assert float(slope) == pytest.approx(0.1 - 0.1**3)
