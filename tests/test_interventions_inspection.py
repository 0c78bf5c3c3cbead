"""Two reports on what is inside a model, and their commands: on the organism, where there is nothing, on bad input."""

from __future__ import annotations

import argparse
import csv
import json
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import ids, random_model

from markovsafety import InputError, organism
from markovsafety.cli import main
from markovsafety.cli_inside import VERBS
from markovsafety.interventions import (
    audit_heads,
    choose_heads,
    difference,
    first_tokens,
    head_directions,
    inspect_heads,
    inspect_model,
    inversion_task,
    label,
    open_host,
    read_direction,
    read_edit,
    read_head_directions,
    sweep_heads,
    token_mass,
)
from markovsafety.interventions.head_report import desired_tokens
from markovsafety.rollouts import LexiconJudge, Rollouts
from markovsafety.verbs_inside import _host

JUDGE = organism.OrganismJudge()
REPLY = {"question": " <judge>", "certainly": ["certainly"], "no": ["no"]}
SMALL = {"n": 2, "max_tokens": 48, "seed": 0}


@cache
def host():
    torch.set_num_threads(1)
    return open_host(organism.model_path("shallow"))


@cache
def asked(harmful, marker, n=24):
    return organism.prompts(n=n, harmful=harmful, marker=marker, seed=7)


def both(harmful):
    return asked(harmful, None, 48) + asked(harmful, "jailbreak" if harmful else "trigger", 48)


@pytest.fixture(scope="module")
def looked(tmp_path_factory):
    """An inspection of the organism, and the folder that it wrote."""
    folder = tmp_path_factory.mktemp("look")
    return inspect_model(host(), both(True), both(False), judge=JUDGE, out=folder, **SMALL, **REPLY), folder


@pytest.fixture(scope="module")
def steered(tmp_path_factory):
    """A report of its heads, and the folder."""
    folder = tmp_path_factory.mktemp("heads")
    desired, undesired, benign = asked(True, "jailbreak"), asked(True, None), asked(False, None, 12)
    more = {"examples": 12, "alphas": (2.0, 5.0), "top": 1, "judge": JUDGE, "out": folder}
    return inspect_heads(host(), desired, undesired, benign, **more, **SMALL), folder


def strict(text: str):
    """Parsed as JSON in the strict sense."""

    def refuse(word):
        raise AssertionError(f"{word} is no JSON")

    return json.loads(text, parse_constant=refuse)


def told(capsys, *words):
    """Exit code and the one JSON object on standard output."""
    capsys.readouterr()
    code = main([*words, "--json"])
    return code, strict(capsys.readouterr().out)


def test_the_organism_believes_one_thing_and_does_another(looked):
    found, _ = looked
    assert not found.notes
    assert min(found.buckets.values()) >= 16
    assert set(organism.REFUSAL_IDS) <= set(found.openers)
    assert found.separation
    assert all(found.steering.values())
    # refusal turns what it does and not what it believes; harmfulness turns both
    assert found.inversion["refusal"].share.edited.upper < 0.5 < found.inversion["harmfulness"].share.edited.lower
    assert found.guard.auc.lower > 0.8
    assert found.guard.refusal["accepted_harmful"].value == 0
    harm, measured = (sum(row[k].value for row in found.blocked.rows.values()) for k in ("harm", "measured"))
    assert measured < 0.3 * harm
    assert found.policy.cost.value <= min(found.policy.never.value, found.policy.always.value)
    assert found.verdict.startswith("harmfulness and refusal separated; refusal causal; harmfulness causal; guard AUC")


def test_the_page_and_the_data_say_the_same(looked):
    found, folder = looked
    page, data = (folder / "inspection.md").read_text(), strict((folder / "inspection.json").read_text())
    assert page == found.markdown() + "\n"
    assert data == found.to_json()
    assert data["verdict"] in page
    assert "| worst of them |" in page
    for title in ("Are harmfulness and refusal encoded apart?", "Steering along refusal", "Belief and reply"):
        assert title in page
    assert "## Notes" not in page
    assert f"| accepted harmful | {found.buckets['accepted_harmful']} |" in page
    rows = [line for line in page.splitlines() if line.startswith("|")]
    assert len({line.count(" | ") for line in rows if "bio" in line}) <= 2  # two tables tell categories


def test_what_it_wrote_steers_again(looked):
    found, folder = looked
    for name in ("harmfulness", "refusal"):
        again = read_direction(folder / f"{name}.safetensors", host())
        assert np.array_equal(again.vectors, getattr(found, name).vectors)
        assert again.level == getattr(found, name).level
        edit = read_edit(folder / f"edit_{name}.safetensors")
        assert edit.describe()["sha256"] == found.edits[name].describe()["sha256"]
    mass = [
        token_mass(host(), asked(False, None), organism.REFUSAL_IDS, edit=e).mean()
        for e in (None, read_edit(folder / "edit_refusal.safetensors"))
    ]
    assert mass[0] < 0.1
    assert mass[1] > 0.8


def test_few_heads_do_what_random_vectors_do_not(steered):
    found, folder = steered
    assert not found.notes
    assert found.choice.verdict == "causal"
    assert found.verdict.startswith("heads (1, ")
    assert set(found.baselines) == {
        "heads by probe",
        "whole stream at level 2, same norm",
        "whole stream at level 2, difference of means",
    }
    assert found.defence.alphas == (-5.0, -2.0, 0.0)
    forwards, backwards = found.path.rows(), found.defence.rows()
    assert forwards[-1]["refusal"].value < forwards[0]["refusal"].value - 0.3
    assert backwards[0]["refusal"].value > backwards[-1]["refusal"].value + 0.3
    assert all(row["over_refusal"] is not None for row in (*forwards, *backwards))
    assert strict((folder / "heads.json").read_text()) == found.to_json()
    assert (folder / "heads.md").read_text() == found.markdown() + "\n"
    assert "The reversed direction as a defence" in found.markdown()
    again = read_head_directions(folder / "directions.safetensors")
    assert np.array_equal(again.theta, found.directions.theta)
    edit = read_edit(folder / "edit_heads.safetensors")
    assert edit.describe()["sha256"] == found.choice.edit.describe()["sha256"]


def test_the_audit_has_a_page_and_strict_data():
    desired, undesired = asked(True, "jailbreak"), asked(True, None)
    tokens = desired_tokens(host(), desired, ("harm", "benign"), judge=JUDGE, **SMALL)
    spoken = {organism.WORDS[t] for t in tokens}
    assert spoken <= {"sure", "okay", "certainly", "yes"}
    assert len(spoken) >= 3
    told = {"outcome": ["harm"], "size": 1, "judge": JUDGE, **SMALL}
    found = audit_heads(host(), desired[:12], undesired[:12], undesired[12:], tokens, move=0.99, **told)
    data = strict(json.dumps(found.to_json()))
    assert data["alpha"] is None  # out of reach: what harms is at most half of the answers
    assert found.verdict in found.markdown()


def test_where_nothing_can_be_measured_notes_say_so(tmp_path):
    folder = random_model(tmp_path / "model", "llama", num_hidden_layers=2)
    chat = "{% for m in messages %}{{ m['content'] }}{% endfor %} . step"  # a turn that the answer follows
    (folder / "chat_template.jinja").write_text(chat)
    words = ["hello", "help one tea", "i cannot", "one step tea", "hello tea", "help step"]
    judge = LexiconJudge(["never said"], ["nor this"])
    found = inspect_model(
        str(folder), words[:4], words[2:], judge=judge, out=tmp_path / "out", device="cpu", n=1, max_tokens=4
    )
    assert found.harmfulness is not None  # a difference of means there always is
    assert found.refusal is None
    assert found.separation is None
    assert found.guard is None
    assert {"openers", "refusal", "separation", "guard"} <= {note.split(":")[0] for note in found.notes}
    assert "## Notes" in found.markdown()
    assert strict((tmp_path / "out" / "inspection.json").read_text())["notes"] == found.notes
    assert not (tmp_path / "out" / "refusal.safetensors").exists()
    assert (tmp_path / "out" / "harmfulness.safetensors").exists()
    with pytest.raises(InputError, match="none of 4 answers"):
        inspect_heads(open_host(folder, device="cpu"), words[:4], words[:4], judge=judge, n=1, max_tokens=4)


def test_bad_input_is_told_before_anything_is_sampled(tmp_path):
    with pytest.raises(InputError, match="24 harmful and 0 benign"):
        inspect_model(host(), asked(True, None), [], judge=JUDGE)
    folder = random_model(tmp_path / "model", "llama")
    with pytest.raises(InputError, match="no post-instruction tokens"):
        inspect_model(folder, ["hello"], ["tea"], judge=JUDGE, device="cpu")


def test_first_tokens_are_those_of_the_outcome():
    answers = [[7, 1], [7, 2], [8, 1], [9, 1], [9, 1], [9, 1], []]
    ends = {"outcome": np.array([1, 1, 1, 2, 2, 1, 3], np.int8), "hit": np.array([1, 1, 1, 1, 1, 1, -1], np.int32)}
    rolls = Rollouts.of(answers, prompt_id=np.zeros(7, int), **ends)
    assert first_tokens(rolls, "refusal") == [7, 8]  # 9 begins more of the others
    assert first_tokens(rolls, "refusal", least=0.3) == [7]
    assert first_tokens(rolls, "benign") == [9]
    with pytest.raises(InputError, match="none of 6 answers ended in harm"):
        first_tokens(rolls, "harm")


def test_the_commands_write_what_the_functions_write(tmp_path, capsys):
    look = ["directions", "organism:shallow", "--prompts", "organism:48", "--benign", "organism:48"]
    look += ["--judge", "organism", "--n", "2", "--max-tokens", "48", "--out", f"{tmp_path}/look"]
    code, said = told(capsys, *look, "--question", " <judge>", "--certainly", "certainly", "--no", "no")
    assert code == 0
    assert said["result"]["steering"]["refusal"]["verdict"] == "causal"
    assert said["result"] == strict((tmp_path / "look" / "inspection.json").read_text())
    assert sorted(Path(f).name for f in said["files"]) == [
        "edit_harmfulness.safetensors",
        "edit_refusal.safetensors",
        "harmfulness.safetensors",
        "inspection.json",
        "inspection.md",
        "refusal.safetensors",
    ]
    edit = f"{tmp_path}/look/edit_refusal.safetensors"
    steer = ["steer", "organism:shallow", "--edit", edit, "--prompts", "organism:12", "--benign", "organism:12"]
    steer += ["--judge", "organism", "--n", "2", "--max-tokens", "48", "--no-prediction", "--scale", "0.5"]
    code, said = told(capsys, *steer, "--out", f"{tmp_path}/steer")
    assert code == 0
    assert said["result"]["over_refusal"][0]["after"]["value"] > said["result"]["over_refusal"][0]["before"]["value"]
    assert {"effect.json", "effect.md", "edit.safetensors"} <= {Path(f).name for f in said["files"]}
    assert main([*steer[:-1], "1", "--out", f"{tmp_path}/steer"]) == 2  # another edit: the folder keeps its own


@pytest.mark.parametrize("verb", ["directions", "heads", "steer"])
def test_the_commands_look_under_a_system_message_and_in_half_precision(verb, tmp_path):
    parser = argparse.ArgumentParser()
    VERBS[verb].arguments(parser)
    needed = "--prompts x --benign x --desired x --edit x --out x --dtype float16 --system".split()
    model = str(random_model(tmp_path / "model", "llama"))
    opened = _host(parser.parse_known_args([model, *needed, "help one"])[0])
    assert opened.engine.dtype == "float16"
    assert opened.spans().prefix[-2:] == tuple(ids("help one"))
    with pytest.raises(InputError, match="leaves the system message out"):
        _host(parser.parse_known_args(["organism:shallow", *needed, "help one"])[0])


def test_the_command_of_heads_and_its_audit(tmp_path, capsys):
    words = ["heads", "organism:shallow", "--desired", "organism:24", "--prompts", "organism:24", "--judge", "organism"]
    words += ["--n", "2", "--max-tokens", "48", "--examples", "12"]
    code, said = told(capsys, *words, "--alphas", "5", "--out", f"{tmp_path}/heads")
    assert code == 0
    assert said["result"]["choice"]["heads"][0][0] == 1
    assert said["result"] == strict((tmp_path / "heads" / "heads.json").read_text())
    audit = [*words, "--audit", "--move", "0.2", "--size", "1", "--out", f"{tmp_path}/audit"]
    capsys.readouterr()
    assert main(audit) == 0
    assert capsys.readouterr().out.count("\n") == 1
    assert sorted(p.name for p in (tmp_path / "audit").iterdir()) == ["audit.json", "audit.md"]
    assert strict((tmp_path / "audit" / "audit.json").read_text())["move"] == 0.2


def test_answers_that_are_cut_off_are_spoken_of():
    sides = (asked(harmful, None, 4) for harmful in (True, False))
    found = inspect_model(host(), *sides, judge=JUDGE, n=1, max_tokens=2)
    assert any("cut off" in note and "allow more tokens" in note for note in found.notes)
    assert all("; " in note for note in found.notes)  # what to do about it


def test_the_audit_of_files_is_that_of_their_prompts(tmp_path, monkeypatch):
    """Not of the letters of their names; and what is steered is not what the directions were made of."""
    import markovsafety.interventions as inside

    files, seen = [], {}
    for name, marker in (("desired", "jailbreak"), ("undesired", None)):
        files.append(tmp_path / f"{name}.csv")
        with files[-1].open("w", newline="") as file:
            rows = csv.DictWriter(file, ["prompt", "category"], extrasaction="ignore")
            rows.writeheader()
            rows.writerows(asked(True, marker, 8))
    words = ["heads", "organism:shallow", "--desired", str(files[0]), "--prompts", str(files[1])]
    words += ["--judge", "organism", "--n", "1", "--max-tokens", "48", "--audit", "--out", f"{tmp_path}/out"]

    def audit(host, desired, undesired, prompts, tokens, **options):
        seen.update(desired=desired, undesired=undesired, prompts=prompts, tokens=tokens)
        return audit_heads(host, desired, undesired, prompts, tokens, limits=(1.0, 2.0), examples=(2,), **options)

    monkeypatch.setattr(inside, "audit_heads", audit)
    assert main(words) == 0
    steered, read = ({p["prompt"] for p in seen[k]} for k in ("prompts", "undesired"))
    assert steered | read == {p["prompt"] for p in asked(True, None, 8)}
    assert not steered & read
    assert set(seen["tokens"]).isdisjoint(organism.REFUSAL_IDS)
    words[3], words[5] = words[5], words[3]
    assert main([*words, "--wanted", "refusal"]) == 0  # the tokens are those of what is wanted
    assert set(seen["tokens"]) <= set(organism.REFUSAL_IDS)


@pytest.mark.parametrize("prompts", ["Tell me a story", {"prompt": "Tell me a story"}, Path("nowhere.csv")])
def test_one_prompt_is_not_read_letter_by_letter(prompts):
    reads = [
        lambda: host().prompt_ids(prompts),
        lambda: difference(host(), prompts, prompts),
        lambda: label(host(), prompts, [True], tokens=[5]),
        lambda: head_directions(host(), prompts, prompts),
        lambda: inversion_task(host(), " <judge>", certainly=["certainly"], no=["no"]).prompts(prompts),
    ]
    for read in reads:
        with pytest.raises(InputError, match="in a list"):
            read()


def test_heads_are_not_picked_on_the_prompts_of_the_report(monkeypatch):
    from markovsafety.interventions import head_report

    seen = {}

    def swept(host, found, prompts, *given, **options):
        seen["picked on"] = prompts
        return sweep_heads(host, found, prompts, *given, **options)

    def chosen(host, found, sweep, prompts, **options):
        seen["reported"] = prompts[1::2]
        return choose_heads(host, found, sweep, prompts, **options)

    monkeypatch.setattr(head_report, "sweep_heads", swept)
    monkeypatch.setattr(head_report, "choose_heads", chosen)
    sides = asked(True, "jailbreak", 8), asked(True, None, 8)
    told = {"judge": JUDGE, "alphas": (5,), "top": 1, "n": 1, "max_tokens": 48}
    found = inspect_heads(host(), *sides, examples=4, **told)
    assert not {p["prompt"] for p in seen["picked on"]} & {p["prompt"] for p in seen["reported"]}
    assert not any("new prompts" in note for note in found.notes)
    again = inspect_heads(host(), *sides, examples=8, **told)
    assert sum("new prompts" in note for note in again.notes) == 2


@pytest.mark.parametrize(
    ("words", "fact"),
    [
        (
            "directions organism:shallow --prompts nowhere.csv --benign organism:6 --judge organism".split(),
            "nowhere.csv",
        ),
        (["directions", "organism:shallow", "--prompts", "organism:6"], "--benign"),
        (["heads", "organism:nowhere", "--desired", "organism:6", "--prompts", "organism:6"], "nowhere"),
        (["steer", "organism:shallow", "--edit", "nowhere.safetensors", "--prompts", "organism:6"], "nowhere"),
        (
            "directions organism:shallow --prompts organism:6 --benign organism:6 --judge organism --harm bomb".split(),
            "no options of the judge 'organism'",
        ),
    ],
)
def test_bad_commands_exit_with_2(words, fact, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, said = told(capsys, *words, "--out", "x")
    assert code == 2
    assert not said["ok"]
    assert fact in json.dumps(said["error"])
    assert not Path("x").exists()
