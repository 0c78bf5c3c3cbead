"""Where to spend the next rollouts: over prefill starts, over prompts, and until when.

A chain pools what it has seen of a state, wherever the rollout began. With n_s visits of state s the delta method gives

    Var h = sum over s of N_s^2 sigma_s^2 / n_s,    sigma_s^2 = Var_{P_s}(h),

N the expected visits from where h is asked for. Were every row free to sample, ``n_s`` proportional to ``N_s sigma_s``
would be best and leave ``(sum N sigma)^2 / n``; rollouts from the start visit in proportion to N and leave
``h (1 - h) / rollouts``. Starts that are forced k tokens deep lie between the two: which of them, and how often, is a
convex problem.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..bound import Bound, check_level, clopper_pearson, encode
from ..chains import Chain, Counts, estimate
from ..errors import InputError, UntrustedError
from .branch import correlation
from .cells import Cell, cell, tally_of
from .design_rows import Rows, of_chain, of_rollouts

__all__ = ["Allocation", "Enough", "allocate", "enough"]

ROUNDS = 500
LEAST = 0.01  # no plan relies on answers to one prompt being less alike than this


@dataclass(frozen=True, eq=False)
class Allocation:
    """How to spend a budget.

    Parameters
    ----------
    goal : str
        What is to be known: "P(harm)", "P(harm) after k tokens", or the largest of these.
    table : list of dict
        One row per start that gets a share: start (forced tokens k, or a state), prompts, per_prompt, rollouts, tokens.
        With ``starts="states"`` a rollout is a single token.
    expected : Bound
        The interval to expect if the pilot is right, clustered by prompt; shape () or, for the largest, (depths,).
    compared : dict of str to float
        Half-width to expect of this allocation ("optimal"), of others with the same budget ("start only": nothing
        forced but what is asked for; "uniform": as many rollouts from every start), and "every row": the limit if each
        state could be sampled by itself.
    budget : float
        Tokens.
    info : dict
        source, icc, tokens (mean length of a rollout by start), prompt_cost, notes.

    Examples
    --------
    >>> from markovsafety.exercises import case
    >>> plan: ms.evidence.Allocation = ms.evidence.allocate(case().rolls, 20_000, goal="worst")
    >>> {name: round(half, 4) for name, half in plan.compared.items()}
    {'optimal': 0.0163, 'start only': 0.0185, 'uniform': 0.0185}
    """

    goal: str
    table: list[dict[str, Any]]
    expected: Bound
    compared: dict[str, float]
    budget: float
    info: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        rows = [["start", "prompts", "rollouts each", "rollouts", "tokens"]]
        for r in self.table:
            rows.append([str(r["start"]), *(f"{r[x]:.0f}" for x in ("prompts", "per_prompt", "rollouts", "tokens"))])
        sizes = [max(len(row[j]) for row in rows) for j in range(len(rows[0]))]
        lines = [f"{self.budget:.0f} tokens for {self.goal}"]
        lines += ["  " + "  ".join(c.rjust(s) for c, s in zip(row, sizes)) for row in rows]
        lines.append(f"  to expect: {self.expected}")
        others = ", ".join(f"{name} {x:.3g}" for name, x in self.compared.items())
        return "\n".join([*lines, f"  half-widths: {others}", *(f"  {note}" for note in self.info["notes"])])

    __repr__ = __str__

    def to_json(self) -> dict[str, Any]:
        """Plain data: goal, table, expected, compared, budget, info."""
        names = ("goal", "table", "expected", "compared", "budget", "info")
        return {name: encode(getattr(self, name)) for name in names}


def allocate(
    pilot: Any,
    budget: float,
    *,
    goal: Any = "start",
    starts: str = "prefill",
    prompts: int | None = None,
    prompt_cost: float | None = None,
    level: float = 0.95,
) -> Allocation:
    """Allocate a budget of sampled tokens.

    Parameters
    ----------
    pilot : Rollouts, Counts or Chain
        Rollouts: every depth is measured by its own rollouts. Counts or a homogeneous Chain: all starts inform the
        chain's rows, so that forced starts can sharpen P(harm) of others; this relies on the chain (see `check`).
    budget : float
        Tokens to sample from now on.
    goal : "start", int or "worst"
        P(harm) with nothing forced; after k forced tokens; or at all measured depths, the widest as narrow as possible.
    starts : {"prefill", "states"}
        From where: the measured prefill depths, or (Chain) any state, one token at a time.
    prompts : int, optional
        Most prompts that there are; None: as many as are wanted.
    prompt_cost : float, optional
        Tokens that one more prompt costs. None: the mean length of the prompts, where rollouts record it, else 0.
    level : float

    Returns
    -------
    Allocation

    Raises
    ------
    InputError
        The budget is smaller than what the pilot has spent, a goal was not measured, or the chain is layered;
        ``partial`` is the Allocation where there is one.
    UntrustedError
        The pilot's chain knows no harm, or nothing but harm, so that all starts look alike; ``partial`` spends all on
        the goal itself.

    Notes
    -----
    J. Neyman, J. R. Stat. Soc. 97 (1934) 558, with costs; shares over starts by the multiplicative algorithm (S. D.
    Silvey, D. M. Titterington, B. Torsney, Comm. Statist. A 7 (1978) 1379). Rollouts per prompt:
    ``sqrt(prompt_cost / tokens * (1 - icc) / icc)`` (W. G. Cochran, Sampling Techniques (1977), 10.6), one if the
    correlation icc is unknown, more where prompts run out.

    Examples
    --------
    What is rare needs fewer answers for an interval of one width:

    >>> from markovsafety.exercises import case
    >>> ms.evidence.allocate(case().rolls, 50_000, goal="worst")
    50000 tokens for the largest P(harm) of all depths
      start  prompts  rollouts each  rollouts  tokens
          0      810              1       810     810
          1     4035              1      4035    4035
          2     8847              1      8847    8847
          3     8982              1      8982    8982
          4     9048              1      9048    9048
          6     9174              1      9174    9174
          8     9101              1      9101    9101
      to expect: the largest P(harm) of all depths: 7 values in [0.0125, 0.549]   95 % within
          [0.00594, 0.559] (expected, if the pilot is right)   because: sampling 0.01; judge,
          lumping, model, truncation, rounding not assessed
      half-widths: optimal 0.0103, start only 0.0117, uniform 0.0117
    """
    check_level(level)
    _check_asked(budget, starts, prompts, prompt_cost)
    pilot = estimate(pilot) if isinstance(pilot, Counts) else pilot
    rows = of_chain(pilot, goal, starts) if isinstance(pilot, Chain) else of_rollouts(pilot, goal, starts)
    cost = rows.prompt_cost if prompt_cost is None else float(prompt_cost)
    icc, notes = _icc(pilot), list(rows.notes)
    if np.isnan(icc):
        notes.append("how alike answers to one prompt are is not known: one rollout per prompt while there are prompts")
    icc = 1.0 if np.isnan(icc) else max(icc, LEAST)
    each = np.maximum(np.round(np.sqrt(cost / rows.tokens * (1 - icc) / icc)), 1.0) if starts == "prefill" else None
    blind = not rows.weight.any()
    share = np.asarray(rows.own / rows.own.sum())
    for _ in range(4 if prompts else 1):
        made = _Plan(rows, budget, cost, icc, each, prompts)
        share = share if blind else _best(made.unit, rows.weight, share)
        if each is not None and prompts is not None:
            each = np.maximum(each, made.rollouts(share) / prompts)
    made = _Plan(rows, budget, cost, icc, each, prompts)
    share = share if blind or len(rows.value) == 1 else made.narrowed(share, level)
    compared = {"optimal": made.half(share, level), "start only": made.half(rows.own / rows.own.sum(), level)}
    compared["uniform"] = made.half(made.price / made.price.sum(), level)
    if rows.ideal is not None:
        compared["every row"] = made.half_of(rows.ideal / budget, level)
    told = {"source": rows.source, "icc": icc, "tokens": rows.tokens, "prompt_cost": cost, "notes": tuple(notes)}
    found = Allocation(rows.goal, made.table(share), made.expected(share, level), compared, float(budget), told)
    if blind:
        raise UntrustedError(
            "The pilot's chain knows no harm, or nothing but harm.",
            cause="No transition changes what it predicts, so no start is better than another.",
            next="Sample more of the goal itself, as error.partial does, or from deeper prefills until harm is seen.",
            partial=found,
        )
    if budget < rows.spent:
        raise InputError(
            f"The budget of {budget:g} tokens is smaller than the {rows.spent:g} of the pilot.",
            cause="A pilot is there to plan something larger; with so little more, its own numbers hardly change.",
            next="Count the pilot's rollouts as the result, or raise the budget; error.partial has the allocation.",
            partial=found,
        )
    return found


def _check_asked(budget: Any, starts: Any, prompts: Any, prompt_cost: Any) -> None:
    number = lambda x, least: isinstance(x, (int, float, np.number)) and np.isfinite(x) and x >= least  # noqa: E731
    if not number(budget, 1) or (prompt_cost is not None and not number(prompt_cost, 0)):
        raise InputError(
            f"budget is {budget!r}, prompt_cost {prompt_cost!r}.",
            cause="Both count tokens.",
            next="Pass finite numbers, the budget at least 1.",
        )
    if starts not in ("prefill", "states") or (prompts is not None and not number(prompts, 1)):
        raise InputError(
            f"starts is {starts!r}, prompts {prompts!r}.",
            cause='Starts are "prefill" or "states"; prompts are counted.',
            next='Pass starts="prefill", prompts=100.',
        )


def _icc(pilot: Any) -> float:
    """Correlation of two answers to one prompt: at the smallest depth that shows it; 0 for a chain that was given."""
    if isinstance(pilot, Chain) and pilot.evidence is None:
        return 0.0
    tally = tally_of(pilot)
    for k in np.unique(tally.prefill).tolist():
        c = cell(tally, k)
        n, x = c.totals[c.totals >= 2], c.events[c.totals >= 2]
        if len(n) > 1:
            found = correlation(n, {1: x, 2: x * np.maximum(x - 1, 0) / (n - 1)}, 0.95)[0].value
            if np.isfinite(found):
                return float(found)
    return float("nan")


@dataclass(frozen=True)
class _Plan:
    """What shares of the budget come to."""

    rows: Rows
    budget: float
    cost: float
    icc: float
    each: NDArray | None
    most: int | None

    @property
    def price(self) -> NDArray:
        """Tokens of one rollout from every start, its share of the prompt included."""
        return self.rows.tokens + (0.0 if self.each is None else self.cost / self.each)

    @property
    def unit(self) -> NDArray:
        """Independent visits of every row per share of the budget, shape (starts, rows)."""
        deff = 1.0 if self.each is None else 1 + (self.each - 1) * self.icc
        return self.budget * self.rows.visits / (self.price * deff)[:, None]

    def rollouts(self, share: NDArray) -> NDArray:
        return share * self.budget / self.price

    def variance(self, share: NDArray) -> NDArray:
        """Of every goal, shape (goals,)."""
        return _variances(self.unit, self.rows.weight, share)

    def half_of(self, variance: Any, level: float, prompts: float = 1e9) -> float:
        b = _interval(self.rows.value, np.asarray(variance), prompts, level)
        return float(np.max((np.asarray(b[1]) - b[0]) / 2))

    def half(self, share: NDArray, level: float) -> float:
        return self.half_of(self.variance(share), level, self.prompts(share))

    def narrowed(self, share: NDArray, level: float) -> NDArray:
        """The best on the ways from `share` to what it is compared with, itself included, by the widest interval: that
        of rare harm from few rollouts is wider than its variance says."""
        others = (self.rows.own / self.rows.own.sum(), self.price / self.price.sum())
        ways = [(1 - t) * share + t * other for other in others for t in np.linspace(0, 1, 21)]
        return min(ways, key=lambda way: self.half(way, level))

    def prompts(self, share: NDArray) -> float:
        return 1e9 if self.each is None else float(np.max(self.rollouts(share) / self.each))

    def expected(self, share: NDArray, level: float) -> Bound:
        low, high = _interval(self.rows.value, self.variance(share), self.prompts(share), level)
        value = self.rows.value if len(self.rows.value) > 1 else self.rows.value[0]
        low, high = (x if len(self.rows.value) > 1 else x[0] for x in (low, high))
        info = {"name": self.rows.goal, "note": "expected, if the pilot is right"}
        return Bound(value, low, high, level, {"sampling": (high - low) / 2}, None, info)

    def table(self, share: NDArray) -> list[dict[str, Any]]:
        made = []
        for i, start in enumerate(self.rows.starts):
            n = self.rollouts(share)[i]
            each = 1.0 if self.each is None else float(np.ceil(self.each[i] - 1e-9))
            K = float(max(np.floor(n / each), 1.0)) if n >= 0.5 else 0.0
            if K > 0:
                made.append({"start": start, "prompts": K, "per_prompt": each, "rollouts": K * each})
                price = K * each * self.rows.tokens[i] + (0.0 if self.each is None else K * self.cost)
                made[-1]["tokens"] = float(price)
        return made


def _interval(value: NDArray, variance: NDArray, prompts: float, level: float) -> tuple[NDArray, NDArray]:
    """Clopper-Pearson at the size that gives this variance, with Student's quantile over prompts; one trial per prompt
    where no variance can be seen."""
    from scipy.special import stdtrit

    tail = (1 + level) / 2
    ratio = stdtrit(1e9, tail) / stdtrit(max(prompts - 1, 1.0), tail)
    p = np.clip(value, 0.0, 1.0)
    seen = (variance > 0) & (p > 0) & (p < 1)
    size = np.where(seen, p * (1 - p) / np.where(variance > 0, variance, 1.0) * ratio**2, min(prompts, 1e9))
    low, high = clopper_pearson(p * size, size, level)
    return np.minimum(low, value), np.maximum(high, value)


def _variances(unit: NDArray, weight: NDArray, share: NDArray) -> NDArray:
    seen = share @ unit
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(weight > 0, weight / seen, 0.0).sum(axis=1)


def _best(unit: NDArray, weight: NDArray, own: NDArray) -> NDArray[np.float64]:
    """Shares that minimise the largest variance over the goals; the best met on the way, those of `own` included."""
    share, mix = np.full(len(unit), 1 / len(unit)), np.full(len(weight), 1 / len(weight))
    best, least = own, float(_variances(unit, weight, own).max())
    for _ in range(ROUNDS):
        each = _variances(unit, weight, share)
        if (top := float(each.max())) < least * (1 - 1e-12):
            best, least = share, top
        mix = mix * np.sqrt(each / each.max())
        mix = mix / mix.sum()
        seen = share @ unit
        a = mix @ weight
        gain = unit @ np.where(a > 0, a / np.where(seen > 0, seen, 1.0) ** 2, 0.0)
        share = share * np.sqrt(gain)
        share = share / share.sum()
    return best


@dataclass(frozen=True, eq=False)
class Enough:
    """Whether to stop.

    Parameters
    ----------
    done : bool
    bound : Bound
        P(harm); its level holds at whichever of the planned looks sampling stops.
    more : float
        Rollouts still missing, by the square-root law; 0 if done.
    look, looks : int

    Examples
    --------
    >>> from markovsafety.exercises import case
    >>> found: ms.evidence.Enough = ms.evidence.enough(case().rolls, half_width=0.01)
    >>> found.done, round(found.more)
    (False, 1374)
    """

    done: bool
    bound: Bound
    more: float
    look: int
    looks: int

    def __str__(self) -> str:
        end = "precise enough: stop" if self.done else f"go on: about {self.more:.0f} rollouts are missing"
        return f"{self.bound}\n  look {self.look} of {self.looks}: {end}"

    __repr__ = __str__


def enough(
    source: Any, half_width: float, *, prefill: int = 0, look: int = 1, looks: int = 5, level: float = 0.95
) -> Enough:
    """Whether P(harm) is known well enough to stop sampling, at an honest level.

    Parameters
    ----------
    source : Rollouts, Counts, Chain or Tally
        All rollouts so far.
    half_width : float
        Wanted.
    prefill : int
        Forced tokens.
    look, looks : int
        Which look this is, and how many are planned; the plan may not change later.
    level : float

    Returns
    -------
    Enough

    Raises
    ------
    InputError
        No rollouts at that depth, or numbers out of range.
    UntrustedError
        More looks than planned; ``partial`` is the Enough at the planned level.

    Notes
    -----
    Who stops as soon as a 95 % interval is narrow stops where the estimate happens to be small. With p = 0.05, a look
    every 10 rollouts and a half-width of 0.02 this covers 38 % by Wald's interval, 94 % by the exact one, which covers
    96 % at a fixed size. Here every look spends ``(1 - level) / looks`` (Bonferroni over the looks), so that all the
    intervals hold together with probability `level`, however one decides to stop between them: conservative, and free
    of assumptions about how prompts differ.

    Examples
    --------
    Three looks were planned; the first was at the answers to half of the prompts:

    >>> from markovsafety.exercises import case
    >>> rolls = case().rolls
    >>> ms.evidence.enough(rolls[rolls.prompt_id < 30], half_width=0.02, look=1, looks=3)
    P(harm) = 0.0104   95 % [7e-05, 0.0717]
        because: sampling 0.036; judge, lumping, model, truncation, rounding not assessed
      look 1 of 3: go on: about 1059 rollouts are missing
    >>> ms.evidence.enough(rolls, half_width=0.02, look=2, looks=3)
    P(harm) = 0.0125   95 % [0.00343, 0.0314]
        because: sampling 0.014; judge, lumping, model, truncation, rounding not assessed
      look 2 of 3: precise enough: stop
    """
    check_level(level)
    whole = all(isinstance(x, (int, np.integer)) and not isinstance(x, bool) and x >= 1 for x in (look, looks))
    if not whole or not isinstance(half_width, (int, float, np.number)) or not 0 < half_width < 1:
        raise InputError(
            f"half_width is {half_width!r}, look {look!r} of {looks!r}.",
            cause="A half-width of a probability lies between 0 and 1, looks are counted from 1.",
            next="Pass e.g. half_width=0.02, look=1, looks=5.",
        )
    c: Cell = cell(tally_of(source), prefill)
    if not len(c.totals):
        raise InputError(
            f"No rollout has {prefill} forced tokens.",
            cause="Nothing was measured there.",
            next="Sample that depth, or ask about another.",
        )
    b = c.bound(1 - (1 - level) / looks, name="P(harm)")
    half = (b.upper - b.lower) / 2
    done = bool(half <= half_width)
    more = 0.0 if done else float(np.ceil(c.totals.sum() * ((half / half_width) ** 2 - 1)))
    found = Enough(done, replace(b, level=level), more, int(look), int(looks))
    if look > looks:
        raise UntrustedError(
            f"This is look {look} of {looks} planned ones.",
            cause="The error rate is spent: a further look would make the interval hold less often than it says.",
            next="Report the interval of the last planned look, or start a new measurement with more looks.",
            partial=found,
        )
    return found
