"""Belief, heads and chain of many planted worlds and of the organism, against the thresholds: the tables over seeds."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..errors import InputError
from ..organism import SHIPPED, model_path
from .inside import measure_directions, measure_organism
from .inside_chain import measure_chain
from .inside_heads import measure_heads, measure_organism_heads
from .machine import machine, versions
from .markdown import markdown_table

__all__ = ["PAPERS", "PLANTED", "missed", "run", "seeds_table", "trained_world", "weights_of", "world_name"]

PLANTED = ((0, 0, 0), (1, 3, 1), (0, 2, 2), (1, 1, 3), (0, 3, 4), (2, 0, 5), (1, 2, 6), (2, 2, 7), (1, 0, 8))
"""(layer, head, seed) of the worlds."""
PAPERS: dict[str, tuple[Callable[..., Any], ...]] = {
    "2507.11878": (measure_directions,),
    "2502.05945": (measure_heads, measure_chain),
}
ORGANISM: dict[str, Callable[..., Any]] = {"2507.11878": measure_organism, "2502.05945": measure_organism_heads}


def run(models: str | Path, out: str | Path | None = None, *, quick: bool = False) -> dict[str, Any]:
    """Measure every world and the organism, paper by paper.

    Parameters
    ----------
    models : path
        Folder of world folders, named like l1h3s1; those that are missing are trained into it, minutes each.
    out : path, optional
        PAPER/seeds.json: only what belongs to this paper is measured; seeds.md is written beside it. Or the folder of
        both papers. A world that is measured already, with
        the same weights, is not measured again.
    quick : bool
        Two worlds only.

    Returns
    -------
    dict
        By paper: worlds, organism, missed (rows that miss their threshold, by world); ``line``.
    """
    folder = Path(models)
    asked = dict(PAPERS)
    if out is not None and Path(out).suffix == ".json":
        root, paper = Path(out).resolve().parent.parent, Path(out).resolve().parent.name
        if paper not in PAPERS or Path(out).name != "seeds.json":
            raise InputError(
                f"{out} is no place for these measurements",
                cause=f"they belong to the papers {' and '.join(PAPERS)}",
                next="give --out papers, or papers/2507.11878/seeds.json",
            )
        out, asked = root, {paper: PAPERS[paper]}
    chosen = PLANTED[:2] if quick else PLANTED
    paths = {world_name(*world): trained_world(folder / world_name(*world), *world) for world in chosen}
    result: dict[str, Any] = {}
    with tqdm(total=len(asked) * (len(paths) + 1), desc="worlds", disable=None) as bar:
        for paper, measures in asked.items():
            kept = _kept(out, paper)
            for name, path in paths.items():
                weights = weights_of(path)
                if kept["worlds"].get(name, {}).get("weights") != weights:
                    rows: dict[str, Any] = {}
                    for measure in measures:
                        rows |= measure(path)
                    kept["worlds"][name] = {"weights": weights, "rows": rows}
                    _write(out, paper, kept)
                bar.update()
            kept["organism"] = {name: ORGANISM[paper](model_path(name)) for name in SHIPPED[1:2]}
            bar.update()
            _write(out, paper, kept)
            result[paper] = kept | {"missed": missed(kept)}
    count = {paper: sum(map(len, told["missed"].values())) for paper, told in result.items()}
    result["line"] = "; ".join(f"{p}: {len(paths)} worlds, {n} rows miss their threshold" for p, n in count.items())
    return result


def missed(kept: dict[str, Any]) -> dict[str, list[str]]:
    """Rows that miss their threshold, by world or model; those without one are left out."""
    told = {name: world["rows"] for name, world in kept["worlds"].items()} | kept["organism"]
    found = {name: [key for key, row in rows.items() if row["met"] is False] for name, rows in told.items()}
    return {name: rows for name, rows in found.items() if rows}


def world_name(layer: int, head: int, seed: int) -> str:
    return f"l{layer}h{head}s{seed}"


def trained_world(folder: Path, layer: int, head: int, seed: int) -> Path:
    if not (folder / "model.safetensors").exists():
        from ..organism.train_worlds import train_world

        train_world(folder, seed=seed, layer=layer, head=head)
    return folder


def weights_of(folder: Path) -> str:
    from ..rollouts.provenance import weights_hash

    return str(weights_hash(folder)["sha256"])


def _kept(out: str | Path | None, paper: str) -> dict[str, Any]:
    """What was measured before, by this version of the package or another."""
    path = None if out is None else Path(out) / paper / "seeds.json"
    if path is not None and path.exists():
        return json.loads(path.read_text(encoding="utf-8"))
    return {"worlds": {}, "organism": {}}


def _write(out: str | Path | None, paper: str, kept: dict[str, Any]) -> None:
    if out is None:
        return
    kept |= {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "versions": versions(("numpy", "torch", "transformers")),
    }
    path = Path(out) / paper / "seeds.json"
    path.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    path.with_suffix(".md").write_text(_page(paper, kept), encoding="utf-8")


def _page(paper: str, kept: dict[str, Any]) -> str:
    """Rows below each other, worlds side by side; what misses its threshold is bold."""
    lines = [
        f"# arXiv {paper}: the table of acceptance over seeds",
        "",
        f"`markovsafety bench inside --models DIR --out papers`, {kept['date'][:10]}, {kept['machine']}, "
        + ", ".join(f"{k} {v}" for k, v in kept["versions"].items())
        + ".",
        "",
        "Worlds are named by planted layer, planted head and seed. Rows without a threshold are reported only; bold "
        "misses its threshold.",
        "",
        *seeds_table({name: world["rows"] for name, world in kept["worlds"].items()}),
    ]
    for name, rows in kept["organism"].items():
        lines += ["", f"## The organism `{name}`", "", *seeds_table({name: rows})]
    settings = {name: w["rows"]["M1"]["settings"] for name, w in kept["worlds"].items() if "M1" in w["rows"]}
    if settings:
        cells = [
            (name, f"{s['scale']:g}", _predicted(s), f"{s['sampled']:.3f}", f"{s['z']:+.2f}")
            for name, found in settings.items()
            for s in found
        ]
        z = [abs(s["z"]) for found in settings.values() for s in found]
        lines += ["", "## Harm predicted from the start row, and sampled", ""]
        lines += [f"{len(z)} settings, {sum(x > 2 for x in z)} with |z| > 2, largest {max(z):.2f}.", ""]
        lines += [markdown_table(["world", "scale", "predicted h'", "sampled h'", "z"], cells)]
    return "\n".join(lines) + "\n"


def seeds_table(worlds: dict[str, dict[str, Any]]) -> list[str]:
    first = next(iter(worlds.values()), {})
    rows = []
    for key, told in first.items():
        bound = _bound(told)
        cells = [world.get(key) for world in worlds.values()]
        shown = ["" if c is None else f"{_bold(c)}{c['value']:.3g}{_bold(c)}" for c in cells]
        rows.append([key, told["what"].replace("|", "\\|"), bound, *shown])
    return [markdown_table(["row", "what", "threshold", *worlds], rows)] if rows else []


def _bound(row: dict[str, Any]) -> str:
    if row["least"] is not None:
        return f"≥ {row['least']:g}"
    return "" if row["most"] is None else f"≤ {row['most']:g}"


def _predicted(setting: dict[str, Any]) -> str:
    return f"{setting['predicted']:.3f} [{setting['lower']:.3f}, {setting['upper']:.3f}]"


def _bold(row: dict[str, Any]) -> str:
    return "**" if row["met"] is False else ""
