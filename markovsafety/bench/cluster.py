"""Ray on two workers beside one process without Ray: the same items, every process pinned to a core of its own.

Measured on the organism: sampling, and the solves behind posterior draws. Start-up (Ray, imports, loading, compiling)
is not part of the ratio and stands beside it. The two take turns, so that a busy machine is busy for both; each keeps
its fastest turn.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from ..chains import Counts, KGram, count
from ..errors import InputError, UntrustedError
from ..files import atomic
from ..rollouts import sample
from ..rollouts.engines import Job, rollout_keys
from ..rollouts.engines.ray import Crew
from ..rollouts.engines.ray_join import connected
from .machine import machine, versions
from .markdown import markdown_table

__all__ = ["run"]

GOAL = 1.7
WORKERS = 2
BATCH = 64
"""Rollouts side by side in a process."""


def run(out: str | Path | None = None, *, quick: bool = False, turns: int = 3) -> dict[str, Any]:
    """Measure both kinds of work.

    Parameters
    ----------
    out : path, optional
        JSON file to write; the table goes beside it as Markdown.
    quick : bool
        Small items and one turn, for a look.
    turns : int

    Returns
    -------
    dict
        ``rows`` (work, items, one and two: seconds of every turn, ratio of the fastest, met, and the seconds of
        start-up), date, machine, versions, command, ``line``.

    Raises
    ------
    InputError
        Ray is not installed, or this process may use fewer than two cores.
    UntrustedError
        The two gave different results.
    """
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    if len(cores) < WORKERS:
        raise InputError(
            f"{len(cores)} cores are not enough",
            cause="each of two processes is pinned to its own",
            next="run it on Linux, with at least two cores",
        )
    begun = time.perf_counter()
    with connected("local", WORKERS) as ray:
        ray_seconds = time.perf_counter() - begun
        works = {"sampling": _sampling(quick), "posterior solves": _solving(quick)}
        rows = [
            _measured(ray, name, cores[:WORKERS], make, items, 1 if quick else turns)
            for name, (make, items) in works.items()
        ]
    result: dict[str, Any] = {
        "rows": rows,
        "ray_seconds": round(ray_seconds, 2),
        "goal": GOAL,
        "command": "markovsafety bench cluster"
        + (" --quick" if quick else "")
        + " --out papers/measurements/cluster.json",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "versions": versions(("ray", "jax", "numpy", "scipy")),
    }
    result["line"] = "\n".join(
        f"{r['work']}: {r['ratio']:.2f} times one process ({min(r['two']):.2f} s against {min(r['one']):.2f} s); "
        f"start-up {r['two_startup']:.1f} s and {r['one_startup']:.1f} s, Ray itself {ray_seconds:.1f} s"
        for r in rows
    )
    if out is not None:
        for suffix, text in ((".json", json.dumps(result, indent=1) + "\n"), (".md", _page(result))):
            with atomic(Path(out).with_suffix(suffix)) as part:
                part.write_text(text, encoding="utf-8")
    return result


Made = tuple[None, Callable[[Any], Any]]
Make = Callable[[], Made]


def _sampling(quick: bool) -> tuple[Make, list[int]]:
    """Items are blocks of rollouts of the organism, the same for everybody."""
    return functools.partial(_sampler, 64 if quick else 2048), list(range(4 if quick else 12))


def _sampler(rollouts: int) -> Made:
    from ..organism import model_path, prompts
    from ..rollouts.engines.jax_engine import open_engine

    engine = open_engine(model_path("shallow"), device="cpu", batch_size=BATCH, workers=1)
    ids = [engine.tokenizer.prompt_ids(prompt["prompt"]) for prompt in prompts(n=128, seed=0)]
    none = [np.zeros(0, np.int32)] * rollouts
    plain = Job(ids, np.arange(rollouts) % 128, none, np.zeros(rollouts, np.uint64), 80)

    def work(item: int) -> str:
        keys = rollout_keys(item, np.arange(rollouts))
        output = engine.run(dataclasses.replace(plain, keys=keys, eos_ids=engine.tokenizer.eos_ids))
        return hashlib.sha256(np.concatenate(output.tokens).tobytes()).hexdigest()

    return None, work


def _solving(quick: bool) -> tuple[Make, list[int]]:
    """Items are blocks of posterior draws of the organism's chain."""
    from ..organism import model_path, prompts

    asked = prompts(n=24 if quick else 96, seed=1)
    told: dict[str, Any] = {"judge": "organism", "progress": False, "engine": "ray", "workers": WORKERS}
    rolls = sample(model_path("shallow"), asked, n=4 if quick else 64, max_tokens=64, seed=1, **told)
    return functools.partial(_solver, count(rolls, KGram(2)), 20 if quick else 250), list(range(4 if quick else 40))


def _solver(counts: Counts, draws: int) -> Made:
    from ..evidence.posterior import posterior_draws
    from ..evidence.prompt_rows import prompt_rows

    rows = prompt_rows(counts, "harm", "dirichlet", 0.5)
    wanted = np.arange(rows.chain.n_states)

    def work(item: int) -> str:
        by_state, by_start = posterior_draws(rows, draws, 0.5, True, (0, item), wanted)
        return hashlib.sha256(by_state.tobytes() + by_start.tobytes()).hexdigest()

    return None, work


def _measured(ray: Any, name: str, cores: Sequence[int], make: Make, items: list[int], turns: int) -> dict[str, Any]:
    seconds: dict[str, list[float]] = {"one": [], "two": []}
    with tempfile.TemporaryDirectory() as folder:
        begun = time.perf_counter()
        with Crew(ray, functools.partial(_pinned, tuple(cores), folder, make, items[0]), WORKERS) as crew:
            crew.ready(WORKERS)
            two_startup = time.perf_counter() - begun
            with _process(cores[0], make, items[0]) as (ask, one_startup):
                for _ in range(turns):
                    two = _timed(lambda: [r for _, r in sorted(crew.results(items))], seconds["two"])
                    one = _timed(lambda: ask(items), seconds["one"])
                    _check_same(name, one, two, seconds)
    ratio = min(seconds["one"]) / min(seconds["two"])
    told = {"work": name, "items": len(items), **seconds, "ratio": round(ratio, 3), "met": ratio >= GOAL}
    return told | {"one_startup": round(one_startup, 2), "two_startup": round(two_startup, 2)}


def _timed(work: Callable[[], list[Any]], seconds: list[float]) -> list[Any]:
    begun = time.perf_counter()
    found = work()
    seconds.append(round(time.perf_counter() - begun, 3))
    return found


def _check_same(name: str, one: list[Any], two: list[Any], seconds: dict[str, list[float]]) -> None:
    if one != two:
        raise UntrustedError(
            f"{name}: two workers and one process gave different results",
            cause="what comes of an item depends on who does it",
            next="report it: nothing that is spread over workers can be trusted then",
            partial=seconds,
        )


def _pinned(cores: Sequence[int], folder: str, make: Make, first: int) -> Made:
    """In a worker: all of its threads on a core that no other worker has, everything loaded and compiled."""
    for core in cores:
        with suppress(FileExistsError):
            os.close(os.open(f"{folder}/{core}", os.O_CREAT | os.O_EXCL))
            for thread in os.listdir("/proc/self/task"):
                os.sched_setaffinity(int(thread), {core})
            break
    _, work = make()
    work(first)
    return None, work


@contextmanager
def _process(core: int, make: Make, first: int) -> Iterator[tuple[Callable[[list[int]], list[Any]], float]]:
    """What asks a new process, pinned to a core from its first moment, to do items; and the seconds of its start-up."""
    context, before = multiprocessing.get_context("spawn"), os.sched_getaffinity(0)
    here, there = context.Pipe()
    begun = time.perf_counter()
    process = context.Process(target=_serve, args=(there, make, first), daemon=True)
    os.sched_setaffinity(0, {core})  # which the child inherits
    try:
        process.start()
    finally:
        os.sched_setaffinity(0, before)

    def ask(items: list[int]) -> list[Any]:
        here.send(items)
        return here.recv()

    try:
        here.recv()
        yield ask, time.perf_counter() - begun
    finally:
        here.send(None)
        process.join()


def _serve(pipe: Any, make: Make, first: int) -> None:
    _, work = make()
    work(first)
    pipe.send(None)
    while (items := pipe.recv()) is not None:
        pipe.send([work(item) for item in items])


def _page(result: dict[str, Any]) -> str:
    head = ["work", "one process, s", "two workers, s", "ratio", f"at least {GOAL}", "start-up, s (one, two)"]
    rows = [
        [
            r["work"],
            f"{min(r['one']):.2f}",
            f"{min(r['two']):.2f}",
            f"{r['ratio']:.2f}",
            "yes" if r["met"] else "no",
            f"{r['one_startup']:.1f}, {r['two_startup']:.1f}",
        ]
        for r in result["rows"]
    ]
    told = ", ".join(f"{k} {v}" for k, v in result["versions"].items())
    return (
        "# Ray on two workers beside one process\n\n"
        f"`{result['command']}`, {result['date'][:10]}, {result['machine']}; {told}.\n\n"
        "Every process is pinned to a core of its own; the items are the same, and so are the results. Start-up is not "
        f"part of the seconds: loading and compiling as given, starting Ray {result['ray_seconds']:.1f} s.\n\n"
        f"{markdown_table(head, rows)}\n"
    )
