"""Coverage: how often the intervals hold the true value, where the truth is exact and prompts differ.

Experiments are simulated on the planted automaton of the organism (`coverage_cells`): K prompts are drawn, each is
asked a number of times, and every interval is made as the package makes it. Rates at the start and after k forced
tokens, changes of rates, operational safety depths, and flags of `compare` where nothing changed.
"""

from __future__ import annotations

import functools
import json as json_module
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from ..clusters import clopper_pearson
from ..clusters import spread as clustered_spread
from ..evidence.paired import benjamini_hochberg, change
from ..files import atomic
from . import coverage_intervals as tools
from .coverage_cells import DEPTHS, ICC, Cell, Flags, Profile, cells, draw, flags, profiles
from .coverage_page import page, summary
from .machine import processor, versions

__all__ = ["limits", "measure", "measure_depth", "measure_flags", "run"]

LEVEL = 0.95
ENOUGH = 20
"""Harms, and harmful prompts, from which on an interval may not be too wide either."""
LEAST = {False: 0.94, True: 0.93}
MOST = 0.975
WIDEST = 1.3
FALSE = 0.05


def run(
    *,
    quick: bool = False,
    experiments: int | None = None,
    seed: int = 0,
    json: str | Path | None = None,
    progress: bool | None = None,
    spread: Callable[..., list[Any]] | None = None,
) -> dict[str, Any]:
    """Measure all cells.

    Parameters
    ----------
    quick : bool
        400 experiments per cell instead of 5000, for a look; limits are not judged.
    experiments : int, optional
        Another number.
    seed : int
    json : str or Path, optional
        Where to write the result; the same tables go beside it as Markdown.
    progress : bool, optional
    spread : callable, optional
        ``spread(function, items, done=)`` returns a list as ``map`` would, over several processes, and calls `done`
        for every result: for a Ray cluster ``functools.partial(rollouts.spread, workers=8)``. The numbers are the same.

    Returns
    -------
    dict
        ``rows`` (rates and differences), ``depths``, ``flags``, ``missed`` (what is outside its limits, in words) and
        ``line``, with experiments, seed, seconds, command, date, versions and processor.
    """
    R = experiments if experiments is not None else (400 if quick else 5000)
    begun = time.perf_counter()
    plan: dict[str, tuple[Any, list[Any]]] = {
        "rows": (measure, list(cells())),
        "depths": (measure_depth, list(profiles())),
        "flags": (measure_flags, list(flags())),
    }
    jobs = list(enumerate((how, job) for how, every in plan.values() for job in every))
    cell = functools.partial(_cell, R, seed)
    with tqdm(total=len(jobs), disable=None if progress is None else not progress) as bar:
        measured = (spread or _one_by_one)(cell, jobs, done=lambda _: bar.update())
    rest = iter(measured)
    found = {name: [next(rest) for _ in every] for name, (_, every) in plan.items()}
    command = "markovsafety bench coverage" + (" --quick" if quick else "")
    result: dict[str, Any] = {
        **found,
        "experiments": R,
        "level": LEVEL,
        "icc": ICC,
        "seed": seed,
        "command": f"{command} --out papers/measurements/coverage.json",
        "seconds": round(time.perf_counter() - begun, 1),
        "date": datetime.now(UTC).date().isoformat(),
        "versions": versions(("numpy", "scipy")),
        "processor": processor(),
    }
    result["missed"] = [] if quick else _missed(result)
    result["line"] = summary(result)
    if json is not None:
        texts = {".json": json_module.dumps(result, indent=1) + "\n", ".md": page(result)}
        for suffix, text in texts.items():
            with atomic(Path(json).with_suffix(suffix)) as part:
                part.write_text(text, encoding="utf-8")
    return result


def _cell(experiments: int, seed: int, item: tuple[int, tuple[Any, Any]]) -> dict[str, Any]:
    number, (how, job) = item
    return how(job, experiments, np.random.default_rng([seed, number]))


def _one_by_one(function: Callable[[Any], Any], items: list[Any], done: Callable[[Any], Any]) -> list[Any]:
    results = []
    for item in items:
        results.append(function(item))
        done(results[-1])
    return results


def limits(harms: float, harmful: float) -> tuple[float, float | None]:
    """Least and most coverage: no most where few harms, or few harmful prompts, make the number a discrete one."""
    return LEAST[harms >= ENOUGH and harmful >= ENOUGH], MOST if min(harms, harmful) >= ENOUGH else None


def measure(cell: Cell, experiments: int, rng: np.random.Generator) -> dict[str, Any]:
    """Coverage and width of ours and of the tools for one rate or difference.

    Parameters
    ----------
    cell : Cell
    experiments : int
    rng : numpy.random.Generator

    Returns
    -------
    dict
        quantity, name, prompts, rollouts (mean per prompt), truth, harms and harmful (expected harmful rollouts and
        prompts of an experiment; or harmless, if fewer; of the side with fewer), icc, coverage, missed_low and
        missed_high (share of experiments whose upper end lies below the truth, whose lower end lies above it), width,
        ratio (of the width to Clopper-Pearson's at the prescribed size), oracle (of the width to that at the size given
        the true correlation; rates only), least and most (the limits), and tools: name -> coverage and points (share of
        intervals without any width).
    """
    n, sides = cell.totals, draw(cell, experiments, rng)
    before, after = cell.truth
    spreads = [clustered_spread(x, n) for x in sides]
    if after is None:
        true = before
        low, high = spreads[0].ends(LEVEL)
        prescribed, icc = _prescribed(spreads[0]), _icc(cell.rates)
        others = {
            name: f(sides[0], n)
            for name, f in zip(tools.TOOLS, (tools.wald, tools.wilson, tools.exact, tools.bootstrap))
        }
        oracle = float((high - low).mean() / tools.oracle(sides[0], n, icc).mean())
    else:
        true, oracle, icc = after - before, None, _icc(cell.rates)
        low, high, _, _ = change(sides[0], n, sides[1], n, LEVEL, same=cell.quantity == "difference", test=False)
        ends = [_prescribed_ends(s) for s in spreads]
        gaps = [(s.value - e[0], e[1] - s.value) for s, e in zip(spreads, ends)]
        prescribed = np.hypot(gaps[0][0], gaps[1][1]) + np.hypot(gaps[0][1], gaps[1][0])
        others = {
            "Wald": tools.wald_change(sides[0], sides[1], n),
            "bootstrap": tools.bootstrap_change(sides[0], sides[1], n),
        }
    harms = min(min(p, 1 - p) * n.sum() for p in (before, after) if p is not None)
    harmful = min(float(s.seen.mean()) for s in spreads)
    least, most = limits(harms, harmful)
    return {
        "quantity": cell.quantity,
        "name": cell.name,
        "prompts": cell.prompts,
        "rollouts": float(n.mean()),
        "truth": true,
        "harms": float(harms),
        "harmful": harmful,
        "icc": icc,
        **_held(low, high, true),
        "width": float((high - low).mean()),
        "ratio": float((high - low).mean() / prescribed.mean()),
        "oracle": oracle,
        "least": least,
        "most": most,
        "tools": {name: _beside(ends[0], ends[1], true) for name, ends in others.items()},
    }


def _beside(low: NDArray, high: NDArray, true: float) -> dict[str, float]:
    return {"coverage": _held(low, high, true)["coverage"], "points": float((low == high).mean())}


def _held(low: NDArray, high: NDArray, true: float) -> dict[str, float]:
    slack = 1e-12 * abs(true)
    below, above = high < true - slack, low > true + slack
    return {
        "coverage": float(1 - (below | above).mean()),
        "missed_low": float(below.mean()),
        "missed_high": float(above.mean()),
    }


def _icc(rates: Any) -> float:
    if isinstance(rates, float):
        return ICC
    mean = float(rates.mean())
    return float(rates.var() / (mean * (1 - mean)))


def _prescribed_ends(s: Any) -> tuple[NDArray, NDArray]:
    size = s.size(LEVEL)
    return clopper_pearson(np.minimum(s.value * size, size), size, LEVEL)


def _prescribed(s: Any) -> NDArray:
    low, high = _prescribed_ends(s)
    return high - low


def measure_depth(job: Profile, experiments: int, rng: np.random.Generator) -> dict[str, Any]:
    """Coverage of the operational safety depth by its interval, from the upper to the lower reading.

    Returns
    -------
    dict
        name, eps, prompts, rollouts, truth (as text), harms (expected, at the first depth beyond the budget, else the
        last), coverage, depths (mean number of depths in the interval), ratio (to that number with lower ends that each
        hold by themselves), alone (coverage with those), tools (coverage by name) and least.
    """
    index = rng.integers(len(job.rates), size=(experiments, job.prompts))
    n = np.full(job.prompts, float(job.rollouts))
    x = np.stack([rng.binomial(job.rollouts, job.rates[index, j]) for j in range(len(DEPTHS))], axis=1).astype(float)
    s, eps = clustered_spread(x, n), job.eps * (1 + 1e-12)
    mean = job.rates.mean(axis=0)
    true = int(_reach(mean[None], eps)[0])
    (low, high), (joint, _) = s.ends(LEVEL), s.ends(1 - (1 - LEVEL) / len(DEPTHS))
    shallow, deep, alone = _reach(high, eps), _reach(joint, eps), _reach(low, eps)
    held = {}
    for name, f in (("Wald", tools.wald), ("Clopper-Pearson", tools.exact)):
        ends = [_reach(e, eps) for e in f(x, n)]
        held[name] = float(((ends[1] <= true) & (true <= ends[0])).mean())
    return {
        "name": job.name,
        "eps": job.eps,
        "prompts": job.prompts,
        "rollouts": job.rollouts,
        "truth": _reading(true),
        "harms": float(mean[min(true, len(DEPTHS) - 1)] * n.sum()),
        "coverage": float(((shallow <= true) & (true <= deep)).mean()),
        "alone": float(((shallow <= true) & (true <= alone)).mean()),
        "depths": float((deep - shallow + 1).mean()),
        "ratio": float((deep - shallow + 1).mean() / (alone - shallow + 1).mean()),
        "tools": held,
        "least": LEAST[False],
    }


def _reach(harm: NDArray, eps: float) -> NDArray:
    """Number of leading depths within the budget."""
    return np.cumprod(harm <= eps, axis=-1).sum(axis=-1)


def _reading(count: int) -> str:
    if count == 0:
        return "none"
    return str(DEPTHS[count - 1]) if count < len(DEPTHS) else f"at least {DEPTHS[-1]}"


def measure_flags(job: Flags, experiments: int, rng: np.random.Generator) -> dict[str, Any]:
    """How often `compare` flags a category although nothing changed.

    Returns
    -------
    dict
        name, prompts (per category), rollouts, flagged (share of experiments with any flag), single (share of p-values
        of at most 0.05), naive (share of experiments with any p-value of at most 0.05 of unclustered z-tests without
        correction), most (5 % and three standard errors, since all cells are to stay below at once).
    """
    found, plain = [], []
    for rates in job.rates:
        cell = Cell("difference", job.name, rates, rates, job.prompts, job.rollouts)
        x, y = draw(cell, experiments, rng)
        n = cell.totals
        found.append(change(x, n, y, n, LEVEL, same=True)[2])
        p, q = x.sum(axis=-1) / n.sum(), y.sum(axis=-1) / n.sum()
        error = np.sqrt((p + q) * (1 - (p + q) / 2) / n.sum())
        plain.append(np.abs(q - p) > tools.Z * error)
    p = np.stack(found, axis=-1)
    return {
        "name": job.name,
        "prompts": job.prompts,
        "rollouts": job.rollouts,
        "flagged": float((benjamini_hochberg(p) <= FALSE).any(axis=-1).mean()),
        "single": float((p <= FALSE).mean()),
        "naive": float(np.stack(plain, axis=-1).any(axis=-1).mean()),
        "most": FALSE + 3 * float(np.sqrt(FALSE * (1 - FALSE) / experiments)),
    }


def _missed(result: dict[str, Any]) -> list[str]:
    """What lies outside its limits."""
    out = []
    for r in [*result["rows"], *result["depths"]]:
        where = f"{r.get('quantity', 'D_eps')}, {r['name']}, {r['prompts']} x {r['rollouts']:g}"
        if r["coverage"] < r["least"]:
            out.append(f"{where}: coverage {100 * r['coverage']:.2f} % < {100 * r['least']:g} %")
        if r.get("most") is not None and r["coverage"] > r["most"]:
            out.append(f"{where}: coverage {100 * r['coverage']:.2f} % > {100 * r['most']:g} %")
        if r["ratio"] > WIDEST:
            out.append(f"{where}: {r['ratio']:.2f} times the width prescribed")
    return out + [
        f"flags, {r['name']}, {r['prompts']} x {r['rollouts']}: {100 * r['flagged']:.2f} % > {100 * r['most']:.2f} %"
        for r in result["flags"]
        if r["flagged"] > r["most"]
    ]
