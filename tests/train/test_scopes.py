"""A profile of an update names its operations as the model's code does, and what the host did."""

import gzip
import json
import re

import jax
import numpy as np
import optax
import pytest

from jaxconv.data.batches import StreamBatch
from jaxconv.data.packing import TokenBatch
from jaxconv.train import clock
from jaxconv.train.likelihood import DPOObjective, sft_objective
from jaxconv.train.mesh import data_mesh, replicate, share_rows
from jaxconv.train.optimizer import make_optimizer
from jaxconv.train.profiling import Profiler
from jaxconv.train.state import TrainState
from jaxconv.train.update import make_update
from jaxconv.train.workdir import Workdir

DECODER = {"embed", "attention", "mlp", "norm", "head"}
UPDATE = {"gradients", "optimizer", "average", "finite"}


@pytest.fixture
def problem(small_actor_critic):
    """objective -> (update, its arguments)"""

    def make(objective):
        mesh = data_mesh(2)
        optimizer = make_optimizer(
            optax.constant_schedule(0.1), b2=0.9, weight_decay=0.1, clip_norm=1.0
        )
        state = TrainState.create(small_actor_critic().decoder, optimizer, ema=True)
        cells = np.ones((1, 2, 16), np.int32)
        batch = StreamBatch(
            TokenBatch(cells, cells, cells, cells, cells > 0),
            np.ones((1, 2), np.uint32),
            np.zeros((1, 2, 16), np.float32),
        )
        update = make_update(objective, optimizer, mesh, ema_decay=0.9)
        count = replicate(np.int32(1), mesh)
        return update, (replicate(state, mesh), share_rows(batch, mesh), count, None)

    return make


def scopes(text: str) -> set[str]:
    """Every name between the slashes and brackets of what operations are called."""
    names = set()
    for name in re.findall(r"jit\(update\)[\w()/.,>-]*", text):
        names |= set(re.findall(r"\w+", name))
    return names


@pytest.mark.parametrize(
    "objective, loss",
    [(sft_objective, "sft_loss"), (DPOObjective(0.1, "sigmoid"), "dpo_loss")],
    ids=["sft", "dpo"],
)
def test_the_compiled_update_has_the_scopes_of_the_model(problem, objective, loss):
    update, arguments = problem(objective)
    found = scopes(update.lower(*arguments).compile().as_text())
    assert found >= DECODER | UPDATE | {loss}


def test_a_trace_has_them_and_what_the_host_did(problem, tmp_path):
    update, arguments = problem(sft_objective)
    compiled = update.lower(*arguments).compile()  # which would fill the trace
    with Workdir(tmp_path / "run") as workdir:
        profiler = Profiler(workdir, "sft", range(1, 2))
        with profiler.step(1), clock.spending("step"):
            with clock.spending("data"):
                pass
            jax.block_until_ready(compiled(*arguments))
        [folder] = workdir.tensorboard.glob("sft/plugins/profile/*")
        [plane] = folder.glob("*.xplane.pb")
        assert scopes(plane.read_bytes().decode("latin-1")) >= DECODER | UPDATE | {"sft_loss"}
        [trace] = folder.glob("*.trace.json.gz")
        events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
        assert {"sft", "step", "data"} <= {event.get("name") for event in events}
