"""Debiasing where over-refusal was planted: one world here, nine in ``papers/2502.02153/seeds.json``."""

from __future__ import annotations

import json
from pathlib import Path

from markovsafety.bench.debias_worlds import measure_debiasing

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
