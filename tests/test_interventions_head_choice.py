"""Heads chosen by what the model says, what they are held against, the path of alpha, and the audit."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from markovsafety import interventions as inside
from markovsafety import sample
from markovsafety.bound import Bound, clustered
from markovsafety.errors import InputError
from markovsafety.interventions import Edit, Host, open_host
from markovsafety.interventions.audit import _crossing, _over_draws, _path, _predicted
from markovsafety.interventions.head_baselines import _logistic
from markovsafety.interventions.start_row import start_rows
from markovsafety.organism import worlds

torch = pytest.importorskip("torch")

WORLD = Path(__file__).parent / "fixtures" / "worlds" / "base"
JUDGE = worlds.world_judge()
A = [worlds.IDS[worlds.A]]


@pytest.fixture(scope="module")
def world() -> Host:
    from markovsafety.organism.train_worlds import open_world

    return open_host(open_world(WORLD))


@pytest.fixture(scope="module")
def groups():
    return tuple(worlds.prompts("choice", n=6, marker=marker, half=0) for marker in ("jailbreak", None))


@pytest.fixture(scope="module")
def directions(world, groups):
    return inside.head_directions(world, *groups)


@pytest.fixture(scope="module")
def sweep(world, directions):
    return inside.sweep_heads(world, directions, worlds.prompts("choice", n=8, half=1), A, alphas=(2.0, 5.0))


def test_behaviour_counts_outcomes_by_prompt(world):
    prompts = worlds.prompts(n=6) + worlds.prompts(n=6, harmful=False)
    rolls = sample(world.engine, prompts, n=3, max_tokens=12, judge=JUDGE, progress=False)
    behaviour = inside.Behaviour.of(rolls)
    assert behaviour.counts.sum() == 36
    for name, code in (("harm", 0), ("refusal", 1), ("benign", 2)):
        assert behaviour.rate(name).value == pytest.approx(np.mean(rolls.outcome == code))
    either = behaviour.rate(("harm", "refusal"))
    assert either.value == pytest.approx(np.mean(rolls.outcome <= 1))
    assert either.lower < either.value < either.upper
    foreign = rolls.replace(provenance={})  # answers of others do not say what ends them
    with pytest.raises(InputError, match="finished and truncated"):
        inside.Behaviour.of(foreign)
    told = inside.Behaviour.of(foreign, eos_ids=[worlds.EOS])
    assert told.quality.finished.value == behaviour.quality.finished.value
    same = behaviour.change(behaviour, "refusal")
    assert same.value == 0
    assert same.lower <= 0 <= same.upper
    assert set(behaviour.to_json()) == {"harm", "refusal", "benign", "truncated", "quality"}
    with pytest.raises(InputError, match="no outcome 'hram'"):
        behaviour.rate("hram")
    with pytest.raises(InputError, match="not judged"):
        inside.Behaviour.of(sample(world.engine, prompts[:1], n=1, max_tokens=2, progress=False))


def test_the_choice_is_one_head_that_beats_random_vectors_and_its_neighbours(world, directions, sweep):
    found = inside.choose_heads(
        world, directions, sweep, worlds.prompts(n=32, half=1), judge=JUDGE, top=2, sizes=(1, 2), alphas=(1.0, 2.0),
        when="prompt", n=2, max_tokens=12,
    )  # fmt: skip
    config = world.engine.model.config
    assert found.heads == ((config.planted_layer, config.planted_head),)
    assert found.verdict == "causal"
    assert found.base.rate(found.wanted).value <= 0.15
    assert found.edited.rate(found.wanted).value >= 0.8
    assert found.beyond_control.lower > 0.3
    assert found.others is not None
    assert found.others.rate(found.wanted).value <= 0.3
    assert len(found.tried) == 6  # two heads alone and both together, at two alphas
    assert len(found.edited.prompt_id) == 16  # half of the prompts are kept for the report
    assert json.loads(json.dumps(found.to_json()))["alpha"] == found.alpha


def test_a_choice_without_effect_is_not_separated(world, directions, sweep):
    found = inside.choose_heads(
        world, directions, sweep, worlds.prompts(n=16, half=1), judge=JUDGE, top=1, sizes=(1,), alphas=(0.0,),
        n=2, max_tokens=12,
    )  # fmt: skip
    assert found.verdict == "not separated"
    assert found.effect.value == 0
    with pytest.raises(InputError, match="heads cannot be chosen"):
        inside.choose_heads(world, directions, sweep, worlds.prompts(n=1), judge=JUDGE)


def test_an_edit_that_breaks_speech_is_not_chosen_before_one_that_does_not(world, directions, sweep):
    """40 sigma at every step get no refusal and no sentence either; the small push does little, but is speech."""
    found = inside.choose_heads(
        world, directions, sweep, worlds.prompts(n=24, half=1), judge=JUDGE, top=1, sizes=(1,), alphas=(0.5, 40.0),
        when="every", wanted=("harm", "benign", "truncated"), n=2, max_tokens=12,
    )  # fmt: skip
    assert [alpha for _, alpha in found.speechless] == [40.0]
    wanted = {alpha: behaviour.rate(found.wanted).value for (_, alpha), behaviour in found.tried.items()}
    assert wanted[40.0] > wanted[0.5]
    assert found.alpha == 0.5


def test_probes_read_what_is_there_and_nothing_where_nothing_is(world):
    """In the planted layer the modifier is in the planted head's output and in no other head's."""
    sides = [worlds.prompts("choice", n=24, marker=marker, half=0) for marker in ("jailbreak", None)]
    probes = inside.probe_heads(world, *sides, folds=3)
    config = world.engine.model.config
    assert probes.auc[config.planted_layer, config.planted_head] == 1
    blind = [h for h in range(world.heads) if h != config.planted_head]
    # 24 against 24 prompts: 5 standard deviations of an AUC without signal are .42.
    assert np.abs(probes.auc[config.planted_layer, blind] - 0.5).max() <= 0.42
    assert probes.ranked[0] in {(int(i), int(j)) for i, j in np.argwhere(probes.auc == 1)}
    assert (probes.loss[probes.auc == 1] < np.log(2)).all()
    with pytest.raises(InputError, match="a probe cannot be tested"):
        inside.probe_heads(world, sides[0][:1], sides[1])


def test_the_logistic_probe_is_at_its_optimum():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 60, 3))
    y = (x[0, :, 0] + rng.standard_normal(60) > 0).astype(float)
    centred = (x - x.mean(axis=1, keepdims=True)) / x.std(axis=1, keepdims=True)
    base = _logistic(x, y, x.mean(axis=1, keepdims=True), 1.0)[:, 0]
    unit = x.mean(axis=1, keepdims=True) + x.std(axis=1, keepdims=True) * np.eye(3)
    w = _logistic(x, y, unit, 1.0) - base[:, None]
    p = 1 / (1 + np.exp(-(np.einsum("hnd,hd->hn", centred, w) + base[:, None])))
    gradient = np.einsum("hnd,hn->hd", centred, p - y) + w  # of the penalised likelihood
    assert np.abs(gradient).max() <= 1e-6
    assert w[0, 0] > 0.5


def test_the_whole_stream_is_shifted_by_the_difference_of_its_means(world, groups, directions):
    plus, minus = (inside.activations(world, g, levels=(2,))[:, 0, 0].astype(float).mean(0) for g in groups)
    edit = inside.whole_layer(world, *groups, 2, alpha=-1.5)
    part = edit.parts[0]
    np.testing.assert_allclose(part.scale * part.vector, -1.5 * (plus - minus), rtol=1e-4, atol=1e-5)
    matched = inside.whole_layer(world, *groups, 2, norm=3.0, alpha=2.0).parts[0]
    assert abs(matched.scale) * np.linalg.norm(matched.vector) == pytest.approx(6.0, rel=1e-5)
    with pytest.raises(InputError, match="equal at level 0"):
        inside.whole_layer(world, *groups, 0)


def test_the_norm_of_a_head_edit_in_the_stream_is_that_of_its_projection(world, directions):
    edit = directions.edit([(1, 0), (1, 3), (2, 2)], 2.0)
    total = 0.0
    for layer in (1, 2):
        weight = world.mixers[layer].weight.detach().numpy()
        moved = [
            weight[:, p.head * world.head_dim : (p.head + 1) * world.head_dim] @ (p.scale * p.vector)
            for p in edit.parts
            if p.layer == layer
        ]
        total += np.linalg.norm(np.sum(moved, axis=0)) ** 2
    assert inside.added_norm(world, edit) == pytest.approx(total**0.5, rel=1e-4)
    with pytest.raises(InputError, match="parts of kind add"):
        inside.added_norm(world, inside.Edit((inside.Part("add", np.ones(world.width)),)))


def test_the_path_of_alpha_shows_the_defence_and_its_price(world, directions, sweep):
    edit = directions.edit(sweep.ranked[:1], 1.0)
    path = inside.alpha_path(
        world, edit, (0.0, -2.0), worlds.prompts(n=12, marker="jailbreak", half=1),
        benign=worlds.prompts(n=12, harmful=False, half=1), judge=JUDGE, n=1, max_tokens=12,
    )  # fmt: skip
    back, none = path.rows()
    assert path.alphas == (-2.0, 0.0)
    assert none["harm"].value >= 0.6
    assert none["over_refusal"].value <= 0.25
    assert back["refusal"].value >= 0.8
    assert back["over_refusal"].value >= 0.8  # safety, bought with total over-refusal
    assert back["control_refusal"].value < back["refusal"].value
    assert path.control[1].counts.tolist() == path.edited[1].counts.tolist()  # alpha = 0, the same random numbers
    assert "over_refusal" in str(path)
    assert json.loads(json.dumps(path.to_json()))[0]["finished"]["value"] >= 0.9
    with pytest.raises(InputError, match="the path has the alphas"):
        inside.alpha_path(world, edit, (), worlds.prompts(n=2), judge=JUDGE)


def _curve(width: float, height: float = 0.9):
    """A made change that rises as log2(alpha) / 4 from alpha = 1 on."""

    def tried(alpha: float) -> dict:
        value = float(np.clip(np.log2(alpha) / 4, 0, height))
        change = Bound(value, value - width, value + width, 0.95, {"sampling": width})
        return {"alpha": alpha, "change": change}

    return tried


def test_the_smallest_alpha_is_where_the_change_crosses_and_its_ends_where_the_interval_does():
    path = _path(_curve(0.05), 0.5, (0.25, 16.0))
    found = _crossing(path, 0.5)
    assert found is not None
    assert found.value == pytest.approx(2.0**2)
    assert found.lower == pytest.approx(2.0**1.8, rel=1e-6)
    assert found.upper == pytest.approx(2.0**2.2, rel=1e-6)
    assert path[-1]["alpha"] == 8.0  # the grid stops where the move is sure
    flat = _path(_curve(0.05, height=0.4), 0.5, (0.25, 16.0))
    assert _crossing(flat, 0.5) is None
    assert flat[-1]["alpha"] == 16.0
    unsure = _crossing(_path(_curve(0.3), 0.5, (0.25, 4.5)), 0.5)
    assert unsure is not None
    assert unsure.upper == np.inf


def test_subsets_of_examples_that_disagree_widen_the_interval():
    alike = np.full((5, 400), 0.5)
    spread = alike + np.array([-0.2, -0.1, 0.0, 0.1, 0.2])[:, None]
    same, apart = _over_draws(alike), _over_draws(spread)
    half = 2.7764451 * np.sqrt(0.1 / 4 / 5)  # Student's quantile, 4 degrees of freedom
    assert apart.value == pytest.approx(same.value)
    assert apart.upper - apart.value == pytest.approx(np.hypot(same.upper - same.value, half), rel=1e-6)
    assert apart.value - apart.lower == pytest.approx(np.hypot(same.value - same.lower, half), rel=1e-6)
    sure = _over_draws(np.ones((5, 40)))
    assert sure.value == sure.upper == 1
    assert sure.lower == clustered(np.ones(40), np.ones(40)).lower


def test_a_predicted_change_has_the_error_of_the_plain_model_too(world):
    rows = start_rows(world, worlds.prompts(n=16, half=1), judge=JUDGE, n=4, max_tokens=12, edits=())
    found = _predicted(world, Edit(()), 1.0, rows)
    rate = found["rate"]
    assert found["change"].value == pytest.approx(0, abs=1e-9)
    assert found["change"].level == pytest.approx(0.95)
    assert found["change"].upper - found["change"].lower > 1.8 * (rate.upper - rate.lower)


def test_the_audit_finds_the_smallest_edit_and_how_few_examples_are_enough(world):
    sides = [worlds.prompts("choice", n=16, marker=marker, half=0) for marker in ("jailbreak", None)]
    prompts = worlds.prompts(n=32, half=1)
    told = {"judge": JUDGE, "size": 1, "examples": (2, 8, 32, 500), "n": 2, "max_tokens": 12}
    sure = [worlds.IDS[worlds.COMPLY[0]]]
    sampled = inside.audit_heads(world, *sides, prompts, sure, **told)
    config = world.engine.model.config
    assert sampled.heads == ((config.planted_layer, config.planted_head),)
    assert sampled.alpha is not None
    assert 0.5 <= sampled.alpha.lower <= sampled.alpha.value <= sampled.alpha.upper <= 3
    assert sampled.control.value <= 0.2
    assert [row["examples"] for row in sampled.examples] == [2, 8, 32]  # 500 were not given
    assert sampled.examples[-1]["cosine"] == pytest.approx(1)
    assert "reached at alpha" in sampled.verdict
    assert json.loads(json.dumps(sampled.to_json()))["measure"] == "sampled"
    predicted = inside.audit_heads(world, *sides, prompts, sure, measure="predicted", **told)
    assert predicted.alpha is not None
    assert predicted.alpha.lower <= sampled.alpha.upper
    assert sampled.alpha.lower <= predicted.alpha.upper
    never = inside.audit_heads(world, *sides, prompts, sure, heads=[(3, 1)], limits=(1.0, 2.0), **told)
    assert never.alpha is None
    assert "not reached up to alpha = 2" in never.verdict


def test_audits_that_make_no_sense_are_refused(world, groups):
    prompts, sure = worlds.prompts(n=8, half=1), [worlds.IDS["sure"]]
    for bad in ({"move": 1.5}, {"limits": (2.0, 1.0)}, {"examples": (1,)}):
        with pytest.raises(InputError, match="no audit of"):
            inside.audit_heads(world, *groups, prompts, sure, judge=JUDGE, **bad)
    with pytest.raises(InputError, match="cannot be 'predicted'"):
        inside.audit_heads(world, *groups, prompts, sure, judge=JUDGE, measure="predicted", when="every")
