"""Edits at work: plain torch hooks that live as long as a context, and know which columns are prompt and which answer.

The residual stream is edited where it enters a block (behind the last block: where it leaves), a head where its output
enters the attention's output projection. A hook on the whole decoder reads how many columns the key-value cache holds,
so that prompt and answer are told apart in every forward pass, also with left padding, chunks and caches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from ..errors import InputError
from ..rollouts.engines.transformers import TransformersEngine
from ..rollouts.engines.transformers_batch import Batch
from .edits import Edit, Part
from .host import Host, hidden_of

__all__ = ["Attached", "columns"]


def columns(part: Part, batch: Batch, first: int, count: int) -> np.ndarray:
    """Which columns first .. first + count - 1 of a batch a part edits, bool (rows, count).

    Notes
    -----
    The prompt slice is cut at the prompt's ends, as Python does; padding is never touched. Behind `batch.width` every
    column is answer.
    """
    start, stop = part.where
    lo = np.where(start >= 0, batch.begin + start, np.maximum(batch.answer + start, batch.begin))
    hi = batch.answer if stop is None else batch.begin + stop if stop > 0 else batch.answer + stop
    hi = batch.begin if part.where == (0, 0) else np.minimum(hi, batch.answer)
    at = np.arange(first, first + count)[None, :]
    prompt = (at >= lo[:, None]) & (at < hi[:, None])
    answer = (at >= batch.answer[:, None]) & ((at < batch.end[:, None]) | (at >= batch.width))
    return {"prompt": prompt, "answer": answer, "every": prompt | answer}[part.when]


@dataclass(eq=False)
class _Clock:
    """Where the current forward pass stands, and which of its positions each part edits.

    It is state, as a hook must be: the pass's first column, and per part None (no position), True (all of them) or a
    mask (rows, columns, 1).
    """

    batch: Batch
    parts: tuple[Part, ...]
    device: Any
    masks: list[Any] = field(default_factory=list)
    touched: list[int] = field(default_factory=list)

    def __post_init__(self):
        self.touched = [0] * len(self.parts)

    def __call__(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = kwargs.get("input_ids", args[0] if args else None)
        ids = kwargs["inputs_embeds"] if ids is None else ids
        cache = kwargs.get("past_key_values")
        past = 0 if cache is None else int(cache.get_seq_length())
        self.masks = [self._mask(i, past, ids.shape[1]) for i in range(len(self.parts))]

    def _mask(self, index: int, first: int, count: int) -> Any:
        part = self.parts[index]
        if first >= self.batch.width:  # decoding: nothing but answers
            if part.when == "prompt":
                return None
            self.touched[index] += len(self.batch.begin) * count
            return True
        mask = columns(part, self.batch, first, count)
        self.touched[index] += int(mask.sum())
        return torch.as_tensor(mask[..., None], device=self.device) if mask.any() else None


@dataclass(frozen=True, eq=False)
class Attached:
    """An edit bound to a model: enter `during` a batch, and the model runs edited; leave, and no trace is left.

    Parameters
    ----------
    host : Host
    edit : Edit

    Raises
    ------
    InputError
        The edit was made for other weights or another template, or a vector, layer or head does not fit.
    """

    host: Host
    edit: Edit

    def __post_init__(self):
        h = self.host
        sizes = {"layers": h.layers, "heads": h.heads, "head_dim": h.head_dim, "width": h.width, "vocab": h.vocab_size}
        self.edit.check(h, **sizes)

    @classmethod
    def of(cls, edit: Edit, engine: Any) -> Attached:
        """Bind an edit to an engine's model, or to a host."""
        if isinstance(engine, Host):
            return cls(engine, edit)
        if not isinstance(engine, TransformersEngine):
            raise InputError(
                f"the engine {getattr(engine, 'name', type(engine).__name__)!r} cannot be bound",
                cause="these hooks act on a model in torch",
                next='use engine="transformers"',
            )
        return cls(Host.of(engine), edit)

    def describe(self) -> dict[str, Any]:
        """JSON-able provenance of the edit."""
        return self.edit.describe()

    @contextmanager
    def during(self, batch: Batch, touched: list[int] | None = None) -> Iterator[Callable[..., torch.Tensor] | None]:
        """The model edited while this batch runs.

        Parameters
        ----------
        batch : Batch
        touched : list of int, optional
            Is filled on leaving with the number of positions that each part changed; rows of a generated batch that
            ended are still run, and count.

        Yields
        ------
        callable or None
            ``change(logits, first)`` for logits (rows, columns, vocab) whose first column is `first`; None if no part
            tilts them.
        """
        parts, host = self.edit.parts, self.host
        clock = _Clock(batch, parts, host.engine.device)
        with ExitStack() as stack:
            handle = host.decoder.register_forward_pre_hook(clock, with_kwargs=True, prepend=True)
            stack.callback(handle.remove)
            for index, part in enumerate(parts):
                if part.kind != "tilt":
                    stack.callback(_hook(host, part, clock, index).remove)
            tilts = [(i, p) for i, p in enumerate(parts) if p.kind == "tilt"]
            yield _Tilt(batch, [p for _, p in tilts]) if tilts else None
        if touched is not None:
            touched[:] = clock.touched


def _hook(host: Host, part: Part, clock: _Clock, index: int) -> Any:
    """Register the hook of one part."""
    kept: dict[Any, torch.Tensor] = {}

    def vector(like: torch.Tensor) -> torch.Tensor:
        key = (like.device, like.dtype)
        if key not in kept:
            kept[key] = torch.as_tensor(np.array(part.vector) * np.float32(part.scale)).to(like)
        return kept[key]

    def along(device: Any) -> torch.Tensor:
        if device not in kept:
            plain = torch.as_tensor(np.array(part.vector)).to(device, torch.float32)
            kept[device] = plain / plain.norm()
        return kept[device]

    def changed(x: torch.Tensor) -> torch.Tensor:
        mask = clock.masks[index]
        if mask is None:
            return x
        if part.kind == "project":
            unit = along(x.device)
            step = -part.scale * ((x.float() @ unit)[..., None] * unit).to(x.dtype)
        else:
            step = vector(x)
        return x + (step if mask is True else mask.to(x.device) * step)

    def enters(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if clock.masks[index] is None:
            return None
        x = changed(hidden_of(args, kwargs))
        return ((x, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": x})

    def leaves(module: Any, args: tuple[Any, ...], output: Any) -> Any:
        return changed(output) if torch.is_tensor(output) else (changed(output[0]), *output[1:])

    def mixes(module: Any, args: tuple[Any, ...]) -> Any:
        mask = clock.masks[index]
        if mask is None:
            return None
        x = args[0].clone()
        here = x[..., part.head * host.head_dim : (part.head + 1) * host.head_dim]
        here += vector(x) if mask is True else mask.to(x.device) * vector(x)
        return (x, *args[1:])

    if part.kind == "head":
        return host.mixers[part.layer].register_forward_pre_hook(mixes)
    if part.layer == host.layers:
        return host.blocks[-1].register_forward_hook(leaves)
    return host.blocks[part.layer].register_forward_pre_hook(enters, with_kwargs=True)


@dataclass(frozen=True, eq=False)
class _Tilt:
    """Adds the tilts to logits: column c predicts answer token c + 1 - (first column of the answer)."""

    batch: Batch
    parts: list[Part]
    kept: dict[Any, torch.Tensor] = field(default_factory=dict)

    def __call__(self, logits: torch.Tensor, first: int) -> torch.Tensor:
        at = np.arange(first, first + logits.shape[1])[None, :] + 1 - self.batch.answer[:, None]
        for index, part in enumerate(self.parts):
            table = self._table(index, logits)
            none = len(table) - 1
            step = np.where(at < 0, none, np.minimum(at, none) if part.vector.ndim == 2 else 0)
            logits = logits + table[torch.as_tensor(step, device=logits.device)]
        return logits

    def _table(self, index: int, like: torch.Tensor) -> torch.Tensor:
        """What a part adds to the logits of every answer token; the last row is no tilt."""
        key = (index, like.device, like.dtype, like.shape[-1])
        if key not in self.kept:
            part = self.parts[index]
            rows = np.atleast_2d(part.vector)
            table = np.zeros((len(rows) + 1, like.shape[-1]), np.float32)
            table[:-1, : rows.shape[1]] = rows * np.float32(part.scale)
            self.kept[key] = torch.as_tensor(table).to(like)
        return self.kept[key]
