"""Every public name has an example in its docstring; the examples run and print what stands below them.

``np`` (numpy) and ``ms`` (markovsafety) are there; an example imports or makes whatever else it shows.
"""

from __future__ import annotations

import doctest
import importlib
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_docs_examples import LOOSE, failures

import markovsafety as ms

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "docs" / "extensions"))
import rooms  # the reference's own list of rooms and names

PARSER = doctest.DocTestParser()


def constant_of(room: str, name: str) -> Any:
    return getattr(importlib.import_module(f"markovsafety.{room}"), name)


def documented() -> Iterator[tuple[str, Any]]:
    """(room.file.name, the thing) of every public name that carries a docstring of its own."""
    for room in rooms.ROOMS:
        module = importlib.import_module(f"markovsafety.{room}")
        for name, file in rooms.names(room).items():
            thing = getattr(module, name)
            if not rooms.is_data(thing):
                yield f"{room}.{file}.{name}", thing


def examples(name: str, thing: Any) -> doctest.DocTest:
    return PARSER.get_doctest(inspect.getdoc(thing) or "", {"np": np, "ms": ms}, name, None, 0)


THINGS = dict(documented())
TOLD = {name: thing for name, thing in THINGS.items() if ">>> " in (inspect.getdoc(thing) or "")}


def test_every_public_name_has_an_example():
    assert len(THINGS) > 400
    assert not sorted(THINGS.keys() - TOLD.keys())


def shows(name: str, test: doctest.DocTest) -> bool:
    """Whether an example uses the name, or prints what it is (the type of a result)."""
    last = name.rsplit(".", 1)[-1]
    return any(last in example.source or last in example.want for example in test.examples)


@pytest.mark.parametrize("name", TOLD)
def test_example_prints_what_stands_below_it(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    test = examples(name, TOLD[name])
    assert shows(name, test), f"no line of the example of {name} has its name"
    assert failures(test) == ""


@pytest.mark.parametrize(
    ("room", "name"),
    [(r, n) for r in rooms.ROOMS for n in rooms.names(r) if rooms.is_data(constant_of(r, n))],
)
def test_constants_are_shown_as_they_are(room, name):
    shown = rooms.seen(f"ms.{room}.{name}", constant_of(room, name))
    text = "".join(f">>> {line}\n{told}\n" for line, told in shown)
    assert failures(PARSER.get_doctest(text, {"ms": ms}, name, None, 0)) == ""
    assert "".join(line.strip() for line in rooms.constant(room, name, constant_of(room, name))).count(">>>") == 1


def test_an_example_without_the_name_is_noticed():
    assert not shows("room.file.name", PARSER.get_doctest(">>> 1 + 1\n2\n", {}, "other", None, 0))
    assert shows("room.file.name", PARSER.get_doctest(">>> name()\n", {}, "call", None, 0))
    assert LOOSE & doctest.ELLIPSIS
