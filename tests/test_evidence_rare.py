"""Rare harm: splitting and importance sampling against exact probabilities, and what both refuse.

Statistical tests state their false-alarm rate: z beyond 6.5 is 1e-10 for a normal mean, counts are held against the
binomial quantile of 1e-8, single intervals are taken at level 1 - 1e-8.
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

import markovsafety as ms
from markovsafety import InputError, UntrustedError, toy
from markovsafety.bench import rare as table
from markovsafety.evidence import rare
from markovsafety.evidence.rare_chain import jumps, missing_support, sample_weighted
from markovsafety.evidence.rare_intervals import effective, pooled

SURE = 1 - 1e-8
QUIET = settings(derandomize=True, deadline=None, max_examples=25)


def exact(chain: ms.Chain, target: str = "harm") -> float:
    return ms.hitting_probability(chain, target).at_start.value


def z_of(values: np.ndarray, p: float) -> float:
    return (values.mean() - p) / (values.std(ddof=1) / np.sqrt(len(values)))


def random_chain(seed: int, n: int = 8) -> ms.Chain:
    rng = np.random.default_rng(seed)
    P = rng.dirichlet(np.full(n, 0.3), n)
    return ms.Chain(P, {"harm": n - 1, "refusal": n - 2}, 0)


def leaky(p: float) -> ms.Chain:
    """A refusal from which one token of probability about p leads to harm."""
    chain = toy.leak(0.7 * p)
    return ms.Chain(chain.P, chain.outcomes, 1, chain.states)


# --- splitting ---


@pytest.mark.parametrize("score", ["committor", "constant steps", "misleading"])
def test_splitting_is_unbiased_whatever_the_levels(score):
    """4000 replications; the mean of their products is normal enough at a relative error of 2 %."""
    chain = toy.ladder(7, 0.3, start=1)
    h = toy.ladder_harm(7, 0.3)
    levels = {"committor": h[2:7], "constant steps": [2, 4, 6], "misleading": [1.5, 2.5]}[score]
    value = {"committor": h, "constant steps": np.arange(8), "misleading": np.array([0, 1, 3, 1, 2, 3, 1, 0])}[score]
    source = jumps(chain, "harm", value)
    hits, _, _ = rare.stages(source, list(map(float, levels)), 50, 4000, np.random.default_rng(0))
    products = (hits / 50).prod(axis=1)
    assert abs(z_of(products, h[1])) < 6.5
    assert products.std() > 0


@pytest.mark.parametrize(("row", "most"), [(0, 1e-3), (6, 1e-6)])
def test_splitting_reaches_a_millionth_and_a_billionth(row, most):
    """200 experiments of the committed table: 20 % error, honest intervals, a fraction `most` of naive cost."""
    name, chain, how = list(table.cases())[row]
    values, ends, _, (rollouts, tokens) = table._split(chain, how, 200, np.random.default_rng(1))
    p = exact(chain)
    assert p == pytest.approx(1e-3 * most, rel=1e-6)
    assert rollouts <= most * 25 / p, name
    assert tokens <= most * 25 / p * ms.hitting_time(chain).at_start.value
    assert np.sqrt(np.mean((values / p - 1) ** 2)) < 0.27  # 0.2 and its sampling error, 6 times 0.011
    covered = ((ends[:, 0] <= p) & (p <= ends[:, 1])).sum()
    assert covered >= stats.binom.ppf(1e-8, 200, 0.95)
    assert np.median(ends[:, 1] / ends[:, 0]) < 2.6


def test_product_interval_sees_what_the_textbook_variance_misses():
    """Particles of one ancestor that is worth much more than the others: replications disagree, fractions do not tell.

    A state drawn at once decides whether the last step succeeds; 800 experiments, counts held against the binomial
    quantile of 1e-8.
    """
    P = np.zeros((6, 6))
    P[0, 1], P[0, 2], P[0, 5] = 0.02, 0.38, 0.6
    P[1, 3], P[1, 5], P[2, 4], P[2, 5] = 0.5, 0.5, 0.5, 0.5
    P = np.pad(P, (0, 1))
    P[3, 6], P[3, 5], P[4, 5] = 0.9, 0.1, 1.0
    chain = ms.Chain(P, {"harm": 6, "refusal": 5}, 0)
    p = 0.02 * 0.5 * 0.9
    source = jumps(chain, "harm", np.array([0, 1, 1, 2, 2, 0, 3.0]))
    hits, _, _ = rare.stages(source, [1.0, 2.0], 60, 8000, np.random.default_rng(2))
    parts = hits.reshape(800, 10, 3)
    ours = np.array([pooled(part, 60, 0.95)[1:3] for part in parts])
    plain = np.array([table._textbook(part, 60) for part in parts])
    covered = [int(((e[:, 0] <= p) & (p <= e[:, 1])).sum()) for e in (ours, plain)]
    assert covered[0] >= stats.binom.ppf(1e-8, 800, 0.94)
    assert covered[1] < stats.binom.ppf(1e-8, 800, 0.94)


def test_pilot_and_layers_agree_with_the_exact_value():
    """One interval each at level 1 - 1e-8."""
    chain = toy.ladder(9, 0.25, start=1)
    options = {"replications": 40, "level": SURE, "n": 300}
    by_pilot = rare.splitting(chain, score=np.arange(10.0), **options)
    assert by_pilot.lower <= exact(chain) <= by_pilot.upper < 3 * by_pilot.lower
    assert by_pilot.info["pilot_rollouts"] > 0
    layered = ms.Chain.layered([chain.P] * 15, chain.outcomes, chain.start)
    bound = rare.splitting(layered, **options)
    assert bound.lower <= exact(layered) <= bound.upper < 3 * bound.lower
    assert exact(layered) < 0.9 * exact(chain)
    assert bound.info["pilot_rollouts"] == 0


def test_a_bound_that_says_why():
    bound = rare.splitting(toy.ladder(9, 0.25, start=1), n=100, seed=4)
    assert bound.reasons["sampling"] == pytest.approx((bound.upper - bound.lower) / 2)
    assert [w for k, w in bound.reasons.items() if k != "sampling"] == [None] * 5
    assert "P(harm)" in str(bound)
    assert bound.value == pytest.approx(np.mean(bound.info["estimates"]))
    assert bound.info["rollouts"] == 100 * 10 * (len(bound.info["levels"]) + 1)
    again = rare.splitting(toy.ladder(9, 0.25, start=1), n=100, seed=4)
    assert again.to_json() == bound.to_json()
    assert rare.splitting(toy.ladder(9, 0.25, start=1), n=100, seed=5).value != bound.value


@QUIET
@given(st.lists(st.integers(1, 30), min_size=1, max_size=6), st.integers(30, 90), st.integers(0, 1000))
def test_resampling_is_even(hits, n, seed):
    chosen = rare._evenly(np.array(hits), n, np.random.default_rng(seed)).reshape(len(hits), n)
    first = np.concatenate([[0], np.cumsum(hits)])
    for row, low, k in zip(chosen, first, hits):
        copies = np.bincount(row - low, minlength=k)
        assert len(copies) == k
        assert set(copies.tolist()) <= {n // k, n // k + 1}


def test_resampling_gives_every_hit_its_share():
    """Mean copies of 7 hits over 20000 draws of 10, against 10/7; z beyond 6.5 is 1e-10 each."""
    rng = np.random.default_rng(0)
    chosen = rare._evenly(np.full(20000, 7), 10, rng).reshape(20000, 10) % 7
    copies = np.array([(chosen == i).sum(axis=1) for i in range(7)])
    for row in copies:
        assert abs(z_of(row.astype(float), 10 / 7)) < 6.5


@QUIET
@given(st.integers(0, 10_000))
def test_pooled_interval_properties(seed):
    rng = np.random.default_rng(seed)
    hits = np.minimum.accumulate(rng.integers(1, 40, (10, 3)), axis=1)
    hits[rng.random(10) < 0.2, 1:] = 0
    value, lower, upper, error = pooled(hits, 40, 0.95)
    assert pooled(hits[::-1], 40, 0.95) == pytest.approx((value, lower, upper, error))
    if hits[:, 2].any():
        assert 0 < lower <= value <= upper <= 1
        assert value == pytest.approx((hits / 40).prod(axis=1).mean())
        t = stats.t.ppf(0.975, 9)
        active = [sum(hits[r, i - 1] > 0 for r in range(10)) if i else 10 for i in range(3)]
        share = [hits[:, i].sum() / (40 * active[i]) for i in range(3)]
        pull = [
            sum((k - share[i] * 40 * (i == 0 or row[i - 1] > 0)) / hits[:, i].sum() for i, k in enumerate(row))
            for row in hits
        ]
        width = t * np.sqrt(10 / 9 * np.sum(np.square(pull)))
        assert lower <= np.prod(share) * np.exp(-width) * (1 + 1e-9)
        assert upper >= min(1, np.prod(share) * np.exp(width)) * (1 - 1e-9)
        wider = pooled(hits, 40, 0.99)
        assert wider[1] < lower
        assert wider[2] >= upper


# --- the exact sampler ---


def test_float64_rows_keep_what_float32_loses():
    p = 1e-12
    row = np.array([0.3, p, 0.7 - p])
    sums = np.cumsum(row.astype(np.float32), dtype=np.float32)
    assert sums[1] == sums[0]  # the plain variant: no uniform at all chooses the rare move
    P = np.zeros((4, 4))
    P[0, 1:] = row
    source = jumps(ms.Chain(P, {"harm": 2, "a": 1, "b": 3}, 0), "harm")
    assert source.indices[0] == 2
    assert source.cumulative[0] == pytest.approx(p, rel=1e-12)

    class Fixed:
        def __init__(self, u):
            self.u = u

        def random(self, n):
            return np.full(n, self.u)

    for u, state in ((0.0, 2), (p * 0.999, 2), (p * 1.001, 1), (0.3, 1), (0.31, 3), (1 - 2**-53, 3)):
        assert source.indices[source._draw(np.zeros(1, int), Fixed(u))[0]] == state


def test_tokens_count_waiting_and_absorbing_classes_end():
    """Waiting is geometric: mean tokens against the expected time, z beyond 6.5 is 1e-10."""
    chain = toy.leak(0.05, end=0.02)
    source = jumps(chain, "harm")
    rng = np.random.default_rng(3)
    each = np.array([source.run(source.begin(50, 1, rng), np.inf, rng)[2] / 50 for _ in range(400)])
    assert abs(z_of(each, ms.hitting_time(chain, ["harm", "benign"]).at_start.value)) < 6.5


# --- importance sampling ---


def test_weights_are_exact_under_the_transformed_chain():
    chain = toy.ladder(12, 0.2, start=1)
    h = ms.hitting_probability(chain, "harm").value
    bound = rare.importance(chain, rare.tilt(chain, h), n=200)
    assert bound.value == pytest.approx(exact(chain), rel=1e-12)
    assert bound.info["effective"] == pytest.approx(200)
    assert bound.lower < bound.value < bound.upper  # all hits in 200 do not prove that all hit
    assert rare.importance(chain, chain, target="refusal", n=200).value == pytest.approx(1.0)


@pytest.mark.parametrize("p", [1e-6, 1e-9])
def test_importance_sampling_sees_one_token_of_that_probability(p):
    """300 experiments of 1000 rollouts: no bias (1e-10), coverage (1e-8), 20 % error at 1000 rollouts."""
    chain = leaky(p)
    loose = ms.Chain(toy.leak(0.1).P, chain.outcomes, 1, chain.states)
    how = {"proposal": loose, "n": 1000}
    values, ends, _, (rollouts, _) = table._weigh(chain, how, 300, np.random.default_rng(5))
    truth = exact(chain)
    assert truth == pytest.approx(p, rel=0.01)
    assert abs(z_of(values, truth)) < 6.5
    assert np.sqrt(np.mean((values / truth - 1) ** 2)) < 0.2
    assert ((ends[:, 0] <= truth) & (truth <= ends[:, 1])).sum() >= stats.binom.ppf(1e-8, 300, 0.95)
    assert rollouts <= 25 / truth * (1e-3 if p > 1e-8 else 1e-6)


@QUIET
@given(st.integers(0, 10_000), st.floats(0.0, 1.0))
def test_tilted_chains_are_chains(seed, power):
    chain = random_chain(seed)
    h = np.asarray(ms.hitting_probability(chain, "harm").value)
    tilted = rare.tilt(chain, h, power=power)
    assert np.allclose(np.asarray(tilted.P.sum(axis=1)).ravel(), 1)
    if power == 0:
        assert np.allclose(tilted.P.toarray(), chain.P.toarray())
    one, other = jumps(chain, "harm"), jumps(tilted, "harm")
    assert missing_support(one, other) is None


def test_tilting_a_layered_chain_leaves_no_variance():
    base = toy.ladder(5, 0.3, start=2)
    chain = ms.Chain.layered([base.P] * 12, base.outcomes, base.start)
    h = ms.hitting_probability(chain, "harm").value
    bound = rare.importance(chain, rare.tilt(chain, h), n=100)
    assert bound.value == pytest.approx(exact(chain), rel=1e-12)


def test_a_proposal_without_support_is_refused_with_what_it_has():
    chain = random_chain(3)
    P = chain.P.toarray()
    i, j = 0, int(np.argmax(P[0, :6] * (np.arange(6) > 0)))
    P[i, j] = 0
    P[i] /= P[i].sum()
    holed = ms.Chain(P, chain.outcomes, 0)
    assert missing_support(jumps(chain, "harm"), jumps(holed, "harm")) == (i, j)
    with pytest.raises(UntrustedError, match="can never move from 0 to") as caught:
        rare.importance(chain, holed, n=4000)
    assert 0 < caught.value.partial.value < exact(chain)
    elsewhere = ms.Chain(chain.P, chain.outcomes, 1)
    with pytest.raises(UntrustedError, match="start in 0"):
        rare.importance(chain, elsewhere, n=100)


def test_moves_that_the_chain_does_not_make_weigh_nothing():
    chain = toy.ladder(4, 0.5, start=2)
    P = np.eye(5) * 0.0
    P[1:4] = 0.2
    wild = ms.Chain(P, chain.outcomes, 2, chain.states)
    hits, weights, _ = sample_weighted(jumps(chain, "harm"), jumps(wild, "harm"), 60_000, np.random.default_rng(0))
    assert (hits & (weights == -np.inf)).any()
    z = np.where(hits, np.exp(weights), 0.0)
    assert abs(z_of(z, 0.5)) < 6.5


# --- weighted hits ---


def test_equal_weights_give_the_exact_poisson_interval():
    """Fay and Feuer's interval becomes Garwood's where hits are rare and weigh the same."""
    hits = np.arange(1_000_000) < 20
    bound = rare.weighted(hits, np.full(len(hits), -3.0))
    scale = np.exp(-3.0) / len(hits)
    assert bound.value == pytest.approx(20 * scale)
    assert bound.lower == pytest.approx(stats.chi2.ppf(0.025, 40) / 2 * scale, rel=0.02)
    assert bound.upper == pytest.approx(stats.chi2.ppf(0.975, 42) / 2 * scale, rel=0.02)


def test_a_poor_proposal_keeps_its_coverage():
    """Weights with a long tail, whose largest is mostly not yet seen: 600 experiments, binomial quantile of 1e-8."""
    _, chain, how = next(c for c in table.cases() if "factor e" in c[2]["level"])
    _, ends, _, _ = table._weigh(chain, {**how, "n": 200}, 600, np.random.default_rng(6))
    ends = ends[~np.isnan(ends[:, 0])]
    assert len(ends) > 400
    covered = ((ends[:, 0] <= exact(chain)) & (exact(chain) <= ends[:, 1])).sum()
    assert covered >= stats.binom.ppf(1e-8, len(ends), 0.95)


def test_weights_beyond_floating_point():
    rng = np.random.default_rng(0)
    hits, spread = rng.random(500) < 0.5, rng.normal(0, 0.3, 500)
    small = rare.weighted(hits, spread - 300)
    assert rare.weighted(hits, spread - 600).value == pytest.approx(small.value * np.exp(-300), rel=1e-9)
    vanishing = rare.weighted(hits, spread - 5000)
    assert vanishing.value == 0 < vanishing.upper
    huge = rare.weighted(hits, spread + 5000)
    assert huge.value == huge.upper == 1
    with (
        np.errstate(over="raise", invalid="raise"),
        pytest.raises(UntrustedError, match=r"effective sample size is 1\.0"),
    ):
        rare.weighted(hits, np.where(np.arange(500) == int(hits.argmax()), 900.0, -900.0))


def test_few_effective_hits_are_refused_with_the_partial_answer():
    for k, fine in ((9, False), (10, True), (0, False)):
        hits = np.arange(100) < k
        if fine:
            assert rare.weighted(hits, np.zeros(100)).value == pytest.approx(0.1)
            continue
        with pytest.raises(UntrustedError, match="below 10") as caught:
            rare.weighted(hits, np.zeros(100))
        partial = caught.value.partial
        assert partial.value == pytest.approx(k / 100)
        assert partial.lower <= k / 100 < partial.upper
    assert effective(np.array([1.0, 1, 1, 0])) == pytest.approx(3)


def test_prompts_that_differ_widen_the_interval():
    """Six prompts, all harm in two of them: drawn prompts are the units, fixed ones are not."""
    prompt = np.repeat(np.arange(6), 100)
    hits = (prompt < 2) & (np.arange(600) % 2 == 0)
    drawn = rare.weighted(hits, np.zeros(600), prompt)
    fixed = rare.weighted(hits, np.zeros(600), prompt, prompts="fixed")
    alone = rare.weighted(hits, np.zeros(600))
    assert drawn.value == fixed.value == alone.value == pytest.approx(1 / 6)
    assert drawn.upper - drawn.lower > 2 * (alone.upper - alone.lower)
    assert fixed.upper - fixed.lower < alone.upper - alone.lower
    assert "not assessed" in fixed.info["note"]


# --- what is refused ---


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda c: rare.splitting(c, replications=9), "replications is 9"),
        (lambda c: rare.splitting(c, n=1), "n is 1"),
        (lambda c: rare.splitting(c, levels=[0.5, 0.1]), "levels are"),
        (lambda c: rare.splitting(c, levels=[np.nan]), "levels are"),
        (lambda c: rare.splitting(c, score=np.zeros(3)), "shape"),
        (lambda c: rare.splitting(c, score=np.full(c.n_states, np.nan)), "nan"),
        (lambda c: rare.splitting(c, "truncated"), "truncated"),
        (lambda c: rare.splitting("a model"), "cannot be split"),
        (lambda c: rare.splitting(ms.Chain(c.P, c.outcomes)), "no start law"),
        (lambda c: rare.importance(c, toy.deep()), "same states"),
        (lambda c: rare.importance(c, None), "log-probabilities"),
        (lambda c: rare.tilt(c, -np.ones(c.n_states)), "negative"),
        (lambda c: rare.weighted([True], [np.nan]), "rollout 0 is nan"),
        (lambda c: rare.weighted([True], [np.inf]), "inf"),
        (lambda c: rare.weighted([True], [0.0, 1.0]), "shapes"),
        (lambda c: rare.weighted([], []), "shapes"),
        (lambda c: rare.weighted([True], [0.0], prompts="some"), "prompts is"),
    ],
)
def test_bad_input_is_named(call, says):
    with pytest.raises(InputError, match=says) as caught:
        call(toy.ladder(5, 0.3))
    assert caught.value.next


def test_nothing_reached_bounds_from_above():
    with pytest.raises(UntrustedError, match="no level was ever reached") as caught:
        rare.splitting(leaky(1e-9), n=100)
    partial = caught.value.partial
    assert partial.value == 0
    assert partial.upper == pytest.approx(1 - 0.025 ** (1 / 1000))
    assert partial.info["tokens"] > 1000
    with pytest.raises(UntrustedError, match="pilot") as caught:
        rare.splitting(leaky(1e-9), score=np.array([5.0, 5, 5, 5]), n=50)
    assert caught.value.partial.upper == 1


def test_levels_that_stop_half_way_keep_the_way_so_far():
    """Stuck before a step of 1e-9: the upper end is that of coming there, about (1/9)^2 of a level each."""
    P = np.zeros((5, 5))
    for i, up in ((0, 0.1), (1, 0.1), (2, 1e-9)):
        P[i, i + 1], P[i, 4] = up, 1 - up
    chain = ms.Chain(P, {"harm": 3, "refusal": 4}, 0)
    with pytest.raises(UntrustedError, match="2 of 3 levels") as caught:
        rare.splitting(chain, n=400)
    assert 0.01 < caught.value.partial.upper < 0.02


def test_a_target_out_of_reach_is_refused():
    P = np.zeros((3, 3))
    P[0, 1], P[2, 2] = 1.0, 1.0
    with pytest.raises(UntrustedError, match="out of reach") as caught:
        rare.splitting(ms.Chain(P, {"refusal": 1, "harm": 2}, 0))
    assert caught.value.partial.upper == 0
