"""Writing a fine-tuned model as a folder that transformers and the engines load, with all that its base had."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers

from ..errors import InputError
from ..files import atomic_folder

__all__ = ["KIND", "check_target", "write_folder"]

KIND = "fine-tuning"
"""What training.json of a folder calls itself, so that no other folder is ever replaced."""
BESIDE = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "additional_chat_templates",
)
"""Files of a base folder that belong to the tuned one as they are."""
PLACE = ("revision", "subfolder", "cache_dir", "token", "local_files_only")
"""Options that say where a model lies."""


def check_target(out: Path, base: str | Path) -> None:
    """Refuse to write over anything but what fine-tuning has written before.

    Raises
    ------
    InputError
        `out` is the base, a file, or a folder with other content.
    """
    if out.exists() and Path(base).exists() and out.resolve() == Path(base).resolve():
        raise InputError(f"{out} is the model itself.", cause="It is read to the end.", next="Write to another folder.")
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if record_of(out) is None:
        raise InputError(
            f"{out} is not empty.",
            cause="It was not written by fine-tuning, and would be replaced.",
            next="Give a folder that does not exist.",
        )


def record_of(out: Path) -> dict[str, Any] | None:
    """The record of a folder that fine-tuning wrote, else None."""
    try:
        record = json.loads((out / "training.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) and record.get("kind") == KIND else None


def write_folder(
    model: Any, base: str | Path, out: Path, record: Mapping[str, Any], options: Mapping[str, Any] | None = None
) -> None:
    """Write weights in the type that the base stores, its tokenizer and template, and the record.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        Without adapters.
    base : path or hub id
        Where the model came from.
    out : path
        A new folder; one that is there is replaced at once.
    record : mapping
        JSON-able; becomes training.json.
    options : mapping, optional
        What the base was loaded with; says which of its revisions, and where it lies.
    """
    where = {name: value for name, value in dict(options or {}).items() if name in PLACE}
    trained, stored = model.dtype, _stored(base, where)
    _check_range(model, stored)
    with atomic_folder(out) as fresh:
        model.config.use_cache = True  # the Trainer may have switched it off
        model.to(stored).save_pretrained(fresh)
        model.to(trained)
        for file in fresh.glob("*.safetensors"):
            os.chmod(file, 0o644)
        if Path(base).is_dir():
            for name in BESIDE:
                source = Path(base) / name
                if source.is_dir():
                    shutil.copytree(source, fresh / name)
                elif source.is_file():
                    shutil.copyfile(source, fresh / name)
            _keep_attention(Path(base), fresh)
        else:
            transformers.AutoTokenizer.from_pretrained(str(base), **where).save_pretrained(fresh)
        (fresh / "training.json").write_text(json.dumps(dict(record), indent=1, sort_keys=True) + "\n")


def _config(folder: str | Path) -> dict[str, Any]:
    path = Path(folder) / "config.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _stored(base: str | Path, where: Mapping[str, Any]) -> torch.dtype:
    """Type of the weights in the base's files, of a folder or on the hub; float32 where its config does not say."""
    if Path(base).is_dir():
        config = _config(base)
    else:
        found = transformers.utils.cached_file(str(base), "config.json", **where)
        config = json.loads(Path(str(found)).read_text(encoding="utf-8"))
    parts = (config, config.get("text_config") or {})  # models of several kinds of input say it of each
    names = (part.get(key) for part in parts for key in ("dtype", "torch_dtype"))
    stored = getattr(torch, str(next(filter(None, names), "float32")).removeprefix("torch."), None)
    return stored if isinstance(stored, torch.dtype) and stored.is_floating_point else torch.float32


def _check_range(model: Any, stored: torch.dtype) -> None:
    largest = max((float(p.detach().abs().max()) for p in model.parameters() if p.numel()), default=0.0)
    if not largest <= torch.finfo(stored).max:
        raise InputError(
            f"A weight of size {largest:.3g} does not fit into {str(stored).removeprefix('torch.')}.",
            cause="The base's files have this type, and the tuned model would be written in it.",
            next="Train with a smaller learning rate, or convert the base to float32.",
        )


def _keep_attention(base: Path, fresh: Path) -> None:
    """Say the attention that the base's config asks for: transformers leaves its name out of what it writes."""
    asked = _config(base).get("attn_implementation")
    config = _config(fresh)
    if asked is not None and config.get("attn_implementation") != asked:
        config["attn_implementation"] = asked
        (fresh / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
