"""A bias table: what safety tuning adds to every token whatever the prompt, kept as data; without torch.

`debias.py` measures it; here it becomes the edit that takes it off, and a file.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import InputError
from ..reading import making
from .edits import Edit, Part
from .storage import checked, read_tensors, typed, write_tensors

__all__ = ["RESPONSES", "BiasTable", "read_bias_table", "write_bias_table"]

RESPONSES = ("random", "ref", "safe")
"""Where partial answers come from: drawn like the prompts, or sampled from one of the models."""


@dataclass(frozen=True, eq=False)
class BiasTable:
    """What safety tuning adds to every token whatever the prompt; see `bias_table`.

    Parameters
    ----------
    bias : float64 array, shape (length, vocab)
        Nats, 0 for tokens that do not count. A constant per position means nothing to a softmax as long as all tokens
        have it: the mean of those that do not count, weighted by both laws, is 0 (without such, the mean of all).
    error : float64 array, shape (length, vocab)
        Standard errors over random prompts, of the difference to the sample's own mean under both laws.
    counted : bool array, shape (length, vocab)
        Tokens to which one of the models gives enough probability for a difference to be more than noise.
    seen : int64 array, shape (length,)
        Random prompts whose partial answer had not ended before the position.
    safe, ref : str
        Identities of the two models.
    pool : str
        SHA-256 of the token pool.
    n : int
        Random prompts.
    response : str
        One of `RESPONSES`.
    template : str or None
        Of the chat template that the prompts were wrapped in.
    about : dict
        JSON-able: seed, words, floor.

    Examples
    --------
    Safety tuning made token 2 four times as likely at the first position; the edit takes half of that off in nats:

    >>> bias, ones = np.log([[1.0, 1.0, 4.0], [1.0, 1.0, 2.0]]), np.ones((2, 3))
    >>> table = ms.interventions.BiasTable(bias, 0.01 * ones, ones, [500, 480], "safe", "ref", "pool", 500, "random")
    >>> table
    <BiasTable: 2 positions x 3 tokens from 500 random prompts (random answers), largest
    error 0.01 nats>
    >>> round(table.gap([2], [0, 1]), 3), table.tilt(0.5, length=1).round(3)[0, 2]
    (1.386, np.float64(-0.693))
    >>> table.edit(0.5)
    <Edit: tilt x-0.5 at the logits (answer)>
    """

    bias: NDArray
    error: NDArray
    counted: NDArray
    seen: NDArray
    safe: str
    ref: str
    pool: str
    n: int
    response: str
    template: str | None = None
    about: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        for name, dtype in (("bias", float), ("error", float), ("counted", bool), ("seen", np.int64)):
            array = np.array(getattr(self, name), dtype=dtype)
            array.flags.writeable = False
            object.__setattr__(self, name, array)

    def __repr__(self) -> str:
        return (
            f"<BiasTable: {self.length} positions x {self.bias.shape[1]} tokens from {self.n} random prompts "
            f"({self.response} answers), largest error {self.error[self.counted].max(initial=0.0):.2g} nats>"
        )

    @property
    def length(self) -> int:
        """Answer positions."""
        return len(self.bias)

    def tilt(self, strength: float = 1.0, length: int | None = None) -> NDArray[np.float64]:
        """What is added to the logits of the first positions, float64 (length, vocab).

        Raises
        ------
        InputError
            More positions than were measured, or a strength that is no number.
        """
        size = self.length if length is None else length
        if not 1 <= size <= self.length or not np.isfinite(strength):
            raise InputError(
                f"strength is {strength}, length is {size}",
                cause=f"the bias of {self.length} positions was measured",
                next=f"give a finite strength and a length from 1 to {self.length}",
            )
        return -float(strength) * self.bias[:size]

    def edit(self, strength: float = 1.0, length: int | None = None) -> Edit:
        """The debiased model: ``pi(v) * exp(-strength * b_i(v))`` at the first `length` positions of an answer.

        Parameters
        ----------
        strength : float
            Share of the bias that is taken off; 1 in the paper, 0 changes nothing.
        length : int, optional
            All measured positions by default.

        Returns
        -------
        Edit
            It acts on logits before temperature and top-p: at a temperature T it takes ``strength / T`` of the bias
            off the log-odds that are sampled from.
        """
        self.tilt(strength, length)
        part = Part("tilt", self.bias[:length].astype(np.float32), scale=-float(strength), when="answer")
        sign = "negative of the bias: positive bias towards safety-tuned tokens is taken off"
        return Edit((part,), self.safe, self.template, sign, {"bias_table": self.describe()})

    def processor(self, prompt_length: int, strength: float = 1.0, length: int | None = None) -> Any:
        """The same for ``transformers`` `generate`: see `tilt_processor.TiltProcessor`."""
        from .tilt_processor import TiltProcessor

        return TiltProcessor(self.tilt(strength, length), prompt_length)

    def gap(self, tokens: Sequence[int], others: Sequence[int], position: int = 0) -> float:
        """Mean bias of some tokens minus that of others at a position, nats: the log-odds that safety tuning adds."""
        row = self.bias[position]
        return float(row[np.asarray(tokens)].mean() - row[np.asarray(others)].mean())

    def describe(self) -> dict[str, Any]:
        """JSON-able: everything but the numbers."""
        named = {name: getattr(self, name) for name in ("safe", "ref", "pool", "n", "response", "template", "about")}
        return {**named, "shape": list(self.bias.shape), "sha256": hashlib.sha256(self.bias.tobytes()).hexdigest()}


def write_bias_table(table: BiasTable, path: str | Path) -> None:
    """Write a table as one safetensors file, hashes and all in its header.

    Examples
    --------
    >>> from markovsafety.interventions import BiasTable, read_bias_table, write_bias_table
    >>> bias, ones = np.log([[1.0, 1.0, 4.0], [1.0, 1.0, 2.0]]), np.ones((2, 3))
    >>> table = BiasTable(bias, 0.01 * ones, ones, [500, 480], "safe", "ref", "pool", 500, "random")
    >>> write_bias_table(table, "bias.safetensors")
    >>> read_bias_table("bias.safetensors")
    <BiasTable: 2 positions x 3 tokens from 500 random prompts (random answers), largest
    error 0.01 nats>
    """
    arrays = {name: getattr(table, name) for name in ("bias", "error", "counted", "seen")}
    write_tensors(path, "bias table", arrays, table.describe())


def read_bias_table(path: str | Path) -> BiasTable:
    """Read what `write_bias_table` wrote.

    Raises
    ------
    InputError
        The file is missing or holds no bias table.

    Examples
    --------
    >>> from markovsafety.interventions import Edit, Part, read_bias_table, write_edit
    >>> write_edit(Edit((Part("tilt", [0.0, -1.4]),)), "edit.safetensors")
    >>> read_bias_table("edit.safetensors")
    Traceback (most recent call last):
    markovsafety.errors.InputError: edit.safetensors holds no bias table
      cause: it holds a markovsafety edit
      next:  give a file that holds a markovsafety bias table
    """
    arrays, about = read_tensors(path, "bias table")
    with making(f"{path} holds only part of a bias table", "write it again"):
        arrays = {name: arrays[name] for name in ("bias", "error", "counted", "seen")}
        shape = checked(arrays["bias"], None, None, name="bias").shape
        for name in ("error", "counted"):
            checked(arrays[name], *shape, name=name)
        checked(arrays["seen"], shape[0], name="seen")
        typed(about, safe=str, ref=str, n=int, about=dict)
        return BiasTable(**arrays, **{k: v for k, v in about.items() if k not in ("shape", "sha256")})
