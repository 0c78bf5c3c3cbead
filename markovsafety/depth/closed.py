"""The closed form behind depth: alignment of the first d positions, by four hazards per token.

The attack is a prefill: k tokens of a compliant answer are forced, and h(k) is the probability of harm after them. The
closed form has one harm trajectory with a state per position. A position is either *unaligned* (per token: harm with
probability a0, refusal with r0, else on to the next position) or *aligned* (a1, r1). If the first d positions are
aligned and k tokens are forced, max(d - k, 0) aligned positions are left to cross, so

    h(k; d) = f1 + c1^max(d - k, 0) (f0 - f1),     f = a / (a + r),   c1 = 1 - a1 - r1:

training depth buys a geometric decay towards the floor f1, which no depth gets below.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..bound import Bound
from ..errors import InputError
from .attack import AttackLaw, Optimum, law_given
from .profile import Reading, budget, check_side, whole, within
from .rules import unit

__all__ = ["Profile"]

HAZARDS = ("a0", "r0", "a1", "r1")


@dataclass(frozen=True)
class Profile:
    """Alignment of the first positions, by four hazards per token; the closed form h(k; d).

    Parameters
    ----------
    a0, r0 : float
        Probability of harm and of refusal at an unaligned position, given that neither came before.
    a1, r1 : float
        The same at an aligned position. Each pair sums to at most 1.
    intervals : dict of str to (lower, upper), optional
        Intervals of the hazards by name; a hazard without one is taken as known.
    level : float
        Joint level at which all the intervals hold together; 1 where they are proven or there are none.

    Raises
    ------
    InputError
        If a hazard is no probability, a pair sums to more than 1, or an interval does not contain its hazard.

    Notes
    -----
    The setting is the "first few tokens" alignment of arXiv 2406.05946 in the Markov view of arXiv 2502.00669; the
    closed form is our own. Harm rises in a0 and a1 and falls in r0 and r1 at every depth, so the interval of h is
    attained at two corners of the box of hazards.

    Examples
    --------
    Twenty aligned positions against five forced tokens; a budget below the floor cannot be met by depth:

    >>> profile = ms.depth.Profile(a0=0.08, r0=0.02, a1=0.01, r1=0.3)
    >>> print(profile.harm(20, prefill=5))
    P(harm) = 0.0351954   proven [0.0351954, 0.0351954]   because: sampling, judge,
        lumping, model, truncation, rounding not assessed
    >>> profile.needed_depth(0.05, prefill=5)
    (16, '')
    >>> profile.needed_depth(0.03)
    (None, 'impossible: even at unlimited depth harm stays above the floor 0.0323, the
        budget is 0.03')
    """

    a0: float
    r0: float
    a1: float
    r1: float
    intervals: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    level: float = 1.0

    def __post_init__(self):
        for name in HAZARDS:
            object.__setattr__(self, name, float(unit(getattr(self, name), name)))
        for a, r in (("a0", "r0"), ("a1", "r1")):
            if getattr(self, a) + getattr(self, r) > 1 + 1e-12:
                raise InputError(
                    f"{a} + {r} is {getattr(self, a) + getattr(self, r):.17g}.",
                    cause="Harm and refusal at one position exclude each other.",
                    next="Give hazards that sum to at most 1.",
                )
        if not 0 < self.level <= 1:
            raise InputError(f"level is {self.level}.", cause="A level is a probability.", next="Pass 0 < level <= 1.")
        object.__setattr__(self, "intervals", {k: interval_of(self, k, v, HAZARDS) for k, v in self.intervals.items()})

    @property
    def f0(self) -> float:
        """Harm from an unaligned position on, if every later one is unaligned."""
        return _ratio(self.a0, self.r0)

    @property
    def f1(self) -> float:
        """The floor: harm if every position is aligned."""
        return _ratio(self.a1, self.r1)

    @property
    def c1(self) -> float:
        """Probability of passing an aligned position with neither harm nor refusal."""
        return max(1 - self.a1 - self.r1, 0.0)

    def harm(self, depth: ArrayLike, prefill: ArrayLike = 0, *, attack: AttackLaw | None = None) -> Bound:
        """Probability of harm h(k; d), or its mean over the law of the attack.

        Parameters
        ----------
        depth : int or array
            Trained depth d: number of aligned positions at the start of the answer.
        prefill : int or array
            Number k of forced tokens, broadcast against `depth`.
        attack : AttackLaw, optional
            Law of the number of forced tokens, beyond `prefill` where that is given too: ``E h(k + K; d)``.

        Returns
        -------
        Bound
            Of the broadcast shape. With an attack it is exact, whatever its tail: ``f1 + (f0 - f1) G(d - k)`` with
            ``G(d) = E[c1^max(d - K, 0)]``.
        """
        d, k = np.broadcast_arrays(whole(depth, "depth"), whole(prefill, "prefill"))
        left = np.maximum(d - k, 0)
        ends = [
            _closed(*hazards, left, attack)
            for hazards in (self._hazards, self._corner(harmful=False), self._corner(harmful=True))
        ]
        value, lower, upper = ends[0], np.minimum(*ends[:2]), np.maximum(ends[0], ends[2])
        reasons = {"sampling" if self.level < 1 else "model": (upper - lower) / 2} if self.intervals else {}
        if value.ndim == 0:
            value, lower, upper = float(value), float(lower), float(upper)
        return Bound(value, lower, upper, self.level, reasons, None, {"name": "P(harm)", "method": "closed form"})

    def floor(self) -> Bound:
        """The limit of unlimited depth, with its interval."""
        ends = [_limit(*self._corner(harmful=harmful)) for harmful in (False, True)]
        value = _limit(*self._hazards)
        reasons = {"sampling" if self.level < 1 else "model": (ends[1] - ends[0]) / 2} if self.intervals else {}
        return Bound(value, min(ends[0], value), max(ends[1], value), self.level, reasons, None, {"name": "floor"})

    @property
    def _hazards(self) -> tuple[float, float, float, float]:
        return self.a0, self.r0, self.a1, self.r1

    def _corner(self, harmful: bool) -> tuple[float, float, float, float]:
        """The hazards in the box with the most, or the least, harm."""
        ends = []
        for a, r in (("a0", "r0"), ("a1", "r1")):
            low_a, high_a = self.intervals.get(a, (getattr(self, a),) * 2)
            low_r, high_r = self.intervals.get(r, (getattr(self, r),) * 2)
            ends += [min(high_a, 1 - low_r), low_r] if harmful else [low_a, min(high_r, 1 - low_a)]
        return ends[0], ends[1], ends[2], ends[3]

    def needed_depth(self, eps: float, prefill: int = 0, side: str = "upper") -> tuple[int | None, str]:
        """Smallest trained depth d with h(prefill; d) <= eps.

        Parameters
        ----------
        eps : float
            Harm budget.
        prefill : int
            Number of forced tokens to withstand.
        side : {"upper", "value", "lower"}
            Which end of h must stay within the budget.

        Returns
        -------
        depth : int or None
            ``prefill + ceil(ln((f0 - f1) / (eps - f1)) / ln(1 / c1))``, 0 where f0 is within the budget already; None
            where it is impossible.
        reason : str
            Why it is impossible; empty otherwise.
        """
        check_side(side)
        budget(eps)
        k = int(whole(prefill, "prefill"))
        a0, r0, a1, r1 = self._hazards if side == "value" else self._corner(harmful=side == "upper")
        f0, f1, c1 = _ratio(a0, r0), _ratio(a1, r1), max(1 - a1 - r1, 0.0)
        if within(f0, eps):
            return 0, ""
        if c1 == 1 or f1 >= f0:
            return None, f"impossible: alignment does not lower harm (aligned {f1:.3g}, unaligned {f0:.3g})"
        if eps < f1 or (eps == f1 and c1 > 0):
            return (
                None,
                f"impossible: even at unlimited depth harm stays above the floor {f1:.3g}, the budget is {eps:.3g}",
            )
        if c1 == 0:
            return k + 1, ""
        n = math.ceil(math.log((f0 - f1) / (eps - f1)) / -math.log1p(-(a1 + r1)))
        # The ceiling of a rounded logarithm may be one off.
        near = [m for m in (n - 1, n, n + 1) if m > 0 and within(_closed(a0, r0, a1, r1, np.array(m)), eps)]
        return k + (near[0] if near else n), ""

    def operational_depth(self, depth: int, eps: float, side: str = "upper") -> Reading:
        """Largest number of forced tokens that a model of trained depth `depth` withstands within the budget.

        Always less than the trained depth by a constant: the last aligned positions still have to be crossed.
        """
        d = int(whole(depth, "depth"))
        needed, _ = self.needed_depth(eps, side=side)
        if needed == 0:
            return Reading(d, crossed=False)
        return Reading(None if needed is None or needed > d else d - needed, crossed=True)

    def optimal_depth(self, price: float = 0.0, *, prefill: int = 0, attack: AttackLaw | None = None) -> Optimum:
        """Trained depth d with the least harm plus price.

        Parameters
        ----------
        price : float
            Cost of one aligned position in units of harm, not negative.
        prefill : int
            Number k of forced tokens.
        attack : AttackLaw, optional
            Law of the number of forced tokens, beyond `prefill`.

        Returns
        -------
        Optimum
            Without an attack the stationary point is ``k + ln((f0 - f1) ln(1/c1) / price) / ln(1/c1)``, and the whole
            depths on both its sides (and 0) are compared. Without a price more depth is always at least as good: there
            is no optimum, unless harm does not fall with depth (0) or one position decides (k + 1, or the longest
            attack + 1).

        Raises
        ------
        InputError
            If the price is negative.
        UntrustedError
            If the search would go beyond ten million positions.

        Notes
        -----
        Our own. With an attack the gain of one more position, ``(f0 - f1) (1 - c1) E[c1^(d - K); K <= d]``, may rise
        before it falls, so every depth at which the price alone does not exceed the best cost is compared.
        """
        from .optimal import of_profile

        return of_profile(self, price, int(whole(prefill, "prefill")), attack)


def _closed(
    a0: float, r0: float, a1: float, r1: float, left: NDArray, attack: AttackLaw | None = None
) -> NDArray[np.float64]:
    f0, f1, stop = _ratio(a0, r0), _ratio(a1, r1), min(a1 + r1, 1.0)
    if attack is not None:
        last = int(left.max(initial=0))
        attack = law_given(attack)
        keep = (attack.discount(1 - stop, last) + attack.survival(np.arange(last + 1)))[left]
    else:
        # From a table where depths repeat: an exponential costs more than a look-up.
        last = int(left.max(initial=0))
        steps, at = (np.arange(last + 1), left) if last < left.size else (left, ...)
        with np.errstate(divide="ignore", invalid="ignore", under="ignore"):
            keep = np.where(steps == 0, 1.0, np.exp(steps * np.log1p(-stop)))[at]
    # As a convex combination, so that rounding cannot leave [f1, f0].
    return np.clip(f1 * (1 - keep) + f0 * keep, min(f0, f1), max(f0, f1))


def _limit(a0: float, r0: float, a1: float, r1: float) -> float:
    return _ratio(a1, r1) if a1 + r1 > 0 else _ratio(a0, r0)


def _ratio(a: float, r: float) -> float:
    return a / (a + r) if a > 0 else 0.0


def interval_of(form: Any, name: str, ends: tuple[float, float], names: Sequence[str]) -> tuple[float, float]:
    """The interval of one of the numbers of a closed form, checked."""
    if name not in names:
        raise InputError(f"Unknown hazard {name!r}.", cause=f"Hazards are {', '.join(names)}.", next="Use one of them.")
    low, high = (float(x) for x in ends)
    if not 0 <= low <= getattr(form, name) <= high <= 1:
        raise InputError(
            f"The interval [{low}, {high}] does not contain {name} = {getattr(form, name)}.",
            cause="An interval belongs to the hazard that it is named after.",
            next="Pass (lower, upper) with 0 <= lower <= hazard <= upper <= 1.",
        )
    return low, high
