"""What ``markovsafety bench`` does: one measurement, its JSON and its page."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from .arguments import model_of, spread_of
from .cli import Answer
from .errors import InputError


def bench(options: argparse.Namespace) -> Answer:
    if options.device and options.what not in ("gpu", "hitting"):
        raise InputError(
            f"bench {options.what} takes no --device.",
            cause="It measures what this machine's processor does; its models and tables are small.",
            next="Leave it out; bench gpu and bench hitting --device gpu measure a GPU.",
        )
    if options.what == "hitting" and options.gpu and options.device == "cpu":
        raise InputError(
            "--gpu and --device cpu contradict each other.", cause="Both say where.", next="Leave one of them out."
        )
    return _BENCHES[options.what](options)


def _bench_rollouts(options: argparse.Namespace) -> Answer:
    from .bench.rollouts import run

    result = run(model=model_of(options.model), json=options.out)
    return Answer(result["line"], result, files=[str(options.out)] if options.out else [])


def _bench_hitting(options: argparse.Namespace) -> Answer:
    from .bench.hitting import run

    result = run(
        case=options.case,
        quick=options.quick,
        gpu=options.gpu or options.device == "gpu",
        turns=options.turns,
        limit=options.limit,
        json=options.out,
    )
    faults = [f"wrong: {fault}" for fault in result["faults"]]
    return Answer(result.pop("line"), result, files=_beside(options.out), warnings=faults, trusted=not faults)


def _bench_gpu(options: argparse.Namespace) -> Answer:
    from .bench.gpu import run

    result = run(options.out, quick=options.quick, device=options.device)
    failed = [f"{name}: {part['error']}" for name, part in result["parts"].items() if "error" in part]
    return Answer(result.pop("line"), result, files=_beside(options.out), warnings=failed)


def _bench_check(options: argparse.Namespace) -> Answer:
    from .bench.check import run

    result = run(options.out)
    return Answer(result.pop("line"), result, files=_beside(options.out))


def _bench_cluster(options: argparse.Namespace) -> Answer:
    from .bench.cluster import run

    result = run(options.out, quick=options.quick)
    return Answer(result.pop("line"), result, files=_beside(options.out))


def _bench_coverage(options: argparse.Namespace) -> Answer:
    from .bench.coverage import run

    result = run(quick=options.quick, json=options.out, spread=spread_of(options))
    missed = [f"outside its limits: {text}" for text in result["missed"]]
    return Answer(result.pop("line"), result, files=_beside(options.out), warnings=missed)


def _bench_masses(options: argparse.Namespace) -> Answer:
    from .bench.masses import run

    return Answer(run(options.out), {}, files=[str(options.out)] if options.out else [])


def _bench_poison(options: argparse.Namespace) -> Answer:
    if options.models is None:
        from .bench.poison import run

        result = run(options.out, quick=options.quick)
        return Answer(result.pop("line"), result, files=_beside(options.out))
    from .bench.poison_seeds import run as run_seeds

    result = run_seeds(options.models, options.out, quick=options.quick)
    return Answer(result.pop("line"), result, files=_beside(options.out))


def _bench_posterior(options: argparse.Namespace) -> Answer:
    from .bench.posterior import run

    result = run(options.out)
    return Answer(json.dumps(result, indent=1), result, files=[str(options.out)] if options.out else [])


def _bench_capacity(options: argparse.Namespace) -> Answer:
    from .bench.capacity import run

    result = run(options.models, options.out)
    files = [*_beside(options.out), *([str(Path(options.out).with_suffix(".png"))] if options.out else [])]
    return Answer(result.pop("line"), result, files=files)


def _bench_ensembles(options: argparse.Namespace) -> Answer:
    from .bench.ensembles import run

    result = run(options.out, models=options.models, **({"ask": 144} if options.quick else {}))
    told = {k: v for k, v in result.items() if k not in ("line", "cells", "correlation")}
    return Answer(result["line"], told, files=_beside(options.out))


def _bench_profiles(options: argparse.Namespace) -> Answer:
    from .bench.profiles import run

    small: dict[str, Any] = {"ask": 24, "n": 4} if options.quick else {}
    result = run(options.out, models=options.models, **small)
    return Answer(result.pop("line"), result, files=_beside(options.out))


def _bench_rare(options: argparse.Namespace) -> Answer:
    from .bench.rare import run

    result = run(repetitions=200 if options.quick else 4000, models=not options.quick, json=options.out)
    return Answer(result.pop("line"), result, files=_beside(options.out))


def _bench_align(options: argparse.Namespace) -> Answer:
    from .bench.align import run

    small: dict[str, Any] = {"seeds": 1, "ask": 36, "n": 4, "steps": 60} if options.quick else {}
    result = run(options.out, work=options.models, **small)
    return Answer(result["line"], result, files=_beside(options.out))


def _bench_debias(options: argparse.Namespace) -> Answer:
    from .bench.debias import run

    if options.models is None:
        raise InputError(
            "bench debias was given no models.",
            cause="It measures the variants over, over2, bias and gap, which are not shipped.",
            next="Train them (markovsafety organism train NAME --out DIR/NAME) and give --models DIR.",
        )
    result = run(options.out, models=options.models, quick=options.quick)
    return Answer(result.pop("line"), result, files=_beside(options.out))


def _bench_hooks(options: argparse.Namespace) -> Answer:
    from .bench.hooks import run

    result = run(options.out, quick=options.quick, turns=options.turns)
    return Answer(result.pop("line"), result, files=_beside(options.out))


def _bench_inside(options: argparse.Namespace) -> Answer:
    from .bench.inside_seeds import run

    if options.models is None:
        raise InputError(
            "bench inside has no models.",
            cause="it measures planted worlds; those that are missing are trained, some minutes each",
            next="Give --models DIR, a folder for them.",
        )
    result = run(options.models, options.out, quick=options.quick)
    line = result.pop("line")
    folder = None if options.out is None else Path(options.out)
    folder = folder.parent.parent if folder is not None and folder.suffix == ".json" else folder
    files = [] if folder is None else [str(folder / paper / f"seeds.{s}") for paper in result for s in ("json", "md")]
    return Answer(line, result, files=files)


def _bench_sweep(options: argparse.Namespace) -> Answer:
    from .bench.sweep import run

    result = run(options.out, quick=options.quick)
    return Answer(result.pop("line"), result, files=_beside(options.out))


def _bench_counting(options: argparse.Namespace) -> Answer:
    from .bench.counting import run

    result = run(options.out, quick=options.quick)
    return Answer(result.pop("line"), result, files=_beside(options.out))


_BENCHES = {
    "align": _bench_align,
    "rollouts": _bench_rollouts,
    "gpu": _bench_gpu,
    "hitting": _bench_hitting,
    "capacity": _bench_capacity,
    "check": _bench_check,
    "cluster": _bench_cluster,
    "counting": _bench_counting,
    "coverage": _bench_coverage,
    "debias": _bench_debias,
    "ensembles": _bench_ensembles,
    "hooks": _bench_hooks,
    "inside": _bench_inside,
    "masses": _bench_masses,
    "poison": _bench_poison,
    "posterior": _bench_posterior,
    "profiles": _bench_profiles,
    "rare": _bench_rare,
    "sweep": _bench_sweep,
}


def _beside(out: str | None) -> list[str]:
    return [str(out), str(Path(out).with_suffix(".md"))] if out else []
