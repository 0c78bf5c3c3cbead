"""Aligning a model deeper: rows that refuse in the middle of answers, beside its own answers to harmless prompts.

What is learned and what it costs are measured on prompts that were not trained on: how far the law of the next token
has moved on harmless answers (KL divergence from the model before), and how well refusals are predicted in the middle
of answers, in categories that were trained and in those that were left out.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..bound import Bound, encode
from ..errors import InputError
from ..rollouts import sample
from ..rollouts.engines.transformers import TransformersEngine, open_engine
from .augment import Row, Triplet, check_choice, checked_triplets, mixed, recover, recovery, rotations, token_share
from .objectives import as_tensors, log_probs, logits_of
from .phrases import permutations, within_budget
from .triplets import Triplets
from .tuned_folder import PLACE
from .tuning import fine_tune

__all__ = ["METHODS", "Alignment", "align", "safety_rows"]

METHODS = ("recovery", "cyclic", "permutation")
HELD = 5
"""Every so manieth prompt is not trained on."""
PART = 32
"""Rows measured at a time, at most."""
LOGITS = 1 << 26
"""Logits held at a time while measuring: 256 MB of float32."""
LAWS = 1 << 22
"""Of them in float64 at a time: 32 MB."""


@dataclass(frozen=True, eq=False)
class Alignment:
    """What `align` did.

    Parameters
    ----------
    method : str
    depth : int
    share : dict
        Share of the safety rows in the loss: "as they are" (per token) and "mixed" (alpha).
    tokens : dict
        Tokens with loss: "safety", "anchors".
    kl : Bound or None
        KL(before || after) per token of the model's own answers to harmless prompts that were not trained on, nats.
    refusals : dict of category -> dict
        "before" and "after": mean loss per token of refusals in the middle of answers, nats, a Bound each; "trained":
        whether the category was.
    record : dict
        Of `fine_tune`.
    notes : list of str

    Examples
    --------
    >>> from markovsafety.interventions import align, triplets_of
    >>> model, told = ms.organism.model_path("shallow"), {"n": 50, "categories": ["bio"]}
    >>> asked, harmless = ms.organism.prompts("train", **told), ms.organism.prompts("train", **told, harmful=False)
    >>> rolls = ms.sample(model, asked, n=2, max_tokens=32, prefill=[0, 5], judge="organism")
    >>> how = {"depth": 5, "answers": 1, "max_tokens": 32, "steps": 10, "progress": False}
    >>> align(model, triplets_of(rolls), "deeper", benign=harmless, **how)
    <Alignment: recovery, depth 5: KL on harmless answers 0.00... nats per token; loss of
    refusals: bio 1... -> 1...>
    """

    method: str
    depth: int
    share: dict[str, float]
    tokens: dict[str, int]
    kl: Bound | None
    refusals: dict[str, dict[str, Any]]
    record: dict[str, Any]
    notes: list[str]

    def __repr__(self) -> str:
        return f"<Alignment: {self.verdict}>"

    @property
    def verdict(self) -> str:
        """One line."""
        moved = "KL on harmless answers not measured" if self.kl is None else f"KL on harmless answers {_span(self.kl)}"
        told = [f"{name} {_span(r['before'])} -> {_span(r['after'])}" for name, r in self.refusals.items()]
        return f"{self.method}, depth {self.depth}: {moved} nats per token; loss of refusals: {', '.join(told)}"

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        names = ("method", "depth", "share", "tokens", "kl", "refusals", "record", "notes")
        return encode({name: getattr(self, name) for name in names})


def _span(b: Bound) -> str:
    return f"{b.value:.3g} [{b.lower:.3g}, {b.upper:.3g}]"


def align(
    model: str | Path,
    triplets: Triplets | Sequence[Any],
    out: str | Path,
    *,
    method: str = "recovery",
    depth: int = 20,
    benign: Any = None,
    phrases: Sequence[Sequence[int]] | None = None,
    alpha: float = 0.2,
    plain: float = 0.5,
    budget: int | None = None,
    hold_out: Sequence[str] = (),
    answers: int = 4,
    max_tokens: int = 64,
    system: str | None = None,
    seed: int = 0,
    device: str | None = None,
    dtype: str = "float32",
    **options: Any,
) -> Alignment:
    """Fine-tune a model so that it refuses in the middle of harmful answers, and measure what that cost.

    Parameters
    ----------
    model : path
        Folder of a causal language model.
    triplets : Triplets, or sequence of (prompt, answer, refusal)
        Token ids. Every fifth prompt is kept for measuring.
    out : path
        Folder to write; see `fine_tune`.
    method : {"recovery", "cyclic", "permutation"}
        Refusals after a random number of tokens; at every offset of an answer; behind critical phrases that have
        changed places (needs `phrases`).
    depth : int
        Largest number C of compliant tokens before a refusal.
    benign : prompts, optional
        Harmless ones, in any form that `markovsafety.sample` takes. The model's own answers to four of five of them,
        sampled before training, are the rows that keep it as it is; on the others the divergence is measured.
    phrases : sequence of token ids, optional
        See `critical_phrases`.
    alpha : float
        Share of the loss that the safety rows get.
    plain : float
        Share of them that refuse at once. (A rotation's orbit contains one such row whatever this is, unless it is 0.)
    budget : int, optional
        Tokens with loss that the safety rows have in all, the same for every method; by default what the rows that
        keep the model have, or all there are.
    hold_out : sequence of str
        Categories that are not trained on, only measured.
    answers, max_tokens : int
        Of the model to each harmless prompt.
    system : str, optional
        System prompt of the harmless prompts. Triplets are ids and have theirs in them.
    seed : int
    device : str, optional
    dtype : {"float32", "bfloat16", "float16"}
        Of the weights, while they are trained and while the model is measured.
    **options
        Of `fine_tune`: objective, steps, batch_size, learning_rate, lora ...; others are passed to ``from_pretrained``.

    Returns
    -------
    Alignment

    Raises
    ------
    InputError
        Unknown method or categories, or rows that cannot be made.
    UntrustedError
        Training stopped; see `fine_tune`.

    Examples
    --------
    Ten updates on the model's own answers after forced tokens, with its own refusals behind them:

    >>> from markovsafety.interventions import align, triplets_of
    >>> model = ms.organism.model_path("shallow")
    >>> asked = ms.organism.prompts("train", n=50, categories=["bio"])
    >>> rolls = ms.sample(model, asked, n=2, max_tokens=32, prefill=[0, 5], judge="organism")
    >>> made = align(model, triplets_of(rolls), "deeper", depth=5, steps=10, progress=False)
    >>> for when in ("before", "after"):
    ...     print(when, made.refusals["bio"][when])
    before loss per token of refusals = 1.7...   95 % [...]
    because: sampling 0...; judge, ... not assessed
    after loss per token of refusals = 1.3...   95 % [...]
    because: sampling 0...; judge, ... not assessed
    """
    check_choice("method", method, METHODS)
    given = _labelled(triplets, hold_out)
    train, held = _split(given)
    loading = {"dtype": dtype, "device": device, **_not_of(fine_tune, options)}
    before, notes = open_engine(model, **loading), []
    rows = safety_rows(train.without(hold_out), method, depth, phrases=phrases, plain=plain, budget=budget, seed=seed)
    anchors, kept = _own_answers(before, benign, answers, max_tokens, system, seed)
    if budget is None and anchors:
        tokens = sum(r.loss_tokens for r in anchors)
        rows = safety_rows(
            train.without(hold_out), method, depth, phrases=phrases, plain=plain, budget=tokens, seed=seed
        )
    share = {"as they are": token_share(rows, anchors), "mixed": alpha if anchors else 1.0}
    if not anchors:
        notes.append("no harmless prompts: nothing keeps the model as it is, and what that costs is not measured")
    tokens = {"safety": sum(r.loss_tokens for r in rows), "anchors": sum(r.loss_tokens for r in anchors)}
    data = mixed(rows, anchors, alpha) if anchors else rows
    about = {"method": method, "depth": depth, "share": share, "tokens": tokens}
    asked = {name: [] for name in sorted(set(held.category))}
    for row, name in zip(_asked(held, depth, seed), held.category):
        asked[name].append(row)
    first = {name: _loss(before, mine) for name, mine in asked.items()}
    del before  # training has the memory for itself
    record = fine_tune(model, data, out, seed=seed, device=device, dtype=dtype, about=about, **options)
    after = open_engine(out, **_here(loading))
    table = {
        name: {"trained": name not in hold_out, "before": first[name], "after": _loss(after, mine)}
        for name, mine in asked.items()
    }
    kl = _divergence(open_engine(model, **loading), after, kept) if kept else None
    return Alignment(method, depth, share, tokens, kl, table, record, notes)


def _not_of(verb: Callable[..., Any], options: dict[str, Any]) -> dict[str, Any]:
    """Options that are none of a function's own."""
    return {name: value for name, value in options.items() if name not in inspect.signature(verb).parameters}


def _here(loading: dict[str, Any]) -> dict[str, Any]:
    """Options of loading, without those that say where a base lies: what was tuned lies in its folder."""
    return {name: value for name, value in loading.items() if name not in (*PLACE, "variant")}


def safety_rows(
    triplets: Triplets | Sequence[Any],
    method: str,
    depth: int,
    *,
    phrases: Sequence[Sequence[int]] | None = None,
    plain: float = 0.5,
    budget: int | None = None,
    seed: int = 0,
) -> list[Row]:
    """Rows of one method, cut to a number of tokens with loss.

    Parameters
    ----------
    triplets : sequence of (prompt, answer, refusal)
        Token ids, see `Triplet`.
    method, depth, phrases, plain, budget, seed : as in `align`

    Returns
    -------
    list of Row
        With a budget: rows with as many tokens, however many triplets there are; without: four per triplet, or whole
        orbits.

    Raises
    ------
    InputError
        The method needs phrases that are not given, or no row can be made.

    Examples
    --------
    >>> triplet = ([4, 12, 5], [21, 22, 23, 24, 2], [31, 32, 2])
    >>> sorted(row.offset for row in ms.interventions.safety_rows([triplet], "cyclic", depth=20))
    [0, 1, 2, 3, 4]
    >>> sum(row.loss_tokens for row in ms.interventions.safety_rows([triplet], "recovery", depth=20, budget=300))
    300
    """
    check_choice("method", method, METHODS)
    if method == "permutation" and phrases is None:
        raise InputError(
            "Permutation needs phrases.",
            cause="They are the tokens that change places.",
            next="Pass phrases=critical_phrases(critical(chain)), of a chain of k-grams of logged answers.",
        )
    items = checked_triplets(triplets, depth)
    shortest = min(len(t.refusal) for t in items)
    n = 4 * len(items) if budget is None else budget // shortest + 1
    if method == "recovery":
        rows = recovery(items, depth, n=n, plain=plain, seed=seed)
    elif method == "permutation":
        rows = permutations(items, phrases or (), depth, n=n, plain=plain, seed=seed)
    else:
        rows = rotations(items, depth, plain=plain > 0, seed=seed)
        while budget is not None and sum(r.loss_tokens for r in rows) < budget:
            rows = rows + rows  # orbits again, until the budget is reached
    return rows if budget is None else within_budget(rows, budget, seed)


def _labelled(triplets: Any, hold_out: Sequence[str]) -> Triplets:
    if not isinstance(triplets, Triplets):
        items = tuple(Triplet(*t) for t in triplets)
        triplets = Triplets(items, ("all",) * len(items))
    unknown = sorted(set(hold_out) - set(triplets.category))
    if unknown:
        raise InputError(
            f"No triplet is of the category {unknown[0]!r}.",
            cause=f"There are {', '.join(sorted(set(triplets.category))) or 'none'}.",
            next="Hold out one of these.",
        )
    if not len(triplets.without(hold_out)):
        raise InputError("Nothing is left to train on.", cause="No triplets.", next="Give some, or hold out less.")
    return triplets


def _split(triplets: Triplets) -> tuple[Triplets, Triplets]:
    """Triplets to train on and to measure on, apart by prompt; the same if there are fewer than five prompts."""
    order = {p: i for i, p in enumerate(dict.fromkeys(tuple(t.prompt) for t in triplets))}
    if len(order) < HELD:
        return triplets, triplets
    held = [order[tuple(t.prompt)] % HELD == HELD - 1 for t in triplets]
    return triplets._where([not h for h in held]), triplets._where(held)


def _own_answers(
    engine: TransformersEngine, benign: Any, n: int, max_tokens: int, system: str | None, seed: int
) -> tuple[list[Row], list[Row]]:
    """The model's answers to harmless prompts, as rows: to train on, and to measure on."""
    if benign is None:
        return [], []
    rolls = sample(engine, benign, n=n, max_tokens=max_tokens, system=system, seed=seed, progress=False)
    prompts = list(dict.fromkeys(rolls.prompt_id.tolist()))
    held = {p for i, p in enumerate(prompts) if i % HELD == HELD - 1}
    sides: tuple[list[Row], list[Row]] = ([], [])
    for i, answer in enumerate(rolls.answers()):
        asked = rolls.columns["prompt_tokens"][i].tolist()
        row = Row([*asked, *answer.tolist()], len(asked), len(asked))
        sides[int(rolls.prompt_id[i]) in held].append(row)
    return sides


def _asked(held: Triplets, depth: int, seed: int) -> list[Row]:
    """One refusal in the middle of every answer that was kept for measuring."""
    rng = np.random.default_rng(seed)
    return [recover(*t, int(rng.integers(0, min(depth, len(t.answer) - 1) + 1))) for t in held]


@torch.no_grad()
def _per_row(engine: TransformersEngine, rows: list[Row], each: Any) -> NDArray[np.float64]:
    """Mean over the tokens with loss of what `each` says of a batch of one row after the other."""
    from .batches import collate_rows

    found = []
    size = max(1, min(PART, LOGITS // (engine.vocab_size * max(len(r.tokens) for r in rows))))
    for begin in range(0, len(rows), size):
        part = rows[begin : begin + size]
        batch = as_tensors(collate_rows(part, 1.0, range(len(part))), engine.device)
        values = each(batch).double().cpu().numpy()
        row = np.repeat(np.arange(len(part)), [r.loss_tokens for r in part])
        found.append(np.bincount(row, values, len(part)) / np.bincount(row, minlength=len(part)))
    return np.concatenate(found)


def _loss(engine: TransformersEngine, rows: list[Row]) -> Bound:
    values = _per_row(engine, rows, lambda batch: -log_probs(logits_of(engine.model, batch), batch))
    return _mean(values, rows, "loss per token of refusals")


def _divergence(before: TransformersEngine, after: TransformersEngine, rows: list[Row]) -> Bound:
    def each(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        keep = batch["labels"][:, 1:] != -100
        told, said = (logits_of(e.model, batch)[keep] for e in (before, after))
        tokens = max(1, LAWS // told.shape[-1])
        return torch.cat([_kl(p, q) for p, q in zip(told.split(tokens), said.split(tokens))])

    return _mean(_per_row(before, rows, each), rows, "KL per token")


def _kl(told: torch.Tensor, said: torch.Tensor) -> torch.Tensor:
    """KL divergence of laws given by logits, in float64, nats."""
    p, q = (torch.log_softmax(logits.double(), -1) for logits in (told, said))
    return (p.exp() * (p - q)).sum(-1)


def _mean(values: NDArray, rows: list[Row], name: str) -> Bound:
    """Mean over prompts of the mean over their rows, with Student's interval over prompts."""
    from scipy.special import stdtrit

    prompts: dict[tuple[int, ...], list[float]] = {}
    for value, row in zip(values, rows):
        prompts.setdefault(tuple(row.tokens[: row.answer]), []).append(float(value))
    means = np.array([np.mean(v) for v in prompts.values()])
    value, info = float(means.mean()), {"name": name, "method": "Student over prompts", "prompts": len(means)}
    if len(means) == 1:
        info["note"] = "one prompt only: the variance between prompts is not assessed"
        return Bound(value, value, value, 0.95, {}, None, info)
    half = float(stdtrit(len(means) - 1.0, 0.975) * means.std(ddof=1) / np.sqrt(len(means)))
    return Bound(value, max(value - half, min(0.0, value)), value + half, 0.95, {"sampling": half}, None, info)
