"""Figures over the number of forced tokens: the depth profile and the depth x width map."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..bound import Bound
from ..errors import InputError
from .columns import remember
from .style import (
    DEPTH_COLUMN,
    PROBABILITY,
    SPOKEN,
    axes_or_new,
    ceiling,
    depth_column,
    depth_label,
    end_style,
    errorbars,
    key_above,
    palette,
    plain,
    points,
    readable,
    series,
    short,
    spread,
    styled,
)
from .themes import tone

__all__ = ["branch", "depth", "depth_signature", "width"]


@styled
def depth(profiles: Any, truth: Any = None, predicted: Any = None, budget: float | None = None, ax: Any = None) -> Any:
    """Depth profile: the probability of harm after k forced tokens.

    Parameters
    ----------
    profiles : dict of profile, or profile
        By model. A profile is ``{k: Bound}``, the Bound of `profile`, or a grid of `sweep` (its first entry along
        every axis but depth).
    truth : as profiles, of numbers, optional
        Planted truth, drawn as a thin line.
    predicted : as profiles, optional
        What a chain predicts, drawn as a ring, its interval as a pale bar.
    budget : float, optional
        Harm budget, drawn as a dashed line.
    ax : Axes, optional

    Returns
    -------
    Axes

    Examples
    --------
    >>> from markovsafety.exercises import case
    >>> weak = ms.profile(case().rolls)
    >>> deep = {k: ms.Bound(0.01, 0.004, 0.02) for k in (0, 1, 2, 4)} | {8: ms.Bound(0.06, 0.03, 0.1)}
    >>> ax = ms.plot.depth({"weak": weak, "trained deep": deep}, budget=0.1)
    """
    ax = axes_or_new(ax, (8.0, 4.2))
    named, true, forecast = _by_name(profiles), _by_name(truth), _by_name(predicted)
    looks = palette(list(named))
    shift = _shifts(len(named))
    tops, last = [0.0], {}
    column = depth_column(next(iter(profiles.values()), None) if isinstance(profiles, dict) else profiles)
    for (name, line), move in zip(named.items(), shift):
        colour, marker = looks[name]
        k, at = np.array(list(line)), points(line.values())
        remember(ax, PROBABILITY, {column: list(line)}, line.values(), series=name)
        if name in true:
            told = true[name]
            shown = points(told.values())[:, 0]
            remember(ax, PROBABILITY, {column: list(told)}, shown, series=name, kind="planted truth")
            ax.plot(np.array(list(told)) + move, shown, color=colour, lw=1, alpha=0.8, zorder=2)
        else:
            ax.plot(k + move, at[:, 0], color=colour, linewidth=0.8, alpha=0.4, zorder=2)
        if name in forecast:
            there, guess = np.array(list(forecast[name])), points(forecast[name].values())
            errorbars(ax, there + move, guess, color=colour, elinewidth=5, alpha=0.25, marker="none", zorder=1)
            ax.plot(there + move, guess[:, 0], "o", ms=8, mfc="none", mec=colour, mew=1.1, zorder=4)
            tops.extend(guess[:, 2])
            rings = forecast[name]
            remember(ax, PROBABILITY, {column: list(rings)}, rings.values(), series=name, kind="predicted")
        errorbars(ax, k + move, at, color=colour, marker=marker, markersize=4.5, zorder=3)
        tops.extend(at[:, 2])
        known = at[np.isfinite(at[:, 0]), 0]
        last |= {name: known[-1]} if name and len(known) else {}
    ax.set_ylim(0, ceiling(tops, budget))
    _depth_axis(ax, sorted({k for line in named.values() for k in line}))
    ax.set_xlabel(depth_label(next(iter(profiles.values()), None) if isinstance(profiles, dict) else profiles))
    ax.set_ylabel(PROBABILITY)
    ax.grid(axis="y")
    if budget is not None:
        ax.axhline(budget, color=tone().soft, linewidth=0.9, linestyle=(0, (4, 3)), zorder=1)
        remember(ax, PROBABILITY, {}, [budget], kind="budget")
    _end_labels(ax, last, {name: look[0] for name, look in looks.items()}, budget)
    level = _level(named)
    _depth_key(ax, "exact" if level == 100 else f"measured, {level:g} % interval", bool(true), bool(forecast))
    return ax


def _shifts(n: int) -> np.ndarray:
    """Steps to either side that keep the bars of several models apart."""
    wide = min(0.24, 0.12 * (n - 1))
    return np.linspace(-wide, wide, n)


def _by_name(data: Any) -> dict[str, dict[float, Any]]:
    """Several profiles by name; a single one gets the empty name."""
    if data is None:
        return {}
    several = isinstance(data, dict) and all(isinstance(key, str) for key in data)
    return {name: series(line) for name, line in (data if several else {"": data}).items()}


def _level(named: dict[str, dict[float, Any]]) -> float:
    """Confidence level of the first bound there is, in percent."""
    return next((100 * b.level for line in named.values() for b in line.values() if isinstance(b, Bound)), 95.0)


def _depth_axis(ax: Any, k: Sequence[float]) -> None:
    ax.set_xlabel(SPOKEN)
    if k:
        ax.set_xticks(k, [f"{a:g}" for a in k])
        ax.set_xlim(k[0] - 0.6, k[-1] + 0.6)


def _end_labels(ax: Any, last: dict[str, float], colours: dict[str, str], budget: float | None) -> None:
    """Names at the right end of the lines instead of a legend, moved apart where they would touch."""
    names = list(last) + ([] if budget is None else [f"budget {budget:g}"])
    top, height = ax.get_ylim()[1], ax.figure.get_figheight() * 72 * ax.get_position().height
    at = [*last.values()] + ([] if budget is None else [budget])
    for name, y in zip(names, spread(at, 13 / height * top, 0.02 * top, 0.98 * top)):
        style = end_style(name, colours)
        where = {"xycoords": ax.get_yaxis_transform(), "textcoords": "offset points", "annotation_clip": False}
        ax.annotate(plain(name, 24), (1.0, y), xytext=(5, 0), va="center", **where, **style)


def _depth_key(ax: Any, measured: str, truth: bool, forecast: bool) -> None:
    style = {"color": tone().soft, "marker": "o", "markersize": 4.5, "linestyle": "none"}
    keys = [ax.errorbar([], [], yerr=[], label=measured, **style)]
    if truth:
        keys += ax.plot([], [], color=tone().soft, linewidth=1, label="planted truth")
    if forecast:
        keys += ax.plot([], [], "o", color=tone().soft, ms=8, mfc="none", label="predicted by the chain")
    key_above(ax, 3, handles=keys)


@styled
def branch(found: Any, ax: Any = None) -> Any:
    """Branch correlation: how alike answers are that share their first k tokens.

    Parameters
    ----------
    found : Branch, or dict of Branch by model
        Depths at which the correlation cannot be seen (an interval that reaches 1) are left out.
    ax : Axes, optional

    Returns
    -------
    Axes

    Examples
    --------
    >>> chains = {"aligned for 3 tokens": ms.toy.shallow(3), "aligned for 12": ms.toy.deep(12)}
    >>> found = {name: ms.evidence.branch_exact(chain, range(0, 17, 2)) for name, chain in chains.items()}
    >>> ax = ms.plot.branch(found)
    """
    ax = axes_or_new(ax, (8.0, 2.6))
    named = found if isinstance(found, dict) else {"": found}
    looks = palette(list(named))
    shift = _shifts(len(named))
    ends, last = [0.0], {}
    for (name, one), move in zip(named.items(), shift):
        colour, marker = looks[name]
        k, at = np.array(one.k, dtype=float), points(one.rho[i] for i in range(len(one.k)))
        seen = np.isfinite(at).all(axis=1) & ((at[:, 2] < 1) | (at[:, 1] == at[:, 2]))
        ax.plot(k[seen] + move, at[seen, 0], color=colour, linewidth=0.8, alpha=0.4, zorder=2)
        errorbars(ax, k[seen] + move, at[seen], color=colour, marker=marker, markersize=4.5, zorder=3)
        ends.extend(at[seen].ravel())
        remember(ax, "branch correlation", {DEPTH_COLUMN: k[seen]}, at[seen], series=name)
        last |= {name: at[seen, 0][-1]} if name and seen.any() else {}
    ax.set_ylim(min(0.0, 1.12 * min(ends)), ceiling(ends))
    _depth_axis(ax, sorted({float(k) for one in named.values() for k in one.k}))
    ax.axhline(0, color=tone().soft, linewidth=0.8, zorder=1)
    ax.set_ylabel("branch correlation ρ")
    ax.grid(axis="y")
    _end_labels(ax, last, {name: look[0] for name, look in looks.items()}, None)
    return ax


@styled
def depth_signature(
    D: Any, lower: Any = None, upper: Any = None, ax: Any = None, *, depths: Sequence[float] | None = None
) -> Any:
    """Depth signature of edits: how far each moves the law of the next token after k tokens of the answer.

    Parameters
    ----------
    D : array of shape (K,), Bound, dict of k to Bound, or dict of these by edit
        Total variation distance in [0, 1] after k = 0, 1, ... tokens.
    lower, upper : as D, of numbers, optional
        Ends of the intervals; a Bound brings its own.
    ax : Axes, optional
    depths : sequence of float, optional
        The k of an array or a Bound; 0, 1, ... if not given.

    Returns
    -------
    Axes

    Raises
    ------
    InputError
        If numbers of depths differ within an edit, or only one end of the intervals is given.

    Examples
    --------
    >>> prompt = ms.Bound([0.91, 0.0, 0.0, 0.0], [0.89, 0.0, 0.0, 0.0], [0.93, 0.001, 0.001, 0.001])
    >>> every = ms.Bound([0.91, 0.99, 0.53, 0.95], [0.89, 0.99, 0.44, 0.93], [0.93, 1.0, 0.62, 0.98])
    >>> ax = ms.plot.depth_signature({"edit of the prompt": prompt, "at every step": every})
    """
    several = isinstance(D, dict) and all(isinstance(name, str) for name in D)
    pick = lambda x, name: x[name] if several and x is not None else x  # noqa: E731
    named = {
        name: _signature(one, pick(lower, name), pick(upper, name), depths)
        for name, one in (D if several else {"": D}).items()
    }
    ax = axes_or_new(ax, (8.0, 2.8))
    looks = palette(list(named))
    shift = np.linspace(-0.24, 0.24, len(named)) if len(named) > 1 else np.zeros(len(named))
    thick = 0.6 / max(len(named), 1)
    for (name, (k, at)), move in zip(named.items(), shift):
        colour, marker = looks[name]
        remember(ax, "total variation", {"depth (tokens so far)": k}, at, series=name)
        ax.bar(k + move, np.nan_to_num(at[:, 0]), thick, color=colour, alpha=0.35, linewidth=0, zorder=2)
        style = {"color": colour, "marker": marker, "markersize": 4.5, "zorder": 3, "clip_on": False}
        errorbars(ax, k + move, at, label=plain(name, 32) or None, **style)
    ax.set_ylim(0, 1.02)
    _depth_axis(ax, sorted({float(x) for k, _ in named.values() for x in k}))
    ax.set_xlabel("tokens so far")
    ax.set_ylabel("total variation $D_k$")
    ax.grid(axis="y")
    if several and named:
        key_above(ax, 4, handlelength=1.2)
    return ax


def _signature(one: Any, lower: Any, upper: Any, depths: Sequence[float] | None) -> tuple[np.ndarray, np.ndarray]:
    """Depths, and value, lower and upper of shape (K, 3)."""
    if isinstance(one, dict):
        return np.array(sorted(one), dtype=float), points(one[k] for k in sorted(one))
    if (lower is None) != (upper is None):
        raise InputError("One end of the intervals is missing.", cause="They have two.", next="Pass lower and upper.")
    parts = (one.value, one.lower, one.upper) if isinstance(one, Bound) else (one, one, one)
    parts = parts if lower is None else (parts[0], lower, upper)
    columns = [np.atleast_1d(np.asarray(x, dtype=float)) for x in parts]
    k = np.arange(len(columns[0]), dtype=float) if depths is None else np.asarray(depths, dtype=float)
    if any(c.shape != k.shape for c in columns):
        raise InputError(
            f"The signature has shapes {', '.join(str(c.shape) for c in columns)}, for {len(k)} depths.",
            cause="There is one number for each depth.",
            next="Pass arrays of one length.",
        )
    return k, np.stack(columns, axis=1)


@styled
def width(grid: Any, budget: float | None = None, ax: Any = None) -> Any:
    """Map of depth x width: one cell per number of forced tokens and ensemble size.

    The colour is the upper end of the harm's interval on a logarithmic scale that ends at 1e-4 and 1: blue within the
    budget, orange beyond it. The thick line runs between the two; each cell says value and interval. Hatched: no
    evidence.

    Parameters
    ----------
    grid : Grid
        Of `sweep`, with coords depth and width (the first entry along any other axis is shown).
    budget : float, optional
        Harm budget; a cell is within it if its upper end is. Without one all cells are orange.
    ax : Axes, optional

    Returns
    -------
    Axes

    Examples
    --------
    >>> from markovsafety.exercises import case
    >>> grid = ms.sweep(case().rolls, depth=[0, 1, 2, 4, 8], width=[1, 2, 4, 8])
    >>> ax = ms.plot.width(grid, budget=0.1)
    """
    from matplotlib.colors import LinearSegmentedColormap

    depths, widths, cells = _cells(grid)
    ax = axes_or_new(ax, (8.0, 0.9 + 0.42 * len(widths)))
    value, lower, upper = cells
    blank = ~np.isfinite(cells).all(axis=0) | (upper - lower >= 1 - 1e-9)
    colours = LinearSegmentedColormap.from_list("harm", tone().budget_ramp)
    shown = np.ma.masked_where(blank, _warmth(upper, budget))
    style = {"cmap": colours, "vmin": -1, "vmax": 1, "aspect": "auto", "origin": "lower", "interpolation": "none"}
    ax.imshow(shown.T, **style)
    inches = ax.figure.get_figwidth() * ax.get_position().width / max(len(depths), 1)
    gap = " – " if 72 * inches > 8 * tone().tiny else "–"
    for i, j in np.ndindex(*blank.shape):
        if blank[i, j]:
            _no_evidence(ax, i, j)
            continue
        ink = readable(colours((shown[i, j] + 1) / 2))
        ax.text(i, j + 0.17, short(value[i, j]), ha="center", va="center", fontsize=tone().small, color=ink)
        span = f"{short(lower[i, j])}{gap}{short(upper[i, j])}"
        ax.text(i, j - 0.23, span, ha="center", va="center", fontsize=tone().tiny, color=ink)
    across, up = np.meshgrid(depths, widths, indexing="ij")
    at = np.where(blank, np.nan, cells).reshape(3, -1).T
    remember(ax, PROBABILITY, {depth_column(grid): across.ravel(), "width (answers)": up.ravel()}, at)
    if budget is not None:
        remember(ax, PROBABILITY, {}, [budget], kind="budget")
        _frontier(ax, ~blank & (upper <= budget))
    ax.set_xticks(range(len(depths)), [f"{k:g}" for k in depths])
    ax.set_yticks(range(len(widths)), [f"{m:g}" for m in widths])
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    ax.set_xlabel(depth_label(grid))
    ax.set_ylabel("ensemble width")
    return ax


def _warmth(upper: np.ndarray, budget: float | None) -> np.ndarray:
    """Logarithmic place of harm between 1e-4 and 1: -1 to 0 within the budget, 0 to 1 beyond it, never close to 0."""
    x = np.log10(np.clip(np.nan_to_num(upper, nan=1.0), 1e-4, 1.0))
    edge = -4.0 if budget is None else float(np.clip(np.log10(max(budget, 1e-4)), -3.99, -0.01))
    warm = np.clip((x - edge) / -edge, 0, 1)
    cold = np.clip((edge - x) / (edge + 4), 0, 1) if budget is not None else warm
    beyond = np.ones(upper.shape, dtype=bool) if budget is None else upper > budget
    return np.where(beyond, 0.2 + 0.8 * warm, -0.3 - 0.7 * cold)


def _cells(grid: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Depths, widths, and value, lower, upper of shape (3, depths, widths)."""
    names = list(getattr(grid, "dims", None) or getattr(grid, "coords", {}))
    if "depth" not in names or "width" not in names:
        raise InputError(
            "There is no depth x width map here.",
            cause=f"the axes are {', '.join(map(str, names)) or 'none'}, and a map needs depth and width",
            next="Pass a grid of sweep(..., width=[1, 2, 4, 8]).",
        )
    pick = tuple(slice(None) if name in ("depth", "width") else 0 for name in names)
    parts = np.array([np.asarray(x)[pick] for x in (grid.harm.value, grid.harm.lower, grid.harm.upper)])
    if names.index("depth") > names.index("width"):
        parts = parts.transpose(0, 2, 1)
    return np.asarray(grid.coords["depth"]), np.asarray(grid.coords["width"]), parts


def _no_evidence(ax: Any, i: int, j: int) -> None:
    from matplotlib.patches import Rectangle

    style = {"facecolor": tone().paper, "edgecolor": tone().gap, "hatch": "////", "linewidth": 0}
    ax.add_patch(Rectangle((i - 0.5, j - 0.5), 1, 1, **style))
    box = {"facecolor": tone().paper, "edgecolor": "none", "pad": 1.5}
    ax.text(i, j, "no evidence", ha="center", va="center", fontsize=tone().tiny, color=tone().soft, bbox=box)


def _frontier(ax: Any, inside: np.ndarray) -> None:
    """The border of the cells within the budget, along cell edges."""
    lines = [((i + 0.5, j - 0.5), (i + 0.5, j + 0.5)) for i, j in np.argwhere(inside[1:] != inside[:-1])]
    lines += [((i - 0.5, j + 0.5), (i + 0.5, j + 0.5)) for i, j in np.argwhere(inside[:, 1:] != inside[:, :-1])]
    for (x0, y0), (x1, y1) in lines:
        ax.plot([x0, x1], [y0, y1], color=tone().strong, linewidth=2.2, solid_capstyle="projecting", gid="budget")
