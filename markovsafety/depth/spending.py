"""What alignment spent and where: KL by depth, the shift of the odds of harm by depth, and how much was wasted.

Between two chains, before and after. The least KL that buys a given fall of harm is known (`optimum`), so what was
spent can be compared with it; and the optimum shifts the log odds of harm by the same amount at every depth, so the
slope of that shift says how shallow an alignment is. It has a sign, which KL has not: for the worse it is negative.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from ..brief import brief
from ..chains import Chain
from ..errors import InputError
from ..hitting import visits
from ..hitting.core import walk, without_start
from .optimum import _solve, both_sides, stopped, tilted
from .profile import whole

__all__ = ["Inefficiency", "KLProfile", "OddsShift", "alignment_inefficiency", "kl_profile", "laws", "odds_shift"]

DEPTHS = 32  # positions of a homogeneous chain that are shown unless more are asked for


@dataclass(frozen=True, eq=False)
class KLProfile:
    """KL divergence of one chain from another by depth.

    Parameters
    ----------
    steps : array, shape (T,)
        Nats spent at positions 0 .. T - 1, on prefixes of the chain after.
    beyond : float
        At all later positions of a homogeneous chain.

    Examples
    --------
    >>> before = ms.toy.shallow(5, aligned=(0.08, 0.02))  # as unaligned as its tail
    >>> spent = ms.depth.kl_profile(before, ms.toy.shallow(5))
    >>> print(type(spent).__name__, spent.steps[:7].round(3), f"{spent.total:.3f} nats")
    KLProfile [0.608 0.42  0.29  0.2   0.138 0.    0.   ] 1.655 nats
    """

    steps: NDArray
    beyond: float

    __repr__ = brief

    @property
    def total(self) -> float:
        """Over the whole answer."""
        return float(self.steps.sum()) + self.beyond


@dataclass(frozen=True, eq=False)
class OddsShift:
    """How far the log odds of harm fell, by depth.

    Parameters
    ----------
    depth : int array, shape (K,)
        Depths with a prefix that is not decided in both chains.
    shift : array, shape (K,)
        Mean over prefixes of ``log odds(h before) - log odds(h after)``; inf where harm became impossible.
    share : array, shape (K,)
        Probability that a prefix is undecided still.
    by_state : array, shape (n,); layered (L + 1, n)
        The shift at every state; 0 where both chains have decided alike.
    slope : float or None
        Of a straight line through the shift, per token: 0 at the optimum, negative for shallow alignment; None where
        the shift is infinite or seen at one depth only.

    Examples
    --------
    Five aligned positions, and less and less of a shift along them:

    >>> before = ms.toy.shallow(5, aligned=(0.08, 0.02))  # as unaligned as its tail
    >>> shift = ms.depth.odds_shift(before, ms.toy.shallow(5), 8)
    >>> print(type(shift).__name__, shift.shift[:5].round(2), f"slope {shift.slope:.2f}")
    OddsShift [3.1  2.73 2.31 1.8  1.14] slope -0.45
    """

    depth: NDArray
    shift: NDArray
    share: NDArray
    by_state: NDArray
    slope: float | None

    __repr__ = brief

    @property
    def spread(self) -> float:
        """Largest shift less the smallest."""
        return float(self.shift.max() - self.shift.min()) if np.isfinite(self.shift).all() else math.inf

    @property
    def half(self) -> int | None:
        """First depth with less than half the shift of the first: how deep the alignment reaches; None if none."""
        less = np.flatnonzero(self.shift < self.shift[0] / 2) if len(self.shift) and self.shift[0] > 0 else []
        return int(self.depth[less[0]]) if len(less) else None


@dataclass(frozen=True)
class Inefficiency:
    """What an alignment spent in KL, and what its effect on harm costs at least.

    Parameters
    ----------
    spent : float
        KL of the chain after from the chain before, nats.
    least : float
        KL of the cheapest chain with as much harm.
    ratio : float
        spent / least, at least 1; 1 where nothing was spent, inf where nothing was bought.
    before, after : float
        Probability of harm at the start.

    Examples
    --------
    The optimum spends the least that there is:

    >>> before = ms.toy.shallow(5, aligned=(0.08, 0.02))
    >>> found = ms.depth.alignment_inefficiency(before, ms.depth.optimum(before, 2.0))
    >>> print(type(found).__name__, f"{found.ratio:.3f}: {found.spent:.3f} of {found.least:.3f} nats")
    Inefficiency 1.000: 0.474 of 0.474 nats
    >>> print(f"harm from {found.before:.3f} to {found.after:.3f}")
    harm from 0.800 to 0.351
    """

    spent: float
    least: float
    ratio: float
    before: float
    after: float


def _pair(before: Chain, after: Chain, target: Any) -> tuple[Chain, Chain]:
    """Both chains stopped at the target, checked to be two versions of one thing."""
    before, after = stopped(before, target), stopped(after, target)
    same = before.n_states == after.n_states and before.n_layers == after.n_layers
    if not same or list(before.states) != list(after.states):
        raise InputError(
            "The two chains differ in more than their rows.",
            cause="Before and after share states and layers.",
            next="Build both on the same states, e.g. by estimate with one state map, or by `optimum`.",
        )
    for chain in (before, after):
        if chain.start is None:
            raise without_start("What an answer costs")
    if not np.allclose(before.start, after.start, rtol=0, atol=1e-9):
        raise InputError(
            "The two chains start differently.",
            cause="Alignment does not choose the prompts.",
            next="Use one start law.",
        )
    return before, after


def laws(chain: Chain, target: Any, depth: int) -> NDArray:
    """State laws of answers that have not met the target, at depths 0 .. depth, shape (depth + 1, n)."""
    moving = walk(chain, target).moving
    out = np.empty((depth + 1, chain.n_states))
    out[0] = np.where(moving, chain.start, 0.0)
    for t in range(depth):
        P = chain.layers[t if chain.is_layered else 0]
        out[t + 1] = np.where(moving, P.T @ out[t], 0.0)
    return out


def _row_kl(Q: sp.csr_array, P: sp.csr_array) -> NDArray:
    """KL(row of Q || row of P) by row."""
    from scipy.special import kl_div

    n = len(P.indptr) - 1
    row = np.repeat(np.arange(n), np.diff(Q.indptr))
    old = np.asarray(P[row, Q.indices]).ravel() if Q.nnz else np.zeros(0)
    mass = np.bincount(row, old, n)
    total = np.asarray(P.sum(axis=1)).ravel()
    # q log(q / p) - q + p has no negative terms; what P has elsewhere belongs to the sum as well.
    return np.bincount(row, kl_div(Q.data, old), n) + np.maximum(total - mass, 0.0)


def kl_profile(before: Chain, after: Chain, depth: int | None = None, *, target: Any = "harm") -> KLProfile:
    """KL divergence by depth, on answers of the chain after, until they meet the target.

    Parameters
    ----------
    before, after : Chain
        On the same states, with the same start law.
    depth : int, optional
        Positions of a homogeneous chain to tell apart (32 if not given); what comes later is summed.
    target : as in `hitting_probability`

    Returns
    -------
    KLProfile
        inf where the chain after does what the chain before cannot.

    Notes
    -----
    The depth profile of arXiv 2406.05946 (their section 2.2) takes prefixes of harmful answers instead; here they are
    the aligned chain's own, so that the sum is the KL of whole answers. To second order KL_t is
    ``strength^2 I_t / 2`` at the optimum, I_t the harm information (2603.04851 has the order); far from there it is
    not: late positions become unvisited.

    Examples
    --------
    An aligned beginning spends all of it there, the optimum little at every position:

    >>> before = ms.toy.shallow(5, aligned=(0.08, 0.02))  # as unaligned as its tail
    >>> for after in (ms.toy.shallow(5), ms.depth.optimum(before, 3.0)):
    ...     print(ms.depth.kl_profile(before, after, 7).steps.round(3))
    [0.608 0.42  0.29  0.2   0.138 0.    0.   ]
    [0.093 0.084 0.075 0.068 0.061 0.055 0.049]
    """
    before, after = _pair(before, after, target)
    T = after.n_layers if after.is_layered else int(whole(DEPTHS if depth is None else depth, "depth"))
    law = laws(after, target, max(T - 1, 0))
    rows = [_row_kl(Q, P) for Q, P in zip(after.layers, before.layers)]
    times = lambda p, x: float(p[p > 0] @ x[p > 0])  # noqa: E731
    steps = np.array([times(law[t], rows[t if after.is_layered else 0]) for t in range(T)])
    if after.is_layered:
        return KLProfile(steps, 0.0)
    costs = (rows[0] > 0) & walk(after, target).moving
    if not costs.any():
        return KLProfile(steps, 0.0)
    often = np.where(costs, np.asarray(visits(after).value), 0.0)
    total = times(often, rows[0])
    return KLProfile(steps, max(total - float(steps.sum()), 0.0) if math.isfinite(total) else total)


def odds_shift(
    before: Chain, after: Chain, depth: int | None = None, *, prefixes: str = "before", target: Any = "harm"
) -> OddsShift:
    """How far alignment shifted the log odds of harm, by depth.

    Parameters
    ----------
    before, after : Chain
        On the same states, with the same start law.
    depth : int, optional
        Last depth of a homogeneous chain (32 if not given).
    prefixes : {"before", "after"}
        Whose answers the prefixes are cut from.
    target : as in `hitting_probability`

    Returns
    -------
    OddsShift

    Raises
    ------
    InputError
        Chains that do not belong together, or a word or depth that does not exist.

    Notes
    -----
    Our own metric. At the optimum the shift is the strength at every prefix, so its slope is 0 whatever the chain.

    Examples
    --------
    An aligned beginning has less and less of a shift, the optimum the same at every depth:

    >>> before = ms.toy.shallow(5, aligned=(0.08, 0.02))  # as unaligned as its tail
    >>> for after in (ms.toy.shallow(5), ms.depth.optimum(before, 3.0)):
    ...     print(ms.depth.odds_shift(before, after, 4).shift.round(2))
    [3.1  2.73 2.31 1.8  1.14]
    [3. 3. 3. 3. 3.]
    """
    if prefixes not in ("before", "after"):
        raise InputError(f"prefixes is {prefixes!r}.", cause="Two chains answer.", next='Pass "before" or "after".')
    before, after = _pair(before, after, target)
    K = after.n_layers if after.is_layered else int(whole(DEPTHS if depth is None else depth, "depth"))
    sides = [both_sides(chain, target) for chain in (before, after)]
    by_state = _log_odds_fall(*sides[0], *sides[1])
    decided = np.logical_and(*((h == 0) | (g == 0) for h, g in sides)) & (sides[0][0] == sides[1][0])
    law = laws(before if prefixes == "before" else after, target, K)
    weight = np.where(decided if after.is_layered else decided[None], 0.0, law)
    share = weight.sum(axis=1)
    seen = np.flatnonzero(share > 0)
    shift = np.array([_mean(weight[k], by_state[k] if after.is_layered else by_state) for k in seen])
    slope = None
    if len(seen) > 1 and np.isfinite(shift).all():
        slope = float(np.polyfit(seen - seen.mean(), shift, 1)[0])
    return OddsShift(seen, shift, share[seen], by_state, slope)


def _mean(weight: NDArray, x: NDArray) -> float:
    on = weight > 0
    return float(weight[on] @ x[on]) / float(weight[on].sum())


def _log_odds_fall(h0: NDArray, g0: NDArray, h1: NDArray, g1: NDArray) -> NDArray:
    with np.errstate(divide="ignore", invalid="ignore"):
        fall = (np.log(h0) - np.log(g0)) - (np.log(h1) - np.log(g1))
    return np.where(np.isnan(fall), 0.0, fall)  # both decided alike


def alignment_inefficiency(before: Chain, after: Chain, *, target: Any = "harm") -> Inefficiency:
    """KL that an alignment spent over the least that its effect on harm costs.

    Parameters
    ----------
    before, after : Chain
        On the same states, with the same start law.
    target : as in `hitting_probability`

    Returns
    -------
    Inefficiency

    Notes
    -----
    Our own number. From a single start state the least is the KL of two coins, ``kl(h after || h before)``: no change
    of the answers' law moves the probability of an event for less (data processing). From a start law it is that of the
    optimum with the same mean.

    Examples
    --------
    >>> before = ms.toy.shallow(5, aligned=(0.08, 0.02))  # as unaligned as its tail
    >>> found = ms.depth.alignment_inefficiency(before, ms.toy.shallow(5))
    >>> print(f"{found.spent:.2f} nats, where {found.least:.2f} would do: {found.ratio:.1f} times as much")
    1.66 nats, where 0.97 would do: 1.7 times as much
    """
    spent = kl_profile(before, after, 0, target=target).total
    before, after = _pair(before, after, target)
    (h0, g0), (h1, _) = both_sides(before, target), both_sides(after, target)
    if before.is_layered:
        h0, g0, h1 = h0[0], g0[0], h1[0]
    law = np.asarray(before.start)
    was, now = float(law @ h0), float(law @ h1)
    least = _least(law, h0, g0, now) if math.isfinite(spent) else 0.0
    ratio = 1.0 if spent <= 1e-300 else math.inf if least <= 0 else max(spent / least, 1.0)
    return Inefficiency(spent, least, ratio if math.isfinite(spent) else math.inf, was, now)


def _least(law: NDArray, h: NDArray, g: NDArray, harm: float) -> float:
    from scipy.special import kl_div

    on = law > 0
    strength, _ = _solve(law[on], h[on], g[on], min(max(harm, 0.0), 1.0))
    if strength is None:
        return 0.0
    new = tilted(h, g, strength)
    return float(law @ (kl_div(new[0], h) + kl_div(new[1], g)))
