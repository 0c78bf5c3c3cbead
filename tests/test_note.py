"""Our own note: it builds; every figure has its command, every theorem a proof, a public function and a test."""

from __future__ import annotations

import importlib.util
import json
import math
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import markovsafety as ms
from markovsafety import depth

typst = pytest.importorskip("typst")
ROOT = Path(__file__).resolve().parents[1]
NOTE = ROOT / "papers" / "markovsafety"
SETTINGS = settings(deadline=None, derandomize=True, max_examples=40)
PROBABILITY = st.floats(0.01, 0.99)


def module(name: str) -> ModuleType:
    sys.path.insert(0, str(NOTE))
    try:
        spec = importlib.util.spec_from_file_location(name, NOTE / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        made = importlib.util.module_from_spec(spec)
        sys.modules[name] = made
        spec.loader.exec_module(made)
        return made
    finally:
        sys.path.remove(str(NOTE))


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """The note in a folder of its own, and what its text says of itself."""
    values, figures, build = module("values"), module("figures"), module("build")
    out = tmp_path_factory.mktemp("note")
    pdf = build.build(out, keep=out / "sources")
    compiler = typst.Compiler(str(out / "sources" / "note.typ"), root=str(out / "sources"), ignore_system_fonts=True)
    said = {
        kind: json.loads(compiler.query(f"<{kind}>", field="value"))
        for kind in ("theorem", "command", "drawn", "missing")
    }
    pages, warnings = compiler.compile_with_warnings(format="svg")
    yield {
        "pdf": pdf,
        "sources": out / "sources",
        "values": values,
        "figures": figures,
        "pages": pages,
        "warnings": warnings,
        **said,
    }
    for name in ("values", "figures", "build"):
        sys.modules.pop(name, None)


def test_the_note_builds(built: dict[str, Any]) -> None:
    # Unknown references, numbers and figures are errors of typst, and would have ended the build.
    assert built["pdf"].read_bytes().startswith(b"%PDF")
    assert 8 <= len(built["pages"]) <= 20
    assert [w.message for w in built["warnings"]] == []


def test_the_note_in_the_tree_is_small(built: dict[str, Any]) -> None:
    assert built["pdf"].stat().st_size < 400_000
    assert (NOTE / "note.pdf").read_bytes().startswith(b"%PDF")


def test_every_figure_is_drawn_by_the_command_under_it(built: dict[str, Any]) -> None:
    assert len(built["drawn"]) >= 5
    for figure in built["drawn"]:
        text = (built["sources"] / "note" / "figures" / figure["file"]).read_text(encoding="utf-8")
        assert "<svg" in text
        if figure["line"] is None:
            assert figure["file"] == "profiles.svg"  # drawn from a file of measurements, which the caption names
        else:
            assert shlex.split(figure["line"])[:2] == ["markovsafety", "sweep"]
            assert shlex.split(figure["line"])[-2:] == ["--figure", figure["file"]]


def test_every_command_of_the_note_was_run(built: dict[str, Any]) -> None:
    # `build` draws figures by their commands alone; so a command under a figure that is there was run.
    assert {c["line"] for c in built["command"]} == {f["line"] for f in built["drawn"]} - {None}


def test_figures_have_the_same_bytes_every_time(built: dict[str, Any], tmp_path: Path) -> None:
    line = built["values"].COMMANDS["checkpoint"]
    again = built["figures"].draw(line, tmp_path)
    assert again.read_bytes() == (built["sources"] / "note" / "figures" / again.name).read_bytes()


def test_a_command_that_fails_says_so(built: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="ended with 2"):
        built["figures"].draw("markovsafety sweep --profile a0=2 r0=0 a1=0 r1=0 --depth 3 --figure x.svg", tmp_path)
    with pytest.raises(RuntimeError, match="draws no figure"):
        built["figures"].draw("markovsafety sweep", tmp_path)


def test_every_theorem_has_a_proof_a_public_function_and_a_test(built: dict[str, Any]) -> None:
    assert len(built["theorem"]) >= 18
    assert len({t["name"] for t in built["theorem"]}) == len(built["theorem"])
    for theorem in built["theorem"]:
        assert theorem["proof"] > 200, theorem["name"]
        assert theorem["code"], theorem["name"]
        assert theorem["tests"], theorem["name"]
        for path in theorem["code"]:
            found: Any = ms
            for part in path.split(".")[1:]:
                assert not part.startswith("_")
                found = getattr(found, part)
            assert callable(found) or isinstance(found, property), path
            assert (found.__doc__ or "").strip(), path
        for name in theorem["tests"]:
            file, _, function = name.partition("::")
            text = (ROOT / file).read_text(encoding="utf-8")
            assert f"def {function or 'test_'}" in text, name


def test_what_was_not_measured_is_named(built: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = built["values"]
    assert {m["name"] for m in built["missing"]} == set(values.HOW) - set(values.measured())
    monkeypatch.setattr(values, "MEASUREMENTS", tmp_path)
    assert values.measured() == {}


def test_the_capacity_grid_is_read_as_it_is(
    built: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = {"hidden": 8, "parameters": 3000, "depth": 20, "seed": 0, "counted": True, "k": 5, "planted": 0.1}
    row |= {"harm": 0.3, "lower": 0.25, "upper": 0.36, "tv": 1.5, "tv_upper": 1.6, "effect": 0.1, "effect_upper": 0.12}
    rows = [
        row,
        row | {"k": 0, "harm": 0.1, "lower": 0.05, "upper": 0.15, "tv": 0.5},
        row | {"seed": 1, "counted": False},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "capacity.parquet")
    monkeypatch.setattr(built["values"], "MEASUREMENTS", tmp_path)
    found = built["values"].measured()["capacity"]
    assert (found["models"], found["counted"], found["sizes"], found["trained"]) == (2, 1, 1, 1)
    # The gap 0.2 exceeds the row effects (0.15 > 0.12 at the near end of the interval), not the total variation.
    assert found["rows"] == [["20", "8", "3,000", "+0.200 ± 0.055", "1.00", "0.100", "50 %", "0, 1 of 2"]]


# --- statements of the note that no other test checks in this form ---


@SETTINGS
@given(st.lists(st.floats(0, 1), min_size=2, max_size=5), st.integers(2, 12), st.integers(0, 10**6))
def test_sharp_range_of_mean_and_correlation(points: list[float], m: int, seed: int) -> None:
    h = np.array(points)
    weight = np.random.default_rng(seed).dirichlet(np.ones(len(h)))
    q = float(weight @ h)
    if not 1e-3 < q < 1 - 1e-3:
        return
    rho = float(weight @ (h - q) ** 2) / (q * (1 - q))
    low, high = sharp_range(q, rho, m)
    assert low - 1e-12 <= float(weight @ h**m) <= high + 1e-12


@SETTINGS
@given(PROBABILITY, PROBABILITY, st.integers(2, 40))
def test_the_sharp_range_is_attained_and_holds_the_laws_of_the_package(q: float, rho: float, m: int) -> None:
    low, high = sharp_range(q, rho, m)
    y, z = q + rho * (1 - q), q * (1 - rho)
    w = rho * q / (1 - z)
    for points, weights, end in (((0.0, y), (1 - q / y, q / y), low), ((z, 1.0), (1 - w, w), high)):
        x, p = np.array(points), np.array(weights)
        assert p @ x == pytest.approx(q, rel=1e-12)
        assert p @ x**2 - q * q == pytest.approx(rho * q * (1 - q), rel=1e-9, abs=1e-15)
        assert p @ x**m == pytest.approx(end, rel=1e-9)
    for model in ("beta-binomial", "copula", "common-shock"):
        assert low * (1 - 1e-6) <= depth.ensemble_harm(q, m, rho, model=model) <= high * (1 + 1e-6), model
    paired = depth.paired_range(q, m, rho)  # any exchangeable answers: a wider class
    assert paired.lower <= low + 1e-7
    assert paired.upper >= high - 1e-7
    assert low > q**m


def sharp_range(q: float, rho: float, m: int) -> tuple[float, float]:
    z = q * (1 - rho)
    w = rho * q / (1 - z)
    return q * (q + rho * (1 - q)) ** (m - 1), w + (1 - w) * z**m


@SETTINGS
@given(PROBABILITY, st.floats(0.05, 0.95), st.floats(1e-5, 0.1))
def test_whole_optimum_under_a_price(share: float, out: float, price: float) -> None:
    a1, r1 = 0.02 * out, 0.98 * out
    profile = depth.Profile(a0=0.5 * share + 0.1, r0=0.1, a1=a1, r1=r1)
    gain, c = profile.f0 - profile.f1, profile.c1
    ours = max(0, math.ceil(math.log(gain * (1 - c) / price) / math.log(1 / c)))
    found = profile.optimal_depth(price)
    cost = profile.f1 + gain * c**ours + price * ours
    assert found.depth == ours or found.cost == pytest.approx(cost, abs=1e-14)


@SETTINGS
@given(st.floats(0.2, 0.98), PROBABILITY)
def test_whole_optimum_of_a_checkpoint(c: float, p: float) -> None:
    point = depth.Checkpoint(a=0.8 * (1 - c), r=0.2 * (1 - c), success=0.9)
    if abs(point.c - (1 - p)) < 1e-6:
        return
    law = depth.AttackLaw.geometric(p)
    ours = max(1, math.ceil(math.log(p / (1 - point.c)) / math.log(point.c / (1 - p))))
    found = point.optimal_depth(law)
    harm = point.harm([ours], attack=law).value[0]
    assert found.depth == ours or found.harm == pytest.approx(harm, rel=1e-12)


def test_twirl_moves_harm_both_ways() -> None:
    for swap, before, after in ((False, 0.74, 0.75), (True, 0.26, 0.25)):
        ends = [[0.1, 0.1], [0.8, 0.2]]
        rows = [[0.0, 0.8, *ends[0]], [0.0, 0.0, *(ends[1][::-1] if swap else ends[1])]]
        P = np.zeros((4, 4))
        P[:2] = rows
        chain = ms.Chain(P, {"harm": 2, "refusal": 3}, start=0)
        assert ms.hitting_probability(chain, "harm").at_start.value == pytest.approx(before, abs=1e-12)
        assert depth.twirl(chain).harm.value[0] == pytest.approx(after, abs=1e-12)


@pytest.mark.parametrize("shrink", [1.0, 1e-3, 1e-9])
def test_a_more_absorbing_refusal_is_worth_the_same(shrink: float) -> None:
    harm = depth.LeakyRefusal(a=0.05, r=0.3, leak=0.02 * shrink, end=0.1 * shrink).harm()
    assert harm.value == pytest.approx(1 / 6, rel=1e-12)
