"""The page of the measurement of debiasing."""

from __future__ import annotations

from typing import Any

from .debias_steps_page import ABOUT, FRONT, front_rows, steps_page
from .markdown import markdown_table

__all__ = ["page"]


def page(result: dict[str, Any]) -> str:
    """Tables and a sentence before each.

    Parameters
    ----------
    result : dict
        Of `markovsafety.bench.debias.run`.
    """
    parts = [
        "# Safety-debiased decoding\n\n"
        f"`markovsafety bench debias --models DIR --out debias.json`, {result['date'][:10]}, {result['machine']}, "
        + ", ".join(f"{k} {v}" for k, v in result["versions"].items())
        + f". {result['prompts']} held-out prompts of each kind, {result['answers']} answers each.",
        _cost(result["cost"]),
        _reach(result),
        *(_model(name, m) for name, m in result["models"].items()),
        "## The category that the overall score hides\n\nThe variant `gap` refuses one category less, fraud; half of "
        "its bias taken off, or put on again, and two other models stand beside it.\n\n" + result["vulnerable"]["page"],
        steps_page(result["steps"]),
    ]
    return "\n\n".join(p for p in parts if p) + "\n"


def _cost(rows: list[dict[str, Any]]) -> str:
    cells = [[r["response"], f"{r['seconds']:.2f}", f"{r['bar']:g}"] for r in rows]
    head = ["partial answers", "seconds", "bar"]
    return "## Cost of a bias table\n\n512 random prompts, 8 positions, one core.\n\n" + markdown_table(head, cells)


def _reach(result: dict[str, Any]) -> str:
    r = result["reach"]
    text = (
        "## Predicted before it was sampled\n\nHarm under the tilt, of every category and strength: from answers "
        f"of the plain model, and sampled. Of {r['cells']} cells {r['beyond 2']} differ by more than 2 standard errors "
        f"of the difference ({r['allowed']} may, the 99 % binomial quantile), the largest |z| is {r['largest']:.2f}, "
        f"the root of their mean square {r['rms']:.2f} (below 1 the errors are on the safe side); {r['untrusted']} "
        "cells had too few effective answers to be believed."
    )
    rows = [
        [
            name,
            f"{c['strength']:g}",
            c["group"],
            *(f"{c[k]:.3f}" for k in ("predicted", "sampled", "error")),
            f"{c['z']:+.2f}",
            f"{c['effective']:.0f}",
            f"{c['hidden']:.4f}",
        ]
        for name, m in result["models"].items()
        for c in m["cells"]
    ]
    return f"{text}\n\n" + markdown_table(
        ["model", "strength", "category", "predicted", "sampled", "s.e.", "z", "effective answers", "hidden"], rows
    )


def _model(name: str, m: dict[str, Any]) -> str:
    kinds = ("harmful", "harmless", "trigger")
    rates = [
        [a, *(f"{r[k]['refusal']:.3f}" for k in kinds), f"{r['harmful']['harm']:.3f}"] for a, r in m["rates"].items()
    ]
    gaps = ", ".join(f"{g:.2f}" for g in m["bias"])
    return (
        f"## `{name}`\n\nBias of refusing at the first positions: {gaps} nats of log-odds.\n\n"
        + markdown_table(["strength", *(f"{k}: refused" for k in kinds), "harmful: harm"], rates)
        + f"\n\nSafety and helpfulness by category; {m['verdict']}. Helpful: share of pairs of answers to harmless "
        "prompts that are won against the base model, by finished steps. "
        + ABOUT.format(m="settings")
        + "\n\n"
        + markdown_table(FRONT, front_rows(m["front"]["table"]))
    )
