"""From judged rollouts to counts, in flat arrays.

Only sampled tokens are counted. The forced tokens of a prefill set the state in which sampling begins (`Counts.entry`),
and tokens behind the first hit do not count. What the token limit cut off ends in the outcome "truncated".
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import InputError
from ..outcomes import CODES, NOT_JUDGED, OUTCOMES
from .counts import Counts, Table, canonical, group
from .states import KGram, label_at, map_name

__all__ = ["count"]

_LAST = CODES["truncated"]
_NEEDED = ("tokens", "offsets", "prompt_id", "category", "prefill", "outcome", "hit")


def count(rolls: Any, states: Any = KGram(2)) -> Counts:  # noqa: B008  (frozen)
    """Count the transitions of judged rollouts.

    Parameters
    ----------
    rolls : Rollouts
        Judged; a column ``weight`` weighs rollouts, columns ``mass_harm``, ``mass_refusal`` and ``mass_benign`` are
        summed by state.
    states : StateMap
        `KGram`, `Position`, `JudgedPrefix`, or anything with ``walk(tokens, prefill)``.

    Returns
    -------
    Counts

    Raises
    ------
    InputError
        If `rolls` are no rollouts, there are none, one is not judged, or a column contradicts another.

    Notes
    -----
    Token i of a rollout is counted if it was sampled (i >= prefill) and stands no later than the hit; at the hit the
    transition goes to the outcome. A truncated rollout makes one last transition, from its last state to "truncated". A
    benign rollout without a recorded hit ends at its last token; if nothing was sampled, it enters in the outcome
    itself, without a transition. A hit among the forced tokens is refused: the model did not choose them. A state
    label that equals an outcome's name gets "after " in front, because
    that name belongs to the outcome.
    """
    r = _read(rolls)
    tally, rows = group(
        r["prompt_id"], r["category"], r["prefill"], np.eye(len(OUTCOMES))[r["outcome"]] * r["weight"][:, None]
    )
    walks = np.where(r["stop"] < r["prefill"], 0, r["stop"] - r["prefill"] + 1)  # visited states of each rollout
    who = np.repeat(np.arange(len(walks)), walks)
    ends = np.cumsum(walks)
    at = np.arange(len(who)) - (ends - walks)[who] + r["prefill"][who]
    codes, names = _states(states, r["tokens"], r["begin"][who], at)
    last = np.zeros(len(who), dtype=bool)
    last[ends[walks > 0] - 1] = True
    target = np.where(last, len(names) + r["outcome"][who], np.roll(codes, -1))
    weight = r["weight"][who]
    entered = len(names) + r["outcome"].astype(np.int64)  # where nothing was sampled before the hit
    entered[walks > 0] = codes[(ends - walks)[walks > 0]]
    return Counts(
        map_name(states),
        names,
        tally,
        Table(rows[who], codes, target, {"count": weight}),
        Table(rows, entered, None, {"count": r["weight"]}),
        _passages(r, rows, who, codes, len(names)),
        _masses(getattr(rolls, "columns", {}), r, who, at, last, codes, rows),
    )


def _passages(r: dict[str, NDArray], rows: NDArray, who: NDArray, codes: NDArray, S: int) -> Table:
    """Every rollout once for each state it passed through, with the outcome it ended in."""
    once = np.unique(who * max(S, 1) + codes)
    who, state = np.divmod(once, max(S, 1))
    return Table(rows[who], state, S + r["outcome"][who], {"count": r["weight"][who]})


def _states(states: Any, tokens: NDArray, begin: NDArray, at: NDArray) -> tuple[NDArray, tuple[Any, ...]]:
    """Codes and canonical labels of the visited states."""
    codes, labels = label_at(states, tokens, begin, at)
    named = [f"after {x}" if isinstance(x, str) and x in OUTCOMES else x for x in labels]
    names = canonical(set(named))
    if names != tuple(named):
        lookup = {label: i for i, label in enumerate(names)}
        codes = np.array([lookup[x] for x in named], dtype=np.int64)[codes]
    return codes, names


def _masses(
    columns: Any, r: dict[str, NDArray], who: NDArray, at: NDArray, last: NDArray, codes: NDArray, rows: NDArray
) -> dict[str, Table]:
    token = ~(last & (r["outcome"][who] == _LAST))  # the transition to "truncated" is no token
    result = {}
    for name in OUTCOMES[:_LAST]:
        if f"mass_{name}" not in columns:
            continue
        flat = np.asarray(columns[f"mass_{name}"], dtype=np.float64)
        if flat.shape != r["all"].shape:
            raise InputError(
                f"mass_{name} has shape {flat.shape}, there are {len(r['all'])} tokens.",
                cause="Masses are recorded token by token.",
                next="Sample again, or drop the column.",
            )
        use = np.flatnonzero(token)
        mass = flat[(r["begin"][who] + at)[use]]
        use, mass = use[np.isfinite(mass)], mass[np.isfinite(mass)]
        if mass.size and (mass.min() < 0 or mass.max() > 1 + 1e-4):  # float32 sums of a softmax stray by 1e-6
            raise InputError(
                f"mass_{name} runs from {mass.min():g} to {mass.max():g}.",
                cause="A class mass is a probability.",
                next="Sample again, or drop the column.",
            )
        mass = np.minimum(mass, 1.0)
        hit = last[use] & (r["outcome"][who[use]] == CODES[name])
        weight = r["weight"][who[use]]
        values = {"total": weight * mass, "steps": weight, "surprise": hit - mass, "variance": mass * (1 - mass)}
        result[name] = Table(rows[who[use]], codes[use], None, values)
    return dict(sorted(result.items()))


def _read(rolls: Any) -> dict[str, NDArray]:
    """The checked arrays of the rollouts with positive weight; `stop` is the index of the last visited state."""
    lacks = [name for name in _NEEDED if not hasattr(rolls, name)]
    if lacks:
        raise InputError(
            f"count() was given a {type(rolls).__name__}, not rollouts.",
            cause=f"It has no {lacks[0]}.",
            next="Pass Rollouts: from sample(...), read_rollouts(path), or judge(...) of these.",
        )
    offsets = np.asarray(rolls.offsets, dtype=np.int64)
    columns = getattr(rolls, "columns", {})
    tokens, begin, length = np.asarray(rolls.tokens), offsets[:-1], np.diff(offsets)
    outcome, hit, prefill = (np.asarray(getattr(rolls, k)).astype(np.int64) for k in ("outcome", "hit", "prefill"))
    weight = np.asarray(columns.get("weight", np.ones(len(begin))), dtype=np.float64)
    if len(begin) == 0:
        raise InputError("There are no rollouts.", cause="The set is empty.", next="Sample some, or check the filter.")
    _refuse(outcome == NOT_JUDGED, "is not judged", "A count needs the outcome.", 'Call judge(rolls, "lexicon") first.')
    _refuse((outcome < 0) | (outcome > _LAST), "has an unknown outcome code", "Codes are 0 to 3.", "Judge again.")
    _refuse(
        (prefill < 0) | (prefill > length),
        "has more forced tokens than tokens",
        "prefill is part of tokens.",
        "Check it.",
    )
    _refuse(
        ~np.isfinite(weight) | (weight < 0), "has a bad weight", "Weights are finite and >= 0.", "Correct the column."
    )
    cut = outcome == _LAST
    _refuse(
        ~cut & (hit >= 0) & (hit < prefill),
        "has its hit among the forced tokens",
        "The model did not choose these; only a sampled token can be a hit.",
        "Judge the sampled tokens, or lower the prefill.",
    )
    hit = np.where((outcome == CODES["benign"]) & (hit < 0), length - 1, hit)
    lost = ~cut & (hit < 0) & ~((outcome == CODES["benign"]) & (length == 0))
    _refuse(
        lost, "has an outcome but no hit", "The hit says at which token the outcome fell.", "Judge the rollouts again."
    )
    _refuse(
        hit >= np.maximum(length, 1),
        "has its hit behind its last token",
        "hit is an index into tokens.",
        "Judge again.",
    )
    _refuse(
        cut & (hit >= 0), "is truncated and has a hit", "A rollout ends in one outcome.", "Judge the rollouts again."
    )
    keep = weight > 0
    if not keep.any():
        raise InputError("All weights are zero.", cause="Nothing would be counted.", next="Correct the column weight.")
    table = {
        "prompt_id": np.asarray(rolls.prompt_id),
        "category": np.asarray(rolls.category, dtype=str),
        "prefill": prefill,
    }
    table |= {"outcome": outcome, "weight": weight, "begin": begin, "stop": np.where(cut, length, hit)}
    return {k: v[keep] for k, v in table.items()} | {"tokens": tokens, "all": tokens}


def _refuse(wrong: NDArray, what: str, cause: str, next: str) -> None:
    if wrong.any():
        i, n = int(np.argmax(wrong)), int(wrong.sum())
        more = f" ({n} of {len(wrong)} rollouts are like this)" if n > 1 else ""
        raise InputError(f"Rollout {i} {what}{more}.", cause=cause, next=next)
