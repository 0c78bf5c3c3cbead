"""Sampling error of a hitting probability without a prior: the delta method and the bootstrap, by prompt.

Both answer for one measured start: the law after k forced tokens, in a chain whose rows pool the rollouts of every
start. The delta method is analytic: ``Var h = sum_s N_s^2 sigma_s^2 / n_s`` for independent rows (N_s visits from the
start, sigma_s^2 the variance of h over the row, n_s its count), and the sum of squares of what every prompt contributes
where rollouts of one prompt resemble each other, which is the default. The bootstrap draws prompts with replacement.

Where the rollouts hold fewer than five hits, or misses, neither is trusted: the interval is joined with the one of
Clopper and Pearson, and ``info["joined"]`` says so. With no event it is never [0, 0].
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..bound import Bound, check_level, clopper_pearson
from ..chains import Chain
from ..errors import InputError
from ..hitting import hitting_probability
from ..hitting.core import walk, without_start
from ..hitting.intervals import ONE_PROMPT
from ..hitting.sensitivity import visits_before
from .paired import FEW
from .prompt_rows import PromptRows, joined, prompt_rows, refuse_few

__all__ = ["bootstrap", "bootstrap_draws", "delta"]

BLOCK = 2e7  # numbers that are resampled at once
FEWEST_DRAWS = 100


def delta(
    source: Any,
    target: Any = "harm",
    *,
    prefill: int = 0,
    by_prompt: bool = True,
    visits: ArrayLike | None = None,
    level: float = 0.95,
) -> Bound:
    """Interval of P(hit) from a measured start by the delta method.

    Parameters
    ----------
    source : Counts, or Chain with counts
        Rows are plain frequencies, whatever the chain was estimated with. With `visits`: any homogeneous chain.
    target : as in `hitting_probability`
    prefill : int
        Which measured start: this many forced tokens.
    by_prompt : bool
        Whether rollouts of a prompt may resemble each other. False takes every transition as independent.
    visits : array, shape (n,), optional
        Independent transitions behind each row of a chain, from its own start law. A row with none may be anything.
    level : float

    Returns
    -------
    Bound
        Scalar. `info`: standard_error, n_eff (independent trials with this variance; by prompt with Student's
        quantile), deff, prompts, and joined where few events made Clopper-Pearson necessary. With `visits` also unseen:
        the number of rows never seen that can be reached, and what they add to the width.

    Raises
    ------
    InputError
        Without counts, or a start that was not measured.
    UntrustedError
        Effective sample size below 10; ``partial`` is the Bound.

    Notes
    -----
    The interval is that of Clopper and Pearson for ``h n_eff`` events in ``n_eff = h (1 - h) / Var h`` trials, which
    keeps to [0, 1] and is skewed as it should be; by prompt n_eff is reduced by the ratio of Student's quantiles as in
    `markovsafety.bound.clustered`, whose interval it is where all complete rollouts begin in one state. Weighted counts
    are handled by prompt; as independent transitions, a weight of two counts as two.

    Examples
    --------
    Answers to one prompt resemble each other; who forgets it halves the interval:

    >>> from markovsafety.exercises import case
    >>> counts = ms.count(case().rolls, states=ms.Position())
    >>> print(ms.evidence.delta(counts, prefill=8))
    P(harm) = 0.549   95 % [0.484, 0.612]
        because: sampling 0.064; judge, lumping, model, truncation, rounding not assessed
    >>> print(ms.evidence.delta(counts, prefill=8, by_prompt=False))
    P(harm) = 0.549   95 % [0.517, 0.581]
        because: sampling 0.032; judge, lumping, model, truncation, rounding not assessed
    """
    check_level(level)
    if visits is not None:
        return _of_rows(source, target, visits, level)
    rows = prompt_rows(source, target)
    value = float(rows.law(prefill) @ rows.h)
    told = rows.size(prefill, level)
    by_prompt = by_prompt and rows.K > 1
    if by_prompt:
        error, even = rows.influence(prefill), told["effective_prompts"]
        variance = even / max(even - 1, 1e-12) * float(error @ error)
        size = told["n_eff"]
    else:
        variance = rows.independent(prefill)
        size = value * (1 - value) / variance if variance > 0 else told["rollouts"]
        told |= {"n_eff": size, "deff": None}
    ends = clopper_pearson(min(value, 1.0) * size, size, level)
    lower, upper, why = joined(rows, prefill, (min(ends[0], value), max(ends[1], value)), level)
    info = _told(rows, prefill, "delta method, " + ("by prompt" if by_prompt else "independent transitions"), told, why)
    info["standard_error"] = float(np.sqrt(variance))
    bound = Bound(value, lower, upper, level, {"sampling": (upper - lower) / 2}, None, info)
    return refuse_few(bound, told)


def _told(rows: PromptRows, prefill: int, method: str, told: dict[str, Any], why: str | None) -> dict[str, Any]:
    info = {"name": f"P({rows.walk.name})", "method": method, "prefill": prefill, **told}
    info |= {} if why is None else {"joined": why}
    return info | ({"note": ONE_PROMPT} if rows.K < 2 else {})


def _of_rows(chain: Any, target: Any, visits: ArrayLike, level: float) -> Bound:
    """Independent rows of given sizes; rows never seen are set to the worst and the best."""
    w = walk(chain, target)
    n, start = np.asarray(visits, dtype=np.float64), chain.start
    if chain.is_layered or n.shape != (chain.n_states,) or not (np.isfinite(n).all() and (n >= 0).all()):
        raise InputError(
            f"visits have shape {n.shape}, or one is negative or infinite, or the chain is layered.",
            cause=f"A homogeneous chain of {chain.n_states} states has one number of observed transitions per state.",
            next="Pass how often each row was observed, 0 where it never was.",
        )
    if start is None:
        raise without_start("The delta method")
    h = np.asarray(hitting_probability(chain, target, certify=False).value)
    N, live = visits_before(w, start, h)
    P = chain.P
    row = np.repeat(np.arange(len(n)), np.diff(P.indptr))
    sigma2 = np.bincount(row, P.data * (h[P.indices] - h[row]) ** 2, len(n))
    seen = n > 0
    variance = float(np.sum(np.where(live & seen, N**2 * sigma2 / np.where(seen, n, 1.0), 0.0)))
    value = float(min(start @ h, 1.0))
    size = value * (1 - value) / variance if variance > 0 else float(n[(start > 0) & seen].min(initial=np.inf))
    size = size if np.isfinite(size) else 0.0
    never = w.moving & ~seen & ~chain.outcome_mask
    best, worst = _unseen(chain, w.hit, never, value)
    # The sampling error of the seen rows, moved to where the unseen ones put the value.
    lower, upper = (clopper_pearson(x * size, size, level)[end] for end, x in enumerate((best, worst)))
    lower, upper = float(min(lower, best)), float(max(upper, worst))
    missing = int((never & (N > 0)).sum()) if best < worst else 0
    info = {"name": f"P({w.name})", "method": "delta method, independent rows", "n_eff": size}
    info |= {"standard_error": float(np.sqrt(variance)), "unseen": missing, "unseen_width": worst - best}
    if missing:
        info["note"] = f"{missing} rows never seen add [{best:.3g}, {worst:.3g}]"
    return Bound(value, lower, upper, level, {"sampling": (upper - lower) / 2}, None, info)


def _unseen(chain: Chain, hit: NDArray, unseen: NDArray, value: float) -> tuple[float, float]:
    """P(hit) from the start if every unseen row never hits, and if it hits at once: the exact range over those rows."""
    from ..hitting import committor

    if not unseen.any():
        return value, value
    start = np.asarray(chain.start)
    worst = float(start @ np.asarray(hitting_probability(chain, hit | unseen, certify=False).value))
    best = float(start @ np.asarray(committor(chain, unseen, hit).value)) if hit.any() else 0.0
    return min(best, value), max(min(worst, 1.0), value)


def bootstrap(
    source: Any,
    target: Any = "harm",
    *,
    prefill: int = 0,
    draws: int = 2000,
    interval: str = "bca",
    seed: int = 0,
    level: float = 0.95,
) -> Bound:
    """Interval of P(hit) from a measured start by resampling prompts.

    Parameters
    ----------
    source : Counts, or Chain with counts
    target : as in `hitting_probability`
    prefill : int
        Which measured start: this many forced tokens.
    draws : int
        Resamples, at least 100.
    interval : {"bca", "percentile"}
        Bias-corrected and accelerated, or the plain quantiles of the resamples, which many tools report and which are
        too narrow where hits are few or skewed.
    seed : int
    level : float

    Returns
    -------
    Bound
        Scalar. `info`: standard_error, bias (z0) and acceleration of "bca", n_eff, prompts, joined.

    Raises
    ------
    InputError
        Without counts, a start that was not measured, an unknown interval, or too few draws.
    UntrustedError
        Effective sample size below 10; ``partial`` is the Bound.

    Notes
    -----
    B. Efron, J. Am. Stat. Assoc. 82 (1987) 171; the acceleration from the prompts' influences (the infinitesimal
    jackknife). The spread about the bias-corrected centre is widened by ``sqrt(c / (c - 1)) t / z`` on the scale of
    normal quantiles, because the c prompts with a hit (or with a miss, if fewer), drawn with replacement, vary less
    than prompts do; "percentile" is left bare.
    A single prompt cannot be resampled: the interval is then that of Clopper and Pearson, and says so.

    Examples
    --------
    >>> from markovsafety.exercises import case
    >>> counts = ms.count(case().rolls, states=ms.Position())
    >>> print(ms.evidence.bootstrap(counts, prefill=8))
    P(harm) = 0.549   95 % [0.487, 0.609]
        because: sampling 0.061; judge, lumping, model, truncation, rounding not assessed
    """
    check_level(level)
    if interval not in ("bca", "percentile"):
        raise InputError(f"interval is {interval!r}.", cause="There are two.", next='Pass "bca" or "percentile".')
    rows = prompt_rows(source, target)
    value, told = float(rows.law(prefill) @ rows.h), rows.size(prefill, level)
    sample = np.full(1, value)
    if rows.K > 1 and 0 < value < 1:
        sample = bootstrap_draws(rows, (prefill,), draws, seed)[:, 0]
    else:
        _check_draws(draws)
    told |= {"standard_error": float(sample.std(ddof=1)) if len(sample) > 1 else 0.0}
    ends = (value, value)
    why = None
    if len(sample) > 1:
        share, z0, a = _shares(sample, value, rows.influence(prefill), told["seen"], interval, level)
        told |= {"bias": z0, "acceleration": a}
        low, high = np.nanquantile(sample, share)
        ends = (min(float(low), value), max(float(high), value))
    lower, upper, why = joined(rows, prefill, ends, level)
    if rows.K < 2:
        lower, upper = clopper_pearson(min(value, 1.0) * told["n_eff"], told["n_eff"], level)
        lower, upper, why = min(lower, value), max(upper, value), "Clopper-Pearson: one prompt cannot be resampled"
    info = _told(rows, prefill, f"bootstrap by prompt, {interval}, {draws} resamples", told, why)
    bound = Bound(value, lower, upper, level, {"sampling": (upper - lower) / 2}, None, info)
    return refuse_few(bound, told)


def _shares(
    sample: NDArray, value: float, influence: NDArray, seen: float, interval: str, level: float
) -> tuple[NDArray, float, float]:
    """Which quantiles of the resamples are the ends, with bias correction z0 and acceleration a."""
    from scipy.special import ndtr, ndtri, stdtrit

    tails = np.array([(1 - level) / 2, (1 + level) / 2])
    if interval == "percentile":
        return tails, 0.0, 0.0
    fine, known = sample[np.isfinite(sample)], max(seen, FEW)
    below = (np.sum(fine < value) + 0.5 * np.sum(fine == value)) / len(fine)
    z0 = float(ndtri(np.clip(below, 1 / (len(fine) + 1), len(fine) / (len(fine) + 1))))
    square = float(influence @ influence)
    a = float(np.sum(influence**3) / (6 * square**1.5)) if square > 0 else 0.0
    z = stdtrit(known - 1.0, tails) * np.sqrt(known / (known - 1))
    moved = z0 + z
    return ndtr(z0 + moved / np.maximum(1 - a * moved, 0.1)), z0, a


def _check_draws(draws: Any) -> None:
    if isinstance(draws, bool) or not isinstance(draws, (int, np.integer)) or draws < FEWEST_DRAWS:
        raise InputError(
            f"draws is {draws!r}.",
            cause=f"Quantiles of fewer than {FEWEST_DRAWS} draws are noise.",
            next="Pass a whole number, e.g. 2000.",
        )


def bootstrap_draws(rows: PromptRows, prefills: tuple[int, ...], draws: int, seed: int) -> NDArray[np.float64]:
    """P(hit) from measured starts in resamples of the prompts.

    Parameters
    ----------
    rows : PromptRows
    prefills : tuple of int
    draws : int
    seed : int

    Returns
    -------
    array, shape (draws, len(prefills))
        NaN where a resample has no rollout of that start.
    """
    _check_draws(draws)
    rng = np.random.default_rng(seed)
    even = np.full(rows.K, 1 / rows.K)
    weights = (rng.multinomial(rows.K, even, size=b).astype(np.float64) for b in blocks(rows, draws))
    return np.concatenate([starts(rows, w, prefills, rows.table.T @ w.T) for w in weights])


def blocks(rows: PromptRows, draws: int) -> Iterator[int]:
    """Sizes of the blocks in which values of so many chains are made."""
    size = int(np.clip(BLOCK // max(rows.chain.P.nnz, 1), 1, 256))
    yield from (min(size, draws - b) for b in range(0, draws, size))


def starts(rows: PromptRows, weights: NDArray, prefills: tuple[int, ...], values: NDArray) -> NDArray[np.float64]:
    """P(hit) from measured starts for blocks of weighted prompts.

    Parameters
    ----------
    rows : PromptRows
    weights : array, shape (b, K)
    prefills : tuple of int
    values : array, shape (nnz, b)
        Entries of every chain, on any scale; a row without any is filled with the plain frequencies (no resampled
        rollout comes there). Changed in place.
    """
    laws = [rows.entries[k] for k in prefills]
    needed = np.unique(np.concatenate([law.indices for law in laws]))
    x = solve(rows, values, needed)
    out = np.empty((len(weights), len(prefills)))
    with np.errstate(invalid="ignore", divide="ignore"):
        for i, law in enumerate(laws):
            drawn = (law[:, needed].T @ weights.T).T
            out[:, i] = (drawn * x).sum(axis=1) / drawn.sum(axis=1)
    return np.minimum(out, 1.0)


def solve(rows: PromptRows, values: NDArray, states: NDArray) -> NDArray[np.float64]:
    """Hitting probabilities of states, shape (b, len(states)), for chains with these entries, shape (nnz, b)."""
    first = rows.chain.P.indptr[:-1]
    filled = np.diff(rows.chain.P.indptr) > 0
    total = np.zeros((rows.chain.n_states, values.shape[1]))
    total[filled] = np.add.reduceat(values, first[filled], axis=0)
    bare = (total == 0)[rows.row]
    if bare.any():
        values += bare * rows.chain.P.data[:, None]
    return rows.problem.solve(values, states=states, innermost=True).value
