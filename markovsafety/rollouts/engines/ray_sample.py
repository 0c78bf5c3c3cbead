"""Sampling spread over a Ray cluster: a model per GPU or core, whole shards, the same rollouts as in one process.

Every worker opens the model and makes the plan of the run, so that this process needs neither the model's memory nor a
GPU; workers whose plans differ (other weights, another tokenizer or template) are refused. A worker writes its shards
itself where it sees the run's folder; from elsewhere they come back through Ray's object store, and are written here.
The folder is the same as that of a run in one process, and either can go on with the other's.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import InputError, UntrustedError
from ..asked import depths, read_prompts
from ..folders import MANIFEST
from ..judges import judge as judge_rollouts
from ..parquet import read_parquet, read_rollouts, write_rollouts
from ..rollouts import Rollouts
from ..sample import SHARD, _edited, _engine, planned
from ..shards import Plan, Shard, _finished, _sampled, begun, blocks, carrying, interrupted, shown
from . import Engine, is_url
from .ray import Crew, sent
from .ray_join import connected, crew_size

__all__ = ["sample_spread"]

FEW = 256
"""Rollouts that are enough for a shard where all workers have work without smaller ones."""


@dataclass(frozen=True)
class Order:
    """What every worker makes: the model, the plan, the judge.

    Parameters
    ----------
    model : str or callable
        A path, a hub id, or what opens an engine.
    opening : dict
        Of `_engine`, with the name of the engine as ``name``.
    edit : Edit or None
    asked : dict
        Of `planned`, prompts included.
    rollouts, workers : int
        In all; for the size of the shards.
    alone : bool
        Whether a worker has one core and no GPU.
    """

    model: Any
    opening: dict[str, Any]
    edit: Any
    asked: dict[str, Any]
    rollouts: int
    workers: int
    alone: bool

    def __call__(self) -> tuple[dict[str, Any], Any]:
        opened = self.model() if callable(self.model) else _engine(self.model, **self.opening)
        opened = _edited(opened, self.edit)
        if self.alone and opened.name == "jax":
            opened = dataclasses.replace(opened, workers=1)  # type: ignore[type-var]
        size = self.asked["shard_size"] or self._shard_size(opened.name)
        plan, said = planned(self.model, opened, **{**self.asked, "shard_size": size})
        return plan.parameters, functools.partial(_done, opened, plan, said)

    def _shard_size(self, engine: str) -> int:
        """Eight shards for each worker if they are not too small for that, and not larger than those of one process."""
        each = -(-self.rollouts // self.workers)
        return max(1, min(SHARD.get(engine, 1024), max(-(-each // 8), min(FEW, each))))


@dataclass(frozen=True)
class Item:
    """A shard to be made: its rollouts, its file, the manifest's hash, and what its provenance says of the run."""

    rows: np.ndarray
    path: Path | None
    digest: str | None
    run: dict[str, Any]


def _done(opened: Engine, plan: Plan, said: Any, item: Item | None) -> Any:
    """In a worker: the plan for None; else the sampled tokens of a shard, and its rollouts if they are not written."""
    if item is None:
        return plan
    plan = dataclasses.replace(plan, provenance={**plan.provenance, **item.run})
    part = _sampled(plan, opened, item.rows, lambda *_: None)
    part = part if said is None else judge_rollouts(part, said)
    tokens = int(len(part.tokens) - part.prefill.sum())
    if item.path is None or _digest(item.path.parent) != item.digest:
        return tokens, part
    with carrying(part):
        write_rollouts(part, item.path)
    return tokens, None


def _digest(folder: Path) -> str | None:
    """The hash of the manifest, which holds the time at which the run was begun; None where there is none."""
    with suppress(OSError):
        return hashlib.sha256((folder / MANIFEST).read_bytes()).hexdigest()
    return None


def sample_spread(
    model: Any,
    *,
    workers: int | None,
    address: str | None,
    opening: dict[str, Any],
    edit: Any,
    asked: dict[str, Any],
    out: str | Path | None,
    progress: bool | None,
) -> Rollouts:
    """`sample` over the workers of a Ray cluster.

    Parameters
    ----------
    model : str, Path or callable
        Without arguments, it opens an engine in each worker.
    workers, address
        As in `spread`; None for one worker per GPU, or per core where the cluster has no GPU.
    opening : dict
        ``name`` of the engine in the workers, device, dtype, batch_size.
    edit, out, progress
        As in `sample`.
    asked : dict
        The arguments of `planned`, prompts included.

    Raises
    ------
    InputError
        As in `sample`; Ray is missing or there is no such cluster; the model is open already; the judge, the edit or
        the prefix cannot be sent to the workers.
    ModelError
        Workers do not agree on model and tokenizer, or a shard lost five workers one after the other.
    """
    if not isinstance(model, str | Path) and not callable(model):
        raise InputError(
            f"model is {type(model).__name__}",
            cause="an engine that is open here cannot be sent to other processes",
            next="give the model's folder or hub id, or a function that opens it: every worker does",
        )
    folder = None if out is None else Path(out).absolute()
    asked = {**asked, "prompts": read_prompts(asked["prompts"])}
    asked["shard_size"] = asked["shard_size"] or _begun_with(folder)
    rollouts = len(asked["prompts"]) * len(depths(asked["prefill"])) * asked["n"]
    if not callable(model):
        model = str(Path(model).absolute() if Path(model).is_dir() else model)
    with connected(address, workers) as ray:
        for name in ("judge", "prefix"):
            sent(ray, asked[name], f"the {name}")
        gpu = opening["device"] != "cpu" and not is_url(model) and ray.cluster_resources().get("GPU", 0) >= 1
        size = crew_size(ray, workers, gpu)
        order = Order(model, opening, edit, asked, rollouts, size, not gpu)
        with Crew(ray, order, min(size, rollouts), gpu, "the edit, or an argument,") as crew:
            plan = next(crew.results([None]))[1]
            told = {"engine": "ray", "version": metadata.version("ray"), "workers": size}
            run = {"created": plan.provenance["created"], "spread": told}
            plan = dataclasses.replace(plan, provenance={**plan.provenance, **run})
            return _gathered(crew, plan, run, folder, progress)


def _begun_with(folder: Path | None) -> int | None:
    """Rollouts per shard of the run in the folder, so that it goes on whatever the number of workers is now."""
    with suppress(OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return int(json.loads(((folder or Path()) / MANIFEST).read_text(encoding="utf-8"))["shard_size"])
    return None


def _gathered(crew: Crew, plan: Plan, run: dict[str, Any], folder: Path | None, progress: bool | None) -> Rollouts:
    """Whatever of the plan is not in the folder yet is sampled; errors carry what was finished."""
    shards = blocks(plan, folder, ".parquet")
    done: dict[int, Rollouts | Path] = {}

    def finished(partial: Any = None) -> Rollouts:
        there = [done[i] for i in sorted(done)]
        parts = [
            p if isinstance(p, Rollouts) else read_parquet(p) for p in there if isinstance(p, Rollouts) or p.exists()
        ]
        return Rollouts.concat([*parts, *([partial] if isinstance(partial, Rollouts) else [])])

    with (
        begun(plan, folder, ".parquet"),
        interrupted(plan, done, folder, finished),
        shown(plan, shards, progress) as advance,
    ):
        for i, (rows, path) in enumerate(shards):
            if path is not None and path.exists():
                _finished(path, len(rows))
                done[i] = path
        missing = [i for i in range(len(shards)) if i not in done]
        digest = None if folder is None else _digest(folder)
        for at, (tokens, part) in crew.results([Item(*shards[i], digest, run) for i in missing]):
            i = missing[at]
            rows, path = shards[i]
            if part is not None and path is not None:
                with carrying(part):
                    write_rollouts(part, path)
            if (kept := path or part) is not None:
                done[i] = kept
            advance(len(rows), tokens)
        _check_there(shards)
    return finished() if folder is None else read_rollouts(folder)


def _check_there(shards: list[Shard]) -> None:
    gone = [path for _, path in shards if path is not None and not path.exists()]
    if gone:
        raise UntrustedError(
            f"{len(gone)} of {len(shards)} shards are not in the folder, {gone[0]} the first",
            cause="workers wrote them into the folder of that name on their own node, or a file system shows them late",
            next="call again: what is missing then is sampled anew; choose a folder that is the same on every node",
        )
