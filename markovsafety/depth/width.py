"""Width: what m answers to one prompt are worth, under a rule that says when the ensemble refuses.

Let q be the probability that one answer is harmful and m the number of answers (or models) that are asked. Under the
rule "any-refusal" one harmless answer is enough to stop harm. Were the answers independent, harm would be left with
probability q^m. They are not: prompts differ, and what tricks one answer tends to trick the next. With h_i the
probability of harm for prompt i,

    E[h_i^m] >= (E h_i)^m,

so independence at the mean always promises too much. Three ways to get E[h_i^m]: estimate it without bias from n >= m
answers to each prompt; take h_i from a law with the intra-class correlation (ICC) that was measured or assumed; or
give width no credit at all, E[h_i^m] <= E[h_i].

The rules are in `rules`, the laws of alike answers in `mixtures`, unlike members in `members`; `measured` applies them
to counts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..errors import InputError
from .members import least_correlation
from .mixtures import at_least, check_model, tail_limit
from .profile import budget
from .rules import check_rule, falls_with_width, harmful_needed, refusals_needed, unit, widths_of

__all__ = [
    "check_rule",
    "chernoff",
    "ensemble_floor",
    "ensemble_harm",
    "hoeffding",
    "needed_width",
    "over_refusal",
    "unit",
    "why_no_width",
    "widths_of",
]

MOST = 10**12  # no width search looks beyond this many answers
SCANNED = 256  # widths that are tried one by one where nothing is proven of how harm falls


def ensemble_harm(
    q: ArrayLike,
    width: ArrayLike,
    icc: ArrayLike = 0.0,
    rule: str = "any-refusal",
    model: str = "beta-binomial",
) -> Any:
    """Probability that harm gets through m answers.

    Parameters
    ----------
    q : float or array
        Mean probability of harm of one answer.
    width : int or array
        Number m of answers.
    icc : float or array
        Intra-class correlation in [0, 1]: the correlation of two answers to one prompt. 0 = independent, 1 = all alike.
    rule : str
        "any-refusal": harm gets through if every answer is harmful; "majority": if more than half are; "2-refusals",
        "3-refusals", ...: if fewer than so many refuse (widths from that number on).
    model : {"beta-binomial", "copula", "common-shock", "independent"}
        How the probability varies between prompts at this mean and correlation; see `mixtures`.

    Returns
    -------
    float or array
        Of the broadcast shape. any-refusal, beta-binomial:
        ``prod over j < m of (q (1 - icc) + j icc) / ((1 - icc) + j icc)``.

    Raises
    ------
    InputError
        If a number is outside its range, or the rule or model does not exist.

    Notes
    -----
    With alpha = q (1 - icc) / icc and beta = (1 - q)(1 - icc) / icc the product is B(alpha + m, beta) / B(alpha, beta),
    which falls like m^-beta: a power of the width, not exponentially. The mean and the ICC do not fix the tail: at
    q = 0.1, icc = 0.3 and ten answers the beta-binomial leaves 0.0021, a Gaussian copula 0.0031, a common shock 0.030
    (`paired_range` gives the ends over all laws). Harm rises with q under every rule and model, so ends of q stay ends.
    The default model takes less than a microsecond per cell; the copula, an integral per cell, some ten.

    Examples
    --------
    >>> for model in ("beta-binomial", "copula", "common-shock"):
    ...     print(f"{ms.depth.ensemble_harm(0.1, 10, icc=0.3, model=model):.4f} {model}")
    0.0021 beta-binomial
    0.0031 copula
    0.0300 common-shock
    """
    check_model(model)
    q, m = unit(q, "q"), widths_of(width)
    rho = _correlations(icc, q, m)
    result = at_least(q, rho, m, harmful_needed(rule, m), model)
    return float(result) if result.ndim == 0 else result


def over_refusal(
    nu: ArrayLike,
    width: ArrayLike,
    rule: str = "any-refusal",
    icc: ArrayLike = 0.0,
    model: str = "beta-binomial",
) -> Any:
    """Probability that a harmless prompt is refused by m answers: the price of width.

    Parameters
    ----------
    nu : float or array
        Probability that one answer refuses a harmless prompt.
    width : int or array
        Number m of answers.
    rule : str
        As in `ensemble_harm`: refused if at least as many answers refuse as the rule needs.
    icc : float or array
        Correlation of two answers' refusals of a harmless prompt. Under any-refusal answers that agree refuse less, so
        0 is the upper end; under a majority they refuse more.
    model : str

    Returns
    -------
    float or array
        any-refusal and independent: ``1 - (1 - nu)^m``.

    Examples
    --------
    >>> for rule in ("any-refusal", "majority"):
    ...     print(ms.depth.over_refusal(0.02, [1, 3, 9], rule).round(4))
    [0.02   0.0588 0.1663]
    [0.02   0.0012 0.    ]
    """
    check_model(model)
    nu, m = unit(nu, "nu"), widths_of(width)
    rho = _correlations(icc, nu, m)
    result = at_least(nu, rho, m, refusals_needed(rule, m), model)
    return float(result) if result.ndim == 0 else result


def _correlations(icc: ArrayLike, q: NDArray, m: NDArray) -> NDArray:
    """Correlations, checked."""
    rho = np.asarray(icc, dtype=np.float64)
    if np.any(rho < 0):
        least = float(np.min(least_correlation(q, m))) if np.size(q) and np.size(m) else 0.0
        raise InputError(
            f"icc is {float(rho[rho < 0].flat[0]):g}.",
            cause="Answers that are independent given their prompt never correlate negatively, and no law of "
            f"{int(np.max(m))} answers correlates below {least:.4g} here.",
            next="Pass 0 <= icc <= 1, or ask paired_range, which takes any correlation that is possible.",
        )
    return unit(rho, "icc")


def ensemble_floor(q: ArrayLike, icc: ArrayLike = 0.0, rule: str = "any-refusal", model: str = "beta-binomial") -> Any:
    """What is left of harm at unlimited width.

    Parameters
    ----------
    q, icc : float or array
    rule, model : str

    Returns
    -------
    float or array
        A fixed number of refusals: 0, unless all answers can be alike (icc 1: q; common shock: icc q). Majority: the
        probability of a prompt whose own harm exceeds one half; with the beta-binomial 1 - I_1/2(alpha, beta). A
        majority of few answers, an even number above all, can leave less than that.

    Examples
    --------
    A majority of correlated answers leaves something however many are asked:

    >>> ms.depth.ensemble_floor([0.1, 0.3, 0.6], 0.3, "majority").round(3)
    array([0.045, 0.227, 0.643])
    """
    check_model(model)
    check_rule(rule)
    q, rho = np.broadcast_arrays(unit(q, "q"), _correlations(icc, unit(q, "q"), np.array(2)))
    if model == "independent" and np.any(rho != 0):
        at_least(q, rho, 2, 1, model)  # refuses
    if falls_with_width(rule):
        sure = rho * q if model == "common-shock" else np.where(rho == 1, q, 0.0)
        result = np.where(q == 1, 1.0, sure)
    else:
        result = tail_limit(q, rho, model)
    return float(result) if result.ndim == 0 else result


def chernoff(q: ArrayLike, width: ArrayLike, rule: str = "majority") -> Any:
    """Upper bound of harm through independent answers, exp(-m KL(x || q)) with x the share that has to be harmful.

    Parameters
    ----------
    q : float or array
    width : int or array
    rule : str
        Majority takes x = 1/2, which gives ``(4 q (1 - q))^(m / 2)``; the others t / m.

    Returns
    -------
    float or array
        1 where q >= x. Loose: q = 0.2 and a majority of 11 leave 0.0117, this says 0.0859.

    Examples
    --------
    >>> print(f"{ms.depth.ensemble_harm(0.2, 11, rule='majority'):.4f} <= {ms.depth.chernoff(0.2, 11):.4f}")
    0.0117 <= 0.0859
    """
    q, x, m = _shares(q, width, rule)
    with np.errstate(divide="ignore", invalid="ignore"):
        up = np.where(x > 0, x * (np.log(x) - np.log(q)), 0.0)
        down = np.where(x < 1, (1 - x) * (np.log1p(-x) - np.log1p(-q)), 0.0)
        result = np.where(q >= x, 1.0, np.exp(-m * (up + down)))
    return float(result) if result.ndim == 0 else result


def hoeffding(q: ArrayLike, width: ArrayLike, rule: str = "majority") -> Any:
    """Upper bound of harm through independent answers, exp(-2 m (x - q)^2).

    Parameters
    ----------
    q : float or array
        Probability of harm of one answer.
    width : int or array
        Number m of answers.
    rule : str
        As in `chernoff`, which is never larger.

    Returns
    -------
    float or array
        1 where it says nothing.

    Raises
    ------
    InputError
        A number outside its range, or a rule that does not exist.

    Notes
    -----
    W. Hoeffding, J. Amer. Statist. Assoc. 58 (1963), theorem 1.

    Examples
    --------
    Looser still than `chernoff`:

    >>> print(f"{ms.depth.chernoff(0.2, 11):.4f} <= {ms.depth.hoeffding(0.2, 11):.4f}")
    0.0859 <= 0.1381
    """
    q, x, m = _shares(q, width, rule)
    result = np.where(q >= x, 1.0, np.exp(-2 * m * (x - q) ** 2))
    return float(result) if result.ndim == 0 else result


def _shares(q: ArrayLike, width: ArrayLike, rule: str) -> tuple[NDArray, NDArray, NDArray]:
    m = widths_of(width)
    x = harmful_needed(rule, m) / m if falls_with_width(rule) else np.full(m.shape, 0.5)
    q, x, m = np.broadcast_arrays(unit(q, "q"), x, m)
    return q, x, m


# --- how wide ---


def needed_width(
    q: ArrayLike,
    eps: ArrayLike,
    icc: ArrayLike = 0.0,
    rule: str = "any-refusal",
    model: str = "beta-binomial",
) -> Any:
    """Smallest number of answers that brings harm down to eps.

    Parameters
    ----------
    q : float or array
        Mean probability of harm of one answer.
    eps : float or array
        Harm budget.
    icc : float or array
        Intra-class correlation; 0 = independent.
    rule, model : str
        As in `ensemble_harm`.

    Returns
    -------
    int, None or array
        Of numbers an int, or None where no width up to 1e12 is enough (`why_no_width` says why). Of arrays an array of
        floats, inf where it is impossible.

    Notes
    -----
    With a fixed number of refusals harm falls with every answer. Under a majority it does not: an even number also
    refuses at a tie, so 2 n answers leave less than 2 n - 1. Odd and even numbers are searched apart. From 2 n - 1 to
    2 n + 1 answers harm changes by a positive multiple of E[(2p - 1) p^n (1 - p)^n]; of the beta-binomial that has the
    sign of alpha - beta, so odd numbers help if and only if q < 1/2, at every size. From 2 n to 2 n + 2 it changes with
    the sign of n (alpha - beta + 2) + alpha + 1: even numbers first make it worse, and help only beyond
    n = (alpha + 1) / (beta - alpha - 2), or never. (Copula: one by one up to 256, then taken to fall.) Our own.

    Examples
    --------
    >>> for rule in ("any-refusal", "majority"):
    ...     print([ms.depth.needed_width(0.1, 1e-3, icc, rule) for icc in (0, 0.1, 0.3)])
    [3, 5, 15]
    [8, None, None]
    """
    check_rule(rule)
    check_model(model)
    scalar = all(np.ndim(x) == 0 for x in (q, eps, icc))
    target = np.vectorize(budget, otypes=[float])(eps) if np.size(eps) else np.zeros(np.shape(eps))
    p = unit(q, "q")
    p, target, rho = np.broadcast_arrays(p, target, _correlations(icc, p, np.array(2)))
    shape = p.shape
    p, target, rho = p.reshape(-1), target.reshape(-1), rho.reshape(-1)
    out = np.full(p.shape, np.inf)
    out[p == 0] = _smallest(rule)
    todo = np.flatnonzero((target > 0) & (p > 0))  # floats underflow to 0, probabilities do not
    if len(todo):
        search = _falling if falls_with_width(rule) else _majority
        out[todo] = search(p[todo], target[todo], rho[todo], rule, model)
    if scalar:
        return int(out[0]) if np.isfinite(out[0]) else None
    return out.reshape(shape)


def _smallest(rule: str) -> int:
    """Smallest width of a rule: as many answers as it needs refusals."""
    return 1 if rule in ("any-refusal", "majority") else int(rule.split("-")[0])


def _falling(q: NDArray, eps: NDArray, rho: NDArray, rule: str, model: str) -> NDArray:
    least = _smallest(rule)

    def enough(n: NDArray, i: NDArray) -> NDArray:
        return _reached(q[i], n + least - 1, rho[i], rule, model, eps[i])

    hopeless = ~_below(ensemble_floor(q, rho, rule, model), eps)
    return _first(enough, np.ones(len(q), dtype=np.int64), hopeless) + (least - 1)


def _majority(q: NDArray, eps: NDArray, rho: NDArray, rule: str, model: str) -> NDArray:
    def odd(n: NDArray, i: NDArray) -> NDArray:
        return _reached(q[i], 2 * n - 1, rho[i], rule, model, eps[i])

    def even(n: NDArray, i: NDArray) -> NDArray:
        return _reached(q[i], 2 * n, rho[i], rule, model, eps[i])

    one = np.ones(len(q), dtype=np.int64)
    everywhere = np.arange(len(q))
    hopeless = ~_below(ensemble_floor(q, rho, rule, model), eps)
    best = np.where(odd(one, everywhere), 1.0, np.where(even(one, everywhere), 2.0, np.inf))
    best = np.minimum(best, 2 * _first(odd, one, hopeless | (q >= 0.5)) - 1)
    start = one
    if model == "copula":
        start = np.full(len(q), SCANNED // 2, dtype=np.int64)
        for n in range(2, SCANNED // 2 + 1):
            open_ = np.flatnonzero(np.isinf(best) | (best > 2 * n))
            hit = open_[even(np.full(len(open_), n), open_)] if len(open_) else open_
            best[hit] = 2.0 * n
    # Even numbers that rise at first rise from what two answers leave; where that is too much, the search sees no less
    # before harm falls again. If it never does, the floor lies above.
    even_best = 2 * _first(even, start, hopeless)
    return np.minimum(best, even_best)


def _reached(q: NDArray, m: NDArray, rho: NDArray, rule: str, model: str, eps: NDArray) -> NDArray:
    return at_least(q, rho, m, harmful_needed(rule, m), model) <= eps * (1 + 1e-12)  # `within`, by cell


def _below(floor: Any, eps: NDArray) -> NDArray:
    """Whether a floor leaves any hope; one that is reached at width 1 already does."""
    return np.asarray(floor) <= eps * (1 + 1e-12)


def _first(enough: Callable[[NDArray, NDArray], NDArray], start: NDArray, hopeless: NDArray) -> NDArray:
    """Smallest n >= start with `enough`, which stays true once it is; inf where there is none up to `MOST`."""
    out = np.full(len(start), np.inf)
    alive = np.flatnonzero(~hopeless)
    low, high = start[alive] - 1, start[alive].copy()
    looking = np.ones(len(alive), dtype=bool)
    found = np.zeros(len(alive), dtype=bool)
    while looking.any():
        at = np.flatnonzero(looking)
        good = enough(high[at], alive[at])
        found[at[good]] = True
        looking[at[good]] = False
        bad = at[~good]
        low[bad], high[bad] = high[bad], high[bad] * 2
        looking[bad[high[bad] > MOST]] = False
    while True:
        at = np.flatnonzero(found & (high - low > 1))
        if len(at) == 0:
            break
        middle = (low[at] + high[at]) // 2
        good = enough(middle, alive[at])
        high[at] = np.where(good, middle, high[at])
        low[at] = np.where(good, low[at], middle)
    out[alive[found]] = high[found]
    return out


def why_no_width(
    q: float, eps: float, icc: float = 0.0, rule: str = "any-refusal", model: str = "beta-binomial"
) -> str:
    """Why no number of answers brings harm down to eps; empty if one does (`needed_width`).

    Parameters
    ----------
    q, eps, icc, rule, model
        Single ones, as in `needed_width`.

    Returns
    -------
    str
        Names the floor of unlimited width (`ensemble_floor`), or how slowly harm falls.

    Examples
    --------
    >>> print(ms.depth.why_no_width(0.1, 1e-3, 0.3, "majority"))
    impossible: even at unlimited width harm stays above the floor 0.0454, the budget is
        0.001; one answer leaves 0.1, two leave 0.037
    """
    if needed_width(q, eps, icc, rule, model) is not None:
        return ""
    eps = budget(eps)
    if eps == 0:
        return "impossible: answers that can be harmful are never harmless with certainty"
    floor = ensemble_floor(q, icc, rule, model)
    if floor > eps:
        text = f"impossible: even at unlimited width harm stays above the floor {floor:.3g}, the budget is {eps:.3g}"
        if not falls_with_width(rule):
            few = [ensemble_harm(q, m, icc, rule, model) for m in (1, 2)]
            text += f"; one answer leaves {few[0]:.3g}, two leave {few[1]:.3g}"
        return text
    if icc and model == "beta-binomial":
        power = (1 - float(q)) * (1 - icc) / icc
        return f"impossible up to {MOST:.0e} answers: harm falls only like width to the power -{power:.3g}"
    return f"impossible up to {MOST:.0e} answers: harm approaches its limit {floor:.3g} too slowly"
