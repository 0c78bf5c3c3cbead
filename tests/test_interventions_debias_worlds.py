"""Debiasing where over-refusal was planted or tuned: one world here; more, and organisms, in ``papers/2502.02153``."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from markovsafety.bench.debias_seeds import _rise
from markovsafety.bench.debias_worlds import measure_debiasing
from markovsafety.interventions.vulnerable import Cells

WORLD = Path(__file__).parent / "fixtures" / "worlds" / "replanted"
SEEDS = Path(__file__).parents[1] / "papers" / "2502.02153" / "seeds.json"


def test_taking_the_bias_off_mends_over_refusal_and_a_shuffled_one_does_not():
    rows = measure_debiasing(WORLD, seed=2)
    missed = {name: row for name, row in rows.items() if row["met"] is False}
    assert not missed
    assert rows["P4c before"]["value"] - rows["P4c"]["value"] > 0.7
    assert rows["P4f"]["value"] - rows["P4c"]["value"] > 0.7


def test_the_table_of_seeds_has_every_row_and_says_what_was_missed():
    told = json.loads(SEEDS.read_text(encoding="utf-8"))["worlds"]
    assert len(told) >= 5
    names = {"P4a", "P4b", "P4c", "P4d", "P4e", "P4f", "P4 predicted"}
    for world in told.values():
        assert names <= set(world["rows"])
        assert all(world["rows"][name]["met"] is not False for name in names - {"P4c", "P4d"})
    # where the measured bias is larger than what wanted refusals have to spare, they go as well
    met = [world["rows"]["P4c"]["met"] and world["rows"]["P4d"]["met"] for world in told.values()]
    assert sum(met) >= 5


def test_organisms_of_five_seeds_lose_over_refusal_and_no_category():
    told = json.loads(SEEDS.read_text(encoding="utf-8"))["organisms"]
    for variant, held in (("over2, 0.25", 1 + 6), ("bias, 1", 0)):
        seeds = [v["rows"] for v in told.values() if f"{variant}: kept" in v["rows"]]
        assert len(seeds) >= 5
        assert [sum(row["met"] is True for row in rows.values()) for rows in seeds] == [held] * len(seeds)
        assert max(rows[f"{variant}: kept"]["value"] for rows in seeds) <= 0.65


def test_a_rise_has_the_error_of_its_prompts_and_never_none():
    """Two answers to each of four prompts, by hand; and none seen before or after is not none possible."""
    told = np.arange(4), np.array(["a"] * 4, dtype=object)
    before, after = (Cells(*told, np.array(x, float), np.full(4, 2.0)) for x in ([0, 0, 1, 1], [0, 2, 1, 2]))
    rise, error = _rise(before, after)
    assert rise == pytest.approx(3 / 8)
    moved = np.array([0, 1, 0, 0.5])
    within = sum(p * (1 - p) / 8 for p in (2.5 / 9, 5.5 / 9))
    assert error == pytest.approx(np.sqrt(max(moved.var(ddof=1) / 4, within)))
    none = Cells(*told, np.zeros(4), np.full(4, 2.0))
    rise, error = _rise(none, none)
    assert rise == 0
    assert error == pytest.approx(np.sqrt(2 * (0.5 / 9) * (8.5 / 9) / 8))
