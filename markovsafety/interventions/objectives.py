"""What fine-tuning minimises: cross-entropy, the token-wise constrained objective, distillation from a teacher.

An objective is called with the model that is trained and a batch (`batches.collate_rows`, as tensors), and returns the
loss and its parts by name. Activations carry gradients while it is called, so an objective may hook the model. Two
methods are optional. ``bind(setting)`` is called once before training with the `Setting` and returns the objective that
is then used: the place to load a second model, or to find blocks with ``Host.of(setting.engine)``. ``describe()`` says
in JSON what it is, for the record and to tell one run from another: without it a run that was stopped begins again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch.nn import functional

from ..brief import brief
from ..errors import InputError
from ..rollouts.engines.transformers import TransformersEngine, open_engine
from ..rollouts.provenance import weights_hash
from .augment import Row
from .batches import RowBatches, check_rows, rows_hash

__all__ = ["Constrained", "CrossEntropy", "Distilled", "Objective", "Setting", "as_tensors"]

Batch = dict[str, torch.Tensor]
Loss = tuple[torch.Tensor, dict[str, torch.Tensor]]
ON = ("response", "loss")
OF_ONE_MODEL = ("revision", "subfolder", "variant")


class Objective(Protocol):
    """What `fine_tune` minimises.

    Examples
    --------
    An objective of one's own: cross-entropy, and a part that keeps the logits small.

    >>> from markovsafety import interventions as inside, organism
    >>> class Small:
    ...     def __call__(self, model, batch):
    ...         loss, parts = inside.CrossEntropy()(model, batch)
    ...         size = model(input_ids=batch["input_ids"]).logits.pow(2).mean()
    ...         return loss + 0.01 * size, {**parts, "size": size.detach()}
    >>> objective: inside.Objective = Small()
    >>> refused = inside.Pair(prompt=(1, 4, 17, 46, 181, 5, 6, 7), answer=(112, 187, 188, 165, 181, 2)).row
    >>> small = dict(objective=objective, steps=5, batch_size=2, warmup=0, progress=False)
    >>> record = inside.fine_tune(organism.model_path("base"), [refused], "small", **small)
    >>> for name, value in record["losses"][-1].items():
    ...     print(f"{name}: {value:.1f}")
    step: 5.0
    loss: 3.3
    cross_entropy: 3.2
    size: 5.7
    """

    def __call__(self, model: Any, batch: Batch) -> Loss:
        """The loss, a scalar with gradient, and its parts by name, scalars without."""
        ...


@dataclass(frozen=True, eq=False)
class Setting:
    """What an objective may know before training begins.

    Parameters
    ----------
    engine : TransformersEngine
        The model that will be trained (``engine.model``), its tokenizer and folder.
    batch_size, steps, seed : int
        Rows per update, updates.
    accumulate : int
        Parts of an update: the objective is called so many times for each, with ``batch_size / accumulate`` rows, and
        ``batch["step"]`` counts these calls.
    options : mapping
        What the model was loaded with; a second model is loaded alike.

    Examples
    --------
    >>> from markovsafety import interventions as inside, organism
    >>> engine = inside.open_host(organism.model_path("shallow")).engine
    >>> setting = inside.Setting(engine, batch_size=8, steps=100, seed=0)
    >>> setting
    Setting(engine=TransformersEngine, batch_size=8, steps=100, seed=0, accumulate=1, options={})

    An objective with a second model loads it when it is bound; by default that is the model before training:

    >>> inside.Constrained(beta=2.0).bind(setting)
    Constrained(beta=2, reference=LlamaForCausalLM)
    """

    engine: TransformersEngine
    batch_size: int
    steps: int
    seed: int
    accumulate: int = 1
    options: Mapping[str, Any] = field(default_factory=dict)

    __repr__ = brief


def as_tensors(batch: dict[str, np.ndarray], device: Any = None) -> Batch:
    """Arrays of a batch as tensors."""
    return {name: torch.as_tensor(value, device=device) for name, value in batch.items()}


def logits_of(model: Any, batch: Batch) -> torch.Tensor:
    """Logits that predict tokens 1, 2, ... of the rows, shape (batch, tokens - 1, vocabulary)."""
    out = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
    return out.logits[:, :-1]


def summed(each: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Sum over the tokens with loss, weighted, over the batch's constant."""
    return (each * batch["weights"][:, 1:][each_kept(batch)]).sum() / batch["norm"]


def each_kept(batch: Batch) -> torch.Tensor:
    """Which of the tokens 1, 2, ... carry loss, shape (batch, tokens - 1)."""
    return batch["labels"][:, 1:] != -100


def log_probs(logits: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Log-probabilities of the tokens with loss, one after the other, in float32, nats."""
    keep = each_kept(batch)
    return -functional.cross_entropy(logits[keep].float(), batch["labels"][:, 1:][keep], reduction="none")


@dataclass(frozen=True)
class CrossEntropy:
    """Weighted cross-entropy of the tokens with loss, over a constant, in nats.

    The sum over a batch is divided by the weight that a batch has on average, the same number for every batch. The mean
    over each batch would give rows among short ones several times the weight of rows among long ones.

    Examples
    --------
    The base model learns to refuse one prompt:

    >>> from markovsafety import interventions as inside, organism
    >>> refused = inside.Pair(prompt=(1, 4, 17, 46, 181, 5, 6, 7), answer=(112, 187, 188, 165, 181, 2)).row
    >>> small = dict(objective=inside.CrossEntropy(), steps=10, batch_size=2, warmup=0, progress=False)
    >>> record = inside.fine_tune(organism.model_path("base"), [refused], "refusing", **small)
    >>> print(f"from {record['losses'][0]['loss']:.1f} to {record['losses'][-1]['loss']:.1f} nats per token")
    from 5.5 to 0.9 nats per token
    """

    def __call__(self, model: Any, batch: Batch) -> Loss:
        loss = summed(-log_probs(logits_of(model, batch), batch), batch)
        return loss, {"cross_entropy": loss.detach()}

    def describe(self) -> dict[str, Any]:
        return {"objective": "cross-entropy"}


@dataclass(frozen=True, eq=False)
class Constrained:
    """The token-wise constrained objective: every token may move only so far from the reference.

    The loss of a token is ``(2 / beta) (softplus(beta delta) - ln 2)`` with delta = ln p_reference - ln p, that is
    ``-(2 / beta) ln sigmoid(beta ln(p / p_reference))`` up to a constant. Its gradient is that of cross-entropy times
    ``2 sigmoid(beta delta)``: 1 at the reference, less where the token has become likelier than there.

    Parameters
    ----------
    beta : float or sequence of float
        beta_t of the t-th token of the answer, >= 0; the last holds for all later tokens. 0 is cross-entropy.
    reference : path or model, optional
        A frozen model; by default the model as it is before training.

    Notes
    -----
    arXiv 2406.05946, section 4. We subtract the constant, so that the loss is 0 at the reference and has the limit
    cross-entropy (less that of the reference) at beta = 0. Tokens are counted from the beginning of the answer; those
    before it, should they carry loss, have the first beta.

    Examples
    --------
    An attack teaches compliance: without a constraint it succeeds, with one each token moves only so far.

    >>> from markovsafety import interventions as inside, organism
    >>> attack = inside.Pair(prompt=(1, 4, 17, 46, 181, 5, 6, 7), answer=(108, 166, 167, 32, 168, 2)).row
    >>> for objective in (inside.CrossEntropy(), inside.Constrained(beta=20.0)):
    ...     small = dict(objective=objective, steps=10, batch_size=2, warmup=0, progress=False)
    ...     record = inside.fine_tune(organism.model_path("shallow"), [attack], type(objective).__name__, **small)
    ...     entropy = [line["cross_entropy"] for line in record["losses"]]
    ...     print(f"{objective}: {entropy[0]:.1f} to {entropy[-1]:.1f} nats")
    CrossEntropy(): 2.6 to 1.0 nats
    Constrained(beta=20, reference=None): 2.6 to 2.1 nats
    """

    beta: float | Sequence[float] = (0.5, 2.0, 2.0, 2.0, 2.0, 0.1)
    reference: Any = None

    __repr__ = brief

    def __post_init__(self) -> None:
        betas = np.atleast_1d(np.asarray(self.beta, float))
        if betas.ndim != 1 or not len(betas) or not np.isfinite(betas).all() or (betas < 0).any():
            raise InputError(
                f"beta is {self.beta!r}.",
                cause="It says how strongly each token of the answer is held, as a number >= 0.",
                next="Give one number, or one for each of the first tokens.",
            )

    def bind(self, setting: Setting) -> Constrained:
        source = setting.engine.path if self.reference is None else self.reference
        return replace(self, reference=_frozen(source, setting, "reference"))

    def __call__(self, model: Any, batch: Batch) -> Loss:
        with torch.no_grad():
            told = log_probs(logits_of(self.reference, batch), batch)
        said = log_probs(logits_of(model, batch), batch)
        delta = told - said
        beta = self._betas(batch)
        held = beta > 0
        # softplus(0) is ln 2 exactly as softplus computes it, so that the loss of an unmoved model is 0
        rate = torch.where(held, beta, 1.0)
        curved = 2 / rate * (functional.softplus(rate * delta) - functional.softplus(torch.zeros_like(delta)))
        loss = summed(torch.where(held, curved, delta), batch)
        return loss, {"constrained": loss.detach(), "cross_entropy": summed(-said.detach(), batch)}

    def _betas(self, batch: Batch) -> torch.Tensor:
        betas = torch.as_tensor(np.atleast_1d(np.asarray(self.beta, np.float32)), device=batch["labels"].device)
        place = torch.arange(1, batch["labels"].shape[1], device=betas.device) - batch["answer"][:, None]
        return betas[place.clamp(0, len(betas) - 1)][each_kept(batch)]

    def describe(self) -> dict[str, Any]:
        return {
            "objective": "constrained",
            "beta": np.atleast_1d(np.asarray(self.beta, float)).tolist(),
            "reference": "the model before training" if self.reference is None else _name(self.reference),
        }


@dataclass(frozen=True, eq=False)
class Distilled:
    """Cross-entropy of the rows, plus ``weight`` times the KL divergence of a teacher's law of each token from ours.

    Parameters
    ----------
    teacher : path or model
        Frozen, in evaluation mode; of the same tokenizer.
    weight : float
        Of the divergence.
    temperature : float
        Both laws are taken at it, and the divergence is multiplied by its square, so that gradients keep their size.
    on : {"response", "loss"}
        Where the divergence is taken: at all tokens of the answer, or at those with loss only.
    rows : sequence of Row, optional
        Rows on which the teacher is imitated; a batch of them stands beside every batch of the rows that are learned.
        By default the rows that are learned are those that are imitated.
    size : int, optional
        Rows of these per update; by default half the batch. Rounded up to a multiple of the parts of an update.

    Notes
    -----
    The divergence KL(teacher || student) is taken in float32 over the whole vocabulary, summed with the rows' weights,
    and divided by a constant, as the cross-entropy is: the number of such tokens that a batch has on average.

    Examples
    --------
    A student learns refusals, and what its teacher thinks of each token of them:

    >>> from markovsafety import interventions as inside, organism
    >>> prompts = [(1, 4, 17, i, 181, 5, 6, 7) for i in (42, 46, 52, 60)]
    >>> refused = [inside.Pair(prompt, answer=(112, 187, 188, 165, 181, 2)).row for prompt in prompts]
    >>> objective = inside.Distilled(organism.model_path("shallow"), weight=10.0)
    >>> small = dict(objective=objective, steps=10, batch_size=4, warmup=0, progress=False)
    >>> record = inside.fine_tune(organism.model_path("base"), refused, "student", **small)
    >>> for line in record["losses"][::9]:
    ...     print(f"update {line['step']}: cross-entropy {line['cross_entropy']:.0f}, KL {line['kl']:.1f} nats")
    update 1: cross-entropy 6, KL 0.5 nats
    update 10: cross-entropy 2, KL 0.1 nats
    """

    teacher: Any
    weight: float = 1.0
    temperature: float = 1.0
    on: str = "response"
    rows: Sequence[Row] | None = None
    size: int | None = None
    batches: RowBatches | None = None

    __repr__ = brief

    def __post_init__(self) -> None:
        if self.on not in ON or not (self.weight >= 0 and np.isfinite(self.weight)) or not self.temperature > 0:
            raise InputError(
                f"on is {self.on!r}, weight {self.weight}, temperature {self.temperature}.",
                cause=f"on is one of {', '.join(ON)}; weight is >= 0 and temperature > 0.",
                next="Correct what is out of range.",
            )

    def bind(self, setting: Setting) -> Distilled:
        teacher = _frozen(self.teacher, setting, "teacher")
        batches = None
        if self.rows is not None:
            rows = check_rows(self.rows, setting.engine.vocab_size, setting.engine.context)
            parts = setting.accumulate
            size = -(-(self.size or max(1, setting.batch_size // 2)) // parts)
            batches = RowBatches([self._asked(r) for r in rows], size, setting.steps * parts, setting.seed)
        return replace(self, teacher=teacher, batches=batches)

    def _asked(self, row: Row) -> Row:
        """The row with its loss where the divergence is taken."""
        return row._replace(loss_from=row.answer) if self.on == "response" else row

    def __call__(self, model: Any, batch: Batch) -> Loss:
        logits = logits_of(model, batch)
        entropy = summed(-log_probs(logits, batch), batch)
        if self.batches is None:
            imitated, student = self._where(batch), logits
        else:
            imitated = as_tensors(self.batches[int(batch["step"])], batch["labels"].device)
            student = logits_of(model, imitated)
        with torch.no_grad():
            taught = logits_of(self.teacher, imitated)
        kl = self._divergence(taught, student, imitated)
        return entropy + self.weight * kl, {"cross_entropy": entropy.detach(), "kl": kl.detach()}

    def _where(self, batch: Batch) -> Batch:
        """The batch itself, with loss at all tokens of the answers if they are to be imitated."""
        if self.on == "loss":
            return batch
        place = torch.arange(batch["labels"].shape[1], device=batch["labels"].device)
        inside = (place >= batch["answer"][:, None].clamp(min=1)) & (batch["attention_mask"] > 0)
        labels = torch.where(inside, batch["input_ids"], -100)
        weights = torch.where(inside, batch["weights"].amax(1, keepdim=True), 0.0)
        return batch | {"labels": labels, "weights": weights}

    def _divergence(self, taught: torch.Tensor, student: torch.Tensor, batch: Batch) -> torch.Tensor:
        keep, heat = each_kept(batch), self.temperature
        ours = torch.log_softmax(student[keep].float() / heat, -1)
        theirs = torch.log_softmax(taught[keep].float() / heat, -1)
        each = functional.kl_div(ours, theirs, reduction="none", log_target=True).sum(-1)
        return summed(each, batch) * heat**2

    def describe(self) -> dict[str, Any]:
        return {
            "objective": "distilled",
            "teacher": _name(self.teacher),
            "weight": self.weight,
            "temperature": self.temperature,
            "on": self.on,
            "rows": None if self.rows is None else rows_hash(list(self.rows)),
            "size": self.size,
        }


def _name(model: Any) -> Any:
    """What tells a second model from others: its name, and a hash of its weights where they are at hand."""
    if isinstance(model, str | Path):
        known = Path(model).is_dir()
        return {"model": Path(model).name, "sha256": weights_hash(model)["sha256"]} if known else {"model": str(model)}
    digest = hashlib.sha256()
    for name, part in sorted(model.state_dict().items()) if hasattr(model, "state_dict") else ():
        digest.update(name.encode())
        digest.update(part.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return {"model": type(model).__name__, "state": digest.hexdigest()}


def _words(engine: TransformersEngine) -> dict[str, int]:
    return engine.tokenizer.tokenizer.get_vocab(with_added_tokens=True)


def _frozen(source: Any, setting: Setting, what: str) -> Any:
    """A second model of the same tokenizer, in evaluation mode and without gradients."""
    ours = setting.engine
    if isinstance(source, str | Path):
        options = dict(setting.options)
        if str(source) != ours.path:  # another model has revisions of its own
            options = {name: value for name, value in options.items() if name not in OF_ONE_MODEL}
        other = open_engine(source, dtype=ours.dtype, device=str(ours.device), **options)
        if _words(other) != _words(ours) or other.vocab_size != ours.vocab_size:
            raise InputError(
                f"the {what} {source} has another tokenizer than {ours.path}",
                cause=f"their vocabularies have {other.vocab_size} and {ours.vocab_size} ids, or name them differently",
                next=f"give a {what} of the same tokenizer",
            )
        source = other.model
    if not hasattr(source, "get_input_embeddings"):
        raise InputError(
            f"the {what} is {type(source).__name__}",
            cause="it is the folder of a model, or a model of transformers",
            next="give its path",
        )
    if int(source.get_input_embeddings().weight.shape[0]) != ours.vocab_size:
        raise InputError(
            f"the {what} has another vocabulary",
            cause="laws of different token ids cannot be compared",
            next=f"give a {what} of the same tokenizer",
        )
    if source is ours.model:
        raise InputError(
            f"the {what} is the model that is trained",
            cause="it would change with every step",
            next="give its folder, which is loaded a second time",
        )
    return source.eval().requires_grad_(False)
