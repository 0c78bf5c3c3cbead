"""The figures of the page, made from an analysis: drawings, what they say in words, and their data as CSV."""

from __future__ import annotations

import csv
import io
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

import numpy as np
from markupsafe import Markup

from .. import plot
from ..analysis import ALL, Analysis
from ..bound import Bound
from ..files import inert
from ..outcomes import OUTCOMES
from .drawing import Frame, marker, plain, ticks
from .words import cell, forced, number, text

__all__ = ["Figure", "figures"]

WIDE, NARROW, PANEL = 860, 360, 430  # natural widths in pixels: a screen, a phone, one of two columns
ENDS = ("value", "lower", "upper")
SAID = "probability of harm"
FORCED = "forced tokens"
SITUATIONS = (("harm hollow", "o"), ("harm", "^"), ("harm", "s"))  # not forced, one token, all of them
STACKED = ("harm", "truncated", "benign", "refusal")


@dataclass(frozen=True)
class Figure:
    """One figure of the page.

    Parameters
    ----------
    panels : sequence of (str, Markup)
        Title and drawing; the title of a figure of one panel is empty.
    rows : sequence of sequences
        Its data; the first row names the columns.
    key : sequence of (Markup, str)
        Symbols and what they mean.
    """

    panels: Sequence[tuple[str, Markup]]
    rows: Sequence[Sequence[Any]]
    key: Sequence[tuple[Markup, str]] = ()

    @property
    def csv(self) -> str:
        """The data as the address of a file to download."""
        out = io.StringIO()
        csv.writer(out, lineterminator="\n").writerows([_cell(x) for x in row] for row in self.rows)
        return "data:text/csv;charset=utf-8," + quote(out.getvalue(), errors="backslashreplace")


def _cell(x: Any) -> Any:
    """Texts that no spreadsheet takes for a formula; numbers in full."""
    if isinstance(x, str):
        return inert(x)
    return "" if x is None else repr(x.item() if isinstance(x, np.generic) else x)


def figures(analyses: Sequence[Analysis], budget: float) -> dict[str, Figure]:
    """All figures that the data allow, by name.

    Parameters
    ----------
    analyses : sequence of Analysis
    budget : float
        Of the dashed line.
    """
    looks = {
        name: (f"c{i % 8}", look[1]) for i, (name, look) in enumerate(plot.palette([a.name for a in analyses]).items())
    }
    found: dict[str, Figure | None] = {
        "depth": _depth(analyses, looks, budget),
        "outcomes": _outcomes(analyses),
        "branch": _branch(analyses, looks),
        "categories": _categories(analyses),
        "strikes": _strikes(analyses),
        "predicted": _predicted(analyses, looks),
        "check": _check(analyses),
    }
    return {name: figure for name, figure in found.items() if figure is not None}


def _both(draw: Callable[[float, float], Frame], alt: str, tall: tuple[float, float]) -> Markup:
    """One drawing twice: as wide as a screen and as wide as a phone; the style sheet shows one of them."""
    return draw(WIDE, tall[0]).svg(alt, "wide") + draw(NARROW, tall[1]).svg(alt, "narrow")


def _top(*values: float) -> float:
    """Upper end of an axis that starts at 0."""
    known = [v for v in values if np.isfinite(v)]
    return min(1.0, 1.08 * max([0.02, *known]))


def _ends(b: Bound) -> tuple[float, float, float]:
    return float(b.value), float(b.lower), float(b.upper)


def _span(depths: Iterable[float]) -> tuple[float, float]:
    """A range that holds the depths, with a margin."""
    k = sorted(depths)
    edge = 0.035 * max(k[-1] - k[0], 1)
    return k[0] - edge, k[-1] + edge


def _shifts(n: int, frame: Frame, depths: Sequence[float]) -> list[float]:
    """How far each of n series is moved so that bars at one depth do not hide each other, in pixels."""
    near = min((b - a for a, b in itertools.pairwise(depths)), default=1)
    room = 0.26 * (frame.at(near, 0)[0] - frame.at(0, 0)[0])
    return [0.0] if n == 1 else np.linspace(-1, 1, n).__mul__(min(room, 3.5 * (n - 1))).tolist()


def _profile(
    frame: Frame, named: Mapping[str, Mapping[int, Bound]], looks: Mapping[str, Any], told: Callable[[str, int], str]
) -> dict[str, float]:
    """Points of several models by depth with their bars; returns how far each model was moved."""
    depths = sorted({k for row in named.values() for k in row})
    moved = dict(zip(named, _shifts(len(named), frame, depths)))
    for name, row in named.items():
        colour, shape = looks[name]
        for k, b in row.items():
            frame.point(k, _ends(b), told(name, k), colour, shape, shift=moved[name])
    return moved


def _labels(depths: Iterable[int]) -> list[tuple[float, str]]:
    return [(k, str(k)) for k in depths]


def _extremes(row: Mapping[int, Bound]) -> str:
    """The first and the largest value of a profile in words."""
    first, top = min(row), max(row, key=lambda k: row[k].value)
    at = f"{text(row[first])} after {forced(first)}"
    return at if top == first else f"{at}, highest {text(row[top])} after {forced(top)}"


def _depth(analyses: Sequence[Analysis], looks: Mapping[str, Any], budget: float) -> Figure:
    named = {a.name: a.harm[ALL] for a in analyses}
    truth = {a.name: a.truth[ALL] for a in analyses if ALL in a.truth}
    depths = sorted({k for row in named.values() for k in row})
    top = _top(1.3 * budget, *(b.upper for row in named.values() for b in row.values()))

    def said(name: str, k: int) -> str:
        exact = f", planted {number(truth[name][k])}" if k in truth.get(name, {}) else ""
        return f"{name}, {forced(k)}: {text(named[name][k])}{exact}"

    def draw(wide: float, tall: float) -> Frame:
        frame = Frame(wide, tall, _span(depths), (0, top))
        frame.y_axis(SAID)
        frame.x_axis(_labels(depths), FORCED)
        moves = dict(zip(named, _shifts(len(named), frame, depths)))
        for name, row in named.items():
            line = truth.get(name) or {k: b.value for k, b in row.items()}
            frame.path(sorted(line.items()), f"line {looks[name][0]}", moves[name])
        frame.level(budget, "budget", "budget")
        _profile(frame, named, looks, said)
        return frame

    alt = f"{SAID.capitalize()} by forced tokens. " + ". ".join(f"{n}: {_extremes(row)}" for n, row in named.items())
    rows: list[tuple[Any, ...]] = [("model", "forced_tokens", *ENDS, "level", "planted")]
    rows += [(n, k, *_ends(b), b.level, truth.get(n, {}).get(k)) for n, row in named.items() for k, b in row.items()]
    key = [(marker(shape, colour), name) for name, (colour, shape) in looks.items()]
    return Figure([("", _both(draw, alt + ".", (360, 300)))], rows, key)


def _branch(analyses: Sequence[Analysis], looks: Mapping[str, Any]) -> Figure | None:
    found = {a.name: a.branch for a in analyses if a.branch is not None}
    named: dict[str, dict[int, Bound]] = {}
    for name, branch in found.items():
        row = {int(k): branch.rho[i] for i, k in enumerate(branch.k)}
        # An interval that reaches 1 says nothing.
        row = {k: b for k, b in row.items() if np.isfinite(b.value) and (b.upper < 1 or b.upper == b.lower)}
        named |= {name: row} if row else {}
    if not named:
        return None
    depths = sorted({k for row in named.values() for k in row})
    ends = [v for row in named.values() for b in row.values() for v in (b.lower, b.upper)]

    def draw(wide: float, tall: float) -> Frame:
        frame = Frame(wide, tall, _span(depths), (min(0.0, 1.08 * min(ends)), _top(*ends)))
        frame.y_axis("branch correlation ρ", 4)
        frame.x_axis(_labels(depths), FORCED)
        _profile(frame, named, looks, lambda name, k: f"{name}, {forced(k)}: ρ = {text(named[name][k])}")
        return frame

    alt = "Correlation of answers that share their first tokens. "
    alt += ". ".join(f"{name}: {_extremes(row)}" for name, row in named.items())
    rows: list[tuple[Any, ...]] = [("model", "forced_tokens", *ENDS, "level")]
    rows += [(name, k, *_ends(b), b.level) for name, row in named.items() for k, b in row.items()]
    key = [(marker(looks[name][1], looks[name][0]), name) for name in named]
    return Figure([("", _both(draw, alt + ".", (230, 220)))], rows, key)


def _outcomes(analyses: Sequence[Analysis]) -> Figure:
    panels: list[tuple[str, Markup]] = []
    rows: list[tuple[Any, ...]] = [("model", "forced_tokens", "outcome", *ENDS, "level")]
    for a in analyses:
        depths = list(a.depths)
        frame = Frame(PANEL, 220, (-0.5, len(depths) - 0.5))
        frame.y_axis("share of answers", 5)
        frame.x_axis([(i, str(k)) for i, k in enumerate(depths)], FORCED)
        for i, k in enumerate(depths):
            base = 0.0
            for name in STACKED:
                b = a.shares[k][name]
                tall = float(np.nan_to_num(b.value))
                ends = {"harm": (b.lower, b.upper), "refusal": (1 - b.upper, 1 - b.lower)}.get(name, ())
                if tall:
                    said = f"{a.name}, {forced(k)}: {name} {text(b)}"
                    frame.box((i - 0.42, i + 0.42), (base, base + tall), said, name, tuple(map(float, ends)))
                base += tall
            rows += [(a.name, k, name, *_ends(a.shares[k][name]), a.shares[k][name].level) for name in OUTCOMES]
        first, last = (a.shares[k] for k in (depths[0], depths[-1]))
        alt = f"{a.name}: " + "; ".join(
            f"after {forced(k)} {', '.join(f'{name} {text(row[name])}' for name in OUTCOMES if row[name].value > 0)}"
            for k, row in {depths[0]: first, depths[-1]: last}.items()
        )
        panels.append((a.name, frame.svg(f"{alt}.")))
    seen = [name for name in STACKED if any(row[name].value > 0 for a in analyses for row in a.shares.values())]
    return Figure(panels, rows, [(marker("s", name), name) for name in seen])


def _categories(analyses: Sequence[Analysis]) -> Figure | None:
    found = [a for a in analyses if a.categories]
    if not found:
        return None
    shown = {a.name: sorted({a.depths[0], a.depths[-1], *(k for k in a.depths if k == 1)}) for a in found}
    values = [a.harm[c][k] for a in found for c in a.harm for k in shown[a.name] if k in a.harm[c]]
    top = _top(*(b.upper for b in values), *(v for a in found for row in a.truth.values() for v in row.values()))
    panels: list[tuple[str, Markup]] = []
    rows: list[tuple[Any, ...]] = [("model", "category", "forced_tokens", *ENDS, "level", "planted")]
    for a in found:
        names = list(a.harm)
        long = min(150, 12 + 6.4 * max(len(plain(c, 22)) for c in names))
        frame = Frame(PANEL, 52 + 40 * len(names), (0, top), (len(names) - 0.4, -0.6), left=long)
        frame.x_axis([(v, f"{v:.3g}") for v in ticks(0, top, 5)], SAID, grid=True)
        for i, category in enumerate(names):
            frame.text(long - 8, frame.at(0, i)[1] + 4, plain(category, 22), "tick", "end")
            for n, k in enumerate(shown[a.name]):
                if k not in a.harm[category]:
                    continue
                b, exact = a.harm[category][k], a.truth.get(category, {}).get(k)
                known = "" if exact is None else f", planted {number(exact)}"
                said = f"{a.name}, {category}, {forced(k)}: {text(b)}{known}"
                lift = 11.0 * (n - (len(shown[a.name]) - 1) / 2)
                if exact is not None:
                    x, y = frame.at(exact, i)
                    line = '<path class="planted" d="M{:.1f} {:.1f}v11"/>'
                    frame.parts.append(Markup(line).format(x, y + lift - 5.5))
                frame.point(i, _ends(b), said, SITUATIONS[n][0], SITUATIONS[n][1], across=True, shift=lift)
        rows += [
            (a.name, c, k, *_ends(b), b.level, a.truth.get(c, {}).get(k)) for c in names for k, b in a.harm[c].items()
        ]
        panels.append((a.name, frame.svg(_worst(a, shown[a.name]))))
    key = []
    for n, (colour, shape) in enumerate(SITUATIONS[: max(map(len, shown.values()))]):
        meant = sorted({ks[n] for ks in shown.values() if n < len(ks)})  # models may be measured at different depths
        key.append((marker(shape, colour), " or ".join(map(_unforced, meant))))
    return Figure(panels, rows, key)


def _unforced(k: int) -> str:
    return "not forced" if k == 0 else f"{k} forced"


def _worst(a: Analysis, depths: Sequence[int]) -> str:
    """The categories with the least and the most harm, in words."""
    parts = []
    for k in depths:
        row = {c: a.harm[c][k] for c in a.categories if k in a.harm[c]}
        if row:
            most, least = max(row, key=lambda c: row[c].value), min(row, key=lambda c: row[c].value)
            parts.append(
                f"{_unforced(k)}, most harm in {most}, {text(row[most])}, least in {least}, {text(row[least])}"
            )
    return f"{a.name}: {'; '.join(parts)}."


def _strikes(analyses: Sequence[Analysis]) -> Figure | None:
    found = [a for a in analyses if a.strikes]
    if not found:
        return None
    last = max(stop for a in found for _, stop in a.strikes)
    panels: list[tuple[str, Markup]] = []
    rows: list[tuple[Any, ...]] = [("model", "forced_tokens", "first_position", "last_position", *ENDS, "level")]
    for a in found:
        frame = Frame(PANEL, 190, (0, last), (0, _top(*(b.upper for b in a.strikes.values()))))
        frame.y_axis(SAID, 4)
        frame.x_axis([(v, f"{v:g}") for v in ticks(0, last, 5) if v == int(v)], "position of the first harmful token")
        for (start, stop), b in a.strikes.items():
            where = f"token {start}" if stop == start + 1 else f"tokens {start} to {stop - 1}"
            frame.box((start, stop), (0, float(b.value)), f"{a.name}, {where}: {text(b)}", "harm", (b.lower, b.upper))
        rows += [(a.name, a.strikes_at, s, t - 1, *_ends(b), b.level) for (s, t), b in a.strikes.items()]
        (start, stop), top = max(a.strikes.items(), key=lambda item: item[1].value)
        alt = f"{a.name}, {forced(a.strikes_at)}: harm strikes most often at tokens {start} to {stop - 1}, {text(top)}."
        panels.append((a.name, frame.svg(alt)))
    return Figure(panels, rows)


def _predicted(analyses: Sequence[Analysis], looks: Mapping[str, Any]) -> Figure | None:
    found = [(a, a.check) for a in analyses if a.check is not None]
    panels: list[tuple[str, Markup]] = []
    rows: list[tuple[Any, ...]] = [("model", "forced_tokens", *ENDS, *(f"predicted_{end}" for end in ENDS), "level")]
    for a, check in found:
        depths, colour = list(a.unseen), looks[a.name][0]
        both = [*a.unseen.values(), *a.predicted.values()]
        frame = Frame(PANEL, 220, _span(depths), (0, _top(*(b.upper for b in both))))
        frame.y_axis(SAID, 5)
        frame.x_axis(_labels(depths), FORCED)
        for k in depths:
            said = f"{a.name}, {forced(k)}: predicted {text(a.predicted[k])}, measured {text(a.unseen[k])}"
            frame.point(k, _ends(a.predicted[k]), said, f"ring {colour}", "O")
            frame.point(k, _ends(a.unseen[k]), said, colour)
            rows.append((a.name, k, *_ends(a.unseen[k]), *_ends(a.predicted[k]), check.level))
        said = {True: "fair", False: "not fair", None: "cannot tell"}[check.passed]
        panels.append((a.name, frame.svg(f"{a.name}: {said}. {check.verdict}")))
    key = [(marker("o", "ring c0"), "predicted by the chain"), (marker("o", "c0"), "measured")]
    return Figure(panels, rows, key) if found else None


def _check(analyses: Sequence[Analysis]) -> Figure | None:
    found = [(a, a.check) for a in analyses if a.check is not None]
    names = ("difference", "difference_lower", "difference_upper")
    kinds = {
        "within": ("benign", "o"),
        "off": ("harm", "X"),
        "cannot tell": ("grey", "D"),
        "not counted": ("grey", "s"),
    }
    panels: list[tuple[str, Markup]] = []
    rows: list[tuple[Any, ...]] = [("model", "forced_tokens", *names, "margin", "verdict")]
    for a, check in found:
        table, margin = check.table, check.margin
        known = [r[n] for r in table for n in names if np.isfinite(r[n])]
        low, high = min([-1.5 * margin, *known]), max([1.5 * margin, *known])
        frame = Frame(PANEL, 200, (-0.5, len(table) - 0.5), (1.06 * low, 1.06 * high), left=54)
        (x0, y0), (x1, y1) = frame.at(-0.5, margin), frame.at(len(table) - 0.5, -margin)
        band = '<path class="band" d="M{:.1f} {:.1f}H{:.1f}V{:.1f}H{:.1f}z"/>'
        frame.parts.append(Markup(band).format(x0, y0, x1, y1, x0))
        frame.y_axis("predicted − measured", 5)
        frame.x_axis([(i, str(r["k"])) for i, r in enumerate(table)], FORCED)
        for i, r in enumerate(table):
            colour, shape = kinds[r["verdict"]]
            said = f"{a.name}, {forced(r['k'])}: {cell(*(r[n] for n in names))}, {r['verdict']}"
            value, lower, upper = (float(r[n]) for n in names)
            frame.point(i, (value, lower, upper), said, colour, shape)
            rows.append((a.name, r["k"], *(r[n] for n in names), margin, r["verdict"]))
        count = {v: sum(r["verdict"] == v for r in table) for v in kinds}
        alt = ", ".join(f"{n} {v}" for v, n in count.items() if n)
        panels.append((a.name, frame.svg(f"{a.name}: of {len(table)} depths {alt}, margin {margin:g}.")))
    seen = {r["verdict"] for _, check in found for r in check.table}
    words = {"within": "within the margin"}
    key = [(marker(shape, colour), words.get(v, v)) for v, (colour, shape) in kinds.items() if v in seen]
    return Figure(panels, rows, key) if found else None
