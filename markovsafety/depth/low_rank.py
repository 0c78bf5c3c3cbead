"""Capacity as rank: a model with r hidden dimensions has rows softmax(U V^T + c), and so can say r + 1 things.

The last layer of a language model turns a state of r numbers into log-probabilities by one matrix, so the rows of the
chain that it speaks form a matrix of rank r (plus a shared offset c) in the logarithm: the softmax bottleneck (Z. Yang,
Z. Dai, R. Salakhutdinov and W. W. Cohen, arXiv 1711.03953). `low_rank` fits such rows to a given chain,
`capacity_curve` does so over ranks and reports what is left of its safety: total variation, the N-TV certificate, the
true change of harm, and the operational safety depth.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import minimize
from scipy.special import log_softmax, logsumexp, xlogy

from ..brief import brief
from ..chains import Chain
from ..errors import InputError
from ..hitting import hitting_probability, visits
from .capacity import perturbation_bound, plain_chain, row_distance
from .profile import Depth, operational_depth, whole

__all__ = ["CapacityCurve", "LowRank", "capacity_curve", "low_rank"]

FLOOR = 1e-4  # stands in for a zero in the logarithms that the fit begins with
LARGEST = 2000


@dataclass(frozen=True, eq=False)
class LowRank:
    """A chain whose rows are softmax(U V^T + c).

    Parameters
    ----------
    chain : Chain
        The fitted rows; rows of outcomes as they were.
    rank : int
    kl : float
        Weighted mean of KL(row | fitted row), in nats: what was minimised.
    factors : tuple of arrays (U, V, c)
        Shapes (m, r), (k, r), (k,): m rows that move, k states that any of them leads to.
    rounds : int
        Iterations of the optimiser.

    Examples
    --------
    Two numbers a state say all about three aligned positions and what is behind them:

    >>> fit = ms.depth.low_rank(ms.toy.shallow(3), 2, rounds=400)
    >>> print(type(fit).__name__, [factor.shape for factor in fit.factors], f"{fit.kl:.2f} nats")
    LowRank [(4, 2), (5, 2), (5,)] 0.00 nats
    >>> print(f"{ms.hitting_probability(fit.chain, 'harm').at_start.value:.2f} for {ms.toy.prefilled_harm(3):.2f}")
    0.28 for 0.28
    """

    chain: Chain
    rank: int
    kl: float
    factors: tuple[NDArray[np.float64], ...]
    rounds: int

    __repr__ = brief


def low_rank(
    chain: Chain,
    rank: int,
    *,
    weights: Any = "uniform",
    rounds: int = 2000,
    seed: int = 0,
    begin: LowRank | None = None,
) -> LowRank:
    """Approximate the rows of a chain by a softmax of rank r.

    Parameters
    ----------
    chain : Chain
        Homogeneous.
    rank : int
        From 0 (all rows alike) on.
    weights : {"uniform", "visits"} or array of shape (n,)
        How much each row counts: all alike, as often as it is visited from the start, or as given. Rows of outcomes do
        not count.
    rounds : int
        Most iterations.
    seed : int
        Of the small noise that lets new columns leave zero.
    begin : LowRank, optional
        A fit of lower rank to begin with as well; the better end counts, so a curve over ranks never gets worse.

    Returns
    -------
    LowRank

    Raises
    ------
    InputError
        If the chain is layered or too large, or a weight is no weight.

    Notes
    -----
    Minimised is the weighted mean of KL(P_s | W_s), whose gradient by the logits is the weighted W - P, by scipy's
    L-BFGS-B, from a weighted singular value decomposition of the logarithms. The problem is not convex: the result is
    an upper bound on what the rank can do. Zeros of a row are reached in the limit only.

    Examples
    --------
    What rank 0 and rank 2 leave of a trajectory with three aligned positions:

    >>> for r in (0, 2): print(r, f"{ms.depth.low_rank(ms.toy.shallow(3), r, rounds=400).kl:.2f} nats")
    0 0.82 nats
    2 0.00 nats
    """
    r = int(whole(rank, "rank"))
    P, rows, columns = _table(chain)
    w = _weights(chain, weights, rows)
    begun = [_decomposed(P, w, r, seed)]
    if begin is not None and begin.rank <= r:
        begun.append(_padded(begin.factors, r, seed))
    fits = [_fit(P, w, x, rounds) for x in begun]
    kl, factors, used = min(fits, key=lambda f: f[0])
    U, V, c = factors
    dense = chain.P.toarray()
    fitted = np.zeros((len(rows), chain.n_states))
    fitted[:, columns] = np.exp(log_softmax(U @ V.T + c, axis=1))
    dense[rows] = fitted
    made = Chain(dense, dict(chain.outcomes), chain.start, chain.states, entry=dict(chain.entry))
    return LowRank(made, r, kl, factors, used)


def _table(chain: Chain) -> tuple[NDArray, NDArray, NDArray]:
    if chain.is_layered or chain.n_states > LARGEST:
        raise InputError(
            f"{chain!r}",
            cause=f"Rows of one matrix of at most {LARGEST} states are approximated together.",
            next="Pass a smaller homogeneous chain; a layered one unrolls into states of position x state.",
        )
    rows = np.flatnonzero(~chain.outcome_mask)
    dense = chain.P.toarray()[rows]
    columns = np.flatnonzero(dense.any(axis=0))
    return dense[:, columns], rows, columns


def _weights(chain: Chain, weights: Any, rows: NDArray) -> NDArray[np.float64]:
    if isinstance(weights, str) and weights == "visits":
        w = np.asarray(visits(plain_chain(chain)).value)[rows]
    elif isinstance(weights, str) and weights == "uniform":
        w = np.ones(len(rows))
    else:
        try:
            w = np.broadcast_to(np.asarray(weights, dtype=np.float64), (chain.n_states,))[rows]
        except (TypeError, ValueError):
            w = np.full(len(rows), np.nan)
    if not (np.isfinite(w).all() and (w >= 0).all() and w.sum() > 0):
        raise InputError(
            f"weights are {weights!r}.",
            cause='Every row that moves needs a finite weight, one of them positive: "uniform", "visits" or numbers.',
            next=f"Pass a word or an array of shape ({chain.n_states},).",
        )
    return w / w.sum()


def _decomposed(P: NDArray, w: NDArray, r: int, seed: int) -> tuple[NDArray, ...]:
    """Factors from the weighted singular values of the logarithms; noise beyond their number."""
    logs = np.log(np.maximum(P, FLOOR))
    logs -= logs.mean(axis=1, keepdims=True)
    c = w @ logs
    root = np.sqrt(np.maximum(w, w.max() * 1e-6))
    left, s, right = np.linalg.svd(root[:, None] * (logs - c), full_matrices=False)
    k = min(r, len(s))
    half = np.sqrt(s[:k])
    U, V = left[:, :k] / root[:, None] * half, right[:k].T * half
    return _padded((U, V, c), r, seed)


def _padded(factors: Sequence[NDArray], r: int, seed: int) -> tuple[NDArray, ...]:
    U, V, c = factors
    rng, more = np.random.default_rng(seed), r - U.shape[1]
    new = (np.hstack([x, 0.1 * rng.standard_normal((len(x), more))]) for x in (U, V))
    return (*new, c)


def _fit(P: NDArray, w: NDArray, begun: tuple[NDArray, ...], rounds: int) -> tuple[float, tuple[NDArray, ...], int]:
    U, V, c = begun
    m, k, r = len(U), len(V), U.shape[1]
    entropy = float(w @ xlogy(P, P).sum(axis=1))
    if r == 0:
        mean = w @ P
        with np.errstate(divide="ignore"):
            c = np.log(np.maximum(mean, 1e-300))
        return max(entropy - float(w @ xlogy(P, mean[None]).sum(axis=1)), 0.0), (U, V, c), 0

    def split(z: NDArray) -> tuple[NDArray, NDArray, NDArray]:
        return z[: m * r].reshape(m, r), z[m * r : (m + k) * r].reshape(k, r), z[(m + k) * r :]

    def loss(z: NDArray) -> tuple[float, NDArray]:
        U, V, c = split(z)
        logits = U @ V.T + c
        norm = np.asarray(logsumexp(logits, axis=1))
        G = np.exp(logits - norm[:, None])
        value = entropy - float(w @ ((P * logits).sum(axis=1) - norm))
        G = w[:, None] * (G - P)
        return value, np.concatenate([(G @ V).ravel(), (G.T @ U).ravel(), G.sum(axis=0)])

    z = np.concatenate([U.ravel(), V.ravel(), c])
    done = minimize(
        loss,
        z,
        jac=True,
        method="L-BFGS-B",
        options={"maxiter": rounds, "maxfun": 4 * rounds, "ftol": 1e-13, "gtol": 1e-9},
    )
    return max(float(done.fun), 0.0), split(np.asarray(done.x)), int(done.nit)


@dataclass(frozen=True, eq=False)
class CapacityCurve:
    """What is left of a chain's safety when its rows have rank r.

    Parameters
    ----------
    ranks : tuple of int
    distance : array, shape (R,)
        Largest total variation of a row.
    certificate : array, shape (R,)
        ``sum N TV`` at the start; 1 or more says nothing. It is about answers that nobody attacked: a small number may
        stand beside a profile that is wrong everywhere behind the first tokens, which are hardly visited.
    forced : array, shape (R, K)
        The same from the state laws after k forced tokens.
    change : array, shape (R,)
        Size of the true change of harm at the start; `worst` the largest from any state.
    worst : array, shape (R,)
    kl : array, shape (R,)
        Weighted mean of KL by row, in nats.
    depths : tuple of int
        Forced tokens k that were looked at; empty without state laws.
    harm : array, shape (R, K)
        h(k) of the approximations; `exact` of the chain, shape (K,).
    exact : array, shape (K,)
    eps : float or None
        Harm budget of the depths.
    reached : tuple of Depth
        Operational safety depth of each approximation; empty without state laws or a budget.
    fits : tuple of LowRank

    Examples
    --------
    Rank 0 is safe by accident, for it blurs all positions into one; with a tolerance it does not pass:

    >>> curve = ms.depth.capacity_curve(ms.toy.shallow(3), [0, 2], eps=0.45, rounds=400)
    >>> print(type(curve).__name__, [str(depth.value) for depth in curve.reached])
    CapacityCurve ['at least 3', '1']
    >>> curve.needed(), curve.needed(tolerance=0.05)
    ((0, ''), (2, ''))
    """

    ranks: tuple[int, ...]
    distance: NDArray[np.float64]
    certificate: NDArray[np.float64]
    forced: NDArray[np.float64]
    change: NDArray[np.float64]
    worst: NDArray[np.float64]
    kl: NDArray[np.float64]
    depths: tuple[int, ...]
    harm: NDArray[np.float64]
    exact: NDArray[np.float64]
    eps: float | None
    reached: tuple[Depth, ...]
    fits: tuple[LowRank, ...]

    __repr__ = brief

    def needed(self, depth: int | None = None, tolerance: float | None = None) -> tuple[int | None, str]:
        """Smallest rank from which on the operational safety depth reaches `depth`.

        Parameters
        ----------
        depth : int, optional
            That of the chain itself if not given.
        tolerance : float, optional
            Ask also that no h(k) is off by more. Without it a rank so low that it blurs all positions into one, and is
            safe or unsafe by accident, may pass.

        Returns
        -------
        rank : int or None
            Every higher rank that was fitted does it too.
        reason : str
            Why there is none.
        """
        if not self.reached or self.eps is None:
            return None, "impossible: no depth was measured (give the chain state laws after forced tokens, and eps)"
        own = operational_depth(self.depths, self.exact, self.eps, side="value")
        want = own.depth if depth is None else int(whole(depth, "depth"))
        if want is None:
            return None, f"impossible: the chain itself exceeds harm {self.eps:g} at depth {self.depths[0]}"
        good = [found.depth is not None and found.depth >= want for found in self.reached]
        if tolerance is not None:
            close = np.abs(self.harm - self.exact).max(axis=1) <= tolerance
            good = [bool(a and b) for a, b in zip(good, close)]
        if not good[-1]:
            within = "" if tolerance is None else f" with a profile right to {tolerance:g}"
            return (
                None,
                f"impossible: rank {self.ranks[-1]} does not reach depth {want} within harm {self.eps:g}{within}",
            )
        first = max((i + 1 for i, fine in enumerate(good) if not fine), default=0)
        return self.ranks[first], ""


def capacity_curve(
    chain: Chain,
    ranks: Sequence[int],
    target: Any = "harm",
    *,
    eps: float | None = None,
    entry: Mapping[int, ArrayLike] | None = None,
    weights: Any = "uniform",
    rounds: int = 2000,
    seed: int = 0,
) -> CapacityCurve:
    """Fit a chain by softmax rows of growing rank, and see what becomes of harm and of depth.

    Parameters
    ----------
    chain : Chain
        Homogeneous, with a start.
    ranks : sequence of int
    target : as in `hitting_probability`
    eps : float, optional
        Harm budget for the operational safety depth.
    entry : dict of int to law of shape (n,), optional
        State law after k forced tokens; ``chain.entry`` if not given.
    weights, rounds, seed
        As in `low_rank`. "visits" fits what an unattacked answer uses, which leaves deep positions to chance;
        "uniform" treats every prefix as one that may be forced.

    Returns
    -------
    CapacityCurve
        By rank in rising order. With n samples of every row on top, the change is at most
        ``sum N (TV_rank + TV_samples)``: `perturbation_bound` of the sum of both distances.

    Raises
    ------
    InputError
        If the chain has no start, is layered or too large, or there are no ranks.

    Examples
    --------
    True change of harm at the start, its certificate, and the largest change from any state, at ranks 0 and 2:

    >>> curve = ms.depth.capacity_curve(ms.toy.shallow(3), [0, 2], rounds=400)
    >>> for numbers in (curve.change, curve.certificate, curve.worst): print(numbers.round(2))
    [0.18 0.  ]
    [2.99 0.  ]
    [0.69 0.  ]
    """
    order = sorted({int(r) for r in np.atleast_1d(whole(list(ranks), "ranks"))})
    if not order or chain.start is None:
        raise InputError(
            "There are no ranks." if not order else "The chain has no start.",
            cause="The certificate adds up the visits from a start, for every rank.",
            next="Pass ranks and a chain with a start.",
        )
    bare = plain_chain(chain)
    laws = {int(k): np.asarray(v) for k, v in (chain.entry if entry is None else entry).items()}
    depths = tuple(sorted(laws))
    law = np.stack([laws[k] for k in depths]) if depths else np.zeros((0, chain.n_states))
    h = np.asarray(hitting_probability(bare, target).value)
    fits: list[LowRank] = []
    for r in order:
        fits.append(low_rank(bare, r, weights=weights, rounds=rounds, seed=seed, begin=fits[-1] if fits else None))
    found = [np.asarray(hitting_probability(f.chain, target).value) for f in fits]
    tv = [row_distance(bare, f.chain) for f in fits]
    plain = [perturbation_bound(bare, np.minimum(x, 1.0), target).plain for x in tv]
    harm = np.stack([law @ g for g in found])
    reached = () if eps is None or not depths else tuple(operational_depth(depths, x, eps, side="value") for x in harm)
    return CapacityCurve(
        ranks=tuple(order),
        distance=np.array([x.max() for x in tv]),
        certificate=np.array([bare.start @ x for x in plain]),
        forced=np.stack([law @ x for x in plain]),
        change=np.array([abs(bare.start @ (g - h)) for g in found]),
        worst=np.array([np.abs(g - h).max() for g in found]),
        kl=np.array([f.kl for f in fits]),
        depths=depths,
        harm=harm,
        exact=law @ h,
        eps=eps,
        reached=reached,
        fits=tuple(fits),
    )
