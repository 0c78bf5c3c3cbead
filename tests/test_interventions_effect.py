"""The whole effect of an edit: both chains and what accounts for their difference, the report, the command."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import norm
from steered import FALSE_ALARM, JUDGE, LEVEL, push
from steered_fixtures import asked, host, plain, refuse

import markovsafety as ms
from markovsafety import InputError, UntrustedError
from markovsafety.chains import Chain
from markovsafety.cli import main
from markovsafety.interventions import Edit, Part, activations, chain_effects, open_host, read_edit, write_edit
from markovsafety.interventions.chain_changes import aligned, chain_change, identity_gap
from markovsafety.interventions.chain_effects import chain_effect
from markovsafety.interventions.outcome_rates import rates
from markovsafety.organism import model_path, prompts, worlds
from markovsafety.outcomes import CODES

SURE, SORRY = worlds.IDS["sure"], worlds.IDS["sorry"]

__all__ = ["asked", "host", "plain", "refuse"]  # fixtures


# --- both chains ---


@pytest.mark.parametrize("states", [None, ms.chains.Product([ms.chains.Position(), ms.KGram(1)])], ids=["2", "depth"])
def test_the_change_is_attributed_and_the_identity_holds(host, asked, plain, states):
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
def whole(host, asked, folder):
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
    assert overall.beyond.info["name"] == "P(harm), after - control"
    assert repr(overall).startswith("<Rate: P(harm) of all: before 0.")
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


def test_the_report_is_written_and_a_second_call_reads_it(whole, host, asked, folder, monkeypatch):
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
    with pytest.raises(InputError, match="holds the effect of another edit"):
        chain_effect(host, push(0.5), asked, n=4, max_tokens=16, judge=JUDGE, out=folder)
    assert read_edit(folder / "edit.safetensors").describe()["sha256"] == push(1.0).describe()["sha256"]


@pytest.mark.parametrize(("scale", "loops"), [(1.0, "sorry sorry"), (-1.0, "sure sure")])
def test_an_edit_that_breaks_the_model_gives_no_silent_number(host, asked, scale, loops):
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


def test_benign_answers_that_break_are_broken_too(whole):
    worse = replace(whole.quality["benign_after"], repetition=ms.Bound(0.9, 0.8, 0.95))
    broken = replace(whole, quality={**whole.quality, "benign_after": worse})
    assert broken.broken
    assert broken.broken_on == ["benign_"]
    assert "the model breaks on benign prompts" in broken.verdict
    assert not replace(whole, quality={k: whole.quality[k] for k in ("before", "after")}).broken


def test_what_was_sampled_before_an_error_is_kept(host, asked, monkeypatch):
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


def test_activations_make_the_states_where_they_are_asked_for(host, asked, refuse):
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
