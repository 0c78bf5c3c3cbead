"""What less harm costs: the front of cost against harm."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from .columns import remember
from .style import HARM, PROBABILITY, axes_or_new, halo, palette, plain, styled
from .themes import tone

__all__ = ["pareto"]

LEAST = 1e-12  # lowest harm of a logarithmic axis


@styled
def pareto(found: Any, ax: Any = None) -> Any:
    """What less harm costs: the front of cost against harm, logarithmic.

    Parameters
    ----------
    found : Pareto, or dict of Pareto by name
        Of `Grid.pareto`; of several circumstances the first is drawn. Where over-refusal is a price too, every cell of
        the front is a dot, darker the more harmless prompts it refuses, and the line runs along the least harm.
    ax : Axes, optional

    Returns
    -------
    Axes

    Examples
    --------
    >>> model = ms.Profile(a0=0.08, r0=0.02, a1=0.0, r1=0.3)
    >>> grid = ms.sweep(model, depth=range(41), width=range(1, 33))
    >>> ax = ms.plot.pareto(grid.pareto(cost={"depth": 1, "width": 3}, harm=1e-6))
    """
    ax = axes_or_new(ax, (8.0, 4.2))
    named = found if isinstance(found, Mapping) else {"": found}
    looks = palette(list(named))
    budget, dots = next((one.eps for one in named.values() if one.eps is not None), None), None
    low, least = LEAST if budget is None else max(1e-4 * budget, LEAST), 1.0
    for name, one in named.items():
        front, colour = one.front, HARM if name == "" else looks[name][0]
        y = {"value": front.harm, "lower": front.lower, "upper": front.upper}[one.side]
        shown = y >= low if (y >= low).any() else np.ones(len(y), dtype=bool)
        remember(ax, PROBABILITY, *_front(front, shown), series=name, kind="front")
        steps, falls = _edge(front.cost, y, low if shown.any() else LEAST)
        cost, y = front.cost[shown], np.maximum(y[shown], LEAST)
        line = tone().soft if front.over_refusal is not None and name == "" else colour
        ax.step(steps, falls, where="post", color=line, linewidth=1.2, label=plain(name, 24) or None, zorder=2)
        if front.over_refusal is None:
            ax.plot(cost, y, "o", ms=4, color=colour, mec=tone().paper, mew=0.5)
        else:
            style = {"cmap": _blues(), "s": 24, "edgecolor": tone().paper, "linewidth": 0.4, "zorder": 3}
            dots = ax.scatter(cost, y, c=100 * front.over_refusal[shown], **style)
        if one.best is not None:
            _ring(ax, one)
            best = {n: one.best[n] for n in ("cost", "depth", "width", "capacity") if n in one.best}
            ends = np.array([[one.best[n] for n in ("harm", "lower", "upper")]])
            remember(ax, PROBABILITY, _united(best), ends, series=name, kind="cheapest within the budget")
        least = min(least, float(y.min()) if len(y) else 1.0)
    ax.set_yscale("log")
    ax.set_ylim(bottom=0.3 * least)
    ax.set_xlabel("cost")
    ax.set_ylabel(PROBABILITY)
    ax.grid(axis="y")
    if budget is not None:
        ax.axhline(budget, color=tone().soft, linewidth=0.9, linestyle=(0, (4, 3)), zorder=1)
        where = {"xycoords": ax.get_yaxis_transform(), "textcoords": "offset points"}
        text = f"budget {budget:g}"
        ax.annotate(text, (0.0, budget), xytext=(4, 3), ha="left", color=tone().soft, fontsize=tone().small, **where)
    if budget is not None:
        remember(ax, PROBABILITY, {}, [budget], kind="budget")
    if any(named):
        ax.legend(loc="upper right")
    if dots is not None:
        key = ax.figure.colorbar(dots, ax=ax, pad=0.02, aspect=26)
        key.set_label("over-refusal, %")
        key.outline.set_visible(False)
        key.ax.tick_params(length=0, labelsize=tone().small)
    return ax


UNITS = {"depth": "depth (tokens)", "width": "width (answers)"}


def _front(front: Any, shown: np.ndarray) -> tuple[dict[str, Any], np.ndarray]:
    """The cells of the front that are shown, as columns and as value, lower and upper."""
    x = {"cost": front.cost[shown]} | {name: np.asarray(at)[shown] for name, at in front.at.items()}
    if front.over_refusal is not None:
        x["over-refusal (share)"] = front.over_refusal[shown]
    return _united(x), np.stack([front.harm, front.lower, front.upper], axis=1)[shown]


def _united(x: dict[str, Any]) -> dict[str, Any]:
    return {UNITS.get(name, name): column for name, column in x.items()}


def _edge(cost: np.ndarray, y: np.ndarray, low: float) -> tuple[np.ndarray, np.ndarray]:
    """Costs at which the least harm falls and what it falls to, down to the first below the lowest harm shown."""
    falls = np.flatnonzero(np.append(True, y[1:] < np.minimum.accumulate(y)[:-1]))
    falls = falls[: int((y[falls] >= low).sum()) + 1]
    return cost[falls], np.maximum(y[falls], LEAST)


def _blues() -> Any:
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("refusal", tone().refusal_ramp)


def _ring(ax: Any, one: Any) -> None:
    best = one.best
    y = max({"value": best["harm"], "lower": best["lower"], "upper": best["upper"]}[one.side], LEAST)
    ax.plot(best["cost"], y, "o", ms=10, mfc="none", mec=tone().ink, mew=1.4, zorder=4)
    where = ", ".join(f"{n} {best[n]}" for n in ("depth", "width", "capacity") if n in best)
    text = plain(f"{where}: cost {best['cost']:.4g}")
    style = {"textcoords": "offset points", "fontsize": tone().small, "path_effects": halo(), "zorder": 5}
    left, right = ax.get_xlim()
    if best["cost"] > left + 0.6 * (right - left):
        style |= {"ha": "right"}
    ax.annotate(text, (best["cost"], y), xytext=(-10 if "ha" in style else 10, -14 if "ha" in style else 6), **style)
