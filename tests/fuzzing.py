"""Every reader of files against damaged and hostile ones: a reader answers, or says why not, in our own words.

    python -m tests.fuzzing [--reader NAME ...] [--runs N] [--seed S] [--atheris]

A mutated input is a good file with some damage: bytes that flipped, a tail that is missing, a JSON value or an array of
an archive in place of another. Damage is done inside the container too (numbers of an .npz, columns of a Parquet file,
words of a safetensors header), for a checksum would stop anything else at the door. Nothing but a `MarkovsafetyError`
may come out, nothing may take longer than `PATIENCE` seconds, and the memory of the process is limited, so that a file
that claims to be huge is found. ``--atheris`` lets coverage of the package steer the damage instead of chance alone.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import resource
import signal
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from markovsafety import MarkovsafetyError

PATIENCE = 20
"""Seconds after which one input counts as a hang; a good one takes milliseconds."""
MEMORY = 3 << 30
"""Bytes of address space that inputs may add to what the process has."""
ODD: tuple[Any, ...] = (
    *(None, True, False, -1, 0, 1, 2, 7, 2**31, 2**63, -(2**63), 10**30, 0.5, -0.0, 1e308, float("nan"), float("inf")),
    *("", "a", "harm", "\u0000", "\ud800", "é" * 300, "1e999", "<script>", "../..", [], {}, [[]], [None], {"": None}),
)
NUMBERS = (0, 1, -1, 2, 127, 255, 2**15, 2**31 - 1, 2**31, -(2**31), 2**53, 2**62, 2**63 - 1, -(2**63))
REALS = (0.0, -0.0, 1.0, -1.0, 0.5, 1e-320, 1e308, np.nan, np.inf, -np.inf)
DTYPES = ("int8", "int32", "int64", "uint64", "float16", "float32", "float64", "bool", "complex128", "S3", "U3")


class Hang(BaseException):
    """An input took too long; no handler of the package catches it."""


@dataclass(frozen=True)
class Reader:
    """What reads a kind of file.

    Parameters
    ----------
    name : str
    file : str
        Name of the file that is written; in a folder beside the others.
    seeds : list of bytes
        Good files.
    read : callable of Path
    mutate : callable of (bytes, random.Random) -> bytes
        Damage inside the container; bytes are damaged as well.
    """

    name: str
    file: str
    seeds: list[bytes]
    read: Callable[[Path], Any]
    mutate: Callable[[bytes, random.Random], bytes]


# ---------------------------------------------------------------------------------------------------------- mutations


def damage_bytes(data: bytes, rng: random.Random) -> bytes:
    """A few bytes changed, lost, doubled or added."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4, 16))):
        at, size = rng.randrange(len(out) + 1), rng.choice((1, 1, 2, 4, 8, 64, 1024))
        kind = rng.randrange(6)
        if kind == 0 and out:
            out[at % len(out)] ^= 1 << rng.randrange(8)
        elif kind == 1 and out:
            out[at % len(out)] = rng.choice((0, 1, 127, 128, 255, 34, 44, 91, 123))
        elif kind == 2:
            del out[at : at + size]
        elif kind == 3:
            out[at:at] = out[at : at + size]
        elif kind == 4:
            out[at:at] = rng.randbytes(size)
        else:
            del out[at:]
    return bytes(out)


def damage_json(value: Any, rng: random.Random, depth: int = 0) -> Any:
    """One value of a tree replaced, lost, doubled or renamed."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key, out = rng.choice(list(value)), dict(value)
        if rng.random() < 0.15:
            del out[key]
        elif rng.random() < 0.1:
            out[rng.choice(("", "x", key + " "))] = out.pop(key)
        else:
            out[key] = damage_json(value[key], rng, depth + 1)
        return out
    if isinstance(value, list) and value and rng.random() < 0.85:
        at, out = rng.randrange(len(value)), list(value)
        if rng.random() < 0.15:
            del out[at]
        elif rng.random() < 0.1:
            out *= 2
        else:
            out[at] = damage_json(value[at], rng, depth + 1)
        return out
    if rng.random() < 0.02:
        deep: Any = 0
        for _ in range(rng.choice((50, 5000))):
            deep = [deep]
        return deep
    if isinstance(value, int | float) and not isinstance(value, bool) and rng.random() < 0.5:
        return rng.choice((value + 1, -value, value * 10**6, value // 3, 10**400))
    return rng.choice(ODD)


def dumped(value: Any, rng: random.Random) -> bytes:
    """JSON text; what cannot be written (too deep) becomes brackets."""
    try:
        return json.dumps(value).encode("utf-8", "surrogatepass")
    except (RecursionError, ValueError):
        return b"[" * rng.choice((100, 100_000))


def damage_array(array: np.ndarray, rng: random.Random) -> np.ndarray:
    """Numbers, type, shape or length changed."""
    out = np.array(array)
    kind = rng.randrange(6)
    if kind <= 2 and out.size and out.dtype.kind in "iufb":
        flat = out.reshape(-1).copy()
        for _ in range(rng.choice((1, 1, 3))):
            drawn = rng.choice(REALS if out.dtype.kind == "f" else NUMBERS)
            with np.errstate(all="ignore"):
                flat[rng.randrange(flat.size)] = np.array(drawn).astype(out.dtype)
        return flat.reshape(out.shape)
    if kind == 3 and out.ndim:
        return out[: rng.randrange(len(out) + 1)] if len(out) else np.ones(3)
    if kind == 4:
        return rng.choice(
            (out.reshape(-1), out[None], np.zeros((0,) * out.ndim), np.concatenate([out.reshape(-1)] * 2))
        )
    try:
        with np.errstate(all="ignore"):
            return out.astype(rng.choice(DTYPES))
    except (ValueError, TypeError):
        return np.array(rng.choice((0, 1.5, "x")))


def damage_npz(data: bytes, rng: random.Random) -> bytes:
    """One array of an archive changed, lost, doubled, or its words; and packed again with good checksums."""
    with np.load(io.BytesIO(data), allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    name = rng.choice(list(arrays))
    if name in ("meta", "info"):
        words = damage_json(json.loads(str(arrays[name][()])), rng)
        arrays[name] = np.array(dumped(words, rng).decode("utf-8", "surrogatepass").replace("\ud800", "?"))
    elif rng.random() < 0.1:
        del arrays[name]
    elif rng.random() < 0.1:
        arrays[name] = arrays[rng.choice(list(arrays))]
    elif rng.random() < 0.2:
        return _damaged_member(arrays, name, rng)
    else:
        arrays[name] = damage_array(arrays[name], rng)
    out = io.BytesIO()
    np.savez(out, **arrays)
    return out.getvalue()


def _damaged_member(arrays: dict[str, np.ndarray], chosen: str, rng: random.Random) -> bytes:
    """An archive with good checksums in which one member's bytes, its header among them, are damaged."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as file:
        for name, array in arrays.items():
            member = io.BytesIO()
            np.lib.format.write_array(member, array, allow_pickle=False)
            body = member.getvalue()
            if name == chosen:
                shapes = (b"(99999999999,)", b"(-1,)", b"(2, 2)", b"()")
                begin, end = body.find(b"(", 10), body.find(b")", 10) + 1
                changed = body[:begin] + rng.choice(shapes).ljust(end - begin) + body[end:]
                body = changed if rng.random() < 0.5 and len(changed) == len(body) else damage_bytes(body, rng)
            file.writestr(f"{name}.npy", body)
    return out.getvalue()


def damage_npy(data: bytes, rng: random.Random) -> bytes:
    """A single array changed."""
    out = io.BytesIO()
    np.lib.format.write_array(out, damage_array(np.load(io.BytesIO(data)), rng), allow_pickle=False)
    return out.getvalue()


def damage_tensors(data: bytes, rng: random.Random) -> bytes:
    """An array of a safetensors file changed, or the words of its header."""
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    if rng.random() < 0.3:
        return _headed(damage_json(header, rng), data[8 + size :], rng)
    told = header.get("__metadata__", {})
    arrays = dict(load_tensors(data))
    if rng.random() < 0.5 and "about" in told:
        told = {**told, "about": dumped(damage_json(json.loads(told["about"]), rng), rng).decode("utf-8", "replace")}
    else:
        name = rng.choice(list(arrays))
        if rng.random() < 0.15:
            del arrays[name]
        else:
            drawn = np.ascontiguousarray(damage_array(arrays[name], rng))
            arrays[name] = drawn if drawn.dtype.kind in "iufb" and drawn.dtype != np.complex128 else np.ones(2, np.int8)
    return save_tensors(arrays, {str(k): str(v) for k, v in told.items()} or None)


def _headed(header: Any, body: bytes, rng: random.Random) -> bytes:
    words = dumped(header, rng)
    claimed = rng.choice((len(words), len(words), len(words), 2**40, 0))
    return claimed.to_bytes(8, "little") + words + body


def damage_document(data: bytes, rng: random.Random) -> bytes:
    """A JSON document with one value changed."""
    return dumped(damage_json(json.loads(data), rng), rng)


def damage_lines(data: bytes, rng: random.Random) -> bytes:
    """JSON lines: a value of a line changed, a line lost or doubled."""
    lines = data.splitlines()
    at = rng.randrange(len(lines))
    if rng.random() < 0.1:
        lines[at:at] = [rng.choice((b"", b"null", b"[]", b"{", b"\xff\xfe", b'{"a":1}{"b":2}'))]
    else:
        lines[at] = dumped(damage_json(json.loads(lines[at]), rng), rng)
    return b"\n".join(lines)


def damage_cells(data: bytes, rng: random.Random) -> bytes:
    """A cell of a CSV table changed, lost or added."""
    rows = [line.split(b",") for line in data.splitlines()]
    row = rng.choice(rows)
    odd = str(rng.choice(ODD)).encode("utf-8", "surrogatepass")
    if rng.random() < 0.2:
        row.pop()
    elif rng.random() < 0.2:
        row.append(odd)
    else:
        row[rng.randrange(len(row))] = rng.choice((odd, b'"', b"nan", b"-1", b"1e999", b"\x00", b""))
    return b"\n".join(b",".join(row) for row in rows)


def damage_table(data: bytes, rng: random.Random) -> bytes:
    """A column of a Parquet file changed, cast, lost or emptied, or its metadata; and written again."""
    table = pq.read_table(io.BytesIO(data))
    at = rng.randrange(table.num_columns)
    name, kind = table.column_names[at], rng.randrange(6)
    told = dict(table.schema.metadata or {})
    if kind == 0:
        table = table.drop_columns([name])
    elif kind == 1 and told:
        key = rng.choice(list(told))
        told[key] = damage_document(told[key], rng) if told[key][:1] in b"{[" else damage_bytes(told[key], rng)
        table = table.replace_schema_metadata(told)
    elif kind == 2:
        other = pa.array([rng.choice((None, "x", "1"))] * len(table), pa.string())
        table = table.set_column(at, name, other)
    else:
        values = table.column(name).to_pylist()
        for _ in range(rng.choice((1, 1, 3))):
            i = rng.randrange(len(values))
            values[i] = _damaged_value(values[i], rng)
        try:
            table = table.set_column(at, name, pa.array(values, table.column(name).type))
        except (pa.ArrowException, TypeError, OverflowError, ValueError):
            table = table.set_column(at, name, pa.nulls(len(table)))
    out = io.BytesIO()
    pq.write_table(table, out)
    return out.getvalue()


def _damaged_value(value: Any, rng: random.Random) -> Any:
    if isinstance(value, list):
        drawn = list(value)
        if drawn and rng.random() < 0.6:
            drawn[rng.randrange(len(drawn))] = rng.choice((-1, 2**31 - 1, 0, None, float("nan")))
        return rng.choice((drawn, drawn[:-1], [], None))
    return rng.choice((None, -1, 0, 2**31 - 1, 2**62, "", "harm", "x", float("nan"), 1e308))


# ------------------------------------------------------------------------------------------------------------ running


@contextmanager
def limits():
    """Address space and time are bounded for what is read inside; the alarm is set for each input."""

    def ring(*_: Any) -> None:
        raise Hang

    before, handler = resource.getrlimit(resource.RLIMIT_AS), signal.signal(signal.SIGALRM, ring)
    if sys.platform == "linux":
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, before[1]))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        resource.setrlimit(resource.RLIMIT_AS, before)


def attempt(reader: Reader, path: Path, data: bytes) -> str | None:
    """Read one input; None if all is well, otherwise what came out of it."""
    path.write_bytes(data)
    signal.setitimer(signal.ITIMER_REAL, PATIENCE)
    try:
        reader.read(path)
    except MarkovsafetyError:
        return None
    except Hang:
        return f"{reader.name}: longer than {PATIENCE} s"
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        return f"{reader.name}: {type(error).__name__}: {error}\n{traceback.format_exc(limit=-6)}"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    return None


def mutated(reader: Reader, rng: random.Random) -> bytes:
    """A good file with damage, inside the container or to its bytes, or to both."""
    data = rng.choice(reader.seeds)
    for _ in range(rng.choice((1, 1, 2, 3))):
        inside = reader.mutate if rng.random() < 0.75 else damage_bytes
        try:
            data = inside(data, rng)
        except Exception:  # it was damaged before, and nothing can be taken out of it any more
            data = damage_bytes(data, rng)
    return data


def fuzz(reader: Reader, folder: Path, runs: int, seed: int = 0, most: int = 5) -> list[str]:
    """Different findings of a number of inputs (at most `most`); every input that found one stays in the folder."""
    found: dict[str, str] = {}
    path = folder / reader.file
    good = {p: p.read_bytes() for p in folder.iterdir() if p.is_file()}
    for i in range(runs):
        rng = random.Random(f"{reader.name} {seed} {i}")
        data = mutated(reader, rng)
        told = attempt(reader, path, data)
        if told is not None:
            key = told.splitlines()[-1] if "\n" in told else told
            frames = [line for line in told.splitlines() if line.strip().startswith("File ")]
            key = frames[-1] if frames else key
            if key not in found:
                (folder / f"found-{len(found)}-{reader.file}").write_bytes(data)
                found[key] = f"input {i} of seed {seed}: {told}"
            if len(found) >= most:
                break
    for p, data in good.items():
        p.write_bytes(data)
    return list(found.values())


def steered(reader: Reader, folder: Path, runs: int, seed: int = 0) -> None:
    """The same inputs with damage that atheris steers towards new branches of the package; ends the process."""
    import atheris

    path = folder / reader.file

    def one(data: bytes) -> None:
        told = attempt(reader, path, data)
        if told is not None:
            (folder / f"found-{reader.file}").write_bytes(data)
            raise AssertionError(told)

    def change(data: bytes, most: int, drawn: int) -> bytes:
        rng = random.Random(drawn)
        if rng.random() < 0.5:
            return atheris.Mutate(data, most)
        try:
            return reader.mutate(data, rng)[:most]
        except Exception:
            return damage_bytes(data, rng)[:most]

    corpus = folder / "corpus"
    corpus.mkdir(exist_ok=True)
    for i, good in enumerate(reader.seeds):
        (corpus / f"{i}").write_bytes(good)
    longest = 4 * max(map(len, reader.seeds))
    words = ["fuzz", f"-runs={runs}", f"-seed={seed + 1}", f"-max_len={longest}", "-timeout=60", "-rss_limit_mb=6000"]
    atheris.Setup([*words, "-print_final_stats=1", str(corpus)], one, custom_mutator=change)
    atheris.Fuzz()


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--reader", nargs="*")
    parser.add_argument("--runs", type=int, default=1000, help="inputs per reader")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--atheris", action="store_true", help="one reader only")
    parser.add_argument("--keep", type=Path, help="folder for the inputs that found something")
    options = parser.parse_args()
    if options.atheris:
        import atheris

        with atheris.instrument_imports(include=["markovsafety"]):
            from fuzzed_readers import readers  # pyright: ignore[reportMissingImports]
    else:
        from fuzzed_readers import readers  # pyright: ignore[reportMissingImports]
    bad = 0
    with tempfile.TemporaryDirectory() as scratch:
        for make in readers(options.reader):
            folder = options.keep / make.__name__ if options.keep else Path(scratch) / make.__name__
            folder.mkdir(parents=True, exist_ok=True)
            reader, began = make(folder), time.monotonic()
            with limits(), warnings.catch_warnings():
                warnings.simplefilter("error")
                if options.atheris:
                    steered(reader, folder, options.runs, options.seed)
                found = fuzz(reader, folder, options.runs, options.seed)
            bad += len(found)
            speed = options.runs / max(time.monotonic() - began, 1e-9)
            print(f"{reader.name}: {options.runs} inputs, {len(found)} findings, {speed:.0f} per second", flush=True)
            for told in found:
                print(told, flush=True)
    return min(bad, 1)


if __name__ == "__main__":
    os.chdir(Path(__file__).resolve().parent)
    sys.exit(main())
