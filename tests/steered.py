"""A planted world with an edit that refuses: what the tests of the chain view share."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import torch

import markovsafety as ms
from markovsafety.interventions import Edit, Host, Part, activations, open_host
from markovsafety.organism import worlds
from markovsafety.organism.train_worlds import open_world
from markovsafety.rollouts import Rollouts

BASE = Path(__file__).parent / "fixtures" / "worlds" / "base"
JUDGE = worlds.world_judge()
LEVEL = 2
FALSE_ALARM = 1e-8
"""Of every statistical statement that is tested; two dozen are made."""


@cache
def host() -> Host:
    torch.set_num_threads(1)
    return open_host(open_world(BASE))


@cache
def asked() -> list[dict]:
    """Half the prompts are refused, half are jailbroken."""
    both = worlds.prompts(n=24, half=1, seed=2) + worlds.prompts(n=24, half=1, marker="jailbreak", seed=2)
    return [{**p, "prompt_id": i} for i, p in enumerate(both)]


@cache
def refuse() -> np.ndarray:
    """Refused minus accepted, by level, at the last prompt token."""
    sides = [worlds.prompts(n=48, half=0, marker=m, seed=1) for m in (None, "jailbreak")]
    means = [activations(host(), p)[:, :, 0].mean(axis=0) for p in sides]
    return means[0] - means[1]


def push(scale: float, when: str = "prompt") -> Edit:
    """Along the refusal direction."""
    return Edit((Part("add", refuse()[LEVEL], layer=LEVEL, scale=scale, when=when),), sign="positive: refuses")


@cache
def plain() -> Rollouts:
    """Answers of the world as it is."""
    return ms.sample(host().engine, asked(), n=8, max_tokens=16, judge=JUDGE)
