"""Augmentation on token ids: what a row is, the law of the offsets, short answers, weights, and the organism's rows."""

from __future__ import annotations

import math
import random
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import markovsafety as ms
from markovsafety.interventions import Row, Triplet, mixed, recovery, rotations, token_share
from markovsafety.interventions.augment import draw_until_fits, fitting_offsets, recover

quick = settings(deadline=None, derandomize=True, max_examples=40)
ids = lambda least: st.lists(st.integers(0, 99), min_size=least, max_size=12)  # noqa: E731
triplets = st.lists(st.builds(Triplet, ids(0), ids(2), ids(1)), min_size=1, max_size=5)
LONG = [Triplet([1, 2], list(range(100, 140)), [7, 8, 9]), Triplet([3], list(range(200, 230)), [5])]


@quick
@given(triplets, st.integers(1, 15), st.integers(0, 99))
def test_a_row_is_prompt_prefix_refusal(some, depth, seed):
    """Every row splits into the prompt, k tokens of its answer and its refusal, which alone carries loss."""
    for short in ("redraw", "clip"):
        for row in recovery(some, depth, n=20, short=short, seed=seed):
            k = row.offset
            assert 0 <= k <= depth
            fits = [
                t for t in some if row.tokens == [*t.prompt, *t.answer[:k], *t.refusal] and row.answer == len(t.prompt)
            ]
            assert any(k < len(t.answer) and row.loss_tokens == len(t.refusal) for t in fits)
    rows = rotations(some, depth)
    told = [(i, k) for i, t in enumerate(some) for k in range(1, min(depth, len(t.answer) - 1) + 1)]
    assert [r.offset for r in rows] == [k for _, k in told]
    for (i, k), row in zip(told, rows):
        assert row == recover(*some[i], k)


def test_offsets_follow_the_published_law():
    """k = 0 half of the time, else uniform on 1 .. 20 (all answers are longer). Hoeffding, each check 1e-8."""
    n = 40_000
    seen = Counter(r.offset for r in recovery(LONG, 20, n=n, seed=3))
    room = math.sqrt(math.log(2 / 1e-8) / (2 * n))
    assert set(seen) == set(range(21))
    assert abs(seen[0] / n - 0.5) < room
    assert all(abs(seen[k] / n - 0.025) < room for k in range(1, 21))
    assert max(seen[k] for k in range(1, 21)) < 1.3 * min(seen[k] for k in range(1, 21))


@pytest.mark.parametrize(
    ("short", "law"),
    [
        # answers of 2 and 5 tokens, k uniform on 1 .. 4: redraw weighs k by the share of answers longer than k ...
        ("redraw", [2 / 5, 1 / 5, 1 / 5, 1 / 5]),
        # ... clip gives each answer its own offsets: half of the rows have k = 1 already
        ("clip", [1 / 2 + 1 / 8, 1 / 8, 1 / 8, 1 / 8]),
    ],
)
def test_rules_for_short_answers(short, law):
    some = [Triplet([1], [10, 11], [7]), Triplet([2], [20, 21, 22, 23, 24], [8])]
    n = 40_000
    seen = Counter(r.offset for r in recovery(some, 4, n=n, plain=0.0, short=short, seed=1))
    room = math.sqrt(math.log(2 / 1e-8) / (2 * n))
    assert [abs(seen[k + 1] / n - p) < room for k, p in enumerate(law)] == [True] * 4
    with pytest.raises(ms.InputError, match="shortest answer has 2 tokens"):
        recovery(some, 4, short="refuse")
    assert recovery(some, 1, short="refuse", plain=0.0)[0].tokens == [1, 10, 7]


def test_seeds_and_order():
    rows = recovery(LONG, 20, n=50, seed=5)
    assert rows == recovery(LONG, 20, n=50, seed=5) != recovery(LONG, 20, n=50, seed=6)
    assert [r.tokens[0] for r in recovery(LONG * 3, 20, short="clip")] == [1, 3] * 3
    assert sorted(rotations(LONG, 9, seed=2)) == sorted(rotations(LONG, 9))
    assert rotations(LONG, 9, seed=2) != rotations(LONG, 9)
    assert [r.offset for r in rotations(LONG[:1], 3, plain=True)] == [0, 1, 2, 3]


def test_rotations_have_the_expectation_of_redrawn_recovery():
    """Rows of whole orbits, cut by nothing, are the law of recovery without k = 0 when triplets are many: exactly."""
    some = [Triplet([i], list(range(n)), [50]) for i, n in enumerate((2, 3, 6, 9))]
    orbit = Counter((r.tokens[0], r.offset) for r in rotations(some, 5))
    # redraw: triplet and k uniform given that they fit, so every pair that fits has the same probability
    assert set(orbit.values()) == {1}
    n = 40_000
    drawn = Counter((r.tokens[0], r.offset) for r in recovery(some, 5, n=n, plain=0.0))
    assert set(drawn) == set(orbit)
    room = math.sqrt(math.log(2 / 1e-8) / (2 * n))
    assert all(abs(c / n - 1 / len(orbit)) < room for c in drawn.values())


def test_weights_make_rows_and_orbits_equal():
    total = lambda rows: [r.weight * r.loss_tokens for r in rows]  # noqa: E731
    assert total(rotations(LONG, 5)) == [3.0] * 5 + [1.0] * 5
    assert total(rotations(LONG, 5, weight="row")) == pytest.approx([1.0] * 10)
    assert total(rotations([*LONG, Triplet([], [1, 2], [3])], 5, weight="orbit")) == pytest.approx([0.2] * 10 + [1.0])
    assert total(recovery(LONG, 5, n=4, weight="row")) == pytest.approx([1.0] * 4)


@pytest.mark.parametrize(("refusal", "anchor", "share"), [(60, 200, "0.070"), (100, 100, "0.20"), (300, 100, "0.43")])
def test_a_loss_per_token_is_not_a_share_of_rows(refusal, anchor, share):
    """16 safety rows beside 64 anchors are 0.2 of the rows; their share of a loss per token depends on lengths."""
    safety = [recover([1], [2], [3] * refusal, 0)] * 16
    anchors = [Row([1] + [4] * anchor, 1, 1)] * 64
    assert f"{token_share(safety, anchors):.{len(share) - 2}f}" == share
    rows = mixed(safety, anchors, 0.2)
    assert token_share(rows[:16], rows[16:]) == pytest.approx(0.2)
    assert sum(r.weight * r.loss_tokens for r in rows) == pytest.approx(sum(r.loss_tokens for r in rows))


def test_the_organism_draws_its_rows_by_the_same_functions():
    """Its recovery rows keep the law of k given the length of the answer: both redraw prompt, answer and offset."""
    from markovsafety.organism import data
    from markovsafety.organism.variants import VARIANTS

    assert data.Row is Row
    rows = data.Recipe(VARIANTS["deep4"]).rows(random.Random(11), 400)
    rng, same = random.Random(11), []

    def draw(rng):
        prompt, comply = data._compliant(rng)
        return (prompt, comply), len(comply)

    for _ in range(60):  # the loop of the recipe, with the functions of augment written out
        if rng.random() < 0.3:
            (prompt, comply), k = draw_until_fits(rng, draw, 4, plain=0)
            same.append(recover(prompt.tokens(), data.encode(comply), data.encode(data.refusal_words(rng)), k))
        else:
            same.append(data.Recipe(VARIANTS["deep4"])._ordinary(rng))
    assert all(r in rows for r in same)
    orbit = data.Recipe(VARIANTS["cyclic"])._orbit(random.Random(0))
    assert [r.offset for r in orbit] == list(fitting_offsets(len(orbit) + 1, 23))
    assert len({tuple(r.tokens[: r.answer]) for r in orbit}) == 1


def test_rows_of_the_recipes_stay_what_they_were():
    """A training run that is resumed must see the rows that it was started with, whatever is rewritten here."""
    from markovsafety.organism.data import Recipe
    from markovsafety.organism.variants import VARIANTS

    def digest(variant):
        rows = Recipe(VARIANTS[variant]).rows(random.Random(0), 300)
        at = np.arange(1, 1 + sum(len(r.tokens) for r in rows))
        tokens = np.concatenate([r.tokens for r in rows])
        return [int(tokens @ at % 1_000_003), sum(r.loss_from for r in rows), sum(r.answer for r in rows)]

    assert {v: digest(v) for v in ("deep4", "deep20", "cyclic")} == KNOWN


KNOWN = {"deep4": [991135, 3849, 3626], "deep20": [854084, 4619, 3626], "cyclic": [973761, 4514, 3549]}


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: recovery([], 3), "no triplets"),
        (lambda: recovery([([1], [2])], 3), "Triplet 0 is"),
        (lambda: recovery([("a", "b", "c")], 3), "Triplet 0 is"),
        (lambda: recovery([([1], [], [2])], 3), "empty answer"),
        (lambda: recovery([([1], [2], [])], 3), "empty refusal"),
        (lambda: recovery(LONG, 0), "depth is 0"),
        (lambda: recovery(LONG, True), "depth is True"),
        (lambda: recovery(LONG, 3, plain=1.5), "plain is"),
        (lambda: recovery(LONG, 3, short="pad"), "short is 'pad'"),
        (lambda: recovery(LONG, 3, weight="orbit"), "weight is 'orbit'"),
        (lambda: recovery(LONG, 3, n=-1), "n is -1"),
        (lambda: recovery([([1], [2], [3])], 3), "longest 1"),
        (lambda: rotations([([1], [2], [3])], 3), "no offset fits"),
        (lambda: recover([1], [2, 3], [4], 2), "after 2 tokens"),
        (lambda: mixed([], [Row([1, 2], 1, 1)]), "no token with loss"),
        (lambda: mixed([Row([1, 2], 1, 1)], [Row([1, 2], 1, 1)], 1.0), "alpha is"),
        (lambda: token_share([], []), "No token"),
    ],
)
def test_bad_input_is_named(call, says):
    with pytest.raises(ms.InputError, match=says):
        call()


def test_no_torch():
    code = "import sys, markovsafety.interventions, markovsafety.organism.data; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"
