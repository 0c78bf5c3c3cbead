"""Matrices as chains keep them: canonical CSR, read-only, checked in few passes on a copy of what was given."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from ..errors import InputError
from .checks import TOLERANCE, Name, freeze, index_dtype, shape_of

__all__ = ["Survey", "as_counts", "as_csr", "csr", "divided", "stochastic", "survey"]

LARGEST = 9.2e18  # a sum in floating point up to which the sum in int64 cannot overflow
SMALL = 1 << 15  # entries up to which numpy surveys; loading compiled code would cost more
FEW = 100  # places up to which an array is put together from slices


def csr(data: NDArray, indices: NDArray, indptr: NDArray, shape: Any, canonical: bool = True) -> sp.csr_array:
    """A CSR matrix of read-only views of these arrays; `canonical` says that they are sorted, without duplicates."""
    index = index_dtype(len(data), *shape)
    parts = data.view(), indices.astype(index, copy=False).view(), indptr.astype(index, copy=False).view()
    matrix = sp.csr_array(parts, shape=shape)
    if canonical:
        matrix.has_canonical_format = True
    return freeze(matrix)


class Survey(NamedTuple):
    """What one pass over a CSR matrix finds: canonical order, entries all positive (nan is not), and the row sums."""

    canonical: bool
    positive: bool
    sums: NDArray[np.float64]


def as_csr(P: Any, what: str = "P") -> tuple[sp.csr_array, Survey]:
    """A canonical CSR float64 form of a square dense or sparse matrix, duplicates summed, on arrays of its own."""
    try:
        dtype = P.dtype if sp.issparse(P) or isinstance(P, np.ndarray) else np.asarray(P).dtype
        if dtype.kind not in "biufO":
            raise TypeError(f"its entries are of type {dtype}")
        P = P if sp.issparse(P) else np.asarray(P, dtype=np.float64)
        if len(P.shape) != 2 or P.shape[0] != P.shape[1] or P.shape[0] == 0:
            raise InputError(
                f"{what} has shape {tuple(P.shape)}.",
                cause="A chain needs a square matrix with one row per state, outcome states included.",
                next="Give outcome states a row too (all zeros means absorbing).",
            )
        given: Any = sp.csr_array(P) if isinstance(P, np.ndarray) else P.tocsr(copy=True)
        return _canonical(given, given.data.astype(np.float64, copy=False))
    except (TypeError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"{what} is not a numeric matrix.",
            cause=str(error),
            next="Pass a square array, a scipy sparse matrix or a list of rows of equal length.",
        ) from None


def _canonical(given: Any, data: NDArray) -> tuple[sp.csr_array, Survey]:
    """`given` with these data, sorted and without duplicates; its index arrays are checked before C code reads them."""
    shape, indptr, indices = shape_of(given), np.asarray(given.indptr), np.asarray(given.indices)
    size = int(indptr[-1]) if len(indptr) == shape[0] + 1 else -1
    if indptr[0] != 0 or not 0 <= size <= min(len(data), len(indices)) or (indptr[1:] < indptr[:-1]).any():
        raise ValueError("its row pointers do not rise from 0 to the number of entries")
    data, indices = data[:size], indices[:size]
    # Wide indices are checked before they are made narrow; others only if their rows are not in order.
    narrow = indices.dtype == index_dtype(size, *shape)
    if not narrow:
        _in_range(indices, shape[1])
    matrix = csr(data, indices, indptr, shape, canonical=False)
    found = survey(matrix)
    if found.canonical:
        matrix.has_canonical_format = True
        return matrix, found
    if narrow:
        _in_range(indices, shape[1])
    matrix = sp.csr_array(matrix, copy=True)
    matrix.sum_duplicates()
    matrix = csr(matrix.data, matrix.indices, matrix.indptr, shape)
    return matrix, survey(matrix)


def _in_range(indices: NDArray, n: int) -> None:
    if len(indices) and not 0 <= indices.min() <= indices.max() < n:
        raise ValueError("a column index is out of range")


def survey(matrix: sp.csr_array) -> Survey:
    """What a square matrix is. Its row pointers must be sound; sums run from left to right."""
    n, data, indices = shape_of(matrix)[0], matrix.data, matrix.indices
    if matrix.nnz >= SMALL:
        from . import matrix_kernels as kernels  # compiled code is loaded where it pays

        sums = np.empty(n)
        canonical, positive = kernels.survey(matrix.indptr, indices, data, sums)
        return Survey(canonical, positive, sums)
    inside = bool(len(data) == 0 or 0 <= indices.min() <= indices.max() < n)
    row = np.repeat(np.arange(n), np.diff(matrix.indptr))
    rising = bool(((indices[1:] > indices[:-1]) | (row[1:] != row[:-1])).all())
    return Survey(inside and rising, bool((data > 0).all()), np.bincount(row, data, n).astype(np.float64))


def stochastic(matrix: sp.csr_array, found: Survey, outcome: NDArray, name: Name, what: str = "P") -> sp.csr_array:
    """Check that rows are probability laws; give all-zero outcome rows a one on the diagonal."""
    sums = found.sums
    if not found.positive:
        if not matrix.data.min() >= 0:  # nan is not
            raise _bad_entry(matrix, name, what)
        matrix = _without_zeros(matrix)
    empty = matrix.indptr[1:] == matrix.indptr[:-1]
    absorbing = outcome & empty
    off = np.flatnonzero(~absorbing & ~(np.abs(sums - 1) <= TOLERANCE))
    if off.size:
        if not np.isfinite(matrix.data).all():
            raise _bad_entry(matrix, name, what)
        row = int(off[0])
        raise InputError(
            f"The row of {name(row)} in {what} sums to {sums[row]:.12g}"
            + (f"; so do not {off.size - 1} other rows." if off.size > 1 else "."),
            cause="An all-zero row is allowed for outcome states only."
            if empty[row]
            else f"A row is a probability law: its entries sum to one within {TOLERANCE:g}.",
            next="Name the state in `outcomes`, or give it transitions."
            if empty[row]
            else "Normalise the row, or use Chain.from_counts for counts.",
        )
    return _absorbed(matrix, np.flatnonzero(absorbing)) if absorbing.any() else matrix


def _bad_entry(matrix: sp.csr_array, name: Name, what: str) -> InputError:
    k = int(np.flatnonzero(~np.isfinite(matrix.data) | (matrix.data < 0))[0])
    row = int(np.searchsorted(matrix.indptr, k, side="right")) - 1
    return InputError(
        f"{what} has the entry {matrix.data[k]:g} from {name(row)} to {name(int(matrix.indices[k]))}.",
        cause="Transition probabilities are finite and not negative.",
        next="Correct this entry.",
    )


def _without_zeros(matrix: sp.csr_array) -> sp.csr_array:
    keep = matrix.data != 0
    before = np.zeros(len(keep) + 1, dtype=matrix.indptr.dtype)
    np.cumsum(keep, out=before[1:])
    return csr(matrix.data[keep], matrix.indices[keep], before[matrix.indptr], matrix.shape)


def _absorbed(matrix: sp.csr_array, rows: NDArray) -> sp.csr_array:
    """With a one on the diagonal of these rows, which are empty."""
    added = np.zeros(shape_of(matrix)[0] + 1, dtype=index_dtype(matrix.nnz + len(rows)))
    added[rows + 1] = 1
    places = matrix.indptr[rows]
    data, indices = _inserted(matrix.data, places, np.ones(len(rows))), _inserted(matrix.indices, places, rows)
    return csr(data, indices, matrix.indptr + np.cumsum(added, out=added), matrix.shape)


def _inserted(array: NDArray, places: NDArray, values: NDArray) -> NDArray:
    """Values put in front of these places (in rising order) of an array."""
    distinct, first = np.unique(places, return_index=True)
    if len(distinct) > FEW:
        return np.insert(array, places, values)
    fresh = np.split(values.astype(array.dtype), first[1:])
    old = np.split(array, distinct)
    return np.concatenate([old[0], *(part for pair in zip(fresh, old[1:]) for part in pair)])


def as_counts(C: Any) -> sp.csr_array:
    """Canonical int64 CSR of integer counts; values are checked before anything is rounded."""
    shape = tuple(C.shape) if sp.issparse(C) else np.shape(C)
    if len(shape) != 2 or shape[0] != shape[1]:
        raise InputError(
            f"The counts have shape {shape}.", cause="Counts form a square matrix.", next="Pass shape (n, n)."
        )
    if not sp.issparse(C):
        C = sp.csr_array(_whole(np.asarray(C)))
    C = C if C.format == "csr" else C.tocoo()  # other ways to CSR would add duplicates without asking
    exact = _whole(C.data)
    try:
        if float(exact.max(initial=0)) * len(exact) > LARGEST:
            _refuse_overflow(C, exact)
        given = C if C.format == "csr" else sp.coo_array((exact, C.coords), shape=shape).tocsr()
        matrix, found = _canonical(given, exact if given is C else given.data)
    except ValueError as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            "The counts are no valid CSR matrix.", cause=str(error), next="Build the matrix with scipy again."
        ) from None
    return matrix if found.positive else _without_zeros(matrix)


def _refuse_overflow(C: Any, exact: NDArray) -> None:
    values = exact.astype(np.float64)
    rows = _canonical(C, values)[1].sums if C.format == "csr" else np.bincount(C.coords[0], values, C.shape[0])
    if rows.max() > LARGEST:
        raise InputError(
            f"The counts of state {int(np.argmax(rows))} add up to {rows.max():.4g}.",
            cause=f"They are added as integers of 64 bits, so a row must stay below {LARGEST:g}.",
            next="Divide the counts of this row by a common factor: its probabilities stay the same.",
        )


def _whole(values: NDArray) -> NDArray[np.int64]:
    """The values as int64, where they are whole numbers in [0, 2**63)."""
    flat, good = values.ravel(), False
    if values.dtype.kind in "biu":
        good = values.dtype.kind == "b" or (flat.min(initial=0) >= 0 and flat.max(initial=0) < 2**63)
    elif values.dtype.kind == "f":
        good = bool(((flat >= 0) & (flat < 2.0**63) & (flat == np.floor(flat))).all())
    elif values.dtype.kind == "O":
        good = all(_is_count(x) for x in flat.tolist())
        values = np.array([int(x) for x in flat], dtype=np.int64).reshape(values.shape) if good else values
    if not good:
        wrong = next((x for x in flat.tolist() if not _is_count(x)), "a value")
        raise InputError(
            f"The counts contain {wrong!r}.",
            cause="Counts are non-negative whole numbers below 2**63.",
            next="Use Chain for probabilities, or estimate() for weighted counts.",
        )
    return values.astype(np.int64, copy=False)


def _is_count(x: Any) -> bool:
    try:
        return not isinstance(x, (str, bytes)) and x == int(x) and 0 <= x < 2**63
    except (TypeError, ValueError, OverflowError):
        return False


def divided(counts: sp.csr_array) -> sp.csr_array:
    """Rows divided by their sums; what is empty stays empty. The index arrays are shared."""
    totals = np.asarray(counts.sum(axis=1)).ravel()
    data = counts.data.astype(np.float64)
    data /= np.repeat(np.maximum(totals, 1).astype(np.float64), np.diff(counts.indptr))
    return csr(data, counts.indices, counts.indptr, counts.shape)
