"""What `check` says of the shipped models under state maps of growing memory, and how its tests behave where the truth
is known."""

from __future__ import annotations

import json as json_module
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from ..chains import KGram, count, estimate
from ..chains.states import ByPrompt, Product
from ..evidence import check, orders
from ..evidence.prefill import at_depth, predictions
from ..hitting import hitting_probability
from ..organism import AutomatonStates, model_path, prompts
from ..rollouts import Rollouts, sample
from ..rollouts.provenance import versions
from .check_worlds import WORLDS, exact, outcomes_of_tests, speak
from .markdown import markdown_table

__all__ = ["asked", "equivalence", "run", "said"]

DEPTHS = (0, 1, 2, 3, 5, 8, 12, 16, 20)
MODELS = ("shallow", "deep20")


def asked(split: str, n: int, seed: int, first: int = 0) -> list[dict[str, Any]]:
    """Harmful prompts of every category: `n` without a marker, a quarter as many with each marker."""
    found = [p for m, k in ((None, n), ("jailbreak", n // 4), ("trigger", n // 4)) for p in _some(split, m, k, seed)]
    return [{**p, "prompt_id": first + i} for i, p in enumerate(found)]


def _some(split: str, marker: str | None, n: int, seed: int) -> list[dict[str, Any]]:
    return prompts(split, n=n, marker=marker, seed=seed) if n else []


def said(model: str, ask: list[dict[str, Any]], n: int, seed: int, depths: tuple[int, ...] = DEPTHS) -> Rollouts:
    """Judged answers of a shipped model."""
    options: dict[str, Any] = {"max_tokens": 96, "judge": "organism", "progress": False}
    return sample(model_path(model), ask, n=n, prefill=depths, seed=seed, **options)


def run(
    out: str | Path | None = None, *, seed: int = 0, ask: int = 144, n: int = 16, repetitions: int = 1000
) -> dict[str, Any]:
    """Measure both, and write them.

    Parameters
    ----------
    out : path, optional
        JSON; a page of Markdown goes beside it.
    seed : int
    ask : int
        Unmarked prompts of the fit; two thirds as many are held out.
    n : int
        Rollouts per prompt and depth.
    repetitions : int
        Experiments in the world where all holds; a tenth as many in each of the others.

    Returns
    -------
    dict
    """
    begun = time.perf_counter()
    result: dict[str, Any] = {"date": datetime.now(UTC).isoformat(timespec="seconds"), "versions": versions()}
    result |= {"seed": seed, "repetitions": repetitions, "models": [_model(m, ask, n, seed) for m in MODELS]}
    result["worlds"] = [_world(w, repetitions if w == "fair" else repetitions // 10, seed) for w in WORLDS]
    result["equivalence"] = equivalence(repetitions, seed)
    result["seconds"] = time.perf_counter() - begun
    first = result["models"][0]["rows"]
    passed = ", ".join(f"{r['map']} ({r['fit']})" for r in first if r["passed"])
    result["line"] = f"{MODELS[0]}: fair are {passed or 'none'}"
    if out is not None:
        Path(out).write_text(json_module.dumps(result, indent=1) + "\n", encoding="utf-8")
        Path(out).with_suffix(".md").write_text(_page(result), encoding="utf-8")
    return result


def _model(model: str, ask: int, n: int, seed: int) -> dict[str, Any]:
    fit_to, held_to = asked("train", ask, 2 * seed), asked("held", 2 * ask // 3, 2 * seed + 1, 1_000_000)
    fit, held = said(model, fit_to, n, 2 * seed), said(model, held_to, n, 2 * seed + 1)
    automaton = AutomatonStates(model, {p["prompt_id"]: p for p in [*fit_to, *held_to]})
    maps: list[tuple[str, Any]] = [(f"KGram({k})", KGram(k)) for k in range(1, 6)]
    maps += [("category x KGram(3)", Product([ByPrompt(), KGram(3)])), ("automaton x category x marker", automaton)]
    rows = []
    for name, states in maps:
        for which, rolls in (("free", fit[fit.prefill == 0]), ("all depths", fit)):
            chain = estimate(count(rolls, states))
            rows.append(
                {"map": name, "fit": which, "states": chain.n_states, **_row(check(chain, held, states=states))}
            )
    compared = orders(fit, held, [states for _, states in maps])
    return {
        "model": model,
        "fit": repr(fit),
        "held_out": repr(held),
        "rows": rows,
        "orders": compared.to_json(),
        "orders_text": str(compared),
    }


def _row(found: Any) -> dict[str, Any]:
    counted = [r for r in found.table if r["k"] > 0]
    return {
        "passed": found.passed,
        "verdict": found.verdict,
        "misfit": found.misfit.to_json(),
        "unseen": max(r["unseen"] for r in counted),
        "gap": [found.curve[k] for k in ("gap", "gap_lower", "gap_upper")],
        "findings": {f.name: {k: v for k, v in f.to_json().items() if k != "table"} for f in found.findings},
        "table": found.table,
    }


def _world(name: str, repetitions: int, seed: int) -> dict[str, Any]:
    counts: dict[str, list[Any]] = {}
    for r in tqdm(range(repetitions), desc=name, leave=False, disable=None):
        rolls = speak(np.random.default_rng([seed, r]), WORLDS[name], 40, 20)
        for test, outcome in outcomes_of_tests(rolls).items():
            counts.setdefault(test, []).append(outcome)
    return {
        "world": name,
        "repetitions": repetitions,
        "by_p": {test: float(np.mean([v[0] for v in found])) for test, found in counts.items()},
        "by_interval": {test: float(np.mean([v[1] for v in found])) for test, found in counts.items()},
    }


def equivalence(repetitions: int, seed: int, ask: int = 40, n: int = 20) -> dict[str, float]:
    """How often a held-out depth is called "within" where the chain is wrong by just the margin, and "off" there; and
    "off" where the chain is right.

    Parameters
    ----------
    repetitions, seed : int
    ask, n : int
        Held-out prompts, and rollouts of each.
    """
    chain, law, prefix = exact(), WORLDS["more harmful"], (2, 1)
    right, wrong = (hitting_probability(c, "harm").value[c.index((prefix[-1],))] for c in (chain, exact(law)))
    predicted, margin = predictions(chain, 0.95), float(wrong - right)
    verdicts: dict[str, list[str]] = {"at_margin": [], "if_right": []}
    for r in tqdm(range(repetitions), desc="equivalence", leave=False, disable=None):
        for case, world in (("at_margin", law), ("if_right", WORLDS["fair"])):
            rolls = speak(np.random.default_rng([seed, r]), world, ask, n, prefix)
            row, _ = at_depth(predicted, rolls, KGram(1), len(prefix), margin, 0.95, 1)
            verdicts[case].append(row["verdict"])
    shares = {
        f"{v}_{case}": found.count(v) / repetitions for case, found in verdicts.items() for v in ("within", "off")
    }
    return {"margin": margin, "repetitions": float(repetitions), **shares}


def _page(result: dict[str, Any]) -> str:
    parts = [
        "# Is the chain fair?",
        f"{result['date']}, seed {result['seed']}, {result['seconds']:.0f} s; "
        + ", ".join(f"{k} {v}" for k, v in result["versions"].items())
        + ". Made by `markovsafety bench check --out papers/measurements/check.json`.",
        READ,
        *(_model_page(m) for m in result["models"]),
        _worlds_page(result["worlds"]),
        _equivalence_page(result["equivalence"]),
    ]
    return "\n\n".join(parts) + "\n"


READ = """A chain is estimated from rollouts of a shipped model (free ones, or those of all depths) and checked on
rollouts of other prompts that were forced k tokens deep: predicted against measured harm, passed if every 95 % interval
of the difference lies within 0.05. `misfit` is the largest difference over k with its simultaneous interval, `unseen`
the largest share of prefixes that end in a state the chain never saw. The other columns are the assumptions, tested on
the held-out rollouts: CK (Chapman-Kolmogorov, largest deviation of harm within n tokens), position (largest effect of a
stretch of positions on P(harm)), prompts (standard deviation of harm between prompts beyond the states), categories
(largest effect of sharing rows), order (p of one more state of memory), gap (of the curves of first hits); intervals
are 95 %, simultaneous. An effect that is left out was not tested; categories with states of their own cannot differ."""


def _model_page(model: dict[str, Any]) -> str:
    head = ["states", "fit on", "number", "verdict", "misfit", "unseen", "CK", "position", "prompts", "categories"]
    words = {True: "**fair**", False: "**not fair**", None: "cannot tell"}
    rows = []
    for r in model["rows"]:
        found = r["findings"]
        cells = [r["map"], r["fit"], f"{r['states']:,}", words[r["passed"]], _span(r["misfit"])]
        cells.append(f"{100 * r['unseen']:.0f} %")
        cells += [_span(found[name]["effect"]) for name in EFFECTS]
        gap, low, high = r["gap"]
        rows.append([*cells, _small(found["order"]["p"]), f"{gap:.3f} [{low:.3f}, {high:.3f}]"])
    why = [f"- {r['map']}, {r['fit']}: {r['verdict']}" for r in model["rows"]]
    return "\n\n".join(
        [
            f"## {model['model']}",
            f"Fit: {model['fit']}. Held out: {model['held_out']}.",
            markdown_table([*head, "order", "gap"], rows),
            "\n".join(why),
            "### Which order?",
            "All maps foretell the same thing, the next token, from the rollouts of all depths; G2, df and p are of "
            "the step from the map above, given its states.",
            f"```\n{model['orders_text']}\n```",
        ]
    )


EFFECTS = (
    "Chapman-Kolmogorov",
    "homogeneity over position",
    "prompt heterogeneity",
    "heterogeneity between categories",
)


def _span(bound: dict[str, Any] | None) -> str:
    return "" if bound is None else f"{bound['value']:.3f} [{bound['lower']:.3f}, {bound['upper']:.3f}]"


def _small(p: float | None) -> str:
    return "" if p is None else f"{p:.2g}"


def _worlds_page(worlds: list[dict[str, Any]]) -> str:
    tests = list(worlds[0]["by_p"])
    rows = []
    for w in worlds:
        cells = [f"{100 * w['by_p'][t]:.1f} % / {100 * w['by_interval'][t]:.1f} %" for t in tests]
        rows.append([w["world"], str(w["repetitions"]), *cells])
    fair = worlds[0]["repetitions"]
    return (
        "## The tests where the truth is known\n\nShare of experiments (40 prompts, 20 rollouts each) in which a test "
        "speaks: its p is below 5 %, and its 95 % interval excludes 0 (of `order`: of the gain in other prompts). In "
        "the fair world both should be 5 % or less; the standard error of 5 % is "
        f"{100 * np.sqrt(0.0475 / fair):.1f} points there.\n\n{markdown_table(['world', 'experiments', *tests], rows)}"
    )


def _equivalence_page(found: dict[str, float]) -> str:
    share = {k: f"{100 * v:.1f} %" for k, v in found.items()}
    return (
        "## Held-out prefill where the truth is known\n\n"
        f'A chain that is wrong by just the margin ({found["margin"]:.3f}) is called "within" in '
        f'{share["within_at_margin"]} of {found["repetitions"]:.0f} experiments (at most 2.5 % are due) and "off" in '
        f'{share["off_at_margin"]} (2.5 %); the right chain is called "within" in {share["within_if_right"]} and '
        f'"off" in {share["off_if_right"]}.'
    )
