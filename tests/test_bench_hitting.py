"""The hitting benchmark: its chains are what they say, its references right, its verdicts honest; no word on speed."""

from __future__ import annotations

import dataclasses
import json
import sys
from fractions import Fraction

import numpy as np
import pytest

import markovsafety as ms
from markovsafety.bench import families, hitting, references
from markovsafety.bench.catalogue import cases, chosen, find
from markovsafety.bench.goals import Goal, verdicts
from markovsafety.bench.measure import Contender, Found, judge, measured
from markovsafety.bench.workloads import corpus
from markovsafety.cli import main
from markovsafety.errors import InputError

RANDOM = [
    families.layered(5, 40, 4),
    families.kgram(8, 2, 4, 1e-6),
    families.kgram(5, 3, 3, 1e-2),
    families.giant(300, 6),
    families.ruin(50),
    families.grid(9),
]
IDS = [p.name for p in RANDOM]


@pytest.mark.parametrize("problem", RANDOM, ids=IDS)
def test_rows_sum_to_one_exactly_and_have_no_diagonal(problem):
    total = np.asarray(problem.Q.sum(axis=1)).ravel() + problem.harm + problem.safe
    assert (total == 1.0).all()
    grains = np.concatenate([problem.Q.data, problem.harm, problem.safe]) * 2.0**50
    assert (grains == np.round(grains)).all()  # so that the sums above are exact
    assert (problem.Q.diagonal() == 0).all()
    assert (problem.Q.data > 0).all()
    assert (problem.harm >= 0).all()
    assert (problem.safe >= 0).all()
    assert problem.Q.has_sorted_indices
    assert (problem.Q.indices.dtype, problem.Q.indptr.dtype) == (np.int32, np.int32)
    chain = problem.chain()
    assert np.array_equal(chain.P.toarray()[:-2, :-2], problem.Q.toarray())


def test_seeds_decide():
    assert np.array_equal(families.giant(50, seed=3).Q.data, families.giant(50, seed=3).Q.data)
    assert not np.array_equal(families.giant(50, seed=3).Q.indices, families.giant(50, seed=4).Q.indices)


def test_layers_and_their_unrolled_chain_are_the_same_problem():
    problem = families.layered(5, 40, 4)
    unrolled = ms.hitting_probability(problem.chain(), "harm").value[:-2]
    layers = ms.hitting_probability(problem.layered_chain(), "harm").value[:-1, :-2]
    assert np.allclose(layers.ravel(), unrolled, rtol=1e-14, atol=0)
    assert np.allclose(references.back_substitution(problem).astype(float), unrolled, rtol=1e-14, atol=0)


def test_leak_is_its_name():
    problem = families.kgram(8, 2, 4, 1e-3)
    assert (problem.harm + problem.safe).mean() == pytest.approx(1e-3, rel=0.3)
    for rate in (2e-3, 2e-15):
        counts = families.leak(rate)
        made = counts.probabilities()
        assert (made.harm + made.safe).mean() == pytest.approx(rate, rel=0.3)
        assert int((np.asarray(counts.Q.sum(axis=1)).ravel() + counts.harm + counts.safe).max()) < 2**53


def test_closed_forms():
    n = 60
    assert references.relative_errors(np.arange(1, n + 1) / (n + 1), families.ruin_harm(n)) < 1e-15
    assert np.allclose(references.refined(families.ruin(n)).astype(float), families.ruin_harm(n).astype(float), 1e-15)
    for arm in (3, 20):
        h, steps = references.rationals(families.haddad(arm))
        assert h == families.haddad_harm(arm)
        assert steps == families.haddad_time(arm)
        assert steps[arm - 1] == 3 * 2 ** (arm - 1) - 2
    square = references.refined(families.grid(9)).reshape(9, 9)
    turned = sum(np.rot90(square, k) for k in range(4))
    assert float(np.abs(turned - 1).max()) < 1e-17
    assert float(abs(square[4, 4] - 0.25)) < 1e-17


def test_rationals_are_those_of_the_exact_method():
    problem = families.leak(2e-7, n=7, seed=5)
    h, steps = references.rationals(problem)
    assert ms.hitting_probability(problem.chain(), "harm", method="exact").exact[:-2] == h
    assert references.relative_errors(ms.hitting_time(problem.chain()).value[:-2], steps) < 1e-14


@pytest.mark.parametrize("start", ["superlu", "bicgstab"])
def test_refinement_reaches_the_rationals(start):
    problem = families.leak(2e-5, n=12, seed=1)
    h, _ = references.rationals(problem)
    found = references.refined(problem, start)
    # dividing counts by their totals rounds every probability once; the difference form keeps that relative
    assert references.relative_errors(found.astype(float), h) < 1e-15


def test_adjoint_is_a_row_of_the_inverse():
    problem = families.kgram(5, 2, 3, 1e-2)
    inverse = np.linalg.inv(np.eye(problem.n) - problem.Q.toarray())
    assert np.allclose(references.adjoint(problem).astype(float), inverse[0], rtol=1e-10)


@pytest.mark.parametrize("no_refusal", [False, True])
def test_posterior_samples_are_chains_on_the_same_pattern(no_refusal):
    problem = families.layered(6, 20, 4) if no_refusal else families.kgram(6, 2, 4, 1e-2)
    if no_refusal:  # what rounding leaves would be negative here and there
        problem = dataclasses.replace(problem, harm=problem.harm + problem.safe, safe=np.zeros(problem.n))
    batch = families.posterior(problem, 5)
    for b in range(5):
        one = batch.sample(b)
        stored = np.concatenate([P.data for P in (one.layered_chain() if problem.widths else one.chain()).layers])
        assert np.array_equal(batch.entries()[b], stored)
        assert (np.asarray(one.Q.sum(axis=1)).ravel() + one.harm + one.safe == 1.0).all()
        assert (one.Q.data >= 0).all()
        assert (one.safe >= 0).all()
        assert np.allclose(one.harm + one.safe, problem.harm + problem.safe, rtol=1e-9)
    assert not np.array_equal(batch.data[:, 0], batch.data[:, 1])


def test_corpus_has_zipfian_tokens():
    text = corpus(20_000, 16, 1)
    share = np.sort(np.bincount(text.tokens, minlength=16))[::-1] / 20_000
    expected = 1 / np.arange(1, 17) / (1 / np.arange(1, 17)).sum()
    assert np.abs(share - expected).max() < 0.03  # six standard errors


def test_a_true_zero_must_be_zero():
    exact = np.array([0, 1], dtype=np.longdouble)
    assert references.relative_errors(np.array([0.0, 1.0]), exact) == 0
    assert references.relative_errors(np.array([1e-300, 1.0]), exact) == np.inf
    assert references.relative_errors(np.array([0.0, 1.0]), [Fraction(0), Fraction(1)]) == 0
    assert references.relative_errors(np.array([1e-300, 1.0]), [Fraction(0), Fraction(1)]) == np.inf
    assert references.relative_errors(np.array([np.nan, 1.0]), exact) == np.inf


def test_wrong_answers_are_seen():
    exact = [Fraction(1, 3), Fraction(1, 2)]
    value = np.array([1 / 3, 0.5])
    good = judge(Found(value, value - 1e-15, value + 1e-15), exact)
    assert good["inside"]
    assert good["error"] < 1e-16
    assert good["relative_width"] == pytest.approx(6e-15, rel=0.2)
    assert judge(Found(value, value, value), exact)["inside"] is False  # 1/3 is no double
    assert judge(Found(value, value - 1e-15, value + 1e-15), np.array([0.4, 0.5], np.longdouble))["inside"] is False
    assert judge(Found(np.array([-1e-3, 0.5])), exact)["negative"] == 1
    assert judge(Found(np.array([np.inf, 0.5])), exact)["error"] == np.inf
    with pytest.raises(ValueError, match="3 entries"):
        judge(Found(np.ones(3)), exact)


def test_verdicts_say_met_missed_and_what_a_stopped_peer_proves():
    rows = {"us": {"median": 1.0, "error": 1e-16}, "peer": {"median": 3.0, "error": 1e-12}, "slow": {"limit": 20.0}}
    goals = [
        Goal("speed", "us", "peer", least=2),
        Goal("speed", "us", "peer", least=4),
        Goal("speed", "us", "slow", least=10),
        Goal("speed", "us", "slow", least=50),
        Goal("speed", "us", "absent", least=1),
        Goal("accuracy", "us", "peer", least=1000),
        Goal("share", "us", "peer", most=0.3),
        Goal("special", "something else", least=1),
    ]
    found = verdicts(tuple(goals), rows, {"special": 2.0})
    words = ["met", "missed", "met", "not measured", "not measured", "met", "missed", "met"]
    assert [g["verdict"] for g in found] == words
    assert [g["above"] for g in found[2:4]] == [True, True]
    assert found[0]["value"] == 3.0


def test_contenders_that_fail_warn_or_are_missing_get_their_rows():
    def warn(x):
        np.log(np.zeros(1))
        return x

    def fail(x):
        raise ArithmeticError("no convergence\nlong story")

    same = lambda x: x  # noqa: E731
    read = lambda raw, problem: Found(raw)  # noqa: E731
    contenders = [
        Contender("fine", same, same, read),
        Contender("warns", same, warn, read),
        Contender("fails", same, fail, read),
        Contender("absent", same, same, read, needs="no_such_package"),
    ]
    begun = []
    rows = {r["who"]: r for r in measured(contenders, np.ones(2), {"h": np.ones(2)}, 2, begun.append)}
    assert begun == ["fine", "warns", "fails"]
    assert rows["fine"]["error"] == 0
    assert len(rows["fine"]["seconds"]) >= 2
    assert "divide by zero" in rows["warns"]["note"]
    assert rows["fails"]["status"] == "failed: ArithmeticError: no convergence"
    assert rows["absent"]["status"] == "not installed"


def test_memory_is_that_of_the_solver():
    contender = Contender(
        "greedy",
        lambda x: x,
        lambda x: np.ones(12_000_000).sum() * x,
        lambda raw, problem: Found(raw),
        memory=lambda problem, raw: (0, 96_000_000),
    )
    row = next(measured([contender], np.ones(1), {"h": None}, 1))
    assert row["memory"] > 80e6
    assert row["copies"] == row["memory"] / 96e6


SMALL = ["layered", "kgram-1e-06", "haddad-100", "ruin", "gradient", "batch-layered", "count", "memory-layered"]


def test_small_sizes_are_right(tmp_path):
    """Every kind of case once; ours must be exact and enclosed, peers only have to be there."""
    file = tmp_path / "bench.json"
    result = hitting.run(case=SMALL, quick=True, turns=1, json=file)
    assert result["faults"] == []
    kept = json.loads(file.read_text())
    assert list(kept["cases"]) == [name for name in cases() if name in {c.name for c in chosen(SMALL)}]
    assert kept["date"]
    assert kept["versions"]["numpy"] == np.__version__
    for name, entry in kept["cases"].items():
        rows = {row["who"]: row for row in entry["rows"]}
        assert any(who.startswith("markovsafety") for who in rows), name
        assert all(goal["verdict"] == "met" for goal in entry["goals"]), (name, entry["goals"])
        assert all(row["status"] in ("ok", "not installed") for row in rows.values()), (name, rows)
    wrong = {r["who"]: r for r in kept["cases"]["haddad-100"]["rows"]}["scipy gmres (defaults)"]
    assert wrong["relative"] > 0.9  # the table keeps what peers say
    text = (tmp_path / "bench.md").read_text()
    assert all(entry["title"] in text for entry in kept["cases"].values())
    assert "missed" in result["line"]


def test_cases_for_a_gpu_are_right_on_any_device():
    assert all(name.startswith("gpu-") for name in (c.name for c in chosen([], gpu=True)))
    assert not any(c.gpu for c in chosen([]))
    result = hitting.run(case=["gpu-batch-layered", "gpu-layered"], quick=True, gpu=True, turns=1)
    assert result["faults"] == []
    numbers = result["cases"]["gpu-batch-layered"]["numbers"]
    assert numbers["copy"] > 0
    rows = [row for entry in result["cases"].values() for row in entry["rows"]]
    assert all(row["status"] == "ok" and row["inside"] for row in rows)


def test_a_run_goes_on_and_does_not_mix_settings(tmp_path, capsys):
    file = tmp_path / "bench.json"
    hitting.run(case=["ruin"], quick=True, turns=1, json=file)
    first = json.loads(file.read_text())["cases"]["ruin"]
    hitting.run(case=["grid"], quick=True, turns=1, json=file)
    both = json.loads(file.read_text())["cases"]
    assert list(both) == ["grid", "ruin"]
    assert both["ruin"] == first
    for bad in ({"turns": 2}, {"quick": False}):
        with pytest.raises(InputError, match="something else"):
            hitting.run(**{"case": ["ruin"], "quick": True, "turns": 1, "json": file, **bad})
    file.write_text("{")
    with pytest.raises(InputError, match="something else"):
        hitting.run(case=["ruin"], quick=True, turns=1, json=file)
    with pytest.raises(InputError, match="no case 'nonsense'"):
        hitting.run(case=["nonsense"])


def test_wrong_answers_of_ours_are_faults():
    row = {"who": "markovsafety", "status": "ok", "inside": False}
    goal = {
        "goal": "markovsafety: largest relative error, entrywise",
        "bound": "<= 1e-15",
        "value": 1,
        "verdict": "missed",
    }
    slow = {"goal": "markovsafety: times as fast as x", "bound": ">= 2", "value": 1, "verdict": "missed"}
    faults = hitting._faults("case", {"rows": [row, {"who": "x", "status": "> 20 s"}], "goals": [goal, slow]})
    assert len(faults) == 2
    assert "misses the reference" in faults[0]
    failed = {"who": "markovsafety", "status": "failed: UntrustedError"}
    assert hitting._faults("case", {"rows": [failed], "goals": []}) == ["case: markovsafety: failed: UntrustedError"]


def test_workers_measure_the_same(tmp_path):
    rows, numbers = hitting._in_workers(find("layered"), tmp_path, 1, 30.0, False, quick=True)
    assert {row["who"] for row in rows} == {c.name for c in find("layered").contenders}
    ours = [row for row in rows if row["who"].startswith("markovsafety")]
    assert all(row["status"] == "ok" and row["relative"] <= 1e-15 for row in ours)
    assert numbers["triad"] > 0


@pytest.mark.parametrize(
    ("code", "status"),
    [
        ('print(\'{"begin": "x"}\', flush=True); input()', "> 0.01 s"),
        ("print('{\"begin\": \"x\"}', flush=True); raise SystemExit('boom')", "failed: ended with code 1: boom"),
        ("input()", "> 0.01 s before solving"),
    ],
)
def test_a_worker_that_hangs_or_dies_is_stopped_and_told(monkeypatch, tmp_path, code, status):
    hang = "import threading; threading.Event().wait(60)"
    code = code.replace("input()", hang)
    monkeypatch.setattr(hitting, "WORKER", [sys.executable, "-c", code])
    patience = 0.01 if status.startswith(">") else 30.0
    monkeypatch.setattr(hitting, "LOADING", 0.0 if "before" in status else 30.0)
    *_, last = hitting._messages({}, hitting.environment(tmp_path), patience)
    assert last["stopped"]["status"] == status
    assert ("limit" in last["stopped"]) == (status == "> 0.01 s")


def test_command_line(tmp_path, capsys):
    file = tmp_path / "b.json"
    assert main(["bench", "hitting", "--quick", "--case", "ruin", "--turns", "1", "--out", str(file), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["files"] == [str(file), str(file.with_suffix(".md"))]
    assert told["result"]["cases"]["ruin"]["rows"][0]["who"] == "markovsafety"
    assert main(["bench", "hitting", "--quick", "--case", "no"]) == 2
    assert "no case 'no'" in capsys.readouterr().err
    assert main(["bench", "hitting", "--gpu", "--device", "cpu"]) == 2
    assert main(["bench", "sweep", "--device", "gpu"]) == 2
    assert "bench sweep takes no --device" in capsys.readouterr().err


@pytest.mark.parametrize("wrong", [{"turns": 0}, {"limit": 0.0}, {"limit": -1.0}, {"limit": float("nan")}], ids=str)
def test_rounds_and_seconds_are_positive(wrong):
    with pytest.raises(InputError, match="turns is "):
        hitting.run(case=["leak-0.002"], quick=True, **wrong)


def test_a_place_that_cannot_be_written_is_known_before_anything_is_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(hitting, "_in_process", lambda *_: pytest.fail("measured"))
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="cannot write"):
        hitting.run(case=["leak-0.002"], quick=True, json=tmp_path / "file" / "out.json")
