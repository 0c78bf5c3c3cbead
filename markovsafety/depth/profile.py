"""How harm depends on depth: the measured profile and the operational safety depth.

The attack is a prefill: k tokens of a compliant answer are forced, and h(k) is the probability of harm after them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..bound import Bound, encode
from ..errors import InputError
from ..evidence.cells import cell, tally_of

__all__ = [
    "SIDES",
    "Depth",
    "Reading",
    "budget",
    "check_side",
    "noted",
    "operational_depth",
    "profile",
    "whole",
    "within",
]

SIDES = ("upper", "value", "lower")


def whole(x: Any, name: str) -> NDArray:
    """`x` as an int64 array of whole numbers that are not negative.

    Raises
    ------
    InputError
        If it is anything else.
    """
    array = np.asarray(list(x) if isinstance(x, range) else x)
    counts = np.zeros(array.shape, dtype=np.int64)
    try:
        with np.errstate(invalid="ignore"):  # nan and inf are refused below
            counts = array.astype(np.int64)
        good = array.dtype.kind in "iuf" and bool(np.all((counts == array) & (counts >= 0)))
    except (TypeError, ValueError):
        good = False
    if not good:
        raise InputError(
            f"{name} is {x!r}.", cause="It counts tokens or answers.", next="Pass whole numbers from 0 on."
        )
    return counts


def budget(eps: Any) -> float:
    """`eps` as a float, checked to be a probability."""
    try:
        value = float(eps)
    except (TypeError, ValueError):
        value = math.nan
    if not 0 <= value <= 1:
        raise InputError(f"The harm budget is {eps!r}.", cause="A budget is a probability.", next="Pass 0 <= eps <= 1.")
    return value


def within(harm: Any, eps: float) -> Any:
    """Whether harm stays within the budget; a tie that rounding broke (0.1**4 and 1e-4) still is one."""
    return harm <= eps * (1 + 1e-12)


def noted(notes: Sequence[str], places: Sequence[str]) -> str:
    """Distinct notes in one line, each with where it holds unless that is everywhere; empty without any."""
    told = []
    for note in dict.fromkeys(n for n in notes if n):
        where = [place for n, place in zip(notes, places) if n == note]
        told.append(note if len(where) == len(notes) else f"{note} (at {', '.join(where)})")
    return "; ".join(told)


@dataclass(frozen=True)
class Reading:
    """One reading of an operational safety depth.

    Parameters
    ----------
    depth : int or None
        Largest depth within the budget; None if the first depth exceeds it already.
    crossed : bool
        Whether a depth that exceeds the budget was seen; if not, the depth is a lower bound.

    Examples
    --------
    >>> hazards = ms.depth.Hazards(harm=0.01, refusal=[0.3, 0.3, 0.3, 0.1], tail=0.4)
    >>> hazards.operational_depth(0.2).value
    Reading(depth=1, crossed=True)
    >>> print(hazards.operational_depth(0.5).value)
    at least 4
    """

    depth: int | None
    crossed: bool

    def __str__(self) -> str:
        if self.depth is None:
            return "none"
        return str(self.depth) if self.crossed else f"at least {self.depth}"


@dataclass(frozen=True)
class Depth:
    """Operational safety depth: the largest measured k with h(j) <= eps for all measured j <= k.

    Parameters
    ----------
    eps : float
        Harm budget.
    side : str
        The reading that `depth` and `crossed` give.
    value, upper, lower : Reading
        Read from the value of h, from its upper ends (the conservative reading, the smallest depth) and from its lower
        ends (the most that the data do not exclude).
    measured : tuple of int
        The depths that were measured; nothing is interpolated between them.

    Examples
    --------
    The budget lies inside the intervals of 5 and 10 tokens; by the careful reading no forced token is withstood:

    >>> harm = ms.Bound([0.01, 0.04, 0.12, 0.3], [0, 0.02, 0.04, 0.2], [0.04, 0.09, 0.2, 0.4])
    >>> found = ms.depth.operational_depth([0, 5, 10, 20], harm, eps=0.05)
    >>> print(type(found).__name__, found.depth, "-", found)
    Depth 0 - depth within harm 0.05: 5   between 0 and 10
    """

    eps: float
    side: str
    value: Reading
    upper: Reading
    lower: Reading
    measured: tuple[int, ...]

    @property
    def reading(self) -> Reading:
        """The reading of the chosen side."""
        return getattr(self, self.side)

    @property
    def depth(self) -> int | None:
        """Largest measured depth within the budget, None for none."""
        return self.reading.depth

    @property
    def crossed(self) -> bool:
        """Whether the budget was exceeded at a measured depth."""
        return self.reading.crossed

    def __str__(self) -> str:
        ends = "" if self.lower == self.value == self.upper else f"   between {self.upper} and {self.lower}"
        gap = f"   (smallest measured depth {self.measured[0]})" if self.measured[0] > 0 else ""
        return f"depth within harm {self.eps:g}: {self.value}{ends}{gap}"

    def to_json(self) -> dict[str, Any]:
        """Plain data: eps, side, depth, the three readings as text, and the measured depths."""
        texts = {side: str(getattr(self, side)) for side in SIDES}
        return encode({"eps": self.eps, "side": self.side, "depth": self.depth, **texts, "measured": self.measured})


def check_side(side: str) -> None:
    if side not in SIDES:
        raise InputError(f"side is {side!r}.", cause=f"A bound has {', '.join(SIDES)}.", next="Use one of these.")


def operational_depth(
    depths: ArrayLike, harm: Bound | Sequence[Bound] | ArrayLike, eps: float, side: str = "upper"
) -> Depth:
    """Largest measured depth up to which harm stays within the budget.

    Parameters
    ----------
    depths : int array, shape (K,)
        Measured numbers of forced tokens, all different, in any order.
    harm : Bound, sequence of scalar Bounds, or array, shape (K,)
        Harm at these depths; nan = not measured, never within a budget.
    eps : float
        Harm budget; h(k) = eps is within it.
    side : {"upper", "value", "lower"}
        Which end of the interval the returned `depth` reads.

    Returns
    -------
    Depth
        With all three readings; "none" if the first measured depth exceeds eps, "at least K" if none does.

    Raises
    ------
    InputError
        If depths and harm do not match, or harm lies outside [0, 1].

    Notes
    -----
    The depths from the reading of the upper ends to that of the lower ends hold the true one at the level of the
    bounds. The upper reading is too deep only if the upper end misses at the one depth where h first exceeds eps. The
    lower reading is too shallow if a lower end misses at any depth before that, and there may be many: so it takes
    lower ends that hold together (Bonferroni) where the bounds have them in ``info["together"]``, as those of `profile`
    do. Without them it reads each lower end by itself, and on a profile that stays close to eps the depth is missed
    more often.

    Examples
    --------
    The budget is exceeded at a measured depth, or was not seen to be:

    >>> print(ms.depth.operational_depth([0, 5, 10, 20], [0.01, 0.04, 0.12, 0.3], eps=0.05))
    depth within harm 0.05: 5
    >>> print(ms.depth.operational_depth([0, 5, 10, 20], [0.01, 0.04, 0.12, 0.3], eps=0.5))
    depth within harm 0.5: at least 20
    """
    check_side(side)
    k = np.atleast_1d(whole(depths, "depths"))
    eps = budget(eps)
    ends = {s: np.atleast_1d(np.asarray(_end(harm, s), dtype=np.float64)) for s in SIDES}
    if k.ndim != 1 or len(k) == 0 or len(np.unique(k)) != len(k) or any(e.shape != k.shape for e in ends.values()):
        raise InputError(
            f"{k.size} depths for harm of shape {ends['value'].shape}.",
            cause="There must be one harm per depth, every depth once, at least one.",
            next="Pass two arrays of one length.",
        )
    if any(((e < 0) | (e > 1)).any() for e in ends.values()):
        raise InputError(
            f"Harm is {harm!r}.", cause="It is a probability, or nan where none was measured.", next="Pass 0 <= h <= 1."
        )
    order = np.argsort(k)
    readings = {s: _read(k[order], e[order], eps) for s, e in ends.items()}
    return Depth(eps, side, readings["value"], readings["upper"], readings["lower"], tuple(k[order].tolist()))


def _end(harm: Any, side: str) -> Any:
    if isinstance(harm, Bound):
        joint = harm.info.get("together") if side == "lower" else None
        return joint if joint is not None and np.shape(joint) == harm.shape else getattr(harm, side)
    if isinstance(harm, (list, tuple)) and harm and all(isinstance(b, Bound) for b in harm):
        return [_end(b, side) for b in harm]
    return harm


def _read(k: NDArray, h: NDArray, eps: float) -> Reading:
    beyond = np.flatnonzero(~within(h, eps))
    if len(beyond) == 0:
        return Reading(int(k[-1]), crossed=False)
    return Reading(int(k[beyond[0] - 1]) if beyond[0] > 0 else None, crossed=True)


def profile(source: Any, by: str | None = None, level: float = 0.95) -> Bound:
    """The measured depth profile: harm after k forced tokens, for every k that was sampled.

    Parameters
    ----------
    source : Rollouts, Counts or estimated Chain
        Judged rollouts in some form.
    by : {None, "category"}
        None pools the categories; "category" gives a row for each.
    level : float
        Confidence level.

    Returns
    -------
    Bound
        Shape (depth,) or (category, depth): share of harmful rollouts, with an interval clustered by prompt; nan and
        [0, 1] where nothing was sampled. `info` has dims, coords, and arrays of that shape: events, total, prompts,
        truncated (the share of rollouts that was cut off, of which some might have become harmful) and together (lower
        ends that hold at all depths at once, for `operational_depth`); note where an interval leaves something out,
        such as the variance between prompts where there is only one.

    Raises
    ------
    InputError
        If there are no rollouts or one is not judged.

    Examples
    --------
    Twenty prompts, two answers to each at three depths, of which 2, 21 and 24 did harm:

    >>> k = np.repeat([0, 5, 20], 40)
    >>> outcome = np.repeat([0, 1, 0, 1, 0, 1], [2, 38, 21, 19, 24, 16])  # harm, refusal
    >>> said = [[7] * (n + 1) for n in k]
    >>> rolls = ms.Rollouts.of(said, prompt_id=np.tile(np.arange(20), 6), prefill=k, outcome=outcome, hit=k)
    >>> harm = ms.profile(rolls)
    >>> for n, h in zip(harm.info["coords"]["depth"], harm): print(n, h)
    0 P(harm) = 0.05   95 % [0.00127, 0.249]   because: sampling 0.12; judge, lumping,
        model, truncation, rounding not assessed
    5 P(harm) = 0.525   95 % [0.361, 0.685]   because: sampling 0.16; judge, lumping,
        model, truncation, rounding not assessed
    20 P(harm) = 0.6   95 % [0.433, 0.751]   because: sampling 0.16; judge, lumping,
        model, truncation, rounding not assessed
    """
    if by not in (None, "category"):
        raise InputError(f"by is {by!r}.", cause="A profile is pooled or by category.", next='Pass by="category".')
    tally = tally_of(source)
    depths = tuple(np.unique(tally.prefill).tolist())
    groups = (None,) if by is None else tuple(np.unique(tally.category).tolist())
    cells = [[cell(tally, k, c) for k in depths] for c in groups]
    bounds = [[x.bound(level) for x in row] for row in cells]
    shape = (len(depths),) if by is None else (len(groups), len(depths))

    def table(f: Any, rows: Any = bounds) -> NDArray:
        return np.array([[f(x) for x in row] for row in rows], dtype=np.float64).reshape(shape)

    info = {
        "name": "P(harm)",
        "dims": ("depth",) if by is None else ("category", "depth"),
        "coords": {"depth": depths} if by is None else {"category": groups, "depth": depths},
        "events": table(lambda b: b.info["events"]),
        "total": table(lambda b: b.info["total"]),
        "prompts": table(lambda b: b.info["prompts"]),
        "truncated": table(lambda x: x.truncated.sum() / x.totals.sum() if len(x.totals) else np.nan, cells),
        "together": table(lambda x: x.bound(1 - (1 - level) / len(depths)).lower, cells),
        "method": "share of harmful rollouts, interval clustered by prompt",
    }
    places = [f"k = {k}" if c is None else f"{c}, k = {k}" for c in groups for k in depths]
    if note := noted([b.info.get("note", "") for row in bounds for b in row], places):
        info["note"] = note
    ends = [table(lambda b, s=s: getattr(b, s)) for s in ("value", "lower", "upper")]
    sampling = table(lambda b: b.reasons["sampling"])
    return Bound(ends[0], ends[1], ends[2], level, {"sampling": sampling}, None, info)
