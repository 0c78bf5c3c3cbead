"""The law of the attack: how many tokens of a compliant answer are forced.

Without an attack depth costs nothing or buys nothing, depending on the model of alignment; an interior optimum of depth
appears through the law of the number K of forced tokens, or through a price (see `Optimum`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..bound import Bound, encode
from ..errors import InputError
from .profile import whole
from .width import unit

__all__ = ["AttackLaw", "Optimum"]

LONGEST = 10**7  # no sum over k goes beyond this many terms


@dataclass(frozen=True)
class Optimum:
    """The depth with the least harm, or with the least harm plus price.

    Parameters
    ----------
    depth : int or None
        The whole number with the least cost; of several the smallest. None where there is none.
    harm : float
        Expected harm there; without an optimum its greatest lower bound, which no depth attains.
    cost : float
        Harm plus price per position times depth; the harm itself without a price.
    continuous : float or None
        The stationary point of the same cost over real depths by formula; None where no formula is known, or it has no
        stationary point. The optimum lies next to it, on the one or the other side: rounding it is not enough.
    reason : str
        Why there is no optimum; empty otherwise.

    Examples
    --------
    More depth is always better, unless every aligned position has a price:

    >>> profile = ms.depth.Profile(a0=0.08, r0=0.02, a1=0.01, r1=0.3)
    >>> profile.optimal_depth(prefill=5).reason
    'without a price more depth is always at least as good'
    >>> profile.optimal_depth(price=0.002, prefill=5)
    Optimum(depth=18, harm=0.038..., cost=0.074..., continuous=18.3..., reason='')
    """

    depth: int | None
    harm: float
    cost: float
    continuous: float | None = None
    reason: str = ""

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {name: encode(getattr(self, name)) for name in ("depth", "harm", "cost", "continuous", "reason")}


@dataclass(frozen=True, eq=False)
class AttackLaw:
    """Law of the number K of forced tokens: a finite part, and beyond it a geometric tail.

    Parameters
    ----------
    pmf : array, shape (n,)
        P(K = k) for k = 0 .. n - 1.
    tail : float
        P(K >= n); with the pmf it sums to 1.
    p : float
        Given K >= n, K - n is geometric: ``P(K = n + i) = tail p (1 - p)^i``. In (0, 1]; not read without a tail.
    name : str
        How it is called when printed.

    Raises
    ------
    InputError
        If these are no probabilities, or do not sum to 1 within 1e-9.

    Notes
    -----
    Our own. The geometric law is an attacker who goes on after every token with probability 1 - p.

    Examples
    --------
    An attacker who goes on after every forced token with probability 0.8, against a model aligned over ten positions:

    >>> law = ms.depth.AttackLaw.geometric(0.2)
    >>> print(law, law.survival([0, 5, 10]).round(3))
    AttackLaw(geometric(0.2), mean 4) [1.    0.328 0.107]
    >>> print(law.average(lambda k: ms.toy.prefilled_harm(10, k)))
    mean over the attack = 0.194552   proven [0.194552, 0.194552]   because: truncation
        ...e-1...; sampling, judge, lumping, model, rounding not assessed
    """

    pmf: Any
    tail: float = 0.0
    p: float = 1.0
    name: str = "attack"

    def __post_init__(self):
        pmf = np.array(unit(np.atleast_1d(np.asarray(self.pmf, dtype=np.float64)), "P(K = k)"))
        tail, p = float(unit(self.tail, "tail")), float(unit(self.p, "p"))
        if pmf.ndim != 1:
            raise InputError(
                f"pmf has shape {pmf.shape}.", cause="It has one number per k.", next="Pass a flat sequence."
            )
        if abs(pmf.sum() + tail - 1) > 1e-9:
            raise InputError(
                f"The law sums to {pmf.sum() + tail:.12g}.",
                cause="Some number of tokens is forced with certainty, be it 0.",
                next="Pass probabilities that sum to 1, or AttackLaw.of({k: weight}), which divides.",
            )
        if tail > 0 and p == 0:
            raise InputError(
                "p is 0.", cause="A geometric tail with p = 0 never ends.", next="Pass 0 < p <= 1, or no tail."
            )
        pmf.flags.writeable = False
        for name, value in (("pmf", pmf), ("tail", tail), ("p", p)):
            object.__setattr__(self, name, value)

    @classmethod
    def fixed(cls, k: int) -> AttackLaw:
        """Exactly k tokens."""
        n = int(whole(k, "k"))
        return cls(np.r_[np.zeros(n), 1.0], name=f"{n} forced")

    @classmethod
    def geometric(cls, p: float) -> AttackLaw:
        """``P(K = k) = p (1 - p)^k`` for all k >= 0; the mean is (1 - p) / p."""
        return cls(np.zeros(0), 1.0, p, f"geometric({float(unit(p, 'p')):g})")

    @classmethod
    def of(cls, weights: Mapping[int, float]) -> AttackLaw:
        """A finite law from weights that are not negative, divided by their sum."""
        ks = whole(list(weights), "k")
        w = np.asarray(list(weights.values()), dtype=np.float64)
        if not len(w) or not np.isfinite(w).all() or (w < 0).any() or not w.sum() > 0:
            raise InputError(
                f"The weights are {dict(weights)!r}.",
                cause="A law needs finite weights, none negative, not all zero.",
                next="Pass for instance {0: 0.7, 5: 0.2, 20: 0.1}.",
            )
        return cls(np.bincount(ks, w / w.sum()), name=f"{len(w)} depths")

    @property
    def n(self) -> int:
        """Where the tail begins."""
        return len(self.pmf)

    @property
    def mean(self) -> float:
        """E[K]."""
        return float(self.pmf @ np.arange(self.n)) + (self.tail * (self.n + (1 - self.p) / self.p) if self.tail else 0)

    def probability(self, k: ArrayLike) -> NDArray[np.float64]:
        """P(K = k), of the shape of k."""
        k = whole(k, "k")
        inside = np.append(self.pmf, 0.0)[np.minimum(k, self.n)]
        with np.errstate(divide="ignore", invalid="ignore", under="ignore"):
            beyond = self.tail * self.p * np.power(1 - self.p, np.maximum(k - self.n, 0))
        return np.where(k < self.n, inside, beyond)

    def survival(self, k: ArrayLike) -> NDArray[np.float64]:
        """P(K >= k), of the shape of k; summed from the far end, so that it is exact where it is small."""
        k = whole(k, "k")
        inside = np.append(np.cumsum(self.pmf[::-1])[::-1] + self.tail, self.tail)[np.minimum(k, self.n)]
        with np.errstate(under="ignore"):
            beyond = self.tail * np.power(1 - self.p, np.maximum(k - self.n, 0))
        return np.minimum(np.where(k < self.n, inside, beyond), 1.0)

    def average(self, f: Callable[[NDArray], ArrayLike] | ArrayLike, *, tolerance: float = 1e-15) -> Bound:
        """Expectation of f(K), for an f with values in [0, 1].

        Parameters
        ----------
        f : callable, or array of shape (m, ...)
            Value for each k; a callable takes an int array of shape (m,) and returns shape (m, ...). An array says
            nothing of k >= m: there f may be anything in [0, 1].
        tolerance : float
            A callable is summed until no more than this much mass remains.

        Returns
        -------
        Bound
            Of the shape of f without its first axis; level 1. What remains is bounded by [0, 1] and is the reason
            `truncation`; the value takes f as its last known value there. ``info["remaining"]`` is that mass.

        Raises
        ------
        InputError
            If f leaves [0, 1] or is empty.
        """
        m = self._reach(tolerance) if callable(f) else len(np.atleast_1d(np.asarray(f)))
        k = np.arange(max(m, 1))
        values = unit(np.asarray(f(k) if callable(f) else np.atleast_1d(np.asarray(f))), "f")
        if values.ndim == 0 or len(values) != len(k):
            raise InputError(
                f"f has shape {values.shape} for {len(k)} numbers of tokens.",
                cause="It has one value for each k, along its first axis.",
                next="Return an array whose first axis is that of k.",
            )
        known, left = np.tensordot(self.probability(k), values, 1), float(self.survival(len(k)))
        value = np.clip(known + left * values[-1], 0.0, 1.0)
        lower, upper = np.minimum(known, value), np.clip(np.maximum(known + left, value), 0.0, 1.0)
        info = {"name": "mean over the attack", "remaining": left, "method": f"sum over {len(k)} numbers of tokens"}
        return Bound(value, lower, upper, 1.0, {"truncation": (upper - lower) / 2}, None, info)

    def _reach(self, tolerance: float) -> int:
        """Terms after which at most `tolerance` of the mass remains, as far as that is within `LONGEST`."""
        if self.tail <= tolerance:
            return self.n
        if self.p == 1:
            return self.n + 1
        terms = np.ceil(np.log(tolerance / self.tail) / np.log1p(-self.p)) if tolerance > 0 else LONGEST
        return self.n + int(min(max(terms, 1), LONGEST))

    def discount(self, c: float, last: int) -> NDArray[np.float64]:
        """``g(d) = E[c^(d - K); K < d]`` for d = 0 .. last: the chance that alignment d tokens deep is still ahead of
        the attack, and reached.

        Parameters
        ----------
        c : float
            Probability of passing one position.
        last : int

        Returns
        -------
        array, shape (last + 1,)
            By the recursion ``g(d + 1) = c (g(d) + P(K = d))``, g(0) = 0, whose terms are all positive.
        """
        from scipy.signal import lfilter

        c, last = float(unit(c, "c")), int(whole(last, "last"))
        arrived = self.probability(np.arange(max(last, 1)))
        return np.append(0.0, np.asarray(lfilter([c], [1.0, -c], arrived)))[: last + 1]

    def exact_discount(self, c: Fraction, depths: list[int]) -> list[Fraction]:
        """g at rising depths in rational arithmetic, for comparisons that rounding must not decide."""
        law, out, g, at = self._exact(max(depths, default=0)), [], Fraction(0), 0
        for d in depths:
            while at < d:
                g, at = c * (g + law[at]), at + 1
            out.append(g)
        return out

    def exact_survival(self, depths: list[int]) -> list[Fraction]:
        """P(K >= d) at rising depths, in the same arithmetic."""
        law, out, left, at = self._exact(max(depths, default=0)), [], Fraction(1), 0
        for d in depths:
            while at < d:
                left, at = left - law[at], at + 1
            out.append(left)
        return out

    def _exact(self, n: int) -> list[Fraction]:
        """P(K = k) for k < n as rationals that sum to 1 with the rest; the pmf as given takes what floats left over."""
        law = [Fraction(float(x)) for x in self.pmf]
        left = Fraction(self.tail) if self.tail else Fraction(0)
        total = sum(law, Fraction(0)) + left
        law, left, p = [x / total for x in law], left / total, Fraction(self.p)
        while len(law) < n:
            law.append(left * p)
            left -= law[-1]
        return law

    def __repr__(self) -> str:
        return f"AttackLaw({self.name}, mean {self.mean:.3g})"


def law_given(attack: Any) -> AttackLaw:
    """`attack`, checked to be an `AttackLaw`."""
    if not isinstance(attack, AttackLaw):
        raise InputError(
            f"The attack is {attack!r}.",
            cause="It is a law of the number of forced tokens.",
            next="Pass AttackLaw.fixed(k), AttackLaw.geometric(p) or AttackLaw.of({k: weight}).",
        )
    return attack
