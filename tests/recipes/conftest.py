"""A run of seconds: the whole recipe at a size where nothing is learned but everything happens."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest

from jaxconv import launch
from jaxconv.train import metrics
from jaxconv.train.workdir import Workdir

HERE = Path(__file__).parent
TINY = {
    "model.vocab_size": 300,
    "model.embed_dim": 16,
    "model.num_layers": 2,
    "model.num_heads": 1,
    "model.num_kv_heads": 1,
    "model.mlp_dim": 32,
    "warm_start.dialogues": 60,
    "warm_start.held_out": 8,
    "warm_start.steps": 6,
    "warm_start.streams": 8,
    "warm_start.evaluate_every": 3,
    "warm_start.rows": 2,
    "warm_start.width": 384,
    "rollout.slots": 4,
    "rollout.engines": 2,
    "rollout.lengths": "(384,)",
    "rollout.burst": 8,
    "rollout.turn_budget": 8,
    "rollout.prefill_rows": "(4,)",
    "rollout.prefill_tokens": "(32,)",
    "self_play.iterations": 3,
    "self_play.games": 8,
    "self_play.learning_rate": 0.01,
    "minibatching.rows": 2,
    "minibatching.width": 384,
    "minibatching.capacity": 1,
    "arena.games": 4,
    "arena.script_games": 2,
    "checkpoint.warm_start_every": 2,
    "checkpoint.rollout_seconds": 0.05,
}


def arguments(workdir: Path, **changed) -> list[str]:
    """The command line of a tiny run; `changed` fields have `__` for the dot."""
    fields = TINY | {name.replace("__", "."): value for name, value in changed.items()}
    return [
        "--config=configs/omar.py",
        f"--workdir={workdir}",
        *(f"--config.{name}={value}" for name, value in fields.items()),
    ]


def start(command: list[str], **options) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def run(workdir: Path, *flags: str, **changed) -> subprocess.CompletedProcess:
    """The command line as a process of its own, to its end."""
    command = ["-m", "jaxconv.launch", *arguments(workdir, **changed), *flags]
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=600)


def main(command: list[str]) -> int:
    """The command line in this process, whose devices may be in use already."""
    with mock.patch.dict(os.environ, {"JAX_NUM_CPU_DEVICES": "1"}):
        return launch.main(command)


def interrupt(action: str, point: str, workdir: Path, **changed) -> subprocess.CompletedProcess:
    """The same, ended at a point of the program; see `interrupted.py`."""
    command = [str(HERE / "interrupted.py"), action, point, *arguments(workdir, **changed)]
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=600)


def killed(point: str, workdir: Path, **changed) -> None:
    ended = interrupt("SIGKILL", point, workdir, **changed)
    assert ended.returncode == -signal.SIGKILL, f"{point} was not reached\n{ended.stderr}"


def outcome(workdir: Path) -> dict:
    """All that a run made and that has to be the same when it was interrupted."""
    records = metrics.read(Workdir(workdir, writer=False))
    report = json.loads((workdir / "report.json").read_text())
    text = (workdir / "report.md").read_text()
    return {
        "policy": (workdir / "export" / "model.safetensors").read_bytes(),
        "critic": (workdir / "export" / "value_head.safetensors").read_bytes(),
        "frozen": (workdir / "artifacts" / "warm_start" / "model.safetensors").read_bytes(),
        "metrics": [
            {k: v for k, v in r.items() if not re.match("time|speed/|memory/", k)} for r in records
        ],
        "results": report["results"],
        "baselines": report["baselines"],
        "notes": report["notes"],
        "transcripts": text.partition("## Transcripts")[2].partition("## Speed")[0],
    }


def assert_same_run(workdir: Path, whole: Path) -> None:
    found, expected = outcome(workdir), outcome(whole)
    assert found["transcripts"].count("| before") == 3  # the games are shown at all
    for name, value in expected.items():
        assert found[name] == value, name
    steps = [(record["stage"], record["step"]) for record in found["metrics"]]
    assert steps == [("warm_start", i) for i in range(1, 7)] + [
        ("self_play", i) for i in range(1, 4)
    ]


@pytest.fixture(scope="session")
def tiny():
    """The functions of this file."""
    import types

    return types.SimpleNamespace(
        arguments=arguments,
        start=start,
        run=run,
        main=main,
        interrupt=interrupt,
        killed=killed,
        outcome=outcome,
        assert_same_run=assert_same_run,
    )


@pytest.fixture(scope="session")
def finished(tmp_path_factory) -> Path:
    """The workdir of an undisturbed run; not to be changed."""
    workdir = tmp_path_factory.mktemp("omar") / "whole"
    done = run(workdir)
    assert done.returncode == 0, done.stderr
    return workdir


@pytest.fixture
def copy(finished, tmp_path) -> Path:
    """A finished workdir of the test's own."""
    return Path(shutil.copytree(finished, tmp_path / "run"))
