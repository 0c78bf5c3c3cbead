"""The main job: real samples, other seeds and other models give other findings, nothing in the report is stored."""

from __future__ import annotations

import json

import numpy as np
import pytest

import markovsafety as ms
from markovsafety import demo, organism

SMALL = demo.Plan(prompts=24, free=8, forced=4, held_prompts=12, held_forced=2)
PER_MODEL = 24 * (8 + 8 * 4) + 12 * 9 * 2


@pytest.fixture(scope="module")
def shipped(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo")
    return out, demo.run(out=out, seed=0, plan=SMALL, quiet=True)


def test_summary_has_every_model_category_and_depth_with_intervals(shipped):
    out, done = shipped
    summary = json.loads((out / "summary.json").read_text())
    assert summary == done.summary
    assert summary["rollouts"] == 4 * PER_MODEL
    assert summary["models"].keys() == set(organism.SHIPPED)
    for found in summary["models"].values():
        assert found["harm"].keys() == {"all", *organism.CATEGORIES}
        for curve in found["harm"].values():
            assert curve.keys() == {str(k) for k in demo.DEPTHS}
            for bound in curve.values():
                assert 0 <= bound["lower"] <= bound["value"] <= bound["upper"] <= 1
                assert bound["upper"] > bound["lower"]
                assert bound["reasons"]["judge"] is None  # not assessed is said, never zero


def test_numbers_of_the_report_are_those_of_the_rollouts_it_wrote(shipped):
    out, done = shipped
    for name in organism.SHIPPED:
        rolls = ms.read_rollouts(out / "rollouts" / name / "measured.parquet")
        held = ms.read_rollouts(out / "rollouts" / name / "held_out.parquet")
        assert len(rolls) + len(held) == PER_MODEL
        for k in demo.DEPTHS:
            share = (rolls.outcome[rolls.prefill == k] == 0).mean()
            assert done.summary["models"][name]["harm"]["all"][str(k)]["value"] == pytest.approx(share, abs=1e-12)
        chain = ms.read_chain(out / "rollouts" / name / "chain.npz")
        free = rolls[rolls.prefill == 0]
        assert ms.hitting_probability(chain, "harm").at_start.value == pytest.approx(
            (free.outcome == 0).mean(), abs=1e-9
        )


def test_the_page_is_whole_and_alone(shipped):
    out, done = shipped
    page = (out / "index.html").read_text()
    assert page.rstrip().endswith("</html>")
    assert 'src="http' not in page
    assert 'href="http' not in page
    for line in done.summary["finding"]:
        assert line.split(":")[0] in page


def test_another_seed_gives_other_counts_and_the_same_seed_the_same(shipped, tmp_path):
    base = organism.model_path("shallow")
    plan = demo.Plan(prompts=12, free=4, forced=2, held_prompts=6, held_forced=1)
    runs = [
        demo.run(models=base, out=tmp_path / str(i), seed=s, plan=plan, quiet=True) for i, s in enumerate((3, 3, 4))
    ]
    curves = [r.summary["models"]["shallow"]["harm"] for r in runs]
    assert curves[0] == curves[1]
    assert curves[0] != curves[2]


def test_another_model_gives_another_finding(tmp_path, shipped):
    """The shallow folder with the base's weights must show the base's curve: the finding follows the weights."""
    import shutil

    fake = tmp_path / "models" / "shallow"
    shutil.copytree(organism.model_path("base"), fake)
    done = demo.run(models=tmp_path / "models", out=tmp_path / "out", seed=0, plan=SMALL, quiet=True)
    unforced = {
        n: s["models"]["shallow"]["harm"]["all"]["0"]["value"]
        for n, s in (("fake", done.summary), ("real", shipped[1].summary))
    }
    # 192 rollouts of 24 prompts each: the planted difference of 0.43 is about ten standard errors
    assert unforced["fake"] > unforced["real"] + 0.2
    assert done.summary["finding"] != shipped[1].summary["finding"]


def test_a_model_of_another_language_is_refused(tmp_path):
    from tiny import word_tokenizer

    folder = tmp_path / "alien"
    import shutil

    shutil.copytree(organism.model_path("base"), folder)
    word_tokenizer(folder)
    with pytest.raises(ms.InputError):
        demo.run(models=folder, out=tmp_path / "out", plan=SMALL, quiet=True)
    assert not (tmp_path / "out" / "index.html").exists()


def test_shallow_prefill_curve_is_near_the_planted_truth(shipped):
    """Few rollouts here (96 per depth): mean absolute distance below 0.12; the acceptance test measures it sharply."""
    _, done = shipped
    shallow = done.summary["models"]["shallow"]["harm"]["all"]
    asked = organism.prompts(n=SMALL.prompts, seed=0)
    planted = organism.planted_profile("shallow", asked, demo.DEPTHS)["all"]
    assert np.mean([abs(shallow[str(k)]["value"] - planted[k]) for k in demo.DEPTHS]) < 0.12
