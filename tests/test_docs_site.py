"""The documentation is built without a warning, holds every public name, and needs no network to be read."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from urllib.parse import unquote

import docs_site
import pytest

import markovsafety as ms

ROOT = Path(__file__).resolve().parents[1]
DOCS, PACKAGE = ROOT / "docs", ROOT / "markovsafety"
sys.path.append(str(DOCS / "extensions"))

import commands  # noqa: E402
import rooms  # noqa: E402


@dataclass
class Page(HTMLParser):
    """What a page of the site refers to, and what it can be referred to by."""

    ids: set[str] = field(default_factory=set)
    links: set[str] = field(default_factory=set)
    loads: set[str] = field(default_factory=set)
    images: list[dict] = field(default_factory=list)
    language: str = ""

    def __post_init__(self):
        super().__init__()

    def handle_starttag(self, tag, attrs):
        given = {name: value or "" for name, value in attrs}
        self.ids |= {given[name] for name in ("id", "name") if name in given and (name == "id" or tag == "a")}
        if tag == "a" and "href" in given:
            self.links.add(given["href"])
        if tag == "html":
            self.language = given.get("lang", "")
        if tag == "img":
            self.images.append(given)
        if tag in ("script", "img", "iframe", "source", "object") and "src" in given:
            self.loads.add(given["src"])
        if tag == "link" and given.get("rel") in ("stylesheet", "icon", "preload", "preconnect"):
            self.loads.add(given["href"])


@pytest.fixture(scope="module")
def built():
    """(folder, what the build said): one build for all tests."""
    return docs_site.built()


@pytest.fixture(scope="module")
def pages(built):
    found = {}
    for path in sorted(built[0].rglob("*.html")):
        page = Page()
        page.feed(path.read_text(encoding="utf-8"))
        found[path.relative_to(built[0]).as_posix()] = page
    return found


def test_the_site_builds_without_a_warning(built):
    _, done = built
    assert done.stderr.strip() == ""
    assert done.returncode == 0


def documented(folder: Path) -> dict[str, str]:
    """Full name -> page, as the inventory of the site has them (aliases included)."""
    from sphinx.util.inventory import InventoryFile

    inventory = InventoryFile.loads((folder / "objects.inv").read_bytes(), uri="")
    kinds = ("function", "class", "data", "exception", "module", "method", "property", "attribute")
    return {name: item.uri for kind in kinds for name, item in inventory.data.get(f"py:{kind}", {}).items()}


def doors() -> set[str]:
    """Rooms that a person can reach from ``ms``, found without asking the documentation."""
    below = {p.parent.name for p in PACKAGE.glob("*/__init__.py")} - {"bench"}
    return below | {name for name in ms._MODULES if (PACKAGE / f"{name}.py").exists()}


def public(room: str) -> set[str]:
    """Full names of what a room offers, its files left out; lazy rooms stay unloaded."""
    module = importlib.import_module(f"markovsafety.{room}")
    files = {p.stem for p in Path(str(module.__file__)).parent.glob("*.py")} & vars(module).keys()
    files = {name for name in files if isinstance(vars(module)[name], ModuleType)}
    return {f"{module.__name__}.{name}" for name in module.__all__ if name not in files}


def test_every_public_name_has_its_place_in_the_reference(built):
    found = documented(built[0])
    assert doors() <= set(rooms.ROOMS), "a room without a page: add it to docs/extensions/rooms.py and docs/reference"
    names = set().union(*map(public, rooms.ROOMS)) | {
        f"markovsafety.{home.split('.')[0]}.{n}" for n, home in ms._WHERE.items()
    }
    assert len(names) > 400
    missing = sorted(name for name in names if not found.get(name, "").startswith("reference/"))
    assert not missing, "add the file that defines it to a page of docs/reference: " + ", ".join(missing)


def test_commands_have_their_sections(pages):
    helps = commands.helps()
    assert len(helps) > 15
    assert {f"markovsafety-{name}" for name in helps if name} <= pages["reference/command-line.html"].ids


def error_classes() -> set[str]:
    """Classes of the package that derive from ours, wherever they are defined."""
    found = [re.findall(r"^class (?!_)(\w+)\((.+)\):", p.read_text("utf-8"), re.M) for p in PACKAGE.rglob("*.py")]
    kinds, size = {"MarkovsafetyError"}, 0
    while len(kinds) > size:
        size = len(kinds)
        kinds |= {name for pairs in found for name, bases in pairs if kinds & set(re.findall(r"\w+", bases))}
    return kinds


def test_every_error_class_has_an_entry_with_an_example():
    sections = dict(re.findall(r"^## (\w+)\n(.*?)(?=^## |\Z)", (DOCS / "errors.md").read_text("utf-8"), re.M | re.S))
    assert set(sections) == error_classes() >= {"InputError", "ServerError", "UntrustedError"}
    for name, text in sections.items():
        assert ">>> " in text, name
        assert name == "MarkovsafetyError" or all(f"**{word}.**" in text for word in ("Fact", "Cause", "Next")), name


def broken(pages: dict[str, Page], folder: Path) -> Iterator[str]:
    for name, page in pages.items():
        for link in sorted(page.links | page.loads):
            if re.match(r"[a-z]+:", link):
                continue
            path, _, mark = unquote(link).partition("#")
            there = (folder / name).parent / path.split("?")[0] if path else folder / name
            there = there.resolve()
            if not there.is_file():
                yield f"{name}: {link} leads nowhere"
            elif mark and mark not in pages[there.relative_to(folder).as_posix()].ids:
                yield f"{name}: {link} has no such place"


def test_links_and_anchors_of_the_site_exist(built, pages):
    folder = built[0].resolve()
    assert len(pages) > 40
    assert not list(broken(pages, folder))
    lost = Page()
    lost.feed('<a href="tutorial.html#no-such-place">x</a><img src="gone.png"><a href="tutorial.html#ask">x</a>')
    assert len(list(broken({**pages, "index.html": lost}, folder))) >= 2


def test_nothing_is_fetched_and_every_picture_is_described(built, pages):
    for name, page in pages.items():
        assert not [load for load in page.loads if re.match(r"([a-z]+:)?//", load)], name
        assert page.language == "en", name
        assert all(image.get("alt", "").strip() for image in page.images if "sidebar-logo" not in str(image)), name
    for sheet in built[0].rglob("*.css"):
        assert not re.search(r"(url\(|@import)\s*['\"]?(https?:)?//", sheet.read_text(encoding="utf-8")), sheet.name


def test_keyboards_and_screen_readers_reach_all_of_it(built):
    """What axe-core asked for where the theme alone does not give it."""
    for path in built[0].rglob("*.html"):
        text = path.read_text(encoding="utf-8")
        assert text.count("<h1") == 1, path.name
        assert text.count("<pre") == text.count('<pre tabindex="0"'), path.name
        assert all("aria-label=" in tag for tag in re.findall(r"<aside[^>]*>", text)), path.name
        assert not re.search(r"<dl>\s*<dd", text), path.name


def test_authors_are_no_list_and_names_no_types(built):
    """``W. Feller, ...`` alone on a line is an item W of a list to docutils; of ``a, b : int`` a would be b's type."""
    said = {path.name: path.read_text(encoding="utf-8") for path in (built[0] / "reference").glob("*.html")}
    assert "W. Feller, An Introduction" in said["toy.html"]
    assert not [name for name, text in said.items() if 'class="upperalpha' in text]
    names = re.search(r"<li><p>(<strong>states.*?) \u2013 \(<em>tuples of records</em>\)</p>", said["hitting.html"])
    assert names
    assert re.sub("<.*?>", "", names[1]) == "states,transitions,roads"


def test_examples_are_shown_as_they_are():
    """Bars and underscores are escaped in sentences, not in what an example prints, such as P(block | bio)."""
    said = ["The law P(a | b).", "", ">>> print(x_, a | b)  # (*any*)", "P(block | bio) = 1", "", "Then x_ is |a|."]
    lines = list(said)
    rooms.tidy(None, "function", "f", None, None, lines)
    assert lines[2:4] == said[2:4]
    assert [line.count("\\") for line in (lines[0], lines[-1])] == [1, 3]


def test_formulas_are_mathml(built):
    theory = (built[0] / "explanation" / "theory.html").read_text(encoding="utf-8")
    assert theory.count("<math") > 30
    assert not [p for p in built[0].rglob("*.html") if re.search(r"<script[^>]*mathjax", p.read_text("utf-8"), re.I)]
