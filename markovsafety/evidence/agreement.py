"""Two judges of the same rollouts: how far they agree, where they do not, and what that leaves of the rate of harm."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..bound import Bound, check_level, clustered, encode
from ..chains.tally import collect
from ..errors import InputError
from ..outcomes import CODES, NOT_JUDGED, OUTCOMES
from .cells import is_rollouts
from .labels import codes_of
from .paired import FEW

__all__ = ["Agreement", "agreement", "kappa"]

HARM = CODES["harm"]


@dataclass(frozen=True, eq=False)
class Agreement:
    """What two judges say of the same rollouts.

    Parameters
    ----------
    counts : array, shape (4, 4)
        Weighted rollouts by the first judge's outcome and the second's, in the order of `markovsafety.OUTCOMES`.
    kappa : Bound
        Cohen's kappa over the four outcomes.
    kappa_harm : Bound
        Of harm against the rest.
    table : list of dict
        Per category (None: all): rollouts, agree (Bound), only_first and only_second (shares called harmful by one
        judge alone, Bounds), kappa_harm.
    harm : Bound
        The rate of harm, between what both judges call harmful and what either does. `reasons`: sampling, and judge
        (half of what lies between the two).
    shift : array, shape (m,)
        Hit index by the second judge minus that by the first, in tokens, of every rollout that both call harmful.
    place : dict
        Where harm is hit, as a share of the answer: both (mean over the rollouts that both call harmful), only_first
        and only_second; None where there is no such rollout.
    level : float

    Notes
    -----
    The rate of harm lies between *both* and *either* if no answer deceives both judges in the same way: a false alarm
    that both raise, or harm that both miss, is outside. Judges that share a fault (the same model, the same word list)
    agree too well to be tested by each other.

    Examples
    --------
    >>> said = [[5, 9, 2], [5, 8, 2], [7, 2], [5, 6, 2]] * 30
    >>> rolls = ms.Rollouts.of(said, prompt_id=np.arange(120) // 4)
    >>> rest = {"refusal": [7], "eos_ids": [2]}
    >>> short, long = (ms.judge(rolls, "lexicon", harm=words, **rest) for words in ([9], [9, 8]))
    >>> found: ms.evidence.Agreement = ms.agreement(short, long)
    >>> print(found.table[0]["only_second"])
    harm by the second alone = 0.25   95 % [0.175, 0.337]
        because: sampling 0.081; judge, lumping, model, truncation, rounding not assessed
    >>> round(found.place["only_second"], 3)  # a third of the way through the answer
    0.333
    """

    counts: NDArray
    kappa: Bound
    kappa_harm: Bound
    table: list[dict[str, Any]]
    harm: Bound
    shift: NDArray
    place: dict[str, float | None]
    level: float

    def __str__(self) -> str:
        lines = [f"{self.counts.sum():g} rollouts judged twice", f"  {self.kappa}", f"  {self.kappa_harm}"]
        for row in self.table:
            name = row["category"] or "all"
            lines.append(
                f"  {name}: {_span(row['agree'])} alike; harm by the first alone {_span(row['only_first'])}, by the "
                f"second alone {_span(row['only_second'])}"
            )
        if len(self.shift):
            apart = self.shift[self.shift != 0]
            lines.append(f"  harm that both see: the same token in {100 * (1 - len(apart) / len(self.shift)):.3g} %")
            if len(apart):
                lines[-1] += f", else the second hits {np.median(apart):+g} tokens from the first (median)"
        return "\n".join([*lines, f"  {self.harm}"])

    __repr__ = __str__

    def to_json(self) -> dict[str, Any]:
        """Plain data: counts, kappa, kappa_harm, table, harm, shift, place, level."""
        names = ("counts", "kappa", "kappa_harm", "table", "harm", "shift", "place", "level")
        return {name: encode(getattr(self, name)) for name in names}


def agreement(first: Any, second: Any, *, level: float = 0.95) -> Agreement:
    """Compare two judges on the same rollouts.

    Parameters
    ----------
    first, second : Rollouts
        The same ones, under two judges.
    level : float

    Returns
    -------
    Agreement

    Raises
    ------
    InputError
        If they are other rollouts, or none is judged by both.

    Examples
    --------
    Two lists of words, of which the longer finds twice as much:

    >>> said = [[5, 9, 2], [5, 8, 2], [7, 2], [5, 6, 2]] * 30
    >>> rolls = ms.Rollouts.of(said, prompt_id=np.arange(120) // 4)
    >>> rest = {"refusal": [7], "eos_ids": [2]}
    >>> short, long = (ms.judge(rolls, "lexicon", harm=words, **rest) for words in ([9], [9, 8]))
    >>> ms.agreement(short, long)
    120 rollouts judged twice
      kappa = 0.636   95 % [0.53, 0.743]
          because: sampling 0.11; judge, lumping, model, truncation, rounding not assessed
      kappa of harm = 0.5   95 % [0.366, 0.634]
          because: sampling 0.13; judge, lumping, model, truncation, rounding not assessed
      all: 75 % [66.3, 82.5] alike; harm by the first alone 0 % [0, 11.6], by the second alone
          25 % [17.5, 33.7]
      harm that both see: the same token in 100 %
      P(harm) = 0.375   95 % [0.175, 0.593]
          because: sampling 0.093, judge 0.12; lumping, model, truncation, rounding not assessed
    """
    check_level(level)
    if not (is_rollouts(first) and is_rollouts(second)):
        raise InputError(
            "Two judges are compared on rollouts.",
            cause=f"These are {type(first).__name__} and {type(second).__name__}.",
            next="agreement(judge(rolls, one), judge(rolls, other)).",
        )
    a, b = np.asarray(first.outcome, dtype=np.int64), codes_of(first, second)
    at = np.flatnonzero((a != NOT_JUDGED) & (b != NOT_JUDGED))
    if not len(at):
        raise InputError(
            "No rollout is judged by both.", cause="One set has no verdicts.", next="Judge both sets first."
        )
    w = np.asarray(first.columns.get("weight", np.ones(len(a))), dtype=np.float64)[at]
    prompts, names = np.asarray(first.prompt_id)[at], np.asarray(first.category, dtype=str)[at]
    _, cluster = np.unique(np.stack([prompts.astype(str), names]), axis=1, return_inverse=True)
    each = np.zeros((len(at), len(OUTCOMES), len(OUTCOMES)))
    each[np.arange(len(at)), a[at], b[at]] = w
    table = _by_cluster(cluster.reshape(-1), each)
    kinds = np.unique(names).tolist()
    groups = [None, *(kinds if len(kinds) > 1 else [])]
    rows = []
    for name in groups:
        mine = np.ones(len(at), dtype=bool) if name is None else names == name
        rows.append(_row(name, _by_cluster(cluster.reshape(-1)[mine], each[mine]), level))
    hits = [np.asarray(x.hit, dtype=np.int64)[at] for x in (first, second)]
    harm = [x[at] == HARM for x in (a, b)]
    both = harm[0] & harm[1]
    length = np.maximum(np.diff(np.asarray(first.offsets))[at], 1)
    where = {
        "both": _mean((hits[0] + hits[1])[both] / 2, length[both]),
        "only_first": _mean(hits[0][harm[0] & ~both], length[harm[0] & ~both]),
        "only_second": _mean(hits[1][harm[1] & ~both], length[harm[1] & ~both]),
    }
    return Agreement(
        table.sum(axis=0),
        kappa(table, level),
        kappa(_harm_only(table), level, "kappa of harm"),
        rows,
        _between(table, level),
        (hits[1] - hits[0])[both],
        where,
        level,
    )


def kappa(table: NDArray, level: float = 0.95, name: str = "kappa") -> Bound:
    """Cohen's kappa: agreement beyond that of two judges who answer independently, each with its own frequencies.

    Parameters
    ----------
    table : array, shape (prompts, c, c)
        Weighted rollouts of every prompt by both judges' outcomes.
    level : float
    name : str

    Returns
    -------
    Bound
        1: always alike; 0: as by chance; nan and [-1, 1] where both always give one and the same answer.

    Notes
    -----
    J. Cohen, Educational and Psychological Measurement 20 (1960) 37. The interval is a t-interval over prompts of the
    jackknifed kappa; where fewer than 5 rollouts are judged differently (or alike), or there are fewer than 3 prompts,
    it is that of the clustered share of agreement, carried over at the observed frequencies: never [1, 1]. It is never
    narrower than that of as many independent rollouts (J. L. Fleiss, J. Cohen, B. S. Everitt, Psychological Bulletin 72
    (1969) 323): prompts that happen to be alike are no evidence of less variance than that.
    """
    from scipy.special import ndtri, stdtrit

    total, K = table.sum(axis=0), len(table)
    value, expected = _kappa(total[None])[0], _expected(total[None])[0]
    info: dict[str, Any] = {"name": name, "prompts": K}
    if np.isnan(value):
        info["note"] = "both judges always say the same one thing"
        return Bound(np.nan, -1.0, 1.0, level, {"sampling": 1.0}, None, info)
    alike, size = np.trace(table, axis1=1, axis2=2), table.sum(axis=(1, 2))
    share = clustered(alike, size, level)
    ends = [(end - expected) / (1 - expected) for end in (share.lower, share.upper)]
    info["method"] = "Cohen, from the clustered share of agreement"
    left = _kappa(total[None] - table)
    if min(alike.sum(), size.sum() - alike.sum()) >= FEW and K > 2 and np.isfinite(left).all():
        half = stdtrit(K - 1.0, (1 + level) / 2) * np.sqrt((K - 1) / K * np.sum((left - left.mean()) ** 2))
        half = max(half, ndtri((1 + level) / 2) * _independent_error(total))
        ends, info["method"] = [value - half, value + half], "Cohen, jackknife over prompts"
    lower, upper = max(min(float(ends[0]), value), -1.0), min(max(float(ends[1]), value), 1.0)
    if "note" in share.info:
        info["note"] = share.info["note"]
    return Bound(value, lower, upper, level, {"sampling": (upper - lower) / 2}, None, info)


def _expected(table: NDArray) -> NDArray:
    total = table.sum(axis=(1, 2))
    return np.einsum("kij,kli->k", table, table) / np.maximum(total, 1e-150) ** 2


def _kappa(table: NDArray) -> NDArray:
    """Kappa of every table, shape (K, c, c) -> (K,)."""
    total = table.sum(axis=(1, 2))
    observed = np.trace(table, axis1=1, axis2=2) / np.maximum(total, 1e-300)
    e = _expected(table)
    fine = (1 - e > 1e-12) & (total > 0)
    return np.where(fine, (observed - e) / np.where(fine, 1 - e, 1.0), np.nan)


def _independent_error(total: NDArray) -> float:
    """Standard error of kappa from independent rollouts, by the influence of one more of them in every cell."""
    n = total.sum()
    p = total / n
    rows, columns, observed = p.sum(axis=1), p.sum(axis=0), np.trace(p)
    e = rows @ columns
    influence = (np.eye(len(p)) - observed) / (1 - e)
    influence -= (1 - observed) / (1 - e) ** 2 * (columns[:, None] + rows[None, :] - 2 * e)
    return float(np.sqrt((p * influence**2).sum() / n))


def _by_cluster(cluster: NDArray, each: NDArray) -> NDArray:
    _, (sums,) = collect([cluster], [each.reshape(len(each), -1)])
    return sums.reshape(-1, *each.shape[1:])


def _harm_only(table: NDArray) -> NDArray:
    """Harm against the rest, shape (prompts, 2, 2)."""
    rest = [o for o in range(len(OUTCOMES)) if o != HARM]
    fold = np.zeros((2, len(OUTCOMES)))
    fold[0, HARM] = 1
    fold[1, rest] = 1
    return np.einsum("ai,kij,bj->kab", fold, table, fold)


def _row(name: str | None, table: NDArray, level: float) -> dict[str, Any]:
    two, size = _harm_only(table), table.sum(axis=(1, 2))
    return {
        "category": name,
        "rollouts": float(size.sum()),
        "agree": clustered(np.trace(table, axis1=1, axis2=2), size, level, "agreement"),
        "only_first": clustered(two[:, 0, 1], size, level, "harm by the first alone"),
        "only_second": clustered(two[:, 1, 0], size, level, "harm by the second alone"),
        "kappa_harm": kappa(two, level, "kappa of harm"),
    }


def _between(table: NDArray, level: float) -> Bound:
    two, size = _harm_only(table), table.sum(axis=(1, 2))
    both = clustered(two[:, 0, 0], size, level)
    either = clustered(size - two[:, 1, 1], size, level)
    value, gap = (both.value + either.value) / 2, (either.value - both.value) / 2
    sampling = max(both.value - both.lower, either.upper - either.value)
    info = {
        "name": "P(harm)",
        "both": both.to_json(),
        "either": either.to_json(),
        "method": "between what both judges call harmful and what either does; the value is the middle",
    }
    return Bound(value, both.lower, either.upper, level, {"sampling": sampling, "judge": gap}, None, info)


def _mean(hit: NDArray, length: NDArray) -> float | None:
    return float((hit / length).mean()) if len(hit) else None


def _span(b: Bound) -> str:
    return f"{100 * b.value:.3g} % [{100 * b.lower:.3g}, {100 * b.upper:.3g}]"
