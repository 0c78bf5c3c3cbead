"""What an edit changes in the chain: two estimated chains on the same states, and which rows account for the change."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray
from scipy.sparse.linalg import splu

from ..bound import encode
from ..chains import Chain, count, estimate
from ..chains.counts import canonical
from ..errors import InputError, UntrustedError
from ..evidence.positions import by_position
from ..hitting import attribute, hitting_probability
from ..rollouts.rollouts import Rollouts

__all__ = ["ChainChange", "aligned", "chain_change", "identity_gap"]


@dataclass(frozen=True, eq=False)
class ChainChange:
    """Two chains and where they differ.

    Parameters
    ----------
    before, after : Chain
        As estimated, each with its counts.
    aligned : (Chain, Chain)
        The same on the states of both; see `aligned`.
    share : float64 array, shape (n,)
        What each state's row contributes to the change of P(harm) at the start; sums to it.
    positions : float64 array
        The same by number of tokens before the row is left; the last entry is everything from there on.
    gap : float
        Largest error of the comparison identity over the states (rounding); see `identity_gap`.

    Examples
    --------
    >>> harm, refuse = [21, 22], [21, 2]
    >>> before = ms.Rollouts.of([harm, harm, harm, refuse], prompt_id=range(4), outcome=[0, 0, 0, 1], hit=1)
    >>> after = ms.Rollouts.of([harm, refuse, refuse, refuse], prompt_id=range(4), outcome=[0, 1, 1, 1], hit=1)
    >>> found = ms.interventions.chain_change(before, after, ms.KGram(1))
    >>> found
    <ChainChange: P(harm) -0.5 at the start, from 1 rows; 6 and 6 states>
    >>> found.positions
    array([ 0. , -0.5,  0. ])
    """

    before: Chain
    after: Chain
    aligned: tuple[Chain, Chain]
    share: NDArray
    positions: NDArray
    gap: float

    def __repr__(self) -> str:
        sizes = f"{len(self.before.states)} and {len(self.after.states)} states"
        return (
            f"<ChainChange: P(harm) {self.change:+.3g} at the start, from {int((self.share != 0).sum())} rows; {sizes}>"
        )

    @property
    def change(self) -> float:
        """Of P(harm) at the start."""
        return float(self.share.sum())

    def rows(self, k: int = 8) -> list[dict[str, Any]]:
        """The rows that matter most: state, share of the change, and the move of the row that changed most.

        Parameters
        ----------
        k : int

        Returns
        -------
        list of dict
            Keys state, share; to, before, after: the probabilities of the next state `to` in both chains; start: the
            state's probability at the start in both, where it changed.
        """
        P, R = (c.P.tocsr() for c in self.aligned)
        states, out = self.aligned[0].states, []
        for i in np.argsort(-np.abs(self.share), kind="stable")[:k].tolist():
            if self.share[i] == 0:
                break
            moved = (R[[i]] - P[[i]]).tocsr()
            row: dict[str, Any] = {"state": states[i], "share": float(self.share[i])}
            if moved.nnz and np.abs(moved.data).max() > 0:
                j = int(moved.indices[np.abs(moved.data).argmax()])
                row |= {"to": states[j], "before": float(P[i, j]), "after": float(R[i, j])}
            start = [0.0 if c.start is None else float(c.start[i]) for c in self.aligned]
            row |= {"start": start} if start[0] != start[1] else {}
            out.append(row)
        return out

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        sizes = {"states": [len(self.before.states), len(self.after.states)], "identity": self.gap}
        return encode({"change": self.change, "rows": self.rows(20), "positions": self.positions, **sizes})


def chain_change(before: Rollouts, after: Rollouts, states: Any = None) -> ChainChange:
    """Estimate the chains of two sets of judged rollouts, and attribute the change of P(harm).

    Parameters
    ----------
    before, after : Rollouts
        Judged; without prefill, or with it (the start law is that of prefill 0).
    states : StateMap, optional
        ``KGram(2)`` by default.

    Returns
    -------
    ChainChange

    Raises
    ------
    UntrustedError
        In one chain some states never reach an outcome.

    Examples
    --------
    Of four answers that begin with token 21 three ended in harm; under an edit one does:

    >>> harm, refuse = [21, 22], [21, 2]
    >>> before = ms.Rollouts.of([harm, harm, harm, refuse], prompt_id=range(4), outcome=[0, 0, 0, 1], hit=1)
    >>> after = ms.Rollouts.of([harm, refuse, refuse, refuse], prompt_id=range(4), outcome=[0, 1, 1, 1], hit=1)
    >>> ms.interventions.chain_change(before, after, ms.KGram(1)).rows()
    [{'state': (21,), 'share': -0.5, 'to': 'harm', 'before': 0.75, 'after': 0.25}]
    """
    first, second = (estimate(count(rolls, states)) for rolls in (before, after))
    both = aligned(first, second)
    return ChainChange(first, second, both, attribute(*both, "harm"), by_position(*both), identity_gap(*both))


def aligned(before: Chain, after: Chain) -> tuple[Chain, Chain]:
    """The same two chains on the states of both.

    Parameters
    ----------
    before, after : Chain
        Of one state map, with the same outcomes.

    Returns
    -------
    (Chain, Chain)
        A state that only one of them knows has the row of that one in both: nobody saw it change. The other chain
        never comes there, so its probabilities at the start are what they were.

    Raises
    ------
    InputError
        Chains with layers, or other outcomes.

    Examples
    --------
    A model that is aligned at two positions, and one at three, on the positions of both; P(harm) is what it was:

    >>> before, after = ms.toy.shallow(2), ms.toy.shallow(3)
    >>> both = ms.interventions.aligned(before, after)
    >>> [chain.n_states for chain in (before, after, *both)]
    [5, 6, 6, 6]
    >>> [round(ms.hitting_probability(chain, "harm").at_start.value, 4) for chain in (before, both[0])]
    [0.3978, 0.3978]
    """
    ends = [[c.states[i] for i in np.flatnonzero(c.outcome_mask)] for c in (before, after)]
    if before.is_layered or after.is_layered or ends[0] != ends[1]:
        raise InputError(
            "the chains cannot be put on common states",
            cause=f"one has layers, or their outcomes differ: {ends[0]} and {ends[1]}",
            next="estimate both from rollouts, by one state map",
        )
    inner = canonical({s for c in (before, after) for s, end in zip(c.states, c.outcome_mask) if not end})
    labels = [*inner, *ends[0]]
    place = {label: i for i, label in enumerate(labels)}
    rows, known = [], []
    for chain in (before, after):
        at = np.array([place[s] for s in chain.states], dtype=np.int64)
        P = chain.P.tocoo()
        size = (len(labels), len(labels))
        rows.append(sp.csr_array(sp.coo_array((P.data, (at[P.coords[0]], at[P.coords[1]])), shape=size)))
        known.append(np.isin(np.arange(len(labels)), at))
    made = []
    for mine, chain in enumerate((before, after)):
        borrowed = sp.diags_array((known[1 - mine] & ~known[mine]).astype(np.float64))
        P = sp.csr_array(rows[mine] + borrowed @ rows[1 - mine])
        start = None if chain.start is None else np.zeros(len(labels))
        if start is not None:
            start[[place[s] for s in chain.states]] = chain.start
        outcomes = {
            name: [place[chain.states[i]] for i in np.atleast_1d(index)] for name, index in chain.outcomes.items()
        }
        made.append(Chain(P, outcomes, start, labels))
    return made[0], made[1]


def identity_gap(before: Chain, after: Chain, target: str = "harm") -> float:
    """How well the comparison identity holds, as a check of both chains and their solutions.

    Parameters
    ----------
    before, after : Chain
        On the same states.
    target : str
        An outcome.

    Returns
    -------
    float
        Largest ``|h' - h - (I - Q')^-1 [(Q' - Q) h + (r' - r)]|`` over the states, with Q the moves between states that
        are no outcome, r those into the target, h and h' the hitting probabilities.

    Raises
    ------
    UntrustedError
        I - Q' is singular: some states of a chain never reach an outcome.

    Examples
    --------
    What changed in the rows explains what changed in P(harm), but for rounding:

    >>> before, after = ms.toy.shallow(3), ms.toy.shallow(3, unaligned=(0.04, 0.06))
    >>> ms.interventions.identity_gap(before, after) < 1e-12
    True
    """
    for name, chain in (("first", before), ("second", after)):
        _ending(chain, name)
    free = ~before.outcome_mask
    hit = np.zeros(before.n_states, bool)
    hit[np.atleast_1d(np.asarray(before.outcomes[target]))] = True
    h, g = (np.asarray(hitting_probability(c, target, certify=False).value)[free] for c in (before, after))
    blocks = [(c.P.tocsr()[free][:, free], np.asarray(c.P.tocsr()[free][:, hit].sum(axis=1))) for c in (before, after)]
    (Q, r), (S, s) = blocks
    right = np.asarray((S - Q) @ h) + s.reshape(-1) - r.reshape(-1)
    solved = splu(sp.csc_array(sp.eye_array(len(h)) - S)).solve(right)
    return float(np.abs(g - h - solved).max(initial=0.0))


def _ending(chain: Chain, which: str) -> None:
    """Raise if there are states from which no outcome can be reached."""
    ends = chain.outcome_mask.copy()
    P = (chain.P.tocsr() > 0).astype(np.float64)
    while True:
        more = ends | (np.asarray(P @ ends.astype(np.float64)) > 0)
        if (more == ends).all():
            break
        ends = more
    stuck = np.flatnonzero(~ends)
    if len(stuck):
        raise UntrustedError(
            f"{len(stuck)} states of the {which} chain never reach an outcome, the first of them "
            f"{chain.states[stuck[0]]!r}: I - Q is singular",
            cause="the answers go round in circles there (a strong edit makes a model loop), and where the token limit "
            "cut them off was not counted",
            next='let cut-off answers end in the outcome "truncated", as count() does, and read its share',
            partial=[chain.states[i] for i in stuck.tolist()],
        )
