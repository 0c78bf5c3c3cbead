"""Optimal depths: whole numbers, found by comparing costs and not by rounding a formula."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ..errors import InputError, UntrustedError
from .attack import LONGEST, AttackLaw, Optimum

if TYPE_CHECKING:
    from .closed import Profile

__all__ = ["checkpoint_point", "least", "most", "of_profile", "price_point"]


def price_point(gain: float, rate: float, price: float) -> float | None:
    """Where ``gain exp(-rate d) + price d`` is stationary: ``ln(gain rate / price) / rate``; None if at no d >= 0."""
    if not gain * rate > price > 0:
        return None
    return math.log(gain * rate / price) / rate


def checkpoint_point(c: float, p: float) -> float | None:
    """Where ``(c^d - (1 - p)^d) / (c - (1 - p))`` is stationary over real d.

    It is ``ln(ln(1 - p) / ln c) / ln(c / (1 - p))``, or its limit ``1 / ln(1 / c)`` where both bases agree; None where
    one of them is 0 or 1.
    """
    q = 1 - p
    if not (0 < c < 1 and 0 < q < 1):
        return None
    a, b = -math.log(c), -math.log1p(-p)
    gap = (b - a) / a
    # ln(b / a) / (b - a), by its series where the two are nearly equal.
    return 1 / a * (1 - gap / 2 + gap * gap / 3) if abs(gap) < 1e-6 else math.log(b / a) / (b - a)


def least(cost: NDArray, exact: Callable[[list[int]], list[Fraction]]) -> int:
    """Index of the least cost, of several the first; those too close for floating point are compared exactly."""
    best = float(cost.min())
    near = np.flatnonzero(cost <= best + 4e-15 * max(abs(best), float(np.abs(cost).max(initial=0.0)))).tolist()
    if len(near) == 1 or near[-1] > 2000:
        return near[0] if len(near) == 1 else int(np.argmin(cost))
    values = exact(near)
    return near[values.index(min(values))]


def most(gain: NDArray, exact: Callable[[list[int]], list[Fraction]]) -> int:
    """Index of the largest gain, in the same way."""
    return least(-gain, lambda at: [-g for g in exact(at)])


def of_profile(p: Profile, price: float, k: int, attack: AttackLaw | None) -> Optimum:
    """`Profile.optimal_depth`."""
    if not (isinstance(price, (int, float, np.number)) and 0 <= price < math.inf):
        raise InputError(
            f"price is {price!r}.", cause="It is harm per aligned position.", next="Pass a number from 0 on."
        )
    price, f0, f1, c = float(price), p.f0, p.f1, p.c1
    law = AttackLaw.fixed(0) if attack is None else attack
    if c == 1 or f1 >= f0:
        value = float(p.harm(0).value)
        return Optimum(0, value, value, reason="alignment does not lower harm")
    if price == 0:
        last = k + law.n
        if c == 0 and not law.tail:  # one aligned position beyond the longest attack decides everything
            last = k + int(np.flatnonzero(law.pmf)[-1]) + 1
            return Optimum(last, f1, f1)
        floor = float(p.floor().value)
        return Optimum(None, floor, floor, reason="without a price more depth is always at least as good")
    continuous = None
    if attack is None and c > 0:
        point = price_point(f0 - f1, -math.log1p(-(p.a1 + p.r1)), price)
        continuous = None if point is None else k + point
    last = 64
    while True:
        depths = np.arange(last + 1)
        harm = np.asarray(p.harm(depths, k, attack=attack).value)
        cost = harm + price * depths
        # Deeper than this the price alone exceeds the best cost.
        if f1 + price * last >= cost.min():
            break
        if last > LONGEST:
            raise UntrustedError(
                f"The optimal depth was not found up to {last} positions.",
                cause=f"At a price of {price:g} per position, depth pays for very long attacks.",
                next="Raise the price, or shorten the tail of the attack.",
                partial=Optimum(int(cost.argmin()), float(harm[cost.argmin()]), float(cost.min())),
            )
        last *= 4
    at = least(cost, lambda near: _exact_cost(p, law, k, price, near))
    return Optimum(at, float(harm[at]), float(cost[at]), continuous)


def _exact_cost(p: Profile, law: AttackLaw, k: int, price: float, depths: list[int]) -> list[Fraction]:
    """Harm plus price in rational arithmetic."""
    a0, r0, a1, r1 = (Fraction(x) for x in (p.a0, p.r0, p.a1, p.r1))
    f0, f1, c = a0 / (a0 + r0), a1 / (a1 + r1) if a1 else Fraction(0), 1 - a1 - r1
    left = [max(d - k, 0) for d in depths]
    g = law.exact_discount(c, left)
    past = law.exact_survival(left)
    return [f1 + (f0 - f1) * (x + s) + Fraction(price) * d for x, s, d in zip(g, past, depths)]
