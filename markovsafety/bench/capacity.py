"""Depth x capacity on real models: organisms of several widths, aligned to several depths, asked with k forced tokens.

Beside every measured h(k) stand the planted one (what a perfectly trained model would do) and what the distance of the
model's rows from the planted ones can do to it at most: the sum of total variations along answers, and the sharper sum
of the rows' effects on harm. Both hold for the difference of the two probabilities, whatever the cause.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from datetime import UTC, datetime
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from ..depth import profile
from ..errors import InputError
from ..files import atomic
from ..organism import parse_prompt, planted_profile, prompts
from ..rollouts import sample
from .machine import machine, versions

__all__ = ["DEPTHS", "measure", "run"]

DEPTHS = (0, 1, 2, 3, 4, 5, 8, 10, 12, 16, 20)
"""Forced tokens."""
SCORED = 4
"""Answers of every prompt and depth whose rows are compared with the planted ones."""


def run(
    models: str | Path | None = None,
    out: str | Path | None = None,
    *,
    ask: int = 96,
    n: int = 16,
    seed: int = 0,
    workers: int = 2,
    hidden: Sequence[int] | None = None,
    seeds: int = 3,
) -> dict[str, Any]:
    """Train what is missing of the grid, measure every model, and write the grid.

    Parameters
    ----------
    models : path
        Folder of the grid's models; missing ones are trained into it (two hours on two cores for all of them).
    out : path, optional
        Parquet file, one row per model and k; a page of Markdown and a figure go beside it.
    ask : int
        Prompts with verb-object pairs that no model was trained on.
    n : int
        Answers per prompt and k.
    seed : int
    workers : int
        Processes side by side.
    hidden : sequence of int, optional
        Widths of the hidden state, those of the committed grid if not given.
    seeds : int
        Bases of every width.

    Returns
    -------
    dict
        rows, models, date, versions, machine, seconds, line.
    """
    from ..organism.train_sizes import DEPTHS as TRAINED
    from ..organism.train_sizes import HIDDEN, train_grid

    if models is None:
        raise InputError(
            "The capacity grid has no folder for its models.",
            cause="It trains several dozen of them and keeps them, so that a stopped run goes on.",
            next="Pass models=FOLDER (--models FOLDER).",
        )
    begun = time.perf_counter()
    grid = train_grid(models, hidden=hidden or HIDDEN, depths=TRAINED, seeds=seeds, workers=workers)
    base = {(m["hidden"], m["seed"]): m for m in grid if m["variant"] == "base"}
    cells = [m for m in grid if m["variant"] != "base" and m["folder"]]
    settings = {"ask": ask, "n": n, "seed": seed}
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        parts = list(tqdm(pool.map(_kept, cells, [settings] * len(cells)), total=len(cells), desc="capacity"))
    rows = [
        row | _standing(cell, base[cell["hidden"], cell["seed"]])
        for cell, part in zip(cells, parts)
        for row in part["rows"]
    ]
    result = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "versions": versions(("numpy", "jax", "torch", "transformers")),
        **settings,
        "models": [{k: v for k, v in m.items() if k != "folder"} for m in grid],
        "rows": rows,
        "training_seconds": sum(m.get("seconds", 0.0) for m in grid),
        "measuring_seconds": sum(part["seconds"] for part in parts),
        "seconds": time.perf_counter() - begun,
    }
    counted = len({(r["hidden"], r["seed"], r["depth"]) for r in rows if r["counted"]})
    result["line"] = f"{counted} of {len(grid) - len(base)} aligned models count"
    if out is not None:
        from .capacity_page import write

        write(result, Path(out))
    return result


def _standing(cell: dict[str, Any], base: dict[str, Any]) -> dict[str, Any]:
    """What the model is, and whether it counts: its base has learned the language."""
    depth = 0 if cell["variant"] == "shallow" else int(cell["variant"].removeprefix("deep"))
    return {
        "hidden": cell["hidden"],
        "parameters": cell["parameters"],
        "depth": depth,
        "seed": cell["seed"],
        "counted": not base["failed"],
        "why": "; ".join(base["failed"]),
        "own_checks": "; ".join(cell["failed"]),
        "base_kl": base["kl"],
        "base_judge": base["judge"],
        "kl": cell["kl"],
        "total_variation": cell["tv"],
        "judge": cell["judge"],
    }


def _kept(cell: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """Rows of one model and the seconds they took, measured once: they stay beside the model for a run that goes on."""
    folder = Path(cell["folder"])
    place = folder.parent / ".measured" / f"{folder.name}.json"
    key = {**settings, "depths": list(DEPTHS), "scored": SCORED, "version": 1}
    if place.exists() and (kept := json.loads(place.read_text()))["settings"] == key:
        return kept
    begun = time.perf_counter()
    rows = measure(folder, cell["variant"], **settings)
    found = {"settings": key, "rows": rows, "seconds": time.perf_counter() - begun}
    with atomic(place) as fresh:
        fresh.write_text(json.dumps(found) + "\n")
    return found


def measure(
    folder: str | Path, variant: str, *, ask: int, n: int, seed: int, depths: Sequence[int] = DEPTHS
) -> list[dict[str, Any]]:
    """Measured and planted h(k) of one model, and the bounds on their difference.

    Parameters
    ----------
    folder : path
        Of the model.
    variant : str
        Its recipe.
    ask, n, seed : int
        Prompts, answers per prompt and k, seed of the sampling.
    depths : sequence of int
        Forced tokens.

    Returns
    -------
    list of dict
        Per k: k, harm, lower, upper (95 %, clustered by prompt), events, total, prompts, planted, tv and effect (means
        of the sums along planted and along the model's answers, with the upper ends of their 95 % intervals over
        prompts as tv_upper, effect_upper), shift (h of the model less the planted one by the rows' own account, what
        leaves the grammar taken as harmless), shift_error (its standard error) and left (how much leaves it).
    """
    asked = prompts(n=ask, seed=seed)
    options: dict[str, Any] = {"max_tokens": 96, "judge": "organism", "progress": False}
    rolls = sample(str(folder), asked, n=n, prefill=list(depths), seed=seed, **options)
    harm = profile(rolls)
    planted = planted_profile(variant, asked, depths)["all"]
    rows = []
    for i, (k, ends) in enumerate(zip(depths, _distances(folder, variant, asked, rolls, depths, seed))):
        h = harm[i]
        row = {"k": int(k), "harm": h.value, "lower": h.lower, "upper": h.upper, "planted": planted[k]}
        row |= {name: int(harm.info[name][i]) for name in ("events", "total", "prompts")}
        rows.append({key: v if isinstance(v, int) else float(v) for key, v in row.items()} | ends)
    return rows


def _distances(
    folder: str | Path, variant: str, asked: list[dict[str, Any]], rolls: Any, depths: Sequence[int], seed: int
) -> list[dict[str, float]]:
    import torch
    from transformers import AutoModelForCausalLM

    from ..organism.train_distance import distance, planted_answers

    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    read = [parse_prompt(item["prompt"]) for item in asked]
    ids = np.unique(rolls.prompt_id)
    out = []
    for k in depths:
        truth, own, who = [], [], []
        for j, (prompt, item) in enumerate(zip(read, asked)):
            truth += planted_answers(variant, prompt, k, item["prefix"], SCORED, f"{seed}/{j}/{k}")
            here = np.flatnonzero((rolls.prompt_id == ids[j]) & (rolls.prefill == k))[:SCORED]
            own += [rolls.answer(int(i)).tolist() for i in here]
            who += [prompt] * SCORED
        along = distance(model, variant, who, truth, k), distance(model, variant, who, own, k)
        tv, effect = _mean(along[0].tv, len(read)), _mean(along[1].effect, len(read))
        shift, left = _mean(along[1].shift, len(read)), _mean(along[1].left, len(read))
        ends = {"tv": tv[0], "tv_upper": tv[0] + 1.96 * tv[1]}
        ends |= {"effect": effect[0], "effect_upper": effect[0] + 1.96 * effect[1]}
        out.append(ends | {"shift": shift[0], "shift_error": shift[1], "left": left[0]})
    return out


def _mean(x: NDArray, prompts_: int) -> tuple[float, float]:
    """Mean and standard error by prompt."""
    by_prompt = x.reshape(prompts_, -1).mean(axis=1)
    return float(by_prompt.mean()), float(by_prompt.std(ddof=1) / np.sqrt(prompts_))
