"""`launch/processes.py`: what each process gets, where signals go, what happens when one dies.

The processes run a stand-in for `jaxconv.launch`, found first because it lies where they start.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

_LAUNCH = Path(__file__).parents[2] / "launch"

# Says what it was given, then does what its `--does=` says for its index.
_STAND_IN = """
import os, signal, sys, time

flags = dict(flag.lstrip("-").partition("=")[::2] for flag in sys.argv[1:])
index = int(flags["process_index"])
does = flags["does"].split(",")
does = does[index % len(does)]
print("flags", *sys.argv[1:], flush=True)
print("names", *(os.environ[name] for name in (
    "JAX_CPU_COLLECTIVES_IMPLEMENTATION", "JAX_NUM_CPU_DEVICES", "JAX_LOCAL_DEVICE_IDS",
    "JAX_COORDINATOR_BIND_ADDRESS")), flush=True)
print("to stderr", file=sys.stderr, flush=True)
if does.isdecimal():
    sys.exit(int(does))
if does in ("die", "abort", "crash"):
    kinds = {"die": signal.SIGKILL, "abort": signal.SIGABRT, "crash": signal.SIGSEGV}
    os.kill(os.getpid(), kinds[does])
if does == "save":
    def stop(kind, frame):
        print("asked", signal.Signals(kind).name, flush=True)
        time.sleep(0.3)
        sys.exit(4)
    for kind in (signal.SIGINT, signal.SIGTERM):
        signal.signal(kind, stop)
if does == "hang":
    for kind in (signal.SIGINT, signal.SIGTERM):
        signal.signal(kind, signal.SIG_IGN)
print("ready", flush=True)
time.sleep(60)
"""

_WITH_SHORT_GRACE = f"""
import sys
sys.path.insert(0, {str(_LAUNCH)!r})
import processes
processes._GRACE_SECONDS, processes._KILL_SECONDS = 0.5, 0.3
sys.exit(processes.main(sys.argv[1:]))
"""


@pytest.fixture
def start(tmp_path):
    """Starts processes.py; `does` is one word for all or one for each process."""
    (tmp_path / "jaxconv").mkdir()
    (tmp_path / "jaxconv/__init__.py").touch()
    (tmp_path / "jaxconv/launch.py").write_text(_STAND_IN)

    def start(count, does, *flags, **environment):
        return subprocess.Popen(
            [sys.executable, "-c", _WITH_SHORT_GRACE, str(count), f"--does={does}", *flags],
            cwd=tmp_path,
            env={**os.environ, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return start


def _wait_for(process, count, word):
    seen = []
    while sum(word in line for line in seen) < count:
        seen.append(process.stdout.readline())
        assert seen[-1], process.stderr.read()


def test_each_process_gets_its_number_and_all_one_coordinator(start):
    process = start(2, "0", "--config=configs/sft.py", "--config.name=a b", JAX_NUM_CPU_DEVICES="3")
    out, err = process.communicate(timeout=30)
    assert process.returncode == 0
    flags = [line for line in out.splitlines() if "flags" in line]
    address = flags[0].partition("--coordinator=")[2].split()[0]
    assert address.startswith("127.0.0.1:")
    assert sorted(flags) == [
        f"[{index}] flags --does=0 --config=configs/sft.py --config.name=a b --distributed "
        f"--coordinator={address} --process_count=2 --process_index={index}"
        for index in range(2)
    ]
    assert f"[1] names gloo 3 1 {address}\n" in out
    assert sorted(err.splitlines()) == ["[0] to stderr", "[1] to stderr"]


def test_the_processes_share_the_cores(start):
    cores = len(os.sched_getaffinity(0))
    out, _ = start(cores + 1, "0").communicate(timeout=30)
    assert out.count("names gloo 1 ") == cores + 1


@pytest.mark.parametrize(
    ("does", "status"),
    [("0,3", 3), ("3,4", 4), ("4,1", 1), ("1,2", 2), ("7,0", 1)],
)
def test_the_status_is_the_worst(start, does, status):
    process = start(2, does)
    process.communicate(timeout=30)
    assert process.returncode == status


@pytest.mark.parametrize(
    ("does", "status"),
    [
        ("4,die,4", 4),
        ("die,4,4", 4),
        ("die,die,4", 4),
        ("die,abort,4", 1),  # for a reason of its own
        ("die,1,4", 1),
        ("4,die,abort", 1),
        ("4,crash,4", 1),
        ("0,die,0", 1),
        ("die,die,die", 1),
    ],
)
def test_a_run_that_lost_a_process_can_go_on(start, does, status):
    process = start(3, does)
    process.communicate(timeout=30)
    assert process.returncode == status


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_reaches_every_process_once(start, kind):
    process = start(3, "save")
    _wait_for(process, 3, "ready")
    process.send_signal(kind)
    out, _ = process.communicate(timeout=30)
    assert process.returncode == 4
    assert sorted(out.splitlines()) == [f"[{index}] asked {kind.name}" for index in range(3)]


def test_a_signal_before_anything_is_to_be_saved_is_no_failure(start):
    process = start(2, "wait")  # with the default action of SIGTERM
    _wait_for(process, 2, "ready")
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == 4


def test_the_others_of_a_killed_process_are_stopped(start):
    process = start(3, "die,save,hang")
    began = time.monotonic()
    out, err = process.communicate(timeout=30)
    assert process.returncode == 1
    assert "process 0 was killed by SIGKILL; the others are stopped in 0.5 s unless" in err
    assert "[1] asked SIGTERM" in out  # and 2, which does not listen, was killed
    assert time.monotonic() - began < 20


def test_nobody_is_stopped_while_it_saves(start):
    process = start(2, "4,save")
    time.sleep(0.8)  # longer than the grace
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    assert process.returncode == 4
