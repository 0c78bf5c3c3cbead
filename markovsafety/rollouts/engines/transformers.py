"""Engine transformers: any causal language model of Hugging Face transformers, from a folder or the hub.

``generate`` runs the model (left padding, KV cache), but does not draw the tokens: a logits processor takes the raw
logits of every step, records log-probabilities and class masses, draws one token per rollout by inverting the
cumulative distribution at the rollout's own uniform number (`uniforms`), and leaves that token as the only one. So the
distribution is exact, nothing of vocabulary size outlives its step, and a rollout does not depend on the batch it is
in, up to floating point.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from ...errors import InputError, ModelError, UntrustedError
from ..provenance import versions, weights_hash, weights_stamp
from ..template import Template
from . import Job, Output, Progress, check_job, uniforms
from .folder import check_folder
from .transformers_batch import Batch
from .transformers_load import DTYPES, code_of, device_of, first_line, load_model, load_template

__all__ = ["TransformersEngine", "open_engine"]

CONTEXT = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
UNLIMITED = 1 << 20
"""Positions of a model whose configuration names no limit (recurrent, or with relative positions)."""
SCORED = 1 << 26
"""Logits held at a time while scoring: 256 MB of float32."""
_HASHED: weakref.WeakKeyDictionary[Any, tuple[Any, dict[str, Any]]] = weakref.WeakKeyDictionary()
"""Stamp and hash of the weights of models: every run and every edit asks who the model is."""


@dataclass(frozen=True)
class TransformersEngine:
    """A model that is loaded and ready to sample; see `open_engine`.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        In evaluation mode.
    tokenizer : Template
    path : str
        Folder or hub id.
    dtype : str
    batch_size : int
        Rollouts side by side.
    edit : object, optional
        What changes the model while it runs (`edited`): ``during(batch)`` is a context that yields a change of the
        logits, or None, and ``describe()`` names it.
    """

    model: Any
    tokenizer: Template
    path: str
    dtype: str
    batch_size: int
    name: str = "transformers"
    edit: Any = None
    trusted: bool = False

    def edited(self, edit: Any) -> TransformersEngine:
        """The same model, sampling and scoring under an edit: something with ``bind(engine)``, as `interventions` has.

        Raises
        ------
        InputError
            The edit was made for another model or does not fit this one.
        """
        return dataclasses.replace(self, edit=edit.bind(dataclasses.replace(self, edit=None)))

    def editing(self, batch: Batch) -> Any:
        """A context in which the edit acts on this batch; yields the change of the logits, or None."""
        return nullcontext() if self.edit is None else self.edit.during(batch)

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding."""
        return int(self.model.get_input_embeddings().weight.shape[0])

    @property
    def context(self) -> int:
        """Largest number of positions."""
        config = self.model.config.get_text_config()
        known = [getattr(config, name, None) for name in CONTEXT]
        return next((int(size) for size in known if size), UNLIMITED)

    @property
    def device(self) -> torch.device:
        """Where inputs go.

        Raises
        ------
        ModelError
            The embedding is on no device.
        """
        device = self.model.get_input_embeddings().weight.device
        if device.type == "meta":
            raise ModelError(
                f"the embedding of {self.path} is on no device",
                cause="it was offloaded: the model does not fit into the memory of the devices that it is spread over",
                next='use device="cpu", a smaller dtype, or devices with more memory',
            )
        return device

    def describe(self) -> dict[str, Any]:
        """JSON-able provenance."""
        return {
            "engine": self.name,
            "model": self.path,
            "revision": getattr(self.model.config, "_commit_hash", None),
            "architecture": type(self.model).__name__,
            "weights": self._weights(),
            **{f"{name}_hash": value for name, value in self.tokenizer.hashes().items()},
            "dtype": self.dtype,
            "device": str(self.device),
            "batch_size": self.batch_size,
            **({} if self.edit is None else {"edit": self.edit.describe()}),
            **({"trust_remote_code": code_of(self.model)} if self.trusted else {}),
            "versions": versions(),
        }

    def _weights(self) -> dict[str, Any] | None:
        """`weights_hash` of the folder, read once as long as its files stay."""
        if not Path(self.path).is_dir():
            return None
        stamp = (self.path, weights_stamp(self.path))
        if self.model not in _HASHED or _HASHED[self.model][0] != stamp:
            _HASHED[self.model] = stamp, weights_hash(self.path)
        return dict(_HASHED[self.model][1])

    def run(self, job: Job, progress: Progress | None = None) -> Output:
        """Sample every rollout of the job.

        Raises
        ------
        InputError
            The job does not fit the model.
        UntrustedError
            Logits became NaN; ``partial`` is the `Output` of the batches before.
        """
        check_job(job, self.vocab_size, self.context)
        kinds = [
            "logprob",
            *(["processed"] if job.processed and not job.raw else []),
            *(f"mass {c}" for c in job.classes),
        ]
        tokens: list[np.ndarray] = [np.zeros(0, np.int32)] * len(job)
        values = {kind: [np.zeros(0, np.float32)] * len(job) for kind in kinds}
        steps = 0

        def output() -> Output:
            mass = {name: values[f"mass {name}"] for name in job.classes}
            return Output(tokens, values["logprob"], values.get("processed"), mass, {"steps": steps})

        for rows in self._batches(job):
            try:
                drawn, kept = self._generate(job, rows, progress)
            except UntrustedError as error:
                error.partial = output()
                raise
            steps += drawn.shape[1]
            for place, row in enumerate(rows):
                forced = job.forced[row]
                ends = np.isin(drawn[place], job.eos_ids)
                size = int(ends.argmax()) + 1 if ends.any() else drawn.shape[1]
                tokens[row] = np.concatenate([forced, drawn[place, :size]]).astype(np.int32)
                for kind, value in kept.items():
                    blank = np.full(len(forced), np.nan, np.float32)
                    values[kind][row] = np.concatenate([blank, value[place, :size]])
        return output()

    def score(self, job: Job, answers: list[np.ndarray]) -> Output:
        """Log-probabilities and class masses of given answers after their forced tokens (``job.forced``)."""
        check_job(job, self.vocab_size, self.context)
        logprob = [np.full(len(answer), np.nan, np.float32) for answer in answers]
        mass = {name: [np.full(len(answer), np.nan, np.float32) for answer in answers] for name in job.classes}
        full = [np.concatenate([job.prompts[p], a]).astype(np.int64) for p, a in zip(job.prompt_of, answers)]
        for rows in self._scorable(full):
            batch = Batch.of(
                [job.prompts[job.prompt_of[row]] for row in rows], [answers[row] for row in rows], left=False
            )
            with torch.inference_mode(), self.editing(batch) as change:
                ids, mask = self._tensor(batch.ids), self._tensor(batch.mask)
                logits = self.model(ids, attention_mask=mask, use_cache=False).logits
                logits = logits if change is None else change(logits, 0)
            for place, row in enumerate(rows):
                forced = len(job.forced[row])
                start, end = len(job.prompts[job.prompt_of[row]]) + forced, len(full[row])
                law = torch.log_softmax(logits[place, start - 1 : end - 1].float(), dim=-1)
                if law.isnan().any():
                    raise _not_finite()
                picked = law.gather(1, self._tensor(full[row][start:, None]))[:, 0]
                logprob[row][forced:] = picked.cpu().numpy()
                for name, members in job.classes.items():
                    mass[name][row][forced:] = _mass(law, self._tensor(members)).cpu().numpy()
        return Output(answers, logprob, None, mass)

    def _tensor(self, ids: np.ndarray) -> torch.Tensor:
        return torch.as_tensor(np.asarray(ids, dtype=np.int64), device=self.device)

    def _scorable(self, full: list[np.ndarray]) -> Iterator[list[int]]:
        """Rows of about the same length together, as many as keep the logits within bounds."""
        rows: list[int] = []
        for row in sorted(range(len(full)), key=lambda i: len(full[i])):
            wide = (len(rows) + 1) * len(full[row]) * self.vocab_size > SCORED
            if rows and (wide or len(rows) == self.batch_size):
                yield rows
                rows = []
            rows.append(row)
        if rows:
            yield rows

    def _batches(self, job: Job) -> Iterator[np.ndarray]:
        """Rollouts of about the same length together, so that little is padded."""
        lengths = np.array([len(p) for p in job.prompts], dtype=np.int64)[job.prompt_of]
        lengths = lengths + np.array([len(f) for f in job.forced], dtype=np.int64)
        order = np.argsort(lengths, kind="stable")
        return (order[i : i + self.batch_size] for i in range(0, len(order), self.batch_size))

    def _generate(
        self, job: Job, rows: np.ndarray, progress: Progress | None
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Sampled ids (batch, steps) and recorded values of that shape; beyond the end of an answer, padding."""
        batch = Batch.of(
            [job.prompts[job.prompt_of[row]] for row in rows], [job.forced[row] for row in rows], left=True
        )
        draw = _Draw(job, np.asarray(job.keys)[rows], progress, self.device)
        config = transformers.GenerationConfig(
            do_sample=False,
            num_beams=1,
            max_new_tokens=job.max_tokens,
            eos_token_id=list(job.eos_ids) or None,
            pad_token_id=job.eos_ids[0] if job.eos_ids else 0,
        )
        with torch.inference_mode(), self.editing(batch) as change:
            sequences = self.model.generate(
                self._tensor(batch.ids),
                attention_mask=self._tensor(batch.mask),
                generation_config=config,
                logits_processor=transformers.LogitsProcessorList(
                    [*([] if change is None else [_Changed(change)]), draw]
                ),
            )
        return sequences[:, batch.width :].cpu().numpy(), draw.finish()


class _Changed(transformers.LogitsProcessor):
    """Changes the logits of the newest column, before anything is read off them; does nothing without a change."""

    def __init__(self, change: Callable[[torch.Tensor, int], torch.Tensor] | None):
        self.change = change

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores if self.change is None else self.change(scores[:, None], input_ids.shape[1] - 1)[:, 0]


class _Draw(transformers.LogitsProcessor):
    """Draws the next token of every rollout of a batch and records its log-probability and the class masses.

    `generate` calls it once per step with the raw logits; the batch's records are its state.
    """

    def __init__(self, job: Job, keys: np.ndarray, progress: Progress | None, device: torch.device):
        self.job, self.keys, self.progress = job, keys, progress
        self.active = torch.ones(len(keys), dtype=torch.bool, device=device)
        self.eos = torch.tensor(job.eos_ids, dtype=torch.long, device=device)
        self.members = {c: torch.as_tensor(np.asarray(ids, np.int64), device=device) for c, ids in job.classes.items()}
        self.steps: list[dict[str, torch.Tensor]] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores = scores.float()
        # The largest logit is NaN if any is; all of them -inf is no distribution either.
        if not bool((torch.isfinite(scores.max(dim=-1).values) | ~self.active).all()):
            raise _not_finite()
        law = torch.log_softmax(scores, dim=-1)
        job, fine = self.job, self.job.fine
        uniform = uniforms(self.keys, len(self.steps), fine)
        token, processed, drawn = _choose(scores, uniform, job.temperature, job.top_p, fine)
        found = {"logprob": law.gather(1, token)[:, 0]}
        if self.job.processed and not self.job.raw:
            found["processed"] = processed
        self.steps.append(found | {f"mass {c}": drawn[:, members].sum(dim=-1) for c, members in self.members.items()})
        ended = self.active & torch.isin(token[:, 0], self.eos)
        if self.progress:
            self.progress(int(ended.sum()), int(self.active.sum()))
        self.active = self.active & ~ended
        return torch.full_like(scores, -torch.inf).scatter_(1, token, 0.0)

    def finish(self) -> dict[str, np.ndarray]:
        """What was recorded, each of shape (batch, steps)."""
        if self.progress:
            self.progress(int(self.active.sum()), 0)
        return {kind: torch.stack([s[kind] for s in self.steps], dim=1).cpu().numpy() for kind in self.steps[0]}


def _choose(
    scores: torch.Tensor, uniform: np.ndarray, temperature: float, top_p: float, fine: bool = False
) -> tuple[torch.Tensor, ...]:
    """Token (batch, 1), its log-probability (batch,) under the distribution it is drawn from, and that distribution."""
    if temperature == 0:
        token = scores.argmax(dim=-1, keepdim=True)
        return token, torch.zeros_like(scores[:, 0]), torch.zeros_like(scores).scatter_(1, token, 1.0)
    law = torch.softmax(scores / temperature, dim=-1)
    if top_p < 1:
        ordered, index = law.sort(dim=-1, descending=True, stable=True)
        kept = ordered.cumsum(dim=-1) - ordered < top_p
        law = torch.zeros_like(law).scatter_(1, index, ordered * kept)
    # In float32 the sum over a large vocabulary is off by more than the tail it should resolve; MPS has no float64.
    exact = law.cpu() if law.device.type == "mps" else law
    line, ids = exact.sort(dim=-1, stable=True) if fine else (exact, None)
    cumulative = line.double().cumsum(dim=-1)
    total = cumulative[:, -1:]
    at = torch.as_tensor(uniform, dtype=torch.float64, device=cumulative.device)[:, None] * total
    token = torch.searchsorted(cumulative, at, right=True).clamp_(max=law.shape[-1] - 1)
    token = (token if ids is None else ids.gather(1, token)).to(law.device)
    law = law / total.to(law)
    return token, law.gather(1, token).log()[:, 0], law


def _mass(law: torch.Tensor, members: torch.Tensor) -> torch.Tensor:
    """Probability of a class under log-probabilities (batch, vocabulary)."""
    return law[:, members].exp().sum(dim=-1)


def _not_finite() -> UntrustedError:
    return UntrustedError(
        "the model's logits became NaN",
        cause="damaged weights, or a dtype whose range the activations leave (float16)",
        next='use dtype="float32" or "bfloat16", or load the weights again',
    )


def open_engine(
    model: str | Path,
    *,
    dtype: str = "float32",
    device: str | None = None,
    batch_size: int | None = None,
    trust_remote_code: bool = False,
    **options: Any,
) -> TransformersEngine:
    """Load a model folder or hub id.

    Parameters
    ----------
    model : str or Path
    dtype : {"float32", "bfloat16", "float16"}
    device : str, optional
        "cpu", "gpu", "cuda:1", "mps"; "auto" or "balanced" spread the layers over all devices (`device_map`). By
        default the GPU if there is one.
    batch_size : int, optional
        By default 1024, 128 or 32 by the size of the model.
    trust_remote_code : bool
        Whether to run Python code that comes with the model (``auto_map`` in its configuration): anything that its
        authors wrote, on this machine, with your rights. Its files and their hash are in the provenance.
    **options
        Passed to ``from_pretrained``, such as ``revision`` or ``attn_implementation``.

    Raises
    ------
    InputError
        Unknown dtype or device.
    ModelError
        The folder is missing, half-written, no causal language model, its tokenizer does not fit, or it brings code
        that is not to be run.
    """
    if dtype not in DTYPES:
        raise InputError(
            f"there is no dtype {dtype!r}",
            cause="the name is not that of a floating-point type of weights",
            next=f"choose one of {', '.join(DTYPES)}",
        )
    if batch_size is not None and batch_size < 1:
        raise InputError(
            f"batch_size is {batch_size}",
            cause="it is the number of rollouts sampled side by side",
            next="give an integer >= 1, or None",
        )
    name = str(model)
    check_folder(model)
    spread = device in ("auto", "balanced", "balanced_low_0", "sequential")
    place = None if spread else device_of(device)  # refused now, not when the weights were read
    loaded = load_model(name, dtype, device if spread else None, options, trust_remote_code)
    if place is not None:
        try:
            loaded = loaded.to(place)
        except (RuntimeError, AssertionError) as error:
            raise InputError(f"no device {device!r}", cause=first_line(error), next='use device="cpu"') from error
    template = load_template(name, loaded, options.get("revision"), trust_remote_code)
    # Sampling settings that come with a model (top-k, repetition penalties ...) would bend its distribution.
    loaded.generation_config = transformers.GenerationConfig()
    size = loaded.num_parameters()
    batch_size = batch_size or (1024 if size < 5e7 else 128 if size < 3e9 else 32)
    engine = TransformersEngine(loaded.eval(), template, name, dtype, batch_size, trusted=trust_remote_code)
    _ = engine.device  # an offloaded embedding is refused now, not after the prompts were read
    return engine
