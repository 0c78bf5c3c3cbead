"""Counting rollouts block by block, and by sorting: the counts of a plain dictionary, in any block size."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from made import BENIGN, MAPS, TRUNCATED, make, quick, rows

import markovsafety as ms
from markovsafety.chains import counting, tally
from markovsafety.chains.tally import collect, dense_codes


def naive(data, states, weight):
    """Transitions, entries and passages by prompt, prefill and label."""
    moves, entries, passages = Counter(), Counter(), Counter()
    for (tokens, outcome, hit, prefill, prompt), w in zip(data, weight):
        if outcome == BENIGN and hit < 0:
            hit = len(tokens) - 1
        stop, end = len(tokens) if outcome == TRUNCATED else hit, ms.OUTCOMES[outcome]
        walk = states.walk(np.array(tokens[:stop]), prefill)[prefill : stop + 1]
        who = prompt, prefill
        entries[(*who, walk[0] if walk else end)] += w
        for a, b in zip(walk, [*walk[1:], end]):
            moves[(*who, a, b)] += w
        for label in set(walk):
            passages[(*who, label, end)] += w
    return moves, entries, passages


def found(counts):
    names = [*counts.states, *ms.OUTCOMES]
    result = []
    for table in (counts.transitions, counts.entries, counts.passages):
        ends = [table.source] if table.target is None else [table.source, table.target]
        who = zip(counts.tally.prompt_id[table.group].tolist(), counts.tally.prefill[table.group].tolist())
        labels = zip(*[[names[i] for i in end] for end in ends])
        result.append({(*a, *b): n for a, b, n in zip(who, labels, table.count.tolist())})
    return result


@pytest.mark.parametrize("states", MAPS)
@pytest.mark.parametrize("visits", [1, 7, 1 << 18])
@quick
@given(data=rows(), heavy=st.booleans())
def test_blocks_of_any_size_count_what_a_dictionary_counts(states, visits, data, heavy):
    weight = [0.5 + i for i in range(len(data))] if heavy else [1.0] * len(data)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(counting, "VISITS", visits)
        counts = ms.count(make(data, weight=weight), states)
    assert found(counts) == [dict(x) for x in naive(data, states, weight)]


@quick
@given(rows(), st.booleans(), st.booleans())
def test_compiled_sorting_changes_no_bit(data, heavy, masses):
    rng = np.random.default_rng(len(data))
    size = sum(len(row[0]) for row in data)
    columns = {"weight": rng.random(len(data))} if heavy else {}
    columns |= {"mass_harm": rng.random(size)} if masses else {}
    want = ms.count(make(data, **columns), ms.KGram(2))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tally, "SMALL", 0)
        patch.setattr(counting, "VISITS", 5)
        got = ms.count(make(data, **columns), ms.KGram(2))
    assert got.equals(want, rtol=0.0)
    assert list(got.mass) == list(want.mass) == (["harm"] if masses else [])


def test_labels_that_meet_after_renaming_are_one_state_in_every_block():
    data = [([1, 3, 1, 9], BENIGN, 3, 0, prompt) for prompt in range(4)]
    states = ms.JudgedPrefix({1: "harm", 3: "after harm"})
    whole = ms.count(make(data), states)
    assert whole.states == ("after harm", "none")
    assert whole.passages.count.tolist() == [1.0] * 8
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(counting, "VISITS", 1)
        assert ms.count(make(data), states).equals(whole)


@pytest.mark.parametrize("small", [0, 1 << 15])
def test_large_keys_sort_and_sum_alike(small):
    rng = np.random.default_rng(3)
    a, b, c = rng.integers(0, 2**40, 500), rng.integers(0, 3, 500), rng.integers(0, 2**30, 500)
    a[::2] = a[0]
    v = rng.random((500, 2))
    want = Counter()
    for key, x in zip(zip(a.tolist(), b.tolist(), (c % 5).tolist()), v.tolist()):
        want[key] += x[1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tally, "SMALL", small)
        keys, (sums,) = collect([a, b, c % 5], [v])
        codes, first = dense_codes([a, b, c], 500)
    assert dict(zip(zip(*(k.tolist() for k in keys)), sums[:, 1].tolist())) == dict(want)
    assert list(zip(*(k.tolist() for k in keys))) == sorted(want)
    rows_ = list(zip(a.tolist(), b.tolist(), c.tolist()))
    rank = {row: i for i, row in enumerate(sorted(set(rows_)))}
    assert codes.tolist() == [rank[row] for row in rows_]
    assert first.tolist() == [rows_.index(row) for row in sorted(set(rows_))]
