"""Direct preference optimisation as an objective of `fine_tune`, and the two steps of safe alignment made of it.

The reward step prefers helpful answers with strength beta. The safety step starts from what it made and prefers safe
answers with strength beta / lambda, the smaller the further from it: the optimum of the constrained problem is reached
stepwise (SACPO, the method that arXiv 2502.02153 builds on). Both are the same loss on other pairs.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn import functional

from ..brief import brief
from ..errors import InputError
from .augment import Row
from .batches import check_rows, collate_rows, rows_hash
from .objectives import Setting, _frozen, _name, as_tensors, each_kept, log_probs, logits_of, summed

__all__ = ["Preference", "Preferred", "cleaned", "preference_rows"]


class Preference(NamedTuple):
    """Token ids of a prompt, of the answer that is preferred and of the other one, and by how much it is safer.

    Examples
    --------
    >>> ms.interventions.Preference(prompt=[1, 17, 46, 7], chosen=[112, 187, 2], rejected=[108, 166, 2], margin=0.8)
    Preference(prompt=[1, 17, 46, 7], chosen=[112, 187, 2], rejected=[108, 166, 2], margin=0.8)
    """

    prompt: Sequence[int]
    chosen: Sequence[int]
    rejected: Sequence[int]
    margin: float = 1.0


def cleaned(pairs: Sequence[Preference], threshold: float = 0.25) -> list[Preference]:
    """Pairs whose margin is at least a threshold; 0.25 in the paper.

    Raises
    ------
    InputError
        None is left.

    Examples
    --------
    >>> Preference = ms.interventions.Preference
    >>> pairs = [Preference([1, 7], [112, 2], [108, 2], margin) for margin in (0.8, 0.1, 0.3)]
    >>> [pair.margin for pair in ms.interventions.cleaned(pairs)]
    [0.8, 0.3]
    """
    kept = [p for p in pairs if p.margin >= threshold]
    if not kept:
        raise InputError(
            f"no pair of {len(pairs)} has a margin of {threshold:g}",
            cause="the preferred answers are hardly better than the others",
            next="lower the threshold, or look at the scores",
        )
    return kept


def preference_rows(pairs: Sequence[Preference]) -> tuple[list[Row], list[Row]]:
    """Rows of the preferred answers, for `fine_tune`, and of the others, for `Preferred`; loss on the answers.

    Examples
    --------
    >>> pair = ms.interventions.Preference(prompt=[1, 17, 46, 7], chosen=[112, 187, 2], rejected=[108, 166, 2])
    >>> chosen, rejected = ms.interventions.preference_rows([pair])
    >>> chosen
    [Row(tokens=[1, 17, 46, 7, 112, 187, 2], answer=4, loss_from=4, weight=1.0)]
    >>> rejected
    [Row(tokens=[1, 17, 46, 7, 108, 166, 2], answer=4, loss_from=4, weight=1.0)]
    """
    if not pairs:
        raise InputError("there are no pairs", cause="the list is empty", next="give at least one pair")

    def row(prompt: Sequence[int], answer: Sequence[int]) -> Row:
        return Row([*map(int, prompt), *map(int, answer)], len(prompt), len(prompt))

    return [row(p.prompt, p.chosen) for p in pairs], [row(p.prompt, p.rejected) for p in pairs]


@dataclass(frozen=True, eq=False)
class Preferred:
    """The loss ``-ln sigmoid(beta * (gain of the preferred answer - gain of the other))``, a mean over pairs.

    The gain of an answer is ln p - ln p_reference of all its tokens with loss, nats.

    Parameters
    ----------
    rejected : sequence of Row
        The other answers, in the order of the rows that are trained on; both sides of a pair go through the model.
    beta : float
        How strongly the reference holds, > 0: beta of a reward step, beta / lambda of a safety step.
    anchor : float
        Weight of the cross-entropy of the preferred answers beside it (arXiv 2404.19733, eq. 2), a mean over tokens. At
        0 the loss is that of the paper, which a model can also lower by saying neither answer: what is taken from the
        other answer may go to a third one.
    reference : path or model, optional
        Frozen, of the same tokenizer; by default the model as it is before training.

    Notes
    -----
    R. Rafailov and others, Direct Preference Optimization, arXiv 2305.18290, eq. 7. At the reference the loss is ln 2.

    Examples
    --------
    Four prompts, each with a refusal that is preferred to compliance; the loss begins at ln 2.

    >>> from markovsafety import interventions as inside, organism
    >>> answers = [112, 187, 188, 165, 181, 2], [108, 166, 167, 32, 168, 2]
    >>> pairs = [inside.Preference([1, 4, 17, i, 181, 5, 6, 7], *answers) for i in (42, 46, 52, 60)]
    >>> chosen, rejected = inside.preference_rows(pairs)
    >>> small = dict(objective=inside.Preferred(rejected, beta=0.1), steps=10, batch_size=4, warmup=0, progress=False)
    >>> record = inside.fine_tune(organism.model_path("base"), chosen, "preferring", **small)
    >>> for line in record["losses"][::9]:
    ...     print(f"update {line['step']}: loss {line['preference']:.2f}, margin {line['margin']:.0f} nats")
    update 1: loss 0.69, margin 0 nats
    update 10: loss 0.04, margin 31 nats
    """

    rejected: Sequence[Row]
    beta: float = 0.1
    anchor: float = 0.0
    reference: Any = None

    __repr__ = brief

    def __post_init__(self) -> None:
        if not (np.isfinite(self.beta) and self.beta > 0 and np.isfinite(self.anchor) and self.anchor >= 0):
            raise InputError(
                f"beta is {self.beta}, anchor {self.anchor}",
                cause="beta says how strongly the reference holds, anchor how strongly the preferred answer is learned",
                next="give a beta > 0, such as 0.1, and an anchor >= 0",
            )

    def bind(self, setting: Setting) -> Preferred:
        engine = setting.engine
        rows = check_rows(self.rejected, engine.vocab_size, engine.context)
        own = self.reference is None
        model = copy.deepcopy(engine.model) if own else _frozen(self.reference, setting, "reference")
        return replace(self, rejected=rows, reference=model.eval().requires_grad_(False))

    def __call__(self, model: Any, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        index = batch["index"].tolist()
        if max(index) >= len(self.rejected):
            raise InputError(
                f"row {max(index)} has no other answer",
                cause=f"there are {len(self.rejected)} of them",
                next="train on the rows that preference_rows made of the same pairs",
            )
        other = as_tensors(collate_rows([self.rejected[i] for i in index], 1.0, index), batch["labels"].device)
        said = log_probs(logits_of(model, batch), batch)
        gain = self._gain(said, batch) - self._gain(log_probs(logits_of(model, other), other), other)
        preferred = functional.softplus(-self.beta * gain).mean()
        entropy = summed(-said, batch)
        parts = {"preference": preferred.detach(), "margin": gain.detach().mean(), "cross_entropy": entropy.detach()}
        return preferred + self.anchor * entropy, parts

    def _gain(self, said: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """What each row gained on the reference, shape (batch,)."""
        with torch.no_grad():
            told = log_probs(logits_of(self.reference, batch), batch)
        row = each_kept(batch).nonzero()[:, 0]
        return torch.zeros(len(batch["labels"]), device=said.device).index_add(0, row, said - told)

    def describe(self) -> dict[str, Any]:
        """JSON-able."""
        return {
            "objective": "preferred",
            "beta": self.beta,
            "anchor": self.anchor,
            "reference": "the model before training" if self.reference is None else _name(self.reference),
            "rejected": rows_hash(list(self.rejected)),
        }
