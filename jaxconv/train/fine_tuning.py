"""One stage of fine-tuning as a config describes it: a model, an objective and tokenised examples.

A config has these sections: `batch` (packed rows of an update), `lora`, `checkpoint`, `profile`,
and one for the stage itself (rate, optimizer, length), which is named when it is run.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
import optax
from ml_collections import ConfigDict

from jaxconv.data.batches import Assembler, batch_shapes
from jaxconv.data.loader import Loader
from jaxconv.data.plan import plan
from jaxconv.data.token_store import TokenStore
from jaxconv.errors import Refused
from jaxconv.models.config import EXECUTION, DecoderConfig
from jaxconv.models.decoder import Decoder
from jaxconv.models.sharding import loosened
from jaxconv.perf.flops import (
    forward_flops,
    splash_flops,
    stream_flops,
    stream_training_flops,
    training_flops,
)
from jaxconv.perf.memory import suggestion
from jaxconv.perf.planned import Planned, bytes_on_a_device
from jaxconv.train import checks
from jaxconv.train.loop import Loop, LoopSettings, Outcome
from jaxconv.train.mesh import (
    check_section,
    parts,
    place,
    placed,
    placed_rows,
    refuse_idle,
    share_of,
    training_mesh,
)
from jaxconv.train.optimizer import OPTIMIZERS, SCHEDULES, make_optimizer, make_schedule, rates
from jaxconv.train.profiling import parse_steps
from jaxconv.train.starting_point import small_decoder
from jaxconv.train.state import TrainState
from jaxconv.train.supervised import Supervised
from jaxconv.train.trainable import lora_config, split
from jaxconv.train.update import Loss, make_update
from jaxconv.train.workdir import Workdir


def check(config: ConfigDict, *stages: str) -> None:
    """Refuses what cannot work in the sections above, before any work is done."""
    checks.at_least(
        config,
        {
            "seed": 0,
            "model.vocab_size": 261,
            "model.embed_dim": 1,
            "model.num_layers": 1,
            "model.num_heads": 1,
            "model.num_kv_heads": 1,
            "model.mlp_dim": 1,
            "lora.rank": 0,
            "batch.rows": 1,
            "batch.microbatches": 1,
            "batch.width": 8,
            "checkpoint.every": 1,
            "checkpoint.keep": 1,
        },
    )
    if config.model.path:
        checks.one_of(config, {f"model.{name}": known for name, known in EXECUTION.items()})
    elif config.model.embed_dim % (2 * config.model.num_heads):
        raise Refused(
            f"config.model.num_heads={config.model.num_heads}; "
            f"it must divide half of config.model.embed_dim={config.model.embed_dim}"
        )
    else:
        checks.naming("config.model.", lambda: small_decoder(config, config.batch.width))
    checks.naming("config.lora: ", lambda: lora_config(config))
    parse_steps(config.profile.steps)
    check_section(config)
    for stage in stages:
        least = {"epochs": 0, "steps": 0, "warmup": 0, "weight_decay": 0, "evaluate_every": 1}
        checks.at_least(config, {f"{stage}.{name}": value for name, value in least.items()})
        checks.positive(config, (f"{stage}.learning_rate", f"{stage}.clip_norm"))
        checks.below_one(config, (f"{stage}.b2", f"{stage}.ema_decay"))
        checks.one_of(config, {f"{stage}.schedule": SCHEDULES, f"{stage}.optimizer": OPTIMIZERS})
        if not config[stage].epochs and not config[stage].steps:
            raise Refused(
                f"config.{stage}.epochs=0 and config.{stage}.steps=0; one must be at least 1"
            )


def fit(
    config: ConfigDict,
    stage: str,
    workdir: Workdir,
    name: str,
    model: Decoder,
    store: TokenStore,
    *,
    objective: Loss,
    finish: Callable[..., Mapping[str, jax.Array]],
    evaluate: Callable[[Any, Any], Mapping[str, float]],
    best: str,
    headline: tuple[str, ...],
    reference: np.ndarray | None = None,
    constants: tuple[Any, ...] = (),
    evaluated: int,
    live_reference: bool = False,
) -> tuple[Outcome, Decoder | None]:
    """Trains a model on the examples of a store; goes on where a stopped or killed run was.

    Args:
        config: with the sections above.
        stage: the section of this stage.
        workdir: of the run.
        name: of the stage in checkpoints and metrics.
        model: to start from; it is used up.
        store: the examples.
        objective: (trained, batch, resting, *constants) to (sum, denominator, metrics).
        finish: (merged metrics, denominator) to scalars by name.
        evaluate: (trained, resting) to held-out numbers.
        best: which of them the kept weights have lowest, where `keep_best` asks for it.
        headline: metrics to show.
        reference: float32 [n, streams], log-probs of the examples under a reference model.
        constants: what the objective reads besides.
        evaluated: tokens that `evaluate` scores.
        live_reference: whether the objective scores each example under a reference model, too.

    Returns:
        (outcome, resting): the weights that came out of the stage, and the base that they belong
        to when they are an adapter's.
    """
    s, b = config[stage], config.batch
    placements = plan(
        store.lengths,
        rows=b.rows * b.microbatches,
        width=b.width,
        seed=config.seed,
        steps=s.steps or None,
        epochs=None if s.steps else s.epochs,
        pack=b.packing,
    )
    steps = len(placements)
    optimizer, schedule = stage_optimizer(config, stage, steps)
    mesh = training_mesh(config, b.rows)
    architecture = model.config
    trained, resting = split(model, lora_config(config), jax.random.key(config.seed))
    state = TrainState.create(trained, optimizer, ema=s.ema_decay > 0, mesh=mesh)
    resting, constants = place((resting, constants), mesh)
    share = share_of(mesh, b.rows)
    assemble = Assembler(store, share, seed=config.seed, reference=reference)
    settings = LoopSettings(
        name,
        steps,
        checkpoint_every=config.checkpoint.every,
        keep=config.checkpoint.keep,
        evaluate_every=s.evaluate_every,
        best=f"held_out/{best}" if s.keep_best else "",
        headline=headline,
        profile=parse_steps(config.profile.steps),
        dtype=architecture.dtype,
    )

    def flops(lengths: np.ndarray) -> float:
        training = stream_training_flops(architecture, lengths, trains_weights=not config.lora.rank)
        return training + live_reference * stream_flops(architecture, lengths)

    with Loader(placements, assemble) as loader:
        work = Supervised(
            make_update(objective, optimizer, mesh, ema_decay=s.ema_decay),
            finish,
            loader,
            mesh,
            constants=(resting, *constants),
            evaluate=lambda trained: evaluate(trained, resting),
            evaluated=evaluated,
            flops=flops,
            rates=rates(schedule, steps),
        )
        outcome = Loop(work, state, settings, workdir).run()
        return dataclasses.replace(outcome, model=loosened(outcome.model)), loosened(resting)


def stage_optimizer(
    config: ConfigDict, stage: str, steps: int
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """The optimizer of a stage of so many updates, and its learning rate by update."""
    s = config[stage]
    # Of a short stage the warm-up must leave something.
    warmup = min(s.warmup, steps // 10)
    schedule = make_schedule(s.learning_rate, kind=s.schedule, steps=steps, warmup=warmup)
    optimizer = make_optimizer(
        schedule,
        kind=s.optimizer,
        b2=s.b2,
        weight_decay=s.weight_decay,
        clip_norm=s.clip_norm,
    )
    return optimizer, schedule


def planned_update(
    config: ConfigDict,
    stage: str,
    decoder: DecoderConfig,
    devices: Sequence[jax.Device],
    *,
    objective: Loss,
    scored: bool = False,
    live: bool = False,
) -> Planned:
    """The update that `fit` runs on these devices, its arguments shapes alone.

    Args:
        config, stage, objective: as of `fit`.
        decoder: of the model to start from.
        devices: of all processes.
        scored: whether batches bring log-probs under a reference model.
        live: whether the objective reads a reference model: the base of an adapter, or else a
            second copy of the start among its constants.
    """
    s, b = config[stage], config.batch
    mesh = training_mesh(config, b.rows, devices)
    refuse_idle(mesh, devices, "batch.rows", b.rows)
    optimizer, _ = stage_optimizer(config, stage, s.steps or 1000)
    lora = lora_config(config)

    def start(key):
        model = Decoder(decoder, key)
        return split(model, lora, key), (model,) if live and lora is None else ()

    (trained, resting), constants = jax.eval_shape(start, jax.random.key(config.seed))
    update = make_update(objective, optimizer, mesh, ema_decay=s.ema_decay)
    arguments = (
        TrainState.shapes(trained, optimizer, mesh, ema=s.ema_decay > 0),
        placed_rows(batch_shapes(b.microbatches, b.rows, b.width, scored=scored), mesh),
        *placed((np.int32(0), resting, *constants), mesh),
    )
    rows = b.rows * b.microbatches
    flops = training_flops(decoder, rows, b.width, trains_weights=lora is None)
    return Planned(
        "train step",
        lambda: update.lower(*arguments),
        mesh,
        tokens=rows * b.width,
        model_flops=flops + live * forward_flops(decoder, rows, b.width),
        relief=partial(suggestion, remat=decoder.remat, microbatch=b.rows // parts(mesh)),
        trips={"": b.microbatches},
        # Every axis of the mesh shares out either rows or heads.
        kernels=splash_flops(decoder, b.rows / mesh.size, b.width),
        arguments=bytes_on_a_device(arguments),
    )
