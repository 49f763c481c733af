"""Coroutines from code that is none."""

import asyncio
import threading
from collections.abc import Callable, Coroutine
from typing import Any


def in_event_loop(make: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
    """Runs a coroutine to its end, also where an event loop runs already (a notebook)."""

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(make())
    out: list[Any] = []

    def caught() -> None:
        try:
            out.append((asyncio.run(make()), None))
        except BaseException as error:
            out.append((None, error))

    thread = threading.Thread(target=caught)
    thread.start()
    thread.join()
    value, error = out[0]
    if error is not None:
        raise error
    return value
