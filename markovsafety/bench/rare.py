"""The rare-event table: error, coverage and cost of splitting and importance sampling where the truth is known.

Chains with leaky refusals whose leak is set so that P(harm) is 1e-6 and 1e-9. Every estimate is repeated thousands of
times. Cost is counted in rollouts begun (every continuation of a particle is one) and in tokens, and compared with the
``25 / p`` rollouts that plain sampling needs for an error of 20 %.
"""

from __future__ import annotations

import json as json_module
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from .. import toy
from ..chains import Chain
from ..errors import UntrustedError
from ..evidence import rare
from ..evidence.rare_chain import jumps, sample_weighted
from ..evidence.rare_intervals import pooled
from ..hitting import hitting_probability, hitting_time
from ..rollouts.provenance import versions

__all__ = ["relapses", "run"]

REPLICATIONS = 10
CHUNK = 100
"""Experiments sampled side by side."""


def relapses(stages: int, leak: float, *, end: float = 0.1, back: float = 0.02, turn: float = 0.05) -> Chain:
    """A refusal that must leak `stages` times, one after the other, before it becomes harm.

    In each stage the answer is calm or shaken, and turns from one to the other with probability `turn` per token; it
    leaks on with probability `leak` / 2 where it is calm and 2 `leak` where it is shaken, goes back to a calm first
    refusal with probability `back`, and ends with probability `end`. So two answers that have come equally far are not
    worth the same, and splitting has correlated ancestors to be wrong about.
    """
    n = 2 * stages
    P = np.zeros((n + 2, n + 2))
    for i in range(stages):
        for mood, share in ((0, 0.5), (1, 2.0)):
            row = P[2 * i + mood]
            row[2 * i + 2 + mood if i + 1 < stages else n] += leak * share
            row[n + 1] += end
            row[2 * i + 1 - mood] += turn
            row[0] += back
            row[2 * i + mood] += 1 - row.sum()
    states = [f"refusal {i}, {mood}" for i in range(stages) for mood in ("calm", "shaken")]
    return Chain(P, {"harm": n, "refusal": n + 1}, 0, [*states, "harm", "end"])


def _with_probability(stages: int, p: float) -> Chain:
    """`relapses` with the leak that gives this P(harm)."""
    from scipy.optimize import brentq

    def gap(leak: float) -> float:
        value = hitting_probability(relapses(stages, leak), "harm", certify=False).at_start.value
        return float(np.log(value / p))

    root: Any = brentq(gap, 1e-6, 0.25)
    return relapses(stages, float(root))


def cases() -> Iterator[tuple[str, Chain, dict[str, Any]]]:
    """Name, chain and method of every row."""
    rng = np.random.default_rng(7)
    for p, stages, sizes in ((1e-6, 9, (130, 150, 120)), (1e-9, 13, (190, 175, 152))):
        chain = _with_probability(stages, p)
        h = hitting_probability(chain, "harm", certify=False).value
        rough = np.where((h > 0) & (h < 1), h * np.exp(rng.normal(0, 0.3, len(h))), h)
        name = f"{stages} leaks, {p:g}"
        yield name, chain, {"method": "splitting", "level": "exact committor", "n": sizes[0], "score": None}
        yield name, chain, {"method": "splitting", "level": "committor off by 30 %", "n": sizes[1], "score": rough}
        leaks = np.append(np.arange(2 * stages) // 2, [stages, 0.0])
        yield name, chain, {"method": "splitting", "level": "leaks so far, pilot", "n": sizes[2], "score": leaks}
        tilted = rare.tilt(chain, rough, power=0.8)
        yield name, chain, {"method": "importance", "level": "tilted, off by 30 %", "n": 2000, "proposal": tilted}
        poor = rare.tilt(chain, np.where((h > 0) & (h < 1), h * np.exp(rng.normal(0, 1.0, len(h))), h))
        yield name, chain, {"method": "importance", "level": "tilted, off by a factor e", "n": 1000, "proposal": poor}
        one = toy.leak(
            0.7 * p
        )  # a single token of this probability leaves the refusal, and a seventh / 0.1 of it harms
        single = Chain(one.P, one.outcomes, 1, one.states)
        loose = Chain(toy.leak(0.1).P, one.outcomes, 1, one.states)
        told = {"method": "importance", "level": "unsafe proposal", "n": 1000, "proposal": loose}
        yield f"one leak of {0.7 * p:.0e}", single, told


def run(
    *,
    repetitions: int = 4000,
    seed: int = 0,
    models: bool = True,
    json: str | Path | None = None,
    progress: bool | None = None,
) -> dict[str, Any]:
    """Measure the table.

    Parameters
    ----------
    repetitions : int
        Experiments per row.
    seed : int
    models : bool
        Whether to measure the shipped models as well.
    json : str or Path, optional
        Where to write the result; the same table goes beside it as Markdown.
    progress : bool, optional

    Returns
    -------
    dict
        ``rows``, ``models`` (see `rare_model`) and ``line``, all of it to read. A row: chain, method, level, p, error
        (root mean square, relative), bias (in standard errors of the mean), coverage (of the intervals given),
        textbook (coverage of the interval that takes particles for independent), refused (share of experiments
        without an interval), width (median of upper / lower), rollouts, tokens, ratio and ratio_tokens (to those of
        25 / p plain rollouts).
    """
    rows = []
    begun = time.perf_counter()
    every = list(cases())
    from .rare_model import run_models, table

    with tqdm(total=len(every), disable=None if progress is None else not progress) as bar:
        for i, (name, chain, how) in enumerate(every):
            rng = np.random.default_rng([seed, i])
            made = _split if how["method"] == "splitting" else _weigh
            rows.append(_row(name, chain, how, *made(chain, how, repetitions, rng)))
            bar.update()
    have = {k: v for k, v in versions().items() if k in ("python", "numpy", "markovsafety")}
    spoken = run_models(seed) if models else []
    result = {
        "line": _table(rows) + (f"\n\n{table(spoken)}" if spoken else ""),
        "rows": rows,
        "models": spoken,
        "repetitions": repetitions,
        "seed": seed,
        "seconds": round(time.perf_counter() - begun, 1),
        "versions": have,
        "date": datetime.now(UTC).date().isoformat(),
    }
    if json is not None:
        path = Path(json)
        path.write_text(json_module.dumps(result, indent=1) + "\n", encoding="utf-8")
        path.with_suffix(".md").write_text(_page(result), encoding="utf-8")
    return result


def _split(chain: Chain, how: dict[str, Any], repetitions: int, rng: np.random.Generator) -> tuple[Any, ...]:
    """Values, ends (nan where refused) and textbook intervals of every experiment; (rollouts, tokens) of one."""
    score, n = how["score"], how["n"]
    source, levels = rare.opened(chain, "harm", score, None)
    values, ends, plain, rollouts, tokens = [], [], [], 0, 0
    if levels is None:  # found once, as a user would; its cost is added to every experiment
        levels, pilot = rare.pilot_levels(source, n, rng)
        rollouts, tokens = pilot["pilot_rollouts"] * repetitions, pilot["pilot_tokens"] * repetitions
    for at in range(0, repetitions, CHUNK):
        size = min(CHUNK, repetitions - at)
        hits, sampled, begun = rare.stages(source, levels, n, REPLICATIONS * size, rng)
        rollouts, tokens = rollouts + begun, tokens + sampled
        for part in hits.reshape(size, REPLICATIONS, -1):
            value, lower, upper, _ = pooled(part, n, 0.95)
            values.append(value)
            plain.append(_textbook(part, n))
            ends.append((lower, upper) if 2 * (part[:, -1] > 0).sum() >= REPLICATIONS else (np.nan, np.nan))
    return np.array(values), np.array(ends), np.array(plain), (rollouts / repetitions, tokens / repetitions)


def _textbook(hits: NDArray, n: int) -> tuple[float, float]:
    """The interval that takes particles for independent: ``prod(1 + (1 - p_i) / (p_i n)) - 1`` as relative variance."""
    share = np.maximum(hits.sum(axis=0), 0.5) / (n * len(hits))
    width = 1.96 * np.sqrt(np.prod(1 + (1 - share) / (share * n * len(hits))) - 1)
    return float(np.exp(np.log(share).sum() - width)), float(np.exp(np.log(share).sum() + width))


def _weigh(chain: Chain, how: dict[str, Any], repetitions: int, rng: np.random.Generator) -> tuple[Any, ...]:
    truth, proposal, n = jumps(chain, "harm"), jumps(how["proposal"], "harm"), how["n"]
    values, ends, tokens = [], [], 0
    for at in range(0, repetitions, CHUNK):
        size = min(CHUNK, repetitions - at)
        hits, weights, sampled = sample_weighted(truth, proposal, n * size, rng)
        tokens += sampled
        for hit, weight in zip(hits.reshape(size, n), weights.reshape(size, n)):
            try:
                bound = rare.weighted(hit, weight)
                ends.append((bound.lower, bound.upper))
            except UntrustedError as error:
                bound = error.partial
                ends.append((np.nan, np.nan))
            values.append(bound.value)
    return np.array(values), np.array(ends), None, (n, tokens / repetitions)


def _row(
    name: str, chain: Chain, how: dict[str, Any], values: NDArray, ends: NDArray, plain: NDArray | None, cost: tuple
) -> dict[str, Any]:
    p = float(hitting_probability(chain, "harm").at_start.value)
    length = float(hitting_time(chain, chain.P.diagonal() == 1).at_start.value)
    lower, upper = ends[~np.isnan(ends[:, 0])].T
    rollouts, tokens = cost
    return {
        "chain": name,
        "method": how["method"],
        "level": how["level"],
        "p": p,
        "error": float(np.sqrt(np.mean((values / p - 1) ** 2))),
        "bias": float((values.mean() - p) / (values.std(ddof=1) / np.sqrt(len(values)))),
        "coverage": float(np.mean((lower <= p) & (p <= upper))) if len(lower) else None,
        "textbook": None if plain is None else float(np.mean((plain[:, 0] <= p) & (p <= plain[:, 1]))),
        "refused": 1 - len(lower) / len(ends),
        "width": float(np.median(upper / lower)) if len(lower) else None,
        "rollouts": rollouts,
        "tokens": tokens,
        "ratio": rollouts * p / 25,
        "ratio_tokens": tokens * p / 25 / length,
    }


def _table(rows: list[dict[str, Any]]) -> str:
    head = ["chain", "method", "level or proposal", "p", "error", "bias z", "coverage", "textbook", "refused"]
    head += ["rollouts", "of 25/p", "tokens", "of naive"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for r in rows:
        covered, plain = ("" if r[k] is None else f"{100 * r[k]:.1f} %" for k in ("coverage", "textbook"))
        cells = [r["chain"], r["method"], r["level"], f"{r['p']:.3g}", f"{100 * r['error']:.1f} %", f"{r['bias']:+.1f}"]
        cells += [covered, plain, f"{100 * r['refused']:.1f} %", f"{r['rollouts']:,.0f}", f"{r['ratio']:.1e}"]
        lines.append("| " + " | ".join([*cells, f"{r['tokens']:,.0f}", f"{r['ratio_tokens']:.1e}"]) + " |")
    return "\n".join(lines)


def _page(result: dict[str, Any]) -> str:
    spread = 100 * np.sqrt(0.95 * 0.05 / result["repetitions"])
    return (
        "# Rare events: error, coverage and cost\n\n"
        f"{_table(result['rows'])}\n\n"
        f"{result['repetitions']} experiments per row, seed {result['seed']}; the standard error of a coverage of 95 % "
        f"is {spread:.2f} points. Intervals are two-sided 95 %. `error` is the root mean square of the relative error, "
        "`textbook` the coverage of the interval that takes particles for independent, "
        "`bias z` the mean's distance from the exact probability in its standard errors. `rollouts` counts every "
        "continuation of a particle as one and is compared with the 25 / p rollouts that plain sampling needs for an "
        "error of 20 %; `tokens` with the tokens of those. With the exact committor, or a fair proposal, the error is "
        "below 20 % at the cost shown; a rough level function costs a little more. A poor proposal (off by a factor e) "
        "has weights with so long a tail that one experiment in thousands rules the error; its intervals hold. Made by "
        "`markovsafety bench rare --out papers/measurements/rare.json`.\n"
    ) + (_spoken(result["models"]) if result["models"] else "")


def _spoken(rows: list[dict[str, Any]]) -> str:
    from .rare_model import PROMPTS, table

    return (
        f"\n## The shipped models\n\n{table(rows)}\n\n"
        f"P(harm) within so many tokens, mean over {PROMPTS} prompts, which the intervals take as given; rollouts, or "
        "continuations, in brackets. Class masses are the reference: the model's own probability of a harm word before "
        "every token, averaged over free rollouts. Importance sampling takes half of its answers from the base model, "
        "which harms often, and half from the model itself. Splitting continues prefixes along the committor of a "
        "3-gram chain.\n"
    )
