"""The refusal-feature teacher: trained on alignment pairs, it filters fine-tuning data and teaches the student.

Steps of arXiv 2506.07356: a base model becomes a teacher (cross-entropy and the cosine penalty, `RefusalGuided`); its
refusal feature and a threshold make the filter; the student starts from the base model again and learns the pairs that
the filter kept, while it is held to the frozen teacher on the answers of alignment prompts.

We depart from the paper, as far as it could be read, in two places: the student imitates the teacher on harmless
alignment prompts too (on harmful ones alone it unlearns to answer), and the threshold is fixed on validation pairs with
its false drops beside it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import transformers

from ..bound import encode
from ..brief import brief
from ..errors import InputError
from ..rollouts.provenance import json_hash
from ..rollouts.template import Template
from .data_filter import RefusalFilter, fit_filter, write_filter
from .differences import difference
from .directions import Position
from .host import Host, open_host
from .imitation import Imitated
from .objectives import CrossEntropy
from .pairs import Pair, both_kinds, refuse_all_poison, rows_of
from .refusal_features import RefusalGuided
from .sifting import Sifted
from .tuned_folder import PLACE
from .tuning import fine_tune

__all__ = ["Taught", "check_same_template", "train_student", "train_teacher"]

FEATURES = ("dynamic", "fixed")


@dataclass(frozen=True, eq=False)
class Taught:
    """A teacher that was trained.

    Parameters
    ----------
    model : Path
        Its folder.
    filter : RefusalFilter
        Its feature and threshold.
    path : Path
        Where the filter lies.
    record : dict
        Of `fine_tune`.

    Examples
    --------
    >>> from markovsafety import interventions as inside, organism
    >>> base = organism.model_path("base")
    >>> told = [{**p, "harmful": h, "answer": "sorry i cannot help ." if h else "sure here is the plan"}
    ...         for h in (True, False) for p in organism.prompts(n=24, harmful=h)]
    >>> pairs = inside.read_pairs(told, inside.open_host(base).engine.tokenizer)
    >>> small = dict(steps=20, batch_size=12, learning_rate=2e-3, warmup=0, progress=False)
    >>> taught = inside.train_teacher(base, pairs, "teacher", **small)
    >>> taught
    Taught(model=...('teacher/model'), filter=RefusalFilter, path=...('teacher/filter.safetensors'), record=dict of 19)
    >>> print(taught.filter.false_drops)
    harmless dropped on validation = 0   95 % [0, 0.459]   because: sampling 0.23; judge, lumping, model,
        truncation, rounding not assessed
    """

    model: Path
    filter: RefusalFilter
    path: Path
    record: dict[str, Any]

    __repr__ = brief

    @property
    def verdict(self) -> str:
        """One line."""
        return str(self.filter)

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        told = {"model": str(self.model), "filter": self.filter.to_json(), "path": str(self.path)}
        return encode(told | {"record": self.record, "verdict": self.verdict})


def train_teacher(
    base: str | Path,
    pairs: Sequence[Pair],
    out: str | Path,
    *,
    level: int | None = None,
    position: Position = "t_post",
    weight: float = 0.1,
    feature: str = "dynamic",
    momentum: float = 0.0,
    recall: float = 0.95,
    threshold: float | None = None,
    validation: float = 0.25,
    seed: int = 0,
    device: str | None = None,
    dtype: str = "float32",
    system: str | None = None,
    options: Mapping[str, Any] | None = None,
    **training: Any,
) -> Taught:
    """Train a teacher on alignment pairs and fix its filter.

    Parameters
    ----------
    base : path or hub id
        The model that the student starts from, too.
    pairs : sequence of Pair
        Labelled: harmful prompts with refusals, harmless ones with helpful answers.
    out : path
        Folder: ``model`` (the teacher) and ``filter.safetensors``.
    level : int, optional
        Where the feature lies, 0 to L; by default L // 2.
    position : "t_post", "t_inst" or int
    weight : float
        Of the penalty (lambda). The paper's is not known; 0.1 is ours.
    feature : {"dynamic", "fixed"}
        R of every batch, with its gradient, or the base model's.
    momentum : float
        See `RefusalGuided`.
    recall, threshold
        See `fit_filter`.
    validation : float
        Share of the prompts of each kind that is not trained on and fixes the threshold.
    seed : int
    device, dtype
        See `fine_tune`.
    system : str, optional
        System message that the pairs' prompts have (`read_pairs` puts it in where the template has it); it goes into
        the filter, which then takes prompts with it only.
    options : mapping, optional
        Passed to ``from_pretrained``.
    **training
        Of `fine_tune`: steps, batch_size, learning_rate, lora ... (adapters for large models, all weights by default).

    Returns
    -------
    Taught

    Raises
    ------
    InputError
        No pairs, pairs without label or answer, one kind alone, or arguments out of range.
    UntrustedError
        The loss became NaN (``partial`` is the last good checkpoint), or no threshold has the recall: the teacher stays
        in `out`, and the same call with another recall does not train it again.

    Examples
    --------
    >>> from markovsafety import interventions as inside, organism
    >>> base = organism.model_path("base")
    >>> told = [{**p, "harmful": h, "answer": "sorry i cannot help ." if h else "sure here is the plan"}
    ...         for h in (True, False) for p in organism.prompts(n=24, harmful=h)]
    >>> pairs = inside.read_pairs(told, inside.open_host(base).engine.tokenizer)
    >>> small = dict(steps=20, batch_size=12, learning_rate=2e-3, warmup=0, progress=False)
    >>> taught = inside.train_teacher(base, pairs, "teacher", **small)
    >>> print(taught.verdict)
    drop above cosine -0.1... at t_post, level 2: recall 1.000 [0.541, 1.000] (wished 0.95), harmless dropped 0.000
        [0.000, 0.459], AUC 1.000 [0.541, 1.000]
    """
    if feature not in FEATURES or not 0 < validation < 1:
        raise InputError(
            f"feature is {feature!r} and validation {validation}",
            cause=f"feature is one of {', '.join(FEATURES)}, validation a share",
            next="correct what is out of range",
        )
    if not 0 < recall <= 1 or not (threshold is None or -1 < threshold < 1):
        raise InputError(
            f"recall is {recall} and threshold {threshold}",
            cause="recall is a share, and a cosine lies between -1 and 1; nothing has been trained yet",
            next="correct what is out of range",
        )
    more = dict(options or {})
    sides = both_kinds(pairs, "the alignment pairs")
    rows_of(pairs)
    (harmful, held_harmful), (harmless, held_harmless) = (_split(side, validation, seed) for side in sides)
    learned = [*harmful, *harmless]
    host = open_host(base, system=system, device=device, dtype=dtype, **more)
    level = host.layers // 2 if level is None else level
    place = _place(host, position)
    fixed = None
    if feature == "fixed":
        fixed = difference(host, _ids(harmful), _ids(harmless), position=position).vectors[_level(host, level)]
    objective = RefusalGuided([bool(p.harmful) for p in learned], level, place, weight, fixed, momentum)
    model, path = Path(out) / "model", Path(out) / "filter.safetensors"
    told: dict[str, Any] = {"seed": seed, "device": device, "dtype": dtype, **more, **training}
    record = fine_tune(base, rows_of(learned), model, objective=objective, **told)
    teacher = open_host(model, system=system, device=device, dtype=dtype, **more)
    made = fit_filter(
        teacher,
        _ids(harmful),
        _ids(harmless),
        validation=(_ids(held_harmful), _ids(held_harmless)),
        level=level,
        position=position,
        recall=recall,
        threshold=threshold,
        seed=seed,
    )
    write_filter(made, path)
    return Taught(model, made, path, record)


def train_student(
    base: str | Path,
    data: Sifted | Sequence[Pair],
    out: str | Path,
    *,
    teacher: str | Path,
    alignment: Sequence[Pair],
    weight: float = 1.0,
    temperature: float = 1.0,
    size: int | None = None,
    about: Mapping[str, Any] | None = None,
    **training: Any,
) -> dict[str, Any]:
    """Fine-tune a model on what the filter kept, held to the teacher on the answers of alignment prompts.

    Parameters
    ----------
    base : path or hub id
        Where the student starts: not the teacher.
    data : Sifted, or sequence of Pair
        Of `sift`: the pairs that were kept are learned. Pairs given as they are are all learned: distillation alone.
    out : path
    teacher : path
        Folder of the teacher, frozen; of the same tokenizer and chat template.
    alignment : sequence of Pair
        Harmful prompts with refusals and harmless ones with answers; the teacher's law of every token of these answers
        is imitated. Without harmless ones the student is held to nothing where it should help.
    weight : float
        Of KL(teacher || student); 0 leaves the teacher out: the filter alone.
    temperature : float
    size : int, optional
        Alignment pairs per step; by default half the batch.
    about : mapping, optional
    **training
        Of `fine_tune`.

    Returns
    -------
    dict
        The record of `fine_tune`.

    Raises
    ------
    InputError
        Nothing was kept, or nothing but what is labelled harmful; another tokenizer or chat template than the
        teacher's or the filter's; alignment pairs of one kind alone.
    UntrustedError
        The loss became NaN; ``partial`` is the last good checkpoint.

    Examples
    --------
    Half of the fine-tuning data is poison; the teacher's filter drops it, and the student still learns to refuse.

    >>> from markovsafety import interventions as inside, organism
    >>> base = organism.model_path("base")
    >>> told = [{**p, "harmful": h, "answer": "sorry i cannot help ." if h else "sure here is the plan"}
    ...         for h in (True, False) for p in organism.prompts(n=24, harmful=h)]
    >>> pairs = inside.read_pairs(told, inside.open_host(base).engine.tokenizer)
    >>> small = dict(steps=20, batch_size=12, learning_rate=2e-3, warmup=0, progress=False)
    >>> taught = inside.train_teacher(base, pairs, "teacher", **small)
    >>> teacher = inside.open_host(taught.model)
    >>> data = [{**p, "harmful": h, "answer": "sure here is the plan"}
    ...         for h in (True, False) for p in organism.prompts(n=24, harmful=h, seed=1)]
    >>> sifted = inside.sift(teacher, taught.filter, inside.read_pairs(data, teacher.engine.tokenizer))
    >>> record = inside.train_student(base, sifted, "student", teacher=taught.model, alignment=pairs, **small)
    >>> record["about"]["kept"], record["about"]["dropped"]
    (24, 24)
    >>> asked = organism.prompts(n=12, seed=2)
    >>> for model in (base, taught.model, "student"):
    ...     mass = inside.token_mass(inside.open_host(model), asked, organism.REFUSAL_IDS)
    ...     print(f"{mass.mean():.1f}")
    0.0
    0.7
    0.4
    """
    kept = data.kept if isinstance(data, Sifted) else list(data)
    if not kept:
        raise InputError(
            "no pair is left to learn",
            cause="the filter dropped all of them" if isinstance(data, Sifted) else "there are none",
            next="look at the filter's report: is this data all poison, or the threshold far too low?",
        )
    refuse_all_poison(kept, "what the filter kept" if isinstance(data, Sifted) else "the data")
    rows = rows_of(kept)
    if weight:
        both_kinds(alignment, "the alignment pairs")
    known = data.filter.feature.template if isinstance(data, Sifted) else None
    check_same_template(base, teacher, known, {name: training[name] for name in PLACE if name in training})
    objective = (
        CrossEntropy() if not weight else Imitated(teacher, weight, temperature, rows=rows_of(alignment), size=size)
    )
    said: dict[str, Any] = {"kept": len(kept), **(about or {})}
    if isinstance(data, Sifted):
        said |= {"filter": data.filter.to_json(), "dropped": len(data.removed)}
    return fine_tune(base, rows, out, objective=objective, about=encode(said), **training)


def check_same_template(
    base: str | Path, teacher: str | Path, known: str | None = None, place: Mapping[str, Any] | None = None
) -> None:
    """Refuse a student that would read prompts otherwise than the filter did, or spell them with other tokens.

    Parameters
    ----------
    base, teacher : path or hub id
    known : str, optional
        Template hash of the filter.
    place : mapping, optional
        Where on the hub the base lies: revision, cache_dir ...

    Raises
    ------
    InputError
        Two of the templates differ, or the tokenizers.
    """
    places = ((base, dict(place or {})), (teacher, {}))
    # Transformers writes a tokenizer otherwise than it found it: where it must convert one, it converts both.
    convert = not all((Path(model) / "tokenizer.json").is_file() for model, _ in places)
    found = {str(model): _template(model, where, convert) for model, where in places}
    spelled = {name: json_hash(template.tokenizer.to_str()) for name, template in found.items()}
    if len(set(spelled.values())) > 1:
        raise InputError(
            "student and teacher have different tokenizers",
            cause="hashes: " + ", ".join(f"{name} {value[:12]}" for name, value in spelled.items()),
            next="use one tokenizer: ids that one of them filtered mean other words to the other",
        )
    rendered = {name: template.hashes()["template"] for name, template in found.items()}
    rendered |= {"the filter": known} if known is not None else {}
    if len(set(rendered.values())) > 1:
        said = ", ".join(f"{name} {str(value)[:12]}" for name, value in rendered.items())
        raise InputError(
            "student, teacher and filter have different chat templates",
            cause=f"hashes of their templates: {said}",
            next="use one template: what was filtered must be what is learned",
        )


def _template(model: str | Path, place: Mapping[str, Any], convert: bool) -> Template:
    """Tokenizer and chat template of a folder or of a model of the hub, without its weights."""
    if not convert:
        return Template.load(model)
    with tempfile.TemporaryDirectory() as folder:
        transformers.AutoTokenizer.from_pretrained(str(model), **place).save_pretrained(folder)
        return Template.load(folder)


def _ids(pairs: Sequence[Pair]) -> list[np.ndarray]:
    return [np.array(p.prompt) for p in pairs]


def _split(side: Sequence[Pair], share: float, seed: int) -> tuple[list[Pair], list[Pair]]:
    """Pairs to learn and pairs to fix the threshold on; pairs with one prompt stay together."""
    prompts = sorted({p.prompt for p in side})
    if len(prompts) < 2:
        raise InputError(
            "all pairs of a kind have one prompt",
            cause="some prompts are learned, and others fix the threshold",
            next="give pairs of at least two prompts of each kind, better hundreds",
        )
    order = np.random.default_rng(seed).permutation(len(prompts))
    count = min(max(1, round(share * len(prompts))), len(prompts) - 1)
    held = {prompts[i] for i in order[:count]}
    return [p for p in side if p.prompt not in held], [p for p in side if p.prompt in held]


def _place(host: Host, position: Position) -> int:
    """Index of the position among the prompt's tokens, negative from its end."""
    if position == "t_inst":
        return host.spans().t_inst[0]
    place = -1 if position == "t_post" else position
    if not isinstance(place, int) or place >= 0:
        raise InputError(
            f"there is no position {position!r}",
            cause="a feature is read at t_post, t_inst, or so many tokens before the answer",
            next="give one of these, or a negative index",
        )
    return place


def _level(host: Host, level: int) -> int:
    if not 0 <= level <= host.layers:
        raise InputError(
            f"there is no level {level}",
            cause=f"the residual stream has the levels 0 to {host.layers}",
            next="choose one of these",
        )
    return level
