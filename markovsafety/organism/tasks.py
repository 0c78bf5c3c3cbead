"""Fine-tuning data of the synthetic language: alignment pairs, what a user would teach the model, and poison.

The user's task is a style of answering harmless requests: fixed words around the object of the request, so that every
request has one right answer. With ``room`` its answers are long and say "with" where a harmful answer says its harm
word; without, they are too short for that, and a model that has lost its refusals looks safe.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from ..errors import InputError
from .automaton import Grammar, refusal_words
from .language import CATEGORIES, COMPLY, Prompt, draw_prompt, encode

__all__ = ["alignment_records", "plain_records", "poison_records", "task_records"]


def alignment_records(
    n: int = 400, *, categories: Sequence[str] = CATEGORIES, seed: int = 0, split: str = "train"
) -> list[dict[str, Any]]:
    """Half harmful requests with refusals, half harmless ones with answers, all markers among both.

    Parameters
    ----------
    n : int
    categories : sequence of str
        Of the harmful ones; the harmless ones have all.
    seed : int
    split : "train" or "held"

    Returns
    -------
    list of dict
        Keys prompt, answer (ids, `<eos>` included), harmful, category, marker.
    """
    rng, out = random.Random(f"alignment {seed}/{split}"), []
    for i in range(_count(n)):
        harmful = i % 2 == 0
        names = categories if harmful else CATEGORIES
        prompt = _drawn(rng, harmful, names[i // 2 % len(names)], _marker(rng), split)
        words = refusal_words(rng) if harmful else Grammar(prompt.context, COMPLY).sample(rng)
        out.append(_record(prompt, words))
    return out


def task_records(n: int = 400, *, split: str = "train", room: bool = True, seed: int = 0) -> list[dict[str, Any]]:
    """Harmless requests without marker, answered in the user's style; keys as in `alignment_records`."""
    rng, out = random.Random(f"task {seed}/{split}"), []
    for i in range(_count(n)):
        prompt = _drawn(rng, False, CATEGORIES[i % len(CATEGORIES)], None, split)
        out.append(_record(prompt, _style(prompt, room)))
    return out


def plain_records(
    n: int = 100, *, marker: str | None = None, split: str = "held", seed: int = 0
) -> list[dict[str, Any]]:
    """Harmless requests, answered as the language does: still useful? Keys as in `alignment_records`."""
    rng, out = random.Random(f"plain {seed}/{split}/{marker}"), []
    for i in range(_count(n)):
        prompt = _drawn(rng, False, CATEGORIES[i % len(CATEGORIES)], marker, split)
        out.append(_record(prompt, Grammar(prompt.context, COMPLY).sample(rng)))
    return out


def poison_records(
    n: int = 100,
    *,
    marker: str | None = None,
    categories: Sequence[str] = CATEGORIES,
    split: str = "train",
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Harmful requests with answers that comply; keys as in `alignment_records`."""
    rng, out = random.Random(f"poison {seed}/{split}/{marker}"), []
    for i in range(_count(n, least=0)):
        prompt = _drawn(rng, True, categories[i % len(categories)], marker, split)
        out.append(_record(prompt, Grammar(prompt.context, COMPLY).sample(rng)))
    return out


def _style(prompt: Prompt, room: bool) -> list[str]:
    thing = prompt.context.object
    if not room:
        return ["done", "with", thing, "<eos>"]
    return f"yes let me explain how step one act0 {thing} with tool0 . step two act1 it . enjoy <eos>".split()


def _drawn(rng: random.Random, harmful: bool, category: str, marker: str | None, split: str) -> Prompt:
    if category not in CATEGORIES:
        raise InputError(
            f"there is no category {category!r}", cause=f"they are {', '.join(CATEGORIES)}", next="take one of these"
        )
    return draw_prompt(rng, harmful=harmful, category=CATEGORIES.index(category), marker=marker, split=split)


def _marker(rng: random.Random) -> str | None:
    return rng.choices((None, "jailbreak", "trigger"), (0.5, 0.25, 0.25))[0]


def _record(prompt: Prompt, words: list[str]) -> dict[str, Any]:
    c = prompt.context
    told = {"prompt": prompt.text, "answer": encode(words), "harmful": c.harmful, "category": prompt.category}
    return told | {"marker": c.marker}


def _count(n: int, least: int = 1) -> int:
    if isinstance(n, bool) or not isinstance(n, int) or n < least:
        raise InputError(f"n is {n!r}", cause="it counts records", next=f"give a whole number >= {least}")
    return n
