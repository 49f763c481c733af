"""The plan of an update's memory against the arrays and against the compiler."""

import jax
import numpy as np
import optax
import pytest

from jaxconv.data.batches import StreamBatch
from jaxconv.data.packing import TokenBatch
from jaxconv.models.lora import LoraConfig
from jaxconv.train.likelihood import sft_objective
from jaxconv.train.memory import Memory, announce, plan_memory
from jaxconv.train.mesh import data_mesh, replicate, share_rows
from jaxconv.train.optimizer import make_optimizer
from jaxconv.train.state import TrainState
from jaxconv.train.trainable import split
from jaxconv.train.update import make_update

LORA = LoraConfig(2, 4.0, ("q_proj", "down_proj"), dropout=0.1)


def nbytes(tree) -> int:
    return sum(x.nbytes for x in jax.tree.leaves(tree))


@pytest.fixture(params=["whole", "adapter"])
def problem(request, small_actor_critic):
    """(update, its arguments)"""
    lora = LORA if request.param == "adapter" else None
    mesh = data_mesh(2)
    trained, resting = split(small_actor_critic().decoder, lora, jax.random.key(0))
    optimizer = make_optimizer(
        optax.constant_schedule(0.1), b2=0.9, weight_decay=0.1, clip_norm=1.0
    )
    state = replicate(TrainState.create(trained, optimizer, ema=lora is None), mesh)
    cells = np.ones((3, 2, 16), np.int32)
    batch = StreamBatch(
        TokenBatch(cells, cells, cells, cells, cells > 0), np.ones((3, 2), np.uint32), None
    )
    update = make_update(sft_objective, optimizer, mesh, ema_decay=0.9)
    count = replicate(np.int32(3), mesh)
    return update, (state, share_rows(batch, mesh), count, replicate(resting, mesh))


def test_the_plan_is_the_size_of_the_arrays(problem):
    update, (state, batch, count, resting) = problem
    memory = plan_memory(update, state, batch, count, resting)
    weights = nbytes(state.model)
    assert memory.trained == (weights if state.ema is None else 2 * weights)
    assert memory.resting == nbytes(resting)
    assert (memory.resting > 10 * weights) == (resting is not None)
    # Two moments, and the counts of AdamW and of the schedule.
    assert memory.optimizer == nbytes(state.opt_state) == 2 * weights + 8
    assert memory.batch == nbytes(batch) == 3 * 2 * (16 * (4 * 4 + 1) + 4)
    # The logits of a micro-batch and the gradients, at least.
    assert memory.working > 2 * 16 * 40 * 4 + weights
    parts = (memory.trained, memory.resting, memory.optimizer, memory.batch, memory.working)
    assert memory.total == sum(parts)


def test_the_compiler_counts_the_same_arguments(problem):
    update, arguments = problem
    memory = plan_memory(update, *arguments)
    compiled = update.lower(*arguments).compile().memory_analysis()
    given = memory.total - memory.working + arguments[2].nbytes
    # Some versions of jax leave out the seeds of the dropout that a whole model does not have.
    seeds = 0 if arguments[3] is not None else 3 * 2 * 4
    assert compiled.argument_size_in_bytes in (given, given - seeds)
    # The state is changed in its place: what comes out besides it is small.
    assert compiled.output_size_in_bytes - compiled.alias_size_in_bytes < 1000


def test_the_first_update_does_not_compile_again(problem):
    update, (state, *rest) = problem
    compiled = []

    def listen(event: str, seconds: float, **about):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        announce(update, state, *rest)
        assert len(compiled) == 1
        for _ in range(2):
            state, _ = update(state, *rest)
        assert len(compiled) == 1
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def test_what_is_announced_says_it_in_units(problem, capsys):
    update, arguments = problem
    announce(update, *arguments)
    line = capsys.readouterr().out
    assert line.startswith("an update takes ") and line.count("\n") == 1
    assert ("of resting weights" in line) == (arguments[3] is not None)
    memory = Memory(3 << 30, 0, 5 << 20, 7 << 10, 123)
    assert str(memory) == (
        "an update takes 3.0 GiB of a device: 3.0 GiB of weights, "
        "5.0 MiB of optimizer state, 123 bytes of activations and gradients"
    )
    assert "7.0 KiB of resting weights" in str(Memory(1, 7 << 10, 1, 1, 1))
