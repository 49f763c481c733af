"""`launch/tpu_worker.sh`: the run outlives who started it, and its state can be asked for."""

import os
import shutil
import signal
import time

import pytest

_RUN = ("--config=configs/sft.py", "--workdir=gs://bucket/a b")

# Prints what it was given; leaves with STATUS, at SIGTERM with 4, or goes on for a minute.
_PYTHON = """#!/usr/bin/env bash
printf '<%s>' "$@"; echo
if [[ -n ${STATUS:-} ]]; then exit "$STATUS"; fi
trap 'exit 4' TERM
sleep 60 & wait
"""


@pytest.fixture
def worker(cluster):
    checkout = cluster.folder / "jaxconv"
    (checkout / ".venv/bin").mkdir(parents=True)
    (checkout / "launch").mkdir()
    shutil.copy(cluster.root / "launch/tpu_worker.sh", checkout / "launch")
    python = checkout / ".venv/bin/python"
    python.write_text(_PYTHON)
    python.chmod(0o755)
    cluster.root = checkout
    cluster.command("python3")
    cluster.command("sleep", 'exec /usr/bin/sleep "$([[ $1 == 1 ]] && echo 0.01 || echo "$1")"')
    yield cluster
    pid = cluster.folder / "jaxconv-run/pid"
    if pid.exists() and not pid.with_name("status").exists():
        os.kill(int(pid.read_text()), signal.SIGTERM)


def ask(worker, *arguments, **environment):
    done = worker.run("tpu_worker.sh", *arguments, **environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def wait_for(worker, word):
    deadline = time.monotonic() + 20
    while (line := ask(worker, "status")) != f"jaxconv status: {word}\n":
        assert time.monotonic() < deadline, line


def test_installing(worker):
    ask(worker, "install")
    assert worker.calls == [
        "python3 -m pip install --quiet --user uv",
        "python3 -m uv venv --quiet --allow-existing --python=3.12 .venv",
        "python3 -m uv pip install --quiet --python=.venv/bin/python --editable .[tpu,cloud]",
    ]


def test_a_run_from_start_to_end(worker):
    assert ask(worker, "status") == "jaxconv status: none\n"
    ask(worker, "start", *_RUN, STATUS="3")
    wait_for(worker, "3")
    log = (worker.folder / "jaxconv-run/log").read_text()
    assert "<-m><jaxconv.launch><" + "><".join(_RUN) + "><--distributed>" in log
    assert ask(worker, "follow") == ""  # it has ended
    ask(worker, "start", *_RUN, STATUS="0")
    wait_for(worker, "0")


def test_the_same_command_again_leaves_a_run_alone_and_another_is_refused(worker):
    ask(worker, "start", *_RUN)
    pid = (worker.folder / "jaxconv-run/pid").read_text()
    ask(worker, "start", *_RUN)
    assert (worker.folder / "jaxconv-run/pid").read_text() == pid
    other = worker.run("tpu_worker.sh", "start", "--config=configs/dpo.py")
    assert other.returncode == 2
    assert other.stderr.startswith("another run is in progress here: --config=configs/sft.py")
    assert ask(worker, "status") == "jaxconv status: running\n"


def test_stopped_on_request_is_not_stopped_by_a_signal(worker):
    ask(worker, "start", *_RUN)
    ask(worker, "stop")
    wait_for(worker, "stopped")
    ask(worker, "start", *_RUN)
    os.kill(int((worker.folder / "jaxconv-run/pid").read_text()), signal.SIGTERM)
    wait_for(worker, "4")


@pytest.mark.parametrize("left", ["4", "143", None])
def test_stopped_on_request_before_the_run_took_signals(worker, left):
    ask(worker, "start", *_RUN, STATUS=left or "0")
    wait_for(worker, left or "0")
    state = worker.folder / "jaxconv-run"
    if left is None:  # the worker went away under it
        (state / "status").unlink()
    (state / "stopped").touch()
    assert ask(worker, "status") == "jaxconv status: stopped\n"
    ask(worker, "start", *_RUN, STATUS="143")
    wait_for(worker, "143")  # this time nobody asked


@pytest.mark.parametrize("ended", ["0", "1", "137"])
def test_what_ended_before_it_was_stopped_ended_so(worker, ended):
    ask(worker, "start", *_RUN, STATUS=ended)
    wait_for(worker, ended)
    (worker.folder / "jaxconv-run/stopped").touch()
    assert ask(worker, "status") == f"jaxconv status: {ended}\n"


def test_following_ends_with_the_run(worker):
    ask(worker, "start", *_RUN)
    pid = int((worker.folder / "jaxconv-run/pid").read_text())
    # The output is there at once; the signal comes while it is followed.
    worker.command("tail", f'(/usr/bin/sleep 0.5; kill {pid}) & exec /usr/bin/tail "$@"')
    assert "<jaxconv.launch>" in ask(worker, "follow")
    wait_for(worker, "4")


def test_the_end_of_the_output_is_shown_unless_it_ended_like_the_others(worker):
    assert ask(worker, "ends", "1") == ""  # nothing has run here
    ask(worker, "start", *_RUN, STATUS="1")
    wait_for(worker, "1")
    ask(worker, "start", "--second", STATUS="1")
    wait_for(worker, "1")
    [line] = ask(worker, "ends", "1", "4").splitlines()
    assert line.startswith("[") and line.endswith("] <-m><jaxconv.launch><--second><--distributed>")
    assert len(ask(worker, "ends", "5").splitlines()) == 2
    assert ask(worker, "ends", "5", "1") == ""


def test_a_worker_that_was_restarted_has_lost_its_run(worker):
    ask(worker, "start", *_RUN, STATUS="0")
    wait_for(worker, "0")
    (worker.folder / "jaxconv-run/status").unlink()
    wait_for(worker, "lost")
    (worker.folder / "jaxconv-run/pid").unlink()
