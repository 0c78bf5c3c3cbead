"""State maps, counts and the chains estimated from them."""

from __future__ import annotations

from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import markovsafety as ms
from markovsafety.chains import Product, single_token_outcomes
from markovsafety.chains.tally import collect

quick = settings(deadline=None, derandomize=True, max_examples=30)
HARM, REFUSAL, BENIGN, TRUNCATED = range(4)
MAPS = [
    ms.KGram(0),
    ms.KGram(1),
    ms.KGram(2),
    ms.KGram(5),
    ms.Position(),
    ms.JudgedPrefix({1: "refusing", 2: "complying"}),
    ms.JudgedPrefix(lambda prefix: int(prefix.sum()) % 3),
    Product((ms.Position(), ms.JudgedPrefix({0: "a"}))),
]


def make(rows, **columns) -> SimpleNamespace:
    """Rollouts from (tokens, outcome, hit, prefill, prompt) rows; prompts 0, 3, ... are of category bio, and so on."""
    tokens, outcome, hit, prefill, prompt = zip(*rows) if rows else ((), (), (), (), ())
    return SimpleNamespace(
        tokens=np.array([t for answer in tokens for t in answer], dtype=np.int32),
        offsets=np.concatenate([[0], np.cumsum([len(t) for t in tokens])]).astype(np.int64),
        outcome=np.array(outcome, dtype=np.int8),
        hit=np.array(hit, dtype=np.int32),
        prefill=np.array(prefill, dtype=np.int32),
        prompt_id=np.array(prompt, dtype=np.int64),
        category=np.array([("bio", "chem", "cyber")[p % 3] for p in prompt], dtype=object),
        columns={k: np.asarray(v) for k, v in columns.items()},
    )


@st.composite
def rows(draw, prefills=(0, 1, 2), vocab=3):
    def one():
        prefill = draw(st.sampled_from(prefills))
        size = prefill + draw(st.integers(1, 6))
        tokens = draw(st.lists(st.integers(0, vocab - 1), min_size=size, max_size=size))
        outcome = draw(st.integers(0, 3))
        hit = -1 if outcome == TRUNCATED else draw(st.integers(prefill, size - 1))
        return tokens, outcome, hit, prefill, draw(st.integers(0, 4))

    return [one() for _ in range(draw(st.integers(1, 8)))]


def ended(data) -> bool:
    return any(outcome != TRUNCATED for _, outcome, _, _, _ in data)


# --- state maps --------------------------------------------------------------------------------------------------


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
    assert seen == [([4, 5], 1), ([8, 9], 0)]


# --- counts ------------------------------------------------------------------------------------------------------

BY_HAND = [
    ([1, 2, 9], HARM, 1, 0, 0),  # start -> (1) -> harm; token 9 lies behind the hit
    ([1, 2], TRUNCATED, -1, 0, 1),  # start -> (1) -> (2) -> truncated
    ([3, 1, 2], REFUSAL, 2, 2, 0),  # forced 3, 1: enters in (1), -> refusal
]


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


def test_one_prompt_is_one_cluster_whatever_the_prefill():
    tally = ms.count(make(BY_HAND), ms.KGram(1)).tally
    assert [x.tolist() for x in tally.clusters("harm", prefill=0)] == [[1, 0], [1, 1]]
    assert [x.tolist() for x in tally.clusters("refusal", prefill=None)] == [[1, 0], [2, 1]]
    assert [len(x) for x in tally.clusters("harm", prefill=7)] == [0, 0]
    with pytest.raises(ms.InputError):
        tally.clusters("sorrow")


def test_a_hit_among_the_forced_tokens_enters_in_the_outcome():
    counts = ms.count(make([([1, 2], HARM, 0, 1, 0), ([1, 2], BENIGN, 1, 0, 0)]), ms.KGram(1))
    assert counts.entry[1].tolist() == [0, 0, 1, 0, 0, 0]
    chain = ms.estimate(counts)
    assert chain.entry[1].tolist() == [0, 0, 1, 0, 0, 0]
    assert chain.evidence.visits.tolist() == [1, 1, 1, 0, 1, 0]
    only = ms.count(make([([1, 2, 3, 4], HARM, 0, 3, 0)]), ms.KGram(1))
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


# --- estimates ---------------------------------------------------------------------------------------------------


def exact_hitting(matrix: np.ndarray, harm: int) -> list[Fraction]:
    """h of the chain with these integer counts, by Gaussian elimination over the rationals."""
    S = len(matrix)
    rows = [[Fraction(int(i == j) * int(matrix[i].sum()) - int(matrix[i, j])) for j in range(S)] for i in range(S)]
    rows = [[*row, Fraction(int(matrix[i, harm]))] for i, row in enumerate(rows)]
    for k in range(S):
        pivot = next(i for i in range(k, S) if rows[i][k])
        rows[k], rows[pivot] = rows[pivot], rows[k]
        rows[k] = [x / rows[k][k] for x in rows[k]]
        for i in range(S):
            if i != k and rows[i][k]:
                rows[i] = [x - rows[i][k] * y for x, y in zip(rows[i], rows[k])]
    return [row[S] for row in rows]


def float_hitting(chain: ms.Chain, target: str = "harm") -> np.ndarray:
    done = chain.outcome_mask
    P, h = chain.P.toarray(), chain.mask(target).astype(float)
    h[~done] = np.linalg.solve(np.eye((~done).sum()) - P[np.ix_(~done, ~done)], P[np.ix_(~done, done)] @ h[done])
    return h


@pytest.mark.parametrize("states", MAPS)
@quick
@given(data=rows(prefills=(0,)))
def test_the_start_value_is_the_raw_fraction_for_any_states(states, data):
    """Flow conservation: from the common start law the plain estimate returns what went in, exactly."""
    counts = ms.count(make(data), states)
    matrix, S = counts.matrix.toarray(), len(counts.states)
    entered = np.bincount(counts.entries.source, counts.entries.count, S).astype(int)
    for code, name in enumerate(ms.OUTCOMES):
        raw = sum(outcome == code for _, outcome, _, _, _ in data)
        h = exact_hitting(matrix, S + code)
        assert sum(int(w) * x for w, x in zip(entered, h)) == raw
        if ended(data):
            chain = ms.estimate(counts)
            # 1e-12: a well conditioned solve of at most 40 states in doubles
            assert abs(chain.start @ float_hitting(chain, name) - raw / len(data)) < 1e-12


@pytest.mark.parametrize("method", ["mle", "dirichlet"])
@quick
@given(data=rows(), k=st.integers(0, 3))
def test_estimated_rows_are_laws_with_all_four_outcomes(method, data, k):
    counts = ms.count(make(data), ms.KGram(k))
    if not ended(data):
        with pytest.raises(ms.InputError, match="truncated") as caught:
            ms.estimate(counts, method)
        assert caught.value.partial is counts
        return
    chain = ms.estimate(counts, method)
    assert tuple(chain.outcomes) == ms.OUTCOMES
    assert chain.n_states == len(counts.states) + 4
    assert np.abs(chain.P.sum(axis=1) - 1).max() <= 1e-12
    assert chain.counts is counts
    assert set(chain.entry) == set(counts.prefills)
    assert all(np.array_equal(chain.entry[j], counts.entry[j]) for j in chain.entry)
    assert (chain.start is None) == (0 not in counts.prefills)
    S = len(counts.states)
    assert chain.evidence.visits[:S].tolist() == counts.visits.tolist()
    assert chain.evidence.visits[S:].tolist() == counts.tally.outcomes.sum(axis=0).tolist()


def test_the_plain_estimate_by_hand():
    chain = ms.estimate(ms.count(make(BY_HAND), ms.KGram(1)))
    assert chain.P.toarray()[1].tolist() == [0, 0, *[1 / 3] * 3, 0, 0]
    assert chain.states[3:] == ms.OUTCOMES
    assert chain.start[chain.index((-1,))] == 1


def test_smoothing_by_hand():
    """Row (1) has 3 visits and 3 observed targets, one of them a state: 1 + 4 outcomes share the prior."""
    chain = ms.estimate(ms.count(make(BY_HAND), ms.KGram(1)), "dirichlet", prior=1.0)
    want = [0, 0, 1.2 / 4, 1.2 / 4, 1.2 / 4, 0.2 / 4, 0.2 / 4]
    assert np.abs(chain.P.toarray()[1] - want).max() < 1e-15
    default = ms.estimate(ms.count(make(BY_HAND), ms.KGram(1)), "dirichlet")
    assert default.P.toarray()[1, 6] == pytest.approx(0.5 / 5 / 3.5)


def test_estimate_refuses_what_it_does_not_know():
    counts = ms.count(make(BY_HAND), ms.KGram(1))
    for bad in ({"method": "guess"}, {"prior": 1.0}, {"method": "dirichlet", "prior": 0.0}, {"method": "mass"}):
        with pytest.raises(ms.InputError) as caught:
            ms.estimate(counts, **bad)
        assert caught.value.next


@quick
@given(rows())
def test_categories_split_harm_and_nothing_else(data):
    if not ended(data):
        return
    counts = ms.count(make(data), ms.KGram(1))
    whole, split = ms.estimate(counts), ms.estimate(counts, categories=True)
    S, k = len(counts.states), len(counts.categories)
    assert list(split.states[S:]) == [f"harm: {name}" for name in counts.categories] + [
        "refusal",
        "benign",
        "truncated",
    ]
    assert split.outcomes["harm"].tolist() == list(range(S, S + k))
    P, Q = whole.P.toarray(), split.P.toarray()
    assert np.abs(P[:S, : S + 1] - np.column_stack([Q[:S, :S], Q[:S, S : S + k].sum(axis=1)])).max() < 1e-15
    for i, name in enumerate(counts.categories):
        harms = sum(r[1] == HARM and ("bio", "chem", "cyber")[r[4] % 3] == name for r in data)
        assert split.evidence.visits[S + i] == harms
        assert bool(Q[:S, S + i].any()) == (harms > 0)


@quick
@given(rows(), st.booleans())
def test_an_estimated_chain_survives_its_file_with_its_evidence(tmp_path_factory, data, split):
    if not ended(data):
        return
    chain = ms.estimate(ms.count(make(data), ms.KGram(2)), categories=split)
    back = ms.read_chain(ms.write_chain(chain, tmp_path_factory.mktemp("estimated") / "c.npz"))
    assert back.equals(chain)
    assert back.counts is None
    for k in chain.entry:
        ours, theirs = (c.evidence.tally.clusters("harm", k) for c in (chain, back))
        assert all(np.array_equal(x, y) for x, y in zip(ours, theirs))


# --- class masses ------------------------------------------------------------------------------------------------


def planted(n: int, harm: float, end: float, limit: int, seed: int) -> SimpleNamespace:
    """One memoryless state: harm token 1, end token 2, else token 0, with the probabilities recorded at every token."""
    rng = np.random.default_rng(seed)
    data = []
    for i in range(n):
        tokens = rng.choice(3, limit, p=[1 - harm - end, harm, end])
        stop = np.flatnonzero(tokens)
        if stop.size:
            data.append(
                (tokens[: stop[0] + 1].tolist(), HARM if tokens[stop[0]] == 1 else BENIGN, int(stop[0]), 0, i % 10)
            )
        else:
            data.append((tokens.tolist(), TRUNCATED, -1, 0, i % 10))
    total = sum(len(row[0]) for row in data)
    return make(data, mass_harm=np.full(total, harm, np.float32), mass_benign=np.full(total, end, np.float32))


def test_mass_rows_hold_the_models_own_probability():
    rolls = planted(300, 0.1, 0.2, limit=6, seed=1)
    counts = ms.count(rolls, ms.KGram(0))
    truncated = counts.matrix.toarray()[0, -1] / counts.visits[0]
    row = ms.estimate(counts, "mass").P.toarray()[0]
    token = 1 - truncated  # 1e-7: the masses are float32
    assert row == pytest.approx([0.7 * token, 0.1 * token, 0, 0.2 * token, truncated], abs=1e-7)
    assert ms.estimate(counts).P.toarray()[0, 1] != pytest.approx(row[1], abs=1e-3)


def test_mass_varies_less_than_counting():
    """Given the states visited, the mass row is exact: its spread over data sets is a small part of the count's."""
    spread = {"mle": [], "mass": []}
    for seed in range(12):
        counts = ms.count(planted(60, 0.03, 0.2, limit=8, seed=seed), ms.Position())
        for method, values in spread.items():
            chain = ms.estimate(counts, method)
            values.append(chain.start @ float_hitting(chain))
    assert np.std(spread["mass"]) < 0.5 * np.std(spread["mle"])


def test_masses_add_up_over_shards_and_missing_ones_do_not_count():
    rolls = planted(40, 0.1, 0.2, limit=6, seed=2)
    ends = zip(rolls.offsets, rolls.offsets[1:], rolls.outcome, rolls.hit, rolls.prompt_id)
    data = [(rolls.tokens[a:b].tolist(), int(o), int(h), 0, int(p)) for a, b, o, h, p in ends]
    mass = rolls.columns["mass_harm"] * np.random.default_rng(0).random(len(rolls.tokens))
    middle = int(rolls.offsets[20])
    whole = ms.count(make(data, mass_harm=mass), ms.KGram(1))
    halves = (
        ms.count(make(data[:20], mass_harm=mass[:middle]), ms.KGram(1)),
        ms.count(make(data[20:], mass_harm=mass[middle:]), ms.KGram(1)),
    )
    assert sum(halves).equals(whole, rtol=1e-12)  # sums of doubles in another order
    mass[middle:] = np.nan
    assert (halves[0] + ms.count(make(data[20:]), ms.KGram(1))).mass["harm"].values["steps"].sum() == middle
    assert ms.count(make(data, mass_harm=mass), ms.KGram(1)).mass["harm"].values["steps"].sum() == middle


def test_a_state_seen_only_with_the_hit_sends_the_rest_to_truncated():
    rolls = make([([1], HARM, 0, 0, 0), ([0, 1], HARM, 1, 0, 0)], mass_harm=[0.25, 0.25, 0.5])
    chain = ms.estimate(ms.count(rolls, ms.KGram(1)), "mass")
    assert chain.P.toarray()[0].tolist() == [0, 0.75, 0.25, 0, 0, 0]
    assert chain.P.toarray()[1].tolist() == [0, 0, 0.5, 0, 0, 0.5]


def test_masses_that_do_not_explain_the_hits():
    """Refusals of several tokens: three of the class are sampled per hit. Their mass is ignored, harm's is refused."""
    data = [([5, 5, 5], REFUSAL, 2, 0, 0)] * 60 + [([1], HARM, 0, 0, 1)] * 40
    total = 60 * 3 + 40
    fine = np.concatenate([np.tile([0.4, 0, 0], 60), np.full(40, 0.4)])
    counts = ms.count(make(data, mass_harm=fine, mass_refusal=np.full(total, 0.9)), ms.KGram(1))
    assert single_token_outcomes(counts) == ("harm",)
    assert ms.estimate(counts, "mass").P.toarray()[0].round(12).tolist() == [0, 0.6, 0.4, 0, 0, 0]
    wrong = ms.count(make(data, mass_harm=np.full(total, 0.9)), ms.KGram(1))
    with pytest.raises(ms.InputError, match="40 hits"):
        ms.estimate(wrong, "mass")
    with pytest.raises(ms.InputError, match="No mass"):
        ms.estimate(ms.count(make(data, mass_harm=np.full(total, np.nan)), ms.KGram(1)), "mass")


def test_true_masses_pass_the_single_token_test():
    """The bound's false-alarm rate is 1e-8 per outcome, so 40 data sets with two outcomes fail with less than 1e-6."""
    for seed in range(40):
        counts = ms.count(planted(50, 0.02, 0.3, limit=10, seed=seed), ms.KGram(1))
        assert single_token_outcomes(counts) == ("harm", "benign")


def test_real_rollouts_are_counted_too():
    data = make(BY_HAND)
    rolls = ms.Rollouts(
        data.tokens, data.offsets, data.prompt_id, data.category, data.prefill, data.outcome, data.hit, {}, {}
    )
    assert ms.count(rolls, ms.KGram(1)).equals(ms.count(data, ms.KGram(1)))
