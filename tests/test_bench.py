"""The benchmark measures what it says; how fast anything is, is no test."""

from __future__ import annotations

import json

import pytest

from markovsafety.bench.rollouts import run
from markovsafety.errors import ModelError
from markovsafety.organism import model_path


def test_both_engines_sample_the_same_law_and_are_reported(tmp_path):
    """Mean lengths of 128 answers of up to 8 tokens, two independent samples: within 6 standard errors (1e-8)."""
    result = run(
        model_path("shallow"), rollouts=128, max_tokens=8, ours=(16,), theirs=(32,), turns=1, json=tmp_path / "b.json"
    )
    assert json.loads((tmp_path / "b.json").read_text()) == json.loads(json.dumps(result))
    assert set(result["jax"]) == {"16", "64"}
    assert set(result["generate"]) == {"32", "64"}
    best = [max(max(turns) for turns in result[name].values()) for name in ("jax", "generate")]
    assert result["ratio_best"] == pytest.approx(best[0] / best[1], rel=1e-12)
    assert result["ratio_64"] == pytest.approx(result["jax"]["64"][0] / result["generate"]["64"][0], rel=1e-12)
    lengths = result["tokens_per_rollout"]
    assert 1 < lengths["jax"] <= 8
    # an answer's length has a standard deviation of at most 3.5; the mean of 128 and of two runs of 128 are compared
    assert abs(lengths["jax"] - lengths["generate"]) < 6 * 3.5 * (1 / 128 + 1 / 256) ** 0.5
    assert f"{result['ratio_64']:.1f}" in result["line"]
    assert all(name in result["line"] for name in ("jax", "transformers", "torch"))


def test_a_model_that_is_not_there(tmp_path):
    with pytest.raises(ModelError, match=r"tokenizer.json is missing"):
        run(tmp_path)
