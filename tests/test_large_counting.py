"""Rollouts on disk are counted as in memory: by prompt, or all prompts together in a table or in sorted runs."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from large import corpus, shards
from made import MAPS, make, quick, rows

import markovsafety as ms
from markovsafety.chains import ActivationBins, pool, pooling, read_pooled, streaming
from markovsafety.chains.spill import Spill
from markovsafety.chains.states import map_name
from markovsafety.files import claimed
from markovsafety.rollouts import Rollouts
from markovsafety.rollouts import streaming as reading
from markovsafety.rollouts.streaming import stream


@pytest.fixture
def small_batches(monkeypatch):
    """Batches of a few rollouts, joined often, so that every seam is crossed."""
    monkeypatch.setattr(streaming, "TOKENS", 60)
    monkeypatch.setattr(streaming, "ROOM", 100)
    monkeypatch.setattr(pooling, "TOKENS", 60)


@pytest.fixture
def spilling(monkeypatch):
    """No table is small enough."""
    monkeypatch.setattr(pooling, "DENSE", 0)


def same_chain(found, expected):
    """Equal in everything; only the design effects, differences of sums, may differ by rounding."""
    assert found.states == expected.states
    assert found.P.shape == expected.P.shape
    assert (found.P != expected.P).nnz == 0
    assert (found.start is None) == (expected.start is None)
    assert found.entry.keys() == expected.entry.keys()
    assert all(np.array_equal(found.entry[k], expected.entry[k]) for k in found.entry)
    a, b = vars(found.evidence), vars(expected.evidence)
    for name in a:
        if name == "deff":
            np.testing.assert_allclose(a[name], b[name], rtol=1e-12)
        else:
            assert np.array_equal(a[name], b[name]), name


# by prompt ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("states", MAPS, ids=map_name)
def test_counts_of_a_path_equal_those_in_memory(tmp_path, small_batches, states):
    rolls = corpus(1, together=False, mass_harm=lambda rng, n: rng.integers(0, 2, n).astype(np.float32))
    folder = shards(tmp_path / "run", rolls)
    found = ms.count(folder, states)
    assert found.equals(ms.count(rolls, states))
    assert found.mass.keys() == {"harm"}


def test_weights_and_masses_differ_by_rounding_alone(tmp_path, small_batches):
    rolls = corpus(
        2, weight=lambda rng, n: rng.random(n) * (rng.random(n) < 0.8), mass_harm=lambda rng, n: rng.random(n)
    )
    found, expected = ms.count(shards(tmp_path / "run", rolls), ms.KGram(1)), ms.count(rolls, ms.KGram(1))
    assert not found.equals(expected) or len(rolls) < 10
    assert found.equals(expected, rtol=1e-12)


def test_maps_that_ask_for_activations_get_them(tmp_path, small_batches):
    rolls = corpus(3, prefills=(0,), activation_refusal=lambda rng, n: rng.normal(size=n))
    bins = ActivationBins({"refusal": [-0.5, 0.5]})
    assert ms.count(shards(tmp_path / "run", rolls), bins).equals(ms.count(rolls, bins))


def test_a_column_that_some_shards_lack_is_left_out_as_in_memory(tmp_path):
    rolls = corpus(4, mass_harm=lambda rng, n: rng.random(n))
    folder = shards(tmp_path / "run", rolls[:100], 1)
    ms.write_rollouts(rolls[100:].replace(columns={}), folder / "part-00001.parquet")
    assert not ms.count(folder).mass
    assert ms.count(folder).equals(ms.count(ms.read_rollouts(folder)))


def test_files_of_other_programs_with_other_types(tmp_path):
    rolls = corpus(5)
    path = ms.write_rollouts(rolls, tmp_path / "x.parquet")
    table = pq.read_table(path)
    foreign = pa.table(
        {
            **{name: table[name] for name in ("category", "outcome")},
            "tokens": table["tokens"].cast(pa.large_list(pa.int64())),
            "prompt_id": table["prompt_id"].cast(pa.int32()),
            "prefill": table["prefill"].cast(pa.uint8()),
            "hit": table["hit"].cast(pa.float64()),
        }
    )
    pq.write_table(foreign, tmp_path / "y.parquet", write_statistics=False)
    assert ms.count(tmp_path / "y.parquet").equals(ms.count(rolls))
    same_chain(pool(tmp_path / "y.parquet", ms.KGram(2)).chain(), ms.estimate(ms.count(rolls, ms.KGram(2))))


def test_damaged_statistics_are_an_error(tmp_path):
    """Arrow's reader refuses them, but ends the process where it is asked for them themselves."""
    rolls = Rollouts.of([[1, 123456], [2, 3]], prompt_id=[0, 1], outcome=[0, 2], hit=[1, 1])
    path = ms.write_rollouts(rolls, tmp_path / "x.parquet")
    raw, size = path.read_bytes(), int.from_bytes(path.read_bytes()[-8:-4], "little")
    body, foot, largest = raw[: -8 - size], raw[-8 - size : -8], (123456).to_bytes(4, "little")
    assert foot.count(b"\x04" + largest) >= 1
    foot = foot.replace(b"\x04" + largest, b"\x02" + largest[:2])
    path.write_bytes(body + foot + len(foot).to_bytes(4, "little") + b"PAR1")
    for way in (
        ms.count,
        ms.read_rollouts,
        lambda p: stream(p).largest_token(),
        lambda p: stream(p, skip_corrupt=True),
    ):
        with pytest.raises(ms.InputError, match="cannot be read as Parquet"):
            way(path)


def test_counts_that_outgrow_the_memory_are_refused_with_what_there_is(tmp_path, small_batches):
    rolls = corpus(6)
    folder = shards(tmp_path / "run", rolls)
    with pytest.raises(ms.InputError, match="MB were granted") as caught:
        ms.count(folder, ms.KGram(2), memory=20_000)
    assert 0 < caught.value.partial.rollouts < len(rolls)
    assert "pool(" in caught.value.next


# all prompts together -------------------------------------------------------------------------------------------------


@quick
@given(st.one_of(rows(), rows(prefills=(1,))), st.integers(0, 3), st.booleans())
def test_the_chain_of_pooled_counts_is_the_chain_of_counts(tmp_path_factory, data, k, dense):
    r = make(data)
    told = {name: getattr(r, name) for name in ("prompt_id", "category", "prefill", "outcome", "hit")}
    path = ms.write_rollouts(Rollouts(r.tokens, r.offsets, **told), tmp_path_factory.mktemp("x") / "x.parquet")
    counts = ms.count(r, ms.KGram(k))
    before = pooling.DENSE
    try:
        pooling.DENSE = before if dense else 0
        if (r.outcome == 3).all():
            with pytest.raises(ms.InputError, match="truncated"):
                pool(path, ms.KGram(k)).chain()
            return
        found = pool(path, ms.KGram(k))
    finally:
        pooling.DENSE = before
    assert found.transitions == counts.matrix.sum()
    same_chain(found.chain(), ms.estimate(counts))
    same_chain(found.chain("dirichlet", 0.25), ms.estimate(counts, "dirichlet", 0.25))


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("k", [0, 1, 2])
def test_in_one_table(tmp_path, small_batches, together, k):
    rolls = corpus(7, n=800, together=together)
    folder = shards(tmp_path / "run", rolls)
    found = pool(folder, ms.KGram(k))
    expected = ms.estimate(ms.count(rolls, ms.KGram(k)))
    assert expected.evidence is not None
    assert (expected.evidence.deff > 1.01).any(), "prompts should differ"
    same_chain(found.chain(), expected)
    assert ms.hitting_probability(found.chain(), "harm").at_start.value == pytest.approx(
        (rolls.outcome[rolls.prefill == 0] == 0).mean(), abs=0.2
    )


@pytest.mark.parametrize("together", [True, False])
def test_in_sorted_runs(tmp_path, small_batches, spilling, monkeypatch, together):
    made = []
    monkeypatch.setattr(Spill, "_spill", lambda self, before=Spill._spill: (made.append(self.name), before(self)))
    rolls = corpus(8, n=4000, vocabulary=60, together=together)
    folder = shards(tmp_path / "run", rolls)
    out = tmp_path / "table"
    found = pool(folder, ms.KGram(2), out=out, memory=1)
    assert {"transitions", "passages"} == set(made)
    assert len(made) > 6
    expected = ms.estimate(ms.count(rolls, ms.KGram(2)))
    same_chain(found.chain(), expected)
    same_chain(read_pooled(out).chain(), expected)
    assert not list(out.glob("*.run"))
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_rows_and_labels_of_a_table(tmp_path):
    rolls = corpus(9)
    found = pool(ms.write_rollouts(rolls, tmp_path / "x.parquet"), ms.KGram(2))
    counts = ms.count(rolls, ms.KGram(2))
    assert tuple(found.labels()) == counts.states
    i = found.index((-1, 0))
    assert found.labels([i]) == [(-1, 0)]
    row, told = found.matrix()[[i]].toarray()[0], counts.matrix[[counts.states.index((-1, 0))]].toarray()[0]
    assert np.array_equal(row[-4:], told[-4:])
    assert row.sum() == told.sum()
    assert row[3] == told[counts.states.index((0, 3))]
    for wrong in ((0,), (0, 99), (5, -1)):
        with pytest.raises(ms.InputError, match="never visited"):
            found.index(wrong)


@pytest.mark.parametrize(
    "filters", [{"categories": "bio"}, {"prefill": 0}, {"categories": ["bio", "chem"], "prefill": [2]}]
)
def test_filters_as_select(tmp_path, small_batches, filters):
    rolls = corpus(10)
    found = pool(shards(tmp_path / "run", rolls), ms.KGram(1), **filters)
    same_chain(found.chain(), ms.estimate(ms.count(rolls, ms.KGram(1)).select(**filters)))
    with pytest.raises(ms.InputError, match="no rollouts"):
        pool(tmp_path / "run", categories="none")


@pytest.mark.parametrize("many", [1, 5, 200])
@pytest.mark.parametrize("bits", [(10, 20), (40, 40)])
def test_runs_merge_to_what_sorting_gives(tmp_path, monkeypatch, many, bits):
    monkeypatch.setattr("markovsafety.chains.spill.LEAST", 8)
    monkeypatch.setattr("markovsafety.chains.spill.PIECE", 20)
    monkeypatch.setattr("markovsafety.chains.spill.AT_ONCE", 7)
    rng = np.random.default_rng(many)
    spill = Spill(tmp_path, "x", 50, bits)
    parts = []
    for i in range(many):  # one a has more pairs than are read at once
        a = np.where(rng.random(90) < 0.5, 3, rng.integers(0, 30, 90))
        b, n = rng.integers(0, 500, 90), rng.integers(1, 9, 90) if i % 2 else None
        spill.add(a, b, n)
        parts.append(np.column_stack([a, b, np.ones(90, int) if n is None else n]))
    pieces = list(spill.merged())
    owners = np.concatenate([np.unique(a) for a, _, _ in pieces])
    assert len(owners) == len(set(owners.tolist())), "an a was cut"
    found = np.column_stack([np.concatenate(column) for column in zip(*pieces)])
    keys, inverse = np.unique(np.concatenate(parts)[:, :2], axis=0, return_inverse=True)
    assert np.array_equal(found[:, :2], keys)
    assert np.array_equal(found[:, 2], np.bincount(inverse.ravel(), np.concatenate(parts)[:, 2]))
    assert not list(tmp_path.iterdir())


# bad input ------------------------------------------------------------------------------------------------------------


def test_without_a_folder_nothing_is_spilled(tmp_path, spilling):
    path = ms.write_rollouts(corpus(8, n=4000, vocabulary=60), tmp_path / "x.parquet")
    with pytest.raises(ms.InputError, match=r"more than .* different") as caught:
        pool(path, ms.KGram(2), memory=1)
    assert "out=" in caught.value.next


def test_a_chain_that_does_not_fit_is_refused_with_numbers(tmp_path):
    found = pool(ms.write_rollouts(corpus(9), tmp_path / "x.parquet"), ms.KGram(2))
    for big in (found.chain, found.matrix):
        with pytest.raises(ms.InputError, match=r"states and .* transitions takes about"):
            big(memory=1000)


def test_a_folder_that_is_there_is_not_overwritten(tmp_path):
    path, out = ms.write_rollouts(corpus(9), tmp_path / "x.parquet"), tmp_path / "table"
    pool(path, ms.KGram(2), out=out)
    with pytest.raises(ms.InputError, match="exists already"):
        pool(path, ms.KGram(2), out=out)
    with pytest.raises(ms.InputError, match="holds no pooled counts"):
        read_pooled(tmp_path)
    for name, damage in (
        ("symbols.npy", lambda x: x[:-1]),
        ("tally.npz", lambda x: x[:40]),
        ("indptr.npy", lambda x: b""),
    ):
        whole = (out / name).read_bytes()
        (out / name).write_bytes(damage(whole))
        with pytest.raises(ms.InputError, match="damaged pooled counts"):
            read_pooled(out)
        (out / name).write_bytes(whole)
    (out / "meta").touch()
    assert read_pooled(out).transitions


@pytest.mark.parametrize("road", [lambda p, **o: ms.count(p, **o), lambda p, **o: pool(p, **o)], ids=["count", "pool"])
def test_damaged_shards_are_named_and_left_out_on_request(tmp_path, road):
    rolls = corpus(11)
    folder = shards(tmp_path / "run", rolls)
    bad = folder / "part-00001.parquet"
    raw = bytearray(bad.read_bytes())
    raw[len(raw) // 3] ^= 0xFF
    bad.write_bytes(raw)
    with pytest.raises(ms.InputError, match="part-00001"):
        road(folder)
    assert road(folder, skip_corrupt=True).rollouts == 200
    assert list(stream(folder, skip_corrupt=True).skipped) == ["part-00001.parquet"]
    assert pool(folder, skip_corrupt=True).skipped.keys() == {"part-00001.parquet"}
    bad.write_bytes(b"")
    with pytest.raises(ms.InputError, match="part-00001") as caught:
        road(folder)
    assert "skip_corrupt=True" in caught.value.next
    assert road(folder, skip_corrupt=True).rollouts == 200


def test_different_tokenizers_are_not_put_together(tmp_path):
    folder = shards(tmp_path / "run", corpus(12).replace(provenance={"template": {"tokenizer": "a", "template": None}}))
    ms.write_rollouts(
        corpus(13).replace(provenance={"template": {"tokenizer": "b", "template": None}}), folder / "part-00003.parquet"
    )
    for road in (ms.count, pool):
        with pytest.raises(ms.InputError, match=r"part-00003.parquet is of another tokenizer"):
            road(folder)


def test_rows_that_cannot_be_counted_are_named_with_their_shard(tmp_path, small_batches):
    rolls = corpus(14)
    outcome, hit = rolls.outcome.copy(), rolls.hit.copy()
    outcome[150], hit[150] = -1, -1
    folder = shards(tmp_path / "run", rolls.replace(outcome=outcome, hit=hit))
    for road in (ms.count, pool):
        with pytest.raises(ms.InputError, match=r"part-00001.parquet, rows from \d+ on: .* is not judged"):
            road(folder)


def test_what_pooled_counts_cannot_hold_is_refused(tmp_path):
    path = ms.write_rollouts(corpus(15, weight=lambda rng, n: rng.random(n)), tmp_path / "x.parquet")
    with pytest.raises(ms.InputError, match="weighted"):
        pool(path)
    plain = ms.write_rollouts(corpus(15), tmp_path / "y.parquet")
    with pytest.raises(ms.InputError, match=r"Position\(\)"):
        pool(plain, ms.Position())  # pyright: ignore[reportArgumentType]
    with pytest.raises(ms.InputError, match="cannot be numbered") as caught:
        pool(plain, ms.KGram(40))
    assert "KGram(20)" in caught.value.next
    with pytest.raises(ms.InputError, match="mass"):
        pool(plain).chain("mass")
    empty = ms.write_rollouts(corpus(15)[:0], tmp_path / "z.parquet")
    for road in (ms.count, pool):
        with pytest.raises(ms.InputError, match="no rollouts"):
            road(empty)


@pytest.mark.parametrize("dense", [True, False])
def test_files_that_change_meanwhile_are_found_out(tmp_path, monkeypatch, dense):
    path = ms.write_rollouts(corpus(16), tmp_path / "x.parquet")
    monkeypatch.setattr(pooling, "DENSE", pooling.DENSE if dense else 0)
    monkeypatch.setattr(reading.Stream, "largest_token", lambda self: 4)
    with pytest.raises(ms.InputError, match="Ids ran from 0 to 4"):
        pool(path)


def test_two_writers_and_what_a_killed_one_left(tmp_path, spilling):
    path, out = ms.write_rollouts(corpus(9), tmp_path / "x.parquet"), tmp_path / "table"
    with claimed(tmp_path / ".table.lock", "it"), pytest.raises(ms.InputError):
        pool(path, ms.KGram(2), out=out)
    (tmp_path / ".table.new").mkdir()
    (tmp_path / ".table.new" / "transitions-00000.run").write_bytes(b"half")
    assert pool(path, ms.KGram(2), out=out).transitions
    assert sorted(p.name for p in tmp_path.iterdir()) == ["table", "x.parquet"]
    assert sorted(p.suffix for p in out.iterdir()) == [".npy"] * 7 + [".npz"]


def test_a_full_disk_leaves_nothing_behind(tmp_path):
    path = ms.write_rollouts(corpus(8, n=4000, vocabulary=60), tmp_path / "x.parquet")
    out = tmp_path / "table"
    program = f"""
import resource, signal, markovsafety as ms
from markovsafety.chains import pool, pooling
pooling.DENSE = 0
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))
try:
    pool({str(path)!r}, ms.KGram(2), out={str(out)!r}, memory=1)
except ms.InputError as error:
    print(error.fact)
"""
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert told.strip() == f"cannot write {out}"
    assert [p.name for p in tmp_path.iterdir()] == ["x.parquet"]


# large ----------------------------------------------------------------------------------------------------------------


def test_a_hundred_thousand_contexts_in_a_small_budget(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(Spill, "_spill", lambda self, before=Spill._spill: (made.append(self.held), before(self)))
    rolls = corpus(17, n=6000, vocabulary=1500, prompts=40, length=90)
    path = ms.write_rollouts(rolls, tmp_path / "x.parquet")
    found = pool(path, ms.KGram(2), out=tmp_path / "table", memory=4 << 20)
    assert len(found.contexts) > 100_000
    assert len(made) > 10
    assert max(made) < 40_000
    same_chain(found.chain(), ms.estimate(ms.count(rolls, ms.KGram(2))))


@pytest.mark.full
def test_ten_million_contexts_under_a_gigabyte(tmp_path):
    """Grams of three tokens that hardly ever repeat: the table is far larger than what is granted."""
    program = f"""
import json, numpy as np, markovsafety as ms
from markovsafety.bench.measure import peak_memory
from markovsafety.chains import pool
from markovsafety.rollouts import Rollouts
folder = {str(tmp_path)!r}
rng = np.random.default_rng(0)
n, length = 4000, 500
for i in range(6):
    told = dict(prompt_id=np.arange(n) // 20 + 200 * i, category=np.full(n, "all", object), prefill=np.zeros(n, int))
    tokens = rng.integers(0, 2000, n * length)
    outcome = rng.integers(0, 3, n)
    rolls = Rollouts(tokens, np.arange(n + 1) * length, outcome=outcome, hit=np.full(n, length - 1), **told)
    ms.write_rollouts(rolls, f"{{folder}}/part-{{i:05d}}.parquet")
found = pool(folder, ms.KGram(3), out=folder + "/table", memory=200 << 20)
print(json.dumps([len(found.contexts), found.transitions, peak_memory()]))
"""
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    contexts, transitions, peak = json.loads(told)
    assert transitions == 6 * 4000 * 500
    assert contexts > 10**7
    assert peak < 1 << 30
    found = read_pooled(tmp_path / "table")
    assert found.through.sum() <= transitions
    with pytest.raises(ms.InputError, match="takes about"):
        found.chain()
    assert replace(found, note="x").index(found.labels([5])[0]) == 5
