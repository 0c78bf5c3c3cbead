"""Large cyclic classes that mix fast: BiCGStab on Gauss-Seidel sweeps in single precision, refined in double.

With rows divided by their totals a class is ``A x = b``, ``A = I - B``, and ``A 1 = a``, the share of each row that
leaves: when little leaves, the constant vector is nearly in the null space and nothing else is. Three steps make that
harmless.

*Shift.* ``A + 1 phi^T``, phi the mean, has the eigenvalue near 0 moved to 1 and all others where they were (A. Brauer,
Duke Math. J. 19 (1952) 75); it is solved as fast as the walk mixes, whatever leaks. From ``y`` and ``z``, its solutions
for b and a, follows ``x = y + (phi y / phi z) (1 - z)``, without a difference of nearby numbers: phi z is of the size
of the leak and known to a small relative error because a is. z serves every right-hand side. (What is shifted is the
operator ``I - G`` of a Gauss-Seidel sweep, of which the same holds.)

*Two parts.* The answer is kept as ``c + d``, a constant and a small vector: differences of states need d alone, so that
their digits do not end where those of the answer do.

*Refinement* with the residual ``sum_j w_ij (d_j - d_i)``, accepted only if every correction is a tenth of the last.

The proof of the answer is a vector v with ``A v >= |residual|`` including rounding: then the solution is within v of
the answer. It is solved for like any right-hand side, to some percent, and verified in double.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from . import krylov_kernels as kernels
from .certify import TINY, U, gamma
from .rates import Rates

__all__ = ["Local", "Mixer", "local", "mixer", "solve"]

LEAKY = 0.1  # mean share per move from which no shift is needed
INNER = 60  # iterations per correction
SETTLED = 1e-6  # tolerance of z, and of each correction at most
ROUNDS = 3


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
    """What all right-hand sides of a class share.

    Attributes
    ----------
    local : Local
    z : array, shape (m,)
    phi, sum_z : float
        The functional of the shift, 1 / m, or 0 if the class leaks so much that none is needed; and the sum of z.
    """

    local: Local
    z: NDArray[np.float64]
    phi: float
    sum_z: float

    @property
    def nbytes(self) -> int:
        """Bytes held beside the `Local`."""
        return self.z.nbytes


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
    small, leave, most, beside = kernels.localize(*_rows(rates), rates.out, states, place, near)
    place[own] = -1
    return Local(states, small, leave, int(most), beside)


def mixer(c: Local) -> Mixer:
    """Solve for what all right-hand sides share."""
    if c.leak >= LEAKY:
        return Mixer(c, np.zeros(len(c.own)), 0.0, 0.0)
    phi, top = 1.0 / len(c.own), float(c.leave.max())
    y, total, _ = kernels.bicgstab(c.small, (c.leave / top).astype(np.float32), phi, SETTLED, INNER)
    return Mixer(c, y * np.float64(top), phi, float(total) * top)


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
    if mixed.phi > 0 and not 0 < mixed.sum_z < np.inf:  # the leak underflows in single precision
        return None
    m = len(c.own)
    certify = X.shape[1] == 3
    r, size = np.empty(m), np.empty(m)
    D[c.own] = 0.0
    known = X[c.near, 0]
    chain, first = _rows(rates), np.ascontiguousarray(gain[:, 0])
    mean, state = kernels.refine(
        chain,
        c.own,
        rates.out,
        c.small,
        mixed.z,
        mixed.phi,
        mixed.sum_z,
        c.near,
        known,
        first,
        D,
        r,
        size,
        certify,
        INNER,
    )
    if state != kernels.REFINED:
        return None
    d = D[c.own]
    value = mean + d
    if not certify:
        return np.clip(value, 0.0, ceiling)[:, None] if np.isfinite(value).all() else None
    rate = rates.out[c.own]
    off = float(np.max(np.abs(known - mean), initial=0.0))
    room = gamma(c.most + 10)
    short = np.abs(r) + room * (size + c.leave * rate * off) + (2 * c.most + 8) * TINY
    short = (short + _wider(rates, c, X, gain)) * (1 + 16 * U)
    radius = _majorant(chain, mixed, short, rate, D)
    return None if radius is None else _ends(mean, d, value, radius, ceiling)


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


def _majorant(chain: tuple, mixed: Mixer, short: NDArray, rate: NDArray, D: NDArray) -> NDArray | None:
    """A vector v with ``sum_j w_ij (v_i - v_j) >= short_i`` and 0 outside, proven; None if none was found."""
    c, phi = mixed.local, mixed.phi
    g = short / rate
    top = float(g.max())
    if not 0 < top < np.inf:
        return None if top else np.zeros_like(g)
    none, r, size = np.zeros_like(g), np.empty_like(g), np.empty_like(g)
    pad, tol = 0.3 * float(np.sqrt(np.mean((g / top) ** 2))), 0.03
    for _ in range(ROUNDS):
        y, total, _ = kernels.bicgstab(c.small, (g / top + pad).astype(np.float32), phi, tol, INNER)
        s = float(total) * top / mixed.sum_z if phi > 0 else 0.0
        D[c.own] = d = y * np.float64(top) - s * mixed.z
        D[c.near] = -s
        kernels.defect(chain[0], chain[1], chain[2], chain[3], c.own, D, none, r, size)
        proven = -r - gamma(c.most + 10) * size - (2 * c.most + 8) * TINY
        if (proven >= short).all() and s < np.inf:
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
