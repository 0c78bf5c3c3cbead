"""How long 2000 posterior samples take, drawing included, for an answer of 64 positions with 12 states each.

``python -c "from markovsafety.bench.posterior import run; print(run('papers/measurements/posterior.json'))"``
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from ..chains import Chain, Counts, KGram, Position, Product, count
from ..evidence.posterior import posterior
from ..outcomes import CODES
from .machine import machine, versions

__all__ = ["layered_counts", "run"]

LAYERS, STATES = 64, 12
GOAL = 2.5
"""Seconds for 2000 samples on one core."""


def _law(rng: np.random.Generator) -> NDArray:
    """Rows over 12 next states, harm and refusal: shape (layers, states, 14)."""
    P = rng.gamma(2.0, size=(LAYERS, STATES, STATES + 2))
    ends = np.stack([0.002 * rng.random((LAYERS, STATES)), 0.01 * rng.random((LAYERS, STATES))], axis=-1)
    P[..., STATES:] = 0
    P *= ((1 - ends.sum(axis=-1)) / P.sum(axis=-1))[..., None]
    P[..., STATES:] = ends
    return P


def layered_counts(prompts: int = 330, n: int = 16, seed: int = 0) -> tuple[Counts, Chain]:
    """Counts of simulated rollouts by prompt, and the same transitions as a chain of integer counts without prompts.

    Parameters
    ----------
    prompts, n : int
        Prompts, and rollouts of each.
    seed : int
    """
    rng = np.random.default_rng(seed)
    cumulative = _law(rng).cumsum(axis=-1)
    R = prompts * n
    tokens, at, alive = np.full((R, LAYERS), -1, dtype=np.int32), np.zeros(R, dtype=np.int64), np.ones(R, dtype=bool)
    for t in range(LAYERS):
        after = (rng.random(R)[:, None] >= cumulative[t, at]).sum(axis=1)
        tokens[alive, t] = after[alive]
        alive &= after < STATES
        at = np.where(alive, after, 0)
    length = (tokens >= 0).sum(axis=1)
    last = tokens[np.arange(R), length - 1]
    outcome = np.where(last == STATES, CODES["harm"], np.where(last > STATES, CODES["refusal"], CODES["benign"]))
    rolls = SimpleNamespace(
        tokens=tokens[tokens >= 0],
        offsets=np.concatenate([[0], np.cumsum(length)]),
        outcome=outcome,
        hit=length - 1,
        prefill=np.zeros(R, dtype=np.int32),
        prompt_id=np.repeat(np.arange(prompts), n),
        category=np.full(R, "all"),
    )
    counts = count(rolls, Product((Position(), KGram(1))))
    S = len(counts.states)
    C = sp.csr_array(sp.vstack([counts.matrix, sp.csr_array((4, S + 4))], format="csr"))
    begin = int(counts.entries.source[0])
    outcomes = {name: S + code for name, code in CODES.items()}
    return counts, Chain.from_counts(C.astype(np.int64), outcomes, begin)


def run(out: str | Path | None = None, draws: int = 2000, repeats: int = 3) -> dict[str, Any]:
    """Best time of some repeats, by form of the posterior, compiled and imported before.

    Parameters
    ----------
    out : path, optional
        JSON file to write.
    draws, repeats : int
    """
    counts, chain = layered_counts()
    forms: dict[str, Callable[[int], Any]] = {
        "weights on prompts (default)": lambda n: posterior(counts, draws=n),
        "independent transitions": lambda n: posterior(counts, draws=n, by_prompt=False),
        "integer counts, no prompts": lambda n: posterior(chain, draws=n),
    }
    rows = []
    for name, form in forms.items():
        bound, seconds = form(100), []
        for _ in range(repeats):
            begun = time.perf_counter()
            bound = form(draws)
            seconds.append(time.perf_counter() - begun)
        start = bound.at_start
        row = {"form": name, "draws": draws, "seconds": min(seconds), "goal": GOAL, "met": min(seconds) <= GOAL}
        rows.append(row | {"at_start": start.to_json()})
    size = {"layers": LAYERS, "states": STATES, "columns": STATES + 2, "rows": len(counts.states)}
    size |= {"transitions": int(counts.matrix.nnz), "rollouts": counts.rollouts, "prompts": counts.prompts}
    told = {"date": datetime.now(UTC).isoformat(timespec="seconds"), "machine": machine(), "versions": versions()}
    result = {**told, "chain": size, "rows": rows}
    if out is not None:
        Path(out).write_text(json.dumps(result, indent=1) + "\n")
    return result
