"""Nested dissection: an order of elimination in which long and thin classes stay sparse.

A class is split by the states of one level of a breadth-first search, far from both ends; the two halves are split
again (A. George, SIAM J. Numer. Anal. 10 (1973) 345; level sets as in J. A. George and J. W. H. Liu, SIAM J. Numer.
Anal. 15 (1978) 1053). A half comes before what separates it, so that its elimination only touches its border.

Only patterns are read here; an order is never wrong, at worst slow.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from . import dissection_kernels as kernels

__all__ = ["Fronts", "fronts"]

LEAF = 24  # states that are not split further
WORK = 3e9  # multiplications
BREADTH = 0.06  # largest share of a level in the breadth-first search of a class worth dissecting, plus 100 states


@dataclass(frozen=True)
class Fronts:
    """An order of elimination in fronts, children before parents.

    Attributes
    ----------
    order : int array, shape (m,)
        States of the class in the order of elimination.
    begin : int array, shape (F + 1,)
        Pivots of front a are ``begin[a] .. begin[a + 1] - 1`` in this order.
    parent : int array, shape (F,)
        -1 for a root.
    edge, border : int arrays
        ``border[edge[a] : edge[a + 1]]`` are the later states that front a touches.
    """

    order: NDArray[np.int64]
    begin: NDArray[np.int64]
    parent: NDArray[np.int64]
    edge: NDArray[np.int64]
    border: NDArray[np.int64]

    @property
    def pivots(self) -> NDArray[np.int64]:
        """Pivots of each front."""
        return np.diff(self.begin)

    @property
    def borders(self) -> NDArray[np.int64]:
        """States in each border."""
        return np.diff(self.edge)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return 8 * (len(self.order) + len(self.border) + 3 * len(self.begin))

    @property
    def work(self) -> float:
        """Multiplications of the elimination."""
        s, b = self.pivots.astype(np.float64), self.borders.astype(np.float64)
        return float(np.sum(s * (s * s / 3 + s * b + b * b)))

    @property
    def fill(self) -> int:
        """Numbers in the factors."""
        s, b = self.pivots, self.borders
        return int(np.sum(s * (s + 2 * b)))


def one_front(m: int) -> Fronts:
    """A dense class."""
    return Fronts(np.arange(m), np.array([0, m]), np.array([-1]), np.zeros(2, np.int64), np.zeros(0, np.int64))


def fronts(indptr: NDArray, indices: NDArray, limit: float = WORK) -> Fronts | None:
    """Dissect a class.

    Parameters
    ----------
    indptr, indices : int arrays
        Its pattern in rows; the diagonal does not matter.
    limit : float
        Most multiplications.

    Returns
    -------
    Fronts or None
        None if the class spreads too fast to be dissected, or elimination would take more than `limit`.
    """
    m = len(indptr) - 1
    if m <= LEAF:
        return one_front(m)
    if kernels.broadest(indptr, indices, int(BREADTH * m) + 100) == 0:
        return None
    adjacent = kernels.symmetric(indptr, indices)
    order, begin, parent = kernels.dissect(*adjacent, LEAF)
    edge, border = kernels.borders(*adjacent, order, begin, parent)
    found = Fronts(order, begin, parent, edge, border)
    return found if found.work <= limit else None
