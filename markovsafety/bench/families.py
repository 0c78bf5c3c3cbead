"""Seeded families of chains on which solvers can be compared, from the easy to those on which most solvers are wrong.

A `Problem` is the raw material that every solver gets: ``h = Q h + harm`` on the states that move, with the absorption
``harm`` and ``safe`` beside it. All probabilities of the random families are multiples of 2^-50 and every row sums to
one exactly, so that ``I - Q`` is exact in floating point and no solver is charged for how the chain is written down.
The ill-conditioned families consist of integer counts, from which rational arithmetic can start.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from ..chains import Chain

__all__ = [
    "Batch",
    "Problem",
    "giant",
    "grid",
    "haddad",
    "haddad_harm",
    "haddad_time",
    "kgram",
    "layered",
    "leak",
    "posterior",
    "ruin",
    "ruin_harm",
]

BESIDE: Any = [-1, 1]
GRAIN = 2.0**-50  # resolution of random probabilities; sums of up to 1 are exact


@dataclass(frozen=True, eq=False)
class Problem:
    """A hitting problem before anybody prepared it.

    Attributes
    ----------
    name : str
    Q : csr array, shape (n, n)
        Probabilities (or counts) among the n states that move; no diagonal, int32 indices.
    harm, safe : array, shape (n,)
        Probabilities (or counts) of ending there.
    counted : bool
        Whether the numbers are integer counts.
    widths : tuple of int
        States per layer where the states lie in layers and every move goes to the next layer; else empty.
    """

    name: str
    Q: sp.csr_array
    harm: NDArray[Any]
    safe: NDArray[Any]
    counted: bool = False
    widths: tuple[int, ...] = ()

    @property
    def n(self) -> int:
        """Number of states that move."""
        return len(self.harm)

    def probabilities(self) -> Problem:
        """The same with counts divided by the totals of their rows."""
        if not self.counted:
            return self
        total = np.asarray(self.Q.sum(axis=1)).ravel() + self.harm + self.safe
        Q = sp.csr_array(self.Q, dtype=np.float64, copy=True)
        Q.data /= np.repeat(total, np.diff(Q.indptr))
        return Problem(self.name, Q, self.harm / total, self.safe / total)

    def matrix(self) -> sp.csr_array:
        """All rows of the chain, shape (n + 2, n + 2): the moving states, then harm, then refusal."""
        Q, n = self.Q, self.n
        length = np.diff(Q.indptr)
        ends = np.stack([self.harm > 0, self.safe > 0], axis=1)
        indptr = np.concatenate([[0], np.cumsum(length + ends.sum(axis=1)), [0, 0]]).astype(np.int32)
        indptr[-2:] = indptr[-3]
        indices, data = np.empty(indptr[-1], np.int32), np.empty(indptr[-1], Q.data.dtype)
        body = np.ones(indptr[-1], dtype=bool)
        for j, mass in enumerate((self.harm, self.safe)):
            at = (indptr[:n] + length + (ends[:, 0] if j else 0))[ends[:, j]]
            indices[at], data[at], body[at] = n + j, mass[ends[:, j]], False
        indices[body], data[body] = Q.indices, Q.data
        return sp.csr_array((data, indices, indptr), shape=(n + 2, n + 2))

    def chain(self) -> Chain:
        """A new homogeneous chain, with the outcomes harm and refusal, started in state 0."""
        make = Chain.from_counts if self.counted else Chain
        return make(self.matrix(), {"harm": self.n, "refusal": self.n + 1}, start=0)

    def blocks(self) -> list[sp.csr_array]:
        """One matrix per layer, each of shape (width + 2, width + 2), of a problem whose layers are equally wide."""
        width, n, whole = self.widths[0], self.n, self.matrix()
        found = []
        for first in range(0, n, width):
            ends = whole.indptr[first : first + width + 3].copy()
            ends[width + 1 :] = ends[width]
            part = slice(int(ends[0]), int(ends[-1]))
            column = whole.indices[part]
            column = np.where(column >= n, column - n + width, column - first - width).astype(np.int32)
            shape = (width + 2, width + 2)
            found.append(sp.csr_array((whole.data[part], column, ends - ends[0]), shape=shape))
        return found

    def layered_chain(self) -> Chain:
        """A new chain with one matrix per layer, started in state 0 of the first."""
        width = self.widths[0]
        return Chain.layered(self.blocks(), {"harm": width, "refusal": width + 1}, start=0)


@dataclass(frozen=True, eq=False)
class Batch:
    """Random chains on the pattern of one: ``data`` (nnz, B), ``harm`` and ``safe`` (n, B)."""

    problem: Problem
    data: NDArray[np.float64]
    harm: NDArray[np.float64]
    safe: NDArray[np.float64]

    def entries(self) -> NDArray[np.float64]:
        """Stored entries of the chains, shape (B, nnz), in the order of ``chain.P.data``, layer after layer."""
        p, nnz, n = self.problem, self.problem.Q.nnz, self.problem.n
        place = sp.csr_array((np.arange(1.0, nnz + 1), p.Q.indices, p.Q.indptr), shape=p.Q.shape)
        harm = np.where(p.harm > 0, np.arange(nnz + 1.0, nnz + n + 1.0), 0.0)
        safe = np.where(p.safe > 0, np.arange(nnz + n + 1.0, nnz + 2 * n + 1.0), 0.0)
        numbered = Problem(p.name, place, harm, safe, widths=p.widths)
        blocks = numbered.blocks() if p.widths else [numbered.matrix()]
        last = nnz + 2 * n  # a row of ones behind all others, for the outcomes' own rows
        order = np.concatenate([x for block in blocks for x in (block.data.astype(np.intp) - 1, [last, last])])
        pool = np.concatenate([self.data, self.harm, self.safe, np.ones((1, self.data.shape[1]))])
        return np.ascontiguousarray(pool[order].T)

    def sample(self, b: int) -> Problem:
        Q = self.problem.Q
        made = sp.csr_array((np.ascontiguousarray(self.data[:, b]), Q.indices, Q.indptr), shape=Q.shape)
        return Problem(f"sample {b}", made, self.harm[:, b].copy(), self.safe[:, b].copy(), widths=self.problem.widths)


def _rows(rng: np.random.Generator, columns: NDArray, absorb: NDArray, risk: NDArray) -> tuple[Any, Any, Any]:
    """Random laws: successors as given (n, k), total absorption (n,), share of harm in it (n,); multiples of GRAIN."""
    n, k = columns.shape
    weight = rng.exponential(size=(n, k)) + 0.05
    weight *= ((1 - absorb) / weight.sum(axis=1))[:, None]
    data = np.round(weight / GRAIN) * GRAIN
    harm = np.round(absorb * risk / GRAIN) * GRAIN
    safe = 1.0 - data.sum(axis=1) - harm  # exact: all are multiples of GRAIN below one
    low = safe < GRAIN
    data[low, 0] -= (GRAIN - safe)[low]
    return data, harm, np.where(low, GRAIN, safe)


def _csr(columns: NDArray, data: NDArray, n: int) -> sp.csr_array:
    """Rows with k entries each, sorted by column."""
    order = np.argsort(columns, axis=1)
    indices = np.take_along_axis(columns, order, axis=1).astype(np.int32)
    k = columns.shape[1]
    indptr = np.arange(0, len(columns) * k + 1, k, dtype=np.int32)
    return sp.csr_array(
        (np.take_along_axis(data, order, axis=1).ravel(), indices.ravel(), indptr), shape=(len(columns), n)
    )


def _distinct(rng: np.random.Generator, rows: int, k: int, top: int) -> NDArray[np.int64]:
    """k different numbers below top per row: one out of each of k equal stretches, shifted around the circle."""
    edge = np.arange(k + 1) * top // k
    drawn = edge[:-1] + (rng.random((rows, k)) * np.diff(edge)).astype(np.int64)
    return (drawn + rng.integers(top, size=(rows, 1))) % top


def layered(depth: int = 64, width: int = 4096, successors: int = 16, seed: int = 0) -> Problem:
    """Positions of an answer: every state moves to `successors` states of the next layer, the last layer ends.

    Parameters
    ----------
    depth, width, successors, seed : int
        Layers, states per layer, moves per state. About 2 % of the mass ends per layer.

    Notes
    -----
    The shape of a chain whose states are position x label (arXiv 2502.00669 unrolled over positions).
    """
    rng = np.random.default_rng(seed)
    n = depth * width
    columns = _distinct(rng, n - width, successors, width)
    columns += (np.arange(n - width) // width + 1)[:, None] * width
    absorb = np.concatenate([0.04 * rng.random(n - width), np.ones(width)])
    risk = rng.random(n)
    data, harm, safe = _rows(rng, columns, absorb[: n - width], risk[: n - width])
    last = np.round(risk[n - width :] / GRAIN) * GRAIN
    inner = _csr(columns, data, n)
    indptr = np.concatenate([inner.indptr, np.full(width, inner.indptr[-1], np.int32)])
    Q = sp.csr_array((inner.data, inner.indices, indptr), shape=(n, n))
    ends = np.concatenate([harm, last]), np.concatenate([safe, 1.0 - last])
    return Problem(f"layered {depth} x {width} x {successors}", Q, *ends, widths=(width,) * depth)


def kgram(vocabulary: int = 64, order: int = 2, successors: int = 12, leak: float = 1e-6, seed: int = 0) -> Problem:
    """A k-gram language: states are the last `order` tokens, a token goes to one of `successors`, or the answer ends.

    Parameters
    ----------
    leak : float
        Mean probability per token that the answer ends, a fifth of it in harm; differs from state to state.

    Notes
    -----
    Expander-like: direct solvers fill in. With a small leak the matrix is nearly singular, its condition 1 / leak.
    A word of one token repeated moves to itself; that move is left out and its mass given to the others.
    """
    rng = np.random.default_rng(seed)
    n = vocabulary**order
    tail = (np.arange(n) * vocabulary) % n
    columns = tail[:, None] + _distinct(rng, n, successors, vocabulary)
    stay = columns == np.arange(n)[:, None]
    absorb = leak * (0.2 * rng.exponential(size=n) + 0.8 * rng.exponential(size=n) + 0.05)
    data, harm, safe = _rows(rng, columns, absorb, 0.1 + 0.2 * rng.random(n))
    row = np.flatnonzero(stay.any(axis=1))
    at = stay[row].argmax(axis=1)
    data[row, (at + 1) % successors] += data[row, at]
    data[row, at] = 0.0
    Q = _csr(columns, data, n)
    Q.eliminate_zeros()
    return Problem(f"k-gram V={vocabulary} order {order}, leak {leak:g}", Q, harm, safe)


def giant(n: int = 100_000, successors: int = 10, leak: float = 1e-2, seed: int = 0) -> Problem:
    """One random strongly connected class: `successors` uniform successors per state, mean absorption `leak`."""
    rng = np.random.default_rng(seed)
    columns = (np.arange(n)[:, None] + 1 + _distinct(rng, n, successors, n - 1)) % n
    absorb = leak * (0.05 + rng.exponential(size=n)).clip(max=0.5 / leak)
    data, harm, safe = _rows(rng, columns, absorb, 0.1 + 0.2 * rng.random(n))
    return Problem(f"giant class {n} x {successors}, leak {leak:g}", _csr(columns, data, n), harm, safe)


def ruin(n: int = 100_000) -> Problem:
    """Fair gambler's ruin with n states between refusal at 0 and harm at n + 1; condition about n^2.

    W. Feller, An Introduction to Probability Theory and Its Applications I, XIV.2.
    """
    half = np.full(n - 1, 0.5)
    Q = sp.csr_array(sp.diags_array([half, half], offsets=BESIDE, format="csr"))
    Q.indices, Q.indptr = Q.indices.astype(np.int32), Q.indptr.astype(np.int32)
    harm, safe = np.zeros(n), np.zeros(n)
    harm[-1] = safe[0] = 0.5
    return Problem(f"ruin {n}", Q, harm, safe)


def ruin_harm(n: int = 100_000) -> NDArray[np.longdouble]:
    """``i / (n + 1)`` for i = 1 .. n."""
    return np.arange(1, n + 1, dtype=np.longdouble) / (n + 1)


def grid(size: int = 300) -> Problem:
    """Simple walk on a square of `size` x `size` states; leaving over the upper side is harm, over the others refusal.

    A discrete Dirichlet problem (R. Courant, K. Friedrichs, H. Lewy, Math. Ann. 100 (1928) 32); in the middle of a
    square of odd size the answer is 1/4 by symmetry.
    """
    n = size * size
    line = sp.diags_array([np.full(size - 1, 0.25)] * 2, offsets=BESIDE, format="csr")
    one = sp.eye_array(size, format="csr")
    Q = sp.csr_array(sp.kron(one, line) + sp.kron(line, one))
    Q.indices, Q.indptr = Q.indices.astype(np.int32), Q.indptr.astype(np.int32)
    x, y = np.divmod(np.arange(n), size)
    harm = 0.25 * (x == 0)
    safe = 0.25 * ((x == size - 1).astype(float) + (y == 0) + (y == size - 1))
    return Problem(f"grid walk {size} x {size}", Q, harm, safe)


def leak(rate: float = 2e-15, n: int = 60, seed: int = 0) -> Problem:
    """A refusal that is almost absorbing: n states in counts, among which a walk stays about ``1 / rate`` steps.

    Parameters
    ----------
    rate : float
        Mean probability per step that the walk ends; at least 1e-15, so that all counts stay below 2^53.
    """
    rng = np.random.default_rng(seed)
    ends = rng.integers(1, 10, size=(2, n))
    inside = rng.integers(1, 1000, size=(n, n))
    ratio = ends.sum() / rate / (n * (n - 1) * 500.0)
    ends, inside = ends * max(1, round(1 / ratio)), inside * max(1, round(ratio))
    np.fill_diagonal(inside, 0)
    Q = sp.csr_array(inside)
    Q.indices, Q.indptr = Q.indices.astype(np.int32), Q.indptr.astype(np.int32)
    return Problem(f"leak {rate:g}, {n} states", Q, ends[0], ends[1], counted=True)


def haddad(n: int = 100) -> Problem:
    """The chain on which value iteration stops at once: 7 : 3 to one of two arms; half of the steps lead back.

    Parameters
    ----------
    n : int
        Length of an arm; at its end are harm (the arm of weight 7) and refusal.

    Notes
    -----
    S. Haddad, B. Monmege, Interval iteration algorithm for MDPs and IMDPs, Theoretical Computer Science 735 (2018)
    111; as "haddad-monmege" in the Quantitative Verification Benchmark Set. Condition about 2^n.
    """
    m = 2 * n - 1  # -(n - 1) .. n - 1; state k stands for k - (n - 1)
    middle = n - 1
    Q = sp.lil_array((m, m), dtype=np.int64)
    harm, safe = np.zeros(m, np.int64), np.zeros(m, np.int64)
    for k in range(m):
        if k == middle:
            steps = [(k + 1, 7), (k - 1, 3)]
        else:
            steps = [(k + (1 if k > middle else -1), 1), (middle, 1)]
        for j, weight in steps:
            if j == m:
                harm[k] += weight
            elif j < 0:
                safe[k] += weight
            else:
                Q[k, j] += weight
    made = sp.csr_array(Q)
    made.indices, made.indptr = made.indices.astype(np.int32), made.indptr.astype(np.int32)
    return Problem(f"haddad-monmege N={n}", made, harm, safe, counted=True)


def haddad_harm(n: int = 100) -> list[Fraction]:
    """7/10 in the middle; a state i steps before the end of an arm ends there at once with probability 2^-i."""
    middle = Fraction(7, 10)
    ahead = [Fraction(1, 2 ** (n - i)) for i in range(1, n)]
    return [*((1 - s) * middle for s in reversed(ahead)), middle, *(s + (1 - s) * middle for s in ahead)]


def haddad_time(n: int = 100) -> list[Fraction]:
    """Expected steps to either end: ``3 2^(n-1) - 2`` from the middle."""
    middle = Fraction(3 * 2 ** (n - 1) - 2)
    arm = [(2 + middle) * (1 - Fraction(1, 2 ** (n - i))) for i in range(1, n)]
    return [*reversed(arm), middle, *arm]


def posterior(problem: Problem, samples: int = 256, seed: int = 0, strength: float = 20.0) -> Batch:
    """Random chains on the pattern of one: every row gets `samples` laws around the given one.

    Parameters
    ----------
    strength : float
        Number of observations per row that the laws stand for; the absorption keeps its total.

    Returns
    -------
    Batch
        Multiples of 2^-50 like the problem's own; all rows sum to one.
    """
    rng = np.random.default_rng(seed)
    Q, n = problem.Q, problem.n
    length = np.diff(Q.indptr)
    row = np.repeat(np.arange(n), length)
    stays = 1.0 - problem.harm - problem.safe
    data = np.empty((Q.nnz, samples))
    harm, safe = np.empty((n, samples)), np.empty((n, samples))
    for b in range(samples):
        draw = rng.standard_gamma(np.maximum(strength * Q.data, 0.5))
        total = np.bincount(row, draw, minlength=n)
        data[:, b] = np.round(draw / total[row] * stays[row] / GRAIN) * GRAIN
        share = np.clip(problem.harm / np.maximum(1.0 - stays, GRAIN) * rng.uniform(0.8, 1.2, n), 0.0, 1.0)
        share[problem.safe == 0] = 1.0
        harm[:, b] = np.round(share * (1.0 - stays) / GRAIN) * GRAIN
        safe[:, b] = 1.0 - np.bincount(row, data[:, b], minlength=n) - harm[:, b]
        rest = (safe[:, b] < 0) | (problem.safe == 0)  # what rounding leaves goes to a move, or there is none, to harm
        moves, ends = np.flatnonzero(rest & (length > 0)), np.flatnonzero(rest & (length == 0))
        data[Q.indptr[moves], b] += safe[moves, b]
        harm[ends, b] += safe[ends, b]
        safe[rest, b] = 0.0
    return Batch(problem, data, harm, safe)
