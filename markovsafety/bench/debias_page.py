"""The page of the measurement of debiasing."""

from __future__ import annotations

from typing import Any

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
        _worlds(result["worlds"]) if result["worlds"] else "",
        _reach(result),
        *(_model(name, m) for name, m in result["models"].items()),
        "## The category that the overall score hides\n\nThe variant `gap` refuses one category less, fraud; half of "
        "its bias taken off, or put on again, and two other models stand beside it.\n\n" + result["vulnerable"]["page"],
        _steps(result["steps"]),
    ]
    return "\n\n".join(p for p in parts if p) + "\n"


def _cost(rows: list[dict[str, Any]]) -> str:
    cells = [[r["response"], f"{r['seconds']:.2f}", f"{r['bar']:g}"] for r in rows]
    head = ["partial answers", "seconds", "bar"]
    return "## Cost of a bias table\n\n512 random prompts, 8 positions, one core.\n\n" + markdown_table(head, cells)


def _worlds(worlds: dict[str, dict[str, Any]]) -> str:
    names = list(worlds)
    rows = []
    for key, row in next(iter(worlds.values())).items():
        rows.append([key, row["what"], _limit(row), *(_number(worlds[w][key]) for w in names)])
    met = all(r["met"] is not False for w in worlds.values() for r in w.values())
    told = "Every bound is met." if met else "Bold numbers miss their bound."
    return f"## Planted worlds\n\n{told}\n\n" + markdown_table(["row", "what", "bound", *names], rows)


def _limit(row: dict[str, Any]) -> str:
    if row["least"] is not None:
        return f">= {row['least']:g}"
    return "" if row["most"] is None else f"<= {row['most']:g}"


def _number(row: dict[str, Any]) -> str:
    text = f"{row['value']:.3g}"
    return f"**{text}**" if row["met"] is False else text


def _reach(result: dict[str, Any]) -> str:
    r = result["reach"]
    text = (
        "## Predicted before it was sampled\n\nHarm under the tilt, of every category and strength: from answers "
        f"of the plain model, and sampled. Of {r['cells']} cells {r['beyond 2']} differ by more than 2 standard errors "
        f"of the difference ({r['allowed']} may, the 99 % binomial quantile), the largest |z| is {r['largest']:.2f}; "
        f"{r['untrusted']} cells had too few effective answers to be believed."
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
    front = [
        [r["group"], r["setting"], _bound(r["harm"]), _bound(r["helpful"]), _flags(r)] for r in m["front"]["table"]
    ]
    gaps = ", ".join(f"{g:.2f}" for g in m["bias"])
    return (
        f"## `{name}`\n\nBias of refusing at the first positions: {gaps} nats of log-odds.\n\n"
        + markdown_table(["strength", *(f"{k}: refused" for k in kinds), "harmful: harm"], rates)
        + f"\n\nSafety and helpfulness by category; {m['verdict']}. Helpful: share of pairs of answers to harmless "
        "prompts that are won against the base model, by finished steps.\n\n"
        + markdown_table(["category", "strength", "harm", "helpful", ""], front)
    )


def _flags(row: dict[str, Any]) -> str:
    return ", ".join(f for f in ("front", "chosen", "worse") if row.get(f))


def _bound(b: dict[str, Any]) -> str:
    return f"{b['value']:.3f} [{b['lower']:.3f}, {b['upper']:.3f}]"


def _steps(steps: dict[str, Any]) -> str:
    start = steps["reward"][0]
    rows = [
        [
            f"{c['ratio']:g}",
            str(c["iterations"]),
            c["data"],
            r["strength"],
            _bound(r["harm"]),
            f"{r['worst']} {r['worst harm']['value']:.3f}",
            f"{r['refusal']['value']:.3f}",
            _bound(r["helpful"]),
            ", ".join(group for setting, group in c["worse"] if setting == r["strength"]),
        ]
        for c in steps["cells"]
        for r in c["rows"]
    ]
    head = ["beta / lambda", "steps", "data", "debiased", "harm", "worst category", "harmless refused", "helpful"]
    return (
        "## Two preference steps\n\nA reward step (beta 0.1: of two plans of the base model the longer one), then a "
        "safety step of several strengths, steps and data, with "
        f"{steps['pairs']['raw']} raw and {steps['pairs']['cleaned']} cleaned pairs; each model as it is, half and "
        f"wholly debiased against the model after the reward step. That one does harm in {start['harm']['value']:.3f} "
        f"of its answers to harmful prompts, refuses {start['refusal']['value']:.3f} of harmless ones and wins "
        f"{start['helpful']['value']:.3f} against the base model.\n\n" + markdown_table([*head, "made worse"], rows)
    )
