"""How results show themselves at a prompt: every field on one line, arrays by shape, Bounds with their interval."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence, Set
from typing import Any

import numpy as np

from .bound import Bound

__all__ = ["brief"]

LONGEST = 60
"""Characters of a field that is shown as it is; a longer one is told by its kind and size."""
NESTED = re.compile(r"\w of \d+$")
"""Such a thing among others."""


def brief(self: Any) -> str:
    """A dataclass with its fields, however large they are; a class takes it as its own ``__repr__``."""
    told = ((f.name, getattr(self, f.name)) for f in dataclasses.fields(self) if f.repr)
    return f"{type(self).__name__}({', '.join(f'{name}={_field(value)}' for name, value in told)})"


def _field(x: Any) -> str:
    kind = type(x).__name__
    if isinstance(x, Bound):
        return f"{x.value:.3g} [{x.lower:.3g}, {x.upper:.3g}]" if x.shape == () else f"Bound {x.shape}"
    if isinstance(x, np.ndarray):
        return f"{x.dtype} {x.shape}"
    if isinstance(x, float):
        return f"{x:.4g}"
    if isinstance(x, str):
        return repr(x) if len(x) <= LONGEST else repr(f"{x[:12]}...")
    if isinstance(x, Mapping) or (isinstance(x, Sequence | Set) and not hasattr(x, "_fields")):
        return _several(x, kind)
    whole = repr(x)
    return whole if len(whole) <= LONGEST else kind


def _several(x: Any, kind: str) -> str:
    """Few short things one by one, others by their number."""
    if len(x) > LONGEST:
        return f"{kind} of {len(x)}"
    parts = [f"{k!r}: {_field(v)}" for k, v in x.items()] if isinstance(x, Mapping) else [_field(v) for v in x]
    opens, closes = "[]" if isinstance(x, list) else "()" if isinstance(x, tuple) else "{}"
    text = f"{opens}{', '.join(parts)}{',' if kind == 'tuple' and len(x) == 1 else ''}{closes}"
    nested = any(NESTED.search(part) for part in parts)
    return f"{kind} of {len(x)}" if nested or len(text) > LONGEST else text
