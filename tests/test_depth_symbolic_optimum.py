"""Derivations about updates and optima: sympy confirms their steps, and they say what the numeric code computes."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import sympy

import markovsafety as ms
from markovsafety import toy
from markovsafety.depth import (
    AdditiveBias,
    ConstantSteps,
    ConvexMix,
    CrossEntropyFlow,
    GeometricSteps,
    HarmonicSteps,
    LogitSteps,
    attack_length,
    harm_gradient,
    harm_information,
    kl_profile,
    optimum,
    recovery_law,
    residual_after,
    updated,
)
from markovsafety.depth.symbolic import derivation, derivations

UPDATES = (
    "additive bias",
    "geometric bias",
    "harmonic bias",
    "convex mix",
    "logit steps",
    "cross-entropy flow",
    "leak under bias",
)
OPTIMA = (
    "odds of the optimum",
    "KL of the optimum",
    "KL to second order",
    "harm information",
    "gradient by depth",
    "recovery law",
    "attack length",
)
rng = np.random.default_rng(11)
FEW = range(3)


@pytest.mark.parametrize("name", UPDATES + OPTIMA)
def test_sympy_confirms_every_step(name):
    assert name in derivations()
    found = derivation(name)
    assert found.name == name
    assert len(found.steps) >= 3
    assert found.check() == []
    assert r"\boxed" in found.latex()
    assert found.source


@pytest.mark.parametrize("name", ["additive bias", "cross-entropy flow", "odds of the optimum", "recovery law"])
def test_a_wrong_step_is_noticed(name):
    found = derivation(name)
    text, step = found.steps[0]
    wrong = (
        sympy.Eq(step.lhs, step.rhs + 1) if isinstance(step, sympy.Eq) else step + next(iter(found.symbols.values()))
    )
    assert dataclasses.replace(found, steps=((text, wrong), *found.steps[1:])).check() == [text]


def test_updates_say_what_the_code_computes():
    for _ in FEW:
        p0, alpha, beta, theta = (float(x) for x in rng.uniform(0.01, 0.99, 4))
        T = int(rng.integers(0, 40))
        linear = AdditiveBias(ConstantSteps(alpha), beta * theta, beta * (1 - theta))
        cases = {
            "additive bias": (linear, {"alpha": alpha, "beta": beta, "theta": theta, "T": T}),
            "harmonic bias": (AdditiveBias(HarmonicSteps(alpha), beta), {"alpha": alpha, "beta": beta, "T": T}),
            "convex mix": (ConvexMix(ConstantSteps(alpha)), {"eta": alpha, "T": T}),
            "logit steps": (LogitSteps(ConstantSteps(alpha)), {"eta": alpha, "T": T}),
            "cross-entropy flow": (CrossEntropyFlow(50), {"K": 50, "t": T}),
        }
        for name, (update, values) in cases.items():
            found = derivation(name).evaluate(p0=p0, **values)
            assert residual_after(update, p0, T) == pytest.approx(found, rel=1e-12), name
    found = derivation("geometric bias").evaluate(p0=0.3, a=0.2, gamma=0.9)
    assert residual_after(AdditiveBias(GeometricSteps(0.2, 0.9)), 0.3, math.inf) == pytest.approx(found, rel=1e-12)


def test_a_leak_under_bias():
    for _ in FEW:
        harm, refuse, leak, end, size = rng.uniform(0.01, 0.4, 5)
        steps = int(rng.integers(0, 12))
        chain = toy.leak(leak, harm=harm, refuse=refuse, end=end)
        update = AdditiveBias(ConstantSteps(size))
        want = derivation("leak under bias").evaluate(
            harm=harm, refuse=refuse, leak=leak, end=end, kept=(1 + size) ** -float(steps)
        )
        for rows in ("trajectory", ["trajectory", "refusal"]):
            now = updated(chain, update, steps, rows=rows)
            assert ms.hitting_probability(now, "harm").at_start.value == pytest.approx(want, rel=1e-12)


def two_ways(p, x, y):
    """One token leads on with p and 1 - p to places with harm x and y."""
    P = np.zeros((5, 5))
    P[0, 1:3] = p, 1 - p
    P[1, 3:], P[2, 3:] = (x, 1 - x), (y, 1 - y)
    return ms.Chain(P, {"harm": 3, "refusal": 4}, 0)


def test_optima_say_what_the_code_computes():
    for _ in FEW:
        p, x, y = rng.uniform(0.05, 0.95, 3)
        strength = float(rng.uniform(0.1, 6))
        chain = two_ways(p, x, y)
        h = float(ms.hitting_probability(chain, "harm").at_start.value)
        new = optimum(chain, strength)
        found = derivation("odds of the optimum").evaluate(strength=strength, h=h)
        assert ms.hitting_probability(new, "harm").at_start.value == pytest.approx(found, rel=1e-12)
        found = derivation("KL of the optimum").evaluate(strength=strength, h=h)
        assert kl_profile(chain, new).total == pytest.approx(found, rel=1e-12)
        found = derivation("KL to second order").evaluate(strength=1.0, p=p, x=x, y=y)
        information = harm_information(chain, 2)
        assert information[0] / 2 == pytest.approx(found, rel=1e-12)
        small = kl_profile(chain, optimum(chain, 1e-3), 2).steps[0]
        # The next order is relative strength; cancellation leaves 1e-16 / 1e-6.
        assert small == pytest.approx(1e-6 * found, rel=3e-3)
        assert information.sum() == pytest.approx(derivation("harm information").evaluate(h=h), rel=1e-12)
        gradient = harm_gradient(chain, 2).layers
        found = derivation("gradient by depth").evaluate(visits=1.0, P=p, ahead=x, now=h)
        assert gradient[0][0, 1] == pytest.approx(found, rel=1e-11)
        found = derivation("gradient by depth").evaluate(visits=p, P=x, ahead=1, now=x)
        assert gradient[1][1, 3] == pytest.approx(found, rel=1e-12)


def test_penalties_say_what_the_code_computes():
    for _ in FEW:
        base, discount = rng.uniform(1e-4, 0.2), rng.uniform(0.8, 0.99)
        weight, wanted, t = rng.uniform(10, 14), rng.uniform(0.3, 0.7), int(rng.integers(1, 30))
        v = {"base": float(base), "weight": float(weight), "discount": float(discount)}
        found = derivation("recovery law").evaluate(position=t, **v)
        assert recovery_law(base, weight, discount, t) == pytest.approx(found, rel=1e-12)
        found = derivation("attack length").evaluate(recovery=float(wanted), **v)
        assert attack_length(base, weight, discount, wanted)[0] == pytest.approx(found, rel=1e-12)
    assert f"{derivation('attack length').evaluate(base=1e-4, weight=12, discount=0.98, recovery=0.5):.2f}" == "14.10"
