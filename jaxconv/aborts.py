"""A word before a C library aborts the process, in Python."""

import ctypes
import signal
from collections.abc import Callable
from typing import Any

_called: Any = None  # C knows its address


def before(function: Callable[[], None]) -> None:
    """Calls `function` when something aborts this process, in the thread that does. When it
    returns, the process ends by SIGABRT as it would have without.

    A handler of the module `signal` would come too late: Python runs it in the main thread, some
    time after the handler of C has returned, and that is when an abort ends the process.
    """
    global _called
    libc = ctypes.CDLL(None)
    libc.signal.argtypes, libc.signal.restype = [ctypes.c_int, ctypes.c_void_p], ctypes.c_void_p
    _called = ctypes.CFUNCTYPE(None, ctypes.c_int)(lambda kind: function())
    libc.signal(signal.SIGABRT, ctypes.cast(_called, ctypes.c_void_p))
