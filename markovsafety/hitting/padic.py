"""Integer systems solved exactly by p-adic lifting (J. D. Dixon, Numer. Math. 40 (1982) 137).

With C the inverse of A modulo a prime p, ``x = d_0 + d_1 p + d_2 p^2 + ...`` is found digit by digit:
``d = C r mod p``, ``r <- (r - A d) / p``. Once there are enough digits the fractions are read off by Euclid's
algorithm, and the answer is checked in the integers, so nothing rests on a bound. All products are made in floating
point, of parts so short that they are exact; only r is a vector of long integers."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from math import isqrt
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["LARGEST", "solve"]

TOP = 2**28  # primes are below
PART = 14  # bits of a part: a sum of LARGEST products of a part and a digit is below 2^53
LARGEST = 2048

Rows = list[dict[int, int]]


def solve(A: Rows, b: list[int]) -> list[Fraction]:
    """Solution of ``A x = b``.

    Parameters
    ----------
    A : list of m dicts, column -> integer
        A nonsingular matrix, by rows; m is at most `LARGEST`.
    b : list of m integers
    """
    m = len(b)
    for p in _primes():
        inverse = _inverse(A, p)
        if inverse is None:  # p divides the determinant
            continue
        pieces, length = _pieces(A), m
        high, low = (inverse >> PART).astype(np.float64), (inverse & (2**PART - 1)).astype(np.float64)
        rest, digits, enough = list(b), [], 16
        while True:
            r = np.array([v % p for v in rest], dtype=np.float64)
            d = ((high @ r).astype(np.int64) % p * 2**PART + (low @ r).astype(np.int64)) % p
            digits.append(d)
            product = (pieces @ d.astype(np.float64)).astype(np.int64).reshape(-1, length)
            total = product[-1].tolist()
            for part in product[-2::-1].tolist():
                total = [(t << PART) + v for t, v in zip(total, part)]
            rest = [(v - t) // p for v, t in zip(rest, total)]
            if len(digits) >= enough or not any(rest):
                x = _read(A, b, _joined(digits, p), p ** len(digits))
                if x is not None:
                    return x
                enough = len(digits) * 3 // 2
    raise AssertionError  # there are more primes than divisors of a determinant


def _primes() -> Iterator[int]:
    return (p for p in range(TOP - 1, 2, -2) if all(p % q for q in range(3, isqrt(p) + 1, 2)))


def _inverse(A: Rows, p: int) -> NDArray[np.int64] | None:
    """Inverse modulo p, or None if there is none."""
    m = len(A)
    T = np.zeros((m, 2 * m), dtype=np.int64)
    for i, row in enumerate(A):
        for j, v in row.items():
            T[i, j] = v % p
    T[:, m:] = np.eye(m, dtype=np.int64)
    for k in range(m):
        on = np.flatnonzero(T[k:, k])
        if not on.size:
            return None
        if on[0]:
            T[[k, k + on[0]]] = T[[k + on[0], k]]
        T[k] = T[k] * pow(int(T[k, k]), -1, p) % p
        factor = T[:, k].copy()
        factor[k] = 0
        rows = np.flatnonzero(factor)
        T[rows, k:] = (T[rows, k:] - factor[rows, None] * T[k, k:]) % p
    return T[:, m:]


def _pieces(A: Rows) -> NDArray[np.float64]:
    """The matrix cut into parts of `PART` bits, lowest first, one below the other; shape (parts m, m)."""
    m, bits = len(A), max(abs(v).bit_length() for row in A for v in row.values())
    parts = np.zeros((-(-bits // PART), m, m))
    for i, row in enumerate(A):
        for j, v in row.items():
            sign, v, k = (1 if v > 0 else -1), abs(v), 0
            while v:
                parts[k, i, j] = sign * (v & (2**PART - 1))
                v, k = v >> PART, k + 1
    return parts.reshape(-1, m)


def _joined(digits: list[NDArray[np.int64]], p: int) -> list[int]:
    """Numbers with these digits, lowest first."""
    level: list[Any] = [d.astype(object) for d in digits]
    while len(level) > 1:
        odd = [level.pop()] if len(level) % 2 else []
        level = [a + b * p for a, b in zip(level[::2], level[1::2])] + odd
        p = p * p
    return level[0].tolist()


def _read(A: Rows, b: list[int], x: list[int], modulus: int) -> list[Fraction] | None:
    """The fractions that x stands for, if they solve the system."""
    limit, below = isqrt(modulus // 2), 1
    for v in x:
        v = v * below % modulus
        if min(v, modulus - v) > limit:
            below *= _denominator(v, modulus, limit)
            if below > limit:
                return None
    above = [v * below % modulus for v in x]
    above = [v - modulus if v > modulus // 2 else v for v in above]
    right = all(sum(v * above[j] for j, v in row.items()) == c * below for row, c in zip(A, b))
    return [Fraction(v, below) for v in above] if right else None


def _denominator(v: int, modulus: int, limit: int) -> int:
    """The d for which ``v d`` is small modulo `modulus` (Euclid's algorithm, stopped halfway)."""
    r, s, d, e = modulus, v, 0, 1
    while s > limit:
        q = r // s
        r, s, d, e = s, r - q * s, e, d - q * e
    return abs(e)
