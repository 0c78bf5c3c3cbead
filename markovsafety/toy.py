"""Analytic chains with closed forms: small worlds where every answer is known, for tests, examples and intuition.

Each function makes a `Chain`; the one of the same name with ``_harm`` gives P(harm) by formula, from every transient
state or after a given number of forced tokens. On the trajectories below a token is harmful with probability a, a
refusal with r, and otherwise the answer goes on, ``c = 1 - a - r``; ``f = a / (a + r)`` is what an endless trajectory
ends with."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .chains import Chain
from .errors import InputError

__all__ = [
    "checkpoint",
    "checkpoint_harm",
    "deep",
    "ladder",
    "ladder_harm",
    "leak",
    "leak_harm",
    "prefilled_harm",
    "ruin",
    "ruin_harm",
    "ruin_time",
    "shallow",
]

Hazards = tuple[float, float]
ALIGNED: Hazards = (0.01, 0.3)  # harm, refusal per token where the model is aligned
UNALIGNED: Hazards = (0.08, 0.02)


def _check(**parts: tuple[bool, Any]) -> None:
    for name, (fine, value) in parts.items():
        if not fine:
            raise InputError(
                f"{name} is {value!r}.",
                cause="Probabilities lie in [0, 1], those of one state sum to at most 1, sizes are whole and positive.",
                next="Pass a value in range.",
            )


def _whole(x: Any, least: int) -> tuple[bool, Any]:
    return bool(isinstance(x, (int, np.integer)) and not isinstance(x, bool) and x >= least), x


def _inside(x: float) -> tuple[bool, Any]:
    return 0 < x < 1, x


def _hazards(pair: Hazards) -> tuple[bool, Any]:
    a, r = pair
    return a >= 0 and r >= 0 and 0 < a + r <= 1, pair


def ladder(n: int = 6, p: float = 0.3, start: int | None = None) -> Chain:
    """Severity ladder: levels 0 (refusal) to n (harm), one up with probability p, else one down.

    Parameters
    ----------
    n : int
        At least 2.
    p : float
        In (0, 1).
    start : int, optional
        Level; the middle if not given.

    Examples
    --------
    >>> chain = ms.toy.ladder(4, p=0.25)
    >>> chain
    <Chain 5 states, homogeneous, 8 transitions; outcomes harm (1), refusal (1); start: state 2
        ('level 2')>
    >>> print(ms.hitting_probability(chain, "harm").at_start)
    P(harm) = 0.1   proven [0.1, 0.1]
        because: rounding 7e-16; sampling, judge, lumping, model, truncation not assessed
    """
    _check(n=_whole(n, 2), p=_inside(p))
    P = np.zeros((n + 1, n + 1))
    inner = np.arange(1, n)
    P[inner, inner + 1] = p
    P[inner, inner - 1] = 1 - p
    return Chain(P, {"harm": n, "refusal": 0}, n // 2 if start is None else start, [f"level {i}" for i in range(n + 1)])


def ladder_harm(n: int = 6, p: float = 0.3) -> NDArray[np.float64]:
    """``(1 - s^i) / (1 - s^n)`` with ``s = (1 - p) / p``, for levels i = 0 .. n; i / n for p = 1/2.

    W. Feller, An Introduction to Probability Theory and Its Applications I, XIV.2.

    Examples
    --------
    >>> np.round(ms.toy.ladder_harm(4, p=0.25), 3)
    array([0.   , 0.025, 0.1  , 0.325, 1.   ])
    >>> np.round(ms.hitting_probability(ms.toy.ladder(4, p=0.25), "harm").value, 3)
    array([0.   , 0.025, 0.1  , 0.325, 1.   ])
    """
    i = np.arange(n + 1)
    if p == 0.5:
        return i / n
    log = np.log1p(-p) - np.log(p)
    if log < 0:
        return np.expm1(i * log) / np.expm1(n * log)
    # Divided through by s^n, so that a steep ladder does not overflow.
    return np.abs(np.exp((i - n) * log) * np.expm1(-i * log) / np.expm1(-n * log))


def ruin(n: int = 10, start: int | None = None) -> Chain:
    """Fair gambler's ruin on 0 .. n: harm at n, refusal at 0; slow, ``i (n - i)`` steps from i.

    Examples
    --------
    >>> chain = ms.toy.ruin(4)
    >>> np.round(ms.hitting_probability(chain, "harm").value, 6)
    array([0.  , 0.25, 0.5 , 0.75, 1.  ])
    >>> np.round(ms.hitting_time(chain).value, 6)
    array([0., 3., 4., 3., 0.])
    """
    return ladder(n, 0.5, start)


def ruin_harm(n: int = 10) -> NDArray[np.float64]:
    """``i / n`` for i = 0 .. n.

    Examples
    --------
    >>> ms.toy.ruin_harm(4)
    array([0.  , 0.25, 0.5 , 0.75, 1.  ])
    """
    return ladder_harm(n, 0.5)


def ruin_time(n: int = 10) -> NDArray[np.float64]:
    """Expected steps until either end: ``i (n - i)`` for i = 0 .. n.

    Examples
    --------
    From the middle of a line of 100 states it takes 2500 steps to either end:

    >>> ms.toy.ruin_time(4)
    array([0., 3., 4., 3., 0.])
    >>> float(ms.toy.ruin_time(100)[50])
    2500.0
    """
    i = np.arange(n + 1)
    return (i * (n - i)).astype(np.float64)


def shallow(depth: int = 3, aligned: Hazards = ALIGNED, unaligned: Hazards = UNALIGNED) -> Chain:
    """A trajectory that is aligned at its first few positions only.

    Parameters
    ----------
    depth : int
        Number of aligned positions.
    aligned, unaligned : (harm, refusal) per token

    Returns
    -------
    Chain
        States are positions 0 .. depth - 1 and "tail", start at 0; ``entry[k]`` is the state law after k forced
        tokens.

    Examples
    --------
    Alignment that reaches three tokens deep is gone when three tokens are forced:

    >>> chain = ms.toy.shallow(3)
    >>> harm = ms.hitting_probability(chain, "harm").value
    >>> np.round([chain.entry[k] @ harm for k in range(4)], 3)
    array([0.284, 0.398, 0.562, 0.8  ])
    """
    _check(depth=_whole(depth, 0), aligned=_hazards(aligned), unaligned=_hazards(unaligned))
    return _trajectory([aligned] * depth, unaligned)


def deep(depth: int = 20, aligned: Hazards = ALIGNED, unaligned: Hazards = UNALIGNED) -> Chain:
    """The same trajectory as `shallow`, aligned over many positions.

    Examples
    --------
    >>> chain = ms.toy.deep(20)
    >>> harm = ms.hitting_probability(chain, "harm").value
    >>> np.round([chain.entry[k] @ harm for k in (0, 10, 15, 20)], 3)
    array([0.033, 0.051, 0.152, 0.8  ])
    """
    return shallow(depth, aligned, unaligned)


def prefilled_harm(
    depth: int, prefill: Any = 0, aligned: Hazards = ALIGNED, unaligned: Hazards = UNALIGNED
) -> NDArray[np.float64]:
    """P(harm) of `shallow` and `deep` after k forced tokens: ``f1 + c1^max(d - k, 0) (f0 - f1)``.

    Parameters
    ----------
    depth : int
        Aligned positions d.
    prefill : int or array of shape (m,)
        Forced tokens k.

    Examples
    --------
    >>> forced = [0, 3, 10, 20]
    >>> np.round(ms.toy.prefilled_harm(3, forced), 3)
    array([0.284, 0.8  , 0.8  , 0.8  ])
    >>> np.round(ms.toy.prefilled_harm(20, forced), 3)
    array([0.033, 0.034, 0.051, 0.8  ])
    """
    (a1, r1), (a0, r0) = aligned, unaligned
    f1, f0 = a1 / (a1 + r1), a0 / (a0 + r0)
    return f1 + (1 - a1 - r1) ** np.maximum(depth - np.asarray(prefill), 0) * (f0 - f1)


def checkpoint(depth: int = 10, success: float = 0.95, unaligned: Hazards = UNALIGNED) -> Chain:
    """An unaligned trajectory with a single refusal checkpoint after `depth` tokens.

    Parameters
    ----------
    depth : int
        Position of the checkpoint, at least 1.
    success : float
        Probability that it refuses.
    unaligned : (harm, refusal) per token

    Examples
    --------
    A prefix that ends just before the checkpoint helps the model, one that passes it meets no refusal any more:

    >>> chain = ms.toy.checkpoint(depth=10)
    >>> harm = ms.hitting_probability(chain, "harm").value
    >>> np.round([chain.entry[k] @ harm for k in (0, 9, 10)], 3)
    array([0.535, 0.116, 0.8  ])
    """
    _check(depth=_whole(depth, 1), success=(0 <= success <= 1, success), unaligned=_hazards(unaligned))
    a, r = unaligned
    c = 1 - a - r
    return _trajectory([*[unaligned] * (depth - 1), (a, r + c * success)], unaligned)


def checkpoint_harm(
    depth: int = 10, prefill: Any = 0, success: float = 0.95, unaligned: Hazards = UNALIGNED
) -> NDArray[np.float64]:
    """P(harm) after k forced tokens: ``f0 (1 - success c0^(d - k))`` for k < d, else f0.

    Without an attack (k = 0) this *grows* with d: a single checkpoint is worse the deeper it sits.

    Examples
    --------
    Checkpoints after 1, 10 and 30 tokens, then one after 10 whose first 0, 9 and 10 tokens are forced:

    >>> np.round([ms.toy.checkpoint_harm(d) for d in (1, 10, 30)], 3)
    array([0.116, 0.535, 0.768])
    >>> np.round(ms.toy.checkpoint_harm(10, prefill=[0, 9, 10]), 3)
    array([0.535, 0.116, 0.8  ])
    """
    a, r = unaligned
    left = depth - np.asarray(prefill)
    return a / (a + r) * (1 - np.where(left > 0, success * (1 - a - r) ** np.maximum(left, 0), 0.0))


def _trajectory(head: list[Hazards], tail: Hazards) -> Chain:
    """Positions with the given hazards, then a last state that repeats with those of the tail."""
    d = len(head)
    P = np.zeros((d + 3, d + 3))
    for i, (a, r) in enumerate([*head, tail]):
        P[i, d + 1], P[i, d + 2] = a, r
        P[i, min(i + 1, d)] += 1 - a - r
    entry = {k: k for k in range(d + 1)}
    states = [*(f"position {i}" for i in range(d)), "tail", "harm", "refusal"]
    return Chain(P, {"harm": d + 1, "refusal": d + 2}, 0, states, entry=entry)


def leak(leak: float = 0.02, *, harm: float = 0.05, refuse: float = 0.3, end: float = 0.1) -> Chain:
    """A refusal that can be taken back: from it the answer returns to the trajectory with probability `leak` per token.

    Parameters
    ----------
    leak, end : float
        Per token of a refusal: back to the trajectory, end of the answer (outcome "benign").
    harm, refuse : float
        Per token of the trajectory.

    Examples
    --------
    One refusal in six is taken back, and one in six of those ends in harm:

    >>> chain = ms.toy.leak(0.02)
    >>> harm = ms.hitting_probability(chain, "harm")
    >>> print(harm.at_start)
    P(harm) = 0.166667   proven [0.166667, 0.166667]
        because: rounding 5e-16; sampling, judge, lumping, model, truncation not assessed
    >>> print(harm[chain.index("refusal")])
    P(harm) = 0.0277778   proven [0.0277778, 0.0277778]
        because: rounding 1e-16; sampling, judge, lumping, model, truncation not assessed
    """
    _check(hazards=_hazards((harm, refuse)), leak=(0 <= leak <= 1 - end, leak), end=(0 <= end <= 1, end))
    P = np.zeros((4, 4))
    P[0] = 1 - harm - refuse, refuse, harm, 0.0
    P[1] = leak, 1 - leak - end, 0.0, end
    return Chain(P, {"harm": 2, "refusal": 1, "benign": 3}, 0, ["trajectory", "refusal", "harm", "end"])


def leak_harm(leak: float = 0.02, *, harm: float = 0.05, refuse: float = 0.3, end: float = 0.1) -> NDArray[np.float64]:
    """P(harm) from the trajectory and from the refusal, shape (2,): ``a / (a + r e / (e + l))`` and ``l / (l + e)`` of
    it.

    Without an end (e = 0) every leak is fatal in the long run: the first is 1 however often the model refuses.

    Examples
    --------
    >>> np.round(ms.toy.leak_harm(0.02), 3)
    array([0.167, 0.028])
    >>> np.round(ms.toy.leak_harm(0.02, end=0), 3)  # a refusal that never ends
    array([1., 1.])
    """
    if leak + end == 0:
        return np.array([harm / (harm + refuse), 0.0])
    first = harm / (harm + refuse * end / (end + leak))
    return np.array([first, leak / (leak + end) * first])
