"""Beliefs, the latent guard, its block in the chain and the choice of its threshold."""

from __future__ import annotations

import dataclasses
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom

import markovsafety as ms
from markovsafety import Bound, InputError, hitting_probability, organism, toy
from markovsafety.bench.inside import buckets_of_world, host_of_world
from markovsafety.interventions import (
    Buckets,
    Centres,
    Guard,
    assess,
    belief_table,
    believe,
    centres,
    guarded,
    label,
    latent_guard,
    measure_blocked,
    open_host,
    policy,
    probe_beliefs,
    separate,
    states,
    under_attack,
)
from markovsafety.organism import worlds
from markovsafety.outcomes import CODES
from markovsafety.rollouts import Rollouts

WORLDS = Path(__file__).parent / "fixtures" / "worlds"


@lru_cache
def host(name: str = "base"):
    return host_of_world(WORLDS / name)


@lru_cache
def buckets(half: int) -> Buckets:
    return buckets_of_world(host(), half, n=24)


@lru_cache
def guard() -> Guard:
    return latent_guard(host(), buckets(0))


@lru_cache
def assessed():
    return assess(host(), guard(), buckets(1))


# -------------------------------------------------------------------------------------------------------------- beliefs


def test_beliefs_are_differences_of_cosines():
    """The definition, once more by hand: levels of one point left out, the others averaged."""
    means = centres(host(), buckets(0))
    found = believe(host(), means, buckets(1).prompts)
    points = states(host(), buckets(1).prompts).astype(float)
    assert means.used("harm").all()
    assert means.used("refusal").tolist() == [False, True, True, True, True]  # t_post begins as one token
    for place, (side, scores) in enumerate((("harm", found.harm), ("refusal", found.refusal))):
        by_level = []
        for at in np.flatnonzero(means.used(side)):
            h, (one, other) = points[:, at, place], getattr(means, side)[:, at]
            cosines = [h @ m / np.linalg.norm(h, axis=1) / np.linalg.norm(m) for m in (one, other)]
            by_level.append(cosines[0] - cosines[1])
        assert np.allclose(scores, np.mean(by_level, axis=0), atol=1e-6)
    assert (found.refusal_by_level[:, 0] == 0).all()


def test_a_mean_or_activation_of_zero_is_refused():
    level = np.ones((2, 2, 3))
    level[1] = 2 * np.arange(3)
    zero = level.copy()
    zero[1, 1] = 0
    with pytest.raises(InputError, match="mean of refusal is zero at level 1"):
        Centres(level, zero, (3, 3))
    points = np.ones((2, 2, 3))
    points[1, 0] = 0
    with pytest.raises(InputError, match="activation of prompt 1 is zero at level 0"):
        Centres(level, level, (3, 3)).scores(points, "harm")


def test_beliefs_that_cannot_be_read_are_refused():
    means = centres(host(), buckets(0))
    with pytest.raises(InputError, match="another model"):
        believe(host("replanted"), means, buckets(1).prompts)
    assert len(believe(host("replanted"), means.transferred(), buckets(1).prompts).harm) == len(buckets(1).prompts)
    one = dataclasses.replace(means, harm=np.stack([means.harm[0], means.harm[0]]))
    with pytest.raises(InputError, match="one point at every level"):
        believe(host(), one, buckets(1).prompts)
    empty = buckets(0).of(buckets(0).harmful)
    with pytest.raises(InputError, match="no accepted harmless prompts"):
        centres(host(), empty)


def test_bare_prompts_have_a_belief_and_no_refusal():
    prompts = worlds.prompts(n=12, harmful=True, half=1)
    cut = label(host(), prompts, tokens=worlds.REFUSAL_IDS, bare=True).prompts
    found = believe(host(), guard().means, [*cut, *prompts])
    assert np.allclose(found.harm[:12], found.harm[12:], atol=1e-4)
    assert np.isnan(found.refusal[:12]).all()
    assert np.isfinite(found.refusal[12:]).all()


def test_the_table_counts_every_decided_prompt_once():
    rows = belief_table(believe(host(), guard().means, buckets(1).prompts), buckets(1))
    by_name = {(r["category"], r["believed"], r["refused"]): r for r in rows}
    assert sum(r["prompts"] for r in rows if r["category"] == "all") == 144
    parts = [r for r in rows if r["category"] not in ("all",)]
    assert sum(r["prompts"] for r in parts) == 144
    assert len(parts) == 4 * 5
    # Belief and behaviour differ where the world was planted so: 24 jailbroken and 24 scary prompts.
    assert by_name["all", True, False]["prompts"] == by_name["all", False, True]["prompts"] == 24
    assert by_name["all", True, False]["harmful"] == 24
    assert by_name["all", False, True]["harmful"] == 0
    assert by_name["bio", False, True]["share"].value == 0
    assert by_name["bio", False, True]["share"].upper > 0.05
    with pytest.raises(InputError, match="behaviours"):
        belief_table(believe(host(), guard().means, buckets(1).prompts[:5]), buckets(1))


def test_separation_is_found_where_it_was_planted_and_only_there():
    found = separate(host(), buckets(0), buckets(1))
    assert found
    assert found.best("t_inst")["mismatch"].lower > 0.7
    assert found.best("t_post")["mismatch"].upper < 0.3
    assert found.best("t_post")["refusal"] > 0.4
    # Behaviour that has nothing to do with the model: no direction at t_post can follow it.
    rng = np.random.default_rng(0)
    drawn = [Buckets(b.prompts, b.harmful, rng.random(len(b.prompts))) for b in (buckets(0), buckets(1))]
    nothing = separate(host(), *drawn)
    assert nothing.verdict == "not separated"
    assert {"position", "level", "mismatch", "control", "harm", "refusal"} == set(nothing.rows[0])


# ---------------------------------------------------------------------------------------------------------------- guard


def test_the_guard_is_right_where_behaviour_is_not():
    found = assessed()
    assert all(found.accuracy[b].value >= 0.9 for b in found.accuracy)
    assert len(found.accuracy) == 4
    for bucket in ("accepted_harmful", "refused_harmless"):
        assert found.refusal[bucket].value <= 0.1
        assert found.refusal[bucket].upper > 0  # 0 of 24 is no proof
    assert found.auc.value >= 0.9
    assert set(found.rates) == set(worlds.CATEGORIES)
    assert found.control["accuracy"].value < found.accuracy["refused_harmful"].value
    assert not any(row["own negatives"] for row in found.categories.values())
    curve = found.categories["bio"]["curve"]
    at = np.searchsorted(-curve["threshold"], -found.threshold)
    assert curve["tpr"][at] == pytest.approx(found.rates["bio"].value, abs=1e-12)
    assert (guard().blocks(host(), buckets(1).prompts) == (found.scores > 0)).all()
    assert not guard().at(np.inf).blocks(host(), buckets(1).prompts).any()


def test_a_random_guard_has_centres_as_far_apart():
    one, other = guard().means, guard().means.control(1)
    for side in ("harm", "refusal"):
        apart = [np.linalg.norm(np.subtract(*getattr(m, side)), axis=-1) for m in (one, other)]
        assert np.allclose(*apart)
        assert not np.allclose(getattr(one, side)[0, 1], getattr(other, side)[0, 1])


def test_a_probe_stands_beside_the_guard():
    found = probe_beliefs(host(), buckets(0), buckets(1), 2)
    assert found.auc.lower > 0.9
    assert found.p == 1 / 20


def test_guards_that_cannot_be_assessed_are_refused():
    for part, says in ((buckets(1).of(buckets(1).harmful), "0 harmless prompts"), (buckets(1), "0 controls")):
        with pytest.raises(InputError, match=says):
            assess(host(), guard(), part, controls=0 if part is buckets(1) else 4)
    other = open_host(organism.model_path("shallow"))
    wider = dataclasses.replace(other, width=32)
    with pytest.raises(InputError, match="other shapes"):
        under_attack(guard(), host(), wider, buckets(1), tokens=worlds.REFUSAL_IDS)


# ------------------------------------------------------------------------------------------------- a block in the chain


@given(p=st.floats(0, 1))
@settings(deadline=None, max_examples=20)
def test_a_guarded_chain_does_less_harm(p):
    """(1 - p) h at the start, p in the block, nothing else moved; homogeneous and layered."""
    plain = toy.leak()
    layered = ms.Chain.layered(
        [plain.P] * 5, {k: list(v) for k, v in plain.outcomes.items()}, plain.start, plain.states
    )
    for chain in (plain, layered):
        behind = guarded(chain, p)
        before, after = (hitting_probability(c, "harm") for c in (chain, behind))
        assert after.at_start.value == pytest.approx((1 - p) * before.at_start.value, abs=1e-12)
        assert hitting_probability(behind, "block").at_start.value == pytest.approx(p, abs=1e-12)
        assert np.array_equal(np.asarray(after.value)[..., :-1], np.asarray(before.value))
        assert behind.states[-1] == "block"


def test_laws_after_forced_tokens_are_guarded_too():
    chain = toy.leak()
    entered = dataclasses.replace(chain, entry={1: np.asarray(chain.start)})
    assert guarded(entered, 0.25).entry[1][-1] == 0.25


@given(h=st.floats(0, 1), p=st.floats(0, 1), wide=st.floats(0, 0.3))
def test_a_guarded_bound_has_the_corners(h, p, wide):
    harm = Bound(h, max(h - wide, 0), min(h + wide, 1), 0.975, {"sampling": wide})
    rate = Bound(p, max(p - wide, 0), min(p + wide, 1), 0.975, {"sampling": wide})
    found = guarded(harm, rate)
    assert found.value == pytest.approx((1 - p) * h)
    assert found.lower == pytest.approx(max((1 - rate.upper) * harm.lower, 0), abs=1e-12)
    assert found.upper == pytest.approx((1 - rate.lower) * harm.upper, abs=1e-12)
    assert found.level == pytest.approx(0.95)
    assert guarded({"a": harm}, {"a": rate, "b": rate})["a"].value == found.value


@pytest.mark.parametrize(
    ("source", "rate", "says"),
    [
        (0.5, 1.5, "rate is 1.5"),
        ({"a": 0.5}, {"b": 0.5}, "no rate is given for a"),
        ({"a": 0.5}, 0.5, "no rate is given for a"),
        (guarded(toy.leak(), 0.5), 0.5, "cannot be guarded"),
        (dataclasses.replace(toy.leak(), start=None), 0.5, "cannot be guarded"),
    ],
)
def test_what_cannot_be_guarded_is_refused(source, rate, says):
    with pytest.raises(InputError, match=says):
        guarded(source, rate)


def spoken(rng, harm: np.ndarray, n: int, category: str = "all") -> Rollouts:
    """n answers to each prompt, of one token, harmful at the given rates."""
    ids = np.repeat(np.arange(len(harm)), n)
    hit = rng.random(len(ids)) < harm[ids]
    outcome = np.where(hit, CODES["harm"], CODES["refusal"])
    return Rollouts.of([[1]] * len(ids), prompt_id=ids, category=category, outcome=outcome, hit=0)


def test_independent_guards_are_predicted_by_their_rate():
    """The test's error rate over 300 worlds, and the gap's cover: hits below the bound have probability below 1e-7."""
    rng, alarms, covered, low, draws = np.random.default_rng(0), 0, 0, 0, 300
    for _ in range(draws):
        harm = rng.beta(0.5, 1, 40)
        found = measure_blocked(spoken(rng, harm, 8), rng.random(40) < 0.4, draws=199)
        row = found.rows["all"]
        alarms += not found.independent
        low += row["p"] <= 0.5
        covered += row["gap"].lower <= 0 <= row["gap"].upper
        identity = row["measured"].value - (1 - row["rate"].value) * row["harm"].value
        assert row["gap"].value == pytest.approx(identity, abs=1e-12)
        assert row["predicted"].lower <= row["predicted"].value <= row["predicted"].upper
    assert alarms <= binom.ppf(1 - 1e-7, draws, 0.05)
    assert binom.ppf(1e-7, draws, 0.45) <= low <= binom.ppf(1 - 1e-7, draws, 0.5)  # ties take some from below 0.5
    assert covered >= binom.ppf(1e-7, draws, 0.95)


def test_a_guard_that_looks_at_the_harm_is_noticed():
    """One that blocks the harmless half of a category, and one that blocks the harmful half."""
    rng = np.random.default_rng(1)
    harm = np.repeat([0.0, 0.9], 20)
    for blocked, sign in ((harm < 0.5, 1), (harm > 0.5, -1)):
        found = measure_blocked(spoken(rng, harm, 8), blocked)
        assert not found.independent
        gap = found.rows["all"]["gap"]
        assert sign * gap.value > 0.2
        assert not gap.lower <= 0 <= gap.upper
    same = measure_blocked(spoken(rng, harm, 8), np.zeros(40, bool))
    assert same.independent
    assert same.rows["all"]["gap"].upper > 0


def test_the_guard_in_the_world_blocks_as_predicted():
    """M4: a guard in the middle of the scores stops some of each category, whatever they would have been answered.

    All categories at once at a false-alarm rate of 1e-6, on sampled answers of the model.
    """
    part = buckets(1)
    rolls = ms.sample(host().engine, list(part.prompts), n=4, max_tokens=14, judge=worlds.world_judge(), progress=False)
    threshold = float(np.median(assessed().scores[part.harmful]))
    blocked = guard().at(threshold).blocks(host(), part.prompts)
    found = measure_blocked(rolls, blocked, level=1 - 1e-6, draws=99)
    assert set(found.rows) == {*worlds.CATEGORIES, "harmless"}
    shares = [found.rows[c]["rate"].value for c in worlds.CATEGORIES]
    assert min(shares) > 0
    assert max(shares) < 1
    for row in found.rows.values():
        assert row["gap"].lower <= 0 <= row["gap"].upper
    chains = {c: ms.estimate(ms.count(rolls[np.asarray(rolls.category) == c], states=ms.KGram(1))) for c in found.rows}
    behind = guarded(chains, {c: row["rate"] for c, row in found.rows.items()})
    for name, chain in behind.items():
        row = found.rows[name]
        harm = hitting_probability(chain, "harm").at_start.value
        assert harm == pytest.approx((1 - row["rate"].value) * row["harm"].value, abs=1e-9)


def test_rollouts_that_say_nothing_are_refused():
    rolls = spoken(np.random.default_rng(0), np.full(3, 0.5), 2)
    with pytest.raises(InputError, match="no decision"):
        measure_blocked(rolls, [True, False])
    with pytest.raises(InputError, match="came to"):
        measure_blocked(Rollouts.of([[1]], prompt_id=0), [True])


# --------------------------------------------------------------------------------------------------------------- policy


@given(
    x=st.lists(st.floats(-1, 1), min_size=2, max_size=8),
    y=st.lists(st.floats(-1, 1), min_size=2, max_size=8),
    costs=st.tuples(st.floats(0, 10), st.floats(0, 10)),
    prior=st.floats(0, 1),
)
@settings(deadline=None)
def test_no_threshold_costs_less(x, y, costs, prior):
    harm = np.linspace(0.1, 0.9, len(x))
    found = policy(*costs, harmful=x, harmless=y, harm=harm, prior=prior)
    every = [-2.0, *np.unique([*x, *y])]
    by_hand = [
        costs[0] * prior * np.mean(harm * (np.array(x) <= t)) + costs[1] * (1 - prior) * np.mean(np.array(y) > t)
        for t in every
    ]
    assert found.cost.value == pytest.approx(min(by_hand), abs=1e-9)
    assert found.cost.lower <= found.cost.value <= found.cost.upper
    assert 0 <= found.held_out.lower <= found.held_out.value <= found.held_out.upper


def test_policy_follows_the_costs():
    rng = np.random.default_rng(0)
    x, y = rng.normal(1, 1, 200), rng.normal(-1, 1, 200)
    told = {"harmful": x, "harmless": y, "harm": 0.4}
    assert policy(0, 1, **told).threshold >= y.max()
    assert policy(1, 0, **told).threshold <= x.min()
    assert policy(1, 1, **{**told, "harm": 0.0}).threshold >= y.max()
    steps = [policy(cost, 1, **told).threshold for cost in (0.5, 2, 8, 32)]
    assert steps == sorted(steps, reverse=True)
    found = policy(8, 1, **told)
    assert found.cost.upper < found.never.lower
    assert found.held_out.value >= found.cost.value - 0.02
    assert found.never.value == pytest.approx(8 * 0.5 * 0.4)
    assert found.always.value == pytest.approx(0.5)


def test_a_bound_on_harm_widens_the_cost_and_no_error_is_no_certainty():
    x, y = np.full(30, 1.0), np.full(30, -1.0)
    sure, wide = 0.4, Bound(0.4, 0.2, 0.7, 0.95, {"sampling": 0.25})
    costs = [policy(10, 1, harmful=x, harmless=y, harm=h) for h in (sure, wide)]
    assert costs[0].cost.value == costs[1].cost.value == 0
    assert 0 < costs[0].cost.upper < costs[1].cost.upper
    assert costs[1].never.upper >= 10 * 0.5 * 0.7 - 1e-9
    assert costs[0].threshold == 0


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"cost_harm": -1}, "decide nothing"),
        ({"prior": 1.5}, "decide nothing"),
        ({"harm": 1.2}, "probability"),
        ({"harm": [0.1, 0.2, 0.3]}, "shape"),
        ({"harmless": []}, "negative scores"),
        ({"harmful": [np.nan, 1.0]}, "not finite"),
    ],
)
def test_bad_policies_are_refused(change, says):
    told = {"cost_harm": 1, "cost_refusal": 1, "harmful": [0.5, 0.6], "harmless": [-0.5], "harm": 0.3}
    with pytest.raises(InputError, match=says):
        policy(**{**told, **change})
