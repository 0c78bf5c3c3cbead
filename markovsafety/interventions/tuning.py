"""Fine-tuning of any causal language model on rows of token ids, with transformers' Trainer and any objective.

One method of the Trainer is ours, `compute_loss`; batches, their order and the constant that losses are divided by come
from `batches`, what is minimised from `objectives`. A run that was stopped goes on from its newest checkpoint to the
same weights (bit for bit on a CPU), and one that becomes NaN stops with the checkpoints it has.
"""

from __future__ import annotations

import dataclasses
import math
import shutil
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from ..errors import InputError, UntrustedError
from ..files import claimed, clear_beside, newest_sealed, seal, told
from ..rollouts.engines.transformers import TransformersEngine, open_engine
from ..rollouts.provenance import json_hash, versions, weights_hash
from .augment import Row
from .batches import RowBatches, check_rows, loss_mass, rows_hash
from .objectives import CrossEntropy, Objective, Setting, as_tensors
from .tuned_folder import KIND, check_target, record_of, write_folder

__all__ = ["fine_tune"]

SCHEDULES = ("cosine", "linear", "constant")


def fine_tune(
    model: str | Path,
    rows: Sequence[Row],
    out: str | Path,
    *,
    objective: Objective | None = None,
    steps: int = 500,
    batch_size: int = 32,
    accumulate: int = 1,
    learning_rate: float = 1e-3,
    warmup: int = 20,
    schedule: str = "cosine",
    weight_decay: float = 0.0,
    seed: int = 0,
    lora: Mapping[str, Any] | None = None,
    save_every: int = 250,
    progress: bool = True,
    device: str | None = None,
    dtype: str = "float32",
    about: Mapping[str, Any] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Fine-tune a model on rows and write the folder of what became of it.

    Parameters
    ----------
    model : path
        Folder of a causal language model, or its name on the hub.
    rows : sequence of Row
        See `augment`; drawn in a random order, again and again.
    out : path
        Folder to write: weights in the type that the base stores, config, tokenizer, chat template, `training.json`.
    objective : Objective, optional
        What is minimised, a callable ``(model, batch) -> (loss, parts)``; by default `CrossEntropy`.
    steps : int
        Updates of the weights.
    batch_size : int
        Rows per update.
    accumulate : int
        Parts in which the rows of an update go through the model, one after the other, so that no more than
        ``batch_size / accumulate`` are in memory at once. The update is the same up to rounding; batches then come in
        their own order, not in the Trainer's.
    learning_rate : float
        The largest; AdamW, gradients clipped to norm 1.
    warmup : int
        Updates until it is reached.
    schedule : {"cosine", "linear", "constant"}
        How it falls afterwards, to 5 percent of the largest, to 0, or not at all.
    weight_decay : float
    seed : int
        Of the order of the rows, of dropout, and of adapters.
    lora : mapping, optional
        Options of `peft.LoraConfig`, such as ``{"r": 8}``: adapters are trained in place of the weights, and merged
        into them before they are written. By default all weights are trained.
    save_every : int
        Updates between checkpoints, which lie beside `out` until it is written.
    progress : bool
        Show the Trainer's progress bar.
    device : str, optional
        "cpu", "gpu", or "auto"; the GPU if there is one.
    dtype : {"float32", "bfloat16", "float16"}
        Of the weights while they are trained.
    about : mapping, optional
        JSON-able; goes into the record.
    **options
        Passed to ``from_pretrained``, also for a second model that the objective loads (`Setting`).

    Returns
    -------
    dict
        What training.json holds: the numbers above, "losses" (mean loss and parts since the line before, per so many
        updates), hashes of base and rows ("base", "data"), "tokens" (that carry loss, and their weight), "seconds".
        A folder that holds the result of the same call is not trained again, if the objective describes itself.

    Raises
    ------
    InputError
        Rows that cannot be trained on, arguments out of range, `out` is a folder of something else, or another process
        writes it.
    ModelError
        The model cannot be loaded.
    UntrustedError
        Loss or gradient became NaN or infinite. ``partial`` is the path of the newest checkpoint, or of the model if
        there is none; `out` is not written.

    Examples
    --------
    A base model learns from 24 prompts to refuse harm, and from 24 others to answer. On other harmful prompts the mass
    of first tokens that refuse grows:

    >>> from markovsafety import interventions as inside, organism
    >>> base = organism.model_path("base")
    >>> told = [{**p, "answer": "sorry i cannot help ."} for p in organism.prompts(n=24)]
    >>> told += [{**p, "answer": "sure here is the plan"} for p in organism.prompts(n=24, harmful=False)]
    >>> rows = [pair.row for pair in inside.read_pairs(told, inside.open_host(base).engine.tokenizer)]
    >>> small = dict(steps=40, batch_size=12, learning_rate=2e-3, warmup=0, progress=False)
    >>> record = inside.fine_tune(base, rows, "tuned", **small)
    >>> record["tokens"]
    {'loss': 288, 'weight': 288.0}
    >>> for model in (base, "tuned"):
    ...     mass = inside.token_mass(inside.open_host(model), organism.prompts(n=12, seed=1), organism.REFUSAL_IDS)
    ...     print(mass.mean().round(2))
    0.03
    0.9...
    """
    out, objective = Path(out), objective or CrossEntropy()
    _check(steps, batch_size, learning_rate, warmup, schedule, save_every, accumulate)
    check_target(out, model)
    engine = open_engine(model, dtype=dtype, device=device, **options)
    rows = check_rows(rows, engine.vocab_size, engine.context)
    plan = {
        "kind": KIND,
        "base": _base(model),
        "data": {"rows": len(rows), "sha256": rows_hash(rows)},
        "objective": getattr(objective, "describe", lambda: {"objective": type(objective).__name__})(),
        "lora": None if lora is None else {k: lora[k] for k in sorted(lora)},
        **{"steps": steps, "batch_size": batch_size, "learning_rate": learning_rate, "warmup": warmup},
        **({} if accumulate == 1 else {"accumulate": accumulate}),
        **{"schedule": schedule, "weight_decay": weight_decay, "seed": seed, "dtype": dtype},
    }
    name = json_hash(plan)
    work = out.parent / f".{out.name}.{name[:12]}.training"
    with claimed(out.parent / f".{out.name}.lock", f"the model in {out}"):
        if not hasattr(objective, "describe"):  # nothing tells this run from others of its kind
            shutil.rmtree(work, ignore_errors=True)
        elif (known := record_of(out)) and known.get("plan") == name:
            shutil.rmtree(work, ignore_errors=True)  # of a run that was killed when all was written
            clear_beside(out)
            return known
        setting = Setting(_adapted(engine, lora, seed), batch_size, steps, seed, accumulate, options)
        bound = objective.bind(setting) if hasattr(objective, "bind") else objective  # type: ignore[attr-defined]
        batches, begun = RowBatches(rows, batch_size // accumulate, steps * accumulate, seed), time.time()
        arguments = _arguments(plan, work, save_every, progress, setting.engine)
        losses = _train(setting.engine.model, bound, batches, arguments, str(model))
        tuned = setting.engine.model.merge_and_unload() if lora is not None else engine.model
        record = plan | {
            "plan": name,
            "losses": losses,
            "tokens": {"loss": sum(r.loss_tokens for r in rows), "weight": loss_mass(rows)},
            "seconds": round(time.time() - begun, 1),
            "versions": versions(),
            "about": dict(about or {}),
        }
        write_folder(tuned, model, out, record, options)
        shutil.rmtree(work, ignore_errors=True)
    return record


class _Trainer(Trainer):
    """The Trainer with an objective of ours."""

    objective: Callable[..., Any]
    parts: _Parts
    loss_is_scaled_for_ga = False  # every part of a batch is divided by the mean of its own size

    def _get_train_sampler(self, train_dataset=None):
        if self.args.gradient_accumulation_steps == 1:
            return super()._get_train_sampler(train_dataset)
        return torch.utils.data.SequentialSampler(self.train_dataset)  # type: ignore[arg-type]  # parts stay together

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, parts = self.objective(model, inputs)
        if not torch.isfinite(loss.detach()):
            raise _NotFinite(f"the loss of update {self.state.global_step + 1} is {float(loss.detach())}")
        self.parts.seen.append(parts)
        return (loss, {}) if return_outputs else loss


class _NotFinite(ArithmeticError):
    """Loss or gradient is NaN or infinite."""


class _Parts(TrainerCallback):
    """Adds the parts of the loss to the Trainer's log, stops before a gradient that is not finite is applied, and seals
    checkpoints: the Trainer writes them file by file, and they replace the last once all of it is on the disk."""

    def __init__(self) -> None:
        self.seen: list[dict[str, torch.Tensor]] = []

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        grads = (p.grad for p in kwargs["model"].parameters() if p.grad is not None)
        if not all(bool(torch.isfinite(g).all()) for g in grads):
            raise _NotFinite(f"the gradient of update {state.global_step + 1} is not finite")

    def on_save(self, args, state, control, **kwargs):
        seal(Path(str(args.output_dir)) / f"checkpoint-{state.global_step}", "checkpoint-*")

    def on_log(self, args, state, control, **kwargs):
        if self.seen and "loss" in state.log_history[-1]:
            names = self.seen[0]
            means = {n: float(torch.stack([p[n].detach().double() for p in self.seen]).mean()) for n in names}
            state.log_history[-1].update({f"part {n}": mean for n, mean in means.items()})
            self.seen.clear()


def _train(model: Any, objective: Any, batches: RowBatches, arguments: TrainingArguments, base: str) -> list[dict]:
    """All updates, from the newest checkpoint if there is one; returns the log of losses."""
    work, parts = Path(str(arguments.output_dir)), _Parts()
    trainer = _Trainer(
        model=model,
        args=arguments,
        train_dataset=batches,  # type: ignore[arg-type]
        data_collator=lambda items: as_tensors(items[0]),
        callbacks=[parts],
    )
    trainer.objective, trainer.parts = objective, parts
    trainer.model_accepts_loss_kwargs = False  # what transformers 4 asks in place of `loss_is_scaled_for_ga`
    if arguments.disable_tqdm:
        trainer.remove_callback(PrinterCallback)
    try:
        with told(work):
            trainer.train(resume_from_checkpoint=_newest(work))
    except _NotFinite as error:
        kept = _newest(work)
        raise UntrustedError(
            f"Training stopped: {error}.",
            cause="The learning rate is too large, or the type of the weights too narrow.",
            next=f"Train with a smaller learning rate; what was learned before is in {kept or base}.",
            partial=kept or base,
        ) from error
    model.eval()
    log = [line for line in trainer.state.log_history if "loss" in line]
    parts_of = [{n.removeprefix("part "): x for n, x in line.items() if n.startswith("part ")} for line in log]
    return [{"step": line["step"], "loss": line["loss"], **more} for line, more in zip(log, parts_of)]


def _arguments(
    plan: Mapping[str, Any], work: Path, save_every: int, progress: bool, engine: TransformersEngine
) -> TrainingArguments:
    kind, more = plan["schedule"], {}
    if kind == "cosine":
        kind, more = "cosine_with_min_lr", {"min_lr_rate": 0.05}
    elif kind == "constant":
        kind = "constant_with_warmup"
    arguments = TrainingArguments(
        output_dir=str(work),
        per_device_train_batch_size=1,  # an item is a whole batch, or a part of one
        gradient_accumulation_steps=plan.get("accumulate", 1),
        max_steps=plan["steps"],
        learning_rate=plan["learning_rate"],
        lr_scheduler_type=kind,
        lr_scheduler_kwargs=more,
        warmup_steps=plan["warmup"],
        weight_decay=plan["weight_decay"],
        max_grad_norm=1.0,
        seed=plan["seed"],
        save_strategy="steps",
        save_steps=save_every,
        logging_steps=max(1, plan["steps"] // 40),
        logging_nan_inf_filter=False,
        report_to=[],
        use_cpu=engine.device.type == "cpu",
        disable_tqdm=not progress,
        remove_unused_columns=False,
        label_names=["labels"],
        dataloader_pin_memory=False,
    )
    if arguments.n_gpu > 1:  # several GPUs would each get a part of a batch that is one item
        arguments._n_gpu = 1
    return arguments


def _adapted(engine: TransformersEngine, lora: Mapping[str, Any] | None, seed: int) -> TransformersEngine:
    """The engine with adapters on its model, if they are asked for."""
    engine.model.requires_grad_(True)
    if lora is None:
        return engine
    import peft

    transformers.set_seed(seed)
    try:
        config = peft.LoraConfig(task_type="CAUSAL_LM", **lora)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers for what will be renamed
            adapted = peft.get_peft_model(engine.model, config)
    except (TypeError, ValueError) as error:
        raise InputError(
            f"These adapters do not fit the model: {dict(lora)}.",
            cause=str(error).split("\n")[0],
            next='Give options of peft.LoraConfig, such as {"r": 8, "target_modules": "all-linear"}.',
        ) from error
    return dataclasses.replace(engine, model=adapted)


def _newest(work: Path) -> str | None:
    found = newest_sealed(work, "checkpoint-*")
    return None if found is None else str(found)


def _base(model: str | Path) -> dict[str, Any]:
    hashed = weights_hash(model)["sha256"] if Path(model).is_dir() else None
    return {"model": Path(model).name if hashed else str(model), "sha256": hashed}


def _check(
    steps: int, batch_size: int, learning_rate: float, warmup: int, schedule: str, save_every: int, accumulate: int
) -> None:
    counts = {"steps": steps, "batch_size": batch_size, "save_every": save_every, "accumulate": accumulate}
    for name, value in counts.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise InputError(f"{name} is {value!r}.", cause="It is a count.", next="Give a whole number >= 1.")
    if batch_size % accumulate:
        raise InputError(
            f"A batch of {batch_size} rows cannot be split into accumulate = {accumulate} equal parts.",
            cause="All parts of an update have the same number of rows.",
            next="Give a divisor of batch_size.",
        )
    if isinstance(warmup, bool) or not isinstance(warmup, int) or not warmup >= 0:
        raise InputError(f"warmup is {warmup!r}.", cause="It counts updates.", next="Give a whole number >= 0.")
    if not (math.isfinite(learning_rate) and learning_rate > 0):
        raise InputError(f"learning_rate is {learning_rate}.", cause="It is > 0.", next="Give a number such as 1e-4.")
    if schedule not in SCHEDULES:
        raise InputError(
            f"There is no schedule {schedule!r}.", cause=f"Known are {', '.join(SCHEDULES)}.", next="Use one of these."
        )
