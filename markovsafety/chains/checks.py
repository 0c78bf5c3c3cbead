"""What must hold of the arrays a chain is made of, and the error that says which entry breaks it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from ..errors import InputError

__all__ = [
    "TOLERANCE",
    "Numbered",
    "as_indices",
    "as_label",
    "as_law",
    "as_outcomes",
    "as_states",
    "freeze",
    "index_dtype",
    "shape_of",
]

TOLERANCE = 1e-9  # how far the sum of a row or a law may be from one

Name = Callable[[int], str]  # how a state is called in an error


def freeze(x: Any) -> Any:
    """Make an array, or the arrays of a CSR matrix, read-only and return it."""
    for array in (x.data, x.indices, x.indptr) if sp.issparse(x) else (x,):
        array.flags.writeable = False
    return x


def index_dtype(*sizes: int) -> np.dtype:
    """int32 if it holds every size, else int64: for row pointers, that is the number of non-zeros."""
    return np.dtype(np.int32 if max(sizes, default=0) < 2**31 else np.int64)


def shape_of(matrix: Any) -> tuple[int, ...]:
    """The shape of a dense or sparse matrix (scipy's types say it may be None)."""
    return tuple(matrix.shape)


@dataclass(frozen=True)
class Numbered(Mapping[Any, int]):
    """Finds the states of ``range(n)``, as a dictionary of them would, without making one."""

    n: int

    def __getitem__(self, label: Any) -> int:
        if isinstance(label, (int, float, np.integer, np.floating)) and 0 <= label < self.n and label == int(label):
            return int(label)
        raise KeyError(label)

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.n))

    def __len__(self) -> int:
        return self.n


def as_states(states: Sequence[Any] | None, n: int) -> Sequence[Any]:
    """Labels of the n states: the given ones, else ``range(n)``."""
    if states is None:
        return range(n)
    if isinstance(states, range) and states == range(n):
        return states
    labels = tuple(x.item() if isinstance(x, np.generic) else x for x in states)
    if len(labels) != n:
        raise InputError(
            f"{len(labels)} labels for {n} states.", cause="`states` names every row.", next="Pass one label per row."
        )
    seen: dict[Any, int] = {}
    for i, label in enumerate(labels):
        try:
            first = seen.setdefault(label, i)
        except TypeError:
            raise InputError(
                f"The label {label!r} of state {i} cannot be looked up.",
                cause="Labels must be hashable.",
                next="Use integers, strings or tuples as labels.",
            ) from None
        if first != i:
            raise InputError(
                f"States {first} and {i} have the same label {label!r}.",
                cause="A label names one state.",
                next="Make the labels distinct.",
            )
    return labels


def as_indices(target: Any, n: int, lookup: Mapping[Any, int], what: str) -> NDArray:
    """Indices (sorted, unique) of an index, a label, a boolean mask of length n, or a collection of indices and labels.

    Integers are always indices; anything else is looked up as a label first.
    """
    if _is_mask(target):
        array = np.asarray(target)
        if array.shape != (n,):
            raise InputError(
                f"{what} is a mask of shape {array.shape}.",
                cause=f"A mask has one entry for each of the {n} states.",
                next=f"Pass a boolean array of shape ({n},), or indices.",
            )
        return np.flatnonzero(array)
    if isinstance(target, (int, np.integer)) and not isinstance(target, (bool, np.bool_)):
        return np.array([_in_range(int(target), n, what)])
    if isinstance(target, str) or _is_label(target, lookup):
        return np.array([as_label(target, lookup, what)])
    if isinstance(target, (list, tuple, set, frozenset, range, np.ndarray)):
        if isinstance(target, range) or (isinstance(target, np.ndarray) and target.dtype.kind in "iu"):
            return _distinct(np.asarray(target).ravel(), n, what)
        items = target.ravel().tolist() if isinstance(target, np.ndarray) else list(target)
        if any(isinstance(x, (list, set, np.ndarray)) for x in items):
            raise _neither(target, what)
        if all(type(x) is int for x in items):
            for edge in (min(items, default=0), max(items, default=0)):
                _in_range(edge, n, what)
            return _distinct(np.array(items, dtype=np.int64), n, what)
        found = [as_indices(x, n, lookup, what) for x in items]
        return np.unique(np.concatenate(found)) if found else np.zeros(0, dtype=np.int64)
    raise _neither(target, what)


def _distinct(items: NDArray, n: int, what: str) -> NDArray:
    """Whole numbers, all of them indices, sorted and without repetitions."""
    if items.size:
        _in_range(int(items.min()), n, what)
        _in_range(int(items.max()), n, what)
    rising = np.sort(items.astype(np.int64))
    return rising[np.append(True, rising[1:] != rising[:-1])[: len(rising)]]


def _is_mask(x: Any) -> bool:
    if isinstance(x, list):
        return bool(x) and all(isinstance(v, (bool, np.bool_)) for v in x)
    return isinstance(x, np.ndarray) and x.dtype == bool


def _is_label(x: Any, lookup: Mapping[Any, int]) -> bool:
    try:
        return not isinstance(x, (bool, np.bool_, range)) and x in lookup
    except (TypeError, ValueError):
        return False


def _in_range(i: int, n: int, what: str) -> int:
    if not 0 <= i < n:
        raise InputError(
            f"{what} names the state {i}.", cause=f"The chain has the states 0 to {n - 1}.", next="Correct the index."
        )
    return i


def as_label(x: Any, lookup: Mapping[Any, int], what: str) -> int:
    """Index of the state with the label x, integers included."""
    if not _is_label(x, lookup):
        some = ", ".join(repr(k) for k, _ in zip(lookup, range(5)))
        raise InputError(
            f"{what} names {x!r}, which is no state of this chain.",
            cause=f"Labels are {some}{', ...' if len(lookup) > 5 else ''}.",
            next="Use one of the labels, or an index.",
        )
    return lookup[x]


def _neither(target: Any, what: str) -> InputError:
    return InputError(
        f"{what} is {target!r}.",
        cause="States are named by index, label, boolean mask, or a flat collection of indices and labels.",
        next="Pass one of these.",
    )


def as_outcomes(outcomes: Any, n: int, lookup: Mapping[Any, int], name: Name) -> dict[str, NDArray]:
    """Named, disjoint sets of outcome states, as read-only sorted index arrays."""
    if not isinstance(outcomes, Mapping) or not outcomes:
        raise InputError(
            f"outcomes is {outcomes!r}.",
            cause="A chain needs at least one named outcome.",
            next='Pass a dict, e.g. outcomes={"harm": 3, "refusal": [4, 5]}.',
        )
    owner = np.full(n, -1)
    result: dict[str, NDArray] = {}
    for number, (key, where) in enumerate(outcomes.items()):
        if not isinstance(key, str) or not key:
            raise InputError(f"An outcome is named {key!r}.", cause="Outcome names are text.", next="Rename it.")
        index = as_indices(where, n, lookup, f"outcome {key!r}")
        taken = index[owner[index] >= 0]
        if taken.size:
            other = list(result)[owner[taken[0]]]
            raise InputError(
                f"{name(int(taken[0]))} belongs to the outcomes {other!r} and {key!r}.",
                cause="Outcomes are disjoint: a rollout ends in one of them.",
                next="Give the state to one outcome.",
            )
        owner[index] = number
        result[key] = freeze(index.astype(np.int64))
    for key, index in result.items():
        if key in lookup and lookup[key] not in index:
            raise InputError(
                f"The label {key!r} names {name(lookup[key])}, which is not in the outcome {key!r}.",
                cause="A target of that name would be ambiguous.",
                next="Rename the state or the outcome.",
            )
    return result


def as_law(law: Any, n: int, lookup: Mapping[Any, int], name: Name, what: str) -> NDArray | None:
    """A probability law over the states (n,), from an index, a label or a law; None stays None."""
    if law is None:
        return None
    if isinstance(law, (int, np.integer, str)) or _is_label(law, lookup):
        result = np.zeros(n)
        result[as_indices(law, n, lookup, what)] = 1.0
        return freeze(result)
    if np.iscomplexobj(law):
        raise _neither(law, what)
    try:
        result = np.array(law, dtype=np.float64)
    except (TypeError, ValueError):
        raise _neither(law, what) from None
    if result.shape != (n,):
        raise InputError(
            f"{what} has shape {result.shape}.",
            cause=f"A law has one probability for each of the {n} states.",
            next="Pass an index, a label, or an array with one entry per state.",
        )
    wrong = np.flatnonzero(~np.isfinite(result) | (result < 0))
    if wrong.size:
        raise InputError(
            f"{what} gives {name(int(wrong[0]))} the probability {result[wrong[0]]:g}.",
            cause="Probabilities are finite and not negative.",
            next="Correct this entry.",
        )
    if not abs(result.sum() - 1) <= TOLERANCE:
        raise InputError(
            f"{what} sums to {result.sum():.12g}.",
            cause=f"A law sums to one within {TOLERANCE:g}.",
            next="Normalise it.",
        )
    return freeze(result)
