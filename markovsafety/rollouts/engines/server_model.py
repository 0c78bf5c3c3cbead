"""Which model a server serves, and the tokenizer and limits that belong to it."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

from ...errors import InputError, ModelError
from ..template import Template
from .server_client import ServerError, Session

__all__ = ["chosen", "limits", "template_of"]

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
FILES = ["tokenizer.json", "*tokenizer_config.json", "special_tokens_map.json", "*config.json", "*.jinja"]
"""What is fetched of a model on the hub: words, not weights."""
UNLIMITED = 1 << 20


def chosen(session: Session, served: str | None) -> dict[str, Any]:
    """What the server says of the model, at least its ``id``.

    Raises
    ------
    InputError
        It serves several and none is named.
    ModelError
        It cannot be reached, or serves none of that name.
    """
    try:
        cards = session.models()
    except ServerError as error:
        if error.status in (None, 401, 403):
            raise
        if served is None:
            hint = "give served=<name> (--served) if it is only its list of models that fails"
            raise ServerError(error.fact, cause=error.cause, next=hint) from None
        cards = []  # whether it has this one is seen at the first request
    served = served if served is None else session.key.hide(served)  # as the cards are
    names = [card["id"] for card in cards]
    if served is None:
        if len(names) != 1:
            raise InputError(
                f"the server at {session.to.url} lists {len(names)} models: {', '.join(names[:5]) or 'none'}",
                cause="only where it lists one is it clear which to ask",
                next="give served=<name> (--served)",
            )
        return cards[0]
    return next((card for card in cards if card["id"] == served), {"id": served, "listed": names})


def template_of(tokenizer: str | Path | None, card: dict[str, Any], url: str) -> Template:
    """The tokenizer and chat template of the served model.

    Raises
    ------
    InputError
        Nothing says where they are.
    ModelError
        They cannot be loaded.
    """
    places = [tokenizer] if tokenizer is not None else [card.get("root"), card["id"]]
    for place in map(str, filter(None, places)):
        if Path(place).is_dir():
            return Template.load(place)
        if HUB_ID.fullmatch(place):
            return _from_hub(place, _lists(card))
    if tokenizer is not None:
        raise ModelError(
            f"there is no tokenizer {str(tokenizer)!r}",
            cause="it is neither a folder nor a hub id",
            next="correct the path, or give a hub id: owner/name",
        )
    raise InputError(
        f"the tokenizer of {card['id']!r} at {url} is not known",
        cause="prompts become token ids here, and its name is neither a folder on this machine nor a hub id"
        + _lists(card),
        next="give tokenizer=<folder or hub id of the model> (--tokenizer)",
    )


def _lists(card: dict[str, Any]) -> str:
    """Of a name that the server does not list: what it does."""
    listed = card.get("listed")
    return f"; the server lists {', '.join(listed[:5])}, not {card['id']}" if listed else ""


def _from_hub(name: str, listed: str) -> Template:
    import huggingface_hub

    try:
        folder = huggingface_hub.snapshot_download(name, allow_patterns=FILES)
    except Exception as error:  # the hub's client raises whatever its own libraries do
        said = (str(error).strip().splitlines() or ["no message"])[0]
        raise ModelError(
            f"the tokenizer of {name} cannot be fetched from the hub",
            cause=f"{type(error).__name__}: {said}{listed}",
            next="give tokenizer=<folder> with its tokenizer.json",
        ) from error
    return dataclasses.replace(Template.load(folder), folder=folder)


def limits(template: Template, card: dict[str, Any]) -> tuple[int, int]:
    """Size of the vocabulary and number of positions, as far as server or configuration say."""
    path = Path(template.folder) / "config.json"
    config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    config = config.get("text_config") or config
    vocabulary = max(int(config.get("vocab_size") or 0), template.vocab_size)
    told = [card.get("max_model_len"), config.get("max_position_embeddings")]
    return vocabulary, next((n for n in told if type(n) is int and 0 < n < 2**63), UNLIMITED)
