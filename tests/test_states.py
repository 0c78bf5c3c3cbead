"""State maps: the walk, the fast way, and promises a map can break."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from made import BENIGN, HARM, MAPS, TRUNCATED, make, quick, rows

import markovsafety as ms
from markovsafety.chains import Product


def test_walks_by_hand():
    tokens = np.array([5, 0, 7])
    assert ms.KGram(2).walk(tokens, 0) == [(-1, -1), (-1, 5), (5, 0), (0, 7)]
    assert ms.KGram(0).walk(tokens, 0) == [()] * 4
    assert ms.Position().walk(tokens, 1) == [0, 1, 2, 3]
    assert ms.JudgedPrefix({0: "no", 7: "yes"}).walk(tokens, 0) == ["none", "none", "no", "yes"]
    assert ms.JudgedPrefix(len).walk(tokens, 0) == [0, 1, 2, 3]
    both = Product((ms.Position(), ms.JudgedPrefix({0: "no"}, initial="-")))
    assert both.walk(tokens, 0) == [(0, "-"), (1, "-"), (2, "no"), (3, "no")]


@pytest.mark.parametrize("states", [m for m in MAPS if hasattr(m, "label_at")])
@quick
@given(data=rows())
def test_the_fast_way_and_the_walk_agree(states, data):
    rolls = make(data)
    walks = [states.walk(np.array(tokens), 0) for tokens, *_ in data]
    at = np.concatenate([np.arange(len(w)) for w in walks])
    begin = np.repeat(rolls.offsets[:-1], [len(w) for w in walks])
    fast = states.label_at(rolls.tokens, begin, at)
    if fast is None:  # a function can only walk
        return
    codes, labels = fast
    assert [labels[c] for c in codes] == [label for walk in walks for label in walk]
    assert sorted(set(codes.tolist())) == list(range(len(labels)))


@quick
@given(rows(), st.integers(0, 6))
def test_encode_gives_every_prefix_a_code(data, k):
    rolls = make(data)
    codes, labels = ms.KGram(k).encode(rolls.tokens, rolls.offsets)
    assert [labels[c] for c in codes] == [x for tokens, *_ in data for x in ms.KGram(k).walk(np.array(tokens), 0)]
    assert labels == sorted(labels)


def test_the_largest_ids_do_not_overflow():
    top = 2**31 - 1
    rng = np.random.default_rng(0)
    data = [(rng.integers(top - 3, top + 1, 9).tolist(), BENIGN, 8, 0, 0) for _ in range(50)]
    rolls = make(data)
    codes, labels = ms.KGram(7).encode(rolls.tokens, rolls.offsets)
    assert [labels[c] for c in codes] == [x for tokens, *_ in data for x in ms.KGram(7).walk(np.array(tokens), 0)]


@pytest.mark.parametrize(
    "bad", [lambda: ms.KGram(-1), lambda: ms.KGram(1.5), lambda: ms.KGram(True), lambda: ms.JudgedPrefix(3)]
)
def test_bad_maps_are_refused(bad):
    with pytest.raises(ms.InputError):
        bad()


class Short:
    def walk(self, tokens, prefill):
        return list(range(len(tokens)))


class Unhashable:
    def walk(self, tokens, prefill):
        return [[i] for i in range(len(tokens) + 1)]


@pytest.mark.parametrize(
    ("states", "says"), [(Short(), "2 labels for 2"), (Unhashable(), "looked up"), (3, "no state map")]
)
def test_maps_that_break_their_promise_are_named(states, says):
    with pytest.raises(ms.InputError, match=says):
        ms.count(make([([1, 2, 3], HARM, 2, 0, 0)]), states)


def test_a_map_sees_only_what_was_there_at_the_hit():
    seen = []

    class Spy:
        def walk(self, tokens, prefill):
            seen.append((tokens.tolist(), prefill))
            return list(range(len(tokens) + 1))

    ms.count(make([([4, 5, 6, 7], HARM, 2, 1, 0), ([8, 9], TRUNCATED, -1, 0, 0)]), Spy())
    assert sorted(seen) == [([4, 5], 1), ([8, 9], 0)]
