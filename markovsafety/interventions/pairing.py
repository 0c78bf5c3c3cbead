"""Are answers that are compared prompt by prompt answers to the same prompts? Numbers alone do not say so."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..errors import InputError
from ..rollouts.rollouts import Rollouts

__all__ = ["Asked", "asked_of", "check_paired"]


@dataclass(frozen=True, eq=False)
class Asked:
    """What the numbers of prompts stand for.

    Parameters
    ----------
    category : dict of prompt_id -> str
    tokens : dict of prompt_id -> bytes
        The prompts' ids; empty where rollouts do not hold them.
    rendered : tuple
        Template, tokenizer and system message, as far as they are known: prompts that were rendered in another way have
        other ids, and may be the same all the same.
    """

    category: dict[int, str]
    tokens: dict[int, bytes] = field(default_factory=dict)
    rendered: tuple[Any, ...] = ()


def asked_of(rolls: Rollouts) -> Asked:
    """Category and ids of every prompt.

    Raises
    ------
    InputError
        One number stands for two prompts.
    """
    numbers = rolls.prompt_id.tolist()
    category: dict[int, str] = {}
    tokens: dict[int, bytes] = {}
    ids = rolls.columns.get("prompt_tokens")
    for i, (number, name) in enumerate(zip(numbers, rolls.category)):
        told = b"" if ids is None else ids[i].tobytes()
        if category.setdefault(number, str(name)) != str(name) or tokens.setdefault(number, told) != told:
            raise InputError(
                f"prompt {number} has two categories or two texts in the same rollouts",
                cause="answers of several lists of prompts were put together under the same numbers",
                next="give each prompt a prompt_id of its own before concatenating",
            )
    return Asked(category, {} if ids is None else tokens, _rendered(rolls.provenance))


def _rendered(provenance: Mapping[str, Any]) -> tuple[Any, ...]:
    """How prompts became ids; of several parts, that of the first."""
    part = (provenance.get("parts") or [provenance])[0]
    template = part.get("template")
    told = template if isinstance(template, Mapping) else {}
    return told.get("template"), told.get("tokenizer"), (part.get("sampling") or {}).get("system")


def check_paired(one: Asked, other: Asked) -> None:
    """Raise unless numbers that both have stand for the same prompts.

    Categories are compared, and ids where both hold them and rendered them alike.

    Raises
    ------
    InputError
        They do not.
    """
    shared = one.category.keys() & other.category.keys()
    alike = one.rendered == other.rendered
    wrong = {n for n in shared if one.category[n] != other.category[n]}
    wrong |= {n for n in shared & one.tokens.keys() & other.tokens.keys() if alike and one.tokens[n] != other.tokens[n]}
    if wrong:
        raise InputError(
            f"prompt {min(wrong)} is not the same prompt on both sides ({len(wrong)} of {len(shared)} are not)",
            cause="answers are compared prompt by prompt, and prompts are told apart by their prompt_id",
            next="sample both sides on one list of prompts, or give other prompts other prompt_ids",
        )
