"""tally(): sample and count in one go, so that only sums leave the device."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import InputError
from .rules import Rule, rule_of
from .sample import _check, _engine, planned
from .shards import Plan, begun, blocks, carrying, interrupted, job, shown
from .sums import Added, Sums, read_added, write_added

__all__ = ["tally"]


def tally(
    model: Any,
    prompts: Any,
    states: Any,
    *,
    judge: Any,
    n: int,
    max_tokens: int,
    prefill: Any = (0,),
    prefix: Any = None,
    engine: str = "auto",
    device: str | None = None,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
    classes: dict[str, Any] | None = None,
    out: str | Path | None = None,
    dtype: str = "float32",
    batch_size: int | None = None,
    progress: bool | None = None,
    system: str | None = None,
    shard_size: int | None = None,
    fine: bool = False,
) -> Sums:
    """Sample answers and add up their transitions on the device.

    ``count(tally(model, prompts, KGram(2), judge=j, ...))`` equals ``count(sample(model, prompts, judge=j, ...),
    KGram(2))`` with the same seed, up to the rounding of the sums of masses; but neither tokens nor their probabilities
    leave the device, only sums by prompt, prefill and state, and one byte for every few tokens that says which rollouts
    have ended. Choose it where rollouts are many and only counts are wanted: the answers themselves are gone.

    Parameters
    ----------
    model, prompts, n, max_tokens, prefill, prefix, engine, device, temperature, top_p, seed, dtype, batch_size, \
progress, system, shard_size, fine
        As in `sample`. Only the jax engine adds up.
    states : KGram
        Only states that are the last tokens: a map with their number as ``last_tokens``.
    judge : str or Judge
        One that is a list of token ids (it has ``rule``): "organism", or a `LexiconJudge` of ids.
    classes : dict of name -> list of (id or str), optional
        The masses of classes named "harm", "refusal" and "benign" are summed by state; others are refused.
    out : str or Path, optional
        Folder for the sums of each shard. The same call goes on where it was stopped, shard by shard: a shard that was
        not finished is sampled anew.

    Returns
    -------
    Sums
        For `count`.

    Raises
    ------
    InputError
        As `sample`; a judge, a state map or an engine that cannot work on the device.
    ModelError
        The model cannot be loaded.
    UntrustedError
        Logits became NaN; ``partial`` holds the sums of the shards finished before.

    Examples
    --------
    The same counts as those of the answers themselves, which never left the device:

    >>> model, asked = ms.organism.model_path("shallow"), ms.organism.prompts(n=2)
    >>> ask = dict(judge="organism", n=8, max_tokens=16, prefill=[0, 5])
    >>> sums = ms.rollouts.tally(model, asked, ms.KGram(1), **ask)
    >>> rolls = ms.sample(model, asked, **ask)
    >>> difference = ms.count(sums).matrix - ms.count(rolls, states=ms.KGram(1)).matrix
    >>> len(sums), int(abs(difference).sum())
    (32, 0)
    """
    _check(n, max_tokens, temperature, top_p, seed, shard_size)
    order = _order(states)
    opened = _engine(model, engine, device=device, dtype=dtype, batch_size=batch_size)
    if not callable(getattr(opened, "tally", None)):
        raise InputError(
            f"the engine {opened.name!r} cannot add up where it samples",
            cause="only the jax engine keeps tokens on its device",
            next="sample rollouts, judge them and count them: count(judge(sample(...), ...), states)",
        )
    plan, said = planned(
        model,
        opened,
        prompts,
        n=n,
        max_tokens=max_tokens,
        prefill=prefill,
        prefix=prefix,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        classes=classes,
        dtype=dtype,
        judge=judge,
        system=system,
        shard_size=shard_size,
        fine=fine,
    )
    rule = rule_of(said, plan.sampling["eos_ids"])
    _known(plan.sampling["classes"])
    kept = {"keep": "sums", "order": order}
    plan = dataclasses.replace(plan, parameters={**plan.parameters, **kept}, provenance={**plan.provenance, **kept})
    return _run(plan, opened, order, rule, None if out is None else Path(out), progress)


def _order(states: Any) -> int:
    order = getattr(states, "last_tokens", None)
    if not isinstance(order, int):
        raise InputError(
            f"states {states!r} cannot be told apart on the device",
            cause="there a state is the last k tokens, and nothing else",
            next="use KGram(k), or sample rollouts and count them: count(judge(sample(...), ...), states)",
        )
    return order


def _known(classes: dict[str, Any]) -> None:
    foreign = sorted(set(classes) - {"harm", "refusal", "benign"})
    if foreign:
        raise InputError(
            f"the mass of the class {foreign[0]!r} has no place in counts",
            cause="they hold masses of outcomes: harm, refusal, benign",
            next="rename it, or sample rollouts, which keep the masses of any class",
        )


def _run(plan: Plan, engine: Any, order: int, rule: Rule, folder: Path | None, progress: bool | None) -> Sums:
    """Add up what is not there yet, shard by shard; errors carry the shards that were finished."""
    parts: list[Added] = []
    fresh: list[dict[str, Any]] = []
    shards, groups = blocks(plan, folder, ".npz"), len(plan.asked.tokens) * len(plan.prefill)

    def finished(partial: Any) -> Sums:
        return _sums(plan, order, [*parts, *([partial] if isinstance(partial, Added) else [])], fresh)

    with (
        begun(plan, folder, ".npz"),
        interrupted(plan, parts, folder, finished),
        shown(plan, shards, progress) as advance,
    ):
        for rows, path in shards:
            cell = rows // plan.n
            if path is not None and path.exists():
                parts.append(read_added(path, len(rows)).within(groups, int(cell[0])))
                continue
            part = engine.tally(job(plan, rows), order, rule, cell - cell[0], advance)
            fresh.append(part.info)
            with carrying(part.within(groups, int(cell[0]))):
                if path is not None:
                    write_added(part, path)
            parts.append(part.within(groups, int(cell[0])))
    return _sums(plan, order, parts, fresh)


def _sums(plan: Plan, order: int, parts: list[Added], fresh: list[dict[str, Any]]) -> Sums:
    asked, levels = plan.asked, plan.prefill
    entry = [_last(ids[:k], order) for ids in asked.prefix for k in levels]
    keys = ("sampled_tokens", "fetched_bytes", "seconds", "compile_seconds", "sum_seconds")
    return Sums(
        order,
        np.repeat(asked.prompt_id, len(levels)),
        np.repeat(asked.category, len(levels)),
        np.tile(np.array(levels, np.int32), len(asked.tokens)),
        np.array(entry, np.int32).reshape(len(entry), order),
        Added.of(parts) if parts else Added.empty(order),
        plan.provenance,
        {key: sum(info.get(key, 0) for info in fresh) for key in keys},
    )


def _last(ids: np.ndarray, order: int) -> list[int]:
    """The last tokens, -1 in front."""
    return [-1] * (order - len(ids)) + ids[max(len(ids) - order, 0) :].tolist()
