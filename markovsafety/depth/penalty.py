"""A penalty for not recovering: refusal that is trained at every position, and how long a prefix outlasts it.

arXiv 2603.04851 adds to the objective a penalty for tokens that do not recover, ``mu gamma^(t-1) (1 - P(recovery))`` at
position t = 1, 2, ... of prefixes that are given. Where harm is decided already only that term and the KL are left, and
the best recovery probability of a position is

    sigma(logit p_0 + mu gamma^(t-1)),

p_0 being the base model's. (The paper's body was read in summaries; what stands here was derived again. It takes for
granted that penalty and KL weigh a prefix alike. If KL is charged on the model's own answers and the penalty on given
prefixes, the exponent is multiplied by how much more likely the prefix is among the latter.)

That is a probability per token, not of the answer: with it, harm after n more tokens can still be ``(1 - eps)^n``.
`with_recovery` puts it into a chain, where h(k) says what it is worth.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import scipy.sparse as sp
from numpy.typing import ArrayLike, NDArray

from ..chains import Chain
from ..errors import InputError
from .profile import whole
from .width import unit

__all__ = ["attack_length", "recovery_law", "with_recovery"]


def _check(weight: float, discount: float) -> None:
    if not 0 <= weight < math.inf:
        raise InputError(f"weight is {weight!r}.", cause="A penalty is not negative.", next="Pass a number >= 0.")
    if not 0 < discount <= 1:
        raise InputError(
            f"discount is {discount!r}.", cause="Later positions weigh as much or less.", next="Pass 0 < discount <= 1."
        )


def recovery_law(base: ArrayLike, weight: float, discount: float, position: ArrayLike) -> Any:
    """Probability of recovering at a position, at the optimum beyond the harm horizon.

    Parameters
    ----------
    base : float or array
        The base model's probability p_0. With the smallest one and the last position this is the guarantee.
    weight : float
        mu, in nats.
    discount : float
        gamma in (0, 1].
    position : int or array
        t, counted from 1; broadcast against `base`.

    Returns
    -------
    float or array
        ``sigma(logit p_0 + mu gamma^(t - 1))``.

    Examples
    --------
    A base model that recovers once in a hundred tokens:

    >>> ms.depth.recovery_law(0.01, weight=6, discount=0.9, position=[1, 10, 20, 40]).round(3)
    array([0.803, 0.094, 0.022, 0.011])
    """
    from scipy.special import expit, logit

    _check(weight, discount)
    p, t = np.broadcast_arrays(unit(base, "base"), _positions(position))
    out = expit(logit(p) + weight * float(discount) ** (t - 1))
    return float(out) if out.ndim == 0 else out


def _positions(position: Any) -> NDArray:
    t = whole(position, "position")
    if (t < 1).any():
        raise InputError(f"position is {position!r}.", cause="Positions count from 1.", next="Pass whole numbers >= 1.")
    return t


def attack_length(base: float, weight: float, discount: float, recovery: float) -> tuple[float | None, str]:
    """Position at which the guaranteed probability of recovery has fallen to a given one.

    Parameters
    ----------
    base : float
        Smallest recovery probability of the base model.
    weight, discount : as in `recovery_law`
    recovery : float
        Recovery probability that is too little.

    Returns
    -------
    length : float or None
        ``1 + (ln mu - ln(logit recovery - logit base)) / ln(1 / gamma)``, a real number; the first whole position below
        `recovery` is the next one. 1 where even the first is not above it; None where no prefix is long enough.
    reason : str
        Why there is none; empty otherwise.

    Examples
    --------
    A prefix of four tokens is enough; of a base model that recovers by itself none is.

    >>> length, _ = ms.depth.attack_length(0.01, weight=6, discount=0.9, recovery=0.5)
    >>> print(f"{length:.2f}")
    3.53
    >>> ms.depth.attack_length(0.6, weight=6, discount=0.9, recovery=0.5)
    (None, 'impossible: the base model itself recovers with 0.6')
    """
    from scipy.special import logit

    _check(weight, discount)
    p, wanted = float(unit(base, "base")), float(unit(recovery, "recovery"))
    if p >= wanted:
        return None, f"impossible: the base model itself recovers with {p:.4g}"
    need = float(logit(wanted) - logit(p))
    if weight <= need:
        return 1.0, ""
    if discount == 1:
        return None, "impossible: without a discount no prefix is too long"
    return 1 + (math.log(weight) - math.log(need)) / -math.log(discount), ""


def with_recovery(
    chain: Chain, weight: float, discount: float, depth: int | None = None, *, to: Any = "refusal", rows: Any = None
) -> Chain:
    """A chain whose odds of refusing at position t are multiplied by ``e^(mu gamma^(t-1))``.

    Parameters
    ----------
    chain : Chain
        The base; homogeneous or layered.
    weight, discount : as in `recovery_law`
    depth : int, optional
        Positions that are trained: all layers, or a number that a homogeneous chain needs.
    to : target
        What recovery is.
    rows : target, optional
        States that are trained; all that are no outcome if not given.

    Returns
    -------
    Chain
        Layered, one layer per position. The rest of each row keeps its proportions.

    Raises
    ------
    InputError
        A number outside its range, or no last position.

    Notes
    -----
    A homogeneous chain ends after `depth` positions: what is open then is "truncated".

    Examples
    --------
    Harm after 0, 5, 10 and 20 tokens of an answer that was never aligned before:

    >>> trained = ms.depth.with_recovery(ms.toy.shallow(0), weight=6, discount=0.9, depth=40)
    >>> ms.hitting_probability(trained, "harm").value[[0, 5, 10, 20], 0].round(3)
    array([0.011, 0.181, 0.477, 0.643])
    """
    _check(weight, discount)
    if depth is None and not chain.is_layered:
        raise InputError(
            "A homogeneous chain has no last position.",
            cause="Recovery is discounted by position, so that every position has rows of its own.",
            next="Pass depth=, the number of positions.",
        )
    T = chain.n_layers if depth is None else int(whole(depth, "depth"))
    if T < 1 or (chain.is_layered and chain.n_layers < T):
        raise InputError(
            f"depth is {depth}.",
            cause=f"The chain has {chain.n_layers} layers." if chain.is_layered else "There is at least one position.",
            next="Pass a depth that there is.",
        )
    chosen, aim = (~chain.outcome_mask if rows is None else chain.mask(rows)), chain.mask(to)
    layers = list(chain.layers) if chain.is_layered else [chain.P] * T
    for t in range(T):
        layers[t] = _recovering(layers[t], weight * float(discount) ** t, chosen, aim)
    return Chain.layered(layers, chain.outcomes, chain.start, chain.states)


def _recovering(P: sp.csr_array, gain: float, chosen: NDArray, aim: NDArray) -> sp.csr_array:
    """Chosen rows with the odds of `aim` multiplied by e^gain."""
    n = len(aim)
    row = np.repeat(np.arange(n), np.diff(P.indptr))
    there = aim[P.indices]
    data = P.data * np.where(there, 1.0, np.where(chosen[row], math.exp(-gain), 1.0))
    data /= np.bincount(row, data, n)[row]
    return sp.csr_array((data, P.indices, P.indptr), shape=(n, n))
