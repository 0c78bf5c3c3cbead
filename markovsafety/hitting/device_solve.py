"""Solvers in JAX on packed patterns: substitution by a scan, deflated BiCGStab, and small dense elimination.

Everything works on arrays whose first axis is the slot and whose last, if there is one, is the sample: the batch axis
innermost makes every gather a run of consecutive numbers. Nothing here checks its answer but by a flag; `device`,
`device_batch` and `device_function` decide what may be believed."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from .device_pack import Ell

__all__ = ["Factors", "Values", "eliminate", "eliminated", "krylov", "load", "residual", "substitute", "sums", "times"]

UNROLL = 32
ITERATIONS = 100  # of BiCGStab per correction
INNER = {"float32": 1e-5, "float64": 1e-10}  # what it leaves of the residual, by precision
STEPS = 12
SHRINK = 0.5  # a correction must be at most this fraction of the one before

Array = Any


class Values(NamedTuple):
    """Numbers in the places of an `Ell`, with its columns.

    main, shape (steps, k, width[, S]), and col; tail, shape (steps, q[, S]), tail_row and tail_col.
    """

    main: Array
    col: Array
    tail: Array
    tail_row: Array
    tail_col: Array


def load(data: Array, ell: Ell) -> Values:
    """Put the stored entries, shape (nnz[, S]), where the pattern wants them; nothing is 0."""
    data = jnp.concatenate([data, jnp.zeros((1, *data.shape[1:]), data.dtype)])
    return Values(_at(data, ell.source), ell.col, _at(data, ell.tail_source), ell.tail_row, ell.tail_col)


def _at(x: Array, index: Array) -> Array:
    return x.at[index].get(mode="promise_in_bounds")


def _collect(v: Values, x: Array, own: Array | None = None) -> Array:
    """``sum_j v_ij x_j`` for the rows of one step, or ``sum_j v_ij (x_j - own_i)``."""
    part = lambda a, c: a * (_at(x, c) - (0 if own is None else own))  # noqa: E731
    k = v.main.shape[0]
    if k <= UNROLL:
        y = part(v.main[0], v.col[0])
        for j in range(1, k):
            y = y + part(v.main[j], v.col[j])
    else:
        start = jnp.zeros_like(v.main[0])
        y = lax.fori_loop(0, k, lambda j, y: y + part(v.main[j], v.col[j]), start)
    if v.tail_col.shape[0]:
        mine = 0 if own is None else _at(own, v.tail_row)
        y = y.at[v.tail_row].add(v.tail * (_at(x, v.tail_col) - mine), mode="promise_in_bounds")
    return y


def sums(v: Values) -> Array:
    """Row sums, shape (steps * width[, S])."""

    def one(v: Values) -> Array:
        y = v.main.sum(axis=0)
        return y.at[v.tail_row].add(v.tail, mode="promise_in_bounds") if v.tail_col.shape[0] else y

    return _flat(jax.vmap(one)(v))


def _flat(x: Array) -> Array:
    return x.reshape(-1, *x.shape[2:])


def _extended(x: Array, one: float) -> Array:
    """Behind the unknowns the slots of known 0 and known 1 (0 where only changes count)."""
    known = jnp.zeros((2, *x.shape[1:]), x.dtype).at[1].set(one)
    return jnp.concatenate([x, known])


def times(v: Values, x: Array, one: float = 0.0) -> Array:
    """``sum_j v_ij x_j``, shape (steps * width[, S])."""
    full = _extended(x, one)
    return _flat(lax.map(lambda part: _collect(part, full), v)) if len(v.main) > 1 else _collect(_first(v), full)


def _first(v: Values) -> Values:
    return Values(*(part[0] for part in v))


def substitute(
    v: Values, scale: Array | None, gain: Array, one: float, backward: bool = False, ceiling: float | None = None
) -> Array:
    """``x_i = gain_i + sum_j v_ij x_j / scale_i`` along the steps, last step first if `backward`.

    Parameters
    ----------
    v : Values
    scale : array, shape (steps * width[, S]), optional
    gain : array, same shape
    one : float
        Value of the slot of known ones.
    ceiling : float, optional
        What no value exceeds.
    """
    steps, _, width = v.col.shape
    block = lambda x: None if x is None else x.reshape(steps, width, *x.shape[1:])  # noqa: E731

    def step(x: Array, at: Any) -> tuple[Array, None]:
        t, part, s, g = at
        y = _collect(part, x)
        y = g + (y if s is None else y / s)
        y = y if ceiling is None else jnp.minimum(y, ceiling)
        return lax.dynamic_update_slice_in_dim(x, y.astype(x.dtype), t * width, 0), None

    x = _extended(jnp.zeros_like(gain), one)
    xs = (jnp.arange(steps), v, block(scale), block(gain))
    return lax.scan(step, x, xs, reverse=backward)[0][: steps * width]


def residual(v: Values, x: Array, gain: Array, one: float) -> Array:
    """``gain_i + sum_j v_ij (x_j - x_i)``, which does not cancel; one step, rows divided by their totals."""
    return gain + _collect(_first(v), _extended(x, one), x)


def _dot(x: Array, y: Array) -> Array:
    return jnp.sum(x * y, axis=0)


def _bicgstab(apply: Any, b: Array, tol: float) -> Array:
    """BiCGStab (H. A. van der Vorst, SIAM J. Sci. Stat. Comput. 13 (1992) 631) from 0, every column for itself.

    A column that is done, or breaks down, stands still; the caller starts again from the residual it finds."""
    goal = tol**2 * _dot(b, b)

    def go(state: Any) -> Array:
        return (state[0] < ITERATIONS) & ~jnp.all(state[-1])

    def step(state: Any) -> Any:
        i, x, r, p, v, rho, alpha, omega, done = state
        now = _dot(b, r)
        done = done | (now == 0) | (rho == 0) | (omega == 0)
        safe = lambda a, c: jnp.where(done | (c == 0), 0, a / jnp.where(c == 0, 1, c))  # noqa: E731
        p = r + safe(now * alpha, rho * omega) * (p - omega * v)
        v = apply(p)
        alpha = safe(now, _dot(b, v))
        s = r - alpha * v
        t = apply(s)
        omega = safe(_dot(t, s), _dot(t, t))
        x, r = x + alpha * p + omega * s, s - omega * t
        return i + 1, x, r, p, v, now, alpha, omega, done | ~(_dot(r, r) > goal)

    ones, zero = jnp.ones_like(goal), jnp.zeros_like(b)
    start = (0, zero, b, zero, zero, ones, ones, ones, ~(goal > 0))
    return lax.while_loop(go, step, start)[1]


def krylov(
    v: Values, leave: Array, w: Array, gain: Array, one: float, inner: str = "float32", flow: Values | None = None
) -> tuple[Array, Array]:
    """Deflated BiCGStab with refinement on ``x - v x = gain`` (or its transpose), one step.

    Parameters
    ----------
    v : Values
        Entries divided by their row's total.
    leave : array, shape (m[, S])
        Share of every row that leads out, to known nodes; ``(I - v) 1 = leave`` without cancellation.
    w : array, shape (m,)
        Nearly the law of the walk while it has not left.
    gain : array, shape (m[, S])
    one : float
        Value of the slot of known ones.
    inner : {"float32", "float64"}
        Precision of BiCGStab; residuals are in that of `gain`.
    flow : Values, optional
        The transpose of v: solve ``z - v^T z = gain`` instead.

    Returns
    -------
    x : array, shape (m[, S])
    okay : bool array, shape () or (S,)
        Whether the corrections shrank to rounding.

    Notes
    -----
    The coarse space is (1, w): P = I - leave w' / (w . leave) takes the almost constant part out of what BiCGStab sees,
    which is then as well conditioned as the chain mixes, however small the leak. The transpose solves with P' from the
    other side, so that a right-hand side on one state is spread before BiCGStab starts from it: on a unit vector it
    would break down.
    """
    kind = jnp.dtype(inner)
    w = w.reshape(w.shape + (1,) * (gain.ndim - 1))
    coarse = _dot(w, leave)
    low = lambda x: x.astype(kind)  # noqa: E731
    small = (v if flow is None else flow)._replace(main=low((v if flow is None else flow).main))
    small = small._replace(tail=low(small.tail))
    a, u, c = low(leave), low(w), low(coarse)
    unknown = lambda x: _collect(_first(small), _extended(x, 0.0))  # noqa: E731

    def forward(x: Array) -> Array:
        y = x - unknown(x)
        return y - a * (_dot(u, y) / c)

    def transposed(x: Array) -> Array:
        x = x - u * (_dot(a, x) / c)
        return x - unknown(x)

    def defect(x: Array, first: float) -> Array:
        if flow is None:
            return residual(v, x, gain, first)
        return gain - x + _collect(_first(flow), _extended(x, 0.0))

    def correction(r: Array) -> Array:
        if flow is None:
            r = r - leave * (_dot(w, r) / coarse)
        unit = jnp.max(jnp.abs(r), axis=0)
        unit = jnp.where(unit > 0, unit, 1)
        y = _bicgstab(forward if flow is None else transposed, low(r / unit), INNER[kind.name])
        return y.astype(gain.dtype) * unit

    def go(state: Any) -> Array:
        return (state[0] < STEPS) & ~jnp.all(state[-1])

    def step(state: Any) -> Any:
        i, x, last, ratio, done = state
        r = defect(x, one)
        if flow is None:
            y = correction(r)
            y = y + _dot(w, residual(v, y, r, 0.0)) / coarse
        else:
            big = w * (jnp.sum(r, axis=0) / coarse)
            y = correction(r - big + _collect(_first(flow), _extended(big, 0.0)))
            y = big + y - w * (_dot(leave, y) / coarse)
        size, scale = jnp.max(jnp.abs(y), axis=0), jnp.max(jnp.abs(x + y), axis=0)
        stuck = ~(size <= SHRINK * last)
        ratio = jnp.where(done, ratio, size / jnp.where(scale > 0, scale, 1))
        x = jnp.where(done | stuck, x, x + y)
        return i + 1, x, size, ratio, done | stuck | (size <= 4 * eps * scale)

    eps = jnp.finfo(gain.dtype).eps
    far = jnp.full_like(coarse, jnp.inf)
    _, x, _, ratio, _ = lax.while_loop(go, step, (0, jnp.zeros_like(gain), far, far, coarse != coarse))
    return x, (ratio <= jnp.sqrt(eps)) & jnp.all(jnp.isfinite(x), axis=0)


class Factors(NamedTuple):
    """A dense class, eliminated: above the diagonal ``w_ik / d_k``, below ``w_kj`` when k went; d."""

    W: Array
    d: Array


def eliminate(W: Array, leave: Array) -> Factors:
    """Subtraction-free elimination (Grassmann, Taksar and Heyman) of a class; W (m, m), leave (m,)."""
    m = len(leave)
    number = jnp.arange(m)

    def step(i: Array, state: Any) -> Any:
        W, leave, d = state
        k = m - 1 - i
        row = jnp.where(number < k, W[k], 0)
        total = leave[k] + row.sum()
        share = jnp.where(number < k, W[:, k], 0) / total
        W = (W + share[:, None] * row).at[:, k].set(jnp.where(number < k, share, W[:, k]))
        return W, leave + share * leave[k], d.at[k].set(total)

    W, _, d = lax.fori_loop(0, m, step, (jnp.where(jnp.eye(m, dtype=bool), 0, W), leave, jnp.zeros_like(leave)))
    return Factors(W, d)


def eliminated(f: Factors, b: Array, flow: bool = False) -> Array:
    """Solve ``(D - W) x = b``, or the transpose; nothing is subtracted where b is not negative."""
    m = len(f.d)
    number = jnp.arange(m)
    mask = lambda k, x: jnp.where(number < k, x, 0)  # noqa: E731

    def down(i: Array, b: Array) -> Array:
        k = m - 1 - i
        return b + (mask(k, f.W[k]) * (b[k] / f.d[k]) if flow else mask(k, f.W[:, k]) * b[k])

    def up(k: Array, x: Array) -> Array:
        if flow:
            return x.at[k].set(b[k] / f.d[k] + _dot(mask(k, f.W[:, k]), x))
        return x.at[k].set((b[k] + _dot(mask(k, f.W[k]), x)) / f.d[k])

    b = lax.fori_loop(0, m, down, b)
    return lax.fori_loop(0, m, up, jnp.zeros_like(b))
