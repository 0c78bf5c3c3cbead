"""Large cyclic classes that mix fast: sweeps in single precision, or BiCGStab on them, refined in double.

With rows divided by their totals a class is ``A x = b``, ``A = I - B``, and ``A 1 = a``, the share of each row that
leaves: when little leaves, the constant vector is nearly in the null space and nothing else is. Three steps make that
harmless.

*A second vector.* Gauss-Seidel sweeps shrink all that differs from state to state as fast as the walk mixes, whatever
leaks; what they leave of any right-hand side is a multiple of what they leave of a, which tells the multiple of ``1 -
z`` that is missing, z being the sum of the sweeps from a (`sweep_kernels`). No difference of nearby numbers is formed,
and z serves every right-hand side. Classes that mix too slowly for sweeps get BiCGStab on ``A + 1 phi^T``, phi the
mean: the eigenvalue near 0 is moved to 1 and all others stay (A. Brauer, Duke Math. J. 19 (1952) 75); from ``y`` and
``z``, its solutions for b and a, follows ``x = y + (phi y / phi z) (1 - z)``. (What is shifted is the operator ``I -
G`` of a Gauss-Seidel sweep, of which the same holds.)

*Two parts.* The answer is kept as ``c + d``, a constant and a small vector: differences of states need d alone, so that
their digits do not end where those of the answer do.

*Refinement* with the residual ``sum_j w_ij (d_j - d_i)``, accepted only if every correction is a tenth of the last.

The proof of the answer is a vector v with ``A v >= |residual|`` including rounding: then the solution is within v of
the answer. A multiple of ``1 - z``, smoothed once, does for most; else it is solved for like any right-hand side, to
some percent. Either is verified in double.

Expected visits solve the transposed equation. There all mass leaves in the end, which gives the missing multiple
without a second vector's help, and exactly.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import krylov_kernels as kernels
from . import sweep_kernels as sweeps
from .certify import TINY, U, gamma
from .rates import Rates

__all__ = ["Local", "Mixer", "Solver", "flow", "flow_solver", "local", "mixer", "solve"]

LEAKY = 0.1  # mean share per move from which no shift is needed
INNER = 60  # iterations per correction
SETTLED = 1e-6  # tolerance of z, and of each correction at most
ROUNDS = 3
EVEN = 16  # a radius of one shape everywhere is taken if it is at most this multiple of the mean one
FLOWS = 8  # corrections of visits

Solver = Callable[[NDArray], NDArray]


@dataclass(frozen=True)
class Local:
    """A class in single precision.

    Attributes
    ----------
    own : uint array, shape (m,)
    small : (indptr, indices, values)
        Its rates, rows divided by their totals.
    leave : array, shape (m,)
        Share of each row that leaves.
    most : int
        Most rates of a row.
    near : int array
        States outside that are moved to.
    """

    own: NDArray[np.uint64]
    small: tuple[NDArray, NDArray, NDArray]
    leave: NDArray[np.float64]
    most: int
    near: NDArray[np.int64]

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(a.nbytes for a in (*self.small, self.own, self.leave, self.near))

    @property
    def leak(self) -> float:
        """Mean share of a row that leaves."""
        return float(self.leave.mean())


@dataclass(frozen=True)
class Mixer:
    """What all right-hand sides of a class share, made when first asked for.

    Attributes
    ----------
    local : Local
    memo : dict
        "sweeps": z and what the sweeps left, or None if the class mixes too slowly for them; "krylov": z, phi and the
        sum of z; "back": the transposed rates; "flow": what their sweeps left, or None.
    """

    local: Local
    memo: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)

    @property
    def nbytes(self) -> int:
        """Bytes that may come to be held beside the `Local`."""
        return sum(a.nbytes for a in self.local.small) + 24 * len(self.local.own)

    def shifted(self) -> tuple[NDArray[np.float64], float, float]:
        """z, phi (1 / m, or 0 without a shift) and the sum of z, by BiCGStab."""
        if "krylov" not in self.memo:
            self.memo["krylov"] = _shifted(self.local)
        return self.memo["krylov"]

    def once(self, b: NDArray[np.float32], tol: float) -> tuple[NDArray, float, NDArray]:
        """y, s and z with ``A (y + s (1 - z))`` near b, by what has worked on the class."""
        c = self.local
        if self.memo.get("sweeps") is not None:
            z, w = self.memo["sweeps"]
            g, y = np.empty_like(b), np.empty_like(b)
            s, _ = sweeps._one(c.small, b, w, g, y, tol)
            return y, float(s) / float(c.leave.max()), z
        z, phi, sum_z = self.shifted()
        y, total, _ = kernels.bicgstab(c.small, b, phi, tol, INNER)
        if phi == 0:
            return y, 0.0, z
        return y, float(total) / sum_z if 0 < sum_z < np.inf else np.inf, z


def _rows(rates: Rates) -> tuple[NDArray, NDArray, NDArray, NDArray]:
    """First and last position of each row, columns and rates; unsigned views, nothing is copied."""
    W = rates.W
    ptr, columns = (a.view(f"u{a.itemsize}") for a in (W.indptr, W.indices))
    return ptr[:-1], ptr[1:], columns, W.data


def local(rates: Rates, own: NDArray[np.integer], place: NDArray[np.int32], near: NDArray[np.int64]) -> Local:
    """Cut a class out of a chain.

    Parameters
    ----------
    own : int array, shape (m,)
    place : array, shape (n,)
        -1 everywhere, and so again afterwards.
    near : int array, shape (n,)
        Room.
    """
    states = own.astype(np.uint64)
    place[own] = np.arange(len(own), dtype=place.dtype)
    nnz = rates.W.nnz if 2 * len(own) > rates.n else int((rates.W.indptr[own + 1] - rates.W.indptr[own]).sum())
    room = np.empty(nnz, np.uint32), np.empty(nnz, np.float32)  # numpy asks for large pages, numba does not
    small, leave, most, beside = kernels.localize(*_rows(rates), rates.out, states, place, near, *room)
    place[own] = -1
    return Local(states, small, leave, int(most), beside)


def mixer(c: Local) -> Mixer:
    """A `Mixer` that knows nothing yet."""
    return Mixer(c)


def _shifted(c: Local) -> tuple[NDArray[np.float64], float, float]:
    if c.leak >= LEAKY:
        return np.zeros_like(c.leave), 0.0, 0.0
    phi, top = 1.0 / len(c.own), float(c.leave.max())
    y, total, _ = kernels.bicgstab(c.small, (c.leave / top).astype(np.float32), phi, SETTLED, INNER)
    return y * np.float64(top), phi, float(total) * top


def solve(rates: Rates, mixed: Mixer, X: NDArray, gain: NDArray, D: NDArray, ceiling: float) -> NDArray | None:
    """Values of a class, with lower and upper ends if X has three columns.

    Parameters
    ----------
    mixed : Mixer
    X : array, shape (n, 3) or (n, 1)
        Values outside the class.
    gain : array, shape (m, 3) or (m, 1)
    D : array, shape (n,)
        Room.
    ceiling : float
        A known upper bound of the solution.

    Returns
    -------
    array, shape (m, 3) or (m, 1), or None
        None if the corrections do not shrink or the ends cannot be proven.
    """
    c = mixed.local
    certify = X.shape[1] == 3
    known, first = X[c.near, 0], np.ascontiguousarray(gain[:, 0])
    found = _refined(rates, mixed, known, first, D, certify)
    if found is None:
        return None
    mean, r, size = found
    d = D[c.own]
    value = mean + d
    if not certify:
        return np.clip(value, 0.0, ceiling)[:, None] if np.isfinite(value).all() else None
    rate = rates.out[c.own]
    off = float(np.max(np.abs(known - mean), initial=0.0))
    most = float(np.max(np.abs(known), initial=float(np.abs(value).max())))
    lost = (2 * c.most + 8) * (1 + 2 * most) * TINY
    short = np.abs(r) + gamma(c.most + 10) * (size + c.leave * rate * off) + lost
    short = (short + _wider(rates, c, X, gain)) * (1 + 16 * U)
    radius = _radius(_rows(rates), mixed, short, rate, D)
    return None if radius is None else _ends(mean, d, value, radius, ceiling)


def _refined(
    rates: Rates, mixed: Mixer, known: NDArray, gain: NDArray, D: NDArray, tight: bool
) -> tuple[float, NDArray, NDArray] | None:
    """The constant part, and if `tight` the residual and its size; D receives the rest. None if nothing converges."""
    c, memo, m = mixed.local, mixed.memo, len(mixed.local.own)
    chain, r, size = _rows(rates), np.empty(m), np.empty(m)
    shared = memo.get("sweeps", ())
    if shared is not None:
        z, w = shared or (np.empty(m), np.zeros(m, np.float32))
        D[c.own] = 0.0
        ask = c.near, known, gain, D, r, size, tight
        mean, state = sweeps.settle(chain, c.own, rates.out, c.small, c.leave, bool(shared), z, w, *ask)
        if state != sweeps.SETTLED or w.any():  # a residual of 0 at once needs no sweep
            memo.setdefault("sweeps", (z, w) if state == sweeps.SETTLED else None)
        if state == sweeps.SETTLED:
            return mean, r, size
    z, phi, sum_z = mixed.shifted()
    if phi > 0 and not 0 < sum_z < np.inf:  # the leak underflows in single precision
        return None
    D[c.own] = 0.0
    ask = c.near, known, gain, D, r, size, tight
    mean, state = kernels.refine(chain, c.own, rates.out, c.small, z, phi, sum_z, *ask, INNER)
    return (mean, r, size) if state == kernels.REFINED else None


def _wider(rates: Rates, c: Local, X: NDArray, gain: NDArray) -> NDArray:
    """What the given ends of outside values and gains add to the residual."""
    wide = np.maximum(X[c.near, 2] - X[c.near, 0], X[c.near, 0] - X[c.near, 1])
    more = np.maximum(gain[:, 2] - gain[:, 0], gain[:, 0] - gain[:, 1]) * (1 + 4 * U)
    if not wide.any():
        return more
    spread = np.zeros(rates.n)
    spread[c.near] = wide * (1 + 4 * U)
    more = more + rates.W[c.own.astype(np.intp)] @ spread
    return more * (1 + 2 * gamma(c.most + 4)) + (c.most + 2) * TINY


def _radius(chain: tuple, mixed: Mixer, short: NDArray, rate: NDArray, D: NDArray) -> NDArray | None:
    """A vector v with ``sum_j w_ij (v_i - v_j) >= short_i`` and 0 outside, proven; None if none was found."""
    top = float(short.max())
    if not 0 < top < np.inf:
        return None if top else np.zeros_like(short)
    if mixed.memo.get("sweeps") is not None:
        c, v = mixed.local, np.empty(len(short))
        sweeps.smooth(c.small, c.leave, mixed.memo["sweeps"][0], v)
        proven = _lifted(chain, c, 1.0, -v, D)
        if (proven > 0).all():
            factor = float(np.max(short / proven)) * (1 + 4 * U)
            if factor * float(proven.mean()) <= EVEN * float(short.mean()):
                return factor * (1 - v) * (1 + 8 * U) + TINY
    return _majorant(chain, mixed, short, rate, D)


def _lifted(chain: tuple, c: Local, s: float, d: NDArray, D: NDArray) -> NDArray:
    """Proven lower bounds of ``sum_j w_ij (v_i - v_j)`` for ``v = s + d``, 0 outside."""
    r, size = np.empty(len(d)), np.empty(len(d))
    D[c.own] = d
    D[c.near] = -s
    kernels.defect(chain[0], chain[1], chain[2], chain[3], c.own, D, np.zeros(len(d)), r, size)
    return -r - gamma(c.most + 10) * size - (2 * c.most + 8) * (1 + 2 * s) * TINY


def _majorant(chain: tuple, mixed: Mixer, short: NDArray, rate: NDArray, D: NDArray) -> NDArray | None:
    """The same from a right-hand side a little larger than `short`."""
    g = short / rate
    top = float(g.max())
    pad, tol = 0.3 * float(np.sqrt(np.mean((g / top) ** 2))), 0.03
    for _ in range(ROUNDS):
        y, s, z = mixed.once((g / top + pad).astype(np.float32), tol)
        s *= top
        if not s < np.inf:
            return None
        d = y * np.float64(top) - s * z
        if (_lifted(chain, mixed.local, s, d, D) >= short).all():
            return (s + d) * (1 + 4 * U)
        pad, tol = 2 * pad, 0.2 * tol
    return None


def _ends(mean: float, d: NDArray, value: NDArray, radius: NDArray, ceiling: float) -> NDArray:
    """``mean + d -+ radius``, rounded outward: `lost` is what the sum `value` lost, exactly (Knuth's two-sum)."""
    back = value - mean
    lost = (mean - (value - back)) + (d - back)
    room = radius * (1 + 4 * U) + 4 * U * np.abs(lost)
    lower = np.nextafter(value + (lost - room), -np.inf)
    upper = np.nextafter(value + (lost + room), np.inf)
    lower, upper = np.maximum(lower, 0.0), np.minimum(upper, ceiling)
    return np.column_stack([np.clip(value, lower, upper), lower, upper])


def flow(mixed: Mixer, inside: Any, out: NDArray, source: NDArray) -> NDArray[np.float64] | None:
    """Visits ``d_j z_j = s_j + sum_i z_i w_ij`` to the states of a class, in units of the rates.

    Parameters
    ----------
    inside : csr array, shape (m, m)
    out : array, shape (m,)
        Total rates d.
    source : array, shape (m,)

    Returns
    -------
    array, shape (m,), or None
        None if the class mixes too slowly.
    """
    u = _flow(mixed, inside, out, source, FLOWS)
    return None if u is None or not np.isfinite(u).all() else np.maximum(u, 0.0) / out


def flow_solver(mixed: Mixer, inside: Any, out: NDArray) -> Solver:
    """One correction of `flow`, for right-hand sides of any sign; may be poor."""

    def solve(b: NDArray) -> NDArray:
        u = _flow(mixed, inside, out, b, 1)
        return np.zeros_like(b) if u is None else u / out

    return solve


def _flow(mixed: Mixer, inside: Any, out: NDArray, source: NDArray, rounds: int) -> NDArray | None:
    memo, c = mixed.memo, mixed.local
    shared = memo.get("flow", ())
    if shared is None:
        return None
    if "back" not in memo:
        memo["back"] = sweeps.turned(c.small)
    w = np.empty(len(out), np.float32) if isinstance(shared, tuple) else shared
    u = np.zeros(len(out))
    rows = (*(a.view(f"u{a.itemsize}") for a in (inside.indptr, inside.indices)), inside.data)
    given = np.ascontiguousarray(source)
    state = sweeps.settle_flow(rows, out, memo["back"], c.leave, shared is w, w, given, u, rounds)
    memo.setdefault("flow", w if state == sweeps.SETTLED else None)
    return u if state == sweeps.SETTLED else None
