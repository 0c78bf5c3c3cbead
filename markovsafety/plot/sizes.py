"""Capacity: harm of models of several sizes, beside what a perturbation bound allows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ..bound import Bound
from ..errors import InputError
from .columns import remember
from .style import (
    PROBABILITY,
    axes_or_new,
    ceiling,
    depth_column,
    errorbars,
    key_above,
    palette,
    plain,
    styled,
)
from .themes import tone

__all__ = ["capacity", "hatched"]


@styled
def capacity(grid: Any, bound: Any = None, budget: float | None = None, ax: Any = None) -> Any:
    """Harm by capacity, a column for each and a marker for each depth.

    Parameters
    ----------
    grid : Grid
        Of `sweep` with a capacity axis (the first width, correlation and attack are shown).
    bound : dict, Bound or array, optional
        What a perturbation bound allows, drawn as a pale bar behind the measurement: by capacity, or by
        (capacity, depth), each a scalar Bound, a pair (lower, upper) or an upper end; or a Bound or array of upper ends
        of shape (depth, capacity). A bar from 0 to 1 is vacuous.
    budget : float, optional
        Harm budget, a dashed line.
    ax : Axes, optional

    Returns
    -------
    Axes
        Hatched: models that were not trained, or failed their checks.

    Examples
    --------
    >>> small = {0: ms.Bound(0.57, 0.49, 0.65), 20: ms.Bound(0.26, 0.19, 0.35)}
    >>> middle = {0: ms.Bound(0.53, 0.45, 0.61), 20: ms.Bound(0.05, 0.02, 0.10)}
    >>> large = {0: ms.Bound(0.52, 0.44, 0.59), 20: "diverged"}
    >>> grid = ms.sweep({"13 k": small, "42 k": middle, "120 k": large})
    >>> ax = ms.plot.capacity(grid, bound={("42 k", 20): (0.0, 0.3)}, budget=0.1)
    """
    if "capacity" not in getattr(grid, "dims", ()):
        raise InputError(
            "There is no capacity axis here.",
            cause=f"the axes are {', '.join(getattr(grid, 'dims', ())) or 'none'}",
            next="Pass a grid of sweep({capacity: source}, ...).",
        )
    ax = axes_or_new(ax, (8.0, 4.2))
    sizes, depths = grid.coords["capacity"], grid.coords["depth"]
    pick = tuple(slice(None) if n in ("depth", "capacity") else 0 for n in grid.dims)
    parts = np.array([np.asarray(getattr(grid.harm, s))[pick] for s in ("value", "lower", "upper")])
    trained = grid.info.get("kind") == "trained"
    names = [f"depth {d}" if trained else f"{d} forced" for d in depths]
    looks = palette(names)
    shift = np.linspace(-0.27, 0.27, len(depths)) if len(depths) > 1 else np.zeros(1)
    allowed = _allowed(bound, sizes, depths)
    x = np.arange(len(sizes), dtype=float)
    wide = min(0.5, 0.6 / max(len(depths), 1))
    for i, name in enumerate(names):
        colour, marker = looks[name]
        at = parts[:, i].T
        if allowed is not None:
            _bars(ax, x + shift[i], allowed[:, i], wide, colour)
            where = {"capacity": [str(c) for c in sizes], depth_column(grid): depths[i]}
            ends = np.stack([np.full(len(sizes), np.nan), *allowed[:, i]], axis=1)
            remember(ax, PROBABILITY, where, ends, series=name, kind="allowed by the perturbation bound")
        errorbars(ax, x + shift[i], at, color=colour, marker=marker, markersize=4.5, zorder=3)
        where = {"capacity": [str(c) for c in sizes], depth_column(grid): depths[i]}
        remember(ax, PROBABILITY, where, at, series=name)
        seen = np.isfinite(at[:, 0])
        ax.plot(x[seen] + shift[i], at[seen, 0], color=colour, linewidth=0.8, alpha=0.4, zorder=2)
        for j in np.flatnonzero(~seen):
            hatched(ax, x[j] + shift[i], wide)
    tops = [*parts[2][np.isfinite(parts[0])].ravel(), *([] if allowed is None else allowed[1].ravel())]
    ax.set_ylim(0, ceiling(tops, budget))
    ax.set_xlim(-0.5, len(sizes) - 0.5)
    ax.set_xticks(x, [plain(c, 16) for c in sizes])
    ax.tick_params(axis="x", length=0)
    ax.set_xlabel("capacity")
    ax.set_ylabel(PROBABILITY)
    ax.grid(axis="y")
    for edge in x[:-1] + 0.5:
        ax.axvline(edge, color=tone().grid, linewidth=0.8, zorder=0)
    if budget is not None:
        remember(ax, PROBABILITY, {}, [budget], kind="budget")
        ax.axhline(budget, color=tone().soft, linewidth=0.9, linestyle=(0, (4, 3)), zorder=1)
        where = {"xycoords": ax.get_yaxis_transform(), "textcoords": "offset points", "annotation_clip": False}
        ax.annotate(
            f"budget {budget:g}",
            (1.0, budget),
            xytext=(5, 0),
            va="center",
            color=tone().soft,
            fontsize=tone().small,
            **where,
        )
    _key(ax, looks, allowed is not None, bool(np.isnan(parts[0]).any()))
    return ax


def _allowed(bound: Any, sizes: tuple[Any, ...], depths: tuple[Any, ...]) -> np.ndarray | None:
    """Lower and upper ends, shape (2, depths, sizes); nan where there is none."""
    if bound is None:
        return None
    out = np.full((2, len(depths), len(sizes)), np.nan)
    if isinstance(bound, Mapping):
        for j, size in enumerate(sizes):
            for i, depth in enumerate(depths):
                one = bound.get((size, depth), bound.get(size))
                if one is not None:
                    out[:, i, j] = (one.lower, one.upper) if isinstance(one, Bound) else _pair(one)
    else:
        lower, upper = (bound.lower, bound.upper) if isinstance(bound, Bound) else (0.0, bound)
        if np.shape(upper) != out.shape[1:]:
            raise InputError(
                f"The bound has shape {np.shape(upper)}.",
                cause=f"There are {len(depths)} depths and {len(sizes)} capacities.",
                next="Pass an array of that shape, or a dict by capacity.",
            )
        out[0], out[1] = lower, upper
    return np.clip(out, 0.0, 1.0)


def _pair(one: Any) -> tuple[float, float]:
    return (float(one[0]), float(one[1])) if np.ndim(one) == 1 else (0.0, float(one))


def _bars(ax: Any, x: np.ndarray, ends: np.ndarray, wide: float, colour: str) -> None:
    known = np.isfinite(ends).all(axis=0)
    low, high = ends[0][known], ends[1][known]
    ax.bar(x[known], high - low, wide * 0.8, low, color=colour, alpha=0.18, linewidth=0, zorder=1)


def hatched(ax: Any, x: float, wide: float) -> None:
    """A strip where there is no model."""
    from matplotlib.patches import Rectangle

    style = {"facecolor": tone().paper, "edgecolor": tone().gap, "hatch": "////", "linewidth": 0, "zorder": 1}
    ax.add_patch(Rectangle((x - wide / 2, 0), wide, 1, transform=ax.get_xaxis_transform(), gid="untrained", **style))


def _key(ax: Any, looks: dict[str, tuple[str, str]], bars: bool, gaps: bool) -> None:
    from matplotlib.patches import Patch

    keys = [
        ax.errorbar([], [], yerr=[], color=c, marker=m, markersize=4.5, linestyle="none", label=name)
        for name, (c, m) in looks.items()
    ]
    if bars:
        keys.append(Patch(facecolor=tone().soft, alpha=0.25, label="perturbation bound"))
    if gaps:
        keys.append(Patch(facecolor=tone().paper, edgecolor=tone().gap, hatch="////", linewidth=0, label="not trained"))
    key_above(ax, min(len(keys), 7), handles=keys)
