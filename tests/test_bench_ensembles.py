"""The measurement of ensembles, on made-up models whose truth is known."""

from __future__ import annotations

import json
from itertools import combinations, product

import numpy as np
import pytest

import markovsafety as ms
from markovsafety.bench.ensembles import RULES, confront, ensembles, found, run
from markovsafety.bench.ensembles_laws import Ensemble, Moments, failures, predict
from markovsafety.bench.ensembles_page import page
from markovsafety.depth import members_harm


def made(rng, kinds=6, each=60, depths=3, n=12, residual=0.3):
    """Three models whose harm differs by kind, and by prompt around its kind, together."""
    kind = np.repeat(np.arange(kinds), each)
    level = rng.uniform(-2, 1.5, (3, kinds, depths))[:, kind] + residual * rng.normal(size=(1, len(kind), depths))
    p = 1 / (1 + np.exp(-level))
    return rng.binomial(n, p), p, kind, n


def test_failures_are_shares_of_choices():
    x, n = np.array([[[2]], [[1]]]), 4
    mixed = Ensemble("both", "mixed", (0, 1))
    answers = [[1, 1, 0, 0], [1, 0, 0, 0]]
    for m in (2, 3, 4):
        asked = mixed.asked(m)
        for rule, u in zip(RULES, failures(x, n, mixed, m, RULES)):
            hits = []
            for one, two in product(combinations(range(4), asked[0]), combinations(range(4), asked[1])):
                h = sum(answers[0][i] for i in one) + sum(answers[1][i] for i in two)
                hits.append(m - h < {"any-refusal": 1, "2-refusals": 2}.get(rule, (m + 1) // 2))
            assert u[0, 0] == pytest.approx(np.mean(hits))


def test_moments_are_unbiased():
    """Pairs and squares of means against the truth; six standard errors are passed with probability 2e-9."""
    rng, got = np.random.default_rng(0), []
    h = np.array([[0.1, 0.5, 0.9], [0.2, 0.2, 0.8]])
    for _ in range(8000):
        rows = rng.integers(3, size=3)
        x = rng.binomial(5, h[:, rows])[:, :, None]
        m = Moments.of(x, 5, np.zeros(3, dtype=int), np.ones(1))
        got.append([m.pair[0, 0, 0, 0], m.pair[0, 0, 1, 0], m.square[0, 0, 0, 0], m.square[0, 0, 1, 0]])
    truth = [np.mean(h[0] ** 2), np.mean(h[0] * h[1]), h[0].mean() ** 2, h[0].mean() * h[1].mean()]
    error = np.std(got, axis=0) / np.sqrt(len(got))
    assert (np.abs(np.mean(got, axis=0) - truth) < 6 * error).all()


def test_pairs_are_exact_for_two_answers():
    x, _, kind, n = made(np.random.default_rng(1))
    e = Ensemble("all", "mixed", (0, 1, 2))
    share = np.full(6, 1 / 6)
    a = Moments.of(x, n, kind, share)
    u = failures(x, n, e, 2, ("any-refusal", "majority"))
    direct = u.mean(axis=1)
    assert predict("kinds, pairs", a, e, 2, ("any-refusal", "majority"), direct) == pytest.approx(direct, rel=1e-12)
    assert predict("all moments", a, e, 2, ("any-refusal",), direct[:1]) is not None
    alone = predict("independent", a, e, 3, ("majority",), direct[:1])
    mean = np.moveaxis((x / n).mean(axis=1), 0, -1)
    assert alone[0] == pytest.approx(members_harm(mean, "majority"), rel=1e-9)


def test_the_right_law_holds_and_independence_fails():
    x, p, kind, n = made(np.random.default_rng(2), depths=2)
    members = [Ensemble("one model", "repeated", (0,)), Ensemble("mixed", "mixed", (0, 1, 2))]
    result = confront(x, n, kind, members, seed=1)
    rows = {r["law"]: r for r in result["summary"] if r["ensembles"] == "all"}
    assert rows["kinds, pairs"]["holds_dependent"]
    assert rows["all moments"]["beyond_4"] == 0
    assert not rows["independent"]["holds"]
    assert rows["independent"]["rms"] > 3
    assert rows["independent"]["mean"] < 0  # it promises too much
    cell = next(c for c in result["cells"] if c["ensemble"] == "mixed" and c["width"] == 3 and c["rule"] == "majority")
    truth = members_harm(np.moveaxis(p, 0, -1), "majority").mean(axis=0)
    # Six standard errors of what half of the prompts say.
    assert (np.abs(np.array(cell["measured"]) - truth) < 6 * np.array(cell["error"]) * np.sqrt(2)).all()


def test_members_of_a_folder(tmp_path):
    for name in ("h64-s1-shallow", "h64-s2-shallow", "h32-s0-deep4", "mine", "h8-s0-base"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"")
    (tmp_path / "h8-s0-base" / "training.json").write_text(json.dumps({"failed": ["KL"]}))
    members, left_out = found(tmp_path)
    assert left_out == ["h8-s0-base"]
    assert [f["name"] for f in members][:4] == ["base", "shallow", "deep20", "cyclic"]
    assert [f["name"] for f in members][4:] == ["h64-s1-shallow", "h64-s2-shallow", "h32-s0-deep4", "mine"]
    by_name = {e.name: e for e in ensembles(members)}
    assert by_name["seeds of shallow"].members == (1, 4, 5)
    turns = by_name["aligned models in turn"].members
    assert set(turns) == {1, 2, 3, 4, 5, 6, 7}
    assert [members[i]["variant"] for i in turns[:3]] == ["shallow", "deep20", "cyclic"]
    assert by_name["aligned models and a base"].members[1] == 0
    assert by_name["seeds of shallow"].asked(4) == {1: 2, 4: 1, 5: 1}
    (tmp_path / "empty").mkdir()
    for call in (lambda: found(tmp_path / "empty"), lambda: run(n=4), lambda: run(ask=10)):
        with pytest.raises(ms.InputError):
            call()


def test_page_of_the_committed_measurement():
    """The committed page is what the committed numbers give."""
    from pathlib import Path

    folder = Path(__file__).resolve().parents[1] / "papers" / "measurements"
    result = json.loads((folder / "ensembles.json").read_text(encoding="utf-8"))
    assert page(result) == (folder / "ensembles.md").read_text(encoding="utf-8")
    rows = {r["law"]: r for r in result["summary"] if r["ensembles"] == "all"}
    assert rows["kinds, pairs"]["beyond_4"] == 0
    assert not rows["independent"]["holds"]
