"""Layered chains that need not fit in memory: one layer at a time from the .npz file of `write_chain`.

The members of an uncompressed .npz lie in the file as they are, so the rows of one layer are three reads. A chain whose
``P`` are `StoredLayers` is a chain like any other: what goes layer by layer (probabilities, times, visits) holds one
layer and the answer; its numbers are those of the same chain in memory, because the same steps get the same layers.
"""

from __future__ import annotations

import json
import os
import shutil
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from ..errors import InputError
from ..files import atomic, claimed
from .checks import Name
from .matrices import as_csr, stochastic
from .spill import Column

__all__ = ["LARGE", "StoredLayers", "members_of", "write_layers"]

LARGE = ("indptr", "indices", "data")
CHUNK = 1 << 20


@dataclass(frozen=True)
class Member:
    """Where an array lies in a file."""

    at: int
    kind: np.dtype
    length: int

    def read(self, file: Any, first: int, stop: int) -> NDArray:
        if not 0 <= first <= stop <= self.length:
            raise ValueError(f"rows {first} to {stop} of an array of {self.length}")
        file.seek(self.at + first * self.kind.itemsize)
        found = np.fromfile(file, self.kind, stop - first)
        if len(found) < stop - first:
            raise ValueError("the file ends before the array does")
        return found


@dataclass(frozen=True, eq=False)
class StoredLayers(Sequence[Any]):
    """The layers of a chain in a file, read when they are asked for and not kept.

    Parameters
    ----------
    path : Path
    n, layers : int
        States, and matrices.
    members : dict of str to Member
        ``indptr``, ``indices`` and ``data`` of the matrices, stacked by row.
    done : bool array, shape (n,), optional
        Outcome states, whose rows may be empty.
    name : function, optional
        How a state is called in an error.

    Examples
    --------
    >>> step = np.array([[0.9, 0.1, 0.0], [0, 1, 0], [0, 0, 1]])
    >>> steps = (step for _ in range(1000))
    >>> path = ms.chains.write_layers(steps, "long.npz", {"harm": 1, "refusal": 2}, start=0)
    >>> layers = ms.read_chain(path, stream=True).layers
    >>> layers
    <StoredLayers: 1000 of 3 states in long.npz>
    >>> layers[999].toarray()
    array([[0.9, 0.1, 0. ],
           [0. , 1. , 0. ],
           [0. , 0. , 1. ]])
    """

    path: Path
    n: int
    layers: int
    members: dict[str, Member]
    done: Any = None
    name: Name = str

    def __len__(self) -> int:
        return self.layers

    def __repr__(self) -> str:
        return f"<StoredLayers: {self.layers} of {self.n} states in {self.path.name}>"

    def __getitem__(self, t: Any) -> Any:
        if isinstance(t, slice):
            return tuple(self[i] for i in range(*t.indices(self.layers)))
        if not -self.layers <= t < self.layers:
            raise IndexError(f"layer {t} of {self.layers}")
        t = int(t) % self.layers
        try:
            with open(self.path, "rb") as file:
                rows = self.members["indptr"].read(file, t * self.n, (t + 1) * self.n + 1)
                a, b = int(rows[0]), int(rows[-1])
                data, indices = (self.members[name].read(file, a, b) for name in ("data", "indices"))
                matrix = sp.csr_array((data, indices, rows - a), shape=(self.n, self.n))
                matrix.check_format(full_check=True)
        except (OSError, ValueError) as error:
            raise InputError(
                f"Layer {t} of {self.path} cannot be read.",
                cause=str(error),
                next="The file was changed or damaged: write it again, and read the chain anew.",
            ) from error
        return stochastic(*as_csr(matrix, f"layer {t}"), self.done, self.name, f"layer {t}")

    @property
    def nnz(self) -> int:
        """Stored entries of all layers, absorbing outcome rows not counted."""
        return self.members["data"].length

    def checked(self, done: NDArray, name: Name) -> StoredLayers:
        """The same, when every layer has been read once and found stochastic.

        Raises
        ------
        InputError
            If one is not.
        """
        found = replace(self, done=done, name=name)
        for _ in found:
            pass
        return found


def members_of(path: Path) -> dict[str, Member]:
    """Where the large arrays of a chain lie in its file.

    Raises
    ------
    ValueError
        One is not there, damaged, compressed or no flat array of numbers.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            return {key: _member(archive, key) for key in LARGE}
    except Exception as error:  # a damaged archive can fail anywhere in the decoder, and with any exception
        raise ValueError(str(error)) from error


def _member(archive: zipfile.ZipFile, key: str) -> Member:
    """Where the flat array `key` lies in an uncompressed .npz; its checksum is verified on the way."""
    info = archive.getinfo(f"{key}.npy")
    if info.compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"the array {key!r} is compressed, and a compressed array can only be read as a whole")
    with archive.open(info) as stream:
        version = np.lib.format.read_magic(stream)
        reader = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
        shape, _, kind = reader(stream)
        head = stream.tell()
        while stream.read(CHUNK):  # the checksum is compared at the end
            pass
    if len(shape) != 1 or kind.hasobject or kind.kind not in "iuf" or info.file_size != head + shape[0] * kind.itemsize:
        raise ValueError(f"the array {key!r} is {kind} of shape {shape} in {info.file_size} bytes")
    file = archive.fp
    assert file is not None
    file.seek(info.header_offset + 26)  # the name and the extra field stand in front of the array
    name, extra = np.frombuffer(file.read(4), "<u2").tolist()
    return Member(info.header_offset + 30 + name + extra + head, kind, shape[0])


def write_layers(
    layers: Iterable[Any],
    path: str | os.PathLike[str],
    outcomes: Mapping[str, Any],
    start: Any = None,
    states: Sequence[Any] | None = None,
) -> Path:
    """Write a layered chain layer by layer, as `write_chain` would write it whole.

    Parameters
    ----------
    layers : iterable of matrices, each of shape (n, n)
        Such as a generator; one layer is in memory at a time. Room for two copies is needed on the disk.
    path : path
        The .npz file, written whole or not at all.
    outcomes, start, states
        As for `Chain`.

    Raises
    ------
    InputError
        If a layer is not stochastic or of another size, there is none, a label cannot be stored, or the file cannot be
        written.

    Examples
    --------
    A chain of two hundred positions, of which one matrix is in memory at a time:

    >>> def layer(t):
    ...     harm = 0.001 if t < 10 else 0.01
    ...     return [[1 - harm, harm], [0, 1]]
    >>> layers = (layer(t) for t in range(200))
    >>> path = ms.chains.write_layers(layers, "long.npz", {"harm": 1}, start=0)
    >>> print(ms.hitting_probability(ms.read_chain(path, stream=True), "harm").at_start)
    P(harm) = 0.85333   proven [0.85333, 0.85333]
        because: rounding 4e-14; sampling, judge, lumping, model, truncation not assessed
    """
    from .chain import Chain
    from .storage import VERSION, _to_json

    path, first, many = Path(path), None, 0
    with atomic(path, make_folder=False, sync=False) as part, _parts(path) as folder:
        with ExitStack() as stack:
            kinds = (np.int64, np.int32, np.float64)
            columns = {k: stack.enter_context(Column(folder, k, kind)) for k, kind in zip(LARGE, kinds)}
            columns["indptr"].append(np.zeros(1, np.int64))
            for P in layers:
                chain = Chain.layered([P], outcomes, start, states)
                first = chain if first is None else first
                if chain.n_states != first.n_states:
                    raise InputError(
                        f"Layer {many} has {chain.n_states} states, layer 0 has {first.n_states}.",
                        cause="All layers share one set of states.",
                        next="Pad the layers to the same states.",
                    )
                matrix = chain.layers[0]
                columns["indptr"].append(columns["data"].rows + matrix.indptr[1:].astype(np.int64))
                columns["indices"].append(matrix.indices)
                columns["data"].append(matrix.data)
                many += 1
        if first is None:
            raise InputError("There are no layers.", cause="The iterable is empty.", next="Give at least one matrix.")
        n = first.n_states
        labels = None if isinstance(first.states, range) else [_to_json(label) for label in first.states]
        named = {name: index.tolist() for name, index in first.outcomes.items()}
        small = {
            "shape": np.array([many * n, n], dtype=np.int64),
            "layers": np.array(many, dtype=np.int64),
            "start": np.zeros(n) if first.start is None else first.start,
            "meta": np.array(json.dumps({"outcomes": named, "states": labels, "version": VERSION})),
        }
        with zipfile.ZipFile(part, "w", zipfile.ZIP_STORED) as archive:
            for key in LARGE:
                with open(folder / f"{key}.npy", "rb") as file, archive.open(f"{key}.npy", "w", force_zip64=True) as to:
                    shutil.copyfileobj(file, to, CHUNK)
            for key, array in small.items():
                with archive.open(f"{key}.npy", "w") as to:
                    np.lib.format.write_array(to, array, allow_pickle=False)
    return path


@contextmanager
def _parts(path: Path) -> Iterator[Path]:
    """A folder beside the file for its arrays while they grow; what a killed writer left there goes first."""
    folder = path.with_name(f".{path.name}.parts")
    with claimed(path.with_name(f".{path.name}.lock"), str(path)):
        try:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
