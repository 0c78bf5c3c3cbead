"""Folders with two writers, full disks, folders that may not be written, and what others leave behind."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
from counted_runs import ALL, Counting, names, plan, run

from markovsafety import files, organism
from markovsafety.errors import InputError
from markovsafety.files import atomic, atomic_folder, claimed, clear_leftovers, newest_sealed, seal
from markovsafety.rollouts import Rollouts, write_rollouts
from markovsafety.rollouts.tally import _run as run_tally

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


@pytest.mark.parametrize("error", [OSError(errno.EIO, "no"), KeyboardInterrupt()])
def test_a_folder_that_cannot_take_its_place_leaves_the_old_one(tmp_path, monkeypatch, error):
    def put(text):
        with atomic_folder(tmp_path / "model") as folder:
            (folder / "x").write_text(text)

    put("old")
    move = os.replace

    def fails(source, target):
        if str(source).endswith(".new"):
            raise error
        move(source, target)

    monkeypatch.setattr(os, "replace", fails)
    with pytest.raises((InputError, KeyboardInterrupt)):
        put("new")
    monkeypatch.undo()
    assert (names(tmp_path), (tmp_path / "model" / "x").read_text()) == (["model"], "old")
    os.rename(tmp_path / "model", tmp_path / ".model.old")  # killed there
    with contextlib.suppress(ZeroDivisionError), atomic_folder(tmp_path / "model"):
        raise ZeroDivisionError
    assert (names(tmp_path), (tmp_path / "model" / "x").read_text()) == (["model"], "old")


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
