"""`linear_logprob` on a mesh: `shard_map` around each device's tokens and columns."""

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from jaxconv_kernels.linear_logprob import vjp


def sharded_linear_logprob(
    hidden: jax.Array,
    lm_head: jax.Array,
    targets: jax.Array,
    *,
    mesh: Mesh | AbstractMesh,
    rows: str | tuple[str, ...] | None,
    head: PartitionSpec,
    temperature: jax.Array | float = 1.0,
    softcap: float | None = None,
) -> tuple[jax.Array, jax.Array]:
    """`linear_logprob` of whole arrays, each device with its own tokens and its own columns.

    lm_head is gathered over the axes of its width alone, once, as fully sharded data parallelism
    does, and its gradient is summed and scattered once. What devices tell each other about a token
    besides is four numbers forward, and the gradient of its hidden state backward.

    Args:
        hidden, lm_head, targets, temperature, softcap: as for `linear_logprob`.
        mesh: whose axes the others name.
        rows: mesh axes that split the tokens, which they and the axes of the width must divide.
        head: how lm_head [D, V] is split, say P("fsdp", "tensor"). Tokens are split over the axes
            of its width, too, where `rows` does not name them.

    Returns:
        (logprob, entropy), float32 [N], split over `rows` and the axes of the width.

    Raises:
        ValueError: an axis is to split the tokens and the vocabulary.
    """
    form = vjp.Form(softcap)
    temperature = jnp.broadcast_to(jnp.asarray(temperature, jnp.float32), targets.shape)
    inverse_N = jax.lax.stop_gradient(1.0 / temperature)
    return on_mesh(form, hidden, lm_head, targets, inverse_N, mesh=mesh, rows=rows, head=head)


def axis_names(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """The mesh axes of one entry of a PartitionSpec."""
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


def on_mesh(form, hidden, lm_head, targets, inverse_N, *, mesh, rows, head):
    """See `sharded_linear_logprob`; the axes of the vocabulary are those of `head`."""
    rows = axis_names(rows)
    width, vocab = (axis_names(entry) for entry in (*head, None, None)[:2])
    if shared := sorted({*rows, *width} & set(vocab)):
        raise ValueError(
            f"mesh axis {shared[0]!r} splits the vocabulary and the tokens or the width; "
            "it must split one of them"
        )
    rows += tuple(axis for axis in width if axis not in rows)
    row = PartitionSpec(rows)
    arrays, specs = (hidden, lm_head, targets, inverse_N), (row, head, row, row)

    def local(hidden, lm_head, targets, inverse_N):
        # First, so that of the gradient only this device's part is summed over the other axes.
        lm_head = vjp.vary(lm_head, rows)
        if width:
            lm_head = jax.lax.all_gather(lm_head, width, axis=0, tiled=True)
        return vjp.logprob_and_entropy(
            form._replace(axes=vocab), hidden, lm_head, targets, inverse_N
        )

    if mesh.explicit_axes:
        arrays = jax.sharding.reshard(arrays, tuple(NamedSharding(mesh, spec) for spec in specs))
    return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=row)(*arrays)
