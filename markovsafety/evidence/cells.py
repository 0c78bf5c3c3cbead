"""Cells: harm by prompt at one prefill depth and category, the raw material of every measured number."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..bound import Bound, clustered
from ..chains.tally import Tally, collect
from ..errors import InputError
from ..outcomes import CODES, NOT_JUDGED, OUTCOMES

__all__ = ["Cell", "cell", "forced", "is_rollouts", "tally_of"]


@dataclass(frozen=True, eq=False)
class Cell:
    """Events and rollouts of every prompt that was asked at one depth.

    Parameters
    ----------
    prompt_id : int array, shape (K,)
        Sorted, each prompt once.
    events, totals : array, shape (K,)
        Weighted number of harmful rollouts and of rollouts; totals are positive.
    truncated : array, shape (K,)
        Weighted number of rollouts that ended at the token limit, harm or refusal still to come.
    """

    prompt_id: NDArray
    events: NDArray
    totals: NDArray
    truncated: NDArray

    def bound(self, level: float = 0.95, name: str | None = None) -> Bound:
        """The clustered interval of the rate."""
        return clustered(self.events, self.totals, level, name)


def forced(depths: Iterable[int]) -> str:
    """Rising depths in words: "1 forced token", "0, 2 forced tokens", "0, 3 to 9 forced tokens"."""
    runs: list[list[int]] = []
    for k in depths:
        if runs and runs[-1][-1] + 1 == k:
            runs[-1].append(k)
        else:
            runs.append([k])
    texts = [f"{r[0]} to {r[-1]}" if len(r) > 3 else ", ".join(map(str, r)) for r in runs]
    return f"{', '.join(texts)} forced token{'' if texts == ['1'] else 's'}"


def is_rollouts(source: Any) -> bool:
    """Whether `source` has the arrays of Rollouts (this room takes them by their columns, not by their type)."""
    return all(hasattr(source, name) for name in ("prompt_id", "category", "prefill", "outcome", "offsets", "tokens"))


def tally_of(source: Any) -> Tally:
    """Rollouts by prompt, category, prefill and outcome.

    Parameters
    ----------
    source : Rollouts, Counts, estimated Chain or Tally
        Whatever remembers rollouts.

    Returns
    -------
    Tally

    Raises
    ------
    InputError
        If there are no rollouts, one is not judged, or the source remembers none.
    """
    if isinstance(source, Tally):
        tally = source
    elif is_rollouts(source):
        tally = _of_rollouts(source)
    elif isinstance(getattr(source, "tally", None), Tally):
        tally = source.tally
    elif getattr(source, "evidence", None) is not None:
        kept = source.evidence
        tally = Tally(kept.prompt_id, kept.category, kept.prefill, kept.outcomes)
    else:
        raise InputError(
            f"{type(source).__name__} remembers no rollouts.",
            cause="Only rollouts, their counts, and a chain estimated from them say how often harm was seen.",
            next="Pass judged Rollouts, count(rolls) or estimate(count(rolls)).",
        )
    if len(tally) == 0 or tally.outcomes.sum() == 0:
        raise InputError("There are no rollouts.", cause="The set is empty.", next="Sample some, or check the filter.")
    return tally


def _of_rollouts(rolls: Any) -> Tally:
    outcome = np.asarray(rolls.outcome).astype(np.int64)
    open_ = outcome == NOT_JUDGED
    if open_.any():
        raise InputError(
            f"{int(open_.sum())} of {len(outcome)} rollouts are not judged.",
            cause="A rate of harm needs the outcome of every rollout.",
            next='Call judge(rolls, "lexicon") first.',
        )
    weight = np.asarray(rolls.columns.get("weight", np.ones(len(outcome))), dtype=np.float64)
    prompts, p = np.unique(np.asarray(rolls.prompt_id), return_inverse=True)
    names, c = np.unique(np.asarray(rolls.category, dtype=str), return_inverse=True)
    prefill = np.asarray(rolls.prefill).astype(np.int64)
    (p, c, prefill), (outcomes,) = collect(
        [p.reshape(-1), c.reshape(-1), prefill], [np.eye(len(OUTCOMES))[outcome] * weight[:, None]]
    )
    return Tally(prompts[p], names[c], prefill, outcomes)


def cell(tally: Tally, prefill: int, category: str | None = None) -> Cell:
    """Harm by prompt at one depth, over all categories or in one.

    Parameters
    ----------
    tally : Tally
    prefill : int
        Number of forced tokens.
    category : str, optional
        None adds over the categories.

    Returns
    -------
    Cell
        Without prompts where nothing was measured.
    """
    rows = tally.prefill == prefill
    if category is not None:
        rows &= tally.category == category
    rows &= tally.outcomes.sum(axis=1) > 0
    prompts, p = np.unique(tally.prompt_id[rows], return_inverse=True)
    _, (sums,) = collect([p.reshape(-1)], [tally.outcomes[rows]])
    return Cell(prompts, sums[:, CODES["harm"]], sums.sum(axis=1), sums[:, CODES["truncated"]])
