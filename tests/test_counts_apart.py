"""Shards of one folder counted by several processes: the counts of one, also where single shards hold nothing."""

from __future__ import annotations

import pickle

import numpy as np
import pytest

import markovsafety as ms
from markovsafety.chains import streaming
from markovsafety.cli import main
from markovsafety.rollouts.streaming import stream

ROWS = [([1, 2, 1], 0, 1, 0, 0), ([2, 2], 3, -1, 0, 1), ([1, 1], 1, 1, 1, 2), ([3], 2, 0, 0, 0)]
"""Of `make`: tokens, outcome, hit, prefill, prompt."""


def make(rows):
    tokens, outcome, hit, prefill, prompt = zip(*rows)
    return ms.Rollouts.of(list(tokens), prompt_id=prompt, prefill=prefill, outcome=outcome, hit=hit)


CASES = ["plain", "empty", "weightless", "no weight", "no mass", "only one"]


def apart(function, items):
    """As over processes: what is sent and what comes back are pickled, in no order that anybody relies on."""
    sent = [pickle.dumps((function, item)) for item in items]
    found = {}
    for i in reversed(range(len(sent))):
        work, item = pickle.loads(sent[i])
        found[i] = pickle.dumps(work(item))
    return [pickle.loads(found[i]) for i in range(len(items))]


def shards(folder, case):
    """Three shards of a run, of which the second is odd."""
    folder.mkdir()
    for i in range(3):
        rolls = make(ROWS[i:] + ROWS[:i])
        columns = {"weight": np.arange(1.0, 5.0) + i, "mass_harm": np.full(len(rolls.tokens), 0.25, np.float32)}
        if i == 1:
            columns["weight"] = np.zeros(4) if case in ("weightless", "only one") else columns["weight"]
            columns = {k: v for k, v in columns.items() if case != f"no {k.split('_')[0]}"}
        rolls = rolls.replace(columns=columns)
        rolls = rolls[:0] if case == "empty" and i == 1 else rolls
        if case != "only one" or i == 1:
            ms.write_rollouts(rolls, folder / f"part-{i:05d}.parquet")
    if case == "only one":
        ms.write_rollouts(make(ROWS), folder / "part-00000.parquet")
    return folder


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("pieces", [1, 2, 64])
def test_the_counts_are_those_of_one_process(tmp_path, monkeypatch, case, pieces):
    monkeypatch.setattr(streaming, "PIECES", pieces)
    folder = shards(tmp_path / "run", case)
    whole = ms.count(folder, ms.KGram(1))
    assert whole.equals(ms.count(ms.read_rollouts(folder), ms.KGram(1)), rtol=1e-12)
    assert ms.count(folder, ms.KGram(1), spread=apart).equals(whole, rtol=1e-12)
    assert bool(whole.mass) == (case not in ("no mass", "only one"))


def test_a_folder_in_which_nothing_counts_says_why(tmp_path):
    for name, rolls, says in (
        ("empty", make(ROWS)[:0], "There are no rollouts"),
        ("weightless", make(ROWS).replace(columns={"weight": np.zeros(4)}), "All weights are zero"),
    ):
        (tmp_path / name).mkdir()
        for i in range(2):
            ms.write_rollouts(rolls, tmp_path / name / f"part-{i:05d}.parquet")
        for spread in (None, apart):
            with pytest.raises(ms.InputError, match=says):
                ms.count(tmp_path / name, ms.KGram(1), spread=spread)


def test_errors_and_limits_are_those_of_one_process(tmp_path):
    folder = shards(tmp_path / "run", "plain")
    with pytest.raises(ms.InputError, match="already take about") as caught:
        ms.count(folder, ms.KGram(1), memory=1, spread=apart)
    assert isinstance(caught.value.partial, ms.Counts)
    (tmp_path / "two").mkdir()
    for i in range(2):  # each fits, their sum does not
        ms.write_rollouts(make([([1, 2], 0, 1, 0, i)]), tmp_path / "two" / f"part-{i:05d}.parquet")
    each = streaming.ENTRY * streaming._entries([ms.count(tmp_path / "two" / "part-00000.parquet", ms.KGram(1))])
    with pytest.raises(ms.InputError, match="already take about"):
        ms.count(tmp_path / "two", ms.KGram(1), memory=each, spread=apart)
    odd = make(ROWS).replace(outcome=np.full(4, -1, np.int8), hit=np.full(4, -1, np.int32))
    ms.write_rollouts(odd, folder / "part-00002.parquet")
    for spread in (None, apart):
        with pytest.raises(ms.InputError, match=r"part-00002\.parquet, rows from 0 on: Rollout 0 is not judged"):
            ms.count(folder, ms.KGram(1), spread=spread)


def test_parts_hold_every_shard_once(tmp_path, monkeypatch):
    folder = shards(tmp_path / "run", "empty")
    monkeypatch.chdir(tmp_path)
    whole = stream("run")
    assert (whole.rows, whole.sizes) == (8, (4, 0, 4))
    for most in (1, 2, 3, 9):
        parts = whole.parts(most)
        assert len(parts) == min(most, 3)
        assert sorted(shard for part in parts for shard in part.shards) == sorted(folder.glob("part-*"))
        assert sum(part.rows for part in parts) == whole.rows
        assert {part.columns for part in parts} == {whole.columns}


def test_the_command_reads_batch_by_batch(tmp_path, capsys):
    folder = shards(tmp_path / "run", "empty")
    assert main(["count", str(folder), "--states", "kgram:1", "--out", str(tmp_path / "x.npz")]) == 0
    assert ms.chains.read_counts(tmp_path / "x.npz").equals(ms.count(folder, ms.KGram(1)))
