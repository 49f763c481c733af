"""Log-probs, entropies and values of packed tokens under an actor-critic."""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxconv_kernels import linear_logprob

from jaxconv.data.packing import TokenBatch
from jaxconv.models.heads import ActorCritic
from jaxconv.models.sharding import reshape_like
from jaxconv.train.mesh import ROWS, WHOLE, on, over_rows


def evaluate_tokens(
    model: ActorCritic,
    batch: TokenBatch,
    *,
    temperature: float = 1.0,
    value_gradient: float = 1.0,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What the model thinks of each target, given everything before it in its stream.

    Args:
        model: policy and critic on one trunk.
        batch: packed rows [R, W].
        temperature: of the distribution; that of the sampler when its tokens are judged.
        value_gradient: factor on the critic's gradient into the trunk. A critic that is far off
            would otherwise spoil the policy that it shares the trunk with.

    Returns:
        (log-prob of the target, entropy, value before the target), each float32 [R, W].
    """
    hidden_RWD = model.decoder(batch.tokens, batch.positions, batch.segment_ids)
    with jax.named_scope("head"):
        logprob, entropy = linear_logprob(
            hidden_RWD.reshape(-1, hidden_RWD.shape[-1]),
            model.decoder.head(),
            batch.targets.reshape(-1),
            temperature=temperature,
            softcap=model.decoder.config.final_softcap,
        )
    resting = jax.lax.stop_gradient(hidden_RWD)
    value = model.value_head(resting + value_gradient * (hidden_RWD - resting))
    return reshape_like(logprob, value), reshape_like(entropy, value), value


@functools.partial(jax.jit, static_argnames=("temperature", "mesh"))
def score(
    model: ActorCritic, batches: TokenBatch, count: jax.Array, *, temperature: float, mesh: Mesh
) -> tuple[jax.Array, jax.Array]:
    """Log-probs of the targets and values, float32 [M, R, W], of the first `count` micro-batches.

    What lies behind them stays 0 and costs nothing. Rows are shared out over the mesh.
    """

    def local(model, batches, count):
        def body(i, carry):
            logprobs, values = carry
            batch = jax.tree.map(
                lambda x: jax.lax.dynamic_index_in_dim(x, i, keepdims=False), batches
            )
            logprob, _, value = evaluate_tokens(model, batch, temperature=temperature)
            return logprobs.at[i].set(logprob), values.at[i].set(value)

        zeros = jnp.zeros_like(batches.tokens, jnp.float32)
        return jax.lax.fori_loop(0, count, body, (zeros, zeros))

    with on(mesh):
        return over_rows(local, mesh, (WHOLE, ROWS, WHOLE), ROWS)(model, batches, count)
