"""Intervals hold an exact truth as often as they say: the small version of `markovsafety bench coverage`."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import binom
from test_depth import make_rollouts

import markovsafety as ms
from markovsafety import organism
from markovsafety.bench import coverage
from markovsafety.bench.coverage_cells import DEPTHS, Cell, Flags, Profile, at, cells, draw, flags, population, profiles
from markovsafety.bench.coverage_page import page
from markovsafety.bound import clustered
from markovsafety.clusters import spread
from markovsafety.evidence.cells import cell, tally_of
from markovsafety.evidence.paired import METHODS, change, paired

RUNS = 2000
ALARM = 1e-9  # chance of a false alarm, for each of the limits below
FILE = Path(__file__).parents[1] / "papers" / "measurements" / "coverage.json"


def most_misses(coverage):
    """More misses than this happen with a chance of at most `ALARM` if the coverage is at least this."""
    return int(binom.isf(ALARM, RUNS, 1 - coverage))


def measured(quantity, name, size):
    """A cell of the benchmark, measured with `RUNS` experiments."""
    for i, c in enumerate(cells()):
        if (c.quantity, c.name, c.prompts, float(c.totals.mean())) == (quantity, name, *size):
            return coverage.measure(c, RUNS, np.random.default_rng([1, i]))
    raise AssertionError(f"no cell {quantity}, {name}, {size}")


@pytest.mark.parametrize(
    ("quantity", "name", "size"),
    [
        ("h(start)", "deep20", (48, 8)),
        ("h(start)", "deep20, privacy", (24, 2)),
        ("h(start)", "shallow, with markers", (48, 64)),
        ("h(start)", "shallow, with markers, 4/64 each", (96, 34)),
        ("h(k)", "deep20, k = 1", (48, 16)),
        ("h(k)", "deep20, k = 20", (48, 16)),
        ("h(start)", "clustered, 0.01", (48, 64)),
        ("h(start)", "clustered, 0.05", (24, 8)),
        ("h(start)", "clustered, 0.2", (192, 16)),
        ("difference", "shallow to deep20", (48, 16)),
        ("difference", "clustered, 0.01 to 0.05", (48, 64)),
        ("difference", "clustered, 0.05 to 0.05", (192, 16)),
        ("difference, other prompts", "clustered, 0.01 to 0.05", (48, 16)),
    ],
)
def test_intervals_cover(quantity, name, size):
    """False alarms: at most 1e-9 if the coverage is at least 94 % (many harms: between 93 and 97.5 %)."""
    row = measured(quantity, name, size)
    missed = round((1 - row["coverage"]) * RUNS)
    assert missed <= most_misses(row["least"])
    if row["most"] is not None:
        assert missed >= binom.ppf(ALARM, RUNS, 1 - row["most"])
    assert row["ratio"] <= 1.3


def test_tools_of_today_miss():
    """The same experiments find the faults of other intervals (far beyond chance: 30 points and more)."""
    tools = measured("h(start)", "clustered, 0.01", (48, 64))["tools"]
    assert all(tools[name]["coverage"] < 0.6 for name in ("Wald", "Wilson", "Clopper-Pearson"))
    none = measured("h(k)", "deep20, k = 1", (48, 16))["tools"]
    assert all(none[name]["points"] > 0.3 for name in ("Wald", "bootstrap"))  # [0, 0]
    assert none["Clopper-Pearson"]["points"] == 0


@pytest.mark.parametrize("name", ["deep4", "flat at the budget", "flat at the budget, clustered"])
def test_depths_cover(name):
    """False alarms: at most 1e-9 if the coverage is at least 94 %."""
    job = next(p for p in profiles() if p.name == name and p.prompts == 48)
    row = coverage.measure_depth(job, RUNS, np.random.default_rng(3))
    assert round((1 - row["coverage"]) * RUNS) <= most_misses(0.94)
    assert row["ratio"] <= 1.3


def test_nothing_is_flagged_where_nothing_changed():
    """Three sets of prompts. False alarms: at most 1e-9 each if flags come up in 5 % of the experiments or less."""
    for i, job in enumerate(flags()):
        if job.prompts == 24:
            row = coverage.measure_flags(job, RUNS, np.random.default_rng([4, i]))
            assert round(row["flagged"] * RUNS) <= binom.isf(ALARM, RUNS, 0.05)
            assert row["naive"] > 0.1


@pytest.mark.parametrize("index", [3, 30, 60, -1])
def test_what_is_measured_is_what_the_package_computes(index):
    job = list(cells())[index]
    n = job.totals
    sides = draw(job, 4, np.random.default_rng(index % 7))
    for x in sides:
        low, high = spread(x, n).ends()
        for row, a, b in zip(x, low, high):
            bound = clustered(row, n)
            assert (bound.lower, bound.upper) == (a, b)
    if job.after is None:
        sides = [sides[0], sides[0][::-1]]
    for same in (True, False):
        found = change(sides[0], n, sides[1], n, 0.95, same=same)
        for i, (x, y) in enumerate(zip(*sides)):
            a, b = (cell(tally_of(make_rollouts(v.astype(int), n.astype(int), 0, at_)), 0)
                    for v, at_ in ((x, 0), (y, 0 if same else 1000)))  # fmt: skip
            one = paired(a, b, 0.95)
            assert one[:3] == pytest.approx([part[i] for part in found[:3]], abs=1e-12)
            assert one[3] == METHODS[int(found[3][i])]


def test_the_depth_that_is_measured_is_operational_depth():
    rates = np.tile([0.02, 0.05, 0.1, 0.12, 0.2, 0.5, 0.9], (4, 1))
    for seed in range(4):
        row = coverage.measure_depth(Profile("", rates, 0.12, 24, 8), 1, np.random.default_rng(seed))
        rng = np.random.default_rng(seed)
        index = rng.integers(4, size=(1, 24))
        x = [rng.binomial(8, rates[index, j])[0] for j in range(len(DEPTHS))]
        parts = [make_rollouts(v, [8] * 24, prefill=k) for v, k in zip(x, DEPTHS)]
        d = ms.depth.operational_depth(DEPTHS, ms.profile(ms.Rollouts.concat(parts)), 0.12)
        places = [-1 if r.depth is None else DEPTHS.index(r.depth) for r in (d.upper, d.lower)]
        assert row["depths"] == places[1] - places[0] + 1
        assert row["coverage"] == (places[0] <= 3 <= places[1])
        assert row["truth"] == "3"


def test_populations_are_the_planted_truth():
    for category in (None, "fraud"):
        for marker in (None, "jailbreak", "any"):
            chain = organism.truth("deep20", harmful=True, marker=marker, category=category)
            exact = ms.hitting_probability(chain, "harm").at_start.value
            assert at(population("deep20", category, marker), 0).mean() == pytest.approx(exact, rel=1e-12)


def test_flags_and_draws_of_clustered_prompts():
    """Mean and correlation of beta prompts: 40000 draws, 6 standard errors (1e-8)."""
    job = Cell("difference", "", 0.2, 0.2, 200, 50)
    x, y = (side / 50 for side in draw(job, 200, np.random.default_rng(2)))
    share = np.stack([x, y])
    icc = (share.var() - 0.2 * 0.8 * 0.7 / 50) / (0.2 * 0.8)
    assert share.mean() == pytest.approx(0.2, abs=6 * 0.22 / 200)
    assert icc == pytest.approx(0.3, abs=0.02)
    assert np.corrcoef(x.ravel(), y.ravel())[0, 1] > 0.9  # the same prompts
    other = [side.ravel() for side in draw(Cell("difference, other prompts", "", 0.2, 0.2, 200, 50), 200,
                                           np.random.default_rng(2))]  # fmt: skip
    assert abs(np.corrcoef(other[0], other[1])[0, 1]) < 6 / 200


def test_limits_and_what_lies_outside():
    assert coverage.limits(19, 30) == (0.94, None)
    assert coverage.limits(30, 19) == (0.94, None)
    assert coverage.limits(20, 20) == (0.93, 0.975)
    row = {"quantity": "h", "name": "x", "prompts": 2, "rollouts": 3, "least": 0.93, "most": 0.975, "ratio": 1.0}
    outside = {"flags": [{**row, "flagged": 0.06, "most": 0.053}], "depths": [{**row, "coverage": 0.9, "ratio": 1.31}]}
    outside["rows"] = [{**row, "coverage": c} for c in (0.929, 0.976, 0.95)]
    said = coverage._missed(outside)
    assert [text.count("<") for text in said] == [1, 0, 1, 0, 0]
    assert "1.31 times" in said[3]
    assert "flags" in said[4]


def test_a_run_writes_its_tables(tmp_path, monkeypatch):
    first = list(cells())
    monkeypatch.setattr(coverage, "cells", lambda: iter([first[0], first[3], first[-1]]))
    depths = list(profiles())[:1]
    monkeypatch.setattr(coverage, "profiles", lambda: iter(depths))
    monkeypatch.setattr(coverage, "flags", lambda: iter([Flags("few", (0.1, at(population("deep20"), 0)), 8, 4)]))
    result = coverage.run(experiments=30, json=tmp_path / "c.json", progress=False)
    assert json.loads((tmp_path / "c.json").read_text()) == json.loads(json.dumps(result))
    text = (tmp_path / "c.md").read_text()
    assert text == page(result)
    assert all(name in text for name in ("Wald", "bootstrap", "deep20", "few", "30 experiments"))
    assert "coverage of 95 % intervals" in result["line"]


def test_the_committed_run_reached_its_limits():
    result = json.loads(FILE.read_text())
    assert result["experiments"] >= 4000
    assert result["missed"] == coverage._missed(result) == []
    assert FILE.with_suffix(".md").read_text() == page(result)
    assert len(result["rows"]) == len(list(cells()))
    harms = np.array([r["harms"] for r in result["rows"]])
    assert min((harms < 3).sum(), ((harms >= 3) & (harms < 20)).sum(), (harms >= 20).sum()) >= 15
