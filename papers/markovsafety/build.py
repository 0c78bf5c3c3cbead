"""Compute the numbers, draw the figures and set the note.

    python papers/markovsafety/build.py [--out DIR] [--png]

Needs the package, its plots and typst (dependency group `test`), no network. Writes DIR/note.pdf.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path

import typst

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from figures import draw_all  # noqa: E402
from values import HOW, measured, numbers  # noqa: E402

EPOCH = 0  # the date in the file, so that the same note has the same bytes


def gather(folder: Path) -> dict[str, object]:
    """Everything that typst reads, in one folder: sources, references, numbers, figures."""
    shutil.copy(HERE / "note.typ", folder)
    shutil.copytree(HERE / "note", folder / "note", ignore=shutil.ignore_patterns("*.json"))
    shutil.copy(HERE.parent / "references.bib", folder)
    found = measured()
    values = {**numbers(), "measured": found, "how": HOW}
    (folder / "note" / "numbers.json").write_text(json.dumps(values, ensure_ascii=False), encoding="utf-8")
    draw_all(folder / "note" / "figures")
    return values


def build(out: Path, *, png: bool = False, keep: Path | None = None) -> Path:
    """Make `out`/note.pdf.

    Parameters
    ----------
    out : Path
    png : bool
        Also one picture per page.
    keep : Path, optional
        Keep the gathered sources here.

    Returns
    -------
    Path
    """
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) if keep is None else keep
        folder.mkdir(parents=True, exist_ok=True)
        values = gather(folder)
        compiler = typst.Compiler(str(folder / "note.typ"), root=str(folder), ignore_system_fonts=True)
        compiler.compile(output=str(out / "note.pdf"), timestamp=EPOCH, pdf_tags=False)  # tags would double its size
        if png:
            compiler.compile(output=str(out / "page-{p}.png"), format="png", ppi=110)
    for name in sorted(set(HOW) - set(values["measured"])):  # type: ignore[arg-type, call-overload]
        print(f"not measured yet: {name}; {HOW[name]}", file=sys.stderr)
    return out / "note.pdf"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE, help="folder (default: beside this file)")
    parser.add_argument("--png", action="store_true", help="also page-1.png, ...")
    options = parser.parse_args()
    print(build(options.out, png=options.png))
