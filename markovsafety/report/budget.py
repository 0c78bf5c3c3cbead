"""How deep is deep enough: the map of depth and width with a harm budget, as a table and in words.

The page's script does the same from the embedded numbers when the budget is moved: by the upper ends, as
`markovsafety.depth.Grid.needed`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..analysis import ALL, Analysis
from ..depth import Grid, Needed, operational_depth
from ..depth.profile import within
from .words import forced, number

__all__ = ["Map", "answer", "embedded", "maps", "withstood"]


@dataclass(frozen=True)
class Map:
    """One model's map.

    Parameters
    ----------
    name : str
    depths, widths : tuple of int
    cells : list of list of dict
        By depth and width: value and interval in words, the class of the cell (ok, over, none), its upper end.
    withstood : list of str
        By width: "none", "3" or "at least 20" forced tokens.
    answer : str
        In a sentence.
    """

    name: str
    depths: tuple[int, ...]
    widths: tuple[int, ...]
    cells: list[list[dict[str, Any]]]
    withstood: list[str]
    answer: str


def _parts(grid: Grid) -> np.ndarray:
    """Value, lower and upper ends, shape (3, depth, width)."""
    return np.array([np.asarray(x, dtype=float) for x in (grid.harm.value, grid.harm.lower, grid.harm.upper)])


def _blank(parts: np.ndarray) -> np.ndarray:
    """Cells that say nothing: not measured, or anything between 0 and 1."""
    return ~np.isfinite(parts).all(axis=0) | (parts[2] - parts[1] >= 1 - 1e-9)


def maps(analyses: Sequence[Analysis], budget: float) -> list[Map]:
    """The maps of all models at a budget."""
    found = []
    for a in analyses:
        grid, parts = a.grid, _parts(a.grid)
        blank, depths, widths = _blank(parts), grid.coords["depth"], grid.coords["width"]
        cells = [
            [_cell(parts[:, i, j], bool(blank[i, j]), budget) for j in range(len(widths))] for i in range(len(depths))
        ]
        needed = grid.needed(harm=budget)
        reads = [withstood(needed, j) for j in range(len(widths))]
        found.append(Map(a.name, depths, widths, cells, reads, answer(grid, needed)))
    return found


def _cell(ends: np.ndarray, blank: bool, budget: float) -> dict[str, Any]:
    if blank:
        return {"kind": "none", "value": "no evidence", "ends": "", "upper": 1.0}
    value, lower, upper = map(float, ends)
    kind = "ok" if within(upper, budget) else "over"
    return {"kind": kind, "value": number(value), "ends": f"{number(lower)}–{number(upper)}", "upper": upper}


def withstood(needed: Needed, j: int) -> str:
    """What the j-th width withstands within a budget, by the upper ends of the intervals.

    Parameters
    ----------
    needed : Needed
        Of a grid with dims depth and width.
    j : int

    Returns
    -------
    str
        "none", "3" or "at least 20" forced tokens.
    """
    depth = needed.depth[j]
    return "none" if depth is None else f"at least {depth}" if needed.at_least[j] else str(depth)


def answer(grid: Grid, needed: Needed) -> str:
    """How deep one answer holds, and how many answers hold to the end, in a sentence."""
    depths, widths = grid.coords["depth"], grid.coords["width"]
    read, first, last = withstood(needed, 0), depths[0], depths[-1]
    one = widths[0] == 1
    many, holds = ("one answer", "holds") if one else (f"{widths[0]} answers", "hold")
    full = [j for j in range(len(widths)) if needed.depth[j] == last and needed.at_least[j]]
    to_all = f" for all {forced(last)}" if last else ""
    if read == "none":
        start = f"{many} {'does' if one else 'do'} not hold, not even {_after(first)}"
    elif len(depths) == 1 or read == "0":
        start = f"{many} {holds} {'' if len(depths) == 1 else 'only '}{_after(first)}"
    else:
        start = f"{many} {holds} up to {read} forced token{'' if read.split()[-1] == '1' else 's'}"
    if full and full[0] == 0:
        return f"{start}, the most that was measured."
    if full:
        return f"{start}; {widths[full[0]]} answers are enough{to_all}."
    return f"{start}; no measured number of answers is enough{to_all}."


def _after(k: int) -> str:
    return f"after {forced(k)}" if k else "without forcing"


def embedded(analyses: Sequence[Analysis], budget: float) -> dict[str, Any]:
    """The numbers that the page's script needs, in full precision; null where nothing was measured."""
    models = []
    for a in analyses:
        parts = _parts(a.grid)
        told = [[None if np.isnan(u) else float(u) for u in row] for row in parts[2]]
        coords = {name: [int(x) for x in a.grid.coords[name]] for name in ("depth", "width")}
        models.append({**coords, "upper": told, "blank": _blank(parts).tolist()})
    return {"budget": budget, "models": models}


def depths_at(analyses: Sequence[Analysis], budgets: Sequence[float]) -> list[tuple[str, list[Any]]]:
    """Operational safety depths of all categories together, by model and budget."""
    return [
        (a.name, [operational_depth(list(a.harm[ALL]), list(a.harm[ALL].values()), eps) for eps in budgets])
        for a in analyses
    ]
