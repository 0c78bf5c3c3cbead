"""The API key of a server: from the environment into requests, and from nowhere else into anything that is kept.

A server, or a proxy before it, may repeat the key: in an error, a header, the name of a model, a field of an answer.
So everything that a server says passes `Key.hide` before it is looked at, and what the libraries underneath log of it
passes `Key.filter`.
"""

from __future__ import annotations

import json
import logging
import os
import traceback
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote

from ...errors import InputError

__all__ = ["KEYS", "Key", "Withheld"]

KEYS = ("MARKOVSAFETY_API_KEY", "OPENAI_API_KEY")
"""Environment variables that may hold the API key; the first that is set counts, an empty one means none."""
HIDDEN = "***"
LEAST = 6
"""Letters of a key at least: shorter ones ("EMPTY", "none") stand for no key, and would be found in any text."""
LIBRARIES = ("openai", "httpx", "httpcore")
"""What makes the requests, and logs them where the program asks for it; a release may add a number to its name."""


class Withheld(str):
    """Words in which the key stood."""


@dataclass(frozen=True)
class Key:
    """An API key; empty: none.

    Parameters
    ----------
    value : str
    """

    value: str = field(repr=False)

    @classmethod
    def of_environment(cls) -> Key:
        """The key that requests carry.

        Raises
        ------
        InputError
            It cannot stand in a header. The message does not repeat it.
        """
        name = next((name for name in KEYS if name in os.environ), KEYS[0])
        value = os.environ.get(name, "").strip()
        if not (value.isascii() and value.isprintable() and " " not in value):
            raise InputError(
                f"the API key in {name} holds a blank, a line break or a letter beyond ASCII",
                cause="it is sent in a header, where these cannot stand",
                next=f"export {name}=... again, the key alone",
            )
        return cls(value)

    def hide(self, said: Any) -> Any:
        """What a server said (text, or JSON as plain data) without the key; texts that held it become `Withheld`."""
        if len(self.value) < LEAST:
            return said
        if isinstance(said, str):
            clean = said
            for form in self._forms():
                clean = clean.replace(form, HIDDEN)
            return said if clean == said else Withheld(clean)
        if isinstance(said, list):
            return [self.hide(item) for item in said]
        if isinstance(said, dict):
            return {self.hide(name): self.hide(item) for name, item in said.items()}
        return said

    def shown(self, name: str) -> str:
        """The name of a model as the server knows it, even if the key is part of it."""
        return name.replace(HIDDEN, self.value) if len(self.value) >= LEAST else name

    def _forms(self) -> list[str]:
        """The key as it is, and as texts of errors quote it; the longest first, since one may hold another."""
        escaped = self.value.replace("\\", "\\\\")
        forms = {self.value, escaped, escaped.replace("'", "\\'"), json.dumps(self.value)[1:-1]}
        return sorted({*forms, quote(self.value, safe="")}, key=len, reverse=True)

    def keep_out_of_logs(self) -> None:
        """From now on the libraries underneath log their records without the key; asked twice it is done once."""
        if len(self.value) >= LEAST:
            for name in [*LIBRARIES, *logging.root.manager.loggerDict]:
                if name.split(".")[0].rstrip("0123456789") in LIBRARIES:
                    logging.getLogger(name).addFilter(self)  # type: ignore[arg-type]

    def filter(self, record: logging.LogRecord) -> bool:
        """A record of `logging` with the key taken out of its message and its traceback."""
        said = record.getMessage()
        if (clean := self.hide(said)) != said:
            record.msg, record.args = str(clean), None
        if record.exc_info and record.exc_info[1] is not None:
            told = "".join(traceback.format_exception(record.exc_info[1])).rstrip()
            if (clean := self.hide(told)) != told:
                record.exc_info, record.exc_text = None, str(clean)
        return True
