"""Rollouts that need not fit in memory: Parquet shards, read batch by batch and only the columns that are asked for.

A batch holds whole rollouts in flat arrays under the names of `Rollouts`, which is what `count` reads. The token ids
are Arrow's own buffer, not a copy of it. What rows must fulfil is checked by whoever counts them; types and nulls are
checked here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ..errors import InputError
from ..outcomes import CODES, NOT_JUDGED
from . import folders, parquet
from .rollouts import Rollouts, is_aligned

__all__ = ["Batch", "Stream", "stream"]

TOKENS = 1 << 21  # tokens of a batch, about
MOST_ROWS = 1 << 17
FEW = 256  # rollouts whose length says how many make a batch
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
    sizes : tuple of int
        Rollouts in each of them.
    columns : tuple of str
        Optional columns that every shard has, and ``weight`` if any has it (a missing one counts as 1).
    skipped : dict of str to str
        Names of damaged shards that were left out on request, and what is wrong with each.
    note : str
        What is missing, if it is a folder of an unfinished run.
    warnings : tuple of str
        What the files themselves say is to be known of them.
    """

    shards: tuple[Path, ...]
    sizes: tuple[int, ...]
    columns: tuple[str, ...]
    skipped: dict[str, str] = field(default_factory=dict)
    note: str = ""
    warnings: tuple[str, ...] = ()

    @property
    def rows(self) -> int:
        """Rollouts in all shards."""
        return sum(self.sizes)

    def parts(self, most: int) -> list[Stream]:
        """The same rollouts in at most so many streams, some shards each; what is read of a shard is that of the whole.

        Paths become absolute, so that processes elsewhere find the files.
        """
        count = min(most, len(self.shards))
        shards = [shard.absolute() for shard in self.shards]
        return [replace(self, shards=tuple(shards[i::count]), sizes=self.sizes[i::count]) for i in range(count)]

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
            for table in _tables(shard, (*parquet.REQUIRED, *columns), TOKENS if tokens is None else tokens):
                try:
                    batch = _batch(table, shard, first)
                except InputError as error:
                    raise InputError(
                        f"{shard}, rows from {first} on: {error.fact}", cause=error.cause, next=error.next
                    ) from error
                first += len(batch)
                yield batch

    def largest_token(self) -> int:
        """The largest token id, by reading all of them; -1: none."""
        found = [_largest(shard) for shard in self.shards]
        return max(found, default=-1)


def stream(path: str | Path, *, skip_corrupt: bool = False) -> Stream:
    """Open rollouts for reading batch by batch.

    Parameters
    ----------
    path : str or Path
        A Parquet file, or a folder with ``part-*.parquet``.
    skip_corrupt : bool
        Decode every shard once before anything is read from it, all of its columns, and leave out the damaged ones,
        which `Stream.skipped` names. It costs a second decoding.

    Raises
    ------
    InputError
        Nothing there, a shard is damaged or lost (and was not to be skipped), all are, a required column is missing, or
        shards are of different tokenizers or runs; as for `read_rollouts`.
    """
    path = Path(path)
    folder = path.is_dir()
    manifest = folders.read_manifest(path) if folder else None
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
    folders.one_run(path, cast(Any, {shard.name: facts for shard, facts in known.items()}), manifest)
    if bad and not (skip_corrupt and known):
        raise folders.damaged(path, bad, Rollouts.concat([]), skip_corrupt)
    names = [facts.optional for facts in known.values()]
    common = set.intersection(*names) | ({"weight"} & set.union(*names))
    sizes = tuple(facts.rows for facts in known.values())
    note = f"unfinished run: {sum(sizes)} rollouts, {len(missing)} of {len(expected)} shards missing" if missing else ""
    warnings = dict.fromkeys(text for facts in known.values() for text in _warnings(facts.provenance))
    return Stream(tuple(known), sizes, tuple(sorted(common)), bad, note, tuple(warnings))


def _warnings(provenance: dict[str, Any]) -> list[str]:
    more = provenance.get("warnings")
    told = (provenance.get("note"), *(more if isinstance(more, list) else ()))
    return [text for text in told if isinstance(text, str) and text]


@dataclass(frozen=True)
class _Facts:
    """What a shard says of itself."""

    rows: int
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
        for table in _tables(shard, [name for name in names if name in parquet.TYPES or is_aligned(name)], TOKENS):
            parquet._rollouts(table, {})
    optional = {name for name in names if name == "weight" or is_aligned(name)}
    return _Facts(meta.num_rows, optional, parquet._provenance(note))


def _damaged(shard: Path, error: Exception) -> InputError:
    return InputError(
        f"{shard} cannot be read as Parquet",
        cause=f"it is damaged, cut short or of another format: {str(error).strip() or type(error).__name__}",
        next="write or copy it again",
    )


def _largest(shard: Path) -> int:
    """By its tokens: statistics in the file may say anything, and damaged ones end the process in Arrow 26."""
    found = -1
    for table in _tables(shard, ("tokens",), TOKENS):
        ids = table.column("tokens").chunk(0).flatten() if _type(table, "tokens") == parquet.IDS else None
        if ids is None or ids.null_count:
            ids = parquet._ragged(table, "tokens", pa.types.is_integer).flat
        found = max(found, int(np.max(ids, initial=-1)))
    return found


def _tables(shard: Path, names: Sequence[str], tokens: int) -> Iterator[pa.Table]:
    """Pieces of a shard with some of its columns."""
    try:
        with _open(shard) as file:
            here = [name for name in dict.fromkeys(names) if name in file.schema_arrow.names]
            first = next(file.iter_batches(FEW, columns=["tokens"], use_threads=False), None)
            each = 0 if first is None else _held(first) / max(len(first), 1)
            for batch in file.iter_batches(_rows(each, tokens), columns=here, use_threads=False):
                if len(batch):
                    batch.validate(full=True)
                    rows = _rows(_held(batch) / len(batch), 2 * tokens)  # what comes later may be longer
                    for at in range(0, len(batch), rows):
                        yield pa.Table.from_batches([batch.slice(at, rows)])
    except InputError:
        raise
    except Exception as error:
        raise _damaged(shard, error) from error


def _rows(each: float, tokens: int) -> int:
    """Rollouts of so many tokens each that go into one piece."""
    return max(min(int(tokens / max(each, 1e-9)), MOST_ROWS), 1)


def _held(batch: pa.RecordBatch) -> int:
    """Token ids in a piece; 0 if the column holds no lists, which is said elsewhere."""
    try:
        return pc.call_function("sum", [pc.call_function("list_value_length", [batch.column("tokens")])]).as_py() or 0
    except pa.ArrowNotImplementedError:
        return 0


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
