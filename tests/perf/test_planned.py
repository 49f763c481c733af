"""Programs of shapes alone against the arrays of a run, on eight fake CPU devices."""

import pytest

SAME_AS_LIVE = """
import json
import jax
jax.config.update("jax_num_cpu_devices", 8)
import numpy as np
from jaxconv.data.batches import batch_shapes
from jaxconv.models.decoder import Decoder
from jaxconv.perf.memory import memory_of
from jaxconv.perf.planned import bytes_on_a_device
from jaxconv.recipes import dpo, sft
from jaxconv.train import config as configs, fine_tuning
from jaxconv.train.mesh import place, share_rows
from jaxconv.train.starting_point import architecture
from jaxconv.train.state import TrainState
from jaxconv.train.trainable import lora_config, split

SMALL = ("batch.width=32", "model.vocab_size=320", "model.num_layers=1")
told = []
for recipe, *overrides in CASES:
    name = recipe.__name__.rpartition(".")[2]
    config = configs.load(f"configs/{name}.py:tiny").config
    configs.override(config, [f"--config.{field}" for field in (*SMALL, *overrides)])
    planned, *_ = recipe.planned(config, jax.devices())
    lowered = planned.lower()
    compiled = lowered.compile()
    memory = memory_of(compiled)
    mesh, key = planned.mesh, jax.random.key(0)

    # The same steps as a run takes, with arrays.
    model = jax.jit(Decoder, static_argnums=0)(architecture(config, config.batch.width), key)
    trained, resting = split(model, lora_config(config), key)
    optimizer, _ = fine_tuning.stage_optimizer(config, "train", 1000)
    ema = config.train.ema_decay
    state = TrainState.create(trained, optimizer, ema=ema > 0, mesh=mesh)
    live = config.get("dpo") and config.dpo.reference == "live"
    # What is donated is nobody else's.
    rest = place(jax.tree.map(lambda x: x.copy(), (resting, *((model,) if live else ()))), mesh)
    b = config.batch
    shapes = batch_shapes(
        b.microbatches, b.rows, b.width, scored=name == "dpo" and not live
    )
    batch = share_rows(jax.tree.map(lambda x: np.ones(x.shape, x.dtype), shapes), mesh)
    count = place(np.int32(b.microbatches), mesh)
    arguments = (state, batch, count, *rest)
    given = bytes_on_a_device(arguments)
    # The one number that Adafactor has in the place of a moment that it does without is not read.
    stand_ins = [x for x in jax.tree.leaves(state.opt_state) if x.shape == (1,)]
    given -= bytes_on_a_device(stand_ins)
    # Other things that nothing reads are left out by jax 0.12 and go in before.
    if memory.arguments != given and not config.lora.rank:
        given -= bytes_on_a_device(batch.dropout_seeds)
    donated = bytes_on_a_device(state) - bytes_on_a_device(stand_ins)
    out = compiled(*arguments)  # which takes them only where and as they were planned to be
    # A tuple of results is a table of pointers on a CPU.
    pointers = 8 * len(jax.tree.leaves(out))
    told.append([overrides, memory.arguments, given, memory.outputs, bytes_on_a_device(out),
                 pointers, memory.aliased, donated, planned.tokens])
print(json.dumps(told))
"""


def check(run_program, *cases):
    source = SAME_AS_LIVE.replace("CASES", f"({', '.join(cases)},)")
    for overrides, *numbers in run_program(source):
        arguments, given, outputs, given_out, pointers, aliased, donated, tokens = numbers
        assert arguments == given, overrides
        assert outputs - pointers == given_out, overrides
        assert aliased == donated, overrides
        assert tokens == 8 * 2 * 32


@pytest.mark.slow
def test_arguments_and_outputs_are_exactly_those_of_the_live_arrays(run_program):
    check(
        run_program,
        '(sft, "train.ema_decay=0.9")',
        '(dpo, "mesh.strategy=fsdp_tp", "mesh.tensor=2", "dpo.reference=live")',
    )


@pytest.mark.slow
def test_so_they_are_of_other_optimizers_and_of_adapters(run_program):
    check(
        run_program,
        '(sft, "mesh.strategy=fsdp", "train.optimizer=adafactor")',
        '(sft, "mesh.strategy=fsdp_tp", "mesh.tensor=2", "train.optimizer=muon")',
        '(sft, "mesh.strategy=fsdp_tp", "mesh.tensor=2", "mesh.data=2", "lora.rank=2")',
        '(dpo, "mesh.strategy=fsdp")',
    )
