"""Chains on disk: what is written, what comes back, and what damaged files say."""

from __future__ import annotations

import contextlib
import json
import os
import pickle

import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st
from made import ENDS, LABELS, P3, chain3, chains, quick

import markovsafety as ms
from markovsafety.chains import Evidence

PLAIN_KEYS = ["data", "indices", "indptr", "layers", "meta", "shape", "start"]


@quick
@given(chains())
def test_read_gives_back_what_was_written(tmp_path_factory, chain):
    path = tmp_path_factory.mktemp("chain") / "c.npz"
    ms.write_chain(chain, path)
    back = ms.read_chain(path)
    assert back.equals(chain)
    assert [type(x) for x in back.states] == [type(x) for x in chain.states]
    with np.load(path, allow_pickle=False) as file:
        assert sorted(file.files) == PLAIN_KEYS


def test_the_file_is_what_the_format_says(tmp_path):
    with np.load(ms.write_chain(chain3(), tmp_path / "c.npz"), allow_pickle=False) as file:
        matrix = sp.csr_array((file["data"], file["indices"], file["indptr"]), shape=tuple(file["shape"]))
        assert matrix.toarray().tolist() == [[0.5, 0.25, 0.25], [0, 1, 0], [0, 0, 1]]
        assert file["layers"] == 0
        assert file["start"].tolist() == [1, 0, 0]
        assert file["meta"].shape == ()
        meta = json.loads(str(file["meta"]))
        assert meta["outcomes"] == {"harm": [1], "refusal": [2]}
        assert meta["states"] == ["begin", "harm", ["a", [1, -1]]]
        assert "version" in meta
    layered = ms.write_chain(ms.Chain.layered([P3, P3], ENDS), tmp_path / "layered.npz")
    with np.load(layered, allow_pickle=False) as file:
        assert (file["layers"].item(), file["shape"].tolist(), len(file["indptr"])) == (2, [6, 3], 7)


def test_evidence_entry_and_exact_counts_survive_the_file(tmp_path):
    evidence = Evidence([5.0, 2, 3], [7, 7], ["bio", "ärzte"], [0, 3], [[1, 2, 0, 0], [1, 1, 0, 0]])
    whole = ms.Chain.from_counts([[1, 2**62 + 1, 3], [0, 0, 0], [5, 0, 0]], ENDS, 0)
    for chain in (chain3(evidence=evidence, entry={3: [0, 0.5, 0.5], 0: 0}), whole):
        back = ms.read_chain(ms.write_chain(chain, tmp_path / "c.npz"))
        assert back.equals(chain)
    back = ms.read_chain(ms.write_chain(chain3(evidence=evidence, entry={3: [0, 0.5, 0.5]}), tmp_path / "c.npz"))
    assert list(back.entry) == [3]
    events, totals = back.evidence.tally.clusters("harm", prefill=3)
    assert (events.tolist(), totals.tolist()) == ([1], [2])


def test_equals_sees_every_part():
    chain = chain3()
    changed = [
        ms.Chain(P3, ENDS, 1, LABELS),
        ms.Chain(P3, ENDS, None, LABELS),
        ms.Chain(P3, ENDS, 0),
        ms.Chain(P3, {"harm": 1, "benign": 2}, 0, LABELS),
        ms.Chain(P3, {"harm": [1, 2]}, 0, LABELS),
        ms.Chain([[0.5, 0.5, 0], [0, 0, 0], [0, 0, 0]], ENDS, 0, LABELS),
        ms.Chain.layered([P3], ENDS, 0, LABELS),
        chain3(entry={0: 0}),
    ]
    assert chain.equals(chain3())
    assert not any(chain.equals(other) or other.equals(chain) for other in changed)


def test_files_advise_nothing_unsafe_and_say_what_is_missing(tmp_path):
    path = ms.write_chain(chain3(), tmp_path / "c.npz")
    whole = content(path)
    for write, says in (
        (lambda: path.write_bytes(pickle.dumps([1])), "no .npz archive"),
        (lambda: path.write_bytes(b"PAR1" + bytes(40)), "no .npz archive"),
        (lambda: path.write_bytes(b""), "empty"),
        (lambda: np.savez(path, **whole | {"meta": np.array([None], dtype=object)}), "Python objects"),
        (
            lambda: np.savez(path, **whole | {"meta": np.array('{"outcomes": {}, "states": null}')}),
            "'version' is missing",
        ),
    ):
        write()
        with pytest.raises(ms.InputError) as caught:
            ms.read_chain(path)
        assert says in caught.value.cause
        assert "unsafe" not in str(caught.value)
        assert "pickle" not in str(caught.value)


def foreign(path, **arrays):
    np.savez(path, **arrays)


def content(path) -> dict[str, np.ndarray]:
    with np.load(path) as file:
        return dict(file)


@pytest.mark.parametrize(
    "damage",
    [
        lambda p: p.write_bytes(b""),
        lambda p: p.write_bytes(b"not a chain"),
        lambda p: p.write_bytes(p.read_bytes()[:-200]),
        lambda p: p.write_bytes(p.read_bytes()[:300]),
        lambda p: p.write_bytes(p.read_bytes().replace(b"data.npy", b"dada.npy")),
        lambda p: np.save(p.with_suffix(".npy"), np.eye(2)) or p.with_suffix(".npy").replace(p),
        lambda p: foreign(p, x=np.eye(2)),
        lambda p: foreign(p, **{**content(p), "meta": np.array("{}")}),
        lambda p: foreign(p, **{**content(p), "meta": np.array("no json")}),
        lambda p: foreign(p, **{**content(p), "meta": np.array([None], dtype=object)}),
        lambda p: foreign(p, **{**content(p), "meta": np.array('{"version": 99, "outcomes": {}, "states": null}')}),
        lambda p: foreign(p, **{**content(p), "data": np.ones(5)}),
        lambda p: foreign(p, **{**content(p), "data": np.array(["a"] * 5)}),
        lambda p: foreign(p, **{**content(p), "indices": np.full(5, 9)}),
        lambda p: foreign(p, **{**content(p), "indptr": np.array([0, 5, 3, 5])}),
        lambda p: foreign(p, **{**content(p), "layers": np.array(2)}),
        lambda p: foreign(p, **{**content(p), "start": np.array([0.5, 0, 0])}),
        lambda p: foreign(p, **{**content(p), "start": np.array([1.0])}),
        lambda p: foreign(p, **{**content(p), "visits": np.ones(3)}),
        os.unlink,
    ],
)
def test_a_bad_file_is_an_error_with_a_next_step(tmp_path, damage):
    path = ms.write_chain(chain3(), tmp_path / "c.npz")
    damage(path)
    with pytest.raises(ms.InputError) as caught:
        ms.read_chain(path)
    assert str(path) in caught.value.fact
    assert caught.value.cause
    assert caught.value.next


@settings(quick, max_examples=150)
@given(st.integers(0, 2**32))
def test_a_file_with_flipped_bits_gives_a_chain_or_an_input_error(tmp_path_factory, seed):
    path = tmp_path_factory.mktemp("chain") / "c.npz"
    raw = bytearray(ms.write_chain(chain3(), path).read_bytes())
    rng = np.random.default_rng(seed)
    for at in rng.integers(0, len(raw), rng.integers(1, 4)):
        raw[at] ^= 1 << int(rng.integers(8))
    path.write_bytes(raw)
    with contextlib.suppress(ms.InputError):
        assert isinstance(ms.read_chain(path), ms.Chain)


def test_a_failing_write_keeps_the_old_file_and_leaves_nothing(tmp_path, monkeypatch):
    path = ms.write_chain(chain3(), tmp_path / "c.npz")

    def broken(file, **arrays):
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(np, "savez", broken)
    with pytest.raises(ms.InputError, match="disk full"):
        ms.write_chain(ms.Chain(np.eye(2), {"harm": 1}), path)
    assert ms.read_chain(path).equals(chain3())
    assert [p.name for p in tmp_path.iterdir()] == ["c.npz"]


def test_what_cannot_be_written_is_said(tmp_path):
    with pytest.raises(ms.InputError, match="folder"):
        ms.write_chain(chain3(), tmp_path / "absent" / "c.npz")
    with pytest.raises(ms.InputError, match="frozenset"):
        ms.write_chain(ms.Chain(P3, ENDS, states=["a", "b", frozenset({1})]), tmp_path / "c.npz")
    assert not list(tmp_path.iterdir())
