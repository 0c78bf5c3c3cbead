"""Counts on disk: they come back equal, add up after reading, and damaged files say so."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from made import MAPS, make, quick, rows

import markovsafety as ms
from markovsafety.chains import read_counts, write_counts


@quick
@given(rows(), st.sampled_from(range(len(MAPS))), st.booleans())
def test_read_gives_back_what_was_written(tmp_path_factory, data, which, with_mass):
    rolls = make(data)
    if with_mass:
        rolls.columns["mass_harm"] = np.linspace(0, 1, len(rolls.tokens), dtype=np.float32)
        rolls.columns["weight"] = np.linspace(0.5, 2, len(rolls.prefill))
    counts = ms.count(rolls, MAPS[which])
    back = read_counts(write_counts(counts, tmp_path_factory.mktemp("counts") / "c.npz"))
    assert back.equals(counts)
    assert back.mass.keys() == counts.mass.keys()
    assert (back + back).equals(counts + counts)


def test_a_file_that_is_no_counts_says_so(tmp_path):
    chain = ms.write_chain(ms.Chain([[1.0]], {"harm": 0}), tmp_path / "chain.npz")
    with pytest.raises(ms.InputError, match="not a readable counts file") as caught:
        read_counts(chain)
    assert "write_counts" in caught.value.next
    with pytest.raises(ms.InputError, match="no file"):
        read_counts(tmp_path / "missing.npz")


@pytest.mark.parametrize(
    "key", ["transitions_group", "transitions_source", "transitions_target", "entries_source", "passages_target"]
)
def test_indices_out_of_range_are_refused(tmp_path, key):
    counts = ms.count(make([([1, 2], 0, 1, 0, 0)]), ms.KGram(1))
    write_counts(counts, tmp_path / "c.npz")
    with np.load(tmp_path / "c.npz") as file:
        arrays = {k: file[k] for k in file.files}
    arrays[key] = arrays[key] + 100
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(ms.InputError, match="not a readable counts file"):
        read_counts(tmp_path / "bad.npz")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("tally_prompt_id", np.nan),
        ("tally_prefill", 1.5),
        ("transitions_group", np.nan),
        ("entries_source", 0.5),
        ("transitions_sum_count", "1"),
    ],
)
def test_numbers_of_another_type_are_refused(tmp_path, key, value):
    """Half an index would be cut to a whole one, and nan to any."""
    write_counts(ms.count(make([([1, 2], 0, 1, 0, 0)]), ms.KGram(1)), tmp_path / "c.npz")
    with np.load(tmp_path / "c.npz") as file:
        arrays = {k: file[k] for k in file.files}
    arrays[key] = np.full(arrays[key].shape, value)
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(ms.InputError, match="an array of type"):
        read_counts(tmp_path / "bad.npz")


@quick
@given(st.data())
def test_damaged_bytes_never_escape(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("counts") / "c.npz"
    write_counts(ms.count(make([([1, 2], 0, 1, 0, 0), ([1], 3, -1, 0, 1)]), ms.KGram(1)), path)
    raw = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(bytes(raw[: data.draw(st.integers(0, len(raw)))]))
    with contextlib.suppress(ms.InputError):  # any other exception fails the test
        read_counts(path)
