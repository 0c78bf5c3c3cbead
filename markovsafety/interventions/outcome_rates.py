"""How often answers come to an outcome: before an edit, after it and under its control, paired by prompt."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..bound import Bound, clustered, encode
from ..errors import InputError
from ..evidence.paired import METHODS, benjamini_hochberg, change
from ..outcomes import CODES, NOT_JUDGED, OUTCOMES
from ..rollouts.rollouts import Rollouts
from .pages import spanned

__all__ = ["Rate", "came_to", "rates"]


@dataclass(frozen=True, eq=False)
class Rate:
    """One outcome of one category of prompts.

    Parameters
    ----------
    outcome : str
    category : str or None
        None: all prompts together.
    arms : dict of name -> Bound
        Share of answers, clustered by prompt: before, after, control.
    change : Bound
        after - before, paired by prompt; `info` has p, adjusted (over the categories) and method.
    beyond : Bound or None
        after - control: what the edit does that a random one of its size does not.
    """

    outcome: str
    category: str | None
    arms: dict[str, Bound]
    change: Bound
    beyond: Bound | None

    def __repr__(self) -> str:
        told = ", ".join(f"{name} {spanned(b)}" for name, b in {**self.arms, "change": self.change}.items())
        return f"<Rate: P({self.outcome}) of {self.category or 'all'}: {told}>"

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        told = {name: self.change.info.get(name) for name in ("p", "adjusted", "method", "prompts")}
        named = {"outcome": self.outcome, "category": self.category, **self.arms}
        return encode({**named, "change": self.change, "beyond_control": self.beyond, **told})


def rates(arms: Mapping[str, Rollouts], outcome: str, *, level: float = 0.95) -> list[Rate]:
    """Share of an outcome over all prompts, then by category.

    Parameters
    ----------
    arms : mapping of name -> Rollouts
        "before", "after" and perhaps "control", judged, of the same prompts.
    outcome : str
    level : float
        Of every interval.

    Returns
    -------
    list of Rate

    Raises
    ------
    InputError
        Answers that are not judged, or other prompts.

    Notes
    -----
    Intervals of changes are those of `markovsafety.evidence.compare`.
    """
    tables = {name: _by_prompt(rolls, outcome) for name, rolls in arms.items()}
    prompts, category = tables["before"][0], tables["before"][1]
    if any(not np.array_equal(t[0], prompts) for t in tables.values()):
        raise InputError(
            "the arms have other prompts",
            cause="a change is paired by prompt",
            next="sample all of them with the same prompts",
        )
    names: list[str | None] = [None, *np.unique(category).tolist()]
    names = names if len(names) > 2 else [None]
    out = []
    for name in names:
        which = np.ones(len(prompts), bool) if name is None else category == name
        cells = {arm: (events[which], totals[which]) for arm, (_, _, events, totals) in tables.items()}
        shown = {arm: clustered(*cell, level, f"P({outcome})") for arm, cell in cells.items()}
        moved = _change(cells["before"], cells["after"], level, f"change of P({outcome})")
        beyond = None
        if "control" in cells:
            beyond = _change(cells["control"], cells["after"], level, f"P({outcome}), after - control")
        out.append(Rate(outcome, name, shown, moved, beyond))
    tested = out[1:] or out
    for rate, q in zip(tested, benjamini_hochberg(np.array([r.change.info["p"] for r in tested]))):
        rate.change.info["adjusted"] = float(q)
    return out


def came_to(rolls: Rollouts, outcome: str) -> NDArray:
    """Which answers came to an outcome, bool (rollouts,).

    Raises
    ------
    InputError
        There is no such outcome.
    """
    if outcome not in CODES:
        raise InputError(
            f"there is no outcome {outcome!r}", cause=f"outcomes are {', '.join(OUTCOMES)}", next="name one of these"
        )
    return rolls.outcome == CODES[outcome]


def _by_prompt(rolls: Rollouts, outcome: str) -> tuple[NDArray, NDArray, NDArray, NDArray]:
    """Prompts, their categories, and events and totals of each."""
    if (rolls.outcome == NOT_JUDGED).any():
        raise InputError(
            "answers are not judged",
            cause="a share of an outcome needs the outcome of every answer",
            next="sample with judge=",
        )
    prompts, first, row = np.unique(rolls.prompt_id, return_index=True, return_inverse=True)
    row = row.reshape(-1)
    totals = np.bincount(row, rolls.weight, len(prompts))
    events = np.bincount(row, rolls.weight * came_to(rolls, outcome), len(prompts))
    return prompts, rolls.category[first].astype(str), np.minimum(events, totals), totals


def _change(a: tuple[NDArray, NDArray], b: tuple[NDArray, NDArray], level: float, name: str) -> Bound:
    lower, upper, p, method = change(*a, *b, level, same=True)
    value = float(b[0].sum() / b[1].sum() - a[0].sum() / a[1].sum())
    lower, upper = min(float(lower), value), max(float(upper), value)
    info = {"name": name, "p": float(p), "method": METHODS[int(method)], "prompts": len(a[0])}
    return Bound(value, lower, upper, level, {"sampling": (upper - lower) / 2}, None, info)
