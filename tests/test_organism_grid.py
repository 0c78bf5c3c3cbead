"""The grid of organisms: what it is made of, what it skips and keeps; and what a model's rows can do to harm."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest

import markovsafety as ms
from markovsafety import organism
from markovsafety.organism.exact import grammar_of, planted
from markovsafety.organism.language import IDS, WORDS
from markovsafety.organism.train_sizes import Job, _job, jobs, train_grid


def test_every_depth_once_and_the_extremes_with_every_seed():
    grid = jobs((8, 32), (0, 4, 20), seeds=3)
    assert [(j.hidden, j.seed, j.depths) for j in grid] == [
        *[(32, s, (0, 4, 20) if s == 0 else (0, 20)) for s in range(3)],
        *[(8, s, (0, 4, 20) if s == 0 else (0, 20)) for s in range(3)],
    ]
    assert jobs((16,), (4,), 2) == [Job(16, 0, (4,)), Job(16, 1, (4,))]


@pytest.mark.parametrize("bad", [{"hidden": ()}, {"hidden": (12,)}, {"depths": (-1,)}, {"depths": ()}, {"seeds": 0}])
def test_no_such_grid(bad):
    with pytest.raises(ms.InputError, match="No grid of widths"):
        jobs(**bad)


@pytest.fixture
def trained(monkeypatch):
    """A trainer that only writes reports: width 8 fails, width 16 meets its checks."""
    from markovsafety.organism import training

    calls = []

    def train(variant, out, *, base, seed, hidden, rounds, progress):
        calls.append((out.name, base and base.name))
        report = {"kl": 0.1 / hidden, "judge": 1.0, "seconds": 1.0, "failed": ["KL too large"] if hidden == 8 else []}
        out.mkdir()
        (out / "training.json").write_text(json.dumps(report))
        if report["failed"]:
            raise ms.UntrustedError("no", cause="KL", next="more", partial=report)
        return report

    monkeypatch.setattr(training, "train", train)
    return calls


def test_a_base_that_failed_is_aligned_to_nothing(tmp_path, trained):
    rows = _job(Job(8, 1, (0, 4)), str(tmp_path), False)
    assert trained == [("h8-s1-base", None)]
    assert [r["variant"] for r in rows] == ["base", "shallow", "deep4"]
    assert rows[1] == {
        "hidden": 8,
        "seed": 1,
        "variant": "shallow",
        "folder": None,
        "failed": ["its base: KL too large"],
    }


def test_what_is_trained_is_kept(tmp_path, trained, capsys):
    first = _job(Job(16, 0, (0, 4)), str(tmp_path), True)
    assert trained == [("h16-s0-base", None), ("h16-s0-shallow", "h16-s0-base"), ("h16-s0-deep4", "h16-s0-base")]
    assert "h16-s0-deep4: KL 0.0063, judge 1.000, 1 s, meets its checks" in capsys.readouterr().err
    assert _job(Job(16, 0, (0, 4)), str(tmp_path), True) == first
    assert len(trained) == 3
    assert capsys.readouterr().err == ""


def test_a_finished_grid_is_read_by_its_processes(tmp_path):
    for name in ("base", "shallow"):
        folder = tmp_path / f"h16-s0-{name}"
        folder.mkdir()
        (folder / "training.json").write_text(json.dumps({"kl": 0.001, "failed": []}))
    rows = train_grid(tmp_path, hidden=(16,), depths=(0,), seeds=1, workers=1)
    assert [(r["variant"], r["kl"]) for r in rows] == [("base", 0.001), ("shallow", 0.001)]


def spoken(variant):
    """A model whose next-token law is the grammar's of a variant; words outside the grammar have logit -1e9."""
    import torch

    from markovsafety.organism.language import PAD, parse_prompt

    def model(input_ids):
        out = torch.full((*input_ids.shape, len(WORDS)), -1e9, dtype=torch.float64)
        for row, ids in enumerate(input_ids.tolist()):
            ids = ids[: ids.index(PAD)] if PAD in ids else ids
            at = ids.index(IDS["<assistant>"])
            prompt = parse_prompt(
                " ".join(WORDS[i] for i in ids[ids.index(IDS["<user>"]) + 1 : ids.index(IDS["<end>"])])
            )
            rules = grammar_of(variant, prompt.context)
            for t, state in enumerate(rules.walk([WORDS[i] for i in ids[at + 1 :]])):
                if state is not None and state.kind not in ("HARM", "REFUSED", "BENIGN"):
                    for word, p in rules.next_law(state).items():
                        out[row, at + t, IDS[word]] = np.log(p)
        return SimpleNamespace(logits=out)

    return model


@pytest.mark.parametrize("k", [0, 2])
def test_rows_account_for_the_change_of_harm(k):
    """E_Q of the rows' effects is h_Q - h_P, and the sum of total variations is never smaller."""
    from markovsafety.organism.train_distance import distance, planted_answers

    asked = organism.prompts(n=6, seed=4)
    prompts = [organism.parse_prompt(item["prompt"]) for item in asked]
    n = 150
    who = [p for p in prompts for _ in range(n)]

    def answers(variant):
        return [
            a
            for i, (p, x) in enumerate(zip(prompts, asked))
            for a in planted_answers(variant, p, k, x["prefix"], n, f"{i}")
        ]

    def mean_harm(variant):
        return np.mean([planted(variant, p, [WORDS[i] for i in x["prefix"][:k]]) for p, x in zip(prompts, asked)])

    change = mean_harm("base") - mean_harm("shallow")
    own = distance(spoken("base"), "shallow", who, answers("base"), k)
    other = distance(spoken("base"), "shallow", who, answers("shallow"), k)
    # six standard errors: 2e-9
    error = own.shift.std() / np.sqrt(len(who))
    assert own.shift.mean() == pytest.approx(change, abs=6 * error + 1e-9)
    assert own.left.max() < 1e-9
    assert (np.abs(own.shift) <= own.effect + 1e-12).all()
    assert (own.effect <= own.tv + 1e-12).all()
    for tv in (own.tv, other.tv):
        assert tv.mean() >= abs(change) - 6 * tv.std() / np.sqrt(len(who))
    if k == 0:
        assert change > 0.3  # so that a distance that is always 0 fails
    same = distance(spoken("shallow"), "shallow", who[:40], answers("shallow")[:40], k)
    assert max(same.tv.max(), same.effect.max(), same.left.max()) < 1e-9
