"""The mean of weighted hits, its effective sample size and its interval."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..bound import Bound, check_level
from ..errors import InputError, UntrustedError
from .rare_intervals import clusters, effective, weighted_interval

__all__ = ["FEWEST", "weighted"]

FEWEST = 10
"""Effective weighted hits, and replications, below which no interval is given."""


def weighted(
    hits: ArrayLike,
    log_weights: ArrayLike,
    prompt_id: ArrayLike | None = None,
    *,
    level: float = 0.95,
    prompts: str = "drawn",
    name: str = "P(harm)",
    info: dict[str, Any] | None = None,
) -> Bound:
    """Mean of weighted hits, from rollouts of a proposal.

    Parameters
    ----------
    hits : bool array, shape (n,)
    log_weights : float array, shape (n,)
        Natural logarithm of the probability of each rollout up to its hit over that under the proposal; -inf for one
        that cannot happen. Never exponentiated alone, so that no weight overflows.
    prompt_id : array, shape (n,), optional
        Clusters.
    level : float
    prompts : {"drawn", "fixed"}
        As in `importance`.
    name : str
    info : dict, optional
        Added to the answer's `info`.

    Returns
    -------
    Bound
        Unbiased mean (cut at 1), gamma interval (`rare_intervals.weighted_interval`). `info`: effective (Kish's number
        of weighted hits), hits, rollouts, largest_share (of the estimate, by one rollout), relative_error,
        naive_rollouts, cost_ratio.

    Raises
    ------
    InputError
        Lengths that disagree; nan or +inf among the log-weights of hits.
    UntrustedError
        Effective sample size below 10; ``partial`` is the Bound.

    Examples
    --------
    Fifty hits in 200 rollouts of a proposal under which they were a thousand times likelier:

    >>> from markovsafety.evidence import rare
    >>> print(rare.weighted(np.arange(200) < 50, np.full(200, np.log(1e-3))))
    P(harm) = 0.00025   95 % [0.000193, 0.00032]
        because: sampling 6e-5; judge, lumping, model, truncation, rounding not assessed
    """
    check_level(level)
    hit, logw, prompt = _weighed(hits, log_weights, prompt_id, prompts)
    n, K = len(hit), int(prompt.max()) + 1
    good = hit & (logw > -np.inf)
    top = float(logw[good].max()) if good.any() else 0.0
    z = np.where(good, np.exp(np.where(good, logw, top) - top), 0.0)  # in units of the largest weight
    size, mean = effective(z), float(z.mean())
    told = {"name": name, "method": "importance sampling", "effective": size, "hits": int(hit.sum()), "rollouts": n}
    told |= {"prompts": None if prompt_id is None else K, **(info or {})}
    if mean == 0:
        partial = Bound(0.0, 0.0, 1.0, level, {"sampling": 0.5}, None, told)
        raise _too_few(size, n, partial, "No rollout of the proposal both hit and was possible.")
    variance, degrees, share = clusters(z, prompt, prompts == "fixed")
    ends = weighted_interval(mean, variance, degrees, share, n, level)
    with np.errstate(over="ignore"):
        value, lower, upper = (float(min(np.exp(top + np.log(x)), 1.0)) if x > 0 else 0.0 for x in (mean, *ends))
    error = float(np.sqrt(variance)) / mean
    naive = (1 - value) / value / error**2 if error > 0 and value > 0 else np.inf
    told |= {"largest_share": float(z.max() / z.sum()), "relative_error": error}
    told |= {"naive_rollouts": naive, "cost_ratio": n / naive if naive > 0 else np.inf}
    if prompts == "fixed" or (prompt_id is not None and K == 1):
        told["note"] = f"for {'this prompt' if K == 1 else f'these {K} prompts'}; others are not assessed"
    lower, upper = min(lower, value), max(upper, value, np.finfo(float).tiny)  # an upper end never rounds to 0
    bound = Bound(value, lower, upper, level, {"sampling": (upper - lower) / 2}, None, told)
    if size < FEWEST:
        raise _too_few(size, n, bound, "A few large weights carry the estimate.")
    return bound


def _weighed(hits: Any, log_weights: Any, prompt_id: Any, prompts: str) -> tuple[NDArray, NDArray, NDArray]:
    hit, logw = np.asarray(hits).astype(bool), np.asarray(log_weights, dtype=np.float64)
    names = np.zeros(len(hit), dtype=np.int64) if prompt_id is None else np.asarray(prompt_id)
    if hit.ndim != 1 or hit.shape != logw.shape or names.shape != hit.shape or not len(hit):
        raise InputError(
            f"hits, log-weights and prompts have shapes {hit.shape}, {logw.shape}, {names.shape}.",
            cause="There is one of each per rollout, and at least one rollout.",
            next="Pass flat arrays of one length.",
        )
    if prompts not in ("drawn", "fixed"):
        raise InputError(
            f"prompts is {prompts!r}.",
            cause="Prompts are a sample, or the ones that are meant.",
            next='Pass "drawn" or "fixed".',
        )
    wrong = hit & (np.isnan(logw) | np.isposinf(logw))
    if wrong.any():
        i = int(wrong.argmax())
        raise InputError(
            f"The log-weight of rollout {i} is {logw[i]}.",
            cause="A log-probability is missing, or the proposal said what it gives probability zero.",
            next="Score every sampled token under both models, at the temperature it was sampled with.",
        )
    return hit, logw, np.unique(names, return_inverse=True)[1]


def _too_few(size: float, n: int, partial: Bound, cause: str) -> UntrustedError:
    return UntrustedError(
        f"The effective sample size is {size:.1f}, of {n} rollouts; below {FEWEST} no interval can be trusted.",
        cause=cause,
        next="Sample more, or take a proposal closer to the model on its harmful answers.",
        partial=partial,
    )
