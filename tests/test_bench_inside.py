"""Tables over planted worlds: one world meets its thresholds for the chain; tables are made and continued rightly.

Rows of directions and heads are tested world by world in tests/test_interventions_*.py.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from markovsafety import InputError, cli
from markovsafety.bench import inside_seeds
from markovsafety.bench.hooks import run as run_hooks
from markovsafety.bench.inside import acceptance_row
from markovsafety.bench.inside_chain import SCALES, measure_chain

WORLD = Path(__file__).parent / "fixtures" / "worlds" / "replanted"


def test_the_chain_of_a_world_meets_its_thresholds():
    """M1 has 7 settings, each within 2 standard errors + .01 where seven were tried; M3 is reported."""
    rows = measure_chain(WORLD, n=6)
    assert [name for name, row in rows.items() if row["met"] is False] == []
    settings = rows["M1"]["settings"]
    assert [s["scale"] for s in settings] == list(SCALES)
    assert rows["M1 least"]["value"] < 0.06 < 0.8 < rows["M1 most"]["value"]
    assert max(abs(s["predicted"] - s["sampled"]) for s in settings) < 0.1
    own, others = rows["M3 own"]["value"], rows["M3 others"]["value"]
    assert own > 0.4 > 0.25 > others
    assert rows["M4 blocked"]["value"] > 0.9
    assert 0 < rows["M4 gap"]["value"] < 0.2


@pytest.fixture
def pretended(monkeypatch, tmp_path):
    """Two worlds that are copies of a fixture's weights, and measures that count how often they are called."""
    calls = []

    def measure(path):
        calls.append(Path(path).name)
        ok = acceptance_row(0.9, "a | b", least=0.5)
        return {"A": ok, "B": acceptance_row(0.7, "c", most=0.5), "C": acceptance_row(1, "reported")}

    for layer, head, seed in inside_seeds.PLANTED[:2]:
        folder = tmp_path / "worlds" / f"l{layer}h{head}s{seed}"
        folder.mkdir(parents=True)
        for name in ("model.safetensors", "config.json"):
            (folder / name).write_bytes((WORLD / name).read_bytes())
    monkeypatch.setattr(inside_seeds, "PAPERS", {"2507.11878": (measure,), "2502.05945": (measure,)})
    monkeypatch.setattr(inside_seeds, "ORGANISM", dict.fromkeys(inside_seeds.PAPERS, measure))
    for paper in inside_seeds.PAPERS:
        (tmp_path / "papers" / paper).mkdir(parents=True)
    return tmp_path, calls


def test_tables_show_what_misses_and_go_on(pretended):
    folder, calls = pretended
    found = inside_seeds.run(folder / "worlds", folder / "papers", quick=True)
    assert calls.count("l0h0s0") == 2
    assert found["2507.11878"]["missed"] == {"l0h0s0": ["B"], "l1h3s1": ["B"], "shallow": ["B"]}
    page = (folder / "papers" / "2507.11878" / "seeds.md").read_text()
    assert "| A | a \\| b | ≥ 0.5 | 0.9 | 0.9 |" in page
    assert "| B | c | ≤ 0.5 | **0.7** | **0.7** |" in page
    calls.clear()
    inside_seeds.run(folder / "worlds", folder / "papers", quick=True)
    assert set(calls) == {"shallow"}  # the worlds were not measured again
    config = folder / "worlds" / "l0h0s0" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "note": 1}))
    calls.clear()
    inside_seeds.run(folder / "worlds", folder / "papers" / "2507.11878" / "seeds.json", quick=True)
    assert calls == ["l0h0s0", "shallow"]  # other weights, and one paper only


def test_bad_places_are_refused(pretended, capsys):
    folder, calls = pretended
    with pytest.raises(InputError, match="no place for these measurements"):
        inside_seeds.run(folder / "worlds", folder / "seeds.json", quick=True)
    assert cli.main(["bench", "inside", "--quick"]) == 2
    assert "--models" in capsys.readouterr().err
    assert not calls


def test_costs_of_hooks_are_measured(tmp_path):
    found = run_hooks(tmp_path / "hooks.json", quick=True)
    assert len(found["rows"]) == 5
    assert all(r["plain"] > 0 and r["hooked"] > 0 and r["met"] == (r["ratio"] <= r["bar"]) for r in found["rows"])
    assert "| recording 48 prompts" in (tmp_path / "hooks.md").read_text()
