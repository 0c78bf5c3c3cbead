"""Rollouts in Parquet: one row per rollout, provenance as JSON in the schema's metadata.

Required columns: prompt_id (int64), category (string), tokens (list<int32>), prefill (int32), outcome (string, null =
not judged), hit (int32, null = none). Files of other programs are accepted with any integer, list and string type that
says the same; what contradicts itself is refused with the file, the column and the first bad row (counted from 0).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ..errors import InputError
from ..files import atomic
from ..outcomes import CODES, NOT_JUDGED, OUTCOMES
from .rollouts import SCALARS, Ragged, Rollouts, is_aligned

__all__ = ["METADATA_KEY", "read_rollouts", "write_rollouts"]

METADATA_KEY = b"markovsafety"
FORMAT = 1
REQUIRED = ("prompt_id", "category", "tokens", "prefill", "outcome", "hit")
ROWS = 1 << 17  # rollouts per row group: list offsets are int32, and a reader needs one group in memory at a time
LARGEST_ID = 2**31 - 1
IDS = pa.list_(pa.int32())
STRINGS = (pa.string(), pa.large_string(), pa.string_view())
TYPES = {
    "prompt_id": pa.int64(),
    "category": pa.string(),
    "tokens": IDS,
    "prefill": pa.int32(),
    "outcome": pa.string(),
    "hit": pa.int32(),
    "prompt_tokens": IDS,
    "weight": pa.float64(),
    "seed": pa.int64(),
    "text": pa.string(),
    "raw": pa.string(),
}


def write_rollouts(rolls: Rollouts, path: str | Path) -> Path:
    """Write rollouts to one Parquet file; the file is either whole or not there.

    Parameters
    ----------
    rolls : Rollouts
    path : str or Path
        Replaced if it exists; its folder is made if needed.

    Returns
    -------
    Path

    Raises
    ------
    InputError
        These are no rollouts, the file cannot be written, the provenance is not JSON, or a text is not Unicode.

    Examples
    --------
    >>> import pyarrow.parquet as pq
    >>> ended = {"outcome": ["harm", "refusal"], "hit": [1, 0]}
    >>> rolls = ms.Rollouts.of([[5, 9], [7, 2]], prompt_id=[0, 1], **ended)
    >>> path = ms.write_rollouts(rolls, "run/shallow.parquet")
    >>> pq.read_table(path).column_names
    ['prompt_id', 'category', 'tokens', 'prefill', 'outcome', 'hit']
    """
    if not isinstance(rolls, Rollouts):
        raise InputError(
            f"{type(rolls).__name__} cannot be written as rollouts",
            cause="the first argument must be Rollouts, the second the path",
            next="Rollouts.of(answers, prompt_id=...) makes them from lists of token ids",
        )
    try:
        note = json.dumps({"format": FORMAT, "provenance": rolls.provenance}, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise InputError(
            "the provenance of the rollouts cannot be kept",
            cause=str(error),
            next="use JSON values, no nan, no arrays",
        ) from error
    fields = {name: TYPES[name] for name in REQUIRED}
    fields |= {name: TYPES.get(name, pa.list_(pa.float32())) for name in rolls.columns}
    schema = pa.schema(list(fields.items()), metadata={METADATA_KEY: note.encode()})
    options: dict[str, Any] = {"compression": "zstd", "write_page_checksum": True}
    with atomic(path) as part, pq.ParquetWriter(part, schema, **options) as writer:
        for start in range(0, len(rolls), ROWS):
            writer.write_table(_table(rolls[start : start + ROWS] if len(rolls) > ROWS else rolls, schema))
    return Path(path)


def _table(rolls: Rollouts, schema: pa.Schema) -> pa.Table:
    names = np.array([*OUTCOMES, None], dtype=object)  # code -1 picks the last entry: null
    arrays: dict[str, Any] = {
        "prompt_id": pa.array(rolls.prompt_id),
        "category": _strings("category", rolls.category),
        "tokens": _lists(Ragged(rolls.tokens, rolls.offsets)),
        "prefill": pa.array(rolls.prefill),
        "outcome": pa.array(names[rolls.outcome], pa.string()),
        "hit": pa.array(rolls.hit, mask=rolls.hit < 0),
    }
    for name, value in rolls.columns.items():
        if isinstance(value, Ragged):
            arrays[name] = _lists(value)
        elif is_aligned(name):
            arrays[name] = _lists(Ragged(value, rolls.offsets))
        else:
            arrays[name] = _strings(name, value) if SCALARS[name] is object else pa.array(value)
    return pa.table([arrays[name] for name in schema.names], schema=schema)


def _lists(rows: Ragged) -> pa.Array:
    return pa.ListArray.from_arrays(pa.array(rows.offsets.astype(np.int32)), pa.array(rows.flat))


def _strings(name: str, values: np.ndarray) -> pa.Array:
    try:
        return pa.array(values, pa.string())
    except UnicodeEncodeError as error:
        raise InputError(
            f"column {name} holds text that is not Unicode", cause=str(error), next="replace the lone surrogates"
        ) from error


def read_rollouts(path: str | Path, *, template: Any = None, skip_corrupt: bool = False) -> Rollouts:
    """Read rollouts from a Parquet file, a folder of shards, or a JSONL log.

    Parameters
    ----------
    path : str or Path
        A file, or a folder with ``part-*.parquet`` as `sample` writes it; ``*.jsonl`` goes through `replay`.
    template : Template or model folder, optional
        Needed for a log that holds text instead of token ids.
    skip_corrupt : bool
        Leave out the shards of a folder that are damaged or lost; ``provenance["skipped"]`` names them and says why.

    Returns
    -------
    Rollouts
        Of an unfinished run, or without the shards that were skipped: what is there, with ``provenance["complete"]``
        False and a sentence in ``provenance["note"]``.

    Notes
    -----
    A benign answer is one that ended by itself, so its hit is its last token: where a file of another program leaves
    that hit null, it is filled in. The hit of harm and refusal cannot be known from the outcome and must be there.

    Raises
    ------
    InputError
        Nothing there, not Parquet, columns missing or of the wrong type, or rows that contradict themselves; names the
        file, the column and the first bad row. Of a folder: shards that are damaged, lost, or of another run, tokenizer
        or chat template; ``partial`` holds the rollouts of the others.

    Examples
    --------
    >>> ended = {"outcome": ["harm", "refusal"], "hit": [1, 0]}
    >>> rolls = ms.Rollouts.of([[5, 9], [7, 2]], prompt_id=[0, 1], **ended)
    >>> ms.read_rollouts(ms.write_rollouts(rolls, "run.parquet"))
    Rollouts(2 of 2 prompts, prefill 0: 1 harm, 1 refusal)

    A log of another program:

    >>> with open("log.jsonl", "w") as log:
    ...     print('{"prompt_id": 0, "tokens": [5, 9, 2], "outcome": "harm", "hit": 1}', file=log)
    ...     print('{"prompt_id": 1, "tokens": [5, 2], "outcome": "benign"}', file=log)
    >>> ms.read_rollouts("log.jsonl")
    Rollouts(2 of 2 prompts, prefill 0: 1 harm, 1 benign)
    """
    if not isinstance(path, str | Path):
        raise InputError(
            f"{type(path).__name__} is no path of rollouts",
            cause="rollouts are read from a file or folder",
            next="give its path; lists of token ids become rollouts by Rollouts.of",
        )
    path = Path(path)
    if path.is_dir():
        from .folders import read_folder

        return read_folder(path, skip_corrupt)
    if not path.is_file():
        raise InputError(
            f"{path} does not exist",
            cause="there is neither a file nor a folder of that name",
            next="give a Parquet file, a folder of shards, or a JSONL log",
        )
    if path.suffix in (".jsonl", ".ndjson"):
        from .engines.replay import replay

        return replay(path, template=template)
    return read_parquet(path)


def read_parquet(path: Path) -> Rollouts:
    """One Parquet file, its columns checked."""
    try:
        file = pq.ParquetFile(path, page_checksum_verification=True)
        names = file.schema_arrow.names
        known = [name for name in names if name in TYPES or is_aligned(name)]
        missing = [name for name in REQUIRED if name not in names]
        table = None if missing else file.read(columns=known)
        if table is not None:
            table.validate(full=True)
        metadata = (file.schema_arrow.metadata or {}).get(METADATA_KEY)
    except Exception as error:  # a damaged file can fail anywhere in the decoder, and with any exception
        raise InputError(
            f"{path} cannot be read as Parquet",
            cause=f"it is damaged, cut short or of another format: {str(error).strip() or type(error).__name__}",
            next="write or copy it again",
        ) from error
    if table is None:
        raise InputError(
            f"{path} has no column {', '.join(missing)}",
            cause=f"its columns are {', '.join(names) or 'none'}",
            next=f"rollouts need {', '.join(REQUIRED)}; rename or add them",
        )
    try:
        ignored = sorted(set(names) - set(known))
        provenance = _provenance(metadata) | ({"ignored_columns": ignored} if ignored else {})
        return _rollouts(table, provenance)
    except InputError as error:
        raise InputError(f"{path}: {error.fact}", cause=error.cause, next=error.next) from error


def _provenance(metadata: bytes | None) -> dict[str, Any]:
    if metadata is None:
        return {}
    try:
        note = json.loads(metadata)
        version, provenance = int(note["format"]), dict(note["provenance"])
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise InputError("the provenance is damaged", cause=str(error), next="write the file again") from error
    if version > FORMAT:
        raise InputError(
            f"format {version} is newer than {FORMAT}",
            cause="the file was written by a later version",
            next="update markovsafety",
        )
    return provenance


def _rollouts(table: pa.Table, provenance: dict[str, Any]) -> Rollouts:
    tokens = _ragged(table, "tokens", pa.types.is_integer)
    columns: dict[str, Any] = {}
    for name in table.column_names:
        if name in REQUIRED:
            continue
        if name == "prompt_tokens":
            columns[name] = _ragged(table, name, pa.types.is_integer)
        elif is_aligned(name):
            rows = _ragged(table, name, pa.types.is_floating)
            bad = np.flatnonzero(rows.offsets != tokens.offsets)
            if len(bad):
                raise InputError(
                    f"column {name}, row {bad[0] - 1}: not one number per token",
                    cause="the list is longer or shorter than the tokens of the same row",
                    next="give one number per token, nan at forced ones",
                )
            columns[name] = rows.flat.astype(np.float32)
        elif SCALARS[name] is object:
            columns[name] = _text(table, name, nullable=True)
        else:
            columns[name] = _numbers(table, name)
    outcome, hit = _outcomes(table), _numbers(table, "hit", null=-1)
    ended = (outcome == CODES["benign"]) & (hit < 0)
    return Rollouts(
        tokens.flat,
        tokens.offsets,
        prompt_id=_numbers(table, "prompt_id"),
        category=_text(table, "category"),
        prefill=_numbers(table, "prefill"),
        outcome=outcome,
        hit=np.where(ended, np.diff(tokens.offsets) - 1, hit),
        columns=columns,
        provenance=provenance,
    )


def _wrong_type(name: str, found: Any, wanted: str) -> InputError:
    return InputError(f"column {name} has type {found}", cause=f"it should be {wanted}", next="cast it before writing")


def _no_nulls(column: pa.ChunkedArray, name: str) -> None:
    if column.null_count:
        row = int(np.flatnonzero(column.is_null().to_numpy())[0])
        raise InputError(
            f"column {name}, row {row}: the value is missing",
            cause="null is not allowed in this column",
            next="fill it or drop the row",
        )


def _numbers(table: pa.Table, name: str, null: int | None = None) -> np.ndarray:
    """A column of numbers; `null` stands for a missing one where one may be missing."""
    column, wanted = table.column(name), TYPES[name]
    if pa.types.is_null(column.type) and (null is not None or len(column) == 0):
        return np.full(len(column), null or 0, np.int64)
    real = pa.types.is_floating(column.type)
    if not (pa.types.is_integer(column.type) or (real and (null is not None or pa.types.is_floating(wanted)))):
        raise _wrong_type(name, column.type, f"{wanted}{', null allowed' if null is not None else ''}")
    if null is None:
        _no_nulls(column, name)
        return column.to_numpy()
    if real:  # a column of integers with nulls that passed through pandas comes as floats with nan
        values = column.fill_null(np.nan).to_numpy()
        whole = np.isnan(values) | (values == np.floor(values))
        if not whole.all():
            row = int(np.argmin(whole))
            raise InputError(
                f"column {name}, row {row}: {values[row]} is no index",
                cause="a token is named by its whole position in the answer",
                next="give whole numbers",
            )
        return np.where(np.isnan(values), null, values).astype(np.int64)
    values, there = column.fill_null(0).to_numpy(), ~column.is_null().to_numpy()
    negative = (values < 0) & there
    if negative.any():
        row = int(negative.argmax())
        raise InputError(
            f"column {name}, row {row}: {values[row]} is negative",
            cause="an index counts from 0",
            next="use null for none",
        )
    return np.where(there, values.astype(np.int64), null)


def _text(table: pa.Table, name: str, nullable: bool = False) -> np.ndarray:
    column = table.column(name)
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    kind = column.type
    if not (kind in STRINGS or (pa.types.is_null(kind) and (nullable or len(column) == 0))):
        raise _wrong_type(name, kind, f"string{', null allowed' if nullable else ''}")
    if not nullable:
        _no_nulls(column, name)
    array = np.empty(len(column), dtype=object)
    array[:] = column.to_pylist()
    return array


def _outcomes(table: pa.Table) -> np.ndarray:
    names = _text(table, "outcome", nullable=True)
    codes = {**CODES, None: NOT_JUDGED}
    unknown = [row for row, name in enumerate(names) if name not in codes]
    if unknown:
        raise InputError(
            f"column outcome, row {unknown[0]}: unknown outcome {names[unknown[0]]!r}",
            cause=f"known are {', '.join(OUTCOMES)}, and null for not judged",
            next="rename the outcomes",
        )
    return np.array([codes[name] for name in names], dtype=np.int8)


def _ragged(table: pa.Table, name: str, is_value: Any) -> Ragged:
    column = table.column(name)
    kind = column.type
    if pa.types.is_null(kind) and len(column) == 0:
        return Ragged.of([])
    lists = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list, pa.types.is_list_view)
    value = kind.value_type if any(is_list(kind) for is_list in (*lists, pa.types.is_large_list_view)) else None
    # A writer that saw only empty lists may give them no type of their own.
    if value is None or not (is_value(value) or pa.types.is_null(value)):
        raise _wrong_type(name, kind, str(TYPES.get(name, pa.list_(pa.float32()))))
    _no_nulls(column, name)
    lengths = pc.call_function("list_value_length", [column]).to_numpy().astype(np.int64)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    flat = [chunk.flatten() for chunk in column.chunks]
    nulls = np.concatenate([np.zeros(0, bool), *(part.is_null().to_numpy(zero_copy_only=False) for part in flat)])
    if nulls.any() and is_value is pa.types.is_integer:
        row = int(np.searchsorted(offsets, nulls.argmax(), side="right")) - 1
        raise InputError(
            f"column {name}, row {row}: an id is missing", cause="null stands among the token ids", next="drop the row"
        )
    values = [part.to_numpy(zero_copy_only=False) for part in flat]
    if is_value is not pa.types.is_integer:
        return Ragged(np.concatenate([np.empty(0, np.float32), *values]), offsets)
    outside = np.concatenate([np.zeros(0, bool), *((ids < 0) | (ids > LARGEST_ID) for ids in values)])
    if outside.any():
        row = int(np.searchsorted(offsets, outside.argmax(), side="right")) - 1
        raise InputError(
            f"column {name}, row {row}: an id outside [0, {LARGEST_ID}]",
            cause="token ids are 31-bit numbers",
            next="give the tokenizer's ids",
        )
    return Ragged(np.concatenate([np.empty(0, np.int32), *(ids.astype(np.int32) for ids in values)]), offsets)
