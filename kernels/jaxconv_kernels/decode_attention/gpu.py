"""Decode attention for NVIDIA GPUs of the Hopper class, in Mosaic GPU.

One program for each row, key head and split. It walks its share of the key blocks that the row has
filled, each brought in by TMA while the ones before it are at work, and leaves a partial sum with
its log-mass; the few partials of a row are merged afterwards (flash-decoding). The group of queries
of a key head is the left operand of the tensor cores, which work on 64 rows whatever the group; the
rest of them goes along for nothing, since decoding waits for memory.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

BLOCK = 64  # keys of a block
_ROWS = 64  # of a wgmma
_PROGRAMS = 264  # that keep 132 multiprocessors busy
_LOG2_E = math.log2(math.e)


def refusal(q_BHh: jax.Array, k_BKSh: jax.Array) -> str | None:
    """Why the kernel does not take such arrays, or None."""
    (_, heads, width), (_, kv_heads, keys, _) = q_BHh.shape, k_BKSh.shape
    if q_BHh.dtype != k_BKSh.dtype or q_BHh.dtype not in (jnp.bfloat16, jnp.float16):
        return f"q is {q_BHh.dtype}, the cache {k_BKSh.dtype}; both must be one 16-bit float"
    if width % 64 or width > 256:
        return f"heads are {width} wide; it must be 64, 128, 192 or 256"
    if keys % BLOCK:
        return f"the cache has {keys} positions; it must be a multiple of {BLOCK}"
    if heads // kv_heads > _ROWS:
        return f"{heads // kv_heads} query heads share a key head; at most {_ROWS} may"
    return None


def attend(
    q_BHh: jax.Array,
    k_BKSh: jax.Array,
    v_BKSh: jax.Array,
    length_B: jax.Array,
    *,
    scale: float,
    window: int | None,
    softcap: float | None,
    splits: int | None = None,
    interpret=None,
) -> jax.Array:
    """As `xla.attend`, for what `refusal` lets through; reads what is filled of the cache.

    Args:
        splits: shares in which a row's keys are worked on at once; None takes as many as fill the
            device.
        interpret: Pallas's parameters for running it as plain operations on a CPU.

    Raises:
        ValueError: the kernel does not take such arrays.
    """
    if (why := refusal(q_BHh, k_BKSh)) is not None:
        raise ValueError(f"decode attention on a GPU: {why}")
    b, heads, width = q_BHh.shape
    kv_heads, keys = k_BKSh.shape[1:3]
    group = heads // kv_heads
    rows = -(-group // 8) * 8
    # Wide heads fill the shared memory: fewer blocks in flight, partial sums in q's own precision.
    stages, partial_dtype = (3, jnp.float32) if width <= 128 else (2, q_BHh.dtype)
    if splits is None:
        splits = max(1, min(16, keys // (4 * BLOCK), _PROGRAMS // (b * kv_heads)))

    def kernel(length_B, q_BKRh, k_BKSh, v_BKSh, out_BKPRh, log_BKPR, *scratch):
        q_smem, k_smem, v_smem, mass_smem, out_smem, log_smem, *barriers = scratch
        q_barrier, k_barrier, v_barrier = barriers
        row, head, split = (lax.axis_index(name) for name in ("row", "head", "split"))
        length = length_B[row]
        first = jnp.int32(0) if window is None else jnp.maximum(length - window, 0) // BLOCK
        share = pl.cdiv(pl.cdiv(length, BLOCK) - first, splits)
        first = first + split * share
        blocks = jnp.clip(pl.cdiv(length, BLOCK) - first, 0, share)

        def fetch(step):
            slot = lax.rem(step, stages)
            at = (row, head, pl.ds((first + step) * BLOCK, BLOCK))
            plgpu.copy_gmem_to_smem(k_BKSh.at[at], k_smem.at[slot], k_barrier.at[slot])
            plgpu.copy_gmem_to_smem(v_BKSh.at[at], v_smem.at[slot], v_barrier.at[slot])

        plgpu.copy_gmem_to_smem(q_BKRh.at[row, head], q_smem.at[pl.ds(0, rows)], q_barrier)
        for step in range(stages):
            pl.when(step < blocks)(functools.partial(fetch, jnp.int32(step)))
        plgpu.barrier_wait(q_barrier)

        def attend_block(step, carry):
            acc_Qh, max_Q, sum_Q = carry
            slot = lax.rem(step, stages)
            plgpu.barrier_wait(k_barrier.at[slot])

            def scores(acc):
                plgpu.wgmma(acc, q_smem, k_smem.at[slot].transpose((1, 0)))
                return acc[...]

            scores_QS = pl.run_scoped(scores, plgpu.ACC((_ROWS, BLOCK), jnp.float32)) * scale
            if softcap is not None:
                scores_QS = softcap * jnp.tanh(scores_QS / softcap)
            key_QS = plgpu.broadcasted_iota(jnp.int32, (_ROWS, BLOCK), 1, layout=plgpu.Layout.WGMMA)
            distance_QS = length - 1 - (first + step) * BLOCK - key_QS
            visible_QS = distance_QS >= 0
            if window is not None:
                visible_QS &= distance_QS < window
            scores_QS = jnp.where(visible_QS, scores_QS * _LOG2_E, -jnp.inf)

            top_Q = jnp.maximum(max_Q, scores_QS.max(axis=1))
            shrink_Q = jnp.exp2(max_Q - top_Q)
            mass_QS = jnp.exp2(scores_QS - lax.broadcast_in_dim(top_Q, scores_QS.shape, [0]))
            sum_Q = sum_Q * shrink_Q + mass_QS.sum(axis=1)
            mass_smem[...] = mass_QS.astype(mass_smem.dtype)
            plgpu.commit_smem()
            plgpu.barrier_wait(v_barrier.at[slot])

            def values(acc):
                plgpu.wgmma(acc, mass_smem, v_smem.at[slot])
                return acc[...]

            added_Qh = pl.run_scoped(values, plgpu.ACC((_ROWS, width), jnp.float32))
            acc_Qh = acc_Qh * lax.broadcast_in_dim(shrink_Q, acc_Qh.shape, [0]) + added_Qh
            pl.when(step + stages < blocks)(functools.partial(fetch, step + stages))
            return acc_Qh, top_Q, sum_Q

        def of_rows(value):
            full = jnp.full((_ROWS,), value, jnp.float32)
            return plgpu.layout_cast(full, plgpu.Layout.WGMMA.reduce(1))

        zeros_Qh = jnp.zeros((_ROWS, width), jnp.float32)
        # A finite start keeps -inf - -inf out of the first block.
        carry = (plgpu.layout_cast(zeros_Qh, plgpu.Layout.WGMMA), of_rows(-1e30), of_rows(0.0))
        acc_Qh, max_Q, sum_Q = lax.fori_loop(0, blocks, attend_block, carry)
        total_Q = jnp.where(sum_Q == 0, 1.0, sum_Q)
        mean_Qh = acc_Qh / lax.broadcast_in_dim(total_Q, acc_Qh.shape, [0])
        out_smem[...] = mean_Qh.astype(partial_dtype)
        log_smem[...] = jnp.where(sum_Q == 0, -1e30, max_Q / _LOG2_E + jnp.log(total_Q))
        plgpu.commit_smem()
        at = (row, head, split)
        plgpu.copy_smem_to_gmem(out_smem.at[pl.ds(0, rows)], out_BKPRh.at[at])
        plgpu.copy_smem_to_gmem(log_smem, log_BKPR.at[at])
        plgpu.wait_smem_to_gmem(0)

    def tiled(*shape):
        """Shared memory of 16-bit matrices, laid out as the tensor cores read it."""
        layout = plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)
        return plgpu.SMEM(shape, k_BKSh.dtype, transforms=layout)

    run = plgpu.kernel(
        kernel,
        out_type=(
            jax.ShapeDtypeStruct((b, kv_heads, splits, rows, width), partial_dtype),
            jax.ShapeDtypeStruct((b, kv_heads, splits, _ROWS), jnp.float32),
        ),
        scratch_types=[
            tiled(_ROWS, width),
            tiled(stages, BLOCK, width),
            tiled(stages, BLOCK, width),
            tiled(_ROWS, BLOCK),
            plgpu.SMEM((_ROWS, width), partial_dtype),
            plgpu.SMEM((_ROWS,), jnp.float32),
            plgpu.Barrier(),
            plgpu.Barrier(num_barriers=stages),
            plgpu.Barrier(num_barriers=stages),
        ],
        grid=(kv_heads, splits, b),
        grid_names=("head", "split", "row"),
        interpret=interpret,
    )
    q_BKRh = q_BHh.reshape(b, kv_heads, group, width)
    q_BKRh = jnp.pad(q_BKRh, ((0, 0), (0, 0), (0, rows - group), (0, 0)))
    out_BKPRh, log_BKPR = run(jnp.minimum(length_B, keys).astype(jnp.int32), q_BKRh, k_BKSh, v_BKSh)
    share_BKPG = jax.nn.softmax(log_BKPR[..., :group], axis=2)
    parts_BKPGh = out_BKPRh[:, :, :, :group].astype(jnp.float32)
    out_BKGh = jnp.einsum("bkpg,bkpgh->bkgh", share_BKPG, parts_BKPGh)
    return out_BKGh.reshape(b, heads, width).astype(q_BHh.dtype)
