"""Walks: rollouts as the visits of a chain's states, one row per sampled token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from ..bound import Bound
from ..chains import Chain
from ..chains.counting import _asked, _ramp, _read
from ..chains.states import label_at
from ..outcomes import CODES, OUTCOMES

__all__ = ["Walks", "look_up", "renamed", "walks"]


@dataclass(frozen=True, eq=False)
class Walks:
    """Visits of n rollouts, m in all; those of one rollout follow each other.

    Parameters
    ----------
    row, at, state : int array, shape (m,)
        Rollout, tokens so far, and state of every visit.
    before : int array, shape (m,)
        State one token earlier, len(labels) where the answer had not begun.
    target : int array, shape (m,)
        Next state; len(labels) + 1 + outcome code at the end.
    token : int array, shape (m,)
        The token that was sampled; -1 where the limit cut the answer off.
    labels : list
        Label by state, as in chains.
    prompt, prefill, outcome : int array, shape (n,)
        `prompt` counts prompts from 0.
    category : str array, shape (n,)
    weight : array, shape (n,)
    limit : float
        Fewest tokens after which a rollout was cut off; infinite if none was.
    """

    row: NDArray
    at: NDArray
    state: NDArray
    before: NDArray
    target: NDArray
    token: NDArray
    labels: list[Any]
    prompt: NDArray
    prefill: NDArray
    outcome: NDArray
    category: NDArray
    weight: NDArray
    limit: float

    @property
    def size(self) -> int:
        """Number of states."""
        return len(self.labels)

    @property
    def prompts(self) -> int:
        """Number of prompts."""
        return int(self.prompt.max(initial=-1)) + 1

    @property
    def mass(self) -> NDArray:
        """Weight of every visit, shape (m,)."""
        return self.weight[self.row]

    @property
    def ended(self) -> NDArray:
        """Whether a visit is the last of its rollout, shape (m,)."""
        return self.target > self.size

    @property
    def harmed(self) -> NDArray:
        """Whether the next token is the harm, shape (m,)."""
        return self.target == self.size + 1 + CODES["harm"]

    @cached_property
    def rows(self) -> sp.csr_array:
        """Relative frequencies between states, shape (S, S)."""
        inner = ~self.ended
        counts = sp.coo_array((self.mass[inner], (self.state[inner], self.target[inner])), shape=(self.size,) * 2)
        scale = np.repeat(1 / self.visits, np.diff(counts.tocsr().indptr))
        result = sp.csr_array(counts)
        result.data = result.data * scale
        return result

    @cached_property
    def visits(self) -> NDArray:
        """Weighted visits, shape (S,); 1 where a state was only seen before the first visit of an answer."""
        found = np.bincount(self.state, self.mass, self.size)
        return np.where(found > 0, found, 1.0)

    def by_prompt(self, values: Any) -> Any:
        """Sums over the visits of every prompt; values of shape (m,) or (m, c)."""
        pick = sp.csr_array(
            (np.ones(len(self.row)), (self.prompt[self.row], np.arange(len(self.row)))), (self.prompts, len(self.row))
        )
        return pick @ values

    def after(self, h: NDArray, target: NDArray | None = None) -> NDArray:
        """A function of states at the next state (of every visit): 1 at harm, 0 at the other outcomes."""
        extended = np.concatenate([h, [0.0], np.eye(len(OUTCOMES))[CODES["harm"]]])
        return extended[self.target if target is None else target]


def renamed(labels: Sequence[Any]) -> list[Any]:
    """Labels as `count` writes them: what is called like an outcome gets "after " in front."""
    return [f"after {x}" if isinstance(x, str) and x in OUTCOMES else x for x in labels]


def walks(rolls: Any, states: Any) -> Walks:
    """The visits of judged rollouts.

    Parameters
    ----------
    rolls : Rollouts
    states : StateMap

    Returns
    -------
    Walks

    Raises
    ------
    InputError
        As `count`.
    """
    r = _read(rolls)
    lengths = np.where(r["stop"] < r["prefill"], 0, r["stop"] - r["prefill"] + 1)
    start = np.maximum(r["prefill"] - 1, 0)  # the state before the first visit is looked up as well
    seen = np.where(lengths > 0, r["stop"] + 1 - start, 0)
    row, at = _ramp(seen, start)
    codes, labels = label_at(states, r["tokens"], r["begin"][row], at, _asked(row, r, getattr(rolls, "columns", {})))
    codes = np.asarray(codes, dtype=np.int64)
    mine = np.flatnonzero(at >= r["prefill"][row])
    S, row, at = len(labels), row[mine], at[mine]
    last = np.append(row[1:] != row[:-1], True)[: len(row)]
    target = np.where(last, S + 1 + r["outcome"][row], np.append(codes[mine][1:], 0)[: len(row)])
    before = np.where(at > 0, codes[np.maximum(mine - 1, 0)], S)
    cut = r["outcome"] == CODES["truncated"]
    spoken = ~(last & cut[row])
    token = np.full(len(row), -1, dtype=np.int64)
    token[spoken] = r["tokens"][(r["begin"][row] + at)[spoken]]
    names = np.unique(r["prompt_id"], return_inverse=True)[1].reshape(-1)
    limit = float((r["stop"] - r["prefill"])[cut].min()) if cut.any() else np.inf
    return Walks(
        row, at, codes[mine], before, target, token, renamed(labels), names,
        r["prefill"], r["outcome"], r["category"], r["weight"], limit,
    )  # fmt: skip


def look_up(chain: Chain, h: Bound, labels: Sequence[Any], k: int = 0) -> NDArray:
    """Value, lower and upper end of h at states by label, shape (3, S); nan, 0 and 1 where the chain lacks one.

    Parameters
    ----------
    chain : Chain
    h : Bound
        By state (layered: by layer and state).
    labels : sequence
        As `renamed` gives them.
    k : int
        Tokens so far; only a layered chain asks.
    """
    here = np.array([h.value, h.lower, h.upper])
    here = here[:, min(k, chain.n_layers)] if chain.is_layered else here
    known = {label: i for i, label in enumerate(chain.states)}
    at = np.array([known.get(x, -1) for x in labels], dtype=np.int64)
    return np.where(at >= 0, here[:, np.maximum(at, 0)], np.array([[np.nan], [0.0], [1.0]]))
