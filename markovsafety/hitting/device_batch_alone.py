"""One sample of a batch for itself, with a certificate."""

from __future__ import annotations

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from ..chains import Chain
from . import graph
from .blocks import potential
from .core import Walk, probability
from .rates import Rates

__all__ = ["alone"]


def alone(w: Walk, values: NDArray[np.float64]) -> NDArray[np.float64] | None:
    """Columns value, lower, upper of all nodes, shape (N, 3); None if they could not be proven.

    Parameters
    ----------
    w : Walk
        Gives pattern and target.
    values : array, shape (nnz,)
        Stored entries; of a homogeneous chain on any scale.

    Raises
    ------
    InputError
        If they are no probabilities, or a row of a homogeneous chain is empty that must not be.
    """
    chain, layers, at = w.chain, [], 0
    for P in chain.layers:
        data = values[at : at + P.nnz]
        at += P.nnz
        if not chain.is_layered and np.isfinite(data).all() and (data >= 0).all():
            line = np.repeat(np.arange(chain.n_states), np.diff(P.indptr))
            data = _levelled(data, line, chain.n_states)
            total = np.bincount(line, data, minlength=chain.n_states)
            data = data / np.where(total > 0, total, 1.0)[line]
        layers.append(sp.csr_array((data, P.indices, P.indptr), shape=P.shape))
    if not chain.is_layered:
        Chain(layers[0], chain.outcomes)  # raises what there is to raise
        return _rescaled(w, values)
    made = Chain.layered(layers, chain.outcomes)
    answer = probability(Walk(made, w.hit, w.avoid, w.tail, w.name, w.outcomes))
    return None if answer.failed else answer.X.reshape(-1, 3)


def _levelled(data: NDArray, row: NDArray, n: int) -> NDArray[np.float64]:
    """Rows times powers of two that bring their largest entries to [1/2, 1), so that no sum overflows."""
    top = np.zeros(n)
    np.maximum.at(top, row, data)
    return np.ldexp(data, -np.frexp(top)[1][row])


def _rescaled(w: Walk, values: NDArray[np.float64]) -> NDArray[np.float64] | None:
    """From the values as given, times powers of two: divided by their sums they would be rounded."""
    P, n = w.chain.P, w.chain.n_states
    line = np.repeat(np.arange(n), np.diff(P.indptr))
    off = (line != P.indices) & (values > 0)
    row, data = line[off], values[off]
    data = _levelled(data, row, n)
    out = np.bincount(row, data, minlength=n)
    power = -np.frexp(out)[1]
    W = sp.csr_array((np.ldexp(data, power[row]), (row, P.indices[off])), shape=(n, n))
    rates = Rates(W, np.ldexp(out, power), np.ones(n))
    known = graph.decided(W, w.hit, w.moving, rates.memo)
    free, one = known.can & w.moving & ~known.sure, w.hit | known.sure
    ends = np.broadcast_to(one.astype(np.float64)[:, None], (n, 3))
    X, report = potential(rates, free, ends, None, "auto", 1.0, known.plan(free))
    return None if report.failed else X
