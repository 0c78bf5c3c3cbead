"""Answers of the plain model from which tilts can be predicted that it would hardly show by itself.

Some answers are the model's own; others go on from first tokens that the tilts make likely. Both are weighed by the
mixture they were drawn from, so that together they are the plain model's law.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..errors import InputError
from ..rollouts.asked import Asked, ask
from ..rollouts.judges import judge as judge_rollouts
from ..rollouts.rollouts import Rollouts
from ..rollouts.sample import sample
from .bias_tables import BiasTable
from .host import Host
from .start_row import first_laws

__all__ = ["Explored", "explore"]


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
        were drawn from, so that the weighted answers are the plain model's. What was explored stands in the provenance.

    Raises
    ------
    InputError
        A share that is none, or as `sample`.

    Notes
    -----
    The weights are those of the balance heuristic (E. Veach, L. Guibas, SIGGRAPH 1995), with the expected numbers of
    answers per first token. None is larger than 1 / (1 - share), and under one of k tilts none than k / share.

    Examples
    --------
    Half of the answers begin as the tilt would have them, so that harm is seen more often; weights undo that:

    >>> from markovsafety.interventions import bias_table, explore, open_host
    >>> aligned, before = (open_host(ms.organism.model_path(name)) for name in ("shallow", "base"))
    >>> table = bias_table(aligned, before, n=32, length=1)
    >>> rolls = explore(aligned, ms.organism.prompts(n=12), table, [1.0], n=16, max_tokens=48, judge="organism")
    >>> harm = rolls.outcome == 0
    >>> print(f"{harm.mean():.2f} of {len(rolls)} answers harm, by weight {np.average(harm, weights=rolls.weight):.2f}")
    0.2... of 192 answers harm, by weight 0...
    """
    if not 0 <= share < 1 or n < 2 or not len(strengths):
        raise InputError(
            f"share={share}, n={n}, {len(strengths)} strengths",
            cause="some answers must be the plain model's own, so that no first token is left out, and some tilt's",
            next="give 0 <= share < 1, n >= 2 and the strengths that are to be predicted",
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
    tilts = [table.tilt(a, length)[0] for a in strengths]
    drawn = _drawn(host, asked, free, tilts, most, np.random.default_rng([seed, 1]))
    parts = [free]
    for size in sorted({m for row in drawn.given for m in row.values()}):
        pairs = [(k, t) for k, row in enumerate(drawn.given) for t, m in row.items() if m == size]
        forced = [{"prompt_tokens": asked.tokens[k], "prefix": [t], "prompt_id": i} for i, (k, t) in enumerate(pairs)]
        rolls = sample(host.engine, forced, n=size, max_tokens=max_tokens - 1, prefill=[1], **common)
        of = np.array([k for k, _ in pairs])[rolls.prompt_id]
        cells = {"prompt_id": asked.prompt_id[of], "category": asked.category[of]}
        parts.append(rolls.replace(**cells, prefill=np.zeros(len(rolls), np.int32)))
    rolls = judge_rollouts(Rollouts.concat([_bare(p) for p in parts]), said)
    place = {int(i): k for k, i in enumerate(asked.prompt_id)}
    first = rolls.tokens[rolls.offsets[:-1]].tolist()
    p, q = np.array([drawn.law[place[i], t] for i, t in zip(rolls.prompt_id.tolist(), first)]).reshape(-1, 2).T
    told = Explored(table.describe()["sha256"], tuple(map(float, strengths)), most / n)
    return rolls.replace(
        columns={**rolls.columns, "weight": p / ((1 - told.share) * p + told.share * q)},
        provenance={**rolls.provenance, "explored": asdict(told)},
    )


@dataclass(frozen=True)
class Explored:
    """The tilts of which first tokens were explored; it stands in the provenance of `explore`'s answers.

    Parameters
    ----------
    bias : str
        SHA-256 of the bias table.
    strengths : tuple of float
    share : float
        Of the answers that were given a first token.
    """

    bias: str
    strengths: tuple[float, ...]
    share: float

    @classmethod
    def of(cls, provenance: Mapping[str, Any], table: BiasTable) -> Explored | None:
        """What a provenance tells; None where nothing was explored, or with another table."""
        parts = provenance.get("parts", [provenance])
        told = [provenance["explored"]] if "explored" in provenance else [p.get("explored") for p in parts]
        if not all(told) or any(t != told[0] for t in told) or told[0]["bias"] != table.describe()["sha256"]:
            return None
        return cls(told[0]["bias"], tuple(told[0]["strengths"]), float(told[0]["share"]))

    def covers(self, strength: float) -> bool:
        """Whether a strength is one of the explored, or lies between two, or between one and none."""
        return min(*self.strengths, 0.0) <= strength <= max(*self.strengths, 0.0)

    def most(self, table: BiasTable, stop: Sequence[int], times: float, plain: NDArray) -> NDArray[np.float64]:
        """Up to which probability first tokens are well shown, by their plain law, both float64 (rows, vocab): so many
        times what they had in the mixture; more where the mixture is of so many tilts that each has less of it."""
        if not self.share:
            return times * plain
        wanted = _mixture(plain, [table.tilt(a, 1)[0] for a in self.strengths], stop)
        return max(times, len(self.strengths) / self.share) * ((1 - self.share) * plain + self.share * wanted)


def _bare(rolls: Rollouts) -> Rollouts:
    return rolls.replace(columns={"prompt_tokens": rolls.columns["prompt_tokens"]})


class _Drawn(NamedTuple):
    """How many answers of each prompt get which first token, and by prompt and token that said it the probabilities
    under the plain law and under the mean of the tilted ones."""

    given: list[dict[int, int]]
    law: dict[tuple[int, int], tuple[float, float]]


def _drawn(
    host: Host, asked: Asked, free: Rollouts, tilts: Sequence[NDArray], most: int, rng: np.random.Generator
) -> _Drawn:
    """First tokens drawn some prompts at a time: laws over a whole vocabulary are not kept."""
    place = {int(i): k for k, i in enumerate(asked.prompt_id)}
    said: list[set[int]] = [set() for _ in asked.prompt_id]
    for number, token in zip(free.prompt_id.tolist(), free.tokens[free.offsets[:-1]].tolist()):
        said[place[number]].add(token)
    stop = [*host.engine.tokenizer.eos_ids, *host.engine.tokenizer.end_ids]
    out = _Drawn([], {})
    for which, plain in first_laws(host, [np.asarray(t, np.int64) for t in asked.tokens]):
        wanted = _mixture(plain, tilts, stop)
        given = _shared(wanted, most, rng) if most else [{} for _ in wanted]
        out.given.extend(given)
        for row, (k, tokens) in enumerate(zip(range(which.start, which.stop), given)):
            for t in {*said[k], *tokens}:
                out.law[k, t] = float(plain[row, t]), float(wanted[row, t])
    return out


def _mixture(plain: NDArray, tilts: Sequence[NDArray], stop: Sequence[int]) -> NDArray[np.float64]:
    """Mean of the tilted laws of the first token, float64 (prompts, vocab), without tokens that end an answer, for it
    has nothing to go on with.

    Parameters
    ----------
    plain : float64 array, shape (prompts, vocab)
    tilts : sequence of float arrays, shape (at most vocab,)
    stop : sequence of int
    """
    wanted = np.zeros_like(plain)
    for tilt in tilts:
        moved = np.log(np.maximum(plain, 1e-300))
        moved[:, : len(tilt)] += tilt
        moved = np.exp(moved - moved.max(axis=1, keepdims=True))
        wanted += moved / moved.sum(axis=1, keepdims=True)
    wanted[:, stop] = 0.0
    return wanted / np.maximum(wanted.sum(axis=1, keepdims=True), 1e-300)


def _shared(wanted: NDArray, most: int, rng: np.random.Generator) -> list[dict[int, int]]:
    """How many answers of each prompt get which first token: `most` in all, in expectation as wanted.

    Systematic sampling with an offset by chance. Rounding would never give a token to what is wanted of it less than
    half a time, and its weight would then rest on answers that the plain model hardly gives.
    """
    out: list[dict[int, int]] = []
    for law in wanted:
        edges = np.floor(np.cumsum(law) * most * (1 - 1e-12) + rng.random()).astype(int)
        counts = np.diff(edges, prepend=0)
        out.append({int(t): int(counts[t]) for t in np.flatnonzero(counts)})
    return out
