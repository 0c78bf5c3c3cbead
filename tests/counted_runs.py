"""A small run in a folder, by an engine whose answers are their own numbers."""

from __future__ import annotations

import numpy as np

from markovsafety.rollouts import shards
from markovsafety.rollouts.asked import Asked
from markovsafety.rollouts.engines import Output
from markovsafety.rollouts.sums import Added

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
