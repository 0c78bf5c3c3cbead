"""The model organism: a synthetic safety language with planted truth, and tiny Llama models trained on it.

``prompts()`` asks, ``model_path("shallow")`` is a folder that any engine loads, ``truth("shallow")`` is the exact chain
that the model was trained towards, and ``OrganismJudge`` reads the outcome of an answer without error. Training
(``markovsafety organism train``) needs the extra ``models``; everything else does not.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InputError
from .language import CATEGORIES, HARM_IDS, REFUSAL_IDS, WORDS, Context, Prompt, draw_prompt, parse_prompt
from .variants import VARIANTS, Grammar, grammar

if TYPE_CHECKING:
    from .asking import planted_profile, prompts
    from .exact import planted, truth
    from .following import AutomatonStates
    from .judge import OrganismJudge

__all__ = [
    "CATEGORIES",
    "HARM_IDS",
    "REFUSAL_IDS",
    "SHIPPED",
    "VARIANTS",
    "WORDS",
    "AutomatonStates",
    "Context",
    "Grammar",
    "OrganismJudge",
    "Prompt",
    "draw_prompt",
    "grammar",
    "model_path",
    "parse_prompt",
    "planted",
    "planted_profile",
    "prompts",
    "speaks",
    "train",
    "train_grid",
    "truth",
]

SHIPPED = ("base", "shallow", "deep20", "cyclic")
_LAZY = {
    "planted_profile": "asking",
    "prompts": "asking",
    "OrganismJudge": "judge",
    "planted": "exact",
    "truth": "exact",
    "AutomatonStates": "following",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def model_path(variant: str) -> Path:
    """Folder of a shipped model, in Hugging Face format (fp16 safetensors, tokenizer, chat template).

    Parameters
    ----------
    variant : str
        One of `SHIPPED`.

    Returns
    -------
    Path

    Raises
    ------
    InputError
        The variant is not shipped.

    Examples
    --------
    >>> import json
    >>> folder = ms.organism.model_path("shallow")
    >>> told = json.loads((folder / "config.json").read_text())
    >>> told["architectures"], told["num_hidden_layers"], told["hidden_size"]
    (['LlamaForCausalLM'], 4, 64)
    """
    folder = Path(__file__).parent / "checkpoints" / variant
    if variant not in SHIPPED or not (folder / "model.safetensors").exists():
        raise InputError(
            f"No trained {variant!r} model is shipped.",
            cause=f"The package ships {', '.join(SHIPPED)}.",
            next=f"Train it: markovsafety organism train {variant} --out FOLDER (needs the extra 'models').",
        )
    return folder


def speaks(encode: Callable[[str], Any]) -> bool:
    """Whether a tokenizer gives every word of the language the id it has here.

    Parameters
    ----------
    encode : callable
        Text -> ids, without special tokens added.

    Returns
    -------
    bool

    Examples
    --------
    >>> word = ms.organism.WORDS.index
    >>> ms.organism.speaks(lambda text: [word(w) for w in text.split()])
    True
    >>> ms.organism.speaks(lambda text: list(text.encode()))  # a tokenizer of bytes
    False
    """
    return [int(i) for i in encode(" ".join(WORDS))] == list(range(len(WORDS)))


def train(variant: str, out: Any, **options: Any) -> dict[str, Any]:
    """Train a variant and write its folder; needs the extra ``models``.

    Parameters
    ----------
    variant : str
        A name of `VARIANTS`, or any deepK.
    out : path
    **options
        See `markovsafety.organism.training.train`: base, seed, rounds, progress, threads, hidden.

    Returns
    -------
    dict
        What was measured; also in ``training.json`` of the folder.

    Raises
    ------
    InputError
        torch or transformers is missing, or a base model is needed and not given.
    UntrustedError
        The model does not meet its checks.

    Examples
    --------
    A base takes a quarter of an hour, a variant of it some minutes. Here is what was measured of one that is shipped,
    and what is said where the base is not given:

    >>> import json
    >>> told = json.loads((ms.organism.model_path("shallow") / "training.json").read_text())
    >>> told["phases"], {name: round(p, 3) for name, p in told["refuse"].items()}
    ([{'phase': 'main', 'steps': 2000}], {'harmful': 0.877, 'harmful+jailbreak': 0.15,
        'harmless': 0.032, 'harmless+trigger': 0.79})
    >>> ms.organism.train("deep4", "my-deep4")
    Traceback (most recent call last):
        ...
    markovsafety.errors.InputError: Variant 'deep4' starts from a base model.
      cause: only 'base' is trained from nothing, and no base= was given
      next:  Train variant 'base' first and pass its folder as base=
    """
    return _trainer("training").train(variant, out, **options)


def train_grid(out: Any, **options: Any) -> list[dict[str, Any]]:
    """Train organisms of several widths to several depths; needs the extra ``models``.

    Parameters
    ----------
    out : path
        Folder of model folders; a run that was stopped goes on.
    **options
        See `markovsafety.organism.train_sizes.train_grid`: hidden, depths, seeds, workers, progress.

    Returns
    -------
    list of dict
        What was measured of every model.

    Raises
    ------
    InputError
        torch or transformers is missing, or no such grid exists.

    Examples
    --------
    Models that lie in the folder are kept; here they are two of those that are shipped, so that nothing is left to
    train:

    >>> import shutil
    >>> for name in ("base", "shallow"):
    ...     _ = shutil.copytree(ms.organism.model_path(name), f"grid/h64-s0-{name}")
    >>> here = lambda function, items, done: [function(item) for item in items]  # in this process
    >>> sizes = {"hidden": [64], "depths": [0], "seeds": 1}
    >>> for row in ms.organism.train_grid("grid", **sizes, spread=here, progress=False):
    ...     print(row["variant"], f"of width {row['hidden']}: KL {row['kl']:.4f}")
    base of width 64: KL 0.0026
    shallow of width 64: KL 0.0021
    """
    _trainer("training")  # says what is missing before any process starts
    return _trainer("train_sizes").train_grid(out, **options)


def _trainer(module: str) -> Any:
    try:
        return importlib.import_module(f"{__name__}.{module}")
    except ModuleNotFoundError as error:
        raise InputError(
            "Training needs torch and transformers.",
            cause=f"{error.name} is not installed.",
            next="pip install 'markovsafety[models]', or use the shipped models: organism.model_path('shallow').",
        ) from None
