"""The cases: which problem, who takes part, what the answers are compared with, and what is to be reached."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from . import families, peers, references
from .families import Problem
from .goals import Goal
from .measure import Contender
from .ours import expected_steps, solver

__all__ = ["Case", "solves"]

EXACT, PLAIN = "markovsafety", "markovsafety, uncertified"
KNOWN, UNKNOWN = "layers known", "layers unknown"
STEPS = "markovsafety, expected steps"


@dataclass(frozen=True)
class Case:
    """One comparison.

    Attributes
    ----------
    name, title : str
    make : quick? -> the problem
    contenders : tuple of Contender
    reference : problem -> dict of references by name
    source : str
        How the reference was made.
    goals : tuple of Goal
    numbers : (problem, rows) -> dict, optional
        More numbers of this case.
    gpu : bool
        Runs on a GPU, and only if one is asked for.
    """

    name: str
    title: str
    make: Callable[[bool], Any]
    contenders: tuple[Contender, ...]
    reference: Callable[[Any], dict[str, Any]]
    source: str
    goals: tuple[Goal, ...] = ()
    numbers: Callable[[Any, dict[str, Any]], dict[str, float]] | None = None
    gpu: bool = False


LONG = "long-double back-substitution"
SUPERLU = "SuperLU refined in long double, residuals in difference form"
KRYLOV = "scipy's bicgstab refined in long double, residuals in difference form"
BAREISS = "exact rationals from the counts (fraction-free elimination)"


def _back(problem: Problem) -> dict[str, Any]:
    return {"h": references.back_substitution(problem)}


def _refined(start: str, problem: Problem) -> dict[str, Any]:
    return {"h": references.refined(problem, start)}


def _rational(problem: Problem) -> dict[str, Any]:
    h, steps = references.rationals(problem)
    return {"h": h, "time": steps}


def solves() -> list[Case]:
    """Single solves: probabilities (and times) of one chain."""
    leaks = [_leak(f"leak-{rate:g}", partial(families.leak, rate)) for rate in (2e-3, 2e-5, 2e-7, 2e-9, 2e-11, 2e-13)]
    leaks += [_leak("leak-2e-15", partial(families.leak, 2e-15), storm=True)]
    leaks += [_leak(f"haddad-{n}", partial(families.haddad, n), storm=True) for n in (20, 100)]
    return [_layered(), *map(_kgram, (1e-2, 1e-4, 1e-6)), _order3(), _giant(5), _giant(6), *leaks, _grid(), _ruin()]


def _layered() -> Case:
    known, known_plain = (f"markovsafety, {KNOWN}{x}" for x in ("", ", uncertified"))
    unknown, unknown_plain = (f"markovsafety, {UNKNOWN}{x}" for x in ("", ", uncertified"))
    triangular = peers.triangular(), peers.triangular(unit=True)
    goals = [
        Goal("speed", known_plain, "klujax", least=40),
        Goal("speed", known, "klujax", least=25),
        *(Goal("speed", known_plain, rival.name, least=20) for rival in triangular),
        *(Goal("speed", known, rival.name, least=13) for rival in triangular),
        Goal("speed", unknown, "klujax", least=3),
        Goal("relative", known, most=1e-15),
        Goal("relative", unknown, most=1e-15),
        Goal("triad", f"{known_plain}: share of the triad bandwidth of this run", least=0.35),
    ]
    contenders = (
        solver(known_plain, certify=False, layered=True),
        solver(known, layered=True),
        solver(unknown_plain, certify=False),
        solver(unknown),
        *triangular,
        peers.klu(),
        peers.storm(),
        peers.spsolve(alone=True),
        peers.pardiso(alone=True),
    )

    def make(quick: bool) -> Problem:
        return families.layered(8, 64, 4) if quick else families.layered(64, 4096, 16)

    def numbers(problem: Problem, rows: dict[str, Any]) -> dict[str, float]:
        bandwidth = triad_bandwidth(1 << 16 if problem.n < 10_000 else 1 << 23)
        moved = 12 * problem.Q.nnz + 4 * problem.n + 16 * problem.n  # the matrix once; h read and written
        took = rows.get(known_plain, {}).get("median")
        share = {"triad": moved / took / bandwidth} if took else {}
        return {"triad_bytes_per_second": bandwidth, "bytes_moved": float(moved), **share}

    title = "Layers: 64 positions x 4096 states x 16 successors"
    return Case("layered", title, make, contenders, _back, LONG, tuple(goals), numbers)


def triad_bandwidth(n: int) -> float:
    """Bytes per second of ``a = b + s c`` (24 bytes per entry counted, as STREAM does), the best of ten."""
    from .triad_kernels import triad

    a, b, c = (np.ones(n) for _ in range(3))
    triad(a, b, c, 3.0)
    best = np.inf
    for _ in range(10):
        begun = time.perf_counter()
        triad(a, b, c, 3.0)
        best = min(best, time.perf_counter() - begun)
    return 24 * n / best


def _kgram(leak: float) -> Case:
    contenders = [solver(EXACT), solver(PLAIN, certify=False), peers.bicgstab()]
    goals = [Goal("extra", EXACT, PLAIN, most=0.5)]
    goals += [Goal("width", EXACT, most=bound) for at, bound in ((1e-4, 1e-12), (1e-6, 2e-11)) if at == leak]
    if leak == 1e-6:
        contenders += [peers.gmres(), peers.spsolve(), peers.pyamg_rs(), peers.pardiso(), peers.lineax_bicgstab()]
        contenders += [peers.deeptime(alone=True), peers.klu(alone=True), peers.storm()]
        goals = [
            Goal("speed", EXACT, "scipy bicgstab(1e-12)", least=1.2),
            Goal("speed", PLAIN, "scipy bicgstab(1e-12)", least=1.8),
            Goal("accuracy", EXACT, "scipy bicgstab(1e-12)", least=1000),
            Goal("speed", EXACT, "scipy spsolve", least=1500),
            *goals,
        ]

    def make(quick: bool) -> Problem:
        return families.kgram(12 if quick else 64, 2, 5 if quick else 12, leak)

    title = f"k-gram: V=64, order 2, 12 successors, leak {leak:g}"
    reference = partial(_refined, "superlu")
    return Case(f"kgram-{leak:g}", title, make, tuple(contenders), reference, SUPERLU, tuple(goals))


def _order3() -> Case:
    contenders = (solver(PLAIN, certify=False), solver(EXACT), peers.bicgstab(), peers.gmres(), peers.storm())
    goals = (Goal("speed", PLAIN, "scipy bicgstab(1e-12)", least=1.5), Goal("relative", PLAIN, most=1e-14))

    def make(quick: bool) -> Problem:
        return families.kgram(6 if quick else 64, 3, 4 if quick else 12, 1e-4)

    title = "k-gram: V=64, order 3 (262,144 states), 12 successors, leak 1e-4"
    return Case("kgram-order3", title, make, contenders, partial(_refined, "bicgstab"), KRYLOV, goals)


def _giant(digits: int) -> Case:
    contenders = [solver(PLAIN, certify=False), solver(EXACT), peers.bicgstab(), peers.gmres()]
    contenders += [peers.storm()] if digits == 5 else []
    least = 1.8 if digits == 5 else 1.3
    goals = (Goal("speed", PLAIN, "scipy bicgstab(1e-12)", least=least), Goal("relative", PLAIN, most=1e-14))

    def make(quick: bool) -> Problem:
        return families.giant(300 * (digits - 4) if quick else 10**digits)

    title = f"One class of 1e{digits} states x 10 random successors, leak 1e-2"
    return Case(f"giant-1e{digits}", title, make, tuple(contenders), partial(_refined, "bicgstab"), KRYLOV, goals)


def _leak(name: str, family: Callable[[], Problem], storm: bool = False) -> Case:
    contenders = [solver(EXACT), expected_steps(STEPS), peers.spsolve(), peers.bicgstab(), peers.gmres(), peers.klu()]
    contenders += [peers.pyamg_rs(), peers.lineax_bicgstab(), peers.deeptime(), peers.pardiso()]
    contenders += [peers.storm(exact=True), peers.storm()] if storm else []
    goals = [Goal("relative", who, most=1e-14) for who in (EXACT, STEPS)]
    goals += [Goal("relative_width", who, most=1e-9) for who in (EXACT, STEPS)]
    goals += [Goal("inside", who, least=1) for who in (EXACT, STEPS)]
    title = f"Refusal almost absorbing: {family().name}"
    return Case(name, title, lambda quick: family(), tuple(contenders), _rational, BAREISS, tuple(goals))


def _grid() -> Case:
    rival = peers.pyamg_rs("cg")
    contenders = (solver(EXACT), solver(PLAIN, certify=False), rival, peers.pardiso(), peers.spsolve(), peers.klu())
    contenders = (*contenders, peers.bicgstab(), peers.gmres(alone=True), peers.storm())
    goals = (Goal("speed", EXACT, rival.name, least=1), Goal("speed", PLAIN, rival.name, least=1))

    def make(quick: bool) -> Problem:
        return families.grid(13 if quick else 300)

    title = "Walk on a grid of 300 x 300"
    return Case("grid", title, make, contenders, partial(_refined, "superlu"), SUPERLU, goals)


def _ruin() -> Case:
    rival = peers.pyamg_rs("cg")
    contenders = (solver(EXACT), solver(PLAIN, certify=False), rival, peers.pardiso(), peers.spsolve(), peers.klu())
    contenders = (*contenders, peers.bicgstab(alone=True), peers.gmres(alone=True), peers.storm())
    goals = (Goal("speed", EXACT, rival.name, least=1), Goal("speed", PLAIN, rival.name, least=1))

    def make(quick: bool) -> Problem:
        return families.ruin(300 if quick else 100_000)

    def reference(problem: Problem) -> dict[str, Any]:
        return {"h": families.ruin_harm(problem.n)}

    title = "Gambler's ruin with 1e5 states"
    return Case("ruin", title, make, contenders, reference, "closed form", goals)
