"""Loading a causal language model and its tokenizer with transformers, and what can go wrong with it."""

from __future__ import annotations

import dataclasses
import hashlib
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers

from ...errors import InputError, ModelError
from ..template import Template

__all__ = ["DTYPES", "brings_code", "code_of", "device_of", "first_line", "load_model", "load_template"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def device_of(device: str | None) -> str:
    """The device of a name; by default the GPU if there is one."""
    gpu = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else None
    kind, colon, number = ("gpu" if device is None and gpu else device or "cpu").partition(":")
    if kind == "gpu" or (kind == "cuda" and gpu != "cuda"):
        if gpu is None or kind == "cuda":
            cause = "torch sees no CUDA" + ("" if kind == "cuda" else " and no MPS")
            raise InputError("there is no GPU", cause=cause, next='use device="cpu"')
        kind = gpu
    return kind + colon + number


def load_model(
    name: str, dtype: str, device_map: str | None, options: dict[str, Any], trust_remote_code: bool = False
) -> Any:
    """The model, or a ModelError that says what is wrong with it."""
    try:
        with _quiet():
            found: Any = transformers.AutoModelForCausalLM.from_pretrained(
                name,
                dtype=DTYPES[dtype],
                device_map=device_map,
                trust_remote_code=trust_remote_code,
                output_loading_info=True,
                **options,
            )
        loaded, told = found
    except Exception as error:  # transformers, safetensors and the hub raise whatever they like
        if brings_code(error):
            raise _refused(name) from error
        raise ModelError(
            f"{name} cannot be loaded as a causal language model",
            cause=first_line(error),
            next="check the folder (or hub id), and that this version of transformers knows the architecture",
        ) from error
    missing = sorted(told.get("missing_keys", ()))
    if missing:  # transformers would fill them with random numbers
        raise ModelError(
            f"the weights of {name} are incomplete: {', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}",
            cause=f"{len(missing)} parameters of the architecture are not in the files",
            next="copy the folder again, or check that config.json belongs to the weights",
        )
    return loaded


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bar of transformers where nobody watches; on a terminal it stays."""
    bars = transformers.utils.logging
    if sys.stderr.isatty() or not bars.is_progress_bar_enabled():
        yield
        return
    bars.disable_progress_bar()
    try:
        yield
    finally:
        bars.enable_progress_bar()


def brings_code(error: BaseException) -> bool:
    """Whether a model was not loaded because it brings code of its own, which nobody asked to run."""
    return isinstance(error, ValueError) and "trust_remote_code=True" in str(error)


def _refused(name: str) -> ModelError:
    return ModelError(
        f"{name} brings Python code of its own, which was not run",
        cause="its configuration names classes (auto_map) in files beside it; running them is running somebody's "
        "program on this machine, with everything that you may do there",
        next="read these files; if you trust them: sample(..., trust_remote_code=True), on the command line sample "
        "--trust-remote-code, and where Python opens a model open_engine(..., trust_remote_code=True); the other "
        "commands run no such code",
    )


def code_of(loaded: Any) -> dict[str, Any]:
    """Files of the code beside a model that were loaded with it, and the hash of their names and bytes."""
    package = type(loaded).__module__.rpartition(".")[0]
    beside = package.startswith("transformers_modules")
    names = [name for name in sys.modules if name.startswith(f"{package}.")] if beside else []
    files = sorted({Path(str(sys.modules[name].__file__)) for name in names if sys.modules[name].__file__})
    digest = hashlib.sha256()
    for file in files:
        data = file.read_bytes()
        digest.update(f"{file.name}\0{len(data)}\0".encode() + data)
    return {"files": [file.name for file in files], "sha256": digest.hexdigest()}


def load_template(name: str, loaded: Any, revision: str | None, trust_remote_code: bool = False) -> Template:
    """The tokenizer and chat template in the folder, converted by transformers where they are in another format."""
    rows = int(loaded.get_input_embeddings().weight.shape[0])
    if (Path(name) / "tokenizer.json").is_file():
        return Template.load(name, vocab_size=rows)
    # A tokenizer in another format (or on the hub) is converted by transformers.
    with tempfile.TemporaryDirectory() as folder:
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(
                name, trust_remote_code=trust_remote_code, revision=revision
            )
            if set(tokenizer.get_vocab()) <= set(tokenizer.get_added_vocab()):
                raise ValueError("no vocabulary file")  # transformers makes an empty tokenizer then
            tokenizer.save_pretrained(folder)
            loaded.generation_config.save_pretrained(folder)
        except Exception as error:
            if brings_code(error):
                raise _refused(name) from error
            raise ModelError(
                f"{name} has no tokenizer that can be read",
                cause=first_line(error),
                next="put its tokenizer.json (or the files it is made from) into the folder",
            ) from error
        return dataclasses.replace(Template.load(folder, vocab_size=rows), folder=name)


def first_line(error: BaseException) -> str:
    """The first line that an error says, with its kind."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"
