"""The KL-regularised optimum, harm information, gradients by depth, the path of training, the penalty on recovery."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import markovsafety as ms
from markovsafety import toy
from markovsafety.depth import (
    alignment_inefficiency,
    harm_gradient,
    harm_information,
    kl_profile,
    needed_strength,
    odds_shift,
    optimum,
    trajectory,
)
from markovsafety.depth.optimum import both_sides
from markovsafety.evidence import branch_exact

quick = settings(deadline=None, derandomize=True, max_examples=40)
ENDS = {"harm": 4, "refusal": 5}


def random_layers(rng, layers=12, n=4):
    """Matrices of a chain with n states, harm and refusal."""

    def one():
        leave = 0.08 + 0.2 * rng.random()
        P = np.zeros((n + 2, n + 2))
        P[:n, :n] = rng.dirichlet(np.ones(n) * 0.7, size=n) * (1 - leave)
        P[:n, n:] = rng.dirichlet(np.ones(2), size=n) * leave
        P[n, n] = P[n + 1, n + 1] = 1
        return P

    return [one() for _ in range(layers)]


LAYERS = random_layers(np.random.default_rng(9))
TWELVE = ms.Chain.layered(LAYERS, ENDS, 0)  # numpy's PCG64 with seed 9; four states, twelve positions


def harm_at(chain, target="harm"):
    return ms.hitting_probability(chain, target).at_start.value


def coins(p, q):
    """KL between two coins."""
    return sum(a * math.log(a / b) for a, b in ((p, q), (1 - p, 1 - q)) if a > 0)


def answers(layers, start=0):
    """All answers of a layered chain with their probabilities."""
    n = layers[0].shape[0]
    for path in itertools.product(range(n), repeat=len(layers)):
        p, s = 1.0, start
        for P, j in zip(layers, path):
            p *= P[s, j]
            s = j
        if p > 0:
            yield path, p


# --- the optimum ---


@quick
@given(st.integers(0, 10**6), st.floats(-6, 30))
def test_odds_of_harm_shift_alike_at_every_prefix(seed, strength):
    chain = ms.Chain.layered(random_layers(np.random.default_rng(seed), 5), ENDS, 0)
    h, g = both_sides(chain)
    new, rest = both_sides(optimum(chain, strength))
    inside = (h > 0) & (g > 0)
    shift = np.log(h[inside] / g[inside]) - np.log(new[inside] / rest[inside])
    assert shift == pytest.approx(np.full(inside.sum(), strength), abs=1e-11)
    assert (new[~inside] == h[~inside]).all()


@quick
@given(st.integers(0, 10**6), st.floats(0.01, 20))
def test_homogeneous_optimum(seed, strength):
    P = random_layers(np.random.default_rng(seed), 1)[0]
    chain = ms.Chain(P, ENDS, 0)
    new = optimum(chain, strength)
    assert (new.P.diagonal() == chain.P.diagonal()).all()
    found = odds_shift(chain, new, 10)
    assert found.shift == pytest.approx(np.full(11, strength), abs=1e-10)
    assert found.slope == pytest.approx(0, abs=1e-11)
    assert found.half is None
    spent = alignment_inefficiency(chain, new)
    assert spent.spent == pytest.approx(coins(harm_at(new), harm_at(chain)), rel=1e-10)
    assert spent.ratio == pytest.approx(1, abs=1e-10)


@pytest.mark.parametrize("beta", [10.0, 1.0, 0.3, 0.05])
def test_total_kl_is_that_of_two_coins(beta):
    new = optimum(TWELVE, 1 / beta)
    assert kl_profile(TWELVE, new).total == pytest.approx(coins(harm_at(new), harm_at(TWELVE)), abs=1e-12)
    h = harm_at(TWELVE)
    assert harm_at(new) == pytest.approx(
        math.exp(-1 / beta) * h / (1 - (1 - math.exp(-1 / beta)) * h), rel=1e-12, abs=0
    )


def test_optimum_by_enumeration_of_all_answers():
    layers = random_layers(np.random.default_rng(2), 4, n=2)
    ends, strength = {"harm": 2, "refusal": 3}, 1.7
    chain = ms.Chain.layered(layers, ends, 0)
    new = optimum(chain, strength)
    tilted = {a: p * math.exp(-strength * (2 in a)) for a, p in answers(layers)}
    total = sum(tilted.values())
    found = dict(answers([P.toarray() for P in new.layers]))
    assert found.keys() == tilted.keys()
    assert max(abs(found[a] - tilted[a] / total) for a in found) < 1e-14
    kl = sum(
        p * math.log(p / q) for (a, p), (b, q) in zip(sorted(found.items()), sorted(dict(answers(layers)).items()))
    )
    assert kl_profile(chain, new).total == pytest.approx(kl, abs=1e-12)
    # No other chain gets a lower value of the objective: E harm + KL / strength.
    rng = np.random.default_rng(0)
    best = harm_at(new) + kl_profile(chain, new).total / strength
    assert best == pytest.approx(-math.log(total) / strength, rel=1e-12)
    for _ in range(50):
        other = [P.toarray() * np.exp(0.2 * rng.normal(size=P.shape)) for P in new.layers]
        other = ms.Chain.layered([P / P.sum(axis=1, keepdims=True) for P in other], ends, 0)
        assert harm_at(other) + kl_profile(chain, other).total / strength > best


def test_strength_without_end_conditions_on_no_harm():
    new = optimum(TWELVE, math.inf)
    h, g = both_sides(TWELVE)
    assert harm_at(new) == 0
    for t in range(12):
        want = LAYERS[t][:4] * g[t + 1] / g[t, :4, None]
        assert new.layers[t].toarray()[:4] == pytest.approx(want, abs=1e-14)
    assert kl_profile(TWELVE, new).total == pytest.approx(-math.log1p(-h[0, 0]), rel=1e-12)
    assert np.isinf(odds_shift(TWELVE, new).shift).all()
    assert odds_shift(TWELVE, new).slope is None
    attack = optimum(TWELVE, -math.inf)
    assert harm_at(attack) == pytest.approx(1, abs=1e-14)


def test_certain_harm_stays_certain():
    P = [[0.5, 0.3, 0.1, 0.1], [0, 0.4, 0.6, 0], [0] * 4, [0] * 4]
    chain = ms.Chain(P, {"harm": 2, "refusal": 3}, 0)
    for strength in (1.0, 40.0, math.inf):
        new = optimum(chain, strength)
        assert new.P.toarray()[1].tolist() == P[1]
        assert ms.hitting_probability(new, "harm").value[1] == 1
    assert optimum(chain, math.inf).P.toarray()[0, 1] == 0
    assert optimum(chain, 0.0).P.toarray() == pytest.approx(chain.P.toarray(), abs=1e-16)


def test_digits_hold_where_refusal_is_almost_certain_and_where_harm_is():
    """h near 0 and near 1: 1 - h is never formed."""
    chain = ms.Chain([[0, 1e-18, 1, 0], [0.5, 0, 0, 0.5], [0] * 4, [0] * 4], {"harm": 2, "refusal": 3}, 0)
    new = optimum(chain, 60.0)
    g = both_sides(new)[1][0] / both_sides(new)[0][0]
    assert g == pytest.approx(0.5e-18 * math.exp(60.0), rel=1e-12, abs=0)
    odds = both_sides(optimum(chain, -5.0))
    assert odds[1][0] == pytest.approx(0.5e-18 * math.exp(-5.0), rel=1e-12, abs=0)


def test_a_leaky_refusal_is_shifted_like_everything_else():
    chain = toy.leak()
    new = optimum(chain, 2.0)
    shift = odds_shift(chain, new).by_state
    assert shift[:2] == pytest.approx([2, 2], abs=1e-13)
    assert new.P.toarray()[1, 0] < chain.P.toarray()[1, 0]


@quick
@given(st.integers(0, 10**6), st.floats(1e-6, 0.999))
def test_needed_strength_hits_the_harm_that_was_asked_for(seed, harm):
    rng = np.random.default_rng(seed)
    chain = ms.Chain.layered(random_layers(rng, 4), ENDS, [*rng.dirichlet(np.ones(4)), 0, 0])
    strength, reason = needed_strength(chain, harm)
    assert reason == ""
    assert harm_at(optimum(chain, strength)) == pytest.approx(harm, rel=1e-9)


def test_needed_strength_at_the_edges():
    assert needed_strength(TWELVE, 0.1)[0] == pytest.approx(
        math.log(harm_at(TWELVE) / (1 - harm_at(TWELVE))) - math.log(0.1 / 0.9), rel=1e-12
    )
    assert needed_strength(TWELVE, 0.0) == (math.inf, "")
    mixed = ms.Chain([[0.5, 0.25, 0.25], [0] * 3, [0] * 3], {"harm": 1, "refusal": 2}, [0.6, 0.3, 0.1])
    strength, reason = needed_strength(mixed, 0.2)
    assert strength is None
    assert "certain already" in reason
    assert "cannot be reached" in needed_strength(mixed, 0.95)[1]
    assert harm_at(optimum(mixed, needed_strength(mixed, 0.4)[0])) == pytest.approx(0.4, rel=1e-12)
    assert needed_strength(mixed, 0.3)[0] == math.inf


# --- where it is spent ---


def test_kl_by_depth_is_the_harm_information_to_second_order_only():
    """arXiv 2603.04851: KL_t = O(strength^2 I_t) holds for small strengths; for large ones the ratio falls to 1 %."""
    information = harm_information(TWELVE)
    ratio, alike = {}, {}
    for strength in (1e-3, 0.1, 20.0):
        steps = kl_profile(TWELVE, optimum(TWELVE, strength)).steps
        ratio[strength] = steps / (strength**2 * information / 2)
        alike[strength] = np.corrcoef(steps, information)[0, 1]
    assert ratio[1e-3] == pytest.approx(np.ones(12), abs=1e-3)
    assert round(float(ratio[0.1][[0, 3, 7, 11]].mean()), 2) == 0.97
    assert 0.96 < ratio[0.1].min() <= ratio[0.1].max() < 0.99
    assert 0.006 <= ratio[20.0].min() <= ratio[20.0].max() < 0.011
    assert f"{alike[0.1]:.4f}" == "0.9999"
    assert f"{alike[20.0]:.3f}" == "0.926"


@quick
@given(st.integers(0, 10**6))
def test_no_alignment_is_cheaper_than_the_optimum(seed):
    rng = np.random.default_rng(seed)
    layers = random_layers(rng, 4)
    chain = ms.Chain.layered(layers, ENDS, [*rng.dirichlet(np.ones(4)), 0, 0])
    noisy = [P * np.exp(rng.normal(size=P.shape)) for P in layers]
    other = ms.Chain.layered([P / P.sum(axis=1, keepdims=True) for P in noisy], ENDS, chain.start)
    found = alignment_inefficiency(chain, other)
    assert found.spent >= found.least * (1 - 1e-9)
    assert found.ratio >= 1
    same = optimum(chain, needed_strength(chain, found.after)[0])
    assert kl_profile(chain, same).total == pytest.approx(found.least, rel=1e-9, abs=1e-14)


def test_kl_of_a_homogeneous_chain_is_the_sum_over_all_depths():
    chain, new = toy.leak(), optimum(toy.leak(), 3.0)
    short, long = kl_profile(chain, new, 5), kl_profile(chain, new, 400)
    assert short.total == pytest.approx(long.total, rel=1e-12)
    assert short.beyond == pytest.approx(long.steps[5:].sum(), rel=1e-10)
    assert short.steps == pytest.approx(long.steps[:5])
    assert kl_profile(chain, chain).total == 0
    forbidden = ms.Chain([[0.9, 0.1, 0], [0] * 3, [0] * 3], {"harm": 1, "refusal": 2}, 0)
    allowed = ms.Chain([[0.8, 0.1, 0.1], [0] * 3, [0] * 3], {"harm": 1, "refusal": 2}, 0)
    assert kl_profile(forbidden, allowed).total == math.inf
    assert alignment_inefficiency(forbidden, allowed).ratio == math.inf
    assert alignment_inefficiency(chain, chain).ratio == 1


def test_refusing_in_the_first_token_only_is_seen_in_the_shift():
    chain = trajectory([[0.88, 0.02, 0.10]] * 10, 0.8)
    first = trajectory([[0.05, 0.949, 0.001], *[[0.88, 0.02, 0.10]] * 9], 0.8)
    found = odds_shift(chain, first)
    assert found.shift[0] > 3
    assert found.shift[1:] == pytest.approx(np.zeros(len(found.shift) - 1), abs=1e-12)
    assert found.half == 1
    assert found.slope < 0
    assert alignment_inefficiency(chain, first).ratio > 1.1
    worse = odds_shift(first, chain)  # KL has no sign, the shift has
    assert worse.shift[0] == pytest.approx(-found.shift[0])
    assert odds_shift(chain, first, prefixes="after").shift == pytest.approx(found.shift)


# --- harm information, branches, gradients ---


def test_harm_information_sums_to_the_variance_of_the_outcome():
    information, h = harm_information(TWELVE), harm_at(TWELVE)
    assert round(float(information.sum()), 7) == 0.2237033
    assert information.sum() == pytest.approx(h * (1 - h), rel=1e-13)
    branches = branch_exact(TWELVE, range(13), [1, 5])
    shares = np.concatenate([[0], np.cumsum(information)]) / (h * (1 - h))
    assert np.abs(branches.rho.value - shares).max() < 1e-14
    homogeneous = toy.shallow(3)
    h = harm_at(homogeneous)
    assert harm_information(homogeneous, 400).sum() == pytest.approx(h * (1 - h), rel=1e-12)


def test_branch_surface_is_the_failure_of_an_ensemble():
    """F(m, k) = E h(X_k)^m: five continuations of four shared tokens are all harmful with probability .183664."""
    surface = branch_exact(TWELVE, [0, 4, 12], [1, 5]).surface.value
    assert f"{surface[1, 1]:.6f}" == "0.183664"
    law = np.linalg.multi_dot([np.eye(6)[0], *LAYERS[:4]])  # enumeration over the shared prefix
    assert surface[1, 1] == pytest.approx(float(law @ both_sides(TWELVE)[0][4] ** 5), abs=1e-12)
    assert surface[0, 1] == pytest.approx(harm_at(TWELVE) ** 5, rel=1e-12)
    assert surface[2, 1] == pytest.approx(harm_at(TWELVE), rel=1e-12)
    rng, n = np.random.default_rng(1), 100_000

    def walk(s, layers):
        for P in layers:
            s = np.minimum((rng.random(len(s))[:, None] > P.cumsum(axis=1)[s]).sum(axis=1), 5)
        return s

    shared = walk(np.zeros(n, dtype=int), LAYERS[:4])
    bad = np.logical_and.reduce([walk(shared, LAYERS[4:]) == 4 for _ in range(5)])
    # 6 standard errors: false alarms below 1e-8.
    assert abs(bad.mean() - surface[1, 1]) < 6 * math.sqrt(surface[1, 1] * (1 - surface[1, 1]) / n)


@pytest.mark.parametrize("prefill", [None, {0: 0.5, 3: 0.3, 7: 0.2}])
def test_gradient_by_depth_against_differences(prefill):
    found = harm_gradient(TWELVE, prefill=prefill)
    h = both_sides(TWELVE)[0]

    def objective(layers):
        law, total = np.eye(6)[0], 0.0
        value = [None] * 13
        value[12] = np.eye(6)[4]
        for t in range(11, -1, -1):
            value[t] = layers[t] @ value[t + 1]
        for k in range(8):
            alive = np.where(np.arange(6) < 4, law, 0)  # the law of forced tokens is the base's and stays
            total += (prefill or {0: 1.0}).get(k, 0) * alive @ value[k] / alive.sum()
            law = alive @ LAYERS[k]
        return total

    assert found.harm == pytest.approx(objective(LAYERS), rel=1e-12)
    for t, s in ((0, 0), (3, 2), (7, 1), (11, 3)):
        for j in range(6):
            ends = []
            for sign in (1, -1):
                layers = [P.copy() for P in LAYERS]
                row = layers[t][s] * np.exp(sign * 1e-5 * (np.arange(6) == j))
                layers[t][s] = row / row.sum()
                ends.append(objective(layers))
            assert found.layers[t][s, j] == pytest.approx((ends[0] - ends[1]) / 2e-5, abs=1e-10)
    assert np.abs([G.sum(axis=1) for G in found.layers]).max() < 1e-15  # softmax: moving all logits moves nothing
    if prefill is None:
        assert (found.norm**2 <= harm_information(TWELVE) * (1 + 1e-12)).all()
        assert found.harm == pytest.approx(h[0, 0])


def test_gradient_of_shared_logits_is_the_sum_over_depths():
    chain = toy.shallow(3)
    found = harm_gradient(chain, 500)
    often = np.asarray(ms.visits(chain).value)
    h = np.asarray(ms.hitting_probability(chain, "harm").value)
    want = np.where(np.arange(6) < 4, often, 0)[:, None] * chain.P.toarray() * (h[None, :] - h[:, None])
    assert sum(G.toarray() for G in found.layers) == pytest.approx(want, abs=1e-13)
    entered = harm_gradient(chain, 5, prefill={3: 1.0})
    assert entered.visits[3].tolist() == [0, 0, 0, 1, 0, 0]
    assert (entered.norm[:3] == 0).all()


def test_what_is_refused():
    layered = ms.Chain.layered(LAYERS, ENDS)
    other = ms.Chain.layered(LAYERS, ENDS, 1)
    faults = [
        lambda: optimum(TWELVE, math.nan),
        lambda: optimum(TWELVE, "much"),
        lambda: optimum(TWELVE, 1.0, target="nothing"),
        lambda: needed_strength(TWELVE, 1.5),
        lambda: needed_strength(layered, 0.1),
        lambda: kl_profile(TWELVE, toy.leak()),
        lambda: kl_profile(TWELVE, other),
        lambda: kl_profile(layered, layered),
        lambda: odds_shift(TWELVE, TWELVE, prefixes="none"),
        lambda: harm_gradient(layered),
        lambda: harm_gradient(TWELVE, 13),
        lambda: harm_gradient(TWELVE, prefill={0: 0.5}),
        lambda: harm_gradient(TWELVE, prefill={12: 1.0}),
    ]
    for fault in faults:
        with pytest.raises(ms.InputError):
            fault()
