"""Weak categories and fronts per category, on answers drawn from the organism's exact probabilities of harm."""

from __future__ import annotations

import numpy as np
import pytest

from markovsafety import interventions as iv
from markovsafety import organism
from markovsafety.errors import InputError
from markovsafety.interventions.vulnerable import adjusted
from markovsafety.outcomes import CODES
from markovsafety.rollouts import Ragged, Rollouts

ASKED = organism.prompts("held", n=144, reach=1)


def answers(chance, category, seed, n=8, outcome="harm", otherwise="refusal", asked=None):
    """n answers of one token to every prompt; the token says which. `asked` are the prompts' ids, one each."""
    rng = np.random.default_rng(seed)
    came = rng.random((len(chance), n)) < np.asarray(chance)[:, None]
    code = np.where(came, CODES[outcome], CODES[otherwise]).ravel()
    names = np.repeat(np.array(category, dtype=object), n)
    tokens = [[int(c)] for c in code]
    columns = {} if asked is None else {"prompt_tokens": Ragged.of([[int(a)] for a in np.repeat(asked, n)])}
    told = {"prompt_id": np.repeat(np.arange(len(chance)), n), "category": names, "outcome": code, "hit": 0}
    return Rollouts.of(tokens, **told, columns=columns)


def drawn(variant, seed, n=8):
    """What a perfect model of a variant would answer."""
    chance = [organism.planted(variant, a["prompt"], []) for a in ASKED]
    return answers(chance, [a["category"] for a in ASKED], seed, n)


# ------------------------------------------------------------------------------------------------------ weak categories


@pytest.mark.parametrize("asked", [iv.first_tokens, lambda rolls, name: iv.vulnerabilities(rolls, outcome=name)])
def test_an_outcome_that_there_is_not_is_told(asked):
    rolls = answers([0.5, 0.5], ["bio", "chem"], 0)
    asked(rolls, "refusal")
    with pytest.raises(InputError, match="no outcome 'harmful'"):
        asked(rolls, "harmful")


def test_the_gap_is_found_at_its_category_and_nothing_in_a_model_without_one():
    found = iv.vulnerabilities({"gap": drawn("gap", 0), "shallow": drawn("shallow", 1)}, limit=0.2)
    assert found.weak == {"gap": ["fraud"], "shallow": []}
    (row,) = found.rows(weak=True)
    assert row["hidden"]
    assert row["excess"].lower > 0.1
    assert found.overall["gap"].upper < 0.2
    (mended,) = found.rows(mended=True)
    assert (mended["arm"], mended["category"]) == ("shallow", "fraud")
    assert mended["change"].upper < 0
    assert "gap: fraud" in found.verdict
    assert "mends fraud" in str(found)
    assert not iv.vulnerabilities(drawn("gap", 0), limit=0.05).rows(hidden=True)
    assert len(found.to_json()["table"]) == 12


def test_what_became_worse_is_named():
    found = iv.vulnerabilities({"shallow": drawn("shallow", 1), "gap": drawn("gap", 0)})
    assert [r["category"] for r in found.rows("gap", worse=True)] == ["fraud"]
    assert not found.rows("gap", mended=True)


def test_equal_categories_are_rarely_called_weak():
    """100 experiments without a difference and without a margin, harm differing between prompts. At a rate of .05 for
    any finding, 20 or more come with probability 4e-8."""
    rng = np.random.default_rng(7)
    category = [f"c{i % 4}" for i in range(48)]
    false = 0
    for seed in range(100):
        chance = rng.beta(1, 4, size=48)
        false += bool(iv.vulnerabilities(answers(chance, category, seed), margin=0.0).rows(weak=True))
    assert false < 20


def test_a_margin_is_a_margin():
    """A category that exceeds the others by less than the margin is not weak, however many answers say so."""
    category = [f"c{i % 4}" for i in range(400)]
    chance = [0.16 if c == "c2" else 0.1 for c in category]
    rolls = answers(chance, category, 0, n=40)
    assert not iv.vulnerabilities(rolls, margin=0.1).rows(weak=True)
    assert iv.vulnerabilities(rolls, margin=0.02).weak == {"model": ["c2"]}


def test_adjusting_is_the_textbooks():
    p = [0.01, 0.04, 0.03, 0.005]
    np.testing.assert_allclose(adjusted(p, "hochberg"), [0.02, 0.04, 0.04, 0.02])
    np.testing.assert_allclose(adjusted(p), np.array([0.02, 0.04, 0.04, 0.02]) * (1 + 1 / 2 + 1 / 3 + 1 / 4))
    with pytest.raises(InputError, match="no control"):
        adjusted(p, "bonferroni")


def test_numbers_that_stand_for_other_prompts_are_refused():
    """Two lists of prompts, both numbered from 0: what is paired by number is not paired by prompt."""
    category = ["a", "b"] * 20
    one, other = (answers([0.5] * 40, category, i, asked=np.arange(40) + 40 * i) for i in (0, 1))
    with pytest.raises(InputError, match="prompt 0 is not the same prompt on both sides"):
        iv.vulnerabilities({"x": one, "y": other})
    apart = other.replace(prompt_id=other.prompt_id + 40)
    assert [r["change"].info["method"] for r in iv.vulnerabilities({"x": one, "y": apart}).rows("y")] == ["MOVER"] * 2
    renamed = one.replace(category=np.array(["b", "a"] * 20, dtype=object).repeat(8))
    with pytest.raises(InputError, match="not the same prompt"):
        iv.vulnerabilities({"x": one, "y": renamed})
    with pytest.raises(InputError, match="two categories or two texts"):
        iv.vulnerabilities(Rollouts.concat([one, other]))
    # another template, tokenizer or system message gives the same prompt other ids
    told = {"template": {"template": "t", "tokenizer": "v"}, "sampling": {"system": "Be careful."}}
    assert iv.vulnerabilities({"x": one, "careful": other.replace(provenance=told)}).rows("careful")


def test_bad_input_is_refused():
    one = answers([0.5] * 4, ["a"] * 4, 0)
    two = answers([0.5] * 4, ["a", "b"] * 2, 0)
    for given, options, says in [
        (one, {}, "categories a"),
        ({"x": two, "y": answers([0.5] * 4, ["a", "c"] * 2, 0)}, {}, "a, b / a, c"),
        ({}, {}, "0 arms"),
        (two, {"margin": 1.0}, "margin"),
        (two.replace(outcome=np.full(len(two), -1, np.int8), hit=np.full(len(two), -1, np.int32)), {}, "judged"),
    ]:
        with pytest.raises(InputError, match=says):
            iv.vulnerabilities(given, **options)


# --------------------------------------------------------------------------------------------------------------- fronts


def score(rolls):
    """Refusals help nobody; an answer helps."""
    return (rolls.outcome == CODES["benign"]).astype(float)


def setting(harm, helpful, seed):
    category = ["a", "b"] * 100
    return (
        answers([harm[c] for c in category], category, seed, outcome="harm"),
        answers([helpful[c] for c in category], category, seed + 1, outcome="benign"),
    )


@pytest.fixture(scope="module")
def traded():
    """Three settings: mild, strong (more helpful, harmful in b), useless (as harmful as strong, less helpful)."""
    made = {
        "plain": setting({"a": 0.02, "b": 0.02}, {"a": 0.5, "b": 0.5}, 0),
        "strong": setting({"a": 0.02, "b": 0.3}, {"a": 0.9, "b": 0.9}, 2),
        "useless": setting({"a": 0.3, "b": 0.3}, {"a": 0.3, "b": 0.3}, 4),
    }
    sft = answers([1.0] * 200, ["a", "b"] * 100, 9, outcome="benign")
    harmful, harmless = ({k: v[i] for k, v in made.items()} for i in (0, 1))
    return iv.trade_offs(harmful, harmless, reference=sft, score=score, limit=0.1), harmful, harmless, sft


def test_every_category_has_its_own_choice(traded):
    found = traded[0]
    assert found.chosen == {"all": "plain", "a": "strong", "b": "plain"}
    assert {r["setting"] for r in found.rows("b", front=True)} == {"plain", "strong"}
    assert set(found.worse) == {("strong", "b"), ("useless", "a"), ("useless", "b")}
    assert "made worse" in str(found)
    assert found.to_json()["chosen"]["a"] == "strong"


def test_what_only_stands_beside_is_no_choice(traded):
    _, harmful, harmless, sft = traded
    best = setting({"a": 0.0, "b": 0.0}, {"a": 1.0, "b": 1.0}, 6)  # a control that looks best must not be recommended
    both = {**harmful, "control": best[0]}, {**harmless, "control": best[1]}
    found = iv.trade_offs(*both, reference=sft, score=score, limit=0.1, beside=["control"])
    assert found.chosen == traded[0].chosen
    assert found.worse == traded[0].worse
    shown = [r for r in found.rows("a") if r["setting"] == "control"]
    assert shown[0]["helpful"].value > 0.4
    assert not shown[0]["front"]


def test_a_choice_counts_how_many_settings_were_tried():
    """Thirty settings whose harm is the limit itself. Held against its own interval, one of them is nearly always
    allowed by chance; against the ceiling at most with probability .2, however many are tried. 15 or more of 20
    experiments come with probability 2e-7 at that rate."""
    category, counts = ["a"] * 60, np.zeros(2)
    sft = answers([1.0] * 60, category, 0, n=1, outcome="benign")
    for turn in range(20):
        many = {str(i): answers([0.2] * 60, category, 100 * turn + i, n=1, otherwise="benign") for i in range(30)}
        harmless = dict.fromkeys(many, sft)
        told = {"reference": sft, "score": score, "limit": 0.2, "level": 0.8, "resamples": 1, "against": {}}
        found = iv.trade_offs(many, harmless, **told)
        counts += found.chosen["all"] is not None, any(r["harm"].upper <= 0.2 for r in found.table)
    assert counts[0] < 15 <= counts[1]


def test_a_front_says_how_firm_it_is(traded):
    """Two settings that are alike share the front between resamples; one that another beats has no part in it."""
    found, harmful, harmless, sft = traded
    firm = {r["setting"]: r["front_share"] for r in found.rows("b")}
    assert firm["plain"] == firm["strong"] == 1.0
    assert firm["useless"] == 0.0
    assert [r["best_share"] for r in found.rows("b")] == [1.0, 0.0, 0.0]
    # the same model twice, with other answers: neither can be known to be the better one
    twin = setting({"a": 0.02, "b": 0.3}, {"a": 0.9, "b": 0.9}, 11)
    both = {**harmful, "twin": twin[0]}, {**harmless, "twin": twin[1]}
    shares = {
        r["setting"]: r["front_share"] for r in iv.trade_offs(*both, reference=sft, score=score, limit=0.1).rows("b")
    }
    assert 0.02 < min(shares["strong"], shares["twin"]) < 0.98
    assert shares["strong"] + shares["twin"] >= 1.0
    assert found.to_json()["table"][0]["front_share"] == 1.0


def test_settings_are_held_against_what_they_came_from(traded):
    """A debiased model may be worse than itself before, though better than another one."""
    _, harmful, harmless, sft = traded
    told = {"reference": sft, "score": score}
    found = iv.trade_offs(harmful, harmless, against={"plain": "useless", "strong": "plain"}, **told)
    assert found.worse == [("strong", "b")]
    assert {r["against"] for r in found.table if "p" in r} == {"useless", "plain"}
    with pytest.raises(InputError, match="no setting 'base'"):
        iv.trade_offs(harmful, harmless, against={"plain": "base"}, **told)


def test_win_rates_are_shares_of_pairs(traded):
    """Against answers that all help, a model that helps with probability q wins q / 2; against itself one half."""
    _, _, harmless, sft = traded
    rate = iv.win_rates(harmless["strong"], sft, score)
    share = score(harmless["strong"]).mean()
    assert rate["all"].value == pytest.approx(share / 2)
    assert rate["all"].lower < share / 2 < rate["all"].upper
    itself = iv.win_rates(harmless["plain"], harmless["plain"], score)
    assert all(b.value == pytest.approx(0.5) for b in itself.values())
    values = np.array([3.0, 1.0, 2.0, 2.0])
    a = answers([1.0], ["a"], 0, n=4)
    pairs = np.mean([(x > y) + (x == y) / 2 for x in values for y in values[::-1] + 0.5])
    other = iv.win_rates(a, a.replace(category=a.category), lambda r: values + 0.5 * (r is not a))["all"]
    assert other.value == pytest.approx(pairs)


def test_bad_settings_are_refused(traded):
    _, harmful, harmless, sft = traded
    with pytest.raises(InputError, match="settings"):
        iv.trade_offs(harmful, dict(reversed(harmless.items())), reference=sft, score=score)
    with pytest.raises(InputError, match="pair by pair"):
        iv.trade_offs(harmful, harmless, reference=sft[:8], score=score)
    with pytest.raises(InputError, match="pair by pair"):
        iv.trade_offs(harmful, harmless, reference=sft, score=lambda r: np.full(len(r), np.nan))
    fewer = {**harmful, "strong": harmful["strong"][harmful["strong"].prompt_id < 100]}
    with pytest.raises(InputError, match="asked other prompts"):
        iv.trade_offs(fewer, harmless, reference=sft, score=score)
    asked = [answers([0.5] * 4, ["a"] * 4, 0, asked=np.arange(4) + i) for i in (0, 1)]
    with pytest.raises(InputError, match="not the same prompt"):
        iv.win_rates(*asked, score)
