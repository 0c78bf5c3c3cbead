"""The hitting engine beside its peers: every case of the catalogue in processes of its own, in one run.

Each process stays on one core with one thread. Contenders of a case take turns in one process; those that may not
come back at all run in their own, which is killed at the time limit. Every case is written when it is done, so that a
run that was killed keeps what it has and goes on with the same file.
"""

from __future__ import annotations

import contextlib
import json as json_module
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..files import atomic
from .cases import Case
from .catalogue import cases, chosen
from .goals import ANSWERS, verdicts
from .machine import machine, versions
from .measure import environment
from .table import as_markdown, as_text

__all__ = ["run"]

WORKER = [sys.executable, "-m", "markovsafety.bench.worker"]
LOADING = 60.0  # seconds on top of the limit until somebody begins to solve: imports, the problem, its reference


def run(
    *,
    case: Sequence[str] = (),
    quick: bool = False,
    gpu: bool = False,
    turns: int = 5,
    limit: float = 20.0,
    json: str | Path | None = None,
) -> dict[str, Any]:
    """Measure.

    Parameters
    ----------
    case : sequence of str
        Names of cases, measured anew; all that `json` does not hold yet if not given.
    quick : bool
        Small sizes, in this process, without contenders that need one of their own: shows that answers are right, and
        nothing about speed.
    gpu : bool
        The cases for a GPU instead of the others.
    turns : int
        Rounds in which the contenders take turns.
    limit : float
        Seconds after which a contender with a process of its own is stopped.
    json : str or Path, optional
        Where to write the result case by case, with the table in Markdown beside it.

    Returns
    -------
    dict
        ``cases``: name -> title, rows, goals with verdicts, reference; ``machine``, ``versions``, ``settings``,
        ``date``; ``faults``: answers of ours that are wrong, empty if all is well; ``line``: the table to read.

    Raises
    ------
    InputError
        If a case does not exist, turns or limit are not positive, or `json` cannot be written or holds a run with
        other settings or versions.
    """
    todo = chosen(list(case), gpu)
    if turns < 1 or not 0 < limit < float("inf"):
        raise InputError(
            f"turns is {turns}, limit is {limit:g}.",
            cause="Contenders are measured in rounds, each of them for some seconds at most.",
            next="Give one round at least, and a positive number of seconds.",
        )
    result = _begun(json, {"quick": quick, "gpu": gpu, "turns": turns, "limit": limit})
    if not case:
        todo = [c for c in todo if c.name not in result["cases"]]
    if json is not None:
        _write(Path(json), result)  # if that is impossible, it is better known now
    with tempfile.TemporaryDirectory() as folder:
        for number, each in enumerate(todo, 1):
            _say(f"[{number}/{len(todo)}] {each.title}")
            begun = time.perf_counter()
            rows, numbers = _in_process(each, turns) if quick else _in_workers(each, Path(folder), turns, limit, gpu)
            entry = _entry(each, rows, numbers, time.perf_counter() - begun, quick)
            result["cases"][each.name] = entry
            result["cases"] = {name: result["cases"][name] for name in cases() if name in result["cases"]}
            result["date"] = datetime.now(UTC).date().isoformat()
            if json is not None:
                _write(Path(json), result)
    shown = result["cases"] if not case else {c.name: result["cases"][c.name] for c in todo}
    faults = [fault for name, entry in shown.items() for fault in _faults(name, entry)]
    return {**result, "faults": faults, "line": as_text({**result, "cases": shown})}


def _begun(json: str | Path | None, settings: dict[str, Any]) -> dict[str, Any]:
    """An empty result, or what a run with the same settings has already written."""
    fresh: dict[str, Any] = {
        "date": "",
        "machine": machine(),
        "versions": versions(),
        "settings": settings,
        "cases": {},
    }
    if json is None or not Path(json).exists():
        return fresh
    try:
        kept = json_module.loads(Path(json).read_text(encoding="utf-8"))
        same = all(kept[key] == fresh[key] for key in ("machine", "versions", "settings"))
        same = same and isinstance(kept["cases"], dict)
    except (OSError, ValueError, KeyError, TypeError):
        same, kept = False, {}
    if same:
        return kept
    raise InputError(
        f"{json} holds something else than a begun run with these settings.",
        cause="Machine, versions, turns, limit, quick and gpu have to be the same for a run to go on.",
        next="Give the same settings, or another file.",
    )


def _write(path: Path, result: dict[str, Any]) -> None:
    """The result, and its table beside it."""
    text = json_module.dumps(_plain(result), indent=1, allow_nan=False)
    for target, content in ((path, text), (path.with_suffix(".md"), as_markdown(result))):
        with atomic(target, sync=False) as part:
            part.write_text(content.rstrip() + "\n", encoding="utf-8")


def _plain(value: Any) -> Any:
    """Numbers that JSON does not know as text."""
    if isinstance(value, dict):
        return {key: _plain(x) for key, x in value.items()}
    if isinstance(value, list):
        return [_plain(x) for x in value]
    if isinstance(value, float) and (value != value or value in (float("inf"), -float("inf"))):
        return str(value)
    return value


def _entry(case: Case, rows: list[dict], numbers: dict[str, float], seconds: float, quick: bool) -> dict[str, Any]:
    order = [c.name for c in case.contenders]
    rows = sorted(rows, key=lambda row: order.index(row["who"]))
    goals = tuple(g for g in case.goals if not quick or g.kind in ANSWERS)  # small sizes say nothing about speed
    return {
        "title": case.title + (" (small)" if quick else ""),
        "reference": case.source,
        "rows": rows,
        "numbers": numbers,
        "goals": verdicts(goals, {row["who"]: row for row in rows}, numbers),
        "seconds": round(seconds, 1),
    }


def _faults(name: str, entry: dict[str, Any]) -> list[str]:
    """What is wrong with our own answers: failures, enclosures without the reference, errors above their goals."""
    ours = [row for row in entry["rows"] if row["who"].startswith("markovsafety")]
    found = [f"{name}: {row['who']}: {row['status']}" for row in ours if row["status"] not in ("ok", "not installed")]
    found += [f"{name}: {row['who']}: the enclosure misses the reference" for row in ours if row.get("inside") is False]
    wrong = [g for g in entry["goals"] if g["verdict"] == "missed" and "largest" in g["goal"].partition(": ")[2]]
    return found + [f"{name}: {g['goal']} is {g['value']:.2g}, not {g['bound']}" for g in wrong]


def _in_process(case: Case, turns: int) -> tuple[list[dict], dict[str, float]]:
    """Everybody who comes back, here and now."""
    from .worker import work

    rows: list[dict] = []
    numbers: dict[str, float] = {}

    def tell(message: dict[str, Any]) -> None:
        rows.extend([message["row"]] if "row" in message else [])
        numbers.update(message.get("numbers", {}))

    who = [c.name for c in case.contenders if not c.alone]
    work({"case": case.name, "who": who, "quick": True, "turns": turns}, tell)
    return rows, numbers


def _in_workers(
    case: Case, folder: Path, turns: int, limit: float, gpu: bool, quick: bool = False
) -> tuple[list[dict], dict[str, float]]:
    """Those that take turns in one process, then each of the others in its own."""
    rows: list[dict] = []
    numbers: dict[str, float] = {}
    for group in ([c for c in case.contenders if not c.alone], *([c] for c in case.contenders if c.alone)):
        left = [c.name for c in group]
        patience = limit if group and group[0].alone else 15 * limit
        while left:
            alone = group[0].alone
            order = {"case": case.name, "who": left, "quick": quick, "turns": turns, "pin": not gpu, "alone": alone}
            running, before = left[0], len(left)
            for message in _messages(order, environment(folder, gpu), patience):
                running = message.get("begin", running)
                if "row" in message:
                    rows.append(message["row"])
                    left.remove(message["row"]["who"])
                    _say(f"  {_told(message['row'])}")
                if "stopped" in message and left:
                    who = running if running in left else left[0]
                    rows.append({"who": who, **message["stopped"]})
                    left.remove(who)
                    _say(f"  {who}: {message['stopped']['status']}")
                numbers.update(message.get("numbers", {}))
            if len(left) == before:
                raise RuntimeError(f"the worker of {case.name} said nothing of {left}")
    return rows, numbers


def _messages(order: dict[str, Any], variables: dict[str, str], patience: float) -> Iterator[dict[str, Any]]:
    """What a worker says; a last ``{"stopped": row}`` if it took too long or died."""
    with _worker(variables) as (process, lines, complaints):
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(json_module.dumps(order))
            process.stdin.close()
        deadline, solving = time.monotonic() + patience + LOADING, False
        while True:
            try:
                line = lines.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                what = f"> {patience:g} s" + ("" if solving else " before solving")
                yield {"stopped": {"status": what, **({"limit": patience} if solving else {})}}
                return
            if line is None:
                break
            message = json_module.loads(line)
            if "begin" in message or "row" in message:
                deadline, solving = time.monotonic() + patience, "begin" in message
            yield message
        code = process.wait()
        if code:
            said = [line.strip() for line in iter(complaints.get, None) if line.strip()]
            last = said[-1] if said else "without a word"
            yield {"stopped": {"status": f"failed: ended with code {code}: {last[:160]}"}}


@contextlib.contextmanager
def _worker(variables: dict[str, str]) -> Iterator[tuple[Any, queue.Queue, queue.Queue]]:
    """A process with what it prints, line by line; None when it has closed its output. Killed at the end."""
    pipe = subprocess.PIPE
    process = subprocess.Popen(
        WORKER, stdin=pipe, stdout=pipe, stderr=pipe, env=variables, text=True, errors="replace", start_new_session=True
    )
    streams = [(stream, queue.Queue()) for stream in (process.stdout, process.stderr)]
    readers = [threading.Thread(target=_pass_on, args=pair, daemon=True) for pair in streams]
    try:
        for reader in readers:
            reader.start()
        yield process, streams[0][1], streams[1][1]
    finally:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for reader in readers:
            reader.join()
        for stream in (process.stdin, process.stdout, process.stderr):
            with contextlib.suppress(BrokenPipeError):
                stream.close()  # type: ignore[union-attr]


def _pass_on(stream: Any, lines: queue.Queue) -> None:
    for line in stream:
        lines.put(line)
    lines.put(None)


def _told(row: dict[str, Any]) -> str:
    if "median" not in row:
        return f"{row['who']}: {row['status']}"
    error = f", relative error {row['relative']:.1e}" if "relative" in row else ""
    return f"{row['who']}: {1000 * row['median']:.3g} ms{error}"


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
