"""Where triplets of a prompt, a compliant answer and a refusal come from: a file, or rollouts of a model."""

from __future__ import annotations

import random
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..brief import brief
from ..errors import InputError
from ..outcomes import CODES, NOT_JUDGED
from ..reading import parsed
from ..rollouts.rollouts import Rollouts
from .augment import Triplet

__all__ = ["Triplets", "read_triplets", "triplets_of"]


@dataclass(frozen=True)
class Triplets:
    """Triplets with the categories of their prompts; a sequence of `Triplet`.

    Parameters
    ----------
    items : tuple of Triplet
    category : tuple of str, of the same length

    Examples
    --------
    >>> Triplet, Triplets = ms.interventions.Triplet, ms.interventions.Triplets
    >>> some = Triplets((Triplet([1, 20], [4, 5, 2], [30, 2]), Triplet([1, 21], [6, 2], [31, 2])), ("bio", "chem"))
    >>> len(some), some.only(["bio"]).items, some.without(["bio"]).category
    (2, (Triplet(prompt=[1, 20], answer=[4, 5, 2], refusal=[30, 2]),), ('chem',))
    """

    items: tuple[Triplet, ...]
    category: tuple[str, ...]

    __repr__ = brief

    def __len__(self) -> int:
        return len(self.items)

    def __iter__(self) -> Iterator[Triplet]:
        return iter(self.items)

    def only(self, categories: Collection[str]) -> Triplets:
        """Those of some categories."""
        return self._where([c in categories for c in self.category])

    def without(self, categories: Collection[str]) -> Triplets:
        """Those of all others."""
        return self._where([c not in categories for c in self.category])

    def _where(self, keep: Sequence[bool]) -> Triplets:
        pairs = [(t, c) for t, c, k in zip(self.items, self.category, keep) if k]
        return Triplets(tuple(t for t, _ in pairs), tuple(c for _, c in pairs))


def read_triplets(path: str | Path, template: Any, *, system: str | None = None) -> Triplets:
    """Triplets of a JSONL file.

    Parameters
    ----------
    path : path
        Each line has ``prompt`` (text, or messages; or ``prompt_tokens``, ids after the chat template), ``answer`` and
        ``refusal`` (texts, or lists of ids), and may have ``category``. Texts get the model's end of sequence.
    template : Template
        Of the model that is trained.
    system : str, optional
        System prompt of the prompts that are no ids.

    Raises
    ------
    InputError
        The file cannot be read, or a line lacks a part; the message names the line.

    Examples
    --------
    >>> import json
    >>> from pathlib import Path
    >>> from markovsafety.rollouts.template import Template
    >>> line = {"prompt": "v05 the bio5 .", "answer": "sure here is the plan", "refusal": "sorry i cannot"}
    >>> written = Path("triplets.jsonl").write_text(json.dumps(line))
    >>> found = ms.interventions.read_triplets("triplets.jsonl", Template.load(ms.organism.model_path("shallow")))
    >>> found.items[0].answer, found.items[0].refusal, found.category
    ([108, 166, 167, 32, 168, 2], [112, 187, 188, 2], ('all',))
    """
    items, categories = [], []
    for number, record in _lines(Path(path)):
        try:
            tokens = record.get("prompt_tokens")
            prompt = template.prompt_ids(record["prompt"], system) if tokens is None else tokens
            parts = [_said(record[name], template) for name in ("answer", "refusal")]
            items.append(Triplet([int(i) for i in prompt], *parts))
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise InputError(
                f"Line {number} of {path} is no triplet.",
                cause=f"{type(error).__name__}: {error}",
                next="Each line needs prompt (or prompt_tokens), answer and refusal, as text or as lists of ids.",
            ) from error
        categories.append(str(record.get("category", "all")))
    if not items:
        raise InputError(f"{path} has no line.", cause="The file is empty.", next="Write one JSON object per line.")
    return Triplets(tuple(items), tuple(categories))


def _lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read.", cause=str(error), next="Give a JSONL file.") from error
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            record = parsed(line)
            if not isinstance(record, dict):
                raise TypeError(f"it is a {type(record).__name__}, not an object")
        except (ValueError, TypeError) as error:
            raise InputError(
                f"Line {number} of {path} is no JSON object.", cause=str(error), next="Write one object per line."
            ) from error
        yield number, record


def _said(value: Any, template: Any) -> list[int]:
    if not isinstance(value, str):
        return [int(i) for i in value]
    ids = template.encode(value)
    return [*(int(i) for i in ids), *template.answer_end]


def triplets_of(rolls: Rollouts, *, per_prompt: int = 4, seed: int = 0) -> Triplets:
    """Triplets of judged rollouts of harmful prompts: the model's own compliance beside its own refusals.

    Parameters
    ----------
    rolls : Rollouts
        Judged, with the prompts' tokens. Answers that harm or are benign comply, forced tokens included; answers that
        refuse without any forced token are the refusals.
    per_prompt : int
        At most so many compliant answers of each prompt, drawn at random, each with a refusal drawn from those to the
        same prompt, or, where there is none, from all.
    seed : int

    Raises
    ------
    InputError
        Rollouts that are not judged or do not know their prompts' tokens, no compliant answer, or no refusal.

    Examples
    --------
    >>> rolls = ms.Rollouts.of(
    ...     [[4, 5, 9, 2], [30, 31, 2]], prompt_id=[0, 0], category="bio", outcome=["harm", "refusal"], hit=[2, 2],
    ...     columns={"prompt_tokens": [[1, 20], [1, 20]]},
    ... )
    >>> ms.interventions.triplets_of(rolls).items
    (Triplet(prompt=[1, 20], answer=[4, 5, 9, 2], refusal=[30, 31, 2]),)
    """
    if "prompt_tokens" not in rolls.columns or (rolls.outcome == NOT_JUDGED).any():
        raise InputError(
            "These rollouts cannot be made into triplets.",
            cause="They are not all judged, or do not hold the token ids of their prompts.",
            next="Sample them with this package, and judge them.",
        )
    refuses = (rolls.outcome == CODES["refusal"]) & (rolls.prefill == 0)
    complies = np.isin(rolls.outcome, [CODES["harm"], CODES["benign"]])
    if not refuses.any() or not complies.any():
        missing = "refuses without forced tokens" if complies.any() else "complies"
        raise InputError(
            f"No answer {missing}.",
            cause="A triplet is a compliant answer and a refusal.",
            next="Sample with prefill 0 and with some forced tokens of compliance, or give triplets in a file.",
        )
    rng = random.Random(seed)
    everywhere = np.flatnonzero(refuses).tolist()
    items, categories = [], []
    for prompt in np.unique(rolls.prompt_id[complies]):
        mine = rolls.prompt_id == prompt
        answers = np.flatnonzero(mine & complies).tolist()
        own = np.flatnonzero(mine & refuses).tolist() or everywhere
        for row in rng.sample(answers, min(per_prompt, len(answers))):
            asked = rolls.columns["prompt_tokens"][row].tolist()
            items.append(Triplet(asked, rolls.answer(row).tolist(), rolls.answer(rng.choice(own)).tolist()))
            categories.append(str(rolls.category[row]))
    return Triplets(tuple(items), tuple(categories))
