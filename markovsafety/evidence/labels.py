"""Labels: what rollouts truly came to, as given by hand, in a table or by a second judge."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..bound import Bound, clopper_pearson, clustered
from ..chains.tally import collect
from ..errors import InputError
from ..outcomes import CODES, NOT_JUDGED, OUTCOMES
from .cells import is_rollouts

__all__ = ["INDEPENDENT", "codes_of", "label_rate"]

INDEPENDENT = -1  # prompt id of labels that are known as totals only: each counts as a prompt of its own


def codes_of(rolls: Any, truth: Any) -> NDArray[np.int64]:
    """Labels as outcome codes, one per rollout; `NOT_JUDGED` where there is none.

    Raises
    ------
    InputError
        If a label is no outcome, or labels and rollouts do not belong together.
    """
    n = len(rolls.outcome)
    if is_rollouts(truth):
        same = all(np.array_equal(getattr(rolls, a), getattr(truth, a)) for a in ("prompt_id", "offsets", "tokens"))
        if not same:
            raise InputError(
                "The two sets of verdicts are not about the same rollouts.",
                cause="Their prompts or tokens differ.",
                next="Judge one set of rollouts twice, and keep the order.",
            )
        return np.asarray(truth.outcome, dtype=np.int64)
    out = np.full(n, NOT_JUDGED, dtype=np.int64)
    pairs: Any = truth.items() if isinstance(truth, Mapping) else enumerate(truth)
    if not isinstance(truth, Mapping) and len(truth) != n:
        raise InputError(
            f"{len(truth)} labels for {n} rollouts.",
            cause="Labels in a sequence are those of the rollouts in order.",
            next="Put None where there is no label, or pass a dict from row to label.",
        )
    for row, label in pairs:
        code = _code(label)
        if code is None or not 0 <= row < n:
            raise InputError(
                f"The label of row {row} is {label!r}.",
                cause=f"Rows are 0 to {n - 1}; labels are {', '.join(OUTCOMES)}, or nothing.",
                next="Correct it.",
            )
        out[row] = code
    return out


def _code(label: Any) -> int | None:
    """The code of a label, `NOT_JUDGED` for none, None for something else."""
    if label is None or (isinstance(label, str) and not label.strip()) or (isinstance(label, float) and label != label):
        return NOT_JUDGED
    if isinstance(label, str):
        return CODES.get(label.strip().lower())
    whole = isinstance(label, (int, np.integer)) and not isinstance(label, bool)
    return int(label) if whole and NOT_JUDGED <= int(label) < len(OUTCOMES) else None


def label_rate(ids: NDArray, events: NDArray, totals: NDArray, level: float, name: str | None) -> Bound:
    """A rate among labels, clustered by prompt; labels without a prompt are prompts of their own."""
    alone = ids == INDEPENDENT
    if alone.all() and totals.sum() > 0:  # nothing to cluster: Clopper and Pearson at once, however many labels
        x, n = min(float(events.sum()), float(totals.sum())), float(totals.sum())
        lower, upper = clopper_pearson(x, n, level)
        info: dict[str, Any] = {"events": x, "total": n, "prompts": n, "n_eff": n, "method": "Clopper-Pearson"}
        info |= {} if name is None else {"name": name}
        lower, upper = min(lower, x / n), max(upper, x / n)
        return Bound(x / n, lower, upper, level, {"sampling": (upper - lower) / 2}, None, info)
    _, p = np.unique(ids[~alone], return_inverse=True)
    _, (sums,) = collect([p.reshape(-1)], [np.stack([events[~alone], totals[~alone]], axis=1)])
    singles = [_singles(x, n) for x, n in zip(events[alone], totals[alone])]
    x, n = (np.concatenate([sums[:, i], *(s[i] for s in singles)]) for i in range(2))
    return clustered(x, n, level, name)


def _singles(events: float, total: float) -> tuple[NDArray, NDArray]:
    """As many trials as there are labels, the first of them events; what is left of a fraction is a smaller trial."""
    x, n = [], []
    for amount, event in ((events, 1.0), (total - events, 0.0)):
        sizes = np.append(np.ones(int(amount)), amount % 1)
        x.append(event * sizes)
        n.append(sizes)
    return np.concatenate(x), np.concatenate(n)
