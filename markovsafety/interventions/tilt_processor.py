"""A tilt of the first answer tokens as a `LogitsProcessor`, for those who call ``generate`` themselves."""

from __future__ import annotations

import numpy as np
import torch
import transformers
from numpy.typing import NDArray

from ..errors import InputError

__all__ = ["TiltProcessor"]


class TiltProcessor(transformers.LogitsProcessor):
    """Adds row i of a table to the logits of answer token i, and nothing behind the table.

    Parameters
    ----------
    tilt : float array, shape (length, vocab)
        Nats; `BiasTable.tilt` makes it. Tokens of the model beyond `vocab` are left alone.
    prompt_length : int
        Columns of ``input_ids`` before the answer: with left padding the width of the padded prompts, the same for all
        rows; 0 where ``inputs_embeds`` are given without ids.

    Notes
    -----
    The answer position is the number of columns of ``input_ids`` less `prompt_length`. Rows may be beams. Processors of
    one's own run before temperature, top-k and top-p in ``generate``, so at temperature T the log-odds that are sampled
    from move by tilt / T. Assisted (speculative) decoding is not supported: the draft model does not see the tilt, and
    several positions are scored at once.

    ``markovsafety.sample(..., edit=table.edit())`` does the same and counts positions itself.

    Examples
    --------
    Two rows: -5 nats for token 3 at the first answer token, nothing from the second on.

    >>> import torch
    >>> tilt = np.array([[0, 0, 0, -5.0], [0, 0, 0, 0]])
    >>> processor = ms.interventions.TiltProcessor(tilt, prompt_length=2)
    >>> scores = torch.zeros(1, 4)
    >>> processor(torch.tensor([[1, 2]]), scores).softmax(-1).numpy().round(3)
    array([[0.333, 0.333, 0.333, 0.002]], dtype=float32)
    >>> processor(torch.tensor([[1, 2, 3]]), scores).softmax(-1).numpy().round(3)
    array([[0.25, 0.25, 0.25, 0.25]], dtype=float32)
    """

    def __init__(self, tilt: NDArray, prompt_length: int):
        self.table = torch.as_tensor(np.asarray(tilt, dtype=np.float32))
        if self.table.ndim != 2 or prompt_length < 0:
            raise InputError(
                f"the tilt has shape {tuple(self.table.shape)}, the prompt {prompt_length} tokens",
                cause="there is one row of the vocabulary's size for each of the first answer tokens",
                next="give BiasTable.tilt(), and the width of the prompts' input_ids",
            )
        self.prompt_length = prompt_length

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        at, (length, vocab) = input_ids.shape[1] - self.prompt_length, self.table.shape
        if at < 0 or scores.ndim != 2 or vocab > scores.shape[-1]:
            raise InputError(
                f"input_ids has {input_ids.shape[1]} columns, scores have shape {tuple(scores.shape)}",
                cause=f"the prompt was said to have {self.prompt_length}, the tilt is of {vocab} tokens",
                next="make a processor for each batch of prompts, with the model that the bias was measured on",
            )
        if at >= length:
            return scores
        scores = scores.clone()
        scores[:, :vocab] += self.table[at].to(scores)
        return scores
