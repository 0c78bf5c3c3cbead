"""What the theme leaves out for those who read by keyboard or screen reader, added to the pages that were written.

Parts that scroll can be reached by the tab key, landmarks have names, and the search page has a heading.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx

CHANGES = [
    (r"<pre(?! tabindex)", '<pre tabindex="0"'),
    (r'<div class="table-wrapper([^"]*)"(?! tabindex)', r'<div class="table-wrapper\1" tabindex="0"'),
    (r'<span class="formula"(?! tabindex)', '<span class="formula" tabindex="0"'),
    (r"<th( class=[^>]*)?>\s*(?:<p></p>)?\s*</th>", r"<td\1></td>"),  # an empty corner heads nothing
    (r'<aside class="sidebar-drawer"(?! aria)', '<aside class="sidebar-drawer" aria-label="All pages"'),
    (r'<aside class="toc-drawer([^"]*)"(?! aria)', r'<aside class="toc-drawer\1" aria-label="On this page"'),
]
"""Each once only, however often a page goes through."""
LONG = re.compile(r'<dl>(\s*<dd><em class="sig-param">.*?)</dl>', re.S)
"""A signature of several lines, which Sphinx writes as a list of definitions without terms."""


def lines(signature: re.Match) -> str:
    inside = signature[1].replace("<dd>", '<span class="parameter">').replace("</dd>", "</span>")
    return f'<span class="parameters">{inside}</span>'


def finish(app: Sphinx, error: Exception | None) -> None:
    if error or app.builder.format != "html":
        return
    for path in Path(app.outdir).rglob("*.html"):
        text = before = path.read_text(encoding="utf-8")
        for pattern, better in CHANGES:
            text = re.sub(pattern, better, text)
        text = LONG.sub(lines, text)
        if path.name == "search.html" and "<h1" not in text:
            text = re.sub(r"(<article[^>]*>)", r"\1<h1>Search</h1>", text, count=1)
        if text != before:
            path.write_text(text, encoding="utf-8")


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("build-finished", finish)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
