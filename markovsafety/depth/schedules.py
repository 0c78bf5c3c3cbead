"""Step sizes of a training iteration, and what their sums and products come to, without iterating.

An update with step sizes ``alpha_0, alpha_1, ...`` multiplies what is left to do by factors ``1 + x alpha_t``. Whether
all of it gets done depends on one thing: whether the step sizes have an infinite sum.

    constant    alpha                ``(1 + x alpha)^T``
    geometric   alpha gamma^t        a q-Pochhammer symbol, ``(-x alpha; gamma)_T``: a finite limit, never done
    harmonic    alpha / (t + 1)      ``Gamma(T + 1 + y) / (Gamma(1 + y) Gamma(T + 1))``, y = x alpha: like T^y
    given       any finite list      ends where the list ends
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..errors import InputError

__all__ = [
    "ConstantSteps",
    "GeometricSteps",
    "GivenSteps",
    "HarmonicSteps",
    "Schedule",
    "counted",
    "first_step",
    "log_product",
    "sizes",
    "total",
]

DIRECT = 1 << 17  # terms that are summed one by one
MOST = 1 << 62  # no search looks beyond this many steps


@dataclass(frozen=True)
class ConstantSteps:
    """``alpha_t = alpha``.

    Examples
    --------
    >>> bias = ms.depth.AdditiveBias(ms.depth.ConstantSteps(0.1))
    >>> print(ms.depth.verdict_of(bias, 0.2))
    absorbing: limit 1, the rest falls by 0.9091 a step; the steps have an infinite sum
        and push towards refusal alone
    """

    alpha: float

    def __post_init__(self):
        _check_size(self.alpha, "alpha")


@dataclass(frozen=True)
class GeometricSteps:
    """``alpha_t = alpha gamma^t`` with 0 <= gamma < 1: summable, to ``alpha / (1 - gamma)``.

    Examples
    --------
    >>> bias = ms.depth.AdditiveBias(ms.depth.GeometricSteps(0.1, 0.9))
    >>> print(ms.depth.verdict_of(bias, 0.2))
    not absorbing: limit 0.6982; the step sizes sum to 1 only: it stops short, for ever
    """

    alpha: float
    gamma: float

    def __post_init__(self):
        _check_size(self.alpha, "alpha")
        if not 0 <= self.gamma < 1:
            raise InputError(
                f"gamma is {self.gamma!r}.",
                cause="The steps of a geometric schedule shrink by a factor in [0, 1).",
                next="Pass 0 <= gamma < 1; for gamma = 1 use ConstantSteps.",
            )


@dataclass(frozen=True)
class HarmonicSteps:
    """``alpha_t = alpha / (t + 1)``: shrinking, but with an infinite sum.

    Examples
    --------
    >>> bias = ms.depth.AdditiveBias(ms.depth.HarmonicSteps(0.5))
    >>> print(ms.depth.verdict_of(bias, 0.2))
    absorbing: limit 1, the rest falls like t^-0.5; the steps have an infinite sum and
        push towards refusal alone
    """

    alpha: float

    def __post_init__(self):
        _check_size(self.alpha, "alpha")


@dataclass(frozen=True)
class GivenSteps:
    """Step sizes one by one; none after the last.

    Parameters
    ----------
    alphas : sequence of float
        Not negative.

    Examples
    --------
    >>> mix = ms.depth.ConvexMix(ms.depth.GivenSteps((0.5, 0.2, 0.1)))
    >>> ms.depth.residual_after(mix, 0.2, [0, 1, 2, 3, 4]).round(3)
    array([0.8  , 0.4  , 0.32 , 0.288, 0.288])
    """

    alphas: tuple[float, ...]

    def __post_init__(self):
        alphas = tuple(float(a) for a in np.ravel(np.asarray(self.alphas, dtype=np.float64)))
        for t, a in enumerate(alphas):
            _check_size(a, f"alphas[{t}]")
        object.__setattr__(self, "alphas", alphas)


Schedule = ConstantSteps | GeometricSteps | HarmonicSteps | GivenSteps


def _check_size(alpha: Any, name: str) -> None:
    if not (isinstance(alpha, (int, float, np.number)) and 0 <= alpha < math.inf):
        raise InputError(
            f"{name} is {alpha!r}.", cause="A step size is a finite number that is not negative.", next="Pass one."
        )


def counted(steps: Any) -> NDArray[np.float64]:
    """Numbers of steps as floats: whole, not negative, inf for the limit.

    Raises
    ------
    InputError
        If they are anything else.
    """
    try:
        array = np.asarray(list(steps) if isinstance(steps, range) else steps, dtype=np.float64)
        good = bool(np.all(((array >= 0) & (array == np.floor(array))) | (array == np.inf)))
    except (TypeError, ValueError):
        array, good = np.zeros(0), False
    if not good:
        raise InputError(
            f"steps is {steps!r}.",
            cause="It counts updates.",
            next="Pass whole numbers from 0 on, or inf for the limit.",
        )
    return array


def sizes(schedule: Schedule, steps: int) -> NDArray[np.float64]:
    """The first step sizes, shape (steps,)."""
    t = np.arange(int(counted(steps)))
    if isinstance(schedule, ConstantSteps):
        return np.full(len(t), float(schedule.alpha))
    if isinstance(schedule, GeometricSteps):
        return schedule.alpha * np.power(schedule.gamma, t)
    if isinstance(schedule, HarmonicSteps):
        return np.float64(schedule.alpha) / (t + 1)
    given = np.asarray(schedule.alphas)
    return np.where(t < len(given), given[np.minimum(t, len(given) - 1)] if len(given) else 0.0, 0.0)


def total(schedule: Schedule, steps: ArrayLike = math.inf) -> NDArray[np.float64]:
    """Sum of the first step sizes.

    Parameters
    ----------
    schedule : Schedule
    steps : int or array
        inf for all of them; the answer is inf where they are not summable.
    """
    T = counted(steps)
    if schedule == ConstantSteps(0) or getattr(schedule, "alpha", 1) == 0:
        return np.zeros(T.shape)
    if isinstance(schedule, ConstantSteps):
        return schedule.alpha * T
    if isinstance(schedule, GeometricSteps):
        log = math.log(schedule.gamma) if schedule.gamma > 0 else -math.inf
        with np.errstate(invalid="ignore"):
            passed = np.where(T == 0, 0.0, -np.expm1(np.where(T == 0, 1.0, T) * log))
        return schedule.alpha * passed / (1 - schedule.gamma)
    if isinstance(schedule, HarmonicSteps):
        from scipy.special import digamma

        return schedule.alpha * (digamma(T + 1) + np.euler_gamma)
    sums = np.concatenate([[0.0], np.cumsum(schedule.alphas)])
    return sums[np.minimum(T, len(sums) - 1).astype(np.int64)]


def log_product(schedule: Schedule, x: ArrayLike, steps: ArrayLike) -> NDArray[np.float64]:
    """``sum of log(1 + x alpha_t)`` over the first steps.

    Parameters
    ----------
    schedule : Schedule
    x : float or array
        Such that ``1 + x alpha_t >= 0`` for all t.
    steps : int or array
        Number T of steps, broadcast against `x`; inf gives the limit.

    Returns
    -------
    array
        Of the broadcast shape; +inf or -inf where the product diverges or vanishes.
    """
    x, T = np.broadcast_arrays(np.asarray(x, dtype=np.float64), counted(steps))
    out = np.zeros(x.shape)
    for value in np.unique(x):
        on = x == value
        if value != 0:
            out[on] = _log_product(schedule, float(value), T[on])
    return out


def _log_product(schedule: Schedule, x: float, T: NDArray) -> NDArray[np.float64]:
    if isinstance(schedule, GivenSteps):
        return _head(np.asarray(schedule.alphas) * x)[np.minimum(T, len(schedule.alphas)).astype(np.int64)]
    y = x * schedule.alpha
    if y == 0:
        return np.zeros(T.shape)
    if isinstance(schedule, ConstantSteps):
        step = math.log1p(y) if y > -1 else -math.inf
        return np.where(T == 0, 0.0, np.where(T == 0, 1.0, T) * step)
    return _harmonic(y, T) if isinstance(schedule, HarmonicSteps) else _geometric(y, schedule.gamma, T)


def _head(terms: NDArray) -> NDArray[np.float64]:
    """Partial sums of log1p, the empty one first."""
    with np.errstate(divide="ignore"):
        return np.concatenate([[0.0], np.cumsum(np.log1p(np.maximum(terms, -1.0)))])


def _harmonic(y: float, T: NDArray) -> NDArray[np.float64]:
    """Terms one by one, then a ratio of Gamma functions by Stirling's series, in which nothing large cancels."""
    N = 64
    head = _head(y / np.arange(1, N + 1))
    first = head[np.minimum(T, N).astype(np.int64)]
    far = np.maximum(T, N) + 1
    tail = np.where(T > N, np.where(np.isinf(T), np.sign(y) * np.inf, _rise(far, y) - _rise(np.float64(N + 1), y)), 0.0)
    return first + tail


def _rise(a: Any, y: float) -> Any:
    """``log Gamma(a + y) - log Gamma(a)`` for a > 60, y >= -1."""
    a = np.where(np.isinf(a), 1e30, a)  # not used; without overflow
    series = lambda z: (1 / 12 - (1 / 360 - 1 / (1260 * z * z)) / (z * z)) / z  # noqa: E731
    return (a - 0.5) * np.log1p(y / a) + y * np.log(a + y) - y + series(a + y) - series(a)


def _geometric(y: float, gamma: float, T: NDArray) -> NDArray[np.float64]:
    """Terms one by one while they matter; the rest of a very slow schedule by Euler and Maclaurin."""
    slow = -math.log(gamma) if gamma > 0 else math.inf
    matter = math.ceil(max(0.0, math.log(abs(y)) + 42) / slow) + 1 if gamma > 0 else 1
    N = min(matter, DIRECT, int(min(T.max(initial=0), 2.0**53)))
    head = _head(y * gamma ** np.arange(N))
    first = head[np.minimum(T, N).astype(np.int64)]
    if N < DIRECT:
        return first
    beyond = np.where(T > N, _rest(y * gamma**N, slow) - _rest(y * gamma ** np.maximum(T, N), slow), 0.0)
    return first + beyond


def _rest(y: Any, slow: float) -> Any:
    """``sum over k >= 0 of log(1 + y e^(-slow k))``, the error being of order slow^3."""
    from scipy.special import spence

    return -spence(1 + y) / slow + np.log1p(y) / 2 + slow / 12 * y / (1 + y)


def first_step(done: Any) -> int | None:
    """Smallest number of steps for which `done` (once true, always true) holds; None where none up to 2^62 does."""
    if done(0):
        return 0
    high = 1
    while not done(high):
        high *= 2
        if high > MOST:
            return None
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if done(middle) else (middle, high)
    return high
