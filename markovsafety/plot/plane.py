"""The plane of harmfulness and refusal: a number per state as a surface, where answers go, and how sure that is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ..bound import Bound
from ..chains import ActivationBins, Chain, drift, grid
from ..errors import InputError
from ..hitting import hitting_probability
from .columns import remember
from .style import OUTCOME_COLOURS, axes_or_new, key_above, plain, styled
from .themes import tone

__all__ = ["plane"]

LARGEST = 0.4  # radius of the disc of a cell that every answer passes, in cells
LONGEST = 0.9  # length of the longest arrow, in cells
NAMES = {"harm": "harmfulness", "refusal": "refusal"}


@styled
def plane(
    chain: Chain,
    values: Any,
    edges: ActivationBins | Mapping[str, Sequence[float]] | None = None,
    ax: Any = None,
    *,
    colours: tuple[str, str] = ("harm", "refusal"),
    limits: tuple[float, float] = (0.0, 1.0),
    label: str | None = None,
    wide: float = 0.5,
    visits: bool = True,
    arrows: bool = False,
    cell: Callable[[Any], Any] | None = None,
    bar: bool = True,
) -> Any:
    """A number per state on the plane of two directions, e.g. the committor: P(refusal before harm).

    The first direction runs to the right, the second up, a square for each pair of bins. Hatched without a colour: no
    answer was there. A pale colour under dots: the interval is wider than `wide`.

    Parameters
    ----------
    chain : Chain
        With states of `ActivationBins` of two directions.
    values : Bound or array, shape (n,)
        ``committor(chain, "harm", "refusal")``, ``hitting_probability(chain, "harm")`` or any number per state. Only a
        Bound tells how sure it is.
    edges : ActivationBins or its edges, optional
        What the rollouts were counted with; the borders of the cells then carry the edges.
    ax : Axes, optional
    colours : (str, str)
        Outcomes (or colours) of the low and the high end of the scale: ``("refusal", "harm")`` for P(harm).
    limits : (float, float)
        Ends of the scale.
    label : str, optional
        What the values are; the name of the Bound if not given.
    wide : float
        Width of an interval from which on a cell is pale.
    visits : bool
        Whether a disc shows the probability that an answer passes the cell, by area, and a dark one inside it the
        probability that it starts there (for chains with a start law).
    arrows : bool
        Whether an arrow shows the mean step from each cell, given that the answer stays on the plane (see `drift`);
        all are shortened alike where the longest would leave its neighbour. Pale cells have none.
    cell : callable, optional
        As for `markovsafety.chains.grid`.
    bar : bool
        Whether the colours are explained beside the map.

    Returns
    -------
    Axes

    Raises
    ------
    InputError
        As `markovsafety.chains.grid`, and if the limits do not rise.

    Examples
    --------
    >>> bins = ms.ActivationBins({"harm": [-1, 0, 1], "refusal": [-1, 0, 1]})
    >>> cells = [(x, y) for x in range(4) for y in range(4) if x + y < 6]
    >>> P = np.zeros((17, 17))
    >>> for i, (x, y) in enumerate(cells):  # up, towards refusal, or to the right, towards harm
    ...     up, right = (cells.index(c) if c in cells else None for c in ((x, y + 1), (x + 1, y)))
    ...     P[i, 16 if up is None else up] += 0.6 - 0.1 * x
    ...     P[i, 15 if right is None else right] += 0.4 + 0.1 * x
    >>> chain = ms.Chain(P, {"harm": 15, "refusal": 16}, start=0, states=[*cells, "harm", "refusal"])
    >>> ax = ms.plot.plane(chain, ms.committor(chain, "harm", "refusal"), bins, arrows=True)
    """
    low, high = limits
    if not low < high:
        raise InputError(f"The limits are {limits}.", cause="A scale rises.", next="Pass (least, largest).")
    shown = grid(chain, values, edges, cell=cell)
    rows, cols = shown.shape
    side = float(np.clip(3.7 / max(rows, cols), 0.3, 0.7))
    ax = axes_or_new(ax, (max(3.6, side * cols + (1.9 if bar else 0.9)), max(2.6, side * rows + 1.3)))
    unsure = _unsure(chain, values, edges, cell, wide)
    drawn = _squares(ax, shown, unsure, colours, limits)
    blank = np.isnan(grid(chain, np.zeros(len(chain.states)), edges, cell=cell))
    _hatched(ax, blank, unsure, wide)
    if visits and chain.start is not None:
        _discs(ax, chain, edges, cell)
    if arrows:
        _arrows(ax, np.where(unsure, np.nan, drift(chain, edges, cell=cell)))
    _axes(ax, edges, shown.shape)
    _note(ax, chain, values, edges, cell, plain(label or getattr(values, "info", {}).get("name", "value")))
    if ax.get_legend_handles_labels()[0]:
        inches = ax.figure.get_figwidth() * ax.get_position().width
        key_above(ax, 2 if inches > 3.2 else 1, handlelength=1.4)
    if bar:
        beyond = bool((shown < low).any()), bool((shown > high).any())
        extend = {(True, True): "both", (True, False): "min", (False, True): "max"}.get(beyond, "neither")
        key = ax.figure.colorbar(drawn, ax=ax, pad=0.03, aspect=22, extend=extend)
        key.ax.tick_params(length=0, labelsize=tone().small)
        key.outline.set_visible(False)
        key.set_label(plain(label or getattr(values, "info", {}).get("name", "value")))
    return ax


def _note(ax: Any, chain: Chain, values: Any, edges: Any, cell: Any, label: str) -> None:
    """The numbers of the cells, bin by bin."""
    parts = (values.value, values.lower, values.upper) if isinstance(values, Bound) else (values,)
    shown = np.array([grid(chain, part, edges, cell=cell) for part in parts])
    up, right = np.nonzero(np.isfinite(shown[0]))
    told = dict(edges.edges if isinstance(edges, ActivationBins) else edges or {})
    names = [NAMES.get(n, n) for n in (list(told) or list(NAMES))]
    at = shown[:, up, right].T
    where = {f"bin of {name}": place for name, place in zip(names, (right, up))}
    remember(ax, label, where, at if isinstance(values, Bound) else at[:, 0], kind="state")


def _unsure(chain: Chain, values: Any, edges: Any, cell: Any, wide: float) -> np.ndarray:
    """Cells whose interval is too wide."""
    lower, upper = (values.lower, values.upper) if isinstance(values, Bound) else (np.zeros(len(chain.states)),) * 2
    low, high = (grid(chain, x, edges, cell=cell) for x in (lower, upper))
    return high > low + wide


def _squares(ax: Any, shown: np.ndarray, unsure: np.ndarray, colours: Sequence[str], limits: Sequence[float]) -> Any:
    from matplotlib.colors import LinearSegmentedColormap

    low, high = (OUTCOME_COLOURS.get(c, c) for c in colours)
    scale = LinearSegmentedColormap.from_list("plane", [low, tone().middle, high])
    style = {"cmap": scale, "vmin": limits[0], "vmax": limits[1], "origin": "lower", "interpolation": "none"}
    return ax.imshow(np.ma.masked_array(shown, np.isnan(shown)), alpha=np.where(unsure, 0.35, 1.0), **style)


def _hatched(ax: Any, blank: np.ndarray, unsure: np.ndarray, wide: float) -> None:
    """Hatches over cells without answers, dots over those with wide intervals."""
    from matplotlib.patches import Rectangle

    for where, hatch, colour, text in (
        (unsure, "....", tone().soft, f"interval wider than {wide:g}"),
        (blank, "////", tone().gap, "no answer was here"),
    ):
        style = {"facecolor": "none", "edgecolor": colour, "hatch": hatch, "linewidth": 0}
        for n, (y, x) in enumerate(np.argwhere(where)):
            ax.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, gid=text, label="" if n else text, **style))


def _discs(ax: Any, chain: Chain, edges: Any, cell: Any) -> None:
    """White discs by the probability of passing a cell, dark ones inside by that of starting there."""
    from matplotlib.patches import Circle

    place = grid(chain, np.arange(len(chain.states)), edges, cell=cell)
    faces = {}
    for y, x in np.argwhere(np.isfinite(place)):
        i = int(place[y, x])
        passed = float(hitting_probability(chain, i, certify=False).at_start.value)
        for share, face, text in (
            (passed, tone().paper, "passes here (by area)"),
            (chain.start[i], tone().ink, "starts here"),
        ):
            if share > 0:
                style = {"facecolor": face, "edgecolor": tone().ink, "linewidth": 0.7, "zorder": 3, "gid": text}
                ax.add_patch(Circle((x, y), LARGEST * np.sqrt(min(share, 1.0)), **style))
                faces[text] = face
    for text, face in sorted(faces.items()):
        ax.plot([], [], "o", ms=7, mec=tone().ink, mew=0.7, mfc=face, label=text)


def _arrows(ax: Any, steps: np.ndarray) -> None:
    """Arrows from the middles of the cells, all shortened alike if one is too long."""
    length = np.hypot(*steps)
    y, x = np.nonzero(np.nan_to_num(length) > 1e-9)
    if not len(x):
        return
    shrink = max(1.0, float(length[y, x].max()) / LONGEST)
    style = {"angles": "xy", "scale_units": "xy", "scale": shrink, "zorder": 4}
    style |= {"facecolor": tone().strong, "edgecolor": tone().paper, "linewidth": 0.5, "width": 0.007}
    ax.quiver(x, y, steps[0, y, x], steps[1, y, x], headwidth=4, headlength=4.5, headaxislength=4, **style)
    text = "mean step" + (f", shortened {shrink:.2g} times" if shrink > 1 else "")
    ax.plot([], [], linestyle="none", marker=r"$\rightarrow$", ms=11, color=tone().strong, mew=0, label=text)


def _axes(ax: Any, edges: Any, shape: tuple[int, int]) -> None:
    """Edges at the borders of the cells, or the numbers of the bins in their middles."""
    told = dict(edges.edges if isinstance(edges, ActivationBins) else edges or {})
    names = list(told) or list(NAMES)
    for axis, name, size in zip((ax.xaxis, ax.yaxis), names, shape[::-1]):
        if told:
            cuts = np.asarray(told[name], dtype=float)
            step = max(1, -(-len(cuts) // 9))
            axis.set_ticks(np.arange(len(cuts))[::step] + 0.5, _numbers(cuts)[::step])
        else:
            axis.set_ticks(range(size), [str(i) for i in range(size)])
        spoken = plain(NAMES.get(name, name), 32)
        axis.set_label_text(f"{spoken} (projection)" if told else f"bin of {spoken}")
    ax.set_xlim(-0.5, shape[1] - 0.5)
    ax.set_ylim(-0.5, shape[0] - 0.5)
    ax.tick_params(length=3, color=tone().soft, labelsize=tone().small)
    ax.spines[:].set_visible(False)


def _numbers(cuts: np.ndarray) -> list[str]:
    """Edges with as many digits as show where they lie between each other."""
    gap = float(np.diff(cuts).min()) if len(cuts) > 1 else float(np.abs(cuts).max()) or 1.0
    if np.abs(cuts).max() >= 1e5 or gap < 1e-5:
        return [f"{x:.3g}".replace("-", "−") for x in cuts]
    places = next(n for n in range(8) if (np.abs(np.round(cuts, n) - cuts) <= 0.05 * gap).all())
    return [f"{x + 0.0:.{places}f}".replace("-", "−") for x in np.round(cuts, places)]
