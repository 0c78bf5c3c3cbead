"""A hitting probability as a differentiable JAX function of the stored transition probabilities.

The equation is differentiated, not the solver: with ``(D - W) h = W_hit 1``, a change dW moves h by
``(D - W)^-1 (sum_j dw_ij (h_j - h_i))``, and a cotangent c comes back as ``lam_i (h_j - h_i)`` with
``(D - W)' lam = c``: one more solve, on the transpose, and two gathers for all entries."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse as sp
from jax import lax
from numpy.typing import NDArray

from ..chains import Chain
from ..errors import InputError
from .blocks import potential
from .core import Walk, walk, without_start
from .device_pack import Pattern, pattern
from .device_solve import Values, eliminate, eliminated, krylov, load, residual, substitute, sums, times
from .rates import rates_of

__all__ = ["DENSE", "Function", "function", "nominal", "settled", "stored"]

DENSE = 200  # cyclic patterns up to this size are eliminated
POWER_STEPS = 20

Array = Any
Solver = Callable[..., Array]


@dataclass(frozen=True)
class Function:
    """The map from stored entries to hitting probabilities; call it, or put it under jit, grad, jvp, vjp or vmap.

    Attributes
    ----------
    data : array, shape (nnz,)
        The chain's own entries, ``chain.P.data`` (layered: of all layers, concatenated): where to start from.
    shape : tuple
        Of the answer: (n,), layered (L + 1, n).
    start : array, shape (n,), or None
    """

    data: NDArray[np.float64]
    shape: tuple[int, ...]
    start: NDArray[np.float64] | None
    call: Solver

    def __call__(self, data: Array) -> Array:
        """Probabilities from every state, shape `shape`, from entries of shape (nnz,); NaN if not to be believed."""
        return self.call(data)

    def at_start(self, data: Array) -> Array:
        """Mean over the start law, a scalar.

        Raises
        ------
        InputError
            If the chain has no start law.
        """
        if self.start is None:
            raise without_start("A probability at the start")
        h = self.call(data)
        return jnp.asarray(self.start, h.dtype) @ (h[0] if h.ndim == 2 else h)

    def value_and_gradient(self, data: NDArray | None = None) -> tuple[float, NDArray[np.float64]]:
        """`at_start` and its derivative by every entry in float64, whatever the surroundings are set to.

        Raises
        ------
        InputError
            If data has another shape than (nnz,), or the chain has no start law.
        """
        try:
            at = self.data if data is None else np.asarray(data, dtype=np.float64)
        except (TypeError, ValueError):
            at = np.zeros(0)
        if at.shape != self.data.shape:
            raise InputError(
                f"data is no array of {len(self.data)} numbers.",
                cause="The function has one argument for every stored entry, in the order of chain.P.data.",
                next="Change a copy of `data`, which has the chain's own numbers.",
            )
        with jax.enable_x64(True):
            value, slope = _value_and_gradient(self)(jnp.asarray(at, jnp.float64))
            return float(value), np.asarray(slope)


def _value_and_gradient(f: Function) -> Any:
    known = f.__dict__.get("_slope")
    if known is None:
        known = jax.jit(jax.value_and_grad(f.at_start))
        f.__dict__["_slope"] = known
    return known


def function(chain: Chain, target: Any) -> Function:
    """The hitting probability of a target as a JAX function of the chain's stored entries.

    Parameters
    ----------
    chain : Chain
        Gives the pattern, and numbers near which the function will be used.
    target : as in `hitting_probability`

    Returns
    -------
    Function
        ``f(data)``, in the precision of data: for float64 surround the call by ``with jax.enable_x64(True):``, or use
        `value_and_gradient`, which does.

    Notes
    -----
    Layered: every entry counts as given, and the derivative at the start is that of `sensitivity`. Homogeneous: the
    diagonal is implied, so f does not depend on it nor on the scale of a row, and the derivative by an entry is
    ``visits_i (h_j - h_i)``; for changes that keep row sums this is the same as `sensitivity`, ``visits_i h_j``.

    Nothing can be raised from within a compiled function: where a solve did not converge, or its error may exceed
    ``64 sqrt(eps)`` (1e-6 in float64), value and derivatives are NaN. Classes of up to 200 states are eliminated
    without subtraction, and acyclic chains substituted; these do not fail. Entries must not be negative.
    """
    w = walk(chain, target)
    p = pattern(w)
    data: NDArray[np.float64] = np.concatenate([np.asarray(P.data, np.float64) for P in chain.layers])
    h = _differentiable(p, _operators(p, nominal(w, p)))
    return Function(data, p.shape, chain.start, jax.jit(h))


def nominal(w: Walk, p: Pattern) -> tuple[NDArray, NDArray] | None:
    """What deflation and proof need of a cyclic pattern, from the chain's own numbers.

    Returns
    -------
    (law, lift) or None
        By slot: nearly the law of the walk while it has not left, and nearly its mean number of moves until then.
    """
    if not p.cyclic:
        return None
    unknown = p.slot < p.size
    own = np.flatnonzero(unknown)
    rates = rates_of(w.chain)
    inside = sp.csr_array(rates.W[own][:, own])
    inside.data = inside.data / np.repeat(rates.out[own], np.diff(inside.indptr))
    law = settled(inside, POWER_STEPS)
    gain = np.where(unknown, rates.out, 0.0)[:, None]
    steps = potential(rates, unknown, np.zeros((rates.n, 1)), gain)[0][own, 0]
    both = np.zeros((2, p.size))
    both[:, p.slot[own]] = law, steps
    both[1] = np.where((both[1] > 0) & np.isfinite(both[1]), both[1], 1.0)
    return both[0], both[1]


def settled(V: sp.csr_array, steps: int) -> NDArray[np.float64]:
    """Nearly the law of a walk that has not left, by some steps of the moves V within, shape (m, m)."""
    law = np.full(len(V.indptr) - 1, 1 / (len(V.indptr) - 1))
    for _ in range(steps):
        after = V.T @ law
        total = after.sum()
        if not total > 0:  # all that is left has underflowed
            break
        law = after / total
    return law


def stored(p: Pattern, data: Array, back: bool = False) -> tuple[Values, Values | None, Array]:
    """Entries divided by the totals of their rows (homogeneous), the same transposed, and the totals."""
    v = load(data, p.forward)
    if not p.implied:
        return v, load(data, p.back) if back else None, jnp.ones((p.size, *data.shape[1:]), data.dtype)
    out = sums(v)
    out = jnp.where(out > 0, out, 1)
    shape = (p.steps, 1, p.width, *data.shape[1:])
    lane = out.reshape(p.steps, p.width, *data.shape[1:])
    step = np.arange(p.steps)[:, None]
    v = v._replace(main=v.main / out.reshape(shape), tail=v.tail / lane[step, v.tail_row])
    if not back:
        return v, None, out
    t, full = load(data, p.back), jnp.concatenate([out, jnp.ones((2, *data.shape[1:]), out.dtype)])
    return v, t._replace(main=t.main / full[t.col], tail=t.tail / full[t.tail_col]), out


def leaving(p: Pattern, v: Values) -> Array:
    """Share of every row that leads to known nodes."""
    return sums(v._replace(main=jnp.where(_over(p, v.col, v.main), v.main, 0),
                           tail=jnp.where(_over(p, v.tail_col, v.tail), v.tail, 0)))  # fmt: skip


def _over(p: Pattern, col: Array, like: Array) -> Array:
    return jnp.reshape(col >= p.size, col.shape + (1,) * (like.ndim - col.ndim))


@dataclass(frozen=True)
class _Operators:
    """``solve(data, gain, one)`` of (D - W) x = gain, ``flow(data, source)`` of its transpose, ``apply(data, x)``."""

    solve: Solver
    flow: Solver
    apply: Solver


def _operators(p: Pattern, about: Any) -> _Operators:
    def apply(data: Array, x: Array) -> Array:
        v, _, out = stored(p, data)
        return out * (x - times(v, x))

    if not p.cyclic:

        def solve(data: Array, gain: Array, one: float) -> Array:
            v, _, out = stored(p, data)
            return substitute(v, None, gain / out, one)

        def flow(data: Array, source: Array) -> Array:
            _, t, out = stored(p, data, back=True)
            return substitute(t, None, source, 0.0, backward=True) / out  # type: ignore[arg-type]

        return _Operators(solve, flow, apply)
    return _dense(p, apply) if p.size <= DENSE else _iterative(p, about, apply)


def _dense(p: Pattern, apply: Solver) -> _Operators:
    def factors(data: Array) -> tuple[Any, Array]:
        inside = (p.row < p.size) & (p.col < p.size)
        W = jnp.zeros((p.size, p.size), data.dtype).at[p.row[inside], p.col[inside]].add(data[inside])
        v = load(data, p.forward)
        leave = leaving(p, v)
        # Lanes without a state, and states that the numbers have cut off, hit nothing.
        alone = (W.sum(axis=1) + leave) == 0
        right = times(v, jnp.zeros(p.size, data.dtype), 1.0)
        return eliminate(W, jnp.where(alone, 1, leave)), right

    def solve(data: Array, gain: Array, one: float) -> Array:
        f, right = factors(data)
        return eliminated(f, gain + one * right)

    return _Operators(solve, lambda data, source: eliminated(factors(data)[0], source, flow=True), apply)


def _iterative(p: Pattern, about: tuple[NDArray, NDArray], apply: Solver) -> _Operators:
    real = np.zeros(p.size, dtype=bool)
    real[p.slot[p.slot < p.size]] = True  # other lanes only fill the shape

    def ready(data: Array, back: bool) -> Any:
        v, t, out = stored(p, data, back)
        leave = leaving(p, v)
        w, lift = (jnp.asarray(x, data.dtype) for x in about)
        zero = jnp.zeros_like(leave)
        shift = lambda m: jnp.where(real, -residual(v, m, zero, 0.0), 1)  # noqa: E731
        # The chain's own mean times prove nothing far away from it: then they are computed anew.
        lift = lax.cond(shift(lift).min() > 0.1, lambda: lift, lambda: krylov(v, leave, w, zero + 1, 0.0)[0])
        return v, t, out, leave, w, lift, shift(lift)

    def solve(data: Array, gain: Array, one: float) -> Array:
        v, _, out, leave, w, lift, t = ready(data, False)
        x, okay = krylov(v, leave, w, gain / out, one)
        r = jnp.abs(residual(v, x, gain / out, one))
        error = jnp.max(r / t) * lift.max()
        size = 1.0 if one else jnp.max(jnp.abs(x))
        return _believed(x, okay & (t.min() > 0) & (error <= _tolerance(x) * size))

    def flow(data: Array, source: Array) -> Array:
        v, back, out, leave, w, lift, t = ready(data, True)
        z, okay = krylov(v, leave, w, source, 0.0, flow=back)
        r = jnp.abs(source - z + times(back, z))  # type: ignore[arg-type]
        error = jnp.sum(r * lift) / t.min()
        return _believed(z / out, okay & (t.min() > 0) & (error <= _tolerance(z) * jnp.abs(z).sum()))

    return _Operators(solve, flow, apply)


def _tolerance(x: Array) -> float:
    return 64 * float(np.sqrt(np.finfo(x.dtype).eps))


def _believed(x: Array, okay: Array) -> Array:
    return jnp.where(okay, x, jnp.nan)


def _differentiable(p: Pattern, do: _Operators) -> Solver:
    """The function with its own derivative, linear in the change and so transposable."""

    @jax.custom_jvp
    def solution(data: Array) -> Array:
        return do.solve(data, jnp.zeros(p.size, data.dtype), 1.0)

    @solution.defjvp
    def _(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
        (data,), (change,) = primals, tangents
        x = solution(data)
        full = _known(x)
        # A gather of constants times the change, summed by row: its transpose is a gather again, never a scatter.
        moved = full[p.col] - (full[p.row] if p.implied else 0)
        gain = jax.ops.segment_sum(change * moved, p.row, p.size + 1)[: p.size]
        dx = lax.custom_linear_solve(
            lambda y: do.apply(data, y),
            gain,
            lambda _, b: do.solve(data, b, 0.0),
            lambda _, c: do.flow(data, c),
        )
        return x, dx

    def h(data: Array) -> Array:
        data = jnp.asarray(data)
        if not jnp.issubdtype(data.dtype, jnp.floating):
            data = data.astype(jnp.result_type(float))
        return _known(solution(data))[p.slot].reshape(p.shape)

    return h


def _known(x: Array) -> Array:
    return jnp.concatenate([x, jnp.array([0, 1], x.dtype)])
