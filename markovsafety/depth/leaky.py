"""A refusal that can be taken back: the leaky refusal.

On the trajectory a token is harmful with probability a, begins a refusal with r, ends the answer harmlessly with `stop`
and otherwise goes on. Inside a refusal a token takes it back with probability `leak`, ends the answer with `end` and
otherwise goes on. Then

    h = a / (a + stop + r_eff),     r_eff = r end / (end + leak),     h_R = leak / (leak + end) h,

so a leak lowers the refusal, and what counts is not how small it is but how small it is beside the end: with end = 0
every leak is fatal in the long run, however large r. "The refusal state is absorbing up to delta" says nothing unless
delta is much smaller than the rate at which refusals end.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..bound import Bound, check_level, clustered
from ..errors import InputError
from ..evidence.cells import is_rollouts
from ..outcomes import CODES
from .closed import interval_of
from .profile import whole
from .width import unit

__all__ = ["LeakyRefusal"]

RATES = ("a", "r", "leak", "end", "stop")
SEARCHED = 2**60  # no horizon is looked for beyond this many tokens


@dataclass(frozen=True)
class LeakyRefusal:
    """A trajectory and a refusal that may leak.

    Parameters
    ----------
    a, r : float
        Harm and the begin of a refusal per token of the trajectory.
    leak, end : float
        Back to the trajectory, and end of the answer, per token of a refusal.
    stop : float
        Harmless end per token of the trajectory. Each group sums to at most 1.
    intervals : dict of str to (lower, upper), optional
        Intervals of the rates by name; `fit` sets them.
    level : float
        Joint level of the intervals; 1 where there are none.

    Raises
    ------
    InputError
        If a number is no probability, a group sums to more than 1, or an interval does not contain its rate.

    Notes
    -----
    Our own. What it answers: arXiv 2502.00669 brings the refusal state "arbitrarily close to absorbing"; published
    leaks are the base models of Table 1 of arXiv 2406.05946 (1 to 16 % after a forced refusal) and the insertions of
    arXiv 2606.04168. As a chain: `markovsafety.toy.leak`.

    Examples
    --------
    Counts of tokens give the rates; the interval holds for all of them together. A leak without an end is fatal:

    >>> seen = dict(trajectory=2600, harm=130, refused=780, refusal=6000, leaked=120, ended=600)
    >>> refusal = ms.depth.LeakyRefusal.fit(seen)
    >>> print(refusal.harm())
    P(harm) = 0.167   95 % [0.122, 0.223]   because: sampling 0.05; judge, lumping, model,
        truncation, rounding not assessed
    >>> print(ms.depth.LeakyRefusal(a=0.05, r=0.3, leak=0.02, end=0).harm())
    P(harm) = 1   proven [1, 1] (vacuous: refusals leak and never end, so in the long run
        they protect from nothing)   because: sampling, judge, lumping, model, truncation,
        rounding not assessed
    """

    a: float
    r: float
    leak: float
    end: float
    stop: float = 0.0
    intervals: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    level: float = 1.0

    def __post_init__(self):
        for name in RATES:
            object.__setattr__(self, name, float(unit(getattr(self, name), name)))
        for names in (("a", "r", "stop"), ("leak", "end")):
            total = sum(getattr(self, n) for n in names)
            if total > 1 + 1e-12:
                raise InputError(
                    f"{' + '.join(names)} is {total:.17g}.",
                    cause="What one token may do excludes each other.",
                    next="Give rates that sum to at most 1.",
                )
        if not 0 < self.level <= 1:
            raise InputError(f"level is {self.level}.", cause="A level is a probability.", next="Pass 0 < level <= 1.")
        object.__setattr__(self, "intervals", {k: interval_of(self, k, v, RATES) for k, v in self.intervals.items()})

    @classmethod
    def fit(
        cls, source: Any, *, onset: Iterable[int] = (), back: Iterable[int] = (), level: float = 0.95
    ) -> LeakyRefusal:
        """Rates from counts or rollouts, with intervals.

        Parameters
        ----------
        source : mapping, or Rollouts
            Counts: keys "trajectory" and "refusal" (tokens spoken there), "harm", "refused", "stopped" (of those on
            the trajectory: harmful ones, begins of a refusal, harmless ends) and "leaked", "ended" (of those in a
            refusal). Each is a number, or an array with one entry per prompt. Rollouts: judged; what they say is read
            off their tokens.
        onset : token ids
            Tokens that begin a refusal; needed for Rollouts.
        back : token ids
            Tokens that take it back; needed for Rollouts. In a refusal a harmful token counts as one.
        level : float
            Level at which all five intervals hold together (Bonferroni), and with them what is computed from them.

        Returns
        -------
        LeakyRefusal

        Raises
        ------
        InputError
            If a count is missing or impossible, or rollouts come without the token ids.
        """
        counts = _read(source, list(onset), list(back)) if is_rollouts(source) else _checked(source)
        parts = {"a": ("harm", "trajectory"), "r": ("refused", "trajectory"), "stop": ("stopped", "trajectory")}
        parts |= {"leak": ("leaked", "refusal"), "end": ("ended", "refusal")}
        check_level(level)
        each = 1 - (1 - level) / len(parts)
        bounds = {name: clustered(counts[x], counts[n], each, name) for name, (x, n) in parts.items()}
        empty = [n for n in ("trajectory", "refusal") if counts[n].sum() == 0]
        if empty:
            raise InputError(
                f"No token was spoken {'on the' if empty[0] == 'trajectory' else 'in a'} {empty[0]}.",
                cause="Its rates cannot be known from these counts.",
                next="Count more answers, or force a refusal and count what follows.",
            )
        values = {name: float(b.value) for name, b in bounds.items()}
        ends = {name: (float(b.lower), float(b.upper)) for name, b in bounds.items()}
        return cls(**values, intervals=ends, level=level)

    @property
    def kept(self) -> float:
        """Share of refusals that end the answer, ``end / (end + leak)``; 1 for a refusal that neither leaks nor ends,
        since it lasts for ever."""
        return _kept(self.leak, self.end)

    @property
    def effective_refusal(self) -> Bound:
        """``r end / (end + leak)``: the rate of a refusal without leak that is worth as much."""
        worst, best = self._corners()
        ends = [x["r"] * _kept(x["leak"], x["end"]) for x in (self._rates(), worst, best)]
        return self._bound(ends[0], min(ends), max(ends), "effective refusal")

    @property
    def vacuous(self) -> bool:
        """Whether the refusal protects nothing in the long run: it leaks, never ends, and harm is possible."""
        return self.end == 0 and self.leak > 0 and self.a > 0

    def harm(self) -> Bound:
        """Probability of harm from the trajectory, without a horizon."""
        worst, best = self._corners()
        ends = [_harm(**x) for x in (self._rates(), worst, best)]
        return self._bound(ends[0], min(ends), max(ends), "P(harm)")

    def from_refusal(self) -> Bound:
        """Probability of harm from the first token of a refusal on: ``leak / (leak + end)`` times `harm`."""
        worst, best = self._corners()
        ends = [(1 - _kept(x["leak"], x["end"])) * _harm(**x) for x in (self._rates(), worst, best)]
        return self._bound(ends[0], min(ends), max(ends), "P(harm | refusal)")

    def within(self, tokens: ArrayLike) -> NDArray[np.float64]:
        """Harm within n tokens from the trajectory, by whether a leak came first.

        Parameters
        ----------
        tokens : int or array of shape (m,)

        Returns
        -------
        array, shape (m, 2)
            Before any leak, after one.
        """
        return np.array([self._step(int(n)) for n in np.atleast_1d(whole(tokens, "tokens"))])

    def leaks_dominate(self) -> tuple[int | None, str]:
        """Smallest number of tokens within which harm after a leak is as likely as harm before any.

        Returns
        -------
        tokens : int or None
            None where leaks never dominate.
        reason : str
            Why they do not; empty otherwise.
        """
        first = self.a / (self.a + self.r + self.stop) if self.a else 0.0
        total = float(self.harm().value)
        if total - first < first or first == 0:
            share = (total - first) / total if total else 0.0
            return None, f"after leaks comes {share:.3g} of all harm at most, even without a horizon"
        high = 1
        while np.subtract(*self._step(high)) > 0:
            high *= 2
            if high > SEARCHED:
                return None, "only in the limit of unlimited length"
        low = high // 2
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if np.subtract(*self._step(middle)) <= 0 else (middle, high)
        return high, ""

    def _step(self, n: int) -> tuple[float, float]:
        """Harm within n tokens before and after the first leak, by a power of the matrix."""
        c, stay = max(1 - self.a - self.r - self.stop, 0.0), max(1 - self.leak - self.end, 0.0)
        P = np.zeros((6, 6))  # trajectory, refusal, both after a leak, harm before, harm after
        P[0, [0, 1, 4]] = c, self.r, self.a
        P[1, [1, 2]] = stay, self.leak
        P[2, [2, 3, 5]] = c, self.r, self.a
        P[3, [3, 2]] = stay, self.leak
        P[4, 4] = P[5, 5] = 1.0
        found = np.linalg.matrix_power(P, n)[0]
        return float(found[4]), float(found[5])

    def _rates(self) -> dict[str, float]:
        return {name: getattr(self, name) for name in RATES}

    def _corners(self) -> tuple[dict[str, float], dict[str, float]]:
        """The rates in the box of intervals with the most and the least harm: harm rises in a and leak, falls in the
        others."""
        box = {name: self.intervals.get(name, (getattr(self, name),) * 2) for name in RATES}
        worst = {name: box[name][1 if name in ("a", "leak") else 0] for name in RATES}
        best = {name: box[name][0 if name in ("a", "leak") else 1] for name in RATES}
        return worst, best

    def _bound(self, value: float, lower: float, upper: float, name: str) -> Bound:
        reasons = {"sampling" if self.level < 1 else "model": (upper - lower) / 2} if self.intervals else {}
        info = {"name": name, "method": "closed form"} | ({"note": VACUOUS} if self.vacuous else {})
        return Bound(value, min(lower, value), max(upper, value), self.level, reasons, None, info)


VACUOUS = "vacuous: refusals leak and never end, so in the long run they protect from nothing"
NEEDED = ("trajectory", "refusal", "harm", "refused", "stopped", "leaked", "ended")


def _kept(leak: float, end: float) -> float:
    return end / (end + leak) if leak > 0 else 1.0


def _harm(a: float, r: float, leak: float, end: float, stop: float) -> float:
    return a / (a + stop + r * _kept(leak, end)) if a > 0 else 0.0


def _checked(source: Any) -> dict[str, NDArray]:
    if not isinstance(source, Mapping) or not set(NEEDED) - {"stopped"} <= set(source) <= set(NEEDED):
        raise InputError(
            f"The source is {type(source).__name__} with {', '.join(map(str, source)) if source else 'nothing'}."
            if isinstance(source, Mapping)
            else f"The source is {type(source).__name__}.",
            cause=f"Counts are a mapping with {', '.join(NEEDED)}.",
            next="Pass such a mapping, or Rollouts with onset and back.",
        )
    counts = {name: np.atleast_1d(np.asarray(source.get(name, 0), dtype=np.float64)) for name in NEEDED}
    shape = np.broadcast_shapes(*(x.shape for x in counts.values()))
    counts = {name: np.broadcast_to(x, shape) for name, x in counts.items()}
    for part, whole_ in ((("harm", "refused", "stopped"), "trajectory"), (("leaked", "ended"), "refusal")):
        if (sum(counts[p] for p in part) > counts[whole_]).any():
            raise InputError(
                f"{' + '.join(part)} exceed {whole_}.",
                cause="They are among its tokens.",
                next="Check the counts.",
            )
    return counts


def _read(rolls: Any, onset: list[int], back: list[int]) -> dict[str, NDArray]:
    """Counts by prompt from rollouts: which of the sampled tokens up to the hit were spoken inside a refusal.

    Forced tokens set the state and are not counted.
    """
    if not onset or not back:
        raise InputError(
            "It was not said which tokens begin a refusal and which take it back.",
            cause="Rollouts are judged as a whole; where inside them a refusal begins is in their tokens.",
            next="Pass onset=[ids] and back=[ids].",
        )
    offsets, prefill = np.asarray(rolls.offsets), np.asarray(rolls.prefill)
    lengths = np.diff(offsets)
    row = np.repeat(np.arange(len(lengths)), lengths)
    at = np.arange(len(row)) - offsets[:-1][row]
    hit, outcome = np.asarray(rolls.hit), np.asarray(rolls.outcome)
    last = np.where(hit >= 0, hit, lengths - 1)
    used = (at >= prefill[row]) & (at <= last[row])
    tokens = np.asarray(rolls.tokens)
    harmful = used & (at == last[row]) & (outcome[row] == CODES["harm"])
    opens, closes = np.isin(tokens, onset), np.isin(tokens, back) | harmful  # forced ones too: they set the state
    # Inside a refusal: the last mark before this token, within the answer, was an onset.
    mark = np.where(opens, 1, np.where(closes, 0, -1))
    place = np.maximum.accumulate(np.where(mark >= 0, np.arange(len(mark)), -1))
    before = np.append(-1, place[:-1]) if len(place) else place
    inside = (before >= offsets[:-1][row]) & (mark[np.maximum(before, 0)] == 1)
    final = used & (at == last[row]) & np.isin(outcome[row], [CODES["refusal"], CODES["benign"]])
    prompts, p = np.unique(np.asarray(rolls.prompt_id), return_inverse=True)
    weight = np.asarray(rolls.columns.get("weight", np.ones(len(lengths))), dtype=np.float64)[row]

    def total(which: NDArray) -> NDArray:
        return np.bincount(p.reshape(-1)[row[which]], weight[which], len(prompts))

    free, held = used & ~inside, used & inside
    return {
        "trajectory": total(free),
        "refusal": total(held),
        "harm": total(free & harmful),
        "refused": total(free & opens),
        "stopped": total(free & final & ~opens),
        "leaked": total(held & closes),
        "ended": total(held & final & ~closes),
    }
