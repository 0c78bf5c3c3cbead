"""Every claim in papers/ has a verdict, every verdict a command that runs, every quoted result is what it prints."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

import pytest

from markovsafety import cli

ROOT = Path(__file__).resolve().parents[1]
PAPERS = ROOT / "papers"
CLAIMS = sorted(PAPERS.glob("*/claims.md"))
SCRIPTS = sorted(p for page in CLAIMS for p in page.parent.glob("*.py"))
COLUMNS = ["claim", "assumption", "our statement", "command", "result", "verdict"]
RUN = {"holds", "holds if", "fails", "vacuous"}
NOT_RUN = {"could not be read", "not tested yet"}
MAY_IMPORT = {"markovsafety", "numpy", "scipy", "sympy", *sys.stdlib_module_names}
LONGEST = 60  # lines of a script, its docstring included
NAMES = [p.relative_to(ROOT).as_posix() for p in SCRIPTS]


def rows(page: Path) -> list[dict[str, str]]:
    """The rows of all tables of claims on a page; a bar inside a cell is written with a backslash."""
    found, inside = [], False
    for line in page.read_text(encoding="utf-8").splitlines():
        if not line.startswith("|"):
            inside = False
            continue
        cells = [c.strip().replace("\\|", "|") for c in re.split(r"(?<!\\)\|", line)[1:-1]]
        if not inside:
            assert cells == COLUMNS, f"{page.parent.name}: {cells}"
            inside = True
        elif set(line) - set("|-: "):
            assert len(cells) == len(COLUMNS), f"{page.parent.name}: {len(cells)} cells in {line[:80]}"
            found.append(dict(zip(COLUMNS, cells)))
    return found


def quoted(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


@lru_cache
def output(script: str) -> str:
    """What a script prints, in a process of its own, on one core."""
    env = os.environ | dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    words = [sys.executable, "-W", "error", script]
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, env=env, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


def page_of(command: str) -> str:
    """The page that a benchmark wrote beside its JSON."""
    words = command.split()
    assert words[0] == "markovsafety"
    cli._parser().parse_args(words[1:])
    return Path(ROOT / words[words.index("--out") + 1]).with_suffix(".md").read_text(encoding="utf-8")


def faults(row: dict[str, str]) -> list[str]:
    """What is wrong with a row, apart from its results."""
    told = []
    command, results = quoted(row["command"]), quoted(row["result"])
    if row["verdict"] in NOT_RUN:
        told += ["has a command or a result, but was not run"] if command or results else []
    elif row["verdict"] in RUN:
        told += [] if len(command) == 1 and results else ["has no command, or none of its results"]
        for c in command:
            script = re.fullmatch(r"python (papers/\S+\.py)", c)
            known = script.group(1) in NAMES if script else c.startswith("markovsafety ")
            told += [] if known else [f"names no script and no verb: {c}"]
    else:
        told.append(f"verdict {row['verdict']!r}")
    return told + [f"empty {name}" for name in COLUMNS if not row[name]]


def test_every_source_paper_has_its_page():
    papers = "2406.05946 2410.02724 2502.00669 2502.02153 2502.05945 2506.07356 2507.11878".split()
    assert [page.parent.name for page in CLAIMS] == papers
    assert all(len(rows(page)) >= 6 for page in CLAIMS)


@pytest.mark.parametrize("page", CLAIMS, ids=lambda p: p.parent.name)
def test_rows_are_complete(page):
    wrong = [f"{row['claim']}: {fault}" for row in rows(page) for fault in faults(row)]
    assert not wrong, "\n" + "\n".join(wrong)


def test_checks_of_rows_notice():
    good = dict.fromkeys(COLUMNS, "x") | {"command": f"`python {NAMES[0]}`", "result": "`1`", "verdict": "holds"}
    assert faults(good) == []
    for name, cell in (("verdict", "true"), ("command", "—"), ("command", "`python papers/none.py`"), ("result", "1")):
        assert faults(good | {name: cell})
    assert faults(good | {"verdict": "not tested yet"})
    assert faults(good | {"claim": ""})


def results_missing(script: str) -> list[str]:
    told = [r for page in CLAIMS for r in rows(page) if f"`python {script}`" == r["command"]]
    assert told, f"no claim uses {script}"
    return [text for row in told for text in quoted(row["result"]) if text not in output(script)]


@pytest.mark.parametrize("script", NAMES)
def test_script_prints_what_is_quoted(script):
    assert results_missing(script) == []


def test_benchmarks_wrote_what_is_quoted():
    measured = [r for page in CLAIMS for r in rows(page) if r["command"].startswith("`markovsafety")]
    assert measured
    wrong = [t for r in measured for t in quoted(r["result"]) if t not in page_of(*quoted(r["command"]))]
    assert not wrong


def private(tree: ast.Module) -> set[str]:
    """Names with a leading underscore that belong to others, and imports of what a user does not have."""
    told = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr.startswith("_"):
            told.add(node.attr)
        elif isinstance(node, ast.Import):
            told |= {a.name for a in node.names if a.name.split(".")[0] not in MAY_IMPORT or "._" in a.name}
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or "", *(a.name for a in node.names)]
            if node.level or names[0].split(".")[0] not in MAY_IMPORT:
                told.add(names[0])
            told |= {n for n in names if n.startswith("_") or "._" in n} - {"__future__"}
    return told


@pytest.mark.parametrize("script", NAMES)
def test_scripts_are_short_and_public(script):
    text = (ROOT / script).read_text(encoding="utf-8")
    assert len(text.splitlines()) < LONGEST
    tree = ast.parse(text)
    assert ast.get_docstring(tree)
    assert private(tree) == set()


def test_private_is_noticed():
    assert private(ast.parse("from markovsafety.depth import _x\nimport torch\nfrom . import y\ndepth._z")) == {
        "_x",
        "torch",
        "",
        "_z",
    }


def test_references_cover_the_papers():
    entries = (PAPERS / "references.bib").read_text(encoding="utf-8")
    keys = re.findall(r"^@\w+\{(\w+),", entries, re.M)
    assert len(keys) == len(set(keys))
    assert entries.count("{") == entries.count("}")
    assert [page.parent.name for page in CLAIMS if f"arxiv.org/abs/{page.parent.name}" not in entries] == []
    cited = {x for page in CLAIMS for x in re.findall(r"\b2\d{3}\.\d{5}\b", page.read_text(encoding="utf-8"))}
    assert [x for x in sorted(cited) if x not in entries] == []
