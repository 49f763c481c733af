"""Several processes of one run: who is first, what one tells the others, and when one is gone.

Processes of a run meet in the collectives of their devices and, for what may take long or is no
array, in the coordination service of `jax.distributed`, which lives in process 0. With one process
everything here is free.
"""

import json
import os
import pickle
import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

from jaxconv import aborts

T = TypeVar("T")

_EVERY = 1.0  # seconds between two signs of life
_LOST = 30.0  # without one a process is lost
_RETRY = 10.0  # that the coordination service may fail to answer in a row
_GRACE = 5.0  # for a process to end by itself, when another has ended the run
_FAREWELL = 20.0  # that one which ends a run alone waits until the others know
_WEEK_MS = 7 * 24 * 3600 * 1000  # of waiting; a process that is lost ends it sooner
_PREFIX = "jaxconv/"
_STOPPED = 4  # the exit status of a run that can be resumed

_files: tuple[Callable[[], None], Callable[[], None]] | None = None
_uses: dict[str, int] = {}
_watch: "Watch | None" = None


def count() -> int:
    """How many processes this run has."""
    import jax

    return jax.process_count()


def index() -> int:
    """Which of them this is; 0 writes."""
    import jax

    return jax.process_index()


def join(coordinator: str | None, processes: int | None, process: int | None) -> None:
    """Joins the other processes; None where the cluster tells."""
    import jax

    # Its handler of SIGTERM would take the place of `train.interrupt`'s.
    jax.config.update("jax_enable_preemption_service", False)
    jax.distributed.initialize(
        coordinator_address=coordinator, num_processes=processes, process_id=process
    )
    aborts.before(_leave_without_process_0)


def say(line: str) -> None:
    """Prints a line, once for all processes."""
    if index() == 0:
        print(line, flush=True)


def barrier(name: str) -> None:
    """Returns when every process is here; they may come as late as they like. What process 0 has
    written by then the others can read."""
    if count() > 1:
        push, pull = _files or (_nothing, _nothing)
        if index() == 0:
            push()
        _meet(name)
        if index() > 0:
            pull()


def _meet(name: str) -> None:
    _patiently(_client().wait_at_barrier, _once(name), _WEEK_MS)


def share_files(push: Callable[[], None], pull: Callable[[], None]) -> None:
    """What makes files of process 0 those of the others, where they have no folder in common:
    process 0 pushes, then the others pull."""
    global _files
    _files = push, pull


def _nothing() -> None:
    pass


@contextmanager
def process_0_first(name: str) -> Iterator[None]:
    """Process 0 goes through the block while the others wait, then they do: for files that one of
    them makes and all read."""
    if index() > 0:
        barrier(name)
    yield
    if index() == 0:
        barrier(name)


def of_process_0(name: str, make: Callable[[], T]) -> T:
    """What `make` returns on process 0, on every process; JSON-able where there are several.

    For questions that processes may answer differently, such as whether a file is there.
    """
    if count() == 1:
        return make()
    key = _PREFIX + _once(name)
    if index() == 0:
        _client().key_value_set(key, json.dumps(make()))
    return json.loads(_patiently(_client().blocking_key_value_get, key, _WEEK_MS))


def gather(name: str, value: T) -> list[T]:
    """The value of every process, in their order; anything that pickle takes, below 1 GiB."""
    if count() == 1:
        return [value]
    import jax
    import numpy as np
    from jax.experimental import multihost_utils

    _meet(name)
    content = np.frombuffer(pickle.dumps(value), np.uint8)
    with jax.transfer_guard("allow"):
        sizes = multihost_utils.process_allgather(np.array(content.size, np.int32))
        # Every new size is compiled anew, so there are few.
        padded = np.zeros(1 << int(sizes.max() - 1).bit_length(), np.uint8)
        padded[: content.size] = content
        everybody = multihost_utils.process_allgather(padded)
    return [pickle.loads(row[:n].tobytes()) for row, n in zip(everybody, sizes, strict=True)]


def _patiently(call: Callable[..., T], *arguments: Any) -> T:
    """What a call returns that may wait for long, in a thread of its own: the main thread would not
    handle a signal before it has returned."""
    with ThreadPoolExecutor(1, thread_name_prefix="waits") as pool:
        return pool.submit(call, *arguments).result()


def _once(name: str) -> str:
    """A name of its own for every use: processes come to the uses of one in the same order."""
    _uses[name] = _uses.get(name, 0) + 1
    return f"{name} {_uses[name]}"


def _client() -> Any:
    from jax._src import distributed  # the only way to the service, which Orbax takes too

    return distributed.global_state.client


# ---------------------------------------------------------------- life and death


def watch(requested: Callable[[], bool], request: Callable[[], None]) -> None:
    """Starts to watch the other processes, in a thread that ends this one when it has to.

    Args:
        requested: whether this process was asked to stop; the others learn of it.
        request: called when another was.
    """
    global _watch
    if count() > 1:
        _watch = Watch(requested, request)
        _watch.start()


def explains(error: BaseException) -> bool:
    """Whether `error` is one of the runtime's about the connection to other processes. If one of
    them is lost this process ends here, with a line that names it and status 4; what this returns
    tells of connections between processes that are all alive.

    An error of ours, of a store or of a client of some service is none, whatever it says.
    """
    import jax

    if _watch is None or not isinstance(error, RuntimeError):
        return False
    of_jax = isinstance(error, jax.errors.JaxRuntimeError)
    if not re.search(_OF_CONNECTIONS if of_jax else _OF_COLLECTIVES, str(error)):
        return False
    time.sleep(_LOST + 15)
    return True


def leave(status: int, line: str) -> None:
    """Takes leave of the other processes.

    After a run that has come to its end (status 0 or 3) they wait for each other. One that ends it
    earlier says so, and does not return: the others leave with its status unless they have one.
    """
    global _watch
    if _watch is None:
        return
    if status in (0, 3):
        barrier("jaxconv: the end")
        _watch.end()
        barrier("jaxconv: nobody watches")
        _watch = None
    else:
        _watch.part(status, line)


_OF_COLLECTIVES = r"(?i)gloo|nccl"
_OF_CONNECTIONS = rf"{_OF_COLLECTIVES}|unavailable|connection|coordination|deadline|barrier|aborted"


def _leave_without_process_0() -> None:
    """Before JAX aborts this process, which it does at once when the coordination service is gone:
    a line and status 4. (JAX has a callback for it, but cannot call one in Python.) An abort for
    another reason, while the service is there, stays one."""
    from jax._src import distributed

    host, _, port = distributed.global_state.coordinator_address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_GRACE).close()
    except OSError as error:
        where = f"process 0 ({_watch.where(0) if _watch else f'{host}:{port}'})"
        _say_end(_STOPPED, f"{where} is gone, and with it the coordination service: {error}")
        _exit(_STOPPED)


class Watch(threading.Thread):
    """Gives signs of life, and looks for those of the others."""

    def __init__(self, requested: Callable[[], bool], request: Callable[[], None]):
        super().__init__(daemon=True, name="watch")
        self._requested, self._request = requested, request
        self._index, self._count = index(), count()
        self._client = _client()
        self._beats = 0
        self._seen: dict[int, tuple[str, float]] = {}
        self._over = threading.Event()

    def run(self) -> None:
        parted = failing = None
        pool = ThreadPoolExecutor(1, thread_name_prefix="watch")
        while not self._over.wait(_EVERY):
            try:
                found = pool.submit(self._exchange).result(_LOST)
                failing = None
            except TimeoutError:
                self._leave_without_service(f"no answer for {_LOST:g} s")
            except Exception as error:
                # One call may fail where the network is busy. When process 0 is gone all do.
                failing = failing or time.monotonic()
                if time.monotonic() - failing > _RETRY:
                    self._leave_without_service(next(iter(str(error).splitlines()), repr(error)))
                continue
            if any(name.startswith("stop/") for name in found) and not self._requested():
                self._request()
            now = time.monotonic()
            ended = {k: v for k, v in found.items() if k.startswith("ended/")}
            if ended and parted is None:
                parted = now
            if parted is not None and now - parted > _GRACE:
                name, value = min(ended.items())
                status, line = json.loads(value)
                self._exit(status, f"process {name.removeprefix('ended/')} {line}")
            for process in range(self._count):
                self._look_at(process, found.get(f"alive/{process}"), ended, now)

    def _leave_without_service(self, reason: str) -> None:
        """The service is in process 0."""
        if self._index == 0:
            self._exit(_STOPPED, f"the coordination service, here in process 0, failed: {reason}")
        self._exit(
            _STOPPED,
            f"process 0 ({self.where(0)}) is gone, and with it the coordination service: {reason}",
        )

    def where(self, process: int) -> str:
        """Where a process runs, as it has said."""
        return self._seen[process][0].partition(" ")[2] if process in self._seen else "never seen"

    def _look_at(self, process: int, sign: str | None, ended: dict[str, str], now: float) -> None:
        if process == self._index or f"ended/{process}" in ended or sign is None:
            return
        before = self._seen.get(process)
        if before is None or before[0] != sign:
            self._seen[process] = sign, now
        elif now - before[1] > _LOST:
            self._exit(
                _STOPPED,
                f"process {process} ({self.where(process)}) is lost: "
                f"no sign of life for {_LOST:g} s",
            )

    def _exchange(self) -> dict[str, str]:
        """Says what this process has to say; returns what all have said."""
        self._beats += 1
        self._set("alive", f"{self._beats} pid {os.getpid()} on {socket.gethostname()}")
        if self._requested():
            self._set("stop", "")
        said = self._client.key_value_dir_get(f"{_PREFIX}watch/")
        return {key.rpartition("watch/")[2]: value for key, value in said}

    def _set(self, what: str, value: str) -> None:
        key = f"{_PREFIX}watch/{what}/{self._index}"
        self._client.key_value_set(key, value, allow_overwrite=True)

    def end(self) -> None:
        """Ends the watch."""
        self._over.set()
        self.join()

    def part(self, status: int, line: str) -> None:
        """Ends this process; the others learn why."""
        self.end()
        deadline = time.monotonic() + _FAREWELL
        try:
            self._set("ended", json.dumps([status, line]))
            while time.monotonic() < deadline:
                found = self._exchange()
                if sum(name.startswith("ended/") for name in found) == self._count:
                    if self._index == 0:
                        time.sleep(2 * _EVERY)  # with this process the service ends
                    break
                time.sleep(_EVERY / 4)
        except Exception:
            pass  # process 0 has gone already
        _exit(status)

    def _exit(self, status: int, line: str) -> None:
        _say_end(status, line)
        try:
            self._set("ended", json.dumps([status, line]))
            if self._index == 0:
                time.sleep(3 * _EVERY)  # with this process the service ends
        except Exception:
            pass
        _exit(status)


def _say_end(status: int, line: str) -> None:
    word = {2: "refused", _STOPPED: "stopped"}.get(status, "failed")
    end = "; to go on, run the same command again (without --overwrite)"
    print(
        f"jaxconv: {word}: {line}{end if status == _STOPPED else ''}", file=sys.stderr, flush=True
    )


def _exit(status: int) -> None:
    """At once: JAX would first wait for processes that no longer come."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(status)
