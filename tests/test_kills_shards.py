"""Shards that are damaged, lost or mixed: named, and left out on request only."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil

import numpy as np
import pytest
from counted_runs import Counting, run

from markovsafety import cli
from markovsafety.errors import InputError
from markovsafety.rollouts import read_rollouts, write_rollouts


@pytest.fixture
def folder(tmp_path):
    run(tmp_path / "run")
    return tmp_path / "run"


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


def empty(path):
    path.write_bytes(b"")


def flip(path):
    """One bit inside the page of the token ids, such that other ids are read without a word where nobody checks."""
    import pyarrow.parquet as pq

    raw, whole = path.read_bytes(), pq.read_table(path)
    column = pq.ParquetFile(path).metadata.row_group(0).column(2)
    for at in range(8 * (column.data_page_offset + column.total_compressed_size) - 1, 8 * column.data_page_offset, -1):
        changed = bytearray(raw)
        changed[at // 8] ^= 1 << at % 8
        path.write_bytes(changed)
        with contextlib.suppress(Exception):
            found = pq.read_table(path)
            found.validate(full=True)
            if found.num_rows == whole.num_rows and not found.equals(whole):
                return
    raise AssertionError("no bit changes the ids alone")


def fewer(path):
    write_rollouts(read_rollouts(path)[:3], path)


DAMAGE = {
    "cut short": (cut, "cannot be read as Parquet"),
    "empty": (empty, "cannot be read as Parquet"),
    "flipped": (flip, "cannot be read as Parquet"),
    "fewer rows": (fewer, "it has 3 rollouts instead of 4"),
    "lost": (os.unlink, "it is gone, though the manifest says that the run was finished"),
}


@pytest.mark.parametrize("how", DAMAGE)
def test_a_bad_shard_is_named_and_skipped_on_request_only(folder, how):
    whole, (damage, why) = read_rollouts(folder), DAMAGE[how]
    damage(folder / "part-00001.parquet")
    with pytest.raises(InputError, match=r"part-00001.parquet cannot be used") as caught:
        read_rollouts(folder)
    assert why in caught.value.cause
    assert "skip_corrupt" in caught.value.next
    kept = np.r_[0:4, 8:16]
    assert caught.value.partial == whole[kept]
    rolls = read_rollouts(folder, skip_corrupt=True)
    assert rolls == whole[kept]
    assert [told["file"] for told in rolls.provenance["skipped"]] == ["part-00001.parquet"]
    assert why in rolls.provenance["skipped"][0]["why"]
    assert rolls.provenance["complete"] is False
    if how != "lost":
        with pytest.raises(InputError, match=r"part-00001.parquet is damaged"):
            run(folder)
        (folder / "part-00001.parquet").unlink()
    assert run(folder) == whole
    assert read_rollouts(folder).provenance["complete"] is True


def test_all_bad_shards_are_named_and_none_left_is_an_error(folder):
    for i in range(3):
        empty(folder / f"part-{i:05d}.parquet")
    with pytest.raises(InputError, match=re.escape("2 more: part-00001.parquet, part-00002.parquet")):
        read_rollouts(folder)
    empty(folder / "part-00003.parquet")
    with pytest.raises(InputError, match="cannot be used"):
        read_rollouts(folder, skip_corrupt=True)


def test_a_shard_missing_from_a_run_that_was_stopped_is_not_lost(tmp_path):
    def interrupt(shard):
        if shard == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt, match="2 of 4 shards are kept"):
        run(tmp_path, Counting(interrupt))
    assert "finished" not in json.loads((tmp_path / "manifest.json").read_text())
    rolls = read_rollouts(tmp_path)
    assert "unfinished run: 8 of 16 rollouts, 2 of 4 shards missing" in rolls.provenance["note"]
    assert "skipped" not in rolls.provenance


@pytest.mark.parametrize("skip", [False, True])
def test_shards_of_other_tokenizers_and_runs_are_never_mixed(folder, tmp_path, skip):
    run(tmp_path / "foreign", template="u")
    run(tmp_path / "later", seed=1)
    kept = (folder / "part-00002.parquet").read_bytes()
    for other, says in (("foreign", "of another tokenizer or chat template"), ("later", "of another run (sampling)")):
        shutil.copy(tmp_path / other / "part-00002.parquet", folder)
        with pytest.raises(InputError, match=re.escape(says)) as caught:
            read_rollouts(folder, skip_corrupt=skip)
        assert "part-00002.parquet" in caught.value.fact
    (folder / "part-00002.parquet").write_bytes(kept)
    shutil.copy(folder / "part-00000.parquet", folder / "part-00009.parquet")
    if not skip:
        with pytest.raises(InputError, match=r"part-00009.parquet cannot be used"):
            read_rollouts(folder)
    else:
        assert len(read_rollouts(folder, skip_corrupt=True)) == 16


def test_bare_shards_of_two_tokenizers_are_not_mixed_either(folder, tmp_path):
    run(tmp_path / "foreign", template="u")
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(folder / "part-00000.parquet", bare)
    shutil.copy(tmp_path / "foreign" / "part-00001.parquet", bare)
    with pytest.raises(InputError, match="of another tokenizer") as caught:
        read_rollouts(bare)
    assert caught.value.cause == "tokenizer t there, u here"
    shutil.copy(folder / "part-00001.parquet", bare)
    assert len(read_rollouts(bare)) == 8


def test_the_command_line_skips_on_request(folder, tmp_path, capsys):
    part = read_rollouts(folder)
    for i in range(4):
        judged = part[4 * i : 4 * i + 4].replace(outcome=np.full(4, 2, np.int8), hit=np.ones(4, np.int32))
        write_rollouts(judged.replace(provenance=part.provenance), folder / f"part-{i:05d}.parquet")
    empty(folder / "part-00001.parquet")
    words = ["count", str(folder), "--out", str(tmp_path / "x.npz")]
    assert cli.main(words) == 2
    assert "--skip-corrupt" in capsys.readouterr().err
    assert cli.main([*words, "--skip-corrupt"]) == 0
    assert "left out on request: part-00001.parquet" in capsys.readouterr().err
