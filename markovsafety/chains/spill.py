"""Adding up more keys than memory holds: sorted runs on disk, merged a piece at a time.

A key is a pair (a, b). What comes in is sorted and added up where keys are equal; when the memory is full it becomes a
run, a file of sorted records without repetition. At the end the runs are read side by side, each a piece at a time:
what lies below the last a that all of them have shown is complete, is merged, and goes out.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import InputError
from ..files import atomic_folder, claimed
from .tally import NO_ORDER, runs_of, sorted_by

__all__ = ["Column", "Spill", "added_up", "whole_folder"]

RECORD = np.dtype([("a", "<i8"), ("b", "<i8"), ("n", "<i8")])
AT_ONCE = 64  # runs that are merged at once
PIECE = 1 << 16  # records that go out at once
LEAST = 1 << 10  # records of one run that are read at once

Sums = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]


def added_up(a: NDArray, b: NDArray, n: NDArray | None, bits: tuple[int, int]) -> Sums:
    """Distinct pairs in rising order, and the sum of their n (None: how often each occurs).

    Parameters
    ----------
    a, b : int array, shape (m,)
        Non-negative, below 2 to the power of `bits`.
    """
    if sum(bits) > 63:
        order = np.lexsort((b, a))
        a, b = a[order], b[order]
        first = np.flatnonzero(np.concatenate([[True], (a[1:] != a[:-1]) | (b[1:] != b[:-1])])[: len(a)])
        return a[first], b[first], _sums(None if n is None else n[order], first, len(a))
    keys = a.astype(np.int64)
    keys <<= bits[1]
    keys |= b
    keys, order = sorted_by(keys, sum(bits), NO_ORDER if n is None else None)
    first = runs_of(keys)
    found = keys[first]
    return found >> bits[1], found & ((1 << bits[1]) - 1), _sums(None if n is None else n[order], first, len(keys))


def _sums(n: NDArray | None, first: NDArray, m: int) -> NDArray[np.int64]:
    if n is None:
        return np.diff(first, append=m)
    return np.add.reduceat(n, first).astype(np.int64) if len(first) else np.zeros(0, np.int64)


class Spill:
    """Sums of pairs.

    Parameters
    ----------
    folder : Path or None
        Where runs go; None: nothing may be written, and what does not fit is refused.
    name : str
    room : int
        Records kept in memory.
    bits : (int, int)
        Every a is below ``2**bits[0]``, every b below ``2**bits[1]``.
    """

    def __init__(self, folder: Path | None, name: str, room: int, bits: tuple[int, int]):
        self.folder, self.name, self.room, self.bits = folder, name, max(room, LEAST), bits
        self.fresh: list[Sums] = []
        self.held = 0
        self.runs: list[Path] = []
        self.made = 0

    def add(self, a: NDArray, b: NDArray, n: NDArray | None = None) -> None:
        """Add pairs, in any order and with repetitions."""
        self.fresh.append(added_up(a, b, n, self.bits))
        self.held += len(self.fresh[-1][0])
        if self.held <= self.room:
            return
        self._join()
        if self.held > self.room // 2:  # too many distinct ones for joining to help much longer
            self._spill()

    def _join(self) -> None:
        if len(self.fresh) > 1:
            a, b, n = (np.concatenate(column) for column in zip(*self.fresh))
            self.fresh = [added_up(a, b, n, self.bits)]
        self.held = sum(len(part[0]) for part in self.fresh)

    def _spill(self) -> None:
        if self.folder is None:
            raise InputError(
                f"There are more than {self.held:,} different {self.name} already.",
                cause=f"{self.room:,} of them fit into the memory that was granted.",
                next="Give out=, a folder that they can be written to, or more memory.",
            )
        with self._writing() as file:
            for part in self.fresh:
                _records(part).tofile(file)
        self.fresh, self.held = [], 0

    @contextmanager
    def _writing(self) -> Iterator[Any]:
        assert self.folder is not None
        path = self.folder / f"{self.name}-{self.made:05d}.run"
        with open(path, "wb") as file:
            yield file
        self.made += 1
        self.runs.append(path)

    def merged(self) -> Iterator[Sums]:
        """All sums in rising order, a piece at a time; a is never cut between two pieces. The runs are used up."""
        self._join()
        if not self.runs:
            for part in self.fresh:
                yield from _cut(part)
            self.fresh = []
            return
        if self.held:
            self._spill()
        while len(self.runs) > AT_ONCE:
            some, self.runs = self.runs[:AT_ONCE], self.runs[AT_ONCE:]
            with self._writing() as file:
                for piece in self._pieces(some):
                    _records(piece).tofile(file)
        for piece in self._pieces(self.runs):
            yield from _cut(piece)
        self.runs = []

    def _pieces(self, runs: list[Path]) -> Iterator[Sums]:
        sizes = np.array([run.stat().st_size // RECORD.itemsize for run in runs])
        at, usual = np.zeros(len(runs), np.int64), max(self.room // (2 * len(runs)), LEAST)
        size = usual
        with ExitStack() as stack:
            files = [stack.enter_context(open(run, "rb")) for run in runs]
            while (at < sizes).any():
                shown = [_read(file, k, size) for file, k in zip(files, at.tolist())]
                ends = [part["a"][-1] for part, k, most in zip(shown, at, sizes) if k + size < most]
                limit = min(ends, default=None)  # below it every run has shown all it has
                taken = [len(part) if limit is None else int(np.searchsorted(part["a"], limit)) for part in shown]
                if not any(taken):
                    size *= 2  # one a fills all that was read
                    continue
                at, size = at + taken, usual
                both = np.concatenate([part[:k] for part, k in zip(shown, taken)])
                a, b, n = (np.ascontiguousarray(both[name]) for name in ("a", "b", "n"))
                yield added_up(a, b, n, self.bits)
        for run in runs:
            run.unlink()


def _cut(part: Sums) -> Iterator[Sums]:
    """Pieces of about `PIECE` records, none of which parts an a."""
    a, lo = part[0], 0
    while lo < len(a):
        hi = int(np.searchsorted(a, a[min(lo + PIECE, len(a)) - 1], "right"))
        yield part[0][lo:hi], part[1][lo:hi], part[2][lo:hi]
        lo = hi


def _read(file: Any, at: int, size: int) -> NDArray:
    file.seek(at * RECORD.itemsize)
    return np.fromfile(file, RECORD, size)


def _records(part: Sums) -> NDArray:
    records = np.empty(len(part[0]), RECORD)
    for name, column in zip(("a", "b", "n"), part):
        records[name] = column
    return records


class Column:
    """An array that grows at its end: in memory, or a .npy file that is mapped when it is done.

    Parameters
    ----------
    folder : Path or None
    name : str
    kind : numpy type
    width : int
        Columns of a row; 0 for a flat array.
    """

    def __init__(self, folder: Path | None, name: str, kind: Any, width: int = 0):
        self.kind, self.width, self.rows = np.dtype(kind), width, 0
        self.parts: list[NDArray] = []
        self.path = None if folder is None else folder / f"{name}.npy"
        self.file = None if self.path is None else open(self.path, "wb")  # noqa: SIM115
        if self.file is not None:
            self._header()

    def _header(self) -> None:
        assert self.file is not None
        shape = (self.rows, self.width) if self.width else (self.rows,)
        self.file.seek(0)
        head = {"descr": np.lib.format.dtype_to_descr(self.kind), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(self.file, head)  # leaves room for the shape to grow

    def append(self, values: NDArray) -> None:
        values = np.ascontiguousarray(values, dtype=self.kind)
        self.rows += len(values)
        if self.file is None:
            self.parts.append(values)
        else:
            values.tofile(self.file)

    def __enter__(self) -> Column:
        return self

    def __exit__(self, *_: Any) -> None:
        """Write the length into the header, and let go of the file."""
        if self.file is not None:
            with self.file:
                self._header()

    def array(self) -> NDArray:
        """What was kept in memory."""
        empty = np.zeros((0, self.width) if self.width else 0, self.kind)
        return np.concatenate([empty, *self.parts])


@contextmanager
def whole_folder(out: Path | None) -> Iterator[Path | None]:
    """A temporary folder beside `out` that becomes it when the block ends well, and goes away otherwise.

    Raises
    ------
    InputError
        `out` exists already, is being written by another process, or cannot be written (the disk is full).
    """
    if out is None:
        yield None
        return
    if out.exists():
        raise InputError(
            f"{out} exists already.",
            cause="A table on disk is written as a folder of its own, whole or not at all.",
            next="Choose another path, or remove it first.",
        )
    with claimed(out.with_name(f".{out.name}.lock"), str(out)), atomic_folder(out) as part:
        yield part
