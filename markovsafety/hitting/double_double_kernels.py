"""Error-free transformations: a rounded sum or product together with what its rounding lost, exactly.

A pair ``high + low`` of doubles carries a number to about 2^-106. The identities need every operation rounded on its
own to binary64: no extended precision, no reordering, no fused multiply-add. numba compiles without fast-math flags,
so LLVM neither reorders nor contracts what is written here; `tests/test_hitting_certify.py` checks that against
fractions.

T. J. Dekker, Numer. Math. 18 (1971) 224; D. E. Knuth, The Art of Computer Programming 2, 4.2.2; T. Ogita, S. M. Rump,
S. Oishi, SIAM J. Sci. Comput. 26 (2005) 1955.
"""

from __future__ import annotations

from ..compiled_kernels import njit

__all__ = ["SMALL", "two_product", "two_sum"]

SPLIT = 134217729.0  # 2^27 + 1
SMALL = 2.0**-900  # a smaller product may lose bits of its error to underflow


@njit(cache=True, error_model="numpy", inline="always")
def two_sum(a, b):
    """``s = fl(a + b)`` and ``e`` with ``s + e = a + b`` exactly, unless s overflows (then e is nan)."""
    s = a + b
    t = s - a
    return s, (a - (s - t)) + (b - t)


@njit(cache=True, error_model="numpy", inline="always")
def two_product(a, b):
    """``p = fl(a b)`` and ``e`` with ``p + e = a b`` exactly, if ``|p| >= SMALL`` and a, b are below 2^990.

    Each factor is cut into two of at most 26 bits, whose four products are exact. A factor too large overflows when it
    is cut, and e is nan.
    """
    p = a * b
    t = SPLIT * a
    a1 = t - (t - a)
    a2 = a - a1
    t = SPLIT * b
    b1 = t - (t - b)
    b2 = b - b1
    return p, a2 * b2 - (((p - a1 * b1) - a2 * b1) - a1 * b2)
