"""What a server offers, found out by asking it: ids or text in, ids or text out, which log-probabilities.

Servers of one protocol differ in what they add to it, and drop what they do not know with an error, with a line in
their log or without a word. So nothing is taken from a server's name: a few requests of one token are made when an
engine is opened, and what comes back decides.

vLLM and SGLang (from July 2026) take a prompt of ids and give ids back (``return_token_ids``; end-of-sequence token
included); earlier versions of vLLM write ids into the log-probabilities (``return_tokens_as_token_ids``). vLLM from
July 2026 gives log-probabilities of chosen ids before every sampled token (``logprob_token_ids``), of which class
masses are sums. ``transformers serve`` (5.23) takes and gives text only, no log-probabilities, and takes the most
probable token unless its own field ``generation_config`` says otherwise.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ...errors import ModelError
from ..template import Template
from .server_client import ServerError, Session

__all__ = ["MOST_CHOSEN", "STYLES", "TOKEN", "Offers", "Request", "choice_of", "listed_of", "offers", "text_for"]

TOKEN = re.compile(r"token_id:(\d+)")
MOST_CHOSEN = 128
"""Ids that a server gives log-probabilities of at most; vLLM's own limit (``MAX_LOGPROB_TOKEN_IDS``)."""
WORDS = 24
"""Words of the text by which two tokenizers are compared."""
SAME, CERTAIN = 0.05, -0.02
"""Log-probabilities (nats) closer than the first are equal; one above the second cannot tell (the token is certain)."""


@dataclass(frozen=True)
class Request:
    """One completion to ask for: ids after the chat template, and how to sample (see `Job`)."""

    served: str
    ids: np.ndarray
    max_tokens: int
    temperature: float
    top_p: float
    seed: int
    eos_ids: tuple[int, ...]
    text: str = ""
    """What the ids spell, for a server that takes no ids."""
    chosen: tuple[int, ...] = ()
    """Ids whose log-probabilities are wanted before every sampled token."""


def _ids(request: Request) -> dict[str, Any]:
    """The fields of the OpenAI protocol; whatever would bend the model's distribution by a server's default is off."""
    return {
        "model": request.served,
        "prompt": [int(i) for i in request.ids],
        "max_tokens": request.max_tokens,
        "temperature": request.temperature,
        "top_p": request.top_p,
        "seed": request.seed,
        "logprobs": 1,
        "n": 1,
        "frequency_penalty": 0.0,
        "presence_penalty": 0.0,
    }


def _extended(request: Request) -> dict[str, Any]:
    """With the fields that vLLM and SGLang add; sampling defaults of the model's generation_config.json are off too."""
    return _ids(request) | {
        "top_k": -1,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "stop_token_ids": list(request.eos_ids),
        "return_token_ids": True,
        "return_tokens_as_token_ids": True,
        "skip_special_tokens": False,
        **({"logprob_token_ids": list(request.chosen)} if request.chosen else {}),
    }


def _configured(request: Request) -> dict[str, Any]:
    """Text with the field of ``transformers serve``, which samples only if this says so."""
    drawn = {"do_sample": True, "temperature": request.temperature, "top_p": request.top_p, "top_k": 0}
    config = {
        **(drawn if request.temperature > 0 else {"do_sample": False}),
        "max_new_tokens": request.max_tokens,
        "eos_token_id": list(request.eos_ids),
    }
    named = ("model", "max_tokens", "seed")
    body = {name: value for name, value in _ids(request).items() if name in named}
    return body | {"prompt": request.text, "generation_config": json.dumps(config)}


def _plain_text(request: Request) -> dict[str, Any]:
    return _ids(request) | {"prompt": request.text}


STYLES: dict[str, Callable[[Request], dict[str, Any]]] = {
    "extended": _extended,
    "ids": _ids,
    "generation_config": _configured,
    "text": _plain_text,
}
"""Ways to put a request, the best first."""


@dataclass(frozen=True)
class Offers:
    """What a server takes and gives.

    Parameters
    ----------
    style : str
        Name in `STYLES` of the best request that it accepts.
    output : {"token_ids", "logprobs", "text"}
        Where the ids of an answer come from; with "text" they are made anew by the local tokenizer.
    logprob : {"raw", "temperature", "processed", "unknown", "none"}
        Log-probabilities of the model's own law, of that after temperature, of that after temperature and top-p; not
        known which (the server was too certain to tell), or not given.
    checked : bool
        Whether the local tokenizer was held against the server's.
    chosen : bool
        Whether it gives log-probabilities of chosen ids.
    """

    style: str
    output: str
    logprob: str
    checked: bool
    chosen: bool = False

    @property
    def prompt(self) -> str:
        """What a prompt is sent as: "ids" or "text"."""
        return "ids" if self.style in ("extended", "ids") else "text"

    def told(self) -> dict[str, Any]:
        """For provenance, and what must be the same for a run to be continued."""
        return {"prompt": self.prompt, **{name: value for name, value in asdict(self).items() if name != "chosen"}}


def offers(session: Session, served: str, template: Template) -> Offers:
    """Ask a server what it offers.

    Raises
    ------
    ServerError
        It accepts no request.
    ModelError
        It reads a text as other ids than the local tokenizer: the tokenizer is not the model's.
    """
    words = _common_words(template)
    ids = template.encode(words, add_special_tokens=True)

    def ask(style: str, **changed: Any) -> dict[str, Any]:
        told = {"served": served, "ids": ids, "text": words, "max_tokens": 1, "temperature": 1.0, "top_p": 1.0}
        request = Request(**{**told, "seed": 0, "eos_ids": template.end_ids, **changed})
        return session.complete(STYLES[style](request), _whole)

    style, reply = _best(ask)
    choice = choice_of(reply)
    listed = listed_of(choice)
    given, names = listed.get("token_logprobs"), listed.get("tokens") or []
    if isinstance(choice.get("token_ids"), list):
        output = "token_ids"
    elif names and all(TOKEN.fullmatch(str(name)) for name in names):
        output = "logprobs"
    else:
        output = "text"
    by_ids = STYLES[style] in (_extended, _ids)
    read = _read_as_text(session, style, served, words, template) if by_ids else reply
    checked = read is not None and _same_ids(read, words, template, session.to.url)
    kind = _kind(ask, style, choice) if given else "none"
    return Offers(style, output, kind, checked, style == "extended" and bool(given) and _gives_chosen(ask, ids))


def _best(ask: Callable[..., dict[str, Any]]) -> tuple[str, dict[str, Any]]:
    """The first style that the server accepts, and its answer."""
    *better, last = STYLES
    for style in better:
        try:
            return style, ask(style)
        except ServerError as error:
            if error.status not in (400, 422):
                raise
    return last, ask(last)  # what the server says of the barest request is the matter


def _gives_chosen(ask: Callable[..., dict[str, Any]], ids: np.ndarray) -> bool:
    """Whether log-probabilities of chosen ids come: of three where the best alone was asked for too."""
    some = tuple(dict.fromkeys(int(i) for i in ids))[:3]
    if len(some) < 3:  # the sampled and the best id could be these
        return False
    try:
        top = listed_of(choice_of(ask("extended", chosen=some))).get("top_logprobs") or [{}]
    except ServerError as error:
        if error.status not in (400, 422):
            raise
        return False
    return {f"token_id:{i}" for i in some} <= {*(top[0] or ())}


def _read_as_text(session: Session, style: str, served: str, words: str, template: Template) -> dict[str, Any] | None:
    """The answer to a prompt of text, which tells how the server reads it; None if it takes ids only."""
    request = Request(served, np.zeros(0, np.int32), 1, 1.0, 1.0, 0, template.end_ids, words)
    try:
        return session.complete(STYLES[style](request) | {"prompt": words}, _whole)
    except ServerError as error:
        if error.status not in (400, 422):
            raise
        return None


def _same_ids(reply: dict[str, Any], words: str, template: Template, url: str) -> bool:
    """Whether it could be seen that the server reads the words as the local tokenizer does; raises if it does not."""
    ours = [template.encode(words, add_special_tokens=special).tolist() for special in (True, False)]
    theirs = choice_of(reply).get("prompt_token_ids")
    count = (reply.get("usage") or {}).get("prompt_tokens")
    if isinstance(theirs, list):
        same = theirs in ours
    elif isinstance(count, int) and count > 0:
        same = count in map(len, ours)
        theirs = f"{count} tokens"
    else:
        return False
    if not same:
        raise ModelError(
            f"the tokenizer in {template.folder} is not that of the model at {url}",
            cause=f"{words[:40]!r}... is {str(theirs)[:60]} there, {str(ours[0])[:60]} here",
            next="give tokenizer=<folder or hub id of the served model>",
        )
    return True


def _kind(ask: Callable[..., dict[str, Any]], style: str, first: dict[str, Any]) -> str:
    """Which law the log-probabilities are of: the most probable token's, under other temperatures and top-p."""
    plain = _top(first)
    if plain is None or plain > CERTAIN:
        return "unknown"
    warm, narrow = _top(choice_of(ask(style, temperature=2.0))), _top(choice_of(ask(style, top_p=1e-3)))
    if warm is None or narrow is None:
        return "unknown"
    tempered, cut = plain - warm > SAME, narrow - plain > min(SAME, -plain / 2)
    return "processed" if tempered and cut else "temperature" if tempered else "unknown" if cut else "raw"


def _top(choice: dict[str, Any]) -> float | None:
    """Log-probability of the most probable first token."""
    first = next(iter(listed_of(choice).get("top_logprobs") or ()), None)
    return max(map(float, first.values())) if first else None


def choice_of(reply: dict[str, Any]) -> dict[str, Any]:
    """The one choice of an answer; a ValueError if it is not there, or what stands in it has another type."""
    choices = reply.get("choices")
    if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
        count = len(choices) if isinstance(choices, list) else "no"
        raise ValueError(f"{count} choices instead of 1")
    for name, value in (("usage", reply.get("usage")), ("logprobs", choices[0].get("logprobs"))):
        if value is not None and not isinstance(value, dict):
            raise ValueError(f"{name} is no object")
    listed_of(choices[0])
    return choices[0]


def listed_of(choice: dict[str, Any]) -> dict[str, Any]:
    """The field ``logprobs``, empty where there is none; a ValueError where it holds something else than numbers."""
    listed = choice.get("logprobs") or {}
    for name in ("tokens", "token_logprobs", "top_logprobs"):
        if not isinstance(listed.get(name) or [], list):
            raise ValueError(f"{name} is no list")
    top = listed.get("top_logprobs") or []
    if not all(step is None or isinstance(step, dict) for step in top):
        raise ValueError("top_logprobs holds no objects")
    numbers = [*(listed.get("token_logprobs") or []), *(value for step in top if step for value in step.values())]
    if not all(n is None or isinstance(n, float) or (type(n) is int and abs(n) < 2**53) for n in numbers):
        raise ValueError("log-probabilities that are no numbers")
    return listed


def _whole(reply: dict[str, Any]) -> dict[str, Any]:
    choice_of(reply)
    return reply


def _common_words(template: Template) -> str:
    """Plain words from all over the vocabulary, on which every build of the same tokenizer agrees."""
    known = sorted((i, name) for name, i in template.tokenizer.get_vocab(with_added_tokens=False).items())
    special = set(template.tokenizer.get_added_tokens_decoder())
    some = known[:: max(1, len(known) // (50 * WORDS))]
    spelled = (template.decode([i]).strip() for i, _ in some if i not in special)
    words = list(dict.fromkeys(word for word in spelled if word.isascii() and word.isalnum())) or ["hello"]
    return " ".join(words[:: max(1, len(words) // WORDS)][:WORDS])


def text_for(ids: np.ndarray, template: Template) -> str:
    """A text that a server with the same tokenizer reads as these ids, special tokens added as it does by default.

    Raises
    ------
    ModelError
        There is none: these ids cannot be sent as text.
    """
    whole = template.decode(ids, skip_special_tokens=False)
    first = template.decode(ids[:1], skip_special_tokens=False)
    for text in (whole, whole.removeprefix(first).lstrip(), whole.removeprefix(first)):
        if np.array_equal(template.encode(text, add_special_tokens=True), ids):
            return text
    raise ModelError(
        "a prompt with its prefill cannot be sent to this server",
        cause=f"it takes text only, and no text is read as the ids {ids[:8].tolist()}...",
        next="use a server that takes token ids (vLLM, SGLang), or another prefill",
    )
