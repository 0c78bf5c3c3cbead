"""The page's part on two preference steps: one front per category over models and strengths, seed by seed."""

from __future__ import annotations

from typing import Any

from .debias_steps import LIMIT
from .markdown import markdown_table

__all__ = ["ABOUT", "FRONT", "front_rows", "steps_page"]

FRONT = ["category", "setting", "harm", "at most", "helpful", "on the front", "best", ""]
ABOUT = (
    "*At most*: one-sided upper end of harm, at 95 % for all {m} of a category at once. *On the front*: share of 1000 "
    "resamples of the prompts in which no other setting has less harm and is more helpful. *Best*: share in which it "
    "is the most helpful one that is allowed."
)


def front_rows(rows: list[dict[str, Any]]) -> list[list[str]]:
    """Cells of `FRONT` for rows of a front."""
    return [
        [
            r["group"],
            r["setting"],
            _bound(r["harm"]),
            f"{r['ceiling']:.3f}",
            _bound(r["helpful"]),
            f"{r['front_share']:.2f}",
            f"{r['best_share']:.2f}" if r["allowed"] else "",
            ", ".join(flag for flag in ("front", "chosen", "worse") if r.get(flag)),
        ]
        for r in rows
    ]


def steps_page(seeds: dict[str, dict[str, Any]]) -> str:
    """What `debias_steps.run_steps` found, as Markdown."""
    first = next(iter(seeds.values()))
    pairs = "; ".join(f"{s['pairs']['raw']} raw and {s['pairs']['cleaned']} cleaned" for s in seeds.values())
    about = (
        "## Two preference steps\n\nA reward step (beta 0.1: of two plans of the base model the longer one), then a "
        f"safety step of several strengths, steps and data ({pairs} pairs); each model as it is, half and wholly "
        f"debiased against the model after the reward step. These {first['settings']} settings share one front per "
        f"category. Chosen is the most helpful setting whose harm is at most {LIMIT:g}, all settings considered. "
        + ABOUT.format(m=first["settings"])
        + "\n\n"
        + _summary(seeds)
    )
    return "\n\n".join([about, *(_seed(name, told) for name, told in seeds.items())])


def _summary(seeds: dict[str, dict[str, Any]]) -> str:
    """What was chosen with each seed, and what is on the front with all of them."""
    on = {s: {(r["group"], r["setting"]) for r in told["front"] if r["front"]} for s, told in seeds.items()}
    always = set.intersection(*on.values())
    rows = [
        [
            group,
            *(f"{told['chosen'][group] or 'none'}" for told in seeds.values()),
            "; ".join(sorted(setting for g, setting in always if g == group)),
        ]
        for group in next(iter(seeds.values()))["chosen"]
    ]
    head = ["category", *(f"chosen, seed {s}" for s in seeds), "on the front with every seed"]
    return markdown_table(head, rows)


def _seed(name: str, told: dict[str, Any]) -> str:
    start = told["reward"]
    rows = [
        [
            f"{c['ratio']:g}",
            str(c["iterations"]),
            c["data"],
            f"{r['strength']:g}",
            _bound(r["harm"]),
            f"{r['worst']} {_bound(r['worst harm'])}",
            _bound(r["refusal"]),
            _bound(r["helpful"]),
            ", ".join(r["worse"]),
        ]
        for c in told["cells"]
        for r in c["rows"]
    ]
    head = ["beta / lambda", "steps", "data", "debiased", "harm", "worst category", "harmless refused", "helpful"]
    return (
        f"### Seed {name}\n\nAfter the reward step: harm {_bound(start['harm'])}, harmless refused "
        f"{_bound(start['refusal'])}, helpful {_bound(start['helpful'])}. *Made worse*: categories with more harm than "
        "after the reward step, for debiased models than before debiasing, with at most 5 % false discoveries among "
        f"{told['tests']} tests.\n\n"
        + markdown_table([*head, "made worse"], rows)
        + "\n\nFronts by category, and what is on them in some resamples.\n\n"
        + markdown_table(FRONT, front_rows(told["front"]))
    )


def _bound(b: dict[str, Any]) -> str:
    return f"{b['value']:.3f} [{b['lower']:.3f}, {b['upper']:.3f}]"
