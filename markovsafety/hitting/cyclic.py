"""A cyclic class of a chain and what can be made of it, each made when first asked for and kept with the chain."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from . import dissection, elimination, krylov, sparse
from . import dissection_kernels as kernels
from .rates import Rates
from .reuse import kept

__all__ = ["Cyclic", "Room"]


@dataclass(frozen=True)
class Room:
    """Arrays of the length of the chain that its classes share.

    Attributes
    ----------
    place : int array, shape (n,)
        -1 between uses.
    near : int array, shape (n,)
    values : array, shape (n,)
    """

    place: NDArray[np.int32]
    near: NDArray[np.int64]
    values: NDArray[np.float64]

    @staticmethod
    def of(n: int) -> Room:
        """Room for a chain of n states."""
        return Room(np.full(n, -1, np.int32), np.empty(n, np.int64), np.empty(n))


@dataclass(frozen=True)
class Cyclic:
    """A strongly connected class.

    Attributes
    ----------
    rates : Rates
    own : int array, shape (m,)
        Its states.
    room : Room
    """

    rates: Rates
    own: NDArray[Any]
    room: Room

    def __len__(self) -> int:
        return len(self.own)

    @cached_property
    def parts(self) -> tuple[sp.csr_array, sp.csr_array]:
        """Rates to its own states, shape (m, m), and to all others, shape (m, n)."""
        W, m = self.rates.W, len(self.own)
        inside, outside = kernels.split(W.indptr[:-1], W.indptr[1:], W.indices, W.data, self.own, self.room.place)
        return (
            sp.csr_array((inside[2], inside[1], inside[0]), shape=(m, m)),
            sp.csr_array((outside[2], outside[1], outside[0]), shape=(m, self.rates.n)),
        )

    @cached_property
    def rows(self) -> sp.csr_array:
        """Rates to every state, shape (m, n)."""
        return self.rates.W[self.own]

    @cached_property
    def out(self) -> NDArray[np.float64]:
        """Total rates."""
        return self.rates.out[self.own]

    @property
    def exits(self) -> int:
        """Most rates of a state that leave the class."""
        return int(np.diff(self.parts[1].indptr).max())

    @cached_property
    def local(self) -> krylov.Local:
        """The class in single precision."""
        make = lambda: krylov.local(self.rates, self.own, self.room.place, self.room.near)  # noqa: E731
        return kept(self.rates.memo, "local", self.own, make)

    @cached_property
    def mixer(self) -> krylov.Mixer:
        """Prepared for `krylov`."""
        return kept(self.rates.memo, "mixer", self.own, lambda: krylov.mixer(self.local))

    @cached_property
    def fronts(self) -> dissection.Fronts | None:
        """A sparse order of elimination; None where there is none worth the name."""
        return kept(self.rates.memo, "fronts", self.own, lambda: dissection.fronts(*self.local.small[:2]))

    def eliminated(self, along: bool) -> elimination.Eliminated | None:
        """Factors of the elimination, dense or along `fronts`; None if it broke down."""
        fronts = self.fronts if along else None
        if along and fronts is None:
            return None
        make = lambda: elimination.eliminate_class(self.rates, self.own, self.room.place, fronts)  # noqa: E731
        return kept(self.rates.memo, "sparse" if along else "dense", self.own, make)

    def factors(self, flow: bool) -> sparse.Solver | None:
        """LU solver, of the transposed equation if `flow`; None if it broke down."""
        found = kept(self.rates.memo, "lu", self.own, lambda: sparse.factors(self.parts[0], self.out))
        return None if found is None else found.solver(flow)
