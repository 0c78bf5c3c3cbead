"""From columns to a `Bound`: a proven enclosure, or for an estimated chain an interval that also covers sampling.

At the start the raw rollouts speak: their outcomes, clustered by prompt. Elsewhere the rollouts that passed through a
state are worth n independent trials (`markovsafety.chains.Evidence.trials`: a rollout counts once however often it
came by, and those of one prompt resemble each other), so a probability h has the Clopper-Pearson interval of ``n h``
events in n."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..bound import Bound, clopper_pearson, clustered
from ..chains import Chain
from ..errors import UntrustedError
from ..outcomes import CODES
from .core import Answer, Walk, law_mean

__all__ = ["ONE_PROMPT", "bound_of", "half_width", "prompt_tally", "proven", "recorded", "refuse_unproven"]

ONE_PROMPT = "one prompt only: the variance between prompts is not assessed"


def half_width(lower: Any, upper: Any) -> Any:
    """Half the distance of two ends; 0 where both are the same infinity."""
    lower, upper = np.asarray(lower, dtype=np.float64), np.asarray(upper, dtype=np.float64)
    with np.errstate(invalid="ignore", over="ignore"):
        half = (upper - lower) / 2
    if np.isfinite(half).all():
        return half
    same = (lower == upper) | np.isnan(lower)
    return np.where(same, 0.0, np.where(same, 0.0, upper) - np.where(same, 0.0, lower)) / 2


def proven(X: NDArray, info: dict[str, Any], start: Bound | None = None) -> Bound:
    """A Bound without evidence: level 1 and rounding alone, or a bare value if nothing was certified."""
    if X.shape[-1] == 1:
        value = X[..., 0]
        if value.flags.writeable:
            value = np.array(value)
            value.flags.writeable = False  # kept as it is, three times
        return Bound(value, value, value, 1.0, {"rounding": None}, start, {**info, "certified": False})
    value, lower, upper = X[..., 0], X[..., 1], X[..., 2]
    reasons = {"rounding": half_width(lower, upper)}
    return Bound(value, lower, upper, 1.0, reasons, start, {**info, "certified": True})


def refuse_unproven(answer: Answer, bound: Bound) -> Bound:
    """The bound itself, or `UntrustedError` carrying it if a class could not be proven."""
    if not answer.failed:
        return bound
    raise UntrustedError(
        f"No enclosure could be proven for a cyclic class of {max(answer.failed)} states.",
        cause="The class is nearly closed (its leak drowns in rounding) and too large for subtraction-free "
        "elimination, or its rates span more than 300 orders of magnitude.",
        next='Use method="exact", merge states, or believe only the interval in `error.partial`.',
        partial=bound,
    )


def bound_of(w: Walk, answer: Answer, level: float) -> Bound:
    """The Bound of a hitting probability.

    Parameters
    ----------
    w : Walk
    answer : Answer
        From `core.probability`.
    level : float
        Level of the sampling interval; without evidence the enclosure is proven and the level is 1.
    """
    chain, X = w.chain, answer.X
    info: dict[str, Any] = {"name": f"P({w.name})", "method": answer.method, "why": answer.why}
    if answer.exact is not None:
        info["exact"] = answer.exact
    start = None
    if chain.start is not None:
        first = X[0] if chain.is_layered else X
        exact = None if answer.exact is None else (answer.exact[0] if chain.is_layered else answer.exact)
        mean, fraction = law_mean(chain.start, first, exact)
        mean = np.minimum(mean, 1.0)
        about = info if fraction is None else {**info, "exact": fraction}
        sampled = chain.evidence is not None and not chain.is_layered
        start = _sampled_start(w, mean, X, level, about) if sampled else proven(mean, about)
    if answer.expression is not None:
        info["expression"] = answer.expression
    if chain.evidence is None or chain.is_layered:
        return refuse_unproven(answer, proven(X, info, start))
    lower, upper = _by_trials(w, X, level)
    reasons = {"sampling": half_width(lower, upper)}
    if X.shape[-1] == 3:
        reasons["rounding"] = half_width(X[..., 1], X[..., 2])
    info["certified"] = X.shape[-1] == 3
    info["sampling"] = "Clopper-Pearson at the rollouts through each state, clustered by prompt"
    info |= _notes(w, None)
    return refuse_unproven(answer, Bound(X[..., 0], lower, upper, level, reasons, start, info))


def _notes(w: Walk, raw: float | None, single: bool | None = None) -> dict[str, str]:
    """What a reader must know of an estimated chain: a single prompt, and a prior that moves the value."""
    evidence = w.chain.evidence
    assert evidence is not None
    notes = [ONE_PROMPT] if (evidence.one_prompt if single is None else single) else []
    if evidence.prior:
        without = "" if raw is None else f"; the rollouts alone say {raw:.3g}"
        notes.append(f"biased by a prior of {evidence.prior:g} pseudo-transitions per row{without}")
    return {"note": "; ".join(notes)} if notes else {}


def recorded(w: Walk) -> list[int] | None:
    """Codes of the outcomes that make up the target; None if rollouts do not record whether they hit it."""
    known = w.outcomes is not None and all(name in CODES for name in w.outcomes)
    if not known or (w.avoid & ~w.chain.outcome_mask).any():  # an avoided state may come before a recorded hit
        return None
    return [CODES[name] for name in w.outcomes or ()]


def _by_trials(w: Walk, X: NDArray, level: float) -> tuple[NDArray, NDArray]:
    """Clopper-Pearson at every state's trials; outcome states and targets are what they are by definition."""
    evidence, codes = w.chain.evidence, recorded(w)
    assert evidence is not None
    n = evidence.trials(codes[0] if codes and len(codes) == 1 else None, level)
    fixed = ~w.moving | w.chain.outcome_mask
    lower, upper = (
        np.where(fixed, X[:, side], clopper_pearson(np.clip(X[:, side], 0, 1) * n, n, level)[end])
        for side, end in ((min(1, X.shape[1] - 1), 0), (X.shape[1] - 1, 1))
    )
    return np.minimum(lower, X[:, 0]), np.maximum(upper, X[:, 0])


def prompt_tally(chain: Chain, law: NDArray | None = None) -> tuple[NDArray, NDArray] | None:
    """Outcomes of every prompt's rollouts that began in a start law, the chain's own if none is given: (prompts, 4) and
    which prefill.

    None if the start is no law that was measured: neither that of the rollouts without prefill nor an entry law.
    """
    evidence, start = chain.evidence, chain.start if law is None else law
    if evidence is None or start is None:
        return None
    laws = [k for k, law in chain.entry.items() if np.allclose(law, start, rtol=0, atol=1e-12)]
    rows = np.isin(evidence.prefill, laws[:1]) if laws else np.zeros(len(evidence.prefill), dtype=bool)
    if not rows.any():
        return None
    cluster = np.unique(evidence.tally.cluster[rows], return_inverse=True)[1].ravel()
    counts = np.zeros((int(cluster.max()) + 1, 4))
    np.add.at(counts, cluster, evidence.outcomes[rows])
    return counts, np.asarray(laws[:1])


def _sampled_start(w: Walk, mean: NDArray, X: NDArray, level: float, info: dict[str, Any]) -> Bound:
    """Interval at the start: what the rollouts themselves did, widened to contain the chain's value."""
    value, ends = float(mean[0]), mean[[min(1, len(mean) - 1), -1]]
    tally, codes = prompt_tally(w.chain), recorded(w)
    if tally is None:
        lower, upper = (float(w.chain.start @ x) for x in _by_trials(w, X, level))
        info = {**info, "sampling": "mean of the states' intervals: no rollouts were started in this law"}
    elif codes is None:
        size = float((tally[0].sum(axis=1) > 0).sum())
        lower, upper = clopper_pearson(np.clip(ends, 0, 1) * size, size, level)
        lower, upper = float(lower[0]), float(upper[1])
        info = {**info, "sampling": "Clopper-Pearson, one trial per prompt: the rollouts do not record this target"}
    else:
        events = tally[0][:, codes].sum(axis=1)
        raw = clustered(events, tally[0].sum(axis=1), level)
        lower, upper = raw.lower, raw.upper
        info = {**info, "sampling": raw.info | {"raw": raw.value, "prefill": int(tally[1][0])}}
        info |= _notes(w, raw.value, len(events) < 2)
    lower, upper = min(lower, *ends.tolist(), value), max(upper, *ends.tolist(), value)
    reasons: dict[str, Any] = {"sampling": (upper - lower) / 2}
    if len(mean) == 3:
        reasons["rounding"] = (mean[2] - mean[1]) / 2
    return Bound(value, lower, upper, level, reasons, None, {**info, "certified": len(mean) == 3})
