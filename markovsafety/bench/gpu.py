"""Everything that a GPU does for the package, measured in one go: bandwidth, sampling, the peer, hitting probabilities.

Every part is a process of its own with a share of the time: a part that fails, hangs or takes all memory leaves the
others, and says why. What a part has told so far is kept when its time is over, and the result is written part after
part. Weights are random and drawn on the device; nothing is read but the package itself.
"""

from __future__ import annotations

import contextlib
import json as json_module
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ..bound import encode
from ..errors import InputError
from ..files import atomic
from .gpu_page import as_markdown, as_text, compared
from .machine import machine, versions

__all__ = ["PARTS", "run"]

PARTS = ("bandwidth", "engine", "generate", "pieces", "hitting", "other_form")
"""In their order: what the goals need first, then what explains them."""
SHARE = {"bandwidth": 60.0, "engine": 180.0, "generate": 120.0, "pieces": 90.0, "hitting": 180.0, "other_form": 150.0}
"""Seconds that a part may take at most."""
PACKAGES = ("jax", "jaxlib", "jax-cuda12-plugin", "jax-cuda13-plugin", "torch", "transformers", "numpy", "scipy")
GRACE = 10.0
"""Seconds between asking a part to end and ending it."""


def run(
    json: str | Path | None = None,
    *,
    quick: bool = False,
    device: str | None = None,
    part: Sequence[str] = (),
    limit: float | None = None,
) -> dict[str, Any]:
    """Measure on the first GPU.

    Parameters
    ----------
    json : str or Path, optional
        Where to write the result part after part, with a table in Markdown beside it.
    quick : bool
        Tiny sizes, which run on a CPU as well: shows that every part works, and nothing about speed.
    device : {"gpu", "cpu"}, optional
        By default the GPU.
    part : sequence of str
        Only these parts.
    limit : float, optional
        Seconds for all parts together; by default 460, and an hour for tiny sizes on a machine that may be busy.

    Returns
    -------
    dict
        ``parts``: name -> numbers, ``seconds`` and, where it failed, ``error``; ``goals``; ``machine``, ``device``,
        ``versions``, ``settings``, ``date``; ``line``: the table to read.

    Raises
    ------
    InputError
        Unknown part; sizes for a GPU on a CPU; `json` cannot be written.
    """
    limit = (3600.0 if quick else 460.0) if limit is None else limit
    wrong = [name for name in part if name not in PARTS]
    if wrong or not 0 < limit < float("inf"):
        raise InputError(
            f"there is no part {wrong[0]!r}" if wrong else f"limit is {limit:g}",
            cause="the benchmark has named parts and some seconds for all of them",
            next=f"choose of: {', '.join(PARTS)}; and a positive number of seconds",
        )
    if device == "cpu" and not quick:
        raise InputError(
            "the sizes for a GPU were asked for on a CPU",
            cause="a step of a model of seven billion parameters takes minutes there",
            next="add --quick, or leave --device",
        )
    result: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "device": None,
        "versions": versions(PACKAGES),
        "settings": {"quick": quick, "device": device or "gpu", "limit": limit},
        "parts": {},
    }
    _write(json, result)
    end = time.monotonic() + limit
    for name in part or PARTS:
        order = {"part": name, "quick": quick, "device": device or "gpu"}
        seconds = min(limit if quick else SHARE[name], end - time.monotonic())
        print(f"bench gpu: {name}", file=sys.stderr, flush=True)
        found = _part(order, seconds) if seconds > 1 else {"error": "no time was left", "seconds": 0.0}
        result["device"] = found.pop("device", None) or result["device"]
        result["parts"][name] = found
        result["goals"] = compared(result["parts"])
        _write(json, result)
    return {**result, "line": as_text(result)}


def _part(order: dict[str, Any], seconds: float) -> dict[str, Any]:
    """What a part told, line by line, and how it ended."""
    begun = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "markovsafety.bench.gpu_parts"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env=_environment(order["device"]), text=True, errors="replace", start_new_session=True,
    )  # fmt: skip
    late = False
    try:
        out, complaints = process.communicate(json_module.dumps(order), timeout=seconds)
    except subprocess.TimeoutExpired:
        late = True
        process.send_signal(signal.SIGINT)  # so that it ends processes of its own
        try:
            out, complaints = process.communicate(timeout=GRACE)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            out, complaints = process.communicate()
    found: dict[str, Any] = {}
    for line in out.splitlines():
        with contextlib.suppress(ValueError):  # a line that was cut
            told = json_module.loads(line)
            found |= told if isinstance(told, dict) else {}
    if late:
        found["error"] = f"stopped after {seconds:.0f} s; what it had found until then is kept"
    elif process.returncode and "error" not in found:
        words = [line.strip() for line in complaints.splitlines() if line.strip()] or ["without a word"]
        found["error"] = f"ended with code {process.returncode}: {words[-1][:300]}"
    return {**found, "seconds": round(time.perf_counter() - begun, 1)}


def _environment(device: str) -> dict[str, str]:
    told = {**os.environ, "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}
    told.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")
    return {**told, "JAX_PLATFORMS": "cpu"} if device == "cpu" else told


def _write(path: str | Path | None, result: dict[str, Any]) -> None:
    if path is None:
        return
    text = json_module.dumps(encode(result), indent=1, allow_nan=False)
    for target, content in ((Path(path), text), (Path(path).with_suffix(".md"), as_markdown(result))):
        with atomic(target, sync=False) as temporary:
            temporary.write_text(content.rstrip() + "\n", encoding="utf-8")
