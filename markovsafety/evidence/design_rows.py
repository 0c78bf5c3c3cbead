"""What a pilot says about every start: what its rollouts cost, which rows they inform, and how much that matters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..bound import clustered
from ..chains import Chain
from ..errors import InputError
from ..hitting import hitting_probability, visits
from .branch_groups import checked
from .cells import cell, forced, tally_of

__all__ = ["Rows", "of_chain", "of_rollouts"]


@dataclass(frozen=True, eq=False)
class Rows:
    """A pilot as an allocation problem: goal g has variance ``sum over r of weight[g, r] / visits of row r``.

    Parameters
    ----------
    starts : list
        Depths or states that a rollout may start from.
    tokens : array, shape (starts,)
        Mean number of tokens of a rollout.
    visits : array, shape (starts, rows)
        Mean visits of every row by a rollout.
    weight : array, shape (goals, rows)
    value : array, shape (goals,)
        What the pilot estimates.
    own : array, shape (starts,)
        1 where a start is a goal itself.
    spent : float
        Tokens of the pilot.
    """

    goal: str
    source: str
    starts: list[Any]
    tokens: NDArray
    visits: NDArray
    weight: NDArray
    value: NDArray
    own: NDArray
    spent: float
    prompt_cost: float = 0.0
    ideal: Any = None
    notes: tuple[str, ...] = ()


def _goals(goal: Any, depths: list[int]) -> tuple[list[int], str]:
    if goal == "worst":
        return depths, "the largest P(harm) of all depths"
    k = 0 if goal == "start" else goal
    if isinstance(k, bool) or not isinstance(k, (int, np.integer)) or k not in depths:
        raise InputError(
            f"goal is {goal!r}.",
            cause=f"The pilot knows {forced(depths)}.",
            next='Pass "start", one of these depths, or "worst".',
        )
    return [int(k)], "P(harm)" if k == 0 else f"P(harm) after {forced([int(k)])}"


def of_rollouts(rolls: Any, goal: Any, starts: str) -> Rows:
    """Every depth is measured by its own rollouts: one row per depth."""
    checked(rolls, "pilot")
    if starts != "prefill":
        raise InputError(
            "Rollouts have no states to start from.",
            cause="States belong to a chain.",
            next="Pass count(rolls, states=...) or a chain as pilot.",
        )
    tally = tally_of(rolls)
    depths = np.unique(tally.prefill).tolist()
    asked, name = _goals(goal, depths)
    prefill = np.asarray(rolls.prefill)
    length = np.diff(np.asarray(rolls.offsets)) - prefill
    tokens = np.array([max(float(length[prefill == k].mean()), 1.0) for k in depths])
    cells = [cell(tally, k) for k in depths]
    rate = np.array([clustered(c.events, c.totals).value for c in cells])
    # Half an event more of either kind: where no harm was seen there is still a variance to plan for.
    plan = np.array([(c.events.sum() + 0.5) / (c.totals.sum() + 1) for c in cells])
    at = [depths.index(k) for k in asked]
    weight = np.zeros((len(asked), len(depths)))
    weight[np.arange(len(asked)), at] = (plan * (1 - plan))[at]
    own = np.zeros(len(depths))
    own[at] = 1.0
    columns = getattr(rolls, "columns", {})
    cost = 0.0
    if "prompt_tokens" in columns:
        cost = float(len(columns["prompt_tokens"].flat) / len(prefill))
    notes = () if len(asked) > 1 else ("rollouts of other depths say nothing of this one by themselves; a chain pools",)
    spent = float(length.sum())
    return Rows(name, "rollouts", depths, tokens, np.eye(len(depths)), weight, rate[at], own, spent, cost, None, notes)


def of_chain(chain: Chain, goal: Any, starts: str) -> Rows:
    """All starts inform the rows of the chain."""
    if chain.is_layered or chain.start is None:
        raise InputError(
            "The chain has one matrix per position." if chain.is_layered else "The chain has no start law.",
            cause="Rows are pooled over positions, and P(harm) is asked for at a start.",
            next="Pass a homogeneous chain with start=..., e.g. estimate(count(rolls)).",
        )
    laws = {0: np.asarray(chain.start)} | {int(k): np.asarray(v) for k, v in chain.entry.items()}
    depths = sorted(laws)
    asked, name = _goals(goal, depths)
    h = np.asarray(hitting_probability(chain, "harm", certify=False).value)
    N = np.asarray(visits(chain, np.stack([laws[k] for k in depths])).value)
    P = chain.P
    row = np.repeat(np.arange(chain.n_states), np.diff(P.indptr))
    hit = chain.mask("harm")
    sigma2 = np.where(hit, 0.0, np.bincount(row, P.data * (h[P.indices] - h[row]) ** 2, chain.n_states))
    going = ~hit & (P.diagonal() < 1)
    if not np.isfinite(N[:, going]).all():
        raise InputError(
            "Some rollouts of this chain never end.",
            cause="A set of states that is no outcome is never left.",
            next="Name it as an outcome.",
        )
    N = np.where(going, N, 0.0)
    tokens = np.maximum(N.sum(axis=1), 1e-9)
    at = [depths.index(k) for k in asked]
    weight = N[at] ** 2 * sigma2
    ideal = np.max((N[at] * np.sqrt(sigma2)).sum(axis=1) ** 2)
    value = np.array([float(laws[k] @ h) for k in asked])
    notes = ("forced tokens are not counted: only sampled ones cost", "relies on the chain: see check")
    spent = 0.0 if chain.evidence is None else float(chain.evidence.visits[going].sum())
    if starts == "states":
        some = np.flatnonzero(weight.any(axis=0)) if weight.any() else np.flatnonzero(N[at[0]] > 0)[:1]
        names, own = [chain.states[i] for i in some], N[at][:, some].max(axis=0)
        one = np.ones(len(some))
        return Rows(name, "chain", names, one, np.eye(len(some)), weight[:, some], value, own, spent, 0.0, ideal, notes)
    used = np.flatnonzero(weight.any(axis=0))
    per, weight = N[:, used], weight[:, used]
    if chain.evidence is not None:  # a measured start law is known from its own rollouts only
        spread = np.array([float(laws[k] @ (h - v) ** 2) for k, v in zip(asked, value)])
        extra, first = np.zeros((len(asked), len(asked))), np.zeros((len(depths), len(asked)))
        extra[np.arange(len(asked)), np.arange(len(asked))] = spread
        first[at, np.arange(len(asked))] = 1.0
        weight, per = np.hstack([weight, extra]), np.hstack([per, first])
    own = np.zeros(len(depths))
    own[at] = 1.0
    return Rows(name, "chain", depths, tokens, per, weight, value, own, spent, 0.0, ideal, notes)
