"""Chain: what it accepts, what it refuses and how it says so."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given
from made import ENDS, LABELS, P3, chain3, chains, quick

import markovsafety as ms
from markovsafety.chains import matrices
from markovsafety.chains.checks import Numbered, index_dtype

# --- what a chain is ---------------------------------------------------------------------------------------------


@quick
@given(chains())
def test_rows_are_laws_and_arrays_cannot_be_written(chain):
    for matrix in chain.layers:
        assert np.abs(matrix.sum(axis=1) - 1).max() <= 1e-9
        assert matrix.data.min() > 0
        assert matrix.has_canonical_format
        with pytest.raises(ValueError, match="read-only"):
            matrix.data[0] = 0.5
    with pytest.raises(dataclasses.FrozenInstanceError):
        chain.P = None


@pytest.mark.parametrize(
    "convert",
    [
        np.array,
        lambda P: np.array(P, dtype=np.float32),
        sp.csr_array,
        sp.csc_matrix,
        sp.coo_array,
        sp.lil_matrix,
        sp.dok_array,
        lambda P: sp.bsr_array(np.array(P)),
        lambda P: [list(row) for row in P],
    ],
)
def test_every_matrix_format_gives_the_same_chain(convert):
    assert ms.Chain(convert(P3), ENDS, 0).equals(ms.Chain(P3, ENDS, 0))


def test_duplicates_are_summed_and_zeros_are_no_transitions():
    P = sp.coo_array(([0.25, 0.25, 0.25, 0.25, 0.0], ([0, 0, 0, 0, 1], [0, 0, 1, 2, 0])), shape=(3, 3))
    chain = ms.Chain(P, ENDS, 0)
    assert chain.equals(ms.Chain(P3, ENDS, 0))
    assert chain.P.nnz == 5  # three given, two absorbing diagonals
    raw = sp.csr_array(([0.25, 0.5, 0.25, 1.0], [0, 1, 0, 1], [0, 3, 4]), shape=(2, 2))
    assert ms.Chain(raw, {"harm": 1}).P.data.tolist() == [0.5, 0.5, 1.0]


@pytest.mark.parametrize(
    "convert", [np.array, sp.csc_array, sp.coo_array, lambda P: sp.csr_array(P).astype(np.float32)]
)
def test_what_is_not_canonical_csr_of_floats_is_copied(convert):
    matrix, start = convert(np.array([[0.5, 0.5], [0.0, 1.0]])), np.array([1.0, 0])
    chain = ms.Chain(matrix, {"harm": 1}, start)
    matrix[0, 0] = 7
    start[0] = 7
    assert chain.P.toarray().tolist() == [[0.5, 0.5], [0, 1]]
    assert chain.start.tolist() == [1, 0]


@pytest.mark.parametrize("index", [np.int32, np.int64])
def test_canonical_csr_is_copied_too(index):
    """One matrix, changed in place between two chains, makes two chains; an answer already given stays that chain's."""
    matrix = sp.csr_array(np.array([[0, 0.5, 0.5], [0, 1, 0], [0, 0, 1]]))
    matrix.indices, matrix.indptr = matrix.indices.astype(index), matrix.indptr.astype(index)
    outcomes = {"harm": 1, "benign": 2}
    first = ms.Chain(matrix, outcomes), ms.Chain.layered([matrix, matrix], outcomes)
    matrix.data[:2] = [0.25, 0.75]
    second = ms.Chain(matrix, outcomes), ms.Chain.layered([matrix, matrix], outcomes)
    for made, harm in ((first, 0.5), (second, 0.25)):
        assert ms.hitting_probability(made[0], "harm").value[0] == harm
        assert ms.hitting_probability(made[1], "harm").value[0, 0] == harm
    for P in (*first[0].layers, *first[1].layers):
        assert P.indices.dtype == P.indptr.dtype == np.int32
        assert not any(x.flags.writeable for x in (P.data, P.indices, P.indptr))
        assert not any(np.shares_memory(getattr(P, k), getattr(matrix, k)) for k in ("data", "indices", "indptr"))


@pytest.mark.parametrize(
    ("data", "indices"),
    [([0.25, 0.5, 0.25, 1], [0, 1, 0, 1]), ([0.5, 0.5, 0, 1], [1, 0, 0, 1]), ([0, 0.5, 0.5, 1], [0, 1, 0, 1])],
    ids=["duplicates", "unsorted", "zeros"],
)
def test_changing_a_matrix_to_canonical_form_leaves_the_given_one_alone(data, indices):
    matrix = sp.csr_array((np.array(data, float), np.array(indices), np.array([0, 3, 4])), shape=(2, 2))
    before = [x.copy() for x in (matrix.data, matrix.indices, matrix.indptr)]
    assert ms.Chain(matrix, {"harm": 1}).P.toarray().tolist() == [[0.5, 0.5], [0, 1]]
    assert all(np.array_equal(x, y) for x, y in zip((matrix.data, matrix.indices, matrix.indptr), before))


def test_flags_of_a_matrix_changed_behind_scipys_back_are_not_believed():
    matrix = sp.csr_array(np.array([[0.5, 0.5], [0.0, 1.0]]))
    assert matrix.has_canonical_format
    matrix.indices[:2] = [1, 0]
    assert ms.Chain(matrix, {"harm": 1}).P.indices.tolist() == [0, 1, 1]


@pytest.mark.parametrize("size", [1, 7, 2000])
def test_empty_outcome_rows_anywhere_become_absorbing(size):
    n, rng = size + 1, np.random.default_rng(size)
    ends = np.sort(rng.choice(n, max(size // 2, 1), replace=False))
    P = sp.lil_array((n, n))
    for i in np.setdiff1d(np.arange(n), ends):
        P[i, rng.integers(n)] = 1.0
    want = P.tocsr() + sp.diags_array(np.isin(np.arange(n), ends).astype(float)).tocsr()
    for matrix in (P, sp.csr_array(P)):
        chain = ms.Chain(matrix, {"harm": ends})
        assert np.array_equal(chain.P.toarray(), want.toarray())
        assert chain.P.has_sorted_indices
        assert chain.outcomes["harm"].tolist() == ends.tolist()


@pytest.mark.parametrize("small", [0, 1 << 15], ids=["compiled", "numpy"])
@pytest.mark.parametrize("index", [np.int32, np.int64])
def test_the_survey_of_a_matrix_finds_every_fault(monkeypatch, small, index):
    monkeypatch.setattr(matrices, "SMALL", small)

    def look(data, indices, indptr):
        parts = np.array(data, float), np.array(indices, index), np.array(indptr, index)
        matrix = sp.csr_array((3, 3))
        matrix.data, matrix.indices, matrix.indptr = parts
        canonical, positive, sums = matrices.survey(matrix)
        return canonical, positive, sums.tolist()

    assert look([0.1, 0.2, 0.3, 4], [0, 2, 1, 0], [0, 2, 3, 4]) == (True, True, [0.1 + 0.2, 0.3, 4])
    assert look([1, 2, 3, 4], [2, 0, 1, 0], [0, 2, 3, 4]) == (False, True, [3, 3, 4])
    assert look([1, 2, 3, 4], [1, 1, 1, 0], [0, 2, 2, 4])[0] is False
    assert look([1, 2, 3], [0, 1, 3], [0, 0, 3, 3])[0] is False
    assert look([1, 2, 3], [-1, 1, 2], [0, 0, 3, 3])[0] is False
    for bad in (0, -1, nan):
        assert look([1, bad, 3], [0, 1, 2], [0, 0, 3, 3])[:2] == (True, False)
    assert look([], [], [0, 0, 0, 0]) == (True, True, [0, 0, 0])
    with pytest.raises(ms.InputError, match="numeric"):
        ms.Chain(broken(indices=[0, 9]), {"harm": 1})
    raw = sp.csr_array(([0.25, 0.25, 0.5, 1.0], [1, 0, 0, 1], [0, 3, 4]), shape=(2, 2))
    assert ms.Chain(raw, {"harm": 1}).P.toarray().tolist() == [[0.75, 0.25], [0, 1]]


def test_row_pointers_are_wide_only_where_the_non_zeros_need_it():
    assert [index_dtype(n) for n in (0, 2**31 - 1, 2**31, 2**40)] == [np.int32, np.int32, np.int64, np.int64]
    assert (index_dtype(), index_dtype(5, 2**31)) == (np.int32, np.int64)


def test_outcome_rows_absorb_when_empty_and_leak_when_given():
    P = np.array(P3)
    P[2] = [0.1, 0, 0.9]
    chain = ms.Chain(P, ENDS)
    assert chain.P.toarray().tolist() == [[0.5, 0.25, 0.25], [0, 1, 0], [0.1, 0, 0.9]]


def test_outcomes_by_index_label_mask_or_several():
    want = chain3().outcomes
    for outcomes in (
        {"harm": [1], "refusal": np.array([2])},
        {"harm": "harm", "refusal": ("a", (1, -1))},
        {"harm": np.array([False, True, False]), "refusal": [False, False, True]},
        {"harm": {1}, "refusal": range(2, 3)},
    ):
        got = ms.Chain(P3, outcomes, 0, LABELS).outcomes
        assert {k: v.tolist() for k, v in got.items()} == {k: v.tolist() for k, v in want.items()}
    several = ms.Chain(np.eye(4), {"harm": [3, 1], "none": []})
    assert several.mask("harm").tolist() == [False, True, False, True]
    assert not several.mask("none").any()


@quick
@given(chains())
def test_replacing_the_start_keeps_the_rest(chain):
    first = dataclasses.replace(chain, start=0)
    assert first.start[0] == 1
    assert dataclasses.replace(first, start=chain.start).equals(chain)


def test_start_by_index_label_or_law():
    for start in (0, np.int64(0), "begin", [1, 0, 0], np.array([1.0, 0, 0])):
        assert ms.Chain(P3, ENDS, start, LABELS).start.tolist() == [1, 0, 0]
    assert ms.Chain(P3, ENDS, ("a", (1, -1)), LABELS).start.tolist() == [0, 0, 1]
    assert ms.Chain(P3, ENDS).start is None


def test_mask_takes_outcomes_labels_indices_and_masks():
    chain = chain3()
    for target, want in (
        ("harm", [1]),
        ("begin", [0]),
        (("a", (1, -1)), [2]),
        (2, [2]),
        ([0, "harm"], [0, 1]),
        ((0, 2), [0, 2]),
        ({"begin", "harm"}, [0, 1]),
        (np.array([True, False, True]), [0, 2]),
        ([], []),
    ):
        assert np.flatnonzero(chain.mask(target)).tolist() == want
    for target in ("nothing", 3, -1, [True, False], None, 0.5, [[0]], ("q",)):
        with pytest.raises(ms.InputError):
            chain.mask(target)


def test_index_looks_labels_up_and_never_guesses():
    chain = ms.Chain(P3, ENDS, 0, [10, "harm", 0])
    assert (chain.index(10), chain.index(0)) == (0, 2)
    assert ms.Chain(P3, ENDS).index(1) == 1
    for absent in (1, "q", [0]):
        with pytest.raises(ms.InputError):
            chain.index(absent)


def test_states_without_labels_are_found_like_labels():
    chain = ms.Chain(P3, ENDS)
    assert (chain.index(2), chain.index(np.int64(0)), chain.index(1.0)) == (2, 0, 1)
    assert (dict(Numbered(3)), len(Numbered(3))) == ({0: 0, 1: 1, 2: 2}, 3)
    for absent in (3, -1, 0.5, float("nan"), float("inf"), "0", None, (0,), [0], True + 2j):
        with pytest.raises(ms.InputError):
            chain.index(absent)


def test_repr_says_what_it_is():
    assert repr(chain3()) == (
        "<Chain 3 states, homogeneous, 5 transitions; outcomes harm (1), refusal (1); start: state 0 ('begin')>"
    )
    layered = ms.Chain.layered([P3, P3], ENDS, [0.5, 0.5, 0])
    assert repr(layered) == (
        "<Chain 3 states, 2 layers, 10 transitions; outcomes harm (1), refusal (1); start: a law over 2 states>"
    )


# --- what it refuses ---------------------------------------------------------------------------------------------

nan = float("nan")


FOUR = sp.coo_array(([2**62] * 4, ([0] * 4, [1] * 4)), shape=(2, 2))  # one entry of 2**64, which no int64 holds


def broken(data=(1.0, 1.0), indices=(1, 1), indptr=(0, 1, 2)):
    """A CSR matrix whose arrays were changed behind scipy's back."""
    matrix = sp.csr_array(np.array([[0, 1.0], [0, 1.0]]))
    matrix.data, matrix.indices, matrix.indptr = np.array(data), np.array(indices), np.array(indptr)
    return matrix


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: ms.Chain([[0.5, 0.4], [0, 0]], {"harm": 1}), ["state 0", "0.9"]),
        (lambda: ms.Chain([[1.0, 2e-9], [0, 0]], {"harm": 1}), ["state 0", "1.000000002"]),
        (lambda: ms.Chain([[0, 0], [0, 0]], {"harm": 1}, states=["s", "h"]), ["'s'", "sums to 0"]),
        (lambda: ms.Chain([[0, 1], [0, 0.5]], {"harm": 1}, states=["s", "h"]), ["'h'", "0.5"]),
        (lambda: ms.Chain([[1.5, -0.5], [0, 0]], {"harm": 1}, states=["s", "h"]), ["-0.5", "'s'", "'h'"]),
        (lambda: ms.Chain([[nan, 1], [0, 0]], {"harm": 1}), ["nan", "state 0"]),
        (lambda: ms.Chain([[np.inf, 1], [0, 0]], {"harm": 1}), ["inf", "state 0"]),
        (lambda: ms.Chain([[0.5, 0.5]], {"harm": 1}), ["(1, 2)"]),
        (lambda: ms.Chain([[1], [0.5, 0.5]], {"harm": 1}), ["numeric"]),
        (lambda: ms.Chain([["a", "b"], ["c", "d"]], {"harm": 1}), ["numeric"]),
        (lambda: ms.Chain(np.eye(2) * 1j, {"harm": 1}), ["numeric"]),
        (lambda: ms.Chain(np.zeros((0, 0)), {"harm": 1}), ["(0, 0)"]),
        (lambda: ms.Chain([["1", "0"], ["0", "1"]], {"harm": 1}), ["numeric"]),
        (lambda: ms.Chain(np.array([["x", None], [1, 2]], dtype=object), {"harm": 1}), ["numeric"]),
        (lambda: ms.Chain(sp.csr_array(np.eye(2) * 1j), {"harm": 1}), ["numeric"]),
        (lambda: ms.Chain([1.0], {"harm": 0}), ["(1,)"]),
        (lambda: ms.Chain(sp.csr_array((0, 0)), {"harm": 1}), ["(0, 0)"]),
        (lambda: ms.Chain([[0.0]], {"harm": []}), ["state 0", "sums to 0"]),
        (lambda: ms.Chain(broken(indices=[0, 9]), {"harm": 1}), ["numeric"]),
        (lambda: ms.Chain(broken(indices=[0, -1]), {"harm": 1}), ["numeric"]),
        (lambda: ms.Chain(broken(indices=np.array([0, 9], np.int32), indptr=np.int32([0, 1, 2])), ENDS), ["numeric"]),
        (lambda: ms.Chain(broken(indices=np.array([-1, 0], np.int32), indptr=np.int32([0, 1, 2])), ENDS), ["numeric"]),
        (lambda: ms.Chain(broken(indptr=[0, 2, 1]), {"harm": 1}), ["numeric"]),
        (lambda: ms.Chain(broken(indptr=[0, 1, 9]), {"harm": 1}), ["numeric"]),
        (lambda: ms.Chain(broken(indptr=[1, 1, 2]), {"harm": 1}), ["numeric"]),
        (lambda: ms.Chain(broken(data=[0.5, nan]), {"harm": 1}), ["nan", "state 1"]),
        (lambda: ms.Chain(broken(data=[np.inf, 1]), {"harm": 1}), ["inf", "state 0"]),
        (lambda: ms.Chain(P3, {"harm": 3}), ["'harm'", "3"]),
        (lambda: ms.Chain(P3, {"harm": [-1]}), ["'harm'", "-1"]),
        (lambda: ms.Chain(P3, {"harm": [1, 2], "refusal": 2}), ["state 2", "'harm'", "'refusal'"]),
        (lambda: ms.Chain(P3, {"harm": [True, False]}), ["'harm'", "(2,)"]),
        (lambda: ms.Chain(P3, {"harm": "nowhere"}), ["'nowhere'"]),
        (lambda: ms.Chain(P3, {"harm": 1.5}), ["1.5"]),
        (lambda: ms.Chain(P3, {"harm": None}), ["None"]),
        (lambda: ms.Chain(P3, {}), ["{}"]),
        (lambda: ms.Chain(P3, {3: 1}), ["3"]),
        (lambda: ms.Chain(P3, {"harm": 0, "refusal": 2}, states=LABELS), ["'harm'", "state 1"]),
        (lambda: ms.Chain(P3, ENDS, 3), ["start", "3"]),
        (lambda: ms.Chain(P3, ENDS, "q"), ["start", "'q'"]),
        (lambda: ms.Chain(P3, ENDS, [0.5, 0.4, 0]), ["start", "0.9"]),
        (lambda: ms.Chain(P3, ENDS, [0.5, 0.5]), ["start", "(2,)"]),
        (lambda: ms.Chain(P3, ENDS, [1.5, -0.5, 0]), ["start", "-0.5", "state 1"]),
        (lambda: ms.Chain(P3, ENDS, [nan, 1, 0]), ["start", "nan"]),
        (lambda: ms.Chain(P3, ENDS, states=["a", "b"]), ["2 labels", "3"]),
        (lambda: ms.Chain(P3, ENDS, states=["a", "b", "a"]), ["0 and 2", "'a'"]),
        (lambda: ms.Chain(P3, ENDS, states=["a", "b", []]), ["[]"]),
        (lambda: ms.Chain(P3, ENDS, entry={2: [0.5, 0, 0]}), ["entry[2]", "0.5"]),
        (lambda: ms.Chain.layered([P3, np.eye(2)], ENDS), ["layer 1", "(2, 2)"]),
        (lambda: ms.Chain.layered([P3, np.eye(3) / 2], ENDS), ["layer 1", "0.5"]),
        (lambda: ms.Chain.layered([], ENDS), ["no layers"]),
        (lambda: ms.Chain.from_counts([[0, 0], [0, 0]], {"harm": 1}, states=["s", "h"]), ["'s'", "no counts"]),
        (lambda: ms.Chain.from_counts([[1, 0.5], [0, 0]], {"harm": 1}), ["0.5"]),
        (lambda: ms.Chain.from_counts([[1, -1], [0, 0]], {"harm": 1}), ["-1"]),
        (lambda: ms.Chain.from_counts([[1, nan], [0, 0]], {"harm": 1}), ["nan"]),
        (lambda: ms.Chain.from_counts([[1, 2**63], [0, 0]], {"harm": 1}), ["9.22"]),
        (lambda: ms.Chain.from_counts([[1, 2**70], [0, 0]], {"harm": 1}), [str(2**70)]),
        (lambda: ms.Chain.from_counts([["x", 1], [0, 0]], {"harm": 1}), ["x"]),
        (lambda: ms.Chain.from_counts([1, 2], {"harm": 1}), ["(2,)"]),
        (lambda: ms.Chain.from_counts([[2**62, 2**62], [0, 0]], {"harm": 1}), ["state 0", "9.223"]),
        (lambda: ms.Chain.from_counts(FOUR, {"harm": 1}), ["state 0", "1.84"]),
        (lambda: ms.Chain.from_counts(broken(indptr=[0, 2, 1]), {"harm": 1}), ["no valid"]),
        (lambda: ms.Chain.from_counts([["1", "2"], ["0", "0"]], {"harm": 1}), ["1"]),
    ],
)
def test_refuses_and_says_fact_cause_and_next(make, says):
    with pytest.raises(ms.InputError) as caught:
        make()
    assert all(part in caught.value.fact for part in says), caught.value.fact
    assert caught.value.cause
    assert caught.value.next


# --- layers and counts -------------------------------------------------------------------------------------------


def test_layered_keeps_every_layer_as_given():
    other = np.array([[0.0, 1.0, 0.0], [0, 0, 0], [0, 0, 0]])
    chain = ms.Chain.layered([P3, sp.csc_array(other)], ENDS, 0)
    assert (chain.n_layers, chain.is_layered, chain.n_states) == (2, True, 3)
    assert [m.toarray()[0].tolist() for m in chain.P] == [P3[0], [0, 1, 0]]
    assert ms.Chain.layered(np.stack([P3, other]), ENDS, 0).equals(chain)
    assert not chain.mask("truncated").any()  # only what is left after the last layer
    with pytest.raises(ms.InputError):
        ms.Chain(P3, ENDS).mask("truncated")


def test_counts_are_kept_exactly():
    big = 2**62 + 1  # not a float64
    for C in ([[1, big, 3], [0, 0, 0], [5, 0, 0]], sp.coo_array(np.array([[1, big, 3], [0, 0, 0], [5, 0, 0]]))):
        chain = ms.Chain.from_counts(C, ENDS, 0)
        assert chain.integer_counts.dtype == np.int64
        assert chain.integer_counts.toarray().tolist() == [[1, big, 3], [0, 0, 0], [5, 0, 0]]
    small = ms.Chain.from_counts(np.array([[1.0, 2, 1], [0, 0, 0], [0, 0, 0]]), ENDS)
    assert small.P.toarray()[0].tolist() == [0.25, 0.5, 0.25]
    twice = sp.coo_array(([1, 1, 2], ([0, 0, 0], [0, 1, 1])), shape=(2, 2))
    assert ms.Chain.from_counts(twice, {"harm": 1}).integer_counts.toarray().tolist() == [[1, 3], [0, 0]]
