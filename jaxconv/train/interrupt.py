"""SIGTERM and Ctrl-C as a flag that loops poll, so that a run finishes its step and saves."""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

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


def requested() -> bool:
    """Whether the run shall stop. With several processes: whether any of them was asked to; then
    every process has to call this at the same points of its program."""
    import jax

    if jax.process_count() == 1:
        return _requested
    import numpy as np
    from jax.experimental import multihost_utils

    return bool(multihost_utils.process_allgather(np.array(_requested)).any())


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
