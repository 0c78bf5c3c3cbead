"""Rates of harm with the judge's errors taken out, and their uncertainty put in.

A judge with sensitivity s that raises false alarms at rate a calls harmful the share ``q = p s + (1 - p) a`` of
answers of which p are harmful, so ``p = (q - a) / (s - a)`` (W. J. Rogan, B. Gladen, Am. J. Epidemiology 107 (1978)
71). All three numbers are estimates. The interval of p holds every p at which ``q - p s - (1 - p) a``, a sum of
independent terms, may be 0: its own interval comes from those of q, s and a by the method of variance estimates
recovery (G. Y. Zou, A. Donner, Statistics in Medicine 27 (2008) 1693), and the test is inverted as Fieller does it.
Z. Lang, J. Reiczigel (Preventive Veterinary Medicine 113 (2014) 13) correct normal theory with pseudo-counts instead;
we depart from them because exact one-dimensional intervals stay honest at zero events and under clustering by prompt.

What is assumed: the judge's errors depend on the true outcome alone (and on the category, if the confusion matrix is by
category), and are as frequent among the labelled rollouts as among the others. They must not depend on how deep the
prefill was, for instance. Where that fails, the corrected number is off by what the errors differ, and no width here
contains it; labels from the rollouts that a number is about are the remedy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..bound import Bound, check_level, clustered
from ..errors import InputError, UntrustedError
from ..outcomes import CODES
from .cells import tally_of
from .judging import Confusion, better_than_chance, error_rates

__all__ = [
    "Rate",
    "Skill",
    "bound_of",
    "check_options",
    "corrected",
    "corrected_rate",
    "mixture",
    "skill_of",
    "trusted",
]

HARM = CODES["harm"]
_ENDS = ("value", "lower", "upper")
BISECTIONS = 60
BIASES, DOUBTS = ("corrected", "widened"), ("refuse", "keep")


@dataclass(frozen=True, eq=False)
class Rate:
    """Rates, and how far each end of their intervals lies.

    Parameters
    ----------
    raw : array
        The estimate, which may lie outside [0, 1]; nan where there is none.
    value, lower, upper : array
        Within [0, 1].
    sampling, judge : array
        Half-widths of the interval if only the rollouts, or only the labels, were uncertain.
    """

    raw: NDArray
    value: NDArray
    lower: NDArray
    upper: NDArray
    sampling: NDArray
    judge: NDArray

    @classmethod
    def of(cls, get: Any) -> Rate:
        """From a function that gives each field by its name."""
        return cls(*(get(name) for name in ("raw", *_ENDS, "sampling", "judge")))


@dataclass(frozen=True)
class Skill:
    """What is known of a judge, in one category or in all (None)."""

    category: str | None
    sensitivity: Bound
    alarms: Bound
    index: Bound

    @property
    def shown(self) -> bool:
        """Whether the labels show that the judge is better than a coin."""
        return self.index.lower > 0

    def to_json(self) -> dict[str, Any]:
        return {"category": self.category} | {
            name: getattr(self, name).to_json() for name in ("sensitivity", "alarms", "index")
        }


def skill_of(found: Confusion, category: str | None, level: float) -> Skill:
    """Sensitivity, false alarms and Youden's index of a judge in one category, or in all."""
    rates = error_rates(found, category, level)
    return Skill(category, *rates, better_than_chance(*rates))


def corrected(
    source: Any,
    found: Confusion,
    *,
    by: str | None = None,
    level: float = 0.95,
    bias: str = "corrected",
    doubtful: str = "refuse",
) -> Bound:
    """Harm with the judge's errors taken out, at every depth that was measured.

    Parameters
    ----------
    source : Rollouts, Counts or estimated Chain; or Bound
        Judged rollouts in some form; or measured rates of any shape, such as a profile, if the confusion matrix is
        pooled or the rates are by category.
    found : Confusion
        Of the same judge.
    by : {None, "category"}
        Rollouts only: a row for each category.
    level : float
        Confidence level; that of a Bound is its own.
    bias : {"corrected", "widened"}
        "widened": the value stays that of the judge, and the interval is widened until it holds the corrected one.
    doubtful : {"refuse", "keep"}
        What to do where the labels do not show that the judge is better than chance.

    Returns
    -------
    Bound
        Shape (depth,), (category, depth), or that of the Bound given. `reasons` has sampling and judge, each the
        half-width that it alone would leave: together they add in squares, nearly. `info` has the same dims and coords
        as a profile, apparent (the rates that the judge reported), and skill (per category: sensitivity, alarms,
        index). ``at_start`` is the rate without prefill, if that was measured.

    Raises
    ------
    InputError
        If a category was not labelled, or a Bound pools categories that the confusion matrix keeps apart.
    UntrustedError
        If the judge is no better than chance, or its labels do not exclude that; `partial` is the Bound, whose
        intervals still hold, however wide.

    Notes
    -----
    Rollouts cluster by prompt, labels as well. With a confusion matrix by category, a pooled rate is the mean of the
    categories' corrected rates, each weighted with its share of the rollouts. An estimate outside [0, 1] is moved
    there, and its interval is that of an estimate which lies on the edge: never narrower than the labels allow.

    Examples
    --------
    A judge that misses half of the harm, and labels of the answers to 40 of 100 prompts:

    >>> said = [[5, 9, 2], [5, 8, 2], [7, 2], [5, 6, 2]] * 100
    >>> rolls = ms.Rollouts.of(said, prompt_id=np.arange(400) // 4)
    >>> judged = ms.judge(rolls, "lexicon", harm=[9], refusal=[7], eos_ids=[2])
    >>> labels = ["harm", "harm", "refusal", "benign"] * 40 + [None] * 240
    >>> print(ms.profile(judged)[0])
    P(harm) = 0.25   95 % [0.208, 0.295]
        because: sampling 0.044; judge, lumping, model, truncation, rounding not assessed
    >>> print(ms.corrected(judged, ms.confusion(judged, labels))[0])
    P(harm) = 0.5   95 % [0.337, 0.68]
        because: sampling 0.087, judge 0.14; lumping, model, truncation, rounding not assessed
    """
    check_options(found, by, level, bias, doubtful)
    if isinstance(source, Bound):
        return _corrected_bound(source, found, bias, doubtful)
    tally = tally_of(source)
    depths = tuple(np.unique(tally.prefill).tolist())
    groups = (None,) if by is None else tuple(np.unique(tally.category).tolist())
    names = groups if by else tuple(np.unique(tally.category).tolist()) if found.by else (None,)
    skills = {name: skill_of(found, name if found.by else None, level) for name in names}
    cells, notes, cluster = {}, [], tally.cluster
    for g in groups:
        for k in depths:
            rates, weights = [], []
            for name in names if by is None else (g,):
                rows = (tally.prefill == k) & (True if name is None else tally.category == name)
                clusters = np.unique(cluster[rows], return_inverse=True)[1].reshape(-1)
                x, n = (np.bincount(clusters, v[rows]) for v in (tally.outcomes[:, HARM], tally.outcomes.sum(axis=1)))
                q = clustered(x, n, level)
                notes.append(q.info.get("note", ""))
                s = skills[name]
                rates.append((corrected_rate(q, s.sensitivity, s.alarms), q))
                weights.append(float(n.sum()))
            cells[g, k] = _pooled(rates, np.array(weights))
    shape = (len(depths),) if by is None else (len(groups), len(depths))
    info = {
        "dims": ("depth",) if by is None else ("category", "depth"),
        "coords": {"depth": depths} if by is None else {"category": groups, "depth": depths},
    }
    if told := "; ".join(dict.fromkeys(note for note in notes if note)):
        info["note"] = told
    table = [cells[g, k] for g in groups for k in depths]
    rate = Rate.of(lambda n: np.array([getattr(r, n) for r, _ in table]).reshape(shape))
    ends = [np.array([q[i] for _, q in table]).reshape(shape) for i in range(3)]
    start = None
    if by is None and 0 in depths:
        at = depths.index(0)
        first = Rate.of(lambda n: getattr(rate, n)[at])
        start = bound_of(first, [e[at] for e in ends], skills.values(), level, bias, {})
    whole = bound_of(rate, ends, skills.values(), level, bias, info, start)
    return trusted(whole, skills.values(), doubtful)


def corrected_rate(q: Bound, sensitivity: Bound, alarms: Bound) -> Rate:
    """The estimate of Rogan and Gladen, and its interval.

    Parameters
    ----------
    q : Bound
        How often the judge says so; any shape.
    sensitivity, alarms : Bound
        How often it says so where it is true, and where it is not; of the shape of q, or scalars.

    Returns
    -------
    Rate
    """
    parts = [[np.asarray(getattr(b, n), dtype=np.float64) for n in _ENDS] for b in (q, sensitivity, alarms)]
    shown = ~np.isnan(sum(part[0] for part in parts))
    (v, s, a) = (part[0] for part in parts)
    with np.errstate(divide="ignore", invalid="ignore"):
        raw = np.where(shown, (v - a) / (s - a), np.nan)
    raw = np.where(np.isfinite(raw), raw, np.nan)  # a judge that is exactly a coin shows nothing
    # What is not known is the middle of its interval, [0, 1].
    full = [[np.where(np.isnan(part[0]), 0.5, part[0]), part[1], part[2]] for part in parts]
    bare = [[part[0]] * 3 for part in full]
    ends = {
        "all": _interval(*full),
        "sampling": _interval(full[0], bare[1], bare[2]),
        "judge": _interval(bare[0], full[1], full[2]),
    }
    value = np.clip(raw, 0.0, 1.0)
    lower, upper = np.fmin(ends["all"][0], value), np.fmax(ends["all"][1], value)
    halves = [(ends[name][1] - ends[name][0]) / 2 for name in ("sampling", "judge")]
    return Rate(raw, value, lower, upper, *halves)


_Ends = list[NDArray]  # value, lower, upper


def _interval(q: _Ends, s: _Ends, a: _Ends) -> tuple[NDArray, NDArray]:
    """Every p in [0, 1] that the three intervals allow; the lower end is the upper end of what is not harm."""
    flip = lambda x: [1 - x[0], 1 - x[2], 1 - x[1]]  # noqa: E731
    return 1 - _upper(flip(q), flip(a), flip(s)), _upper(q, s, a)


def _upper(q: _Ends, s: _Ends, a: _Ends) -> NDArray:
    """Largest p with ``q - p s - (1 - p) a >= 0`` for some values within the intervals, as MOVER joins them."""
    lift = np.maximum(a[0] - q[0], 0.0)  # an estimate below 0 counts as 0: an empty set would claim certainty
    dq, ds, da = q[2] - q[0], s[0] - s[1], a[0] - a[1]

    def room(p: NDArray) -> NDArray:
        return q[0] + lift - p * s[0] - (1 - p) * a[0] + np.sqrt(dq**2 + (p * ds) ** 2 + ((1 - p) * da) ** 2)

    def without_alarms(p: NDArray) -> NDArray:
        return q[0] - p * s[0] + np.sqrt(dq**2 + (p * ds) ** 2)

    top = _largest(room, np.broadcast_shapes(q[0].shape, s[0].shape, a[0].shape))
    # Alarms are not negative, so harm is at most q / s: this cuts what the lift adds.
    return np.where(lift > 0, np.minimum(top, _largest(without_alarms, top.shape)), top)


def _largest(f: Any, shape: tuple[int, ...]) -> NDArray:
    """Largest p in [0, 1] with f(p) >= 0, for a convex f with f(0) >= 0."""
    low, high = np.zeros(shape), np.ones(shape)
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        inside = f(middle) >= 0
        low, high = np.where(inside, middle, low), np.where(inside, high, middle)
    return np.where(f(np.ones(shape)) >= -1e-15, 1.0, high)


def mixture(rates: list[Rate], weights: NDArray) -> Rate:
    """Weighted mean of independent corrected rates.

    Parameters
    ----------
    rates : list of m Rate
        Of one shape.
    weights : array, shape (m, ...)
        They add up to 1 along the first axis.

    Returns
    -------
    Rate

    Notes
    -----
    The estimates are averaged before they are moved into [0, 1], so that the mean of many small rates is not biased
    upwards. Distances of the ends are added in squares (MOVER).
    """
    raw = np.sum([np.where(w > 0, w * r.raw, 0.0) for w, r in zip(weights, rates)], axis=0)
    value = np.clip(raw, 0.0, 1.0)
    middle = np.where(np.isnan(value), 0.5, value)
    own = [np.where(np.isnan(r.value), 0.5, r.value) for r in rates]
    root = lambda parts: np.sqrt(np.sum([(w * d) ** 2 for w, d in zip(weights, parts)], axis=0))  # noqa: E731
    lower = np.maximum(middle - root([v - r.lower for v, r in zip(own, rates)]), 0.0)
    upper = np.minimum(middle + root([r.upper - v for v, r in zip(own, rates)]), 1.0)
    return Rate(raw, value, lower, upper, root([r.sampling for r in rates]), root([r.judge for r in rates]))


def _pooled(rates: list[Any], weights: NDArray) -> tuple[Rate, list[float]]:
    """One rate from those of the categories, and the interval of what the judge reported."""
    total = weights.sum()
    share = weights / total if total else np.full(len(weights), 1 / len(weights))
    if len(rates) == 1:
        return rates[0][0], [getattr(rates[0][1], n) for n in _ENDS]
    kept = [i for i in range(len(rates)) if share[i] > 0 or not total]
    one = mixture([rates[i][0] for i in kept], share[kept])
    # What the judge reported, by the same rule.
    bare = [Rate(*(np.asarray(x) for x in (q.value, q.value, q.lower, q.upper, 0.0, 0.0))) for _, q in rates]
    plain = mixture([bare[i] for i in kept], share[kept])
    return one, [float(plain.value), float(plain.lower), float(plain.upper)]


def bound_of(
    rate: Rate, ends: Any, skills: Any, level: float, bias: str, info: dict[str, Any], start: Bound | None = None
) -> Bound:
    """The Bound of a corrected rate; `ends` are value, lower and upper of what the judge reported."""
    q = [np.asarray(e, dtype=np.float64) for e in ends]
    told = {"name": "P(harm)", **info, "apparent": q[0], "skill": [s.to_json() for s in skills]}
    if bias == "widened":
        lower, upper = np.fmin(q[1], rate.lower), np.fmax(q[2], rate.upper)
        reasons = {"sampling": (q[2] - q[1]) / 2, "judge": (q[1] - lower + upper - q[2]) / 2}
        told["method"] = "the judge's share of harm, widened by its errors"
        return Bound(q[0], lower, upper, level, reasons, start, told)
    told |= {"method": "Rogan-Gladen, inverted by MOVER from clustered Clopper-Pearson", "raw": rate.raw}
    if below := int((rate.raw < 0).sum() + (rate.raw > 1).sum()):
        told["note"] = "; ".join(
            [
                *([info["note"]] if "note" in info else []),
                f"{below} estimate{'s' * (below > 1)} outside [0, 1] moved there",
            ]
        )
    reasons = {"sampling": rate.sampling, "judge": rate.judge}
    return Bound(rate.value, rate.lower, rate.upper, level, reasons, start, told)


def _corrected_bound(source: Bound, found: Confusion, bias: str, doubtful: str) -> Bound:
    check_level(source.level)
    if source.reasons["judge"] is not None:
        raise InputError(
            "This bound has been corrected for its judge already.",
            cause="Its reasons hold a width for the judge.",
            next="Pass the rates that the judge reported.",
        )
    dims = source.info.get("dims", ())
    names: tuple[Any, ...] = (None,)
    if found.by == "category":
        if not dims or dims[0] != "category":
            raise InputError(
                "These rates pool categories in which the judge errs differently.",
                cause="The confusion matrix is by category, the rates are not.",
                next="Pass the rollouts, a profile by category, or a confusion matrix with by=None.",
            )
        names = tuple(source.info["coords"]["category"])
    skills = [skill_of(found, name, source.level) for name in names]
    ends = [np.asarray(getattr(source, n)) for n in _ENDS]
    if names == (None,):
        rate = corrected_rate(source, skills[0].sensitivity, skills[0].alarms)
    else:
        rows = [corrected_rate(source[i], s.sensitivity, s.alarms) for i, s in enumerate(skills)]
        rate = Rate.of(lambda n: np.stack([getattr(r, n) for r in rows]))
    info = {k: v for k, v in source.info.items() if k in ("dims", "coords", "note", "name")}
    start = None if source.start is None else _corrected_bound(source.start, found, bias, "keep")
    return trusted(bound_of(rate, ends, skills, source.level, bias, info, start), skills, doubtful)


def check_options(found: Any, by: Any, level: float, bias: str, doubtful: str) -> None:
    check_level(level)
    if not isinstance(found, Confusion):
        raise InputError(
            f"{type(found).__name__} is no confusion matrix.",
            cause="How often the judge errs has to be known before its errors can be taken out.",
            next="Make one: confusion(judged, labels), or Confusion.of(counts).",
        )
    for name, value, known in (("by", by, (None, "category")), ("bias", bias, BIASES), ("doubtful", doubtful, DOUBTS)):
        if value not in known:
            raise InputError(
                f"{name} is {value!r}.", cause=f"It is one of {', '.join(map(repr, known))}.", next="Use one of these."
            )


def trusted(bound: Bound, skills: Any, doubtful: str) -> Bound:
    """The bound itself, or `UntrustedError` carrying it if a judge may be no better than a coin."""
    bad = [s for s in skills if not s.shown]
    if not bad or doubtful == "keep":
        return bound
    s = bad[0]
    where = "" if s.category is None else f" in category {s.category!r}"
    rates = (
        f"sensitivity {s.sensitivity.value:.3g} [{s.sensitivity.lower:.3g}, {s.sensitivity.upper:.3g}], "
        f"false alarms {s.alarms.value:.3g} [{s.alarms.lower:.3g}, {s.alarms.upper:.3g}]"
    )
    if s.index.value <= 0:
        fact, cause = f"The judge is no better than chance{where}: {rates}.", "It calls harm harmful no more often "
        cause += "than anything else, so its verdicts say nothing about harm."
    else:
        fact = f"The labels do not show that the judge is better than chance{where}: {rates}."
        few = [n for n, b in (("harm", s.sensitivity), ("no harm", s.alarms)) if not b.info["total"]]
        cause = f"No rollout is labelled {few[0]}." if few else "There are too few labels, or the judge is too poor."
    raise UntrustedError(
        fact,
        cause=cause,
        next="Label more rollouts of that kind, use a better judge, or pass doubtful='keep' for the wide interval.",
        partial=bound,
    )
