"""Runs whose workdir is in a bucket: killed and resumed without a copy, and by two machines."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from jaxconv import storage

HERE = Path(__file__).parent
RUN = f"""
import sys
sys.path[:0] = [{str(HERE)!r}, {str(HERE.parent)!r}]
import interrupted, object_store
object_store.register()
if sys.argv[1]:
    interrupted.intercept("SIGKILL", sys.argv[1])
sys.exit(interrupted.launch.main(sys.argv[2:]))
"""


SAVE = "jaxconv.train.checkpoint:Checkpoints.save"
POINTS = {
    # While a checkpoint is written; and in the second stage.
    "sft": (f"{SAVE}:3+", "jaxconv.train.supervised:Supervised.step:9+"),
    # While conversations are under way, of which each process keeps its own.
    "omar": ("jaxconv.train.local_arrays:save:3+",),
}
# A rollout of a fast machine is over before it is time to save it; so it is saved every burst.
CHANGED = {"sft": {}, "omar": {"checkpoint__rollout_seconds": 1e-6}}


@pytest.mark.slow
@pytest.mark.parametrize("name", POINTS)
def test_a_killed_run_goes_on_from_the_bucket(name, request, tmp_path, monkeypatch):
    recipe = request.getfixturevalue({"sft": "sft", "omar": "tiny"}[name])
    whole = request.getfixturevalue({"sft": "finished_sft", "omar": "finished"}[name])
    monkeypatch.syspath_prepend(str(HERE.parent))
    import object_store

    scratch = tmp_path / "scratch"
    monkeypatch.setenv("JAXCONV_SCRATCH", str(scratch))
    url = "gs://bucket/runs/one"
    with object_store.serving() as (objects, environment):

        def run(point=""):
            arguments = recipe.arguments(url, **CHANGED[name])
            command = [sys.executable, "-c", RUN, point, *arguments]
            return subprocess.run(
                command,
                capture_output=True,
                text=True,
                env=os.environ | environment,
                timeout=600,
            )

        for point in POINTS[name]:
            killed = run(point)
            assert killed.returncode == -signal.SIGKILL, killed.stderr
            shutil.rmtree(scratch)
        done = run()
        assert done.returncode == 0, done.stderr
        assert f"report: {url}/report.md" in done.stdout
        place = storage.local_place(url)
        recipe.assert_same_run(place, whole)
        for file in ("report.json", "metrics.jsonl", "export/model.safetensors"):
            assert objects.content[f"bucket/runs/one/{file}"][0] == (place / file).read_bytes()
        again = run()
        assert again.returncode == 0 and "done" in again.stdout


@pytest.mark.slow
def test_two_processes_have_nothing_but_the_bucket_in_common(sft, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(HERE.parent))
    import object_store

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = "gs://bucket/runs/sft"
    with object_store.serving() as (objects, environment):
        processes = [
            subprocess.Popen(
                [
                    *(sys.executable, "-c", RUN, ""),
                    *sft.arguments(url, control__exchanged=False),
                    *("--distributed", f"--coordinator=127.0.0.1:{port}"),
                    *("--process_count=2", f"--process_index={i}"),
                ],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                env=os.environ
                | environment
                | {
                    "JAXCONV_SCRATCH": str(tmp_path / str(i)),
                    "JAX_NUM_CPU_DEVICES": "1",
                    "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
                },
            )
            for i in range(2)
        ]
        ends = [process.communicate(timeout=600) for process in processes]
        assert [process.returncode for process in processes] == [0, 0], ends

        def stored(name):
            return objects.content[f"bucket/runs/sft/{name}"][0].decode()

        assert json.loads(stored("report.json"))["status"] == "done"
        assert "bucket/runs/sft/export/model.safetensors" in objects.names()
        assert not list((tmp_path / "1").glob("*/export"))  # which process 1 does not read
        steps = [json.loads(line)["step"] for line in stored("metrics.jsonl").splitlines()]
        assert steps == list(range(10))
        last = [n for n in objects.names() if "/checkpoints/sft/9/arrays/ocdbt.process_" in n]
        # Each has written its own part of the checkpoint.
        assert {n.split("ocdbt.process_")[1][0] for n in last} == {"0", "1"}
