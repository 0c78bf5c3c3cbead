"""Examples of the documentation run and print what stands below them; commands that it shows exist."""

from __future__ import annotations

import doctest
import re
import shlex
from pathlib import Path

import pytest

from markovsafety import cli
from markovsafety.errors import InputError

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md")) + sorted((ROOT / "docs" / "howto").glob("*.md"))
LOOSE = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS


def blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", path.read_text(encoding="utf-8"), re.M | re.S)


def examples(path: Path) -> doctest.DocTest:
    """All of a page as one session: later blocks use what earlier ones made."""
    text = "\n".join(block for block in blocks(path, "python") if ">>>" in block)
    return doctest.DocTestParser().get_doctest(text, {}, path.name, str(path), 0)


def failures(test: doctest.DocTest) -> str:
    told: list[str] = []
    doctest.DocTestRunner(optionflags=LOOSE).run(test, out=told.append, clear_globs=True)
    return "".join(told)


@pytest.mark.parametrize("path", [p for p in PAGES if ">>>" in p.read_text("utf-8")], ids=lambda p: p.stem)
def test_examples_print_what_stands_below_them(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    test = examples(path)
    assert test.examples
    assert failures(test) == ""


def test_a_wrong_example_is_noticed():
    parser = doctest.DocTestParser()
    assert failures(parser.get_doctest(">>> 1 + 1\n2\n", {}, "right", None, 0)) == ""
    assert "Expected" in failures(parser.get_doctest(">>> 1 + 1\n3\n", {}, "wrong", None, 0))
    assert "ZeroDivisionError" in failures(parser.get_doctest(">>> x = 1 / 0\n", {}, "raises", None, 0))


def command_lines(path: Path) -> list[str]:
    joined = "\n".join(blocks(path, "sh")).replace("\\\n", " ")
    lines = [line.split("  #")[0].strip() for line in joined.splitlines()]
    return [line for line in lines if line.startswith("markovsafety ")]


SHOWN = [(p, line) for p in PAGES for line in command_lines(p)]


@pytest.mark.parametrize(("path", "line"), SHOWN, ids=[f"{p.stem}: {line[:40]}" for p, line in SHOWN])
def test_commands_that_are_shown_can_be_typed(path, line):
    cli._parser().parse_args(shlex.split(line)[1:])


def test_a_wrong_command_is_noticed():
    with pytest.raises(InputError):
        cli._parser().parse_args(["sample", "model", "--no-such-option"])
