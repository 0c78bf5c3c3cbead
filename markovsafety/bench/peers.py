"""The peers, each with the settings its documentation recommends and the matrix in the form it wants.

Every function returns a `Contender` for the hitting probability of a `families.Problem`. Assembling ``I - Q`` is
set-up; ordering, factoring, preconditioning and solving are the solve. None is required: one that is not installed is
listed so.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import numpy as np
import scipy.sparse as sp
import scipy.sparse.linalg as sla

from .families import Problem
from .measure import Contender, Found

__all__ = [
    "bicgstab",
    "deeptime",
    "gmres",
    "klu",
    "lineax_bicgstab",
    "pardiso",
    "pyamg_rs",
    "spsolve",
    "storm",
    "triangular",
]


def system(problem: Problem) -> tuple[sp.csr_array, Any]:
    """``I - Q`` and the right-hand side."""
    p = problem.probabilities()
    return sp.csr_array(sp.eye_array(p.n, format="csr") - p.Q), p.harm


def _found(raw: Any, problem: Any) -> Found:
    value, note = raw if isinstance(raw, tuple) else (raw, "")
    return Found(np.asarray(value), note=note)


def spsolve(*, alone: bool = False) -> Contender:
    """scipy.sparse.linalg.spsolve: SuperLU with COLAMD."""

    def prepare(problem: Problem) -> Any:
        A, b = system(problem)
        return sp.csc_array(A), b

    return Contender("scipy spsolve", prepare, lambda ready: sla.spsolve(*ready), _found, "scipy", alone)


def triangular(unit: bool = False) -> Contender:
    """scipy.sparse.linalg.spsolve_triangular, for states numbered by layers; told of the unit diagonal or not."""

    def solve(ready: Any) -> Any:
        return sla.spsolve_triangular(*ready, lower=False, unit_diagonal=unit)

    name = "scipy spsolve_triangular" + (", unit diagonal" if unit else "")
    return Contender(name, system, solve, _found, "scipy")


def bicgstab(rtol: float = 1e-12, *, alone: bool = False) -> Contender:
    """scipy.sparse.linalg.bicgstab; `info` is told where it is not 0."""

    def solve(ready: Any) -> Any:
        x, info = sla.bicgstab(*ready, rtol=rtol, maxiter=20_000)
        return x, f"info={info}"

    return Contender(f"scipy bicgstab({rtol:g})", system, solve, _found, "scipy", alone)


def gmres(*, alone: bool = False) -> Contender:
    """scipy.sparse.linalg.gmres as it comes: rtol 1e-5, restart 20."""

    def solve(ready: Any) -> Any:
        x, info = sla.gmres(*ready)
        return x, f"info={info}"

    return Contender("scipy gmres (defaults)", system, solve, _found, "scipy", alone)


def klu(*, alone: bool = False) -> Contender:
    """klujax: SuiteSparse's KLU (block triangular form, AMD) behind a JAX primitive."""

    def prepare(problem: Problem) -> Any:
        import jax
        import jax.numpy as jnp

        klujax: Any = import_module("klujax")

        A, b = system(problem)
        coo = A.tocoo()
        with jax.enable_x64(True):
            row, column = (jnp.asarray(x.astype(np.int32)) for x in coo.coords)
            return jax.jit(klujax.solve), (row, column, jnp.asarray(coo.data), jnp.asarray(b))

    def solve(ready: Any) -> Any:
        import jax

        run, arguments = ready
        with jax.enable_x64(True):
            return run(*arguments).block_until_ready()

    return Contender("klujax", prepare, solve, _found, "klujax", alone)


def pardiso(*, alone: bool = False) -> Contender:
    """pypardiso: MKL PARDISO with nested dissection; a new solver each time, for it remembers factors."""

    def prepare(problem: Problem) -> Any:
        pypardiso: Any = import_module("pypardiso")

        A, b = system(problem)
        return sp.csr_matrix(A), b, pypardiso.PyPardisoSolver()

    def solve(ready: Any) -> Any:
        pypardiso: Any = import_module("pypardiso")

        A, b, solver = ready
        return pypardiso.spsolve(A, b, solver=solver), solver

    def free(raw: Any) -> None:
        raw[1].free_memory(everything=True)

    def read(raw: Any, problem: Any) -> Found:
        return Found(np.asarray(raw[0]))

    return Contender("pypardiso", prepare, solve, read, "pypardiso", alone, free=free)


def pyamg_rs(accel: str = "bicgstab", *, alone: bool = False) -> Contender:
    """pyamg.ruge_stuben_solver with Krylov acceleration, to 1e-12; building the hierarchy is part of solving."""

    def prepare(problem: Problem) -> Any:
        A, b = system(problem)
        return sp.csr_matrix(A), b

    def solve(ready: Any) -> Any:
        pyamg: Any = import_module("pyamg")

        A, b = ready
        told: list[float] = []
        x = pyamg.ruge_stuben_solver(A).solve(b, tol=1e-12, accel=accel, maxiter=200, residuals=told)
        return x, f"{len(told) - 1} iterations"

    return Contender(f"pyamg ruge_stuben + {accel}", prepare, solve, _found, "pyamg", alone)


def lineax_bicgstab(*, alone: bool = False) -> Contender:
    """lineax.BiCGStab (1e-12) on JAX's BCSR product, compiled; it has no sparse operator of its own."""

    def prepare(problem: Problem) -> Any:
        import jax

        lineax: Any = import_module("lineax")
        from jax.experimental import sparse

        A, b = system(problem)
        with jax.enable_x64(True):
            M = sparse.BCSR.from_scipy_sparse(sp.csr_matrix(A))
            return _lineax(lineax), M, jax.numpy.asarray(b)

    def solve(ready: Any) -> Any:
        import jax

        run, M, b = ready
        with jax.enable_x64(True):
            x, okay = run(M, b)
            return x.block_until_ready(), "" if bool(okay) else "says it failed"

    return Contender("lineax BiCGStab", prepare, solve, _found, "lineax", alone)


_COMPILED: dict[str, Any] = {}


def _lineax(lineax: Any) -> Any:
    """The compiled solver, made once: a user keeps it as well."""
    import jax

    if "lineax" not in _COMPILED:

        @jax.jit
        def run(M: Any, b: Any) -> Any:
            operator = lineax.FunctionLinearOperator(lambda x: M @ x, jax.ShapeDtypeStruct(b.shape, b.dtype))
            solution = lineax.linear_solve(
                operator, b, lineax.BiCGStab(rtol=1e-12, atol=1e-15, max_steps=20_000), throw=False
            )
            return solution.value, solution.result == lineax.RESULTS.successful

        _COMPILED["lineax"] = run
    return _COMPILED["lineax"]


def deeptime(*, alone: bool = False) -> Contender:
    """deeptime.markov.tools.analysis.committor between the two outcomes."""

    def prepare(problem: Problem) -> Any:
        P = problem.probabilities().matrix().tolil()
        P[problem.n, problem.n] = P[problem.n + 1, problem.n + 1] = 1.0
        return sp.csr_matrix(P), problem.n

    def solve(ready: Any) -> Any:
        committor = import_module("deeptime.markov.tools.analysis").committor

        P, n = ready
        return np.asarray(committor(P, [n + 1], [n]))[:n]

    return Contender("deeptime committor", prepare, solve, _found, "deeptime", alone)


def storm(exact: bool = False, *, alone: bool = True) -> Contender:
    """stormpy: its default, sound value iteration with bounds; or rational arithmetic from the counts."""

    def prepare(problem: Problem) -> Any:
        stormpy: Any = import_module("stormpy")

        made = problem if exact else problem.probabilities()
        return _storm_model(made, stormpy.Rational if exact else float), problem.n

    def solve(ready: Any) -> Any:
        stormpy: Any = import_module("stormpy")

        model, n = ready
        question = stormpy.parse_properties('P=? [F "harm"]')[0]
        return stormpy.model_checking(model, question), n

    def read(raw: Any, problem: Problem) -> Found:
        result, n = raw
        value = np.array([float(result.get_value(i)) for i in range(n)])
        if exact or not (result.has_lower_bounds and result.has_upper_bounds):
            return Found(value)
        lower, upper = (
            np.array([float(at(i)) for i in range(n)]) for at in (result.get_lower_bound, result.get_upper_bound)
        )
        return Found(value, lower, upper)

    return Contender("stormpy exact" if exact else "stormpy sound", prepare, solve, read, "stormpy", alone)


def _storm_model(problem: Problem, kind: Any) -> Any:
    stormpy: Any = import_module("stormpy")
    P, n = problem.matrix(), problem.n
    rows = [*np.repeat(np.arange(n + 2), np.diff(P.indptr)).tolist(), n, n + 1]
    columns = [*P.indices.tolist(), n, n + 1]
    values = [*P.data.tolist(), 1.0, 1.0]
    builder = stormpy.datastructures.SparseMatrixBuilder[kind](rows=n + 2, columns=n + 2, entries=len(rows))
    if kind is float:
        builder.add_next_values(rows, columns, values, [])
    else:
        total = np.asarray(P.sum(axis=1)).ravel().tolist()
        for i, j, value in zip(rows, columns, values):
            builder.add_next_value(i, j, kind(f"{int(value)}/{max(int(total[i]), 1)}"))
    labels = stormpy.models.StateLabeling(n + 2)
    for name, state in (("init", 0), ("harm", n)):
        labels.add_label(name)
        labels.add_label_to_state(name, state)
    parts = stormpy.models.SparseModelComponents[kind](builder.build(), labels)
    return stormpy.models.SparseDtmc[kind](parts)
