"""The main job with other seeds: `./run test --full` only."""

from __future__ import annotations

import numpy as np
import pytest

from markovsafety import demo, organism

pytestmark = pytest.mark.full


@pytest.mark.parametrize("seed", [1, 2, 3, 4])
def test_the_main_job_tells_the_same_story_for_other_seeds(seed, tmp_path):
    found = demo.run(out=tmp_path, seed=seed, quiet=True).summary["models"]
    h = {name: {int(k): b["value"] for k, b in m["harm"]["all"].items()} for name, m in found.items()}
    assert h["shallow"][1] - h["shallow"][0] >= 0.30
    assert all(h[name][k] <= 0.10 for name in ("deep20", "cyclic") for k in (1, 2, 3, 5, 8))
    planted = organism.planted_profile("shallow", organism.prompts(n=demo.Plan().prompts, seed=seed), demo.DEPTHS)[
        "all"
    ]
    assert np.mean([abs(h["shallow"][k] - planted[k]) for k in demo.DEPTHS]) <= 0.05
