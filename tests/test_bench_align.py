"""The measurement of deep alignment says what it measured, reads depths rightly, and goes on where it stopped."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest

from markovsafety.bench import align as bench
from markovsafety.depth.profile import Reading

SMALL = {"seeds": 1, "ask": 18, "n": 2, "steps": 2, "learn": 30, "cells": [("cyclic", 5)]}


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
    assert [r["k"] for r in run["prediction"]["rows"]] == [1, 3, 8, 16]
    page = (tmp_path / "align.md").read_text()
    assert "cyclic, C = 5, seed 0" in page
    assert f"| {result['cells'][0]['profile'][0]:.3f} |" in page
    assert result["line"].startswith("0 of 0")
    monkeypatch.setattr(bench, "_trained", None)  # nothing may be trained again
    again = bench.run(work=tmp_path / "models", **SMALL)
    assert again["runs"] == result["runs"]


@pytest.mark.parametrize(
    ("upper", "lower", "said", "agrees"),
    [
        (Reading(12, True), Reading(16, True), 12, True),
        (Reading(12, True), Reading(16, True), 20, False),
        (Reading(12, True), Reading(20, False), 20, True),
        (Reading(None, True), Reading(0, True), None, True),
        (Reading(None, True), Reading(None, True), 0, False),
    ],
)
def test_a_predicted_depth_agrees_if_it_lies_between_the_measured_ends(monkeypatch, upper, lower, said, agrees):
    fitted = SimpleNamespace(harm=lambda grid: SimpleNamespace(value=np.zeros(len(grid))), against=lambda *a: [])
    read = SimpleNamespace(value=SimpleNamespace(depth=said), to_json=dict)
    monkeypatch.setattr(bench, "fit_recovery", lambda *a, **k: fitted)
    monkeypatch.setattr(bench, "operational_depth", lambda *a: read)
    found = bench._prediction({"fit": None, "harmful": None}, 20, SimpleNamespace(upper=upper, lower=lower))
    assert found["agrees"] is agrees


def test_a_method_is_met_by_every_training_or_not_at_all():
    def run(seed, depth, loss):
        told = {"method": "cyclic", "depth": 20, "seed": seed, "kl": {"value": 0.01}, "profile": {"value": [0.1]}}
        return {**told, "operational": {"depth": depth}, "benign_change": {"value": -loss}}

    good = [run(0, 12, 0.02), run(1, 20, -0.01)]
    assert bench._cell("cyclic", 20, good)["met"]
    assert not bench._cell("cyclic", 20, [*good, run(2, 8, 0.0)])["met"]
    assert not bench._cell("cyclic", 20, [*good, run(2, None, 0.0)])["met"]
    assert not bench._cell("cyclic", 20, [*good, run(2, 20, 0.021)])["met"]
