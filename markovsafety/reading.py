"""JSON from files that may be damaged or hostile, and what is made of it: whatever fails becomes one kind of error."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from .errors import InputError, MarkovsafetyError

__all__ = ["making", "parsed"]


def parsed(text: str | bytes) -> Any:
    """JSON as plain data.

    Raises
    ------
    ValueError
        It is no JSON, no Unicode, or nested deeper than Python goes.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


@contextmanager
def making(fact: str, next: str, raises: type[MarkovsafetyError] = InputError) -> Iterator[None]:
    """A block that makes something of what a file says: fields that lack, or have the wrong type or size, are reported.

    Parameters
    ----------
    fact : str
        Such as "edit.safetensors holds no edit".
    next : str
    raises : type of MarkovsafetyError
    """
    try:
        with np.errstate(all="ignore"):  # numbers may overflow on the way to where they are refused
            yield
    except MarkovsafetyError:
        raise
    except KeyError as error:
        raise raises(fact, cause=f"it lacks {error}", next=next) from error
    except (TypeError, ValueError, IndexError, AttributeError, ArithmeticError, RecursionError, MemoryError) as error:
        raise raises(fact, cause=str(error) or type(error).__name__, next=next) from error
