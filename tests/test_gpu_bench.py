"""The benchmark for a GPU at tiny sizes on a CPU: every part works, is written as it comes, and fails alone."""

from __future__ import annotations

import json

import numpy as np
import pytest

from markovsafety.bench import gpu, gpu_page, gpu_parts
from markovsafety.cli import main
from markovsafety.errors import InputError


def test_all_parts_run_and_are_written(tmp_path, capsys):
    pytest.importorskip("transformers")
    out = tmp_path / "gpu.json"
    assert main(["bench", "gpu", "--quick", "--device", "cpu", "--out", str(out), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    result = json.loads(out.read_text())
    parts = result["parts"]
    assert list(parts) == list(gpu.PARTS)
    assert "the attention kernel cannot be used" in parts["other_form"]["error"]  # there is but one form on a CPU
    assert [name for name in parts if "error" in parts[name]] == ["other_form"]
    assert told["files"] == [str(out), str(out.with_suffix(".md"))]
    assert result["device"] == "cpu"
    assert set(result["versions"]) >= {"jax", "torch", "transformers", "markovsafety"}
    assert min(parts["bandwidth"][k] for k in ("copy", "triad", "read")) > 0
    for name in ("engine", "generate"):
        assert parts[name]["tokens_per_second"] > 0
        assert parts[name]["new_tokens"] == 6
    assert parts["engine"]["rows"] >= parts["engine"]["batch"] * 5
    assert parts["hitting"]["faults"] == []
    assert len(parts["hitting"]["cases"]) == 4
    assert parts["pieces"]["compiler_ratio"] > 0.9
    assert "JAX engine, tokens/s" in out.with_suffix(".md").read_text()
    assert any("share of the memory bound" in goal for goal in result["goals"])


def test_a_part_that_hangs_or_dies_leaves_the_others(monkeypatch, tmp_path):
    def order(name: str) -> dict:
        return {"part": name, "quick": True, "device": "cpu"}

    slow = gpu._part(order("engine"), 0.05)
    assert "stopped after" in slow["error"]
    dead = gpu._part(order("no such part"), 60)
    assert "ended with code 1: KeyError" in dead["error"]

    def part(told: dict, seconds: float) -> dict:
        return (
            {"error": "the device is gone", "seconds": 0.1}
            if told["part"] == "engine"
            else {"copy": 1e9, "lost": float("nan")}
        )

    monkeypatch.setattr(gpu, "_part", part)
    out = tmp_path / "x.json"
    result = gpu.run(out, quick=True, part=("bandwidth", "engine"))
    assert "the device is gone" in result["line"]
    assert json.loads(out.read_text())["parts"]["bandwidth"] == {"copy": 1e9, "lost": "nan"}
    assert "no time was left" in gpu.run(quick=True, part=("engine",), limit=0.5)["line"]


def test_the_bound_counts_weights_once_a_step_and_living_positions_only():
    size = gpu_parts.size_of(False, "gpu")
    parts = 4096 * 3 * 4096 + 4096 * 4096 + 3 * 4096 * 11008
    weights = 2 * (32 * parts + 32000 * 4096)
    assert abs(weights / 13.2e9 - 1) < 0.01  # seven billion parameters, less the embedding
    position = 2 * 32 * 32 * 128 * 2
    living = sum(64 + t for t in range(1, 128))  # a step that reads position p has p keys behind it
    assert size.bound_bytes == 4 * 127 * weights + 1024 * living * position


def test_goals_are_judged_by_what_is_there():
    parts = {
        "bandwidth": {"copy": 1e12, "triad": 2e12},
        "engine": {"tokens_per_second": 300.0, "bound_bytes": 1e12, "decode_seconds": 1.0},
        "generate": {"tokens_per_second": 100.0, "error": "late"},
        "hitting": {"copy": 0.4},
    }
    goals = gpu_page.compared(parts)
    values = {name: (round(g["value"], 3), g["met"]) for name, g in goals.items()}
    assert values["engine: share of the memory bound while decoding"] == (0.5, False)
    assert values["engine: tokens/s over those of generate"] == (3.0, True)
    assert values["hitting: values of layered batches read, as a share of copying"] == (0.4, False)
    assert gpu_page.compared({}) == {}
    assert np.all([g["value"] >= g["least"] for g in goals.values() if g["met"]])


def test_what_is_not_there_is_refused():
    with pytest.raises(InputError, match="no part 'warp'"):
        gpu.run(part=("warp",))
    with pytest.raises(InputError, match="sizes for a GPU"):
        gpu.run(device="cpu")
