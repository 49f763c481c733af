"""Self-play that trains an adapter: the base rests, is the reference, and is exported merged."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

ADAPTER = {"lora__rank": 2, "lora__targets": "('q_proj','down_proj')"}


@pytest.fixture(scope="module")
def adapted(tiny, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("omar_lora") / "run"
    done = tiny.run(workdir, **ADAPTER)
    assert done.returncode == 0, done.stderr
    return workdir, done.stdout


@pytest.mark.slow
def test_the_export_differs_from_the_start_in_the_targets_alone(adapted):
    workdir, _ = adapted
    start = load_file(workdir / "artifacts" / "warm_start" / "model.safetensors")
    export = load_file(workdir / "export" / "model.safetensors")
    moved = {name for name in start if not np.array_equal(start[name], export[name])}
    assert moved == {name for name in start if "q_proj" in name or "down_proj" in name}
    # The warm start trained an adapter too, over the random weights.
    assert json.loads((workdir / "report.json").read_text())["status"] == "done"


@pytest.mark.slow
def test_memory_and_checkpoints_are_those_of_an_adapter(adapted):
    workdir, said = adapted
    lines = [line for line in said.splitlines() if line.startswith("an update takes")]
    assert len(lines) == 2 and all("of resting weights" in line for line in lines)
    saved = [p.read_text() for p in workdir.glob("checkpoints/self_play/*/arrays/_METADATA")]
    assert saved and all("q_proj" in text and "embed" not in text for text in saved)


@pytest.mark.slow
def test_an_adapter_run_resumes_bit_for_bit(tiny, adapted, tmp_path):
    whole, _ = adapted
    workdir = tmp_path / "run"
    tiny.killed("jaxconv.train.ppo:PPO.iterate:2+", workdir, **ADAPTER)
    done = tiny.run(workdir, **ADAPTER)
    assert done.returncode == 0, done.stderr
    assert tiny.outcome(workdir)["policy"] == tiny.outcome(whole)["policy"]
