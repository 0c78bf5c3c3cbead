"""Arithmetic of bounds that keeps the names of their widths: difference, ratio, mean, largest, and adding a width.

A `Bound` mixes two kinds of width. *Statistical* ones (sampling, judge) come from chance and may cancel between
independent numbers; *systematic* ones (lumping, model, truncation, rounding) are limits of what was left out, and add
up. Statistical widths of independent numbers are added in squares, end by end, by the method of variance estimates
recovery (G. Y. Zou and A. Donner, Statistics in Medicine 27 (2008) 1693; for ratios A. Donner and G. Y. Zou,
Statistical Methods in Medical Research 21 (2012) 347), which keeps the level, and the skewness of an interval near 0 or
1. Without independence the ends themselves are subtracted, which needs nothing but Bonferroni's inequality: the result
then holds at a lower level, and says so.

A reason that one of the terms has not assessed is not assessed in the result."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .bound import REASONS, Bound
from .errors import InputError

__all__ = ["difference", "largest", "mean", "ratio", "widened"]

STATISTICAL = ("sampling", "judge")
ULP = 2.0**-52  # the operations here round too


def difference(a: Bound, b: Bound, *, independent: bool = True, name: str | None = None) -> Bound:
    """``a - b``.

    Parameters
    ----------
    a, b : Bound
        Of one shape.
    independent : bool
        Whether the statistical errors of a and b are independent (other rollouts). Numbers from the same rollouts or
        the same prompts are not: pass False, or use `compare`, which pairs them.
    name : str, optional
        What to print.

    Returns
    -------
    Bound
        Level: the lower of the two; without independence 1 minus the sum of both error rates.

    Raises
    ------
    InputError
        If the shapes differ.

    Examples
    --------
    >>> from markovsafety.arithmetic import difference
    >>> from markovsafety.bound import clustered
    >>> plain = clustered([4, 0, 2, 6, 1] * 4, [8] * 20, name="plain")
    >>> edited = clustered([1, 0, 0, 2, 0] * 4, [8] * 20, name="edited")
    >>> print(difference(edited, plain))
    edited - plain = -0.25   95 % [-0.404, -0.104]
        because: sampling 0.15; judge, lumping, model, truncation, rounding not assessed

    Both models answered the same 20 prompts: their errors are not independent, and the level is lower.

    >>> print(difference(edited, plain, independent=False))
    edited - plain = -0.25   90 % [-0.442, -0.0502]
        because: sampling 0.2; judge, lumping, model, truncation, rounding not assessed
    """
    _same_shape([a, b])
    value = np.asarray(a.value) - np.asarray(b.value)
    parts = [_parts(a), _parts(b)]
    fixed = parts[0].fixed + parts[1].fixed
    if independent:
        down = np.hypot(parts[0].down, parts[1].up) + fixed
        up = np.hypot(parts[0].up, parts[1].down) + fixed
    else:
        down, up = parts[0].down + parts[1].up + fixed, parts[0].up + parts[1].down + fixed
    room = ULP * (np.abs(a.value) + np.abs(b.value))
    reasons = {k: _joined([a.reasons[k], b.reasons[k]], independent and k in STATISTICAL) for k in REASONS}
    label = f"{_name(a)} - {_name(b)}" if name is None else name
    return _made(value, value - down - room, value + up + room, _level([a, b], independent), reasons, label)


def ratio(a: Bound, b: Bound, *, independent: bool = True, name: str | None = None) -> Bound:
    """``a / b`` of non-negative numbers.

    Parameters
    ----------
    a, b : Bound
        Of one shape, nowhere negative.
    independent : bool
        As in `difference`.
    name : str, optional

    Returns
    -------
    Bound
        The upper end is inf where b may be 0; nan where b is 0. Reasons are half-widths of the ratio, in linear
        approximation.

    Raises
    ------
    InputError
        If the shapes differ, or a number is negative.

    Examples
    --------
    >>> from markovsafety.arithmetic import ratio
    >>> from markovsafety.bound import clustered
    >>> before = clustered([4, 0, 2, 6, 1] * 4, [8] * 20, name="before")
    >>> after = clustered([1, 0, 0, 2, 0] * 4, [8] * 20, name="after")
    >>> print(ratio(after, before))
    after / before = 0.231   95 % [0.0882, 0.54]
        because: sampling 0.21; judge, lumping, model, truncation, rounding not assessed
    """
    _same_shape([a, b])
    if np.min(a.lower, initial=0.0) < 0 or np.min(b.lower, initial=0.0) < 0:
        raise InputError(
            "A ratio of bounds needs non-negative numbers.",
            cause="With both signs in an interval a ratio has no interval.",
            next="Take the difference, or the ratio of their complements.",
        )
    x, y = np.asarray(a.value), np.asarray(b.value)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        value = x / y
        if independent:
            p, q = _parts(a), _parts(b)
            lower = _ratio_low(np.maximum(x - p.fixed, 0.0), p.down, y + q.fixed, q.up)
            upper = _ratio_high(x + p.fixed, p.up, y - q.fixed, q.down)
        else:
            lower, upper = np.asarray(a.lower) / b.upper, np.asarray(a.upper) / b.lower
        lower = np.where(np.isnan(lower), 0.0, np.maximum(lower, 0.0) * (1 - 8 * ULP))
        upper = np.where(np.isnan(upper), np.inf, upper * (1 + 8 * ULP))
        shares = {
            k: None if a.reasons[k] is None or b.reasons[k] is None else [a.reasons[k] / y, b.reasons[k] * value / y]
            for k in REASONS
        }
    reasons = {k: None if v is None else _joined(v, independent and k in STATISTICAL) for k, v in shares.items()}
    label = f"{_name(a)} / {_name(b)}" if name is None else name
    empty = np.isnan(value)
    lower, upper = np.where(empty, 0.0, np.minimum(lower, value)), np.where(empty, np.inf, np.maximum(upper, value))
    return _made(value, lower, upper, _level([a, b], independent), reasons, label)


def mean(
    bounds: Sequence[Bound], weights: ArrayLike | None = None, *, independent: bool = True, name: str | None = None
) -> Bound:
    """Weighted mean, e.g. over prompts or categories.

    Parameters
    ----------
    bounds : sequence of Bound
        Of one shape.
    weights : array, shape (len(bounds),), optional
        Non-negative; scaled to sum 1. Equal if not given.
    independent : bool
        As in `difference`.
    name : str, optional

    Returns
    -------
    Bound

    Raises
    ------
    InputError
        If there are no bounds, shapes differ, or weights are no weights.

    Examples
    --------
    Harm over two kinds of prompts, the second of which is met nine times as often:

    >>> from markovsafety.arithmetic import mean
    >>> from markovsafety.bound import clustered
    >>> kinds = [clustered([6, 7, 8, 5] * 5, [8] * 20), clustered([0, 1, 0, 0] * 5, [8] * 20)]
    >>> print(mean(kinds, weights=[1, 9], name="P(harm)"))
    P(harm) = 0.109   95 % [0.086, 0.16]
        because: sampling 0.037; judge, lumping, model, truncation, rounding not assessed
    """
    w = _weights(bounds, weights)
    _same_shape(bounds)
    parts = [_parts(b) for b in bounds]
    value = sum(wi * np.asarray(b.value) for wi, b in zip(w, bounds))
    fixed = sum(wi * p.fixed for wi, p in zip(w, parts))
    ends = []
    for side in ("down", "up"):
        own = np.stack([wi * getattr(p, side) for wi, p in zip(w, parts)])
        ends.append((np.sqrt((own**2).sum(axis=0)) if independent else own.sum(axis=0)) + fixed)
    room = (len(w) + 4) * ULP * sum(wi * np.abs(b.value) for wi, b in zip(w, bounds))
    reasons = {}
    for k in REASONS:
        own = [None if b.reasons[k] is None else wi * b.reasons[k] for wi, b in zip(w, bounds)]
        reasons[k] = _joined(own, independent and k in STATISTICAL)
    label = f"mean of {len(bounds)}" if name is None else name
    return _made(value, value - ends[0] - room, value + ends[1] + room, _level(bounds, independent), reasons, label)


def largest(bounds: Sequence[Bound], name: str | None = None) -> Bound:
    """The largest of several numbers, e.g. harm in the worst category.

    Parameters
    ----------
    bounds : sequence of Bound
        Of one shape.
    name : str, optional

    Returns
    -------
    Bound
        `reasons` are those of the term that is largest. `info["which"]` is its position.

    Raises
    ------
    InputError
        If there are no bounds, or shapes differ.

    Notes
    -----
    With m terms of level 1 - alpha, alpha / 2 at each end: the true maximum is the true value of some one term, whose
    upper end misses it with probability alpha / 2, and the largest upper end is no lower. The largest lower end
    exceeds the true maximum only if one of the m lower ends misses, at most m alpha / 2. The level is 1 minus both,
    whatever the dependence. The value is the largest estimate, which is biased upwards where several are close.

    Examples
    --------
    >>> from markovsafety.arithmetic import largest
    >>> from markovsafety.bound import clustered
    >>> seen = {"bio": [0, 1, 0, 0] * 5, "fraud": [6, 7, 8, 5] * 5}
    >>> kinds = {name: clustered(harmful, [8] * 20) for name, harmful in seen.items()}
    >>> worst = largest(list(kinds.values()), name="P(harm), worst kind")
    >>> print(list(kinds)[worst.info["which"]], worst)
    fraud P(harm), worst kind = 0.812   92.5 % [0.733, 0.876]
        because: sampling 0.071; judge, lumping, model, truncation, rounding not assessed
    """
    _weights(bounds, None)
    _same_shape(bounds)
    values = np.stack([np.asarray(b.value) for b in bounds])
    if np.isnan(values).any():
        raise InputError(
            "One of the terms has no value.",
            cause="A term is nan (nothing was measured there), and a maximum over the others would hide it.",
            next="Leave that term out by name, or measure it.",
        )
    which = values.argmax(axis=0)
    take = lambda rows: np.take_along_axis(np.stack(rows), which[None], axis=0)[0]  # noqa: E731
    reasons = {}
    for k in REASONS:
        own = [b.reasons[k] for b in bounds]
        rows = [np.broadcast_to(np.asarray(w, dtype=np.float64), values.shape[1:]) for w in own if w is not None]
        reasons[k] = None if len(rows) < len(own) else take(rows)
    alpha = max(1 - b.level for b in bounds)
    level = 1 - alpha / 2 - len(bounds) * alpha / 2 if alpha else 1.0
    lower, upper = (np.max([getattr(b, side) for b in bounds], axis=0) for side in ("lower", "upper"))
    label = f"largest of {len(bounds)}" if name is None else name
    out = _made(take(list(values)), lower, upper, level, reasons, label)
    return replace(out, info={**out.info, "which": which.tolist()})


def widened(bound: Bound, *, least: float = -np.inf, most: float = np.inf, **widths: Any) -> Bound:
    """A bound with further widths, each under its name.

    Parameters
    ----------
    bound : Bound
    least, most : float
        Limits that no end crosses: 0 and 1 for a probability.
    **widths : float, array, or pair of these
        By reason: a half-width, or how far the lower end moves down and how far the upper end moves up.

    Returns
    -------
    Bound
        The start bound does not travel along.

    Raises
    ------
    InputError
        If a reason is unknown, was assessed already, or a width is negative.

    Examples
    --------
    What a probability leaves out becomes a width under its own name:

    >>> from markovsafety.arithmetic import widened
    >>> from markovsafety.bound import clustered
    >>> harm = clustered([1, 0, 0, 2] * 10, [50] * 40, name="P(harm)")
    >>> print(widened(harm, least=0, most=1, judge=0.02, truncation=(0, 0.01)))
    P(harm) = 0.015   95 % [0, 0.0517]
        because: sampling 0.0059, judge 0.02, truncation 0.005; lumping, model, rounding not
        assessed
    """
    lower, upper = np.asarray(bound.lower), np.asarray(bound.upper)
    reasons = dict(bound.reasons)
    for reason, width in widths.items():
        if reason not in REASONS or reasons[reason] is not None:
            raise InputError(
                f"The width {reason!r} " + ("is there already." if reason in REASONS else "has no name here."),
                cause=f"Reasons are {', '.join(REASONS)}, each counted once.",
                next="Add a width under a reason that is not assessed yet.",
            )
        down, up = width if isinstance(width, tuple) else (width, width)
        down, up = np.asarray(down, dtype=np.float64), np.asarray(up, dtype=np.float64)
        if not (down >= 0).all() or not (up >= 0).all():
            raise InputError(
                f"The width {reason!r} is negative or nan.",
                cause="A further reason for doubt cannot make an interval narrower.",
                next="Pass non-negative widths.",
            )
        lower, upper = lower - down * (1 + ULP), upper + up * (1 + ULP)
        reasons[reason] = (down + up) / 2
    lower, upper = np.clip(lower, least, most), np.clip(upper, least, most)
    lower, upper = np.fmin(lower, bound.value), np.fmax(upper, bound.value)
    return Bound(bound.value, lower, upper, bound.level, reasons, None, dict(bound.info))


@dataclass(frozen=True, eq=False)
class _Parts:
    """How far each end lies from the value: the statistical part of each, and the systematic part, `fixed`."""

    down: NDArray
    up: NDArray
    fixed: NDArray


def _parts(b: Bound) -> _Parts:
    value = np.asarray(b.value, dtype=np.float64)
    down, up = value - b.lower, b.upper - value
    limits = [np.asarray(b.reasons[k]) for k in REASONS if k not in STATISTICAL and b.reasons[k] is not None]
    fixed = np.asarray(sum(limits, np.zeros_like(value)))
    if all(b.reasons[k] is None for k in STATISTICAL):  # then all of it is systematic, whatever the names say
        fixed = np.maximum(fixed, np.maximum(down, up))
    # An end that was clipped at 0 or 1 is nearer than its systematic part.
    return _Parts(np.maximum(down - fixed, 0.0), np.maximum(up - fixed, 0.0), fixed)


def _ratio_low(x: NDArray, down: NDArray, y: NDArray, up: NDArray) -> NDArray:
    """Lower end of x / y by MOVER, from the distances of the ends; nothing cancels."""
    root = np.hypot(y * down, up * np.sqrt((x - down) * (x + down)))
    return np.where(x > 0, (x - down) * (x + down) / (x * y + root), 0.0)


def _ratio_high(x: NDArray, up: NDArray, y: NDArray, down: NDArray) -> NDArray:
    """Upper end; inf where y may be 0."""
    left = np.maximum(y - down, 0.0) * (y + down)
    return np.where(y - down > 0, (x * y + np.hypot(x * down, up * np.sqrt(left))) / left, np.inf)


def _joined(widths: Sequence[Any], squares: bool) -> Any:
    """Sum of half-widths, in squares for independent chance; None if one was not assessed."""
    if any(w is None for w in widths):
        return None
    rows = np.stack(np.broadcast_arrays(*(np.asarray(w, dtype=np.float64) for w in widths)))
    return np.sqrt((rows**2).sum(axis=0)) if squares else rows.sum(axis=0)


def _level(bounds: Sequence[Bound], independent: bool) -> float:
    if independent:
        return min(b.level for b in bounds)
    level = 1 - sum(1 - b.level for b in bounds)
    if level <= 0:
        raise InputError(
            f"{len(bounds)} bounds of level {bounds[0].level:g} that may depend on each other say nothing together.",
            cause="Their error rates add up to 1 or more.",
            next=f"Compute each at a level of {1 - 0.05 / len(bounds):.6g}, or pass independent=True if they are.",
        )
    return level


def _made(value: Any, lower: Any, upper: Any, level: float, reasons: dict[str, Any], name: str) -> Bound:
    info = {"name": name, "method": "arithmetic of bounds"}
    return Bound(value, np.fmin(lower, value), np.fmax(upper, value), level, reasons, None, info)


def _name(b: Bound) -> str:
    return str(b.info.get("name", "value"))


def _same_shape(bounds: Sequence[Bound]) -> None:
    shapes = {b.shape for b in bounds}
    if len(shapes) > 1:
        raise InputError(
            f"The bounds have shapes {' and '.join(map(str, sorted(shapes)))}.",
            cause="They are combined entry by entry.",
            next="Index them to one shape first, e.g. b[0] or b.at_start.",
        )


def _weights(bounds: Sequence[Bound], weights: ArrayLike | None) -> NDArray[np.float64]:
    if len(bounds) == 0:
        raise InputError("There are no bounds.", cause="The sequence is empty.", next="Pass at least one Bound.")
    w = np.ones(len(bounds)) if weights is None else np.asarray(weights, dtype=np.float64)
    if w.shape != (len(bounds),) or not (np.isfinite(w).all() and (w >= 0).all() and w.sum() > 0):
        raise InputError(
            f"weights are {weights!r} for {len(bounds)} bounds.",
            cause="Weights are finite, non-negative, one per bound, and not all 0.",
            next="Pass one weight per bound, e.g. the number of prompts of each category.",
        )
    return w / w.sum()
