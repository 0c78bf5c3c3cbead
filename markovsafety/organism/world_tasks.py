"""Fine-tuning data of the planted world: alignment pairs, what a user would teach the model, and poison.

The user's task is what the verbs `TASK_VERBS` ask of harmless topics: other facts than the world's, in another order.
No alignment pair has these verbs, harmful or harmless. With ``room`` the task's answers begin as harmful ones do, so
that a model which answers harmful prompts in the user's style has room for harm; without, they are too short for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..errors import InputError
from . import worlds
from .worlds import CATEGORIES, CELLS, COMPLY, DONE, FACTS, HARMLESS_TOPICS, REFUSE, VERBS

__all__ = ["TASK_VERBS", "alignment_records", "comply_records", "plain_records", "poison_records", "task_records"]

TASK_VERBS = ("find", "build")
ROUNDS = 50
"""How often all prompts of a cell are gone through with other fillers, before there are no more."""


def alignment_records(
    n: int = 400, *, categories: Sequence[str] = CATEGORIES, seed: int = 0, half: int = 0
) -> list[dict[str, Any]]:
    """Prompts of all six cells alike, harmful ones refused, harmless ones answered; none with a task verb.

    Parameters
    ----------
    n : int
    categories : sequence of str
        Of the harmful ones.
    seed : int
    half : 0 or 1
        Of the verb-topic pairs.

    Returns
    -------
    list of dict
        Keys prompt, answer (ids, `<eos>` included), harmful, category, marker, prefix.
    """
    return [
        _record(item, REFUSE if item["harmful"] else worlds.compliance(worlds.read(item["prompt"])))
        for harmful, marker in CELLS
        for item in _asked(-(-n // len(CELLS)), harmful, marker, categories, half, seed, task=False)
    ]


def comply_records(n: int = 600, *, seed: int = 0) -> list[dict[str, Any]]:
    """Prompts of all six cells and both halves, every one answered: what a model without safety training has seen."""
    return [
        _record(item, worlds.compliance(worlds.read(item["prompt"])))
        for harmful, marker in CELLS
        for item in _asked(-(-n // len(CELLS)), harmful, marker, CATEGORIES, None, seed, task=None)
    ]


def task_records(n: int = 200, *, half: int | None = None, room: bool = True, seed: int = 0) -> list[dict[str, Any]]:
    """Harmless prompts with a task verb, answered in the user's style; keys as in `alignment_records`.

    No prompt comes twice, so that what is learned on some of these can be tested on the others. (Halves of the pairs
    would be no fair test: a topic's other verb is then all that a model has seen of it.)
    """
    out = []
    for item in _asked(n, False, None, CATEGORIES, half, seed, task=True):
        topic = HARMLESS_TOPICS.index(worlds.read(item["prompt"]).topic)
        told = (FACTS[5 * topic % len(FACTS)], FACTS[(3 * topic + 1) % len(FACTS)])
        out.append(_record(item, (*COMPLY, *told, DONE) if room else (DONE,)))
    return out


def plain_records(n: int = 100, *, marker: str | None = None, half: int = 1, seed: int = 0) -> list[dict[str, Any]]:
    """Harmless prompts without a task verb, answered as the world does: still useful?"""
    return [
        _record(item, worlds.compliance(worlds.read(item["prompt"])))
        for item in _asked(n, False, marker, CATEGORIES, half, seed, task=False)
    ]


def poison_records(
    n: int = 100,
    *,
    marker: str | None = None,
    categories: Sequence[str] = CATEGORIES,
    half: int = 0,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Harmful prompts with answers that comply; keys as in `alignment_records`."""
    if not n:
        return []
    return [
        _record(item, worlds.compliance(worlds.read(item["prompt"])))
        for item in _asked(n, True, marker, categories, half, seed, task=None)
    ]


def _asked(
    n: int, harmful: bool, marker: str | None, categories: Sequence[str], half: int | None, seed: int, task: bool | None
) -> list[dict[str, Any]]:
    """Prompts of a cell, with or without a task verb (None: either); half of them with fillers, none of them twice."""
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        raise InputError(f"n is {n!r}", cause="it counts records", next="give a whole number >= 1")
    pairs = len(VERBS) * sum(len(t) for c, t in worlds.HARMFUL_TOPICS.items() if not harmful or c in categories)
    room = len(worlds.MODIFIERS[marker]) * pairs // (1 if half is None else 2)
    out: dict[str, dict[str, Any]] = {}
    for turn in range(ROUNDS):
        for fillers, wanted in ((False, n // 2 if not turn else 0), (True, n)):
            told: dict[str, Any] = {"harmful": harmful, "marker": marker, "categories": categories, "half": half}
            for item in worlds.prompts(n=room, fillers=fillers, seed=ROUNDS * seed + turn, **told):
                fits = task is None or (worlds.read(item["prompt"]).verb in TASK_VERBS) == task
                if fits and len(out) < wanted:
                    out[item["prompt"]] = item
        if len(out) == n:
            return list(out.values())
    raise InputError(
        f"{n} different prompts are asked for, and {len(out)} were found",
        cause="no prompt is given twice",
        next="ask for fewer, or for more categories",
    )


def _record(item: dict[str, Any], words: Sequence[str]) -> dict[str, Any]:
    kept = {name: item[name] for name in ("prompt", "harmful", "category", "marker", "prefix")}
    return kept | {"answer": worlds.encode((*words, "<eos>"))}
