"""What an iterated update does to a chain, and to its harm: traces, limits, and when "almost absorbing" is empty.

Bias towards refusal takes mass from every other entry of a row in the same proportion. In the rows where an answer
decides whether to refuse, that lowers harm. In the row of refusal itself it slows leaving and changes nothing about
where the answer goes when it leaves: with leak l back to the trajectory and end e per token, the probability that a
refusal is ever taken back is ``l / (l + e)`` before and after, however close to absorbing the row has come. Refusal
that leaks is safe because l is small against e, not because l is small.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.sparse as sp
from numpy.typing import ArrayLike, NDArray

from ..bound import Bound
from ..brief import brief
from ..chains import Chain
from ..errors import InputError
from ..hitting import hitting_probability
from ..hitting.core import check_chain
from .schedules import ConstantSteps, counted, log_product
from .updates import (
    AdditiveBias,
    BiasMatrix,
    CrossEntropyFlow,
    Update,
    cross_entropy_path,
    sides_after,
    verdict_of,
)

__all__ = ["Absorption", "Trace", "absorbing_when", "trace", "updated"]


def updated(
    source: Chain | ArrayLike, update: Update | BiasMatrix, steps: float, *, rows: Any = None, to: Any = "refusal"
) -> Any:
    """A chain, or rows, after a number of updates; in closed form, not step by step.

    Parameters
    ----------
    source : Chain, or array of shape (n,) or (m, n)
        Rows that are no chain take a `BiasMatrix` of their own shape.
    update : BiasMatrix, or an update of one probability
        Of a layered chain every layer is updated; a `BiasMatrix` then holds one matrix for all or a sequence of one per
        layer. An update of one probability raises the mass of `to` in every row of `rows` and keeps the proportions of
        the rest; `CrossEntropyFlow` keeps what the gradient leaves (see `cross_entropy_path`).
    steps : int or inf
    rows : target, optional
        States whose rows are updated, as in `hitting_probability`; all that are no outcome if not given. Rows that are
        not named, refusal's own among them, do not move.
    to : target
        Refusal.

    Returns
    -------
    Chain or array
        The chain has the names and start of the source and no evidence.

    Raises
    ------
    InputError
        If the bias has another shape or negative entries, or the update needs to know more than it was given.

    Notes
    -----
    Our reconstruction of Algorithm 1 of 2502.00669; see `updates`.

    Examples
    --------
    The row behind three aligned positions (it, harm, refusal) after five updates:

    >>> bias = ms.depth.AdditiveBias(ms.depth.ConstantSteps(0.1))
    >>> chain = ms.depth.updated(ms.toy.shallow(3), bias, 5, rows=["tail"])
    >>> chain.P[[3]].toarray()[0, 3:].round(3)
    array([0.559, 0.05 , 0.391])
    """
    T = float(counted(steps))
    if not isinstance(source, Chain):
        return _rows_after(np.asarray(source, dtype=np.float64), update, T)
    return _after(source, update, T, rows, to, floor=0.0)


def _after(chain: Chain, update: Any, T: float, rows: Any, to: Any, floor: float) -> Chain:
    """`updated`; no row is left with less than a share `floor` of what it had off its bias."""
    if isinstance(update, BiasMatrix):
        biases = _biases(chain, update.matrix)
        new = [_biased(P, B, update.schedule, T, floor) for P, B in zip(chain.layers, biases)]
    else:
        chosen, aim = _chosen(chain, rows), chain.mask(to)
        new = [_raised(P, update, T, chosen, aim, floor) for P in chain.layers]
    P = new if chain.is_layered else new[0]
    return Chain(P, chain.outcomes, chain.start, chain.states, entry=dict(chain.entry), n_layers=chain.n_layers)


def _rows_after(rows: NDArray, update: Any, T: float) -> NDArray[np.float64]:
    if not isinstance(update, BiasMatrix):
        raise InputError(
            f"Rows were given with a {type(update).__name__}.",
            cause="Which entry of a row is refusal is known of a chain only.",
            next="Pass a BiasMatrix of the rows' shape, or use residual_after for one probability.",
        )
    B = np.asarray(update.matrix, dtype=np.float64)
    _check_bias(B, rows.shape)
    if not (rows >= 0).all() or (np.abs(rows.sum(axis=-1) - 1) > 1e-9).any():
        raise InputError("A row is no law.", cause="Rows are probabilities that sum to one.", next="Normalise them.")
    beta = B.sum(axis=-1, keepdims=True)
    log = -log_product(update.schedule, beta, T)
    return np.exp(log) * rows - np.expm1(log) * np.divide(B, beta, out=np.zeros_like(B), where=beta > 0)


def _check_bias(B: Any, shape: tuple[int, ...]) -> None:
    if B.shape != shape:
        raise InputError(
            f"The bias has shape {B.shape}, what it biases has shape {shape}.",
            cause="Bias is added entry by entry.",
            next="Give both one shape.",
        )
    data = B.data if sp.issparse(B) else B
    if not (np.isfinite(data).all() and (data >= 0).all()):
        raise InputError(
            "The bias has a negative entry.", cause="Bias adds probability mass.", next="Use entries >= 0."
        )


def _biases(chain: Chain, matrix: Any) -> list[sp.csr_array]:
    several = isinstance(matrix, (list, tuple)) or (not sp.issparse(matrix) and np.ndim(matrix) == 3)
    given = list(matrix) if several else [matrix] * len(chain.layers)
    if len(given) != len(chain.layers):
        raise InputError(
            f"There are {len(given)} bias matrices and {len(chain.layers)} layers.",
            cause="A sequence holds one matrix per layer.",
            next="Pass one matrix for all layers, or one for each.",
        )
    out = []
    for B in given:
        B = sp.csr_array(B, dtype=np.float64)
        _check_bias(B, (chain.n_states, chain.n_states))
        out.append(B)
    return out


def _biased(P: sp.csr_array, B: sp.csr_array, schedule: Any, T: float, floor: float) -> sp.csr_array:
    beta = np.asarray(B.sum(axis=1)).ravel()
    log = -log_product(schedule, beta, T)
    if floor > 0:  # in the order in which the rows go there
        log = np.maximum(log, math.log(floor) * np.maximum(beta / max(beta.max(), 1e-300), 0.2))
    share = np.divide(-np.expm1(log), beta, out=np.zeros_like(beta), where=beta > 0)
    return _scaled(P, np.exp(log)) + _scaled(B, share)


def _scaled(P: sp.csr_array, by: NDArray) -> sp.csr_array:
    return sp.csr_array((P.data * np.repeat(by, np.diff(P.indptr)), P.indices, P.indptr), shape=P.shape)


def _chosen(chain: Chain, rows: Any) -> NDArray[np.bool_]:
    return ~chain.outcome_mask if rows is None else chain.mask(rows)


def _raised(P: sp.csr_array, update: Update, T: float, chosen: NDArray, aim: NDArray, floor: float) -> sp.csr_array:
    """The chosen rows with their mass on `aim` raised."""
    if isinstance(update, AdditiveBias) and update.elsewhere > 0:
        raise InputError(
            "The bias that is not on refusal has no place in the rows.",
            cause="One number says how much of it there is, not where.",
            next="Pass a BiasMatrix, which says both.",
        )
    if isinstance(update, CrossEntropyFlow):
        return _flowed(P, update, T, chosen, aim)
    places, rows = np.flatnonzero(aim), np.flatnonzero(chosen)
    p, rest = _shares(P, aim)
    mass, left = sides_after(update, p, rest, T)
    left = np.maximum(left, floor * rest)
    with np.errstate(divide="ignore", invalid="ignore"):
        by_rest = np.where(chosen & (rest > 0), left / rest, 1.0)
        by_aim = np.where(chosen & (p > 0), mass / p, 1.0)
    row = np.repeat(np.arange(len(p)), np.diff(P.indptr))
    data = P.data * np.where(aim[P.indices], by_aim[row], by_rest[row])
    new = sp.csr_array((data, P.indices, P.indptr), shape=P.shape)
    fresh = rows[(p[rows] == 0) & (mass[rows] > 0)]  # rows that did not refuse before
    if len(fresh):
        i, j = np.repeat(fresh, len(places)), np.tile(places, len(fresh))
        new = new + sp.csr_array((mass[i] / len(places), (i, j)), shape=P.shape)
    return new


def _shares(P: sp.csr_array, aim: NDArray) -> tuple[NDArray, NDArray]:
    """Mass of every row on `aim` and off it."""
    return P @ aim.astype(np.float64), P @ (~aim).astype(np.float64)


def _flowed(P: sp.csr_array, update: CrossEntropyFlow, T: float, chosen: NDArray, aim: NDArray) -> sp.csr_array:
    if aim.sum() != 1 or not np.isfinite(T):
        raise InputError(
            f"{int(aim.sum())} states refuse, and {T:g} steps are asked for.",
            cause="A row is trained on one token, for a finite time.",
            next="Pass a single refusal state as `to` and a number of steps.",
        )
    (place,), new = np.flatnonzero(aim), P.tolil()
    for i in np.flatnonzero(chosen):
        on = P.indices[P.indptr[i] : P.indptr[i + 1]]
        if place in on and len(on) > 1:
            row = P.data[P.indptr[i] : P.indptr[i + 1]]
            new[i, on] = cross_entropy_path(row / row.sum(), int(np.flatnonzero(on == place)[0]), [update.rate * T])[0]
    return sp.csr_array(new)


@dataclass(frozen=True, eq=False)
class Trace:
    """A chain along its updates.

    Parameters
    ----------
    steps : tuple of int
        Numbers of updates at which it was looked at.
    residual : array, shape (len(steps), n); layered (len(steps), L, n)
        ``1 - p`` of every row, p its mass on refusal.
    harm : Bound, shape (len(steps), n); layered (len(steps), L + 1, n)
        Probability of harm from every state.
    at_start : Bound or None
        The same at the start law, shape (len(steps),).
    rows : bool array, shape (n,)
        Rows that the update moves.
    absorption : Absorption or None
        What all of it tends to; None for a cross-entropy flow.

    Examples
    --------
    >>> bias = ms.depth.AdditiveBias(ms.depth.ConstantSteps(0.1))
    >>> found = ms.depth.trace(ms.toy.leak(), bias, [0, 10, 50], rows=["trajectory"])
    >>> print(type(found).__name__, found.at_start.value.round(4), found.first(0.1))
    Trace [0.1667 0.0307 0.0005] 50
    """

    steps: tuple[int, ...]
    residual: NDArray
    harm: Bound
    at_start: Bound | None
    rows: NDArray
    absorption: Absorption | None

    __repr__ = brief

    def first(self, eps: float) -> int | None:
        """The first of `steps` at which every row that is updated has a residual of at most eps; None if none."""
        worst = self.residual[..., self.rows].reshape(len(self.steps), -1).max(axis=1, initial=0.0)
        good = np.flatnonzero(worst <= eps)
        return self.steps[good[0]] if len(good) else None


@dataclass(frozen=True, eq=False)
class Absorption:
    """Where a chain goes under an update without end, and what that does to harm.

    Parameters
    ----------
    limit : array, shape (n,); layered (L, n)
        What each row's mass on refusal tends to.
    absorbing : bool array of the same shape
        Where that is 1.
    harm_before, harm_limit : array, shape (n,) or (L + 1, n)
        Probability of harm before, and what it tends to.
    reasons : dict of str to list
        Why rows end where they do, and the labels of those rows.
    empty : bool
        Whether the row of refusal itself comes arbitrarily close to absorbing while the probability that a refusal
        ends in harm all the same stays above zero.

    Examples
    --------
    >>> bias = ms.depth.AdditiveBias(ms.depth.ConstantSteps(0.1))
    >>> found = ms.depth.absorbing_when(ms.toy.leak(), bias, rows=["trajectory"])
    >>> print(type(found).__name__, "-", found)
    Absorption - 1 of 4 rows tend to certain refusal
      the steps have an infinite sum and push towards refusal alone: trajectory
      a row without bias never moves: refusal
    """

    limit: NDArray
    absorbing: NDArray
    harm_before: NDArray
    harm_limit: NDArray
    reasons: dict[str, list[Any]]
    empty: bool

    def __str__(self) -> str:
        lines = [f"{int(self.absorbing.sum())} of {self.absorbing.size} rows tend to certain refusal"]
        for why, labels in self.reasons.items():
            shown = ", ".join(map(str, labels[:4])) + (f" and {len(labels) - 4} more" if len(labels) > 4 else "")
            lines.append(f"  {why}: {shown}")
        if self.empty:
            lines.append(
                "  refusal comes arbitrarily close to absorbing, and a refusal still ends in harm as often as it leaks "
                "rather than ends: bias slows both alike"
            )
        return "\n".join(lines)

    __repr__ = __str__


def absorbing_when(
    chain: Chain, update: Update | BiasMatrix, *, rows: Any = None, to: Any = "refusal", target: Any = "harm"
) -> Absorption:
    """Whether an update drives rows to certain refusal, why (not), and what harm tends to.

    Parameters
    ----------
    chain : Chain
    update, rows, to
        As in `updated`; not `CrossEntropyFlow` on rows, whose limit is 1 wherever refusal has any probability.
    target : as in `hitting_probability`

    Returns
    -------
    Absorption

    Raises
    ------
    InputError
        A cross-entropy flow on rows, or rows and biases that the chain does not have.

    Notes
    -----
    Harm's limit is not the harm of the limit chain: a row biased on itself alone leaves ever more rarely, but where it
    goes when it leaves never changes, and a chain without a token limit has the time. So `harm_limit` is computed with
    rows that still leave with 1e-200 of what they did; what is below 1e-20 then is called 0.

    Examples
    --------
    In the row of refusal itself bias changes nothing of harm:

    >>> bias = ms.depth.AdditiveBias(ms.depth.ConstantSteps(0.1))
    >>> found = ms.depth.absorbing_when(ms.toy.leak(), bias, rows=["refusal"])
    >>> found.harm_before[:2].round(3), found.harm_limit[:2].round(3)
    (array([0.167, 0.028]), array([0.167, 0.028]))
    """
    check_chain(chain)
    aim = chain.mask(to)
    if isinstance(update, CrossEntropyFlow):
        raise InputError(
            "The limit of a cross-entropy flow is not taken on a chain.",
            cause="It is 1 in every row that refuses at all, reached like 1 / t; the rows on the way need a time.",
            next="Use trace with finite steps, or verdict_of for one probability.",
        )
    last = updated(chain, update, math.inf, rows=rows, to=to)
    limit, rest = (np.array(x) for x in zip(*(_shares(P, aim) for P in last.layers)))
    before = np.asarray(hitting_probability(chain, target, certify=False).value)
    near = last if chain.is_layered else _after(chain, update, math.inf, rows, to, floor=1e-200)
    after = np.asarray(hitting_probability(near, target, certify=False).value)
    after = np.where(after < 1e-20, 0.0, after)
    reasons = _reasons(chain, update, rows, aim)
    biased = (
        (_biases(chain, update.matrix)[0].sum(axis=1) > 0) if isinstance(update, BiasMatrix) else _chosen(chain, rows)
    )
    close = (rest[0] == 0) & (_shares(chain.layers[0], aim)[1] > 0) & aim & np.asarray(biased).ravel()
    empty = not chain.is_layered and bool(((after > 0) & close).any())
    first = slice(None) if chain.is_layered else 0
    return Absorption(limit[first], (rest == 0)[first], before, after, reasons, empty)


def _reasons(chain: Chain, update: Any, rows: Any, aim: NDArray) -> dict[str, list[Any]]:
    """Why each row that refuses, or decides about refusal, ends where it does."""
    told: dict[str, list[Any]] = {}
    chosen, known = _chosen(chain, rows), {}
    biases: Any = _biases(chain, update.matrix) if isinstance(update, BiasMatrix) else [None] * len(chain.layers)
    for t, (P, B) in enumerate(zip(chain.layers, biases)):
        p, rest = _shares(P, aim)
        on, off = (chosen, ~chosen) if B is None else _shares(B, aim)
        for i in np.flatnonzero(~chain.outcome_mask | aim):
            kind = 1.0 if rest[i] == 0 else 0.0 if p[i] == 0 else 0.5, float(on[i]), float(off[i])
            if kind not in known:
                one: Any = AdditiveBias(update.schedule, *kind[1:]) if B is not None else update
                if B is None and not chosen[i]:
                    one = AdditiveBias(ConstantSteps(0.0), 0.0)
                known[kind] = verdict_of(one, kind[0]).reason
            label = chain.states[i]
            told.setdefault(known[kind], []).append((t, label) if chain.is_layered else label)
    return told


def trace(
    chain: Chain,
    update: Update | BiasMatrix,
    steps: Any,
    *,
    rows: Any = None,
    to: Any = "refusal",
    target: Any = "harm",
) -> Trace:
    """A chain along its updates: what each row keeps off refusal, and what that does to harm.

    Parameters
    ----------
    chain : Chain
    update, rows, to
        As in `updated`.
    steps : int or sequence of int
        Numbers of updates to look at; an int T means 0 .. T.
    target : as in `hitting_probability`

    Returns
    -------
    Trace

    Raises
    ------
    InputError
        As `updated`.

    Examples
    --------
    Harm from the start after 0, 10 and 100 updates, of the trajectory and of the refusal itself:

    >>> bias = ms.depth.AdditiveBias(ms.depth.ConstantSteps(0.1))
    >>> for row in ("trajectory", "refusal"):
    ...     print(row, ms.depth.trace(ms.toy.leak(), bias, [0, 10, 100], rows=[row]).at_start.value.round(3))
    trajectory [0.167 0.031 0.   ]
    refusal [0.167 0.167 0.167]
    """
    check_chain(chain)
    counts = counted(range(int(counted(steps)) + 1) if np.ndim(steps) == 0 and not isinstance(steps, range) else steps)
    if not np.isfinite(counts).all() or counts.size == 0:
        raise InputError(
            "A trace has finite steps.", cause="Its last row is not the limit.", next="Read .absorption for the limit."
        )
    aim, residual, harm = chain.mask(to), [], []
    for T in counts:
        now = updated(chain, update, float(T), rows=rows, to=to)
        left = [_shares(P, aim)[1] for P in now.layers]
        residual.append(left if chain.is_layered else left[0])
        harm.append(hitting_probability(now, target))
    biased = _chosen(chain, rows)
    if isinstance(update, BiasMatrix):
        biased = np.any([np.asarray(B.sum(axis=1)).ravel() > 0 for B in _biases(chain, update.matrix)], axis=0)
    final = (
        None if isinstance(update, CrossEntropyFlow) else absorbing_when(chain, update, rows=rows, to=to, target=target)
    )
    start = None if chain.start is None else _stacked([h.at_start for h in harm])
    return Trace(tuple(int(T) for T in counts), np.array(residual), _stacked(harm), start, biased, final)


def _stacked(bounds: list[Bound]) -> Bound:
    value, lower, upper = (np.array([getattr(b, side) for b in bounds]) for side in ("value", "lower", "upper"))
    rounding = {"rounding": (upper - lower) / 2}
    return Bound(value, lower, upper, bounds[0].level, rounding, None, {"name": bounds[0].info.get("name", "P(harm)")})
