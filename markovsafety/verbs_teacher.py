"""What the command ``teacher`` does."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from .arguments import model_of, organism_count, write_text
from .cli import Answer
from .errors import InputError

NEEDED = {
    "train": ("pairs",),
    "fit": ("pairs",),
    "filter": ("data",),
    "student": ("teacher", "data", "pairs"),
    "monitor": ("reference", "data"),
}
RECORD = "teacher.json"
UNLABELLED = "batches without labels: whether more clean rows are dropped than before cannot be told of them"


def teacher(options: argparse.Namespace) -> Answer:
    """One of the steps."""
    missing = [name for name in NEEDED[options.what] if getattr(options, name) is None]
    if missing:
        raise InputError(
            f"teacher {options.what} lacks --{missing[0]}.",
            cause="It needs " + " and ".join(f"--{name}" for name in NEEDED[options.what]) + ".",
            next="markovsafety teacher --help explains every argument.",
        )
    steps = {"train": _train, "fit": _fit, "filter": _filter, "student": _student, "monitor": _monitor}
    return steps[options.what](options)


def _train(options: argparse.Namespace) -> Answer:
    from .interventions import train_teacher

    model = model_of(options.model)
    names = ("level", "feature", "recall", "threshold", "validation", "system")
    found = train_teacher(
        model,
        _alignment(model, options, options.system),
        options.out,
        position=options.position or "t_post",
        weight=0.1 if options.weight is None else options.weight,
        **{name: getattr(options, name) for name in names},
        **_training(options),
    )
    told = found.to_json()
    beside = write_text(str(Path(options.out) / RECORD), json.dumps(told, indent=1) + "\n")
    return Answer(f"{found.verdict} -> {options.out}", told, files=[str(found.model), str(found.path), beside])


def _fit(options: argparse.Namespace) -> Answer:
    """An aligned model in the teacher's place: its feature and threshold, without training."""
    from .interventions import fit_filter, open_host, write_filter
    from .interventions.pairs import both_kinds

    model = model_of(options.model)
    host = open_host(model, system=options.system, device=options.device, dtype=options.dtype)
    sides = both_kinds(_alignment(model, options, options.system), "the alignment pairs")
    made = fit_filter(
        host,
        *([np.array(p.prompt) for p in side] for side in sides),
        position=options.position or ("t_post", "t_inst"),
        **{name: getattr(options, name) for name in ("level", "recall", "threshold", "seed")},
    )
    path = _filter_of(options.out)
    write_filter(made, path)
    told = {"model": str(Path(model).resolve()) if Path(model).is_dir() else model, "filter": made.to_json()}
    told |= {"path": str(path), "verdict": str(made)}
    beside = write_text(str(Path(options.out) / RECORD), json.dumps(told, indent=1) + "\n")
    return Answer(f"{made} -> {options.out}", told, files=[str(path), beside])


def _filter(options: argparse.Namespace) -> Answer:
    from .interventions import write_review, write_sifted
    from .interventions.pairs import refuse_all_poison

    found = _sifted(options.model, options.data, options)
    files = [str(path) for path in write_sifted(found, options.out)]
    if options.review is not None:
        write_review(found, options.review)
        files.append(options.review)
    if not found.kept:
        raise InputError(
            f"The filter dropped all {len(found.pairs)} pairs.",
            cause=f"{found.verdict}; the report is in {options.out}.",
            next="Is this data all poison? If not, look at its cosines in the report, and decide by --review.",
            partial=found.to_json(),
        )
    refuse_all_poison(found.pairs, "the data")
    return Answer(f"{found.verdict} -> {options.out}", found.to_json(), files=files, warnings=found.notes)


def _student(options: argparse.Namespace) -> Answer:
    from .interventions import read_filter, train_student

    model = model_of(options.model)
    system = read_filter(_filter_of(options.teacher)).system
    if options.no_filter:
        data: Any = [pair for path in options.data for pair in _pairs(path, model, system)]
    else:
        data = _sifted(options.teacher, options.data, options)
    record = train_student(
        model,
        data,
        options.out,
        teacher=_model_of(options.teacher),
        alignment=_alignment(model, options, system),
        weight=1.0 if options.weight is None else options.weight,
        **_training(options),
    )
    kept = record["about"]["kept"]
    line = f"learned {kept} pairs in {record['steps']} updates -> {options.out}"
    return Answer(line, record, files=[options.out], warnings=[] if options.no_filter else data.notes)


def _monitor(options: argparse.Namespace) -> Answer:
    from .interventions import fit_data_monitor, read_data_monitor, watch_data, write_data_monitor

    if Path(options.reference).suffix == ".safetensors":
        monitor, beside = read_data_monitor(options.reference), options.reference
    else:
        reference = _sifted(options.model, [options.reference], options)
        monitor = fit_data_monitor(reference, rate=options.rate, horizon=options.horizon)
        beside = str(Path(options.out).with_suffix(".safetensors"))
    if options.begin is not None:
        monitor = replace(monitor, watched=options.begin)
    batches = [_sifted(options.model, [path], options) for path in options.data]
    found = watch_data(monitor, batches)
    write_data_monitor(monitor.after(len(found)), beside)  # the level of these batches is spent
    told = {"rate": monitor.rate, "horizon": monitor.horizon, "batches": [b.to_json() for b in found]}
    write_text(options.out, json.dumps(told, indent=1) + "\n")
    alarms = [str(b) for b in found if b.alarms]
    line = (
        f"{len(alarms)} of {len(found)} batches raise an alarm (false ones: {monitor.rate:g} over all) -> {options.out}"
    )
    warnings = alarms if all(b.false_drops for b in found) else [*alarms, UNLABELLED]
    return Answer(line, told, files=[options.out, beside], warnings=warnings, trusted=not alarms)


def _sifted(folder: str, paths: list[str], options: argparse.Namespace) -> Any:
    """Data through the filter of a folder that ``teacher train`` wrote, and the decisions of people."""
    from .interventions import open_host, read_filter, read_pairs, read_review, reviewed, sift

    model, known = _model_of(folder), read_filter(_filter_of(folder))
    system = known.system if options.system is None else options.system
    host = open_host(model, system=system, device=options.device, dtype=options.dtype)
    pairs = [p for path in paths for p in read_pairs(path, host.engine.tokenizer, answers=options.what == "student")]
    found = sift(host, known, pairs)
    return reviewed(found, read_review(options.decisions)) if options.decisions else found


def _model_of(folder: str) -> str:
    """The teacher of a folder: trained, and in it; or an aligned model that lies where it did."""
    if (Path(folder) / "model").is_dir():
        return str(Path(folder) / "model")
    try:
        return str(json.loads((Path(folder) / RECORD).read_text(encoding="utf-8"))["model"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{folder} holds no teacher.",
            cause=f"There is no folder model in it, and no {RECORD} that names one.",
            next="Give the folder that markovsafety teacher train or fit has written.",
        ) from error


def _filter_of(folder: str) -> Path:
    return Path(folder) / "filter.safetensors"


def _pairs(path: Any, model: str, system: str | None) -> Any:
    from .interventions import read_pairs
    from .rollouts.engines.transformers import open_engine

    template = open_engine(model, device="cpu").tokenizer
    return read_pairs(path, template if system is None else replace(template, system=system))


def _alignment(model: str, options: argparse.Namespace, system: str | None) -> Any:
    count = organism_count(options.pairs)
    if count is None:
        return _pairs(options.pairs, model, system)
    from .organism.tasks import alignment_records

    return _pairs(alignment_records(count, seed=options.seed), model, system)


def _training(options: argparse.Namespace) -> dict[str, Any]:
    names = ("steps", "batch_size", "learning_rate", "warmup", "save_every", "device", "dtype", "seed")
    more: dict[str, Any] = {name: getattr(options, name) for name in names}
    if options.lora is not None:
        more["lora"] = {"r": options.lora, "lora_alpha": 2 * options.lora, "target_modules": "all-linear"}
    return more | {"progress": not options.json}
