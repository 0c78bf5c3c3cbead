"""A process that has everything loaded and forks runs, each told where to die; see `kill_harness`.

Requests and answers are lines of JSON. A run is killed from outside the package, which has no hook for it:

    events   at the n-th time it opens a file for writing, makes, moves, removes or syncs something in its folder: an
             audit hook of Python and a wrapped os.fsync count, and send SIGKILL before the call takes place
    bytes    inside the write that makes any file longer than n bytes (RLIMIT_FSIZE: the kernel ends the process, be it
             in Python, Arrow, torch or safetensors, and leaves a file of n bytes)
    seconds  from here, after a time
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import select
import signal
import sys
from pathlib import Path

import torch

import markovsafety as ms
from markovsafety import cli, files, organism
from markovsafety.chains import read_counts, write_counts
from markovsafety.interventions.augment import Row
from markovsafety.interventions.tuning import fine_tune
from markovsafety.organism import training
from markovsafety.rollouts import sample, tally

MODEL = organism.model_path("shallow")
ASKED = organism.prompts(n=12, seed=5)
OPTIONS = {"n": 4, "prefill": (0, 3), "max_tokens": 40, "seed": 9, "shard_size": 24, "progress": False}


def sampling(folder: Path, _: Path) -> None:
    sample(MODEL, ASKED, judge="organism", engine="transformers", out=folder / "run", **OPTIONS)


def tallying(folder: Path, _: Path) -> None:
    sums = tally(MODEL, ASKED, ms.KGram(1), judge="organism", out=folder / "run", **OPTIONS)
    write_counts(ms.count(sums), folder / "counts.npz")


def merging(folder: Path, runs: Path) -> None:
    """Counts of two halves by the command, then their sum."""
    folder.mkdir(parents=True, exist_ok=True)
    for half in ("a", "b"):
        assert cli.main(["count", str(runs / half), "--out", str(folder / f"{half}.npz")]) == 0
    write_counts(read_counts(folder / "a.npz") + read_counts(folder / "b.npz"), folder / "counts.npz")


def sweeping(folder: Path, runs: Path) -> None:
    out = ["--out", str(folder / "grid.csv"), "--figure", str(folder / "grid.svg")]
    assert cli.main(["sweep", str(runs / "a"), "--depth", "0", "3", "--width", "1", "2", *out]) == 0


def training_(folder: Path, _: Path) -> None:
    """Two phases of the organism's training, a checkpoint every other step, without the checks at the end."""
    recipe = training.Recipe(training.variant_named("cyclic"))
    training._phases = lambda v: [training.Phase(n, recipe, 4, 1e-3, 1) for n in ("one", "two")]
    run = training._run
    training._run = lambda *a: run(*a, save_every=2)
    training.train_checks.report = lambda *a: {}
    training.train_checks.criteria = lambda *a: []
    training.train("cyclic", folder / "model", base=organism.model_path("base"), seed=1, rounds=0, progress=False)


def tuning(folder: Path, _: Path, steps: int = 5) -> None:
    rows = [Row([0, 4 + i, 9, 2], 2, 2) for i in range(8)]
    told = {"batch_size": 2, "warmup": 1, "save_every": 2, "progress": False}
    fine_tune(organism.model_path("base"), rows, folder / "model", steps=steps, **told)


def tuned_before(folder: Path, runs: Path) -> None:
    tuning(folder, runs, steps=1)


JOBS = {"sample": sampling, "tally": tallying, "merge": merging, "sweep": sweeping, "train": training_, "tune": tuning}
JOBS["tuned before"] = tuned_before


def prepare(runs: Path) -> None:
    """What jobs read: two folders of rollouts."""
    for half, seed in (("a", 1), ("b", 2)):
        told = {**OPTIONS, "seed": seed, "out": runs / half}
        sample(MODEL, ASKED, judge="organism", engine="transformers", **told)


@contextlib.contextmanager
def in_place(path, **_):
    """What `files.atomic` must not be: the file is written where it will lie."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    yield Path(path)


def watched(folder: str, last: int | None) -> list[int]:
    """Count what the process does to files below the folder, and die before the event of number `last` (from 1)."""
    seen = [0]
    writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT

    def strike() -> None:
        seen[0] += 1
        if seen[0] == last:
            os.kill(os.getpid(), signal.SIGKILL)

    def below(path: object, handle: object = -1) -> bool:
        """Whether a path, or a name in the folder that a handle stands for, is in the folder."""
        inside = isinstance(handle, int) and handle >= 0
        return folder in (os.readlink(f"/proc/self/fd/{handle}") if inside else str(path))

    def hook(event: str, given: tuple) -> None:
        if event == "open":
            counts = given[2] & writing and below(given[0])
        elif event in ("os.remove", "os.rmdir"):  # shutil.rmtree removes names in open folders
            counts = below(*given)
        else:
            counts = event in ("os.rename", "os.mkdir", "os.truncate") and any(below(path) for path in given[:2])
        if counts:
            strike()

    sync = os.fsync

    def fsync(handle):
        strike()
        sync(handle)
        strike()

    os.fsync = fsync
    sys.addaudithook(hook)
    return seen


def child(request: dict, answer: int) -> None:
    os.setpgid(0, 0)
    seen = watched(request["folder"], request.get("events"))
    if request.get("in_place"):
        for module in [m for name, m in sys.modules.items() if name.startswith("markovsafety")]:
            if getattr(module, "atomic", None) is files.atomic and module is not files:
                module.atomic = in_place
        files.atomic = in_place
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if request.get("bytes") is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_FSIZE, (request["bytes"],) * 2)
    JOBS[request["job"]](Path(request["folder"]), Path(request["runs"]))
    os.write(answer, json.dumps(seen[0]).encode())


def run(request: dict, log: int) -> dict:
    """Fork one run; whether it was killed, and how many events it had."""
    end, answer = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.close(end)
            os.dup2(log, 1)
            os.dup2(log, 2)
            child(request, answer)
            code = 0
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            os._exit(code)
    os.close(answer)
    handle = os.pidfd_open(pid)
    if request.get("seconds") is not None and not select.select([handle], [], [], request["seconds"])[0]:
        signal.pidfd_send_signal(handle, signal.SIGKILL)
    status = os.waitpid(pid, 0)[1]
    os.close(handle)
    with os.fdopen(end) as pipe:
        events = json.loads(pipe.read() or "null")
    return {"killed": os.WIFSIGNALED(status), "code": os.waitstatus_to_exitcode(status), "events": events}


def main(log: int, runs: Path) -> None:
    torch.set_num_threads(1)
    out = os.dup(1)
    os.dup2(log, 1)
    if run({"job": "prepare", "folder": str(runs), "runs": str(runs)}, log)["code"]:
        os.write(out, b"null\n")
        return
    os.write(out, b'"ready"\n')
    for line in sys.stdin:
        request = json.loads(line)
        os.write(out, json.dumps(run({**request, "runs": str(runs)}, log)).encode() + b"\n")


JOBS["prepare"] = lambda folder, _: prepare(folder)
if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
