"""Every page of the documentation is looked at by axe-core, which finds nothing.

Rules about colours take most of axe's time and depend on the style sheets alone, so they are asked once for each kind
of text there is, on a light and on a dark screen: kinds are told apart by tags and classes from the text upwards, and
the rest of an article is taken out first. For the other rules, spans that only colour are: they mean nothing to anybody
but the eye.
"""

from __future__ import annotations

import re
from typing import Any

import docs_site
import pytest
from axe_playwright_python.sync_playwright import Axe
from browser import barriers, opened

KINDS = """() => {
    const kinds = new Map(), walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    const names = new Map(), name = (it) => {
        if (it === document.body) return "";
        const own = [it.tagName, ...[...it.classList].sort()].join(".");
        if (!names.has(it)) names.set(it, `${name(it.parentElement)}/${own}`);
        return names.get(it);
    };
    while (walk.nextNode()) {
        const it = walk.currentNode.parentElement;
        if (!walk.currentNode.data.trim() || !it.getClientRects().length) continue;
        const kind = name(it);
        if (!kinds.has(kind)) kinds.set(kind, it.closest("a") || it);
    }
    window.kinds = kinds;
    return [...kinds.keys()];
}"""
UNSPAN = """() => {
    const plain = (it) => [...it.attributes].every(one => one.name === "class");
    for (const it of [...document.querySelectorAll("article span")].reverse())
        if (plain(it) && getComputedStyle(it).display === "inline") it.replaceWith(...it.childNodes);
    document.body.normalize();
}"""
COLOURS = ("color-contrast", "link-in-text-block")
PRUNE = """(chosen) => {
    const kept = new Set(chosen.map(kind => kinds.get(kind)));
    for (const it of [...kept]) for (let up = it; up; up = up.parentElement) kept.add(up);
    const prune = (it) => {
        for (const one of [...it.children])
            if (!kept.has(one)) one.tagName === "STYLE" || one.remove();
            else if (!chosen.some(kind => kinds.get(kind) === one)) prune(one);
    };
    document.querySelectorAll("article").forEach(prune);
}"""
CONTRAST = """async ([chosen, rules]) => {
    const found = await axe.run({ include: [...new Set(chosen.map(kind => kinds.get(kind)))] },
        { runOnly: rules, resultTypes: ["violations"], preload: false });
    return found.violations.flatMap(v => v.nodes.map(n => `${v.id}: ${n.html.slice(0, 200)} ${n.failureSummary}`));
}"""


@pytest.fixture(scope="module")
def site():
    return docs_site.built()[0]


def contrasts(page: Any, known: set[str]) -> list[str]:
    """Faults of the kinds of text that are new, on a light and on a dark screen."""
    found = []
    new = [kind for kind in page.evaluate(KINDS) if kind not in known]
    if new:
        known.update(new)
        page.evaluate(PRUNE, new)
        page.evaluate(Axe().axe_script)
        for scheme in ("dark", "light"):
            page.emulate_media(color_scheme=scheme)
            found += [f"{scheme}: {fault}" for fault in page.evaluate(CONTRAST, [new, COLOURS])]
        page.reload()
    return found


def meanings(page: Any) -> list[str]:
    """Faults of a page but for its colours; spans that only colour are taken out."""
    page.evaluate(UNSPAN)
    return barriers(page, rules={rule: {"enabled": False} for rule in COLOURS})


def test_axe_finds_nothing_on_any_page(site):
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > 40
    known: set[str] = set()
    faults: list[str] = []
    with opened(pages[0]) as shown:
        for path in pages:
            shown.goto(path.as_uri())
            name = path.relative_to(site).as_posix()
            faults += [f"{name}: {fault}" for fault in [*contrasts(shown, known), *meanings(shown)]]
        assert shown.complaints == []
    assert faults == []
    assert len(known) > 200


def test_it_would_find_something(site, tmp_path):
    source = (site / "index.html").read_text(encoding="utf-8")
    weak = '<p class="weak">weak</p><style>.weak { color: #999; } @media (prefers-color-scheme: dark) '
    weak += "{ .weak { color: #555; } }</style>"
    source = re.sub(r'href="_static', f'href="{(site / "_static").as_uri()}', source).replace('lang="en"', "", 1)
    path = tmp_path / "index.html"
    path.write_text(source.replace("</article>", weak + "</article>", 1), encoding="utf-8")
    with opened(path) as shown:
        assert any(fault.startswith("html-has-lang") for fault in meanings(shown))
        shown.reload()
        found = contrasts(shown, set())
        assert [fault.split(":")[0] for fault in found if 'class="weak"' in fault] == ["dark", "light"]
        assert contrasts(shown, set(shown.evaluate(KINDS))) == []
