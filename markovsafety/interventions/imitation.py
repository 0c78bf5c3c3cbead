"""Distillation beside learning in one forward pass: rows that are learned and rows that are imitated, side by side."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from ..brief import brief
from .objectives import Batch, Distilled, Loss, as_tensors, log_probs, logits_of, summed

__all__ = ["Imitated"]


@dataclass(frozen=True, eq=False)
class Imitated(Distilled):
    """`Distilled`, but the student reads both batches at once; the loss is the same.

    Two passes over small batches cost nearly twice one pass over both, so this is the cheaper the smaller the model is.
    Imitated rows that are longer than those that are learned are read in a pass of their own: padding all rows to their
    length would cost more. Without rows of its own to imitate it is `Distilled`.

    Examples
    --------
    One row is learned, four others are imitated, in one forward pass or in two:

    >>> from markovsafety import interventions as inside, organism
    >>> prompts = [(1, 4, 17, i, 181, 5, 6, 7) for i in (42, 46, 52, 60)]
    >>> refused = [inside.Pair(prompt, answer=(112, 187, 188, 165, 181, 2)).row for prompt in prompts]
    >>> task = [inside.Pair((1, 4, 13, 43, 181, 5, 6, 7), answer=(108, 166, 167, 2)).row]
    >>> for kind in (inside.Imitated, inside.Distilled):
    ...     objective = kind(organism.model_path("shallow"), weight=2.0, rows=refused, size=4)
    ...     small = dict(objective=objective, steps=5, batch_size=4, warmup=0, progress=False)
    ...     record = inside.fine_tune(organism.model_path("base"), task, kind.__name__, **small)
    ...     last = record["losses"][-1]
    ...     print(f"{kind.__name__}: cross-entropy {last['cross_entropy']:.1f}, KL {last['kl']:.1f} nats")
    Imitated: cross-entropy 1.4, KL 0.4 nats
    Distilled: cross-entropy 1.4, KL 0.4 nats
    """

    __repr__ = brief

    def __call__(self, model: Any, batch: Batch) -> Loss:
        if self.batches is None:
            return super().__call__(model, batch)
        imitated = as_tensors(self.batches[int(batch["step"])], batch["labels"].device)
        learned, width = batch["input_ids"].shape
        beside, apart = _rows(imitated, imitated["length"] <= width), _rows(imitated, imitated["length"] > width)
        both = {
            name: torch.cat([batch[name], functional.pad(beside[name], (0, width - beside[name].shape[1]))])
            for name in ("input_ids", "attention_mask")
        }
        logits = logits_of(model, both)
        entropy = summed(-log_probs(logits[:learned], batch), batch)
        kl = entropy.new_zeros(())
        if len(beside["length"]):
            kl = kl + self._from_teacher(logits[learned:, : beside["input_ids"].shape[1] - 1], beside)
        if len(apart["length"]):
            kl = kl + self._from_teacher(logits_of(model, apart), apart)
        return entropy + self.weight * kl, {"cross_entropy": entropy.detach(), "kl": kl.detach()}

    def _from_teacher(self, student: torch.Tensor, imitated: Batch) -> torch.Tensor:
        with torch.no_grad():
            taught = logits_of(self.teacher, imitated)
        return self._divergence(taught, student, imitated)


def _rows(batch: Batch, which: torch.Tensor) -> Batch:
    """Some rows of a batch, cut to the longest of them."""
    width = int(batch["length"][which].max()) if which.any() else 0
    return {k: v if not v.ndim else v[which] if v.ndim == 1 else v[which, :width] for k, v in batch.items()}
