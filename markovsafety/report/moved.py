"""What moved the harm between two models: how much at every depth, and through which tokens and states."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from ..analysis import ALL, Analysis
from ..bound import Bound
from ..errors import MarkovsafetyError
from ..evidence import compare
from ..evidence.positions import by_position
from ..hitting import attribute
from ..interventions.chain_changes import aligned
from ..plot import state_text
from .drawing import Frame, plain, ticks
from .figures import FORCED, PANEL, Figure
from .words import cell, forced, number, text

__all__ = ["Moved", "drawn", "moved"]

POSITIONS = 10  # told one by one
STATES = 8  # with the largest shares


@dataclass(frozen=True)
class Moved:
    """The change from one model to another.

    Parameters
    ----------
    before, after : str
    change : dict of int to Bound
        Of P(harm), by number of forced tokens.
    positions : array, shape (n,)
        Contribution of the tokens at position 0, 1, ... to the change without forcing; the last from there on. Empty
        where there is no attribution.
    states : list of (str, float)
        The states with the largest contributions, and what is left.
    note : str
        Why there is no attribution; empty where there is one.
    """

    before: str
    after: str
    change: dict[int, Bound]
    positions: NDArray
    states: list[tuple[str, float]]
    note: str

    @property
    def total(self) -> float:
        """The change without forcing, which positions and states add up to."""
        return float(self.positions.sum())

    def sentence(self) -> str:
        """What changed, and where in the answer, in words."""
        first = min(self.change)
        b = self.change[first]
        where = "without forcing" if first == 0 else f"after {forced(first)}"
        verb = "falls" if b.upper < 0 else "rises" if b.lower > 0 else "changes"
        size = cell(-b.value, -b.upper, -b.lower) if verb == "falls" else text(b) if verb == "rises" else signed(b)
        said = f"From {self.before} to {self.after}, harm {where} {verb} by {size}"
        if verb == "changes":
            said += ", which may be chance"
        top = max(self.change, key=lambda k: abs(self.change[k].value))
        if top != first:
            said += f"; the largest change is {signed(self.change[top])}, after {forced(top)}"
        if self.total and verb != "changes":
            share = f"{self.positions[0] / self.total:.0%}"
            said += f". In the estimated chains {share} of the change without forcing is made by the first token"
        return said + "."


def signed(b: Bound) -> str:
    """A change with its sign and interval: ``−0.42 [−0.45, −0.38]``."""
    value, lower, upper = (
        f"{'+' if v > 0 else '−' if v < 0 else ''}{number(abs(v))}" for v in (b.value, b.lower, b.upper)
    )
    return f"{value} [{lower}, {upper}]"


def moved(analyses: Sequence[Analysis]) -> list[Moved]:
    """How every other model differs from the first one.

    Parameters
    ----------
    analyses : sequence of Analysis
        Those without a depth in common with the first are left out.
    """
    return [m for other in analyses[1:] if (m := _moved(analyses[0], other)) is not None]


def _moved(before: Analysis, after: Analysis) -> Moved | None:
    if before.tally is None or after.tally is None:
        return None
    level = next(iter(before.harm[ALL].values())).level
    try:
        rows = compare(before.tally, after.tally, level=level).table
    except MarkovsafetyError:
        return None
    names = ("difference", "difference_lower", "difference_upper")
    change = {}
    for r in rows:
        if r["category"] is None:
            value, lower, upper = (float(r[n]) for n in names)
            change[r["k"]] = Bound(value, lower, upper, level)
    if not change:
        return None
    found = {"before": before.name, "after": after.name, "change": change}
    chains: list[Any] = [before.chain, after.chain]
    if None in chains:
        return Moved(**found, positions=np.empty(0), states=[], note="one of them has no chain")
    try:
        both = aligned(*chains)
        shares, positions = attribute(*both, "harm"), by_position(*both)
    except MarkovsafetyError as error:
        return Moved(**found, positions=np.empty(0), states=[], note=f"{error.fact} ({error.cause})")
    return Moved(**found, positions=_first(positions), states=_states(shares, both[0].states, before.words), note="")


def _first(positions: NDArray) -> NDArray:
    """The first positions, and the sum of the others."""
    return (
        positions if len(positions) <= POSITIONS + 1 else np.append(positions[:POSITIONS], positions[POSITIONS:].sum())
    )


def _states(shares: NDArray, labels: Sequence[Any], words: Any) -> list[tuple[str, float]]:
    order = [i for i in np.argsort(-np.abs(shares), kind="stable").tolist() if shares[i] != 0]
    told = [(state_text(labels[i], words), float(shares[i])) for i in order[:STATES]]
    rest = order[STATES:]
    return told + ([(f"{len(rest):,} other states", float(shares[rest].sum()))] if rest else [])


def drawn(found: Sequence[Moved]) -> dict[str, Figure]:
    """The figures of the changes, by name; of none there are none."""
    if not found:
        return {}
    figures = {"moved": _by_depth(found)}
    if told := [m for m in found if len(m.positions)]:
        figures["positions"] = _by_position(told)
    if told := [m for m in found if m.states]:
        figures["states"] = _by_state(told)
    return figures


def _range(values: Sequence[float]) -> tuple[float, float]:
    """An axis that holds 0 and all values, with a margin."""
    low, high = min([0.0, *values]), max([0.0, *values])
    edge = 0.08 * max(high - low, 1e-3)
    return low - edge if low < 0 else 0.0, high + edge if high > 0 or low == 0 else 0.0


def _title(m: Moved) -> str:
    return f"{m.before} → {m.after}"


def _part(share: float, m: Moved) -> str:
    return f"{share:+.3f} of {m.total:+.3f}".replace("-", "−")


def _by_depth(found: Sequence[Moved]) -> Figure:
    span = _range([v for m in found for b in m.change.values() for v in (b.lower, b.upper)])
    panels: list[tuple[str, Markup]] = []
    rows: list[tuple[Any, ...]] = [("before", "after", "forced_tokens", "change", "lower", "upper", "level")]
    for m in found:
        depths = sorted(m.change)
        frame = Frame(PANEL, 200, (-0.5, len(depths) - 0.5), span, left=54)
        frame.y_axis("change of harm", 5)
        frame.x_axis([(i, str(k)) for i, k in enumerate(depths)], FORCED)
        for i, k in enumerate(depths):
            b = m.change[k]
            kind = "refusal" if b.upper < 0 else "harm" if b.lower > 0 else "grey"
            shape = {"refusal": "v", "harm": "^"}.get(kind, "o")
            frame.point(i, (b.value, b.lower, b.upper), f"{_title(m)}, {forced(k)}: {signed(b)}", kind, shape)
            rows.append((m.before, m.after, k, b.value, b.lower, b.upper, b.level))
        panels.append((_title(m), frame.svg(m.sentence())))
    return Figure(panels, rows)


def _by_position(found: Sequence[Moved]) -> Figure:
    panels: list[tuple[str, Markup]] = []
    rows: list[tuple[Any, ...]] = [("before", "after", "position", "and_later", "contribution")]
    span = _range([float(v) for m in found for v in m.positions])
    for m in found:
        last = len(m.positions) - 1
        frame = Frame(PANEL, 190, (-0.5, last + 0.5), span, left=54)
        frame.y_axis("contribution", 4)
        labels = [f"{t + 1}{'+' if t == last else ''}" for t in range(last + 1)]
        frame.x_axis(list(enumerate(labels)), "position of the token in the answer")
        for t, share in enumerate(map(float, m.positions)):
            where = f"from token {t + 1} on" if t == last else f"token {t + 1}"
            said = f"{_title(m)}, {where}: {_part(share, m)}"
            frame.box((t - 0.4, t + 0.4), (0, share), said, "harm" if share > 0 else "refusal")
            rows.append((m.before, m.after, t + 1, t == last, share))
        top = int(np.argmax(np.abs(m.positions)))
        where = f"from token {top + 1} on" if top == last else f"by token {top + 1}"
        part = _part(float(m.positions[top]), m)
        alt = f"{_title(m)}: the largest part of the change, {part}, is made {where}."
        panels.append((_title(m), frame.svg(alt)))
    return Figure(panels, rows)


def _by_state(found: Sequence[Moved]) -> Figure:
    panels: list[tuple[str, Markup]] = []
    rows: list[tuple[Any, ...]] = [("before", "after", "state", "contribution")]
    for m in found:
        span = _range([v for _, v in m.states])
        long = min(170, 16 + 6.4 * max(len(plain(s, 24)) for s, _ in m.states))
        frame = Frame(PANEL, 52 + 24 * len(m.states), span, (len(m.states) - 0.5, -0.5), left=long, right=26)
        frame.x_axis(
            [(v, f"{v:+.3g}".replace("-", "−") if v else "0") for v in ticks(*span, 4)],
            "contribution to the change",
            True,
        )
        for i, (state, share) in enumerate(m.states):
            frame.text(long - 8, frame.at(0, i)[1] + 4, plain(state, 24), "tick", "end")
            said = f"{_title(m)}, after “{state}”: {_part(share, m)}"
            frame.box((0, share), (i - 0.36, i + 0.36), said, "harm" if share > 0 else "refusal")
            rows.append((m.before, m.after, state, share))
        state, share = m.states[0]
        panels.append((_title(m), frame.svg(f"{_title(m)}: most through “{state}”, {_part(share, m)}.")))
    return Figure(panels, rows)
