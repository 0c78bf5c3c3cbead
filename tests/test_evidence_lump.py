"""Lumping: exact where it can be, with its error as a width where it cannot."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given
from hypothesis import strategies as st
from made import HARM, REFUSAL, make, quick
from small_chains import LAYERS, SEEDS, random_chain

import markovsafety as ms
from markovsafety import Bound, InputError, evidence, organism

ENDS = ["harm", "refusal", "benign"]


def ladder_pair():
    """Two copies of a ladder whose steps go to both copies: lumping the copies is exact."""
    P = np.zeros((6, 6))
    up, down = 0.3, 0.5
    for i in (0, 1):
        P[i, 2:4] = up * np.array([0.25, 0.75]) if i else up * np.array([0.6, 0.4])
        P[i, 5] = 1 - up
        P[2 + i, 0:2] = down * np.array([0.5 + 0.3 * i, 0.5 - 0.3 * i])
        P[2 + i, 4] = 1 - down
    states = ["low a", "low b", "high a", "high b", "harm", "refusal"]
    return ms.Chain(P, {"harm": 4, "refusal": 5}, 0, states)


def random_classes(seed, chain, most=3):
    """Classes that do not mix outcomes, in which some hold several states."""
    rng = np.random.default_rng(seed)
    names = [f"class {rng.integers(most)}" for _ in chain.states]
    for name, index in chain.outcomes.items():
        for i in index:
            names[i] = name
    return names


def test_exact_lumping_is_recognised_and_adds_nothing():
    chain = ladder_pair()
    classes = {"low": ["low a", "low b"], "high": ["high a", "high b"]}
    found = evidence.lumpable(chain, classes)
    assert found.exact is True
    assert found.spread.value <= 1e-15
    small = evidence.lump(chain, classes)
    assert small.chain.states == ("low", "high", "harm", "refusal")
    assert small.worst < 1e-14
    assert small.loss == pytest.approx(0, abs=1e-14)
    h = ms.hitting_probability(small.chain, "harm").value
    assert h[0] == pytest.approx(0.3 * 0.5 / (1 - 0.3 * 0.5), abs=1e-14)


def test_what_is_not_lumpable_is_named():
    chain = ladder_pair()
    found = evidence.lumpable(chain, {"all": ["low a", "high a", "low b", "high b"]})
    assert found.exact is False
    assert found.where["class"] == "all"
    assert found.spread.lower > 0.4
    assert "not exact" in str(found)
    single = evidence.lumpable(chain, list(chain.states))
    assert single.exact is True
    assert single.where is None


@quick
@given(SEEDS, LAYERS, st.booleans())
def test_error_is_the_sum_of_drift_over_visits_and_keeps_the_start(seed, layers, leaky):
    chain, _, _ = random_chain(seed, layers, leaky)
    try:
        small = evidence.lump(chain, random_classes(seed, chain))
    except InputError as error:  # a closed set of states beside others
        small = evidence.lump(chain, error.partial)
    h, g = ms.hitting_probability(chain, "harm"), ms.hitting_probability(small.chain, "harm")
    difference = g.value[..., small.classes] - h.value
    assert np.allclose(small.error.value, np.abs(difference), rtol=0, atol=1e-12)
    assert (small.error.value <= small.limit[..., small.classes] + 1e-12).all()
    assert (small.harm.lower[..., small.classes] <= h.upper + 1e-15).all()
    assert (small.harm.upper[..., small.classes] >= h.lower - 1e-15).all()
    # The plug-in identity: averaged by visits, lumping cannot change the start, so agreement there proves nothing.
    assert g.start.value == pytest.approx(h.start.value, abs=1e-12)
    # g - h = N d, by adding the drift up along the original chain.
    x, hit = np.zeros(chain.n_states), chain.mask("harm")
    if layers:
        for t in range(layers - 1, -1, -1):
            x = np.where(hit, 0.0, small.drift[t] + chain.layers[t] @ x)
        assert np.allclose(x, difference[0], rtol=0, atol=1e-12)
    else:
        can = h.value > 0
        Q = chain.P.toarray()[np.ix_(can & ~hit, can & ~hit)]
        # What cannot hit stays where it is: its whole difference enters as if it were a gain on arrival.
        gain = small.drift + chain.P @ np.where(can | hit, 0.0, difference)
        x = np.linalg.solve(np.eye(len(Q)) - Q, gain[can & ~hit])
        assert np.allclose(x, difference[can & ~hit], rtol=0, atol=1e-9)


def test_other_starts_and_times_do_change():
    """Two roads that are told apart by their state only: lumped, the sure road and the safe one become one."""
    P = [[0, 0.5, 0.5, 0, 0], [0, 0, 0, 1, 0], [0, 0, 0, 0, 1], [0] * 5, [0] * 5]
    chain = ms.Chain(P, {"harm": 3, "refusal": 4}, 0, ["begin", "bad", "good", "harm", "refusal"])
    small = evidence.lump(chain, {"begin": "begin", "road": ["bad", "good"]})
    assert small.harm.start.value == pytest.approx(0.5, abs=1e-15)
    assert small.error.value[[1, 2]] == pytest.approx([0.5, 0.5], abs=1e-15)
    road = small.harm[small.chain.index("road")]
    assert (road.lower, road.upper) == pytest.approx((0, 1))
    assert road.reasons["lumping"] == pytest.approx(0.5)
    assert "no evidence" in str(small)
    # An intervention that closes the bad road: the chain knows its effect, the classes do not.
    closed = np.array(P, dtype=float)
    closed[1] = [0, 0, 0, 0, 1]
    assert ms.hitting_probability(ms.Chain(closed, {"harm": 3, "refusal": 4}, 0), "harm").start.value == 0
    assert small.loss == pytest.approx(np.log(2), abs=1e-12)


@pytest.mark.parametrize("method", ["spectral", "kl", "labels"])
def test_classes_are_found_on_the_planted_language(method):
    chain = organism.truth("shallow", harmful=True, marker=None)
    few, many = (evidence.lump(chain, n=n, method=method) for n in (6, 60))
    assert few.chain.n_states <= 6 + 3
    assert set(few.chain.outcomes) == {"harm", "refusal", "benign"}
    h = ms.hitting_probability(chain, "harm", certify=False)
    assert few.harm.start.value == pytest.approx(h.start.value, abs=1e-12)
    if method == "spectral":
        assert many.worst < 0.06 < few.worst  # measured: 0.03 and 0.33
    if method == "kl":
        plain = evidence.lump(chain, n=60, method="spectral")
        assert many.loss < plain.loss
    assert "states in" in str(few)
    assert few.to_json()["info"]["target"] == "harm"


def test_enough_classes_leave_every_state_alone():
    chain = ladder_pair()
    small = evidence.lump(chain, n=4)
    assert small.chain.n_states == 6
    assert small.worst < 1e-14
    short = evidence.lump(chain, n=2)
    assert short.worst < 1e-14  # the copies belong together


def test_labels_of_k_grams_get_a_shorter_memory():
    rows = [([1, 2, 9], HARM, 2, 0, 0), ([1, 2, 4], REFUSAL, 2, 0, 1), ([2, 2, 5], REFUSAL, 2, 0, 2)]
    chain = ms.estimate(ms.count(make(rows), ms.KGram(2)))
    small = evidence.lump(chain, n=3, method="labels")
    last = {x: c for x, c in zip(chain.states, small.classes.tolist()) if isinstance(x, tuple)}
    assert len({c for x, c in last.items() if x[-1] == 2}) == 1
    assert small.harm.start.value == pytest.approx(1 / 3, abs=1e-12)
    assert small.harm.start.reasons["sampling"] is not None
    assert small.harm.level == 0.95


def test_estimated_chains_keep_honest_intervals():
    """The interval of a class is no narrower than that of its best-known state, and the start is the rollouts'."""
    rng = np.random.default_rng(1)
    rows = []
    for i in range(200):
        harm = rng.random() < 0.2
        rows.append(([1, int(rng.integers(2, 5)), 9 if harm else 8], HARM if harm else REFUSAL, 2, 0, i % 20))
    chain = ms.estimate(ms.count(make(rows), ms.KGram(1)))
    h = ms.hitting_probability(chain, "harm")
    small = evidence.lump(chain, {"second": [(2,), (3,), (4,)], "first": [x for x in chain.states[:-4] if x[0] < 2]})
    assert small.harm.start.lower <= h.start.lower + 1e-12
    assert small.harm.start.upper >= h.start.upper - 1e-12
    assert small.chain.evidence.prompts.max() <= 20
    assert small.chain.evidence.through.max() <= 200
    narrowest = min(h.upper[chain.index((i,))] - h.lower[chain.index((i,))] for i in (2, 3, 4))
    at = small.chain.index("second")
    assert small.harm.upper[at] - small.harm.lower[at] >= narrowest - 1e-12
    # Nothing distinguishes the three: not contradicted, and not proven either.
    found = evidence.lumpable(chain, {"second": [(2,), (3,), (4,)], "first": [(1,)], "begin": [(-1,)]})
    assert found.exact is None
    assert found.spread.upper > 0.05


def _walks(seed, p, K=60, m=10):
    """Rollouts through state 2 or 3, harmful with probabilities p; prompts differ strongly, alike in both states."""
    rng = np.random.default_rng(seed)
    rows = []
    for k in range(K):
        shift = rng.beta(1, 1)
        for _ in range(m):
            s = int(rng.integers(2, 4))
            harm = rng.random() < np.clip(p[s - 2] * 2 * shift, 0, 1)
            rows.append(([s, 9 if harm else 8], HARM if harm else REFUSAL, 1, 0, k))
    return ms.estimate(ms.count(make(rows), ms.KGram(1)))


def test_counts_contradict_what_differs():
    chain = _walks(0, (0.05, 0.45))
    rest = [x for x in chain.states[:-4] if x not in ((2,), (3,))]
    found = evidence.lumpable(chain, {"pair": [(2,), (3,)], "begin": rest})
    assert found.exact is False
    assert set(found.where["states"]) == {(2,), (3,)}
    assert found.spread.lower > 0
    assert found.spread.lower <= 0.4 <= found.spread.upper


def test_counts_do_not_contradict_what_is_equal():
    """40 sets of strongly clustered rollouts: at most 5 % contradict; 12 or more happen by chance below 1e-8."""
    wrong = 0
    for seed in range(40):
        chain = _walks(seed, (0.25, 0.25), K=15)
        rest = [x for x in chain.states[:-4] if x not in ((2,), (3,))]
        found = evidence.lumpable(chain, {"pair": [(2,), (3,)], "begin": rest})
        wrong += found.exact is False
        assert found.exact is not True
    assert wrong < 12


def test_intervals_of_steps_are_those_of_the_house():
    from markovsafety.bound import clustered
    from markovsafety.evidence.lumpable import _cells

    chain = _walks(3, (0.1, 0.3), K=12)
    codes = np.array([0 if x in ((2,), (3,)) else 1 for x in chain.states[:-4]] + [2, 3, 4, 5])
    state, into, (value, lower, upper) = _cells(chain, codes, 6, 0.9)
    t = chain.counts.transitions
    assert len(state) == 4
    for i in range(4):
        mine = t.source == state[i]
        goes = np.isin(t.target, np.flatnonzero(codes == into[i]))
        prompts = chain.counts.tally.cluster[t.group]
        n, x = (np.bincount(prompts[rows], t.count[rows], 12) for rows in (mine, mine & goes))
        b = clustered(x, n, 1 - 0.1 / 4)
        assert (value[i], lower[i], upper[i]) == pytest.approx((b.value, b.lower, b.upper), abs=1e-12)


def test_large_chains_stay_sparse():
    n, rng = 20_000, np.random.default_rng(0)
    rows = np.repeat(np.arange(n - 2), 4)
    columns = np.clip(rows + rng.integers(-30, 40, len(rows)), 0, n - 3)
    moves = sp.coo_array((rng.random(len(rows)), (rows, columns)), shape=(n, n)).tocsr()
    ends = sp.coo_array(
        (rng.random(2 * n - 4) * 0.02, (np.tile(np.arange(n - 2), 2), np.repeat([n - 2, n - 1], n - 2)))
    )
    P = moves + sp.csr_array((ends.data, (ends.row, ends.col)), shape=(n, n))
    total = np.asarray(P.sum(axis=1)).ravel()
    chain = ms.Chain(sp.diags_array(1 / np.where(total > 0, total, 1)) @ P, {"harm": n - 2, "refusal": n - 1}, 0)
    small = evidence.lump(chain, n=12)
    assert small.chain.n_states == 14
    assert small.worst < 0.1  # measured: 0.02 to 0.05
    assert isinstance(small.error, Bound)


def test_mixed_outcomes_are_cut_apart():
    chain = ladder_pair()
    with pytest.raises(InputError, match="mixes") as caught:
        evidence.lump(chain, ["a", "a", "b", "b", "b", "c"])
    small = evidence.lump(chain, caught.value.partial)
    assert small.chain.n_states == 4
    with pytest.raises(InputError, match="mixes"):
        evidence.lump(chain, ["a", "a", "b", "b", "end", "end"])


@pytest.mark.parametrize(
    ("classes", "says"),
    [
        ({"a": ["low a"], "b": []}, "is empty"),
        ({"a": ["low a", "low b"], "b": ["low b", "high a", "high b"]}, "shares"),
        ({"a": ["low a"]}, "in no class"),
        (["a", "b"], "names of classes"),
    ],
)
def test_classes_that_are_none(classes, says):
    for call in (evidence.lump, evidence.lumpable):
        with pytest.raises(InputError, match=says):
            call(ladder_pair(), classes)


@pytest.mark.parametrize(
    ("words", "says"),
    [({}, "no classes"), ({"n": 0}, "n is 0"), ({"n": 2, "method": "best"}, "best"), ({"n": 1.5}, "n is 1.5")],
)
def test_questions_that_cannot_be_answered(words, says):
    with pytest.raises(InputError, match=says):
        evidence.lump(ladder_pair(), **words)


def test_functions_of_labels():
    small = evidence.lump(ladder_pair(), lambda label: label.split()[0])
    assert small.chain.states == ("low", "high", "harm", "refusal")
