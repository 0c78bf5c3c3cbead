"""A layered chain that stays in its file: the same numbers, one layer at a time, and damage is found and named."""

from __future__ import annotations

import tracemalloc
import weakref
import zipfile

import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given
from small_chains import SEEDS, quick, random_chain

import markovsafety as ms
from markovsafety.chains import StoredLayers, stored_layers, write_layers

ROADS = {
    "probability": lambda c: ms.hitting_probability(c, "harm"),
    "truncated": lambda c: ms.hitting_probability(c, ["harm", "truncated"]),
    "exact": lambda c: ms.hitting_probability(c, "harm", method="exact"),
    "committor": lambda c: ms.committor(c, "refusal", "harm"),
    "time": lambda c: ms.hitting_time(c),
    "time to harm": lambda c: ms.hitting_time(c, "harm", given=True),
    "spread": lambda c: ms.hitting_spread(c),
    "visits": ms.visits,
}


def big(n=400, layers=30, width=20, seed=0):
    """Layers of a chain whose two last states are outcomes."""
    for t in range(layers):
        rng = np.random.default_rng([seed, t])
        v = rng.random((n, width))
        columns = (np.arange(width) * (n // width) + rng.integers(0, n // width, (n, width))).ravel()
        rows = sp.csr_array(
            ((v / v.sum(axis=1, keepdims=True)).ravel(), columns, np.arange(n + 1) * width), shape=(n, n)
        )
        live = sp.diags_array((np.arange(n) < n - 2).astype(float))
        yield sp.csr_array(live @ rows)


OUTCOMES = {"harm": [399], "refusal": [398]}


def same(a, b):
    return all(np.array_equal(getattr(a, k), getattr(b, k), equal_nan=True) for k in ("value", "lower", "upper"))


@quick
@given(SEEDS)
def test_the_same_numbers_bit_for_bit(tmp_path_factory, seed):
    chain, _, _ = random_chain(seed, layers=4, leaky=bool(seed % 2))
    path = ms.write_chain(chain, tmp_path_factory.mktemp("x") / "x.npz")
    stored = ms.read_chain(path, stream=True)
    assert isinstance(stored.layers, StoredLayers)
    assert stored.equals(chain)
    for name, road in ROADS.items():
        found, expected = road(stored), road(chain)
        assert same(found, expected), name
        assert (found.start is None) == (expected.start is None)
        assert found.start is None or same(found.start, expected.start), name
        assert found.info["method"] == expected.info["method"]


def test_written_layer_by_layer_as_written_whole(tmp_path):
    labels = [f"s{i}" for i in range(400)]
    whole = ms.Chain.layered(list(big()), OUTCOMES, 3, labels)
    path = write_layers(big(), tmp_path / "x.npz", OUTCOMES, 3, labels)
    assert ms.read_chain(path).equals(whole)
    assert ms.read_chain(path, stream=True).equals(whole)
    assert repr(ms.read_chain(path, stream=True)) == repr(whole)
    assert [p.name for p in tmp_path.iterdir()] == ["x.npz"]
    assert ms.read_chain(ms.write_chain(whole, tmp_path / "y.npz"), stream=True).equals(whole)


@pytest.mark.parametrize("road", ["probability", "time", "visits"])
def test_one_layer_is_held_at_a_time(tmp_path, monkeypatch, road):
    chain = ms.read_chain(write_layers(big(), tmp_path / "x.npz", OUTCOMES, 0), stream=True)
    alive, most, reads = [], [], []

    def read(self, t, before=StoredLayers.__getitem__):
        matrix = before(self, t)
        alive.append(weakref.ref(matrix))
        most.append(sum(ref() is not None for ref in alive))
        reads.append(t)
        return matrix

    monkeypatch.setattr(StoredLayers, "__getitem__", read)
    ROADS[road](chain)
    assert set(reads) == set(range(30))
    assert max(most) <= 2  # the next is read before the name of the last is bound to it


def test_memory_is_that_of_the_answer_and_a_few_layers(tmp_path):
    layers, n, width = 60, 400, 40
    path = write_layers(big(n, layers, width), tmp_path / "x.npz", OUTCOMES, 0)
    one = n * width * 12
    answer = 3 * n * (layers + 1) * 8
    ms.hitting_probability(ms.read_chain(path), "harm")  # what is loaded and compiled on the way
    peaks = {}
    for stream in (True, False):
        tracemalloc.start()
        ms.hitting_probability(ms.read_chain(path, stream=stream), "harm")
        peaks[stream] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peaks[False] > layers * one
    assert peaks[True] < 2 * answer + 8 * one < peaks[False] / 3


# bad input ------------------------------------------------------------------------------------------------------------


def test_bad_layers_are_named_and_leave_nothing(tmp_path):
    def broken(kind):
        for t, layer in enumerate(big(layers=4)):
            if t == 2 and kind == "raises":
                raise RuntimeError("the source is gone")
            yield {"sum": layer * 0.5, "size": layer[:, :5][:5]}.get(kind, layer) if t == 2 else layer

    for kind, says in (("sum", "sums to 0.5"), ("size", "shape|states|index|State")):
        with pytest.raises(ms.InputError, match=says):
            write_layers(broken(kind), tmp_path / "x.npz", OUTCOMES)
    with pytest.raises(RuntimeError, match="the source is gone"):
        write_layers(broken("raises"), tmp_path / "x.npz", OUTCOMES)
    with pytest.raises(ms.InputError, match="no layers"):
        write_layers([], tmp_path / "x.npz", OUTCOMES)
    with pytest.raises(ms.InputError, match="cannot be written"):
        write_layers(big(layers=1), tmp_path / "x.npz", OUTCOMES, states=[object() for _ in range(400)])
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").touch()
    with pytest.raises(ms.InputError, match="cannot"):
        write_layers(big(layers=1), tmp_path / "file" / "x.npz", OUTCOMES)


def test_what_a_killed_writer_left_goes(tmp_path):
    rest = tmp_path / ".x.npz.parts"
    rest.mkdir()
    (rest / "data.npy").write_bytes(b"half")
    assert ms.read_chain(write_layers(big(layers=2), tmp_path / "x.npz", OUTCOMES)).n_layers == 2
    assert not rest.exists()


def test_files_that_cannot_be_streamed(tmp_path):
    path = write_layers(big(layers=3), tmp_path / "x.npz", OUTCOMES)
    one = ms.write_chain(ms.Chain(np.array([[0.5, 0.5], [0, 0]]), {"harm": 1}), tmp_path / "one.npz")
    with np.load(path) as file:
        arrays = dict(file)
    np.savez_compressed(tmp_path / "small.npz", **arrays)
    np.savez(tmp_path / "short.npz", **{**arrays, "indptr": arrays["indptr"][:-1]})
    np.savez(tmp_path / "square.npz", **{**arrays, "data": arrays["data"].reshape(1, -1)})
    raw = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        begin = archive.getinfo("data.npy").header_offset
    raw[begin + 5000] ^= 1  # the number is still a probability, nearly
    (tmp_path / "flipped.npz").write_bytes(raw)
    for file, says in (
        (one, "one matrix and no layers"),
        (tmp_path / "small.npz", "compressed"),
        (tmp_path / "short.npz", "do not fit its shape"),
        (tmp_path / "square.npz", "shape"),
        (tmp_path / "flipped.npz", "Bad CRC-32"),
        (tmp_path / "none.npz", "no file"),
    ):
        with pytest.raises(ms.InputError, match=says):
            ms.read_chain(file, stream=True)
    assert ms.read_chain(tmp_path / "small.npz").n_layers == 3


def test_a_file_that_changes_while_it_is_used(tmp_path):
    path = write_layers(big(layers=3), tmp_path / "x.npz", OUTCOMES)
    chain = ms.read_chain(path, stream=True)
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(ms.InputError, match=r"Layer 2 of .*x.npz cannot be read"):
        ms.hitting_probability(chain, "harm")
    path.unlink()
    with pytest.raises(ms.InputError, match="cannot be read"):
        chain.layers[0]
    with pytest.raises(IndexError):
        chain.layers[3]


def test_layers_that_are_not_stochastic_are_refused_when_the_file_is_opened(tmp_path):
    path = ms.write_chain(ms.Chain.layered(list(big(layers=3)), OUTCOMES), tmp_path / "x.npz")
    with np.load(path) as file:
        arrays = dict(file)
    arrays["data"][-50] += 0.25
    np.savez(path, **arrays)
    with pytest.raises(ms.InputError, match=r"state 39\d in layer 2 sums to 1.25"):
        ms.read_chain(path, stream=True)
    assert stored_layers.LARGE == ("indptr", "indices", "data")
