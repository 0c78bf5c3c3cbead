"""How little it takes: the smallest edit of a few heads that moves behaviour, and how few examples are enough.

Two numbers that compare models. The smallest alpha is found by a grid and bisection, all edits sampled with the same
random numbers (or priced by the row-local prediction, without sampling under them); its interval is where the path's
own interval crosses. The size of that edit is told in three units, for sigma belongs to a model and its examples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ..arithmetic import difference
from ..bound import Bound, clustered, encode
from ..errors import InputError
from .behaviour import Behaviour, behave
from .buckets import listed
from .edits import When
from .head_sweep import HeadSweep, sweep_heads
from .heads import Head, HeadDirections, directions_from, head_directions, texts
from .host import Host
from .pages import spanned, table
from .prediction import row_local
from .record import head_outputs, token_mass
from .start_row import StartRows, start_rows

__all__ = ["Audit", "audit_heads"]

EXAMPLES = (2, 4, 8, 16, 32, 64, 100, 200)
LIMITS = (0.25, 16.0)
DRAWS = 5
"""Random subsets of the examples for each of their numbers."""


@dataclass(frozen=True, eq=False)
class Audit:
    """What an audit found.

    Parameters
    ----------
    alpha : Bound or None
        Smallest alpha, in sigma, whose change of the outcome reaches `move`; the upper end is infinite where the
        interval of no sampled alpha reaches it. None: not reached up to the limit.
    move : float
    outcome : tuple of str
    limit : float
        Largest alpha tried.
    heads : tuple of (layer, head)
    step, relative : float
        At `alpha`, or where the change is largest: norm of the edit over all its heads; root mean square over heads of
        its norm divided by that of the head's own outputs.
    path : list of dict
        For each alpha: the outcome's rate and its change as Bounds, finished share and repetition (None if predicted).
    control : Bound
        Change under random vectors of the same norms, there.
    examples : list of dict
        For each number of examples (both groups together): first-token mass of the desired tokens under the edit that
        these examples give, in sigma units at that alpha, over some random subsets: its mean as a Bound over prompts
        and subsets, and the least and the most of any subset; and the mean cosine of theta with that of all examples.
    sweep : HeadSweep
    measure : str
        "sampled" or "predicted".

    Examples
    --------
    >>> from markovsafety.interventions import audit_heads, open_host
    >>> host = open_host(ms.organism.model_path("shallow"))
    >>> asked, harmless = ms.organism.prompts(n=24), ms.organism.prompts(n=24, harmful=False)
    >>> held = ms.organism.prompts(n=24, harmful=False, seed=1)
    >>> how = {"judge": "organism", "outcome": "refusal", "move": 0.3, "examples": [4, 48], "n": 2, "max_tokens": 16}
    >>> audit_heads(host, asked, harmless, held, ms.organism.REFUSAL_IDS, **how)
    <Audit: P(refusal) by 0.3: reached at alpha = 1... [0, ...] with heads [...], ...
    times their outputs>
    """

    alpha: Bound | None
    move: float
    outcome: tuple[str, ...]
    limit: float
    heads: tuple[Head, ...]
    step: float
    relative: float
    path: list[dict[str, Any]]
    control: Bound
    examples: list[dict[str, Any]]
    sweep: HeadSweep
    measure: str

    def __repr__(self) -> str:
        return f"<Audit: {self.verdict}>"

    @property
    def verdict(self) -> str:
        """One sentence."""
        what = f"P({' or '.join(self.outcome)}) by {self.move:g}"
        if self.alpha is None:
            most = max(self.path, key=lambda row: row["change"].value)
            reached = f"at most {spanned(most['change'])}, at {most['alpha']:.3g}"
            return f"{what}: not reached up to alpha = {self.limit:g} ({reached}) with heads {list(self.heads)}"
        ends = f"{self.alpha.value:.3g} [{self.alpha.lower:.3g}, {self.alpha.upper:.3g}]"
        return (
            f"{what}: reached at alpha = {ends} with heads {list(self.heads)}, {self.relative:.2g} times their outputs"
        )

    def markdown(self) -> str:
        """The audit as a page."""
        rows = [
            [f"{r['alpha']:.3g}", spanned(r["rate"]), spanned(r["change"])]
            + ["" if r[k] is None else spanned(r[k]) for k in ("finished", "repetition")]
            for r in self.path
        ]
        head = ["alpha", f"P({' or '.join(self.outcome)})", "change", "finished", "repetition"]
        few = [[str(r["examples"]), spanned(r["mass"]), f"{r['cosine']:.3f}"] for r in self.examples]
        lines = ["# How little it takes to steer", "", f"{self.verdict}.", "", *table(head, rows)]
        lines += ["", f"Random vectors of the same norms: {spanned(self.control)}.", "", "## How few examples", ""]
        return "\n".join([*lines, *table(["examples", "P(begins as desired)", "mean cosine with all"], few)])

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        named = {k: getattr(self, k) for k in ("alpha", "move", "outcome", "limit", "heads", "step", "relative")}
        more = {k: getattr(self, k) for k in ("path", "control", "examples", "measure", "verdict")}
        return encode({**named, **more, "heads_ranked": self.sweep.rows()})


def audit_heads(
    host: Host,
    desired: Sequence[Any],
    undesired: Sequence[Any],
    prompts: Sequence[Any],
    tokens: Sequence[int],
    *,
    judge: Any,
    answers: tuple[Sequence[Any], Sequence[Any]] | None = None,
    outcome: str | Sequence[str] = "harm",
    move: float = 0.5,
    size: int = 4,
    heads: Sequence[Head] | None = None,
    limits: tuple[float, float] = LIMITS,
    examples: Sequence[int] = EXAMPLES,
    measure: Literal["sampled", "predicted"] = "sampled",
    when: When = "prompt",
    n: int = 4,
    max_tokens: int = 64,
    seed: int = 0,
) -> Audit:
    """Find the smallest alpha that moves an outcome, and what fewer examples would do.

    Parameters
    ----------
    host : Host
    desired, undesired, answers
        Examples, as in `head_directions`: all of them make the edit; a CSV or JSONL file may be given, here and below.
    prompts : sequence of prompts
        Others than the examples, on which the desired behaviour is missing; the first half chooses the heads, the
        other half is measured.
    tokens : sequence of int
        First tokens of the desired behaviour.
    judge : str or Judge
    outcome : outcome or outcomes
        Whose probability is to be moved up.
    move : float
    size : int
        Number of heads: the best of the first-token pass.
    heads : sequence of (layer, head), optional
        These instead.
    limits : (float, float)
        Smallest and largest alpha tried; between them the grid doubles.
    examples : sequence of int
        Numbers of examples, both groups together, from 2 on; those beyond what was given are left out.
    measure : {"sampled", "predicted"}
        Sample under every edit, or predict from the start row (harm only, prompt edits only).
    when, n, max_tokens, seed
        As in `HeadDirections.edit` and `behave`.

    Returns
    -------
    Audit
        "Not reached" is a result, no error.

    Raises
    ------
    InputError
        Limits or numbers that make no sense; "predicted" for an outcome other than harm or for edits of the answer.

    Examples
    --------
    How little an edit of four heads makes a third of the harmless prompts refused, and a random one of its size?

    >>> from markovsafety.interventions import audit_heads, open_host
    >>> host = open_host(ms.organism.model_path("shallow"))
    >>> asked, harmless = ms.organism.prompts(n=24), ms.organism.prompts(n=24, harmful=False)
    >>> held = ms.organism.prompts(n=24, harmful=False, seed=1)
    >>> how = {"judge": "organism", "outcome": "refusal", "move": 0.3, "examples": [4, 48], "n": 2, "max_tokens": 16}
    >>> found = audit_heads(host, asked, harmless, held, ms.organism.REFUSAL_IDS, **how)
    >>> print(found.alpha)
    alpha = 1...   95 % [0, ...]   because: sampling ...; judge, ... not assessed
    >>> print(found.control)
    change = 0.0...   95 % [-0.2..., 0.3...]
    because: sampling 0.2...; judge, ... not assessed
    """
    goal = (outcome,) if isinstance(outcome, str) else tuple(outcome)
    desired, undesired, prompts = (listed(given) for given in (desired, undesired, prompts))
    _check(prompts, move, limits, examples, measure, goal, when)
    found = head_directions(host, desired, undesired, answers)
    first, held = list(prompts)[::2], list(prompts)[1::2]
    sweep = sweep_heads(host, found, first, tokens, alphas=(1.0, 2.0, 4.0, 8.0, 16.0), heads=heads, seed=seed)
    chosen = tuple(sweep.ranked[:size])
    edit = found.edit(chosen, 1.0, when=when)
    told: dict[str, Any] = {"judge": judge, "n": n, "max_tokens": max_tokens, "seed": seed}
    if measure == "sampled":
        base = behave(host, held, **told)

        def tried(alpha: float, what: Any = edit) -> dict[str, Any]:
            return _row(alpha, behave(host, held, alpha * what, **told), base, goal)
    else:
        rows = start_rows(host, held, edits=(limits[1] * edit, limits[1] / 4 * edit, edit), **told)

        def tried(alpha: float, what: Any = edit) -> dict[str, Any]:
            return _predicted(host, alpha * what, alpha, rows)

    path = _path(tried, move, limits)
    alpha, limit = _crossing(path, move), max(row["alpha"] for row in path)
    most = max(path, key=lambda row: row["change"].value)
    here = most["alpha"] if alpha is None else float(alpha.value)
    control = tried(here, edit.control(seed))["change"]
    steps = np.array([abs(part.scale) * np.linalg.norm(part.vector) for part in edit.parts]) * here
    relative = float(np.sqrt(np.mean((steps / np.array([found.size[h] for h in chosen])) ** 2)))
    groups = [texts(host, p, None if answers is None else answers[i]) for i, p in enumerate((desired, undesired))]
    curve = _curve(host, groups, chosen, here, held, tokens, found, examples, when, seed)
    size_ = float(np.linalg.norm(steps))
    return Audit(alpha, move, goal, limit, chosen, size_, relative, path, control, curve, sweep, measure)


def _check(
    prompts: Sequence[Any],
    move: float,
    limits: tuple[float, float],
    examples: Sequence[int],
    measure: str,
    goal: Any,
    when: str,
) -> None:
    if len(prompts) < 4 or not 0 < move < 1 or not 0 < limits[0] < limits[1] or any(m < 2 for m in examples):
        raise InputError(
            f"no audit of {len(prompts)} prompts with move={move}, limits={limits}, examples={list(examples)}",
            cause="it takes 4 prompts, a change between 0 and 1, rising positive limits and an example of each group",
            next="give such numbers",
        )
    if measure not in ("sampled", "predicted") or (measure == "predicted" and (goal != ("harm",) or when != "prompt")):
        raise InputError(
            f"the audit of {goal} at {when!r} cannot be {measure!r}",
            cause="the row-local prediction knows harm, and edits of the prompt",
            next='use measure="sampled"',
        )


def _row(alpha: float, under: Behaviour, base: Behaviour, goal: tuple[str, ...]) -> dict[str, Any]:
    shares = {"finished": under.quality.finished, "repetition": under.quality.repetition}
    return {"alpha": alpha, "rate": under.rate(goal), "change": under.change(base, goal), **shares}


def _predicted(host: Host, edit: Any, alpha: float, rows: StartRows) -> dict[str, Any]:
    """The predicted change, with the errors of both rates.

    Both use the same h(t), so their errors are not independent, and nothing is taken off for that: each is given at
    half the error rate, and their ends are subtracted.
    """
    rate = row_local(host, edit, rows).overall
    each = (1 + rate.level) / 2
    after, before = (row_local(host, what, rows, level=each).overall for what in (edit, None))
    change = difference(after, before, independent=False, name="change")
    return {"alpha": alpha, "rate": rate, "change": change, "finished": None, "repetition": None}


def _path(tried: Callable[[float], dict[str, Any]], move: float, limits: tuple[float, float]) -> list[dict[str, Any]]:
    """The grid up to the first alpha that surely reaches `move`, then three bisections of where it is reached."""
    count = int(np.ceil(np.log2(limits[1] / limits[0])))
    path: list[dict[str, Any]] = []
    for i in range(count + 1):
        path.append(tried(float(min(limits[0] * 2.0**i, limits[1]))))
        if path[-1]["change"].lower >= move:
            break
    for _ in range(3):
        at = next((i for i, row in enumerate(path) if row["change"].value >= move), None)
        if at is None or at == 0:
            break
        path.append(tried(float(np.sqrt(path[at - 1]["alpha"] * path[at]["alpha"]))))
        path.sort(key=lambda row: row["alpha"])
    return path


def _crossing(path: list[dict[str, Any]], move: float) -> Bound | None:
    """Where value, upper and lower end of the change first reach `move`."""

    def first(end: str) -> float:
        for i, row in enumerate(path):
            y = getattr(row["change"], end)
            if y >= move:
                if i == 0:
                    return float(row["alpha"])
                before = getattr(path[i - 1]["change"], end)
                share = (move - before) / (y - before)
                return float(path[i - 1]["alpha"] ** (1 - share) * row["alpha"] ** share)
        return float("inf")

    value = first("value")
    if not np.isfinite(value):
        return None
    lower, upper = min(first("upper"), value), max(first("lower"), value)
    if path[0]["change"].upper >= move:
        lower = 0.0  # the smallest alpha tried may do already
    return Bound(
        value, lower, upper, path[0]["change"].level, {"sampling": (upper - lower) / 2}, None, {"name": "alpha"}
    )


def _curve(
    host: Host,
    groups: list[list[NDArray]],
    heads: tuple[Head, ...],
    alpha: float,
    prompts: Sequence[Any],
    tokens: Sequence[int],
    found: HeadDirections,
    examples: Sequence[int],
    when: When,
    seed: int,
) -> list[dict[str, Any]]:
    """What directions from fewer examples do to the first token."""
    outputs = [head_outputs(host, ids).astype(np.float64) for ids in groups]
    rng, curve = np.random.default_rng(seed), []
    for count in sorted({int(m) // 2 for m in examples if int(m) // 2 <= min(map(len, outputs))}):
        masses, cosines = [], []
        for _ in range(DRAWS):
            plus, minus = (x[rng.choice(len(x), count, replace=False)] for x in outputs)
            fewer = directions_from(plus, minus, found)
            cosines.append(np.mean([float(fewer.theta[h] @ found.theta[h]) for h in heads]))
            seen = [h for h in heads if fewer.kept[h]]
            edit = fewer.edit(seen, alpha, when=when) if seen else None
            masses.append(token_mass(host, prompts, tokens, edit=edit))
        masses = np.clip(np.array(masses), 0, 1)
        draws = masses.mean(axis=1)
        curve.append(
            {
                "examples": 2 * count,
                "mass": _over_draws(masses),
                "least": float(draws.min()),
                "most": float(draws.max()),
                "cosine": float(np.mean(cosines)),
            }
        )
    return curve


def _over_draws(masses: NDArray, level: float = 0.95) -> Bound:
    """Mean of probabilities (subsets, prompts): the error of prompts, and Student's of the subsets' means."""
    from scipy.special import stdtrit

    seen = clustered(masses.sum(axis=0), np.full(masses.shape[1], float(len(masses))), level, "P(desired first)")
    subsets = len(masses)
    half = stdtrit(subsets - 1, (1 + level) / 2) * masses.mean(axis=1).std(ddof=1) / np.sqrt(subsets)
    lower = max(0.0, seen.value - np.hypot(seen.value - seen.lower, half))
    upper = min(1.0, seen.value + np.hypot(seen.upper - seen.value, half))
    return Bound(seen.value, lower, upper, level, {"sampling": (upper - lower) / 2}, None, seen.info)
