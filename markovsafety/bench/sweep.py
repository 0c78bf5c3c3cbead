"""How many cells a second a sweep of closed forms takes, beside scipy's distributions on the same cells."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..depth import AttackLaw, Profile, sweep
from ..depth.rules import harmful_needed
from .machine import machine, versions

__all__ = ["Case", "cases", "run"]

GOAL = 1e6
"""Cells per second."""
MODEL = Profile(0.08, 0.02, 0.002, 0.3)
SHARE = 50
"""The peer is asked for one depth in so many: its distributions sum over their tails, cell by cell."""


class Case(NamedTuple):
    """A sweep, and the same numbers by a peer (None where no library has them)."""

    name: str
    ours: Callable[[], NDArray]
    peer: Callable[[], NDArray] | None


def cases(depths: int = 1000, widths: int = 100) -> list[Case]:
    """Sweeps of `depths` x `widths` cells, times the entries of a further axis.

    Parameters
    ----------
    depths, widths : int

    Returns
    -------
    list of Case
    """
    d, m = range(depths), range(2, widths + 2)
    rho = np.linspace(0.01, 0.5, 10)
    laws = [AttackLaw.geometric(p) for p in (0.05, 0.1, 0.3)]

    def ours(**options: Any) -> Callable[[], NDArray]:
        return lambda: np.asarray(sweep(MODEL, depth=d, width=m, **options).harm.value)

    def peer(rule: str, alike: bool) -> Callable[[], NDArray]:
        q = np.asarray(MODEL.harm(d[::SHARE]).value)
        return lambda: _by_scipy(q, np.array(m), rule, rho if alike else None)

    found = [Case("any-refusal, independent", ours(), peer("any-refusal", False))]
    for rule in ("any-refusal", "majority", "2-refusals"):
        alike = ours(rule=rule, correlation=rho.tolist())
        found.append(Case(f"{rule}, beta-binomial", alike, peer(rule, True)))
    found.append(Case("any-refusal, common shock", ours(correlation=rho.tolist(), model="common-shock"), None))
    found.append(Case("any-refusal, three attack laws", ours(attack=laws), None))
    return found


def _by_scipy(q: NDArray, m: NDArray, rule: str, rho: NDArray | None) -> NDArray:
    from scipy import stats

    t = harmful_needed(rule, m)
    if rho is None:
        return stats.binom.sf(t - 1, m, q[:, None])
    scale = (1 - rho) / rho
    a, b = q[:, None, None] * scale, (1 - q)[:, None, None] * scale
    return stats.betabinom.sf((t - 1)[None, :, None], m[None, :, None], a, b)


def run(out: str | Path | None = None, *, quick: bool = False, turns: int = 3) -> dict[str, Any]:
    """Measure every case, ours and the peer's in turns, and write the table.

    Parameters
    ----------
    out : path, optional
        JSON; a page of Markdown goes beside it.
    quick : bool
        Few cells, one turn: only whether the numbers agree.
    turns : int
        The best counts.

    Returns
    -------
    dict
        rows: name, cells, ours and peer (cells per second), ratio, gap (largest difference of the numbers), met.
    """
    chosen = cases(2 * SHARE, 3) if quick else cases()
    result: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "versions": versions(("numpy", "scipy")),
        "rows": [_row(case, 1 if quick else turns) for case in chosen],
    }
    slowest = min(result["rows"], key=lambda r: r["ours"])
    result["line"] = f"slowest: {slowest['name']}, {slowest['ours'] / 1e6:.1f} million cells a second"
    if out is not None:
        Path(out).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        Path(out).with_suffix(".md").write_text(_page(result), encoding="utf-8")
    return result


def _row(case: Case, turns: int) -> dict[str, Any]:
    best, values = {"ours": np.inf, "peer": np.inf}, {}
    for _ in range(turns):
        for who, call in (("ours", case.ours), ("peer", case.peer)):
            if call is not None:
                begun = time.perf_counter()
                values[who] = call()
                best[who] = min(best[who], time.perf_counter() - begun)
    cells = values["ours"].size
    row: dict[str, Any] = {"name": case.name, "cells": cells, "ours": cells / best["ours"], "peer": None}
    row |= {"ratio": None, "gap": None}
    if "peer" in values:
        row["peer"] = values["peer"].size / best["peer"]
        row["ratio"] = row["ours"] / row["peer"]
        row["gap"] = float(np.max(np.abs(values["ours"][::SHARE] - values["peer"])))
    return row | {"met": bool(row["ours"] >= GOAL)}


def _page(result: dict[str, Any]) -> str:
    told = ", ".join(f"{k} {v}" for k, v in result["versions"].items())
    lines = [
        "# Cells a second",
        "",
        f"{result['date']}; {result['machine']}; {told}. Made by `markovsafety bench sweep --out FILE.json`. A sweep "
        "of a closed form with its bounds, labels and axes, against the survival functions of `scipy.stats` (binom, "
        f"betabinom) on arrays of the same cells, at one depth in {SHARE}: one process, one thread, in turns, the best "
        "of three. A million cells a second was to be reached. `gap` is the largest difference of the numbers.",
        "",
        "| cells | number | ours, million / s | scipy, million / s | ratio | gap | reached |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in result["rows"]:
        peer = ["", "", ""]
        if r["peer"] is not None:
            peer = [f"{r['peer'] / 1e6:.2f}", f"{r['ratio']:.1f}", f"{r['gap']:.1e}"]
        cells = [r["name"], f"{r['cells']:,}", f"{r['ours'] / 1e6:.1f}", *peer, "yes" if r["met"] else "no"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"
