"""Counts made where the tokens are sampled: the same as those of rollouts, and nothing else leaves the device."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from tiny import table_engine

import markovsafety as ms
from markovsafety import InputError, KGram, Position, UntrustedError, count, estimate, sample
from markovsafety.bench.masses import devices
from markovsafety.chains import read_counts, write_counts
from markovsafety.organism import HARM_IDS, REFUSAL_IDS, model_path, prompts
from markovsafety.rollouts import LexiconJudge, Rollouts, Sums, judge, tally
from markovsafety.rollouts.engines import Job, jax_keep, jax_sums, open_engine
from markovsafety.rollouts.engines.jax_home import Home
from markovsafety.rollouts.engines.jax_sampling import Shape
from markovsafety.rollouts.rules import rule_of
from markovsafety.rollouts.sums import Added

ASKED = prompts(n=6, seed=1)
ASK = {"n": 12, "max_tokens": 24, "prefill": [0, 3], "seed": 3, "judge": "organism", "progress": False}
CLASSES = {"harm": HARM_IDS, "refusal": REFUSAL_IDS}


@pytest.fixture(scope="module")
def engine():
    return open_engine("jax", model_path("shallow"), batch_size=16)


# -- a model: the same seed, the same counts ---------------------------------------------------------------------------


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 0.9), (1.4, 1.0), (0.0, 1.0)])
def test_counts_are_those_of_rollouts(engine, temperature, top_p):
    options = {**ASK, "temperature": temperature, "top_p": top_p, "classes": CLASSES}
    rolls = sample(engine, ASKED, **options)
    sums = tally(engine, ASKED, KGram(2), **options)
    want, got = count(rolls, KGram(2)), count(sums)
    assert got.equals(want, 1e-12), (got, want)  # sums of masses: the order of adding is free
    assert list(got.mass) == ["harm", "refusal"]
    assert got.entry[3].tolist() == want.entry[3].tolist()
    assert count(sums, KGram(2)).equals(got)
    assert len(sums) == len(rolls)
    if temperature:
        np.testing.assert_allclose(
            estimate(got, "mass").P.toarray(), estimate(want, "mass").P.toarray(), rtol=1e-9, atol=1e-12
        )


@pytest.mark.parametrize("order", [0, 1, 5])
def test_any_order(engine, order):
    want = count(sample(engine, ASKED, **ASK), KGram(order))
    got = count(tally(engine, ASKED, KGram(order), **ASK))
    assert got.equals(want)
    assert got.mass == {}


@pytest.mark.parametrize("refusal_at", ["first", "end"])
def test_a_lexicon_of_ids(engine, refusal_at):
    """Sequences of ids, among them one that the forced tokens may begin."""
    rolls = sample(engine, ASKED, **{**ASK, "judge": None})
    answers = list(rolls.answers())
    pairs = [*[tuple(a[2:4].tolist()) for a in answers if len(a) > 5][:3], tuple(answers[0][5:8].tolist())]
    said = LexiconJudge(harm=[*pairs, HARM_IDS[0]], refusal=[REFUSAL_IDS[0], answers[1][:2]], refusal_at=refusal_at)
    want = count(judge(rolls, said), KGram(2))
    got = count(tally(engine, ASKED, KGram(2), **{**ASK, "judge": said}))
    assert got.equals(want)
    assert (want.tally.outcomes.sum(axis=0) > 0)[:2].all()


def test_workers_batches_and_shards_change_nothing(engine):
    whole = count(tally(engine, ASKED, KGram(2), classes=CLASSES, **ASK))
    for changes, size in (({"batch_size": 32, "workers": 2}, None), ({"batch_size": 8}, 52)):
        other = dataclasses.replace(engine, **changes)
        parts = tally(other, ASKED, KGram(2), classes=CLASSES, shard_size=size, **ASK)
        assert count(parts).equals(whole, 1e-5)  # masses come from other programs, in float32


def test_masses_of_many_steps_are_unbiased(engine):
    """Hits less summed mass, in standard errors, is below 5.8: a false alarm in 1e8."""
    got = count(tally(engine, ASKED, KGram(2), classes=CLASSES, **{**ASK, "n": 24, "temperature": 0.8, "top_p": 0.95}))
    values = got.mass["harm"].values
    assert values["variance"].sum() > 10
    assert abs(values["surprise"].sum()) < 5.8 * np.sqrt(values["variance"].sum())


def test_bytes_that_leave_the_device(engine):
    """Sums stop growing where rollouts go on: one byte a row and advance is all that is left per token."""
    fetched = []
    for n in (32, 128):
        options = {**ASK, "n": n, "prefill": 0, "classes": {"harm": HARM_IDS}}
        sums = tally(engine, ASKED[:2], KGram(1), **options)
        fetched.append(sums.info["fetched_bytes"])
    job = Job(
        prompts=[np.array([5, 6, 7], np.int32)],
        prompt_of=np.zeros(64, np.int64),
        forced=[np.zeros(0, np.int32)] * 64,
        keys=np.arange(64, dtype=np.uint64),
        max_tokens=24,
        classes={"harm": np.array(HARM_IDS)},
    )
    told = engine.run(job).info
    assert told["fetched_bytes"] > 13 * told["sampled_tokens"]  # token, log-probability, mass, finite or not
    assert fetched[1] < 2 * fetched[0] < 13 * sums.info["sampled_tokens"]


def test_the_measurement():
    (row,) = devices((2,), prompt_count=2, repeat=1)
    assert row["close"]
    assert row["rollouts"] == 8
    assert min(row["bytes"]) > row["tokens"]
    assert min(row["seconds"]) > 0


# -- the sums alone: any tokens at all -------------------------------------------------------------------------------

VOCAB, MOST = 7, 5
# 99 is outside the vocabulary; entries with 2, which ends an answer, stand in none
LEXICA = {
    "single": {"harm": [3], "refusal": [4], "refusal_at": "end"},
    "first": {"harm": [[3, 4], [5, 5, 3]], "refusal": [[4, 4], 6], "refusal_at": "first"},
    "after": {"harm": [[3, 3], 5, [6, 2], 2], "refusal": [[4, 6, 4], [6, 3], 4], "refusal_at": "end"},
    "nothing": {"harm": [99], "refusal": [], "refusal_at": "first"},
}


def random_rollouts(rng, n: int, vocab: int, ids, classes: dict) -> tuple[Job, list, dict, np.ndarray]:
    """A job and what a model might have said: lists of sampled tokens (2 ends) and masses; the group of each."""
    group = np.sort(rng.integers(0, 4, n))
    group = np.unique(group, return_inverse=True)[1]
    depth = rng.integers(0, 4, group.max() + 1)
    forced = [rng.choice(ids, depth[g]).astype(np.int32) for g in range(group.max() + 1)]
    answers = []
    for _ in range(n):
        said = rng.choice([*ids, 2], MOST)
        end = np.flatnonzero(said == 2)
        answers.append(said[: end[0] + 1 if len(end) else rng.integers(1, MOST + 1)].astype(np.int32))
    job = Job(
        prompts=[np.array([1], np.int32)],
        prompt_of=np.zeros(n, np.int64),
        forced=[forced[g] for g in group],
        keys=np.arange(n, dtype=np.uint64),
        max_tokens=MOST,
        eos_ids=(2,),
        classes={name: np.array([i]) for i, name in enumerate(classes)},
    )
    mass = {name: [rng.random(len(a), dtype=np.float32) for a in answers] for name in classes}
    return job, answers, mass, group


def summed(job: Job, answers, mass, group, order: int, said, vocab: int, workers: int, rng) -> Sums:
    """The device's sums of these answers, each kept by one of the workers."""
    shape = Shape(SimpleNamespace(vocab=vocab), "float32", Home((jax.devices("cpu")[0],)), None, 1)
    shelf = jax_keep.Shelf(SimpleNamespace(job=job, shape=shape, workers=workers))
    kept = [shelf.own() for _ in range(workers)]
    token = np.zeros((workers, shelf.rows, MOST), np.int32)
    masses = np.zeros((workers, shelf.rows, MOST, len(mass)), np.float32)
    for i, answer in enumerate(answers):
        worker = rng.integers(workers)
        shelf.length[i] = len(answer)
        token[worker, i, : len(answer)] = answer
        for c, name in enumerate(mass):
            masses[worker, i, : len(answer), c] = mass[name][i]
    for k, t, m in zip(kept, token, masses):
        k.token, k.mass = jax.device_put(t), jax.device_put(m)
    added = Added.of(list(jax_sums.adder(shelf, order, rule_of(said, (2,)), group)()))
    forced = [job.forced[np.flatnonzero(group == g)[0]] for g in range(group.max() + 1)]
    entry = np.array([([-1] * order + f.tolist())[len(f) : len(f) + order] for f in forced], np.int32)
    ids = np.arange(len(forced))
    kinds = np.array(["b", "a"] * len(forced), object)[: len(forced)]
    return Sums(order, ids, kinds, np.array([len(f) for f in forced]), entry.reshape(len(forced), order), added)


@pytest.mark.parametrize(
    ("lexicon", "order", "vocab", "classes", "most"),
    [
        ("single", 2, VOCAB, {"harm"}, 1 << 20),
        ("first", 3, VOCAB, {}, 1 << 20),
        ("after", 1, VOCAB, {"refusal": 0, "harm": 1}, 30),  # four rollouts at a time
        ("nothing", 0, VOCAB, {"benign": 0}, 1 << 20),
        ("after", 5, 1 << 17, {"harm": 0}, 50),  # a state takes two words of 62 bits
    ],
)
def test_sums_of_anything(monkeypatch, lexicon, order, vocab, classes, most):
    monkeypatch.setattr(jax_sums, "MOST", most)
    rng = np.random.default_rng(order)
    ids = np.arange(3, 7) if vocab == VOCAB else np.array([3, 4, 5, 6, vocab - 1])
    seen = np.zeros(4)
    for _ in range(12):
        said = LexiconJudge(eos_ids=(2,), **LEXICA[lexicon])
        job, answers, mass, group = random_rollouts(rng, int(rng.integers(33, 64)), vocab, ids, classes)
        blank = [np.full(len(f), np.nan, np.float32) for f in job.forced]
        columns = {f"mass_{k}": np.concatenate([x for b, m in zip(blank, v) for x in (b, m)]) for k, v in mass.items()}
        rolls = Rollouts.of(
            [np.concatenate(pair) for pair in zip(job.forced, answers)],
            prompt_id=group,
            category=np.array(["b", "a"] * len(group))[group],
            prefill=np.array([len(f) for f in job.forced], np.int32),
            columns=columns,
        )
        want = count(judge(rolls, said), KGram(order))
        got = count(summed(job, answers, mass, group, order, said, vocab, 2, rng))
        assert got.equals(want, 1e-13 if classes else 0.0)
        seen += want.tally.outcomes.sum(axis=0)
    assert (seen[2:] > 20).all()
    assert lexicon == "nothing" or (seen[:2] > 9).all()


# -- shards on disk --------------------------------------------------------------------------------------------------


class Dies:
    """An engine that fails at the job of a given number."""

    def __init__(self, engine, number, error):
        self.engine, self.number, self.error, self.jobs = engine, number, error, 0

    def __getattr__(self, name):
        return getattr(self.engine, name)

    def run(self, job, progress=None):
        raise AssertionError("nothing is to be sampled here")

    def tally(self, *arguments):
        self.jobs += 1
        if self.jobs > self.number:
            raise self.error
        return self.engine.tally(*arguments)


def test_a_stopped_run_goes_on(engine, tmp_path):
    options = {**ASK, "shard_size": 40, "classes": CLASSES}
    whole = tally(engine, ASKED, KGram(2), **options)
    broken = Dies(engine, 2, UntrustedError("no", cause="logits", next="stop"))
    with pytest.raises(UntrustedError) as caught:
        tally(broken, ASKED, KGram(2), out=tmp_path, **options)
    assert len(caught.value.partial) == 80
    assert count(caught.value.partial).rollouts == 80
    assert len(list(tmp_path.glob("part-*.npz"))) == 2
    with pytest.raises(KeyboardInterrupt, match="3 of 4 shards are kept"):
        tally(Dies(engine, 1, KeyboardInterrupt()), ASKED, KGram(2), out=tmp_path, **options)
    fresh = Dies(engine, 9, None)
    sums = tally(fresh, ASKED, KGram(2), out=tmp_path, **options)
    assert fresh.jobs == 1
    assert count(sums).equals(count(whole))
    assert sums.info["sampled_tokens"] < whole.info["sampled_tokens"]
    assert count(tally(Dies(engine, 0, None), ASKED, KGram(2), out=tmp_path, **options)).equals(count(whole))
    path = write_counts(count(sums), tmp_path / "counts.npz")
    assert read_counts(path).equals(count(whole))


def test_a_folder_belongs_to_one_run(engine, tmp_path):
    options = {**ASK, "n": 2, "prefill": 0}
    tally(engine, ASKED, KGram(2), out=tmp_path, **options)
    with pytest.raises(InputError, match="other parameters") as caught:
        tally(engine, ASKED, KGram(1), out=tmp_path, **options)
    assert "order: 2 there, 1 now" in caught.value.cause
    with pytest.raises(InputError, match="other parameters"):
        sample(engine, ASKED, out=tmp_path, **options)
    (tmp_path / "part-00000.npz").write_bytes(b"PK")
    with pytest.raises(InputError, match="is damaged"):
        tally(engine, ASKED, KGram(2), out=tmp_path, **options)
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(InputError, match="without a manifest"):
        tally(engine, ASKED, KGram(2), out=tmp_path, **options)


# -- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"judge": None}, "no judge"),
        ({"judge": SimpleNamespace(name="mine", judge=lambda rolls: None)}, "'mine' cannot judge on the device"),
        ({"judge": LexiconJudge(harm=["bomb"], refusal=[4])}, "1 phrases, the first of them 'bomb'"),
        ({"judge": LexiconJudge(harm=[4])}, 'phrases, the first of them "i\'m sorry"'),
        ({"states": Position()}, "cannot be told apart on the device"),
        ({"classes": {"poison": [4]}}, "the class 'poison' has no place"),
        ({"n": 0}, "n is 0"),
    ],
)
def test_what_the_device_cannot_do_is_said(engine, changes, says):
    options = {"states": KGram(2), **ASK, **changes}
    with pytest.raises(InputError, match=says):
        tally(engine, ASKED, **options)


def test_engines_that_cannot_add_up(tmp_path):
    with pytest.raises(InputError, match="'table' cannot add up") as caught:
        tally(table_engine(tmp_path), ["hello"], KGram(2), n=1, max_tokens=2, judge=LexiconJudge(harm=[4], refusal=[]))
    assert "count(judge(sample(" in caught.value.next


def test_sums_are_counted_by_their_own_map(engine):
    sums = tally(engine, ASKED, KGram(1), **{**ASK, "n": 2})
    assert count(sums).kind == "KGram(1)"
    for other in (KGram(2), Position()):
        with pytest.raises(InputError, match=r"of KGram\(1\), not of"):
            count(sums, other)
    empty = dataclasses.replace(sums, added=Added.empty(1))
    with pytest.raises(InputError, match="no rollouts"):
        count(empty)
    assert "24 rollouts" in repr(sums)
    assert ms.rollouts.tally is tally


def test_logits_that_are_not_finite(engine):
    broken = dataclasses.replace(engine, params={**engine.params, "norm": engine.params["norm"] * np.nan})
    with pytest.raises(UntrustedError, match="not finite"):
        tally(broken, ASKED, KGram(2), **ASK)
