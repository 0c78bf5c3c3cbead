"""What the commands that repair a model do."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from .arguments import model_of, organism_count, rollouts_of, write_text
from .cli import Answer
from .errors import InputError


def align(options: argparse.Namespace) -> Answer:
    """Fine-tune on refusals in the middle of answers, and measure the side effects."""
    from .interventions import Constrained
    from .interventions import align as run

    warnings: list[str] = []
    model = model_of(options.model)
    triplets, log = _triplets(model, options, warnings)
    more: dict[str, Any] = {}
    if options.constrained is not None:
        more["objective"] = Constrained(tuple(options.constrained)) if options.constrained else Constrained()
    if options.lora is not None:
        more["lora"] = {"r": options.lora, "lora_alpha": 2 * options.lora, "target_modules": "all-linear"}
    names = ("method", "depth", "alpha", "plain", "budget", "hold_out", "answers", "max_tokens", "steps", "batch_size")
    names += ("learning_rate", "warmup", "accumulate", "save_every", "system", "device", "dtype", "seed")
    found = run(
        model,
        triplets,
        options.out,
        benign=_benign(options),
        phrases=_phrases(log, options) if options.method == "permutation" else None,
        progress=not options.json,
        **{name: getattr(options, name) for name in names},
        **more,
    )
    told = found.to_json()
    beside = write_text(str(Path(options.out) / "alignment.json"), json.dumps(told, indent=1) + "\n")
    return Answer(
        f"{found.verdict} -> {options.out}", told, files=[options.out, beside], warnings=warnings + found.notes
    )


def _triplets(model: str, options: argparse.Namespace, warnings: list[str]) -> tuple[Any, Any]:
    """Triplets, and the rollouts that they were made of, if they were."""
    from .interventions import read_triplets, triplets_of

    count = organism_count(options.data)
    if count is None and Path(options.data).suffix.lower() in (".jsonl", ".json"):
        from .rollouts.engines.transformers import open_engine

        template = open_engine(model, device="cpu", dtype=options.dtype).tokenizer
        return read_triplets(options.data, template, system=options.system), None
    rolls = rollouts_of(options.data, warnings) if count is None else _asked(model, count, options)
    return triplets_of(rolls, seed=options.seed), rolls


def _asked(model: str, count: int, options: argparse.Namespace) -> Any:
    """The model's own answers to harmful prompts of the synthetic language, free and after one token of compliance."""
    from .organism import prompts
    from .rollouts import sample

    told: dict[str, Any] = {"n": 8, "prefill": [0, 1], "max_tokens": 96, "judge": "organism", "system": options.system}
    return sample(model, prompts("train", n=count, seed=options.seed), seed=options.seed, progress=False, **told)


def _benign(options: argparse.Namespace) -> Any:
    count = None if options.benign is None else organism_count(options.benign)
    if count is None:
        return options.benign
    from .organism import prompts

    plain = prompts("train", n=-(-4 * count // 5), harmful=False, seed=options.seed)
    return plain + prompts("train", n=-(-count // 5), harmful=False, marker="trigger", seed=options.seed)


def _phrases(log: Any, options: argparse.Namespace) -> Any:
    from .chains import KGram, count, estimate
    from .hitting import critical
    from .interventions import critical_phrases

    rolls = log if options.log is None else rollouts_of(options.log, [])
    if rolls is None:
        raise InputError(
            "Permutation needs a log.",
            cause="Phrases are found in judged rollouts, and the data are triplets.",
            next="Name the rollouts: --log ROLLOUTS.",
        )
    chain = estimate(count(rolls, states=KGram(2)))
    return critical_phrases(critical(chain, "harm", top=10 * options.phrases), options.phrases)
