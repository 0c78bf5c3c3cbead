"""Rare harm: probabilities too small to be seen by sampling and waiting.

An event of probability p needs ``25 / p`` rollouts for an error of 20 %. Two roads are shorter. *Splitting* asks how
often a rollout that has come this far comes further, and multiplies the answers: prefixes that passed a level of the
committor are continued many times over. *Importance sampling* lets a chain or model speak that does the harm often and
weights every answer by how much less likely the model in question is to say it. Both estimates are unbiased; both
return a `Bound` whose width is sampling error, and refuse with what they have where the sample carries no interval.

>>> import markovsafety as ms
>>> from markovsafety.evidence import rare
>>> chain = ms.toy.ladder(14, 0.2, start=1)
>>> print(rare.splitting(chain))  # doctest: +SKIP
P(harm) = 1.24e-08   95 % [1.03e-08, 1.55e-08]   because: sampling 3e-9; judge, lumping, ... not assessed

Sources: H. Kahn and T. E. Harris, National Bureau of Standards Applied Mathematics Series 12 (1951) 27 (splitting);
M. J. J. Garvels, The splitting method in rare event simulation, thesis, Twente (2000) (fixed effort); F. Cérou and A.
Guyader, Stochastic Analysis and Applications 25 (2007) 417 (levels from a pilot); P. W. Glynn and D. L. Iglehart,
Management Science 35 (1989) 1367 (weights); for language models arXiv 2410.13211 and 2604.22167 (importance sampling,
the latter from an unsafe variant of the model). Departures are named where they are made.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..bound import Bound, check_level, clopper_pearson
from ..chains import Chain
from ..errors import InputError, UntrustedError
from ..hitting import hitting_probability
from .rare_chain import Jumps, jumps, missing_support, sample_weighted, tilt
from .rare_intervals import json_ready, pooled
from .rare_prefixes import Prefixes, committor_score, logged_weights
from .rare_weights import FEWEST, weighted

__all__ = ["Prefixes", "committor_score", "importance", "splitting", "tilt", "weighted"]

RATIO = 0.2
"""Share of particles meant to pass a level: the cost ``(log p)^2 (1 - q) / (q (log q)^2)`` is least at q = 0.203."""
SHARE_LAST = 1 / 7
"""No further level where the target is as near as this."""
MOST_LEVELS = 200


class Source(Protocol):
    """Whatever can be split: an exact chain (`Jumps`) or a language model's prefixes (`Prefixes`)."""

    def begin(self, n: int, replications: int, rng: np.random.Generator) -> Any: ...
    def take(self, particles: Any, index: NDArray) -> Any: ...
    def run(self, particles: Any, level: float, rng: np.random.Generator) -> tuple[NDArray, Any, int]: ...
    def peak(self, particles: Any, rng: np.random.Generator) -> tuple[NDArray, int]: ...


def splitting(
    source: Any,
    target: Any = "harm",
    *,
    score: ArrayLike | None = None,
    levels: Sequence[float] | None = None,
    n: int = 200,
    replications: int = 10,
    seed: int = 0,
    level: float = 0.95,
) -> Bound:
    """Probability of a rare hit by fixed-effort splitting over prefixes.

    Parameters
    ----------
    source : Chain or Prefixes
        An exact chain with a start law, or a language model whose prefixes can be continued.
    target : as in `hitting_probability`
        Of a chain; `Prefixes` are made for theirs.
    score : array, shape (n_states,), layered also (L + 1, n_states), optional
        Level function of a chain; by default its exact hitting probability. Any function gives an unbiased answer, the
        committor of a chain estimated from rollouts a good one; numbers within [0, 1] are taken for such an estimate.
    levels : increasing floats, optional
        Levels of the score before the target. By default values of the hitting probability, each about five times the
        one before; with a score of another kind, or `Prefixes`, a pilot run finds them.
    n : int
        Particles per level and replication.
    replications : int
        Independent repetitions, at least 10; the interval comes from the variance between them.
    seed : int
    level : float
        Confidence level.

    Returns
    -------
    Bound
        Scalar; ``reasons["sampling"]`` is its half-width. `info`: levels, passing (share that passed each), estimates
        (one per replication), relative_error, rollouts (continuations begun, the pilot's apart as pilot_rollouts),
        tokens (sampled, pilot included), naive_rollouts (that plain sampling would need for the same error) and
        cost_ratio = rollouts, pilot included, over it.

    Raises
    ------
    InputError
        Levels that do not increase, too few particles or replications, a chain without start or target.
    UntrustedError
        No level, or the target, was reached by fewer than half of the replications; ``partial`` is a Bound whose upper
        end is that of the probability to get as far as was reached.

    Notes
    -----
    Each level begins with n particles of every replication, taken from the hits of the level before as evenly as
    possible (systematic resampling; Garvels draws them independently, which is noisier), and the estimate is the
    product of the fractions that pass. It is unbiased whatever the levels; since a pilot's particles are thrown away,
    levels that it found do not change that. Particles of one replication share ancestors, so the textbook variance
    ``prod(1 + (1 - p_i) / (p_i n)) - 1`` holds only where all entrances are worth the same; the interval uses
    independent replications (see `rare_intervals.pooled`).

    Examples
    --------
    Three in a billion, from 18 000 continuations in place of billions of walks; the exact value stands below:

    >>> from markovsafety.evidence import rare
    >>> chain = ms.toy.ladder(12, p=0.1, start=3)
    >>> bound = rare.splitting(chain, n=200, replications=10)
    >>> print(bound)
    P(harm) = 2.48e-09   95 % [1.29e-09, 4.77e-09]
        because: sampling 2e-9; judge, lumping, model, truncation, rounding not assessed
    >>> bound.info["rollouts"], f"{bound.info['naive_rollouts']:.0e}"
    (18000, '5e+09')
    >>> print(ms.hitting_probability(chain, "harm").at_start)
    P(harm) = 2.57763e-09   proven [2.57763e-09, 2.57763e-09]
        because: rounding 2e-25; sampling, judge, lumping, model, truncation not assessed
    """
    check_level(level)
    _sizes(n=(n, 2), replications=(replications, FEWEST))
    rng = np.random.default_rng(seed)
    made, thresholds = opened(source, target, score, levels)
    pilot = {"pilot_rollouts": 0, "pilot_tokens": 0}
    if thresholds is None:
        thresholds, pilot = pilot_levels(made, n, rng)
    hits, tokens, begun = stages(made, thresholds, n, replications, rng)
    value, lower, upper, error = pooled(hits, n, level)
    active = np.column_stack([np.full(replications, True), hits[:, :-1] > 0])
    info = {
        "name": _name(source, target),
        "method": "fixed-effort splitting",
        "why": f"{len(thresholds) + 1} levels, {replications} replications of {n} particles",
        "levels": np.asarray(thresholds, dtype=np.float64),
        "passing": hits.sum(axis=0) / np.maximum(n * active.sum(axis=0), 1),
        "estimates": np.exp(_log(hits / n).sum(axis=1)),
        "relative_error": error,
        "rollouts": begun,
        "tokens": tokens + pilot.pop("pilot_tokens"),
        **pilot,
    }
    if isinstance(made, Prefixes):
        info["note"] = made.note
    reached = int((hits[:, -1] > 0).sum())
    if 2 * reached < replications:
        raise _not_reached(hits, n, level, info, reached)
    naive = (1 - value) / value / error**2 if error > 0 else np.inf
    spent = begun + info["pilot_rollouts"]
    info |= {"naive_rollouts": naive, "cost_ratio": spent / naive if naive > 0 else np.inf}
    return Bound(value, lower, upper, level, {"sampling": (upper - lower) / 2}, None, json_ready(info))


def _sizes(**parts: tuple[Any, int]) -> None:
    for name, (value, least) in parts.items():
        if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
            raise InputError(
                f"{name} is {value!r}.",
                cause=f"It is a whole number, at least {least}: fewer do not carry an estimate and its error.",
                next=f"Pass {name}={least} or more.",
            )


def _name(source: Any, target: Any) -> str:
    said = getattr(source, "outcome", target)
    return f"P({said})" if isinstance(said, str) else "P(hit)"


def _log(x: NDArray) -> NDArray:
    with np.errstate(divide="ignore"):
        return np.log(x)


def opened(source: Any, target: Any, score: Any, levels: Any) -> tuple[Source, list[float] | None]:
    """The source, and its levels where they are known without a pilot."""
    if not isinstance(source, Chain):
        if not all(callable(getattr(source, verb, None)) for verb in ("begin", "take", "run", "peak")):
            raise InputError(
                f"{type(source).__name__} cannot be split.",
                cause="Splitting continues prefixes of a chain or of a language model.",
                next="Pass a Chain, or evidence.rare.Prefixes(continue_, score, prompts).",
            )
        return source, None if levels is None else _increasing(levels)
    value = hitting_probability(source, target, certify=False).value if score is None else score
    made = jumps(source, target, value)
    if levels is not None:
        return made, _increasing(levels)
    given = made.score[made.moving]
    likely = score is None or bool(((given >= 0) & (given <= 1)).all() and (made.score[made.start > 0] > 0).all())
    return made, _geometric(made) if likely else None


def _increasing(levels: Any) -> list[float]:
    made = np.atleast_1d(np.asarray(levels, dtype=np.float64)) if np.size(levels) else np.zeros(0)
    if made.ndim != 1 or not np.isfinite(made).all() or (np.diff(made) <= 0).any():
        raise InputError(
            f"levels are {np.array2string(made, threshold=6)}.",
            cause="Each level lies beyond the one before; the target itself comes last and is not listed.",
            next="Pass finite increasing numbers, or levels=None.",
        )
    return made.tolist()


def _geometric(source: Jumps) -> list[float]:
    """Values of the committor, each about five times the one before, as far as the chain's states have them."""
    open_ = source.moving | source.target
    first = float(source.start @ np.where(source.target, 1.0, np.where(source.moving, source.score, 0.0)))
    if not first > 0:
        raise UntrustedError(
            "No level can be reached: the target is out of reach of the start.",
            cause="No road of the chain leads from its start law to the target, or its probability underflows.",
            next="The probability is what hitting_probability says; there is nothing to sample.",
            partial=Bound(0.0, 0.0, 0.0 if not (source.start[open_] > 0).any() else 1.0, info={"name": "P(hit)"}),
        )
    inner = np.unique(source.score[source.moving & (source.score < 1)])
    levels, here = [], first
    while here < SHARE_LAST:
        beyond = inner[inner > 2 * here]  # whatever passes with more than a half is not worth a level
        near = beyond[beyond * RATIO**2 < here * 2]
        if not beyond.size or beyond[0] > 0.5:
            break
        here = float(near[np.argmin(np.abs(np.log(near * RATIO / here)))] if near.size else beyond[0])
        levels.append(here)
    return levels


def pilot_levels(source: Source, n: int, rng: np.random.Generator) -> tuple[list[float], dict[str, int]]:
    """Levels that about one particle in five passes, found on particles that are thrown away."""
    levels: list[float] = []
    cost = {"pilot_rollouts": 0, "pilot_tokens": 0}
    particles, last = source.begin(n, 1, rng), -np.inf
    for _ in range(MOST_LEVELS):
        best, tokens = source.peak(particles, rng)
        cost = {"pilot_rollouts": cost["pilot_rollouts"] + n, "pilot_tokens": cost["pilot_tokens"] + tokens}
        if np.isposinf(best).mean() >= RATIO:
            return levels, cost
        beyond = np.unique(best[(best > last) & np.isfinite(best)])
        if not beyond.size:
            if np.isposinf(best).any():
                return levels, cost
            break
        passing = (best[:, None] >= beyond).mean(axis=0)
        distance = np.where(passing > 0.7, np.inf, np.abs(np.log(passing / RATIO)))  # nearly all pass: no progress
        last = float(beyond[np.argmin(distance) if np.isfinite(distance).any() else -1])
        levels.append(last)
        hits, entered, tokens = source.run(particles, last, rng)
        cost = {"pilot_rollouts": cost["pilot_rollouts"] + n, "pilot_tokens": cost["pilot_tokens"] + tokens}
        if not hits.size:
            break
        particles = source.take(entered, _evenly(np.array([len(hits)]), n, rng))
    raise UntrustedError(
        f"The pilot of {n} particles found no way to the target beyond level {last:.3g}.",
        cause="The score does not rise on the road to the target, or rises by too rare a step.",
        next="Pass more particles, levels of your own, or a score that grows towards the target.",
        partial=Bound(0.0, 0.0, 1.0, info={"name": "P(hit)", "levels": levels, **cost}),
    )


def _evenly(hits: NDArray, n: int, rng: np.random.Generator) -> NDArray:
    """For every replication (hits > 0 of each) n of its hits, each as often as any other within one; positions."""
    u = rng.random((len(hits), 1))
    place = np.floor((np.arange(n) + u) * (hits[:, None] / n)).astype(np.int64)
    return (np.minimum(place, hits[:, None] - 1) + (np.cumsum(hits) - hits)[:, None]).ravel()


def stages(
    source: Source, levels: list[float], n: int, replications: int, rng: np.random.Generator
) -> tuple[NDArray[np.int64], int, int]:
    """Hits of every replication at every level, shape (replications, levels + 1); tokens; continuations begun."""
    hits = np.zeros((replications, len(levels) + 1), dtype=np.int64)
    particles, owner = source.begin(n, replications, rng), np.repeat(np.arange(replications), n)
    tokens = begun = 0
    for i, threshold in enumerate([*levels, np.inf]):
        reached, entered, sampled = source.run(particles, threshold, rng)
        tokens, begun = tokens + sampled, begun + len(owner)
        hits[:, i] = np.bincount(owner[reached], minlength=replications)
        alive = np.flatnonzero(hits[:, i])
        if not alive.size or np.isinf(threshold):
            break
        particles = source.take(entered, _evenly(hits[alive, i], n, rng))
        owner = np.repeat(alive, n)
    return hits, tokens, begun


def _not_reached(hits: NDArray, n: int, level: float, info: dict[str, Any], reached: int) -> UntrustedError:
    """The refusal; whoever reaches the target has passed the first level, so that bounds it from above."""
    R, m = hits.shape
    deepest = int((hits > 0).any(axis=0).sum())
    value, _, upper, _ = pooled(hits, n, level)
    upper = float(clopper_pearson(int(hits[:, 0].sum()), n * R, level)[1])  # independent starts: exact
    for i in range(1, deepest):
        if 2 * int((hits[:, i] > 0).sum()) >= R:
            upper = min(upper, pooled(hits[:, : i + 1], n, level)[2])
    partial = Bound(
        value, 0.0, max(upper, value), level, {"sampling": max(upper, value) / 2}, None, json_ready(info)
    )  # fmt: skip
    where = "no level was ever reached" if not deepest else f"{deepest} of {m} levels were reached by at least one"
    return UntrustedError(
        f"The target was reached in {reached} of {R} replications; {where}.",
        cause="Too few particles pass a level for the next one to begin with.",
        next="Pass more particles n, levels closer together, or a score that grows towards the target.",
        partial=partial,
    )


def importance(
    truth: Any,
    proposal: Any,
    target: Any = "harm",
    *,
    n: int = 10_000,
    seed: int = 0,
    level: float = 0.95,
    prompts: str = "drawn",
    own: float = 0.0,
) -> Bound:
    """Probability of a rare hit by importance sampling.

    Parameters
    ----------
    truth : Chain or Rollouts
        What the probability is of: a chain, or the proposal's rollouts with ``logprob`` under the model in question
        (`markovsafety.rollouts.engines.replay.score`).
    proposal : Chain or Rollouts
        What was sampled from: a chain on the same states (`tilt` makes one), or judged rollouts of another model with
        their logged log-probabilities.
    target : as in `hitting_probability`; an outcome for rollouts
    n : int
        Rollouts to sample from a chain.
    seed : int
    level : float
        Confidence level.
    prompts : {"drawn", "fixed"}
        Whether the prompts of rollouts are a sample (the interval is clustered by prompt) or the ones that are meant.
    own : float
        Share of the rollouts of every prompt that the model in question sampled itself, the rest being the
        proposal's, all of them scored under both; in [0, 1). The weights are then those of the mixture and at most
        ``1 / own``, which keeps harmful answers that the proposal hardly ever gives from ruling the estimate.

    Returns
    -------
    Bound
        As `weighted` returns it; `info` adds tokens.

    Raises
    ------
    InputError
        Chains on different states, rollouts that are not the same, log-probabilities that are missing or no numbers.
    UntrustedError
        The effective sample size is below 10, or the proposal cannot make a move on the road to the target, so that
        the estimate is too low by an unknown amount; ``partial`` is the Bound.

    Notes
    -----
    The weight of an answer is the product over its tokens up to the hit of the ratio of probabilities (Glynn and
    Iglehart 1989); tokens after the hit change nothing and would add noise. For chains it is the product over changes
    of state, which alone decide whether there is a hit. The mixture is the defensive one of T. Hesterberg,
    Technometrics 37 (1995) 185, in fixed shares (the balance heuristic).

    Examples
    --------
    Walks of a chain that is tilted towards harm, by a score that need not be exact:

    >>> from markovsafety.evidence import rare
    >>> chain = ms.toy.ladder(12, p=0.1, start=3)
    >>> proposal = rare.tilt(chain, score=0.2 ** np.arange(12, -1, -1))
    >>> print(rare.importance(chain, proposal, n=2000))
    P(harm) = 2.6e-09   95 % [2.42e-09, 2.82e-09]
        because: sampling 2e-10; judge, lumping, model, truncation, rounding not assessed
    >>> print(ms.hitting_probability(chain, "harm").at_start)
    P(harm) = 2.57763e-09   proven [2.57763e-09, 2.57763e-09]
        because: rounding 2e-25; sampling, judge, lumping, model, truncation not assessed
    """
    check_level(level)
    if not isinstance(truth, Chain) or not isinstance(proposal, Chain):
        if not 0 <= own < 1:
            raise InputError(f"own is {own!r}.", cause="It is a share of the rollouts.", next="Pass 0 <= own < 1.")
        hits, weights, prompt, info, lost = logged_weights(truth, proposal, target, own)
        return _or_partial(lost, hits, weights, prompt, level, prompts, _name(None, target), info)
    _sizes(n=(n, 2))
    if list(truth.states) != list(proposal.states) or truth.n_layers != proposal.n_layers:
        raise InputError(
            "The two chains do not have the same states or layers.",
            cause="A weight compares the probabilities of one and the same road.",
            next="Make the proposal from the chain: evidence.rare.tilt(chain, score).",
        )
    one, other = jumps(truth, target), jumps(proposal, truth.mask(target))
    hits, weights, tokens = sample_weighted(one, other, n, np.random.default_rng(seed))
    gap = missing_support(one, other)
    info = {"tokens": tokens}
    lost = None
    if gap is not None:
        label = lambda i: repr(truth.states[i % truth.n_states])  # noqa: E731
        move = f"start in {label(gap[1])}" if gap[0] < 0 else f"move from {label(gap[0])} to {label(gap[1])}"
        lost = f"The proposal can never {move}, which lies on a road to the target."
    return _or_partial(lost, hits, weights, None, level, prompts, _name(None, target), info)


def _or_partial(
    lost: str | None, hits: Any, weights: Any, prompt: Any, level: float, prompts: str, name: str, info: dict[str, Any]
) -> Bound:
    """The weighted estimate, or, where the proposal misses part of the target, the refusal that carries it."""
    if lost is None:
        return weighted(hits, weights, prompt, level=level, prompts=prompts, name=name, info=info)
    try:
        partial = weighted(hits, weights, prompt, level=level, prompts=prompts, name=name, info=info)
    except UntrustedError as error:
        partial = error.partial
    raise UntrustedError(
        lost,
        cause="Answers that go there are never sampled, so the estimate is too low by an unknown amount.",
        next="Let the proposal do all that the model does: a positive score, temperature 1, top_p 1.",
        partial=partial,
    )
