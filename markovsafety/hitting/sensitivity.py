"""Derivatives of a hitting probability, and the exact attribution of a change between two chains to their states."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from ..chains import Chain
from ..chains.checks import as_indices
from ..errors import InputError
from . import graph, layered
from .core import Walk, occupation, probability, walk, without_start
from .rates import Rates, rates_of
from .sensitivity_kernels import dyad, moved, overlooked
from .several import laws_of

__all__ = ["Factored", "attribute", "sensitivity", "visits_before"]


def visits_before(w: Walk, start: NDArray, h: NDArray) -> tuple[NDArray, NDArray]:
    """Expected visits before the hit, and the states that can still hit.

    Parameters
    ----------
    w : Walk
    start : array, shape (n,)
    h : array, shape (n,) or (L + 1, n)
        Probability of the hit.

    Returns
    -------
    N : array, shape (n,) or (L + 1, n)
        In tokens; on states that do not move or cannot hit any more, the probability of arriving there.
    live : bool array, same shape
        States that move and can still hit.
    """
    live = _live(w, h)
    if w.chain.is_layered:
        return occupation(w.chain, start, w.moving, 1).Z[..., 0], live
    return occupation(w.chain, start, live, 1).Z[:, 0], live


def _live(w: Walk, h: NDArray) -> NDArray[np.bool_]:
    """States that move and can still hit: those with h > 0, unless one that leads there has lost its h to underflow."""
    live = w.moving & (h > 0)
    here, ahead = (h[:-1], h[1:]) if w.chain.is_layered else (h[None], h[None])
    if not any(overlooked(P.indptr, P.indices, w.moving, *pair) for P, *pair in zip(w.chain.layers, here, ahead)):
        return live
    if w.chain.is_layered:
        return layered.reaching_layers(w.chain.layers, w.hit, w.avoid, w.last(1)[:, 0] > 0) & w.moving
    return graph.reaching(rates_of(w.chain).W, w.hit, w.moving) & w.moving


@dataclass(frozen=True, eq=False, repr=False)
class Factored:
    """All derivatives of a hitting probability as a product, ``visits_i * h_j``, none of them written out.

    Attributes
    ----------
    chain : Chain
    visits : array, shape (n,), layered (L, n)
        Expected visits before the hit, in tokens; 0 where a row is never read or no hit is possible any more.
    h : array, shape (n,), layered (L + 1, n)
        Probability of the hit.

    Notes
    -----
    States are given by index or label, on a layered chain with the layer first: ``at(i, j)`` and ``at(t, i, j)``. The
    derivative by a transition that the chain does not have is as good as any other: it tells what adding it would do.

    Examples
    --------
    >>> slopes: ms.hitting.Factored = ms.sensitivity(ms.toy.shallow(3), "harm", factored=True)
    >>> slopes
    <Factored: derivatives by 6 x 6 transitions>
    >>> round(slopes.at("position 0", "harm"), 3), round(slopes.constrained("tail", "refusal"), 3)
    (1.0, -2.628)
    >>> [(i, j, round(float(d), 3)) for i, j, d in slopes.top(2)]
    [(3, 4, 3.285), (3, 3, 2.628)]
    """

    chain: Chain
    visits: NDArray[np.float64]
    h: NDArray[np.float64]

    def __repr__(self) -> str:
        sizes = *self.visits.shape, self.chain.n_states
        return f"<Factored: derivatives by {' x '.join(map(str, sizes))} transitions>"

    def at(self, *where: Any) -> float:
        """Derivative by the transition (layer,) i, j, whatever happens to the rest of the row."""
        N, i, j, h, _ = self._look(where, 2)
        return float(N[i] * h[j])

    def constrained(self, *where: Any) -> float:
        """Derivative by mass that the transition (layer,) i, j gains from the row of i as a whole.

        ``visits_i (h_j - h_i)``: what adding a little of it does when all else in the row is scaled down to make room.
        """
        N, i, j, h, now = self._look(where, 2)
        return float(N[i] * (h[j] - now[i]))

    def row(self, *where: Any) -> NDArray[np.float64]:
        """Derivatives by all transitions out of (layer,) i, shape (n,)."""
        N, i, _, h, _ = self._look(where, 1)
        return N[i] * h

    def entries(self) -> NDArray[np.float64]:
        """Derivatives by the transitions that the chain has, in the order of ``chain.P.data``, layer after layer."""
        layers = self.chain.layers
        out = np.empty(sum(P.nnz for P in layers))
        begin = 0
        for P, (N, h, _) in zip(layers, self._layers()):
            end = begin + P.nnz
            dyad(P.indptr, P.indices, N, h, out[begin:end])
            begin = end
        return out

    def matrix(self) -> sp.csr_array | tuple[sp.csr_array, ...]:
        """The same as sparse arrays in the pattern of ``chain.P``."""
        layers = self.chain.layers
        parts = np.split(self.entries(), np.cumsum([P.nnz for P in layers])[:-1])
        found = [sp.csr_array((x, P.indices.copy(), P.indptr.copy()), shape=P.shape) for x, P in zip(parts, layers)]
        return tuple(found) if self.chain.is_layered else found[0]

    def top(self, k: int, *, constrained: bool = False) -> list[tuple[Any, ...]]:
        """The k transitions of the chain with the largest derivatives in size: ((layer,) i, j, derivative), best first.

        Parameters
        ----------
        k : int
        constrained : bool
            Rank by `constrained` instead of `at`.

        Raises
        ------
        InputError
            If k is not positive.
        """
        if isinstance(k, bool) or not isinstance(k, (int, np.integer)) or k < 1:
            raise InputError(f"k is {k!r}.", cause="It is how many to return.", next="Pass a positive whole number.")
        best: list[tuple[Any, ...]] = []
        for t, (P, (N, h, now)) in enumerate(zip(self.chain.layers, self._layers())):
            best += [
                (t, *e) if self.chain.is_layered else e for e in _largest(P, N, h, now if constrained else None, k)
            ]
        return sorted(best, key=lambda e: (-abs(e[-1]), e[:-1]))[:k]

    def _layers(self) -> Iterator[tuple[NDArray, NDArray, NDArray]]:
        """Visits, the values that moves lead to, and the values here, of every layer."""
        if self.chain.is_layered:
            return zip(self.visits, self.h[1:], self.h[:-1])
        return iter([(self.visits, self.h, self.h)])

    def _look(self, where: tuple[Any, ...], states: int) -> tuple[NDArray, int, int, NDArray, NDArray]:
        words = (["layer"] if self.chain.is_layered else []) + ["i", "j"][:states]
        layer = where[0] if self.chain.is_layered and where else 0
        if len(where) != len(words) or not (
            isinstance(layer, (int, np.integer)) and 0 <= layer < len(self.chain.layers)
        ):
            raise InputError(
                f"This names {where!r}.",
                cause=f"On this chain a derivative is named by {', '.join(words)}.",
                next="Pass states by index or label" + (", the layer first." if len(words) > states else "."),
            )
        found = [as_indices(x, self.chain.n_states, self.chain._lookup, "state") for x in where[-states:]]
        if any(len(index) != 1 for index in found):
            raise InputError(
                f"This names {where!r}.",
                cause="A derivative belongs to one state before and one after, and one of these is none, or several.",
                next="Pass one index or label for each.",
            )
        i, *rest = (int(index[0]) for index in found)
        N, h, now = next(part for t, part in enumerate(self._layers()) if t == layer)
        return N, i, rest[0] if rest else i, h, now


def _largest(P: sp.csr_array, N: NDArray, h: NDArray, now: NDArray | None, k: int) -> list[tuple[int, int, float]]:
    """The k largest entries of one matrix; rows that cannot hold one are never looked at."""
    order = np.argsort(-N, kind="stable")
    order = order[N[order] > 0]
    reach = float(h.max(initial=0.0)) if now is None else 1.0  # no entry of a row exceeds its visits times this
    rows, columns, values = np.zeros(0, np.intp), np.zeros(0, np.intp), np.zeros(0)
    begin, size = 0, max(64, k)
    while begin < len(order):
        if len(values) == k and abs(values[-1]) >= N[order[begin]] * reach:
            break
        some = order[begin : begin + size]
        row, column = np.repeat(some, np.diff(P.indptr)[some]), P.indices[graph.slices(P.indptr, some)]
        value = N[row] * (h[column] if now is None else h[column] - now[row])
        rows, columns, values = (np.concatenate(x) for x in ((rows, row), (columns, column), (values, value)))
        keep = np.lexsort((columns, rows, -np.abs(values)))[:k]
        rows, columns, values = rows[keep], columns[keep], values[keep]
        begin, size = begin + size, 2 * size
    return [e for e in zip(rows.tolist(), columns.tolist(), values.tolist()) if e[2] != 0]


def sensitivity(chain: Chain, target: Any, *, start: Any = None, factored: bool = False) -> Any:
    """Derivative of the hitting probability at the start by every transition probability.

    Parameters
    ----------
    chain : Chain
        With a start law, unless `start` is given.
    target : as in `hitting_probability`
    start : as in `visits`, optional
        Where to start instead; several starts share the solution for h.
    factored : bool
        Give the two factors instead of all their products.

    Returns
    -------
    csr array, shape (n, n); layered: a tuple, one per layer
        ``visits_i * h_j`` in the pattern of ``chain.P`` (so ``.data`` belong together), visits before the hit. These
        are raw partial derivatives; moving mass within a row from j to k changes the probability by the difference of
        two entries. Rows of the target are 0: they are never read. With ``factored=True`` a `Factored`; for several
        starts a list with one answer for each.

    Raises
    ------
    InputError
        If there is no start, or the target is unknown or empty.

    Notes
    -----
    C. D. Meyer, SIAM J. Algebraic Discrete Methods 1 (1980) 273, for the fundamental matrix; values, not bounds. The
    two factors take one solution for h and one of the transposed equations, with the same factors of the chain.

    Examples
    --------
    What one percent more of refusal at position 1 is worth, by the derivatives and by solving again:

    >>> chain = ms.toy.shallow(3)
    >>> slopes = ms.sensitivity(chain, "harm")
    >>> here, on, refusal = map(chain.index, ("position 1", "position 2", "refusal"))
    >>> print(f"{0.01 * (slopes[here, refusal] - slopes[here, on]):.5f}")
    -0.00388
    >>> P = chain.P.toarray()
    >>> P[here, [on, refusal]] += [-0.01, 0.01]
    >>> after = ms.Chain(P, chain.outcomes, start=0)
    >>> change = [ms.hitting_probability(c, "harm").at_start.value for c in (chain, after)]
    >>> print(f"{change[1] - change[0]:.5f}")
    -0.00388
    """
    w = walk(chain, target)
    if start is None and chain.start is None:
        raise without_start("A derivative at the start")
    laws, several = laws_of(chain, start)
    h = probability(w, certify=False).X[..., 0]
    found = []
    for law in laws:
        N, live = visits_before(w, law, h)
        N = np.where(live, N, 0.0)
        both = Factored(chain, N[:-1] if chain.is_layered else N, h)
        found.append(both if factored else both.matrix())
    return found if several else found[0]


def attribute(before: Chain, after: Chain, target: Any) -> NDArray[np.float64]:
    """Which states' rows account for the change of the hitting probability at the start.

    Parameters
    ----------
    before, after : Chain
        On the same states, both with a start law.
    target : as in `hitting_probability`

    Returns
    -------
    array, shape (n,), layered (L + 1, n)
        Sums to the change at the start, up to rounding. A row that did not change gets exactly 0.

    Raises
    ------
    InputError
        If the chains do not have the same states or targets, or one has no start law.

    Notes
    -----
    With the change dP of the rows, visits N and probabilities h before, N' and h' after, ``h' - h = N' dP h = N dP h'``
    holds exactly (the resolvent identity); the attribution is the mean of both, so it does not prefer one chain. A
    state that can no longer hit is taken as an end of value 0: what arrives there loses the h it had (and gains, the
    other way round). A changed start law adds its difference times the mean of h and h'.

    Entries are subtracted before they are multiplied, so a row that did not change gives exactly 0 and a small change
    keeps its digits; each share has the relative error of its visits, of the differences of h and of a few roundings
    per entry, and the sum differs from the change by that much of the sum of the sizes of all shares.

    Examples
    --------
    Refusal became likelier where the model is aligned, a little less likely behind; which positions did what?

    >>> before = ms.toy.shallow(2)
    >>> after = ms.toy.shallow(2, aligned=(0.01, 0.4), unaligned=(0.08, 0.01))
    >>> share = ms.attribute(before, after, "harm")
    >>> for state, x in zip(before.states, share[:3]):
    ...     print(f"{state}: {x:+.4f}")
    position 0: -0.0548
    position 1: -0.0543
    tail: +0.0366
    >>> print(f"in all: {share.sum():+.4f}")
    in all: -0.0725
    """
    a, b = walk(before, target), walk(after, target)
    _same_states(before, after, a, b)
    if before.start is None or after.start is None:
        raise without_start("Attribution")
    h, g = (probability(w, certify=False).X[..., 0] for w in (a, b))
    start = (before.start + after.start) / 2
    (N, live), (M, alive) = visits_before(a, start, h), visits_before(b, start, g)
    if before.is_layered:
        share = np.zeros_like(h)
        none = np.zeros(before.n_states)
        for t, (P, R) in enumerate(zip(before.layers, after.layers)):
            change = M[t] * _moved(P, R, h[t + 1], none) + N[t] * _moved(P, R, g[t + 1], none)
            share[t] = np.where(a.moving, change / 2, 0.0)
    else:
        P, R = _jumps(rates_of(before)), _jumps(rates_of(after))
        share = np.where(alive, M * _moved(P, R, h, h), np.where(b.moving, -M * h, 0.0)) / 2
        share += np.where(live, N * _moved(P, R, g, g), np.where(a.moving, N * g, 0.0)) / 2
    first = share[0] if before.is_layered else share
    first += (after.start - before.start) * ((h[0] + g[0]) if before.is_layered else (h + g)) / 2
    return share


def _jumps(rates: Rates) -> sp.csr_array:
    """Probabilities to move, per token."""
    W = rates.W if rates.W.has_sorted_indices else rates.W.sorted_indices()
    return sp.csr_array((W.data / np.repeat(rates.step, rates.terms), W.indices, W.indptr), shape=W.shape)


def _moved(P: sp.csr_array, R: sp.csr_array, x: NDArray, base: NDArray) -> NDArray[np.float64]:
    """``sum_j (R_ij - P_ij) (x_j - base_i)`` by row."""
    out = np.empty(len(base))
    moved(P.indptr, P.indices, P.data, R.indptr, R.indices, R.data, np.ascontiguousarray(x), base, out)
    return out


def _difference(a: Sequence[Any], b: Sequence[Any]) -> str:
    """What tells two sequences of labels apart, in words."""
    for mine, other, which in ((a, set(b), "only the first chain has"), (b, set(a), "only the second chain has")):
        extra = [x for x in mine if x not in other]
        if extra:
            more = f" and {len(extra) - 1} more" if len(extra) > 1 else ""
            return f"{len(a)} and {len(b)} of them, {which} {extra[0]!r}{more}"
    i = next(i for i, (x, y) in enumerate(zip(a, b)) if x != y)
    return f"the same labels in another order, state {i} is {a[i]!r} in the first and {b[i]!r} in the second"


def _same_states(before: Chain, after: Chain, a: Walk, b: Walk) -> None:
    if before.n_layers != after.n_layers:
        raise InputError(
            f"One chain has {before.n_layers} layers, the other {after.n_layers}.",
            cause="Attribution compares the chains row by row (0 layers: homogeneous).",
            next="Use two chains with equally many layers.",
        )
    if tuple(before.states) != tuple(after.states):
        raise InputError(
            f"The chains have different states: {_difference(before.states, after.states)}.",
            cause="Attribution compares the chains row by row.",
            next="Give both chains the same states in the same order, seen or not.",
        )
    if not np.array_equal(a.hit, b.hit) or a.tail != b.tail:
        raise InputError(
            f"The target {a.name!r} is not the same set of states in both chains.",
            cause="Attribution explains the change of one probability.",
            next="Name the target by states that both chains have.",
        )
