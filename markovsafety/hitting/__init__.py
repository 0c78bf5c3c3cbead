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
from . import core, intervals, times
from .critical import Critical, critical
from .sensitivity import attribute, sensitivity

__all__ = [
    "Critical",
    "attribute",
    "committor",
    "critical",
    "hitting_probability",
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
        outcome after the last layer.
    method : {"auto", "layered", "elimination", "sparse", "exact", "symbolic"}
        What to do with states that lie on cycles; "auto" eliminates small classes without subtraction and factors large
        ones, falling back to elimination if the proof fails. "layered" insists that there is no cycle. "exact" computes
        with rationals, "symbolic" by the elimination that `symbolic.rational` uses for formulas in named parameters. A
        layered chain has no cycles and is always done by recursion, unless "exact"; it is never "symbolic".
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
        numbers as ``expression``. ``at_start`` is the mean over the start law.

    Raises
    ------
    InputError
        If the target is unknown or empty, the method does not exist or does not fit the chain, or level is not in
        (0, 1).
    UntrustedError
        If no enclosure could be proven; `partial` is the Bound.
    """
    check_level(level)
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
        Two disjoint sets.
    method, certify, level
        As in `hitting_probability`.

    Returns
    -------
    Bound
        Shape (n,), layered (L + 1, n). Where neither is ever hit it is 0.

    Raises
    ------
    InputError
        If a and b overlap, or one is unknown or empty.
    """
    check_level(level)
    w = core.walk(chain, b, a)
    return intervals.bound_of(w, core.probability(w, method, certify), level)


def hitting_time(
    chain: Chain, target: Any = None, *, given: bool = False, reward: ArrayLike | None = None, level: float = 0.95
) -> Bound:
    """Expected number of tokens, or accumulated reward, before the first hit.

    Parameters
    ----------
    chain : Chain
    target : as in `hitting_probability`, optional
        None: any outcome; on a layered chain the end of the last layer counts as one.
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
        Tokens, shape (n,), layered (L + 1, n); 0 on the target. On an estimated chain a state's interval is that of the
        mean of as many times as prompts had rollouts through it; at the start it is the variance between prompts,
        linearised. Where no two times differ, nothing bounds their mean from above.

    Raises
    ------
    InputError
        If the target is unknown or empty, or the reward has another shape than (n,).
    UntrustedError
        If no enclosure could be proven; `partial` is the Bound.
    """
    check_level(level)
    core.check_chain(chain)
    if target is None:
        every = (*chain.outcomes, *(["truncated"] if chain.is_layered and "truncated" not in chain.outcomes else []))
        w = core.walk(chain, every)
        w = core.Walk(chain, w.hit, w.avoid, float(chain.is_layered), "any outcome", w.outcomes)
    else:
        w = core.walk(chain, target)
    return times.expected_time(w, reward, given, level)


def visits(chain: Chain, *, level: float = 0.95) -> Bound:
    """Expected number of visits of every state from the start law, time 0 counted.

    Parameters
    ----------
    chain : Chain
        With a start law.
    level : float
        Confidence level of the interval of an estimated chain.

    Returns
    -------
    Bound
        Shape (n,); for an absorbing state the probability of ending there; inf for a state of a class that is never
        left (other than a single absorbing state) if it can be reached. Layered: shape (L + 1, n), the probability of
        being in the state at that position; for a state that no layer leaves, of arriving there at that position, so
        that the sum over positions means the same as for a homogeneous chain. Rows of outcomes that move are used as
        given.

    Raises
    ------
    InputError
        If the chain has no start law.
    """
    check_level(level)
    core.check_chain(chain)
    return times.expected_visits(chain, level)
