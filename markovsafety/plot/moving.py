"""Where a moving picture puts its bubbles, roads and tanks, and how they change from frame to frame."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from typing import Any

import networkx as nx
import numpy as np
from numpy.typing import NDArray

from ..bound import Bound
from .roads import placed
from .style import HARM, OUTCOME_COLOURS, short, spread
from .themes import LOOKS, tone

__all__ = ["drawing"]

WIDE, TALL = 940, 430  # units of the drawing
LEFT, RIGHT, TOP, BOTTOM = 70.0, 610.0, 70.0, 320.0  # middles of the bubbles
LARGEST = 46.0  # radius of a bubble that holds everything
BROADEST = 30.0  # width of a road that everything takes
TANK = (722.0, 64.0)  # left edge and width
SLIGHT = 0.004  # roads that never carry more are not drawn
REST = 2.5  # seconds on the last frame


def drawing(
    graph: nx.DiGraph,
    nodes: Sequence[Any],
    places: Sequence[str],
    ends: Mapping[str, int],
    mass: NDArray,
    passages: NDArray,
    harm: Bound,
    target: str,
    pace: float,
) -> str:
    """The picture as HTML, named by what it shows."""
    import jinja2

    mark = "mf" + hashlib.blake2b(mass.tobytes() + repr((places, pace)).encode(), digest_size=5).hexdigest()
    spots = _spots(graph, nodes, ends, len(places))
    tanks = _tanks(ends)
    frames = [i * pace for i in range(len(mass))]
    whole = frames[-1] + REST
    moves: list[str] = []

    def keyed(change: Callable[[float], str], values: NDArray, at: Sequence[float], held: bool = False) -> int:
        moves.append(_keyframes(f"{mark}-{len(moves)}", change, values, at, whole, held))
        return len(moves) - 1

    area = lambda x: f"transform:scale({np.sqrt(max(x, 0.0)):.5g})"  # noqa: E731
    level = lambda x: f"transform:scaleY({max(x, 0.0):.5g})"  # noqa: E731
    broad = lambda x: f"stroke-width:{BROADEST * x:.4g}px"  # noqa: E731
    bubbles = []
    for i, (x, y) in spots.items():
        risk = graph.nodes[nodes[i]]["harm"] if i < len(nodes) else None
        share = 0.0 if risk is None else float(np.nan_to_num(risk.value))
        move = keyed(area, mass[:, i], frames)
        bubbles.append({"x": x, "y": y, "risk": round(100 * share), "text": places[i][:18], "move": move})
    roads = []
    middles = [t + pace / 2 for t in frames[:-1]]
    for a, b in np.argwhere(passages.max(axis=0) > SLIGHT):
        if a != b and not (a in ends.values() and b in ends.values()):
            road = _road(a, b, spots, {i: tanks[n] for n, i in ends.items()})
            colour = next((n for n, i in ends.items() if i == b), "")
            roads.append(road | {"colour": colour, "move": keyed(broad, passages[:, a, b], middles)})
    outcomes = []
    for name, i in ends.items():
        top, tall = tanks[name]
        one = {"name": name, "top": top, "tall": tall, "move": keyed(level, mass[:, i], frames)}
        outcomes.append(one | {"values": [f"{x:.3f}" for x in mass[:, i]], "mark": None})
        if name == target:
            ends_at = [top + tall * (1 - float(x)) for x in (harm.upper, harm.value, harm.lower)]
            outcomes[-1]["mark"] = ends_at
    turn = keyed(lambda k: f"transform:translateY({-28 * k:g}px)", np.arange(len(mass)), frames, held=True)
    text = resources.files("markovsafety.plot").joinpath("flow.html.jinja").read_text("utf-8")
    env = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    known = harm.upper - harm.lower < 1e-6
    told = "(exact)" if known else f"[{short(float(harm.lower))}, {short(float(harm.upper))}]"
    told = f"{short(float(harm.value))} {told}"
    return env.from_string(text).render(
        mark=mark,
        wide=WIDE,
        tall=TALL,
        tank=TANK,
        largest=LARGEST,
        bubbles=bubbles,
        roads=sorted(roads, key=lambda r: r["colour"] != ""),
        outcomes=outcomes,
        colours=OUTCOME_COLOURS,
        harm=HARM,
        moves="\n".join(moves),
        turn=turn,
        tokens=len(mass) - 1,
        pace=pace,
        whole=whole,
        target=target,
        told=told,
        light=LOOKS["light"],
        dark=LOOKS["dark"],
        base=LOOKS["dark"] if tone().name == "dark" else LOOKS["light"],
        last=", ".join(f"{n} {mass[-1, i]:.3f}" for n, i in ends.items()),
    )


def _spots(
    graph: nx.DiGraph, nodes: Sequence[Any], ends: Mapping[str, int], many: int
) -> dict[int, tuple[float, float]]:
    """Middles of the bubbles: left to right in time, up towards harm; what is not shown at the foot."""
    index = {node: i for i, node in enumerate(nodes)}
    columns = [c for c in placed(graph) if c[0] not in ends]
    spots: dict[int, tuple[float, float]] = {}
    for k, column in enumerate(columns):
        x = round(LEFT + (RIGHT - LEFT) * (k / (len(columns) - 1) if len(columns) > 1 else 0.2), 1)
        up = spread([graph.nodes[n]["height"] for n in column], 0.27, 0.0, 1.0)
        spots |= {
            index[node]: (round(x, 1), round(BOTTOM - (BOTTOM - TOP) * float(y), 1)) for node, y in zip(column, up)
        }
    if many > len(nodes):
        spots[many - 1] = ((LEFT + RIGHT) / 2, TALL - 36.0)
    return spots


def _tanks(ends: Mapping[str, int]) -> dict[str, tuple[float, float]]:
    """Top and height of each tank, harm above, refusal below."""
    order = {"harm": 0, "truncated": 1, "benign": 2, "refusal": 3}
    names = sorted(ends, key=lambda n: order.get(n, 1.5))
    room = (TALL - 40.0) / max(len(names), 1)
    tall = min(110.0, room - 16)
    return {name: (24 + room * i + (room - 16 - tall) / 2, tall) for i, name in enumerate(names)}


def _road(a: int, b: int, spots: Mapping[int, tuple[float, float]], tanks: Mapping[int, tuple[float, float]]) -> dict:
    """The way from one place to another; back in time it bows and is dashed."""
    (xa, ya), (xb, yb) = (
        spots[i] if i in spots else (TANK[0] + (0 if i == b else TANK[1]), tanks[i][0] + tanks[i][1] / 2)
        for i in (a, b)
    )
    if xb > xa + 1:
        bend = 0.5 * (xb - xa)
        return {"d": f"M{xa:g} {ya:g}C{xa + bend:g} {ya:g} {xb - bend:g} {yb:g} {xb:g} {yb:g}", "back": False}
    low = max(ya, yb) + 50 + 0.12 * abs(xa - xb)
    return {"d": f"M{xa:g} {ya:g}C{xa + 40:g} {low:g} {xb - 40:g} {low:g} {xb:g} {yb:g}", "back": True}


def _keyframes(
    name: str, change: Callable[[float], str], values: NDArray, at: Sequence[float], whole: float, held: bool
) -> str:
    """A rule of CSS: what changes, and when, in percent of the whole; frames between two equal ones are left out."""
    said = [change(float(v)) for v in values]
    kept = [i for i in range(len(said)) if held or i in (0, len(said) - 1) or not said[i - 1] == said[i] == said[i + 1]]
    stops = [f"{100 * at[i] / whole:.4g}%{{{said[i]}}}" for i in kept]
    return f"@keyframes {name}{{0%{{{said[0]}}}{''.join(stops)}100%{{{said[-1]}}}}}"
