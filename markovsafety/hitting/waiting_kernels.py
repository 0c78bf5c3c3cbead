"""What a row of rates leaves of a token, summed so that nothing is lost where almost nothing is left.

Errors of additions are kept (D. E. Knuth's TwoSum; T. Ogita, S. M. Rump and S. Oishi, SIAM J. Sci. Comput. 26 (2005)
1955): no step may be reordered or fused with a multiplication."""

from __future__ import annotations

from ..compiled_kernels import njit

__all__ = ["left_over"]


@njit(cache=True, error_model="numpy")
def left_over(indptr, data, step, left, exact):
    """``left_i = step_i - sum_j w_ij``; exact where no rounding error at all was made."""
    for i in range(len(step)):
        s, c, clean = step[i], 0.0, True
        for e in range(indptr[i], indptr[i + 1]):
            x = -data[e]
            t = s + x
            z = t - s
            lost = (s - (t - z)) + (x - z)
            s = t
            t = c + lost
            z = t - c
            if (c - (t - z)) + (lost - z) != 0.0:
                clean = False
            c = t
        t = s + c
        z = t - s
        left[i] = t
        exact[i] = clean and (s - (t - z)) + (c - z) == 0.0
