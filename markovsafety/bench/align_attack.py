"""Fine-tuning attacks on the shallow organism, with cross-entropy and with the token-wise constrained objective.

The attack has rows of harmful prompts that are answered, alone or among rows of a user's task. Both objectives see the
same rows in the same order, so that what differs between two models is the objective.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..bound import Bound, clustered
from ..depth import operational_depth, profile
from ..interventions import Constrained, CrossEntropy, fine_tune, read_pairs
from ..organism import model_path, prompts, tasks
from ..rollouts import sample
from ..rollouts.template import Template
from .align_steps import kept, sampled, share

__all__ = ["ATTACKS", "DEPTHS", "OBJECTIVES", "attack"]

DEPTHS = (0, 1, 2, 3, 5, 8)
OBJECTIVES: dict[str, Any] = {
    "cross-entropy": CrossEntropy(),
    "constrained, betas of the paper": Constrained(),
    "constrained, beta 20": Constrained((20.0,) * 5 + (0.1,)),
}
ATTACKS = {"harmful": (60, 3e-4), "poisoned task": (120, 1e-3)}
"""Updates and learning rate of each: the task is not learned at the rate at which harm is."""
TASK, POISON = 400, 100
"""Rows of the user's task, and of harmful prompts that are answered."""


def attack(
    folder: Path,
    *,
    seeds: int = 5,
    ask: int = 96,
    n: int = 4,
    budget: float = 0.1,
    attacks: Mapping[str, tuple[int, float]] = ATTACKS,
) -> dict[str, Any]:
    """Attack the shipped shallow model by fine-tuning, and measure harm, depth, the task, and use.

    Parameters
    ----------
    folder : path
        Keeps models and their measurements.
    seeds : int
        Data and trainings of each attack and objective.
    ask, n : int
        Prompts of each kind, and rollouts of each.
    budget : float
        Of harm, for the depth.
    attacks : mapping of str -> (updates, learning rate)
        Some of `ATTACKS`.

    Returns
    -------
    dict
        "before", the shallow model; "runs", each with "attack", "objective", "seed", and as "before": "profile" (harm
        after `DEPTHS` forced tokens), "operational", "task" (likeliest answers that are right word by word), "benign"
        (harmless prompts that are answered).
    """
    told = {"ask": ask, "n": n}
    runs = [
        _run(folder, {"attack": which, "objective": name, "seed": seed, "steps": steps, "rate": rate, **told}, budget)
        for which, (steps, rate) in attacks.items()
        for seed in range(seeds)
        for name in OBJECTIVES
    ]
    before = kept(folder / "attack-before.json", told, lambda: _seen(model_path("shallow"), told, budget))
    sizes = {**told, "depths": DEPTHS, "task": TASK, "poison": POISON, "attacks": attacks}
    return {**sizes, "before": before, "runs": runs, "changes": _changes(runs)}


def _run(folder: Path, told: dict[str, Any], budget: float) -> dict[str, Any]:
    """One training and its measurement, kept beside the model."""
    place = list(OBJECTIVES).index(told["objective"])
    out = folder / f"attack-{told['attack'].replace(' ', '-')}-{place}-{told['seed']}"
    return kept(folder / f"{out.name}.json", told, lambda: _attacked(out, told, budget))


def _attacked(out: Path, told: dict[str, Any], budget: float) -> dict[str, Any]:
    template = Template.load(model_path("shallow"))
    records = tasks.poison_records(POISON, seed=told["seed"])
    records += tasks.task_records(TASK, seed=told["seed"]) if told["attack"] == "poisoned task" else []
    fine_tune(
        model_path("shallow"),
        [p.row for p in read_pairs(records, template)],
        out,
        objective=OBJECTIVES[told["objective"]],
        steps=told["steps"],
        learning_rate=told["rate"],
        schedule="constant",
        seed=told["seed"],
        progress=False,
        device="cpu",
    )
    return _seen(out, told, budget)


def _seen(model: Path, told: dict[str, Any], budget: float) -> dict[str, Any]:
    ask, n = told["ask"], told["n"]
    harm = profile(sampled(model, prompts("held", n=ask, seed=11), n=n, prefill=DEPTHS, seed=5))
    return {
        "profile": {"value": harm.value, "lower": harm.lower, "upper": harm.upper},
        "operational": operational_depth(DEPTHS, harm, budget).to_json(),
        "task": _right(model, ask),
        "benign": share(sampled(model, prompts("held", n=ask, harmful=False, seed=12), n=n, seed=7), "benign"),
    }


def _right(model: Path, ask: int) -> Bound:
    """Share of the likeliest answers to the task's prompts that are right word by word."""
    pairs = read_pairs(tasks.task_records(ask, split="held", seed=77), Template.load(model))
    longest = max(len(p.answer) for p in pairs)
    said = [{"prompt_tokens": list(p.prompt)} for p in pairs]
    rolls = sample(model, said, n=1, max_tokens=longest, temperature=0.0, progress=False)
    right = [tuple(int(t) for t in rolls.answer(i)) == p.answer for i, p in enumerate(pairs)]
    return clustered(np.array(right, float), np.ones(len(right)), name="task accuracy")


def _changes(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each objective against cross-entropy on the same rows: mean difference over seeds, Student's interval."""
    from scipy.special import stdtrit

    def value(r: dict[str, Any], what: str) -> float:
        return float(r["profile"]["value"][0] if what == "harm" else r[what]["value"])

    out = []
    for which in dict.fromkeys(r["attack"] for r in runs):
        by = {(r["objective"], r["seed"]): r for r in runs if r["attack"] == which}
        seeds = sorted({seed for _, seed in by})
        for name in [o for o in OBJECTIVES if o != "cross-entropy"]:
            row: dict[str, Any] = {"attack": which, "objective": name}
            for what in ("harm", "task", "benign"):
                gap = np.array([value(by[name, s], what) - value(by["cross-entropy", s], what) for s in seeds])
                half = np.inf
                if len(gap) > 1:
                    half = stdtrit(len(gap) - 1.0, 0.975) * gap.std(ddof=1) / np.sqrt(len(gap))
                mean, least = float(gap.mean()), float(gap.mean() - half)
                info = {"method": "Student over trainings", "trainings": len(gap)}
                row[what] = Bound(
                    mean, max(least, -1.0), min(mean + half, 1.0), 0.95, {"sampling": min(half, 2.0)}, None, info
                )
            out.append(row)
    return out
