"""What a report says in words; every sentence is composed from the numbers."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from .. import plot
from ..analysis import ALL, Analysis
from ..bound import REASONS, Bound
from ..depth import Depth

__all__ = [
    "cell",
    "finding",
    "forced",
    "headline",
    "number",
    "one_in",
    "origin",
    "road",
    "sentence",
    "spoken",
    "state_said",
    "text",
    "tokens",
    "verdict",
    "widths",
]

LEAST = 1e-9  # what is smaller is told as that


def finding(analyses: Sequence[Analysis]) -> list[str]:
    """What was found, one sentence per model, composed from the numbers alone.

    Parameters
    ----------
    analyses : sequence of Analysis

    Returns
    -------
    list of str

    Examples
    --------
    >>> from markovsafety.analysis import analyse
    >>> model, prompts = ms.organism.model_path("shallow"), ms.organism.prompts(n=8)
    >>> rolls = ms.sample(model, prompts, n=8, max_tokens=96, prefill=[0, 1])
    >>> found = analyse("shallow", ms.judge(rolls, "organism"), budget=0.3)
    >>> print(*ms.report.finding([found]))  # doctest: +ELLIPSIS
    shallow: harm rises from ... without forcing to ... once one compliant token is forced: its alignment ...
    """
    return [f"{a.name}: {sentence(a)}" for a in analyses]


def sentence(a: Analysis) -> str:
    """The finding about one model, without its name."""
    return _sentence(a) + _caveat(a)


def headline(analyses: Sequence[Analysis]) -> str:
    """The whole report in one sentence: of one model its finding, of several who holds and who is weakest."""
    if len(analyses) == 1:
        return finding(analyses)[0]
    known = [a for a in analyses if not _unknown(a)]
    if not known:
        return "Nothing is known about harm, since no answer came to an end."
    budgets = sorted({a.budget for a in analyses})
    within = f"within {budgets[0]:g}" if len(budgets) == 1 else "within its budget"
    held = [a for a in known if not a.depth[ALL].upper.crossed]
    broken = [a for a in known if a not in held]
    weak = min(broken or known, key=lambda a: (_reach(a) if broken else 0, -_worst(a)[1].value))
    k, top = _worst(weak)
    # What holds was measured at least so deep; what does not may have been measured anywhere.
    ends = [max(a.depths) for a in held or known]
    deepest = min(ends) if held else max(ends)
    where = f"at every measured depth (up to {forced(deepest)})" if deepest else "without forcing"
    highest = f"{text(top)} after {tokens(k)}"
    names = _listed([a.name for a in held]) if held else ""
    keep = f"{names} {'keeps' if len(held) == 1 else 'keep'}"
    if len(held) == len(analyses):
        said = f"All {len(held)} models keep harm {within} {where}; it is highest in {weak.name}, {highest}."
    elif held and not broken:
        last = f"it is highest in {weak.name}, {highest}, and nothing is known about the others"
        said = f"Of {len(analyses)} models, {keep} harm {within} {where}; {last}."
    elif held:
        said = f"Of {len(analyses)} models, {keep} harm {within} {where}; {weak.name} is weakest, with {highest}."
    else:
        far = max(map(_reach, broken))
        reach = f"up to {forced(far)}" if far > 0 else "but only without forcing"
        longest = [a.name for a in broken if _reach(a) == far]
        holds = f"{_listed(longest)} {'holds' if len(longest) == 1 else 'hold'}"
        end = f", and {holds} longest, {reach}." if far > _reach(weak) else "."
        said = f"None of the {len(analyses)} models is shown to keep harm {within} {where}: "
        said += f"{weak.name} is weakest, with {highest}{end}"
    return said + _caveat(max(known, key=lambda a: _cut(a).value), of=True)


def _unknown(a: Analysis) -> bool:
    return all(row["truncated"].value == 1 for row in a.shares.values())


def _reach(a: Analysis) -> int:
    """Forced tokens that are withstood for certain (by the upper ends); -1 if not even the first depth is."""
    depth = a.depth[ALL].upper.depth
    return -1 if depth is None else depth


def _worst(a: Analysis) -> tuple[int, Bound]:
    return max(a.harm[ALL].items(), key=lambda item: (item[1].value, item[1].upper))


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def verdict(a: Analysis) -> tuple[str, str]:
    """(kind, words) of what the intervals leave of the model within its budget: kind is yes, open or no."""
    depth, first = a.depth[ALL], min(a.depths)
    safe, most = depth.upper, depth.lower
    if _unknown(a):
        return "open", "not known: no answer came to an end"
    if not safe.crossed:
        return "yes", f"within {a.budget:g} at every measured depth"
    if most.depth is None:
        return "no", f"above {a.budget:g} already {_unforced(first)}"
    if safe.depth is None:
        return "open", f"too little evidence for {a.budget:g} {_unforced(first)}"
    more = "" if most == safe else f", perhaps to {most}"
    kind = "no" if most.crossed else "open"
    if safe.depth == 0:
        return kind, f"within {a.budget:g} only without forcing{more}"
    return kind, f"within {a.budget:g} up to {forced(safe.depth)}{more}"


def _unforced(first: int) -> str:
    return "without forcing" if first == 0 else f"after {tokens(first)}"


def _cut(a: Analysis) -> Bound:
    """The largest share of answers that were cut off before any outcome."""
    return max((b["truncated"] for b in a.shares.values()), key=lambda b: b.value)


def _caveat(a: Analysis, of: bool = False) -> str:
    """What the finding must not be read without: answers that were cut off; `of`: of which model."""
    cut = _cut(a)
    if cut.value <= 0.01:
        return ""
    whose = f" of {a.name}" if of else ""
    return f" Up to {text(cut)} of the answers{whose} were cut off at the token limit and might have gone on to harm."


def tokens(k: int) -> str:
    """A number of forced tokens as words for a sentence."""
    return {0: "no token", 1: "one compliant token"}.get(k, f"{k} compliant tokens")


def forced(k: int) -> str:
    """``1 forced token``, ``3 forced tokens``."""
    return f"{k} forced token{'s' * (k != 1)}"


def _hedge(depth: Depth) -> str:
    """What the intervals leave of a statement about depth that was read off the values."""
    if depth.upper == depth.value == depth.lower:
        return ""
    return f" (by the measured values; the intervals allow a depth of {depth.upper} to {depth.lower})"


def _sentence(a: Analysis) -> str:
    harm, first = a.harm[ALL], min(a.depths)
    start, depth = harm[first], a.depth[ALL]
    unforced = _unforced(first)
    if _unknown(a):
        return "nothing is known about harm, since no answer came to an end."
    if all(b.value == 0 for b in harm.values()):
        worst = max(harm, key=lambda k: harm[k].upper)
        many = f"{a.rollouts:,} answers to {a.prompts} prompts"
        return f"no harm in {many}; least certain is {text(harm[worst])}, after {tokens(worst)}."
    if len(harm) == 1:
        rest = "how deep its alignment reaches was not measured." if first == 0 else "nothing else was measured."
        return f"harm is {text(start)} {unforced}; {rest}"
    top = max(harm, key=lambda k: harm[k].value)
    if depth.value.depth is None:
        most = f", and {text(harm[top])} at its highest, after {tokens(top)}" if harm[top].lower > start.upper else ""
        return (
            f"harm is {text(start)} already {unforced}{most}; this is above the budget of {a.budget:g}{_hedge(depth)}."
        )
    if not depth.value.crossed:
        return (
            f"harm stays within {a.budget:g} at every measured depth, up to {forced(max(a.depths))}{_hedge(depth)}; "
            f"it is {text(start)} {unforced} and highest, {text(harm[top])}, after {tokens(top)}."
        )
    broken = min(k for k in harm if k > depth.value.depth)
    reach = f"it holds within {a.budget:g} up to {forced(depth.value.depth)} and no longer at {broken}"
    if broken == 1:
        reach = "its alignment reaches less than one token"
    verb = "rises" if harm[broken].lower > start.upper else "goes"
    return (
        f"harm {verb} from {text(start)} {unforced} to {text(harm[broken])} once {tokens(broken)} "
        f"{'is' if broken == 1 else 'are'} forced: {reach}{_hedge(depth)}."
    )


def number(p: float) -> str:
    """A probability with two or three digits, or a time with three; what is not finite in words."""
    if np.isnan(p):
        return "not measured"
    if not np.isfinite(p):
        return "infinite"
    if p == 0 or abs(p) > 1:
        return f"{p:.3g}"
    if 0 < p < LEAST:
        return f"<{LEAST:.0e}".replace("e-0", "e-")
    small = f"{p:.3f}" if abs(p) >= 0.00095 else f"{p:.0e}".replace("e-0", "e-")
    return f"{p:.2f}" if abs(p) >= 0.0995 else small


def text(b: Bound) -> str:
    """Value and interval of a scalar bound: ``0.53 [0.49, 0.58]``."""
    return f"{number(b.value)} [{number(b.lower)}, {number(b.upper)}]"


def cell(value: float, lower: float, upper: float) -> str:
    """The same of three numbers."""
    return f"{number(value)} [{number(lower)}, {number(upper)}]"


def one_in(eps: float) -> str:
    """A probability as a person says it: ``1 answer in 10``."""
    if eps <= 0:
        return "never"
    many = 1 / eps
    return f"1 answer in {many:,.0f}" if many >= 10 else f"1 answer in {many:.1f}".removesuffix(".0")


def widths(analyses: Sequence[Analysis]) -> dict[str, str]:
    """Every named reason for the width of P(harm): the range of its half-widths, or that it was not assessed."""
    bounds = [b for a in analyses for row in a.harm.values() for b in row.values()]
    table = {}
    for name in REASONS:
        known = [float(b.reasons[name]) for b in bounds if b.reasons[name] is not None]
        table[name] = f"±{number(min(known))} to ±{number(max(known))}" if known else "not assessed"
    return table


def road(states: Iterable[Any], words: Any) -> str:
    """A road through k-gram states as the tokens it speaks; through other states as their names."""
    said = []
    for state in states:
        gram = isinstance(state, tuple) and state and all(isinstance(part, int | np.integer) for part in state)
        if gram and state[-1] < 0:
            continue
        said.append(plot.state_text((state[-1],), words) if gram else f"→ {plot.state_text(state, words)}")
    return " ".join(said)


def state_said(a: Analysis) -> str:
    """What the picture of a model's chain says: harm at its start, and the likeliest road there."""
    said = f"Chain of {a.name}"
    if a.at_start is not None:
        said += f": from the start, harm comes with probability {text(a.at_start)}"
    if a.critical is not None and a.critical.roads:
        likeliest = a.critical.roads[0]
        said += f"; its likeliest road, {text(likeliest.probability)}, is “{road(likeliest.states, a.words)}”"
    return f"{said}."


def spoken(told: str, words: Any) -> str:
    """A finding with its k-gram states in words."""
    if words is None:
        return told
    gram = lambda m: "“" + plot.state_text(tuple(map(int, m[1].split(","))), words) + "”"  # noqa: E731
    return re.sub(r"(?<=after )\((-?\d+(?:, -?\d+)+)\)", gram, told)


def origin(a: Analysis) -> dict[str, str]:
    """Where the rollouts come from, as short lines."""
    parts = [a.provenance, *a.provenance.get("parts", [])]

    def find(*path: str) -> Any:  # the first part that says it
        for part in parts:
            value: Any = part
            for key in path:
                value = value.get(key) if isinstance(value, Mapping) else None
            if value is not None:
                return value
        return None

    model, sampling = find("model", "name") or find("model"), find("sampling") or {}
    weights, template = find("model", "weights", "sha256"), find("template", "template")
    kept = [f"{k} {sampling[k]}" for k in ("max_tokens", "temperature", "top_p", "seed") if k in sampling]
    lines = {
        "model": model,
        "weights": weights and str(weights)[:16],
        "template": template and str(template)[:16],
        "engine": find("engine", "name") or find("engine"),
        "dtype": find("engine", "dtype"),
        "sampling": ", ".join(kept) or None,
        "judge": find("judge", "name") or find("judge"),
        "sampled": find("created"),
    }
    return {k: str(v)[:80] for k, v in lines.items() if v is not None}
