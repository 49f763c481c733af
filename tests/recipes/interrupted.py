"""Runs `jaxconv.launch` and ends it at an exact point of the program.

`python interrupted.py ACTION MODULE:FUNCTION:CALL <launch arguments>`: at the CALL-th call of the
function (`CALL+`: right after it has returned) the process sends itself SIGKILL or SIGTERM, or,
with the action `full`, can from then on write no file beyond its first bytes, as on a full disk.
"""

import functools
import importlib
import os
import resource
import signal
import sys

from jaxconv import launch


def act(action: str) -> None:
    if action == "full":
        _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1024, hard))
    else:
        os.kill(os.getpid(), signal.Signals[action])


def intercept(action: str, point: str) -> None:
    module, path, call = point.split(":")
    owner = importlib.import_module(module)
    *parents, name = path.split(".")
    for parent in parents:
        owner = getattr(owner, parent)
    function = getattr(owner, name)
    calls = 0

    @functools.wraps(function)
    def counted(*args, **kwargs):
        nonlocal calls
        calls += 1
        if call == str(calls):
            act(action)
        result = function(*args, **kwargs)
        if call == f"{calls}+":
            act(action)
        return result

    setattr(owner, name, counted)


if __name__ == "__main__":
    intercept(sys.argv[1], sys.argv[2])
    sys.exit(launch.main(sys.argv[3:]))
