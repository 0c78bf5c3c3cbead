"""Heterogeneity: do prompts, and categories of prompts, share the rows of one chain, and what is pooling them worth?"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..bound import Bound
from ..chains import Chain, estimate
from ..errors import MarkovsafetyError
from ..hitting import hitting_probability
from .findings import CLUSTERS, Finding, judged, rows_alike, simultaneous, unseen_harm
from .homogeneity import drift
from .walks import Walks, look_up

__all__ = ["between_categories", "between_prompts", "stratified"]


def between_prompts(
    w: Walks, h: NDArray, *, margin: float = 0.05, level: float = 0.95, shuffles: int = 199, seed: int = 0
) -> Finding:
    """Whether prompts differ in harm beyond what the states say of them.

    Parameters
    ----------
    w : Walks
    h : array, shape (S,)
        Harm probability by state.
    margin, level : float
    shuffles : int
        Random exchanges of rollouts between prompts that p is counted from: its least value is 1 / (shuffles + 1).
    seed : int

    Returns
    -------
    Finding
        Its effect is the standard deviation, between prompts, of the probability of harm that the states do not
        explain. Its table has one row: spread (the same), correlation (of two rollouts of one prompt in it), dispersion
        (of rows between prompts; 1 if they share them), row_p (that they do) and p.

    Notes
    -----
    A rollout's unexplained part is the sum along it of what each step changes in h, less the mean of that change in its
    state. One-way analysis of variance of these parts by prompt gives the spread; p comes from exchanging rollouts that
    start in the same state, which is exact where prompts share all rows. The interval of the spread is the textbook's,
    from the chi-squared law of the variance between prompts, which takes the means of prompts for normal.
    """
    from scipy.special import chdtri

    name = "prompt heterogeneity"
    if w.prompts < CLUSTERS or len(w.row) == 0:
        text = f"{w.prompts} prompt{'' if w.prompts == 1 else 's'} cannot tell; it takes {CLUSTERS}."
        return Finding(name, "not tested", text)
    step = w.after(h)
    mean = np.bincount(w.state, w.mass * step, w.size) / w.visits
    unexplained = np.bincount(w.row, step - mean[w.state], len(w.prompt))
    begun = np.full(len(w.prompt), -1)
    first = np.append(True, w.row[1:] != w.row[:-1])[: len(w.row)]
    begun[w.row[first]] = w.state[first]
    rows = np.flatnonzero((begun >= 0) & (w.weight > 0))
    value, prompt, start = unexplained[rows], w.prompt[rows], begun[rows]
    size = np.bincount(prompt, minlength=w.prompts).astype(float)
    K, n = int((size > 0).sum()), len(rows)
    if n <= K:
        return Finding(name, "not tested", "No prompt has two rollouts.")

    def between(x: NDArray) -> float:
        return float((np.bincount(prompt, x, w.prompts)[size > 0] ** 2 / size[size > 0]).sum() - x.sum() ** 2 / n)

    own, total = between(value), float(((value - value.mean()) ** 2).sum())
    inside = (total - own) / (n - K)
    typical = (n - (size**2).sum() / n) / (K - 1)
    spreads = own / np.array([K - 1, *chdtri(K - 1.0, [(1 - level) / 2, (1 + level) / 2])])
    variance, low, high = np.maximum((spreads - inside) / typical, 0.0).tolist()
    rng, order = np.random.default_rng(seed), np.argsort(start, kind="stable")
    more = 0
    for _ in range(shuffles):
        mixed = np.empty(n)
        mixed[order] = value[np.argsort(start + rng.random(n))]  # at random among those of one start
        more += between(mixed) >= own
    p = (more + 1) / (shuffles + 1)
    alike = rows_alike(w.state, w.prompt[w.row], w.target)
    spread, lower, upper = (float(np.sqrt(x)) for x in (variance, low, high))
    upper = max(upper, spread, unseen_harm(w, np.ones(len(w.weight), dtype=bool), level))
    name_of = {"name": "spread of P(harm) between prompts"}
    effect = Bound(spread, lower, upper, level, {"sampling": (upper - lower) / 2}, None, name_of)
    share = variance / (variance + inside) if variance + inside > 0 else 0.0
    table = [{"spread": spread, "correlation": share, "dispersion": alike.dispersion, "row_p": alike.p, "p": p}]
    text = (
        f"Harm differs between prompts by {spread:.3f} [{lower:.3f}, {upper:.3f}] (standard deviation) beyond their "
        f"states, p = {p:.2g}; rows of {alike.states} states between prompts: dispersion {alike.dispersion:.2f}, "
        f"p = {alike.p:.2g}."
    )
    return Finding(name, judged(effect, margin), text, effect, p, table)


def between_categories(
    w: Walks, h: NDArray, *, margin: float = 0.05, level: float = 0.95, strata: list[dict[str, Any]] | None = None
) -> Finding:
    """Whether categories share their rows, and what pooling them does to the harm of each.

    Parameters
    ----------
    w : Walks
    h : array, shape (S,)
        Harm probability by state.
    margin, level : float
    strata : list of dict, optional
        Of `stratified`; appended to the table.

    Returns
    -------
    Finding
        Rows of its table: category, rollouts, difference (difference_lower, difference_upper): how far P(harm) of its
        answers lies above what rows shared by all categories give it.
    """
    name = "heterogeneity between categories"
    names, which = np.unique(w.category.astype(str), return_inverse=True)
    which = which.reshape(-1)
    if len(names) < 2:
        return Finding(name, "not tested", "There is one category.")
    prompts = np.array([len(np.unique(w.prompt[which == c])) for c in range(len(names))])
    if prompts.min() < CLUSTERS or len(w.row) == 0:
        few = names[prompts.argmin()]
        return Finding(name, "not tested", f"{few} has {prompts.min()} prompts; each category takes {CLUSTERS}.")
    group = which[w.row]
    alike = rows_alike(w.state, group, w.target)
    if alike.states == 0:
        return Finding(name, "within", "The categories share no states: each has a chain of its own.")
    size = np.bincount(which, w.weight, len(names))
    values, sums = drift(w, h, group, size)
    least = np.array([unseen_harm(w, which == c, level) for c in range(len(names))])
    effect, halves, _ = simultaneous(values, sums, level, "effect of category on P(harm)", least)
    table: list[dict[str, Any]] = [
        {
            "category": str(names[c]),
            "rollouts": float(size[c]),
            "difference": float(values[c]),
            "difference_lower": float(values[c] - halves[c]),
            "difference_upper": float(values[c] + halves[c]),
        }
        for c in range(len(names))
    ]
    top = table[int(np.abs(values).argmax())]
    text = (
        f"Harm of {top['category']} lies {top['difference']:+.3f} from what shared rows give; largest effect "
        f"{effect.value:.3f} [{effect.lower:.3f}, {effect.upper:.3f}]. Equal rows in {alike.states} states: "
        f"p = {alike.p:.2g}, dispersion {alike.dispersion:.2f}."
    )
    if strata:
        text += f" {_compared(strata)}"
    return Finding(name, judged(effect, margin), text, effect, alike.p, [*table, *(strata or [])])


def _compared(strata: list[dict[str, Any]]) -> str:
    pooled, own = (max(abs(r[k] - r["measured"]) for r in strata) for k in ("pooled", "stratified"))
    return (
        f"At the held-out prefixes the pooled chain is off by up to {pooled:.3f} in a category, chains of the single "
        f"categories by up to {own:.3f}."
    )


def stratified(chain: Chain, w: Walks, harm: Bound) -> list[dict[str, Any]]:
    """The pooled chain beside chains of single categories, at the held-out prefixes of each.

    Parameters
    ----------
    chain : Chain
        With counts; without them, or with one category, the answer is empty.
    w : Walks
        Held out.
    harm : Bound
        P(harm) of the pooled chain by state.

    Returns
    -------
    list of dict
        category, k, pooled, stratified (P(harm) predicted, over prefixes whose states both know), measured (of the same
        prefixes), unseen (share of prefixes left out).
    """
    counts = chain.counts
    if counts is None or chain.is_layered or len(counts.categories) < 2 or not hasattr(counts, "select"):
        return []
    pooled = look_up(chain, harm, w.labels)[0]
    begun = np.append(True, w.row[1:] != w.row[:-1])[: len(w.row)]
    table = []
    for category in sorted(set(w.category.astype(str).tolist()) & set(counts.categories)):
        try:
            own = estimate(counts.select(categories=category))
        except MarkovsafetyError:  # all of its rollouts were cut off, say
            continue
        h = look_up(own, hitting_probability(own, "harm", certify=False), w.labels)[0]
        mine = begun & (w.category[w.row].astype(str) == category)
        for k in np.unique(w.prefill[w.row[mine]]).tolist():
            visits = np.flatnonzero(mine & (w.prefill[w.row] == k))
            state, weight = w.state[visits], w.mass[visits]
            both = np.isfinite(pooled[state]) & np.isfinite(h[state])
            if k == 0 or not both.any():
                continue
            mean = lambda x, keep=both, weight=weight: float(np.average(x[keep], weights=weight[keep]))  # noqa: E731
            row = {"category": category, "k": int(k), "pooled": mean(pooled[state]), "stratified": mean(h[state])}
            row["measured"] = mean((w.outcome[w.row[visits]] == 0).astype(float))
            table.append(row | {"unseen": float(1 - weight[both].sum() / weight.sum())})
    return table
