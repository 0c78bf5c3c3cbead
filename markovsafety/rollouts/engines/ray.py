"""Work spread over the processes of a Ray cluster: every result once and in order, whichever process or node is lost.

A worker is a Ray actor: it makes its tool once (a model, say) and then does one item after the other. Items go to
whoever is free. An item whose worker was lost goes to another one, and a new worker is asked for in its place, so an
item may be begun twice; what comes of it must depend on the item alone. Ray could restart actors and repeat their tasks
itself, but ties a task to its actor: where a node is gone and no other has room, the task would wait for ever.

Ray sends functions, items and results by cloudpickle, which runs what it is sent: join only clusters whose network is
trusted. Nothing of it is written to or read from files here.
"""

from __future__ import annotations

import functools
import os
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from typing import Any

from ...errors import InputError, MarkovsafetyError, ModelError
from .ray_join import connected, crew_size

__all__ = ["Crew", "sent", "spread"]

TRIES = 5
"""Workers that may be lost over one item, or one after the other before they are ready."""
ALONE = {"PJRT_NPROC": "1", "NUMBA_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1"}
"""What keeps a worker to its core, beside OMP_NUM_THREADS, which Ray sets."""

Make = Callable[[], tuple[Any, Callable[[Any], Any]]]
"""Called once in every worker: what all workers must agree on, and what is done with an item."""


def spread(
    function: Callable[[Any], Any],
    items: Iterable[Any],
    *,
    workers: int | None = None,
    address: str | None = None,
    done: Callable[[Any], None] | None = None,
) -> list[Any]:
    """``[function(item) for item in items]`` over the processes of a Ray cluster, one core each.

    Parameters
    ----------
    function : callable
        Must be picklable, depend on its item alone, and may be called again for an item whose worker was lost.
    items : iterable
    workers : int, optional
        Processes side by side; None: one per core of the cluster.
    address : str, optional
        "local" starts Ray on this machine for the time of the call, "auto" joins the cluster that this machine is part
        of, "host:port" another one. None: what the environment variable RAY_ADDRESS says, else "local". Where the
        program has joined a cluster already, that one is used.
    done : callable, optional
        Called in this process with each result as it comes, in no particular order.

    Returns
    -------
    list
        In the order of the items.

    Raises
    ------
    InputError
        Ray is not installed, there is no such cluster, its versions differ, or something cannot be sent to workers.
    ModelError
        An item lost five workers one after the other.
    MarkovsafetyError
        From the function; without a partial answer of its own, ``partial`` is the list, with None for what is missing.

    Examples
    --------
    Where a cluster answers this is [1, 2, 3]; where none does, it says how one is started:

    >>> ms.rollouts.spread(abs, [-1, -2, -3], address="127.0.0.1:1")
    Traceback (most recent call last):
        ...
    markovsafety.errors.InputError: cannot join a Ray cluster at 127.0.0.1:1
      cause: ...
      next:  ray start --head on one node, ray start --address=HOST:6379 on the others; or
          address='local'
    """
    todo = list(items)
    found: list[Any] = [None] * len(todo)
    with connected(address, workers) as ray:
        size = min(crew_size(ray, workers), len(todo))
        with Crew(ray, functools.partial(_plain, function), size, what="the function") as crew:
            try:
                for index, result in crew.results(todo):
                    found[index] = result
                    if done is not None:
                        done(result)
            except MarkovsafetyError as error:
                error.partial = found if error.partial is None else error.partial
                raise
    return found


def _plain(function: Callable[[Any], Any]) -> tuple[None, Callable[[Any], Any]]:
    return None, function


def sent(ray: Any, value: Any, what: str) -> Any:
    """A reference to the value for the workers.

    Raises
    ------
    InputError
        It cannot be pickled.
    """
    try:
        return ray.put(value)
    except Exception as error:  # pickling runs code of the value's own
        raise _unsendable(what, error) from error


def _unsendable(what: str, error: Exception) -> InputError:
    return InputError(
        f"{what} cannot be sent to the workers",
        cause=(str(error).strip().splitlines() or [type(error).__name__])[0],
        next="give what can be pickled: no locks, open files, or objects of C libraries; or open them in the worker",
    )


class Refused:
    """An error of ours on its way back: as a value, for Ray would raise another one in its place."""

    def __init__(self, error: MarkovsafetyError):
        self.error = error


class Worker:
    """What runs in each process of the cluster."""

    def begin(self, make: Make, environment: dict[str, str]) -> Any:
        os.environ.update(environment)
        return self._tried(lambda: self._made(make))

    def _made(self, make: Make) -> Any:
        said, self._do = make()
        return said

    def do(self, item: Any) -> Any:
        return self._tried(lambda: self._do(item))

    @staticmethod
    def _tried(work: Callable[[], Any]) -> Any:
        try:
            return work()
        except MarkovsafetyError as error:
            return Refused(error)


class Crew:
    """Workers that have all made the same thing; at the end of the block they are gone.

    Parameters
    ----------
    ray : module
        From `connected`.
    make : callable
        Called once in each worker: returns what all workers must agree on, and the function of an item.
    size : int
        Workers. Those that find no room yet wait for it; the others go on without them.
    gpu : bool
        Whether each has a GPU for itself, beside its core.
    what : str
        What `make` holds, for the error if it cannot be pickled.
    """

    def __init__(self, ray: Any, make: Make, size: int, gpu: bool = False, what: str = "the work"):
        self._ray, self._make = ray, sent(ray, make, what)
        options = {"num_cpus": 1, "num_gpus": int(gpu), "max_restarts": 0, "scheduling_strategy": "SPREAD"}
        self._kind, self._environment = ray.remote(Worker).options(**options), {} if gpu else ALONE
        self._starting: dict[Any, tuple[Any, int]] = {}
        self._busy: dict[Any, tuple[Any, int, Any]] = {}
        self._free: list[Any] = []
        self._said: list[Any] = []
        for _ in range(size):
            self._start()

    def __enter__(self) -> Crew:
        return self

    def __exit__(self, *_: object) -> None:
        starting = [actor for actor, _ in self._starting.values()]
        for actor in [*self._free, *starting, *(actor for actor, *_ in self._busy.values())]:
            self._end(actor)

    def ready(self, count: int = 1) -> Any:
        """Wait until so many workers are ready; returns what they agree on.

        Raises
        ------
        ModelError
            They do not agree, or are lost one after the other.
        MarkovsafetyError
            From what they make.
        """
        while len(self._free) < count:
            self._began(self._ray.wait(list(self._starting))[0][0])
        return self._said[0]

    def results(self, items: Iterable[Any]) -> Iterator[tuple[int, Any]]:
        """Number and result of every item, as they come.

        Raises
        ------
        ModelError
            An item, or the making of a worker, lost five workers.
        MarkovsafetyError
            From the work.
        """
        waiting, lost = deque(enumerate(items)), Counter()
        self._hand_out(waiting)
        while waiting or self._busy:
            reference = self._ray.wait([*self._busy, *self._starting])[0][0]
            if reference in self._starting:
                self._began(reference)
                self._hand_out(waiting)
                continue
            actor, index, item = self._busy.pop(reference)
            try:
                result = self._got(reference)
            except _lost(self._ray) as error:
                lost[index] += 1
                if lost[index] >= TRIES:
                    raise _given_up(
                        f"item {index} of the work lost {TRIES} workers one after the other", error
                    ) from error
                waiting.appendleft((index, item))
                self._end(actor)
                self._start()
                self._hand_out(waiting)
                continue
            self._free.append(actor)
            self._hand_out(waiting)  # before the caller takes the time to do something with it
            yield index, result

    def _hand_out(self, waiting: deque[tuple[int, Any]]) -> None:
        while waiting and self._free:
            index, item = waiting.popleft()
            actor = self._free.pop()
            self._busy[_called(actor.do, item)] = actor, index, item

    def _start(self, losses: int = 0) -> None:
        actor = self._kind.remote()
        self._starting[actor.begin.remote(self._make, self._environment)] = actor, losses

    def _began(self, reference: Any) -> None:
        actor, losses = self._starting.pop(reference)
        try:
            said = self._got(reference)
        except _lost(self._ray) as error:
            self._end(actor)
            if losses + 1 >= TRIES:
                raise _given_up(f"{TRIES} workers were lost before they were ready", error) from error
            self._start(losses + 1)
            return
        if self._said and said != self._said[0]:
            raise ModelError(
                "two workers see different things",
                cause=_differences(self._said[0], said),
                next="give all nodes the same files and versions, best from one shared folder",
            )
        self._said = [said]
        self._free.append(actor)

    def _got(self, reference: Any) -> Any:
        try:
            value = self._ray.get(reference)
        except self._ray.exceptions.RayTaskError as error:
            if "arguments for this task could not be computed" in str(error):  # before anything of ours has run
                raise ModelError(
                    "a worker cannot load what it was sent",
                    cause=str(error.cause).strip().splitlines()[0],
                    next="install the same packages on every node; put your own code into an installed module",
                ) from error
            raise
        if isinstance(value, Refused):
            raise value.error
        return value

    def _end(self, actor: Any) -> None:
        with suppress(Exception):  # it may be gone already
            self._ray.kill(actor)


def _called(method: Any, item: Any) -> Any:
    try:
        return method.remote(item)
    except TypeError as error:
        raise _unsendable("an item", error) from error


def _lost(ray: Any) -> tuple[type[Exception], ...]:
    """What says that a worker, its node, or the only copy of its result is gone."""
    e = ray.exceptions
    return e.RayActorError, e.WorkerCrashedError, e.NodeDiedError, e.OutOfMemoryError, e.ObjectLostError


def _given_up(fact: str, error: Exception) -> ModelError:
    return ModelError(
        fact,
        cause=" ".join(str(error).split())[:500],
        next="see Ray's logs of those processes; if memory ran out, take fewer workers or smaller batches",
    )


def _differences(first: Any, second: Any) -> str:
    if isinstance(first, dict) and isinstance(second, dict):
        keys = [key for key in sorted({*first, *second}) if first.get(key) != second.get(key)]
        return "; ".join(f"{key}: {str(first.get(key))[:60]} here, {str(second.get(key))[:60]} there" for key in keys)
    return f"{str(first)[:100]} here, {str(second)[:100]} there"
