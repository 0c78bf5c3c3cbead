"""Edits as data: what is added where, at which positions, for which model; without torch, so that any engine reads it.

An `Edit` is a tuple of `Part`s. It says nothing of hooks: an engine binds it to its model (``edit.bind(engine)``), and
``ms.sample(..., edit=edit)`` samples under it. Parts act in their order, so that edits can be added; ``2 * edit`` and
``-edit`` scale.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ..errors import InputError
from ..reading import making
from .storage import read_tensors, typed, write_tensors

__all__ = ["ANSWER", "Edit", "Part", "check_identity", "identity", "read_edit", "write_edit"]

Kind = Literal["add", "project", "head", "tilt"]
When = Literal["prompt", "answer", "every"]
KINDS = ("add", "project", "head", "tilt")
WHEN = ("prompt", "answer", "every")
ANSWER = (0, 0)
"""Positions of an edit that leaves the prompt alone."""


@dataclass(frozen=True, eq=False)
class Part:
    """One change of the model.

    Parameters
    ----------
    kind : {"add", "project", "head", "tilt"}
        "add": scale * vector is added to the residual stream. "project": the share `scale` of the component along
        vector is taken out of it. "head": scale * vector is added to what one attention head hands to the output
        projection. "tilt": scale * vector is added to the logits.
    vector : float32 array
        Shape (width,), for a head (head_dim,), for a tilt (vocab,), or (steps, vocab): one row for each of the first
        answer tokens, nothing after them.
    layer : int
        "add", "project": level of the residual stream, 0 before the first block, L behind the last; "head": block.
    head : int
        Query head; grouped key-value heads do not matter at this site.
    scale : float
    where : (int, int or None)
        Slice over the prompt's tokens, negative numbers from its end: (-1, None) is the last prompt token.
    when : {"prompt", "answer", "every"}
        At those prompt positions only (one forward pass: "prefill only" in the papers); at every position of the
        answer only, forced tokens included; or at both.

    Examples
    --------
    At every position, the opposite of a vector is added to the stream between the second and the third block:

    >>> ms.interventions.Part("add", [3.0, 4.0], layer=2, scale=-1, when="every")
    <Part: add x-1 at layer 2 (every)>
    """

    kind: Kind
    vector: np.ndarray
    layer: int = 0
    head: int = 0
    scale: float = 1.0
    where: tuple[int, int | None] = (-1, None)
    when: When = "prompt"

    def __post_init__(self):
        vector = np.array(self.vector, dtype=np.float32)
        vector.flags.writeable = False
        object.__setattr__(self, "vector", vector)
        object.__setattr__(self, "scale", float(self.scale))
        object.__setattr__(self, "where", (int(self.where[0]), None if self.where[1] is None else int(self.where[1])))
        if self.kind not in KINDS or self.when not in WHEN:
            raise InputError(
                f"there is no edit of kind {self.kind!r} at {self.when!r}",
                cause=f"kinds are {', '.join(KINDS)}; when is {', '.join(WHEN)}",
                next="use one of these",
            )
        if vector.ndim not in ((1, 2) if self.kind == "tilt" else (1,)) or not vector.size:
            raise InputError(
                f"the vector of an edit of kind {self.kind!r} has shape {vector.shape}",
                cause="one number per dimension is needed; a tilt may have one row per answer token",
                next="give a vector",
            )
        with np.errstate(over="ignore", invalid="ignore"):
            finite = np.isfinite(vector * np.float32(self.scale)).all()
        if not finite:
            raise InputError(
                "an edit holds numbers that are not finite",
                cause="nan or infinity in the vector or the scale; perhaps a direction was divided by its zero norm",
                next="check the direction that it was made from",
            )
        if self.kind == "project" and not np.linalg.norm(vector):
            raise InputError(
                "nothing can be projected out along a zero vector",
                cause="it has no direction",
                next="check the direction that the edit was made from",
            )

    def __str__(self) -> str:
        at = "the logits" if self.kind == "tilt" else f"layer {self.layer}"
        head = f" head {self.head}" if self.kind == "head" else ""
        return f"{self.kind} x{self.scale:g} at {at}{head} ({self.when})"

    def __repr__(self) -> str:
        return f"<Part: {self}>"

    def describe(self) -> dict[str, Any]:
        """JSON-able: everything but the vector itself, whose norm and shape are there."""
        named = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "vector"}
        norm = float(np.linalg.norm(self.vector))
        return {**named, "where": list(self.where), "shape": list(self.vector.shape), "norm": norm}


@dataclass(frozen=True, eq=False)
class Edit:
    """What changes a model while it runs.

    Parameters
    ----------
    parts : tuple of Part
    model : str or None
        Identity of the weights it was made for (`identity`); None fits any model of the right shape.
    template : str or None
        SHA-256 of the chat template that its positions were read from.
    sign : str
        What a positive scale means, such as "harmful - harmless: positive pushes towards harmful".
    about : dict
        JSON-able: where the vectors come from.

    Examples
    --------
    >>> from markovsafety.interventions import Edit, Part
    >>> steer, ablate = Edit((Part("add", [3.0, 4.0], layer=2),)), Edit((Part("project", [0.0, 1.0], layer=1),))
    >>> edit = -0.5 * steer + ablate
    >>> edit
    <Edit: add x-0.5 at layer 2 (prompt), project x1 at layer 1 (prompt)>
    >>> [round(part["norm"], 6) for part in edit.control().describe()["parts"]]
    [5.0, 1.0]
    """

    parts: tuple[Part, ...]
    model: str | None = None
    template: str | None = None
    sign: str = ""
    about: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        object.__setattr__(self, "parts", tuple(self.parts))

    def __add__(self, other: Edit) -> Edit:
        """Both, this one first."""
        if not isinstance(other, Edit):
            return NotImplemented
        for name in ("model", "template"):
            mine, theirs = getattr(self, name), getattr(other, name)
            if None not in (mine, theirs) and mine != theirs:
                raise InputError(
                    f"edits of different {name}s cannot be added",
                    cause=f"one belongs to {mine[:12]}, the other to {theirs[:12]}",
                    next="make both with the same model",
                )
        return Edit(
            (*self.parts, *other.parts),
            self.model or other.model,
            self.template or other.template,
            "; ".join(dict.fromkeys(s for s in (self.sign, other.sign) if s)),
            {**self.about, **other.about},
        )

    def __mul__(self, factor: float) -> Edit:
        """Every part scaled."""
        parts = tuple(dataclasses.replace(p, scale=p.scale * float(factor)) for p in self.parts)
        return dataclasses.replace(self, parts=parts)

    __rmul__ = __mul__

    def __neg__(self) -> Edit:
        return self * -1.0

    def __repr__(self) -> str:
        return f"<Edit: {', '.join(map(str, self.parts)) or 'nothing'}>"

    def transferred(self) -> Edit:
        """The same edit for any model of the same shape, for example a fine-tuned copy."""
        return dataclasses.replace(self, model=None, template=None)

    def control(self, seed: int = 0) -> Edit:
        """The same edit along random vectors of the same norms; a tilt's numbers change places in the vocabulary.

        What it does comes from the size of the edit alone, so no effect is read without it.
        """
        rng = np.random.default_rng(seed)
        parts = tuple(dataclasses.replace(p, vector=_random(p, rng)) for p in self.parts)
        return dataclasses.replace(self, parts=parts, sign="none: random", about={**self.about, "control": seed})

    def describe(self) -> dict[str, Any]:
        """JSON-able; ``sha256`` covers the vectors too."""
        parts = [p.describe() for p in self.parts]
        digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode())
        for part in self.parts:
            digest.update(part.vector.tobytes())
        return {
            "sha256": digest.hexdigest(),
            "parts": parts,
            "model": self.model,
            "template": self.template,
            "sign": self.sign,
        }

    def check(self, engine: Any, *, layers: int, heads: int, head_dim: int, width: int, vocab: int) -> None:
        """Raise unless this edit was made for the model of an engine (or host), and fits its sizes.

        Raises
        ------
        InputError
            Other weights, another template, or a vector, layer or head that does not fit.
        """
        check_identity(self.model, self.template, engine, "the edit", "edit.transferred()")
        for part in self.parts:
            size = {"head": head_dim, "tilt": vocab}.get(part.kind, width)
            last = layers - (part.kind == "head")
            given = part.vector.shape[-1]
            wrong = given > size if part.kind == "tilt" else given != size
            if wrong or not 0 <= part.layer <= last or not 0 <= part.head < heads:
                raise InputError(
                    f"an edit of kind {part.kind!r} at layer {part.layer}, head {part.head} with {given} numbers does "
                    "not fit the model",
                    cause=f"it has layers 0..{last}, heads 0..{heads - 1}, and {size} numbers there",
                    next="make the edit with this model",
                )

    def bind(self, engine: Any) -> Any:
        """This edit on the model of an engine; what ``sample(edit=...)`` calls.

        Raises
        ------
        InputError
            The edit was made for other weights, or its vectors do not fit.
        ModelError
            The model's structure is not understood.
        """
        from .hooks import Attached

        return Attached.of(self, engine)


def _random(part: Part, rng: np.random.Generator) -> np.ndarray:
    if part.kind == "tilt":
        return part.vector[..., rng.permutation(part.vector.shape[-1])]
    drawn = rng.standard_normal(part.vector.shape)
    return drawn * (np.linalg.norm(part.vector) / np.linalg.norm(drawn))


def identity(engine: Any) -> tuple[str, str | None]:
    """Identity of an engine's weights and SHA-256 of its chat template.

    Parameters
    ----------
    engine : Engine
        With ``describe()``: the hash of the folder's weights, else the model's name and revision.
    """
    told = engine.describe()
    weights = told.get("weights")
    model = weights["sha256"] if weights else f"{told.get('model')}@{told.get('revision')}"
    return model, told.get("template_hash")


def check_identity(model: str | None, template: str | None, engine: Any, what: str, anyway: str = "") -> None:
    """Raise unless what was made with a model and a template belongs to an engine or host.

    Parameters
    ----------
    model, template : str or None
        Identities; None fits any.
    engine : Engine or Host
    what : str
        Such as "the direction": named in the error.
    anyway : str
        What to say where it is meant for another model too.

    Raises
    ------
    InputError
        Other weights, or another chat template.
    """
    here = engine.identity if hasattr(engine, "identity") else identity(engine)
    for name, mine, theirs in zip(("weights", "chat template"), (model, template), here):
        if None not in (mine, theirs) and mine != theirs:
            raise InputError(
                f"{what} was made for another model: its {name} differ",
                cause=f"it belongs to {str(mine)[:12]}, the model here is {str(theirs)[:12]}",
                next="make it again with this model"
                + (f", or say {anyway} if you mean to try it here" if anyway else ""),
            )


def write_edit(edit: Edit, path: str | Path) -> None:
    """Write an edit as one safetensors file, its description in the header.

    Parameters
    ----------
    edit : Edit
    path : path

    Examples
    --------
    >>> from markovsafety.interventions import Edit, Part, read_edit, write_edit
    >>> write_edit(Edit((Part("add", [3.0, 4.0], layer=2),), sign="positive: refuses"), "refuse.safetensors")
    >>> read_edit("refuse.safetensors").sign
    'positive: refuses'
    """
    about = {
        "parts": [p.describe() for p in edit.parts],
        **{k: getattr(edit, k) for k in ("model", "template", "sign", "about")},
    }
    write_tensors(path, "edit", {f"part{i}": p.vector for i, p in enumerate(edit.parts)}, about)


def read_edit(path: str | Path) -> Edit:
    """Read what `write_edit` wrote.

    Raises
    ------
    InputError
        The file is missing or holds no edit.

    Examples
    --------
    >>> from markovsafety.interventions import Edit, Part, read_edit, write_edit
    >>> write_edit(Edit((Part("add", [3.0, 4.0], layer=2),)), "refuse.safetensors")
    >>> 2 * read_edit("refuse.safetensors")
    <Edit: add x2 at layer 2 (prompt)>
    """
    arrays, about = read_tensors(path, "edit")
    with making(f"{path} holds only part of an edit", "write it again"):
        parts = tuple(
            Part(vector=arrays[f"part{i}"], **{k: p[k] for k in ("kind", "layer", "head", "scale", "where", "when")})
            for i, p in enumerate(about["parts"])
        )
        typed(about, model=str | None, template=str | None, sign=str, about=dict)
        return Edit(parts, about["model"], about["template"], about["sign"], about["about"])
