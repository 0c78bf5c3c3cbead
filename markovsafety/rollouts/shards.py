"""Sampling in shards: a manifest first, then whole Parquet files one by one, so that a killed run can go on.

A rollout's random numbers depend on the seed, its prompt, its prefill and its number alone, and a shard is always the
same block of rollouts, so a run that was stopped and continued gives what an uninterrupted one gives.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence, Sized
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from ..errors import InputError, MarkovsafetyError
from ..files import atomic, claimed, clear_leftovers
from ..outcomes import NOT_JUDGED
from .asked import Asked
from .engines import Engine, Job, Output, Progress, rollout_keys
from .folders import MANIFEST, MOST
from .parquet import read_parquet, read_rollouts, write_rollouts
from .rollouts import Ragged, Rollouts

__all__ = ["Plan", "Shard", "begun", "blocks", "interrupted", "job", "run", "shown"]

Shard = tuple[np.ndarray, Path | None]
"""Numbers of the rollouts in the plan, and the file that holds them."""

FORMAT = 1


@dataclass(frozen=True)
class Plan:
    """Every rollout of a run, in order: prompts x prefill x n.

    Parameters
    ----------
    asked : Asked
    prefill : list of int
    n : int
        Rollouts per prompt and prefill.
    seed : int
    sampling : dict
        ``max_tokens``, ``temperature``, ``top_p``, ``eos_ids``, ``end_ids``, ``classes`` of a `Job`.
    shard_size : int
        Rollouts per shard.
    parameters : dict
        What makes this run this run; JSON-able. A folder begun with others is refused.
    provenance : dict
    """

    asked: Asked
    prefill: list[int]
    n: int
    seed: int
    sampling: dict[str, Any]
    shard_size: int
    parameters: dict[str, Any]
    provenance: dict[str, Any]

    def __len__(self) -> int:
        return len(self.asked.tokens) * len(self.prefill) * self.n

    @property
    def shards(self) -> int:
        return -(-len(self) // self.shard_size)


def job(plan: Plan, rows: np.ndarray) -> Job:
    """The job of some rollouts, given by their number in the plan."""
    cell, repeat = np.divmod(rows, plan.n)
    prompt, depth = np.divmod(cell, len(plan.prefill))
    forced_tokens = np.array(plan.prefill)[depth]
    used, prompt_of = np.unique(prompt, return_inverse=True)
    return Job(
        prompts=[plan.asked.tokens[i] for i in used],
        prompt_of=prompt_of,
        forced=[plan.asked.prefix[i][:k] for i, k in zip(prompt, forced_tokens)],
        keys=rollout_keys(plan.seed, plan.asked.prompt_id[prompt], forced_tokens, repeat),
        **plan.sampling,
    )


def _rollouts(plan: Plan, job: Job, rows: np.ndarray, output: Output) -> Rollouts:
    prompt = rows // (plan.n * len(plan.prefill))
    columns: dict[str, Any] = {
        "prompt_tokens": Ragged.of([plan.asked.tokens[i] for i in prompt]),
        "logprob": Ragged.of(output.logprob, np.float32).flat,
        "seed": np.asarray(job.keys, dtype=np.uint64).view(np.int64),
    }
    if output.logprob_processed is not None:
        columns["logprob_processed"] = Ragged.of(output.logprob_processed, np.float32).flat
    for name, mass in output.mass.items():
        columns[f"mass_{name}"] = Ragged.of(mass, np.float32).flat
    return Rollouts.of(
        output.tokens,
        prompt_id=plan.asked.prompt_id[prompt],
        category=plan.asked.category[prompt],
        prefill=np.array([len(forced) for forced in job.forced], dtype=np.int32),
        outcome=NOT_JUDGED,
        columns=columns,
        provenance=plan.provenance,
    )


def run(
    plan: Plan, engine: Engine, judged: Callable[[Rollouts], Rollouts], out: str | Path | None, progress: bool | None
) -> Rollouts:
    """Sample what is not there yet, shard by shard, and return everything.

    Raises
    ------
    InputError
        `out` holds another run.
    MarkovsafetyError
        From the engine; ``partial`` holds the rollouts that were finished.
    KeyboardInterrupt
        With a message that says what was kept.
    """
    folder = None if out is None else Path(out)
    shards = blocks(plan, folder, ".parquet")
    parts: list[Rollouts] = []

    def finished(partial: Any) -> Rollouts:
        return Rollouts.concat([*parts, *([partial] if isinstance(partial, Rollouts) else [])])

    with (
        begun(plan, folder, ".parquet"),
        interrupted(plan, parts, folder, finished),
        shown(plan, shards, progress) as advance,
    ):
        for rows, path in shards:
            if path is not None and path.exists():
                parts.append(_finished(path, len(rows)))
                continue
            part = judged(_sampled(plan, engine, rows, advance))
            if path is not None:
                with carrying(part):
                    write_rollouts(part, path)
            parts.append(part)
    return Rollouts.concat(parts) if folder is None else read_rollouts(folder)


def blocks(plan: Plan, folder: Path | None, suffix: str) -> list[Shard]:
    """The rollouts of each shard, and the file for them (None without a folder).

    Raises
    ------
    InputError
        More shards than a folder holds.
    """
    if folder is not None and plan.shards > MOST:
        raise InputError(
            f"{len(plan):,} rollouts in shards of {plan.shard_size:,} make {plan.shards:,} shards",
            cause=f"a folder holds {MOST:,} at most",
            next=f"set shard_size >= {-(-len(plan) // MOST):,}",
        )
    cuts = [np.arange(a, min(a + plan.shard_size, len(plan))) for a in range(0, len(plan), plan.shard_size)]
    return [(rows, None if folder is None else folder / f"part-{i:05d}{suffix}") for i, rows in enumerate(cuts)]


@contextmanager
def interrupted(plan: Plan, done: Sized, folder: Path | None, finished: Callable[[Any], Any]) -> Iterator[None]:
    """Errors carry what was finished (`finished` makes it of an error's own partial answer); Ctrl-C says it."""
    try:
        yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt(_kept(plan, len(done), folder)) from None
    except MarkovsafetyError as error:
        error.partial = finished(error.partial)
        raise


@contextmanager
def carrying(part: Any) -> Iterator[None]:
    """An error of the disk carries what could not be written."""
    try:
        yield
    except MarkovsafetyError as error:
        error.partial = part
        raise


def _sampled(plan: Plan, engine: Engine, rows: np.ndarray, progress: Progress) -> Rollouts:
    """Some rollouts of the plan; an engine's partial output becomes the rollouts that it had finished."""
    try:
        return _rollouts(plan, job(plan, rows), rows, engine.run(job(plan, rows), progress))
    except MarkovsafetyError as error:
        output = error.partial
        if isinstance(output, Output):
            done = [i for i, tokens in enumerate(output.tokens) if len(tokens)]

            def some(values: list[np.ndarray]) -> list[np.ndarray]:
                return [values[i] for i in done]

            processed = None if output.logprob_processed is None else some(output.logprob_processed)
            mass = {name: some(values) for name, values in output.mass.items()}
            part = Output(some(output.tokens), some(output.logprob), processed, mass)
            error.partial = _rollouts(plan, job(plan, rows[done]), rows[done], part)
        raise


@contextmanager
def begun(plan: Plan, folder: Path | None, suffix: str) -> Iterator[None]:
    """The folder of a run, which nobody else writes to until the block ends; without a folder, nothing.

    The manifest is written, or that of the same run is found; what killed runs left behind goes. When the block ends
    well and every shard is there, the manifest says that the run is finished: a shard missing later was lost.

    Parameters
    ----------
    plan : Plan
    folder : Path or None
    suffix : str
        Of its shards.

    Raises
    ------
    InputError
        Another process writes to the folder; it holds another run, or shards without a manifest.
    """
    if folder is None:
        yield
        return
    if folder.exists() and not folder.is_dir():
        raise InputError(
            f"{folder} is a file", cause="shards and their manifest are written into a folder", next="give out a folder"
        )
    with claimed(folder / ".lock", f"the run in {folder}"):
        manifest = _manifest(plan, folder, suffix)
        clear_leftovers(folder)
        yield
        if not manifest.get("finished") and all(path and path.exists() for _, path in blocks(plan, folder, suffix)):
            with suppress(InputError):  # nothing is lost where it cannot be written
                _keep({**manifest, "finished": True}, folder / MANIFEST)


def _keep(manifest: dict[str, Any], path: Path) -> None:
    with atomic(path) as part:
        part.write_text(json.dumps(manifest, indent=1), encoding="utf-8")


def _manifest(plan: Plan, folder: Path, suffix: str) -> dict[str, Any]:
    path = folder / MANIFEST
    if not path.exists():
        if any(folder.glob(f"part-*{suffix}")):
            raise InputError(
                f"{folder} holds shards without a manifest",
                cause="they come from another program, or the manifest was deleted",
                next="choose another folder",
            )
        manifest = {
            "format": FORMAT,
            "total": len(plan),
            "shards": plan.shards,
            "shard_size": plan.shard_size,
            "parameters": plan.parameters,
            "provenance": plan.provenance,
        }
        _keep(manifest, path)
        return manifest
    try:
        manifest = dict(json.loads(path.read_text(encoding="utf-8")))
        there = manifest["parameters"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"{path} is damaged", cause=str(error), next="choose another folder") from error
    here = json.loads(json.dumps(plan.parameters))
    if there != here:
        differ = [key for key in sorted({*there, *here}) if there.get(key) != here.get(key)]
        told = "; ".join(f"{key}: {_short(there.get(key))} there, {_short(here.get(key))} now" for key in differ)
        raise InputError(
            f"{folder} holds a run with other parameters",
            cause=told,
            next="choose another folder, or call again with the parameters of manifest.json to finish that run",
        )
    return manifest


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _finished(path: Path, size: int) -> Rollouts:
    try:
        part = read_parquet(path)
        if len(part) == size:
            return part
        cause = f"it has {len(part)} rollouts instead of {size}"
    except InputError as error:
        cause = error.cause
    raise InputError(f"{path} is damaged", cause=cause, next="delete it and call again: it is sampled anew")


def _kept(plan: Plan, done: int, folder: Path | None) -> str:
    if folder is None:
        return "interrupted: nothing is kept without out=folder"
    return f"interrupted: {done} of {plan.shards} shards are kept in {folder}; the same call goes on from there"


@contextmanager
def shown(plan: Plan, shards: Sequence[Shard], show: bool | None) -> Iterator[Progress]:
    """A progress bar on stderr with tokens per second; silent where stderr is no terminal, unless asked for."""
    there = sum(len(rows) for rows, path in shards if path is not None and path.exists())
    hidden = not sys.stderr.isatty() if show is None else not show
    began, tokens = 0.0, 0
    options: dict[str, Any] = {"unit": " rollouts", "file": sys.stderr, "disable": hidden, "dynamic_ncols": True}
    with tqdm(total=len(plan), initial=there, **options) as bar:

        def advance(rollouts: int, more: int) -> None:
            nonlocal began, tokens
            now = time.monotonic()
            if began:
                tokens += more
                bar.set_postfix_str(f"{tokens / max(now - began, 1e-9):,.0f} tokens/s", refresh=False)
            else:  # the clock starts with the first report: what comes before is compilation
                began = now
            bar.update(rollouts)

        yield advance
