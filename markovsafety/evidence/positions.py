"""At which position of an answer the change between two chains happened."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..chains import Chain
from ..hitting import attribute, hitting_probability

__all__ = ["HORIZON", "by_position"]

HORIZON = 64
"""Positions of a chain without layers that are told one by one."""


def by_position(before: Chain, after: Chain, target: str = "harm", horizon: int = HORIZON) -> NDArray[np.float64]:
    """Which positions account for the change of the hitting probability at the start.

    Parameters
    ----------
    before, after : Chain
        On the same states, both with a start law.
    target : str
        An outcome of both.
    horizon : int
        Positions to tell apart where the chains have no layers.

    Returns
    -------
    array, shape (layers + 1,), without layers (at most horizon + 1,)
        Sums to the change. Entry t belongs to the states after t tokens; 0 holds the change of the start law as well,
        the last entry everything from there on.

    Notes
    -----
    `attribute` split by time instead of by state: with the law pi_t of the states after t tokens,
    ``h' - h = sum_t pi_t dP h' = sum_t pi'_t dP h``, and the mean of both is taken. A state that can no longer hit is
    an end, as there.
    """
    shares = attribute(before, after, target)
    if before.is_layered:
        return shares.sum(axis=1)
    h, g = (np.asarray(hitting_probability(c, target, certify=False).value) for c in (before, after))
    hit = np.zeros(len(h), dtype=bool)
    hit[np.asarray(before.outcomes[target])] = True
    dP = (after.P - before.P).tocsr()
    assert before.start is not None  # `attribute` has seen to it
    assert after.start is not None
    start = (before.start + after.start) / 2
    total, out = float(shares.sum()), [float((after.start - before.start) @ (h + g)) / 2]
    # (law now, matrix, gain of one visit, gain of the arrival where nothing can be hit any more)
    walks = []
    for chain, own, other, sign in ((before, h, g, 1.0), (after, g, h, -1.0)):
        ended = hit | (own == 0)
        moved = np.asarray(dP @ other) - np.asarray(dP.sum(axis=1)).reshape(-1) * other
        walks.append([start.copy(), chain.P, np.where(ended, np.where(hit, 0.0, sign * other), moved), ended])
    for t in range(horizon):
        share = sum(float(law @ gain) for law, _, gain, _ in walks) / 2
        if t == 0:
            out[0] += share
        else:
            out.append(share)
        for walk in walks:
            walk[0] = np.asarray(np.where(walk[3], 0.0, walk[0]) @ walk[1])
        if max(float(np.where(w[3], 0.0, w[0]).sum()) for w in walks) < 1e-15:
            break
    return np.array([*out, total - sum(out)])
