"""Engine `jax`: Llama-family folders sampled with continuous batching, on CPU or GPUs, without torch."""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ...errors import InputError, ModelError, UntrustedError
from ..provenance import versions, weights_hash
from ..rules import Rule
from ..sums import Added
from ..template import Template
from . import Job, Output, Progress, check_job
from .jax_attention import ATTENTIONS, chosen
from .jax_edits import Signature, edited_params, signature
from .jax_home import Home, devices_named, homes_of
from .jax_keep import Shelf
from .jax_llama import LlamaConfig, Params, load_params, param_shapes
from .jax_memory import MOST, Memory, cache_bytes, check_weights, fitting, free_bytes, weight_bytes
from .jax_plan import SMALL, Plan, compile_plans, cores, make_plan, member_of, round_up
from .jax_sampling import Draw, Shape, score_program
from .jax_schedule import Store, not_finite, pad, work
from .jax_sums import adder
from .llama_folder import read_config

__all__ = ["JaxEngine", "open_engine"]


@dataclass(frozen=True)
class JaxEngine:
    """A Llama-family model on one device or several, ready to sample (the protocol `Engine`).

    Parameters
    ----------
    tokenizer : Template
    config : LlamaConfig
    params : dict
        Parameters in the first home.
    homes : tuple of Home
        Where copies of the model live.
    dtype : {"float32", "bfloat16"}
    folder : str
    batch_size : int or None
        Rows of one step, all workers together.
    workers : int or None
        Threads that each keep batches of their own; None: one per core for a small model on a CPU, else one per home.
    copies : tuple of dict
        Parameters in the other homes.
    attention : {"plain", "kernel"}
        See `jax_attention`.
    memory : int or None
        Bytes that the engine may take on each device; None: what is free.
    edit : dict, optional
        What an edit says of itself, where one is in the parameters (`edited`); ``sign`` is its signature.
    """

    tokenizer: Template
    config: LlamaConfig
    params: Params
    homes: tuple[Home, ...]
    dtype: str
    folder: str
    batch_size: int | None = None
    workers: int | None = None
    copies: tuple[Params, ...] = ()
    attention: str = "plain"
    memory: int | None = None
    edit: dict[str, Any] | None = None
    sign: Signature = ()
    name: str = field(default="jax", init=False)

    def edited(self, edit: Any) -> JaxEngine:
        """The same model under an edit of `interventions`; a tilt must be the same for all tokens of the answer.

        Raises
        ------
        InputError
            The edit was made for another model, does not fit this one, or is of a kind that this engine does not have.
        """
        if self.edit is not None:
            raise InputError(
                "the engine is edited already",
                cause="edits belong to the model as it is",
                next="add the edits: first + second",
            )
        c = self.config
        edit.check(self, layers=c.layers, heads=c.heads, head_dim=c.head_dim, width=c.width, vocab=c.vocab)
        params, *copies = (
            edited_params(old, c, edit.parts, home.sharding())
            for old, home in zip((self.params, *self.copies), self.homes, strict=True)
        )
        edited = {"params": params, "copies": tuple(copies), "edit": edit.describe()}
        return dataclasses.replace(self, **edited, sign=signature(edit.parts))

    @property
    def device(self) -> Any:
        """The first device."""
        return self.homes[0].devices[0]

    @property
    def vocab_size(self) -> int:
        return self.config.vocab

    @property
    def context(self) -> int:
        return self.config.context

    def describe(self) -> dict[str, Any]:
        """JSON-able provenance."""
        return {
            "engine": self.name,
            "model": self.folder,
            "weights": weights_hash(self.folder),
            **{f"{k}_hash": v for k, v in self.tokenizer.hashes().items()},
            "dtype": self.dtype,
            "device": f"{self.device.platform} ({self.device.device_kind})",
            **self._spread(),
            **({} if self.edit is None else {"edit": self.edit}),
            "versions": versions(),
        }

    def _spread(self) -> dict[str, Any]:
        """What there is to say of more than one device, and of attention that is not the plain one."""
        ways, copies = self.homes[0].ways, len(self.homes)
        told: dict[str, Any] = {"copies": copies} if copies > 1 else {}
        told |= {"tensor_parallel": ways} if ways > 1 else {}
        return told | ({"attention": self.attention} if self.attention != "plain" else {})

    def run(self, job: Job, progress: Progress | None = None) -> Output:
        """Sample every rollout of the job; see `Engine.run`.

        Raises
        ------
        InputError
            The job does not fit the model.
        ModelError
            Keys and values do not fit into the memory.
        UntrustedError
            Logits became NaN; ``partial`` is the `Output` of the rollouts that had finished.
        """
        start = time.perf_counter()
        self._check(job)
        store = Store.empty(job)
        if len(job) == 0:
            return store.output(job, {"seconds": 0.0, "compile_seconds": 0.0, "sampled_tokens": 0})
        plans = self._plans(job)
        plan = plans[0]
        compile_start = time.perf_counter()
        programs = compile_plans(plans)
        compiled = time.perf_counter() - compile_start
        try:
            rows = work(plans, programs, lambda _: store, progress)
        except UntrustedError as error:
            error.partial = store.output(job, {})
            raise
        info = {
            "sampled_tokens": int(store.length.sum()),
            "rows": rows,
            "batch": plan.shape.batch,
            "workers": plan.workers,
            "cache_lengths": list(plan.lengths),
            "memory": plan.memory.to_json(),
            "compile_seconds": compiled,
            "fetched_bytes": sum(store.fetched),
        }
        output = store.output(job, info)
        info["seconds"] = time.perf_counter() - start - compiled
        return output

    def tally(self, job: Job, order: int, rule: Rule, group: np.ndarray, progress: Progress | None = None) -> Added:
        """Sample every rollout of the job and add up its transitions on the device.

        Parameters
        ----------
        job : Job
        order : int
            Tokens of a state.
        rule : Rule
            What ends a rollout in which outcome.
        group : int array, shape (n,)
            Of each rollout, counted from 0, rising in steps of at most one; sums are kept by group.
        progress : callable, optional

        Returns
        -------
        Added
            The classes named as outcomes are summed. ``info["fetched_bytes"]`` counts what left the device.

        Raises
        ------
        InputError
            The job does not fit the model.
        ModelError
            Keys and values do not fit into the memory.
        UntrustedError
            Logits became NaN; there is no partial answer.
        """
        start = time.perf_counter()
        self._check(job)
        if len(job) == 0:
            return Added.empty(order)
        plans = self._plans(job)
        compile_start = time.perf_counter()
        programs = compile_plans(plans)
        shelf = Shelf(plans[0])
        add_up = adder(shelf, order, rule, group)
        compiled = time.perf_counter() - compile_start
        rows = work(plans, programs, shelf.own, progress)
        sampled = time.perf_counter()
        parts = list(add_up())
        info = {
            "sampled_tokens": int(shelf.length.sum()),
            "rows": rows,
            "compile_seconds": compiled,
            "sum_seconds": time.perf_counter() - sampled,
            "fetched_bytes": sum(shelf.fetched),
            "seconds": time.perf_counter() - start - compiled,
        }
        return Added.of(parts, info)

    def score(self, job: Job, answers: list[np.ndarray]) -> Output:
        """Log-probabilities and class masses of given answers.

        Parameters
        ----------
        job : Job
            Prompts and classes; the forced tokens are the first ones of each answer and are not scored.
        answers : list of int32 arrays, length n
            Whole answers, the forced tokens included.

        Returns
        -------
        Output
            With the answers as its tokens.
        """
        check_job(job, self.vocab_size, self.context)
        rows = [np.concatenate([job.prompts[p], a]).astype(np.int32) for p, a in zip(job.prompt_of, answers)]
        longest = max(map(len, rows), default=1)
        if longest > self.config.reach:
            raise InputError(
                f"an answer and its prompt have {longest} tokens, the model {self.config.reach} positions",
                cause="the model was made for no more positions",
                next=f"cut the answers so that prompt and answer together have at most {self.config.reach} tokens",
            )
        member = member_of(job, self.vocab_size)
        logprob: list[np.ndarray] = [np.zeros(0, np.float32)] * len(rows)
        mass = {name: list(logprob) for name in job.classes}
        width = round_up(longest, 32)
        size = int(np.clip((1 << 28) // (4 * width * self.vocab_size), 1, 16))
        program = score_program(self._shape(job, size), size, width)
        order = np.argsort([len(r) for r in rows], kind="stable")
        for at in range(0, len(order), size):
            part = order[at : at + size]
            tokens, lengths = pad([rows[i] for i in part], size, width)
            prompt = np.ones(size, np.int32)
            prompt[: len(part)] = [len(job.prompts[job.prompt_of[i]]) for i in part]
            picked, masses, finite = map(np.asarray, program(self.params, tokens, lengths, prompt, member))
            for place, i in enumerate(part):
                skip, end = len(rows[i]) - len(answers[i]) + len(job.forced[i]) - 1, len(rows[i]) - 1
                if not finite[place, skip:end].all():
                    raise not_finite()
                blank = np.full(len(job.forced[i]), np.nan, np.float32)
                logprob[i] = np.concatenate([blank, picked[place, skip:end]])
                for c, name in enumerate(mass):
                    mass[name][i] = np.concatenate([blank, masses[place, skip:end, c]])
        return Output([np.asarray(a, np.int32) for a in answers], logprob, None, mass)

    def _check(self, job: Job) -> None:
        check_job(job, self.vocab_size, self.context)
        window = self.config.window
        if window is None or len(job) == 0:
            return
        longest = max(len(job.prompts[p]) + len(f) for p, f in zip(job.prompt_of, job.forced)) + job.max_tokens
        if longest > window:
            raise InputError(
                f"prompt, prefill and answer of {longest} tokens exceed the sliding window of {window}",
                cause="the jax engine attends to everything, the model only to the window",
                next=f"set max_tokens <= {max(0, job.max_tokens - longest + window)}, or use engine='transformers'",
            )

    def _plans(self, job: Job) -> list[Plan]:
        """The plan in every home: rows side by side as asked, or as many as memory and cores make worthwhile."""
        homes, on_cpu = self.homes, self.device.platform == "cpu"
        parameters = sum(x.size for x in jax.tree.leaves(self.params))
        small = on_cpu and parameters < SMALL
        workers = self.workers or (max(cores(), len(homes)) if small else len(homes))
        workers = workers if self.batch_size is None else min(workers, self.batch_size)
        asked = None if self.batch_size is None else self.batch_size // workers
        plan = make_plan(
            job, self.params, self._shape(job, 1), batch=asked, workers=workers, homes=len(homes), limit=self._limit
        )
        return [plan.at(home, params) for home, params in zip(homes, (self.params, *self.copies), strict=True)]

    def _limit(self, lengths: tuple[int, ...], prompts: int, width: int, workers: int, batch: int | None) -> Memory:
        """What a run takes, `workers` on a device; see `fitting`."""
        home, on_cpu = self.homes[0], self.device.platform == "cpu"
        taken = weight_bytes(self.config, self.dtype, home)
        most = MOST
        if on_cpu:  # beyond this, keys and values only fall out of the caches of a CPU
            row = 2 * cache_bytes(self.config, self.dtype) * lengths[-1]
            most = int(np.clip((1 << 31) // (row * workers), 1, 64))
        return fitting(
            self.config, self.dtype, home, lengths=lengths, prompts=prompts, width=width, workers=workers, batch=batch,
            free=free_bytes(home, self.memory, taken), most=most, devices=len(jax.local_devices(backend=home.platform)),
        )  # fmt: skip

    def _shape(self, job: Job, batch: int) -> Shape:
        kind = "greedy" if job.temperature == 0 else "raw" if job.raw else "tempered" if job.top_p == 1 else "nucleus"
        draw = Draw(kind, job.processed and not job.raw, len(job.classes), job.fine)
        return Shape(self.config, self.dtype, self.homes[0], draw, batch, self.sign, self.attention)


def open_engine(
    model: str | Path,
    *,
    dtype: str = "float32",
    device: str | None = None,
    batch_size: int | None = None,
    workers: int | None = None,
    shard: str | None = "auto",
    attention: str = "auto",
    memory: int | None = None,
) -> JaxEngine:
    """Load a model folder; see `engines.open_engine`.

    Parameters
    ----------
    device : str, optional
        A platform ("gpu", "cpu"), which is all its devices, or some of them: "gpu:1", "gpu:0,2".
    workers : int, optional
    shard : {"auto", "data", "tensor"}, optional
        How several devices are used: a copy of the model on each ("data"), one copy over all of them ("tensor"), or
        copies over as few devices each as have room for one ("auto"; on a CPU one device). None: the first alone.
    attention : {"auto", "plain", "kernel"}
        How decoding attends (`jax_attention`); "auto" is the kernel on a GPU where it works, in bfloat16.
    memory : int, optional
        Bytes that the engine may take on each device; by default what is free there.

    Raises
    ------
    InputError
        Unknown dtype, device or sharding; heads that cannot be split over so many devices.
    ModelError
        The folder is missing, half-written or broken, or the weights do not fit into the memory.
    UnsupportedModel
        An architecture for the transformers engine.
    """
    if dtype not in ("float32", "bfloat16"):
        raise InputError(
            f"the jax engine has no dtype {dtype!r}",
            cause="weights and activations are held in one of two types",
            next="choose float32 or bfloat16",
        )
    if attention not in ATTENTIONS:
        raise InputError(
            f"there is no attention {attention!r}",
            cause="a new token attends by code written in JAX or by JAX's own kernel",
            next=f"choose one of: {', '.join(ATTENTIONS)}",
        )
    config = read_config(model)
    tokenizer = Template.load(model, config.vocab)
    devices = devices_named(device)

    def fits(ways: int) -> bool:
        home = Home(tuple(devices[:ways]))
        try:
            check_weights(config, dtype, home, free_bytes(home, memory), len(devices))
        except ModelError:
            return False
        return True

    homes = homes_of(devices, shard, config, fits)
    for home in homes:
        check_weights(config, dtype, home, free_bytes(home, memory), len(devices))
    params = load_params(model, config, jnp.dtype(dtype), homes[0])
    form = chosen(attention, homes[0], dtype, config)
    return JaxEngine(
        tokenizer, config, params, homes, dtype, str(model), batch_size, workers, copied(params, config, homes), form,
        memory,
    )  # fmt: skip


def copied(params: Params, config: LlamaConfig, homes: tuple[Home, ...]) -> tuple[Params, ...]:
    """The parameters of the first home in every other one."""
    found = []
    for home in homes[1:]:
        places = jax.tree.map(lambda s: s.sharding, param_shapes(config, jnp.float32, home))
        found.append(jax.device_put(params, places))
    return tuple(found)
