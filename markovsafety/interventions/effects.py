"""What an edit does to a behaviour, beside what a random edit of the same size does; and the level where it does most.

A probe that is right everywhere may read what the model does not use. So a level is chosen by what steering there
changes beyond a norm-matched random control, and "not causal" and "not separated" are answers, not errors.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..bound import Bound, clustered
from ..errors import InputError
from .differences import states
from .directions import Direction
from .edits import Edit
from .positions import Span, Spans
from .separation import auc

if TYPE_CHECKING:
    from .host import Host

__all__ = ["Effect", "LevelSweep", "Tried", "choose_level", "effect"]

Behaviour = Callable[[Edit | None], Any]
"""An edit -> one probability per prompt, for example ``lambda edit: token_mass(host, prompts, REFUSAL, edit=edit)``."""


@dataclass(frozen=True, eq=False)
class Effect:
    """A behaviour without an edit, under it, and under random edits of the same norms.

    Attributes
    ----------
    name : str
        The behaviour.
    base, edited, control : Bound
        Mean probability over the prompts; the control is also averaged over its draws.
    change : Bound
        edited - base, paired by prompt.
    net : Bound
        edited - control, paired by prompt: what the direction does beyond its size.
    worst_control : Bound
        Mean under the random draw that moves it farthest from the base.
    probabilities : dict of str -> float64 array, shape (prompts,)
        base, edited and control of every prompt.

    Examples
    --------
    A made-up model of forty prompts, in which the first of 64 dimensions decides about refusals:

    >>> from markovsafety.interventions import Edit, Part, effect
    >>> def refused(edit):
    ...     pushed = 0.0 if edit is None else edit.parts[0].vector[0]
    ...     return np.full(40, 1 / (1 + np.exp(3 - pushed)))
    >>> found = effect(Edit((Part("add", 5 * np.eye(64)[0]),)), refused, name="P(refuse)")
    >>> found
    <Effect on P(refuse): 0.0474 -> 0.881, random control 0.0765>
    >>> print(found.net)
    P(refuse), edited - control = 0.804   95 % [0.532, 0.946]
    because: sampling 0.21; judge, lumping, model, truncation, rounding not assessed
    """

    name: str
    base: Bound
    edited: Bound
    control: Bound
    change: Bound
    net: Bound
    worst_control: Bound
    probabilities: dict[str, NDArray] = field(repr=False)

    def __str__(self) -> str:
        return "\n".join(str(b) for b in (self.base, self.edited, self.control, self.net))

    def __repr__(self) -> str:
        control = f"random control {self.control.value:.3g}"
        return f"<Effect on {self.name}: {self.base.value:.3g} -> {self.edited.value:.3g}, {control}>"


def effect(
    edit: Edit, behaviour: Behaviour, *, name: str = "behaviour", controls: int = 4, seed: int = 0, level: float = 0.95
) -> Effect:
    """Measure a behaviour without and with an edit, and with random edits of the same norms.

    Parameters
    ----------
    edit : Edit
    behaviour : callable
        Edit or None -> probabilities in [0, 1], one per prompt.
    name : str
    controls : int
        Random draws, at least 1.
    seed : int
    level : float

    Returns
    -------
    Effect

    Raises
    ------
    InputError
        No control, or a behaviour that gives no probabilities.

    Examples
    --------
    Steering towards refusal, beside random vectors of the same length:

    >>> from markovsafety.interventions import difference, effect, open_host, token_mass
    >>> host = open_host(ms.organism.model_path("shallow"))
    >>> harmless = ms.organism.prompts(n=12, harmful=False)
    >>> edit = difference(host, ms.organism.prompts(n=12), harmless, position="t_post").edit(level=3)
    >>> refused = lambda e: token_mass(host, harmless, ms.organism.REFUSAL_IDS, edit=e)
    >>> print(effect(edit, refused, name="P(refuse)"))
    P(refuse) = 0.03...   95 % [...]   because: sampling ...
    P(refuse), edited = 0.8...   95 % [...]   because: sampling ...
    P(refuse), random control = 0.0...   95 % [...]   because: sampling ...
    P(refuse), edited - control = 0.8...   95 % [0.2..., 0.9...]
    because: sampling 0.3...; judge, ... not assessed
    """
    return _effect(edit, behaviour, _asked(behaviour, None), name, controls, seed, level)


def _effect(
    edit: Edit, behaviour: Behaviour, base: NDArray, name: str, controls: int, seed: int, level: float
) -> Effect:
    if controls < 1:
        raise InputError(
            f"controls is {controls}",
            cause="no effect is read without what a random edit of the same size does",
            next="give at least 1",
        )
    edited = _asked(behaviour, edit)
    draws = np.stack([_asked(behaviour, edit.control(seed + i)) for i in range(controls)])
    control, worst = draws.mean(axis=0), draws[np.abs(draws.mean(axis=1) - base.mean()).argmax()]
    one = np.ones(len(base))
    return Effect(
        name,
        clustered(base, one, level, name),
        clustered(edited, one, level, f"{name}, edited"),
        clustered(control, one, level, f"{name}, random control"),
        paired(edited, base, level, f"change of {name}"),
        paired(edited, control, level, f"{name}, edited - control"),
        clustered(worst, one, level, f"{name}, worst random control"),
        {"base": base, "edited": edited, "control": control},
    )


def paired(a: NDArray, b: NDArray, level: float = 0.95, name: str = "difference") -> Bound:
    """Mean of a - b over prompts, for numbers in [0, 1] that belong to the same prompts.

    Parameters
    ----------
    a, b : array, shape (prompts,)
    level : float
    name : str

    Returns
    -------
    Bound
        The interval of `clustered` for (1 + a - b) / 2, which lies in [0, 1]; honest where all differences are equal.
    """
    half = clustered((1 + np.asarray(a) - np.asarray(b)) / 2, np.ones(len(a)), level)
    value, lower, upper = (2 * x - 1 for x in (half.value, half.lower, half.upper))
    return Bound(value, lower, upper, level, {"sampling": (upper - lower) / 2}, None, {**half.info, "name": name})


@dataclass(frozen=True, eq=False)
class Tried:
    """One level and scale of a sweep.

    Attributes
    ----------
    level : int
    scale : float
    effect : Effect
        Its intervals hold for all that was tried at once.
    auc : Bound or None
        How well projections on the direction at this level tell the two kinds of prompts apart.
    """

    level: int
    scale: float
    effect: Effect
    auc: Bound | None


@dataclass(frozen=True, eq=False)
class LevelSweep:
    """Which level steers.

    Attributes
    ----------
    verdict : "causal", "not causal" or "not separated"
    reason : str
    direction : Direction
        With the level of the largest causal effect chosen, whatever the verdict.
    best : Tried
    tried : tuple of Tried

    Examples
    --------
    >>> from markovsafety.interventions import choose_level, difference, open_host, token_mass
    >>> host = open_host(ms.organism.model_path("shallow"))
    >>> harmless = ms.organism.prompts(n=12, harmful=False)
    >>> direction = difference(host, ms.organism.prompts(n=12), harmless, position="t_post")
    >>> refused = lambda e: token_mass(host, harmless, ms.organism.REFUSAL_IDS, edit=e)
    >>> found = choose_level(host, direction, refused, name="P(refuse)", scales=[1.0])
    >>> found
    <LevelSweep: causal: at level 3, scale 1, P(refuse) goes from 0.03 to 0.88; with
    random vectors ... to 0.02>
    >>> [(row["level"], abs(round(row["net"].value, 1))) for row in found.table]
    [(1, 0.0), (2, 0.8), (3, 0.9)]
    """

    verdict: str
    reason: str
    direction: Direction
    best: Tried
    tried: tuple[Tried, ...]

    def __bool__(self) -> bool:
        return self.verdict == "causal"

    def __str__(self) -> str:
        return f"{self.verdict}: {self.reason}"

    def __repr__(self) -> str:
        return f"<LevelSweep: {self}>"

    @property
    def table(self) -> list[dict[str, Any]]:
        """One row per level and scale: level, scale, auc, base, edited, control, net, worst_control."""
        rows = []
        for t in self.tried:
            told = {name: getattr(t.effect, name) for name in ("base", "edited", "control", "net", "worst_control")}
            rows.append({"level": t.level, "scale": t.scale, "auc": t.auc, **told})
        return rows


def choose_level(
    host: Host,
    direction: Direction,
    behaviour: Behaviour,
    *,
    name: str = "behaviour",
    scales: Sequence[float] = (1.0, 2.0),
    share: float = 0.8,
    least: float = 0.5,
    where: Span | None = None,
    held: tuple[Sequence[Any], Sequence[Any]] | None = None,
    spans: Spans | None = None,
    controls: int = 4,
    seed: int = 0,
    level: float = 0.95,
) -> LevelSweep:
    """Choose the level at which a direction moves a behaviour most, beyond a random vector of the same norm.

    Parameters
    ----------
    host : Host
    direction : Direction
    behaviour : callable
        Edit or None -> probability of the behaviour, one per prompt. It should be rare without the edit.
    name : str
    scales : sequence of float
        Negative ones steer towards the other side.
    share : float
        Part of the blocks to search: near the last one even random vectors decide the next token.
    least : float
        The effect from which on the behaviour counts as flipped.
    where : (int, int or None), optional
        Prompt tokens to edit.
    held : (positive, negative) prompts, optional
        Both kinds, not those that the direction was made from: their AUC per level stands beside the effects.
    spans : Spans, optional
        Of the held-out prompts.
    controls, seed
        As in `effect`.
    level : float
        Confidence of all intervals together.

    Returns
    -------
    LevelSweep

    Raises
    ------
    InputError
        No level to search: all are zero, or `share` leaves none.

    Notes
    -----
    The rule that a level is chosen by its effect, in the lower part of the model, is that of A. Arditi et al. (Refusal
    is mediated by a single direction, 2024); subtracting the control and asking for a flip is ours.

    Examples
    --------
    >>> from markovsafety.interventions import choose_level, difference, open_host, token_mass
    >>> host = open_host(ms.organism.model_path("shallow"))
    >>> harmless = ms.organism.prompts(n=12, harmful=False)
    >>> direction = difference(host, ms.organism.prompts(n=12), harmless, position="t_post")
    >>> refused = lambda e: token_mass(host, harmless, ms.organism.REFUSAL_IDS, edit=e)
    >>> choose_level(host, direction, refused, name="P(refuse)", scales=[1.0]).direction
    <Direction harmful - harmless: positive pushes towards harmful; at t_post, level 3,
    from 12 + 12 prompts>
    """
    levels = [i for i in range(len(direction.norms)) if i < share * host.layers and direction.norms[i] > 0]
    if not levels or not len(scales):
        raise InputError(
            "there is no level to search",
            cause=f"of {host.layers} blocks a share of {share:g} is searched, and levels where the direction is zero "
            "are left out",
            next="give a larger share, at least one scale, or a direction that is not zero",
        )
    each = 1 - (1 - level) / (len(levels) * len(scales))
    scores = _probes(host, direction, levels, held, spans, 1 - (1 - level) / len(levels))
    base = _asked(behaviour, None)
    tried = []
    for at in levels:
        for scale in scales:
            edit = direction.edit(scale, at, where=where)
            tried.append(
                Tried(at, float(scale), _effect(edit, behaviour, base, name, controls, seed, each), scores.get(at))
            )
    best = max(tried, key=lambda t: t.effect.net.value)
    verdict, reason = _verdict(best, tried, least, name)
    about = {**direction.about, "level chosen by": f"effect on {name}, {verdict}", "scale": best.scale}
    chosen = dataclasses.replace(direction, level=best.level, about=about)
    return LevelSweep(verdict, reason, chosen, best, tuple(tried))


def _probes(
    host: Host, direction: Direction, levels: Sequence[int], held: Any, spans: Spans | None, level: float
) -> dict[int, Bound]:
    if held is None:
        return {}
    sides = [
        np.einsum(
            "nlw,lw->nl",
            states(host, prompts, (direction.position,), spans=spans, levels=levels)[:, :, 0].astype(np.float64),
            direction.vectors[list(levels)].astype(np.float64),
        )
        for prompts in held
    ]
    return {at: auc(sides[0][:, i], sides[1][:, i], level, f"AUC at level {at}") for i, at in enumerate(levels)}


def _verdict(best: Tried, tried: Sequence[Tried], least: float, name: str) -> tuple[str, str]:
    done = best.effect
    told = (
        f"at level {best.level}, scale {best.scale:g}, {name} goes from {done.base.value:.2f} to "
        f"{done.edited.value:.2f}; with random vectors of the same norm to {done.control.value:.2f}"
    )
    if done.net.value >= least and done.net.lower > 0 and done.change.value >= least:
        return "causal", told
    seen = [t.auc for t in tried if t.auc is not None]
    if not seen:
        return "not causal", f"no level flips {name}: {told}"
    top = max(seen, key=lambda b: b.value)
    if top.lower <= 0.5:
        return "not separated", f"the two kinds of prompts are not told apart (AUC at most {top.value:.2f}), and {told}"
    return "not causal", f"a probe tells the prompts apart (AUC {top.value:.2f}), but no level flips {name}: {told}"


def _asked(behaviour: Behaviour, edit: Edit | None) -> NDArray:
    found = np.asarray(behaviour(edit), dtype=np.float64)
    if found.ndim != 1 or not found.size or not ((found >= -1e-9) & (found <= 1 + 1e-6)).all():
        raise InputError(
            f"the behaviour gave an array of shape {found.shape}, or numbers outside [0, 1]",
            cause="it must give one probability per prompt",
            next="for example: lambda edit: token_mass(host, prompts, ids, edit=edit)",
        )
    return np.clip(found, 0.0, 1.0)
