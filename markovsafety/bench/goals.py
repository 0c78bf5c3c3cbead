"""What each case is meant to reach, as data, and whether it did."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["ANSWERS", "Goal", "verdicts"]

WORDS = {
    "speed": "{ours}: times as fast as {peer}",
    "share": "{ours}: share of the time of {peer}",
    "extra": "{ours}: time on top of {peer}, as a share of it",
    "accuracy": "{ours}: times smaller error than {peer}",
    "error": "{ours}: largest absolute error",
    "relative": "{ours}: largest relative error, entrywise",
    "width": "{ours}: width of the enclosure",
    "relative_width": "{ours}: relative width of the enclosure",
    "copies": "{ours}: peak memory in copies of the matrix",
    "memory": "{ours}: bytes on top of input and result",
    "inside": "{ours}: the enclosure holds the reference",
}

ANSWERS = ("error", "relative", "width", "relative_width", "inside")
"""Kinds that speak of answers, not of time or memory."""


@dataclass(frozen=True)
class Goal:
    """A number to reach.

    Attributes
    ----------
    kind : str
        A key of `WORDS`, or of the case's own numbers (then `ours` says what it is).
    ours, peer : str
        Names of rows.
    least, most : float, optional
        The bound to reach.
    """

    kind: str
    ours: str
    peer: str = ""
    least: float | None = None
    most: float | None = None

    @property
    def text(self) -> str:
        return WORDS.get(self.kind, "{ours}").format(ours=self.ours, peer=self.peer)

    @property
    def bound(self) -> str:
        return f">= {self.least:g}" if self.least is not None else f"<= {self.most:g}"


def verdicts(goals: tuple[Goal, ...], rows: Mapping[str, Mapping[str, Any]], numbers: Mapping[str, Any]) -> list[dict]:
    """Number, bound and "met", "missed" or "not measured" of every goal.

    A peer that was stopped at the time limit took at least that long, so a ratio to it is a lower bound (`above`).
    """
    found = []
    for goal in goals:
        value, above = _value(goal, rows, numbers)
        if value is None:
            word = "not measured"
        else:
            reached = value >= goal.least if goal.least is not None else value <= (goal.most or 0.0)
            word = "met" if reached else "not measured" if above else "missed"
        found.append({"goal": goal.text, "bound": goal.bound, "value": value, "above": above, "verdict": word})
    return found


def _value(goal: Goal, rows: Mapping[str, Mapping[str, Any]], numbers: Mapping[str, Any]) -> tuple[float | None, bool]:
    if goal.kind not in WORDS:
        return numbers.get(goal.kind), False
    ours, peer = rows.get(goal.ours, {}), rows.get(goal.peer, {})
    if goal.kind in ("speed", "share", "extra"):
        a, b, above = ours.get("median"), peer.get("median"), False
        if b is None and "limit" in peer:
            b, above = peer["limit"], True
        if not a or not b:
            return None, False
        return {"speed": b / a, "share": a / b, "extra": a / b - 1.0}[goal.kind], above
    if goal.kind == "accuracy":
        a, b = ours.get("error"), peer.get("error")
        return (None, False) if a is None or b is None else (float(b) / float(a) if a else float("inf"), False)
    value = ours.get(goal.kind)
    return (None if value is None else float(value)), False
