"""Tokens and rates: what a token is worth, and the probability to wait in a state for one, with proven ends."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..errors import InputError
from .certify import gamma
from .rates import Rates
from .waiting_kernels import left_over

__all__ = ["in_tokens", "waiting"]


def in_tokens(rates: Rates, moving: NDArray[np.bool_]) -> None:
    """Refuse to count tokens where a state is left so rarely that the number it takes has no double.

    Raises
    ------
    InputError
        If the rate of one token has overflowed for one of the `moving` states.
    """
    never = np.flatnonzero(moving & ~np.isfinite(rates.step))
    if never.size:
        raise InputError(
            f"State {never[0]} is left with a probability below 2^-1023 per token.",
            cause="The number of tokens that takes is no double; probabilities of a hit are not affected.",
            next="Make the state absorbing, or give it a probability of leaving that is larger.",
        )


def waiting(rates: Rates) -> NDArray[np.float64]:
    """``step_i - sum_j w_ij``, in units of the rates; columns value, lower, upper.

    The diagonal of a chain is implied by what leaves a state. The sum is compensated: its error is one rounding of the
    result and ``gamma(k)^2`` of the terms (Ogita, Rump and Oishi 2005, proposition 4.5), and it is known where it has
    none. A row that sums to more than a token, which the tolerance of `Chain` allows by 1e-9, waits with probability 0.
    """
    left, exact = np.empty(rates.n), np.empty(rates.n, dtype=np.bool_)
    left_over(rates.W.indptr, rates.W.data, rates.step, left, exact)
    size = rates.step + rates.out
    room = 2.0**-51 * np.abs(left) + 2 * gamma(rates.terms + 2) ** 2 * size
    room = np.where(exact, 0.0, room) + (2 * gamma(rates.errors + 1) * size if rates.errors else 0.0)
    return np.maximum(np.column_stack([left, left - room, left + room]), 0.0)
