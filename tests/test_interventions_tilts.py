"""Tilts as operators: on chains, on recorded answers, and beyond what was explored; a pooled row must not be tilted."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

import markovsafety as ms
from markovsafety import interventions as iv
from markovsafety import organism
from markovsafety.errors import InputError
from markovsafety.interventions.exploration import _shared

ids = organism.WORDS.index


@pytest.fixture(scope="module")
def hosts():
    return {name: iv.open_host(organism.model_path(name), device="cpu") for name in ("base", "shallow")}


@pytest.fixture(scope="module")
def table(hosts):
    return iv.bias_table(hosts["shallow"], hosts["base"], length=3, n=128, seed=1)


def test_tilting_a_pooled_row_is_wrong_and_tilting_rows_is_right():
    """Two prompts, two tokens. P(refuse) .9 and .1 become odds over e^a each; their mean row .5 does not."""
    shift = np.log(9.0)

    def chain(refuse):
        return ms.Chain([[0, refuse, 1 - refuse], [0, 1, 0], [0, 0, 1]], {"refusal": 1, "harm": 2}, start=0)

    tilt, tokens = np.array([[-shift, 0.0]]), [-1, 0, 1]
    each = [iv.tilted_hitting(chain(r), "harm", tilt, tokens)[0] for r in (0.9, 0.1)]
    np.testing.assert_allclose(each, [0.5, 81 / 82], rtol=1e-12)
    pooled = iv.tilted_hitting(chain(0.5), "harm", tilt, tokens)[0]
    assert pooled == pytest.approx(0.9)
    assert abs(pooled - np.mean(each)) > 0.15


def test_the_pooled_row_shortcut_fails_on_recorded_answers(hosts, table):
    """Harmful and harmless prompts together: the mean first row, tilted, is not the mean of the tilted rows. The
    prediction, which tilts each prompt's own rows, is within 5.6 standard errors: a false alarm of 2e-8."""
    host, how = hosts["shallow"], {"max_tokens": 32, "judge": "organism"}
    asked = [*organism.prompts("held", n=24), *organism.prompts("held", n=24, harmful=False)]
    asked = [{**a, "category": "any"} for a in asked]
    strength = 0.5
    rolls = iv.explore(host, asked, table, [strength], n=16, seed=5, **how)
    after = ms.sample(host.engine, asked, n=16, seed=6, edit=table.edit(strength), **how)
    seen = (after.outcome == ms.OUTCOMES.index("refusal")).mean()
    (told,) = iv.predict_tilt(host, rolls, table, [strength], outcome="refusal").beside({strength: after})
    assert told["trusted"]
    assert abs(told["z"]) < 5.6
    law = np.exp(iv.laws(host, [a["prompt"] for a in asked])[:, 0].astype(float)).mean(axis=0)
    first, size = rolls.tokens[rolls.offsets[:-1]], host.vocab_size
    refused = np.bincount(first, rolls.weight * (rolls.outcome == ms.OUTCOMES.index("refusal")), size)
    after_first = refused / np.maximum(np.bincount(first, rolls.weight, size), 1e-12)
    pooled = law * np.exp(table.tilt(strength)[0])
    assert abs((pooled / pooled.sum()) @ after_first - seen) > 0.08


def test_every_step_of_a_tilt_counts():
    """A homogeneous chain tilted for two steps = its unrolled layers tilted = sums over all paths."""
    rng = np.random.default_rng(0)
    P = rng.dirichlet(np.ones(5), size=5)
    P[3], P[4] = np.eye(5)[3], np.eye(5)[4]
    plain = ms.Chain(P, {"harm": 3, "refusal": 4}, start=0)
    tilt, tokens = rng.normal(size=(2, 4)), [-1, 0, 1, 2, 3]
    layers = ms.Chain.layered([P] * 200, {"harm": 3, "refusal": 4}, start=0)
    value = iv.tilted_hitting(plain, "harm", tilt, tokens)
    np.testing.assert_allclose(value, iv.tilted_hitting(layers, "harm", tilt, tokens), atol=1e-10)
    after = np.array(ms.hitting_probability(plain, "harm").value)
    total = 0.0
    steps = [P * np.exp(np.append(row, 0.0)[tokens]) for row in tilt]
    steps = [s / s.sum(axis=1, keepdims=True) for s in steps]
    for one in range(5):
        for two in range(5):
            total += steps[0][0, one] * (steps[1][one, two] * after[two] if one < 3 else (one == 3) * (two == 3))
    assert value[0] == pytest.approx(total, abs=1e-12)
    with pytest.raises(InputError, match="no first steps"):
        iv.tilted_chain(plain, tilt, tokens)
    with pytest.raises(InputError, match="token 9"):
        iv.tilted_hitting(plain, "harm", tilt, [-1, 0, 1, 2, 9])


def test_first_tokens_are_shared_out_as_wanted():
    """Also what is wanted less than half a time: rounding would leave it out, and harm with it."""
    wanted = np.array([[0.55, 0.15, 0.15, 0.15, 0.0]])
    rng = np.random.default_rng(0)
    drawn = [_shared(wanted, 2, rng)[0] for _ in range(3000)]
    assert {sum(d.values()) for d in drawn} == {2}
    mean = np.array([[d.get(t, 0) for t in range(5)] for d in drawn]).mean(axis=0)
    # five means of counts with standard deviation below .5: an error of .06 has probability below 1e-9
    np.testing.assert_allclose(mean, 2 * wanted[0], atol=0.06)


def test_a_strength_beyond_what_was_explored_is_flagged(hosts, table):
    """A bias of 6 nats on a first word that hardly occurs: a quarter of it shows nothing, three times it says little
    else. Answers explored for the quarter cannot tell, and the prediction says so; those explored for both can."""
    host, bias = hosts["shallow"], np.zeros_like(table.bias[:1])
    bias[0, ids("cheers")] = -6.0
    odd = dataclasses.replace(table, **{k: getattr(table, k)[:1] for k in ("error", "counted", "seen")}, bias=bias)
    asked, how = organism.prompts("held", n=48), {"n": 6, "max_tokens": 24, "judge": "organism"}
    narrow, wide = (iv.explore(host, asked, odd, a, **how) for a in ([0.25], [0.25, 3.0]))
    rows = {a: iv.predict_tilt(host, narrow, odd, [a]).at("all", a) for a in (0.1, 0.25, 3.0)}
    assert [rows[a]["explored"] for a in rows] == [True, True, False]
    assert rows[3.0]["hidden"] > 0.5
    assert not rows[3.0]["trusted"]
    assert "beyond what was explored" in rows[3.0]["predicted"].info["note"]
    assert rows[0.25]["hidden"] < 0.01
    assert "beyond what was explored" in str(iv.predict_tilt(host, narrow, odd, [3.0]))
    both = iv.predict_tilt(host, wide, odd, [3.0]).at("all", 3.0)
    assert both["explored"]
    assert both["hidden"] < 0.01
    # weights that nobody accounts for, or of another table, count as plain answers do
    bare = narrow.replace(provenance={k: v for k, v in narrow.provenance.items() if k != "explored"})
    assert iv.predict_tilt(host, bare, odd, [3.0]).at("all", 3.0)["hidden"] > 0.5
    assert iv.predict_tilt(host, narrow, table, [0.5]).at("all", 0.5)["explored"] is False
    plain = ms.sample(host.engine, asked[:4], **how)
    assert iv.predict_tilt(host, plain, odd, [3.0]).at("all", 3.0)["explored"] is None
