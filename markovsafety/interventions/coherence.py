"""Does a model still speak under an edit? Answers that end, that are cut off, that go round in circles.

An edit that is too strong lowers the probability of harm by breaking the model, so no probability of harm is read
without these three shares beside it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..bound import Bound, clustered
from ..errors import InputError
from ..outcomes import CODES, NOT_JUDGED
from ..rollouts.judges import ends, places
from ..rollouts.rollouts import Rollouts

__all__ = ["GRAM", "TIMES", "Quality", "quality", "repeats"]

GRAM = 4
"""Tokens of the piece that must come back for an answer to count as repeating."""
TIMES = 3
"""How often it must be there."""


@dataclass(frozen=True, eq=False)
class Quality:
    """Shares of answers, each a Bound clustered by prompt.

    Parameters
    ----------
    finished : Bound
        An end of sequence was sampled.
    truncated : Bound
        The token limit came before any outcome; of answers that are not judged: before an end of sequence.
    repetition : Bound
        The answer repeats itself; see `repeats`.
    rollouts : int
    gram, times : int
        What counts as repeating.

    Examples
    --------
    >>> rolls = ms.Rollouts.of([[31, 2], [21, 22, 2], [21] * 9, [21, 22, 23, 24]], prompt_id=[0, 0, 1, 1])
    >>> ms.interventions.quality(rolls, eos_ids=[2])
    <Quality: finished 0.5 [0.0126, 0.987], truncated 0.5 [0.0126, 0.987],
    repetition 0.25 [0.000217, 0.939] of 4 answers>
    """

    finished: Bound
    truncated: Bound
    repetition: Bound
    rollouts: int
    gram: int = GRAM
    times: int = TIMES

    def __str__(self) -> str:
        parts = (f"{b.info['name']} {b.value:.3g} [{b.lower:.3g}, {b.upper:.3g}]" for b in self._shares())
        return f"{', '.join(parts)} of {self.rollouts} answers"

    def __repr__(self) -> str:
        return f"<Quality: {self}>"

    def _shares(self) -> tuple[Bound, Bound, Bound]:
        return self.finished, self.truncated, self.repetition

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        shares = {str(b.info["name"]): b.to_json() for b in self._shares()}
        return {**shares, "rollouts": self.rollouts, "gram": self.gram, "times": self.times}


def quality(
    rolls: Rollouts, *, gram: int = GRAM, times: int = TIMES, eos_ids: Any = None, level: float = 0.95
) -> Quality:
    """How many answers end, are cut off, and repeat themselves.

    Parameters
    ----------
    rolls : Rollouts
        Judged or not.
    gram, times : int
        See `repeats`.
    eos_ids : sequence of int, optional
        Ids that end an answer; by default those in the provenance.
    level : float
        Of the intervals.

    Returns
    -------
    Quality

    Raises
    ------
    InputError
        No rollouts, or it is not known what ends an answer.

    Examples
    --------
    Two answers end, two are cut off, and one of these says 21 over and over; two prompts do not tell much:

    >>> rolls = ms.Rollouts.of([[31, 2], [21, 22, 2], [21] * 9, [21, 22, 23, 24]], prompt_id=[0, 0, 1, 1])
    >>> print(ms.interventions.quality(rolls, eos_ids=[2]).repetition)
    repetition = 0.25   95 % [0.000217, 0.939]
    because: sampling 0.47; judge, lumping, model, truncation, rounding not assessed
    """
    if not len(rolls):
        raise InputError("there are no rollouts", cause="the set is empty", next="sample some, or check the filter")
    ended = ends(rolls, eos_ids) >= 0
    judged = rolls.outcome != NOT_JUDGED
    cut = np.where(judged, rolls.outcome == CODES["truncated"], ~ended)
    prompts, row = np.unique(rolls.prompt_id, return_inverse=True)
    totals = np.bincount(row.reshape(-1), rolls.weight, len(prompts))

    def share(name: str, which: NDArray[np.bool_]) -> Bound:
        events = np.bincount(row.reshape(-1), rolls.weight * which, len(prompts))
        return clustered(np.minimum(events, totals), totals, level, name)

    again = repeats(rolls, gram=gram, times=times)
    shares = share("finished", ended), share("truncated", cut), share("repetition", again)
    return Quality(*shares, len(rolls), gram, times)


def repeats(rolls: Rollouts, *, gram: int = GRAM, times: int = TIMES) -> NDArray[np.bool_]:
    """Which answers go round in circles: some piece of `gram` sampled tokens is there at least `times` times.

    Parameters
    ----------
    rolls : Rollouts
    gram : int
        Length of the piece; pieces may overlap, so that one token said gram + times - 1 times in a row repeats.
    times : int
        At least 2.

    Returns
    -------
    bool array, shape (n,)

    Raises
    ------
    InputError
        No such piece.

    Examples
    --------
    A piece of four tokens must be there three times; pieces may overlap, so that six times 21 are three of them:

    >>> rolls = ms.Rollouts.of([[21, 22, 2], [21, 22, 23, 24] * 3, [21] * 5, [21] * 6], prompt_id=0)
    >>> ms.interventions.repeats(rolls)
    array([False,  True, False,  True])
    """
    if not (gram >= 1 and times >= 2):
        raise InputError(
            f"gram is {gram}, times is {times}",
            cause="a piece has at least one token, and is no repetition before it is there twice",
            next="give gram >= 1 and times >= 2",
        )
    row, index = places(rolls)
    begins = np.flatnonzero((index >= rolls.prefill[row]) & (index + gram <= rolls.lengths[row]))
    codes = row[begins]
    for step in range(gram):  # numbered anew after every token, so that no product overflows
        _, digit = np.unique(rolls.tokens[begins + step], return_inverse=True)
        _, codes = np.unique(codes * (digit.max(initial=0) + 1) + digit, return_inverse=True)
    often = np.bincount(codes, minlength=1)[codes] >= times
    found = np.zeros(len(rolls), dtype=bool)
    found[row[begins[often]]] = True
    return found
