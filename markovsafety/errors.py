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

    Examples
    --------
    One base catches whatever the package refuses:

    >>> try:
    ...     ms.hitting_probability(ms.toy.ruin(4), "fire")
    ... except ms.MarkovsafetyError as error:
    ...     print(error.fact)
    ...     print(error.next)
    The target 'fire' is neither an outcome nor a state of this chain.
    Use one of these names, a state label, indices or a mask.
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
    """The input is not what the function is defined for: a row that does not sum to one, a file that is not Parquet.

    Examples
    --------
    >>> ms.Chain([[0.5, 0.4], [0.0, 1.0]], {"harm": 1})
    Traceback (most recent call last):
        ...
    markovsafety.errors.InputError: The row of state 0 in P sums to 0.9.
      cause: A row is a probability law: its entries sum to one within 1e-09.
      next:  Normalise the row, or use Chain.from_counts for counts.
    """


class ModelError(InputError):
    """A model folder that cannot be used: missing, half-written, of an unsupported architecture, giving NaN.

    Examples
    --------
    >>> ms.sample("no-such-folder", ["how do i do v01"], n=8, max_tokens=64, engine="jax")
    Traceback (most recent call last):
        ...
    markovsafety.errors.ModelError: no-such-folder is not a folder
      cause: wrong path, or a copy that stopped half-way
      next:  give a model folder
    """


class UntrustedError(MarkovsafetyError):
    """A number was computed but must not be believed; `partial` holds it.

    Examples
    --------
    Three hits are too few to tell how rare a rare event is; what they do tell is kept:

    >>> from markovsafety.evidence import rare
    >>> try:
    ...     rare.weighted(np.arange(100) < 3, np.full(100, np.log(1e-3)))
    ... except ms.UntrustedError as error:
    ...     print(error.fact)
    ...     print(error.partial)
    The effective sample size is 3.0, of 100 rollouts; below 10 no interval can be trusted.
    P(harm) = 3e-05   95 % [6.32e-06, 8.73e-05]
        because: sampling 4e-5; judge, lumping, model, truncation, rounding not assessed
    """

    exit_code = 1


def _again(kind: type[MarkovsafetyError], fact: str, cause: str, next: str, partial: Any) -> MarkovsafetyError:
    return kind(fact, cause=cause, next=next, partial=partial)
