"""Answers that are alike: the law of the number of harmful ones among m, when the probability itself varies.

Answers to one prompt are independent given the prompt, but prompts differ: the probability p of an event is drawn
first, then m answers are. All laws of p here have a given mean and a given correlation of two answers (the intra-class
correlation rho, Var p / (mean (1 - mean))), which does not fix the rest:

| model | p | at least t of m |
|---|---|---|
| "independent" | always the mean | binomial (the correlation has to be 0) |
| "beta-binomial" | Beta with alpha + beta = (1 - rho) / rho | falls like a power of m |
| "copula" | Phi((c + sqrt(r) z) / sqrt(1 - r)), z normal | Gaussian copula with one factor; r from rho |
| "common-shock" | 0 or 1 with probability rho, else the mean | never below rho times the mean |

No number is formed as 1 - x where x is near 1 and the digits matter: every tail is summed from the side where it is
small. Cells are grouped by width and then vectorised; the copula integrates once per cell.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..errors import InputError
from .rules import unit

__all__ = ["MODELS", "at_least", "check_model", "latent_correlation", "log_moment", "tail_limit"]

MODELS = ("beta-binomial", "copula", "common-shock", "independent")
CHUNK = 1 << 15  # cells that stay in the cache
SUMMED = 64  # widths up to here are multiplied out
LONGEST = 4096  # terms of a sum; beyond, Gauss quadrature
NOTHING = 1e-290  # a correlation below this is none: its inverse is no number
STIRLING = 16.0  # from here on Stirling's series is good to the last digit


def check_model(model: str) -> None:
    """Raise unless `model` is a known law of alike answers."""
    if model not in MODELS:
        raise InputError(
            f"The model {model!r} does not exist.",
            cause=f"Answers can be alike as {', '.join(map(repr, MODELS))} says.",
            next=f"Pass model={MODELS[0]!r}.",
        )


def at_least(p: ArrayLike, rho: ArrayLike, m: ArrayLike, t: ArrayLike, model: str = "beta-binomial") -> NDArray:
    """Probability of at least t events among m alike answers.

    Parameters
    ----------
    p : array
        Mean probability of the event, in [0, 1].
    rho : array
        Correlation of two answers, in [0, 1].
    m, t : int array
        1 <= t <= m; all four broadcast.
    model : str
        One of `MODELS`.

    Returns
    -------
    array
        Of the broadcast shape.
    """
    check_model(model)
    p, rho, m, t = np.broadcast_arrays(np.asarray(p, dtype=np.float64), np.asarray(rho, dtype=np.float64), m, t)
    if model == "independent" and np.any(rho != 0):
        raise InputError(
            f"Independent answers with a correlation of {float(rho[rho != 0].flat[0]):g}.",
            cause="Independence is correlation 0.",
            next="Leave the correlation out, or choose another model.",
        )
    shape, out = p.shape, np.empty(p.size)
    p, rho, m, t = (a.reshape(-1) for a in (p, rho, m, t))
    for rows, size, least in _groups(m, t):
        for part in (rows[i : i + CHUNK] for i in range(0, len(rows), CHUNK)):
            out[part] = _tail(p[part], rho[part], size, least, model)
    return np.clip(out, 0.0, 1.0).reshape(shape)


def _groups(m: NDArray, t: NDArray) -> Iterator[tuple[NDArray, int, int]]:
    """Cells with the same m and t."""
    if len(m) == 0:
        return
    if len(m) == 1 or ((m == m[0]).all() and (t == t[0]).all()):
        yield np.arange(len(m)), int(m[0]), int(t[0])
        return
    order = np.lexsort((t, m))
    starts = np.flatnonzero((np.diff(m[order]) != 0) | (np.diff(t[order]) != 0)) + 1
    for rows in np.split(order, starts):
        yield rows, int(m[rows[0]]), int(t[rows[0]])


def _tail(p: NDArray, rho: NDArray, m: int, t: int, model: str) -> NDArray:
    if m == 1:
        return p
    if model in ("independent", "common-shock"):
        return rho * p + (1 - rho) * _binomial(p, m, t)
    law = _beta if model == "beta-binomial" else _copula
    none = rho < NOTHING
    edge = none | (rho == 1) | (p == 0) | (p == 1)
    if not edge.any():
        return law(p, rho, m, t)
    out = np.where(none, _binomial(p, m, t), p)
    inner = ~edge
    if inner.any():
        out[inner] = law(p[inner], rho[inner], m, t)
    return out


def _binomial(p: NDArray, m: int, t: int) -> NDArray:
    from scipy.special import betainc

    if t == m:
        return np.power(p, m)
    if t == 1:
        with np.errstate(divide="ignore"):
            return -np.expm1(m * np.log1p(-p))
    return betainc(t, m - t + 1, p)


# --- beta-binomial ---


def _beta(p: NDArray, rho: NDArray, m: int, t: int) -> NDArray:
    s = (1 - rho) / rho
    if t == m:
        return _power(p, rho, m) if m <= SUMMED else np.exp(log_moment(p * s, (1 - p) * s, m))
    if t == 1:
        return -np.expm1(_none(p, rho, m) if m <= LONGEST else log_moment((1 - p) * s, p * s, m))
    out, rest = np.empty(p.shape), np.ones(p.shape, dtype=bool)
    short, long = sorted((t, m - t + 1))
    if long > LONGEST and short > SUMMED:
        wide = s < m / 16  # p varies so much that its law is smooth where the share of events varies
        if wide.any():
            from scipy.special import betaincc

            a, b = (p * s)[wide, None], ((1 - p) * s)[wide, None]
            out[wide], rest = _dual(lambda y: betaincc(a, b, y), m, t), ~wide
    # Beyond its largest term the tail is summed; before it, the other tail is. A sum that is too long never is.
    direct = t >= m * p
    if long > LONGEST and short <= SUMMED:
        direct = np.full(p.shape, t > m - t + 1)
    for side, rows in ((True, rest & direct), (False, rest & ~direct)):
        if rows.any():
            x, r = p[rows], rho[rows]
            out[rows] = _summed(x, r, m, t) if side else 1 - _summed(1 - x, r, m, m - t + 1)
    return out


def _power(p: NDArray, rho: NDArray, m: int) -> NDArray:
    """E[p^m], multiplied out."""
    q, out = p * (1 - rho), p.copy()
    for j in range(1, m):
        out *= (q + j * rho) / ((1 - rho) + j * rho)
    return out


def _none(p: NDArray, rho: NDArray, m: int) -> NDArray:
    """ln P(no event): every answer has one with this probability if none before it had."""
    out = np.zeros(p.shape)
    for j in range(m):
        out += np.log1p(-p * (1 - rho) / ((1 - rho) + j * rho))
    return out


def _summed(p: NDArray, rho: NDArray, m: int, t: int) -> NDArray:
    """Sum of the probabilities of t, t + 1, ..., m events."""
    first = _first(p, rho, m, t)
    q, other = p * (1 - rho), (1 - p) * (1 - rho)
    if p.size * (m - t) <= CHUNK:  # few cells: all terms at once
        j = np.arange(t, m)
        ratio = (m - j) / (j + 1) * (q[:, None] + j * rho[:, None]) / (other[:, None] + (m - j - 1) * rho[:, None])
        with np.errstate(over="ignore", invalid="ignore"):
            total = 1 + np.cumprod(ratio, axis=1).sum(axis=1)
            return np.where((first < 1e-290) & (t < m * p), 1.0, first * total)
    falls = bool(((q >= rho) & (other >= rho)).all())  # then the ratio of terms falls as well
    term, total = np.ones(p.shape), np.ones(p.shape)
    with np.errstate(over="ignore", invalid="ignore"):
        for j in range(t, m):
            term = term * ((m - j) / (j + 1) * (q + j * rho) / (other + (m - j - 1) * rho))
            total += term
            if falls and j % 16 == 0 and (term < 1e-18 * total).all():
                break
        # So few events where more are the rule: all but nothing of the mass lies above.
        return np.where((first < 1e-290) & (t < m * p), 1.0, first * total)


def _first(p: NDArray, rho: NDArray, m: int, t: int) -> NDArray:
    """Probability of exactly t events."""
    if m <= SUMMED:
        q, other, out = p * (1 - rho), (1 - p) * (1 - rho), np.full(p.shape, float(math.comb(m, t)))
        for j in range(m):
            out *= (q + j * rho if j < t else other + (j - t) * rho) / ((1 - rho) + j * rho)
        return out
    s = (1 - rho) / rho
    a, b = p * s, (1 - p) * s
    ways = math.log(math.comb(m, t)) if min(t, m - t) <= LONGEST else _ways(m, t)
    return np.exp(ways + log_moment(a, b, t) + log_moment(b, a + t, m - t))


def _ways(m: int, t: int) -> float:
    from scipy.special import betaln

    return float(-np.log1p(m) - betaln(t + 1, m - t + 1))


def log_moment(a: ArrayLike, b: ArrayLike, m: ArrayLike) -> NDArray:
    """ln E[p^m] for p ~ Beta(a, b): ln of Gamma(a + m) Gamma(a + b) / (Gamma(a) Gamma(a + b + m)).

    Parameters
    ----------
    a, b : array
        Positive.
    m : array
        Powers, not negative; not only whole ones.

    Returns
    -------
    array

    Notes
    -----
    The expression is symmetric in m and b, so the smaller of both is the step of the two log-gamma differences; the
    error is a few roundings times that step, however large the other one is.
    """
    a, b, m = (np.asarray(x, dtype=np.float64) for x in (a, b, m))
    x, y = np.minimum(m, b), np.maximum(m, b)
    # Each difference less x ln(a + y): what they share would cancel.
    scale = np.log(a + y)
    return np.minimum(_rise(a, x, scale) - _rise(a + y, x, scale), 0.0)


def _rise(a: NDArray, x: NDArray, scale: NDArray) -> NDArray:
    """ln Gamma(a + x) - ln Gamma(a) - x scale."""
    from scipy.special import gammaln

    big = a >= STIRLING
    safe = np.where(big, a, STIRLING)
    with np.errstate(divide="ignore", invalid="ignore"):
        series = (safe - 0.5) * np.log1p(x / safe) - x + x * (np.log(safe + x) - scale)
        series = series + _correction(safe + x) - _correction(safe)
        return np.where(big, series, gammaln(a + x) - gammaln(a) - x * scale)


def _correction(x: NDArray) -> NDArray:
    """What Stirling's formula leaves out."""
    y = 1 / (x * x)
    return (1 / 12 - y * (1 / 360 - y * (1 / 1260 - y * (1 / 1680 - y / 1188)))) / x


def _dual(above: Callable[[NDArray], NDArray], m: int, t: int) -> NDArray:
    """P(p > Y) with Y ~ Beta(t, m - t + 1), which is the probability of t events or more; by Gauss quadrature in Y."""
    from scipy.linalg import eigh_tridiagonal

    n, A, B = np.arange(64, dtype=np.float64), float(m - t), float(t - 1)
    d = 2 * n + A + B
    middle = (B - A) * (B + A) / (d * (d + 2))
    k = n[1:]
    e = d[1:]
    off = 4 * k * (k + A) * (k + B) * (k + A + B) / (e * e * (e + 1) * (e - 1))
    nodes, vectors = eigh_tridiagonal(middle, np.sqrt(off))
    return above((1 + nodes) / 2) @ vectors[0] ** 2


# --- Gaussian copula ---


def latent_correlation(p: ArrayLike, rho: ArrayLike) -> Any:
    """Correlation r of the normal variables behind a Gaussian copula, from the correlation of two answers.

    Parameters
    ----------
    p : float or array
        Probability of the event.
    rho : float or array
        Correlation of two answers, in [0, 1].

    Returns
    -------
    float or array
        r in [0, 1] with P(both) = Phi_2(c, c; r) = p - 2 T(c, sqrt((1 - r) / (1 + r))), c = Phi^-1(p) and T Owen's
        function; so 2 T = p (1 - p) (1 - rho). Where p is 0 or 1 nothing is correlated, and r is rho.

    Raises
    ------
    InputError
        If a number lies outside [0, 1]; a copula with one factor has no negative correlations.

    Examples
    --------
    The rarer the harm, the more the normal variables have to correlate for answers to correlate by 0.3:

    >>> ms.depth.latent_correlation([0.5, 0.1, 0.01], 0.3).round(3)
    array([0.454, 0.571, 0.741])
    """
    from scipy.special import ndtri, owens_t

    p, rho = np.broadcast_arrays(unit(p, "p"), unit(rho, "rho"))
    live = (p > 0) & (p < 1) & (rho >= NOTHING) & (rho < 1)
    q, x = np.where(live, p, 0.5), np.where(live, rho, 0.5)
    c, goal = np.abs(ndtri(q)), q * (1 - q) * (1 - x) / 2
    low, high = np.full(q.shape, -700.0), np.zeros(q.shape)  # of ln a, a the argument of T
    for _ in range(64):
        middle = (low + high) / 2
        under = owens_t(c, np.exp(middle)) < goal
        low, high = np.where(under, middle, low), np.where(under, high, middle)
    a2 = np.exp(low + high)
    r = np.where(live, (1 - a2) / (1 + a2), rho)
    return float(r) if r.ndim == 0 else r


def _copula(p: NDArray, rho: NDArray, m: int, t: int) -> NDArray:
    from scipy.special import log_ndtr, ndtr, ndtri

    c, r = ndtri(p), latent_correlation(p, rho)
    # The share of p that is left, from the answer's own factor: 1 - r without the cancellation where r is near 1.
    own = np.maximum(1 - r, 1e-300)
    slope = np.sqrt(r / own)
    short = min(t, m - t + 1)
    sharp = math.sqrt(m) if short > 32 else math.sqrt(2 + 2 * math.log(m) + short)
    out = np.empty(p.shape)
    dual = (slope * sharp > 64) & (short > 1000)
    if dual.any():
        a, b, d = (x[dual, None] for x in (c, np.sqrt(r), np.sqrt(own)))
        out[dual] = _dual(lambda y: ndtr((a - d * ndtri(y)) / b), m, t)
    by_factor = ~dual & (r < 0.5)
    if by_factor.any():
        a, b = c[by_factor, None] / np.sqrt(own[by_factor, None]), slope[by_factor, None]

        def inner(z: NDArray, rows: Any) -> NDArray:
            return -z * z / 2 - HALF_LOG_TAU + _log_tail(a[rows] + b[rows] * z, m, t)

        out[by_factor] = _integral(inner, int(by_factor.sum()), 0.25 / (1 + float(b.max()) * sharp))
    by_own = ~dual & ~(r < 0.5)
    if by_own.any():
        a, b, d = (x[by_own, None] for x in (c, np.sqrt(r), np.sqrt(own)))
        norm = (math.log(math.comb(m, t)) if min(t, m - t) <= LONGEST else _ways(m, t)) + math.log(t)

        def outer(u: NDArray, rows: Any) -> NDArray:
            law = norm + (t - 1) * log_ndtr(u) + (m - t) * log_ndtr(-u) - u * u / 2 - HALF_LOG_TAU
            return law + log_ndtr((a[rows] - d[rows] * u) / b[rows])

        out[by_own] = _integral(outer, int(by_own.sum()), 0.25 / (1 + sharp))
    return out


HALF_LOG_TAU = 0.5 * math.log(2 * math.pi)


def _log_tail(x: NDArray, m: int, t: int) -> NDArray:
    """ln P(at least t of m) for independent answers with probability Phi(x)."""
    from scipy.special import betainc, log_ndtr, ndtr

    if t == m:
        return m * log_ndtr(x)
    with np.errstate(divide="ignore"):
        if t == 1:
            return np.log(-np.expm1(m * log_ndtr(-x)))
        return np.log(betainc(t, m - t + 1, ndtr(x)))


def _integral(f: Callable[[NDArray, Any], NDArray], cells: int, step: float) -> NDArray:
    """Integral of exp f over the line, for log-concave integrands that fall at least like the normal density.

    A coarse look finds the peak; the trapezoidal rule on 10 units around it errs by less than rounding.
    """
    coarse = np.arange(-38.0, 38.25, 0.5)[None, :]
    count = min(max(int(21 / step), 100), 200_000)
    nodes = np.linspace(-10.5, 10.5, count)[None, :]
    out = np.empty(cells)
    for rows in (slice(i, i + max(1, 2_000_000 // count)) for i in range(0, cells, max(1, 2_000_000 // count))):
        look = f(coarse, rows)
        peak = coarse[0, np.argmax(look, axis=1)][:, None]
        out[rows] = np.exp(f(peak + nodes, rows)).sum(axis=1) * (nodes[0, 1] - nodes[0, 0])
    return out


# --- unlimited width ---


def tail_limit(p: ArrayLike, rho: ArrayLike, model: str = "beta-binomial") -> NDArray:
    """Limit of P(more than half of m) as m grows: P(p > 1/2), with half of what lies at 1/2."""
    from scipy.special import betaincc, ndtr, ndtri

    check_model(model)
    p, rho = np.broadcast_arrays(np.asarray(p, dtype=np.float64), np.asarray(rho, dtype=np.float64))
    alone = np.where(p > 0.5, 1.0, np.where(p < 0.5, 0.0, 0.5))
    if model in ("independent", "common-shock"):
        return rho * p + (1 - rho) * alone
    live = (rho >= NOTHING) & (rho < 1) & (p > 0) & (p < 1)
    q, x = np.where(live, p, 0.5), np.where(live, rho, 0.5)
    if model == "copula":
        mixed = ndtr(ndtri(q) / np.sqrt(latent_correlation(q, x)))
    else:
        mixed = betaincc(q * (1 - x) / x, (1 - q) * (1 - x) / x, 0.5)
    return np.where(live, mixed, np.where(rho < NOTHING, alone, p))
