"""Timing: the curve of first hits that a chain predicts, against that of held-out rollouts."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..bound import clustered
from ..chains import Chain
from ..outcomes import CODES

__all__ = ["hit_curve"]

DRAWS = 999
FEWEST_PROMPTS = 10


def hit_curve(chain: Chain, rolls: Any, level: float = 0.95, seed: int = 0) -> dict[str, Any] | None:
    """Predicted and observed P(harm within t tokens) of rollouts without prefill.

    Parameters
    ----------
    chain : Chain
        With a start law.
    rolls : Rollouts
        Judged.
    level : float
    seed : int
        Of the bootstrap.

    Returns
    -------
    dict or None
        t, predicted, observed, gap (largest distance), at (its t), noise (what sampling alone exceeds with probability
        1 - level at most), gap_lower, gap_upper (interval of the largest true distance) and prompts. None without such
        rollouts, without a start law, or where a rollout was cut off before any token.

    Notes
    -----
    The observed curve lies within `noise` of the true one at all t at once, with probability `level`: the quantile of
    the largest deviation when every prompt's share of the error is multiplied by an independent normal number (the
    multiplier bootstrap over clusters), times the ratio of Student's to the normal quantile. With fewer than 10 prompts
    or 5 harms it is the bound of Dvoretzky, Kiefer and Wolfowitz with P. Massart's constant (Annals of Probability 18
    (1990) 1269) at the effective sample size of the harm rate, which has no size beyond the number of prompts where
    nothing was hit; a single prompt keeps its rollouts. The curve stops before the first token at which a rollout was
    cut off: beyond, harm may be hidden.
    """
    rows = np.flatnonzero(np.asarray(rolls.prefill) == 0)
    if len(rows) == 0 or chain.start is None:
        return None
    weight = np.asarray(rolls.columns.get("weight", np.ones(len(rolls.prefill))), dtype=np.float64)[rows]
    outcome, lengths = np.asarray(rolls.outcome)[rows], np.diff(np.asarray(rolls.offsets))[rows]
    steps = int(lengths.max(initial=0))
    cut = (outcome == CODES["truncated"]) & (weight > 0)
    steps = min(steps, int(lengths[cut].min())) if cut.any() else steps
    steps = min(steps, chain.n_layers) if chain.is_layered else steps
    if steps == 0 or weight.sum() == 0:
        return None
    hit = np.where(outcome == CODES["harm"], np.asarray(rolls.hit)[rows], steps)
    prompts, p = np.unique(np.asarray(rolls.prompt_id)[rows], return_inverse=True)
    first = np.bincount(p.reshape(-1) * (steps + 1) + np.minimum(hit, steps), weight, len(prompts) * (steps + 1))
    events = np.cumsum(first.reshape(len(prompts), steps + 1)[:, :steps], axis=1)
    totals = np.bincount(p.reshape(-1), weight, len(prompts))
    observed = events.sum(axis=0) / totals.sum()
    predicted = _forward(chain, steps)
    gaps = np.abs(predicted - observed)
    noise, gap = _noise(events, totals, observed, level, seed), float(gaps.max())
    return {
        "t": np.arange(1, steps + 1),
        "predicted": predicted,
        "observed": observed,
        "gap": gap,
        "at": int(gaps.argmax()) + 1,
        "noise": noise,
        "gap_lower": max(gap - noise, 0.0),
        "gap_upper": min(gap + noise, 1.0),
        "prompts": len(prompts),
    }


def _forward(chain: Chain, steps: int) -> NDArray:
    assert chain.start is not None
    target, v, predicted = chain.mask("harm"), chain.start, []
    total, v = float(v[target].sum()), np.where(target, 0.0, v)
    for t in range(steps):
        v = chain.layers[t if chain.is_layered else 0].T @ v
        total, v = total + float(v[target].sum()), np.where(target, 0.0, v)
        predicted.append(total)
    return np.array(predicted)


def _noise(events: NDArray, totals: NDArray, observed: NDArray, level: float, seed: int) -> float:
    from scipy.special import ndtri, stdtrit

    harm = clustered(events[:, -1], totals, level)
    K = int((totals > 0).sum())
    if K < FEWEST_PROMPTS or min(harm.info["events"], harm.info["total"] - harm.info["events"]) < 5:
        return float(min(np.sqrt(np.log(2 / (1 - level)) / (2 * harm.info["n_eff"])), 1.0))
    sums = (events - observed * totals[:, None]) / totals.sum()
    rng = np.random.default_rng(seed)
    largest = np.abs(rng.standard_normal((DRAWS, len(totals))) @ sums).max(axis=1)
    wide = float(stdtrit(K - 1.0, (1 + level) / 2) / ndtri((1 + level) / 2)) * np.sqrt(K / (K - 1))
    return float(np.quantile(largest, level, method="higher") * wide)
