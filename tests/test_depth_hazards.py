"""Layered hazards, checkpoints, leaky refusals, and the operational depth of a chain."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import markovsafety as ms
from markovsafety import toy
from markovsafety.depth import AttackLaw, Checkpoint, Hazards, LeakyRefusal, Profile, chain_depth

quick = settings(deadline=None, derandomize=True, max_examples=50)
KNOWN = Profile(0.08, 0.02, 0.01, 0.3)
pairs = st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), min_size=1, max_size=8)


# --- hazards ---


@quick
@given(pairs, st.integers(0, 60))
def test_harm_is_the_sum_over_positions(parts, tail):
    a, r, end = [Fraction(x, 60) for x, _ in parts], [Fraction(y, 60) for _, y in parts], Fraction(tail, 60)
    model = Hazards([float(x) for x in a], [float(x) for x in r], float(end))
    for k in range(len(a) + 3):
        alive, total = Fraction(1), Fraction(0)
        for t in range(k, len(a)):
            total, alive = total + alive * a[t], alive * (1 - a[t] - r[t])
        assert model.harm(k).value == pytest.approx(float(total + alive * end), abs=1e-14)
    assert model.survival[-1] == pytest.approx(float(np.prod([float(1 - x - y) for x, y in zip(a, r)])), abs=1e-14)


@quick
@given(pairs, st.integers(0, 60))
def test_chains_of_both_kinds_agree(parts, tail):
    model = Hazards([x / 60 for x, _ in parts], [y / 60 for _, y in parts], tail / 60)
    flat, layered = model.chain(), model.chain(layered=True)
    expected = model.harm(0).value
    assert ms.hitting_probability(flat, "harm").at_start.value == pytest.approx(expected, abs=1e-13)
    h = ms.hitting_probability(layered, "harm")
    assert h.at_start.value == pytest.approx(expected, abs=1e-13)
    assert [h[t].value[0] for t in range(len(model) + 1)] == pytest.approx(model.harm().value.tolist(), abs=1e-13)
    assert ms.sweep(flat, depth=range(len(model) + 1)).harm.value[:, 0] == pytest.approx(model.harm().value, abs=1e-13)


def test_a_profile_goes_in_and_comes_out():
    model = Hazards.of(KNOWN, 5)
    assert model.harm().value == pytest.approx(KNOWN.harm(5, range(7)).value, abs=1e-15)
    assert model.harm(0).value == pytest.approx(7616765501 / 5e10, abs=1e-16)
    assert model.profile() == (KNOWN, 5)
    assert Hazards.of(KNOWN, 9, length=4).harm(0).value == pytest.approx(KNOWN.harm(9).value, abs=1e-15)
    assert Hazards.of(KNOWN, 0, length=3).profile()[0].f0 == KNOWN.f0
    with pytest.raises(ms.InputError, match="not those of a profile"):
        Hazards([0.1, 0.2, 0.3], 0.1, 0.5).profile()
    with pytest.raises(ms.InputError, match="not those of a profile"):
        Hazards([0.1, 0.1], 0.1, 0.7).profile()


def test_mean_over_an_attack_is_the_mean():
    rng = np.random.default_rng(1)
    model = Hazards(rng.uniform(0, 0.3, 9), rng.uniform(0, 0.5, 9), 0.6)
    for law in (AttackLaw.geometric(0.2), AttackLaw.of({0: 1, 4: 2, 30: 1})):
        assert model.harm(attack=law).value == pytest.approx(
            law.average(lambda k: model.harm(k).value).value, abs=1e-13
        )
        later = law.average(lambda k: model.harm(k + 3).value)
        assert model.harm(3, attack=law).value == pytest.approx(later.value, abs=1e-13)


def test_operational_depth_reads_the_first_crossing():
    model = Hazards([0.0, 0.5, 0.0, 0.0], [0.5, 0.0, 0.5, 0.0], 0.2)  # h: .3, .6, .1, .2, .2
    assert model.harm().value == pytest.approx([0.275, 0.55, 0.1, 0.2, 0.2])
    assert str(model.operational_depth(0.3)) == "depth within harm 0.3: 0"
    assert str(model.operational_depth(0.6).reading) == "at least 4"


@pytest.mark.parametrize(
    "words", [((0.6, 0.5), {}), (([0.1], [-0.1]), {}), ((np.ones((2, 2)) / 4, 0.1), {}), ((0.1, 0.1, 1.5), {})]
)
def test_hazards_refuse(words):
    with pytest.raises(ms.InputError):
        Hazards(*words[0], **words[1])


# --- golden chains ---


def test_golden_chains():
    P = np.array([[0.2, 0.5, 0.1, 0.2], [0.1, 0.3, 0.4, 0.2], [0, 0, 1, 0], [0, 0, 0, 1]])
    chain = ms.Chain(P, {"harm": 2, "refusal": 3}, 0)
    h = ms.hitting_probability(chain, "harm").value
    assert h[:2] == pytest.approx([9 / 17, 11 / 17], abs=1e-15)
    assert ms.hitting_time(chain).at_start.value == pytest.approx(40 / 17, abs=1e-14)
    assert ms.visits(chain).value[:2] == pytest.approx([70 / 51, 50 / 51], abs=1e-14)
    h = ms.hitting_probability(toy.ladder(6, 0.3), "harm").value
    assert h[[1, 3, 5]] == pytest.approx([243 / 29230, 27 / 370, 12423 / 29230], abs=1e-15)
    assert LeakyRefusal(0.05, 0.3, 0.02, 0.1).harm().value == pytest.approx(1 / 6, abs=1e-15)


# --- checkpoint ---


@quick
@given(st.integers(0, 25), st.integers(1, 25), st.integers(0, 50), st.integers(1, 12), st.integers(0, 15))
def test_checkpoint_is_its_chain(a, r, success, depth, prefill):
    model = Checkpoint(a / 50, r / 50, success / 50)
    chain = toy.checkpoint(depth, success / 50, (a / 50, r / 50))
    h = ms.hitting_probability(chain, "harm").value
    assert model.harm(depth, prefill).value == pytest.approx(h[min(prefill, depth)], abs=1e-13)


@quick
@given(st.integers(1, 25), st.integers(0, 24), st.integers(1, 50))
def test_without_an_attack_a_deeper_checkpoint_is_worse(a, r, success):
    harm = Checkpoint(a / 50, r / 50, success / 50).harm(np.arange(1, 40)).value
    c = 1 - (a + r) / 50
    assert (np.diff(harm) >= 0).all()
    assert c == 0 or harm[1] > harm[0]  # c > 0: some harm lands before the second position


@pytest.mark.parametrize(
    ("p", "depth", "continuous"), [(0.05, 13, 13.31), (0.1, 9, 9.49), (0.2, 6, 6.37), (0.3, 5, 4.85), (0.5, 3, 3.20)]
)
def test_best_checkpoint_against_a_geometric_attack(p, depth, continuous):
    # At p = .1 c = 1 - p = .9, and 9 and 10 are tied: 9 * .9^9 = 10 * .9^10. Either is right; here it is the smaller.
    model, law = Checkpoint(0.08, 0.02, 0.95), AttackLaw.geometric(p)
    found = model.optimal_depth(law)
    assert (found.depth, round(found.continuous, 2)) == (depth, continuous)
    harm = model.harm(np.arange(200), attack=law).value
    assert int(harm.argmin()) == depth
    assert found.harm == pytest.approx(harm.min(), abs=1e-15)


@quick
@given(st.integers(1, 19), st.integers(1, 19), st.integers(0, 10))
def test_best_checkpoint_is_next_to_the_formula(hazard, p, share):
    a = hazard / 20 * share / 10
    model, law = Checkpoint(a, hazard / 20 - a, 0.9), AttackLaw.geometric(p / 20)
    if model.f == 0:
        assert model.optimal_depth(law).reason
        return
    found = model.optimal_depth(law)
    assert abs(found.depth - max(found.continuous, 1)) < 1
    c, q = 1 - Fraction(model.a) - Fraction(model.r), 1 - Fraction(p / 20)
    g = [sum(Fraction(p / 20) * q**k * c ** (d - k) for k in range(d)) for d in range(60)]
    if found.depth < 60:
        assert g[found.depth] == max(g)


def test_best_checkpoint_of_a_fixed_attack_comes_right_after_it():
    model = Checkpoint(0.08, 0.02, 0.95)
    assert model.optimal_depth(AttackLaw.fixed(0)).depth == 1
    assert model.optimal_depth(AttackLaw.fixed(300)).depth == 301
    assert model.optimal_depth(AttackLaw.of({0: 1, 20: 9})).depth == 21
    assert model.optimal_depth(AttackLaw.of({0: 9, 20: 1})).depth == 1
    assert model.optimal_depth(AttackLaw.geometric(1e-4)).depth > 60


def test_a_checkpoint_that_does_nothing_says_so():
    assert "no difference" in Checkpoint(0.1, 0.1, 0.0).optimal_depth(AttackLaw.fixed(3)).reason
    assert "no difference" in Checkpoint(0.5, 0.5).optimal_depth(AttackLaw.fixed(3)).reason
    with pytest.raises(ms.InputError, match="never ends"):
        Checkpoint(1e-300, 0.0).optimal_depth(AttackLaw.fixed(3))
    with pytest.raises(ms.InputError):
        Checkpoint(0.6, 0.5)


# --- leaky refusal ---

rates = st.tuples(*(st.integers(0, 20) for _ in range(5)))


@quick
@given(rates)
def test_leaky_refusal_is_its_chain(parts):
    a, r, leak, end, stop = (x / 60 for x in parts)
    model = LeakyRefusal(a, r, leak, end, stop)
    P = np.zeros((5, 5))
    P[0] = [1 - a - r - stop, r, a, stop, 0]
    P[1] = [leak, 1 - leak - end, 0, 0, end]
    P[2, 2] = P[3, 3] = P[4, 4] = 1
    h = ms.hitting_probability(ms.Chain(P, {"harm": 2, "end": [3, 4]}, 0), "harm").value
    assert model.harm().value == pytest.approx(h[0], abs=1e-13)
    assert model.from_refusal().value == pytest.approx(h[1], abs=1e-13)
    if a > 0:
        expected = a / (a + stop + model.effective_refusal.value)
        assert model.harm().value == pytest.approx(expected, abs=1e-14)


def test_close_to_absorbing_says_nothing_without_an_end():
    # "Arbitrarily close to absorbing": a leak of 1e-9 per token, and harm is certain all the same.
    endless = LeakyRefusal(0.05, 0.3, 1e-9, 0.0)
    assert endless.harm().value == 1.0
    assert endless.vacuous
    assert "vacuous" in str(endless.harm())
    tokens, _ = endless.leaks_dominate()
    assert 1e7 < tokens < 1e10  # but only after a very long answer
    ended = LeakyRefusal(0.05, 0.3, 1e-9, 0.1)
    assert not ended.vacuous
    assert ended.harm().value == pytest.approx(0.05 / 0.35, rel=1e-7)


def test_horizon_of_a_refusal_without_an_end():
    model = LeakyRefusal(0.05, 0.3, 0.02, 0.0)
    before, after = model.within(np.arange(100)).T
    assert model.leaks_dominate() == (int(np.argmax((after >= before) & (after > 0))), "")
    assert model.leaks_dominate()[0] == 73


@quick
@given(rates)
def test_horizon_at_which_leaks_dominate(parts):
    model = LeakyRefusal(*(x / 60 for x in parts))
    tokens, why = model.leaks_dominate()
    before, after = model.within(np.arange(200)).T
    reached = np.flatnonzero((after >= before) & (after > 0))
    if tokens is None:
        assert why
        assert not len(reached)
    elif tokens < 200:
        assert reached[0] == tokens
    if tokens is not None and 1 < tokens < 200:
        assert before[tokens - 1] > after[tokens - 1]
    assert before[-1] + after[-1] <= model.harm().value + 1e-12


def speak(rng, n, a, r, leak, end, stop):
    """Answers token by token: 0 = trajectory, 1 = onset, 2 = inside a refusal, 3 = back, 4 = harm, 5 = end."""
    answers, outcomes, tokens = [], [], [0, 0]
    for _ in range(n):
        said, refusing, begun = [], False, False
        while True:
            u = rng.random()
            tokens[refusing] += 1
            if refusing:
                word = 3 if u < leak else 5 if u < leak + end else 2
                refusing = word == 2
            else:
                word = 4 if u < a else 1 if u < a + r else 5 if u < a + r + stop else 0
                refusing = word == 1
                begun |= word == 1
            said.append(word)
            if word in (4, 5):
                break
        answers.append(said)
        outcomes.append(0 if said[-1] == 4 else 1 if begun else 2)
    return answers, outcomes, tokens


def test_rates_are_read_off_rollouts():
    truth = {"a": 0.1, "r": 0.3, "leak": 0.05, "end": 0.25, "stop": 0.15}
    answers, outcomes, tokens = speak(np.random.default_rng(5), 6000, **truth)
    rolls = ms.Rollouts.of(
        answers, prompt_id=np.arange(6000) % 300, outcome=outcomes, hit=[len(x) - 1 for x in answers]
    )
    fitted = LeakyRefusal.fit(rolls, onset=[1], back=[3])
    words = np.concatenate(answers)
    assert fitted.r == pytest.approx((words == 1).sum() / tokens[0], abs=1e-15)
    assert fitted.leak == pytest.approx((words == 3).sum() / tokens[1], abs=1e-15)
    assert fitted.a == pytest.approx((words == 4).sum() / tokens[0], abs=1e-15)
    for name, value in truth.items():
        low, high = fitted.intervals[name]
        assert low < value < high  # fixed seed; each misses with probability 1 %
    assert fitted.harm().lower < LeakyRefusal(**truth).harm().value < fitted.harm().upper
    assert fitted.level == 0.95


def test_counts_and_prefills_are_read_alike():
    rolls = ms.Rollouts.of(
        [[1, 2, 5], [0, 4], [1, 2, 2, 3, 0, 4], [0, 5], [0, 0, 1, 4]],
        prompt_id=[0, 0, 1, 1, 2],
        prefill=[0, 0, 1, 0, 2],
        outcome=[1, 0, 0, 2, 0],
        hit=[2, 1, 5, 1, 3],
    )
    fitted = LeakyRefusal.fit(rolls, onset=[1], back=[3])
    counts = {"trajectory": 8, "harm": 2, "refused": 2, "stopped": 1, "refusal": 6, "leaked": 2, "ended": 1}
    # The third answer begins inside a forced refusal; harm inside a refusal, as in the last one, leaks.
    again = LeakyRefusal.fit(counts)
    for model in (fitted, again):
        assert (model.a, model.r, model.stop, model.leak, model.end) == (1 / 4, 1 / 4, 1 / 8, 1 / 3, 1 / 6)
    none = LeakyRefusal.fit(counts | {"leaked": 0})
    assert none.leak == 0
    assert none.intervals["leak"][1] > 0.4  # six tokens prove little


@pytest.mark.parametrize(
    "source",
    [
        {"trajectory": 3},
        {"trajectory": 3, "harm": 4, "refused": 0, "refusal": 1, "leaked": 0, "ended": 1},
        {"trajectory": 3, "harm": 1, "refused": 0, "refusal": 0, "leaked": 0, "ended": 0},
        7,
    ],
)
def test_leaky_fit_refuses(source):
    with pytest.raises(ms.InputError):
        LeakyRefusal.fit(source)
    with pytest.raises(ms.InputError):
        LeakyRefusal(0.5, 0.6, 0.1, 0.1)


# --- chains ---


def test_operational_depth_of_a_chain_by_worst_and_by_mean():
    # Two kinds of answer, told apart by their state: half recover at once, half never do.
    P = np.zeros((6, 6))
    P[0, [1, 2]] = 0.5, 0.5
    P[1, [1, 4, 5]] = 0.2, 0.02, 0.78
    P[2, [2, 3]] = 0.5, 0.5
    P[3, [2, 4, 5]] = 0.3, 0.3, 0.4
    P[4, 4] = P[5, 5] = 1
    chain = ms.Chain(P, {"harm": 4, "refusal": 5}, 0, list("abcdYR"))
    found = chain_depth(chain, 0.35, depths=range(5))
    assert found.reachable == (1, 2, 3, 3, 3)
    assert found.states[0] == "a"
    assert found.states[1] == "c"
    h = ms.hitting_probability(chain, "harm").value
    assert found.harm_worst.value[2] == pytest.approx(max(h[1:4]))
    assert (found.harm_worst.value >= found.harm_mean.value - 1e-12).all()
    assert str(found.worst.reading) == "0"
    assert found.mean.depth is None or found.mean.depth >= found.worst.depth
    assert "worst state" in str(found)


@quick
@given(st.integers(1, 12), st.integers(1, 30))
def test_a_chain_of_one_trajectory_has_one_depth(depth, eps):
    chain = toy.shallow(depth)
    found = chain_depth(chain, eps / 31)
    assert found.worst == found.mean
    assert found.worst.value == Profile(0.08, 0.02, 0.01, 0.3).operational_depth(depth, eps / 31)


def test_layered_chains_have_depths_too():
    model = Hazards([0.0, 0.5, 0.0, 0.0], [0.5, 0.0, 0.5, 0.0], 0.2)
    found = chain_depth(model.chain(layered=True), 0.3)
    assert found.harm_worst.value == pytest.approx(model.harm(range(len(found.depths))).value)
    assert str(found.mean.reading) == "0"
