"""Good chains and counts of every kind that lies on disk, and what reads them; see `fuzzed_readers`."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from fuzzing import Reader, damage_npy, damage_npz

import markovsafety as ms
from markovsafety.chains import pool, read_pooled, write_layers
from markovsafety.chains.storage import read_counts, write_counts
from markovsafety.outcomes import CODES

Make = Callable[[Path], Reader]


def rolls(n: int = 6) -> Any:
    """Judged rollouts of three prompts."""
    rng = np.random.default_rng(0)
    outcome = [CODES[o] for o in ("harm", "refusal", "benign", "truncated", "benign", "harm")][:n]
    tokens = [rng.integers(0, 9, size=int(size)).tolist() for size in rng.integers(3, 7, size=n)]
    hit = [-1 if o == CODES["truncated"] else len(t) - 1 for o, t in zip(outcome, tokens)]
    numbers = np.zeros(sum(map(len, tokens)), np.float32)
    return ms.Rollouts.of(
        tokens,
        prompt_id=[0, 0, 1, 1, 2, 2][:n],
        category=["a", "a", "b", "b", "a", "a"][:n],
        prefill=[0, 0, 0, 1, 1, 0][:n],
        outcome=outcome,
        hit=hit,
        columns={"logprob": numbers, "mass_harm": numbers, "weight": np.ones(n)},
        provenance={"model": {"name": "m"}, "template": {"template_hash": "t", "tokenizer_hash": "k"}},
    )


def taken(path: Path) -> bytes:
    """What a file holds, which goes away."""
    data = path.read_bytes()
    path.unlink()
    return data


def chain(folder: Path) -> Reader:
    seeds, path = [], folder / "x.npz"
    counted = ms.estimate(ms.count(rolls(), states=ms.KGram(1)))
    layered = ms.Chain.layered([np.array([[0.5, 0.25, 0.25], [0, 1, 0], [0, 0, 1]])] * 2, {"harm": 1, "refusal": 2}, 0)
    exact = ms.Chain.from_counts(np.array([[1, 2, 1], [0, 0, 0], [0, 0, 0]]), {"harm": 1, "refusal": 2}, 0)
    for made in (counted, layered, exact):
        ms.write_chain(made, path)
        seeds.append(taken(path))
    return Reader("chain", "x.npz", seeds, ms.read_chain, damage_npz)


def counts(folder: Path) -> Reader:
    path = folder / "x.npz"
    write_counts(ms.count(rolls(), states=ms.KGram(2)), path)
    return Reader("counts", "x.npz", [taken(path)], read_counts, damage_npz)


def stored_layers(folder: Path) -> Reader:
    """A layered chain that stays in its file."""
    path, P = folder / "x.npz", np.array([[0.5, 0.25, 0.25], [0, 1, 0], [0, 0, 1]])
    write_layers([P, P], path, {"harm": 1, "refusal": 2}, start=0)
    read = lambda p: ms.hitting_probability(ms.read_chain(p, stream=True), "harm")  # noqa: E731
    return Reader("stored_layers", "x.npz", [taken(path)], read, damage_npz)


def _pooled(name: str) -> Make:
    """One file of a folder of pooled counts."""

    def make(folder: Path) -> Reader:
        ms.write_rollouts(rolls(), folder / "rolls.parquet")
        pool(folder / "rolls.parquet", ms.KGram(1), out=folder / "table")
        for file in (folder / "table").iterdir():
            shutil.move(file, folder / file.name)

        def read(path: Path) -> Any:
            found = read_pooled(path.parent)
            return found.chain(), found.chain("dirichlet"), found.matrix(), found.labels(), repr(found)

        seed = (folder / name).read_bytes()
        return Reader(make.__name__, name, [seed], read, damage_npz if name.endswith(".npz") else damage_npy)

    make.__name__ = f"pooled_{name.partition('.')[0]}"
    return make


POOLED = tuple(map(_pooled, ("tally.npz", "contexts.npy", "symbols.npy")))
