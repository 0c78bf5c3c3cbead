"""Counting the transitions of plain token sequences, as fast as memory allows.

The number of possible (context, token) pairs decides how. If they are few, one table in the
cache counts them. Up to 2**32 of them are cut into ranges that fit the cache: a first pass counts how many tokens fall
into each range, a second one gathers the tokens by range, as many ranges at once as memory allows. Otherwise, and with
weights, blocks of tokens are sorted and merged.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from ..errors import InputError
from .checks import freeze, index_dtype
from .tally import NO_ORDER, dense_codes, runs_of, sorted_by, sums_of

__all__ = ["Transitions", "count_transitions"]

STEP = 1 << 22  # tokens that are read at once
ONE_TABLE = 1 << 22  # cells up to which all are counted in one table
RANGE_BITS = 16  # cells of one range: a quarter of a megabyte of counters, and two bytes say which cell
GATHERED = 1 << 27  # tokens whose cells are gathered at once
SPARSE = 256  # so many times more cells than tokens are not worth visiting


@dataclass(frozen=True, eq=False)
class Transitions:
    """How often which token followed which context.

    Parameters
    ----------
    states : int array, shape (S, order)
        The contexts that occur, sorted: tokens, oldest first, with -1 before the answer began.
    matrix : csr array, shape (S, V)
        Entry (i, t): how often token t came next in context i. int32 where the number of tokens fits, else int64;
        float64 if counted with weights. Canonical, without zeros.

    Notes
    -----
    Unpacks as ``states, matrix = ...``; parts add up with ``+``, and ``sum`` adds a list of them.

    Examples
    --------
    Parts of a corpus are counted apart and added:

    >>> counted = ms.chains.count_transitions([1, 2, 1]) + ms.chains.count_transitions([1, 1, 2])
    >>> counted
    <Transitions: 6 tokens in 3 contexts of order 1>
    >>> states, matrix = counted
    >>> matrix.toarray().tolist()
    [[0, 2, 0], [0, 1, 2], [0, 1, 0]]
    """

    states: NDArray
    matrix: Any

    def __repr__(self) -> str:
        contexts, order = self.states.shape
        return f"<Transitions: {self.matrix.sum():g} tokens in {contexts} contexts of order {order}>"

    def __iter__(self) -> Iterator[Any]:
        return iter((self.states, self.matrix))

    def __add__(self, other: Transitions) -> Transitions:
        if not isinstance(other, Transitions):
            return NotImplemented
        if self.states.shape[1] != other.states.shape[1]:
            raise InputError(
                f"Transitions of order {self.states.shape[1]} and {other.states.shape[1]} cannot be added.",
                cause="Their contexts have different lengths.",
                next="Count both with one order.",
            )
        both = np.concatenate([self.states, other.states])
        codes, first = dense_codes([column + 1 for column in both.T.astype(np.int64)], len(both))
        shape = len(first), max(self.matrix.shape[1], other.matrix.shape[1])
        whole = self.matrix.data.dtype.kind == "i" and other.matrix.data.dtype.kind == "i"
        total = int(self.matrix.data.sum(dtype=np.int64)) + int(other.matrix.data.sum(dtype=np.int64)) if whole else 0
        dtype = index_dtype(total) if whole else np.dtype(np.float64)
        a = _spread(self.matrix, codes[: len(self.states)], shape, dtype)
        return Transitions(both[first], a + _spread(other.matrix, codes[len(self.states) :], shape, dtype))

    def __radd__(self, other: Any) -> Transitions:
        """Let ``sum`` work, which begins at 0."""
        return self if isinstance(other, int) and other == 0 else NotImplemented


def _spread(matrix: Any, rows: NDArray, shape: tuple[int, int], dtype: np.dtype) -> sp.csr_array:
    """The matrix with its rows, in rising order, at other places of a taller one."""
    lengths = np.zeros(shape[0] + 1, dtype=np.int64)
    lengths[rows + 1] = np.diff(matrix.indptr)
    return sp.csr_array((matrix.data.astype(dtype, copy=False), matrix.indices, np.cumsum(lengths)), shape=shape)


def count_transitions(
    tokens: Any, offsets: Any = None, order: int = 1, vocabulary: int | None = None, weights: Any = None
) -> Transitions:
    """Count which token follows each context of `order` tokens.

    This counts plain sequences. `count` counts judged rollouts: up to the hit, by prompt, with outcomes.

    Parameters
    ----------
    tokens : int array, shape (total,)
        Token ids in [0, vocabulary), all answers one behind the other. A memory map will do: it is read in pieces.
    offsets : int array, shape (n + 1,), optional
        Answer r is ``tokens[offsets[r]:offsets[r + 1]]``; one single answer if not given.
    order : int
        Tokens of a context, at least 0 (0: how often each token occurs).
    vocabulary : int, optional
        Number of columns; the largest token plus one if not given.
    weights : array, shape (n,), optional
        Weight of each answer, finite and not negative.

    Returns
    -------
    Transitions
        ``states, matrix = count_transitions(...)``. Every answer begins in the context (-1, ..., -1), as with
        `KGram`; drop the states with a -1 for full contexts only. Parts of a corpus are counted apart and added.

    Raises
    ------
    InputError
        If tokens, offsets or weights do not fit, or a context does not fit 62 bits.

    Notes
    -----
    Beside the result it takes two bytes a token, at most 256 MB or one byte for every four tokens, if that is more.
    With weights, or so many possible contexts that they cannot be visited, also a copy of the result; sums of weights
    are rounded in float64.

    Examples
    --------
    Two answers, [1, 2] and [1, 1, 2]; -1 is the state before the first token:

    >>> states, matrix = ms.chains.count_transitions([1, 2, 1, 1, 2], offsets=[0, 2, 5])
    >>> for state, row in zip(states, matrix.toarray()):
    ...     print(state, row)
    [-1] [0 2 0]
    [1] [0 1 2]
    """
    tokens, offsets, order, vocabulary = _checked(tokens, offsets, order, vocabulary)
    base = vocabulary + 1
    size = base ** min(order, 62) * vocabulary
    if size >= 2**62:
        raise InputError(
            f"Contexts of {order} tokens out of {vocabulary} cannot be numbered.",
            cause="There are more than 2**62 possible transitions.",
            next="Lower the order, number the tokens that occur, or use count(rolls, KGram(order)).",
        )
    run = _Run(tokens, offsets, order, vocabulary, base, size)
    if weights is not None:
        contexts, parts = _by_sorting(run, _weights(weights, len(offsets) - 1))
    elif size <= ONE_TABLE:
        contexts, parts = _by_one_table(run)
    elif size <= 2**32 and size <= SPARSE * len(tokens):
        contexts, parts = _by_ranges(run)
    else:
        contexts, parts = _by_sorting(run, None)
    states = np.empty((len(contexts), order), dtype=np.int32)
    for column in range(order - 1, -1, -1):
        contexts, symbol = np.divmod(contexts, base)
        states[:, column] = symbol - 1
    matrix = sp.csr_array(parts, shape=(len(states), vocabulary))
    matrix.has_canonical_format = True
    return Transitions(states, matrix)


@dataclass(frozen=True)
class _Run:
    """The sequences, and how their transitions are numbered."""

    tokens: NDArray
    offsets: NDArray
    order: int
    vocabulary: int
    base: int
    size: int

    def pieces(self) -> Iterator[tuple[NDArray, NDArray, int, int]]:
        """Tokens (with the context of the first), where their answers begin, and the range to count."""
        for lo in range(0, len(self.tokens), STEP):
            hi, start = min(lo + STEP, len(self.tokens)), max(lo - self.order, 0)
            a, b = np.searchsorted(self.offsets, lo, "right") - 1, np.searchsorted(self.offsets, hi, "left")
            part = freeze(np.ascontiguousarray(self.tokens[start:hi], dtype=np.int32).view())  # one type to compile
            yield part, self.offsets[a : b + 1] - start, lo - start, hi - start

    @property
    def numbering(self) -> tuple[int, int, int]:
        return self.order, self.base, self.vocabulary

    def tally(self, origin: int, shift: int, table: NDArray) -> None:
        from . import counting_kernels as kernels

        done = 0
        for part, starts, lo, hi in self.pieces():
            bad = kernels.tally(part, starts, lo, hi, *self.numbering, origin, shift, table)
            if bad >= 0:
                raise _outside(done + bad - lo, int(part[bad]), self.vocabulary)
            done += hi - lo

    def empty(self) -> tuple[NDArray, NDArray, NDArray, NDArray, NDArray]:
        """Where the kernels append: position, indices, data, contexts, begins. Pages never touched cost nothing."""
        most, rows = len(self.tokens) + 1, min(len(self.tokens), self.base**self.order)
        data, contexts, begins = (
            np.empty(most, index_dtype(len(self.tokens))),
            np.empty(rows, np.int64),
            np.empty(rows + 1, np.int64),
        )
        return np.array([0, 0, -1]), np.empty(most, np.int32), data, contexts, begins

    @property
    def counter(self) -> type:
        """Type of a counter that cannot overflow."""
        return np.uint32 if len(self.tokens) < 2**32 else np.uint64


Parts = tuple[NDArray, tuple[NDArray, NDArray, NDArray]]  # contexts, and the arrays of a CSR matrix


def _trimmed(at: NDArray, indices: NDArray, data: NDArray, contexts: NDArray, begins: NDArray) -> Parts:
    entries, rows = int(at[0]), int(at[1])
    for array, length in ((indices, entries), (data, entries), (contexts, rows), (begins, rows + 1)):
        array.resize(length, refcheck=False)  # in place: a copy would double the result
    begins[rows] = entries
    index = index_dtype(entries)
    return contexts, (data, indices.astype(index, copy=False), begins.astype(index, copy=False))


def _by_one_table(run: _Run) -> Parts:
    from . import counting_kernels as kernels

    table, out = np.zeros(run.size, dtype=run.counter), run.empty()
    run.tally(0, 0, table)
    kernels.scan(table, 0, run.vocabulary, *out)
    return _trimmed(*out)


def _by_ranges(run: _Run) -> Parts:
    from . import counting_kernels as kernels

    width, buckets = 1 << RANGE_BITS, (run.size >> RANGE_BITS) + 1
    held = np.zeros(buckets + 1, dtype=run.counter)
    run.tally(0, RANGE_BITS, held)
    ends = np.concatenate([[0], np.cumsum(held[:-1], dtype=np.int64)])
    room = max(GATHERED, len(run.tokens) // 8)
    out, table, keys, first = run.empty(), np.zeros(width + 1, dtype=run.counter), np.empty(0, np.uint16), 0
    while first < buckets:
        last = int(np.searchsorted(ends, ends[first] + room, "right")) - 1
        origin = first << RANGE_BITS
        if last == first:  # more tokens in one range than can be gathered: count them where they stand
            run.tally(origin, 0, table)
            kernels.scan(table[:width], origin, run.vocabulary, *out)
            first += 1
            continue
        cursor = ends[first : last + 1] - ends[first]
        if len(keys) <= cursor[-1]:
            keys = np.empty(int(cursor[-1]) + 1, dtype=np.uint16)
        until = cursor[1:].copy()
        for part, starts, lo, hi in run.pieces():
            kernels.scatter(part, starts, lo, hi, *run.numbering, origin, RANGE_BITS, cursor, keys)
        kernels.scan_buckets(keys, until, origin, run.vocabulary, table[:width], *out)
        first = last
    return _trimmed(*out)


def _by_sorting(run: _Run, weights: NDArray | None) -> Parts:
    """Blocks of tokens, sorted; sorted lists are merged two by two, like the digits of a counter."""
    from . import counting_kernels as kernels

    lists: list[tuple[int, NDArray, NDArray]] = []
    done, bits = 0, run.size.bit_length()
    for part, starts, lo, hi in run.pieces():
        inside = part[lo:hi]
        bad = np.flatnonzero((inside < 0) | (inside >= run.vocabulary))
        if bad.size:
            raise _outside(done + int(bad[0]), int(inside[bad[0]]), run.vocabulary)
        keys = np.empty(hi - lo, dtype=np.int64)
        kernels.cells(part, starts, lo, hi, *run.numbering, keys)
        if weights is None:
            keys, _ = sorted_by(keys, bits, NO_ORDER)
            first = runs_of(keys)
            sums = np.diff(first, append=len(keys)).astype(index_dtype(len(run.tokens)))
        else:
            answer = np.searchsorted(run.offsets, np.arange(done, done + hi - lo), "right") - 1
            keys, order = sorted_by(keys, bits)
            first = runs_of(keys)
            sums = sums_of(weights[answer], order, first)
        done += hi - lo
        lists.append((1, keys[first], sums))
        while len(lists) > 1 and (lists[-1][0] >= lists[-2][0] or done == len(run.tokens)):
            size, a, x = lists.pop(-2)
            more, b, y = lists.pop()
            merged, total = np.empty(len(a) + len(b), dtype=np.int64), np.empty(len(a) + len(b), dtype=x.dtype)
            n = kernels.merge(a, x, b, y, merged, total)
            lists.append((size + more, merged[:n], total[:n]))
    keys, sums = lists[0][1:] if lists else (np.empty(0, np.int64), np.empty(0, np.int32))
    if weights is not None:
        keys, sums = keys[sums > 0], sums[sums > 0].astype(np.float64)
    rows, columns = np.divmod(keys, run.vocabulary)
    first = runs_of(rows)
    index = index_dtype(len(keys))
    return rows[first], (sums, columns.astype(index), np.append(first, len(keys)).astype(index))


def _checked(tokens: Any, offsets: Any, order: Any, vocabulary: Any) -> tuple[NDArray, NDArray, int, int]:
    tokens = np.asanyarray(tokens)
    if tokens.ndim != 1 or (tokens.dtype.kind not in "iu" and tokens.size):
        raise InputError(
            f"tokens have shape {tokens.shape} and type {tokens.dtype}.",
            cause="Token ids are whole numbers in one flat array.",
            next="Pass all answers one behind the other, and `offsets`.",
        )
    offsets = np.array([0, len(tokens)]) if offsets is None else np.asarray(offsets)
    good = offsets.ndim == 1 and len(offsets) > 0 and offsets.dtype.kind in "iu"
    offsets = offsets.astype(np.int64) if good else np.zeros(1, np.int64)
    if not good or offsets[0] != 0 or offsets[-1] != len(tokens) or (np.diff(offsets) < 0).any():
        raise InputError(
            "The offsets do not cut the tokens into answers.",
            cause=f"They are whole numbers that rise from 0 to the number of tokens, {len(tokens)}.",
            next="Pass np.concatenate([[0], np.cumsum(lengths)]).",
        )
    low, high = (int(tokens.min()), int(tokens.max())) if tokens.size and vocabulary is None else (0, 0)
    sizes = {"order": (order, 0), "vocabulary": (high + 1 if vocabulary is None else vocabulary, 1)}
    for name, (value, least) in sizes.items():
        whole = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
        if not whole or not least <= value < 2**31 or low < 0:
            raise InputError(
                f"{name} is {value!r} and the smallest token is {low}.",
                cause=f"{name} is a whole number in [{least}, 2**31), and tokens start at 0.",
                next="Correct it.",
            )
    return tokens, offsets, int(order), int(sizes["vocabulary"][0])


def _weights(weights: Any, n: int) -> NDArray[np.float64]:
    try:
        array = np.asarray(weights, dtype=np.float64)
    except (TypeError, ValueError):
        array = np.full(0, np.nan)
    if array.shape != (n,) or not (np.isfinite(array) & (array >= 0)).all():
        raise InputError(
            f"weights have shape {array.shape}, or one of them is negative or not finite.",
            cause=f"There is one weight for each of the {n} answers.",
            next="Correct them, or leave them out.",
        )
    return array


def _outside(position: int, token: int, vocabulary: int) -> InputError:
    return InputError(
        f"Token {position} is {token}.",
        cause=f"The vocabulary has the ids 0 to {vocabulary - 1}.",
        next="Raise `vocabulary`, or check the tokens.",
    )
