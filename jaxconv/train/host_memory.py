"""The C library's allocator, told to keep memory that a training step frees and asks for again."""

import ctypes
import os

# <malloc.h>; the largest threshold that glibc takes without a complaint is 32 MiB.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3
_SETTINGS = (
    ("MALLOC_MMAP_THRESHOLD_", _M_MMAP_THRESHOLD, 32 << 20),
    ("MALLOC_TRIM_THRESHOLD_", _M_TRIM_THRESHOLD, (2 << 30) - 1),
    ("MALLOC_TOP_PAD_", _M_TOP_PAD, 64 << 20),
)


def keep() -> None:
    """On Linux with glibc: freed memory stays with the process, up to 2 GiB.

    XLA takes the buffers of every step from malloc, which by default gives large ones back to the
    kernel at once; the next step then waits for every page to be cleared anew, on two cores for a
    fifth of its time. Settings of the environment (`MALLOC_TRIM_THRESHOLD_` and so on) are
    respected, other C libraries left alone.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return
    for name, parameter, value in _SETTINGS:
        if name not in os.environ:
            mallopt(parameter, value)
