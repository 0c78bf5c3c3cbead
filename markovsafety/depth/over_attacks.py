"""Means over the law of an attack, where each number of forced tokens has evidence of its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from ..errors import InputError
from ..evidence.cells import forced
from .attack import AttackLaw
from .block import ENDS, Asked, Block, Coords, as_block, axis, names_of

__all__ = ["Weights", "joint", "mixed", "over_laws", "shared", "unmeasured"]

REST = 1e-6  # mass of an attack law beyond the deepest forced token, where none is asked for
LONGEST = 10_000  # forced tokens, where no depth is asked for
Weights = list[list[dict[int, float]]]


def over_laws(of: Callable[[Any, Any, Asked], Block], source: Any, depth: Any, asked: Asked) -> Block:
    """The block of a source, law by law where these need intervals of different levels.

    A mean of n numbers takes intervals that hold together, so a law that forces one number only would pay for another
    one that forces many.
    """
    if asked.laws == (None,):
        return of(source, depth, asked)
    if depth is None:
        asked = replace(asked, reach=_reach(asked.laws))
    last = asked.reach if depth is None else axis(depth, "depth")[-1]
    terms = np.array([len(_weights(law, last or 0)) for law in asked.laws])
    groups = [np.flatnonzero(terms == n) for n in sorted({*terms.tolist()}, reverse=True)]
    blocks = [of(source, depth, replace(asked, laws=tuple(asked.laws[i] for i in group))) for group in groups]
    if len(blocks) == 1:
        return blocks[0]
    order = np.argsort(np.concatenate(groups))
    names = [*ENDS, *sorted({name for b in blocks for name in b.reasons})]

    def part(b: Block, name: str) -> Any:
        return getattr(b, name) if name in ENDS else b.reasons.get(name, np.zeros(b.value.shape))

    parts = {name: np.concatenate([part(b, name) for b in blocks], axis=-1)[..., order] for name in names}
    info = dict(blocks[0].info)
    if notes := "; ".join(dict.fromkeys(b.info["note"] for b in blocks if b.info.get("note"))):
        info["note"] = notes
    return as_block(blocks[0].depths, parts, min(b.level for b in blocks), info)


def mixed(depth: Any, asked: Asked, measured: Coords | None) -> tuple[Coords, Weights, dict[int, float]]:
    """Depths, the weight of every number of forced tokens by depth and law, and the mass of each law that was cut."""
    laws = asked.laws
    if laws == (None,):
        depths = measured if depth is None and measured is not None else axis(depth, "depth")
        return depths, [[{k: 1.0}] for k in depths], {}
    depths = (asked.reach or _reach(laws),) if depth is None else axis(depth, "depth")
    rest = {a: float(law.survival(depths[-1] + 1)) for a, law in enumerate(laws)} if depth is None else {}
    return depths, [[_weights(law, k) for law in laws] for k in depths], {a: x for a, x in rest.items() if x > 0}


def _weights(law: AttackLaw, last: int) -> dict[int, float]:
    """P(min(K, last) = k) where it is positive."""
    p = law.probability(np.arange(last + 1))
    p[-1] = law.survival(last)
    return {int(k): float(p[k]) for k in np.flatnonzero(p > 0)}


def _reach(laws: Coords) -> int:
    """Most tokens that any of the laws forces, but for `REST` of its mass."""
    last = 0
    for law in laws:
        end = int(np.flatnonzero(law.pmf)[-1]) if law.pmf.any() else 0
        if law.tail > 0:
            end = max(law.n + 63, 63)
            while law.survival(end + 1) > REST and end < LONGEST:
                end *= 2
            inside = np.arange(end + 1)
            end = int(inside[law.survival(inside + 1) <= REST][0]) if law.survival(end + 1) <= REST else end
        last = max(last, end)
    return last


def unmeasured(absent: list[int], measured: Coords, laws: Coords, rest: dict[int, float]) -> InputError:
    known = f"Measured were {', '.join(map(str, measured))}; nothing is interpolated."
    if laws == (None,):
        return InputError(
            f"No rollout has {forced(absent[:1])}.",
            cause=known,
            next="Sweep measured depths, sample the missing ones, or sweep an estimated chain.",
        )
    cut = "" if not rest else " A law without an end is cut at a mass of 1e-6."
    return InputError(
        f"The attack ({', '.join(names_of(laws))}) forces numbers of tokens that no rollout has: {forced(absent)}.",
        cause=known + cut,
        next=f"Measure k = {forced(absent).rsplit(' forced', 1)[0]}, give a law of measured numbers only, or sweep an "
        "estimated chain.",
    )


def joint(level: float, weights: Weights) -> float:
    """Level at which all the bounds that enter one mean hold together (Bonferroni)."""
    most = max(len(w) for row in weights for w in row)
    return level if most == 1 or level == 1 else 1 - (1 - level) / most


def shared(weights: Weights) -> str:
    """What is to be known of means over the attack."""
    most = max(len(w) for row in weights for w in row)
    if most == 1:
        return ""
    return "means over the attack take intervals of all their numbers of forced tokens that hold together"
