"""One page that anybody can read: what was found, how sure that is, and how it was made.

`write` makes a self-contained index.html (drawings inlined, nothing fetched), the figures as PNG, and summary.json.
What models said is escaped, and the page runs no script but its own, known by its hash; nothing on it is stored
beforehand, every sentence is composed from the numbers.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from ..analysis import ALL, Analysis
from ..bound import encode
from ..errors import InputError
from ..files import atomic
from .page import page
from .pictures import pictures
from .words import finding, headline

__all__ = ["finding", "write"]


def write(
    folder: str | Path,
    analyses: Sequence[Analysis],
    *,
    title: str | None = None,
    command: str | None = None,
    seconds: float | None = None,
    extra: Mapping[str, Any] | None = None,
) -> Path:
    """Write the report.

    Parameters
    ----------
    folder : path
        Gets index.html, one PNG per figure and summary.json; every file appears whole or not at all.
    analyses : sequence of Analysis
        One per model, of different names. The others are compared with the first.
    title, command : str, optional
        Headline, and the command that repeats the run.
    seconds : float, optional
        How long sampling and computing took.
    extra : dict, optional
        More provenance, e.g. ``{"seed": 0}``; goes into the page and the top level of summary.json.

    Returns
    -------
    Path
        Of index.html.

    Raises
    ------
    InputError
        If there is nothing to report, two models share a name, levels differ, or the folder cannot be written.

    Examples
    --------
    >>> from markovsafety.analysis import analyse
    >>> model, prompts = ms.organism.model_path("shallow"), ms.organism.prompts(n=8)
    >>> rolls = ms.sample(model, prompts, n=8, max_tokens=96, prefill=[0, 1])
    >>> found = analyse("shallow", ms.judge(rolls, "organism"), budget=0.1)
    >>> page = ms.report.write("report", [found], title="Where does shallow break?")
    >>> sorted(path.name for path in page.parent.iterdir())  # doctest: +ELLIPSIS
    ['branch.png', ..., 'index.html', ..., 'summary.json', 'width.png']
    """
    names = [a.name for a in analyses]
    if not analyses or len(set(names)) < len(names):
        raise InputError(
            f"A report of the models {names}.",
            cause="It needs at least one, and one name for each.",
            next="Pass a list of analyse(name, rolls, ...).",
        )
    if len(levels := sorted({float(a.harm[ALL][k].level) for a in analyses for k in a.harm[ALL]})) > 1:
        raise InputError(
            f"A report of intervals at the levels {', '.join(f'{level:g}' for level in levels)}.",
            cause="The page names one level for all of its intervals.",
            next="Analyse all models with the same level.",
        )
    folder = Path(folder)
    more = dict(extra or {})
    seeds = [(a.provenance.get("sampling") or {}).get("seed") for a in analyses]
    more.setdefault("seed", seeds[0] if len(set(map(str, seeds))) == 1 else None)
    drawn = pictures(analyses)
    for name, png in drawn.items():
        with atomic(folder / f"{name}.png") as part:
            part.write_bytes(png)
    summary = {
        "title": title or _title(names),
        "headline": headline(analyses),
        "finding": finding(analyses),
        "rollouts": sum(a.rollouts + a.held_out for a in analyses),
        "models": {a.name: a.summary() for a in analyses},
        "command": command,
        "seconds": None if seconds is None else round(seconds, 1),
        "versions": _versions(),
        "figures": [f"{name}.png" for name in drawn],
        **more,
    }
    told = page(summary, analyses, more)
    _write(folder / "summary.json", json.dumps(encode(summary), indent=1, allow_nan=False) + "\n")
    _write(folder / "index.html", told)
    return folder / "index.html"


def _write(path: Path, text: str) -> None:
    with atomic(path) as part:
        part.write_text(text, encoding="utf-8", errors="backslashreplace")  # a name from the shell may be no UTF-8


def _title(names: Sequence[str]) -> str:
    return f"Where does {names[0]} break?" if len(names) == 1 else "Where in the answer does safety break?"


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("markovsafety", "numpy", "scipy", "jax", "matplotlib"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
