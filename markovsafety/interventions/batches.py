"""Rows of token ids as batches of arrays: checked before anything is trained, the same for the same seed."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..errors import InputError
from .augment import Row

__all__ = ["IGNORED", "RowBatches", "check_rows", "collate_rows", "loss_mass", "rows_hash"]

IGNORED = -100
"""Label of a token without loss, as transformers has it."""


def check_rows(rows: Sequence[Row], vocab: int, context: int) -> list[Row]:
    """Rows that a model can be trained on.

    Parameters
    ----------
    rows : sequence of Row
    vocab : int
        Rows of the model's embedding.
    context : int
        Its positions.

    Raises
    ------
    InputError
        No rows at all, or one without loss, with ids outside the vocabulary, that is too long, or whose weight is no
        finite number >= 0.
    """
    rows = list(rows)
    if not rows:
        raise InputError("There are no rows.", cause="The list is empty.", next="Give at least one row with loss.")
    for i, row in enumerate(rows):
        why = _fault(row, vocab, context)
        if why:
            raise InputError(f"Row {i} cannot be trained on: {why[0]}.", cause=why[1], next=why[2])
    if loss_mass(rows) <= 0:
        raise InputError("No row weighs anything.", cause="All weights are 0.", next="Give some rows a weight > 0.")
    return rows


def _fault(row: Any, vocab: int, context: int) -> tuple[str, str, str] | None:
    if not isinstance(row, Row):
        return f"it is {type(row).__name__}", "Rows are made by augment.", "Make it with recover() or Row(...)."
    size = len(row.tokens)
    if not max(row.loss_from, 1) < size:
        cause = f"It has {size} tokens and its loss begins at {row.loss_from}; the first token is never predicted."
        return "no token carries loss", cause, "Leave the row out, or let its loss begin earlier."
    if not 0 <= row.answer <= size or row.loss_from < 0:
        return (
            f"its answer begins at {row.answer}, its loss at {row.loss_from}",
            f"It has {size} tokens.",
            "Count from 0.",
        )
    if not (np.isfinite(row.weight) and row.weight >= 0):
        return f"its weight is {row.weight}", "Weights multiply losses.", "Give a finite number >= 0."
    outside = [t for t in row.tokens if not 0 <= t < vocab]
    if outside:
        cause = f"The model has {vocab} token ids; the rows may be of another tokenizer."
        return f"it has the id {outside[0]}", cause, "Encode the text with this model's own tokenizer."
    if size > context:
        return f"it has {size} tokens", f"The model has {context} positions.", "Shorten it, or leave it out."
    return None


def loss_mass(rows: Sequence[Row]) -> float:
    """Sum of the weights of all tokens with loss."""
    return float(sum(r.weight * (len(r.tokens) - max(r.loss_from, 1)) for r in rows))


def rows_hash(rows: Sequence[Row]) -> str:
    """SHA-256 of rows, their order included."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(np.asarray([len(row.tokens), row.answer, row.loss_from, *row.tokens], dtype="<i8").tobytes())
        digest.update(np.float64(row.weight).tobytes())
    return digest.hexdigest()


def collate_rows(rows: Sequence[Row], norm: float, index: Sequence[int], pad: int = 0) -> dict[str, np.ndarray]:
    """One batch, padded on the right.

    Parameters
    ----------
    rows : sequence of Row, length batch
    norm : float
        What the batch's summed loss is divided by, the same for every batch. A mean per batch would give rows in
        batches with few tokens more weight.
    index : sequence of int, length batch
        Which rows these are, for objectives that know more of them.
    pad : int
        An id; no loss and no attention is on it.

    Returns
    -------
    dict
        ``input_ids``, ``attention_mask``, ``labels`` (-100 carries no loss) and ``weights``, of shape (batch, tokens);
        ``answer``, ``length`` and ``index``, of shape (batch,): where the answer begins, tokens, and which row it is;
        ``norm``, a number.
    """
    width = max(len(r.tokens) for r in rows)
    shape = (len(rows), width)
    ids, mask = np.full(shape, pad, np.int64), np.zeros(shape, np.int64)
    labels, weights = np.full(shape, IGNORED, np.int64), np.zeros(shape, np.float32)
    for i, row in enumerate(rows):
        begin, end = max(row.loss_from, 1), len(row.tokens)
        ids[i, :end], mask[i, :end] = row.tokens, 1
        labels[i, begin:end], weights[i, begin:end] = row.tokens[begin:], row.weight
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "labels": labels,
        "weights": weights,
        "answer": np.array([r.answer for r in rows], np.int64),
        "length": np.array([len(r.tokens) for r in rows], np.int64),
        "index": np.array(index, np.int64),
        "norm": np.array(norm, np.float32),
    }


@dataclass(frozen=True)
class RowBatches:
    """A finite, indexable sequence of batches: all rows in a random order, again in another order, and so on.

    Batch i depends on rows, seed and i alone, so a run that was stopped goes on to the same batches.

    Parameters
    ----------
    rows : list of Row
    size : int
        Rows per batch.
    steps : int
        Number of batches.
    seed : int
    """

    rows: list[Row]
    size: int
    steps: int
    seed: int = 0
    _orders: dict[int, np.ndarray] = field(default_factory=dict, compare=False, repr=False)

    def __len__(self) -> int:
        return self.steps

    @property
    def norm(self) -> float:
        """Weight of the tokens with loss that a batch has on average."""
        return self.size * loss_mass(self.rows) / len(self.rows)

    def __getitem__(self, i: int) -> dict[str, np.ndarray]:
        if not 0 <= i < self.steps:
            raise IndexError(i)
        index = [int(self._order(j // len(self.rows))[j % len(self.rows)]) for j in self._places(i)]
        batch = collate_rows([self.rows[j] for j in index], self.norm, index)
        return batch | {"step": np.array(i, np.int64)}

    def _places(self, i: int) -> range:
        return range(i * self.size, (i + 1) * self.size)

    def _order(self, epoch: int) -> np.ndarray:
        if epoch not in self._orders:
            self._orders[epoch] = np.random.default_rng([self.seed, epoch]).permutation(len(self.rows))
        return self._orders[epoch]
