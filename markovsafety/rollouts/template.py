"""Chat templates: from text or messages to prompt ids, with `tokenizers` and `jinja2` alone.

The ids are those of `apply_chat_template` of transformers: the template is rendered in the same sandbox (blocks
trimmed, `raise_exception`, `strftime_now`, `tojson`, the generation tag ignored) with the tokenizer's special tokens,
then encoded without adding special tokens again. A folder without a template gives plain text, encoded as the tokenizer
does it.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import numpy as np
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import AddedToken, Tokenizer

from ..errors import InputError, ModelError
from ..reading import making, parsed

__all__ = ["Message", "Template", "behind"]

Message = Mapping[str, Any]
NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
MARK = "zq"
"""Stands for the assistant's words when looking for the token that ends its turn."""


@dataclass(frozen=True)
class Template:
    """A tokenizer and the chat template that comes with it.

    Parameters
    ----------
    tokenizer : tokenizers.Tokenizer
        Without truncation and padding.
    chat_template : str or None
        Jinja source; None for a model without one.
    special_tokens : dict of name -> str
        ``bos_token`` and the like, as the template sees them.
    eos_ids : tuple of int
        Ids that end an answer: those of generation_config.json (else config.json), and the tokenizer's own.
    folder : str
        Where it was read from.
    system : str or None
        System message of prompts for which none is given; by default the template's own, if it has one.

    Attributes
    ----------
    kind : str
        "chat" if there is a chat template, else "plain".
    end_ids : tuple of int
        `eos_ids` and the special tokens that the chat template puts after an assistant's message.

    Examples
    --------
    >>> template = ms.rollouts.Template.load(ms.organism.model_path("shallow"))
    >>> template, template.prompt_text("tell me .")
    (Template(chat, 199 ids), '<bos><user> tell me . <end> <turn> <assistant>')
    """

    tokenizer: Tokenizer
    chat_template: str | None
    special_tokens: dict[str, Any]
    eos_ids: tuple[int, ...]
    folder: str = ""
    tokenizer_hash: str = ""
    system: str | None = None
    end_ids: tuple[int, ...] = field(default=(), init=False)

    def __post_init__(self):
        object.__setattr__(self, "end_ids", tuple(sorted({*self.eos_ids, *self._turn_end()})))

    @classmethod
    def load(cls, folder: str | Path, vocab_size: int | None = None) -> Template:
        """Read tokenizer, chat template and end-of-sequence ids of a model folder.

        Parameters
        ----------
        folder : str or Path
            Model folder in Hugging Face format.
        vocab_size : int, optional
            Rows of the model's embedding; by default ``vocab_size`` of config.json, if that says one.

        Raises
        ------
        ModelError
            No tokenizer.json, a file that is not JSON, or a tokenizer with ids that the model does not have.
        """
        folder = Path(folder)
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise ModelError(
                f"{path} is missing",
                cause="the folder was copied only in part, or holds a tokenizer in another format",
                next="copy it too, or write it with AutoTokenizer.from_pretrained(folder).save_pretrained(folder)",
            )
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises bare Exception
            raise ModelError(f"{path} is not a tokenizer", cause=str(error), next="copy the file again") from error
        tokenizer.no_truncation()
        tokenizer.no_padding()
        with making(f"the tokenizer of {folder} is damaged", "copy its files again", ModelError):
            return cls._of(folder, tokenizer, vocab_size)

    @classmethod
    def _of(cls, folder: Path, tokenizer: Tokenizer, vocab_size: int | None) -> Template:
        settings = _json(folder / "tokenizer_config.json")
        special = _special_tokens(settings, _json(folder / "special_tokens_map.json"))
        _complete(tokenizer, settings, special)
        config = _json(folder / "config.json")
        template = cls(
            tokenizer=tokenizer,
            chat_template=_chat_template(folder, settings),
            special_tokens=special,
            eos_ids=_eos_ids(_json(folder / "generation_config.json"), config, tokenizer, special),
            folder=str(folder),
            tokenizer_hash=hashlib.sha256((folder / "tokenizer.json").read_bytes()).hexdigest(),
        )
        size = vocab_size if vocab_size is not None else config.get("vocab_size")
        template._check_size(size)
        return template

    def __repr__(self) -> str:
        return f"Template({self.kind}, {self.vocab_size} ids)"

    @property
    def kind(self) -> str:
        return "plain" if self.chat_template is None else "chat"

    @property
    def vocab_size(self) -> int:
        """One more than the largest id of the tokenizer."""
        return 1 + max(self.tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)

    @property
    def answer_end(self) -> tuple[int, ...]:
        """The token that ends an answer in training data; () if there is none.

        What the chat template puts behind an assistant's message (``<|im_end|>``, ``<|eot_id|>``), which need not be
        the first of `eos_ids`; without a template, the tokenizer's own end of sequence.
        """
        turn = sorted(self._turn_end())
        name = self.special_tokens.get("eos_token")
        own = None if name is None else self.tokenizer.token_to_id(name)
        return tuple(turn[:1] or ([] if own is None else [own]) or self.eos_ids[:1])

    def hashes(self) -> dict[str, str | None]:
        """SHA-256 of the template text and of tokenizer.json, for provenance."""
        text = None if self.chat_template is None else hashlib.sha256(self.chat_template.encode()).hexdigest()
        return {"template": text, "tokenizer": self.tokenizer_hash}

    def render(
        self, messages: str | Sequence[Message], system: str | None = None, *, add_generation_prompt: bool = True
    ) -> str:
        """The text of a conversation, up to where the assistant begins to speak.

        Raises
        ------
        InputError
            The template refuses the conversation (for example a system message it does not know).
        """
        if self.chat_template is None:
            raise InputError(
                f"{self.folder} has no chat template",
                cause="messages are put together by the model's own template only",
                next="give plain text",
            )
        _check_prompt(messages, system)
        chat = [{"role": "user", "content": messages}] if isinstance(messages, str) else [dict(m) for m in messages]
        if system is None and chat and chat[0].get("role") != "system":
            system = self.system
        if system is not None:
            chat = [{"role": "system", "content": system}, *chat]
        chat = [{k: v for k, v in message.items() if v is not None} for message in chat]
        if not chat:
            raise InputError(
                "the conversation is empty",
                cause="there is no message, so there is nothing to answer",
                next="give at least one message",
            )
        try:
            return _compiled(self.chat_template).render(
                messages=chat,
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self.special_tokens,
            )
        except Exception as error:  # it is a program, and can fail in any way
            raise InputError(
                f"the chat template of {self.folder} refuses the conversation",
                cause=str(error),
                next="change the messages",
            ) from error

    def prompt_ids(self, prompt: str | Sequence[Message], system: str | None = None) -> np.ndarray:
        """Ids of a prompt, ready for the assistant's first token.

        Parameters
        ----------
        prompt : str or list of {"role", "content"}
            One user message, or a conversation.
        system : str, optional
            System message put before it.

        Returns
        -------
        int32 array, shape (tokens,)

        Raises
        ------
        InputError
            Messages for a model without chat template, or a conversation that the template refuses.
        """
        plain = self.chat_template is None
        return self.encode(self.prompt_text(prompt, system), add_special_tokens=plain)

    def prompt_text(self, prompt: str | Sequence[Message], system: str | None = None) -> str:
        """The text that `prompt_ids` encodes: the rendered conversation, or the plain prompt."""
        if self.chat_template is not None:
            return self.render(prompt, system)
        _check_prompt(prompt, system)
        if not isinstance(prompt, str) or (self.system if system is None else system) is not None:
            raise InputError(
                f"{self.folder} has no chat template, so it takes plain text only",
                cause="messages and a system message have a place only in a chat template",
                next="give the prompt as one string, without a system message",
            )
        return prompt

    def encode(self, text: str, *, add_special_tokens: bool = False) -> np.ndarray:
        """Ids of a text, int32; special tokens written out in it are recognised, none is added unless asked for."""
        try:
            ids = self.tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        except Exception as error:  # tokenizers raises bare Exception
            raise InputError(
                f"the tokenizer of {self.folder} cannot encode {str(text)[:60]!r}",
                cause=str(error),
                next="give another text, or copy tokenizer.json again",
            ) from error
        return np.array(ids, dtype=np.int32)

    def unknown(self, text: str) -> list[tuple[int, str]]:
        """Pieces of a text that become the tokenizer's unknown token, each with its index among the ids.

        The unknown token written out is meant as such and is none of them; a tokenizer that spells any text by bytes
        knows every piece.
        """
        name = getattr(self.tokenizer.model, "unk_token", None) or self.special_tokens.get("unk_token")
        unknown = None if name is None else self.tokenizer.token_to_id(name)
        if unknown is None:
            return []
        found = self.tokenizer.encode(text, add_special_tokens=False)
        pieces = [(i, text[slice(*found.offsets[i])].strip()) for i, token in enumerate(found.ids) if token == unknown]
        return [(i, piece) for i, piece in pieces if piece != name]

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """Text of some ids."""
        return self.tokenizer.decode([int(i) for i in ids], skip_special_tokens=skip_special_tokens)

    def _turn_end(self) -> set[int]:
        """The special tokens that directly follow an assistant's words (``<|eot_id|>``, ``<|im_end|>`` ...)."""
        if self.chat_template is None:
            return set()
        chat = [{"role": "user", "content": MARK}, {"role": "assistant", "content": MARK}]
        try:
            text = self.render(chat, add_generation_prompt=False)
        except InputError:
            return set()
        ids = self.encode(text[text.rfind(MARK) + len(MARK) :]) if MARK in text else np.zeros(0, np.int32)
        known = self.tokenizer.get_added_tokens_decoder()
        return {int(ids[0])} if len(ids) and int(ids[0]) in known and known[int(ids[0])].special else set()

    def _check_size(self, vocab_size: int | None) -> None:
        if vocab_size is not None and self.vocab_size > vocab_size:
            raise ModelError(
                f"the tokenizer has ids up to {self.vocab_size - 1}, the model a vocabulary of {vocab_size}",
                cause="tokenizer and weights belong to different models",
                next=f"put the model's own tokenizer.json into {self.folder}",
            )


def behind(provenance: Mapping[str, Any], fact: str, next: str) -> Template:
    """The template of the model that rollouts came from, read from its folder and held against their hash.

    Raises
    ------
    InputError
        With `fact` and `next` if the folder is not known or gone; if its tokenizer is another one.
    """
    folder = provenance.get("model", {}).get("path")
    if folder is None or not Path(folder).is_dir():
        cause = "the rollouts do not say which model folder answered, or it is gone"
        raise InputError(fact, cause=cause, next=next)
    template = Template.load(folder)
    expected = provenance.get("template", {}).get("tokenizer")
    if expected not in (None, template.hashes()["tokenizer"]):
        raise InputError(
            f"the tokenizer in {folder} is not the one that these rollouts came from",
            cause="its hash differs from the one in the rollouts' provenance, so the same ids spell other text",
            next="give template=<folder of the model that answered>",
        )
    return template


def _check_prompt(prompt: Any, system: Any) -> None:
    """Raise unless this is a text or a conversation."""
    messages = isinstance(prompt, Sequence) and all(isinstance(m, Mapping) for m in prompt)
    if not (isinstance(prompt, str) or messages):
        raise InputError(
            f"the prompt {str(prompt)[:60]!r} is {type(prompt).__name__}",
            cause="a prompt is one text, or a list of messages with role and content",
            next="give a str, or [{'role': 'user', 'content': ...}]",
        )
    if not (system is None or isinstance(system, str)):
        raise InputError(
            f"system is {type(system).__name__}",
            cause="the system message is one text, put before every prompt",
            next="give a str, or leave it out",
        )


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = parsed(path.read_bytes())
    except ValueError as error:
        raise ModelError(f"{path} is not JSON", cause=f"half-written? {error}", next="copy the file again") from error
    if not isinstance(value, dict):
        raise ModelError(
            f"{path} holds no JSON object",
            cause="it is JSON, but not a record with named fields",
            next="copy the file again",
        )
    return value


def _text(token: Any) -> str | None:
    return token.get("content") if isinstance(token, dict) else token


def _special_tokens(settings: Mapping[str, Any], named: Mapping[str, Any]) -> dict[str, Any]:
    """Special tokens by name; special_tokens_map.json (older folders) fills what tokenizer_config.json leaves open."""
    found = {name: _text(settings.get(name, named.get(name))) for name in NAMED}
    special: dict[str, Any] = {name: text for name, text in found.items() if text is not None}
    extra = settings.get("extra_special_tokens")
    if isinstance(extra, dict):
        special.update({name: _text(token) for name, token in extra.items()})
    more = settings.get("additional_special_tokens", named.get("additional_special_tokens"))
    if more:
        special["additional_special_tokens"] = [_text(token) for token in more]
    return special


def _complete(tokenizer: Tokenizer, settings: Mapping[str, Any], special: Mapping[str, Any]) -> None:
    """Add the tokens that only tokenizer_config.json knows."""
    for index, token in sorted(settings.get("added_tokens_decoder", {}).items(), key=lambda item: int(item[0])):
        if tokenizer.token_to_id(token["content"]) is None:
            flags = {k: bool(token.get(k, False)) for k in ("single_word", "lstrip", "rstrip", "normalized", "special")}
            tokenizer.add_tokens([AddedToken(token["content"], **flags)])
            if tokenizer.token_to_id(token["content"]) != int(index):
                raise ModelError(
                    f"the added token {token['content']!r} should have id {index}",
                    cause="tokenizer.json and tokenizer_config.json disagree",
                    next="save the tokenizer again",
                )
    named = [text for name, text in special.items() if name in NAMED]
    for text in [*named, *special.get("additional_special_tokens", [])]:
        if tokenizer.token_to_id(text) is None:
            tokenizer.add_special_tokens([AddedToken(text, special=True)])


def _chat_template(folder: Path, settings: Mapping[str, Any]) -> str | None:
    """chat_template.jinja goes before the entry of tokenizer_config.json; of several named ones, "default"."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    entry = settings.get("chat_template")
    if isinstance(entry, list):
        entry = {item["name"]: item["template"] for item in entry}
    if isinstance(entry, dict):
        if "default" not in entry:
            raise ModelError(
                f"{folder} has chat templates named {sorted(entry)}, none of them 'default'",
                cause="which of them to use is not known",
                next="save the one to use as chat_template.jinja",
            )
        entry = entry["default"]
    return entry


def _eos_ids(
    generation: Mapping[str, Any], config: Mapping[str, Any], tokenizer: Tokenizer, special: Mapping[str, Any]
) -> tuple[int, ...]:
    entry = generation.get("eos_token_id", config.get("eos_token_id"))
    ids = set(entry) if isinstance(entry, list) else set() if entry is None else {entry}
    own = tokenizer.token_to_id(special["eos_token"]) if special.get("eos_token") else None
    return tuple(sorted(int(i) for i in ids | ({own} if own is not None else set())))


class _Generation(jinja2.ext.Extension):
    """``{% generation %}`` marks the assistant's words for training masks; here its body is rendered as it is."""

    tags = {"generation"}  # noqa: RUF012  the attribute's name and type are jinja2's

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body).set_lineno(line)


@functools.lru_cache(maxsize=64)
def _compiled(source: str) -> jinja2.Template:
    """The template in the environment that transformers gives it."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment.from_string(source)


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)
