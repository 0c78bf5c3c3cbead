"""Model folders of the Llama family, read without torch: config.json into `LlamaConfig`, safetensors into arrays.

Read here: Llama 2 and 3, Mistral, Qwen2, Qwen3, with grouped-query attention, explicit head size, biases, query and key
norms, tied embeddings, and rotary embeddings that are plain, "linear" or "llama3" in either spelling of the config
(``rope_theta`` and ``rope_scaling``, or ``rope_parameters``). Whatever else a folder asks for is refused by name: a
model that runs with one option ignored gives wrong probabilities without a word.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from ...errors import ModelError
from ...reading import making, parsed
from .folder import named_in

__all__ = ["LlamaConfig", "UnsupportedModel", "read_config", "read_weights"]


class UnsupportedModel(ModelError):
    """A model that is sound, but that this engine does not have."""


# What transformers assumes where config.json is silent (its configuration classes, 4.57 and 5.x alike).
DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": None, "max_position_embeddings": 2048, "head_dim": None, "sliding_window": None},
    "mistral": {"num_key_value_heads": 8, "max_position_embeddings": 131072, "head_dim": None, "sliding_window": 4096},
    "qwen2": {"num_key_value_heads": 32, "max_position_embeddings": 32768, "head_dim": None, "sliding_window": 4096},
    "qwen3": {"num_key_value_heads": 32, "max_position_embeddings": 32768, "head_dim": 128, "sliding_window": 4096},
}
REQUIRED = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
LARGEST, WIDEST = 1 << 31, 1 << 16
"""No size of a model is larger, and no head wider: a damaged file is not asked to be computed."""


@dataclass(frozen=True)
class LlamaConfig:
    """The shape of a Llama-family model; hashable, so that compiled programs can be kept by it.

    Parameters
    ----------
    family : {"llama", "mistral", "qwen2", "qwen3"}
    vocab, width, layers, heads, kv_heads, head_dim, mlp : int
        Vocabulary, hidden size, layers, query heads, key-value heads, size of a head, width of the MLP.
    eps : float
        Of the RMS norms.
    tied : bool
        The output layer is the embedding.
    context : int
        Number of positions.
    window : int or None
        Sliding attention window in tokens; up to this length it makes no difference.
    inv_freq : tuple of float, length head_dim / 2
        Rotary frequencies after scaling, radians per token.
    qkv_bias, out_bias, mlp_bias, qk_norm : bool
        Which of the optional parameters exist.
    """

    family: str
    vocab: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    eps: float
    tied: bool
    context: int
    window: int | None
    inv_freq: tuple[float, ...]
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False

    @property
    def reach(self) -> int:
        """Longest sequence that full attention computes as the model defines it."""
        return self.context if self.window is None else min(self.context, self.window)


def read_config(folder: str | Path) -> LlamaConfig:
    """Read config.json.

    Raises
    ------
    UnsupportedModel
        Another architecture, or an option this engine does not have.
    ModelError
        The folder or its config.json is missing, broken or incomplete.
    """
    folder = Path(folder)
    path = folder / "config.json"
    if not path.is_file():
        what = f"{path} is missing" if folder.is_dir() else f"{folder} is not a folder"
        raise ModelError(what, cause="wrong path, or a copy that stopped half-way", next="give a model folder")
    try:
        raw = parsed(path.read_bytes())
    except ValueError as error:
        raise ModelError(f"{path} is not JSON", cause=f"half-written? {error}", next="copy the file again") from error
    with making(f"{path} describes no model", "copy the model's own config.json", ModelError):
        return _config(path, raw)


def _config(path: Path, raw: Any) -> LlamaConfig:
    family = _check_supported(path, raw)
    missing = [name for name in REQUIRED if not isinstance(raw.get(name), int) or not 0 < raw[name] < LARGEST]
    if missing:
        raise ModelError(
            f"{path} does not say {', '.join(missing)}",
            cause="the shape of the weights cannot be known without it",
            next="copy the model's own config.json",
        )
    values = {**DEFAULTS[family], **raw}
    heads = raw["num_attention_heads"]
    head_dim = values["head_dim"] or raw["hidden_size"] // heads
    sizes = (head_dim, values["num_key_value_heads"] or heads, values["max_position_embeddings"])
    if not all(isinstance(size, int) and 0 < size < LARGEST for size in sizes) or head_dim > WIDEST:
        raise ValueError(f"sizes of heads and positions are {sizes}")
    bias = bool(raw.get("attention_bias", False)) and family in ("llama", "qwen3")
    return LlamaConfig(
        family=family,
        vocab=raw["vocab_size"],
        width=raw["hidden_size"],
        layers=raw["num_hidden_layers"],
        heads=heads,
        kv_heads=values["num_key_value_heads"] or heads,
        head_dim=head_dim,
        mlp=raw["intermediate_size"],
        eps=float(raw.get("rms_norm_eps", 1e-6)),
        tied=bool(raw.get("tie_word_embeddings", False)),
        context=values["max_position_embeddings"],
        window=_window(family, values),
        inv_freq=_frequencies(path, raw, head_dim, values["max_position_embeddings"]),
        qkv_bias=bias or family == "qwen2",
        out_bias=bias,
        mlp_bias=bool(raw.get("mlp_bias", False)) and family == "llama",
        qk_norm=family == "qwen3",
    )


def _unsupported(path: Path, what: str) -> UnsupportedModel:
    return UnsupportedModel(
        f"the jax engine does not have {what}",
        cause=f"{path} asks for it; here are {', '.join(DEFAULTS)} with silu and plain, linear or llama3 rotation",
        next="use engine='transformers' (pip install 'markovsafety[models]')",
    )


def _check_supported(path: Path, raw: Mapping[str, Any]) -> str:
    family = raw.get("model_type")
    if family not in DEFAULTS:
        raise _unsupported(path, f"the architecture {family!r}")
    wrong = [name for name in raw.get("architectures") or [] if not name.endswith("ForCausalLM")]
    if wrong:
        raise _unsupported(path, f"the architecture {wrong[0]}")
    if raw.get("hidden_act", "silu") not in ("silu", "swish"):
        raise _unsupported(path, f"the activation {raw['hidden_act']!r}")
    attention = raw.get("attn_implementation")
    if attention not in (None, "eager", "sdpa") and not str(attention).startswith("flash_attention"):
        raise _unsupported(path, f"the attention {attention!r}")  # one of the model's own, which may hide positions
    for name in ("quantization_config", "compression_config"):
        if raw.get(name):
            raise _unsupported(path, f"quantised weights ({name})")
    for name in ("num_experts", "num_local_experts"):
        if raw.get(name):
            raise _unsupported(path, f"mixtures of experts ({name})")
    return str(family)


def _window(family: str, values: Mapping[str, Any]) -> int | None:
    kinds = values.get("layer_types")
    if kinds is not None and "sliding_attention" not in kinds:
        return None
    if family in ("qwen2", "qwen3") and kinds is None and not values.get("use_sliding_window", False):
        return None
    return values["sliding_window"]


def _frequencies(path: Path, raw: Mapping[str, Any], head_dim: int, context: int) -> tuple[float, ...]:
    """Rotary frequencies, computed in float32 as transformers does."""
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if any(isinstance(value, dict) for value in rope.values()):
        raise _unsupported(path, "a different rotary embedding per kind of layer")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "linear", "llama3"):
        raise _unsupported(path, f"the rotary embedding {kind!r}")
    if rope.get("partial_rotary_factor", raw.get("partial_rotary_factor", 1.0)) not in (1, 1.0, None):
        raise _unsupported(path, "rotary embedding of a part of the head (partial_rotary_factor)")
    theta = rope.get("rope_theta", raw.get("rope_theta", 10000.0))
    exponent = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    try:
        with np.errstate(all="ignore"):  # what is no frequency is refused below
            freq = np.float32(1) / np.power(np.float32(theta), exponent)
            if kind == "linear":
                freq = freq / np.float32(rope["factor"])
            elif kind == "llama3":
                freq = _llama3(freq, rope, context)
    except KeyError as error:
        raise ModelError(
            f"{path}: the {kind} rotary embedding lacks {error}",
            cause="this kind of rotation has parameters of its own",
            next="copy the model's own file",
        ) from error
    if not (np.isfinite(freq) & (freq > 0)).all():
        raise ModelError(
            f"{path}: the rotary embedding has frequencies that are no positive numbers",
            cause=f"rope_theta is {str(theta)[:40]}" + "".join(f", {k} {str(v)[:20]}" for k, v in rope.items()),
            next="copy the model's own file",
        )
    return tuple(float(f) for f in freq)


def _llama3(freq: np.ndarray, rope: Mapping[str, Any], context: int) -> np.ndarray:
    """Llama 3.1's scaling: long wavelengths divided by `factor`, short ones kept, a ramp between (float32)."""
    factor, low, high = rope["factor"], rope["low_freq_factor"], rope["high_freq_factor"]
    old = rope.get("original_max_position_embeddings") or context
    wavelength = np.float32(2 * math.pi) / freq
    ramp = (np.float32(old) / wavelength - np.float32(low)) / np.float32(high - low)
    between = (1 - ramp) * freq / np.float32(factor) + ramp * freq
    scaled = np.where(wavelength > old / low, freq / np.float32(factor), between)
    return np.where(wavelength < old / high, freq, scaled).astype(np.float32)


def expected_shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of the checkpoint and its shape."""
    c = config
    query, key = c.heads * c.head_dim, c.kv_heads * c.head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (c.vocab, c.width),
        "model.norm.weight": (c.width,),
    }
    if not c.tied:
        shapes["lm_head.weight"] = (c.vocab, c.width)
    for i in range(c.layers):
        p = f"model.layers.{i}."
        shapes[p + "input_layernorm.weight"] = shapes[p + "post_attention_layernorm.weight"] = (c.width,)
        for name, rows in {"q": query, "k": key, "v": key}.items():
            shapes[f"{p}self_attn.{name}_proj.weight"] = (rows, c.width)
            if c.qkv_bias:
                shapes[f"{p}self_attn.{name}_proj.bias"] = (rows,)
        shapes[p + "self_attn.o_proj.weight"] = (c.width, query)
        if c.out_bias:
            shapes[p + "self_attn.o_proj.bias"] = (c.width,)
        if c.qk_norm:
            shapes[p + "self_attn.q_norm.weight"] = shapes[p + "self_attn.k_norm.weight"] = (c.head_dim,)
        for name, (rows, columns) in {
            "gate": (c.mlp, c.width),
            "up": (c.mlp, c.width),
            "down": (c.width, c.mlp),
        }.items():
            shapes[f"{p}mlp.{name}_proj.weight"] = (rows, columns)
            if c.mlp_bias:
                shapes[f"{p}mlp.{name}_proj.bias"] = (rows,)
    return shapes


def read_weights(folder: str | Path, config: LlamaConfig) -> dict[str, np.ndarray]:
    """Read every tensor of the checkpoint, by its name, in the precision of the file.

    Raises
    ------
    ModelError
        A file of the checkpoint is missing or half-written, a tensor is missing, of the wrong shape, or holds NaN.
    UnsupportedModel
        The checkpoint holds tensors this architecture has no place for.
    """
    folder = Path(folder)
    shapes = expected_shapes(config)
    found: dict[str, np.ndarray] = {}
    for path in weight_files(folder):
        found.update(_read_file(path, shapes))
    missing = [name for name in shapes if name not in found]
    if missing:
        raise ModelError(
            f"{folder}: the weights lack {missing[0]}" + (f" and {len(missing) - 1} more" if missing[1:] else ""),
            cause="a shard is missing, or config.json belongs to another model",
            next="copy the folder again",
        )
    return found


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder, sharded or not; each exists."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted(named_in(index))
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise ModelError(f"{index} is not an index of shards", cause=repr(error), next="copy it again") from error
    else:
        names = ["model.safetensors"]
    for name in names:
        if not (folder / name).is_file():
            other = sorted(p.name for p in folder.glob("*.bin"))
            raise ModelError(
                f"{folder / name} is missing",
                cause=f"the weights are in {other[0]}, not in safetensors" if other else "a copy that stopped half-way",
                next="save the model with safe_serialization, or use engine='transformers'" if other else "copy it too",
            )
    return [folder / name for name in names]


def _read_file(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    found = {}
    try:
        with safe_open(str(path), framework="np") as file:
            for name in file.keys():  # noqa: SIM118  safe_open is not a mapping
                if name.endswith("rotary_emb.inv_freq") or (name == "lm_head.weight" and name not in shapes):
                    continue  # buffers of old checkpoints; the output layer of a tied model, which is the embedding
                if name not in shapes:
                    raise _unsupported(path, f"the tensor {name}")
                found[name] = _checked(path, name, file.get_tensor(name), shapes[name])
    except SafetensorError as error:
        raise ModelError(
            f"{path} cannot be read", cause=f"half-written? {error}", next="copy the file again"
        ) from error
    except TypeError as error:  # a number format that numpy does not know, such as float8
        raise _unsupported(path, f"this number format ({error})") from error
    return found


def _checked(path: Path, name: str, tensor: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    if tensor.shape != shape:
        raise ModelError(
            f"{path}: {name} has shape {tensor.shape}, config.json says {shape}",
            cause="config.json and weights belong to different models",
            next="copy both files from one model",
        )
    if tensor.dtype.name not in ("float16", "float32", "float64", "bfloat16"):
        raise _unsupported(path, f"weights of type {tensor.dtype}")
    if not np.isfinite(tensor).all():
        raise ModelError(
            f"{path}: {name} holds NaN or infinity", cause="the training diverged", next="use an earlier one"
        )
    return tensor
