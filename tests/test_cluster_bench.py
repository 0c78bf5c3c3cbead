"""The bench of two workers beside one process runs, gives the same results twice, and writes what it says."""

from __future__ import annotations

import json

import pytest

from markovsafety.bench.cluster import run

pytestmark = pytest.mark.full


def test_two_workers_and_one_process(tmp_path):
    told = run(tmp_path / "cluster.json", quick=True)
    assert [row["work"] for row in told["rows"]] == ["sampling", "posterior solves"]
    for row in told["rows"]:
        assert len(row["one"]) == len(row["two"]) == 1
        assert row["ratio"] == pytest.approx(row["one"][0] / row["two"][0], rel=1e-2)
        assert row["one_startup"] > 0
    assert json.loads((tmp_path / "cluster.json").read_text())["rows"] == told["rows"]
    assert "posterior solves" in (tmp_path / "cluster.md").read_text()
