"""Joining a Ray cluster, or starting one on this machine, and leaving the program as it was before."""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ...errors import InputError

__all__ = ["connected", "crew_size"]


@contextmanager
def connected(address: str | None = None, workers: int | None = None) -> Iterator[Any]:
    """The module ray, joined to a cluster; what was started or changed for it ends with the block.

    Parameters
    ----------
    address : str, optional
        As in `spread`.
    workers : int, optional
        How many are wanted: a local cluster has room for them.

    Raises
    ------
    InputError
        Ray is not installed, there is no such cluster, or its versions of Ray and Python are others.
    """
    if workers is not None and (not isinstance(workers, int) or isinstance(workers, bool) or workers < 1):
        raise InputError(
            f"workers is {workers!r}", cause="somebody has to work", next="give an integer >= 1, or leave it out"
        )
    with _surroundings():
        ray = _ray()
        if ray.is_initialized():
            yield ray
            return
        place = address or os.environ.get("RAY_ADDRESS") or "local"
        options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
        if place == "local":
            cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
            options |= {"num_cpus": max(cores, workers or 1), "include_dashboard": False}
        try:
            _join(ray, place, options)
            yield ray
        finally:
            ray.shutdown()


def _ray() -> Any:
    try:
        import ray
    except ImportError as error:
        raise InputError(
            "Ray is not installed",
            cause=str(error),
            next="pip install 'markovsafety[cluster]', the same versions on every node",
        ) from error
    return ray


def _join(ray: Any, place: str, options: dict[str, Any]) -> None:
    try:
        _reach(place)
        with warnings.catch_warnings():
            # Where JAX is at work already; the child process only becomes one of Ray's programs.
            warnings.filterwarnings("ignore", "os.fork\\(\\) was called", RuntimeWarning)
            ray.init(place, **options)
    except Exception as error:  # Ray has no class of its own for what can go wrong here
        raise _unjoined(place, error) from error


def _reach(place: str) -> None:
    """Fails at once where nobody listens; Ray would try for minutes, and then end the process."""
    host, _, port = place.rpartition(":")
    if host and port.isdigit() and "://" not in place:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=10):
            pass


@contextmanager
def _surroundings() -> Iterator[None]:
    """The environment and the handler of SIGTERM, both of which Ray changes, are put back; its reports stay off."""
    before, handler = dict(os.environ), signal.getsignal(signal.SIGTERM)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        yield
    finally:
        for name in {*os.environ} - {*before}:
            del os.environ[name]
        os.environ.update(before)
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)


def _unjoined(place: str, error: Exception) -> InputError:
    told = str(error).strip() or type(error).__name__
    if "Version mismatch" in told:
        return InputError(
            f"the Ray cluster at {place} runs other versions than this process",
            cause=" ".join(told.split()),
            next="install the same Ray and the same Python on every node and here",
        )
    if place == "local":
        return InputError(
            "Ray does not start on this machine",
            cause=told,
            next="if the machine is busy, call again: Ray gives itself 30 s; else see /tmp/ray/session_latest/logs",
        )
    return InputError(
        "this machine is part of no Ray cluster" if place == "auto" else f"cannot join a Ray cluster at {place}",
        cause=told,
        next="ray start --head on one node, ray start --address=HOST:6379 on the others; or address='local'",
    )


def crew_size(ray: Any, workers: int | None, gpu: bool = False) -> int:
    """As many workers as wanted; one per core (or GPU) of the cluster if nothing was said.

    Raises
    ------
    InputError
        The cluster has none to offer.
    """
    kind = "GPU" if gpu else "CPU"
    total = int(ray.cluster_resources().get(kind, 0))
    if total < 1:
        raise InputError(
            f"the Ray cluster has no {kind} to offer",
            cause="its nodes were started without any, or none has joined yet",
            next=f"start nodes with --num-{kind.lower()}s, or wait for them",
        )
    return workers or total
