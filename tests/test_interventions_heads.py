"""Directions of heads, and which head moves behaviour: against worlds with a planted head, and by closed forms."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from markovsafety import interventions as inside
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


def test_a_head_edit_is_its_slice_of_the_output_projection_added_behind_it(world):
    delta = np.random.default_rng(0).standard_normal(world.head_dim).astype(np.float32)
    prompts, layer, head = worlds.prompts(n=4), 1, 2
    edit = inside.Edit((inside.Part("head", delta, layer=layer, head=head),))
    weight = world.mixers[layer].weight[:, head * world.head_dim : (head + 1) * world.head_dim]
    added = (weight @ torch.as_tensor(delta)).detach()

    def behind(module, args, output):
        output = output.clone()
        output[:, -1] += added
        return output

    ids = [world.prompt_ids([p])[0] for p in prompts]
    plain, edited = inside.laws(world, ids), inside.laws(world, ids, edit=edit)
    handle = world.mixers[layer].register_forward_hook(behind)
    by_hand = np.concatenate([inside.laws(world, [i]) for i in ids])
    handle.remove()
    assert np.abs(edited - by_hand).max() <= 1e-4
    assert np.abs(edited - plain).max() >= 0.1


def test_the_planted_head_is_found_by_what_the_model_says(world, directions):
    sweep = inside.sweep_heads(world, directions, worlds.prompts("choice", n=48, half=1), [worlds.IDS[worlds.A]])
    planted = world.engine.model.config.planted_layer, world.engine.model.config.planted_head
    assert sweep.base.mean() <= 0.05
    assert sweep.ranked[0] == planted
    assert sweep.best[planted] >= 0.8
    others = [sweep.best[head] for head in sweep.ranked[1:]]
    assert max(others) <= 0.2 or sweep.lead >= 0.4
    row = sweep.rows()[0]
    assert (row["layer"], row["head"]) == planted
    assert row["mass"]["lower"] > 0.5


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
