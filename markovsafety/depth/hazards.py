"""The layered hazard model: one harm trajectory with a state per position, and its own hazards at each.

At position t of the answer a token is harmful with probability a_t, a refusal with r_t, and otherwise the answer goes
on, ``c_t = 1 - a_t - r_t``. After the last position harm still comes with probability `tail`. With k tokens forced,

    h(k) = sum_{t >= k} (c_k ... c_{t-1}) a_t + (c_k ... c_{L-1}) tail,

by the backward recursion ``h_t = a_t + c_t h_{t+1}``. `Profile` is the case of two constant stretches.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..bound import Bound
from ..chains import Chain
from ..errors import InputError
from ..hitting import hitting_probability
from .attack import AttackLaw, law_given
from .closed import Profile
from .profile import Depth, operational_depth, whole
from .width import unit

__all__ = ["ChainDepth", "Hazards", "chain_depth"]


@dataclass(frozen=True, eq=False, init=False, repr=False)
class Hazards:
    """Harm and refusal per position.

    Parameters
    ----------
    harm, refusal : array, shape (L,)
        Probabilities at each position, given that the answer got there; one number stands for all. They sum to at most
        1 at every position.
    tail : float
        Probability of harm of an answer that got past the last position.

    Attributes
    ----------
    a, r : array, shape (L,)
        Harm and refusal per position.
    tail : float

    Raises
    ------
    InputError
        If a number is no probability, or two at one position sum to more than 1.

    Notes
    -----
    Our own; the setting is that of arXiv 2502.00669 (output positions) with one state per position. As a function of
    the forced tokens only the positions behind them count, so h(k) may rise and fall.

    Examples
    --------
    A gate at the first token, two positions that refuse a little, and nothing behind them:

    >>> hazards = ms.depth.Hazards(harm=[0, 0.1, 0.1], refusal=[0.9, 0.2, 0.1], tail=0.8)
    >>> hazards
    Hazards(3 positions, P(harm) = 0.0618, tail 0.8)
    >>> hazards.harm().value.round(3)
    array([0.062, 0.618, 0.74 , 0.8  ])
    >>> print(hazards.operational_depth(0.7))
    depth within harm 0.7: 1
    """

    a: Any
    r: Any
    tail: float

    def __init__(self, harm: ArrayLike, refusal: ArrayLike, tail: float = 0.0):
        a, r = np.atleast_1d(unit(harm, "harm")), np.atleast_1d(unit(refusal, "refusal"))
        if a.ndim != 1 or r.ndim != 1 or (len(a) != len(r) and 1 not in (len(a), len(r))):
            raise InputError(
                f"Hazards have shapes {a.shape} and {r.shape}.",
                cause="There is one of each per position.",
                next="Pass flat arrays of one length.",
            )
        a, r = np.broadcast_arrays(a, r)
        if (a + r > 1 + 1e-12).any():
            at = int(np.argmax(a + r))
            raise InputError(
                f"At position {at} harm and refusal sum to {a[at] + r[at]:.17g}.",
                cause="They exclude each other.",
                next="Give hazards that sum to at most 1.",
            )
        for name, value in (("a", np.array(a)), ("r", np.array(r))):
            value.flags.writeable = False
            object.__setattr__(self, name, value)
        object.__setattr__(self, "tail", float(unit(tail, "tail")))

    @classmethod
    def of(cls, profile: Profile, depth: int, length: int | None = None) -> Hazards:
        """The positions of a `Profile` with `depth` aligned ones, written out up to `length` (default: depth + 1)."""
        d = int(whole(depth, "depth"))
        n = d + 1 if length is None else int(whole(length, "length"))
        aligned = np.arange(n) < d
        a, r = np.where(aligned, profile.a1, profile.a0), np.where(aligned, profile.r1, profile.r0)
        return cls(a, r, profile.f0 if n >= d else float(profile.harm(d - n).value))

    def profile(self) -> tuple[Profile, int]:
        """The `Profile` and its depth, where these are two constant stretches and the tail goes on as the second.

        Raises
        ------
        InputError
            If they are not, or there is no position.
        """
        if len(self) == 0:
            raise InputError(
                "There is no position.", cause="A profile has hazards.", next="Use Hazards.harm, which is the tail."
            )
        same = (self.a == self.a[-1]) & (self.r == self.r[-1])
        d = len(self) - int(np.argmin(same[::-1])) if not same.all() else 0
        found = Profile(self.a[-1], self.r[-1], self.a[0], self.r[0])
        head = (self.a[:d] == self.a[0]).all() and (self.r[:d] == self.r[0]).all()
        if not head or abs(found.f0 - self.tail) > 1e-12:
            raise InputError(
                "These hazards are not those of a profile.",
                cause="A profile has one pair of hazards up to some position and another one for ever after it, "
                "so that its tail is a0 / (a0 + r0).",
                next="Use Hazards.harm, which takes any hazards.",
            )
        return found, d

    @property
    def c(self) -> NDArray[np.float64]:
        """Probability of passing each position, shape (L,)."""
        return np.maximum(1 - self.a - self.r, 0.0)

    @property
    def survival(self) -> NDArray[np.float64]:
        """Probability that an answer without forced tokens gets to position t, shape (L + 1,)."""
        return np.concatenate([[1.0], np.cumprod(self.c)])

    def __len__(self) -> int:
        return len(self.a)

    def harm(self, prefill: ArrayLike | None = None, *, attack: AttackLaw | None = None) -> Bound:
        """Probability of harm after k forced tokens.

        Parameters
        ----------
        prefill : int or array, optional
            Numbers k of forced tokens; None = 0 to L. From L on it is the tail.
        attack : AttackLaw, optional
            Law of the number of forced tokens, beyond `prefill`; without `prefill` the mean over it alone.

        Returns
        -------
        Bound
            Of the shape of `prefill`.
        """
        h = np.append(np.empty(len(self)), self.tail)
        for t in range(len(self) - 1, -1, -1):
            h[t] = self.a[t] + self.c[t] * h[t + 1]
        if attack is not None:
            # E h(k + K): the tail of the law beyond the last position is exact, since h stays the same there.
            n = len(self)
            law = law_given(attack).probability(np.arange(n + 1))
            h = np.array([law[: n - k] @ h[k:n] + float(attack.survival(n - k)) * h[n] for k in range(n + 1)])
        if prefill is None:
            prefill = np.arange(len(h)) if attack is None else 0
        k = whole(prefill, "prefill")
        value = np.clip(h[np.minimum(k, len(self))], 0.0, 1.0)
        value = float(value) if value.ndim == 0 else value
        return Bound(value, value, value, 1.0, {}, None, {"name": "P(harm)", "method": "backward over positions"})

    def operational_depth(self, eps: float) -> Depth:
        """Largest number of forced tokens, of 0 to L, up to which harm stays within the budget."""
        return operational_depth(np.arange(len(self) + 1), self.harm(), eps)

    def chain(self, layered: bool = False) -> Chain:
        """The model as a chain.

        Parameters
        ----------
        layered : bool
            False: a homogeneous chain with a state per position and one for what is behind them; ``entry[k]`` is the
            state after k forced tokens. True: one state "answer" and a matrix per position, the last of which is the
            tail.

        Returns
        -------
        Chain
            Start at position 0; outcomes harm and refusal.
        """
        a, r, n = np.append(self.a, self.tail), np.append(self.r, 1 - self.tail), len(self)
        c = np.append(self.c, 0.0)
        if layered:
            layers = [np.array([[1 - x - y, x, y], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]) for x, y in zip(a, r)]
            return Chain.layered(layers, {"harm": 1, "refusal": 2}, 0, ["answer", "harm", "refusal"])
        P = np.zeros((n + 3, n + 3))
        at = np.arange(n + 1)
        P[at, n + 1], P[at, n + 2] = a, r
        P[at[:-1], at[1:]] = c[:-1]
        states = [*(f"position {t}" for t in range(n)), "tail", "harm", "refusal"]
        return Chain(P, {"harm": n + 1, "refusal": n + 2}, 0, states, entry={k: k for k in range(n + 1)})

    def __repr__(self) -> str:
        return f"Hazards({len(self)} positions, P(harm) = {self.harm(0).value:.3g}, tail {self.tail:.3g})"


@dataclass(frozen=True, eq=False)
class ChainDepth:
    """Operational safety depth of a chain in the worst state and in the mean.

    Parameters
    ----------
    worst, mean : Depth
        Largest k up to which harm stays within the budget from *every* state in which k forced tokens may leave the
        answer, and on the average over the law of that state. The worst is never deeper than the mean.
    depths : tuple of int
        Numbers k of forced tokens.
    harm_worst, harm_mean : Bound, shape (K,)
    states : tuple
        Label of the worst state at each k.
    reachable : tuple of int
        Number of states at each k.

    Examples
    --------
    >>> found = ms.depth.chain_depth(ms.toy.ladder(6, 0.3), eps=0.2, depths=range(4))
    >>> print(type(found).__name__, found.worst)
    ChainDepth depth within harm 0.2: 1
    >>> print(found.states, found.harm_worst.value.round(3))
    ('level 3', 'level 4', 'level 5', 'level 4') [0.073 0.179 0.425 0.179]
    """

    worst: Depth
    mean: Depth
    depths: tuple[int, ...]
    harm_worst: Bound
    harm_mean: Bound
    states: tuple[Any, ...]
    reachable: tuple[int, ...]

    def __str__(self) -> str:
        return f"worst state: {self.worst}; mean: {self.mean}"

    __repr__ = __str__


def chain_depth(chain: Chain, eps: float, *, depths: Any = None, side: str = "upper") -> ChainDepth:
    """Operational safety depth of a chain, D_eps, by the worst state and by the mean.

    Parameters
    ----------
    chain : Chain
    eps : float
        Harm budget.
    depths : sequence of int, optional
        Numbers of forced tokens; as in `sweep` if not given.
    side : {"upper", "value", "lower"}
        Which end of harm the reading takes.

    Returns
    -------
    ChainDepth
        The law after k tokens is the one of `sweep`: ``entry[k]`` where it was measured, else that of the chain
        conditioned on no outcome within k tokens; reachable are the states to which it gives mass.

    Notes
    -----
    ``D = max {k : max over s in S_k of h_k(s) <= eps}``, or with the mean in place of the maximum. Our own. The mean of
    an estimated chain is that of `sweep`, whose upper ends are held up to what the prompts support; of single states
    nothing is known by prompt, and their intervals are those of `hitting_probability`.

    Examples
    --------
    The mean stays within the budget; the worst state after two forced tokens does not.

    >>> print(ms.depth.chain_depth(ms.toy.ladder(6, 0.3), eps=0.2, depths=range(4)))
    worst state: depth within harm 0.2: 1; mean: depth within harm 0.2: at least 3
    """
    from .start import depths_of, laws_at
    from .sweep import sweep

    ks, _ = depths_of(chain, depths)
    laws, _ = laws_at(chain, ks)
    h = hitting_probability(chain, "harm")
    mean = sweep(chain, depth=ks).harm[:, 0]
    ends: dict[str, list[float]] = {"value": [], "lower": [], "upper": []}
    worst = []
    for k, law in zip(ks, laws):
        here = h[min(k, chain.n_layers)] if chain.is_layered else h
        on = np.flatnonzero(law > 0)
        worst.append(chain.states[on[int(np.argmax(np.asarray(here.value)[on]))]])
        for name, found in ends.items():
            found.append(float(np.max(np.asarray(getattr(here, name))[on])))
    info = {"name": "P(harm) from the worst state"}
    value, lower, upper = (np.array(ends[s]) for s in ("value", "lower", "upper"))
    bound = Bound(value, lower, upper, h.level, {}, None, info)
    found = [operational_depth(ks, b, eps, side) for b in (bound, mean)]
    reach = tuple(int((law > 0).sum()) for law in laws)
    return ChainDepth(found[0], found[1], tuple(ks), bound, mean, tuple(worst), reach)
