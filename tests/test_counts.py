"""Counts: by hand, shard by shard, selected, weighted, and of rollouts that contradict themselves."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from made import BENIGN, BY_HAND, HARM, MAPS, REFUSAL, TRUNCATED, make, quick, rows

import markovsafety as ms
from markovsafety.chains.tally import collect


def test_counts_by_hand():
    counts = ms.count(make(BY_HAND), ms.KGram(1))
    assert counts.states == ((-1,), (1,), (2,))
    assert counts.matrix.toarray().tolist() == [
        # start  1  2  harm refusal benign truncated
        [0, 2, 0, 0, 0, 0, 0],
        [0, 0, 1, 1, 1, 0, 0],
        [0, 0, 0, 0, 0, 0, 1],
    ]
    assert counts.visits.tolist() == [2, 3, 1]
    assert {k: law.tolist() for k, law in counts.entry.items()} == {
        0: [1, 0, 0, 0, 0, 0, 0],
        2: [0, 1, 0, 0, 0, 0, 0],
    }
    tally = counts.tally
    assert tally.prompt_id.tolist() == [0, 0, 1]
    assert tally.prefill.tolist() == [0, 2, 0]
    assert tally.category.tolist() == ["bio", "bio", "chem"]
    assert tally.outcomes.tolist() == [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 1]]
    t = counts.transitions
    assert [tuple(x) for x in np.column_stack([t.group, t.source, t.target, t.count]).tolist()] == [
        (0, 0, 1, 1),
        (0, 1, 3, 1),
        (1, 1, 4, 1),
        (2, 0, 1, 1),
        (2, 1, 2, 1),
        (2, 2, 6, 1),
    ]
    assert (counts.prompts, counts.rollouts, counts.categories, counts.prefills) == (2, 3, ("bio", "chem"), (0, 2))
    assert "3 rollouts" in repr(counts)


def test_a_rollout_passes_a_state_once_however_long_it_stays():
    data = [([1, 1, 1, 9], HARM, 3, 0, 0), ([1, 1], TRUNCATED, -1, 0, 0), ([1, 1], TRUNCATED, -1, 0, 1)]
    t = ms.count(make(data, weight=[1, 2, 5]), ms.KGram(1)).passages
    assert np.column_stack([t.group, t.source, t.target, t.count]).tolist() == [
        [0, 0, 2, 1],
        [0, 0, 5, 2],
        [0, 1, 2, 1],
        [0, 1, 5, 2],
        [1, 0, 5, 5],
        [1, 1, 5, 5],
    ]


def test_one_prompt_is_one_cluster_whatever_the_prefill():
    tally = ms.count(make(BY_HAND), ms.KGram(1)).tally
    assert [x.tolist() for x in tally.clusters("harm", prefill=0)] == [[1, 0], [1, 1]]
    assert [x.tolist() for x in tally.clusters("refusal", prefill=None)] == [[1, 0], [2, 1]]
    assert [len(x) for x in tally.clusters("harm", prefill=7)] == [0, 0]
    with pytest.raises(ms.InputError):
        tally.clusters("sorrow")


def test_a_benign_answer_of_which_nothing_was_sampled_enters_in_the_outcome():
    counts = ms.count(make([([1], BENIGN, -1, 1, 0), ([1, 2], BENIGN, 1, 0, 0)]), ms.KGram(1))
    assert counts.entry[1].tolist() == [0, 0, 0, 0, 1, 0]
    chain = ms.estimate(counts)
    assert chain.entry[1].tolist() == [0, 0, 0, 0, 1, 0]
    assert chain.evidence.visits.tolist() == [1, 1, 0, 0, 2, 0]
    only = ms.count(make([([1, 2, 3, 4], BENIGN, -1, 4, 0)]), ms.KGram(1))
    assert (only.states, ms.estimate(only).n_states) == ((), 4)


def test_a_benign_answer_ends_at_its_last_token_and_may_be_empty():
    counts = ms.count(
        make([([1, 2], BENIGN, -1, 0, 0), ([], BENIGN, -1, 0, 0), ([], TRUNCATED, -1, 0, 0)]), ms.KGram(1)
    )
    assert counts.matrix.toarray().tolist() == [[0, 1, 0, 0, 0, 1], [0, 0, 0, 0, 1, 0]]
    assert counts.entry[0].tolist() == [2 / 3, 0, 0, 0, 1 / 3, 0]


def test_a_label_named_like_an_outcome_makes_room():
    states = ms.JudgedPrefix({1: "refusal"})
    chain = ms.estimate(ms.count(make([([1, 2, 3], HARM, 2, 0, 0)]), states))
    assert list(chain.states) == ["after refusal", "none", *ms.OUTCOMES]
    assert chain.mask("refusal").tolist() == [False, False, False, True, False, False]


@pytest.mark.parametrize("states", MAPS)
@quick
@given(data=rows(), cut=st.integers(0, 8))
def test_shards_add_up_and_order_does_not_matter(states, data, cut):
    whole = ms.count(make(data), states)
    parts = [ms.count(make(part), states) for part in (data[:cut], data[cut:]) if part]
    assert sum(parts).equals(whole)
    assert sum(parts[::-1]).equals(whole)
    assert ms.count(make(data[::-1]), states).equals(whole)
    one_by_one = [ms.count(make([row]), states) for row in data]
    assert sum(one_by_one).equals(whole)
    if len(data) > 2:
        a, b, c = one_by_one[0], one_by_one[1], sum(one_by_one[2:])
        assert ((a + b) + c).equals(a + (b + c))


def test_equals_sees_every_part():
    counts = ms.count(make(BY_HAND), ms.KGram(1))
    for i, changed in (
        (0, ([1, 2, 9], REFUSAL, 1, 0, 0)),
        (0, ([2, 2, 9], HARM, 1, 0, 0)),
        (0, ([1, 2, 9], HARM, 2, 0, 0)),
        (0, ([1, 2, 9], HARM, 1, 1, 0)),
        (0, ([1, 2, 9], HARM, 1, 0, 3)),
    ):
        other = make([changed if j == i else row for j, row in enumerate(BY_HAND)])
        assert not counts.equals(ms.count(other, ms.KGram(1)))
    assert not counts.equals(ms.count(make(BY_HAND), ms.KGram(2)))
    assert not counts.equals(ms.count(make(BY_HAND, mass_harm=np.zeros(8)), ms.KGram(1)))
    assert counts.equals(ms.count(make(BY_HAND), ms.KGram(1)))


def test_sums_over_huge_keys_do_not_overflow():
    top = 2**40
    a, b = np.array([top, 1, top, 0, top - 1]), np.array([top, 2, top, top, 0])
    keys, (sums,) = collect([a, b, b], [np.arange(5.0)])
    assert np.column_stack([*keys, sums]).astype(int).tolist() == [
        [0, top, top, 3],
        [1, 2, 2, 1],
        [top - 1, 0, 0, 4],
        [top, top, top, 2],
    ]


def test_counts_of_different_maps_do_not_mix():
    a, b = (ms.count(make(BY_HAND), ms.KGram(k)) for k in (1, 2))
    with pytest.raises(ms.InputError, match="KGram"):
        _ = a + b
    with pytest.raises(TypeError):
        _ = a + 1


@pytest.mark.parametrize("states", MAPS[2:6])
@quick
@given(data=rows())
def test_selecting_is_counting_the_selected(states, data):
    counts = ms.count(make(data), states)
    for prefill in counts.prefills:
        part = [row for row in data if row[3] == prefill]
        assert counts.select(prefill=prefill).equals(ms.count(make(part), states))
    for name in counts.categories:
        part = [row for row in data if ("bio", "chem", "cyber")[row[4] % 3] == name]
        assert counts.select(categories=name).equals(ms.count(make(part), states))
    assert sum(counts.select(prompts=[p]) for p in {row[4] for row in data}).equals(counts)
    assert counts.select().equals(counts)


def test_selecting_nothing_is_an_error():
    counts = ms.count(make(BY_HAND), ms.KGram(1))
    with pytest.raises(ms.InputError, match="'cyber'"):
        counts.select(categories=["bio", "cyber"])
    with pytest.raises(ms.InputError, match="exclude"):
        counts.select(categories="chem", prefill=2)


@quick
@given(rows(), st.data())
def test_a_weight_of_two_is_two_rollouts(data, draw):
    weight = [draw.draw(st.sampled_from([0.0, 1.0, 2.0])) for _ in data]
    if not any(weight):
        weight[0] = 1.0
    repeated = [row for row, w in zip(data, weight) for _ in range(int(w))]
    weighted = ms.count(make(data, weight=weight), ms.KGram(2))
    assert weighted.equals(ms.count(make(repeated), ms.KGram(2)))


@pytest.mark.parametrize(
    ("rolls", "says"),
    [
        (make([]), "no rollouts"),
        (make([([1], -1, -1, 0, 0), ([1], -1, -1, 0, 0)]), "not judged .2 of 2"),
        (make([([1], 4, 0, 0, 0)]), "code"),
        (make([([1], HARM, -1, 0, 0)]), "no hit"),
        (make([([1], HARM, 1, 0, 0)]), "behind"),
        (make([([1], TRUNCATED, 0, 0, 0)]), "truncated and has"),
        (make([([1, 2], HARM, 0, 1, 0)]), "among the forced"),
        (3, "given a int"),
        ("nowhere.parquet", "no Parquet rollouts"),
        (make([([1], BENIGN, 0, 2, 0)]), "forced"),
        (make([([-1], BENIGN, 0, 0, 0), ([1, -1], BENIGN, 1, 0, 0)]), "negative"),
        (make([([1], BENIGN, 0, 0, 0)], weight=[-1.0]), "weight"),
        (make([([1], BENIGN, 0, 0, 0)], weight=[np.nan]), "weight"),
        (make([([1], BENIGN, 0, 0, 0)], weight=[0.0]), "zero"),
        (make([([1], BENIGN, 0, 0, 0)], mass_harm=[0.1, 0.1]), "shape"),
        (make([([1], BENIGN, 0, 0, 0)], mass_harm=[1.5]), "1.5"),
    ],
)
def test_bad_rollouts_are_refused_with_a_next_step(rolls, says):
    with pytest.raises(ms.InputError, match=says) as caught:
        ms.count(rolls, ms.KGram(1))
    assert caught.value.cause
    assert caught.value.next


def test_real_rollouts_are_counted_too():
    data = make(BY_HAND)
    rolls = ms.Rollouts(
        data.tokens, data.offsets, data.prompt_id, data.category, data.prefill, data.outcome, data.hit, {}, {}
    )
    assert ms.count(rolls, ms.KGram(1)).equals(ms.count(data, ms.KGram(1)))
