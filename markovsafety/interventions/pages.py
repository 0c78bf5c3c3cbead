"""Bounds and tables in the Markdown of the room's reports."""

from __future__ import annotations

from collections.abc import Sequence

from ..bound import Bound

__all__ = ["spanned", "table"]


def table(head: Sequence[object], rows: Sequence[Sequence[object]]) -> list[str]:
    """Lines of a table."""
    cells = [[str(c).replace("|", "\\|") for c in row] for row in rows]
    return ["| " + " | ".join(row) + " |" for row in (list(map(str, head)), ["---"] * len(head), *cells)]


def spanned(b: Bound, sign: str = "") -> str:
    """Value and interval; `sign` is that of a format, such as "+"."""
    return f"{b.value:{sign}.3f} [{b.lower:{sign}.3f}, {b.upper:{sign}.3f}]"
