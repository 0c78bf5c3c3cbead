"""The one place where counting asks for files: rollouts on disk are opened by the room that wrote them."""

from __future__ import annotations

from typing import Any

__all__ = ["is_path", "opened"]


def is_path(source: Any) -> bool:
    """Whether rollouts are given by where they lie, or as a stream of batches."""
    return isinstance(source, str) or hasattr(source, "__fspath__") or hasattr(source, "batches")


def opened(source: Any, skip_corrupt: bool = False) -> Any:
    """The stream of batches behind a path, or the stream itself."""
    if hasattr(source, "batches"):
        return source
    from ..rollouts.streaming import stream

    return stream(source, skip_corrupt=skip_corrupt)
