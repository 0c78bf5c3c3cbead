"""Looks of the same figures: on light and dark screens, in print; for a column, a page, a slide.

Outcomes have one colour everywhere. Models take theirs from a palette for each background in which any two differ,
also for eyes without one of the three kinds of cones (tests/test_plot_themes.py measures that with the simulation of
G. M. Machado, M. M. Oliveira and L. A. F. Fernandes, IEEE TVCG 15 (2009) 1291).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from ..errors import InputError

__all__ = ["SIZES", "theme"]

SIZES: Mapping[str, tuple[float, float, float]] = MappingProxyType(
    {"screen": (8.0, 4.2, 9.5), "column": (3.35, 2.5, 7.5), "page": (7.0, 3.6, 8.5), "slide": (8.0, 4.5, 12.0)}
)
"""Width and height in inches, and the size of the text in points: on a screen, in one column of a paper (85 mm), over
a whole page (178 mm), on a slide of 16:9."""
SMALLEST = 6.0  # points, of any text at its final size


@dataclass(frozen=True)
class Look:
    """What differs between the themes; every other colour is the same in all."""

    name: str
    paper: str
    ink: str
    soft: str
    grid: str
    stripe: str
    gap: str  # hatches where there is nothing
    road: str
    strong: str
    models: tuple[str, ...]
    harm_ramp: tuple[str, ...]
    budget_ramp: tuple[str, ...]
    order_ramp: tuple[str, ...]
    refusal_ramp: tuple[str, ...]
    head_ramp: tuple[str, ...]
    middle: str
    hatches: Mapping[str, str]
    size: str = "screen"

    @property
    def font(self) -> float:
        """Points."""
        return SIZES[self.size][2]

    @property
    def small(self) -> float:
        """Points, of what explains."""
        return max(SMALLEST, 8.5 / 9.5 * self.font)

    @property
    def tiny(self) -> float:
        """Points, of numbers in cells and boxes."""
        return max(SMALLEST, 6.5 / 9.5 * self.font)

    def fitted(self, wide: float, tall: float) -> tuple[float, float]:
        """Width and height in inches of a figure that has these on a screen."""
        if self.size == "screen":
            return wide, tall
        width, height, font = SIZES[self.size]
        return width, min(tall * font / 9.5, max(height, tall * width / wide))


LIGHT = Look(
    name="light",
    paper="#FFFFFF",
    ink="#333333",
    soft="#6B6B6B",
    grid="#E8E8E8",
    stripe="#F5F5F5",
    gap="#BBBBBB",
    road="#9FACB8",
    strong="#000000",
    models=("#4D4D4D", "#C4348A", "#3894B8", "#E09B00", "#3B25BF", "#8C510A", "#AE9758", "#2B1666"),
    harm_ramp=("#FFFFFF", "#FDEBD8", "#F9C99A", "#EC9A55", "#C65300", "#7A3000"),
    budget_ramp=("#5BA3D0", "#9CC8E5", "#D9EAF5", "#FFFFFF", "#FEEBD3", "#F7BA80", "#C65300"),
    order_ramp=("#E09B00", "#C4348A", "#5B3FA0", "#15284B"),
    refusal_ramp=("#CFE5F3", "#5BA3D0", "#0072B2", "#08304F"),
    head_ramp=("#F7F7F7", "#E3A0C8", "#7A1F5C"),
    middle="#F7F7F7",
    hatches=MappingProxyType({}),
)
DARK = Look(
    name="dark",
    paper="#131416",
    ink="#E6E6E6",
    soft="#A3A6AB",
    grid="#33373D",
    stripe="#1B1D21",
    gap="#565B63",
    road="#69737E",
    strong="#FFFFFF",
    models=("#C9C9C9", "#E86FB8", "#B8DEFF", "#F0B429", "#A48AE8", "#B67141", "#76DB76", "#3B57DB"),
    harm_ramp=("#131416", "#36271B", "#6E431C", "#B4621A", "#F09A55", "#FDE3C8"),
    budget_ramp=("#4A9BD0", "#2F658A", "#1F3C52", "#1B1E22", "#46301B", "#8F531D", "#EE7F2D"),
    order_ramp=("#F0B429", "#E86FB8", "#A48AE8", "#DCE6FF"),
    refusal_ramp=("#24506E", "#3C9BD6", "#8CCBF0", "#E4F3FD"),
    head_ramp=("#23262B", "#8A3A6E", "#F29CD2"),
    middle="#2A2D33",
    hatches=MappingProxyType({}),
)
PRINT = replace(
    LIGHT,
    name="print",
    ink="#000000",
    soft="#4D4D4D",
    grid="#D5D5D5",
    gap="#8C8C8C",
    hatches=MappingProxyType({"harm": "////", "benign": "....", "truncated": "xxxx"}),
)
LOOKS: Mapping[str, Look] = MappingProxyType({look.name: look for look in (LIGHT, DARK, PRINT)})
_LOOK: ContextVar[Look] = ContextVar("look", default=LIGHT)


def tone() -> Look:
    """The look in which is being drawn."""
    return _LOOK.get()


@contextmanager
def drawn_in(look: Look) -> Iterator[None]:
    """Draw in a look, until the block ends."""
    token = _LOOK.set(look)
    try:
        yield
    finally:
        _LOOK.reset(token)


@contextmanager
def theme(name: str = "light", size: str = "screen") -> Iterator[None]:
    """Draw figures in another look, until the block ends; a figure keeps the look it was made in.

    Parameters
    ----------
    name : {"light", "dark", "print"}
        Of a white screen, of a dark one, or black on paper, where outcomes are hatched as well as coloured.
    size : {"screen", "column", "page", "slide"}
        Where the figure is to stand: 85 mm, 178 mm, or 16:9. No text is smaller than 6 points then.

    Raises
    ------
    InputError
        There is no such theme or size.

    Examples
    --------
    >>> with ms.plot.theme("print", size="column"):
    ...     ax = ms.plot.depth({0: ms.Bound(0.02, 0.01, 0.04), 5: ms.Bound(0.6, 0.5, 0.7)})
    >>> float(ax.figure.get_figwidth())
    3.35
    """
    with drawn_in(named(name, size)):
        yield


def named(name: str, size: str) -> Look:
    """The look of these names."""
    for what, given, known in (("theme", name, LOOKS), ("size", size, SIZES)):
        if given not in known:
            raise InputError(
                f"There is no {what} {given!r}.", cause=f"There are {', '.join(known)}.", next="Use one of these."
            )
    return replace(LOOKS[name], size=size)


def settings(look: Look) -> dict[str, Any]:
    """Settings of matplotlib."""
    return {
        "font.family": "sans-serif",
        "font.sans-serif": ["DejaVu Sans"],
        "font.size": look.font,
        "axes.labelsize": look.font,
        "axes.titlesize": 10 / 9.5 * look.font,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.titlecolor": look.ink,
        "axes.edgecolor": look.soft,
        "axes.facecolor": look.paper,
        "axes.linewidth": 0.8,
        "axes.labelcolor": look.ink,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.axisbelow": True,
        "text.color": look.ink,
        "xtick.color": look.ink,
        "ytick.color": look.ink,
        "xtick.labelsize": look.font,
        "ytick.labelsize": look.font,
        "grid.color": look.grid,
        "grid.linewidth": 0.8,
        "legend.frameon": False,
        "legend.fontsize": look.small,
        "legend.title_fontsize": look.small,
        "hatch.linewidth": 0.6,
    }
