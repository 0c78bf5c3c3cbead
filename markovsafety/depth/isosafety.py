"""Iso-safety: which depths and widths leave the same harm, and which of them costs least.

Without a floor harm of one answer falls geometrically with trained depth, q(d) = f0 c^d. If m independent answers must
all be harmful, f0^m c^(m d) <= eps is

    m (d + d0) >= C,    C = ln(1 / eps) / ln(1 / c),    d0 = ln(1 / f0) / ln(1 / c):

width and depth are exchangeable along a hyperbola. Two things break it. A floor f1 of depth: then at any depth
m >= ln(1 / eps) / ln(1 / f1). And correlation: answers with the intra-class correlation rho never leave less than a
fixed share of q, so that m answers are worth a fixed number of tokens, however deep the training (`worth_in_tokens`):
width saturates, depth does not.

The hyperbola is our own reading of the exchange that arXiv 2502.00669 states (its body was not available to us).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..errors import InputError
from .closed import Profile
from .mixtures import log_moment
from .profile import budget, check_side, whole
from .rules import check_rule, falls_with_width, widths_of
from .width import ensemble_harm, needed_width, why_no_width

__all__ = ["Cheapest", "Hyperbola", "cheapest", "hyperbola", "iso_widths", "worth_in_tokens"]

DEEPEST = 100_000  # no cost is minimised beyond this depth


@dataclass(frozen=True)
class Hyperbola:
    """m (d + d0) = C: pairs of width and depth that leave the same harm, for independent answers without a floor.

    Parameters
    ----------
    C, d0 : float
        In tokens.

    Examples
    --------
    The depth that one, two and four answers need, and where both together cost least:

    >>> curve = ms.depth.hyperbola(f0=0.8, c=0.69, eps=1e-3)
    >>> curve
    Hyperbola(C=18.6..., d0=0.60...)
    >>> curve.depth([1, 2, 4]).round(2)
    array([18.01,  8.71,  4.05])
    >>> width, depth = curve.optimum(depth_price=1, width_price=3)
    >>> print(f"width {width:.2f}, depth {depth:.2f}")
    width 2.49, depth 6.87
    """

    C: float
    d0: float

    def width(self, depth: ArrayLike) -> Any:
        """Real width that is needed at a depth, C / (d + d0); at least 1."""
        result = np.maximum(self.C / (np.asarray(depth, dtype=np.float64) + self.d0), 1.0)
        return float(result) if result.ndim == 0 else result

    def depth(self, width: ArrayLike) -> Any:
        """Real depth that is needed at a width, C / m - d0; at least 0."""
        result = np.maximum(self.C / widths_of(width) - self.d0, 0.0)
        return float(result) if result.ndim == 0 else result

    def optimum(self, depth_price: float, width_price: float) -> tuple[float, float]:
        """Real (width, depth) of least cost depth_price d + width_price m on the hyperbola.

        ``m = sqrt(C depth_price / width_price)``, ``d = sqrt(C width_price / depth_price) - d0``, pushed to the edge
        where one of them would be below 1 or 0.
        """
        a, b = _price(depth_price, "depth_price"), _price(width_price, "width_price")
        d = min(max(math.sqrt(self.C * b / a) - self.d0, 0.0), max(self.C - self.d0, 0.0))
        return self.width(d), d


def hyperbola(f0: float, c: float, eps: float) -> Hyperbola:
    """Iso-safety curve of harm f0 c^d.

    Parameters
    ----------
    f0 : float
        Harm of one answer without alignment, in (0, 1].
    c : float
        Probability of passing an aligned position with neither harm nor refusal, in (0, 1).
    eps : float
        Harm budget, in (0, 1).

    Returns
    -------
    Hyperbola

    Raises
    ------
    InputError
        A number outside its range; with eps = 0 no width and depth suffice.

    Examples
    --------
    Harm is 0.8 without alignment and falls by a factor of 0.69 a position; a thousandth may be left.

    >>> curve = ms.depth.hyperbola(f0=0.8, c=0.69, eps=1e-3)
    >>> print(f"m (d + {curve.d0:.2f}) = {curve.C:.2f}")
    m (d + 0.60) = 18.62
    """
    eps = budget(eps)
    if not (0 < f0 <= 1 and 0 < c < 1 and 0 < eps < 1):
        raise InputError(
            f"f0 = {f0}, c = {c}, eps = {eps}.",
            cause="Harm f0 c^d falls with depth and never reaches 0.",
            next="Pass 0 < f0 <= 1, 0 < c < 1 and 0 < eps < 1.",
        )
    per = -math.log(c)
    return Hyperbola(-math.log(eps) / per, -math.log(f0) / per)


def iso_widths(
    profile: Profile,
    eps: float,
    depth: ArrayLike,
    icc: float = 0.0,
    rule: str = "any-refusal",
    model: str = "beta-binomial",
    *,
    prefill: int = 0,
    side: str = "upper",
) -> NDArray:
    """Smallest width at each trained depth that keeps harm within a budget.

    Parameters
    ----------
    profile : Profile
        With its floor and its intervals.
    eps : float
        Harm budget.
    depth : int or array
        Trained depths d.
    icc, rule, model
        See `ensemble_harm`.
    prefill : int
        Forced tokens to withstand.
    side : {"upper", "value", "lower"}
        Which end of h counts.

    Returns
    -------
    float array, shape of `depth`
        inf where no width suffices.

    Examples
    --------
    Depth replaces width until the floor is near, and answers that are alike take many more:

    >>> profile = ms.depth.Profile(a0=0.08, r0=0.02, a1=0.01, r1=0.3)
    >>> for icc in (0, 0.3): print(ms.depth.iso_widths(profile, 1e-3, [5, 10, 20], icc))
    [4. 3. 3.]
    [22.  9.  7.]
    """
    check_side(side)
    q = np.asarray(getattr(profile.harm(np.atleast_1d(whole(depth, "depth")), prefill), side))
    return needed_width(q, eps, icc, rule, model).reshape(np.shape(depth))


def worth_in_tokens(width: ArrayLike, c: float, icc: float) -> Any:
    """Tokens of trained depth that m correlated answers are worth, at most.

    Parameters
    ----------
    width : int or array
        Answers m under any-refusal, beta-binomial.
    c : float
        Factor of harm per aligned position, in (0, 1).
    icc : float
        In (0, 1].

    Returns
    -------
    float or array
        ``ln binom(s + m - 1, m - 1) / ln(1 / c)`` with s = (1 - icc) / icc.

    Raises
    ------
    InputError
        A number outside its range; independent answers (icc = 0) are worth ever more with depth.

    Notes
    -----
    With alpha = s q and beta = s (1 - q), ``E[p^m] / q`` falls to ``Gamma(s + 1) Gamma(m) / Gamma(s + m)`` as q -> 0:
    however deep the training, m answers multiply harm by no less than that, which so many more tokens do as well.
    Independent answers are worth (m - 1)(d + d0) tokens instead, ever more with depth. Our own.

    Examples
    --------
    Ten answers that correlate by 0.3 are worth some twelve aligned positions, however deep the training:

    >>> ms.depth.worth_in_tokens([1, 2, 10, 100], c=0.69, icc=0.3).round(1)
    array([ 0. ,  3.2, 12.1, 26.2])
    """
    m = widths_of(width)
    if not (0 < c < 1 and 0 < icc <= 1):
        raise InputError(
            f"c = {c}, icc = {icc}.",
            cause="Independent answers are worth more the deeper the training, without limit.",
            next="Pass 0 < c < 1 and 0 < icc <= 1.",
        )
    s = (1 - icc) / icc
    # Gamma(s + 1) Gamma(m) / Gamma(s + m) is E[p^(m - 1)] for p ~ Beta(1, s).
    factor = log_moment(np.ones(m.shape), np.full(m.shape, s), m - 1.0) if s > 0 else np.zeros(m.shape)
    result = np.where(m == 1, 0.0, factor / math.log(c))
    return float(result) if result.ndim == 0 else result


@dataclass(frozen=True)
class Cheapest:
    """Width and depth of least cost within a harm budget.

    Parameters
    ----------
    width, depth : int or None
        None where none suffice.
    cost : float
        depth_price d + width_price m; inf where none suffice.
    harm : float
        What is left of harm there.
    reason : str
        Why none suffice; empty otherwise.

    Examples
    --------
    Answers that are all alike are worth one; what is left is the floor of depth.

    >>> profile = ms.depth.Profile(a0=0.08, r0=0.02, a1=0.01, r1=0.3)
    >>> ms.depth.cheapest(profile, 1e-3, depth_price=1, width_price=3)
    Cheapest(width=3, depth=7, cost=16.0, harm=0.00071..., reason='')
    >>> print(ms.depth.cheapest(profile, 1e-3, depth_price=1, width_price=3, icc=1))
    even at unlimited depth (harm 0.0323 of one answer): impossible: even at unlimited
        width harm stays above the floor 0.0323, the budget is 0.001
    """

    width: int | None
    depth: int | None
    cost: float
    harm: float
    reason: str = ""

    @property
    def possible(self) -> bool:
        """Whether any width and depth suffice."""
        return self.width is not None

    def __str__(self) -> str:
        if self.width is None:
            return self.reason
        return f"width {self.width}, depth {self.depth}: cost {self.cost:.4g}, harm {self.harm:.3g}"


def cheapest(
    profile: Profile,
    eps: float,
    depth_price: float,
    width_price: float,
    icc: float = 0.0,
    rule: str = "any-refusal",
    model: str = "beta-binomial",
    *,
    prefill: int = 0,
    side: str = "upper",
) -> Cheapest:
    """Whole width and depth of least cost that keep harm within a budget, by search over all depths that can pay.

    Parameters
    ----------
    profile : Profile
    eps : float
        Harm budget.
    depth_price, width_price : float
        Price of a token of trained depth, and of an answer; positive.
    icc, rule, model, prefill, side
        See `iso_widths`.

    Returns
    -------
    Cheapest
        Of equal costs the one with fewer answers.

    Examples
    --------
    An answer costs as much as three aligned positions. Answers that correlate take more of both:

    >>> profile = ms.depth.Profile(a0=0.08, r0=0.02, a1=0.01, r1=0.3)
    >>> for icc in (0, 0.1): print(ms.depth.cheapest(profile, 1e-3, depth_price=1, width_price=3, icc=icc))
    width 3, depth 7: cost 16, harm 0.000715
    width 4, depth 8: cost 20, harm 0.000862
    """
    a, b = _price(depth_price, "depth_price"), _price(width_price, "width_price")
    check_rule(rule)
    eps = budget(eps)
    best, tried, size = Cheapest(None, None, math.inf, math.nan), 0, 64
    floor = float(getattr(profile.floor(), side))
    hopeless = eps == 0 or (floor > 0 and needed_width(floor, eps, icc, rule, model) is None)
    least = 1 if not falls_with_width(rule) or rule == "any-refusal" else int(rule.split("-")[0])
    while tried <= DEEPEST and a * tried + b * least < best.cost:
        depths = np.arange(tried, tried + size)
        widths = iso_widths(profile, eps, depths, icc, rule, model, prefill=prefill, side=side)
        cost = a * depths + b * widths
        at = int(np.lexsort((widths, np.round(cost, 9)))[0])
        if cost[at] < best.cost:
            q = getattr(profile.harm(int(depths[at]), prefill), side)
            m = int(widths[at])
            best = Cheapest(m, int(depths[at]), float(cost[at]), ensemble_harm(q, m, icc, rule, model))
        tried, size = tried + size, 2 * size
        if best.width is None and hopeless:
            break
    if best.width is not None:
        return best
    why = why_no_width(floor, eps, icc, rule, model) if floor > 0 else ""
    why = why or "impossible: harm is never exactly zero at a finite width and depth"
    return Cheapest(None, None, math.inf, math.nan, f"even at unlimited depth (harm {floor:.3g} of one answer): {why}")


def _price(x: Any, name: str) -> float:
    value = float(x)
    if not 0 < value < math.inf:
        raise InputError(
            f"{name} is {x!r}.", cause="What costs nothing is never enough.", next="Pass a positive price."
        )
    return value
