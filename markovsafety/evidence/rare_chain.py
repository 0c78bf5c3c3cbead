"""Rare events on an exact chain: a sampler that sees events of 1e-12 per token, and proposals tilted towards harm."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.sparse as sp
from numpy.typing import ArrayLike, NDArray

from ..chains import Chain
from ..errors import InputError, UntrustedError
from ..hitting.graph import reachable, reaching

__all__ = ["Jumps", "jumps", "missing_support", "sample_weighted", "scores_of", "tilt"]

MOST_JUMPS = 1_000_000
"""Changes of state after which a rollout counts as endless."""


@dataclass(frozen=True, eq=False)
class Jumps:
    """A chain as its changes of state, ready to be sampled; a layered one unrolled, state s at layer t as ``t n + s``.

    Whether a target is hit depends on the changes of state alone, so tokens that stay in a state are drawn as one
    geometric number, used to count tokens and for nothing else.

    Attributes
    ----------
    indptr, indices : int arrays
        Moves of every state, the least probable first, so that their cumulative sums keep the digits of small ones.
    cumulative : float array, shape (moves,)
        Of the probabilities given that the state changes; 1 at the end of each row.
    log_move : float array, shape (moves,)
        Their logarithms.
    rate : float array, shape (N,)
        Probability per token to change state.
    target, moving : bool array, shape (N,)
        Where the target is hit; where a rollout goes on (elsewhere the target is hit or out of reach).
    start : float array, shape (N,)
    score : float array, shape (N,)
        Level function; infinite on the target.
    """

    indptr: NDArray
    indices: NDArray
    cumulative: NDArray
    log_move: NDArray
    rate: NDArray
    target: NDArray
    moving: NDArray
    start: NDArray
    score: NDArray

    @property
    def n_states(self) -> int:
        """Number of states, layers unrolled."""
        return len(self.rate)

    def begin(self, n: int, replications: int, rng: np.random.Generator) -> NDArray[np.int64]:
        """States drawn from the start law, n for each replication."""
        where, size = np.flatnonzero(self.start), n * replications
        law = self.start[where] / self.start[where].sum()
        return where[rng.choice(len(where), size=size, p=law)] if len(where) > 1 else np.full(size, where[0])

    def take(self, particles: NDArray, index: NDArray) -> NDArray:
        """Some of the particles (their states)."""
        return particles[index]

    def run(self, particles: NDArray, level: float, rng: np.random.Generator) -> tuple[NDArray, NDArray, int]:
        """Move every particle until its score reaches `level` or nothing can happen any more.

        Returns
        -------
        hits : int array
            The particles that reached it, in their order.
        entered : int array
            Their states at that moment.
        tokens : int
            Sampled by all of them.
        """
        goal = self.target | (self.score >= level)
        state, tokens = particles.copy(), 0
        alive = np.flatnonzero(self.moving[state] & ~goal[state])
        for _ in range(MOST_JUMPS):
            if not alive.size:
                break
            here = state[alive]
            tokens += int(rng.geometric(self.rate[here]).sum())
            state[alive] = follow = self.indices[self._draw(here, rng)]
            alive = alive[self.moving[follow] & ~goal[follow]]
        else:
            raise _endless()
        hits = np.flatnonzero(goal[state])
        return hits, state[hits], tokens

    def peak(self, particles: NDArray, rng: np.random.Generator) -> tuple[NDArray, int]:
        """The highest score that each particle reaches before its end (infinite: the target), and the tokens."""
        state, best, tokens = particles.copy(), self.score[particles].copy(), 0
        alive = np.flatnonzero(self.moving[state] & ~self.target[state])
        for _ in range(MOST_JUMPS):
            if not alive.size:
                return best, tokens
            here = state[alive]
            tokens += int(rng.geometric(self.rate[here]).sum())
            state[alive] = follow = self.indices[self._draw(here, rng)]
            best[alive] = np.maximum(best[alive], self.score[follow])
            alive = alive[self.moving[follow] & ~self.target[follow]]
        raise _endless()

    def _draw(self, states: NDArray, rng: np.random.Generator) -> NDArray:
        """Position of one move per state: the first whose cumulative probability exceeds a float64 uniform."""
        u = rng.random(len(states))
        low, high = self.indptr[states], self.indptr[states + 1] - 1
        while (low < high).any():
            middle = (low + high) // 2
            right = (self.cumulative[middle] <= u) & (low < high)
            low, high = np.where(right, middle + 1, low), np.where(right, high, middle)
        return low


def jumps(chain: Chain, target: Any, score: ArrayLike | None = None) -> Jumps:
    """Prepare a chain for sampling.

    Parameters
    ----------
    chain : Chain
        With a start law.
    target : as in `hitting_probability`
    score : array, shape (n,), layered also (L + 1, n), optional
        Level function.

    Raises
    ------
    InputError
        No start law, an empty target, a score of another shape or with nan.
    """
    if not isinstance(chain, Chain):
        raise InputError(
            f"{type(chain).__name__} is no chain.",
            cause="The exact sampler draws from a transition matrix.",
            next="Pass a Chain; for a language model see evidence.rare.Prefixes.",
        )
    if chain.start is None:
        raise InputError(
            "The chain has no start law.", cause="A rollout begins somewhere.", next="Give the chain `start=`."
        )
    hit = chain.mask(target)
    if not hit.any():
        raise InputError(
            f"The target {target!r} has no states.",
            cause="Mass that is left after the last layer is no state that could be hit.",
            next="Name an outcome that has states.",
        )
    flat = chain.P if not chain.is_layered else _unrolled(chain)
    copies = chain.n_layers + 1 if chain.is_layered else 1
    hit, start = np.tile(hit, copies), np.concatenate([chain.start, np.zeros((copies - 1) * chain.n_states)])
    value = np.zeros(len(hit)) if score is None else scores_of(chain, score)
    return _prepared(flat, hit, start, np.where(hit, np.inf, value))


def scores_of(chain: Chain, score: ArrayLike) -> NDArray[np.float64]:
    """A level function as one number per state, layers unrolled.

    Raises
    ------
    InputError
        Another shape, or nan.
    """
    n, copies = chain.n_states, chain.n_layers + 1
    value = np.asarray(score, dtype=np.float64)
    fits = value.shape == (n,) or (chain.is_layered and value.shape == (copies, n))
    if not fits or np.isnan(value).any():
        raise InputError(
            f"The score has shape {value.shape}{' and holds nan' if fits else ''}.",
            cause=f"There is one number per state, shape {(n,)}" + (f" or {(copies, n)}." if chain.is_layered else "."),
            next="Pass e.g. hitting_probability(chain, target).value.",
        )
    return np.tile(value, copies) if chain.is_layered and value.ndim == 1 else value.ravel()


def _prepared(P: sp.csr_array, hit: NDArray, start: NDArray, score: NDArray) -> Jumps:
    n = len(hit)
    row = np.repeat(np.arange(n), np.diff(P.indptr))
    keep = (row != P.indices) & (P.data > 0)
    row, col, p = row[keep], P.indices[keep].astype(np.int64), P.data[keep]
    order = np.lexsort((col, p, row))
    row, col, p = row[order], col[order], p[order]
    rate = np.bincount(row, p, minlength=n)
    indptr = np.concatenate([[0], np.cumsum(np.bincount(row, minlength=n))])
    # Summed row by row: one running sum over all rows would cost the small entries their digits.
    cumulative = p / rate[row]
    for i in np.flatnonzero(np.diff(indptr) > 1):
        part = cumulative[indptr[i] : indptr[i + 1]]
        np.cumsum(part, out=part)
    filled = np.diff(indptr) > 0
    cumulative[indptr[1:][filled] - 1] = 1.0
    pattern = sp.csr_array((np.ones(len(col)), col, indptr), shape=(n, n))
    moving = reaching(pattern, hit, ~hit) & ~hit
    log_move = np.log(p / rate[row])
    return Jumps(indptr, col, cumulative, log_move, np.minimum(rate, 1.0), hit, moving, start, score)


def _unrolled(chain: Chain) -> sp.csr_array:
    n, L = chain.n_states, chain.n_layers
    blocks = [m.tocoo() for m in chain.layers]
    row = np.concatenate([m.coords[0] + t * n for t, m in enumerate(blocks)])
    col = np.concatenate([m.coords[1] + (t + 1) * n for t, m in enumerate(blocks)])
    data = np.concatenate([m.data for m in blocks])
    return sp.csr_array(sp.coo_array((data, (row, col)), shape=((L + 1) * n,) * 2))


def _endless() -> UntrustedError:
    return UntrustedError(
        f"A rollout was still undecided after {MOST_JUMPS} changes of state.",
        cause="The chain moves around for very long before it reaches the target or an end.",
        next="Solve it: hitting_probability(chain, target).",
    )


def tilt(chain: Chain, score: ArrayLike, target: Any = "harm", *, power: float = 1.0) -> Chain:
    """The chain whose moves are drawn towards high scores, ``q_ij ~ p_ij score_j^power``: a proposal for `importance`.

    Parameters
    ----------
    chain : Chain
    score : array, shape (n,), layered also (L + 1, n)
        Non-negative; 1 is put on the target. With the exact hitting probability and power 1 this is the chain given
        that it hits (Doob's transform), and every weighted hit is the answer itself; an estimate of it does nearly as
        well. A score of 0 where the target can be reached takes away support, which `importance` will notice.
    target : as in `hitting_probability`
    power : float
        0 leaves the chain as it is; values between temper the tilt (an exponential tilt by ``power * log(score)``).

    Returns
    -------
    Chain
        Same states, outcomes and start law. Rows without a way to go keep the law of the chain.

    Raises
    ------
    InputError
        A score that is negative or infinite, or has another shape.

    Notes
    -----
    P. W. Glynn and D. L. Iglehart, Management Science 35 (1989) 1367, give the weights; J. L. Doob, Bull. Soc. Math.
    France 85 (1957) 431, the transform.

    Examples
    --------
    With the exact probabilities as score harm is certain; below, where the middle of the ladder went and goes now:

    >>> from markovsafety.evidence import rare
    >>> chain = ms.toy.ladder(4, p=0.25)
    >>> tilted = rare.tilt(chain, ms.hitting_probability(chain, "harm").value)
    >>> print(ms.hitting_probability(tilted, "harm").at_start)
    P(harm) = 1   proven [1, 1]
        because: rounding 0; sampling, judge, lumping, model, truncation not assessed
    >>> np.round([chain.P.toarray()[2], tilted.P.toarray()[2]], 3)
    array([[0.   , 0.75 , 0.   , 0.25 , 0.   ],
           [0.   , 0.188, 0.   , 0.812, 0.   ]])
    """
    value = scores_of(chain, score).reshape(-1, chain.n_states)
    if not (np.isfinite(value) & (value >= 0)).all():
        raise InputError(
            "The score has a negative or infinite entry.",
            cause="Moves are weighted by it.",
            next="Pass probabilities, such as an estimated chain's hitting_probability.",
        )
    value = np.where(chain.mask(target), 1.0, value) ** power
    layers = []
    for t, P in enumerate(chain.layers):
        Q = sp.csr_array(P, copy=True)
        Q.data = Q.data * value[min(t + 1, len(value) - 1)][Q.indices]
        total = np.asarray(Q.sum(axis=1)).ravel()
        length = np.diff(Q.indptr)
        lost = np.repeat(total == 0, length)
        Q.data = np.where(lost, P.data, Q.data / np.repeat(np.where(total == 0, 1.0, total), length))
        layers.append(Q)
    made = layers if chain.is_layered else layers[0]
    return Chain(made, dict(chain.outcomes), chain.start, chain.states, n_layers=chain.n_layers)


def sample_weighted(
    truth: Jumps, proposal: Jumps, n: int, rng: np.random.Generator
) -> tuple[NDArray[np.bool_], NDArray[np.float64], int]:
    """n rollouts of the proposal: whether each hits, the log of its weight under the chain, and the tokens sampled.

    A rollout ends where either chain can no longer hit; its weight is then of no account.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        first = np.log(truth.start) - np.log(proposal.start)
    state = proposal.begin(n, 1, rng)
    log_weight, tokens = first[state], 0
    moving = truth.moving & proposal.moving
    keys, log_move = _lookup(truth)
    alive = np.flatnonzero(moving[state])
    for _ in range(MOST_JUMPS):
        if not alive.size:
            break
        here = state[alive]
        at = proposal._draw(here, rng)
        follow = proposal.indices[at]
        tokens += int(rng.geometric(proposal.rate[here]).sum())
        log_weight[alive] += _of_truth(keys, log_move, here * truth.n_states + follow) - proposal.log_move[at]
        state[alive] = follow
        # A weight of zero stays zero.
        alive = alive[moving[follow] & (log_weight[alive] > -np.inf)]
    else:
        raise _endless()
    return truth.target[state], log_weight, tokens


def _lookup(source: Jumps) -> tuple[NDArray, NDArray]:
    """Moves as sorted keys ``i N + j``, and their log-probabilities."""
    row = np.repeat(np.arange(source.n_states), np.diff(source.indptr))
    key = row * source.n_states + source.indices
    order = np.argsort(key)
    return key[order], source.log_move[order]


def _of_truth(keys: NDArray, log_move: NDArray, wanted: NDArray) -> NDArray[np.float64]:
    """Log-probabilities of moves; -inf for those that the chain does not make."""
    at = np.minimum(np.searchsorted(keys, wanted), max(len(keys) - 1, 0))
    return np.where(keys[at] == wanted, log_move[at], -np.inf) if len(keys) else np.full(len(wanted), -np.inf)


def missing_support(truth: Jumps, proposal: Jumps) -> tuple[int, int] | None:
    """A move (i, j) towards the target that the proposal never makes; (-1, j): a start; None if there is none."""
    useful = truth.moving | truth.target
    starts = np.flatnonzero((truth.start > 0) & useful & (proposal.start == 0))
    if starts.size:
        return -1, int(starts[0])
    n = truth.n_states
    row = np.repeat(np.arange(n), np.diff(truth.indptr))
    pattern = sp.csr_array((np.ones(len(row)), truth.indices, truth.indptr), shape=(n, n))
    seen = reachable(pattern, truth.start > 0, truth.moving)
    wanted = seen[row] & truth.moving[row] & useful[truth.indices]
    keys, log_move = _lookup(proposal)
    lost = np.flatnonzero(wanted & np.isneginf(_of_truth(keys, log_move, row * n + truth.indices)))
    return None if not lost.size else (int(row[lost[0]]), int(truth.indices[lost[0]]))
