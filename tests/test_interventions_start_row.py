"""The start row and the signature of an edit: what it moves, predicted and measured; answers that hold together."""

from __future__ import annotations

import json

import numpy as np
import pytest
from scipy.stats import norm
from steered import FALSE_ALARM, JUDGE, LEVEL, push
from steered_fixtures import asked, host, plain, refuse

import markovsafety as ms
from markovsafety import InputError
from markovsafety.bound import clustered
from markovsafety.chains import ActivationBins
from markovsafety.interventions import Edit, Part, activations, laws, signature
from markovsafety.interventions.activation_columns import with_activations
from markovsafety.interventions.coherence import quality, repeats
from markovsafety.interventions.prediction import row_local
from markovsafety.interventions.signature import depth_signature
from markovsafety.interventions.start_row import StartRows, check_row_local, start_rows
from markovsafety.organism import worlds
from markovsafety.outcomes import CODES
from markovsafety.rollouts import LexiconJudge, Rollouts

SURE, SORRY = worlds.IDS["sure"], worlds.IDS["sorry"]

__all__ = ["asked", "host", "plain", "refuse"]  # fixtures


# --- quality ---


def said(*answers, prefill=0):
    return Rollouts.of(answers, prompt_id=np.arange(len(answers)), prefill=prefill)


def test_repeating_means_a_piece_that_comes_back():
    loop, period, words = [7] * 6, [7, 8] * 4, list(range(20, 40))
    rolls = said(loop, loop[:5], period, period[:7], words, [*words[:4], 1, *words[:4], 2, *words[:4]], [])
    assert repeats(rolls).tolist() == [True, False, True, False, False, True, False]
    assert not repeats(said(loop, prefill=1))[0]  # what is forced is not the model's doing
    assert repeats(said([5, 5], [5, 6]), gram=1, times=2).tolist() == [True, False]
    # the same piece in two answers is no repetition
    assert not repeats(said(words, words, words, words)).any()
    with pytest.raises(InputError, match="times is 1"):
        repeats(rolls, times=1)


def test_quality_is_the_share_of_answers():
    rolls = said([5, 2], [5, 6], [7] * 9, [7] * 8 + [2])
    found = quality(rolls, eos_ids=[2])
    shares = [b.value for b in (found.finished, found.truncated, found.repetition)]
    assert shares == [0.5, 0.5, 0.5]
    assert found.finished.upper < 1
    judged = rolls.replace(outcome=np.array([2, 0, 3, 2]), hit=np.array([1, 1, -1, 8]))
    assert quality(judged, eos_ids=[2]).truncated.value == 0.25  # harm came before the limit
    assert json.loads(json.dumps(found.to_json()))["rollouts"] == 4
    with pytest.raises(InputError, match="no rollouts"):
        quality(Rollouts.of([], prompt_id=[]), eos_ids=[2])
    with pytest.raises(InputError, match="cannot be told apart"):
        quality(rolls)


# --- activation columns ---


def test_columns_are_the_activations_that_predict_each_token(host, plain, refuse):
    v = refuse[LEVEL] / np.linalg.norm(refuse[LEVEL])
    v.flags.writeable = False  # as the vectors of a Direction are
    few = plain[np.array([0, 9, 200, 380])]
    found = with_activations(host, few, {"refusal": (LEVEL, v)})
    for row in range(len(few)):
        prompt, answer = few.columns["prompt_tokens"][row], few.answer(row)
        inputs = [np.concatenate([prompt, answer[:i]]) for i in range(len(answer))]
        wanted = [activations(host, [ids], levels=[LEVEL])[0, 0, 0] @ v for ids in inputs]
        np.testing.assert_allclose(found.values("activation_refusal", row), wanted, atol=2e-4)
    assert (found.tokens == few.tokens).all()
    assert found.provenance["activations"]["levels"] == {"refusal": LEVEL}
    # under an edit the last prompt token is moved by just that, and with it entry 0 alone is
    edited = with_activations(host, few, {"refusal": (LEVEL, v)}, edit=Edit((Part("add", v, layer=LEVEL, scale=3.0),)))
    moved = edited.columns["activation_refusal"] - found.columns["activation_refusal"]
    first = np.isin(np.arange(len(moved)), few.offsets[:-1])
    np.testing.assert_allclose(moved[first], 3.0, atol=1e-3)
    np.testing.assert_allclose(moved[~first], 0.0, atol=1e-3)


def test_a_chain_on_the_plane_of_activations_says_the_raw_share(host, plain, refuse):
    harm = np.random.default_rng(0).standard_normal(host.width)
    rolls = with_activations(host, plain, {"refusal": (LEVEL, refuse[LEVEL]), "harm": (1, harm)})
    chain = ms.estimate(ms.count(rolls, ActivationBins.from_rollouts(rolls, bins=4)))
    raw = (rolls.outcome == CODES["harm"]).mean()
    assert ms.hitting_probability(chain, "harm").at_start.value == pytest.approx(raw, abs=1e-12)
    with pytest.raises(InputError, match="do not hold their prompts"):
        with_activations(host, plain.replace(columns={}), {"harm": (1, harm)})
    with pytest.raises(InputError, match="direction 'harm' has shape"):
        with_activations(host, plain, {"harm": (1, harm[:-1])})


# --- the start row ---


def by_hand(host, asked, known):
    """Start rows with chosen h(t): token -> h."""
    ids = tuple(host.prompt_ids(asked))
    row = np.repeat(np.arange(len(ids)), len(known))
    token = np.tile(np.array(list(known)), len(ids))
    h = np.tile(np.array(list(known.values())), len(ids))
    total = np.full(len(row), 1000.0)
    category = np.array([p["category"] for p in asked], object)
    prompt_id = np.arange(len(ids))
    return StartRows(prompt_id, category, ids, row, token, total, h * total, 0 * total, host.identity[0])


def test_a_pooled_start_row_is_wrong(host, asked):
    """An edit of logits is a tilt with a normaliser for every prompt: the tilted mean is not the mean of the tilted."""
    a = np.log(9.0)
    tilt = np.zeros((1, host.vocab_size), np.float32)
    tilt[0, SURE] = a
    known = {SURE: 0.9, SORRY: 0.05}
    h = np.zeros(host.vocab_size)
    h[list(known)] = list(known.values())

    def tilted(law):
        moved = law * np.exp(a * (np.arange(law.shape[-1]) == SURE))
        return moved / moved.sum(axis=-1, keepdims=True)

    law = np.exp(laws(host, asked)[:, 0].astype(np.float64))
    wanted = tilted(law) @ h
    pooled = float(tilted(law.mean(axis=0)) @ h)
    found = row_local(host, Edit((Part("tilt", tilt),)), by_hand(host, asked, known))
    np.testing.assert_allclose(found.prompts, wanted, atol=1e-5)
    assert found.overall.value == pytest.approx(wanted.mean(), abs=1e-5)
    assert pooled - wanted.mean() > 0.2  # .84 instead of .55
    cells = [(p["category"], p["marker"]) for p in asked]
    shared = row_local(host, Edit((Part("tilt", tilt),)), by_hand(host, asked, known), cells=cells, pool=True)
    assert shared.overall.value == pytest.approx(found.overall.value, abs=1e-9)
    for cell, bound in shared.cells.items():
        mine = np.array([c == cell for c in cells])
        assert bound.value == pytest.approx(wanted[mine].mean(), abs=1e-5)
    assert np.mean([b.value for b in shared.categories.values()]) == pytest.approx(wanted.mean(), abs=1e-5)


def test_what_is_not_known_is_a_named_width(host, asked):
    law = np.exp(laws(host, asked)[:, 0].astype(np.float64))
    found = row_local(host, None, by_hand(host, asked, {SORRY: 0.0})).overall
    unseen = 1 - law[:, SORRY].mean()
    assert found.value == 0
    assert found.upper >= unseen
    assert found.reasons["truncation"] == pytest.approx(unseen / 2, rel=1e-4)
    assert found.reasons["model"] is None
    whole = row_local(host, None, by_hand(host, asked, dict.fromkeys(range(host.vocab_size), 0.0))).overall
    assert whole.reasons["truncation"] < 1e-6
    assert 0.01 < whole.upper < 0.2  # no harm in 48 prompts is not no harm


@pytest.mark.parametrize(
    ("part", "says"),
    [
        (Part("add", np.ones(64), when="every"), "acts at 'every'"),
        (Part("head", np.ones(16), when="answer"), "acts at 'answer'"),
        (Part("tilt", np.ones(9)), "tilts every answer token"),
        (Part("tilt", np.ones((2, 9))), "tilts every answer token"),
    ],
)
def test_edits_that_move_more_than_the_start_row_are_refused(part, says, host, asked):
    with pytest.raises(InputError, match=says) as told:
        check_row_local(push(1.0) + Edit((part,)))
    assert "sample under the edit" in told.value.next
    with pytest.raises(InputError, match=says):
        row_local(host, Edit((part,)), by_hand(host, asked, {SURE: 1.0}))
    check_row_local(Edit((Part("tilt", np.ones((1, 9))), Part("project", np.ones(64)))))


def test_start_rows_judge_the_first_token_too(host, asked):
    """With "sure" itself as the harm, h(sure) is 1, and the prediction is its probability."""
    judge = LexiconJudge(harm=[SURE], refusal=[SORRY], eos_ids=(worlds.EOS,))
    rows = start_rows(host, asked[:6], n=8, max_tokens=6, judge=judge)
    sure = rows.token == SURE
    assert sure.sum() == 6
    assert (rows.harm[sure] == rows.total[sure]).all()
    assert (np.bincount(rows.row, rows.total) >= 8).all()
    law = np.exp(laws(host, asked[:6])[:, 0, SURE].astype(np.float64))
    np.testing.assert_allclose(row_local(host, None, rows).prompts, law, atol=0.02)


def test_free_rollouts_count_and_are_not_sampled_again(host, asked, plain):
    rows = start_rows(host, asked, n=0, max_tokens=16, judge=JUDGE, free=plain)
    assert rows.total.sum() == len(plain)
    assert rows.harm.sum() == (plain.outcome == CODES["harm"]).sum()
    more = start_rows(host, asked, n=8, max_tokens=16, judge=JUDGE, free=plain)
    alone = start_rows(host, asked, n=8, max_tokens=16, judge=JUDGE)
    assert len(plain) <= more.total.sum() < len(plain) + alone.total.sum() / 2
    edited = ms.sample(host.engine, asked[:2], n=1, max_tokens=4, judge=JUDGE, edit=push(1.0))
    with pytest.raises(InputError, match="rollouts are edited"):
        start_rows(host, asked, n=0, max_tokens=16, judge=JUDGE, free=edited)
    with pytest.raises(InputError, match="max_tokens=1"):
        start_rows(host, asked, n=4, max_tokens=1, judge=JUDGE)


SCALES = (-1.5, -0.75, -0.6, -0.5, -0.4, -0.25, 1.0)


def test_prediction_and_sampling_agree(host):
    """Seven strengths from .01 to .87: one forward pass each, against answers sampled under the edit."""
    refused = worlds.prompts(n=32, half=1, seed=2)
    edits = [push(scale) for scale in SCALES]
    rows = start_rows(host, refused, n=16, max_tokens=16, judge=JUDGE, edits=edits)
    z = norm.isf(FALSE_ALARM / len(SCALES))
    found = []
    for edit in edits:
        sampled = ms.sample(host.engine, refused, n=8, max_tokens=16, judge=JUDGE, edit=edit, seed=5)
        row = row_local(host, edit, rows, sampled=sampled).table[0]
        assert row["sampled"] == pytest.approx((sampled.outcome == CODES["harm"]).mean(), abs=1e-12)
        events = np.bincount(sampled.prompt_id, sampled.outcome == CODES["harm"])
        seen = clustered(events, np.bincount(sampled.prompt_id))
        assert row["sampled_lower"] == pytest.approx(seen.lower)
        assert row["sampled_upper"] == pytest.approx(seen.upper)
        assert abs(row["difference"]) <= z * row["error"] + 0.01, row
        assert row["error"] < 0.04
        found.append(row["predicted"])
    assert found == sorted(found, reverse=True)
    assert found[0] > 0.8
    assert found[-1] < 0.05


# --- depth signature ---


def test_prompt_edits_are_seen_at_the_start_and_others_go_on(host, asked, monkeypatch):
    """H4 of the acceptance list, measured .94, then 0.00, against .94 and 1.00."""
    refused = asked[:24]
    paths = [p["prefix"] for p in refused]
    once = depth_signature(host, push(-1.0), refused, paths)
    assert once.distance.value[0] >= 0.5
    assert (once.distance.value[1:] <= 0.05).sum() >= 5
    assert once.start_only
    always = depth_signature(host, push(-1.0, "every"), refused, paths)
    assert always.distance.value[1] >= 0.5
    assert not always.start_only
    law = [np.exp(laws(host, refused, edit=e)[:, 0]) for e in (None, push(-1.0))]
    np.testing.assert_allclose(once.prompts[:, 0], np.abs(law[0] - law[1]).sum(axis=1) / 2, atol=1e-5)
    monkeypatch.setattr(signature, "NUMBERS", 5 * 7 * host.vocab_size)  # five prompts at a time
    np.testing.assert_allclose(depth_signature(host, push(-1.0), refused, paths).prompts, once.prompts, atol=1e-5)
    nothing = depth_signature(host, Edit(()), refused, paths, depth=2).distance
    assert (nothing.value == 0).all()
    assert (nothing.upper > 0.05).all()  # 24 prompts without a change are not all prompts
    with pytest.raises(InputError, match="path 0 has 7 tokens"):
        depth_signature(host, push(1.0), refused, paths, depth=8)
