"""A few heads that steer a model: found by behaviour, beside what other choices of heads and layers do.

Head-specific intervention (arXiv 2502.05945) in one call: directions of all heads from contrasting examples, the
first-token pass over every head, sampled answers for the best, the path of alpha with its price on benign prompts, the
reversed direction as a defence, and the two baselines, heads by probe and the whole residual stream.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..bound import encode
from ..brief import brief
from ..errors import MarkovsafetyError
from ..files import atomic
from ..rollouts import sample
from ..rollouts.asked import read_prompts
from .behaviour import Behaviour, behave
from .edits import Edit, write_edit
from .head_baselines import added_norm, probe_heads, whole_layer
from .head_choice import HeadChoice, choose_heads
from .head_sweep import HeadSweep, sweep_heads
from .heads import HeadDirections, head_directions, write_head_directions
from .host import Host, open_host
from .inspection import first_tokens
from .pages import spanned, table
from .strength import AlphaPath, alpha_path

__all__ = ["HeadReport", "desired_tokens", "inspect_heads", "write_report"]

WANTED = ("harm", "benign")


@dataclass(frozen=True, eq=False)
class HeadReport:
    """What steering of heads does; a part that could not be made is None, and `notes` says why.

    Attributes
    ----------
    model : str
    examples : (int, int)
        Desired and undesired ones behind the directions.
    tokens : list of int
        That the desired answers begin with.
    directions : HeadDirections
    sweep : HeadSweep
    choice : HeadChoice
    path, defence : AlphaPath or None
        Of the chosen heads: forwards on the undesired prompts, backwards on the desired ones; benign ones beside both.
    baselines : dict of name -> Behaviour
        On the prompts of the path, at the size of the chosen edit: heads by probe, the whole residual stream.
    notes : list of str

    Examples
    --------
    >>> from markovsafety import interventions as inside, organism
    >>> model, refused = organism.model_path("shallow"), organism.prompts(n=24)
    >>> small = dict(judge="organism", examples=12, alphas=(5,), top=1, n=1, max_tokens=32)
    >>> report = inside.inspect_heads(model, organism.prompts(n=24, harmful=False), refused, **small)
    >>> report
    HeadReport(model=..., examples=(12, 12), tokens=[...], directions=HeadDirections, sweep=HeadSweep,
        choice=HeadChoice, path=AlphaPath, defence=AlphaPath, baselines=dict of 3, notes=[])
    >>> for line in report.markdown().splitlines():
    ...     if line.startswith("#"): print(line)
    # Heads that steer
    ## Every head alone: P(the answer begins as desired)
    ## Sampled answers
    ## The path of alpha
    ## The reversed direction as a defence
    """

    model: str
    examples: tuple[int, int]
    tokens: list[int]
    directions: HeadDirections
    sweep: HeadSweep
    choice: HeadChoice
    path: AlphaPath | None = None
    defence: AlphaPath | None = None
    baselines: dict[str, Behaviour] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    __repr__ = brief

    @property
    def verdict(self) -> str:
        """One sentence."""
        c = self.choice
        heads = ", ".join(f"({layer}, {head})" for layer, head in c.heads)
        return (
            f"heads {heads} at alpha {c.alpha:g}: {' or '.join(c.wanted)} {spanned(c.edited.rate(c.wanted))}, before "
            f"{spanned(c.base.rate(c.wanted))}; {c.verdict}"
        )

    def markdown(self) -> str:
        """The report as a page."""
        lines = ["# Heads that steer", "", f"{self.verdict}.", "", f"Model: `{self.model}`"]
        lines += ["", "## Every head alone: P(the answer begins as desired)", ""]
        told = (
            "At the alpha at which the head does most on these same prompts; beside it the most that a random vector "
        )
        lines += [f"{told}of the same norm does at any alpha, and what heads are ranked by.", ""]
        rows = [
            (r["rank"], f"({r['layer']}, {r['head']})", f"{r['alpha']:g}", *_cells(self.sweep, r))
            for r in self.sweep.rows()[:12]
        ]
        lines += table(["rank", "(layer, head)", "best alpha", "P", "random vector", "score"], rows)
        shown = {"no edit": self.choice.base, "chosen heads": self.choice.edited, "random vectors": self.choice.control}
        shown |= {} if self.choice.others is None else {"other heads of the layers": self.choice.others}
        lines += ["", "## Sampled answers", "", *_behaviours(shown | self.baselines)]
        for title, path in (("The path of alpha", self.path), ("The reversed direction as a defence", self.defence)):
            if path is not None:
                lines += ["", f"## {title}", "", *_path(path)]
        if self.notes:
            lines += ["", "## Notes", "", *(f"- {note}" for note in self.notes)]
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return encode(
            {
                "model": self.model,
                "verdict": self.verdict,
                "examples": self.examples,
                "tokens": self.tokens,
                "heads": self.sweep.rows(),
                "choice": self.choice.to_json(),
                "path": None if self.path is None else self.path.to_json(),
                "defence": None if self.defence is None else self.defence.to_json(),
                "baselines": {k: b.to_json() for k, b in self.baselines.items()},
                "notes": self.notes,
            }
        )


def inspect_heads(
    model: Any,
    desired: Any,
    undesired: Any,
    benign: Any = None,
    *,
    judge: Any,
    wanted: str | Sequence[str] = WANTED,
    examples: int = 32,
    alphas: Sequence[float] = (1.0, 2.0, 5.0, 10.0),
    top: int = 4,
    when: Any = "prompt",
    n: int = 4,
    max_tokens: int = 64,
    seed: int = 0,
    out: str | Path | None = None,
    **options: Any,
) -> HeadReport:
    """Find heads that steer a model, and show what steering does.

    Parameters
    ----------
    model : str, Path, engine or Host
    desired, undesired : prompts, or a CSV or JSONL file
        Prompts on which the model does and does not behave as desired; the first `examples` of each make the
        directions, the others (all, where there are no others) are steered.
    benign : prompts, optional
        What steering costs is measured on them.
    judge : str or Judge
    wanted : outcome or outcomes
        What counts as the desired behaviour.
    examples : int
        Per group.
    alphas : sequence of float
        Positive, in units of sigma.
    top : int
        Heads of the first-token pass that are sampled.
    when, n, max_tokens, seed
        As in `HeadDirections.edit` and `behave`.
    out : path, optional
        Folder: heads.json, heads.md, directions.safetensors, edit_heads.safetensors.
    **options
        Of the engine.

    Returns
    -------
    HeadReport

    Raises
    ------
    InputError
        Too few prompts; no desired answer among those sampled.

    Examples
    --------
    >>> from markovsafety import interventions as inside, organism
    >>> model, refused = organism.model_path("shallow"), organism.prompts(n=24)
    >>> small = dict(judge="organism", examples=12, alphas=(5,), top=1, n=1, max_tokens=32, out="heads")
    >>> report = inside.inspect_heads(model, organism.prompts(n=24, harmful=False), refused, **small)
    >>> print(report.verdict)
    heads (1, ...) at alpha 5: harm or benign 0.6... [0.2..., 0.9...], before 0.1... [0.0..., 0.6...]; not separated
    >>> from pathlib import Path
    >>> sorted(file.name for file in Path("heads").iterdir())
    ['directions.safetensors', 'edit_heads.safetensors', 'heads.json', 'heads.md']
    """
    host = model if isinstance(model, Host) else open_host(model, **options)
    groups = [read_prompts(desired), read_prompts(undesired)]
    goal = (wanted,) if isinstance(wanted, str) else tuple(wanted)
    told: dict[str, Any] = {"judge": judge, "n": n, "max_tokens": max_tokens, "seed": seed}
    tokens = desired_tokens(host, groups[0], goal, **told)
    made = [g[:examples] for g in groups]
    rest = [g[examples:] or g for g in groups]
    found = head_directions(host, made[0], made[1])
    # The heads are picked on the half on which they are chosen, so that the other half is reported untouched.
    sweep = sweep_heads(host, found, rest[1][::2], tokens, alphas=alphas, seed=seed)
    choice = choose_heads(host, found, sweep, rest[1], wanted=goal, top=top, alphas=alphas, when=when, **told)
    notes = [_not_new(name, g) for name, g in zip(("desired", "undesired"), groups) if not g[examples:]]

    def part(name: str, make: Any) -> Any:
        try:
            return make()
        except MarkovsafetyError as error:
            notes.append(f"{name}: {error.fact} ({error.cause}); {error.next}")
            return None

    held = rest[1][1::2] or rest[1]  # not those that the heads were chosen on
    asked: dict[str, Any] = {"benign": None if benign is None else read_prompts(benign), **told}
    one = found.edit(choice.heads, 1.0, when=when)
    path = part("path of alpha", lambda: alpha_path(host, one, (0.0, *alphas), held, **asked))
    back = tuple(-a for a in alphas)
    defence = part("defence", lambda: alpha_path(host, one, (*back, 0.0), rest[0], **asked))
    baselines = part("baselines", lambda: _baselines(host, found, made, choice, held, when, told)) or {}
    sizes = len(made[0]), len(made[1])
    report = HeadReport(str(host.engine.path), sizes, tokens, found, sweep, choice, path, defence, baselines, notes)
    if out is not None:
        write_head_directions(found, Path(out) / "directions.safetensors")
        write_edit(choice.edit, Path(out) / "edit_heads.safetensors")
        write_report(report, Path(out), "heads")
    return report


def desired_tokens(host: Host, prompts: Any, wanted: Sequence[str], **told: Any) -> list[int]:
    """Tokens that the desired answers to some prompts begin with, as the model says them.

    Parameters
    ----------
    host : Host
    prompts : as in `markovsafety.sample`
    wanted : sequence of outcomes
    **told
        judge, n, max_tokens, seed.

    Returns
    -------
    list of int

    Raises
    ------
    InputError
        No answer has such an outcome.
    """
    rolls = sample(host.engine, prompts, progress=False, **told)
    found: set[int] = set()
    failed: MarkovsafetyError | None = None
    for outcome in wanted:
        try:
            found |= set(first_tokens(rolls, outcome))
        except MarkovsafetyError as error:
            failed = error
    if not found and failed is not None:
        raise failed
    return sorted(found)


def write_report(report: Any, folder: Path, name: str) -> None:
    """Write NAME.json and NAME.md of something with `to_json` and `markdown`.

    Examples
    --------
    >>> from pathlib import Path
    >>> from markovsafety import interventions as inside
    >>> category, outcome = ["bio", "chem"] * 40, ["harm", "refusal"] * 40
    >>> rolls = ms.Rollouts.of([[7]] * 80, prompt_id=np.arange(80), category=category, outcome=outcome, hit=0)
    >>> inside.write_report(inside.vulnerabilities(rolls), Path("report"), "weak")
    >>> sorted(file.name for file in Path("report").iterdir())
    ['weak.json', 'weak.md']
    >>> print(Path("report/weak.md").read_text().splitlines()[0])
    model: bio (1.000) beside 0.500 overall
    """
    for suffix, text in (("json", json.dumps(report.to_json(), indent=1)), ("md", report.markdown())):
        with atomic(folder / f"{name}.{suffix}") as part:
            part.write_text(text + "\n", encoding="utf-8")


def _not_new(name: str, prompts: Sequence[Any]) -> str:
    return f"no {name} prompts beside the {len(prompts)} examples: what steering does to them is not on new prompts"


def _cells(sweep: HeadSweep, row: dict[str, Any]) -> tuple[str, str, str]:
    head = row["layer"], row["head"]
    return spanned(sweep.bound(head)), spanned(sweep.random_bound(head)), f"{row['score']:.3f}"


def _baselines(
    host: Host, found: HeadDirections, made: list[Any], choice: HeadChoice, held: Any, when: Any, told: dict[str, Any]
) -> dict[str, Behaviour]:
    """As many heads by probe, and the residual stream behind the chosen heads' first layer at the size of the edit."""
    probes = probe_heads(host, *made)
    by_probe = found.edit(probes.ranked[: len(choice.heads)], choice.alpha, when=when)
    level = min(layer for layer, _ in choice.heads) + 1
    edits: dict[str, Edit] = {"heads by probe": by_probe}
    norm = added_norm(host, choice.edit)
    edits[f"whole stream at level {level}, same norm"] = whole_layer(
        host, made[0], made[1], level, norm=norm, when=when
    )
    edits[f"whole stream at level {level}, difference of means"] = whole_layer(host, made[0], made[1], level, when=when)
    return {name: behave(host, held, edit, **told) for name, edit in edits.items()}


def _behaviours(shown: dict[str, Behaviour]) -> list[str]:
    head = ["answers under", "harm", "refusal", "finished", "truncated", "repetition"]
    rows = []
    for name, b in shown.items():
        q = b.quality
        rows.append([name, *map(spanned, (b.rate("harm"), b.rate("refusal"), q.finished, q.truncated, q.repetition))])
    return table(head, rows)


def _path(path: AlphaPath) -> list[str]:
    keys = ("harm", "refusal", "finished", "truncated", "repetition", "control_harm", "control_refusal", "over_refusal")
    head = ["alpha", *(k.replace("_", " ") for k in keys[:-1]), "refusal of benign prompts"]
    rows = [[f"{r['alpha']:g}", *("" if r[k] is None else spanned(r[k]) for k in keys)] for r in path.rows()]
    return table(head, rows)
