"""What the commands that look inside a model do: edits of its activations, and what they do to its answers."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .arguments import model_of, phrases_of, prompts_of, state_map
from .cli import Answer
from .errors import InputError


def steer(options: argparse.Namespace) -> Answer:
    """Sample with and without an edit, and write what it does."""
    from .interventions import chain_effect, read_edit

    edit = read_edit(options.edit)
    edit = edit.transferred() if options.transferred else edit
    found = chain_effect(
        model_of(options.model),
        edit if options.scale == 1 else options.scale * edit,
        prompts_of(options.prompts, options.seed),
        n=options.n,
        max_tokens=options.max_tokens,
        judge=_judge(options),
        benign=None if options.benign is None else _benign(options.benign, options.seed),
        states=state_map(options.states),
        depth=options.depth,
        control=not options.no_control,
        predict=not options.no_prediction,
        seed=options.seed,
        system=options.system,
        out=options.out,
        progress=False if options.json else None,
    )
    files = [str(path) for path in sorted(Path(options.out).iterdir()) if not path.name.startswith(".")]
    line = f"{found.verdict} -> {options.out}"
    warnings = list(found.notes)
    if found.broken:
        warnings.append("the edit breaks the model: its P(harm) says little of harm")
    return Answer(line, found.to_json(), files=files, warnings=warnings, trusted=bool(found.harm) and not found.broken)


def _judge(options: argparse.Namespace) -> Any:
    """The judge by its name; a lexicon with the phrases that were given."""
    if options.judge != "lexicon":
        if options.harm or options.refusal:
            raise InputError(
                f"--harm and --refusal are no options of the judge {options.judge!r}.",
                cause="Phrases belong to the lexicon.",
                next="Leave them out, or use --judge lexicon.",
            )
        return options.judge
    from .rollouts import LexiconJudge

    return LexiconJudge(phrases_of(options.harm), phrases_of(options.refusal), options.refusal_at)


def _benign(source: str, seed: int) -> Any:
    """Harmless prompts: a file, or the organism's own."""
    harmful = prompts_of(source, seed)
    if harmful is source:
        return source
    from .organism import prompts

    return prompts(n=len(harmful), harmful=False, seed=seed)
