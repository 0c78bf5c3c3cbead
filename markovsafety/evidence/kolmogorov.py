"""Chapman and Kolmogorov: n steps of the chain against what happens within n tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from .findings import CLUSTERS, Finding, judged, simultaneous
from .walks import Walks

__all__ = ["STEPS", "chapman_kolmogorov"]

STEPS = (2, 5, 10)
EXPECTED = 10.0
"""Harms, and escapes from harm, that a cell must expect to be looked at."""


def chapman_kolmogorov(
    w: Walks, *, steps: Sequence[int] = STEPS, groups: int = 12, margin: float = 0.05, level: float = 0.95
) -> Finding:
    """Harm within n tokens after a visit, against what n multiplied steps of the same rollouts predict.

    Parameters
    ----------
    w : Walks
    steps : sequence of int
        n, at least 2: one step agrees by construction.
    groups : int
        How many states are looked at one by one, the most visited; all others are one group.
    margin, level : float

    Returns
    -------
    Finding
        Largest deviation over states and n. Rows of its table: state, n, visits, observed, predicted, difference
        (difference_lower, difference_upper).

    Notes
    -----
    For a chain P(X_{t+n} | X_t) is the n-th power of its matrix. We test the observable that matters, harm within n
    tokens, and not all entries of the power. The rows are those of the same rollouts, so that nothing but the states is
    on trial; that they are estimated is allowed for to first order: the error of the prediction is the sum over
    transitions of their share in it (the perturbation formula, term by term), added up by prompt together with the
    error of the observation. Visits so late that the token limit could have hidden their harm are left out.
    """
    if w.prompts < CLUSTERS:
        return _untested(f"{w.prompts} prompt{'' if w.prompts == 1 else 's'} cannot tell; it takes {CLUSTERS}.")
    hazard = np.bincount(w.state, w.mass * w.harmed, w.size) / w.visits
    f = [np.zeros(w.size)]
    for _ in range(max(steps)):
        f.append(hazard + w.rows @ f[-1])
    final = np.full(len(w.prompt), -1)
    final[w.row[w.ended]] = w.at[w.ended]
    away = np.where(w.outcome[w.row] == 0, final[w.row] - w.at + 1, np.iinfo(np.int64).max)  # tokens to the harm
    order = np.argsort(-np.bincount(w.state, w.mass, w.size), kind="stable")
    group = np.full(w.size, min(groups, w.size))
    group[order[:groups]] = np.arange(min(groups, w.size))
    moves = _moves(w)
    table, values, sums = [], [], []
    for n in steps:
        usable = w.at - w.prefill[w.row] + n <= w.limit
        cells, parts = _cells(w, f, n, usable, group, away, moves)
        for cell, part in zip(cells, parts.T):
            place = cell.pop("group")
            cell["state"] = "the others" if place == groups else w.labels[order[place]]
            table.append(cell)
            values.append(cell["difference"])
            sums.append(part)
    if not values:
        return _untested("No state was visited often enough, by enough prompts, with harm to come and not.")
    effect, halves, p = simultaneous(np.array(values), np.array(sums).T, level, "Chapman-Kolmogorov deviation")
    for row, half in zip(table, halves):
        row |= {"difference_lower": row["difference"] - half, "difference_upper": row["difference"] + half}
    top = table[int(np.abs(values).argmax())]
    text = (
        f"Harm within {top['n']} tokens after {top['state']}: observed {top['observed']:.3f}, predicted by "
        f"{top['n']} steps {top['predicted']:.3f}; largest of {len(table)} differences "
        f"{effect.value:.3f} [{effect.lower:.3f}, {effect.upper:.3f}], p = {p:.2g}."
    )
    return Finding("Chapman-Kolmogorov", judged(effect, margin), text, effect, p, table)


def _untested(text: str) -> Finding:
    return Finding("Chapman-Kolmogorov", "not tested", text)


def _moves(w: Walks) -> tuple[NDArray, NDArray, NDArray, NDArray]:
    """Prompt, state, next state and weight of all transitions, those that are alike added up."""
    span, prompt = w.size + 5, w.prompt[w.row]
    keys, where = np.unique((prompt * w.size + w.state) * span + w.target, return_inverse=True)
    weight = np.bincount(where.reshape(-1), w.mass, len(keys))
    pair, target = np.divmod(keys, span)
    return pair // w.size, pair % w.size, target, weight


def _cells(
    w: Walks,
    f: list[NDArray],
    n: int,
    usable: NDArray,
    group: NDArray,
    away: NDArray,
    moves: tuple[NDArray, NDArray, NDArray, NDArray],
) -> tuple[list[dict[str, Any]], NDArray]:
    """Observed against predicted by group, and what each prompt contributes to the difference, shape (K, C)."""
    use = np.flatnonzero(usable)
    G, g, mass = int(group.max()) + 1, group[w.state[use]], w.mass[use]
    total = np.bincount(g, mass, G)
    hit, guess = (away[use] <= n).astype(float), f[n][w.state[use]]
    expected = np.bincount(g, mass * guess, G)
    reach = np.unique(g * w.prompts + w.prompt[w.row[use]]) // w.prompts
    fine = (np.bincount(reach, minlength=G) >= CLUSTERS) & (np.minimum(expected, total - expected) >= EXPECTED)
    chosen = np.flatnonzero(fine)
    if not chosen.size:
        return [], np.zeros((w.prompts, 0))
    place = np.full(G, -1)
    place[chosen] = np.arange(len(chosen))
    mine = np.flatnonzero(place[g] >= 0)
    spread = sp.csr_array((mass[mine] / total[g[mine]], (use[mine], place[g[mine]])), (len(w.row), len(chosen)))
    residual = np.zeros(len(w.row))
    residual[use] = hit - guess
    own: Any = w.by_prompt(spread.multiply(residual[:, None]).tocsr())
    law = np.zeros((w.size, len(chosen)))  # where n - 1, n - 2 ... steps are still to be predicted
    np.add.at(law, (w.state[use[mine]], place[g[mine]]), mass[mine] / total[g[mine]])
    prompt, state, target, weight = moves
    error = np.zeros((len(prompt), len(chosen)))
    for i in range(n):
        drift = w.after(f[n - 1 - i], target) - f[n - i][state]
        error += (drift * weight / w.visits[state])[:, None] * law[state]
        law = w.rows.T @ law
    by_prompt = sp.csr_array((np.ones(len(prompt)), (prompt, np.arange(len(prompt)))), (w.prompts, len(prompt)))
    observed = np.bincount(g, mass * hit, G)
    cells = [
        {
            "group": int(j),
            "n": int(n),
            "visits": float(total[j]),
            "observed": float(observed[j] / total[j]),
            "predicted": float(expected[j] / total[j]),
            "difference": float((observed[j] - expected[j]) / total[j]),
        }
        for j in chosen
    ]
    return cells, own.toarray() - by_prompt @ error
