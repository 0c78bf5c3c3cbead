"""Engine `jax`: Llama-family folders sampled with continuous batching, on CPU or GPU, without torch."""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ...errors import InputError, UntrustedError
from ..provenance import versions, weights_hash
from ..rules import Rule
from ..sums import Added
from ..template import Template
from . import Job, Output, Progress, check_job
from .jax_edits import Signature, edited_params, signature
from .jax_keep import Shelf
from .jax_llama import LlamaConfig, Params, load_params
from .jax_plan import SMALL, Plan, compile_plan, cores, make_plan, member_of, round_up
from .jax_sampling import Draw, Shape, score_program
from .jax_schedule import Store, not_finite, pad, work
from .jax_sums import adder
from .llama_folder import read_config

__all__ = ["JaxEngine", "open_engine"]


@dataclass(frozen=True)
class JaxEngine:
    """A Llama-family model on a device, ready to sample (the protocol `Engine`).

    Parameters
    ----------
    tokenizer : Template
    config : LlamaConfig
    params : dict
        Parameters on the device.
    device : jax.Device
    dtype : {"float32", "bfloat16"}
    folder : str
    batch_size : int or None
        Rows of one step, all workers together.
    workers : int or None
        Threads that each keep batches of their own; None: one per core for a small model on a CPU, else one.
    edit : dict, optional
        What an edit says of itself, where one is in the parameters (`edited`); ``sign`` is its signature.
    """

    tokenizer: Template
    config: LlamaConfig
    params: Params
    device: Any
    dtype: str
    folder: str
    batch_size: int | None = None
    workers: int | None = None
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
        params = edited_params(self.params, c, edit.parts, self.device)
        return dataclasses.replace(self, params=params, edit=edit.describe(), sign=signature(edit.parts))

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
            **({} if self.edit is None else {"edit": self.edit}),
            "versions": versions(),
        }

    def run(self, job: Job, progress: Progress | None = None) -> Output:
        """Sample every rollout of the job; see `Engine.run`.

        Raises
        ------
        InputError
            The job does not fit the model.
        UntrustedError
            Logits became NaN; ``partial`` is the `Output` of the rollouts that had finished.
        """
        start = time.perf_counter()
        self._check(job)
        store = Store.empty(job)
        if len(job) == 0:
            return store.output(job, {"seconds": 0.0, "compile_seconds": 0.0, "sampled_tokens": 0})
        plan = self._plan(job)
        compile_start = time.perf_counter()
        programs = compile_plan(plan)
        compiled = time.perf_counter() - compile_start
        try:
            rows = work(plan, programs, lambda: store, progress)
        except UntrustedError as error:
            error.partial = store.output(job, {})
            raise
        info = {
            "sampled_tokens": int(store.length.sum()),
            "rows": rows,
            "batch": plan.shape.batch,
            "workers": plan.workers,
            "cache_lengths": list(plan.lengths),
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
        UntrustedError
            Logits became NaN; there is no partial answer.
        """
        start = time.perf_counter()
        self._check(job)
        if len(job) == 0:
            return Added.empty(order)
        plan = self._plan(job)
        compile_start = time.perf_counter()
        programs = compile_plan(plan)
        shelf = Shelf(plan)
        add_up = adder(shelf, order, rule, group)
        compiled = time.perf_counter() - compile_start
        rows = work(plan, programs, shelf.own, progress)
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

    def _plan(self, job: Job) -> Plan:
        """How many rows side by side: as asked, or as many as memory and cores make worthwhile."""
        on_cpu = self.device.platform == "cpu"
        parameters = sum(x.size for x in jax.tree.leaves(self.params))
        workers = self.workers or (cores() if on_cpu and parameters < SMALL else 1)
        if self.batch_size is not None:
            workers = min(workers, self.batch_size)
            return make_plan(job, self.params, lambda rows: self._shape(job, rows), self.batch_size // workers, workers)
        c = self.config
        longest = max(map(len, job.prompts)) + max(map(len, job.forced)) + job.max_tokens
        row = 4 * c.layers * c.kv_heads * c.head_dim * longest * jnp.dtype(self.dtype).itemsize
        budget = 1 << 31 if on_cpu else (self.device.memory_stats() or {}).get("bytes_limit", 1 << 34) // 4
        batch = int(np.clip(budget // (row * workers), 1, 64 if on_cpu else 256))
        return make_plan(job, self.params, lambda rows: self._shape(job, rows), batch, workers)

    def _shape(self, job: Job, batch: int) -> Shape:
        kind = "greedy" if job.temperature == 0 else "raw" if job.raw else "tempered" if job.top_p == 1 else "nucleus"
        draw = Draw(kind, job.processed and not job.raw, len(job.classes), job.fine)
        return Shape(self.config, self.dtype, self.device, draw, batch, self.sign)


def open_engine(
    model: str | Path,
    *,
    dtype: str = "float32",
    device: str | None = None,
    batch_size: int | None = None,
    workers: int | None = None,
) -> JaxEngine:
    """Load a model folder; see `engines.open_engine`.

    Raises
    ------
    InputError
        Unknown dtype or device.
    ModelError
        The folder is missing, half-written or broken.
    UnsupportedModel
        An architecture for the transformers engine.
    """
    if dtype not in ("float32", "bfloat16"):
        raise InputError(
            f"the jax engine has no dtype {dtype!r}",
            cause="weights and activations are held in one of two types",
            next="choose float32 or bfloat16",
        )
    config = read_config(model)
    tokenizer = Template.load(model, config.vocab)
    place = _device(device)
    params = load_params(model, config, jnp.dtype(dtype), place)
    return JaxEngine(tokenizer, config, params, place, dtype, str(model), batch_size, workers)


def _device(name: str | None) -> Any:
    if name is None:
        return jax.devices()[0]
    kind, _, index = name.partition(":")
    try:
        return jax.devices(kind)[int(index or 0)]
    except (RuntimeError, IndexError, ValueError) as error:
        have = ", ".join(sorted({d.platform for d in jax.devices()} | {"cpu"}))
        raise InputError(f"there is no device {name!r}", cause=str(error), next=f"choose one of: {have}") from error
