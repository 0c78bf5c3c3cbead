"""A judge that is nothing but token ids: what an engine needs to judge where it samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import InputError

__all__ = ["Rule", "rule_of"]


@dataclass(frozen=True)
class Rule:
    """Sequences of token ids that decide an answer, by the rule of `judges.decide`.

    Parameters
    ----------
    harm, refusal : tuple of tuples of int
        A sequence counts if it stands in the answer before its end and a sampled token completes it; it may begin among
        the forced ones. Harm is hit at the token that completes the first sequence.
    ends : tuple of int
        Ids that end an answer.
    refusal_at : {"first", "end"}
        Where a refusal is hit: at the first sampled token of its sequence, or at the token that ends the answer.
    """

    harm: tuple[tuple[int, ...], ...]
    refusal: tuple[tuple[int, ...], ...]
    ends: tuple[int, ...]
    refusal_at: str = "end"

    @classmethod
    def of(cls, harm: Sequence[Any], refusal: Sequence[Any], ends: Sequence[int], refusal_at: str = "end") -> Rule:
        """The rule of entries that are single ids or sequences of ids."""
        made = [tuple(tuple(int(i) for i in np.atleast_1d(entry)) for entry in entries) for entries in (harm, refusal)]
        return cls(made[0], made[1], tuple(int(i) for i in ends), refusal_at)


def rule_of(judge: Any, eos_ids: Sequence[int]) -> Rule:
    """The rule behind a judge.

    Parameters
    ----------
    judge : Judge
        One with ``rule(eos_ids)``.
    eos_ids : sequence of int
        Ids that end an answer of the model, for a judge that was not told.

    Raises
    ------
    InputError
        The judge has none: it reads text, or is a model itself.
    """
    if judge is None:
        raise InputError(
            "no judge was given",
            cause="transitions are counted up to the hit, so the hit must be known where they are counted",
            next='give judge="organism", or a LexiconJudge of token ids',
        )
    if not callable(getattr(judge, "rule", None)):
        raise InputError(
            f"the judge {getattr(judge, 'name', judge)!r} cannot judge on the device",
            cause="it is no list of token ids; it has to see whole answers",
            next="sample rollouts, judge them and count them: count(judge(sample(...), ...), states)",
        )
    return judge.rule(tuple(eos_ids))
