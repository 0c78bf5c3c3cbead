"""What a run of `gpu` says: its goals, a table to read, the same in Markdown."""

from __future__ import annotations

from typing import Any

from .markdown import markdown_table

__all__ = ["as_markdown", "as_text", "compared"]

ROWS = (
    ("bandwidth", "copy", "copy, GB/s", 1e-9),
    ("bandwidth", "triad", "triad, GB/s", 1e-9),
    ("bandwidth", "read", "sum of what is read, GB/s", 1e-9),
    ("engine", "tokens_per_second", "JAX engine, tokens/s", 1),
    ("engine", "decode_tokens_per_second", "JAX engine, decoding alone, tokens/s", 1),
    ("engine", "compile_seconds", "JAX engine, compiling, s", 1),
    ("generate", "tokens_per_second", "transformers generate, tokens/s", 1),
    ("generate", "decode_tokens_per_second", "transformers generate, decoding alone, tokens/s", 1),
    ("other_form", "tokens_per_second", "JAX engine, other form of attention, tokens/s", 1),
    ("pieces", "plain_gigabytes", "plain attention over the whole cache, GB/s", 1),
    ("pieces", "kernel_gigabytes", "attention by the kernel, GB/s", 1),
    ("pieces", "layers_gigabytes", "matrix products of a layer, GB/s", 1),
    ("pieces", "sampling_seconds", "drawing a token, ms", 1e3),
)
BOUND, PEER, COPY = 0.6, 2.0, 0.5
"""Least share of the memory bound, least ratio to generate, least share of the copy bandwidth in a batch of layers."""


def compared(parts: dict[str, Any]) -> dict[str, Any]:
    """The goals that the parts so far allow to judge, each with its value."""
    engine, peer, bandwidth = (parts.get(name, {}) for name in ("engine", "generate", "bandwidth"))
    fastest = max((bandwidth[k] for k in ("copy", "triad", "read") if k in bandwidth), default=None)
    goals: dict[str, Any] = {}

    def goal(name: str, value: float, least: float) -> None:
        goals[name] = {"value": value, "least": least, "met": value >= least}

    if fastest is not None:
        for name in ("engine", "other_form", "generate"):
            told = parts.get(name, {})
            if "bound_bytes" in told and "decode_seconds" in told:
                share = told["bound_bytes"] / fastest / told["decode_seconds"]
                goal(f"{name}: share of the memory bound while decoding", share, BOUND if name == "engine" else 0.0)
    if "tokens_per_second" in engine and "tokens_per_second" in peer:
        goal("engine: tokens/s over those of generate", engine["tokens_per_second"] / peer["tokens_per_second"], PEER)
    copy = parts.get("hitting", {}).get("copy")
    if copy is not None:
        goal("hitting: values of layered batches read, as a share of copying", copy, COPY)
    return goals


def _lines(result: dict[str, Any]) -> list[tuple[str, str]]:
    parts = result["parts"]
    found = [
        (words, f"{parts[part][key] * scale:,.4g}") for part, key, words, scale in ROWS if key in parts.get(part, {})
    ]
    goals = {} if result["settings"]["quick"] else result.get("goals", {})  # tiny sizes say nothing about speed
    for name, value in goals.items():
        least = f" (goal: at least {value['least']:g})" if value["least"] else ""
        found.append((name, f"{value['value']:.3g}{least}"))
    for case, row in parts.get("hitting", {}).get("cases", {}).items():
        found.append((f"hitting, {case}", row))
    return found + [(f"{name}: failed", part["error"]) for name, part in parts.items() if "error" in part]


def _head(result: dict[str, Any]) -> str:
    have = ", ".join(f"{k} {v}" for k, v in result["versions"].items() if v != "not installed")
    small = " Tiny sizes: nothing here is about speed." if result["settings"]["quick"] else ""
    return f"{result['device'] or 'no device'}; {result['machine']}; {result['date']}; {have}.{small}"


def as_text(result: dict[str, Any]) -> str:
    """A table for a terminal."""
    lines = _lines(result)
    width = max((len(words) for words, _ in lines), default=0)
    return "\n".join([_head(result), *(f"{words:<{width}}  {value}" for words, value in lines)])


def as_markdown(result: dict[str, Any]) -> str:
    """A page."""
    rows = [(words, value.replace("|", "/")) for words, value in _lines(result)]
    return f"# On a GPU\n\n{_head(result)}\n\n{markdown_table(('what', 'value'), rows)}\n"
