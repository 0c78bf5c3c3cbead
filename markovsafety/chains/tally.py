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
from .checks import freeze, index_dtype

__all__ = ["NO_ORDER", "Evidence", "Tally", "collect", "dense_codes", "runs_of", "sorted_by", "sums_of"]

SMALL = 1 << 15  # rows up to which numpy sorts; loading compiled code would cost more
NO_ORDER = np.zeros(0, dtype=np.int64)


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

    Examples
    --------
    >>> from markovsafety.bound import clustered
    >>> asked = {"prompt_id": [0, 0, 1, 1], "outcome": ["harm", "refusal", "refusal", "refusal"]}
    >>> tally = ms.count(ms.Rollouts.of([[9], [2], [2], [2]], **asked, hit=0)).tally
    >>> tally
    <Tally 4 rollouts (1 harm + 3 refusal + 0 benign + 0 truncated) in 2 groups, prefill 0>
    >>> events, totals = tally.clusters("harm")
    >>> print(clustered(events, totals, name="P(harm)"))
    P(harm) = 0.25   95 % [0.000217, 0.939]
        because: sampling 0.47; judge, lumping, model, truncation, rounding not assessed
    """

    prompt_id: NDArray
    category: NDArray
    prefill: NDArray
    outcomes: NDArray

    def __post_init__(self):
        kinds = {"prompt_id": np.int64, "category": str, "prefill": np.int64, "outcomes": np.float64}
        for name, kind in kinds.items():
            object.__setattr__(self, name, freeze(np.array(getattr(self, name), dtype=kind)))
        if not ((self.outcomes >= 0) & (self.outcomes < np.inf)).all():
            raise InputError(
                "The rollouts of an outcome are negative or not finite.",
                cause="They are counted, or weighed by numbers >= 0.",
                next="Correct the weights, or count again.",
            )

    def __len__(self) -> int:
        return len(self.prompt_id)

    def __repr__(self) -> str:
        return f"<Tally {self.told} in {len(self)} groups, prefill {', '.join(map(str, np.unique(self.prefill)))}>"

    @property
    def told(self) -> str:
        """Number of rollouts and what they ended in, in words."""
        ended = " + ".join(f"{n:g} {name}" for n, name in zip(self.outcomes.sum(axis=0), OUTCOMES))
        return f"{self.outcomes.sum():g} rollouts ({ended})"

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
    prior : float
        Pseudo-transitions that the estimate added to every row, 0 without smoothing; they bias rare outcomes upwards.

    Examples
    --------
    >>> asked = {"prompt_id": [0, 0, 1, 1], "outcome": ["harm", "refusal", "refusal", "refusal"]}
    >>> rolls = ms.Rollouts.of([[5, 9], [7, 2], [7, 2], [7, 2]], **asked, hit=1)
    >>> chain = ms.estimate(ms.count(rolls, states=ms.KGram(1)))
    >>> chain.evidence
    <Evidence of 7 states: 4 rollouts (1 harm + 3 refusal + 0 benign + 0 truncated) in 2 groups>
    >>> for state, n in zip(chain.states, chain.evidence.visits[:3]):
    ...     print(state, n)
    (-1,) 4.0
    (5,) 1.0
    (7,) 3.0
    """

    visits: NDArray
    prompt_id: NDArray
    category: NDArray
    prefill: NDArray
    outcomes: NDArray
    through: Any = None
    prompts: Any = None
    deff: Any = None
    prior: float = 0.0

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
        object.__setattr__(self, "prior", float(self.prior))
        if not 0 <= self.prior < np.inf:
            raise InputError(
                f"The evidence has the prior {self.prior}.",
                cause="It is a number of pseudo-transitions.",
                next="Leave it out, or estimate the chain again.",
            )
        shapes = {"through": (n,), "prompts": (n, 1 + len(OUTCOMES)), "deff": (n, len(OUTCOMES))}
        for name, shape in shapes.items():
            if getattr(self, name).shape != shape or not (getattr(self, name) >= 0).all():
                raise InputError(
                    f"The evidence has {name} of shape {getattr(self, name).shape}.",
                    cause=f"For {n} states it is a non-negative array of shape {shape}.",
                    next="Leave it out, or estimate the chain again.",
                )

    def __repr__(self) -> str:
        return f"<Evidence of {len(self.visits)} states: {self.tally.told} in {len(self.prefill)} groups>"

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
            The effective size of `markovsafety.bound.clustered` with the prompts as clusters, as if each sent equally
            many rollouts through the state; at most the distinct rollouts through it. Where the variance between
            prompts cannot be seen (no such rollout, no other, a single prompt): the number of prompts. If all rollouts
            answer one prompt, they are the trials.
        """
        if self.one_prompt:
            return self.through
        prompts = np.minimum(self.prompts[:, 0], self.through)
        if code is None:
            return prompts
        deff = self.deff[:, code]
        # Prompts with another outcome are at least as many as those with the commonest other one.
        seen = np.minimum(self.prompts[:, 1 + code], np.delete(self.prompts[:, 1:], code, axis=1).max(axis=1))
        return np.where(deff > 0, effective_size(self.through, prompts, deff, level, seen), prompts)


def _codes(column: NDArray) -> NDArray:
    if column.dtype.kind in "iu" and column.min(initial=0) >= 0:
        return dense_codes([column], len(column))[0]
    return np.unique(column, return_inverse=True)[1].reshape(-1)


def sorted_by(keys: NDArray, bits: int, order: NDArray | None = None) -> tuple[NDArray, NDArray]:
    """Keys in [0, 2**bits) in rising order, and where each of them came from; equal ones keep their order.

    With `NO_ORDER`, only the keys are sorted.
    """
    wanted = order is None
    if len(keys) < SMALL:
        if not wanted:
            return np.sort(keys), NO_ORDER
        order = np.argsort(keys, kind="stable")
        return keys[order], order
    from . import counting_kernels as kernels  # compiled code is loaded where it pays

    number = index_dtype(len(keys))
    order = np.arange(len(keys), dtype=number) if wanted else np.empty(0, dtype=number)
    keys = np.array(keys, dtype=np.int64)
    spare = np.empty_like(keys), np.empty_like(order)
    return spare if kernels.radix(keys, order, *spare, bits) else (keys, order)


def runs_of(keys: NDArray) -> NDArray:
    """Where each run of equal sorted keys begins."""
    return np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1]])[: len(keys)])


def dense_codes(columns: Sequence[NDArray], m: int) -> tuple[NDArray, NDArray]:
    """Rank of every row among the distinct rows in lexicographic order, and one row of each rank: its first.

    Parameters
    ----------
    columns : int arrays, each of shape (m,)
        Non-negative.
    m : int
        Number of rows.

    Returns
    -------
    codes : int array, shape (m,)
    first : int array, shape (distinct rows,)
    """
    packed, span = _packed(columns, m)
    keys, order = sorted_by(packed, (span - 1).bit_length())
    begins = runs_of(keys)
    codes = np.empty(m, dtype=np.int64)
    codes[order] = np.repeat(np.arange(len(begins)), np.diff(begins, append=m))
    return codes, order[begins]


def _packed(columns: Sequence[NDArray], m: int) -> tuple[NDArray, int]:
    """One number for every row, in lexicographic order of the rows, and a bound above all of them."""
    packed, span = np.zeros(m, dtype=np.int64), 1
    for column in columns:
        base = int(column.max(initial=0)) + 1
        if span * base >= 2**63:  # make the numbers dense before they overflow
            packed = dense_codes([packed], m)[0]
            span = int(packed.max(initial=0)) + 1
        packed, span = packed * base + column, span * base
    return packed, span


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
        Distinct keys in lexicographic order, and the sums, added in the order given.
    """
    packed, span = _packed(keys, len(keys[0]))
    if (packed[1:] > packed[:-1]).all():
        return [key.view() for key in keys], [np.asarray(v, dtype=np.float64).view() for v in values]
    found, order = sorted_by(packed, (span - 1).bit_length())
    first = runs_of(found)
    columns = lambda v: sums_of(v, order, first) if v.ndim == 1 else np.stack([columns(c) for c in v.T], axis=1)  # noqa: E731
    where = order[first]
    return [key[where] for key in keys], [columns(v) for v in values]


def sums_of(values: NDArray, order: NDArray, first: NDArray) -> NDArray[np.float64]:
    """Sums over runs, in the order of the data from 0.0 on: the same numbers either way."""
    if len(order) < SMALL:
        codes = np.repeat(np.arange(len(first)), np.diff(first, append=len(order)))
        return np.bincount(codes, values[order], len(first)).astype(np.float64)
    from . import counting_kernels as kernels

    sums = np.empty(len(first))
    kernels.sum_runs(freeze(np.ascontiguousarray(values, dtype=np.float64).view()), order, first, sums)
    return sums
