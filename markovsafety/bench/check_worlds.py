"""Small worlds in which a chain's assumptions hold, or fail in one known way: what `check` is measured on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..chains import Chain, KGram
from ..evidence.check import _assumptions
from ..evidence.prefill import predictions
from ..evidence.timing import hit_curve
from ..outcomes import CODES
from ..rollouts import Rollouts

__all__ = ["TESTS", "WORLDS", "exact", "outcomes_of_tests", "speak"]

WORDS = 3
HARM, REFUSAL = WORDS, WORDS + 1
LIMIT = 64
Law = Callable[[NDArray, NDArray, int, NDArray], NDArray]
STEP = np.array([[0.5, 0.3, 0.2], [0.2, 0.5, 0.3], [0.3, 0.2, 0.5]])  # from word to word, if the answer goes on
HAZARD = np.array([0.05, 0.15, 0.25])  # harm after each word
STOP = 0.1  # refusal


def _law(hazard: NDArray, last: NDArray) -> NDArray:
    """Law of the next word, shape (n, WORDS + 2)."""
    go = 1 - hazard - STOP
    return np.column_stack([STEP[last] * go[:, None], hazard, np.full(len(last), STOP)])


def _fair(last: NDArray, before: NDArray, t: int, prompt: NDArray) -> NDArray:
    return _law(HAZARD[last], last)


def _longer(last: NDArray, before: NDArray, t: int, prompt: NDArray) -> NDArray:
    return _law(np.where(last == before, 1.6, 0.6) * HAZARD[last], last)


def _later(last: NDArray, before: NDArray, t: int, prompt: NDArray) -> NDArray:
    return _law((1.8 if t >= 3 else 0.5) * HAZARD[last], last)


def _unlike(last: NDArray, before: NDArray, t: int, prompt: NDArray) -> NDArray:
    return _law(np.random.default_rng(5).permuted(np.linspace(0.2, 1.8, 997))[prompt % 997] * HAZARD[last], last)


def _strata(last: NDArray, before: NDArray, t: int, prompt: NDArray) -> NDArray:
    return _law(np.where(prompt % 2 == 0, 1.5, 0.5) * HAZARD[last], last)


def _slower(last: NDArray, before: NDArray, t: int, prompt: NDArray) -> NDArray:
    fair = _fair(last, before, t, prompt)
    out = fair * np.where(np.arange(WORDS + 2) < WORDS, 1.0, 0.5)
    out[np.arange(len(last)), last] += 1 - out.sum(axis=1)
    return out


def _worse(last: NDArray, before: NDArray, t: int, prompt: NDArray) -> NDArray:
    return _law(1.3 * HAZARD[last], last)


WORLDS: dict[str, Law] = {
    "fair": _fair,
    "memory of two words": _longer,
    "hazard changes with position": _later,
    "prompts differ": _unlike,
    "categories differ": _strata,
    "half as fast": _slower,
    "more harmful": _worse,
}
"""In the last two all assumptions hold, but the chain that is checked is that of the fair world."""


def speak(
    rng: np.random.Generator,
    law: Law,
    prompts: int,
    n: int,
    prefix: tuple[int, ...] = (),
    limit: int = LIMIT,
    first: int = 0,
) -> Rollouts:
    """Answers in a world.

    Parameters
    ----------
    rng : Generator
    law : callable
        (last word, the one before, position, prompt) -> law of the next word, shape (n, 5): three words, harm, refusal.
    prompts, n : int
        Prompts, and answers to each; even prompts are of category "even", the others of "odd".
    prefix : tuple of int
        Forced words.
    limit : int
        Most sampled tokens.
    first : int
        Number of the first prompt.

    Returns
    -------
    Rollouts
        Judged.
    """
    prompt = np.repeat(np.arange(first, first + prompts), n)
    m, k = len(prompt), len(prefix)
    tokens = np.zeros((m, k + limit), dtype=np.int64)
    tokens[:, :k] = prefix
    length = np.full(m, k)
    alive, outcome = np.arange(m), np.full(m, CODES["truncated"])
    for t in range(k, k + limit):
        last, before = (tokens[alive, t - lag] if t >= lag else np.zeros(len(alive), np.int64) for lag in (1, 2))
        chance = np.cumsum(law(last, before, t, prompt[alive]), axis=1)
        word = np.minimum((rng.random((len(alive), 1)) >= chance).sum(axis=1), WORDS + 1)
        tokens[alive, t] = word
        length[alive] = t + 1
        outcome[alive[word == HARM]], outcome[alive[word == REFUSAL]] = CODES["harm"], CODES["refusal"]
        alive = alive[word < WORDS]
        if not alive.size:
            break
    flat = tokens[np.arange(tokens.shape[1]) < length[:, None]]
    return Rollouts(
        flat, np.concatenate([[0], np.cumsum(length)]), prompt, np.array(["even", "odd"], dtype=object)[prompt % 2],
        np.full(m, k), outcome, np.where(outcome == CODES["truncated"], -1, length - 1),
    )  # fmt: skip


def exact(law: Law = _fair) -> Chain:
    """The chain of a world with a memory of one word, in states of `KGram(1)`."""
    words = np.concatenate([[0], np.arange(WORDS)])  # before the first word the law is that after word 0
    P = np.zeros((WORDS + 3, WORDS + 3))
    P[: WORDS + 1, 1:] = law(words, words, 0, words)
    labels = [(-1,), *((i,) for i in range(WORDS)), "harm", "refusal"]
    return Chain(P, {"harm": WORDS + 1, "refusal": WORDS + 2}, 0, labels)


TESTS = (
    "Chapman-Kolmogorov",
    "order",
    "homogeneity over position",
    "prompt heterogeneity",
    "heterogeneity between categories",
)


def outcomes_of_tests(rolls: Rollouts, level: float = 0.95) -> dict[str, tuple[bool, bool]]:
    """By test: whether its p is below 1 - level, and whether its effect's interval excludes 0 (the curve: twice)."""
    chain = exact()
    said = predictions(chain, level)
    out = {}
    for found in _assumptions(said, rolls, KGram(1), 0.05, level):
        effect: Any = found.effect
        gain = found.table[0].get("gain") if found.table else None
        lower = effect.lower if effect is not None else gain.lower if gain is not None else 0.0
        out[found.name] = (found.p is not None and found.p < 1 - level, lower > 0)
    curve = hit_curve(chain, rolls, level)
    assert curve is not None
    out["time of the first hit"] = (curve["gap_lower"] > 0,) * 2
    return out
