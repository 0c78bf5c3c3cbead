"""Width: what m answers to one prompt are worth, when harm gets through only if every one of them is harmful.

Let q be the probability that one answer is harmful and m the number of answers (or models) that are asked. Under the
rule "any-refusal" one harmless answer is enough to stop harm. Were the answers independent, harm would be left with
probability q^m. They are not: prompts differ, and what tricks one answer tends to trick the next. With h_i the
probability of harm for prompt i,

    E[h_i^m] >= (E h_i)^m,

so independence at the mean always promises too much. Three ways to get E[h_i^m]: estimate it without bias from n >= m
answers to each prompt; take h_i as beta-distributed with the intra-class correlation (ICC) that was measured or
assumed; or give width no credit at all, E[h_i^m] <= E[h_i].

Here are the rules and the models; `measured` applies them to counts.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..errors import InputError
from .profile import budget, whole, within

__all__ = ["check_rule", "ensemble_harm", "needed_width", "over_refusal", "unit", "widths_of"]

RULES = ("any-refusal",)
MOST = 10**12  # no width search looks beyond this many answers
SUMMED = 1 << 16  # products up to this width are multiplied out; beyond it, log-gamma differences


def check_rule(rule: str) -> None:
    """Raise unless `rule` is a known way to combine answers."""
    if rule not in RULES:
        raise InputError(
            f"The rule {rule!r} does not exist.",
            cause=f"Answers can be combined by {', '.join(map(repr, RULES))}: harm only if every answer is harmful.",
            next=f"Pass rule={RULES[0]!r}.",
        )


def widths_of(width: Any) -> NDArray:
    """Numbers of answers as an int array, checked."""
    m = whole(width, "width")
    if (m < 1).any():
        raise InputError(f"width is {width!r}.", cause="At least one answer is given.", next="Pass whole numbers >= 1.")
    return m


def unit(x: ArrayLike, name: str) -> NDArray:
    """Numbers in [0, 1] as an array, checked."""
    array = np.asarray(x, dtype=np.float64)
    if not np.all((array >= 0) & (array <= 1)):
        bad = array[~((array >= 0) & (array <= 1))].flat[0]
        raise InputError(f"{name} is {bad:g}.", cause="It lies in [0, 1].", next=f"Pass 0 <= {name} <= 1.")
    return array


def ensemble_harm(q: ArrayLike, width: ArrayLike, icc: ArrayLike = 0.0, rule: str = "any-refusal") -> Any:
    """Probability that harm gets through m answers, by the beta-binomial.

    Parameters
    ----------
    q : float or array
        Mean probability of harm of one answer.
    width : int or array
        Number m of answers.
    icc : float or array
        Intra-class correlation in [0, 1]: the correlation of two answers to one prompt. 0 = independent, 1 = all alike.
    rule : str
        Only "any-refusal" exists.

    Returns
    -------
    float or array
        Of the broadcast shape: ``prod over j < m of (q (1 - icc) + j icc) / ((1 - icc) + j icc)``.

    Raises
    ------
    InputError
        If a number is outside its range or the rule does not exist.

    Notes
    -----
    With alpha = q (1 - icc) / icc and beta = (1 - q)(1 - icc) / icc this is B(alpha + m, beta) / B(alpha, beta), which
    falls like m^-beta: a power of the width, not exponentially. The mean and the ICC do not fix the tail; other laws
    with the same two numbers can leave more harm (a common shock: icc * q at any width).
    """
    check_rule(rule)
    q, m, rho = np.broadcast_arrays(unit(q, "q"), widths_of(width), unit(icc, "icc"))
    result = np.empty(q.shape)
    flat_q, flat_m, flat_rho, out = q.ravel(), m.ravel(), rho.ravel(), result.reshape(-1)
    order = np.lexsort((flat_m, flat_rho, flat_q))
    starts = np.ones(len(order), dtype=bool)  # one running product per pair (q, icc)
    starts[1:] = (np.diff(flat_q[order]) != 0) | (np.diff(flat_rho[order]) != 0)
    for rows in np.split(order, np.flatnonzero(starts)[1:]) if len(order) else []:
        out[rows] = _power(float(flat_q[rows[0]]), float(flat_rho[rows[0]]), flat_m[rows])
    return float(result) if result.ndim == 0 else result


def _power(q: float, rho: float, m: NDArray) -> NDArray:
    """E[h^m] for h ~ Beta with mean q and ICC rho; m of shape (w,)."""
    if rho == 0 or q in (0.0, 1.0):
        return np.power(q, m)
    if rho == 1:
        return np.full(m.shape, q)
    j = np.arange(min(int(m.max()), SUMMED))
    bottom = (1 - rho) + j * rho
    ratio = (q * (1 - rho) + j * rho) / bottom
    lost = (1 - q) * (1 - rho) / bottom  # 1 - ratio, the exact one of the two where ratio is near 1
    sums = np.cumsum(np.where(ratio < 0.5, np.log(np.maximum(ratio, 5e-324)), np.log1p(-np.minimum(lost, 0.75))))
    result = sums[np.minimum(m, len(sums)) - 1]
    far = m > len(sums)
    if far.any():
        from scipy.special import gammaln

        a, s = q * (1 - rho) / rho, (1 - rho) / rho
        # Relative to the last product, so that log-gamma errs only in what is left.
        tail = gammaln(a + m) - gammaln(s + m) - (gammaln(a + SUMMED) - gammaln(s + SUMMED))
        result = np.where(far, result + np.minimum(tail, 0.0), result)
    return np.where(m == 1, q, np.exp(result))


def needed_width(q: float, eps: float, icc: float = 0.0, rule: str = "any-refusal") -> int | None:
    """Smallest number of answers that brings harm down to eps.

    Parameters
    ----------
    q : float
        Mean probability of harm of one answer.
    eps : float
        Harm budget.
    icc : float
        Intra-class correlation; 0 = independent.

    Returns
    -------
    int or None
        None where no width up to 1e12 is enough (icc = 1, q = 1, eps = 0, or a tail that heavy).
    """
    check_rule(rule)
    eps, q, icc = budget(eps), float(unit(q, "q")), float(unit(icc, "icc"))
    if eps == 0 and q > 0:
        return None  # floats underflow to 0, probabilities do not

    def enough(m: int) -> bool:
        return within(ensemble_harm(q, m, icc), eps)

    high = 1
    while not enough(high):
        high *= 2
        if high > MOST:
            return None
    low = high // 2  # not enough, or 0
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def over_refusal(nu: ArrayLike, width: ArrayLike, rule: str = "any-refusal") -> Any:
    """Probability that a benign prompt is refused when any of m independent answers may refuse: 1 - (1 - nu)^m.

    Parameters
    ----------
    nu : float or array
        Probability that one answer refuses a benign prompt.
    width : int or array
        Number m of answers.

    Returns
    -------
    float or array
        The price of width. Answers that agree with each other refuse less: this is its upper end.
    """
    check_rule(rule)
    nu, m = unit(nu, "nu"), widths_of(width)
    with np.errstate(divide="ignore"):
        result = -np.expm1(m * np.log1p(-nu))
    return float(result) if np.ndim(result) == 0 else result
