"""Tries a release as users meet it: both archives built, the wheel installed into an empty environment, and used there.

    python tests/release.py [--out papers/measurements/release.json]

The environment is made by this Python's venv, filled by pip with the wheel and what it asks for (the newest versions
that the index has, not the pinned ones), and called from a folder that is not the project's. Needs a package index
within reach, so no test runs it. Exit code 0: everything worked.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FIGURE = """
import markovsafety as ms
from markovsafety import organism
prompts = organism.prompts(n=24)
rolls = ms.sample(organism.model_path("shallow"), prompts, n=8, max_tokens=96, prefill=[0, 1, 5, 20], seed=0)
rolls = ms.judge(rolls, "organism")
ms.plot.save(ms.plot.depth({"shallow": ms.profile(rolls)}, budget=0.1), "first.png")
"""


def called(words: list[str], where: Path) -> tuple[float, str]:
    """Seconds that a command took, and what it printed; one that fails ends the trial."""
    empty = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "VIRTUAL_ENV"))} | {"HOME": str(where)}
    begun = time.perf_counter()
    done = subprocess.run(words, cwd=where, capture_output=True, text=True, env=empty)
    if done.returncode:
        sys.exit(f"{' '.join(words)} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    return time.perf_counter() - begun, done.stdout


def trial(place: Path) -> dict[str, object]:
    dist, home = place / "dist", place / "home"
    home.mkdir()
    seconds: dict[str, float] = {}
    seconds["build"], _ = called([sys.executable, "-m", "hatchling", "build", "-d", str(dist)], ROOT)
    (wheel,) = dist.glob("*.whl")
    (archive,) = dist.glob("*.tar.gz")
    python = place / "env" / "bin" / "python"
    seconds["venv"], _ = called([sys.executable, "-m", "venv", str(place / "env")], home)
    seconds["pip install"], _ = called([str(python), "-m", "pip", "install", "-q", "--no-cache-dir", str(wheel)], home)
    seconds["first figure"], _ = called([str(python), "-c", FIGURE], home)
    assert (home / "first.png").stat().st_size > 10_000
    seconds["help"], told = called([str(python.with_name("markovsafety")), "--help"], home)
    assert "start here" in told
    seconds["demo"], told = called([str(python.with_name("markovsafety")), "demo", "--json"], home)
    assert json.loads(told)["ok"]
    _, found = called([str(python), "-m", "pip", "list", "--format=json"], home)
    return {
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
        "megabytes": {"wheel": round(wheel.stat().st_size / 1e6, 1), "sdist": round(archive.stat().st_size / 1e6, 1)},
        "versions": {entry["name"]: entry["version"] for entry in json.loads(found)},
    }


def page(told: dict[str, object]) -> str:
    seconds, sizes, versions = (dict(told[name]) for name in ("seconds", "megabytes", "versions"))  # type: ignore[call-overload]
    rows = "\n".join(f"| {name} | {value:.1f} |" for name, value in seconds.items())
    named = ", ".join(f"{n} {versions[n]}" for n in ("markovsafety", "numpy", "scipy", "jax", "matplotlib"))
    megabytes = f"{sizes['wheel']} MB; source archive {sizes['sdist']} MB"
    shown = "768 rollouts of a shipped model, harm by forced tokens, with intervals"
    soon = seconds["pip install"] + seconds["first figure"]
    return f"""# A release in an empty environment

`python tests/release.py --out papers/measurements/release.json`, {told["date"]}, {told["machine"]}.

The wheel ({megabytes}) is installed by pip, without cache, with the newest versions
that the index has: {named}.

From `pip install` to the first figure ({shown}): {soon:.0f} s.
How long pip takes is a matter of the network; here the index was near.

| step | seconds |
| --- | --- |
{rows}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON file to write, with a page beside it")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        told = trial(Path(place))
    machine = f"{os.cpu_count()} cores, {platform.system()} {platform.machine()}, python {platform.python_version()}"
    told = {"date": datetime.now(UTC).date().isoformat(), "machine": machine} | told
    text = page(told)
    print(text)
    if options.out:
        options.out.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
        options.out.with_suffix(".md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
