"""Hazards of rollouts by position, tokens since the forced prefix and category: cells, fit, and what follows from them.

Additive on the logit scale; every event has its own fit on those that are still at risk. Arrays only; `recovery` is the
public face.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray
from scipy.special import expit

from ..chains.matrices import shape_of
from ..outcomes import CODES

__all__ = ["EVENTS", "Design", "Effects", "Histories", "fit_effects", "harm_of", "histories"]

EVENTS = ("refusal", "harm", "end")  # in this order at every token: each among those without the ones before it
STEPS = 100  # Newton steps
HELD = 1e9  # precision of a prior that holds an effect at 0


@dataclass(frozen=True, eq=False)
class Histories:
    """What became of each rollout; every field has shape (n,).

    Parameters
    ----------
    prompt, category : int array
        Indices into the sorted prompts and categories.
    prefill : int array
    last : int array
        Index within the answer of its event, or of its last token where it was cut off.
    event : int array
        Index into `EVENTS`, -1 = cut off.
    harm : bool array
        Whether harm came of it in the end, after a refusal had begun included.
    weight : array
    """

    prompt: NDArray
    category: NDArray
    prefill: NDArray
    last: NDArray
    event: NDArray
    harm: NDArray
    weight: NDArray


def histories(rolls: Any, prompts: NDArray, categories: NDArray, onset: NDArray | None) -> Histories:
    """The history of every rollout; a refusal counts from its first onset token, or from its hit without any."""
    offsets, prefill = np.asarray(rolls.offsets), np.asarray(rolls.prefill).astype(np.int64)
    lengths, outcome, hit = np.diff(offsets), np.asarray(rolls.outcome), np.asarray(rolls.hit).astype(np.int64)
    last = np.where(hit >= 0, hit, lengths - 1)
    event = np.full(len(lengths), -1)
    for name, code in (("refusal", 0), ("harm", 1), ("benign", 2)):
        event[outcome == CODES[name]] = code
    if onset is not None:
        at = np.flatnonzero(np.isin(np.asarray(rolls.tokens), onset))
        row = np.searchsorted(offsets, at, side="right") - 1
        place = at - offsets[row]
        sampled = place >= prefill[row]
        first = np.full(len(lengths), np.iinfo(np.int64).max)
        np.minimum.at(first, row[sampled], place[sampled])
        begun = first <= last
        last, event = np.where(begun, first, last), np.where(begun, 0, event)
    return Histories(
        np.searchsorted(prompts, np.asarray(rolls.prompt_id)),
        np.searchsorted(categories, np.asarray(rolls.category, dtype=str)),
        prefill,
        last,
        event,
        outcome == CODES["harm"],
        np.asarray(rolls.columns.get("weight", np.ones(len(lengths))), dtype=np.float64),
    )


@dataclass(frozen=True)
class Design:
    """Which effects a token has.

    Parameters
    ----------
    last : int
        Positions from here on share an effect.
    memory : int
        Tokens since the forced prefix from here on share an effect; 0 = it has none.
    categories : int
        Number of categories; 0 = they have no effect.
    """

    last: int
    memory: int
    categories: int

    @property
    def size(self) -> int:
        """Number of effects."""
        return self.last + 1 + (self.memory + 1 if self.memory else 0) + self.categories

    @property
    def since(self) -> slice:
        """The effects of time since the prefix."""
        return slice(self.last + 1, self.last + 1 + (self.memory + 1 if self.memory else 0))

    def columns(self, position: NDArray, since: NDArray, category: NDArray) -> NDArray:
        """Effects of m tokens, shape (m, f): their indices."""
        found = [np.minimum(position, self.last)]
        base = self.last + 1
        if self.memory:
            found.append(base + np.minimum(since, self.memory))
            base += self.memory + 1
        if self.categories:
            found.append(base + category)
        return np.stack(found, axis=1)


@dataclass(frozen=True, eq=False)
class Effects:
    """A fitted model.

    Parameters
    ----------
    design : Design
    base : array, shape (4,)
        Logit around which the effects of each event lie; the last is the leak: that a refusal which begins at this
        token harms in the end.
    theta : array, shape (4, size)
        Effects.
    influence : array, shape (4, K + size, size)
        What each prompt contributes to them, and after the prompts, what the prior of each effect does: summed squares
        are the clustered variance, and what the prior may be wrong by.
    """

    design: Design
    base: NDArray
    theta: NDArray
    influence: NDArray

    def hazards(self, position: NDArray, since: NDArray, category: NDArray) -> NDArray:
        """Probability of each event at m tokens, given none of those before it in `EVENTS`, and of the leak, (4, m)."""
        columns = self.design.columns(position, since, category)
        return expit(self.base[:, None] + self.theta[:, columns].sum(axis=2))


def fit_effects(h: Histories, design: Design, n_prompts: int, prior: float) -> Effects:
    """Penalised maximum likelihood of all events and the leak, with the influence of every prompt.

    The leak has no effect of time since the prefix: once a refusal has begun, how the answer came there is forgotten,
    and the few leaks there are could not tell it from the position.
    """
    risk = h.last - h.prefill + 1
    row = np.repeat(np.arange(len(risk)), risk)
    since = np.arange(len(row)) - np.repeat(np.cumsum(risk) - risk, risk)
    final = since == risk[row] - 1
    event = np.where(final, h.event[row], -1)
    columns = design.columns(h.prefill[row] + since, since, h.category[row])
    key = columns @ (design.size ** np.arange(columns.shape[1], dtype=np.int64))
    _, first, cell = np.unique(key, return_index=True, return_inverse=True)
    cell = cell.reshape(-1)
    X = _indicators(columns[first], design.size)
    weight, prompt = h.weight[row], h.prompt[row]
    base, theta, influence = [], [], []
    alive = np.ones(len(row), dtype=bool)
    for code in range(len(EVENTS) + 1):
        if code < len(EVENTS):
            at_risk, happened = np.where(alive, weight, 0.0), event == code
            alive &= ~happened
        else:
            at_risk, happened = np.where(event == 0, weight, 0.0), h.harm[row]
        ridge = np.full(design.size, prior**-2.0)
        if code == len(EVENTS):
            ridge[design.since] = HELD
        seen = np.where(happened, at_risk, 0.0)
        n, y = (np.bincount(cell, w, len(first)) for w in (at_risk, seen))
        centre = float(np.log((y.sum() + 0.5) / (n.sum() - y.sum() + 0.5)))
        effects, H = _newton(X, n, y, centre, ridge)
        residual = seen - at_risk * expit(centre + X @ effects)[cell]
        score = np.zeros(n_prompts * design.size)
        for c in columns.T:
            score += np.bincount(prompt * design.size + c, residual, len(score))
        score = score.reshape(n_prompts, design.size)
        base.append(centre)
        theta.append(effects)
        # An effect drawn from its prior pulls the estimates by as much as a prompt whose score is that pull.
        influence.append(np.linalg.solve(H, np.concatenate([score, np.diag(np.sqrt(ridge))]).T).T)
    return Effects(design, np.array(base), np.array(theta), np.array(influence))


def _indicators(columns: NDArray, size: int) -> sp.csr_array:
    m, f = columns.shape
    return sp.csr_array((np.ones(m * f), columns.reshape(-1), np.arange(0, m * f + 1, f)), shape=(m, size))


def _newton(X: sp.csr_array, n: NDArray, y: NDArray, centre: float, ridge: NDArray) -> tuple[NDArray, NDArray]:
    """Effects and the negative second derivative at them; the likelihood is concave, steps are held to 2 logits."""
    theta = np.zeros(shape_of(X)[1])
    for _ in range(STEPS):
        p = expit(centre + X @ theta)
        H = _curvature(X, n * p * (1 - p), ridge)
        step = np.linalg.solve(H, X.T @ (y - n * p) - ridge * theta)
        size = float(np.abs(step).max())
        theta += step * min(1.0, 2.0 / max(size, 1e-300))
        if size < 1e-9:
            break
    p = expit(centre + X @ theta)
    return theta, _curvature(X, n * p * (1 - p), ridge)


def _curvature(X: sp.csr_array, w: NDArray, ridge: NDArray) -> NDArray[np.float64]:
    return (X.T @ sp.diags_array(w) @ X).toarray() + np.diag(ridge)


def harm_of(e: Effects, k: int, shares: NDArray, tokens: int) -> tuple[float, NDArray]:
    """P(harm) within `tokens` sampled ones after k forced ones, and what influences it, shape (K + 4 size,): every
    prompt by its data, and every effect by its prior.

    Parameters
    ----------
    e : Effects
    k : int
    shares : array, shape (C,)
        Share of each category.
    tokens : int
    """
    C = len(shares)
    since = np.arange(tokens)
    column = [e.design.columns(k + since, since, np.full(tokens, c)) for c in range(C)]
    r, a, b, leak = np.stack([e.hazards(k + since, since, np.full(tokens, c)) for c in range(C)], axis=1)
    h = np.zeros((C, tokens + 1))
    for t in range(tokens - 1, -1, -1):
        onward = a[:, t] + (1 - a[:, t]) * (1 - b[:, t]) * h[:, t + 1]
        h[:, t] = r[:, t] * leak[:, t] + (1 - r[:, t]) * onward
    passed = np.cumprod((1 - r) * (1 - a) * (1 - b), axis=1)
    alive = shares[:, None] * np.concatenate([np.ones((C, 1)), passed[:, :-1]], axis=1)
    after = h[:, 1:]
    slopes = (
        alive * (leak - (a + (1 - a) * (1 - b) * after)) * r * (1 - r),
        alive * (1 - r) * (1 - (1 - b) * after) * a * (1 - a),
        -alive * (1 - r) * (1 - a) * after * b * (1 - b),
        alive * r * leak * (1 - leak),
    )
    K = e.influence.shape[1] - e.design.size
    influence, priors = np.zeros(K), []
    flat = np.concatenate(column)
    for code, slope in enumerate(slopes):
        gradient = sum(np.bincount(c, slope.reshape(-1), e.design.size) for c in flat.T)
        by = e.influence[code] @ gradient
        influence = influence + by[:K]
        priors.append(by[K:])  # those of two events have nothing to do with each other
    return float(shares @ h[:, 0]), np.concatenate([influence, *priors])
