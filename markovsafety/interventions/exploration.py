"""Answers of the plain model from which tilts can be predicted that it would hardly show by itself.

Some answers are the model's own; others go on from first tokens that the tilts make likely. Both are weighed by the
mixture they were drawn from, so that together they are the plain model's law.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import InputError
from ..rollouts.asked import ask
from ..rollouts.judges import judge as judge_rollouts
from ..rollouts.rollouts import Rollouts
from ..rollouts.sample import sample
from .bias_tables import BiasTable
from .host import Host
from .start_row import first_laws

__all__ = ["explore"]


def explore(
    host: Host,
    prompts: Any,
    table: BiasTable,
    strengths: Sequence[float],
    *,
    n: int,
    max_tokens: int,
    judge: Any,
    length: int | None = None,
    share: float = 0.5,
    seed: int = 0,
    system: str | None = None,
    progress: bool | None = None,
) -> Rollouts:
    """Answers of the plain model for `predict_tilt`: some as it speaks, some from first tokens that tilts make likely.

    Parameters
    ----------
    host, prompts, judge, seed, system, progress
        As in `markovsafety.sample`.
    table, strengths, length
        The tilts that are to be predicted.
    n : int
        Answers per prompt.
    max_tokens : int
    share : float
        Of the answers that are given a first token, 0 <= share < 1.

    Returns
    -------
    Rollouts
        With weights: an answer with first token t counts p(t) / q(t), where q is the mixture that the prompt's answers
        were drawn from, so that the weighted answers are the plain model's.

    Raises
    ------
    InputError
        A share that is none, or as `sample`.

    Notes
    -----
    The weights are those of the balance heuristic (E. Veach, L. Guibas, SIGGRAPH 1995), with the expected numbers of
    answers per first token. None is larger than 1 / (1 - share), and under one of k tilts none than k / share.
    """
    if not 0 <= share < 1 or n < 2:
        raise InputError(
            f"share={share}, n={n}",
            cause="some answers must be the plain model's own, so that no first token is left out",
            next="give 0 <= share < 1 and n >= 2",
        )
    template = host.engine.tokenizer
    asked = ask(prompts, template, system=system)
    said = judge if isinstance(judge, str) else getattr(judge, "bind", lambda _: judge)(template)
    records = [
        {"prompt_tokens": ids, "category": c, "prompt_id": int(i)}
        for ids, c, i in zip(asked.tokens, asked.category, asked.prompt_id)
    ]
    most = int(share * n)
    common: dict[str, Any] = {"engine": "transformers", "seed": seed, "progress": progress}
    free = sample(host.engine, records, n=n - most, max_tokens=max_tokens, **common)
    law, wanted = _first(host, asked.tokens, [table.tilt(a, length) for a in strengths])
    given, parts = _shared(wanted, most, np.random.default_rng([seed, 1])), [free]
    for size in sorted({m for row in given for m in row.values()}):
        pairs = [(k, t) for k, row in enumerate(given) for t, m in row.items() if m == size]
        forced = [{"prompt_tokens": asked.tokens[k], "prefix": [t], "prompt_id": i} for i, (k, t) in enumerate(pairs)]
        rolls = sample(host.engine, forced, n=size, max_tokens=max_tokens - 1, prefill=[1], **common)
        of = np.array([k for k, _ in pairs])[rolls.prompt_id]
        cells = {"prompt_id": asked.prompt_id[of], "category": asked.category[of]}
        parts.append(rolls.replace(**cells, prefill=np.zeros(len(rolls), np.int32)))
    rolls = judge_rollouts(Rollouts.concat([_bare(p) for p in parts]), said)
    place = {int(i): k for k, i in enumerate(asked.prompt_id)}
    row, first = np.array([place[int(i)] for i in rolls.prompt_id]), rolls.tokens[rolls.offsets[:-1]]
    p = law[row, first]
    return rolls.replace(columns={**rolls.columns, "weight": p / ((1 - most / n) * p + most / n * wanted[row, first])})


def _bare(rolls: Rollouts) -> Rollouts:
    return rolls.replace(columns={"prompt_tokens": rolls.columns["prompt_tokens"]})


def _first(host: Host, prompts: Sequence[NDArray], tilts: Sequence[NDArray]) -> tuple[NDArray, NDArray]:
    """Laws of the first token, float64 (prompts, vocab): the plain one, and the mean of the tilted ones without tokens
    that end an answer, for it has nothing to go on with."""
    ids = [np.asarray(p, np.int64) for p in prompts]
    stop = [*host.engine.tokenizer.eos_ids, *host.engine.tokenizer.end_ids]
    plain, wanted = np.zeros((2, len(ids), host.vocab_size))
    for which, law in first_laws(host, ids):
        plain[which] = law
    for tilt in tilts:
        moved = np.log(np.maximum(plain, 1e-300))
        moved[:, : tilt.shape[1]] += tilt[0]
        moved = np.exp(moved - moved.max(axis=1, keepdims=True))
        wanted += moved / moved.sum(axis=1, keepdims=True)
    wanted[:, stop] = 0.0
    return plain, wanted / wanted.sum(axis=1, keepdims=True)


def _shared(wanted: NDArray, most: int, rng: np.random.Generator) -> list[dict[int, int]]:
    """How many answers of each prompt get which first token: `most` in all, in expectation as wanted.

    Systematic sampling with an offset by chance. Rounding would never give a token to what is wanted of it less than
    half a time, and its weight would then rest on answers that the plain model hardly gives.
    """
    out: list[dict[int, int]] = []
    for law in wanted if most else ():
        edges = np.floor(np.cumsum(law) * most * (1 - 1e-12) + rng.random()).astype(int)
        counts = np.diff(edges, prepend=0)
        out.append({int(t): int(counts[t]) for t in np.flatnonzero(counts)})
    return out
