"""One process of the counting benchmark: reads an order from standard input, writes one row to standard output."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq

from ..chains import KGram, count, pool
from ..rollouts import read_rollouts, write_rollouts
from ..rollouts.parquet import REQUIRED
from ..rollouts.streaming import stream
from .measure import peak_memory, pin

__all__ = ["main"]

WARM = 200
"""Rollouts that are counted before the clock starts."""


def _decode(folder: Path, _: Path) -> str:
    many = 0
    for shard in sorted(folder.glob("part-*.parquet")):
        with pq.ParquetFile(shard, page_checksum_verification=True) as file:
            for batch in file.iter_batches(1 << 12, columns=list(REQUIRED), use_threads=False):
                many += len(batch.column("tokens").values)
    return f"{many:,} tokens"


def _read(folder: Path, _: Path) -> str:
    return f"{sum(len(batch) for batch in stream(folder).batches()):,} rollouts"


def _pool(folder: Path, _: Path) -> str:
    found = pool(folder, KGram(1))
    return f"{len(found.contexts):,} states, {len(found.symbols):,} cells"


def _count(folder: Path, _: Path) -> str:
    found = count(folder, KGram(1))
    return f"{len(found.states):,} states, {len(found.transitions.source):,} cells by prompt"


def _spill(folder: Path, work: Path) -> str:
    found = pool(folder, KGram(5), out=work / "table", memory=400 << 20)
    return f"{len(found.contexts):,} states, {len(found.symbols):,} cells"


WAYS: dict[str, Callable[[Path, Path], str]] = {
    "decode": _decode,
    "read": _read,
    "pool": _pool,
    "count": _count,
    "spill": _spill,
}


def main() -> None:
    order = json.loads(sys.stdin.read())
    pin()
    folder, work, way = Path(order["folder"]), Path(order["folder"]) / order["what"], WAYS[order["what"]]
    shards = sorted((folder / "shards").glob("part-*.parquet"))
    few, some = work / "few", work / "some"
    for place in (few, some):
        place.mkdir(parents=True)
    write_rollouts(read_rollouts(shards[0])[:WARM], few / "part-00000.parquet")
    held = 0
    for shard in shards:
        if held < order["tokens"]:
            os.link(shard, some / shard.name)
            held += sum(len(batch.tokens) for batch in stream(shard).batches())
    way(few, few)  # compiles, and loads what is loaded late
    peak_memory(reset=True)  # the shard that the few were taken from was read whole
    wall, seconds = time.perf_counter(), time.process_time()
    found = way(some, work)
    wall, seconds = time.perf_counter() - wall, time.process_time() - seconds
    peak = peak_memory()  # of this program: what getrusage says begins with the parent's
    row = {"tokens": held, "seconds": seconds, "wall": wall, "per_second": held / seconds, "peak": peak, "found": found}
    print(json.dumps(row))


if __name__ == "__main__":
    main()
