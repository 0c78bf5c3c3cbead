"""The documentation, built once for all the processes that test it."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCES = (
    "docs",
    "markovsafety",
    "notebooks",
    "papers",
    "README.md",
    "README.ja.md",
    "ARCHITECTURE.md",
    "CHANGELOG.md",
)
TOOLS = ("sphinx", "myst-nb", "furo", "matplotlib")


def built() -> tuple[Path, subprocess.CompletedProcess]:
    """(folder, how the build ended); notebooks are not run, that is tested elsewhere.

    The folder is named after everything the site is made from, so that it is built again when a file has changed. One
    process builds, the others wait for it.
    """
    home = Path(tempfile.gettempdir()) / f"markovsafety-docs-{os.getuid()}"
    home.mkdir(mode=0o700, exist_ok=True)
    if home.stat().st_uid != os.getuid():
        raise PermissionError(f"{home} belongs to somebody else")
    out = home / _fingerprint()
    with (home / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (out / "done.json").exists():
            for old in home.iterdir():
                if old.is_dir():
                    shutil.rmtree(old)
            words = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-n", "-q", str(ROOT / "docs"), str(out)]
            env = {**os.environ, "MARKOVSAFETY_DOCS_NOTEBOOKS": "off"}
            done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, env=env)
            (out / "done.json").write_text(json.dumps([words, done.returncode, done.stdout, done.stderr]))
    return out, subprocess.CompletedProcess(*json.loads((out / "done.json").read_text()))


def _fingerprint() -> str:
    """Of names, sizes and times of all sources, and of the tools."""
    found = hashlib.sha256(repr([sys.prefix, str(ROOT), *map(version, TOOLS)]).encode())
    files = [p for name in SOURCES for p in ([ROOT / name] if (ROOT / name).is_file() else (ROOT / name).rglob("*"))]
    for path in sorted(p for p in files if p.is_file() and "__pycache__" not in p.parts):
        known = path.stat()
        found.update(repr([path.relative_to(ROOT).as_posix(), known.st_size, known.st_mtime_ns]).encode())
    return found.hexdigest()[:20]
