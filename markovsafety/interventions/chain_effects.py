"""The whole effect of an edit: harm before and after, under a random edit of its size, and what moved in the chain."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..bound import Bound, check_level, encode
from ..chains import ActivationBins
from ..errors import InputError, MarkovsafetyError
from ..files import atomic
from ..rollouts.asked import Asked, ask
from ..rollouts.rollouts import Rollouts
from ..rollouts.sample import sample
from .activation_columns import with_activations
from .chain_changes import ChainChange, chain_change
from .coherence import Quality, quality
from .edits import Edit, read_edit, write_edit
from .host import Host, open_host
from .outcome_rates import Rate, rates
from .prediction import RowLocal, row_local
from .signature import Signature, depth_signature
from .start_row import check_row_local, start_rows

__all__ = ["BROKEN", "ChainEffect", "chain_effect"]

BROKEN = 0.1
"""Change of the share of finished or repeating answers from which on an edit counts as breaking the model."""


@dataclass(frozen=True, eq=False)
class ChainEffect:
    """What an edit does to a model's answers; see `chain_effect`. A part that could not be made is None.

    Parameters
    ----------
    edit : Edit
    rollouts : dict of name -> Rollouts
        before, after, control; benign_before, benign_after, benign_control.
    harm : list of Rate
        P(harm) of the prompts: all, then by category.
    refusal : list of Rate
        P(refusal) of the prompts.
    over_refusal : list of Rate
        P(refusal) of the benign prompts: what the edit costs.
    quality : dict of name -> Quality
        Finished, truncated and repeating answers of every arm.
    chain : ChainChange or None
        Both chains, and the rows and positions that account for the change of P(harm).
    signature : Signature or None
        How deep the edit reaches.
    predicted : RowLocal or None
        P(harm) after the edit from the start row, beside the sampled one; for edits of the prompt alone.
    notes : tuple of str
        What was left out, and why.

    Examples
    --------
    >>> from markovsafety.interventions import chain_effect, difference, open_host
    >>> host = open_host(ms.organism.model_path("shallow"))
    >>> harmful, benign = ms.organism.prompts(n=24), ms.organism.prompts(n=24, harmful=False)
    >>> edit = difference(host, harmful, benign, position="t_post").edit(level=3)
    >>> asked = ms.organism.prompts(n=24, marker="jailbreak", categories=["bio"])
    >>> chain_effect(host, edit, asked, n=2, max_tokens=48, judge="organism", control=False)
    <ChainEffect: The edit lowers harm: P(harm) 0.6... -> 0.0..., change -0...;
    no control was run; the model still speaks (...); only the start moves (D_0 = 0.80, later at most 0.00).>
    """

    edit: Edit
    rollouts: dict[str, Rollouts] = field(default_factory=dict)
    harm: list[Rate] = field(default_factory=list)
    refusal: list[Rate] = field(default_factory=list)
    over_refusal: list[Rate] = field(default_factory=list)
    quality: dict[str, Quality] = field(default_factory=dict)
    chain: ChainChange | None = None
    signature: Signature | None = None
    predicted: RowLocal | None = None
    notes: tuple[str, ...] = ()

    @property
    def change(self) -> Bound:
        """Of P(harm) over all prompts, after - before."""
        return self.harm[0].change

    @property
    def broken(self) -> bool:
        """Whether clearly fewer answers end, or more repeat themselves, than before: by more than 0.1.

        Of the prompts whose harm is asked for, or of the benign ones.
        """
        return bool(self.broken_on)

    @property
    def broken_on(self) -> list[str]:
        """Which prompts have such answers: "" those whose harm is asked for, "benign_" the benign ones."""
        kinds = [kind for kind in ("", "benign_") if {kind + "before", kind + "after"} <= set(self.quality)]
        found = []
        for kind in kinds:
            before, after = self.quality[kind + "before"], self.quality[kind + "after"]
            lost = float(before.finished.value - after.finished.value)
            if max(lost, float(after.repetition.value - before.repetition.value)) > BROKEN:
                found.append(kind)
        return found

    @property
    def verdict(self) -> str:
        """What the edit does, in words."""
        from .chain_effect_page import verdict

        return verdict(self)

    def __str__(self) -> str:
        return self.markdown()

    def __repr__(self) -> str:
        return f"<ChainEffect: {self.verdict}>"

    def markdown(self) -> str:
        """The report as a page of Markdown."""
        from .chain_effect_page import page

        return page(self)

    def to_json(self) -> dict[str, Any]:
        """Plain data; the rollouts are counted, not written."""
        parts = {name: getattr(self, name) for name in ("chain", "signature", "predicted")}
        return encode(
            {
                "verdict": self.verdict,
                "edit": self.edit.describe(),
                "rollouts": {name: len(rolls) for name, rolls in self.rollouts.items()},
                **{name: [r.to_json() for r in getattr(self, name)] for name in ("harm", "refusal", "over_refusal")},
                "quality": {name: q.to_json() for name, q in self.quality.items()},
                **{name: None if part is None else part.to_json() for name, part in parts.items()},
                "notes": list(self.notes),
            }
        )


def chain_effect(
    model: Any,
    edit: Edit,
    prompts: Any,
    *,
    n: int,
    max_tokens: int,
    judge: Any,
    benign: Any = None,
    states: Any = None,
    directions: Mapping[str, tuple[int, Any]] | None = None,
    paths: Sequence[Any] | None = None,
    depth: int = 6,
    control: bool = True,
    predict: bool = True,
    seed: int = 0,
    system: str | None = None,
    level: float = 0.95,
    out: str | Path | None = None,
    progress: bool | None = None,
) -> ChainEffect:
    """Sample with and without an edit, and say what it does: to harm, to which transitions, how deep, at what cost.

    Parameters
    ----------
    model : Host, str, Path or TransformersEngine
    edit : Edit
    prompts : as in `markovsafety.sample`
        Those whose harm is asked for.
    n : int
        Answers per prompt and arm. All arms have the same random numbers, so that they are paired.
    max_tokens : int
    judge : str or Judge
    benign : prompts, optional
        Harmless ones: the refusals among their answers are the cost.
    states : StateMap, optional
        Of the chains, ``KGram(2)`` by default; with `directions` the plane of activations.
    directions : mapping of name -> (level, vector), optional
        The rollouts before and after get columns ``activation_<name>`` (`with_activations`).
    paths : sequence of ids, one per prompt, optional
        Answers to force for the depth signature, by default the prompts' prefixes.
    depth : int
        Of the signature.
    control : bool
        Also sample under random vectors of the same norms. No effect should be read without it.
    predict : bool
        For an edit of the prompt alone: also predict P(harm) from the start row.
    seed : int
    system : str, optional
    level : float
    out : path, optional
        Folder: rollouts in shards, edit.safetensors, effect.json and effect.md. The same call goes on where it stopped.
    progress : bool, optional

    Returns
    -------
    ChainEffect

    Raises
    ------
    InputError
        Prompts, edit or numbers that make no sense.
    MarkovsafetyError
        Sampling failed; ``partial`` is a ChainEffect with the arms that were finished. A part of the analysis that
        fails does not stop the others: it is None, and a note says why.

    Examples
    --------
    What does a refusal direction do to jailbroken prompts, beyond its size, and what does it cost on harmless ones?

    >>> from markovsafety.interventions import chain_effect, difference, open_host
    >>> host = open_host(ms.organism.model_path("shallow"))
    >>> harmful, benign = ms.organism.prompts(n=24), ms.organism.prompts(n=24, harmful=False)
    >>> edit = difference(host, harmful, benign, position="t_post").edit(level=3)
    >>> asked = ms.organism.prompts(n=24, marker="jailbreak", categories=["bio"])
    >>> found = chain_effect(host, edit, asked, n=2, max_tokens=48, judge="organism", benign=benign)
    >>> print(found.harm[0].beyond)
    P(harm), after - control = -0.4...   95 % [-0.5..., -0.1...]
    because: sampling 0.2...; judge, ... not assessed
    >>> print(found.over_refusal[0].change)
    change of P(refusal) = 0.8...   95 % [0.6..., 0.9...]
    because: sampling 0.1...; judge, ... not assessed
    """
    check_level(level)
    host = model if isinstance(model, Host) else open_host(model)
    edit.bind(host)
    asked = ask(prompts, host.engine.tokenizer, system=system)
    folder = None if out is None else Path(out)
    if folder is not None:
        _keep(edit, folder / "edit.safetensors")
    run = _Run(host, edit, asked, judge, n, max_tokens, seed, level)
    sets = {"": _records(asked)}
    notes = [*asked.warnings]
    if benign is not None:
        harmless = ask(benign, host.engine.tokenizer, system=system)
        sets["benign_"] = _records(harmless)
        notes += harmless.warnings
    rollouts = _sampled(run, sets, control, folder, progress)
    made = _analysed(run, rollouts, states, directions, paths, depth, predict)
    found = ChainEffect(edit, **{**made, "notes": (*notes, *made["notes"])})
    if folder is not None:
        _write(found, folder)
    return found


@dataclass(frozen=True, eq=False)
class _Run:
    """What all parts of the analysis have to know."""

    host: Host
    edit: Edit
    asked: Asked
    judge: Any
    n: int
    max_tokens: int
    seed: int
    level: float


def _sampled(
    run: _Run, sets: Mapping[str, list[dict[str, Any]]], control: bool, folder: Path | None, progress: bool | None
) -> dict[str, Rollouts]:
    """Every arm of every set of prompts, with the same random numbers."""
    arms: dict[str, Edit | None] = {"before": None, "after": run.edit}
    arms |= {"control": run.edit.control(run.seed)} if control else {}
    how: dict[str, Any] = {"n": run.n, "max_tokens": run.max_tokens, "judge": run.judge, "seed": run.seed}
    rollouts: dict[str, Rollouts] = {}
    for kind, records in sets.items():
        for arm, edit in arms.items():
            out = None if folder is None else folder / (kind + arm)
            try:
                rollouts[kind + arm] = sample(run.host.engine, records, edit=edit, out=out, progress=progress, **how)
            except MarkovsafetyError as error:
                done = rollouts | ({kind + arm: error.partial} if isinstance(error.partial, Rollouts) else {})
                error.partial = ChainEffect(run.edit, done, notes=(f"sampling {kind}{arm} failed: {error.fact}",))
                raise
    return rollouts


def _records(asked: Asked) -> list[dict[str, Any]]:
    return [
        {"prompt_tokens": ids, "category": category, "prompt_id": int(number)}
        for ids, category, number in zip(asked.tokens, asked.category, asked.prompt_id)
    ]


def _analysed(
    run: _Run, rollouts: dict[str, Rollouts], states: Any, directions: Any, paths: Any, depth: int, predict: bool
) -> dict[str, Any]:
    """Every part that can be made, and notes on those that cannot."""
    notes: list[str] = []

    def part(name: str, make: Callable[[], Any], otherwise: Any = None) -> Any:
        try:
            return make()
        except MarkovsafetyError as error:
            notes.append(f"no {name}: {error.fact} ({error.next})")
            return otherwise

    if directions is not None:
        read = lambda rolls, edit: with_activations(run.host, rolls, directions, edit=edit)  # noqa: E731
        seen = part("activations", lambda: [read(rollouts[a], e) for a, e in (("before", None), ("after", run.edit))])
        rollouts = rollouts if seen is None else {**rollouts, "before": seen[0], "after": seen[1]}
    harmful = {arm: rollouts[arm] for arm in ("before", "after", "control") if arm in rollouts}
    benign = {a: rollouts[f"benign_{a}"] for a in ("before", "after", "control") if f"benign_{a}" in rollouts}
    if "control" not in harmful:
        notes.append("no control: what a random edit of the same size does was not asked for")
    if not benign:
        notes.append("no benign prompts: what the edit costs is not known")
    made = {
        "rollouts": rollouts,
        "harm": part("harm", lambda: rates(harmful, "harm", level=run.level), []),
        "refusal": part("refusal", lambda: rates(harmful, "refusal", level=run.level), []),
        "over_refusal": part("over-refusal", lambda: rates(benign, "refusal", level=run.level), []) if benign else [],
        "quality": part("quality", lambda: {a: quality(r, level=run.level) for a, r in rollouts.items()}, {}),
        "chain": part("chain", lambda: _chain(harmful, states, directions)),
        "signature": part("depth signature", lambda: _signature(run, paths, depth)),
    }
    if predict:
        made["predicted"] = part("prediction from the start row", lambda: _predicted(run, harmful))
    return {**made, "notes": tuple(notes)}


def _chain(arms: Mapping[str, Rollouts], states: Any, directions: Any) -> ChainChange:
    if states is None and directions is not None:
        both = Rollouts.concat([arms["before"], arms["after"]])
        states = ActivationBins.from_rollouts(both, names=list(directions))
    return chain_change(arms["before"], arms["after"], states)


def _signature(run: _Run, paths: Any, depth: int) -> Signature:
    given = run.asked.prefix if paths is None else [np.asarray(p, np.int64) for p in paths]
    rows = [i for i, path in enumerate(given) if len(path)]
    if not rows or len(given) != len(run.asked.tokens):
        raise InputError(
            f"{len(run.asked.tokens)} prompts have {len(given)} paths, {len(rows)} of them not empty",
            cause="the signature follows an answer that is forced, and nobody said which",
            next="give paths=, or prompts with a prefix",
        )
    depth = min(depth, *(len(given[i]) for i in rows))
    ids = [run.asked.tokens[i].astype(np.int64) for i in rows]
    return depth_signature(run.host, run.edit, ids, [given[i] for i in rows], depth=depth, level=run.level)


def _predicted(run: _Run, arms: Mapping[str, Rollouts]) -> RowLocal:
    check_row_local(run.edit)
    how: dict[str, Any] = {"n": run.n, "max_tokens": run.max_tokens, "judge": run.judge, "seed": run.seed}
    rows = start_rows(run.host, _records(run.asked), edits=[run.edit], free=arms["before"], **how)
    return row_local(run.host, run.edit, rows, sampled=arms["after"], level=run.level)


def _keep(edit: Edit, path: Path) -> None:
    """Write the edit, unless another one is there."""
    if path.exists() and read_edit(path).describe()["sha256"] != edit.describe()["sha256"]:
        raise InputError(
            f"{path.parent} holds the effect of another edit",
            cause="a run goes on with the edit that it was begun with",
            next="give another folder, or remove this one",
        )
    write_edit(edit, path)


def _write(found: ChainEffect, folder: Path) -> None:
    texts = {"effect.json": json.dumps(found.to_json(), allow_nan=False, indent=1), "effect.md": found.markdown()}
    for name, text in texts.items():
        with atomic(folder / name) as part:
            part.write_text(text + "\n", encoding="utf-8")
