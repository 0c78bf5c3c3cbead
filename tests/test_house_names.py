"""Public names stay what they are, whatever is imported."""

from __future__ import annotations

import importlib
from pathlib import Path

import markovsafety

PACKAGE = Path(markovsafety.__file__).parent


def test_no_file_hides_a_public_name_of_its_room():
    """An import of room/name.py sets room.name to the file, also where name is a function of the room."""
    hidden, both = [], 0
    for door in PACKAGE.glob("*/__init__.py"):
        room = importlib.import_module(f"markovsafety.{door.parent.name}")
        for name in set(getattr(room, "__all__", ())) & {p.stem for p in door.parent.glob("*.py")}:
            inside = importlib.import_module(f"{room.__name__}.{name}")
            if hasattr(inside, name):
                both += 1
                hidden += [] if getattr(room, name) is getattr(inside, name) else [f"{room.__name__}.{name}"]
    assert both > 10
    assert not hidden, hidden
