"""Many chains with one pattern: posterior samples, sweeps of a parameter.

The pattern is packed once. On the host (the default) compiled kernels read the values as they lie, several samples side
by side; on a JAX device the samples are the innermost axis, so that every gather is a run of consecutive numbers, and
they can be spread over several devices. Every sample carries a bound of its error; one whose bound is not good enough
is solved again for itself, with a certificate, and if that fails, the whole call fails with what it has."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from numpy.typing import ArrayLike, NDArray

from ..chains import Chain
from ..errors import InputError, MarkovsafetyError, UntrustedError
from . import batch_kernels as compiled
from . import program_kernels as compiled_program
from .certify import gamma
from .core import Walk, walk, without_start
from .device_arguments import blocks_of, check_numbers, devices_of, states_of
from .device_batch_alone import alone
from .device_batch_solve import KRYLOV_BLOCK, cyclic_samples, substituted_samples
from .device_function import DENSE, nominal
from .device_pack import Pattern, pattern
from .elimination_program import Program, program

__all__ = ["Batch", "Solved", "batch"]

planned: Any = compiled_program
kernels: Any = compiled  # what numba makes of a signature is beyond a type checker
ROWS = 1e-9  # how far a layered row may be from 1, as for `Chain`
FAINT, LOUD = 2.0**-900, 2.0**64  # sums of rows between which underflow takes less than UNDERFLOW from an answer
UNDERFLOW = 2.0**-100
BRANCHES = 6  # entries per state up to which a plan of a large class is tried
MEMORY = 2e9  # bytes of values that a device works on at once

Values = ArrayLike | Iterable[ArrayLike] | Callable[[], Iterable[ArrayLike]]


@dataclass(frozen=True)
class Solved:
    """Hitting probabilities of a batch.

    Attributes
    ----------
    value : array, shape (B, n) or (B, L + 1, n); with `states` or `at_start` (B, ...)
    error : array, shape (B,)
        Bound of every entry's distance from the exact answer for these values.
    again : int array
        Samples that were solved again for themselves.
    """

    value: NDArray[np.float64]
    error: NDArray[np.float64]
    again: NDArray[np.intp]


@dataclass(frozen=True)
class Batch:
    """A hitting problem whose numbers are still open; made by `batch`.

    Attributes
    ----------
    walk : Walk
        The chain that gave the pattern, and what is hit.
    pattern : Pattern
    about : (law, lift) or None
        Of the chain itself, for cyclic patterns.
    """

    walk: Walk
    pattern: Pattern
    about: tuple[NDArray, NDArray] | None

    def solve(
        self,
        values: Values,
        *,
        states: ArrayLike | None = None,
        at_start: bool = False,
        tol: float = 1e-9,
        device: Any = None,
        dtype: Any = np.float64,
        innermost: bool = False,
    ) -> Solved:
        """Hitting probabilities for every row of values.

        Parameters
        ----------
        values : array, shape (B, nnz), or iterable of such blocks, or function that returns one
            Stored entries in the order of ``chain.P.data`` (layered: all layers, concatenated). Homogeneous: the
            diagonal is implied and rows may be on any scale; layered: rows sum to 1 within 1e-9.
        states : index, label, int or bool array, optional
            Return these states only, in this order.
        at_start : bool
            Return the mean over the start law only.
        tol : float
            Samples whose bound is larger are solved again.
        device : None, jax.Device, sequence of jax.Device, or str
            None: compiled kernels on one core of the host. A device, several (samples are spread over them), or a
            name: "gpu" is all GPUs, "gpu:0,2" two of them.
        dtype : float64 or float32
            Precision on a JAX device; float32 makes sense for acyclic patterns and tol above 1e-5.
        innermost : bool
            Blocks have shape (nnz, B) instead, and may be JAX arrays that lie on the device already.

        Returns
        -------
        Solved

        Raises
        ------
        InputError
            If values have another length than the pattern, or are no probabilities (the message names the sample), or
            another argument is not what it should be.
        UntrustedError
            If a sample could not be solved with a certificate; `partial` is the Solved with NaN there.
        """
        check_numbers(tol, dtype)
        pick = self._pick(states, at_start)
        parts, place = [], 0
        for block in blocks_of(values):
            size = np.shape(block)
            if len(size) != 2 or size[0 if innermost else 1] != self.pattern.nnz:
                raise InputError(
                    f"Values of shape {size} were given for a pattern of {self.pattern.nnz} entries.",
                    cause="A batch has one row of stored entries per sample"
                    + (", as columns (innermost=True)." if innermost else "."),
                    next="Give one number for every entry of chain.P.data, diagonal included.",
                )
            if device is None or not self.pattern.steps:
                host = np.ascontiguousarray(np.asarray(block, dtype=np.float64).T if innermost else block, np.float64)
                value, error = self._on_host(host, pick, tol)
            else:
                value, error = self._on_device(block, pick, device, dtype, innermost)
            parts.append(self._repaired(block, value, error, pick, tol, innermost, place))
            place += len(error)
        if not parts:
            return Solved(np.zeros((0, *pick.shape)), np.zeros(0), np.zeros(0, dtype=np.intp))
        solved = Solved(*(np.concatenate([getattr(x, name) for x in parts]) for name in ("value", "error", "again")))
        if np.isnan(solved.error).any():
            raise _untrusted(solved)
        return solved

    def _pick(self, states: Any, at_start: bool) -> _Pick:
        chain = self.walk.chain
        if at_start and chain.start is None:
            raise without_start("A probability at the start")
        index = np.arange(chain.n_states)
        if at_start:
            index = np.flatnonzero(chain.start)
        elif states is not None:
            index = states_of(chain, states)
        nodes = index if at_start or not chain.is_layered else np.arange(len(self.pattern.slot)).reshape(
            self.pattern.shape)[:, index]  # fmt: skip
        weights = np.asarray(chain.start)[index] if at_start else None
        return _Pick(nodes, weights)

    def _on_host(self, values: NDArray, pick: _Pick, tol: float) -> tuple[NDArray, NDArray]:
        """At most some hundred samples at a time, so that answers that are not asked for take no memory."""
        out, errors = [], []
        for b in range(0, len(values), 256):
            x, error = (self._classes if self.pattern.cyclic else self._levels)(values[b : b + 256], tol)
            out.append(pick(x))
            errors.append(error)
        return (np.concatenate(out), np.concatenate(errors)) if out else (np.zeros((0, *pick.shape)), np.zeros(0))

    def _levels(self, values: NDArray, tol: float) -> tuple[NDArray, NDArray]:
        p, rows = self.pattern, self._rows
        X, sums = np.empty((len(values), len(p.slot))), np.empty((len(values), 3))
        kernels.substitute(values, *rows, p.implied, self._known, X, sums)
        return X, self._counted(X, sums, 2.0**-53)

    def _counted(self, X: NDArray, sums: NDArray, unit: float) -> NDArray:
        """The a-priori bound where values are what they should be, else NaN."""
        p = self.pattern
        if not p.level:
            return np.zeros(len(sums))  # nothing was read: the graph decides
        fine = (sums[:, 0] >= 0) & np.isfinite(X).all(axis=1) & np.isfinite(sums).all(axis=1)
        if p.implied:
            fine &= sums[:, 1] > FAINT
        else:
            room = max(ROWS, 64 * unit)
            fine &= (sums[:, 1] >= 1 - room) & (sums[:, 2] <= 1 + room)
        bound = float(gamma(p.roundings.max(initial=0) * (unit / 2.0**-53))) + UNDERFLOW
        return np.where(fine, bound, np.nan)

    def _classes(self, values: NDArray, tol: float) -> tuple[NDArray, NDArray]:
        p, parts = self.pattern, self._parts
        assert self.about is not None
        X = np.zeros((len(values), len(p.slot)))
        X[:] = self._known
        x, error = np.empty((len(values), len(parts[0]) - 1)), np.zeros(len(values))
        plan = self._program
        if plan is not None or x.shape[1] <= DENSE:
            least = np.empty(len(values))
            if plan is None:
                kernels.eliminate(values, *parts, x, least)
            else:
                ways = *plan.ways_out, *plan.ways_in
                planned.run(values, *parts[:2], *parts[3:], plan.order, *ways, plan.into, plan.slots, x, least)
            # Subtraction-free: O(m^3) roundings in relative terms, of which a few per state are ever seen. Every
            # underflow takes 2^-1074 times an entry from a row, which a pivot that is not too small forgets.
            fine = np.isfinite(x).all(axis=1) & (values >= 0).all(axis=1)
            fine &= (least > FAINT) & (values.max(axis=1) < LOUD)
            error[:] = np.where(fine, self._eliminated_bound + UNDERFLOW, np.nan)
            x = np.minimum(x, 1.0)
        else:
            law, lift = (y[: x.shape[1]] for y in self.about)
            kernels.krylov(values, *parts, law, lift, tol, x, error)
        X[:, p.slot < p.size] = x
        return X, error

    @cached_property
    def _eliminated_bound(self) -> float:
        from .elimination import roundings

        outer = self._parts[3]
        m, terms = len(outer) - 1, int(np.diff(outer).max(initial=0))
        own = roundings(m) if self._program is None else self._program.roundings
        return float(gamma(own + 2 * m * terms))  # every exit is itself a sum

    @cached_property
    def _program(self) -> Program | None:
        """The planned elimination of a sparse class, if it is worth it."""
        ptr, _, col = self._parts[:3]
        m = len(ptr) - 1
        if m <= DENSE:
            return program(ptr, col, m**3 // 12)  # a dense elimination takes m^3 / 3
        return program(ptr, col) if len(col) <= BRANCHES * m else None  # others fill up, which takes time to find out

    @cached_property
    def _known(self) -> NDArray[np.float64]:
        return (self.pattern.slot == self.pattern.size + 1).astype(np.float64)

    @cached_property
    def _indptr(self) -> NDArray[np.intp]:
        return np.concatenate([[0], np.cumsum(np.concatenate([np.diff(P.indptr) for P in self.walk.chain.layers]))])

    @cached_property
    def _rows(self) -> Any:
        """Rows in order of substitution, where their entries are, and the node each entry leads to."""
        chain, p, ptr = self.walk.chain, self.pattern, self._indptr
        n = chain.n_states
        col = np.concatenate([P.indices + (t + 1) * n * chain.is_layered for t, P in enumerate(chain.layers)])
        rows = np.concatenate([*p.level, np.zeros(0, dtype=np.intp)]).astype(np.intp)
        first, last = ptr[rows], ptr[rows + 1]
        middle = last.copy()
        if p.implied:
            diagonal = np.full(n, -1)
            at = np.flatnonzero(col == np.repeat(np.arange(n), np.diff(ptr)))
            diagonal[col[at]] = at
            middle = np.where(diagonal[rows] >= 0, diagonal[rows], last)
        small = np.uint16 if len(p.slot) <= 2**16 else np.int32 if len(p.slot) < 2**31 else np.int64
        return rows, first, middle, last, col.astype(small)

    @cached_property
    def _parts(self) -> Any:
        """A cyclic pattern as two CSR patterns: between unknown states, and to known ones."""
        p = self.pattern
        m = int((p.slot < p.size).sum())
        read = np.flatnonzero(p.row < p.size)
        inner = read[p.col[read] < p.size]
        outer = read[p.col[read] >= p.size]
        ptr = lambda at: np.concatenate([[0], np.cumsum(np.bincount(p.row[at], minlength=m))])  # noqa: E731
        hit = (p.col[outer] == p.size + 1).astype(np.float64)
        return ptr(inner), inner, p.col[inner].astype(np.int32), ptr(outer), outer, hit

    def _on_device(self, block: Any, pick: _Pick, device: Any, dtype: Any, innermost: bool) -> tuple[NDArray, NDArray]:
        p = self.pattern
        devices = devices_of(device)
        lanes = len(devices) * (KRYLOV_BLOCK[devices[0].platform == "cpu"] if p.cyclic else 1)
        total = np.shape(block)[1 if innermost else 0]
        fit = max(int(MEMORY // (p.nnz * np.dtype(dtype).itemsize)) // lanes * lanes, lanes)
        out, errors = [], []
        with jax.enable_x64(True):
            spread = NamedSharding(Mesh(np.array(devices), ("sample",)), PartitionSpec(None, "sample"))
            about = () if self.about is None else tuple(jnp.asarray(x, dtype) for x in self.about)
            slots = p.slot[pick.nodes].ravel()
            for b in range(0, total, fit):
                part = block[:, b : b + fit] if innermost else block[b : b + fit]
                part = part if innermost else np.asarray(part).T
                size = part.shape[1]
                short = -size % lanes
                if short:
                    part = np.concatenate([part, np.repeat(np.asarray(part[:, -1:]), short, axis=1)], axis=1)
                data = jax.device_put(jnp.asarray(part, dtype), spread)
                if p.cyclic:
                    x, error = cyclic_samples(p, data, *about, slots=slots, block=lanes // len(devices))
                    error = np.asarray(error, dtype=np.float64)
                else:
                    x, sums = substituted_samples(p, data, slots)
                    error = np.asarray(sums, dtype=np.float64)
                x = np.asarray(x, dtype=np.float64).T
                error = error if p.cyclic else self._counted(x, error.T, float(jnp.finfo(dtype).eps) / 2)
                out.append(pick.mean(x)[:size])
                errors.append(error[:size])
        return np.concatenate(out), np.concatenate(errors)

    def _repaired(
        self, block: Any, value: NDArray, error: NDArray, pick: _Pick, tol: float, innermost: bool, place: int
    ) -> Solved:
        bad = np.flatnonzero(~(error <= tol))
        for b in bad:
            row = np.asarray(block[:, b] if innermost else block[b], dtype=np.float64)
            try:
                X = alone(self.walk, row)
            except MarkovsafetyError as problem:
                if isinstance(problem, InputError):
                    raise InputError(
                        f"Sample {place + b}: {problem.fact}", cause=problem.cause, next=problem.next
                    ) from None
                X = None
            value[b] = np.nan if X is None else pick(X[None, :, 0])[0]
            error[b] = np.nan if X is None else float(np.max(X[:, 2] - X[:, 1], initial=0.0))
        return Solved(value, error, bad + place)


@dataclass(frozen=True)
class _Pick:
    """Which nodes are asked for, and the weights of their mean."""

    nodes: NDArray[np.intp]
    weights: NDArray[np.float64] | None

    @property
    def shape(self) -> tuple[int, ...]:
        return () if self.weights is not None else self.nodes.shape

    def __call__(self, X: NDArray) -> NDArray:
        """From all nodes, shape (B, N)."""
        if np.array_equal(self.nodes.ravel(), np.arange(X.shape[1])):
            return self.mean(X)  # all of them, in order: no copy
        return self.mean(X[:, self.nodes.ravel()])

    def mean(self, x: NDArray) -> NDArray:
        """From these nodes, shape (B, size)."""
        if self.weights is None:
            return x.reshape(len(x), *self.nodes.shape)
        return np.minimum((x * self.weights).sum(axis=1), 1.0)


def batch(chain: Chain, target: Any) -> Batch:
    """Pack the pattern of a chain once, to solve for many sets of its numbers.

    Parameters
    ----------
    chain : Chain
        Gives pattern, outcomes and start; its own numbers should be typical of those to come (their mean, say): cyclic
        patterns are deflated and proven with what is known of this chain.
    target : as in `hitting_probability`

    Returns
    -------
    Batch

    Examples
    --------
    >>> posterior = batch(chain, "harm")                      # doctest: +SKIP
    >>> posterior.solve(draws, at_start=True).value           # doctest: +SKIP
    """
    w = walk(chain, target)
    p = pattern(w)
    return Batch(w, p, nominal(w, p))


def _untrusted(solved: Solved) -> UntrustedError:
    lost = np.flatnonzero(np.isnan(solved.error))
    return UntrustedError(
        f"{len(lost)} of {len(solved.error)} samples could not be solved with a certificate, the first is {lost[0]}.",
        cause="Neither the batch nor a solve of the sample for itself could be proven.",
        next='Solve these samples with method="exact", or believe only the others in `error.partial`.',
        partial=solved,
    )
