"""What a notebook shows for an object on the last line of a cell: small HTML tables, escaped, without scripts.

Colours and fonts are those of the page around them, so that they read on light and on dark ones. Nothing grows with the
object: makers shorten what is long (`few`) before they write it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

__all__ = ["MOST", "few", "short", "shown", "strip"]

MOST = 8  # rows of a table, or parts of a list, that are shown
LONGEST = 48  # characters of one label
LINE = "1px solid rgba(127, 127, 127, .4)"


def short(x: Any, longest: int = LONGEST) -> str:
    """Any object as plain text of bounded length; not yet escaped."""
    text = x if isinstance(x, str) else str(x)
    return text if len(text) <= longest else text[: longest - 1] + "…"


def few(n: int, most: int = MOST) -> tuple[range, str]:
    """The first of n entries that are shown, and what is said of the others (empty if there are none)."""
    return range(min(n, most)), "" if n <= most else f"and {n - most:,} more"


def strip(value: float, lower: float, upper: float, width: int = 120) -> str:
    """A probability on a line from 0 to 1: its interval as a bar, its value as a mark. HTML."""
    x = lambda p: 1 + (width - 2) * min(max(float(p), 0.0), 1.0)  # noqa: E731
    a, b = x(lower), x(upper)
    return (
        f'<svg width="{width}" height="12" viewBox="0 0 {width} 12" role="img" aria-label="from 0 to 1">'
        f'<path d="M1 6H{width - 1}M1 3V9M{width - 1} 3V9" stroke="currentColor" stroke-opacity=".4" fill="none"/>'
        f'<rect x="{a:.1f}" y="3" width="{max(b - a, 1):.1f}" height="6" fill="#D55E00" fill-opacity=".6"/>'
        f'<path d="M{x(value):.1f} 0V12" stroke="currentColor" stroke-width="2"/></svg>'
    )


def shown(
    title: str,
    rows: Iterable[Sequence[Any]] = (),
    *,
    head: Sequence[Any] = (),
    notes: Iterable[str] = (),
    picture: str = "",
    shades: Sequence[Sequence[float]] | None = None,
) -> str:
    """A title, a table and small print as HTML.

    Parameters
    ----------
    title : str
    rows : iterable of sequences
        Cells; the first of a row names it.
    head : sequence, optional
        Names of the columns.
    notes : iterable of str
        A line each below the table; empty ones are left out.
    picture : str
        HTML of this module (`strip`) that stands behind the title; everything else is escaped.
    shades : sequence of sequences of float, optional
        Of every cell but the first of each row, in [0, 1]: how dark it is; nan leaves it blank.

    Returns
    -------
    str
    """
    cell = f"border: none; border-bottom: {LINE}; padding: .15em .7em; background: none; color: inherit; "
    cell += "white-space: nowrap;"
    lines = [f'<div style="color: inherit; overflow-x: auto"><b>{escape(title)}</b> {picture}']
    body = list(rows)
    if body or head:
        lines.append('<table style="border-collapse: collapse; color: inherit; background: none; margin: .3em 0">')
        if head:
            names = "".join(f'<th scope="col" style="{cell} text-align: right">{escape(short(h))}</th>' for h in head)
            lines.append(f"<thead><tr>{names}</tr></thead>")
        lines.append("<tbody>")
        for i, (name, *cells) in enumerate(body):
            first = f'<th scope="row" style="{cell} text-align: left; font-weight: normal">{escape(short(name))}</th>'
            rest = "".join(
                f'<td style="{cell} {_shade(shades, i, j)}text-align: right">{escape(short(c))}</td>'
                for j, c in enumerate(cells)
            )
            lines.append(f"<tr>{first}{rest}</tr>")
        lines.append("</tbody></table>")
    small = "".join(f'<div style="font-size: 90%; opacity: .8">{escape(note)}</div>' for note in notes if note)
    return "".join([*lines, small, "</div>"])


def _shade(shades: Sequence[Sequence[float]] | None, i: int, j: int) -> str:
    if shades is None or not shades[i][j] >= 0:
        return ""
    return f"background: rgba(213, 94, 0, {0.45 * min(shades[i][j], 1.0):.2f}); "
