"""Directions: what changes in the residual stream between two kinds of prompts, level by level.

Harmfulness is the difference in means between harmful and harmless prompts at t_inst, refusal that between refused and
accepted ones at t_post (arXiv 2507.11878, section 2). A `Direction` is data: which vectors, read where, from how many
prompts of which kinds, and what a positive scale means.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import InputError
from ..reading import making
from .edits import Edit, Part, When, check_identity
from .positions import Span
from .storage import read_tensors, write_tensors

if TYPE_CHECKING:
    from .host import Host

__all__ = ["POSITIONS", "Direction", "Position", "read_direction", "write_direction"]

POSITIONS = ("t_inst", "t_post")
Position = str | int
"""t_inst, t_post, or the index of a prompt token, negative from the end."""


@dataclass(frozen=True, eq=False)
class Direction:
    """A difference in means at one position, at every level of the residual stream.

    Parameters
    ----------
    vectors : float32 array, shape (levels, width)
        Not normalised: a scale of 1 carries the one mean onto the other.
    position : "t_inst", "t_post" or int
        Where it was read.
    names : (str, str)
        What a positive and a negative scale push towards.
    counts : (int, int)
        Prompts behind either mean.
    where : (int, int or None)
        Prompt tokens that `edit` changes by default: for t_inst all of the instruction, for t_post the last one.
    level : int or None
        The level to act at; None until one was chosen (`choose_level`).
    model, template : str or None
        Identity of the model and SHA-256 of its chat template (`edits.identity`); None fits any of the same shape.
    about : dict
        JSON-able: balance, category, how the level was chosen.

    Raises
    ------
    InputError
        Vectors that are no finite table, a level that there is not.

    Examples
    --------
    >>> names = ("harmful", "harmless")
    >>> direction = ms.Direction([[0.0, 0.0], [3.0, 4.0]], "t_post", names, counts=(8, 8), level=1)
    >>> direction
    <Direction harmful - harmless: positive pushes towards harmful; at t_post, level 1,
    from 8 + 8 prompts>
    >>> direction.unit, direction.edit(2.0)
    (array([0.6, 0.8], dtype=float32), <Edit: add x2 at layer 1 (prompt)>)
    """

    vectors: np.ndarray
    position: Position
    names: tuple[str, str]
    counts: tuple[int, int]
    where: Span = (-1, None)
    level: int | None = None
    model: str | None = None
    template: str | None = None
    about: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        vectors = np.array(self.vectors, dtype=np.float32)
        vectors.flags.writeable = False
        object.__setattr__(self, "vectors", vectors)
        for name in ("names", "counts", "where"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if vectors.ndim != 2 or not vectors.size or not np.isfinite(vectors).all():
            raise InputError(
                f"the vectors of a direction have shape {vectors.shape}, or are not finite",
                cause="a direction has one vector of finite numbers per level of the residual stream",
                next="make it with difference()",
            )
        if self.level is not None:
            self._check(self.level)

    def __repr__(self) -> str:
        level = "no level chosen" if self.level is None else f"level {self.level}"
        plus, minus = self.counts
        return f"<Direction {self.sign}; at {self.position}, {level}, from {plus} + {minus} prompts>"

    @property
    def sign(self) -> str:
        """What a positive scale means, in words."""
        return f"{self.names[0]} - {self.names[1]}: positive pushes towards {self.names[0]}"

    @property
    def norms(self) -> np.ndarray:
        """Length of the vector of every level, float64 (levels,)."""
        return np.linalg.norm(self.vectors.astype(np.float64), axis=1)

    @property
    def unit(self) -> np.ndarray:
        """The vector of the chosen level with norm 1, float32 (width,).

        Raises
        ------
        InputError
            No level was chosen, or the vector is zero there.
        """
        vector = self.vector()
        return vector / np.float32(np.linalg.norm(vector))

    def vector(self, level: int | None = None) -> np.ndarray:
        """The vector of a level (of the chosen one by default), float32 (width,).

        Raises
        ------
        InputError
            No level was chosen, there is no such level, or the vector is zero there.
        """
        chosen = self.level if level is None else level
        if chosen is None:
            raise InputError(
                "no level of this direction was chosen",
                cause="it has one vector per level, and steers at one of them",
                next="give level=, or choose by what it causes: choose_level(...)",
            )
        if not np.any(self.vectors[self._check(chosen)]):
            raise InputError(
                f"the direction is zero at level {chosen}",
                cause=f"both kinds of prompts have the same mean there: at {self.position} they share one token, "
                "and nothing before this level looks at others",
                next="take a higher level",
            )
        return self.vectors[chosen]

    def at(self, level: int) -> Direction:
        """The same direction with this level chosen."""
        return dataclasses.replace(self, level=int(level))

    def edit(
        self, scale: float = 1.0, level: int | None = None, *, where: Span | None = None, when: When = "prompt"
    ) -> Edit:
        """Add this direction to the residual stream.

        Parameters
        ----------
        scale : float
            In units of the difference in means; the paper steers with 1, its released inversion with 2.
        level : int, optional
            By default the chosen one.
        where : (int, int or None), optional
            Prompt tokens to change; by default `Direction.where`.
        when : "prompt", "answer" or "every"

        Returns
        -------
        Edit

        Raises
        ------
        InputError
            As `vector`.
        """
        chosen = self.level if level is None else level
        vector = self.vector(level)
        assert chosen is not None
        part = Part("add", vector, int(chosen), 0, scale, self.where if where is None else where, when)
        about = {"direction": {**self.about, "position": self.position, "counts": list(self.counts)}}
        return Edit((part,), self.model, self.template, self.sign, about)

    def transferred(self) -> Direction:
        """The same direction for any model of the same shape, for example a fine-tuned copy."""
        return dataclasses.replace(self, model=None, template=None)

    def control(self, seed: int = 0) -> Direction:
        """Random vectors of the same norms: what they do comes from the size alone."""
        rng = np.random.default_rng(seed)
        drawn = rng.standard_normal(self.vectors.shape)
        drawn *= (self.norms / np.linalg.norm(drawn, axis=1))[:, None]
        about = {**self.about, "control": seed}
        return dataclasses.replace(self, vectors=drawn, names=("random", "random"), about=about)

    def _check(self, level: int) -> int:
        if not 0 <= level < len(self.vectors):
            raise InputError(
                f"the direction has no level {level}",
                cause=f"it has the levels 0 to {len(self.vectors) - 1}",
                next="choose one of these",
            )
        return int(level)


def write_direction(direction: Direction, path: str | Path) -> None:
    """Write a direction as one safetensors file, its description in the header.

    Parameters
    ----------
    direction : Direction
    path : path

    Examples
    --------
    >>> from markovsafety.interventions import Direction, read_direction, write_direction
    >>> direction = Direction([[0.0, 0.0], [3.0, 4.0]], "t_post", ("harmful", "harmless"), counts=(8, 8))
    >>> write_direction(direction.at(1), "harm.safetensors")
    >>> read_direction("harm.safetensors").level
    1
    """
    about = {f.name: getattr(direction, f.name) for f in dataclasses.fields(direction) if f.name != "vectors"}
    write_tensors(path, "direction", {"vectors": direction.vectors}, about)


def read_direction(path: str | Path, host: Host | None = None) -> Direction:
    """Read what `write_direction` wrote.

    Parameters
    ----------
    path : path
    host : Host, optional
        The model that it is wanted for.

    Raises
    ------
    InputError
        The file is missing or holds no direction, or it was made with another model or template than the host's.

    Examples
    --------
    A direction belongs to the model that it was made with:

    >>> from markovsafety.interventions import Direction, open_host, read_direction, write_direction
    >>> direction = Direction(np.ones((5, 64)), "t_post", ("harmful", "harmless"), counts=(8, 8), model="1f0c")
    >>> write_direction(direction, "v.safetensors")
    >>> read_direction("v.safetensors", open_host(ms.organism.model_path("shallow")))
    Traceback (most recent call last):
    markovsafety.errors.InputError: the direction in v.safetensors was made for another model: its weights differ
      cause: it belongs to 1f0c, the model here is ...
      next:  make it again with this model, or say .transferred() if you mean to try it here
    """
    arrays, about = read_tensors(path, "direction")
    with making(f"{path} holds only part of a direction", "write it again"):
        made = Direction(arrays["vectors"], **{f.name: about[f.name] for f in dataclasses.fields(Direction)[1:]})
    if host is not None:
        check_identity(made.model, made.template, host, f"the direction in {path}", ".transferred()")
    return made
