"""Supervised fine-tuning of an actor-critic: imitate the words, predict how the episode ended."""

import dataclasses
import functools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxconv.data.packing import TokenBatch, first_fit, microbatches, pack_tokens
from jaxconv.models.heads import ActorCritic
from jaxconv.objectives import masked
from jaxconv.objectives.metrics import Metrics
from jaxconv.objectives.sft import sft_loss
from jaxconv.train.actor_critic import evaluate_tokens


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
    used = -(-(int(packing.row.max()) + 1) // rows)
    return microbatches(batch, rows), used


def warm_start_loss(model: ActorCritic, batch: WarmStartBatch):
    """Negative log-likelihood of the own tokens plus half the squared error of the critic.

    The critic learns on a resting trunk, so the policy is what plain fine-tuning would make of it.
    """
    logprob, entropy, value = evaluate_tokens(model, batch.tokens, value_gradient=0.0)
    mask = batch.tokens.mask
    total, denominator, metrics = sft_loss(logprob, mask)
    error = masked.masked_sum(0.5 * jnp.square(value - batch.outcome), mask)
    sums = {
        **metrics.sums,
        "critic_loss": jax.lax.stop_gradient(error),
        "entropy": jax.lax.stop_gradient(masked.masked_sum(entropy, mask)),
    }
    return total + error, denominator, Metrics(sums)


@jax.jit
def evaluate(model: ActorCritic, batches: WarmStartBatch) -> dict[str, jax.Array]:
    """Mean losses over [M, R, W] packed rows, such as held-out conversations."""

    def body(_, batch):
        _, denominator, metrics = warm_start_loss(model, batch)
        return None, (denominator, metrics)

    _, (denominators, metrics) = jax.lax.scan(body, None, batches)
    return metrics.reduce().means(denominators.sum())


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
