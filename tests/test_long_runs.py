"""Runs that are killed at random moments, readers fed with damaged files, other seeds: `./run test --full` only."""

from __future__ import annotations

import contextlib
import json
import random
import subprocess
import sys

import numpy as np
import pytest

import markovsafety as ms
from markovsafety import demo, organism
from markovsafety.chains import read_counts, write_counts

pytestmark = pytest.mark.full

SAMPLE = """
import sys
import markovsafety as ms
from markovsafety import organism
ms.sample(organism.model_path("shallow"), organism.prompts(n=24, seed=5), n=16, prefill=(0, 3), max_tokens=96, seed=9,
          shard_size=64, progress=False, out=sys.argv[1])
"""

TRAIN = """
import sys
import torch
from markovsafety import organism
from markovsafety.errors import UntrustedError
from markovsafety.organism import training
torch.set_num_threads(1)
recipe = training.Recipe(training.variant_named("cyclic"))
training._phases = lambda v: [training.Phase("one", recipe, 30, 1e-3, 2), training.Phase("two", recipe, 30, 1e-3, 2)]
run = training._run
training._run = lambda *a: run(*a, save_every=3)
try:
    training.train("cyclic", sys.argv[1], base=organism.model_path("base"), seed=1, rounds=0, progress=False)
except UntrustedError:
    pass  # sixty steps are too few; the model is written all the same
"""


def until_done(script, folder, rng, kills, longest):
    """Run the script again and again, killed after a random time, until it ends by itself; how often it was killed."""
    for killed in range(kills + 1):
        process = subprocess.Popen([sys.executable, "-c", script, str(folder)], stderr=subprocess.PIPE)
        try:
            limit = rng.uniform(0.2, longest) if killed < kills else None
            _, err = process.communicate(timeout=limit)
            assert process.returncode == 0, err.decode()[-2000:]
            if killed:
                return killed
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
    return kills


def test_sampling_killed_at_random_moments_yields_the_same_rollouts(tmp_path):
    rng = random.Random(1)
    subprocess.run([sys.executable, "-c", SAMPLE, str(tmp_path / "whole")], check=True)
    whole = ms.read_rollouts(tmp_path / "whole")
    killed = 0
    for i in range(10):
        killed += until_done(SAMPLE, tmp_path / f"run{i}", rng, 8, 6.0)
        again = ms.read_rollouts(tmp_path / f"run{i}")
        assert np.array_equal(again.tokens, whole.tokens)
        assert np.array_equal(again.prompt_id, whole.prompt_id)
        assert not list((tmp_path / f"run{i}").glob("*.tmp"))
    assert killed >= 20


def test_training_killed_at_random_moments_yields_the_same_weights(tmp_path):
    from safetensors.numpy import load_file

    rng = random.Random(2)
    subprocess.run([sys.executable, "-c", TRAIN, str(tmp_path / "whole")], check=True, stderr=subprocess.PIPE)
    whole = load_file(tmp_path / "whole" / "model.safetensors")
    killed = 0
    for i in range(4):
        killed += until_done(TRAIN, tmp_path / f"run{i}", rng, 8, 8.0)
        again = load_file(tmp_path / f"run{i}" / "model.safetensors")
        assert all(np.array_equal(again[name], whole[name]) for name in whole)
    assert killed >= 4


def damaged(raw, rng):
    """The bytes with a few flipped, cut, doubled or shuffled."""
    raw = bytearray(raw)
    for _ in range(rng.randint(1, 6)):
        at, other = rng.randrange(len(raw)), rng.randrange(len(raw))
        match rng.randrange(4):
            case 0:
                raw[at] = rng.randrange(256)
            case 1:
                raw[at] ^= 1 << rng.randrange(8)
            case 2:
                lo, hi = sorted((at, min(at + 64, len(raw))))
                raw[lo:hi] = raw[other : other + hi - lo] or b"\0"
            case 3:
                del raw[at : at + rng.randint(1, 200)]
                if not raw:
                    raw = bytearray(b"\0")
    return bytes(raw)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """One small file of each kind that the package reads, with its reader."""
    folder = tmp_path_factory.mktemp("files")
    rolls = ms.sample(organism.model_path("shallow"), organism.prompts(n=6), n=4, max_tokens=96, seed=1, progress=False)
    rolls = ms.judge(rolls, "organism")
    ms.write_rollouts(rolls, folder / "rolls.parquet")
    counts = ms.count(rolls, ms.KGram(2))
    write_counts(counts, folder / "counts.npz")
    ms.write_chain(ms.estimate(counts), folder / "chain.npz")
    rows = [{"prompt_id": i, "category": "a", "tokens": [4, 5, 2], "prefill": 0} for i in range(4)]
    (folder / "log.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return folder


@pytest.mark.parametrize(
    ("name", "reader"),
    [
        ("rolls.parquet", ms.read_rollouts),
        ("log.jsonl", ms.read_rollouts),
        ("chain.npz", ms.read_chain),
        ("counts.npz", read_counts),
    ],
)
def test_no_damaged_file_escapes_its_reader(files, tmp_path, name, reader):
    """20,000 damaged files each: they read, or raise our error; nothing else, no hang."""
    rng, raw = random.Random(name), (files / name).read_bytes()
    refused = 0
    for _ in range(20_000):
        path = tmp_path / name
        path.write_bytes(damaged(raw, rng))
        with contextlib.suppress(ms.InputError):
            reader(path)
            refused -= 1
        refused += 1
    assert refused > 2_000


@pytest.mark.parametrize("seed", [1, 2, 3, 4])
def test_the_main_job_tells_the_same_story_for_other_seeds(seed, tmp_path):
    found = demo.run(out=tmp_path, seed=seed, quiet=True).summary["models"]
    h = {name: {int(k): b["value"] for k, b in m["harm"]["all"].items()} for name, m in found.items()}
    assert h["shallow"][1] - h["shallow"][0] >= 0.30
    assert all(h[name][k] <= 0.10 for name in ("deep20", "cyclic") for k in (1, 2, 3, 5, 8))
    planted = organism.planted_profile("shallow", organism.prompts(n=demo.Plan().prompts, seed=seed), demo.DEPTHS)[
        "all"
    ]
    assert np.mean([abs(h["shallow"][k] - planted[k]) for k in demo.DEPTHS]) <= 0.05
