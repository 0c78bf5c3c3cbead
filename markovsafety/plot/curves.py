"""Harm along one axis of a grid, and how training gets there: lines."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ..errors import InputError
from .columns import remember
from .profiles import _end_labels
from .sizes import hatched
from .style import (
    PROBABILITY,
    SPOKEN,
    axes_or_new,
    depth_column,
    depth_label,
    end_style,
    errorbars,
    key_above,
    palette,
    plain,
    spread,
    styled,
    whole_ticks,
)
from .themes import tone

__all__ = ["lines", "traces"]

FEW = 24  # points up to which each gets its own marker
LEAST = 1e-12  # lowest harm of a logarithmic axis


@styled
def lines(
    grid: Any,
    over: str = "depth",
    by: str | None = None,
    budget: float | None = None,
    ax: Any = None,
    *,
    log: bool | None = None,
    best: bool = False,
) -> Any:
    """Harm along one axis, a line for each value of another; intervals as bars at few points, as bands at many.

    Parameters
    ----------
    grid : Grid
        Of `sweep`; of further axes the first entry is shown.
    over : str
        The axis to the right: "depth", "width", "capacity", "correlation", or "attack" (by the mean number of forced
        tokens).
    by : str, optional
        The axis of the lines; the longest other one if not given.
    budget : float, optional
        Harm budget, a dashed line.
    ax : Axes, optional
    log : bool, optional
        Logarithmic probabilities; where harm falls below 1 % of its largest if not given.
    best : bool
        Ring the least harm of each line that has it inside the axis.

    Returns
    -------
    Axes

    Examples
    --------
    >>> gate = ms.depth.Checkpoint(a=0.045, r=0.005, success=0.95)
    >>> attacks = [ms.depth.AttackLaw.geometric(p) for p in (0.05, 0.1, 0.3)]
    >>> grid = ms.sweep(gate, depth=range(1, 33), attack=attacks)
    >>> ax = ms.plot.lines(grid, by="attack", best=True)
    """
    ax = axes_or_new(ax, (8.0, 4.2))
    x, names, parts = _family(grid, over, by)
    looks = _colours(names, _ordered(names))
    value = parts[0]
    seen = value[np.isfinite(value) & (value > 0)]
    if log is None:
        log = bool(seen.size and seen.min() < 0.01 * seen.max())
    low = max(float(seen.min()), LEAST) if seen.size else LEAST
    floor = 10 ** np.floor(np.log10(min(low, budget or 1.0))) if log else 0.0
    last, under = {}, False
    moves = np.linspace(-0.008, 0.008, len(names)) * (np.ptp(x) or 1.0) if len(names) > 1 else np.zeros(1)
    for i, name in enumerate(names):
        remember(ax, PROBABILITY, _columns(grid, over), parts[:, i].T, series=name)
        y = np.maximum(parts[:, i], floor)
        there = np.isfinite(y[0])
        beneath = there & (parts[0, i] < floor)
        under |= bool(beneath.any())
        _draw(ax, x, y, beneath, looks[name], float(moves[i]))
        if best and there.any():
            at = np.flatnonzero(there)[int(np.argmin(y[0][there]))]
            if 0 < at < len(x) - 1:
                ax.plot(x[at], y[0][at], "o", ms=9, mfc="none", mec=looks[name][0], mew=1.5, zorder=4)
        last |= {name: float(y[0][there][-1])} if there.any() and name else {}
    _value_axis(ax, parts, floor, budget)
    if budget is not None:
        remember(ax, PROBABILITY, {}, [budget], kind="budget")
    ax.set_xlabel(_label(grid, over))
    ax.margins(x=0.02)
    if over in ("depth", "width"):
        whole_ticks(ax)
    if over == "capacity":
        _capacities(ax, grid, x, np.isnan(value).all(axis=0))
    ax.grid(axis="y")
    _names(ax, last, {name: look[0] for name, look in looks.items()}, budget, log)
    if under:
        _open_key(ax)
    return ax


def _draw(ax: Any, x: np.ndarray, y: np.ndarray, under: np.ndarray, look: tuple[str, str], move: float) -> None:
    """One line: bars or a band where y (value, lower, upper) has a width; open markers where it is under the axis."""
    colour, marker = look
    there = np.isfinite(y[0])
    known, few = bool((y[2] - y[1] > 1e-12).any()), there.sum() <= FEW
    if known and not few:
        ax.fill_between(x[there], y[1][there], y[2][there], color=colour, alpha=0.15, linewidth=0)
    if not few:
        ax.plot(x[there], y[0][there], color=colour, linewidth=1.5)
        return
    at, seen = x + (move if known else 0.0), there & ~under
    ends = y if known else y[[0, 0, 0]]
    style = {"color": colour, "marker": marker, "markersize": 4.5 if known else 4, "zorder": 3}
    errorbars(ax, at[seen], ends[:, seen].T, **style)
    if under.any():
        errorbars(ax, at[under], ends[:, under].T, **style, mfc=tone().paper, clip_on=False, gid="under")
    ax.plot(at[seen], y[0][seen], color=colour, **({"linewidth": 0.8, "alpha": 0.4} if known else {"linewidth": 1.5}))


def _open_key(ax: Any) -> None:
    """Says what the open markers are, beside a legend that may be there."""
    ax.annotate(
        "open: 0, or below the axis",
        (1.0, 1.0),
        xytext=(0, 4),
        xycoords="axes fraction",
        textcoords="offset points",
        ha="right",
        color=tone().soft,
        fontsize=tone().small,
        annotation_clip=False,
    )


def _family(grid: Any, over: str, by: str | None) -> tuple[np.ndarray, list[str], np.ndarray]:
    """Positions, names of the lines, and value, lower, upper of shape (3, lines, positions)."""
    dims: list[str] = list(getattr(grid, "dims", ()))
    others = [n for n in dims if n != over and len(grid.coords[n]) > 1]
    if by is None:
        by = max(others, key=lambda n: len(grid.coords[n])) if others else None
    for name in (over, *([by] if by else [])):
        if name not in dims or by == over:
            raise InputError(
                f"The grid has no lines over {over!r}" + (f" by {by!r}." if by else "."),
                cause=f"Its axes are {', '.join(dims) or 'none'}.",
                next="Pick two different ones.",
            )
    pick = [slice(None) if n in (over, by) else 0 for n in dims]
    kept = [n for n in dims if n in (over, by)]
    parts = np.array([np.asarray(getattr(grid.harm, s))[tuple(pick)] for s in ("value", "lower", "upper")])
    if by is None:
        parts = parts[:, None]
    elif kept.index(over) == 0:
        parts = parts.transpose(0, 2, 1)
    names = [""] if by is None else [_named(by, c) for c in grid.coords[by]]
    return _places(grid, over), names, parts


def _places(grid: Any, over: str) -> np.ndarray:
    coords = grid.coords[over]
    if over == "attack":
        return np.array([law["mean"] for law in grid.info["attack"]])
    if over == "capacity" or not all(isinstance(c, (int, float)) for c in coords):
        return np.arange(len(coords), dtype=float)
    return np.array(coords, dtype=float)


def _columns(grid: Any, over: str) -> dict[str, Any]:
    """The positions with their names and units, for `data`."""
    coords = list(grid.coords[over])
    if over == "attack":
        return {"attack": [str(c) for c in coords], "forced tokens (mean)": _places(grid, over)}
    return {depth_column(grid) if over == "depth" else {"width": "width (answers)"}.get(over, over): coords}


def _named(by: str, value: Any) -> str:
    if by == "attack":
        return "no attack" if value == "none" else plain(value, 24)
    return plain(f"{by} {value:g}" if isinstance(value, (int, float)) else f"{by} {value}", 24)


def _label(grid: Any, over: str) -> str:
    if over == "depth":
        return depth_label(grid)
    if over == "attack":
        fixed = all(law["fixed"] for law in grid.info["attack"])
        return SPOKEN if fixed else "mean number of forced tokens"
    return {"width": "ensemble width", "correlation": "correlation of two answers"}.get(over, over)


def _capacities(ax: Any, grid: Any, x: np.ndarray, missing: np.ndarray) -> None:
    ax.set_xticks(x, [plain(c, 16) for c in grid.coords["capacity"]])
    ax.set_xlim(-0.2, len(x) - 0.8)
    for at in x[missing]:
        hatched(ax, at, 0.3)


def _ordered(names: list[str]) -> bool:
    """Whether the lines have an order, which their colours then show."""
    return len(names) > 2 and not all(n.startswith("capacity") for n in names)


def _colours(names: list[str], ordered: bool) -> dict[str, tuple[str, str]]:
    """A sequence from light to dark where lines are in order, else the palette of models."""
    looks = palette(names)
    if not ordered:
        return looks
    from matplotlib.colors import LinearSegmentedColormap, to_hex

    ramp = LinearSegmentedColormap.from_list("order", tone().order_ramp)
    shades = np.linspace(0, 1, len(names))
    return {n: (to_hex(ramp(s)), looks[n][1]) for n, s in zip(names, shades)}


def _value_axis(ax: Any, parts: np.ndarray, floor: float, budget: float | None) -> None:
    top = float(np.nanmax(parts[2])) if np.isfinite(parts[2]).any() else 1.0
    ax.set_ylabel(PROBABILITY)
    if floor > 0:
        ax.set_yscale("log")
        ax.set_ylim(floor, min(2 * top, 1.5))
    else:
        ax.set_ylim(0, min(1.02, max(1.1 * top, 1.4 * budget if budget else 0.02)))
    if budget is not None:
        ax.axhline(budget, color=tone().soft, linewidth=0.9, linestyle=(0, (4, 3)), zorder=1)


def _names(ax: Any, last: dict[str, float], colours: dict[str, str], budget: float | None, log: bool) -> None:
    """Names at the right ends of the lines, moved apart where they would touch."""
    scale = np.log10 if log else np.asarray
    low, high = scale(ax.get_ylim())
    if _crowded(scale(np.maximum(list(last.values()), 1e-300)), high - low):
        _key(ax, list(last), colours)
        last = {}
    if not log:
        _end_labels(ax, last, colours, budget)
        return
    names = list(last) + ([] if budget is None else [f"budget {budget:g}"])
    at = np.log10(np.maximum([*last.values(), *([] if budget is None else [budget])], 10**low))
    height = ax.figure.get_figheight() * 72 * ax.get_position().height
    gap = 13 / height * (high - low)
    for name, y in zip(names, spread(at.tolist(), gap, low + 0.02 * (high - low), high - 0.02 * (high - low))):
        style = end_style(name, colours)
        where = {"xycoords": ax.get_yaxis_transform(), "textcoords": "offset points", "annotation_clip": False}
        ax.annotate(name, (1.0, 10**y), xytext=(5, 0), va="center", **where, **style)


def _crowded(ends: np.ndarray, height: float) -> bool:
    """Whether three lines or more end so close together that names beside them would not say which is which."""
    rising = np.sort(ends)
    return len(rising) > 2 and bool((rising[2:] - rising[:-2] < 0.01 * height).any())


def _key(ax: Any, names: list[str], colours: dict[str, str]) -> None:
    from matplotlib.lines import Line2D

    keys = [Line2D([], [], color=colours[name], linewidth=1.5, label=name) for name in names]
    key_above(ax, min(len(keys), 6), handles=keys, handlelength=1.2)


@styled
def traces(data: Mapping[str, Any], ax: Any = None, *, label: str = "what is left", log: bool = True) -> Any:
    """How a quantity falls step by step, a line for each way of training.

    Parameters
    ----------
    data : dict of array, shape (steps,)
        By name, value at step 0, 1, ...; or a pair (steps, values).
    ax : Axes, optional
    label : str
        What is drawn.
    log : bool
        Both axes logarithmic, from step 1 on: powers of the step are straight lines.

    Returns
    -------
    Axes

    Examples
    --------
    >>> steps = np.unique(np.geomspace(1, 1000, 60).astype(int))
    >>> ways = {
    ...     "constant steps": ms.depth.AdditiveBias(ms.depth.ConstantSteps(0.01)),
    ...     "harmonic steps": ms.depth.AdditiveBias(ms.depth.HarmonicSteps(0.8)),
    ...     "cross-entropy": ms.depth.CrossEntropyFlow(50, rate=1.0),
    ... }
    >>> left = {name: (steps, ms.depth.residual_after(way, 0.2, steps)) for name, way in ways.items()}
    >>> ax = ms.plot.traces(left, label="1 − P(refusal)")
    """
    ax = axes_or_new(ax, (8.0, 4.2))
    looks = palette(list(data))
    last, low = {}, 1.0
    for name, given in data.items():
        pair = isinstance(given, tuple)
        y = np.asarray(given[1] if pair else given, dtype=float)
        x = np.asarray(given[0], dtype=float) if pair else np.arange(len(y), dtype=float)
        keep = np.isfinite(y) & ((x > 0) & (y > 0) if log else True)
        if not keep.any():
            continue
        ax.plot(x[keep], y[keep], color=looks[name][0], linewidth=1.5)
        remember(ax, label, {"step": x[keep]}, y[keep], series=name, kind="trace")
        last[plain(name, 24)] = float(y[keep][-1])
        low = min(low, float(y[keep].min()))
    if log:
        ax.set_xscale("log")
        ax.set_yscale("log")
    ax.set_xlabel("step")
    ax.set_ylabel(label)
    ax.grid(axis="y")
    _names(ax, last, {plain(n, 24): look[0] for n, look in looks.items()}, None, log)
    return ax
