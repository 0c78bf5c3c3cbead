"""Safety tuning in two preference steps, of many strengths, and what debiasing does to what comes out.

The reward step prefers the longer of two plans of the base model; the safety step prefers refusals to answers that did
harm. Raw data hold pairs that say little, as annotators make them: refusals preferred though nothing was harmful.
Every model is measured by category: harm, over-refusal, and how often its answers win against those of the base model.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from .. import organism
from ..interventions import (
    Host,
    Preference,
    Preferred,
    bias_table,
    cleaned,
    fine_tune,
    open_host,
    preference_rows,
    trade_offs,
)
from ..outcomes import CODES
from ..rollouts.rollouts import Rollouts
from ..rollouts.sample import sample

__all__ = ["RATIOS", "helpfulness", "reward_pairs", "run_steps", "safety_pairs"]

RATIOS = (0.1, 0.05, 0.025, 0.01)
"""beta / lambda of the safety step."""
ITERATIONS = (40, 120)
DATA = ("raw", "cleaned")
STRENGTHS = (0.0, 0.5, 1.0)
BETA, ANCHOR = 0.1, 0.1
NOISE = 0.3
"""Share of harmless pairs of the raw data in which the refusal was preferred."""
CLEAR, SLIGHT = 1.0, 0.1
"""Margins of pairs that differ in harm, and of those that do not."""
STEP = organism.WORDS.index("step")
REFUSALS = [[organism.WORDS.index(w) for w in f"{a} i {b} . <eos>".split()] for a, b in
            (("sorry", "cannot assist"), ("unfortunately", "must decline"), ("no", "cannot assist"))]  # fmt: skip


def helpfulness(rolls: Rollouts) -> np.ndarray:
    """Score of answers to harmless prompts, float64 (answers,): the number of steps of a finished answer that neither
    refuses nor does harm, 0 for all others. Answers of the language have two to five steps."""
    row = np.repeat(np.arange(len(rolls)), rolls.lengths)
    steps = np.bincount(row, rolls.tokens == STEP, len(rolls))
    return np.where(rolls.outcome == CODES["benign"], steps, 0.0)


def reward_pairs(rolls: Rollouts, score: Sequence[float] | np.ndarray) -> list[Preference]:
    """The best and the worst of the answers to every prompt; none where they score alike."""
    made, prompts, answers = [], rolls.columns["prompt_tokens"], list(rolls.answers())
    score = np.asarray(score, dtype=np.float64)
    for prompt in np.unique(rolls.prompt_id):
        rows = np.flatnonzero(rolls.prompt_id == prompt)
        best, worst = int(rows[score[rows].argmax()]), int(rows[score[rows].argmin()])
        if score[best] > score[worst]:
            told = (prompts[best].tolist(), answers[best].tolist(), answers[worst].tolist())
            made.append(Preference(*told))
    return made


def safety_pairs(harmful: Rollouts, harmless: Rollouts, seed: int = 0) -> list[Preference]:
    """Raw data: a refusal preferred to every answer to a harmful prompt, with a margin where it did harm; the answer
    preferred to a refusal on harmless prompts, but for a share of `NOISE` with hardly a margin."""
    rng, made = random.Random(seed), []
    for rolls, is_harmful in ((harmful, True), (harmless, False)):
        for i, (prompt, answer) in enumerate(zip(rolls.columns["prompt_tokens"], rolls.answers())):
            outcome, refusal = rolls.outcome[i], rng.choice(REFUSALS)
            if outcome not in (CODES["harm"], CODES["benign"]):
                continue
            noise = not is_harmful and rng.random() < NOISE
            clear = outcome == CODES["harm"] if is_harmful else not noise
            sides = (refusal, answer.tolist()) if is_harmful or noise else (answer.tolist(), refusal)
            made.append(Preference(prompt.tolist(), *sides, CLEAR if clear else SLIGHT))
    return made


def run_steps(*, ask: int = 48, n: int = 6, quick: bool = False, seed: int = 0) -> dict[str, Any]:
    """Train and measure the grid.

    Parameters
    ----------
    ask, n : int
        Held-out prompts of each kind, and answers to each.
    quick : bool
        One model, few prompts.
    seed : int

    Returns
    -------
    dict
        reward (what the reward step did), cells (one per model: ratio, iterations, data, rows by strength, worse and
        chosen by category).
    """
    base = open_host(organism.model_path("base"), device="cpu")
    how: dict[str, Any] = {"judge": "organism", "max_tokens": 64, "progress": False}
    ask, n = (12, 2) if quick else (ask, n)
    asked = {
        k: organism.prompts("held", n=ask, harmful=k == "harmful", reach=1, seed=seed) for k in ("harmful", "harmless")
    }
    learn = {k: organism.prompts("train", n=192, harmful=k == "harmful", reach=1, seed=seed + 1) for k in asked}
    sft = sample(base.engine, asked["harmless"], n=n, seed=seed + 2, **how)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        plans = sample(base.engine, learn["harmless"], n=4, seed=seed + 3, **how)
        _step(organism.model_path("base"), reward_pairs(plans, helpfulness(plans)), folder / "reward", BETA, 60, seed)
        reward = open_host(folder / "reward", device="cpu")
        said = {k: sample(reward.engine, p, n=1, seed=seed + 4, **how) for k, p in learn.items()}
        raw = safety_pairs(said["harmful"], said["harmless"], seed)
        data = {"raw": raw, "cleaned": cleaned(raw)}
        grid = list(product(RATIOS, ITERATIONS, DATA))[: 1 if quick else None]
        arms = {"0": {k: sample(reward.engine, p, n=n, seed=seed + 5, **how) for k, p in asked.items()}}
        start = trade_offs(_kind(arms, "harmful"), _kind(arms, "harmless"), reference=sft, score=helpfulness)
        cells = []
        for ratio, iterations, name in grid:
            out = folder / f"{ratio}-{iterations}-{name}"
            _step(folder / "reward", data[name], out, ratio, iterations, seed)
            arms = _answers(open_host(out, device="cpu"), reward, asked, n, seed, how)
            front = trade_offs(_kind(arms, "harmful"), _kind(arms, "harmless"), reference=sft, score=helpfulness)
            told = {"ratio": ratio, "iterations": iterations, "data": name, "pairs": len(data[name])}
            cells.append(told | {"rows": _rows(front), "chosen": front.chosen, "worse": front.worse})
        return {"reward": _rows(start), "cells": cells, "pairs": {k: len(v) for k, v in data.items()}}


def _step(base: Path, pairs: list[Preference], out: Path, beta: float, steps: int, seed: int) -> None:
    chosen, rejected = preference_rows(pairs)
    objective = Preferred(rejected, beta=beta, anchor=ANCHOR)
    tuning: dict[str, Any] = {"steps": steps, "batch_size": 16, "learning_rate": 5e-4, "warmup": 5, "seed": seed}
    fine_tune(base, chosen, out, objective=objective, progress=False, device="cpu", **tuning)


def _answers(
    host: Host, reward: Host, asked: dict[str, Any], n: int, seed: int, how: dict[str, Any]
) -> dict[str, dict[str, Rollouts]]:
    """Answers at every strength; the reference of the bias is the model before the safety step."""
    table = bias_table(host, reward, length=4, n=512, response="random", seed=seed)
    edits = {f"{a:g}": table.edit(a) if a else None for a in STRENGTHS}
    return {
        a: {k: sample(host.engine, p, n=n, edit=e, seed=seed + 6 + i, **how) for k, p in asked.items()}
        for i, (a, e) in enumerate(edits.items())
    }


def _kind(arms: dict[str, dict[str, Rollouts]], kind: str) -> dict[str, Rollouts]:
    return {a: r[kind] for a, r in arms.items()}


def _rows(front: Any) -> list[dict[str, Any]]:
    """Harm overall and in the worst category, over-refusal and win rate, by strength."""
    out = []
    for row in front.rows("all"):
        own = [r for r in front.table if r["setting"] == row["setting"] and r["group"] != "all"]
        worst = max(own, key=lambda r: r["harm"].value)
        out.append(
            {
                "strength": row["setting"],
                **{k: row[k].to_json() for k in ("harm", "refusal", "helpful")},
                "worst": worst["group"],
                "worst harm": worst["harm"].to_json(),
            }
        )
    return out
