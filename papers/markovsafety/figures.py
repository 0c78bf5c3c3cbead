"""Draw every figure of the note, by the very commands that the note prints under them.

python papers/markovsafety/figures.py [--out DIR]
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import shlex
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


def draw_all(folder: Path) -> list[Path]:
    """All figures, in a folder that is made."""
    from values import COMMANDS, measured, place

    folder.mkdir(parents=True, exist_ok=True)
    found = measured()
    drawn = [draw(line, folder) for line in COMMANDS.values()]
    drawn += [draw(part["line"], folder) for part in found.values() if "line" in part]
    if "profiles" in found:
        drawn.append(draw_profiles(place("profiles"), folder / found["profiles"]["figure"]))
    return drawn


def draw_profiles(measurements: Path, figure: Path) -> Path:
    """Measured and predicted depth profiles of the organisms, from what `markovsafety bench profiles` wrote."""
    from values import best_state

    import markovsafety as ms

    found = json.loads(measurements.read_text(encoding="utf-8"))
    told, guessed, state = {}, {}, best_state(found)
    for m in found["models"]:
        h = m["profile"]
        ends = zip(found["depths"], h["value"], h["lower"], h["upper"])
        told[m["model"]] = {k: ms.Bound(v, low, high, h["level"]) for k, v, low, high in ends}
        guessed[m["model"]] = {cell["k"]: cell["predicted"] for cell in m["held_out"][state]}
    ms.plot.save(ms.plot.depth(told, predicted=guessed, budget=0.1), figure)
    return figure


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("results/note/figures"))
    options = parser.parse_args()
    for path in draw_all(options.out):
        print(path)
