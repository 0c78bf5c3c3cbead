"""The bench of sweeps: our cells and scipy's are the same numbers, and the page says what was timed."""

from __future__ import annotations

import pytest

from markovsafety.bench import sweep


def test_cells_are_those_of_scipy(tmp_path):
    found = sweep.run(tmp_path / "s.json", quick=True)
    assert [r["cells"] for r in found["rows"]] == [300, 3000, 3000, 3000, 3000, 900]
    gaps = [r["gap"] for r in found["rows"]]
    assert max(g for g in gaps if g is not None) < 1e-10
    assert gaps[-2:] == [None, None]
    page = (tmp_path / "s.md").read_text()
    assert page.count("\n| ") == 7
    assert "majority, beta-binomial" in page


def test_a_wrong_peer_shows():
    case = sweep.cases(5, 3)[0]
    wrong = sweep.Case(case.name, case.ours, lambda: case.peer() + 0.01)
    assert sweep._row(wrong, 1)["gap"] == pytest.approx(0.01)
