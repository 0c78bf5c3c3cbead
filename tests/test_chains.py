"""Chain: what it accepts, what it refuses and how it says so, and its file."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os

import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st

import markovsafety as ms
from markovsafety.chains import Evidence

quick = settings(deadline=None, derandomize=True, max_examples=40)
P3 = [[0.5, 0.25, 0.25], [0, 0, 0], [0, 0, 0]]
ENDS = {"harm": 1, "refusal": 2}
LABELS = ["begin", "harm", ("a", (1, -1))]
PLAIN_KEYS = ["data", "indices", "indptr", "layers", "meta", "shape", "start"]


def chain3(**more) -> ms.Chain:
    return ms.Chain(P3, ENDS, "begin", LABELS, **more)


label = st.recursive(
    st.integers(-5, 10**12) | st.text(max_size=4), lambda x: st.lists(x, max_size=3).map(tuple), max_leaves=4
)


@st.composite
def chains(draw) -> ms.Chain:
    n = draw(st.integers(2, 6))
    layers = draw(st.integers(0, 3))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    ends = draw(st.integers(1, n - 1))
    matrices = []
    for _ in range(max(layers, 1)):
        P = rng.random((n, n)) * (rng.random((n, n)) < 0.6) + np.eye(n) * 1e-3
        P /= P.sum(axis=1, keepdims=True)
        P[n - ends :] *= (rng.random(ends) < 0.3)[:, None]  # some outcomes leak, others absorb
        matrices.append(P)
    outcomes = {"harm": [n - 1]} if ends == 1 else {"harm": list(range(n - ends, n - 1)), "refusal": [n - 1]}
    start = draw(st.sampled_from([None, 0, "law"]))
    start = rng.dirichlet(np.ones(n)) if start == "law" else start
    names = draw(st.none() | st.lists(label, min_size=n, max_size=n, unique=True))
    if names and {"harm", "refusal"} & {x for x in names if isinstance(x, str)}:
        names = None
    if layers:
        return ms.Chain.layered(matrices, outcomes, start, names)
    return ms.Chain(matrices[0], outcomes, start, names)


# --- what a chain is ---------------------------------------------------------------------------------------------


@quick
@given(chains())
def test_rows_are_laws_and_arrays_cannot_be_written(chain):
    for matrix in chain.layers:
        assert np.abs(matrix.sum(axis=1) - 1).max() <= 1e-9
        assert matrix.data.min() > 0
        assert matrix.has_canonical_format
        with pytest.raises(ValueError, match="read-only"):
            matrix.data[0] = 0.5
    with pytest.raises(dataclasses.FrozenInstanceError):
        chain.P = None


@pytest.mark.parametrize(
    "convert",
    [
        np.array,
        lambda P: np.array(P, dtype=np.float32),
        sp.csr_array,
        sp.csc_matrix,
        sp.coo_array,
        sp.lil_matrix,
        sp.dok_array,
        lambda P: sp.bsr_array(np.array(P)),
        lambda P: [list(row) for row in P],
    ],
)
def test_every_matrix_format_gives_the_same_chain(convert):
    assert ms.Chain(convert(P3), ENDS, 0).equals(ms.Chain(P3, ENDS, 0))


def test_duplicates_are_summed_and_zeros_are_no_transitions():
    P = sp.coo_array(([0.25, 0.25, 0.25, 0.25, 0.0], ([0, 0, 0, 0, 1], [0, 0, 1, 2, 0])), shape=(3, 3))
    chain = ms.Chain(P, ENDS, 0)
    assert chain.equals(ms.Chain(P3, ENDS, 0))
    assert chain.P.nnz == 5  # three given, two absorbing diagonals
    raw = sp.csr_array(([0.25, 0.5, 0.25, 1.0], [0, 1, 0, 1], [0, 3, 4]), shape=(2, 2))
    assert ms.Chain(raw, {"harm": 1}).P.data.tolist() == [0.5, 0.5, 1.0]


def test_the_input_stays_the_callers():
    dense, start = np.array([[0.5, 0.5], [0.0, 1.0]]), np.array([1.0, 0])
    matrix = sp.csr_array(dense)
    chains = [ms.Chain(x, {"harm": 1}, start) for x in (dense, matrix)]
    dense[0, 0] = matrix.data[0] = start[0] = 7
    for chain in chains:
        assert chain.P[0, 0] == 0.5
        assert chain.start[0] == 1


def test_outcome_rows_absorb_when_empty_and_leak_when_given():
    P = np.array(P3)
    P[2] = [0.1, 0, 0.9]
    chain = ms.Chain(P, ENDS)
    assert chain.P.toarray().tolist() == [[0.5, 0.25, 0.25], [0, 1, 0], [0.1, 0, 0.9]]


def test_outcomes_by_index_label_mask_or_several():
    want = chain3().outcomes
    for outcomes in (
        {"harm": [1], "refusal": np.array([2])},
        {"harm": "harm", "refusal": ("a", (1, -1))},
        {"harm": np.array([False, True, False]), "refusal": [False, False, True]},
        {"harm": {1}, "refusal": range(2, 3)},
    ):
        got = ms.Chain(P3, outcomes, 0, LABELS).outcomes
        assert {k: v.tolist() for k, v in got.items()} == {k: v.tolist() for k, v in want.items()}
    several = ms.Chain(np.eye(4), {"harm": [3, 1], "none": []})
    assert several.mask("harm").tolist() == [False, True, False, True]
    assert not several.mask("none").any()


@quick
@given(chains())
def test_replacing_the_start_keeps_the_rest(chain):
    first = dataclasses.replace(chain, start=0)
    assert first.start[0] == 1
    assert dataclasses.replace(first, start=chain.start).equals(chain)


def test_start_by_index_label_or_law():
    for start in (0, np.int64(0), "begin", [1, 0, 0], np.array([1.0, 0, 0])):
        assert ms.Chain(P3, ENDS, start, LABELS).start.tolist() == [1, 0, 0]
    assert ms.Chain(P3, ENDS, ("a", (1, -1)), LABELS).start.tolist() == [0, 0, 1]
    assert ms.Chain(P3, ENDS).start is None


def test_mask_takes_outcomes_labels_indices_and_masks():
    chain = chain3()
    for target, want in (
        ("harm", [1]),
        ("begin", [0]),
        (("a", (1, -1)), [2]),
        (2, [2]),
        ([0, "harm"], [0, 1]),
        ((0, 2), [0, 2]),
        ({"begin", "harm"}, [0, 1]),
        (np.array([True, False, True]), [0, 2]),
        ([], []),
    ):
        assert np.flatnonzero(chain.mask(target)).tolist() == want
    for target in ("nothing", 3, -1, [True, False], None, 0.5, [[0]], ("q",)):
        with pytest.raises(ms.InputError):
            chain.mask(target)


def test_index_looks_labels_up_and_never_guesses():
    chain = ms.Chain(P3, ENDS, 0, [10, "harm", 0])
    assert (chain.index(10), chain.index(0)) == (0, 2)
    assert ms.Chain(P3, ENDS).index(1) == 1
    for absent in (1, "q", [0]):
        with pytest.raises(ms.InputError):
            chain.index(absent)


def test_repr_says_what_it_is():
    assert repr(chain3()) == (
        "<Chain 3 states, homogeneous, 5 transitions; outcomes harm (1), refusal (1); start: state 0 ('begin')>"
    )
    layered = ms.Chain.layered([P3, P3], ENDS, [0.5, 0.5, 0])
    assert repr(layered) == (
        "<Chain 3 states, 2 layers, 10 transitions; outcomes harm (1), refusal (1); start: a law over 2 states>"
    )


# --- what it refuses ---------------------------------------------------------------------------------------------

nan = float("nan")


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: ms.Chain([[0.5, 0.4], [0, 0]], {"harm": 1}), ["state 0", "0.9"]),
        (lambda: ms.Chain([[1.0, 2e-9], [0, 0]], {"harm": 1}), ["state 0", "1.000000002"]),
        (lambda: ms.Chain([[0, 0], [0, 0]], {"harm": 1}, states=["s", "h"]), ["'s'", "sums to 0"]),
        (lambda: ms.Chain([[0, 1], [0, 0.5]], {"harm": 1}, states=["s", "h"]), ["'h'", "0.5"]),
        (lambda: ms.Chain([[1.5, -0.5], [0, 0]], {"harm": 1}, states=["s", "h"]), ["-0.5", "'s'", "'h'"]),
        (lambda: ms.Chain([[nan, 1], [0, 0]], {"harm": 1}), ["nan", "state 0"]),
        (lambda: ms.Chain([[np.inf, 1], [0, 0]], {"harm": 1}), ["inf", "state 0"]),
        (lambda: ms.Chain([[0.5, 0.5]], {"harm": 1}), ["(1, 2)"]),
        (lambda: ms.Chain([[1], [0.5, 0.5]], {"harm": 1}), ["numeric"]),
        (lambda: ms.Chain([["a", "b"], ["c", "d"]], {"harm": 1}), ["numeric"]),
        (lambda: ms.Chain(np.eye(2) * 1j, {"harm": 1}), ["numeric"]),
        (lambda: ms.Chain(np.zeros((0, 0)), {"harm": 1}), ["(0, 0)"]),
        (lambda: ms.Chain(P3, {"harm": 3}), ["'harm'", "3"]),
        (lambda: ms.Chain(P3, {"harm": [-1]}), ["'harm'", "-1"]),
        (lambda: ms.Chain(P3, {"harm": [1, 2], "refusal": 2}), ["state 2", "'harm'", "'refusal'"]),
        (lambda: ms.Chain(P3, {"harm": [True, False]}), ["'harm'", "(2,)"]),
        (lambda: ms.Chain(P3, {"harm": "nowhere"}), ["'nowhere'"]),
        (lambda: ms.Chain(P3, {"harm": 1.5}), ["1.5"]),
        (lambda: ms.Chain(P3, {"harm": None}), ["None"]),
        (lambda: ms.Chain(P3, {}), ["{}"]),
        (lambda: ms.Chain(P3, {3: 1}), ["3"]),
        (lambda: ms.Chain(P3, {"harm": 0, "refusal": 2}, states=LABELS), ["'harm'", "state 1"]),
        (lambda: ms.Chain(P3, ENDS, 3), ["start", "3"]),
        (lambda: ms.Chain(P3, ENDS, "q"), ["start", "'q'"]),
        (lambda: ms.Chain(P3, ENDS, [0.5, 0.4, 0]), ["start", "0.9"]),
        (lambda: ms.Chain(P3, ENDS, [0.5, 0.5]), ["start", "(2,)"]),
        (lambda: ms.Chain(P3, ENDS, [1.5, -0.5, 0]), ["start", "-0.5", "state 1"]),
        (lambda: ms.Chain(P3, ENDS, [nan, 1, 0]), ["start", "nan"]),
        (lambda: ms.Chain(P3, ENDS, states=["a", "b"]), ["2 labels", "3"]),
        (lambda: ms.Chain(P3, ENDS, states=["a", "b", "a"]), ["0 and 2", "'a'"]),
        (lambda: ms.Chain(P3, ENDS, states=["a", "b", []]), ["[]"]),
        (lambda: ms.Chain(P3, ENDS, entry={2: [0.5, 0, 0]}), ["entry[2]", "0.5"]),
        (lambda: ms.Chain.layered([P3, np.eye(2)], ENDS), ["layer 1", "(2, 2)"]),
        (lambda: ms.Chain.layered([P3, np.eye(3) / 2], ENDS), ["layer 1", "0.5"]),
        (lambda: ms.Chain.layered([], ENDS), ["no layers"]),
        (lambda: ms.Chain.from_counts([[0, 0], [0, 0]], {"harm": 1}, states=["s", "h"]), ["'s'", "no counts"]),
        (lambda: ms.Chain.from_counts([[1, 0.5], [0, 0]], {"harm": 1}), ["0.5"]),
        (lambda: ms.Chain.from_counts([[1, -1], [0, 0]], {"harm": 1}), ["-1"]),
        (lambda: ms.Chain.from_counts([[1, nan], [0, 0]], {"harm": 1}), ["nan"]),
        (lambda: ms.Chain.from_counts([[1, 2**63], [0, 0]], {"harm": 1}), ["9.22"]),
        (lambda: ms.Chain.from_counts([[1, 2**70], [0, 0]], {"harm": 1}), [str(2**70)]),
        (lambda: ms.Chain.from_counts([["x", 1], [0, 0]], {"harm": 1}), ["x"]),
        (lambda: ms.Chain.from_counts([1, 2], {"harm": 1}), ["(2,)"]),
    ],
)
def test_refuses_and_says_fact_cause_and_next(make, says):
    with pytest.raises(ms.InputError) as caught:
        make()
    assert all(part in caught.value.fact for part in says), caught.value.fact
    assert caught.value.cause
    assert caught.value.next


# --- layers and counts -------------------------------------------------------------------------------------------


def test_layered_keeps_every_layer_as_given():
    other = np.array([[0.0, 1.0, 0.0], [0, 0, 0], [0, 0, 0]])
    chain = ms.Chain.layered([P3, sp.csc_array(other)], ENDS, 0)
    assert (chain.n_layers, chain.is_layered, chain.n_states) == (2, True, 3)
    assert [m.toarray()[0].tolist() for m in chain.P] == [P3[0], [0, 1, 0]]
    assert ms.Chain.layered(np.stack([P3, other]), ENDS, 0).equals(chain)
    assert not chain.mask("truncated").any()  # only what is left after the last layer
    with pytest.raises(ms.InputError):
        ms.Chain(P3, ENDS).mask("truncated")


def test_counts_are_kept_exactly():
    big = 2**62 + 1  # not a float64
    for C in ([[1, big, 3], [0, 0, 0], [5, 0, 0]], sp.coo_array(np.array([[1, big, 3], [0, 0, 0], [5, 0, 0]]))):
        chain = ms.Chain.from_counts(C, ENDS, 0)
        assert chain.integer_counts.dtype == np.int64
        assert chain.integer_counts.toarray().tolist() == [[1, big, 3], [0, 0, 0], [5, 0, 0]]
    small = ms.Chain.from_counts(np.array([[1.0, 2, 1], [0, 0, 0], [0, 0, 0]]), ENDS)
    assert small.P.toarray()[0].tolist() == [0.25, 0.5, 0.25]
    twice = sp.coo_array(([1, 1, 2], ([0, 0, 0], [0, 1, 1])), shape=(2, 2))
    assert ms.Chain.from_counts(twice, {"harm": 1}).integer_counts.toarray().tolist() == [[1, 3], [0, 0]]


# --- files -------------------------------------------------------------------------------------------------------


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
    with pytest.raises(OSError, match="disk full"):
        ms.write_chain(ms.Chain(np.eye(2), {"harm": 1}), path)
    assert ms.read_chain(path).equals(chain3())
    assert [p.name for p in tmp_path.iterdir()] == ["c.npz"]


def test_what_cannot_be_written_is_said(tmp_path):
    with pytest.raises(ms.InputError, match="folder"):
        ms.write_chain(chain3(), tmp_path / "absent" / "c.npz")
    with pytest.raises(ms.InputError, match="frozenset"):
        ms.write_chain(ms.Chain(P3, ENDS, states=["a", "b", frozenset({1})]), tmp_path / "c.npz")
    assert not list(tmp_path.iterdir())
