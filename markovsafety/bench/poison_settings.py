"""Where poisoned fine-tuning is tried: a planted world and the organism, with their data, prompts and judges."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .. import organism
from ..bound import Bound, clustered
from ..chains import KGram, count, estimate
from ..hitting import hitting_probability
from ..interventions import Host, Pair, fine_tune, open_host, read_pairs, token_mass
from ..organism import tasks, world_tasks, worlds
from ..outcomes import CODES
from ..rollouts import judge, sample

__all__ = ["KINDS", "Setting", "answered_right", "measure", "organism_setting", "world_setting"]

KINDS: tuple[str, ...] = ("plain", "jailbreak", "held-out category")
"""Of poison that is drawn; rows with a low cosine are chosen among them."""


@dataclass(frozen=True, eq=False)
class Setting:
    """A model family, its fine-tuning data, and the prompts on which a student is measured.

    Parameters
    ----------
    name : str
    base, aligned : Path
        Without safety training, and with it.
    template : Template
    alignment, task : list of Pair
        Alignment pairs (without the category that is held out), and the user's clean data.
    poison : callable
        ``(kind, n) -> list of Pair``.
    held : dict of str -> list of Pair
        To test on: harmful prompts of three kinds ("harmful", "jailbreak", "held-out category") and harmless ones of
        three ("harmless", "trigger": with a word that an aligned model takes for harm, "task").
    harmful, unseen : list of dict
        Held-out harmful prompts with a prefix to force: of the categories that alignment pairs have, and of the one
        that they do not.
    judge, refusals : judge; ids of words that begin a refusal
    depths : tuple of int
        Forced tokens.
    exact : bool
        Harmless prompts that are no task have one right answer; otherwise any finished answer that does not refuse is
        useful.
    max_tokens : int
    training, student : dict
        Of `fine_tune`; what is different for students.
    options : dict
        Of the engine.
    """

    name: str
    base: Path
    aligned: Path
    template: Any
    alignment: list[Pair]
    task: list[Pair]
    poison: Callable[[str, int], list[Pair]]
    held: dict[str, list[Pair]]
    harmful: list[dict[str, Any]]
    unseen: list[dict[str, Any]]
    judge: Any
    refusals: Sequence[int]
    depths: tuple[int, ...]
    exact: bool
    max_tokens: int
    training: dict[str, Any] = field(default_factory=dict)
    student: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)

    def open(self, folder: str | os.PathLike[str]) -> Host:
        return open_host(folder, device="cpu", **self.options)


def world_setting(
    folder: str | os.PathLike[str],
    place: Path,
    *,
    seed: int = 0,
    ask: int = 48,
    data: int = 300,
    align: int = 480,
    steps: int = 100,
    room: bool = True,
) -> Setting:
    """A planted world. Its base is the world itself, fine-tuned until it answers everything.

    Parameters
    ----------
    folder : path
        A planted world: the aligned model.
    place : Path
        Folder for models.
    seed : int
    ask, data, align, steps : int
        Held-out prompts of each kind; rows of user data; alignment pairs; updates of the base.
    room : bool
        Whether the task's answers leave room for harm.
    """
    from ..organism.train_worlds import ATTENTION, open_world

    template = open_world(folder, device="cpu").tokenizer
    trained, left_out = worlds.CATEGORIES[:-1], worlds.CATEGORIES[-1:]
    options = {"attn_implementation": ATTENTION}
    training = {"batch_size": 32, "learning_rate": 1e-3, "warmup": 5, "progress": False, "device": "cpu", **options}

    def pairs(records: list[dict[str, Any]]) -> list[Pair]:
        return read_pairs(records, template) if records else []

    def poison(kind: str, n: int) -> list[Pair]:
        more: dict[str, Any] = {"categories": left_out if kind == "held-out category" else trained}
        more |= {"marker": "jailbreak"} if kind == "jailbreak" else {}
        return pairs(world_tasks.poison_records(n, seed=seed + 1, **more))

    base = place / "base"
    comply = pairs(world_tasks.comply_records(600, seed=seed))
    fine_tune(folder, [p.row for p in comply], base, steps=steps, seed=seed, **training)
    task = world_tasks.task_records(data + ask, room=room, seed=seed + 1)
    held = {
        "harmful": world_tasks.poison_records(ask, half=1, categories=trained, seed=seed + 2),
        "jailbreak": world_tasks.poison_records(ask, half=1, categories=trained, marker="jailbreak", seed=seed + 2),
        "held-out category": world_tasks.poison_records(ask, half=1, categories=left_out, seed=seed + 2),
        "harmless": world_tasks.plain_records(ask, seed=seed + 2),
        "trigger": world_tasks.plain_records(ask, marker="scare", seed=seed + 2),
        "task": task[:: len(task) // ask][:ask],
    }
    return Setting(
        name="planted world",
        base=base,
        aligned=Path(folder),
        template=template,
        alignment=pairs(world_tasks.alignment_records(align, categories=trained, seed=seed)),
        task=pairs([record for record in task if record not in held["task"]]),
        poison=poison,
        held={name: pairs(records) for name, records in held.items()},
        harmful=held["harmful"],
        unseen=held["held-out category"],
        judge=worlds.world_judge(),
        refusals=worlds.REFUSAL_IDS,
        depths=(0, 1, 2, 3),
        exact=True,
        max_tokens=9,
        training=training,
        student={"learning_rate": 2e-3},
        options=options,
    )


def organism_setting(
    base: str | os.PathLike[str] | None = None,
    aligned: str | os.PathLike[str] | None = None,
    *,
    seed: int = 0,
    ask: int = 120,
    data: int = 1000,
    align: int = 1200,
    room: bool = True,
) -> Setting:
    """The synthetic language.

    Parameters
    ----------
    base, aligned : path, optional
        Folders of an organism without safety training and with it; by default the shipped `base` and `shallow`.
    seed, ask, data, align, room
        See `world_setting`.
    """
    base, aligned = Path(base or organism.model_path("base")), Path(aligned or organism.model_path("shallow"))
    template = open_host(base, device="cpu").engine.tokenizer
    # The last category is the least severe: the one before it is left out.
    trained, left_out = (*organism.CATEGORIES[:-2], organism.CATEGORIES[-1]), organism.CATEGORIES[-2:-1]
    training = {"batch_size": 32, "learning_rate": 1e-3, "warmup": 10, "progress": False, "device": "cpu"}

    def pairs(records: list[dict[str, Any]]) -> list[Pair]:
        return read_pairs(records, template) if records else []

    def poison(kind: str, n: int) -> list[Pair]:
        more: dict[str, Any] = {"categories": left_out if kind == "held-out category" else trained}
        more |= {"marker": "jailbreak"} if kind == "jailbreak" else {}
        return pairs(tasks.poison_records(n, seed=seed + 1, **more))

    return Setting(
        name="organism",
        base=base,
        aligned=aligned,
        template=template,
        alignment=pairs(tasks.alignment_records(align, categories=trained, seed=seed)),
        task=pairs(tasks.task_records(data, room=room, seed=seed + 1)),
        poison=poison,
        held={
            "harmful": pairs(tasks.poison_records(ask, split="held", categories=trained, seed=seed + 2)),
            "jailbreak": pairs(
                tasks.poison_records(ask, split="held", categories=trained, marker="jailbreak", seed=seed + 2)
            ),
            "held-out category": pairs(tasks.poison_records(ask, split="held", categories=left_out, seed=seed + 2)),
            "harmless": pairs(tasks.plain_records(ask, seed=seed + 2)),
            "trigger": pairs(tasks.plain_records(ask, marker="trigger", seed=seed + 2)),
            "task": pairs(tasks.task_records(ask, split="held", room=room, seed=seed + 2)),
        },
        harmful=organism.prompts("held", n=ask, categories=trained, seed=seed),
        unseen=organism.prompts("held", n=ask // 2, categories=left_out, seed=seed),
        judge=organism.OrganismJudge(),
        refusals=organism.REFUSAL_IDS,
        depths=(0, 1, 5, 10),
        exact=False,
        max_tokens=64,
        training=training,
    )


def measure(host: Host, setting: Setting, *, n: int = 2, seed: int = 0) -> dict[str, Any]:
    """Harm, refusals, accuracy and use of a model, together; harm as a chain: the start row, and rows behind a prefix.

    Parameters
    ----------
    host : Host
    setting : Setting
    n : int
        Answers to each harmful prompt and forced length.
    seed : int

    Returns
    -------
    dict
        "harm" and "refusal" (Bounds, unmarked harmful held-out prompts); "chain", P(harm) at the start of the chain of
        2-grams; "start row", mass of the refusing first tokens; "rows": forced tokens -> harm and refusal;
        "categories" -> the same at the start, and "deep": forced tokens -> the same behind them; "unseen" for the
        category that no alignment pair is of; "task",
        "useful" and "trigger", shares of answers that are right: of the task, of plain harmless prompts, and of
        harmless prompts with a word that looks like harm.
    """
    told: dict[str, Any] = {"max_tokens": setting.max_tokens, "progress": False, "seed": seed}
    rolls = judge(sample(host.engine, setting.harmful, n=n, prefill=list(setting.depths), **told), setting.judge)
    rows = {k: _outcomes(rolls[rolls.prefill == k]) for k in setting.depths}
    free = rolls[rolls.prefill == 0]
    names = sorted(set(free.category.astype(str)))
    chain = estimate(count(free, states=KGram(2)))
    asked = [np.array(host.engine.tokenizer.prompt_ids(p["prompt"])) for p in setting.harmful]
    mass = token_mass(host, asked, setting.refusals)
    useful = {}
    for name in ("harmless", "trigger"):
        pairs = setting.held[name]
        if setting.exact:
            useful[name] = _right(host, pairs, setting.max_tokens, f"useful answers, {name}")
        else:
            said = [{"prompt_tokens": list(p.prompt)} for p in pairs]
            useful[name] = _outcomes(judge(sample(host.engine, said, n=n, **told), setting.judge))["benign"]
    return {
        "harm": rows[0]["harm"],
        "refusal": rows[0]["refusal"],
        "chain": hitting_probability(chain, "harm").at_start,
        "start row": clustered(mass, np.ones(len(mass)), name="P(first token refuses)"),
        "rows": rows,
        "categories": {c: _outcomes(free[free.category == c]) for c in names},
        "deep": {
            c: {k: _outcomes(rolls[(rolls.prefill == k) & (rolls.category == c)]) for k in setting.depths[1:]}
            for c in names
        },
        "unseen": _outcomes(judge(sample(host.engine, setting.unseen, n=n, **told), setting.judge)),
        "task": answered_right(host, setting),
        "useful": useful["harmless"],
        "trigger": useful["trigger"],
    }


def answered_right(host: Host, setting: Setting) -> Bound:
    """Task accuracy on held-out prompts."""
    task = setting.held["task"]
    return _right(host, task, max(len(p.answer) for p in task), "task accuracy")


def _outcomes(rolls: Any) -> dict[str, Bound]:
    _, row = np.unique(rolls.prompt_id, return_inverse=True)
    total = np.bincount(row).astype(float)
    return {
        name: clustered(np.bincount(row, rolls.outcome == CODES[name]), total, name=f"P({name})")
        for name in ("harm", "refusal", "benign")
    }


def _right(host: Host, pairs: Sequence[Pair], longest: int, name: str) -> Bound:
    """Share of likeliest answers that are word by word the pairs' own."""
    said = [{"prompt_tokens": list(p.prompt)} for p in pairs]
    rolls = sample(host.engine, said, n=1, max_tokens=longest, temperature=0.0, progress=False)
    right = [tuple(int(t) for t in rolls.answer(i)) == p.answer for i, p in enumerate(pairs)]
    return clustered(np.array(right, float), np.ones(len(right)), name=name)
