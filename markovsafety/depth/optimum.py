"""The cheapest aligned chain: what harm costs in KL, and that the optimum is deep.

Minimise ``E[harm] + KL(new || old) / strength`` over all laws of answers, the objective of alignment by reinforcement
with a KL penalty (beta = 1 / strength). The optimum weighs every answer by ``e^(-strength harm)``. It is again a Markov
chain, a Doob transform with ``M = 1 - h + e^(-strength) h``, h the probability of harm:

    P*(s, s') = P(s, s') M(s') / M(s),      odds(h*) = e^-strength odds(h)   at every prefix with h < 1,

and what it costs in total, ``KL = kl(h* || h)`` between two coins, is what any chain with that much harm costs at
least. So the optimum shifts the log odds of harm by one constant at all depths: shallow alignment is no property of the
objective, but of the way there (`training_path`). Where harm is already certain nothing changes; a strength without end
conditions on no harm, and a negative one is the cheapest attack.

Exponential tilting and the Doob transform are classical; that the odds shift is flat over depth is our own statement,
against the reading of arXiv 2603.04851 that standard objectives cannot be deep however well they are optimised.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from ..chains import Chain
from ..errors import InputError
from ..hitting import committor, hitting_probability
from ..hitting.core import walk, without_start
from .profile import budget

__all__ = ["both_sides", "needed_strength", "optimum", "stopped", "tilted"]


def stopped(chain: Chain, target: Any) -> Chain:
    """The chain with absorbing target states: what comes after harm is never read."""
    hit = walk(chain, target).hit
    stay = sp.diags_array(hit.astype(np.float64)).tocsr()
    go = sp.diags_array((~hit).astype(np.float64)).tocsr()
    if all((abs(stay @ P - stay)).sum() == 0 for P in chain.layers):
        return chain
    return like(chain, [sp.csr_array(go @ P + stay) for P in chain.layers])


def like(chain: Chain, layers: list[Any]) -> Chain:
    """A chain with other rows and the same names, start and entry laws."""
    P = layers if chain.is_layered else layers[0]
    return Chain(P, chain.outcomes, chain.start, chain.states, entry=dict(chain.entry), n_layers=chain.n_layers)


def both_sides(chain: Chain, target: Any = "harm") -> tuple[NDArray, NDArray]:
    """Probability of harm and of no harm, from every state.

    Returns
    -------
    h, g : array, shape (n,); layered (L + 1, n)
        ``h + g = 1``; g is computed by itself, so that it has full relative accuracy where h is near 1.
    """
    h = np.asarray(hitting_probability(chain, target, certify=False).value)
    w = walk(chain, target)
    if chain.is_layered:
        g = np.empty_like(h)
        g[-1] = np.where(w.hit, 0.0, 1 - w.last(1)[:, 0])
        for t in range(chain.n_layers - 1, -1, -1):
            g[t] = np.where(w.hit, 0.0, chain.layers[t] @ g[t + 1])
        return h, g
    never = (h == 0) & ~w.hit
    if not never.any():
        return h, np.zeros_like(h)
    return h, np.asarray(committor(chain, w.hit, never, certify=False).value)


def tilted(h: NDArray, g: NDArray, strength: float) -> tuple[NDArray, NDArray]:
    """h and 1 - h with the odds multiplied by e^-strength; certain harm stays certain."""
    up, down = _weights(strength)
    M = down * h + up * g
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(M > 0, down * h / M, h), np.where(M > 0, up * g / M, g)


def _weights(strength: float) -> tuple[float, float]:
    """What an answer without harm and one with harm weigh, the larger of them being 1."""
    return math.exp(min(strength, 0.0)), math.exp(-max(strength, 0.0))


def check_strength(strength: Any) -> float:
    """`strength` as a float, infinite ones included."""
    try:
        value = float(strength)
    except (TypeError, ValueError):
        value = math.nan
    if math.isnan(value):
        raise InputError(
            f"strength is {strength!r}.",
            cause="It is what harm costs in nats of KL, 1 / beta.",
            next="Pass a number; inf conditions on no harm.",
        )
    return value


def optimum(chain: Chain, strength: float, *, target: Any = "harm") -> Chain:
    """The KL-regularised optimum of a chain.

    Parameters
    ----------
    chain : Chain
        Homogeneous or layered; the base model.
    strength : float
        Lambda = 1 / beta, in nats: what harm costs. inf conditions on no harm; negative: the cheapest attack.
    target : as in `hitting_probability`

    Returns
    -------
    Chain
        With ``odds(h*) = e^-strength odds(h)`` at every prefix; rows of the target, and of states from which harm (or,
        for an attack, no harm) is certain, are those of the base. Without evidence.

    Raises
    ------
    InputError
        If the strength is no number or the target is unknown.

    Notes
    -----
    The start law is the prompts' and does not change. Time spent in a state does not either: self-loops keep their
    probability. On a layered chain the optimum is one more layered chain, the weights M_t being those of each depth.

    Examples
    --------
    The log odds of harm fall by the strength in every state, whatever the chain:

    >>> base = ms.toy.shallow(3)
    >>> chains = base, ms.depth.optimum(base, strength=2.0)
    >>> h, new = (ms.hitting_probability(chain, "harm").value[:4] for chain in chains)
    >>> np.log(h / (1 - h) * (1 - new) / new).round(6)
    array([2., 2., 2., 2.])
    """
    strength = check_strength(strength)
    hit = walk(chain, target).hit
    h, g = both_sides(chain, target)
    up, down = _weights(strength)
    M = down * h + up * g
    if chain.is_layered:
        return like(chain, [_reweighed(P, M[t + 1], hit, keep=False) for t, P in enumerate(chain.layers)])
    return like(chain, [_reweighed(chain.P, M, hit, keep=True)])


def _reweighed(P: sp.csr_array, M: NDArray, hit: NDArray, keep: bool) -> sp.csr_array:
    """Rows times the weights of where they go, normalised; with `keep` their diagonals stay."""
    n = len(M)
    row = np.repeat(np.arange(n), np.diff(P.indptr))
    moves = ~hit[row] & ~((row == P.indices) & keep)
    sums = lambda x: np.bincount(row[moves], x[moves], n)  # noqa: E731
    weighed = P.data * M[P.indices]
    before, after = sums(P.data), sums(weighed)
    change = np.divide(before, after, out=np.zeros(n), where=after > 0)
    data = np.where(moves & (change[row] > 0), weighed * change[row], P.data)
    return sp.csr_array((data, P.indices, P.indptr), shape=(n, n))


def needed_strength(chain: Chain, harm: float, *, target: Any = "harm") -> tuple[float | None, str]:
    """The strength at which the optimum of a chain has a given probability of harm.

    Parameters
    ----------
    chain : Chain
        With a start law.
    harm : float
        Wanted, on average over the start law.
    target : as in `hitting_probability`

    Returns
    -------
    strength : float or None
        ``log odds(h) - log odds(harm)`` from a single start state; inf where harm is to be conditioned away; None where
        it is impossible.
    reason : str
        Why it is impossible; empty otherwise.

    Raises
    ------
    InputError
        No start law, or `harm` is no probability.

    Examples
    --------
    >>> chain = ms.toy.shallow(3)
    >>> strength, _ = ms.depth.needed_strength(chain, 0.01)
    >>> harm = ms.hitting_probability(ms.depth.optimum(chain, strength), "harm").at_start
    >>> print(f"strength {strength:.3f} leaves {harm.value:.4f}")
    strength 3.673 leaves 0.0100
    >>> ms.depth.needed_strength(ms.toy.leak(0.02, refuse=0.0, end=0), 0.1)
    (None, 'impossible: harm is certain already with probability 1')
    """
    harm = budget(harm)
    if chain.start is None:
        raise without_start("The harm of an optimum")
    h, g = both_sides(chain, target)
    first = (h[0], g[0]) if chain.is_layered else (h, g)
    on = chain.start > 0
    return _solve(chain.start[on], first[0][on], first[1][on], harm)


def _solve(law: NDArray, h: NDArray, g: NDArray, harm: float) -> tuple[float | None, str]:
    from scipy.optimize import brentq
    from scipy.special import expit

    sure, never = float(law[g == 0].sum()), float(law[h == 0].sum())
    if harm < sure * (1 - 1e-12):
        return None, f"impossible: harm is certain already with probability {sure:.6g}"
    if harm > 1 - never * (1 - 1e-12):
        return None, f"impossible: harm cannot be reached with probability {never:.6g}"
    open_ = (h > 0) & (g > 0)
    if not open_.any():
        return 0.0, ""
    if harm <= sure or harm >= 1 - never:
        return (math.inf if harm <= sure else -math.inf), ""
    at, share = np.log(h[open_]) - np.log(g[open_]), law[open_] / law[open_].sum()
    wanted = (harm - sure) / float(law[open_].sum())
    if len(at) == 1:
        return float(at[0] - (math.log(wanted) - math.log1p(-wanted))), ""
    # As log odds on either side, so that tiny harms are found to as many digits as large ones.
    gap = lambda s: math.log(share @ expit(at - s) / wanted) - math.log(share @ expit(s - at) / (1 - wanted))  # noqa: E731
    middle = math.log(wanted) - math.log1p(-wanted)
    low, high = at.min() - middle, at.max() - middle
    found: Any = low if gap(low) <= 0 else high if gap(high) >= 0 else brentq(gap, low, high, xtol=1e-14)
    return float(found), ""
