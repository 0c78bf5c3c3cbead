"""The main job on tiny models: sample, judge, estimate, check, solve, sweep, report. Nothing reported is stored."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import __version__, organism
from .errors import InputError

__all__ = ["DEPTHS", "Done", "find_models", "run"]

DEPTHS = (0, 1, 2, 3, 5, 8, 12, 16, 20)
MAX_TOKENS = 96  # longer than any answer of the grammar, so that nothing is truncated unless a model rambles


@dataclass(frozen=True)
class Plan:
    """How much is sampled per model: prompts, and answers per prompt freely and at every forced depth."""

    prompts: int = 96
    free: int = 64
    forced: int = 16
    held_prompts: int = 72
    held_forced: int = 4


@dataclass(frozen=True)
class Done:
    """What a run found and wrote."""

    lines: list[str]
    summary: dict[str, Any]
    files: list[Path]


def find_models(folder: str | Path | None) -> dict[str, Path]:
    """The shipped models, or those of a folder: itself a model, or a folder of model folders.

    Raises
    ------
    InputError
        If there is no model folder.
    """
    if folder is None:
        return {name: organism.model_path(name) for name in organism.SHIPPED}
    folder = Path(folder)
    if (folder / "config.json").is_file():
        return {folder.resolve().name: folder}
    inside = sorted(p.parent for p in folder.glob("*/config.json")) if folder.is_dir() else []
    if not inside:
        raise InputError(
            f"No model in {folder}.",
            cause="Neither it nor a folder in it holds a config.json.",
            next="Give a folder in Hugging Face format, or a folder of such folders.",
        )
    return {p.name: p for p in inside}


def _variant(folder: Path) -> str | None:
    """Which planted truth a folder was trained towards, if its training report says so."""
    try:
        return json.loads((folder / "training.json").read_text())["variant"]
    except (OSError, KeyError, ValueError, TypeError):
        return None


def _say(quiet: bool) -> Callable[[str], None]:
    begun = time.perf_counter()

    def say(text: str) -> None:
        if not quiet:
            print(f"[{time.perf_counter() - begun:5.1f} s] {text}", file=sys.stderr, flush=True)

    return say


def _sample_model(path: Path, asked: list[dict], held: list[dict], plan: Plan, seed: int, out: Path) -> tuple[Any, Any]:
    """Judged rollouts of one model: the measured set, and a set of other prompts that the chain never sees."""
    from .rollouts import Rollouts, judge, sample, write_rollouts
    from .rollouts.engines import open_engine

    engine = open_engine("jax", path)
    if engine.vocab_size != len(organism.WORDS) or not organism.speaks(engine.tokenizer.encode):
        raise InputError(
            f"{path} does not speak the synthetic language of the demo.",
            cause="Its vocabulary is not the organism's.",
            next="For your own model: markovsafety sample MODEL PROMPTS --out DIR, then judge and report.",
        )
    common = {"max_tokens": MAX_TOKENS, "progress": False}
    forced = DEPTHS[1:]
    parts = [
        sample(engine, asked, n=plan.free, prefill=(0,), seed=seed, **common),
        sample(engine, asked, n=plan.forced, prefill=forced, seed=seed + 1, **common),
    ]
    unseen = sample(engine, held, n=plan.held_forced, prefill=DEPTHS, seed=seed + 2, **common)
    measured, unseen = judge(Rollouts.concat(parts), "organism"), judge(unseen, "organism")
    out.mkdir(parents=True, exist_ok=True)
    write_rollouts(measured, out / "measured.parquet")
    write_rollouts(unseen, out / "held_out.parquet")
    return measured, unseen


def run(
    *,
    models: str | Path | None = None,
    out: str | Path = "results/demo",
    seed: int = 0,
    budget: float = 0.1,
    plan: Plan | None = None,
    quiet: bool = False,
) -> Done:
    """Walk the whole road on every model and write the report.

    Parameters
    ----------
    models : path, optional
        A model folder or a folder of them; the four shipped models if not given.
    out : path
        Folder of the report: index.html, figures, summary.json, the rollouts and the estimated chains.
    seed : int
        Other seeds ask other prompts and draw other answers.
    budget : float
        Tolerated probability of harm, in [0, 1].
    plan : Plan, optional
        How much to sample; by default about 21,000 rollouts per model.
    quiet : bool
        No progress lines on standard error.

    Returns
    -------
    Done
    """
    from . import report
    from .analysis import analyse
    from .chains import KGram, write_chain

    if not 0 < budget < 1:
        raise InputError(
            f"budget={budget!r} is not a probability between 0 and 1.",
            cause="the budget is the probability of harm that an answer may have",
            next="Give for instance 0.1.",
        )
    begun, say, plan, out = time.perf_counter(), _say(quiet), plan or Plan(), Path(out)
    folders = find_models(models)
    asked = organism.prompts(n=plan.prompts, seed=seed)
    held = organism.prompts(n=plan.held_prompts, seed=seed + 1)
    analyses = []
    for name, path in folders.items():
        measured, unseen = _sample_model(path, asked, held, plan, 10 * seed, out / "rollouts" / name)
        say(f"{name}: {len(measured) + len(unseen):,} rollouts sampled and judged")
        variant = _variant(path)
        truth = organism.planted_profile(variant, asked, DEPTHS) if variant else None
        found = analyse(name, measured, held_out=unseen, truth=truth, states=KGram(3), budget=budget)
        if found.chain is not None:
            write_chain(found.chain, out / "rollouts" / name / "chain.npz")
            say(f"{name}: chain of {found.chain.n_states:,} states estimated, solved and checked")
        analyses.append(found)
    seconds = time.perf_counter() - begun
    command = f"markovsafety demo --seed {seed}" + (f" --models {models}" if models else "")
    page = report.write(out, analyses, command=command, seconds=seconds, extra={"seed": seed, "version": __version__})
    say(f"report written to {page}")
    summary = json.loads((out / "summary.json").read_text())
    total = summary["rollouts"]
    lines = [*summary["finding"], f"{total:,} rollouts in {time.perf_counter() - begun:.0f} s; the report: {page}"]
    return Done(lines, summary, [page, out / "summary.json"])
