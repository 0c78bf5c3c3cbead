"""Which head moves behaviour: one forward pass per head and size of edit, reading the law of the first token.

The paper samples whole answers under every head and alpha; here the first token's law goes first, and only the best
heads are sampled (`choose_heads`).

Source: arXiv 2502.05945, section 3 (choice of heads by what the model does).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..bound import Bound, clustered
from ..brief import brief
from ..errors import InputError
from .edits import Edit
from .heads import Head, HeadDirections
from .host import Host
from .record import log_masses

__all__ = ["ALPHAS", "HeadSweep", "sweep_heads"]

ALPHAS = (1.0, 2.0, 5.0, 10.0, 20.0, 40.0)


@dataclass(frozen=True, eq=False)
class HeadSweep:
    """What the first token of the answer becomes when one head at a time is edited.

    Parameters
    ----------
    alphas : float array, shape (alphas,)
    mass : float64 array, shape (layers, heads, alphas, prompts)
        Probability that the answer begins with a desired token; nan for heads without a direction.
    log_odds : float64 array, shape (layers, heads, alphas)
        Mean over prompts of the log-odds of desired against undesired, nats.
    random : float64 array, shape (layers, heads, alphas, prompts)
        Probability under a random vector of the same norm on the same head.
    base : float64 array, shape (prompts,)
        The probability without edit.
    base_log_odds : float

    Examples
    --------
    >>> from markovsafety import interventions as inside, organism
    >>> host = inside.open_host(organism.model_path("shallow"))
    >>> found = inside.head_directions(host, organism.prompts(n=12, harmful=False), organism.prompts(n=12))
    >>> comply = [organism.WORDS.index(word) for word in ("sure", "okay", "certainly", "yes")]
    >>> sweep = inside.sweep_heads(host, found, organism.prompts(n=6, seed=1), comply, alphas=(1, 5, 20))
    >>> sweep
    HeadSweep(alphas=float64 (3,), mass=float64 (4, 4, 3, 6), log_odds=float64 (4, 4, 3), random=float64 (4, 4, 3,
        6), base=float64 (6,), base_log_odds=-2.044)
    >>> sweep.ranked[0], sweep.alpha(sweep.ranked[0])
    ((1, 2), 5.0)
    """

    alphas: NDArray
    mass: NDArray
    log_odds: NDArray
    random: NDArray
    base: NDArray
    base_log_odds: float

    __repr__ = brief

    @property
    def control(self) -> NDArray:
        """Mean probability under random vectors, (layers, heads, alphas)."""
        return self.random.mean(axis=-1)

    @property
    def best(self) -> NDArray:
        """Largest mean probability over alphas, (layers, heads); nan for heads without a direction."""
        return self.mass.mean(axis=-1).max(axis=-1)

    @property
    def score(self) -> NDArray:
        """What heads are ranked by, (layers, heads): the probability beyond the random vector's, mean over alphas.

        The largest probability alone would put first what any vector does if it is long enough; a head that moves
        behaviour does so at a small alpha, and at all larger ones.
        """
        return (self.mass.mean(axis=-1) - self.control).mean(axis=-1)

    @property
    def ranked(self) -> list[Head]:
        """Heads with a direction, the strongest first."""
        heads = [(int(layer), int(head)) for layer, head in np.argwhere(np.isfinite(self.score))]
        return sorted(heads, key=lambda head: -self.score[head])

    @property
    def lead(self) -> float:
        """At the alpha at which the first head does most: its mean probability, less the largest of any other head.

        Over all alphas other heads may catch up, at many times the natural size of their outputs. 1 without another.
        """
        first, *others = self.ranked
        at = int(np.argmax(self.mass[first].mean(axis=-1)))
        means = self.mass[:, :, at].mean(axis=-1)
        return float(means[first] - max(means[head] for head in others)) if others else 1.0

    def alpha(self, head: Head) -> float:
        """The alpha at which a head does most."""
        return float(self.alphas[int(np.argmax(self.mass[head].mean(axis=-1)))])

    def bound(self, head: Head, level: float = 0.95) -> Bound:
        """The mean probability of a head at its best alpha, with its interval over prompts.

        The alpha was chosen on the same prompts, so the interval describes them, not what was to be expected.
        """
        return _most(self.mass[head], level, f"P(desired first | head {head})")

    def random_bound(self, head: Head, level: float = 0.95) -> Bound:
        """The mean probability under the random vector on a head, at the alpha at which it does most."""
        return _most(self.random[head], level, f"P(desired first | random vector on head {head})")

    def rows(self) -> list[dict[str, Any]]:
        """JSON-able, one row per head, the strongest first."""
        return [
            {
                "rank": i + 1,
                "layer": head[0],
                "head": head[1],
                "alpha": self.alpha(head),
                "mass": self.bound(head).to_json(),
                "score": float(self.score[head]),
                "control": self.control[head].tolist(),
                "log_odds": self.log_odds[head].tolist(),
            }
            for i, head in enumerate(self.ranked)
        ]


def _most(masses: NDArray, level: float, name: str) -> Bound:
    """The largest mean over prompts of probabilities (alphas, prompts)."""
    best = masses[int(np.argmax(masses.mean(axis=-1)))]
    return clustered(np.clip(best, 0, 1), np.ones(len(best)), level, name)


def sweep_heads(
    host: Host,
    directions: HeadDirections,
    prompts: Sequence[Any],
    desired: Sequence[int],
    undesired: Sequence[int] | None = None,
    *,
    alphas: Sequence[float] = ALPHAS,
    heads: Sequence[Head] | None = None,
    seed: int = 0,
    batch_size: int | None = None,
) -> HeadSweep:
    """Edit every head alone and read the law of the first token: two forward passes per head, alpha and prompt.

    Parameters
    ----------
    host : Host
    directions : HeadDirections
    prompts : sequence of prompts
        Ones on which the model does not do what is desired, other than those that the directions were made from.
    desired, undesired : sequence of int
        First tokens; undesired are by default all others (they matter for the log-odds only).
    alphas : sequence of float
    heads : sequence of (layer, head), optional
        Those that have a direction by default.
    seed : int
        Of the random vectors that stand beside.
    batch_size : int, optional

    Returns
    -------
    HeadSweep

    Raises
    ------
    InputError
        No alpha, or tokens that the model does not have.

    Examples
    --------
    Which head, edited alone, makes refused prompts begin with a word of compliance?

    >>> from markovsafety import interventions as inside, organism
    >>> host = inside.open_host(organism.model_path("shallow"))
    >>> found = inside.head_directions(host, organism.prompts(n=12, harmful=False), organism.prompts(n=12))
    >>> comply = [organism.WORDS.index(word) for word in ("sure", "okay", "certainly", "yes")]
    >>> sweep = inside.sweep_heads(host, found, organism.prompts(n=6, seed=1), comply, alphas=(1, 5, 20))
    >>> sweep.best.round(1)  # the most that a head does, layers x heads
    array([[0.1, 0.1, 0.1, 0.1],
           [0.1, 0.8, 0.8, 0.1],
           [0.1, 0.7, 0.3, 0.1],
           [0.1, 0.1, 0.1, 0.1]])
    >>> print(sweep.bound((1, 2)))
    P(desired first | head (1, 2)) = 0.847   95 % [0.372, 0.997] (the weighted rollouts are worth 6 independent
        ones only)   because: sampling 0.31; judge, lumping, model, truncation, rounding not assessed
    >>> print(sweep.random_bound((1, 2)))
    P(desired first | random vector on head (1, 2)) = 0.115   95 % [0.000671, 0.591] (the weighted rollouts are
        worth 6 independent ones only)   because: sampling 0.3; judge, lumping, model, truncation, rounding not
        assessed
    """
    sizes = np.asarray(alphas, dtype=np.float64)
    for tokens in (desired, [0] if undesired is None else undesired):
        if not len(tokens) or min(tokens) < 0 or max(tokens) >= host.vocab_size or not sizes.size:
            raise InputError(
                f"a sweep over {sizes.size} alphas and {len(tokens)} first tokens makes no sense",
                cause=f"it needs at least one alpha, and tokens between 0 and {host.vocab_size - 1}",
                next="name the ids with which an answer begins that does what is desired (or not)",
            )
    ids = host.prompt_ids(prompts)

    def read(edit: Edit | None) -> tuple[NDArray, float]:
        sets = [desired] if undesired is None else [desired, undesired]
        wished, *rest = log_masses(host, ids, sets, edit=edit, batch_size=batch_size)
        mass = np.minimum(np.exp(wished), 1.0)
        other = rest[0] if rest else np.log1p(-np.minimum(mass, 1 - 1e-12))
        return mass, float((wished - other).mean())

    base, odds = read(None)
    mass, random = (np.full((*directions.sigma.shape, len(sizes), len(ids)), np.nan) for _ in range(2))
    log_odds = np.full((*directions.sigma.shape, len(sizes)), np.nan)
    for head, (i, alpha) in product(directions.heads if heads is None else heads, enumerate(sizes)):
        layer, place = head
        edit = directions.edit([head], float(alpha))
        mass[layer, place, i], log_odds[layer, place, i] = read(edit)
        random[layer, place, i] = read(edit.control(seed))[0]
    return HeadSweep(sizes, mass, log_odds, random, base, odds)
