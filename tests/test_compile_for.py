"""`--compile_for`: exit statuses, the report, and that nothing of a run is overwritten."""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from jaxconv import compile_for, launch
from jaxconv.perf import chips, planned
from jaxconv.perf.compiling import Compilation
from jaxconv.perf.hlo import Cost, Work
from jaxconv.perf.memory import Buffer, Memory, Shortage
from jaxconv.perf.roofline import estimate
from jaxconv.perf.table import Program
from jaxconv.train.workdir import Workdir

GIB = 1 << 30
SFT = "--config=configs/sft.py"


@pytest.fixture(autouse=True)
def _own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in compile_for._ENVIRONMENT:
        monkeypatch.setenv(name, os.environ.get(name, ""))


@dataclasses.dataclass
class Device:
    device_kind: str = "TPU v5 lite"


@pytest.fixture
def compiler(monkeypatch):
    """compiler(temporaries, shortage): stands in for libtpu."""

    def set_up(temporaries: int, shortage: Shortage | None = None) -> None:
        def compile_all(plans, topology):
            work = Work("fusion", "mlp", flops=197e12, dtype="bf16", bytes=0, times=1)
            cost = Cost((work,), (), ())
            memory = Memory(3 * GIB, 2 * GIB, 2 * GIB, temporaries, 0)
            buffer = Buffer("fusion", "f32[8,4096]", "temporary", 5 * GIB, "softmax")
            places = [(0, i, j) for i in range(2) for j in range(2)]
            seconds = estimate(cost, topology, places)
            done = Compilation(cost, memory, shortage, (buffer,), 1.0)
            return [Program(plan.name, done, seconds) for plan in plans]

        monkeypatch.setattr(planned, "compile_all", compile_all)
        monkeypatch.setattr(
            chips, "describe", lambda topology: type("D", (), {"devices": [Device()] * 4})
        )
        monkeypatch.setattr("jaxconv.recipes.sft.planned", lambda config, devices: [step(config)])
        monkeypatch.setattr("importlib.metadata.version", lambda package: "0")

    def step(config):
        assert config.model.kernels == "tpu"
        return planned.Planned(
            "train step", None, None, 1.0, 1.0, lambda resident, available: "use less of it"
        )

    return set_up


def run(capsys, *arguments):
    status = launch.main([SFT, *arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_an_unknown_topology_is_refused_with_those_that_there_are(capsys):
    status, _, err = run(capsys, "--compile_for=v9:2x2")
    assert status == 2
    assert "--compile_for: topology is 'v9:2x2'" in err and "v4, v5e, v5p, v6e, tpu7x" in err
    assert not Path("runs").exists()


def test_several_slices_are_refused(capsys):
    status, _, err = run(capsys, "--compile_for=2xv5e:2x2")
    assert status == 2 and "lies in one slice" in err


def test_without_libtpu_the_extra_is_named(capsys, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "libtpu" else found(name)
    )
    status, _, err = run(capsys, "--compile_for=v5e:2x2")
    assert status == 2 and "jaxconv[tpu-aot]" in err
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--eval_only"], "--compile_for excludes --eval_only"),
        (["--config.model.kernels=gpu"], "config.model.kernels='gpu'; with --compile_for"),
    ],
)
def test_what_does_not_go_with_it_is_refused(capsys, arguments, text):
    status, _, err = run(capsys, "--compile_for=v5e:2x2", *arguments)
    assert status == 2 and text in err


def test_what_fits_is_done_and_reported(capsys, compiler):
    compiler(4 * GIB)
    status, out, _ = run(capsys, "--compile_for=v5e:2x2")
    assert status == 0 and "peak, of 15.8 GiB" in out and "no device has confirmed" in out
    report = json.loads(Path("runs/sft-tiny-v5e-2x2/report.json").read_text())
    assert report["status"] == "done" and report["recipe"] == "sft"
    assert report["devices"] == {"TPU v5 lite": 4}
    assert report["compile_for"]["topology"] == "v5e:2x2"
    assert report["compile_for"]["programs"]["train step"]["memory"]["peak"] == 7 * GIB


def test_what_does_not_fit_fails_with_its_largest_buffers_and_one_suggestion(capsys, compiler):
    compiler(14 * GIB, Shortage(17 * GIB, 15 * GIB))
    status, out, _ = run(capsys, "--compile_for=v5e:2x2")
    assert status == 1
    assert "temporary f32[8,4096] of 5.0 GiB: softmax" in out
    assert out.count("does not fit: use less of it") == 1
    assert json.loads(Path("runs/sft-tiny-v5e-2x2/report.json").read_text())["status"] == "failed"


def test_a_run_is_not_overwritten_and_does_not_take_a_compilation_for_its_end(capsys, compiler):
    compiler(4 * GIB)
    with Workdir("mine") as workdir:
        workdir.write_identity({"recipe": "sft"}, preset="tiny")
    status, _, err = run(capsys, "--compile_for=v5e:2x2", "--workdir=mine")
    assert status == 2 and "holds a run" in err
    for _ in range(2):  # again is welcome
        assert run(capsys, "--compile_for=v5e:2x2", "--workdir=plan")[0] == 0
    status, _, err = run(capsys, "--workdir=plan")
    assert status == 2 and "compile_for" in err


def test_a_plan_that_leaves_devices_idle_is_refused(capsys, monkeypatch):
    import jax

    devices = [type("D", (), {"process_index": 0, "id": i}) for i in range(16)]
    monkeypatch.setattr(chips, "describe", lambda topology: type("T", (), {"devices": devices}))
    eight = jax.sharding.AbstractMesh((8,), ("data",))
    monkeypatch.setattr("jaxconv.train.fine_tuning.training_mesh", lambda *_: eight)
    status, _, err = run(capsys, "--compile_for=v5e:4x4")
    assert status == 2
    assert "config.batch.rows=8 leaves 8 of 16 devices idle" in err and "multiple of 16" in err
    assert not Path("runs/sft-tiny-v5e-4x4/report.json").exists()


def compile_really(*arguments):
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed (extra tpu-aot): nothing compiles for TPUs")
    command = [sys.executable, "-m", "jaxconv.launch", *arguments, "--workdir=plan"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200)
    report = Path("plan/report.json")
    return done, json.loads(report.read_text()) if report.exists() else None


@pytest.mark.slow
def test_a_small_run_compiles_for_a_real_topology():
    sizes = ("num_layers=1", "vocab_size=320")
    done, report = compile_really(
        SFT, "--compile_for=v5e:2x2", *(f"--config.model.{size}" for size in sizes)
    )
    assert done.returncode == 0, done.stderr
    program = report["compile_for"]["programs"]["train step"]
    assert program["fits"] and report["compile_for"]["devices"] == 4
    # Weights and two moments, on every device; small arrays are padded.
    parameters = 320 * 64 + 64 * (4 * 64 + 3 * 192) + 3 * 64
    state = 3 * 4 * parameters
    assert state < program["memory"]["arguments"] < 1.6 * state
    # The devices add their gradients up once, among them those of all weights.
    (added,) = [c for c in program["collectives"] if c["bytes"] > 1000]
    assert added["axes"] == ["data"] and added["times"] == 1
    assert 4 * parameters <= added["bytes"] < 4.1 * parameters
    assert any("splash_mha" in line for line in program["assumptions"])


@pytest.mark.slow
def test_a_large_run_does_not_fit_a_small_topology():
    done, report = compile_really(
        f"{SFT}:qwen3_4b", "--compile_for=v5e:2x2", "--config.batch.rows=4"
    )
    assert done.returncode == 1, done.stderr
    assert "use a larger mesh" in done.stdout
    assert not report["compile_for"]["programs"]["train step"]["fits"]
