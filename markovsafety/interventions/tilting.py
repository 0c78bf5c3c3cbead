"""A tilt of the logits as an operator on a chain whose states are tokens.

Where the state after a transition says which token was said, adding a_i(v) to the logits of answer token i is an
exponential tilt of row by row,

    P'_i(s, t) = P_i(s, t) e^{a_i(v(t))} / sum over u of P_i(s, u) e^{a_i(v(u))},

so that what a debiased model does follows from the plain model's chain. The row belongs to the prompt: the normaliser
is not linear, so a chain pooled over prompts must not be tilted; tilt each prompt's chain, and average afterwards.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import scipy.sparse as sp
from numpy.typing import ArrayLike, NDArray

from ..chains import Chain
from ..errors import InputError
from ..hitting import hitting_probability

__all__ = ["tilted_chain", "tilted_hitting"]


def tilted_chain(chain: Chain, tilt: ArrayLike, tokens: Sequence[int] | NDArray) -> Chain:
    """A layered chain whose first layers are tilted.

    Parameters
    ----------
    chain : Chain
        Layered; layer i is the step that says answer token i.
    tilt : float array, shape (length, vocab)
        Added to the logits of the first `length` tokens, nats; `BiasTable.tilt` makes it. It may be longer than the
        chain.
    tokens : int array, shape (states,)
        The token that was said on the way into each state; -1 for one that no token leads to (the start).

    Returns
    -------
    Chain

    Raises
    ------
    InputError
        The chain is not layered (see `tilted_hitting`), or tokens do not fit it.

    Examples
    --------
    >>> P = np.array([[0, 0.5, 0.4, 0.1], [0, 0.2, 0.7, 0.1], [0, 0, 0, 0], [0, 0, 0, 0]])
    >>> chain = ms.Chain.layered([P] * 3, outcomes={"harm": 2, "refusal": 3}, start=0)
    >>> tilt = np.log([[1, 1, 1, 10]])  # the odds of token 3 grow tenfold in the first step
    >>> tilted = ms.interventions.tilted_chain(chain, tilt, tokens=[-1, 1, 2, 3])
    >>> tilted.layers[0].toarray()[0].round(3), tilted.layers[1].toarray()[1].round(3)
    (array([0.   , 0.263, 0.211, 0.526]), array([0. , 0.2, 0.7, 0.1]))
    >>> print(ms.hitting_probability(chain, "harm").at_start)
    P(harm) = 0.82   proven [0.82, 0.82]   because: rounding ...; sampling, judge, lumping, model,
        truncation not assessed
    >>> print(ms.hitting_probability(tilted, "harm").at_start)
    P(harm) = 0.431579   proven [0.431579, 0.431579]   because: rounding ...; sampling, judge, lumping, model,
        truncation not assessed
    """
    if not chain.is_layered:
        raise InputError(
            "a homogeneous chain has no first steps to tilt",
            cause="the tilt ends after some tokens, the chain has the same rows at every step",
            next="use tilted_hitting, or give Chain.layered",
        )
    shift, said = _fitting(chain, tilt, tokens)
    layers = [_tilted(P, shift[i][said], chain) if i < len(shift) else P for i, P in enumerate(chain.layers)]
    return Chain.layered(layers, dict(chain.outcomes), chain.start, chain.states)


def tilted_hitting(chain: Chain, target: Any, tilt: ArrayLike, tokens: Sequence[int] | NDArray) -> NDArray[np.float64]:
    """Hitting probabilities under a tilt of the first steps.

    Parameters
    ----------
    chain, tilt, tokens
        As in `tilted_chain`; the chain may be homogeneous: its first steps are tilted, the others are as they were.
    target : outcome, label or index

    Returns
    -------
    float64 array, shape (states,)
        From every state, before the first answer token.

    Notes
    -----
    With h the plain hitting probabilities, v_L = h and v_i = P'_i v_{i+1} with v = 1 on the target: nothing is solved
    anew, and no rollout is needed.

    Examples
    --------
    The states are what was said last: nothing, a word, harm, a refusal. The odds of a refusal grow tenfold in the first
    step, and the steps behind it are as they were.

    >>> P = [[0, 0.5, 0.4, 0.1], [0, 0.2, 0.7, 0.1], [0, 0, 0, 0], [0, 0, 0, 0]]
    >>> chain = ms.Chain(P, outcomes={"harm": 2, "refusal": 3}, start=0)
    >>> ms.hitting_probability(chain, "harm").value.round(4)
    array([0.8375, 0.875 , 1.    , 0.    ])
    >>> ms.interventions.tilted_hitting(chain, "harm", tilt=np.log([[1, 1, 1, 10]]), tokens=[-1, 1, 2, 3]).round(4)
    array([0.4408, 0.4605, 1.    , 0.    ])
    """
    if chain.is_layered:
        return np.asarray(hitting_probability(tilted_chain(chain, tilt, tokens), target, certify=False).value)[0]
    shift, said = _fitting(chain, tilt, tokens)
    hit = chain.mask(target)
    value = np.asarray(hitting_probability(chain, target, certify=False).value, dtype=np.float64)
    for row in shift[::-1]:
        value = np.where(hit, 1.0, _tilted(chain.P, row[said], chain) @ value)
    return value


def _fitting(chain: Chain, tilt: ArrayLike, tokens: Any) -> tuple[NDArray, NDArray]:
    shift, said = np.atleast_2d(np.asarray(tilt, dtype=np.float64)), np.asarray(tokens, dtype=np.int64)
    if said.shape != (chain.n_states,) or shift.ndim != 2 or not np.isfinite(shift).all():
        raise InputError(
            f"the tilt has shape {shift.shape}, tokens have shape {said.shape}",
            cause=f"the chain has {chain.n_states} states, each with the token that leads to it",
            next="give a finite tilt (length, vocab), and one token per state, -1 where there is none",
        )
    if said.max(initial=-1) >= shift.shape[1]:
        raise InputError(
            f"a state belongs to token {int(said.max())}",
            cause=f"the tilt is of {shift.shape[1]} tokens",
            next="take the tilt and the chain of one model",
        )
    # Token -1 reads the last entry: 0, no tilt.
    return np.concatenate([shift, np.zeros((len(shift), 1))], axis=1), said


def _tilted(P: Any, shift: NDArray, chain: Chain) -> Any:
    """Rows times e^shift of the state they lead to, normalised; outcome rows as they were."""
    P = sp.csr_array(P)
    row = np.repeat(np.arange(P.shape[0]), np.diff(P.indptr))
    logs = np.where(P.data > 0, shift[P.indices], -np.inf)
    top = np.full(P.shape[0], -np.inf)
    np.maximum.at(top, row, logs)
    weight = P.data * np.exp(logs - np.where(np.isfinite(top), top, 0.0)[row])
    total = np.bincount(row, weight, P.shape[0])
    kept = chain.outcome_mask[row]
    data = np.where(kept, P.data, weight / np.where(total > 0, total, 1.0)[row])
    return sp.csr_array((data, P.indices, P.indptr), shape=P.shape)
