"""Axes of the plane: what they tell apart was planted, each is blind to the other question, and means remember."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
from steered import JUDGE, host

import markovsafety as ms
from markovsafety import InputError
from markovsafety.interventions import answer_axes, running_means, with_activations
from markovsafety.interventions.separation import auc
from markovsafety.organism import worlds
from markovsafety.outcomes import CODES

LEVEL = 3
KINDS = [(True, None), (True, "jailbreak"), (False, None), (False, "scare")]


@cache
def answers(half):
    """Judged answers to all four kinds of prompts, and whether each prompt is harmful."""
    asked = [p for h, m in KINDS for p in worlds.prompts(n=24, harmful=h, marker=m, half=half, seed=4)]
    rolls = ms.sample(
        host().engine, [{**p, "prompt_id": i} for i, p in enumerate(asked)], n=4, max_tokens=16, judge=JUDGE, seed=half
    )
    return rolls, np.array([p["harmful"] for p in asked])[rolls.prompt_id]


@cache
def axes():
    return answer_axes(host(), *answers(0), level=LEVEL)


def test_the_axes_tell_other_answers_apart():
    rolls, harmful = answers(1)
    refused = rolls.outcome == CODES["refusal"]
    assert 0.2 < refused.mean() < 0.8
    seen = with_activations(host(), rolls, axes())
    last = np.where(rolls.hit >= 0, rolls.hit, rolls.lengths - 1) + rolls.offsets[:-1]
    along = seen.columns["activation_refusal"][last]
    assert auc(along[refused], along[~refused]).value > 0.95
    start = running_means(seen).columns["activation_harm"][last]
    assert auc(start[harmful], start[~harmful]).value > 0.9


def test_each_axis_is_one_along_its_question_and_blind_to_the_other():
    """On the activations that they were made of, read again with the same seed."""
    from markovsafety.interventions.plane_axes import _read

    rolls, harmful = answers(0)
    x = _read(host(), rolls, LEVEL, np.random.default_rng(0), None)
    refused = rolls.outcome == CODES["refusal"]
    for name, expected in (("harm", (1.0, 0.0)), ("refusal", (0.0, 1.0))):
        level, axis = axes()[name]
        assert level == LEVEL
        m = np.array([[(x[(harmful == a) & (refused == b)] @ axis).mean() for b in (0, 1)] for a in (0, 1)])
        np.testing.assert_allclose(((m[1] - m[0]).mean(), (m[:, 1] - m[:, 0]).mean()), expected, atol=1e-4)  # float32


def test_running_means_are_means_of_what_was():
    rolls, _ = answers(1)
    seen = with_activations(host(), rolls, axes())
    averaged = running_means(seen)
    for name in ("harm", "refusal"):
        column = f"activation_{name}"
        for begin, end in list(zip(rolls.offsets[:-1], rolls.offsets[1:]))[:40]:
            mine = seen.columns[column][begin:end].astype(float)
            expected = [mine[: i + 1].mean() for i in range(len(mine))]
            np.testing.assert_allclose(averaged.columns[column][begin:end], expected, rtol=1e-4, atol=1e-4)
    assert np.array_equal(averaged.tokens, rolls.tokens)


def test_bad_input_says_what_is_missing():
    rolls, harmful = answers(0)
    kept = harmful | (rolls.outcome != CODES["refusal"])
    with pytest.raises(InputError, match="harmless prompts that are refused"):
        answer_axes(host(), rolls[kept], harmful[kept], level=LEVEL)
    with pytest.raises(InputError, match="truths stand beside"):
        answer_axes(host(), rolls, harmful[1:], level=LEVEL)
    with pytest.raises(InputError, match="no activations"):
        running_means(rolls)
