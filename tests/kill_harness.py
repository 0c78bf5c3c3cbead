"""What a killed run leaves: nothing that is half-written may be seen, and the same call again makes the whole of it.

`Server` starts `kill_server`, which forks runs and kills them. `survive` begins a job anew for every way to be killed,
looks at the folder, calls the job again and looks once more; what is wrong comes back as sentences, an empty list is
good news. Files are compared by what they say: a time or a duration in them may differ.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

SERVER = Path(__file__).with_name("kill_server.py")
WORDS = {
    **dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1"),
    **dict.fromkeys(("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"), "1"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    "MPLBACKEND": "Agg",
    "PYTHONWARNINGS": "ignore",
}


class Server:
    """Runs jobs, in processes of their own."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.log = folder, folder / "log.txt"
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, str(SERVER), str(log.fileno()), str(folder / "runs")],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env={**os.environ, **WORDS, "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled")},
                pass_fds=[log.fileno()],
                text=True,
            )
        assert self._answer() == "ready"

    def _answer(self):
        line = self.process.stdout.readline()
        found = json.loads(line) if line else None
        assert found is not None, f"the server has failed:\n{self.log.read_text()[-3000:]}"
        return found

    def run(self, job: str, folder: Path, **how: object) -> dict:
        """One run; it ends well, is killed, or has failed and said why."""
        begin = self.log.stat().st_size
        self.process.stdin.write(json.dumps({"job": job, "folder": str(folder), **how}) + "\n")
        self.process.stdin.flush()
        done = self._answer()
        with open(self.log, "rb") as log:
            log.seek(begin)
            failed = not done["killed"] and done["code"] != 0
            return {**done, "failed": log.read().decode(errors="replace")[-2000:] if failed else None}

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


@contextmanager
def serving(folder: Path) -> Iterator[Server]:
    server = Server(folder)
    try:
        yield server
    finally:
        server.close()


def content(path: Path) -> str:
    """What a file says, without the times in it; fails if it is no whole file of its kind."""
    if path.suffix == ".parquet":
        table = pq.read_table(path, page_checksum_verification=True).replace_schema_metadata(None)
        return hashlib.sha256(json.dumps(table.to_pylist(), allow_nan=True).encode()).hexdigest()
    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as file:
            told = [(name, file[name].tolist()) for name in sorted(file.files) if name != "info"]
        return hashlib.sha256(json.dumps(told).encode()).hexdigest()
    if path.suffix == ".json":
        told = json.loads(path.read_text())
        timed = ("finished", "provenance", "seconds", "losses")
        return json.dumps({k: v for k, v in told.items() if k not in timed}, sort_keys=True)
    return hashlib.sha256(path.read_bytes()).hexdigest()


def seen(folder: Path) -> dict[str, Path]:
    """Every file that a reader may find: none whose name, or that of a folder around it, begins with a dot."""
    paths = {p.relative_to(folder): p for p in sorted(folder.rglob("*")) if p.is_file()}
    return {name.as_posix(): p for name, p in paths.items() if not any(part.startswith(".") for part in name.parts)}


def contents(folder: Path) -> dict[str, str]:
    return {name: content(path) for name, path in seen(folder).items()}


def hidden(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob(".*"))


@dataclass
class Survival:
    """Kills runs of one job, counts the kills that took place, and keeps what was wrong after them.

    Parameters
    ----------
    server : Server
    job : str
    folder : Path
        To work in.
    older : str, optional
        A job whose result lies there before a run begins, and is replaced by it.
    """

    server: Server
    job: str
    folder: Path
    older: str | None = None
    kills: int = 0
    faults: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        """What an uninterrupted run leaves, how much it does to files, and their sizes."""
        self.before = self.folder / "before"
        shutil.rmtree(self.folder, ignore_errors=True)
        if self.older:
            done = self.server.run(self.older, self.before)
            assert done["events"], done
        place = self._fresh("whole")
        begun = time.perf_counter()
        done = self.server.run(self.job, place)
        self.seconds = time.perf_counter() - begun
        self.events = done["events"]
        assert self.events, done
        self.old = contents(self.before)
        self.whole = contents(place)
        self.sizes = sorted({path.stat().st_size for path in seen(place).values()})
        assert self.whole
        assert self.whole != self.old
        assert not hidden(place), f"leftovers of an uninterrupted {self.job}: {hidden(place)}"

    def _fresh(self, name: str) -> Path:
        place = self.folder / name
        shutil.rmtree(place, ignore_errors=True)
        if self.older:
            shutil.copytree(self.before, place)
        return place

    def kill(self, *ways: dict, **how: object) -> None:
        """Kill a new run in each of the ways, one after the other in the same folder, then let it end."""
        place = self._fresh("killed")
        for way in (*ways, {}):
            done = self.server.run(self.job, place, **way, **how)
            self.kills += done["killed"]
            failed = [f"the run failed: {done['failed']}"] if done["failed"] else []
            found = self.after_kill(place) if way else self.after_resume(place)
            self.faults += [f"{self.job} {way or ('resumed', *ways)}: {fault}" for fault in (*failed, *found)]

    def after_kill(self, place: Path) -> Iterator[str]:
        """Every file that can be seen is whole, and so is the folder of a model, as it was or as it will be."""
        models: dict[str, str] = {}
        for name, path in seen(place).items():
            try:
                found = content(path)
            except Exception as error:
                yield f"{name} is half-written: {error!r}"
                continue
            if found not in (self.whole.get(name), self.old.get(name)):
                yield f"{name} differs"
            models |= {name: found} if name.startswith("model/") else {}
        stages = [{n: x for n, x in kept.items() if n.startswith("model/")} for kept in (self.whole, self.old)]
        if models and models not in stages:
            yield f"a part of a model, or a mixture of two: {sorted(models)}"

    def after_resume(self, place: Path) -> Iterator[str]:
        try:
            found = contents(place)
        except Exception as error:
            yield f"a file is half-written: {error!r}"
            return
        for name in sorted({*found, *self.whole}):
            if found.get(name) != self.whole.get(name):
                yield f"{name} {'differs' if name in found and name in self.whole else 'is missing or too many'}"
        if hidden(place):
            yield f"leftovers: {hidden(place)}"


def spread(n: int, most: int) -> Sequence[int]:
    """At most so many numbers of 1 .. n, evenly, with both ends."""
    return sorted({round(x) for x in np.linspace(1, n, min(n, most))})


def inside(sizes: Sequence[int]) -> list[dict]:
    """Ways to die inside the write of a file of each size, in its middle and at its last byte; and at a first byte."""
    return [{"bytes": n} for n in sorted({0, *(n for size in sizes for n in (size // 2, size - 1))})]


def times(rng: random.Random, longest: float, n: int) -> list[dict]:
    return [{"seconds": rng.uniform(0, longest)} for _ in range(n)]
