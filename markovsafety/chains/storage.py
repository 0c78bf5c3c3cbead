"""Chains and counts on disk: an .npz of plain arrays, written atomically and read without pickle."""

from __future__ import annotations

import json
import os
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp

from ..errors import InputError
from ..files import atomic
from ..outcomes import OUTCOMES
from .chain import Chain, Evidence
from .counts import Counts, Table
from .matrices import csr
from .stored_layers import LARGE, StoredLayers, members_of
from .tally import Tally

__all__ = ["read_chain", "read_counts", "write_chain", "write_counts"]

VERSION = 1
_KEYS = ("indptr", "indices", "data", "shape", "layers", "start", "meta")
_MALFORMED = (ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError, RecursionError)
_TRIALS = ("through", "prompts", "deff")
_TABLES = ("transitions", "entries", "passages")
_TALLY = ("prompt_id", "category", "prefill", "outcomes")


def write_chain(chain: Chain, path: str | os.PathLike[str]) -> Path:
    """Write a chain to an .npz file, atomically: a reader sees the old file or the new one.

    Parameters
    ----------
    chain : Chain
        Labels must be made of integers, floats, strings, booleans, None and tuples of these.
    path : path
        The file to write; its folder must exist. The name is used as given.

    Returns
    -------
    Path
        The path written.

    Raises
    ------
    InputError
        If a label cannot be stored or the folder cannot be written to.

    Notes
    -----
    Keys: indptr, indices, data, shape (the CSR matrix; of a layered chain, the blocks stacked by row), layers (0 means
    homogeneous), start (all zeros: none), meta (JSON text with outcomes, states, version). Further keys exist only
    where there is something to keep: the entry laws (entry_k, entry_law), exact counts (count_indptr, count_indices,
    count_data) and the evidence of an estimated chain (visits, through, prompts, deff, tally_prompt_id, tally_category,
    tally_prefill, tally_outcomes).

    Examples
    --------
    >>> path = ms.write_chain(ms.toy.shallow(3), "shallow.npz")
    >>> ms.read_chain(path)
    <Chain 6 states, homogeneous, 14 transitions; outcomes harm (1), refusal (1); start: state 0
        ('position 0')>
    """
    return _write(Path(path), _pack(chain))


def _write(path: Path, arrays: dict[str, np.ndarray]) -> Path:
    with atomic(path, make_folder=False, sync=False) as part, open(part, "wb") as file:
        np.savez(file, **arrays)  # pyright: ignore[reportArgumentType]
    return path


def _pack(chain: Chain) -> dict[str, np.ndarray]:
    P = sp.csr_array(sp.vstack(chain.layers, format="csr")) if chain.is_layered else chain.P
    plain = isinstance(chain.states, range)
    meta = {
        "outcomes": {name: index.tolist() for name, index in chain.outcomes.items()},
        "states": None if plain else [_to_json(label) for label in chain.states],
        "version": VERSION,
    }
    start = np.zeros(chain.n_states) if chain.start is None else chain.start
    arrays = {
        "indptr": P.indptr,
        "indices": P.indices,
        "data": P.data,
        "shape": np.array(P.shape, dtype=np.int64),
        "layers": np.array(chain.n_layers, dtype=np.int64),
        "start": start,
        "meta": np.array(json.dumps(meta)),
    }
    if chain.entry:
        arrays |= {"entry_k": np.array(list(chain.entry)), "entry_law": np.stack(list(chain.entry.values()))}
    if chain.integer_counts is not None:
        arrays |= {f"count_{k}": getattr(chain.integer_counts, k) for k in ("indptr", "indices", "data")}
    if chain.evidence is not None:
        arrays |= {k: getattr(chain.evidence, k) for k in ("visits", *_TRIALS)}
        arrays |= {f"tally_{k}": getattr(chain.evidence, k) for k in _TALLY}
        arrays |= {"prior": np.array(chain.evidence.prior)} if chain.evidence.prior else {}
        arrays["tally_category"] = np.asarray(arrays["tally_category"], dtype=str)
    return arrays


def _to_json(label: Any) -> Any:
    if isinstance(label, tuple):
        return [_to_json(x) for x in label]
    if label is None or isinstance(label, (str, bool, int, float)):
        return label
    raise InputError(
        f"The label {label!r} cannot be written to a file.",
        cause=f"A {type(label).__name__} has no JSON form that reads back the same.",
        next="Use integers, strings or tuples of these as labels.",
    )


def _from_json(label: Any) -> Any:
    return tuple(_from_json(x) for x in label) if isinstance(label, list) else label


def read_chain(path: str | os.PathLike[str], *, stream: bool = False) -> Chain:
    """Read a chain that `write_chain` wrote.

    Parameters
    ----------
    path : path
        The .npz file.
    stream : bool
        Of a layered chain: leave the matrices in the file, which must stay where it is, and read each when it is asked
        for. Probabilities, times and visits then hold one matrix and the answer, of shape (layers + 1, n), and give the
        same numbers; what needs all transitions at once (`critical`, sensitivities, ``method="device"``) reads them
        all. See `write_layers` for writing layer by layer.

    Returns
    -------
    Chain
        Equal to the one written, without its `counts`.

    Raises
    ------
    InputError
        If the file is missing, is no .npz, lacks a key, or holds arrays that make no chain; if it is to be streamed and
        has no layers or is compressed.

    Examples
    --------
    >>> path = ms.write_chain(ms.toy.shallow(3), "shallow.npz")
    >>> print(ms.hitting_probability(ms.read_chain(path), "harm").at_start)
    P(harm) = 0.284468   proven [0.284468, 0.284468]
        because: rounding 9e-16; sampling, judge, lumping, model, truncation not assessed
    """
    path = Path(path)
    arrays = _read(path, _KEYS, "chain", LARGE if stream else ())
    try:
        with np.errstate(all="ignore"):  # numbers of a damaged file may overflow on the way to where they are refused
            return _unpack(arrays, path if stream else None)
    except InputError as error:
        raise _foreign(path, f"{error.fact} {error.cause}", "chain") from None
    except _MALFORMED as error:
        raise _foreign(path, _why(error, "chain"), "chain") from None


def _read(path: Path, keys: tuple[str, ...], kind: str, leave: tuple[str, ...] = ()) -> dict[str, np.ndarray]:
    """The arrays of a file; those to leave are not read, and empty."""
    try:
        with path.open("rb") as stream:
            file = np.load(stream, allow_pickle=False)
            if not isinstance(file, np.lib.npyio.NpzFile):
                raise ValueError("it holds a single array")
            with file:
                arrays = {key: np.zeros(0) if key in leave else file[key] for key in file.files}
            for key, array in arrays.items():
                if array.dtype.kind not in "biufU":
                    raise ValueError(f"{key} has the type {array.dtype}")
    except FileNotFoundError:
        raise InputError(
            f"There is no file {path}.",
            cause="The path does not exist.",
            next=f"Check the path, or write the {kind} first.",
        ) from None
    except Exception as error:  # a damaged archive can fail anywhere in the decoders, and with any exception
        raise _foreign(path, _unopened(path, error), kind) from None
    missing = [key for key in keys if key not in arrays]
    if missing:
        raise _foreign(path, f"The key {missing[0]!r} is missing.", kind)
    return arrays


def _unopened(path: Path, error: BaseException) -> str:
    """Why a file is no .npz, in words that never advise to load Python objects from it, as numpy's own do."""
    if path.is_dir():
        return "It is a folder."
    if isinstance(error, PermissionError):
        return "It may not be read."
    try:
        with path.open("rb") as stream:
            begin = stream.read(4)
    except OSError:
        return f"It cannot be read ({error})."
    if not begin:
        return "It is empty."
    if begin[:2] != b"PK":
        return "It is no .npz archive of arrays."
    if "pickle" in str(error) or "Object arrays" in str(error):
        return "It holds Python objects instead of plain arrays; they are never loaded."
    return f"The .npz archive is damaged ({error})."


def _why(error: BaseException, kind: str) -> str:
    if isinstance(error, KeyError):
        return f"The key {error} is missing."
    return f"Its arrays make no {kind} ({error})."


def _foreign(path: Path, cause: str, kind: str) -> InputError:
    return InputError(
        f"{path} is not a readable {kind} file.",
        cause=cause,
        next=f"Write it again with write_{kind}, or give another file.",
    )


def write_counts(counts: Counts, path: str | os.PathLike[str]) -> Path:
    """Write counts to an .npz file, atomically.

    Parameters
    ----------
    counts : Counts
    path : path
        The file to write; its folder must exist.

    Returns
    -------
    Path
        The path written.

    Raises
    ------
    InputError
        If a label cannot be stored or the folder cannot be written to.

    Notes
    -----
    Keys: tally_* (raw rollouts by group), transitions_*, entries_*, passages_*, mass_NAME_* (group, source, target and
    sums), meta (JSON text with kind, states, masses, version).

    Examples
    --------
    >>> ended = {"outcome": ["harm", "refusal"], "hit": 1}
    >>> rolls = ms.Rollouts.of([[5, 9], [5, 2]], prompt_id=[0, 1], **ended)
    >>> path = ms.chains.write_counts(ms.count(rolls), "counts.npz")
    >>> ms.chains.read_counts(path)
    <Counts KGram(2): 2 rollouts (1 harm + 1 refusal + 0 benign + 0 truncated) of 2 prompts,
        prefill 0; 2 states, 4 transitions>
    """
    meta = {
        "kind": counts.kind,
        "states": [_to_json(label) for label in counts.states],
        "mass": sorted(counts.mass),
        "version": VERSION,
    }
    arrays = {f"tally_{k}": getattr(counts.tally, k) for k in _TALLY} | {"meta": np.array(json.dumps(meta))}
    tables = {name: getattr(counts, name) for name in _TABLES}
    for name, table in {**tables, **{f"mass_{k}": v for k, v in counts.mass.items()}}.items():
        arrays |= {f"{name}_group": table.group, f"{name}_source": table.source}
        arrays |= {f"{name}_target": table.target} if table.target is not None else {}
        arrays |= {f"{name}_sum_{k}": v for k, v in table.values.items()}
    return _write(Path(path), arrays)


def read_counts(path: str | os.PathLike[str]) -> Counts:
    """Read counts that `write_counts` wrote.

    Parameters
    ----------
    path : path
        The .npz file.

    Returns
    -------
    Counts
        Equal to those written.

    Raises
    ------
    InputError
        If the file is missing, is no .npz, lacks a key, or holds arrays that make no counts.

    Examples
    --------
    Counts of two machines, from their files:

    >>> for i, outcome in enumerate(["harm", "refusal"]):
    ...     rolls = ms.Rollouts.of([[5, 9]], prompt_id=i, outcome=outcome, hit=1)
    ...     path = ms.chains.write_counts(ms.count(rolls), f"machine{i}.npz")
    >>> ms.chains.read_counts("machine0.npz") + ms.chains.read_counts("machine1.npz")
    <Counts KGram(2): 2 rollouts (1 harm + 1 refusal + 0 benign + 0 truncated) of 2 prompts,
        prefill 0; 2 states, 4 transitions>
    """
    path = Path(path)
    arrays = _read(path, ("meta", "tally_outcomes", *(f"{name}_group" for name in _TABLES)), "counts")
    try:
        meta = json.loads(str(arrays["meta"][()]))
        if meta["version"] != VERSION:
            raise ValueError(f"format version {meta['version']}, this reader knows {VERSION}")
        states = tuple(_from_json(x) for x in meta["states"])
        tally = Tally(*_tally(arrays))
        mass = {str(name): _table(arrays, f"mass_{name}", len(tally), len(states)) for name in meta["mass"]}
        tables = {name: _table(arrays, name, len(tally), len(states)) for name in _TABLES}
        if tables["passages"].target is None or (tables["passages"].target < len(states)).any():
            raise ValueError("passages end in no outcome")
        return Counts(str(meta["kind"]), states, tally, **tables, mass=mass)
    except InputError as error:
        raise _foreign(path, f"{error.fact} {error.cause}", "counts") from None
    except _MALFORMED as error:
        raise _foreign(path, _why(error, "counts"), "counts") from None


def _table(arrays: dict[str, np.ndarray], name: str, groups: int, states: int) -> Table:
    """One table of sums; indices that point outside the tally or the states are refused."""
    group, source = (_numbers(arrays[f"{name}_{k}"], "iu", np.int64) for k in ("group", "source"))
    target = arrays.get(f"{name}_target")
    target = None if target is None else _numbers(target, "iu", np.int64)
    begin = f"{name}_sum_"
    sums = {k.removeprefix(begin): _numbers(v, "iuf", np.float64) for k, v in arrays.items() if k.startswith(begin)}
    ends = [(group, groups), (source, states + len(OUTCOMES))]
    ends += [] if target is None else [(target, states + len(OUTCOMES))]
    for index, end in ends:
        if index.ndim != 1 or len(index) != len(group) or (len(index) and not 0 <= index.min() <= index.max() < end):
            raise ValueError(f"an index of {name} is out of range")
    if "count" not in sums and not name.startswith("mass_"):
        raise ValueError(f"{name} has no counts")
    if any(v.shape != group.shape or not np.isfinite(v).all() for v in sums.values()):
        raise ValueError(f"the sums of {name} do not fit")
    return Table(group, source, target, sums)


def _tally(arrays: dict[str, np.ndarray]) -> list[np.ndarray]:
    """The columns of a tally; whole numbers where prompts and forced tokens are numbered."""
    whole = {name: _numbers(arrays[f"tally_{name}"], "iu", np.int64) for name in ("prompt_id", "prefill")}
    return [whole.get(name, arrays[f"tally_{name}"]) for name in _TALLY]


def _numbers(array: np.ndarray, kinds: str, dtype: Any) -> np.ndarray:
    """The array in the type that is worked with; a ValueError where that would change its numbers."""
    if array.dtype.kind not in kinds:
        raise ValueError(f"an array of type {array.dtype} where {np.dtype(dtype)} was written")
    return np.asarray(array, dtype=dtype)


def _unpack(arrays: dict[str, np.ndarray], stored: Path | None = None) -> Chain:
    meta = json.loads(str(arrays["meta"][()]))
    if meta["version"] != VERSION:
        raise ValueError(f"format version {meta['version']}, this reader knows {VERSION}")
    layers = int(arrays["layers"])
    rows, n = (int(x) for x in arrays["shape"])
    if layers < 0 or rows != n * max(layers, 1):
        raise ValueError(f"shape {(rows, n)} with {layers} layers")
    P = _csr(arrays, "", (rows, n)) if stored is None else _left(stored, n, layers)
    start = arrays["start"] if arrays["start"].any() else None
    states = None if meta["states"] is None else [_from_json(x) for x in meta["states"]]
    extra: dict[str, Any] = {"n_layers": layers}
    if "entry_k" in arrays:
        extra["entry"] = {int(k): law for k, law in zip(arrays["entry_k"], arrays["entry_law"])}
    if "count_data" in arrays:
        extra["integer_counts"] = _csr(arrays, "count_", (n, n))
    if "visits" in arrays:
        prior = float(arrays["prior"]) if "prior" in arrays else 0.0
        told = [*_tally(arrays), *(arrays.get(k) for k in _TRIALS)]
        extra["evidence"] = Evidence(arrays["visits"], *told, prior=prior)
    blocks = P if layers == 0 or isinstance(P, StoredLayers) else _layers(P, n)
    return Chain(blocks, meta["outcomes"], start, states, **extra)


def _left(path: Path, n: int, layers: int) -> StoredLayers:
    """The matrices of a layered chain, left in the file."""
    if layers == 0:
        raise ValueError("it has one matrix and no layers; only layers are read one by one")
    members = members_of(path)
    if members["indptr"].length != n * layers + 1 or members["data"].length != members["indices"].length:
        raise ValueError("its arrays do not fit its shape")
    return StoredLayers(path, n, layers, members)


def _csr(arrays: dict[str, np.ndarray], prefix: str, shape: tuple[int, int]) -> sp.csr_array:
    data, indices, indptr = (arrays[prefix + key] for key in ("data", "indices", "indptr"))
    matrix = sp.csr_array((data, indices, indptr), shape=shape)
    matrix.check_format(full_check=True)
    return matrix


def _layers(P: sp.csr_array, n: int) -> list[sp.csr_array]:
    """The blocks that a layered chain was stacked from, as views."""
    cuts = P.indptr[::n].tolist()
    return [
        csr(P.data[a:b], P.indices[a:b], P.indptr[t * n : (t + 1) * n + 1] - a, (n, n))
        for t, (a, b) in enumerate(pairwise(cuts))
    ]
