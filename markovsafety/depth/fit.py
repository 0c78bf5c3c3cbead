"""Hazards behind a measured profile h(k): the survival-ratio model, and the exponential approach to a plateau.

*Survival ratio.* If harm lands only behind the forced tokens and every position refuses at its own rate, then
``h(k) = h(inf) prod_{t >= k} (1 - r_t)``, so that ``h(k1) / h(k2)`` is the probability to pass the positions k1 to
k2 - 1 unrefused. *Exponential.* ``h(k) = a - b exp(-k / c)``: an approach to a plateau, by a constant factor per token.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..bound import Bound, check_level, clopper_pearson
from ..errors import InputError
from ..evidence.cells import cell, tally_of
from .hazards import Hazards
from .profile import profile, whole
from .published import Rates

__all__ = ["Exponential", "HazardFit", "fit_hazards"]

FEW = 5.0  # events below which a resampled interval is joined with an exact one
RATIO = (
    "the survival ratio takes every position to refuse at its own rate, whatever was forced before it: it fails where "
    "refusal depends on the time since the forced prefix (a model that refuses at once after any prefix looks as if it "
    "refused slowly); rollouts tell, by fit_recovery"
)


@dataclass(frozen=True, eq=False)
class Exponential:
    """The curve ``h(k) = a - b exp(-k / c)``.

    Parameters
    ----------
    a, b, c : Bound
        Plateau, drop, and tokens until it has fallen e-fold. An end of c is inf where the data do not hold it.
    at_zero : Bound
        ``a - b``, the curve extrapolated to k = 0.
    residuals : array, shape (K,)
        Measured minus fitted, at `depths`.
    depths : tuple of int
        Depths that were fitted.
    chi2, freedom, p : float, int, float
        Goodness of fit: squared residuals over their variances, degrees of freedom, and the probability of as much; it
        takes the depths as independent. With no freedom left the fit is exact and p is 1.

    Examples
    --------
    Llama-2-7B-Chat with k forced tokens (arXiv 2406.05946, Table 3): harm levels off, within five tokens e-fold.

    >>> curve = ms.depth.fit_hazards(ms.depth.PUBLISHED["prefill"]).exponential
    >>> print(type(curve).__name__, curve)
    Exponential h(k) = 0.569 - 0.401 exp(-k / 5.02)
    >>> curve.harm([5, 10, 100]).round(3)
    array([0.421, 0.515, 0.569])
    """

    a: Bound
    b: Bound
    c: Bound
    at_zero: Bound
    residuals: NDArray
    depths: tuple[int, ...]
    chi2: float
    freedom: int
    p: float

    def harm(self, prefill: ArrayLike) -> NDArray[np.float64]:
        """The fitted curve, cut off at [0, 1]."""
        k = whole(prefill, "prefill")
        return np.clip(self.a.value - self.b.value * np.exp(-k / self.c.value), 0.0, 1.0)

    def __str__(self) -> str:
        return f"h(k) = {self.a.value:.3g} - {self.b.value:.3g} exp(-k / {self.c.value:.3g})"

    __repr__ = __str__


@dataclass(frozen=True, eq=False)
class HazardFit:
    """Both models of a measured profile.

    Parameters
    ----------
    depths : tuple of int, length K
        Measured numbers of forced tokens.
    harm : Bound, shape (K,)
        The profile.
    refusal : Bound, shape (K - 1,)
        Survival ratio: probability that one of the positions from one depth to the next refuses. 0 where harm does not
        rise.
    per_token : Bound, shape (K - 1,)
        The same per position, as a constant hazard between the depths.
    exponential : Exponential or None
        None where fewer than three depths behind the first token were measured, or harm does not rise there.
    caveats : tuple of str
        What the two models leave out, and where they do not hold for these data.

    Examples
    --------
    The survival ratio as a model by position repeats the rates that it was made from, and can be asked between them:

    >>> fit = ms.depth.fit_hazards({0: 0.02, 5: 0.4, 20: 0.5}, n=300)
    >>> print(type(fit).__name__, fit.refusal.value.round(3), fit.per_token.value.round(3))
    HazardFit [0.95 0.2 ] [0.451 0.015]
    >>> fit.hazards().harm([0, 1, 5, 10, 20]).value.round(3)
    array([0.02 , 0.036, 0.4  , 0.431, 0.5  ])
    """

    depths: tuple[int, ...]
    harm: Bound
    refusal: Bound
    per_token: Bound
    exponential: Exponential | None
    caveats: tuple[str, ...]

    def hazards(self) -> Hazards:
        """The survival-ratio model as `Hazards`: no harm before the deepest depth, and behind it the harm measured
        there. It repeats the measured profile where that rises."""
        gaps = np.diff(self.depths)
        refusal = np.repeat(np.asarray(self.per_token.value), gaps)
        head = np.zeros(self.depths[0])  # nothing is known of the positions before the first depth
        r = np.concatenate([head, refusal])
        return Hazards(np.zeros(len(r)), r, float(self.harm.value[-1]))

    def __str__(self) -> str:
        lines = [f"{'positions':>12}  refused  per token"]
        for i, (k, m) in enumerate(zip(self.depths, self.depths[1:])):
            lines.append(
                f"{f'{k} to {m - 1}':>12}  {100 * self.refusal.value[i]:6.1f} %  {self.per_token.value[i]:.4f}"
            )
        lines += [str(self.exponential)] if self.exponential else []
        return "\n".join([*lines, *(f"  {c}" for c in self.caveats)])

    __repr__ = __str__


def fit_hazards(
    source: Any,
    *,
    n: int | None = None,
    noise: str = "prompts",
    level: float = 0.95,
    draws: int = 2000,
    seed: int = 0,
) -> HazardFit:
    """Fit the survival-ratio and the exponential model to a measured profile.

    Parameters
    ----------
    source : Rollouts, Counts, estimated Chain, Rates, or mapping of int to float
        Rollouts in some form, whose prompts are resampled; or rates by the number of forced tokens.
    n : int, optional
        Prompts behind each rate, for a mapping.
    noise : {"prompts", "runs"}
        What the intervals of Rates are about: other prompts, as many; or another run on the same prompts, by the
        printed standard deviations where there are any. Papers ask the same prompts at all depths, which "prompts"
        cannot use: it takes the depths as independent, and is too wide for differences between depths.
    level : float
    draws : int
        Resamples. Rollouts: prompts with replacement, all depths together. Rates: beta laws (the posterior of a
        binomial under Jeffreys' prior), of `n` prompts or of the size that a printed deviation stands for.
    seed : int

    Returns
    -------
    HazardFit
        The exponential is fitted by least squares to the depths behind the first token: k = 0 is left out, because an
        unforced answer passes a gate (the choice of its first token) that no forced one does.

    Raises
    ------
    InputError
        With fewer than two depths, or rates of which nothing says how certain they are.

    Notes
    -----
    Both models are our own reading of the prefill tables of arXiv 2406.05946 (Table 3). Where a rate has fewer than
    five events, the interval of a ratio is joined with the one from exact intervals of both its rates.

    Examples
    --------
    Harm after 0, 5 and 20 forced tokens, of 300 prompts. Read as hazards, positions 5 to 19 refuse one answer in five:

    >>> fit = ms.depth.fit_hazards({0: 0.02, 5: 0.4, 20: 0.5}, n=300)
    >>> print(fit.refusal[1])
    refusal between depths = 0.2   95 % [0.0..., 0.3...]   because: sampling 0.1...;
        judge, lumping, model, truncation, rounding not assessed
    >>> print(fit.caveats[0])
    k = 0 is a gate of its own: the first token is chosen there, and nowhere else
    """
    check_level(level)
    if noise not in ("prompts", "runs"):
        raise InputError(f"noise is {noise!r}.", cause="It is of prompts or of runs.", next='Pass noise="prompts".')
    if isinstance(source, Mapping):
        source = Rates(tuple(sorted(source)), tuple(source[k] for k in sorted(source)), None, n)
    rng = np.random.default_rng(seed)
    drawn = _of_rates(source, noise, level, draws, rng) if isinstance(source, Rates) else None
    depths, h, H, known = drawn or _of_prompts(source, level, draws, rng)
    if len(depths) < 2:
        raise InputError(
            f"Only depth {depths[0]} was measured.",
            cause="A hazard between two depths needs both.",
            next="Sample with prefill=[0, 5, 10, 20].",
        )
    value, lows = _refusal(h), _refusal(H)
    ends = np.quantile(lows, [(1 - level) / 2, (1 + level) / 2], axis=0)
    each = (1 + level) / 2  # both ends of two rates
    low, high = known.ends(each)
    few = (known.events[:-1] < FEW) | (known.events[1:] < FEW)
    far = 1 - np.clip(_over(high[:-1], low[1:]), 0, 1), 1 - np.clip(_over(low[:-1], high[1:]), 0, 1)
    lower = np.minimum(np.where(few, np.minimum(ends[0], far[0]), ends[0]), value)
    upper = np.maximum(np.where(few, np.maximum(ends[1], far[1]), ends[1]), value)
    refusal = _bound(value, lower, upper, level, "refusal between depths")
    gaps = np.diff(depths)
    with np.errstate(divide="ignore"):
        parts = [-np.expm1(np.log1p(-x) / gaps) for x in (value, lower, upper)]
    per_token = _bound(parts[0], parts[1], parts[2], level, "refusal per token")
    curve = _exponential_fit(depths, h, H, level)
    harm = known.harm
    return HazardFit(tuple(depths.tolist()), harm, refusal, per_token, curve, _caveats(depths, h, harm, curve, source))


@dataclass(frozen=True, eq=False)
class _Known:
    """Measured rates: their bound, and how many events each stands on."""

    harm: Bound
    events: NDArray
    size: NDArray

    def ends(self, level: float) -> tuple[NDArray, NDArray]:
        return clopper_pearson(np.minimum(self.events, self.size), self.size, level)


Drawn = tuple[NDArray, NDArray, NDArray, _Known]  # depths, rates, resampled rates (draws, K), what is known of them


def _of_rates(source: Rates, noise: str, level: float, draws: int, rng: np.random.Generator) -> Drawn:
    h = np.array(source.rate)
    size = np.full(len(h), np.inf if source.n is None else float(source.n))
    for i, sd in enumerate(source.sd or ()):
        if sd and (noise == "runs" or source.n is None):
            size[i] = h[i] * (1 - h[i]) / sd**2
    if not np.isfinite(size).all():
        raise InputError(
            "Nothing says how certain these rates are.",
            cause="Neither the number of prompts nor a standard deviation was given for each.",
            next="Pass n=..., the number of prompts behind each rate.",
        )
    low, high = clopper_pearson(h * size, size, level)
    harm = _bound(h, np.minimum(low, h), np.maximum(high, h), level, "P(harm)")
    H = rng.beta(h * size + 0.5, (1 - h) * size + 0.5, (draws, len(h)))
    return np.array(source.at), h, H, _Known(harm, h * size, size)


def _of_prompts(source: Any, level: float, draws: int, rng: np.random.Generator) -> Drawn:
    tally = tally_of(source)
    harm = profile(tally, level=level)
    depths = np.array(harm.info["coords"]["depth"])
    cells = [cell(tally, int(k)) for k in depths]
    prompts = np.unique(np.concatenate([c.prompt_id for c in cells]))
    x, m = np.zeros((len(prompts), len(depths))), np.zeros((len(prompts), len(depths)))
    for i, c in enumerate(cells):
        at = np.searchsorted(prompts, c.prompt_id)
        x[at, i], m[at, i] = c.events, c.totals
    W = rng.multinomial(len(prompts), np.full(len(prompts), 1 / len(prompts)), draws).astype(np.float64)
    h = np.asarray(harm.value)
    total = W @ m
    H = np.where(total > 0, (W @ x) / np.maximum(total, 1e-300), h)
    sizes = np.array([c.bound(level).info["n_eff"] for c in cells])
    return depths, h, H, _Known(harm, h * sizes, sizes)


def _over(x: NDArray, y: NDArray) -> NDArray:
    """x / y; 1 where y is 0: without harm at the deeper depth nothing is known of the ratio, and no refusal claimed."""
    return np.divide(x, y, out=np.ones(np.broadcast_shapes(np.shape(x), np.shape(y))), where=y > 0)


def _refusal(h: NDArray) -> NDArray:
    return 1 - np.clip(_over(h[..., :-1], h[..., 1:]), 0.0, 1.0)


def _bound(value: Any, lower: Any, upper: Any, level: float, name: str) -> Bound:
    with np.errstate(invalid="ignore"):
        half = (np.asarray(upper) - np.asarray(lower)) / 2
    return Bound(value, lower, upper, level, {"sampling": half}, None, {"name": name})


def _exponential_fit(depths: NDArray, h: NDArray, H: NDArray, level: float) -> Exponential | None:
    on = depths > 0
    k, y, Y = depths[on].astype(np.float64), h[on], H[:, on]
    if len(k) < 3:
        return None
    (a,), (b,), (c,) = _least_squares(k, y[None, :])
    edge = _edges(k)
    if not (b > 0 and edge[0] * 1.01 < c < edge[1] / 1.01):
        return None
    found = np.stack([*_least_squares(k, Y)])
    # At an edge the curve is a straight line, or has fallen before the first depth: what it cannot tell is infinite.
    found[:2, found[2] > edge[1] / 1.01] = np.inf
    found[1, found[2] < edge[0] * 1.01] = np.inf
    found[2] = np.where(found[2] > edge[1] / 1.01, np.inf, np.where(found[2] < edge[0] * 1.01, 0.0, found[2]))
    tails = [(1 - level) / 2, (1 + level) / 2]
    names = ("plateau", "drop", "tokens per e-fold", "curve at k = 0")
    zero = _least_squares(k, Y)
    rows = [*found, np.where(np.isinf(found[1]), -np.inf, zero[0] - zero[1])]
    bounds = []
    for name, value, row in zip(names, (a, b, c, a - b), rows):
        low, high = np.quantile(row, tails, method="inverted_cdf")
        bounds.append(_bound(value, min(low, value), max(high, value), level, name))
    residuals = y - (a - b * np.exp(-k / c))
    variance = np.maximum(Y.var(axis=0), 1e-300)
    chi2, freedom = float(np.sum(residuals**2 / variance)), len(k) - 3
    from scipy.stats import chi2 as law

    p = float(law.sf(chi2, freedom)) if freedom else 1.0
    ks = tuple(k.astype(int).tolist())
    return Exponential(bounds[0], bounds[1], bounds[2], bounds[3], residuals, ks, chi2, freedom, p)


def _edges(k: NDArray) -> tuple[float, float]:
    return float(np.diff(k).min()) / 10, 10 * float(k[-1])


def _least_squares(k: NDArray, Y: NDArray) -> tuple[NDArray, NDArray, NDArray]:
    """a, b, c of the least squares for every row of Y, shape (m, K): linear in a and b, so that only c is searched."""

    def at(c: NDArray) -> tuple[NDArray, NDArray, NDArray]:
        x = np.exp(-k / c[:, None])
        mean_x, mean_y = x.mean(axis=1), Y.mean(axis=1)
        dx, dy = x - mean_x[:, None], Y - mean_y[:, None]
        slope = (dx * dy).sum(axis=1) / np.maximum((dx * dx).sum(axis=1), 1e-300)
        error = ((dy - slope[:, None] * dx) ** 2).sum(axis=1)
        return error, mean_y - slope * mean_x, -slope

    low, high = _edges(k)
    grid = np.geomspace(low, high, 100)
    best = np.argmin([at(np.full(len(Y), c))[0] for c in grid], axis=0)
    left, right = np.log(grid[np.maximum(best - 1, 0)]), np.log(grid[np.minimum(best + 1, len(grid) - 1)])
    golden = (np.sqrt(5) - 1) / 2
    for _ in range(60):
        inner = right - golden * (right - left), left + golden * (right - left)
        down = at(np.exp(inner[0]))[0] < at(np.exp(inner[1]))[0]
        left, right = np.where(down, left, inner[0]), np.where(down, inner[1], right)
    c = np.exp((left + right) / 2)
    _, a, b = at(c)
    return a, b, c


def _caveats(depths: NDArray, h: NDArray, harm: Bound, curve: Exponential | None, source: Any) -> tuple[str, ...]:
    found = []
    if depths[0] == 0 and curve is not None:
        zero = curve.at_zero
        gate = not (harm.lower[0] <= zero.upper and zero.lower <= harm.upper[0])
        found.append(
            f"k = 0 is a gate of its own: measured {100 * h[0]:.3g} %, extrapolated {100 * zero.value:.3g} %"
            if gate
            else f"k = 0 was not fitted; whether it is a gate of its own cannot be told here: measured "
            f"{100 * h[0]:.3g} %, extrapolated {100 * zero.value:.3g} % "
            f"[{100 * zero.lower:.3g}, {100 * zero.upper:.3g}]"
        )
    elif depths[0] == 0:
        found.append("k = 0 is a gate of its own: the first token is chosen there, and nowhere else")
    falls = [f"{k} to {m}" for k, m, x, y in zip(depths, depths[1:], h, h[1:]) if y < x]
    if falls:
        found.append(f"harm falls from k = {', '.join(falls)}: no refusal explains that, and 0 stands there")
    none = [str(k) for k, y in zip(depths[1:], h[1:]) if y == 0]
    if none:
        found.append(f"no harm was seen at k = {', '.join(none)}: the ratio to it is not known, and 0 stands there")
    if curve is None:
        found.append("no exponential: it needs three depths behind the first token, and harm that rises and levels off")
    elif curve.freedom and curve.p < 0.01:
        found.append(f"the exponential does not fit (chi-square {curve.chi2:.3g} with {curve.freedom} degrees)")
    found.append(RATIO)
    return (*found, *(source.notes if isinstance(source, Rates) else ()))
