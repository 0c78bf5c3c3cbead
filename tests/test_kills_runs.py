"""Runs that are killed and called again: nothing half-written is seen, and what they make is what it would have been.

Ten kills here, one at each kind of moment; some two hundred in the full run, at every moment that the harness can name
and at random ones. A writer that is not atomic is found by the same harness.
"""

from __future__ import annotations

import random
import shutil
import tempfile
from pathlib import Path

import pytest
from kill_harness import Survival, inside, serving, spread, times


@pytest.fixture(scope="module")
def server():
    with tempfile.TemporaryDirectory(dir=in_memory()) as folder, serving(Path(folder)) as found:
        yield found


def in_memory():
    """A folder in memory, if there is one: a killed process leaves what it wrote there as on a disk, and sooner."""
    shared = Path("/dev/shm")
    return shared if shared.is_dir() and shutil.disk_usage(shared).free > 2**30 else None


def survival(server, job):
    return Survival(server, job, server.folder / job, older="tuned before" if job == "tune" else None)


def told(found, kills):
    assert found.faults == [], "\n".join(found.faults)
    assert found.kills >= kills


def test_sampling(server):
    found = survival(server, "sample")
    found.kill({"bytes": found.sizes[-1] // 2})  # a shard is half there
    found.kill({"events": found.events // 2}, {"events": 3}, {"seconds": found.seconds / 2})
    told(found, 3)  # on a fast machine the last run has ended before its time


def test_training(server):
    found = survival(server, "train")
    found.kill({"bytes": found.sizes[-1] // 2}, {"events": found.events // 2})
    told(found, 2)


def test_merging(server):
    found = survival(server, "merge")
    found.kill({"events": found.events - 1})  # the sum is written, and not yet in its place
    found.kill({"bytes": found.sizes[-1] - 1})
    told(found, 2)


def test_sweeping(server):
    found = survival(server, "sweep")
    found.kill({"bytes": found.sizes[0] // 2})
    told(found, 1)


def test_fine_tuning_in_place_of_another_model(server):
    found = survival(server, "tune")
    found.kill({"bytes": found.sizes[-1] // 2}, {"events": found.events // 2})
    found.kill({"events": found.events - 1})  # the model lies there, and not all that it was made from has gone
    told(found, 3)


@pytest.mark.parametrize("job", ["sample", "sweep"])
def test_the_harness_finds_a_writer_that_is_not_atomic(server, job):
    found = survival(server, job)
    found.kill({"bytes": found.sizes[-1] // 2}, in_place=True)
    assert found.kills == 1
    assert any("half-written" in fault or "differs" in fault for fault in found.faults), found.faults


@pytest.mark.full
@pytest.mark.parametrize(
    ("job", "events", "chains"),
    [("sample", 50, 4), ("tally", 16, 1), ("merge", 30, 2), ("sweep", 30, 2), ("train", 40, 3), ("tune", 40, 3)],
)
def test_killed_at_every_moment(server, job, events, chains, capsys):
    found, rng = survival(server, job), random.Random(job)
    ways = [*({"events": event} for event in spread(found.events, events)), *inside(found.sizes)]
    for way in ways:
        found.kill(way)
    for _ in range(chains):
        found.kill(*times(rng, found.seconds, 6))
    with capsys.disabled():
        print(f"\nLOG: {job}: {len(found.faults)} faults after {found.kills} kills")
    told(found, len(ways))
