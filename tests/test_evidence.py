"""check: is the chain fair on what it has not seen?"""

from __future__ import annotations

import json

import numpy as np
import pytest
from test_depth import make_rollouts

import markovsafety as ms
from markovsafety.chains.chain import Evidence
from markovsafety.evidence.cells import cell, forced, tally_of

HARM, REFUSAL = 9, 8
# Next token 0 or 1 unless the hazard strikes, which depends on whether the last two tokens are equal: it takes order 2.
EQUAL, MIXED = (0.4, 0.1), (0.05, 0.35)


def speak(rng, prefix, memory=2):
    """One answer after a forced prefix: tokens, outcome, hit."""
    tokens = list(prefix)
    while True:
        same = len(tokens) > 1 and len(set(tokens[-memory:])) == 1
        harm, refusal = EQUAL if same else MIXED
        u = rng.random()
        if u < harm + refusal:
            return [*tokens, HARM if u < harm else REFUSAL], int(u >= harm), len(tokens)
        tokens.append(int(rng.integers(2)))


def answers(seed, prompts, n, prefixes=((),), first=0, category="all"):
    """`n` answers of every prompt after every prefix."""
    rng = np.random.default_rng(seed)
    rows = [(p, prefix, *speak(rng, prefix)) for p in range(prompts) for prefix in prefixes for _ in range(n)]
    return ms.Rollouts.of(
        [r[2] for r in rows],
        prompt_id=[r[0] + first for r in rows],
        category=category,
        prefill=[len(r[1]) for r in rows],
        outcome=[r[3] for r in rows],
        hit=[r[4] for r in rows],
    )


def truth_after(prefix):
    """Harm in closed form: h = a + c (h_equal + h_mixed) / 2 for both kinds of last pair."""
    A = np.array([[1 - 0.25, -0.25], [-0.3, 1 - 0.3]])
    equal, mixed = np.linalg.solve(A, [EQUAL[0], MIXED[0]])
    if len(prefix) > 1:
        return equal if prefix[-1] == prefix[-2] else mixed
    # With one token or none the hazard is MIXED; after it there is a pair only if there was one token.
    one = MIXED[0] + 0.6 * (equal + mixed) / 2
    return one if prefix else MIXED[0] + 0.6 * one


PREFIXES = ((), (0, 0), (0, 1, 0), (1, 1, 1, 1))
FREE = answers(0, 400, 10)


def test_language_is_what_the_closed_form_says():
    b = ms.profile(FREE)
    # Standard error 0.007; seven of them, false alarm below 1e-11.
    assert abs(b.value[0] - truth_after(())) < 0.05


def test_check_passes_the_right_memory():
    chain = ms.estimate(ms.count(FREE, ms.KGram(2)))
    held = answers(1, 60, 60, PREFIXES, first=1000)
    # Standard error at most 0.009 held out and 0.03 in the fit: the margin is far beyond both.
    result = ms.check(chain, held, margin=0.2, truth={len(p): truth_after(p) for p in PREFIXES})
    assert result.passed is True
    assert "fair model" in result.verdict
    assert not result.warnings
    assert [row["verdict"] for row in result.table] == ["not counted", "within", "within", "within"]
    for row, prefix in zip(result.table, PREFIXES):
        assert row["planted"] == truth_after(prefix)
        assert abs(row["predicted_minus_planted"]) < 0.15
        assert row["difference"] == pytest.approx(row["predicted"] - row["measured"])
        assert row["unseen"] == 0
        assert row["prompts"] == 60
        assert row["rollouts"] == 3600
        assert row["difference_lower"] < row["difference"] < row["difference_upper"]
    # Two samples of 4000 and 3600 rollouts differ by more than this with probability below 1e-8.
    assert result.curve["gap"] < 0.08
    assert result.curve["observed"][-1] == pytest.approx(result.table[0]["measured"])
    assert "not counted" in str(result)
    assert "largest gap" in str(result)
    json.dumps(result.to_json(), allow_nan=False)


def test_check_fails_a_lumped_chain():
    chain = ms.estimate(ms.count(FREE, ms.KGram(1)))
    # At the start the lumped chain is right all the same: the identity that makes k = 0 worthless.
    fraction = float((FREE.outcome == 0).mean())
    assert ms.hitting_probability(chain, "harm").at_start.value == pytest.approx(fraction, abs=1e-12)
    result = ms.check(chain, answers(1, 60, 60, PREFIXES, first=1000), margin=0.05)
    assert result.passed is False
    assert result.verdict.startswith("Not a fair model")
    # Truth after an equal pair lies 0.15 above what one token of memory can say, 15 standard errors.
    assert [row["verdict"] for row in result.table if row["k"] in (0, 2, 4)] == ["not counted", "off", "off"]
    assert result.table[0]["difference"] == pytest.approx(0, abs=0.08)


def test_check_cannot_tell_from_little():
    chain = ms.estimate(ms.count(FREE, ms.KGram(2)))
    few = ms.check(chain, answers(2, 4, 5, PREFIXES, first=1000), margin=0.02)
    assert few.passed is None
    assert few.verdict.startswith("Cannot tell")
    assert "more held-out" in few.verdict
    free_only = ms.check(chain, answers(2, 40, 10, first=1000))
    assert free_only.passed is None
    assert "prefill" in free_only.verdict
    lone = ms.check(chain, answers(2, 1, 10, PREFIXES, first=1000), margin=0.1)
    assert lone.passed is None


def test_verdict_tells_a_thin_fit_from_a_short_memory():
    # The fit saw state (0, 0) end in refusal only, a few times; its own interval reaches up to what is measured.
    thin = make_rollouts([0, 0, 0, 0], [1] * 4)
    chain = ms.Chain(
        [[0, 0.0, 1.0], [0, 0, 0], [0, 0, 0]], {"harm": 1, "refusal": 2}, 0, [(), "H", "R"],
        evidence=Evidence(np.array([4.0, 0.0, 4.0]), **evidence_of(thin)),
    )  # fmt: skip
    held = make_rollouts([3, 2] * 20, [10] * 40, prefill=2)
    result = ms.check(chain, held)
    assert result.passed is False
    assert "few rollouts allow" in result.verdict
    known = ms.Chain([[0, 0.0, 1.0], [0, 0, 0], [0, 0, 0]], {"harm": 1, "refusal": 2}, 0, [(), "H", "R"])
    assert "longer memory" in ms.check(known, held).verdict
    calm = make_rollouts([1, 0] * 20, [20] * 40, prefill=2)
    vague = ms.check(chain, calm, margin=0.03)
    assert vague.passed is None
    assert "fit on more rollouts" in vague.verdict


def evidence_of(rolls):
    tally = tally_of(rolls)
    return {name: getattr(tally, name) for name in ("prompt_id", "category", "prefill", "outcomes")}


def test_states_never_seen_are_not_believed():
    chain = ms.estimate(ms.count(FREE, ms.KGram(2)))
    strange = answers(3, 60, 60, ((0, 1, 0), (5, 5)), first=1000)  # token 5 never occurs in free answers
    result = ms.check(chain, strange, margin=0.2)
    row = result.table[0]
    assert row["k"] == 2
    assert row["unseen"] == 1
    assert (row["predicted_lower"], row["predicted_upper"]) == (0, 1)
    assert row["verdict"] == "cannot tell"
    assert result.passed is None
    assert "100 %" in result.verdict
    half = answers(3, 40, 30, ((0, 0), (5, 5)), first=1000)
    row = ms.check(chain, half, margin=0.2).table[0]
    assert row["unseen"] == pytest.approx(0.5)
    assert row["difference_upper"] - row["difference_lower"] > 0.5
    assert row["predicted"] == pytest.approx(truth_after((0, 0)), abs=0.15)  # what the seen ones say


def test_zero_harm_held_out_is_an_interval():
    chain = ms.Chain(
        [[0.5, 0.01, 0.49], [0, 0, 0], [0, 0, 0]], {"harm": 1, "refusal": 2}, start=0, states=[(), "H", "R"]
    )
    held = make_rollouts([0] * 20, [5] * 20, prefill=3)
    row = ms.check(chain, held, margin=0.05).table[0]
    assert row["predicted"] == pytest.approx(0.02)
    # Every difference is the same 0.02, yet 20 prompts cannot exclude harm up to 0.168.
    assert row["difference_lower"] == pytest.approx(0.02 - (1 - 0.025 ** (1 / 20)))
    assert row["difference_upper"] == pytest.approx(0.02)
    assert row["verdict"] == "cannot tell"


def test_overlap_is_noticed():
    rolls = answers(4, 30, 4, PREFIXES)
    chain = ms.estimate(ms.count(rolls, ms.KGram(2)))
    same = ms.check(chain, rolls, margin=0.3)
    assert same.warnings
    assert "Warning" in same.verdict
    assert "nothing was held out" in same.verdict
    assert not ms.check(chain, answers(5, 30, 4, PREFIXES), margin=0.3).warnings


def test_state_map_is_found_or_asked_for():
    held = answers(1, 10, 5, PREFIXES, first=1000)
    chain = ms.estimate(ms.count(FREE, ms.KGram(2)))
    by_hand = ms.check(chain, held, states=ms.KGram(2))
    bare = ms.Chain(chain.P, chain.outcomes, chain.start, chain.states)  # no counts: the labels tell
    for other in (ms.check(chain, held), ms.check(bare, held)):
        assert [r["predicted"] for r in other.table] == [r["predicted"] for r in by_hand.table]
    position = ms.estimate(ms.count(FREE, ms.Position()))
    assert ms.check(position, held).table[1]["predicted"] == pytest.approx(
        ms.hitting_probability(position, "harm").value[position.index(2)]
    )
    judged = ms.JudgedPrefix({0: "zero", 1: "harm"})  # a label with the name of an outcome
    chain = ms.estimate(ms.count(FREE, judged))
    with pytest.raises(ms.InputError, match="states="):
        ms.check(chain, held)
    row = ms.check(chain, held, states=judged).table[3]
    assert row["unseen"] == 0
    assert row["predicted"] < 1
    with pytest.raises(ms.InputError, match="not known what the states"):
        ms.check(ms.Chain([[0, 1], [0, 0]], {"harm": 1}), held)


def test_layered_chain_by_position():
    # Position t has hazard 1/2 at layer 2 only; a prefix of 2 tokens stands right before it, one of 3 behind it.
    quiet = [[0.9, 0, 0.1], [0, 0, 0], [0, 0, 0]]
    loud = [[0.4, 0.5, 0.1], [0, 0, 0], [0, 0, 0]]
    chain = ms.Chain.layered([quiet, quiet, loud, quiet], {"harm": 1, "refusal": 2}, start=0, states=[(), "H", "R"])
    held = ms.Rollouts.concat(
        [make_rollouts([5] * 9, [10] * 9, prefill=2), make_rollouts([0] * 9, [10] * 9, prefill=3)]
    )
    table = ms.check(chain, held, states=ms.KGram(0)).table
    assert [row["predicted"] for row in table] == [0.5, 0.0]


def test_curve_is_the_forward_recursion():
    chain = ms.Chain([[0.5, 0.2, 0.3], [0, 0, 0], [0, 0, 0]], {"harm": 1, "refusal": 2}, start=0, states=[(), "H", "R"])
    held = make_rollouts([1, 1, 0, 0], [2] * 4, length=3)
    curve = ms.check(chain, held).curve
    assert curve["predicted"] == pytest.approx([0.2, 0.3, 0.35])
    assert curve["observed"].tolist() == [0, 0, 0.25]
    assert curve["gap"] == pytest.approx(0.3)
    assert curve["at"] == 2
    # Four prompts: Massart's bound at the size that the rollouts are worth, which is at most the 8 there are.
    worth = cell(tally_of(held), 0).bound().info["n_eff"]
    assert 1 < worth <= 8
    assert curve["noise"] == pytest.approx(np.sqrt(np.log(40) / (2 * worth)))
    assert (curve["gap_lower"], curve["gap_upper"]) == (0, pytest.approx(0.3 + curve["noise"]))
    assert curve["prompts"] == 4
    assert ms.check(chain, make_rollouts([1], [2], prefill=1)).curve is None


def test_check_refuses():
    chain = ms.estimate(ms.count(FREE, ms.KGram(2)))
    held = answers(1, 5, 2, PREFIXES)
    for call in (
        lambda: ms.check(chain, ms.count(held, ms.KGram(2))),
        lambda: ms.check(chain, held.replace(outcome=np.full(len(held), -1), hit=np.full(len(held), -1))),
        lambda: ms.check(chain, held[[]]),
        lambda: ms.check(chain, held, margin=0),
        lambda: ms.check(chain, held, level=1),
        lambda: ms.check(chain, held, truth=[0.1]),
        lambda: ms.check(chain, held, truth={0: 0.1}),
    ):
        with pytest.raises(ms.InputError):
            call()
    assert ms.check(chain, held, truth=[0.1, 0.2, 0.3, 0.4]).table[1]["planted"] == 0.2


def test_weights_weigh():
    chain = ms.estimate(ms.count(FREE, ms.KGram(2)))
    held = answers(6, 8, 3, PREFIXES, first=1000)
    double = ms.Rollouts.concat([held, held])
    weighted = held.replace(columns={"weight": np.full(len(held), 2.0)})
    a, b = ms.check(chain, double).table[1], ms.check(chain, weighted).table[1]
    for name in ("predicted", "measured", "difference", "difference_lower"):
        assert a[name] == pytest.approx(b[name], abs=1e-12)


def test_depths_in_words():
    assert forced([1]) == "1 forced token"
    assert forced([0]) == "0 forced tokens"
    assert forced([1, 3]) == "1, 3 forced tokens"
    assert forced([0, 2, 3, 5, 6, 7, 8, 11]) == "0, 2, 3, 5 to 8, 11 forced tokens"
    fit, held = (answers(seed, 60, 4, ((), (0,))) for seed in (1, 2))
    text = ms.check(ms.estimate(ms.count(fit, ms.KGram(2))), held).verdict
    assert "after 1 forced token " in text
