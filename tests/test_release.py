"""What is uploaded: a source archive with everything, a wheel with the whole package, one version everywhere."""

from __future__ import annotations

import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.metadata import Metadata
from test_house import PACKAGE, project_files

import markovsafety as ms

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def build(folder: Path, source: Path, *what: str) -> None:
    words = [sys.executable, "-m", "hatchling", "build", *what, "-d", str(folder)]
    done = subprocess.run(words, cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sdist")
    build(folder, ROOT, "-t", "sdist")
    (path,) = folder.glob("*.tar.gz")
    return path


@pytest.fixture(scope="module")
def unpacked(archive, tmp_path_factory):
    folder = tmp_path_factory.mktemp("source")
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    (inside,) = folder.iterdir()
    return inside


@pytest.fixture(scope="module")
def wheel(unpacked, tmp_path_factory):
    """Made from the source archive, as pip would make it."""
    folder = tmp_path_factory.mktemp("wheel")
    build(folder, unpacked, "-t", "wheel")
    (path,) = folder.glob("*.whl")
    return zipfile.ZipFile(path)


def test_wheel_holds_the_whole_package_and_nothing_else(wheel):
    inside = set(wheel.namelist())
    ours = {p.relative_to(ROOT).as_posix() for p in project_files() if p.is_relative_to(PACKAGE)}
    assert "markovsafety/py.typed" in inside
    assert ours <= inside, sorted(ours - inside)
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in inside)
    assert {n.split("/")[0] for n in inside} == {"markovsafety", f"markovsafety-{ms.__version__}.dist-info"}
    assert not [n for n in inside if "__pycache__" in n]


def test_source_archive_holds_the_project(unpacked):
    ours = {p.relative_to(ROOT).as_posix() for p in project_files() if not p.is_symlink()}
    ours -= {name for name in ours if name.startswith((".ci/", "docs/papers/", "docs/notebooks/"))}
    there = {p.relative_to(unpacked).as_posix() for p in unpacked.rglob("*") if p.is_file()}
    assert {"papers/README.md", "notebooks/00_tour.ipynb", "tests/run_tests.py", "run"} <= ours
    assert ours <= there, sorted(ours - there)


def test_metadata_is_what_an_index_accepts(wheel):
    (name,) = (n for n in wheel.namelist() if n.endswith(".dist-info/METADATA"))
    told = Metadata.from_email(wheel.read(name), validate=True)
    assert str(told.version) == ms.__version__
    assert told.description_content_type == "text/markdown"
    assert "safety break" in (told.description or "")
    assert {"models", "judges", "server", "cluster"} <= set(told.provides_extra or ())


def test_there_is_one_version():
    newest = re.search(r"^## (\S+), (\d{4}-\d\d-\d\d)$", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.M)
    cited = (ROOT / "CITATION.cff").read_text("utf-8")
    assert newest is not None
    assert PROJECT["version"] == ms.__version__ == newest[1]
    assert f'version: "{ms.__version__}"' in cited
    assert f'date-released: "{newest[2]}"' in cited
