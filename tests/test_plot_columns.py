"""Columns of a figure: for every function, value and both ends of all that was given, and files that hold the same."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_plot import EVERY as SIMPLE
from test_plot import bound, ladder, some_check, some_profile
from test_plot_grid import EVERY as GRIDS
from test_plot_grid import FORM, TABLE, surface
from test_plot_inside import EVERY as INSIDE
from test_plot_inside import some_categories, some_detection, some_rows, some_separation
from test_plot_plane import BINS, walk
from test_plot_repair import EVERY as REPAIRS
from test_plot_repair import some_front, some_tilted

import markovsafety as ms
from markovsafety import Bound, InputError, plot
from markovsafety.arguments import write_csv

NO_FIGURES = {"OUTCOME_COLOURS", "Flow", "data", "figure", "palette", "panels", "save", "state_text", "theme"}
NO_FIGURES |= {"write_csv", "flow"}  # flow has its own file of tests
DRAW: dict[str, Any] = SIMPLE | GRIDS | INSIDE | REPAIRS
DRAW |= {
    "plane": lambda ax: plot.plane(walk(), ms.committor(walk(), "harm", "refusal"), BINS, ax),
    "depth_signature": lambda ax: plot.depth_signature({"a": [bound(0.9).value, 0.1], "b": Bound(*ENDS)}, ax=ax),
}
ENDS = np.array([0.5, 0.2]), np.array([0.4, 0.1]), np.array([0.6, 0.3])


def three(b: Any) -> tuple[Any, Any, Any]:
    return (b.value, b.lower, b.upper) if isinstance(b, Bound) else (b, None, None)


def cells(grid: Any) -> list[tuple[Any, Any, Any]]:
    return list(zip(*(np.asarray(x).ravel().tolist() for x in (grid.harm.value, grid.harm.lower, grid.harm.upper))))


def expected_of_inside() -> dict[str, list[Any]]:
    rows, found, roc = some_rows(), some_detection(), some_categories()
    keys = ("harm", "control_harm", "refusal", "control_refusal", "over_refusal")
    curves = [(float(y), None, None) for c in roc.values() for y in c["curve"]["tpr"]]
    return {
        "beliefs": [(float(-i / 10), None, None) for i in range(5)],
        "separated": [three(r["mismatch"]) for r in some_separation()],
        "roc": [*curves, *(three(c["auc"]) for c in roc.values())],
        "predicted": [three(b) for b in (bound(0.1), 0.4, bound(0.5), bound(0.2))],
        "compared": [three(b) for b in (bound(0.3), 0.1, bound(0.2))],
        "detected": [three(b) for b in (*found.caught, *found.control, *found.auc, found.false_alarms)],
        "head_map": [(0.1, None, None), (None, None, None), (0.9, None, None), (-0.2, None, None)],
        "alphas": [three(r[k]) for r in rows for k in keys],
        "tilts": [
            *(three(r["predicted"]) for r in some_tilted().table if r["trusted"]),
            (0.4, 0.3, 0.5),
            (0.5, None, None),
        ],
        "cosines": [(2, None, None), (1, None, None), (1, None, None), (1, None, None), (None, None, None)],
        "trade_offs": [*(three(r["helpful"]) for r in some_front().table), (some_front().limit, None, None)],
    }


def expected() -> dict[str, list[Any]]:
    """Every (value, lower, upper) that the figures of DRAW were given."""
    forms = ms.sweep(FORM, depth=range(9), correlation=[0, 0.3])
    front = surface().pareto({"depth": 1, "width": 3}, harm=1e-6)
    low = [f for f in zip(front.front.harm, front.front.lower, front.front.upper) if f[0] >= 1e-10]
    c = ms.committor(walk(), "harm", "refusal")
    best = front.best
    allowed = [b for one in TABLE.values() for b in one.values() if isinstance(b, Bound)]
    return expected_of_inside() | {
        "branch": [(0.1, 0.0, 0.3)],
        "depth": [*map(three, (bound(0.1), bound(0.5), bound(0.2), bound(0.3))), (0.1, None, None)],
        "width": [(0.5, 0.4, 0.6), (0.2, 0.1, 0.3), (0.3, None, None)],
        "categories": [three(bound(0.3)), three(bound(0.1)), (0.2, None, None)],
        "attribution": [(-0.2, None, None), (0.1, None, None)],
        "check": [(0.0, -0.1, 0.1), (0.2, 0.1, 0.3), (None, -0.05, 0.05)],
        "outcomes": [three(bound(0.25))] * 4,
        "strikes": [three(bound(0.1)), three(bound(0.02))],
        "contour": [*cells(surface()), (1e-2, None, None), (1e-6, None, None)],
        "lines": cells(forms),
        "pareto": [*low, (best["harm"], best["lower"], best["upper"]), (1e-6, None, None)],
        "capacity": [*map(three, allowed), (None, 0.0, 1.0)],
        "traces": [(y, None, None) for y in (0.5, 0.25, 0.3, 0.1)],
        "plane": [three(c[i]) for i in range(5)],
        "depth_signature": [(0.9, 0.9, 0.9), (0.1, 0.1, 0.1), (0.5, 0.4, 0.6), (0.2, 0.1, 0.3)],
    }


def ordered(rows: Any) -> list[tuple[float, ...]]:
    """Numbers in order; what is not there is -1."""
    return sorted(tuple(-1.0 if x is None or np.isnan(x) else float(x) for x in row) for row in rows)


def triples(columns: dict[str, list[Any]]) -> list[tuple[Any, ...]]:
    """Value, lower and upper of each row, of the last quantity that it has."""
    names = [[n for n in reversed(columns) if n.startswith(f"{end} (")] for end in ("value", "lower", "upper")]
    pick = lambda row: next((x for x in row if x is not None), None)  # noqa: E731
    return list(zip(*([pick(row) for row in zip(*(columns[n] for n in mine))] for mine in names)))


def test_every_figure_is_here():
    assert set(plot.__all__) - NO_FIGURES == DRAW.keys() == expected().keys() | {"chain"}


@pytest.mark.parametrize("name", sorted(expected()))
def test_columns_and_the_file_hold_what_was_given(name, tmp_path):
    ax = DRAW[name](None)
    columns = plot.data(ax)
    np.testing.assert_allclose(ordered(triples(columns)), ordered(expected()[name]), rtol=1e-12, atol=1e-12)
    assert list(columns)[:2] == ["series", "kind"]
    assert len({len(c) for c in columns.values()}) == 1
    with open(plot.write_csv(ax, tmp_path / "x.csv"), encoding="utf-8", newline="") as file:
        read = list(csv.DictReader(file))
    for name, column in plot.data(ax).items():
        for cell, row in zip(column, read):
            assert row[name] == ("" if cell is None else str(cell)) or float(row[name]) == cell


def test_trade_offs_hold_both_probabilities():
    columns, rows = plot.data(DRAW["trade_offs"](None)), some_front().table
    harm = zip(*(columns[f"{end} (probability of harm)"][:-1] for end in ("value", "lower", "upper")))
    assert list(harm) == [three(r["harm"]) for r in rows]
    assert columns["chosen"][:-1] == [r["chosen"] for r in rows]


def test_chains_hold_their_states_and_roads():
    columns = plot.data(plot.chain(ladder(start=[0.5, 0.5, 0, 0])))
    rows = [dict(zip(columns, row)) for row in zip(*columns.values())]
    harm = ms.hitting_probability(ladder(), "harm").value
    states = {r["state"]: r["value (probability of harm from here)"] for r in rows if r["kind"] == "state"}
    assert states == pytest.approx({"(start)": harm[0], "5": harm[1]})
    roads = {(r["state"], r["to"]): r["value (passages per answer)"] for r in rows if r["kind"] == "road"}
    visits = ms.visits(ladder(start=[0.5, 0.5, 0, 0])).value
    assert roads["(start)", "5"] == pytest.approx(0.8 * visits[0])
    assert roads["5", "harm"] == pytest.approx(0.3 * visits[1])


def test_several_panels_are_told_apart():
    axes = plot.panels(
        {"a": {0: bound(0.1)}, "b": {0: bound(0.2), 5: bound(0.3)}}, lambda p, ax: plot.depth(p, ax=ax), (6, 2)
    )
    columns = plot.data(axes)
    assert columns["panel"] == ["a", "b", "b"]
    assert columns["value (probability of harm)"] == [0.1, 0.2, 0.3]
    assert plot.data(axes[0, 0].figure) == columns
    mixed, pair = plot.figure((4, 2), 1, 2)
    plot.depth({0: bound(0.1)}, ax=pair[0, 0])
    plot.check(some_check((1, 0.2, 0.1, 0.3, "off")), ax=pair[0, 1])
    assert len(plot.data(mixed)["verdict"]) == 3


def test_what_was_wiped_off_is_forgotten():
    ax = plot.depth({0: bound(0.1)})
    ax.clear()
    with pytest.raises(InputError, match="no data"):
        plot.data(ax)
    with pytest.raises(InputError, match="no data"):
        plot.data(plot.figure()[0])
    plot.depth({0: bound(0.2)}, ax=ax)
    assert plot.data(ax)["value (probability of harm)"] == [0.2]


def test_a_spreadsheet_reads_texts_as_texts(tmp_path):
    ax = plot.categories({"=cmd()": bound(0.1), "-1": bound(0.2), 'a "b", c\n': bound(-0.0)})
    path = plot.write_csv(ax, tmp_path / "deep" / "x.csv")
    with open(path, encoding="utf-8", newline="") as file:
        read = [row["category"] for row in csv.DictReader(file)]
    assert read == ["'=cmd()", "'-1", 'a "b", c\n']
    told = write_csv(str(tmp_path / "states.csv"), [["state", "@harm"], ["\n=cmd()", -0.5]])  # the commands' tables
    with open(told, encoding="utf-8", newline="") as file:
        assert list(csv.reader(file)) == [["state", "'@harm"], ["'\n=cmd()", "-0.5"]]
    assert plot.data(ax)["category"][0] == "=cmd()"


def test_numbers_are_saved_beside_the_figure(tmp_path):
    ax = plot.depth({"m": some_profile(0.1, 0.5)})
    assert plot.save(ax, tmp_path / "depth.svg", csv=True) == str(tmp_path / "depth.svg")
    assert (tmp_path / "depth.csv").read_text() == Path(plot.write_csv(ax, tmp_path / "again.csv")).read_text()
    plot.save(ax, tmp_path / "alone.svg")
    assert not (tmp_path / "alone.csv").exists()
