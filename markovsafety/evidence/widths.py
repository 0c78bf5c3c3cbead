"""Widths that evidence adds to a probability of harm: what the token limit hid, and what the chain gets wrong."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..arithmetic import widened
from ..bound import Bound, clustered
from ..chains import Chain
from ..errors import InputError
from ..hitting import hitting_probability
from .cells import cell, tally_of

__all__ = ["censored_harm", "with_misfit", "with_truncation"]


def with_truncation(bound: Bound, either: Bound) -> Bound:
    """P(harm) in [harm, harm + truncated]: an answer that was cut off may have been harmful.

    Parameters
    ----------
    bound : Bound
        P(harm), with answers that were cut off counted as harmless.
    either : Bound
        P(harm or truncated), of the same shape and from the same evidence.

    Returns
    -------
    Bound
        With the width "truncation"; its upper end is that of `either`. The start bound travels along where both have
        one.

    Raises
    ------
    InputError
        If the shapes differ, `either` is smaller, or truncation was assessed already.

    Examples
    --------
    Two of the twenty answers to each prompt did harm, one was cut off:

    >>> from markovsafety.bound import clustered
    >>> harm = clustered([2] * 20, [20] * 20, name="P(harm)")
    >>> either = clustered([3] * 20, [20] * 20, name="P(harm or truncated)")
    >>> print(ms.evidence.with_truncation(harm, either))
    P(harm) = 0.1   95 % [0.0724, 0.189]
        because: sampling 0.031, truncation 0.025; judge, lumping, model, rounding not assessed
    """
    if bound.shape != either.shape or (np.asarray(either.value) < np.asarray(bound.value) - 1e-9).any():
        raise InputError(
            f"P(harm) has shape {bound.shape}, P(harm or truncated) has shape {either.shape}, or is smaller.",
            cause="The second is the probability of one outcome more, from the same evidence.",
            next='Pass hitting_probability(chain, ["harm", "truncated"]), or use censored_harm(source).',
        )
    hidden = np.maximum(np.asarray(either.value) - np.asarray(bound.value), 0.0)
    up = np.maximum(np.asarray(either.upper) - np.asarray(bound.upper), 0.0)
    wide = widened(bound, least=0.0, most=1.0, truncation=(0.0, hidden))
    upper = np.fmax(np.asarray(bound.upper) + up, bound.upper)
    start = None
    if bound.start is not None and either.start is not None:
        start = with_truncation(bound.start, either.start)
    return Bound(bound.value, bound.lower, np.fmin(upper, 1.0), bound.level, wide.reasons, start, dict(bound.info))


def censored_harm(source: Any, *, prefill: int = 0, category: str | None = None, level: float = 0.95) -> Bound:
    """P(harm) with what the token limit hid as a width.

    Parameters
    ----------
    source : Chain, Rollouts, Counts or Tally
        Of a chain, by state.
    prefill, category : optional
        Which rollouts; not for a Chain.
    level : float

    Returns
    -------
    Bound
        From P(harm) to P(harm or truncated), sampling included; `info["truncated"]` is the share that was cut off.

    Examples
    --------
    Forty answers, of which ten were harmful and ten were cut off:

    >>> outcome = ["harm", "refusal", "refusal", "truncated"] * 10
    >>> hit = [0, 0, 0, -1] * 10
    >>> rolls = ms.Rollouts.of([[5]] * 40, prompt_id=np.arange(40), outcome=outcome, hit=hit)
    >>> print(ms.evidence.censored_harm(rolls))
    P(harm) = 0.25   95 % [0.127, 0.662]
        because: sampling 0.14, truncation 0.12; judge, lumping, model, rounding not assessed
    """
    if isinstance(source, Chain):
        bound = hitting_probability(source, "harm", level=level)
        both = [name for name in ("harm", "truncated") if name in source.outcomes]
        either = hitting_probability(source, both, level=level)
    else:
        c = cell(tally_of(source), prefill, category)
        bound = c.bound(level, "P(harm)")
        if np.isnan(bound.value):
            raise InputError(
                f"No rollout has {prefill} forced tokens" + (f" in {category!r}." if category else "."),
                cause="P(harm) was not measured there.",
                next="Choose a measured prefill and category.",
            )
        either = clustered(np.minimum(c.events + c.truncated, c.totals), c.totals, level)
    found = with_truncation(bound, either)
    share = np.asarray(either.value) - np.asarray(bound.value)
    return Bound(
        found.value, found.lower, found.upper, found.level, found.reasons, found.start,
        {**found.info, "truncated": float(share) if share.ndim == 0 else share},
    )  # fmt: skip


def with_misfit(bound: Bound, check: Any) -> Bound:
    """A probability from a chain, with what a check on held-out rollouts found wrong with the chain as width "model".

    Parameters
    ----------
    bound : Bound
        A probability that the chain gave.
    check : Check
        Of that chain.

    Returns
    -------
    Bound
        Both ends moved by the upper end of ``check.misfit``. Its level allows for the misfit's own: 1 minus the sum of
        both error rates.

    Raises
    ------
    InputError
        If the check measured no misfit, or the width "model" is there already.

    Examples
    --------
    >>> from markovsafety.exercises import case
    >>> rolls = case().rolls
    >>> chain = ms.estimate(ms.count(rolls[rolls.prompt_id < 30], states=ms.Position()))
    >>> found = ms.check(chain, rolls[rolls.prompt_id >= 30])
    >>> harm = ms.hitting_probability(chain, "harm")[chain.index(8)]
    >>> print(harm)
    P(harm) = 0.494   95 % [0.403, 0.585]
        because: sampling 0.091, rounding 7e-16; judge, lumping, model, truncation not assessed
    >>> print(ms.evidence.with_misfit(harm, found))
    P(harm) = 0.494   90 % [0.169, 0.819]
        because: sampling 0.091, model 0.23, rounding 7e-16; judge, lumping, truncation not
        assessed
    """
    misfit = check.misfit
    if misfit is None:
        raise InputError(
            "The check measured no misfit.",
            cause="No held-out rollout had forced tokens, and without any, every chain repeats the raw share of harm.",
            next="Check the chain on rollouts with prefill > 0.",
        )
    wide = widened(bound, least=0.0, most=1.0, model=misfit.upper)
    level = 1 - (1 - bound.level) - (1 - misfit.level)
    if level <= 0:
        raise InputError(
            f"Levels {bound.level:g} and {misfit.level:g} leave none for the result.",
            cause="Their error rates add up.",
            next="Use higher levels.",
        )
    return Bound(wide.value, wide.lower, wide.upper, level, wide.reasons, None, wide.info)
