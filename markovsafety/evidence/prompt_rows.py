"""Counts laid out by prompt along the stored entries of a chain, so that resampling prompts is one matrix product."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from ..bound import Bound, clopper_pearson, clustered, effective_size
from ..chains import Chain, Counts, estimate
from ..clusters import freedom, kish
from ..errors import InputError, UntrustedError
from ..hitting import hitting_probability
from ..hitting.core import Walk, walk
from ..hitting.intervals import recorded
from ..hitting.sensitivity import visits_before
from .paired import FEW, rare

__all__ = ["FEWEST", "PromptRows", "counts_of", "joined", "prompt_rows", "refuse_few"]

FEWEST = 10
"""Effective sample size below which no interval is returned without an error."""


@dataclass(frozen=True, eq=False)
class PromptRows:
    """A chain, and what every prompt contributed to its rows.

    Parameters
    ----------
    chain : Chain
        Gives the pattern; S transient states, then the four outcomes.
    counts : Counts
    table : csr array, shape (K, nnz)
        Weighted count of every stored entry of ``chain.P``, by prompt.
    entries : dict of int to csr array, shape (K, n)
        By number of forced tokens: weighted rollouts that entered in each state, by prompt.
    walk : Walk
    """

    chain: Chain
    counts: Counts
    table: Any
    entries: dict[int, sp.csr_array]
    walk: Walk

    @property
    def K(self) -> int:
        """Number of prompts."""
        return int(self.table.shape[0])

    @cached_property
    def row(self) -> NDArray[np.intp]:
        """Row of every stored entry, shape (nnz,)."""
        return np.repeat(np.arange(self.chain.n_states), np.diff(self.chain.P.indptr))

    @cached_property
    def total(self) -> NDArray[np.float64]:
        """Weighted count of every stored entry, shape (nnz,)."""
        return np.asarray(self.table.sum(axis=0)).ravel()

    @cached_property
    def visits(self) -> NDArray[np.float64]:
        """Weighted count of every row, shape (n,)."""
        return np.bincount(self.row, self.total, self.chain.n_states).astype(np.float64)

    @cached_property
    def h(self) -> NDArray[np.float64]:
        """Hitting probability of the chain, shape (n,)."""
        return np.asarray(hitting_probability(self.chain, self.walk.hit, certify=False).value)

    @cached_property
    def problem(self) -> Any:
        """The hitting problem of every chain of this pattern, a `hitting.device_batch.Batch`."""
        from ..hitting.device_batch import batch

        return batch(self.chain, self.walk.hit)

    def law(self, prefill: int) -> NDArray[np.float64]:
        """State law after this many forced tokens, shape (n,).

        Raises
        ------
        InputError
            If no rollout was forced that far.
        """
        if prefill not in self.entries:
            raise InputError(
                f"No rollout has {prefill!r} forced tokens.",
                cause=f"Measured are {', '.join(map(str, self.entries))}.",
                next="Pass one of these, or sample with this prefill.",
            )
        law = np.asarray(self.entries[prefill].sum(axis=0)).ravel()
        return law / law.sum()

    def gradient(self, prefill: int) -> tuple[float, NDArray, NDArray]:
        """P(hit) from a measured start, and its derivatives in the counts.

        Returns
        -------
        value : float
        by_entry : array, shape (nnz,)
            ``N_s / n_s (h_next - h_s)``: change of the value per additional count of a stored entry.
        by_start : array, shape (n,)
            ``(h_s - value) / rollouts``: per additional rollout that begins in a state.
        """
        law, h = self.law(prefill), self.h
        value = float(law @ h)
        N, live = visits_before(self.walk, law, h)
        rate = np.where(live, N, 0.0) / np.where(self.visits > 0, self.visits, 1.0)
        by_entry = rate[self.row] * (h[self.chain.P.indices] - h[self.row])
        return value, by_entry, (h - value) / self.entries[prefill].sum()

    def influence(self, prefill: int) -> NDArray[np.float64]:
        """What each prompt contributes to the linearised error of P(hit) from a measured start, shape (K,); sums to 0.

        Notes
        -----
        From complete rollouts that all begin in one state the terms of a rollout telescope to ``(hit - value) / n``:
        the variance between prompts is then that of the raw rate.
        """
        _, by_entry, by_start = self.gradient(prefill)
        return self.table @ by_entry + self.entries[prefill] @ by_start

    def independent(self, prefill: int) -> float:
        """Variance of P(hit) from a measured start if all transitions were independent, to first order.

        The derivatives have mean 0 over the row that they belong to, so sums of squares are variances:
        ``sum_s N_s^2 sigma_s^2 / n_s``, and that of the law of the start.
        """
        _, by_entry, by_start = self.gradient(prefill)
        return float(self.total @ by_entry**2 + np.asarray(self.entries[prefill].sum(axis=0)).ravel() @ by_start**2)

    def _events(self, prefill: int | None) -> tuple[NDArray, NDArray] | None:
        """Hits and rollouts of every prompt, each of shape (K,); None if rollouts do not record this target."""
        codes = recorded(self.walk)
        if codes is None:
            return None
        tally = self.counts.tally
        rows = np.full(len(tally), True) if prefill is None else tally.prefill == prefill
        ends = np.zeros((self.K, tally.outcomes.shape[1]))
        np.add.at(ends, tally.cluster[rows], tally.outcomes[rows])
        totals = ends.sum(axis=1)
        return np.minimum(ends[:, codes].sum(axis=1), totals), totals

    def raw(self, prefill: int, level: float) -> Bound | None:
        """The rollouts' own rate with its clustered interval; None if they do not record this target."""
        found = self._events(prefill)
        return None if found is None else clustered(*found, level)

    def size(self, prefill: int, level: float) -> dict[str, Any]:
        """How many rollouts, prompts, and independent trials stand behind a measured start.

        Returns
        -------
        dict
            prompts and rollouts with this prefill; effective_prompts (Kish: equal ones that average as well); seen
            (prompts with a hit or with a miss, whichever are fewer, whatever the prefill, for the rows pool them; or,
            if less, one plus the degrees of freedom that the kurtosis of the influences leaves); deff (variance by
            prompt over that of independent transitions, None where it cannot be seen); n_eff (as in
            `markovsafety.bound.clustered`, whose size it is where all rollouts begin in one state and end).
        """
        weight = np.asarray(self.entries[prefill].sum(axis=1)).ravel()
        n, K, even = float(weight.sum()), int((weight > 0).sum()), float(kish(weight / weight.max()))
        told: dict[str, Any] = {"prompts": K, "rollouts": n, "effective_prompts": even, "seen": even, "deff": None}
        found = self._events(None)
        if found is not None:
            hit, share = found[0] / weight.max(), found[1] / weight.max()
            told["seen"] = float(min(kish(np.where(hit > 0, share, 0)), kish(np.where(hit < share, share, 0))))
        value = float(self.law(prefill) @ self.h)
        if K < 2:
            return told | {"n_eff": n}
        alone = self.independent(prefill)
        if not 0 < value < 1 or alone <= 0:
            return told | {"n_eff": min(float(K), n)}
        trials, error = value * (1 - value) / alone, self.influence(prefill)
        between = even / max(even - 1, 1e-12) * float(error @ error)
        told["seen"] = float(min(told["seen"], 1 + freedom(error, self.K)))
        told["deff"] = between * max(trials - 1, 1.0) / (value * (1 - value))
        return told | {"n_eff": float(effective_size(trials, even, told["deff"], level, told["seen"]))}


def counts_of(source: Any) -> Counts:
    """The counts behind a source.

    Raises
    ------
    InputError
        If it has none, or its weights overflow.
    """
    counts = source if isinstance(source, Counts) else getattr(source, "counts", None)
    if not isinstance(counts, Counts):
        raise InputError(
            f"{type(source).__name__} remembers no counts.",
            cause="Sampling error by prompt needs the transitions of every prompt, which a chain's file lacks.",
            next="Pass count(rolls), or the chain that estimate(counts) returned.",
        )
    with np.errstate(over="ignore", invalid="ignore"):
        sums = [counts.tally.outcomes.sum(), counts.transitions.count.sum(), np.square(counts.tally.outcomes).sum()]
    if not np.isfinite(sums).all():
        raise InputError(
            "The weights of the rollouts overflow when they are added up.",
            cause=f"The largest count is {np.max(counts.transitions.count):.3g}.",
            next="Divide all weights by the largest one, or keep log-weights and use evidence.rare.weighted.",
        )
    return counts


def prompt_rows(source: Any, target: Any, method: str = "mle", prior: float | None = None) -> PromptRows:
    """Lay out counts along the entries of a chain estimated from them.

    Parameters
    ----------
    source : Counts, or Chain with counts
    target : as in `hitting_probability`
    method, prior
        As in `estimate`; the pattern has the entries with positive probability.
    """
    counts = counts_of(source)
    chain = estimate(counts, method, prior)
    n, K = chain.n_states, int(counts.tally.cluster.max()) + 1
    P, t, e = chain.P, counts.transitions, counts.entries
    assert t.target is not None
    key = np.repeat(np.arange(n), np.diff(P.indptr)) * n + P.indices
    place = np.searchsorted(key, t.source * n + t.target)
    cluster = counts.tally.cluster
    table = sp.csr_array(sp.coo_array((t.count, (cluster[t.group], place)), shape=(K, P.nnz)))
    entries = {}
    for k in counts.prefills:
        at = counts.tally.prefill[e.group] == k
        entries[k] = sp.csr_array(sp.coo_array((e.count[at], (cluster[e.group[at]], e.source[at])), shape=(K, n)))
    return PromptRows(chain, counts, table, entries, walk(chain, target))


def refuse_few(bound: Bound, told: dict[str, Any]) -> Bound:
    """The bound itself, or `UntrustedError` carrying it if fewer than `FEWEST` independent trials stand behind it."""
    # Ten prompts or more of which a few carry all the weight say no more than those few.
    carried = told["effective_prompts"] if told["prompts"] >= FEWEST else np.inf
    size = min(told["n_eff"], carried)
    if size >= FEWEST:
        return bound
    raise UntrustedError(
        f"The effective sample size is {size:.1f}, of {told['rollouts']:g} rollouts of {told['prompts']} prompts; "
        f"below {FEWEST} no interval can be trusted.",
        cause="A few weights carry the estimate."
        if carried < told["n_eff"]
        else "Rollouts of few prompts resemble each other.",
        next="Sample more prompts, or believe only the interval in `error.partial` as a rough guide.",
        partial=bound,
    )


def joined(rows: PromptRows, prefill: int, ends: tuple[float, float], level: float) -> tuple[float, float, str | None]:
    """Ends of an interval, and where the rollouts hold few events those of Clopper and Pearson too, with the reason.

    Returns
    -------
    lower, upper : float
    why : str or None
        What was joined, None where the ends are as given.
    """
    raw, value = rows.raw(prefill, level), float(rows.law(prefill) @ rows.h)
    if raw is None:
        size = rows.size(prefill, level)
        few = rare(value * size["rollouts"], size["rollouts"])
        lower, upper = clopper_pearson(min(max(value, 0.0), 1.0) * size["prompts"], size["prompts"], level)
        told = f"Clopper-Pearson at {size['prompts']} prompts: the rollouts do not record this target"
    else:
        few = rare(raw.info["events"], raw.info["total"]) or (raw.info["prompts"] > 1 and raw.info["seen"] < FEW)
        lower, upper = raw.lower, raw.upper
        told = f"{raw.info['method']} at {raw.info['n_eff']:.4g} trials: {raw.info['events']:g} of "
        told += f"{raw.info['total']:g} rollouts hit, on too few prompts, or too nearly all, to see how they vary"
    if not few:
        return *ends, None
    return min(ends[0], lower), max(ends[1], upper), told
