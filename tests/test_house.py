"""The house keeps its shape: floors, heavy rooms, no side effects, quick doors, and the files a release needs.

Most rules are read off the syntax trees of the package, so they hold for imports inside functions as well.
"""

from __future__ import annotations

import ast
import json
import re
import shutil
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from functools import lru_cache
from itertools import chain
from pathlib import Path

import pytest

import markovsafety as ms

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "markovsafety"

# Each room and the rooms it may import. A new room has to be given its place here.
BASE = {
    "errors",
    "outcomes",
    "clusters",
    "bound",
    "arithmetic",
    "brief",
    "files",
    "reading",
    "rich",
    "compiled_kernels",
}
CHAINS = {*BASE, "chains"}
NUMBERS = {*CHAINS, "hitting"}
DECISION = {*NUMBERS, "evidence", "depth"}
FLOORS = {
    "errors": set(),
    "outcomes": {"errors"},
    "clusters": {"errors"},
    "bound": {"errors", "outcomes", "clusters", "rich"},
    "arithmetic": {"errors", "outcomes", "bound"},
    "files": {"errors"},
    "reading": {"errors"},
    "rich": set(),
    "brief": {"bound"},
    "compiled_kernels": set(),
    "chains": BASE,
    "hitting": CHAINS,
    "evidence": NUMBERS,
    "depth": NUMBERS | {"evidence"},
    "toy": NUMBERS,
    "rollouts": BASE,
    "interventions": DECISION | {"rollouts"},
    "organism": NUMBERS | {"rollouts"},
}
FACES = (
    "plot trust analysis exercises report demo bench arguments tables cli_words cli_inside cli_debias cli_repair "
    "cli_sweep cli_teacher cli_demo cli_evidence cli_numbers cli "
    "verbs verbs_bench verbs_debias verbs_inside verbs_repair verbs_sweep verbs_teacher __main__"
).split()  # the top floor, lowest first
for height, face in enumerate(FACES):
    FLOORS[face] = set(FLOORS) - set(FACES[height:])

# The roads off the floors: the registry of judges loads the organism's own judge when somebody asks for it by name, and
# the organism's rows are augmented by the one implementation that there is, which works on token ids without torch;
# a path in the place of rollouts is opened by the room that wrote it.
UPWARD = {("rollouts/judges.py", "organism"), ("organism/data.py", "interventions"), ("chains/shards.py", "rollouts")}
# Files that load modules by names from a table: lazy doors, engines, judges, derivations, commands.
# Every text "markovsafety.room..." in the package counts as an import, so the tables keep the floors as well.
TABLES = {
    "__init__.py",
    "organism/__init__.py",
    "rollouts/engines/__init__.py",
    "rollouts/judges.py",
    "depth/symbolic.py",
    "interventions/__init__.py",
    "cli.py",
}

TORCH_ROOMS = (
    "rollouts/engines/transformers*.py",
    "organism/train*.py",
    "interventions/*.py",
    "bench.py",
    "bench/*.py",
)
ROOMS = {
    **dict.fromkeys(("torch", "transformers", "peft", "accelerate"), TORCH_ROOMS),
    "matplotlib": ("plot/*.py",),
    "sympy": ("*symbolic*.py", "*/*symbolic*.py"),
    "numba": ("*_kernels.py", "*/*_kernels.py"),
    "tokenizers": ("rollouts/*.py", "rollouts/engines/*.py", "organism/*.py"),
    "jinja2": ("rollouts/*.py", "report/*.py", "plot/moving.py"),
    **dict.fromkeys(("openai", "huggingface_hub"), ("rollouts/engines/server*.py",)),
    "ray": ("rollouts/engines/ray*.py",),
}
JAX_AT_MODULE_LEVEL = ("rollouts/engines/jax*.py", "hitting/device*.py")
PICKLES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}


def name_of(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def within(name: str, patterns: tuple[str, ...]) -> bool:
    return any(Path(name).match(p) and name.count("/") == p.count("/") for p in patterns)


def room(parts: list[str]) -> str | None:
    """The room of a dotted path below ``markovsafety``; a public name counts as the room that it is loaded from."""
    return ms._WHERE.get(parts[0], parts[0]) if parts else None


@lru_cache
def trees() -> dict[str, ast.Module]:
    return {name_of(p): ast.parse(p.read_text(encoding="utf-8"), str(p)) for p in sorted(PACKAGE.rglob("*.py"))}


def imports(tree: ast.Module, name: str) -> Iterator[tuple[int, list[str], bool]]:
    """(line, dotted path, inside a function?) of every import; relative ones become absolute."""
    here = ["markovsafety", *Path(name).with_suffix("").parts]
    inner = {id(n) for f in ast.walk(tree) if isinstance(f, ast.FunctionDef | ast.Lambda) for n in ast.walk(f)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name.split("."), id(node) in inner
        elif isinstance(node, ast.ImportFrom):
            base = here[: -node.level] if node.level else []
            base = base + (node.module.split(".") if node.module else [])
            for alias in node.names:
                yield node.lineno, [*base, alias.name], id(node) in inner
        elif isinstance(node, ast.Call) and called(node) in ("import_module", "__import__"):
            target = node.args[0] if node.args else None
            if isinstance(target, ast.Constant):
                level = len(target.value) - len(target.value.lstrip("."))
                yield node.lineno, (here[:-level] if level else []) + target.value.lstrip(".").split("."), True
            elif name not in TABLES:
                yield node.lineno, ["markovsafety", "(computed name)"], True
        elif isinstance(node, ast.Constant) and re.fullmatch(r"markovsafety(\.\w+)+", str(node.value)):
            yield node.lineno, node.value.split("."), True


def called(node: ast.Call) -> str:
    return getattr(node.func, "attr", getattr(node.func, "id", ""))


def floor_faults(tree: ast.Module, name: str) -> Iterator[str]:
    own = Path(name).parts[0].removesuffix(".py")
    if name == "__init__.py":  # the lazy door names all rooms, for type checkers only
        return
    if own not in FLOORS:
        yield f"{name}: the room {own!r} has no place in FLOORS"
        return
    for line, path, _ in imports(tree, name):
        if path[0] != "markovsafety":
            continue
        target = room(path[1:])
        if target in (own, "__version__") or target in FLOORS[own] or (name, target) in UPWARD:
            continue
        yield f"{name}:{line}: {own} must not import {target or 'the whole package'}"


def room_faults(tree: ast.Module, name: str) -> Iterator[str]:
    for line, path, inside in imports(tree, name):
        if path[0] in ROOMS and not within(name, ROOMS[path[0]]):
            yield f"{name}:{line}: {path[0]} belongs in {', '.join(ROOMS[path[0]])}"
        if path[0] in ("jax", "jaxlib") and not inside and not within(name, JAX_AT_MODULE_LEVEL):
            yield f"{name}:{line}: jax is imported where a computation asks for it, inside the function"


def danger_faults(tree: ast.Module, name: str) -> Iterator[str]:
    """Pickle in any form, and settings that reach beyond the package."""
    guarded = {
        id(n)
        for w in ast.walk(tree)
        if isinstance(w, ast.With) and any("catch_warnings" in ast.dump(i) for i in w.items)
        for n in ast.walk(w)
    }
    for line, path, _ in imports(tree, name):
        if path[0] in PICKLES:
            yield f"{name}:{line}: {path[0]} runs code from files"
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and any("rcParams" in ast.dump(t) for t in node.targets):
            yield f"{name}:{node.lineno}: sets matplotlib's style for everybody; use rc_context"
        if not isinstance(node, ast.Call):
            continue
        what, where = called(node), f"{name}:{node.lineno}"
        options = {k.arg: ast.unparse(k.value) for k in node.keywords}
        owner = ast.unparse(node.func.value) if isinstance(node.func, ast.Attribute) else ""
        if options.get("allow_pickle") == "True" or (
            f"{owner}.{what}" == "torch.load" and "weights_only" not in options
        ):
            yield f"{where}: reads pickles"
        if what in ("filterwarnings", "simplefilter") and id(node) not in guarded:
            yield f"{where}: changes the warning filters; use warnings.catch_warnings"
        if (owner.endswith("config") and what == "update" and "jax" in owner) or f"{owner}.{what}" == "np.seterr":
            yield f"{where}: a global switch; use jax.enable_x64(True) or np.errstate as a context"
        if f"{owner}.{what}" in (
            "np.random.seed",
            "numpy.random.seed",
            "random.seed",
            "plt.style.use",
            "matplotlib.use",
        ):
            yield f"{where}: global state; use a generator or a context"


RULES = {"floors": floor_faults, "rooms": room_faults, "dangers": danger_faults}


@pytest.mark.parametrize("rule", RULES)
def test_rule(rule):
    faults = [fault for name, tree in trees().items() for fault in RULES[rule](tree, name)]
    assert not faults, "\n" + "\n".join(faults)


@pytest.mark.parametrize(
    ("rule", "name", "source", "says"),
    [
        ("floors", "chains/x.py", "from ..hitting import core", "chains must not import hitting"),
        ("floors", "chains/x.py", "def f():\n    from ..rollouts import Rollouts", "must not import rollouts"),
        ("floors", "bound.py", "from . import report", "bound must not import report"),
        ("floors", "depth/x.py", "from markovsafety import sample", "depth must not import rollouts"),
        ("floors", "depth/x.py", "import markovsafety as ms", "the whole package"),
        ("floors", "hitting/x.py", "import importlib\nimportlib.import_module('markovsafety.depth')", "import depth"),
        ("floors", "hitting/x.py", "import importlib\nimportlib.import_module(name)", "computed name"),
        ("floors", "chains/x.py", "TABLE = {'organism': ('markovsafety.organism.judge', 'Judge')}", "import organism"),
        ("floors", "rollouts/sample.py", "from ..organism import judge", "must not import organism"),
        ("floors", "attic.py", "x = 1", "no place"),
        ("rooms", "chains/x.py", "def f():\n    import torch.nn", "torch belongs"),
        ("rooms", "rollouts/template.py", "from transformers import AutoTokenizer", "transformers belongs"),
        ("rooms", "report.py", "import matplotlib.pyplot as plt", "matplotlib belongs"),
        ("rooms", "hitting/exact.py", "import sympy", "sympy belongs"),
        ("rooms", "hitting/core.py", "import jax.numpy as jnp", "inside the function"),
        ("dangers", "chains/x.py", "import pickle", "runs code"),
        ("dangers", "chains/x.py", "np.load(f, allow_pickle=True)", "reads pickles"),
        ("dangers", "organism/train.py", "torch.load(f)", "reads pickles"),
        ("dangers", "plot.py", "warnings.simplefilter('ignore')", "warning filters"),
        ("dangers", "plot.py", "plt.rcParams['font.size'] = 9", "rc_context"),
        ("dangers", "hitting/device.py", "jax.config.update('jax_enable_x64', True)", "global switch"),
    ],
)
def test_rules_notice(rule, name, source, says):
    assert any(says in fault for fault in RULES[rule](ast.parse(source), name))


@pytest.mark.parametrize(
    ("rule", "name", "source"),
    [
        ("floors", "rollouts/judges.py", "def f():\n    from ..organism import judge"),
        ("floors", "hitting/x.py", "from ..bound import Bound\nfrom .core import solve"),
        ("floors", "cli.py", "from . import __version__\nfrom .errors import InputError"),
        ("rooms", "hitting/core.py", "def f():\n    import jax"),
        ("rooms", "rollouts/engines/transformers.py", "import torch"),
        ("dangers", "plot.py", "with warnings.catch_warnings():\n    warnings.simplefilter('ignore')"),
    ],
)
def test_rules_allow(rule, name, source):
    assert not list(RULES[rule](ast.parse(source), name))


def error_faults(tree: ast.Module, name: str, kinds: set[str]) -> Iterator[str]:
    """Errors of our own, and what raises them for others, that leave out the cause or the next action."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and called(node) in kinds:
            told = {k.arg for k in node.keywords if ast.unparse(k.value) not in ("''", "None")}
            missing = sorted({"cause", "next"} - told)
            if missing:
                yield f"{name}:{node.lineno}: {called(node)} without {' and '.join(missing)}"


def error_kinds() -> set[str]:
    """Our error classes, wherever they are defined, and the helpers that take cause and next."""
    kinds, size = {"MarkovsafetyError"}, 0
    nodes = [n for tree in trees().values() for n in ast.walk(tree)]
    while len(kinds) > size:
        size = len(kinds)
        kinds |= {n.name for n in nodes if isinstance(n, ast.ClassDef) and kinds & {ast.unparse(b) for b in n.bases}}
    functions = [n for n in nodes if isinstance(n, ast.FunctionDef) and n.name != "__init__"]
    return kinds | {f.name for f in functions if {"cause", "next"} <= {a.arg for a in f.args.kwonlyargs}}


def test_every_error_says_its_cause_and_what_to_do_next():
    kinds = error_kinds()
    assert {"InputError", "ModelError", "UntrustedError", "UnsupportedModel", "reject"} <= kinds
    faults = [fault for name, tree in trees().items() for fault in error_faults(tree, name, kinds)]
    assert not faults, "\n" + "\n".join(faults)
    poor = ast.parse("raise InputError('x', cause='y')\nreject('a', b, c, next='', cause='d')\nInputError('x')")
    noticed = [fault.split("without ")[1] for fault in error_faults(poor, "x.py", kinds)]
    assert noticed == ["next", "next", "cause and next"]


# --- what importing does ---


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("words", [["-c", "import markovsafety"], ["-m", "markovsafety", "--help"]])
def test_doors_open_in_half_a_second(words):
    """Best of several fresh processes, interpreter start included: the promise is about the code, not the load."""
    best = float("inf")
    for _ in range(8):
        begun = time.perf_counter()
        done = subprocess.run([sys.executable, *words], capture_output=True, cwd=ROOT)
        best = min(best, time.perf_counter() - begun)
        assert done.returncode == 0, done.stderr
    assert best < 0.5


def test_import_is_light_and_changes_nothing():
    heavy = "numpy scipy jax torch matplotlib sympy networkx pyarrow tokenizers transformers openai ray".split()
    told = python(
        "import json, os, sys, warnings\n"
        "before = list(warnings.filters), dict(os.environ)\n"
        "import markovsafety\n"
        f"print(json.dumps([[m for m in {heavy} if m in sys.modules],"
        " (list(warnings.filters), dict(os.environ)) == before]))"
    )
    assert json.loads(told) == [[], True]


def test_no_module_changes_the_surroundings():
    """All modules but those of the torch rooms are imported; numpy, jax and matplotlib keep their switches."""
    rooms = [n for n in trees() if not within(n, TORCH_ROOMS) and n != "__main__.py"]
    names = [".".join(["markovsafety", *Path(n).with_suffix("").parts]).removesuffix(".__init__") for n in rooms]
    told = python(
        "import importlib, json, os, random, sys\n"
        "import jax, matplotlib, numpy as np\n"
        "def surroundings():\n"
        "    return [bool(jax.config.jax_enable_x64), dict(matplotlib.rcParams), np.geterr(), random.getstate(),\n"
        "            [str(x) for x in np.random.get_state()], dict(os.environ), list(sys.path)]\n"
        "before = surroundings()\n"
        f"for name in {names}: importlib.import_module(name)\n"
        "print(json.dumps([surroundings() == before, jax.config.jax_enable_x64, 'torch' in sys.modules]))"
    )
    assert json.loads(told) == [True, False, False]


def test_public_names_resolve():
    missing = []
    for name in ms.__all__:
        try:
            getattr(ms, name)
        except (AttributeError, ImportError) as error:
            missing.append(f"{name}: {error}")
    assert not missing, "\n" + "\n".join(missing)


def test_type_checkers_see_every_public_name():
    block = next(n for n in trees()["__init__.py"].body if isinstance(n, ast.If))
    seen = {alias.asname for n in block.body if isinstance(n, ast.ImportFrom) for alias in n.names}
    assert seen == set(ms._WHERE)


# --- files ---


def project_files() -> list[Path]:
    """The files of the project: those that git knows, or, without git, those that are not made by running it."""
    if shutil.which("git") and (ROOT / ".git").exists():
        listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
        if listed.returncode == 0:
            return [p for name in listed.stdout.split("\0") if name and (p := ROOT / name).is_file()]
    made = {".git", ".venv", "results", "build", "dist", "__pycache__"}
    return [p for p in ROOT.rglob("*") if p.is_file() and not any(q in made or q.endswith("_cache") for q in p.parts)]


def test_files_stay_short():
    files = [p for p in project_files() if p.suffix == ".py"]
    long = [f"{p.relative_to(ROOT)}: {n} lines" for p in files if (n := len(p.read_bytes().splitlines())) > 450]
    assert files
    assert not long, "\n" + "\n".join(long)


def test_nothing_names_one_machine():
    """No absolute paths of somebody's disk and no host names of package indexes, in texts, notebooks or data."""
    paths = ["/wo" + "rk/", "/ro" + "ot/", "/ho" + "me/", "/op" + "t/", "/User" + "s/", ".pye" + "nv"]
    hosts = ["pyp" + "i.org", "pythonhosted" + ".org", "download.py" + "torch", "ana" + "conda.org"]
    pattern = re.compile("|".join(re.escape(p) for p in paths + hosts).encode())
    found = [
        f"{p.relative_to(ROOT)}: {match.group().decode()}"
        for p in project_files()
        if (match := pattern.search(p.read_bytes()))
    ]
    assert not found, "\n" + "\n".join(found)


def test_tests_are_where_pytest_looks():
    named = [p for p in project_files() if p.suffix == ".py" and re.search(rb"^def test_", p.read_bytes(), re.M)]
    stray = [str(p.relative_to(ROOT)) for p in named if p.parent != ROOT / "tests" or not p.name.startswith("test_")]
    assert named
    assert not stray


@pytest.mark.parametrize("name", ["run", ".ci/run"])
def test_scripts_can_be_executed(name):
    assert (ROOT / name).stat().st_mode & 0o111


@pytest.mark.parametrize(
    "name", ["README.md", "ARCHITECTURE.md", "VISION.md", "CONTRIBUTING.md", "CHANGELOG.md", "CITATION.cff", "LICENSE"]
)
def test_front_matter(name):
    assert (ROOT / name).read_text(encoding="utf-8").strip()


def test_one_version():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    cited = re.search(r'^version: "?([^"\s]+)"?$', (ROOT / "CITATION.cff").read_text(), re.M)
    assert project["version"] == ms.__version__ == (cited and cited.group(1))


def test_everything_declared_is_pinned():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    told = [
        *project["project"]["dependencies"],
        *chain.from_iterable(project["project"]["optional-dependencies"].values()),
        *chain.from_iterable(project["dependency-groups"].values()),
        *project["build-system"]["requires"],
    ]
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and line[0] != "#"]
    assert all(re.fullmatch(r'[a-z0-9-]+==[0-9][0-9a-z.]*(; python_version [<>=]+ "3\.\d+")?', line) for line in lines)
    pinned = {line.split("==")[0] for line in lines}
    assert {re.match(r"[\w-]+", d).group().lower() for d in told if isinstance(d, str)} <= pinned
    assert "torch==2.13.0" in lines
