"""Tables of measured harm by capacity and trained depth, as ``markovsafety bench capacity`` writes them."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .bound import Bound
from .depth import AttackLaw
from .errors import InputError
from .reading import making, parsed

__all__ = ["CapacityTable", "capacity_table"]

NEEDED = {"depth", "k", "harm", "lower", "upper"}
SIZES = ("capacity", "hidden")
Cell = tuple[Any, int]


@dataclass(frozen=True, eq=False)
class CapacityTable:
    """Harm of models by capacity, trained depth and number of forced tokens.

    Parameters
    ----------
    harm : dict
        ``{capacity: {trained depth: {k: Bound}}}``, or the reason in place of the innermost dict, as `sweep` takes it.
        Of several seeds the mean of their values, from the smallest lower to the largest upper end.
    planted : dict
        ``{(capacity, depth): {k: (lower, upper)}}``: what the distance of the models' rows from planted ones allows.
    """

    harm: dict[Any, dict[int, Any]]
    planted: dict[Cell, dict[int, tuple[float, float]]]

    def allowed(self, laws: Any) -> dict[Cell, tuple[float, float]] | None:
        """What is allowed for a single attack with a fixed number of tokens; None otherwise, or if nothing is known."""
        law = laws[0] if laws is not None and len(laws) == 1 else None
        if laws is not None and (not isinstance(law, AttackLaw) or law.tail or (law.pmf > 0).sum() > 1):
            return None
        k = 0 if law is None else int(law.mean)
        return {cell: ends[k] for cell, ends in self.planted.items() if k in ends} or None


def capacity_table(path: str) -> CapacityTable | None:
    """A table of measured harm from a Parquet or CSV file; None if the file has not these columns.

    Parameters
    ----------
    path : str
        Columns hidden or capacity, depth (trained), k (forced), harm, lower, upper; where known also counted (whether
        the model meets its checks), why, seed, planted and effect_upper or tv_upper (see
        ``markovsafety bench capacity``).

    Returns
    -------
    CapacityTable or None
    """
    rows, origin = _read(path)
    if not rows or not set(rows[0]) >= NEEDED or not set(SIZES) & set(rows[0]):
        return None
    with making(f"{path} is no table of harm by capacity", "write it again; no cell of its columns may be empty"):
        return _table(rows, origin)


def _table(rows: list[dict[str, Any]], origin: dict[str, Any]) -> CapacityTable:
    size = next(name for name in SIZES if name in rows[0])
    level = float(origin.get("level", 0.95))
    cells: dict[Cell, dict[int, list[dict[str, Any]]]] = {}
    failed: dict[Cell, str] = {}
    for m in origin.get("models", []):
        if m.get("variant") != "base" and m.get("failed") and not m.get("parameters"):
            failed.setdefault((m["hidden"], _depth(m["variant"])), "; ".join(m["failed"]))
    for row in rows:
        cell = row[size], int(row["depth"])
        if row.get("counted", True):
            cells.setdefault(cell, {}).setdefault(int(row["k"]), []).append(row)
        else:
            failed.setdefault(cell, str(row.get("why") or "its checks were not met"))
    out: dict[Any, dict[int, Any]] = {}
    for c, d in sorted({*cells, *failed}):
        by_k = cells.get((c, d))
        out.setdefault(c, {})[d] = failed[c, d] if by_k is None else {k: _bound(r, level) for k, r in by_k.items()}
    planted = {cell: {k: _ends(r) for k, r in by_k.items() if _known(r)} for cell, by_k in cells.items()}
    return CapacityTable(out, planted)


def _read(path: str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    place = Path(path)
    if place.suffix == ".parquet" and place.is_file():
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            schema = pq.read_schema(place)
            if not set(schema.names) >= NEEDED:
                return [], {}
            told = (schema.metadata or {}).get(b"markovsafety", b"{}")
            return pq.read_table(place).to_pylist(), dict(parsed(told))
        except (pa.ArrowException, OSError, ValueError, TypeError):
            return [], {}  # whoever reads it as rollouts says what is wrong
    if place.suffix == ".csv" and place.is_file():
        return _of_csv(place), {}
    return [], {}


def _of_csv(place: Path) -> list[dict[str, Any]]:
    try:
        with place.open(encoding="utf-8-sig", newline="") as file:
            lines = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{place} cannot be read as CSV.", cause=str(error), next="Write it again.") from error
    if not lines or not set(lines[0]) >= NEEDED or not set(SIZES) & set(lines[0]):
        raise InputError(
            f"{place} is no table of harm by capacity.",
            cause=f"Its columns are {', '.join(map(str, lines[0])) if lines else 'none'}.",
            next="Give columns capacity, depth, k, harm, lower, upper.",
        )
    return [{name: _value(name, x, place) for name, x in line.items() if name is not None} for line in lines]


def _value(name: str, x: Any, place: Path) -> Any:
    if name == "counted":
        return str(x).strip().lower() in ("1", "true", "yes", "")
    if name == "why" or (name == "capacity" and not str(x).replace(".", "", 1).isdigit()):
        return x
    try:
        number = float(x)
    except (TypeError, ValueError):
        if name in NEEDED or name in SIZES:
            raise InputError(
                f"{place}: {name} is {x!r}.", cause="It is no number.", next="Fill the cell, or leave the row out."
            ) from None
        return x
    return int(number) if number.is_integer() and name in ("capacity", "hidden", "depth", "k", "seed") else number


def _depth(variant: str) -> int:
    return 0 if variant == "shallow" else int(variant.removeprefix("deep"))


def _bound(rows: Sequence[dict[str, Any]], level: float) -> Bound:
    value = sum(float(r["harm"]) for r in rows) / len(rows)
    lower, upper = min(float(r["lower"]) for r in rows), max(float(r["upper"]) for r in rows)
    return Bound(value, lower, upper, level, {"sampling": (upper - lower) / 2}, None, {"seeds": len(rows)})


def _known(rows: Sequence[dict[str, Any]]) -> bool:
    return all(isinstance(r.get("planted"), float) and _distance(r) is not None for r in rows)


def _distance(row: dict[str, Any]) -> float | None:
    ends = [row[name] for name in ("tv_upper", "effect_upper") if isinstance(row.get(name), float)]
    return min(ends) if ends else None


def _ends(rows: Sequence[dict[str, Any]]) -> tuple[float, float]:
    pairs = [(r["planted"], _distance(r) or 0.0) for r in rows]
    return max(min(p - e for p, e in pairs), 0.0), min(max(p + e for p, e in pairs), 1.0)
