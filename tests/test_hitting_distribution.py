"""The law of the time of a hit: probabilities, hazards, tails and deviations, against fractions and closed forms."""

from __future__ import annotations

import json
from fractions import Fraction as F

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_chains import LAYERS, SEEDS, quick, random_chain

import markovsafety as ms
from markovsafety import toy


def escape(found) -> ms.Bound:
    assert found.escape is not None
    return found.escape


def times_by_hand(chain, rows, law, hit, horizon):
    """P(tau = t) and P(tau > t) as fractions; states in `hit` and absorbing ones stay."""
    n, now, hits, rest = len(law), list(law), [], []
    for t in range(horizon + 1):
        hits.append(sum((now[i] for i in hit), F(0)))
        now = [F(0) if i in hit else x for i, x in enumerate(now)]
        rest.append(sum(now, F(0)))
        if t < horizon:
            P = rows[min(t, len(rows) - 1)]
            done = [i for i in range(n) if not any(P[i])]
            now = [sum((now[i] * P[i][j] for i in range(n)), F(0)) + (now[j] if j in done else 0) for j in range(n)]
    return hits, rest


def holds(bound, known):
    """Whether every entry is within its proven ends."""
    lower, upper = (np.ravel(x).tolist() for x in (bound.lower, bound.upper))
    return len(lower) == len(known) and all(F(lo) <= v <= F(up) for lo, v, up in zip(lower, known, upper))


@quick
@given(seed=SEEDS, layers=LAYERS, leaky=st.booleans())
def test_the_law_of_the_time_is_that_of_the_fractions(seed, layers, leaky):
    chain, rows, law = random_chain(seed, layers, leaky)
    horizon = layers or 9
    found = ms.hitting_distribution(chain, "harm", horizon=horizon)
    hit = set(chain.outcomes["harm"].tolist())
    hits, rest = times_by_hand(chain, rows, law, hit, horizon)
    assert holds(found.probability, hits)
    assert holds(found.survival, rest)
    assert holds(found.cumulative, [sum(hits[: t + 1], F(0)) for t in range(horizon + 1)])
    assert ((found.probability.upper == 0) == np.array([p == 0 for p in hits])).all()
    for t, (p, s) in enumerate(zip(hits, rest)):
        before = p + s
        assert np.isnan(found.hazard.value[t]) if before == 0 else holds(found.hazard[t], [p / before])
    assert np.max(found.probability.upper - found.probability.lower) < 1e-13


@quick
@given(seed=SEEDS, layers=LAYERS, leaky=st.booleans(), short=st.integers(0, 3))
def test_what_is_not_hit_by_the_horizon_is_its_tail(seed, layers, leaky, short):
    chain, _, _ = random_chain(seed, layers, leaky)
    horizon = max(layers - short, 0) if layers else short
    for target in ("harm", ["harm", "benign"], None, *(["truncated"] if layers else [])):
        found = ms.hitting_distribution(chain, target, horizon=horizon)
        if target is None:
            h = ms.hitting_probability(chain, [*chain.outcomes, *(["truncated"] if layers else [])]).at_start
        else:
            h = ms.hitting_probability(chain, target).at_start
        total = found.cumulative.value[-1] + found.tail.value
        assert total == pytest.approx(h.value, abs=1e-13)
        assert found.survival.value[-1] >= found.open.value[-1] - 1e-15
        # open and tail vanish together: a walk is open exactly if it still can hit
        assert (found.open.value[-1] > 0) == (found.tail.value > 0)
        both = found.probability.value.sum() + found.survival.value[-1]
        assert both == pytest.approx(1, abs=1e-13)


@quick
@given(seed=SEEDS)
def test_the_mean_and_the_deviation_are_those_of_the_law(seed):
    chain, _, _ = random_chain(seed)
    for target, given_hit in ((None, False), ("harm", True)):
        found = ms.hitting_distribution(chain, target, horizon=4000)
        p = found.probability.value / max(found.cumulative.value[-1], 1e-300)
        mean = ms.hitting_time(chain, target, given=given_hit).at_start
        deviation = ms.hitting_spread(chain, target, given=given_hit).at_start
        if not np.isfinite(mean.value):
            assert not np.isfinite(deviation.value)
            continue
        if found.tail.value > 1e-15:  # too slow for the horizon
            continue
        expected = float(p @ found.time)
        assert mean.value == pytest.approx(expected, abs=1e-9)
        assert deviation.value == pytest.approx(np.sqrt(p @ (found.time - expected) ** 2), abs=1e-7)


def test_a_geometric_time_has_a_constant_hazard():
    p = 2.0**-7
    chain = ms.Chain([[1 - p, p], [0, 0]], {"harm": 1}, start=0)
    found = ms.hitting_distribution(chain, "harm", horizon=300)
    t = found.time
    assert found.hazard.value[1:] == pytest.approx(np.full(300, p), rel=1e-13)
    assert found.rate.value[1:] == pytest.approx(np.full(300, p), rel=1e-13)
    assert found.probability.value[1:] == pytest.approx(p * (1 - p) ** (t[1:] - 1), rel=1e-13)
    assert found.survival.value == pytest.approx((1 - p) ** t, rel=1e-13)
    assert escape(found).value == pytest.approx(p, rel=1e-14)
    assert found.tail.value == pytest.approx((1 - p) ** 300, rel=1e-12)
    deviation = ms.hitting_spread(chain, "harm").at_start
    assert deviation.lower <= np.sqrt(1 - p) / p <= deviation.upper
    assert deviation.upper - deviation.lower < 1e-11 * deviation.value


def test_competing_ends_tell_the_two_hazards_apart():
    """Harm 1/16, refusal 3/16 per token: the rate among open walks stays, the hazard among all falls."""
    chain = ms.Chain([[12 / 16, 1 / 16, 3 / 16], [0] * 3, [0] * 3], {"harm": 1, "refusal": 2}, start=0)
    found = ms.hitting_distribution(chain, "harm", horizon=30)
    assert found.rate.value[1:] == pytest.approx(np.full(30, 1 / 16), rel=1e-13)
    gone = 1 - 0.25 * (1 - 0.75 ** (found.time[1:] - 1))  # not hit before t
    assert found.hazard.value[1:] == pytest.approx(0.75 ** (found.time[1:] - 1) / 16 / gone, rel=1e-12)
    assert found.cumulative.value[-1] + found.tail.value == pytest.approx(0.25, rel=1e-14)
    assert found.open.value == pytest.approx(0.75**found.time, rel=1e-13)


def test_first_passage_of_the_fair_walk():
    """From the middle of 0 .. 2a the first exit has the law of Feller I, XIV.5 (5.8), as a sum of cosines."""
    a = 5
    chain = toy.ruin(2 * a)
    found = ms.hitting_distribution(chain, horizon=120)
    k = np.arange(1, 2 * a, 2)
    angle = np.pi * k / (2 * a)
    known = [
        (np.cos(angle) ** (t - 1) * np.sin(angle) * np.sin(np.pi * k / 2)).sum() / a if t else 0.0 for t in found.time
    ]
    assert found.probability.value == pytest.approx(known, abs=1e-13)
    assert (found.probability.upper[:a] == 0).all()  # too near for the graph, and only at odd times
    assert (found.probability.upper[a + 1 :: 2] == 0).all()
    assert escape(found).lower <= 1 - np.cos(np.pi / (2 * a)) <= escape(found).upper
    assert escape(found).upper - escape(found).lower < 1e-9
    assert ms.hitting_spread(chain).at_start.value == pytest.approx(np.sqrt(2 * a**2 * (a**2 - 1) / 3), rel=1e-12)


@pytest.mark.parametrize("leak", [1e-3, 1e-9, 1e-15])
def test_the_escape_rate_keeps_its_digits(leak):
    """Two states that swap: the slow one leaves with the leak, and 1 minus the radius is a root of a square."""
    P = np.array([[0, 1 - leak, leak], [0.5, 0.5, 0], [0, 0, 0]])
    found = ms.hitting_distribution(ms.Chain(P, {"harm": 2}, start=0), "harm", horizon=1)
    # (1 - e)^2 - (1 - e) / 2 - (1 - leak) / 2 = 0, solved for the small root without cancellation
    c, half = leak / 2, 0.75
    exact = c / (half + np.sqrt(half**2 - c))
    assert escape(found).lower <= exact * (1 + 1e-14)
    assert exact * (1 - 1e-14) <= escape(found).upper
    assert escape(found).upper - escape(found).lower < 1e-8 * exact


def test_escape_is_that_of_the_slowest_class_in_reach():
    P = np.zeros((5, 5))
    P[0] = [0.9375, 0.03125, 0, 0.03125, 0]
    P[1] = [0, 0.875, 0, 0.125, 0]
    P[2] = [0, 0, 0.99, 0.01, 0]
    chain = ms.Chain(P, {"harm": 3, "refusal": 4}, start=0)
    found = ms.hitting_distribution(chain, "harm", horizon=5, start=[0, 1, 2, 3])
    assert escape(found).value == pytest.approx([0.0625, 0.125, 0.01, 1.0], rel=1e-13)
    assert found.probability.shape == (4, 6)
    for i in range(4):
        one = ms.hitting_distribution(chain, "harm", horizon=5, start=i)
        assert (one.probability.value == found.probability.value[i]).all()
        assert one.tail.value == found.tail.value[i]


def test_layers_give_the_law_by_position():
    P = [np.array([[0.5, 0.25, 0.25], [0] * 3, [0] * 3]), np.array([[0.25, 0.5, 0.25], [0] * 3, [0] * 3])]
    chain = ms.Chain.layered(P, {"harm": 1, "refusal": 2}, start=0)
    found = ms.hitting_distribution(chain, "harm")
    assert found.horizon == 2
    assert found.probability.value.tolist() == [0, 0.25, 0.25]
    assert found.rate.value.tolist() == [0, 0.25, 0.5]
    assert found.escape is None
    cut = ms.hitting_distribution(chain, "harm", horizon=1)
    assert cut.tail.value == pytest.approx(0.25)
    longer = ms.hitting_distribution(chain, horizon=4)
    assert longer.probability.value.tolist() == [0, 0.5, 0.5, 0, 0]
    assert longer.survival.upper[2:].tolist() == [0, 0, 0]
    assert ms.hitting_distribution(chain, "truncated").probability.value.tolist() == [0, 0, 0.125]


def test_a_distribution_prints_and_is_plain_data():
    found = ms.hitting_distribution(toy.ladder(), "harm", horizon=8)
    told = json.loads(json.dumps(found.to_json()))
    assert told["time"] == list(range(9))
    assert told["hazard"]["value"] == found.hazard.value.tolist()
    assert told["escape"]["value"] == escape(found).value
    assert "time to harm, 8 tokens" in str(found)
    assert found.probability.level == 1
    assert ms.hitting_distribution(toy.shallow(3), "harm", horizon=3).to_json()["tail"]["reasons"]["sampling"] is None


@pytest.mark.parametrize("horizon", [None, -1, 2.5, True, "9"])
def test_a_horizon_is_a_whole_number(horizon):
    with pytest.raises(ms.InputError, match="horizon is"):
        ms.hitting_distribution(toy.ladder(), horizon=horizon)


@quick
@given(seed=SEEDS, layers=LAYERS, given_hit=st.booleans(), rewarded=st.booleans())
def test_deviations_hold_the_fractions(seed, layers, given_hit, rewarded):
    """Variance by first moments of fractions: E[S^2] - E[S]^2 from the linear equations, solved exactly."""
    chain, rows, law = random_chain(seed, layers)
    n = chain.n_states
    r = np.random.default_rng(seed).integers(-3, 4, size=n).astype(float) if rewarded else np.ones(n)
    target = "harm" if given_hit else None
    found = ms.hitting_spread(chain, target, given=given_hit, reward=r if rewarded else None)
    hit = set(chain.outcomes["harm"].tolist()) if given_hit else set(np.flatnonzero(chain.outcome_mask).tolist())
    first = exact_moments(rows, hit, [F(int(x)) for x in r], layers, ends_count=not given_hit)
    for i in range(n):
        compare(found[0, i] if layers else found[i], first[i], given_hit)
    start = [sum((a * row[k] for a, row in zip(law, first)), F(0)) for k in range(3)]
    compare(found.at_start, start, given_hit)


def compare(bound, known, given_hit):
    h, u, q = known
    if h == 0 or (h < 1 and not given_hit):
        assert np.isnan(bound.value) if given_hit else bound.value == np.inf
        return
    variance = q / h - (u / h) ** 2
    assert F(bound.lower) ** 2 <= variance <= F(bound.upper) ** 2
    assert bound.value == pytest.approx(float(variance) ** 0.5, rel=1e-9, abs=1e-11)


def exact_moments(rows, hit, r, layers, ends_count):
    """P(hit), E[S; hit] and E[S^2; hit] of every state (layered: of the first layer) in fractions."""
    n = len(r)
    if layers:
        value = [[F(int(i in hit or ends_count)), F(0), F(0)] for i in range(n)]
        for P in reversed(rows):
            value = [step(P, i, hit, r, value) for i in range(n)]
        return value
    P = rows[0]
    reach = set(hit)
    while True:
        more = {i for i in range(n) if i not in reach and any(P[i][j] for j in reach)}
        if not more:
            break
        reach |= more
    free = sorted(reach - hit)
    value = [[F(int(i in hit)), F(0), F(0)] for i in range(n)]
    for k in range(3):
        A = [[F(int(i == j)) - P[i][j] for j in free] for i in free]
        b = [step(P, i, hit, r, value, k, free)[k] for i in free]
        for i, x in zip(free, solved(A, b)):
            value[i][k] = x
    return value


def step(P, i, hit, r, after, upto=2, unknown=()):
    """Moments one step earlier; of an unknown state only the moments below `upto` are read from `after`."""
    if i in hit or not any(P[i]):
        return [F(int(i in hit)), F(0), F(0)]
    h, u, q = F(0), F(0), F(0)
    for p, j in zip(P[i], range(len(P[i]))):
        a, b, c = (x if k < upto or j not in unknown else F(0) for k, x in enumerate(after[j]))
        h, u, q = h + p * a, u + p * (b + r[i] * a), q + p * (c + 2 * r[i] * b + r[i] ** 2 * a)
    return [h, u, q]


def solved(A, b):
    """Gauss and Jordan in fractions."""
    M: list[list[F]] = [[*row, x] for row, x in zip(A, b)]
    n = len(b)
    for k in range(n):
        p = next(i for i in range(k, n) if M[i][k])
        M[k], M[p] = M[p], M[k]
        M[k] = [x / M[k][k] for x in M[k]]
        M = [row if i == k else [x - row[k] * y for x, y in zip(row, M[k])] for i, row in enumerate(M)]
    return [row[n] for row in M]


def test_a_time_without_spread_has_none():
    """Ninety-nine sure steps: the two moments would cancel to 1e-6."""
    P = np.eye(100, k=1)
    chain = ms.Chain(P, {"harm": 99}, start=0)
    found = ms.hitting_spread(chain, "harm").at_start
    assert found.value == found.lower == 0
    assert found.upper < 1e-9
    assert ms.hitting_time(chain, "harm").at_start.value == 99


def test_deviation_where_the_leak_is_tiny():
    """A time of 1e15 tokens is as good as exponential."""
    n = 30
    P = np.full((n + 1, n + 1), 1 / n)
    P[:, n], P[n] = 0, 0
    P[0, :n] *= 1 - 2.0**-40
    P[0, n] = 2.0**-40
    chain = ms.Chain(P, {"harm": n}, start=0)
    mean, found = ms.hitting_time(chain, "harm").at_start, ms.hitting_spread(chain, "harm").at_start
    assert found.upper - found.lower < 1e-8 * found.value
    assert found.value == pytest.approx(mean.value, rel=1e-9)


def test_rows_that_sum_to_a_little_more_than_one_keep_the_law_below_one():
    over = np.array([[0, 1 + 9e-10, 0], [0, 1, 0], [0, 0, 1.0]])
    chain = ms.Chain.layered([over] * 2, {"harm": 1, "refusal": 2}, start=0)
    found = ms.hitting_distribution(chain, "harm")
    assert found.cumulative.value[-1] == found.cumulative.upper[-1] == 1


def test_a_spread_below_a_square_that_overflows():
    # Once in 1e300 walks it takes 1e300 tokens: the variance is 2e300, although that time squared has no double.
    P = [[1, 0, 1e-300, 0], [1e-300, 0, 1, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    chain = ms.Chain(P, {"harm": 2, "refusal": 3}, start=1)
    found = ms.hitting_spread(chain, "harm")
    assert found.lower[1] <= 2**0.5 * 1e150 <= found.upper[1]


def test_tokens_that_no_double_counts_are_refused():
    chain = ms.Chain([[1, 1e-310, 0], [0, 0, 0], [0, 0, 0]], {"harm": 1, "refusal": 2}, start=0)
    assert ms.hitting_probability(chain, "harm").value[0] == 1
    for ask in (ms.hitting_time, ms.hitting_spread, lambda *_: ms.visits(chain)):
        with pytest.raises(ms.InputError, match="State 0 is left with a probability below"):
            ask(chain, "harm")
    with pytest.raises(ms.InputError, match="State 0"):
        ms.hitting_distribution(chain, "harm", horizon=3)
