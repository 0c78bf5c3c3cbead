"""Where prompts and answers stand in the columns of a padded batch: what an edit of activations has to know."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

__all__ = ["Batch"]


@dataclass(frozen=True, eq=False)
class Batch:
    """Prompts, each with what was said or forced after it, padded to one width.

    Parameters
    ----------
    ids, mask : int64 array, shape (rows, width)
        Token ids, and 1 where there is a token.
    begin, answer, end : int64 array, shape (rows,)
        Columns of the prompt's first token, of the first one behind the prompt, and of the first one behind the row's
        last token. While an answer is generated its tokens go into the columns from `width` on.
    """

    ids: np.ndarray
    mask: np.ndarray
    begin: np.ndarray
    answer: np.ndarray
    end: np.ndarray

    @classmethod
    def of(cls, prompts: Sequence[np.ndarray], answers: Sequence[np.ndarray], *, left: bool) -> Batch:
        """Pad on the left (to generate) or on the right (to read what is there).

        Parameters
        ----------
        prompts, answers : sequence of int arrays, one per row
        left : bool
        """
        prompt = np.array([len(p) for p in prompts], dtype=np.int64)
        size = prompt + np.array([len(a) for a in answers], dtype=np.int64)
        width = int(size.max())
        begin = width - size if left else np.zeros_like(size)
        ids, mask = np.zeros((2, len(size), width), dtype=np.int64)
        for row, (first, last) in enumerate(zip(begin.tolist(), (begin + size).tolist())):
            ids[row, first:last] = np.concatenate([prompts[row], answers[row]])
            mask[row, first:last] = 1
        return cls(ids, mask, begin, begin + prompt, begin + size)

    @property
    def width(self) -> int:
        """Number of columns."""
        return self.ids.shape[1]
