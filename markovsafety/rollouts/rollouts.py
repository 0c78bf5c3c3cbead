"""Rollouts: what language models said, as token ids, with who was asked, what was forced, and what it came to.

One rollout is one answer: the forced prefill, then the sampled tokens, the end-of-sequence token included, the prompt
excluded. Many rollouts are stored flat (all token ids in one array, with offsets), so that a million of them are a
handful of arrays. Text is derived and never tokenised again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..errors import InputError
from ..outcomes import NOT_JUDGED, OUTCOMES
from ..rich import few, short, shown
from .checks import check_offsets, check_rollouts, codes_of

__all__ = ["ACTIVATION", "ALIGNED", "MASS", "SCALARS", "Ragged", "Rollouts", "is_aligned"]

ALIGNED = ("logprob", "logprob_processed")
FLAT: dict[str, type] = {"tokens": np.int32, "offsets": np.int64}
PER_ROLLOUT: dict[str, type] = {
    "prompt_id": np.int64,
    "category": object,
    "prefill": np.int32,
    "outcome": np.int8,
    "hit": np.int32,
}
SCALARS: dict[str, type] = {"weight": np.float64, "seed": np.int64, "text": object, "raw": object}
MASS = "mass_"
ACTIVATION = "activation_"


def is_aligned(name: str) -> bool:
    """Whether the optional column `name` holds one number per token."""
    return name in ALIGNED or any(name.startswith(kind) and len(name) > len(kind) for kind in (MASS, ACTIVATION))


def _frozen(column: str, values: Any, dtype: Any) -> np.ndarray:
    """A read-only view of `values` as `dtype`; what does not fit is refused, never wrapped or cut."""
    try:
        array = np.asarray(values, dtype=object if dtype is object else None)
    except ValueError as error:  # a list among numbers
        raise InputError(
            f"column {column} does not hold one value per entry", cause=str(error), next="give one number per entry"
        ) from error
    if array.ndim != 1:
        raise InputError(f"column {column} has shape {array.shape}", cause="every column is flat", next="use Ragged.of")
    if np.issubdtype(dtype, np.integer) and array.size:
        limit = np.iinfo(np.zeros(0, dtype).dtype)
        if array.dtype.kind not in "biu" or array.min() < limit.min or array.max() > limit.max:
            raise InputError(
                f"column {column} does not fit {dtype.__name__}",
                cause=f"its values are {array.dtype}, or beyond [{limit.min}, {limit.max}]",
                next="give token ids, prefill and hit as int32, prompt_id and seed as int64",
            )
    elif np.issubdtype(dtype, np.floating) and array.size and array.dtype.kind not in "biuf":
        raise InputError(
            f"column {column} holds {array.dtype}, not numbers",
            cause="the column is kept as floating-point numbers",
            next="give one number per entry",
        )
    array = array.astype(dtype, copy=False).view()
    array.flags.writeable = False
    return array


def _gather(offsets: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Positions in the flat array of the given rows, and their new offsets."""
    lengths = np.diff(offsets)[rows]
    new = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    positions = np.repeat(offsets[:-1][rows] - new[:-1], lengths) + np.arange(new[-1])
    return positions, new


@dataclass(frozen=True, eq=False)
class Ragged:
    """Rows of different lengths in one flat array.

    Parameters
    ----------
    flat : array, shape (total,)
        The rows, one after another.
    offsets : int64 array, shape (n + 1,)
        Row i is ``flat[offsets[i]:offsets[i + 1]]``.

    Raises
    ------
    InputError
        If the offsets do not start at 0, fall, or end elsewhere than at the end of `flat`.

    Examples
    --------
    >>> rows = ms.rollouts.Ragged.of([[5, 9], [], [7]])
    >>> rows.flat, rows.offsets
    (array([5, 9, 7], dtype=int32), array([0, 2, 2, 3]))
    >>> rows[0], len(rows)
    (array([5, 9], dtype=int32), 3)
    """

    flat: np.ndarray
    offsets: np.ndarray

    def __post_init__(self) -> None:
        flat = np.asarray(self.flat)
        object.__setattr__(self, "flat", _frozen("flat", flat, flat.dtype))
        object.__setattr__(self, "offsets", _frozen("offsets", self.offsets, np.int64))
        check_offsets(self.offsets, len(self.flat))

    @classmethod
    def of(cls, rows: Sequence[Any], dtype: Any = np.int32) -> Ragged:
        """Join a list of sequences."""
        arrays = [np.asarray(row, dtype=dtype) for row in rows]
        offsets = np.concatenate([[0], np.cumsum([len(a) for a in arrays])]).astype(np.int64)
        return cls(np.concatenate([np.empty(0, dtype), *arrays]), offsets)

    @classmethod
    def concat(cls, parts: Sequence[Ragged]) -> Ragged:
        """The rows of the first, then those of the second, and so on."""
        ends = np.cumsum([0, *(len(p.flat) for p in parts)])
        offsets = np.concatenate([[0], *(p.offsets[1:] + end for p, end in zip(parts, ends))]).astype(np.int64)
        return cls(np.concatenate([p.flat for p in parts]) if parts else np.empty(0, np.int32), offsets)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, row: int) -> np.ndarray:
        n = len(self)
        if not -n <= row < n:
            raise IndexError(f"row {row} of {n}")
        row %= n
        return self.flat[self.offsets[row] : self.offsets[row + 1]]

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self.flat[a:b] for a, b in zip(self.offsets[:-1].tolist(), self.offsets[1:].tolist()))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Ragged):
            return NotImplemented
        return np.array_equal(self.offsets, other.offsets) and np.array_equal(self.flat, other.flat)

    __hash__ = None  # type: ignore[assignment]

    def take(self, rows: np.ndarray) -> Ragged:
        """The given rows, in that order."""
        positions, offsets = _gather(self.offsets, rows)
        return Ragged(self.flat[positions], offsets)


@dataclass(frozen=True, eq=False, repr=False)
class Rollouts:
    """Answers of language models as token ids.

    Parameters
    ----------
    tokens : int32 array, shape (total,)
        Token ids of all answers, one after another: forced prefill, then sampled, end of sequence included.
    offsets : int64 array, shape (n + 1,)
        Answer i is ``tokens[offsets[i]:offsets[i + 1]]``.
    prompt_id : int64 array, shape (n,)
        Which prompt was asked; the cluster of every interval.
    category : array of str, shape (n,)
        Category of the prompt.
    prefill : int32 array, shape (n,)
        Number of forced tokens at the start of the answer.
    outcome : int8 array, shape (n,)
        Index into ``OUTCOMES``; -1 = not judged.
    hit : int32 array, shape (n,)
        Index within the answer of the token at which the outcome was first hit, never a forced one; -1 = none
        (truncated or not judged).
    columns : dict
        Optional columns. ``prompt_tokens``: `Ragged`. ``logprob`` (of the model itself, in nats),
        ``logprob_processed`` (after temperature and top-p), ``mass_<class>`` (probability of a class of tokens before
        each token, in the distribution it was drawn from): float32, shape (total,), nan at forced tokens.
        ``activation_<direction>`` (projection on a direction of the activation at the position that predicts the token;
        entry 0 of an answer belongs to the last prompt token): likewise, nan where it is not known. ``weight``:
        float64, ``seed``: int64, ``text`` and ``raw`` (what the judge said): str or None, shape (n,).
    provenance : dict
        How the rollouts came about; anything JSON can hold.

    Raises
    ------
    InputError
        If the columns do not fit each other; the message names the column and its first bad row, counted from 0.

    Notes
    -----
    The arrays are read-only. ``==`` compares the data, not the provenance.

    Examples
    --------
    >>> asked = {"prompt_id": [0, 0, 1], "category": ["bio", "bio", "fraud"], "prefill": [1, 0, 1]}
    >>> said = [[5, 9, 2], [7, 2], [5, 6, 2]]
    >>> rolls = ms.Rollouts.of(said, **asked, outcome=["harm", "refusal", "benign"], hit=[1, 0, 2])
    >>> rolls
    Rollouts(3 of 2 prompts, prefill 0, 1: 1 harm, 1 refusal, 1 benign)
    >>> rolls[rolls.category == "bio"]
    Rollouts(2 of 1 prompts, prefill 0, 1: 1 harm, 1 refusal)
    >>> rolls.answer(0), rolls.lengths
    (array([5, 9, 2], dtype=int32), array([3, 2, 3]))
    """

    tokens: np.ndarray
    offsets: np.ndarray
    prompt_id: np.ndarray
    category: np.ndarray
    prefill: np.ndarray
    outcome: np.ndarray
    hit: np.ndarray
    columns: dict[str, Any] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, dtype in (FLAT | PER_ROLLOUT).items():
            object.__setattr__(self, name, _frozen(name, getattr(self, name), dtype))
        object.__setattr__(self, "columns", {k: _column(k, v) for k, v in self.columns.items()})
        object.__setattr__(self, "provenance", dict(self.provenance))
        check_rollouts(self)

    @classmethod
    def of(
        cls,
        answers: Sequence[Any],
        *,
        prompt_id: Any,
        category: Any = "all",
        prefill: Any = 0,
        outcome: Any = NOT_JUDGED,
        hit: Any = -1,
        columns: dict[str, Any] | None = None,
        provenance: dict[str, Any] | None = None,
    ) -> Rollouts:
        """Build from a list of token id sequences; scalars are repeated for every answer.

        An outcome is a code or its name; None is not judged.
        """
        rows, n = Ragged.of(answers), len(answers)

        def full(values: Any, dtype: Any) -> np.ndarray:
            values = np.asarray(values, dtype=object if dtype is object else None)
            return np.full(n, values[()], values.dtype) if values.ndim == 0 else values

        cells = [full(v, d) for v, d in ((prompt_id, np.int64), (category, object), (prefill, np.int32))]
        judged = [full(codes_of(outcome), np.int8), full(hit, np.int32)]
        fixed = dict(zip(PER_ROLLOUT, [*cells, *judged]))
        return cls(rows.flat, rows.offsets, **fixed, columns=columns or {}, provenance=provenance or {})

    def __len__(self) -> int:
        return len(self.prompt_id)

    def __getitem__(self, which: int | slice | np.ndarray | Sequence[Any]) -> Rollouts:
        """Rollouts of a row, a slice, a boolean mask or an array of rows."""
        rows = np.arange(len(self))[which if isinstance(which, int | slice) else _index(which, len(self))]
        rows = np.atleast_1d(rows)
        positions, offsets = _gather(self.offsets, rows)
        columns: dict[str, Any] = {}
        for name, value in self.columns.items():
            if isinstance(value, Ragged):
                columns[name] = value.take(rows)
            else:
                columns[name] = value[positions if is_aligned(name) else rows]
        fixed = {name: getattr(self, name)[rows] for name in PER_ROLLOUT}
        return Rollouts(self.tokens[positions], offsets, **fixed, columns=columns, provenance=self.provenance)

    def __iter__(self) -> Iterator[Rollouts]:
        return (self[i] for i in range(len(self)))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Rollouts):
            return NotImplemented
        return (
            all(np.array_equal(getattr(self, name), getattr(other, name)) for name in (*FLAT, *PER_ROLLOUT))
            and self.columns.keys() == other.columns.keys()
            and all(_same(value, other.columns[name]) for name, value in self.columns.items())
        )

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        seen = [(int((self.outcome == code).sum()), name) for code, name in enumerate(OUTCOMES)]
        seen.append((int((self.outcome == NOT_JUDGED).sum()), "not judged"))
        depths = ", ".join(str(k) for k in np.unique(self.prefill))
        text = ", ".join(f"{count} {name}" for count, name in seen if count) or "empty"
        return f"Rollouts({len(self)} of {len(np.unique(self.prompt_id))} prompts, prefill {depths or '-'}: {text})"

    def _repr_html_(self) -> str:
        """What a notebook shows: answers by forced tokens and outcome, and the beginning of the first one."""
        depths = np.unique(self.prefill)
        which, more = few(len(depths))
        codes = [*range(len(OUTCOMES)), *([NOT_JUDGED] if (self.outcome == NOT_JUDGED).any() else [])]
        names = [OUTCOMES[c] if c != NOT_JUDGED else "not judged" for c in codes]
        rows = []
        for k in depths[: len(which)].tolist():
            seen = self.outcome[self.prefill == k]
            rows.append((k, *(f"{int((seen == c).sum()):,}" for c in codes)))
        title = f"Rollouts: {len(self):,} answers to {len(np.unique(self.prompt_id)):,} prompts"
        first = ""
        if len(self):
            text = self.columns["text"][0] if "text" in self.columns else None
            ids = self.tokens[self.offsets[0] : min(self.offsets[1], self.offsets[0] + 20)]
            said = (
                short(text[:200], 120) if isinstance(text, str) else "token ids " + short(" ".join(map(str, ids)), 120)
            )
            first = f"the first answer: {said}"
        return shown(title, rows, head=["forced tokens", *names], notes=[more, first])

    @property
    def lengths(self) -> np.ndarray:
        """Number of tokens of each answer, forced ones included, shape (n,)."""
        return np.diff(self.offsets)

    @property
    def weight(self) -> np.ndarray:
        """Weight of each rollout, shape (n,); 1 where none was given."""
        return self.columns.get("weight", np.ones(len(self)))

    @property
    def masses(self) -> dict[str, np.ndarray]:
        """Recorded probability masses by class name, each of shape (total,)."""
        return {name[len(MASS) :]: value for name, value in self.columns.items() if name.startswith(MASS)}

    @property
    def activations(self) -> dict[str, np.ndarray]:
        """Recorded projections of activations by direction, each of shape (total,)."""
        return {name[len(ACTIVATION) :]: value for name, value in self.columns.items() if name.startswith(ACTIVATION)}

    @property
    def text(self) -> np.ndarray:
        """Answers as text, shape (n,); derived, for reading only.

        Raises
        ------
        InputError
            If no text was kept.
        """
        if "text" not in self.columns:
            raise InputError(
                "no text was kept with these rollouts",
                cause="answers are kept as token ids, and text is derived from them",
                next="rolls = rolls.decode(template)",
            )
        return self.columns["text"]

    def answer(self, row: int) -> np.ndarray:
        """Token ids of one answer, forced ones included."""
        return Ragged(self.tokens, self.offsets)[row]

    def answers(self) -> Iterator[np.ndarray]:
        """Token ids of every answer in turn."""
        return iter(Ragged(self.tokens, self.offsets))

    def values(self, name: str, row: int) -> np.ndarray:
        """One answer's share of a column that holds a number per token."""
        if name not in self.columns or not is_aligned(name):
            raise InputError(
                f"no column {name!r} with a number per token",
                cause=f"there are {sorted(self.columns)}",
                next="use one of those that begin with logprob, mass_ or activation_",
            )
        return Ragged(self.columns[name], self.offsets)[row]

    def decode(self, template: Any) -> Rollouts:
        """With a column ``text``, by ``template.decode(ids)``."""
        return self.replace(columns={**self.columns, "text": [str(template.decode(ids)) for ids in self.answers()]})

    def replace(self, **changes: Any) -> Rollouts:
        """A copy with other columns or another provenance."""
        return dataclasses.replace(self, **changes)

    @staticmethod
    def concat(parts: Sequence[Rollouts]) -> Rollouts:
        """One after another.

        Optional columns that every part has are kept (a missing weight counts as 1); the names of dropped ones stand
        in ``provenance["dropped_columns"]``. Provenances that differ are listed in ``provenance["parts"]``.
        """
        parts = list(parts)
        if not parts:
            return Rollouts.of([], prompt_id=[])
        names = {name for part in parts for name in part.columns}
        kept = [name for name in sorted(names) if name == "weight" or all(name in part.columns for part in parts)]
        columns: dict[str, Any] = {}
        for name in kept:
            values: list[Any] = [part.weight if name == "weight" else part.columns[name] for part in parts]
            columns[name] = Ragged.concat(values) if name == "prompt_tokens" else np.concatenate(values)
        provenances = [part.provenance for part in parts]
        distinct = [p for i, p in enumerate(provenances) if p not in provenances[:i]]
        provenance: dict[str, Any] = dict(distinct[0]) if len(distinct) == 1 else {"parts": distinct}
        if len(kept) < len(names):
            provenance["dropped_columns"] = sorted(names - set(kept))
        rows = Ragged.concat([Ragged(part.tokens, part.offsets) for part in parts])
        joined = {name: np.concatenate([getattr(part, name) for part in parts]) for name in PER_ROLLOUT}
        return Rollouts(rows.flat, rows.offsets, **joined, columns=columns, provenance=provenance)


def _index(which: Any, n: int) -> np.ndarray:
    which = np.asarray(which)
    if which.dtype == bool and which.shape != (n,):
        raise InputError(
            f"a mask of shape {which.shape} for {n} rollouts",
            cause="a mask says yes or no to every rollout",
            next="give one entry per rollout",
        )
    if which.size == 0:
        return which.astype(bool if which.dtype == bool else np.int64)
    if which.ndim > 1 or which.dtype.kind not in "biu":
        raise InputError(
            "rollouts are chosen by a row, a slice, a mask or an array of rows",
            cause=f"got {which.dtype}",
            next="give for instance rolls[0], rolls[:10] or rolls[rolls.prefill == 0]",
        )
    return which


def _column(name: str, value: Any) -> Any:
    if name == "prompt_tokens":
        rows = value if isinstance(value, Ragged) else Ragged.of(value)
        return Ragged(rows.flat.astype(np.int32, copy=False), rows.offsets)
    if is_aligned(name):
        return _frozen(name, value, np.float32)
    if name not in SCALARS:
        raise InputError(
            f"unknown column {name!r}",
            cause=f"optional columns are prompt_tokens, {', '.join(ALIGNED)}, mass_<class>, activation_<direction>, "
            + ", ".join(SCALARS),
            next="drop or rename it",
        )
    if SCALARS[name] is object:
        array = np.empty(len(value), dtype=object)
        array[:] = list(value)
        return _frozen(name, array, object)
    return _frozen(name, value, SCALARS[name])


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Ragged) or isinstance(b, Ragged):
        return a == b
    return np.array_equal(a, b, equal_nan=a.dtype.kind == "f")
