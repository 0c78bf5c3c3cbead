"""How far a model's rows are from the planted ones along its answers, and what that can do to the probability of harm.

With rows P planted and Q of the model, h the planted probability of harm, and X an answer of one of both laws,

    h_Q - h_P = E_Q sum_t sum_v (Q - P)(v | X_t) h_P(X_t v),      |h_Q - h_P| <= E sum_t TV(X_t),

the first exact, the second for answers of either law (our own form of the perturbation identity for absorbing chains,
with positions in place of states). The sums end with the answer, and where the answer leaves the grammar: what follows
there may be anything between 0 and 1.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from .exact import grammar_of, harm_by_state
from .language import IDS, PAD, WORDS, Prompt, encode

__all__ = ["Distance", "distance", "planted_answers"]


@dataclass(frozen=True, eq=False)
class Distance:
    """Sums over single answers, from the first sampled token on.

    Parameters
    ----------
    tv : array, shape (answers,)
        Total variation of the rows passed.
    effect : array, shape (answers,)
        Size of each row's effect on harm, ``|sum_v (Q - P)(v) h(v)|``, summed; with what may leave the grammar.
    shift : array, shape (answers,)
        The same with its sign, what leaves the grammar counted as harmless: its mean over answers of the model is
        h_Q - h_P up to `left`.
    left : array, shape (answers,)
        Probability that the model gave to words outside the grammar.
    """

    tv: NDArray[np.float64]
    effect: NDArray[np.float64]
    shift: NDArray[np.float64]
    left: NDArray[np.float64]


def planted_answers(variant: str, prompt: Prompt, k: int, prefix: Sequence[int], n: int, seed: str) -> list[list[int]]:
    """Answers of the planted law after `k` forced tokens: ids, forced ones included.

    Parameters
    ----------
    variant : str
    prompt : Prompt
    k : int
    prefix : sequence of int
        Ids of a compliant answer, at least `k`.
    n : int
    seed : str

    Returns
    -------
    list of n lists of int
    """
    rules, rng = grammar_of(variant, prompt.context), random.Random(seed)
    forced = [WORDS[i] for i in prefix[:k]]
    state = rules.walk(forced)[-1]
    return [encode(forced + rules.sample(rng, state)) for _ in range(n)]


@torch.no_grad()
def distance(model: Any, variant: str, prompts: Sequence[Prompt], answers: Sequence[Sequence[int]], k: Any) -> Distance:
    """Distance of a model's rows from the planted ones along given answers.

    Parameters
    ----------
    model : torch causal language model of the organism
    variant : str
        Whose grammar is the planted one.
    prompts : sequence of Prompt
        One for each answer.
    answers : sequence of sequences of int
        Token ids, forced ones included.
    k : int or sequence of int
        Number of forced tokens of each answer.

    Returns
    -------
    Distance
    """
    forced = np.broadcast_to(k, len(answers))
    out = np.zeros((4, len(answers)))
    order = sorted(range(len(answers)), key=lambda i: len(answers[i]))
    for at in range(0, len(order), 64):
        part = order[at : at + 64]
        rows = [prompts[i].tokens() + list(answers[i]) for i in part]
        width = max(map(len, rows))
        ids = torch.tensor([row + [PAD] * (width - len(row)) for row in rows])
        law = torch.softmax(model(input_ids=ids).logits.double(), -1).numpy()
        for row, i in zip(law, part):
            out[:, i] = _along(row, variant, prompts[i], answers[i], int(forced[i]))
    return Distance(*out)


def _along(law: NDArray, variant: str, prompt: Prompt, answer: Sequence[int], k: int) -> NDArray[np.float64]:
    rules, harm = grammar_of(variant, prompt.context), harm_by_state(variant, prompt)
    offset, total = len(prompt.tokens()) - 1, np.zeros(4)
    for t, state in enumerate(rules.walk([WORDS[i] for i in answer])[:-1]):
        if state is None or state.kind == "HARM":
            break
        if t < k:
            continue
        where, p, h = _row(rules, state, harm)
        q = law[offset + t]
        inside = q[where]
        left = max(1 - float(inside.sum()), 0.0)
        shift = float((inside - p) @ h)
        total += 0.5 * (np.abs(inside - p).sum() + left), abs(shift) + left, shift, left
    return total


def _row(rules: Any, state: Any, harm: dict[Any, float]) -> tuple[NDArray, NDArray, NDArray]:
    """Ids, planted probabilities and harm behind each word; words that lead to two states weigh their harm."""
    words: dict[str, list[float]] = {}
    for word, p, follow in rules.edges(state):
        mass = words.setdefault(word, [0.0, 0.0])
        mass[0] += p
        mass[1] += p * harm[follow]
    p = np.array([m for m, _ in words.values()])
    return np.array([IDS[w] for w in words]), p, np.array([x for _, x in words.values()]) / p
