"""Best-of-N: an attacker who asks N times and needs one harmful answer, the other side of width.

The probability of harm of a prompt, p, differs between prompts. If it is Beta(alpha, beta), N tries fail with

    1 - ASR(N) = E[(1 - p)^N] = B(alpha, beta + N) / B(alpha, beta) ~ Gamma(alpha + beta) / Gamma(beta) N^-alpha:

a power of N, not exponential, because the hardest prompts are left over. The law and its use for extrapolation are
those of arXiv 2601.22636. Whatever the law of p, ASR(1) <= ASR(N) <= 1 - (1 - ASR(1))^N: tries that resemble each other
help the attacker less than independent ones, so independence at the mean is the safe end here, as it is the unsafe one
for a defender who needs all answers harmful.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..bound import Bound, check_level, clustered
from ..errors import InputError
from .measured import unseen
from .mixtures import log_moment
from .rules import unit, widths_of

__all__ = ["BestOfN", "anchored", "best_of_n", "fit_best_of_n"]

FORMS = ("exact", "asymptotic", "corrected")
RAYS = 180
EDGE = 12.0  # how far, in logarithms, alpha and beta are followed


def best_of_n(alpha: ArrayLike, beta: ArrayLike, N: ArrayLike, form: str = "exact") -> Any:
    """Probability that at least one of N answers is harmful, for p ~ Beta(alpha, beta).

    Parameters
    ----------
    alpha, beta : float or array
        Positive.
    N : int or array
        Number of tries.
    form : {"exact", "asymptotic", "corrected"}
        exact: ``1 - B(alpha, beta + N) / B(alpha, beta)``. asymptotic: ``1 - Gamma(alpha + beta) / Gamma(beta)
        N^-alpha``, negative where N is too small for it. corrected: the same with N + beta + (alpha - 1) / 2 in place
        of N, which is the next order of Stirling's series.

    Returns
    -------
    float or array

    Raises
    ------
    InputError
        A number outside its range, or a form that does not exist.

    Examples
    --------
    One answer in 25 is harmful. Tries that are alike break a prompt far later than independent ones would:

    >>> N = np.array([1, 10, 100, 1000])
    >>> ms.depth.best_of_n(0.4, 9.6, N).round(3)
    array([0.04 , 0.253, 0.627, 0.847])
    >>> (1 - (1 - 0.04) ** N).round(3)
    array([0.04 , 0.335, 0.983, 1.   ])
    """
    a, b, n = np.broadcast_arrays(_positive(alpha, "alpha"), _positive(beta, "beta"), widths_of(N))
    if form not in FORMS:
        raise InputError(f"form is {form!r}.", cause=f"Forms are {', '.join(FORMS)}.", next="Use one of them.")
    if form == "exact":
        result = -np.expm1(log_moment(b, a, n))
    else:
        from scipy.special import gammaln

        size = n + (b + (a - 1) / 2 if form == "corrected" else 0.0)
        result = -np.expm1(gammaln(a + b) - gammaln(b) - a * np.log(size))
    return float(result) if np.ndim(result) == 0 else result


def anchored(asr: ArrayLike, n: ArrayLike, N: ArrayLike, alpha: ArrayLike) -> Any:
    """ASR(N) from a measured ASR(n) and the power alpha alone: ``1 - (1 - ASR(n)) (n / N)^alpha``.

    Parameters
    ----------
    asr : float or array
        Measured success at n tries.
    n, N : int or array
        Tries measured, and asked for; N >= n.
    alpha : float or array

    Returns
    -------
    float or array
        Right up to a factor 1 + O(1 / n) in the failures.

    Raises
    ------
    InputError
        A number outside its range, or N below n.

    Examples
    --------
    A hundred tries broke 57 % of the prompts, and failures fall like the number of tries to the power -0.4:

    >>> ms.depth.anchored(0.57, 100, [1000, 10_000], alpha=0.4).round(3)
    array([0.829, 0.932])
    """
    first, last = widths_of(n), widths_of(N)
    if np.any(np.less(last, first)):
        raise InputError("N is below n.", cause="A power law is followed upwards.", next="Pass N >= n.")
    result = 1 - (1 - unit(asr, "asr")) * np.exp(_positive(alpha, "alpha") * (np.log(first) - np.log(last)))
    return float(result) if np.ndim(result) == 0 else result


def _positive(x: ArrayLike, name: str) -> NDArray:
    array = np.asarray(x, dtype=np.float64)
    if not np.all((array > 0) & np.isfinite(array)):
        raise InputError(f"{name} is {x!r}.", cause="It is positive and finite.", next="Pass a positive number.")
    return array


@dataclass(frozen=True, eq=False)
class BestOfN:
    """A beta law of harm between prompts, fitted, and what it says of N tries.

    Parameters
    ----------
    alpha, beta : Bound
        Of the beta law; nan and [0, inf] where the data do not support one.
    mean, icc : Bound
        alpha / (alpha + beta) and 1 / (alpha + beta + 1): harm of one answer, and correlation of two.
    why : str
        Why no law could be fitted; empty if one was.
    info : dict
        prompts, answers, loglik, gap (fitted less unbiased ASR at as many tries as every prompt was asked).

    Examples
    --------
    Without harm there is no law to extrapolate. What is left holds for any law, and says next to nothing of 100 tries:

    >>> fit = ms.depth.fit_best_of_n(np.zeros(50), np.full(50, 20))
    >>> print(type(fit).__name__, "-", fit)
    BestOfN - no law of best-of-N: no harm was seen
    >>> for n in (1, 100): print(f"{n:3} tries: {fit.asr(n).lower:.3f} to {fit.asr(n).upper:.3f}")
      1 tries: 0.000 to 0.071
    100 tries: 0.000 to 0.999
    """

    alpha: Bound
    beta: Bound
    mean: Bound
    icc: Bound
    why: str
    info: dict[str, Any] = field(default_factory=dict)
    region: NDArray | None = field(default=None, repr=False)

    def asr(self, N: ArrayLike) -> Bound:
        """Probability of harm in N tries, with a profile-likelihood interval.

        Parameters
        ----------
        N : int or array
            Tries; may go far beyond those that were sampled.

        Returns
        -------
        Bound
            Within ``[ASR(1), 1 - (1 - ASR(1))^N]`` at the ends of the clustered interval of ASR(1), which hold for any
            law. Without a fitted law the value is nan and the interval is that.
        """
        n = widths_of(N)
        low = np.broadcast_to(self.mean.lower, n.shape).astype(float)
        with np.errstate(divide="ignore"):
            high = np.broadcast_to(-np.expm1(n * np.log1p(-np.asarray(self.mean.upper))), n.shape).astype(float)
        info: dict[str, Any] = {"name": "ASR", "method": "beta-binomial likelihood, profile interval"}
        if self.why or self.region is None:
            value = np.full(n.shape, np.nan)
            info["method"], info["why"] = "any law of harm between prompts", self.why
        else:
            value = np.asarray(best_of_n(self.alpha.value, self.beta.value, n))
            a, b = (np.exp(self.region[:, i]).reshape(-1, *[1] * n.ndim) for i in (0, 1))
            found = np.asarray(best_of_n(a, b, n[None] if n.ndim else n))
            low = np.minimum(np.maximum(found.min(axis=0).reshape(n.shape), low), value)
            high = np.maximum(np.minimum(found.max(axis=0).reshape(n.shape), high), value)
        parts = [float(x) if n.ndim == 0 else x for x in (value, low, high, (high - low) / 2)]
        return Bound(parts[0], parts[1], parts[2], self.mean.level, {"sampling": parts[3]}, None, info)

    def __str__(self) -> str:
        if self.why:
            return f"no law of best-of-N: {self.why}"
        parts = (("alpha", self.alpha), ("beta", self.beta), ("mean", self.mean), ("icc", self.icc))
        return "; ".join(f"{k} = {b.value:.3g} [{b.lower:.3g}, {b.upper:.3g}]" for k, b in parts)

    __repr__ = __str__


def fit_best_of_n(events: ArrayLike, totals: ArrayLike, level: float = 0.95) -> BestOfN:
    """Fit Beta(alpha, beta) to counts of harmful answers by prompt, by maximum likelihood.

    Parameters
    ----------
    events, totals : int array, shape (K,)
        Harmful answers and answers of every prompt.
    level : float
        Confidence level.

    Returns
    -------
    BestOfN
        ``why`` says where the data cannot support a law: fewer than two prompts, no harm or nothing but harm, one
        answer per prompt, or no more variance between prompts than chance makes.

    Raises
    ------
    InputError
        Counts are not whole (weighted rollouts) or impossible.

    Notes
    -----
    Prompts are the units, so the likelihood is clustered by prompt by itself. An interval reaches over all (alpha,
    beta) whose log-likelihood is within half a chi-square quantile (1 degree of freedom) of the largest: for any
    function of both, such as ASR(N), the ends over that region are its profile-likelihood interval. Where the region
    goes on without end (nearly no correlation), it is followed to alpha, beta of e^12 times the estimate, and
    ``info["open"]`` is True. All of it holds if the law is a beta law; ``info["gap"]`` compares with the unbiased
    estimate where that exists.

    Examples
    --------
    Twenty answers to each of 60 prompts, half of which never did harm:

    >>> events = np.repeat([0, 1, 2, 5, 12], [30, 14, 8, 5, 3])
    >>> fit = ms.depth.fit_best_of_n(events, np.full(60, 20))
    >>> print(fit)
    alpha = 0.351 [0.204, 0.603]; beta = 4.12 [2.04, 7.81]; mean = 0.0784 [0.0414, 0.125];
        icc = 0.183 [0.107, 0.305]
    >>> for n in (1, 1000): print(n, fit.asr(n))
    1 ASR = 0.0784   95 % [0.0518, 0.119]   because: sampling 0.033; judge, lumping,
        model, truncation, rounding not assessed
    1000 ASR = 0.858   95 % [0.71, 0.952]   because: sampling 0.12; judge, lumping, model,
        truncation, rounding not assessed
    """
    check_level(level)
    x, n = (np.atleast_1d(np.asarray(a, dtype=np.float64)) for a in (events, totals))
    rate = clustered(x, n, level, name="P(harm)")
    if np.any(x != np.floor(x)) or np.any(n != np.floor(n)):
        raise InputError(
            "The rollouts are weighted.",
            cause="A likelihood of counts needs whole numbers.",
            next="Pass counts of rollouts without weights.",
        )
    x, n = x[n > 0], n[n > 0]
    info: dict[str, Any] = {"prompts": len(n), "answers": int(n.sum()) if len(n) else 0}
    why, best = unseen(x, n), np.zeros(2)
    logl = _likelihood(x, n)
    if not why:
        best, why = _maximum(logl, x, n)
    if why:
        nothing = {"alpha": (0.0, math.inf), "beta": (0.0, math.inf)}
        parts = [Bound(np.nan, low, high, level, {}, None, {"name": k}) for k, (low, high) in nothing.items()]
        return BestOfN(parts[0], parts[1], rate, Bound(np.nan, 0.0, 1.0, level, {}, None, {"name": "icc"}), why, info)
    region = _region(logl, best, level)
    info["loglik"] = float(logl(best[None])[0])
    info["open"] = bool((np.abs(region - best).max(axis=1) >= EDGE * 0.999).any())

    def over(f: Callable[[NDArray, NDArray], NDArray], name: str) -> Bound:
        values, value = f(*np.exp(region.T)), float(f(*np.exp(best[:, None]))[0])
        low, high = min(float(values.min()), value), max(float(values.max()), value)
        return Bound(value, low, high, level, {"sampling": (high - low) / 2}, None, {"name": name})

    icc = over(lambda a, b: 1 / (a + b + 1), "icc")
    reach = int(n.min())
    with np.errstate(divide="ignore"):
        free = 1 - np.prod([np.maximum(n - x - j, 0) / (n - j) for j in range(reach)], axis=0)
    fitted = best_of_n(float(np.exp(best[0])), float(np.exp(best[1])), reach)
    info["gap"] = float(fitted - np.mean(free))
    mean = over(lambda a, b: a / (a + b), "P(harm)")
    # The clustered interval assumes no law; whichever end is farther out is kept.
    low, high = min(mean.lower, rate.lower), max(mean.upper, rate.upper)
    mean = Bound(mean.value, low, high, level, {"sampling": (high - low) / 2}, None, {"name": "P(harm)"})
    return BestOfN(over(lambda a, b: a, "alpha"), over(lambda a, b: b, "beta"), mean, icc, "", info, region)


def _likelihood(x: NDArray, n: NDArray) -> Callable[[NDArray], NDArray]:
    """Log-likelihood of rows (ln alpha, ln beta), up to a constant."""
    pairs, times = (
        np.unique(np.stack([x, n - x], axis=1), axis=0, return_counts=True) if len(x) else (np.zeros((0, 2)), 0)
    )

    def logl(rows: NDArray) -> NDArray:
        a, b = np.exp(rows[:, :1]), np.exp(rows[:, 1:])
        hits, misses = pairs[None, :, 0], pairs[None, :, 1]
        return np.sum((log_moment(a, b, hits) + log_moment(b, a + hits, misses)) * times, axis=1)

    return logl


def _maximum(logl: Callable[[NDArray], NDArray], x: NDArray, n: NDArray) -> tuple[NDArray, str]:
    """(ln alpha, ln beta) of the largest likelihood; why there is none inside."""
    from scipy.optimize import minimize

    q = float(x.sum() / n.sum())
    starts = [np.log([q * s, (1 - q) * s]) for s in (0.1, 1.0, 10.0, 100.0)]
    begun = max(starts, key=lambda v: float(logl(v[None])[0]))
    found = minimize(
        lambda v: -float(logl(v[None])[0]),
        begun,
        method="Nelder-Mead",
        options={"xatol": 1e-9, "fatol": 1e-12, "maxiter": 4000},
    )
    best = np.asarray(found.x)
    alone = float(np.sum(x * math.log(q) + (n - x) * math.log1p(-q)))
    if best.max() > math.log(1e7) or -found.fun <= alone + 1e-6:
        return best, "prompts do not differ by more than chance: alpha and beta have no finite estimate"
    return best, ""


def _region(logl: Callable[[NDArray], NDArray], best: NDArray, level: float) -> NDArray:
    """Edge of the likelihood region along rays from the estimate, rows (ln alpha, ln beta), the estimate included."""
    from scipy.stats import chi2

    goal = float(logl(best[None])[0]) - float(chi2.ppf(level, 1)) / 2
    # Rays in coordinates in which the region is round near the estimate: sums and differences of the logarithms differ
    # in scale.
    step = 1e-3
    e = np.eye(2) * step
    at = lambda v: float(logl((best + v)[None])[0])  # noqa: E731
    hessian = np.array([[at(a + b) - at(a - b) - at(b - a) + at(-a - b) for b in e] for a in e]) / (4 * step**2)
    values, vectors = np.linalg.eigh(-hessian)
    frame = vectors / np.sqrt(np.maximum(values, 1e-4))
    angle = np.linspace(0, 2 * np.pi, RAYS, endpoint=False)
    rays = np.stack([np.cos(angle), np.sin(angle)], axis=1) @ frame.T
    far = EDGE / np.abs(rays).max(axis=1)
    low, high = np.zeros(RAYS), np.minimum(1.0, far)
    while True:  # outwards until every ray has left the region, or the edge
        inside = (logl(best + rays * high[:, None]) >= goal) & (high < far)
        if not inside.any():
            break
        low[inside] = high[inside]
        high[inside] = np.minimum(high[inside] * 1.5, far[inside])
    for _ in range(40):
        middle = (low + high) / 2
        inside = logl(best + rays * middle[:, None]) >= goal
        low, high = np.where(inside, middle, low), np.where(inside, high, middle)
    return np.concatenate([best[None], best + rays * high[:, None]])
