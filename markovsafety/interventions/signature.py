"""Where in the answer an edit acts: how far the next-token laws of edited and plain model are apart, by depth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..bound import Bound, check_level, clustered
from ..brief import brief
from ..errors import InputError
from .edits import Edit
from .host import Host
from .record import laws

__all__ = ["Signature", "depth_signature"]

NUMBERS = 1 << 25
"""Log-probabilities held at once."""


@dataclass(frozen=True, eq=False)
class Signature:
    """Mean total variation by depth.

    Parameters
    ----------
    distance : Bound
        Shape (depth + 1,): entry k after k forced tokens.
    prompts : float64 array, shape (prompts, depth + 1)
        Of every prompt.

    Examples
    --------
    >>> from markovsafety import interventions as inside, organism
    >>> host = inside.open_host(organism.model_path("shallow"))
    >>> harmful, harmless = organism.prompts(n=12), organism.prompts(n=12, harmful=False)
    >>> edit = inside.difference(host, harmful, harmless, position="t_post").edit(-1.0, 3)
    >>> found = inside.depth_signature(host, edit, harmful, [p["prefix"] for p in harmful], depth=4)
    >>> found
    Signature(distance=Bound (5,), prompts=float64 (12, 5))
    >>> found.distance.value.round(2), found.start_only
    (array([0.84, 0.  , 0.  , 0.  , 0.  ]), True)
    """

    distance: Bound
    prompts: NDArray

    __repr__ = brief

    def __str__(self) -> str:
        d = self.distance
        cells = (f"{k}: {v:.2f} [{lo:.2f}, {hi:.2f}]" for k, (v, lo, hi) in enumerate(zip(d.value, d.lower, d.upper)))
        return f"total variation after k forced tokens, {len(self.prompts)} prompts: {', '.join(cells)}"

    @property
    def start_only(self) -> bool:
        """Whether the edit is seen at the start and, at all later depths but at most one, hardly (at most .05)."""
        value = np.asarray(self.distance.value)
        return bool(value[0] > 0.05 and (value[1:] > 0.05).sum() <= 1)

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {"distance": self.distance.to_json(), "prompts": len(self.prompts), "start_only": self.start_only}


def depth_signature(
    host: Host,
    edit: Edit,
    prompts: Sequence[Any],
    paths: Sequence[Any],
    *,
    depth: int = 6,
    level: float = 0.95,
) -> Signature:
    """How far an edit moves the next-token law after k forced tokens, k = 0 ... depth.

    Parameters
    ----------
    host : Host
    edit : Edit
    prompts : sequence of ids, texts or records
    paths : sequence of ids, one per prompt
        Answers to force, such as compliant ones; of at least `depth` tokens.
    depth : int
    level : float

    Returns
    -------
    Signature
        ``D_k = mean over prompts of 1/2 sum over tokens |P_k - P'_k|``. Edits of the prompt alone have a large D_0 and
        nearly nothing behind it; edits at every step go on.

    Raises
    ------
    InputError
        A path too short, or not one per prompt.

    Notes
    -----
    Intervals are Student's over prompts, cut at 0 and 1; where prompts do not differ at all, or one prompt is all there
    is, they are those of one trial per prompt. Laws of `depth` + 1 tokens of a few prompts are held at a time.

    Examples
    --------
    An edit of the last prompt token, and the same edit at every token, along compliant answers:

    >>> from markovsafety import interventions as inside, organism
    >>> host = inside.open_host(organism.model_path("shallow"))
    >>> harmful, harmless = organism.prompts(n=12), organism.prompts(n=12, harmful=False)
    >>> refusal = inside.difference(host, harmful, harmless, position="t_post").at(3)
    >>> paths = [p["prefix"] for p in harmful]
    >>> for when in ("prompt", "every"):
    ...     print(inside.depth_signature(host, refusal.edit(-1.0, when=when), harmful, paths, depth=3))
    total variation after k forced tokens, 12 prompts: 0: 0.84 [0.83, 0.85], 1: 0.00 [0.00, 0.00], 2: 0.00 [0.00,
        0.00], 3: 0.00 [0.00, 0.00]
    total variation after k forced tokens, 12 prompts: 0: 0.84 [0.83, 0.85], 1: 0.99 [0.99, 0.99], 2: 0.48 [0.26,
        0.69], 3: 0.90 [0.82, 0.98]
    """
    check_level(level)
    given = [np.asarray(path, dtype=np.int64) for path in paths]
    short = [i for i, path in enumerate(given) if len(path) < depth]
    if depth < 0 or len(given) != len(prompts) or short:
        raise InputError(
            f"{len(prompts)} prompts have {len(given)} paths"
            + (f", path {short[0]} has {len(given[short[0]])} tokens" if short else ""),
            cause=f"each prompt is followed along its own path, {depth} tokens deep",
            next="give one path per prompt, each of at least `depth` tokens, or a smaller depth",
        )
    ids = host.prompt_ids(prompts)
    said = [path[:depth] for path in given]
    size = max(1, min(64, NUMBERS // ((depth + 1) * host.vocab_size)))
    rows = []
    for begin in range(0, len(ids), size):
        part = slice(begin, begin + size)
        both = [
            np.exp(laws(host, ids[part], said[part], edit=e, last=depth + 1, batch_size=size)) for e in (None, edit)
        ]
        rows.append(np.abs(both[0] - both[1]).sum(axis=-1, dtype=np.float64) / 2)
    table = np.minimum(np.concatenate(rows), 1.0)
    return Signature(_bounds(table, level), table)


def _bounds(table: NDArray, level: float) -> Bound:
    from scipy.special import stdtrit

    K = len(table)
    value = table.mean(axis=0)
    alone = [clustered(column, np.ones(K), level) for column in table.T]
    lower, upper = (np.array([getattr(b, end) for b in alone]) for end in ("lower", "upper"))
    if K > 1:
        error = table.std(axis=0, ddof=1) / np.sqrt(K)
        half = stdtrit(K - 1.0, (1 + level) / 2) * error
        lower = np.where(error > 0, np.maximum(value - half, 0.0), lower)
        upper = np.where(error > 0, np.minimum(value + half, 1.0), upper)
    lower, upper = np.minimum(lower, value), np.maximum(upper, value)
    info = {"name": "total variation by depth", "method": "Student over prompts", "prompts": K}
    if K == 1:
        info["note"] = "one prompt only: the variance between prompts is not assessed"
    return Bound(value, lower, upper, level, {"sampling": (upper - lower) / 2}, None, info)
