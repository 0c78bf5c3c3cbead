"""What a model does under an edit: sampled answers, judged, prompt by prompt, and whether it still speaks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..bound import Bound, clustered
from ..errors import InputError
from ..evidence.paired import change
from ..outcomes import CODES, NOT_JUDGED, OUTCOMES
from ..rollouts.rollouts import Rollouts
from ..rollouts.sample import sample
from .coherence import Quality, quality
from .edits import Edit
from .host import Host

__all__ = ["Behaviour", "behave"]


@dataclass(frozen=True, eq=False)
class Behaviour:
    """Judged answers of one model to some prompts, as counts.

    Parameters
    ----------
    prompt_id : int array, shape (prompts,)
    counts : float64 array, shape (prompts, outcomes)
        Answers by `OUTCOMES`: harm, refusal, benign, truncated.
    quality : Quality
        Shares of answers that end, are cut off, repeat themselves.

    Examples
    --------
    Two prompts with four answers each, judged by somebody else as 0 (harm) or 1 (refusal); token 2 ends an answer:

    >>> rolls = ms.Rollouts.of([[31, 2]] * 8, prompt_id=[0] * 4 + [1] * 4, outcome=[0, 1, 1, 1, 0, 0, 1, 1], hit=1)
    >>> seen = ms.interventions.Behaviour.of(rolls, eos_ids=[2])
    >>> seen
    <Behaviour: 8 answers to 2 prompts: 3 harm, 5 refusal>
    >>> print(seen.rate("harm"))
    P(harm) = 0.375   95 % [0.00307, 0.969]
    because: sampling 0.48; judge, lumping, model, truncation, rounding not assessed
    """

    prompt_id: NDArray
    counts: NDArray
    quality: Quality

    def __repr__(self) -> str:
        told = ", ".join(f"{n:.0f} {name}" for n, name in zip(self.counts.sum(axis=0), OUTCOMES) if n)
        return f"<Behaviour: {self.counts.sum():.0f} answers to {len(self.prompt_id)} prompts: {told}>"

    @classmethod
    def of(cls, rolls: Rollouts, eos_ids: Sequence[int] | None = None) -> Behaviour:
        """Count judged rollouts.

        Parameters
        ----------
        rolls : Rollouts
        eos_ids : sequence of int, optional
            Ids that end an answer; by default those in the provenance.

        Raises
        ------
        InputError
            Some are not judged, or there are none, or it is not known what ends an answer.
        """
        if not len(rolls) or (rolls.outcome == NOT_JUDGED).any():
            raise InputError(
                f"{int((rolls.outcome == NOT_JUDGED).sum())} of {len(rolls)} answers are not judged",
                cause="behaviour is counted by outcome",
                next="sample with judge=, or call markovsafety.judge first",
            )
        prompts, row = np.unique(rolls.prompt_id, return_inverse=True)
        counts = np.zeros((len(prompts), len(OUTCOMES)))
        np.add.at(counts, (row.reshape(-1), rolls.outcome), 1.0)
        return cls(prompts, counts, quality(rolls, eos_ids=eos_ids))

    def rate(self, outcomes: str | Sequence[str], level: float = 0.95) -> Bound:
        """Probability of any of some outcomes, clustered by prompt."""
        return clustered(self._events(outcomes), self.counts.sum(axis=1), level, f"P({_named(outcomes)})")

    def change(self, before: Behaviour, outcomes: str | Sequence[str], level: float = 0.95) -> Bound:
        """By how much the probability of some outcomes grew, paired where the prompts are the same."""
        same = np.array_equal(self.prompt_id, before.prompt_id)
        x, n, y, m = (
            before._events(outcomes),
            before.counts.sum(axis=1),
            self._events(outcomes),
            self.counts.sum(axis=1),
        )
        lower, upper, _, _ = change(x, n, y, m, level, same=same, test=False)
        value = y.sum() / m.sum() - x.sum() / n.sum()
        lower, upper = min(float(lower), value), max(float(upper), value)
        return Bound(value, lower, upper, level, {"sampling": (upper - lower) / 2}, None, {"name": "change"})

    def to_json(self) -> dict[str, Any]:
        """JSON-able: the rates of all outcomes, and the quality."""
        return {**{name: self.rate(name).to_json() for name in OUTCOMES}, "quality": self.quality.to_json()}

    def _events(self, outcomes: str | Sequence[str]) -> NDArray:
        names = [outcomes] if isinstance(outcomes, str) else list(outcomes)
        if not names or not set(names) <= set(CODES):
            raise InputError(
                f"there is no outcome {outcomes!r}",
                cause=f"outcomes are {', '.join(OUTCOMES)}",
                next="name one or several of these",
            )
        return self.counts[:, [CODES[name] for name in dict.fromkeys(names)]].sum(axis=1)


def behave(
    host: Host,
    prompts: Any,
    edit: Edit | None = None,
    *,
    judge: Any,
    n: int = 4,
    max_tokens: int = 64,
    seed: int = 0,
    temperature: float = 1.0,
) -> Behaviour:
    """Sample answers under an edit and count what they are.

    Parameters
    ----------
    host : Host
    prompts : as `markovsafety.sample` takes them
    edit : Edit, optional
        None is the model as it is.
    judge : str or Judge
    n, max_tokens, seed, temperature
        As in `markovsafety.sample`; the same seed gives every edit the same random numbers, so that changes are paired.

    Returns
    -------
    Behaviour

    Raises
    ------
    InputError
        Prompts or parameters that `sample` refuses.

    Examples
    --------
    How many more harmless prompts are refused under a direction? Both arms have the same random numbers:

    >>> from markovsafety.interventions import behave, difference, open_host
    >>> host = open_host(ms.organism.model_path("shallow"))
    >>> harmless = ms.organism.prompts(n=12, harmful=False)
    >>> edit = difference(host, ms.organism.prompts(n=12), harmless, position="t_post").edit(level=3)
    >>> plain, steered = (behave(host, harmless, e, judge="organism", n=2) for e in (None, edit))
    >>> print(steered.change(plain, "refusal"))
    change = 0.7...   95 % [0.3..., 0.9...]
    because: sampling 0...; judge, ... not assessed
    """
    told: dict[str, Any] = {"n": n, "max_tokens": max_tokens, "seed": seed, "temperature": temperature}
    return Behaviour.of(sample(host.engine, prompts, edit=edit, judge=judge, progress=False, **told))


def _named(outcomes: str | Sequence[str]) -> str:
    return outcomes if isinstance(outcomes, str) else " or ".join(outcomes)
