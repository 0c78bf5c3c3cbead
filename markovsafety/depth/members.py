"""Members that differ: ensembles of unlike models, with independence, with nothing assumed, and merged by token.

With nothing assumed about how members go together, the probability that t of m events happen lies between Frechet's
ends, which some joint law attains. The pair correlation narrows them, but it does not fix the tail either.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..bound import Bound
from ..errors import InputError
from .rules import harmful_needed, refusals_needed, unit, widths_of

__all__ = [
    "least_correlation",
    "members_harm",
    "members_over_refusal",
    "pair_limits",
    "paired_range",
    "poisson_binomial",
    "token_average",
    "unassumed_harm",
]


def poisson_binomial(p: ArrayLike) -> NDArray:
    """Law of the number of events among independent ones that differ.

    Parameters
    ----------
    p : array, shape (..., m)
        Their probabilities.

    Returns
    -------
    array, shape (..., m + 1)
        By the exact recursion over members; only sums and products of non-negative numbers, so every entry, however
        small, has its digits (a Fourier transform would lose those below 1e-16).

    Raises
    ------
    InputError
        No members, or a number that is no probability.

    Examples
    --------
    How many of three members do harm, none to all:

    >>> ms.depth.poisson_binomial([0.1, 0.2, 0.5]).round(3)
    array([0.36, 0.49, 0.14, 0.01])
    """
    p = unit(p, "a member's probability")
    if p.ndim == 0 or p.shape[-1] == 0:
        raise _no_members()
    m = p.shape[-1]
    law = np.zeros((*p.shape[:-1], m + 1))
    law[..., 0] = 1.0
    for i in range(m):
        x = p[..., i, None]
        law[..., 1 : i + 2] = law[..., 1 : i + 2] * (1 - x) + law[..., : i + 1] * x
        law[..., :1] *= 1 - x
    return law


def members_harm(q: ArrayLike, rule: str = "any-refusal") -> Any:
    """Probability that harm gets through an ensemble of independent members that differ.

    Parameters
    ----------
    q : array, shape (..., m)
        Each member's probability of harm; one answer of every member.
    rule : str
        See `ensemble_harm`.

    Returns
    -------
    float or array, shape (...)
        For any-refusal the product, which at a fixed mean is largest where the members are equal.

    Raises
    ------
    InputError
        No members, a number that is no probability, or a rule that asks for more refusals than there are members.

    Examples
    --------
    >>> for rule in ("any-refusal", "majority"):
    ...     print(f"{ms.depth.members_harm([0.1, 0.2, 0.5], rule):.3f} by {rule}")
    0.010 by any-refusal
    0.150 by majority
    """
    q = unit(q, "q")
    if q.ndim == 0 or q.shape[-1] == 0:
        raise _no_members()
    return _upper_sum(q, int(harmful_needed(rule, q.shape[-1])))


def members_over_refusal(nu: ArrayLike, rule: str = "any-refusal") -> Any:
    """Probability that independent members with unlike refusal rates nu, shape (..., m), refuse a harmless prompt.

    Parameters
    ----------
    nu : array, shape (..., m)
        Each member's rate of refusing harmless prompts.
    rule : str
        See `ensemble_harm`.

    Returns
    -------
    float or array, shape (...)

    Raises
    ------
    InputError
        No members, a number that is no probability, or a rule that asks for more refusals than there are members.

    Examples
    --------
    >>> for rule in ("any-refusal", "majority"):
    ...     print(f"{ms.depth.members_over_refusal([0.02, 0.05, 0.1], rule):.3f} by {rule}")
    0.162 by any-refusal
    0.008 by majority
    """
    nu = unit(nu, "nu")
    if nu.ndim == 0 or nu.shape[-1] == 0:
        raise _no_members()
    k = int(refusals_needed(rule, nu.shape[-1]))
    if k == 1:
        with np.errstate(divide="ignore"):
            result = -np.expm1(np.log1p(-nu).sum(axis=-1))
        return float(result) if np.ndim(result) == 0 else result
    return _upper_sum(nu, k)


def _upper_sum(p: NDArray, t: int) -> Any:
    m = p.shape[-1]
    result = p.prod(axis=-1) if t == m else np.minimum(poisson_binomial(p)[..., t:].sum(axis=-1), 1.0)
    return float(result) if np.ndim(result) == 0 else result


def _no_members() -> InputError:
    return InputError(
        "An ensemble without members.",
        cause="The last axis holds one probability per member.",
        next="Pass a list of probabilities, one for each member.",
    )


def unassumed_harm(q: ArrayLike, rule: str = "any-refusal") -> Bound:
    """Ends between which harm lies whatever the dependence of the members; every value in between can happen.

    Parameters
    ----------
    q : array, shape (..., m)
        Each member's probability of harm.
    rule : str

    Returns
    -------
    Bound
        Proven (level 1), shape (...); the value is that of independent members.

    Notes
    -----
    For any-refusal Frechet's ``max(0, sum q - m + 1) <= P(all) <= min q``. For t or more of m events (B. Rueger,
    Metrika 25 (1978) 171, here for unequal probabilities): at most the least, over j < t, of the sum of the m - j
    smallest q over t - j, because among t events at least t - j are not one of the j likeliest, and Markov's inequality
    holds for their number; the lower end is the upper one of the complements. A linear programme over all joint laws
    gives the same numbers.

    Examples
    --------
    >>> print(ms.depth.unassumed_harm([0.1, 0.2, 0.5], "majority"))
    P(harm) = 0.15   proven [0, 0.3]   because: model 0.15; sampling, judge, lumping,
        truncation, rounding not assessed
    """
    q = unit(q, "q")
    value = np.asarray(members_harm(q, rule))
    m = q.shape[-1]
    t = int(harmful_needed(rule, m))
    upper, lower = _most(q, t), 1 - _most(1 - q, m - t + 1)
    if t == m:
        lower = np.maximum(q.sum(axis=-1) - (m - 1), 0.0)
    lower, upper = np.minimum(lower, value), np.maximum(upper, value)
    info = {"name": "P(harm)", "method": "Frechet's ends: nothing is assumed about how members go together"}
    if value.ndim == 0:
        value, lower, upper = float(value), float(lower), float(upper)
    return Bound(value, lower, upper, 1.0, {"model": (upper - lower) / 2}, None, info)


def _most(q: NDArray, t: int) -> NDArray:
    """Largest probability of t or more events."""
    m = q.shape[-1]
    rising = np.cumsum(np.sort(q, axis=-1), axis=-1)
    ends = [rising[..., m - j - 1] / (t - j) for j in range(t)]
    return np.minimum(np.min(ends, axis=0), 1.0)


def least_correlation(q: ArrayLike, width: ArrayLike) -> Any:
    """Smallest correlation that m exchangeable answers with probability q of harm can have.

    Parameters
    ----------
    q : float or array
    width : int or array

    Returns
    -------
    float or array
        ``(f (1 - f) / (m q (1 - q)) - 1) / (m - 1)`` with f the fractional part of m q: reached when the number of
        harmful answers is always one of the two whole numbers around m q. At least -1 / (m - 1). Where width is 1 or q
        is 0 or 1 there is no pair to correlate, and it is 0. Answers that are independent given their prompt never
        correlate negatively: it takes answers that know of each other.

    Examples
    --------
    >>> ms.depth.least_correlation(0.3, [2, 5, 10]).round(3)
    array([-0.429, -0.19 , -0.111])
    """
    q, m = np.broadcast_arrays(unit(q, "q"), widths_of(width))
    live = (m > 1) & (q > 0) & (q < 1)
    safe, size = np.where(live, q, 0.5), np.where(live, m, 2)
    f = size * safe - np.floor(size * safe)
    result = np.where(live, (f * (1 - f) / (size * safe * (1 - safe)) - 1) / (size - 1), 0.0)
    return float(result) if result.ndim == 0 else result


def pair_limits(q1: float, q2: float) -> tuple[float, float]:
    """Smallest and largest correlation that two events can have (Frechet).

    Parameters
    ----------
    q1, q2 : float
        Their probabilities.

    Returns
    -------
    (float, float)
        0, 0 if one of them is certain or impossible.

    Examples
    --------
    >>> low, high = ms.depth.pair_limits(0.1, 0.3)
    >>> print(f"{low:.3f} to {high:.3f}")
    -0.218 to 0.509
    """
    a, b = float(unit(q1, "q1")), float(unit(q2, "q2"))
    scale = np.sqrt(a * (1 - a) * b * (1 - b))
    if scale == 0:
        return 0.0, 0.0
    return float((max(a + b - 1, 0.0) - a * b) / scale), float((min(a, b) - a * b) / scale)


def paired_range(q: float, width: int, icc: float, rule: str = "any-refusal") -> Bound:
    """Ends of harm when only one answer's harm and the correlation of two are known.

    Parameters
    ----------
    q : float
        Probability of harm of one answer.
    width : int
        Number m of exchangeable answers, at most 200.
    icc : float
        Correlation of two answers; may be negative.
    rule : str

    Returns
    -------
    Bound
        Proven (level 1): the least and the most over all laws of the number of harmful answers with that mean and
        variance, by a linear programme of m + 1 unknowns; the value is their middle.

    Raises
    ------
    InputError
        The correlation is impossible for m answers with that q.

    Examples
    --------
    Four answers of which two correlate by 0.3; the beta-binomial is one of the laws in between:

    >>> print(ms.depth.paired_range(0.1, 4, 0.3))
    P(harm) = 0.0185   proven [..., 0.037]   because: model 0.018; sampling, judge,
        lumping, truncation, rounding not assessed
    >>> print(f"{ms.depth.ensemble_harm(0.1, 4, 0.3):.4f}")
    0.0116
    """
    from scipy.optimize import linprog

    q, m = float(unit(q, "q")), int(widths_of(width))
    t = int(harmful_needed(rule, m))
    if m > 200:
        raise InputError(f"width is {m}.", cause="The programme loses its digits there.", next="Pass a width <= 200.")
    check_correlation(q, m, icc)
    if m == 1 or q in (0.0, 1.0):
        return Bound(q, q, q, 1.0, {"model": 0.0}, None, {"name": "P(harm)"})
    x = np.arange(m + 1) / m
    second = q * q + (q * (1 - q)) * (1 + (m - 1) * icc) / m
    rows, right = np.stack([np.ones(m + 1), x, (x - q) ** 2]), np.array([1.0, q, second - q * q])
    goal = (np.arange(m + 1) >= t).astype(float)
    ends = []
    for sign in (1.0, -1.0):
        found = linprog(sign * goal, A_eq=rows, b_eq=right, bounds=(0, 1), method="highs")
        # At the very edge of what is possible rounding may leave no solution; nothing assumed stays true.
        ends.append(sign * found.fun if found.status == 0 else float(sign < 0))
    low, high = (min(max(e, 0.0), 1.0) for e in ends)
    info = {"name": "P(harm)", "method": "linear programme over all laws with this mean and pair correlation"}
    return Bound((low + high) / 2, low, high, 1.0, {"model": (high - low) / 2}, None, info)


def check_correlation(q: float, m: int, icc: float) -> None:
    """Raise unless m exchangeable answers with probability q of harm can have this correlation."""
    least = float(np.min(least_correlation(q, m)))
    if not least - 1e-12 <= icc <= 1:
        raise InputError(
            f"A correlation of {icc:g} between {m} answers with probability {q:g} of harm.",
            cause=f"Whatever their joint law, it lies in [{least:.4g}, 1].",
            next="Pass a correlation in that range.",
        )


def token_average(a: ArrayLike, r: ArrayLike) -> Any:
    """Harm when members are merged token by token: their next-token laws are averaged and one answer is spoken.

    Parameters
    ----------
    a, r : array, shape (..., m)
        Each member's probability of harm and of refusal per token, given that neither came before.

    Returns
    -------
    float or array, shape (...)
        ``mean(a) / (mean(a) + mean(r))``; nan-free: 0 where no member ever does harm.

    Raises
    ------
    InputError
        A pair sums to more than 1.

    Notes
    -----
    This is neither any-refusal (the product of a / (a + r)) nor the mean of the members' harm: it is their mean
    weighted by a + r, so a member that decides quickly counts for more. One member that refuses at once in every token
    bounds harm by ``sum(a) / r``, one that never decides has no say. Our own.

    Examples
    --------
    A member that does harm in four answers of five and one that refuses quickly, merged by token and asked in turn:

    >>> print(f"{ms.depth.token_average([0.08, 0.01], [0.02, 0.3]):.3f}")
    0.220
    >>> print(f"{ms.depth.members_harm([0.08 / 0.1, 0.01 / 0.31]):.3f}")
    0.026
    """
    a, r = np.broadcast_arrays(unit(a, "a"), unit(r, "r"))
    if a.ndim == 0 or a.shape[-1] == 0:
        raise _no_members()
    if (a + r > 1 + 1e-12).any():
        raise InputError(
            f"a + r is {float((a + r).max()):.17g}.",
            cause="Harm and refusal at one token exclude each other.",
            next="Give hazards that sum to at most 1.",
        )
    harm, stop = a.sum(axis=-1), (a + r).sum(axis=-1)
    result = np.divide(harm, stop, out=np.zeros(harm.shape), where=stop > 0)
    return float(result) if np.ndim(result) == 0 else result
