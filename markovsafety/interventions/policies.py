"""Where to set a guard's threshold: what harm costs against what refusing the harmless costs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..arithmetic import mean
from ..bound import Bound, check_level, clustered
from ..brief import brief
from ..errors import InputError
from .blocking import guarded
from .separation import curve

__all__ = ["Policy", "policy"]


@dataclass(frozen=True, eq=False)
class Policy:
    """A threshold and what it costs per prompt.

    Attributes
    ----------
    threshold : float
        Block above it. Infinity: never block; minus infinity: always.
    cost : Bound
        Expected cost at the threshold, on the prompts that it was chosen on.
    held_out : Bound
        Expected cost where each half of the prompts is judged by the threshold chosen on the other: without the
        optimism of choosing and measuring on the same prompts; nan with less than two prompts of a kind.
    never, always : Bound
        Cost without the guard, and of blocking everything.
    curve : dict of str -> array
        "threshold", "tpr", "fpr", "cost": the choice among all thresholds.
    about : dict

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> harmful, harmless = rng.normal(1, 1, 200), rng.normal(-1, 1, 200)
    >>> chosen = ms.interventions.policy(1.0, 0.1, harmful=harmful, harmless=harmless, harm=0.5, prior=0.1)
    >>> chosen
    Policy(threshold=0.2301, cost=0.0174 [0.0132, 0.0227], held_out=0.0178 [0.0136, 0.0232], never=0.05 [0.0491,
        0.0516], always=0.09 [0.0884, 0.0909], about={'cost_harm': 1, 'cost_refusal': 0.1, 'prior': 0.1})
    >>> print(chosen.held_out)
    cost per prompt, held out = 0.0178   95 % [0.0136, 0.0232]   because: sampling 0.0048; judge, lumping, model,
        truncation, rounding not assessed
    """

    threshold: float
    cost: Bound
    held_out: Bound
    never: Bound
    always: Bound
    curve: dict[str, NDArray] = field(repr=False)
    about: dict[str, Any] = field(default_factory=dict)

    __repr__ = brief

    def __str__(self) -> str:
        return f"block above {self.threshold:.3g}: {self.cost}\n{self.never}\n{self.always}"


def policy(
    cost_harm: float,
    cost_refusal: float,
    *,
    harmful: ArrayLike,
    harmless: ArrayLike,
    harm: Bound | float | ArrayLike,
    prior: float = 0.5,
    seed: int = 0,
    level: float = 0.95,
) -> Policy:
    """The guard's threshold with the lowest expected cost.

    Parameters
    ----------
    cost_harm, cost_refusal : float
        Of one harmful answer, and of one harmless prompt blocked; in one unit, not negative.
    harmful, harmless : array, shape (m,) and (n,)
        Delta_harmful of prompts of either kind (`Guard.scores`), not those that the guard was made from.
    harm : Bound, float, or array of shape (m,)
        P(harm) of harmful prompts without the guard: of their category from the chain, or measured for each of them,
        which does not assume that the guard and the answer are independent.
    prior : float
        Share of harmful prompts among all that will come.
    seed : int
        Of the halves behind `Policy.held_out`.
    level : float

    Returns
    -------
    Policy

    Raises
    ------
    InputError
        Costs or probabilities that are none, or a harm that fits no prompt.

    Notes
    -----
    cost(t) = cost_harm * prior * (1 - TPR(t)) h + cost_refusal * (1 - prior) * FPR(t). The interval is that of
    `clustered` for both rates (a bootstrap has width 0 where all prompts are on the right side), added by
    `arithmetic.mean`; with `harm` a Bound, its corners. It holds for the threshold as given; that it was chosen on the
    same prompts shows in `held_out`.

    Examples
    --------
    Harm costs ten times what a needless refusal costs; one prompt in ten is harmful, and half of those would be
    answered with harm. The dearer harm is, the lower the threshold.

    >>> rng = np.random.default_rng(0)
    >>> harmful, harmless = rng.normal(1, 1, 200), rng.normal(-1, 1, 200)
    >>> told = dict(harmful=harmful, harmless=harmless, harm=0.5, prior=0.1)
    >>> print(ms.interventions.policy(1.0, 0.1, **told))
    block above 0.23: cost per prompt = 0.0174   95 % [0.0132, 0.0227]   because: sampling 0.0047; judge, lumping,
        model, truncation, rounding not assessed
    cost without the guard = 0.05   95 % [0.0491, 0.0516]   because: sampling 0.00094; judge, lumping, model,
        truncation, rounding not assessed
    cost of blocking everything = 0.09   95 % [0.0884, 0.0909]   because: sampling 0.00094; judge, lumping, model,
        truncation, rounding not assessed
    >>> [round(ms.interventions.policy(cost, 0.1, **told).threshold, 1) for cost in (1, 10, 100)]
    [0.2, -0.5, -1.4]
    """
    check_level(level)
    x, y = np.asarray(harmful, dtype=np.float64), np.asarray(harmless, dtype=np.float64)
    given = harm if isinstance(harm, Bound) or np.ndim(harm) == 0 else np.asarray(harm, dtype=np.float64)
    _check(cost_harm, cost_refusal, prior, x, given)
    weights = np.array([cost_harm * prior, cost_refusal * (1 - prior)])
    h = _each(given, len(x))
    found = curve(x, y)
    costs = _costs(found["threshold"], x, y, h, weights)
    threshold = _choice(found["threshold"], costs)

    def priced(t: float, name: str) -> Bound:
        return _priced(x > t, y > t, given, weights, level, name)

    return Policy(
        threshold,
        priced(threshold, "cost per prompt"),
        _held_out(x, y, given, weights, seed, level),
        priced(np.inf, "cost without the guard"),
        priced(-np.inf, "cost of blocking everything"),
        {**found, "cost": costs},
        {"cost_harm": cost_harm, "cost_refusal": cost_refusal, "prior": prior},
    )


def _each(given: Any, m: int) -> NDArray:
    """P(harm) of every harmful prompt."""
    value = given.value if isinstance(given, Bound) else given
    return np.broadcast_to(np.asarray(value, dtype=np.float64), (m,))


def _costs(thresholds: NDArray, x: NDArray, y: NDArray, h: NDArray, weights: NDArray) -> NDArray:
    """Expected cost at each threshold."""
    order = np.argsort(x)
    passed = np.append(0.0, np.cumsum(h[order]))[np.searchsorted(x[order], thresholds, side="right")] / len(x)
    false = 1 - np.searchsorted(np.sort(y), thresholds, side="right") / len(y)
    return weights[0] * passed + weights[1] * false


def _choice(thresholds: NDArray, costs: NDArray) -> float:
    """The middle of the thresholds that cost least, as far as they are neighbours."""
    best = np.flatnonzero(costs <= costs.min() + 1e-12 * (1 + costs.min()))
    run = best[: 1 + int(np.argmax(np.append(np.diff(best) > 1, True)))]
    return float(thresholds[run[len(run) // 2]])


def _priced(blocked: NDArray, false: NDArray, given: Any, weights: NDArray, level: float, name: str) -> Bound:
    """Expected cost, from which harmful and which harmless prompts are blocked."""
    wrong = clustered(false.astype(float), np.ones(len(false)), level)
    if isinstance(given, np.ndarray):
        passed = clustered(given * ~blocked, np.ones(len(blocked)), level)
    else:
        passed = guarded(given, clustered(blocked.astype(float), np.ones(len(blocked)), level))
    total = float(weights.sum())
    if not total:
        return Bound(0.0, 0.0, 0.0, level, {"sampling": 0.0}, None, {"name": name})
    both = mean([passed, wrong], weights)
    reasons = {k: None if w is None else total * w for k, w in both.reasons.items()}
    lower = max(0.0, total * both.lower)  # no cost is negative, nor is rounding
    return Bound(total * both.value, lower, total * both.upper, both.level, reasons, None, {"name": name})


def _held_out(x: NDArray, y: NDArray, given: Any, weights: NDArray, seed: int, level: float) -> Bound:
    """Cost of all prompts, those of each half blocked at the threshold that was chosen on the other half."""
    name = "cost per prompt, held out"
    if min(len(x), len(y)) < 2:
        most = float(weights.sum())
        return Bound(np.nan, 0.0, most, level, {"sampling": most / 2}, None, {"name": name})
    h, rng = _each(given, len(x)), np.random.default_rng(seed)
    halves = [rng.permutation(len(v)) % 2 == 0 for v in (x, y)]
    blocked, false = np.zeros(len(x), bool), np.zeros(len(y), bool)
    for flip in (False, True):
        a, b = (half ^ flip for half in halves)
        found = curve(x[a], y[b])["threshold"]
        t = _choice(found, _costs(found, x[a], y[b], h[a], weights))
        blocked[~a], false[~b] = x[~a] > t, y[~b] > t
    return _priced(blocked, false, given, weights, level, name)


def _check(cost_harm: float, cost_refusal: float, prior: float, x: NDArray, given: Any) -> None:
    if not (0 <= cost_harm < np.inf and 0 <= cost_refusal < np.inf and 0 <= prior <= 1):
        raise InputError(
            f"costs {cost_harm!r} and {cost_refusal!r} with a prior of {prior!r} decide nothing",
            cause="costs are not negative, and the prior is a probability",
            next="give both costs in one unit, and the share of harmful prompts",
        )
    values = np.atleast_1d(np.asarray(given.value if isinstance(given, Bound) else given, dtype=np.float64))
    if values.shape not in ((1,), x.shape) or (isinstance(given, Bound) and given.shape):
        raise InputError(
            f"harm has shape {values.shape}, and there are {len(x)} harmful prompts",
            cause="P(harm) is one number, or one for each harmful prompt",
            next="give hitting_probability(chain, 'harm').at_start, or one measured share per prompt",
        )
    if not ((values >= 0) & (values <= 1)).all():
        raise InputError(
            f"harm is {values.min():g} to {values.max():g}", cause="it is a probability", next="give P(harm) in [0, 1]"
        )
