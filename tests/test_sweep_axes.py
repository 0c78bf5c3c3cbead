"""sweep over capacity, correlation and attack: every cell against its definition, and bad input told, never NaN."""

from __future__ import annotations

import json
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_depth import make_rollouts
from test_sweep import golden, steep

import markovsafety as ms
from markovsafety.depth import AttackLaw, Checkpoint, Hazards, LeakyRefusal, Profile, ensemble_harm, measured_width

quick = settings(deadline=None, derandomize=True, max_examples=30)
PROFILE = Profile(0.08, 0.02, 0.01, 0.3)
rate = st.floats(0, 1)


def hazards(draw):
    a, r = draw(rate), draw(rate)
    return a * 0.999, r * (1 - a * 0.999)


@st.composite
def profiles(draw):
    return Profile(*hazards(draw), *hazards(draw))


laws = st.one_of(
    st.integers(0, 9).map(AttackLaw.fixed),
    st.floats(0.05, 1).map(AttackLaw.geometric),
    st.dictionaries(st.integers(0, 12), st.floats(0.01, 1), min_size=1, max_size=5).map(AttackLaw.of),
)


# --- closed forms ---


@quick
@given(profiles(), st.lists(laws, min_size=1, max_size=3), st.sampled_from([0.0, 0.2, 1.0]), st.integers(1, 5))
def test_every_cell_of_a_closed_form_is_its_definition(p, attack, rho, m):
    """Mean over the attack of the ensemble of one answer's harm, term by term as far as the law goes."""
    grid = ms.sweep(p, depth=[0, 2, 7], width=[1, m], correlation=[rho], attack=attack)
    assert grid.dims == ("depth", "width", "correlation", "attack")
    for i, d in enumerate((0, 2, 7)):
        for a, law in enumerate(attack):
            k = np.arange(2000)
            terms = ensemble_harm(p.harm(d, k).value, m, rho)
            mean = float(law.probability(k) @ terms + law.survival(2000) * terms[-1])
            assert grid.harm.value[i, -1, 0, a] == pytest.approx(mean, rel=1e-11, abs=1e-14)


@quick
@given(profiles(), laws)
def test_one_answer_agrees_with_the_profile_itself(p, law):
    grid = ms.sweep(p, depth=range(12), attack=law)
    assert grid.harm.value[:, 0, 0] == pytest.approx(p.harm(range(12), attack=law).value, rel=1e-11, abs=1e-14)


def test_axes_are_those_that_were_asked_for_in_one_order():
    grid = ms.sweep({1: PROFILE, 2: PROFILE}, depth=[1], width=[1, 2], correlation=[0, 0.5], attack=[{0: 1}, {3: 1}])
    assert grid.dims == ("depth", "width", "capacity", "correlation", "attack")
    assert grid.harm.shape == (1, 2, 2, 2, 2)
    assert grid.coords["attack"] == ("0=1", "3=1")
    assert ms.sweep(PROFILE, depth=[1], attack={0: 0.5, 5: 0.5}).coords["attack"] == ("0=0.5 5=0.5",)
    same = ms.sweep(PROFILE, depth=[1], attack=[dict.fromkeys(range(5), 1), dict.fromkeys(range(2, 7), 1)])
    assert same.coords["attack"] == ("5 depths, mean 2", "5 depths, mean 4")
    assert [law["fixed"] for law in grid.info["attack"]] == [True, True]
    json.dumps(grid.to_json(), allow_nan=False)


def test_published_depth_curves_and_checkpoint_optima():
    values = ms.sweep(PROFILE, depth=[0, 1, 3, 5, 10, 20]).harm.value[:, 0]
    assert values == pytest.approx([0.8, 0.562, 0.28447, 0.15234, 0.05104, 0.03272], abs=5e-6)
    assert ms.sweep(PROFILE, depth=range(33)).needed(harm=0.05).depth[0] == 11
    ps = (0.05, 0.1, 0.2, 0.3, 0.5)
    grid = ms.sweep(Checkpoint(0.08, 0.02, 0.95), depth=range(1, 41), attack=[AttackLaw.geometric(p) for p in ps])
    best = 1 + np.argmin(grid.harm.value[:, 0], axis=0)
    # At p = 0.1 = 1 - c the depths 9 and 10 leave the same harm: 9 * .9^9 = 10 * .9^10 * .9 / .9.
    assert best.tolist() in ([13, 10, 6, 5, 3], [13, 9, 6, 5, 3])
    assert grid.harm.value[8, 0, 1] == pytest.approx(grid.harm.value[9, 0, 1], rel=1e-12)
    assert "floor" not in grid.info  # deeper is not better


def test_hazards_and_leaky_refusals_count_forced_tokens():
    h = Hazards([0.1, 0.0, 0.3], [0.5, 0.2, 0.1], tail=0.6)
    grid = ms.sweep(h, width=[1, 3])
    assert grid.coords["depth"] == (0, 1, 2, 3)
    assert grid.info["kind"] == "forced"
    assert grid.harm.value[:, 1] == pytest.approx(h.harm().value ** 3)
    law = AttackLaw.of({0: 1, 2: 1, 9: 2})
    capped = ms.sweep(h, depth=[0, 1, 2, 9], attack=law).harm.value[:, 0, 0]
    f = [h.harm(k).value for k in range(4)]
    want = [f[0], f[0] / 4 + 3 * f[1] / 4, f[0] / 4 + 3 * f[2] / 4, f[0] / 4 + f[2] / 4 + f[3] / 2]
    assert capped == pytest.approx(want)
    assert ms.sweep(h, attack=law).harm.value[0, 0, 0] == pytest.approx(want[-1])
    leak = LeakyRefusal(0.05, 0.3, 0.02, 0.1, intervals={"a": (0.04, 0.06)}, level=0.9)
    grid = ms.sweep(leak, depth=[0, 7], width=[1, 2])
    assert grid.harm.value == pytest.approx(np.tile([1 / 6, 1 / 36], (2, 1)))
    assert grid.harm.level == 0.9
    assert (grid.harm.upper > grid.harm.value).all()
    assert ms.sweep(leak).coords["depth"] == (0,)


def test_the_floor_has_the_axes_of_the_grid():
    grid = ms.sweep({1: PROFILE, 2: Profile(0.5, 0.5, 0, 0.3)}, depth=range(5), width=[1, 2], attack=[{0: 1}])
    assert grid.info["floor"].shape == (2, 2, 1)
    need = grid.needed(harm=1e-4)
    assert not need.possible
    assert "no depth suffices where the floor is 0.00104" in need.reason
    assert "beyond 4 would suffice elsewhere" in need.reason


@pytest.mark.parametrize("rule", ["any-refusal", "majority", "2-refusals"])
@pytest.mark.parametrize("model", ["beta-binomial", "common-shock", "copula"])
def test_rules_and_models_reach_every_cell(rule, model):
    grid = ms.sweep(PROFILE, depth=[0, 4], width=[2, 5], correlation=[0.0, 0.3], rule=rule, model=model)
    q = PROFILE.harm([0, 4]).value[:, None, None]
    want = ensemble_harm(q, np.array([2, 5])[:, None], np.array([0.0, 0.3]), rule=rule, model=model)
    assert grid.harm.value == pytest.approx(want, rel=1e-12)
    assert grid.info["rule"] == rule
    assert grid.info.get("model", "beta-binomial") == model


def test_intervals_of_a_profile_pass_through_attack_and_ensemble():
    wide = Profile(0.08, 0.02, 0.01, 0.3, {"a1": (0.005, 0.02), "r0": (0.01, 0.05)}, level=0.9)
    grid = ms.sweep(wide, depth=[0, 3, 9], width=[1, 4], correlation=[0.2], attack=AttackLaw.geometric(0.2))
    k = np.arange(400)
    for end in ("lower", "upper"):
        terms = ensemble_harm(getattr(wide.harm(9, k), end), 4, 0.2)
        mean = AttackLaw.geometric(0.2).probability(k) @ terms
        assert getattr(grid.harm, end)[2, 1, 0, 0] == pytest.approx(mean, rel=1e-10)
    assert grid.harm.level == 0.9
    assert (grid.harm.reasons["sampling"] > 0).all()


# --- evidence ---


def test_attacks_on_rollouts_average_what_was_measured():
    rolls = steep()
    one = {k: ms.sweep(rolls, depth=[k], width=[1, 3]) for k in (0, 2, 5)}
    grid = ms.sweep(rolls, width=[1, 3], attack={0: 0.5, 5: 0.5})
    assert grid.coords["depth"] == (5,)
    want = (one[0].harm.value[0] + one[5].harm.value[0]) / 2
    assert grid.harm.value[0, :, 0] == pytest.approx(want, rel=1e-12)
    # Two intervals that hold together, each at 97.5 %.
    parts = [ms.sweep(rolls, depth=[k], width=[1, 3], level=0.975).harm for k in (0, 5)]
    assert grid.harm.upper[0, :, 0] == pytest.approx(sum(p.upper[0] for p in parts) / 2, rel=1e-12)
    assert grid.harm.lower[0, :, 0] == pytest.approx(sum(p.lower[0] for p in parts) / 2, rel=1e-12)
    assert grid.harm.level == 0.95
    assert "hold together" in grid.info["note"]
    # Cut at k tokens: all the rest of the law forces k.
    cut = ms.sweep(rolls, depth=[0, 2, 5], attack={0: 0.25, 2: 0.25, 40: 0.5}).harm.value[:, 0, 0]
    h = [one[k].harm.value[0, 0] for k in (0, 2, 5)]
    assert cut == pytest.approx([h[0], h[0] / 4 + 3 * h[1] / 4, h[0] / 4 + h[1] / 4 + h[2] / 2])


def test_a_law_of_one_number_pays_nothing_for_the_others():
    grid = ms.sweep(steep(), width=[1, 3], attack=[{0: 0.5, 5: 0.5}, {5: 1}, {2: 1}], correlation=["measured", 0.1])
    for a, k in ((1, 5), (2, 2)):
        alone = ms.sweep(steep(), depth=[k], width=[1, 3], correlation=["measured", 0.1])
        for end in ("value", "lower", "upper"):
            assert np.array_equal(getattr(grid.harm, end)[0, ..., a], getattr(alone.harm, end)[0])


def test_what_was_not_measured_is_named():
    with pytest.raises(ms.InputError, match=r"1, 3 forced tokens(.|\n)*Measured were 0, 2, 5(.|\n)*Measure k = 1, 3"):
        ms.sweep(steep(), attack={0: 1, 1: 1, 3: 1})
    with pytest.raises(ms.InputError, match="Measure k = 1, 3, 4, 6 to 131, give"):
        ms.sweep(steep(), attack=AttackLaw.geometric(0.1))


def test_attacks_on_a_chain():
    chain = golden()
    law = AttackLaw.geometric(0.5)
    plain = ms.sweep(chain, depth=range(40), width=[1, 2]).harm.value
    want = law.probability(np.arange(40)) @ plain
    grid = ms.sweep(chain, width=[1, 2], attack=law)
    assert grid.harm.value[0, :, 0] == pytest.approx(want, abs=1e-6)
    assert (grid.harm.lower[0, :, 0] <= want).all()
    assert (grid.harm.upper[0, :, 0] >= want).all()
    assert 0 < float(np.max(grid.harm.reasons["truncation"])) <= 1e-6
    fixed = ms.sweep(chain, width=[1, 2], attack=[AttackLaw.fixed(3), law])
    assert fixed.harm.value[0, :, 0] == pytest.approx(plain[3], rel=1e-12)
    cut = ms.sweep(chain, depth=[2], attack=law)
    assert cut.harm.value[0, 0, 0] == pytest.approx(plain[0, 0] / 2 + plain[1, 0] / 4 + plain[2, 0] / 4)
    assert cut.harm.reasons["truncation"] is None  # nothing is left out where the attack itself is cut
    estimated = ms.estimate(ms.count(make_rollouts([0, 2, 1, 5, 0], [8] * 5, length=2), ms.KGram(1)))
    apart = ms.sweep(estimated, depth=[0], attack=AttackLaw.fixed(0), width=[1, 2])
    assert np.array_equal(apart.harm.upper[..., 0], ms.sweep(estimated, depth=[0], width=[1, 2]).harm.upper)


def test_rules_on_rollouts_and_chains():
    events, totals = [6, 5, 4, 6, 3, 6, 6, 2, 6, 6], [6] * 10
    grid = ms.sweep(steep(), depth=[5], width=[3], rule="majority")
    assert grid.harm.value[0, 0] == measured_width(events, totals, [3], rule="majority").value[0]
    assumed = ms.sweep(steep(), depth=[5], width=[3], correlation=[0.2], rule="majority", model="common-shock")
    q = sum(events) / 60
    assert assumed.harm.value[0, 0, 0] == pytest.approx(ensemble_harm(q, 3, 0.2, "majority", "common-shock"))
    chain = ms.sweep(golden(), depth=[1], width=[3], rule="majority")
    exact = sum(
        w * (3 * h**2 * (1 - h) + h**3)
        for w, h in ((Fraction(2, 7), Fraction(9, 17)), (Fraction(5, 7), Fraction(11, 17)))
    )
    assert chain.harm.value[0, 0] == pytest.approx(float(exact), rel=1e-12)
    # Of prompts that differ nothing is known behind a chain: by Markov's inequality at most m q / t.
    rolls = make_rollouts([10, 0] * 20, [10] * 40, length=3)
    free = ms.sweep(ms.estimate(ms.count(rolls, ms.KGram(0))), depth=[0], width=[1, 3], rule="majority").harm
    assert free.upper[0, 1] == pytest.approx(min(1.5 * free.upper[0, 0], 1))
    assert free.upper[0, 1] > 0.5  # half of the prompts are always harmful


# --- capacity ---


def test_capacity_of_measured_models():
    few = make_rollouts([1, 0, 2], [8] * 3, prefill=0)
    grid = ms.sweep({16: steep(), 8: few, 32: None, 64: "the base has KL 0.3"}, width=[1, 2])
    assert grid.dims == ("depth", "width", "capacity")
    assert grid.coords["capacity"] == (8, 16, 32, 64)
    assert grid.coords["depth"] == (0, 2, 5)
    assert grid.harm.value[:, :, 1] == pytest.approx(ms.sweep(steep(), width=[1, 2]).harm.value)
    assert grid.harm.value[0, 0, 0] == pytest.approx(3 / 24)
    gone = grid.absent
    assert gone[:, :, 2:].all()
    assert gone[1:, :, 0].all()
    assert not gone[0, :, :2].any()
    assert (grid.harm.lower[gone] == 0).all()
    assert (grid.harm.upper[gone] == 1).all()
    why = {(gap["capacity"], gap.get("depth")): gap["why"] for gap in grid.info["absent"]}
    assert why[64, None] == "not trained: the base has KL 0.3"
    assert why[8, 2] == "not measured"
    assert "no budget holds there" in grid.info["note"]
    assert "not trained" in str(grid)
    rows = list(grid.rows())
    assert rows[0] == ("depth", "width", "capacity", "value", "lower", "upper", "why")
    assert rows[4] == (0, 1, 64, "", 0.0, 1.0, "not trained: the base has KL 0.3")
    assert len(rows) == 1 + 3 * 2 * 4


def test_depths_that_only_some_capacities_have():
    few = make_rollouts([1, 0, 2], [8] * 3, prefill=9)
    grid = ms.sweep({8: few, 16: steep()}, depth=[0, 9])
    assert grid.absent[:, 0].tolist() == [[True, False], [False, True]]
    grid = ms.sweep({8: few, 16: steep()}, depth=[0])
    assert grid.info["absent"] == [{"capacity": 8, "why": "not measured: none of these depths"}]
    with pytest.raises(ms.InputError, match="none of these depths"):
        ms.sweep({8: few, 16: steep()}, depth=[7])


def test_capacity_of_chains():
    ranks = {1: golden(), 4: golden(entry={0: [1, 0, 0, 0], 3: [0, 1, 0, 0]})}
    grid = ms.sweep(ranks, depth=[0, 3], width=[1, 2])
    assert grid.harm.value[..., 1] == pytest.approx(ms.sweep(ranks[4], depth=[0, 3], width=[1, 2]).harm.value)
    assert grid.harm.level == 1
    assert grid.info["start"].startswith("1: the chain conditioned")
    assert "4: entry[k]" in grid.info["start"]


def test_no_budget_holds_where_nothing_was_trained():
    grid = ms.sweep({8: None, 16: steep()}, width=[1, 2])
    for side in ("upper", "value", "lower"):
        need = grid.needed(harm=1.0, side=side)
        assert need.depth[:, 0].tolist() == [None, None]
        assert need.depth[:, 1].tolist() == [5, 5]
        assert need.capacity.tolist() == [[16, 16]] * 3
        assert need.width[:, 0].tolist() == [None] * 3
    assert grid.needed(harm=1.0).reason == "not trained or not measured there"
    assert "; not trained or not measured elsewhere" in grid.needed(harm=1e-9).reason
    json.dumps([grid.to_json(), grid.needed(harm=0.5).to_json()], allow_nan=False)
    # An unmeasured depth ends the reading as a lower bound: nothing was seen to exceed the budget.
    part = ms.sweep({1: make_rollouts([0] * 9, [6] * 9), 2: steep()})
    need = part.needed(harm=1.0)
    assert need.depth[0].tolist() == [0, 5]
    assert need.at_least[0].tolist() == [True, True]


def test_capacity_with_trained_depths():
    def model(x):
        return ms.Rollouts.concat([make_rollouts([x] * 9, [6] * 9), make_rollouts([x + 2] * 9, [6] * 9, prefill=5)])

    source = {8: {0: model(3), 20: model(1)}, 16: {0: model(4), 20: "judge 0.9"}}
    grid = ms.sweep(source, width=[1, 2])
    assert grid.info["kind"] == "trained"
    assert grid.coords == {"depth": (0, 20), "width": (1, 2), "capacity": (8, 16)}
    assert grid.harm.value[:, 0, 0] == pytest.approx([0.5, 1 / 6])
    assert np.isnan(grid.harm.value[1, 0, 1])
    attacked = ms.sweep(source, attack=[{5: 1}, {0: 1, 5: 1}])
    assert attacked.harm.value[:, 0, 0, 0] == pytest.approx([5 / 6, 0.5])
    assert attacked.harm.value[:, 0, 0, 1] == pytest.approx([4 / 6, 2 / 6])
    need = grid.needed(harm=0.4, side="value")
    assert need.depth.tolist() == [[20, None], [0, 0]]
    with pytest.raises(ms.InputError, match="Measure k = 3"):
        ms.sweep(source, attack={3: 1})
    more = ms.sweep(source, depth=[0, 4, 20])
    assert np.isnan(more.harm.value[1]).all()


def test_numbers_stand_for_models():
    b = {k: ms.Bound(v, v / 2, min(1.5 * v, 1), 0.99, {"sampling": v / 2}) for k, v in ((0, 0.2), (5, 0.8))}
    grid = ms.sweep({8: {4: b, 10: {0: b[0]}}, 16: {4: b[0]}}, width=[1, 2])
    assert grid.harm.value[:, 0, 0] == pytest.approx([0.2, 0.2])
    assert grid.harm.value[0, 1, 0] == pytest.approx(0.04)
    assert np.isnan(grid.harm.value[1, 0, 1])
    mean = ms.sweep({8: {4: b}}, attack={0: 1, 5: 3})
    assert mean.harm.value[0, 0, 0, 0] == pytest.approx(0.65)
    assert mean.harm.level == pytest.approx(0.98)
    with pytest.raises(ms.InputError, match="scalar bounds"):
        ms.sweep({8: {4: {0: 0.3}}})


def test_capacity_by_a_function():
    def train(n):
        if n == 4:
            raise ms.UntrustedError("it diverged", cause="the step", next="a smaller one")
        return Profile(0.08, 0.02, 0.01 / n, 0.3) if n > 1 else None

    grid = ms.sweep(train, depth=[0, 5], capacity=[1, 2, 4, 8])
    assert np.isnan(grid.harm.value[0, 0]).tolist() == [True, False, True, False]
    assert [gap["why"] for gap in grid.info["absent"]] == [
        "not trained: no source was given for it",
        "not trained: it diverged",
    ]
    assert ms.sweep({2: PROFILE}, depth=[1], capacity=[2, 3]).absent[0, 0].tolist() == [False, True]
    named = ms.sweep({"tiny": PROFILE, "small": PROFILE}, depth=[1])
    assert named.coords["capacity"] == ("tiny", "small")


def test_grid_at_a_coordinate():
    grid = ms.sweep(
        {1: PROFILE, 2: PROFILE}, depth=range(4), width=[1, 2], correlation=[0, 0.5], attack=[{0: 1}, {1: 1}]
    )
    part = grid.at(capacity=2, correlation=0.5)
    assert part.dims == ("depth", "width", "attack")
    assert np.array_equal(part.harm.value, grid.harm.value[:, :, 1, 1])
    assert part.needed(harm=0.3).depth.shape == (2, 2)
    assert part.info["floor"].shape == (2, 2)
    assert grid.at(width=2).coords["width"] == (2,)
    with pytest.raises(ms.InputError, match=r"no capacity 3(.|\n)*1, 2"):
        grid.at(capacity=3)


# --- text ---


def test_tables_of_many_axes_are_short():
    grid = ms.sweep(
        PROFILE, depth=range(500), width=range(1, 40), correlation=np.linspace(0, 1, 50), attack=[{0: 1}, {5: 1}]
    )
    text = str(grid)
    assert len(text.splitlines()) < 500
    assert "more tables" in text
    assert "..." in text
    assert "correlation 0.0, attack 0=1" in text
    need = grid.needed(harm=0.05)
    assert len(str(need).splitlines()) < 50
    assert len(need.line()) < 2000
    one = ms.sweep(steep(), attack=[{0: 1}, {5: 1}]).needed(harm=0.5)
    assert "attack 0=1: withstands it" in str(one)
    assert "attack 5=1: does not withstand it" in str(one)
    cut = ms.sweep(steep(), depth=[0, 2], attack=[{0: 1, 9: 1}]).needed(harm=0.9)
    assert "withstands it, cut at at least 2 forced tokens" in str(cut)


# --- bad input ---


@pytest.mark.parametrize(
    ("call", "word"),
    [
        (lambda: Profile(1.2, 0, 0, 0), "a0 is 1.2"),
        (lambda: Profile(0.7, 0.7, 0, 0), "exclude each other"),
        (lambda: ms.sweep(PROFILE, depth=[1], width=[0]), "width"),
        (lambda: ms.sweep(PROFILE, depth=[1], correlation=[-0.1]), "correlation"),
        (lambda: ms.sweep(PROFILE, depth=[1], correlation=[1.1]), "correlation"),
        (lambda: ms.sweep(PROFILE, depth=[1], correlation=[float("nan")]), "correlation"),
        (lambda: ms.sweep(PROFILE, depth=[1], correlation=[0.3], model="independent"), "correlation"),
        (lambda: ms.sweep(PROFILE, depth=[1], capacity=[1]), "no capacity"),
        (lambda: ms.sweep(lambda n: PROFILE, depth=[1]), "needs capacities"),
        (lambda: ms.sweep({}, depth=[1]), "no capacity"),
        (lambda: ms.sweep({1: None}, depth=[1]), "No capacity has a source"),
        (lambda: ms.sweep({1: PROFILE, 2: steep()}, depth=[0]), "forced tokens, others trained"),
        (lambda: ms.sweep(PROFILE, depth=[1], attack={0: -1}), "weights"),
        (lambda: ms.sweep(PROFILE, depth=[1], attack=[]), "attack is empty"),
        (lambda: ms.sweep(PROFILE, depth=[1], attack=3), "no law"),
        (lambda: ms.sweep(PROFILE, depth=[1], width=[1, 2], rule="2-refusals"), "1 answer"),
        (lambda: ms.sweep(PROFILE, depth=[1], level=1.5), "level"),
        (lambda: ms.sweep(Checkpoint(0.1, 0.1)), "checkpoint has no depths"),
        (lambda: ms.sweep(PROFILE, depth=[1]).needed(harm=-1), "budget"),
        (lambda: ms.sweep(PROFILE, depth=[1]).needed(harm=float("nan")), "budget"),
    ],
)
def test_bad_input_is_told(call, word):
    with pytest.raises(ms.InputError, match=word):
        call()


def test_a_budget_at_the_floor_is_impossible_with_its_reason():
    floor = PROFILE.f1
    for eps in (floor, floor / 2, 0.0):
        need = ms.sweep(PROFILE, depth=range(60)).needed(harm=eps)
        assert need.depth.tolist() == [None]
        assert not need.possible
        assert "floor is 0.0323 or more" in need.reason
