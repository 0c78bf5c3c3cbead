"""JAX: one hitting probability, batches of chains with one pattern, differentiable functions, on CPU or GPU.

`probability` stands behind ``hitting_probability(..., method="device")``; `batch` and `function` are doors of their
own. Programs are compiled once per shape, and shapes are rounded up to a coarse grid, so that chains of similar size
share them. float64 is switched on locally; nothing global changes.

Acyclic chains are substituted along their levels, cyclic classes solved by deflated BiCGStab, float32 inside and
float64 in the difference-form residual, or eliminated if they are small. What the device answers is then proven on the
host: counting roundings, whatever the order of a sum, where nothing subtracts, and by `certify.enclose` around a
candidate."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from . import graph
from .certify import enclose, gamma, widen
from .core import Answer, Walk
from .device_arguments import devices_of
from .device_batch import Batch, Solved, batch
from .device_function import DENSE, Function, function, settled
from .device_pack import Pattern, bucket, pack, pattern
from .device_solve import Values, eliminate, eliminated, krylov, substitute
from .layered import substitute as substitute_in_order
from .rates import Rates, rates_of

__all__ = ["Batch", "Function", "Solved", "batch", "function", "placed", "probability"]

NORMAL = 2.0**-1022  # XLA takes smaller numbers for 0
POWER_STEPS = 10

_substituted = jax.jit(lambda v, gain: substitute(v, None, gain, 1.0, ceiling=1.0))
_krylov = jax.jit(lambda v, leave, w, gain: krylov(v, leave, w, gain, 0.0))
_eliminated = jax.jit(lambda W, leave, gain: eliminated(eliminate(W, leave), gain))


def probability(w: Walk, certify: bool) -> Answer:
    """Probability of the hit from every state (and layer), computed on JAX's default device.

    Parameters
    ----------
    w : Walk
    certify : bool

    Returns
    -------
    Answer
        Classes without a proof (with ``certify=False``: whose corrections did not shrink) are in `failed`.
    """
    with jax.enable_x64(True):
        p = pattern(w)
        return _classes(w, certify) if p.cyclic else _acyclic(w, p, certify)


@contextmanager
def placed(name: str) -> Iterator[None]:
    """A context in which single chains are solved on the device of a name, such as "gpu" or "gpu:1".

    Raises
    ------
    InputError
        There is none.
    """
    with jax.default_device(devices_of(name)[0]):
        yield


def _where() -> str:
    (device,) = jnp.zeros(()).devices()
    return f"JAX on {device.platform}"


def _acyclic(w: Walk, p: Pattern, certify: bool) -> Answer:
    data = np.concatenate([P.data for P in w.chain.layers])
    v = _packed(p, data)
    x = np.asarray(_substituted(v, jnp.zeros(p.size))) if p.size else np.zeros(0)
    x = np.append(x, [0.0, 1.0])[p.slot]
    X = np.repeat(np.minimum(x, 1.0)[:, None], 3 if certify else 1, axis=1)
    live = p.roundings > 0
    entries = v.col.shape[1] + v.tail_col.shape[1] + 2
    widen(X, np.where(live, gamma(p.roundings), 0.0), np.where(live, 8 * len(p.level) * entries * NORMAL, 0.0), 1.0)
    X[~live] = x[~live, None]
    if not w.chain.is_layered:
        rates = rates_of(w.chain)
        can = graph.reaching(rates.W, w.hit, w.moving)
        X[can & w.moving & ~graph.reaching(rates.W, ~can, w.moving)] = 1.0
    why = f"{len(p.level)} levels by substitution, {_where()}"
    return Answer(X.reshape(*p.shape, -1), "device", why)


def _packed(p: Pattern, data: NDArray) -> Values:
    """Values of a pattern, made on the host; rows with an implied diagonal are divided by their totals."""
    ell = p.forward
    data = np.append(data, 0.0)
    main, tail = data[ell.source], data[ell.tail_source]
    if p.implied:
        read = np.flatnonzero(p.row < p.size)
        total = np.bincount(p.row[read], data[read], minlength=p.size).reshape(p.steps, p.width)
        total = np.where(total > 0, total, 1.0)
        main = main / total[:, None]
        tail = tail / np.take_along_axis(total, ell.tail_row.astype(np.intp), axis=1)
    return Values(main, ell.col, tail, ell.tail_row, ell.tail_col)


def _classes(w: Walk, certify: bool) -> Answer:
    rates = rates_of(w.chain)
    can = graph.reaching(rates.W, w.hit, w.moving)
    sure = can & w.moving & ~graph.reaching(rates.W, ~can, w.moving)
    X = np.repeat((w.hit | sure).astype(np.float64)[:, None], 3 if certify else 1, axis=1)
    failed, sizes, singles = [], [], 0
    for single, cyclic in graph.plan(rates.W, can & w.moving & ~sure).levels:
        if single.size:
            substitute_in_order(rates, single, X, np.zeros_like(X), 1.0)
            singles += len(single)
        for own in cyclic:
            own = np.sort(own)
            x = _class(rates, own, X)
            sizes.append(len(own))
            failed += [len(own)] if x is None else []
            X[own] = [np.nan, 0.0, 1.0][: X.shape[1]] if x is None else x
    how = "elimination" if max(sizes, default=0) <= DENSE else "deflated BiCGStab"
    why = f"{singles} states on no cycle by substitution; " if singles else ""
    why += f"{len(sizes)} cyclic (largest {max(sizes, default=0)}) by {how}, {_where()}"
    return Answer(X, "device", why, failed=tuple(failed))


def _class(rates: Rates, own: NDArray, X: NDArray) -> NDArray | None:
    """Value (and ends) of one class from those of the states outside it; None if not to be believed."""
    m = len(own)
    rows = rates.W[own]
    place = np.full(rates.n, -1)
    place[own] = np.arange(m)
    local, line = place[rows.indices], np.repeat(np.arange(m), np.diff(rows.indptr))
    inner = local >= 0
    inside = sp.csr_array((rows.data[inner], (line[inner], local[inner])), shape=(m, m))
    outside = sp.csr_array((rows.data[~inner], (line[~inner], rows.indices[~inner])), shape=rows.shape)
    leave = np.asarray(outside.sum(axis=1)).ravel()
    solve = (_small if m <= DENSE else _large)(inside, leave, rates.out[own])
    x, okay = solve(outside @ X[:, 0])
    if not okay or not np.isfinite(x).all():
        return None
    x = np.clip(x, 0.0, 1.0)
    if X.shape[1] == 1:
        return x[:, None]
    gain = np.zeros((m, 3))
    ends = enclose(rows, own, X, x, gain, lambda g: solve(g)[0], 1.0, parts=(inside, outside), errors=rates.errors)
    return None if ends is None else np.column_stack([np.clip(x, *ends), *ends])


def _small(inside: sp.csr_array, leave: NDArray, out: NDArray) -> Any:
    m, size = len(leave), bucket(len(leave))
    W, rest = np.zeros((size, size)), np.ones(size)
    W[:m, :m], rest[:m] = inside.toarray(), leave
    W, rest = jnp.asarray(W), jnp.asarray(rest)

    def solve(right: NDArray) -> tuple[NDArray, bool]:
        return np.asarray(_eliminated(W, rest, np.pad(right, (0, size - m))))[:m], True

    return solve


def _large(inside: sp.csr_array, leave: NDArray, out: NDArray) -> Any:
    m, size = len(leave), bucket(len(leave))
    V = sp.csr_array(
        (inside.data / np.repeat(out, np.diff(inside.indptr)), inside.indices, inside.indptr), inside.shape
    )
    share = leave / out
    law = settled(V, POWER_STEPS)
    row, leaks = np.repeat(np.arange(m), np.diff(V.indptr)), np.flatnonzero(share)
    data = np.concatenate([V.data, share[leaks], [0.0]])
    nnz = len(data) - 1
    ell = pack(np.append(row, leaks), np.append(V.indices, np.full(len(leaks), size)), np.arange(nnz), 1, size, nnz)
    v = Values(data[ell.source], ell.col, data[ell.tail_source], ell.tail_row, ell.tail_col)
    v = Values(*map(jnp.asarray, v))
    pad = lambda x: jnp.asarray(np.pad(x, (0, size - m)))  # noqa: E731
    share, law = pad(share), pad(law)

    def solve(right: NDArray) -> tuple[NDArray, bool]:
        unit = int(
            np.frexp(np.abs(right).max(initial=0.0))[1]
        )  # rounding bounds are tiny; their squares must not vanish
        x, okay = _krylov(v, share, law, pad(np.ldexp(right, -unit) / out))
        return np.ldexp(np.asarray(x)[:m], unit), bool(okay)

    return solve
