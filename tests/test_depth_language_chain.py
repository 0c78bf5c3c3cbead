"""A language model with a finite context as a chain: sizes, blocks, mixing against both bounds, and where they end."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction as F

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import markovsafety as ms
from markovsafety.depth.decoding import greedy, nucleus, with_end
from markovsafety.depth.generalisation import PRETRAINED, deviation
from markovsafety.depth.language_chain import compatible, density, language_chain, mixing, n_strings, parity_model

quick = settings(deadline=None, derandomize=True, max_examples=25)
SEEDS = st.integers(0, 2**32 - 1)


def random_law(seed, T, concentration=1.0):
    """A next-token law by string, drawn once for each."""
    known = {}

    def law(s):
        if s not in known:
            known[s] = np.random.default_rng([seed, *s, len(s)]).dirichlet(np.full(T, concentration))
        return known[s]

    return law


@pytest.mark.parametrize(("T", "K"), [(2, 3), (3, 3), (4, 2), (2, 6), (1, 4), (5, 1)])
def test_sizes_and_blocks(T, K):
    made = language_chain(random_law(0, T), T, K)
    assert len(made.states) == n_strings(T, K) == sum(T**k for k in range(1, K + 1))
    P = made.P.toarray()
    assert (P > 0).sum() / P.size == pytest.approx(density(T, K), rel=1e-14)
    for i, u in enumerate(made.states):
        assert [made.states[j] for j in np.flatnonzero(P[i])] == [v for v in made.states if compatible(u, v, K)]
    TT, TR, RR = (b.toarray() for b in made.blocks())
    assert len(made.full) == T**K == len(RR)
    assert not np.linalg.matrix_power(TT, K).any()  # strings only grow
    assert RR.sum(axis=1) == pytest.approx(np.ones(T**K))
    assert TR.sum() + TT.sum() == pytest.approx(len(TT))
    assert made.closed_classes() == [sorted(s for s in made.states if len(s) == K)]


def test_size_of_a_real_model_is_an_exact_integer():
    assert n_strings(32_000, 2048) == sum(32_000**k for k in range(1, 2049))
    assert 0 < density(32_000, 60) < 1e-260


def test_published_compatibility():
    """v is incompatible with u if some u_(l+1) differs from v_l: for full strings it is the shift."""
    for u, v in itertools.product(itertools.product(range(2), repeat=3), repeat=2):
        assert compatible(u, v, 3) is all(u[i + 1] == v[i] for i in range(2))


@quick
@given(SEEDS, st.sampled_from([(2, 2), (2, 3), (3, 2)]), st.sampled_from([0.3, 1.0, 5.0]))
def test_mixing_stays_below_both_bounds(seed, sizes, concentration):
    T, K = sizes
    made = language_chain(random_law(seed, T, concentration), T, K)
    m = mixing(made)
    P, law = made.P.toarray(), m.stationary
    assert law @ P == pytest.approx(law, abs=1e-13)
    assert law.sum() == pytest.approx(1)
    assert law[: len(P) - T**K].max(initial=0.0) == 0
    assert m.dobrushin <= 1 - m.strings * m.epsilon + 1e-12 <= 1 - 2 * m.epsilon + 2e-12
    X = np.linalg.matrix_power(P, K)
    for n in range(K, 30):
        entry = np.abs(X - law).max()
        tv = np.abs(X - law).sum(axis=1).max() / 2
        assert tv == pytest.approx(m.distance(n), abs=1e-13)
        assert tv <= m.ours(n) + 1e-12
        assert entry <= m.published(n) + 1e-12
        assert m.ours(n) <= m.published(n) + 1e-12
        X = X @ P
    time = m.tokens(0.05)
    assert m.distance(time) < 0.05 <= m.distance(time - 1)


@pytest.mark.parametrize(
    ("temperature", "eps", "second", "time"), [(1.0, "1.067e-04", "0.951393", 88), (2.0, "6.071e-03", "0.796962", 20)]
)
def test_parity_toy(temperature, eps, second, time):
    m = mixing(parity_model(temperature))
    assert f"{m.epsilon:.3e}" == eps
    assert f"{m.second:.6f}" == second
    assert m.tokens(0.01) == time
    assert m.stationary[-8:] == pytest.approx(np.full(8, 1 / 8), abs=1e-14)  # uniform: no bias of the rule itself
    p = 1 / (1 + math.exp(-3 / temperature))
    assert m.epsilon == pytest.approx(min((1 - p) ** 3, p * (1 - p) ** 2), rel=1e-12)
    assert m.tokens_by("published") > 7 * m.tokens_by("ours") > 7 * time


def test_the_published_rate_is_vacuous_on_the_toy():
    """At temperature 1 it needs 6.5e4 tokens where 88 are enough; at .2 the chain hardly mixes at all."""
    m = mixing(parity_model(1.0))
    assert f"{m.tokens_by('published'):.1e}" == "6.5e+04"
    assert m.published(88) > 0.99
    frozen = mixing(parity_model(0.2))
    assert frozen.epsilon < 1e-19
    assert frozen.published(10**6) == 1.0  # in floating point
    assert frozen.tokens(0.01, most=10**6) is None
    assert frozen.second > 1 - 1e-6


def test_greedy_and_nucleus_decoding_break_the_single_class():
    law = lambda s: [0.95, 0.05] if sum(s) % 2 == 0 else [0.05, 0.95]  # noqa: E731
    made = language_chain(greedy(law), 2, 3)
    assert len(made.closed_classes()) == 4
    assert [(0, 0, 0)] in made.closed_classes()
    with pytest.raises(ms.InputError, match="4 closed classes"):
        made.stationary()
    cut = language_chain(nucleus(law, 0.9), 2, 3)
    assert (cut.P != made.P).nnz == 0
    assert len(language_chain(nucleus(law, 0.96), 2, 3).closed_classes()) == 1
    assert nucleus(lambda s: [0.5, 0.3, 0.2], 0.8)((0,)) == pytest.approx([0.625, 0.375, 0])


def test_an_end_token_makes_the_stationary_law_trivial():
    """It sits on the string of ends alone, whatever the model says before, harmful or not."""
    laws = []
    for seed in (0, 1):
        made = language_chain(with_end(random_law(seed, 3), 2), 3, 2)
        assert made.closed_classes() == [[(2, 2)]]
        laws.append(made.stationary())
        assert mixing(made).epsilon == 0  # and the published rate says nothing: its base is 1
    assert (laws[0] == laws[1]).all()
    assert laws[0].sum() == laws[0][-1] == 1


def test_harm_of_a_language_chain_is_a_hitting_probability():
    """Token 1 is harm, token 2 ends the answer; against brute enumeration of answers of up to 60 tokens."""
    law = random_law(7, 3)
    made = language_chain(law, 3, 2)
    harm = [s for s in made.states if s[-1] == 1]
    ends = [s for s in made.states if s[-1] == 2]
    chain = made.chain({"harm": harm, "benign": ends}, start=(0,))
    p0, p = law((0,)), law((0, 0))
    known = p0[1] + p0[0] * p[1] / (1 - p[0])
    found = ms.hitting_probability(chain, "harm")
    assert found.at_start.value == pytest.approx(known, rel=1e-13)
    assert found.at_start.lower <= known * (1 + 1e-12)


def test_stationary_law_keeps_its_digits_where_classes_hardly_talk():
    """Two halves that exchange 1e-12 per token in one direction and 3e-12 in the other: 3/4 and 1/4."""
    law = lambda s: [1 - 1e-12, 1e-12] if s[-1] == 0 else [3e-12, 1 - 3e-12]  # noqa: E731
    found = language_chain(law, 2, 1).stationary()
    assert found == pytest.approx([0.75, 0.25], rel=1e-3)  # 1 - 1e-12 itself is only known to 1e-4 of the 1e-12
    C = F(1e-12) / (F(1e-12) + F(3e-12))
    assert found[1] == pytest.approx(float(C), rel=1e-3)


@pytest.mark.parametrize(
    ("name", "constant", "row"),
    [
        ("Llama 7B", "4047.7", "0.01555"),
        ("Llama2 7B", "4047.7", "0.01099"),
        ("Llama3 8B", "8095.4", "0.00803"),
        ("Gemma 2B", "9629.6", "0.02136"),
        ("Gemma2 27B", "11793.7", "0.01256"),
    ],
)
def test_published_constants_and_what_replaces_them(name, constant, row):
    found = deviation(*PRETRAINED[name])
    assert f"{found.constant:.1f}" == constant
    assert f"{found.row:.5f}" == row
    assert found.ratio == pytest.approx(found.constant * math.sqrt(2), rel=1e-12)
    tokens = PRETRAINED[name][0]
    assert math.ceil(4 * found.constant**2 * math.log(40) / found.row**2) == pytest.approx(tokens, rel=1e-9)


def test_the_factor_between_both_bounds():
    ratios = [f"{deviation(*PRETRAINED[name]).ratio:.0f}" for name in PRETRAINED]
    assert (ratios[0], ratios[-1]) == ("5724", "16679")
    # Bounded differences themselves: the mean of n numbers in [0, 1] strays beyond `ours` less often than delta.
    n, delta = 400, 0.05
    room = deviation(n, 2, 1, delta=delta).ours
    rng = np.random.default_rng(0)
    strays = np.abs(rng.binomial(n, 0.5, 20_000) / n - 0.5) > room
    assert strays.mean() < delta  # the true rate is .0066: five sigma above it is below .01
    assert deviation(n, 2, 1, delta=delta, gamma=3).ratio == pytest.approx(deviation(n, 2, 1).ratio)
    assert deviation(n, 2, 1, floor=1e-9).constant == pytest.approx(2 * math.sqrt(math.log(1e9)))


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: n_strings(0, 3), "vocabulary is 0"),
        (lambda: density(2, 1.5), "context is 1.5"),
        (lambda: language_chain(random_law(0, 2), 2, 30), "2147483646 strings"),
        (lambda: language_chain(lambda s: [0.5, 0.6], 2, 2), "After"),
        (lambda: language_chain(lambda s: [1.0], 2, 2), "After"),
        (lambda: nucleus(random_law(0, 2), 0.0), "top_p"),
        (lambda: parity_model(0.0), "temperature is 0.0"),
        (lambda: mixing(parity_model()).ours(2), "n is 2"),
        (lambda: mixing(parity_model()).tokens(0.0), "distance is"),
        (lambda: mixing(parity_model()).tokens_by("mine"), "rate is 'mine'"),
        (lambda: mixing(language_chain(random_law(0, 2), 2, 12)), "4096 full strings"),
        (lambda: language_chain(random_law(0, 2), 2, 12).stationary(), "4096 strings"),
        (lambda: deviation(0, 2, 2), "tokens=0"),
        (lambda: deviation(10, 2, 2, floor=0.0), "floor=0.0"),
    ],
)
def test_bad_input_is_named(call, says):
    with pytest.raises(ms.InputError, match=says):
        call()
