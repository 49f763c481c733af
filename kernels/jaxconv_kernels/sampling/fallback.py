"""Stage C: the exact result of rows whose candidates were not enough, from all of their logits.

The rows go through in small blocks in a loop that runs for as many as there are, so a batch without
such rows pays for nothing but the test of the loop.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxconv_kernels.sampling import cells, finish, spec
from jaxconv_kernels.sampling.axis import Axis
from jaxconv_kernels.sampling.cells import Mass
from jaxconv_kernels.sampling.spec import RowParameters

_AT_ONCE = 2  # rows of a block: with more, a lone row would pay for as many


def draw_exactly(
    read_rows: Callable[[jax.Array], jax.Array],
    todo_B: jax.Array,
    row: Mass,
    parameters: RowParameters,
    keys_B2: jax.Array,
    token_B: jax.Array,
    kept: finish.Kept,
    axis: Axis,
) -> tuple[jax.Array, finish.Kept]:
    """Replaces the token and what is kept in the rows to do.

    Args:
        read_rows: gives clean float32 logits [R, V] of rows int32 [R].
        todo_B: bool, the rows to do.
        row: mass of all rows.
        parameters: of all rows.
        keys_B2: uint32, key data of all rows.
        token_B: int32, tokens from the candidates.
        kept: what was kept of the candidates.
        axis: the devices that share the vocabulary.
    """
    rows = todo_B.shape[0]
    vocab = jax.eval_shape(read_rows, jax.ShapeDtypeStruct((1,), jnp.int32)).shape[1]
    block = min(rows, _AT_ONCE)
    count = jnp.sum(todo_B)
    # Past the last row to do come indices of no row: reads clip them, writes drop them.
    waiting = jnp.nonzero(todo_B, size=rows + block, fill_value=rows)[0].astype(jnp.int32)

    def add(values):
        return spec.cell_total(axis.concatenate(cells.cell_sum(values)))

    def greatest(keys):
        return axis.greatest(cells.greatest(keys))

    def one_block(carry):
        done, token_B, kept = carry
        at_R = jax.lax.dynamic_slice(waiting, (done,), (block,))
        row_R, parameters_R, keys_R2 = jax.tree.map(
            lambda leaf: jnp.take(leaf, at_R, axis=0, mode="clip"), (row, parameters, keys_B2)
        )
        x = cells.by_cell(read_rows(jnp.minimum(at_R, rows - 1)), small=False)
        kept_R, z = finish.keep(x, row_R, parameters_R, add=add, greatest=greatest)
        ids = cells.token_ids(x, axis.index() * vocab)
        token_R = axis.first_largest(*finish.draw_kept(z, ids, keys_R2))
        token_B, kept = jax.tree.map(
            lambda all_, new: all_.at[at_R].set(new, mode="drop"),
            (token_B, kept),
            (token_R, kept_R),
        )
        return done + block, token_B, kept

    _, token_B, kept = jax.lax.while_loop(
        lambda carry: carry[0] < count, one_block, (jnp.int32(0), token_B, kept)
    )
    return token_B, kept
