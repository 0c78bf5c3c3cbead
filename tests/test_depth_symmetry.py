"""Rotations of chains: what the mean keeps, on which side of the mean harm falls, and what pooling buys."""

from __future__ import annotations

from fractions import Fraction as F

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import markovsafety as ms
from markovsafety import toy
from markovsafety.depth.symbolic_symmetry import hazard_budget as spread_formula
from markovsafety.depth.symbolic_symmetry import participation_ratio as ring_formula
from markovsafety.depth.symbolic_symmetry import twirled_harm
from markovsafety.depth.symmetry import hazard_budget, participation_ratio, twirl, twirl_direction
from markovsafety.depth.symmetry_check import twirl_experiment

TWIRLED, RING, SPREAD = twirled_harm(), ring_formula(), spread_formula()
quick = settings(deadline=None, derandomize=True, max_examples=40)
SEEDS = st.integers(0, 2**32 - 1)


def ring(stay, n=8, harm=0.04, refuse=0.06, broken=0.0):
    """States 0 .. n - 1 in a ring: stay or move on with .9; `broken` shifts harm to one half of the ring."""
    P = np.zeros((n + 2, n + 2))
    for s in range(n):
        P[s, s] += 0.9 * stay
        P[s, (s + 1) % n] += 0.9 * (1 - stay)
        tilt = harm * broken * np.cos(2 * np.pi * s / n)
        P[s, n:] = harm + tilt, refuse - tilt
    return ms.Chain(P, {"harm": n, "refusal": n + 1}, 0)


def random_chain(seed, n=5, extra=1):
    """n + extra transient states with random rows, three outcomes."""
    rng = np.random.default_rng(seed)
    m = n + extra
    P = np.zeros((m + 3, m + 3))
    P[:m] = rng.dirichlet(np.full(m + 3, 0.4), size=m)
    return ms.Chain(P, {"harm": m, "refusal": m + 1, "benign": m + 2}, start=0)


def explicit(chain, orbits):
    """The twirl by permutation matrices."""
    n = chain.n_states
    shift = np.eye(n)
    for orbit in orbits:
        shift[orbit] = 0
        shift[orbit, np.roll(orbit, -1)] = 1
    P, copies = chain.P.toarray(), []
    for _ in range(len(orbits[0])):
        copies.append(P)
        P = shift.T @ P @ shift
    assert pytest.approx(chain.P.toarray()) == P  # the last turn closes the group
    return copies, shift


@quick
@given(SEEDS, st.integers(1, 6))
def test_one_orbit_is_the_ratio_of_means(seed, n):
    chain = random_chain(seed, n, extra=0)
    found = twirl(chain)
    copies, shift = explicit(chain, [np.arange(n)])
    P = found.chain.P.toarray()
    assert pytest.approx(sum(copies) / n, abs=1e-15) == P
    assert pytest.approx(shift @ P, abs=1e-15) == P @ shift
    a, r, b = (found.rates[name][0] for name in ("harm", "refusal", "benign"))
    assert found.harm.value == pytest.approx([a / (a + r + b)], abs=1e-13)
    assert TWIRLED.evaluate(a=float(a), r=float(r + b)) == pytest.approx(found.harm.value[0], abs=1e-12)
    # the averaged chain itself, solved without its symmetry, agrees from every state of the orbit
    h = ms.hitting_probability(found.chain, "harm")
    assert h.value[:n] == pytest.approx(np.full(n, found.harm.value[0]), abs=1e-13)
    each = [ms.hitting_probability(ms.Chain(C, chain.outcomes), "harm").value[:n] for C in copies]
    assert np.mean(each, axis=0) == pytest.approx(np.full(n, found.mean_harm[0]), abs=1e-13)
    assert found.gap == pytest.approx(found.harm.value - found.mean_harm)
    assert found.bias == pytest.approx(abs(P - chain.P.toarray()).sum(axis=1) / 2, abs=1e-15)


@quick
@given(SEEDS)
def test_several_orbits_and_states_that_stay(seed):
    """Two cycles of three that turn together, one state that stays: harm comes from the chain of orbits."""
    chain = random_chain(seed, n=6, extra=1)
    orbits = [np.array([0, 2, 4]), np.array([1, 3, 5])]
    found = twirl(chain, [[0, 2, 4], [1, 3, 5]])
    copies, _ = explicit(chain, orbits)
    assert pytest.approx(sum(copies) / 3, abs=1e-15) == found.chain.P.toarray()
    h = ms.hitting_probability(found.chain, "harm").value
    for i, orbit in enumerate(orbits):
        assert h[orbit] == pytest.approx(np.full(3, found.harm.value[i]), abs=1e-13)
    assert found.harm.at_start.value == pytest.approx(h[0]) if found.harm.start else True
    assert found.quotient.n_states == 2 + 1 + 3
    assert ms.hitting_probability(found.quotient, "harm").at_start.value == pytest.approx(h[0], abs=1e-13)


def test_twirling_twice_changes_nothing_and_labels_work():
    chain = toy.ladder(6, 0.3)
    once = twirl(chain, [f"level {i}" for i in range(1, 6)])
    twice = twirl(once.chain)
    assert twice.chain.P.toarray() == pytest.approx(once.chain.P.toarray(), abs=1e-15)
    assert twice.bias.max() < 1e-15
    assert once.harm.value == pytest.approx([0.3])  # one of five leads to harm with .3, one to refusal with .7
    assert twice.gap == pytest.approx([0], abs=1e-14)


def test_harm_may_rise_or_fall():
    """Exact counter-examples to either direction, two states that never meet, and a coin toss over random chains."""
    for harm, refuse, above in (((4, 0), (4, 1), True), ((1, 0), (1, 8), False)):
        C = [[0, 0, harm[0], refuse[0]], [0, 0, harm[1], refuse[1]], [0] * 4, [0] * 4]
        for i in (0, 1):
            C[i][i] = 10 - harm[i] - refuse[i]
        chain = ms.Chain.from_counts(C, {"harm": 2, "refusal": 3})
        mean = sum(F(a, a + r) for a, r in zip(harm, refuse)) / 2
        ratio = F(sum(harm), sum(harm) + sum(refuse))
        assert (ratio > mean) is above
        found = twirl(chain)
        assert found.harm.value[0] == pytest.approx(float(ratio), rel=1e-14)
        assert found.mean_harm[0] == pytest.approx(float(mean), rel=1e-14)
    share = twirl_direction(2000)
    assert share.info["above"] + share.info["below"] == 2000
    # Neither direction is rarer than 2 in 5: a binomial share of 2000 is within .064 of its mean but for 1e-8.
    assert min(share.info["above"], share.info["below"]) > 800
    assert share.info["smallest"] < -0.1 < 0.1 < share.info["largest"]
    assert share.lower < 0.5 < share.upper


@pytest.mark.parametrize(("stay", "printed"), [(0.0, ".946"), (0.5, ".832"), (0.9, ".348"), (0.99, ".147")])
def test_pooling_buys_rows_not_harm(stay, printed):
    """Eight states of a ring, .04 harm, .06 refusal: rows gain 1/8, harm the participation ratio.

    20000 data sets: a variance ratio of dependent normal errors is off by at most .02 relative in one standard error,
    so 12 % is 6 of them (below 1e-8); so is the mean square of rows, which average eight times more.
    """
    chain = ring(stay)
    found = twirl_experiment(chain, 2000, 20_000, seed=1)
    assert f"{found.variance_expected:.3f}".lstrip("0") == printed
    assert found.variance_ratio == pytest.approx(found.variance_expected, rel=0.12)
    assert found.row_ratio == pytest.approx(1 / 8, rel=0.05)
    assert found.error_ratio == pytest.approx(found.variance_ratio, rel=0.01)  # no bias: the truth is symmetric
    q = 0.9 * (1 - stay) / (1 - 0.9 * stay)
    assert RING.evaluate(q=q, n=8) == pytest.approx(participation_ratio(chain), rel=1e-12)


def test_a_truth_that_is_not_symmetric_pays_with_bias():
    found = twirl_experiment(ring(0.5, broken=0.8), 5000, 4000, seed=2)
    assert found.bias < -0.02
    # the mean of 4000 errors of standard deviation below .01 is within 1e-3 of its expectation (6 standard errors)
    assert found.pooled_bias == pytest.approx(found.bias, abs=1e-3)
    assert found.plain_bias == pytest.approx(0, abs=1e-3)
    assert found.variance_ratio < 1 < found.error_ratio
    assert found.row_ratio > 1


@quick
@given(SEEDS, st.integers(1, 7))
def test_participation_lies_between_one_row_and_all(seed, n):
    chain = random_chain(seed, n, extra=0)
    ratio = participation_ratio(chain)
    assert 1 / n - 1e-12 <= ratio <= 1 + 1e-12
    w = np.linalg.inv(np.eye(n) - chain.P.toarray()[:n, :n])[0]
    assert ratio == pytest.approx(w.sum() ** 2 / (n * (w**2).sum()), rel=1e-10)


def test_three_readings_of_a_budget():
    b = hazard_budget(0.96, 10)
    assert b.concentrated == pytest.approx(0.04)
    assert b.fixed_product == pytest.approx(0.04)
    assert f"{b.fixed_sum:.4f}" == "0.3645"  # nine times what got through before
    assert b.extra_data == pytest.approx(0.04**10)
    assert hazard_budget(0.96, 10**9).fixed_sum == pytest.approx(np.exp(-0.96), rel=1e-8)
    attacked = hazard_budget(0.96, 10, [0, 1, 5, 10, 20])
    assert attacked.concentrated.tolist() == pytest.approx([0.04, 1, 1, 1, 1])
    assert (np.diff(attacked.fixed_sum) >= 0).all()
    assert (attacked.fixed_sum[1:3] < 1).all()
    assert attacked.fixed_sum[3:].tolist() == [1, 1] == attacked.extra_data[3:].tolist()
    whole = hazard_budget(1.0, [1, 4], [0, 1])
    assert whole.concentrated.tolist() == [0, 1]
    assert whole.fixed_sum == pytest.approx([0, 0.75**3])


@quick
@given(st.floats(0, 1), st.integers(1, 40), st.integers(0, 50))
def test_budgets_are_ordered(rho, n, k):
    b, free = hazard_budget(rho, n, k), hazard_budget(rho, n)
    assert free.fixed_sum >= free.concentrated - 1e-15
    assert free.fixed_product == pytest.approx(free.concentrated, abs=1e-15)
    assert b.extra_data <= b.fixed_product + 1e-15 <= b.fixed_sum + 2e-15
    if k:
        assert b.fixed_sum <= b.concentrated == 1
    if 0 < rho < 1 and k <= n:
        assert SPREAD.evaluate(rho=rho, n=n, k=k) == pytest.approx(b.fixed_sum, rel=1e-12)


def test_rotating_layers_spreads_the_hazard():
    """One layer that refuses with .9, nine that do nothing: the twirl of layers is the fixed-sum reading."""
    on = np.array([[1.0, 0, 0], [0, 0, 0], [0, 0, 0]])
    guard = np.array([[0.1, 0, 0.9], [0, 0, 0], [0, 0, 0]])
    chain = ms.Chain.layered([guard] + [on] * 9, {"harm": 1, "refusal": 2}, 0)
    found = twirl(chain, target="truncated")
    assert found.harm.value[0] == pytest.approx(hazard_budget(0.9, 10).fixed_sum, rel=1e-14)
    assert found.mean_harm[0] == pytest.approx(0.1)  # any rotation lets as much through
    assert found.bias[:, 0] == pytest.approx([0.81] + [0.09] * 9)
    part = twirl(chain, [0, 1], "truncated")
    assert part.harm.value[0] == pytest.approx(0.55**2)
    assert part.quotient is None
    assert part.bias[2:].max() == 0


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: twirl(ring(0), [0, 0]), "Name every state once|sequences of"),
        (lambda: twirl(ring(0), [[0, 1], [2]]), "sequences of"),
        (lambda: twirl(ring(0), []), "sequences of"),
        (lambda: twirl(ring(0), [0, 8]), "belongs to an outcome"),
        (lambda: twirl(ring(0), target=3), "target moves"),
        (lambda: twirl(ring(0), [0, 77]), "77"),
        (lambda: twirl(ms.Chain.layered([ring(0).P], ring(0).outcomes), [1]), "layers are 0 .. 0"),
        (lambda: participation_ratio(ring(0), [[0, 1], [2, 3]]), "2 cycles"),
        (
            lambda: participation_ratio(ms.Chain([[0, 1.0, 0], [1.0, 0, 0], [0, 0, 0]], {"harm": 2}, 0)),
            "expected visits",
        ),
        (lambda: participation_ratio(ms.Chain(ring(0).P, ring(0).outcomes)), "start"),
        (lambda: twirl_experiment(ms.Chain(ring(0).P, ring(0).outcomes), 10), "per_row=10"),
        (
            lambda: twirl_experiment(ms.Chain([[0, 1 - 1e-12, 1e-12], [1, 0, 0], [0, 0, 0]], {"harm": 2}, 0), 1, 2),
            "no way to an outcome",
        ),
        (lambda: hazard_budget(1.5, 3), "rho is 1.5"),
        (lambda: hazard_budget(0.5, 0), "positions is 0"),
        (lambda: hazard_budget(0.5, 3, -1), "forced is -1"),
        (lambda: twirl_direction(0), "trials=0"),
    ],
)
def test_bad_input_is_named(call, says):
    with pytest.raises(ms.InputError, match=says):
        call()


@pytest.mark.parametrize("found", [TWIRLED, RING, SPREAD], ids=lambda d: d.name)
def test_derivations_stand(found):
    assert found.check() == []
    assert "frac" in found.latex()
