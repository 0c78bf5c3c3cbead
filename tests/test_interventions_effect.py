"""The chain view of an edit: the start row, the depth signature, both chains and what accounts for their difference."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import norm

import markovsafety as ms
from markovsafety import InputError, UntrustedError
from markovsafety.chains import ActivationBins, Chain
from markovsafety.cli import main
from markovsafety.interventions import Edit, Part, activations, chain_effects, laws, open_host, signature, write_edit
from markovsafety.interventions.activation_columns import with_activations
from markovsafety.interventions.chain_changes import aligned, chain_change, identity_gap
from markovsafety.interventions.chain_effects import chain_effect
from markovsafety.interventions.coherence import quality, repeats
from markovsafety.interventions.outcome_rates import rates
from markovsafety.interventions.prediction import row_local
from markovsafety.interventions.signature import depth_signature
from markovsafety.interventions.start_row import StartRows, check_row_local, start_rows
from markovsafety.organism import model_path, worlds
from markovsafety.organism.train_worlds import open_world
from markovsafety.outcomes import CODES
from markovsafety.rollouts import LexiconJudge, Rollouts

BASE = Path(__file__).parent / "fixtures" / "worlds" / "base"
JUDGE = worlds.world_judge()
SURE, SORRY = worlds.IDS["sure"], worlds.IDS["sorry"]
LEVEL = 2
FALSE_ALARM = 1e-8  # of every statistical statement here; a dozen are made


@pytest.fixture(scope="module")
def host():
    torch.set_num_threads(1)
    return open_host(open_world(BASE))


@pytest.fixture(scope="module")
def asked():
    """Half the prompts are refused, half are jailbroken."""
    both = worlds.prompts(n=24, half=1, seed=2) + worlds.prompts(n=24, half=1, marker="jailbreak", seed=2)
    return [{**p, "prompt_id": i} for i, p in enumerate(both)]


@pytest.fixture(scope="module")
def refuse(host):
    """Refused minus accepted, by level, at the last prompt token."""
    sides = [worlds.prompts(n=48, half=0, marker=m, seed=1) for m in (None, "jailbreak")]
    means = [activations(host, p)[:, :, 0].mean(axis=0) for p in sides]
    return means[0] - means[1]


@pytest.fixture(scope="module")
def push(refuse):
    """scale -> edit along the refusal direction."""

    def made(scale: float, when: str = "prompt") -> Edit:
        return Edit((Part("add", refuse[LEVEL], layer=LEVEL, scale=scale, when=when),), sign="positive: refuses")

    return made


@pytest.fixture(scope="module")
def plain(host, asked):
    return ms.sample(host.engine, asked, n=8, max_tokens=16, judge=JUDGE)


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
def test_edits_that_move_more_than_the_start_row_are_refused(part, says, host, asked, push):
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


def test_free_rollouts_count_and_are_not_sampled_again(host, asked, plain, push):
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


def test_prediction_and_sampling_agree(host, push):
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
        assert abs(row["difference"]) <= z * row["error"] + 0.01, row
        assert row["error"] < 0.04
        found.append(row["predicted"])
    assert found == sorted(found, reverse=True)
    assert found[0] > 0.8
    assert found[-1] < 0.05


# --- depth signature ---


def test_prompt_edits_are_seen_at_the_start_and_others_go_on(host, asked, push, monkeypatch):
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


# --- both chains ---


@pytest.mark.parametrize("states", [None, ms.chains.Product([ms.chains.Position(), ms.KGram(1)])], ids=["2", "depth"])
def test_the_change_is_attributed_and_the_identity_holds(host, asked, plain, push, states):
    after = ms.sample(host.engine, asked, n=8, max_tokens=16, judge=JUDGE, edit=push(-0.6))
    found = chain_change(plain, after, states)
    raw = [(r.outcome == CODES["harm"]).mean() for r in (plain, after)]
    assert raw[1] - raw[0] > 0.2
    assert found.change == pytest.approx(raw[1] - raw[0], abs=1e-12)
    assert found.positions.sum() == pytest.approx(raw[1] - raw[0], abs=1e-12)
    assert found.gap < 1e-10
    for chain, both in zip((found.before, found.after), found.aligned):
        wanted, got = (ms.hitting_probability(c, "harm").at_start.value for c in (chain, both))
        assert got == pytest.approx(wanted, abs=1e-12)
    # a prompt-only edit moves the first row: that is where the change is
    assert found.positions[0] == pytest.approx(found.change, abs=0.1)
    assert found.rows()[0]["to"] in ((-1, SURE), (-1, SORRY), (1, (SURE,)), (1, (SORRY,)))
    assert json.dumps(found.to_json(), allow_nan=False)


def test_a_loop_without_an_end_is_named():
    labels = ["start", "a", "b", "harm", "truncated"]
    ends = {"harm": 3, "truncated": 4}
    moves = np.zeros((5, 5))
    moves[0, [1, 3]] = 0.5
    fine = moves.copy()
    fine[1, 2] = fine[2, 4] = 1.0
    moves[1, 2] = moves[2, 1] = 1.0  # round and round
    good, bad = (Chain(P, ends, "start", labels) for P in (fine, moves))
    assert identity_gap(good, good) == 0
    with pytest.raises(UntrustedError, match="never reach an outcome, the first of them 'a'") as told:
        identity_gap(good, bad)
    assert "truncated" in told.value.next
    assert told.value.partial == ["a", "b"]
    other = Chain(np.eye(2), {"refusal": 1}, 0, ["start", "refusal"])
    with pytest.raises(InputError, match="common states"):
        aligned(good, other)


def test_a_state_of_one_chain_borrows_its_row():
    ends = {"harm": 2, "refusal": 3}
    first = Chain([[0, 0.5, 0.25, 0.25], [0, 0, 1, 0], [0] * 4, [0] * 4], ends, 0, ["s", "a", "harm", "refusal"])
    second = Chain([[0, 1, 0, 0], [0, 0, 0.5, 0.5], [0] * 4, [0] * 4], ends, 0, ["s", "b", "harm", "refusal"])
    one, two = aligned(first, second)
    assert one.states == two.states == ("a", "b", "s", "harm", "refusal")
    assert one.P.toarray()[1].tolist() == two.P.toarray()[1].tolist() == [0, 0, 0, 0.5, 0.5]
    share = ms.attribute(one, two, "harm")
    assert share[:2].tolist() == [0, 0]
    assert share.sum() == pytest.approx(0.5 - 0.75, abs=1e-14)


# --- the whole effect ---


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("effect")


@pytest.fixture(scope="module")
def whole(host, asked, push, folder):
    benign = worlds.prompts(n=12, harmful=False, seed=3)
    return chain_effect(
        host,
        push(1.0),
        asked,
        n=4,
        max_tokens=16,
        judge=JUDGE,
        benign=benign,
        paths=[p["prefix"] for p in asked],
        out=folder,
    )


def test_the_report_holds_every_arm_beside_its_control(whole, asked):
    """The refusal direction buys safety with over-refusal, and says so."""
    assert set(whole.rollouts) == {f"{k}{a}" for k in ("", "benign_") for a in ("before", "after", "control")}
    overall, *groups = whole.harm
    assert overall.arms.keys() == {"before", "after", "control"}
    assert [r.category for r in groups] == sorted(worlds.CATEGORIES)
    for arm in overall.arms:
        raw = (whole.rollouts[arm].outcome == CODES["harm"]).mean()
        assert overall.arms[arm].value == pytest.approx(raw, abs=1e-12)
        assert np.mean([g.arms[arm].value for g in groups]) == pytest.approx(raw, abs=1e-12)
    assert overall.change.upper < -0.2
    assert overall.beyond.upper < -0.2
    assert whole.over_refusal[0].arms["after"].value > 0.9
    assert whole.over_refusal[0].arms["control"].value < 0.3
    assert whole.chain.change == pytest.approx(overall.change.value, abs=1e-12)
    assert whole.signature.start_only
    assert abs(whole.predicted.table[0]["z"]) < norm.isf(FALSE_ALARM)
    assert not whole.broken
    assert whole.notes == ()
    assert whole.verdict.startswith("The edit lowers harm")
    assert "beyond a random edit of its size" in whole.verdict
    # the arms have the same random numbers
    seeds = [r.columns["seed"] for r in whole.rollouts.values()]
    assert (seeds[0] == seeds[1]).all()


def test_the_report_is_written_and_a_second_call_reads_it(whole, host, asked, push, folder, monkeypatch):
    told = json.loads((folder / "effect.json").read_text())
    assert told == json.loads(json.dumps(whole.to_json(), allow_nan=False))
    assert told["harm"][0]["change"]["value"] == whole.change.value
    page = (folder / "effect.md").read_text()
    assert whole.verdict in page
    assert all(f"| {c} |" in page for c in worlds.CATEGORIES)
    assert ms.read_rollouts(folder / "after") == whole.rollouts["after"]
    with monkeypatch.context() as m:
        m.setattr(type(host.engine), "_generate", None)  # nothing is sampled again
        again = chain_effect(host, push(1.0), asked, n=4, max_tokens=16, judge=JUDGE, predict=False, out=folder)
    assert again.rollouts["after"] == whole.rollouts["after"]
    assert "no depth signature" not in " ".join(again.notes)  # the prompts' prefixes are followed
    assert any(note.startswith("no benign prompts") for note in again.notes)
    with pytest.raises(InputError):
        chain_effect(host, push(0.5), asked, n=4, max_tokens=16, judge=JUDGE, out=folder)


@pytest.mark.parametrize(("scale", "loops"), [(1.0, "sorry sorry"), (-1.0, "sure sure")])
def test_an_edit_that_breaks_the_model_gives_no_silent_number(host, asked, push, scale, loops):
    """Answers that go round in circles are cut off: no refusals, no harm, and the report says so."""
    bare = [{"prompt": p["prompt"], "category": p["category"]} for p in asked[24:36]]
    found = chain_effect(host, push(scale, "every"), bare, n=4, max_tokens=24, judge=JUDGE, control=False)
    after = found.rollouts["after"]
    assert loops in host.engine.tokenizer.decode(after.answer(0))
    cut = (after.outcome == CODES["truncated"]).mean()
    assert cut > 0.9
    assert found.quality["after"].truncated.value == pytest.approx(cut, abs=1e-12)
    assert found.quality["after"].repetition.value > 0.9
    assert found.broken
    assert "cut off and may hide harm" in found.verdict
    assert "the model breaks" in found.verdict
    notes = " ".join(found.notes)
    for text in ("no control", "no depth signature", "no prediction from the start row", "no benign prompts"):
        assert text in notes
    assert found.signature is None
    assert found.predicted is None
    if cut == 1:  # nothing is known of the outcomes
        assert found.chain is None
        assert "were truncated" in notes
    else:
        assert found.chain.gap < 1e-10
        stuck = ms.hitting_probability(found.chain.after, "truncated").at_start.value
        assert stuck == pytest.approx(cut, abs=1e-10)
    assert json.dumps(found.to_json(), allow_nan=False)


def test_what_was_sampled_before_an_error_is_kept(host, asked, push, monkeypatch):
    real = chain_effects.sample

    def failing(*args, edit=None, **options):
        if edit is not None:
            raise UntrustedError("the logits became NaN", cause="a test", next="stop")
        return real(*args, edit=edit, **options)

    monkeypatch.setattr(chain_effects, "sample", failing)
    with pytest.raises(UntrustedError, match="NaN") as told:
        chain_effect(host, push(1.0), asked[:4], n=2, max_tokens=8, judge=JUDGE)
    assert list(told.value.partial.rollouts) == ["before"]
    assert "sampling after failed" in told.value.partial.verdict
    assert json.dumps(told.value.partial.to_json())


def test_activations_make_the_states_where_they_are_asked_for(host, asked, push, refuse):
    found = chain_effect(
        host,
        push(-1.0),
        asked[:24],
        n=4,
        max_tokens=16,
        judge=JUDGE,
        control=False,
        predict=False,
        directions={"refusal": (LEVEL, refuse[LEVEL]), "level3": (3, refuse[3])},
    )
    assert found.chain.before.counts.kind.startswith("ActivationBins(refusal")
    assert found.chain.change == pytest.approx(found.change.value, abs=1e-12)
    # under the edit the last prompt token is moved: the plane shows it at the start
    first = [r.columns["activation_refusal"][r.offsets[:-1]].mean() for r in found.rollouts.values()]
    assert first[1] - first[0] == pytest.approx(-float(refuse[LEVEL] @ refuse[LEVEL]), rel=1e-3)


def test_rates_pair_the_same_prompts_only(plain):
    with pytest.raises(InputError, match="other prompts"):
        rates({"before": plain, "after": plain[plain.prompt_id > 3]}, "harm")
    with pytest.raises(InputError, match="not judged"):
        rates({"before": plain, "after": replace(plain, outcome=0 * plain.outcome - 1, hit=0 * plain.hit - 1)}, "harm")
    same = rates({"before": plain, "after": plain}, "harm")[0].change
    assert same.value == 0
    assert same.lower < 0 < same.upper
    assert same.info["p"] == 1


# --- the command line ---


def test_steer_from_the_command_line(tmp_path, capsys):
    host = open_host(str(model_path("shallow")))
    from markovsafety.organism import prompts

    sides = [prompts("train", n=24, harmful=h, seed=1) for h in (True, False)]
    v = np.subtract(*(activations(host, p, levels=[LEVEL]).mean(axis=0)[0, 0] for p in sides))
    edit = Edit((Part("add", v, layer=LEVEL),), *host.identity, sign="positive: refuses")
    write_edit(edit, tmp_path / "edit.safetensors")
    words = ["steer", "organism:shallow", "--edit", f"{tmp_path}/edit.safetensors", "--prompts", "organism:6"]
    words += ["--benign", "organism:6", "--judge", "organism", "--n", "2", "--max-tokens", "32", "--scale", "2"]
    capsys.readouterr()
    assert main([*words, "--out", f"{tmp_path}/out", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["ok"] is True
    assert told["result"]["edit"]["parts"][0]["scale"] == 2
    assert told["result"]["over_refusal"][0]["after"]["value"] > told["result"]["over_refusal"][0]["before"]["value"]
    assert {"effect.json", "effect.md", "after"} <= {Path(f).name for f in told["files"]}
    assert main([*words, "--out", f"{tmp_path}/out"]) == 0
    assert capsys.readouterr().out.count("\n") == 1
    words[1] = "organism:base"
    assert main([*words, "--out", f"{tmp_path}/other", "--json"]) == 2
    assert "another model" in json.loads(capsys.readouterr().out)["error"]["fact"]
    assert main([*words, "--transferred", "--n", "1", "--no-control", "--out", f"{tmp_path}/other", "--json"]) == 0
    assert main([*words, "--harm", "word", "--out", f"{tmp_path}/third"]) == 2
    assert "no options of the judge" in capsys.readouterr().err
