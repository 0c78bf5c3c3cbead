"""From a server's answer to the ids and log-probabilities of one rollout, with every reason to distrust it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ...errors import ModelError
from ..template import Template
from .server_key import Withheld
from .server_offers import TOKEN, Offers, Request, choice_of, listed_of

__all__ = ["Answer", "read_answer"]

ENDED = ("stop", "length")
ROUNDING = 1e-2
"""Log-probabilities (nats) above 0 by less are those of certain tokens, in bfloat16."""


@dataclass(frozen=True)
class Answer:
    """What was sampled, the end-of-sequence token included.

    Parameters
    ----------
    tokens : int32 array, shape (t,)
    logprob : float32 array, shape (t,)
        As the server gives them (nats); NaN where it gives none.
    drift : bool
        Whether ids made anew from text are known to differ from the sampled ones.
    chosen : float32 array, shape (t, ids)
        Probabilities of the ids that were chosen, before each token.
    """

    tokens: np.ndarray
    logprob: np.ndarray
    drift: bool
    chosen: np.ndarray


def read_answer(reply: dict[str, Any], request: Request, offers: Offers, template: Template, vocab_size: int) -> Answer:
    """The rollout in a server's answer.

    The end-of-sequence token is part of a rollout. vLLM and SGLang return it among the ids, though not in the text;
    where a server says that the answer stopped and does not return it, it is put there, without log-probability.

    Raises
    ------
    ValueError
        The answer is broken: asking again may help.
    ModelError
        The answer is whole and of something else than was asked for: another prompt, tokenizer or length.
    """
    choice = choice_of(reply)
    _check_prompt(choice, reply, request)
    reason = choice.get("finish_reason")
    if reason not in ENDED:
        raise ValueError(f"the answer ended by {reason!r}")
    stopped_by = choice.get("stop_reason", choice.get("matched_stop"))
    tokens, logprob, drift = _tokens(choice, reply, request, offers, template)
    tokens, logprob = _ended(tokens, logprob, reason, stopped_by, request, template)
    if len(tokens) == 0:
        raise ValueError("an answer without tokens")
    if tokens.min() < 0 or tokens.max() >= vocab_size:
        raise ModelError(
            f"the server answers with the id {int(tokens.max())}, the tokenizer in {template.folder} has {vocab_size}",
            cause="the tokenizer is not that of the served model",
            next="give tokenizer=<folder or hub id of the served model>",
        )
    if len(tokens) > request.max_tokens and not drift:
        raise ValueError(f"{len(tokens)} tokens where {request.max_tokens} were asked for")
    count = (reply.get("usage") or {}).get("completion_tokens") if offers.output == "text" else len(tokens)
    if reason == "length" and isinstance(count, int) and count < request.max_tokens:
        raise ModelError(
            f"the server cut an answer after {count} of {request.max_tokens} tokens",
            cause="its context is full, or it has a limit of its own: such an answer is not truncated where you asked",
            next="lower max_tokens, shorten the prompts, or start the server with a longer context",
        )
    return Answer(tokens, logprob, drift, _chosen(choice, len(tokens), request))


def _chosen(choice: dict[str, Any], size: int, request: Request) -> np.ndarray:
    """Probabilities of the chosen ids before each token."""
    names = [f"token_id:{i}" for i in request.chosen]
    steps = (listed_of(choice).get("top_logprobs") or [])[:size] if names else []
    if names and len(steps) < size:
        raise ModelError(
            f"the server gives log-probabilities of chosen tokens before {len(steps)} of {size} tokens",
            cause="it leaves out the end of the sequence, and a class mass is wanted before every token",
            next="leave out classes, or use a server that returns the end among its ids (vLLM)",
        )
    found = [[(step or {}).get(name) for name in names] for step in steps]
    if any(None in step for step in found):
        raise ValueError("not one log-probability per chosen id")
    logs = np.array(found, dtype=np.float64).reshape(size, len(names))
    if (logs > ROUNDING).any():
        raise _logits(float(logs.max()))
    return np.exp(np.minimum(logs, 0.0)).astype(np.float32)


def _check_prompt(choice: dict[str, Any], reply: dict[str, Any], request: Request) -> None:
    """Raise unless the server answered these prompt ids, as far as it tells."""
    echo, count = choice.get("prompt_token_ids"), (reply.get("usage") or {}).get("prompt_tokens")
    other = isinstance(echo, list) and echo != request.ids.tolist()
    if other or (isinstance(count, int) and count > 0 and count != len(request.ids)):
        raise ModelError(
            f"the server answered another prompt: {count} tokens instead of {len(request.ids)}",
            cause="it cuts long prompts, adds a token to them, or reads text by another tokenizer",
            next="give tokenizer=<folder or hub id of the served model>, or start the server without truncation",
        )


def _tokens(
    choice: dict[str, Any], reply: dict[str, Any], request: Request, offers: Offers, template: Template
) -> tuple[np.ndarray, np.ndarray, bool]:
    """Sampled ids, their log-probabilities, and whether the ids are known to be others."""
    listed = listed_of(choice)
    if offers.output == "text":
        ids, drift = _from_text(choice, reply, request, template)
    elif offers.output == "token_ids":
        ids, drift = choice.get("token_ids"), False
    else:
        found = [TOKEN.fullmatch(str(name)) for name in listed.get("tokens") or []]
        ids, drift = [int(match[1]) for match in found if match], False
        if len(ids) != len(found):
            raise ValueError("log-probabilities without token ids")
    if not isinstance(ids, list) or not all(isinstance(i, int) and abs(i) < 2**31 for i in ids):
        raise ValueError("token ids that are no list of integers")
    values = listed.get("token_logprobs")
    logprob = np.full(len(ids), np.nan, np.float32)
    if offers.logprob != "none" and offers.output != "text":
        if not isinstance(values, list) or len(values) != len(ids):
            raise ValueError("not one log-probability per token")
        logprob = np.array([np.nan if value is None else float(value) for value in values], np.float32)
        if (logprob > ROUNDING).any():
            raise _logits(float(logprob.max()))
    return np.array(ids, dtype=np.int32), logprob, drift


def _logits(largest: float) -> ModelError:
    return ModelError(
        f"the server gives {largest:.3g} as a log-probability",
        cause="it gives logits in their place (vLLM: --logprobs-mode raw_logits or processed_logits)",
        next="start it with --logprobs-mode raw_logprobs",
    )


def _from_text(
    choice: dict[str, Any], reply: dict[str, Any], request: Request, template: Template
) -> tuple[list[int], bool]:
    """Ids of the text by the local tokenizer, behind the prompt as far as that keeps the prompt's ids.

    The server's count of sampled tokens tells whether they can be the sampled ones. A special token at the very end
    that the text does not show is taken for the end of sequence.
    """
    text = choice.get("text")
    if not isinstance(text, str):
        raise ValueError("an answer without text")
    if isinstance(text, Withheld):
        raise ModelError(
            "the server answers with the API key",
            cause="it stands in the text that is to be the model's, which would be written",
            next="look into the server, or a proxy before it, that repeats what it was sent",
        )
    before = request.text or template.decode(request.ids, skip_special_tokens=False)
    whole = template.encode(before + text, add_special_tokens=bool(request.text))
    joined = np.array_equal(whole[: len(request.ids)], request.ids)
    ids = (whole[len(request.ids) :] if joined else template.encode(text)).tolist()
    count = (reply.get("usage") or {}).get("completion_tokens")
    if not isinstance(count, int):
        return ids, False
    hidden = count - len(ids)
    if hidden == 1 and choice.get("finish_reason") == "length" and request.eos_ids:
        return [*ids, _end(request, template)], False
    return ids, hidden not in ((0, 1) if choice.get("finish_reason") == "stop" else (0,))


def _ended(
    tokens: np.ndarray, logprob: np.ndarray, reason: str, stopped_by: Any, request: Request, template: Template
) -> tuple[np.ndarray, np.ndarray]:
    """Nothing behind the first token that ends an answer, and such a token where the server says that it stopped."""
    ends = np.isin(tokens, request.eos_ids)
    if ends.any():
        size = int(ends.argmax()) + 1
        return tokens[:size], logprob[:size]
    if reason != "stop":
        return tokens, logprob
    if not request.eos_ids or (isinstance(stopped_by, int | str) and stopped_by not in request.eos_ids):
        where = "a token" if stopped_by is None else repr(stopped_by)[:40]
        raise ModelError(
            f"the server ends answers at {where}, which ends none here",
            cause=f"answers end at {list(request.eos_ids)} by {template.folder}: this one would count as cut off",
            next="put eos_token_id into the generation_config.json of the tokenizer's folder",
        )
    end = stopped_by if isinstance(stopped_by, int) else _end(request, template)
    return np.append(tokens, np.int32(end)), np.append(logprob, np.float32(np.nan))


def _end(request: Request, template: Template) -> int:
    """The token that ends an answer, where the server does not name it."""
    return next((i for i in template.answer_end if i in request.eos_ids), request.eos_ids[0])
