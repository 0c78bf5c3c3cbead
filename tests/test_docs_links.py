"""Relative links of every text of the project lead to files that are there, and to headings that are there."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

ROOT = Path(__file__).resolve().parents[1]
LINK = re.compile(r"\]\(<?([^)\s>]+)>?(?:\s+\"[^\"]*\")?\)")


def texts() -> dict[Path, str]:
    """Markdown files and the text cells of notebooks."""
    files = [*ROOT.glob("*.md"), *(ROOT / "papers").rglob("*.md")]
    files += [p for p in (ROOT / "docs").rglob("*.md") if p.parts[len(ROOT.parts) + 1] not in ("papers", "notebooks")]
    found = {p: p.read_text(encoding="utf-8") for p in files}
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        found[path] = "\n\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")
    return found


def prose(text: str) -> str:
    """Without code, whose brackets are no links."""
    return re.sub(r"^```.*?^```|`[^`\n]*`", "", text, flags=re.M | re.S)


def headings(text: str) -> set[str]:
    """Anchors of headings as GitHub and MyST make them: lower case, hyphens for spaces, other signs dropped."""
    found = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in found}


def broken(path: Path, text: str) -> Iterator[str]:
    for link in LINK.findall(prose(text)):
        if re.match(r"[a-z]+:", link):
            continue
        file, _, mark = unquote(link).partition("#")
        there = (path.parent / file) if file else path
        if not there.exists():
            yield f"{link}: no such file"
        elif mark and there.suffix == ".md" and mark not in headings(there.read_text(encoding="utf-8")):
            yield f"{link}: no such heading"


def test_relative_links_lead_somewhere():
    all_texts = texts()
    assert len(all_texts) > 40
    faults = [f"{p.relative_to(ROOT)}: {fault}" for p, text in all_texts.items() for fault in broken(p, text)]
    assert not faults, "\n" + "\n".join(faults)


def test_broken_links_are_noticed():
    here = ROOT / "README.md"
    assert [f.split(": ")[1] for f in broken(here, "[a](VISION.md) [b](GONE.md) [c](docs/errors.md#no)")] == [
        "no such file",
        "no such heading",
    ]
    assert not list(broken(here, "[a](docs/errors.md#inputerror) `[b](gone.md)` [c](https://example.org/gone)"))
