"""Expected times and rewards before a hit, expected visits, and what sampling says about both."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..bound import Bound, clopper_pearson, clustered
from ..chains import Chain
from ..errors import InputError
from ..outcomes import CODES
from . import graph, layered
from .core import Answer, Walk, check_chain, duration, given_hit, law_mean, occupation, probability, walk
from .intervals import half_width, prompt_tally, proven, recorded, refuse_unproven
from .rates import rates_of
from .waiting import in_tokens

__all__ = ["as_reward", "ending", "expected_time", "expected_visits", "moments", "ratio"]

SAME = 1e-9  # relative spread below which values are equal up to rounding


def ending(chain: Chain, target: Any) -> Walk:
    """The walk to a target; to any outcome, the end of the last layer included, if it is None."""
    if target is not None:
        return walk(chain, target)
    check_chain(chain)
    every = (*chain.outcomes, *(["truncated"] if chain.is_layered and "truncated" not in chain.outcomes else []))
    w = walk(chain, every)
    return Walk(chain, w.hit, w.avoid, float(chain.is_layered), "any outcome", w.outcomes)


def as_reward(reward: Any, n: int) -> NDArray[np.float64]:
    """What a step from each state earns, shape (n,): a token, if nothing else is said."""
    try:
        r = np.ones(n) if reward is None else np.array(reward, dtype=np.float64)
    except (TypeError, ValueError):
        r = np.array(np.nan)
    if r.shape != (n,) or not np.isfinite(r).all():
        raise InputError(
            f"reward has shape {r.shape}" + ("." if r.shape != (n,) else " and entries that are not finite."),
            cause=f"A reward is one finite number for each of the {n} states, earned at every step from it.",
            next=f"Pass an array of shape ({n},).",
        )
    return r


def moments(w: Walk, r: NDArray, given: bool) -> tuple[Answer, Answer]:
    """Expected reward on walks that hit, and the probability to hit; 1 where a plain expectation is asked for."""
    h = probability(w) if given else _certain(w)
    return _signed(w, r, h if given else None), h


def expected_time(w: Walk, reward: Any, given: bool, level: float) -> Bound:
    """See `markovsafety.hitting.hitting_time`."""
    chain, r = w.chain, as_reward(reward, w.chain.n_states)
    if not chain.is_layered:
        in_tokens(rates_of(chain), w.moving)
    u, h = moments(w, r, given)
    name = f"E[{'tokens' if reward is None else 'reward'} to {w.name}{' | hit' if given else ''}]"
    info = {"name": name, "method": u.method, "why": u.why}
    X = ratio(u.X, h.X) if given else u.X
    X = np.where(w.hit[:, None], 0.0, X)
    start = None
    if chain.start is not None:
        first = (lambda x: x[0]) if chain.is_layered else (lambda x: x)
        mean = law_mean(chain.start, first(u.X))[0]
        if given:
            mean = ratio(mean, law_mean(chain.start, first(h.X))[0])
        start = proven(mean, info)
        begun = r.any() and not w.hit[chain.start > 0].all()  # else it is 0 by definition
        if chain.evidence is not None and not chain.is_layered and begun:
            start = _sampled_start(w, r, mean, (u.X[:, 0], h.X[:, 0]), given, level, info)
    failed = Answer(u.X, u.method, u.why, None, (*u.failed, *h.failed))
    if chain.evidence is None or chain.is_layered:
        return refuse_unproven(failed, proven(X, info, start))
    lower, upper = _by_trials(w, r, X, (u.X[:, 0], h.X[:, 0]), given, level)
    reasons = {"sampling": half_width(lower, upper), "rounding": half_width(X[..., 1], X[..., 2])}
    lower, upper = np.fmin(lower, X[:, 1]), np.fmax(upper, X[:, 2])
    return refuse_unproven(failed, Bound(X[:, 0], lower, upper, level, reasons, start, {**info, "certified": True}))


def _certain(w: Walk) -> Answer:
    """The h of an unconditional time: 1, since elsewhere the time is infinite."""
    shape = (w.chain.n_layers + 1, w.chain.n_states, 3) if w.chain.is_layered else (w.chain.n_states, 3)
    return Answer(np.ones(shape), "", "")


def _signed(w: Walk, r: NDArray, h: Answer | None) -> Answer:
    """Expected reward from positive and negative parts, each solved with non-negative numbers."""
    parts = []
    for sign in (1.0, -1.0):
        part = np.maximum(sign * r, 0.0)
        if sign < 0 and not part.any():
            break
        gain = np.repeat(part[:, None], 3, axis=1)
        parts.append(duration(w, gain) if h is None else given_hit(w, gain * h.X))
    if len(parts) == 1:
        return parts[0]
    plus, minus = (p.X for p in parts)
    never = np.isinf(plus[..., 1])  # no proven lower end is infinite, unless a hit is not certain
    with np.errstate(invalid="ignore", over="ignore"):
        X = plus - minus[..., [0, 2, 1]]
        room = 2.0**-52 * np.abs(X)  # the subtraction rounds
        X[..., 1] -= room[..., 1]
        X[..., 2] += room[..., 2]
    X[..., 1] = np.where(np.isnan(X[..., 1]), -np.inf, X[..., 1])
    X[..., 2] = np.where(np.isnan(X[..., 2]), np.inf, X[..., 2])
    X[never] = np.inf
    return Answer(X, parts[0].method, parts[0].why, None, (*parts[0].failed, *parts[1].failed))


def ratio(u: NDArray, h: NDArray) -> NDArray:
    """``u / h`` column-wise with its enclosure, nan where h is exactly 0."""
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        value = u[..., 0] / h[..., 0]
        ends = np.stack([u[..., a] / h[..., b] for a in (1, 2) for b in (1, 2)])
        room = 2.0**-51
        lower, upper = ends.min(axis=0), ends.max(axis=0)
        X = np.stack([value, lower - room * np.abs(lower), upper + room * np.abs(upper)], axis=-1)
    X[..., 1] = np.where(np.isnan(X[..., 1]), -np.inf, X[..., 1])
    X[..., 2] = np.where(np.isnan(X[..., 2]), np.inf, X[..., 2])
    X[..., 1] = np.where(u[..., 1] >= 0, np.maximum(X[..., 1], 0.0), X[..., 1])
    X[h[..., 2] == 0] = np.nan
    return X


def _second_moment(w: Walk, r: NDArray, u: NDArray, h: NDArray, given: bool) -> NDArray:
    """E[S^2; hit] of the reward S before the hit, from ``(r + S')^2``: gain ``2 r u - r^2 h``."""
    with np.errstate(invalid="ignore"):
        gain = 2 * r * u - r**2 * h
    gain = np.where(np.isfinite(gain), np.maximum(gain, 0.0), 0.0)[:, None]
    return (given_hit(w, gain) if given else duration(w, gain)).X[:, 0]


def _variance(w: Walk, r: NDArray, u: NDArray, h: NDArray, given: bool) -> NDArray:
    """Variance of the reward before the hit, given the hit."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.maximum(_second_moment(w, r, u, h, given) / h - (u / h) ** 2, 0.0)


def _student(size: NDArray, level: float) -> NDArray:
    """Two-sided Student quantile for means of `size` values; inf below two."""
    from scipy.special import stdtrit

    return np.where(size >= 2, stdtrit(np.maximum(size, 2) - 1, (1 + level) / 2), np.inf)


def _few(prompts: Any, level: float) -> NDArray:
    """Share of prompts that may behave otherwise although none of so many did (Clopper-Pearson at zero events)."""
    K = np.maximum(np.asarray(prompts, dtype=np.float64), 0.0)
    return np.asarray(clopper_pearson(np.zeros_like(K), K, level)[1])


def _by_trials(
    w: Walk, r: NDArray, X: NDArray, uh: tuple[NDArray, NDArray], given: bool, level: float
) -> tuple[NDArray, NDArray]:
    """Mean of n independent times, n the prompts whose rollouts went from the state to the hit.

    The rollouts of one prompt resemble each other and later visits repeat earlier ones, so neither adds trials; where
    all rollouts answer one prompt, each of them is one. Times without any spread bound no mean from above.
    """
    evidence, codes = w.chain.evidence, recorded(w)
    assert evidence is not None
    if given and codes is not None and len(codes) == 1 and not evidence.one_prompt:
        n = np.minimum(evidence.prompts[:, 1 + codes[0]], evidence.through)
    else:
        n = evidence.trials(None, level) * uh[1]
    variance = _variance(w, r, *uh, given)
    with np.errstate(invalid="ignore", divide="ignore"):
        reach = _student(n, level) * np.sqrt(variance / n)
        reach = np.where(np.isnan(reach), np.inf, reach)
        lower, upper = X[:, 0] - reach, X[:, 0] + reach
        flat = variance <= (SAME * X[:, 0]) ** 2
        share = (1 - _few(n, level)) * X[:, 0]
    least = 0.0 if (r >= 0).all() else -np.inf
    lower = np.where(flat, share if least == 0.0 else least, lower)
    upper = np.where(flat, np.inf, upper)
    known = w.hit | ~np.isfinite(X[:, 0]) | (not r.any())
    return np.where(known, X[:, 0], np.fmax(lower, least)), np.where(known, X[:, 0], upper)


def _sampled_start(
    w: Walk, r: NDArray, mean: NDArray, uh: tuple[NDArray, NDArray], given: bool, level: float, info: dict[str, Any]
) -> Bound:
    """Interval at the start: linearised variance between prompts of the estimated value (delta method)."""
    if not np.isfinite(mean[0]):
        why = "no hit was seen" if np.isnan(mean[0]) else "a hit is not certain"
        return Bound(mean[0], mean[0], mean[0], level, {}, None, {**info, "note": why})
    tally, z = prompt_tally(w.chain), None
    least = 0.0 if (r >= 0).all() else -np.inf
    if tally is not None and w.chain.counts is not None:
        z = _influence(w, r, float(mean[0]), uh, int(tally[1][0]))
    if z is not None and len(z) >= 2:
        size = len(z)
        reach = float(_student(np.asarray(size), level)) * float(np.sqrt(size / (size - 1) * np.sum(z**2)))
        how = f"variance between {size} prompts, linearised"
    else:
        size = 0.0 if tally is None else float((tally[0].sum(axis=1) > 0).sum())
        law = np.asarray(w.chain.start)
        with np.errstate(invalid="ignore"):
            spread = float(np.nansum(np.where(law > 0, law * _variance(w, r, *uh, given), 0.0)))
        reach = float(_student(np.asarray(size), level)) * float(np.sqrt(spread / size)) if size >= 2 else np.inf
        how = "every prompt counted as one rollout"
    lower, upper = mean[0] - reach, mean[0] + reach
    if reach <= SAME * abs(mean[0]):
        # A sample without spread bounds no mean from above, and from below only by the share that may be otherwise.
        lower, upper = (1 - float(_few(size, level))) * mean[0] if least == 0.0 else least, np.inf
        info = {**info, "note": f"no spread seen among {size:g} prompt{'s' if size != 1 else ''}"}
    lower, upper = min(max(lower, least), mean[1]), max(upper, mean[2])
    reasons = {"sampling": half_width(lower, upper), "rounding": half_width(mean[1], mean[2])}
    return Bound(mean[0], lower, upper, level, reasons, None, {**info, "certified": True, "sampling": how})


def _influence(w: Walk, r: NDArray, value: float, uh: tuple[NDArray, NDArray], prefill: int) -> NDArray | None:
    """First-order change of ``value = u / h`` at the start by each prompt's rollouts, shape (prompts,).

    One observed move i -> j changes it by ``N_i / n_i (r_i h_j + phi_j - phi_i) / h``, ``phi = u - value h``, N the
    visits of the chain and n the visits observed; one observed start s by ``(phi_s - mean) / n``."""
    chain, counts = w.chain, w.chain.counts
    u, h = (np.where(np.isfinite(x), x, 0.0) for x in uh)
    rates = rates_of(chain)
    moving = w.moving & graph.reaching(rates.W, w.hit, w.moving)
    N = np.where(moving, occupation(chain, chain.start, moving, 1).Z[:, 0], 0.0)
    total = float(chain.start @ h)
    phi = u - value * h
    t, place = counts.transitions, _place(chain)
    target = np.where(t.target < len(counts.states), t.target, 0)
    out = t.target >= len(counts.states)
    target[out] = place[t.group[out], t.target[out] - len(counts.states)]
    weight = t.count * N[t.source] / counts.visits[t.source]
    z = np.bincount(t.group, weight * (r[t.source] * h[target] + phi[target] - phi[t.source]), len(counts.tally))
    e = counts.entries
    begun = counts.tally.prefill[e.group] == prefill
    source = np.where(e.source < len(counts.states), e.source, 0)
    ended = e.source >= len(counts.states)
    source[ended] = place[e.group[ended], e.source[ended] - len(counts.states)]
    first = np.where(begun, e.count, 0.0)
    z += np.bincount(e.group, first * (phi[source] - float(chain.start @ phi)), len(counts.tally)) / first.sum()
    tally = counts.tally
    return np.bincount(tally.cluster, z) / total


def _place(chain: Chain) -> NDArray:
    """State of every outcome for every group of the tally (harm may be split by category), shape (groups, 4)."""
    tally = chain.counts.tally
    harm = chain.outcomes["harm"]
    kind = np.unique(tally.category, return_inverse=True)[1].ravel() if len(harm) > 1 else np.zeros(len(tally), int)
    rest = [np.full(len(tally), chain.outcomes[name][0]) for name in list(CODES)[1:]]
    return np.column_stack([harm[kind], *rest])


def expected_visits(chain: Chain, law: NDArray, level: float) -> Bound:
    """See `markovsafety.hitting.visits`; `law` is the start law."""
    info: dict[str, Any] = {"name": "expected visits"}
    if chain.is_layered:
        Z = occupation(chain, law, ~layered.staying(chain.layers)).Z
        return proven(Z, info | {"method": "layered", "why": "law of the state at every position, no linear solve"})
    rates = rates_of(chain)
    in_tokens(rates, np.ones(rates.n, dtype=bool))
    closed = graph.closed_classes(rates.W)
    ends = closed & (rates.out == 0)
    found = occupation(chain, law, ~closed)
    Z = found.Z
    trapped = closed & ~ends & graph.reachable(rates.W, law > 0, ~ends)
    Z[closed & ~ends] = 0.0
    Z[trapped] = np.inf
    Z[ends] = np.minimum(Z[ends], 1.0)
    info |= {"method": found.report.method, "why": found.report.why()}
    answer = Answer(Z, info["method"], info["why"], None, tuple(found.report.failed))
    if chain.evidence is None:
        return refuse_unproven(answer, proven(Z, info))
    sampled = _sampled_visits(chain, law, Z, rates.step / np.maximum(rates.out, 1e-300), level)
    if sampled is None:
        why = "the counts by prompt are not kept" if chain.counts is None else "no rollouts were started in this law"
        return refuse_unproven(answer, proven(Z, info | {"sampling": f"not assessed: {why}"}))
    lower, upper = sampled
    reasons = {"sampling": half_width(lower, upper), "rounding": half_width(Z[:, 1], Z[:, 2])}
    info["certified"] = True
    return refuse_unproven(
        answer, Bound(Z[:, 0], np.fmin(lower, Z[:, 1]), np.fmax(upper, Z[:, 2]), level, reasons, None, info)
    )


def _sampled_visits(
    chain: Chain, law: NDArray, Z: NDArray, stay: NDArray, level: float
) -> tuple[NDArray, NDArray] | None:
    """Mean visits per rollout with their variance between prompts; an outcome state has the interval of its outcome."""
    tally, counts = prompt_tally(chain, law), chain.counts
    if tally is None or counts is None:
        return None
    per_prompt, prefill = tally[0], int(tally[1][0])
    K, S = len(per_prompt), len(counts.states)
    rows = counts.tally.prefill == prefill
    number = np.full(len(rows), -1)
    number[rows] = np.arange(rows.sum())
    t = counts.transitions
    mine = rows[t.group]
    R = counts.tally.outcomes[rows].sum(axis=1)
    n = np.zeros((S, int(rows.sum())))
    np.add.at(n, (t.source[mine], number[t.group[mine]]), t.count[mine])
    raw = n.sum(axis=1) / R.sum()
    error = np.sqrt(K / max(K - 1, 1) * np.sum((n - raw[:, None] * R) ** 2, axis=1)) / R.sum()
    reach = float(_student(np.asarray(float(K)), level)) * error
    unseen = float(_few(K, level))
    flat = (error <= SAME * raw) & (law[:S] < 1)  # in the start state one visit is certain
    lower, upper = Z[:, 0].copy(), Z[:, 0].copy()
    with np.errstate(invalid="ignore"):
        reach = np.where(np.isnan(reach), np.inf, reach)
    lower[:S] = np.clip(np.minimum(Z[:S, 0], raw) - reach, 0.0, None)
    upper[:S] = np.where(raw > 0, np.maximum(Z[:S, 0], raw) + reach, np.maximum(Z[:S, 0], unseen * stay[:S]))
    lower[:S] = np.where(flat & (raw > 0), (1 - unseen) * Z[:S, 0], lower[:S])
    upper[:S] = np.where(flat & (raw > 0), Z[:S, 0] + unseen * stay[:S], upper[:S])
    for name, index in chain.outcomes.items():
        for state in index:
            events = per_prompt[:, CODES[name]]
            if len(index) > 1:
                events = events * 0.0  # categories: only their sum was recorded by prompt
                size = float(K)
                lower[state], upper[state] = clopper_pearson(np.clip(Z[state, 0], 0, 1) * size, size, level)
                continue
            raw_end = clustered(events, per_prompt.sum(axis=1), level)
            lower[state], upper[state] = raw_end.lower, raw_end.upper
    return np.fmin(lower, Z[:, 0]), np.fmax(upper, Z[:, 0])
