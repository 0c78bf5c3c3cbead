"""A homogeneous chain as rates: what leaves each state, and to where; the diagonal is implied, never 1 minus a sum."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from ..chains import Chain
from . import graph_kernels as kernels

__all__ = ["Rates", "rates_of"]

# One chain is asked many questions; its rates live exactly as long as the chain.
_KNOWN: WeakKeyDictionary[Chain, Rates] = WeakKeyDictionary()


@dataclass(frozen=True)
class Rates:
    """Off-diagonal rates, every row scaled by a power of two so that its sum lies in [1/2, 1).

    Attributes
    ----------
    W : csr array, shape (n, n)
        Positive rates without diagonal.
    out : array, shape (n,)
        Row sums of W; 0 for an absorbing state.
    step : array, shape (n,)
        Rate that corresponds to one token: a state is left with probability ``out / step`` per token.
    errors : int
        Roundings already in each rate relative to the chain they describe (0: the rates are the chain).
    memo : dict
        What solvers keep from one question about the chain to the next.
    """

    W: sp.csr_array
    out: NDArray[np.float64]
    step: NDArray[np.float64]
    errors: int = 0
    memo: dict[Any, Any] = field(default_factory=dict, compare=False, repr=False)

    @property
    def n(self) -> int:
        """Number of states."""
        return len(self.out)

    @cached_property
    def terms(self) -> NDArray[np.intp]:
        """Number of rates in each row."""
        return np.diff(self.W.indptr)


def rates_of(chain: Chain) -> Rates:
    """Rates of a homogeneous chain, made once: its integer counts where it has them, else its probabilities.

    Multiplying a row by a constant changes no hitting probability, so counts need no division, and a power of two
    rounds nothing."""
    known = _KNOWN.get(chain)
    if known is None:
        known = _KNOWN[chain] = _made(chain)
    return known


def _made(chain: Chain) -> Rates:
    counts = chain.integer_counts
    matrix = chain.P if counts is None else counts
    total = np.ones(chain.n_states) if counts is None else np.asarray(counts.sum(axis=1)).ravel().astype(np.float64)
    rounded = counts is not None and counts.nnz and int(total.max()) >= 2**53
    data = matrix.data.astype(np.float64, copy=False)
    ends = np.zeros(chain.n_states + 1, dtype=matrix.indptr.dtype)
    kernels.count_rates(matrix.indptr, matrix.indices, data, ends)
    n = int(ends[-1])
    columns, values = np.empty(n, dtype=matrix.indices.dtype), np.empty(n)
    out, step = np.empty(chain.n_states), np.empty(chain.n_states)
    kernels.fill_rates(matrix.indptr, matrix.indices, data, total, ends, columns, values, out, step)
    W = sp.csr_array((values, columns, ends), shape=matrix.shape)
    return Rates(W, out, step, 2 if rounded else 0)
