"""What a tilt does to every outcome, from answers of the plain model alone.

The tilted model says an answer y with another probability than the plain one, and the ratio is known:

    w(y) = product over the first L tokens of  e^{a_i(y_i)} / Z_i,     Z_i = sum over v of p(v | x, y_<i) e^{a_i(v)},

with Z_i from the recorded row of the prompt and prefix itself, which one teacher-forced pass gives. So the tilted
probability of an outcome is the weighted share of recorded answers that came to it: exact in expectation, for all steps
of the tilt, without an answer of the tilted model. A row is tilted for itself; prompts are averaged afterwards.

Answers do not show what the plain model hardly ever says and the tilted one does. How much probability that is, the
rows tell: it is *hidden*, may all be harm, and widens the interval. For first tokens that the plain model hardly says,
`explore` draws answers of the plain model that are fit for it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..arithmetic import widened
from ..bound import Bound, check_level, clopper_pearson, encode
from ..brief import brief
from ..clusters import effective_size, freedom, kish
from ..errors import InputError
from ..outcomes import NOT_JUDGED
from ..rollouts.rollouts import Rollouts
from .bias_tables import BiasTable
from .debias import LOGITS, double_laws
from .exploration import Explored
from .host import Host
from .outcome_rates import came_to
from .pairing import Asked, asked_of, check_paired

__all__ = ["FEWEST", "Tilted", "predict_tilt", "tilt_weights"]

FEWEST = (10.0, 100.0)
"""Answers of equal weight that weighted ones must be worth to be believed: the first in any case, the second if that is
less than half of all answers. Below, a few of them carry the estimate."""
HEAVY = 10.0
"""A token that the tilt makes so many times likelier is one that recorded answers hardly show."""
HIDDEN = 0.02
"""Probability of such tokens from which on a prediction is not believed."""
BEYOND = "is beyond what was explored: tokens that it makes likely may hardly be among the answers"


@dataclass(frozen=True, eq=False)
class Tilted:
    """Predicted outcomes under tilts; see `predict_tilt`.

    Parameters
    ----------
    outcome : str
    strengths : tuple of float
    groups : tuple of str
        "all", then the categories.
    table : list of dict
        One row for each group and strength: group, strength, predicted (a Bound), effective (answers of equal weight
        that the weighted ones are worth), largest (share of one answer in the sum), hidden (probability of what the
        answers hardly show), explored (whether first tokens of such a tilt were; None for plain answers), trusted,
        variance (of the answers alone, prompts given), ceiling (one-sided upper end at `level` that holds for all
        groups of this strength at once). A row that is not trusted cannot tell: sample.
    prompt_id : int64 array, shape (prompts,)
    category : object array, shape (prompts,)
    terms : float64 array, shape (strengths, prompts, 2)
        Of every prompt the mean weight of answers, and that of answers that came to the outcome.

    Examples
    --------
    >>> from markovsafety import interventions as inside, organism
    >>> tuned, base = (inside.open_host(organism.model_path(name)) for name in ("shallow", "base"))
    >>> table = inside.bias_table(tuned, base, length=1, n=64)
    >>> asked = organism.prompts(n=24, categories=["bio"])
    >>> rolls = ms.sample(tuned.engine, asked, n=8, max_tokens=48, judge="organism")
    >>> found = inside.predict_tilt(tuned, rolls, table, [0.25, 1.0])
    >>> found
    Tilted(outcome='harm', strengths=(0.25, 1), groups=('all',), table=list of 2, prompt_id=int64 (24,),
        category=object (24,))
    >>> print(found.at("all", 0.25)["predicted"])
    P(harm) under the tilt (all) = 0.1...   95 % [0.0..., 0.2...]   because: sampling 0.0..., model 0, truncation 0;
        judge, lumping, rounding not assessed
    """

    outcome: str
    strengths: tuple[float, ...]
    groups: tuple[str, ...]
    table: list[dict[str, Any]]
    prompt_id: NDArray
    category: NDArray
    terms: NDArray = field(repr=False)
    asked: Asked = field(default_factory=lambda: Asked({}), repr=False)

    __repr__ = brief

    def at(self, group: str, strength: float) -> dict[str, Any]:
        """The row of a group and a strength."""
        return next(r for r in self.table if r["group"] == group and r["strength"] == strength)

    def __str__(self) -> str:
        lines = [f"P({self.outcome}) predicted under the tilt, from answers of the plain model"]
        for row in self.table:
            b, told = row["predicted"], "" if row["trusted"] else "  cannot tell: sample"
            told = "  beyond what was explored" + told if row["explored"] is False else told
            lines.append(
                f"  {row['group']} at {row['strength']:g}: {b.value:.3f} [{b.lower:.3f}, {b.upper:.3f}], "
                f"{row['effective']:.0f} effective answers{told}"
            )
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return encode({"outcome": self.outcome, "strengths": self.strengths, "table": self.table})

    def beside(self, sampled: Mapping[float, Rollouts]) -> list[dict[str, Any]]:
        """Predictions beside what the tilted model was seen to do.

        Parameters
        ----------
        sampled : mapping of strength -> Rollouts
            Judged answers of the tilted model to the same prompts, with another seed than the plain ones.

        Returns
        -------
        list of dict
            group, strength, predicted, sampled, difference, error (standard error of the difference, by prompt, and no
            less than that of the answers), z, trusted.

        Raises
        ------
        InputError
            Answers that are not judged, or to other prompts; or a strength that was not predicted.
        """
        rows = []
        for strength, rolls in sampled.items():
            if float(strength) not in self.strengths:
                raise InputError(
                    f"nothing was predicted at strength {strength}",
                    cause=f"the strengths are {', '.join(f'{a:g}' for a in self.strengths)}",
                    next="predict this one too, from the same answers",
                )
            index = self.strengths.index(float(strength))
            check_paired(self.asked, asked_of(rolls))
            harm, size = _counted(rolls, self.outcome, self.prompt_id)
            for group in self.groups:
                which = _members(group, self.category)
                row = self.at(group, float(strength))
                rows.append(_compared(row, self.terms[index, which], harm[which], size[which]))
        return rows


def _members(group: str, category: NDArray) -> NDArray:
    return np.ones(len(category), bool) if group == "all" else category == group


def _counted(rolls: Rollouts, outcome: str, prompt_id: NDArray) -> tuple[NDArray, NDArray]:
    """Answers of every prompt that came to an outcome, and all of them."""
    if (rolls.outcome == NOT_JUDGED).any() or set(prompt_id.tolist()) - set(rolls.prompt_id.tolist()):
        raise InputError(
            "the sampled answers are not judged, or not to the predicted prompts",
            cause="their outcomes are compared prompt by prompt",
            next="sample the same prompts with judge=",
        )
    order = np.argsort(prompt_id)
    kept = np.isin(rolls.prompt_id, prompt_id) & (rolls.prefill == 0)
    at = order[np.searchsorted(prompt_id[order], rolls.prompt_id[kept])]
    events = came_to(rolls, outcome)[kept]
    return tuple(np.bincount(at, w * rolls.weight[kept], len(prompt_id)) for w in (events, np.ones(len(at))))  # type: ignore[return-value]


def _compared(row: dict[str, Any], terms: NDArray, harm: NDArray, size: NDArray) -> dict[str, Any]:
    K = len(terms)
    rate = harm / size
    value, seen = float(row["predicted"].value), float(rate.mean())
    own = (terms[:, 1] - value * terms[:, 0]) / terms[:, 0].mean()
    between = K / max(K - 1, 1) * float(np.sum((own - (rate - seen)) ** 2)) / K**2
    within = row["variance"] + float(np.sum(_binomial(harm, size))) / K**2
    error = float(np.sqrt(max(between, within)))
    told = {k: row[k] for k in ("group", "strength", "trusted")}
    difference = value - seen
    return {
        **told,
        "predicted": value,
        "sampled": seen,
        "difference": difference,
        "error": error,
        "z": difference / error,
    }


def _binomial(events: NDArray, size: NDArray) -> NDArray:
    """Variance of a rate, half an answer of either kind added, so that none seen is not none possible."""
    rate = (events + 0.5) / (size + 1)
    return rate * (1 - rate) / size


def predict_tilt(
    host: Host,
    rolls: Rollouts,
    table: BiasTable,
    strengths: Sequence[float],
    *,
    length: int | None = None,
    outcome: str = "harm",
    level: float = 0.95,
) -> Tilted:
    """Predict an outcome under a debiasing tilt, of all prompts and by category.

    Parameters
    ----------
    host : Host
        The plain safety-tuned model.
    rolls : Rollouts
        Its judged answers at temperature 1, without prefill or edit, with their prompts; weights are those of
        `explore` (importance weights of mean 1 over the answers of a prompt).
    table : BiasTable
    strengths : sequence of float
    length : int, optional
        As in `BiasTable.edit`.
    outcome : str
        harm, refusal, benign or truncated.
    level : float

    Returns
    -------
    Tilted

    Raises
    ------
    InputError
        Answers that are not the plain model's own, not judged, or without their prompts; no such outcome.

    Notes
    -----
    With S_k the weighted share of a prompt's answers that came to the outcome, and T_k the mean weight, which is 1 in
    expectation, the estimate is sum S_k / sum T_k: a ratio, whose error is that of S_k - h T_k, and which stays within
    [0, 1]. The interval is Clopper and Pearson's at the effective size of the linearised variance between prompts.

    Examples
    --------
    What taking off a quarter of the bias does to harm is predicted from plain answers; half of it is beyond them, and
    needs answers that were explored for it.

    >>> from markovsafety import interventions as inside, organism
    >>> tuned, base = (inside.open_host(organism.model_path(name)) for name in ("shallow", "base"))
    >>> table = inside.bias_table(tuned, base, length=1, n=64)
    >>> asked = organism.prompts(n=24, categories=["bio"])
    >>> rolls = ms.sample(tuned.engine, asked, n=8, max_tokens=48, judge="organism")
    >>> print(inside.predict_tilt(tuned, rolls, table, [0.25, 0.5]))
    P(harm) predicted under the tilt, from answers of the plain model
      all at 0.25: 0.1... [0.0..., 0.2...], ... effective answers
      all at 0.5: 0.2... [0.1..., 0.4...], ... effective answers  cannot tell: sample
    >>> rolls = inside.explore(tuned, asked, table, [0.5], n=8, max_tokens=48, judge="organism")
    >>> print(inside.predict_tilt(tuned, rolls, table, [0.5]))
    P(harm) predicted under the tilt, from answers of the plain model
      all at 0.5: 0.3... [0.2..., 0.4...], ... effective answers
    """
    check_level(level)
    known = Explored.of(rolls.provenance, table)
    stop = [*host.engine.tokenizer.eos_ids, *host.engine.tokenizer.end_ids]
    drawn = None if known is None else partial(known.most, table, stop, HEAVY)
    logw, unseen = _weighed(host, rolls, [table.tilt(a, length) for a in strengths], drawn)
    prompt_id, first, at = np.unique(rolls.prompt_id, return_index=True, return_inverse=True)
    category = rolls.category[first].astype(str).astype(object)
    names = sorted(set(category.tolist()))
    groups = ("all", *(names if len(names) > 1 else ()))
    event = came_to(rolls, outcome).astype(float)
    rows, terms = [], []
    for a, w, dark in zip(strengths, np.exp(logw) * rolls.weight, unseen * rolls.weight):
        seen = _Seen.of(w, event, dark, at.reshape(-1), len(prompt_id))
        inside = None if "weight" not in rolls.columns else known is not None and known.covers(float(a))
        for group in groups:
            which, name = _members(group, category), f"P({outcome}) under the tilt ({group})"
            made = seen.bound(which, level, name, "" if inside is not False else f"strength {a:g} {BEYOND}")
            joint = seen.bound(which, 1 - 2 * (1 - level) / len(groups), name)["predicted"]
            told = {"explored": inside, "ceiling": float(joint.upper)}
            rows.append({"group": group, "strength": float(a), **made, **told})
        terms.append(np.stack([seen.total, seen.hit], axis=1))
    given = tuple(map(float, strengths))
    return Tilted(outcome, given, groups, rows, prompt_id, category, np.array(terms), asked_of(rolls))


@dataclass(frozen=True, eq=False)
class _Seen:
    """Weighted answers at one strength.

    Parameters
    ----------
    share : float64 array, shape (answers,)
        Weight over the number of the prompt's answers, so that every prompt counts alike.
    event : float64 array, shape (answers,)
    dark : float64 array, shape (answers,)
        Probability of tokens that answers hardly show, over the number of the prompt's answers.
    at : int64 array, shape (answers,)
        Place of the prompt.
    total, hit : float64 array, shape (prompts,)
        Mean weight of the answers, and of those that came to the outcome.
    """

    share: NDArray
    event: NDArray
    dark: NDArray
    at: NDArray
    total: NDArray
    hit: NDArray

    @classmethod
    def of(cls, weight: NDArray, event: NDArray, dark: NDArray, at: NDArray, prompts: int) -> _Seen:
        size = np.bincount(at, minlength=prompts)[at]
        share = weight / size
        total, hit = (np.bincount(at, x, prompts) for x in (share, share * event))
        return cls(share, event, dark / size, at, total, hit)

    def bound(self, which: NDArray, level: float, name: str, note: str = "") -> dict[str, Any]:
        """Predicted probability of a group of prompts, and what it rests on; a row of `Tilted.table`."""
        K, share = int(which.sum()), np.where(which[self.at], self.share, 0.0)
        mean, hit = self.total[which].mean(), self.hit[which]
        value = float(min(hit.mean() / mean, 1.0))
        effective = float(kish(share))
        residual = (hit - value * self.total[which]) / (mean * K)
        between = K / max(K - 1, 1) * float(np.sum(residual**2))
        deff = between * max(effective - 1, 1.0) / max(value * (1 - value), 1e-300)
        sides = hit, np.maximum(self.total[which] - hit, 0.0)
        known = min(*(float(kish(s)) - 1 for s in sides), float(freedom(residual, K))) if between > 0 else 0.0
        # Weighted answers can vary more than one coin per prompt, so that few effective ones are not K.
        size = effective if K < 2 else float(effective_size(effective, min(K, effective), deff, level, 1 + known))
        lower, upper = clopper_pearson(min(value * size, size), size, level)
        info = {"name": name, "method": "importance weights", "prompts": K, "n_eff": size}
        info |= {"why": "answers of the plain model, weighted by every tilted step of their own rows"}
        info |= {"note": note} if note else {}
        reasons = {"sampling": (upper - lower) / 2, "model": 0.0}
        plain = Bound(value, min(lower, value), max(upper, value), level, reasons, None, info)
        hidden = min(float(self.dark[which[self.at]].sum()) / K, 1.0)
        bound = widened(plain, least=0.0, most=1.0, truncation=(0.0, hidden))
        rate = (value * effective + 0.5) / (effective + 1)
        within = float(np.sum((share * (self.event - value)) ** 2)) / (mean * K) ** 2
        events = share * self.event
        return {
            "predicted": bound,
            "effective": effective,
            "largest": float(events.max() / max(events.sum(), 1e-300)),
            "hidden": hidden,
            "trusted": bool(hidden <= HIDDEN and effective >= max(FEWEST[0], min(FEWEST[1], (share > 0).sum() / 2))),
            "variance": max(within, rate * (1 - rate) / effective),
        }


def tilt_weights(host: Host, rolls: Rollouts, tilts: Sequence[NDArray]) -> NDArray[np.float64]:
    """Logarithm of the tilted over the plain probability of recorded answers, float64 (tilts, rollouts).

    Parameters
    ----------
    host : Host
        The plain model.
    rolls : Rollouts
        Its answers.
    tilts : sequence of float arrays, shape (length, vocab)
        All of one shape.

    Raises
    ------
    InputError
        As in `predict_tilt`.
    """
    return _weighed(host, rolls, tilts)[0]


def _weighed(
    host: Host, rolls: Rollouts, tilts: Sequence[NDArray], drawn: Callable[[NDArray], NDArray] | None = None
) -> tuple[NDArray, NDArray]:
    """Logarithms of the weights, and the probability of tokens that answers hardly show because the tilt makes them
    `HEAVY` times likelier: both float64 (tilts, rollouts). `drawn` says above which probability a first token is hardly
    shown, by its plain law; the first tokens of explored answers are those of a mixture of tilts."""
    _check(host, rolls)
    length, vocab = tilts[0].shape
    shift = torch.as_tensor(np.stack(tilts))
    prompts, answers, of = _prefixes(rolls, length)
    norm, dark = np.zeros((2, len(tilts), len(prompts), length))
    size = max(1, min(64, LOGITS // (host.vocab_size * (length + 32) * 2)))
    for rows, batch in host.batches(prompts, answers, size):
        at = np.minimum(batch.answer[:, None] - 1 + np.arange(length), batch.end[:, None] - 1)
        law = double_laws(host, batch, at)
        shown = law + np.log(HEAVY)
        if drawn is not None:
            shown[:, 0] = torch.as_tensor(np.log(np.maximum(drawn(law[:, 0].exp().numpy()), 1e-300)))
        for i, tilt in enumerate(shift):
            moved = law.clone()
            moved[..., :vocab] += tilt
            norm[i, rows] = torch.logsumexp(moved, dim=-1).numpy()
            moved -= torch.as_tensor(norm[i, rows])[..., None]
            dark[i, rows] = torch.where(moved > shown, moved.exp(), 0.0).sum(-1).numpy()
    out, unseen = np.zeros((2, len(tilts), len(rolls)))
    for j, said in enumerate(rolls.answers()):
        m = min(length, len(said))
        step, token = np.arange(m), said[:m]
        inside = token < vocab
        plus = shift.numpy()[:, step, np.minimum(token, vocab - 1)] * inside
        steps = plus - norm[:, of[j], :m]
        out[:, j] = steps.sum(axis=1)
        before = np.cumsum(steps, axis=1) - steps
        unseen[:, j] = (np.exp(before) * dark[:, of[j], :m]).sum(axis=1)
    return out, unseen


def _prefixes(rolls: Rollouts, length: int) -> tuple[list[NDArray], list[NDArray], NDArray]:
    """Distinct prompts and beginnings of answers, as far as laws are needed, and which each rollout has."""
    found: dict[tuple[bytes, bytes], int] = {}
    prompts, answers, of = [], [], np.zeros(len(rolls), np.int64)
    for j, (asked, said) in enumerate(zip(rolls.columns["prompt_tokens"], rolls.answers())):
        begun = said[: min(length, len(said)) - 1] if len(said) else said
        key = asked.tobytes(), begun.tobytes()
        if key not in found:
            found[key] = len(prompts)
            prompts.append(asked.astype(np.int64))
            answers.append(begun.astype(np.int64))
        of[j] = found[key]
    return prompts, answers, of


def _check(host: Host, rolls: Rollouts) -> None:
    """Raise unless these are answers of the plain model itself."""
    parts = rolls.provenance.get("parts", [rolls.provenance])
    told = [part.get("sampling", {}) for part in parts]
    raw = all(s.get("temperature", 1.0) == 1.0 and s.get("top_p", 1.0) == 1.0 for s in told)
    edited = any("edit" in part.get("engine", {}) for part in parts if isinstance(part.get("engine"), Mapping))
    weights = [(part.get("model") or {}).get("weights") for part in parts]
    other = [w["sha256"] for w in weights if w and w["sha256"] != host.identity[0]]
    faults = {
        "have a prefill": bool((rolls.prefill != 0).any()),
        "are not judged": bool((rolls.outcome == NOT_JUDGED).any()),
        "come without their prompts": "prompt_tokens" not in rolls.columns,
        "were sampled at another temperature or top-p than 1": not raw,
        "were sampled under an edit": edited,
        "are another model's": bool(other),
        "are none": not len(rolls),
    }
    wrong = [fault for fault, found in faults.items() if found]
    if wrong:
        raise InputError(
            f"the answers {', and '.join(wrong)}",
            cause="their probabilities under the tilt are those of the plain model times a weight",
            next="sample the plain model with judge=, temperature 1 and top_p 1, or call explore",
        )
