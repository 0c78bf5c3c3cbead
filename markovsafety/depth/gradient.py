"""Why alignment is shallow: how much of harm is decided at each depth, and how much of the gradient arrives there.

Let every depth have logits of its own, z_t(s, j) for the step from state s to j. Then

    d h_0 / d z_t(s, j) = pi_t(s) P_t(s, j) (h_(t+1)(j) - h_t(s)),

pi_t(s) being the probability of coming to s in t steps. The last factor says what a token decides; the first dies with
depth, the faster the better the early tokens are aligned already. The sum of the squares of all gradients at depth t
is at most the harm information ``I_t = E Var(h_(t+1) | X_t)``, and all I_t sum to ``h_0 (1 - h_0)`` (arXiv 2603.04851
has this for score functions in general; the form for logits by depth, and by a law of forced tokens, is our own).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from ..brief import brief
from ..chains import Chain
from ..errors import InputError
from ..evidence.branch import branch_exact
from ..hitting import hitting_probability
from ..hitting.core import walk, without_start
from .profile import whole
from .spending import DEPTHS

__all__ = ["HarmGradient", "harm_gradient", "harm_information"]


@dataclass(frozen=True, eq=False)
class HarmGradient:
    """Gradient of harm in the logits of every depth.

    Parameters
    ----------
    layers : tuple of csr arrays, shape (n, n)
        One per depth; entries on the support of the chain.
    visits : array, shape (T, n)
        Probability of being in a state at a depth (answers forced to that depth included).
    norm : array, shape (T,)
        Root of the sum of squares at each depth.
    harm : float
        What it is the gradient of: harm, averaged over the law of forced tokens.

    Examples
    --------
    Answers that are forced five tokens deep bring gradient to where hardly any other arrives:

    >>> found = ms.depth.harm_gradient(ms.toy.deep(10), 8, prefill={0: 0.5, 5: 0.5})
    >>> print(type(found).__name__, f"of harm {found.harm:.3f}:", found.norm.round(3))
    HarmGradient of harm 0.102: [0.009 0.008 0.006 0.005 0.005 0.034 0.033 0.032]
    """

    layers: tuple[sp.csr_array, ...]
    visits: NDArray
    norm: NDArray
    harm: float

    __repr__ = brief


def harm_information(chain: Chain, depth: int | None = None, *, target: Any = "harm") -> NDArray:
    """How much of the outcome each token decides: ``I_t = E Var(h(X_(t+1)) | X_t)``.

    Parameters
    ----------
    chain : Chain
        With a start law.
    depth : int, optional
        Number of tokens; all layers, or 32 tokens of a homogeneous chain, if not given.
    target : as in `hitting_probability`

    Returns
    -------
    array, shape (depth,)
        In probability squared. From a single start state, over the whole answer, they sum to ``h_0 (1 - h_0)``; a start
        law adds the variance between its states.

    Notes
    -----
    `markovsafety.evidence.branch_exact` computes it, with the branch correlations that are its cumulative shares.

    Examples
    --------
    What each token decides; over the whole answer they sum to ``h (1 - h)``:

    >>> decided = ms.depth.harm_information(ms.toy.shallow(3), 64)
    >>> decided[:6].round(4)
    array([0.0383, 0.0481, 0.0646, 0.0053, 0.0047, 0.0043])
    >>> h = ms.toy.prefilled_harm(3)
    >>> print(f"{decided.sum():.4f} = {h * (1 - h):.4f}")
    0.2035 = 0.2035
    """
    T = (
        chain.n_layers
        if depth is None and chain.is_layered
        else int(whole(DEPTHS if depth is None else depth, "depth"))
    )
    found = branch_exact(chain, T, 1, target=target).information
    return np.zeros(0) if found is None else found


def harm_gradient(
    chain: Chain, depth: int | None = None, *, prefill: Mapping[int, float] | None = None, target: Any = "harm"
) -> HarmGradient:
    """Gradient of the probability of harm in the logits of every depth.

    Parameters
    ----------
    chain : Chain
        Layered, or homogeneous: then unrolled to `depth` positions whose logits are taken as separate.
    depth : int, optional
        Number of positions; all layers, or 32 of a homogeneous chain, if not given.
    prefill : dict of int to float, optional
        Law of the number of forced tokens, e.g. ``{0: 0.5, 5: 0.5}``; without it nothing is forced. The state after k
        tokens has the law ``chain.entry[k]`` where there is one, else that of the chain given no outcome in k steps.
    target : as in `hitting_probability`

    Returns
    -------
    HarmGradient

    Raises
    ------
    InputError
        No start law; a law of forced tokens that does not sum to one or reaches beyond the last position.

    Examples
    --------
    At every fifth of twenty aligned positions: the fewer answers come there, the less there is to learn.

    >>> ms.depth.harm_gradient(ms.toy.deep(20), 16).norm[::5].round(5)
    array([0.01378, 0.00224, 0.00046, 0.00023])
    """
    if chain.start is None:
        raise without_start("A gradient")
    w = walk(chain, target)
    T = (
        chain.n_layers
        if depth is None and chain.is_layered
        else int(whole(DEPTHS if depth is None else depth, "depth"))
    )
    if chain.is_layered and chain.n_layers < T:
        raise InputError(
            f"Depth {T} lies behind the last of {chain.n_layers} layers.",
            cause="A layered chain ends there.",
            next=f"Ask for depths up to {chain.n_layers}.",
        )
    forced = _forced({0: 1.0} if prefill is None else prefill, T)
    h = np.asarray(hitting_probability(chain, target, certify=False).value)
    starts = {k: _law_after(chain, k) for k in forced}
    harm = sum(forced[k] * float(law @ (h[k] if chain.is_layered else h)) for k, law in starts.items())
    pi, layers = np.zeros(chain.n_states), []
    often = np.zeros((T, chain.n_states))
    for t in range(T):
        now, ahead = (h[t], h[t + 1]) if chain.is_layered else (h, h)
        if t in forced:
            pi = pi + forced[t] * np.where(w.moving, starts[t], 0.0)
        often[t] = pi
        P = chain.layers[t if chain.is_layered else 0]
        row = np.repeat(np.arange(chain.n_states), np.diff(P.indptr))
        data = pi[row] * P.data * (ahead[P.indices] - now[row])
        layers.append(sp.csr_array((data, P.indices, P.indptr), shape=P.shape))
        pi = np.where(w.moving, P.T @ pi, 0.0)
    norm = np.array([math.sqrt(float(G.data @ G.data)) for G in layers])
    return HarmGradient(tuple(layers), often, norm, harm)


def _forced(prefill: Mapping[int, float], T: int) -> dict[int, float]:
    law = dict(zip(whole(list(prefill), "prefill").tolist(), map(float, prefill.values())))
    fine = all(0 <= p <= 1 for p in law.values()) and abs(math.fsum(law.values()) - 1) <= 1e-9
    if not fine or not all(0 <= k < max(T, 1) for k in law):
        raise InputError(
            f"The law of forced tokens is {dict(prefill)!r}.",
            cause=f"It gives numbers of tokens below the {T} positions probabilities that sum to one.",
            next="Pass a dict such as {0: 0.5, 5: 0.5}, or ask for more depth.",
        )
    return {k: p for k, p in law.items() if p > 0}


def _law_after(chain: Chain, k: int) -> NDArray:
    """State law after k forced tokens."""
    if k == 0 or k in chain.entry:
        return np.asarray(chain.start if k == 0 else chain.entry[k])
    v = np.asarray(chain.start)
    for t in range(k):
        v = np.where(
            chain.outcome_mask, 0.0, chain.layers[t if chain.is_layered else 0].T @ np.where(chain.outcome_mask, 0.0, v)
        )
    if v.sum() <= 0:
        raise InputError(
            f"No answer is open after {k} tokens.",
            cause="Every one has met an outcome.",
            next="Force fewer tokens, or give the chain an entry law for this depth.",
        )
    return v / v.sum()
