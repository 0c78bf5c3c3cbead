"""Bad and borderline input: each gives the answer of rational arithmetic, or an error with fact, cause, next action."""

from __future__ import annotations

from fractions import Fraction as F

import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st

import markovsafety as ms
from markovsafety.hitting import rates

SEEDS = st.integers(0, 2**32 - 1)
quick = settings(derandomize=True, deadline=None, max_examples=30)
METHODS = ("auto", "elimination", "sparse", "exact")
P4 = np.array([[0, 0.5, 0.25, 0.25], [0.3, 0.3, 0.2, 0.2], [0, 0, 0, 0], [0, 0, 0, 0]])
ENDS = {"harm": 2, "refusal": 3}
CHAIN = ms.Chain(P4, ENDS, start=0)


def refused(call, *names):
    """The error of a call; it has three parts, and names what offends."""
    with pytest.raises(ms.MarkovsafetyError) as caught:
        call()
    error = caught.value
    assert error.fact.strip()
    assert error.cause.strip()
    assert error.next.strip()
    for name in names:
        assert name in error.fact, (name, error.fact)
    return error


def solved(P, ends=ENDS, target="harm"):
    """Every method's answer, checked against rationals."""
    chain = ms.Chain(P, ends)
    known = ms.hitting_probability(chain, target, method="exact").info["exact"]
    for method in METHODS:
        bound = ms.hitting_probability(chain, target, method=method)
        assert all(F(float(a)) <= v <= F(float(b)) for a, v, b in zip(bound.lower, known, bound.upper))
        assert bound.value == pytest.approx([float(v) for v in known], rel=1e-13)
    return known


def random_matrix(seed, n=6):
    rng = np.random.default_rng(seed)
    P = rng.random((n + 2, n + 2)) * (rng.random((n + 2, n + 2)) < 0.6)
    P[:, n] += 0.01
    P /= P.sum(axis=1, keepdims=True)
    P[n:] = 0
    return P, {"harm": n, "refusal": n + 1}, rng


@quick
@given(seed=SEEDS, value=st.sampled_from([np.nan, np.inf, -np.inf, -0.1, -1e-300]), sparse=st.booleans())
def test_an_impossible_entry_is_named(seed, value, sparse):
    P, ends, rng = random_matrix(seed)
    i, j = (int(v) for v in rng.integers(6, size=2))
    P[i, j] = value
    refused(lambda: ms.Chain(sp.csr_array(P) if sparse else P, ends), f"{value:g}", f"state {i}", f"state {j}")


@quick
@given(seed=SEEDS, off=st.sampled_from([1e-8, -1e-8, 0.5, -1.0, 1e300]))
def test_a_row_that_is_no_law_is_named(seed, off):
    P, ends, rng = random_matrix(seed)
    i = int(rng.integers(6))
    P[i] *= 1 + off
    refused(lambda: ms.Chain(P, ends), f"state {i}", "sums to")
    P[i] *= 0  # a zero row is an end, and has to be named as one
    assert "outcome" in refused(lambda: ms.Chain(P, ends), f"state {i}").cause
    P[i] = 0
    if i:
        solved(P, ends | {"benign": i})


@quick
@given(seed=SEEDS)
def test_rows_within_tolerance_are_read_as_given(seed):
    P, ends, rng = random_matrix(seed)
    P[:6] *= 1 + rng.uniform(-9e-10, 9e-10, (6, 1))
    known = solved(P, ends)
    for i in range(6):  # off-diagonal entries define the chain
        moves = [(F(float(P[i, j])), known[j]) for j in range(8) if j != i]
        assert sum((w * v for w, v in moves), F(0)) == known[i] * sum((w for w, _ in moves), F(0))


def test_shapes_and_types_that_are_no_matrix():
    for bad in (P4[:2], P4[:, :2], P4[0], np.zeros((0, 0)), [], None, {}, "P", [[1, 0], [1]], [["a", "b"], ["c", "d"]]):
        refused(lambda bad=bad: ms.Chain(bad, {"harm": 1}), "P ")
    for bad in (P4 + 0j, sp.csr_array(P4 + 0j), P4.astype("datetime64[s]"), P4[None]):
        refused(lambda bad=bad: ms.Chain(bad, ENDS), "P ")
    refused(lambda: ms.Chain(P4, ENDS, start=np.array([1, 0, 0, 0j])), "start")
    refused(lambda: ms.Chain(P4, ENDS, start=[0.5, 0.5, 0.5, 0]), "start", "1.5")
    refused(lambda: ms.Chain(P4, ENDS, start=[1, 0]), "start")
    refused(lambda: ms.Chain(P4, ENDS, start=4), "start", "4")
    refused(lambda: ms.Chain.layered([P4, P4[:2, :2]], ENDS), "layer 1")


def test_types_that_are_matrices_give_one_answer():
    known = solved(P4)
    forms = [f(P4) for f in (sp.csr_array, sp.csc_array, sp.coo_array, sp.lil_array, sp.dok_array, sp.bsr_array)]
    forms += [P4.tolist(), P4.astype(object), np.asfortranarray(P4), P4.astype(">f8"), P4.astype(np.longdouble)]
    for form in forms:
        assert solved(form) == known
    assert solved(np.array([[0, 1, 0], [0, 0, 1], [0, 0, 0]], dtype=bool), {"harm": 2}) == [1, 1, 1]
    third = [[0, F(1, 4), F(1, 2), F(1, 4)], [F(1, 2), 0, F(1, 2), 0], [0] * 4, [0] * 4]
    assert solved(third) == [F(5, 7), F(6, 7), 1, 0]


def test_smallest_chains():
    for P in ([[1.0]], [[0.0]]):
        chain = ms.Chain(P, {"harm": 0}, start=0)
        for method in METHODS:
            assert ms.hitting_probability(chain, "harm", method=method).value.tolist() == [1]
        assert ms.hitting_time(chain).value.tolist() == [0]
        assert ms.visits(chain).value.tolist() == [1]
    two = ms.Chain([[0.5, 0.5], [0, 0]], {"harm": 1}, start=0)
    assert ms.hitting_probability(two, "harm").lower.tolist() == [1, 1]
    assert ms.hitting_time(two).at_start.value == 2


@quick
@given(seed=SEEDS, wide=st.booleans())
def test_duplicates_are_summed_and_order_does_not_matter(seed, wide):
    P, ends, rng = random_matrix(seed)
    P = np.round(P * 2**20) / 2**20  # so that halves add up again exactly
    P[:6, 6] += 1 - P[:6].sum(axis=1)
    i, j = np.nonzero(P)
    twice = rng.permutation(np.repeat(np.arange(len(i)), 2))
    twice = twice[np.argsort(i[twice], kind="stable")]
    kind = np.int64 if wide else np.int32
    parts = (
        (P[i, j] / 2)[twice],
        j[twice].astype(kind),
        np.concatenate([[0], np.cumsum(np.bincount(i[twice], minlength=8))]),
    )
    messy = sp.csr_array((parts[0], parts[1], parts[2].astype(kind)), shape=P.shape)
    before = messy.data.copy(), messy.indices.copy()
    assert solved(messy, ends) == solved(P, ends)
    assert (messy.data == before[0]).all()  # the caller's matrix is left as it was
    assert (messy.indices == before[1]).all()


def test_indices_that_point_nowhere_are_refused():
    for change in (("indices", 0, 9), ("indices", 0, -1), ("indptr", 1, 9), ("indptr", 2, 1)):
        P = sp.csr_array(P4)
        part = getattr(P, change[0]).copy()
        part[change[1]] = change[2]
        setattr(P, change[0], part)
        refused(lambda P=P: ms.Chain(P, ENDS), "P ")


def test_more_than_two_thousand_million_entries_need_long_indices():
    """The choice of type alone; nobody makes such a matrix here."""
    for n, kind in ((2**31 - 1, np.int32), (2**31, np.int64)):
        assert sp.get_index_dtype(maxval=n) == kind
    long = sp.csr_array(P4)
    long.indices, long.indptr = long.indices.astype(np.int64), long.indptr.astype(np.int64)
    assert solved(long) == solved(P4)
    r = rates.rates_of(ms.Chain(long, ENDS))
    assert np.iinfo(r.W.indptr.dtype).max >= r.W.nnz


@pytest.mark.parametrize(
    ("target", "names"),
    [
        ([], ["target", "empty"]),
        ((), ["target", "empty"]),
        (np.zeros(4, bool), ["target", "empty"]),
        (np.ones(3, bool), ["target", "(3,)"]),
        (np.ones((4, 1), bool), ["target", "(4, 1)"]),
        ([True, False], ["target", "(2,)"]),
        ("benign", ["'benign'"]),
        (["harm", "x"], ["'x'"]),
        (7, ["7"]),
        ([0, 7], ["7"]),
        (-1, ["-1"]),
        (10**30, [str(10**30)]),
        (2.5, ["2.5"]),
        (True, ["True"]),
        (None, ["None"]),
        (np.nan, ["nan"]),
        ([[1, 2]], ["[[1, 2]]"]),
        (1j, ["1j"]),
    ],
)
def test_targets_that_name_nothing(target, names):
    refused(lambda: ms.hitting_probability(CHAIN, target), *names)
    refused(
        lambda: ms.hitting_time(CHAIN, target if target is not None else 2.5), *(names if target is not None else [])
    )
    refused(lambda: ms.committor(CHAIN, target, "harm"), *([] if target is None else names[1:]))


@quick
@given(seed=SEEDS)
def test_target_as_its_complement_and_as_everything(seed):
    P, ends, rng = random_matrix(seed)
    some = rng.random(8) < 0.5
    some[0], some[7] = True, False
    for mask in (some, ~some):
        known = solved(P, ends, mask)
        assert all(v == 1 for v, hit in zip(known, mask) if hit)
    assert solved(P, ends, np.ones(8, bool)) == [1] * 8
    chain = ms.Chain(P, ends)
    assert (ms.committor(chain, some, ~some).value == ~some).all()  # every state is in one of the two
    both = np.flatnonzero(some)[0]
    refused(lambda: ms.committor(chain, some, [int(both), 7]), f"tate {both}")


@quick
@given(seed=SEEDS, size=st.integers(1, 4))
def test_trapped_classes_are_exactly_zero_and_infinite(seed, size):
    P, ends, rng = random_matrix(seed)
    P[:6, 7] += 0.01
    P[:6] /= P[:6].sum(axis=1, keepdims=True)
    P[:size] = 0
    P[:size, :size] = rng.dirichlet(np.ones(size), size)
    chain = ms.Chain(P, ends, start=5)
    solved(P, ends)
    bound, time = ms.hitting_probability(chain, "harm"), ms.hitting_time(chain)
    assert (bound.value[:size] == 0).all()
    assert (bound.upper[:size] == 0).all()
    assert np.isinf(time.value[:size]).all()
    assert np.isinf(ms.hitting_time(chain, "harm").value[:6]).all()  # refusal or the trap may come first
    assert np.isnan(ms.hitting_time(chain, "harm", given=True).value[:size]).all()
    assert time.lower[:size].tolist() == [np.inf] * size


def test_outcomes_and_states_in_one_target():
    known = solved(P4, target=["harm", 1])
    assert known == [F(3, 4), 1, 1, 0]
    refused(lambda: ms.hitting_probability(CHAIN, ["harm", 9]), "9")


@pytest.mark.parametrize("level", [0, 1, 1.0, -0.5, 95, np.nan, np.inf, None, "x", [0.9, 0.95]])
def test_levels_out_of_range(level):
    for call in (ms.hitting_probability, ms.hitting_time):
        refused(lambda call=call: call(CHAIN, "harm", level=level), "level")


@pytest.mark.parametrize("reward", [[1, 2, np.nan, 0], [np.inf, 0, 0, 0], [1], "x", [1j, 0, 0, 0]])
def test_rewards_that_are_none(reward):
    refused(lambda: ms.hitting_time(CHAIN, reward=reward), "reward")


@pytest.mark.parametrize(
    ("counts", "names"),
    [
        ([[0, -1], [0, 0]], ["-1"]),
        ([[0, 1.5], [0, 0]], ["1.5"]),
        ([[0, np.nan], [0, 0]], ["nan"]),
        ([[0, 2**63], [0, 0]], ["9.2"]),
        (np.array([[0, 2**70], [0, 0]], dtype=object), [str(2**70)]),
        ([[0, 0], [0, 0]], ["state 0", "no counts"]),
        ([[0, 1, 1]], ["(1, 3)"]),
        (np.array([[0, 1j], [0, 0]]), []),
        ([[2**62, 2**62], [0, 0]], ["state 0"]),
        (sp.coo_array((np.array([2**62, 2**62]), ([0, 0], [1, 1])), shape=(2, 2)), ["state 0"]),
    ],
)
def test_counts_that_are_none(counts, names):
    refused(lambda: ms.Chain.from_counts(counts, {"harm": 1}), *names)


def test_large_counts_are_kept_whole():
    C = [[0, 2**61, 2**61 + 1, 0], [2**62 + 1, 0, 0, 3], [0] * 4, [0] * 4]
    chain = ms.Chain.from_counts(C, ENDS)
    known = ms.hitting_probability(chain, "harm", method="exact").info["exact"]
    a, b = F(2**61, 2**62 + 1), F(2**62 + 1, 2**62 + 4)
    assert known[0] == (1 - a) / (1 - a * b)
    bound = ms.hitting_probability(chain, "harm")
    assert F(float(bound.lower[0])) <= known[0] <= F(float(bound.upper[0]))
    twice = sp.coo_array((np.array([2**30] * 3, np.int32), ([0, 0, 0], [1, 1, 1])), shape=(2, 2))
    assert ms.Chain.from_counts(twice, {"harm": 1}).integer_counts.data.tolist() == [3 * 2**30]
