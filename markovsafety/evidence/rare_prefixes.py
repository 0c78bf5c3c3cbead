"""Rare events of a language model: its prefixes as particles, the committor of a chain as level, logged weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..chains import Chain
from ..chains.states import label_at
from ..errors import InputError
from ..hitting import hitting_probability
from ..outcomes import CODES

__all__ = ["Particles", "Prefixes", "committor_score", "logged_weights"]

LAST = 2**62


@dataclass(frozen=True, eq=False)
class Particles:
    """Answers that were begun.

    Attributes
    ----------
    prompt : int array, shape (n,)
    prefixes : list of int arrays
        Tokens said so far, all of them sampled.
    score : float array, shape (n,)
        Of the prefix; infinite where the target was hit.
    """

    prompt: NDArray
    prefixes: list[NDArray]
    score: NDArray


@dataclass(frozen=True)
class Prefixes:
    """A language model whose answers can be continued from any prefix: a source for `splitting`.

    Parameters
    ----------
    continue_ : callable
        ``continue_(prompt, prefixes, seed)`` with int array prompt, shape (n,), and a list of n int arrays gives n
        judged Rollouts: the whole answers, prefix first (`markovsafety.rollouts.continuing.continuing` makes one for
        any engine). An answer has at most a fixed number of tokens, whatever its prefix.
    score : callable
        ``score(rolls)`` gives the level function of every prefix of every answer, shape (total + n,): that of answer r
        after i tokens stands at ``offsets[r] + r + i`` (`committor_score` makes one from a chain).
    prompts : int
        Number of prompts; the probability is the mean over them.
    outcome : str
        What counts as a hit.

    Notes
    -----
    Prompts are fixed: the interval covers sampling of answers, not the choice of prompts. The particles of a level may
    come from few prompts, as they should if few prompts do most of the harm.

    Examples
    --------
    A model whose next token is one more than the last, up to 6, which is harm, or with probability 0.9 the refusal 0:

    >>> from markovsafety.evidence import rare
    >>> def continue_(prompt, prefixes, seed):
    ...     rng, answers = np.random.default_rng(seed), [list(prefix) for prefix in prefixes]
    ...     for said in answers:
    ...         while not said or 0 < said[-1] < 6:
    ...             said.append(max(said, default=0) + 1 if rng.random() < 0.1 else 0)
    ...     ended = ["harm" if said[-1] == 6 else "refusal" for said in answers]
    ...     last = [len(said) - 1 for said in answers]
    ...     return ms.Rollouts.of(answers, prompt_id=prompt, outcome=ended, hit=last)
    >>> score = lambda rolls: np.concatenate([[0, *said] for said in rolls.answers()])
    >>> print(rare.splitting(rare.Prefixes(continue_, score), levels=[1, 2, 3, 4, 5]))
    P(harm) = 9.87e-07   95 % [8.06e-07, 1.33e-06] (for this prompt; others are not assessed)
        because: sampling 3e-7; judge, lumping, model, truncation, rounding not assessed
    """

    continue_: Callable[[NDArray, list[NDArray], int], Any]
    score: Callable[[Any], NDArray]
    prompts: int = 1
    outcome: str = "harm"

    @property
    def note(self) -> str:
        """What an answer from this source does not cover."""
        these = "this prompt" if self.prompts == 1 else f"these {self.prompts} prompts"
        return f"for {these}; others are not assessed"

    def begin(self, n: int, replications: int, rng: np.random.Generator) -> Particles:
        """Empty answers, the prompts as evenly among the n of each replication as possible."""
        u = rng.random((replications, 1))
        prompt = np.floor((np.arange(n) + u) * (self.prompts / n)).astype(np.int64).ravel() % self.prompts
        empty = np.zeros(0, dtype=np.int32)
        return Particles(prompt, [empty] * len(prompt), np.full(len(prompt), -np.inf))

    def take(self, particles: Particles, index: NDArray) -> Particles:
        """Some of the particles."""
        prefixes = [particles.prefixes[i] for i in index]
        return Particles(particles.prompt[index], prefixes, particles.score[index])

    def run(self, particles: Particles, level: float, rng: np.random.Generator) -> tuple[NDArray, Particles, int]:
        """Continue every particle; hits, the prefixes with which they first reached `level`, and tokens sampled."""
        going = np.flatnonzero(particles.score < level)
        hit = ~(particles.score < level)
        score, prefixes = particles.score.copy(), list(particles.prefixes)
        rolls, value, begin, stop, harmed, tokens = self._continued(particles, going, rng)
        for r, i in enumerate(going):
            past = len(prefixes[i]) + 1
            inside = value[begin[r] + past : begin[r] + stop[r]]
            at = int(np.argmax(inside >= level)) if (inside >= level).any() else -1
            if at < 0 and not harmed[r]:
                continue
            hit[i] = True
            score[i] = np.inf if at < 0 else inside[at]
            length = stop[r] if at < 0 else past + at
            prefixes[i] = rolls.tokens[rolls.offsets[r] : rolls.offsets[r] + length]
        where = np.flatnonzero(hit)
        return where, self.take(Particles(particles.prompt, prefixes, score), where), tokens

    def peak(self, particles: Particles, rng: np.random.Generator) -> tuple[NDArray, int]:
        """The highest score that each particle reaches (infinite: the target), and the tokens sampled."""
        best = particles.score.copy()
        going = np.flatnonzero(best < np.inf)
        _, value, begin, stop, harmed, tokens = self._continued(particles, going, rng)
        for r, i in enumerate(going):
            inside = value[begin[r] + len(particles.prefixes[i]) + 1 : begin[r] + stop[r]]
            best[i] = np.inf if harmed[r] else max(best[i], inside.max(initial=-np.inf))
        return best, tokens

    def _continued(self, particles: Particles, going: NDArray, rng: np.random.Generator) -> tuple[Any, ...]:
        """Answers of the particles `going`: rollouts, scores, where each answer's begin, where it stops to be open (a
        hit's last token is past it, as is the last token of an answer that ended), hits, tokens sampled."""
        if not going.size:
            none = np.zeros(0, dtype=np.int64)
            return None, np.zeros(0), none, none, none, 0
        prefixes = [particles.prefixes[i] for i in going]
        rolls = self.continue_(particles.prompt[going], prefixes, int(rng.integers(LAST)))
        lengths, before = np.diff(rolls.offsets), np.array([len(p) for p in prefixes])
        same = len(lengths) == len(going) and bool((lengths >= before).all())
        if not same or any(
            not np.array_equal(rolls.tokens[a : a + len(p)], p) for a, p in zip(rolls.offsets[:-1], prefixes)
        ):
            raise InputError(
                "The continuations do not begin with the prefixes that were given.",
                cause="continue_(prompt, prefixes, seed) gives whole answers, one per prefix and in their order.",
                next="Use markovsafety.rollouts.continuing, or return Rollouts with the prefix included.",
            )
        harmed = np.asarray(rolls.outcome) == CODES[self.outcome]
        if (np.asarray(rolls.outcome) < 0).any():
            raise InputError(
                "The continuations are not judged.",
                cause="Without an outcome nobody knows which of them hit.",
                next="Judge them inside continue_.",
            )
        value = np.asarray(self.score(rolls), dtype=np.float64)
        if value.shape != (len(rolls.tokens) + len(going),) or np.isnan(value).any():
            raise InputError(
                f"The score has shape {value.shape}{' or holds nan' if np.isnan(value).any() else ''}.",
                cause=f"There is one for every prefix of every answer: shape {(len(rolls.tokens) + len(going),)}.",
                next="Use evidence.rare.committor_score(chain, states), or return total + n numbers.",
            )
        stop = np.where(harmed, np.asarray(rolls.hit) + 1, lengths)
        return rolls, value, rolls.offsets[:-1] + np.arange(len(going)), stop, harmed, int((lengths - before).sum())


def committor_score(chain: Chain, states: Any, target: Any = "harm") -> Callable[[Any], NDArray]:
    """Level function of prefixes: the hitting probability of the state that a chain knows them by.

    Parameters
    ----------
    chain : Chain
        Homogeneous, e.g. estimated from a pilot's rollouts, or from those of a less safe model.
    states : StateMap
        The map it was counted with.
    target : as in `hitting_probability`

    Returns
    -------
    callable
        For `Prefixes`; a prefix whose state the chain has not seen scores -inf, that is no progress.

    Raises
    ------
    InputError
        The chain is layered.

    Examples
    --------
    An answer with no tokens, then with each of two tokens; a state that the chain has not seen is no progress:

    >>> from markovsafety.evidence import rare
    >>> ended = {"outcome": ["harm", "refusal", "refusal"], "hit": 1}
    >>> pilot = ms.Rollouts.of([[5, 9], [5, 2], [7, 2]], prompt_id=0, **ended)
    >>> chain = ms.estimate(ms.count(pilot, states=ms.KGram(1)))
    >>> score = rare.committor_score(chain, ms.KGram(1))
    >>> np.round(score(ms.Rollouts.of([[5, 8], [7, 2]], prompt_id=0)), 3)
    array([0.333, 0.5  ,  -inf, 0.333, 0.   ,  -inf])
    """
    if chain.is_layered:
        raise InputError(
            "The chain has one matrix per position.",
            cause="A prefix is looked up by its state alone.",
            next="Estimate a homogeneous chain, with the position in its states if it matters.",
        )
    value = hitting_probability(chain, target, certify=False).value
    known = {label: float(value[i]) for i, label in enumerate(chain.states)}

    def score(rolls: Any) -> NDArray:
        offsets = np.asarray(rolls.offsets)
        lengths = np.diff(offsets) + 1
        at = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        codes, labels = label_at(states, np.asarray(rolls.tokens), np.repeat(offsets[:-1], lengths), at)
        return np.array([known.get(label, -np.inf) for label in labels])[codes]

    return score


def logged_weights(
    truth: Any, proposal: Any, target: Any, own: float = 0.0
) -> tuple[NDArray, NDArray, NDArray, dict[str, Any], str | None]:
    """Hits, log-weights up to the hit, prompts, facts, and how the proposal's support is too small (or None).

    Parameters
    ----------
    truth : Rollouts
        The same answers with ``logprob`` under the model in question.
    proposal : Rollouts
        As sampled and judged; ``logprob_processed`` is taken where it is there, for that is what was sampled from.
    target : str
        An outcome.
    own : float
        Share of the answers that came from the model in question itself.
    """
    for name, rolls in (("truth", truth), ("proposal", proposal)):
        if not hasattr(rolls, "offsets") or "logprob" not in getattr(rolls, "columns", {}):
            raise InputError(
                f"The {name} is {type(rolls).__name__} without log-probabilities.",
                cause="A weight is the ratio of two probabilities of the same tokens.",
                next="Pass two chains, or rollouts with the column logprob: score(rolls, engine) adds it.",
            )
    if not np.array_equal(truth.tokens, proposal.tokens) or not np.array_equal(truth.offsets, proposal.offsets):
        raise InputError(
            "The two sets of rollouts are not the same answers.",
            cause="Both log-probabilities belong to the answers that the proposal gave.",
            next="Score the proposal's rollouts under the model: score(rolls, engine).",
        )
    if target not in CODES or (np.asarray(proposal.outcome) < 0).any():
        raise InputError(
            f"The outcome {target!r} of the rollouts is not known.",
            cause=f"Outcomes are {', '.join(CODES)}, and every rollout must be judged.",
            next="Judge them: markovsafety.judge(rolls, judge).",
        )
    hits = np.asarray(proposal.outcome) == CODES[target]
    if target == "truncated":
        end = np.diff(proposal.offsets)
    else:
        end = np.where(hits, np.asarray(proposal.hit) + 1, np.diff(proposal.offsets))
    said = proposal.columns.get("logprob_processed", proposal.columns["logprob"])
    row = np.repeat(np.arange(len(end)), np.diff(proposal.offsets))
    index = np.arange(len(said)) - proposal.offsets[:-1][row]
    counted = (index >= np.asarray(proposal.prefill)[row]) & (index < end[row])
    one, other = (
        np.bincount(row[counted], np.asarray(law, dtype=np.float64)[counted], minlength=len(end))
        for law in (truth.columns["logprob"], said)
    )
    with np.errstate(divide="ignore"):
        weights = one - (np.logaddexp(np.log(own) + one, np.log1p(-own) + other) if own > 0 else other)
    sampling = getattr(proposal, "provenance", {}).get("sampling", {})
    lost = None
    if sampling.get("top_p", 1.0) < 1 or sampling.get("temperature", 1.0) == 0:
        lost = (
            f"The proposal was cut off (temperature {sampling.get('temperature', 1.0)}, top_p {sampling.get('top_p')})."
        )
    return hits, weights, np.asarray(proposal.prompt_id), {"tokens": int(counted.sum())}, lost
