"""Rollouts: what they accept, how they are cut and joined, and that Parquet gives back what it was given."""

from __future__ import annotations

import json
import pickle
import struct

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from markovsafety import InputError, Rollouts, UntrustedError, read_rollouts, write_rollouts
from markovsafety.rollouts import Ragged

slow = settings(deadline=None, derandomize=True, max_examples=60)
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
IDS = st.integers(0, 2**31 - 1)


@st.composite
def rollouts(draw):
    rows = draw(st.integers(0, 6))
    answers = [draw(st.lists(IDS, max_size=5)) for _ in range(rows)]
    prefill, outcome, hit = [], [], []
    for answer in answers:
        k = draw(st.integers(0, len(answer)))
        code = draw(st.integers(-1, 3)) if k < len(answer) else draw(st.sampled_from([-1, 3]))
        prefill.append(k)
        outcome.append(code)
        hit.append(draw(st.integers(k, len(answer) - 1)) if code in (0, 1, 2) else -1)
    total = sum(map(len, answers))
    full = [draw(st.lists(st.floats(0, 1, width=32), min_size=total, max_size=total)) for _ in range(2)]
    many = {
        "logprob": [-x if x else np.nan for x in full[0]],
        "mass_harm": full[1],
        "prompt_tokens": [draw(st.lists(IDS, max_size=3)) for _ in range(rows)],
        "weight": draw(st.lists(st.floats(0, 1e300), min_size=rows, max_size=rows)),
        "seed": draw(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=rows, max_size=rows)),
        "text": draw(st.lists(st.none() | TEXT, min_size=rows, max_size=rows)),
        "raw": draw(st.lists(st.none() | TEXT, min_size=rows, max_size=rows)),
    }
    return Rollouts.of(
        answers,
        prompt_id=draw(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=rows, max_size=rows)),
        category=draw(st.lists(TEXT, min_size=rows, max_size=rows)),
        prefill=prefill,
        outcome=outcome,
        hit=hit,
        columns={name: many[name] for name in draw(st.sets(st.sampled_from(sorted(many))))},
        provenance=draw(st.dictionaries(TEXT, st.none() | st.integers() | TEXT, max_size=2)),
    )


def some(**changes):
    """Three judged rollouts of two prompts."""
    values = {"prompt_id": [0, 0, 1], "category": "a", "prefill": [0, 1, 0], "outcome": [0, 2, 3], "hit": [1, 2, -1]}
    return Rollouts.of([[5, 6], [7, 8, 2], []], **{**values, **changes})


# --- the type ---


def test_a_row_tells_what_was_forced_and_hit():
    rolls = some(columns={"logprob": [0, -1, np.nan, -2, -3], "text": ["x", None, ""]})
    assert len(rolls) == 3
    assert rolls.lengths.tolist() == [2, 3, 0]
    assert rolls.answer(1).tolist() == [7, 8, 2]
    assert rolls.answer(-1).tolist() == []
    assert np.array_equal(rolls.values("logprob", 1), [np.nan, -2, -3], equal_nan=True)
    assert rolls.text.tolist() == ["x", None, ""]
    assert rolls.weight.tolist() == [1, 1, 1]
    assert repr(rolls) == "Rollouts(3 of 2 prompts, prefill 0, 1: 1 harm, 1 benign, 1 truncated)"


def test_arrays_are_read_only_and_the_type_is_frozen():
    rolls = some(columns={"weight": [1, 2, 3]})
    for array in (rolls.tokens, rolls.hit, rolls.category, rolls.columns["weight"], rolls.answer(0)):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = array[0]
    with pytest.raises(AttributeError):
        rolls.tokens = np.zeros(3, np.int32)


@slow
@given(rollouts(), st.data())
def test_slicing_agrees_with_lists(rolls, data):
    n = len(rolls)
    rows = data.draw(st.lists(st.integers(-n, n - 1), max_size=6)) if n else []
    mask = np.array(data.draw(st.lists(st.booleans(), min_size=n, max_size=n)), dtype=bool)
    cut = data.draw(st.slices(n))
    for which, expected in ((np.array(rows, int), rows), (mask, np.flatnonzero(mask)), (cut, range(n)[cut])):
        part = rolls[which]
        assert [a.tolist() for a in part.answers()] == [rolls.answer(i).tolist() for i in expected]
        assert part.category.tolist() == [rolls.category[i] for i in expected]
        assert part.hit.tolist() == [rolls.hit[i] for i in expected]
        assert part.columns.keys() == rolls.columns.keys()
        if "logprob" in rolls.columns:
            pairs = [(part.values("logprob", j), rolls.values("logprob", i)) for j, i in enumerate(expected)]
            assert all(np.array_equal(a, b, equal_nan=True) for a, b in pairs)
        if "prompt_tokens" in rolls.columns:
            prompts = rolls.columns["prompt_tokens"]
            assert [a.tolist() for a in part.columns["prompt_tokens"]] == [prompts[i].tolist() for i in expected]


@slow
@given(rollouts(), st.integers(0, 6))
def test_concat_undoes_slicing(rolls, at):
    parts = [rolls[:at], rolls[at:]]
    assert Rollouts.concat(parts) == rolls
    assert Rollouts.concat(parts).provenance == rolls.provenance
    assert Rollouts.concat(list(rolls)) == rolls or len(rolls) == 0


def test_concat_of_different_columns_says_what_it_dropped():
    a = some(columns={"weight": [2, 2, 2], "text": ["a", "b", "c"]}, provenance={"run": 1})
    both = Rollouts.concat([a, some(provenance={"run": 2})])
    assert both.weight.tolist() == [2, 2, 2, 1, 1, 1]
    assert both.columns.keys() == {"weight"}
    assert both.provenance == {"parts": [{"run": 1}, {"run": 2}], "dropped_columns": ["text"]}
    assert len(Rollouts.concat([])) == 0


def test_outcomes_may_be_given_by_name():
    assert some(outcome=["harm", "benign", "truncated"]) == some()
    assert some(outcome=["harm", None, None], hit=[1, -1, -1]).outcome.tolist() == [0, -1, -1]
    assert Rollouts.of([[5], [6]], prompt_id=[0, 1], outcome="harm", hit=0).outcome.tolist() == [0, 0]
    assert len(Rollouts.of([], prompt_id=[], outcome=np.array([], dtype=object))) == 0


def test_equality_sees_every_column():
    rolls = some(columns={"logprob": [np.nan] * 5})
    assert rolls == some(columns={"logprob": [np.nan] * 5}, provenance={"x": 1})
    assert rolls != some()
    assert rolls != some(columns={"logprob": [0.0] * 5})
    assert some() != some(hit=[0, 2, -1])
    assert some() != some(category="b")
    assert some() != 3
    assert Ragged.of([[1], []]) != Ragged.of([[], [1]])


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"prefill": [0, 4, 0]}, "column prefill, row 1: 4 forced tokens in an answer of 3"),
        ({"prefill": [0, -1, 0]}, "column prefill, row 1: -1"),
        ({"hit": [1, 3, -1]}, "column hit, row 1: token 3 of an answer of 3 tokens"),
        ({"hit": [1, 0, -1]}, "column hit, row 1: token 0 is one of the 1 forced ones"),
        ({"hit": [-1, 2, -1]}, "column hit, row 0: outcome harm without the token"),
        ({"outcome": [0, 3, 3]}, "column hit, row 1: token 2 hit, but the answer is truncated"),
        ({"outcome": [0, 2, 4]}, "column outcome, row 2: code 4 is unknown"),
        ({"outcome": ["harm", "Benign", None]}, "column outcome, row 1: unknown outcome 'Benign'"),
        ({"category": ["a", None, "b"]}, "column category, row 1: None is no text"),
        ({"prompt_id": [0, 0]}, "column prompt_id has 2 rows, the answers are 3"),
        ({"prompt_id": [0, 0, 2**63]}, "column prompt_id does not fit int64"),
        ({"prefill": [0, 0.5, 0]}, "column prefill does not fit int32"),
        ({"columns": {"weight": [1.0, [], 1.0]}}, "column weight does not hold one value per entry"),
        ({"columns": {"weight": [1, np.nan, 1]}}, "column weight, row 1: nan is no weight"),
        ({"columns": {"weight": [1, 1, -1]}}, "column weight, row 2: -1.0 is no weight"),
        ({"columns": {"logprob": [0, 0]}}, "column logprob has 2 numbers for 5 tokens"),
        ({"columns": {"mass_harm": [0, 0, 9, 2, 0]}}, "column mass_harm, row 1"),
        ({"columns": {"mass_harm": [0, np.nan, 0, 0, 0]}}, "column mass_harm, row 0"),
        ({"columns": {"text": ["a", 3, "b"]}}, "column text, row 1: 3 is no text"),
        ({"columns": {"prompt_tokens": [[1], [2, -3], []]}}, "column prompt_tokens, row 1"),
        ({"columns": {"surprise": [1, 2, 3]}}, "unknown column 'surprise'"),
    ],
)
def test_contradictions_are_named(changes, says):
    with pytest.raises(InputError) as caught:
        some(**changes)
    assert says in str(caught.value)


def test_token_ids_are_never_wrapped():
    for ids in ([2**31], [2**32 + 5], [-1], [1.5]):
        with pytest.raises(InputError, match="tokens"):
            Rollouts(np.array(ids), [0, 1], [0], ["a"], [0], [-1], [-1])
    with pytest.raises(InputError, match="offsets"):
        Rollouts(np.array([1, 2]), [0, 3], [0], ["a"], [0], [-1], [-1])
    with pytest.raises(InputError, match="mask of shape"):
        some()[np.array([True])]
    with pytest.raises(InputError, match="no text was kept"):
        _ = some().text


# --- Parquet ---


@slow
@given(rolls=rollouts())
def test_reading_gives_back_what_was_written(tmp_path_factory, rolls):
    path = tmp_path_factory.mktemp("round") / "x.parquet"
    write_rollouts(rolls, path)
    again = read_rollouts(path)
    assert again == rolls
    assert again.provenance == rolls.provenance
    assert [a.dtype for a in (again.tokens, again.hit, again.outcome)] == [np.int32, np.int32, np.int8]


def test_the_file_has_the_types_of_the_contract(tmp_path):
    write_rollouts(some(columns={"logprob": [0.0] * 5, "prompt_tokens": [[1]] * 3}), tmp_path / "new" / "x.parquet")
    schema = pq.read_schema(tmp_path / "new" / "x.parquet")
    kinds = {name: str(schema.field(name).type) for name in schema.names}
    assert kinds.pop("logprob") == "list<element: float>"
    assert kinds.pop("tokens") == kinds.pop("prompt_tokens") == "list<element: int32>"
    numbers = {"prompt_id": "int64", "prefill": "int32", "hit": "int32"}
    assert kinds == {**numbers, "category": "string", "outcome": "string"}
    table = pq.read_table(tmp_path / "new" / "x.parquet")
    assert table["outcome"].to_pylist() == ["harm", "benign", "truncated"]
    assert table["hit"].to_pylist() == [1, 2, None]


def foreign(**changes):
    columns = {
        "prompt_id": pa.array([0, 0, 1], pa.int32()),
        "category": pa.array(["a", "b", "a"]).dictionary_encode(),
        "tokens": pa.array([[5, 6], [7, 8, 2], []], pa.large_list(pa.int64())),
        "prefill": pa.array([0, 1, 0], pa.int64()),
        "outcome": pa.array(["harm", None, "truncated"], pa.large_string()),
        "hit": pa.array([1, None, None], pa.int64()),
    }
    return {name: column for name, column in {**columns, **changes}.items() if column is not None}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tokens": pa.array([[5, 6], [7, 8, 2], []], pa.list_(pa.uint16()))},
        {"hit": pa.array([1.0, np.nan, None], pa.float64())},  # as pandas writes integers with nulls
        {"hit": pa.array([1, None, None], pa.uint8())},
        {"outcome": pa.array(["harm", None, "truncated"]).dictionary_encode()},
        {"extra": pa.array([1, 2, 3])},
        {"logprob": pa.array([[0.0, -1.0], [None, -2.0, -3.0], []], pa.large_list(pa.float64()))},
    ],
)
def test_foreign_files_are_accepted(tmp_path, changes):
    pq.write_table(pa.table(foreign(**changes)), tmp_path / "x.parquet", row_group_size=2)
    rolls = read_rollouts(tmp_path / "x.parquet")
    assert [a.tolist() for a in rolls.answers()] == [[5, 6], [7, 8, 2], []]
    assert rolls.outcome.tolist() == [0, -1, 3]
    assert rolls.hit.tolist() == [1, -1, -1]
    assert rolls.category.tolist() == ["a", "b", "a"]
    assert rolls.provenance == ({"ignored_columns": ["extra"]} if "extra" in changes else {})


def test_a_foreign_file_of_fixed_lists_and_chunks(tmp_path):
    tokens = pa.array([[5, 6], [7, 8], [9, 2]], pa.list_(pa.int32(), 2))
    table = pa.table(foreign(tokens=tokens, hit=pa.array([None] * 3), outcome=pa.array([None] * 3)))
    pq.write_table(pa.concat_tables([table, table.slice(1)]), tmp_path / "x.parquet")
    rolls = read_rollouts(tmp_path / "x.parquet")
    assert rolls.tokens.tolist() == [5, 6, 7, 8, 9, 2, 7, 8, 9, 2]
    assert set(rolls.outcome.tolist()) == {-1}


def test_a_benign_answer_was_hit_at_its_last_token(tmp_path):
    outcome = pa.array(["harm", "benign", "truncated"])
    pq.write_table(pa.table(foreign(outcome=outcome)), tmp_path / "x.parquet")
    rolls = read_rollouts(tmp_path / "x.parquet")
    assert rolls.outcome.tolist() == [0, 2, 3]
    assert rolls.hit.tolist() == [1, 2, -1]
    pq.write_table(pa.table(foreign(outcome=outcome, hit=pa.array([1, 1, None]))), tmp_path / "y.parquet")
    assert read_rollouts(tmp_path / "y.parquet").hit.tolist() == [1, 1, -1]  # a hit that is given stays


def test_wrong_types_are_refused(tmp_path):
    for wrong in (None, [[5, 6]], "x", {"tokens": []}):
        with pytest.raises(InputError, match="cannot be written as rollouts"):
            write_rollouts(wrong, tmp_path / "x.parquet")
    assert not list(tmp_path.iterdir())
    with pytest.raises(InputError, match="int is no path"):
        read_rollouts(5)


def test_errors_keep_what_they_say_when_copied():
    error = UntrustedError("a fact", cause="a cause", next="a step", partial=[1])
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is UntrustedError
    assert str(again) == str(error) == "a fact\n  cause: a cause\n  next:  a step"
    assert (again.fact, again.cause, again.next, again.partial) == ("a fact", "a cause", "a step", [1])
    for missing in ({"cause": "x"}, {"next": "x"}, {}):
        with pytest.raises(TypeError):
            InputError("a fact", **missing)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"tokens": None}, "has no column tokens"),
        ({"hit": None, "prefill": None}, "has no column prefill, hit"),
        ({"tokens": pa.array(["5 6", "7", ""])}, "column tokens has type string"),
        ({"tokens": pa.array([[5.0], [7.0], []])}, "column tokens has type list"),
        ({"tokens": pa.array([[5], None, []])}, "column tokens, row 1: the value is missing"),
        ({"tokens": pa.array([[5], [6, None], []])}, "column tokens, row 1: an id is missing"),
        ({"tokens": pa.array([[5, 6], [7, -8, 2], []])}, "column tokens, row 1: an id outside"),
        ({"tokens": pa.array([[5, 6], [7, 8, 2**40], []])}, "column tokens, row 1: an id outside"),
        ({"prompt_id": pa.array(["a", "b", "c"])}, "column prompt_id has type string"),
        ({"prompt_id": pa.array([0, None, 1])}, "column prompt_id, row 1: the value is missing"),
        ({"category": pa.array([1, 2, 3])}, "column category has type int64"),
        ({"category": pa.array(["a", None, "b"])}, "column category, row 1: the value is missing"),
        ({"prefill": pa.array([0, 4, 0])}, "column prefill, row 1: 4 forced tokens in an answer of 3"),
        ({"prefill": pa.array([0.0, 1.0, 0.0])}, "column prefill has type double"),
        ({"outcome": pa.array(["harm", "harmful", None])}, "column outcome, row 1: unknown outcome 'harmful'"),
        ({"outcome": pa.array(["harm", "refusal", None])}, "column hit, row 1: outcome refusal without the token"),
        ({"hit": pa.array([None] * 3)}, "column hit, row 0: outcome harm without the token"),
        ({"outcome": pa.array(["harm", None, "benign"])}, "column hit, row 2: outcome benign without the token"),
        ({"hit": pa.array([5, None, None])}, "column hit, row 0: token 5 of an answer of 2"),
        ({"hit": pa.array([-1, None, None])}, "column hit, row 0: -1 is negative"),
        ({"hit": pa.array([0.5, None, None])}, "column hit, row 0: 0.5 is no index"),
        ({"weight": pa.array([1.0, float("nan"), 1.0])}, "column weight, row 1: nan is no weight"),
        ({"logprob": pa.array([[0.0], [0.0, 0.0, 0.0], []])}, "column logprob, row 0: not one number per token"),
    ],
)
def test_bad_files_are_named_with_column_and_row(tmp_path, changes, says):
    path = tmp_path / "strange.parquet"
    pq.write_table(pa.table(foreign(**changes)), path)
    with pytest.raises(InputError) as caught:
        read_rollouts(path)
    assert says in caught.value.fact
    assert str(path) in caught.value.fact


def test_what_is_no_parquet_file(tmp_path):
    (tmp_path / "a.parquet").write_text("prompt_id,tokens\n")
    with pytest.raises(InputError, match="cannot be read as Parquet"):
        read_rollouts(tmp_path / "a.parquet")
    with pytest.raises(InputError, match="does not exist"):
        read_rollouts(tmp_path / "b.parquet")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds no rollouts"):
        read_rollouts(tmp_path / "empty")


def test_a_newer_format_is_refused(tmp_path):
    table = pa.table(foreign()).replace_schema_metadata({b"markovsafety": b'{"format": 99, "provenance": {}}'})
    pq.write_table(table, tmp_path / "x.parquet")
    with pytest.raises(InputError, match="format 99 is newer"):
        read_rollouts(tmp_path / "x.parquet")


def test_damaged_bytes_never_raise_anything_else_nor_change_data(tmp_path):
    rolls = some(columns={"logprob": [0.0, -1, -2, -3, -4], "text": ["ä", None, "b" * 40], "seed": [1, 2, 3]})
    path = write_rollouts(rolls, tmp_path / "x.parquet")
    whole = path.read_bytes()
    footer = len(whole) - 8 - struct.unpack("<I", whole[-8:-4])[0]
    rng, refused = np.random.default_rng(0), []
    for place in [*rng.integers(0, len(whole), 400).tolist(), *range(footer - 5, footer + 5)]:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)
        try:
            again = read_rollouts(path)
        except InputError as error:
            refused.append(error.fact)
        else:
            assert place >= footer or again == rolls  # pages carry checksums
    assert len(refused) > 200
    assert all(str(path) in fact for fact in refused)
    for size in rng.integers(0, len(whole), 60):
        path.write_bytes(whole[:size])
        with pytest.raises(InputError, match="cannot be read as Parquet"):
            read_rollouts(path)


def test_writing_is_all_or_nothing(tmp_path, monkeypatch):
    path = write_rollouts(some(), tmp_path / "x.parquet")
    before = path.read_bytes()

    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(pq.ParquetWriter, "write_table", fail)
    with pytest.raises(KeyboardInterrupt):
        write_rollouts(some()[:1], path)
    assert [file.name for file in tmp_path.iterdir()] == ["x.parquet"]
    assert path.read_bytes() == before


def test_what_cannot_be_written(tmp_path):
    for rolls, says in [
        (some(provenance={"x": np.arange(3)}), "provenance"),
        (some(provenance={"x": float("nan")}), "provenance"),
        (some(category="\ud800"), "column category holds text that is not Unicode"),
    ]:
        with pytest.raises(InputError, match=says):
            write_rollouts(rolls, tmp_path / "x.parquet")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write"):
        write_rollouts(some(), tmp_path / "file" / "x.parquet")
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_a_folder_of_shards_in_order(tmp_path):
    parts = [some(prompt_id=[i, i, i + 1]) for i in range(12)]
    for i, part in enumerate(parts):
        write_rollouts(part, tmp_path / f"part-{i:05d}.parquet")
    assert read_rollouts(tmp_path) == Rollouts.concat(parts)
    manifest = {"shards": 14, "total": 42, "provenance": {}}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    rolls = read_rollouts(tmp_path)
    assert rolls == Rollouts.concat(parts)
    assert rolls.provenance["complete"] is False
    assert "36 of 42 rollouts, 2 of 14 shards missing, part-00012.parquet the first" in rolls.provenance["note"]
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(InputError, match="damaged"):
        read_rollouts(tmp_path)


def test_many_rollouts_go_into_several_row_groups(tmp_path, monkeypatch):
    monkeypatch.setattr("markovsafety.rollouts.parquet.ROWS", 2)
    path = write_rollouts(some(), tmp_path / "x.parquet")
    assert pq.ParquetFile(path).num_row_groups == 2
    assert read_rollouts(path) == some()
