"""One look inside a model: what it believes, what it does, which directions steer it, and what a guard would buy.

It samples answers to harmful and harmless prompts, sorts the prompts into the four buckets, makes the directions on one
half of them and measures on the other: are harmfulness and refusal encoded apart, which level steers (beyond random
vectors), does the belief guard better than the reply, and at which threshold.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..bound import encode
from ..brief import brief
from ..errors import InputError, MarkovsafetyError
from ..files import atomic
from ..outcomes import CODES
from ..rollouts import Rollouts, sample
from ..rollouts.asked import read_prompts
from .apart import Separation, separate
from .behaviour import Behaviour
from .beliefs import belief_table, believe
from .blocking import Blocked, measure_blocked
from .buckets import Buckets, category_of, refusal_shares
from .differences import difference
from .directions import Direction, write_direction
from .edits import Edit, write_edit
from .effects import LevelSweep, choose_level
from .guard import Assessed, assess, latent_guard
from .host import Host, open_host
from .inspection_page import page
from .inversion import Inversion, Task, inversion_task, invert, replies
from .outcome_rates import came_to
from .pages import spanned
from .policies import Policy, policy
from .record import token_mass

__all__ = ["Inspection", "first_tokens", "inspect_model"]

CUT = 0.1
"""Share of answers cut off from which on the notes speak of them."""


@dataclass(frozen=True, eq=False)
class Inspection:
    """What was seen; a part that could not be made is None, and `notes` says why.

    Attributes
    ----------
    model : str
    buckets : dict of bucket -> int
        Prompts by ground truth and behaviour, both halves.
    behaviour : dict of "harmful", "harmless" -> Behaviour
        Outcomes, and whether answers end, are cut off or repeat themselves.
    openers : list of int
        Tokens that refusals begin with: their mass is the behaviour that steering is measured by.
    harmfulness, refusal : Direction or None
        At t_inst and t_post, with the chosen level.
    separation : Separation or None
    steering : dict of "refusal", "harmfulness" -> LevelSweep
        Of the refusal of accepted harmless prompts.
    inversion : dict of "refusal", "harmfulness" -> Inversion
        Of the reply to "could this cause harm?", where a question was given.
    guard : Assessed or None
    beliefs : list of dict
        `belief_table` of the second half.
    blocked : Blocked or None
        P(harm) by category behind the guard, measured and predicted.
    policy : Policy or None
    edits : dict of name -> Edit
        At the chosen levels and scales.
    notes : list of str

    Examples
    --------
    A part that was not made is None, and the notes say why.

    >>> from markovsafety import interventions as inside, organism
    >>> model, harmless = organism.model_path("shallow"), organism.prompts(n=24, harmful=False)
    >>> harmful = organism.prompts(n=24) + organism.prompts(n=24, marker="jailbreak")
    >>> small = dict(judge="organism", n=2, max_tokens=48, question=" <judge>", certainly=["certainly"], no=["no"])
    >>> found = inside.inspect_model(model, harmful, harmless, **small)
    >>> found
    Inspection(model=..., buckets=dict of 4, behaviour=..., openers=[112, 113, 114], ...)
    >>> found.separation, found.notes[0].split(" among")[0]
    (None, 'separation: there are no refused harmless prompts')
    """

    model: str
    buckets: dict[str, int]
    behaviour: dict[str, Behaviour]
    openers: list[int]
    harmfulness: Direction | None = None
    refusal: Direction | None = None
    separation: Separation | None = None
    steering: dict[str, LevelSweep] = field(default_factory=dict)
    inversion: dict[str, Inversion] = field(default_factory=dict)
    guard: Assessed | None = None
    beliefs: list[dict[str, Any]] = field(default_factory=list)
    blocked: Blocked | None = None
    policy: Policy | None = None
    edits: dict[str, Edit] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    __repr__ = brief

    @property
    def verdict(self) -> str:
        """One sentence."""
        parts = [] if self.separation is None else [f"harmfulness and refusal {self.separation.verdict}"]
        parts += [f"{name} {sweep.verdict}" for name, sweep in self.steering.items()]
        if self.guard is not None:
            parts.append(f"guard AUC {spanned(self.guard.auc)}")
        return "; ".join(parts) or "nothing could be measured"

    def markdown(self) -> str:
        """The report as a page."""
        return page(self)

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        guard, policy = self.guard, self.policy
        return encode(
            {
                "model": self.model,
                "verdict": self.verdict,
                "buckets": self.buckets,
                "behaviour": {k: b.to_json() for k, b in self.behaviour.items()},
                "openers": self.openers,
                "separation": None
                if self.separation is None
                else {
                    "verdict": self.separation.verdict,
                    "reason": self.separation.reason,
                    "rows": self.separation.rows,
                },
                "steering": {
                    k: {"verdict": s.verdict, "reason": s.reason, "level": s.best.level, "table": s.table}
                    for k, s in self.steering.items()
                },
                "inversion": {
                    k: {"reply": i.reply, "base": i.share.base, "edited": i.share.edited, "control": i.share.control}
                    | {"net": i.share.net, "neither": i.neither.edited}
                    for k, i in self.inversion.items()
                },
                "guard": None
                if guard is None
                else {"auc": guard.auc, "false_rate": guard.false_rate, "accuracy": guard.accuracy}
                | {"rates": guard.rates, "aucs": {k: c["auc"] for k, c in guard.categories.items()}}
                | {"control": guard.control, "refusal_as_guard": guard.refusal},
                "beliefs": self.beliefs,
                "blocked": None if self.blocked is None else self.blocked.rows,
                "policy": None
                if policy is None
                else {"threshold": policy.threshold, "cost": policy.cost, "held_out": policy.held_out}
                | {"never": policy.never, "always": policy.always},
                "notes": self.notes,
            }
        )


def first_tokens(rolls: Rollouts, outcome: str, *, least: float = 0.02) -> list[int]:
    """Tokens that answers of one outcome begin with, and others less often.

    Parameters
    ----------
    rolls : Rollouts
        Judged; only answers without forced tokens count.
    outcome : str
    least : float
        Share of the outcome's answers that a token must begin.

    Returns
    -------
    list of int

    Raises
    ------
    InputError
        No answer has this outcome, or there is no such outcome.

    Examples
    --------
    >>> answers, hit = [[112, 187, 2], [113, 187, 2], [108, 166, 150], [108, 2]], [0, 0, 2, 1]
    >>> outcome = ["refusal", "refusal", "harm", "benign"]
    >>> rolls = ms.Rollouts.of(answers, prompt_id=[0, 0, 1, 1], outcome=outcome, hit=hit)
    >>> ms.interventions.first_tokens(rolls, "refusal")
    [112, 113]
    """
    free = (rolls.prefill == 0) & (np.diff(rolls.offsets) > 0)
    mine = came_to(rolls, outcome)
    if not (free & mine).any():
        raise InputError(
            f"none of {int(free.sum())} answers ended in {outcome}",
            cause="the model never does it on these prompts, or the judge does not recognise it",
            next="give prompts on which it happens, or another judge",
        )
    first = rolls.tokens[np.minimum(rolls.offsets[:-1], len(rolls.tokens) - 1)]
    size = int(first[free].max()) + 1
    share, other = (
        np.bincount(first[free & which], minlength=size) / max(int((free & which).sum()), 1) for which in (mine, ~mine)
    )
    return [int(t) for t in np.flatnonzero((share >= least) & (share > other))]


def inspect_model(
    model: Any,
    harmful: Any,
    benign: Any,
    *,
    judge: Any,
    n: int = 8,
    max_tokens: int = 64,
    question: str | None = None,
    certainly: Sequence[str | int] = ("Certainly", "certainly"),
    no: Sequence[str | int] = ("No", "no"),
    cost_harm: float = 1.0,
    cost_refusal: float = 0.1,
    prior: float = 0.5,
    seed: int = 0,
    out: str | Path | None = None,
    **options: Any,
) -> Inspection:
    """Look inside a model.

    Parameters
    ----------
    model : str, Path, engine or Host
    harmful, benign : list of texts or records, or a CSV or JSONL file
        Harmful ones should hold some that are accepted, benign ones some that are refused: beliefs and replies are told
        apart by these.
    judge : str or Judge
    n, max_tokens : int
        Answers per prompt, and their length.
    question : str, optional
        Asked after the instruction whether it could cause harm (`inversion_task`); None leaves the task out.
    certainly, no : sequence of str or int
        Its two replies.
    cost_harm, cost_refusal, prior : float
        Of `policy`.
    seed : int
    out : path, optional
        Folder: inspection.json, inspection.md, harmfulness.safetensors, refusal.safetensors and the edits.
    **options
        Of the engine.

    Returns
    -------
    Inspection

    Raises
    ------
    InputError
        No prompts of one kind; the template has no post-instruction tokens.
    ModelError
        The model cannot be loaded or its structure is not understood.

    Examples
    --------
    >>> from markovsafety import interventions as inside, organism
    >>> model, harmless = organism.model_path("shallow"), organism.prompts(n=24, harmful=False)
    >>> harmful = organism.prompts(n=24) + organism.prompts(n=24, marker="jailbreak")
    >>> small = dict(judge="organism", n=2, max_tokens=48, question=" <judge>", certainly=["certainly"], no=["no"])
    >>> found = inside.inspect_model(model, harmful, harmless, **small, out="look")
    >>> print(found.verdict)
    refusal causal; harmfulness ...causal; guard AUC 0.9... [0.8..., 1.000]
    >>> from pathlib import Path
    >>> sorted(file.name for file in Path("look").iterdir())
    ['edit_harmfulness.safetensors', 'edit_refusal.safetensors', 'harmfulness.safetensors', 'inspection.json',
        'inspection.md', 'refusal.safetensors']
    """
    host = model if isinstance(model, Host) else open_host(model, **options)
    host.spans().separate()
    given = [(r, kind) for kind, prompts in ((True, harmful), (False, benign)) for r in read_prompts(prompts)]
    records = [{**r, "category": category_of(r), "harmful": kind, "prompt_id": i} for i, (r, kind) in enumerate(given)]
    told = np.array([r["harmful"] for r in records])
    if told.all() or not told.any():
        raise InputError(
            f"{int(told.sum())} harmful and {int((~told).sum())} benign prompts",
            cause="what tells them apart is measured on both",
            next="give prompts of both kinds",
        )
    rolls = sample(host.engine, records, n=n, max_tokens=max_tokens, judge=judge, seed=seed, progress=False)
    refusal = refusal_shares(rolls, len(records))
    everything = Buckets(tuple(records), told, refusal, 0.5, f"{n} sampled answers a prompt")
    place = _places(everything)
    fitted, held = (everything.of(np.flatnonzero(place % 2 == side)) for side in (0, 1))
    behaviour = {
        name: Behaviour.of(rolls[np.isin(rolls.prompt_id, np.flatnonzero(told == kind))])
        for name, kind in (("harmful", True), ("harmless", False))
    }
    run = _Look(host, fitted, held, rolls, seed)
    cut = (rolls.outcome == CODES["truncated"]).mean()
    if cut > CUT:
        run.notes.append(f"{100 * cut:.0f} % of the answers were cut off and decide nothing; allow more tokens")
    parts = run.parts(question, certainly, no, (cost_harm, cost_refusal, prior))
    found = Inspection(str(host.engine.path), everything.counts, behaviour, run.openers, notes=run.notes, **parts)
    if out is not None:
        _write(found, Path(out))
    return found


@dataclass(eq=False)
class _Look:
    """One look, part by part: what fails leaves a note and stops nothing."""

    host: Host
    fitted: Buckets
    held: Buckets
    rolls: Rollouts
    seed: int
    notes: list[str] = field(default_factory=list)
    openers: list[int] = field(default_factory=list)

    def part(self, name: str, make: Callable[[], Any]) -> Any:
        try:
            return make()
        except MarkovsafetyError as error:
            self.notes.append(f"{name}: {error.fact} ({error.cause}); {error.next}")
            return None

    def parts(self, question: str | None, certainly: Any, no: Any, costs: tuple[float, float, float]) -> dict[str, Any]:
        host, fitted, held, seed = self.host, self.fitted, self.held, self.seed
        self.openers = self.part("openers", lambda: first_tokens(self.rolls, "refusal")) or []
        harm = self.part(
            "harmfulness",
            lambda: difference(
                host, _kind(fitted, True), _kind(fitted, False), position="t_inst", balance=("category",)
            ),
        )
        refusal = self.part(
            "refusal",
            lambda: difference(
                host,
                fitted.refused_harmful,
                fitted.accepted_harmless,
                position="t_post",
                names=("refused", "accepted"),
            ),
        )
        steering, inversion, edits = {}, {}, {}
        directions = {k: d for k, d in (("refusal", refusal), ("harmfulness", harm)) if d is not None}
        for name, direction in directions.items():
            sweep = self.part(f"steering along {name}", lambda d=direction: self._steered(d))
            if sweep is not None:
                steering[name] = sweep
                directions[name] = sweep.direction
                edits[name] = sweep.direction.edit(sweep.best.scale)
        if question is not None:
            task = self.part("reply inversion", lambda: inversion_task(host, question, certainly=certainly, no=no))
            for name, direction in directions.items() if task is not None else ():
                made: Any = (task, direction)
                found = self.part(f"reply inversion along {name}", lambda m=made: self._inverted(*m))
                inversion |= {} if found is None else {name: found[0], f"{name}, reversed": found[1]}
        return {
            "harmfulness": directions.get("harmfulness"),
            "refusal": directions.get("refusal"),
            "separation": self.part("separation", lambda: separate(host, fitted, held, seed=seed)),
            "steering": steering,
            "inversion": inversion,
            "edits": edits,
            **self._guarded(costs),
        }

    def _steered(self, direction: Direction) -> LevelSweep:
        def refuses(edit: Edit | None) -> np.ndarray:
            return token_mass(self.host, self.held.accepted_harmless, self.openers, edit=edit)

        both = self.held.refused_harmful, self.held.accepted_harmless
        return choose_level(self.host, direction, refuses, name="P(refuse)", held=both, seed=self.seed)

    def _inverted(self, task: Task, direction: Direction) -> tuple[Inversion, Inversion]:
        """Towards "certainly" on harmless, away from it on harmful prompts, at the level that inverts others best."""
        host, fitted, held = self.host, self.fitted, self.held

        def certainly(edit: Edit | None) -> np.ndarray:
            return replies(host, task, fitted.accepted_harmless, edit=edit).likeliest == 0

        where = task.edit(direction, level=1).parts[0].where
        swept = choose_level(host, direction, certainly, name="certainly", scales=(1,), where=where, seed=self.seed)
        chosen = swept.direction
        return (
            invert(host, task, held.accepted_harmless, task.edit(chosen), seed=self.seed),
            invert(host, task, held.refused_harmful, task.edit(chosen, -1.0), reply="no", seed=self.seed),
        )

    def _guarded(self, costs: tuple[float, float, float]) -> dict[str, Any]:
        guard = self.part("guard", lambda: latent_guard(self.host, self.fitted))
        if guard is None:
            return {}
        held = self.held
        assessed = self.part("guard", lambda: assess(self.host, guard, held, seed=self.seed))
        beliefs = self.part("beliefs", lambda: belief_table(believe(self.host, guard.means, held.prompts), held)) or []
        if assessed is None:
            return {"beliefs": beliefs}
        ids = np.array([r["prompt_id"] for r in held.prompts])
        blocks = dict(zip(ids.tolist(), (assessed.scores > guard.threshold).tolist()))
        mine = self.rolls[np.isin(self.rolls.prompt_id, ids[held.harmful])]
        blocked = self.part("block", lambda: measure_blocked(mine, blocks, seed=self.seed))
        h = _harm(mine, ids[held.harmful])
        chosen = self.part(
            "policy",
            lambda: policy(
                costs[0],
                costs[1],
                harmful=assessed.scores[held.harmful],
                harmless=assessed.scores[~held.harmful],
                harm=h,
                prior=costs[2],
                seed=self.seed,
            ),
        )
        return {"guard": assessed, "beliefs": beliefs, "blocked": blocked, "policy": chosen}


def _places(buckets: Buckets) -> np.ndarray:
    """Number of each prompt within its bucket and category, so that both halves have some of each."""
    seen: dict[Any, int] = {}
    places = []
    for cell in zip(buckets.harmful.tolist(), buckets.refused.tolist(), buckets.categories.tolist()):
        places.append(seen.get(cell, 0))
        seen[cell] = places[-1] + 1
    return np.array(places)


def _kind(buckets: Buckets, harmful: bool) -> list[Any]:
    return [p for p, is_harmful in zip(buckets.prompts, buckets.harmful) if is_harmful == harmful]


def _harm(rolls: Rollouts, ids: np.ndarray) -> np.ndarray:
    """Share of harmful answers of each prompt."""
    hits = np.array([(rolls.outcome[rolls.prompt_id == i] == CODES["harm"]).mean() for i in ids])
    return hits.astype(np.float64)


def _write(found: Inspection, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, direction in (("harmfulness", found.harmfulness), ("refusal", found.refusal)):
        if direction is not None:
            write_direction(direction, folder / f"{name}.safetensors")
    for name, edit in found.edits.items():
        write_edit(edit, folder / f"edit_{name}.safetensors")
    for suffix, text in (("json", json.dumps(found.to_json(), indent=1)), ("md", found.markdown())):
        with atomic(folder / f"inspection.{suffix}") as part:
            part.write_text(text + "\n", encoding="utf-8")
