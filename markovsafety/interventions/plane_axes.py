"""The axes of the plane of harmfulness and refusal, for tokens of the answer, and a memory of where it has been.

Directions that were made at the end of the prompt say little of the tokens behind it, whose activations carry mostly
the words themselves. `answer_axes` reads the two questions, is the prompt harmful, will this answer be a refusal, off
the tokens of answers; `running_means` gives a state the memory that one token's activation does not have.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ..errors import InputError
from ..outcomes import CODES, NOT_JUDGED
from ..rollouts.rollouts import ACTIVATION, Rollouts
from .host import Host
from .record import activations

__all__ = ["answer_axes", "running_means"]


def answer_axes(
    host: Host,
    rolls: Rollouts,
    harmful: Sequence[bool] | NDArray,
    *,
    level: int,
    ridge: float = 1e-3,
    seed: int = 0,
    batch_size: int | None = None,
) -> dict[str, tuple[int, NDArray]]:
    """Axes that tell harmful from harmless prompts, and refusals from other answers, at the tokens of answers.

    Parameters
    ----------
    host : Host
    rolls : Rollouts
        Judged, with their prompts' ids; not those that the plane will be drawn of. One position of each answer is read,
        drawn among those before its sampled tokens up to the hit.
    harmful : bool array, shape (answers,)
        Whether the prompt of each answer is harmful.
    level : int
        Of the residual stream.
    ridge : float
        Added to the diagonal of the covariance, in units of its mean.
    seed : int
        Of the positions.
    batch_size : int, optional

    Returns
    -------
    dict of "harm", "refusal" -> (level, float32 array of shape (width,))
        What `with_activations` takes; one unit is the distance of the two means.

    Raises
    ------
    InputError
        Rollouts that are not judged or do not hold their prompts, other lengths, or one of the four cells (harmful or
        not x refusal or not) without answers.

    Notes
    -----
    Fisher's linear discriminants (Ann. Eugenics 7 (1936) 179) with the covariance S inside the four cells. With D the
    two differences of means, (width, 2), each between cells that weigh alike, the axes are the columns of
    S^-1 D (D' S^-1 D)^-1: each is 1 along its own difference and 0 along the other, which Fisher's are not.

    Examples
    --------
    >>> from markovsafety import interventions as inside, organism
    >>> host = inside.open_host(organism.model_path("shallow"))
    >>> harmful, harmless = organism.prompts(n=24), organism.prompts(n=48, harmful=False)
    >>> asked = harmful + organism.prompts(n=24, marker="jailbreak") + harmless
    >>> rolls = ms.sample(host.engine, asked, n=8, max_tokens=48, judge="organism")
    >>> axes = inside.answer_axes(host, rolls, rolls.prompt_id < 48, level=3)

    Averaged over the answer, how much further along each axis do refusals lie than other answers?

    >>> told = inside.running_means(inside.with_activations(host, rolls, axes))
    >>> for name in axes:
    ...     values = told.columns[f"activation_{name}"][told.offsets[1:] - 1]
    ...     print(f"{name}: {values[rolls.outcome == 1].mean() - values[rolls.outcome != 1].mean():.1f}")
    harm: 0.6
    refusal: 0.9
    """
    told = np.asarray(harmful, dtype=bool)
    _check(rolls, told)
    refused = rolls.outcome == CODES["refusal"]
    cells = [(told == a) & (refused == b) for a in (False, True) for b in (False, True)]
    if empty := [i for i, cell in enumerate(cells) if not cell.any()]:
        kind = f"{('harmless', 'harmful')[empty[0] // 2]} prompts that {('are answered', 'are refused')[empty[0] % 2]}"
        raise InputError(
            f"there is no answer to {kind}",
            cause="each axis is read off answers in which the other question has both replies",
            next="add such prompts: jailbroken harmful ones, or harmless ones that look harmful",
        )
    x = _read(host, rolls, level, np.random.default_rng(seed), batch_size)
    means = np.stack([x[cell].mean(axis=0) for cell in cells]).reshape(2, 2, -1)
    inside = np.concatenate([x[cell] - x[cell].mean(axis=0) for cell in cells])
    covariance = inside.T @ inside / len(inside)
    size = np.trace(covariance) / len(covariance)
    apart = np.stack([(means[1] - means[0]).mean(axis=0), (means[:, 1] - means[:, 0]).mean(axis=0)], axis=1)
    weighed = np.linalg.solve(covariance + max(ridge * size, 1e-300) * np.eye(len(covariance)), apart)
    both = np.linalg.solve((apart.T @ weighed).T, weighed.T).astype(np.float32)
    return {name: (int(level), axis) for name, axis in zip(("harm", "refusal"), both)}


def running_means(rolls: Rollouts) -> Rollouts:
    """The same rollouts with every column ``activation_<name>`` averaged over the answer so far.

    Parameters
    ----------
    rolls : Rollouts
        Of `with_activations`.

    Returns
    -------
    Rollouts
        Entry i is the mean of the entries 0 ... i, which looks at nothing behind token i: states made of it are causal.

    Raises
    ------
    InputError
        There is no such column.

    Examples
    --------
    >>> columns = {"activation_refusal": np.array([4.0, 2.0, 0.0, 1.0, 3.0])}
    >>> rolls = ms.Rollouts.of([[7, 8, 9], [7, 2]], prompt_id=[0, 1], columns=columns)
    >>> ms.interventions.running_means(rolls).columns["activation_refusal"]
    array([4., 3., 2., 1., 2.], dtype=float32)
    """
    names = [name for name in rolls.columns if name.startswith(ACTIVATION)]
    if not names:
        raise InputError(
            "the rollouts have no activations",
            cause=f"there is no column that begins with {ACTIVATION!r}",
            next="make them: with_activations(host, rolls, directions)",
        )
    begin = np.repeat(rolls.offsets[:-1], np.diff(rolls.offsets))
    count = np.arange(len(begin)) - begin + 1
    columns = dict(rolls.columns)
    for name in names:
        values = np.asarray(columns[name], dtype=np.float64)
        total = np.concatenate([[0.0], np.cumsum(values)])
        columns[name] = ((total[1:] - total[begin]) / count).astype(np.float32)
    return rolls.replace(columns=columns, provenance={**rolls.provenance, "activations averaged": "over the answer"})


def _check(rolls: Rollouts, harmful: NDArray) -> None:
    for wrong, fact, hint in (
        (harmful.shape != (len(rolls),), f"{harmful.shape} truths stand beside {len(rolls)} answers", "give one each"),
        (bool((rolls.outcome == NOT_JUDGED).any()), "some answers are not judged", "sample with judge="),
        ("prompt_tokens" not in rolls.columns, "the rollouts do not hold their prompts", "sample with this package"),
    ):
        if wrong:
            raise InputError(fact, cause="answers are told apart by prompt and outcome, and read again", next=hint)


def _read(host: Host, rolls: Rollouts, level: int, rng: np.random.Generator, batch_size: int | None) -> NDArray:
    """One activation of each answer, float64 (answers, width)."""
    ends = np.where(rolls.hit >= 0, rolls.hit + 1, rolls.lengths)
    forced = np.asarray(rolls.prefill, dtype=np.int64)
    at = forced + np.floor(rng.random(len(rolls)) * np.maximum(ends - forced, 1)).astype(np.int64)
    asked, answers = list(rolls.columns["prompt_tokens"]), list(rolls.answers())
    read = [np.concatenate([p, a[:k]]).astype(np.int64) for p, a, k in zip(asked, answers, at)]
    return activations(host, read, levels=(level,), batch_size=batch_size)[:, 0, 0].astype(np.float64)
