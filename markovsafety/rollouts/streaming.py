"""Rollouts that need not fit in memory: Parquet shards, read batch by batch and only the columns that are asked for.

A batch holds whole rollouts in flat arrays under the names of `Rollouts`, which is what `count` reads. The token ids
are Arrow's own buffer, not a copy of it. What rows must fulfil is checked by whoever counts them; types and nulls are
checked here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ..errors import InputError
from ..outcomes import CODES, NOT_JUDGED
from . import folders, parquet
from .rollouts import Rollouts, is_aligned

__all__ = ["Batch", "Stream", "stream"]

TOKENS = 1 << 21  # tokens of a batch, about
MOST_ROWS = 1 << 17
PLAIN = {name: parquet.TYPES[name] for name in parquet.REQUIRED}
WORDS = ("category", "outcome")


@dataclass(frozen=True, eq=False)
class Batch:
    """Some rollouts; the attributes are those of `Rollouts`.

    Parameters
    ----------
    tokens, offsets : int array, shape (total,) and (n + 1,)
    prompt_id, prefill, outcome, hit : int array, shape (n,)
    category : str array, shape (n,)
    columns : dict of str to array
    shard : Path
        Where they come from.
    first : int
        Row of the first of them in that file.
    """

    tokens: np.ndarray
    offsets: np.ndarray
    prompt_id: np.ndarray
    category: np.ndarray
    prefill: np.ndarray
    outcome: np.ndarray
    hit: np.ndarray
    columns: dict[str, np.ndarray]
    shard: Path
    first: int

    def __len__(self) -> int:
        return len(self.prompt_id)


@dataclass(frozen=True, eq=False)
class Stream:
    """Rollouts on disk that were opened, not read.

    Attributes
    ----------
    shards : tuple of Path
        The files, in the order in which they are read.
    rows, tokens : int
        Rollouts and token ids (forced ones included) in them.
    columns : tuple of str
        Optional columns that every shard has, and ``weight`` if any has it (a missing one counts as 1).
    skipped : dict of str to str
        Names of damaged shards that were left out on request, and what is wrong with each.
    note : str
        What is missing, if it is a folder of an unfinished run.
    """

    shards: tuple[Path, ...]
    rows: int
    tokens: int
    columns: tuple[str, ...]
    skipped: dict[str, str] = field(default_factory=dict)
    note: str = ""

    def batches(self, columns: Sequence[str] = (), tokens: int | None = None) -> Iterator[Batch]:
        """All rollouts in order.

        Parameters
        ----------
        columns : sequence of str
            Optional columns to read, those of `columns` that are needed.
        tokens : int, optional
            Token ids of a batch, about; two million if not given.

        Raises
        ------
        InputError
            If a shard is damaged or a column has another type; names the file.
        """
        for shard in self.shards:
            first = 0
            for table in _tables(shard, columns, TOKENS if tokens is None else tokens):
                try:
                    batch = _batch(table, shard, first)
                except InputError as error:
                    raise InputError(
                        f"{shard}, rows from {first} on: {error.fact}", cause=error.cause, next=error.next
                    ) from error
                first += len(batch)
                yield batch

    def largest_token(self) -> int:
        """The largest token id, by the statistics in the files, or by reading the tokens of those without; -1: none."""
        found = [_largest(shard) for shard in self.shards]
        return max(found, default=-1)


def stream(path: str | Path, *, skip_corrupt: bool = False) -> Stream:
    """Open rollouts for reading batch by batch.

    Parameters
    ----------
    path : str or Path
        A Parquet file, or a folder with ``part-*.parquet``.
    skip_corrupt : bool
        Decode every shard once before anything is read from it, and leave out the damaged ones, which
        `Stream.skipped` names. It costs a second decoding.

    Raises
    ------
    InputError
        Nothing there, a shard is damaged or lost (and was not to be skipped), all are, a required column is missing, or
        shards are of different tokenizers or runs; as for `read_rollouts`.
    """
    path = Path(path)
    folder = path.is_dir()
    manifest = folders._manifest(path) if folder else None
    shards = sorted(path.glob("part-*.parquet")) if folder else [path]
    if not shards or not shards[0].is_file():
        raise InputError(
            f"{path} holds no Parquet rollouts",
            cause="it is neither a Parquet file nor a folder with part-*.parquet",
            next="give what write_rollouts or sample(..., out=folder) wrote",
        )
    expected: dict[str, int | None] = {} if manifest is None else manifest["expected"]
    known: dict[Path, _Facts] = {}
    bad: dict[str, str] = {}
    for shard in shards:
        try:
            known[shard] = _facts(shard, None if manifest is None else expected, skip_corrupt)
        except InputError as error:
            if not folder:
                raise
            bad[shard.name] = f"{error.fact}: {error.cause}"
    missing = sorted({*expected} - {shard.name for shard in shards})
    if manifest and manifest.get("finished"):
        bad |= dict.fromkeys(missing, "it is gone, though the manifest says that the run was finished")
        missing = []
    folders._one_run(path, cast(Any, {shard.name: facts for shard, facts in known.items()}), manifest)
    if bad and not (skip_corrupt and known):
        raise folders._damaged(path, bad, Rollouts.concat([]), skip_corrupt)
    names = [facts.optional for facts in known.values()]
    common = set.intersection(*names) | ({"weight"} & set.union(*names))
    rows, total = (sum(getattr(facts, name) for facts in known.values()) for name in ("rows", "tokens"))
    note = f"unfinished run: {rows} rollouts, {len(missing)} of {len(expected)} shards missing" if missing else ""
    return Stream(tuple(known), rows, total, tuple(sorted(common)), bad, note)


@dataclass(frozen=True)
class _Facts:
    """What a shard says of itself."""

    rows: int
    tokens: int
    optional: set[str]
    provenance: dict[str, Any]


def _open(shard: Path) -> pq.ParquetFile:
    return pq.ParquetFile(
        shard, read_dictionary=list(WORDS), page_checksum_verification=True, pre_buffer=False, buffer_size=1 << 20
    )


def _facts(shard: Path, expected: dict[str, int | None] | None, decode: bool) -> _Facts:
    """Facts of a shard that is whole as far as its own words go, or, with `decode`, as far as it can be decoded."""
    try:
        with _open(shard) as file:
            meta, schema = file.metadata, file.schema_arrow
            names = set(schema.names)
            note = (schema.metadata or {}).get(parquet.METADATA_KEY)
            tokens = sum(_column(group, "tokens").num_values for group in _groups(meta)) if "tokens" in names else 0
    except Exception as error:  # a damaged file can fail anywhere in the decoder, and with any exception
        raise _damaged(shard, error) from error
    missing = [name for name in parquet.REQUIRED if name not in names]
    if missing:
        raise InputError(
            f"{shard} has no column {', '.join(missing)}",
            cause=f"its columns are {', '.join(sorted(names)) or 'none'}",
            next=f"rollouts need {', '.join(parquet.REQUIRED)}; rename or add them",
        )
    size = None if expected is None else expected.get(shard.name, -1)
    if size is not None and size != meta.num_rows:
        told = f"{size} rollouts" if size >= 0 else "no such shard"
        raise InputError(
            f"{shard} is damaged", cause=f"it has {meta.num_rows}, the manifest {told}", next="move or delete it"
        )
    if decode:
        for table in _tables(shard, (), TOKENS):
            _batch(table, shard, 0)
    optional = {name for name in names if name == "weight" or is_aligned(name)}
    return _Facts(meta.num_rows, tokens, optional, parquet._provenance(note))


def _damaged(shard: Path, error: Exception) -> InputError:
    return InputError(
        f"{shard} cannot be read as Parquet",
        cause=f"it is damaged, cut short or of another format: {str(error).strip() or type(error).__name__}",
        next="write or copy it again",
    )


def _groups(meta: pq.FileMetaData) -> Iterator[Any]:
    return (meta.row_group(i) for i in range(meta.num_row_groups))


def _column(group: Any, name: str) -> Any:
    columns = (group.column(i) for i in range(group.num_columns))
    return next(column for column in columns if column.path_in_schema.split(".")[0] == name)


def _largest(shard: Path) -> int:
    with _open(shard) as file:
        found = [_column(group, "tokens").statistics for group in _groups(file.metadata)]
    if all(s is not None and s.has_min_max for s in found):
        return max((int(s.max) for s in found), default=-1)
    return max(
        (int(np.max(parquet._rollouts(table, {}).tokens, initial=-1)) for table in _tables(shard, (), TOKENS)),
        default=-1,
    )


def _tables(shard: Path, columns: Sequence[str], tokens: int) -> Iterator[pa.Table]:
    """Pieces of a shard with the required and some optional columns."""
    try:
        with _open(shard) as file:
            meta = file.metadata
            held = sum(_column(group, "tokens").num_values for group in _groups(meta))
            rows = min(max(tokens * meta.num_rows // max(held, 1), 1), MOST_ROWS)
            here = [name for name in (*parquet.REQUIRED, *columns) if name in file.schema_arrow.names]
            for batch in file.iter_batches(rows, columns=here, use_threads=False):
                if len(batch):
                    batch.validate(full=True)
                    yield pa.Table.from_batches([batch])
    except InputError:
        raise
    except Exception as error:
        raise _damaged(shard, error) from error


def _batch(table: pa.Table, shard: Path, first: int) -> Batch:
    plain = all(_type(table, name) == kind for name, kind in PLAIN.items())
    lists = table.column("tokens").chunk(0) if plain else None
    ids = None if lists is None else lists.flatten()
    nulls = plain and any(table.column(name).null_count for name in PLAIN if name not in ("outcome", "hit"))
    hit = None if ids is None or ids.null_count or nulls else table.column("hit").fill_null(-1).to_numpy()
    codes = None if hit is None else _codes(table)
    aligned = [name for name in table.column_names if is_aligned(name)]
    if lists is None or ids is None or hit is None or codes is None or aligned:
        # Types of another program, nulls, unknown words, a number per token: converted row by row, or refused.
        r = parquet._rollouts(table, {})
        told = r.prompt_id, np.asarray(r.category, dtype=str), r.prefill, r.outcome, r.hit
        return Batch(r.tokens, r.offsets, *told, r.columns, shard, first)
    offsets = lists.offsets.to_numpy().astype(np.int64)
    offsets -= offsets[0]
    scalars = table.column("prompt_id").to_numpy(), _words(table), table.column("prefill").to_numpy(), codes, hit
    columns = {"weight": table.column("weight").to_numpy()} if "weight" in table.column_names else {}
    return Batch(ids.to_numpy(), offsets, *scalars, columns, shard, first)


def _type(table: pa.Table, name: str) -> pa.DataType:
    kind = table.column(name).type
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def _words(table: pa.Table) -> np.ndarray:
    part = _dictionary(table, "category")
    return np.asarray(part.dictionary.to_pylist(), dtype=str)[part.indices.to_numpy()]


def _codes(table: pa.Table) -> np.ndarray | None:
    """Outcome codes, -1 where there is none; None if a word is unknown."""
    part = _dictionary(table, "outcome")
    names = part.dictionary.to_pylist()
    if any(name not in CODES for name in names):
        return None
    codes = np.array([*(CODES[name] for name in names), NOT_JUDGED], dtype=np.int8)
    return codes[part.indices.fill_null(len(names)).to_numpy()]


def _dictionary(table: pa.Table, name: str) -> Any:
    """A column of few distinct texts as indices into these."""
    column = table.column(name)
    part = column if pa.types.is_dictionary(column.type) else column.dictionary_encode()
    return part.chunk(0) if part.num_chunks == 1 else part.combine_chunks()
