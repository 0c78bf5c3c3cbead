"""What ``markovsafety sweep`` does: a source from words, one grid, its budgets, prices, figure and CSV."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from .arguments import form_of, laws_of, named, numbers_of, prices_of, rollouts_of, write_csv
from .cli import Answer
from .cli_sweep import FORMS
from .errors import InputError


def sweep(options: argparse.Namespace) -> Answer:
    from .depth import sweep as grid_of

    warnings: list[str] = []
    budgets = options.harm or [0.1]
    _only_lines(options)
    source, allowed = _source(options, warnings)
    form = any(getattr(options, name) for name in FORMS) or isinstance(source, dict)
    grid = grid_of(
        source,
        depth=numbers_of(options.depth, "--depth"),
        width=_widths(options, form),
        capacity=_capacities(options.capacity),
        correlation=_correlations(options.correlation),
        rule=options.rule,
        attack=laws_of(options.attack),
        level=options.level,
        model=options.model,
    )
    needed, told = grid.needed(harm=budgets[0], side=options.side), grid.to_json()
    result = {name: told[name] for name in ("dims", "coords", "harm")} | {"needed": needed.to_json()}
    result["start"] = grid.info.get("start")
    line = needed.line()
    if grid.info.get("absent"):
        result["absent"] = grid.info["absent"]
    if len(budgets) > 1:
        result["budgets"] = [grid.needed(harm=eps, side=options.side).to_json() for eps in budgets]
    found = _pareto(grid, options, budgets[0])
    if found is not None:
        result["pareto"] = found.to_json()
        line += "; " + str(found).replace("\n", "; ")
    warnings += [grid.info["note"]] if grid.info.get("note") else []
    files = [write_csv(options.out, grid.rows())] if options.out else []
    if options.figure:
        files.append(_draw(options, grid, found, form, allowed, budgets))
    return Answer(line, result, files=files, warnings=warnings)


# --- what is swept ---


def _source(options: argparse.Namespace, warnings: list[str]) -> tuple[Any, dict[Any, Any] | None]:
    """The source, and what a perturbation bound allows by capacity and depth, if a table says it."""
    given = [name for name in FORMS if getattr(options, name)]
    if len(given) + bool(options.source) != 1:
        raise InputError(
            "Nothing to sweep." if not given and not options.source else "Too much to sweep.",
            cause="A sweep has one source: files, or one closed form.",
            next="Give rollouts, a chain, CAPACITY=FILE, or one of --profile, --checkpoint, --hazards, --leaky.",
        )
    if given:
        return form_of(given[0], getattr(options, given[0])), None
    first = options.source[0]
    if len(options.source) == 1 and (Path(first).exists() or "=" not in first):
        from .tables import capacity_table

        table = capacity_table(first)
        if table is None:
            return _file(first, warnings, options.skip_corrupt), None
        return table.harm, table.allowed(laws_of(options.attack))
    return _by_capacity(options.source, warnings, options.skip_corrupt), None


def _file(path: str, warnings: list[str], skip: bool) -> Any:
    from .chains import read_chain

    return read_chain(path) if path.endswith(".npz") else rollouts_of(path, warnings, skip)


def _by_capacity(items: list[str], warnings: list[str], skip: bool) -> dict[Any, Any]:
    """{capacity: source}, or {capacity: {trained depth: source}}."""
    out: dict[Any, Any] = {}
    for name, path in named(items).items():
        part: Any = path[1:].strip() or "no reason given" if path.startswith("-") else _file(path, warnings, skip)
        size, at, depth = name.partition("@")
        key = _number(size)
        if at and not depth.isdigit():
            raise InputError(
                f"{name!r} names no model.",
                cause="A model is named by its capacity, or by CAPACITY@DEPTH.",
                next="Write e.g. 16@20=FILE.",
            )
        inner = out.setdefault(key, {} if at else part)
        if at and isinstance(inner, dict):
            inner[int(depth)] = part
        elif at or inner is not part:
            raise InputError(
                f"Capacity {size} has sources with and without a trained depth.",
                cause="A model is named by its capacity, or by CAPACITY@DEPTH, all of them alike.",
                next="Give every file of one capacity its depth.",
            )
    return out


def _number(word: str) -> Any:
    """A capacity: a number where it is one."""
    try:
        return int(word)
    except ValueError:
        try:
            return float(word)
        except ValueError:
            return word


def _is_number(x: Any) -> bool:
    return isinstance(x, (int, float))


def _capacities(words: list[str] | None) -> list[Any] | None:
    return None if words is None else [_number(word) for word in words]


def _correlations(words: list[str] | None) -> list[Any] | None:
    if words is None:
        return None
    return [word if word == "measured" else numbers_of([word], "--correlation", whole=False)[0] for word in words]


def _widths(options: argparse.Namespace, form: bool) -> list[int]:
    """As asked; else a few that the rule allows."""
    if options.width is not None:
        return numbers_of(options.width, "--width")
    from .depth.rules import check_rule

    check_rule(options.rule)
    least = int(options.rule.split("-")[0]) if options.rule[0].isdigit() else 1
    return [m for m in ([1] if form and least == 1 else [1, 2, 4, 8]) if m >= least] or [least]


def _pareto(grid: Any, options: argparse.Namespace, harm: float) -> Any:
    if options.cost is None:
        if options.benign is not None or options.over_refusal is not None or options.plot == "pareto":
            raise InputError(
                "Nothing has a price.",
                cause="What is worth its price, and refusals as a second one, need prices of depth or width.",
                next="Add --cost, e.g. --cost depth=1 width=3.",
            )
        return None
    prices = prices_of(options.cost)
    return grid.pareto(prices, harm=harm, benign=options.benign, over=options.over_refusal, side=options.side)


# --- the figure ---


def _only_lines(options: argparse.Namespace) -> None:
    """Refuses words about a figure that no figure would heed."""
    words = {"--plot": options.plot != "auto", "--along": options.along, "--by": options.by}
    given = next((name for name, there in words.items() if there), None)
    if given is not None and not options.figure:
        raise InputError(f"{given} without a figure.", cause="It says what is drawn.", next="Add --figure FILE.")
    if given in ("--along", "--by") or (
        given == "--plot" and options.plot != "lines" and (options.along or options.by)
    ):
        raise InputError(
            "--along and --by are for lines.",
            cause="Other figures have axes of their own.",
            next="Add --plot lines, or leave them out.",
        )


def _draw(options: argparse.Namespace, grid: Any, found: Any, form: bool, allowed: Any, budgets: list[float]) -> str:
    from . import plot

    kind = _kind(grid, form) if options.plot == "auto" else options.plot
    if kind == "pareto":
        ax = plot.pareto(found)
    elif kind == "capacity":
        ax = plot.capacity(grid, allowed, budget=budgets[0])
    elif kind == "width":
        ax = plot.width(grid, budgets[0])
    elif kind == "contour":
        ax = _contours(plot, grid, budgets, found, options.side)
    else:
        over = options.along or _longest(grid)
        best = grid.info.get("source") == "checkpoint" and over == "depth"
        ax = plot.lines(grid, over, options.by, budgets[0] if options.harm else None, best=best)
    return plot.save(ax, options.figure)


def _kind(grid: Any, form: bool) -> str:
    """The figure that fits a grid."""
    sizes = {name: len(grid.coords[name]) for name in grid.dims}
    if sizes.get("capacity", 1) > 1:
        return "capacity" if sizes["depth"] <= 6 else "lines"
    if min(sizes["depth"], sizes["width"]) > 1:
        return "contour" if form or sizes["depth"] * sizes["width"] > 120 else "width"
    return "lines"


def _longest(grid: Any) -> str:
    return max(grid.dims, key=lambda name: len(grid.coords[name]))


def _contours(plot: Any, grid: Any, budget: Any, found: Any, side: str) -> Any:
    """One map, or one for each value of a further axis."""
    other = next((n for n in grid.dims if n not in ("depth", "width") and len(grid.coords[n]) > 1), None)
    if other is None:
        return plot.contour(grid, budget, cheapest=found, side=side)

    def title(value: Any) -> str:
        return str(value) if other == "attack" else f"{other} {value:g}" if _is_number(value) else f"{other} {value}"

    maps = {title(value): grid.at(**{other: value}) for value in grid.coords[other]}
    values = np.asarray(getattr(grid.harm, side))
    least = float(np.clip(values[values > 0].min(initial=0.1), 1e-9, 0.1))  # one scale, so that colours compare
    cols = min(len(maps), 3)
    return plot.panels(
        maps,
        lambda one, ax: plot.contour(one, budget, ax, side=side, least=least, bar=False),
        (3.4 * cols + 0.6, 3.0),
        cols,
        sharey=True,
    )
