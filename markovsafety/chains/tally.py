"""Raw rollouts by prompt and outcome, and the sums over groups that counting is made of."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import InputError
from ..outcomes import CODES, OUTCOMES
from .checks import freeze

__all__ = ["Tally", "collect"]


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
        (_, _), (sums,) = collect([_codes(self.prompt_id[rows]), _codes(self.category[rows])], [self.outcomes[rows]])
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
