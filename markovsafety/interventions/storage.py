"""Arrays and what is said about them in one safetensors file; the words are JSON in its header. Nothing is pickled."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from ..errors import InputError
from ..files import atomic
from ..reading import parsed

__all__ = ["checked", "read_tensors", "typed", "write_tensors"]

LARGEST = 1e30
"""Numbers beyond it are damage: their squares and sums would leave float32."""


def write_tensors(path: str | Path, kind: str, arrays: Mapping[str, np.ndarray], about: Mapping[str, Any]) -> None:
    """Write arrays and a JSON-able description, whole or not at all.

    Parameters
    ----------
    path : path
        A .safetensors file.
    kind : str
        What the file holds, such as "edit"; `read_tensors` asks for it.
    arrays : mapping of name -> array
    about : mapping
        JSON-able.
    """
    header = {"markovsafety": kind, "about": json.dumps(dict(about), sort_keys=True)}
    kept = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    with atomic(path) as part:
        save_file(kept, part, metadata=header)


def read_tensors(path: str | Path, kind: str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Arrays and description of a file that `write_tensors` wrote.

    Raises
    ------
    InputError
        The file is missing, no safetensors file, or holds something else.
    """
    again = f"give a file that holds a markovsafety {kind}"
    if not Path(path).is_file():
        raise InputError(f"{path} is not there", cause="no file has this name", next=again)
    try:
        with safe_open(path, framework="numpy") as file:
            header = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  the file is no mapping
    except Exception as error:  # a damaged file can fail anywhere, in a number format that numpy lacks for one
        raise InputError(f"{path} is no safetensors file", cause=str(error), next=again) from error
    if header.get("markovsafety") != kind:
        found = header.get("markovsafety")
        cause = f"it holds a markovsafety {found}" if found else "its header names no markovsafety content"
        raise InputError(f"{path} holds no {kind}", cause=cause, next=again)
    try:
        about = parsed(header["about"])
        if not isinstance(about, dict):
            raise ValueError("it is no JSON object")
    except (KeyError, ValueError) as error:
        raise InputError(f"{path} has no readable description", cause=str(error), next=again) from error
    return arrays, about


def checked(array: np.ndarray, *shape: int | None, name: str = "an array") -> np.ndarray:
    """The array, if it has this shape (None: any length) and finite numbers of a sensible size.

    Raises
    ------
    ValueError
        Otherwise.
    """
    fits = array.ndim == len(shape) and all(want in (None, size) for size, want in zip(array.shape, shape))
    if not fits or array.dtype.kind not in "biuf" or not (np.abs(array.astype(np.float64)) < LARGEST).all():
        raise ValueError(f"{name} has shape {array.shape} and type {array.dtype}, or numbers that are not finite")
    return array


def typed(about: Mapping[str, Any], /, **kinds: Any) -> None:
    """Raise unless words of a header have these types.

    Raises
    ------
    TypeError, KeyError
        A word of another type, or none.
    """
    for name, kind in kinds.items():
        if not isinstance(about[name], kind):
            raise TypeError(f"{name} is {str(about[name])[:60]!r}")
