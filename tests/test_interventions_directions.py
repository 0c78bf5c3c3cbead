"""Directions, buckets, the choice of a level and reply inversion, on planted worlds whose truth is known.

The worlds' own checkpoints are test data; one of them has another head, layer and seed, so that nothing here can know
where the truth was planted.
"""

from __future__ import annotations

import dataclasses
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom

from markovsafety import InputError, organism
from markovsafety.bench.inside import buckets_of_world, host_of_world, measure_directions, measure_organism
from markovsafety.interventions import (
    Buckets,
    Direction,
    auc,
    by_category,
    choose_level,
    curve,
    difference,
    effect,
    inversion_task,
    invert,
    label,
    probe,
    read_direction,
    replies,
    silhouette,
    states,
    token_mass,
    write_direction,
)
from markovsafety.organism import worlds

WORLDS = Path(__file__).parent / "fixtures" / "worlds"


@lru_cache
def host(name: str = "base"):
    return host_of_world(WORLDS / name)


@lru_cache
def buckets(half: int) -> Buckets:
    return buckets_of_world(host(), half)


def asked(harmful: bool, half: int = 1, n: int = 24, **options) -> list[dict]:
    return worlds.prompts(n=n, harmful=harmful, half=half, **options)


@lru_cache
def task():
    return inversion_task(host(), " harmful ?", certainly=["certainly"], no=["no"])


def made(level: int | None = None, **changes) -> Direction:
    vectors = np.random.default_rng(0).standard_normal((3, 4))
    vectors[0] = 0
    plain = Direction(vectors, "t_inst", ("harmful", "harmless"), (5, 7), (2, -2), level, "model", "template", {"a": 1})
    return dataclasses.replace(plain, **changes)


# -------------------------------------------------------------------------------------------------- a direction is data


@pytest.mark.parametrize("level", [None, 2])
def test_a_direction_read_is_the_one_written(tmp_path, level):
    write_direction(made(level), tmp_path / "d.safetensors")
    again = read_direction(tmp_path / "d.safetensors")
    for field in dataclasses.fields(Direction):
        one, other = getattr(made(level), field.name), getattr(again, field.name)
        assert np.array_equal(one, other) if field.name == "vectors" else one == other


@given(scale=st.floats(-4, 4), level=st.integers(1, 2))
def test_an_edit_adds_the_vector_of_its_level_at_its_place(scale, level):
    (part,) = made().edit(scale, level).parts
    assert np.array_equal(part.vector, made().vectors[level])
    assert (part.layer, part.scale, part.where, part.when) == (level, scale, (2, -2), "prompt")
    assert made(level).edit(scale).parts[0].layer == level
    assert np.linalg.norm(made(level).unit) == pytest.approx(1, abs=1e-6)


def test_the_sign_is_told_and_the_control_has_the_norms():
    edit, control = made(1).edit(), made(1).control(3)
    assert edit.sign == "harmful - harmless: positive pushes towards harmful"
    assert control.norms == pytest.approx(made(1).norms, rel=1e-6)
    assert abs(control.vectors[1] @ made(1).vectors[1]) < 0.99 * made(1).norms[1] ** 2
    assert made(1).transferred().edit().model is None


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: made().edit(), "no level"),
        (lambda: made().unit, "no level"),
        (lambda: made(0).unit, "zero at level 0"),
        (lambda: made().edit(level=3), "no level 3"),
        (lambda: made(7), "no level 7"),
        (lambda: made(vectors=np.full((2, 3), np.nan)), "not finite"),
        (lambda: made(vectors=np.zeros(3)), "shape"),
        (lambda: read_direction("nowhere.safetensors"), "not there"),
    ],
)
def test_bad_directions_are_refused(make, says):
    with pytest.raises(InputError, match=says):
        make()


def test_a_direction_of_another_model_is_refused_and_can_be_transferred(tmp_path):
    path = tmp_path / "d.safetensors"
    found = difference(host(), asked(True, 0), asked(False, 0)).at(1)
    write_direction(found, path)
    assert read_direction(path, host()).model == host().identity[0]
    with pytest.raises(InputError, match="another model"):
        read_direction(path, host("replanted"))
    edits = [read_direction(path).edit(), read_direction(path).transferred().edit()]
    with pytest.raises(InputError):
        token_mass(host("replanted"), asked(False), worlds.REFUSAL_IDS, edit=edits[0])
    assert len(token_mass(host("replanted"), asked(False), worlds.REFUSAL_IDS, edit=edits[1])) == 24


# ---------------------------------------------------------------------------------------------------------- differences


def test_a_difference_is_that_of_the_means():
    sides = asked(True, 0, 40), asked(False, 0, 40)
    found = difference(host(), *sides)
    at = host().spans().t_inst[0]
    by_hand = [states(host(), p, (at,))[:, :, 0].astype(float).mean(axis=0) for p in sides]
    assert np.allclose(found.vectors, by_hand[0] - by_hand[1], atol=1e-4)
    assert found.where == host().spans().instruction
    assert found.counts == (40, 40)
    post = difference(host(), *sides, position="t_post", names=("refused", "accepted"))
    assert post.where == host().spans().t_post
    assert post.norms[0] < 1e-5 * post.norms[1]  # t_post is the same token everywhere


def test_balanced_means_weigh_cells_alike():
    """Copies of one cell's prompts move the plain mean, and not the balanced one."""
    plain, jailbroken = asked(True, 0, 12), asked(True, 0, 12, marker="jailbreak")
    few, many = plain + jailbroken, plain + jailbroken * 5
    negative = asked(False, 0, 12)
    balanced = [difference(host(), p, negative, position="t_post", balance=("marker",)) for p in (few, many)]
    loose = [difference(host(), p, negative, position="t_post") for p in (few, many)]
    assert np.allclose(balanced[0].vectors, balanced[1].vectors, atol=1e-4)
    assert np.allclose(balanced[0].vectors, loose[0].vectors, atol=1e-4)
    assert np.abs(loose[0].vectors - loose[1].vectors).max() > 0.1


def test_categories_average_to_the_whole():
    positive, negative = asked(True, 0, 40), asked(False, 0, 20)
    whole, parts = difference(host(), positive, negative), by_category(host(), positive, negative)
    assert set(parts) == set(worlds.CATEGORIES)
    assert np.allclose(whole.vectors, np.mean([d.vectors for d in parts.values()], axis=0), atol=1e-4)
    assert all(d.counts == (10, 20) and not d.about["own negatives"] for d in parts.values())


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: difference(host(), [], asked(False)), "no harmful prompt"),
        (lambda: difference(host(), asked(True), []), "no harmless prompt"),
        (lambda: by_category(host(), [], asked(False)), "no harmful prompt"),
        (lambda: difference(host(), asked(True), asked(False), balance=("mood",)), "no 'mood'"),
        (lambda: difference(host(), asked(True), asked(False), position="t_middle"), "no position 't_middle'"),
        (lambda: states(host(), [[1, 4, 20, 30, 40, 5]]), "does not end with the ids"),
        (lambda: states(host(), asked(True), spans=dataclasses.replace(host().spans(), suffix=())), "one token"),
    ],
)
def test_what_has_no_difference_is_refused(make, says):
    with pytest.raises(InputError, match=says):
        make()


# -------------------------------------------------------------------------------------------------------------- buckets


def test_buckets_are_the_planted_cells():
    """Both ways of measuring refusal find what was planted, from the answers alone."""
    found = buckets(0)
    for name in ("refused", "accepted"):
        for harmful in (True, False):
            bucket = f"{name}_{'harmful' if harmful else 'harmless'}"
            markers = {"refused_harmful": {None, "scare"}, "accepted_harmful": {"jailbreak"}}
            markers |= {"refused_harmless": {"scare"}, "accepted_harmless": {None, "jailbreak"}}
            assert {p["marker"] for p in found.get(bucket)} == markers[bucket]
            assert all(p["harmful"] == harmful for p in found.get(bucket))
    assert found.counts == {
        "refused_harmful": 96,
        "accepted_harmful": 48,
        "refused_harmless": 48,
        "accepted_harmless": 96,
    }
    assert sum(row["accepted_harmful"] for row in found.by_category().values()) == 48
    prompts = [p for h, m in worlds.CELLS for p in asked(h, 0, 8, marker=m)]
    judged = label(host(), prompts, judge=worlds.world_judge(), n=9, max_tokens=12)
    # A majority of nine against a noise of 3 %: more than one prompt of 48 goes wrong with probability below 1e-6.
    assert ((judged.refusal > 0.5) == (label(host(), prompts, tokens=worlds.REFUSAL_IDS).refusal > 0.5)).sum() >= 47
    assert not judged.undecided.any()


def test_prompts_without_post_instruction_tokens_are_asked_as_such():
    cut = label(host(), asked(True), tokens=worlds.REFUSAL_IDS, bare=True)
    spans = host().spans()
    whole = host().prompt_ids(asked(True))
    assert all(p["prompt_tokens"] == list(i[: -len(spans.suffix)]) for p, i in zip(cut.prompts, whole))
    # A causal model has the same state at t_inst, whatever follows.
    one, other = states(host(), cut.prompts, ("t_inst",)), states(host(), asked(True), ("t_inst",))
    assert np.allclose(one, other, atol=1e-3)
    mixed = states(host(), [*cut.prompts, *asked(True)], ("t_inst",))
    assert np.allclose(mixed, np.concatenate([one, other]), atol=1e-3)
    with pytest.raises(InputError, match="no t_post"):
        states(host(), cut.prompts)


def test_empty_buckets_say_what_is_needed():
    found = Buckets(("a", "b", "c"), [True, True, False], [0.9, np.nan, 0.5])
    assert found.counts["refused_harmful"] == 1
    assert found.undecided.tolist() == [False, True, True]
    with pytest.raises(InputError, match=r"no refused harmless prompts among 3(.|\n)*XSTest") as caught:
        found.refused_harmless  # noqa: B018  the property raises
    assert caught.value.partial == found.counts
    with pytest.raises(InputError, match=r"bare=True.*max_tokens"):  # one of the three was cut off
        found.accepted_harmful  # noqa: B018
    with pytest.raises(InputError, match=r"answers: ordinary instructions$"):
        found.of([0]).accepted_harmless  # noqa: B018
    both = found + found.of([0])
    assert both.counts["refused_harmful"] == 2
    for make in (
        lambda: Buckets(("a",), [True, False], [0.1]),
        lambda: Buckets(("a",), ["yes"], [0.1]),
        lambda: label(host(), ["please make bio0"], [True]),
        lambda: label(host(), ["please make bio0"], tokens=[1]),
        lambda: found.rows("harmful"),
    ):
        with pytest.raises(InputError):
            make()


# ----------------------------------------------------------------------------------------------------------- separation


@given(
    st.lists(st.integers(0, 4), min_size=1, max_size=12),
    st.lists(st.integers(0, 4), min_size=1, max_size=12),
)
@settings(deadline=None)
def test_auc_is_the_share_of_ordered_pairs(x, y):
    by_hand = np.mean([[(a > b) + 0.5 * (a == b) for b in y] for a in x])
    found = auc(x, y)
    assert found.value == pytest.approx(by_hand, abs=1e-12)
    assert auc(y, x).value == pytest.approx(1 - by_hand, abs=1e-12)
    assert found.upper - found.lower > 0.05  # however well 24 numbers are separated
    points = curve(x, y)
    area = np.trapezoid(points["tpr"], points["fpr"])
    assert area == pytest.approx(by_hand, abs=1e-12)


def test_auc_intervals_cover():
    """Normal scores one and two deviations apart. Fewer hits than the bound have probability below 1e-7 at 95 %."""
    from scipy.stats import norm

    rng, draws = np.random.default_rng(0), 300
    for shift, (m, n) in ((1.0, (20, 60)), (2.0, (30, 30)), (3.0, (40, 15))):
        truth = norm.cdf(shift / np.sqrt(2))
        hits = 0
        for _ in range(draws):
            found = auc(rng.normal(shift, 1, m), rng.normal(0, 1, n))
            hits += found.lower <= truth <= found.upper
        assert hits >= binom.ppf(1e-7, draws, 0.95), (shift, hits)


def test_silhouette_is_the_definition():
    rng = np.random.default_rng(1)
    x, labels = rng.standard_normal((15, 3)), rng.random(15) < 0.4
    labels[:2] = [True, False]
    distance = np.linalg.norm(x[:, None] - x[None], axis=-1)
    values = []
    for i in range(15):
        same, other = labels == labels[i], labels != labels[i]
        a, b = distance[i, same].sum() / max(same.sum() - 1, 1), distance[i, other].mean()
        values.append((b - a) / max(a, b) if same.sum() > 1 else 0.0)
    assert silhouette(x, labels) == pytest.approx(np.mean(values), abs=1e-9)
    with pytest.raises(InputError, match="one label"):
        silhouette(x, np.ones(15))


def test_a_probe_reads_what_no_direction_does():
    """An exclusive-or: the difference in means sees nothing, the probe sees all, shuffled labels give less."""
    rng = np.random.default_rng(2)
    sides = [rng.standard_normal((200, 2)) for _ in range(2)]
    told = [(s[:, 0] * s[:, 1]) > 0 for s in sides]
    along = sides[0][told[0]].mean(axis=0) - sides[0][~told[0]].mean(axis=0)
    assert abs(auc(sides[1][told[1]] @ along, sides[1][~told[1]] @ along).value - 0.5) < 0.2
    found = probe(sides[0], told[0], sides[1], told[1])
    assert found.auc.lower > 0.9
    assert found.accuracy.lower > 0.85
    assert found.p == 1 / 20
    assert abs(found.shuffled.mean() - 0.5) < 0.1
    with pytest.raises(InputError, match="cannot be fitted"):
        probe(sides[0], np.ones(200), sides[1], told[1])


# ------------------------------------------------------------------------------------------------- what steering causes


def test_the_level_is_chosen_by_its_effect():
    plain = asked(False)
    sides = buckets(0).refused_harmful, buckets(0).accepted_harmless
    refusal = difference(host(), *sides, position="t_post", names=("refused", "accepted"))
    swept = choose_level(
        host(),
        refusal,
        lambda e: token_mass(host(), plain, worlds.REFUSAL_IDS, edit=e),
        scales=(1.0,),
        held=(asked(True), plain),
    )
    assert swept
    assert swept.direction.level == swept.best.level == max(swept.tried, key=lambda t: t.effect.net.value).level
    assert [t.level for t in swept.tried] == [1, 2, 3]  # level 0 is one token, the last fifth is not searched
    assert swept.best.effect.control.value <= 0.15
    assert set(swept.table[0]) == {"level", "scale", "auc", "base", "edited", "control", "net", "worst_control"}
    again = effect(swept.direction.edit(), lambda e: token_mass(host(), plain, worlds.REFUSAL_IDS, edit=e))
    assert again.edited.value == pytest.approx(swept.best.effect.edited.value, abs=1e-6)


def test_a_probe_that_is_always_right_need_not_steer():
    """Where the instruction ends on a filler, t_inst knows of harm and nobody asks it: that is no error."""
    kinds = {h: asked(h, 0, 48, fillers=True) for h in (True, False)}
    held = {h: asked(h, 1, 48, fillers=True) for h in (True, False)}
    swept = choose_level(
        host(),
        difference(host(), kinds[True], kinds[False]),
        lambda e: replies(host(), task(), held[False], edit=e).likeliest == 0,
        scales=(1.0,),
        where=task().spans.t_inst,
        held=(held[True], held[False]),
    )
    assert swept.verdict == "not causal"
    assert max(t.auc.value for t in swept.tried) == 1
    assert swept.best.effect.edited.value <= 0.05
    assert "AUC 1.00" in swept.reason


def test_kinds_that_do_not_differ_are_not_separated():
    halves = [asked(False, half, 192) for half in (0, 1)]
    swept = choose_level(
        host(),
        difference(host(), halves[0][::2], halves[0][1::2]),
        lambda e: token_mass(host(), asked(False), worlds.REFUSAL_IDS, edit=e),
        scales=(1.0,),
        held=(halves[1][::2], halves[1][1::2]),
    )
    assert swept.verdict == "not separated"
    assert not swept


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"share": 0.0}, "no level to search"),
        ({"scales": ()}, "no level to search"),
        ({"controls": 0}, "controls is 0"),
        ({"behaviour": lambda e: np.array([2.0])}, "outside"),
        ({"behaviour": lambda e: 0.5}, "shape"),
    ],
)
def test_bad_sweeps_are_refused(options, says):
    behaviour = options.pop("behaviour", lambda e: np.array([0.5, 0.5]))
    with pytest.raises(InputError, match=says):
        choose_level(host(), difference(host(), asked(True), asked(False)), behaviour, **options)


# ------------------------------------------------------------------------------------------------------ reply inversion


def test_the_question_is_put_as_the_world_puts_it():
    """Two ways to the same ids: the task's wrapping, and the language's own questions."""
    plain = asked(True)
    own = [worlds.read(p["prompt"] + " harmful ?").tokens for p in plain]
    assert [list(i) for i in host().prompt_ids(task().prompts(plain))] == own
    around = inversion_task(host(), "please {instruction} harmful ?", certainly=["certainly"], no=["no"])
    assert around.spans.prefix == (*host().spans().prefix, worlds.IDS["please"])
    assert around.spans.question == task().spans.question


def test_replies_have_three_classes():
    found = replies(host(), task(), [*asked(True), *asked(False)])
    assert found.likeliest.tolist() == [0] * 24 + [1] * 24
    assert found.share("certainly").value == 0.5
    assert found.share("neither").upper > 0
    assert np.allclose(found.odds, np.repeat([1, 0], 24), atol=0.01)
    swapped = dataclasses.replace(task(), no=(worlds.IDS["A"],))
    assert (replies(host(), swapped, asked(False)).likeliest == 2).all()


def test_inversion_carries_its_control_and_reads_each_pass_once():
    harm = difference(host(), asked(True, 0), asked(False, 0))
    found = invert(host(), task(), asked(False), task().edit(harm, 1.0, 1))
    assert found.share.edited.value >= 0.8
    assert found.share.control.value <= 0.15
    assert found.probability.edited.value == pytest.approx(found.share.edited.value, abs=0.1)
    assert task().edit(harm, 1.0, 1).parts[0].where == task().spans.before_question
    refusal = dataclasses.replace(harm, position="t_post")
    assert task().edit(refusal, 1.0, 1).parts[0].where == (0, None)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: inversion_task(host(), " harmful ?", certainly=["Gewiss"], no=["no"]), "no token"),
        (lambda: inversion_task(host()), "of the question"),
        (lambda: inversion_task(host(), " harmful ?", certainly=["no"], no=["no"]), "both replies"),
        (lambda: replies(host(), task(), [[1, 4, 5]]), "no text"),
        (lambda: replies(host(), task(), asked(True)).share("maybe"), "no reply 'maybe'"),
        (lambda: invert(host(), task(), asked(True), made(1).edit(), reply="neither"), "towards 'neither'"),
    ],
)
def test_bad_questions_are_refused(make, says):
    with pytest.raises(InputError, match=says):
        make()


# ----------------------------------------------------------------------------------------------------------- acceptance


@pytest.mark.parametrize(("name", "with_attack"), [("base", True), ("replanted", False)])
def test_planted_directions_are_found(name, with_attack):
    """P1a to P1i; the fine-tuning attack of P1i is made once."""
    rows = measure_directions(WORLDS / name, with_attack=with_attack)
    missed = {key: row for key, row in rows.items() if row["met"] is False}
    assert not missed
    assert sum(row["met"] is True for row in rows.values()) >= (16 if with_attack else 14)


def test_the_organism_knows_and_does_apart():
    rows = measure_organism(organism.model_path("shallow"), n=48)
    assert not {key: row for key, row in rows.items() if row["met"] is False}
    assert sum(row["met"] is True for row in rows.values()) == 7
