"""Values and gradients of `linear_logprob`, all tokens at once or a chunk of them at a time.

For many tokens and a large vocabulary the logits [N, V] would be the largest buffer of a training
step. Tokens go through in chunks, forward and backward, and only one chunk's logits exist; the
backward pass makes them again from the hidden states. Every device may hold the columns of some of
the vocabulary alone: the statistics of a token are then put together over the devices, and nothing
larger than its hidden state travels.

Shapes: N tokens, C of a chunk, D wide, V tokens of the vocabulary, those of this device alone.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

_ONE_CHUNK = 1 << 24  # logits, N * V, up to which they are simply kept: 64 MiB
_CHUNK = 160 << 20  # logits in one chunk above that: 640 MiB, 1,024 tokens of 151,936 logits
_ROWS = 128  # what the rows of a chunk are a multiple of: a tile of the matrix units
_LEAST = 256  # rows of a chunk, however large the vocabulary: fewer read lm_head too often


class Form(NamedTuple):
    """What a distribution is made of besides numbers: the cap, and the mesh axes of the vocabulary
    where each device holds some of it."""

    softcap: float | None
    axes: tuple[str, ...] = ()


def logprob_and_entropy(form, hidden, lm_head, targets, inverse_N):
    """See `api.linear_logprob`; inverse_N is 1 / temperature, float32 [N]."""
    tokens = _varying(hidden, targets, inverse_N)
    hidden, targets, inverse_N = (vary(x, tokens) for x in (hidden, targets, inverse_N))
    lm_head = vary(lm_head, tokens)
    rows, vocab = hidden.shape[0], lm_head.shape[1]
    if rows * vocab <= _ONE_CHUNK:
        return _whole(form, hidden, lm_head, targets, inverse_N)
    return _chunked(form, _chunk_rows(rows, vocab), hidden, lm_head, targets, inverse_N)


def _chunk_rows(rows, vocab):
    """Rows of a chunk: as many as the budget allows, with little padding in the last one."""
    most = max(_CHUNK // vocab // _ROWS * _ROWS, _LEAST)
    chunks = -(-rows // most)
    return min(-(-rows // chunks // _ROWS) * _ROWS, rows)


def _varying(*arrays):
    """Mesh axes over which any of them is known to differ between devices, inside `shard_map`."""
    return frozenset().union(*(jax.typeof(x).manual_axis_type.varying for x in arrays))


def vary(x, axes):
    """x, known to differ over these axes; its cotangent is then summed over them."""
    return jax.lax.pcast(x, tuple(a for a in axes if a not in _varying(x)), to="varying")


def _logits(form, hidden, lm_head, inverse_N):
    """Scaled logits [N, V] and, with a cap, tanh of the uncapped ones for the backward pass."""
    a_NV = jnp.dot(hidden, lm_head.astype(hidden.dtype), preferred_element_type=jnp.float32)
    if form.softcap is None:
        return a_NV * inverse_N[:, None], None
    tanh_NV = jnp.tanh(a_NV / form.softcap)
    return form.softcap * tanh_NV * inverse_N[:, None], tanh_NV


def _local(axes, targets, vocab):
    """Columns of the targets on this device, of which those outside [0, vocab) are another's."""
    return targets - jax.lax.axis_index(axes) * vocab if axes else targets


def _statistics(form, z_NV, targets):
    """(log-prob of the target, entropy, log-sum-exp), each [N]."""
    max_N1 = jnp.max(z_NV, axis=-1, keepdims=True)
    if form.axes:
        max_N1 = jax.lax.pmax(max_N1, form.axes)
    shifted_NV = z_NV - max_N1
    mass_NV = jnp.exp(shifted_NV)
    total_N = jnp.sum(mass_NV, axis=-1)
    weighted_N = jnp.sum(mass_NV * shifted_NV, axis=-1)
    chosen_N = _chosen(form.axes, z_NV, targets)
    if form.axes:
        total_N, weighted_N, chosen_N = jax.lax.psum((total_N, weighted_N, chosen_N), form.axes)
    log_total_N = jnp.log(total_N)
    entropy_N = log_total_N - weighted_N / total_N
    lse_N = log_total_N + max_N1[:, 0]
    return chosen_N - lse_N, entropy_N, lse_N


def _chosen(axes, z_NV, targets):
    """This device's part of the target's logit [N]: 0 where the target is another's column."""
    if not axes:
        return jnp.take_along_axis(z_NV, targets[:, None], axis=-1)[:, 0]
    vocab = z_NV.shape[-1]
    column_N = _local(axes, targets, vocab)
    safe_N = jnp.clip(column_N, 0, vocab - 1)
    found_N = jnp.take_along_axis(z_NV, safe_N[:, None], axis=-1)[:, 0]
    part_N = jnp.where(column_N == safe_N, found_N, 0.0)
    known_N = (targets >= 0) & (targets < vocab * jax.lax.axis_size(axes))
    return jnp.where(known_N, part_N, jnp.nan)


def _logit_gradient(form, z_NV, tanh_NV, targets, inverse_N, lse_N, entropy_N, g_N, e_N):
    """Cotangent of the raw products a [N, V].

    d logprob / d z_j = [j = target] - p_j and d entropy / d z_j = -p_j (log p_j + entropy).
    """
    logp_NV = z_NV - lse_N[:, None]
    weight_NV = g_N[:, None] + e_N[:, None] * (logp_NV + entropy_N[:, None])
    vocab = z_NV.shape[-1]
    column_N = _local(form.axes, targets, vocab)
    onehot_NV = jnp.arange(vocab, dtype=targets.dtype) == column_N[:, None]
    dz_NV = jnp.where(onehot_NV, g_N[:, None], 0.0) - jnp.exp(logp_NV) * weight_NV
    da_NV = dz_NV * inverse_N[:, None]
    return da_NV if form.softcap is None else da_NV * (1.0 - jnp.square(tanh_NV))


def _matrix_gradients(form, hidden, lm_head, da_NV):
    """Cotangents of hidden [N, D], in its dtype, and of lm_head [D, V], in float32."""
    da_NV = da_NV.astype(hidden.dtype)
    d_hidden = jnp.dot(da_NV, lm_head.astype(hidden.dtype).T, preferred_element_type=jnp.float32)
    # Where hidden is known to differ over an axis of the vocabulary, its parts are summed outside.
    if shared := tuple(a for a in form.axes if a not in _varying(hidden)):
        d_hidden = jax.lax.psum(d_hidden, shared)
    d_head = jnp.dot(hidden.T, da_NV, preferred_element_type=jnp.float32)
    return d_hidden.astype(hidden.dtype), d_head


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _whole(form, hidden, lm_head, targets, inverse_N):
    """All tokens at once; the logits are kept for the backward pass."""
    return _whole_forward(form, hidden, lm_head, targets, inverse_N)[0]


def _whole_forward(form, hidden, lm_head, targets, inverse_N):
    z_NV, tanh_NV = _logits(form, hidden, lm_head, inverse_N)
    logprob_N, entropy_N, lse_N = _statistics(form, z_NV, targets)
    kept = (hidden, lm_head, targets, inverse_N, z_NV, tanh_NV, lse_N, entropy_N)
    return (logprob_N, entropy_N), kept


def _whole_backward(form, kept, cotangents):
    hidden, lm_head, targets, inverse_N, z_NV, tanh_NV, lse_N, entropy_N = kept
    da_NV = _logit_gradient(form, z_NV, tanh_NV, targets, inverse_N, lse_N, entropy_N, *cotangents)
    d_hidden, d_head = _matrix_gradients(form, hidden, lm_head, da_NV)
    return d_hidden, d_head.astype(lm_head.dtype), None, None


_whole.defvjp(_whole_forward, _whole_backward)


def _split(size, *arrays):
    """[N, ...] to [chunks, size, ...], padded with zeros, which add nothing to any gradient.

    Token i goes to chunk i modulo their number: tokens that are shared out over devices in equal
    runs are so within every chunk too, and stay where they are.
    """

    def split(x):
        padded = jnp.pad(x, ((0, -x.shape[0] % size), *((0, 0),) * (x.ndim - 1)))
        return jnp.swapaxes(padded.reshape(size, -1, *x.shape[1:]), 0, 1)

    return tuple(split(x) for x in arrays)


def _join(rows, x):
    """What `_split` took apart, without the padding: [rows, ...]."""
    return jnp.swapaxes(x, 0, 1).reshape(-1, *x.shape[2:])[:rows]


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _chunked(form, size, hidden, lm_head, targets, inverse_N):
    """`size` tokens at a time; the backward pass computes each chunk's logits again."""
    return _chunked_forward(form, size, hidden, lm_head, targets, inverse_N)[0]


def _chunked_forward(form, size, hidden, lm_head, targets, inverse_N):
    def one(chunk):
        hidden_CD, targets_C, inverse_C = chunk
        return _statistics(form, _logits(form, hidden_CD, lm_head, inverse_C)[0], targets_C)

    outputs = jax.lax.map(one, _split(size, hidden, targets, inverse_N))
    logprob_N, entropy_N, lse_N = (_join(hidden.shape[0], x) for x in outputs)
    return (logprob_N, entropy_N), (hidden, lm_head, targets, inverse_N, lse_N, entropy_N)


def _chunked_backward(form, size, kept, cotangents):
    """The cotangent of lm_head is summed over chunks in one float32 buffer of its size, in place:
    sums of many chunks in bfloat16 would lose the small ones."""
    hidden, lm_head, targets, inverse_N, lse_N, entropy_N = kept

    def one(d_head, chunk):
        hidden_CD, targets_C, inverse_C, *rest = chunk
        z_CV, tanh_CV = _logits(form, hidden_CD, lm_head, inverse_C)
        da_CV = _logit_gradient(form, z_CV, tanh_CV, targets_C, inverse_C, *rest)
        d_hidden_CD, d_head_C = _matrix_gradients(form, hidden_CD, lm_head, da_CV)
        return d_head + d_head_C, d_hidden_CD

    chunks = _split(size, hidden, targets, inverse_N, lse_N, entropy_N, *cotangents)
    zeros = vary(jnp.zeros(lm_head.shape, jnp.float32), _varying(lm_head))
    d_head, d_hidden = jax.lax.scan(one, zeros, chunks)
    d_hidden = _join(hidden.shape[0], d_hidden)
    return d_hidden, d_head.astype(lm_head.dtype), None, None


_chunked.defvjp(_chunked_forward, _chunked_backward)
