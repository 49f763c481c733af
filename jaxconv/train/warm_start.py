"""Supervised fine-tuning of an actor-critic: imitate the words, predict how the episode ended."""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from jaxconv.data.batches import Update, as_update
from jaxconv.data.loader import Loader
from jaxconv.data.packing import Packing, TokenBatch, first_fit, microbatches, pack_tokens
from jaxconv.data.plan import Placement, plan_counted
from jaxconv.models.decoder import Decoder
from jaxconv.models.heads import ActorCritic
from jaxconv.models.lora import LoraConfig
from jaxconv.models.sharding import is_split, loosened
from jaxconv.objectives import masked
from jaxconv.objectives.metrics import Metrics
from jaxconv.objectives.sft import sft_loss
from jaxconv.perf.flops import stream_training_flops
from jaxconv.train.actor_critic import evaluate_tokens
from jaxconv.train.loop import Loop, LoopSettings
from jaxconv.train.mesh import ROWS, WHOLE, on, over_rows, place, share_of, share_whole
from jaxconv.train.state import TrainState
from jaxconv.train.supervised import Supervised
from jaxconv.train.trainable import join, merged, split
from jaxconv.train.update import add_up, make_update
from jaxconv.train.workdir import Workdir

_MULTIPLE = 4  # micro-batches of a batch come in multiples of this, so that few shapes are compiled


@dataclasses.dataclass(frozen=True)
class Example:
    """One agent's view of a finished conversation.

    Attributes:
        tokens: ids.
        own: for each token, whether the agent said it.
        outcome: its return, what the critic should say at its own tokens.
    """

    tokens: Sequence[int]
    own: Sequence[bool]
    outcome: float


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class WarmStartBatch:
    """Packed rows and the outcome at every token, float32 [..., W]."""

    tokens: TokenBatch
    outcome: jax.Array


def pack_examples(
    examples: Sequence[Example], *, width: int, rows: int, multiple: int
) -> tuple[WarmStartBatch, int]:
    """Packs examples into [micro-batches, rows, width]; also how many micro-batches are real."""
    packing = first_fit([len(e.tokens) for e in examples], width, rows_multiple=rows * multiple)
    return microbatches(_pack(examples, packing), rows), packing.used(rows)


def _pack(examples: Sequence[Example], packing: Packing) -> WarmStartBatch:
    return WarmStartBatch(
        tokens=pack_tokens(packing, [e.tokens for e in examples], [e.own for e in examples]),
        outcome=packing.scatter([np.full(len(e.tokens), e.outcome) for e in examples], np.float32),
    )


def warm_start_loss(
    trained: ActorCritic,
    batch: WarmStartBatch,
    resting: Decoder | None = None,
    *,
    value_gradient: float,
):
    """Negative log-likelihood of the own tokens plus half the squared error of the critic.

    `value_gradient` is the factor on the critic's gradient into the trunk. With 0 the policy is
    what plain fine-tuning would make of it; above, the trunk learns to read what an outcome depends
    on, which words alone do not ask of it.
    """
    model = join(trained, resting)
    logprob, entropy, value = evaluate_tokens(model, batch.tokens, value_gradient=value_gradient)
    mask = batch.tokens.mask
    total, denominator, metrics = sft_loss(logprob, mask)
    error = masked.masked_sum(0.5 * jnp.square(value - batch.outcome), mask)
    sums = {
        **metrics.sums,
        "critic_loss": jax.lax.stop_gradient(error),
        "entropy": jax.lax.stop_gradient(masked.masked_sum(entropy, mask)),
    }
    return total + error, denominator, Metrics(sums)


@functools.partial(jax.jit, static_argnames=("mesh",))
def evaluate(model: ActorCritic, batches: WarmStartBatch, *, mesh: Mesh) -> dict[str, jax.Array]:
    """Mean losses over [M, R, W] packed rows, such as held-out conversations."""

    def local(model, batches):
        def body(_, batch):
            _, denominator, metrics = warm_start_loss(model, batch, value_gradient=0.0)
            return None, (denominator, metrics)

        _, (denominators, metrics) = jax.lax.scan(body, None, batches)
        denominator, metrics = denominators.sum(), metrics.reduce()
        if not is_split(mesh):
            _, denominator, metrics = add_up({}, denominator, metrics)
        return metrics.means(denominator)

    with on(mesh):
        return over_rows(local, mesh, (WHOLE, ROWS), WHOLE)(model, batches)


@dataclasses.dataclass(frozen=True)
class WarmStart:
    """Sizes of the stage.

    Attributes:
        steps: updates.
        streams: examples an update.
        width, rows: of a packed micro-batch.
        evaluate_every: updates between held-out losses.
        checkpoint_every: updates between checkpoints.
        keep: checkpoints kept.
        seed: of the order of the examples.
        value_gradient: factor on the critic's gradient into the trunk.
    """

    steps: int
    streams: int
    width: int
    rows: int
    evaluate_every: int
    checkpoint_every: int
    keep: int
    seed: int
    value_gradient: float


def fit(
    model: ActorCritic,
    optimizer: optax.GradientTransformation,
    examples: Sequence[Example],
    held_out: Sequence[Example],
    sizes: WarmStart,
    workdir: Workdir,
    mesh: Mesh,
    rates: np.ndarray,
    lora: LoraConfig | None = None,
) -> ActorCritic:
    """Trains `model` on `examples`; goes on where a stopped or killed run was. `rates` are
    the learning rates of the updates, to log. With `lora` an adapter is trained and merged.

    Raises:
        Stopped: the run was asked to stop; its state is saved.
        Failed: loss or gradient are not finite; the checkpoint before stays.
    """
    loss = functools.partial(warm_start_loss, value_gradient=sizes.value_gradient)
    trained, resting = split(model, lora, jax.random.key(sizes.seed))
    state = TrainState.create(trained, optimizer, mesh=mesh)
    resting = place(resting, mesh)
    held_out_batch, _ = pack_examples(held_out, width=sizes.width, rows=sizes.rows, multiple=1)
    held_out_batch = share_whole(held_out_batch, mesh)
    placements = plan_counted(
        [len(e.tokens) for e in examples],
        examples=sizes.streams,
        rows_multiple=sizes.rows * _MULTIPLE,
        width=sizes.width,
        seed=sizes.seed,
        steps=sizes.steps,
    )

    share = share_of(mesh, sizes.rows)

    def assemble(placement: Placement) -> Update:
        records, packing = share.of(placement)
        batch = microbatches(_pack([examples[i] for i in records], packing), len(share.own))
        return as_update(batch, placement, sizes.rows, placement.packing.length)

    settings = LoopSettings(
        "warm_start",
        sizes.steps,
        checkpoint_every=sizes.checkpoint_every,
        keep=sizes.keep,
        evaluate_every=sizes.evaluate_every,
        headline=("nll",),
        dtype=model.decoder.config.dtype,
    )
    with Loader(placements, assemble) as loader:
        work = Supervised(
            make_update(loss, optimizer, mesh),
            lambda metrics, denominator: metrics.means(denominator),
            loader,
            mesh,
            constants=(resting,),
            evaluate=lambda trained: evaluate(join(trained, resting), held_out_batch, mesh=mesh),
            evaluated=sum(len(e.tokens) for e in held_out),
            flops=functools.partial(
                stream_training_flops, model.decoder.config, trains_weights=lora is None
            ),
            rates=rates,
        )
        model = Loop(work, state, settings, workdir).run().model
        return merged(loosened(model), loosened(resting))
