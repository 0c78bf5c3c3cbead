"""What the commands for over-refusal and for weak categories do."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from .arguments import lines_of, model_of, named, organism_count, phrases_of, rollouts_of, write_text
from .cli import Answer
from .errors import InputError


def debias(options: argparse.Namespace) -> Answer:
    """The bias of a safety-tuned model: measured, taken off, predicted, verified."""
    from .interventions import inspect_bias, open_host

    told = {name: getattr(options, name) for name in ("system", "device", "dtype", "batch_size")}
    found = inspect_bias(
        open_host(model_of(options.model), **told),
        open_host(model_of(options.reference), **told),
        _prompts(options.prompts, options.seed, harmful=True),
        _prompts(options.benign, options.seed, harmful=False),
        judge=_judge(options),
        n=options.n,
        max_tokens=options.max_tokens,
        strengths=options.strength,
        pool=None if options.pool is None else lines_of(Path(options.pool)),
        length=options.length,
        random=options.random,
        response=options.response,
        limit=options.limit,
        verify=not options.no_verify,
        seed=options.seed,
        out=options.out,
    )
    warnings = [*found.notes]
    if not found.holds:
        warnings.append("a prediction misses by more than 4 standard errors: believe the sampled numbers")
    files = [str(path) for path in sorted(Path(options.out).iterdir()) if not path.name.startswith(".")]
    line = f"{found.verdict} -> {options.out}"
    return Answer(line, found.to_json(), files=files, warnings=warnings, trusted=found.holds)


def vulnerabilities(options: argparse.Namespace) -> Answer:
    """Weak categories of a model and of its defences."""
    from .interventions import vulnerabilities as find

    warnings: list[str] = []
    arms = {name: rollouts_of(path, warnings) for name, path in named(options.rollouts).items()}
    told = {name: getattr(options, name) for name in ("outcome", "margin", "limit", "rate", "control")}
    found = find(arms, **told)
    files = []
    if options.out is not None:
        numbers = Path(options.out).suffix == ".json"
        text = json.dumps(found.to_json(), allow_nan=False, indent=1) if numbers else found.markdown()
        files.append(write_text(options.out, text + "\n"))
    return Answer(found.verdict, found.to_json() | {"weak": found.weak}, files=files, warnings=warnings)


def _prompts(source: str, seed: int, *, harmful: bool) -> Any:
    count = organism_count(source)
    if count is None:
        return source
    from .organism import prompts

    return prompts(n=count, harmful=harmful, seed=seed)


def _judge(options: argparse.Namespace) -> Any:
    """The judge by its name; a lexicon with the phrases that were given."""
    if options.judge == "lexicon":
        from .rollouts import LexiconJudge

        return LexiconJudge(phrases_of(options.harm), phrases_of(options.refusal), options.refusal_at)
    if options.harm or options.refusal:
        raise InputError(
            f"--harm and --refusal are no options of the judge {options.judge!r}.",
            cause="Phrases belong to the lexicon.",
            next="Leave them out, or use --judge lexicon.",
        )
    return options.judge
