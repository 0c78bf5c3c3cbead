"""What makes rollouts consistent: the checks behind every `Rollouts`, each naming the column and its first bad row."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import InputError
from ..outcomes import CODES, NOT_JUDGED, OUTCOMES

if TYPE_CHECKING:
    from .rollouts import Rollouts

__all__ = ["check_offsets", "check_rollouts", "codes_of", "reject"]

_MASS_SLACK = 1e-4  # masses are float32 sums over a whole vocabulary


def check_offsets(offsets: np.ndarray, total: int) -> None:
    """Raise unless `offsets` cut ``[0, total)`` into rows."""
    if len(offsets) < 1 or offsets[0] != 0 or offsets[-1] != total or (np.diff(offsets) < 0).any():
        raise InputError(
            "the offsets do not cut the flat array into rows",
            cause=f"they must rise from 0 to {total}",
            next="use Ragged.of(list of sequences)",
        )


def reject(column: str, bad: np.ndarray, say: Callable[[int], str], *, cause: str, next: str) -> None:
    """Raise for the first true entry of `bad`; `say(row)` words the fact."""
    rows = np.flatnonzero(bad)
    if len(rows):
        row = int(rows[0])
        more = f" ({len(rows)} bad rows)" if len(rows) > 1 else ""
        raise InputError(f"column {column}, row {row}: {say(row)}{more}", cause=cause, next=next)


def check_rollouts(r: Rollouts) -> None:
    check_offsets(r.offsets, len(r.tokens))
    aligned = {name for name in r.columns if name.startswith(("logprob", "mass_", "activation_"))}
    n, lengths = len(r.offsets) - 1, np.diff(r.offsets)
    sizes = {name: len(getattr(r, name)) for name in ("prompt_id", "category", "prefill", "outcome", "hit")}
    sizes |= {name: len(value) for name, value in r.columns.items() if name not in aligned}
    for name, size in sizes.items():
        if size != n:
            raise InputError(
                f"column {name} has {size} rows, the answers are {n}",
                cause="every column has one entry per answer",
                next="give one entry per answer",
            )
    for name, value in r.columns.items():
        if name in aligned and len(value) != len(r.tokens):
            raise InputError(
                f"column {name} has {len(value)} numbers for {len(r.tokens)} tokens",
                cause="this column goes along with the flat tokens",
                next="give one number per token of every answer, nan at forced ones",
            )
    row_of = np.repeat(np.arange(n), lengths)
    negative = np.bincount(row_of[r.tokens < 0], minlength=n) > 0
    reject(
        "tokens",
        negative,
        lambda i: f"token id {r.answer(i)[r.answer(i) < 0][0]} is negative",
        cause="ids count from 0",
        next="drop the padding; give the tokenizer's ids",
    )
    text = np.fromiter((isinstance(c, str) for c in r.category), bool, n)
    reject(
        "category",
        ~text,
        lambda i: f"{r.category[i]!r} is no text",
        cause="categories are names",
        next="give a name, 'all' if there is one",
    )
    reject(
        "prefill",
        (r.prefill < 0) | (r.prefill > lengths),
        lambda i: f"{r.prefill[i]} forced tokens in an answer of {lengths[i]}",
        cause="prefill counts the forced tokens, which stand first in the answer",
        next="give that number, 0 where nothing was forced",
    )
    known = (r.outcome >= NOT_JUDGED) & (r.outcome < len(OUTCOMES))
    reject(
        "outcome",
        ~known,
        lambda i: f"code {r.outcome[i]} is unknown",
        cause=f"codes are {dict(enumerate(OUTCOMES))}, -1 for not judged",
        next="give one of these codes",
    )
    _check_hits(r, lengths)
    _check_columns(r, row_of, n)


def _check_hits(r: Rollouts, lengths: np.ndarray) -> None:
    event = (r.outcome >= 0) & (r.outcome != OUTCOMES.index("truncated"))
    outside = (r.hit < -1) | (r.hit >= lengths)
    reject(
        "hit",
        outside,
        lambda i: f"token {r.hit[i]} of an answer of {lengths[i]} tokens",
        cause="hit is the index of a token within its answer, counted from 0, forced ones included; -1 is none",
        next="count from the answer's first token, not from the prompt's",
    )
    reject(
        "hit",
        event & (r.hit < 0),
        lambda i: f"outcome {OUTCOMES[r.outcome[i]]} without the token at which it happened",
        cause="a hitting time needs the time, and what follows the hit is no part of the process",
        next="give the index of the first such token (benign: of the end of sequence), or leave the outcome null",
    )
    reject(
        "hit",
        ~event & (r.hit >= 0),
        lambda i: f"token {r.hit[i]} hit, but the answer is truncated or not judged",
        cause="such an answer came to no outcome at any token",
        next="give the outcome, or leave hit null",
    )
    reject(
        "hit",
        event & (r.hit < r.prefill),
        lambda i: f"token {r.hit[i]} is one of the {r.prefill[i]} forced ones",
        cause="only sampled tokens are judged: what was forced is not the model's doing",
        next="judge the sampled tokens, or lower the prefill",
    )


def _check_columns(r: Rollouts, row_of: np.ndarray, n: int) -> None:
    if "weight" in r.columns:
        weight = r.columns["weight"]
        reject(
            "weight",
            ~(np.isfinite(weight) & (weight >= 0)),
            lambda i: f"{weight[i]} is no weight",
            cause="a weight counts how many rollouts a row stands for",
            next="give finite numbers >= 0",
        )
    for name in ("text", "raw"):
        if name in r.columns:
            bad = np.fromiter((not (c is None or isinstance(c, str)) for c in r.columns[name]), bool, n)
            reject(
                name,
                bad,
                lambda i, name=name: f"{r.columns[name][i]!r} is no text",
                cause="the column holds texts",
                next="give a str, or None",
            )
    if "prompt_tokens" in r.columns:
        prompts = r.columns["prompt_tokens"]
        bad = np.add.reduceat(np.append(prompts.flat < 0, False), prompts.offsets[:-1]) > 0 if n else np.zeros(0, bool)
        reject(
            "prompt_tokens",
            bad & (np.diff(prompts.offsets) > 0),
            lambda i: "a token id is negative",
            cause="ids count from 0",
            next="drop the padding; give the tokenizer's ids",
        )
    sampled = np.arange(len(r.tokens)) - r.offsets[:-1][row_of] >= r.prefill[row_of]
    for name, mass in r.masses.items():
        wrong = sampled & ~((mass >= -_MASS_SLACK) & (mass <= 1 + _MASS_SLACK))
        bad = np.bincount(row_of[wrong], minlength=n) > 0
        reject(
            f"mass_{name}",
            bad,
            lambda i: "a probability mass of a sampled token is outside [0, 1]",
            cause="it is not a probability (a log-probability?), or nan where a token was sampled",
            next="give probabilities, nan at forced tokens only",
        )
    for name, projection in r.activations.items():
        bad = np.bincount(row_of[np.isinf(projection)], minlength=n) > 0
        reject(
            f"activation_{name}",
            bad,
            lambda i: "a projection is infinite",
            cause="it left the range of float32, or of the model's own numbers",
            next="record the activations in float32; give nan where one is not known",
        )


def codes_of(outcome: Any) -> Any:
    """Codes of outcomes that are given by name; numbers stay as they are."""
    given = np.asarray(outcome)
    if given.dtype.kind not in "UO":
        return outcome
    codes = [NOT_JUDGED if name is None else CODES.get(name, name) for name in given.ravel().tolist()]
    reject(
        "outcome",
        np.array([isinstance(code, str) for code in codes], dtype=bool),
        lambda row: f"unknown outcome {codes[row]!r}",
        cause=f"known are {', '.join(OUTCOMES)}, and None for not judged",
        next="rename the outcomes",
    )
    return np.array(codes).reshape(given.shape)
