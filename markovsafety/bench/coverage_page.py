"""The tables of the coverage benchmark."""

from __future__ import annotations

from typing import Any

import numpy as np

from .markdown import markdown_table

__all__ = ["page", "summary", "tables"]


_ABOUT = (
    "{R} experiments per cell, seed {seed}: the standard error of a coverage of 95 % is {spread:.2f} points. All "
    "intervals are two-sided 95 %. Every experiment draws its prompts from a list with exact probabilities of "
    "harm, from the planted automata of the synthetic language, and asks each as often as the column says; "
    "`clustered` populations have beta-distributed probabilities with an intra-class correlation of {icc:g}, for "
    "differences the same prompts with the same rank on both sides."
)
_COLUMNS = (
    "`harms` and `harmful prompts` are what an experiment can expect (harmless ones, where these are fewer; of "
    "differences: the side with fewer). A rate is called continuous, and its interval judged from above, where "
    "both are 20 or more. `too low / too high`: share of intervals, in per cent, that end below the truth, or "
    "begin above it. `of prescribed` is the mean width over that of Clopper-Pearson at the size that the rule "
    "prescribes (number of prompts without harm or with too few harmful prompts to see a correlation, else the "
    "effective size), for differences over the interval from two such; `of oracle` over Clopper-Pearson for "
    "someone who knows the true correlation: what not knowing costs. Beside ours: Wald, Wilson and Clopper- "
    "Pearson of all rollouts as independent trials, and percentiles of 400 resamples of prompts; `points` are "
    "intervals without any width."
)


def summary(result: dict[str, Any]) -> str:
    """The result in a few lines."""
    rows = result["rows"]
    few = [r["coverage"] for r in rows if r["most"] is None]
    many = [r["coverage"] for r in rows if r["most"] is not None]
    wald = [r["tools"]["Wald"]["coverage"] for r in rows]
    flagged = max(r["flagged"] for r in result["flags"])
    error = 100 * np.sqrt(0.95 * 0.05 / result["experiments"])
    said = [
        f"coverage of {100 * result['level']:g} % intervals, {result['experiments']} experiments per cell "
        f"(standard error {error:.2f} points)",
        f"few harms: {_percent(min(few))} to {_percent(max(few))} in {len(few)} cells",
        f"20 harms and harmful prompts or more: {_percent(min(many))} to {_percent(max(many))} in {len(many)} cells",
        f"safety depth: {_percent(min(r['coverage'] for r in result['depths']))} or more",
        f"Wald: down to {_percent(min(wald))}",
        f"false flags: at most {_percent(flagged)}",
    ]
    return "; ".join(said) + "".join(f"\noutside its limits: {text}" for text in result["missed"])


def _percent(x: float) -> str:
    return f"{100 * x:.1f} %"


def tables(result: dict[str, Any]) -> dict[str, str]:
    """Markdown tables by title."""
    rates = [r for r in result["rows"] if r["oracle"] is not None]
    changes = [r for r in result["rows"] if r["oracle"] is None]
    few, many = ([r for r in rates if (r["most"] is not None) == x] for x in (False, True))
    head = ["quantity", "population", "prompts x rollouts", "true", "harms", "harmful prompts", "ICC", "**ours**"]
    head += ["too low / too high", "width", "of prescribed", "of oracle"]
    tools = ["Wald", "Wilson", "Clopper-Pearson", "bootstrap"]
    found = {
        "Rates with few harms or harmful prompts: at least 94 %": markdown_table(
            head + tools, [_rate(r, tools) for r in few]
        ),
        "Rates with 20 harms and harmful prompts or more: 93 to 97.5 %": markdown_table(
            head + tools, [_rate(r, tools) for r in many]
        ),
    }
    head.remove("of oracle")
    found["Differences"] = markdown_table(
        [*head, "limits", "Wald", "bootstrap"],
        [[*(c for i, c in enumerate(_rate(r, [])) if i != 11), _limits(r), *_beside(r, ["Wald", "bootstrap"])]
         for r in changes],
    )  # fmt: skip
    found["Operational safety depth: at least 94 %"] = markdown_table(
        ["profile", "budget", "prompts x rollouts", "true", "**ours**", "lower ends one by one", "depths in it",
         "of one by one", "Wald", "Clopper-Pearson"],
        [[r["name"], f"{r['eps']:.3g}", f"{r['prompts']} x {r['rollouts']}", r["truth"], _percent(r["coverage"]),
          _percent(r["alone"]), f"{r['depths']:.2f}", f"{r['ratio']:.2f}", *map(_percent, r["tools"].values())]
         for r in result["depths"]],
    )  # fmt: skip
    found["Flags where nothing changed, six categories: at most 5 % and three standard errors"] = markdown_table(
        ["population", "prompts x rollouts in each", "**any flag**", "p <= 0.05", "any, unclustered z-tests"],
        [[r["name"], f"{r['prompts']} x {r['rollouts']}", *map(_percent, (r["flagged"], r["single"], r["naive"]))]
         for r in result["flags"]],
    )  # fmt: skip
    return found


def _rate(r: dict[str, Any], tools: list[str]) -> list[str]:
    size = f"{r['prompts']} x {r['rollouts']:g}"
    missed = f"{100 * r['missed_low']:.1f} / {100 * r['missed_high']:.1f}"
    cells = [r["quantity"], r["name"], size, f"{r['truth']:.3g}", f"{r['harms']:.3g}", f"{r['harmful']:.3g}"]
    cells += [f"{r['icc']:.2g}", _percent(r["coverage"]), missed, f"{r['width']:.3g}", f"{r['ratio']:.2f}"]
    return [*cells, "" if r["oracle"] is None else f"{r['oracle']:.2f}", *_beside(r, tools)]


def _beside(r: dict[str, Any], tools: list[str]) -> list[str]:
    """Coverage of the tools, and how often they gave an interval without any width."""
    told = [r["tools"][name] for name in tools]
    return [_percent(t["coverage"]) + (f" ({_percent(t['points'])} points)" if t["points"] > 0 else "") for t in told]


def _limits(r: dict[str, Any]) -> str:
    return f">= {100 * r['least']:g} %" if r["most"] is None else f"{100 * r['least']:g} to {100 * r['most']:g} %"


def page(result: dict[str, Any]) -> str:
    """The committed page."""
    spread = 100 * np.sqrt(0.95 * 0.05 / result["experiments"])
    parts = [
        "# Coverage of the intervals",
        _ABOUT.format(R=result["experiments"], seed=result["seed"], spread=spread, icc=result["icc"]),
        _COLUMNS,
    ]
    for title, table in tables(result).items():
        parts += [f"## {title}", table]
    missed = result["missed"] or ["Nothing."]
    parts += ["## Outside the limits", "\n".join(f"- {text}" for text in missed)]
    have = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    parts.append(f"`{result['command']}`: {result['seconds']:g} s, {result['date']}, {have}; {result['processor']}.")
    return "\n\n".join(parts) + "\n"
