"""Permutation rows: the phrases through which harm comes change places, and the refusal begins right behind one.

Rotations move a refusal along one answer; permutations move what stands before it. The phrases are those that the chain
of logged answers finds critical, the group is that of all permutations of them, and a row is the image of an answer
under one: every phrase that stands in it is replaced by another, and the refusal begins where one of them ends. This is
our reading of the permutation-based augmentation that arXiv 2502.00669 (version 1) names without a definition.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from typing import Any

from ..errors import InputError
from .augment import WEIGHTS, Row, check_choice, checked_triplets, recover, row_weight

__all__ = ["critical_phrases", "permutations", "permuted", "within_budget"]

Phrase = tuple[int, ...]


def critical_phrases(found: Any, top: int = 8) -> list[Phrase]:
    """Token phrases through which most of the target's probability comes.

    Parameters
    ----------
    found : Critical
        What `markovsafety.critical` found in a chain of k-grams, with as many transitions as are to be looked at.
    top : int
        At most so many phrases.

    Returns
    -------
    list of tuple of int
        Token ids, most critical first. A transition counts for the k-gram it leads to, or, where it leads to the
        outcome itself, for that from which it comes.

    Raises
    ------
    InputError
        The chain's states are no k-grams of tokens.

    Examples
    --------
    Harm comes behind the tokens 4, 5 and nowhere else, and token 4 leads there:

    >>> answers = [[4, 5, 9]] * 6 + [[4, 6, 2]] * 3 + [[7, 5, 2]] * 3
    >>> outcome, n = ["harm"] * 6 + ["refusal"] * 6, len(answers)
    >>> rolls = ms.Rollouts.of(answers, prompt_id=range(n), outcome=outcome, hit=2)
    >>> chain = ms.estimate(ms.count(rolls, states=ms.KGram(2)))
    >>> found = ms.critical(chain, "harm", top=20)
    >>> ms.interventions.critical_phrases(found, top=3)
    [(4, 5), (4,)]
    """
    scores: dict[Phrase, float] = {}
    for move in found.transitions:
        phrase = _phrase(move.target) or _phrase(move.source)
        if phrase:
            scores[phrase] = scores.get(phrase, 0.0) + float(move.score)
    if not scores:
        raise InputError(
            "No phrase is critical.",
            cause="The chain's states are no k-grams of token ids, or nothing leads to its target.",
            next="Count with states=KGram(2), on answers of which some reach the target.",
        )
    return sorted(scores, key=lambda p: (-scores[p], p))[:top]


def _phrase(label: Any) -> Phrase:
    """The tokens of a k-gram, without those that stand for the begin of an answer; nothing for other labels."""
    parts = label if isinstance(label, tuple) else ()
    try:
        ids = tuple(int(x) for x in parts)
    except (TypeError, ValueError):
        return ()
    return tuple(i for i in ids if i >= 0)


def permuted(
    answer: Sequence[int], phrases: Sequence[Phrase], images: Sequence[Phrase]
) -> tuple[list[int], list[tuple[int, int]]]:
    """An answer with every phrase replaced by its image.

    Parameters
    ----------
    answer : sequence of int
    phrases, images : sequences of tuple of int, of one length
        images[i] replaces phrases[i].

    Returns
    -------
    answer : list of int
    ends : list of (int, int)
        For every phrase that was found, from left to right and never overlapping (the longest where several begin):
        where its image ends in the new answer, and its number.

    Examples
    --------
    Two phrases change places; the image of the first ends after 1 token, that of the second after 4.

    >>> ms.interventions.permuted([4, 5, 8, 6, 2], phrases=[(4, 5), (6,)], images=[(6,), (4, 5)])
    ([6, 8, 4, 5, 2], [(1, 0), (4, 1)])
    """
    order = sorted(range(len(phrases)), key=lambda i: -len(phrases[i]))
    out: list[int] = []
    ends, at = [], 0
    while at < len(answer):
        here = next((i for i in order if tuple(answer[at : at + len(phrases[i])]) == tuple(phrases[i])), None)
        if here is None:
            out.append(int(answer[at]))
            at += 1
            continue
        out += [int(x) for x in images[here]]
        ends.append((len(out), here))
        at += len(phrases[here])
    return out, ends


def permutations(
    triplets: Iterable[Any],
    phrases: Sequence[Sequence[int]],
    depth: int = 100,
    *,
    n: int | None = None,
    plain: float = 0.5,
    weight: str = "token",
    seed: int = 0,
) -> list[Row]:
    """Permutation rows: answers whose critical phrases have changed places, refused right behind one of them.

    Parameters
    ----------
    triplets : iterable of (prompt, answer, refusal)
        As in `recovery`. Those in whose answer no phrase ends within the depth give no row.
    phrases : sequence of token ids
        At least two, all different; see `critical_phrases`.
    depth : int
        Largest offset at which a refusal begins.
    n : int, optional
        Number of rows; one per triplet if not given.
    plain : float
        Probability of a refusal at once, of the answer as it is.
    weight : {"token", "row"}
        As in `recovery`.
    seed : int

    Returns
    -------
    list of Row
        Triplet and permutation are drawn uniformly; then one of the phrases that end within the depth, before the
        answer is over.

    Raises
    ------
    InputError
        Fewer than two phrases, or none of them stands in any answer.

    Examples
    --------
    >>> triplet = ms.interventions.Triplet(prompt=[1, 20], answer=[4, 5, 8, 6, 9, 2], refusal=[30, 31, 2])
    >>> for row in ms.interventions.permutations([triplet], phrases=[(4, 5), (6,)], n=4, plain=0.0, seed=1):
    ...     print(row.tokens, "refuses after", row.offset)
    [1, 20, 6, 8, 4, 5, 30, 31, 2] refuses after 4
    [1, 20, 6, 30, 31, 2] refuses after 1
    [1, 20, 6, 8, 4, 5, 30, 31, 2] refuses after 4
    [1, 20, 4, 5, 30, 31, 2] refuses after 2
    """
    rows = checked_triplets(triplets, depth)
    check_choice("weight", weight, WEIGHTS[:2])
    own = [tuple(int(x) for x in p) for p in phrases]
    if len(set(own)) < 2 or len(set(own)) < len(own) or not all(own):
        raise InputError(
            f"There are {len(own)} phrases, {len(set(own))} of them different.",
            cause="Phrases change places with each other.",
            next="Give at least two phrases, all different and none empty.",
        )
    if not 0 <= plain <= 1:
        raise InputError(f"plain is {plain}.", cause="It is a probability.", next="Pass 0 <= plain <= 1.")
    usable = [t for t in rows if _offsets(t.answer, own, own, depth)]
    if not usable:
        raise InputError(
            "No phrase stands in any answer.",
            cause=f"A phrase must end within {depth} tokens and before the answer is over.",
            next="Take phrases from a log of such answers, or a larger depth.",
        )
    rng, out = random.Random(seed), []
    while len(out) < (len(rows) if n is None else n):
        if rng.random() < plain:
            t = rng.choice(rows)
            out.append(recover(*t, 0, row_weight(weight, t)))
            continue
        t, images = rng.choice(usable), rng.sample(own, len(own))
        answer, _ = permuted(t.answer, own, images)
        offsets = _offsets(t.answer, own, images, depth)
        if offsets:  # an image may be so long that nothing ends within the depth any more
            out.append(recover(t.prompt, answer, t.refusal, rng.choice(offsets), row_weight(weight, t)))
    return out


def _offsets(answer: Sequence[int], phrases: Sequence[Phrase], images: Sequence[Phrase], depth: int) -> list[int]:
    new, ends = permuted(answer, phrases, images)
    return [end for end, _ in ends if end <= depth and end < len(new)]


def within_budget(rows: Sequence[Row], tokens: int, seed: int = 0) -> list[Row]:
    """Rows in a random order, as many as have together at most so many tokens with loss.

    Parameters
    ----------
    rows : sequence of Row
    tokens : int
    seed : int

    Raises
    ------
    InputError
        The first row alone has more.

    Examples
    --------
    >>> triplet = ms.interventions.Triplet(prompt=[1, 20], answer=[4, 5, 8, 6, 9, 2], refusal=[30, 31, 2])
    >>> rows = ms.interventions.rotations([triplet], depth=4)
    >>> kept = ms.interventions.within_budget(rows, tokens=10)
    >>> len(rows), len(kept), sum(row.loss_tokens for row in kept)
    (4, 3, 9)
    """
    order, out, spent = list(rows), [], 0
    random.Random(seed).shuffle(order)
    for row in order:
        if spent + row.loss_tokens > tokens:
            break
        out.append(row)
        spent += row.loss_tokens
    if not out:
        raise InputError(
            f"No row fits into {tokens} tokens.", cause="The budget is too small.", next="Give a larger budget."
        )
    return out
