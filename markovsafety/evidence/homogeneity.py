"""Homogeneity: are the rows the same early and late in the answer, and what would a change of them do to harm?"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .findings import CLUSTERS, Finding, judged, rows_alike, simultaneous, unseen_harm
from .walks import Walks

__all__ = ["drift", "homogeneity"]


def drift(w: Walks, h: NDArray, group: NDArray, size: NDArray) -> tuple[NDArray, NDArray]:
    """How much harm each group of visits brings beyond what rows shared by all groups would bring.

    Parameters
    ----------
    w : Walks
    h : array, shape (S,)
        Harm probability by state, or any other function.
    group : int array, shape (m,)
        Group of every visit.
    size : array, shape (groups,)
        Weighted number of rollouts that the sum of a group is divided by.

    Returns
    -------
    values : array, shape (groups,)
        In P(harm) per rollout.
    sums : array, shape (K, groups)
        What each prompt contributes to their error.

    Notes
    -----
    Along a rollout h of the next state minus h of this one adds up to the outcome minus h at the start, so each visit
    has its share in the misfit of a prediction, exactly. Of this share we take what is left when the mean of each state
    is removed: the rows' differences between groups and nothing else. If all groups have the same rows its mean is 0,
    for any h.
    """
    K, G = w.prompts, len(size)
    step = w.after(h)
    mean = np.bincount(w.state, w.mass * step, w.size) / w.visits
    share = np.zeros((w.size, G))
    np.add.at(share, (w.state, group), w.mass)
    share /= w.visits[:, None]
    rest = w.mass * (step - mean[w.state])
    values = np.bincount(group, rest, G) / size
    prompt = w.prompt[w.row]
    sums = np.bincount(prompt * G + group, rest, K * G).reshape(K, G)
    return values, (sums - w.by_prompt(rest[:, None] * share[w.state])) / size


def homogeneity(w: Walks, h: NDArray, *, bins: int = 3, margin: float = 0.05, level: float = 0.95) -> Finding:
    """Whether transitions out of a state depend on how many tokens were said before.

    Parameters
    ----------
    w : Walks
    h : array, shape (S,)
        Harm probability by state.
    bins : int
        Into how many stretches of positions, of about as many visits, the answers are cut.
    margin, level : float

    Returns
    -------
    Finding
        Its effect is the largest difference that one stretch makes to P(harm) of an answer, its p that of equal rows.
        Rows of its table: first, last (position), visits, difference (difference_lower, difference_upper).
    """
    if w.prompts < CLUSTERS or len(w.row) == 0:
        text = f"{w.prompts} prompt{'' if w.prompts == 1 else 's'} cannot tell; it takes {CLUSTERS}."
        return Finding("homogeneity over position", "not tested", text)
    cuts = np.unique(np.quantile(w.at, np.arange(1, bins) / bins, method="higher"))
    group = np.searchsorted(cuts, w.at, side="right")
    used, group = np.unique(group, return_inverse=True)
    group = group.reshape(-1)
    alike = rows_alike(w.state, group, w.target)
    if len(used) < 2 or alike.states == 0:
        text = "No state was visited both early and late."
        return Finding("homogeneity over position", "not tested", text)
    values, sums = drift(w, h, group, np.full(len(used), w.weight.sum()))
    least = unseen_harm(w, np.ones(len(w.weight), dtype=bool), level)
    effect, halves, _ = simultaneous(values, sums, level, "effect of position on P(harm)", least)
    table = [
        {
            "first": int(w.at[group == b].min()),
            "last": int(w.at[group == b].max()),
            "visits": float(w.mass[group == b].sum()),
            "difference": float(values[b]),
            "difference_lower": float(values[b] - halves[b]),
            "difference_upper": float(values[b] + halves[b]),
        }
        for b in range(len(used))
    ]
    top = table[int(np.abs(values).argmax())]
    text = (
        f"Tokens {top['first']} to {top['last']} bring {top['difference']:+.3f} harm per answer beyond rows that know "
        f"no position; largest effect {effect.value:.3f} [{effect.lower:.3f}, {effect.upper:.3f}]. Equal rows in "
        f"{alike.states} states: p = {alike.p:.2g}, dispersion {alike.dispersion:.2f}."
    )
    return Finding("homogeneity over position", judged(effect, margin), text, effect, alike.p, table)
