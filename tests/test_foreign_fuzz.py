"""Damaged and hostile files: a reader answers or says why not; see `fuzzing` for how they are made."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import fuzzed_readers
import pytest
from fuzzing import Reader, attempt, fuzz, limits
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from markovsafety import InputError, ModelError
from markovsafety.chains.storage import read_chain
from markovsafety.rollouts.template import Template

TESTS = Path(__file__).resolve().parent
MANY = 32_000
"""Inputs of each reader in the full run: with those that coverage steers more than a million."""
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=12,
)


@pytest.mark.parametrize("make", fuzzed_readers.ALL, ids=lambda make: make.__name__)
def test_a_damaged_file_is_read_or_refused_in_our_words(make, tmp_path):
    reader = make(tmp_path)
    with limits(), warnings.catch_warnings():
        warnings.simplefilter("error")
        for good in reader.seeds:
            assert attempt(reader, tmp_path / reader.file, good) is None
        assert not fuzz(reader, tmp_path, runs=60, seed=7)


def test_good_files_are_read(tmp_path):
    """A reader that refuses everything would pass the test above."""
    for i, make in enumerate(fuzzed_readers.ALL):
        (folder := tmp_path / str(i)).mkdir()
        reader = make(folder)
        for good in reader.seeds:
            (folder / reader.file).write_bytes(good)
            reader.read(folder / reader.file)


@pytest.mark.parametrize("what", ["crash", "hang", "memory"])
def test_the_harness_finds_what_it_is_for(what, tmp_path, monkeypatch):
    monkeypatch.setattr("fuzzing.PATIENCE", 0.1)

    def read(path):
        if path.read_bytes() == b"good":
            return
        if what == "crash":
            raise KeyError("x")
        while what == "hang":
            pass
        bytearray(1 << 40)

    reader = Reader("broken", "x", [b"good"], read, lambda data, rng: data + b"!")
    with limits():
        found = fuzz(reader, tmp_path, runs=5)
    assert found
    assert {"crash": "KeyError", "hang": "longer than", "memory": "MemoryError"}[what] in found[0]
    assert (tmp_path / "found-0-x").read_bytes() != b"good"


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(values=st.lists(JSON, min_size=1, max_size=3))
def test_any_json_at_all_as_records(values, tmp_path):
    data = fuzzed_readers.lines(values)
    for make in (fuzzed_readers.log, fuzzed_readers.prompts, fuzzed_readers.pairs, fuzzed_readers.triplets):
        reader = make(tmp_path)
        with limits():
            assert attempt(reader, tmp_path / reader.file, data) is None


def test_an_archive_of_python_objects_is_refused_unread(tmp_path):
    """What the pickle would run is a file that must not appear."""
    import numpy as np

    mark = tmp_path / "ran"

    class Dangerous:
        def __reduce__(self):
            return (Path.touch, (mark,))

    np.savez(tmp_path / "x.npz", data=np.array([Dangerous()], dtype=object))
    with pytest.raises(InputError, match="not a readable chain file") as caught:
        read_chain(tmp_path / "x.npz")
    assert "never loaded" in caught.value.cause
    assert not mark.exists()


@pytest.mark.parametrize("make", [fuzzed_readers.EDIT, fuzzed_readers.DIRECTION], ids=lambda make: make.__name__)
def test_numbers_beyond_float32_are_refused_without_a_warning(make, tmp_path):
    """Found by the full run: a file of float64 whose numbers overflow on their way into float32."""
    import numpy as np
    from safetensors.numpy import load, save

    reader = make(tmp_path)
    (good,) = reader.seeds
    words = json.loads(good[8 : 8 + int.from_bytes(good[:8], "little")])["__metadata__"]
    huge = {name: np.full(array.shape, 1e300) for name, array in load(good).items()}
    (tmp_path / reader.file).write_bytes(save(huge, words))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(InputError, match="finite"):
            reader.read(tmp_path / reader.file)


def test_a_threshold_beyond_all_floats_is_refused_as_it_is_read(tmp_path):
    """Found by the full run: JSON knows whole numbers of any size."""
    from safetensors.numpy import load, save

    reader = fuzzed_readers.FILTER(tmp_path)
    (good,) = reader.seeds
    words = json.loads(good[8 : 8 + int.from_bytes(good[:8], "little")])["__metadata__"]
    words["about"] = json.dumps({**json.loads(words["about"]), "threshold": 10**400})
    (tmp_path / reader.file).write_bytes(save(dict(load(good)), words))
    with pytest.raises(InputError, match="only part of a filter"):
        reader.read(tmp_path / reader.file)


def test_a_chat_template_reaches_nothing_outside_itself(tmp_path):
    fuzzed_readers.chat_template(tmp_path)
    for source in (
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__init__.__globals__ }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{% for i in range(10**9) %}x{% endfor %}",
    ):
        (tmp_path / "chat_template.jinja").write_text(source)
        with pytest.raises((InputError, ModelError)):
            Template.load(tmp_path).prompt_ids("hello")


@pytest.mark.full
@pytest.mark.parametrize("make", fuzzed_readers.ALL, ids=lambda make: make.__name__)
def test_a_million_damaged_files(make, tmp_path):
    assert MANY * len(fuzzed_readers.ALL) >= 10**6
    reader = make(tmp_path)
    with limits(), warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not fuzz(reader, tmp_path, runs=MANY, seed=1)


@pytest.mark.full
@pytest.mark.parametrize("name", ["chain", "counts", "log", "prompts", "rollouts", "edit", "model_config", "tokenizer"])
def test_damage_steered_by_coverage(name, tmp_path):
    pytest.importorskip("atheris", reason="not here: atheris has no wheel for this platform")
    words = [sys.executable, "fuzzing.py", "--atheris", "--reader", name, "--runs", "20000", "--keep", str(tmp_path)]
    ran = subprocess.run(words, cwd=TESTS, capture_output=True, text=True, timeout=3000, env={**os.environ})
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert int(re.search(r"number_of_executed_units: (\d+)", ran.stderr)[1]) >= 20000
