"""Sampling error of P(harm): Dirichlet posterior, delta method, bootstrap; closed forms, identities, coverage."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from made import BENIGN, HARM, REFUSAL, make
from scipy.special import betaincinv

import markovsafety as ms
from markovsafety.bound import clopper_pearson, clustered
from markovsafety.chains import Product
from markovsafety.evidence.posterior import posterior, posterior_draws
from markovsafety.evidence.prompt_rows import prompt_rows
from markovsafety.evidence.resample import bootstrap, delta


def walks(rng, harm, *, n=16, going=0.5, prefill=(0,)) -> list:
    """Rollouts of prompts with their own share of harm among the endings; tokens 3 to 5 go on, 1 is harm, 2 refuses."""
    data = []
    for prompt, q in enumerate(harm):
        for i in range(n):
            k = prefill[i % len(prefill)]
            tokens = [3 + prompt % 3] * k
            while rng.random() < going:
                tokens.append(int(rng.integers(3, 6)))
            harmful = rng.random() < q
            data.append(([*tokens, 1 if harmful else 2], HARM if harmful else REFUSAL, len(tokens), k, prompt))
    return data


def single(hits: int, total: int, prompts: int | None = None) -> SimpleNamespace:
    """Rollouts of one token each."""
    rows = [([1], HARM, 0, 0, i) if i < hits else ([2], REFUSAL, 0, 0, i) for i in range(total)]
    return make([(*row[:4], row[4] % (prompts or total)) for row in rows])


# --- posterior ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by_prompt", [True, False])
def test_a_single_step_has_a_beta_posterior(by_prompt):
    """Conjugacy: 12 of 120, and a prior of 8 over four outcomes: Beta(14, 114). Each prompt made one transition,
    so weights on prompts are the same law. 40,000 draws: the quantiles have standard errors below 4e-4, so 6 of them
    are 2.4e-3 (false alarm 2e-9). The interval by prompt is wider by Student's factor, at 12 harmful prompts 1.17."""
    counts = ms.count(single(12, 120), ms.KGram(0))
    rows = prompt_rows(counts, "harm", "dirichlet", 8)
    _, at = posterior_draws(rows, 40_000, 8, by_prompt, 0, np.arange(5))
    want = betaincinv(14, 114, [0.025, 0.5, 0.975])
    assert np.abs(np.quantile(at[:, 0], [0.025, 0.5, 0.975]) - want).max() < 2.4e-3
    bound = posterior(counts, prior=8, draws=40_000, by_prompt=by_prompt).at_start
    wider = (bound.upper - bound.lower) / np.ptp(want)
    assert wider == pytest.approx(1.17 if by_prompt else 1, abs=0.03)
    assert bound.value == pytest.approx(14 / 128, abs=1.2e-3)
    assert bound.info["plugin"] == pytest.approx(0.1)
    assert bound.info["bias"] == pytest.approx(bound.value - 0.1)
    assert "prior of 8" in bound.info["note"]


def test_two_rows_have_the_moments_of_a_product_of_betas():
    """From integer counts: h = p1 p2 with independent betas, whose mean and variance are closed. 6 standard errors."""
    C = np.array([[0, 30, 0, 50], [0, 0, 12, 24], [0] * 4, [0] * 4])
    chain = ms.Chain.from_counts(C, {"harm": 2, "refusal": 3}, 0)
    bound = posterior(chain, prior=0.3, draws=20_000)
    # Row 0: one state and two outcomes share the prior; row 1: two outcomes.
    mean = (30.1 * 12.15 / 36.3 + 0.1) / 80.3
    assert bound.at_start.value == pytest.approx(mean, abs=6 * 0.04 / np.sqrt(20_000))
    low, high = betaincinv(12.15, 24.15, [0.025, 0.975])
    assert bound.lower[1] == pytest.approx(low, abs=6e-3)
    assert bound.upper[1] == pytest.approx(high, abs=6e-3)
    assert (bound.value[2], bound.value[3]) == (1, 0)
    assert "independent" in bound.info["note"]
    part = posterior(chain, prior=0.3, draws=20_000, states=[1, 0])
    assert part.value.tolist() == bound.value[[1, 0]].tolist()


def test_posterior_answers_for_states_and_forced_starts():
    rng = np.random.default_rng(0)
    counts = ms.count(make(walks(rng, rng.beta(2, 6, 40), prefill=(0, 1, 2))), ms.KGram(1))
    bound, chain = posterior(counts), ms.estimate(counts)
    assert bound.shape == (chain.n_states,)
    assert set(bound.info["entry"]) == {0, 1, 2}
    assert bound.info["entry"][0] is bound.at_start
    h = ms.hitting_probability(chain, "harm")
    assert (bound.lower <= h.value).all()
    assert (h.value <= bound.upper).all()
    for k, at in bound.info["entry"].items():
        assert at.info["plugin"] == pytest.approx(float(chain.entry[k] @ h.value), abs=1e-12)
        assert abs(at.value - at.info["plugin"]) < at.reasons["sampling"] / 4
    again = posterior(chain)
    assert again.lower.tolist() == bound.lower.tolist()
    assert posterior(counts, seed=1).lower.tolist() != bound.lower.tolist()


# --- where methods must agree ------------------------------------------------------------------------------------


def test_independent_delta_is_the_binomial_variance():
    """Complete rollouts from one state: visits are n times the chain's, and sum N^2 sigma^2 / n_s = h (1 - h) / n,
    whatever the states."""
    rng = np.random.default_rng(1)
    rolls = make(walks(rng, np.full(30, 0.3)))
    for states in (ms.KGram(0), ms.KGram(1), ms.Position(), Product((ms.Position(), ms.KGram(1)))):
        bound = delta(ms.count(rolls, states), by_prompt=False)
        raw = (rolls.outcome == HARM).mean()
        assert bound.value == pytest.approx(raw, abs=1e-12)
        assert bound.info["standard_error"] ** 2 == pytest.approx(raw * (1 - raw) / 480, rel=1e-10)
        ends = clopper_pearson(raw * 480, 480)
        assert (bound.lower, bound.upper) == pytest.approx(ends, abs=1e-9)


def test_delta_by_prompt_is_the_clustered_interval_of_the_rollouts():
    """The terms of a rollout telescope, so a prompt's influence is its events less the mean."""
    rng = np.random.default_rng(2)
    rolls = make(walks(rng, rng.beta(1, 3, 40)))
    events = np.bincount(rolls.prompt_id, rolls.outcome == HARM)
    raw = clustered(events, np.full(40, 16))
    for states in (ms.KGram(0), ms.KGram(2), ms.Position()):
        counts = ms.count(rolls, states)
        error = prompt_rows(counts, "harm").influence(0)
        assert np.abs(error - (events - raw.value * 16) / 640).max() < 1e-14
        bound = delta(counts)
        assert (bound.lower, bound.upper) == pytest.approx((raw.lower, raw.upper), abs=1e-9)
        assert bound.info["deff"] == pytest.approx(raw.info["deff"])


def test_influences_are_derivatives_in_the_weights_of_prompts():
    """Finite differences of the whole road, estimate and solve, from a start that pools rollouts of three prefills."""
    rng = np.random.default_rng(3)
    data = walks(rng, rng.beta(2, 4, 12), prefill=(0, 1, 3))
    prompt = np.array([row[4] for row in data])
    rows = prompt_rows(ms.count(make(data), ms.KGram(1)), "harm")
    for k in (0, 1, 3):
        error = rows.influence(k)
        assert abs(error.sum()) < 1e-14
        for j in (0, 5):
            ends = []
            for step in (-1e-5, 1e-5):
                weight = np.where(prompt == j, 1 + step, 1.0)
                chain = ms.estimate(ms.count(make(data, weight=weight), ms.KGram(1)))
                h = ms.hitting_probability(chain, "harm", certify=False).value
                ends.append(float(chain.entry[k] @ h))
            assert (ends[1] - ends[0]) / 2e-5 == pytest.approx(error[j], abs=1e-8)


def test_delta_bootstrap_and_posterior_agree_where_there_is_plenty():
    """2000 draws: standard errors of the ends about 4 % of the half-width; 25 % is beyond six of them."""
    rng = np.random.default_rng(4)
    counts = ms.count(make(walks(rng, rng.beta(3, 7, 120), prefill=(0, 2))), ms.KGram(1))
    bounds = posterior(counts, draws=4000).info["entry"]
    for k in (0, 2):
        sizes = {b.info["method"]: b for b in (delta(counts, prefill=k), bootstrap(counts, prefill=k), bounds[k])}
        widths = [b.reasons["sampling"] for b in sizes.values()]
        assert max(widths) < 1.25 * min(widths)
        assert np.ptp([b.upper for b in sizes.values()]) < 0.25 * min(widths)
    assert delta(counts).info["standard_error"] == pytest.approx(
        bootstrap(counts, draws=4000).info["standard_error"], rel=0.1
    )  # sd of a standard deviation from 4000 draws: 1.1 %, and a second-order term of 1 / K


# --- clustering --------------------------------------------------------------------------------------------------


def test_rollouts_that_repeat_each_other_narrow_nothing():
    """Every rollout four times: the same prompts, no news. The methods that take transitions for independent halve."""
    rng = np.random.default_rng(5)
    data = walks(rng, rng.beta(2, 6, 60), n=4)
    once, often = (ms.count(make(data * times), ms.KGram(1)) for times in (1, 4))
    for method in (delta, bootstrap, lambda c: posterior(c).at_start):
        one, four = method(once), method(often)
        assert four.reasons["sampling"] == pytest.approx(one.reasons["sampling"], rel=0.06)
    naive = [delta(c, by_prompt=False).reasons["sampling"] for c in (once, often)]
    assert naive[1] == pytest.approx(naive[0] / 2, rel=0.05)
    naive = [posterior(c, by_prompt=False).at_start.reasons["sampling"] for c in (once, often)]
    assert naive[1] < 0.6 * naive[0]


def test_a_single_prompt_says_that_it_is_one():
    rng = np.random.default_rng(6)
    counts = ms.count(make(walks(rng, [0.3], n=200)), ms.KGram(1))
    for bound in (delta(counts), bootstrap(counts), posterior(counts).at_start):
        assert "one prompt only" in bound.info["note"]
        assert bound.reasons["sampling"] > 0.05
    assert "cannot be resampled" in bootstrap(counts).info["joined"]


def test_no_event_is_not_no_interval():
    """0 of 330 prompts of four rollouts: an upper end of 1.11 % from the prompts, whatever the method; and why."""
    data = [([3, 2], REFUSAL, 1, 0, i // 4) for i in range(1320)]
    counts = ms.count(make(data), ms.KGram(1))
    for bound in (delta(counts), bootstrap(counts), posterior(counts).at_start):
        assert bound.lower == 0
        assert bound.upper == pytest.approx(0.01112, abs=1e-5)
        assert "0 of 1320" in bound.info["joined"]
    states = posterior(counts)
    assert (states.upper[:2] >= 0.0111).all()
    assert (states.value[:2] > 0).all()  # the prior's doing, and named so
    assert "0 without it" in states.at_start.info["note"]


def test_few_events_are_joined_with_clopper_pearson():
    counts = ms.count(single(2, 200), ms.KGram(0))
    ends = clopper_pearson(2, 200)
    for bound in (delta(counts), bootstrap(counts), posterior(counts).at_start):
        assert bound.lower <= ends[0] + 1e-12
        assert bound.upper >= ends[1] - 1e-12
        assert "2 of 200" in bound.info["joined"]


# --- rows never seen ---------------------------------------------------------------------------------------------


def test_a_row_never_seen_widens_by_all_it_could_do():
    """Half of the walk goes through state 1; unseen it may always harm or never: [0.2, 0.7] instead of 0.325."""
    chain = ms.Chain([[0, 0.5, 0.2, 0.3], [0, 0, 0.25, 0.75], [0] * 4, [0] * 4], {"harm": 2, "refusal": 3}, 0)
    whole = delta(chain, visits=[10**6, 10**6, 0, 0])
    blind = delta(chain, visits=[10**6, 0, 0, 0])
    assert (whole.info["unseen"], whole.info["unseen_width"]) == (0, 0)
    assert whole.reasons["sampling"] < 2e-3
    assert blind.info["unseen"] == 1
    assert blind.info["unseen_width"] == pytest.approx(0.5)
    assert (blind.lower, blind.upper) == pytest.approx((0.2, 0.7), abs=2e-3)
    assert "never seen" in blind.info["note"]
    want = (0.5**2 * 0.25 * 0.75) / 36 + (0.2 + 0.5 * 0.25**2 - 0.325**2) / 50  # N^2 sigma^2 / n, by hand
    assert delta(chain, visits=[50, 36, 0, 0]).info["standard_error"] ** 2 == pytest.approx(want)
    nothing = delta(chain, visits=[0, 0, 0, 0])
    assert (nothing.lower, nothing.upper) == (0, 1)


# --- coverage ----------------------------------------------------------------------------------------------------


def test_intervals_cover_the_truth_under_clustering():
    """150 experiments of 60 prompts, each with its own harm (beta(2, 6)); P(harm) = 1/4. At a true coverage of 93 %
    fewer than 114 hits have probability below 1e-11 each; the intervals that ignore prompts are seen to fall behind."""
    rng = np.random.default_rng(7)
    hits: dict[str, int] = dict.fromkeys(("delta", "bootstrap", "posterior", "independent"), 0)
    for _ in range(150):
        counts = ms.count(make(walks(rng, rng.beta(2, 6, 60), n=10, going=0.2)), ms.KGram(1))
        found = {
            "delta": delta(counts),
            "bootstrap": bootstrap(counts, draws=400),
            "posterior": posterior(counts, draws=400, states=[0]).at_start,
            "independent": delta(counts, by_prompt=False),
        }
        for name, bound in found.items():
            hits[name] += bound.lower <= 0.25 <= bound.upper
    assert min(hits[name] for name in ("delta", "bootstrap", "posterior")) >= 114
    assert hits["independent"] < min(hits["delta"], hits["posterior"])


# --- what is refused ---------------------------------------------------------------------------------------------


def test_bad_input():
    rng = np.random.default_rng(8)
    counts = ms.count(make(walks(rng, np.full(20, 0.3))), ms.KGram(1))
    bad: Any
    for bad in (-1.0, 0.0, np.inf, np.nan, True, "flat"):
        with pytest.raises(ms.InputError, match="prior"):
            posterior(counts, prior=bad)
    for bad in (10, 2.5, True):
        with pytest.raises(ms.InputError, match="draws"):
            posterior(counts, draws=bad)
        with pytest.raises(ms.InputError, match="draws"):
            bootstrap(counts, draws=bad)
    with pytest.raises(ms.InputError, match="no counts"):
        delta(ms.toy.ladder())
    with pytest.raises(ms.InputError, match="forced tokens"):
        delta(counts, prefill=5)
    with pytest.raises(ms.InputError, match="interval"):
        bootstrap(counts, interval="wald")
    with pytest.raises(ms.InputError, match="visits"):
        delta(ms.estimate(counts), visits=[1, 2])
    with pytest.raises(ms.InputError, match="level"):
        posterior(counts, level=1.5)


def test_weights_that_overflow_are_refused():
    rng = np.random.default_rng(9)
    data = walks(rng, np.full(12, 0.3))
    counts = ms.count(make(data, weight=np.full(len(data), 1e200)), ms.KGram(1))
    for method in (delta, bootstrap, posterior):
        with pytest.raises(ms.InputError, match="overflow"):
            method(counts)


def test_few_effective_rollouts_are_refused_with_the_answer():
    rng = np.random.default_rng(10)
    data = walks(rng, np.full(30, 0.4))
    heavy = np.where(np.array([row[4] for row in data]) < 2, 1e4, 1.0)
    for method in (delta, bootstrap, lambda c: posterior(c, draws=200)):
        with pytest.raises(ms.UntrustedError, match="effective sample size") as caught:
            method(ms.count(make(data, weight=heavy), ms.KGram(1)))
        assert isinstance(caught.value.partial, ms.Bound)
        assert caught.value.partial.reasons["sampling"] is not None


def test_rows_with_one_successor_are_no_trouble():
    """Every answer says 3 first: the row has one target, no variance of its own, and h is decided behind it."""
    rng = np.random.default_rng(11)
    data = [
        ([3, 1], HARM, 1, 0, i) if rng.random() < 0.3 else ([3, 2], BENIGN if i % 2 else REFUSAL, 1, 0, i)
        for i in range(150)
    ]
    counts = ms.count(make(data), ms.KGram(1))
    raw = sum(row[1] == HARM for row in data)
    for bound in (delta(counts), bootstrap(counts), posterior(counts).at_start):
        ends = clopper_pearson(raw, 150)
        assert (bound.lower, bound.upper) == pytest.approx(ends, abs=0.02)
