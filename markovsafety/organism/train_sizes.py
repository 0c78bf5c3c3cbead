"""Organisms over capacity and alignment depth: many small trainings side by side, resumed where they were stopped.

A model of the grid lies in the folder ``h{hidden}-s{seed}-{variant}``. The base of every width and seed is trained
first; its aligned variants follow only if it meets its checks, for alignment of a model that never learned the language
says nothing about depth.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from ..errors import InputError, UntrustedError

__all__ = ["DEPTHS", "HIDDEN", "Job", "jobs", "train_grid"]

HIDDEN = (16, 24, 32, 40, 48, 64)
"""Widths of the hidden state, from 15,616 to 209,920 parameters."""
DEPTHS = (0, 4, 10, 20)
"""Trained depths; 0 aligns the first token only."""
ROUNDS = {"base": 3, "aligned": 2}


@dataclass(frozen=True)
class Job:
    """One base and the depths to which it is aligned."""

    hidden: int
    seed: int
    depths: tuple[int, ...]

    def folder(self, out: str | os.PathLike[str], variant: str) -> Path:
        """Where a model of this width and seed lies."""
        return Path(out) / f"h{self.hidden}-s{self.seed}-{variant}"


def variant_of(depth: int) -> str:
    """The recipe that aligns the first `depth` tokens."""
    return f"deep{depth}" if depth else "shallow"


def jobs(hidden: Sequence[int] = HIDDEN, depths: Sequence[int] = DEPTHS, seeds: int = 3) -> list[Job]:
    """What the grid is made of: every depth with the first seed, the extreme depths with all; widest first.

    Parameters
    ----------
    hidden : sequence of int
        Widths of the hidden state, multiples of 8.
    depths : sequence of int
        Trained depths.
    seeds : int
        Number of bases of every width.

    Returns
    -------
    list of Job

    Raises
    ------
    InputError
        Nothing is asked for, or a width or depth is no such number.
    """
    wanted = sorted({int(d) for d in depths})
    if not wanted or not hidden or seeds < 1 or wanted[0] < 0 or any(h < 8 or h % 8 for h in hidden):
        raise InputError(
            f"No grid of widths {list(hidden)}, depths {list(depths)} and {seeds} seeds.",
            cause="Widths are multiples of 8, depths are 0 or more, and there is at least one of each.",
            next=f"For example hidden={HIDDEN}, depths={DEPTHS}, seeds=3.",
        )
    ends = (wanted[0], wanted[-1]) if len(wanted) > 1 else (wanted[0],)
    return [
        Job(int(h), seed, tuple(wanted) if seed == 0 else ends)
        for h in sorted(set(hidden), reverse=True)
        for seed in range(seeds)
    ]


def train_grid(
    out: str | os.PathLike[str],
    *,
    hidden: Sequence[int] = HIDDEN,
    depths: Sequence[int] = DEPTHS,
    seeds: int = 3,
    workers: int | None = None,
    progress: bool = True,
    spread: Callable[..., list[Any]] | None = None,
) -> list[dict[str, Any]]:
    """Train organisms of several widths to several depths, with several seeds.

    Parameters
    ----------
    out : path
        Folder of model folders. Whole ones are kept, half-trained ones go on from their last checkpoint.
    hidden, depths, seeds
        See `jobs`.
    workers : int, optional
        Processes side by side, one thread each; the number of cores if not given.
    progress : bool
        One line on standard error for every model that is ready.
    spread : callable, optional
        In place of processes on this machine: ``spread(function, items, done=)`` returns a list as ``map`` would and
        calls `done` for every result. For a Ray cluster ``functools.partial(rollouts.spread, address="auto")``, with
        `out` in a folder that all nodes see; `workers` is not heeded then. What a lost worker had begun goes on from
        its last checkpoint.

    Returns
    -------
    list of dict
        For every model of the grid: hidden, seed, variant, folder, and what `train` measured (`failed` names unmet
        checks); a variant whose base failed has `failed` and no numbers.
    """
    todo = jobs(hidden, depths, seeds)
    if workers is not None and workers < 1:
        raise InputError(
            f"workers is {workers}.", cause="Somebody has to train.", next="Pass 1 or more, or leave it out."
        )
    Path(out).mkdir(parents=True, exist_ok=True)
    if spread is not None:
        tell = (lambda rows: [_say(_line(Path(r["folder"]), r)) for r in rows if r["folder"]]) if progress else None
        parts = spread(functools.partial(_away, str(Path(out).absolute())), todo, done=tell)
        return [row for rows in parts for row in rows]
    found: dict[Job, list[dict[str, Any]]] = {}
    count = workers or (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    with ProcessPoolExecutor(count, mp_context=get_context("spawn"), initializer=_quiet) as pool:
        waiting = {pool.submit(_job, job, str(out), progress): job for job in todo}
        try:
            for done in as_completed(waiting):
                found[waiting[done]] = done.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return [row for job in todo for row in found[job]]


def _quiet() -> None:
    """In a process of the grid: no bars for loading and writing of models, of which there are hundreds."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def _away(out: str, job: Job) -> list[dict[str, Any]]:
    _quiet()
    return _job(job, out, progress=False)


def _job(job: Job, out: str, progress: bool) -> list[dict[str, Any]]:
    base = job.folder(out, "base")
    rows = [_one(job, "base", base, None, progress)]
    for depth in job.depths:
        variant = variant_of(depth)
        if rows[0]["failed"]:
            why = [f"its base: {reason}" for reason in rows[0]["failed"]]
            rows.append({"hidden": job.hidden, "seed": job.seed, "variant": variant, "folder": None, "failed": why})
        else:
            rows.append(_one(job, variant, job.folder(out, variant), base, progress))
    return rows


def _one(job: Job, variant: str, folder: Path, base: Path | None, progress: bool) -> dict[str, Any]:
    from .training import train

    report = folder / "training.json"
    if report.exists():
        found = json.loads(report.read_text())
        for rest in folder.parent.glob(f".{folder.name}.*.training*"):  # of a run that was killed when all was written
            shutil.rmtree(rest, ignore_errors=True)
    else:
        rounds = ROUNDS["aligned" if base else "base"]
        options: dict[str, Any] = {"seed": job.seed, "hidden": job.hidden, "rounds": rounds, "progress": False}
        try:
            found = train(variant, folder, base=base, **options)
        except UntrustedError as error:
            found = error.partial
        if progress:
            _say(_line(folder, found))
    return {**found, "hidden": job.hidden, "seed": job.seed, "variant": variant, "folder": str(folder)}


def _line(folder: Path, found: dict[str, Any]) -> str:
    told = "; ".join(found["failed"]) or "meets its checks"
    return f"{folder.name}: KL {found['kl']:.4f}, judge {found['judge']:.3f}, {found['seconds']:.0f} s, {told}"


def _say(line: str) -> None:
    import sys

    print(line, file=sys.stderr, flush=True)
