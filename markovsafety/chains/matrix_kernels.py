"""The compiled pass over a CSR matrix that says what it is."""

from __future__ import annotations

import numpy as np

from ..compiled_kernels import njit

__all__ = ["survey"]


@njit(cache=True, error_model="numpy")
def survey(indptr, indices, data, sums):
    """Sum each row from left to right, and say whether all rows are sorted without duplicates, and whether all entries
    are positive (nan is not). The row pointers must be sound; columns that are not below the number of rows, or below
    zero, count as not sorted.
    """
    columns, disorder, positive = len(sums), False, True
    for row in range(len(sums)):
        before, total = -1, 0.0
        for k in range(np.int64(indptr[row]), np.int64(indptr[row + 1])):
            column, value = np.int64(indices[k]), data[k]
            disorder |= column <= before
            positive &= value > 0
            total += value
            before = column
        disorder |= before >= columns
        sums[row] = total
    return not disorder, positive
