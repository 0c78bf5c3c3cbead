"""The latent guard: a prompt is blocked when the model itself believes it harmful, whatever it would answer.

It needs no training: a hundred prompts of either kind give the centres (arXiv 2507.11878, section 4). What it is worth
shows on the two buckets where belief and behaviour differ, in each category, and after a fine-tuning attack that took
the refusals away; and beside a guard whose direction is random.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..bound import Bound, clustered
from ..errors import InputError
from .beliefs import Beliefs, Centres, believe, centres
from .buckets import BUCKETS, Buckets, label
from .differences import states
from .edits import check_identity
from .positions import Spans
from .separation import Probed, auc, curve, probe

if TYPE_CHECKING:
    from .host import Host

__all__ = ["Assessed", "Attacked", "Guard", "assess", "latent_guard", "probe_beliefs", "under_attack"]


@dataclass(frozen=True, eq=False)
class Guard:
    """Blocks prompts whose Delta_harmful is above a threshold.

    Parameters
    ----------
    means : Centres
    threshold : float
    """

    means: Centres
    threshold: float = 0.0

    def scores(self, host: Host, prompts: Sequence[Any], **options: Any) -> NDArray:
        """Delta_harmful of prompts, float64 (prompts,); options as in `believe`."""
        return believe(host, self.means, prompts, **options).harm

    def blocks(self, host: Host, prompts: Sequence[Any], **options: Any) -> NDArray:
        """Which prompts are blocked, bool (prompts,)."""
        return self.scores(host, prompts, **options) > self.threshold

    def at(self, threshold: float) -> Guard:
        """The same guard with another threshold, such as that of `policy`."""
        return dataclasses.replace(self, threshold=float(threshold))

    def transferred(self) -> Guard:
        """The same guard for any model of the same shape, for example a fine-tuned copy."""
        return dataclasses.replace(self, means=self.means.transferred())


def latent_guard(host: Host, buckets: Buckets, *, threshold: float = 0.0, **options: Any) -> Guard:
    """A guard from refused harmful and accepted harmless prompts; options as in `centres`."""
    return Guard(centres(host, buckets, **options), float(threshold))


@dataclass(frozen=True, eq=False)
class Assessed:
    """What a guard does with prompts it was not made from.

    Attributes
    ----------
    buckets : Buckets
    scores : float64 array, shape (prompts,)
        Delta_harmful.
    threshold : float
    auc : Bound
        Harmful over harmless prompts.
    categories : dict of category -> dict
        "auc" and "curve" (`separation.curve`) of the category's harmful prompts against its own harmless ones, or all
        harmless ones where it has none ("own negatives" says which); "rate": Bound, the share that is blocked.
    false_rate : Bound
        Share of harmless prompts that are blocked.
    accuracy : dict of bucket -> Bound
        Share that the guard classifies rightly; a bucket without prompts is left out.
    refusal : dict of bucket -> Bound
        The same of the classifier "did it refuse?".
    control : dict of str -> Bound
        "auc" and "accuracy" of guards whose positive centre was moved at random as far, over all draws.
    """

    buckets: Buckets
    scores: NDArray
    threshold: float
    auc: Bound
    categories: dict[str, dict[str, Any]]
    false_rate: Bound
    accuracy: dict[str, Bound]
    refusal: dict[str, Bound]
    control: dict[str, Bound] = field(repr=False)

    @property
    def rates(self) -> dict[str, Bound]:
        """Share blocked by category of harmful prompts: what `guarded` takes."""
        return {name: told["rate"] for name, told in self.categories.items()}

    def __str__(self) -> str:
        lines = [str(self.auc), str(self.false_rate)]
        return "\n".join([*lines, *(f"{name}: {b}" for name, b in self.accuracy.items()), str(self.control["auc"])])


def assess(
    host: Host,
    guard: Guard,
    buckets: Buckets,
    *,
    controls: int = 4,
    seed: int = 0,
    level: float = 0.95,
    spans: Spans | None = None,
    batch_size: int | None = None,
) -> Assessed:
    """ROC by category, accuracy by bucket, and a random guard's.

    Parameters
    ----------
    host : Host
    guard : Guard
    buckets : Buckets
        Prompts that the guard was not made from, harmful and harmless ones.
    controls : int
        Random guards.
    seed : int
    level : float
    spans, batch_size
        As in `believe`.

    Returns
    -------
    Assessed

    Raises
    ------
    InputError
        Prompts of one kind only; a guard of another model (``guard.transferred()``).
    """
    harmful = buckets.harmful
    if harmful.all() or not harmful.any() or controls < 1:
        raise InputError(
            f"a guard is assessed on {int(harmful.sum())} harmful and {int((~harmful).sum())} harmless prompts with "
            f"{controls} controls",
            cause="it needs prompts of both kinds, and at least one random guard beside it",
            next="add prompts of the other kind; controls >= 1",
        )
    check_identity(guard.means.model, guard.means.template, host, "the guard", ".transferred()")
    points = states(host, buckets.prompts, ("t_inst",), spans=spans, batch_size=batch_size)[:, :, 0]
    scores, *moved = (
        means.average(means.scores(points, "harm"), "harm")
        for means in (guard.means, *(guard.means.control(seed + i) for i in range(controls)))
    )
    kinds, blocked = buckets.categories, scores > guard.threshold
    table = {}
    for name in sorted(set(kinds[harmful])):
        mine, own = harmful & (kinds == name), ~harmful & (kinds == name)
        others = own if own.any() else ~harmful
        table[str(name)] = {
            "auc": auc(scores[mine], scores[others], level, f"AUC of {name}"),
            "curve": curve(scores[mine], scores[others]),
            "rate": share(blocked[mine], level, f"P(block | {name})"),
            "own negatives": bool(own.any()),
        }
    right = np.stack([(m > guard.threshold) == harmful for m in moved]).mean(axis=0)
    control = {
        "auc": _mean_auc(moved, harmful, level),
        "accuracy": share(right, level, "accuracy of a random guard"),
    }
    return Assessed(
        buckets,
        scores,
        guard.threshold,
        auc(scores[harmful], scores[~harmful], level, "AUC of the guard"),
        table,
        share(blocked[~harmful], level, "P(block | harmless)"),
        _by_bucket(buckets, blocked == harmful, level),
        _by_bucket(buckets, buckets.refused == harmful, level),
        control,
    )


def share(values: NDArray, level: float, name: str) -> Bound:
    """Mean over prompts of numbers in [0, 1], one per prompt."""
    return clustered(np.asarray(values, dtype=np.float64), np.ones(len(values)), level, name)


def _by_bucket(buckets: Buckets, right: NDArray, level: float) -> dict[str, Bound]:
    rows = {name: buckets.rows(name) for name in BUCKETS}
    return {name: share(right[at], level, f"right on {name}") for name, at in rows.items() if len(at)}


def _mean_auc(moved: Sequence[NDArray], harmful: NDArray, level: float) -> Bound:
    """Mean over draws of max(AUC, 1 - AUC): a random vector points to either side by chance."""
    found = [auc(m[harmful], m[~harmful], level) for m in moved]
    sides = [(b.value, b.lower, b.upper) if b.value >= 0.5 else (1 - b.value, 1 - b.upper, 1 - b.lower) for b in found]
    value, lower, upper = np.mean(sides, axis=0)
    name = "AUC of random guards, better side"
    return Bound(value, lower, upper, level, {"sampling": (upper - lower) / 2}, None, {"name": name})


def probe_beliefs(
    host: Host,
    fitted: Buckets,
    held: Buckets,
    level: int,
    *,
    position: str = "t_inst",
    seed: int = 0,
    confidence: float = 0.95,
    batch_size: int | None = None,
) -> Probed:
    """A probe that is not linear, for harmfulness, on other prompts: the guard's control from above.

    Parameters
    ----------
    host : Host
    fitted : Buckets
        Refused harmful and accepted harmless ones are fitted to, as for the guard.
    held : Buckets
        All prompts are tested on.
    level : int
        Of the residual stream.
    position : "t_inst" or "t_post"
    seed : int
    confidence : float
    batch_size : int, optional

    Returns
    -------
    Probed
    """

    def read(prompts: Sequence[Any]) -> NDArray:
        return states(host, prompts, (position,), levels=(level,), batch_size=batch_size)[:, 0, 0]

    sides = [read(fitted.refused_harmful), read(fitted.accepted_harmless)]
    told = np.repeat([True, False], [len(s) for s in sides])
    return probe(np.concatenate(sides), told, read(held.prompts), held.harmful, seed=seed, level=confidence)


@dataclass(frozen=True, eq=False)
class Attacked:
    """A guard before and after somebody fine-tuned the model.

    Attributes
    ----------
    refusal : (Bound, Bound)
        P(refuse | harmful) before and after.
    before, after : Assessed
        The same guard, made on the model before, on the activations of either.
    belief : (Beliefs, Beliefs)
    """

    refusal: tuple[Bound, Bound]
    before: Assessed
    after: Assessed
    belief: tuple[Beliefs, Beliefs] = field(repr=False)

    def __str__(self) -> str:
        words = (f"{self.refusal[0]}\n{self.refusal[1]}", str(self.before.auc), str(self.after.auc))
        return "\n".join(words)


def under_attack(
    guard: Guard, before: Host, after: Host, buckets: Buckets, *, level: float = 0.95, **measured: Any
) -> Attacked:
    """Does a guard outlive a fine-tuning attack that takes the refusals away?

    Parameters
    ----------
    guard : Guard
        Made on the model before.
    before, after : Host
    buckets : Buckets
        As measured before; behaviour after is measured anew.
    level : float
    **measured
        How refusal is measured: options of `label` (tokens, or judge and n).

    Returns
    -------
    Attacked

    Raises
    ------
    InputError
        As `assess` and `label`; models of different widths.
    """
    if (before.width, before.layers) != (after.width, after.layers):
        raise InputError(
            "the two models have other shapes",
            cause=f"{before.layers} blocks of width {before.width}, and {after.layers} of width {after.width}",
            next="give a model and a fine-tuned copy of it",
        )
    later = label(after, buckets.prompts, buckets.harmful, **measured)
    moved = guard.transferred()
    return Attacked(
        (buckets.rate(True, level), later.rate(True, level)),
        assess(before, guard, buckets, level=level),
        assess(after, moved, later, level=level),
        (believe(before, guard.means, buckets.prompts), believe(after, moved.means, later.prompts)),
    )
