"""A language model with a finite context is a finite Markov chain: its states, its mixing, and what that is worth.

With a vocabulary of T tokens and a context of K, the states are all strings of 1 to K tokens. A string shorter than K
grows by the token that is spoken; a full one also drops its first. So the matrix has the form

    [ P_TT  P_TR ]      T: the strings shorter than K, left for good;
    [  0    P_RR ]      R: the T^K full strings,

and every row has T entries at most (O. Zekri, A. Odonnat, A. Benechehab, L. Bleistein, N. Boulle and I. Redko, arXiv
2410.02724, propositions 3.1 to 3.4). With all tokens always possible, R is one class with a stationary law, and the
paper bounds the way to it by ``(1 - 2 eps)^(floor(n / K) - 1)``, eps the smallest entry of Q^K on R. Two remarks are
our own: the Dobrushin coefficient delta of Q^K gives ``delta^(floor(n / K) - 1)`` in total variation, which is never
larger and often far smaller; and for safety the stationary law is beside the point, since an answer *ends*: with an end
token the chain is absorbing, and the numbers that matter are hitting probabilities.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import scipy.sparse as sp
from numpy.typing import ArrayLike, NDArray
from scipy.sparse.csgraph import connected_components

from ..brief import brief
from ..chains import Chain
from ..errors import InputError
from .decoding import Law
from .profile import whole

__all__ = [
    "LanguageChain",
    "Mixing",
    "compatible",
    "density",
    "language_chain",
    "mixing",
    "n_strings",
    "parity_model",
]

LARGEST = 20_000  # strings of an explicit chain
DENSE = 2048  # full strings for mixing


def n_strings(vocabulary: int, context: int) -> int:
    """Number of strings of 1 to K tokens: ``T (T^K - 1) / (T - 1)``, exactly (arXiv 2410.02724, proposition 3.1).

    Parameters
    ----------
    vocabulary, context : int
        Numbers T of tokens and K of positions.

    Returns
    -------
    int

    Examples
    --------
    Two tokens and a context of three; 32000 tokens and a context of four:

    >>> ms.depth.n_strings(2, 3)
    14
    >>> print(f"{ms.depth.n_strings(32_000, 4):.3e}")
    1.049e+18
    """
    T, K = _sizes(vocabulary, context)
    return K if T == 1 else T * (T**K - 1) // (T - 1)


def density(vocabulary: int, context: int) -> float:
    """Share of the matrix that may be non-zero, ``(T - 1) / (T^K - 1)``: T entries in each row."""
    T, K = _sizes(vocabulary, context)
    return 1 / K if T == 1 else (T - 1) / (T**K - 1)


def _sizes(vocabulary: Any, context: Any) -> tuple[int, int]:
    T, K = int(whole(vocabulary, "vocabulary")), int(whole(context, "context"))
    if T < 1 or K < 1:
        raise InputError(
            f"vocabulary is {vocabulary!r}, context {context!r}.",
            cause="There is at least one token and one place for it.",
            next="Pass whole numbers >= 1.",
        )
    return T, K


def compatible(u: tuple[int, ...], v: tuple[int, ...], context: int) -> bool:
    """Whether one token leads from the string u to v: u grows by a token, a full u also drops its first."""
    kept = tuple(u)[1:] if len(u) == context else tuple(u)
    return len(v) == len(kept) + 1 and tuple(v)[:-1] == kept


@dataclass(frozen=True, eq=False, repr=False)
class LanguageChain:
    """The chain of a next-token law with a finite context; made by `language_chain`.

    Parameters
    ----------
    vocabulary, context : int
    states : tuple of tuples of int
        Strings by length, then in the order of their tokens.
    P : csr array, shape (n, n)

    Examples
    --------
    Which comes first after a 1, three ones or three zeros?

    >>> made = ms.depth.parity_model()
    >>> made
    <LanguageChain 2 tokens, context 3, 14 strings>
    >>> chain = made.chain({"harm": [(1, 1, 1)], "refusal": [(0, 0, 0)]}, start=(1,))
    >>> print(f"{ms.hitting_probability(chain, 'harm').at_start.value:.4f}")
    0.5118
    """

    vocabulary: int
    context: int
    states: tuple[tuple[int, ...], ...]
    P: sp.csr_array

    def __repr__(self) -> str:
        return f"<LanguageChain {self.vocabulary} tokens, context {self.context}, {len(self.states)} strings>"

    @cached_property
    def full(self) -> NDArray[np.int64]:
        """Indices of the strings of full length."""
        return np.array([i for i, s in enumerate(self.states) if len(s) == self.context], dtype=np.int64)

    def blocks(self) -> tuple[sp.csr_array, sp.csr_array, sp.csr_array]:
        """P_TT (nilpotent: strings only grow), P_TR, P_RR."""
        first = len(self.states) - len(self.full)
        return self.P[:first, :first], self.P[:first, first:], self.P[first:, first:]

    def closed_classes(self) -> list[list[tuple[int, ...]]]:
        """Sets of strings that are never left; one of them means a single stationary law."""
        count, label = connected_components(self.P, directed=True, connection="strong")
        P = self.P.tocoo()
        leaving = np.zeros(count, dtype=bool)
        moves = (P.data > 0) & (label[P.row] != label[P.col])
        leaving[label[P.row[moves]]] = True
        classes = [[self.states[i] for i in np.flatnonzero(label == c)] for c in np.flatnonzero(~leaving)]
        return sorted(classes)

    def stationary(self) -> NDArray[np.float64]:
        """The stationary law, shape (n,).

        Raises
        ------
        InputError
            If there are several closed classes: each has its own.

        Notes
        -----
        By elimination without subtraction (W. K. Grassmann, M. I. Taksar and D. P. Heyman, Operations Research 33
        (1985) 1107), so that nearly reducible chains keep their digits.
        """
        classes = self.closed_classes()
        if len(classes) > 1:
            shown = "; ".join(" ".join(map(str, c[0])) for c in classes[:4])
            raise InputError(
                f"There are {len(classes)} closed classes, one with each of: {shown}.",
                cause="Some tokens have probability 0 (greedy or top-p decoding, or underflow), so strings do not mix.",
                next="Ask for each class by itself, or give every token a positive probability.",
            )
        index = {s: i for i, s in enumerate(self.states)}
        where = np.array([index[s] for s in classes[0]])
        if len(where) > DENSE:
            raise InputError(
                f"The closed class has {len(where)} strings.",
                cause=f"Stationary laws are computed densely, up to {DENSE} strings.",
                next="Use a smaller context or vocabulary.",
            )
        law = np.zeros(len(self.states))
        law[where] = _stationary(self.P[where][:, where].toarray())
        return law

    def chain(self, outcomes: Mapping[str, Iterable[tuple[int, ...]]], start: Any = None) -> Chain:
        """The same as a `Chain` with outcomes: sets of strings by name.

        Parameters
        ----------
        outcomes : dict of str to strings
            E.g. every string with a harmful last token; their rows are absorbing then.
        start : string or law of shape (n,), optional
        """
        index = {s: i for i, s in enumerate(self.states)}
        ends = {
            name: np.array([index[tuple(s)] for s in strings], dtype=np.int64) for name, strings in outcomes.items()
        }
        P = self.P.tolil()
        for i in {int(i) for index in ends.values() for i in index}:
            P[i, :] = 0.0
        law = index[tuple(start)] if isinstance(start, tuple) else start
        return Chain(P.tocsr(), ends, law, list(self.states))


def language_chain(law: Law, vocabulary: int, context: int) -> LanguageChain:
    """Write out the chain of a next-token law.

    Parameters
    ----------
    law : callable
        From a tuple of 1 to K tokens (0 .. T - 1) to T probabilities of the next.
    vocabulary, context : int
        T and K; ``T (T^K - 1) / (T - 1)`` strings at most 20000.

    Returns
    -------
    LanguageChain

    Raises
    ------
    InputError
        If there are too many strings, or a law is no law.

    Examples
    --------
    >>> law = lambda s: [0.9, 0.1] if s[-1] == 0 else [0.1, 0.9]
    >>> made = ms.depth.language_chain(law, vocabulary=2, context=2)
    >>> made
    <LanguageChain 2 tokens, context 2, 6 strings>
    >>> dict(zip(made.states, made.stationary().round(3).tolist()))
    {(0,): 0.0, (1,): 0.0, (0, 0): 0.45, (0, 1): 0.05, (1, 0): 0.05, (1, 1): 0.45}
    """
    T, K = _sizes(vocabulary, context)
    if (n := n_strings(T, K)) > LARGEST:
        raise InputError(
            f"{T} tokens and a context of {K} make {n} strings.",
            cause=f"The chain is written out for up to {LARGEST}; a real model's never is.",
            next="Take a smaller context, or estimate a chain on fewer states from rollouts.",
        )
    states = tuple(s for k in range(1, K + 1) for s in itertools.product(range(T), repeat=k))
    index = {s: i for i, s in enumerate(states)}
    rows, columns, data = [], [], []
    for i, s in enumerate(states):
        p = np.asarray(law(s), dtype=np.float64)
        if p.shape != (T,) or not (np.isfinite(p).all() and (p >= 0).all() and abs(p.sum() - 1) <= 1e-9):
            raise InputError(
                f"After {s} the law is {p}.",
                cause=f"{T} probabilities that sum to 1 are wanted.",
                next="Normalise what the callable returns.",
            )
        kept = s[1:] if len(s) == K else s
        for token in np.flatnonzero(p):
            rows.append(i)
            columns.append(index[(*kept, int(token))])
            data.append(p[token] / p.sum())
    return LanguageChain(T, K, states, sp.csr_array(sp.coo_array((data, (rows, columns)), shape=(n, n))))


def parity_model(temperature: float = 1.0, logit: float = 1.5) -> LanguageChain:
    """The toy of arXiv 2410.02724: two tokens, a context of three, 0 follows an even sum and 1 an odd one.

    Parameters
    ----------
    temperature : float
    logit : float
        The rule's token has ``+logit``, the other ``-logit`` (the paper trains a small network instead).

    Returns
    -------
    LanguageChain

    Raises
    ------
    InputError
        A temperature that is not positive, or a logit that is not finite.

    Examples
    --------
    Tokens until the start is forgotten up to 1 %, at two temperatures:

    >>> for t in (1, 0.5): print(t, ms.depth.mixing(ms.depth.parity_model(temperature=t)).tokens(0.01))
    1 88
    0.5 1743
    """
    if not temperature > 0 or not np.isfinite(logit):
        raise InputError(
            f"temperature is {temperature}, logit {logit}.",
            cause="A temperature is positive, a logit finite.",
            next="Pass such numbers; `greedy` is the limit of temperature 0.",
        )
    follow = 1 / (1 + np.exp(-2 * logit / temperature))

    def law(s: tuple[int, ...]) -> list[float]:
        return [follow, 1 - follow] if sum(s) % 2 == 0 else [1 - follow, follow]

    return language_chain(law, 2, 3)


@dataclass(frozen=True, eq=False)
class Mixing:
    """How fast a language chain forgets where it began.

    Parameters
    ----------
    epsilon : float
        Smallest entry of Q^K between full strings.
    dobrushin : float
        delta: largest total variation between two rows of Q^K on the full strings.
    second : float
        Modulus of the second largest eigenvalue.
    stationary : array, shape (n,)
    strings : int
        Number |R| of full strings.
    context : int
    P : array, shape (n, n)

    Examples
    --------
    Distance from the stationary law after n tokens, our bound of it, and the published one:

    >>> found = ms.depth.mixing(ms.depth.parity_model())
    >>> print(type(found).__name__, f"{found.distance(30):.3f} <= {found.ours(30):.3f} <= {found.published(30):.3f}")
    Mixing 0.175 <= 0.888 <= 0.998
    """

    epsilon: float
    dobrushin: float
    second: float
    stationary: NDArray[np.float64]
    strings: int
    context: int
    P: NDArray[np.float64]

    __repr__ = brief

    def published(self, n: ArrayLike) -> Any:
        """``(1 - 2 eps)^(floor(n / K) - 1)``, for n >= K: arXiv 2410.02724, proposition 3.4, for single entries."""
        return self._power(1 - 2 * self.epsilon, n)

    def ours(self, n: ArrayLike) -> Any:
        """``delta^(floor(n / K) - 1)``, for n >= K: in total variation."""
        return self._power(self.dobrushin, n)

    def _power(self, base: float, n: ArrayLike) -> Any:
        steps = whole(n, "n")
        if (steps < self.context).any():
            raise InputError(
                f"n is {n!r}.",
                cause=f"Until {self.context} tokens are spoken the context holds what it began with.",
                next="Pass numbers of tokens from the context length on.",
            )
        found = np.power(max(base, 0.0), steps // self.context - 1.0)
        return float(found) if found.ndim == 0 else found

    def distance(self, n: int) -> float:
        """The largest total variation to the stationary law after n tokens, over all starts."""
        return _gap(np.linalg.matrix_power(self.P, int(whole(n, "n"))), self.stationary)

    def tokens(self, distance: float = 0.01, most: int = 10**9) -> int | None:
        """Mixing time: the least n with total variation below `distance` from every start; None beyond `most`."""
        if not 0 < distance < 1:
            raise InputError(f"distance is {distance}.", cause="It is a total variation.", next="Pass 0 < x < 1.")
        powers = [self.P]
        while _gap(powers[-1], self.stationary) >= distance:
            if 2 ** len(powers) > most:
                return None
            powers.append(_stochastic(powers[-1] @ powers[-1]))
        n, here = 0, np.eye(len(self.P))
        for k in range(len(powers) - 1, -1, -1):  # the gap never grows, so the largest n that is not enough has digits
            ahead = here @ powers[k]
            if _gap(ahead, self.stationary) >= distance:
                n, here = n + 2**k, ahead
        return n + 1

    def tokens_by(self, rate: str, distance: float = 0.01) -> float:
        """Tokens after which a bound ("published" or "ours") falls to `distance`: ``K (ln distance / ln base + 1)``."""
        base = {"published": -2 * self.epsilon, "ours": self.dobrushin - 1}.get(rate)
        if base is None:
            raise InputError(f"rate is {rate!r}.", cause="There are two bounds.", next='Pass "published" or "ours".')
        with np.errstate(divide="ignore"):
            step = float(np.log1p(base))
        return np.inf if step == 0 else self.context * (float(np.log(distance)) / step + 1)


def mixing(chain: LanguageChain) -> Mixing:
    """Mixing of a language chain: constants of both bounds, spectrum, stationary law.

    Parameters
    ----------
    chain : LanguageChain
        With at most 2048 full strings.

    Returns
    -------
    Mixing

    Raises
    ------
    InputError
        If it is too large or has several closed classes.

    Notes
    -----
    Since eps <= T^-K, the published base is at least ``1 - 2 T^-K``: for a real vocabulary and context the bound never
    leaves 1. The coefficient delta satisfies ``delta <= 1 - |R| eps``, so ours is below it as soon as |R| > 2.

    Examples
    --------
    Tokens until the start is forgotten up to 1 %: in truth, by our bound, by the published one.

    >>> found = ms.depth.mixing(ms.depth.parity_model())
    >>> print(found.tokens(0.01), *(round(found.tokens_by(x, 0.01)) for x in ("ours", "published")))
    88 1053 64754
    """
    if len(chain.full) > DENSE:
        raise InputError(
            f"{chain!r} has {len(chain.full)} full strings.",
            cause=f"Powers are computed densely, up to {DENSE} of them.",
            next="Use a smaller context or vocabulary.",
        )
    law = chain.stationary()
    P = chain.P.toarray()
    QK = np.linalg.matrix_power(P, chain.context)[np.ix_(chain.full, chain.full)]
    delta = max(float(np.abs(QK[i:] - QK[i]).sum(axis=1).max()) / 2 for i in range(len(QK)))
    moduli = np.sort(np.abs(np.linalg.eigvals(P)))[::-1]
    second = float(moduli[1]) if len(moduli) > 1 else 0.0
    return Mixing(float(QK.min()), min(delta, 1.0), second, law, len(chain.full), chain.context, P)


def _gap(P: NDArray, law: NDArray) -> float:
    return float(np.abs(P - law).sum(axis=1).max()) / 2


def _stochastic(P: NDArray) -> NDArray[np.float64]:
    return P / P.sum(axis=1, keepdims=True)


def _stationary(P: NDArray) -> NDArray[np.float64]:
    """Stationary law of an irreducible matrix."""
    A = P.copy()
    n = len(A)
    for k in range(n - 1, 0, -1):
        A[:k, k] /= A[k, :k].sum()
        A[:k, :k] += np.outer(A[:k, k], A[k, :k])
    x = np.zeros(n)
    x[0] = 1.0
    for k in range(1, n):
        x[k] = x[:k] @ A[:k, k]
    return x / x.sum()
