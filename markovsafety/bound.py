"""Bound: a number, its interval, and the named reasons for the interval's width.

Everything the package computes comes back as a `Bound`, because a probability without its uncertainty is an
invitation to believe too much. The two intervals below are the ones that stay honest at zero events: Clopper and
Pearson (1934) for independent trials, and its effective-sample-size form by Korn and Graubard (1998) for trials
clustered by prompt.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .errors import InputError

__all__ = ["REASONS", "Bound", "check_level", "clopper_pearson", "clustered", "effective_size", "encode"]

REASONS = ("sampling", "judge", "lumping", "model", "truncation", "rounding")


@dataclass(frozen=True, eq=False, repr=False)
class Bound:
    """A value with the interval it lies in and the reasons for the interval's width.

    Parameters
    ----------
    value, lower, upper : float or array
        One shape; ``lower <= value <= upper`` entry by entry (entries that are nan are exempt).
    level : float
        Confidence level of the interval; 1.0 where the interval is a proven enclosure and no evidence entered.
    reasons : dict, optional
        Half-widths by name (`REASONS`), a float or an array of the value's shape; None means not assessed. Missing
        names are filled with None.
    start : Bound, optional
        The scalar bound at the chain's start law.
    info : dict, optional
        How the number was made: ``name``, ``method``, ``why``, ``certified`` and whatever else its maker knows.

    Raises
    ------
    InputError
        If shapes differ, the order is violated, or a reason has an unknown name.
    """

    value: Any
    lower: Any
    upper: Any
    level: float = 0.95
    reasons: dict[str, Any] = field(default_factory=dict)
    start: Bound | None = None
    info: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        shape = np.shape(self.value)
        for name in ("value", "lower", "upper"):
            part = _frozen(getattr(self, name))
            if np.shape(part) != shape:
                raise InputError(
                    f"{name} has shape {np.shape(part)}, the value has shape {shape}.",
                    cause="A bound holds one interval per value.",
                    next="Broadcast lower and upper to the shape of the value.",
                )
            object.__setattr__(self, name, part)
        value, lower, upper = (np.asarray(x) for x in (self.value, self.lower, self.upper))
        wrong = (lower > value) | (value > upper)
        if wrong.any():
            at = tuple(int(i) for i in np.argwhere(wrong)[0])
            raise InputError(
                f"value {value[at]:.17g} lies outside [{lower[at]:.17g}, {upper[at]:.17g}]"
                + (f" at {at}." if at else "."),
                cause="The interval was computed for another number than the value.",
                next="Widen the interval so that it contains the value, or recompute both.",
            )
        if not 0 < self.level <= 1:
            raise InputError(f"level is {self.level}.", cause="A level is a probability.", next="Pass 0 < level <= 1.")
        unknown = sorted(set(self.reasons) - set(REASONS))
        if unknown:
            raise InputError(
                f"Unknown reason {unknown[0]!r}.",
                cause=f"Reasons are {', '.join(REASONS)}.",
                next="Use one of these names.",
            )
        reasons = {name: self.reasons.get(name) for name in REASONS}
        object.__setattr__(self, "reasons", {k: None if w is None else _frozen(w) for k, w in reasons.items()})

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the value; ``()`` for a scalar."""
        return np.shape(self.value)

    @property
    def at_start(self) -> Bound:
        """The scalar bound at the start law.

        Raises
        ------
        InputError
            If the chain had no start law.
        """
        if self.start is None:
            raise InputError(
                "This bound has no value at a start.",
                cause="The chain has no start law (an estimated chain gets it from rollouts without prefill).",
                next="Give the chain `start=` (an index, a label or a law), or index the bound by state.",
            )
        return self.start

    @property
    def exact(self) -> Any:
        """The value as `fractions.Fraction` (one, or a list by state; layered: a list of lists).

        Raises
        ------
        InputError
            If the number was not made in rational arithmetic.
        """
        if "exact" not in self.info:
            raise InputError(
                "This bound has no exact value.",
                cause="It was computed in floating point, or is one entry of a larger bound.",
                next='Call hitting_probability(..., method="exact") and read .exact or .at_start.exact.',
            )
        return self.info["exact"]

    def __getitem__(self, key: Any) -> Bound:
        """The bound of one entry or a slice; the start value does not travel along."""
        if self.shape == ():
            raise TypeError("this bound is a scalar and cannot be indexed")
        reasons = {k: w if w is None or np.shape(w) != self.shape else w[key] for k, w in self.reasons.items()}
        info = {k: v for k, v in self.info.items() if k not in ("exact", "expression")}
        return Bound(self.value[key], self.lower[key], self.upper[key], self.level, reasons, None, info)

    def __float__(self) -> float:
        raise TypeError("a Bound is not a number: take .value, .lower or .upper, whichever you mean")

    def __str__(self) -> str:
        name = str(self.info.get("name", "value"))
        kind = "proven" if self.level == 1 else f"{100 * self.level:g} %"
        bare = self.level == 1 and self.info.get("certified") is False
        if self.shape == ():
            value, lower, upper = _digits(self.value, self.lower, self.upper)
            # What does not exist, or is infinite by evidence that cannot be doubted a little, has no interval.
            bare = (
                bare or np.isnan(self.lower) or (self.level < 1 and np.isinf(self.value) and self.lower == self.upper)
            )
            ends = "not certified" if self.info.get("certified") is False else "no interval"
            head = f"{name} = {value}   {ends if bare else f'{kind} [{lower}, {upper}]'}"
        else:
            ends = "not certified" if bare else f"{kind} within {_span(np.stack([self.lower, self.upper]))}"
            head = f"{name}: {' x '.join(map(str, self.shape))} values in {_span(self.value)}   {ends}"
        if "note" in self.info:
            head += f" ({self.info['note']})"
        known = ", ".join(f"{k} {_width(w)}" for k, w in self.reasons.items() if w is not None)
        missing = ", ".join(k for k, w in self.reasons.items() if w is None)
        because = "; ".join(part for part in (known, f"{missing} not assessed" if missing else "") if part)
        text = f"{head}   because: {because}"
        if self.start is not None:
            text += f"\n  at start: {self.start}"
        return text

    def __repr__(self) -> str:
        return f"<Bound {self}>"

    def to_json(self) -> dict[str, Any]:
        """Value, interval, level and reasons as plain JSON data; infinities and nan are strings."""
        return {name: encode(getattr(self, name)) for name in ("value", "lower", "upper", "level", "reasons")}


def _frozen(x: Any) -> Any:
    """A python float, or a read-only float64 copy."""
    array = np.array(x, dtype=np.float64)
    if array.ndim == 0:
        return float(array)
    array.flags.writeable = False
    return array


def _digits(value: float, lower: float, upper: float) -> tuple[str, str, str]:
    """Three significant digits, six where the interval is so narrow that three would hide it."""
    digits = 6 if upper - lower < 1e-3 * abs(value) else 3
    return f"{value:.{digits}g}", f"{lower:.{digits}g}", f"{upper:.{digits}g}"


def _span(x: NDArray) -> str:
    if x.size == 0 or np.isnan(x).all():
        return "[nan, nan]"
    return f"[{np.nanmin(x):.3g}, {np.nanmax(x):.3g}]"


def _width(w: Any) -> str:
    top = np.asarray(w, dtype=float)
    if top.size == 0 or np.isnan(top).all():
        return "nan"
    top = float(np.nanmax(top))
    return f"{top:.0e}".replace("e-0", "e-") if 0 < top < 1e-4 else f"{top:.2g}"


def encode(x: Any) -> Any:
    """Turn numbers, arrays, containers and bounds into data that strict JSON can hold.

    Infinities and nan become the strings ``"inf"``, ``"-inf"`` and ``"nan"``; what is not known becomes its `str`.
    """
    if x is None or isinstance(x, (str, bool, int)):
        return x
    if isinstance(x, Bound):
        return x.to_json()
    if isinstance(x, (float, np.floating)):
        x = float(x)
        return x if np.isfinite(x) else str(x)
    if isinstance(x, np.generic):
        return encode(x.item())
    if isinstance(x, np.ndarray):
        return encode(x.tolist())
    if isinstance(x, Mapping):
        return {str(k): encode(v) for k, v in x.items()}
    if isinstance(x, (list, tuple, set, frozenset, range)):
        return [encode(v) for v in x]
    return str(x)


def clopper_pearson(events: ArrayLike, total: ArrayLike, level: float = 0.95) -> tuple[Any, Any]:
    """Two-sided exact interval for a probability from independent trials.

    Parameters
    ----------
    events, total : float or array
        Number of events and of trials, broadcast together; fractions are allowed (effective sizes), by the beta-
        quantile form of the interval.
    level : float
        Confidence level, 0 < level < 1; each end misses with probability at most ``(1 - level) / 2``.

    Returns
    -------
    lower, upper : float or array
        ``[0, 1]`` where total is 0.

    Raises
    ------
    InputError
        If events are negative, exceed the total, or anything is not finite.

    Notes
    -----
    C. J. Clopper and E. S. Pearson, Biometrika 26 (1934) 404.
    """
    from scipy.special import betaincinv

    x, n = np.broadcast_arrays(np.asarray(events, dtype=np.float64), np.asarray(total, dtype=np.float64))
    wrong = ~(np.isfinite(x) & np.isfinite(n) & (x >= 0) & (x <= n))
    if wrong.any():
        at = np.argmax(wrong)
        raise InputError(
            f"{x.flat[at]:g} events in {n.flat[at]:g} trials.",
            cause="Events must be finite, non-negative and at most the number of trials.",
            next="Check the counts.",
        )
    check_level(level)
    tail = (1 - level) / 2
    inner_low, inner_high = (x > 0), (x < n)
    # The dummies 1, 1 keep betaincinv off its undefined corner; np.where throws their results away.
    lower = np.where(inner_low, betaincinv(np.where(inner_low, x, 1.0), n - x + 1, tail), 0.0)
    upper = np.where(inner_high, betaincinv(x + 1, np.where(inner_high, n - x, 1.0), 1 - tail), 1.0)
    if x.ndim == 0:
        return float(lower), float(upper)
    return lower, upper


def check_level(level: Any) -> None:
    """Refuse what is no confidence level.

    Raises
    ------
    InputError
        If level is no number strictly between 0 and 1.
    """
    if isinstance(level, bool) or not isinstance(level, (int, float, np.number)) or not 0 < level < 1:
        raise InputError(
            f"level is {level!r}.",
            cause="A confidence level lies strictly between 0 and 1.",
            next="Pass e.g. level=0.95.",
        )


def clustered(events: ArrayLike, totals: ArrayLike, level: float = 0.95, name: str | None = None) -> Bound:
    """Interval for a rate whose trials come in clusters: many rollouts of each of K prompts.

    Parameters
    ----------
    events, totals : array, shape (K,)
        Events and trials of every prompt (weighted counts are allowed); prompts without trials are ignored.
    level : float
        Confidence level.
    name : str, optional
        What the rate is called when printed, e.g. ``"P(harm)"``.

    Returns
    -------
    Bound
        Value ``sum(events) / sum(totals)`` (nan and [0, 1] without any trial); `reasons` has the sampling half-width.
        `info` has events, total, prompts, deff (the design effect), n_eff (the effective number of trials) and
        method.

    Raises
    ------
    InputError
        If the arrays differ in length or an entry is not a count.

    Notes
    -----
    Clopper-Pearson at the effective size ``n_eff = n / deff * (t_{n-1} / t_{K-1})**2`` with Student quantiles t,
    never more than n (E. L. Korn and B. I. Graubard, Survey Methodology 24 (1998) 193). The design effect is the
    linearised variance of the ratio between prompts over the variance of n independent trials; we take it as at least
    1, because a few prompts that happen to agree are no evidence of less than binomial variance. With no events, or
    nothing but events, the variance between prompts cannot be seen, so every prompt counts as a single trial. A
    single prompt keeps its own rollouts as trials, and `info["note"]` says that the variance between prompts was not
    assessed.
    """
    check_level(level)
    x, n = (np.atleast_1d(np.asarray(a, dtype=np.float64)) for a in (events, totals))
    if x.shape != n.shape or x.ndim != 1:
        raise InputError(
            f"events have shape {x.shape}, totals have shape {n.shape}.",
            cause="There must be one pair of counts per prompt.",
            next="Pass two arrays of one length.",
        )
    clopper_pearson(x, n, level)  # refuses entries that are not counts
    x, n = x[n > 0], n[n > 0]
    total, hits, prompts = float(n.sum()), float(x.sum()), len(n)
    info: dict[str, Any] = {"events": hits, "total": total, "prompts": prompts, "deff": None}
    if name is not None:
        info["name"] = name
    hits = min(hits, total)
    if total == 0:
        info |= {"n_eff": 0.0, "method": "no trials"}
        return Bound(np.nan, 0.0, 1.0, level, {"sampling": 0.5}, None, info)
    value = hits / total
    if prompts < 2:
        size, info["method"] = total, "Clopper-Pearson"
        info["note"] = "one prompt only: the variance between prompts is not assessed"
    elif hits in (0.0, total):
        size, info["method"] = min(float(prompts), total), "Clopper-Pearson, one trial per prompt"
    else:
        info["deff"] = _design_effect(x, n, value)
        size, info["method"] = float(effective_size(total, prompts, info["deff"], level)), "Korn-Graubard"
    info["n_eff"] = size
    lower, upper = clopper_pearson(value * size, size, level)
    lower, upper = min(lower, value), max(upper, value)  # against rounding
    return Bound(value, lower, upper, level, {"sampling": (upper - lower) / 2}, None, info)


def _design_effect(x: NDArray, n: NDArray, value: float) -> float:
    """Linearised variance between clusters of the ratio sum(x) / sum(n), over that of sum(n) independent trials."""
    total, K = n.sum(), len(n)
    between = K / (K - 1) * np.sum((x - value * n) ** 2) / total**2
    # (total - 1) as in the unbiased variance, so that one trial per prompt gives exactly 1.
    return float(between * max(total - 1, 1.0) / (value * (1 - value)))


def effective_size(total: ArrayLike, prompts: ArrayLike, deff: ArrayLike, level: float = 0.95) -> NDArray[np.float64]:
    """Number of independent trials that trials clustered by prompt are worth (Korn and Graubard, see `clustered`).

    Parameters
    ----------
    total : float or array
        Trials.
    prompts : float or array
        Prompts they belong to; two or more.
    deff : float or array
        Design effect; taken as at least 1.
    level : float
        Confidence level.

    Returns
    -------
    array
        At most `total`.
    """
    from scipy.special import stdtrit

    n, K, tail = np.asarray(total, dtype=np.float64), np.asarray(prompts, dtype=np.float64), (1 + level) / 2
    ratio = stdtrit(np.maximum(n - 1, 1.0), tail) / stdtrit(np.maximum(K - 1, 1.0), tail)
    return np.minimum(n, n / np.maximum(deff, 1.0) * ratio**2)
