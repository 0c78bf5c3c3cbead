"""What gets through an ensemble of given members: measured without bias on some prompts, predicted from others.

An ensemble of width m is a list of members with how many answers each gives. Measured: the share of all choices of m
answers, among those that were sampled, through which harm gets (unbiased for every prompt). Predicted: from what other
prompts say of one answer and of pairs of answers, through a law of how alike answers are.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import hypergeom

from ..depth.members import poisson_binomial
from ..depth.mixtures import at_least
from ..depth.rules import harmful_needed

__all__ = ["LAWS", "Ensemble", "Moments", "failures", "predict"]

LAWS = ("independent", "beta-binomial", "copula", "kinds", "kinds, beta-binomial", "kinds, pairs", "all moments")
"""What a prediction takes from the other prompts.

independent: each member's mean. beta-binomial, copula: the ensemble's mean and the correlation of a pair of its
answers. kinds: the mean of each member for each kind of prompt (category and marker), answers independent within a
kind. kinds, beta-binomial: the same, with a beta law and the correlation of pairs within kinds, members taken as equal.
kinds, pairs: what gets through is linear in every answer's own probability, so its mean over prompts is its value at
the means, plus the covariance of every pair times a second difference, plus higher moments; those are left out. all
moments: the unbiased measurement itself, so nothing but that the prompts are alike.
"""


@dataclass(frozen=True)
class Ensemble:
    """Who answers.

    Parameters
    ----------
    name : str
    kind : {"repeated", "mixed"}
    members : tuple of int
        Models in turn; an ensemble of width m asks the first m, from the beginning again where they end.
    """

    name: str
    kind: str
    members: tuple[int, ...]

    def asked(self, m: int) -> Counter[int]:
        """Answers of each model at width m."""
        return Counter(self.members[i % len(self.members)] for i in range(m))


def failures(x: NDArray, n: int, e: Ensemble, m: int, rules: tuple[str, ...]) -> NDArray:
    """Unbiased estimate of harm through m answers for every prompt.

    Parameters
    ----------
    x : int array, shape (models, prompts, depths)
        Harmful answers of n.
    n : int
    e : Ensemble
    m : int
        Width.
    rules : tuple of str

    Returns
    -------
    array, shape (rules, prompts, depths)
    """
    law = np.ones((*x.shape[1:], 1))
    for model, count in e.asked(m).items():
        j = np.arange(count + 1)
        table = hypergeom.pmf(j[None, :], n, np.arange(n + 1)[:, None], count)[x[model]]
        grown = np.zeros((*law.shape[:-1], law.shape[-1] + count))
        for i in range(count + 1):
            grown[..., i : i + law.shape[-1]] += law * table[..., i, None]
        law = grown
    return np.stack([law[..., int(harmful_needed(rule, m)) :].sum(axis=-1) for rule in rules])


@dataclass(frozen=True, eq=False)
class Moments:
    """First and second moments over prompts, within kinds of prompts.

    Parameters
    ----------
    weight : array, shape (kinds,)
        Share of the prompts that is of each kind.
    mean : array, shape (kinds, models, depths)
    pair : array, shape (kinds, models, models, depths)
        Probability that two different answers to one prompt, of these models, are both harmful.
    square : array, shape as pair
        Product of the means, freed of the bias that few prompts give it.
    """

    weight: NDArray
    mean: NDArray
    pair: NDArray
    square: NDArray

    @classmethod
    def of(cls, x: NDArray, n: int, kind: NDArray, weight: NDArray) -> Moments:
        """From counts of shape (models, prompts, depths), the kind of every prompt from 0 on, and the kinds' shares."""
        found = [_moments(x[:, kind == g], n) for g in range(len(weight))]
        return cls(weight, *(np.stack(parts) for parts in zip(*found)))

    @property
    def whole(self) -> Moments:
        """Of all prompts as one kind."""
        w = self.weight
        mean, pair = (np.einsum("g,g...->...", w, part) for part in (self.mean, self.pair))
        bias = np.einsum("g,g...->...", w * w, self.mean[:, :, None] * self.mean[:, None] - self.square)
        return Moments(np.ones(1), mean[None], pair[None], (mean[:, None] * mean[None] - bias)[None])


def _moments(x: NDArray, n: int) -> tuple[NDArray, NDArray, NDArray]:
    h, K = x / n, x.shape[1]
    mean = h.mean(axis=1)
    outer = mean[:, None] * mean[None]
    raw = np.einsum("rid,sid->rsd", h, h) / K
    pair, same = raw.copy(), np.arange(len(x))
    pair[same, same] = (x * (x - 1) / (n * (n - 1))).mean(axis=1)
    # The product of two prompts' rates, for two prompts that differ.
    return mean, pair, (K * outer - raw) / (K - 1)


def _of_ensemble(a: Moments, asked: Counter[int], m: int) -> tuple[NDArray, NDArray]:
    """Mean, and probability of a pair less the square of the mean, of an answer drawn at random; by kind and depth."""
    c = np.zeros(a.mean.shape[1])
    for model, count in asked.items():
        c[model] = count
    pairs = (c[:, None] * c[None] - np.diag(c)) / (m * (m - 1)) if m > 1 else np.outer(c, c)
    all_pairs = np.outer(c, c) / m**2
    mean = np.einsum("r,grd->gd", c / m, a.mean)
    excess = np.einsum("rs,grsd->gd", pairs, a.pair) - np.einsum("rs,grsd->gd", all_pairs, a.square)
    return mean, excess


def predict(law: str, a: Moments, e: Ensemble, m: int, rules: tuple[str, ...], direct: NDArray) -> NDArray:
    """Harm through an ensemble, shape (rules, depths).

    Parameters
    ----------
    law : str
        One of `LAWS`.
    a : Moments
    e, m, rules
    direct : array, shape (rules, depths)
        What was measured on the prompts that the prediction is made from.
    """
    if law == "all moments":
        return direct
    asked = e.asked(m)
    t = [int(harmful_needed(rule, m)) for rule in rules]
    if law in ("independent", "kinds"):
        by = a.whole if law == "independent" else a
        order = [model for model, count in asked.items() for _ in range(count)]
        tails = poisson_binomial(np.clip(np.moveaxis(by.mean[:, order], 1, -1), 0, 1))
        return np.stack([np.einsum("g,gd->d", by.weight, tails[..., k:].sum(axis=-1)) for k in t])
    if law == "kinds, pairs":
        return np.einsum("g,rgd->rd", a.weight, _second_order(a, asked, t))
    by = a if law.startswith("kinds") else a.whole
    mean, excess = _of_ensemble(by, asked, m)
    spread = mean * (1 - mean)
    if law.startswith("kinds"):  # one correlation within all kinds: a kind has few prompts
        total = np.einsum("g,gd->d", by.weight, excess), np.einsum("g,gd->d", by.weight, spread)
        rho = np.broadcast_to(
            np.divide(total[0], total[1], out=np.zeros_like(total[0]), where=total[1] > 0), mean.shape
        )
    else:
        rho = np.divide(excess, spread, out=np.zeros_like(spread), where=spread > 0)
    rho = np.clip(rho, 0.0, 1.0)
    model = "copula" if law == "copula" else "beta-binomial"
    return np.stack([np.einsum("g,gd->d", by.weight, at_least(mean, rho, m, k, model)) for k in t])


def _second_order(a: Moments, asked: Counter[int], t: list[int]) -> NDArray:
    """Value at the means plus covariances times second differences, shape (rules, kinds, depths)."""
    order = [model for model, count in asked.items() for _ in range(count)]
    mean = np.clip(np.moveaxis(a.mean[:, order], 1, -1), 0, 1)
    law = poisson_binomial(mean)
    out = np.stack([law[..., k:].sum(axis=-1) for k in t])
    counts = Counter((order[i], order[j]) for i in range(len(order)) for j in range(i + 1, len(order)))
    for (r, s), count in counts.items():
        i = order.index(r)
        j = order.index(s, i + 1)
        others = np.delete(mean, [i, j], axis=-1)
        rest = poisson_binomial(others) if others.shape[-1] else np.ones((*others.shape[:-1], 1))
        extra = count * (a.pair[:, r, s] - a.mean[:, r] * a.mean[:, s])  # the mean over the prompts at hand
        for row, k in zip(out, t):
            row += extra * (_at(rest, k - 2) - _at(rest, k - 1))
    return out


def _at(law: NDArray, j: int) -> NDArray | float:
    return law[..., j] if 0 <= j < law.shape[-1] else 0.0
