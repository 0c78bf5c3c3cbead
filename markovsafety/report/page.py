"""The page itself: a template, a style sheet and a script, filled with an analysis."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

import numpy as np

from .. import plot
from ..analysis import ALL, Analysis
from ..bound import REASONS, Bound
from .budget import depths_at, embedded, maps
from .colours import style
from .figures import figures
from .moved import drawn, moved
from .pictures import chains
from .words import LEAST, number, one_in, origin, road, sentence, spoken, state_said, verdict, widths

__all__ = ["page"]

SHOWN = 8  # critical transitions and roads per model on the page


def page(summary: Mapping[str, Any], analyses: Sequence[Analysis], extra: Mapping[str, Any]) -> str:
    """The HTML of a report.

    Parameters
    ----------
    summary : dict
        Title, headline, rollouts, command, seconds and versions.
    analyses : sequence of Analysis
    extra : dict
        More provenance.
    """
    from markupsafe import Markup

    budget = min(a.budget for a in analyses)
    changes = moved(analyses)
    # "<" would end the block, or open a comment in it; as an escape it is the same string to JSON.
    numbers = json.dumps(embedded(analyses, budget), allow_nan=False).replace("<", "\\u003c")
    script = _read("page.js")
    return (
        _environment()
        .get_template("page.html.jinja")
        .render(
            s=summary,
            analyses=analyses,
            HELD=all(a.held_out or a.check is None for a in analyses),
            figures=figures(analyses, budget) | drawn(changes),
            pictures=chains(analyses),
            uri=_uri,
            extra=extra,
            reasons=widths(analyses),
            maps=maps(analyses, budget),
            budget_said=f"{budget:g} ({one_in(budget)})",
            budgets=(budgets := sorted({0.01, 0.05, 0.3, *(a.budget for a in analyses)})),
            depths_at=depths_at(analyses, budgets),
            moved=changes,
            assumptions=list(dict.fromkeys(f.name for a in analyses for f in a.findings)),
            numbers=Markup(numbers),
            style=Markup(style(_read("page.css"), len(analyses))),
            script=Markup(script),
            fingerprint=_fingerprint(script),
        )
    )


def _read(name: str) -> str:
    """A file of this room, read as data so that a zipped installation works too."""
    return resources.files("markovsafety.report").joinpath(name).read_text(encoding="utf-8")


def _uri(svg: bytes) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(svg).decode("ascii")


def _fingerprint(script: str) -> str:
    """What the page's policy calls the one script that may run."""
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode("ascii")


def _environment() -> Any:
    import jinja2
    from markupsafe import Markup

    def prob(b: Bound | None) -> Any:
        if b is None or np.isnan(b.value):
            return Markup('<span class="none">not measured</span>')
        because = "; ".join(f"{name} ±{w:.2g}" for name, w in b.reasons.items() if w is not None and np.isfinite(w))
        unknown = ", ".join(name for name, w in b.reasons.items() if w is None)
        title = "; ".join(part for part in (because, f"{unknown} not assessed" if unknown else "") if part)
        ends = f"[{number(b.lower)}, {number(b.upper)}]"
        return Markup('<span class="p" title="{}">{} <span class="ci">{}</span></span>').format(
            title, number(b.value), ends
        )

    def width(w: float | None) -> Any:
        if w is None:
            return Markup('<span class="none">not assessed</span>')
        return f"±{number(w) if w >= LEAST else f'{w:.0e}'}" if w else "0"

    def said(told: str) -> Any:
        kind = {"within": "yes", "fair": "yes", "off": "no", "not fair": "no", "not tested": "none"}.get(told, "open")
        return Markup('<span class="{}">{}</span>').format(kind, told)

    env = jinja2.Environment(
        loader=jinja2.DictLoader({"page.html.jinja": _read("page.html.jinja")}),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    env.filters |= {"prob": prob, "number": number, "state": plot.state_text, "road": road, "origin": origin}
    env.filters |= {"width": width, "verdict": said, "spoken": spoken, "roads": state_said}
    env.globals |= {"agreement": _agreement, "sentence": sentence, "verdict_of": verdict}
    env.globals |= {"SHOWN": SHOWN, "ALL": ALL, "REASONS": REASONS}
    return env


def _agreement(a: Analysis) -> dict[str, Any] | None:
    """How the measured profile lies to planted truth: cells, intervals that contain it, mean absolute distance."""
    pairs = [(b, a.truth[c][k]) for c, row in a.harm.items() if c in a.truth for k, b in row.items() if k in a.truth[c]]
    pooled = [abs(b.value - a.truth[ALL][k]) for k, b in a.harm[ALL].items() if k in a.truth.get(ALL, {})]
    if not pairs:
        return None
    inside = sum(b.lower <= h <= b.upper for b, h in pairs)
    return {"cells": len(pairs), "inside": inside, "distance": float(np.mean(pooled)) if pooled else float("nan")}
