"""Engine replay: existing logs become Rollouts, and a model may score them.

A log is JSONL, one answer per line:

    {"prompt_id": 3, "tokens": [5, 9, 2]}
    {"prompt": "...", "text": "...", "finish_reason": "stop", "category": "chemistry"}

``tokens`` are the ids of the answer (forced ones first, ``prefill`` of them); ``text`` is encoded by a tokenizer
instead, and the provenance says so. Lines with the same ``prompt_id``, ``prompt_tokens`` or ``prompt`` belong to one
prompt. ``outcome``, ``hit``, ``weight``, ``category`` and ``logprob`` (one number per token, or per sampled token) may
be there too.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import InputError
from ...outcomes import CODES, NOT_JUDGED, OUTCOMES
from ...reading import making, parsed
from ..asked import class_ids, unknown_words
from ..provenance import versions
from ..rollouts import Ragged, Rollouts, is_aligned
from ..template import Template
from . import Engine, Job, open_engine

__all__ = ["cut", "replay", "score"]

TEXTS = ("text", "response", "answer", "completion")
STOPPED = ("stop", "eos", "eos_token", "end_turn", "stop_sequence")


def replay(
    log: Any,
    *,
    template: Any = None,
    eos_ids: Sequence[int] | None = None,
    scorer: Any = None,
    classes: Mapping[str, Any] | None = None,
) -> Rollouts:
    """Rollouts of a log.

    Parameters
    ----------
    log : str, Path, or list of dict
        JSONL file, or its records.
    template : Template or model folder, optional
        Tokenizer; needed where the log has text. Prompts are encoded with its chat template.
    eos_ids : sequence of int, optional
        Ids that end an answer; by default the template's.
    scorer : Engine or model folder, optional
        Computes log-probabilities (and class masses) of the answers by one forward pass; its tokenizer is the default
        template.
    classes : dict of name -> list of (id or str), optional
        As in `sample`; needs a scorer.

    Returns
    -------
    Rollouts
        Not judged, unless the log says outcomes.

    Raises
    ------
    InputError
        A line that is no record, or lacks what is needed; the message names the line.
    """
    records, source = _records(log)
    engine = open_engine("auto", scorer) if isinstance(scorer, str | Path) else scorer
    if template is None and engine is not None:
        template = engine.tokenizer
    template = Template.load(template) if isinstance(template, str | Path) else template
    if eos_ids is None and template is not None:
        eos_ids = sorted({*template.eos_ids, *template.end_ids})
    rows = [_row(record, where, template) for where, record in records]
    prompts = [_prompt(record, where, template) for where, record in records]
    columns: dict[str, Any] = {}
    if rows and all(ids is not None for _, ids in prompts):
        columns["prompt_tokens"] = Ragged.of([ids for _, ids in prompts])
    if rows and all("logprob" in record for _, record in records):
        columns["logprob"] = np.concatenate(
            [_logprob(record, row, where) for (where, record), row in zip(records, rows)]
        )
    if any("weight" in record for _, record in records):
        columns["weight"] = [record.get("weight", 1.0) for _, record in records]
    encoded = any("tokens" not in record for _, record in records)
    unknown = _unknown(records, template)
    rolls = Rollouts.of(
        [row["tokens"] for row in rows],
        prompt_id=_prompt_ids([key for key, _ in prompts], records),
        category=[str(record.get("category") or "all") for _, record in records],
        prefill=[row["prefill"] for row in rows],
        outcome=[row["outcome"] for row in rows],
        hit=[row["hit"] for row in rows],
        columns=columns,
        provenance={
            "engine": {"name": "replay", **source},
            "tokens": "encoded from text: not sure to be the ids that were sampled" if encoded else "as logged",
            **({} if template is None else {"template": template.hashes()}),
            "sampling": {"eos_ids": None if eos_ids is None else [int(i) for i in eos_ids]},
            **({"warnings": unknown} if unknown else {}),
            "versions": versions(),
        },
    )
    if engine is not None:
        return score(rolls, engine, classes)
    if classes:
        raise InputError("class masses need a model", cause="a log holds sampled tokens only", next="give scorer=model")
    return rolls


def score(rolls: Rollouts, engine: Engine, classes: Mapping[str, Any] | None = None) -> Rollouts:
    """Log-probabilities and class masses of given answers under a model, by one forward pass.

    Parameters
    ----------
    rolls : Rollouts
        With the column ``prompt_tokens``.
    engine : Engine
        One that can score.
    classes : dict of name -> list of (id or str), optional

    Raises
    ------
    InputError
        The engine cannot score, or the prompts are not known.
    """
    if not callable(getattr(engine, "score", None)):
        raise InputError(
            f"the engine {getattr(engine, 'name', engine)!r} cannot score given answers",
            cause="it has no method score(job, answers)",
            next='use open_engine("transformers", model)',
        )
    if "prompt_tokens" not in rolls.columns:
        raise InputError(
            "the answers cannot be scored without their prompts",
            cause="the rollouts have no column prompt_tokens",
            next="log the prompts (text needs a template), or their ids",
        )
    groups: dict[bytes, int] = {}
    prompts = list(rolls.columns["prompt_tokens"])
    prompt_of = np.array([groups.setdefault(ids.tobytes(), len(groups)) for ids in prompts], dtype=np.int64)
    answers = list(rolls.answers())
    job = Job(
        prompts=[np.frombuffer(key, dtype=np.int32) for key in groups],
        prompt_of=prompt_of,
        forced=[answer[:k] for answer, k in zip(answers, rolls.prefill)],
        keys=np.zeros(len(rolls), dtype=np.uint64),
        max_tokens=max(1, int((rolls.lengths - rolls.prefill).max(initial=1))),
        classes=class_ids(classes, engine.tokenizer),
    )
    output = engine.score(job, answers)  # pyright: ignore[reportAttributeAccessIssue]
    columns = {**rolls.columns, "logprob": Ragged.of(output.logprob, np.float32).flat}
    columns |= {f"mass_{name}": Ragged.of(mass, np.float32).flat for name, mass in output.mass.items()}
    told = {"scored": engine.describe(), "logprob": {"logprob": "raw: of the scoring model, temperature 1, nats"}}
    return rolls.replace(columns=columns, provenance={**rolls.provenance, **told})


def cut(rolls: Rollouts, *, n: int, max_tokens: int) -> Rollouts:
    """The first n rollouts of every prompt and prefill, at most max_tokens sampled tokens of each.

    An answer that is shortened has lost its verdict, unless its hit is still there.
    """
    seen: dict[tuple[int, int], int] = {}
    kept = []
    for i, cell in enumerate(zip(rolls.prompt_id.tolist(), rolls.prefill.tolist())):
        seen[cell] = seen.get(cell, 0) + 1
        if seen[cell] <= n:
            kept.append(i)
    rolls = rolls[np.array(kept, dtype=np.int64)]
    lengths = np.minimum(rolls.lengths, rolls.prefill.astype(np.int64) + max_tokens)
    if (lengths == rolls.lengths).all():
        return rolls
    row = np.repeat(np.arange(len(rolls)), rolls.lengths)
    keep = np.arange(len(rolls.tokens)) - rolls.offsets[:-1][row] < lengths[row]
    gone = (lengths < rolls.lengths) & ~((rolls.hit >= 0) & (rolls.hit < lengths))
    columns = {name: value[keep] if is_aligned(name) else value for name, value in rolls.columns.items()}
    columns.pop("text", None)  # it told the whole answer
    return rolls.replace(
        tokens=rolls.tokens[keep],
        offsets=np.concatenate([[0], np.cumsum(lengths)]),
        outcome=np.where(gone, NOT_JUDGED, rolls.outcome),
        hit=np.where(gone, -1, rolls.hit),
        columns=columns,
    )


def _records(log: Any) -> tuple[list[tuple[str, dict[str, Any]]], dict[str, Any]]:
    """Records with a name for where each stands, and what to say about the source."""
    if not isinstance(log, str | Path | Iterable):
        raise InputError(
            f"{type(log).__name__} is no log",
            cause="a log is a JSONL file or a list of records",
            next='give its path, or [{"prompt_id": 0, "tokens": [...]}, ...]',
        )
    if not isinstance(log, str | Path):
        made = [(f"record {i}", record) for i, record in enumerate(log)]
        source: dict[str, Any] = {"source": "records"}
    else:
        path = Path(log)
        try:
            data = path.read_bytes()
            lines = data.decode("utf-8-sig").split("\n")
            made = [(f"{path}, line {i}", parsed(line)) for i, line in enumerate(lines, 1) if line.strip()]
        except OSError as error:
            raise InputError(f"{path} cannot be read", cause=str(error), next="give a JSONL file") from error
        except ValueError as error:
            raise InputError(f"{path} is not JSONL", cause=str(error), next="write one JSON object per line") from error
        source = {"source": str(path), "sha256": hashlib.sha256(data).hexdigest()}
    for where, record in made:
        if not isinstance(record, Mapping):
            raise InputError(
                f"{where} is no JSON object",
                cause="every answer is a record with named fields",
                next='write {"prompt_id": 0, "tokens": [...]}',
            )
    return made, source


def _row(record: Mapping[str, Any], where: str, template: Any) -> dict[str, Any]:
    """Ids, prefill, outcome code and hit of one record."""
    prefill, hit = record.get("prefill") or 0, record.get("hit")
    if "tokens" in record:
        tokens = _token_ids(record["tokens"], where)
    else:
        tokens = _encoded(record, where, template)
        if prefill or hit is not None:
            raise InputError(
                f"{where} has text together with prefill or hit",
                cause="they count tokens, and text encoded again may have others",
                next="log token ids",
            )
    name = record.get("outcome")
    if name is not None and (not isinstance(name, str) or name not in CODES):
        raise InputError(
            f"{where}: unknown outcome {name!r}",
            cause="an outcome is one of a fixed list, or null for not judged",
            next=f"rename it to one of {', '.join(OUTCOMES)}",
        )
    for field, value in (("prefill", prefill), ("hit", 0 if hit is None else hit)):
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= len(tokens):
            raise InputError(
                f"{where}: {field} is {value!r} in an answer of {len(tokens)} tokens",
                cause="prefill counts the forced tokens, hit is the index of a token, both from 0",
                next="give a whole number that lies within the answer, or leave the field out",
            )
    outcome = NOT_JUDGED if name is None else CODES[name]
    if name == "benign" and hit is None and len(tokens):  # it ended by itself, at its last token
        hit = len(tokens) - 1
    return {"tokens": tokens, "prefill": prefill, "outcome": outcome, "hit": -1 if hit is None else hit}


def _token_ids(value: Any, where: str) -> np.ndarray:
    whole = isinstance(value, list) and all(isinstance(i, int) and not isinstance(i, bool) for i in value)
    if not whole or any(not 0 <= i < 2**31 for i in value):
        raise InputError(
            f"{where}: tokens are {str(value)[:60]}",
            cause="it is no list of whole numbers from 0 to 2**31 - 1",
            next="give a list of token ids >= 0",
        )
    return np.array(value, dtype=np.int32)


def _encoded(record: Mapping[str, Any], where: str, template: Any) -> np.ndarray:
    text = next((record[name] for name in TEXTS if isinstance(record.get(name), str)), None)
    if text is None:
        raise InputError(
            f"{where} has no answer",
            cause=f"its fields are {', '.join(map(str, record)) or 'none'}",
            next=f"it needs tokens (ids), or one of {', '.join(TEXTS)}",
        )
    if template is None:
        raise InputError(
            f"{where} holds text, and there is no tokenizer",
            cause="text becomes token ids by the tokenizer of the model that answered",
            next="give template=<model folder>",
        )
    tokens = template.encode(text)
    if record.get("finish_reason") in STOPPED and template.end_ids:
        own = template.special_tokens.get("eos_token")
        end = template.tokenizer.token_to_id(own) if own else None
        tokens = np.append(tokens, np.int32(template.end_ids[0] if end is None else end))
    return tokens.astype(np.int32)


def _unknown(records: list[tuple[str, dict[str, Any]]], template: Any) -> list[str]:
    """What to say about texts of the log with words that the tokenizer does not have."""
    if template is None:
        return []
    asked = [r["prompt"] for _, r in records if r.get("prompt_tokens") is None and r.get("prompt")]
    said = [next(r[k] for k in TEXTS if isinstance(r.get(k), str)) for _, r in records if "tokens" not in r]
    return [
        *unknown_words([template.unknown(template.prompt_text(prompt)) for prompt in asked], "prompts of the log"),
        *unknown_words([template.unknown(text) for text in said], "answers of the log"),
    ]


def _prompt(record: Mapping[str, Any], where: str, template: Any) -> tuple[str, np.ndarray | None]:
    """What tells a prompt from another, and its ids if they are known."""
    ids = None
    if record.get("prompt_tokens") is not None:
        ids = _token_ids(record["prompt_tokens"], where)
    elif record.get("prompt") and template is not None:
        with making(f"{where}: the prompt is no text and no conversation", "give messages with role and content"):
            ids = template.prompt_ids(record["prompt"])
    for field in ("prompt_id", "prompt_tokens", "prompt"):
        if record.get(field) is not None:
            return json.dumps([field, record[field]], sort_keys=True), ids
    raise InputError(
        f"{where} does not say which prompt it answers",
        cause="answers to one prompt are not independent, so they must be known as such",
        next="add prompt_id, prompt_tokens or prompt",
    )


def _prompt_ids(keys: list[str], records: list[tuple[str, dict[str, Any]]]) -> list[int]:
    given = ["prompt_id" in record and record["prompt_id"] is not None for _, record in records]
    if not any(given):
        numbers: dict[str, int] = {}
        return [numbers.setdefault(key, len(numbers)) for key in keys]
    for (where, record), there in zip(records, given):
        value = record.get("prompt_id")
        if not there or isinstance(value, bool) or not isinstance(value, int) or not -(2**63) <= value < 2**63:
            raise InputError(
                f"{where}: prompt_id is {value!r}",
                cause="prompts are told apart by 64-bit integers, in the whole log or not at all",
                next="give an integer in every line, or in none",
            )
    return [int(record["prompt_id"]) for _, record in records]


def _logprob(record: Mapping[str, Any], row: Mapping[str, Any], where: str) -> np.ndarray:
    try:
        with np.errstate(over="ignore"):
            values = np.array([np.nan if v is None else v for v in record["logprob"]], dtype=np.float32)
    except (TypeError, ValueError, OverflowError) as error:
        raise InputError(f"{where}: logprob is no list of numbers", cause=str(error), next="drop it") from error
    total, forced = len(row["tokens"]), row["prefill"]
    if len(values) == total - forced:
        values = np.concatenate([np.full(forced, np.nan, np.float32), values])
    if len(values) != total or values.ndim != 1:
        raise InputError(
            f"{where}: {len(values)} log-probabilities for {total} tokens",
            cause="they are matched to the tokens one by one",
            next="give one per token, or one per sampled token",
        )
    return values
