"""A fine-tuning attack step by step: harm after n gradient steps as a logistic curve below a ceiling.

If every step multiplies the odds of complying by the same factor (`LogitSteps`), harm after n steps on training data is

    rate(n) = ceiling / (1 + e^-(slope n + intercept)),

the ceiling being what a model without any refusal would do. Four points of one paper are all there is to test it on, so
what the curve is worth is told beside it: how far it misses, and what another ceiling would say.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..bound import Bound, check_level
from ..errors import InputError
from .width import unit

__all__ = ["AttackCurve", "fit_attack_curve"]


@dataclass(frozen=True, eq=False)
class AttackCurve:
    """A fitted attack curve.

    Parameters
    ----------
    slope, intercept : Bound
        Log odds per step, log odds before the first.
    ceiling : float
        Harm after any number of steps.
    steps, rates, fitted : array, shape (n,)
        Gradient steps, measured harm, and the curve there.
    error : float
        Largest distance between the two.
    sensitivity : tuple of (ceiling, slope, intercept, error)
        The same for other ceilings.
    info : dict

    Examples
    --------
    Harm of Llama-2-7B-Chat after gradient steps on harmful answers (arXiv 2406.05946):

    >>> rates = ms.depth.PUBLISHED["fine-tuning"]
    >>> curve = ms.depth.fit_attack_curve(rates.at, rates.rate, ceiling=0.889)
    >>> print(type(curve).__name__, curve.harm([1, 3, 10]).round(3))
    AttackCurve [0.063 0.507 0.889]
    >>> print(f"{curve.steps_to(0.5)[0]:.2f}", curve.steps_to(0.9))
    2.98 (None, 'impossible: the curve runs between 0 and its ceiling 0.889')
    """

    slope: Bound
    intercept: Bound
    ceiling: float
    steps: NDArray
    rates: NDArray
    fitted: NDArray
    error: float
    sensitivity: tuple[tuple[float, float, float, float], ...]
    info: dict[str, Any] = field(default_factory=dict)

    def harm(self, steps: ArrayLike) -> Any:
        """Harm after these numbers of steps."""
        harm = _curve(np.asarray(steps, dtype=np.float64), self.slope.value, self.intercept.value, self.ceiling)
        return float(harm) if np.ndim(harm) == 0 else harm

    def steps_to(self, harm: float) -> tuple[float | None, str]:
        """Steps (a real number) after which harm is reached; None and the reason where it is impossible."""
        rate = float(unit(harm, "harm"))
        if not 0 < rate < self.ceiling:
            return None, f"impossible: the curve runs between 0 and its ceiling {self.ceiling:.4g}"
        if self.slope.value <= 0:
            return None, "impossible: the curve does not rise"
        return (math.log(rate / (self.ceiling - rate)) - self.intercept.value) / self.slope.value, ""

    def __str__(self) -> str:
        line = f"{self.slope.value:.4g} n {'+' if self.intercept.value >= 0 else '-'} {abs(self.intercept.value):.4g}"
        lines = [
            f"harm after n steps = {self.ceiling:.4g} / (1 + exp(-({line})))",
            f"  slope {_span(self.slope)}, intercept {_span(self.intercept)}",
            f"  largest error {100 * self.error:.2g} points",
        ]
        for A, slope, _, error in self.sensitivity:
            lines.append(f"  ceiling {A:.4g}: slope {slope:.4g}, largest error {100 * error:.2g} points")
        return "\n".join(lines)

    __repr__ = __str__


def _span(b: Bound) -> str:
    return f"{b.value:.4g} [{b.lower:.4g}, {b.upper:.4g}]"


def fit_attack_curve(
    steps: ArrayLike,
    rates: ArrayLike,
    ceiling: float,
    *,
    n: int | None = None,
    ceilings: Sequence[float] = (),
    level: float = 0.95,
) -> AttackCurve:
    """Fit harm after n gradient steps by a straight line in its log odds below a ceiling.

    Parameters
    ----------
    steps : array, shape (m,)
        Gradient steps, at least three different ones.
    rates : array, shape (m,)
        Harm measured there, in (0, ceiling).
    ceiling : float
        In (0, 1]; e.g. harm at the end of fine-tuning. It is taken as known: see `sensitivity`.
    n : int, optional
        Prompts behind each rate, for the sampling part of the intervals.
    ceilings : sequence of float
        Other ceilings to try.
    level : float

    Returns
    -------
    AttackCurve
        The intervals of slope and intercept hold two widths: "model" (how far the points miss the line, Student's t)
        and "sampling" (binomial rates, if `n` is given), added in squares. They do not hold the ceiling's own error,
        which with few points is the largest.

    Raises
    ------
    InputError
        If there are too few points, or a rate is not between 0 and the ceiling.

    Notes
    -----
    Ordinary least squares on the log odds, as in the logit update of `updates` (our own reading). The data that this
    was made for: 1.5, 22.4, 76.4, 87.9 % after 0, 2, 4, 6 steps (arXiv 2406.05946, Llama-2-7B-Chat, ceiling 88.9 %).

    Examples
    --------
    Four points of arXiv 2406.05946, 330 prompts each; what another ceiling would say stands below:

    >>> rates = ms.depth.PUBLISHED["fine-tuning"]
    >>> print(ms.depth.fit_attack_curve(rates.at, rates.rate, ceiling=0.889, n=330, ceilings=[0.95]))
    harm after n steps = 0.889 / (1 + exp(-(1.426 n - 3.995)))
      slope 1.426 [0.8648, 1.987], intercept -3.995 [-5.03, -2.96]
      largest error 1.1 points
      ceiling 0.95: slope 1.127, largest error 11 points
    """
    check_level(level)
    x, y = np.asarray(steps, dtype=np.float64), unit(rates, "rates")
    if x.ndim != 1 or x.shape != y.shape or len(np.unique(x)) < 3 or not np.isfinite(x).all():
        raise InputError(
            f"Steps of shape {x.shape} and rates of shape {y.shape} make no curve.",
            cause="A line and its error need three different numbers of steps, each with one rate.",
            next="Pass two lists of one length.",
        )
    if n is not None and not (isinstance(n, (int, np.integer)) and n > 0):
        raise InputError(f"n is {n!r}.", cause="It counts prompts.", next="Pass a whole number >= 1.")
    fits = {A: _fit(x, y, A) for A in map(float, (ceiling, *ceilings))}
    table = tuple((A, float(fit[0][0]), float(fit[0][1]), fit[1]) for A, fit in fits.items())
    beta, error = fits[float(ceiling)]
    widths = _widths(x, y, float(ceiling), beta, n, level)
    bounds = []
    for value, model, sampling in zip(beta, *widths):
        half = math.hypot(model, sampling)
        reasons = {"model": model, **({"sampling": sampling} if n is not None else {})}
        bounds.append(Bound(float(value), float(value - half), float(value + half), level, reasons))
    fitted = _curve(x, beta[0], beta[1], float(ceiling))
    info = {"method": "least squares on the log odds", "prompts": n, "degrees of freedom": len(x) - 2}
    return AttackCurve(bounds[0], bounds[1], float(ceiling), x, y, fitted, error, table[1:], info)


def _curve(x: NDArray, slope: Any, intercept: Any, ceiling: float) -> NDArray[np.float64]:
    from scipy.special import expit

    return ceiling * expit(slope * x + intercept)


def _fit(x: NDArray, y: NDArray, ceiling: float) -> tuple[NDArray, float]:
    """(slope, intercept) and the largest error in probability."""
    if not 0 < ceiling <= 1 or not ((y > 0) & (y < ceiling)).all():
        raise InputError(
            f"The rates lie in [{y.min():.6g}, {y.max():.6g}], the ceiling is {ceiling!r}.",
            cause="Log odds below a ceiling need every rate strictly between 0 and the ceiling, which is at most 1.",
            next="Raise the ceiling above the largest rate, and leave out rates of 0 (they carry no log odds).",
        )
    beta = np.polyfit(x, np.log(y) - np.log(ceiling - y), 1)
    return beta, float(np.abs(_curve(x, beta[0], beta[1], ceiling) - y).max())


def _widths(x: NDArray, y: NDArray, ceiling: float, beta: NDArray, n: int | None, level: float) -> tuple[Any, Any]:
    """Half-widths of slope and intercept from misfit and from sampling."""
    from scipy.special import ndtri, stdtrit

    X = np.stack([x, np.ones_like(x)], axis=1)
    solve = np.linalg.pinv(X)
    z = np.log(y) - np.log(ceiling - y)
    freedom = len(x) - 2
    spread = math.sqrt(float(((z - X @ beta) ** 2).sum()) / freedom)
    model = stdtrit(freedom, (1 + level) / 2) * spread * np.sqrt((solve**2).sum(axis=1))
    if n is None:
        return model, np.zeros(2)
    # d logit / d rate is ceiling / (y (ceiling - y)).
    noise = ceiling / (y * (ceiling - y)) * np.sqrt(y * (1 - y) / n)
    return model, ndtri((1 + level) / 2) * np.sqrt(((solve * noise) ** 2).sum(axis=1))
