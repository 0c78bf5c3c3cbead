"""Allocation of a budget over starts and prompts, what to expect of it, and when to stop."""

from __future__ import annotations

import numpy as np
import pytest
from made import HARM, REFUSAL, make
from scipy.optimize import minimize

import markovsafety as ms
from markovsafety import InputError, UntrustedError, evidence, toy
from markovsafety.bound import clopper_pearson, clustered
from markovsafety.chains.tally import Tally
from markovsafety.exercises import case


def levels(n=30, p=0.54, every=3):
    """A rare event behind n levels, each reached from the one before with probability p."""
    P = np.zeros((n + 2, n + 2))
    for i in range(n):
        P[i, i + 1], P[i, n + 1] = p, 1 - p
    entry = {k: k for k in range(0, n, every)}
    return ms.Chain(P, {"harm": n, "refusal": n + 1}, 0, entry=entry)


def answers(seed, K=30, m=4, prefills=(0, 1), alpha=0.5, beta=2.0, length=3):
    """m rollouts of each of K prompts at every depth; harm of a prompt beta-distributed, larger when forced."""
    rng = np.random.default_rng(seed)
    rows = []
    for p in range(K):
        h = rng.beta(alpha, beta)
        for k in prefills:
            for _ in range(m):
                harm = rng.random() < min(h * (1 + k), 1)
                end = k + int(rng.integers(1, length + 1))
                rows.append(([1] * (end - 1) + [9 if harm else 8], HARM if harm else REFUSAL, end - 1, k, p))
    return make(rows)


def test_rollouts_from_the_start_leave_the_binomial_variance():
    """The delta method as arithmetic: n proportional to visits returns h (1 - h) / rollouts, whatever the states."""
    chain = ms.Chain(toy.shallow(4).P, {"harm": 5, "refusal": 6}, 0)
    plan = evidence.allocate(chain, 1e6)
    h = ms.hitting_probability(chain, "harm").start.value
    from markovsafety.evidence.design_rows import of_chain

    rows = of_chain(chain, "start", "prefill")
    n = 1e6 / rows.tokens[0]
    variance = float(np.sum(rows.weight[0] / (n * rows.visits[0])))
    assert variance == pytest.approx(h * (1 - h) / n, rel=1e-12)
    assert plan.expected.value == pytest.approx(h)
    half = (plan.expected.upper - plan.expected.lower) / 2
    assert half == pytest.approx(1.96 * np.sqrt(variance), rel=0.02)
    assert plan.table[0]["tokens"] == pytest.approx(1e6, rel=1e-3)


def test_shares_are_the_best_there_are():
    """Against a general optimiser on the same convex problem."""
    from markovsafety.evidence.design import _best, _variances

    for seed in range(5):
        rng = np.random.default_rng(seed)
        unit, weight = rng.random((4, 6)) + 0.01, rng.random((1, 6))
        found = _best(unit, weight, np.eye(4)[0])

        def loss(z, unit=unit, weight=weight):
            y = np.exp(z - z.max())
            return float(_variances(unit, weight, y / y.sum())[0])

        reference = min(
            minimize(loss, rng.normal(size=4), method="Nelder-Mead", options={"maxiter": 4000}).fun for _ in "ab"
        )
        assert found.sum() == pytest.approx(1)
        assert float(_variances(unit, weight, found)[0]) <= reference * (1 + 1e-4)


def test_the_widest_of_several_goals_is_as_narrow_as_possible():
    from markovsafety.evidence.design import _best, _variances

    unit, weight = np.eye(3), np.diag([1.0, 2.0, 5.0])
    found = _best(unit, weight, np.full(3, 1 / 3))
    assert found == pytest.approx(np.array([1, 2, 5]) / 8, abs=1e-3)
    assert _variances(unit, weight, found).max() == pytest.approx(8, rel=1e-3)
    plan = evidence.allocate(answers(0), 1e5, goal="worst", prompts=1000)
    half = (plan.expected.upper - plan.expected.lower) / 2
    assert half.shape == (2,)
    assert half[0] == pytest.approx(half[1], rel=0.05)
    assert plan.compared["optimal"] <= plan.compared["uniform"] * 1.001


@pytest.mark.parametrize("budget", [10_000, 20_000, 50_000, 400_000])
def test_nothing_it_is_compared_with_leaves_a_narrower_widest_interval(budget):
    """Rare harm after few rollouts has a wider interval than its variance says, so least variance is not the best."""
    pilot = case().rolls
    compared = evidence.allocate(pilot, budget, goal="worst").compared
    assert compared["optimal"] <= min(compared["start only"], compared["uniform"])


def test_stratified_starts_reach_rare_harm():
    """30 levels of .54: 1000 transitions from each leave 16 % (1000 simulations, +- 5 standard errors); the start alone
    would hardly ever see it."""
    chain = levels()
    plan = evidence.allocate(chain, 30_000, starts="states")
    assert [row["rollouts"] for row in plan.table] == [1000] * 30
    p = 0.54**30
    relative = np.sqrt(30 * 0.46 / 0.54 / 1000)
    half = (plan.expected.upper - plan.expected.lower) / 2
    assert half / p / 1.96 == pytest.approx(relative, rel=0.05)
    assert plan.compared["optimal"] == pytest.approx(plan.compared["every row"], rel=1e-6)
    rng = np.random.default_rng(1)
    found = np.prod(rng.binomial(1000, 0.54, (1000, 30)) / 1000, axis=1)
    assert found.std() / p == pytest.approx(relative, rel=0.15)
    forced = evidence.allocate(chain, 30_000)
    assert forced.compared["every row"] < forced.compared["optimal"] < 1.2 * forced.compared["every row"]
    assert forced.compared["start only"] > 1e4 * forced.compared["optimal"]
    assert len(forced.table) == 10


def test_prompts_against_rollouts_per_prompt():
    """sqrt(cost / tokens (1 - icc) / icc), and fewer prompts than wanted mean more rollouts of each."""
    rolls = answers(1, K=200, m=8, prefills=(0,))
    plan = evidence.allocate(rolls, 1e6, prompt_cost=100)
    best = np.sqrt(100 / plan.info["tokens"][0] * (1 - plan.info["icc"]) / plan.info["icc"])
    assert plan.table[0]["per_prompt"] == round(best)
    assert 0.15 < plan.info["icc"] < 0.45  # beta(0.5, 2): 1 / 3.5
    assert evidence.allocate(rolls, 1e6).table[0]["per_prompt"] == 1
    few = evidence.allocate(rolls, 1e6, prompts=100)
    assert few.table[0]["prompts"] <= 100
    assert few.table[0]["per_prompt"] > 1000
    # With 100 prompts the correlation is a floor that no budget passes.
    p, icc = few.expected.value, few.info["icc"]
    assert (few.expected.upper - few.expected.lower) / 2 > 1.9 * np.sqrt(p * (1 - p) * icc / 100)


def test_expected_precision_is_what_comes_out():
    """The mean half-width of 30 experiments as planned lies within 10 % of what was promised."""
    p, icc = 0.2, 1 / 3.5
    pilot = answers(3, K=400, m=6, prefills=(0,))
    plan = evidence.allocate(pilot, 3e4, prompt_cost=20)
    K, m = int(plan.table[0]["prompts"]), int(plan.table[0]["per_prompt"])
    rng, halves = np.random.default_rng(4), []
    for _ in range(30):
        b = clustered(rng.binomial(m, rng.beta(0.5, 2, K)), np.full(K, m))
        halves.append((b.upper - b.lower) / 2)
    assert plan.expected.value == pytest.approx(p, abs=0.05)
    assert plan.info["icc"] == pytest.approx(icc, abs=0.08)
    assert np.mean(halves) == pytest.approx((plan.expected.upper - plan.expected.lower) / 2, rel=0.1)


def test_counts_are_planned_through_their_chain():
    counts = ms.count(answers(5, K=60), ms.KGram(1))
    plan = evidence.allocate(counts, 1e5)
    same = evidence.allocate(ms.estimate(counts), 1e5)
    assert plan.to_json() == same.to_json()
    assert plan.compared["optimal"] <= plan.compared["start only"] * (1 + 1e-9)
    assert "check" in str(plan)
    assert plan.goal == "P(harm)"
    assert evidence.allocate(counts, 1e5, goal=1).goal == "P(harm) after 1 forced token"


def test_a_measured_state_law_is_known_from_its_own_rollouts_only():
    """After one forced token the answer is in one of two states; free rollouts do not say how often in which."""
    from markovsafety.evidence.design_rows import of_chain

    rows = [
        ([t, 9 if p % d else 8], HARM if p % d else REFUSAL, 1, 1, p) for p in range(40) for t, d in ((1, 2), (2, 4))
    ]
    rows += [([3, 8], REFUSAL, 1, 0, p) for p in range(40)]
    chain = ms.estimate(ms.count(make(rows), ms.KGram(1)))
    found = of_chain(chain, 1, "prefill")
    p = 0.5 * 0.5 + 0.5 * 0.75
    assert float(np.sum(found.weight[0] / found.visits[1])) == pytest.approx(p * (1 - p), rel=1e-12)
    assert found.weight[0, -1] == pytest.approx(0.125**2)
    assert found.visits[0, -1] == 0


def test_small_budgets_and_blind_pilots_carry_the_rest():
    rolls = answers(6)
    with pytest.raises(InputError, match="smaller than") as caught:
        evidence.allocate(rolls, 50)
    assert caught.value.partial.table[0]["rollouts"] > 0
    rows = [([1, 8], REFUSAL, 1, 0, p) for p in range(20)]
    chain = ms.estimate(ms.count(make(rows), ms.KGram(1)))
    with pytest.raises(UntrustedError, match="no harm") as blind:
        evidence.allocate(chain, 1000)
    part = blind.value.partial
    assert part.table[0]["start"] == 0
    assert part.expected.value == 0
    assert part.expected.upper > 0.001
    # Measured depth by depth there is a plan without harm too.
    plan = evidence.allocate(make(rows), 1000)
    assert "not known" in str(plan)
    assert plan.expected.upper > 0


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: evidence.allocate(answers(0), 1e4, goal=7), "goal is 7"),
        (lambda: evidence.allocate(answers(0), -1), "budget is -1"),
        (lambda: evidence.allocate(answers(0), 1e4, starts="any"), "starts is 'any'"),
        (lambda: evidence.allocate(answers(0), 1e4, starts="states"), "no states"),
        (lambda: evidence.allocate(ms.Chain(toy.shallow(2).P, {"harm": 3, "refusal": 4}), 10), "no start law"),
        (lambda: evidence.allocate(ms.Chain.layered([np.eye(2)], {"harm": 0}, 1), 10), "one matrix per position"),
        (lambda: evidence.allocate(3, 10), "pilot is int"),
        (lambda: evidence.enough(answers(0), 2.0), "half_width is 2.0"),
        (lambda: evidence.enough(answers(0), 0.1, look=0), "look 0"),
        (lambda: evidence.enough(answers(0), 0.1, prefill=9), "No rollout has 9"),
    ],
)
def test_bad_questions(call, says):
    with pytest.raises(InputError, match=says):
        call()


def _stopped_at(x, step, half_width, interval):
    """Ends of the interval at the first look where it is narrow (the last look, if none is), by run."""
    n = step * np.arange(1, x.shape[1] + 1)
    low, high = (np.stack(side, axis=1) for side in zip(*(interval(x[:, j], n[j]) for j in range(len(n)))))
    narrow = (high - low) / 2 <= half_width
    first = np.where(narrow.any(axis=1), narrow.argmax(axis=1), len(n) - 1)
    return low[np.arange(len(x)), first], high[np.arange(len(x)), first]


def test_stopping_when_narrow_under_covers():
    """Independent rollouts, p = .05, a look every 10 of 900. In 40 000 runs stopping at a narrow Wald interval covers
    38 %, at a narrow exact one 94.2 % (96 % at a fixed size). The thresholds are six standard errors away: false
    alarms below 1e-8."""
    p, R = 0.05, 40_000
    x = np.random.default_rng(0).binomial(10, p, (R, 90)).cumsum(axis=1)

    def wald(x, n):
        reach = 1.96 * np.sqrt(x / n * (1 - x / n) / n)
        return x / n - reach, x / n + reach

    def exact(x, n, level=0.95):
        table = clopper_pearson(np.arange(n + 1), n, level)
        return table[0][x], table[1][x]

    share = []
    for interval in (wald, exact, lambda x, n: exact(x, n, 1 - 0.05 / 90)):
        low, high = _stopped_at(x, 10, 0.02, interval)
        share.append(np.mean((low <= p) & (p <= high)))
    assert share[0] < 0.45
    assert share[1] < 0.9495
    assert share[2] > 0.99


def test_spending_the_level_over_looks_covers():
    """150 runs with clustered prompts (icc 1/4), 10 looks: 95 % at least; 25 misses have probability below 1e-7."""
    rng, p, missed = np.random.default_rng(1), 0.1, 0
    for _ in range(150):
        x = rng.binomial(4, rng.beta(3 * p, 3 * (1 - p), 300))
        for look in range(1, 11):
            K = 30 * look
            outcomes = np.column_stack([x[:K], 4 - x[:K], np.zeros((K, 2))])
            found = evidence.enough(Tally(np.arange(K), ["all"] * K, np.zeros(K), outcomes), 0.05, look=look, looks=10)
            if found.done:
                break
        missed += not found.bound.lower <= p <= found.bound.upper
    assert missed < 25


def test_looks_beyond_the_plan_are_refused():
    rolls = answers(7, K=200)
    found = evidence.enough(rolls, 0.01, look=5)
    assert not found.done
    assert found.more > 0
    assert found.bound.level == 0.95
    plain = evidence.enough(rolls, 0.01, looks=1)
    assert plain.bound.upper - plain.bound.lower < found.bound.upper - found.bound.lower
    assert "go on" in str(found)
    assert evidence.enough(rolls, 0.2).done
    with pytest.raises(UntrustedError, match="look 6 of 5") as caught:
        evidence.enough(rolls, 0.01, look=6)
    assert caught.value.partial.bound.value == found.bound.value
