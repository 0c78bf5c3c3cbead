"""The command line walks the whole road on files: outputs, JSON envelope, exit codes, errors that say what to do."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest

import markovsafety as ms
from markovsafety.cli import main


@pytest.fixture(scope="module")
def road(tmp_path_factory):
    """Rollouts of the shipped shallow model, sampled, judged, counted and estimated by the commands themselves."""
    folder = tmp_path_factory.mktemp("road")
    ask = ["organism", "prompts", "--n", "24", "--out", f"{folder}/prompts.jsonl"]
    assert main(ask) == 0
    common = ["--max-tokens", "96", "--prefill", "0", "1", "5", "--n", "12"]
    for name, prompts, seed in (("run", f"{folder}/prompts.jsonl", "0"), ("held", "organism:24", "4")):
        assert main(["sample", "organism:shallow", prompts, "--out", f"{folder}/{name}", "--seed", seed, *common]) == 0
        words = ["judge", f"{folder}/{name}", "--judge", "organism", "--out", f"{folder}/{name}.parquet"]
        assert main(words) == 0
    run = f"{folder}/run.parquet"
    assert main(["count", run, "--states", "kgram:2", "--prefill", "0", "--out", f"{folder}/counts.npz"]) == 0
    assert main(["estimate", f"{folder}/counts.npz", "--out", f"{folder}/chain.npz"]) == 0
    return folder


def told(capsys, *words):
    """Exit code and the one JSON object on standard output."""
    code = main([*words, "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_solve_says_what_was_solved_and_how(road, capsys):
    code, said = told(capsys, "solve", f"{road}/chain.npz", "--target", "harm")
    assert code == 0
    assert said.keys() == {"command", "ok", "result", "files", "warnings", "seconds", "version"}
    assert said["command"] == "solve"
    assert said["ok"] is True
    rolls = ms.read_rollouts(road / "run.parquet")
    free = rolls[rolls.prefill == 0]
    at = said["result"]["at_start"]
    assert at["value"] == pytest.approx((free.outcome == 0).mean(), abs=1e-12)  # the identity, through three files
    assert at["lower"] < at["value"] < at["upper"]
    assert said["result"]["certified"] is True
    assert said["result"]["n_states"] == ms.read_chain(road / "chain.npz").n_states
    # every free rollout takes as many steps as it has sampled tokens up to its hit
    steps = np.where(free.hit >= 0, free.hit + 1, np.diff(free.offsets))
    assert said["result"]["expected_tokens"]["value"] == pytest.approx(steps.mean(), rel=1e-9)


def test_levels_are_those_of_the_functions(road, capsys):
    chain = ms.read_chain(f"{road}/chain.npz")
    for level in (0.8, 0.99):
        code, said = told(capsys, "solve", f"{road}/chain.npz", "--level", str(level))
        bound = ms.hitting_probability(chain, "harm", level=level).at_start
        start = said["result"]["at_start"]
        assert (code, start["level"], start["lower"], start["upper"]) == (0, level, bound.lower, bound.upper)
    _, narrow = told(capsys, "compare", f"{road}/run.parquet", f"{road}/run.parquet", "--level", "0.5")
    _, wide = told(capsys, "compare", f"{road}/run.parquet", f"{road}/run.parquet")
    width = [
        row["difference_upper"] - row["difference_lower"] for said in (narrow, wide) for row in said["result"]["table"]
    ]
    assert width[0] < width[len(width) // 2]


def test_solve_writes_every_state(road, tmp_path):
    assert main(["solve", f"{road}/chain.npz", "--out", f"{tmp_path}/states.csv"]) == 0
    rows = list(csv.DictReader((tmp_path / "states.csv").read_text().splitlines()))
    chain = ms.read_chain(road / "chain.npz")
    h = ms.hitting_probability(chain, "harm")
    assert [float(r["value"]) for r in rows] == pytest.approx(list(h.value), abs=0)
    assert len(rows) == chain.n_states


def test_count_and_estimate_are_the_functions(road):
    rolls = ms.read_rollouts(road / "run.parquet")
    chain = ms.estimate(ms.count(rolls, ms.KGram(2)).select(prefill=0))
    assert ms.read_chain(road / "chain.npz").equals(chain)


def test_sweep_gives_the_measured_grid(road, capsys, tmp_path):
    run, out = f"{road}/run.parquet", f"{tmp_path}/grid.csv"
    code, said = told(capsys, "sweep", run, "--width", "1", "2", "--harm", "0.2", "--out", out)
    assert code == 0
    assert said["result"]["dims"] == ["depth", "width"]
    assert said["result"]["coords"] == {"depth": [0, 1, 5], "width": [1, 2]}
    rolls = ms.read_rollouts(road / "run.parquet")
    measured = [(rolls.outcome[rolls.prefill == k] == 0).mean() for k in (0, 1, 5)]
    assert [row[0] for row in said["result"]["harm"]["value"]] == pytest.approx(measured, abs=1e-12)
    assert said["result"]["needed"]["depth"][0] == 0  # shallow: safe unforced, lost after one token
    assert len(list(csv.DictReader((tmp_path / "grid.csv").read_text().splitlines()))) == 6


def test_check_exits_with_its_verdict(road, capsys):
    code, said = told(capsys, "check", f"{road}/chain.npz", f"{road}/held.parquet")
    assert said["result"].keys() >= {"passed", "verdict", "table"}
    assert code == (0 if said["result"]["passed"] is True else 1)
    assert said["ok"] == (code == 0)
    assert [row["k"] for row in said["result"]["table"]] == [0, 1, 5]


def test_compare_and_report(road, capsys, tmp_path):
    code, said = told(capsys, "compare", f"{road}/run.parquet", f"{road}/held.parquet")
    assert code == 0
    first = said["result"]["table"][0]
    assert first["difference_lower"] <= first["difference"] <= first["difference_upper"]
    words = ["report", f"shallow={road}/run.parquet", "--held-out", f"shallow={road}/held.parquet"]
    code, said = told(capsys, *words, "--out", str(tmp_path / "page"))
    assert code == 0
    assert said["files"] == [str(tmp_path / "page" / "index.html")]
    assert said["result"]["models"].keys() == {"shallow"}


def test_plain_output_is_one_line(road, capsys):
    for words in (
        ["solve", f"{road}/chain.npz"],
        ["sweep", f"{road}/run.parquet"],
        ["compare", f"{road}/run.parquet", f"{road}/held.parquet"],
        ["check", f"{road}/chain.npz", f"{road}/held.parquet"],
        ["organism", "list"],
    ):
        capsys.readouterr()
        main(words)
        assert capsys.readouterr().out.count("\n") == 1, words


@pytest.mark.parametrize(
    ("words", "fact"),
    [
        (["solve", "nowhere.npz"], "nowhere.npz"),
        (["judge", "nowhere", "--out", "x"], "nowhere"),
        (["sample", "no/such-folder", "organism:6", "--out", "x", "--engine", "jax"], "no/such-folder"),
        (["sample", "organism:gap", "organism:6", "--out", "x"], "gap"),
        (["sample", "organism:base", "organism:x", "--out", "x"], "organism:x"),
        (["estimate", "nowhere.parquet", "--states", "2-gram", "--out", "x"], "nowhere"),
        (["organism", "train", "--out", "x"], "variant"),
        (["organism", "train", "base", "--out", "x", "--hidden", "8", "16"], "--hidden 8 16"),
        (["organism", "train", "deep4", "--out", "x", "--hidden", "8"], "--hidden 8 for deep4"),
        (["organism", "train", "deep4", "--out", "x", "--seeds", "2"], "does not heed --seeds"),
        (["organism", "grid", "deep4", "--out", "x"], "does not heed variant"),
        (["organism", "grid", "--out", "x", "--workers", "0"], "workers is 0"),
        (["organism", "list", "--hidden", "8"], "does not heed --hidden"),
        (["organism", "prompts"], "--out"),
        (["demo", "--models", "nowhere"], "nowhere"),
        (["demo", "--budget", "2"], "budget"),
        (["report", "nowhere.parquet"], "nowhere"),
        (["organism", "prompts", "--out", "/proc/nowhere/x.jsonl"], "/proc/nowhere"),
        (["sample", "organism:base", "--out", "x"], "prompts"),
        (["solve"], "chain"),
        (["frobnicate"], "frobnicate"),
    ],
)
def test_bad_input_is_told_with_exit_code_2(words, fact, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, said = told(capsys, *words)
    assert code == 2
    assert said["ok"] is False
    assert said["error"].keys() == {"type", "fact", "cause", "next", "partial"}
    assert fact in said["error"]["fact"] + said["error"]["next"]
    assert said["error"]["next"]
    assert said["error"]["cause"]
    assert main(words) == 2
    err = capsys.readouterr().err
    assert "Traceback" not in err
    assert fact in err


def test_unknown_target_lists_the_outcomes(road, capsys):
    code, said = told(capsys, "solve", f"{road}/chain.npz", "--target", "hrm")
    assert code == 2
    assert "refusal" in said["error"]["cause"]


def test_an_untrusted_answer_exits_with_1_and_its_partial(capsys, monkeypatch):
    from markovsafety import verbs

    def run(options):
        raise ms.UntrustedError("it did not converge", cause="why", next="what", partial=ms.Bound(0.5, 0.25, 1.0))

    monkeypatch.setattr(verbs, "solve", run)
    code, said = told(capsys, "solve", "x.npz")
    assert code == 1
    assert said["error"]["partial"]["lower"] == 0.25


def test_sampling_again_continues_and_other_parameters_are_refused(road, capsys):
    again = ["sample", "organism:shallow", f"{road}/prompts.jsonl", "--out", f"{road}/run", "--max-tokens", "96"]
    again += ["--prefill", "0", "1", "5", "--seed", "0"]
    code, said = told(capsys, *again, "--n", "12")
    assert code == 0
    assert said["result"]["rollouts"] == 24 * 3 * 12
    code, said = told(capsys, *again, "--n", "13")
    assert code == 2


def test_sets_of_one_name_are_not_merged(road, tmp_path, capsys):
    import shutil

    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        shutil.copy(road / "run.parquet", tmp_path / name / "x.parquet")
    twice = [f"{tmp_path}/a/x.parquet", f"{tmp_path}/b/x.parquet"]
    code, said = told(capsys, "report", *twice, "--out", f"{tmp_path}/page")
    assert code == 2
    assert "'x'" in said["error"]["fact"]
    code, said = told(capsys, "report", f"one={twice[0]}", f"two={twice[1]}", "--out", f"{tmp_path}/page")
    assert code == 0
    assert said["result"]["models"].keys() == {"one", "two"}


def test_held_out_rollouts_find_their_model_or_are_refused(road, tmp_path, capsys):
    run, held = f"{road}/run.parquet", f"{road}/held.parquet"
    code, said = told(capsys, "report", f"a={run}", f"b={run}", "--held-out", f"c={held}", "--out", f"{tmp_path}/p")
    assert code == 2
    assert "held-out rollouts of c" in said["error"]["fact"].lower()
    code, said = told(capsys, "report", run, "--held-out", held, "--out", f"{tmp_path}/p")
    assert code == 0
    assert said["result"]["models"]["run"]["held_out"] == 24 * 3 * 12
    page = (tmp_path / "p" / "index.html").read_text()
    assert "held-out prompts" in page
    assert said["result"]["models"]["run"]["whole"]["reasons"]["judge"] is None
    code, said = told(capsys, "report", run, "--labels", run, "--out", f"{tmp_path}/r")
    assert code == 0
    assert said["result"]["models"]["run"]["whole"]["reasons"]["judge"] > 0
    code, said = told(capsys, "report", run, "--labels", f"c={run}", f"d={run}", "--out", f"{tmp_path}/r")
    assert (code, said["error"]["fact"][:11]) == (2, "Labels of c")
    assert told(capsys, "report", run, "--out", f"{tmp_path}/q")[0] == 0
    assert "same prompts as the chain" in (tmp_path / "q" / "index.html").read_text()


def test_a_mistyped_phrase_file_is_no_phrase(road, tmp_path, capsys):
    code, said = told(capsys, "judge", f"{road}/run", "--harm", "harmful-phrasez.txt", "--out", f"{tmp_path}/x.parquet")
    assert code == 2
    assert "harmful-phrasez.txt" in said["error"]["fact"]
    (tmp_path / "words.txt").write_text("harm_bio0\nharm_bio1\n\n")
    words = ["judge", f"{road}/run", "--harm", f"{tmp_path}/words.txt", "harm_chem0", "--out", f"{tmp_path}/x.parquet"]
    code, said = told(capsys, *words)
    assert code == 0
    assert said["result"]["harm_phrases"] == 3
    code, said = told(capsys, "judge", f"{road}/run", "--out", f"{tmp_path}/x.parquet")
    assert code == 2
    assert "what counts as harm" in said["error"]["fact"]


def test_an_unfinished_run_is_told_downstream(road, tmp_path, capsys):
    import shutil

    from markovsafety.rollouts import sample

    prompts = [{"prompt": p["prompt"], "category": p["category"]} for p in ms.organism.prompts(n=6)]
    model, out = ms.organism.model_path("shallow"), tmp_path / "run"
    sample(model, prompts, n=8, max_tokens=96, shard_size=12, out=out, progress=False)
    shards = sorted(out.glob("*.parquet"))
    shards[-1].unlink()
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest.pop("finished")
    (out / "manifest.json").write_text(json.dumps(manifest))
    code, said = told(capsys, "judge", str(out), "--judge", "organism", "--out", f"{tmp_path}/x.parquet")
    assert code == 0
    assert "unfinished" in " ".join(said["warnings"])
    for words in (["count", f"{tmp_path}/x.parquet"], ["estimate", f"{tmp_path}/x.parquet"]):
        code, said = told(capsys, *words, "--out", f"{tmp_path}/x.npz")
        assert "unfinished" in " ".join(said["warnings"]), words
    shutil.rmtree(out)


def test_what_files_say_of_themselves_is_told_with_their_counts(road, tmp_path, capsys):
    """And a shard that is left out is named."""
    rolls = ms.read_rollouts(f"{road}/run.parquet")
    provenance = {"warnings": ["ids were made from text"], "note": "half of it"}
    ms.write_rollouts(rolls.replace(provenance=provenance), tmp_path / "run" / "part-00000.parquet")
    for source in (tmp_path / "run" / "part-00000.parquet", tmp_path / "run"):
        code, said = told(capsys, "count", str(source), "--out", f"{tmp_path}/x.npz")
        assert (code, said["warnings"]) == (0, [f"{source}: half of it", f"{source}: ids were made from text"])
    (tmp_path / "run" / "part-00001.parquet").write_bytes(b"PAR1")
    code, said = told(capsys, "count", f"{tmp_path}/run", "--skip-corrupt", "--out", f"{tmp_path}/x.npz")
    assert code == 0
    assert "part-00001.parquet (" in said["warnings"][0]


def test_counts_keep_their_states(road, capsys, tmp_path):
    words = ["estimate", f"{road}/counts.npz", "--out", f"{tmp_path}/x.npz"]
    assert told(capsys, *words, "--states", "kgram:2")[0] == 0
    code, said = told(capsys, *words, "--states", "kgram:3")
    assert code == 2
    assert "kgram:3" in said["error"]["fact"]


def test_classes_and_replay_from_the_command_line(road, capsys, tmp_path):
    words = ["sample", "organism:shallow", f"{road}/prompts.jsonl", "--out", f"{tmp_path}/mass", "--n", "2"]
    code, said = told(capsys, *words, "--max-tokens", "96", "--classes", "harm=harm_bio0,harm_bio1,108")
    assert code == 0
    assert "mass_harm" in ms.read_rollouts(tmp_path / "mass").columns
    code, said = told(capsys, *words, "--classes", "harm")
    assert code == 2
    rows = [json.dumps({"prompt_id": i, "category": "a", "tokens": [108, 4, 2], "prefill": 0}) for i in range(3)]
    (tmp_path / "log.jsonl").write_text("\n".join(rows))
    code, said = told(capsys, "sample", f"{tmp_path}/log.jsonl", "--engine", "replay", "--out", f"{tmp_path}/replayed")
    assert code == 0, said
    assert said["result"]["rollouts"] == 3


def test_sweep_passes_its_caveats_on(road, capsys):
    code, said = told(capsys, "sweep", f"{road}/chain.npz", "--harm", "0.01")
    assert code == 0
    assert said["result"]["start"]
    assert said["warnings"]


def test_bench_coverage_and_rare(capsys, tmp_path, monkeypatch):
    from markovsafety.bench import coverage, rare

    first = list(coverage.cells())
    monkeypatch.setattr(coverage, "cells", lambda: iter([first[0], first[3], first[-1]]))
    depths, none = list(coverage.profiles())[:1], list(coverage.flags())[:1]
    monkeypatch.setattr(coverage, "profiles", lambda: iter(depths))
    monkeypatch.setattr(coverage, "flags", lambda: iter(none))
    code, said = told(capsys, "bench", "coverage", "--quick", "--out", f"{tmp_path}/c.json")
    assert code == 0
    assert said["files"] == [f"{tmp_path}/c.json", f"{tmp_path}/c.md"]
    assert len(said["result"]["rows"]) == 3
    every = list(rare.cases())[-1:]
    monkeypatch.setattr(rare, "cases", lambda: iter(every))
    code, said = told(capsys, "bench", "rare", "--quick", "--out", f"{tmp_path}/r.json")
    assert code == 0
    assert (tmp_path / "r.md").exists()
