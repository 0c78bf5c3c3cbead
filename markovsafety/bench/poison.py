"""Poisoned fine-tuning with and without defences: harm, refusals, task accuracy and use together, as chains.

The defences are those of arXiv 2506.07356, apart and together: a filter by the teacher's refusal feature, distillation
of the teacher, and both; and the same with an aligned model as it is in the teacher's place, its feature read where the
teacher's is, at the last token of the prompt (often its refusal), or at the end of the instruction (often what it holds
for harm). All filters have one recall on validation pairs; levels are chosen there, too. Harm alone is gameable: a
student that has forgotten how to answer does none.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from ..bound import encode
from ..interventions import (
    CrossEntropy,
    Host,
    Pair,
    RefusalFilter,
    Sifted,
    fine_tune,
    fit_filter,
    sift,
    train_student,
    train_teacher,
)
from ..interventions.batches import RowBatches
from ..interventions.directions import Position
from ..interventions.imitation import Imitated
from ..interventions.objectives import Setting as Learning
from ..interventions.objectives import as_tensors
from ..interventions.pairs import rows_of
from .machine import machine, versions
from .poison_settings import KINDS, Setting, measure, organism_setting, world_setting

__all__ = [
    "ARMS",
    "RECALL",
    "Teacher",
    "aligned_teacher",
    "all_teachers",
    "arm",
    "overhead",
    "run",
    "taught",
    "user_data",
]

ARMS = ("none", "filter", "distil", "both", "aligned", "t_inst")
UNTRAINED: dict[str, Position] = {"aligned": "t_post", "t_inst": "t_inst"}
"""Arms whose teacher is the aligned model as it is, and where its feature is read."""
RECALL = 0.95
"""On validation pairs, of every filter."""
LOW = "low cosine"
STEPS = 150
Key = tuple[float, str, str, str]
"""Share of poison, its kind, the defence, where the student starts."""


@dataclass(frozen=True, eq=False)
class Teacher:
    """A model that filters and teaches."""

    folder: Path
    host: Host
    filter: RefusalFilter
    seconds: float = 0.0


def taught(setting: Setting, place: Path, *, weight: float = 0.1, steps: int = 150, seed: int = 0) -> Teacher:
    """The refusal-feature teacher, trained from the base; without the penalty where weight is 0."""
    told: dict[str, Any] = {k: v for k, v in setting.training.items() if k not in setting.options}
    made = train_teacher(
        setting.base,
        setting.alignment,
        place,
        weight=weight,
        recall=RECALL,
        steps=steps,
        seed=seed,
        options=setting.options,
        **told,
    )
    return Teacher(made.model, setting.open(made.model), made.filter, made.record["seconds"])


def aligned_teacher(setting: Setting, position: Position, *, seed: int = 0) -> Teacher:
    """The aligned model in the teacher's place: its feature at a position, at the level that tells most on validation.

    The threshold has the teacher's recall on validation pairs, whatever that costs in harmless ones.
    """
    host = setting.open(setting.aligned)
    sides = [[np.array(p.prompt) for p in setting.alignment if p.harmful is kind] for kind in (True, False)]
    return Teacher(setting.aligned, host, fit_filter(host, *sides, position=position, recall=RECALL, seed=seed))


def all_teachers(setting: Setting, place: Path, *, steps: int = 150, seed: int = 0) -> dict[str, Teacher]:
    """Those of all arms: "refusal", "aligned" and "t_inst"."""
    made = {"refusal": taught(setting, place, steps=steps, seed=seed)}
    return made | {name: aligned_teacher(setting, where, seed=seed) for name, where in UNTRAINED.items()}


def user_data(setting: Setting, share: float, kind: str, teacher: Teacher, *, seed: int = 0) -> list[Pair]:
    """The user's rows, a share of them poison; for "low cosine" those of four times as many that the filter sees least.

    Parameters
    ----------
    setting : Setting
    share : float
        Of poison, 0 to below 1.
    kind : str
        One of `KINDS`, or "low cosine".
    teacher : Teacher
        Whose feature the attacker knows.
    seed : int
        Of the order.
    """
    total = len(setting.task)
    bad = round(share * total)
    if kind == LOW and bad:
        pool = [pair for each in KINDS for pair in setting.poison(each, -(-4 * bad // len(KINDS)))]
        scores = teacher.filter.scores(teacher.host, [np.array(p.prompt) for p in pool])
        poison = [pool[i] for i in np.argsort(scores, kind="stable")[:bad]]
    else:
        poison = setting.poison(kind, bad) if bad else []
    rows = [*setting.task[: total - bad], *poison]
    return [rows[i] for i in np.random.default_rng(seed).permutation(len(rows))]


def arm(
    name: str,
    setting: Setting,
    data: Sequence[Pair],
    teachers: dict[str, Teacher],
    place: Path,
    *,
    start: str = "base",
    steps: int = 150,
    seed: int = 0,
    n: int = 2,
) -> dict[str, Any]:
    """Fine-tune a student under one defence, and measure it.

    Parameters
    ----------
    name : str
        One of `ARMS`.
    setting : Setting
    data : list of Pair
    teachers : dict
        Of `all_teachers`: that of the arm is used.
    place : Path
        Folder of the student.
    start : "base" or "aligned"
        Where defended students start; an undefended one starts from the aligned model, or nothing would be lost.
    steps, seed : int
        Of training.
    n : int
        Answers per prompt.

    Returns
    -------
    dict
        `measure`, and "recall", "false_drops" (Bounds or None), "kept", "poison kept", "seconds".
    """
    teacher = teachers[name if name in UNTRAINED else "refusal"]
    sifted = sift(teacher.host, teacher.filter, data) if name not in ("none", "distil") else None
    told: dict[str, Any] = {"steps": steps, "seed": seed, **setting.training, **setting.student}
    origin = setting.aligned if name == "none" or start == "aligned" else setting.base
    if name == "none":
        record = fine_tune(origin, rows_of(data), place, **told)
    else:
        told |= {"teacher": teacher.folder, "alignment": setting.alignment, "weight": float(name != "filter")}
        record = train_student(origin, sifted if sifted is not None else data, place, **told)
    found = measure(setting.open(place), setting, n=n, seed=seed)
    return found | _sifting(sifted, data) | {"arm": name, "start": start, "seconds": record["seconds"]}


def _sifting(sifted: Sifted | None, data: Sequence[Pair]) -> dict[str, Any]:
    if sifted is None:
        bad = sum(bool(p.harmful) for p in data)
        return {"recall": None, "false_drops": None, "kept": len(data), "poison kept": bad}
    kept = sifted.kept
    told = {"recall": sifted.recall, "false_drops": sifted.false_drops, "kept": len(kept)}
    return told | {"poison kept": sum(bool(p.harmful) for p in kept)}


def overhead(setting: Setting, teacher: Path, *, turns: int = 7, each: int = 6) -> float:
    """Seconds of steps of distillation over those of plain ones, in turns; of each step the fastest turn counts.

    Parameters
    ----------
    setting : Setting
    teacher : Path
        Folder of a model as large as the base.
    turns, each : int
        Turns of each kind, and steps of a turn: the same ones every time.
    """
    engine = setting.open(setting.base).engine
    engine.model.requires_grad_(True)
    rows = rows_of(setting.task)
    bound = Imitated(teacher, rows=rows_of(setting.alignment)).bind(Learning(engine, 32, each, 0))
    batches, best = RowBatches(rows, 32, each, 0), np.full((2, each), np.inf)
    for _ in range(turns):
        for which, objective in enumerate((CrossEntropy(), bound)):
            for i in range(each):
                begun = time.perf_counter()
                engine.model.zero_grad()
                objective(engine.model, as_tensors(batches[i]))[0].backward()
                best[which, i] = min(best[which, i], time.perf_counter() - begun)
    plain, distilled = best.sum(axis=1)
    return float(distilled / plain)


# --------------------------------------------------------------------------------------------------------- all of it


def run(out: str | Path | None = None, *, world: str | Path | None = None, quick: bool = False) -> dict[str, Any]:
    """Measure poisoned fine-tuning on the organism, and on a planted world where one is given.

    Parameters
    ----------
    out : path, optional
        JSON; a page of Markdown goes beside it.
    world : path, optional
        Folder of a planted world.
    quick : bool
        One share, two arms, few steps.

    Returns
    -------
    dict
        "settings": name -> before, teachers, rows; ``line``.

    Notes
    -----
    Where `out` is there already, students that it holds are not trained again.
    """
    result: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "versions": versions(("numpy", "torch", "transformers")),
        "settings": {},
    }
    known = {} if out is None or not Path(out).exists() else json.loads(Path(out).read_text("utf-8"))["settings"]
    small: dict[str, Any] = {"ask": 24, "data": 120, "align": 240} if quick else {}
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        made = [] if world is None else [world_setting(world, place / "world", **small)]
        short = [] if quick else [replace(organism_setting(room=False), name="organism, short task")]
        for setting in [*made, organism_setting(**small), *short]:
            result["settings"][setting.name] = rows = {}
            plan, steps = _plan(quick, setting in short), 40 if quick else STEPS
            for told in _measured(setting, place / setting.name, plan, known.get(setting.name, {}), steps):
                rows |= told
                _write(out, result)
    result["line"] = _line(result["settings"]["organism"])
    _write(out, result)
    return result


def _plan(quick: bool, short: bool) -> list[Key]:
    """All students: every defence at every share of poison, kinds of it, and the other start."""
    if quick:
        return [(0.3, "plain", name, "base") for name in ("none", "both")]
    if short:
        return [(0.1, "plain", name, "aligned") for name in ("none", "filter", "both")]
    plan = [(0.1, "plain", name, "base") for name in ARMS]
    plan += [(0.1, "plain", name, "aligned") for name in ARMS[1:]]
    plan += [(0.3, "plain", name, "base") for name in ARMS]
    plan += [(p, "plain", name, "base") for p in (0.0, 0.5) for name in ARMS]
    for kind in (*KINDS[1:], LOW):
        plan += [(0.3, kind, name, "base") for name in ("none", "both", "aligned", "t_inst")]
    return plan


def _measured(setting: Setting, place: Path, plan: Sequence[Key], known: dict[str, Any], steps: int) -> Any:
    """Parts of the result, as they come; students that these teachers had before are not trained again."""
    yield {"before": encode(measure(setting.open(setting.aligned), setting))}
    teachers = all_teachers(setting, place / "teacher", steps=steps)
    told = encode({name: _teacher(teacher, setting) for name, teacher in teachers.items()})
    yield {"teachers": told}
    before = {name: t["filter"] for name, t in known.get("teachers", {}).items()}
    same = before == {name: t["filter"] for name, t in told.items()}
    done = {
        (r["share"], r["kind"], r["arm"], r["start"]): r
        for r in known.get("rows", [])
        if r["steps"] == steps and "deep" in r
    }
    rows: list[dict[str, Any]] = []
    for i, key in enumerate(tqdm(plan, desc=setting.name, disable=None)):
        share, kind, name, start = key = (*key[:3], "aligned" if key[2] == "none" else key[3])
        if same and key in done:
            rows.append(done[key])
        else:
            data = user_data(setting, share, kind, teachers["refusal"])
            found = arm(name, setting, data, teachers, place / f"student{i}", start=start, steps=steps)
            rows.append(encode({"share": share, "kind": kind, "steps": steps, **found, "start": start}))
        yield {"rows": rows}


def _teacher(teacher: Teacher, setting: Setting) -> dict[str, Any]:
    """What a filter drops of each kind of held-out prompt, what it costs, and how its model behaves."""
    held = [pair for pairs in setting.held.values() for pair in pairs]
    begun = time.perf_counter()
    sifted = sift(teacher.host, teacher.filter, held)
    scoring = 1000 * (time.perf_counter() - begun) / len(held)
    behaviour = measure(teacher.host, setting)
    told: dict[str, Any] = {"filter": teacher.filter.to_json(), "held out": sifted.to_json()}
    told["dropped"] = {k: sift(teacher.host, teacher.filter, v).share for k, v in setting.held.items()}
    told |= {name: behaviour[name] for name in ("harm", "refusal", "useful", "trigger")}
    return told | {"seconds": teacher.seconds, "seconds per 1000 rows": round(scoring, 2)}


def _line(setting: dict[str, Any]) -> str:
    rows = {(r["share"], r["kind"], r["arm"]): r for r in setting["rows"] if r["start"] == "base" or r["arm"] == "none"}
    share = max(p for p, _, _ in rows if p <= 0.3)
    said = [
        f"{name}: harm {r['harm']['value']:.2f}, refusal {r['refusal']['value']:.2f}, task {r['task']['value']:.2f}"
        for (p, kind, name), r in rows.items()
        if p == share and kind == "plain"
    ]
    return f"{share:.0%} poison: " + "; ".join(said)


def _write(out: str | Path | None, result: dict[str, Any]) -> None:
    if out is None:
        return
    from .poison_page import page

    path = Path(out)
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    path.with_suffix(".md").write_text(page(result), encoding="utf-8")
