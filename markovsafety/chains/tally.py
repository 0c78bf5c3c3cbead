"""Raw rollouts by prompt and outcome, and the sums over groups that counting is made of."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..bound import effective_size
from ..errors import InputError
from ..outcomes import CODES, OUTCOMES
from .checks import freeze

__all__ = ["Evidence", "Tally", "collect"]


@dataclass(frozen=True, eq=False)
class Tally:
    """Rollouts by prompt, category, prefill length and outcome; one row per group, sorted.

    Parameters
    ----------
    prompt_id : int array, shape (rows,)
    category : str array, shape (rows,)
    prefill : int array, shape (rows,)
        Number of forced tokens.
    outcomes : array, shape (rows, 4)
        Weighted number of rollouts, in the order of `markovsafety.OUTCOMES`.
    """

    prompt_id: NDArray
    category: NDArray
    prefill: NDArray
    outcomes: NDArray

    def __post_init__(self):
        kinds = {"prompt_id": np.int64, "category": str, "prefill": np.int64, "outcomes": np.float64}
        for name, kind in kinds.items():
            object.__setattr__(self, name, freeze(np.array(getattr(self, name), dtype=kind)))

    def __len__(self) -> int:
        return len(self.prompt_id)

    @property
    def cluster(self) -> NDArray:
        """Number of the prompt (id and category) of every row, shape (rows,)."""
        key = _codes(self.prompt_id) * (len(self) + 1) + _codes(self.category)
        return _codes(key)

    def clusters(self, outcome: str = "harm", prefill: int | None = 0) -> tuple[NDArray, NDArray]:
        """Events and rollouts of every prompt: what `markovsafety.bound.clustered` takes.

        Parameters
        ----------
        outcome : str
        prefill : int or None
            Number of forced tokens; None adds over all of them.

        Returns
        -------
        events, totals : array, shape (prompts,)
            Empty where no rollout has this prefill.
        """
        if outcome not in CODES:
            raise InputError(
                f"Rollouts have no outcome {outcome!r}.",
                cause=f"They end in {', '.join(OUTCOMES)}.",
                next="Use one of these.",
            )
        rows = np.arange(len(self)) if prefill is None else np.flatnonzero(self.prefill == prefill)
        _, (sums,) = collect([self.cluster[rows]], [self.outcomes[rows]])
        return sums[:, CODES[outcome]], sums.sum(axis=1)

    def where(self, categories: Any = None, prefill: Any = None, prompts: Any = None) -> NDArray:
        """Rows that match every given filter (a value or several), as a mask of shape (rows,).

        Raises
        ------
        InputError
            If a value occurs in no row.
        """
        mask = np.ones(len(self), dtype=bool)
        for what, column, wanted in (
            ("category", self.category, categories),
            ("prefill", self.prefill, prefill),
            ("prompt", self.prompt_id, prompts),
        ):
            if wanted is None:
                continue
            values = [wanted] if isinstance(wanted, str) or not isinstance(wanted, Iterable) else list(wanted)
            known = set(column.tolist())
            absent = [v for v in values if v not in known]
            if absent:
                some = ", ".join(repr(v) for v in sorted(known)[:8])
                raise InputError(
                    f"No rollout has the {what} {absent[0]!r}.",
                    cause=f"There are {some}{', ...' if len(known) > 8 else ''}.",
                    next="Correct the filter.",
                )
            mask &= np.isin(column, values)
        return mask


@dataclass(frozen=True, eq=False)
class Evidence:
    """What an estimated chain remembers of the rollouts it came from: enough for sampling intervals.

    Parameters
    ----------
    visits : array, shape (n,)
        Weighted number of times each state of the chain was visited (an outcome state: entered).
    prompt_id, category, prefill : array, shape (rows,)
        One row per prompt, category and prefill length.
    outcomes : array, shape (rows, 4)
        Weighted number of rollouts of that row by outcome, in the order of `markovsafety.OUTCOMES`.
    through : array, shape (n,), optional
        Weighted number of distinct rollouts through each state, whatever their prefill. If only the visits are known:
        as many of them as there are rollouts, at most.
    prompts : array, shape (n, 5), optional
        Number of prompts with a rollout through the state; with one that ended in each outcome. If not known: one for
        every visit, at most all.
    deff : array, shape (n, 4), optional
        Design effect of each outcome among the rollouts through the state (at least 1); 0 where it cannot be seen:
        less than two prompts, no such rollout, or no other.
    """

    visits: NDArray
    prompt_id: NDArray
    category: NDArray
    prefill: NDArray
    outcomes: NDArray
    through: Any = None
    prompts: Any = None
    deff: Any = None

    def __post_init__(self):
        put = lambda name, value: object.__setattr__(self, name, freeze(np.array(value, dtype=np.float64)))  # noqa: E731
        tally = Tally(self.prompt_id, self.category, self.prefill, self.outcomes)
        for name, column in vars(tally).items():
            object.__setattr__(self, name, column)
        put("visits", self.visits)
        n, most = len(self.visits), tally.outcomes.sum()
        put("through", np.minimum(self.visits, most) if self.through is None else self.through)
        if self.prompts is None:
            seen = np.minimum(np.asarray(self.through), len(np.unique(tally.cluster)))
            put("prompts", np.tile(np.floor(seen)[:, None], 1 + len(OUTCOMES)))
        else:
            put("prompts", self.prompts)
        put("deff", np.zeros((n, len(OUTCOMES))) if self.deff is None else self.deff)
        shapes = {"through": (n,), "prompts": (n, 1 + len(OUTCOMES)), "deff": (n, len(OUTCOMES))}
        for name, shape in shapes.items():
            if getattr(self, name).shape != shape or not (getattr(self, name) >= 0).all():
                raise InputError(
                    f"The evidence has {name} of shape {getattr(self, name).shape}.",
                    cause=f"For {n} states it is a non-negative array of shape {shape}.",
                    next="Leave it out, or estimate the chain again.",
                )

    @property
    def tally(self) -> Tally:
        """The rollouts by prompt, category, prefill and outcome."""
        return Tally(self.prompt_id, self.category, self.prefill, self.outcomes)

    @property
    def one_prompt(self) -> bool:
        """Whether all rollouts answer one prompt, so that the variance between prompts cannot be assessed."""
        return len(np.unique(self.tally.cluster)) < 2

    def trials(self, code: int | None = None, level: float = 0.95) -> NDArray[np.float64]:
        """Independent trials that the rollouts through each state are worth, for a probability from there on.

        Parameters
        ----------
        code : int, optional
            The outcome whose probability is asked for; None if it is none that rollouts record.
        level : float
            Confidence level of the interval to be made.

        Returns
        -------
        array, shape (n,)
            Korn and Graubard's effective size with the prompts as clusters (see `markovsafety.bound.clustered`), at
            most the distinct rollouts through the state. Where the variance between prompts cannot be seen (no such
            rollout, no other, a single prompt): the number of prompts. If all rollouts answer one prompt, they are
            the trials.
        """
        if self.one_prompt:
            return self.through
        prompts = np.minimum(self.prompts[:, 0], self.through)
        if code is None:
            return prompts
        deff = self.deff[:, code]
        return np.where(deff > 0, effective_size(self.through, self.prompts[:, 0], deff, level), prompts)


def _codes(column: NDArray) -> NDArray:
    return np.unique(column, return_inverse=True)[1].reshape(-1)


def collect(keys: Sequence[NDArray], values: Sequence[NDArray]) -> tuple[list[NDArray], list[NDArray]]:
    """Sum values over equal keys.

    Parameters
    ----------
    keys : int arrays, each of shape (m,)
        Non-negative.
    values : arrays, each of shape (m,) or (m, c)

    Returns
    -------
    keys, values : lists of arrays
        Distinct keys in lexicographic order, and the sums.
    """
    packed, span, first = np.zeros(len(keys[0]), dtype=np.int64), 1, None
    for key in keys:
        base = int(key.max(initial=0)) + 1
        if span * base >= 2**63:  # make the packed keys dense before they overflow
            packed = _codes(packed)
            span = int(packed.max(initial=0)) + 1
        packed, span = packed * base + key, span * base
    _, first, inverse = np.unique(packed, return_index=True, return_inverse=True)
    size, inverse = len(first), inverse.reshape(-1)
    sums = [
        np.bincount(inverse, v, size) if v.ndim == 1 else np.stack([np.bincount(inverse, c, size) for c in v.T], axis=1)
        for v in values
    ]
    return [key[first] for key in keys], sums
