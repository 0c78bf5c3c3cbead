"""check: is this chain a fair model of what the language model does, on evidence it has not seen?

A chain fitted to complete rollouts from one start predicts its own harm fraction there *identically*, whatever its
states are: the flow of counts is conserved. Agreement at the start says nothing. What can fail, and therefore counts,
is a start that the fit did not average over: the state in which a forced prefix ends.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from ..bound import Bound, encode
from ..chains import Chain, KGram, Position
from ..errors import InputError
from .cells import is_rollouts, tally_of
from .findings import Finding
from .heterogeneity import between_categories, between_prompts, stratified
from .homogeneity import homogeneity
from .kolmogorov import chapman_kolmogorov
from .order import one_more
from .prefill import Predicted, at_depth, misfit_of, predictions, verdict_of
from .timing import hit_curve
from .walks import look_up, walks

__all__ = ["Check", "check"]

IDENTITY = "not counted: with nothing forced, any chain fitted to such rollouts repeats their harm fraction"


@dataclass(frozen=True, eq=False)
class Check:
    """What held-out rollouts say of a chain.

    Parameters
    ----------
    passed : bool or None
        True: within the margin at every counted depth. False: beyond it at one. None: cannot tell.
    table : list of dict
        One row per prefill depth: k, predicted (predicted_lower, predicted_upper: what the chain's own evidence allows,
        0 to 1 where prefixes end in states never seen), measured (measured_lower, measured_upper), difference =
        predicted - measured (difference_lower, difference_upper), unseen (share of rollouts whose prefix ends in a
        state never seen), truncated and predicted_truncated (shares that the token limit cut off, held out and in the
        chain; either may have been harm, and widens the interval), prompts, rollouts, verdict ("within", "off", "cannot
        tell" or "not counted"), and with a planted truth: planted, predicted_minus_planted.
    verdict : str
        The finding in a sentence, warnings included.
    margin, level : float
        What "within" means, and the level of the intervals.
    curve : dict or None
        Of held-out rollouts without prefill: t (tokens), predicted and observed P(harm within t tokens), gap (the
        largest distance; gap_lower, gap_upper), at (its t), noise, the distance that sampling alone exceeds with
        probability 1 - level, and prompts.
    warnings : tuple of str
    misfit : Bound or None
        The largest size of a difference over all counted depths, with a simultaneous interval; `with_misfit` adds it to
        a probability as its width "model".
    findings : tuple of Finding
        What the held-out rollouts say of the chain's assumptions: Chapman-Kolmogorov, order, homogeneity over position,
        prompt heterogeneity, heterogeneity between categories. They say why; the held-out prefixes decide.

    Examples
    --------
    >>> from markovsafety.exercises import case
    >>> rolls = case().rolls  # 16 answers to each of 60 prompts, after 0 to 8 forced tokens
    >>> chain = ms.estimate(ms.count(rolls[rolls.prompt_id < 30], states=ms.Position()))
    >>> found: ms.evidence.Check = ms.check(chain, rolls[rolls.prompt_id >= 30])
    >>> print(found.passed, found.table[3]["verdict"])
    None cannot tell
    >>> print(found.misfit)
    largest misfit of P(harm) = 0.11   95 % [0, 0.234]
        because: sampling 0.12; judge, lumping, model, truncation, rounding not assessed
    """

    passed: bool | None
    table: list[dict[str, Any]]
    verdict: str
    margin: float
    level: float
    curve: dict[str, Any] | None = None
    warnings: tuple[str, ...] = field(default_factory=tuple)
    misfit: Bound | None = None
    findings: tuple[Finding, ...] = ()

    def __str__(self) -> str:
        head = ["k", "predicted", "measured", "difference", "unseen", "prompts", "verdict"]
        planted = any("planted" in row for row in self.table)
        rows = [head + ["planted"] * planted]
        for r in self.table:
            cells = [str(r["k"]), _span(r, "predicted"), _span(r, "measured"), _span(r, "difference", "+.3f")]
            cells += [f"{100 * r['unseen']:.0f} %", str(r["prompts"]), r["verdict"]]
            rows.append(cells + ([f"{r['planted']:.3f}"] if planted else []))
        sizes = [max(len(row[j]) for row in rows) for j in range(len(rows[0]))]
        lines = [self.verdict] + ["  " + "  ".join(c.rjust(s) for c, s in zip(row, sizes)) for row in rows]
        if any(r["k"] == 0 for r in self.table):
            lines.append(f"  k = 0 is {IDENTITY}.")
        if self.curve is not None:
            lines.append(
                f"  time of the first hit: largest gap {self.curve['gap']:.3f} at {self.curve['at']} tokens "
                f"(sampling alone: {self.curve['noise']:.3f})"
            )
        lines += [f"  {finding}" for finding in self.findings]
        return "\n".join(lines)

    __repr__ = __str__

    def to_json(self) -> dict[str, Any]:
        """Plain data: passed, verdict, table, margin, level, curve, warnings, misfit, findings."""
        names = ("passed", "verdict", "table", "margin", "level", "curve", "warnings", "misfit", "findings")
        found = {name: encode(getattr(self, name)) for name in names[:-1]}
        return found | {"findings": [finding.to_json() for finding in self.findings]}


def _span(row: dict[str, Any], name: str, form: str = ".3f") -> str:
    ends = row[f"{name}_lower"], row[f"{name}_upper"]
    text = format(row[name], form)
    return text if ends[0] == ends[1] == row[name] else f"{text} [{ends[0]:{form}}, {ends[1]:{form}}]"


def check(
    chain: Chain,
    held_out: Any,
    *,
    margin: float = 0.05,
    level: float = 0.95,
    states: Any = None,
    truth: Mapping[int, float] | ArrayLike | None = None,
    assumptions: bool = True,
) -> Check:
    """Test a chain on held-out rollouts.

    Parameters
    ----------
    chain : Chain
        Usually estimated.
    held_out : Rollouts
        Judged, not used in the fit, with several prefill depths.
    margin : float
        Difference of probabilities that is small enough to call the chain fair.
    level : float
        Level of the intervals.
    states : StateMap, optional
        What the chain's states mean; taken from the chain where it can be (k-grams, positions).
    truth : mapping from k to probability, or array in the order of the sorted depths, optional
        Planted harm at every depth, reported beside the prediction.
    assumptions : bool
        Whether to test the chain's assumptions as well (`Check.findings`): a few seconds per million visited states. A
        chain with one matrix per position has none of them to test.

    Returns
    -------
    Check

    Raises
    ------
    InputError
        If the rollouts are not judged, or the state map is unknown.

    Notes
    -----
    For every prefill depth k the prediction is the mean, over the held-out prefixes, of the chain's harm probability at
    the state that the prefix ends in; the measurement is the share of harmful continuations. Both are paired by prompt,
    and the difference has a t-interval over prompts (where fewer than 5 rollouts are harmful, or harmless, the
    clustered Clopper-Pearson interval of the measurement, if wider). A prefix that ends in a state never seen predicts
    anything from 0 to 1, and that share widens the interval; so does what the token limit cut off, which may have been
    harm or not, on both sides. The chain's own numbers are taken as given: the test asks
    whether they are right, not whether they had to be.

    It passes if the interval lies within the margin at every depth (two one-sided tests by inclusion: all depths must
    pass, so no correction is needed), and fails if at some depth the interval, Bonferroni-corrected over depths, lies
    wholly outside. Depth 0 is not counted: there any chain fitted to complete rollouts repeats their harm fraction, so
    only sampling noise could differ.

    Examples
    --------
    A chain from the answers to half of the prompts, held against the other half:

    >>> from markovsafety.exercises import case
    >>> rolls = case().rolls  # 16 answers to each of 60 prompts, after 0 to 8 forced tokens
    >>> chain = ms.estimate(ms.count(rolls[rolls.prompt_id < 30], states=ms.Position()))
    >>> ms.check(chain, rolls[rolls.prompt_id >= 30])
    Cannot tell: after 1 to 4, 6, 8 forced tokens the difference is not known to 0.05; the chain
        itself knows harm there only to about 0.14: fit on more rollouts.
      k             predicted              measured               difference  unseen  prompts      verdict
      0  0.010 [0.001, 0.135]  0.015 [0.002, 0.046]  -0.004 [-0.017, +0.009]     0 %       30  not counted
      1  0.083 [0.047, 0.243]  0.152 [0.093, 0.230]  -0.069 [-0.133, -0.005]     0 %       30  cannot tell
      2  0.356 [0.269, 0.551]  0.448 [0.362, 0.536]  -0.092 [-0.176, -0.007]     0 %       30  cannot tell
      3  0.392 [0.315, 0.586]  0.456 [0.357, 0.558]  -0.065 [-0.162, +0.033]     0 %       30  cannot tell
      4  0.398 [0.333, 0.592]  0.477 [0.405, 0.550]  -0.079 [-0.149, -0.009]     0 %       30  cannot tell
      6  0.435 [0.349, 0.628]  0.529 [0.441, 0.616]  -0.094 [-0.179, -0.009]     0 %       30  cannot tell
      8  0.494 [0.403, 0.681]  0.604 [0.509, 0.694]  -0.110 [-0.200, -0.021]     0 %       30  cannot tell
      k = 0 is not counted: with nothing forced, any chain fitted to such rollouts repeats their
          harm fraction.
      time of the first hit: largest gap 0.004 at 1 tokens (sampling alone: 0.013)
      Chapman-Kolmogorov: within. Harm within 2 tokens after 3: observed 0.456, predicted by 2
          steps 0.456; largest of 18 differences 0.000 [0.000, 0.000], p = 1.
      order: not tested. No state was visited from two others and left for two others.
      homogeneity over position: not tested. No state was visited both early and late.
      prompt heterogeneity: off. Harm differs between prompts by 0.165 [0.129, 0.225] (standard
          deviation) beyond their states, p = 0.005; rows of 7 states between prompts:
          dispersion 3.15, p = 1.1e-50.
      heterogeneity between categories: not tested. There is one category.
    """
    if not is_rollouts(held_out):
        raise InputError(
            f"held_out is {type(held_out).__name__}.",
            cause="A check replays token prefixes through the chain's states.",
            next="Pass judged Rollouts that the chain was not fitted on.",
        )
    if not (0 < margin < 1 and 0 < level < 1):
        raise InputError(f"margin {margin}, level {level}.", cause="Both lie between 0 and 1.", next="Correct them.")
    tally = tally_of(held_out)  # refuses what is not judged
    depths = np.unique(np.asarray(held_out.prefill)).tolist()
    planted = _planted(truth, depths)
    names = state_map(chain) if states is None else states
    said = predictions(chain, level)
    tests = max(sum(k > 0 for k in depths), 1)
    table, far = [], []
    for k in depths:
        row, ends = at_depth(said, held_out, names, k, margin, level, tests)
        if planted:
            row |= {"planted": planted[k], "predicted_minus_planted": row["predicted"] - planted[k]}
        table.append(row)
        far.append(ends)
    warnings = _warnings(chain, tally, depths)
    passed, verdict = verdict_of(table, margin)
    verdict = " ".join([verdict, *(f"Warning: {w}." for w in warnings)])
    found = _assumptions(said, held_out, names, margin, level) if assumptions and not chain.is_layered else ()
    curve, misfit = hit_curve(chain, held_out, level), misfit_of(table, far, level)
    return Check(passed, table, verdict, margin, level, curve, warnings, misfit, found)


def _assumptions(said: Predicted, rolls: Any, states: Any, margin: float, level: float) -> tuple[Finding, ...]:
    w = walks(rolls, states)
    h = look_up(said.chain, said.harm, w.labels)[0]
    # Where the chain is silent any number serves: the tests hold for every function of the states.
    h = np.where(np.isfinite(h), h, np.average(w.outcome == 0, weights=w.weight))
    both: dict[str, Any] = {"margin": margin, "level": level}
    return (
        chapman_kolmogorov(w, **both),
        one_more(w, level=level),
        homogeneity(w, h, **both),
        between_prompts(w, h, **both),
        between_categories(w, h, strata=stratified(said.chain, w, said.harm), **both),
    )


def _planted(truth: Any, depths: list[int]) -> dict[int, float]:
    if truth is None:
        return {}
    given = dict(truth) if isinstance(truth, Mapping) else dict(zip(depths, np.atleast_1d(np.asarray(truth, float))))
    size = len(given) if isinstance(truth, Mapping) else len(np.atleast_1d(np.asarray(truth)))
    if any(k not in given for k in depths) or (not isinstance(truth, Mapping) and size != len(depths)):
        raise InputError(
            f"truth has {size} values for the depths {', '.join(map(str, depths))}.",
            cause="Every held-out depth needs its planted value.",
            next="Pass a mapping from depth to probability, or an array in the order of the depths.",
        )
    return {k: float(given[k]) for k in depths}


def state_map(chain: Chain) -> Any:
    """The state map behind a chain, from what it was counted with or from its labels.

    Raises
    ------
    InputError
        If it cannot be told.
    """
    kind = getattr(chain.counts, "kind", "")
    if found := re.fullmatch(r"KGram\((\d+)\)", kind):
        return KGram(int(found[1]))
    if kind == "Position()":
        return Position()
    labels = [x for x, done in zip(chain.states, chain.outcome_mask) if not done]
    if not kind and labels and not isinstance(chain.states, range):
        grams = all(isinstance(x, (tuple, list)) and all(isinstance(t, int) for t in x) for x in labels)
        # An answer begins with nothing said, -1 in a k-gram; pairs of other numbers are something else.
        if grams and (any(-1 in x for x in labels) or not labels[0]) and len({len(x) for x in labels}) == 1:
            return KGram(len(labels[0]))
        if all(isinstance(x, int) for x in labels):
            return Position()
    raise InputError(
        "It is not known what the states of this chain mean" + (f" ({kind})." if kind else "."),
        cause="A held-out prefix must become a state, and only k-grams and positions are recognised by themselves.",
        next="Pass the map that was counted with: check(chain, held_out, states=...).",
    )


def _warnings(chain: Chain, held: Any, depths: list[int]) -> tuple[str, ...]:
    """What is odd about the held-out rollouts: a single prompt, other categories, or those of the fit once more."""
    found = []
    if len(np.unique(held.prompt_id)) == 1:
        found.append("all held-out rollouts answer one prompt, so how prompts differ is not in the intervals")
    if chain.evidence is None:
        return tuple(found)
    fit = tally_of(chain)
    key = lambda t, i: (int(t.prompt_id[i]), str(t.category[i]), int(t.prefill[i]), tuple(t.outcomes[i]))  # noqa: E731
    known = {key(fit, i) for i in range(len(fit))}
    where = [i for i in range(len(held)) if held.prefill[i] > 0 or max(depths) == 0]
    if where and all(key(held, i) in known for i in where):
        found.append(
            "prompt by prompt the held-out rollouts have the outcomes of those that the chain was fitted on; if they "
            "are the same rollouts, nothing was held out"
        )
    strange = sorted(set(held.category.tolist()) - set(fit.category.tolist()))
    if strange:
        found.append(f"the chain was fitted on no rollout of {', '.join(strange)}, which were held out")
    return tuple(found)
