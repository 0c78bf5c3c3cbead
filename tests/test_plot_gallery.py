"""The gallery shows every figure of the package, as its docstring's example draws it, for every ground and width."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from test_plot_columns import DRAW

from markovsafety import plot

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "docs" / "extensions"))

import gallery  # noqa: E402

TEXT = (ROOT / "docs" / "gallery.md").read_text("utf-8")
SHOWN = dict(re.findall(r"^```\{shown\} (\w+)\n(.*?)^```$", TEXT, re.M | re.S))


def test_every_figure_is_shown_once_and_said_in_words():
    assert SHOWN.keys() == DRAW.keys() | {"flow"}
    assert TEXT.count("{shown}") == len(SHOWN)
    assert all(len(words.split()) > 7 and "\n" not in words.strip() for words in SHOWN.values())
    assert len(set(SHOWN.values())) == len(SHOWN)


@pytest.mark.parametrize("name", ["width", "flow"])
def test_a_figure_has_a_file_for_every_ground_and_width_and_its_numbers(name):
    made, (wide, tall), html = gallery.files(getattr(plot, name))
    ends = (".csv", ".svg", "-dark.svg", "-column.svg", "-column-dark.svg")
    assert set(made) == ({f"{name}{end}" for end in ends} if name == "width" else {"flow.csv"})
    assert made[f"{name}.csv"].startswith(b"series,kind,")
    assert (wide, tall, html != "") == ((768, 248, False) if name == "width" else (0, 0, True))
    light, dark = (made.get(f"{name}{end}", b"").decode() for end in ends[1:3])
    for picture, paper in ((light, "#ffffff"), (dark, "#131416")):
        assert name == "flow" or paper in picture
        loads = re.findall(r"""(?:href|src)=["'](?!#|data:)([^"']+)""", picture)
        assert not loads
    assert gallery.files(getattr(plot, name))[0] == made  # the same twice


def test_pictures_of_pages_are_small():
    pictures = list((ROOT / "docs" / "static").glob("*.webp"))
    assert {"gallery-light", "gallery-dark", "docs-light", "docs-dark", "docs-phone"} <= {p.stem for p in pictures}
    assert all(p.stat().st_size < 200_000 for p in pictures)
