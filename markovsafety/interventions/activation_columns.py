"""Rollouts with what the model had in mind: projections of activations on directions, one number per token."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ..errors import InputError
from ..rollouts.rollouts import ACTIVATION, Ragged, Rollouts
from .edits import Edit
from .host import Host
from .record import projections

__all__ = ["with_activations"]


def with_activations(
    host: Host,
    rolls: Rollouts,
    directions: Mapping[str, tuple[int, Any]],
    *,
    edit: Edit | None = None,
    batch_size: int | None = None,
) -> Rollouts:
    """Rollouts with a column ``activation_<name>`` for every direction, so that `ActivationBins` makes states of them.

    Parameters
    ----------
    host : Host
        Of the model whose activations are asked for, as a rule the one that answered.
    rolls : Rollouts
        With their prompts' ids (column ``prompt_tokens``).
    directions : mapping of name -> (level, vector)
        Level of the residual stream, and a vector of shape (width,), used as it is.
    edit : Edit, optional
        What the model is under while it reads. Give the edit under which the answers were sampled to see the states
        that they were sampled from; without it the plain model reads them.
    batch_size : int, optional

    Returns
    -------
    Rollouts
        Entry i of an answer is the projection at the position that predicts its token i; entry 0 belongs to the last
        prompt token. Forced tokens have it as well. The provenance names level and edit.

    Raises
    ------
    InputError
        No direction, prompts that are not known, a vector of another width, or no such level.

    Examples
    --------
    Every token knows how far along the direction the model was when it chose it, and bins of that are states:

    >>> from markovsafety.interventions import difference, open_host, with_activations
    >>> host = open_host(ms.organism.model_path("shallow"))
    >>> asked, harmless = ms.organism.prompts(n=12), ms.organism.prompts(n=12, harmful=False)
    >>> v = difference(host, asked, harmless, position="t_post").vectors[3]
    >>> rolls = ms.sample(host.engine, asked, n=2, max_tokens=8, judge="organism")
    >>> rolls = with_activations(host, rolls, {"harm": (3, v)})
    >>> ms.count(rolls, ms.ActivationBins.from_rollouts(rolls, ["harm"], bins=4))
    <Counts ActivationBins(harm: 4; ...): 24 rollouts (...) of 12 prompts, prefill 0; 4
    states, ... transitions>
    """
    if not directions or "prompt_tokens" not in rolls.columns:
        raise InputError(
            "no directions are given" if not directions else "the rollouts do not hold their prompts",
            cause="a column of projections belongs to one direction"
            if not directions
            else "the model has to read prompt and answer again, and there is no column prompt_tokens",
            next='give {"harm": (level, vector), ...}' if not directions else "sample with this package",
        )
    vectors: dict[str, tuple[int, np.ndarray]] = {}
    for name, (level, vector) in directions.items():
        array = np.asarray(vector, dtype=np.float32)
        if array.shape != (host.width,) or not np.isfinite(array).all():
            raise InputError(
                f"direction {name!r} has shape {array.shape}, or numbers that are not finite",
                cause=f"the residual stream of this model has {host.width} dimensions",
                next="give a vector of this model",
            )
        vectors[name] = (int(level), array)
    asked: Ragged = rolls.columns["prompt_tokens"]
    found = projections(host, list(asked), list(rolls.answers()), vectors, edit=edit, batch_size=batch_size)
    columns = {
        f"{ACTIVATION}{name}": np.concatenate([np.zeros(0, np.float32), *values]) for name, values in found.items()
    }
    told = {
        "levels": {name: level for name, (level, _) in vectors.items()},
        "model": host.identity[0],
        "edit": None if edit is None else edit.describe()["sha256"],
    }
    return rolls.replace(columns={**rolls.columns, **columns}, provenance={**rolls.provenance, "activations": told})
