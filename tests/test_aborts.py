"""What runs before an abort, in processes of their own."""

import signal
import subprocess
import sys

import pytest

_ABORTED = """
import ctypes, os, sys, threading, time
from jaxconv import aborts

def function():
    print("called", flush=True)
    {does}

aborts.before(function)
# As a thread of a C library does, while Python is busy in another one.
threading.Thread(target=ctypes.CDLL(None).abort).start()
end = time.monotonic() + 20
while time.monotonic() < end:
    pass
"""


@pytest.mark.parametrize(("does", "status"), [("os._exit(4)", 4), ("", -signal.SIGABRT)])
def test_a_function_is_called_and_may_end_the_process_otherwise(does, status):
    command = [sys.executable, "-c", _ABORTED.format(does=does)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (status, "called\n"), done.stderr
