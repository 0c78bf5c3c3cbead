"""How a contender is measured: in turns with the others, on one core, its answer judged against a reference.

A contender first gets the raw problem and prepares it (set-up), then solves (the time that ratios speak of). Whatever
is compiled or loaded on the way is warmed up by a first call, which is reported in a column of its own.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib.util
import os
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .references import relative_errors

__all__ = ["Contender", "Found", "environment", "judge", "measured", "median", "peak_memory", "pin"]

SLOW = 2.0  # seconds; a peer that takes longer is measured once, the first time
ENOUGH = 8.0  # seconds that all repetitions of one contender may take together
BRISK = 0.05  # seconds a turn goes on repeating what is quick
REPEATS = 8


@dataclass(frozen=True)
class Found:
    """An answer as arrays: value, and its enclosure where there is one."""

    value: NDArray[Any]
    lower: NDArray[Any] | None = None
    upper: NDArray[Any] | None = None
    note: str = ""


@dataclass(frozen=True)
class Contender:
    """Somebody who solves the problem of a case.

    Attributes
    ----------
    name : str
    prepare : problem -> ready
        Set-up: from the raw problem to what `solve` takes. Done anew for every repetition.
    solve : ready -> raw answer
    read : raw answer, problem -> Found
        Not timed.
    needs : str
        Package that must be there.
    alone : bool
        In a process of its own that is killed at the time limit.
    of : str
        Which of the case's references it is judged by.
    ours : bool
        Whether it is the package itself: measured in turns however slow it is, so that nothing of it is compiling.
    memory : (problem, raw answer) -> (bytes of the answer, bytes of one copy of the problem), optional
        Also measure the peak memory of set-up and solve, on top of what was there and of the answer.
    free : raw answer -> None, optional
        Gives back what a solver holds outside Python.
    """

    name: str
    prepare: Callable[[Any], Any]
    solve: Callable[[Any], Any]
    read: Callable[[Any, Any], Found]
    needs: str = ""
    alone: bool = False
    of: str = "h"
    ours: bool = False
    memory: Callable[[Any, Any], tuple[int, int]] | None = None
    free: Callable[[Any], None] | None = None

    @property
    def installed(self) -> bool:
        return not self.needs or importlib.util.find_spec(self.needs) is not None


def environment(folder: Path, gpu: bool = False) -> dict[str, str]:
    """Variables of a worker: one thread for everybody, kernels compiled anew, no GPU unless asked for."""
    one = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")
    more = {} if gpu else {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false"}
    kept = {k: v for k, v in os.environ.items() if k not in ("JAX_PLATFORMS", "XLA_FLAGS")}
    return {**kept, **dict.fromkeys(one, "1"), **more, "NUMBA_CACHE_DIR": str(folder / "kernels"), "PYTHONUTF8": "1"}


def pin() -> None:
    """Stay on one core where the system allows it."""
    if hasattr(os, "sched_setaffinity"):
        with contextlib.suppress(OSError):
            os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})


def median(values: Sequence[float]) -> float:
    return float(np.median(np.asarray(values)))


def measured(
    contenders: Sequence[Contender],
    problem: Any,
    reference: dict[str, Any],
    turns: int,
    tell: Callable[[str], None] = lambda who: None,
) -> Iterator[dict[str, Any]]:
    """Measure contenders in turns.

    Parameters
    ----------
    tell : called with a name when that contender begins to solve for the first time

    Yields
    ------
    dict
        A row per contender: ``who``, ``status``, ``setup`` and ``seconds`` of every repetition, ``first``, and what
        `judge` says. Failures and slow ones come at once, the others when all turns are done.
    """
    rows: dict[str, dict[str, Any]] = {}
    for c in contenders:
        if not c.installed:
            yield {"who": c.name, "status": "not installed"}
            continue
        try:
            with warnings.catch_warnings(record=True) as warned:
                warnings.simplefilter("always")
                row = _first(c, problem, reference, tell)
        except Exception as error:
            yield {"who": c.name, "status": f"failed: {type(error).__name__}: {_short(error)}"}
            continue
        if warned:  # then it was not silent
            row["note"] = "; ".join([*([row["note"]] if "note" in row else []), f"warned: {_short(warned[0].message)}"])
        if row["seconds"]:
            yield row
        else:
            rows[c.name] = row
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # said at the first call
        for _ in range(turns):
            for c in contenders:
                if c.name in rows and sum(rows[c.name]["seconds"]) < ENOUGH:
                    _turn(c, problem, rows[c.name])
    yield from rows.values()


def _first(c: Contender, problem: Any, reference: dict[str, Any], tell: Callable[[str], None]) -> dict[str, Any]:
    """The first call, whose answer is judged; a slow one counts as the measurement."""
    level = _level(c)
    begun = time.perf_counter()
    ready = c.prepare(problem)
    tell(c.name)
    between = time.perf_counter()
    raw = c.solve(ready)
    end = time.perf_counter()
    row: dict[str, Any] = {"who": c.name, "status": "ok", "first": end - between, "setup": [], "seconds": []}
    _memory(c, problem, raw, level, row)
    found = c.read(raw, problem)
    if c.free is not None:
        c.free(raw)
    row |= judge(found, reference[c.of])
    if found.note:
        row["note"] = found.note
    if end - between > SLOW and not c.ours:
        row["setup"], row["seconds"] = [between - begun], [end - between]
    return row


def _turn(c: Contender, problem: Any, row: dict[str, Any]) -> None:
    spent, count = 0.0, 0
    while count == 0 or (spent < BRISK and count < REPEATS):
        level = _level(c)
        begun = time.perf_counter()
        ready = c.prepare(problem)
        between = time.perf_counter()
        raw = c.solve(ready)
        end = time.perf_counter()
        _memory(c, problem, raw, level, row)
        row["setup"].append(between - begun)
        row["seconds"].append(end - between)
        if c.free is not None:
            c.free(raw)
        spent, count = spent + end - begun, count + 1
        del ready, raw


def _level(c: Contender) -> int:
    if c.memory is None:
        return 0
    gc.collect()
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)  # what others gave back, or it would be taken again unseen
    return peak_memory(reset=True)


def _memory(c: Contender, problem: Any, raw: Any, level: int, row: dict[str, Any]) -> None:
    """The least of all repetitions: the first also holds a compiler."""
    if c.memory is None:
        return
    answer, copy = c.memory(problem, raw)
    used = max(0, peak_memory() - level - answer)
    row["memory"] = min(used, row.get("memory", used))
    if copy:
        row["copies"] = row["memory"] / copy


def judge(found: Found, exact: Any) -> dict[str, Any]:
    """Errors and widths of an answer; nothing if there is no reference."""
    if exact is None:
        return {}
    value = np.asarray(found.value, dtype=np.float64).ravel()
    exact = exact if isinstance(exact, list) else np.asarray(exact).ravel()
    if len(value) != len(exact):
        raise ValueError(f"the answer has {len(value)} entries, the reference {len(exact)}")
    far = [Fraction(v) - x if np.isfinite(v) else v for v, x in zip(value.tolist(), exact)] if _fractions(exact) else []
    row: dict[str, Any] = {
        "error": float(max(map(abs, far))) if far else float(np.max(np.abs(value - exact))),
        "relative": relative_errors(value, exact),
    }
    if not np.isfinite(value).all():
        row["error"] = float("inf")
    negative = int((value < 0).sum())
    if negative:
        row["negative"] = negative
    if found.lower is not None and found.upper is not None:
        lower, upper = (np.asarray(x, dtype=np.float64).ravel() for x in (found.lower, found.upper))
        width, size = upper - lower, np.where(value == 0, 1.0, np.abs(value))
        row["width"], row["relative_width"] = float(width.max()), float((width / size).max())
        row["inside"] = _inside(lower, upper, exact)
    return row


def _fractions(exact: Any) -> bool:
    return isinstance(exact, list)


def _inside(lower: NDArray, upper: NDArray, exact: Any) -> bool:
    if _fractions(exact):
        ends = zip(lower.tolist(), exact, upper.tolist())
        return all(Fraction(a) <= x and (b == float("inf") or x <= Fraction(b)) for a, x, b in ends)
    # a long-double reference is itself right to about 1e-18 of the answer
    slip = np.abs(exact) * np.longdouble(2e-18)
    return bool(((lower <= exact + slip) & (exact - slip <= upper)).all())


def _short(error: Any) -> str:
    lines = str(error).splitlines()
    return (lines[0] if lines else "")[:160]


def peak_memory(reset: bool = False) -> int:
    """Bytes: the highest resident size since the last reset; with `reset`, the present one, counted from here on.

    Where the system cannot reset the peak, it is that of the whole process.
    """
    if reset:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    with contextlib.suppress(OSError):
        text = Path("/proc/self/status").read_text(encoding="ascii")
        key = "VmRSS:" if reset else "VmHWM:"
        return 1024 * int(next(line for line in text.splitlines() if line.startswith(key)).split()[1])
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if os.uname().sysname == "Darwin" else 1024 * peak
