"""Shallow alignment without a language model: the path of training, recovery data, the penalty on recovery."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import markovsafety as ms
from markovsafety import toy
from markovsafety.depth import (
    alignment_inefficiency,
    attack_length,
    harm_gradient,
    kl_profile,
    odds_shift,
    optimum,
    recovery_law,
    recovery_mix,
    training_path,
    trajectory,
    with_recovery,
)

quick = settings(deadline=None, derandomize=True, max_examples=40)


def harm_at(chain):
    return ms.hitting_probability(chain, "harm").at_start.value


# --- the path ---


def path_table(path, step):
    return [float(f"{h:.3g}") for h in path.harm[list(path.steps).index(step), [0, 1, 5, 10, 20]]]


def test_shallow_alignment_emerges_without_a_language_model():
    path = training_path()
    assert path_table(path, 100) == [0.111, 0.307, 0.697, 0.772, 0.809]
    assert path_table(path, 1000) == [0.0275, 0.0338, 0.178, 0.711, 0.798]
    assert path_table(path, 10000) == [0.00753, 0.0085, 0.0144, 0.0344, 0.731]
    best = ms.hitting_probability(optimum(path.chain(), 10), "harm").value[[0, 1, 5, 10, 20], 0]
    assert (np.round(best, 4) == 2e-4).all()  # the optimum is safe at every depth
    slopes = [odds_shift(path.chain(), path.chain(step)) for step in path.steps]
    assert [s.half for s in slopes] == [2, 6, 14]
    assert all(s.slope < -0.05 for s in slopes)
    wasted = [alignment_inefficiency(path.chain(), path.chain(step)).ratio for step in path.steps]
    assert np.round(wasted, 2).tolist() == [1.95, 1.35, 1.09]


def test_training_on_recovery_protects_as_far_as_it_reaches():
    far, near = (training_path(at=[1000], recovery=(0.5, C)) for C in (25, 10))
    assert np.round(far.harm[0, [0, 1, 5, 10, 20]], 3).tolist() == [0.035, 0.038, 0.050, 0.058, 0.056]
    assert np.round(near.harm[0, [0, 1, 5, 10, 20]], 3).tolist() == [0.023, 0.024, 0.029, 0.061, 0.758]
    reach = {C: training_path(at=[1000], recovery=(0.5, C)).front()[0] for C in (5, 10, 20)}
    assert all(C <= k <= C + 6 for C, k in reach.items())
    more = [training_path(at=[1000], recovery=(p, 20)).harm[0, 20] for p in (0.25, 0.5, 0.75)]
    assert more == sorted(more, reverse=True)


def test_the_front_moves_slowly():
    path = training_path(depths=60, at=[100, 300, 1000, 3000, 10000, 30000, 100000])
    assert path.front() == [2, 4, 6, 10, 15, 21, 30]
    assert training_path(at=[0]).front(0.9) == [None]


def test_the_path_follows_the_gradient_and_ends_at_the_best():
    rng = np.random.default_rng(4)
    base = rng.dirichlet(np.ones(3) * 3, 6)
    path = training_path(base, depths=6, tail=0.6, beta=0.4, at=[0, 1, 300_000])
    assert path.hazards[0] == pytest.approx(base, abs=1e-15)
    step = np.log(path.hazards[1] / base)
    gradient = harm_gradient(path.chain())  # at the base the KL has no gradient
    want = -np.array([G.toarray()[0] for G in gradient.layers[:6]])
    assert step - step.mean(axis=1, keepdims=True) == pytest.approx(want - want.mean(axis=1, keepdims=True), abs=1e-14)
    assert path.harm[2] == pytest.approx(path.best, abs=1e-9)
    assert path.harm[0] == pytest.approx(ms.hitting_probability(path.chain(), "harm").value[:7, 0])

    def cost(chain):
        return harm_at(chain) + 0.4 * kl_profile(path.chain(), chain).total

    for _ in range(30):
        other = path.hazards[2] * np.exp(0.1 * rng.normal(size=base.shape))
        assert cost(trajectory(other / other.sum(axis=1, keepdims=True), 0.6)) > cost(path.chain(300_000))


# --- the penalty ---


def test_attack_length_of_2603_04851():
    length, reason = attack_length(1e-4, 12.0, 0.98, 0.5)
    assert f"{length:.2f}" == "14.10"
    assert reason == ""
    assert recovery_law(1e-4, 12.0, 0.98, 14) >= 0.5 > recovery_law(1e-4, 12.0, 0.98, 15)
    assert attack_length(1e-4, 5.0, 0.98, 0.5) == (1.0, "")
    assert attack_length(0.6, 5.0, 0.98, 0.5)[0] is None
    assert attack_length(1e-4, 12.0, 1.0, 0.5)[0] is None


@quick
@given(st.floats(1e-8, 0.4), st.floats(0, 30), st.floats(0.5, 0.999), st.floats(0.41, 0.99))
def test_attack_length_is_where_recovery_falls(base, weight, discount, wanted):
    length, _ = attack_length(base, weight, discount, wanted)
    after = math.floor(length) + 1
    assert recovery_law(base, weight, discount, after) <= wanted * (1 + 1e-9)
    if length > 1.000001:
        assert recovery_law(base, weight, discount, max(math.floor(length - 1e-9), 1)) >= wanted * (1 - 1e-9)


def test_recovery_of_every_position_in_a_chain():
    hazards = np.tile([0.9, 1e-4, 0.0999], (60, 1))
    chain = trajectory(hazards, 0.8)
    new = with_recovery(chain, 12.0, 0.98, 60)
    for t in (0, 14, 59):
        row = new.layers[t].toarray()[0]
        assert row[1] == pytest.approx(recovery_law(1e-4, 12.0, 0.98, t + 1), rel=1e-12)
        assert row[0] / row[2] == pytest.approx(0.9 / 0.0999)
    h = ms.hitting_probability(new, "harm").value[:60, 0]
    assert (np.diff(h[:40]) > 0).all()
    assert h[0] < 0.01 < 0.3 < h[20]  # behind the attack length of 14 harm comes back
    # A recovery of eps per token is not a recovery of eps: without harm before the end, (1 - eps)^n go on.
    quiet = trajectory(np.tile([1 - 1e-3, 1e-3, 0.0], (8, 1)), 1.0)
    eps = recovery_law(1e-3, 4.0, 1.0, 1)
    assert harm_at(with_recovery(quiet, 4.0, 1.0, 8)) == pytest.approx((1 - eps) ** 8, rel=1e-12)
    unrolled = with_recovery(toy.shallow(3), 2.0, 0.9, 6)
    assert unrolled.n_layers == 6
    assert harm_at(unrolled) < harm_at(toy.shallow(3))


def test_what_is_refused():
    faults = [
        lambda: training_path((0.5, 0.5, 0.5)),
        lambda: training_path(at=[5, 5]),
        lambda: training_path(beta=0.0),
        lambda: training_path(tail=1.2),
        lambda: training_path(np.full((4, 3), 1 / 3)),
        lambda: training_path(recovery=(0.5, 30)),
        lambda: training_path(at=[10]).chain(11),
        lambda: recovery_mix(0.5, 0, 10),
        lambda: recovery_law(0.1, -1.0, 0.9, 1),
        lambda: recovery_law(0.1, 1.0, 1.5, 1),
        lambda: recovery_law(0.1, 1.0, 0.5, 0),
        lambda: with_recovery(toy.leak(), 1.0, 0.9),
        lambda: with_recovery(trajectory([[0.5, 0.3, 0.2]], 0.1), 1.0, 0.9, 3),
    ]
    for fault in faults:
        with pytest.raises(ms.InputError):
            fault()
