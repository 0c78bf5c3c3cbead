"""Standard deviation of the time, or reward, before a hit, from a sum in which nothing cancels.

The law of total variance over the first step gives ``V_i = sum_j p_ij (V_j + (m_j + r_i - m_i)^2)``: the mean of what a
step changes is 0, so its square is the variance that the step adds. Conditioned to hit, the moves have the
probabilities ``p_ij h_j / h_i``, and ``h V`` solves the same equation with the gain ``sum_j p_ij h_j (m_j + r_i -
m_i)^2``. The means come with proven ends, so every difference has an interval, and so has its square."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..bound import Bound
from .certify import TINY, gamma, row_sums, widen
from .core import Answer, Walk, duration, given_hit, law_mean
from .intervals import proven, refuse_unproven
from .rates import rates_of
from .times import as_reward, moments, ratio
from .waiting import in_tokens, waiting

__all__ = ["deviation"]

ROOM = 2.0**-51  # more than two roundings
LARGEST = float(np.finfo(np.float64).max)  # a lower end that overflowed is at least this, and may still be made small
WIDE = 1e-9  # relative width of a variance above which the second moment is asked as well


def deviation(w: Walk, reward: Any, given: bool) -> Bound:
    """See `markovsafety.hitting.hitting_spread`."""
    chain, r = w.chain, as_reward(reward, w.chain.n_states)
    if not chain.is_layered:
        in_tokens(rates_of(chain), w.moving)
    u, h = moments(w, r, given)
    m = ratio(u.X, h.X) if given else u.X
    mean = np.where(w.hit[:, None] | np.isnan(m) | np.isinf(m[..., :1]), 0.0, m)
    with np.errstate(invalid="ignore", over="ignore"):  # what was not proven has no ends; it is refused below
        gain = _layered_gain(w, r, mean, h.X) if chain.is_layered else _gain(w, r, mean, h.X)
        found = given_hit(w, gain) if given else duration(w, gain[:-1] if chain.is_layered else gain)
    V = np.where(w.hit[:, None], 0.0, found.X)
    if not chain.is_layered and (r >= 0).all() and _wide(V):
        V = _by_moments(w, r, (u.X, h.X), mean, V, given)
    name = f"sd[{'tokens' if reward is None else 'reward'} to {w.name}{' | hit' if given else ''}]"
    info: dict[str, Any] = {"name": name, "method": u.method, "why": u.why}
    if chain.evidence is not None:
        info["sampling"] = "not assessed: it is the deviation of the chain as estimated"
    start = proven(_root(_start(w, V, mean, u.X, h.X, given)), info) if chain.start is not None else None
    X = _root(ratio(V, h.X) if given else V)
    failed = Answer(X, u.method, u.why, None, (*u.failed, *h.failed, *found.failed))
    return refuse_unproven(failed, proven(X, info, start))


def _square(low: NDArray, value: NDArray, high: NDArray) -> NDArray:
    """Squares of differences in [low, high], as columns; 0 is among them if the ends differ in sign."""
    near = np.maximum(np.maximum(low, -high), 0.0)
    far = np.maximum(np.abs(low), np.abs(high))
    return np.stack([value**2, np.minimum(near**2, LARGEST), far**2], axis=-1)


def _change(after: NDArray, before: NDArray, r: NDArray | float) -> NDArray:
    """Squared ``after + r - before`` of values with ends; the two roundings of each end are moved outward."""
    value = after[..., 0] - before[..., 0] + r
    ends = []
    for a, b, sign in ((1, 2, -1.0), (2, 1, 1.0)):
        first = after[..., a] - before[..., b]
        end = first + r
        ends.append(end + sign * ROOM * (np.abs(first) + np.abs(end)))
    return _square(ends[0], value, ends[1])


def _gain(w: Walk, r: NDArray, m: NDArray, h: NDArray) -> NDArray:
    """Variance that a token adds, times h, by state; columns value, lower, upper."""
    rates = rates_of(w.chain)
    W = rates.W
    row = np.repeat(np.arange(rates.n), rates.terms)
    part = W.data[:, None] * (h[W.indices] * _change(m[W.indices], m[row], r[row]))
    gain = np.column_stack([row_sums(part[:, c], W.indptr) for c in range(3)])
    gain += waiting(rates) * h * (r**2)[:, None]
    gain[:, 1] = np.minimum(gain[:, 1], LARGEST)
    gain /= rates.step[:, None]
    _widened(gain, rates.terms + 8 + 2 * rates.errors)
    return gain


def _layered_gain(w: Walk, r: NDArray, m: NDArray, h: NDArray) -> NDArray:
    """The same for every layer, shape (L + 1, n, 3); the last one is not read."""
    gain = np.zeros_like(m)
    for t, P in enumerate(w.chain.layers):
        row = np.repeat(np.arange(len(r)), np.diff(P.indptr))
        part = P.data[:, None] * (h[t + 1][P.indices] * _change(m[t + 1][P.indices], m[t][row], r[row]))
        gain[t] = np.column_stack([row_sums(part[:, c], P.indptr) for c in range(3)])
        _widened(gain[t], np.diff(P.indptr) + 4)
    return gain


def _widened(gain: NDArray, roundings: NDArray) -> None:
    gain[:, 0] = np.where(np.isnan(gain[:, 0]), gain[:, 1], gain[:, 0])  # 0 times what overflowed
    widen(gain, gamma(roundings), np.where(gain[:, 2] > 0, 8 * (roundings + 1) * TINY, 0.0))


def _wide(V: NDArray) -> bool:
    with np.errstate(invalid="ignore"):
        return bool(np.any((V[:, 2] - V[:, 1] > WIDE * V[:, 0]) & np.isfinite(V[:, 0]) & (V[:, 0] > 0)))


def _by_moments(w: Walk, r: NDArray, uh: tuple[NDArray, NDArray], m: NDArray, V: NDArray, given: bool) -> NDArray:
    """What ``E[S^2; hit] - m^2 h`` says of h V, intersected: better on classes that are almost never left."""
    u, h = (np.where(np.isfinite(x), x, 0.0) for x in uh)
    with np.errstate(invalid="ignore", over="ignore"):
        gain = 2 * r[:, None] * u - r[:, None] ** 2 * h[:, [0, 2, 1]]
        gain[:, 1] -= ROOM * 2 * (r * u[:, 2] + r**2 * h[:, 2])
        gain[:, 2] += ROOM * 2 * (r * u[:, 2] + r**2 * h[:, 2]) + 8 * TINY
        gain = np.maximum(gain, 0.0)
        second = (given_hit(w, gain) if given else duration(w, gain)).X
        mean = m[:, [0, 2, 1]]
        size = h[:, [0, 2, 1]] * mean**2
        lower = second[:, 1] * (1 - ROOM) - size[:, 1] * (1 + 4 * ROOM)
        upper = second[:, 2] * (1 + ROOM) - size[:, 2] * (1 - 4 * ROOM)
        lower = np.fmax(np.where(np.isfinite(lower), lower * (1 - ROOM * np.sign(lower)), 0.0), V[:, 1])
        upper = np.fmin(np.where(np.isfinite(upper), upper * (1 + ROOM * np.sign(upper)), np.inf), V[:, 2])
    fine = (lower <= upper) & np.isfinite(V[:, 0])
    lower, upper = np.where(fine, lower, V[:, 1]), np.where(fine, upper, V[:, 2])
    return np.column_stack([np.clip(V[:, 0], lower, upper), lower, upper])


def _start(w: Walk, V: NDArray, m: NDArray, u: NDArray, h: NDArray, given: bool) -> NDArray:
    """Variance at the start law: the mean of the states' and the variance of their means, shape (3,)."""
    law = np.asarray(w.chain.start)
    if w.chain.is_layered:
        V, m, u, h = V[0], m[0], u[0], h[0]
    h = np.where(w.hit[:, None], 1.0, h)
    mean = law_mean(law, np.where(w.hit[:, None], 0.0, u))[0]
    weight = law_mean(law, h)[0]
    if not np.isfinite(mean[0]):
        return np.full(3, mean[0])
    mean = ratio(mean, weight)
    if np.isnan(mean[0]):
        return mean
    with np.errstate(invalid="ignore", over="ignore"):
        total = V + h * _change(m, np.broadcast_to(mean, m.shape), 0.0)
        _widened(total, np.full(len(total), 6))
        total = law_mean(law, total)[0]
    return ratio(total, weight) if given else total


def _root(V: NDArray) -> NDArray:
    """Standard deviations; the root is rounded correctly, so one rounding is added at each end."""
    with np.errstate(invalid="ignore"):
        X = np.sqrt(np.maximum(V, 0.0))
    X[..., 1] = X[..., 1] * (1 - ROOM)
    X[..., 2] = X[..., 2] * (1 + ROOM)
    return X
