"""The look of every figure: colours, figures without pyplot, error bars that end exactly at the bounds."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, cast

import numpy as np

from ..bound import Bound
from ..errors import InputError
from .columns import write_csv
from .themes import SIZES, Look, drawn_in, named, settings, tone

__all__ = ["OUTCOME_COLOURS", "figure", "palette", "panels", "save", "state_text"]

OUTCOME_COLOURS = {"harm": "#D55E00", "refusal": "#0072B2", "benign": "#009E73", "truncated": "#999999"}
HARM = OUTCOME_COLOURS["harm"]
_SHOWN: ContextVar[bool] = ContextVar("shown", default=True)
LOOK = "_markovsafety_look"  # attribute of a figure: the look it was made in
MARKERS = "osD^vPX*"
KEY_ABOVE: dict[str, Any] = {
    "loc": "lower center",
    "bbox_to_anchor": (0.5, 1.0),
    "borderaxespad": 0.2,
    "columnspacing": 1.4,
    "handletextpad": 0.6,
}
SPOKEN = "tokens already spoken (forced)"
PROBABILITY = "probability of harm"
DEPTH_COLUMN = "depth (forced tokens)"


@contextmanager
def unshown() -> Iterator[None]:
    """Figures made inside the block are not shown by Jupyter: they are for a page or a file."""
    token = _SHOWN.set(False)
    try:
        yield
    finally:
        _SHOWN.reset(token)


@contextmanager
def rc(look: Look) -> Iterator[None]:
    """Draw in a look, with matplotlib's settings for it; both as before when the block ends."""
    import matplotlib

    with drawn_in(look), matplotlib.rc_context(cast(Any, settings(look))):
        yield


def styled(draw: Callable[..., Any]) -> Callable[..., Any]:
    """Let a function draw in the look of the figure that it is given (or in that of `theme`), and leave matplotlib's
    settings as they were."""
    names = inspect.signature(draw)

    @functools.wraps(draw)
    def inside(*args: Any, **kwargs: Any) -> Any:
        ax = names.bind_partial(*args, **kwargs).arguments.get("ax")
        with rc(getattr(getattr(ax, "figure", None), LOOK, tone())):
            return draw(*args, **kwargs)

    return inside


@styled
def figure(
    size: str | tuple[float, float] | None = None, rows: int = 1, cols: int = 1, **options: Any
) -> tuple[Any, Any]:
    """A figure in the package's style and its Axes (one, or an array of shape (rows, cols)).

    Parameters
    ----------
    size : {"screen", "column", "page", "slide"}, or (float, float), optional
        Where it is to stand (see `theme`), or width and height in inches; the size of the theme if not given.
    rows, cols : int
        Grid of Axes.
    **options
        For `Figure.subplots`, e.g. ``sharex=True``.

    Raises
    ------
    InputError
        There is no such size.

    Examples
    --------
    >>> fig, ax = ms.plot.figure("column")
    >>> ms.plot.depth({0: 0.02, 5: 0.6}, ax=ax) is ax
    True
    >>> fig.get_size_inches().tolist()
    [3.35, 2.5]
    """
    look = tone()
    if size is None or isinstance(size, str):
        look = named(look.name, size or look.size)
        size = SIZES[look.size][:2]
    with rc(look):
        if _SHOWN.get() and "IPython" in sys.modules and sys.modules["IPython"].get_ipython() is not None:
            import matplotlib.pyplot as plt

            fig = plt.figure(figsize=size, layout="constrained", facecolor=look.paper)
        else:
            from matplotlib.figure import Figure

            fig = Figure(figsize=size, layout="constrained", facecolor=look.paper)
        setattr(fig, LOOK, look)
        axes = fig.subplots(rows, cols, squeeze=False, **options)
    return fig, axes[0, 0] if rows == cols == 1 else axes


@styled
def panels(
    data: Mapping[str, Any], draw: Callable[[Any, Any], Any], size: tuple[float, float], cols: int = 2, **options: Any
) -> Any:
    """One panel per model in one figure, with a single legend, and axis labels at the left and the bottom only.

    Parameters
    ----------
    data : dict
        What to draw, by the panel's title.
    draw : callable
        ``draw(value, ax)``, one of the functions of this room.
    size : (float, float)
        Width of the figure and height of a row, in inches.
    cols : int
        Panels in a row, at most.
    **options
        For `Figure.subplots`.

    Returns
    -------
    array of Axes, shape (rows, cols)
        Those without data are invisible.

    Examples
    --------
    >>> lines = {name: {0: 0.02, 5: h} for name, h in (("shallow", 0.6), ("deep", 0.03))}
    >>> axes = ms.plot.panels(lines, lambda line, ax: ms.plot.depth(line, budget=0.1, ax=ax), (8, 2.4), sharey=True)
    >>> axes.shape
    (1, 2)
    """
    cols = min(cols, len(data))
    rows = -(-len(data) // cols)
    fig, axes = figure((size[0], 0.4 + size[1] * rows), rows, cols, **options)
    axes = np.array(axes, dtype=object).reshape(rows, cols)
    keys: dict[str, Any] = {}
    for n, ((name, value), ax) in enumerate(zip(data.items(), axes.flat)):
        draw(value, ax)
        ax.set_title(plain(name, 48))
        if key := ax.get_legend():
            key.remove()
            keys = dict(zip(*reversed(ax.get_legend_handles_labels()))) | keys
        ax.set_xlabel(ax.get_xlabel() if n + cols >= len(data) else "")
        ax.set_ylabel(ax.get_ylabel() if n % cols == 0 else "")
    for ax in axes.flat[len(data) :]:
        ax.set_visible(False)
    if keys:
        fig.legend(list(keys.values()), list(keys), loc="outside upper center", ncols=6, handlelength=1.2)
    return axes


def save(ax: Any, path: str | Path, dpi: float = 160, *, csv: bool = False) -> str:
    """Write the figure of an Axes (or of an array of them), whole or not at all; equal figures give equal files.

    Parameters
    ----------
    ax : Axes, array of Axes, Figure, or Flow
    path : path
        Ending in .png, .pdf (with its fonts) or .svg, of a `Flow` in .html; its folder is made.
    dpi : float
        Dots per inch of .png.
    csv : bool
        Whether the numbers of the figure are written beside it (`write_csv`), in a file of its name that ends in .csv.

    Returns
    -------
    str
        The path.

    Examples
    --------
    >>> ax = ms.plot.depth({0: ms.Bound(0.02, 0.01, 0.04), 5: ms.Bound(0.6, 0.5, 0.7)})
    >>> ms.plot.save(ax, "figures/depth.pdf", csv=True)
    'figures/depth.pdf'
    >>> from pathlib import Path
    >>> sorted(path.name for path in Path("figures").iterdir())
    ['depth.csv', 'depth.pdf']
    """
    import matplotlib

    from ..files import atomic

    kind = Path(path).suffix
    moving: Any = ax if hasattr(ax, "html") else None
    if moving is None and kind not in (".png", ".pdf", ".svg"):
        raise InputError(f"{path} is no kind of figure.", cause="The ending says which.", next="Use .png, .pdf, .svg.")
    dates: dict[str, dict[str, Any]] = {".pdf": {"CreationDate": None}, ".svg": {"Date": None}}
    same = {"svg.hashsalt": "markovsafety", "pdf.fonttype": 42}
    if moving is not None:
        moving.save(path)
    else:
        one = np.asarray(ax, dtype=object).flat[0]
        with matplotlib.rc_context(cast(Any, same)), atomic(path) as part:
            one.figure.savefig(part, format=kind[1:], dpi=dpi, metadata=dates.get(kind))
    if csv:
        write_csv(ax, Path(path).with_suffix(".csv"))
    return str(path)


def axes_or_new(ax: Any, size: tuple[float, float]) -> Any:
    """The given Axes, or those of a new figure."""
    return figure(tone().fitted(*size))[1] if ax is None else ax


def palette(names: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Colour and marker of every model, by its place in the order given; colours of the theme that is drawn in.

    Parameters
    ----------
    names : sequence of str

    Returns
    -------
    dict of str to (str, str)

    Examples
    --------
    >>> ms.plot.palette(["shallow", "deep"])
    {'shallow': ('#4D4D4D', 'o'), 'deep': ('#C4348A', 's')}
    """
    models = tone().models
    # From the second round of colours on each comes with another marker.
    return {n: (models[i % len(models)], MARKERS[(i + i // len(models)) % len(MARKERS)]) for i, n in enumerate(names)}


def ends(x: Any) -> tuple[float, float, float]:
    """Value, lower and upper of a scalar bound or a plain number."""
    return (x.value, x.lower, x.upper) if isinstance(x, Bound) else (float(x), float(x), float(x))


def series(data: Any) -> dict[float, Any]:
    """A depth profile as {k: Bound or number}, sorted by k.

    Parameters
    ----------
    data : dict, Bound of `profile`, or grid of `sweep`
        Of a grid, the first entry along every axis but depth.
    """
    if isinstance(data, Mapping):
        return {float(k): data[k] for k in sorted(data)}
    harm = data if isinstance(data, Bound) else getattr(data, "harm", None)
    if isinstance(harm, Mapping):
        return series(harm)
    info = getattr(harm, "info", {})
    coords, dims = (getattr(x, n, info.get(n)) for x, n in ((data, "coords"), (data, "dims")))
    if not isinstance(harm, Bound) or not coords or "depth" not in coords:
        raise InputError(
            f"A depth profile cannot be read from {type(data).__name__}.",
            cause="It has no axis of depths.",
            next="Pass {k: Bound}, profile(rolls), sweep(rolls, depth=...), or a dict of these by model.",
        )
    names = list(dims or coords)
    at = [[0] * len(names) for _ in coords["depth"]]
    for i, index in enumerate(at):
        index[names.index("depth")] = i
    return {float(k): harm[tuple(index)] for k, index in sorted(zip(coords["depth"], at), key=lambda pair: pair[0])}


def points(values: Any) -> np.ndarray:
    """Value, lower, upper of each bound or number, shape (n, 3)."""
    return np.array([ends(x) for x in values], dtype=float).reshape(-1, 3)


def errorbars(ax: Any, x: Any, at: np.ndarray, *, horizontal: bool = False, **style: Any) -> None:
    """Markers with bars that end exactly at lower and upper; what is not finite is left out."""
    keep = np.isfinite(at).all(axis=1)
    (value, lower, upper), x = at[keep].T, np.asarray(x, dtype=float)[keep]
    err = np.array([value - lower, upper - value])
    where = (value, x) if horizontal else (x, value)
    kind: dict[str, Any] = {"xerr" if horizontal else "yerr": err, "linestyle": "none", "elinewidth": 1.2, "capsize": 0}
    ax.errorbar(*where, **(kind | style))


def depth_label(grid: Any) -> str:
    """What the depth axis of a grid counts."""
    info = getattr(grid, "info", None) or {}
    if info.get("source") == "checkpoint":
        return "position of the checkpoint"
    return "trained depth (aligned tokens)" if info.get("kind") == "trained" else SPOKEN


def depth_column(grid: Any) -> str:
    """The depth axis of a grid as a column of `data`, with its unit."""
    label = depth_label(grid)
    return DEPTH_COLUMN if label == SPOKEN else "depth (trained tokens)" if label[0] == "t" else "checkpoint (token)"


def halo() -> list[Any]:
    """A rim for text that lies over a drawing."""
    from matplotlib.patheffects import withStroke

    return [withStroke(linewidth=2.5, foreground=tone().paper)]


def readable(colour: Any) -> str:
    """Black or white, whichever can be read on a colour (relative luminance and contrast of WCAG 2)."""
    from matplotlib.colors import to_rgb

    c = np.array(to_rgb(colour))
    light = np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4) @ [0.2126, 0.7152, 0.0722]
    return "#000000" if light > 0.179 else "#FFFFFF"


def end_style(name: str, colours: Mapping[str, str]) -> dict[str, Any]:
    """Text at the right end of a line, in its colour; of a budget, small and grey."""
    if name in colours:
        return {"color": colours[name], "fontweight": "bold"}
    return {"color": tone().soft, "fontsize": tone().small}


def key_above(ax: Any, most: int, handles: Sequence[Any] | None = None, handlelength: float = 2.0) -> Any:
    """A legend above the Axes, in as many columns as there is room for."""
    handles = list(ax.get_legend_handles_labels()[0]) if handles is None else list(handles)
    texts = [str(h.get_label()) for h in handles]
    room = 72 * ax.figure.get_figwidth() * ax.get_position().width * 1.1 / tone().small

    def wide(ncols: int) -> float:
        rows = -(-len(texts) // ncols)
        longest = [max(map(len, texts[i : i + rows])) for i in range(0, len(texts), rows)]
        return sum(0.56 * n + handlelength + 2.0 for n in longest)

    ncols = next((n for n in range(min(most, len(texts)), 1, -1) if wide(n) <= room), 1)
    return ax.legend(handles=handles, **KEY_ABOVE, ncols=ncols, handlelength=handlelength)


def whole_ticks(ax: Any, x: bool = True, y: bool = False) -> None:
    """Ticks at whole numbers only, for what is counted."""
    from matplotlib.ticker import MaxNLocator

    for axis in ([ax.xaxis] if x else []) + ([ax.yaxis] if y else []):
        axis.set_major_locator(MaxNLocator(integer=True, nbins=9, steps=[1, 2, 5, 10]))


def spread(y: Sequence[float], gap: float, low: float, high: float) -> np.ndarray:
    """Positions near y, in the same order, `gap` apart (less where there is no room) and inside [low, high]."""
    n = len(y)
    gap = min(gap, (high - low) / max(n - 1, 1))
    order = np.argsort(y, kind="stable")
    steps = gap * np.arange(n)
    # Without the gaps the positions only have to rise: clip from below, then from above.
    place = np.maximum.accumulate(np.maximum(np.asarray(y, dtype=float)[order] - steps, low))
    place = np.minimum(place, high - gap * (n - 1)) + steps
    out = np.empty(n)
    out[order] = place
    return out


def ceiling(tops: Any, budget: float | None = None) -> float:
    """Upper end of a probability axis that shows every interval and the budget."""
    finite = [1.12 * t for t in tops if np.isfinite(t)] + ([1.4 * budget] if budget else [])
    return min(1.02, max([0.02, *finite]))


def short(p: float) -> str:
    """A probability in at most five characters: 0.54, 0.021, 4e-4."""
    if not np.isfinite(p):
        return "∞" if p > 0 else "?"
    if p == 0 or p >= 0.995:
        return f"{p:.0f}"
    if p >= 0.0995:
        return f"{p:.2f}"
    return f"{p:.3f}" if p >= 0.00095 else f"{p:.0e}".replace("e-0", "e-")


@functools.cache
def _glyphs() -> frozenset[int]:
    from matplotlib.font_manager import findfont, get_font

    return frozenset(get_font(findfont("DejaVu Sans")).get_charmap())


def plain(text: Any, length: int | None = None) -> str:
    """Text as matplotlib can draw it: no formula, no line break, a box for what the font lacks, cut to a length."""
    drawn = "".join("↵" if c == "\n" else c if ord(c) in _glyphs() and c.isprintable() else "□" for c in str(text))
    if length is not None and len(drawn) > length:
        drawn = drawn[: length - 1] + "…"
    return drawn.replace("$", r"\$")


def state_text(label: Any, words: Any = None) -> str:
    """A state label as short text.

    Parameters
    ----------
    label : object
        A tuple is read as token ids; a dot stands for the beginning of the answer.
    words : sequence or callable, optional
        Token id -> text.

    Examples
    --------
    >>> ms.plot.state_text((-1, 0), words=["Sure,"]), ms.plot.state_text((-1, -1)), ms.plot.state_text("harm")
    ('· Sure,', '(start)', 'harm')
    """
    if not isinstance(label, tuple):
        return str(label)
    whole = (int, np.integer)
    if label and all(isinstance(part, whole) for part in label):
        if label[-1] < 0:
            return "(start)"
        label = label[max(0, sum(part < 0 for part in label) - 1) :]
    speak = words if callable(words) else (lambda i: words[i]) if words is not None else str
    return " ".join(state_text(p) if not isinstance(p, whole) else "·" if p < 0 else str(speak(p)) for p in label)
