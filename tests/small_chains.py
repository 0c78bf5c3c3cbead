"""Small chains with exact rows, for tests that compare with fractions."""

from __future__ import annotations

from fractions import Fraction as F

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st

import markovsafety as ms

SEEDS = st.integers(0, 2**32 - 1)
LAYERS = st.sampled_from([0, 0, 1, 4])
quick = settings(derandomize=True, deadline=None, max_examples=25)


def integer_rows(rng, n, m):
    """Rows of n + m integers that sum to 64, so that 1 / 64 of them are exact floats; the last m states are ends."""
    C = np.zeros((n + m, n + m), dtype=int)
    for i in range(n):
        on = rng.choice(n + m, size=int(rng.integers(1, n + m + 1)), replace=False)
        C[i, on] = rng.multinomial(64, rng.dirichlet(np.ones(len(on))))
    return C


def random_chain(seed, layers=0, leaky=False):
    """A small chain with exact rows, and its matrices as fractions."""
    rng = np.random.default_rng(seed)
    n = int(rng.integers(1, 5))
    matrices = [integer_rows(rng, n, 3) for _ in range(max(layers, 1))]
    for C in matrices:
        C[n + 1] = [64 if leaky and j == 0 else 0 for j in range(n + 3)]
    outcomes = {"harm": n, "refusal": n + 1, "benign": n + 2}
    start = rng.multinomial(8, rng.dirichlet(np.ones(n + 3))) / 8
    if layers:
        chain = ms.Chain.layered([C / 64 for C in matrices], outcomes, start)
    else:
        chain = ms.Chain(matrices[0] / 64, outcomes, start)
    return chain, [[[F(int(x), 64) for x in row] for row in C] for C in matrices], [F(float(x)) for x in chain.start]
