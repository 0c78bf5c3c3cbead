"""check: is this chain a fair model of what the language model does, on evidence it has not seen?

A chain fitted to complete rollouts from one start predicts its own harm fraction there *identically*, whatever its
states are: the flow of counts is conserved. Agreement at the start says nothing. What can fail, and therefore counts,
is a start that the fit did not average over: the state in which a forced prefix ends.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..bound import Bound, encode
from ..chains import Chain, KGram, Position
from ..chains.states import label_at
from ..errors import InputError
from ..hitting import hitting_probability
from ..outcomes import CODES, OUTCOMES
from .cells import Cell, forced, is_rollouts, tally_of
from .paired import cluster_t, rare

__all__ = ["Check", "check"]

IDENTITY = "not counted: with nothing forced, any chain fitted to such rollouts repeats their harm fraction"


@dataclass(frozen=True, eq=False)
class Check:
    """What held-out rollouts say of a chain.

    Parameters
    ----------
    passed : bool or None
        True: within the margin at every counted depth. False: beyond it at one. None: cannot tell.
    table : list of dict
        One row per prefill depth: k, predicted (predicted_lower, predicted_upper: what the chain's own evidence allows,
        0 to 1 where prefixes end in states never seen), measured (measured_lower, measured_upper), difference =
        predicted - measured (difference_lower, difference_upper), unseen (share of rollouts whose prefix ends in a
        state never seen), prompts, rollouts, verdict ("within", "off", "cannot tell" or "not counted"), and with a
        planted truth: planted, predicted_minus_planted.
    verdict : str
        The finding in a sentence, warnings included.
    margin, level : float
        What "within" means, and the level of the intervals.
    curve : dict or None
        Of held-out rollouts without prefill: t (tokens), predicted and observed P(harm within t tokens), gap (the
        largest distance), at (its t), and noise, the distance that n independent rollouts exceed with probability 1 -
        level.
    warnings : tuple of str
    """

    passed: bool | None
    table: list[dict[str, Any]]
    verdict: str
    margin: float
    level: float
    curve: dict[str, Any] | None = None
    warnings: tuple[str, ...] = field(default_factory=tuple)

    def __str__(self) -> str:
        head = ["k", "predicted", "measured", "difference", "unseen", "prompts", "verdict"]
        planted = any("planted" in row for row in self.table)
        rows = [head + ["planted"] * planted]
        for r in self.table:
            cells = [str(r["k"]), _span(r, "predicted"), _span(r, "measured"), _span(r, "difference", "+.3f")]
            cells += [f"{100 * r['unseen']:.0f} %", str(r["prompts"]), r["verdict"]]
            rows.append(cells + ([f"{r['planted']:.3f}"] if planted else []))
        sizes = [max(len(row[j]) for row in rows) for j in range(len(rows[0]))]
        lines = [self.verdict] + ["  " + "  ".join(c.rjust(s) for c, s in zip(row, sizes)) for row in rows]
        if any(r["k"] == 0 for r in self.table):
            lines.append(f"  k = 0 is {IDENTITY}.")
        if self.curve is not None:
            lines.append(
                f"  time of the first hit: largest gap {self.curve['gap']:.3f} at {self.curve['at']} tokens "
                f"(sampling alone: {self.curve['noise']:.3f})"
            )
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """Plain data: passed, verdict, table, margin, level, curve, warnings."""
        names = ("passed", "verdict", "table", "margin", "level", "curve", "warnings")
        return {name: encode(getattr(self, name)) for name in names}


def _span(row: dict[str, Any], name: str, form: str = ".3f") -> str:
    ends = row[f"{name}_lower"], row[f"{name}_upper"]
    text = format(row[name], form)
    return text if ends[0] == ends[1] == row[name] else f"{text} [{ends[0]:{form}}, {ends[1]:{form}}]"


def check(
    chain: Chain,
    held_out: Any,
    *,
    margin: float = 0.05,
    level: float = 0.95,
    states: Any = None,
    truth: Mapping[int, float] | ArrayLike | None = None,
) -> Check:
    """Test a chain on held-out rollouts.

    Parameters
    ----------
    chain : Chain
        Usually estimated.
    held_out : Rollouts
        Judged, not used in the fit, with several prefill depths.
    margin : float
        Difference of probabilities that is small enough to call the chain fair.
    level : float
        Level of the intervals.
    states : StateMap, optional
        What the chain's states mean; taken from the chain where it can be (k-grams, positions).
    truth : mapping from k to probability, or array in the order of the sorted depths, optional
        Planted harm at every depth, reported beside the prediction.

    Returns
    -------
    Check

    Raises
    ------
    InputError
        If the rollouts are not judged, or the state map is unknown.

    Notes
    -----
    For every prefill depth k the prediction is the mean, over the held-out prefixes, of the chain's harm probability at
    the state that the prefix ends in; the measurement is the share of harmful continuations. Both are paired by prompt,
    and the difference has a t-interval over prompts (where fewer than 5 rollouts are harmful, or harmless, the
    clustered Clopper-Pearson interval of the measurement, if wider). A prefix that ends in a state never seen predicts
    anything from 0 to 1, and that share widens the interval. The chain's own numbers are taken as given: the test asks
    whether they are right, not whether they had to be.

    It passes if the interval lies within the margin at every depth (two one-sided tests by inclusion: all depths must
    pass, so no correction is needed), and fails if at some depth the interval, Bonferroni-corrected over depths, lies
    wholly outside. Depth 0 is not counted: there any chain fitted to complete rollouts repeats their harm fraction, so
    only sampling noise could differ.
    """
    if not is_rollouts(held_out):
        raise InputError(
            f"held_out is {type(held_out).__name__}.",
            cause="A check replays token prefixes through the chain's states.",
            next="Pass judged Rollouts that the chain was not fitted on.",
        )
    if not (0 < margin < 1 and 0 < level < 1):
        raise InputError(f"margin {margin}, level {level}.", cause="Both lie between 0 and 1.", next="Correct them.")
    tally = tally_of(held_out)  # refuses what is not judged
    depths = np.unique(np.asarray(held_out.prefill)).tolist()
    planted = _planted(truth, depths)
    names = state_map(chain) if states is None else states
    h = hitting_probability(chain, "harm", level=level)
    tests = max(sum(k > 0 for k in depths), 1)
    table = []
    for k in depths:
        row = _row(chain, held_out, names, h, k, margin, level, tests)
        if planted:
            row |= {"planted": planted[k], "predicted_minus_planted": row["predicted"] - planted[k]}
        table.append(row)
    warnings = _warnings(chain, tally, depths)
    passed, verdict = _verdict(table, margin)
    verdict = " ".join([verdict, *(f"Warning: {w}." for w in warnings)])
    return Check(passed, table, verdict, margin, level, _curve(chain, held_out, level), warnings)


def _planted(truth: Any, depths: list[int]) -> dict[int, float]:
    if truth is None:
        return {}
    given = dict(truth) if isinstance(truth, Mapping) else dict(zip(depths, np.atleast_1d(np.asarray(truth, float))))
    size = len(given) if isinstance(truth, Mapping) else len(np.atleast_1d(np.asarray(truth)))
    if any(k not in given for k in depths) or (not isinstance(truth, Mapping) and size != len(depths)):
        raise InputError(
            f"truth has {size} values for the depths {', '.join(map(str, depths))}.",
            cause="Every held-out depth needs its planted value.",
            next="Pass a mapping from depth to probability, or an array in the order of the depths.",
        )
    return {k: float(given[k]) for k in depths}


def state_map(chain: Chain) -> Any:
    """The state map behind a chain, from what it was counted with or from its labels.

    Raises
    ------
    InputError
        If it cannot be told.
    """
    kind = getattr(chain.counts, "kind", "")
    if found := re.fullmatch(r"KGram\((\d+)\)", kind):
        return KGram(int(found[1]))
    if kind == "Position()":
        return Position()
    labels = [x for x, done in zip(chain.states, chain.outcome_mask) if not done]
    if not kind and labels and not isinstance(chain.states, range):
        grams = all(isinstance(x, (tuple, list)) and all(isinstance(t, int) for t in x) for x in labels)
        if grams and len({len(x) for x in labels}) == 1:
            return KGram(len(labels[0]))
        if all(isinstance(x, int) for x in labels):
            return Position()
    raise InputError(
        "It is not known what the states of this chain mean" + (f" ({kind})." if kind else "."),
        cause="A held-out prefix must become a state, and only k-grams and positions are recognised by themselves.",
        next="Pass the map that was counted with: check(chain, held_out, states=...).",
    )


def _prefix_harm(chain: Chain, rolls: Any, rows: NDArray, states: Any, h: Bound, k: int) -> NDArray:
    """Value, lower and upper end of the harm that the chain predicts after each rollout's first k tokens, shape (3, m).

    nan, 0 and 1 where the state was never seen.
    """
    begin = np.asarray(rolls.offsets)[:-1][rows]
    codes, labels = label_at(states, np.asarray(rolls.tokens), begin, np.full(len(begin), k, dtype=np.int64))
    here = np.array([h.value, h.lower, h.upper])
    here = here[:, min(k, chain.n_layers)] if chain.is_layered else here
    lookup = {label: i for i, label in enumerate(chain.states)}
    named = [f"after {x}" if isinstance(x, str) and x in OUTCOMES else x for x in labels]
    at = np.array([lookup.get(x, -1) for x in named], dtype=np.int64)[codes]
    return np.where(at >= 0, here[:, np.maximum(at, 0)], np.array([[np.nan], [0.0], [1.0]]))


def _row(
    chain: Chain, rolls: Any, states: Any, h: Bound, k: int, margin: float, level: float, tests: int
) -> dict[str, Any]:
    rows = np.flatnonzero(np.asarray(rolls.prefill) == k)
    weight = np.asarray(rolls.columns.get("weight", np.ones(len(rolls.prefill))), dtype=np.float64)[rows]
    rows, weight = rows[weight > 0], weight[weight > 0]
    predicted, least, most = _prefix_harm(chain, rolls, rows, states, h, k)
    harm = np.asarray(rolls.outcome)[rows] == CODES["harm"]
    prompts, p = np.unique(np.asarray(rolls.prompt_id)[rows], return_inverse=True)
    add = lambda x: np.bincount(p.reshape(-1), x * weight, len(prompts))  # noqa: E731
    c = Cell(prompts, add(harm), add(np.ones(len(rows))), np.zeros(len(prompts)))
    seen = np.isfinite(predicted)
    typical = float(predicted[seen] @ weight[seen] / weight[seen].sum()) if seen.any() else 0.5
    filled = [add(np.where(seen, predicted, fill)) for fill in (typical, 0.0, 1.0)]
    total = c.totals.sum()
    value = float(filled[0].sum() / total)
    raw = c.bound(level)
    lower, upper = _difference(filled[1], filled[2], c, level)
    row = {
        "k": k,
        "predicted": value,
        "predicted_lower": min(float(least @ weight / total), value),
        "predicted_upper": max(float(most @ weight / total), value),
        "measured": raw.value,
        "measured_lower": raw.lower,
        "measured_upper": raw.upper,
        "difference": value - raw.value,
        "difference_lower": lower,
        "difference_upper": upper,
        "unseen": float(1 - weight[seen].sum() / total),
        "prompts": len(prompts),
        "rollouts": len(rows),
        "verdict": "cannot tell",
    }
    far = _difference(filled[1], filled[2], c, 1 - (1 - level) / tests)
    if k == 0:
        row["verdict"] = "not counted"
    elif lower >= -margin and upper <= margin:
        row["verdict"] = "within"
    elif far[0] > margin or far[1] < -margin:
        row["verdict"] = "off"
    return row


def _difference(low: NDArray, high: NDArray, c: Cell, level: float) -> tuple[float, float]:
    """Interval of predicted - measured, the prediction somewhere between `low` and `high` (sums by prompt)."""
    total = c.totals.sum()
    ends = []
    for sign, filled in ((-1, low), (1, high)):
        mean = (filled.sum() - c.events.sum()) / total
        half = 0.0
        if len(c.totals) > 1:
            half = cluster_t((filled - c.events - mean * c.totals) / total, level)
        if len(c.totals) < 2 or rare(c.events.sum(), total):
            raw = c.bound(level)
            half = max(half, raw.value - raw.lower if sign > 0 else raw.upper - raw.value)
        ends.append(float(mean + sign * half))
    return ends[0], ends[1]


def _verdict(table: list[dict[str, Any]], margin: float) -> tuple[bool | None, str]:
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


def _warnings(chain: Chain, held: Any, depths: list[int]) -> tuple[str, ...]:
    """Whether the held-out rollouts seem to be among those of the fit: prompt by prompt the same counts."""
    if chain.evidence is None:
        return ()
    fit = tally_of(chain)
    key = lambda t, i: (int(t.prompt_id[i]), str(t.category[i]), int(t.prefill[i]), tuple(t.outcomes[i]))  # noqa: E731
    known = {key(fit, i) for i in range(len(fit))}
    where = [i for i in range(len(held)) if held.prefill[i] > 0 or max(depths) == 0]
    if where and all(key(held, i) in known for i in where):
        return (
            "prompt by prompt the held-out rollouts have the outcomes of those that the chain was fitted on; if they "
            "are the same rollouts, nothing was held out",
        )
    return ()


def _curve(chain: Chain, rolls: Any, level: float) -> dict[str, Any] | None:
    """Predicted and observed P(harm within t tokens) of rollouts without prefill."""
    rows = np.flatnonzero(np.asarray(rolls.prefill) == 0)
    if len(rows) == 0 or chain.start is None:
        return None
    weight = np.asarray(rolls.columns.get("weight", np.ones(len(rolls.prefill))), dtype=np.float64)[rows]
    harm = np.asarray(rolls.outcome)[rows] == CODES["harm"]
    steps = int(np.diff(np.asarray(rolls.offsets))[rows].max(initial=0))
    steps = min(steps, chain.n_layers) if chain.is_layered else steps
    if steps == 0 or weight.sum() == 0:
        return None
    hit = np.asarray(rolls.hit)[rows][harm]
    first = np.bincount(hit[hit < steps], weight[harm][hit < steps], steps)
    observed = np.cumsum(first) / weight.sum()
    target, v, total, predicted = chain.mask("harm"), chain.start, 0.0, []
    total, v = float(v[target].sum()), np.where(target, 0.0, v)
    for t in range(steps):
        v = chain.layers[t if chain.is_layered else 0].T @ v
        total, v = total + float(v[target].sum()), np.where(target, 0.0, v)
        predicted.append(total)
    gaps = np.abs(np.array(predicted) - observed)
    size = weight.sum() ** 2 / (weight**2).sum()
    return {
        "t": np.arange(1, steps + 1),
        "predicted": np.array(predicted),
        "observed": observed,
        "gap": float(gaps.max()),
        "at": int(gaps.argmax()) + 1,
        "noise": float(np.sqrt(np.log(2 / (1 - level)) / (2 * size))),
    }
