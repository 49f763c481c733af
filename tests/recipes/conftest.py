"""Runs of seconds: whole recipes at a size where nothing is learned but everything happens."""

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any
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


FINE_TUNING = {
    "model.vocab_size": 300,
    "model.embed_dim": 16,
    "model.num_layers": 2,
    "model.num_heads": 1,
    "model.num_kv_heads": 1,
    "model.mlp_dim": 32,
    "batch.rows": 2,
    "batch.microbatches": 2,
    "batch.width": 256,
    "checkpoint.every": 2,
    "samples.prompts": 4,
    "samples.max_tokens": 8,
    "data.held_out": 8,
    "data.validation": 6,
    "train.epochs": 1,
    "train.warmup": 1,
    "train.evaluate_every": 3,
}
SFT = FINE_TUNING | {"data.examples": 40}
DPO = FINE_TUNING | {
    "batch.width": 320,
    "data.examples": 20,
    "data.pairs": 16,
    "train.epochs": 2,
    "train.learning_rate": 0.01,
    "sft.epochs": 1,
    "sft.warmup": 1,
    "sft.evaluate_every": 2,
}


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A recipe as a command line.

    Attributes:
        config: file.
        fields: that make it tiny.
        files: that a run makes and that have to be the same when it was interrupted, by name.
        told: headings of report.md, from and up to, whose text has to be the same too.
        stages: (name, steps) of each.
    """

    config: str
    fields: Mapping[str, Any]
    files: Mapping[str, str]
    told: tuple[str, str]
    stages: tuple[tuple[str, int], ...]

    def arguments(self, workdir: Path, **changed) -> list[str]:
        """The command line of a tiny run; `changed` fields have `__` for the dot."""
        fields = {**self.fields, **{name.replace("__", "."): v for name, v in changed.items()}}
        return [
            f"--config={self.config}",
            f"--workdir={workdir}",
            *(f"--config.{name}={value}" for name, value in fields.items()),
        ]

    @property
    def steps(self) -> list[tuple[str, int]]:
        """(stage, step) of every record; a stage that evaluates has one of its start."""
        return [
            (name, i)
            for name, n in self.stages
            for i in range(0 if name != "self_play" else 1, n + 1)
        ]

    def start(self, command: list[str], **options) -> subprocess.Popen:
        return subprocess.Popen(
            [sys.executable, *command],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            **options,
        )

    def run(self, workdir: Path, *flags: str, **changed) -> subprocess.CompletedProcess:
        """The command line as a process of its own, to its end."""
        command = ["-m", "jaxconv.launch", *self.arguments(workdir, **changed), *flags]
        return subprocess.run(
            [sys.executable, *command], capture_output=True, text=True, timeout=600
        )

    def main(self, command: list[str]) -> int:
        """The command line in this process, whose devices may be in use already."""
        with mock.patch.dict(os.environ, {"JAX_NUM_CPU_DEVICES": "1"}):
            return launch.main(command)

    def interrupt(
        self, action: str, point: str, workdir: Path, **changed
    ) -> subprocess.CompletedProcess:
        """The same, ended at a point of the program; see `interrupted.py`."""
        command = [str(HERE / "interrupted.py"), action, point, *self.arguments(workdir, **changed)]
        return subprocess.run(
            [sys.executable, *command], capture_output=True, text=True, timeout=600
        )

    def killed(self, point: str, workdir: Path, **changed) -> None:
        ended = self.interrupt("SIGKILL", point, workdir, **changed)
        assert ended.returncode == -signal.SIGKILL, f"{point} was not reached\n{ended.stderr}"

    def outcome(self, workdir: Path) -> dict[str, Any]:
        """All that a run made and that has to be the same when it was interrupted."""
        records = metrics.read(Workdir(workdir, writer=False))
        report = json.loads((workdir / "report.json").read_text())
        text = (workdir / "report.md").read_text()
        return {
            **{name: (workdir / path).read_bytes() for name, path in self.files.items()},
            "metrics": [
                {k: v for k, v in r.items() if not re.match("time|speed/|memory/", k)}
                for r in records
            ],
            "status": report["status"],
            "results": report["results"],
            "baselines": report["baselines"],
            "notes": report["notes"],
            "told": text.partition(self.told[0])[2].partition(self.told[1])[0],
        }

    def assert_same_run(self, workdir: Path, whole: Path) -> None:
        found, expected = self.outcome(workdir), self.outcome(whole)
        assert found["told"].count("| before") >= 3  # texts are shown at all
        for name, value in expected.items():
            assert found[name] == value, name
        steps = [(record["stage"], record["step"]) for record in found["metrics"]]
        assert steps == self.steps


OMAR_FILES = {
    "policy": "export/model.safetensors",
    "critic": "export/value_head.safetensors",
    "frozen": "artifacts/warm_start/model.safetensors",
}
REPLIES = ("## Replies, before and after", "## Speed")


@pytest.fixture(scope="session")
def tiny() -> Recipe:
    return Recipe(
        "configs/omar.py",
        TINY,
        OMAR_FILES,
        ("## Transcripts", "## Speed"),
        (("warm_start", 6), ("self_play", 3)),
    )


@pytest.fixture(scope="session")
def sft() -> Recipe:
    files = {"policy": "export/model.safetensors"}
    return Recipe("configs/sft.py", SFT, files, REPLIES, (("sft", 9), ("control", 9)))


@pytest.fixture(scope="session")
def dpo() -> Recipe:
    files = {
        "policy": "export/model.safetensors",
        "start": "artifacts/start/model.safetensors",
        "reference": "artifacts/tokens/reference_dpo.npy",
    }
    return Recipe(
        "configs/dpo.py",
        DPO,
        files,
        REPLIES,
        (("sft", 4), ("dpo", 8), ("control", 8), ("control_opposite", 8)),
    )


def undisturbed(recipe: Recipe, workdir: Path) -> Path:
    done = recipe.run(workdir)
    assert done.returncode == 0, done.stderr
    return workdir


@pytest.fixture(scope="session")
def finished(tiny, tmp_path_factory) -> Path:
    """The workdir of an undisturbed run; not to be changed."""
    return undisturbed(tiny, tmp_path_factory.mktemp("omar") / "whole")


@pytest.fixture(scope="session")
def finished_sft(sft, tmp_path_factory) -> Path:
    return undisturbed(sft, tmp_path_factory.mktemp("sft") / "whole")


@pytest.fixture(scope="session")
def finished_dpo(dpo, tmp_path_factory) -> Path:
    return undisturbed(dpo, tmp_path_factory.mktemp("dpo") / "whole")


@pytest.fixture
def copy(finished, tmp_path) -> Path:
    """A finished workdir of the test's own."""
    return Path(shutil.copytree(finished, tmp_path / "run"))
