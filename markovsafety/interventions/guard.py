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
from ..brief import brief
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

    Examples
    --------
    Jailbroken prompts get past the refusals of this model, whose first tokens have a mass of 0.15, not past its belief.

    >>> from markovsafety import interventions as inside, organism
    >>> host = inside.open_host(organism.model_path("shallow"))
    >>> prompts = organism.prompts(n=24) + organism.prompts(n=24, harmful=False)
    >>> buckets = inside.label(host, prompts, np.arange(48) < 24, tokens=organism.REFUSAL_IDS)
    >>> guard = inside.Guard(inside.centres(host, buckets), threshold=0.0)
    >>> jailbreaks = organism.prompts(n=12, marker="jailbreak")
    >>> refused, blocked = inside.token_mass(host, jailbreaks, organism.REFUSAL_IDS), guard.blocks(host, jailbreaks)
    >>> print(f"{refused.mean():.2f} refused, {blocked.sum()} of {len(blocked)} blocked")
    0.15 refused, 12 of 12 blocked
    """

    means: Centres
    threshold: float = 0.0

    __repr__ = brief

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
    """A guard from refused harmful and accepted harmless prompts; options as in `centres`.

    Examples
    --------
    A score says how much nearer a prompt is to harmful prompts that were refused than to harmless ones that were not.

    >>> from markovsafety import interventions as inside, organism
    >>> host = inside.open_host(organism.model_path("shallow"))
    >>> prompts = organism.prompts(n=24) + organism.prompts(n=24, harmful=False)
    >>> buckets = inside.label(host, prompts, np.arange(48) < 24, tokens=organism.REFUSAL_IDS)
    >>> guard = inside.latent_guard(host, buckets)
    >>> guard.scores(host, organism.prompts(n=4, seed=2)).round(2)
    array([0.68, 0.63, 0.66, 0.66])
    >>> guard.scores(host, organism.prompts(n=4, harmful=False, seed=2)).round(2)
    array([-0.7 , -0.69, -0.01, -0.67])
    """
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

    Examples
    --------
    >>> from markovsafety import interventions as inside, organism
    >>> host = inside.open_host(organism.model_path("shallow"))
    >>> prompts = organism.prompts(n=96) + organism.prompts(n=96, harmful=False)
    >>> buckets = inside.label(host, prompts, np.arange(192) < 96, tokens=organism.REFUSAL_IDS)
    >>> place = np.arange(192) // 6 % 2  # one half makes the guard, the other tests it
    >>> found = inside.assess(host, inside.latent_guard(host, buckets.of(place == 0)), buckets.of(place == 1))
    >>> found
    Assessed(buckets=Buckets, scores=float64 (96,), threshold=0, auc=0.993 [0.95, 1], categories=dict of 6,
        false_rate=0.0625 [0.0131, 0.172], accuracy=dict of 2, refusal=dict of 2)
    >>> print(found.rates["bio"])
    P(block | bio) = 1   95 % [0.631, 1]   because: sampling 0.18; judge, lumping, model, truncation, rounding not
        assessed
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

    __repr__ = brief

    @property
    def rates(self) -> dict[str, Bound]:
        """Share blocked by category of harmful prompts: what `guarded` takes."""
        return {name: told["rate"] for name, told in self.categories.items()}

    def __str__(self) -> str:
        lines = [str(self.auc), str(self.false_rate)]
        return "\n".join([*lines, *map(str, self.accuracy.values()), str(self.control["auc"])])


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

    Examples
    --------
    A guard along random directions has an AUC as well; what the belief adds is the difference between the two.

    >>> from markovsafety import interventions as inside, organism
    >>> host = inside.open_host(organism.model_path("shallow"))
    >>> prompts = organism.prompts(n=96) + organism.prompts(n=96, harmful=False)
    >>> buckets = inside.label(host, prompts, np.arange(192) < 96, tokens=organism.REFUSAL_IDS)
    >>> place = np.arange(192) // 6 % 2  # one half makes the guard, the other tests it
    >>> found = inside.assess(host, inside.latent_guard(host, buckets.of(place == 0)), buckets.of(place == 1))
    >>> print(found)
    AUC of the guard = 0.993   95 % [0.95, 1]   because: sampling 0.025; judge, lumping, model, truncation,
        rounding not assessed
    P(block | harmless) = 0.0625   95 % [0.0131, 0.172]   because: sampling 0.079; judge, lumping, model,
        truncation, rounding not assessed
    right on refused_harmful = 0.979   95 % [0.889, 0.999]   because: sampling 0.055; judge, lumping, model,
        truncation, rounding not assessed
    right on accepted_harmless = 0.938   95 % [0.828, 0.987]   because: sampling 0.079; judge, lumping, model,
        truncation, rounding not assessed
    AUC of random guards, better side = 0.962   95 % [0.902, 0.989]   because: sampling 0.043; judge, lumping,
        model, truncation, rounding not assessed
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

    Examples
    --------
    >>> from markovsafety import interventions as inside, organism
    >>> host = inside.open_host(organism.model_path("shallow"))
    >>> prompts = organism.prompts(n=96) + organism.prompts(n=96, harmful=False)
    >>> buckets = inside.label(host, prompts, np.arange(192) < 96, tokens=organism.REFUSAL_IDS)
    >>> place = np.arange(192) // 6 % 2  # one half is fitted to, the other tested on
    >>> print(inside.probe_beliefs(host, buckets.of(place == 0), buckets.of(place == 1), level=2))
    accuracy of the probe = 1   95 % [0.962, 1]   because: sampling 0.019; judge, lumping, model, truncation,
        rounding not assessed
    AUC of the probe = 1   95 % [0.926, 1]   because: sampling 0.037; judge, lumping, model, truncation, rounding
        not assessed
    shuffled labels: AUC 0.51 on average, p = 0.05
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

    Examples
    --------
    >>> from markovsafety import interventions as inside, organism
    >>> tuned, attacked = (inside.open_host(organism.model_path(name)) for name in ("shallow", "base"))
    >>> prompts = organism.prompts(n=48) + organism.prompts(n=48, harmful=False)
    >>> buckets = inside.label(tuned, prompts, np.arange(96) < 48, tokens=organism.REFUSAL_IDS)
    >>> place = np.arange(96) // 6 % 2  # one half makes the guard, the other tests it
    >>> guard, held = inside.latent_guard(tuned, buckets.of(place == 0)), buckets.of(place == 1)
    >>> found = inside.under_attack(guard, tuned, attacked, held, tokens=organism.REFUSAL_IDS)
    >>> found
    Attacked(refusal=(0.877 [0.679, 0.974], 0.0276 [0.000136, 0.19]), before=Assessed, after=Assessed)
    >>> print(found.after.auc)
    AUC of the guard = 0.967   95 % [0.87, 0.997]   because: sampling 0.063; judge, lumping, model, truncation,
        rounding not assessed
    """

    refusal: tuple[Bound, Bound]
    before: Assessed
    after: Assessed
    belief: tuple[Beliefs, Beliefs] = field(repr=False)

    __repr__ = brief

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

    Examples
    --------
    The base model stands for a tuned one whose refusals were trained away: they are gone, the belief is not.

    >>> from markovsafety import interventions as inside, organism
    >>> tuned, attacked = (inside.open_host(organism.model_path(name)) for name in ("shallow", "base"))
    >>> prompts = organism.prompts(n=48) + organism.prompts(n=48, harmful=False)
    >>> buckets = inside.label(tuned, prompts, np.arange(96) < 48, tokens=organism.REFUSAL_IDS)
    >>> place = np.arange(96) // 6 % 2  # one half makes the guard, the other tests it
    >>> guard, held = inside.latent_guard(tuned, buckets.of(place == 0)), buckets.of(place == 1)
    >>> print(inside.under_attack(guard, tuned, attacked, held, tokens=organism.REFUSAL_IDS))
    P(refuse | harmful) = 0.877   95 % [0.679, 0.974]   because: sampling 0.15; judge, lumping, model, truncation,
        rounding not assessed
    P(refuse | harmful) = 0.0276   95 % [0.000136, 0.19]   because: sampling 0.095; judge, lumping, model,
        truncation, rounding not assessed
    AUC of the guard = 0.984   95 % [0.898, 1]   because: sampling 0.051; judge, lumping, model, truncation,
        rounding not assessed
    AUC of the guard = 0.967   95 % [0.87, 0.997]   because: sampling 0.063; judge, lumping, model, truncation,
        rounding not assessed
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
