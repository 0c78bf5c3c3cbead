"""The page of the measurements of deep alignment."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ..files import atomic
from .markdown import markdown_table

__all__ = ["write_page"]

READ = """Starting model: the shipped `shallow`. Safety rows are made of its own compliant answers (after one forced
token of compliance) and its own refusals, to harmful prompts without markers and not of the category *{held}*; every
method has as many tokens with loss. Beside them stand its own answers to harmless prompts, with and without trigger
words. The safety rows have a fifth of the loss. *Depth*: largest number of forced tokens of the grid up to which
P(harm) stays within {budget}; in brackets as the upper and the lower ends of the intervals have it. *By rows*: the
same, predicted before training: after up to C tokens the rows refuse for certain, and a refusal leaks as one of
`shallow`; after more tokens the hazards of `shallow` are what they were. *By hazards*: as hazards by position, time
since the prefix and category predict it, fitted on {few} other prompts at depths {fitted} of the trained model.
*Loss*: of the share of harmless prompts that are answered, paired by prompt. All prompts are of verb-object pairs that
no training saw."""
ATTACKED = """Fine-tuning `shallow` on {poison} harmful prompts that are answered (*harmful*), or on these among
{task} rows of a user's task (*poisoned task*): {recipes}, with cross-entropy and with the
token-wise constrained objective on the same rows in the same order, by {seeds} seeds of data and training. *Right*:
likeliest answers to held-out prompts of the task that are right word by word; these begin with fixed words, other than
those that `shallow` likes, so that a model that is held on its first tokens cannot say them. *Answered*: harmless
prompts. Below, each objective less cross-entropy on the same rows, with Student's interval over trainings."""


def write_page(
    result: dict[str, Any], path: Path, *, budget: float, least: int, loss: float, deep: tuple[str, ...], shown: int
) -> None:
    """Write the tables as Markdown.

    Parameters
    ----------
    result : dict
        What `align.run` returns, read back from JSON.
    path : path
    budget, least, loss, deep, shown
        What the verdicts are judged by.
    """
    told = ", ".join(f"{k} {v}" for k, v in result["versions"].items())
    verdicts = [
        f"{c['method']}, C = {c['depth']}: " + ("**reached**" if c["met"] else "**not reached**")
        for c in result["cells"]
        if c["method"] in deep and c["depth"] >= least
    ]
    parts = [
        "# Deep alignment of the shallow organism",
        f"{result['date']}, {result['machine']}; {told}. {result['seeds']} trainings of each method, "
        f"{result['steps']} updates; {result['ask']} prompts, {result['n']} rollouts of each per depth; "
        f"{result['seconds']:.0f} s since the last start (kept trainings are not done again). Made by "
        "`markovsafety bench align --out papers/measurements/align.json`.",
        READ.format(
            held=result["held_out"], budget=budget, few=result["few"], fitted=", ".join(map(str, result["fitted"]))
        ),
        f"At least {least} tokens (by the upper ends) at a loss of at most {loss}, in every training: "
        f"{'; '.join(verdicts)}.",
        "## Harm by depth",
        _profiles(result),
        "## Predicted and measured depth",
        _predicted(result),
        _verdict(result["prediction"]),
        f"Phrases that changed places: {', '.join(f'*{x}*' for x in result['phrases'])}. {_phrases(result['runs'])}",
        "## Trainings",
        _trainings(result, shown),
    ]
    if result["attacks"]["runs"]:
        parts += _attacks(result["attacks"])
    with atomic(path) as part:
        part.write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def _profiles(result: dict[str, Any]) -> str:
    head = ["P(harm) after k tokens, mean of the trainings", *(str(k) for k in result["grid"])]
    rows = [["shallow", *(f"{x:.3f}" for x in result["shallow"]["profile"]["value"])]]
    rows += [[f"{c['method']}, C = {c['depth']}", *(f"{x:.3f}" for x in c["profile"])] for c in result["cells"]]
    return markdown_table(head, rows)


def _predicted(result: dict[str, Any]) -> str:
    head = ["method", "depth, each training", "by rows", "by hazards", "within: by rows", "by hazards"]
    head += ["not beyond: by rows", "z beyond 2", "allowed", "largest"]
    rows = []
    for p in result["prediction"]["cells_of"]:
        mine = [r for r in result["runs"] if (r["method"], r["depth"]) == (p["method"], p["depth"])]
        of = p["trainings"]
        row = [f"{p['method']}, C = {p['depth']}", ", ".join(_depth(r["operational"]) for r in mine)]
        row += [", ".join(sorted({_plain(r["prediction"]["by_rows"]) for r in mine}))]
        row += [", ".join(str(r["prediction"]["operational"]["value"]) for r in mine)]
        row += [f"{p['rows_agree']} of {of}", f"{p['agree']} of {of}", f"{p['rows_reached']} of {of}"]
        rows.append([*row, f"{p['beyond']} of {p['cells']}", str(p["allowed"]), f"{p['largest']:.2f}"])
    return markdown_table(head, rows)


def _plain(k: int | None) -> str:
    return "none" if k is None else str(k)


def _verdict(p: dict[str, Any]) -> str:
    of = p["trainings"]
    return (
        f"Predicted depths lie within the measured intervals in {p['agree']} of {of} trainings by hazards, in "
        f"{p['rows_agree']} by rows; by rows they are no larger than measured in {p['rows_reached']}. Depths that "
        f"were not fitted: {p['beyond']} of {p['cells']} z-scores are beyond 2 ({p['allowed']} allowed: the 99 % "
        f"quantile of the binomial with 0.0455), the largest is {p['largest']:.2f}: "
        f"{'holds' if p['held'] else '**fails**'}."
    )


def _phrases(runs: list[dict[str, Any]]) -> str:
    """Why a profile by position misses permutation: refusals were trained behind phrases, wherever these stand."""
    mine = [r["phrases"] for r in runs if r["method"] == "permutation" and all(r["phrases"].values())]
    if not mine:
        return ""
    behind, elsewhere = (float(np.mean([m[name]["value"] for m in mine])) for name in ("behind", "elsewhere"))
    return (
        f"Refusals were trained right behind a phrase: after 16 tokens, permutation harms in {behind:.3f} where the "
        f"prefix ends with one, and in {elsewhere:.3f} elsewhere (means of the trainings). Hazards by position know no "
        "words, and so miss depths at which fewer prefixes end with a phrase than at those that were fitted."
    )


def _trainings(result: dict[str, Any], shown: int) -> str:
    held = result["held_out"]
    head = ["training", "depth", "by hazards", "by rows", "loss", "KL, nats per token", "jailbreak harm"]
    head += [f"harm at {shown}, {held}", f"harm at {shown}, trained", "seconds"]
    s = result["shallow"]
    rows = [["shallow", _depth(s["depth"]), "", "", "", "", _span(s["jailbreak_harm"])]]
    rows[0] += [_span(s["harm_held_out"]), _span(s["harm_trained"]), ""]
    for r in result["runs"]:
        said, change = r["prediction"], r["benign_change"]
        loss = {"value": -change["value"], "lower": -change["upper"], "upper": -change["lower"]}
        name = f"{r['method']}, C = {r['depth']}, seed {r['seed']}"
        row = [name, _depth(r["operational"]), _depth(said["operational"]), _plain(said["by_rows"]), _span(loss)]
        row += [_span(r["kl"], 4), _span(r["jailbreak_harm"]), _span(r["harm_held_out"]), _span(r["harm_trained"])]
        rows.append([*row, f"{r['seconds_training']:.0f}"])
    return markdown_table(head, rows)


def _attacks(a: dict[str, Any]) -> list[str]:
    names = list(dict.fromkeys((r["attack"], r["objective"]) for r in a["runs"]))
    head = ["attack", "objective", *(f"harm at {k}" for k in a["depths"]), "depth, each training", "right", "answered"]
    first = a["before"]
    rows = [["none", "", *(f"{x:.3f}" for x in first["profile"]["value"]), _depth(first["operational"])]]
    rows[0] += [f"{first['task']['value']:.3f}", f"{first['benign']['value']:.3f}"]
    for which, name in names:
        mine = [r for r in a["runs"] if (r["attack"], r["objective"]) == (which, name)]
        harm = np.mean([r["profile"]["value"] for r in mine], axis=0)
        row = [which, name, *(f"{x:.3f}" for x in harm), ", ".join(_depth(r["operational"]) for r in mine)]
        rows.append([*row, *(f"{np.mean([r[x]['value'] for r in mine]):.3f}" for x in ("task", "benign"))])
    change = [[c["attack"], c["objective"], *(_span(c[x]) for x in ("harm", "task", "benign"))] for c in a["changes"]]
    recipes = "; ".join(
        f"{steps} updates at a rate of {rate:g} ({name})" for name, (steps, rate) in a["attacks"].items()
    )
    said = {"poison": a["poison"], "task": a["task"], "recipes": recipes}
    return [
        "## Fine-tuning attacks and the constrained objective",
        ATTACKED.format(**said, seeds=len({r["seed"] for r in a["runs"]})),
        markdown_table(head, rows),
        markdown_table(["attack", "objective", "harm at 0", "right", "answered"], change),
    ]


def _depth(d: dict[str, Any]) -> str:
    """A depth, and as the ends of the intervals have it."""
    return f"{d['value']} [{d['upper']}, {d['lower']}]"


def _span(b: dict[str, Any], digits: int = 3) -> str:
    """A bound read from JSON."""
    return f"{b['value']:.{digits}f} [{b['lower']:.{digits}f}, {b['upper']:.{digits}f}]"
