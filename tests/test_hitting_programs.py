"""Planned sparse elimination for many samples: against rationals, dense elimination, and its own counted bound."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st

import markovsafety as ms
from markovsafety.bench import families
from markovsafety.hitting import device
from markovsafety.hitting.elimination_program import program


@st.composite
def problems(draw):
    """A cyclic class of n states, at least one of which leaks, and the pattern of a batch."""
    n, extra = draw(st.integers(2, 9)), draw(st.integers(0, 12))
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    P = np.zeros((n + 2, n + 2))
    P[np.arange(n), (np.arange(n) + 1) % n] = rng.random(n) + 0.01
    P[rng.integers(0, n, extra), rng.integers(0, n, extra)] += rng.random(extra)
    leak = 10.0 ** -draw(st.integers(0, 15))
    for i in {0, *rng.integers(0, n, 2).tolist()}:
        P[i, n:] = leak * rng.random(2) + leak / 100
    P[:n] /= P[:n].sum(axis=1, keepdims=True)
    P[n, n] = P[n + 1, n + 1] = 1
    return ms.Chain(P, {"harm": n, "benign": n + 1}), rng


@settings(derandomize=True, deadline=None, max_examples=60)
@given(problems(), st.integers(1, 11))
def test_samples_hold_the_rational_answer(problem, size):
    chain, rng = problem
    values = chain.P.data * rng.uniform(0.5, 2, (size, chain.P.nnz))
    batch = device.batch(chain, "harm")
    if not batch.pattern.cyclic:
        return
    assert batch._program is not None or len(batch._parts[0]) - 1 < 5
    solved = batch.solve(values)
    assert solved.again.size == 0
    for b in (0, size - 1):
        W = sp.csr_array((values[b], chain.P.indices, chain.P.indptr), shape=chain.P.shape).toarray()
        W[-2:] = chain.P.toarray()[-2:]
        np.fill_diagonal(W[:-2], 0)
        exact = _rational(W)
        for i, h in enumerate(exact):
            assert abs(float(solved.value[b, i] - h)) <= solved.error[b] * float(h) + 1e-300
    assert solved.error.max() < 1e-11


def _rational(W):
    """Elimination in fractions from rates on any scale."""
    from fractions import Fraction

    n = len(W) - 2
    A = [[Fraction(float(W[i, j])) for j in range(n + 2)] for i in range(n)]
    for k in range(n - 1, -1, -1):
        total = sum(A[k][j] for j in (*range(k), n, n + 1))
        for i in range(k):
            share = A[i][k] / total
            for j in (*range(k), n, n + 1):
                if j != i:
                    A[i][j] += share * A[k][j]
        A[k][n + 1] = total
    h = []
    for k in range(n):
        h.append((A[k][n] + sum(A[k][j] * h[j] for j in range(k))) / A[k][n + 1])
    return [*h, Fraction(1), Fraction(0)]


def test_plan_and_dense_elimination_agree(monkeypatch):
    rng = np.random.default_rng(1)
    n = 60
    P = sp.random_array((n, n), density=0.05, rng=rng).toarray()
    P[np.arange(n), (np.arange(n) + 1) % n] += 0.2
    P = np.block([[P, 1e-9 * rng.random((n, 2))], [np.zeros((2, n)), np.eye(2)]])
    P[:n] /= P[:n].sum(axis=1, keepdims=True)
    chain = ms.Chain(P, {"harm": n, "benign": n + 1})
    values = chain.P.data * rng.uniform(0.5, 2, (20, chain.P.nnz))
    planned = device.batch(chain, "harm")
    assert planned._program is not None
    dense = device.batch(chain, "harm")
    monkeypatch.setattr(type(dense), "_program", None)
    both = dense.solve(values), planned.solve(values)
    assert np.abs(both[0].value - both[1].value).max() < 1e-13


def test_a_pattern_that_fills_up_has_no_plan():
    n = 40
    ptr, col = np.arange(0, n * n + 1, n), np.tile(np.arange(n), n)
    assert program(ptr, col, 10_000) is None
    assert program(ptr, col, 30_000) is not None


def test_path_like_patterns_fill_nothing():
    """A ring has one way in and one way out everywhere: no entry is added but where two ways meet in one."""
    n = 1000
    plan = program(np.arange(n + 1), (np.arange(n) + 1) % n)
    assert plan is not None
    assert sorted(plan.order.tolist()) == list(range(n))
    assert plan.slots <= 2 * n
    assert len(plan.into) <= n


@pytest.mark.parametrize("bad", [np.nan, -0.1, np.inf])
def test_a_bad_sample_is_named(bad):
    P = np.array([[0, 0.9, 0.1, 0], [0.5, 0, 0, 0.5], [0, 0, 1, 0], [0, 0, 0, 1.0]])
    chain = ms.Chain(P, {"harm": 2, "benign": 3})
    values = np.tile(chain.P.data, (3, 1))
    values[1, 0] = bad
    with pytest.raises(ms.InputError, match="Sample 1"):
        device.batch(chain, "harm").solve(values)


def test_samples_far_from_the_chain_are_still_proven_together():
    """A lift of the chain itself is none for every sample; sweeps make it theirs."""
    problem = families.kgram(vocabulary=16, order=2, successors=8, leak=1e-3)
    drawn = families.posterior(problem, samples=40, strength=5.0)
    batch = device.batch(problem.chain(), "harm")
    assert batch._program is None
    solved = batch.solve(drawn.entries())
    assert solved.again.size == 0
    for b in (0, 17, 39):
        alone = ms.hitting_probability(drawn.sample(b).chain(), "harm")
        assert np.abs(solved.value[b] - alone.value).max() <= solved.error[b] + 1e-15
