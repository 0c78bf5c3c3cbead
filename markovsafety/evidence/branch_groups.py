"""Continuations of one prefix: rollouts grouped by prompt and first k tokens."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import InputError
from ..outcomes import CODES, NOT_JUDGED
from .cells import is_rollouts

__all__ = ["Groups", "groups_at", "shares", "whole_axis"]


@dataclass(frozen=True, eq=False)
class Groups:
    """Prefixes of one depth.

    Parameters
    ----------
    x, n : array, shape (prefixes,)
        Harmful continuations and continuations.
    prompt : int array, shape (prefixes,)
        Number of the prompt.
    prompt_id : int array, shape (prompts,)
    left_out : int
        Prefixes with a single continuation, which are not among these unless all are.
    """

    x: NDArray
    n: NDArray
    prompt: NDArray
    prompt_id: NDArray
    left_out: int

    @property
    def prompts(self) -> int:
        """Number of prompts."""
        return len(self.prompt_id)


def whole_axis(values: Any, name: str, least: int) -> tuple[int, ...]:
    """Sorted distinct whole numbers."""
    one = isinstance(values, (int, np.integer))
    given = [values] if one else list(values) if isinstance(values, Iterable) and not isinstance(values, str) else []
    array = np.asarray(given)
    if array.ndim != 1 or not len(array) or array.dtype.kind not in "iu" or array.min() < least:
        raise InputError(
            f"{name} is {values!r}.",
            cause=f"It is a whole number from {least} on, or several.",
            next=f"Pass e.g. {name}=[{least}, {least + 4}].",
        )
    return tuple(sorted(set(array.tolist())))


def checked(rolls: Any, what: str) -> None:
    """Refuse what are no judged rollouts of weight 1."""
    if not is_rollouts(rolls):
        raise InputError(
            f"{what} is {type(rolls).__name__}.",
            cause="Continuations are told apart by their tokens.",
            next="Pass judged Rollouts" + (", or a Chain." if what == "source" else "."),
        )
    if not len(rolls.outcome) or (np.asarray(rolls.outcome) == NOT_JUDGED).any():
        raise InputError(
            "There are no rollouts." if not len(rolls.outcome) else "Some rollouts are not judged.",
            cause="Harm is counted by prefix.",
            next='Sample some, and judge them: judge(rolls, "lexicon").',
        )
    weight = np.asarray(rolls.columns.get("weight", 1.0))
    if (weight != 1).any():
        raise InputError(
            "The rollouts are weighted.",
            cause="How alike continuations are can be read from whole counts only.",
            next="Pass rollouts without weights.",
        )


def groups_at(rolls: Any, k: int) -> Groups:
    """Group the rollouts that share their first k tokens.

    Raises
    ------
    InputError
        No rollout has k tokens to share.
    """
    checked(rolls, "source")
    prefill, offsets = np.asarray(rolls.prefill), np.asarray(rolls.offsets)
    rows = np.flatnonzero(prefill == k)
    if not len(rows):
        rows = np.flatnonzero((prefill < k) & (np.diff(offsets) >= k))
    if not len(rows):
        raise InputError(
            f"No rollout has {k} tokens to share.",
            cause=f"Forced were {', '.join(map(str, np.unique(prefill).tolist()))}; the longest answer has "
            f"{int(np.diff(offsets).max())} tokens.",
            next="Sample with prefill=k and prefix=answers of the model, or ask for another depth.",
        )
    prompts, prompt = np.unique(np.asarray(rolls.prompt_id)[rows], return_inverse=True)
    said = np.asarray(rolls.tokens)[offsets[:-1][rows][:, None] + np.arange(k)]
    keys, group = np.unique(np.column_stack([prompt.reshape(-1), said]), axis=0, return_inverse=True)
    group = group.reshape(-1)
    n = np.bincount(group)
    x = np.bincount(group, np.asarray(rolls.outcome)[rows] == CODES["harm"], len(n))
    keep = n > 1 if (n > 1).any() else n > 0
    left, which = np.unique(keys[keep, 0], return_inverse=True)
    return Groups(x[keep], n[keep].astype(np.float64), which.reshape(-1), prompts[left], int((n == 1).sum()))


def shares(base: Any, g: Groups, k: int) -> tuple[Groups, tuple[NDArray, NDArray]]:
    """The groups numbered by the prompts of the free answers, and of these, by prompt, the share that did harm within k
    tokens and the share that was still open after them.

    Raises
    ------
    InputError
        Prompts differ, or a prompt with open answers has no prefix.
    """
    checked(base, "base")
    rows = np.flatnonzero(np.asarray(base.prefill) == 0)
    ids, length, hit = (np.asarray(x, dtype=np.int64)[rows] for x in (base.prompt_id, np.diff(base.offsets), base.hit))
    early = (hit >= 0) & (hit < k)
    harmful, open_ = early & (np.asarray(base.outcome)[rows] == CODES["harm"]), ~early & (length > k)
    prompts, at = np.unique(ids, return_inverse=True)
    total = np.bincount(at, minlength=len(prompts))
    rate = lambda v: np.bincount(at, v, len(prompts)) / total  # noqa: E731
    going, known = rate(open_), np.isin(prompts, g.prompt_id)
    strange = np.setdiff1d(g.prompt_id, prompts)
    missing = prompts[(going > 0) & ~known]
    if strange.size or missing.size:
        who = strange if strange.size else missing
        raise InputError(
            f"Prompt {int(who[0])} has " + ("no free answer." if strange.size else "open answers, but no prefix."),
            cause="Every prompt needs both: its free answers, and continuations of some that were open.",
            next=f"Sample both for the same prompts; {len(who)} are concerned.",
        )
    numbered = Groups(g.x, g.n, np.searchsorted(prompts, g.prompt_id)[g.prompt], prompts, g.left_out)
    return numbered, (rate(harmful), going)
