"""What is asked: prompts, their categories and the prefixes to force, as token ids."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import InputError
from ..reading import making, parsed
from .rollouts import Rollouts

__all__ = ["Asked", "ask", "class_ids", "depths", "read_prompts", "unknown_words"]

KEYS = ("prompt", "category", "prefix", "prompt_id", "prompt_tokens")


@dataclass(frozen=True)
class Asked:
    """Prompts as token ids.

    Parameters
    ----------
    prompt_id : int64 array, shape (prompts,)
    category : object array of str, shape (prompts,)
    tokens : list of int32 arrays
        After the chat template.
    prefix : list of int32 arrays
        What may be forced, up to (not including) a token that would end the answer; empty where none was given.
    warnings : list of str
        What the reader should know: prompts with words that the tokenizer does not have.
    """

    prompt_id: np.ndarray
    category: np.ndarray
    tokens: list[np.ndarray]
    prefix: list[np.ndarray]
    warnings: list[str] = field(default_factory=list)


def ask(
    prompts: Any, template: Any, *, prefix: Any = None, prefill: Sequence[int] = (0,), system: str | None = None
) -> Asked:
    """Read prompts and prefixes and turn them into token ids.

    Parameters
    ----------
    prompts : list of str, list of dict, or path of a CSV or JSONL file
        A record has ``prompt`` (a text, or messages) or ``prompt_tokens`` (ids after the template), and may have
        ``category``, ``prefix`` (text or ids) and ``prompt_id``.
    template : Template
    prefix : list of (str or ids), dict of prompt_id -> (str or ids), or Rollouts, optional
        Goes before the records' own. Of rollouts: the first answer to the same prompt_id that is long enough, else
        the longest.
    prefill : sequence of int
        Forced lengths that every prefix must reach.
    system : str, optional
        System message put before every prompt.

    Raises
    ------
    InputError
        No prompts, a record that says nothing, or prefixes that are missing, too short, or would force the unknown
        token.
    """
    records = read_prompts(prompts)
    if not records:
        raise InputError("there are no prompts", cause="the list or file is empty", next="give at least one prompt")
    ids = np.array([_prompt_id(record, i) for i, record in enumerate(records)], dtype=np.int64)
    if len(np.unique(ids)) < len(ids):
        raise InputError(
            "two prompts have the same prompt_id",
            cause="answers are told apart, and their random numbers drawn, by prompt_id",
            next="number them, or leave prompt_id out",
        )
    category = np.empty(len(records), dtype=object)
    category[:] = [str(record.get("category") or "all") for record in records]
    tokens = [_prompt_tokens(record, i, template, system) for i, record in enumerate(records)]
    stop = sorted({*template.eos_ids, *getattr(template, "end_ids", ())})
    given = _prefixes(records, ids, prefix, max(prefill), stop)
    forced = [_before(_ids(p, template, f"the prefix of prompt {i}"), stop) for i, p in enumerate(given)]
    _long_enough(given, forced, prefill)
    _spelled(given, max(prefill), template)
    texts = [None if record.get("prompt_tokens") is not None else record["prompt"] for record in records]
    unknown = [[] if t is None else template.unknown(template.prompt_text(t, system)) for t in texts]
    return Asked(ids, category, tokens, forced, unknown_words(unknown, "prompts"))


def unknown_words(found: Sequence[Sequence[tuple[int, str]]], what: str) -> list[str]:
    """A sentence on the texts among `found` (one entry per text, of `Template.unknown`) that have unknown words."""
    rows = [i for i, pieces in enumerate(found) if pieces]
    if not rows:
        return []
    words = list(dict.fromkeys(piece for i in rows for _, piece in found[i]))
    return [
        f"{len(rows)} of {len(found)} {what} hold words that the tokenizer does not have, for example "
        f"{_quoted(words)} (the first at index {rows[0]}): the model sees its unknown token instead"
    ]


def depths(prefill: Any) -> list[int]:
    """Forced lengths as a list of distinct numbers >= 0."""
    made = np.atleast_1d(np.asarray(list(prefill) if isinstance(prefill, Iterable) else prefill))
    if made.ndim != 1 or not len(made) or made.dtype.kind not in "iu":
        raise InputError(
            f"prefill is {prefill!r}",
            cause="it must be one whole number, or a flat and non-empty list of them",
            next="give numbers of forced tokens, such as (0, 5, 10)",
        )
    if (made < 0).any() or len(np.unique(made)) < len(made):
        raise InputError(f"prefill is {prefill!r}", cause="a depth is negative, or stands twice", next="drop it")
    return [int(k) for k in made]


def class_ids(classes: Mapping[str, Any] | None, template: Any) -> dict[str, np.ndarray]:
    """Token classes as arrays of distinct ids; a text must be one token."""
    made: dict[str, np.ndarray] = {}
    if not isinstance(classes, Mapping | None):
        raise InputError(
            f"classes are {type(classes).__name__}",
            cause="every class has a name and a list of tokens",
            next="give a dict, for instance {'bad': ['word', 17]}",
        )
    for name, members in (classes or {}).items():
        ids: list[int] = []
        _check_members(name, members, template)
        for member in members:
            found = template.encode(member) if isinstance(member, str) else [member]
            if len(found) != 1:
                raise InputError(
                    f"class {name!r}: {member!r} is {len(found)} tokens",
                    cause="a class is a set of single tokens, for its mass is added up before every token",
                    next="give the ids of the tokens",
                )
            ids.append(int(found[0]))
        if not isinstance(name, str) or not name or not ids:
            raise InputError(
                f"class {name!r} has {len(ids)} tokens",
                cause="a class is a non-empty name with a non-empty set of tokens",
                next="give each class a name and at least one id",
            )
        made[name] = np.unique(np.array(ids, dtype=np.int32))
    return made


def _check_members(name: str, members: Any, template: Any) -> None:
    """Raise unless these are texts and ids, each text known to the tokenizer."""
    whole = isinstance(members, Iterable) and not isinstance(members, str | Mapping)
    if not whole or any(not isinstance(m, str | int | np.integer) or isinstance(m, bool) for m in members):
        raise InputError(
            f"class {name!r} is {str(members)[:60]!r}",
            cause="a class is a list of single tokens, each a text or an id",
            next="give for instance ['word', 17]",
        )
    unknown = [m for m in members if isinstance(m, str) and template.unknown(m)]
    if unknown:
        raise InputError(
            f"class {name!r}: the tokenizer does not have {_quoted(unknown)}",
            cause="it would become the unknown token, whose probability is not that of the word",
            next="take words of the vocabulary, or give ids",
        )


def read_prompts(prompts: Any) -> list[dict[str, Any]]:
    """Prompts as records, from a list of texts or records, or a CSV or JSONL file; nothing is encoded yet."""
    if isinstance(prompts, str | Path):
        return _read(Path(prompts))
    if not isinstance(prompts, Sequence):
        raise InputError(
            f"prompts are {type(prompts).__name__}",
            cause="one prompt would look like a sequence of letters, so prompts come in a list or a file",
            next="give a list of str or dict, or a file's path",
        )
    records = []
    for i, item in enumerate(prompts):
        if not isinstance(item, str | Mapping):
            raise InputError(
                f"prompt {i} is {type(item).__name__}",
                cause="a prompt is a text or a record of fields",
                next="give a str, or a dict with 'prompt'",
            )
        records.append({"prompt": item} if isinstance(item, str) else dict(item))
    return records


def _read(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        raise InputError(
            f"{str(path)[:200]} is not a file",
            cause="a single str is taken as the path of a CSV or JSONL file",
            next="put one prompt in a list, or correct the path",
        )
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix == ".csv":
            return [dict(row) for row in csv.DictReader(io.StringIO(text, newline=""), strict=True)]
        if path.suffix not in (".jsonl", ".ndjson"):
            raise InputError(
                f"{path} is neither CSV nor JSONL",
                cause=f"the format is told by the end of the name, and {path.suffix or 'no ending'} is not known",
                next="name it *.csv or *.jsonl",
            )
        records = []
        for number, line in enumerate(text.split("\n"), 1):  # splitlines also cuts at U+2028, which JSON allows
            if line.strip():
                record = parsed(line)
                if not isinstance(record, dict):
                    raise InputError(
                        f"{path}, line {number} is no JSON object",
                        cause="every line must be a record with named fields",
                        next='write {"prompt": "..."}',
                    )
                records.append(record)
        return records
    except InputError:
        raise
    except (csv.Error, ValueError) as error:
        raise InputError(f"{path} cannot be read", cause=str(error), next="write one record per line") from error


def _prompt_id(record: Mapping[str, Any], index: int) -> int:
    value = record.get("prompt_id", index)
    try:
        if value is None or value == "":
            return index
        if isinstance(value, bool) or int(value) != float(value) or not -(2**63) <= int(value) < 2**63:
            raise ValueError(value)
        return int(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise InputError(
            f"prompt {index} has prompt_id {value!r}",
            cause="prompts are numbered by 64-bit integers",
            next="give an integer",
        ) from error


def _prompt_tokens(record: Mapping[str, Any], index: int, template: Any, system: str | None) -> np.ndarray:
    if record.get("prompt_tokens") is not None:
        return _ids(record["prompt_tokens"], None, f"prompt_tokens of prompt {index}")
    prompt = record.get("prompt")
    if not prompt:
        raise InputError(
            f"prompt {index} is empty",
            cause=f"a record needs 'prompt'; this one has {', '.join(map(str, record)) or 'nothing'}",
            next=f"known fields are {', '.join(KEYS)}",
        )
    with making(f"prompt {index} is no text and no conversation", "give messages with role and content"):
        return template.prompt_ids(prompt, system)


def _ids(value: Any, template: Any, what: str) -> np.ndarray:
    """Text through the tokenizer, without special tokens; ids as they are."""
    if value is None:
        return np.zeros(0, np.int32)
    if isinstance(value, str) and template is not None:
        return template.encode(value)
    try:
        ids = np.asarray(value)
    except (ValueError, OverflowError):  # lists of different lengths
        ids = np.asarray(None)
    if ids.size == 0 and ids.ndim == 1:
        return np.zeros(0, np.int32)
    if ids.ndim != 1 or ids.dtype.kind not in "iu" or ids.min() < 0 or ids.max() > np.iinfo(np.int32).max:
        raise InputError(
            f"{what} is {str(value)[:60]!r}",
            cause="it is neither a text nor a flat sequence of ids from 0 to 2**31 - 1",
            next="give token ids, or a text",
        )
    return ids.astype(np.int32)


def _prefixes(
    records: list[dict[str, Any]], ids: np.ndarray, prefix: Any, longest: int, stop: Sequence[int]
) -> list[Any]:
    """The prefix of every prompt as given: text, ids, or None."""
    if prefix is None:
        return [None if record.get("prefix") in (None, "") else record["prefix"] for record in records]
    if isinstance(prefix, Rollouts):
        return _from_rollouts(prefix, ids, longest, stop)
    if isinstance(prefix, Mapping):
        return [prefix.get(int(i)) for i in ids]
    size = 1 if isinstance(prefix, str) or not hasattr(prefix, "__len__") else len(prefix)
    if isinstance(prefix, str) or not isinstance(prefix, Iterable) or size != len(records):
        raise InputError(
            f"prefix has {size} entries for {len(records)} prompts",
            cause=f"a list of prefixes is matched to the prompts by its order; this is {type(prefix).__name__}",
            next="give one per prompt, a dict by prompt_id, or the rollouts of another model",
        )
    return list(prefix)


def _from_rollouts(rolls: Rollouts, ids: np.ndarray, longest: int, stop: Sequence[int]) -> list[Any]:
    best: dict[int, np.ndarray] = {}
    wanted = set(ids.tolist())
    for prompt, answer in zip(rolls.prompt_id.tolist(), rolls.answers()):
        if prompt in wanted and len(best.get(prompt, ())) < longest:
            usable = _before(answer, stop)
            if prompt not in best or len(usable) > len(best[prompt]):
                best[prompt] = usable
    return [best.get(i) for i in ids.tolist()]


def _before(ids: np.ndarray, stop: Sequence[int]) -> np.ndarray:
    """Up to, not including, the first token that ends an answer: what follows it is no part of this answer."""
    ends = np.isin(ids, np.asarray(stop, dtype=np.int64))
    return ids[: int(ends.argmax())] if ends.any() else ids


def _long_enough(given: list[Any], forced: list[np.ndarray], prefill: Sequence[int]) -> None:
    deepest = max(prefill)
    if deepest == 0:
        return
    none = [i for i, value in enumerate(given) if value is None]
    if none:
        raise InputError(
            f"prefill {deepest} asks for forced tokens, but {len(none)} of {len(given)} prompts have no prefix "
            f"(prompts {_some(none)})",
            cause="forced tokens are taken from the beginning of a prompt's prefix",
            next="give prefix=..., a field 'prefix' in every prompt, or prefill=(0,)",
        )
    lengths = np.array([len(ids) for ids in forced])
    short = np.flatnonzero(lengths < deepest)
    if len(short):
        raise InputError(
            f"{len(short)} of {len(given)} prefixes are shorter than prefill {deepest} (prompts {_some(short)})",
            cause="a prefix counts up to the first token that would end the answer",
            next=f"the largest prefill that every prompt reaches is {lengths.min()}; use that, or longer prefixes",
        )


def _spelled(given: list[Any], deepest: int, template: Any) -> None:
    """Raise if a forced token would be the unknown one in place of a word."""
    texts = [(i, value) for i, value in enumerate(given) if isinstance(value, str)] if deepest else []
    found = [(i, piece) for i, text in texts for at, piece in template.unknown(text) if at < deepest]
    if found:
        words, rows = [piece for _, piece in found], list(dict.fromkeys(i for i, _ in found))
        raise InputError(
            f"{len(rows)} of {len(given)} prefixes hold words that the tokenizer does not have: {_quoted(words)} "
            f"(prompts {_some(rows)})",
            cause="the unknown token would be forced in their place, which is another answer",
            next="write the prefix in words of the vocabulary, give ids, or ask for a smaller prefill",
        )


def _quoted(words: Iterable[str]) -> str:
    distinct = list(dict.fromkeys(words))
    return ", ".join(repr(word) for word in distinct[:5]) + (", ..." if len(distinct) > 5 else "")


def _some(rows: Sequence[int] | np.ndarray) -> str:
    return ", ".join(str(int(i)) for i in rows[:5]) + (", ..." if len(rows) > 5 else "")
