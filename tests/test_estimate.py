"""Chains from counts: the start identity in rationals, smoothing, categories, class masses."""

from __future__ import annotations

from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from made import BENIGN, BY_HAND, HARM, MAPS, REFUSAL, TRUNCATED, ended, make, quick, rows

import markovsafety as ms
from markovsafety.chains import single_token_outcomes


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


def five_positions(rng: np.random.Generator, n: int) -> SimpleNamespace:
    """Answers of at most five tokens; each is harmful with .00342 and refuses with .1, and the last refuses if nothing
    did: P(harm) = .0139."""
    draw = rng.random((n, 5))
    ended = draw < 0.10342
    ended[:, -1] = True
    length = ended.argmax(axis=1) + 1
    last = draw[np.arange(n), length - 1]
    rows = [
        ([0] * (k - 1) + [1], HARM if u < 0.00342 else REFUSAL, k - 1, 0, i)
        for i, (k, u) in enumerate(zip(length, last))
    ]
    return make(rows)


def test_laplace_smoothing_inflates_rare_harm_fourfold():
    """One pseudo-count for every target, 100 rollouts: .0139 becomes .057 on the average, with a tenth of one .019.

    The averages of 200 estimates have standard errors of .0007, .0008 and .0008: six of them to either side (false
    alarm 2e-9 each).
    """
    truth = 0.00342 * sum((1 - 0.10342) ** t for t in range(5))
    assert truth == pytest.approx(0.0139, abs=5e-5)
    rng = np.random.default_rng(0)
    found: dict[float, list[float]] = {0.0: [], 0.5: [], 5.0: []}
    for _ in range(200):
        counts = ms.count(five_positions(rng, 100), ms.Position())
        for prior, values in found.items():
            chain = ms.estimate(counts, "dirichlet", prior) if prior else ms.estimate(counts)
            values.append(float(chain.start @ float_hitting(chain)))
    mean = {prior: float(np.mean(values)) for prior, values in found.items()}
    assert mean[0.0] == pytest.approx(truth, abs=0.005)
    assert mean[0.5] == pytest.approx(0.0187, abs=0.005)
    assert mean[5.0] == pytest.approx(0.057, abs=0.0045)
    assert mean[5.0] > 3.7 * truth


def test_a_smoothed_chain_says_that_it_is_biased(tmp_path):
    """In the bound at the start, with what the rollouts alone say, also from a file; the plain estimate has no note."""
    counts = ms.count(five_positions(np.random.default_rng(3), 100), ms.Position())
    raw = float((counts.tally.outcomes.sum(axis=0) / 100)[0])
    smooth = ms.estimate(counts, "dirichlet", 5.0)
    for chain in (smooth, ms.read_chain(ms.write_chain(smooth, tmp_path / "c.npz"))):
        assert chain.evidence is not None
        assert chain.evidence.prior == 5
        bound = ms.hitting_probability(chain, "harm")
        assert bound.at_start.info["note"] == (
            f"biased by a prior of 5 pseudo-transitions per row; the rollouts alone say {raw:.3g}"
        )
        assert "biased" in str(bound)
        assert bound.at_start.lower <= raw <= bound.at_start.upper
    plain = ms.estimate(counts)
    assert plain.evidence is not None
    assert plain.evidence.prior == 0
    assert "note" not in ms.hitting_probability(plain, "harm").at_start.info


def test_estimate_refuses_what_it_does_not_know():
    with pytest.raises(ms.InputError, match="SimpleNamespace, not Counts") as caught:
        ms.estimate(make(BY_HAND))  # pyright: ignore[reportArgumentType]
    assert "count(" in caught.value.next
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


def processed(law: np.ndarray, temperature: float, top_p: float) -> np.ndarray:
    """Rows of a law after a temperature and a cut at top_p."""
    hot = law ** (1 / temperature)
    hot /= hot.sum(axis=1, keepdims=True)
    order = np.argsort(-hot, axis=1, kind="stable")
    ranked = np.take_along_axis(hot, order, axis=1)
    kept = ranked * (ranked.cumsum(axis=1) - ranked < top_p)
    np.put_along_axis(hot, order, kept, axis=1)
    return hot / hot.sum(axis=1, keepdims=True)


def hidden(n: int, law: np.ndarray, seed: int) -> SimpleNamespace:
    """Answers whose law depends on a state that the tokens do not show (drawn anew each token): token 1 is harm, 2 the
    end; with the mass of harm at every token."""
    rng = np.random.default_rng(seed)
    data, masses = [], []
    for i in range(n):
        tokens: list[int] = []
        while not tokens or (tokens[-1] not in (1, 2) and len(tokens) < 12):
            row = law[rng.integers(len(law))]
            tokens.append(int(rng.choice(len(row), p=row)))
            masses.append(row[1])
        end = {1: HARM, 2: BENIGN}.get(tokens[-1], TRUNCATED)
        data.append((tokens, end, -1 if end == TRUNCATED else len(tokens) - 1, 0, i % 20))
    return make(data, mass_harm=np.array(masses))


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.6, 1.0), (1.5, 0.9), (1.0, 0.91)])
def test_masses_of_the_law_sampled_from_are_unbiased_and_less_noisy(temperature, top_p):
    """200 data sets of 20 rollouts. Hits are the summed mass within six standard errors (false alarm 2e-9), and not the
    summed raw mass; and the mass row varies less than half as much as the sampled frequency (the true ratios are above
    6; an F of 200 and 200 degrees of freedom below a third has probability 1e-13)."""
    raw = np.array([[0.62, 0.02, 0.3, 0.06], [0.5, 0.06, 0.36, 0.08], [0.55, 0.1, 0.3, 0.05]])
    law = processed(raw, temperature, top_p)
    found: dict[str, list[float]] = {"mle": [], "mass": []}
    total, hits, variance, raw_total = 0.0, 0, 0.0, 0.0
    lookup = dict(zip(law[:, 1].tolist(), raw[:, 1].tolist()))
    for seed in range(200):
        rolls = hidden(20, law, seed)
        counts = ms.count(rolls, ms.KGram(0))
        if counts.tally.outcomes[:, :3].sum() == 0:
            continue
        for method, values in found.items():
            values.append(ms.estimate(counts, method).P[0, 1])
        mass = counts.mass["harm"].values
        total, hits = total + mass["total"].sum(), hits + int((rolls.outcome == HARM).sum())
        variance += mass["variance"].sum()
        raw_total += sum(lookup[m] for m in rolls.columns["mass_harm"].tolist())
    assert abs(hits - total) < 6 * np.sqrt(variance)
    if (temperature, top_p) != (1.0, 1.0):
        assert abs(hits - raw_total) > 6 * np.sqrt(variance)
    spread = {k: np.var(v, ddof=1) for k, v in found.items()}
    assert spread["mle"] > 2 * spread["mass"]
    # Truncation keeps its own frequency, so a row is the mass given that a token was sampled.
    assert np.mean(found["mass"]) == pytest.approx(law[:, 1].mean(), rel=0.1)
