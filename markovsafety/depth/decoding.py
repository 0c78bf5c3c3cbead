"""How tokens are chosen from a next-token law, and answers that end: laws made of laws, for `language_chain`."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..errors import InputError

__all__ = ["Law", "greedy", "nucleus", "with_end"]

Law = Callable[[tuple[int, ...]], ArrayLike]
"""From a tuple of tokens to the probabilities of the next."""


def greedy(law: Law) -> Law:
    """The law that always speaks the likeliest token (the first of several): no temperature left."""

    def likeliest(s: tuple[int, ...]) -> NDArray[np.float64]:
        p = np.asarray(law(s), dtype=np.float64)
        return (np.arange(len(p)) == np.argmax(p)).astype(np.float64)

    return likeliest


def nucleus(law: Law, top_p: float) -> Law:
    """The law cut to its likeliest tokens, as few as reach `top_p` together (top-p sampling)."""
    if not 0 < top_p <= 1:
        raise InputError(f"top_p is {top_p}.", cause="It is a probability.", next="Pass 0 < top_p <= 1.")

    def cut(s: tuple[int, ...]) -> NDArray[np.float64]:
        p = np.asarray(law(s), dtype=np.float64)
        order = np.argsort(-p, kind="stable")
        keep = order[: 1 + int(np.searchsorted(np.cumsum(p[order]), top_p * (1 - 1e-12)))]
        out = np.zeros(len(p))
        out[keep] = p[keep]
        return out / out.sum()

    return cut


def with_end(law: Law, token: int) -> Law:
    """The law of answers that end: after `token` nothing but `token` follows.

    The full string of end tokens is then the only closed class and the stationary law sits on it alone: what a safety
    question needs is where an answer was hit before, not where it rests.
    """

    def ended(s: tuple[int, ...]) -> NDArray[np.float64]:
        p = np.asarray(law(s), dtype=np.float64)
        return (np.arange(len(p)) == token).astype(np.float64) if s[-1] == token else p

    return ended
