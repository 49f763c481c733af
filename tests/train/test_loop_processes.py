"""The loop in two processes: no step waits for the one before it, and all stop after the same one.

Run as a program this is one of the processes; it prints what it found.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

STAGES = {"one_by_one": 0, "one_behind": 1}  # how many steps are dispatched ahead
ASKED = 7  # the step in which one process is asked to stop


def one_of(index: int, address: str, folder: Path) -> dict[str, dict]:
    """What process `index` of two finds, by stage."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import PartitionSpec

    from jaxconv import processes
    from jaxconv.errors import Stopped
    from jaxconv.train import clock, interrupt
    from jaxconv.train.loop import Loop, LoopSettings, Pending
    from jaxconv.train.mesh import ROWS, data_mesh, replicate, share_rows
    from jaxconv.train.state import TrainState
    from jaxconv.train.workdir import Workdir

    processes.join(address, 2, index)
    mesh = data_mesh(2)

    def local(w, rows):
        # A computation of some tenths of a second; whatever it comes to, a device adds one.
        start = jnp.full((640, 640), rows.sum())
        x = jax.lax.fori_loop(0, 6, lambda _, x: jnp.sin(x @ x), start)
        return w + jax.lax.psum(jnp.sign(x.max() ** 2 + 1), "data")

    whole = PartitionSpec()
    add = jax.shard_map(local, mesh=mesh, in_specs=(whole, ROWS), out_specs=whole, check_vma=False)

    @jax.jit
    def move(w, rows):
        w = add(w, rows)
        return w, jnp.isfinite(w)[None]

    class Walk:
        """Adds two a step."""

        def __init__(self):
            self.last, self.ahead, self.began, self.took = None, [], None, None

        def step(self, state, done, save):
            self.ahead.append(self.last is not None and not self.last.is_ready())
            if (index, done + 1) == (1, ASKED):
                os.kill(os.getpid(), signal.SIGTERM)
            w, finite = move(state.model, share_rows(np.ones((1, 1), "f4"), mesh))
            self.last = finite
            self.began = self.began or (time.monotonic(), clock.spent(clock.COMPILE))
            return TrainState(w, (), None), Pending({"loss": w}, finite, ["w"], tokens=1)

        def verdict(self, step, metrics):
            return None

        def snapshot(self):
            began, compiling = self.began
            compiling = clock.spent(clock.COMPILE) - compiling
            self.took = time.monotonic() - began - compiling
            return {}, {}

    def stopped(workdir, stage, ahead):
        walk, why = Walk(), None
        settings = LoopSettings(stage, steps=20, checkpoint_every=99, keep=1, ahead=ahead)
        state = TrainState(replicate(np.float32(0), mesh), (), None)
        before = clock.spent(clock.STEP, clock.DATA)
        try:
            with interrupt.catching():
                Loop(walk, state, settings, workdir).run()
        except Stopped as stop:
            why = str(stop)
        return {
            "why": why,
            "ahead": walk.ahead,
            "took": walk.took,
            "spent": clock.spent(clock.STEP, clock.DATA) - before,
            "saved": [path.name for path in (folder / "checkpoints" / stage).iterdir()],
        }

    with Workdir(folder, writer=index == 0, process=index) as workdir:
        clock.begin(workdir)
        return {stage: stopped(workdir, stage, ahead) for stage, ahead in STAGES.items()}


def run(folder: Path) -> list[dict[str, dict]]:
    folder.mkdir()
    (folder / "config.json").write_text("{}")  # by which the second process knows it
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "1",
        "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
    }
    started = [
        subprocess.Popen(
            [sys.executable, __file__, str(index), address, str(folder)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
    said = [process.communicate(timeout=60) for process in started]
    assert [process.returncode for process in started] == [0, 0], said
    return [json.loads(out.splitlines()[-1]) for out, _ in said]


def test_processes_stop_after_the_same_step_without_waiting_for_each(tmp_path):
    """One of them is asked to stop in the middle of a stage."""
    found = run(tmp_path / "run")
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    for stage, ahead in STAGES.items():
        stop = ASKED + ahead  # that was under way when the numbers of step ASKED were there
        for one in [process[stage] for process in found]:
            assert one["why"] == f"{stage.replace('_', '-')} stopped after step {stop} of 20"
            assert one["saved"] == [str(stop)]
            # Nearly always a step is begun when the one before it is not over.
            assert sum(one["ahead"]) > stop / 2 if ahead else not any(one["ahead"])
            assert one["spent"] > 0.9 * one["took"]
        steps = [r for r in records if r["stage"] == stage]
        numbers = [(r["step"], r["loss"]) for r in steps]
        assert numbers == [(i, 2.0 * i) for i in range(1, stop + 1)]
        told = sum(r["time/step_s"] for r in steps)
        assert told == pytest.approx(found[0][stage]["spent"], rel=0.05)


if __name__ == "__main__":
    index, address, folder = sys.argv[1:]
    print(json.dumps(one_of(int(index), address, Path(folder))))
