"""Supervised fine-tuning of an actor-critic: imitate the words, predict how the episode ended."""

import dataclasses
import functools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from jaxconv.data.packing import TokenBatch, first_fit, microbatches, pack_tokens
from jaxconv.errors import Failed, Stopped
from jaxconv.models.heads import ActorCritic
from jaxconv.objectives import masked
from jaxconv.objectives.metrics import Metrics
from jaxconv.objectives.sft import sft_loss
from jaxconv.train import interrupt
from jaxconv.train.actor_critic import evaluate_tokens
from jaxconv.train.checkpoint import Checkpoints
from jaxconv.train.mesh import ROWS, WHOLE, data_mesh, replicate, share_rows
from jaxconv.train.metrics import MetricsWriter
from jaxconv.train.progress import Progress
from jaxconv.train.state import TrainState
from jaxconv.train.update import add_up, make_update
from jaxconv.train.workdir import Workdir


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
    batch = WarmStartBatch(
        tokens=pack_tokens(packing, [e.tokens for e in examples], [e.own for e in examples]),
        outcome=packing.scatter([np.full(len(e.tokens), e.outcome) for e in examples], np.float32),
    )
    return microbatches(batch, rows), packing.used(rows)


def warm_start_loss(model: ActorCritic, batch: WarmStartBatch, *, value_gradient: float):
    """Negative log-likelihood of the own tokens plus half the squared error of the critic.

    `value_gradient` is the factor on the critic's gradient into the trunk. With 0 the policy is
    what plain fine-tuning would make of it; above, the trunk learns to read what an outcome depends
    on, which words alone do not ask of it.
    """
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
        _, denominator, metrics = add_up({}, denominators.sum(), metrics.reduce())
        return metrics.means(denominator)

    return jax.shard_map(
        local, mesh=mesh, in_specs=(WHOLE, ROWS), out_specs=WHOLE, check_vma=False
    )(model, batches)


def minibatch(examples: Sequence[Example], step: int, size: int, seed: int) -> Iterator[Example]:
    """The `size` examples of update `step`: a new order every epoch, every example once in each.

    A function of the step alone, so a resumed run sees what an undisturbed one does.
    """
    for place in range(step * size, (step + 1) * size):
        epoch, index = divmod(place, len(examples))
        yield examples[_order(len(examples), seed, epoch)[index]]


@functools.lru_cache(maxsize=2)
def _order(n: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(n)


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
) -> ActorCritic:
    """Trains `model` on `examples`; goes on where a stopped or killed run was.

    Raises:
        Stopped: the run was asked to stop; its state is saved.
        Failed: loss or gradient are not finite; the checkpoint before stays.
    """
    mesh = data_mesh(sizes.rows)
    loss = functools.partial(warm_start_loss, value_gradient=sizes.value_gradient)
    update = make_update(loss, optimizer, mesh)
    state = TrainState.create(replicate(model, mesh), optimizer)
    held_out_batch, _ = pack_examples(held_out, width=sizes.width, rows=sizes.rows, multiple=1)
    held_out_batch = share_rows(held_out_batch, mesh)
    with Checkpoints(workdir.checkpoints / "warm_start", keep=sizes.keep) as checkpoints:
        start = checkpoints.latest() or 0
        if start:
            state, _ = checkpoints.restore(start, state)
        with (
            MetricsWriter(workdir, "warm_start", resume_at=start) as writer,
            Progress(workdir, "warm_start", sizes.steps, start=start) as progress,
        ):
            for step in range(start + 1, sizes.steps + 1):
                chosen = list(minibatch(examples, step - 1, sizes.streams, sizes.seed))
                batch, count = pack_examples(chosen, width=sizes.width, rows=sizes.rows, multiple=4)
                state, denominator, merged = update(state, share_rows(batch, mesh), np.int32(count))
                metrics = merged.means(denominator)
                if step % sizes.evaluate_every == 0 or step == sizes.steps:
                    held = evaluate(state.model, held_out_batch, mesh=mesh)
                    metrics |= {f"held_out/{name}": value for name, value in held.items()}
                metrics = {name: float(value) for name, value in jax.device_get(metrics).items()}
                if not np.isfinite([metrics["nll"], metrics["gradient_norm"]]).all():
                    raise Failed(
                        f"warm-start step {step}: the loss is {metrics['nll']} and the gradient "
                        f"norm {metrics['gradient_norm']}; the learning rate may be too high"
                    )
                writer.write(step, metrics)
                progress.update(
                    step, {"loss": metrics["nll"]}, tokens=sum(len(e.tokens) for e in chosen)
                )
                stop = interrupt.requested()
                if stop or step % sizes.checkpoint_every == 0 or step == sizes.steps:
                    checkpoints.save(step, state, {})
                if stop:
                    checkpoints.wait()
                    raise Stopped(f"warm start stopped after step {step} of {sizes.steps}")
    return state.model
