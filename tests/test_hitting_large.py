"""The iterative road of large cyclic classes: solver, certificate, and what the certificate refuses."""

from __future__ import annotations

from fractions import Fraction as F

import numpy as np
import pytest
import scipy.sparse as sp

import markovsafety as ms
from markovsafety.chains import KGram, count, estimate
from markovsafety.hitting import blocks, certify, core, krylov, rates, sparse
from markovsafety.hitting.cyclic import Cyclic, Room
from markovsafety.rollouts.rollouts import Rollouts

LEAKS = (1e-2, 1e-4, 1e-6, 1e-9, 1e-12)


def leaky(seed, leak, n=40):
    """One cyclic class of n states that is left with probability `leak` at most, from a third of its states."""
    rng = np.random.default_rng(seed)
    P = np.zeros((n + 2, n + 2))
    P[np.arange(n), np.roll(np.arange(n), 1)] = 0.5
    for i in range(n):
        P[i, rng.choice(n, 3, replace=False)] += rng.random(3)
    P[np.arange(n), np.arange(n)] = 0
    P /= np.maximum(P.sum(axis=1, keepdims=True), 1e-300)
    out = rng.choice(n, n // 3, replace=False)
    P[out] *= 1 - leak
    P[out, n + rng.integers(2, size=len(out))] += leak * rng.random(len(out))
    P[n:] = 0
    P /= np.maximum(P.sum(axis=1, keepdims=True), 1e-300)
    return ms.Chain(P, {"harm": n, "refusal": n + 1}, start=0)


def holds(lower, known, upper):
    return all(F(float(lo)) <= v <= F(float(up)) for lo, v, up in zip(lower, known, upper))


def the_class(chain):
    """The class, the known values, and the exact answer on it."""
    r, walk = rates.rates_of(chain), core.walk(chain, "harm")
    own = np.flatnonzero(~chain.outcome_mask)
    known = ms.hitting_probability(chain, "harm", method="exact").info["exact"]
    X = np.repeat(walk.hit.astype(float)[:, None], 3, axis=1)
    return r, Cyclic(r, own, Room.of(r.n)), X, [known[i] for i in own]


@pytest.mark.parametrize("which", ["krylov", "lu"])
@pytest.mark.parametrize("leak", LEAKS)
def test_sparse_road_holds_the_rational_answer(which, leak):
    for seed in range(2):
        _, c, X, known = the_class(leaky(seed, leak))
        zero = np.zeros((len(c.own), 3))
        if which == "krylov":
            x = krylov.solve(c.rates, c.mixer, X, zero, c.room.values, 1.0)
        else:
            x = blocks._factored_class(c, X, zero, 1.0)
        assert x is not None
        assert holds(x[:, 1], known, x[:, 2])
        assert (x[:, 2] - x[:, 1]).max() <= 1e-14 / leak  # some roundings, times the time spent in the class


@pytest.mark.parametrize("leak", LEAKS[:4])  # columns have no difference form: at 1e-12 elimination is needed
def test_sparse_road_of_visits_holds_the_rational_answer(leak, monkeypatch):
    monkeypatch.setattr(blocks, "_order", lambda how, c: (["krylov"], ""))
    chain = leaky(3, leak, n=25)
    seen = ms.visits(chain)
    known = ms.hitting_probability(chain, "harm", method="exact").at_start.info["exact"]
    at = chain.outcomes["harm"][0]
    assert holds([seen.lower[at]], [known], [seen.upper[at]])
    assert np.isfinite(seen.upper).all()


@pytest.mark.parametrize("leak", LEAKS)
def test_a_shifted_answer_is_not_certified(leak, monkeypatch):
    """Off by 1e-6, it gets no enclosure, or one that shows it, or is corrected."""
    chain = leaky(1, leak)
    _, c, X, known = the_class(chain)
    zero, good = np.zeros((len(c.own), 3)), sparse.factor(c.parts[0], c.out)
    assert good is not None
    x = np.array([float(v) for v in known]) + 1e-6
    ends = certify.enclose(c.rows, c.own, X, x, zero, lambda g: 0 * g, 1.0)
    assert ends is None or (holds(ends[0], known, ends[1]) and (ends[1] - ends[0] >= 2e-6).all())
    for solve in (lambda g: g / c.out, good):  # these can correct it, one poorly, one well
        ends = certify.enclose(c.rows, c.own, X, x, zero, solve, 1.0)
        assert ends is None or holds(ends[0], known, ends[1])
    honest = sparse.refined

    def shifted(*a):
        x = honest(*a)
        return None if x is None else x + 1e-6

    monkeypatch.setattr(sparse, "refined", shifted)
    bound = ms.hitting_probability(chain, "harm", method="sparse")
    assert holds(bound.lower[c.own], known, bound.upper[c.own])
    assert (bound.upper - bound.lower).max() <= 1e-9  # elimination's


def stops_when_small(solve, scale):
    """A solver that gives up on small right-hand sides, as iterations with an absolute tolerance do."""
    return lambda g: solve(g) if np.abs(g).max() > 1e-13 else g * scale


@pytest.mark.parametrize("leak", LEAKS)
def test_a_solver_that_gives_up_does_not_stop_the_proof(leak):
    r, c, X, known = the_class(leaky(2, leak))
    zero = np.zeros((len(c.own), 3))
    x = np.array([float(v) for v in known])
    weak = stops_when_small(sparse.factor(c.parts[0], c.out), 1 / c.out)
    ends = certify.enclose(c.rows, c.own, X, x, zero, weak, 1.0)
    assert ends is not None
    assert holds(ends[0], known, ends[1])
    assert (ends[1] - ends[0]).max() <= 1e-13 / leak
    into = sp.csr_array(c.parts[0].T.tocsr())
    source = np.zeros((len(c.own), 3))
    source[0] = 1.0
    z = np.linalg.solve(np.diag(c.out) - into.toarray(), source[:, 0])
    weak = stops_when_small(sparse.factor(c.parts[0], c.out, flow=True), 1 / c.out)
    ends = certify.enclose_flow(into, c.out, z, source, weak, r.terms[c.own])
    if leak >= 1e-9:  # beyond, columns have no digits left to prove anything with
        assert ends is not None
        assert (ends[1] - ends[0]).max() <= 1e-12 / leak**2


def test_tiny_right_hand_sides_are_solved_like_large_ones():
    _, c, _, _ = the_class(leaky(0, 1e-2))
    b = np.random.default_rng(0).random(len(c.own))
    for flow in (False, True):
        solve = sparse.krylov(c.parts[0], c.out, flow=flow)
        A = sparse._matrix(c.parts[0], c.out)
        A = A.T if flow else A
        assert np.linalg.norm(A @ solve(b) - b) <= 1e-7 * np.linalg.norm(b)
        assert (solve(np.ldexp(b, -200)) == np.ldexp(solve(b), -200)).all()  # powers of two round nothing
        assert (solve(0 * b) == 0).all()


def test_estimated_two_gram_chain_is_certified_by_iteration():
    """Words drawn by Zipf's law: the class is wide, its factors are dense, and what leaves it is small."""
    rng, n, length, words = np.random.default_rng(0), 250, 64, 1000
    law = 1 / np.arange(1, words + 1) ** 1.1
    rolls = Rollouts(
        rng.choice(words, size=n * length, p=law / law.sum()).astype(np.int32),
        np.arange(n + 1) * length,
        prompt_id=np.arange(n) // 10,
        category=np.array(["x"] * n, dtype=object),
        prefill=np.zeros(n, np.int32),
        outcome=rng.choice(3, size=n, p=[0.1, 0.4, 0.5]).astype(np.int8),
        hit=np.full(n, length - 1, dtype=np.int32),
    )
    chain = estimate(count(rolls, KGram(2)))
    r, walk = rates.rates_of(chain), core.walk(chain, "harm")
    free = walk.moving & core.graph.reaching(r.W, walk.hit, walk.moving)
    known = np.repeat(walk.hit.astype(float)[:, None], 3, axis=1)
    X, report = blocks.potential(r, free, known, None, "sparse", 1.0)
    assert max(report.classes)[0] > 5000
    assert max(report.classes)[1] == "krylov"
    assert not report.failed
    assert (X[:, 2] - X[:, 1]).max() <= 1e-12
    dense = blocks.potential(r, free, known[:, :1], None, "sparse", 1.0)[0]
    assert (np.abs(dense[:, 0] - X[:, 0]) <= 1e-12).all()
