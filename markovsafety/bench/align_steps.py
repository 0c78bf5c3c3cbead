"""What the measurements of deep alignment share: sampling, shares of outcomes, readings, and what is kept of a run."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..bound import Bound, clustered, encode
from ..files import atomic
from ..outcomes import CODES
from ..rollouts import Rollouts, sample

__all__ = ["kept", "sampled", "share", "within"]


def sampled(model: Path, asked: list[dict[str, Any]], **options: Any) -> Rollouts:
    """Judged rollouts of the organism."""
    return sample(model, asked, max_tokens=96, judge="organism", progress=False, **options)


def share(rolls: Rollouts, outcome: str) -> Bound:
    """Share of an outcome, clustered by prompt."""
    prompt, row = np.unique(rolls.prompt_id, return_inverse=True)
    events = np.bincount(row, np.asarray(rolls.outcome) == CODES[outcome], len(prompt))
    return clustered(events, np.bincount(row, minlength=len(prompt)), name=f"P({outcome})")


def kept(path: Path, told: Mapping[str, Any], make: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
    """What was found before, if it is there and of the same settings; else it is made, and kept."""
    plain = json.loads(json.dumps(told))
    if path.is_file():
        known = json.loads(path.read_text(encoding="utf-8"))
        if all(known.get(name) == value for name, value in plain.items()):
            return known
    found = json.loads(json.dumps(encode({**plain, **make()})))
    with atomic(path) as part:
        part.write_text(json.dumps(found), encoding="utf-8")
    return found


def within(said: Any, measured: Any) -> tuple[bool, bool]:
    """Whether a predicted depth lies between the ends of a measured one, and whether it lies not beyond them.

    Parameters
    ----------
    said : Reading
    measured : Depth
    """
    low = -1 if measured.upper.depth is None else measured.upper.depth
    high = np.inf if not measured.lower.crossed else -1 if measured.lower.depth is None else measured.lower.depth
    value = -1 if said.depth is None else said.depth
    return bool(low <= value <= high), bool(value <= high)
