"""Directions of single attention heads: what tells two groups of texts apart where a head hands on its output.

A head is edited where its output enters the attention's output projection, by ``alpha * sigma * theta``: theta is the
unit vector between the means of two groups of texts, sigma the standard deviation of all their projections on it.
Which head is worth anything is read off what the model then says (`sweep_heads`, `choose_heads`), never off a probe's
accuracy (`probe_heads`).

Source: P. Darm and A. Riccardi, Head-Specific Intervention Can Induce Misaligned AI Coordination in Large Language
Models, arXiv 2502.05945, section 3; the form of the edit is that of K. Li et al., Inference-Time Intervention (ITI),
arXiv 2306.03341.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ..brief import brief
from ..errors import InputError
from ..reading import making
from .edits import Edit, Part, When
from .host import Host
from .record import head_outputs
from .storage import checked, read_tensors, typed, write_tensors

__all__ = [
    "Head",
    "HeadDirections",
    "head_directions",
    "read_head_directions",
    "write_head_directions",
]

Head = tuple[int, int]
"""Layer and query head."""
FAINT = 1e-5
"""Means that differ by less than this share of a head's outputs differ by the rounding of float32."""
ARRAYS = ("theta", "sigma", "gap", "size")


@dataclass(frozen=True, eq=False)
class HeadDirections:
    """One direction per attention head, from undesired to desired.

    Parameters
    ----------
    theta : float32 array, shape (layers, heads, head_dim)
        Unit vectors; zero where the two means do not differ (`kept`).
    sigma : float64 array, shape (layers, heads)
        Standard deviation of the projections of all examples, both groups, on theta.
    gap : float64 array, shape (layers, heads)
        Norm of the difference of the means.
    size : float64 array, shape (layers, heads)
        Root mean square norm of the head's outputs.
    counts : (int, int)
        Desired and undesired examples.
    contrast : str
        Where the examples were read: "prompt end" or "completion end".
    sign : str
        What a positive alpha means.
    model, template : str or None
        See `Edit`.

    Examples
    --------
    >>> from markovsafety import interventions as inside, organism
    >>> host = inside.open_host(organism.model_path("shallow"))
    >>> answered, refused = organism.prompts(n=12, harmful=False), organism.prompts(n=12)
    >>> directions = inside.head_directions(host, answered, refused)
    >>> directions
    HeadDirections(theta=float32 (4, 4, 16), sigma=float64 (4, 4), gap=float64 (4, 4), size=float64 (4, 4),
        counts=(12, 12), contrast='prompt end', sign='desired - undesired: positive pushes towards desired',
        model='79867c8f4c32...', template='5c9e013864c8...')
    >>> directions.edit([(1, 2), (2, 1)], alpha=2.0)
    <Edit: head x11.0849 at layer 1 head 2 (prompt), head x11.0173 at layer 2 head 1 (prompt)>
    """

    theta: NDArray
    sigma: NDArray
    gap: NDArray
    size: NDArray
    counts: tuple[int, int]
    contrast: str
    sign: str
    model: str | None = None
    template: str | None = None

    __repr__ = brief

    def __post_init__(self):
        for name in ARRAYS:
            array = np.array(getattr(self, name), dtype=np.float32 if name == "theta" else np.float64)
            array.flags.writeable = False
            object.__setattr__(self, name, array)
        object.__setattr__(self, "counts", (int(self.counts[0]), int(self.counts[1])))

    @property
    def kept(self) -> NDArray:
        """Heads that have a direction, bool (layers, heads)."""
        return self.gap > FAINT * self.size

    @property
    def without(self) -> list[Head]:
        """Heads whose means do not differ beyond rounding: they do not see what tells the two groups apart."""
        return [(int(layer), int(head)) for layer, head in np.argwhere(~self.kept)]

    @property
    def heads(self) -> list[Head]:
        """Heads that have a direction."""
        return [(int(layer), int(head)) for layer, head in np.argwhere(self.kept)]

    def of_layer(self, layer: int) -> list[Head]:
        """Heads of a layer that have a direction."""
        return [head for head in self.heads if head[0] == layer]

    def edit(
        self,
        heads: Sequence[Head],
        alpha: float = 1.0,
        *,
        when: When = "prompt",
        unit: Literal["sigma", "gap"] = "sigma",
    ) -> Edit:
        """Add ``alpha * sigma * theta`` to heads, at the last prompt token and, if asked, at every token of the answer.

        Parameters
        ----------
        heads : sequence of (layer, head)
        alpha : float
            Negative numbers push towards undesired.
        when : {"prompt", "every", "answer"}
            "every" is what the paper does; "prompt" changes the law of the first token and what follows from it only.
        unit : {"sigma", "gap"}
            "gap" counts alpha in differences of the means. With two tight groups of equal size one gap is two sigma.

        Raises
        ------
        InputError
            No such head, or one without a direction.
        """
        layers, count = self.sigma.shape
        wanted = [(int(layer), int(head)) for layer, head in heads]
        unknown = [h for h in wanted if not (0 <= h[0] < layers and 0 <= h[1] < count)]
        if unknown or not wanted or unit not in ("sigma", "gap"):
            raise InputError(
                f"there is no edit of the heads {unknown or wanted} in units of {unit!r}",
                cause=f"the model has {layers} layers of {count} heads; units are sigma and gap",
                next="name at least one head by (layer, head), both from 0",
            )
        if faint := [h for h in wanted if not self.kept[h]]:
            raise InputError(
                f"the heads {faint} have no direction",
                cause="the means of desired and undesired examples are equal there up to rounding: these heads do not "
                "see what differs between the groups",
                next="leave them out; .heads lists those that have one",
            )
        step = self.sigma if unit == "sigma" else self.gap
        parts = [
            Part("head", self.theta[h], layer=h[0], head=h[1], scale=alpha * step[h], where=(-1, None), when=when)
            for h in wanted
        ]
        about = {"from": f"head means, {self.contrast}", "examples": list(self.counts), "alpha": alpha, "unit": unit}
        return Edit(tuple(parts), self.model, self.template, self.sign, about)


def head_directions(
    host: Host,
    desired: Sequence[Any],
    undesired: Sequence[Any],
    answers: tuple[Sequence[Any], Sequence[Any]] | None = None,
    *,
    sign: str = "desired - undesired: positive pushes towards desired",
    batch_size: int | None = None,
) -> HeadDirections:
    """Directions of all heads from few contrasting examples.

    Parameters
    ----------
    host : Host
    desired, undesired : sequence of prompts
        Texts, records or ids. Without answers they are read at the prompt's last token: prompts with a condition
        against prompts without it.
    answers : (sequence of ids, sequence of ids), optional
        One answer per desired and per undesired prompt; they are read at the answer's last token, as the paper does
        (its answers end with the end token).
    sign : str
        What a positive alpha means, in words.
    batch_size : int, optional

    Returns
    -------
    HeadDirections

    Raises
    ------
    InputError
        An empty group, an answer missing, or no head whose means differ.

    Notes
    -----
    One example in each group is enough for a direction; sigma is then half the distance between the two.
    Answers of one token leave no trace at the end token of a small model; give whole answers (8 tokens and more), or
    contrast prompts.

    Examples
    --------
    How far prompts that are answered are from prompts that are refused, head by head; adding it to three heads takes
    the refusals away, a random vector of the same norm does not.

    >>> from markovsafety import interventions as inside, organism
    >>> host = inside.open_host(organism.model_path("shallow"))
    >>> answered, refused = organism.prompts(n=12, harmful=False), organism.prompts(n=12)
    >>> directions = inside.head_directions(host, answered, refused)
    >>> directions.gap.round(1)
    array([[ 0.1,  0.4,  0.2,  0.1],
           [ 0.2,  9. , 11. ,  0.1],
           [ 5.5, 10.9, 19.3,  1.7],
           [ 2.8,  0.8,  1.5,  1.4]])
    >>> edit = directions.edit([(1, 2), (2, 1), (2, 2)], alpha=4.0)
    >>> others = organism.prompts(n=12, seed=1)
    >>> for name, e in {"plain": None, "edited": edit, "random": edit.control()}.items():
    ...     print(name, inside.token_mass(host, others, organism.REFUSAL_IDS, edit=e).mean().round(2))
    plain 0.88
    edited 0.01
    random 0.87
    """
    groups = [
        texts(host, prompts, None if answers is None else answers[i]) for i, prompts in enumerate((desired, undesired))
    ]
    plus, minus = (head_outputs(host, ids, batch_size=batch_size) for ids in groups)
    model, template = host.identity
    found = _directions(plus, minus, "prompt end" if answers is None else "completion end", sign, model, template)
    if not found.kept.any():
        raise InputError(
            "no head has a direction: the means of both groups are equal in all of them",
            cause="desired and undesired examples end alike for the model, for example because they are the same texts",
            next="give examples that differ in what you want to change",
        )
    return found


def _directions(
    plus: NDArray, minus: NDArray, contrast: str, sign: str, model: str | None, template: str | None
) -> HeadDirections:
    """Directions from head outputs (examples, layers, heads, head_dim) of both groups."""
    both = np.concatenate([plus, minus]).astype(np.float64)
    apart = plus.mean(axis=0, dtype=np.float64) - minus.mean(axis=0, dtype=np.float64)
    gap, size = np.linalg.norm(apart, axis=-1), np.sqrt(np.sum(both**2, axis=-1).mean(axis=0))
    real = gap > FAINT * size
    theta = np.where(real[..., None], apart / np.where(real, gap, 1.0)[..., None], 0.0)
    sigma = np.einsum("nlhd,lhd->nlh", both, theta).std(axis=0)
    return HeadDirections(theta, sigma, gap, size, (len(plus), len(minus)), contrast, sign, model, template)


def directions_from(plus: NDArray, minus: NDArray, like: HeadDirections) -> HeadDirections:
    """Directions from recorded head outputs of other examples of the same kind, (examples, layers, heads, head_dim)."""
    return _directions(plus, minus, like.contrast, like.sign, like.model, like.template)


def texts(host: Host, prompts: Sequence[Any], answers: Sequence[Any] | None) -> list[NDArray]:
    """Ids of prompts, each with its answer."""
    ids = host.prompt_ids(prompts)
    if answers is None:
        return ids
    said = [np.asarray(a, dtype=np.int64) for a in answers]
    if len(said) != len(ids) or not all(map(len, said)):
        raise InputError(
            f"{len(ids)} prompts have {sum(len(a) > 0 for a in said)} answers",
            cause="the contrast at the completion's end reads one answer after each prompt",
            next="give the ids of one answer per prompt, the end token included",
        )
    return [np.concatenate(pair) for pair in zip(ids, said)]


def write_head_directions(directions: HeadDirections, path: str | Path) -> None:
    """Write the directions as one safetensors file, with counts, sign and the model's identity in its header.

    Examples
    --------
    >>> from markovsafety import interventions as inside, organism
    >>> host = inside.open_host(organism.model_path("shallow"))
    >>> directions = inside.head_directions(host, organism.prompts(n=12, harmful=False), organism.prompts(n=12))
    >>> inside.write_head_directions(directions, "heads.safetensors")
    >>> inside.read_head_directions("heads.safetensors").sign
    'desired - undesired: positive pushes towards desired'
    """
    about = {k: getattr(directions, k) for k in ("contrast", "sign", "model", "template")}
    about["counts"] = list(directions.counts)
    write_tensors(path, "head directions", {name: getattr(directions, name) for name in ARRAYS}, about)


def read_head_directions(path: str | Path) -> HeadDirections:
    """Read what `write_head_directions` wrote.

    Raises
    ------
    InputError
        The file is missing or holds something else. That the directions belong to another model is found when an edit
        made of them is used.

    Examples
    --------
    >>> from markovsafety import interventions as inside, organism
    >>> host = inside.open_host(organism.model_path("shallow"))
    >>> directions = inside.head_directions(host, organism.prompts(n=12, harmful=False), organism.prompts(n=12))
    >>> inside.write_head_directions(directions, "heads.safetensors")
    >>> again = inside.read_head_directions("heads.safetensors")
    >>> again.counts, np.array_equal(again.theta, directions.theta), again.model == host.identity[0]
    ((12, 12), True, True)
    """
    arrays, about = read_tensors(path, "head directions")
    with making(f"{path} holds only part of the directions", "write it again"):
        typed(about, contrast=str, sign=str, counts=list)
        layers, heads, _ = checked(arrays["theta"], None, None, None, name="theta").shape
        for name in ARRAYS[1:]:
            checked(arrays[name], layers, heads, name=name)
        return HeadDirections(**{name: arrays[name] for name in ARRAYS}, **about)
