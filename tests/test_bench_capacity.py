"""The grid of depth x capacity: what counts, what is kept, and what its page says of the bound."""

from __future__ import annotations

import json

import pyarrow.parquet as pq
import pytest

import markovsafety as ms
from markovsafety.bench import capacity, capacity_page


def row(hidden=24, depth=4, seed=0, k=0, **changes):
    one = {"hidden": hidden, "parameters": 100 * hidden, "depth": depth, "seed": seed, "k": k, "harm": 0.1}
    one |= {"lower": 0.08, "upper": 0.13, "planted": 0.11, "tv": 0.2, "tv_upper": 0.25, "effect": 0.1}
    one |= {"effect_upper": 0.12, "counted": True, "why": "", "own_checks": "", "kl": 0.003}
    return one | changes


def grid(**changes):
    return [row(h, d, k=k, **changes) for h in (16, 24) for d in (0, 4) for k in capacity.DEPTHS]


def result(rows):
    models = [
        {"variant": "base", "hidden": 16, "parameters": 1600, "seed": 0, "kl": 0.02, "judge": 0.6, "failed": ["judge"]},
        {"variant": "base", "hidden": 24, "parameters": 2400, "seed": 0, "kl": 0.001, "judge": 1.0, "failed": []},
    ]
    told = {"date": "d", "machine": "m", "versions": {"numpy": "2"}, "ask": 96, "n": 16, "seed": 0, "line": "l"}
    return {**told, "models": models, "rows": rows, "training_seconds": 7200.0, "measuring_seconds": 60.0}


def test_a_cell_counts_by_its_base_and_tells_what_it_misses_itself():
    cell = {
        "hidden": 16,
        "parameters": 9,
        "seed": 1,
        "variant": "deep10",
        "failed": ["KL 0.0140"],
        "kl": 0.014,
        "tv": 0.03,
    }
    cell |= {"judge": 1.0}
    base = {"failed": [], "kl": 0.007, "judge": 1.0}
    told = capacity._standing(cell, base)
    assert (told["depth"], told["counted"], told["own_checks"]) == (10, True, "KL 0.0140")
    told = capacity._standing({**cell, "variant": "shallow"}, {**base, "failed": ["judge 0.6", "KL"]})
    assert (told["depth"], told["counted"], told["why"]) == (0, False, "judge 0.6; KL")


def test_page_names_the_untrained_and_counts_what_leaves_the_bound():
    rows = grid()
    for one in rows:
        if one["hidden"] == 16:
            one |= {"counted": False, "why": "judge accuracy 0.6", "harm": 0.9}
    rows[-1] |= {"harm": 0.9, "lower": 0.85, "upper": 0.95}  # far outside: 0.74 from planted, the bound says 0.25
    rows[-2] |= {"tv": 1.2, "tv_upper": 1.3, "effect_upper": 0.001, "harm": 0.2, "lower": 0.15}
    text = capacity_page.page(result(rows))
    assert "| 16 | 1,600 | 0 | 0.0200 | 0.600 | not trained: judge |" in text
    assert "not trained: judge accuracy 0.6" in text
    said = text[text.index("## What capacity does") : text.index("## Measured")]
    assert "Trained to 0: withstands at least 20 (widths 24) forced tokens within 0.1." in said
    assert "After 5 tokens, planted 0.110, measured (mean over seeds) 0.100 at width 24." in said
    bounds = text[text.index("## The perturbation bound") :]
    assert "| 0 | 16 |" not in bounds
    assert "| 4 | 24 | +0.790 ± 0.050 (k = 20) | 0.200 | 0.100 | 9% | 1 and 2 of 11 |" in bounds
    assert "| 0 | 24 | -0.010 ± 0.025 (k = 0) | 0.200 | 0.100 | 0% | 0 and 0 of 11 |" in bounds


def test_files_carry_their_origin(tmp_path):
    capacity_page.write(result(grid()), tmp_path / "c.parquet")
    table = pq.read_table(tmp_path / "c.parquet")
    assert table.num_rows == 4 * len(capacity.DEPTHS)
    origin = json.loads(table.schema.metadata[b"markovsafety"])
    assert origin["command"].startswith("markovsafety bench capacity")
    assert origin["models"][0]["failed"] == ["judge"]
    assert (tmp_path / "c.md").read_text().startswith("# Depth x capacity")
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")


def test_an_untrained_cell_is_hatched():
    rows = grid()
    hidden = [r | ({"counted": False} if r["hidden"] == 16 else {}) for r in rows]

    def patches(data):
        axes = capacity_page.draw(data).axes
        return sum(p.get_gid() == "untrained" for ax in axes for p in ax.patches)

    assert patches(rows) == 0
    assert patches(hidden) == 2 * len(capacity_page.DRAWN)


def test_what_was_measured_is_kept(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(capacity, "measure", lambda *a, **k: calls.append(k) or [{"k": 0}])
    cell = {"folder": str(tmp_path / "h16-s0-deep4"), "variant": "deep4"}
    settings = {"ask": 6, "n": 2, "seed": 0}
    first = capacity._kept(cell, settings)
    assert first == capacity._kept(cell, settings)
    assert first["rows"] == [{"k": 0}]
    assert calls == [settings]
    capacity._kept(cell, {**settings, "seed": 1})
    assert len(calls) == 2


def test_a_grid_needs_a_folder():
    with pytest.raises(ms.InputError, match="no folder for its models"):
        capacity.run()


def test_measured_rows_agree_with_the_planted_ones(tmp_path):
    """The shipped model, few prompts: the account of its rows explains the gap to the planted truth."""
    from markovsafety import organism

    rows = capacity.measure(organism.model_path("shallow"), "shallow", ask=12, n=4, seed=0, depths=(0, 5))
    assert [r["k"] for r in rows] == [0, 5]
    for one in rows:
        assert one["total"] == 48
        assert one["lower"] <= one["harm"] <= one["upper"]
        assert 0 < one["tv"] < 0.6
        assert one["effect"] < one["tv_upper"]
        assert abs(one["shift"]) <= one["effect"] + 1e-12
        assert one["left"] < 0.05
