"""The host of an intervention: any causal language model of transformers, its blocks and heads found by structure.

Names are not trusted. Blocks are the list of modules, one per layer, that hold an attention each; the output projection
is the attention's linear map from all heads side by side to the width. Both are then *validated*: one position is
edited, and the residual stream, or what the projection adds, must change there by exactly what the edit predicts, and
nowhere before.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import InputError, ModelError
from ..rollouts.engines import open_engine
from ..rollouts.engines.transformers import TransformersEngine
from ..rollouts.engines.transformers_batch import Batch
from .buckets import listed
from .edits import identity
from .positions import Spans, spans

__all__ = ["Host", "hidden_of", "open_host"]

OUTPUTS = ("o_proj", "out_proj", "dense", "c_proj", "wo")
"""How families call the attention's output projection."""


_FOUND: weakref.WeakKeyDictionary[Any, _Parts] = weakref.WeakKeyDictionary()
"""Parts of models, found and perhaps validated before: every sampling under an edit asks again."""


@dataclass(frozen=True, eq=False)
class Host:
    """A model whose activations can be read and edited; see `open_host`.

    Parameters
    ----------
    engine : TransformersEngine
        Without an edit.
    decoder : torch.nn.Module
        The model below the logits.
    blocks : tuple of torch.nn.Module, length layers
    mixers : tuple of torch.nn.Module, length layers
        The attention's output projection of every block, (heads * head_dim) to width.
    heads, head_dim, width : int
        Query heads; their dimension; dimension of the residual stream.

    Examples
    --------
    >>> host = ms.interventions.open_host(ms.organism.model_path("shallow"))
    >>> host
    <Host: LlamaForCausalLM, 4 blocks of 4 heads x 16, width 64>
    >>> [ids.tolist() for ids in host.prompt_ids(["v05 the bio5 ."])]
    [[1, 4, 17, 32, 46, 181, 5, 6, 7]]
    >>> host.spans().t_inst
    (-4, -3)
    """

    engine: TransformersEngine
    decoder: Any
    blocks: tuple[Any, ...]
    mixers: tuple[Any, ...]
    heads: int
    head_dim: int
    width: int

    def __repr__(self) -> str:
        kind = type(self.engine.model).__name__
        return f"<Host: {kind}, {self.layers} blocks of {self.heads} heads x {self.head_dim}, width {self.width}>"

    @classmethod
    def of(cls, engine: TransformersEngine, *, validate: bool = True) -> Host:
        """Find the parts of an engine's model by structure, and validate them.

        Raises
        ------
        ModelError
            Blocks, heads or output projections are not found, are quantised, or do not behave as an edit predicts.
        """
        if engine.edit is not None:
            raise InputError(
                "the engine is edited already",
                cause="directions and edits belong to the model as it is",
                next="give the engine without its edit, or add the edits",
            )
        base = engine.model.get_base_model() if hasattr(engine.model, "get_base_model") else engine.model
        config = base.config.get_text_config()
        width = int(config.hidden_size)
        heads = int(config.num_attention_heads)
        head_dim = int(getattr(config, "head_dim", None) or width // heads)
        parts = _FOUND.get(engine.model)
        if parts is None or not parts.still_in(base):
            parts = _FOUND[engine.model] = _Parts.search(base, config, heads * head_dim, width)
        decoder = base.get_submodule(parts.decoder)
        blocks, mixers = (tuple(part for _, part in named) for named in (parts.blocks, parts.mixers))
        host = cls(engine, decoder, blocks, mixers, heads, head_dim, width)
        if validate and not parts.valid:
            from .validate import validate_host

            validate_host(host)
            _FOUND[engine.model] = replace(parts, valid=True)
        return host

    @property
    def layers(self) -> int:
        """Number of blocks; the residual stream has one level more."""
        return len(self.blocks)

    @property
    def vocab_size(self) -> int:
        """Number of logits."""
        return self.engine.vocab_size

    @cached_property
    def identity(self) -> tuple[str, str | None]:
        """Identity of weights and template; see `edits.identity`."""
        return identity(self.engine)

    @cached_property
    def _keeps(self) -> bool:
        """Whether the model can make the logits of the last columns alone."""
        return "logits_to_keep" in inspect.signature(self.engine.model.forward).parameters

    def spans(self, **options: Any) -> Spans:
        """Where instruction, t_inst and t_post are in this model's prompts; options as `positions.spans`."""
        return spans(self.engine.tokenizer, **options)

    def prompt_ids(self, prompts: Any, system: str | None = None) -> list[np.ndarray]:
        """Token ids of prompts: texts, records with ``prompt`` or ``prompt_tokens``, or ids; or a CSV or JSONL file.

        Raises
        ------
        InputError
            No prompt at all, one text instead of a list, or a prompt of another kind.
        """
        prompts = listed(prompts)
        if not len(prompts):
            raise InputError("there is no prompt", cause="the list is empty", next="give at least one prompt")
        return [self._ids(p, system) for p in prompts]

    def _ids(self, prompt: Any, system: str | None) -> np.ndarray:
        if isinstance(prompt, dict):
            prompt = prompt["prompt_tokens"] if "prompt_tokens" in prompt else prompt.get("prompt", prompt)
        listed = isinstance(prompt, Sequence) and len(prompt) > 0 and isinstance(prompt[0], int | np.integer)
        if listed or isinstance(prompt, np.ndarray):
            return np.asarray(prompt, dtype=np.int64)
        return self.engine.tokenizer.prompt_ids(prompt, system).astype(np.int64)

    def batches(
        self, prompts: Sequence[np.ndarray], answers: Sequence[np.ndarray] | None = None, size: int | None = None
    ) -> Iterator[tuple[np.ndarray, Batch]]:
        """Rows of about the same length together, padded on the right, and where they stand in the lists."""
        said = [np.zeros(0, np.int64)] * len(prompts) if answers is None else list(answers)
        if len(said) != len(prompts):
            raise InputError(
                f"{len(prompts)} prompts have {len(said)} answers",
                cause="each prompt is read with the answer at the same place",
                next="give one answer per prompt",
            )
        length = np.array([len(p) + len(a) for p, a in zip(prompts, said)])
        if not length.all():
            empty = int(np.flatnonzero(length == 0)[0])
            raise InputError(
                f"prompt {empty} has no tokens",
                cause="activations belong to tokens, and there are none",
                next="give prompts with at least one token",
            )
        if length.max() > self.engine.context:
            raise InputError(
                f"prompt {int(length.argmax())} with its answer has {int(length.max())} tokens",
                cause=f"the model has {self.engine.context} positions",
                next="shorten it",
            )
        order = np.argsort(length, kind="stable")
        size = size or min(self.engine.batch_size, 64)
        for first in range(0, len(order), size):
            rows = order[first : first + size]
            yield rows, Batch.of([prompts[i] for i in rows], [said[i] for i in rows], left=False)

    def forward(self, batch: Batch, *, logits: bool = False, first: int = 0) -> torch.Tensor | None:
        """Run a batch once without cache; the logits (rows, width - first, vocab) if asked for, else the blocks alone.

        Logits of the columns before `first` are not made where the model can leave them out: with a large vocabulary
        they are most of the memory.
        """
        device = self.engine.device
        ids = torch.as_tensor(batch.ids, device=device)
        mask = torch.as_tensor(batch.mask, device=device)
        with torch.inference_mode():
            if logits:
                keep = {"logits_to_keep": batch.width - first} if first and self._keeps else {}
                made = self.engine.model(ids, attention_mask=mask, use_cache=False, **keep).logits
                return made[:, first - batch.width :]
            self.decoder(input_ids=ids, attention_mask=mask, use_cache=False)
        return None

    @contextmanager
    def watching(self, level: int, take: Any) -> Iterator[None]:
        """Call ``take(hidden)`` with the residual stream (rows, columns, width) at a level of every forward pass."""

        def before(module: Any, args: Any, kwargs: Any) -> None:
            take(hidden_of(args, kwargs))

        def after(module: Any, args: Any, output: Any) -> None:
            take(output if torch.is_tensor(output) else output[0])

        if level < self.layers:
            handle = self.blocks[level].register_forward_pre_hook(before, with_kwargs=True)
        else:
            handle = self.blocks[-1].register_forward_hook(after)
        try:
            yield
        finally:
            handle.remove()

    @contextmanager
    def mixing(self, layer: int, take: Any) -> Iterator[None]:
        """Call ``take(heads)`` with what enters a block's output projection, (rows, columns, heads * head_dim)."""
        handle = self.mixers[layer].register_forward_pre_hook(lambda module, args: take(args[0]))
        try:
            yield
        finally:
            handle.remove()


def hidden_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    """The residual stream among a block's arguments: the first one, or the one named so."""
    return args[0] if args else kwargs["hidden_states"]


def open_host(model: str | Path | TransformersEngine, *, system: str | None = None, **options: Any) -> Host:
    """Load a model and find where it can be read and edited.

    Parameters
    ----------
    model : str, Path or TransformersEngine
        Folder or hub id, or an engine that is open already.
    system : str, optional
        System message of all prompts that bring none: when they are read, sampled, and when positions are looked for.
    **options
        Of the engine: device, dtype, batch_size, revision, attn_implementation ...

    Returns
    -------
    Host

    Raises
    ------
    InputError
        The template has no place for a system message.
    ModelError
        The model cannot be loaded, or its structure is not understood (the names that were found are in the error).

    Examples
    --------
    >>> ms.interventions.open_host(ms.organism.model_path("shallow"))
    <Host: LlamaForCausalLM, 4 blocks of 4 heads x 16, width 64>

    A chat template that has no place for a system message says so, rather than leave it out.

    >>> ms.interventions.open_host(ms.organism.model_path("shallow"), system="be brief")
    Traceback (most recent call last):
        ...
    markovsafety.errors.InputError: the chat template of ... leaves the system message out
      cause: it renders what the user says, and has no place for a system message
      next:  say it within the prompts, or leave it out
    """
    if isinstance(model, str | Path):
        opened: Any = open_engine("transformers", model, **options)
    else:
        opened = model
    if not isinstance(opened, TransformersEngine):
        raise InputError(
            f"model is {type(model).__name__}",
            cause="activations are read in torch, from a model that transformers loads",
            next='give a model folder, a hub id or open_engine("transformers", ...)',
        )
    if system is not None:
        opened = replace(opened, tokenizer=replace(opened.tokenizer, system=system))
        if system.strip() not in opened.tokenizer.prompt_text("word"):
            raise InputError(
                f"the chat template of {opened.path} leaves the system message out",
                cause="it renders what the user says, and has no place for a system message",
                next="say it within the prompts, or leave it out",
            )
    return Host.of(opened)


@dataclass(frozen=True, eq=False)
class _Parts:
    """Where the parts of a model are, with their names; the model itself is not among them, so that it may be freed."""

    decoder: str
    blocks: tuple[tuple[str, Any], ...]
    mixers: tuple[tuple[str, Any], ...]
    valid: bool = False

    @classmethod
    def search(cls, base: Any, config: Any, inner: int, width: int) -> _Parts:
        name, blocks = _blocks(base, config)
        mixers = [_mixer(block, i, inner, width) for i, block in enumerate(blocks)]
        names = {id(module): path for path, module in base.named_modules()}
        return cls(
            name.rpartition(".")[0],
            tuple((f"{name}.{i}", block) for i, block in enumerate(blocks)),
            tuple((names[id(mixer)], mixer) for mixer in mixers),
        )

    def still_in(self, base: Any) -> bool:
        """Whether nothing has taken the place of any part, as an adapter does."""
        try:
            return all(base.get_submodule(name) is part for name, part in (*self.blocks, *self.mixers))
        except AttributeError:
            return False


def _blocks(base: Any, config: Any) -> tuple[str, Any]:
    """Name and list of the blocks."""
    wanted, found = int(config.num_hidden_layers), []
    for name, module in base.named_modules():
        if isinstance(module, torch.nn.ModuleList):
            attending = sum(_attention(child) is not None for child in module)
            found.append((name, len(module), attending))
            if len(module) == wanted == attending:
                return name, module
    lists = "; ".join(f"{name} ({size} modules, {attending} with attention)" for name, size, attending in found)
    raise ModelError(
        f"the {wanted} blocks of {type(base).__name__} are not found",
        cause=f"no list of {wanted} modules with one attention each; lists found: {lists or 'none'}",
        next="use a decoder-only transformer whose every layer attends (no state-space or encoder-decoder model)",
    )


def _attention(block: Any) -> Any:
    """The outermost module of a block that calls itself attention; None without one."""
    for name, module in block.named_modules():
        if name and "attention" in type(module).__name__.lower() and any(True for _ in module.children()):
            return module
    return None


def _sizes(module: Any) -> tuple[int, int] | None:
    """(in, out) of a linear map in any dress: Linear, LoRA around one, GPT-2's Conv1D."""
    if hasattr(module, "in_features") and hasattr(module, "out_features"):
        return int(module.in_features), int(module.out_features)
    weight = getattr(module, "weight", None)
    if hasattr(module, "nf") and torch.is_tensor(weight):
        return int(weight.shape[0]), int(module.nf)
    return None


def _mixer(block: Any, layer: int, inner: int, width: int) -> Any:
    """The output projection of a block's attention."""
    attention = _attention(block)
    linear = {name: m for name, m in attention.named_modules() if _sizes(m) is not None and name.count(".") == 0}
    fitting = {name: m for name, m in linear.items() if _sizes(m) == (inner, width)}
    named = [name for name in fitting if name in OUTPUTS]
    choice = named if len(named) == 1 else list(fitting) if len(fitting) == 1 else []
    if not choice:
        raise ModelError(
            f"the output projection of layer {layer} ({type(attention).__name__}) is not found",
            cause=f"one linear map {inner} -> {width} named {', '.join(OUTPUTS)} is needed; linear maps found: "
            + ("; ".join(f"{n} {_sizes(m)}" for n, m in linear.items()) or "none"),
            next="use a model whose heads are concatenated and mixed by one linear map",
        )
    found = fitting[choice[0]]
    weight = getattr(getattr(found, "base_layer", found), "weight", None)
    if not (isinstance(weight, torch.Tensor) and weight.is_floating_point()):
        raise ModelError(
            f"layer {layer} is quantised ({type(found).__name__})",
            cause="its weights are no floating-point numbers, so that the effect of an edit cannot be validated",
            next="load the model in float32, bfloat16 or float16",
        )
    return found
