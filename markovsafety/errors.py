"""Errors that say the fact, the cause and the next action, and carry what was already computed."""

from __future__ import annotations

from typing import Any

__all__ = ["InputError", "MarkovsafetyError", "ModelError", "UntrustedError"]


class MarkovsafetyError(ValueError):
    """Base of every error of the package.

    Parameters
    ----------
    fact : str
        What is wrong, in one sentence.
    cause : str
        Why it happens, as far as is known.
    next : str
        What the reader can do about it. Like the cause, every error says it.
    partial : object
        Whatever had been computed when the error was raised; None if nothing was.

    Attributes
    ----------
    fact, cause, next, partial
        The parameters.
    """

    exit_code = 2

    def __init__(self, fact: str, *, cause: str, next: str, partial: Any = None):
        self.fact, self.cause, self.next, self.partial = fact, cause, next, partial
        lines = [fact]
        if cause:
            lines.append(f"  cause: {cause}")
        if next:
            lines.append(f"  next:  {next}")
        super().__init__("\n".join(lines))

    def __reduce__(self) -> Any:
        """Copies, also those sent from one process to another, keep what the error says; notes stay behind."""
        return _again, (type(self), self.fact, self.cause, self.next, self.partial)


class InputError(MarkovsafetyError):
    """The input is not what the function is defined for: a row that does not sum to one, a file that is not Parquet."""


class ModelError(InputError):
    """A model folder that cannot be used: missing, half-written, of an unsupported architecture, giving NaN."""


class UntrustedError(MarkovsafetyError):
    """A number was computed but must not be believed; `partial` holds it."""

    exit_code = 1


def _again(kind: type[MarkovsafetyError], fact: str, cause: str, next: str, partial: Any) -> MarkovsafetyError:
    return kind(fact, cause=cause, next=next, partial=partial)
