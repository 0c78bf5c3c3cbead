"""Shallow alignment without any language model: exact gradient descent on a trajectory of tokens.

An answer walks along positions; at each it goes on, refuses, or does harm, by a softmax of three logits that belong to
this position alone. What is minimised is the objective of alignment, P(harm) + beta KL(answer || base), by its exact
gradient: no noise, no features that positions share, no lack of capacity. The optimum is equally safe at every depth
(`optimum`). The way there is not: a position is trained in proportion to how often answers come to it, and the first
positions, once aligned, let hardly any through: two positions take a hundred steps, thirty a hundred thousand.

Training answers that begin in the middle, after k forced tokens of a harmful answer (the recovery data of arXiv
2406.05946), puts visits where there were none, and protection reaches as far as the tokens that were forced.

The experiment is our own; that alignment of language models is shallow is the finding of 2406.05946.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..brief import brief
from ..chains import Chain
from ..errors import InputError
from .profile import whole
from .width import unit

__all__ = ["TrainingPath", "recovery_mix", "training_path", "trajectory"]


@dataclass(frozen=True, eq=False)
class TrainingPath:
    """A trajectory along its training.

    Parameters
    ----------
    steps : int array, shape (S,)
        Gradient steps at which it was looked at.
    hazards : array, shape (S, L, 3)
        Probabilities of going on, refusing, and harm, by position.
    harm : array, shape (S, L + 1)
        h(k): harm after k forced tokens; the last is the tail.
    best : array, shape (L + 1,)
        h(k) where the objective has its minimum. Were the tail trained too, this would be `optimum`, flat in log odds.
    base : array, shape (L, 3)
    tail, beta, rate : float
    start : array, shape (L,)
        Law of the depth at which training answers begin.

    Examples
    --------
    The first depth at which harm is 0.4 or more, after 100 and after 1000 steps, and what could be had:

    >>> path = ms.depth.training_path(depths=10, at=[100, 1000])
    >>> print(type(path).__name__, path.front(0.4))
    TrainingPath [2, 6]
    >>> path.best[:3].round(4)
    array([0.0008, 0.001 , 0.0011])
    """

    steps: NDArray
    hazards: NDArray
    harm: NDArray
    best: NDArray
    base: NDArray
    tail: float
    beta: float
    rate: float
    start: NDArray

    __repr__ = brief

    def front(self, level: float = 0.4) -> list[int | None]:
        """First depth k with h(k) >= level, for each of `steps`; None where there is none."""
        over = self.harm >= float(unit(level, "level"))
        return [int(np.argmax(row)) if row.any() else None for row in over]

    def chain(self, step: int | None = None) -> Chain:
        """The layered chain after `step` steps, one of `steps`; the base if not given."""
        if step is None:
            return trajectory(self.base, self.tail)
        if step not in self.steps:
            raise InputError(
                f"The path was not looked at after {step} steps.",
                cause=f"It was after {', '.join(map(str, self.steps))}.",
                next="Ask for one of these, or give it in `at`.",
            )
        return trajectory(self.hazards[int(np.flatnonzero(self.steps == step)[0])], self.tail)


def trajectory(hazards: ArrayLike, tail: float) -> Chain:
    """A trajectory of L positions as a layered chain.

    Parameters
    ----------
    hazards : array, shape (L, 3)
        Probabilities of going on, refusing, and harm; rows sum to one.
    tail : float
        Harm of answers that come to the end.

    Returns
    -------
    Chain
        L + 1 layers on the states "answer", "refusal", "harm"; the last layer decides the tail.

    Raises
    ------
    InputError
        Rows that are no probabilities or do not sum to one.

    Examples
    --------
    A gate, and a position behind it that lets most through:

    >>> chain = ms.depth.trajectory([[0.1, 0.9, 0.0], [0.9, 0.02, 0.08]], tail=0.8)
    >>> ms.hitting_probability(chain, "harm").value[:, 0].round(3)
    array([0.08, 0.8 , 0.8 , 0.  ])
    """
    rows, tail = np.atleast_2d(unit(hazards, "hazards")), float(unit(tail, "tail"))
    if rows.ndim != 2 or rows.shape[1] != 3 or (np.abs(rows.sum(axis=1) - 1) > 1e-9).any():
        raise InputError(
            f"The hazards have shape {rows.shape} or rows that do not sum to one.",
            cause="A position goes on, refuses, or does harm.",
            next="Pass rows (go on, refuse, harm).",
        )
    layers = np.zeros((len(rows) + 1, 3, 3))
    layers[:-1, 0] = rows
    layers[-1, 0] = 0.0, 1 - tail, tail
    return Chain.layered(list(layers), {"refusal": 1, "harm": 2}, 0, ["answer", "refusal", "harm"])


def recovery_mix(share: float, reach: int, depths: int) -> NDArray[np.float64]:
    """Law of where training answers begin: with probability `share` after 1 .. reach forced tokens, all equally likely.

    Parameters
    ----------
    share : float
    reach : int
        Largest number of forced tokens, below `depths`.
    depths : int
        Number of positions.

    Returns
    -------
    array, shape (depths,)

    Raises
    ------
    InputError
        A number outside its range.

    Examples
    --------
    >>> ms.depth.recovery_mix(0.3, reach=3, depths=6).round(2)
    array([0.7, 0.1, 0.1, 0.1, 0. , 0. ])
    """
    share, C, L = float(unit(share, "share")), int(whole(reach, "reach")), int(whole(depths, "depths"))
    if not (C < L and (C > 0 or share == 0)):
        raise InputError(
            f"reach is {reach}, depths {depths}, share {share:g}.",
            cause="Answers begin at a position that there is.",
            next="Pass 0 < reach < depths.",
        )
    law = np.zeros(L)
    law[0] = 1 - share
    law[1 : C + 1] = share / max(C, 1)
    return law


def training_path(
    base: ArrayLike = (0.88, 0.02, 0.10),
    *,
    depths: int = 30,
    tail: float = 0.8,
    beta: float = 0.1,
    rate: float = 1.0,
    at: Sequence[int] = (100, 1000, 10000),
    recovery: tuple[float, int] | None = None,
) -> TrainingPath:
    """Align a trajectory by exact gradient descent and look at it along the way.

    Parameters
    ----------
    base : array, shape (3,) or (depths, 3)
        Probabilities of going on, refusing, and harm, of every position or by position.
    depths : int
        Number of positions.
    tail : float
        Harm of answers that come to the end; not trained.
    beta : float
        Price of KL; the optimum divides the odds of harm by e^(1 / beta).
    rate : float
        Learning rate.
    at : sequence of int
        Gradient steps at which to look, rising.
    recovery : (share, reach), optional
        See `recovery_mix`; without it all answers begin at position 0.

    Returns
    -------
    TrainingPath

    Raises
    ------
    InputError
        Shapes that do not fit, a number outside its range, or steps out of order.

    Notes
    -----
    On-policy: the gradient at position t carries the factor P(answers come to t) (`harm_gradient`). Some 10^5 steps of
    60 positions take a second.

    Examples
    --------
    h(k) after a hundred and a thousand steps, and after a thousand with half of the answers forced up to five tokens:

    >>> print(ms.depth.training_path(depths=10, at=[100, 1000]).harm[:, :8].round(2))
    [[0.11 0.31 0.52 0.62 0.68 0.71 0.74 0.76]
     [0.03 0.03 0.04 0.05 0.08 0.2  0.48 0.63]]
    >>> print(ms.depth.training_path(depths=10, at=[1000], recovery=(0.5, 5)).harm[:, :8].round(2))
    [[0.02 0.02 0.02 0.02 0.03 0.04 0.05 0.08]]
    """
    L = int(whole(depths, "depths"))
    rows = np.array(np.broadcast_to(unit(base, "base"), (L, 3)) if np.ndim(base) == 1 else unit(base, "base"))
    trajectory(rows, tail)  # checks both
    marks = whole(at, "at")
    if rows.shape != (L, 3) or marks.ndim != 1 or not len(marks) or (np.diff(marks) <= 0).any():
        raise InputError(
            f"base has shape {rows.shape} for {L} positions, at is {tuple(at)!r}.",
            cause="Every position has three hazards, and one looks at rising numbers of steps.",
            next="Pass base (3,) or (depths, 3), and at in order.",
        )
    if not (0 < beta < math.inf and 0 < rate < math.inf):
        raise InputError(f"beta is {beta!r}, rate {rate!r}.", cause="Both are positive numbers.", next="Pass them so.")
    start = recovery_mix(*(recovery or (0.0, 0)), L)
    from .training_path_kernels import descend

    hazards = np.empty((len(marks), L, 3))
    descend(rows, start, float(tail), float(beta), float(rate), marks, hazards)
    best = _harm(_best(rows, float(tail), float(beta))[None], tail)[0]
    numbers = float(tail), float(beta), float(rate)
    return TrainingPath(marks, hazards, _harm(hazards, tail), best, rows, *numbers, start)


def _best(base: NDArray, tail: float, beta: float) -> NDArray[np.float64]:
    """The hazards that minimise the objective, the tail being what it is."""
    out, value = np.empty_like(base), tail  # value: the least cost from here on
    with np.errstate(divide="ignore"):
        logs = np.log(base)
    for t in range(len(base) - 1, -1, -1):
        log = logs[t] - np.array([value, 0.0, 1.0]) / beta
        total = np.logaddexp.reduce(log)
        out[t], value = np.exp(log - total), -beta * float(total)
    return out


def _harm(hazards: NDArray, tail: float) -> NDArray[np.float64]:
    """h(k) of trajectories, shape (S, L + 1)."""
    S, L, _ = hazards.shape
    h = np.full((S, L + 1), float(tail))
    for t in range(L - 1, -1, -1):
        h[:, t] = hazards[:, t, 2] + hazards[:, t, 0] * h[:, t + 1]
    return h
