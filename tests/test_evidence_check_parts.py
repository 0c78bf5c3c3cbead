"""The parts of `check`, one by one: walks, row tests, deviations, orders, curves, widths, and what is refused."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace

import numpy as np
import pytest

import markovsafety as ms
from markovsafety.bench.check_worlds import HARM, WORLDS, exact, speak
from markovsafety.bound import Bound
from markovsafety.chains.states import ByPrompt, Product
from markovsafety.evidence import orders
from markovsafety.evidence.findings import judged, rows_alike, simultaneous
from markovsafety.evidence.heterogeneity import between_categories, between_prompts, stratified
from markovsafety.evidence.homogeneity import drift, homogeneity
from markovsafety.evidence.kolmogorov import chapman_kolmogorov
from markovsafety.evidence.order import SMOOTHING, one_more
from markovsafety.evidence.timing import hit_curve
from markovsafety.evidence.walks import walks

FAIR = WORLDS["fair"]


def said(seed=0, law=FAIR, prompts=40, n=20, **more):
    return speak(np.random.default_rng(seed), law, prompts, n, **more)


ROLLS = said()
WALKS = walks(ROLLS, ms.KGram(1))
H = np.linspace(0.1, 0.6, WALKS.size)


def test_walks_are_the_counts():
    counts = ms.count(ROLLS, ms.KGram(1))
    order = [counts.states.index(x) for x in WALKS.labels]
    both = np.zeros((WALKS.size, WALKS.size + 5))
    np.add.at(both, (WALKS.state, WALKS.target), WALKS.mass)
    expected = counts.matrix.toarray()[order]
    assert np.array_equal(both[:, : WALKS.size], expected[:, order])
    assert np.array_equal(both[:, WALKS.size + 1 :], expected[:, len(order) :])
    assert np.array_equal(WALKS.visits, counts.visits[order])
    grams = walks(ROLLS, ms.KGram(2))
    pairs = {(WALKS.labels[b], WALKS.labels[s]) for b, s in zip(WALKS.before, WALKS.state) if b < WALKS.size}
    assert pairs == {((a,), (b,)) for a, b in grams.labels if b >= 0}


def test_walks_know_the_state_before_a_forced_prefix():
    forced = walks(said(prefix=(2, 1)), ms.KGram(1))
    first = forced.at == 2
    assert {forced.labels[b] for b in forced.before[first]} == {(2,)}
    assert {forced.labels[s] for s in forced.state[first]} == {(1,)}
    free = walks(said(), ms.KGram(1))
    assert (free.before[free.at == 0] == free.size).all()


def test_moments_of_pearsons_statistic_are_exact():
    # All 4! orders of the second column of one table: the mean and the p-value's two moments by enumeration.
    group, target = np.array([0, 0, 1, 1, 1]), np.array([0, 1, 1, 2, 0])
    a, b = np.bincount(group), np.bincount(target)
    expected = np.outer(a, b) / 5
    values = []
    for order in itertools.permutations(range(5)):
        table = np.zeros((2, 3))
        np.add.at(table, (group, target[list(order)]), 1)
        values.append(((table - expected) ** 2 / expected).sum())
    values = np.array(values)
    table = np.zeros((2, 3))
    np.add.at(table, (group, target), 1)
    x2 = ((table - expected) ** 2 / expected).sum()
    alike = rows_alike(np.zeros(5, int), group, target)
    assert alike.dispersion == pytest.approx(x2 / values.mean())
    from scipy.stats import gamma

    shape = values.mean() ** 2 / values.var()
    assert alike.p == pytest.approx(gamma.sf(x2, shape, scale=values.mean() / shape))
    assert (alike.df, alike.states) == (2, 1)
    assert alike.g2 == pytest.approx(2 * sum(n * np.log(n / e) for n, e in zip(table.flat, expected.flat) if n))


def test_rows_that_cannot_tell():
    # One visit, one group, one target: no state can tell, and nothing divides by zero.
    for state, group, target in (([0], [0], [0]), ([0] * 5, [0] * 5, [0, 1, 2, 0, 1]), ([0] * 5, range(5), [1] * 5)):
        alike = rows_alike(*(np.array(list(x)) for x in (state, group, target)))
        assert (alike.p, alike.states) == (1, 0)
    assert rows_alike(*[np.zeros(0, int)] * 3).p == 1


def test_simultaneous_intervals_by_hand():
    sums = np.array([[0.1, 0.0], [-0.2, 0.1], [0.1, -0.1]])
    effect, halves, p = simultaneous(np.array([0.5, -0.1]), sums, 0.9, "x")
    from scipy.stats import t

    assert halves[0] == pytest.approx(t.ppf(0.975, 2) * np.sqrt(3 / 2 * (sums[:, 0] ** 2).sum()))
    assert halves[1] == pytest.approx(t.ppf(0.975, 1) * np.sqrt(2 * (sums[:, 1] ** 2).sum()))  # two clusters contribute
    assert effect.value == 0.5
    assert effect.upper == max(0.5 + halves[0], 0.1 + halves[1])
    assert effect.lower == max(0, 0.5 - halves[0])
    assert 0 < p <= 1
    assert simultaneous(np.array([0.0]), np.zeros((3, 1)), 0.9, "x", 0.2)[0].upper == 0.2
    rounding = simultaneous(np.array([1e-17]), np.full((3, 1), 1e-19), 0.9, "x")[0]
    assert (rounding.lower, rounding.upper) == (0, 0)
    assert [judged(Bound(v, a, b), 0.05) for v, a, b in ((0, 0, 0.04), (0.1, 0.06, 0.2), (0.1, 0.04, 0.2))] == [
        "within",
        "off",
        "cannot tell",
    ]


def test_two_steps_by_hand():
    found = chapman_kolmogorov(WALKS, steps=(2,), groups=2)
    P = np.zeros((WALKS.size + 1, WALKS.size + 1))
    P[:-1, :-1] = WALKS.rows.toarray()
    P[:-1, -1] = np.bincount(WALKS.state, WALKS.harmed, WALKS.size) / WALKS.visits
    P[-1, -1] = 1
    squared = np.linalg.matrix_power(P, 2)[:-1, -1]
    hits = {}
    for i, answer in enumerate(ROLLS.answers()):
        words = [-1, *answer.tolist()]
        for at in range(len(words) - 1):
            hits.setdefault((words[at],), []).append(HARM in words[at + 1 : at + 3])
        assert ROLLS.prefill[i] == 0
    alone = [row for row in found.table if row["state"] != "the others"]
    assert len(alone) == 2
    for row in alone:
        assert row["observed"] == pytest.approx(np.mean(hits[row["state"]]))
        assert row["predicted"] == pytest.approx(squared[WALKS.labels.index(row["state"])])
        assert row["difference_lower"] < row["difference"] < row["difference_upper"]
    assert found.effect.value == pytest.approx(max(abs(r["difference"]) for r in found.table))
    # One step agrees by construction: no difference, and no error either.
    one = chapman_kolmogorov(WALKS, steps=(1,))
    assert one.effect.upper == pytest.approx(0, abs=1e-12)
    json.dumps(found.to_json(), allow_nan=False)


def test_error_of_two_steps_is_that_of_repeated_experiments():
    # The half-width at one state against the spread of 60 experiments: the ratio of two standard deviations, the
    # second from 60 numbers, lies within a factor 1.7 with probability 1 - 1e-8 (chi-squared with 59 degrees).
    found = []
    for r in range(60):
        w = walks(said([5, r]), ms.KGram(1))
        row = next(r for r in chapman_kolmogorov(w, steps=(2,), groups=4).table if r["state"] == (0,))
        found.append((row["difference"], row["difference_upper"] - row["difference"]))
    differences, halves = np.array(found).T
    from scipy.stats import t

    corrected = 1 - 0.05 / (2 * 3)
    ratio = differences.std(ddof=1) / (halves.mean() / t.ppf(corrected, 39))
    assert 1 / 1.7 < ratio < 1.7


def test_visits_that_the_limit_could_hide_are_left_out():
    cut = walks(said(limit=4), ms.KGram(1))
    assert cut.limit == 4
    assert np.isinf(WALKS.limit)
    table = chapman_kolmogorov(cut, steps=(2, 3, 10)).table
    assert {row["n"] for row in table} == {2, 3}
    first = sum(row["visits"] for row in table if row["n"] == 3)
    assert first <= ((cut.at <= 1).sum())


def test_drift_adds_up_to_the_misfit_of_shared_rows():
    group = (WALKS.at >= 2).astype(int)
    values, sums = drift(WALKS, H, group, np.full(2, float(len(ROLLS))))
    assert values.sum() == pytest.approx(0, abs=1e-14)  # what one stretch brings more the other brings less
    assert sums.sum(axis=0) == pytest.approx(values, abs=1e-14)
    # What a prompt contributes to the error is what a little more weight of it would change.
    for p in (0, 7):
        more = replace(WALKS, weight=np.where(WALKS.prompt == p, 1 + 1e-6, 1.0))
        moved, _ = drift(more, H, group, np.full(2, float(len(ROLLS))))
        assert (moved - values) * 1e6 == pytest.approx(sums[p], abs=1e-7)
    step = WALKS.after(H)
    mean = np.bincount(WALKS.state, step, WALKS.size) / WALKS.visits
    assert values[1] == pytest.approx((step - mean[WALKS.state])[group == 1].sum() / len(ROLLS))


def test_nothing_harmful_is_no_proof():
    # Words 0 and 1 in turns, then the end; no harm at all in 20 prompts.
    tokens = [[0, 1, 0, 1, 4], [1, 0, 4], [0, 0, 1, 4]] * 20
    calm = ms.Rollouts.of(
        tokens, prompt_id=np.repeat(np.arange(20), 3), outcome=1, hit=[len(t) - 1 for t in tokens],
        category=np.repeat(["a", "b"], 30).astype(object),
    )  # fmt: skip
    w = walks(calm, ms.KGram(1))
    h = np.zeros(w.size)
    highest = 1 - 0.025 ** (1 / 20) - 1e-12
    assert homogeneity(w, h).effect.upper >= highest
    assert homogeneity(w, h).verdict == "cannot tell"
    assert between_categories(w, h).effect.upper > 0.2  # ten prompts each
    assert between_prompts(w, h).effect.upper >= highest
    assert chapman_kolmogorov(w).verdict == "not tested"


def test_spread_between_prompts_is_measured():
    # Prompts with a hazard of 0 or 0.3 at every word, refusal 0.1: harm 0 or 0.75 from the one state there is.
    def law(last, before, t, prompt):
        hazard = np.where(prompt % 2 == 0, 0.3, 0.0)
        return np.column_stack([1 - hazard - 0.1, 0 * hazard, 0 * hazard, hazard, np.full(len(last), 0.1)])

    w = walks(said(law=law, prompts=60, n=40), ms.KGram(0))
    chain = ms.estimate(ms.count(said(law=law, prompts=60, n=40), ms.KGram(0)))
    found = between_prompts(w, np.array([ms.hitting_probability(chain, "harm").at_start.value]))
    # What a rollout's steps change beyond their mean: the spread of its expectation, by the two kinds of prompts.
    v = w.by_prompt(w.mass * (w.after(np.array([chain_h(chain)])) - mean_step(w, chain)))
    sizes = np.bincount(w.prompt, minlength=w.prompts)
    assert found.effect.value == pytest.approx((v / sizes).std(ddof=1), rel=0.02)
    assert found.effect.lower > 0.05
    assert (found.verdict, found.p) == ("off", 1 / 200)
    assert 0 < found.table[0]["correlation"] < 1


def chain_h(chain):
    return ms.hitting_probability(chain, "harm").at_start.value


def mean_step(w, chain):
    return float(np.average(w.after(np.array([chain_h(chain)])), weights=w.mass))


def test_categories_with_states_of_their_own_cannot_differ():
    states = Product([ByPrompt(), ms.KGram(1)])
    rolls = said(law=WORLDS["categories differ"])
    w = walks(rolls, states)
    assert between_categories(w, np.full(w.size, 0.3)).verdict == "within"
    chain = ms.estimate(ms.count(rolls, states))
    by_hand = [ms.estimate(ms.count(rolls[rolls.category == c], ms.KGram(1))) for c in ("even", "odd")]
    h = ms.hitting_probability(chain, "harm")
    for name, alone in zip(("even", "odd"), by_hand):
        own = ms.hitting_probability(alone, "harm")
        for label in [(-1,), (0,), (1,), (2,)]:
            assert h.value[chain.index((name, label))] == pytest.approx(own.value[alone.index(label)])


def test_pooled_beside_single_categories():
    law, prefix = WORLDS["categories differ"], (2, 1)
    chain = ms.estimate(ms.count(said(1, law, 100, 20), ms.KGram(1)))
    held = said(2, law, 60, 40, prefix=prefix)
    table = stratified(chain, walks(held, ms.KGram(1)), ms.hitting_probability(chain, "harm"))
    assert [(r["category"], r["k"], r["unseen"]) for r in table] == [("even", 2, 0), ("odd", 2, 0)]
    # Harm differs by 0.25 between the categories; standard errors are below 0.02.
    assert table[0]["measured"] - table[1]["measured"] > 0.1
    assert table[0]["pooled"] == table[1]["pooled"]
    for row in table:
        assert abs(row["stratified"] - row["measured"]) < 0.12 < 0.05 + abs(row["pooled"] - row["measured"])
    found = ms.check(chain, held).findings[-1]
    assert found.name == "heterogeneity between categories"
    assert found.table[-2:] == table
    assert "single categories" in found.text


def test_orders_prefer_the_memory_that_is_there():
    law = WORLDS["memory of two words"]
    found = orders(said(1, law, 150, 40), said(2, law, 80, 40), [ms.KGram(k) for k in (1, 2, 3)])
    assert found.prefers == {"aic": "KGram(2)", "bic": "KGram(2)", "held_out": "KGram(2)"}
    second, third = found.table[1:]
    assert second["p"] < 1e-12
    assert second["gain"].lower > 0
    assert third["gain"].lower < 0.0005
    assert third["df"] == 9 * 2 * 4 or third["df"] < 9 * 3 * 5
    # AIC and BIC are those of the counts.
    counts = ms.count(said(1, law, 150, 40), ms.KGram(1)).matrix.toarray()
    loglik = sum(n * np.log(n / row.sum()) for row in counts for n in row if n)
    first = found.table[0]
    assert first["loglik"] == pytest.approx(loglik)
    assert first["parameters"] == 4 * 4
    assert first["aic"] == pytest.approx(2 * 16 - 2 * loglik)
    assert first["bic"] == pytest.approx(np.log(counts.sum()) * 16 - 2 * loglik)
    json.dumps(found.to_json(), allow_nan=False)
    assert "held-out" in str(found)


def test_smoothing_is_what_is_stated():
    fit = ms.Rollouts.of([[0, 1, 4], [0, 0, 4]], prompt_id=[0, 1], outcome=1, hit=2)
    held = ms.Rollouts.of([[0, 2]], prompt_id=[5], outcome=0, hit=1)
    row = orders(fit, held, [ms.KGram(1)]).table[0]
    # After the start: 2 of 2 are word 0. After 0: 3 tokens, none of them 2, which the fit never saw.
    q = lambda n: (n + 1) / (6 + 3 + 1)  # noqa: E731
    expected = np.log((2 + SMOOTHING * q(3)) / (2 + SMOOTHING)) + np.log(SMOOTHING * q(0) / (3 + SMOOTHING))
    assert row["held_out"] == pytest.approx(expected / 2)
    assert row["unseen"] == 0
    lost = ms.Rollouts.of([[2, 2]], prompt_id=[5], outcome=0, hit=1)
    assert orders(fit, lost, [ms.KGram(1)]).table[0]["unseen"] == 0.5
    lone = orders(fit, held, [ms.KGram(0), ms.KGram(1)]).table[1]["gain"]
    assert (lone.lower, lone.upper) == (-np.inf, np.inf)  # one prompt


def test_one_more_state_of_memory():
    law = WORLDS["memory of two words"]
    short = one_more(walks(said(1, law, 80, 80), ms.KGram(1)))
    assert short.verdict == "off"
    assert short.table[0]["gain"].lower > 0
    assert short.table[0]["bic"] < 0
    assert one_more(walks(said(1, FAIR, 80, 80), ms.KGram(1))).table[0]["gain"].lower < 0
    few = one_more(walks(said(1, law, 6, 2), ms.KGram(1)))
    assert few.verdict in ("within", "cannot tell")


def test_curve_is_cut_where_rollouts_are():
    chain = exact()
    mixed = ms.Rollouts.concat([said(limit=5), said()])
    assert mixed.lengths.max() > 5
    curve = hit_curve(chain, mixed)
    assert len(curve["t"]) == 5
    assert curve["gap_lower"] <= curve["gap"] <= curve["gap_upper"]
    assert hit_curve(chain, said(prefix=(1,))) is None
    # Copies of one prompt's answers are no further prompts.
    single, many = said(3, prompts=1, n=400), said(3, prompts=40, n=10)
    assert hit_curve(chain, single)["noise"] == pytest.approx(np.sqrt(np.log(40) / 800))
    assert hit_curve(chain, many)["noise"] < 0.1
