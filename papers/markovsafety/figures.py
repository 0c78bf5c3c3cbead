"""Draw every figure of the note, by the very commands that the note prints under them.

python papers/markovsafety/figures.py [--out DIR]
"""

from __future__ import annotations

import argparse
import contextlib
import io
import shlex
from collections.abc import Iterable
from pathlib import Path

from markovsafety.cli import main as markovsafety

HERE = Path(__file__).resolve().parent


def draw(line: str, folder: Path) -> Path:
    """Run one `markovsafety ... --figure NAME` with the figure in `folder`, and from the project's root.

    Raises
    ------
    RuntimeError
        The command failed; what it said.
    """
    program, *words = shlex.split(line)
    if program != "markovsafety" or "--figure" not in words:
        raise RuntimeError(f"{line!r} draws no figure.")
    at = words.index("--figure") + 1
    figure = folder / words[at]
    words[at] = str(figure)
    said = io.StringIO()
    with contextlib.chdir(HERE.parents[1]), contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        code = markovsafety(words)
    if code != 0 or not figure.is_file():
        raise RuntimeError(f"{line}\nended with {code}: {said.getvalue().strip()}")
    return figure


def draw_all(lines: Iterable[str], folder: Path) -> list[Path]:
    """All figures, in a folder that is made."""
    folder.mkdir(parents=True, exist_ok=True)
    return [draw(line, folder) for line in lines]


if __name__ == "__main__":
    from values import COMMANDS, measured

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("results/note/figures"))
    options = parser.parse_args()
    lines = [*COMMANDS.values(), *(line for part in measured().values() for line in part.get("lines", ()))]
    for path in draw_all(lines, options.out):
        print(path)
