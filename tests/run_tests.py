"""What ``./run test`` runs: style, types, the house, every test file; then the seconds of each area and one line.

    ./run test                        everything but the tests marked `full`
    ./run test --full                 those too, and the model tests against transformers 4.57; writes full_run.txt
    ./run test tests/test_x.py -k y   any other words go straight to pytest

Every test file is a process of its own, as many side by side as there are cores (four at most), found by its name, so
that no file is left out. A part that fails stops nothing: its output is shown and the rest goes on. A skipped test has
shown nothing and counts as failed; so does a file without tests. Only what needs a program that is no Python package
may be left out ("not here: there is no Chromium"): it is listed at the end, and counts as failed where RUN_EVERYTHING
is set. The last line is ``N passed, N failed``, with ``N skipped`` behind it if there are such.
"""

from __future__ import annotations

import contextlib
import os
import platform
import signal
import subprocess
import sys
import tempfile
import threading
import time
import xml.etree.ElementTree as ET
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TESTS = ROOT / "tests"
LOG = TESTS / "full_run.txt"
OLD = Path(sys.prefix) / "transformers-4.57"
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
LANES = min(CORES, 4)
ABSENT = "skipped: not here: "
PATIENCE = {False: 1200, True: 4 * 3600}  # seconds after which a part counts as hung

# Area -> (seconds it may take on two cores, summed over the lanes; the first words of its test files). The order is
# that of starting: long ones first, so that the lanes end together. Files that fit nowhere are "other", and run too.
AREAS = {
    "organism": (400, ("organism", "augment")),
    "rollouts": (
        400,
        ("rollouts", "device", "engine", "engines", "judges", "parquet", "replay", "sample", "template"),
    ),
    "scale": (500, ("cluster", "foreign", "gpu", "kills", "large", "server", "tally")),
    "interventions": (700, ("interventions",)),
    "notebooks": (260, ("notebooks", "exercises", "japanese")),
    "docs": (260, ("docs",)),
    "faces": (360, ("analysis", "bench", "cli", "demo", "faces", "plot", "report", "road", "verbs")),
    "papers": (200, ("note", "papers")),
    "depth": (400, ("depth", "pareto", "sweep", "width", "profile")),
    "evidence": (200, ("evidence", "check", "compare")),
    "core": (
        300,
        (
            "bound",
            "reprs",
            "chain",
            "chains",
            "counts",
            "estimate",
            "states",
            "hitting",
            "errors",
            "toy",
            "golden",
            "critical",
            "symbolic",
        ),
    ),
    "other": (100, ()),
    "types": (100, ()),
    "lint": (10, ()),
    "house": (90, ("house", "release", "runner")),
}


@dataclass(frozen=True)
class Part:
    """One process to run: its area, what it is called, its words, and what its surroundings add."""

    area: str
    title: str
    words: list[str]
    file: Path | None = None
    add: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    part: Part
    passed: int
    failed: int
    seconds: float
    notes: list[str]
    output: str
    absent: int = 0


def area_of(file: Path) -> str:
    word = file.stem.removeprefix("test_").split("_")[0]
    return next((area for area, (_, words) in AREAS.items() if word in words), "other")


def parts(full: bool) -> list[Part]:
    """Everything there is to run, in the order of starting."""
    marks = ["-m", ""] if full else []
    files = sorted(TESTS.rglob("test_*.py"), key=lambda f: (list(AREAS).index(area_of(f)), -f.stat().st_size))
    tests = [Part(area_of(f), f.relative_to(TESTS).as_posix(), ["pytest", str(f), *marks], f) for f in files]
    tools = [
        Part("types", "basedpyright", ["basedpyright", "--pythonpath", sys.executable]),
        Part("lint", "ruff check", ["ruff", "check", "."]),
        Part("lint", "ruff format", ["ruff", "format", "--check", "."]),
    ]
    return [*tools, *tests]


def old_transformers(tests: list[Part]) -> list[Part]:
    """The files that speak of transformers once more, against the oldest release that is supported."""
    add = {"PYTHONPATH": str(OLD)}
    chosen = [p for p in tests if p.file and p.area != "house" and "transformers" in p.file.read_text(encoding="utf-8")]
    return [Part("transformers 4.57", p.title, p.words, p.file, add) for p in chosen]


def install_old_transformers() -> str:
    """Puts the older release into a folder of its own; returns what went wrong, if anything."""
    words = ["pip", "install", "-qq", "--disable-pip-version-check", "--no-deps", "--upgrade", "--target", str(OLD)]
    words += ["-r", str(TESTS / "transformers-4.57.txt")]
    done = subprocess.run([sys.executable, "-m", *words], cwd=ROOT, capture_output=True, text=True)
    return "" if done.returncode == 0 else done.stdout + done.stderr


def surroundings(lanes: int) -> dict[str, str]:
    """One share of the cores for every lane, no network for model hubs, no screen, and the same locale everywhere."""
    threads = str(max(1, CORES // lanes))
    return {
        **os.environ,
        **dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), threads),
        **dict.fromkeys(("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HUB_DISABLE_TELEMETRY"), "1"),
        "TOKENIZERS_PARALLELISM": "false",
        "MPLBACKEND": "Agg",
        "PYTHONUTF8": "1",
    }


class Runner:
    """Runs parts and remembers the processes alive, so that an interrupt ends them all."""

    def __init__(self, full: bool, lanes: int) -> None:
        self.patience, self.environment = PATIENCE[full], surroundings(lanes)
        self.alive: set[subprocess.Popen[str]] = set()
        self.lock = threading.Lock()

    def __call__(self, part: Part) -> Outcome:
        begun = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            table = Path(folder) / "junit.xml"
            words = [sys.executable, "-m", *part.words]
            if part.file:
                words += ["-p", "no:cacheprovider", f"--junit-xml={table}"]
            process = subprocess.Popen(
                words,
                cwd=ROOT,
                env=self.environment | part.add,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                start_new_session=True,
            )
            with self.lock:
                self.alive.add(process)
            try:
                output, _ = process.communicate(timeout=self.patience)
                notes: list[str] = []
            except subprocess.TimeoutExpired:
                kill(process)
                output, _ = process.communicate()
                notes = [f"stopped after {self.patience} s"]
            with self.lock:
                self.alive.discard(process)
            count = count_tests if part.file else count_tool
            passed, failed, more = count(process.returncode, table, output)
        absent = sum(note.startswith(ABSENT) for note in more)
        return Outcome(part, passed, failed, time.perf_counter() - begun, notes + more, output, absent)

    def stop(self) -> None:
        with self.lock:
            for process in self.alive:
                kill(process)


def kill(process: subprocess.Popen[str]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def count_tool(code: int, table: Path, output: str) -> tuple[int, int, list[str]]:
    return int(code == 0), int(code != 0), []


def count_tests(code: int, table: Path, output: str) -> tuple[int, int, list[str]]:
    """Passed and failed tests of one file, from pytest's table; what it does not show must not look green."""
    try:
        suites = list(ET.parse(table).getroot().iter("testsuite"))
    except (OSError, ET.ParseError):
        return 0, 1, [f"ended with code {code} and no results"]
    total, broken, skipped = (
        sum(int(s.get(key, 0)) for s in suites for key in keys)
        for keys in (("tests",), ("failures", "errors"), ("skipped",))
    )
    notes = [f"skipped: {s.get('message', '')}" for suite in suites for s in suite.iter("skipped")]
    absent = sum(note.startswith(ABSENT) for note in notes)
    total, skipped = total - absent, skipped - absent
    if code == 5 and total == 0 and "deselected" in output:  # only long tests in it
        return 0, 0, ["only with --full"]
    if code not in (0, 1) or (code == 1 and broken == 0):
        return total - broken - skipped, max(1, broken + skipped), [*notes, f"ended with code {code}"]
    return total - broken - skipped, broken + skipped, notes


def line(outcome: Outcome) -> str:
    verdict = f"{outcome.passed} passed" + (f", {outcome.failed} FAILED" if outcome.failed else "")
    part = outcome.part
    return f"{part.area:18}{part.title:34}{verdict:24}{outcome.seconds:7.1f} s  {'; '.join(outcome.notes[:3])}".rstrip()


def show(outcome: Outcome) -> None:
    print(line(outcome), flush=True)
    if outcome.failed:
        text = outcome.output.strip()
        print(text if len(text) < 40_000 else "[...]\n" + text[-40_000:], flush=True)


def run_all(todo: list[Part], full: bool) -> list[Outcome]:
    first = [p for p in todo if p.title == "test_house.py"]  # alone: it holds the only measurements of time
    rest = [p for p in todo if p not in first]
    done: list[Outcome] = []
    for lanes, batch in ((1, first), (LANES, rest)):
        runner = Runner(full, lanes)
        with ThreadPoolExecutor(lanes) as pool:
            try:
                for future in as_completed([pool.submit(runner, p) for p in batch]):
                    done.append(future.result())
                    show(done[-1])
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                runner.stop()
                raise
    return done


def summary(done: list[Outcome], wall: float, installing: float) -> list[str]:
    """Passed, failed and seconds per area beside the area's budget."""
    lines = [f"{'area':20}{'passed':>8}{'failed':>8}{'seconds':>10}{'budget':>9}"]
    areas = dict.fromkeys([*reversed(AREAS), *(o.part.area for o in done)])
    for area in areas:
        here = [o for o in done if o.part.area == area]
        if not here:
            continue
        spent, budget = sum(o.seconds for o in here), AREAS.get(area, (0,))[0]
        counts = f"{area:20}{sum(o.passed for o in here):8}{sum(o.failed for o in here):8}"
        mark = "  over budget" if budget and spent > budget else ""
        lines.append(f"{counts}{spent:10.1f}{budget or '':>9}{mark}")
    lines.append(f"{'installation':36}{installing:10.1f}{300:9}")
    lines.append(f"{'all, by the clock':36}{wall + installing:10.1f}{1200:9}   ({LANES} side by side on {CORES} cores)")
    return lines


def long_files() -> list[str]:
    """Files near the limit of length: worth a look before they grow on."""
    found = []
    for file in sorted([*(ROOT / "markovsafety").rglob("*.py"), *TESTS.rglob("*.py")]):
        length = len(file.read_bytes().splitlines())
        if length > 400:
            found.append(f"{file.relative_to(ROOT).as_posix()} ({length} lines)")
    return ["long files: " + ", ".join(found)] if found else []


def keep_log(done: list[Outcome], table: list[str], began: datetime, wall: float) -> None:
    """The full run's log; what a test printed behind "LOG: " (measured numbers) is kept with it."""
    names = ["numpy", "scipy", "jax", "torch", "transformers", "tokenizers", "pyarrow", "pytest", "hypothesis"]
    head = [
        "./run test --full",
        f"begun {began:%Y-%m-%d %H:%M} UTC, {wall / 60:.1f} minutes on {CORES} cores",
        f"{platform.system()} {platform.machine()}",
        f"Python {platform.python_version()}, " + ", ".join(f"{n} {version(n)}" for n in names),
    ]
    bad = [f"--- {line(o)}\n{o.output.strip()[-4000:]}".replace(str(ROOT), ".") for o in done if o.failed]
    told = [text[5:] for o in done for text in o.output.splitlines() if text.startswith("LOG: ")]
    body = [*head, "", *(line(o) for o in done), "", *table, *(["", *told] if told else []), *bad]
    LOG.write_text("\n".join(body) + "\n", encoding="utf-8")
    print(f"written: {LOG.relative_to(ROOT)}")


def main(words: list[str]) -> int:
    full = "--full" in words
    words = [w for w in words if w != "--full"]
    if words:
        for name, value in surroundings(1).items():
            os.environ[name] = value
        more = [*words, "-m", ""] if full else words
        os.execv(sys.executable, [sys.executable, "-m", "pytest", *more])
    began, start = datetime.now(UTC), time.perf_counter()
    installing = max(0.0, time.time() - float(os.environ.get("RUN_BEGAN") or time.time()))
    todo, done = parts(full), []
    if full:
        trouble = install_old_transformers()
        old = Part("transformers 4.57", "installation", [])
        done = [Outcome(old, 0, 1, time.perf_counter() - start, [], trouble)] if trouble else []
        todo += [] if trouble else old_transformers(todo)
        for outcome in done:
            show(outcome)
    try:
        done += run_all(todo, full)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    passed, failed = sum(o.passed for o in done), sum(o.failed for o in done)
    wall = time.perf_counter() - start
    absent = sum(o.absent for o in done)
    closing = f"{passed} passed, {failed} failed" + (f", {absent} skipped" if absent else "")
    table = summary(done, wall, installing)
    print("", *table, *long_files(), sep="\n")
    if full:
        keep_log(done, [*table, closing], began, wall)
    print(closing, flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
