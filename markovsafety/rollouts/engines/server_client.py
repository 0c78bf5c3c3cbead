"""Requests to a server that speaks the OpenAI completions protocol: the key, retries, and faults in words.

The official client does the waiting: it tries again after 408, 409, 429, any 5xx, a lost connection and a time-out,
after 0.5 s and twice as long each time up to 8 s, less a random quarter, or after what ``Retry-After`` asks for (up to
120 s; a server that asks for more is not tried again). What it cannot see, an answer that is half a JSON text or lacks
what was asked for, is tried again here in the same way.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar
from urllib.parse import urlsplit

from ...errors import InputError, ModelError
from . import is_url
from .server_key import KEYS, Key

__all__ = ["KEYS", "Connection", "ServerError", "Session"]

NO_KEY = "none"
FIRST_WAIT, LONGEST_WAIT = 0.5, 8.0
"""Seconds before the second try, and at most before any."""
SAID = 300
"""Letters of a server's own words that are kept."""
HINTS = {
    401: ("it wants another API key", f"export {KEYS[0]}=... (or {KEYS[1]}) and call again"),
    403: ("it does not let this API key in", f"export {KEYS[0]}=... (or {KEYS[1]}) with one that may, and call again"),
    404: ("it has no model of that name, or no such address", "give served=<name at the server>; URLs end in /v1"),
    429: ("too many requests at once, or a quota is used up", "lower concurrency, raise retries, or wait"),
}

T = TypeVar("T")


class ServerError(ModelError):
    """A server that did not give what was asked for, after all retries.

    Attributes
    ----------
    status : int or None
        Of HTTP; None if there was no answer, or one that made no sense.
    """

    status: int | None = None

    @property
    def final(self) -> bool:
        """Whether every other request of the kind would fail as well."""
        return self.status is not None and 400 <= self.status < 500 and self.status not in (408, 409, 429)


@dataclass(frozen=True)
class Connection:
    """Where a server is and how patient to be with it.

    Parameters
    ----------
    url : str
        Base address, such as ``http://127.0.0.1:8000/v1``.
    timeout : float
        Seconds until an answer must be there.
    retries : int
        Further tries of a request that failed.

    Raises
    ------
    InputError
        An address that is none, or that holds a password or a query: keys come from the environment only.
    """

    url: str
    timeout: float
    retries: int

    def __post_init__(self) -> None:
        try:
            parts = urlsplit(self.url)
            secret = bool(parts.username or parts.password or parts.query or parts.fragment)
            whole = is_url(self.url) and bool(parts.hostname) and (parts.port is None or parts.port > 0)
        except ValueError:  # a port that is no number
            secret, whole = "@" in self.url, False
        secret = secret or Key.of_environment().hide(self.url) != self.url
        if secret:  # not repeated in the message: it may be kept in a log
            raise InputError(
                "the server's URL holds a name, a password, a query or the API key",
                cause="the URL is written into provenance and messages, where no secret may stand",
                next=f"give the bare address, and the key in the environment: export {KEYS[0]}=...",
            )
        if not whole:
            raise InputError(
                f"{self.url!r} is no address of a server",
                cause="it must begin with http:// or https:// and name a host",
                next="give for instance http://127.0.0.1:8000/v1",
            )
        object.__setattr__(self, "url", self.url.rstrip("/"))

    @contextmanager
    def open(self) -> Iterator[Session]:
        """Requests are made within this context; leaving it ends those that are under way."""
        import openai

        key = Key.of_environment()
        with openai.OpenAI(
            base_url=self.url, api_key=key.value or NO_KEY, timeout=self.timeout, max_retries=self.retries
        ) as client:
            key.keep_out_of_logs()
            yield Session(self, client, key)


@dataclass(frozen=True)
class Session:
    """An open connection; its methods may be called from several threads. What they return does not hold the key."""

    to: Connection
    client: Any = field(repr=False)
    key: Key = field(repr=False)

    def models(self) -> list[dict[str, Any]]:
        """What the server says it serves (``GET /models``).

        Raises
        ------
        ServerError
            It cannot be reached or does not say; one retry, since it is asked before anybody has waited.
        """
        tries = min(2, self.to.retries + 1)
        try:
            text = self.client.with_options(max_retries=tries - 1).models.with_raw_response.list().http_response.text
            listed = self.key.hide(json.loads(text)["data"])
            return [dict(card) for card in listed if isinstance(card["id"], str)]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise self._fault("does not say what it serves", self._clean(error), "give served=<name>") from None
        except self._errors() as error:
            raise self._failed(error, tries) from None

    def complete(self, body: dict[str, Any], read: Callable[[dict[str, Any]], T]) -> T:
        """One completion.

        Parameters
        ----------
        body : dict
            The request, with ``model`` and ``prompt``.
        read : callable
            Makes something of the server's JSON object; a ValueError means that it is broken, and it is asked again.

        Raises
        ------
        ServerError
            After all retries, or at once where trying again cannot help.
        """
        rest = {name: value for name, value in body.items() if name not in ("model", "prompt")}
        broken = ""
        for attempt in range(self.to.retries + 1):
            if attempt:
                wait = min(FIRST_WAIT * 2.0 ** (attempt - 1), LONGEST_WAIT)
                time.sleep(wait * (1 - 0.25 * random.random()))
            try:
                raw = self.client.completions.with_raw_response.create(
                    model=self.key.shown(body["model"]), prompt=body["prompt"], extra_body=rest
                )
            except self._errors() as error:
                raise self._failed(error, self.to.retries + 1) from None
            try:
                return read(_object(raw.http_response.text, self.key))
            except ValueError as error:
                if isinstance(error, ModelError):  # said in words already
                    raise
                broken = self._clean(error)
        raise self._fault(
            "gave broken answers",
            f"{broken} ({self.to.retries + 1} tries)",
            "look into the server's log; a proxy in between may cut answers",
        )

    def _errors(self) -> Any:
        import openai

        return openai.APIError

    def _fault(self, fact: str, cause: str, next: str, status: int | None = None) -> ServerError:
        error = ServerError(f"the server at {self.to.url} {fact}", cause=cause, next=next)
        error.status = status
        return error

    def _failed(self, error: Any, tries: int) -> ServerError:
        """An error of the client in words, without the key, whatever the server repeats of it."""
        import openai

        after = f"after {tries} tries" if tries > 1 else "at the first try"
        if isinstance(error, openai.APITimeoutError):
            return self._fault(
                f"gave no answer within {self.to.timeout:g} s, {after}",
                "it is overloaded, hangs, or the answers are long",
                "raise timeout, lower concurrency or max_tokens",
            )
        if isinstance(error, openai.APIConnectionError):
            below = error.__cause__ or error
            return self._fault(
                "cannot be reached",
                f"{type(below).__name__}: {self._clean(below)}",
                "start it, wait until it has loaded its model, or correct the URL",
            )
        status: int | None = getattr(error, "status_code", None)
        cause, next = HINTS.get(status or 0, ("", "look into the server's log"))
        own = f"it says: {self._clean(_words(error))}"
        return self._fault(
            f"refuses the request (HTTP {status})" if status and status < 500 else f"fails (HTTP {status}), {after}",
            f"{cause}; {own}" if cause else own,
            next if cause or (status or 500) >= 500 else "correct what it names",
            status,
        )

    def _clean(self, words: Any) -> str:
        return self.key.hide(" ".join(str(words).split()))[:SAID]


def _words(error: Any) -> str:
    """What the server itself said: ``detail``, ``error`` or ``message`` of its JSON, else its text."""
    response = getattr(error, "response", None)
    said = response.text if response is not None else str(error)
    try:
        found = json.loads(said)
    except (ValueError, RecursionError):
        return said or str(error)
    while isinstance(found, dict) and (inner := [found[n] for n in ("detail", "error", "message") if found.get(n)]):
        found = inner[0]
    return str(found)


def _object(text: str, key: Key) -> dict[str, Any]:
    """A JSON object without the key, or a ValueError."""
    try:
        reply = key.hide(json.loads(text))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"no JSON: {error}") from error
    if not isinstance(reply, dict):
        raise ValueError(f"a JSON {type(reply).__name__} instead of an object")
    return reply
