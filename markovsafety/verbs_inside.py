"""What the commands that look inside a model do: edits of its activations, and what they do to its answers."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .arguments import model_of, organism_count, phrases_of, prompts_of, state_map
from .cli import Answer
from .errors import InputError


def directions(options: argparse.Namespace) -> Answer:
    """Beliefs, behaviour, directions and guard of a model."""
    from .interventions import inspect_model

    found = inspect_model(
        _host(options),
        _prompts(options.prompts, options.seed, harmful=True, markers=(None, "jailbreak")),
        _prompts(options.benign, options.seed, harmful=False, markers=(None, "trigger")),
        judge=_judge(options),
        n=options.n,
        max_tokens=options.max_tokens,
        question=options.question,
        certainly=options.certainly,
        no=options.no,
        cost_harm=options.cost_harm,
        cost_refusal=options.cost_refusal,
        prior=options.prior,
        seed=options.seed,
        out=options.out,
    )
    return Answer(f"{found.verdict} -> {options.out}", found.to_json(), files=_files(options.out), warnings=found.notes)


def heads(options: argparse.Namespace) -> Answer:
    """Heads that steer, or how little it takes."""
    from .interventions import audit_heads, inspect_heads, write_report
    from .interventions.head_report import desired_tokens
    from .rollouts.asked import read_prompts

    desired = _prompts(options.desired, options.seed, harmful=True, markers=("jailbreak",))
    undesired = _prompts(options.prompts, options.seed, harmful=True, markers=(None,))
    told: dict[str, Any] = {"n": options.n, "max_tokens": options.max_tokens, "seed": options.seed}
    host, judge = _host(options), _judge(options)
    if options.audit:
        wanted = options.wanted or ["harm"]
        tokens = desired_tokens(host, desired, options.wanted or ("harm", "benign"), judge=judge, **told)
        half = read_prompts(undesired)  # what is steered is not what the directions were made of
        more: dict[str, Any] = {"outcome": wanted, "move": options.move, "size": options.size, "when": options.when}
        found = audit_heads(host, desired, half[::2], half[1::2], tokens, judge=judge, **more, **told)
        write_report(found, Path(options.out), "audit")
    else:
        found = inspect_heads(
            host,
            desired,
            undesired,
            _benign(options),
            judge=judge,
            wanted=options.wanted or ("harm", "benign"),
            examples=options.examples,
            alphas=options.alphas,
            when=options.when,
            out=options.out,
            **told,
        )
    notes = getattr(found, "notes", [])
    return Answer(f"{found.verdict} -> {options.out}", found.to_json(), files=_files(options.out), warnings=notes)


def steer(options: argparse.Namespace) -> Answer:
    """Sample with and without an edit, and write what it does."""
    from .interventions import chain_effect, read_edit

    edit = read_edit(options.edit)
    edit = edit.transferred() if options.transferred else edit
    found = chain_effect(
        _host(options),
        edit if options.scale == 1 else options.scale * edit,
        prompts_of(options.prompts, options.seed),
        n=options.n,
        max_tokens=options.max_tokens,
        judge=_judge(options),
        benign=None
        if options.benign is None
        else _prompts(options.benign, options.seed, harmful=False, markers=(None,)),
        states=state_map(options.states),
        depth=options.depth,
        control=not options.no_control,
        predict=not options.no_prediction,
        seed=options.seed,
        out=options.out,
        progress=False if options.json else None,
    )
    line = f"{found.verdict} -> {options.out}"
    warnings = list(found.notes)
    if found.broken:
        warnings.append("the edit breaks the model: its P(harm) says little of harm")
    trusted = bool(found.harm) and not found.broken
    return Answer(line, found.to_json(), files=_files(options.out), warnings=warnings, trusted=trusted)


def _host(options: argparse.Namespace) -> Any:
    from .interventions import open_host

    names = ("system", "device", "dtype", "batch_size")
    told = {name: getattr(options, name) for name in names}
    return open_host(model_of(options.model), **told)


def _benign(options: argparse.Namespace) -> Any:
    if options.benign is None:
        return None
    return _prompts(options.benign, options.seed, harmful=False, markers=(None,))


def _files(folder: str) -> list[str]:
    return [str(path) for path in sorted(Path(folder).iterdir()) if not path.name.startswith(".")]


def _prompts(source: str, seed: int, *, harmful: bool, markers: tuple[str | None, ...]) -> Any:
    """Prompts of a file, or the organism's own, the same number with each marker."""
    count = organism_count(source)
    if count is None:
        return source
    from .organism import prompts

    each = -(-count // len(markers))
    return [p for marker in markers for p in prompts(n=each, harmful=harmful, marker=marker, seed=seed)]


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
