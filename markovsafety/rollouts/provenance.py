"""Where rollouts come from: hashes of weights, versions of libraries, hashes of what was asked."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["LARGE", "ids_hash", "json_hash", "versions", "weights_hash", "weights_stamp"]

LARGE = 2 * 10**9
"""Weights of more bytes than this are hashed by size and edges only."""
EDGE = 1 << 20
WEIGHTS = ("*.safetensors", "pytorch_model*.bin", "*.safetensors.index.json", "config.json")


def weights_hash(folder: str | Path, large: int = LARGE) -> dict[str, Any]:
    """SHA-256 of a model folder's weights and config.json.

    Parameters
    ----------
    folder : str or Path
    large : int
        Above this many bytes in all, of each file only its size, first and last MiB are hashed.

    Returns
    -------
    dict
        ``sha256``, ``of`` (in words, which bytes were hashed), ``bytes``, ``files``.
    """
    files = _weights(folder)
    sizes = [file.stat().st_size for file in files]
    edges = sum(sizes) > large
    digest = hashlib.sha256()
    for file, size in zip(files, sizes):
        digest.update(f"{file.name}\0{size}\0".encode())
        with open(file, "rb") as stream:
            if edges and size > 2 * EDGE:
                digest.update(stream.read(EDGE))
                stream.seek(size - EDGE)
            while block := stream.read(EDGE):
                digest.update(block)
    how = "name, size, first and last MiB of every file" if edges else "name, size and all bytes of every file"
    return {"sha256": digest.hexdigest(), "of": how, "bytes": sum(sizes), "files": [file.name for file in files]}


def weights_stamp(folder: str | Path) -> tuple[tuple[str, int, int], ...]:
    """Name, size and time of change (ns) of the files that `weights_hash` reads: while these stay, so does the hash."""
    return tuple((file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in _weights(folder))


def _weights(folder: str | Path) -> list[Path]:
    return sorted({file for pattern in WEIGHTS for file in Path(folder).glob(pattern)})


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that take part in sampling, as far as they are installed."""
    found = {"python": platform.python_version()}
    for name in ("markovsafety", "numpy", "jax", "torch", "transformers", "tokenizers", "pyarrow"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def json_hash(value: Any) -> str:
    """SHA-256 of a JSON value, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def ids_hash(rows: Iterable[np.ndarray | None]) -> str:
    """SHA-256 of sequences of token ids; None differs from an empty one."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(b"-" if row is None else np.asarray(row, dtype="<i4").tobytes() + len(row).to_bytes(8, "little"))
    return digest.hexdigest()
