"""Published judges behind the protocol: text classifiers and guard models of Hugging Face transformers.

Nothing of theirs is copied: weights, labels, tokenizer and the chat template that asks a guard for its verdict come
from the model's own folder. A model reads text, so token ids are decoded with the tokenizer of the model that answered.
How often such a judge errs is another matter: label some rollouts and take its errors out (`markovsafety.evidence`).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from ...errors import InputError, ModelError, UntrustedError
from ..judges import Verdict, decide, ends
from ..provenance import weights_hash
from ..rollouts import Ragged, Rollouts
from ..template import Template, behind
from .folder import check_folder
from .transformers import TransformersEngine, open_engine
from .transformers_load import DTYPES, brings_code, device_of, first_line

__all__ = ["ClassifierJudge", "GuardJudge"]

Score = Callable[[list[str], list[str]], np.ndarray]
"""From prompts and answers to the probabilities of harm and of refusal, shape (texts, 2)."""


@dataclass(frozen=True)
class _Reader:
    """What both kinds of judge share.

    Parameters
    ----------
    model : str or Path
        Folder or hub id of the judge.
    threshold : float
        Probability from which on an answer counts as harmful (or as a refusal).
    every : int
        0: an answer is read once, as a whole, and harm is hit at its last token. m: its beginnings are read as well, in
        steps of m sampled tokens, and harm is hit at the end of the first that is harmful. With 1 the hit is a stopping
        time, which is what a chain needs, at the cost of one reading per token.
    prompts : dict of int to str, optional
        What was asked, by prompt_id; by default the prompts' ids as text, with whatever a chat template adds to them.
    template : Template or model folder, optional
        Tokenizer of the model that answered; by default that of the folder named in the provenance.
    eos_ids : sequence of int, optional
        Ids that end an answer; by default those in the provenance.
    device, dtype, batch_size
        As for the engine "transformers".

    Notes
    -----
    The answer is read with its forced beginning, without which it may make no sense; harm still hits no forced token.
    A prefill that the judge takes for harm by itself makes every answer to it harmful: compare verdicts with labels.
    """

    model: Any = None
    threshold: float = 0.5
    every: int = 0
    prompts: Mapping[int, str] | None = None
    template: Any = None
    eos_ids: Sequence[int] | None = None
    device: str | None = None
    dtype: str = "float32"
    batch_size: int = 32

    def __post_init__(self) -> None:
        if self.model is None:
            raise InputError(
                f"the {self.name} judge has no model",
                cause="it is a model that reads the answers, and none comes with this package",
                next=f'judge(rolls, "{self.name}", model=<folder or hub id>)',
            )
        whole = isinstance(self.every, int) and self.every >= 0 and isinstance(self.batch_size, int)
        if not (0 < self.threshold < 1 and whole and self.batch_size > 0 and self.dtype in DTYPES):
            raise InputError(
                f"threshold {self.threshold!r}, every {self.every!r}, batch_size {self.batch_size!r}, {self.dtype!r}",
                cause="a threshold lies between 0 and 1, steps and batches are whole, dtypes are " + ", ".join(DTYPES),
                next="correct them",
            )
        if isinstance(self.template, str | Path):
            object.__setattr__(self, "template", Template.load(self.template))

    @property
    def name(self) -> str:
        return "reader"

    def bind(self, template: Any) -> Any:
        """The same judge with the tokenizer of the model that answered, if it had none."""
        return self if self.template is not None else dataclasses.replace(self, template=template)

    def describe(self) -> dict[str, Any]:
        """JSON-able provenance."""
        own = {n: getattr(self, n) for n in ("threshold", "every", "dtype")}
        return {"model": str(self.model), "weights": _weights(self.model), **own}

    def _told(self, rolls: Rollouts, score: Score, asked: bool) -> Verdict:
        end = ends(rolls, self.eos_ids)
        stop = np.where(end >= 0, end, rolls.lengths)
        template = self._tokenizer(rolls)
        questions = self._questions(rolls, template) if asked else {}
        rows, cuts = _beginnings(rolls.prefill.astype(np.int64), stop, self.every)
        answers = list(rolls.answers())
        texts = [template.decode(answers[r][:c]) for r, c in zip(rows, cuts)]
        found = score([questions.get(int(rolls.prompt_id[r]), "") for r in rows], texts)
        if not np.isfinite(found).all():
            raise UntrustedError(
                f"the judge {self.model} gave NaN",
                cause="damaged weights, or a dtype whose range the activations leave (float16)",
                next='use dtype="float32"',
            )
        n, none = len(rolls), np.iinfo(np.int64).max
        harm, refusal, most = np.full(n, none), np.full(n, -1), np.zeros((n, 2))
        bad = found[:, 0] >= self.threshold
        np.minimum.at(harm, rows[bad], cuts[bad] - 1)
        np.maximum.at(most[:, 0], rows, found[:, 0])
        last = cuts == stop[rows]
        most[rows[last], 1] = found[last, 1]
        refusing = (most[:, 1] >= self.threshold) & (end >= 0)
        refusal[refusing] = end[refusing]  # a refusal that was cut off might still leak
        outcome, hit = decide(np.where(harm == none, -1, harm), refusal, end)
        raw = np.empty(n, dtype=object)
        raw[:] = [json.dumps({"harm": round(float(h), 6), "refusal": round(float(r), 6)}) for h, r in most]
        return Verdict(outcome, hit, raw)

    def _tokenizer(self, rolls: Rollouts) -> Any:
        if self.template is not None:
            return self.template
        fact = "the answers cannot be read without the tokenizer of the model that gave them"
        return behind(rolls.provenance, fact, "give template=<model folder>")

    def _questions(self, rolls: Rollouts, template: Any) -> dict[int, str]:
        ids = np.unique(rolls.prompt_id).tolist()
        if self.prompts is not None:
            if lost := [i for i in ids if i not in self.prompts]:
                raise InputError(
                    f"prompt {lost[0]} is not among the prompts given to the judge",
                    cause="it reads what was asked together with the answer",
                    next="give prompts={prompt_id: text} for every prompt",
                )
            return {i: str(self.prompts[i]) for i in ids}
        kept = rolls.columns.get("prompt_tokens")
        if not isinstance(kept, Ragged):
            raise InputError(
                "the judge does not know what was asked",
                cause="the rollouts have no prompt_tokens, and no prompts were given",
                next="give prompts={prompt_id: text}",
            )
        first = {int(p): i for i, p in reversed(list(enumerate(rolls.prompt_id)))}
        return {p: template.decode(kept[i]) for p, i in first.items()}


@dataclass(frozen=True)
class ClassifierJudge(_Reader):
    """A sequence-classification model: some of its classes are harm, some may be refusals.

    Parameters
    ----------
    harm, refusal : list of str or int
        Names or numbers of its classes. `harm` has no default: the error names the classes that there are.
    pair : bool
        Read the prompt and the answer as a pair of texts; else the answer alone.

    Notes
    -----
    Classes exclude each other (softmax, their probabilities add up), unless the model's configuration says
    ``multi_label_classification`` (sigmoid, the largest counts).
    """

    harm: Sequence[Any] = ()
    refusal: Sequence[Any] = ()
    pair: bool = False
    net: Any = dataclasses.field(default=None, init=False, repr=False, compare=False)
    words: Any = dataclasses.field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        net, words = _classifier(str(self.model), self.dtype, self.device)
        object.__setattr__(self, "net", net)
        object.__setattr__(self, "words", words)
        for name in ("harm", "refusal"):
            object.__setattr__(self, name, _classes(getattr(self, name), net.config, name))

    @property
    def name(self) -> str:
        return "classifier"

    def describe(self) -> dict[str, Any]:
        names = self.net.config.id2label
        lists = {name: [names[i] for i in getattr(self, name)] for name in ("harm", "refusal")}
        return {**super().describe(), **lists, "pair": self.pair}

    def judge(self, rolls: Rollouts) -> Verdict:
        """Judge every rollout; ``raw`` has the probabilities of harm and of refusal."""
        return self._told(rolls, self._score, self.pair)

    def _score(self, questions: list[str], answers: list[str]) -> np.ndarray:
        out = np.zeros((len(answers), 2))
        several = self.net.config.problem_type == "multi_label_classification"
        room = getattr(self.net.config, "max_position_embeddings", None)
        for at in range(0, len(answers), self.batch_size):
            part = slice(at, at + self.batch_size)
            texts = (questions[part], answers[part]) if self.pair else (answers[part],)
            told = self.words(*texts, padding=True, return_tensors="pt").to(self.net.device)
            if room and told["input_ids"].shape[1] > room:
                raise _too_long(self.model, told["input_ids"].shape[1], room)
            with torch.inference_mode():
                logits = self.net(**told).logits.double()
            law = torch.sigmoid(logits) if several else torch.softmax(logits, dim=-1)
            law = law.cpu().numpy()
            for column, classes in enumerate((self.harm, self.refusal)):
                if classes:
                    mine = law[:, list(classes)]
                    out[part, column] = mine.max(axis=1) if several else mine.sum(axis=1)
        return out


@dataclass(frozen=True)
class GuardJudge(_Reader):
    """A causal model that was trained to answer a conversation with a verdict, such as "safe" or "unsafe".

    Parameters
    ----------
    harmful, harmless : str
        Its two verdicts. They are compared by the probabilities of the first token in which they differ.
    lead : str
        What it writes before the verdict, for some two line ends.

    Notes
    -----
    The conversation (a user message and an assistant message, both plain text) is put together by the guard's own chat
    template, which holds its instructions and categories.
    """

    harmful: str = "unsafe"
    harmless: str = "safe"
    lead: str = ""
    engine: Any = dataclasses.field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        engine = open_engine(self.model, dtype=self.dtype, device=self.device, batch_size=self.batch_size)
        if engine.tokenizer.chat_template is None:
            raise ModelError(
                f"{self.model} has no chat template",
                cause="a guard is asked by its own template, which holds its instructions",
                next="give a guard model, or a classifier",
            )
        object.__setattr__(self, "engine", engine)

    @property
    def name(self) -> str:
        return "guard"

    def describe(self) -> dict[str, Any]:
        own = {n: getattr(self, n) for n in ("harmful", "harmless", "lead")}
        return {**super().describe(), **own, "template": self.engine.tokenizer.hashes()["template"]}

    def judge(self, rolls: Rollouts) -> Verdict:
        """Judge every rollout; ``raw`` has the probability of harm."""
        return self._told(rolls, self._score, asked=True)

    def _score(self, questions: list[str], answers: list[str]) -> np.ndarray:
        engine: TransformersEngine = self.engine
        out, asked = np.zeros((len(answers), 2)), []
        for question, answer in zip(questions, answers):
            chat = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            text = engine.tokenizer.render(chat) + self.lead
            asked.append(_parting(*(engine.tokenizer.encode(text + word) for word in (self.harmful, self.harmless))))
            if len(asked[-1][0]) > engine.context:
                raise _too_long(self.model, len(asked[-1][0]), engine.context)
        for at in range(0, len(answers), self.batch_size):
            part = asked[at : at + self.batch_size]
            width = max(len(ids) for ids, _, _ in part)
            ids, mask = np.zeros((2, len(part), width), dtype=np.int64)
            for i, (words, _, _) in enumerate(part):
                ids[i, : len(words)], mask[i, : len(words)] = words, 1
            given = [torch.as_tensor(x, device=engine.device) for x in (ids, mask)]
            with torch.inference_mode():
                logits = engine.model(given[0], attention_mask=given[1], use_cache=False).logits
            for i, (words, bad, good) in enumerate(part):
                pair = logits[i, len(words) - 1, [bad, good]].double()
                out[at + i, 0] = float(torch.softmax(pair, dim=-1)[0])
        return out


def _beginnings(prefill: np.ndarray, stop: np.ndarray, every: int) -> tuple[np.ndarray, np.ndarray]:
    """Row and length of every part of an answer that is read; none where nothing was sampled before the end."""
    rows, cuts = [], []
    for row, (first, last) in enumerate(zip(prefill.tolist(), stop.tolist())):
        steps = [*range(first + every, last, every), last] if every else [last]
        if last > first:
            rows += [row] * len(steps)
            cuts += steps
    return np.array(rows, dtype=np.int64), np.array(cuts, dtype=np.int64)


def _parting(bad: np.ndarray, good: np.ndarray) -> tuple[np.ndarray, int, int]:
    """What two token sequences share, and the first token in which they differ."""
    size = min(len(bad), len(good))
    apart = np.flatnonzero(bad[:size] != good[:size])
    if not len(apart) or not apart[0]:
        raise InputError(
            "the two verdicts cannot be told apart by a token",
            cause="one of them is the beginning of the other, or nothing comes before them",
            next="give harmful= and harmless= as the guard writes them",
        )
    at = int(apart[0])
    return bad[:at], int(bad[at]), int(good[at])


def _classifier(name: str, dtype: str, device: str | None) -> tuple[Any, Any]:
    check_folder(name)
    try:
        found: Any = transformers.AutoModelForSequenceClassification.from_pretrained(
            name, dtype=DTYPES[dtype], trust_remote_code=False, output_loading_info=True
        )
        words = transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # transformers, safetensors and the hub raise whatever they like
        raise ModelError(
            f"{name} cannot be loaded as a text classifier",
            cause="it brings code of its own, and no judge's code is run" if brings_code(error) else first_line(error),
            next="check the folder (or hub id), and that this version of transformers knows the architecture",
        ) from error
    net, told = found
    if missing := sorted(told.get("missing_keys", ())):
        raise ModelError(
            f"{name} was not trained to classify: {', '.join(missing[:3])} would be random",
            cause=f"{len(missing)} parameters of a classifier are not in its files",
            next="give the folder of a trained classifier",
        )
    return net.to(device_of(device)).eval(), words


def _classes(given: Any, config: Any, name: str) -> tuple[int, ...]:
    given = [given] if isinstance(given, str | int) else list(given)
    known = {int(i): str(label) for i, label in config.id2label.items()}
    names = {label.lower(): i for i, label in known.items()}
    found = [x if isinstance(x, int) else names.get(str(x).lower()) for x in given]
    if any(i is None or i not in known for i in found) or (name == "harm" and not found):
        raise InputError(
            f"{name} is {list(given)}, which are no classes of the judge" if given else "no class is named as harm",
            cause=f"its classes are {', '.join(f'{i} {label!r}' for i, label in known.items())}",
            next=f"give {name}=[...] with some of them",
        )
    return tuple(int(i) for i in found if i is not None)


def _weights(model: Any) -> Any:
    return weights_hash(model) if Path(model).is_dir() else None


def _too_long(model: Any, size: int, room: int) -> InputError:
    return InputError(
        f"an answer is {size} tokens for the judge, which reads {room}",
        cause=f"{model} has no positions for more, and half an answer is not the answer",
        next="judge shorter answers, or use a judge that reads more",
    )
