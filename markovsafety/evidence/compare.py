"""compare: what changed between two models, depth by depth and category by category, and through which states."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..bound import Bound, encode
from ..chains import Chain
from ..errors import InputError
from ..hitting import attribute
from .cells import cell, tally_of
from .paired import benjamini_hochberg, paired
from .positions import by_position

__all__ = ["Comparison", "compare"]


@dataclass(frozen=True, eq=False)
class Comparison:
    """Change of harm from `before` to `after`.

    Parameters
    ----------
    table : list of dict
        One row per prefill depth and category (None: all; no other row if every rollout has the category "all"): k,
        category, before and after (each with _lower and _upper), difference = after - before (_lower, _upper), p,
        adjusted (p after Benjamini-Hochberg over all category rows; None in pooled rows beside them), flagged, prompts
        (before, after), method ("paired t", "paired MOVER" or "MOVER").
    level : float
        Level of the intervals.
    rate : float
        False discovery rate of the flags.
    attribution : array or None
        Change of harm at the start by state, shape (n,) or (layer, n), which sums to the change. Only between chains on
        the same states.
    states : tuple or None
        Labels of the attribution.
    notes : tuple of str
        What was left out and why.
    positions : array or None
        The same change by position: entry t is what the transitions out of the t-th state of an answer (0: the start
        law and the first step) contribute, the last entry everything from there on.

    Examples
    --------
    >>> from markovsafety.exercises import case
    >>> found: ms.evidence.Comparison = ms.compare(case(0).rolls, case(1).rolls)
    >>> print(found.difference(2))
    change of P(harm) (all, k = 2) = -0.389   95 % [-0.449, -0.328]
        because: sampling 0.06; judge, lumping, model, truncation, rounding not assessed
    >>> [row["k"] for row in found.flagged]
    [1, 2, 3]
    """

    table: list[dict[str, Any]]
    level: float
    rate: float
    attribution: NDArray | None = None
    states: tuple[Any, ...] | None = None
    notes: tuple[str, ...] = field(default_factory=tuple)
    positions: NDArray | None = None

    def difference(self, k: int = 0, category: str | None = None) -> Bound:
        """The change of harm after k forced tokens, as one number with its interval.

        Parameters
        ----------
        k : int
        category : str, optional
            None: all categories together.

        Returns
        -------
        Bound
            `info` has p, adjusted, flagged, prompts and method of the row, and a note where one prompt is all there is.

        Raises
        ------
        InputError
            If there is no such row.
        """
        for row in self.table:
            if row["k"] == k and row["category"] == category:
                d, lower, upper = (row[f"difference{end}"] for end in ("", "_lower", "_upper"))
                where = "all" if category is None else category
                info = {"name": f"change of P(harm) ({where}, k = {k})"}
                info |= {name: row[name] for name in ("p", "adjusted", "flagged", "prompts", "method")}
                if min(row["prompts"]) < 2:
                    info["note"] = "one prompt only: the variance between prompts is not assessed"
                return Bound(d, lower, upper, self.level, {"sampling": (upper - lower) / 2}, None, info)
        known = sorted({row["k"] for row in self.table}), sorted({row["category"] or "all" for row in self.table})
        raise InputError(
            f"Nothing was compared at k = {k}, category {category!r}.",
            cause=f"There are k = {', '.join(map(str, known[0]))} and the categories {', '.join(known[1])}.",
            next="Ask for one of these (category=None: all together).",
            partial=self.table,
        )

    @property
    def flagged(self) -> list[dict[str, Any]]:
        """Category rows (pooled ones where there are no others) that changed, at the false discovery rate `rate`."""
        return [row for row in self.table if row["flagged"]]

    def __str__(self) -> str:
        rows = [["k", "category", "before", "after", "change", ""]]
        for r in self.table:
            spans = [f"{r[n]:.3f} [{r[n + '_lower']:.3f}, {r[n + '_upper']:.3f}]" for n in ("before", "after")]
            change = f"{r['difference']:+.3f} [{r['difference_lower']:+.3f}, {r['difference_upper']:+.3f}]"
            rows.append([str(r["k"]), r["category"] or "all", *spans, change, "changed" if r["flagged"] else ""])
        sizes = [max(len(row[j]) for row in rows) for j in range(len(rows[0]))]
        lines = [f"P(harm), {100 * self.level:g} % intervals; flags at a false discovery rate of {self.rate:g}"]
        lines += ["  " + "  ".join(c.rjust(s) for c, s in zip(row, sizes)).rstrip() for row in rows]
        if self.attribution is not None and self.states is not None:
            value = self.attribution.sum(axis=0) if self.attribution.ndim > 1 else self.attribution
            for i in np.argsort(-np.abs(value))[:5]:
                if value[i] != 0:
                    lines.append(f"  through state {self.states[i]!r}: {value[i]:+.4f}")
        if self.positions is not None:
            lines.append(f"  by position: {_by_position(self.positions)}")
        return "\n".join(lines + [f"  {note}" for note in self.notes])

    __repr__ = __str__

    def to_json(self) -> dict[str, Any]:
        """Plain data: table, level, rate, attribution, states, notes, positions."""
        names = ("table", "level", "rate", "attribution", "states", "notes", "positions")
        return {name: encode(getattr(self, name)) for name in names}


def compare(before: Any, after: Any, *, level: float = 0.95, rate: float = 0.05) -> Comparison:
    """Compare the harm of two models.

    Parameters
    ----------
    before, after : Rollouts, Counts or estimated Chain
        Of the same prompts where possible: then the difference is paired by prompt.
    level : float
        Level of the intervals.
    rate : float
        False discovery rate of the flags over categories and depths.

    Returns
    -------
    Comparison

    Raises
    ------
    InputError
        If one of them remembers no rollouts, or no depth was measured in both.

    Notes
    -----
    The interval of a row is Student's over prompts of the paired, linearised differences where at least 10 prompts are
    harmful (and 10 harmless) on both sides; else, or where the prompts differ, Newcombe's from the two clustered
    intervals, which is never [0, 0] (see `markovsafety.evidence.paired.change`). The p-value is 1 minus the largest
    level at which this interval leaves out 0, so table and flags agree. Flags are by Benjamini and Hochberg.

    Between chains on the same states the change of harm at the start is split up exactly, by the identity
    ``h' - h = N (P' - P) h' = N' (P' - P) h``, whose two forms are averaged: by the state whose row changed
    (`attribute`), and by the position of the token at which it was left.

    Examples
    --------
    Two models, asked the same with the same tokens forced:

    >>> from markovsafety.exercises import case
    >>> ms.compare(case(0).rolls, case(1).rolls)
    P(harm), 95 % intervals; flags at a false discovery rate of 0.05
      k  category                before                 after                   change
      0       all  0.013 [0.005, 0.026]  0.008 [0.003, 0.020]  -0.004 [-0.020, +0.011]
      1       all  0.118 [0.082, 0.162]  0.002 [0.000, 0.064]  -0.116 [-0.160, -0.044]  changed
      2       all  0.402 [0.341, 0.465]  0.014 [0.004, 0.033]  -0.389 [-0.449, -0.328]  changed
      3       all  0.424 [0.363, 0.487]  0.116 [0.086, 0.151]  -0.308 [-0.377, -0.240]  changed
      4       all  0.438 [0.390, 0.486]  0.407 [0.361, 0.455]  -0.030 [-0.096, +0.035]
      6       all  0.482 [0.421, 0.543]  0.475 [0.417, 0.534]  -0.007 [-0.087, +0.072]
      8       all  0.549 [0.484, 0.612]  0.522 [0.466, 0.577]  -0.027 [-0.118, +0.064]
    """
    if not (0 < rate < 1 and 0 < level < 1):
        raise InputError(f"rate {rate}, level {level}.", cause="Both lie between 0 and 1.", next="Correct them.")
    sides = [tally_of(before), tally_of(after)]
    depths = [np.unique(t.prefill).tolist() for t in sides]
    common = [k for k in depths[0] if k in depths[1]]
    if not common:
        raise InputError(
            "No prefill depth was measured in both.",
            cause=f"Before: {', '.join(map(str, depths[0]))}; after: {', '.join(map(str, depths[1]))}.",
            next="Sample both at the same depths.",
        )
    names = sorted(set(sides[0].category.tolist()) & set(sides[1].category.tolist()))
    notes = _left_out(sides, depths, names)
    groups = [] if names == ["all"] and not any((t.category != "all").any() for t in sides) else names
    table = []
    for k in common:
        for name in [None, *groups]:
            cells = [cell(t, k, name) for t in sides]
            if all(len(c.prompt_id) for c in cells):
                table.append(_row(cells, k, name, level))
    tested = [row for row in table if row["category"] is not None or not groups]
    for row, q in zip(tested, benjamini_hochberg(np.array([row["p"] for row in tested]))):
        row["adjusted"], row["flagged"] = float(q), bool(q <= rate)
    if any(min(row["prompts"]) < 2 for row in table):
        notes = (*notes, "one prompt only in some rows: the variance between prompts is not assessed there")
    attribution, states, positions = None, None, None
    if isinstance(before, Chain) and isinstance(after, Chain):
        if why := _other_states(before, after):
            notes = (*notes, f"no attribution to states and positions: {why}")
        else:
            attribution, states = attribute(before, after, "harm"), tuple(before.states)
            positions = by_position(before, after)
    return Comparison(table, level, rate, attribution, states, notes, positions)


def _row(cells: list[Any], k: int, name: str | None, level: float) -> dict[str, Any]:
    rates = [c.bound(level) for c in cells]
    lower, upper, p, method = paired(cells[0], cells[1], level)
    row: dict[str, Any] = {"k": k, "category": name}
    for side, b in zip(("before", "after"), rates):
        row |= {side: b.value, f"{side}_lower": b.lower, f"{side}_upper": b.upper}
    d = rates[1].value - rates[0].value
    row |= {"difference": d, "difference_lower": min(lower, d), "difference_upper": max(upper, d), "p": p}
    prompts = [len(c.prompt_id) for c in cells]
    return row | {"adjusted": None, "flagged": False, "prompts": prompts, "method": method}


def _left_out(sides: list[Any], depths: list[list[int]], names: list[str]) -> tuple[str, ...]:
    notes = []
    lonely = sorted(set(depths[0]) ^ set(depths[1]))
    if lonely:
        notes.append(f"measured on one side only: prefill {', '.join(map(str, lonely))}")
    other = sorted((set(sides[0].category.tolist()) | set(sides[1].category.tolist())) - set(names))
    if other:
        notes.append(f"on one side only: category {', '.join(other)}")
    return tuple(notes)


def _other_states(a: Chain, b: Chain) -> str:
    """Why the rows of two chains cannot be compared; empty if they can."""
    if a.start is None or b.start is None:
        return "a chain has no start law; estimate it from rollouts without prefill"
    if a.n_layers != b.n_layers:
        return f"one chain has {a.n_layers} layers, the other {b.n_layers}; estimate both alike"
    if list(a.states) == list(b.states):
        return ""
    common = len(set(a.states) & set(b.states))
    if common == 0:
        return "the chains have different states, none in common; estimate both with one state map"
    return (
        f"the chains have different states, {common} of {len(a.states)} and {len(b.states)} in common; "
        "use one state map, and count both with the states of either"
    )


def _by_position(shares: NDArray) -> str:
    """The few positions that matter most, in order."""
    top = sorted(np.argsort(-np.abs(shares), kind="stable")[:5].tolist())
    last = len(shares) - 1
    words = [f"{'from ' if t == last else ''}{t}: {shares[t]:+.4f}" for t in top if shares[t] != 0]
    return ", ".join(words) if words else "no change"
