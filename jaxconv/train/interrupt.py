"""SIGTERM and Ctrl-C as a flag that loops poll, so that a run finishes its step and saves."""

import functools
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from jaxconv.errors import Stopped

if TYPE_CHECKING:
    import jax

_requested = False


@contextmanager
def catching() -> Iterator[None]:
    """Inside the block the first SIGTERM or Ctrl-C only sets the flag; a second Ctrl-C ends the
    process at once with exit status 4. Works in the main thread, as signal handlers do."""
    global _requested
    _requested = False
    previous = {kind: signal.getsignal(kind) for kind in (signal.SIGTERM, signal.SIGINT)}
    for kind in previous:
        signal.signal(kind, _handle)
    try:
        yield
    finally:
        for kind, handler in previous.items():
            signal.signal(kind, handler)


def requested() -> "bool | jax.Array":
    """Whether the run shall stop.

    Several processes agree on it: then it is a bool [] on their devices, whether any of them was
    asked to, that comes after all they were given to do before. Nobody waits for it who does not
    read it. Every process has to call this at the same points of its program, and reads the same.
    """
    import jax
    import numpy as np

    if jax.process_count() == 1:
        return _requested
    share, agree = _agreement()
    own = [jax.device_put(np.array([_requested]), d) for d in share.addressable_devices]
    shape = (jax.process_count(),)
    return agree(jax.make_array_from_single_device_arrays(shape, share, own))


@functools.cache
def _agreement() -> "tuple[jax.sharding.NamedSharding, Callable[[jax.Array], jax.Array]]":
    """How what each process says lies on its devices, and the program that tells all of them.

    It takes every device, as updates do: each runs what it is given in that order.
    """
    import jax
    import numpy as np
    from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

    devices = np.array(jax.devices()).reshape(jax.process_count(), -1)
    mesh = Mesh(devices, ("process", "device"), axis_types=(AxisType.Auto,) * 2)
    share, whole = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("process",), ()))
    return share, jax.jit(lambda asked: asked.any(), out_shardings=whole)


def noticed() -> bool:
    """Whether this process knows already that the run shall stop: for work that processes do each
    in its own time. They learn of one that was asked within seconds (`processes.watch`)."""
    return _requested


def request() -> None:
    """Asks this process to stop, as SIGTERM does."""
    global _requested
    _requested = True


def stop_if_requested(doing: str) -> None:
    """Raises `Stopped` when the run shall stop: for work between stages, which starts again."""
    if noticed():
        raise Stopped(f"while {doing}")


def _handle(kind: int, frame: object) -> None:
    global _requested
    if _requested and kind == signal.SIGINT:
        # Not an exception: whoever catches everything would keep the process alive.
        os._exit(4)
    already, _requested = _requested, True
    if not already:
        name = signal.Signals(kind).name
        # os.write is safe in a handler; print may be inside its own lock just now. Nobody may read.
        with suppress(OSError):
            line = f"{name}: finishing this step, then saving (Ctrl-C again leaves at once)\n"
            os.write(sys.__stderr__.fileno(), line.encode())
