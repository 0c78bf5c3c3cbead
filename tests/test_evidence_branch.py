"""Branch correlation and the surface F(m, k): exact on chains, unbiased and clustered on rollouts."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given
from made import HARM, REFUSAL, make, quick
from small_chains import LAYERS, SEEDS, random_chain

import markovsafety as ms
from markovsafety import InputError, UntrustedError, evidence, organism, toy
from markovsafety.depth import icc, measured_width


def continued(x, n, prompt, k=1):
    """Rollouts with x[g] harmful continuations of n[g] of prefix g, which is k tokens long."""
    rows = []
    for g, (harmful, total, p) in enumerate(zip(x, n, prompt)):
        for j in range(total):
            outcome = HARM if j < harmful else REFUSAL
            rows.append(([g] * k + [7], outcome, k, k, int(p)))
    return make(rows)


@quick
@given(SEEDS, LAYERS)
def test_chain_against_enumerated_laws(seed, layers):
    """E[h^m] and Var h over the law of X_k, by powers of the matrix; harm information adds up."""
    chain, _, _ = random_chain(seed, layers)
    depths = range(min(layers, 4) + 1) if layers else range(5)
    found = evidence.branch_exact(chain, depths, (1, 2, 3))
    h = ms.hitting_probability(chain, "harm")
    p, law, gained = h.start.value, np.asarray(chain.start), 0.0
    for i, k in enumerate(depths):
        here = np.asarray(h.value)[k] if layers else np.asarray(h.value)
        exact = [float(law @ here**m) for m in (1, 2, 3)]
        assert found.surface.value[i] == pytest.approx(exact, abs=1e-13)
        assert found.surface.value[i, 0] == pytest.approx(p, abs=1e-13)  # a martingale
        if 1e-9 < p < 1 - 1e-9:
            rho = float(law @ (here - p) ** 2) / (p * (1 - p))
            assert found.rho.value[i] == pytest.approx(rho, abs=1e-9)
            assert found.rho.lower[i] <= rho + 1e-12
            assert rho - 1e-12 <= found.rho.upper[i]
            start = float(chain.start @ ((h.value[0] if layers else h.value) - p) ** 2)
            assert rho * p * (1 - p) == pytest.approx(start + gained, abs=1e-9)
        if k < depths[-1]:
            P = chain.layers[k if layers else 0].toarray()
            P[chain.mask("harm")] = np.eye(chain.n_states)[chain.mask("harm")]
            law, gained = law @ P, gained + found.information[k]
    assert (np.diff(found.surface.value, axis=1) <= 1e-15).all()


def test_harm_information_sums_to_the_variance_of_harm():
    chain = toy.deep(5)
    p = ms.hitting_probability(chain, "harm").start.value
    far = evidence.branch_exact(chain, [0, 600], (1, 4))
    assert far.information.sum() == pytest.approx(p * (1 - p), rel=1e-10)
    assert far.rho.value == pytest.approx([0, 1], abs=1e-10)
    assert far.surface.value[0] == pytest.approx([p, p**4], rel=1e-12)
    assert far.surface.value[1] == pytest.approx([p, p], rel=1e-10)
    assert far.rho.level == 1


def test_layered_chains_branch_as_simulated():
    """F(4, 5) of a layered chain against 200 000 prefixes; binomial error at the 1e-8 level."""
    rng = np.random.default_rng(0)
    layers = []
    for _ in range(12):
        P = np.zeros((4, 4))
        P[:2, :2] = rng.dirichlet(np.ones(2), 2) * 0.9
        P[0, 2:], P[1, 2:] = (0.08, 0.02), (0.01, 0.09)
        layers.append(P)
    chain = ms.Chain.layered(layers, {"harm": 2, "refusal": 3}, 0)
    exact = evidence.branch_exact(chain, 5, 4).surface[0, 0].value
    state, n = np.zeros(200_000, dtype=int), 200_000
    for t in range(5):
        P = layers[t].copy()
        P[[2, 3], [2, 3]] = 1
        state = (rng.random((n, 1)) > P[state].cumsum(axis=1)).sum(axis=1)
    h = ms.hitting_probability(chain, "harm").value[5]
    assert abs(np.mean(rng.random((n, 4)).max(axis=1) < h[state]) - exact) < 6 * np.sqrt(exact / n)


def test_unbiased_by_enumeration():
    """The mean of C(x, m) / C(n, m) over all outcomes of 3 continuations is h^m."""
    from markovsafety.evidence.branch import _power

    h, n = 0.3, 3
    for m in (1, 2, 3):
        mean = sum(
            np.prod([h if hit else 1 - h for hit in hits]) * _power(np.array([sum(hits)]), np.array([n]), m)[0]
            for hits in product((0, 1), repeat=n)
        )
        assert mean == pytest.approx(h**m, abs=1e-15)


def test_conventions_are_those_of_sweep_and_width():
    rng = np.random.default_rng(2)
    x = rng.binomial(8, rng.beta(0.5, 1.5, 40))
    rolls = continued(x, [8] * 40, range(40), k=3)
    found = evidence.branch(rolls, width=(1, 2, 4, 8))
    grid = ms.sweep(rolls, depth=[3], width=[1, 2, 4, 8])
    assert found.k == (3,)
    assert found.surface.value[0] == pytest.approx(np.asarray(grid.harm.value)[0], abs=1e-15)
    assert found.surface.value[0] == pytest.approx(measured_width(x, np.full(40, 8), [1, 2, 4, 8]).value, abs=1e-15)
    assert found.surface.lower[0, 0] == pytest.approx(grid.harm.lower[0, 0], abs=1e-12)
    # One prefix per prompt: rho is the intra-class correlation of the prompts' answers.
    assert found.rho.value[0] == pytest.approx(icc(x, np.full(40, 8)).value, abs=1e-12)
    chain = toy.shallow(3)
    exact = evidence.branch_exact(chain, [0, 2, 6], (1, 2, 4)).surface.value
    swept = ms.sweep(ms.Chain(chain.P, chain.outcomes, 0), depth=[0, 2, 6], width=[1, 2, 4])
    early = [1 - s for s in swept.info["alive"]]
    harmed = [float(np.linalg.matrix_power(chain.P.toarray(), k)[0, chain.index("harm")]) for k in (0, 2, 6)]
    for i in range(3):
        whole = harmed[i] + (1 - early[i]) * np.asarray(swept.harm.value)[i]
        assert exact[i] == pytest.approx(whole, abs=1e-13)


def test_several_prefixes_of_one_prompt_are_one_cluster():
    rng = np.random.default_rng(3)
    prompt = np.repeat(np.arange(12), 10)
    h = np.repeat(rng.beta(0.6, 1.2, 12), 10)
    x = rng.binomial(6, h)
    apart = evidence.branch(continued(x, [6] * 120, np.arange(120)))
    together = evidence.branch(continued(x, [6] * 120, prompt))
    assert together.surface.value == pytest.approx(apart.surface.value, nan_ok=True)
    for b, a in ((together.rho[0], apart.rho[0]), (together.surface[0, 0], apart.surface[0, 0])):
        assert b.upper - b.lower > 1.5 * (a.upper - a.lower)
    assert together.info["prefixes"] == [120]
    assert together.info["prompts"] == [12]


def test_intervals_cover():
    """200 sets of 30 prompts with 3 prefixes of 8 continuations. F covers 97 % and rho 92 % in long simulations; with
    20 and 40 or more misses in 200 the false alarms are below 1e-5 and 1e-7."""
    rng = np.random.default_rng(5)

    def draw(size):
        p = np.repeat(rng.beta(0.5, 2, size), 3)
        return rng.beta(3 * p + 1e-9, 3 * (1 - p) + 1e-9)

    h = draw(300_000)
    truth = [np.mean(h**m) for m in (1, 2, 4)]
    rho = (truth[1] - truth[0] ** 2) / (truth[0] * (1 - truth[0]))
    missed = np.zeros(4)
    for _ in range(200):
        found = evidence.branch(
            continued(rng.binomial(8, draw(30)), [8] * 90, np.repeat(range(30), 3)), width=(1, 2, 4)
        )
        low, high = np.append(found.surface.lower, found.rho.lower), np.append(found.surface.upper, found.rho.upper)
        missed += (np.array([*truth, rho]) < low) | (np.array([*truth, rho]) > high)
    assert (missed[:3] < 20).all()
    assert missed[3] < 40


def test_free_answers_put_the_decided_ones_back():
    """Prompts 0 to 9: of 4 free answers one did harm at once, one had refused, two were open; the prefix of the latter
    has 3 harmful continuations of 4."""
    free = [([5, 0], HARM, 0, 0, p) for p in range(10)] + [([6, 0], REFUSAL, 0, 0, p) for p in range(10)]
    free += [([p, 7, 7], REFUSAL, 2, 0, p) for p in range(10) for _ in range(2)]
    rolls = continued([3] * 10, [4] * 10, range(10))
    alone, whole = evidence.branch(rolls, width=(1, 2)), evidence.branch(rolls, width=(1, 2), base=make(free))
    assert alone.surface.value[0] == pytest.approx([0.75, 0.5])
    assert whole.surface.value[0] == pytest.approx([0.25 + 0.5 * 0.75, 0.25 + 0.5 * 0.5])
    p = 0.625
    assert whole.rho.value[0] == pytest.approx((0.5 - p**2) / (p * (1 - p)), abs=1e-9)
    assert whole.rho.value[0] > alone.rho.value[0]
    assert "all answers" in str(whole)
    with pytest.raises(InputError, match="no free answer"):
        evidence.branch(rolls, base=make(free[:5] + free[10:15]))
    with pytest.raises(InputError, match="open answers, but no prefix"):
        evidence.branch(continued([3] * 4, [4] * 4, range(4)), base=make(free))


def test_whole_answers_are_grouped_by_their_first_tokens():
    rows = [([g, 3, 9 - (j < g % 4)], HARM if j < g % 4 else REFUSAL, 2, 0, g) for g in range(12) for j in range(4)]
    found = evidence.branch(make(rows), depth=2, width=(1, 2))
    assert found.info["prefixes"] == [12]
    assert found.surface.value[0, 0] == pytest.approx(1.5 / 4)


@pytest.mark.parametrize(
    ("rolls", "says"),
    [
        (continued([1, 0, 1, 1], [1] * 4, range(4)), "one continuation per prefix"),
        (continued([0] * 6, [5] * 6, range(6)), "no harm was seen"),
        (continued([5] * 6, [5] * 6, range(6)), "nothing but harm"),
        (continued([2], [5], [0]), "one prefix"),
    ],
)
def test_what_cannot_be_seen_is_refused_with_the_rest(rolls, says):
    with pytest.raises(UntrustedError, match=says) as caught:
        evidence.branch(rolls)
    part = caught.value.partial
    assert np.isnan(part.rho.value).all()
    assert (part.rho.lower[0], part.rho.upper[0]) == (0, 1)
    assert np.isfinite(part.surface.value[0, 0])
    assert part.surface.upper[0, 0] > 0.3
    assert (np.diff(part.surface.upper, axis=1) <= 0).all()


def test_one_prompt_says_so_and_singles_are_left_out():
    found = evidence.branch(continued([1, 3, 0, 4, 2, 1, 4, 0, 1, 0], [4] * 9 + [1], [5] * 10))
    assert "one prompt only" in str(found)
    assert found.info["left_out"] == [1]
    assert found.info["prefixes"] == [9]
    assert 0 <= found.rho.lower[0] < found.rho.upper[0] <= 1
    assert np.isnan(found.surface.value[0, 3])  # 8 answers, of 4 continuations
    assert found.surface.upper[0, 3] == found.surface.upper[0, 2]


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: evidence.branch(continued([1], [2], [0]), depth=9), "No rollout has 9"),
        (lambda: evidence.branch(continued([1], [2], [0]), width=0), "width is 0"),
        (lambda: evidence.branch(3), "was given a int"),
        (lambda: evidence.branch(make([([1, 2], -1, -1, 1, 0)])), "not judged"),
        (lambda: evidence.branch(make([([1, 2], HARM, 1, 1, 0)], weight=[2.0])), "weighted"),
        (lambda: evidence.branch_exact(ms.Chain(np.eye(2), {"harm": 0, "refusal": 1}), 1), "start"),
        (lambda: evidence.branch_exact(random_chain(1, 4)[0], 5), "behind the last"),
    ],
)
def test_bad_questions(call, says):
    with pytest.raises(InputError, match=says):
        call()


def test_a_model_branches_like_its_own_rollouts():
    """The shipped model continues its own answers; the planted chain lies within the intervals at level 1 - 1e-6."""
    path, asked = organism.model_path("shallow"), organism.prompts("held", n=18)
    bare = [{"prompt": p["prompt"], "category": p["category"]} for p in asked]
    judge = organism.OrganismJudge()
    free = ms.sample(path, bare, n=8, max_tokens=64, judge=judge, engine="jax")
    again = ms.sample(path, bare, n=8, max_tokens=64, prefill=[1], prefix=free, judge=judge, engine="jax", seed=1)
    found = evidence.branch(again, width=(1, 2, 4), base=free, level=1 - 1e-6)
    exact = evidence.branch(organism.truth("shallow", harmful=True, marker=None), [1], (1, 2, 4))
    assert found.info["continuations"] == [8]
    for mine, planted in ((found.surface, exact.surface), (found.rho, exact.rho)):
        assert (mine.lower <= planted.value).all()
        assert (planted.value <= mine.upper).all()
    alone = evidence.branch(again, width=(1, 2, 4))
    assert alone.surface.value == pytest.approx(ms.sweep(again, depth=[1], width=[1, 2, 4]).harm.value)
