"""What the doors of the JAX road accept: devices, precisions, states, tolerances, blocks of values."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from numpy.typing import NDArray

from ..chains import Chain
from ..chains.checks import as_indices
from ..errors import InputError

__all__ = ["blocks_of", "check_numbers", "devices_of", "states_of"]

PRECISIONS = (np.dtype(np.float64), np.dtype(np.float32))


def blocks_of(values: Any) -> Iterator[Any]:
    """The blocks that values come in: one array, a sequence or an iterator of arrays, or a function that makes one."""
    if callable(values):
        values = values()
    if isinstance(values, Iterator) or (isinstance(values, (list, tuple)) and values and np.ndim(values[0]) == 2):
        yield from map(_numeric, values)
    else:
        yield _numeric(values)


def _numeric(block: Any) -> Any:
    try:
        return block if isinstance(block, jax.Array) else np.asarray(block, dtype=np.float64)
    except (TypeError, ValueError):
        raise InputError(
            f"The values are a {type(block).__name__} that is no array of numbers.",
            cause="A batch has one row of stored entries per sample.",
            next="Pass an array of shape (B, nnz), or blocks of that form.",
        ) from None


def check_numbers(tol: Any, dtype: Any) -> None:
    """Refuse a tolerance that is no positive number, and any precision but float64 and float32."""
    if isinstance(tol, bool) or not isinstance(tol, (int, float, np.number)) or not tol > 0:
        raise InputError(
            f"tol is {tol!r}.",
            cause="It is the largest error bound that is accepted without solving a sample again.",
            next="Pass a positive number, for instance 1e-9.",
        )
    try:
        known = np.dtype(dtype) in PRECISIONS if dtype is not None else False
    except (TypeError, ValueError):
        known = False
    if not known:
        raise InputError(
            f"dtype is {dtype!r}.",
            cause="A device computes in float64 or float32.",
            next="Pass np.float64 or np.float32.",
        )


def devices_of(device: Any) -> list[Any]:
    """The devices that an argument names.

    Raises
    ------
    InputError
        If it names none, or something that is no device.
    """
    there = ", ".join(str(d) for d in jax.local_devices())
    try:
        found = _named(device) if isinstance(device, str) else None
    except (RuntimeError, ValueError, IndexError):
        found = []
    if found is None:
        found = list(device) if isinstance(device, Sequence) else [device]
    if not found or not all(isinstance(d, jax.Device) for d in found):
        raise InputError(
            f"device is {device!r}.",
            cause=f"It names no device of JAX; by default those are {there}.",
            next='Pass None for the host, a platform ("gpu"), some of it ("gpu:0,2"), a jax.Device or several.',
        )
    return found


def _named(name: str) -> list[Any]:
    """All devices of a platform, or those that are numbered behind a colon."""
    kind, _, numbers = name.partition(":")
    there = jax.local_devices(backend=kind)
    return [there[int(number)] for number in numbers.split(",")] if numbers else list(there)


def states_of(chain: Chain, states: Any) -> NDArray[np.intp]:
    """Indices of the states that are asked for: integers in their order, labels or a mask."""
    array = np.asarray(states) if isinstance(states, (list, tuple, range, np.ndarray)) else None
    if array is None or array.dtype.kind not in "iu" or array.ndim != 1:
        return as_indices(states, chain.n_states, chain._lookup, "states").astype(np.intp)
    as_indices(array, chain.n_states, chain._lookup, "states")  # only whether they are in range
    return array.astype(np.intp)
