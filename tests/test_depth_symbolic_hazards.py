"""Derivations of the closed forms of hazards: every step stands, and the formula is the numeric code."""

from __future__ import annotations

import numpy as np
import pytest

from markovsafety.depth import AttackLaw, Checkpoint, LeakyRefusal, Profile, fit_hazards
from markovsafety.depth.optimal import checkpoint_point, price_point
from markovsafety.depth.symbolic import derivation
from markovsafety.toy import ladder_harm

NAMES = [
    "severity ladder",
    "aligned positions",
    "aligned positions under a geometric attack",
    "needed depth",
    "operational depth",
    "price optimum",
    "checkpoint",
    "checkpoint under a geometric attack",
    "checkpoint optimum",
    "leaky refusal",
    "survival ratio",
]


@pytest.mark.parametrize("name", NAMES)
def test_every_step_stands(name):
    found = derivation(name)
    assert found.steps
    assert found.check() == []
    assert "boxed" in found.latex()
    assert found.source


def random_hazards(rng):
    a0, r0, a1, r1 = rng.uniform(0.05, 0.45, 4)
    return {"a0": float(a0), "r0": float(r0), "a1": float(a1) / 20, "r1": float(r1)}


@pytest.mark.parametrize("seed", range(6))
def test_formulas_are_the_numeric_code(seed):
    rng = np.random.default_rng(seed)
    z = random_hazards(rng)
    p = Profile(**z)
    d, k = 3 + int(rng.integers(10)), int(rng.integers(3))
    q, eps = float(rng.uniform(0.1, 0.9)), float(rng.uniform(p.f1 + 0.01, p.f0 - 0.01))
    close = lambda x: pytest.approx(x, rel=1e-12, abs=1e-14)  # noqa: E731

    assert derivation("aligned positions").evaluate(**z, depth=d, prefill=k) == close(p.harm(d, k).value)
    attacked = derivation("aligned positions under a geometric attack")
    parts = {"f0": p.f0, "f1": p.f1, "c": p.c1, "p": q}
    assert attacked.evaluate(**parts, depth=d) == close(p.harm(d, attack=AttackLaw.geometric(q)).value)
    needed = derivation("needed depth").evaluate(**z, eps=eps)
    assert np.ceil(needed) == p.needed_depth(eps)[0]
    assert derivation("operational depth").evaluate(**z, eps=eps, depth=40.0) == close(40 - needed)
    assert np.floor(40 - needed) == p.operational_depth(40, eps).depth
    rate = -np.log1p(-(p.a1 + p.r1))
    price = 0.3 * (p.f0 - p.f1) * rate
    best = derivation("price optimum").evaluate(f0=p.f0, f1=p.f1, rate=float(rate), price=float(price))
    assert best == close(price_point(p.f0 - p.f1, rate, price))
    assert best == close(p.optimal_depth(price).continuous)

    c = Checkpoint(z["a0"], z["r0"], 0.9)
    point = {"a": c.a, "r": c.r, "success": c.success}
    assert derivation("checkpoint").evaluate(**point, depth=d, prefill=k) == close(c.harm(d, k).value)
    meets = derivation("checkpoint under a geometric attack").evaluate(c=c.c, p=q, depth=d)
    assert meets == close(AttackLaw.geometric(q).discount(c.c, d)[d])
    assert derivation("checkpoint optimum").evaluate(c=c.c, p=q) == close(checkpoint_point(c.c, q))

    leaky = {"a": 0.05, "r": z["r0"], "leak": float(rng.uniform(0, 0.3)), "end": q / 2, "stop": 0.1}
    assert derivation("leaky refusal").evaluate(**leaky) == close(LeakyRefusal(**leaky).harm().value)
    i, n, up = int(rng.integers(1, 6)), 6, float(rng.uniform(0.1, 0.45))
    assert derivation("severity ladder").evaluate(i=i, n=n, p=up) == close(ladder_harm(n, up)[i])
    fit = fit_hazards({2: 0.2, 7: 0.5}, n=100, draws=10)
    found = derivation("survival ratio").evaluate(before=0.2, after=0.5, tokens=5)
    assert found == close(fit.per_token.value[0])


def test_a_wrong_formula_is_noticed():
    import dataclasses

    import sympy

    good = derivation("leaky refusal")
    name, step = good.steps[0]
    bad = dataclasses.replace(good, steps=((name, sympy.Eq(step.lhs, step.rhs + good.symbols["leak"])),))
    assert bad.check() == [name]
