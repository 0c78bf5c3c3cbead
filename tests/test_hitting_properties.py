"""What must hold of every hitting probability, whichever method made it: symmetries, order, agreement, enclosure."""

from __future__ import annotations

from fractions import Fraction as F

import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st

import markovsafety as ms

SEEDS = st.integers(0, 2**32 - 1)
quick = settings(derandomize=True, deadline=None, max_examples=40)
few = settings(derandomize=True, deadline=None, max_examples=12)
METHODS = ("auto", "elimination", "sparse")


def chain_of(P, n, start=0):
    return ms.Chain(P, {"harm": n, "refusal": n + 1}, start=start)


def cyclic(rng, n, spread, leak):
    """A strongly connected class whose rates span `spread` orders of magnitude, and which leaks a little."""
    P = np.zeros((n + 2, n + 2))
    P[:n, :n] = 10.0 ** -rng.uniform(0, spread, (n, n)) * (rng.random((n, n)) < rng.uniform(0.2, 1))
    P[np.arange(n), np.roll(np.arange(n), -1)] += 10.0 ** -rng.uniform(0, spread, n)
    P[np.arange(n), np.arange(n)] = 0
    P[:n] /= P[:n].sum(axis=1, keepdims=True)
    out = rng.random((n, 2)) * (rng.random((n, 1)) < 0.5)
    out[rng.integers(n)] += rng.random(2)
    P[:n, n:] = leak * out
    P[:n] /= P[:n].sum(axis=1, keepdims=True)
    return P


def haddad(N, p):
    """Two arms of N states, each toss forward or back to the start: condition number 4^N (Haddad and Monmege 2018)."""
    n = 2 * N + 1
    P = np.zeros((n + 2, n + 2))
    P[0, 1], P[0, N + 1] = p, 1 - p
    for first, end in ((1, n), (N + 1, n + 1)):
        for i in range(first, first + N):
            P[i, i + 1 if i < first + N - 1 else end] += 0.5
            P[i, 0] += 0.5
    return P, n


def blocks_of(rng, n, bridge):
    """Two classes of n states, joined by a bridge: nearly decomposable."""
    P = np.zeros((2 * n + 2, 2 * n + 2))
    for at in (0, n):
        P[at : at + n, at : at + n] = rng.random((n, n))
    P[0, n], P[n, 0] = bridge, bridge * rng.random()
    P[1, 2 * n], P[n + 1, 2 * n + 1] = bridge**1.5, bridge * rng.random()
    P[: 2 * n] /= P[: 2 * n].sum(axis=1, keepdims=True)
    return P, 2 * n


def inside(lower, known, upper):
    return all((lo <= 0 or F(float(lo)) <= v) and v <= F(float(up)) for lo, v, up in zip(lower, known, upper))


def checked(chain, width=None):
    """Every method's enclosure holds the rational answer; returns the rational answer."""
    known = ms.hitting_probability(chain, "harm", method="exact").info["exact"]
    for method in METHODS:
        try:
            bound = ms.hitting_probability(chain, "harm", method=method)
        except ms.UntrustedError as error:
            bound = error.partial
            assert method == "sparse" or width is None
        assert inside(bound.lower, known, bound.upper), method
        assert ((bound.value >= bound.lower) & (bound.value <= bound.upper))[~np.isnan(bound.value)].all()
        if width is not None and method != "sparse":
            assert (bound.upper - bound.lower <= width * bound.upper).all()
    return known


@quick
@given(seed=SEEDS, spread=st.sampled_from([0.5, 10.0, 80.0]), leak=st.sampled_from([1.0, 1e-6, 1e-15]))
def test_enclosures_hold_the_truth_on_cycles(seed, spread, leak):
    rng = np.random.default_rng(seed)
    n = int(rng.integers(2, 14))
    checked(chain_of(cyclic(rng, n, spread, leak), n), 1e-9)


@few
@given(seed=SEEDS, bridge=st.sampled_from([1e-3, 1e-9, 1e-15]))
def test_enclosures_hold_the_truth_on_nearly_decomposable_chains(seed, bridge):
    P, n = blocks_of(np.random.default_rng(seed), 6, bridge)
    checked(chain_of(P, n), 1e-9)


@few
@given(seed=SEEDS, spread=st.sampled_from([200.0, 305.0]))
def test_enclosures_hold_the_truth_where_numbers_underflow(seed, spread):
    rng = np.random.default_rng(seed)
    n = int(rng.integers(2, 6))
    P = cyclic(rng, n, spread, 1e-300)
    P[0, n] = 5e-324
    checked(chain_of(P, n))


@pytest.mark.parametrize("N", [4, 20, 100])
def test_haddad_monmege(N):
    P, n = haddad(N, 0.7)
    known = checked(chain_of(P, n), 1e-9)
    assert known[0] == F(0.7) / (F(0.7) + F(1 - 0.7))


@quick
@given(seed=SEEDS, method=st.sampled_from(METHODS))
def test_numbering_of_states_changes_nothing(seed, method):
    rng = np.random.default_rng(seed)
    n = int(rng.integers(2, 12))
    P = cyclic(rng, n, 5.0, 1e-3)
    order = rng.permutation(n + 2)
    place = np.argsort(order)
    turned = ms.Chain(P[order][:, order], {"harm": place[n], "refusal": place[n + 1]}, start=int(place[0]))
    one = ms.hitting_probability(chain_of(P, n), "harm", method=method)
    other = ms.hitting_probability(turned, "harm", method=method)
    assert (one.lower[order] <= other.upper).all()
    assert (other.lower <= one.upper[order]).all()
    assert other.value == pytest.approx(one.value[order], rel=1e-12)
    exact = [ms.hitting_probability(c, "harm", method="exact").info["exact"] for c in (chain_of(P, n), turned)]
    assert [exact[0][i] for i in order] == exact[1]


@quick
@given(seed=SEEDS, leak=st.sampled_from([1e-1, 1e-8]))
def test_more_harm_never_lowers_the_probability(seed, leak):
    """Mass moved from any entry to the harm of the same row raises the answer, in rationals and in enclosures."""
    rng = np.random.default_rng(seed)
    n = int(rng.integers(2, 10))
    P = cyclic(rng, n, 3.0, leak)
    more = P.copy()
    i = int(rng.integers(n))
    j = int(rng.choice(np.flatnonzero((P[i] > 0) & (np.arange(n + 2) != n))))
    moved = P[i, j] * rng.uniform(0.1, 1)
    more[i, j] -= moved
    more[i, n] += moved
    before, after = (ms.hitting_probability(chain_of(Q, n), "harm") for Q in (P, more))
    exact = [ms.hitting_probability(chain_of(Q, n), "harm", method="exact").info["exact"] for Q in (P, more)]
    assert all(a <= b for a, b in zip(*exact))
    assert exact[0][i] < exact[1][i] or exact[0][i] == 1
    assert (before.lower <= after.upper).all()


@few
@given(seed=SEEDS)
def test_all_methods_agree_on_a_layered_chain(seed):
    """Layered, unrolled into one matrix, eliminated, iterated, in rationals: one answer."""
    rng = np.random.default_rng(seed)
    n, L = int(rng.integers(2, 5)), int(rng.integers(1, 5))
    layers = []
    for _ in range(L):
        P = rng.random((n + 2, n + 2)) * (rng.random((n + 2, n + 2)) < 0.7)
        P[:, 0] += 10.0 ** -rng.uniform(0, 12)
        P = np.array([rng.multinomial(2**40, row / row.sum()) for row in P]) / 2.0**40  # rows sum to one exactly
        P[n:] = 0
        layers.append(P)
    chain = ms.Chain.layered(layers, {"harm": n, "refusal": n + 1}, start=0)
    known = ms.hitting_probability(chain, "harm", method="exact").info["exact"]
    grid = [[None] * (L + 1) for _ in range(L + 1)]
    for t, P in enumerate(layers):
        grid[t][t + 1] = sp.csr_array(P)
    grid[0][0] = grid[L][L] = sp.csr_array((n + 2, n + 2))
    ends = {name: [t * (n + 2) + k for t in range(L + 1)] for name, k in (("harm", n), ("refusal", n + 1))}
    ends["truncated"] = [L * (n + 2) + i for i in range(n)]
    whole = ms.Chain(sp.block_array(grid), ends, start=0)
    answers = [ms.hitting_probability(chain, "harm")]
    answers += [ms.hitting_probability(whole, "harm", method=m) for m in ("auto", "layered", *METHODS)]
    for bound in answers:
        flat = [x.reshape(L + 1, n + 2) for x in (bound.lower, bound.value, bound.upper)]
        for t in range(L + 1):
            free = list(range(n + 2)) if t < L else [n, n + 1]
            assert inside(flat[0][t][free], [known[t][i] for i in free], flat[2][t][free])
            assert flat[1][t][free] == pytest.approx([float(known[t][i]) for i in free], rel=1e-13)


@quick
@given(seed=SEEDS, leak=st.sampled_from([1e-1, 1e-10]))
def test_committors_share_the_hits(seed, leak):
    """P(a before b) + P(b before a) = P(either)."""
    rng = np.random.default_rng(seed)
    n = int(rng.integers(3, 10))
    chain = chain_of(cyclic(rng, n, 4.0, leak), n)
    a, b = "harm", [0, 1]
    first, second = ms.committor(chain, a, b), ms.committor(chain, b, a)
    either = ms.hitting_probability(chain, [0, 1, n])
    assert first.value + second.value == pytest.approx(either.value, rel=1e-12)
    assert (first.lower + second.lower <= either.upper * (1 + 1e-15)).all()
    assert (first.upper + second.upper >= either.lower * (1 - 1e-15)).all()


@few
@given(seed=SEEDS)
def test_counts_of_any_size_are_solved_exactly(seed):
    """Integer counts up to 2^62: the enclosure holds the answer of the counts, not that of their rounded shares."""
    rng = np.random.default_rng(seed)
    n = int(rng.integers(2, 9))
    C = np.zeros((n + 2, n + 2), dtype=np.int64)
    C[:n] = rng.integers(0, 2**57, (n, n + 2)) * (rng.random((n, n + 2)) < 0.6) + 1
    chain = ms.Chain.from_counts(C, {"harm": n, "refusal": n + 1}, start=0)
    known = checked(chain, 1e-12)
    total = [int(sum(row)) for row in C.tolist()]
    for i in range(n):  # the equation, in integers
        assert total[i] * known[i] == sum(c * v for c, v in zip(C[i].tolist(), known))


@pytest.mark.parametrize("leak", [1e-2, 1e-6, 1e-12])
def test_a_class_of_hundreds_in_rationals(leak):
    rng = np.random.default_rng(3)
    n, k = 220, 6
    P = np.zeros((n + 2, n + 2))
    for i in range(n):
        P[i, rng.choice(n, k, replace=False)] = rng.random(k)
        P[i, (i + 1) % n] += 0.1
    P[:n] /= P[:n].sum(axis=1, keepdims=True)
    P[:n, n:] = leak * rng.random((n, 2))
    P[:n] /= P[:n].sum(axis=1, keepdims=True)
    checked(chain_of(P, n), 1e-11)


def test_an_enclosure_that_says_nothing_is_no_answer():
    """Exits of one unit in the last place of the smallest number: all methods in floating point end at [0, 1]."""
    P = np.array([[0, 1, 5e-324, 0], [1, 0, 0, 5e-324], [0, 0, 0, 0], [0, 0, 0, 0]])
    chain = ms.Chain(P, {"harm": 2, "refusal": 3}, start=0)
    for method in METHODS:
        with pytest.raises(ms.UntrustedError) as caught:
            ms.hitting_probability(chain, "harm", method=method)
        assert caught.value.partial.lower[:2].tolist() == [0, 0]
        assert caught.value.partial.upper[:2].tolist() == [1, 1]
    known = ms.hitting_probability(chain, "harm", method="exact").info["exact"]
    assert known[0] == (1 + F(5e-324)) / (2 + F(5e-324))
