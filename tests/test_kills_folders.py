"""Folders with two writers, full disks, folders that may not be written, and shards that are damaged, lost or mixed."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest

from markovsafety import cli, files, organism
from markovsafety.errors import InputError
from markovsafety.files import atomic, atomic_folder, claimed, clear_leftovers, newest_sealed, seal
from markovsafety.rollouts import Rollouts, read_rollouts, shards, write_rollouts
from markovsafety.rollouts.asked import Asked
from markovsafety.rollouts.engines import Output
from markovsafety.rollouts.sums import Added
from markovsafety.rollouts.tally import _run as run_tally

SIZE = 4


class Counting:
    """An engine whose answers are their own numbers; it may break something before a shard."""

    name = "counting"

    def __init__(self, before=None):
        self.before, self.shards = before, 0

    def run(self, job, progress):
        if self.before:
            self.before(self.shards)
        self.shards += 1
        tokens = [np.array([int(key % 1000), 2], np.int32) for key in job.keys]
        return Output(tokens, [np.zeros(2, np.float32) for _ in tokens])

    def tally(self, job, order, rule, cell, progress):
        if self.before:
            self.before(self.shards)
        self.shards += 1
        outcomes = np.zeros((int(cell.max()) + 1, 4), np.int64)
        np.add.at(outcomes[:, 0], cell, 1)
        return Added(np.zeros((0, order), np.int32), outcomes, Added.empty(order).tables, {})


def plan(seed=0, template="t"):
    """Sixteen rollouts of two prompts, in four shards."""
    none = [np.zeros(0, np.int32)] * 2
    asked = Asked(np.arange(2), np.array(["all"] * 2, object), [np.array([1, 5], np.int32)] * 2, none)
    sampling = {"max_tokens": 4, "temperature": 1.0, "top_p": 1.0, "eos_ids": (2,), "end_ids": (2,), "classes": {}}
    told = {"template": {"tokenizer": template}, "sampling": {"seed": seed}, "created": "now"}
    return shards.Plan(asked, [0], 8, seed, sampling, SIZE, {"seed": seed, "template": template}, told)


def run(folder, engine=None, **how):
    return shards.run(plan(**how), engine or Counting(), lambda rolls: rolls, folder, False)


def names(folder):
    return sorted(p.name for p in folder.iterdir())


ALL = ["manifest.json", *(f"part-{i:05d}.parquet" for i in range(4))]


# --- two writers ---


def test_a_second_writer_is_refused_and_the_first_goes_on(tmp_path):
    def second(shard):
        if shard == 2:
            with pytest.raises(InputError, match="is being written already") as caught:
                run(tmp_path / "run")
            assert "another call in this process" in caught.value.cause
            with pytest.raises(InputError, match="is being written already"):
                run_tally(plan(), Counting(), 1, None, tmp_path / "run", False)

    assert len(run(tmp_path / "run", Counting(second))) == 16
    assert names(tmp_path / "run") == ALL


HOLDER = """
import sys
from markovsafety.files import claimed
with claimed(sys.argv[1], "x"):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_another_process_is_named_and_a_killed_one_holds_nothing(tmp_path):
    lock = tmp_path / "run" / ".lock"
    words = [sys.executable, "-c", HOLDER, str(lock)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(InputError, match=r"the run in .*run is being written already") as caught:
            run(tmp_path / "run")
        assert f"process {holder.pid} on " in caught.value.cause
        assert not list((tmp_path / "run").glob("part-*"))
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    assert lock.exists()
    run(tmp_path / "run")
    assert names(tmp_path / "run") == ALL


def test_models_have_one_writer(tmp_path):
    from markovsafety.interventions.augment import Row
    from markovsafety.interventions.tuning import fine_tune

    with claimed(tmp_path / ".model.lock", "it"):
        with pytest.raises(InputError, match=r"the model in .*model is being written already"):
            organism.train("shallow", tmp_path / "model", base=organism.model_path("base"), progress=False)
        with pytest.raises(InputError, match=r"the model in .*model is being written already"):
            fine_tune(organism.model_path("base"), [Row([0, 4, 9], 2, 2)], tmp_path / "model", steps=1, progress=False)
    assert names(tmp_path) == []


def test_a_file_system_without_locks_locks_nothing(tmp_path, monkeypatch):
    import fcntl

    def none(*_):
        raise OSError(errno.ENOSYS, "no locks")

    monkeypatch.setattr(fcntl, "flock", none)
    assert len(run(tmp_path / "run")) == 16


def test_the_lock_of_one_who_has_just_ended_is_not_taken_for_ones_own(tmp_path, monkeypatch):
    """The holder removes the file between our opening and locking of it: a third would lock a new one."""
    import fcntl

    lock, flock, seen = tmp_path / ".lock", fcntl.flock, []

    def late(handle, how):
        flock(handle, how)
        if not seen:
            lock.unlink()
        seen.append(handle)

    monkeypatch.setattr(fcntl, "flock", late)
    with claimed(lock, "it"):
        assert len(seen) == 2
        assert lock.exists()
    assert not lock.exists()


# --- disks ---


def full(code=errno.ENOSPC):
    def fsync(handle):
        raise OSError(code, os.strerror(code))

    return fsync


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_keeps_what_was_finished_and_carries_the_rest(tmp_path, monkeypatch, code):
    def fill(shard):
        if shard == 2:
            monkeypatch.setattr(os, "fsync", full(code))

    with pytest.raises(InputError, match=r"cannot write .*part-00002") as caught:
        run(tmp_path / "run", Counting(fill))
    assert "make room and call again" in caught.value.next
    assert len(caught.value.partial) == 12  # two shards that are written, and the one that could not be
    assert names(tmp_path / "run") == ALL[:3]
    monkeypatch.undo()
    fresh = Counting()
    assert run(tmp_path / "run", fresh) == run(None)
    assert fresh.shards == 2


def test_a_full_disk_keeps_sums_too(tmp_path, monkeypatch):
    broken = Counting(lambda shard: shard == 1 and monkeypatch.setattr(os, "fsync", full()))
    with pytest.raises(InputError, match=r"cannot write .*part-00001") as caught:
        run_tally(plan(), broken, 1, None, tmp_path / "run", False)
    assert len(caught.value.partial) == 8
    monkeypatch.undo()
    assert len(run_tally(plan(), Counting(), 1, None, tmp_path / "run", False)) == 16


FILL = """
import resource, signal, sys
from pathlib import Path
import numpy as np, torch
from safetensors.torch import save_file
from markovsafety.errors import InputError
from markovsafety.files import atomic_folder
from markovsafety.rollouts import Rollouts, write_rollouts
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))  # Python ignores the signal, and writes fail
out, big = Path(sys.argv[1]), torch.zeros(100_000)
rolls = Rollouts.of(np.random.default_rng(0).integers(0, 10**6, (50, 1000)), prompt_id=np.arange(50))
writers = {
    "shard.parquet": lambda: write_rollouts(rolls, out / "shard.parquet"),
    "safetensors": lambda: save_file({"a": big}, folder / "a.safetensors"),
    "torch": lambda: torch.save(big, folder / "a.pt"),
    "text": lambda: (folder / "a.txt").write_text("a" * 100_000),
}
for name, write in writers.items():
    try:
        with atomic_folder(out / name) as folder:
            write()
        print(name, "was written")
    except InputError as error:
        print(name, "refused", error.next, sep=": ")
print(sorted(p.name for p in out.iterdir()))
"""


def test_writes_that_fail_half_way_leave_nothing_whoever_writes(tmp_path):
    """The system refuses what goes beyond 20,000 bytes, in the midst of what Arrow, safetensors, torch, Python do."""
    words = [sys.executable, "-W", "ignore", "-c", FILL, str(tmp_path)]
    said = subprocess.run(words, capture_output=True, text=True, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    lines = said.stdout.splitlines()
    then = "make room and call again: files that were finished are kept"
    assert lines == [*(f"{n}: refused: {then}" for n in ("shard.parquet", "safetensors", "torch", "text")), "[]"]


def fill(path):
    with atomic(path) as part:
        part.symlink_to("/dev/full")
        part.write_text("x" * 100_000)


def test_a_disk_that_is_really_full(tmp_path):
    """A file system of 64 KiB where one may be mounted; elsewhere /dev/full, which refuses every byte."""
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", small], capture_output=True)
    try:
        if mounted.returncode:
            with pytest.raises(InputError, match="cannot write"):
                fill(small / "x")
        else:
            rolls = Rollouts.of(np.random.default_rng(0).integers(0, 10**6, (50, 1000)), prompt_id=np.arange(50))
            with pytest.raises(InputError, match="cannot write") as caught:
                write_rollouts(rolls, small / "x.parquet")
            assert "No space left" in caught.value.cause
            assert "make room" in caught.value.next
        assert names(small) == []
    finally:
        if not mounted.returncode:
            subprocess.run(["umount", small], check=True)


def test_a_folder_that_may_not_be_written(tmp_path, monkeypatch):
    """Refused by the system, as of a read-only mount: a run that is not finished says so, a finished one is read."""
    run(tmp_path / "done")
    run(tmp_path / "begun")
    (tmp_path / "begun" / "part-00003.parquet").unlink()
    opened = os.open

    def refuse(path, flags, *mode, **how):
        if flags & (os.O_WRONLY | os.O_RDWR) and str(tmp_path) in str(path):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        return opened(path, flags, *mode, **how)

    def parquet(path, *_, **__):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    monkeypatch.setattr(os, "open", refuse)
    monkeypatch.setattr("pyarrow.parquet.ParquetWriter", parquet)
    assert len(run(tmp_path / "done")) == 16
    with pytest.raises(InputError, match=r"cannot write .*part-00003") as caught:
        run(tmp_path / "begun")
    assert "can be written" in caught.value.next
    assert len(caught.value.partial) == 16


# --- shards that are damaged, lost or mixed ---


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
    with pytest.raises(KeyboardInterrupt, match="2 of 4 shards are kept"):
        run(tmp_path, Counting(lambda shard: shard == 2 and signal.raise_signal(signal.SIGINT)))
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


# --- files and folders that others write ---


def test_leftovers_of_the_dead_go_and_those_of_the_living_stay(tmp_path):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    with atomic(tmp_path / "x") as living:
        living.write_text("here")
        own_number = tmp_path / f".x.1-deadbeef.{os.getpid()}.tmp"  # of a container's run before, with our number
        dead = tmp_path / f".x.1-deadbeef.{ended.pid}.tmp"
        other = tmp_path / f".y.1-deadbeef.{ended.pid}.tmp"
        parent = tmp_path / f".x.1-deadbeef.{os.getppid()}.tmp"
        for path in (own_number, dead, other, parent):
            path.write_text("")
        clear_leftovers(tmp_path, "x")
        assert names(tmp_path) == sorted([living.name, other.name, parent.name])
        clear_leftovers(tmp_path)
        assert names(tmp_path) == sorted([living.name, parent.name])
    assert names(tmp_path) == sorted([parent.name, "x"])


def test_a_checkpoint_counts_when_it_is_sealed_and_whole(tmp_path):
    for step in (2, 4):
        here = tmp_path / f"checkpoint-{step}"
        (here / "rng").mkdir(parents=True)
        (here / "model.safetensors").write_bytes(b"12345678")
        (here / "rng" / "state").write_bytes(b"1")
        if step == 2:
            seal(here, "checkpoint-*")
    assert newest_sealed(tmp_path, "checkpoint-*") == tmp_path / "checkpoint-2"  # the newer one was being written
    assert names(tmp_path) == ["checkpoint-2"]
    shutil.copytree(tmp_path / "checkpoint-2", tmp_path / "checkpoint-10")
    (tmp_path / "checkpoint-10" / "model.safetensors").write_bytes(b"1234")
    assert newest_sealed(tmp_path, "checkpoint-*") == tmp_path / "checkpoint-2"  # cut short: the one before
    shutil.copytree(tmp_path / "checkpoint-2", tmp_path / "checkpoint-10")
    assert newest_sealed(tmp_path, "checkpoint-*") == tmp_path / "checkpoint-10"
    seal(tmp_path / "checkpoint-10", "checkpoint-*")
    assert names(tmp_path) == ["checkpoint-10"]
    (tmp_path / "checkpoint-10" / "rng" / "state").unlink()
    assert newest_sealed(tmp_path, "checkpoint-*") is None
    assert names(tmp_path) == []


def test_a_folder_is_replaced_whole_or_stays(tmp_path):
    with atomic_folder(tmp_path / "model") as fresh:
        (fresh / "a").write_text("old")

    def stopped():
        with atomic_folder(tmp_path / "model") as fresh:
            (fresh / "a").write_text("new")
            raise KeyError

    with pytest.raises(KeyError):
        stopped()
    assert (tmp_path / "model" / "a").read_text() == "old"
    with atomic_folder(tmp_path / "model") as fresh:
        (fresh / "b").write_text("new")
    assert names(tmp_path / "model") == ["b"]
    assert names(tmp_path) == ["model"]


def test_what_others_raise_while_they_write_is_told_apart(tmp_path):
    reader = "[enforce fail at inline_container.cc:1] . PytorchStreamReader failed reading zip archive"
    for error, kind in (
        (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534"), InputError),
        (RuntimeError(reader), RuntimeError),
        (RuntimeError("shapes do not fit"), RuntimeError),
        (OSError(errno.ENOSPC, "No space left"), InputError),
        (InputError("a", cause="b", next="c"), InputError),
    ):
        with pytest.raises(kind) as caught, files.told(tmp_path):
            raise error
        assert (caught.value is error) is not (kind is InputError and not isinstance(error, InputError))
