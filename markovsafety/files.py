"""Files and folders that are whole or not there: written beside their place, then moved into it, by one writer each."""

from __future__ import annotations

import errno
import glob
import json
import os
import re
import secrets
import shutil
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from .errors import InputError, MarkovsafetyError

__all__ = [
    "atomic",
    "atomic_folder",
    "claimed",
    "clear_beside",
    "clear_leftovers",
    "inert",
    "newest_sealed",
    "remove",
    "seal",
    "told",
]

SEAL = "whole.json"
"""Names every file of a sealed folder and its size."""
FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n")
_SELF = secrets.token_hex(4)  # in a container a new run may have the process id of the one that was killed


def inert(cell: Any) -> Any:
    """A cell that no spreadsheet takes for a formula: a text that begins as one gets an apostrophe in front.

    Notes
    -----
    OWASP, CSV Injection. Numbers stay as they are.
    """
    return f"'{cell}" if isinstance(cell, str) and cell.startswith(FORMULA) else cell


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
        The folder cannot be made or written, the disk is full, or `path` is a folder.
    """
    path = Path(path)
    # Thread and process keep two writers of one file apart; the leading dot keeps readers of *.parquet away.
    part = path.with_name(f".{path.name}.{threading.get_ident()}-{_SELF}.{os.getpid()}.tmp")
    try:
        if make_folder:
            path.parent.mkdir(parents=True, exist_ok=True)
        clear_leftovers(path.parent, path.name)
        yield part
        if sync:
            _sync(part)
        os.replace(part, path)
        if sync:
            _sync(path.parent)
    except OSError as error:
        raise unwritten(path, error) from error
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """A new folder that replaces the folder `path` when the block ends well, and goes away otherwise.

    One writer at a time (`claimed`): the new folder has the same name beside `path` in every process. A process killed
    between the two moves that replace a folder leaves none at `path`, never a part of one; the next call puts the old
    one back, as does one that is stopped there otherwise.

    Raises
    ------
    InputError
        It cannot be written, or the disk is full.
    """
    path = Path(path)
    fresh, old = path.with_name(f".{path.name}.new"), path.with_name(f".{path.name}.old")
    try:
        _put_back(old, path)
        shutil.rmtree(fresh, ignore_errors=True)  # of a run that was killed
        fresh.mkdir(parents=True)
        with told(path):
            yield fresh
        for place in (*fresh.rglob("*"), fresh):
            _sync(place)
        if path.exists():
            shutil.rmtree(old, ignore_errors=True)
            os.replace(path, old)
        os.replace(fresh, path)
        _sync(path.parent)
    except OSError as error:
        raise unwritten(path, error) from error
    finally:
        clear_beside(path)


def clear_beside(path: str | Path) -> None:
    """Remove what a killed `atomic_folder` left beside `path`: for the one writer there is."""
    path = Path(path)
    fresh, old = path.with_name(f".{path.name}.new"), path.with_name(f".{path.name}.old")
    with suppress(OSError):
        _put_back(old, path)
    for rest in (fresh, *([old] if path.exists() else [])):
        shutil.rmtree(rest, ignore_errors=True)


def _put_back(old: Path, path: Path) -> None:
    """Undo the first of the two moves that replace a folder where the second did not follow."""
    if old.exists() and not path.exists():
        os.replace(old, path)


def remove(folder: str | Path) -> None:
    """Remove a folder that nobody may meet half-removed: it is moved away first. What a killed call left goes too."""
    folder = Path(folder)
    away = folder.with_name(f"{folder.name}.old")
    shutil.rmtree(away, ignore_errors=True)
    with suppress(OSError):
        os.replace(folder, away)
    shutil.rmtree(away, ignore_errors=True)


@contextmanager
def told(path: str | Path) -> Iterator[None]:
    """Files that others write: what torch and safetensors say of a full disk, each in its own way, becomes one error.

    Raises
    ------
    InputError
        The files could not be written.
    """
    try:
        yield
    except MarkovsafetyError:
        raise
    except OSError as error:
        raise unwritten(Path(path), error) from error
    except Exception as error:
        if not re.search(r"I/O error|inline_container(?!.*Reader)", str(error), re.DOTALL):  # safetensors, torch
            raise
        raise unwritten(Path(path), OSError(errno.ENOSPC, str(error))) from error


def _sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP) or not path.is_dir():  # some filesystems sync no folders
            raise
    finally:
        os.close(handle)


def unwritten(path: Path, error: OSError) -> InputError:
    """What a refused write says."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        then = "make room and call again: files that were finished are kept"
    else:
        then = "choose a path in a folder that can be written"
    return InputError(f"cannot write {path}", cause=str(error), next=then)


def clear_leftovers(folder: str | Path, name: str | None = None) -> None:
    """Remove the temporary files (of one name) of runs that were killed; those of a process that is there stay."""
    for part in Path(folder).glob(f".{'*' if name is None else glob.escape(name)}.*.tmp"):
        *_, writer, process, _ = part.name.split(".")
        if process.isdigit() and not _alive(int(process), writer):
            with suppress(OSError):
                part.unlink()


def _alive(process: int, writer: str) -> bool:
    if process == os.getpid():
        return writer.endswith(f"-{_SELF}")
    try:
        os.kill(process, 0)  # signal 0 asks, and does nothing
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


# --- one writer at a time ---------------------------------------------------------------------------------------------


@contextmanager
def claimed(lock: str | Path, what: str) -> Iterator[None]:
    """Hold a lock file until the block ends; the system frees it when the process dies, however it dies.

    Parameters
    ----------
    lock : path
        The lock file. It goes away at the end; one that a killed process left behind locks nothing.
    what : str
        What is written, for the error of the second writer.

    Raises
    ------
    InputError
        Another process, or this one, holds it; or the folder cannot be written.

    Notes
    -----
    The lock is an ``flock``: it holds among the processes of one machine, and among machines where the file system
    carries it over (NFS from Linux 2.6.12 on, unless mounted with ``local_lock``; Lustre with ``-o flock``). Where it
    knows no locks, and on Windows, nothing is locked. In a folder that may not be written nothing is locked either:
    nobody writes there, and a run that is finished can still be read by the call that made it.
    """
    lock = Path(lock)
    handle = _open_lock(lock, what)
    try:
        yield
    finally:
        if handle is not None:
            with suppress(OSError):
                lock.unlink()  # before it is freed: who opened it meanwhile sees that it is gone, and opens a new one
            os.close(handle)


def _open_lock(lock: Path, what: str) -> int | None:
    try:
        import fcntl
    except ImportError:  # Windows
        return None
    while True:
        try:
            lock.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM) and lock.parent.is_dir():
                return None
            raise unwritten(lock.parent, error) from error
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            same = os.path.samestat(os.fstat(handle), os.stat(lock))
        except BlockingIOError:
            holder = _holder(handle)
            os.close(handle)
            raise InputError(
                f"{what} is being written already",
                cause=f"{holder} writes it, and two writers would mix up what they write",
                next="wait until it has ended, end it, or choose another folder",
            ) from None
        except FileNotFoundError:
            same = False
        except OSError:  # a file system without locks
            os.close(handle)
            return None
        if same:
            with suppress(OSError):  # the lock holds on a full disk as well
                os.ftruncate(handle, 0)
                told = {"process": os.getpid(), "host": socket.gethostname(), "since": _now()}
                os.pwrite(handle, json.dumps(told).encode(), 0)
            return handle
        os.close(handle)  # the holder before has just removed this file


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _holder(handle: int) -> str:
    try:
        told = json.loads(os.pread(handle, 4096, 0))
        if (told["process"], told["host"]) == (os.getpid(), socket.gethostname()):
            return "another call in this process"
        return f"process {told['process']} on {told['host']}, begun {told['since']},"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"


# --- folders that somebody else writes, file by file ------------------------------------------------------------------


def seal(folder: str | Path, pattern: str) -> None:
    """Say of a folder that it is whole: its files go to the disk, then a list of their sizes is put beside them.

    Parameters
    ----------
    folder : path
    pattern : str
        Older folders beside it, which it replaces: they go away once it is sealed.

    Raises
    ------
    InputError
        It cannot be written.
    """
    folder = Path(folder)
    places = sorted(p for p in folder.rglob("*") if p.name != SEAL)
    sizes = {p.relative_to(folder).as_posix(): p.stat().st_size for p in places if p.is_file()}
    try:
        for place in places:
            _sync(place)
    except OSError as error:
        raise unwritten(folder, error) from error
    with atomic(folder / SEAL) as part:
        part.write_text(json.dumps(sizes), encoding="utf-8")
    for older in folder.parent.glob(pattern):
        if older != folder:
            shutil.rmtree(older, ignore_errors=True)


def newest_sealed(work: str | Path, pattern: str) -> Path | None:
    """The sealed folder with the largest number behind the dash whose files all have their sizes; None if none has.

    What is not whole goes away: a checkpoint that was being written when its process was killed.
    """
    for folder in sorted(Path(work).glob(pattern), key=lambda p: -int(p.name.rpartition("-")[2])):
        if _whole(folder):
            return folder
        shutil.rmtree(folder, ignore_errors=True)
    return None


def _whole(folder: Path) -> bool:
    try:
        sizes = json.loads((folder / SEAL).read_text(encoding="utf-8"))
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, AttributeError):
        return False
