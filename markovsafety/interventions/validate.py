"""Is the host what it seems? One position is edited, and what changes is held against what the edit predicts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy as np
import torch

from ..errors import ModelError
from ..rollouts.engines.transformers_batch import Batch
from .edits import Edit, Part
from .hooks import Attached
from .host import Host

__all__ = ["validate_host"]

TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-8, torch.bfloat16: 0.05, torch.float16: 0.01}
"""Relative error that rounding may leave in a predicted change."""
TOKENS = 6

Watch = Callable[[Any], AbstractContextManager[None]]


def validate_host(host: Host) -> None:
    """Edit one position at the first, the middle and the last block: residual stream and one head.

    Raises
    ------
    ModelError
        Something changes otherwise than predicted (at the edited position, or before it), or the model gives other
        logits once the edits are gone.
    """
    rng = np.random.default_rng(0)
    size = min(TOKENS, host.engine.context)
    ids = rng.choice(host.vocab_size, size=size, replace=host.vocab_size < size).astype(np.int64)
    batch = Batch.of([ids], [np.zeros(0, np.int64)], left=False)
    before = host.forward(batch, logits=True)
    if before is not None and not torch.isfinite(before.max(dim=-1).values).all():
        raise _not_finite("its logits", host)
    picked = sorted({0, host.layers // 2, host.layers - 1})
    for level in sorted({level for layer in picked for level in (layer, layer + 1)}):
        _residual(host, batch, level, rng)
    for layer in picked:
        _head(host, batch, layer, rng)
    after = host.forward(batch, logits=True)
    if before is None or after is None or not torch.equal(before, after):
        raise ModelError(
            "the model does not give the same logits twice",
            cause="dropout is on, or its kernels are not deterministic",
            next="put it into evaluation mode",
        )


def _seen(host: Host, batch: Batch, edit: Edit, watch: Watch) -> torch.Tensor:
    """What a watch sees under an edit, (columns, size)."""
    seen: list[torch.Tensor] = []
    with Attached(host, edit).during(batch), watch(seen.append):
        host.forward(batch)
    stream = seen[-1] if seen else None
    if not torch.is_tensor(stream) or stream.shape != (1, batch.width, host.width):
        raise ModelError(
            f"the residual stream has shape {tuple(getattr(stream, 'shape', ()))} for one row of {batch.width} tokens",
            cause=f"a block or its attention does not hand over (rows, columns, {host.width}), as edits need",
            next="use another architecture, or report this one; reading and editing are not safe there",
        )
    if not torch.isfinite(stream).all():
        raise _not_finite("its residual stream", host)
    return stream[0].float()


def _not_finite(what: str, host: Host) -> ModelError:
    return ModelError(
        f"the model computes numbers that are not finite: {what} on {TOKENS} tokens at random",
        cause=f"damaged weights, or activations beyond the range of {host.engine.dtype} (float16 ends at 65504)",
        next="load the model in bfloat16 or float32, or load its weights again",
    )


def _drawn(rng: np.random.Generator, size: int, like: torch.Tensor) -> np.ndarray:
    """A vector as large as what it is added to, so that rounding stays small beside it."""
    return (rng.standard_normal(size) * (float(like.abs().max()) + 1e-3)).astype(np.float32)


def _residual(host: Host, batch: Batch, level: int, rng: np.random.Generator) -> None:
    def watch(take: Any) -> AbstractContextManager[None]:
        return host.watching(level, take)

    base = _seen(host, batch, Edit(()), watch)
    vector = _drawn(rng, host.width, base)
    change = _seen(host, batch, Edit((Part("add", vector, layer=level),)), watch) - base
    _compare(change, torch.as_tensor(vector), host, f"the residual stream at level {level}")


def _head(host: Host, batch: Batch, layer: int, rng: np.random.Generator) -> None:
    mixer, head = host.mixers[layer], host.heads - 1

    @contextmanager
    def watch(take: Any) -> Iterator[None]:
        handle = mixer.register_forward_hook(lambda module, args, output: take(output))
        try:
            yield
        finally:
            handle.remove()

    base = _seen(host, batch, Edit(()), watch)
    vector = _drawn(rng, host.head_dim, base)
    change = _seen(host, batch, Edit((Part("head", vector, layer=layer, head=head),)), watch) - base
    weight = next(mixer.parameters())
    alone = torch.zeros(2, host.heads * host.head_dim, dtype=weight.dtype, device=weight.device)
    alone[1, head * host.head_dim :] = torch.as_tensor(vector).to(alone)
    with torch.inference_mode():
        moved = mixer(alone).float()
    _compare(change, moved[1] - moved[0], host, f"what head {head} of layer {layer} adds")


def _compare(change: torch.Tensor, wanted: torch.Tensor, host: Host, what: str) -> None:
    """The last column must change by `wanted`, the others not at all."""
    predicted = torch.zeros_like(change)
    predicted[-1] = wanted.to(change)
    wrong = float((change - predicted).abs().max())
    dtype = next(host.decoder.parameters()).dtype
    if not wrong <= TOLERANCE.get(dtype, 0.05) * float(wanted.abs().max()):
        raise ModelError(
            f"{what} does not change as an edit predicts (off by {wrong:.3g})",
            cause="the site that was found by structure is not the one that the model computes with",
            next="use another architecture, or report this one; reading and editing are not safe there",
        )
