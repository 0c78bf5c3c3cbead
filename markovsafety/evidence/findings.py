"""What a test of a chain's assumptions found, and the two statistics that the tests share.

Effects are differences of P(harm), clustered by prompt and simultaneous over everything that was looked at; whether
rows are alike at all is asked by Pearson's statistic under its exact conditional mean and variance, which holds its
level in tables as sparse as those of token counts are.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..bound import Bound, clustered, encode
from ..outcomes import CODES
from .paired import FEW

__all__ = ["CLUSTERS", "Alike", "Finding", "judged", "rows_alike", "simultaneous", "unseen_harm"]

CLUSTERS = 5
"""Prompts that a cell needs to be looked at: fewer have no variance to speak of."""
NOTHING = 1e-12
"""Effects and contributions below this are rounding."""


@dataclass(frozen=True, eq=False)
class Finding:
    """One assumption of a chain, put to the test.

    Parameters
    ----------
    name : str
        Which.
    verdict : {"within", "off", "cannot tell", "not tested"}
        Of the effect against the margin.
    text : str
        In a sentence.
    effect : Bound or None
        What the failure of the assumption does to P(harm): the largest one, with a simultaneous interval.
    p : float or None
        Against "it holds exactly"; with enough data every model fails this, so the effect decides.
    table : list of dict
        What was looked at.

    Examples
    --------
    One matrix for all prompts, though prompts differ:

    >>> from markovsafety.exercises import case
    >>> rolls = case().rolls  # 16 answers to each of 60 prompts, after 0 to 8 forced tokens
    >>> chain = ms.estimate(ms.count(rolls[rolls.prompt_id < 30], states=ms.Position()))
    >>> found: ms.evidence.Finding = ms.check(chain, rolls[rolls.prompt_id >= 30]).findings[3]
    >>> found
    prompt heterogeneity: off. Harm differs between prompts by 0.165 [0.129, 0.225] (standard
        deviation) beyond their states, p = 0.005; rows of 7 states between prompts: dispersion
        3.15, p = 1.1e-50.
    >>> print(found.effect)
    spread of P(harm) between prompts = 0.165   95 % [0.129, 0.225]
        because: sampling 0.048; judge, lumping, model, truncation, rounding not assessed
    """

    name: str
    verdict: str
    text: str
    effect: Bound | None = None
    p: float | None = None
    table: list[dict[str, Any]] = field(default_factory=list)

    def __str__(self) -> str:
        return f"{self.name}: {self.verdict}. {self.text}"

    __repr__ = __str__

    def to_json(self) -> dict[str, Any]:
        """Plain data: name, verdict, text, effect, p, table."""
        return {k: encode(getattr(self, k)) for k in ("name", "verdict", "text", "effect", "p", "table")}


def judged(effect: Bound, margin: float) -> str:
    """Verdict on an effect: an equivalence test, by inclusion of its interval in the margin."""
    return "within" if effect.upper <= margin else "off" if effect.lower > margin else "cannot tell"


def simultaneous(
    values: NDArray, sums: NDArray, level: float, name: str, least: NDArray | float = 0.0
) -> tuple[Bound, NDArray, float]:
    """The largest of C effects in size, by Student intervals over clusters with Bonferroni's correction.

    Parameters
    ----------
    values : array, shape (C,)
    sums : array, shape (K, C)
        What each cluster contributes to the error of each value; clusters that contribute nothing are not counted.
    level : float
    name : str
    least : array, shape (C,), or float
        Half-widths that no interval goes below: where events are too few, their variance cannot be seen.

    Returns
    -------
    effect : Bound
        Of the largest true size; the value is the largest estimate, which is biased upwards.
    halves : array, shape (C,)
        Half-widths of the simultaneous intervals.
    p : float
        Against all values being 0, corrected.
    """
    from scipy.special import stdtr, stdtrit

    sums = np.where(np.abs(sums) > NOTHING, sums, 0.0)
    members = (sums != 0).sum(axis=0)
    df = np.maximum(members - 1.0, 1.0)
    centred = np.where(sums != 0, sums - sums.sum(axis=0) / np.maximum(members, 1), 0.0)
    spread = np.sqrt(members / df * (centred**2).sum(axis=0))
    halves = np.maximum(stdtrit(df, 1 - (1 - level) / (2 * len(values))) * spread, least)
    size = np.where(np.abs(values) > NOTHING, np.abs(values), 0.0)
    with np.errstate(divide="ignore", invalid="ignore"):
        tails = 2 * stdtr(df, -np.where(size > least, size / spread, 0.0))
    upper, lower = float((size + halves).max()), float(np.maximum(size - halves, 0).max())
    effect = Bound(float(size.max()), lower, upper, level, {"sampling": (upper - lower) / 2}, None, {"name": name})
    return effect, halves, float(min(1.0, np.nanmin(tails) * len(values)))


@dataclass(frozen=True)
class Alike:
    """Whether rows are the same in all groups.

    Parameters
    ----------
    p : float
        By Pearson's statistic, summed over states, with its exact mean and variance given the margins.
    dispersion : float
        The statistic over its mean: 1 if all groups share their rows.
    g2, df : float
        Likelihood-ratio statistic, and its degrees of freedom on the observed support.
    states : int
        States that could tell.
    """

    p: float
    dispersion: float
    g2: float
    df: float
    states: int


def unseen_harm(w: Any, rollouts: NDArray, level: float) -> float:
    """What harm could be among some rollouts where fewer than 5 of them are harmful: the upper end of its rate, or 0.

    Parameters
    ----------
    w : Walks
    rollouts : bool array, shape (n,)
    level : float
    """
    weight = w.weight * rollouts
    events = np.bincount(w.prompt, weight * (w.outcome == CODES["harm"]), w.prompts)
    totals = np.bincount(w.prompt, weight, w.prompts)
    return clustered(events, totals, level).upper if events.sum() < FEW else 0.0


def rows_alike(state: NDArray, group: NDArray, target: NDArray) -> Alike:
    """Test that transitions out of each state go where they go with the same probabilities in all groups.

    Parameters
    ----------
    state, group, target : int array, shape (m,)
        One entry per transition.

    Returns
    -------
    Alike

    Notes
    -----
    Given both margins of a state's table (group by target), transitions are exchangeable. Mean and variance of
    Pearson's statistic are then known exactly (J. B. S. Haldane, Biometrika 31 (1940) 346); the sum over states is
    compared with a gamma law of the same two moments. The usual chi-squared law of the likelihood ratio assumes
    expected counts of five or more, which counts of tokens do not have.
    """
    from scipy.special import gammaincc

    if len(state) == 0:
        return Alike(1.0, 1.0, 0.0, 0.0, 0)
    pair, pairs = _joint(state, group)
    goal, goals = _joint(state, target)
    cells, count = np.unique(pair * (goal.max() + 1) + goal, return_counts=True)
    a, b = np.divmod(cells, goal.max() + 1)
    na, nb = np.bincount(pair), np.bincount(goal)
    owner_a, owner_b = pairs, goals  # state of every (state, group) and of every (state, target)
    S = int(state.max()) + 1
    n = np.bincount(state, minlength=S).astype(np.float64)
    share = lambda owner, sizes: (np.bincount(owner, minlength=S), np.bincount(owner, 1.0 / sizes, S))  # noqa: E731
    (r, over_r), (c, over_c) = share(owner_a, na), share(owner_b, nb)
    s = owner_a[a]
    x2 = np.bincount(s, count.astype(float) ** 2 / (na[a] * nb[b]), S) * n - n
    g2 = 2 * float((count * np.log(count * n[s] / (na[a] * nb[b]))).sum())
    df = float(((r - 1.0) * (c - 1.0))[n > 0].sum())
    use = (r > 1) & (c > 1) & (n > 3)
    if not use.any():
        return Alike(1.0, 1.0, g2, df, 0)
    n, r, c, over_r, over_c, x2 = (np.asarray(v, float)[use] for v in (n, r, c, over_r, over_c, x2))
    mean = n * (r - 1) * (c - 1) / (n - 1)
    first = (r - 1) * (n - r) / (n - 1), (c - 1) * (n - c) / (n - 1)
    second = (n * over_r - r**2) / (n - 2), (n * over_c - c**2) / (n - 2)
    variance = (
        2 * n / (n - 3) * (first[0] - second[0]) * (first[1] - second[1]) + n**2 / (n - 1) * second[0] * second[1]
    )
    mean, variance, total = float(mean.sum()), float(np.maximum(variance, 0).sum()), float(x2.sum())
    p = float(gammaincc(mean**2 / variance, total * mean / variance)) if variance > 0 else 1.0
    return Alike(p, total / mean, g2, df, int(use.sum()))


def _joint(state: NDArray, other: NDArray) -> tuple[NDArray, NDArray]:
    """Number of every (state, other), and the state of every number."""
    span = int(other.max(initial=0)) + 1
    keys, codes = np.unique(state.astype(np.int64) * span + other, return_inverse=True)
    return codes.reshape(-1), keys // span
