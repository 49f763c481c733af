"""What processes tell each other besides collectives, and which rows each of them brings.

Run as a program this is one of the processes; it prints what it found.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import jax
import pytest

from jaxconv import processes
from jaxconv.errors import Failed


def one_of(count: int, index: int, address: str, folder: str) -> dict:
    """What process `index` finds."""
    from pathlib import Path

    import numpy as np

    from jaxconv.models.sharding import device_mesh, for_host, on_device
    from jaxconv.train.mesh import data_mesh, replicate, share_of, share_rows, share_whole

    processes.join(address, count, index)
    made = Path(folder) / "made"
    with processes.process_0_first("a file"):
        if index == 0:
            time.sleep(0.5)
            made.touch()
        there = made.is_file()
    rows = np.arange(2 * 8, dtype=np.int32).reshape(2, 8)
    found = {}
    for name, mesh in (("ddp", data_mesh(8)), ("fsdp_tp", device_mesh(fsdp=2, tensor=2))):
        own = share_of(mesh, 8).own
        shared = share_rows(rows[:, own], mesh)
        whole = jax.device_get(for_host(shared))
        again = jax.device_get(for_host(share_whole(rows, mesh)))
        found[name] = {
            "own": own.tolist(),
            "same": bool((whole == rows).all() and (again == rows).all()),
            "replicated": np.asarray(replicate(rows, mesh)).tolist() == rows.tolist(),
        }
    # One device of each process has a copy; another one of this process gets it from there.
    idle = jax.local_devices()[1]
    fewer = replicate(rows, data_mesh(2))
    taken = on_device(fewer, idle)
    moved = replicate(replicate(rows, data_mesh(8)), data_mesh(2))
    return {
        "there": there,
        "taken": taken.devices() == {idle} and np.asarray(taken).tolist() == rows.tolist(),
        "moved": moved.sharding == fewer.sharding and np.asarray(moved).tolist() == rows.tolist(),
        "waited": waited_for_a_signal(index),
        "told": processes.of_process_0("which one", lambda: index),
        "gathered": processes.gather("words", "x" * index),
        **found,
    }


def waited_for_a_signal(index: int) -> float:
    """Seconds until a signal was handled by a process that waits for another for two seconds."""
    handled = []
    signal.signal(signal.SIGALRM, lambda kind, frame: handled.append(time.monotonic()))
    processes.barrier("together")
    began = time.monotonic()
    if index == 1:
        time.sleep(2)
    else:
        signal.setitimer(signal.ITIMER_REAL, 0.2)
    processes.barrier("apart")
    return handled[0] - began if handled else 0.0


def test_two_processes_find_the_same(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "2",
        "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
    }
    started = [
        subprocess.Popen(
            [sys.executable, __file__, "2", str(index), address, str(tmp_path)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
    said = [process.communicate(timeout=120) for process in started]
    assert [process.returncode for process in started] == [0, 0], said
    for index, (out, _) in enumerate(said):
        found = json.loads(out.splitlines()[-1])
        assert found["there"] and found["taken"] and found["moved"]
        assert found["waited"] < 1.0
        assert found["told"] == 0
        assert found["gathered"] == ["", "x"]
        own = list(range(4 * index, 4 * index + 4))
        for name in ("ddp", "fsdp_tp"):
            assert found[name] == {"own": own, "same": True, "replicated": True}


_UNAVAILABLE = "UNAVAILABLE: recvmsg:Connection reset by peer"


class APIConnectionError(Exception):
    """As of the client of a service that is asked for completions."""


@pytest.mark.parametrize(
    ("error", "explained"),
    [
        (jax.errors.JaxRuntimeError(_UNAVAILABLE), True),
        (jax.errors.JaxRuntimeError("UNKNOWN: Gloo all-reduce failed: Connection closed"), True),
        (RuntimeError("Unable to initialize backend 'cpu': gloo: connect timeout"), True),
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory"), False),
        (Failed("cannot reach gs://bucket/x: Connection refused"), False),
        (APIConnectionError("Connection error."), False),
        (ValueError("/data/connections.jsonl line 3: bad json"), False),
        (RuntimeError("the connection to a tool broke"), False),
    ],
)
def test_only_the_runtime_tells_of_connections_to_processes(error, explained, monkeypatch):
    monkeypatch.setattr(processes, "_watch", object())
    waits = []
    monkeypatch.setattr(processes.time, "sleep", waits.append)
    assert processes.explains(error) == explained
    # Long enough for the watch to end this process, if another is lost.
    assert [wait > processes._LOST for wait in waits] == [True] * explained


def test_one_process_has_no_connections():
    assert not processes.explains(jax.errors.JaxRuntimeError(_UNAVAILABLE))


class Service:
    """A stand-in for the client of the coordination service, in a process that has another."""

    def __init__(self, answers):
        self._answers = iter(answers)  # of key_value_dir_get: what is thrown, or whether 0 lives
        self.said = {}

    def key_value_set(self, key, value, allow_overwrite):
        self.said[key] = value

    def key_value_dir_get(self, prefix):
        answer = next(self._answers)
        if isinstance(answer, float):
            time.sleep(answer)
        if isinstance(answer, Exception):
            raise answer
        return [(f"{prefix}alive/0", f"{time.monotonic()} pid 7 on host"), *self.said.items()]


@pytest.fixture
def left(monkeypatch, capsys):
    """How the watch of a process with this index leaves, by what the service answers."""

    def left(index, answers):
        for name, value in (("_EVERY", 0.01), ("_RETRY", 0.2), ("_LOST", 0.5)):
            monkeypatch.setattr(processes, name, value)
        for name, value in (("index", index), ("count", 2), ("_client", Service(answers))):
            monkeypatch.setattr(processes, name, lambda value=value: value)
        monkeypatch.setattr(processes, "_exit", sys.exit)
        watch = processes.Watch(lambda: False, lambda: None)
        with pytest.raises(SystemExit) as exit:
            watch.run()
        return exit.value.code, capsys.readouterr().err

    return left


_DEADLINE = jax.errors.JaxRuntimeError("DEADLINE_EXCEEDED: one call\nand more")


def test_a_call_that_fails_is_made_again_and_ends_nothing(left):
    def answers():
        for _ in range(3):
            yield True
            yield _DEADLINE
        yield 0.1
        while True:
            yield _DEADLINE

    began = time.monotonic()
    status, said = left(1, answers())
    assert time.monotonic() - began > 0.3
    assert status == 4
    assert said == (
        "jaxconv: stopped: process 0 (pid 7 on host) is gone, and with it the coordination "
        "service: DEADLINE_EXCEEDED: one call; to go on, run the same command again (without "
        "--overwrite)\n"
    )


def test_process_0_tells_of_its_own_service(left, monkeypatch):
    monkeypatch.setattr(processes.time, "sleep", lambda seconds: None)
    status, said = left(0, iter(lambda: _DEADLINE, None))
    assert status == 4 and "is gone" not in said
    assert "the coordination service, here in process 0, failed: DEADLINE_EXCEEDED" in said


def test_a_process_0_that_does_not_answer_is_lost(left):
    status, said = left(1, [True, 0.8, True])
    assert status == 4 and "process 0 (pid 7 on host) is gone" in said
    assert "no answer for 0.5 s" in said


if __name__ == "__main__":
    count, index, address, folder = sys.argv[1:]
    print(json.dumps(one_of(int(count), int(index), address, folder)))
