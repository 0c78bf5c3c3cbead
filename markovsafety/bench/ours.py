"""The package's own entries in the tables: always a chain made anew, through the public functions."""

from __future__ import annotations

from typing import Any

import numpy as np

from .. import hitting
from ..bound import Bound
from ..chains import Chain
from .families import Problem
from .measure import Contender, Found

__all__ = ["expected_steps", "gradient", "layers", "solver"]


def layers(problem: Problem) -> Chain:
    return problem.layered_chain()


def _chain(problem: Problem) -> Chain:
    return problem.chain()


def _read(bound: Bound, problem: Problem) -> Found:
    """The states that move, in the problem's order."""
    parts = bound.value, bound.lower, bound.upper
    if bound.value.ndim == 2:  # one row per layer, with what comes after the last
        width = problem.widths[0]
        parts = tuple(np.ascontiguousarray(x[:-1, :width]).ravel() for x in parts)
    value, lower, upper = (x[: problem.n] for x in parts)
    info = bound.info
    note = str(info.get("method", ""))
    return Found(value, lower, upper, note) if info.get("certified") else Found(value, note=note)


def solver(
    name: str, *, certify: bool = True, layered: bool = False, method: str = "auto", memory: Any = None
) -> Contender:
    """`hitting_probability` of harm."""

    def solve(chain: Chain) -> Bound:
        return hitting.hitting_probability(chain, "harm", method=method, certify=certify)

    return Contender(name, layers if layered else _chain, solve, _read, ours=True, memory=memory)


def expected_steps(name: str) -> Contender:
    """`hitting_time` of any outcome."""
    return Contender(name, _chain, lambda chain: hitting.hitting_time(chain), _read, of="time", ours=True)


def gradient(name: str, *, layered: bool = False, factored: bool = False) -> Contender:
    """`sensitivity`: the derivatives by all entries, written out, or as two factors."""

    def read(raw: Any, problem: Problem) -> Found:
        blocks = raw.matrix() if factored else raw
        if not layered:
            return Found(blocks[: problem.n, : problem.n].data)
        width = problem.widths[0]
        return Found(np.concatenate([block[:width, :width].data for block in blocks[:-1]]))

    def solve(chain: Chain) -> Any:
        return hitting.sensitivity(chain, "harm", factored=factored)

    return Contender(name, layers if layered else _chain, solve, read, of="gradient", ours=True)
