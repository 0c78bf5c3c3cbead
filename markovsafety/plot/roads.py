"""The chain drawn small: states left to right in time, outcomes at the right, roads as wide as they are busy."""

from __future__ import annotations

from typing import Any

import networkx as nx
import numpy as np

from .columns import remember
from .folding import folded
from .style import HARM, OUTCOME_COLOURS, axes_or_new, plain, short, spread, state_text, styled
from .themes import tone

__all__ = ["chain", "placed"]

_POINTS = 16.0  # line width of a road that every answer takes
_COLUMNS = 6  # of states, at most
_UNITS = {"visits": "per answer", "time": "mean position, tokens"}
_SMALL = 0.02  # roads with less flow are drawn only where a state has no busier one


@styled
def chain(chain: Any, ax: Any = None, top: int = 12, *, target: str = "harm", words: Any = None) -> Any:
    """The chain drawn small: its busiest states and the roads between them.

    A box is a state with its probability of harm and the interval; the more red, the higher. A road is as wide as it is
    busy (expected passages per answer); states that are not drawn are folded exactly into the roads. Small roads, below
    2 % of the answers, are left out unless a state has no larger one.

    Parameters
    ----------
    chain : Chain
        With a start law.
    ax : Axes, optional
    top : int
        Number of states drawn, outcomes not counted.
    target : str
        Outcome that counts as harm.
    words : sequence or callable, optional
        Token id -> text, to read the labels of k-gram states.

    Returns
    -------
    Axes

    Examples
    --------
    >>> words = ["Sure,", "here", "is", "STEP", "I", "cannot", "but", "help"]
    >>> answers = [
    ...     ("Sure, here is STEP", "harm", 21),
    ...     ("Sure, here is but I cannot", "refusal", 9),
    ...     ("I cannot help", "refusal", 148),
    ...     ("I cannot but Sure, here is STEP", "harm", 6),
    ...     ("Sure, I cannot help", "refusal", 8),
    ...     ("Sure, here is help", "benign", 8),
    ... ]
    >>> said = [[words.index(w) for w in text.split()] for text, _, n in answers for _ in range(n)]
    >>> ends = [outcome for _, outcome, n in answers for _ in range(n)]
    >>> asked = {"prompt_id": np.arange(200) % 40, "category": ["all"] * 200, "prefill": [0] * 200}
    >>> rolls = ms.Rollouts.of(said, **asked, outcome=ends, hit=[len(tokens) - 1 for tokens in said])
    >>> chain = ms.estimate(ms.count(rolls, states=ms.KGram(1)))
    >>> ax = ms.plot.chain(chain, words=words)
    """
    graph = folded(chain, top, target)
    columns = placed(graph)
    crowd = max(len(nodes) for nodes in columns)
    ax = axes_or_new(ax, (9.2, max(3.4, 0.46 * crowd)))
    inches = ax.figure.get_figwidth() * ax.get_position().width / len(columns)
    narrow = 0.82 * inches < 0.1 * tone().tiny
    tall = min(0.17 if narrow else 0.11, 0.85 / crowd)
    spot: dict[Any, tuple[int, float]] = {}
    for x, nodes in enumerate(columns):
        places = spread([graph.nodes[n]["height"] for n in nodes], 1.3 * tall, tall / 2, 1 - tall / 2)
        spot |= {n: (x, float(y)) for n, y in zip(nodes, places)}
    size = (0.9 if narrow else min(0.82, 1.2 / inches), tall)
    _draw_roads(ax, graph, spot, size)
    for node, at in spot.items():
        _draw_box(ax, graph.nodes[node], node, chain, at, size, words, narrow)
    _note(ax, graph, chain, words)
    ax.set_xlim(-0.45, len(columns) - 0.55)
    ax.set_ylim(-0.02, 1.02)
    ax.set_axis_off()
    return ax


def _note(ax: Any, graph: nx.DiGraph, chain: Any, words: Any) -> None:
    """The numbers in the boxes and those of the roads."""
    said = {n: n if isinstance(n, str) else state_text(chain.states[n], words) for n in graph}
    boxes = [n for n in graph if graph.nodes[n]["harm"] is not None]
    x = {"state": [said[n] for n in boxes]}
    x |= {f"{name} ({unit})": [graph.nodes[n][name] for n in boxes] for name, unit in _UNITS.items()}
    remember(ax, "probability of harm from here", x, [graph.nodes[n]["harm"] for n in boxes], kind="state")
    roads = [(a, b, at) for a, b, at in graph.edges(data=True) if _shown(graph, a, b)]
    x = {"state": [said[a] for a, _, _ in roads], "to": [said[b] for _, b, _ in roads]}
    x |= {"of it through states not shown (share)": [at["hidden"] for _, _, at in roads]}
    remember(ax, "passages per answer", x, [at["flow"] for _, _, at in roads], kind="road")


def placed(graph: nx.DiGraph) -> list[list[Any]]:
    """States by the longest way from the start, on roads that lead forward in time; outcomes last."""
    time = nx.get_node_attributes(graph, "time")
    states = sorted((n for n in graph if time[n] < np.inf), key=lambda n: (time[n], -graph.nodes[n]["height"]))
    same = 0.03 * max((time[n] for n in states), default=0.0)  # states met at about the same time share a column
    column: dict[Any, int] = {}
    for n in states:
        before = [m for m in graph.predecessors(n) if m in column and time[n] - time[m] > same and _shown(graph, m, n)]
        before = before or [m for m in column if time[n] - time[m] > same]
        column[n] = 1 + max((column[m] for m in before), default=-1)
    squeeze = max(1.0, (1 + max(column.values(), default=0)) / _COLUMNS)
    rows: dict[int, list[Any]] = {}
    for n in states:
        rows.setdefault(int(column[n] / squeeze), []).append(n)
    ends = [n for n in graph if n not in column]
    return [rows[x] for x in sorted(rows)] + ([ends] if ends else [])


def _shown(graph: nx.DiGraph, a: Any, b: Any) -> bool:
    """Whether a road is drawn: not too small, or the busiest one out of a state or into a state."""
    here = graph.edges[a, b]["flow"]
    into = max(at["flow"] for _, _, at in graph.in_edges(b, data=True))
    out = max(at["flow"] for _, _, at in graph.out_edges(a, data=True))
    return here >= _SMALL or here in (into, out)


def _draw_roads(ax: Any, graph: nx.DiGraph, spot: dict[Any, tuple[int, float]], size: tuple[float, float]) -> None:
    from matplotlib.patches import FancyArrowPatch, PathPatch
    from matplotlib.path import Path

    roads = [(a, b, at) for a, b, at in graph.edges(data=True) if _shown(graph, a, b)]
    wide, tall = size
    leave, arrive = _ports(ax, roads, spot, tall, 0), _ports(ax, roads, spot, tall, 1)
    for a, b, at in sorted(roads, key=lambda road: -road[2]["flow"]):
        (xa, _), (xb, _) = spot[a], spot[b]
        colour = OUTCOME_COLOURS.get(b, tone().road)
        style = {"ec": colour, "fc": "none", "alpha": 0.6, "lw": _thickness(at), "zorder": 1, "gid": "road"}
        start, stop = (xa + wide / 2, leave[a, b]), (xb - wide / 2, arrive[a, b])
        if xb > xa:
            bend = 0.45 * (stop[0] - start[0])
            path = Path([start, (start[0] + bend, start[1]), (stop[0] - bend, stop[1]), stop], [1, 4, 4, 4])
            ax.add_patch(PathPatch(path, capstyle="butt", **style))
            continue
        # Back in time or within a column: a bow on the right of the boxes with a head, since left to right does not
        # say where it goes.
        out = xa + wide / 2 + 0.06 + 0.1 * abs(stop[1] - start[1])
        path = Path([start, (out, start[1]), (out, stop[1]), (xb + wide / 2, stop[1])], [1, 4, 4, 4])
        ax.add_patch(FancyArrowPatch(path=path, arrowstyle="-|>", mutation_scale=5 + _thickness(at), **style))


def _thickness(at: dict[str, Any]) -> float:
    return max(0.7, _POINTS * min(at["flow"], 1.0))


def _ports(ax: Any, roads: list[Any], spot: dict[Any, tuple[int, float]], tall: float, end: int) -> dict:
    """Height at which each road leaves (end 0) or enters (end 1) its box, ordered by where it goes or comes from."""
    point = 1.1 / (72 * ax.figure.get_figheight() * ax.get_position().height)
    out: dict[Any, float] = {}
    for node, (_, y) in spot.items():
        mine = sorted((r for r in roads if r[end] == node), key=lambda r: spot[r[1 - end]][1])
        thick = np.array([_thickness(at) for _, _, at in mine])
        scale = point * min(1.0, 0.9 * tall / max(point * thick.sum(), 1e-9))
        for (a, b, _), place in zip(mine, np.cumsum(thick) - thick / 2 - thick.sum() / 2):
            out[a, b] = y + scale * float(place)
    return out


def _draw_box(
    ax: Any,
    at: dict[str, Any],
    node: Any,
    chain: Any,
    place: tuple[int, float],
    size: tuple[float, float],
    words: Any,
    narrow: bool,
) -> None:
    from matplotlib.colors import to_rgb
    from matplotlib.patches import FancyBboxPatch

    (x, y), (wide, tall) = place, size
    harm, ink, edge, below = at["harm"], tone().ink, tone().soft, ""
    if harm is None:
        fill, label = OUTCOME_COLOURS.get(node, tone().stripe), str(node)
        ink, edge = ("white", "none") if node in OUTCOME_COLOURS else (ink, edge)
    else:
        share = 0.55 * float(np.nan_to_num(harm.value))
        fill = tuple(p + share * (c - p) for p, c in zip(to_rgb(tone().paper), to_rgb(HARM)))
        label = state_text(chain.states[node], words)
        gap = "\n" if narrow else "  "
        below = f"{short(harm.value)}{gap}[{short(harm.lower)}, {short(harm.upper)}]"
    style = {"boxstyle": "round,pad=0,rounding_size=0.02", "fc": fill, "ec": edge, "lw": 0.7, "zorder": 3}
    ax.add_patch(FancyBboxPatch((x - wide / 2, y - tall / 2), wide, tall, **style))
    label = plain(label, 9 if narrow else 17)
    text = {"ha": "center", "va": "center", "color": ink, "zorder": 4}
    ax.text(x, y + ((0.3 if narrow else 0.2) * tall if below else 0), label, fontsize=tone().small, **text)
    if below:
        ax.text(x, y - (0.17 if narrow else 0.25) * tall, below, fontsize=tone().tiny, linespacing=1.0, **text)
