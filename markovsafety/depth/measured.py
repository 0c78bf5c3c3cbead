"""Width from evidence: harm that gets through m answers, estimated from counts of single answers to each prompt."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..bound import Bound, clopper_pearson, clustered
from ..errors import InputError
from .profile import whole
from .rules import check_rule, falls_with_width, harmful_needed, unit, widths_of
from .width import ensemble_harm

__all__ = ["icc", "measured_width", "unbiased_failure", "unbiased_power"]

RESAMPLES = 999


def unbiased_power(events: ArrayLike, totals: ArrayLike, m: int) -> NDArray:
    """Unbiased estimate of p^m from x events in n independent trials: C(x, m) / C(n, m).

    Parameters
    ----------
    events, totals : int array
        Counts x and n, broadcast together.
    m : int
        Power, at most every n.

    Returns
    -------
    array
        In [0, 1], never rising with m.

    Raises
    ------
    InputError
        If a trial number is below m (no unbiased estimate exists), or counts are not whole (weights).

    Examples
    --------
    The chance that two more answers are both harmful, of prompts with 0, 1, 3 and 9 harmful answers in ten:

    >>> ms.depth.unbiased_power([0, 1, 3, 9], 10, 2).round(3)
    array([0.   , 0.   , 0.067, 0.8  ])
    """
    x, n = np.broadcast_arrays(whole(events, "events"), whole(totals, "totals"))
    m = int(widths_of(m))
    if (x > n).any() or (n < m).any():
        raise InputError(
            f"The power {m} of a probability from {int(n.min())} trials.",
            cause="Without bias it can be estimated only from at least as many trials.",
            next="Sample more rollouts per prompt, or use ensemble_harm with an intra-class correlation.",
        )
    result = np.ones(x.shape)
    for j in range(m):
        result = result * np.maximum(x - j, 0) / (n - j)
    return result


def unbiased_failure(events: ArrayLike, totals: ArrayLike, m: int, rule: str = "any-refusal") -> NDArray:
    """Unbiased estimate of the harm that gets through m answers, from x events in n independent trials.

    Parameters
    ----------
    events, totals : int array
        Counts x and n, broadcast together.
    m : int
        Number of answers, at most every n.
    rule : str
        See `ensemble_harm`.

    Returns
    -------
    array
        The share of the subsets of m answers through which harm gets, a hypergeometric tail; for any-refusal
        `unbiased_power`.

    Raises
    ------
    InputError
        As `unbiased_power`, or the rule needs more refusals than m.

    Examples
    --------
    The same for three answers, of which two harmful ones suffice under a majority:

    >>> for rule in ("any-refusal", "majority"):
    ...     print(ms.depth.unbiased_failure([0, 1, 3, 9], 10, 3, rule).round(3))
    [0.    0.    0.008 0.7  ]
    [0.    0.    0.183 1.   ]
    """
    everything = unbiased_power(events, totals, m)
    t = int(harmful_needed(rule, m))
    if t == m:
        return everything
    from scipy.special import betaln

    x, n = np.broadcast_arrays(whole(events, "events"), whole(totals, "totals"))

    def ways(a: NDArray, b: int) -> NDArray:
        """ln of a over b, -inf where b > a."""
        inside = a >= b
        return np.where(
            inside, -np.log1p(np.where(inside, a, b)) - betaln(b + 1, np.where(inside, a - b, 0) + 1), -np.inf
        )

    parts = [np.exp(ways(x, j) + ways(n - x, m - j) - ways(n, m)) for j in range(t, m + 1)]
    return np.minimum(np.sum(parts, axis=0), 1.0)


def icc(events: ArrayLike, totals: ArrayLike, level: float = 0.95, seed: int = 0) -> Bound:
    """Intra-class correlation of harm: how alike two answers to one prompt are.

    Parameters
    ----------
    events, totals : array, shape (K,)
        Harmful rollouts and rollouts of every prompt.
    level : float
        Confidence level.
    seed : int
        Of the resampling; equal inputs give equal intervals.

    Returns
    -------
    Bound
        Analysis-of-variance estimate (it may be slightly negative) with a percentile bootstrap interval over prompts.
        Where it cannot be seen (no harm, nothing but harm, one prompt, one rollout per prompt) the value is nan, the
        interval [0, 1], and ``info["assessed"]`` is False with the reason in ``info["why"]``.

    Notes
    -----
    A resample without harm, or of harm only, shows no correlation and contradicts none: it counts as 0 at the lower end
    and as 1 at the upper end of the interval, so a few harmful prompts give a wide interval, not a narrow one. The
    estimator: M. S. Ridout, C. G. B. Demetrio, D. Firth, Biometrics 55 (1999) 137, section 2.1.

    Examples
    --------
    Ten answers to each of six prompts: three never do harm, two nearly always do.

    >>> print(ms.depth.icc([0, 0, 0, 2, 8, 9], [10] * 6))
    ICC = 0.691   95 % [0.0338, 0.889]   because: sampling 0.43; judge, lumping, model,
        truncation, rounding not assessed
    >>> ms.depth.icc([0, 0, 0], [10] * 3).info["why"]
    'no harm was seen'
    """
    x, n = (np.atleast_1d(np.asarray(a, dtype=np.float64)) for a in (events, totals))
    clustered(x, n, level)  # refuses what is not a count
    x, n = x[n > 0], n[n > 0]
    why = unseen(x, n)
    info: dict[str, Any] = {"name": "ICC", "assessed": not why, "why": why, "prompts": len(n)}
    if why:
        return Bound(np.nan, 0.0, 1.0, level, {"sampling": 0.5}, None, info)
    value = float(_anova(x[None], n[None])[0])
    random, rows = np.random.default_rng(seed), max(1_000_000 // len(n), 1)
    blocks = [min(rows, RESAMPLES - done) for done in range(0, RESAMPLES, rows)]
    again = np.concatenate([_anova(x[i], n[i]) for i in (random.integers(len(n), size=(b, len(n))) for b in blocks)])
    tail = (1 - level) / 2
    lower = min(float(np.quantile(np.where(np.isnan(again), 0.0, again), tail)), value)
    upper = max(float(np.quantile(np.where(np.isnan(again), 1.0, again), 1 - tail)), value)
    info["method"] = f"analysis of variance; percentiles of {RESAMPLES} resamples of prompts"
    return Bound(value, lower, upper, level, {"sampling": (upper - lower) / 2}, None, info)


def unseen(x: NDArray, n: NDArray) -> str:
    """Why harms x of n answers by prompt show no variance between prompts; empty where they may."""
    if len(n) < 2:
        return "fewer than two prompts"
    if x.sum() == 0:
        return "no harm was seen"
    if x.sum() == n.sum():
        return "nothing but harm was seen"
    if n.max() <= 1:
        return "one rollout per prompt shows no variance between prompts"
    return ""


def _anova(x: NDArray, n: NDArray) -> NDArray:
    """ICC of each row of counts, shape (rows, K) -> (rows,); nan where there is no variance at all."""
    K, N, X = x.shape[1], n.sum(axis=1), x.sum(axis=1)
    p = X / N
    between = np.sum((x - n * p[:, None]) ** 2 / n, axis=1) / (K - 1)
    within = np.sum(x * (n - x) / n, axis=1) / np.maximum(N - K, 1)
    size = (N - np.sum(n**2, axis=1) / N) / (K - 1)
    bottom = between + (size - 1) * within
    seen = (X > 0) & (X < N) & (bottom > 0) & (N > K)
    return np.where(seen, np.minimum((between - within) / np.where(seen, bottom, 1.0), 1.0), np.nan)


def measured_width(
    events: ArrayLike,
    totals: ArrayLike,
    width: ArrayLike,
    correlation: float | str | None = None,
    level: float = 0.95,
    rule: str = "any-refusal",
) -> Bound:
    """Harm that gets through m answers, from counts of single answers to K prompts.

    Parameters
    ----------
    events, totals : array, shape (K,)
        Harmful rollouts and rollouts of every prompt; whole numbers if correlation is measured and a width exceeds 1.
    width : int or array, shape (W,)
        Numbers of answers.
    correlation : {None, "measured"} or float
        Measured: without bias where every prompt has at least m rollouts, else beta-binomial with the measured ICC. A
        number: beta-binomial with that ICC; 0 = independent.
    level : float
        Confidence level.
    rule : str
        See `ensemble_harm`.

    Returns
    -------
    Bound
        Shape (W,). ``info["estimate"]`` names the way of every width, ``info["icc"]`` is the measured ICC,
        ``info["note"]``, where there is one, says what the interval leaves out.

    Raises
    ------
    InputError
        Counts that do not fit, or a width, rule, level or correlation that does not exist.

    Notes
    -----
    Prompts count in proportion to their rollouts, so width 1 is the measured rate itself. The interval at width m > 1:

    * assumed ICC: both ends of the rate's clustered interval, through the beta-binomial (it rises with q);
    * unbiased: C(x, m) / C(n, m) lies in [0, 1] and its mean over prompts is E[h^m], so Clopper-Pearson with one trial
      per prompt holds (no variable in [0, 1] varies more than a coin). K prompts without m harms each therefore leave
      about 3.7 / K, never 0. (A bootstrap over prompts would give [0, 0] there, and too narrow an interval wherever few
      prompts carry the harm.) Since (E h)^m <= E[h^m] <= E[h], the rate's own interval cuts off what it excludes;
    * beta-binomial with measured ICC: the value is a model that the interval does not trust. Its upper end is that of
      the largest width that the rollouts reach (the rate's, if there is none): more answers than rollouts per prompt
      earn no credit. Without a measured ICC the value earns none either;
    * one prompt: its answers are independent given the prompt, but how prompts differ cannot be seen, and one prompt is
      one trial, so the upper end stays that of its rate; ``info["note"]`` says so.

    An estimate or upper end that exceeds the one at a smaller width is replaced by it, where the rule needs a fixed
    number of refusals. Other rules than any-refusal go the same ways, with the share of subsets through which harm gets
    in place of C(x, m) / C(n, m) (`unbiased_failure`). What holds there without a model: if t harmful answers let harm
    through, it gets through with at most m / t times the rate (Markov's inequality), and at least the rate^m.

    Examples
    --------
    Ten answers to each of thirty prompts. Four answers are counted without bias; twenty were never seen of any prompt.

    >>> harm = ms.depth.measured_width([0, 0, 0, 2, 8, 9] * 5, [10] * 30, [4, 20])
    >>> for how, h in zip(harm.info["estimate"], harm): print(f"{how}: {h}")
    unbiased: P(harm) = 0.156   95 % [0.0499, 0.334]   because: sampling 0.14; judge,
        lumping, model, truncation, rounding not assessed
    beta-binomial, measured ICC: P(harm) = 0.104   95 % [...e-16, 0.116]   because:
        sampling 0.058; judge, lumping, model, truncation, rounding not assessed
    """
    check_rule(rule)
    harmful_needed(rule, np.atleast_1d(widths_of(width)))
    x, n = (np.atleast_1d(np.asarray(a, dtype=np.float64)) for a in (events, totals))
    rate = clustered(x, n, level, name="P(harm)")
    x, n = x[n > 0], n[n > 0]
    m = np.atleast_1d(widths_of(width))
    if correlation is not None and not isinstance(correlation, str):
        rho = float(unit(correlation, "correlation"))
        ends = [_assumed(end, m, rho, rule) for end in (rate.value, rate.lower, rate.upper)]
        how, measured = ["measured rate" if w == 1 else f"beta-binomial, ICC {rho:g}" for w in m.tolist()], None
        if rho == 0:
            how = ["measured rate" if w == 1 else "independent answers" for w in m.tolist()]
        return _as_bound(ends, how, measured, level, rate)
    if correlation not in (None, "measured"):
        raise InputError(
            f"correlation is {correlation!r}.",
            cause='It is "measured" or an intra-class correlation.',
            next='Pass "measured", or a number from 0 (independent) to 1 (all alike).',
        )
    if (m > 1).any() and not bool(np.all((x == np.floor(x)) & (n == np.floor(n)))):
        raise InputError(
            "The rollouts are weighted.",
            cause="How alike the answers to one prompt are can be read from whole counts only.",
            next="Pass a number as correlation, or rollouts without weights.",
        )
    measured = icc(x, n, level)
    results, best = {}, (rate.value, rate.upper) if rule == "any-refusal" else (np.inf, np.inf)
    for w in sorted({*m.tolist()}):
        value, lower, upper, how = _one_width(x, n, w, rate, measured, rule)
        best = (np.fmin(value, best[0]), np.fmin(upper, best[1])) if falls_with_width(rule) else (value, upper)
        results[w] = (best[0], np.fmin(lower, best[0]), best[1], how)
    rows = [results[w] for w in m.tolist()]
    ends = [np.array([row[i] for row in rows]) for i in range(3)]
    return _as_bound(ends, [row[3] for row in rows], measured, level, rate)


def _assumed(end: float, m: NDArray, rho: float, rule: str) -> NDArray:
    return ensemble_harm(end, m, rho, rule) if np.isfinite(end) else np.full(m.shape, np.nan)


def _as_bound(ends: list[Any], how: list[str], measured: Bound | None, level: float, rate: Bound) -> Bound:
    sampling = (ends[2] - ends[1]) / 2
    info = {"name": "P(harm)", "estimate": how, "icc": measured, **{k: rate.info[k] for k in ("prompts", "total")}}
    info |= {k: rate.info[k] for k in ("note",) if k in rate.info}
    return Bound(ends[0], ends[1], ends[2], level, {"sampling": sampling}, None, info)


def _one_width(
    x: NDArray, n: NDArray, m: int, rate: Bound, measured: Bound, rule: str
) -> tuple[float, float, float, str]:
    """Value, lower and upper end, and the name of the way, for one width."""
    if m == 1 or len(n) == 0:
        return rate.value, rate.lower, rate.upper, "measured rate" if len(n) else "nothing measured"
    t = int(harmful_needed(rule, m))
    most = min(rate.upper * m / t, 1.0)
    if len(n) == 1:
        enough = n[0] >= m
        value = float(unbiased_failure(x, n, m, rule)[0]) if enough else ensemble_harm(rate.value, m, 0.0, rule)
        way = "unbiased" if enough else "power of the rate" if t == m else "independent answers"
        return value, min(rate.lower**m, value), max(most, value), f"{way}, one prompt"
    reach = max(int(n.min()), 1)
    if reach >= m:
        return *_unbiased(x, n, m, rate, rule), "unbiased"
    upper = most
    if falls_with_width(rule) and reach > 1 and reach > m - t:
        upper = min(_unbiased(x, n, reach, rate, rule)[2], most)
    if not measured.info["assessed"]:
        return rate.value, rate.lower**m, max(upper, rate.value), f"no credit for width ({measured.info['why']})"
    value = ensemble_harm(rate.value, m, float(np.clip(measured.value, 0, 1)), rule)
    return value, min(rate.lower**m, value), max(upper, value), "beta-binomial, measured ICC"


def _unbiased(x: NDArray, n: NDArray, m: int, rate: Bound, rule: str) -> tuple[float, float, float]:
    value = min(float(np.sum(n * unbiased_failure(x, n, m, rule)) / np.sum(n)), 1.0)
    # Unequal rollouts weigh the prompts unequally: the effective number of prompts is Kish's.
    size = float(np.sum(n) ** 2 / np.sum(n**2))
    lower, upper = clopper_pearson(value * size, size, rate.level)
    t = int(harmful_needed(rule, m))
    return value, max(lower, rate.lower**m), max(min(upper, rate.upper * m / t), value)
