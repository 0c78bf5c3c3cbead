"""Iso-safety: harm as a surface over depth and width, with budgets as lines."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..errors import InputError
from .columns import remember
from .profiles import _cells
from .style import (
    PROBABILITY,
    axes_or_new,
    depth_column,
    depth_label,
    halo,
    key_above,
    plain,
    styled,
    whole_ticks,
)
from .themes import tone

__all__ = ["contour"]

TINY = 5e-324  # the smallest float above 0
LEAST = 1e-9  # harm below this has one colour
SIDES = {"value": "P(harm)", "upper": "P(harm), upper end", "lower": "P(harm), lower end"}


@styled
def contour(
    grid: Any,
    budget: float | Sequence[float] | None = None,
    ax: Any = None,
    *,
    cheapest: Any = None,
    side: str = "upper",
    least: float | None = None,
    bar: bool = True,
) -> Any:
    """Iso-safety: harm over depth and width on a logarithmic scale, a step of colour for each power of ten.

    Parameters
    ----------
    grid : Grid
        Of `sweep`, with at least two depths and two widths (the first entry along any other axis is shown).
    budget : float or sequence of float, optional
        Harm budgets, each a labelled line: above and to the right of it harm is within the budget (of trained depths).
        The lines run between the swept cells; the dots are whole numbers, the least width that suffices at each depth.
    ax : Axes, optional
    cheapest : Pareto, optional
        Of the same grid: its cheapest cell as a ring, and the line of what costs as much.
    side : {"upper", "value", "lower"}
        Which end of harm is drawn.
    least : float, optional
        Lower end of the scale; 1e-9 at the lowest if not given.
    bar : bool
        Whether the colours are explained beside the map.

    Returns
    -------
    Axes

    Examples
    --------
    >>> model = ms.Profile(a0=0.08, r0=0.02, a1=0.0, r1=0.3)
    >>> grid = ms.sweep(model, depth=range(41), width=range(1, 33))
    >>> best = grid.pareto(cost={"depth": 1, "width": 3}, harm=1e-6)
    >>> ax = ms.plot.contour(grid, budget=[1e-2, 1e-4, 1e-6], cheapest=best)
    """
    depths, widths, z = _surface(grid, side)
    budgets = [] if budget is None else [float(b) for b in np.atleast_1d(np.asarray(budget, dtype=float))]
    ax = axes_or_new(ax, (7.0, 4.4))
    low = _lowest(z, budgets, least)
    levels = _levels(low)
    logs = np.log10(np.clip(z, TINY, 1.0))
    filled = _fill(ax, depths, widths, logs, levels)
    wide = widths[-1] >= 24 * widths[0]
    if wide:
        _log_widths(ax, widths)
    ax.set_xlim(depths[0], depths[-1])
    ax.set_ylim(widths[0], widths[-1])
    _missing(ax, depths, widths, z)
    for b in budgets:
        _line(ax, depths, widths, z, b)
    _note(ax, grid, budgets, cheapest)
    ax.set_xlabel(depth_label(grid))
    ax.set_ylabel("ensemble width")
    ax.tick_params(length=3, color=tone().soft)
    whole_ticks(ax, y=not wide)
    if cheapest is not None:
        _cheapest(ax, cheapest, depths, widths)
    if dots := ax.get_legend_handles_labels()[0]:
        key_above(ax, 1, handles=dots[:1], handlelength=1.2)
    if bar:
        key = ax.figure.colorbar(filled, ax=ax, pad=0.02, aspect=26)
        shown = levels[:: max(1, int(np.ceil(len(levels) / 9)))]
        key.set_ticks(shown, labels=["0" if x == levels[0] else _power(x) for x in shown])
        key.minorticks_off()
        key.ax.tick_params(length=0, labelsize=tone().small)
        key.outline.set_visible(False)
        key.set_label(SIDES[side] if (np.asarray(grid.harm.upper) != np.asarray(grid.harm.value)).any() else "P(harm)")
    return ax


def _note(ax: Any, grid: Any, budgets: Sequence[float], cheapest: Any) -> None:
    """The cells with both ends, whichever was drawn."""
    depths, widths, parts = _cells(grid)
    across, up = np.meshgrid(depths, widths, indexing="ij")
    column = depth_column(grid)
    remember(ax, PROBABILITY, {column: across.ravel(), "width (answers)": up.ravel()}, parts.reshape(3, -1).T)
    for b in budgets:
        remember(ax, PROBABILITY, {}, [b], kind="budget")
    if cheapest is not None and cheapest.best is not None and "depth" in cheapest.best:
        best = cheapest.best
        where = {column: best["depth"], "width (answers)": best["width"], "cost": best["cost"]}
        remember(ax, PROBABILITY, where, np.array([[best[n] for n in ("harm", "lower", "upper")]]), kind="cheapest")


def _surface(grid: Any, side: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    depths, widths, parts = _cells(grid)
    if len(depths) < 2 or len(widths) < 2:
        raise InputError(
            f"{len(depths)} depths and {len(widths)} widths make no surface.",
            cause="Lines of equal harm run between at least two of each.",
            next="Sweep more of them, or draw plot.lines(grid).",
        )
    if side not in SIDES:
        raise InputError(f"side is {side!r}.", cause=f"A bound has {', '.join(SIDES)}.", next="Use one of these.")
    value, lower, upper = parts
    z = {"value": value, "lower": lower, "upper": upper}[side].T
    return depths.astype(float), widths.astype(float), np.where(np.isnan(value.T), np.nan, z)


def _lowest(z: np.ndarray, budgets: Sequence[float], least: float | None) -> float:
    """Lower end of the scale: below the smallest budget, not below what is there."""
    if least is not None:
        return max(float(least), 1e-300)
    there = z[np.isfinite(z) & (z > 0)]
    smallest = float(there.min()) if there.size else 0.1
    wanted = min([LEAST, *(b / 100 for b in budgets if b > 0)])
    return min(max(smallest, wanted), 0.1)


def _levels(low: float) -> np.ndarray:
    """Logarithms from below `low` to 0: powers of ten, or steps of 1, 2, 5 where these are few."""
    first = np.floor(np.log10(low))
    if first < -3:
        return np.arange(first, 1.0)
    steps = np.sort((np.arange(first, 0.0)[:, None] + np.log10([1, 2, 5])).reshape(-1))
    return np.append(steps[max(np.searchsorted(steps, np.log10(low), side="right") - 1, 0) :], 0.0)


def _fill(ax: Any, depths: np.ndarray, widths: np.ndarray, logs: np.ndarray, levels: np.ndarray) -> Any:
    from matplotlib.colors import BoundaryNorm, LinearSegmentedColormap

    colours = LinearSegmentedColormap.from_list("harm", tone().harm_ramp, N=256)
    norm = BoundaryNorm(levels, 256)
    return ax.contourf(depths, widths, logs, levels, cmap=colours, norm=norm)


def _line(ax: Any, depths: Any, widths: Any, z: np.ndarray, budget: float) -> None:
    """The line of one budget with its label, and the least width that suffices at each depth as dots."""
    if budget <= 0:
        return
    with np.errstate(invalid="ignore"):
        inside = z <= budget * (1 + 1e-12)
    if inside.any() and not inside.all():
        style = {"colors": tone().ink, "linewidths": 1.6, "linestyles": "solid"}
        drawn = ax.contour(depths, widths, np.log10(np.maximum(z, TINY)), [np.log10(budget)], **style)
        drawn.set_gid("budget")
        text = {np.log10(budget): _power(np.log10(budget))}
        if (at := _elbow(ax, drawn)) is not None:
            for label in ax.clabel(drawn, fmt=text, fontsize=tone().small, inline_spacing=4, manual=[at]):
                label.set(path_effects=halo(), zorder=5)
    first = np.where(inside.any(axis=0), inside.argmax(axis=0), -1)
    shown = first > 0
    if shown.sum() <= 60:
        at = widths[first[shown]]
        style = {"ms": 2.8, "color": tone().ink, "mec": tone().paper, "mew": 0.4, "zorder": 4, "clip_on": False}
        ax.plot(depths[shown], at, "o", label="least width that suffices", **style)


def _elbow(ax: Any, drawn: Any) -> tuple[float, float] | None:
    """The point of a line that lies on the diagonal of the Axes, where a label has room; None if nothing is drawn."""
    points = np.concatenate([np.empty((0, 2)), *(path.vertices for path in drawn.get_paths())])
    if not len(points):
        return None
    x, y = ax.transAxes.inverted().transform(ax.transData.transform(points)).T
    edge = np.minimum.reduce([x, 1 - x, y, 1 - y]) < 0.06
    at = points[int(np.argmin(np.abs(x - y) + edge))]
    return float(at[0]), float(at[1])


def _power(log: float) -> str:
    """A probability as a power of ten where it is one."""
    if abs(log - round(log)) > 1e-9:
        return f"{10**log:.2g}"
    return {0: "1", -1: "0.1", -2: "0.01"}.get(round(log), rf"$10^{{{round(log)}}}$")


def _log_widths(ax: Any, widths: np.ndarray) -> None:
    from matplotlib.ticker import FixedLocator, NullLocator

    ax.set_yscale("log", base=2)
    powers = 2.0 ** np.arange(np.ceil(np.log2(widths[0])), np.floor(np.log2(widths[-1])) + 1)
    ax.yaxis.set_major_locator(FixedLocator(powers))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.set_yticks(powers, [f"{p:g}" for p in powers])


def _missing(ax: Any, depths: np.ndarray, widths: np.ndarray, z: np.ndarray) -> None:
    """Hatched where nothing is known."""
    blank = np.isnan(z)
    if blank.any():
        ax.contourf(depths, widths, blank.astype(float), [0.5, 1.5], colors="none", hatches=["////"])


def cheap_colour() -> str:
    return tone().refusal_ramp[-2 if tone().name == "light" else 1]


def _cheapest(ax: Any, found: Any, depths: np.ndarray, widths: np.ndarray) -> None:
    best, prices = found.best, found.prices or {}
    if best is None or "depth" not in best:
        return
    a, b = prices.get("depth", 0.0), prices.get("width", 0.0)
    if a > 0 and b > 0:
        x = np.linspace(depths[0], depths[-1], 400)
        y = (a * best["depth"] + b * best["width"] - a * x) / b
        keep = (y >= widths[0]) & (y <= widths[-1])
        ax.plot(x[keep], y[keep], color=cheap_colour(), linewidth=1.1, linestyle=(0, (4, 3)), zorder=4)
    ax.plot(best["depth"], best["width"], "o", ms=9, mfc="none", mec=cheap_colour(), mew=1.8, zorder=5)
    text = f"depth {best['depth']}, width {best['width']}\ncost {best['cost']:g}"
    box = {"facecolor": tone().paper, "edgecolor": "none", "alpha": 0.85, "pad": 1.5}
    right = best["depth"] > (depths[0] + depths[-1]) / 2
    ax.annotate(
        "\n".join(plain(line) for line in text.split("\n")),
        (best["depth"], best["width"]),
        xytext=(-10 if right else 10, 10),
        textcoords="offset points",
        ha="right" if right else "left",
        fontsize=tone().small,
        color=cheap_colour(),
        bbox=box,
    )
