"""Attention heads that steer, and the path of an edit's strength with its price."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..errors import InputError
from .columns import remember
from .style import (
    OUTCOME_COLOURS,
    axes_or_new,
    errorbars,
    halo,
    key_above,
    plain,
    points,
    readable,
    short,
    styled,
    whole_ticks,
)
from .themes import tone

__all__ = ["alphas", "head_map"]


@styled
def head_map(
    values: Any,
    ax: Any = None,
    *,
    chosen: Sequence[tuple[int, int]] = (),
    limits: tuple[float, float] = (0.0, 1.0),
    label: str = "P(begins as desired)",
    bar: bool = True,
) -> Any:
    """A number per attention head, layers from below upwards.

    Parameters
    ----------
    values : array, shape (layers, heads)
        Such as `HeadSweep.best`; nan for heads that have none.
    ax : Axes, optional
    chosen : sequence of (layer, head)
        Framed.
    limits : (float, float)
        Ends of the scale.
    label : str
        What the numbers are.
    bar : bool
        Whether the colours are explained beside the map.

    Returns
    -------
    Axes

    Raises
    ------
    InputError
        Not a table.

    Examples
    --------
    >>> best = np.array([[0.31, 0.37, 0.12, 0.51], [0.12, 0.78, 0.88, 0.14], [0.12, 0.12, 0.12, np.nan]])
    >>> ax = ms.plot.head_map(best, chosen=[(1, 2)])
    """
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.patches import Rectangle

    table = np.asarray(values, dtype=float)
    if table.ndim != 2 or not table.size:
        raise InputError(
            f"The map of heads has shape {table.shape}.",
            cause="Heads are counted by layer and head.",
            next="Pass an array of shape (layers, heads).",
        )
    layers, heads = table.shape
    ax = axes_or_new(ax, (1.6 + 0.55 * min(heads, 16) + (1.0 if bar else 0.0), 1.2 + 0.45 * min(layers, 16)))
    scale = LinearSegmentedColormap.from_list("heads", tone().head_ramp)
    style = {"cmap": scale, "vmin": limits[0], "vmax": limits[1], "origin": "lower", "interpolation": "none"}
    drawn = ax.imshow(np.ma.masked_invalid(table), aspect="auto", **style)
    for y, x in np.argwhere(~np.isfinite(table)):
        hatched = {"facecolor": "none", "edgecolor": tone().gap, "hatch": "////", "linewidth": 0, "gid": "no direction"}
        ax.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, **hatched))
    if heads <= 16 and layers <= 32:
        for y, x in np.argwhere(np.isfinite(table)):
            value = float(table[y, x])
            told = {"ha": "center", "va": "center", "fontsize": tone().small, "color": readable(drawn.to_rgba(value))}
            ax.text(x, y, short(value) if value >= 0 else f"{value:.2f}", **told)
    for layer, head in chosen:
        style = {"facecolor": "none", "edgecolor": tone().ink, "lw": 2, "gid": "chosen"}
        frame = Rectangle((head - 0.48, layer - 0.48), 0.96, 0.96, **style)
        frame.set_path_effects(halo())
        ax.add_patch(frame)
    layer, head = (x.ravel() for x in np.indices(table.shape))
    framed = [(int(a), int(b)) in {(int(x), int(y)) for x, y in chosen} for a, b in zip(layer, head)]
    remember(ax, plain(label), {"layer": layer, "head": head, "chosen": framed}, table.ravel(), kind="head")
    whole_ticks(ax, y=True)
    ax.set_xlabel("head")
    ax.set_ylabel("layer")
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0)
    if bar:
        key = ax.figure.colorbar(drawn, ax=ax, pad=0.03, aspect=18)
        key.ax.tick_params(length=0, labelsize=tone().small)
        key.outline.set_visible(False)
        key.set_label(plain(label))
    return ax


@styled
def alphas(path: Any, ax: Any = None, *, shown: Sequence[str] = ("harm", "refusal")) -> Any:
    """What an edit does at each strength: outcomes with intervals, the same under random vectors, and its price.

    Parameters
    ----------
    path : AlphaPath or its rows
        Of `markovsafety.interventions.alpha_path`.
    ax : Axes, optional
    shown : sequence of "harm", "refusal"
        Outcomes of the prompts.

    Returns
    -------
    Axes
        Filled: under the edit; open and dotted: under random vectors of the same size; squares: benign prompts refused.

    Examples
    --------
    >>> def near(p, half=0.09):
    ...     return ms.Bound(p, max(p - half, 0.0), min(p + half, 1.0))
    >>> measured = {-8: (0.13, 0.81, 0.72), -5: (0.15, 0.78, 0.70), -3: (0.22, 0.69, 0.15), -2: (0.45, 0.38, 0.10)}
    >>> rows = [
    ...     {"alpha": a, "harm": near(h), "refusal": near(r), "over_refusal": near(o, 0.06)}
    ...     | {"control_harm": near(0.54), "control_refusal": near(0.17)}
    ...     for a, (h, r, o) in (measured | {0: (0.54, 0.17, 0.05)}).items()
    ... ]
    >>> ax = ms.plot.alphas(rows)
    """
    rows = path.rows() if callable(getattr(path, "rows", None)) else list(path)
    ax = axes_or_new(ax, (5.4, 3.4))
    x = np.array([r["alpha"] for r in rows], dtype=float)
    place = np.arange(len(x))
    for name in shown:
        colour = OUTCOME_COLOURS[name]
        for key, text, style, move in (
            (name, name, {"linestyle": "-"}, -0.06),
            (f"control_{name}", f"{name}, random vectors", {"linestyle": ":"}, 0.06),
        ):
            at = points(r[key] for r in rows)
            remember(ax, "probability", {"alpha (σ)": x}, [r[key] for r in rows], series=text)
            mine = key == name
            ax.plot(place + move, at[:, 0], color=colour, linewidth=1.4, alpha=1 if mine else 0.6, zorder=2, **style)
            face = {"mfc": colour if mine else tone().paper, "alpha": 1.0 if mine else 0.6}
            marker = {"marker": "^" if name == "harm" else "o", "markersize": 5, "label": text, "zorder": 3}
            errorbars(ax, place + move, at, color=colour, clip_on=False, **marker, **face)
    if all(r["over_refusal"] is not None for r in rows):
        at = points(r["over_refusal"] for r in rows)
        given = [r["over_refusal"] for r in rows]
        remember(ax, "probability", {"alpha (σ)": x}, given, series="benign prompts refused")
        ax.plot(place, at[:, 0], color=tone().ink, linewidth=1.2, linestyle="--", zorder=2)
        errorbars(ax, place, at, color=tone().ink, marker="s", markersize=5, label="benign prompts refused", zorder=3)
    zero = np.flatnonzero(x == 0)
    if len(zero):
        ax.axvline(place[zero[0]], color=tone().soft, linewidth=0.8, zorder=1)
    ax.set_xticks(place, [f"{a:g}".replace("-", "−") for a in x])
    ax.set_ylim(-0.02, 1.02)
    ax.set_xlabel("alpha (in σ)")
    ax.set_ylabel("probability")
    ax.grid(axis="y")
    key_above(ax, 3 if len(rows) > 4 else 2, handlelength=1.4)
    return ax
