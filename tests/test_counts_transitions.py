"""Counting plain token sequences: every way of counting gives what a dictionary gives, and parts add up."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given
from hypothesis import strategies as st
from made import quick

import markovsafety as ms
from markovsafety.chains import Transitions, count_transitions, tally, transitions

# Numbers that send a few tokens down each road, and across every boundary on it.
ROADS = {
    "one table": {"ONE_TABLE": 1 << 22, "STEP": 5},
    "ranges": {"ONE_TABLE": 0, "SPARSE": 1 << 40, "RANGE_BITS": 3, "GATHERED": 8, "STEP": 7},
    "wide ranges": {"ONE_TABLE": 0, "SPARSE": 1 << 40, "RANGE_BITS": 6, "GATHERED": 1 << 20},
    "sorting": {"ONE_TABLE": 0, "SPARSE": 0, "STEP": 3},
}


def naive(tokens, offsets, order, weights=None) -> dict:
    found = Counter()
    for r, (a, b) in enumerate(pairwise(offsets)):
        padded = [-1] * order + list(tokens[a:b])
        for i in range(order, len(padded)):
            found[tuple(padded[i - order : i + 1])] += 1 if weights is None else weights[r]
    return {k: v for k, v in found.items() if v}


def cells(result: Transitions) -> dict:
    states, matrix = result
    assert matrix.has_canonical_format
    assert sp.csr_array((matrix.data, matrix.indices, matrix.indptr), shape=matrix.shape).has_canonical_format
    assert (matrix.data > 0).all()
    assert states.tolist() == sorted(states.tolist())
    assert (np.diff(matrix.indptr) > 0).all()
    entries = matrix.tocoo()
    rows, columns = entries.coords
    return {(*states[i].tolist(), int(j)): v for i, j, v in zip(rows, columns, entries.data.tolist())}


@st.composite
def answers(draw, most=4):
    lists = draw(st.lists(st.lists(st.integers(0, most), max_size=12), min_size=1, max_size=6))
    return np.array([t for a in lists for t in a], dtype=np.int32), np.cumsum([0, *map(len, lists)])


@pytest.mark.parametrize("road", ROADS)
@pytest.mark.parametrize("small", [0, 1 << 15])
@quick
@given(answers(), st.integers(0, 3), st.booleans())
def test_every_road_counts_what_a_dictionary_counts(road, small, drawn, order, heavy):
    tokens, offsets = drawn
    weights = np.arange(len(offsets) - 1) % 3 if heavy else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tally, "SMALL", small)
        for name, value in ROADS[road].items():
            patch.setattr(transitions, name, value)
        got = count_transitions(tokens, offsets, order, 5, weights)
    assert cells(got) == naive(tokens.tolist(), offsets, order, weights)
    assert got.matrix.shape[1] == 5
    assert got.matrix.dtype == (np.float64 if heavy else np.int32)


@quick
@given(answers(), st.integers(0, 6), st.integers(0, 3))
def test_parts_add_up(drawn, cut, order):
    tokens, offsets = drawn
    cut = min(cut, len(offsets) - 1)
    at = offsets[cut]
    parts = [
        count_transitions(tokens[:at], offsets[: cut + 1], order, 5),
        count_transitions(tokens[at:], offsets[cut:] - at, order, 5),
    ]
    assert cells(sum(parts)) == naive(tokens.tolist(), offsets, order)
    assert sum(parts).matrix.dtype == np.int32


def test_sums_grow_out_of_32_bits_and_columns_out_of_a_vocabulary():
    most = 2**31 - 1
    a = Transitions(np.array([[0]]), sp.csr_array(([most], [0], [0, 1]), shape=(1, 1), dtype=np.int32))
    b = Transitions(np.array([[0], [1]]), sp.csr_array(np.array([[1, 0], [0, 2]], dtype=np.int32)))
    both = a + b
    assert both.matrix.dtype == np.int64
    assert cells(both) == {(0, 0): most + 1, (1, 1): 2}
    with pytest.raises(ms.InputError, match="order"):
        _ = a + count_transitions([0, 1], order=2)
    with pytest.raises(TypeError):
        _ = a + 1


def test_plain_use_needs_no_offsets_and_takes_any_integers():
    for tokens in ([1, 0, 1, 1], np.array([1, 0, 1, 1], dtype=np.uint8), np.array([1, 0, 1, 1], dtype=np.int64)):
        assert cells(count_transitions(tokens)) == {(-1, 1): 1, (0, 1): 1, (1, 0): 1, (1, 1): 1}
    assert cells(count_transitions([], vocabulary=3)) == {}
    assert cells(count_transitions([2, 2, 0], order=0)) == {(0,): 1, (2,): 2}


def test_frozen_tokens_and_a_large_vocabulary():
    tokens = np.array([2**31 - 3, 5, 2**31 - 3, 5])
    tokens.flags.writeable = False
    assert cells(count_transitions(tokens)) == naive(tokens.tolist(), [0, 4], 1)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (([0.5],), "float64"),
        (([[1]],), "shape"),
        (([-1, 0],), "-1"),
        (([-1, 0], None, 1, 3), "Token 0 is -1"),
        (([0, 1, 3], None, 1, 3), "Token 2 is 3"),
        (([0, 1, 3], None, 1, 3, [1.0]), "Token 2 is 3"),
        (([0, 1], [0, 1]), "offsets"),
        (([0, 1], [1, 2]), "offsets"),
        (([0, 1], [0, 2, 1, 2]), "offsets"),
        (([0, 1], [0.0, 2.0]), "offsets"),
        (([0, 1], None, -1), "order is -1"),
        (([0, 1], None, 1.5), "order is 1.5"),
        (([0, 1], None, 1, 0), "vocabulary is 0"),
        (([0, 1], None, 10**6), "cannot be numbered"),
        (([0, 1], None, 2, 2**31 - 1), "cannot be numbered"),
        (([0, 1], None, 1, 2, [1.0, 1.0]), "weights"),
        (([0, 1], None, 1, 2, [-1.0]), "weights"),
        (([0, 1], None, 1, 2, [np.nan]), "weights"),
        (([0, 1], None, 1, 2, ["x"]), "weights"),
    ],
)
def test_what_does_not_fit_is_refused_with_a_next_step(arguments, says):
    with pytest.raises(ms.InputError, match=says) as caught:
        count_transitions(*arguments)
    assert caught.value.cause
    assert caught.value.next
