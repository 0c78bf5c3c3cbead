"""Directions of heads, and which head moves behaviour: against worlds with a planted head, and by closed forms."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from markovsafety import interventions as inside
from markovsafety import organism
from markovsafety.errors import InputError
from markovsafety.interventions import Host, open_host
from markovsafety.interventions.heads import HeadDirections
from markovsafety.organism import worlds

torch = pytest.importorskip("torch")

WORLDS = sorted(p.parent for p in (Path(__file__).parent / "fixtures" / "worlds").glob("*/model.safetensors"))


@pytest.fixture(scope="module", params=WORLDS, ids=lambda p: p.name)
def world(request) -> Host:
    from markovsafety.organism.train_worlds import open_world

    return open_host(open_world(request.param))


@pytest.fixture(scope="module")
def directions(world) -> HeadDirections:
    """From six prompts with the condition and six without, both asked for what the model would do."""
    with_it, without = (worlds.prompts("choice", n=6, marker=m, half=0) for m in ("jailbreak", None))
    return inside.head_directions(world, with_it, without, sign="jailbroken - plain: positive pushes towards answers")


def test_directions_are_mean_differences_with_the_spread_of_all_examples(world, directions):
    both = [
        inside.head_outputs(world, worlds.prompts("choice", n=6, marker=m, half=0)).astype(float)
        for m in ("jailbreak", None)
    ]
    apart = both[0].mean(0) - both[1].mean(0)
    assert directions.counts == (6, 6)
    assert directions.contrast == "prompt end"
    np.testing.assert_allclose(directions.gap, np.linalg.norm(apart, axis=-1), rtol=1e-6)
    np.testing.assert_allclose(directions.theta * directions.gap[..., None], apart, atol=1e-6)
    at = np.einsum("nlhd,lhd->nlh", np.concatenate(both), directions.theta)
    np.testing.assert_allclose(directions.sigma, at.std(axis=0), rtol=1e-5)
    assert (directions.sigma >= directions.gap / 2 - 1e-6).all()  # the spread of two groups is at least half their gap


def test_an_edit_adds_alpha_sigma_theta_to_its_heads_and_to_nothing_else(world, directions):
    prompts = worlds.prompts(n=5, half=1)
    heads = [(2, 1), (3, 0)]
    plain, edited = (
        inside.head_outputs(world, prompts, edit=e).astype(float) for e in (None, directions.edit(heads, -3.0))
    )
    change = edited - plain
    np.testing.assert_allclose(
        change[:, 2, 1], np.tile(-3 * directions.sigma[2, 1] * directions.theta[2, 1], (5, 1)), atol=1e-5
    )
    untouched = np.ones(change.shape[1:3], dtype=bool)
    untouched[2, 1] = untouched[3, :] = False  # what is edited in layer 2 is seen in layer 3
    assert np.abs(change[:, untouched]).max() <= 1e-6
    by_gap = directions.edit(heads[:1], 1.0, unit="gap").parts[0]
    assert by_gap.scale == pytest.approx(directions.gap[2, 1])


@pytest.mark.parametrize("folder", WORLDS, ids=lambda p: p.name)
def test_one_head_of_sixteen_steers_the_planted_world_and_it_is_the_planted_one(folder):
    """Rows P3a to P3g: exactly one head may do it, both ways, and random vectors of its size may not."""
    from markovsafety.bench.inside_heads import measure_heads

    rows = measure_heads(folder, n=32)
    assert {name: row["value"] for name, row in rows.items() if row["met"] is False} == {}
    gated = {name.split()[0] for name, row in rows.items() if row["met"]}
    assert gated == {"H4", *(f"P3{letter}" for letter in "abcdefg")}
    assert rows["P3f cost"]["value"] > rows["P3f"]["least"]  # its price: benign prompts are refused as well


def test_a_sweep_tells_every_head_and_leaves_out_those_without_direction(world, directions):
    prompts, first = worlds.prompts("choice", n=8, half=1), [worlds.IDS[worlds.A]]
    sweep = inside.sweep_heads(world, directions, prompts, first, alphas=(0.0, 2.0), heads=[(0, 1), (2, 3)])
    assert sorted(sweep.ranked) == [(0, 1), (2, 3)]
    assert np.isnan(sweep.best).sum() == 14
    np.testing.assert_allclose(sweep.mass[2, 3, 0], sweep.base, rtol=1e-6)  # at alpha = 0 nothing changes
    np.testing.assert_allclose(sweep.log_odds[2, 3, 0], sweep.base_log_odds, rtol=1e-6)
    by_hand = inside.token_mass(world, prompts, first, edit=directions.edit([(0, 1)], 2.0))
    np.testing.assert_allclose(sweep.mass[0, 1, 1], by_hand, rtol=1e-6)
    odds = np.log(by_hand / (1 - by_hand)).mean()
    assert sweep.log_odds[0, 1, 1] == pytest.approx(odds, rel=1e-5)
    score = np.mean(sweep.mass[0, 1].mean(axis=-1) - sweep.control[0, 1])
    assert sweep.score[0, 1] == pytest.approx(score)
    assert [row["rank"] for row in sweep.rows()] == [1, 2]
    for bad in ({"alphas": ()}, {"desired": []}, {"desired": [10**6]}):
        with pytest.raises(InputError, match="makes no sense"):
            inside.sweep_heads(world, directions, prompts, **{"desired": first, **bad})


def test_the_contrast_at_the_completions_end_reads_the_answers_last_token(world):
    asked = worlds.prompts(n=4, half=0)
    answers = [worlds.encode(("sure", "here", "is", "fact01", "done", "<eos>"))] * 4
    refusals = [worlds.encode(("sorry", "cannot", "help", "<eos>"))] * 4
    found = inside.head_directions(world, asked, asked, (answers, refusals))
    whole = [[*world.prompt_ids([p])[0], *a] for p, a in zip(asked, answers)]
    other = [[*world.prompt_ids([p])[0], *a] for p, a in zip(asked, refusals)]
    apart = inside.head_outputs(world, whole).mean(0) - inside.head_outputs(world, other).mean(0)
    assert found.contrast == "completion end"
    np.testing.assert_allclose(found.theta * found.gap[..., None], apart, atol=1e-5)


def test_a_few_heads_of_the_organism_do_what_the_whole_layer_does():
    """Alpha counts differences of the means here; sigma is a smaller step in this model."""
    from markovsafety.bench.inside_heads import measure_organism_heads

    rows = measure_organism_heads(organism.model_path("shallow"), n=64, examples=60)
    assert {name: row["value"] for name, row in rows.items() if row["met"] is False} == {}
    assert {name for name, row in rows.items() if row["met"]} == {"gap best", "gap beyond layer", "gap random"}
    assert rows["none"]["value"] >= 0.8
    assert rows["idle"]["value"] >= 1  # a probe that reads everything and a head that moves nothing


def test_a_head_that_does_not_see_the_condition_has_no_direction(world):
    """The same prompts, but for their modifier: in the planted layer no other head sees any difference."""
    plain = worlds.prompts("choice", n=6, half=0)
    changed = [p["prompt"].replace(p["prompt"].split()[0], "sudo", 1) for p in plain]
    found = inside.head_directions(world, changed, plain)
    config = world.engine.model.config
    layers_before = {(layer, h) for layer in range(config.planted_layer) for h in range(world.heads)}
    beside = {(config.planted_layer, h) for h in range(world.heads) if h != config.planted_head}
    assert set(found.without) == layers_before | beside
    with pytest.raises(InputError, match="have no direction") as error:
        found.edit([*beside][:1])
    assert str([*beside][:1]) in error.value.fact


def test_bad_examples_are_refused(world):
    prompts = worlds.prompts(n=4)
    with pytest.raises(InputError, match="no head has a direction"):
        inside.head_directions(world, prompts, prompts)
    with pytest.raises(InputError, match="there is no prompt"):
        inside.head_directions(world, prompts, [])
    with pytest.raises(InputError, match="4 prompts have 3 answers"):
        inside.head_directions(world, prompts, prompts, ([[5]] * 3, [[5]] * 4))


def test_directions_are_read_back(world, directions, tmp_path):
    inside.write_head_directions(directions, tmp_path / "heads.safetensors")
    again = inside.read_head_directions(tmp_path / "heads.safetensors")
    assert np.array_equal(again.theta, directions.theta)
    assert (again.counts, again.sign, again.model) == (directions.counts, directions.sign, world.identity[0])
    with pytest.raises(InputError, match="made for another model"):
        inside.laws(
            world, worlds.prompts(n=2), edit=HeadDirections(**{**vars(again), "model": "x" * 64}).edit([(0, 0)])
        )
