"""The measurement of deep alignment says what it measured, reads depths rightly, and goes on where it stopped."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest

import markovsafety as ms
from markovsafety.bench import align as bench
from markovsafety.bench import align_attack, align_steps
from markovsafety.depth.profile import Reading

SMALL = {"seeds": 1, "ask": 18, "n": 2, "few": 12, "steps": 2, "learn": 30, "cells": [("cyclic", 5)]}
SMALL["attacked"] = {"ask": 6, "n": 1, "attacks": {"poisoned task": (1, 1e-3)}}


def test_a_run_is_written_and_goes_on_where_it_stopped(tmp_path, monkeypatch):
    import torch

    torch.set_num_threads(1)
    result = bench.run(tmp_path / "align.json", work=tmp_path / "models", **SMALL)
    assert json.loads((tmp_path / "align.json").read_text()) == result
    (run,) = result["runs"]
    assert (run["method"], run["depth"], run["seed"]) == ("cyclic", 5, 0)
    assert run["refusals"]["bio"]["trained"] is False
    assert len(run["profile"]["value"]) == len(bench.GRID)
    change = run["benign"]["value"] - result["shallow"]["benign"]["value"]
    assert run["benign_change"]["value"] == pytest.approx(change, abs=1e-12)
    assert run["prediction"]["by_rows"] == 5
    assert [r["k"] for r in run["prediction"]["rows"]] == [k for k in bench.GRID if k not in bench.FITTED]
    (cell,) = result["prediction"]["cells_of"]
    assert cell["cells"] == len(bench.GRID) - len(bench.FITTED)
    page = (tmp_path / "align.md").read_text()
    assert "cyclic, C = 5, seed 0" in page
    assert f"| {result['cells'][0]['profile'][0]:.3f} |" in page
    assert result["line"].startswith("0 of 0")
    attacks = result["attacks"]["runs"]
    assert [r["objective"] for r in attacks] == list(align_attack.OBJECTIVES)
    assert "| poisoned task | constrained, beta 20 |" in page
    monkeypatch.setattr(bench, "_aligned", None)  # nothing may be trained again
    monkeypatch.setattr(bench, "_measured", None)
    monkeypatch.setattr(align_attack, "_attacked", None)
    again = bench.run(work=tmp_path / "models", **SMALL)
    assert again["runs"] == result["runs"]
    assert again["attacks"] == result["attacks"]


@pytest.mark.parametrize(
    ("upper", "lower", "said", "agrees", "reached"),
    [
        (Reading(12, True), Reading(16, True), 12, True, True),
        (Reading(12, True), Reading(16, True), 20, False, False),
        (Reading(12, True), Reading(16, True), 10, False, True),
        (Reading(12, True), Reading(20, False), 20, True, True),
        (Reading(None, True), Reading(0, True), None, True, True),
        (Reading(None, True), Reading(None, True), 0, False, False),
    ],
)
def test_a_predicted_depth_agrees_if_it_lies_between_the_measured_ends(upper, lower, said, agrees, reached):
    measured = SimpleNamespace(upper=upper, lower=lower)
    assert align_steps.within(Reading(said, True), measured) == (agrees, reached)


@pytest.mark.parametrize("depth", [2, 5, 20])
def test_the_recipe_predicts_a_step_behind_its_last_row(depth):
    """Up to C forced tokens a refusal is certain and leaks; behind, the model before training harms as it did."""
    before = SimpleNamespace(
        harm=lambda grid: SimpleNamespace(value=0.4 + np.array(grid) / 100),
        hazards=lambda k, since: {"leak": 0.01 + 0 * np.array(k)},
    )
    ahead = dict(zip(bench.GRID, bench._ahead(before, depth)))
    assert all(h == 0.01 for k, h in ahead.items() if k <= depth)
    assert all(h == 0.4 + k / 100 for k, h in ahead.items() if k > depth)


def test_prefixes_are_told_apart_by_the_phrase_at_their_end():
    asked = bench._harmful(18)
    prefix = [tuple(p["prefix"][: bench.BETWEEN]) for p in asked]
    phrase = prefix[3][-2:]
    ends = [p[-2:] == phrase for p in prefix]
    rolls = ms.Rollouts.of(
        [[*p, 1] for p in prefix] + [[1]],
        prompt_id=[*range(18), 0],
        outcome=[0 if e else 1 for e in ends] + [0],
        hit=[bench.BETWEEN] * 18 + [0],
        prefill=[bench.BETWEEN] * 18 + [0],
    )
    found = bench._by_phrase(rolls, [phrase], 18)
    assert found["behind"].value == 1
    assert found["elsewhere"].value == 0


def test_a_method_is_met_by_every_training_or_not_at_all():
    def run(seed, depth, loss):
        told = {"method": "cyclic", "depth": 20, "seed": seed, "kl": {"value": 0.01}, "profile": {"value": [0.1]}}
        return {**told, "operational": {"depth": depth}, "benign_change": {"value": -loss}}

    good = [run(0, 12, 0.02), run(1, 20, -0.01)]
    assert bench._cell("cyclic", 20, good)["met"]
    assert not bench._cell("cyclic", 20, [*good, run(2, 8, 0.0)])["met"]
    assert not bench._cell("cyclic", 20, [*good, run(2, None, 0.0)])["met"]
    assert not bench._cell("cyclic", 20, [*good, run(2, 20, 0.021)])["met"]


def test_objectives_are_compared_on_the_same_data():
    def run(objective, seed, harm):
        same = {"task": {"value": 0.9}, "benign": {"value": 1.0}}
        return {"attack": "harmful", "objective": objective, "seed": seed, "profile": {"value": [harm, 1.0]}, **same}

    names = list(align_attack.OBJECTIVES)
    runs = [run(n, s, h + s / 10) for n, h in zip(names, (0.5, 0.3, 0.1)) for s in range(3)]
    some, strong = align_attack._changes(runs)
    assert (some["objective"], strong["objective"]) == tuple(names[1:])
    assert some["harm"].value == pytest.approx(-0.2)
    assert strong["harm"].upper == pytest.approx(-0.4)  # seeds differ, the differences do not
    assert strong["task"].value == 0
    single = align_attack._changes([r for r in runs if r["seed"] == 0])
    assert (single[0]["harm"].lower, single[0]["harm"].upper) == (-1.0, 1.0)
