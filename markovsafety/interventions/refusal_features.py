"""The refusal feature of a teacher: how training separates it, and the cosine that a prompt has with it.

R_l = mean over harmful prompts - mean over harmless ones of the stream at the last prompt token at level l. Training
adds ``weight (E[1 - cos(R, f_harmful)] + E[1 + cos(R, f_harmless)])`` to the cross-entropy: 0 where both kinds lie
opposite each other along R, 4 where they have changed places.

Source: arXiv 2506.07356. The feature and the harmful term are the paper's; the harmless term (towards -1) is our
reading of a loss that could be read in part only. Weight, level and threshold of the paper are not known.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from ..brief import brief
from ..errors import InputError
from ..rollouts.provenance import json_hash
from .differences import states
from .directions import Direction
from .host import Host
from .objectives import Batch, Loss, Setting, log_probs, logits_of, summed

__all__ = ["RefusalGuided", "cosine_penalty", "feature_cosines"]


def cosine_penalty(harmful: torch.Tensor, harmless: torch.Tensor, feature: torch.Tensor | None = None) -> torch.Tensor:
    """E[1 - cos(R, f)] over harmful prompts + E[1 + cos(R, f)] over harmless ones.

    Parameters
    ----------
    harmful, harmless : tensor, shape (m, width) and (n, width)
    feature : tensor, shape (width,), optional
        R; by default the difference of the two means, with its gradient (dynamic).

    Returns
    -------
    scalar tensor
        In [0, 4]. Half types are taken to float32: their cosines have no digits near 1 and -1.

    Examples
    --------
    0 where both kinds lie opposite each other along the feature, 2 where nothing tells them apart, 4 where they have
    changed places:

    >>> import torch
    >>> one = torch.tensor([[1.0, 0.0], [2.0, 0.0]])
    >>> feature = torch.tensor([1.0, 0.0])
    >>> for harmful, harmless in ((one, -one), (one, one), (-one, one)):
    ...     print(ms.interventions.cosine_penalty(harmful, harmless, feature).item())
    0.0
    2.0
    4.0
    """
    x, y = (side.float() if side.dtype in (torch.float16, torch.bfloat16) else side for side in (harmful, harmless))
    direction = x.mean(0) - y.mean(0) if feature is None else feature.to(x)
    towards = functional.cosine_similarity(x, direction[None], dim=-1).mean()
    against = functional.cosine_similarity(y, direction[None], dim=-1).mean()
    return (1 - towards) + (1 + against)


@dataclass(frozen=True, eq=False)
class RefusalGuided:
    """Cross-entropy of the rows, plus ``weight`` times `cosine_penalty` of their prompts.

    Parameters
    ----------
    harmful : sequence of bool
        Of each row that is trained on, in the order in which `fine_tune` is given them.
    level : int
        Of the residual stream, 0 to L.
    place : int
        Prompt token where features are read, negative from the prompt's end.
    weight : float
    feature : array, shape (width,), optional
        A fixed R; by default R is that of each batch, with its gradient.
    momentum : float
        Share of the R of the batches before in the R of a batch, 0 to below 1. It is not kept in checkpoints: a run
        that was stopped begins its running mean anew.

    Notes
    -----
    A batch in which one kind is missing has no R of its own; it is trained on by cross-entropy alone.

    Examples
    --------
    >>> from markovsafety import interventions as inside, organism
    >>> host = inside.open_host(organism.model_path("base"))
    >>> told = [{**p, "harmful": h, "answer": "sorry i cannot help ." if h else "sure here is the plan"}
    ...         for h in (True, False) for p in organism.prompts(n=16, harmful=h)]
    >>> pairs = inside.read_pairs(told, host.engine.tokenizer)
    >>> objective = inside.RefusalGuided([p.harmful for p in pairs], level=2, weight=1.0)
    >>> small = dict(steps=20, batch_size=16, warmup=0, progress=False)
    >>> rows = [p.row for p in pairs]
    >>> record = inside.fine_tune(organism.model_path("base"), rows, "guided", objective=objective, **small)
    >>> losses = record["losses"]
    >>> print(f"penalty {losses[0]['penalty']:.1f}, after {losses[-1]['step']} updates {losses[-1]['penalty']:.1f}")
    penalty 2.0, after 20 updates 1.2
    """

    harmful: Sequence[bool]
    level: int
    place: int = -1
    weight: float = 0.1
    feature: NDArray | None = None
    momentum: float = 0.0
    host: Host | None = None
    running: dict[str, torch.Tensor] = field(default_factory=dict)

    __repr__ = brief

    def __post_init__(self) -> None:
        fine = np.isfinite(self.weight) and self.weight >= 0 and 0 <= self.momentum < 1
        if not fine or (self.momentum and self.feature is not None):
            raise InputError(
                f"weight is {self.weight}, momentum {self.momentum}, and the feature is "
                + ("that of each batch" if self.feature is None else "fixed"),
                cause="weight is >= 0 and momentum in [0, 1), and a fixed feature has no running mean",
                next="correct what is out of range",
            )

    def bind(self, setting: Setting) -> RefusalGuided:
        host = Host.of(setting.engine)
        if not 0 <= self.level <= host.layers:
            raise InputError(
                f"there is no level {self.level}",
                cause=f"the residual stream of {host.layers} blocks has the levels 0 to {host.layers}",
                next="choose one of these; half the number of blocks is usual",
            )
        if self.feature is not None and np.shape(self.feature) != (host.width,):
            raise InputError(
                f"the fixed feature has shape {np.shape(self.feature)}",
                cause=f"the model's residual stream has {host.width} coordinates",
                next="take it from difference() on a model of this shape",
            )
        return replace(self, host=host, running={})

    def __call__(self, model: Any, batch: Batch) -> Loss:
        assert self.host is not None
        seen: list[torch.Tensor] = []
        with self.host.watching(self.level, seen.append):
            logits = logits_of(model, batch)
        entropy = summed(-log_probs(logits, batch), batch)
        which = torch.as_tensor(np.asarray(self.harmful, bool))[batch["index"].cpu()].to(entropy.device)
        at = batch["answer"] + self.place
        found = seen[0][torch.arange(len(at), device=at.device), at]
        if not which.any() or which.all():
            return entropy, {"cross_entropy": entropy.detach(), "penalty": torch.zeros_like(entropy)}
        penalty = cosine_penalty(found[which], found[~which], self._feature(found, which))
        return entropy + self.weight * penalty, {"cross_entropy": entropy.detach(), "penalty": penalty.detach()}

    def _feature(self, found: torch.Tensor, which: torch.Tensor) -> torch.Tensor | None:
        if self.feature is not None:
            return torch.tensor(self.feature, dtype=torch.float32, device=found.device)
        if not self.momentum:
            return None
        now = found[which].float().mean(0) - found[~which].float().mean(0)
        before = self.running.get("feature", now.detach())
        mean = self.momentum * before + (1 - self.momentum) * now
        self.running["feature"] = mean.detach()
        return mean

    def describe(self) -> dict[str, Any]:
        return {
            "objective": "refusal-guided",
            "level": self.level,
            "place": self.place,
            "weight": self.weight,
            "feature": "dynamic" if self.feature is None else np.asarray(self.feature, float).round(6).tolist(),
            "momentum": self.momentum,
            "harmful": {"rows": int(np.sum(self.harmful)), "sha256": json_hash([bool(h) for h in self.harmful])},
        }


def feature_cosines(
    host: Host, feature: Direction, prompts: Sequence[Any], *, batch_size: int | None = None
) -> NDArray:
    """Cosine of each prompt's activation with the refusal feature at the feature's level and position.

    Parameters
    ----------
    host : Host
    feature : Direction
        With a chosen level; `difference` makes it.
    prompts : sequence of ids, texts or records
    batch_size : int, optional

    Returns
    -------
    float64 array, shape (prompts,)

    Raises
    ------
    InputError
        The feature or an activation has norm 0 at this level, or a prompt does not end as the template says.

    Examples
    --------
    >>> from markovsafety import interventions as inside, organism
    >>> host = inside.open_host(organism.model_path("shallow"))
    >>> harmful, harmless = organism.prompts(n=24), organism.prompts(n=24, harmful=False)
    >>> feature = inside.difference(host, harmful, harmless, position="t_post").at(2)
    >>> for h in (True, False):
    ...     print(inside.feature_cosines(host, feature, organism.prompts(n=6, harmful=h, seed=1)).round(2))
    [0.82 0.84 0.84 0.8  0.83 0.81]
    [-0.23 -0.23 -0.25 -0.25 -0.25 -0.24]
    """
    if feature.level is None:
        raise InputError("the feature has no level", cause="none was chosen", next="choose one: feature.at(level)")
    found = states(host, prompts, (feature.position,), levels=[feature.level], batch_size=batch_size)
    return cosines(found[:, 0, 0], feature.vectors[feature.level], feature.level)


def cosines(values: NDArray, vector: NDArray, level: int) -> NDArray:
    """Cosines of rows with a vector, float64."""
    x, r = values.astype(np.float64), np.asarray(vector, dtype=np.float64)
    norms, size = np.linalg.norm(x, axis=1), np.linalg.norm(r)
    if not size or not norms.all():
        raise InputError(
            f"there is no cosine at level {level}",
            cause="the feature or an activation is 0 there: at level 0 the last token of a template is the same for "
            "all prompts",
            next="choose a higher level",
        )
    return np.clip(x @ r / (norms * size), -1.0, 1.0)
