"""Files that are whole or not there: written beside their place, then moved into it."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .errors import InputError

__all__ = ["atomic", "clear_leftovers"]


@contextmanager
def atomic(path: str | Path, *, make_folder: bool = True, sync: bool = True) -> Iterator[Path]:
    """A temporary path in the same folder that replaces `path` when the block ends well, and goes away otherwise.

    Parameters
    ----------
    path : path
    make_folder : bool
        Make the folder if it is not there.
    sync : bool
        Wait until the file is on the disk: what others continue from survives a power cut.

    Raises
    ------
    InputError
        The folder cannot be made or written, or `path` is a folder.
    """
    path = Path(path)
    # Thread and process keep two writers of one file apart; the leading dot keeps readers of *.parquet away.
    part = path.with_name(f".{path.name}.{threading.get_ident()}.{os.getpid()}.tmp")
    try:
        if make_folder:
            path.parent.mkdir(parents=True, exist_ok=True)
        yield part
        if sync:
            with open(part, "rb+") as file:
                os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        raise InputError(
            f"cannot write {path}", cause=str(error), next="choose a path in a folder that can be written"
        ) from error
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)


def clear_leftovers(folder: str | Path) -> None:
    """Remove the temporary files of runs that were killed; those of a process that is still there stay."""
    for part in Path(folder).glob(".*.tmp"):
        process = part.name.split(".")[-2]
        if process.isdigit() and not _alive(int(process)):
            with suppress(OSError):
                part.unlink()


def _alive(process: int) -> bool:
    if process == os.getpid():
        return True
    try:
        os.kill(process, 0)  # signal 0 asks, and does nothing
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True
