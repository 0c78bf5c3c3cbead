"""Judged rollouts of any size in shards on disk, for tests of what is counted without being read as a whole."""

from __future__ import annotations

import numpy as np

import markovsafety as ms
from markovsafety.rollouts import Rollouts

TRUNCATED = 3


def corpus(seed, n=300, vocabulary=7, prompts=9, length=12, prefills=(0, 2), together=True, **columns) -> Rollouts:
    """Random answers; those of a prompt lie together, or anywhere."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(max(prefills) + 1, length + 1, n)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    prompt = rng.integers(0, prompts, n)
    prompt = rng.permutation(prompts)[np.sort(prompt) if together else prompt]
    prefill = rng.choice(prefills, n)
    outcome = rng.integers(0, 4, n)
    # Prompts differ in how often they are harmful, or the design effects would all be 1.
    outcome = np.where((prompt % 3 == 0) & (rng.random(n) < 0.6), 0, outcome)
    hit = np.where(outcome == TRUNCATED, -1, rng.integers(prefill, lengths))
    tokens = (vocabulary * rng.random(offsets[-1]) ** 2).astype(np.int32)
    category = np.array(["bio", "chem", "cyber"], dtype=object)[prompt % 3]
    sizes = {"weight": n}
    told = {name: make(rng, sizes.get(name, len(tokens))) for name, make in columns.items()}
    return Rollouts(
        tokens,
        offsets,
        prompt_id=prompt * 10,
        category=category,
        prefill=prefill,
        outcome=outcome,
        hit=hit,
        columns=told,
    )


def shards(folder, rolls, pieces=3):
    """The rollouts cut into files, as a run writes them."""
    folder.mkdir()
    for i, rows in enumerate(np.array_split(np.arange(len(rolls)), pieces)):
        ms.write_rollouts(rolls[rows], folder / f"part-{i:05d}.parquet")
    return folder
