"""Bound: a number, its interval, and the named reasons for the interval's width.

Everything the package computes comes back as a `Bound`, because a probability without its uncertainty is an
invitation to believe too much. `clustered` makes the interval that stays honest at zero events, and when rollouts come
in clusters, one per prompt.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .clusters import check_level, clopper_pearson, effective_size, spread
from .errors import InputError
from .rich import few, shown, strip

__all__ = ["REASONS", "Bound", "check_level", "clopper_pearson", "clustered", "effective_size", "encode"]

FEW = 10  # effective trials below which an interval says so
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

    Examples
    --------
    >>> harm = ms.Bound(0.1, 0.05, 0.18, reasons={"sampling": 0.065})
    >>> harm
    <Bound value = 0.1   95 % [0.05, 0.18]
        because: sampling 0.065; judge, lumping, model, truncation, rounding not assessed>
    >>> f"at most {harm.upper:.0%}"
    'at most 18%'
    >>> harm.reasons["judge"] is None  # not assessed, which is not zero
    True

    Numbers by state come as one bound, whose entries are bounds again:

    >>> ms.hitting_probability(ms.toy.ruin(4), "harm")[1]
    <Bound P(harm) = 0.25   proven [0.25, 0.25]
        because: rounding 7e-16; sampling, judge, lumping, model, truncation not assessed>
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
        same = lower is value and upper is value
        wrong = None if same else (lower > value) | (value > upper)
        if wrong is not None and wrong.any():
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
        """The bound of one entry or a slice; the start value and the names of the axes do not travel along."""
        if self.shape == ():
            raise TypeError("this bound is a scalar and cannot be indexed")
        reasons = {k: w if w is None or np.shape(w) != self.shape else w[key] for k, w in self.reasons.items()}
        info = {k: v for k, v in self.info.items() if k not in ("exact", "expression", "dims", "coords")}
        info = {k: v[key] if isinstance(v, np.ndarray) and v.shape == self.shape else v for k, v in info.items()}
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

    def _repr_html_(self) -> str:
        """What a notebook shows: value, interval and widths; of an array its first entries."""
        name = str(self.info.get("name", "value"))
        interval = "proven interval" if self.level == 1 else f"{100 * self.level:g} % interval"
        missing = [k for k, w in self.reasons.items() if w is None]
        notes = [str(self.info.get("note", "")), f"not assessed: {', '.join(missing)}" if missing else ""]
        known = {k: w for k, w in self.reasons.items() if w is not None}
        if self.shape == ():
            value, lower, upper = _digits(self.value, self.lower, self.upper)
            rows = [(interval, f"[{lower}, {upper}]"), *((f"width: {k}", _width(w)) for k, w in known.items())]
            likely = name.startswith("P(") and not np.isnan([self.value, self.lower, self.upper]).any()
            picture = strip(self.value, self.lower, self.upper) if likely else ""
            return shown(f"{name} = {value}", rows, notes=notes, picture=picture)
        dims, coords = self.info.get("dims", ()), self.info.get("coords", {})
        named = bool(dims) and tuple(len(coords.get(d, ())) for d in dims) == self.shape
        which, more = few(int(np.size(self.value)))
        rows = []
        for i in which:
            at = tuple(int(j) for j in np.unravel_index(i, self.shape))
            value, lower, upper = _digits(*(float(x[at]) for x in (self.value, self.lower, self.upper)))
            label = ", ".join(str(coords[d][j]) for d, j in zip(dims, at)) if named else ", ".join(map(str, at))
            rows.append((label, value, f"[{lower}, {upper}]"))
        widths = ", ".join(f"{k} {_width(w)}" for k, w in known.items())
        first = "" if self.start is None else f"at start: {self.start}"
        notes = [more, f"largest widths: {widths}" if widths else "", *notes, first]
        size = " x ".join(map(str, self.shape))
        return shown(
            f"{name}: {size} values", rows, head=[", ".join(dims) if named else "entry", "value", interval], notes=notes
        )

    def to_json(self) -> dict[str, Any]:
        """Value, interval, level and reasons as plain JSON data; infinities and nan are strings."""
        return {name: encode(getattr(self, name)) for name in ("value", "lower", "upper", "level", "reasons")}


def _frozen(x: Any) -> Any:
    """A python float, or a read-only float64 array: a copy, unless nobody can write to what was given."""
    if type(x) is np.ndarray and x.ndim and x.dtype == np.float64 and x.flags.c_contiguous and not x.flags.writeable:
        base = x.base
        if base is None or (type(base) is np.ndarray and base.base is None and not base.flags.writeable):
            return x
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

    Examples
    --------
    >>> from markovsafety.bound import clustered, encode
    >>> encode({"time": np.inf, "depths": range(3)})
    {'time': 'inf', 'depths': [0, 1, 2]}
    >>> encode(clustered([0, 0], [8, 8]))["reasons"]["judge"] is None
    True
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


def clustered(events: ArrayLike, totals: ArrayLike, level: float = 0.95, name: str | None = None) -> Bound:
    """Interval for a rate whose trials come in clusters: many rollouts of each of K prompts.

    Parameters
    ----------
    events, totals : array, shape (K,)
        Events and trials of every prompt; prompts without trials are ignored. Weighted counts are allowed: the sum of
        the weights then counts as the number of trials, so scale weights to a mean of 1.
    level : float
        Confidence level.
    name : str, optional
        What the rate is called when printed, e.g. ``"P(harm)"``.

    Returns
    -------
    Bound
        Value ``sum(events) / sum(totals)`` (nan and [0, 1] without any trial); `reasons` has the sampling half-width.
        `info` has events, total, prompts, deff (the design effect; None where it cannot be seen), seen (the prompts
        it was seen on, c below), n_eff (the effective number of trials) and method.

    Raises
    ------
    InputError
        If the arrays differ in length, an entry is not a count, or weights are so large that their sum overflows.

    Notes
    -----
    Clopper-Pearson at an effective size after E. L. Korn and B. I. Graubard (Survey Methodology 24 (1998) 193),

        n_eff = n / deff * (t_{n-1} / t_f)**2,    at least K, at most n,

    with Student quantiles t. The design effect `deff` is the linearised variance of the ratio between prompts over
    the variance of n independent trials. We depart from them in three places:

    * The degrees of freedom f are those that the variance between prompts was really seen with, where they have K - 1:
      c - 1, with c the number of prompts with an event (or with a trial without one, if fewer), or 2 K / (k - 1), with
      k the kurtosis of the prompts' residuals, if less. Prompts without events say nothing about how unevenly events
      fall: a variance that was seen on 3 prompts is as uncertain as 3 prompts make it, however many others there are.
      With K - 1, intervals from few harmful prompts cover 80 to 90 %.
    * The size is never below K, because no trials with values in [0, 1] vary more than one coin per prompt. With no
      events, with nothing but events, and with c < 2, the variance between prompts cannot be seen, and K is the size.
    * The result, not the design effect, is cut off at n: a few prompts that happen to agree are no evidence of less
      than binomial variance, but they need not pay for Student's quantile on top.

    So the first harmful prompt never lowers the upper end. Further ones may, since they show for the first time how
    alike prompts are; by c = 10 the correction is below a quarter of the width. Where prompts have unequal numbers of
    trials, K (except without events) and c are the numbers of equal prompts that average as well, sum(n)^2 / sum(n^2)
    (L. Kish, Survey Sampling, 1965). ``markovsafety bench coverage`` measures all of this. What no interval from K
    prompts can see is a kind of prompt that none of them is of: its share may be up to 3.7 / K.

    A single prompt keeps its own rollouts as trials, and `info["note"]` says that the variance between prompts was
    not assessed. It also says where weighted trials are worth fewer than 10 independent ones.

    Examples
    --------
    One answer in twenty is harmful, of 20 prompts that were asked 20 times each. If every prompt did it once, that is
    known rather well; if two prompts did all of it, much less is known of what others would do:

    >>> from markovsafety.bound import clustered
    >>> print(clustered([1] * 20, [20] * 20, name="P(harm)"))
    P(harm) = 0.05   95 % [0.0308, 0.0762]
        because: sampling 0.023; judge, lumping, model, truncation, rounding not assessed
    >>> alike = clustered([10, 10] + [0] * 18, [20] * 20, name="P(harm)")
    >>> print(alike)
    P(harm) = 0.05   95 % [0.00127, 0.249]
        because: sampling 0.12; judge, lumping, model, truncation, rounding not assessed
    >>> alike.info["n_eff"]  # of 400
    20.0
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
    with np.errstate(over="ignore"):
        if not np.isfinite(n.sum()):
            shares = x / n.max(), n / n.max()
            raise InputError(
                "The weights overflow.",
                cause=f"The trials of {len(n)} prompts add up to more than a float can hold.",
                next="Divide the weights by their mean.",
                partial=Bound(float(shares[0].sum() / shares[1].sum()), 0.0, 1.0, level),
            )
    s = spread(x, n)
    total, hits, prompts, seen = float(s.total), float(s.events), int(s.prompts), float(s.seen)
    info: dict[str, Any] = {"events": hits, "total": total, "prompts": prompts, "deff": None, "seen": seen}
    if name is not None:
        info["name"] = name
    if total == 0:
        info |= {"n_eff": 0.0, "method": "no trials"}
        return Bound(np.nan, 0.0, 1.0, level, {"sampling": 0.5}, None, info)
    info["n_eff"] = size = float(s.size(level))
    if prompts < 2:
        info["method"] = "Clopper-Pearson"
        info["note"] = "one prompt only: the variance between prompts is not assessed"
    elif hits in (0.0, total) or seen < 2:
        info["method"] = "Clopper-Pearson, one trial per prompt"
    else:
        info["deff"], info["method"] = float(s.deff), "Korn-Graubard"
    if prompts > 1 and size < FEW and not bool(np.all((x == np.floor(x)) & (n == np.floor(n)))):
        info["note"] = f"the weighted rollouts are worth {size:.3g} independent ones only"
    lower, upper = (float(end) for end in s.ends(level))
    return Bound(float(s.value), lower, upper, level, {"sampling": (upper - lower) / 2}, None, info)
