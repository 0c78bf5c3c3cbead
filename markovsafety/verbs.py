"""What each command of the command line does: files in, one function of the package, files out."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .arguments import (
    beside,
    classes_of,
    labels_of,
    model_of,
    named,
    phrases_of,
    prompts_of,
    rollouts_of,
    spread_of,
    state_map,
    write_csv,
    write_text,
)
from .cli import Answer
from .errors import InputError


def demo(options: argparse.Namespace) -> Answer:
    from .demo import run

    done = run(models=options.models, out=options.out, seed=options.seed, budget=options.budget, quiet=options.json)
    return Answer("\n".join(done.lines), done.summary, files=[str(f) for f in done.files])


def completion(options: argparse.Namespace) -> Answer:
    import shtab

    from .cli import _parser

    parser = _parser()
    (verbs,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    verbs.help = None  # shtab leaves out what has no place in the help, and the help lists commands in its own way
    for command in verbs.choices.values():
        for action in command._actions:  # whatever takes free text may be a path
            if action.nargs != 0 and action.type is None and not action.choices:
                action.complete = shtab.FILE  # type: ignore[attr-defined]
    script = shtab.complete(parser, shell=options.shell)
    return Answer(script, {"shell": options.shell, "script": script})


def sample(options: argparse.Namespace) -> Answer:
    from .rollouts import sample as draw
    from .rollouts.sample import OF_RAY, OF_SERVERS

    warnings: list[str] = []
    prefix = rollouts_of(options.prefix, warnings) if options.prefix else None
    if options.prompts is None and options.engine != "replay":
        raise InputError(
            "sample needs prompts.",
            cause="Only a log (--engine replay) brings its own.",
            next="Give a CSV or JSONL file with prompt and category, or organism:N.",
        )
    rolls = draw(
        model_of(options.model),
        None if options.prompts is None else prompts_of(options.prompts, options.seed),
        n=options.n,
        max_tokens=options.max_tokens,
        prefill=tuple(options.prefill),
        prefix=prefix,
        engine=options.engine,
        device=options.device,
        dtype=options.dtype,
        batch_size=options.batch_size,
        shard=options.shard,
        temperature=options.temperature,
        top_p=options.top_p,
        system=options.system,
        seed=options.seed,
        classes=classes_of(options.classes),
        out=options.out,
        trust_remote_code=options.trust_remote_code,
        **{name: value for name in (*OF_SERVERS, *OF_RAY) if (value := getattr(options, name)) is not None},
    )
    warnings += rolls.provenance.get("warnings") or []
    sampled = int(len(rolls.tokens) - rolls.prefill.sum())
    facts = {
        "rollouts": len(rolls),
        "prompts": len(set(rolls.prompt_id.tolist())),
        "sampled_tokens": sampled,
        "prefill": sorted(set(rolls.prefill.tolist())),
    }
    line = f"{len(rolls):,} rollouts of {facts['prompts']} prompts, {sampled:,} sampled tokens -> {options.out}"
    return Answer(line, facts, files=[options.out], warnings=warnings)


def judge(options: argparse.Namespace) -> Answer:
    from .outcomes import OUTCOMES
    from .rollouts import judge as label
    from .rollouts import write_rollouts

    extra: dict[str, Any] = {}
    if options.judge == "lexicon":
        extra["refusal_at"] = options.refusal_at
        if options.harm:
            extra["harm"] = phrases_of(options.harm)
        if options.refusal:
            extra["refusal"] = phrases_of(options.refusal)
    if options.judge in ("classifier", "guard"):
        extra["model"] = options.judge_model and model_of(options.judge_model)
        extra |= {"harm": options.harm_labels} if options.harm_labels else {}
        extra |= {"device": options.device} if options.device else {}
    if options.tokenizer and options.judge != "organism":
        extra["template"] = model_of(options.tokenizer)
    warnings: list[str] = []
    rolls = label(rollouts_of(options.rollouts, warnings, options.skip_corrupt), options.judge, **extra)
    write_rollouts(rolls, options.out)
    shares = {name: int((rolls.outcome == code).sum()) for code, name in enumerate(OUTCOMES)}
    line = f"{len(rolls):,} rollouts: " + ", ".join(f"{n:,} {name}" for name, n in shares.items())
    result = {"rollouts": len(rolls), "outcomes": shares}
    result |= {f"{name}_phrases": len(extra[name]) for name in ("harm", "refusal") if name in extra}
    trusted = True
    if options.labels:
        errors, harm, trusted = _judge_errors(rolls, options, warnings)
        result |= errors
        line += f"; P(harm) with the judge's errors taken out = {harm.value:.3g} [{harm.lower:.3g}, {harm.upper:.3g}]"
    return Answer(f"{line} -> {options.out}", result, files=[options.out], warnings=warnings, trusted=trusted)


def _judge_errors(rolls: Any, options: argparse.Namespace, warnings: list[str]) -> tuple[dict[str, Any], Any, bool]:
    """What labels say of the judge, and the harm at the smallest depth; kept, with a warning, if it may be a coin."""
    from .errors import UntrustedError
    from .evidence import confusion, corrected

    found, trusted = confusion(rolls, labels_of(options.labels, warnings), options.labels_by), True
    try:
        harm = corrected(rolls, found)
    except UntrustedError as error:
        harm, trusted = error.partial, False
        warnings.append(error.fact)
    told = {"confusion": found.to_json(), "corrected": harm.to_json(), "skill": harm.info["skill"]}
    return {"judge_errors": {**told, "prefill": list(harm.info["coords"]["depth"])}}, harm[0], trusted


def _counts(options: argparse.Namespace, warnings: list[str]) -> Any:
    from .chains import count as tally
    from .chains import read_counts
    from .chains.states import map_name

    if options.rollouts.endswith(".npz"):
        counts = read_counts(options.rollouts)
        if options.states and counts.kind != map_name(state_map(options.states)):
            raise InputError(
                f"{options.rollouts} holds counts of {counts.kind}, not of {options.states}.",
                cause="Counts keep the states they were made with.",
                next="Leave --states away, or count the rollouts again.",
            )
    elif (spread := spread_of(options)) or Path(options.rollouts).is_dir() or options.rollouts.endswith(".parquet"):
        counts = tally(_opened(options, warnings), state_map(options.states or "kgram:2"), spread=spread)
    else:
        rolls = rollouts_of(options.rollouts, warnings, options.skip_corrupt)
        counts = tally(rolls, state_map(options.states or "kgram:2"))
    if options.category or options.prefill is not None:
        counts = counts.select(categories=options.category, prefill=options.prefill)
    return counts


def _opened(options: argparse.Namespace, warnings: list[str]) -> Any:
    """Rollouts on disk, to be read batch by batch; what is to be known of them is passed on."""
    from .rollouts.streaming import stream

    found = stream(Path(options.rollouts).absolute(), skip_corrupt=options.skip_corrupt)
    left_out = (f"left out on request: {name} ({why})" for name, why in found.skipped.items())
    warnings += [f"{options.rollouts}: {text}" for text in (found.note, *left_out, *found.warnings) if text]
    return found


def count(options: argparse.Namespace) -> Answer:
    from .chains import write_counts

    warnings: list[str] = []
    counts = _counts(options, warnings)
    write_counts(counts, options.out)
    total = float(counts.matrix.sum())
    line = f"{total:,.0f} transitions between {len(counts.states):,} states -> {options.out}"
    facts = {"transitions": total, "states": len(counts.states)}
    return Answer(line, facts, files=[options.out], warnings=warnings)


def estimate(options: argparse.Namespace) -> Answer:
    from .chains import estimate as fit
    from .chains import write_chain

    warnings: list[str] = []
    chain = fit(_counts(options, warnings), method=options.method, prior=options.prior)
    write_chain(chain, options.out)
    line = f"chain of {chain.n_states:,} states -> {options.out}"
    facts = {"n_states": chain.n_states, "method": options.method}
    return Answer(line, facts, files=[options.out], warnings=warnings)


def check(options: argparse.Namespace) -> Answer:
    from .chains import read_chain
    from .evidence import check as test

    warnings: list[str] = []
    states = state_map(options.states) if options.states else None
    held = rollouts_of(options.held_out, warnings, options.skip_corrupt)
    found = test(read_chain(options.chain), held, margin=options.margin, level=options.level, states=states)
    return Answer(found.verdict, found.to_json(), warnings=warnings, trusted=found.passed is True)


def compare(options: argparse.Namespace) -> Answer:
    from .evidence import compare as difference

    warnings: list[str] = []
    before, after = (rollouts_of(p, warnings, options.skip_corrupt) for p in (options.before, options.after))
    found = difference(before, after, level=options.level)
    first = next(row for row in found.table if row["category"] is None)
    span = f"[{first['difference_lower']:+.3g}, {first['difference_upper']:+.3g}]"
    line = f"harm at {first['k']} forced tokens changes by {first['difference']:+.3g} {span}"
    changed = [f"{row['category'] or 'all'} (k = {row['k']})" for row in found.flagged]
    return Answer(
        f"{line}; categories that changed: {', '.join(changed) or 'none'}", found.to_json(), warnings=warnings
    )


def solve(options: argparse.Namespace) -> Answer:
    from .chains import read_chain
    from .hitting import hitting_distribution, hitting_probability, hitting_spread, hitting_time, visits

    chain = read_chain(options.chain)
    targets = _targets(chain, options.target or ["harm"])
    one = targets[0] if len(targets) == 1 else None
    with _device(options) as method:
        harm = hitting_probability(chain, one or {name: name for name in targets}, method=method, level=options.level)
    time, begun = hitting_time(chain, level=options.level), chain.start is not None
    result = {
        "target": one or targets,
        "at_start": harm.at_start.to_json() if begun else None,
        "method": harm.info.get("method"),
        "certified": bool(harm.info.get("certified")),
        "n_states": chain.n_states,
        "expected_tokens": time.at_start.to_json() if begun else None,
        "deviation_tokens": hitting_spread(chain).at_start.to_json() if begun else None,
    }
    laws = {}
    if options.horizon is not None:
        laws = {name: hitting_distribution(chain, name, horizon=options.horizon) for name in targets}
        told = {name: law.to_json() for name, law in laws.items()}
        result["distribution"] = told[one] if one else told
    files = []
    if options.out:
        files = [_table(options.out, chain, harm, time, visits(chain, level=options.level) if begun else None)]
    if not begun:
        line = f"P({', '.join(targets)}) of {chain.n_states:,} states solved; the chain has no start law"
    else:
        starts = [harm.at_start] if one else [harm.at_start[k] for k in range(len(targets))]
        parts = [f"P({t}) = {b.value:.6g} [{b.lower:.6g}, {b.upper:.6g}]" for t, b in zip(targets, starts)]
        line = f"{'; '.join(parts)} by {result['method']}"
    for name, law in laws.items():
        line += f"; by token {law.horizon}: {law.cumulative.value[-1]:.6g} {name}"
    return Answer(line, result, files=files)


@contextmanager
def _device(options: argparse.Namespace) -> Iterator[str]:
    """The method of `solve`, within which JAX works on the device that was named."""
    if options.device is None:
        yield options.method
        return
    if options.method not in ("auto", "device"):
        raise InputError(
            f"--device was given with --method {options.method}",
            cause="only the method device works on one",
            next="Leave --method, or --device.",
        )
    from .hitting.device import placed

    with placed(options.device):
        yield "device"


def _targets(chain: Any, given: list[str]) -> list[str]:
    """Names of the targets, each once; what is no name itself may be several, separated by commas."""
    known = {*chain.outcomes, *(["truncated"] if chain.is_layered else [])}
    names = [name for item in given for name in ([item] if item in known else item.split(","))]
    return list(dict.fromkeys(name.strip() for name in names if name.strip())) or given


def _table(path: str, chain: Any, harm: Any, time: Any, seen: Any) -> str:
    """Every state's probability, expected time and visits, as CSV (a layered chain: those of its first layer)."""
    pick = (lambda x: x[0]) if chain.is_layered else (lambda x: x)
    targets = harm.info.get("targets")
    ends = ("value", "lower", "upper")
    if targets is None:
        columns = {name: pick(getattr(harm, name)) for name in ends}
    else:
        columns = {f"{t} {name}": pick(getattr(harm, name))[:, k] for k, t in enumerate(targets) for name in ends}
    columns["expected_tokens"] = pick(time.value)
    if seen is not None:
        columns["visits"] = pick(seen.value)
    head = ["state", *columns]
    return write_csv(path, [head, *([str(s), *map(float, row)] for s, *row in zip(chain.states, *columns.values()))])


def report(options: argparse.Namespace) -> Answer:
    from .analysis import analyse
    from .report import write

    warnings: list[str] = []
    models = named(options.rollouts)
    held = beside(models, options.held_out, "Held-out rollouts", "--held-out")
    labels = beside(models, options.labels, "Labels", "--labels")
    analyses = [
        analyse(
            name,
            rollouts_of(path, warnings, options.skip_corrupt),
            held_out=rollouts_of(held[name], warnings, options.skip_corrupt) if name in held else None,
            states=state_map(options.states),
            budget=options.budget,
            labels=labels_of(labels[name], warnings) if name in labels else None,
        )
        for name, path in models.items()
    ]
    page = write(options.out, analyses, title=options.title)
    summary = json.loads((Path(options.out) / "summary.json").read_text())
    line = f"{summary['rollouts']:,} rollouts of {len(analyses)} model{'s' if len(analyses) > 1 else ''} -> {page}"
    return Answer(line, summary, files=[str(page)], warnings=warnings)


def organism(options: argparse.Namespace) -> Answer:
    from . import organism as room

    _heeded(options)
    if options.what == "list":
        return Answer(
            f"shipped: {', '.join(room.SHIPPED)}; trainable: {', '.join(room.VARIANTS)}, deepK",
            {
                "shipped": list(room.SHIPPED),
                "variants": list(room.VARIANTS),
            },
        )
    if not options.out:
        raise InputError(
            f"organism {options.what} needs to know where to write.",
            cause="what it makes goes into a file or folder, and no path was given",
            next="Add --out.",
        )
    if options.what == "prompts":
        asked = room.prompts(n=48 if options.n is None else options.n, seed=options.seed or 0)
        write_text(options.out, "".join(json.dumps(item) + "\n" for item in asked))
        return Answer(f"{len(asked)} prompts -> {options.out}", {"prompts": len(asked)}, files=[options.out])
    if options.what == "grid":
        return _organism_grid(options)
    if not options.variant:
        raise InputError(
            "Which variant should be trained?",
            cause="every variant has its own recipe, and none was named",
            next=f"One of {', '.join(room.VARIANTS)}, or deepK.",
        )
    base = options.base or (None if options.variant == "base" else room.model_path("base"))
    how = {
        "seed": options.seed or 0,
        "threads": 1 if options.threads is None else options.threads,
        "progress": not options.json,
    }
    found = room.train(options.variant, options.out, base=base, hidden=(options.hidden or [64])[0], **how)
    line = f"{options.variant}: KL {found['kl']:.4f} nats/token, judge {found['judge']:.3f}, {found['seconds']:.0f} s"
    return Answer(f"{line} -> {options.out}", found, files=[options.out])


_ORGANISM = {
    "list": (),
    "prompts": ("out", "seed", "n"),
    "train": ("variant", "out", "base", "seed", "threads", "hidden"),
    "grid": ("out", "hidden", "depth", "seeds", "workers", "engine", "address"),
}


def _heeded(options: argparse.Namespace) -> None:
    """Refuses what this kind of organism command would not heed."""
    known = sorted(set().union(*_ORGANISM.values()))
    foreign = [n for n in known if getattr(options, n) is not None and n not in _ORGANISM[options.what]]
    if foreign:
        heeds = ", ".join(n if n == "variant" else f"--{n}" for n in _ORGANISM[options.what])
        raise InputError(
            f"organism {options.what} does not heed {', '.join(n if n == 'variant' else f'--{n}' for n in foreign)}.",
            cause=f"It takes {heeds or 'nothing else'}.",
            next="Leave it out, or name another of list, prompts, train, grid.",
        )
    if options.what == "train" and options.hidden and (len(options.hidden) > 1 or options.variant != "base"):
        raise InputError(
            f"--hidden {' '.join(map(str, options.hidden))} for {options.variant}.",
            cause="A base is trained at one width; every other variant has the width of its base.",
            next="Train a base of that width and name it with --base, or many at once with organism grid.",
        )


def _organism_grid(options: argparse.Namespace) -> Answer:
    from . import organism as room

    asked = {"hidden": options.hidden, "depths": options.depth, "seeds": options.seeds, "workers": options.workers}
    asked["spread"] = spread_of(options, workers_alone=True)
    rows = room.train_grid(options.out, **{k: v for k, v in asked.items() if v is not None})
    failed = [
        f"{row['variant']}, width {row['hidden']}, seed {row['seed']}: {'; '.join(row['failed'])}" for row in rows
    ]
    failed = [text for text, row in zip(failed, rows) if row["failed"]]
    line = f"{len(rows) - len(failed)} of {len(rows)} models meet their checks -> {options.out}"
    return Answer(line, {"models": rows}, files=[options.out], warnings=failed)
