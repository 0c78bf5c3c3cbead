"""The benchmark's result to read: as text for the terminal, as Markdown for the repository."""

from __future__ import annotations

from typing import Any

__all__ = ["as_markdown", "as_text"]

HEADS = ("", "set-up", "solve", "first call", "error", "relative", "width", "memory", "note")


def as_text(result: dict[str, Any]) -> str:
    """Aligned columns, each case with its goals below."""
    parts = [_head(result)]
    for entry in result["cases"].values():
        table = [HEADS, *(_cells(row) for row in entry["rows"])]
        table = _without_empty(table)
        wide = [max(len(line[j]) for line in table) for j in range(len(table[0]))]
        last = len(wide) - 1
        lines = [
            "  ".join(x.ljust(w) if j in (0, last) else x.rjust(w) for j, (x, w) in enumerate(zip(line, wide)))
            for line in table
        ]
        goals = [f"  {g['verdict']:>12}  {_number(g)} ({g['bound']})  {g['goal']}" for g in entry["goals"]]
        parts.append(
            "\n".join([f"{entry['title']}  [reference: {entry['reference']}]", *map(str.rstrip, lines), *goals])
        )
    parts.append(_count(result))
    return "\n\n".join(parts)


def as_markdown(result: dict[str, Any]) -> str:
    """One section per case: the rows, then what was to be reached."""
    parts = ["# The hitting engine beside its peers", _head(result), READ, _count(result)]
    for entry in result["cases"].values():
        table = _without_empty([HEADS, *(_cells(row) for row in entry["rows"])])
        parts.append(f"## {entry['title']}\n\nReference: {entry['reference']}.\n\n{_grid(table)}")
        if entry["goals"]:
            goals = [("to reach", "", "measured", "")]
            goals += [(g["goal"], g["bound"], _number(g), f"**{g['verdict']}**") for g in entry["goals"]]
            parts.append(_grid(goals))
    return "\n\n".join(parts) + "\n"


READ = """Everything was measured in one run, single-threaded on one core; times are medians of repetitions taken in
turns. *Set-up* is what leads from the raw matrix to what the solver takes (ours: a new `Chain`, checked, each time;
theirs: `I - Q` in their format), *solve* the rest, ordering and factoring included. *First call* is the first solve in
a new process, with loading and compiling; every run compiles our kernels anew, which shows where one is first needed.
*Error* is the largest absolute, *relative* the largest entrywise relative error against the reference, *width* that of
the enclosure; a peer's wrong answer stands as it came. "> 20 s" was stopped there, so that a ratio to it is a lower
bound."""


def _head(result: dict[str, Any]) -> str:
    have = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    settings = ", ".join(f"{key} {value}" for key, value in result["settings"].items())
    return f"{result['date']}; {result['machine']}; {have}; {settings}."


def _count(result: dict[str, Any]) -> str:
    words = [g["verdict"] for entry in result["cases"].values() for g in entry["goals"]]
    return (
        f"Goals: {words.count('met')} met, {words.count('missed')} missed, {words.count('not measured')} not measured."
    )


def _grid(table: list[tuple[str, ...]]) -> str:
    lines = ["| " + " | ".join(x.replace("|", "\\|") for x in line) + " |" for line in table]
    return "\n".join([lines[0], "|" + "---|" * len(table[0]), *lines[1:]])


def _without_empty(table: list[tuple[str, ...]]) -> list[tuple[str, ...]]:
    keep = [j for j in range(len(table[0])) if j == 0 or any(line[j] for line in table[1:])]
    return [tuple(line[j] for j in keep) for line in table]


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    notes = [str(row["note"])] if row.get("note") else []
    notes += [f"{row['negative']} negative"] if row.get("negative") else []
    notes += ["does not hold the reference"] if row.get("inside") is False else []
    notes += [f"{row['copies']:.2f} copies of the matrix"] if "copies" in row else []
    notes += ["one run"] if len(row.get("seconds", ())) == 1 else []
    solve = _time(row["median"]) if "median" in row else row["status"]
    return (
        row["who"],
        _time(row["setup_median"]) if "setup_median" in row else "",
        solve,
        _time(row["first"]) if "first" in row else "",
        *(_small(row[key]) if key in row else "" for key in ("error", "relative", "width")),
        _bytes(row["memory"]) if "memory" in row else "",
        "; ".join(notes),
    )


def _time(seconds: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 1e-6:.3g} µs"


def _bytes(size: float) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"


def _small(value: float | str) -> str:
    return f"{float(value):.1e}"


def _number(goal: dict[str, Any]) -> str:
    if goal["value"] is None:
        return "-"
    return ("> " if goal["above"] else "") + f"{float(goal['value']):.3g}"
