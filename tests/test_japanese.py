"""The Japanese tour and README say what the English ones say: the same code and commands, links that lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[1]
KANA = re.compile("[\u3040-\u30ff]")


def cells(name: str, kind: str) -> list[str]:
    read = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4).cells
    return [cell.source for cell in read if cell.cell_type == kind]


def blocks(text: str, language: str) -> list[list[str]]:
    """Lines of the blocks in a language, without their comments."""
    found = re.findall(rf"^```{language}\n(.*?)^```", text, re.M | re.S)
    return [[line.split("#")[0].rstrip() for line in block.splitlines()] for block in found]


@pytest.fixture(scope="module")
def readmes():
    return [(ROOT / name).read_text(encoding="utf-8") for name in ("README.ja.md", "README.md")]


def test_both_tours_run_the_same_code():
    assert cells("00_tour_ja", "code") == cells("00_tour", "code")
    texts = cells("00_tour_ja", "markdown")
    assert len(texts) == len(cells("00_tour", "markdown"))
    assert all(KANA.search(text) for text in texts)


def test_every_block_stands_in_the_english_readme(readmes):
    for language in ("sh", "python"):
        mine, theirs = (blocks(text, language) for text in readmes)
        assert mine
        assert [block for block in mine if block not in theirs] == []


def test_the_table_of_papers_is_the_same(readmes):
    rows = [re.findall(r"^\| \[(\d{4}\.\d{5})\]\((\S+)\) \|.*\| (`.*`) \|$", text, re.M) for text in readmes]
    assert len(rows[0]) == 5
    assert rows[0] == rows[1]


def test_links_lead_to_files(readmes):
    where = [(ROOT, readmes[0]), *((ROOT / "notebooks", text) for text in cells("00_tour_ja", "markdown"))]
    links = [(folder, link) for folder, text in where for link in re.findall(r"\]\(([^)#:]+)\)", text)]
    assert len(links) > 20
    assert [link for folder, link in links if not (folder / link).exists()] == []
