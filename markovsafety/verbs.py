"""What each command of the command line does: files in, one function of the package, files out."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from .cli import Answer
from .errors import InputError


def _model(name: str) -> str:
    """``organism:shallow`` names a shipped model; everything else is a folder or a hub id."""
    if name.startswith("organism:"):
        from .organism import model_path

        return str(model_path(name.split(":", 1)[1]))
    return name


def _prompts(source: str, seed: int) -> Any:
    if source.split(":")[0] != "organism":
        return source
    from .organism import prompts

    count = source.partition(":")[2] or "48"
    if not count.isdigit():
        raise InputError(
            f"{source!r} names no prompts.", next="Write organism or organism:N, or give a CSV or JSONL file."
        )
    return prompts(n=int(count), seed=seed)


def state_map(text: str) -> Any:
    """A state map from its name: ``kgram:3`` or ``position``."""
    from .chains import KGram, Position

    kind, _, k = text.partition(":")
    if kind == "kgram" and k.isdigit() and int(k) > 0:
        return KGram(int(k))
    if text == "position":
        return Position()
    raise InputError(f"There is no state map {text!r}.", next="Use kgram:K with K >= 1, or position.")


def demo(options: argparse.Namespace) -> Answer:
    from .demo import run

    done = run(models=options.models, out=options.out, seed=options.seed, budget=options.budget, quiet=options.json)
    return Answer("\n".join(done.lines), done.summary, files=[str(f) for f in done.files])


def sample(options: argparse.Namespace) -> Answer:
    from .rollouts import read_rollouts
    from .rollouts import sample as draw

    prefix = read_rollouts(options.prefix) if options.prefix else None
    rolls = draw(
        _model(options.model),
        _prompts(options.prompts, options.seed),
        n=options.n,
        max_tokens=options.max_tokens,
        prefill=tuple(options.prefill),
        prefix=prefix,
        engine=options.engine,
        device=options.device,
        dtype=options.dtype,
        batch_size=options.batch_size,
        temperature=options.temperature,
        top_p=options.top_p,
        system=options.system,
        seed=options.seed,
        out=options.out,
    )
    sampled = int(len(rolls.tokens) - rolls.prefill.sum())
    facts = {
        "rollouts": len(rolls),
        "prompts": len(set(rolls.prompt_id.tolist())),
        "sampled_tokens": sampled,
        "prefill": sorted(set(rolls.prefill.tolist())),
    }
    line = f"{len(rolls):,} rollouts of {facts['prompts']} prompts, {sampled:,} sampled tokens -> {options.out}"
    return Answer(line, facts, files=[options.out])


def _phrases(given: list[str] | None) -> list[str] | None:
    if given is None:
        return None
    out = []
    for item in given:
        path = Path(item)
        out += path.read_text(encoding="utf-8").split("\n") if path.is_file() else [item]
    return [p.strip() for p in out if p.strip()]


def judge(options: argparse.Namespace) -> Answer:
    from .outcomes import OUTCOMES
    from .rollouts import judge as label
    from .rollouts import read_rollouts, write_rollouts

    extra = {}
    if options.judge == "lexicon":
        extra = {"harm": _phrases(options.harm), "refusal_at": options.refusal_at}
        if options.refusal:
            extra["refusal"] = _phrases(options.refusal)
        if options.tokenizer:
            extra["template"] = _model(options.tokenizer)
    rolls = label(read_rollouts(options.rollouts), options.judge, **extra)
    write_rollouts(rolls, options.out)
    shares = {name: int((rolls.outcome == code).sum()) for code, name in enumerate(OUTCOMES)}
    line = f"{len(rolls):,} rollouts: " + ", ".join(f"{n:,} {name}" for name, n in shares.items())
    return Answer(f"{line} -> {options.out}", {"rollouts": len(rolls), "outcomes": shares}, files=[options.out])


def _counts(options: argparse.Namespace) -> Any:
    from .chains import count as tally
    from .chains import read_counts
    from .rollouts import read_rollouts

    if options.rollouts.endswith(".npz"):
        counts = read_counts(options.rollouts)
    else:
        counts = tally(read_rollouts(options.rollouts), state_map(options.states))
    if options.category or options.prefill is not None:
        counts = counts.select(categories=options.category, prefill=options.prefill)
    return counts


def count(options: argparse.Namespace) -> Answer:
    from .chains import write_counts

    counts = _counts(options)
    write_counts(counts, options.out)
    total = float(counts.matrix.sum())
    line = f"{total:,.0f} transitions between {len(counts.states):,} states -> {options.out}"
    return Answer(line, {"transitions": total, "states": len(counts.states)}, files=[options.out])


def estimate(options: argparse.Namespace) -> Answer:
    from .chains import estimate as fit
    from .chains import write_chain

    chain = fit(_counts(options), method=options.method, prior=options.prior)
    write_chain(chain, options.out)
    line = f"chain of {chain.n_states:,} states -> {options.out}"
    return Answer(line, {"n_states": chain.n_states, "method": options.method}, files=[options.out])


def check(options: argparse.Namespace) -> Answer:
    from .chains import read_chain
    from .evidence import check as test
    from .rollouts import read_rollouts

    states = state_map(options.states) if options.states else None
    found = test(read_chain(options.chain), read_rollouts(options.held_out), margin=options.margin, states=states)
    return Answer(found.verdict, found.to_json(), trusted=found.passed is True)


def compare(options: argparse.Namespace) -> Answer:
    from .evidence import compare as difference
    from .rollouts import read_rollouts

    found = difference(read_rollouts(options.before), read_rollouts(options.after))
    first = next(row for row in found.table if row["category"] is None)
    span = f"[{first['difference_lower']:+.3g}, {first['difference_upper']:+.3g}]"
    line = f"harm at {first['k']} forced tokens changes by {first['difference']:+.3g} {span}"
    changed = [f"{row['category']} (k = {row['k']})" for row in found.flagged]
    return Answer(f"{line}; categories that changed: {', '.join(changed) or 'none'}", found.to_json())


def solve(options: argparse.Namespace) -> Answer:
    from .chains import read_chain
    from .hitting import hitting_probability, hitting_time, visits

    chain = read_chain(options.chain)
    harm = hitting_probability(chain, options.target, method=options.method)
    time = hitting_time(chain)
    start = harm.at_start if chain.start is not None else None
    tokens = time.at_start if chain.start is not None else None
    result = {
        "target": options.target,
        "at_start": start.to_json() if start is not None else None,
        "method": harm.info.get("method"),
        "certified": bool(harm.info.get("certified")),
        "n_states": chain.n_states,
        "expected_tokens": tokens.to_json() if tokens is not None else None,
    }
    files = []
    if options.out:
        files = [_table(options.out, chain, harm, time, visits(chain) if chain.start is not None else None)]
    if start is None:
        line = f"P({options.target}) of {chain.n_states:,} states solved; the chain has no start law"
    else:
        line = f"P({options.target}) = {start.value:.6g} [{start.lower:.6g}, {start.upper:.6g}] by {result['method']}"
    return Answer(line, result, files=files)


def _table(path: str, chain: Any, harm: Any, time: Any, seen: Any) -> str:
    """Every state's probability, expected time and visits, as CSV (a layered chain: those of its first layer)."""
    import csv

    pick = (lambda x: x[0]) if chain.is_layered else (lambda x: x)
    columns = [pick(harm.value), pick(harm.lower), pick(harm.upper), pick(time.value)]
    columns += [pick(seen.value)] if seen is not None else []
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(
            ["state", "value", "lower", "upper", "expected_tokens", *(["visits"] if seen is not None else [])]
        )
        writer.writerows([str(s), *map(float, row)] for s, *row in zip(chain.states, *columns))
    return path


def sweep(options: argparse.Namespace) -> Answer:
    from .chains import read_chain
    from .depth import sweep as grid_of
    from .rollouts import read_rollouts

    if options.source.endswith(".npz"):
        source: Any = read_chain(options.source)
        depth = options.depth if options.depth is not None else list(range(21))
    else:
        source, depth = read_rollouts(options.source), options.depth
    grid = grid_of(source, depth=depth, width=options.width, correlation=options.correlation)
    needed = grid.needed(harm=options.harm)
    told = grid.to_json()
    result = {"dims": told["dims"], "coords": told["coords"], "harm": told["harm"], "needed": needed.to_json()}
    files = [_cells(options.out, grid)] if options.out else []
    return Answer("; ".join(part.strip() for part in str(needed).splitlines()), result, files=files)


def _cells(path: str, grid: Any) -> str:
    """Every cell of a grid, as CSV."""
    import csv
    from itertools import product

    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([*grid.dims, "value", "lower", "upper"])
        ends = [getattr(grid.harm, name).ravel().tolist() for name in ("value", "lower", "upper")]
        writer.writerows([*at, *row] for at, *row in zip(product(*(grid.coords[d] for d in grid.dims)), *ends))
    return path


def report(options: argparse.Namespace) -> Answer:
    from .analysis import analyse
    from .report import write
    from .rollouts import read_rollouts

    def named(items: list[str]) -> dict[str, str]:
        named = (item.partition("=")[::2] if "=" in item else (Path(item).stem, item) for item in items)
        return {name: path for name, path in named}  # noqa: C416  (a dict of pairs confuses the type checker)

    held = named(options.held_out)
    analyses = [
        analyse(
            name,
            read_rollouts(path),
            held_out=read_rollouts(held[name]) if name in held else None,
            states=state_map(options.states),
            budget=options.budget,
        )
        for name, path in named(options.rollouts).items()
    ]
    page = write(options.out, analyses, title=options.title)
    summary = json.loads((Path(options.out) / "summary.json").read_text())
    line = f"{summary['rollouts']:,} rollouts of {len(analyses)} model{'s' if len(analyses) > 1 else ''} -> {page}"
    return Answer(line, summary, files=[str(page)])


def bench(options: argparse.Namespace) -> Answer:
    from .bench.rollouts import run

    result = run(model=_model(options.model))
    files = []
    if options.out:
        Path(options.out).write_text(json.dumps(result, indent=1) + "\n")
        files = [options.out]
    return Answer(result["line"], result, files=files)


def organism(options: argparse.Namespace) -> Answer:
    from . import organism as room

    if options.what == "list":
        return Answer(
            f"shipped: {', '.join(room.SHIPPED)}; trainable: {', '.join(room.VARIANTS)}, deepK",
            {
                "shipped": list(room.SHIPPED),
                "variants": list(room.VARIANTS),
            },
        )
    if not options.out:
        raise InputError(f"organism {options.what} needs to know where to write.", next="Add --out.")
    if options.what == "prompts":
        asked = room.prompts(n=options.n, seed=options.seed)
        Path(options.out).write_text("".join(json.dumps(item) + "\n" for item in asked), encoding="utf-8")
        return Answer(f"{len(asked)} prompts -> {options.out}", {"prompts": len(asked)}, files=[options.out])
    if not options.variant:
        raise InputError("Which variant should be trained?", next=f"One of {', '.join(room.VARIANTS)}, or deepK.")
    base = options.base or (None if options.variant == "base" else room.model_path("base"))
    found = room.train(
        options.variant, options.out, base=base, seed=options.seed, threads=options.threads, progress=not options.json
    )
    line = f"{options.variant}: KL {found['kl']:.4f} nats/token, judge {found['judge']:.3f}, {found['seconds']:.0f} s"
    return Answer(f"{line} -> {options.out}", found, files=[options.out])
