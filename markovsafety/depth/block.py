"""Block: harm of one source over depth, width, correlation and attack, and what was asked of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..bound import Bound
from ..errors import InputError
from .attack import AttackLaw
from .profile import whole
from .width import ensemble_harm

__all__ = [
    "Asked",
    "Block",
    "Coords",
    "as_block",
    "as_bound",
    "axis",
    "correlations",
    "laws_of",
    "names_of",
    "through",
]

Coords = tuple[Any, ...]
ENDS = ("value", "lower", "upper")


@dataclass(frozen=True, eq=False)
class Asked:
    """The axes that all sources share.

    Parameters
    ----------
    widths : tuple of int
    mixes : tuple
        Correlations; None stands for what the source says.
    laws : tuple
        Attack laws; None stands for no attack.
    rule, model : str
    level : float
    reach : int, optional
        Forced tokens at which laws without an end are cut, where no depth is asked for.
    chosen : bool
        Whether correlations were asked for.
    """

    widths: Coords
    mixes: Coords
    laws: Coords
    rule: str
    model: str
    level: float
    reach: int | None = None
    chosen: bool = False

    def ensemble(self, q: Any, width: Any, icc: Any = 0.0) -> NDArray:
        """Harm of an ensemble; answers without a correlation are independent whatever the model."""
        return np.asarray(ensemble_harm(q, width, icc, rule=self.rule, model=self.model))


@dataclass(frozen=True, eq=False)
class Block:
    """Harm of one source.

    Parameters
    ----------
    depths : tuple
        Coordinates of the first axis.
    value, lower, upper : array, shape (depth, width, correlation, attack)
    level : float
    reasons : dict of str to array
        Half-widths of that shape, by name.
    info : dict
    floor : tuple of three arrays of shape (width, correlation, attack), optional
        Value, lower and upper of harm at unlimited depth.
    """

    depths: Coords
    value: NDArray
    lower: NDArray
    upper: NDArray
    level: float
    reasons: dict[str, NDArray] = field(default_factory=dict)
    info: dict[str, Any] = field(default_factory=dict)
    floor: tuple[NDArray, NDArray, NDArray] | None = None


def through(q: Bound, asked: Asked) -> dict[str, NDArray]:
    """Bounds of one answer's harm, carried through the ensemble; harm rises with q, so the ends stay ends.

    Parameters
    ----------
    q : Bound
        Of any shape.
    asked : Asked
        None among the correlations stands for independent answers.

    Returns
    -------
    dict of str to array
        value, lower, upper and every known reason, each of the shape of q and (width, correlation) behind it.
    """
    m = np.array(asked.widths)[:, None]
    rho = np.array([0.0 if c is None else c for c in asked.mixes])

    def carried(x: Any) -> NDArray:
        return asked.ensemble(np.asarray(x)[..., None, None], m, rho)

    parts = {"value": carried(q.value)}
    for end in ("lower", "upper"):
        same = np.array_equal(getattr(q, end), q.value)
        parts[end] = parts["value"] if same else carried(getattr(q, end))
    for name, half in q.reasons.items():
        if half is not None:
            low, high = np.maximum(q.value - half, 0.0), np.minimum(q.value + half, 1.0)
            parts[name] = (carried(high) - carried(low)) / 2
    return parts


def as_bound(parts: Mapping[str, Any], level: float, info: dict[str, Any] | None = None) -> Bound:
    """A Bound from value, lower, upper, and reasons under any other name."""
    reasons = {name: part for name, part in parts.items() if name not in ENDS}
    return Bound(parts["value"], parts["lower"], parts["upper"], level, reasons, None, {} if info is None else info)


def as_block(
    depths: Coords,
    parts: Mapping[str, NDArray],
    level: float,
    info: dict[str, Any],
    floor: tuple[NDArray, NDArray, NDArray] | None = None,
) -> Block:
    """A Block from value, lower, upper, and reasons under any other name."""
    reasons = {name: part for name, part in parts.items() if name not in ENDS}
    return Block(depths, parts["value"], parts["lower"], parts["upper"], level, reasons, info, floor)


def axis(values: Any, name: str, least: int = 0) -> Coords:
    """Sorted distinct whole numbers."""
    one = isinstance(values, (int, np.integer)) and not isinstance(values, bool)
    array = np.unique(whole([values] if one else list(values) if isinstance(values, Iterable) else values, name))
    if array.size == 0 or array[0] < least:
        raise InputError(f"{name} is {values!r}.", cause=f"An axis has values from {least} on.", next="Pass some.")
    return tuple(array.tolist())


def correlations(correlation: Any) -> Coords:
    """The axis; None stands for what the source says."""
    if correlation is None:
        return (None,)
    given = [correlation] if isinstance(correlation, (str, int, float)) else list(correlation)
    if not given:
        raise InputError("correlation is empty.", cause="An axis has values.", next='Pass e.g. [0, "measured"].')
    mixes = []
    for x in given:
        number = isinstance(x, (int, float, np.integer, np.floating)) and not isinstance(x, bool)
        if not (x == "measured" if isinstance(x, str) else number and 0 <= x <= 1):
            raise InputError(
                f"correlation {x!r} is neither a correlation nor 'measured'.",
                cause="An intra-class correlation runs from 0 (independent answers) to 1 (all alike).",
                next='Pass numbers in [0, 1], or "measured".',
            )
        mixes.append(None if isinstance(x, str) else float(x))
    return tuple(mixes)


def laws_of(attack: Any) -> Coords:
    """The axis of attack laws; None stands for no attack."""
    if attack is None:
        return (None,)
    many = isinstance(attack, Iterable) and not isinstance(attack, (str, Mapping, AttackLaw))
    given = list(attack) if many else [attack]
    if not given:
        raise InputError("attack is empty.", cause="An axis has values.", next="Pass e.g. AttackLaw.geometric(0.1).")
    laws = []
    for x in given:
        if not isinstance(x, (AttackLaw, Mapping)):
            raise InputError(
                f"attack {x!r} is no law.",
                cause="An attack is a law of the number of forced tokens.",
                next="Pass AttackLaw.fixed(5), AttackLaw.geometric(0.1), or weights such as {0: 0.5, 5: 0.5}.",
            )
        laws.append(x if isinstance(x, AttackLaw) else _weighed(x))
    return tuple(laws)


def _weighed(weights: Mapping[int, float]) -> AttackLaw:
    law = AttackLaw.of(weights)
    if len(weights) > 4:
        return law
    return AttackLaw(law.pmf, name=" ".join(f"{k}={law.pmf[k]:.3g}" for k in sorted(weights)))


def names_of(laws: Coords) -> Coords:
    """A name for each law; those of one name are told apart by their means."""
    names = [law.name for law in laws]
    return tuple(n if names.count(n) == 1 else f"{n}, mean {law.mean:.4g}" for n, law in zip(names, laws))
