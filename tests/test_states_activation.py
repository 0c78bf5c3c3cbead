"""States from activations: planted walks on the plane, what a map may see, and what is missing."""

from __future__ import annotations

import dataclasses
import math
from fractions import Fraction as F

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from made import BENIGN, HARM, REFUSAL, TRUNCATED, make, quick, rows

import markovsafety as ms
from markovsafety.chains import ByPrompt, Product, counting, drift, grid, states
from markovsafety.chains.states import Asked, label_at, map_name
from markovsafety.rollouts.engines.replay import cut

OUTCOME = {"harm": HARM, "refusal": REFUSAL}
PLANE = ms.ActivationBins({"harm": [0.5, 1.5, 2.5, 3.5], "refusal": [0.5, 1.5]})

# --- planted walks: exact rows, rollouts whose transition frequencies are these rows, and a closed form ---


def ruin(p: F = F(2, 5), size: int = 5):
    """A gambler's ruin on the axis of harmfulness, from place 1; refusal is bin 2 below place 3."""
    at = lambda x: (x, 2 if x < 3 else 0)  # noqa: E731
    law = {at(x): {at(x + 1): p, at(x - 1): 1 - p} for x in range(1, size)}
    law[at(1)] = {at(2): p, "refusal": 1 - p}
    law[at(size - 1)] = {"harm": p, at(size - 2): 1 - p}
    r = (1 - p) / p
    return law, at(1), {at(x): (1 - r**x) / (1 - r**size) for x in range(1, size)}


def race(a: F = F(1, 2), b: F = F(1, 4), m: int = 3, n: int = 2):
    """Up in harmfulness, up in refusal, or neither; m steps of the one before n of the other (a negative binomial)."""
    end = lambda x, y: "harm" if x == m else "refusal" if y == n else (x, y)  # noqa: E731
    cells = [(x, y) for x in range(m) for y in range(n)]
    law = {(x, y): {end(x + 1, y): a, end(x, y + 1): b, (x, y): 1 - a - b} for x, y in cells}
    up, down = a / (a + b), b / (a + b)
    first = lambda i, j: sum((math.comb(i - 1 + k, k) * up**i * down**k for k in range(j)), F(0))  # noqa: E731
    return law, (0, 0), {(x, y): first(m - x, n - y) for x, y in cells}


def flows(law, start):
    """Integer transition counts in the proportions of the expected visits, by elimination over the fractions."""
    cells = list(law)
    A = [[F(i == j) - law[s].get(t, F(0)) for i, s in enumerate(cells)] + [F(t == start)] for j, t in enumerate(cells)]
    for i in range(len(cells)):
        pivot = next(r for r in range(i, len(cells)) if A[r][i])
        A[i], A[pivot] = A[pivot], A[i]
        A[i] = [x / A[i][i] for x in A[i]]
        for r in range(len(cells)):
            if r != i and A[r][i]:
                A[r] = [x - A[r][i] * y for x, y in zip(A[r], A[i])]
    moves = {(s, t): A[i][-1] * p for i, s in enumerate(cells) for t, p in law[s].items()}
    scale = math.lcm(*(n.denominator for n in moves.values()))
    return {move: int(n * scale) for move, n in moves.items()}


def walked(law, start, rng):
    """Paths that use every transition as often as `flows` says: one Eulerian circuit, cut where it ends."""
    left: dict = {}
    for (s, t), n in flows(law, start).items():
        left.setdefault(s, []).extend([t] * n)
        if t in OUTCOME:
            left.setdefault(t, []).extend([start] * n)
    for ways in left.values():
        rng.shuffle(ways)
    stack, circuit = [start], []
    while stack:
        stack.append(left[stack[-1]].pop()) if left[stack[-1]] else circuit.append(stack.pop())
    paths, path = [], []
    for place in reversed(circuit):
        path.append(place)
        if place in OUTCOME:
            paths.append(path)
            path = []
    return paths


def planted(law, start, seed=0):
    """Rollouts of a walk: activations are bins and noise, tokens say nothing, and behind the hit is nan."""
    rng = np.random.default_rng(seed)
    paths = walked(law, start, rng)
    data, columns = [], {"activation_harm": [], "activation_refusal": []}
    for i, path in enumerate(paths):
        steps = len(path) - 1
        data.append((rng.integers(0, 9, steps + 2).tolist(), OUTCOME[path[-1]], steps - 1, 0, i % 7))
        for values, axis in zip(columns.values(), (0, 1)):
            values.extend([*(place[axis] + rng.uniform(-0.49, 0.49) for place in path[:-1]), np.nan, np.nan])
    return make(data, **{name: np.array(values, np.float32) for name, values in columns.items()})


@pytest.mark.parametrize("walk", [ruin, race])
def test_the_binned_chain_of_a_planted_walk_has_its_closed_form(walk):
    law, start, form = walk()
    rolls = planted(law, start)
    assert len(rolls.prompt_id) > 20
    chain = ms.estimate(ms.count(rolls, PLANE), method="mle")
    h = ms.hitting_probability(chain, "harm")
    index = {label: i for i, label in enumerate(chain.states)}
    for place, want in form.items():
        assert h.value[index[place]] == pytest.approx(float(want), abs=1e-12)
        for to, p in law[place].items():
            there = chain.outcomes[to][0] if to in OUTCOME else index[to]
            assert chain.P[index[place], there] == pytest.approx(float(p), abs=1e-14)
    assert set(form) == {s for s, done in zip(chain.states, chain.outcome_mask) if not done}
    assert h.at_start.value == pytest.approx(np.mean(rolls.outcome == HARM), abs=1e-12)
    plane = grid(chain, h, PLANE)
    assert plane.shape == (3, 5)
    assert {(x, y): plane[y, x] for y, x in np.argwhere(np.isfinite(plane))} == {
        place: h.value[index[place]] for place in form
    }


def test_drift_is_the_mean_step_of_what_stays():
    law, start, _ = race()
    chain = ms.estimate(ms.count(planted(law, start), PLANE), method="mle")
    found = drift(chain, PLANE)
    assert found.shape == (2, 3, 5)
    assert found[:, 0, 0] == pytest.approx([1 / 2, 1 / 4])
    assert found[:, 0, 2] == pytest.approx([0, 1 / 2])  # a step up in harmfulness is harm: 1/4 of the rest, 1/4 stays
    assert found[:, 1, 2] == pytest.approx([0, 0])
    assert np.isnan(found[:, 2]).all()


# --- any rollouts ---


@st.composite
def recorded(draw):
    """Rollouts with two activations, unknown at forced tokens and behind the hit."""
    data = draw(rows())
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    columns = {}
    for name in ("activation_harm", "activation_refusal"):
        values = []
        for tokens, outcome, hit, prefill, _ in data:
            x = rng.uniform(-1, 5, len(tokens))
            x[:prefill] = np.nan
            x[len(tokens) if outcome == TRUNCATED else hit + 1 :] = np.nan
            values.append(x)
        columns[name] = np.concatenate(values).astype(np.float32)
    return make(data, **columns)


@quick
@given(recorded())
def test_the_start_is_the_raw_harm_fraction_whatever_the_bins(rolls):
    free = (rolls.prefill == 0) & (rolls.outcome != TRUNCATED)
    if not free.any():
        return
    kept = picked(rolls, free)
    chain = ms.estimate(ms.count(kept, PLANE), method="mle")
    start = ms.hitting_probability(chain, "harm", certify=False).at_start.value
    assert start == pytest.approx(np.mean(kept.outcome == HARM), abs=1e-12)


def as_rollouts(rolls) -> ms.Rollouts:
    fixed = ("tokens", "offsets", "prompt_id", "category", "prefill", "outcome", "hit")
    return ms.Rollouts(**{k: getattr(rolls, k) for k in fixed}, columns=rolls.columns)


def picked(rolls, which) -> ms.Rollouts:
    return as_rollouts(rolls)[which]


def same(a, b):
    assert (a.kind, a.states) == (b.kind, b.states)
    assert (a.matrix != b.matrix).nnz == 0
    assert {k: v.tolist() for k, v in a.entry.items()} == {k: v.tolist() for k, v in b.entry.items()}


@quick
@given(recorded(), st.integers(1, 7))
def test_shards_add_and_blocks_are_not_seen(rolls, size):
    whole = ms.count(rolls, PLANE)
    n = len(rolls.prompt_id)
    parts = [picked(rolls, slice(i, i + 3)) for i in range(0, n, 3)]
    same(sum(ms.count(part, PLANE) for part in parts), whole)
    same(ms.count(ms.Rollouts.concat(parts), PLANE), whole)
    order = np.random.default_rng(size).permutation(n)
    same(ms.count(picked(rolls, order), PLANE), whole)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(counting, "VISITS", size)
        same(ms.count(rolls, PLANE), whole)


@quick
@given(recorded())
def test_products_pair_the_bins_with_what_else_is_known(rolls):
    both = ms.count(rolls, Product([ByPrompt(), ms.Position(), PLANE]))
    single = ms.count(rolls, PLANE)
    assert {label[2] for label in both.states} == set(single.states)
    assert {label[0] for label in both.states} <= set(rolls.category)
    visits = dict.fromkeys(single.states, 0.0)
    for label, n in zip(both.states, both.visits):
        visits[label[2]] += n
    assert list(visits.values()) == single.visits.tolist()


@quick
@given(recorded(), st.integers(0, 5))
def test_a_state_depends_on_nothing_behind_its_prefix(rolls, k):
    """Whatever the activations are behind entry k, the states after up to k tokens are the same."""
    lengths = np.diff(rolls.offsets)
    where = rolls.offsets[:-1], lengths, rolls.prefill, len(rolls.tokens)
    stop = np.where(rolls.outcome == TRUNCATED, lengths - 1, rolls.hit)
    row = np.repeat(np.arange(len(lengths)), stop - rolls.prefill + 1)
    at = np.concatenate([np.arange(a, b + 1) for a, b in zip(rolls.prefill, stop)])
    row, at = row[at <= k], at[at <= k]
    inside = np.arange(len(rolls.tokens)) - np.repeat(rolls.offsets[:-1], lengths)
    later = {name: np.where(inside > k, 99, x) for name, x in rolls.columns.items()}
    seen = []
    for columns in (rolls.columns, later):
        asked = Asked(row, rolls.prompt_id, rolls.category, columns, *where)
        codes, labels = label_at(PLANE, rolls.tokens, rolls.offsets[row], at, asked)
        seen.append([labels[c] for c in codes])
    assert seen[0] == seen[1]
    place = rolls.offsets[row] + at
    bins = [np.digitize(rolls.columns[f"activation_{n}"][place], PLANE.edges[n]) for n in ("harm", "refusal")]
    assert seen[0] == list(zip(*(b.tolist() for b in bins)))


def test_the_last_known_state_stays_until_truncated():
    rolls = make([([1, 2], TRUNCATED, -1, 0, 0)], activation_harm=[0.0, 4.0], activation_refusal=[0.0, 1.0])
    counts = ms.count(rolls, PLANE)
    assert counts.states == ((0, 0), (4, 1))
    assert counts.matrix.toarray().tolist() == [[0, 1, 0, 0, 0, 0], [0, 1, 0, 0, 0, 1]]


def test_edges_belong_to_the_bin_above():
    rolls = make(
        [([1, 2, 3], HARM, 2, 0, 0)], activation_harm=[0.49, 0.5, 3.5], activation_refusal=[-np.inf, 1.5, np.inf]
    )
    assert set(ms.count(rolls, PLANE).states) == {(0, 0), (1, 2), (4, 2)}


def test_what_is_forced_needs_no_activation():
    """The state before the first sampled token may be asked for by a check, and says that it is not known."""
    columns = {"activation_harm": np.array([np.nan, 1.0], np.float32)}
    asked = Asked(np.zeros(2, int), np.zeros(1, int), np.array(["bio"]), columns, [0], [2], [1], 2)
    bins = ms.ActivationBins({"harm": [0.5]})
    codes, labels = label_at(bins, np.array([7, 8]), np.zeros(2, int), np.arange(2), asked)
    assert [labels[c] for c in codes] == [(-1,), (1,)]


# --- held-out rollouts ---


def sampled(n, seed, prefill=(0, 3)):
    """Answers of a Markov chain on the plane: harmfulness moves, refusal is a habit of the category."""
    rng = np.random.default_rng(seed)
    data, harm, refusal = [], [], []
    for i in range(n):
        k, x, habit, spoken = int(rng.choice(prefill)), 1, i % 2, []
        while 0 < x < 5:
            spoken.append(x)
            x += 1 if len(spoken) <= k or rng.random() < (0.6, 0.4)[habit] else -1
        data.append(([0] * len(spoken), HARM if x else REFUSAL, len(spoken) - 1, k, 3 * (i % 12) + habit))
        harm.extend([np.nan] * k + spoken[k:])
        refusal.extend([habit] * len(spoken))
    return make(data, activation_harm=np.array(harm), activation_refusal=np.array(refusal, float))


def test_a_fair_chain_passes_the_check_and_a_coarse_one_does_not():
    fit, held = as_rollouts(sampled(4000, 0)), as_rollouts(sampled(4000, 1))
    for bins in (PLANE, Product([ByPrompt(), PLANE])):
        found = ms.check(ms.estimate(ms.count(fit, bins)), held, states=bins)
        assert found.passed is True
        assert len(found.findings) > 0
    coarse = ms.ActivationBins({"harm": [99.0]})
    assert ms.check(ms.estimate(ms.count(fit, coarse)), held, states=coarse).passed is False
    with pytest.raises(ms.InputError, match="not known what the states"):
        ms.check(ms.estimate(ms.count(fit, PLANE)), held)


# --- bins from rollouts ---


def test_quantile_bins_hold_equally_many_visited_states():
    rng = np.random.default_rng(3)
    harm = rng.normal(size=4000)
    harm[3::4] = 50.0  # behind the hit
    harm[0::4] = np.nan  # forced
    data = [([1, 2, 3, 4], BENIGN, 2, 1, i) for i in range(1000)]
    rolls = make(data, activation_harm=harm, activation_refusal=np.round(harm))
    bins = ms.ActivationBins.from_rollouts(rolls)
    assert list(bins.edges) == ["harm", "refusal"]
    assert bins.shape[0] == 8
    visited = harm.reshape(1000, 4)[:, 1:3].reshape(-1)
    assert np.bincount(np.digitize(visited, bins.edges["harm"])).tolist() == pytest.approx([250] * 8, abs=1)
    assert bins.shape[1] < 8
    assert set(bins.edges["refusal"]) <= set(np.round(visited))
    assert len(ms.count(rolls, bins).states) <= math.prod(bins.shape)
    assert ms.ActivationBins.from_rollouts(rolls, "harm", bins=2).shape == (2,)


def test_every_bin_of_two_values_is_seen():
    rolls = make([([1, 2], BENIGN, 1, 0, 0)] * 9, activation_harm=[0.0, 1.0] * 9)
    bins = ms.ActivationBins.from_rollouts(rolls, ["harm"])
    assert bins.edges == {"harm": (1.0,)}
    assert ms.count(rolls, bins).states == ((0,), (1,))


@pytest.mark.parametrize(
    ("column", "bins", "says"),
    [
        ([2.0, 2.0], 8, "no two bins: 2 of 2 values are 2"),
        ([2.0, np.nan], 8, "activation_harm is not known, in an answer to prompt 4"),
        ([2.0, 1.0], 1, "bins is 1"),
        ([2.0, 1.0], True, "bins is True"),
        ([2.0], 2, r"shape \(1,\), there are 2 tokens"),
    ],
)
def test_data_without_bins_is_refused(column, bins, says):
    with pytest.raises(ms.InputError, match=says):
        ms.ActivationBins.from_rollouts(make([([1, 2], HARM, 1, 0, 4)], activation_harm=column), ["harm"], bins=bins)
    with pytest.raises(ms.InputError, match="No token was sampled"):
        ms.ActivationBins.from_rollouts(make([([1], TRUNCATED, -1, 1, 0)], activation_harm=[1.0]), ["harm"])


# --- what is missing or wrong ---


@pytest.mark.parametrize(
    "edges", [{}, 3, {"harm": []}, {"harm": [1, 1]}, {"harm": [2, 1]}, {"harm": [np.nan]}, {"harm": ["a"]}, {"harm": 1}]
)
def test_bad_edges_are_refused(edges):
    with pytest.raises(ms.InputError, match="edges"):
        ms.ActivationBins(edges)


@pytest.mark.parametrize(
    ("columns", "says"),
    [
        ({"activation_harm": [1, 2, 3]}, "no column activation_refusal"),
        ({}, "no column activation_harm"),
        ({"activation_harm": [1, 2], "activation_refusal": [1, 2, 3]}, r"shape \(2,\), there are 3 tokens"),
        ({"activation_harm": [1, np.nan, 3], "activation_refusal": [1, 2, 3]}, "after 1 tokens, in an answer to p.* 5"),
    ],
)
def test_columns_that_are_missing_or_wrong_are_named(columns, says):
    rolls = make([([1, 2, 3], HARM, 2, 0, 5)], **columns)
    for bins in (PLANE, Product([ms.KGram(1), PLANE])):
        with pytest.raises(ms.InputError, match=says):
            ms.count(rolls, bins)


def test_an_answer_without_any_activation_is_named():
    columns = {"activation_harm": [np.nan], "activation_refusal": [1.0]}
    with pytest.raises(ms.InputError, match="activation_harm is not known after 1 tokens, in an answer to prompt 2"):
        ms.count(make([([3], TRUNCATED, -1, 1, 2)], **columns), PLANE)
    empty = make([([], TRUNCATED, -1, 0, 2)], activation_harm=[], activation_refusal=[])
    with pytest.raises(ms.InputError, match="not known after 0 tokens"):
        ms.count(empty, PLANE)


def test_tokens_alone_do_not_tell_activations():
    nobody = Asked(np.zeros(1, int), np.zeros(1, int), np.array(["bio"]))
    for ask in (
        lambda: PLANE.walk(np.array([1]), 0),
        lambda: label_at(PLANE, np.array([1]), np.array([0]), np.array([0])),
        lambda: states.label_at(Product([PLANE]), np.array([1]), np.array([0]), np.array([0]), nobody),
    ):
        with pytest.raises(ms.InputError, match="depend on the activations"):
            ask()


def test_maps_with_other_edges_are_not_added():
    rolls = make([([1], HARM, 0, 0, 0)], activation_harm=[1.0])
    one, other = (ms.ActivationBins({"harm": [e]}) for e in (0.5, 0.6))
    assert map_name(one) == map_name(ms.ActivationBins({"harm": (0.5,)})) != map_name(other)
    assert one == ms.ActivationBins({"harm": (0.5,)})
    with pytest.raises(ms.InputError, match="ActivationBins"):
        ms.count(rolls, one) + ms.count(rolls, other)
    with pytest.raises(dataclasses.FrozenInstanceError):
        one.edges = {}


def test_places_of_a_plane():
    P = np.eye(3)
    chain = ms.Chain(P, {"harm": 2}, states=[(0, 1), (2, 0), "harm"])
    assert np.array_equal(grid(chain, [1, 2, 3]), [[np.nan, np.nan, 2], [1, np.nan, np.nan]], equal_nan=True)
    pairs = ms.Chain(P, {"harm": 2}, states=[("bio", (0, 0)), ("chem", (0, 0)), "harm"])
    assert grid(pairs, [1, 2, 3], cell=lambda s: s[1] if s[0] == "chem" else None).tolist() == [[2.0]]
    for bad, more, says in (
        (pairs, {}, "no place on a plane"),
        (pairs, {"cell": lambda s: s[1]}, "Several states have one place"),
        (pairs, {"cell": lambda s: None}, "No state"),
        (chain, {"bins": {"harm": [0.5], "refusal": [0.5]}}, "3 x 2 bins, the edges make 2 x 2"),
        (chain, {"bins": {"harm": [0.5, 1]}}, "edges make 3"),
    ):
        with pytest.raises(ms.InputError, match=says):
            grid(bad, [1, 2, 3], **more)
    with pytest.raises(ms.InputError, match="shape"):
        grid(chain, [1, 2])
    with pytest.raises(ms.InputError, match="one matrix per position"):
        drift(ms.Chain.layered([P], {"harm": 2}, states=chain.states))


# --- the column on its way ---


def test_the_column_goes_through_files_choices_and_joins(tmp_path):
    rolls = as_rollouts(planted(*ruin()[:2]))
    assert rolls.activations.keys() == {"harm", "refusal"}
    assert rolls.columns["activation_harm"].dtype == np.float32
    assert ms.read_rollouts(ms.write_rollouts(rolls, tmp_path / "a.parquet")) == rolls
    odd = rolls[1::2]
    assert np.array_equal(odd.values("activation_harm", 4), rolls[9].columns["activation_harm"], equal_nan=True)
    assert ms.Rollouts.concat([rolls[:5], rolls[5:]]) == rolls
    short = cut(rolls, n=10**6, max_tokens=1)
    assert short.columns["activation_harm"].tolist() == rolls.columns["activation_harm"][rolls.offsets[:-1]].tolist()


@pytest.mark.parametrize(
    ("column", "says"), [([1.0], "1 numbers for 2 tokens"), ([1.0, np.inf], "row 0: a projection is infinite")]
)
def test_columns_that_cannot_be_are_refused(column, says):
    with pytest.raises(ms.InputError, match=says):
        ms.Rollouts.of([[1, 2]], prompt_id=0, columns={"activation_harm": column})


def test_a_name_without_direction_is_no_column():
    with pytest.raises(ms.InputError, match="activation_<direction>"):
        ms.Rollouts.of([[1, 2]], prompt_id=0, columns={"activation_": [1.0, 2.0]})
