"""Whether a model folder is there and whole, before a library is asked to load it."""

from __future__ import annotations

from pathlib import Path

from ...errors import ModelError
from ...reading import parsed

__all__ = ["check_folder", "named_in"]


def check_folder(model: str | Path) -> None:
    """Refuse a folder that is missing or half-written; a name like ``owner/name`` is taken as a hub id.

    Raises
    ------
    ModelError
        The message names the file that is missing or damaged.
    """
    path = Path(model)
    if not path.is_dir():
        text = str(model)
        if isinstance(model, Path) or path.is_absolute() or text.startswith(("./", "../", "~")) or text.count("/") > 1:
            raise ModelError(
                f"there is no model folder {text}",
                cause="the path is wrong, or the model was never copied there",
                next="correct the path, or give a hub id: owner/name",
            )
        return
    if not (path / "config.json").is_file():
        raise ModelError(
            f"{path} has no config.json",
            cause="it is no model folder in Hugging Face format, or was copied only in part",
            next="give the folder that save_pretrained wrote",
        )
    needed: set[str] = set()
    for index in path.glob("*.index.json"):
        try:
            needed |= named_in(index)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelError(f"{index} is damaged", cause=str(error), next="copy the file again") from error
    missing = sorted(file for file in needed if not (path / file).is_file())
    if missing or not (needed or [*path.glob("*.safetensors"), *path.glob("*.bin")]):
        raise ModelError(
            f"{path} lacks weights: {', '.join(missing) or 'model.safetensors'}",
            cause="the folder was copied or saved only in part",
            next="copy it again",
        )


def named_in(index: Path) -> set[str]:
    """Names of the weight files in an index; KeyError, TypeError, AttributeError or ValueError where it is none.

    They lie beside it: a path that leads elsewhere, or a name that no file can have, is a ValueError.
    """
    names = {str(name) for name in parsed(index.read_bytes())["weight_map"].values()}
    for name in sorted(names):
        if name != Path(name).name or name in ("", "..") or len(name.encode("utf-8", "surrogatepass")) > 255:
            raise ValueError(f"{name[:60]!r} names no file of this folder")
    return names
