"""The runner of ./run test: nothing that went wrong, or did not run at all, may look green."""

from __future__ import annotations

import textwrap

import pytest
import run_tests
from run_tests import Part, Runner

CASES = {  # source -> passed, failed
    "def test_a(): pass\ndef test_b(): pass": (2, 0),
    "def test_a(): pass\ndef test_b(): assert False": (1, 1),
    "import pytest\n@pytest.mark.skip(reason='later')\ndef test_a(): pass\ndef test_b(): pass": (1, 1),
    "import pytest\ndef test_a(): pytest.skip('not here: no such program')\ndef test_b(): pass": (1, 0),
    "import pytest\n@pytest.mark.xfail(strict=True)\ndef test_a(): assert False": (0, 1),
    "import pytest\n@pytest.mark.full\ndef test_a(): assert False\ndef test_b(): pass": (1, 0),
    "import pytest\n@pytest.mark.full\ndef test_a(): pass": (0, 0),
    "import pytest\n@pytest.fixture\ndef x(): raise ValueError\ndef test_a(x): pass\ndef test_b(): pass": (1, 1),
    "x = 1": (0, 1),
    "import no_such_module\ndef test_a(): pass": (0, 1),
    "import os\ndef test_a(): pass\ndef test_b(): os._exit(3)": (0, 1),
    "import warnings\ndef test_a(): warnings.warn('x')": (0, 1),
}


def outcome(tmp_path, source, *marks):
    file = tmp_path / "test_case.py"
    file.write_text(textwrap.dedent(source))
    config = str(run_tests.ROOT / "pyproject.toml")
    return Runner(full=False, lanes=1)(Part("other", "case", ["pytest", "-c", config, str(file), *marks], file))


@pytest.mark.parametrize("source", CASES, ids=range(len(CASES)))
def test_counts(tmp_path, source):
    got = outcome(tmp_path, source)
    assert (got.passed, got.failed) == CASES[source], got.output


def test_full_runs_the_long_ones(tmp_path):
    got = outcome(tmp_path, "import pytest\n@pytest.mark.full\ndef test_a(): pass\ndef test_b(): pass", "-m", "")
    assert (got.passed, got.failed) == (2, 0)


def test_a_hanging_file_is_stopped(tmp_path, monkeypatch):
    monkeypatch.setitem(run_tests.PATIENCE, False, 2)
    got = outcome(tmp_path, "import threading\ndef test_a(): threading.Event().wait()")
    assert (got.passed, got.failed) == (0, 1)
    assert "stopped after 2 s" in got.notes


def test_every_file_is_run():
    files = {p.name for p in run_tests.TESTS.iterdir() if p.name.startswith("test_")}
    todo = run_tests.parts(full=False)
    assert files == {p.title for p in todo if p.file}
    assert {"basedpyright", "ruff check", "ruff format"} == {p.title for p in todo if not p.file}
    assert run_tests.area_of(run_tests.TESTS / "test_something_new.py") == "other"


def test_tools_count_as_one():
    assert run_tests.count_tool(0, run_tests.LOG, "")[:2] == (1, 0)
    assert run_tests.count_tool(1, run_tests.LOG, "")[:2] == (0, 1)
