"""`linear_logprob`: one call, whole or sharded."""

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from jaxconv_kernels.linear_logprob import vjp
from jaxconv_kernels.linear_logprob.mesh import axis_names, on_mesh


def linear_logprob(
    hidden: jax.Array,
    lm_head: jax.Array,
    targets: jax.Array,
    *,
    temperature: jax.Array | float = 1.0,
    softcap: float | None = None,
    axis_name: str | tuple[str, ...] | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Log-probability of each target and entropy of each distribution.

    With a = hidden @ lm_head, capped to softcap * tanh(a / softcap) when `softcap` is given, the
    distribution of a token is softmax(a / temperature). The matrix products run in hidden's dtype
    and accumulate in float32; everything after them is float32.

    Above 16 million logits, forward and backward hold those of one chunk of tokens alone: at most
    640 MiB of them where the vocabulary has less than 655,360 tokens, and for the backward pass one
    float32 buffer as large as lm_head.

    Sharded arrays:
        - Inside `shard_map`, `axis_name` says that lm_head holds the columns of this device. Its
          gradients are those of the unsharded form under `check_vma=True`; under `check_vma=False`
          they are where the derivative is taken inside.
        - On a mesh of Explicit axes the types of hidden and lm_head tell, and nothing is asked for.
        - On a mesh of Auto axes the compiler splits the work: no device gets all logits or another
          part of the vocabulary, but devices that share the tokens out sum the gradient of lm_head
          at every chunk, and a chunk is of all their tokens. `sharded_linear_logprob` sums it once.

    Args:
        hidden: float [N, D].
        lm_head: float [D, V]; [D, V / devices] with `axis_name`.
        targets: int [N], in [0, V), always of the whole vocabulary.
        temperature: positive float, or [N]; constant under differentiation.
        softcap: positive bound on the logits, or None; a Python number.
        axis_name: mesh axes of `shard_map` that split the vocabulary, in order; None where every
            device has all of it.

    Returns:
        (logprob, entropy), float32 [N], in nats; both differentiable in hidden and lm_head, in
        reverse mode. A target outside the vocabulary gives a number that means nothing.

    Raises:
        ValueError: shapes or types that do not fit.
    """
    if hidden.ndim != 2 or lm_head.ndim != 2 or hidden.shape[1] != lm_head.shape[0]:
        raise ValueError(
            f"hidden has shape {hidden.shape} and lm_head {lm_head.shape}; they must be [N, D] and "
            "[D, V]"
        )
    if targets.shape != hidden.shape[:1] or not jnp.issubdtype(targets.dtype, jnp.integer):
        raise ValueError(
            f"targets is {targets.dtype}{list(targets.shape)}; it must be integers, "
            f"[{hidden.shape[0]}]"
        )
    form = vjp.Form(softcap, axis_names(axis_name))
    temperature = jnp.broadcast_to(jnp.asarray(temperature, jnp.float32), targets.shape)
    inverse_N = jax.lax.stop_gradient(1.0 / temperature)
    rows, head = jax.typeof(hidden).sharding, jax.typeof(lm_head).sharding
    if any(rows.spec) or any(head.spec):  # only Explicit axes are in a type
        mesh, split = (rows if any(rows.spec) else head).mesh, rows.spec[0]
        outputs = on_mesh(
            form, hidden, lm_head, targets, inverse_N, mesh=mesh, rows=split, head=head.spec
        )
        return jax.sharding.reshard(outputs, NamedSharding(mesh, PartitionSpec(split)))
    return vjp.logprob_and_entropy(form, hidden, lm_head, targets, inverse_N)
