"""The triad of the STREAM benchmark, the yardstick for everything that waits for memory."""

from __future__ import annotations

import numba


@numba.njit(cache=True, error_model="numpy")
def triad(a, b, c, s):
    for i in range(a.shape[0]):
        a[i] = b[i] + s * c[i]
