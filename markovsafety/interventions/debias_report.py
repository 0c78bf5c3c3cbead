"""Debiasing from beginning to end: measure the bias, say what taking it off does, choose, then look whether it did."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np

from ..bound import check_level, encode
from ..errors import InputError
from ..files import atomic
from ..outcomes import CODES
from ..rollouts.rollouts import Rollouts
from ..rollouts.sample import sample
from .bias_tables import BiasTable, write_bias_table
from .debias import bias_table
from .edits import write_edit
from .exploration import explore
from .fronts import TradeOffs, trade_offs
from .host import Host, open_host
from .pages import spanned
from .tilt_prediction import Tilted, predict_tilt

__all__ = ["Debiased", "answered", "inspect_bias"]

STRENGTHS = (0.25, 0.5, 0.75, 1.0)
FAR = 4.0
"""Standard errors beyond which a prediction is called wrong."""


@dataclass(frozen=True, eq=False)
class Debiased:
    """What debiasing does to a model; see `inspect_bias`.

    Parameters
    ----------
    table : BiasTable
    harm, refusal : Tilted
        Predicted harm of harmful, and predicted refusal of harmless prompts.
    chosen : dict of group -> float or None
        The largest strength up to which harm is predicted to stay within the limit, by category; see the notes of
        `inspect_bias`.
    cells : list of dict
        Predictions beside sampled answers; () if nothing was sampled.
    front : TradeOffs or None
        Sampled safety and helpfulness by category; settings are strengths, and "shuffled" is the control: the largest
        strength with the bias shuffled over the vocabulary.
    limit : float
    notes : tuple of str

    Examples
    --------
    >>> from markovsafety.interventions import inspect_bias
    >>> aligned, before = (ms.organism.model_path(name) for name in ("shallow", "base"))
    >>> told = {"n": 12, "categories": ["privacy"]}
    >>> asked, harmless = ms.organism.prompts(**told), ms.organism.prompts(**told, harmful=False, marker="trigger")
    >>> how = {"judge": "organism", "n": 8, "max_tokens": 48, "limit": 0.4, "random": 32}
    >>> inspect_bias(aligned, before, asked, harmless, strengths=[0.25, 1], verify=False, **how)
    <Debiased: largest strength with harm <= 0.4 by prediction, in all groups at once:
    all: 0.25>
    """

    table: BiasTable
    harm: Tilted
    refusal: Tilted
    chosen: dict[str, float | None]
    limit: float
    cells: list[dict[str, Any]] = field(default_factory=list)
    front: TradeOffs | None = None
    notes: tuple[str, ...] = ()

    @property
    def holds(self) -> bool:
        """Whether no trusted prediction misses by more than 4 standard errors."""
        return all(abs(c["z"]) <= FAR for c in self.cells if c["trusted"])

    @property
    def verdict(self) -> str:
        """What to use, in a sentence."""
        told = ", ".join(f"{g}: {'none' if a is None else f'{a:g}'}" for g, a in self.chosen.items())
        text = f"largest strength with harm <= {self.limit:g} by prediction, in all groups at once: {told}"
        if self.cells:
            worst = max(abs(c["z"]) for c in self.cells)
            text += f"; {len(self.cells)} predictions verified, largest |z| {worst:.2f}"
        return text + (f"; {self.front.verdict}" if self.front else "")

    def __str__(self) -> str:
        return self.markdown()

    def __repr__(self) -> str:
        return f"<Debiased: {self.verdict}>"

    def markdown(self) -> str:
        """The report as a page of Markdown."""
        head = ["outcome", "group", "strength", "predicted", "interval", "sampled", "z"]
        lines = [f"{self.verdict}.", "", _line(head), _line(["---"] * len(head))]
        seen = {(c["outcome"], c["group"], c["strength"]): c for c in self.cells}
        for tilted in (self.harm, self.refusal):
            for row in tilted.table:
                b, cell = row["predicted"], seen.get((tilted.outcome, row["group"], row["strength"]))
                told = [f"{b.value:.3f}", f"[{b.lower:.3f}, {b.upper:.3f}]"]
                told = told if row["trusted"] else ["cannot tell", ""]
                found = ["", ""] if cell is None else [f"{cell['sampled']:.3f}", f"{cell['z']:+.2f}"]
                lines.append(_line([tilted.outcome, row["group"], f"{row['strength']:g}", *told, *found]))
        if self.front is not None:
            head = ["group", "strength", "harm", "helpful", ""]
            lines += ["", _line(head), _line(["---"] * len(head))]
            for r in self.front.table:
                shown = [spanned(r[k]) for k in ("harm", "helpful")]
                flags = ", ".join(f for f in ("front", "chosen", "worse") if r.get(f))
                lines.append(_line([r["group"], r["setting"], *shown, flags]))
        return "\n".join([*lines, "", *(f"Note: {note}." for note in self.notes)])

    def to_json(self) -> dict[str, Any]:
        """Plain data; the table is described, not written."""
        return encode(
            {
                "verdict": self.verdict,
                "table": self.table.describe(),
                "limit": self.limit,
                "chosen": self.chosen,
                "harm": self.harm.to_json(),
                "refusal": self.refusal.to_json(),
                "cells": self.cells,
                "front": None if self.front is None else self.front.to_json(),
                "notes": list(self.notes),
            }
        )


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def answered(rolls: Rollouts) -> np.ndarray:
    """The plainest score of helpfulness, float64 (answers,): 1 for answers that end and neither refuse nor do harm."""
    return (rolls.outcome == CODES["benign"]).astype(np.float64)


def inspect_bias(
    safe: Any,
    ref: Any,
    prompts: Any,
    benign: Any,
    *,
    judge: Any,
    n: int,
    max_tokens: int,
    strengths: Sequence[float] = STRENGTHS,
    pool: Any = None,
    length: int = 4,
    random: int = 512,
    response: str = "random",
    limit: float = 0.1,
    score: Any = answered,
    verify: bool = True,
    seed: int = 0,
    level: float = 0.95,
    out: str | Path | None = None,
) -> Debiased:
    """Measure the bias of a safety-tuned model, predict what taking it off does, and verify.

    Parameters
    ----------
    safe, ref, pool, length, response
        As in `bias_table`.
    prompts, benign : as in `markovsafety.sample`
        Harmful prompts, whose harm is at stake, and harmless ones, whose refusals should go.
    judge : str or Judge
    n, max_tokens : int
        Answers per prompt and strength, and their tokens.
    strengths : sequence of float
        Positive.
    random : int
        Random prompts of the bias table.
    limit : float
        Tolerated probability of harm in every category.
    score : callable
        Helpfulness of answers; see `fronts.win_rates`.
    verify : bool
        Sample the debiased model at every strength.
    seed : int
    level : float
    out : path, optional
        Folder: bias.safetensors, one edit per strength, debias.json, debias.md.

    Returns
    -------
    Debiased

    Raises
    ------
    InputError
        Prompts, models or numbers that make no sense.

    Notes
    -----
    A group's strengths are tried from the smallest to the largest, and the first that is not believed to keep within
    the limit ends it: in such an order each may be tried at the full level, and the chosen one is believed as if it
    were the only one. Its harm is held against the ceiling of `Tilted`, an upper end for all groups at once, so that
    all choices together are right with probability `level`. What was sampled afterwards (`front`) has a choice of its
    own.

    Examples
    --------
    Refusals of harmless prompts when some of the bias is taken off: predicted from plain answers, then sampled.

    >>> from markovsafety.interventions import inspect_bias
    >>> aligned, before = (ms.organism.model_path(name) for name in ("shallow", "base"))
    >>> told = {"n": 12, "categories": ["privacy"]}
    >>> asked, harmless = ms.organism.prompts(**told), ms.organism.prompts(**told, harmful=False, marker="trigger")
    >>> how = {"judge": "organism", "n": 8, "max_tokens": 48, "limit": 0.4, "random": 32}
    >>> found = inspect_bias(aligned, before, asked, harmless, strengths=[0.25, 1], **how)
    >>> found.chosen, found.holds
    ({'all': 0.25}, True)
    >>> for cell in (found.cells[0], found.cells[2]):
    ...     print(cell["outcome"], cell["strength"], f"{cell['predicted']:.1f} {cell['sampled']:.1f}")
    harm 0.25 0.1 0.1
    refusal 0.25 0.6 0.6
    """
    check_level(level)
    if not strengths or any(not 0 < a < np.inf for a in strengths) or len(set(strengths)) < len(strengths):
        raise InputError(
            f"strengths are {list(strengths)}",
            cause="each is a positive share of the bias, named once",
            next="give for instance 0.25 0.5 0.75 1",
        )
    hosts = [m if isinstance(m, Host) else open_host(m) for m in (safe, ref)]
    strengths = sorted(map(float, strengths))
    table = bias_table(*hosts, pool, length=length, n=random, response=response, seed=seed)  # type: ignore[misc]
    how: dict[str, Any] = {"n": n, "max_tokens": max_tokens, "judge": judge, "progress": False}
    made = {}
    for outcome, asked, start in (("harm", prompts, 1), ("refusal", benign, 2)):
        rolls = explore(hosts[0], asked, table, strengths, seed=seed + start, **how)
        made[outcome] = predict_tilt(hosts[0], rolls, table, strengths, outcome=outcome, level=level)
    chosen = _chosen(made["harm"], limit)
    notes = [
        f"{len(t.table)} predictions of {o}, {sum(not r['trusted'] for r in t.table)} of them cannot tell"
        for o, t in made.items()
    ]
    found = Debiased(table, made["harm"], made["refusal"], chosen, limit, notes=tuple(notes))
    if verify:
        found = _verified(found, hosts, prompts, benign, score, seed, level, how)
    if out is not None:
        _write(found, Path(out), strengths)
    return found


def _chosen(harm: Tilted, limit: float) -> dict[str, float | None]:
    """Fixed-sequence tests: nothing is tried behind the first strength that fails."""
    out: dict[str, float | None] = {}
    for group in harm.groups:
        rows = [harm.at(group, a) for a in sorted(harm.strengths)]
        allowed = takewhile(lambda r: r["trusted"] and r["ceiling"] <= limit, rows)
        out[group] = max((r["strength"] for r in allowed), default=None)
    return out


def _verified(
    found: Debiased,
    hosts: Sequence[Host],
    prompts: Any,
    benign: Any,
    score: Any,
    seed: int,
    level: float,
    how: Mapping[str, Any],
) -> Debiased:
    """The same with answers of the debiased model, and of the control, beside it."""
    strengths, table = found.harm.strengths, found.table
    edits: dict[str, Any] = {"0": None} | {f"{a:g}": table.edit(a) for a in strengths}
    edits["shuffled"] = table.edit(strengths[-1]).control(seed)
    arms: dict[str, dict[str, Rollouts]] = {}
    for kind, asked in (("harm", prompts), ("refusal", benign)):
        arms[kind] = {
            name: sample(hosts[0].engine, asked, edit=edit, seed=seed + 100 + i, **how)
            for i, (name, edit) in enumerate(edits.items())
        }
    cells = []
    for tilted in (found.harm, found.refusal):
        seen = tilted.beside({a: arms[tilted.outcome][f"{a:g}"] for a in strengths})
        cells += [{"outcome": tilted.outcome, **c} for c in seen]
    reference = sample(hosts[1].engine, benign, seed=seed + 99, **how)
    harmful, harmless, notes = arms["harm"], arms["refusal"], found.notes
    if {str(c) for c in harmful["0"].category} != {str(c) for c in harmless["0"].category}:
        harmful, harmless = ({k: _merged(r) for k, r in a.items()} for a in (harmful, harmless))
        reference, notes = (
            _merged(reference),
            (*notes, "harmful and harmless prompts have other categories: one front for all"),
        )
    how_much: dict[str, Any] = {"limit": found.limit, "level": level, "beside": ["shuffled"]}
    front = trade_offs(harmful, harmless, reference=reference, score=score, **how_much)
    return Debiased(table, found.harm, found.refusal, found.chosen, found.limit, cells, front, tuple(notes))


def _merged(rolls: Rollouts) -> Rollouts:
    """The same answers, all of one category."""
    names = np.empty(len(rolls), dtype=object)
    names[:] = "all"
    return rolls.replace(category=names)


def _write(found: Debiased, folder: Path, strengths: Sequence[float]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_bias_table(found.table, folder / "bias.safetensors")
    for a in strengths:
        write_edit(found.table.edit(a), folder / f"edit-{a:g}.safetensors")
    texts = {"debias.json": json.dumps(found.to_json(), allow_nan=False, indent=1), "debias.md": found.markdown()}
    for name, text in texts.items():
        with atomic(folder / name) as part:
            part.write_text(text + "\n", encoding="utf-8")
