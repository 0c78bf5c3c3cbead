"""Cyclic symmetry: what averaging a chain over rotations of its positions does to harm, and what it does not.

Let the cyclic group shift n states round a cycle and leave the outcomes where they are. The *twirl* of a chain is the
mean of its rotated copies,

    P_bar = (1/n) sum_g Pi_g^T P Pi_g,

the nearest thing to training on every rotation of the data (the cyclic augmentation of arXiv 2502.00669; the theorems
of its body were not available to us, so what follows is our own). P_bar no longer tells the n states apart: from each
of them harm has the same probability ``a / (a + r)``, with a and r the mean probabilities per token of harm and of the
other ends. The mean of the n hitting probabilities of the rotated copies is another number, the plain mean of h over
the orbit, and it may be larger or smaller.

What is bought is variance, and less than it seems. Averaged rows have 1/n of the squared error if the truth is
symmetric. Harm from one start weighs the rows by its visits, and pooling n rows that are visited evenly anyway buys
nothing: its variance falls by `participation_ratio`, between 1/n and 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import scipy.sparse as sp
from numpy.typing import ArrayLike, NDArray

from ..bound import Bound, clopper_pearson
from ..brief import brief
from ..chains import Chain
from ..chains.checks import as_indices
from ..errors import InputError
from ..hitting import hitting_probability, visits
from .capacity import plain_chain, row_distance
from .profile import whole
from .width import unit

__all__ = [
    "HazardBudget",
    "Twirl",
    "hazard_budget",
    "participation_ratio",
    "twirl",
    "twirl_direction",
]


@dataclass(frozen=True, eq=False)
class Twirl:
    """A chain averaged over rotations.

    Parameters
    ----------
    before, chain : Chain
        As given, and the mean of its rotated copies; on a layered chain the layers are what is rotated.
    orbits : tuple of int arrays
        The states (layered: the layers) that the shift leads round, each in cyclic order.
    rates : dict of str to array, shape (orbits,)
        Mean probability per token, over an orbit, of stepping into each outcome. Empty on a layered chain.
    harm : Bound, shape (orbits,)
        Probability of the target under the averaged chain, the same from all states of an orbit; layered: from the
        start of each state, shape (n,).
    mean_harm : array, same shape
        The mean over the rotated copies of their probabilities.
    bias : array, shape (n,), layered (L, n)
        Total variation between the rows of both chains: what pooling gets wrong where the truth is not symmetric.
    quotient : Chain or None
        The chain of orbits; it gives `harm`. None if layered.

    Examples
    --------
    The mean rates decide, and here they are far safer than the mean of what the positions come to:

    >>> found = ms.depth.twirl(ms.toy.shallow(3))
    >>> print(type(found).__name__, {name: rate.round(4) for name, rate in found.rates.items()})
    Twirl {'harm': array([0.0275]), 'refusal': array([0.23])}
    >>> print(f"harm {found.harm.value[0]:.3f}, mean of h {found.mean_harm[0]:.3f}, rows off by {found.bias.max():.3f}")
    harm 0.107, mean of h 0.511, rows off by 0.728
    """

    before: Chain
    chain: Chain
    orbits: tuple[NDArray[np.int64], ...]
    rates: dict[str, NDArray[np.float64]]
    harm: Bound
    mean_harm: NDArray[np.float64]
    bias: NDArray[np.float64]
    quotient: Chain | None = field(default=None, repr=False)

    __repr__ = brief

    @property
    def gap(self) -> NDArray[np.float64]:
        """`harm` minus `mean_harm`: positive where the averaged chain is worse than the average of the chains."""
        return np.asarray(self.harm.value) - self.mean_harm


def twirl(chain: Chain, group: Any = None, target: Any = "harm") -> Twirl:
    """Average a chain over all rotations of its states, or a layered chain over all rotations of its layers.

    Parameters
    ----------
    chain : Chain
    group : sequence of states, or several of one length; optional
        The states in cyclic order, by index or label: the shift takes each to the next and the last to the first.
        Several sequences are shifted at once (positions that come with several labels). All states that are no outcome,
        in their order, if not given. Layered: numbers of layers.
    target : as in `hitting_probability`

    Returns
    -------
    Twirl

    Raises
    ------
    InputError
        If a state occurs twice, is an outcome or part of the target, or the sequences have different lengths.

    Notes
    -----
    Every rotated copy is the chain itself with other names, so the mean of its probabilities over the copies is the
    mean over the orbit. The averaged chain can be lumped to orbits, since a row and its rotations lead into an orbit
    equally often; with one orbit and nothing but ends beside it that gives ``a / (a + r)``.

    Examples
    --------
    Three aligned positions and what is behind them, averaged:

    >>> print(ms.depth.twirl(ms.toy.shallow(3)).harm[0])
    P(harm) = 0.106796   proven [0.106796, 0.106796]   because: rounding ...; sampling,
        judge, lumping, model, truncation not assessed
    """
    if chain.is_layered:
        return _twirled_layers(chain, group, target)
    n = chain.n_states
    orbits = _orbits(chain, group)
    moved = np.zeros(n, dtype=bool)
    moved[np.concatenate(orbits)] = True
    if (chain.mask(target) & moved).any():
        raise InputError(
            "The target moves under the shift.",
            cause="Harm has to stay what it is when positions are rotated.",
            next="Leave the target's states out of the group.",
        )
    size = len(orbits[0])
    shift = np.arange(n)
    for orbit in orbits:
        shift[orbit] = np.roll(orbit, -1)
    P = chain.P.tocoo()
    rows, columns, total = P.row.astype(np.int64), P.col.astype(np.int64), sp.csr_array((n, n))
    for _ in range(size):
        total = total + sp.coo_array((P.data / size, (rows, columns)), shape=(n, n)).tocsr()
        rows, columns = shift[rows], shift[columns]
    after = Chain(total, dict(chain.outcomes), chain.start, chain.states)
    quotient, member = _quotient(chain, orbits, moved)
    harm = hitting_probability(quotient, member[chain.mask(target)])[: len(orbits)]
    h = np.asarray(hitting_probability(plain_chain(chain), target, certify=False).value)
    rates = {
        name: np.array([chain.P[orbit][:, index].sum() / size for orbit in orbits])
        for name, index in chain.outcomes.items()
    }
    means = np.array([h[orbit].mean() for orbit in orbits])
    return Twirl(chain, after, tuple(orbits), rates, harm, means, row_distance(chain, after), quotient)


def _orbits(chain: Chain, group: Any) -> list[NDArray[np.int64]]:
    if group is None:
        found = [np.flatnonzero(~chain.outcome_mask)]
    else:
        items = list(group)
        nested = bool(items) and all(
            isinstance(x, (list, tuple, range, np.ndarray)) and not _known(chain, x) for x in items
        )
        found = [_one_by_one(chain, x) for x in (items if nested else [items])]
    sizes = {len(orbit) for orbit in found}
    states = np.concatenate(found) if found else np.zeros(0, dtype=np.int64)
    if len(sizes) != 1 or 0 in sizes or len(np.unique(states)) != len(states):
        raise InputError(
            f"The group has sequences of {sorted(sizes)} states, {len(states)} in all.",
            cause="A shift leads every state of a cycle to the next; cycles that turn together have one length.",
            next="Name every state once, in sequences of one length, at least one state in each.",
        )
    if chain.outcome_mask[states].any():
        i = int(states[chain.outcome_mask[states]][0])
        raise InputError(
            f"The group holds {chain._name(i)}, which belongs to an outcome.",
            cause="Outcomes stay where they are when positions are rotated.",
            next="Leave outcome states out of the group.",
        )
    return found


def _known(chain: Chain, x: Any) -> bool:
    try:
        return x in chain._lookup
    except (TypeError, ValueError):
        return False


def _one_by_one(chain: Chain, items: Sequence[Any]) -> NDArray[np.int64]:
    parts = [as_indices(x, chain.n_states, chain._lookup, "group") for x in items]
    return np.concatenate(parts).astype(np.int64) if parts else np.zeros(0, dtype=np.int64)


def _quotient(chain: Chain, orbits: Sequence[NDArray], moved: NDArray) -> tuple[Chain, NDArray[np.int64]]:
    """The chain of orbits, first the orbits and then the states that stay, and where every state went."""
    fixed = np.flatnonzero(~moved)
    member = np.empty(chain.n_states, dtype=np.int64)
    for i, orbit in enumerate(orbits):
        member[orbit] = i
    member[fixed] = len(orbits) + np.arange(len(fixed))
    m = len(orbits) + len(fixed)
    M = sp.csr_array((np.ones(chain.n_states), (np.arange(chain.n_states), member)), shape=(chain.n_states, m))
    sizes = np.bincount(member, minlength=m)
    Q = sp.diags_array(1.0 / sizes) @ (M.T @ chain.P @ M)
    outcomes = {name: member[index] for name, index in chain.outcomes.items()}
    labels = [*(("orbit", i) for i in range(len(orbits))), *(("state", chain.states[i]) for i in fixed)]
    return Chain(Q, outcomes, None if chain.start is None else chain.start @ M, labels), member


def _twirled_layers(chain: Chain, group: Any, target: Any) -> Twirl:
    L = chain.n_layers
    places = np.arange(L) if group is None else np.asarray(whole(group, "group")).ravel()
    if len(places) == 0 or len(np.unique(places)) != len(places) or places.max() >= L:
        raise InputError(
            f"The group is {group!r}.",
            cause=f"The layers are 0 .. {L - 1}, each at most once.",
            next="Name the layers to rotate.",
        )
    layers = list(chain.layers)
    mean = sum((layers[t] for t in places[1:]), layers[places[0]].copy()) * (1.0 / len(places))

    def put(new: Sequence[Any]) -> Chain:
        inside = dict(zip(places.tolist(), new))
        return Chain.layered(
            [inside.get(t, layers[t]) for t in range(L)], dict(chain.outcomes), chain.start, chain.states
        )

    after = put([mean] * len(places))
    copies = [put([layers[places[(i + g) % len(places)]] for i in range(len(places))]) for g in range(len(places))]
    first = [np.asarray(hitting_probability(c, target, certify=False).value)[0] for c in copies]
    harm = hitting_probability(after, target)
    return Twirl(chain, after, (places,), {}, harm[0], np.mean(first, axis=0), row_distance(chain, after))


def participation_ratio(chain: Chain, group: Any = None) -> float:
    """What is left of the variance of harm at the start when n symmetric rows are pooled: ``1 / (n sum w^2)``.

    Parameters
    ----------
    chain : Chain
        Homogeneous, with a start law.
    group : sequence of states, optional
        As in `twirl`, one cycle.

    Returns
    -------
    float
        From 1/n (one state has all the visits) to 1 (all are visited equally often: nothing is gained); w are the
        shares of the expected visits. ``1 / sum w^2`` is the number of states that the walk takes part in.

    Raises
    ------
    InputError
        If the chain is layered, has no start, never visits the group, or stays in it for ever.

    Notes
    -----
    Our own, to first order in the errors of the rows, for a truth that is symmetric and rows seen equally often. With
    N_s visits and one variance v for every row the plain estimate has ``sum N_s^2 v``; a pooled row has ``v / n`` and
    all rows err together: ``(sum N_s)^2 v / n``.

    Examples
    --------
    Four rows cut the variance of the rows to a quarter, that of harm to six tenths only:

    >>> print(f"{ms.depth.participation_ratio(ms.toy.shallow(3)):.3f}")
    0.595
    """
    orbits = [] if chain.is_layered else _orbits(chain, group)
    if len(orbits) != 1:
        raise InputError(
            f"The chain has {chain.n_layers} layers and the group {len(orbits)} cycles.",
            cause="The ratio compares the rows of one cycle of a homogeneous chain.",
            next="Pass a homogeneous chain and one sequence of states.",
        )
    N = np.asarray(visits(plain_chain(chain)).value)[orbits[0]]
    if not np.isfinite(N).all() or N.sum() == 0:
        raise InputError(
            f"The expected visits of the group add up to {N.sum():g}.",
            cause="Shares of visits need a walk that comes to the group and leaves it.",
            next="Check the start law and that the group's states can reach an outcome.",
        )
    w = N / N.sum()
    return float(1 / (len(w) * np.sum(w**2)))


@dataclass(frozen=True)
class HazardBudget:
    """What refusal hazard spread over positions lets through, by three readings of "the same budget".

    Parameters
    ----------
    concentrated : float or array
        Leak if all the hazard sits at the first position: ``1 - rho``, and 1 once that token is forced.
    fixed_sum : float or array
        The same *sum* of hazards over n positions: ``(1 - rho / n)^(n - k)``, never less than ``1 - rho`` at k = 0.
    fixed_product : float or array
        The same *chance to pass all of them*: ``(1 - rho)^((n - k) / n)``, exactly ``1 - rho`` at k = 0.
    extra_data : float or array
        The full hazard at every position, which takes n times the data: ``(1 - rho)^(n - k)``.

    Examples
    --------
    >>> ms.depth.hazard_budget(0.5, 10)
    HazardBudget(concentrated=0.5, fixed_sum=0.598..., fixed_product=...,
        extra_data=0.00097...)
    """

    concentrated: Any
    fixed_sum: Any
    fixed_product: Any
    extra_data: Any


def hazard_budget(rho: ArrayLike, positions: ArrayLike, forced: ArrayLike = 0) -> HazardBudget:
    """Spread a refusal of probability rho over n positions: what gets through, after k forced tokens.

    Parameters
    ----------
    rho : float or array
        Probability of refusing at the one position where all the hazard was, in [0, 1].
    positions : int or array
        Number n of positions, at least 1.
    forced : int or array
        Number k of forced tokens; their positions refuse no more.

    Returns
    -------
    HazardBudget
        Of the broadcast shape.

    Raises
    ------
    InputError
        If a number is out of range.

    Notes
    -----
    Our own. Without an attack, spreading a fixed sum only loses (the means' inequality), from ``1 - rho`` towards
    ``exp(-rho)``, and a fixed product changes nothing: what rotations gain there they gain by the data that they add.
    Under an attack any spreading gains, since hazard that is all in one place is gone with it.

    Examples
    --------
    After 0, 1 and 5 forced tokens, by three readings of the same budget:

    >>> found = ms.depth.hazard_budget(0.9, 10, forced=[0, 1, 5])
    >>> for leak in (found.concentrated, found.fixed_sum, found.fixed_product): print(leak.round(3))
    [0.1 1.  1. ]
    [0.389 0.428 0.624]
    [0.1   0.126 0.316]
    """
    p, n, k = np.broadcast_arrays(unit(rho, "rho"), whole(positions, "positions"), whole(forced, "forced"))
    if (n < 1).any():
        raise InputError("positions is 0.", cause="Hazard has to sit somewhere.", next="Pass whole numbers >= 1.")
    left = np.maximum(n - k, 0)

    def power(x: NDArray, exponent: NDArray) -> NDArray:
        """``(1 - x)^exponent``."""
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(exponent == 0, 1.0, np.exp(exponent * np.log1p(-x)))

    found = (np.where(k == 0, 1 - p, 1.0), power(p / n, left), power(p, left / n), power(p, left))
    return HazardBudget(*(float(x) if x.ndim == 0 else x for x in found))


def twirl_direction(
    trials: int = 2000, states: int = 5, concentration: float = 0.4, seed: int = 0, level: float = 0.95
) -> Bound:
    """How often the twirl of a random chain has *more* harm than the mean over the orbit.

    Parameters
    ----------
    trials : int
        Number of chains.
    states : int
        Transient states of each; harm and refusal come on top.
    concentration : float
        Rows are Dirichlet with this parameter.
    seed : int
    level : float

    Returns
    -------
    Bound
        The share, with a Clopper-Pearson interval. `info`: above, below, largest and smallest difference.

    Raises
    ------
    InputError
        A number outside its range.

    Notes
    -----
    Neither direction is a law: by this count (our own) averaging a chain is as good as a coin toss for harm.

    Examples
    --------
    Nearly every second of 400 random chains:

    >>> found = ms.depth.twirl_direction(trials=400)
    >>> print(found)
    share of chains worse when twirled = 0...   95 % [0.4..., 0.5...]   because: sampling
        0.05; judge, lumping, model, truncation, rounding not assessed
    """
    rng = np.random.default_rng(seed)
    n = int(states)
    if n < 1 or trials < 1 or concentration <= 0:
        raise InputError(
            f"trials={trials}, states={states}, concentration={concentration}.",
            cause="There must be chains with states, and a Dirichlet law has a positive parameter.",
            next="Pass positive numbers.",
        )
    rows = rng.dirichlet(np.full(n + 2, float(concentration)), size=(int(trials), n))
    h = np.linalg.solve(np.eye(n) - rows[:, :, :n], rows[:, :, n : n + 1])[..., 0].mean(axis=1)
    a, r = rows[:, :, n].mean(axis=1), rows[:, :, n + 1].mean(axis=1)
    gap = a / (a + r) - h
    above, below = int((gap > 1e-12).sum()), int((gap < -1e-12).sum())
    lower, upper = (float(x) for x in clopper_pearson(above, trials, level))
    info = {"name": "share of chains worse when twirled", "above": above, "below": below}
    info |= {"largest": float(gap.max()), "smallest": float(gap.min()), "method": "Clopper-Pearson"}
    return Bound(above / trials, lower, upper, level, {"sampling": (upper - lower) / 2}, None, info)
