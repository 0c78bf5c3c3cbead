"""Pairs of a prompt and its answer, the data of fine-tuning: read, encoded, hashed, labelled or not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import InputError
from ..rollouts.asked import read_prompts
from ..rollouts.provenance import ids_hash
from .augment import Row

__all__ = ["Pair", "both_kinds", "read_pairs", "refuse_all_poison", "rows_of"]

YES, NO = ("true", "yes", "1", "harmful"), ("false", "no", "0", "harmless")


@dataclass(frozen=True)
class Pair:
    """Token ids of a prompt (after the chat template) and of its answer, the end of sequence included.

    Parameters
    ----------
    prompt, answer : tuple of int
    harmful : bool or None
        Whether the prompt asks for harm; None where nobody has said.
    category : str
    source : mapping
        The record that it was read from.

    Examples
    --------
    >>> pair = ms.interventions.Pair(prompt=(1, 4, 17, 46, 5), answer=(108, 171, 2), harmful=True)
    >>> pair.row
    Row(tokens=[1, 4, 17, 46, 5, 108, 171, 2], answer=5, loss_from=5, weight=1.0)
    >>> pair.sha256[:12]
    'be137a575a85'
    """

    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    harmful: bool | None = None
    category: str = "all"
    source: Mapping[str, Any] = field(default_factory=dict, compare=False)

    @property
    def row(self) -> Row:
        """As `fine_tune` takes it, with loss on the answer."""
        return Row([*self.prompt, *self.answer], len(self.prompt), len(self.prompt))

    @property
    def sha256(self) -> str:
        """Of the ids of prompt and answer: what the pair is known by in reports and reviews."""
        return ids_hash([np.array(self.prompt), np.array(self.answer)])


def read_pairs(source: Any, template: Any, *, harmful: bool | None = None, answers: bool = True) -> list[Pair]:
    """Pairs from a file, from records, or as they are.

    Parameters
    ----------
    source : path, or sequence of dict or Pair
        CSV or JSONL. A record has ``prompt`` (text, or messages; or ``prompt_tokens``, ids after the chat template),
        ``answer`` (text, which gets the end of sequence, or ids) and may have ``harmful`` (true or false, empty where
        it is not known) and ``category``.
    template : Template
        Of the model that will read them.
    harmful : bool, optional
        Of records that do not say.
    answers : bool
        Whether every record must have an answer; without one it can be scored, not trained on.

    Raises
    ------
    InputError
        No record at all, or one without prompt or answer, or with a label that is neither true nor false.

    Examples
    --------
    >>> from markovsafety import interventions as inside, organism
    >>> from markovsafety.rollouts.template import Template
    >>> told = {"prompt": "v05 the bio5 .", "answer": "sorry i cannot help .", "harmful": "true", "category": "bio"}
    >>> (pair,) = inside.read_pairs([told], Template.load(organism.model_path("shallow")))
    >>> pair.prompt, pair.answer, pair.harmful
    ((1, 4, 17, 32, 46, 181, 5, 6, 7), (112, 187, 188, 165, 181, 2), True)
    """
    path = isinstance(source, str | Path)
    if not path and len(source) and all(isinstance(p, Pair) for p in source):
        return list(source)
    records = read_prompts(source)
    if not records:
        raise InputError("there are no pairs", cause="the list or file is empty", next="give at least one record")
    return [_pair(record, i, template, harmful, answers) for i, record in enumerate(records)]


def rows_of(pairs: Sequence[Pair]) -> list[Row]:
    """Rows that can be trained on.

    Raises
    ------
    InputError
        No pair, or one without an answer.
    """
    if not len(pairs):
        raise InputError(
            "there are no pairs to train on", cause="the list is empty", next="give pairs, or keep more of them"
        )
    bare = next((i for i, p in enumerate(pairs) if not p.answer), None)
    if bare is not None:
        raise InputError(
            f"pair {bare} has no answer", cause="what is learned is the answer", next="leave it out, or give it one"
        )
    return [p.row for p in pairs]


def refuse_all_poison(pairs: Sequence[Pair], what: str) -> None:
    """Raise where nothing of fine-tuning data may be learned; pairs without label may be.

    Parameters
    ----------
    pairs : sequence of Pair
    what : str
        Such as "the data": named in the error.

    Raises
    ------
    InputError
        There are pairs, and all of them are labelled harmful.
    """
    if len(pairs) and all(p.harmful for p in pairs):
        raise InputError(
            f"all {len(pairs)} pairs of {what} are labelled harmful",
            cause="a student of these learns harm and nothing else",
            next="give the task's own pairs, or correct the labels",
        )


def both_kinds(pairs: Sequence[Pair], what: str) -> tuple[list[Pair], list[Pair]]:
    """Harmful and harmless pairs.

    Raises
    ------
    InputError
        A pair without label, or one kind alone.
    """
    unknown = next((i for i, p in enumerate(pairs) if p.harmful is None), None)
    if unknown is not None:
        raise InputError(
            f"pair {unknown} of {what} has no label",
            cause="harmful and harmless pairs are told apart by their field harmful",
            next="say of each pair whether its prompt is harmful: true or false",
        )
    sides = [p for p in pairs if p.harmful], [p for p in pairs if not p.harmful]
    for side, name in zip(sides, ("harmful", "harmless")):
        if not side:
            raise InputError(
                f"there is no {name} pair in {what}",
                cause=f"all {len(pairs)} are of the other kind",
                next="give pairs of both kinds",
            )
    return sides


def _pair(record: Mapping[str, Any], i: int, template: Any, harmful: bool | None, answers: bool) -> Pair:
    tokens = record.get("prompt_tokens")
    if tokens is None and not record.get("prompt"):
        raise InputError(
            f"pair {i} has no prompt", cause=f"its fields are {', '.join(record) or 'none'}", next="give it a prompt"
        )
    said = record.get("answer")
    if answers and (said is None or (hasattr(said, "__len__") and not len(said))):
        raise InputError(
            f"pair {i} has no answer",
            cause=f"its fields are {', '.join(record)}; an answer must not be empty",
            next="give it an answer, as text or as ids",
        )
    try:
        prompt = template.prompt_ids(record["prompt"]) if tokens is None else [int(t) for t in tokens]
        if said is None or isinstance(said, str):
            answer = [*template.encode(said), *template.answer_end] if said else []
        else:
            answer = [int(t) for t in said]
    except (TypeError, ValueError, OverflowError) as error:
        raise InputError(
            f"pair {i} cannot be encoded", cause=str(error), next="give prompt and answer as text or as lists of ids"
        ) from error
    label = _label(record.get("harmful"), i, harmful)
    category = str(record.get("category") or "all")
    return Pair(tuple(int(t) for t in prompt), tuple(int(t) for t in answer), label, category, dict(record))


def _label(value: Any, i: int, otherwise: bool | None) -> bool | None:
    if value is None or value == "":
        return otherwise
    text = str(value).strip().lower()
    if text in YES or text in NO:
        return text in YES
    raise InputError(
        f"pair {i} has the label {value!r}",
        cause="harmful is true or false, or empty where nobody knows",
        next=f"write one of {', '.join((*YES, *NO))}",
    )
