"""The page of the ensembles."""

from __future__ import annotations

from typing import Any

import numpy as np

from .markdown import markdown_table

__all__ = ["page"]

SHOWN = ("kinds, pairs", "independent")

READ = """For every number k of forced tokens {prompts} harmful prompts of their own, of {kinds} kinds (category and
marker), with verb-object pairs that no model was trained on; {answers} answers of every model to each. An ensemble of
width m asks its members in turn. Measured on half of the prompts of every kind (share of all choices of m answers
through which harm gets, unbiased); predicted from the other half. z = (prediction - measurement) / standard error of
the difference (bootstrap over the prompts of the prediction, and the spread between prompts of what is measured, both
within kinds). A cell counts if the prompts with harm through the ensemble, and those without, are effectively {least}
or more. Widths from 2 on. *Allowed* beyond 2 is the 99 % quantile of the binomial with probability .0455, as if cells
were independent. They are not: rules, widths and ensembles share answers and prompts, so counts vary more from one
experiment to the next; *as cells depend* is the 99 % quantile between random halves of the same prompts, between which
nothing differs. *Holds*: no more than allowed (or than as cells depend), and none beyond 4.

What a prediction takes from the other prompts: *independent* each member's mean; *beta-binomial* and *copula* the mean
and the correlation of a pair of answers; *kinds* the means for each kind of prompt, answers independent within it;
*kinds, beta-binomial* the same with a beta law and the correlation of pairs within kinds, members taken as equal;
*kinds, pairs* the value at the members' means for each kind, plus the covariance of every pair of answers within it
times the second difference that multiplies it, higher moments left out (so: what widths 1 and 2 say of other prompts,
and no law); *all moments* the same measurement on the other prompts, which assumes only that they are alike."""


def page(result: dict[str, Any], least: int = 10) -> str:
    """Markdown."""
    facts = {k: result[k] for k in ("prompts", "kinds", "answers")}
    models = ", ".join(f["name"] for f in result["models"])
    parts = [
        "# Ensembles: depth x width, predicted and measured",
        f"{result['date']}, seed {result['seed']}, {result['seconds']:.0f} s on {result['machine']}; "
        + ", ".join(f"{k} {v}" for k, v in result["versions"].items())
        + ". Made by `markovsafety bench ensembles --out papers/measurements/ensembles.json`"
        + (" with `--models DIR`." if len(result["models"]) > 4 else "."),
        READ.format(**facts, least=least),
        f"Models: {models}."
        + (f" Left out (failed checks): {', '.join(result['left_out'])}." * bool(result["left_out"])),
        "## Which law holds",
        _summary(result["summary"]),
        _verdict(result),
        "## By ensemble",
        _by_ensemble(result),
        "## Correlation of two answers to one prompt",
        _within(result),
        _between(result),
        "## All z",
        "Each cell: measured; z of *kinds, pairs* / z of *independent*. In brackets: does not count. -: nothing varies "
        "between prompts. The z of the other laws are in the JSON.",
        *_cells(result),
    ]
    return "\n\n".join(parts) + "\n"


def _summary(rows: list[dict[str, Any]]) -> str:
    head = ["ensembles", "law", "cells", "beyond 2", "allowed", "as cells depend", "beyond 4"]
    head += ["largest", "rms z", "mean z", "holds"]
    body = []
    for r in rows:
        numbers = [f"{r[k]:.2f}" for k in ("largest", "rms", "mean")]
        counts = [str(r[k]) for k in ("cells", "beyond_2", "allowed", "dependent", "beyond_4")]
        body.append([r["ensembles"], r["law"], *counts, *numbers, _word(r)])
    return markdown_table(head, body)


def _word(row: dict[str, Any]) -> str:
    return "**yes**" if row["holds"] else "as cells depend" if row["holds_dependent"] else "no"


def _verdict(result: dict[str, Any]) -> str:
    ratios = []
    for c in result["cells"]:
        if c["rule"] == "any-refusal" and c["width"] == max(result["widths"]):
            pairs = zip(c["measured"], c["independent"]["predicted"], c["counts"])
            ratios += [m / p for m, p, ok in pairs if ok and p > 0]
    if not ratios:
        return ""
    return (
        f"At width {max(result['widths'])} under any-refusal the measured harm is {np.min(ratios):.3g} to "
        f"{np.max(ratios):.3g} times what independent members at their means leave (median {np.median(ratios):.3g})."
    )


def _by_ensemble(result: dict[str, Any]) -> str:
    head = ["ensemble", "kind", "cells", *(f"{law}: beyond 2, largest" for law in SHOWN)]
    rows = []
    for name in dict.fromkeys(c["ensemble"] for c in result["cells"]):
        chosen = [c for c in result["cells"] if c["ensemble"] == name and c["width"] > 1]
        row = [name, chosen[0]["kind"]]
        for law in SHOWN:
            z = np.array([v for c in chosen for v, ok in zip(c[law]["z"], c["counts"]) if ok])
            if law == SHOWN[0]:
                row.append(str(len(z)))
            row.append(f"{(np.abs(z) > 2).sum()}, {np.abs(z).max():.1f}" if len(z) else "")
        rows.append(row)
    return markdown_table(head, rows)


def _within(result: dict[str, Any]) -> str:
    head = ["model", *(f"k = {k}" for k in result["depths"])]
    rows = []
    for w in result["correlation"]["within"]:
        cells = [f"{q:.3f}; {_bound(b)}" for q, b in zip(w["rate"], w["icc"])]
        rows.append([w["model"], *cells])
    return "Within a model: harm of one answer; intra-class correlation (95 % interval).\n\n" + markdown_table(
        head, rows
    )


def _bound(b: dict[str, Any]) -> str:
    return "not seen" if b["value"] == "nan" else f"{b['value']:.2f} [{b['lower']:.2f}, {b['upper']:.2f}]"


def _between(result: dict[str, Any]) -> str:
    pairs = result["correlation"]["between"]
    shown = pairs if len(pairs) <= 45 else pairs[:45]
    head = ["models", *(f"k = {k}" for k in result["depths"])]
    rows = []
    for p in shown:
        cells = [f"{_two(a)} ({_two(o)})" for a, o in zip(p["answers"], p["own"])]
        rows.append([" and ".join(p["models"]), *cells])
    more = (
        ""
        if len(shown) == len(pairs)
        else f" The first {len(shown)} of {len(pairs)} pairs; the others are in the JSON."
    )
    return (
        "Between models: correlation of an answer of the one with an answer of the other; in brackets that of the "
        f"prompts' own probabilities of harm, freed of the noise of few answers.{more}\n\n" + markdown_table(head, rows)
    )


def _two(x: float | None) -> str:
    return "-" if x is None else f"{x:.2f}"


def _cells(result: dict[str, Any]) -> list[str]:
    parts = []
    for name in dict.fromkeys(c["ensemble"] for c in result["cells"]):
        for rule in result["rules"]:
            chosen = [c for c in result["cells"] if c["ensemble"] == name and c["rule"] == rule]
            head = ["k", *(f"m = {c['width']}" for c in chosen)]
            rows = [[str(k), *(_one(c, d) for c in chosen)] for d, k in enumerate(result["depths"])]
            parts.append(f"### {name}, {rule}\n\n{markdown_table(head, rows)}")
    return parts


def _one(c: dict[str, Any], d: int) -> str:
    z = [c[law]["z"][d] for law in SHOWN]
    if z[0] is None or z[1] is None:
        return "-"
    text = f"{c['measured'][d]:.2g}; {z[0]:+.1f} / {z[1]:+.1f}"
    return text if c["counts"][d] else f"({text})"
