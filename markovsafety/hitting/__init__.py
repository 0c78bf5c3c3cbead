"""Numbers from a chain: probabilities and times of a first hit, visits, sensitivities, each with what it is worth.

The front doors are here; each picks a method and returns a `Bound`.

Mathematical preamble. Let T be the target. The hitting probability h is the smallest non-negative solution of ``h = 1``
on T and ``h = P h`` elsewhere. On the states that cannot reach T it is 0, and the graph says which those are; on the
rest the equation has exactly one solution. Written with the rates of leaving, ``sum_j p_ij (h_j - h_i) = 0`` over j !=
i, the diagonal drops out, so that a state that almost never leaves costs no digits. Chains with one matrix per position
need only ``h_t = P_t h_(t+1)``. See J. R. Norris, Markov Chains (1997), theorem 1.3.2; J. G. Kemeny and J. L. Snell,
Finite Markov Chains (1960), chapter III."""

from __future__ import annotations

from typing import Any

from numpy.typing import ArrayLike

from ..bound import Bound, check_level
from ..chains import Chain
from . import core, intervals, spread, times
from .critical import Critical, critical
from .distribution import Distribution, hitting_distribution
from .sensitivity import Factored, attribute, sensitivity
from .several import each_start, each_target, named_targets

__all__ = [
    "Critical",
    "Distribution",
    "Factored",
    "attribute",
    "committor",
    "critical",
    "hitting_distribution",
    "hitting_probability",
    "hitting_spread",
    "hitting_time",
    "sensitivity",
    "visits",
]


def hitting_probability(
    chain: Chain, target: Any, *, method: str = "auto", certify: bool = True, level: float = 0.95
) -> Bound:
    """Probability of ever hitting a target, from every state.

    Parameters
    ----------
    chain : Chain
    target : str, label, int, collection of these, or bool array of shape (n,)
        An outcome name, several of them, states, or a mask. "truncated" on a layered chain is the mass that is in no
        outcome after the last layer. Or a dict from names to targets, for several answers side by side.
    method : {"auto", "layered", "elimination", "sparse", "device", "exact", "symbolic"}
        What to do with states that lie on cycles; "auto" eliminates small classes without subtraction and factors or
        iterates on large ones, falling back to elimination if the proof fails. "layered" insists that there is no
        cycle. "device" computes in JAX and proves on the host. "exact" computes with rationals, "symbolic" by the
        elimination that `symbolic.rational` uses for formulas in named parameters. A layered chain has no cycles and
        is always done by recursion, unless "exact" or "device"; it is never "symbolic".
    certify : bool
        Prove an enclosure of every value (rounding included).
    level : float
        Confidence level of the interval of an estimated chain.

    Returns
    -------
    Bound
        Probabilities in [0, 1], shape (n,), layered (L + 1, n). 1 on the target, exactly 0 where it cannot be reached.
        Without evidence [lower, upper] is the proven enclosure (level 1); on an estimated chain it also covers
        sampling, clustered by prompt: at a state, the trials are what the rollouts through it are worth, and an event
        that was never seen is not impossible. `info`: name, method, why, certified, and with
        ``method="exact"`` or "symbolic" the fractions as ``exact`` (also `Bound.exact`), with "symbolic" also sympy
        numbers as ``expression``. ``at_start`` is the mean over the start law. A dict of targets adds a last axis
        ``outcome``, in the order of ``info["targets"]``; every column is the answer of the single call, which costs
        less this way because the factors of the chain are used again.

    Raises
    ------
    InputError
        If the target is unknown or empty, the method does not exist or does not fit the chain, or level is not in
        (0, 1).
    UntrustedError
        If no enclosure could be proven; `partial` is the Bound.

    Examples
    --------
    >>> harm = ms.hitting_probability(ms.toy.shallow(3), "harm")
    >>> print(harm.at_start)
    P(harm) = 0.284468   proven [0.284468, 0.284468]
        because: rounding 9e-16; sampling, judge, lumping, model, truncation not assessed
    >>> np.round(harm.value[:4], 3)  # from positions 0, 1, 2, and behind them
    array([0.284, 0.398, 0.562, 0.8  ])

    However rarely a refusal is taken back, no digit is lost; and rationals are exact:

    >>> print(ms.hitting_probability(ms.toy.leak(1e-15), "harm")[1])
    P(harm) = 1.42857e-15   proven [1.42857e-15, 1.42857e-15]
        because: rounding 1e-31; sampling, judge, lumping, model, truncation not assessed
    >>> ms.hitting_probability(ms.toy.ruin(5), "harm", method="exact").exact[1]
    Fraction(1, 5)
    """
    check_level(level)
    if (targets := named_targets(target)) is not None:
        one = lambda t: hitting_probability(chain, t, method=method, certify=certify, level=level)  # noqa: E731
        return each_target(targets, one)
    w = core.walk(chain, target)
    return intervals.bound_of(w, core.probability(w, method, certify), level)


def committor(
    chain: Chain, a: Any, b: Any, *, method: str = "auto", certify: bool = True, level: float = 0.95
) -> Bound:
    """Probability of hitting b before a, from every state: 0 on a, 1 on b.

    Parameters
    ----------
    chain : Chain
    a, b : targets, as in `hitting_probability`
        Two disjoint sets; b may be a dict of several targets, each of them against a.
    method, certify, level
        As in `hitting_probability`.

    Returns
    -------
    Bound
        Shape (n,), layered (L + 1, n); several targets in a last axis ``outcome``. Where neither is ever hit it is 0.

    Raises
    ------
    InputError
        If a and b overlap, or one is unknown or empty.

    Examples
    --------
    From the middle of a ladder: harm before refusal, and harm before the level next to refusal.

    >>> chain = ms.toy.ladder(4, p=0.25)
    >>> print(ms.committor(chain, "refusal", "harm").at_start)
    P(harm before refusal) = 0.1   proven [0.1, 0.1]
        because: rounding 7e-16; sampling, judge, lumping, model, truncation not assessed
    >>> print(ms.committor(chain, "level 1", "harm").at_start)
    P(harm before level 1) = 0.0769231   proven [0.0769231, 0.0769231]
        because: rounding 3e-16; sampling, judge, lumping, model, truncation not assessed
    """
    check_level(level)
    if (targets := named_targets(b)) is not None:
        return each_target(targets, lambda t: committor(chain, a, t, method=method, certify=certify, level=level))
    w = core.walk(chain, b, [] if a is None else a)
    return intervals.bound_of(w, core.probability(w, method, certify), level)


def hitting_time(
    chain: Chain, target: Any = None, *, given: bool = False, reward: ArrayLike | None = None, level: float = 0.95
) -> Bound:
    """Expected number of tokens, or accumulated reward, before the first hit.

    Parameters
    ----------
    chain : Chain
    target : as in `hitting_probability`, optional
        None: any outcome; on a layered chain the end of the last layer counts as one. A dict: several targets.
    given : bool
        False: the plain expectation, inf where a hit is not certain. True: E[time | hit], nan where the target cannot
        be hit; at the start law, the expectation over all rollouts that hit.
    reward : array, shape (n,), optional
        Earned by every step from a state; 1 (a token) if not given.
    level : float
        Confidence level of the interval of an estimated chain.

    Returns
    -------
    Bound
        Tokens, shape (n,), layered (L + 1, n), several targets in a last axis ``outcome``; 0 on the target. On an
        estimated chain a state's interval is that of the mean of as many times as prompts had rollouts through it; at
        the start it is the variance between prompts, linearised. Where no two times differ, nothing bounds their mean
        from above.

    Raises
    ------
    InputError
        If the target is unknown or empty, or the reward has another shape than (n,).
    UntrustedError
        If no enclosure could be proven; `partial` is the Bound.

    Examples
    --------
    >>> chain = ms.toy.shallow(3)
    >>> print(ms.hitting_time(chain).at_start)
    E[tokens to any outcome] = 5.45119   proven [5.45119, 5.45119]
        because: rounding 3e-14; sampling, judge, lumping, model, truncation not assessed
    >>> print(ms.hitting_time(chain, "harm", given=True).at_start)
    E[tokens to harm | hit] = 12.144   proven [12.144, 12.144]
        because: rounding 1e-13; sampling, judge, lumping, model, truncation not assessed
    >>> print(ms.hitting_time(chain, "harm").at_start)  # some answers never come to it
    E[tokens to harm] = inf   proven [inf, inf]
        because: rounding 0; sampling, judge, lumping, model, truncation not assessed
    """
    check_level(level)
    if (targets := named_targets(target)) is not None:
        return each_target(targets, lambda t: hitting_time(chain, t, given=given, reward=reward, level=level))
    return times.expected_time(times.ending(chain, target), reward, given, level)


def hitting_spread(chain: Chain, target: Any = None, *, given: bool = False, reward: ArrayLike | None = None) -> Bound:
    """Standard deviation of the number of tokens, or of the accumulated reward, before the first hit.

    Parameters
    ----------
    chain, target, given, reward
        As in `hitting_time`.

    Returns
    -------
    Bound
        Tokens, shape (n,), layered (L + 1, n), several targets in a last axis ``outcome``; 0 on the target. Inf (with
        ``given=True``: nan) where `hitting_time` is. ``at_start`` is the deviation of one answer from the start law,
        the variance between the states it may start in included. The enclosure covers rounding; sampling is not
        assessed.

    Raises
    ------
    InputError
        If the target is unknown or empty, or the reward has another shape than (n,).
    UntrustedError
        If no enclosure could be proven; `partial` is the Bound.

    Notes
    -----
    The variance V solves ``V_i = sum_j p_ij (V_j + (m_j + r_i - m_i)^2)``, m the mean (law of total variance; given the
    hit, p is conditioned to hit). Every term is non-negative, so nothing cancels where the deviation is small against
    the mean, as ``E[time^2] - E[time]^2`` does.

    Examples
    --------
    From the middle of a fair line, 25 tokens to either end, give or take 20:

    >>> chain = ms.toy.ruin(10)
    >>> print(ms.hitting_time(chain).at_start)
    E[tokens to any outcome] = 25   proven [25, 25]
        because: rounding 1e-13; sampling, judge, lumping, model, truncation not assessed
    >>> print(ms.hitting_spread(chain).at_start)
    sd[tokens to any outcome] = 20   proven [20, 20]
        because: rounding 9e-13; sampling, judge, lumping, model, truncation not assessed
    """
    if (targets := named_targets(target)) is not None:
        return each_target(targets, lambda t: hitting_spread(chain, t, given=given, reward=reward))
    return spread.deviation(times.ending(chain, target), reward, given)


def visits(chain: Chain, start: Any = None, *, level: float = 0.95) -> Bound:
    """Expected number of visits of every state from the start law, time 0 counted.

    Parameters
    ----------
    chain : Chain
        With a start law, unless `start` is given.
    start : int, label or law of shape (n,), or several: rows of an array (s, n), or a list; optional
        Where to start instead. A flat sequence of whole numbers is a list of indices, of floats a law.
    level : float
        Confidence level of the interval of an estimated chain.

    Returns
    -------
    Bound
        Shape (n,); for an absorbing state the probability of ending there; inf for a state of a class that is never
        left (other than a single absorbing state) if it can be reached. Layered: shape (L + 1, n), the probability of
        being in the state at that position; for a state that no layer leaves, of arriving there at that position, so
        that the sum over positions means the same as for a homogeneous chain. Rows of outcomes that move are used as
        given. Several starts stand in a new first axis.

    Raises
    ------
    InputError
        If there is no start law, or `start` is no start.

    Examples
    --------
    >>> chain = ms.toy.shallow(2)
    >>> for state, n in zip(chain.states, ms.visits(chain).value):
    ...     print(f"{state}: {n:.3f}")
    position 0: 1.000
    position 1: 0.690
    tail: 4.761
    harm: 0.398
    refusal: 0.602
    """
    check_level(level)
    core.check_chain(chain)
    if start is None and chain.start is None:
        raise core.without_start("The number of visits")
    return each_start(chain, start, lambda law: times.expected_visits(chain, law, level))
