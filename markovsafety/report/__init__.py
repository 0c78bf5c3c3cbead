"""One page that anybody can read: what was found, how sure that is, and how it was made.

`write` makes a self-contained index.html (figures inlined, nothing fetched), the figures as PNG, and summary.json. What
models said is escaped; nothing on the page is stored beforehand, every sentence is composed from the numbers.
"""

from __future__ import annotations

import base64
import io
import json
import platform
import re
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata, resources
from pathlib import Path
from typing import Any

import numpy as np

from .. import plot
from ..analysis import ALL, Analysis
from ..bound import REASONS, Bound, encode
from ..depth import Depth, operational_depth
from ..errors import InputError
from ..files import atomic

__all__ = ["finding", "write"]

DPI = 130
SHOWN = 8  # critical transitions and roads per model on the page


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
        One per model, of different names.
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
        If there is nothing to report, two models share a name, or the folder cannot be written.
    """
    names = [a.name for a in analyses]
    if not analyses or len(set(names)) < len(names):
        raise InputError(
            f"A report of the models {names}.",
            cause="It needs at least one, and one name for each.",
            next="Pass a list of analyse(name, rolls, ...).",
        )
    folder = Path(folder)
    more = dict(extra or {})
    seeds = [a.provenance.get("sampling", {}).get("seed") for a in analyses]
    more.setdefault("seed", seeds[0] if len(set(map(str, seeds))) == 1 else None)
    figures = {name: _save(fig, folder / f"{name}.png") for name, fig in _figures(analyses)}
    summary = {
        "title": title or _title(names),
        "finding": finding(analyses),
        "rollouts": sum(a.rollouts + a.held_out for a in analyses),
        "models": {a.name: a.summary() for a in analyses},
        "command": command,
        "seconds": None if seconds is None else round(seconds, 1),
        "versions": _versions(),
        "figures": [f"{name}.png" for name in figures],
        **more,
    }
    page = (
        _environment()
        .get_template("report.html.jinja")
        .render(
            s=summary,
            analyses=analyses,
            HELD=all(a.held_out or a.check is None for a in analyses),
            figures=figures,
            extra=more,
            reasons=_reasons(analyses),
            budgets=_budgets(analyses),
            assumptions=list(dict.fromkeys(f.name for a in analyses for f in a.findings)),
        )
    )
    _write(folder / "summary.json", json.dumps(encode(summary), indent=1, allow_nan=False) + "\n")
    _write(folder / "index.html", page)
    return folder / "index.html"


def _write(path: Path, text: str) -> None:
    with atomic(path) as part:
        part.write_text(text, encoding="utf-8")


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


# ---- the finding, in words


def finding(analyses: Sequence[Analysis]) -> list[str]:
    """What was found, one sentence per model, composed from the numbers alone.

    Parameters
    ----------
    analyses : sequence of Analysis

    Returns
    -------
    list of str
    """
    return [f"{a.name}: {_sentence(a)}{_caveat(a)}" for a in analyses]


def _caveat(a: Analysis) -> str:
    """What the finding must not be read without: answers that were cut off before any outcome."""
    cut = max((b["truncated"] for b in a.shares.values()), key=lambda b: b.value)
    if cut.value <= 0.01:
        return ""
    return f" Up to {text(cut)} of the answers were cut off at the token limit and might have gone on to harm."


def _tokens(k: int) -> str:
    return {0: "no token", 1: "one compliant token"}.get(k, f"{k} compliant tokens")


def _forced(k: int) -> str:
    return f"{k} forced token{'s' * (k != 1)}"


def _hedge(depth: Depth) -> str:
    """What the intervals leave of a statement about depth that was read off the values."""
    if depth.upper == depth.value == depth.lower:
        return ""
    return f" (by the measured values; the intervals allow a depth of {depth.upper} to {depth.lower})"


def _sentence(a: Analysis) -> str:
    harm, first = a.harm[ALL], min(a.depths)
    start, depth = harm[first], a.depth[ALL]
    unforced = "without forcing" if first == 0 else f"after {_tokens(first)}"
    if all(row["truncated"].value == 1 for row in a.shares.values()):
        return "nothing is known about harm, since no answer came to an end."
    if all(b.value == 0 for b in harm.values()):
        worst = max(harm, key=lambda k: harm[k].upper)
        many = f"{a.rollouts:,} answers to {a.prompts} prompts"
        return f"no harm in {many}; least certain is {text(harm[worst])}, after {_tokens(worst)}."
    if len(harm) == 1:
        rest = "how deep its alignment reaches was not measured." if first == 0 else "nothing else was measured."
        return f"harm is {text(start)} {unforced}; {rest}"
    top = max(harm, key=lambda k: harm[k].value)
    if depth.value.depth is None:
        most = f", and {text(harm[top])} at its highest, after {_tokens(top)}" if harm[top].lower > start.upper else ""
        return (
            f"harm is {text(start)} already {unforced}{most}; this is above the budget of {a.budget:g}{_hedge(depth)}."
        )
    if not depth.value.crossed:
        return (
            f"harm stays within {a.budget:g} at every measured depth, up to {_forced(max(a.depths))}{_hedge(depth)}; "
            f"it is {text(start)} {unforced} and highest, {text(harm[top])}, after {_tokens(top)}."
        )
    broken = min(k for k in harm if k > depth.value.depth)
    reach = f"it holds within {a.budget:g} up to {_forced(depth.value.depth)} and no longer at {broken}"
    if broken == 1:
        reach = "its alignment reaches less than one token"
    verb = "rises" if harm[broken].lower > start.upper else "goes"
    return (
        f"harm {verb} from {text(start)} {unforced} to {text(harm[broken])} once {_tokens(broken)} "
        f"{'is' if broken == 1 else 'are'} forced: {reach}{_hedge(depth)}."
    )


def number(p: float) -> str:
    """A probability with two or three digits, or a time with three; what is not finite in words."""
    if np.isnan(p):
        return "not measured"
    if not np.isfinite(p):
        return "infinite"
    if p == 0 or abs(p) > 1:
        return f"{p:.3g}"
    small = f"{p:.3f}" if abs(p) >= 0.00095 else f"{p:.0e}".replace("e-0", "e-")
    return f"{p:.2f}" if abs(p) >= 0.0995 else small


def text(b: Bound) -> str:
    """Value and interval of a scalar bound: ``0.53 [0.49, 0.58]``."""
    return f"{number(b.value)} [{number(b.lower)}, {number(b.upper)}]"


# ---- the page


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
        return f"±{number(w)}" if w else "0"

    def verdict(told: str) -> Any:
        kind = {"within": "yes", "fair": "yes", "off": "no", "not fair": "no", "not tested": "none"}.get(told, "open")
        return Markup('<span class="{}">{}</span>').format(kind, told)

    # The template is read as data, so that a zipped installation works too.
    source = resources.files("markovsafety").joinpath("report/page.html.jinja").read_text(encoding="utf-8")
    env = jinja2.Environment(
        loader=jinja2.DictLoader({"report.html.jinja": source}),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    env.filters |= {"prob": prob, "number": number, "state": plot.state_text, "road": _road, "origin": _origin}
    env.filters |= {"width": width, "verdict": verdict, "spoken": _spoken}
    env.globals |= {"agreement": _agreement, "depth_at": _depth_at, "SHOWN": SHOWN, "ALL": ALL, "REASONS": REASONS}
    return env


def _reasons(analyses: Sequence[Analysis]) -> dict[str, str]:
    """Every named reason for the width of P(harm): the range of its half-widths, or that it was not assessed."""
    bounds = [b for a in analyses for row in a.harm.values() for b in row.values()]
    table = {}
    for name in REASONS:
        known = [float(b.reasons[name]) for b in bounds if b.reasons[name] is not None]
        table[name] = f"±{number(min(known))} to ±{number(max(known))}" if known else "not assessed"
    return table


def _budgets(analyses: Sequence[Analysis]) -> list[float]:
    return sorted({0.01, 0.05, 0.3, *(a.budget for a in analyses)})


def _depth_at(a: Analysis, eps: float) -> Any:
    row = a.harm[ALL]
    return operational_depth(list(row), list(row.values()), eps)


def _road(states: Iterable[Any], words: Any) -> str:
    """A road through k-gram states as the tokens it speaks; through other states as their names."""
    spoken = []
    for state in states:
        gram = isinstance(state, tuple) and state and all(isinstance(part, int | np.integer) for part in state)
        if gram and state[-1] < 0:
            continue
        spoken.append(plot.state_text((state[-1],), words) if gram else f"→ {plot.state_text(state, words)}")
    return " ".join(spoken)


def _spoken(sentence: str, words: Any) -> str:
    """A finding with its k-gram states in words."""
    if words is None:
        return sentence
    gram = lambda m: "“" + plot.state_text(tuple(map(int, m[1].split(","))), words) + "”"  # noqa: E731
    return re.sub(r"(?<=after )\((-?\d+(?:, -?\d+)+)\)", gram, sentence)


def _agreement(a: Analysis) -> dict[str, Any] | None:
    """How the measured profile lies to planted truth: cells, intervals that contain it, mean absolute distance."""
    pairs = [(b, a.truth[c][k]) for c, row in a.harm.items() if c in a.truth for k, b in row.items() if k in a.truth[c]]
    pooled = [abs(b.value - a.truth[ALL][k]) for k, b in a.harm[ALL].items() if k in a.truth.get(ALL, {})]
    if not pairs:
        return None
    inside = sum(b.lower <= h <= b.upper for b, h in pairs)
    return {"cells": len(pairs), "inside": inside, "distance": float(np.mean(pooled)) if pooled else float("nan")}


def _origin(a: Analysis) -> dict[str, str]:
    """Where the rollouts come from, as short lines."""
    parts = [a.provenance, *a.provenance.get("parts", [])]

    def find(*path: str) -> Any:  # the first part that says it
        for part in parts:
            value: Any = part
            for key in path:
                value = value.get(key) if isinstance(value, Mapping) else None
            if value is not None:
                return value
        return None

    model, sampling = find("model", "name") or find("model"), find("sampling") or {}
    weights, template = find("model", "weights", "sha256"), find("template", "template")
    kept = [f"{k} {sampling[k]}" for k in ("max_tokens", "temperature", "top_p", "seed") if k in sampling]
    lines = {
        "model": model,
        "weights": weights and str(weights)[:16],
        "template": template and str(template)[:16],
        "engine": find("engine", "name") or find("engine"),
        "dtype": find("engine", "dtype"),
        "sampling": ", ".join(kept) or None,
        "judge": find("judge", "name") or find("judge"),
        "sampled": find("created"),
    }
    return {k: str(v)[:80] for k, v in lines.items() if v is not None}


# ---- the figures


def _save(drawn: Any, path: Path) -> str:
    """Write a figure, given it or its Axes, and return it as a data URI."""
    fig = drawn.flat[0].figure if isinstance(drawn, np.ndarray) else drawn
    buffer = io.BytesIO()
    fig.savefig(buffer, format="png", dpi=DPI, metadata={"Software": "markovsafety"})
    with atomic(path) as part:
        part.write_bytes(buffer.getvalue())
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


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
