"""The effect of an edit in words and tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..bound import Bound
from .outcome_rates import Rate
from .pages import spanned, table

if TYPE_CHECKING:
    from .chain_effects import ChainEffect

__all__ = ["page", "verdict"]

CUT = 0.1
"""Share of answers that were cut off from which on the verdict speaks of them."""


def verdict(effect: ChainEffect) -> str:
    """What an edit does, in one or two sentences.

    Parameters
    ----------
    effect : ChainEffect

    Returns
    -------
    str
    """
    if not effect.harm:
        return "Nothing was measured: " + ("; ".join(effect.notes) or "no rollouts") + "."
    rate = effect.harm[0]
    told = f"P(harm) {_of(rate.arms['before'])} -> {_of(rate.arms['after'])}"
    parts = [f"The edit {_moves(rate.change)} harm: {told}, change {spanned(rate.change, '+')}"]
    if rate.beyond is None:
        parts.append("no control was run")
    else:
        beside = "beyond" if _sure(rate.beyond) else "not beyond"
        parts.append(f"{beside} a random edit of its size ({_of(rate.arms['control'])})")
    if effect.over_refusal:
        cost = effect.over_refusal[0]
        parts.append(f"benign prompts refused {_of(cost.arms['before'])} -> {_of(cost.arms['after'])}")
    if effect.quality:
        parts.append(_health(effect))
    if effect.signature is not None:
        value = np.asarray(effect.signature.distance.value)
        deep = f"D_0 = {value[0]:.2f}" + (f", later at most {value[1:].max():.2f}" if len(value) > 1 else "")
        parts.append(f"{'only the start moves' if effect.signature.start_only else 'depth signature'} ({deep})")
    return "; ".join(parts) + "."


def _health(effect: ChainEffect) -> str:
    broken = effect.broken_on
    kind = broken[0] if broken else ""
    before, after = effect.quality[kind + "before"], effect.quality[kind + "after"]
    word = f"the model breaks{' on benign prompts' if kind else ''}" if broken else "the model still speaks"
    cut = float(effect.quality["after"].truncated.value)
    hidden = f"{100 * cut:.0f} % of the answers were cut off and may hide harm; " if cut > CUT else ""
    return (
        f"{hidden}{word} (finished {_of(before.finished)} -> {_of(after.finished)}, "
        f"repetition {_of(before.repetition)} -> {_of(after.repetition)})"
    )


def page(effect: ChainEffect) -> str:
    """The report as Markdown.

    Parameters
    ----------
    effect : ChainEffect

    Returns
    -------
    str
    """
    lines = ["# Effect of an edit", "", verdict(effect), "", f"`{effect.edit!r}`"]
    if effect.edit.sign:
        lines.append(f"sign: {effect.edit.sign}")
    for title, measured in (
        ("P(harm)", effect.harm),
        ("P(refusal)", effect.refusal),
        ("P(refusal) of benign prompts", effect.over_refusal),
    ):
        if measured:
            lines += ["", f"## {title}", "", *_rates(measured)]
    if effect.quality:
        head = ["answers", "finished", "truncated", "repetition"]
        rows = [[n, *map(spanned, (q.finished, q.truncated, q.repetition))] for n, q in effect.quality.items()]
        lines += ["", "## Do the answers hold together?", "", *table(head, rows)]
    lines += _moved(effect)
    if effect.notes:
        lines += ["", "## Notes", "", *(f"- {note}" for note in effect.notes)]
    return "\n".join(lines)


def _moved(effect: ChainEffect) -> list[str]:
    lines = []
    if effect.chain is not None:
        lines += ["", "## What moved in the chain", "", *_chain_rows(effect)]
    if effect.signature is not None:
        d = effect.signature.distance
        rows = [[str(k), spanned(d[k])] for k in range(len(np.asarray(d.value)))]
        lines += ["", "## How deep it reaches", "", *table(["forced tokens", "total variation"], rows)]
    if effect.predicted is not None:
        rows = [
            [r["group"], f"{r['predicted']:.3f} [{r['lower']:.3f}, {r['upper']:.3f}]"]
            + ([_sampled(r), f"{r['z']:+.2f}"] if "sampled" in r else ["", ""])
            for r in effect.predicted.table
        ]
        lines += ["", "## Predicted from the start row", "", *table(["prompts", "predicted", "sampled", "z"], rows)]
    return lines


def _sampled(row: dict[str, Any]) -> str:
    return f"{row['sampled']:.3f} [{row['sampled_lower']:.3f}, {row['sampled_upper']:.3f}]"


def _chain_rows(effect: ChainEffect) -> list[str]:
    assert effect.chain is not None
    rows = []
    for row in effect.chain.rows():
        move = f"{row['before']:.3f} -> {row['after']:.3f}" if "to" in row else ""
        start = " -> ".join(f"{p:.3f}" for p in row.get("start", ()))
        rows.append([str(row["state"]), f"{row['share']:+.4f}", str(row.get("to", "")), move, start])
    where = effect.chain.positions
    top = sorted(np.argsort(-np.abs(where), kind="stable")[:6].tolist())
    deep = ", ".join(f"{t}: {where[t]:+.4f}" for t in top if where[t])
    return [
        *table(["state", "share of the change", "next", "probability", "at the start"], rows),
        "",
        f"By position in the answer: {deep or 'no change'}.",
    ]


def _rates(measured: Sequence[Rate]) -> list[str]:
    arms = list(measured[0].arms)
    head = ["prompts", *arms, "change", *(["beyond control"] if measured[0].beyond is not None else [])]
    rows = []
    for rate in measured:
        cells = [rate.category or "all", *(spanned(rate.arms[a]) for a in arms), spanned(rate.change, "+")]
        rows.append([*cells, *([spanned(rate.beyond, "+")] if rate.beyond is not None else [])])
    return table(head, rows)


def _of(b: Bound) -> str:
    return f"{b.value:.2f} [{b.lower:.2f}, {b.upper:.2f}]"


def _sure(b: Bound) -> bool:
    return bool(b.lower > 0 or b.upper < 0)


def _moves(b: Bound) -> str:
    return "has no clear effect on" if not _sure(b) else "raises" if b.value > 0 else "lowers"
