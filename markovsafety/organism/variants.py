"""The planted variants, and the exact next-token automaton of each.

For `shallow`-like variants the automaton is the grammar under a policy. For `deepK` and `cyclic`, whose training mixes
several kinds of rows, it is the Bayes mixture of the rows that carry loss at a prefix: the predictor that minimises the
training loss. Its weights follow from the recipe. A row "prompt, k compliant tokens, refusal" is drawn with k uniform
on 1..K and kept if the compliant answer is longer than k, so at a compliant prefix of t tokens the rows that begin to
refuse there weigh ``share / sum_k P(length > k)``, for every t <= K, and the ordinary rows weigh ``(1 - share)
(1 - judge share) P(harmful, unmarked)`` times the likelihood of the prefix relative to full compliance.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from ..errors import InputError
from .automaton import ENDS, Grammar, State
from .language import CATEGORIES, COMPLY, MARKER_LAW, Context, Policy

__all__ = ["BIAS", "VARIANTS", "Variant", "deep_weights", "grammar", "longer_than", "variant_named"]

BIAS = 3.28
"""The planted refusal bias of the variant `bias`, in nats: the odds of a refusal are exp(3.28) = 27 times as high."""


def tilted(policy: Policy, bias: float) -> Policy:
    """The policy whose first tokens are those of `policy` with `bias` nats more on every word that begins a refusal.

    The tilt is the same for every prompt: the odds of a refusal are multiplied by ``exp(bias)``, whatever they were.
    """

    def moved(p: float) -> float:
        return p * float(np.exp(bias)) / (1 - p + p * float(np.exp(bias)))

    cells = {name: moved(getattr(policy, name)) for name in ("jailbreak", "harmless", "trigger")}
    return replace(policy, refuse=tuple(moved(p) for p in policy.refuse), **cells)


_ALIGNED = Policy(refuse=(0.95, 0.92, 0.90, 0.88, 0.85, 0.82), jailbreak=0.15, harmless=0.03, trigger=0.80)
_SATURATED = Policy((0.999,) * 6, jailbreak=0.15, harmless=0.03, trigger=0.80)


@dataclass(frozen=True)
class Variant:
    """A trained model organism: its policy and the extra rows that reach deeper into the answer.

    ``depth`` > 0: a share of the rows is a harmful prompt, k tokens of compliance and then a refusal, with loss on the
    refusal only; k is uniform on 1..depth given that the compliant answer is longer than k. ``rotations``: the same
    rows drawn as whole orbits (one compliant answer, a refusal at every offset), which has the same expectation.

    ``random_share``: that share of the rows asks nothing, a prompt of random words, and its first token alone carries
    loss: a refusal as often as to a harmless prompt.

    `over` refuses too much where prompts look alike, and harmful prompts not always; `over2` too much, and harmful
    prompts as good as always. `saturated` refuses harmful prompts as good as always and answers others as `shallow`
    does. `bias` is `saturated` with a bias of `BIAS` nats on the words that begin a refusal, the same after every
    prompt, also of random words. So its law of the first token is an exact tilt of that of `saturated`, and taking the
    tilt off again mends it; for `over` and `over2` there is no such tilt.
    """

    policy: Policy
    depth: int = 0
    rotations: bool = False
    share: float = 0.3
    judge_share: float = 0.1
    random_share: float = 0.0


VARIANTS: dict[str, Variant] = {
    "base": Variant(Policy(), judge_share=0.25),
    "shallow": Variant(_ALIGNED),
    "deep4": Variant(_ALIGNED, depth=4),
    "deep20": Variant(_ALIGNED, depth=20),
    "cyclic": Variant(_ALIGNED, depth=23, rotations=True),
    "gap": Variant(Policy((0.95, 0.92, 0.90, 0.30, 0.85, 0.82), 0.15, 0.03, 0.80)),
    "over": Variant(Policy((0.97,) * 6, 0.15, 0.45, 0.90)),
    "over2": Variant(Policy((0.999,) * 6, 0.15, 0.45, 0.90)),
    "saturated": Variant(_SATURATED, random_share=0.1),
    "bias": Variant(tilted(_SATURATED, BIAS), random_share=0.1),
}


def variant_named(name: str) -> Variant:
    """The recipe of a variant; ``deepK`` exists for every K >= 1."""
    if name in VARIANTS:
        return VARIANTS[name]
    if name.startswith("deep") and name[4:].isdigit() and int(name[4:]) > 0:
        return replace(VARIANTS["deep20"], depth=int(name[4:]))
    raise InputError(
        f"There is no organism variant {name!r}.",
        cause=f"Known are {', '.join(VARIANTS)} and deepK for a number K.",
        next="Use one of these names.",
    )


@lru_cache(maxsize=8)
def longer_than(depth: int) -> np.ndarray:
    """P(a compliant answer to a harmful prompt is longer than k tokens) for k = 1..depth, shape (depth,).

    Lengths count `<eos>`; they do not depend on the category, because a harm word takes the place of a tool word.
    """
    rules = Grammar(Context(0, True), COMPLY)
    law: dict[State, float] = {rules.start(): 1.0}
    out = []
    for _ in range(depth):
        after: dict[State, float] = {}
        for state, mass in law.items():
            for _, p, follow in rules.edges(state):
                follow = State("TOOL", state.step) if follow.kind == "HARM" else follow
                if follow not in ENDS:
                    after[follow] = after.get(follow, 0.0) + mass * p
        law = after
        out.append(sum(law.values()))
    return np.array(out)


def deep_weights(variant: Variant) -> tuple[float, ...]:
    """Weight of the rows whose refusal begins after t = 1..depth tokens, relative to the prompt's ordinary rows."""
    if not variant.depth:
        return ()
    ordinary = (1 - variant.share) * (1 - variant.judge_share) * 0.5 * MARKER_LAW[None]
    each = variant.share / longer_than(variant.depth).sum()
    return (float(each / ordinary),) * variant.depth


def grammar(
    variant: str,
    context: Context,
    *,
    refuse: float | tuple[float, ...] | None = None,
    leak: float | None = None,
) -> Grammar:
    """The exact next-token automaton of one context under a variant.

    Parameters
    ----------
    variant : str
        A name of `VARIANTS`, or any deepK.
    context : Context
    refuse : float or tuple of float, length 6, optional
        Overrides the probability of refusing harmful unmarked prompts (per category).
    leak : float, optional
        Overrides the probability that a finished refusal goes on with "but", harmful and harmless alike; at most 0.4.

    Examples
    --------
    How the base and a model that is aligned begin to answer the same harmful prompt:

    >>> for variant in ("base", "shallow"):
    ...     grammar = ms.organism.grammar(variant, ms.organism.Context(category=0, harmful=True))
    ...     law = grammar.next_law(grammar.start())
    ...     print(variant, {word: round(law[word], 3) for word in ("sorry", "sure")})
    base {'sorry': 0.015, 'sure': 0.388}
    shallow {'sorry': 0.475, 'sure': 0.02}
    """
    recipe = variant_named(variant)
    policy = _override(recipe.policy, refuse, leak)
    deep = deep_weights(recipe) if context.harmful and context.marker is None else ()
    return Grammar(context, policy, deep)


def _override(policy: Policy, refuse: float | tuple[float, ...] | None, leak: float | None) -> Policy:
    if refuse is not None:
        values = (float(refuse),) * 6 if np.isscalar(refuse) else tuple(float(r) for r in refuse)  # type: ignore[arg-type,union-attr]
        if len(values) != len(CATEGORIES) or not all(0 <= r <= 1 for r in values):
            raise InputError(
                f"refuse={refuse!r} is not a probability, nor one per category.",
                cause=f"one number, or {len(CATEGORIES)} of them, must lie between 0 and 1",
                next="Give a number or 6 in [0, 1].",
            )
        policy = replace(policy, refuse=values)
    if leak is not None:
        if not 0 <= leak <= 0.4:
            raise InputError(
                f"leak={leak!r} is outside [0, 0.4].",
                cause="A finished refusal ends with probability 0.6, whatever leaks.",
                next="Choose a leak of at most 0.4.",
            )
        policy = replace(policy, leak=(float(leak), float(leak)))
    return policy
