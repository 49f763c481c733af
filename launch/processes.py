"""Runs one run in N processes of this machine: `python launch/processes.py N [flags]`.

`launch/local.sh --processes=N` calls it. Each process is `python -m jaxconv.launch` with the flags
given and those of `--distributed`; on CPUs they share the cores and talk through gloo, on GPUs each
has the GPU of its number. Lines of output begin with the number of their process. Ctrl-C and
SIGTERM go to all of them. When one fails, the others have a minute to leave, then are stopped.

Exit status: the worst of theirs, in the order 2 refused, 1 failed or killed, 4 stopped, 3 done in
part, 0 done; 4 too when one was killed by SIGKILL (no memory left, a machine taken away) and all
others left because of it, since the same command goes on then.
"""

import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from typing import BinaryIO

_GRACE_SECONDS = 60.0  # for the others, once one has failed
_KILL_SECONDS = 10.0  # from SIGTERM to SIGKILL
_WORST_FIRST = (2, 1, 4, 3, 0)


def main(argv: Sequence[str]) -> int:
    count = int(argv[0])
    asked: list[int] = []  # signals to pass on; handlers only note them, so that none gets lost
    for kind in (signal.SIGINT, signal.SIGTERM):
        signal.signal(kind, lambda kind, frame: asked.append(kind))
    processes = _start(count, argv[1:])
    copiers = [
        threading.Thread(target=_copy, args=(index, source, target))
        for index, process in enumerate(processes)
        for source, target in (
            (process.stdout, sys.stdout.buffer),
            (process.stderr, sys.stderr.buffer),
        )
    ]
    for copier in copiers:
        copier.start()
    codes = _wait(processes, asked)
    for copier in copiers:
        copier.join()
    if _others_left(codes, count):
        return 4
    statuses = [_status(code, bool(asked)) for code in codes.values()]
    return min(statuses, key=_WORST_FIRST.index)


def _start(count: int, flags: Sequence[str]) -> list[subprocess.Popen]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    cores = min(len(os.sched_getaffinity(0)), 8)  # as many devices as one process would make
    environment = {
        "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
        "JAX_NUM_CPU_DEVICES": str(max(cores // count, 1)),
        **os.environ,
        "JAX_COORDINATOR_BIND_ADDRESS": address,  # nobody else on the network can join
    }
    processes = []
    for index in range(count):
        command = [
            *(sys.executable, "-m", "jaxconv.launch", *flags, "--distributed"),
            *(f"--coordinator={address}", f"--process_count={count}", f"--process_index={index}"),
        ]
        processes.append(
            subprocess.Popen(
                command,
                env={**environment, "JAX_LOCAL_DEVICE_IDS": str(index)},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                # Out of reach of the terminal's Ctrl-C, which would count as a second one.
                start_new_session=True,
            )
        )
    return processes


def _wait(processes: list[subprocess.Popen], asked: list[int]) -> dict[int, int]:
    """The return codes of those that left by themselves; the rest was stopped because of them."""
    codes: dict[int, int] = {}
    deadline = math.inf
    passed_on = 0
    while len(codes) < len(processes) and time.monotonic() < deadline:
        while passed_on < len(asked):
            for process in processes:
                process.send_signal(asked[passed_on])  # nothing happens to one that has ended
            passed_on += 1
        failed = None
        for index, process in enumerate(processes):
            if index in codes or process.poll() is None:
                continue
            codes[index] = process.returncode
            # After one that ended well the others end too, however long they save or export.
            if process.returncode not in (0, 3, 4):
                failed = index
        if failed is not None and deadline == math.inf and len(codes) < len(processes):
            deadline = time.monotonic() + _GRACE_SECONDS
            _say(
                f"process {failed} {_how_it_ended(processes[failed].returncode)}; the others are "
                f"stopped in {_GRACE_SECONDS:g} s unless they leave by themselves"
            )
        time.sleep(0.1)
    _stop([process for index, process in enumerate(processes) if index not in codes])
    return codes


def _others_left(codes: dict[int, int], count: int) -> bool:
    """Whether some processes were killed from outside and all others left because of that, with a
    checkpoint to go on from."""
    lost = [index for index, code in codes.items() if code == -signal.SIGKILL]
    others = [code for index, code in codes.items() if index not in lost]
    return bool(lost) and len(codes) == count and bool(others) and set(others) == {4}


def _status(returncode: int, asked: bool) -> int:
    if asked and -returncode in (signal.SIGINT, signal.SIGTERM):
        return 4  # it had not come to the point where it saves; there was nothing to save
    return returncode if returncode in _WORST_FIRST else 1


def _stop(running: list[subprocess.Popen]) -> None:
    for process in running:
        process.terminate()
    deadline = time.monotonic() + _KILL_SECONDS
    for process in running:
        try:
            process.wait(max(deadline - time.monotonic(), 0))
        except subprocess.TimeoutExpired:
            # With what it has started itself, such as data workers, which hold its output open.
            os.killpg(process.pid, signal.SIGKILL)


def _how_it_ended(returncode: int) -> str:
    if returncode < 0:
        return f"was killed by {signal.Signals(-returncode).name}"
    return f"left with status {returncode}"


def _copy(index: int, source: BinaryIO, target: BinaryIO) -> None:
    prefix = f"[{index}] ".encode()
    for line in source:
        try:
            # One write, so that lines of two processes do not mix.
            target.write(prefix + line.rstrip(b"\r\n") + b"\n")
            target.flush()
        except BrokenPipeError:
            pass  # nobody reads any more; the run goes on


def _say(line: str) -> None:
    print(f"jaxconv: {line}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
