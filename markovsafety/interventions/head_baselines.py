"""What head edits are held against: heads ranked by a probe (ITI), all heads of a layer, the whole stream (CAA).

Sources: K. Li et al., Inference-Time Intervention, arXiv 2306.03341 (heads by the accuracy of a logistic probe);
N. Rimsky et al., Steering Llama 2 via Contrastive Activation Addition, arXiv 2312.06681 (mean difference of the
residual stream at one layer). Both are compared with head edits in arXiv 2502.05945.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..brief import brief
from ..errors import InputError
from .edits import Edit, Part, When
from .heads import Head, texts
from .host import Host
from .record import activations, head_outputs
from .separation import auc

__all__ = ["HeadProbes", "added_norm", "probe_heads", "whole_layer"]


@dataclass(frozen=True, eq=False)
class HeadProbes:
    """How well each head's output tells two groups apart, on examples that its probe was not trained on.

    Parameters
    ----------
    accuracy, auc : float64 array, shape (layers, heads)
        Balanced accuracy, and area under the ROC curve.
    loss : float64 array, shape (layers, heads)
        Mean negative log-likelihood, nats.

    Examples
    --------
    >>> from markovsafety import interventions as inside, organism
    >>> host = inside.open_host(organism.model_path("shallow"))
    >>> probes = inside.probe_heads(host, organism.prompts(n=12, harmful=False), organism.prompts(n=12))
    >>> probes
    HeadProbes(accuracy=float64 (4, 4), auc=float64 (4, 4), loss=float64 (4, 4))
    >>> probes.ranked[:3]
    [(2, 2), (1, 1), (2, 1)]
    """

    accuracy: NDArray
    auc: NDArray
    loss: NDArray

    __repr__ = brief

    @property
    def ranked(self) -> list[Head]:
        """Heads by AUC; among equals, the surer first.

        It says where the difference can be read, not where it acts: many heads reach an AUC of 1 and move nothing.
        """
        heads = [(int(layer), int(head)) for layer, head in np.ndindex(*self.auc.shape)]
        return sorted(heads, key=lambda head: (-self.auc[head], self.loss[head]))


def probe_heads(
    host: Host,
    desired: Sequence[Any],
    undesired: Sequence[Any],
    answers: tuple[Sequence[Any], Sequence[Any]] | None = None,
    *,
    folds: int = 5,
    ridge: float = 1.0,
    batch_size: int | None = None,
) -> HeadProbes:
    """Logistic probes of all heads, cross-validated.

    Parameters
    ----------
    host, desired, undesired, answers, batch_size
        As in `head_directions`.
    folds : int
        Examples of each group take turns.
    ridge : float
        Penalty on the squared norm of the weights, for features of unit variance.

    Returns
    -------
    HeadProbes

    Raises
    ------
    InputError
        A group has fewer than two examples.

    Examples
    --------
    Many heads tell the two kinds of prompts apart without a mistake; it does not follow that they act.

    >>> from markovsafety import interventions as inside, organism
    >>> host = inside.open_host(organism.model_path("shallow"))
    >>> probes = inside.probe_heads(host, organism.prompts(n=12, harmful=False), organism.prompts(n=12))
    >>> (probes.auc == 1).astype(int)  # layers x heads
    array([[0, 0, 0, 0],
           [0, 1, 1, 0],
           [1, 1, 1, 1],
           [1, 1, 1, 1]])
    """
    groups = [texts(host, p, None if answers is None else answers[i]) for i, p in enumerate((desired, undesired))]
    few = min(map(len, groups))
    if few < 2 or folds < 2:
        raise InputError(
            f"a probe cannot be tested on {few} examples of a group in {folds} folds",
            cause="it is trained on some and tested on others, of both groups",
            next="give at least 2 of each group and 2 folds",
        )
    x = np.concatenate([head_outputs(host, ids, batch_size=batch_size) for ids in groups]).astype(np.float64)
    y = np.repeat([1.0, 0.0], [len(ids) for ids in groups])
    fold = np.concatenate([np.arange(len(ids)) % min(folds, few) for ids in groups])
    shape = x.shape[1:3]
    x = np.moveaxis(x.reshape(len(x), -1, x.shape[-1]), 1, 0)  # (layers * heads, examples, head_dim)
    scores = np.zeros(x.shape[:2])
    for held in range(min(folds, few)):
        test = fold == held
        scores[:, test] = _logistic(x[:, ~test], y[~test], x[:, test], ridge)
    right = (scores > 0) == y
    accuracy = (right[:, y == 1].mean(axis=1) + right[:, y == 0].mean(axis=1)) / 2
    area = np.array([auc(row[y == 1], row[y == 0]).value for row in scores])
    loss = np.logaddexp(0.0, np.where(y == 1, -scores, scores)).mean(axis=1)
    return HeadProbes(accuracy.reshape(shape), area.reshape(shape), loss.reshape(shape))


def _logistic(x: NDArray, y: NDArray, new: NDArray, ridge: float) -> NDArray:
    """Log-odds at `new` of logistic regressions, one per entry of the first axis, by Newton's method."""
    centre, spread = x.mean(axis=1, keepdims=True), x.std(axis=1, keepdims=True)
    x, new = (np.concatenate([(z - centre) / (spread + 1e-12), np.ones((*z.shape[:2], 1))], axis=-1) for z in (x, new))
    penalty = np.full(x.shape[-1], ridge)
    penalty[-1] = 1e-6
    w = np.zeros((len(x), x.shape[-1]))
    for _ in range(25):
        p = 1 / (1 + np.exp(-np.clip(np.einsum("hnd,hd->hn", x, w), -30, 30)))
        gradient = np.einsum("hnd,hn->hd", x, p - y) + penalty * w
        curve = np.einsum("hnd,hn,hne->hde", x, p * (1 - p), x) + np.diag(penalty)
        step = np.linalg.solve(curve, gradient[..., None])[..., 0]
        w -= step
        if np.abs(step).max() < 1e-8:
            break
    return np.einsum("hnd,hd->hn", new, w)


def added_norm(host: Host, edit: Edit) -> float:
    """Norm of what a head edit adds to the residual stream, over all its layers together.

    Raises
    ------
    InputError
        The edit has parts of another kind.

    Examples
    --------
    >>> from markovsafety import interventions as inside, organism
    >>> host = inside.open_host(organism.model_path("shallow"))
    >>> directions = inside.head_directions(host, organism.prompts(n=12, harmful=False), organism.prompts(n=12))
    >>> edit = directions.edit([(1, 2), (2, 1)])
    >>> one, two = inside.added_norm(host, edit), inside.added_norm(host, 2 * edit)
    >>> print(f"{one:.0f}, {two / one:.1f} times as much")
    17, 2.0 times as much
    """
    if other := {part.kind for part in edit.parts} - {"head"}:
        raise InputError(
            f"the edit has parts of kind {', '.join(sorted(other))}",
            cause="only what heads hand on is mapped to the residual stream",
            next="give an edit made by HeadDirections.edit",
        )
    by_layer: dict[int, NDArray] = {}
    for part in edit.parts:
        row = by_layer.setdefault(part.layer, np.zeros(host.heads * host.head_dim, np.float32))
        row[part.head * host.head_dim : (part.head + 1) * host.head_dim] += part.scale * part.vector
    total = 0.0
    for layer, row in by_layer.items():
        mixer = host.mixers[layer]
        like = next(mixer.parameters())
        both = torch.as_tensor(np.stack([row, np.zeros_like(row)])).to(like)
        with torch.inference_mode():
            moved = mixer(both).float()
        total += float((moved[0] - moved[1]).norm()) ** 2
    return total**0.5


def whole_layer(
    host: Host,
    desired: Sequence[Any],
    undesired: Sequence[Any],
    level: int,
    answers: tuple[Sequence[Any], Sequence[Any]] | None = None,
    *,
    alpha: float = 1.0,
    norm: float | None = None,
    when: When = "prompt",
    batch_size: int | None = None,
) -> Edit:
    """Add ``alpha`` times the difference of the means of the residual stream: contrastive activation addition.

    Parameters
    ----------
    host, desired, undesired, answers, batch_size
        As in `head_directions`.
    level : int
        Of the residual stream: l is what enters block l.
    alpha : float
    norm : float, optional
        Scale the difference to this norm first, such as `added_norm` of a head edit.
    when : {"prompt", "every", "answer"}

    Returns
    -------
    Edit

    Raises
    ------
    InputError
        No such level, or means that do not differ.

    Examples
    --------
    Contrastive activation addition at level 3, beside a random vector of the same norm:

    >>> from markovsafety import interventions as inside, organism
    >>> host = inside.open_host(organism.model_path("shallow"))
    >>> edit = inside.whole_layer(host, organism.prompts(n=12, harmful=False), organism.prompts(n=12), level=3)
    >>> others = organism.prompts(n=12, seed=1)
    >>> for name, e in {"plain": None, "edited": edit, "random": edit.control()}.items():
    ...     print(name, inside.token_mass(host, others, organism.REFUSAL_IDS, edit=e).mean().round(2))
    plain 0.88
    edited 0.05
    random 0.92
    """
    groups = [texts(host, p, None if answers is None else answers[i]) for i, p in enumerate((desired, undesired))]
    means = [
        activations(host, ids, levels=(level,), batch_size=batch_size)[:, 0, 0].astype(np.float64).mean(axis=0)
        for ids in groups
    ]
    vector = means[0] - means[1]
    size = float(np.linalg.norm(vector))
    if size <= 1e-5 * float(np.linalg.norm(means[1])):
        raise InputError(
            f"the means of both groups are equal at level {level}",
            cause="the examples end with the same token, and nothing before it has been read at this level",
            next="choose a higher level",
        )
    scale = alpha if norm is None else alpha * norm / size
    model, template = host.identity
    part = Part("add", vector, layer=level, scale=scale, where=(-1, None), when=when)
    about = {"from": "means of the residual stream", "examples": [len(g) for g in groups], "alpha": alpha}
    return Edit((part,), model, template, "desired - undesired: positive pushes towards desired", about)
