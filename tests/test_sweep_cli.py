"""The sweep command: every example of its help, what its words mean, and words that mean nothing."""

from __future__ import annotations

import csv
import json
import re
import shlex

import numpy as np
import pytest
from test_sweep import steep

import markovsafety as ms
from markovsafety.arguments import form_of, laws_of, numbers_of
from markovsafety.cli import main
from markovsafety.cli_sweep import EXAMPLES
from markovsafety.depth import AttackLaw, Profile
from markovsafety.tables import capacity_table

FORM = ["--profile", "a0=.08", "r0=.02", "a1=.01", "r1=.3"]


def told(capsys, *words):
    capsys.readouterr()
    code = main([*map(str, words), "--json"])
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    return code, json.loads(out)


def commands():
    return [re.sub(r"\\\n\s*", "", "markovsafety " + command) for _, command in EXAMPLES]


def table(path):
    """What `bench capacity` writes, made up: three widths, two seeds at depth 20; a width whose base failed."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [
        {
            "hidden": h, "depth": d, "seed": s, "k": k, "harm": 0.1 + 0.01 * s + k / 50, "lower": 0.05,
            "upper": 0.3 + 0.1 * s, "counted": h > 8, "why": "" if h > 8 else "KL 0.02",
            "planted": 0.1 + k / 50, "tv_upper": 0.4, "effect_upper": 0.2,
        }
        for h in (8, 16, 24) for d in (0, 20) for s in range(2 if d else 1) for k in (0, 5)
    ]  # fmt: skip
    models = [{"hidden": 4, "seed": 0, "variant": v, "failed": ["its base: KL 0.5"]} for v in ("shallow", "deep20")]
    meta = {"markovsafety": json.dumps({"models": models})}
    pq.write_table(pa.Table.from_pylist(rows).replace_schema_metadata(meta), path)
    return rows


@pytest.fixture
def there(tmp_path, monkeypatch):
    """The files that the examples name."""
    monkeypatch.chdir(tmp_path)
    for name in ("x", "h8", "h16"):
        ms.write_rollouts(steep(), f"{name}.parquet")
    five = ms.Rollouts.concat([steep()])
    for name in "abcd":
        ms.write_rollouts(five, f"{name}.parquet")
    (tmp_path / "papers" / "measurements").mkdir(parents=True)
    table("papers/measurements/capacity.parquet")
    return tmp_path


@pytest.mark.parametrize("line", commands())
def test_every_example_runs(line, there, capsys):
    if "h8.parquet" in line:
        line = line.replace("0 5 20", "0 5")  # the depths of these rollouts
    words = shlex.split(line)[1:]
    code, said = told(capsys, *words)
    assert code == 0, said
    result = said["result"]
    assert {"dims", "coords", "harm", "needed"} <= result.keys()
    assert list(np.shape(result["harm"]["value"])) == [len(result["coords"][d]) for d in result["dims"]]
    if "--figure" in words:
        figure = words[words.index("--figure") + 1]
        assert said["files"] == [figure]
        assert (there / figure).stat().st_size > 2000
    if "--cost" in words:
        # 22 is the least for the harm budget alone, at an over-refusal of 7.8 % (width 4).
        assert result["pareto"]["cheapest"]["cost"] == 22
        assert len(result["pareto"]["fronts"][0]) > 20


def test_help_teaches_by_example(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["sweep", "--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert len(commands()) >= 8
    assert all(f"{why}\n    markovsafety {command}\n" in out for why, command in EXAMPLES)


def test_the_command_is_the_function(capsys, tmp_path):
    out = tmp_path / "grid.csv"
    words = [
        *FORM,
        "--depth",
        "0:9:2",
        "--width",
        "1",
        "4",
        "--correlation",
        "0",
        ".3",
        "--attack",
        "none",
        "geometric:.2",
    ]
    code, said = told(capsys, "sweep", *words, "--harm", ".2", ".1", "--out", out, "--model", "common-shock")
    assert code == 0
    grid = ms.sweep(
        Profile(0.08, 0.02, 0.01, 0.3),
        depth=range(0, 9, 2),
        width=[1, 4],
        correlation=[0, 0.3],
        attack=[AttackLaw([1.0], name="none"), AttackLaw.geometric(0.2)],
        model="common-shock",
    )
    assert said["result"]["harm"]["value"] == grid.harm.value.tolist()
    assert said["result"]["coords"]["attack"] == ["none", "geometric(0.2)"]
    assert said["result"]["needed"] == grid.needed(harm=0.2).to_json()
    assert [b["eps"] for b in said["result"]["budgets"]] == [0.2, 0.1]
    rows = list(csv.DictReader(out.read_text().splitlines()))
    assert len(rows) == grid.harm.value.size
    assert [float(r["value"]) for r in rows] == grid.harm.value.ravel().tolist()
    assert list(rows[0]) == ["depth", "width", "correlation", "attack", "value", "lower", "upper"]


def test_plain_output_is_one_line(capsys):
    for words in (
        [*FORM, "--depth", "0:40", "--width", "1:40", "--cost", "depth=1", "width=2"],
        ["--leaky", "a=.05", "r=.3", "leak=.02", "end=.1"],
        ["--hazards", "harm=.1,.2", "refusal=.3", "tail=.5", "--attack", "0=.5,1=.5"],
        ["--profile", "a0=.08", "r0=.02", "a1=.01:.005:.02", "r1=.3", "--depth", "4", "--rule", "2-refusals"],
    ):
        assert main(["sweep", *words]) == 0
        out = capsys.readouterr().out
        assert out.count("\n") == 1
        assert len(out) < 1500


def test_rollouts_by_capacity(there, capsys):
    code, said = told(capsys, "sweep", "8=h8.parquet", "16=-the base has KL 0.3", "--width", "1", "--harm", "1")
    assert code == 0
    assert said["result"]["coords"] == {"depth": [0, 2, 5], "width": [1], "capacity": [8, 16]}
    assert said["result"]["harm"]["value"][0][0][1] == "nan"
    assert said["result"]["absent"] == [{"capacity": 16, "why": "not trained: the base has KL 0.3"}]
    assert said["result"]["needed"]["capacity"] == [[8]] * 3
    assert "no budget holds there" in said["warnings"][0]
    words = ["8@0=a.parquet", "8@20=-diverged", "16@0=b.parquet", "--attack", "fixed:2", "--out", "g.csv"]
    code, said = told(capsys, "sweep", *words)
    assert code == 0
    assert said["result"]["coords"]["depth"] == [0, 20]
    rows = list(csv.DictReader((there / "g.csv").read_text().splitlines()))
    assert [r["why"] for r in rows if r["depth"] == "20" and r["width"] == "1"] == [
        "not trained: diverged",
        "not trained: no source was given for it",
    ]


def test_a_table_of_measured_models(there, capsys):
    path = "papers/measurements/capacity.parquet"
    code, said = told(capsys, "sweep", path, "--attack", "fixed:5", "--figure", "c.png")
    assert code == 0
    assert said["result"]["coords"] == {
        "depth": [0, 20],
        "width": [1],
        "capacity": [4, 8, 16, 24],
        "attack": ["5 forced"],
    }
    value = np.array(said["result"]["harm"]["value"], dtype=float)[:, 0, :, 0]
    assert value[:, 2:] == pytest.approx(np.array([[0.2] * 2, [0.205] * 2]))
    assert np.isnan(value[:, :2]).all()
    # Two seeds: the mean, from the smallest lower to the largest upper end.
    assert said["result"]["harm"]["upper"][1][0][2][0] == pytest.approx(0.4)
    whys = {gap["why"] for gap in said["result"]["absent"]}
    assert whys == {"not trained: KL 0.02", "not trained: its base: KL 0.5"}
    found = capacity_table(path)
    assert found is not None
    assert found.allowed([AttackLaw.fixed(5)]) == {(h, d): pytest.approx((0.0, 0.4)) for h in (16, 24) for d in (0, 20)}
    assert found.allowed([AttackLaw.geometric(0.5)]) is None
    assert found.allowed([{0: 1, 5: 1}]) is None
    assert capacity_table("x.parquet") is None
    lines = ["capacity,depth,k,harm,lower,upper", "tiny,0,0,.3,.2,.4", "big,0,0,.1,0,.2"]
    (there / "t.csv").write_text("\n".join(lines))
    code, said = told(capsys, "sweep", "t.csv")
    assert code == 0
    assert sorted(said["result"]["coords"]["capacity"]) == ["big", "tiny"]
    (there / "t.csv").write_text("\n".join([*lines, "big,20,0,lots,0,.2"]))
    code, said = told(capsys, "sweep", "t.csv")
    assert (code, "harm is 'lots'" in said["error"]["fact"]) == (2, True)


def test_words_and_what_they_mean():
    assert numbers_of(["0:4", "9", "20:0:-10"], "--depth") == [0, 1, 2, 3, 9, 20, 10]
    assert [law.name for law in laws_of(["none", "fixed:2:4", "geometric:.5"])] == [
        "none", "2 forced", "3 forced", "geometric(0.5)",
    ]  # fmt: skip
    assert laws_of(["0=.5,5=.5"]) == [{0: 0.5, 5: 0.5}]
    assert form_of("profile", FORM[1:]) == Profile(0.08, 0.02, 0.01, 0.3)
    wide = form_of("profile", ["a0=.08", "r0=.02", "a1=.01:.005:.02", "r1=.3"])
    assert wide.intervals == {"a1": (0.005, 0.02)}
    assert form_of("hazards", ["harm=.1,.2", "refusal=.3", "tail=.5"]).harm(2).value == 0.5


@pytest.mark.parametrize(
    ("words", "fact"),
    [
        ([], "Nothing to sweep"),
        (["x.parquet", *FORM], "Too much to sweep"),
        ([*FORM, "--checkpoint", "a=.1", "r=.1", "--depth", "1"], "Too much to sweep"),
        (["nowhere.parquet"], "nowhere.parquet"),
        ([*FORM], "no depths"),
        ([*FORM, "--depth", "deep"], "--depth deep"),
        ([*FORM, "--depth", "3:3"], "--depth 3:3"),
        ([*FORM, "--depth", "0:9:0"], "--depth 0:9:0"),
        ([*FORM, "--depth", "0:99999999999"], "--depth 0:99999999999"),
        ([*FORM, "--depth", "1", "--width", "0"], "width"),
        ([*FORM, "--depth", "1", "--correlation", "1.5"], "correlation 1.5"),
        ([*FORM, "--depth", "1", "--correlation", "nan"], "correlation nan"),
        ([*FORM, "--depth", "1", "--correlation", "measured"], "no measured correlation"),
        ([*FORM, "--depth", "1", "--plot", "lines"], "--plot without a figure"),
        ([*FORM, "--depth", "1", "--along", "depth"], "--along without a figure"),
        ([*FORM, "--depth", "1", "--by", "width", "--figure", "x.png"], "for lines"),
        ([*FORM, "--depth", "1", "--by", "width", "--plot", "width", "--figure", "x.png"], "for lines"),
        ([*FORM, "--depth", "1", "--rule", "loudest"], "loudest"),
        ([*FORM, "--depth", "1", "--attack", "prefill"], "--attack prefill"),
        ([*FORM, "--depth", "1", "--attack", "geometric:2"], "p is 2"),
        ([*FORM, "--depth", "1", "--attack", "0=-1"], "weights"),
        ([*FORM, "--depth", "1", "--harm", "2"], "budget"),
        ([*FORM, "--depth", "1", "--cost", "depth"], "--cost depth"),
        ([*FORM, "--depth", "1", "--benign", ".1"], "Nothing has a price"),
        ([*FORM, "--depth", "1", "--plot", "pareto", "--figure", "x.png"], "prices of depth or width"),
        ([*FORM, "--depth", "1", "--figure", "x.gif"], "x.gif"),
        ([*FORM, "--depth", "1", "--capacity", "8"], "no capacity"),
        ([*FORM[:-1], "--depth", "1"], "without r1"),
        ([*FORM, "q=.1", "--depth", "1"], "has no q"),
        ([*FORM, "a0=.1", "--depth", "1"], "given twice"),
        (["--profile", "a0=2", "r0=0", "a1=0", "r1=0", "--depth", "1"], "a0 is 2"),
        (["--profile", "a0=.7", "r0=.7", "a1=0", "r1=0", "--depth", "1"], "a0 + r0"),
        (["--checkpoint", "a=.1:0:.2", "r=.1", "--depth", "1"], "3 numbers"),
        (["8@x=x.parquet"], "names no model"),
        (["8=x.parquet", "8@2=x.parquet"], "with and without"),
        (["8=-lost"], "No capacity has a source"),
    ],
)
def test_words_that_mean_nothing(words, fact, there, capsys):
    code, said = told(capsys, "sweep", *words)
    assert code == 2
    error = said["error"]
    assert fact in error["fact"] + error["cause"] + error["next"], error
    assert error["cause"]
    assert error["next"]
