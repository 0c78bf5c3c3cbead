"""Ray: work spread over a cluster of two nodes, one of which is lost; the same rollouts and counts as in one process.

What kills a worker, a node or the driver is the model itself, when so many shards lie in the folder.
"""

from __future__ import annotations

import contextlib
import functools
import operator
import os
import signal
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from tiny import table_engine

import markovsafety as ms
from markovsafety.chains import read_counts
from markovsafety.cli import main
from markovsafety.evidence import posterior
from markovsafety.organism import train_grid
from markovsafety.rollouts import LexiconJudge, read_rollouts, sample, spread
from markovsafety.rollouts.engines import ray as crews
from markovsafety.rollouts.engines.ray_join import connected, crew_size
from markovsafety.rollouts.engines.ray_sample import _check_there

ray = pytest.importorskip("ray")

ASK = {"n": 16, "max_tokens": 12, "prefill": (0, 2), "prefix": ["sure step one"] * 3, "seed": 4}
PROMPTS = ["hello", {"prompt": "help", "category": "b"}, "tea"]
SHARDS = {"shard_size": 6}  # 16 of them
JUDGE = LexiconJudge(harm=["poison"], refusal=["sorry"])


@dataclass(frozen=True)
class Opening:
    """Opens the table in a worker, with what is to happen there before each shard."""

    folder: str
    fails: object = None
    cwd: str | None = None

    def __call__(self):
        if self.cwd:
            os.chdir(self.cwd)
        return table_engine(Path(self.folder), fails=self.fails)


@dataclass(frozen=True)
class Doom:
    """Kills once, of several workers one, as soon as so many shards are there; `spared` is the raylet of the driver."""

    run: str
    marks: str
    spared: int = 0

    def __call__(self, _):
        shards = len(list(Path(self.run).glob("part-*.parquet")))
        raylet = int(os.environ["RAY_RAYLET_PID"])
        if shards >= 2 and self.once("worker"):
            os.kill(os.getpid(), signal.SIGKILL)
        if shards >= 3 and raylet != self.spared and self.there("worker") and self.once("node"):
            self.write("passed")
            os.kill(raylet, signal.SIGKILL)
            os.kill(os.getpid(), signal.SIGKILL)
        if shards >= 5 and raylet == self.spared and not self.there("node"):
            self.read("passed")  # the other node is to have its turn first

    def once(self, what):
        with contextlib.suppress(FileExistsError):
            os.close(os.open(f"{self.marks}/{what}", os.O_CREAT | os.O_EXCL))
            return True
        return False

    def there(self, what):
        return os.path.exists(f"{self.marks}/{what}")

    def write(self, pipe):
        os.write(os.open(f"{self.marks}/{pipe}", os.O_RDWR), b"x")

    def read(self, pipe):
        os.read(os.open(f"{self.marks}/{pipe}", os.O_RDWR), 1)


@dataclass(frozen=True)
class DriverDoom(Doom):
    def __call__(self, _):
        if len(list(Path(self.run).glob("part-*.parquet"))) >= 3 and self.once("driver"):
            os.kill(int(Path(self.marks, "pid").read_text()), signal.SIGKILL)


@pytest.fixture(scope="module")
def cluster():
    """A head and a second node, one core each; quiet, gone at the end, and quick to notice a lost node."""
    from ray.cluster_utils import Cluster

    before = dict(os.environ)
    here = [str(Path(__file__).parent), str(Path(ms.__file__).parents[1]), *filter(None, [before.get("PYTHONPATH")])]
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "PYTHONPATH": os.pathsep.join(here)}
    health = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 500, "health_check_failure_threshold": 20}
    health |= {"worker_niceness": 0, "prestart_worker_first_driver": False, "enable_worker_prestart": False}
    head = {"num_cpus": 1, "include_dashboard": False, "_system_config": health}
    nodes = Cluster(initialize_head=True, head_node_args=head)
    try:
        nodes.add_node(num_cpus=1)
        nodes.wait_for_nodes()
        yield nodes
    finally:
        nodes.shutdown()
        for name in {*os.environ} - {*before}:
            del os.environ[name]
        os.environ.update(before)


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """The folder of the tokenizer, and all rollouts of one process."""
    folder = tmp_path_factory.mktemp("words")
    return folder, sample(table_engine(folder), PROMPTS, judge=JUDGE, **ASK)


def run(folder, out, address=None, fails=None, **options):
    told = {"engine": "ray", "address": address, "judge": JUDGE, "out": out, **SHARDS, **ASK}
    return sample(Opening(str(folder), fails), PROMPTS, **{**told, **options})


DRIVER = """
import os, sys
from pathlib import Path
from test_cluster_ray import DriverDoom, run
folder, out, marks, address = sys.argv[1:]
Path(marks, "pid").write_text(str(os.getpid()))
run(folder, out, address, DriverDoom(out, marks))
"""


# --- before anything is joined ---


@pytest.mark.parametrize("place", ["127.0.0.1:1", "nowhere"])
def test_no_such_cluster(place):
    with pytest.raises(ms.InputError, match="cannot join a Ray cluster") as caught:
        spread(len, ["a"], address=place)
    assert "ray start" in caught.value.next
    assert not ray.is_initialized()


def test_a_shard_that_a_worker_wrote_elsewhere(tmp_path):
    paths = [tmp_path / "part-00000.parquet", tmp_path / "part-00001.parquet"]
    paths[0].touch()
    with pytest.raises(ms.UntrustedError, match="1 of 2 shards are not in the folder") as caught:
        _check_there([(np.arange(2), path) for path in paths])
    assert "part-00001" in caught.value.fact


def test_words_for_ray_without_ray(one, capsys):
    with pytest.raises(ms.InputError, match="workers, inner and address are for Ray"):
        sample(table_engine(one[0]), PROMPTS, workers=2, **ASK)
    assert main(["count", "x.parquet", "--workers", "2", "--out", "x.npz"]) == 2
    assert "--workers without --engine ray" in capsys.readouterr().err


@pytest.mark.parametrize("workers", [0, -1, 1.5, True])
def test_workers_are_counted(workers):
    with pytest.raises(ms.InputError, match="workers is"):
        spread(len, ["a"], workers=workers)


def test_ray_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ms.InputError, match="Ray is not installed") as caught:
        spread(len, ["a"])
    assert "markovsafety[cluster]" in caught.value.next


def test_versions_differ(cluster, monkeypatch):
    monkeypatch.setattr(ray._private.utils, "compute_version_info", lambda: ("2.0.0", "3.9.1"))
    with pytest.raises(ms.InputError, match="other versions than this process") as caught, connected(cluster.address):
        pass
    assert "Ray: 2.0.0" in caught.value.cause
    assert not ray.is_initialized()


def test_driver_killed_and_gone_on_with(cluster, one, tmp_path):
    folder, whole = one
    (tmp_path / "marks").mkdir()
    words = [folder, tmp_path / "run", tmp_path / "marks", cluster.address]
    driver = subprocess.run([sys.executable, "-c", DRIVER, *map(str, words)], stderr=subprocess.PIPE)
    assert driver.returncode == -signal.SIGKILL, driver.stderr.decode()[-2000:]
    there = len(list((tmp_path / "run").glob("part-*.parquet")))
    assert 3 <= there < 16
    environment, handler = dict(os.environ), signal.getsignal(signal.SIGTERM)
    again = run(folder, tmp_path / "run", cluster.address, shard_size=None)
    assert (dict(os.environ), signal.getsignal(signal.SIGTERM)) == (environment, handler)
    assert again == whole
    assert again.provenance["complete"]
    assert not list((tmp_path / "run").glob(".*"))
    # One process finds the same run in the folder.
    assert sample(table_engine(folder), PROMPTS, out=tmp_path / "run", judge=JUDGE, **SHARDS, **ASK) == whole


# --- from here on this process stays joined ---


@pytest.fixture(scope="module")
def joined(cluster):
    with connected(cluster.address) as module:
        yield module


def test_order_results_and_errors(joined):
    seen = []
    assert spread(lambda x: x * x, range(20), workers=2, done=seen.append) == [x * x for x in range(20)]
    assert sorted(seen) == [x * x for x in range(20)]
    assert spread(len, []) == []

    def picky(x):
        if x == 3:
            raise ms.UntrustedError("three", cause="it is odd", next="take four")
        return x

    with pytest.raises(ms.UntrustedError, match="three") as caught:
        spread(picky, [0, 1, 2, 3], workers=1)
    assert caught.value.partial == [0, 1, 2, None]
    with pytest.raises(ZeroDivisionError):
        spread(lambda x: 1 / x, [0], workers=1)


def test_an_item_that_kills_is_given_up(joined, tmp_path):
    def deadly(x):
        if x == 0:
            with open(tmp_path / "deaths", "ab") as file:
                file.write(b"x")
            os.kill(os.getpid(), signal.SIGKILL)
        return x

    with pytest.raises(ms.ModelError, match="item 1 of the work lost 2 workers") as caught:
        crews_tries(2, lambda: spread(deadly, [1, 0, 2], workers=1))
    assert caught.value.partial == [1, None, None]
    assert (tmp_path / "deaths").read_bytes() == b"xx"


def crews_tries(tries, work):
    before, crews.TRIES = crews.TRIES, tries
    try:
        return work()
    finally:
        crews.TRIES = before


def test_what_cannot_be_sent(joined, one, tmp_path, monkeypatch):
    lock = threading.Lock()
    with pytest.raises(ms.InputError, match="the function cannot be sent to the workers"):
        spread(lambda x: lock, [1])
    with pytest.raises(ms.InputError, match="an item cannot be sent"):
        spread(id, [lock])
    judge = LexiconJudge(harm=["poison"], refusal=["sorry"])
    object.__setattr__(judge, "lock", lock)
    with pytest.raises(ms.InputError, match="the judge cannot be sent"):
        run(one[0], None, judge=judge)
    (tmp_path / "only_here.py").write_text("def f(x):\n    return x\n")
    monkeypatch.syspath_prepend(tmp_path)
    import only_here

    with pytest.raises(ms.ModelError, match="cannot load what it was sent") as caught:
        spread(only_here.f, [1], workers=1)
    assert "only_here" in caught.value.cause


def test_workers_must_agree(joined):
    unlike = crews.Crew(joined, lambda: ({"weights": os.getpid(), "n": 1}, id), 2)
    with unlike as crew, pytest.raises(ms.ModelError, match="see different things") as caught:
        crew.ready(2)
    assert "weights" in caught.value.cause
    assert "n:" not in caught.value.cause
    with pytest.raises(ms.InputError, match="no GPU to offer"):
        crew_size(joined, None, gpu=True)


def test_shards_come_back_from_workers_that_do_not_see_the_folder(joined, one, tmp_path, monkeypatch):
    folder, whole = one
    monkeypatch.chdir(tmp_path)
    out = "/proc/self/cwd/run"  # for every process another place
    far = sample(Opening(str(folder), cwd="/"), PROMPTS, engine="ray", judge=JUDGE, out=out, **SHARDS, **ASK)
    assert far == whole
    assert len(list((tmp_path / "run").glob("part-*.parquet"))) == 16
    assert far.provenance["spread"]["engine"] == "ray"


def test_other_work_through_the_same_door(joined, one, tmp_path):
    _, whole = one
    counts = ms.count(whole, ms.KGram(1))
    away = posterior(counts, draws=300, spread=functools.partial(spread, workers=1))
    here = posterior(counts, draws=300, spread=lambda function, items: [function(item) for item in items])
    assert np.array_equal(away.value, here.value)
    for name in ("base", "shallow"):
        place = tmp_path / f"h16-s0-{name}"
        place.mkdir()
        (place / "training.json").write_text('{"kl": 0.001, "judge": 1.0, "seconds": 1.0, "failed": []}')
    rows = train_grid(tmp_path, hidden=(16,), depths=(0,), seeds=1, spread=spread, progress=False)
    assert [(r["variant"], r["kl"]) for r in rows] == [("base", 0.001), ("shallow", 0.001)]


def test_commands(joined, tmp_path):
    """On the organism: the same rollouts and counts with and without Ray."""
    for engine in (["jax"], ["ray", "--inner", "jax", "--workers", "1"]):
        words = ["organism:shallow", "organism:6", "--n", "4", "--max-tokens", "24", "--engine", *engine]
        assert main(["sample", *words, "--out", str(tmp_path / engine[0])]) == 0
    rolls = read_rollouts(tmp_path / "ray")
    assert rolls == read_rollouts(tmp_path / "jax")
    judged, here, away = (str(tmp_path / name) for name in ("judged.parquet", "here.npz", "away.npz"))
    assert main(["judge", str(tmp_path / "ray"), "--judge", "organism", "--out", judged]) == 0
    assert main(["count", judged, "--out", here]) == 0
    assert main(["count", judged, "--engine", "ray", "--workers", "1", "--out", away]) == 0
    assert read_counts(away).equals(read_counts(here))
    # A folder in which one shard is empty and another weighs nothing and lacks a mass.
    rolls = ms.read_rollouts(judged)
    (tmp_path / "odd").mkdir()
    mass = np.full(len(rolls.tokens), 0.25, np.float32)
    odd = {0: {"mass_harm": mass, "weight": np.full(len(rolls), 2.0)}, 1: {"weight": np.zeros(len(rolls))}, 2: {}}
    for i, columns in odd.items():
        part = rolls.replace(columns=columns)
        ms.write_rollouts(part[:0] if i == 2 else part, tmp_path / "odd" / f"part-{i:05d}.parquet")
    assert main(["count", str(tmp_path / "odd"), "--engine", "ray", "--workers", "1", "--out", away]) == 0
    assert read_counts(away).equals(ms.count(tmp_path / "odd"))


def test_worker_and_node_killed(joined, cluster, one, tmp_path):
    folder, whole = one
    marks = tmp_path / "marks"
    marks.mkdir()
    os.mkfifo(marks / "passed")
    pipe = os.open(marks / "passed", os.O_RDWR)
    head = cluster.head_node.all_processes["raylet"][0].process.pid
    try:
        found = run(folder, tmp_path / "run", fails=Doom(str(tmp_path / "run"), str(marks), head))
    finally:
        os.close(pipe)
    assert (marks / "worker").exists()
    assert (marks / "node").exists()
    assert found == whole
    assert read_rollouts(tmp_path / "run") == whole
    shards = sorted((tmp_path / "run").glob("part-*.parquet"))
    assert len(shards) == 16
    parts = spread(functools.partial(counted, order=1), shards)
    assert functools.reduce(operator.add, parts).equals(ms.count(whole, ms.KGram(1)))


def counted(path, order):
    return ms.count(read_rollouts(path), ms.KGram(order))
