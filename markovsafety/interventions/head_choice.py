"""Which heads to edit, and how strongly: by sampled answers, on prompts other than those that are reported.

Source: arXiv 2502.05945, section 3: heads are tried alone, merged, and share one alpha. We depart from it in that only
the heads that a first-token pass put first are sampled, that the smallest set that does as well as the best is taken,
and that the report stands beside two edits of the same size: random vectors on the same heads, and other heads of the
same layers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..bound import Bound
from ..brief import brief
from ..errors import InputError
from .behaviour import Behaviour, behave
from .buckets import listed
from .edits import Edit, When
from .head_sweep import HeadSweep
from .heads import Head, HeadDirections
from .host import Host

__all__ = ["HeadChoice", "choose_heads", "speaks"]

Key = tuple[tuple[Head, ...], float]
"""Heads and the alpha they share."""
LOST = 0.1
"""Share of answers that may stop ending, or begin to repeat themselves, under an edit that is still called speech."""


@dataclass(frozen=True, eq=False)
class HeadChoice:
    """Chosen heads, and what editing them does.

    Parameters
    ----------
    heads : tuple of (layer, head)
    alpha : float
        Shared by all heads.
    edit : Edit
    wanted : tuple of str
        Outcomes that count as success.
    tried : dict of (heads, alpha) -> Behaviour
        Everything that was sampled to choose, on the prompts of the choice.
    speechless : set of (heads, alpha)
        What of this was not chosen because the model no longer ends its answers, or goes round in circles (`speaks`).
    base, edited, control, others : Behaviour
        On the prompts of the report: the model as it is, under the edit, under random vectors of the same norms on the
        same heads, and under edits of the same norms along their own directions of other heads of the same layers (None
        where the layers have no other).

    Examples
    --------
    >>> from markovsafety import interventions as inside, organism
    >>> host = inside.open_host(organism.model_path("shallow"))
    >>> found = inside.head_directions(host, organism.prompts(n=12, harmful=False), organism.prompts(n=12))
    >>> refused = organism.prompts(n=24, seed=1)
    >>> comply = [organism.WORDS.index(word) for word in ("sure", "okay", "certainly", "yes")]
    >>> sweep = inside.sweep_heads(host, found, refused[::2], comply, alphas=(5,))
    >>> options = dict(judge="organism", top=1, sizes=(1,), alphas=(5, 10), when="prompt", n=2)
    >>> choice = inside.choose_heads(host, found, sweep, refused, **options)
    >>> choice
    HeadChoice(heads=((1, 2),), alpha=5, edit=<Edit: head ... at layer 1 head 2 (prompt)>, ...)
    >>> print(choice.edited.rate(choice.wanted))
    P(harm or benign) = 0.7...   95 % [0.4..., 0.9...]   because: sampling 0.2...;
        judge, lumping, model, truncation, rounding not assessed
    >>> print(choice.base.rate(choice.wanted))
    P(harm or benign) = 0.1...   95 % [0.0..., 0.4...]   because: sampling 0.2...;
        judge, lumping, model, truncation, rounding not assessed
    """

    heads: tuple[Head, ...]
    alpha: float
    edit: Edit
    wanted: tuple[str, ...]
    tried: dict[Key, Behaviour]
    speechless: frozenset[Key]
    base: Behaviour
    edited: Behaviour
    control: Behaviour
    others: Behaviour | None

    __repr__ = brief

    @property
    def effect(self) -> Bound:
        """How much more often the wanted outcome comes than without edit."""
        return self.edited.change(self.base, self.wanted)

    @property
    def beyond_control(self) -> Bound:
        """How much more often it comes than under the random vectors."""
        return self.edited.change(self.control, self.wanted)

    @property
    def verdict(self) -> str:
        """ "causal", or "not separated" from random vectors of the same size."""
        return "causal" if self.beyond_control.lower > 0 else "not separated"

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        tried = [
            {
                "heads": [list(h) for h in key[0]],
                "alpha": key[1],
                "wanted": b.rate(self.wanted).to_json(),
                "speaks": key not in self.speechless,
            }
            for key, b in self.tried.items()
        ]
        shown = {k: getattr(self, k) for k in ("base", "edited", "control", "others")}
        return {
            "heads": [list(h) for h in self.heads],
            "alpha": self.alpha,
            "wanted": list(self.wanted),
            "verdict": self.verdict,
            "effect": self.effect.to_json(),
            "beyond_control": self.beyond_control.to_json(),
            **{k: None if b is None else b.to_json() for k, b in shown.items()},
            "tried": tried,
        }


def choose_heads(
    host: Host,
    directions: HeadDirections,
    sweep: HeadSweep,
    prompts: Sequence[Any],
    *,
    judge: Any,
    wanted: str | Sequence[str] = ("harm", "benign"),
    top: int = 4,
    sizes: Sequence[int] = (1, 2, 4),
    alphas: Sequence[float] = (1.0, 2.0, 5.0),
    when: When = "every",
    n: int = 4,
    max_tokens: int = 64,
    seed: int = 0,
) -> HeadChoice:
    """Sample answers under the best heads of a sweep, alone and together, and choose.

    Parameters
    ----------
    host : Host
    directions : HeadDirections
    sweep : HeadSweep
    prompts : sequence of prompts
        Every second one is used to choose, the others for the report.
    judge : str or Judge
    wanted : outcome or outcomes
        What the edit is for; by default anything but a refusal.
    top : int
        Heads of the sweep that are sampled alone.
    sizes : sequence of int
        Sizes of the sets that are tried: the best heads by their sampled effect.
    alphas : sequence of float
        Shared by the heads of a set; negative ones turn the direction round (then `wanted` is the other outcome).
    when : {"every", "prompt", "answer"}
        As in `HeadDirections.edit`.
    n, max_tokens, seed
        As in `behave`.

    Returns
    -------
    HeadChoice

    Raises
    ------
    InputError
        Fewer than two prompts, or nothing to try.

    Examples
    --------
    How much more often the answer is no refusal than without the edit, and than under a random vector of the same norm:

    >>> from markovsafety import interventions as inside, organism
    >>> host = inside.open_host(organism.model_path("shallow"))
    >>> found = inside.head_directions(host, organism.prompts(n=12, harmful=False), organism.prompts(n=12))
    >>> refused = organism.prompts(n=24, seed=1)
    >>> comply = [organism.WORDS.index(word) for word in ("sure", "okay", "certainly", "yes")]
    >>> sweep = inside.sweep_heads(host, found, refused[::2], comply, alphas=(5,))
    >>> options = dict(judge="organism", top=1, sizes=(1,), alphas=(5, 10), when="prompt", n=2)
    >>> choice = inside.choose_heads(host, found, sweep, refused, **options)
    >>> print(choice.effect)
    change = 0.6...   95 % [0.1..., 0.8...]   because: sampling 0.3...;
        judge, lumping, model, truncation, rounding not assessed
    >>> print(choice.beyond_control)
    change = 0.6...   95 % [0.1..., 0.8...]   because: sampling 0.3...;
        judge, lumping, model, truncation, rounding not assessed
    >>> choice.verdict
    'causal'
    """
    goal = (wanted,) if isinstance(wanted, str) else tuple(wanted)
    asked, first = list(listed(prompts)), sweep.ranked[:top]
    if len(asked) < 2 or not first or not len(alphas) or not len(sizes) or min(sizes) < 1:
        raise InputError(
            f"heads cannot be chosen from {len(asked)} prompts, {len(first)} heads, alphas {list(alphas)} and sizes "
            f"{list(sizes)}",
            cause="half of the prompts is used to choose and half to report; something must be tried",
            next="give at least 2 prompts, 1 head, 1 alpha and sizes from 1",
        )

    def sampled(edit: Edit | None, some: list[Any]) -> Behaviour:
        return behave(host, some, edit, judge=judge, n=n, max_tokens=max_tokens, seed=seed)

    tried: dict[Key, Behaviour] = {}

    def reached(heads: tuple[Head, ...], alpha: float) -> float:
        if (heads, alpha) not in tried:
            tried[heads, alpha] = sampled(directions.edit(heads, alpha, when=when), asked[::2])
        return tried[heads, alpha].rate(goal).value

    before = sampled(None, asked[::2])
    alone = {head: max(reached((head,), float(alpha)) for alpha in alphas) for head in first}
    order = sorted(first, key=lambda head: -alone[head])
    for size in sizes:
        for alpha in alphas:
            reached(tuple(order[:size]), float(alpha))
    broken = frozenset(key for key, behaviour in tried.items() if not speaks(behaviour, before))
    heads, alpha = _smallest({k: b for k, b in tried.items() if k not in broken} or tried, goal)
    edit, held = directions.edit(heads, alpha, when=when), asked[1::2]
    other = _others(directions, sweep, heads, edit)
    return HeadChoice(
        heads,
        alpha,
        edit,
        goal,
        tried,
        broken,
        sampled(None, held),
        sampled(edit, held),
        sampled(edit.control(seed), held),
        None if other is None else sampled(other, held),
    )


def speaks(after: Behaviour, before: Behaviour) -> bool:
    """Whether answers still end, and do not go round in circles, as before (but for a tenth of them)."""
    ends = after.quality.finished.value >= before.quality.finished.value - LOST
    return ends and after.quality.repetition.value <= before.quality.repetition.value + LOST


def _smallest(tried: dict[Key, Behaviour], goal: tuple[str, ...]) -> Key:
    """The fewest heads, then the smallest alpha, of what reaches the interval of the best."""
    rates = {key: behaviour.rate(goal) for key, behaviour in tried.items()}
    best = max(rates.values(), key=lambda rate: rate.value)
    good = [key for key, rate in rates.items() if rate.value >= best.lower]
    return min(good, key=lambda key: (len(key[0]), abs(key[1]), -rates[key].value))


def _others(directions: HeadDirections, sweep: HeadSweep, heads: tuple[Head, ...], edit: Edit) -> Edit | None:
    """As many other heads of the same layers, the best of the sweep, each pushed as far as the chosen ones."""
    picked: list[Head] = []
    for layer in dict.fromkeys(layer for layer, _ in heads):
        room = [head for head in sweep.ranked if head[0] == layer and head not in heads]
        picked += room[: sum(head[0] == layer for head in heads)]
    if not picked:
        return None
    size = float(np.mean([abs(part.scale) for part in edit.parts]))
    sign = np.sign(edit.parts[0].scale) or 1.0
    other = directions.edit(picked, 1.0, when=edit.parts[0].when)
    parts = tuple(dataclasses.replace(part, scale=sign * size) for part in other.parts)
    return dataclasses.replace(other, parts=parts)
