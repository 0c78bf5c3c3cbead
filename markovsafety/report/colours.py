"""The colours of `markovsafety.plot` on a page: as they are where they can be seen, moved until they can where not."""

from __future__ import annotations

from .. import plot

__all__ = ["contrast", "legible", "style"]

PAPER = {"light": "#ffffff", "dark": "#131416"}
GRAPHICS = 3.05  # contrast of lines and marks with the paper: WCAG 2.2, success criterion 1.4.11 asks for 3


def _channels(colour: str) -> list[int]:
    return [int(colour[i : i + 2], 16) for i in (1, 3, 5)]


def _luminance(colour: str) -> float:
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (x / 255 for x in _channels(colour))]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a: str, b: str) -> float:
    """Contrast of two colours as WCAG 2 defines it, from 1 to 21.

    Parameters
    ----------
    a, b : str
        As #rrggbb.
    """
    low, high = sorted((_luminance(a), _luminance(b)))
    return (high + 0.05) / (low + 0.05)


def legible(colour: str, paper: str, least: float = GRAPHICS) -> str:
    """The colour, mixed with black or white (whatever the paper is not) until it stands out from the paper.

    Parameters
    ----------
    colour, paper : str
        As #rrggbb.
    least : float
        Contrast.
    """
    other = 0 if _luminance(paper) > 0.5 else 255
    for step in range(101):
        mixed = "#" + "".join(f"{round(c + (other - c) * step / 100):02x}" for c in _channels(colour))
        if contrast(mixed, paper) >= least:
            return mixed
    return "#000000" if other == 0 else "#ffffff"


def style(sheet: str, models: int) -> str:
    """The style sheet with the colours of outcomes and models, for light and dark screens and for paper."""
    light, dark = (_variables(name, paper, models) for name, paper in PAPER.items())
    said = [f".{name} {{ color: var(--of-{name}); }}" for name in light]
    said.append(f":root {{ --safe: 0 158 115; {_declared(light)} }}")
    said.append(f"@media screen and (prefers-color-scheme: dark) {{ :root {{ {DARK} {_declared(dark)} }} }}")
    return f"{sheet}\n" + "\n".join(said) + "\n"


def _variables(theme: str, paper: str, models: int) -> dict[str, str]:
    """Colours by the class of the marks that have them."""
    with plot.theme(theme):
        looks = plot.palette([str(i) for i in range(models)])
    colours = {**plot.OUTCOME_COLOURS, "grey": "#737373"} | {f"c{i % 8}": c for i, (c, _) in enumerate(looks.values())}
    return {name: legible(colour, paper) for name, colour in colours.items()}


def _declared(colours: dict[str, str]) -> str:
    return " ".join(f"--of-{name}: {colour};" for name, colour in colours.items())


DARK = (
    f"--paper: {PAPER['dark']}; --panel: #1f242a; --ink: #e8eaed; --soft: #a3abb5; --line: #3a4149; --grid: #2a3037; "
    "--link: #7cc0f2; --yes: #4fcfae; --no: #ff9a57; --open: #a3abb5; --over: 240 120 40; --within: 60 160 225;"
)
