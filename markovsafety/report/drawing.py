"""Figures as inline SVG: a frame with axes, and marks that say in words what they show.

Colours and fonts come from the page's style sheet, so that one drawing serves light and dark screens and paper. Every
mark carries its words as a ``<title>``: a browser shows them on hover without any script.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from markupsafe import Markup

__all__ = ["MARKERS", "Frame", "marker", "plain", "ticks"]

MARKERS = {
    "o": "M-4 0a4 4 0 1 0 8 0a4 4 0 1 0-8 0z",
    "O": "M-7 0a7 7 0 1 0 14 0a7 7 0 1 0-14 0z",
    "s": "M-3.7-3.7h7.4v7.4h-7.4z",
    "D": "M0-5.2L5.2 0 0 5.2-5.2 0z",
    "^": "M0-5L4.8 3.8H-4.8z",
    "v": "M0 5L4.8-3.8H-4.8z",
    "P": "M-1.7-4.8h3.4v3.1h3.1v3.4h-3.1v3.1h-3.4v-3.1h-3.1v-3.4h3.1z",
    "X": "M-4.6-2.2L-2.2-4.6 0-2.4 2.2-4.6 4.6-2.2 2.4 0 4.6 2.2 2.2 4.6 0 2.4-2.2 4.6-4.6 2.2-2.4 0z",
    "*": "M0-5.6L1.5-1.9 5.4-1.7 2.4.8 3.4 4.6 0 2.4-3.4 4.6-2.4.8-5.4-1.7-1.5-1.9z",
}
"""Outlines by matplotlib's letters, around (0, 0); O is a large ring."""


def marker(kind: str, colour: str) -> Markup:
    """A marker by itself, for the key of a figure."""
    return Markup('<svg class="key-mark {}" viewBox="-7 -7 14 14" aria-hidden="true"><path d="{}"/></svg>').format(
        colour, MARKERS[kind]
    )


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers from low to high, at most so many."""
    span = max(high - low, 1e-9)
    power = 10.0 ** math.floor(math.log10(span / most))
    step = next(m * power for m in (1, 2, 5, 10, 20) if span / (m * power) <= most)
    return [i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


@dataclass
class Frame:
    """A drawing with a data range, in pixels at its natural size; things are added to it one by one.

    Parameters
    ----------
    wide, tall : float
        Of the whole drawing.
    x, y : (float, float)
        Data range from left to right and from bottom to top.
    left, right, top, bottom : float
        Room for axes.
    """

    wide: float
    tall: float
    x: tuple[float, float]
    y: tuple[float, float] = (0.0, 1.0)
    left: float = 42
    right: float = 10
    top: float = 10
    bottom: float = 40
    parts: list[Markup] = field(default_factory=list)

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Pixels of a point."""
        (x0, x1), (y0, y1) = self.x, self.y
        across = self.left + (x - x0) / (x1 - x0) * (self.wide - self.left - self.right)
        down = self.tall - self.bottom - (y - y0) / (y1 - y0) * (self.tall - self.top - self.bottom)
        return across, down

    def text(self, x: float, y: float, said: str, kind: str = "", anchor: str = "middle") -> None:
        """Words at pixels."""
        self.parts.append(
            Markup('<text x="{:.1f}" y="{:.1f}" class="{}" text-anchor="{}">{}</text>').format(x, y, kind, anchor, said)
        )

    def path(self, points: Sequence[tuple[float, float]], kind: str, shift: float = 0) -> None:
        """A line through data points, moved by pixels to the right; what is not finite breaks it."""
        steps, pen = [], "M"
        for x, y in points:
            if not math.isfinite(y):
                pen = "M"
                continue
            across, down = self.at(x, y)
            steps.append(f"{pen}{across + shift:.1f} {down:.1f}")
            pen = "L"
        self.parts.append(Markup('<path d="{}" class="{}"/>').format("".join(steps), kind))

    def level(self, y: float, kind: str, marks: str = "") -> None:
        """A line from left to right; `marks` is kept as data for the page's script."""
        a, h = self.at(self.x[0], y)
        b, _ = self.at(self.x[1], y)
        said = Markup(' data-level="{}"').format(marks) if marks else ""
        line = '<path d="M{:.1f} {:.1f}H{:.1f}" class="{}"{}/>'
        self.parts.append(Markup(line).format(a, h, b, kind, said))

    def y_axis(self, title: str, most: int = 6) -> None:
        """Grid lines with numbers at the left."""
        for v in ticks(*self.y, most):
            self.level(v, "grid" if abs(v) > 1e-12 else "axis")
            self.text(self.left - 6, self.at(0, v)[1] + 4, f"{v:.3g}".replace("-", "−"), "tick", "end")
        middle = (self.top + self.tall - self.bottom) / 2
        turn = Markup('<text transform="translate(11 {:.1f}) rotate(-90)" text-anchor="middle">{}</text>')
        self.parts.append(turn.format(middle, title))

    def x_axis(self, at: Sequence[tuple[float, str]], title: str, grid: bool = False) -> None:
        """Labels below, left out where they would touch the one before."""
        base, free = self.tall - self.bottom, -math.inf
        for v, label in at:
            x = self.at(v, 0)[0]
            half = 3.6 * len(label)
            if grid:
                line = '<path d="M{:.1f} {:.1f}V{:.1f}" class="grid"/>'
                self.parts.append(Markup(line).format(x, self.top, base))
            if x - half >= free:
                self.text(x, base + 16, label, "tick")
                free = x + half + 3
        self.text((self.left + self.wide - self.right) / 2, self.tall - 5, title)

    def mark(self, said: str, kind: str, *parts: Markup) -> None:
        """A thing that can be pointed at, with its words."""
        body = Markup("").join(parts)
        self.parts.append(Markup('<g class="m {}"><title>{}</title>{}</g>').format(kind, said, body))

    def point(
        self,
        x: float,
        y: tuple[float, float, float],
        said: str,
        kind: str,
        shape: str = "o",
        across: bool = False,
        shift: float = 0,
    ) -> None:
        """Value, lower and upper as a marker on a bar; `across`: the bar lies, x counts rows; shift in pixels."""
        if not all(map(math.isfinite, y)):
            return
        ends = [self.at(v, x) if across else self.at(x, v) for v in y]
        (a, b), (a0, b0), (a1, b1) = [(p, q + shift) if across else (p + shift, q) for p, q in ends]
        bar = Markup('<path class="bar" d="M{:.1f} {:.1f}L{:.1f} {:.1f}"/>').format(a0, b0, a1, b1)
        dot = Markup('<path class="dot" transform="translate({:.1f} {:.1f})" d="{}"/>').format(a, b, MARKERS[shape])
        self.mark(said, kind, bar, dot)

    def box(
        self, x: tuple[float, float], y: tuple[float, float], said: str, kind: str, bar: tuple[float, ...] = ()
    ) -> None:
        """A filled rectangle; `bar`: a vertical interval (lower, upper) through its middle."""
        (a, b), (c, d) = self.at(x[0], y[0]), self.at(x[1], y[1])
        whole = Markup('<path class="box" d="M{:.1f} {:.1f}H{:.1f}V{:.1f}H{:.1f}z"/>').format(a, b, c, d, a)
        parts = [whole]
        if bar and all(map(math.isfinite, bar)):
            top, low = (self.at(0, v)[1] for v in bar)
            parts.append(Markup('<path class="bar" d="M{:.1f} {:.1f}V{:.1f}"/>').format((a + c) / 2, top, low))
        self.mark(said, kind, *parts)

    def svg(self, alt: str, kind: str = "") -> Markup:
        """The drawing, its alternative text said to those who cannot see it."""
        head = Markup(
            '<svg class="{}" viewBox="0 0 {:g} {:g}" style="max-width:{:g}px" role="img" aria-label="{}" '
            'data-y="{:g} {:g} {:g} {:g}">'
        ).format(kind, self.wide, self.tall, self.wide, alt, *self.y, self.tall - self.bottom, self.top)
        return head + Markup("").join(self.parts) + Markup("</svg>")


def plain(said: object, most: int) -> str:
    """Text cut to a length."""
    text = str(said)
    return text if len(text) <= most else text[: most - 1] + "…"
