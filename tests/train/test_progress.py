"""Progress where standard output is no terminal, and in one."""

import os
import pty
import subprocess
import sys

import pytest

from jaxconv.train import progress
from jaxconv.train.progress import Progress
from jaxconv.train.workdir import Workdir


@pytest.fixture
def clock(monkeypatch):
    class Clock:
        now = 1000.0

    monkeypatch.setattr(progress.time, "monotonic", lambda: Clock.now)
    return Clock


def test_plain_lines_come_now_and_then_and_at_the_end(tmp_path, capsys, clock):
    with (
        Workdir(tmp_path / "run") as workdir,
        Progress(workdir, "ppo", 105, start=5, every_s=10) as shown,
    ):
        for step in range(6, 106):
            clock.now += 30.0 if step == 6 else 1.0
            shown.update(step, {"reward": 4.123456}, tokens=500)
    lines = capsys.readouterr().out.splitlines()
    # The first step compiles: it is shown, but says nothing of the speed of the others.
    assert lines[0] == "ppo 6/105  reward 4.123"
    assert len(lines) == 11
    assert lines[1] == "ppo 16/105  reward 4.123  500 tokens/s  ETA 1:29"
    assert lines[-1] == "ppo 105/105  reward 4.123  500 tokens/s  ETA 0:00"


def test_the_last_step_is_always_shown_and_tokens_only_if_counted(tmp_path, capsys, clock):
    with Workdir(tmp_path / "run") as workdir, Progress(workdir, "sft", 2) as shown:
        shown.update(1, {"loss": 2.0})
        clock.now += 0.5
        shown.update(2, {"loss": 1.5})
    assert capsys.readouterr().out == "sft 2/2  loss 1.5  ETA 0:00\n"


def test_other_processes_show_nothing(tmp_path, capsys):
    with Progress(Workdir(tmp_path / "run", writer=False), "sft", 1) as shown:
        shown.update(1, {"loss": 2.0})
    assert capsys.readouterr().out == ""


def test_a_terminal_gets_a_live_bar(tmp_path):
    code = "import sys; from jaxconv.train.progress import Progress\n"
    code += "from jaxconv.train.workdir import Workdir\n"
    code += "with Workdir(sys.argv[1]) as w, Progress(w, 'ppo', 2) as p:\n"
    code += "    [p.update(s, {'reward': s}, tokens=10) for s in (1, 2)]\n"
    ours, theirs = pty.openpty()
    subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "run")],
        stdout=theirs,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "120"},
        check=True,
    )
    os.close(theirs)
    shown = os.read(ours, 1 << 16).decode()
    assert "ppo" in shown and "2/2" in shown and "reward 2" in shown and "tokens/s" in shown
    assert "\x1b[" in shown
