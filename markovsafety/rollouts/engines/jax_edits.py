"""Edits in the JAX engine: vectors that ride along with the parameters of the layer they act on.

Kinds, positions and signs are those of an edit's parts (`interventions.edits.Part`, read here as plain attributes).
While whole sequences are read a mask says which positions are edited; while tokens are appended every row is an answer.
The values are arguments of the compiled programs, so that another scale compiles nothing anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ...errors import InputError
from .llama_folder import LlamaConfig

__all__ = ["Place", "Signature", "edited_params", "shifted", "signature", "with_shapes"]

Signature = tuple[tuple[str, int], ...]
"""Kind and level of every part: what of an edit changes the programs."""
NAMES = {"add": "shift", "project": "shift", "head": "heads"}


@dataclass(frozen=True, eq=False)
class Place:
    """Where whole sequences stand, padded on the right: positions (batch, token), lengths and prompt sizes (batch,)."""

    positions: jax.Array
    lengths: jax.Array
    prompt: jax.Array


def signature(parts: Sequence[Any]) -> Signature:
    """What of an edit changes the programs."""
    return tuple((part.kind, -1 if part.kind == "tilt" else int(part.layer)) for part in parts)


def edited_params(params: dict[str, Any], config: LlamaConfig, parts: Sequence[Any], place: Any) -> dict[str, Any]:
    """Parameters with the vectors of an edit's parts in them, put where `place` (a sharding) says.

    Raises
    ------
    InputError
        A tilt with one row per answer token, which this engine does not have.
    """

    def entry(part: Any) -> dict[str, Any]:
        vector = np.array(part.vector, np.float32)
        if part.kind == "head":
            wide = np.zeros((config.heads, config.head_dim), np.float32)
            wide[part.head] = vector
            vector = wide.reshape(-1)
        start, stop = part.where
        found = {
            "span": np.array([start, 0 if stop is None else stop], np.int32),
            "on": np.array([part.when != "answer" and part.where != (0, 0), part.when != "prompt"], np.float32),
        }
        if part.kind == "project":
            unit = vector / np.linalg.norm(vector)
            return found | {"along": unit, "vector": -np.float32(part.scale) * unit}
        return found | {"vector": vector * np.float32(part.scale)}

    if any(part.kind == "tilt" and np.ndim(part.vector) == 2 for part in parts):
        raise InputError(
            "the jax engine has no tilt that differs by answer token",
            cause="its programs know no number of tokens said",
            next='use engine="transformers"',
        )
    made = {"layers": [dict(layer) for layer in params["layers"]]}
    for part in parts:
        if part.kind == "tilt":
            bias = np.zeros(config.vocab, np.float32)
            bias[: len(part.vector)] = np.array(part.vector) * np.float32(part.scale)
            made["tilt"] = [*made.get("tilt", []), jax.device_put(bias, place)]
            continue
        home = made if part.layer == config.layers and part.kind != "head" else made["layers"][part.layer]
        home[NAMES[part.kind]] = [*home.get(NAMES[part.kind], []), jax.device_put(entry(part), place)]
    return {**params, **made}


def with_shapes(params: dict[str, Any], config: LlamaConfig, sign: Signature, sharding: Any) -> dict[str, Any]:
    """Shapes of `edited_params`, from those of the plain parameters."""

    def real(size: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((size,), jnp.float32, sharding=sharding)

    def entry(kind: str) -> dict[str, Any]:
        size = config.heads * config.head_dim if kind == "head" else config.width
        shape = {"span": jax.ShapeDtypeStruct((2,), jnp.int32, sharding=sharding), "on": real(2), "vector": real(size)}
        return shape | ({"along": real(size)} if kind == "project" else {})

    made: dict[str, Any] = {"layers": [dict(layer) for layer in params["layers"]]}
    for kind, level in sign:
        if kind == "tilt":
            made["tilt"] = [*made.get("tilt", []), real(config.vocab)]
            continue
        home = made if level == config.layers and kind != "head" else made["layers"][level]
        home[NAMES[kind]] = [*home.get(NAMES[kind], []), entry(kind)]
    return {**params, **made}


def shifted(x: jax.Array, parts: Sequence[dict[str, Any]], place: Place | None) -> jax.Array:
    """Activations with the parts of one site applied in their order; without a place, every row is an answer."""
    for part in parts:
        on = part["on"][1] if place is None else _mask(part, place)[..., None]
        step = part["vector"]
        if "along" in part:
            step = jnp.matmul(x.astype(jnp.float32), part["along"], precision="highest")[..., None] * step
        x = x + (on * step).astype(x.dtype)
    return x


def _mask(part: dict[str, Any], place: Place) -> jax.Array:
    """1 where a part acts, (batch, token): its slice of the prompt, cut as Python does, and the answer."""
    start, stop = part["span"]
    at, prompt = place.positions, place.prompt[:, None]
    first = jnp.where(start >= 0, start, jnp.maximum(prompt + start, 0))
    last = jnp.where(stop > 0, jnp.minimum(stop, prompt), prompt + stop)
    inside = (at >= first) & (at < last)
    answer = (at >= prompt) & (at < place.lengths[:, None])
    return part["on"][0] * inside + part["on"][1] * answer
