"""The figures of `markovsafety.plot` that belong to a report: PNG files for slides, and the chains for the page."""

from __future__ import annotations

import io
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .. import plot
from ..analysis import ALL, Analysis
from ..plot.style import unshown
from .figures import Figure

__all__ = ["Picture", "chains", "pictures"]

DPI = 130


def pictures(analyses: Sequence[Analysis]) -> dict[str, bytes]:
    """PNG files of all figures that the data allow, by name; equal data give equal bytes."""
    found = {}
    with unshown():
        for name, drawn in _figures(analyses):
            fig = drawn.flat[0].figure if isinstance(drawn, np.ndarray) else drawn
            buffer = io.BytesIO()
            fig.savefig(buffer, format="png", dpi=DPI, metadata={"Software": "markovsafety"})
            found[name] = buffer.getvalue()
    return found


class Picture(NamedTuple):
    """A chain drawn for a light and for a dark screen, as SVG; its numbers as the address of a file to download."""

    svg: dict[str, bytes]
    csv: str


def chains(analyses: Sequence[Analysis]) -> dict[str, Picture]:
    """The chain of every model that has one."""
    found: dict[str, Picture] = {}
    with unshown(), tempfile.TemporaryDirectory() as folder:
        for a in analyses:
            drawn, shown = {}, {}
            for theme in ("light", "dark") if a.chain is not None else ():
                with plot.theme(theme):
                    ax = plot.chain(a.chain, words=a.words)
                    drawn[theme] = Path(plot.save(ax, Path(folder) / "chain.svg")).read_bytes()
                    shown = plot.data(ax)
            if drawn:
                found[a.name] = Picture(drawn, Figure((), [list(shown), *zip(*shown.values())]).csv)
    return found


def _figures(analyses: Sequence[Analysis]) -> Iterable[tuple[str, Any]]:
    """All figures that the data allow, one after the other."""
    by_name = {a.name: a for a in analyses}
    truth = {name: a.truth[ALL] for name, a in by_name.items() if ALL in a.truth}
    ax = plot.depth({n: a.harm[ALL] for n, a in by_name.items()}, truth, budget=min(a.budget for a in analyses))
    yield "depth", ax.figure
    tall = 0.55 + 0.38 * max(len(a.grid.coords["width"]) for a in analyses)
    yield "width", plot.panels(by_name, lambda a, ax: plot.width(a.grid, a.budget, ax), (8.6, tall), 1)
    if shared := {n: a.branch for n, a in by_name.items() if a.branch is not None}:
        yield "branch", plot.branch(shared).figure
    yield "outcomes", plot.panels(by_name, lambda a, ax: plot.outcomes(a.shares, ax), (8.6, 2.2))
    if any(a.categories for a in analyses):
        rows = max(len(a.harm) for a in analyses)
        axes = plot.panels(by_name, _categories, (9.2, 0.6 + 0.42 * rows), 4, sharey=True)
        right = max(ax.get_xlim()[1] for ax in axes.flat)
        for ax in axes.flat:
            ax.set_xlim(0, right)
        yield "categories", axes
    if struck := {n: a for n, a in by_name.items() if a.strikes}:
        yield "strikes", plot.panels(struck, lambda a, ax: plot.strikes(a.strikes, ax), (8.6, 1.9), sharex=True)
    if checked := {n: a for n, a in by_name.items() if a.check is not None}:
        draw = lambda a, ax: plot.depth(a.unseen, predicted=a.predicted, ax=ax)  # noqa: E731
        yield "predicted", plot.panels(checked, draw, (8.6, 2.2))
        yield "check", plot.panels(checked, lambda a, ax: plot.check(a.check, ax), (8.6, 2.1))
    for i, a in enumerate(analyses):
        if a.chain is not None:
            yield f"chain_{i}", plot.chain(a.chain, words=a.words).figure


def _categories(a: Analysis, ax: Any) -> Any:
    ks = sorted({a.depths[0], a.depths[-1], *(k for k in a.depths if k == 1)})
    label = {k: "not forced" if k == 0 else f"{k} forced" for k in ks}
    rows = {c: {label[k]: row[k] for k in ks if k in row} for c, row in a.harm.items()}
    told = {c: {label[k]: a.truth[c][k] for k in ks if k in a.truth[c]} for c in rows if c in a.truth}
    return plot.categories(rows, ax, truth=told or None)
