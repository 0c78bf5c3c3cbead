"""Engines: what turns prompts into sampled answers, token ids in and token ids out.

An engine takes a `Job` (unique prompts, forced tokens, one random key per rollout) and returns an `Output` (sampled
tokens, log-probabilities, class masses). The random numbers belong to the rollout, not to the batch: the uniform for
token ``t`` of a rollout is `uniforms(key, t)`, so that the same key gives the same answer in any batch, in any shard
and, up to floating point, in any engine.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from ...errors import InputError, ModelError
from ..template import Template

__all__ = [
    "ENGINES",
    "Engine",
    "Job",
    "Output",
    "Progress",
    "check_job",
    "is_url",
    "open_engine",
    "rollout_keys",
    "uniforms",
]

Progress = Callable[[int, int], None]
"""Called with (rollouts finished, tokens sampled) since the last call."""

ENGINES = {"jax": "jax_engine", "transformers": "transformers", "server": "server"}
"""Engines that sample from a model folder or a server, and the module each lives in."""

OPTIONAL = {**dict.fromkeys(("accelerate", "jax", "jaxlib", "torch", "transformers"), "models"), "openai": "server"}
"""Packages that an engine may need and the package itself does not, and the extra that brings each."""


@dataclass(frozen=True)
class Job:
    """What is to be sampled.

    Parameters
    ----------
    prompts : list of int32 arrays
        Token ids of the distinct prompts, after the chat template, without padding.
    prompt_of : int array, shape (n,)
        Index into `prompts` for each of the n rollouts.
    forced : list of int32 arrays, length n
        Ids forced after the prompt (the prefill); empty arrays where nothing is forced.
    keys : uint64 array, shape (n,)
        Random key of each rollout (`rollout_keys`); uint32 is accepted.
    max_tokens : int
        Largest number of *sampled* tokens, the end-of-sequence token included, the forced ones not counted.
    temperature : float
        Divides the logits before sampling; 0 takes the most probable token (ties: the smallest id).
    top_p : float
        Sample from the smallest set of most probable tokens whose mass reaches `top_p`; in (0, 1].
    eos_ids : tuple of int
        Ids that end a rollout; the one sampled is kept as the last token.
    end_ids : tuple of int
        Ids that would end the assistant's turn; neither they nor `eos_ids` may be forced.
    classes : dict of name -> int array
        Token classes whose probability mass is recorded at every sampled token.
    processed : bool
        Whether to record the log-probability under the distribution actually sampled from as well, where it differs.
    fine : bool
        Whether to draw tokens of any probability at the right rate. Plainly drawn, one below 1e-6 comes at a rate that
        float32 rounds, below 3e-8 mostly never. Other tokens are drawn than plainly, each with its probability still.
    """

    prompts: list[np.ndarray]
    prompt_of: np.ndarray
    forced: list[np.ndarray]
    keys: np.ndarray
    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    eos_ids: tuple[int, ...] = ()
    end_ids: tuple[int, ...] = ()
    classes: dict[str, np.ndarray] = field(default_factory=dict)
    processed: bool = True
    fine: bool = False

    def __len__(self) -> int:
        return len(self.prompt_of)

    @property
    def raw(self) -> bool:
        """Whether tokens are sampled from the model's own distribution (temperature 1, nothing cut off)."""
        return self.temperature == 1.0 and self.top_p == 1.0


@dataclass(frozen=True)
class Output:
    """What was sampled, in the order of the job.

    Parameters
    ----------
    tokens : list of int32 arrays, length n
        Forced ids followed by sampled ids, the end-of-sequence token included.
    logprob : list of float32 arrays, length n
        Log-probability (nats) of each sampled token in the full distribution at temperature 1; NaN where forced.
    logprob_processed : list of float32 arrays, or None
        The same under the distribution sampled from; None where it is the same one (``job.raw``) or was not asked for.
        At temperature 0 it is 0.
    mass : dict of name -> list of float32 arrays
        Probability of each class in the distribution the token was drawn from, after temperature and top_p (at
        temperature 0: whether the token is one of them); NaN where forced.
    info : dict
        JSON-able facts of the run: ``seconds``, ``compile_seconds``, ``sampled_tokens``, ``steps`` and the like.
    """

    tokens: list[np.ndarray]
    logprob: list[np.ndarray]
    logprob_processed: list[np.ndarray] | None = None
    mass: dict[str, list[np.ndarray]] = field(default_factory=dict)
    info: dict[str, Any] = field(default_factory=dict)


@runtime_checkable
class Engine(Protocol):
    """A model that is loaded and ready to sample."""

    name: str
    tokenizer: Template
    vocab_size: int
    context: int
    """Largest number of positions: prompt + forced + sampled tokens."""

    def run(self, job: Job, progress: Progress | None = None) -> Output:
        """Sample every rollout of the job.

        Raises
        ------
        InputError
            The job does not fit the model (`check_job`).
        UntrustedError
            Logits became NaN or infinite; ``partial`` is the `Output` of the rollouts that had finished, with empty
            arrays for the others.
        """
        ...

    def describe(self) -> dict[str, Any]:
        """JSON-able provenance: engine, model path and hash, template hashes, dtype, device, versions."""
        ...


def open_engine(
    name: str,
    model: str | Path,
    *,
    dtype: str = "float32",
    device: str | None = None,
    batch_size: int | None = None,
    **options: Any,
) -> Engine:
    """Load a model into an engine.

    Parameters
    ----------
    name : {"auto", "jax", "transformers", "server"}
        "auto" takes a server for a URL, the JAX engine for every folder it can read, else transformers; transformers
        too where code of the folder is to be run (``trust_remote_code=True``).
    model : str or Path
        Model folder in Hugging Face format (transformers: a hub id too; server: its URL).
    dtype : {"float32", "bfloat16"}
        Floating-point type of weights and activations (sampling itself is always float32).
    device : str, optional
        "cpu", "gpu", ...; None lets the engine choose.
    batch_size : int, optional
        Rollouts sampled side by side; None lets the engine choose.
    **options
        Passed on to the engine.

    Raises
    ------
    InputError
        Unknown engine.
    ModelError
        The folder is missing, half-written, or of an architecture the engine does not have.
    """
    code = options.get("trust_remote_code", False)
    if name == "auto":
        name = "transformers" if code and not is_url(model) else _choose(model)
    if name not in ENGINES:
        raise InputError(
            f"there is no engine {name!r}",
            cause="the name is not that of an engine that samples from a model",
            next=f"choose one of: auto, {', '.join(ENGINES)}",
        )
    if code and name != "transformers":
        raise InputError(
            f"the engine {name!r} runs no code of a model's folder",
            cause="trust_remote_code is for models that transformers opens",
            next='leave trust_remote_code out, or take engine="transformers"; a server has an option of its own',
        )
    if "shard" in options and name != "jax":
        raise InputError(
            f"the engine {name!r} does not shard a model",
            cause="sharding over devices is the jax engine's",
            next='leave shard; engine="transformers" spreads layers over all GPUs with device="auto", a server has '
            "options of its own",
        )
    try:
        module = importlib.import_module(f".{ENGINES[name]}", __name__)
        return module.open_engine(model, dtype=dtype, device=device, batch_size=batch_size, **options)
    except ModuleNotFoundError as error:
        package = (error.name or "").split(".")[0]
        if package not in OPTIONAL:  # a fault of this package or of another one: nothing that this command cures
            raise
        raise ModelError(
            f"the engine {name!r} needs the package {package!r}, which is not installed",
            cause=str(error),
            next=f"pip install 'markovsafety[{OPTIONAL[package]}]'",
        ) from error


def _choose(model: str | Path) -> str:
    """The JAX engine for a folder it can read, or a missing or broken one (its error names the file)."""
    if is_url(model):
        return "server"
    if not Path(model).is_dir():
        return "transformers" if re.fullmatch(r"[\w.-]+/[\w.-]+", str(model)) else "jax"
    from .llama_folder import UnsupportedModel, read_config

    try:
        read_config(Path(model))
    except UnsupportedModel:
        return "transformers"
    except ModelError:
        pass
    return "jax"


def is_url(model: Any) -> bool:
    """Whether this names a server and not a folder or hub id."""
    return isinstance(model, str) and model.lower().startswith(("http://", "https://"))


def check_job(job: Job, vocab_size: int, context: int) -> None:
    """Refuse a job that the model cannot run, before anything is computed.

    Raises
    ------
    InputError
        Lengths that disagree, ids outside the vocabulary, a prompt that does not fit the context, a prefill that ends
        the turn, sampling parameters out of range.
    """
    n = len(job)
    if len(job.forced) != n or len(job.keys) != n:
        raise InputError(
            f"job of {n} rollouts has {len(job.forced)} prefills and {len(job.keys)} keys",
            cause="every rollout has a prefill, perhaps empty, and a random key",
            next="give one of each per entry of prompt_of",
        )
    if n and (np.min(job.prompt_of) < 0 or np.max(job.prompt_of) >= len(job.prompts)):
        raise InputError(
            f"prompt_of points outside the {len(job.prompts)} prompts",
            cause=f"it holds {int(np.min(job.prompt_of))} to {int(np.max(job.prompt_of))}",
            next="give indices from 0 to the number of prompts less one",
        )
    if job.max_tokens < 1:
        raise InputError(
            f"max_tokens is {job.max_tokens}",
            cause="an answer has at least one sampled token",
            next="ask for at least one token",
        )
    if not (job.temperature >= 0 and np.isfinite(job.temperature)):
        raise InputError(
            f"temperature is {job.temperature}",
            cause="the logits are divided by it",
            next="give a finite number >= 0 (0 is greedy)",
        )
    if not 0 < job.top_p <= 1:
        raise InputError(
            f"top_p is {job.top_p}",
            cause="it is the probability mass of the tokens to sample from",
            next="give a number in (0, 1]",
        )
    for name, ids in {"eos_ids": job.eos_ids, **{f"class {k!r}": v for k, v in job.classes.items()}}.items():
        _check_ids(np.asarray(ids, dtype=np.int64), name, vocab_size)
    for i, prompt in enumerate(job.prompts):
        if len(prompt) == 0:
            raise InputError(
                f"prompt {i} has no tokens",
                cause="a model predicts a token from those before it, and there are none",
                next="give a prompt, or a template that adds a first token",
            )
        _check_ids(prompt, f"prompt {i}", vocab_size)
    _check_forced(job, vocab_size)
    length = np.array([len(p) for p in job.prompts], dtype=np.int64)
    total = length[job.prompt_of] + np.array([len(f) for f in job.forced], dtype=np.int64) if n else np.zeros(0)
    if n and total.max() > context - job.max_tokens:
        worst = int(total.argmax())
        raise InputError(
            f"rollout {worst}: prompt and prefill of {int(total[worst])} tokens leave no room for {job.max_tokens}",
            cause=f"the model has {context} positions",
            next=f"shorten the prompt or set max_tokens <= {max(0, context - int(total[worst]))}",
        )


def _check_ids(ids: np.ndarray, what: str, vocab_size: int) -> None:
    if len(ids) and (np.min(ids) < 0 or np.max(ids) >= vocab_size):
        bad = int(np.max(ids) if np.max(ids) >= vocab_size else np.min(ids))
        raise InputError(
            f"{what} holds the id {bad}, the model's vocabulary has {vocab_size}",
            cause="the ids come from another tokenizer",
            next="use the tokenizer in the model's own folder",
        )


def _check_forced(job: Job, vocab_size: int) -> None:
    if not any(len(f) for f in job.forced):
        return
    flat = np.concatenate([np.asarray(f, dtype=np.int64) for f in job.forced])
    _check_ids(flat, "a prefill", vocab_size)
    stop = np.array(sorted({*job.eos_ids, *job.end_ids}), dtype=np.int64)
    ends = np.isin(flat, stop)
    if ends.any():
        owner = np.repeat(np.arange(len(job)), [len(f) for f in job.forced])
        raise InputError(
            f"prefill ends the turn: rollout {int(owner[ends.argmax()])} forces the id {int(flat[ends.argmax()])}",
            cause="an end-of-sequence or end-of-turn token among the forced ones would end the answer there",
            next="cut the prefix before that token",
        )


def rollout_keys(seed: int, *coordinates: Any) -> np.ndarray:
    """Keys for rollouts named by integer coordinates (prompt id, prefill, index ...), the same in any order or shard.

    Parameters
    ----------
    seed : int
        Seed of the whole run.
    *coordinates : int arrays that broadcast together
        Whatever tells one rollout from another.

    Returns
    -------
    uint64 array
        Chained threefry2x32 (`uniforms`): a keyed permutation of 64-bit words, so equal keys appear only by the
        birthday of 64 bits.
    """
    shape = np.broadcast_shapes(*(np.shape(c) for c in coordinates)) if coordinates else ()
    key = np.full(shape, np.uint64(seed % 2**64), dtype=np.uint64)
    for position, coordinate in enumerate(coordinates):
        word = np.broadcast_to(np.asarray(coordinate, dtype=np.int64), shape).astype(np.uint64)
        high = (word >> np.uint64(32)) + np.uint64(position)
        first, second = _threefry(key, (word & np.uint64(0xFFFFFFFF)).astype(np.uint32), high)
        key = (first.astype(np.uint64) << np.uint64(32)) | second.astype(np.uint64)
    return key


def uniforms(keys: np.ndarray, step: Any, fine: bool = False) -> np.ndarray:
    """The uniform numbers that decide sampled token `step` of the rollouts with these keys.

    Parameters
    ----------
    keys : uint64 array
        Rollout keys.
    step : int or int array that broadcasts
        Index of the sampled token, counted from 0 without the forced ones.
    fine : bool
        Use all 64 bits of the hash.

    Returns
    -------
    float32 array
        In [0, 1): the top 24 bits of a threefry word. The token sampled is the first one, in the order of the
        ids, whose cumulative probability exceeds it. If `fine`, in [0, 1] and of full precision down to 2^-64; the
        order is then that of the probabilities, smallest first, whose cumulative sums keep their digits too.

    Notes
    -----
    Threefry-2x32, 20 rounds, of Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC11).
    """
    keys = np.asarray(keys, dtype=np.uint64)
    word, low = _threefry(keys, np.asarray(step, dtype=np.uint32), np.uint32(0))
    if fine:
        return (word.astype(np.float32) + low.astype(np.float32) * np.float32(2.0**-32)) * np.float32(2.0**-32)
    return (word >> np.uint32(8)).astype(np.float32) * np.float32(2.0**-24)


ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
PARITY = 0x1BD11BDA


def _threefry(key: np.ndarray, x0: Any, x1: Any) -> tuple[np.ndarray, np.ndarray]:
    key = np.asarray(key, dtype=np.uint64)
    hi, lo = (key >> np.uint64(32)).astype(np.uint32), (key & np.uint64(0xFFFFFFFF)).astype(np.uint32)
    words = (hi, lo, hi ^ lo ^ np.uint32(PARITY))
    with np.errstate(over="ignore"):  # words wrap around modulo 2**32
        a, b = np.asarray(x0).astype(np.uint32) + words[0], np.asarray(x1).astype(np.uint32) + words[1]
        for group in range(5):
            for r in ROTATIONS[group % 2]:
                a = a + b
                b = ((b << np.uint32(r)) | (b >> np.uint32(32 - r))) ^ a
            a = a + words[(group + 1) % 3]
            b = b + words[(group + 2) % 3] + np.uint32(group + 1)
    return a, b
