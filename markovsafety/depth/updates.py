"""What an iterated update does to one refusal probability: how fast, how far, and whether refusal becomes absorbing.

The update that arXiv 2502.00669 calls transition matrix normalisation takes an initial matrix Q, a bias matrix B and
step sizes. Its body could not be read; "add bias and renormalise", ``Q <- rows of (Q + alpha_t B), normalised``, is our
reconstruction. In a row with bias beta, a share theta of it on refusal, it has a closed form, whatever the row holds:

    row_T = K_T row_0 + (1 - K_T) B / beta,    K_T = product over t < T of 1 / (1 + alpha_t beta),

so the refusal probability p tends to theta if the step sizes have an infinite sum, and stops short of it if not. Beside
it stand the other updates of a single probability, in the order of their speed (odds o = p / (1 - p)):

    logit steps          log o grows by the step size: 1 - p falls geometrically
    convex mixing        the same as adding bias, with shares in place of biases
    cross-entropy flow   ``o + log o`` grows by K / (K - 1) per unit of time: 1 - p falls only like (K - 1) / (K t)

What they do to a chain, and to its harm, is in `tracing`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..brief import brief
from ..errors import InputError
from .profile import budget
from .schedules import (
    GivenSteps,
    Schedule,
    counted,
    first_step,
    log_product,
    total,
)
from .width import unit

__all__ = [
    "AdditiveBias",
    "BiasMatrix",
    "ConvexMix",
    "CrossEntropyFlow",
    "LogitSteps",
    "Update",
    "Verdict",
    "cross_entropy_path",
    "residual_after",
    "sides_after",
    "steps_to",
    "verdict_of",
]


@dataclass(frozen=True)
class AdditiveBias:
    """Add bias, renormalise: ``p <- (p + alpha_t bias) / (1 + alpha_t (bias + elsewhere))``.

    Parameters
    ----------
    schedule : Schedule
    bias, elsewhere : float
        Bias on refusal, and on the rest of the row.

    Examples
    --------
    >>> bias = ms.depth.AdditiveBias(ms.depth.ConstantSteps(0.1), bias=0.8, elsewhere=0.2)
    >>> print(ms.depth.verdict_of(bias, 0.3))
    not absorbing: limit 0.8, the rest falls by 0.9091 a step; only a share 0.8 of the
        bias is on refusal
    """

    schedule: Schedule
    bias: float = 1.0
    elsewhere: float = 0.0

    def __post_init__(self):
        for name in ("bias", "elsewhere"):
            x = getattr(self, name)
            if not 0 <= x < math.inf:
                raise InputError(f"{name} is {x!r}.", cause="Bias adds probability mass.", next="Pass a number >= 0.")


@dataclass(frozen=True, eq=False)
class BiasMatrix:
    """Add bias, renormalise, for rows: ``Q <- rows of (Q + alpha_t B), normalised``. Rows without bias stay.

    Parameters
    ----------
    schedule : Schedule
    matrix : array or sparse array
        Bias, of the shape of what is updated; entries are not negative.

    Examples
    --------
    >>> bias = ms.depth.BiasMatrix(ms.depth.ConstantSteps(0.5), [[0, 1], [0, 0]])
    >>> ms.depth.updated([[0.9, 0.1], [0.9, 0.1]], bias, steps=5).round(3)
    array([[0.119, 0.881],
           [0.9  , 0.1  ]])
    """

    schedule: Schedule
    matrix: Any

    __repr__ = brief


@dataclass(frozen=True)
class ConvexMix:
    """``p <- (1 - eta_t) p + eta_t`` with shares eta_t in [0, 1].

    Examples
    --------
    >>> ms.depth.steps_to(ms.depth.ConvexMix(ms.depth.ConstantSteps(0.1)), 0.3, 1e-3)
    (63, '')
    """

    schedule: Schedule

    def __post_init__(self):
        s = self.schedule
        if (largest := max(s.alphas, default=0) if isinstance(s, GivenSteps) else s.alpha) > 1:
            raise InputError(
                f"The largest share is {largest:g}.", cause="A mixture has shares in [0, 1].", next="Use smaller steps."
            )


@dataclass(frozen=True)
class LogitSteps:
    """``odds <- e^(eta_t) odds``: exponentiated gradient, or a constant step on the logit of refusal.

    Examples
    --------
    >>> ms.depth.steps_to(ms.depth.LogitSteps(ms.depth.ConstantSteps(0.1)), 0.3, 1e-3)
    (78, '')
    """

    schedule: Schedule


@dataclass(frozen=True)
class CrossEntropyFlow:
    """Gradient flow of -log p on the logits of a softmax over K tokens; one step is `rate` units of time.

    Parameters
    ----------
    classes : int
        K; the tokens other than refusal are taken as equally likely. For any other row (`cross_entropy_path`) more of
        it is done by any time, and with ``classes=2`` less of it is left than from any row.
    rate : float

    Examples
    --------
    >>> ms.depth.steps_to(ms.depth.CrossEntropyFlow(classes=100, rate=0.1), 0.3, 1e-3)
    (9963, '')
    """

    classes: int
    rate: float = 1.0

    def __post_init__(self):
        if not (isinstance(self.classes, (int, np.integer)) and self.classes >= 2):
            raise InputError(
                f"classes is {self.classes!r}.",
                cause="A softmax chooses among two tokens or more.",
                next="Pass a whole number >= 2.",
            )
        if not 0 < self.rate < math.inf:
            raise InputError(f"rate is {self.rate!r}.", cause="Time goes forward.", next="Pass a positive number.")


Update = AdditiveBias | ConvexMix | LogitSteps | CrossEntropyFlow


def residual_after(update: Update, p0: ArrayLike, steps: ArrayLike) -> Any:
    """``1 - p`` after a number of steps, in closed form.

    Parameters
    ----------
    update : AdditiveBias, ConvexMix, LogitSteps or CrossEntropyFlow
    p0 : float or array
        Refusal probability before.
    steps : int or array
        Broadcast against `p0`; inf gives the limit.

    Returns
    -------
    float or array
        With full relative accuracy where it is small.

    Raises
    ------
    InputError
        If a number is outside its range.

    Notes
    -----
    The flow: with u the difference of the logits, ``du/dt = K / (K - 1 + e^u)``, so ``o + log o - K t / (K - 1)`` stays
    what it was, and ``1 - p = 1 / (1 + omega(o_0 + log o_0 + K t / (K - 1)))`` with Wright's omega. All of these are
    our own.

    Examples
    --------
    The flow slows down, logit steps do not:

    >>> for update in (ms.depth.CrossEntropyFlow(2), ms.depth.LogitSteps(ms.depth.ConstantSteps(1))):
    ...     print(*(f"{left:.1e}" for left in ms.depth.residual_after(update, 0.5, [1, 10, 100])))
    3.1e-01 5.2e-02 5.1e-03
    2.7e-01 4.5e-05 3.7e-44
    """
    p, T = np.broadcast_arrays(unit(p0, "p0"), counted(steps))
    _, left = sides_after(update, p, 1 - p, T)
    return float(left) if left.ndim == 0 else left


def sides_after(update: Update, p: NDArray, rest: NDArray, T: Any) -> tuple[NDArray, NDArray]:
    """p and 1 - p after T steps, from p and ``rest = 1 - p``, so that the small one of the two loses no digits."""
    if isinstance(update, AdditiveBias):
        beta = update.bias + update.elsewhere
        log = -log_product(update.schedule, beta, T)
        aside = update.elsewhere / beta if beta > 0 else 0.0
        towards = update.bias / beta if beta > 0 else 0.0
        return p * np.exp(log) - towards * np.expm1(log), rest * np.exp(log) - aside * np.expm1(log)
    if isinstance(update, ConvexMix):
        log = log_product(update.schedule, -1.0, T)
        return p * np.exp(log) - np.expm1(log), rest * np.exp(log)
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        odds = p / rest
        if isinstance(update, LogitSteps):
            odds = odds * np.exp(total(update.schedule, T))
        elif isinstance(update, CrossEntropyFlow):
            from scipy.special import wrightomega

            K = update.classes
            x = odds + np.log(odds) + K * update.rate * T / (K - 1)
            odds = np.where(np.isfinite(x), wrightomega(np.where(np.isfinite(x), x, 0.0)), np.inf)
        else:
            raise _no_update(update)
        new, left = 1 / (1 + 1 / odds), 1 / (1 + odds)
    fixed = (p == 0) | (rest == 0)
    return np.where(fixed, p, new), np.where(fixed, rest, left)


def _no_update(update: Any) -> InputError:
    return InputError(
        f"A {type(update).__name__} is no update of one probability.",
        cause="Known are AdditiveBias, ConvexMix, LogitSteps and CrossEntropyFlow; a BiasMatrix updates whole rows.",
        next="Use one of these, or `updated` for rows and chains.",
    )


def steps_to(update: Update, p0: float, eps: float) -> tuple[int | None, str]:
    """Smallest number of steps after which ``1 - p <= eps``.

    Parameters
    ----------
    update, p0 : as in `residual_after`
    eps : float
        In (0, 1].

    Returns
    -------
    steps : int or None
        None where it is impossible.
    reason : str
        Why it is impossible; empty otherwise.

    Notes
    -----
    Adding bias takes about ``log(1 / eps) / log(1 + alpha beta)`` steps, logit steps ``log(1 / eps) / eta``, the flow
    ``(K - 1) / (K eps)``: a rate that was proven for the first two is optimistic for fine-tuning by cross-entropy.

    Examples
    --------
    >>> ms.depth.steps_to(ms.depth.AdditiveBias(ms.depth.ConstantSteps(0.1)), 0.2, 0.01)
    (46, '')
    >>> ms.depth.steps_to(ms.depth.AdditiveBias(ms.depth.GeometricSteps(0.1, 0.9)), 0.2, 0.01)
    (None, 'impossible: the step sizes sum to 1 only: it stops short, for ever')
    """
    eps = budget(eps)
    start, limit = residual_after(update, p0, 0), residual_after(update, p0, math.inf)
    if start <= eps:
        return 0, ""
    if limit > eps:
        return None, f"impossible: {verdict_of(update, p0).reason}"
    if eps == 0:  # floats underflow to 0, probabilities do not
        found = None
        if isinstance(update, ConvexMix):
            found = first_step(lambda t: float(log_product(update.schedule, -1.0, t)) == -math.inf)
        return found, "" if found is not None else "impossible: something is left after any number of steps"
    found = first_step(lambda t: residual_after(update, p0, t) <= eps)
    return found, "" if found is not None else "impossible: it would take more than 2^62 steps"


@dataclass(frozen=True)
class Verdict:
    """Whether an update drives refusal to absorbing.

    Parameters
    ----------
    absorbing : bool
        Whether the refusal probability tends to 1.
    limit : float
        What it tends to.
    rate : str
        How fast; empty where nothing moves.
    reason : str
        Why.

    Examples
    --------
    >>> ms.depth.verdict_of(ms.depth.AdditiveBias(ms.depth.GeometricSteps(0.1, 0.9)), 0.2)
    Verdict(absorbing=False, limit=0.698..., rate='', reason='the step sizes sum to 1
        only: it stops short, for ever')
    """

    absorbing: bool
    limit: float
    rate: str
    reason: str

    def __bool__(self) -> bool:
        return self.absorbing

    def __str__(self) -> str:
        how = f", {self.rate}" if self.rate else ""
        return f"{'absorbing' if self.absorbing else 'not absorbing'}: limit {self.limit:.6g}{how}; {self.reason}"


def verdict_of(update: Update, p0: float) -> Verdict:
    """Whether an update drives one refusal probability to 1, how fast, and why (not).

    Parameters
    ----------
    update : AdditiveBias, ConvexMix, LogitSteps or CrossEntropyFlow
    p0 : float
        Refusal probability before.

    Returns
    -------
    Verdict

    Notes
    -----
    "Refusal can be brought arbitrarily close to absorbing" (2502.00669, from its abstract) holds under two conditions
    that this names: the step sizes have an infinite sum, and all of the bias is on refusal. What it is worth for harm
    is another question, which `absorbing_when` answers for a chain.

    Examples
    --------
    >>> for steps in (ms.depth.HarmonicSteps(0.5), ms.depth.GeometricSteps(0.5, 0.9)):
    ...     print(ms.depth.verdict_of(ms.depth.LogitSteps(steps), 0.2))
    absorbing: limit 1, the rest falls like t^-0.5; the steps have an infinite sum and
        push towards refusal alone
    not absorbing: limit 0.973756; the step sizes sum to 5 only: it stops short, for ever
    """
    p0 = float(unit(p0, "p0"))
    residual = float(residual_after(update, p0, math.inf))
    if p0 == 1 and residual == 0:
        return Verdict(True, 1.0, "", "it always refuses already")
    from .update_rates import moves, rate

    moved, why = moves(update, p0)
    if not moved:
        return Verdict(False, p0, "", why)
    spent = math.inf if isinstance(update, CrossEntropyFlow) else float(total(update.schedule))
    infinite = math.isinf(spent)
    done_at_once = isinstance(update, ConvexMix) and residual == 0 and not infinite
    if done_at_once:
        return Verdict(True, 1.0, "at once", "one step replaces the whole row")
    if not infinite:
        return Verdict(False, 1 - residual, "", f"the step sizes sum to {spent:.6g} only: it stops short, for ever")
    if isinstance(update, AdditiveBias) and update.elsewhere > 0:
        share = update.bias / (update.bias + update.elsewhere)
        return Verdict(False, share, rate(update), f"only a share {share:.6g} of the bias is on refusal")
    return Verdict(True, 1.0, rate(update), "the steps have an infinite sum and push towards refusal alone")


def cross_entropy_path(row: ArrayLike, refusal: int, times: ArrayLike) -> NDArray[np.float64]:
    """Gradient flow of ``-log row[refusal]`` on the logits of a whole row, as an ordinary differential equation.

    Parameters
    ----------
    row : array, shape (n,)
        Token probabilities at time 0; a token without any never gets some.
    refusal : int
        The token that is trained.
    times : array, shape (T,)
        Rising, from 0 on.

    Returns
    -------
    array, shape (T, n)
        Rows at these times, to a relative accuracy of about 1e-9.

    Raises
    ------
    InputError
        If the row is no law, refusal has no probability, or times do not rise from 0.

    Notes
    -----
    With q the law of the other tokens among themselves, ``o + log o`` grows at the rate ``1 + sum of q^2``, which lies
    between K / (K - 1) and 2, K being the number of tokens with probability. So from any row ``1 - p`` lies between
    ``1 / (1 + omega(x + 2 t))`` and ``1 / (1 + omega(x + K t / (K - 1)))``, x its ``o + log o`` at time 0: between
    about 1 / (2 t) and 1 / t, and since the flow evens out q (slowly, like a small power of t) at last
    ``(K - 1) / (K t)``.

    Examples
    --------
    >>> ms.depth.cross_entropy_path([0.1, 0.6, 0.3], refusal=0, times=[0, 1, 10]).round(3)
    array([[0.1  , 0.6  , 0.3  ],
           [0.281, 0.442, 0.277],
           [0.914, 0.046, 0.04 ]])
    """
    from scipy.integrate import solve_ivp
    from scipy.special import softmax

    row, times = unit(row, "row"), np.atleast_1d(np.asarray(times, dtype=np.float64))
    if row.ndim != 1 or abs(row.sum() - 1) > 1e-9 or not 0 <= refusal < len(row) or row[refusal] == 0:
        raise InputError(
            f"The row {np.array2string(row, threshold=6)} has no refusal to train at {refusal}.",
            cause="A row is a law over tokens, and a token without probability gets no gradient.",
            next="Pass probabilities that sum to one, with some on refusal.",
        )
    if not (np.isfinite(times).all() and (np.diff(times) >= 0).all() and times[0] >= 0):
        raise InputError("The times do not rise from 0.", cause="Time goes forward.", next="Sort them.")
    on = np.flatnonzero(row)
    aim = (on == refusal).astype(np.float64)

    def slope(_: float, z: NDArray) -> NDArray:
        return aim - softmax(z)

    z = np.log(row[on])
    out = np.zeros((len(times), len(row)))
    if times[-1] > 0:
        found = solve_ivp(slope, (0.0, times[-1]), z, "LSODA", times, rtol=1e-10, atol=1e-12)
        z = found.y.T
    out[:, on] = softmax(np.broadcast_to(z, (len(times), len(on))), axis=1)
    return out
