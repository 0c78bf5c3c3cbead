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
