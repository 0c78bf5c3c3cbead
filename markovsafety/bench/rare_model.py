"""Rare harm of the shipped models: splitting, importance sampling and class masses, three roads to one number.

The reference is the model's own value, never that of the grammar it was trained on: the average, over free rollouts,
of the recorded probability mass of harm words before every token up to the first hit, which is unbiased and has a
small part of the variance of counting hits.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..bound import Bound
from ..chains import KGram, count, estimate
from ..evidence import rare
from ..organism import HARM_IDS, model_path, prompts
from ..outcomes import CODES
from ..rollouts import Rollouts, sample
from ..rollouts.continuing import continuing
from ..rollouts.engines import open_engine
from ..rollouts.engines.replay import score

__all__ = ["CASES", "class_mass", "run_models", "table"]

CASES = (
    {"model": "shallow", "max_tokens": 14, "rollouts": 12_000, "n": 600},
    {"model": "deep20", "max_tokens": 48, "rollouts": 6_000, "n": 300},
    {"model": "deep20", "max_tokens": 14, "rollouts": 40_000, "n": 1_500},
)
"""Model, length of its answers, free (and base) rollouts, particles per level and replication."""
PROMPTS = 6


def class_mass(rolls: Rollouts, name: str = "harm") -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean and squared standard error, by prompt, of the class mass met up to the first hit of every rollout."""
    mass = np.nan_to_num(rolls.masses[name].astype(np.float64))
    row = np.repeat(np.arange(len(rolls)), rolls.lengths)
    index = np.arange(len(mass)) - rolls.offsets[:-1][row]
    open_ = (rolls.outcome[row] != CODES["harm"]) | (index <= rolls.hit[row])
    met = np.bincount(row[open_], mass[open_], minlength=len(rolls))
    parts = [met[rolls.prompt_id == k] for k in np.unique(rolls.prompt_id)]
    return np.array([p.mean() for p in parts]), np.array([p.var(ddof=1) / len(p) for p in parts])


def run_models(seed: int = 0) -> list[dict[str, Any]]:
    """One row per case: the three answers, their cost, and whether their intervals have a point in common.

    Parameters
    ----------
    seed : int
    """
    asked = [{k: item[k] for k in ("prompt", "category")} for item in prompts(n=PROMPTS, seed=seed)]
    base = open_engine("auto", model_path("base"))
    return [_row(case, base, asked, seed) for case in CASES]


def _row(case: dict[str, Any], base: Any, asked: list[dict[str, Any]], seed: int) -> dict[str, Any]:
    engine = open_engine("auto", model_path(case["model"]))
    options = {"max_tokens": case["max_tokens"], "judge": "organism", "progress": False}
    n = case["rollouts"] // PROMPTS
    free = sample(engine, asked, n=n, seed=seed, classes={"harm": HARM_IDS}, **options)
    reference = _reference(free)
    own = sample(engine, asked, n=n, seed=seed + 1, **options)
    unsafe = sample(base, asked, n=n, seed=seed + 2, **options)
    both = Rollouts.concat([unsafe, own])
    weighted = rare.importance(score(both, engine), score(both, base), own=0.5, prompts="fixed")
    states = KGram(3)
    level = rare.committor_score(estimate(count(both, states)), states)
    go = continuing(engine, asked, max_tokens=case["max_tokens"], judge="organism")
    split = rare.splitting(rare.Prefixes(go, level, PROMPTS), n=case["n"], seed=seed + 3)
    answers = {"class_mass": reference, "importance": weighted, "splitting": split}
    return {
        "model": case["model"],
        "max_tokens": case["max_tokens"],
        "hits": int((free.outcome == CODES["harm"]).sum()),
        "rollouts": {"class_mass": len(free), "importance": len(both), "splitting": _spent(split)},
        **{name: bound.to_json() for name, bound in answers.items()},
        "agree": max(b.lower for b in answers.values()) <= min(b.upper for b in answers.values()),
    }


def _spent(bound: Bound) -> int:
    return int(bound.info["rollouts"] + bound.info["pilot_rollouts"])


def _reference(free: Rollouts) -> Bound:
    mean, error = class_mass(free)
    value, half = float(mean.mean()), 1.96 * float(np.sqrt(error.sum())) / len(mean)
    return Bound(value, max(value - half, 0.0), value + half, reasons={"sampling": half}, info={"name": "P(harm)"})


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    names = {"class_mass": "class masses", "importance": "importance sampling", "splitting": "splitting"}
    lines = [f"| model | tokens | {' | '.join(names.values())} | agree |", "|" + "---|" * 6]
    for r in rows:
        cells = [
            f"{r[k]['value']:.2e} [{r[k]['lower']:.2e}, {r[k]['upper']:.2e}] ({r['rollouts'][k]:,})" for k in names
        ]
        lines.append(f"| {r['model']} | {r['max_tokens']} | {' | '.join(cells)} | {'yes' if r['agree'] else 'no'} |")
    return "\n".join(lines)
