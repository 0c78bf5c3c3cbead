"""Held-out prefill: the harm that a chain predicts after k forced tokens, against what was measured there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..bound import Bound
from ..chains import Chain
from ..chains.states import Asked, label_at
from ..hitting import hitting_probability
from ..outcomes import CODES
from .cells import Cell, forced
from .paired import cluster_t, rare
from .walks import look_up, renamed

__all__ = ["Predicted", "at_depth", "misfit_of", "predictions", "verdict_of"]


@dataclass(frozen=True, eq=False)
class Predicted:
    """What a chain says of harm from every state.

    Parameters
    ----------
    chain : Chain
    harm : Bound
        P(harm).
    either : Bound
        P(harm or truncated): the chain's answers that were cut off may have been harmful.
    """

    chain: Chain
    harm: Bound
    either: Bound


def predictions(chain: Chain, level: float) -> Predicted:
    """Solve the chain once for all depths."""
    harm = hitting_probability(chain, "harm", level=level)
    if "truncated" not in chain.outcomes or not chain.mask("truncated").any():
        return Predicted(chain, harm, harm)
    return Predicted(chain, harm, hitting_probability(chain, ["harm", "truncated"], level=level))


def _prefix_harm(said: Predicted, rolls: Any, rows: NDArray, states: Any, k: int) -> NDArray:
    """After each rollout's first k tokens: predicted harm, its lower end, the upper end of harm or truncated, and the
    probability of truncated, shape (4, m); nan, 0, 1 and 0 where the state was never seen.
    """
    offsets, prompt = np.asarray(rolls.offsets), np.asarray(rolls.prompt_id)[rows]
    begin, length = offsets[:-1][rows], np.diff(offsets)[rows]
    told = getattr(rolls, "columns", {}), begin, length, np.asarray(rolls.prefill)[rows], len(rolls.tokens)
    asked = Asked(np.arange(len(rows)), prompt, np.asarray(rolls.category, dtype=str)[rows], *told)
    tokens, at = np.asarray(rolls.tokens), np.full(len(begin), k, dtype=np.int64)
    codes, labels = label_at(states, tokens, begin, at, asked)
    harm, either = (look_up(said.chain, b, renamed(labels), k)[:, codes] for b in (said.harm, said.either))
    return np.stack([harm[0], harm[1], either[2], np.nan_to_num(np.maximum(either[0] - harm[0], 0.0))])


def at_depth(
    said: Predicted, rolls: Any, states: Any, k: int, margin: float, level: float, tests: int
) -> tuple[dict[str, Any], tuple[float, float]]:
    """Row of the table of `markovsafety.check` at one depth, and its interval corrected for `tests` depths."""
    rows = np.flatnonzero(np.asarray(rolls.prefill) == k)
    weight = np.asarray(rolls.columns.get("weight", np.ones(len(rolls.prefill))), dtype=np.float64)[rows]
    rows, weight = rows[weight > 0], weight[weight > 0]
    predicted, least, most, cut = _prefix_harm(said, rolls, rows, states, k)
    outcome = np.asarray(rolls.outcome)[rows]
    prompts, p = np.unique(np.asarray(rolls.prompt_id)[rows], return_inverse=True)
    add = lambda x: np.bincount(p.reshape(-1), x * weight, len(prompts))  # noqa: E731
    ends = [add(outcome == CODES[name]) for name in ("harm", "truncated")]
    c = Cell(prompts, ends[0], add(np.ones(len(rows))), ends[1])
    seen = np.isfinite(predicted)
    typical = float(predicted[seen] @ weight[seen] / weight[seen].sum()) if seen.any() else 0.5
    filled, low = (add(np.where(seen, predicted, fill)) for fill in (typical, 0.0))
    high = add(np.where(seen, np.minimum(predicted + cut, 1.0), 1.0))
    total = c.totals.sum()
    value = float(filled.sum() / total)
    raw, hidden = c.bound(level), _with_cut(c).bound(level)
    lower, upper = _difference(low, high, c, level)
    far = _difference(low, high, c, 1 - (1 - level) / tests)
    row = {
        "k": k,
        "predicted": value,
        "predicted_lower": min(float(least @ weight / total), value),
        "predicted_upper": max(float(most @ weight / total), value),
        "measured": raw.value,
        "measured_lower": raw.lower,
        "measured_upper": max(hidden.upper, raw.upper),
        "difference": value - raw.value,
        "difference_lower": lower,
        "difference_upper": upper,
        "unseen": float(1 - weight[seen].sum() / total),
        "truncated": float(c.truncated.sum() / total),
        "predicted_truncated": float(cut @ weight / total),
        "prompts": len(prompts),
        "rollouts": len(rows),
        "verdict": "cannot tell",
    }
    if k == 0:
        row["verdict"] = "not counted"
    elif lower >= -margin and upper <= margin:
        row["verdict"] = "within"
    elif far[0] > margin or far[1] < -margin:
        row["verdict"] = "off"
    return row, far


def _with_cut(c: Cell) -> Cell:
    """The cell as if every rollout that was cut off had been harmful."""
    return Cell(c.prompt_id, np.minimum(c.events + c.truncated, c.totals), c.totals, np.zeros(len(c.totals)))


def _difference(low: NDArray, high: NDArray, c: Cell, level: float) -> tuple[float, float]:
    """Interval of predicted - measured, the prediction somewhere between `low` and `high` (sums by prompt), the
    measurement somewhere between harm, and harm or truncated."""
    total = c.totals.sum()
    ends = []
    for sign, filled, cell in ((-1, low, _with_cut(c)), (1, high, c)):
        mean = (filled.sum() - cell.events.sum()) / total
        half = 0.0
        if len(c.totals) > 1:
            half = cluster_t((filled - cell.events - mean * c.totals) / total, level)
        if len(c.totals) < 2 or rare(cell.events.sum(), total):
            raw = cell.bound(level)
            half = max(half, raw.value - raw.lower if sign > 0 else raw.upper - raw.value)
        ends.append(float(mean + sign * half))
    return max(ends[0], -1.0), min(ends[1], 1.0)


def misfit_of(table: list[dict[str, Any]], far: list[tuple[float, float]], level: float) -> Bound | None:
    """The largest size of a difference over the counted depths, simultaneously over them; None if none is counted."""
    counted = [(row, ends) for row, ends in zip(table, far) if row["k"] > 0]
    if not counted:
        return None
    value = max(abs(row["difference"]) for row, _ in counted)
    upper = max(max(abs(a), abs(b)) for _, (a, b) in counted)
    lower = max(max(a, -b, 0.0) for _, (a, b) in counted)
    info = {"name": "largest misfit of P(harm)", "method": "held-out prefill", "depths": [r["k"] for r, _ in counted]}
    lower, upper = min(lower, value), max(upper, value)
    return Bound(value, lower, upper, level, {"sampling": (upper - lower) / 2}, None, info)


def verdict_of(table: list[dict[str, Any]], margin: float) -> tuple[bool | None, str]:
    """Whether the chain passed, and why, in a sentence."""
    counted = [row for row in table if row["k"] > 0]
    if not counted:
        return None, (
            "Cannot tell: no held-out rollout has a prefill, and without one any chain fitted to complete rollouts "
            "repeats their harm fraction. Sample with prefill > 0."
        )
    off = [row for row in counted if row["verdict"] == "off"]
    if off:
        worst = max(off, key=lambda row: abs(row["difference"]))
        return False, (
            f"Not a fair model: harm after {_list(off)} is off by more than {margin:g} (at k = "
            f"{worst['k']} predicted {worst['predicted']:.3f}, measured {worst['measured']:.3f}). {_cause(off)}"
        )
    open_ = [row for row in counted if row["verdict"] == "cannot tell"]
    if open_:
        unseen = max(row["unseen"] for row in open_)
        vague, spread = (
            max((r[f"{n}_upper"] - r[f"{n}_lower"]) / 2 for r in open_) for n in ("predicted", "difference")
        )
        why = "more held-out prompts would tell"
        if vague > max(margin, spread):
            why = f"the chain itself knows harm there only to about {vague:.2g}: fit on more rollouts"
        hidden = max(max(row["truncated"], row["predicted_truncated"]) for row in open_)
        if hidden > margin / 2:
            why = f"up to {100 * hidden:.0f} % of the answers were cut off by the token limit: sample longer ones"
        if unseen > margin / 2:
            why = f"up to {100 * unseen:.0f} % of the prefixes end in states never seen: fit on more rollouts"
        return (
            None,
            f"Cannot tell: after {_list(open_)} the difference is not known to {margin:g}; {why}.",
        )
    worst = max(counted, key=lambda row: abs(row["difference"]))
    return True, (
        f"A fair model: harm after {_list(counted)} is predicted within {margin:g} "
        f"(largest difference {worst['difference']:+.3f} at k = {worst['k']})."
    )


def _cause(rows: list[dict[str, Any]]) -> str:
    if all(row["predicted_lower"] <= row["measured"] <= row["predicted_upper"] for row in rows):
        return "The measurement lies within what its own few rollouts allow: fit on more, or on prefilled ones too."
    return "Its states forget something that matters there: use a longer memory or a judged prefix."


def _list(rows: list[dict[str, Any]]) -> str:
    return forced(row["k"] for row in rows)
