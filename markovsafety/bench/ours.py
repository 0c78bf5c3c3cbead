"""The package's own entries in the tables: always a chain made anew, through the public functions."""

from __future__ import annotations

from typing import Any

import numpy as np

from .. import hitting
from ..bound import Bound
from ..chains import Chain
from .families import Batch, Problem
from .measure import Contender, Found

__all__ = [
    "BATCH",
    "JUDGED",
    "batch_solver",
    "expected_steps",
    "gradient",
    "jax_gradient",
    "judged",
    "layers",
    "solver",
]

BATCH = "markovsafety, batch with bounds"
JUDGED = 4
"""Samples of a batch whose answers are compared with a reference."""


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


def jax_gradient(name: str, *, layered: bool = False) -> Contender:
    """`device.function`, differentiated by JAX; made and compiled at the first call and kept, as a user would.

    On a homogeneous chain its derivatives are by the share of a row, ``visits_i (h_j - h_i)``.
    """
    kept: dict[int, Any] = {}

    def solve(problem: Problem) -> Any:
        from ..hitting import device

        if id(problem) not in kept:
            kept[id(problem)] = device.function(layers(problem) if layered else problem.chain(), "harm")
        return kept[id(problem)].value_and_gradient()[1]

    def read(raw: Any, problem: Problem) -> Found:
        blocks = problem.blocks() if layered else [problem.matrix()]
        return Found(raw[_inner(blocks)])

    reference = "gradient" if layered else "by share"
    return Contender(name, lambda problem: problem, solve, read, of=reference, ours=True)


def _inner(blocks: list[Any]) -> Any:
    """Where the entries between moving states stand among the chain's own, which end in the loops of the outcomes."""
    found, begin = [], 0
    for block in blocks:
        found.append(begin + np.flatnonzero(block.indices < block.shape[0] - 2))
        begin += block.nnz + 2
    return np.concatenate(found)


def judged(raw: Any, batch: Batch) -> Found:
    """The first answers of a batch, shape (B, n), or of a list."""
    return Found(np.stack([np.asarray(raw[b])[: batch.problem.n] for b in range(JUDGED)]))


def batch_solver(name: str, platform: str | None = None) -> Contender:
    """`device.batch`: compiled kernels on the host, or JAX on a platform; every sample with a bound of its error."""

    def prepare(batch: Batch) -> Any:
        from ..hitting import device

        problem = batch.problem
        chain = layers(problem) if problem.widths else problem.chain()
        return device.batch(chain, "harm"), batch.entries()

    def solve(ready: Any) -> Any:
        solver, values = ready
        return solver.solve(values, device=platform)

    def read(raw: Any, batch: Batch) -> Found:
        value, width = raw.value[:JUDGED], batch.problem.widths
        if width:
            value = np.ascontiguousarray(value[:, :-1, : width[0]]).reshape(JUDGED, -1)
        value, error = value[:, : batch.problem.n], raw.error[:JUDGED, None]
        note = f"{len(raw.again)} samples again for themselves" if len(raw.again) else ""
        return Found(value, value - error, value + error, note)

    return Contender(name, prepare, solve, read, ours=True)
