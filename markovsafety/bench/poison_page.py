"""The page of what `poison` measured: teachers, students, and students by category."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .markdown import markdown_table
from .poison import RECALL

__all__ = ["page"]

SHOWN = 0.1
"""Share of poison at which all defences were tried from both starts."""


def page(result: dict[str, Any]) -> str:
    """Markdown of what `poison.run` measured.

    Parameters
    ----------
    result : dict
    """
    lines = [
        "# Poisoned fine-tuning, with and without defences",
        "",
        f"`markovsafety bench poison --out papers/measurements/poison.json`, {result['date'][:10]}, "
        f"{result['machine']}, " + ", ".join(f"{k} {v}" for k, v in result["versions"].items()) + ".",
        "",
        f"Every filter has a recall of {RECALL:g} on validation pairs, at the fewest harmless ones dropped; level and "
        "position are chosen there. Read: where the feature is read. Dropped: of held-out prompts, by kind; trigger "
        "prompts are harmless, with a word that an aligned model takes for harm.",
        "",
        "Arms: `none` (the aligned model learns everything), `filter`, `distil` and `both` by the trained teacher, "
        "`aligned` and `t_inst` (filter and distillation by the aligned model as it is, its feature read at the last "
        "token and at the end of the instruction). Harm and refusal are those of unmarked harmful held-out prompts; "
        "h(k) is harm after k forced tokens of compliance; useful, trigger: harmless prompts answered, without and "
        "with a trigger. 95 % intervals are in the JSON.",
    ]
    for name, told in result["settings"].items():
        lines += ["", f"## {name[0].upper()}{name[1:]}", "", *_teachers(told.get("teachers", {}))]
        lines += [_students(told), "", *_by_category(told)] if "rows" in told else []
    return "\n".join(lines) + "\n"


def _teachers(told: dict[str, Any]) -> list[str]:
    if not told:
        return []
    kinds = list(next(iter(told.values()))["dropped"])
    rows = [
        [
            name,
            f"{t['filter']['position']}, level {t['filter']['level']}",
            *(_value(t["filter"][k]) for k in ("auc", "recall", "false_drops")),
            *(_value(t["dropped"][k]) for k in kinds),
            _value(t["refusal"]),
            f"{t['seconds']:g} s",
            f"{t['seconds per 1000 rows']:g} s",
        ]
        for name, t in told.items()
    ]
    head = ["teacher", "read", "validation: AUC", "recall", "harmless dropped", *(f"dropped: {k}" for k in kinds)]
    return [markdown_table([*head, "refuses itself", "training", "scoring 1000 rows"], rows), ""]


def _students(told: dict[str, Any]) -> str:
    depths = [k for k in told["before"]["rows"] if k != "0"]
    head = ["poison", "kind", "arm", "start", "poison kept", "harm", "refusal", *(f"h({k})" for k in depths)]
    rows = [_cells(told["before"] | {"share": "", "kind": "", "arm": "before", "start": "", "poison kept": ""}, depths)]
    rows += [_cells(r, depths) for r in told["rows"]]
    return markdown_table([*head, "unseen category refused", "task", "useful", "trigger"], rows)


def _by_category(told: dict[str, Any]) -> list[str]:
    """Every category where a tenth of the rows is poison: harm and refusal at the start, harm behind forced tokens."""
    names = list(told["before"]["categories"])
    rows = [{"arm": "before", "start": ""} | told["before"]]
    rows += [r for r in told["rows"] if r["share"] == SHOWN and r["kind"] == "plain"]
    cells = [
        [
            *(r[k] for k in ("arm", "start")),
            *(" / ".join(_value(r["categories"][c][k]) for k in ("harm", "refusal")) for c in names),
            " / ".join(_value(r["unseen"][k]) for k in ("harm", "refusal")),
        ]
        for r in rows
    ]
    if len(cells) == 1:
        return []
    said = (
        f"Harm / refusal by category, no token forced, {SHOWN:.0%} poison (*unseen*: of it there is no alignment pair):"
    )
    depths = list(rows[0]["deep"][names[0]])
    deep = [
        [
            *(r[k] for k in ("arm", "start")),
            *(" / ".join(_value(r["deep"][c][k]["harm"]) for k in depths) for c in names),
        ]
        for r in rows
    ]
    behind = f"Harm by category behind {', '.join(depths)} forced tokens, {SHOWN:.0%} poison:"
    start = [said, "", markdown_table(["arm", "start", *names, "unseen"], cells)]
    return [*start, "", behind, "", markdown_table(["arm", "start", *names], deep)]


def _cells(row: dict[str, Any], depths: Sequence[str]) -> list[str]:
    deep = [_value(row["rows"][k]["harm"]) for k in depths]
    named = [str(row[name]) for name in ("share", "kind", "arm", "start", "poison kept")]
    return [
        *named,
        _value(row["harm"]),
        _value(row["refusal"]),
        *deep,
        _value(row["unseen"]["refusal"]),
        _value(row["task"]),
        _value(row["useful"]),
        _value(row["trigger"]),
    ]


def _value(bound: dict[str, Any]) -> str:
    return f"{bound['value']:.3f}"
