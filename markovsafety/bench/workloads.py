"""More than one number: gradients by all entries, many chains at once, counting transitions, memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np
import scipy.sparse as sp
import scipy.sparse.linalg as sla
from numpy.typing import NDArray

from ..chains import transitions
from . import families, peers, references
from .cases import EXACT, KNOWN, PLAIN, UNKNOWN, Case
from .families import Batch, Problem
from .goals import Goal
from .measure import Contender, Found
from .ours import BATCH, JUDGED, batch_solver, gradient, jax_gradient, judged, solver

__all__ = ["Corpus", "corpus", "workloads"]


def workloads() -> list[Case]:
    """Everything but single solves."""
    return [
        *_gradients(),
        *_batches(),
        _counting(1),
        _counting(2),
        *_memory(),
    ]


# gradients ------------------------------------------------------------------------------------------------------------

ALL, FACTORS, FORWARD = "markovsafety, all entries", "markovsafety, as factors", "markovsafety, forward only"


def _gradients() -> Iterator[Case]:
    def reference(problem: Problem) -> dict[str, Any]:
        h = references.back_substitution(problem) if problem.widths else references.refined(problem)
        row = np.repeat(np.arange(problem.n), np.diff(problem.Q.indptr))
        visits, after = references.adjoint(problem)[row], h[problem.Q.indices]
        return {"h": h, "gradient": visits * after, "by share": visits * (after - h[row])}

    def make_layered(quick: bool) -> Problem:
        return families.layered(8, 32, 4) if quick else families.layered(64, 256, 16)

    def make_kgram(quick: bool) -> Problem:
        return families.kgram(12 if quick else 64, 2, 5 if quick else 12, 1e-3)

    titles = (
        "Gradient by all 258,048 entries, layered 64 x 256 x 16",
        "Gradient by all entries, k-gram order 2, leak 1e-3",
    )
    source = f"probabilities as in the single solves; visits by {references.adjoint.__name__} in long double"
    for name, title, make, least in zip(("layered", "kgram"), titles, (make_layered, make_kgram), (80, 200)):
        known = name == "layered"
        rivals = [_splu_adjoint("COLAMD"), *([_splu_adjoint("NATURAL")] if known else [])]
        contenders = (
            gradient(ALL, layered=known),
            gradient(FACTORS, layered=known, factored=True),
            jax_gradient(f"{ALL}, JAX function", layered=known),
            solver(FORWARD, certify=False, layered=known),
            *rivals,
        )
        goals = (
            *(Goal("speed", ALL, rival.name, least=least) for rival in rivals),
            Goal("share", FACTORS, FORWARD, most=2.5),
            Goal("relative", ALL, most=1e-12),
        )
        yield Case(f"gradient-{name}", title, make, contenders, reference, source, goals)


def _splu_adjoint(order: str) -> Contender:
    """scipy: one factorisation, a solve, a transposed solve, and the products on the pattern."""

    def prepare(problem: Problem) -> Any:
        A, b = peers.system(problem)
        unit = np.zeros(problem.n)
        unit[0] = 1.0
        row = np.repeat(np.arange(problem.n), np.diff(problem.Q.indptr))
        return sp.csc_array(A), b, unit, row, problem.Q.indices

    def solve(ready: Any) -> NDArray:
        A, b, unit, row, column = ready
        factors = sla.splu(A, permc_spec=order)
        h, visits = factors.solve(b), factors.solve(unit, "T")
        return visits[row] * h[column]

    return Contender(f"scipy splu {order}, forward and adjoint", prepare, solve, _plain, "scipy", of="gradient")


def _plain(raw: Any, problem: Any) -> Found:
    return Found(np.asarray(raw))


# many chains of one pattern -------------------------------------------------------------------------------------------


def _batches() -> Iterator[Case]:
    def reference(batch: Batch) -> dict[str, Any]:
        some = [batch.sample(b) for b in range(JUDGED)]
        one = references.back_substitution if batch.problem.widths else references.refined
        return {"h": np.stack([one(each) for each in some])}

    def make_layered(quick: bool) -> Batch:
        problem = families.layered(8, 32, 4) if quick else families.layered(64, 256, 16)
        return families.posterior(problem, 8 if quick else 256)

    def make_kgram(quick: bool) -> Batch:
        problem = families.kgram(12 if quick else 64, 2, 5 if quick else 12, 1e-3)
        return families.posterior(problem, 8 if quick else 256)

    rivals = (_klu_batched(), _triangular_loop()), (_bicgstab_loop(1e-12), _bicgstab_loop(1e-10))
    titles = "256 posterior samples, layered 64 x 256 x 16", "256 posterior samples, k-gram order 2, leak 1e-3"
    sources = "long-double back-substitution", "SuperLU refined in long double"
    for name, title, make, rival, least, source in zip(
        ("layered", "kgram"), titles, (make_layered, make_kgram), rivals, (20, 3.5), sources
    ):
        contenders = (batch_solver(BATCH), batch_solver(f"{BATCH}, JAX on the CPU", "cpu"), *rival)
        goals = (Goal("speed", BATCH, rival[0].name, least=least), Goal("relative", BATCH, most=1e-12))
        yield Case(
            f"batch-{name}", title, make, contenders, reference, f"{source}, of the first {JUDGED} samples", goals
        )


def _klu_batched() -> Contender:
    """klujax with the samples as its batch axis, values laid out as it wants them."""

    def prepare(batch: Batch) -> Any:
        klujax: Any = import_module("klujax")
        jax: Any = import_module("jax")
        n, B = batch.harm.shape
        coo = batch.problem.Q.tocoo()
        row, column = (np.concatenate([x, np.arange(n)]).astype(np.int32) for x in coo.coords)
        values = np.concatenate([-batch.data.T, np.ones((B, n))], axis=1)
        with jax.enable_x64(True):
            arguments = [jax.numpy.asarray(x) for x in (row, column, values, batch.harm.T[:, :, None])]
        return jax.jit(klujax.solve), arguments

    def solve(ready: Any) -> Any:
        jax: Any = import_module("jax")
        run, arguments = ready
        with jax.enable_x64(True):
            return run(*arguments).block_until_ready()

    def read(raw: Any, batch: Batch) -> Found:
        return judged(np.asarray(raw)[:, :, 0], batch)

    return Contender("klujax, batched", prepare, solve, read, "klujax")


def _systems(batch: Batch) -> list[Any]:
    return [peers.system(batch.sample(b)) for b in range(batch.harm.shape[1])]


def _triangular_loop() -> Contender:
    def solve(ready: Any) -> Any:
        return [sla.spsolve_triangular(A, b, lower=False, unit_diagonal=True) for A, b in ready]

    return Contender("scipy spsolve_triangular, loop", _systems, solve, judged, "scipy")


def _bicgstab_loop(rtol: float) -> Contender:
    def solve(ready: Any) -> Any:
        return [sla.bicgstab(A, b, rtol=rtol, maxiter=5000)[0] for A, b in ready]

    return Contender(f"scipy bicgstab({rtol:g}), loop", _systems, solve, judged, "scipy")


# counting -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Corpus:
    """One long answer: ``tokens`` (total,) in [0, vocabulary), and the order to count."""

    tokens: NDArray[np.int32]
    vocabulary: int
    order: int


def corpus(total: int, vocabulary: int, order: int, seed: int = 0) -> Corpus:
    """Tokens with Zipf's frequencies (s = 1), identities shuffled."""
    rng = np.random.default_rng(seed)
    share = np.cumsum(1.0 / np.arange(1, vocabulary + 1))
    table = np.searchsorted(share / share[-1], (np.arange(1 << 16) + 0.5) / (1 << 16)).astype(np.int32)
    table = rng.permutation(vocabulary).astype(np.int32)[table]
    tokens = np.empty(total, np.int32)
    for lo in range(0, total, 1 << 22):
        part = tokens[lo : lo + (1 << 22)]
        np.take(table, rng.integers(1 << 16, size=len(part), dtype=np.uint16), out=part)
    return Corpus(tokens, vocabulary, order)


def _hashes(cells: NDArray[np.int64]) -> Iterator[NDArray[np.int64]]:
    """Two numbers below 2^20 for every cell; sums over 1e8 tokens are exact in float64."""
    for odd in (0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F):
        yield ((cells.astype(np.uint64) * np.uint64(odd)) >> np.uint64(44)).astype(np.int64)


def _fingerprint(cells: NDArray[np.int64], counts: NDArray | int = 1) -> NDArray[np.float64]:
    total = int(np.sum(counts)) if np.ndim(counts) else len(cells)
    return np.array([total, *(int((x * counts).sum()) for x in _hashes(cells))], dtype=np.float64)


def _cells(tokens: NDArray, vocabulary: int, order: int) -> NDArray[np.int64]:
    last = len(tokens) - order
    cells = np.zeros(last, np.int64)
    for shift in range(order + 1):
        cells = cells * vocabulary + tokens[shift : shift + last]
    return cells


def _pieces(text: Corpus, size: int) -> Iterator[NDArray[np.int64]]:
    for lo in range(0, len(text.tokens) - text.order, size):
        yield _cells(text.tokens[lo : lo + size + text.order], text.vocabulary, text.order)


def _counting(order: int) -> Case:
    def make(quick: bool) -> Corpus:
        return corpus(50_000 if quick else 100_000_000, 32 if quick else 1024, order)

    def reference(text: Corpus) -> dict[str, Any]:
        return {"h": sum((_fingerprint(cells) for cells in _pieces(text, 1 << 22)), np.zeros(3))}

    ours = Contender(EXACT, lambda text: text, _count, _counted, ours=True, memory=_result)
    whole, pieces = _coo(0), _coo(10_000_000)
    contenders = (ours, whole, pieces, *([_bincount()] if order == 1 else []))
    least = {1: 8, 2: 2}[order]
    goals = [Goal("speed", EXACT, rival.name, least=least) for rival in (whole, pieces)]
    goals += [Goal("error", EXACT, most=0.5)]
    goals += [Goal("memory", EXACT, most=0.3e9)] if order == 2 else []
    title = f"Counting 1e8 tokens, order {order} ({1024**order:,} states)"
    return Case(
        f"count-{order}", title, make, contenders, reference, "number and two hashes of all transitions", tuple(goals)
    )


def _count(text: Corpus) -> Any:
    return transitions.count_transitions(text.tokens, order=text.order, vocabulary=text.vocabulary)


def _counted(raw: Any, text: Corpus) -> Found:
    states, matrix = raw
    code = np.zeros(len(states), np.int64)
    for column in states.T:
        code = code * text.vocabulary + column
    full = np.repeat((states >= 0).all(axis=1), np.diff(matrix.indptr))
    cells = np.repeat(code, np.diff(matrix.indptr)) * text.vocabulary + matrix.indices
    return Found(_fingerprint(cells[full], matrix.data[full].astype(np.int64)))


def _result(problem: Any, raw: Any) -> tuple[int, int]:
    """Bytes of the counts themselves."""
    parts = raw if isinstance(raw, tuple) else (raw.states, raw.matrix) if hasattr(raw, "matrix") else (raw,)
    arrays = [a for p in parts for a in ((p.data, p.indices, p.indptr) if sp.issparse(p) else (np.asarray(p),))]
    return sum(a.nbytes for a in arrays), 0


def _coo(size: int) -> Contender:
    """scipy: contexts and next tokens as a COO matrix, converted to CSR; whole, or in pieces that are added."""

    def solve(text: Corpus) -> Any:
        tokens, V, order = text.tokens, text.vocabulary, text.order
        total, last = None, len(tokens) - order
        for lo in range(0, last, size or last):
            hi = min(lo + (size or last), last)
            row = tokens[lo:hi]
            for shift in range(1, order):
                row = row * np.int32(V) + tokens[lo + shift : hi + shift]
            where = row, tokens[lo + order : hi + order]
            part = sp.coo_array((np.ones(hi - lo, np.int32), where), shape=(V**order, V)).tocsr()
            total = part if total is None else total + part
        return total

    name = "scipy coo->csr" + (f", pieces of {size:.0e}" if size else "")
    return Contender(name, lambda text: text, solve, _csr_counted, "scipy", memory=_result)


def _csr_counted(raw: Any, text: Corpus) -> Found:
    cells = np.repeat(np.arange(raw.shape[0]), np.diff(raw.indptr)) * text.vocabulary + raw.indices
    return Found(_fingerprint(cells, raw.data.astype(np.int64)))


def _bincount() -> Contender:
    """numpy: bincount of context times vocabulary plus token."""

    def solve(text: Corpus) -> Any:
        t, V = text.tokens, text.vocabulary
        return np.bincount(t[:-1] * np.int32(V) + t[1:], minlength=V * V).reshape(V, V)

    def read(raw: Any, text: Corpus) -> Found:
        return Found(_fingerprint(np.arange(raw.size), raw.ravel().astype(np.int64)))

    return Contender("numpy bincount", lambda text: text, solve, read, "numpy", memory=_result)


# memory ---------------------------------------------------------------------------------------------------------------


def _memory() -> Iterator[Case]:
    def copy(problem: Problem, raw: Any) -> tuple[int, int]:
        Q = problem.Q
        return 0, Q.data.nbytes + Q.indices.nbytes + Q.indptr.nbytes

    def make_layered(quick: bool) -> Problem:
        return families.layered(8, 64, 4) if quick else families.layered(64, 9766, 16)

    def make_kgram(quick: bool) -> Problem:
        return families.kgram(6 if quick else 94, 3, 4 if quick else 12, 1e-3)

    known, unknown = (f"markovsafety, {x}" for x in (KNOWN, UNKNOWN))
    layered = (
        solver(known, layered=True, memory=copy),
        solver(unknown, memory=copy),
        _measured(peers.triangular(), copy),
    )
    kgram = solver(EXACT, memory=copy), solver(PLAIN, certify=False, memory=copy), _measured(peers.bicgstab(), copy)
    source = "long-double back-substitution", "scipy's bicgstab refined in long double, residuals in difference form"

    def back(problem: Problem) -> dict[str, Any]:
        return {"h": references.back_substitution(problem)}

    def refined(problem: Problem) -> dict[str, Any]:
        return {"h": references.refined(problem, "bicgstab")}

    goals = tuple(Goal("copies", who, most=4) for who in (known, unknown))
    title = "Memory: layered, 1e7 non-zeros, certified (on top of the matrix itself)"
    yield Case("memory-layered", title, make_layered, layered, back, source[0], goals)
    goals = (Goal("copies", EXACT, most=4),)
    title = "Memory: k-gram order 3, 1e7 non-zeros, leak 1e-3 (on top of the matrix itself)"
    yield Case("memory-kgram", title, make_kgram, kgram, refined, source[1], goals)


def _measured(peer: Contender, memory: Any) -> Contender:
    return Contender(peer.name, peer.prepare, peer.solve, peer.read, peer.needs, peer.alone, memory=memory)
