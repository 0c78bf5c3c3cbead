"""Counting more tokens than memory holds, from Parquet shards: tokens per second and core, beside decoding alone.

Every row is measured in a process of its own, pinned to one core, so that its peak memory is its own. Tokens per second
are per second of processor time: on a machine that is shared, the clock on the wall measures the others as well.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from ..errors import InputError
from ..rollouts import Rollouts, write_rollouts
from .machine import machine, versions
from .markdown import markdown_table
from .measure import environment

__all__ = ["ROWS", "corpus", "run"]

GOAL = 25e6
"""Tokens per second and core, decoding included."""
MEMORY = 1 << 30
"""Bytes that a process may take at most."""
VOCABULARY, SUCCESSORS, LENGTH, SAME = 1024, 64, 500, 20
SHARD = 40_000
"""Rollouts per shard."""
ROWS = {
    "decode": "decoding alone (pyarrow, the six columns)",
    "read": "decoding and checking (our batches)",
    "pool": "order 1, all prompts together",
    "count": "order 1, by prompt",
    "spill": "order 5, all prompts together, sorted runs on disk",
}
LARGEST = {"count": 10**7, "spill": 3 * 10**8}
"""Tokens of the rows that keep or sort more than a table."""


def run(out: str | Path | None = None, *, tokens: int = 10**9, quick: bool = False) -> dict[str, Any]:
    """Write a corpus into a temporary folder, count it in every way, and write the table.

    Parameters
    ----------
    out : path, optional
        JSON; a page of Markdown goes beside it.
    tokens : int
        Size of the corpus; a token takes 1.3 bytes on disk, and 100 bytes more while order 5 is sorted.
    quick : bool
        Two million tokens.

    Returns
    -------
    dict
        rows: what, tokens, seconds (processor), wall, per_second, peak (bytes), and what was found.

    Raises
    ------
    InputError
        If the disk has no room for it.
    """
    tokens = 2 * 10**6 if quick else tokens
    with tempfile.TemporaryDirectory(prefix="markovsafety-counting-") as name:
        folder = Path(name)
        needed = int(1.4 * tokens + 100 * min(tokens, LARGEST["spill"]))
        free = shutil.disk_usage(folder).free
        if free < needed:
            raise InputError(
                f"{folder.parent} has {free / 2**30:.1f} GB left.",
                cause=f"{tokens:,} tokens and the runs sorted from them take about {needed / 2**30:.1f} GB.",
                next="Set TMPDIR to a larger disk, or give --quick.",
            )
        size = corpus(folder / "shards", tokens)
        rows = [_measured(what, folder, min(tokens, LARGEST.get(what, tokens))) for what in tqdm(ROWS, disable=None)]
    by_name = {row["what"]: row for row in rows}
    pooled, decode = by_name["pool"], by_name["decode"]
    for row in (pooled, by_name["spill"]):
        row["met"] = bool(row["peak"] < MEMORY and (row is not pooled or row["per_second"] >= GOAL))
    result: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "versions": versions(("numpy", "numba", "pyarrow")),
        "corpus": {"tokens": tokens, "bytes": size, "vocabulary": VOCABULARY, "length": LENGTH, "per_prompt": SAME},
        "rows": rows,
    }
    result["line"] = (
        f"{pooled['tokens']:,} tokens, order 1: {pooled['per_second'] / 1e6:.1f} million tokens per second and core "
        f"(decoding alone {decode['per_second'] / 1e6:.1f}), peak {pooled['peak'] / 2**20:.0f} MB"
    )
    if out is not None:
        Path(out).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        Path(out).with_suffix(".md").write_text(_page(result), encoding="utf-8")
    return result


def corpus(folder: Path, tokens: int, seed: int = 0) -> int:
    """Judged answers of a random chain with Zipf-distributed successors, in shards; returns bytes on disk.

    Parameters
    ----------
    folder : Path
    tokens : int
    seed : int
    """
    folder.mkdir()
    rng = np.random.default_rng(seed)
    successors = rng.integers(0, VOCABULARY, (VOCABULARY, SUCCESSORS)).astype(np.int32)
    weights = 1 / np.arange(1, SUCCESSORS + 1)
    chosen = np.searchsorted(np.cumsum(weights / weights.sum()), (np.arange(256) + 0.5) / 256).astype(np.int32)
    total = -(-tokens // LENGTH)
    for i, first in enumerate(range(0, total, SHARD)):
        rolls = _rollouts(rng, successors, chosen, first, min(SHARD, total - first))
        write_rollouts(rolls, folder / f"part-{i:05d}.parquet")
    return sum(shard.stat().st_size for shard in folder.iterdir())


def _rollouts(rng: np.random.Generator, successors: NDArray, chosen: NDArray, first: int, n: int) -> Rollouts:
    answers = np.empty((LENGTH, n), dtype=np.int32)
    state = rng.integers(0, VOCABULARY, n)
    for step in range(LENGTH):
        state = successors[state, chosen[rng.integers(0, 256, n, dtype=np.uint8)]]
        answers[step] = state
    prompt = (first + np.arange(n)) // SAME
    harm = rng.random(n) < 0.1 * (1 + prompt % 3)
    outcome = np.where(harm, 0, rng.integers(1, 4, n))
    return Rollouts(
        np.ascontiguousarray(answers.T).ravel(),
        np.arange(n + 1) * LENGTH,
        prompt_id=prompt,
        category=np.array(["bio", "chem", "cyber"], dtype=object)[prompt % 3],
        prefill=np.zeros(n, dtype=np.int32),
        outcome=outcome,
        hit=np.where(outcome == 3, -1, LENGTH - 1),
    )


def _measured(what: str, folder: Path, tokens: int) -> dict[str, Any]:
    """The row of one process."""
    order = json.dumps({"what": what, "folder": str(folder), "tokens": tokens})
    done = subprocess.run(
        [sys.executable, "-m", "markovsafety.bench.counting_worker"],
        input=order,
        capture_output=True,
        text=True,
        env=environment(folder),
    )
    if done.returncode:
        raise InputError(
            f"The row {what!r} could not be measured.", cause=done.stderr.strip()[-400:], next="See the cause."
        )
    return {"what": what, **json.loads(done.stdout)}


def _page(result: dict[str, Any]) -> str:
    told = ", ".join(f"{k} {v}" for k, v in result["versions"].items())
    c = result["corpus"]
    head = ["", "tokens", "million tokens / s and core", "seconds", "on the wall", "peak MB", "found", "reached"]
    rows = []
    for r in result["rows"]:
        met = "" if "met" not in r else "yes" if r["met"] else "no"
        numbers = [
            f"{r['per_second'] / 1e6:.1f}",
            f"{r['seconds']:.1f}",
            f"{r['wall']:.1f}",
            f"{r['peak'] / 2**20:.0f}",
        ]
        rows.append([ROWS[r["what"]], f"{r['tokens']:,}", *numbers, r["found"], met])
    lines = [
        "# Counting from disk",
        "",
        f"{result['date']}; {result['machine']}; {told}. Made by `markovsafety bench counting --out FILE.json`.",
        "",
        f"{c['tokens']:,} tokens of a vocabulary of {c['vocabulary']:,}, answers of {c['length']} tokens, "
        f"{c['per_prompt']} to a prompt, {c['bytes'] / 2**20:,.0f} MB of Parquet as `write_rollouts` writes it (zstd, "
        "dictionary, checksums). One process pinned to one core for each row; seconds of processor time, compilation "
        "before. Peak memory is that of the whole process, libraries included. To be reached: 25 million tokens per "
        "second and core at order 1, decoding included, and less than a gigabyte.",
        "",
        markdown_table(head, rows),
    ]
    return "\n".join(lines) + "\n"
