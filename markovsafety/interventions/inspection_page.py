"""The page of an inspection, in Markdown."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .pages import spanned, table

if TYPE_CHECKING:
    from .inspection import Inspection

__all__ = ["page"]

BELIEVED, REPLY = ("harmless", "harmful"), ("accepted", "refused")


def page(found: Inspection) -> str:
    """The report as Markdown.

    Parameters
    ----------
    found : Inspection

    Returns
    -------
    str
    """
    lines = ["# What the model knows and what it does", "", f"{found.verdict}.", "", f"Model: `{found.model}`"]
    lines += ["", "## Prompts by truth and behaviour", ""]
    lines += table(["bucket", "prompts"], [[k.replace("_", " "), str(v)] for k, v in found.buckets.items()])
    lines += ["", "## Answers", ""]
    head = ["prompts", "harm", "refusal", "finished", "truncated", "repetition"]
    rows = []
    for name, b in found.behaviour.items():
        q = b.quality
        rows.append([name, *map(spanned, (b.rate("harm"), b.rate("refusal"), q.finished, q.truncated, q.repetition))])
    lines += table(head, rows)
    lines += _separation(found) + _steering(found) + _guard(found)
    if found.notes:
        lines += ["", "## Notes", "", *(f"- {note}" for note in found.notes)]
    return "\n".join(lines)


def _separation(found: Inspection) -> list[str]:
    if found.separation is None:
        return []
    rows = [
        (r["position"], r["level"], spanned(r["mismatch"]), spanned(r["control"]), *_silhouettes(r))
        for r in found.separation.rows
    ]
    head = ["position", "level", "mismatch AUC", "random vector", "silhouette by harm", "by refusal"]
    return [
        "",
        "## Are harmfulness and refusal encoded apart?",
        "",
        f"{found.separation}.",
        "",
        "Mismatch AUC: accepted harmful over refused harmless prompts along the difference of means; 1 where "
        "harmfulness is encoded, 0 where refusal is.",
        "",
        *table(head, rows),
    ]


def _silhouettes(row: dict[str, Any]) -> tuple[str, str]:
    return f"{row['harm']:+.2f}", f"{row['refusal']:+.2f}"


def _steering(found: Inspection) -> list[str]:
    lines: list[str] = []
    for name, sweep in found.steering.items():
        rows = [
            [str(r["level"]), f"{r['scale']:g}", "" if r["auc"] is None else spanned(r["auc"])]
            + [spanned(r[k]) for k in ("base", "edited", "control", "worst_control", "net")]
            for r in sweep.table
        ]
        head = ["level", "scale", "probe AUC", "P(refuse) before", "steered"]
        head += ["random vectors", "worst of them", "beyond their mean"]
        title = f"## Steering along {name}: refusal of accepted harmless prompts"
        lines += ["", title, "", f"{sweep}.", "", *table(head, rows)]
    if found.inversion:
        rows = [
            [name, i.reply, *map(spanned, (i.share.base, i.share.edited, i.share.control)), spanned(i.neither.edited)]
            for name, i in found.inversion.items()
        ]
        head = ["along", "reply", "before", "steered", "random vectors", "neither reply"]
        lines += ["", "## Does steering turn the model's own judgement of harm?", "", *table(head, rows)]
    return lines


def _guard(found: Inspection) -> list[str]:
    if found.guard is None:
        return []
    g = found.guard
    auc, rate = spanned(g.auc), spanned(g.false_rate)
    lines = ["", "## A guard on what the model believes", "", f"AUC {auc}; blocks {rate} of harmless prompts."]
    lines += ["", *table(["bucket", "guard right", '"did it refuse?" right'], _accuracy(found))]
    if found.blocked is not None:
        head = ["category", "P(harm)", "blocked", "behind the guard, measured", "(1 - rate) h"]
        keys = ("harm", "rate", "measured", "predicted")
        rows = [[c, *(spanned(r[k]) for k in keys)] for c, r in found.blocked.rows.items()]
        lines += ["", *table(head, rows)]
        if not found.blocked.independent:
            lines += ["", "The guard and the answers are not independent: (1 - rate) h does not hold here."]
    if found.beliefs:
        rows = [
            (
                r["category"],
                BELIEVED[r["believed"]],
                REPLY[r["refused"]],
                r["prompts"],
                r["harmful"],
                spanned(r["share"]),
            )
            for r in found.beliefs
        ]
        head = ["category", "believed", "reply", "prompts", "of them harmful", "share"]
        lines += ["", "### Belief and reply", "", *table(head, rows)]
    if found.policy is not None:
        p = found.policy
        lines += [
            "",
            "### The threshold that costs least",
            "",
            f"Block above {p.threshold:.3g}: cost {spanned(p.cost)} a prompt, {spanned(p.held_out)} on prompts it was "
            f"not chosen on; never blocking {spanned(p.never)}, always {spanned(p.always)}.",
        ]
    return lines


def _accuracy(found: Inspection) -> list[list[str]]:
    g = found.guard
    assert g is not None
    return [[name.replace("_", " "), spanned(b), spanned(g.refusal[name])] for name, b in g.accuracy.items()]
