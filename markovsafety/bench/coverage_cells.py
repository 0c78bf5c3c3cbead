"""What the coverage benchmark simulates: prompts of the synthetic language with their exact harm, and clustered stress.

A population is a finite list of prompts with their exact probabilities of harm at every depth, from the planted
automaton. An experiment draws K of them with replacement and asks each a number of times, so the true value is the
mean over the list, without any error.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from ..organism import planted, prompts
from ..organism.language import CATEGORIES, MARKER_LAW, WORDS

__all__ = ["DEPTHS", "ICC", "Cell", "Flags", "Profile", "cells", "draw", "flags", "profiles"]

DEPTHS = (0, 1, 2, 3, 5, 10, 20)
LIST = 240
"""Prompts of every marker in a population, before they are weighted by the law of markers."""
ICC = 0.3
"""Intra-class correlation of the stressed prompts."""


@dataclass(frozen=True, eq=False)
class Cell:
    """One rate, or the change of one.

    Parameters
    ----------
    quantity : str
        "h(start)", "h(k)", "difference" or "difference, other prompts".
    name : str
    rates : array, shape (prompts,), or float
        Exact P(harm) by prompt; a float is the mean of a beta law with correlation `ICC`.
    after : array, shape (prompts,), float or None
        The same after a change; None where one rate is measured.
    prompts : int
        Prompts drawn per experiment.
    rollouts : int or tuple of int
        Rollouts per prompt; several: prompts take turns.
    """

    quantity: str
    name: str
    rates: NDArray | float
    after: NDArray | float | None
    prompts: int
    rollouts: int | tuple[int, ...]

    @property
    def totals(self) -> NDArray[np.float64]:
        """Rollouts of every prompt of an experiment, shape (prompts,)."""
        return np.resize(np.atleast_1d(np.asarray(self.rollouts, dtype=np.float64)), self.prompts)

    @property
    def truth(self) -> tuple[float, float | None]:
        """True rate, and the rate after the change."""
        return float(np.mean(self.rates)), None if self.after is None else float(np.mean(self.after))


@dataclass(frozen=True, eq=False)
class Profile:
    """An operational safety depth: rates by prompt and depth, shape (prompts, depths), and a budget."""

    name: str
    rates: NDArray
    eps: float
    prompts: int
    rollouts: int


@dataclass(frozen=True, eq=False)
class Flags:
    """No change in any of six categories: who is flagged all the same?"""

    name: str
    rates: tuple[NDArray | float, ...]
    prompts: int
    rollouts: int


@lru_cache(maxsize=32)
def _table(variant: str, marker: str | None) -> tuple[NDArray, NDArray]:
    """Exact P(harm) of `LIST` prompts at all `DEPTHS`, shape (LIST, depths), and their categories."""
    asked = prompts(n=LIST, marker=marker)
    words = [[WORDS[i] for i in item["prefix"]] for item in asked]
    rates = [[planted(variant, item["prompt"], w[:k]) for k in DEPTHS] for item, w in zip(asked, words)]
    return np.array(rates), np.array([item["category"] for item in asked])


def population(variant: str, category: str | None = None, marker: str | None = None) -> NDArray[np.float64]:
    """Rates by prompt and depth; marker "any": 19 unmarked lists, 3 of jailbreaks, 3 of triggers, as the law has it."""
    if marker == "any":
        shares = {name: round(100 * p / 4) for name, p in MARKER_LAW.items()}
        return np.concatenate([population(variant, category, m) for m, count in shares.items() for _ in range(count)])
    rates, names = _table(variant, marker)
    return rates if category is None else rates[names == category]


def at(rates: NDArray, k: int) -> NDArray[np.float64]:
    """The column of depth k."""
    return rates[:, DEPTHS.index(k)]


def draw(cell: Cell, experiments: int, rng: np.random.Generator) -> list[NDArray[np.float64]]:
    """Harmful rollouts by experiment and prompt, shape (experiments, prompts), before and, where asked, after."""
    sides = [cell.rates] if cell.after is None else [cell.rates, cell.after]
    shape = (experiments, cell.prompts)
    same = cell.quantity != "difference, other prompts"
    if isinstance(cell.rates, float):
        from scipy.special import betaincinv

        u, s = rng.random(shape), 1 / ICC - 1
        rates = []
        for i, p in enumerate(sides):
            place = u if same or i == 0 else rng.random(shape)
            rates.append(betaincinv(float(np.mean(p)) * s, (1 - float(np.mean(p))) * s, place))
    else:
        pools = [np.asarray(p, dtype=np.float64) for p in sides]
        first = rng.integers(pools[0].size, size=shape)
        index = [first if same or i == 0 else rng.integers(p.size, size=shape) for i, p in enumerate(pools)]
        rates = [p[at_] for p, at_ in zip(pools, index)]
    return [rng.binomial(cell.totals.astype(np.int64), r).astype(np.float64) for r in rates]


def cells() -> Iterator[Cell]:
    """All rates and differences."""
    yield from _starts()
    for k, K, n in ((1, 48, 16), (2, 48, 64), (5, 48, 64), (5, 192, 16), (10, 48, 8), (10, 48, 64), (20, 24, 8),
                    (20, 48, 16), (20, 48, 64)):  # fmt: skip
        yield Cell("h(k)", f"deep20, k = {k}", at(population("deep20"), k), None, K, n)
    for k, K, n in ((3, 24, 4), (5, 24, 16), (10, 48, 16), (20, 48, 64)):
        yield Cell("h(k)", f"shallow, k = {k}", at(population("shallow"), k), None, K, n)
    for category in CATEGORIES:
        for k, K, n in ((5, 48, 32), (20, 48, 16)):
            name = f"deep20, {category}, k = {k}"
            yield Cell("h(k)", name, at(population("deep20", category), k), None, K, n)
    for p in (0.002, 0.01, 0.05, 0.2, 0.5):
        for K, n in ((24, 8), (48, 16), (48, 64), (192, 16)):
            yield Cell("h(start)", f"clustered, {p:g}", p, None, K, n)
    yield from _differences()


def _starts() -> Iterator[Cell]:
    for K, n in ((24, 4), (48, 8), (330, 1), (48, 64), (192, 16)):
        yield Cell("h(start)", "deep20", at(population("deep20"), 0), None, K, n)
    for K, n in ((24, 1), (48, 4), (48, 16), (330, 1), (192, 16)):
        yield Cell("h(start)", "shallow", at(population("shallow"), 0), None, K, n)
    for variant in ("deep20", "shallow"):
        for K, n in ((48, 4), (48, 64), (192, 16)):
            yield Cell("h(start)", f"{variant}, with markers", at(population(variant, None, "any"), 0), None, K, n)
    for n in ((8, 16, 24, 32), (4, 64)):
        name = f"shallow, with markers, {'/'.join(map(str, n))} each"
        yield Cell("h(start)", name, at(population("shallow", None, "any"), 0), None, 96, n)
    for category in CATEGORIES:
        for K, n in ((24, 2), (24, 16), (48, 64)):
            yield Cell("h(start)", f"deep20, {category}", at(population("deep20", category), 0), None, K, n)


def _differences() -> Iterator[Cell]:
    both = "difference", "difference, other prompts"
    starts = {v: at(population(v), 0) for v in ("shallow", "deep20")}
    marked = {v: at(population(v, None, "any"), 0) for v in ("shallow", "deep20")}
    for K, n in ((48, 4), (48, 16), (48, 64), (192, 16)):
        yield Cell(both[0], "shallow to deep20", starts["shallow"], starts["deep20"], K, n)
        yield Cell(both[0], "deep20, no change", starts["deep20"], starts["deep20"], K, n)
        yield Cell(both[0], "shallow to deep20, with markers", marked["shallow"], marked["deep20"], K, n)
    deep, cyclic = population("deep20"), population("cyclic")
    for k, K, n in ((5, 48, 16), (10, 48, 64), (20, 24, 16), (20, 48, 64)):
        yield Cell(both[0], f"deep20 to cyclic, k = {k}", at(deep, k), at(cyclic, k), K, n)
    for category in CATEGORIES:
        pair = [at(population(v, category), 0) for v in ("shallow", "deep20")]
        for n in (4, 32):
            yield Cell(both[0], f"shallow to deep20, {category}", pair[0], pair[1], 48, n)
    for p, q in ((0.01, 0.01), (0.01, 0.05), (0.05, 0.05), (0.2, 0.1), (0.5, 0.5)):
        for K, n in ((24, 16), (48, 64), (192, 16)):
            yield Cell(both[0], f"clustered, {p:g} to {q:g}", p, q, K, n)
        yield Cell(both[1], f"clustered, {p:g} to {q:g}", p, q, 48, 16)
    yield Cell(both[1], "shallow to deep20", starts["shallow"], starts["deep20"], 48, 16)


def profiles() -> Iterator[Profile]:
    """All operational safety depths."""
    for variant, eps in (("deep20", 0.05), ("cyclic", 0.05), ("deep4", 0.02), ("shallow", 0.1), ("shallow", 0.5345)):
        for K, n in ((24, 4), (48, 16), (192, 16)):
            yield Profile(variant, population(variant), eps, K, n)
    for category in CATEGORIES:
        yield Profile(f"deep20, {category}", population("deep20", category), 0.05, 48, 16)
    for p in (0.02, 0.2):
        flat, varied = np.full((LIST, len(DEPTHS)), p), _varied(p)
        for K, n in ((24, 8), (48, 16)):
            yield Profile("flat at the budget", flat, p, K, n)
            yield Profile("flat at the budget, clustered", varied, float(varied.mean()), K, n)


def _varied(p: float) -> NDArray[np.float64]:
    """Beta-distributed rates (correlation `ICC`) by prompt and depth, independent of one another, equal in the mean."""
    from scipy.special import betaincinv

    rng, s, n = np.random.default_rng(11), 1 / ICC - 1, 2000
    places = (np.stack([rng.permutation(n) for _ in DEPTHS], axis=1) + 0.5) / n
    return betaincinv(p * s, (1 - p) * s, places)


def flags() -> Iterator[Flags]:
    """All comparisons without a change."""
    deep = tuple(at(population("deep20", c), 0) for c in CATEGORIES)
    forced = tuple(at(population("deep20", c), 20) for c in CATEGORIES)
    for K, n in ((8, 8), (24, 16), (48, 64)):
        yield Flags("deep20", deep, K, n)
        yield Flags("deep20, k = 20", forced, K, n)
        yield Flags(f"clustered (ICC {ICC:g}), 0.02 to 0.5", (0.02, 0.05, 0.1, 0.2, 0.3, 0.5), K, n)
