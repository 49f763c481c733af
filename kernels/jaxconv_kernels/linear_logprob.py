"""Chosen-token log-probability and entropy straight from hidden states and the output matrix.

For many tokens and a large vocabulary the logits [N, V] would be the largest buffer of a training
step. Here tokens go through in chunks, forward and backward, and only one chunk's logits exist.
"""

from functools import partial

import jax
import jax.numpy as jnp

_ONE_CHUNK = 1 << 24  # logits, N * V, up to which they are simply kept: 64 MiB
_CHUNK = 1 << 27  # logits in one chunk above that: 512 MiB


def linear_logprob(
    hidden: jax.Array,
    lm_head: jax.Array,
    targets: jax.Array,
    *,
    temperature: jax.Array | float = 1.0,
    softcap: float | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Log-probability of each target and entropy of each distribution.

    With a = hidden @ lm_head, capped to softcap * tanh(a / softcap) when `softcap` is given, the
    distribution of a token is softmax(a / temperature). The matrix products run in hidden's dtype
    and accumulate in float32; everything after them is float32.

    Args:
        hidden: float [N, D].
        lm_head: float [D, V].
        targets: int [N], in [0, V).
        temperature: positive float, or [N]; constant under differentiation.
        softcap: positive bound on the logits, or None.

    Returns:
        (logprob, entropy), float32 [N], in nats; both differentiable in hidden and lm_head.
    """
    rows, vocab = hidden.shape[0], lm_head.shape[1]
    temperature = jnp.broadcast_to(jnp.asarray(temperature, jnp.float32), (rows,))
    inverse_N = jax.lax.stop_gradient(1.0 / temperature)
    if rows * vocab <= _ONE_CHUNK:
        return _chunk_logprob(softcap, hidden, lm_head, targets, inverse_N)
    size = min(max(_CHUNK // vocab, 256), rows)
    return _chunked_logprob(softcap, size, hidden, lm_head, targets, inverse_N)


def _logits(softcap, hidden, lm_head, inverse_N):
    """Scaled logits [N, V] and, with a cap, tanh of the uncapped ones for the backward pass."""
    a_NV = jnp.dot(hidden, lm_head.astype(hidden.dtype), preferred_element_type=jnp.float32)
    if softcap is None:
        return a_NV * inverse_N[:, None], None
    tanh_NV = jnp.tanh(a_NV / softcap)
    return softcap * tanh_NV * inverse_N[:, None], tanh_NV


def _statistics(z_NV, targets):
    """(log-prob of the target, entropy, log-sum-exp), each [N]."""
    max_N1 = jnp.max(z_NV, axis=-1, keepdims=True)
    shifted_NV = z_NV - max_N1
    mass_NV = jnp.exp(shifted_NV)
    total_N = jnp.sum(mass_NV, axis=-1)
    log_total_N = jnp.log(total_N)
    entropy_N = log_total_N - jnp.sum(mass_NV * shifted_NV, axis=-1) / total_N
    lse_N = log_total_N + max_N1[:, 0]
    chosen_N = jnp.take_along_axis(z_NV, targets[:, None], axis=-1)[:, 0]
    return chosen_N - lse_N, entropy_N, lse_N


def _logit_gradient(softcap, z_NV, tanh_NV, targets, inverse_N, lse_N, entropy_N, g_N, e_N):
    """Cotangent of the raw products a [N, V].

    d logprob / d z_j = [j = target] - p_j and d entropy / d z_j = -p_j (log p_j + entropy).
    """
    logp_NV = z_NV - lse_N[:, None]
    weight_NV = g_N[:, None] + e_N[:, None] * (logp_NV + entropy_N[:, None])
    onehot_NV = jnp.arange(z_NV.shape[-1], dtype=targets.dtype) == targets[:, None]
    dz_NV = jnp.where(onehot_NV, g_N[:, None], 0.0) - jnp.exp(logp_NV) * weight_NV
    da_NV = dz_NV * inverse_N[:, None]
    return da_NV if softcap is None else da_NV * (1.0 - jnp.square(tanh_NV))


def _matrix_gradients(hidden, lm_head, da_NV):
    """Cotangents of hidden [N, D], in its dtype, and of lm_head [D, V], in float32."""
    da_NV = da_NV.astype(hidden.dtype)
    d_hidden = jnp.dot(da_NV, lm_head.astype(hidden.dtype).T, preferred_element_type=jnp.float32)
    d_head = jnp.dot(hidden.T, da_NV, preferred_element_type=jnp.float32)
    return d_hidden.astype(hidden.dtype), d_head


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _chunk_logprob(softcap, hidden, lm_head, targets, inverse_N):
    """All tokens at once; the logits are kept for the backward pass."""
    return _chunk_forward(softcap, hidden, lm_head, targets, inverse_N)[0]


def _chunk_forward(softcap, hidden, lm_head, targets, inverse_N):
    z_NV, tanh_NV = _logits(softcap, hidden, lm_head, inverse_N)
    logprob_N, entropy_N, lse_N = _statistics(z_NV, targets)
    kept = (hidden, lm_head, targets, inverse_N, z_NV, tanh_NV, lse_N, entropy_N)
    return (logprob_N, entropy_N), kept


def _chunk_backward(softcap, kept, cotangents):
    hidden, lm_head, targets, inverse_N, z_NV, tanh_NV, lse_N, entropy_N = kept
    da_NV = _logit_gradient(
        softcap, z_NV, tanh_NV, targets, inverse_N, lse_N, entropy_N, *cotangents
    )
    d_hidden, d_head = _matrix_gradients(hidden, lm_head, da_NV)
    return d_hidden, d_head.astype(lm_head.dtype), None, None


_chunk_logprob.defvjp(_chunk_forward, _chunk_backward)


def _split(size, *arrays):
    """[N, ...] to [chunks, size, ...], padded with zeros, which add nothing to any gradient."""

    def split(x):
        padded = jnp.pad(x, ((0, -x.shape[0] % size), *((0, 0),) * (x.ndim - 1)))
        return padded.reshape(-1, size, *x.shape[1:])

    return tuple(split(x) for x in arrays)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _chunked_logprob(softcap, size, hidden, lm_head, targets, inverse_N):
    """`size` tokens at a time; the backward pass computes each chunk's logits again."""
    return _chunked_forward(softcap, size, hidden, lm_head, targets, inverse_N)[0]


def _chunked_forward(softcap, size, hidden, lm_head, targets, inverse_N):
    def one(chunk):
        hidden_C, targets_C, inverse_C = chunk
        return _statistics(_logits(softcap, hidden_C, lm_head, inverse_C)[0], targets_C)

    outputs = jax.lax.map(one, _split(size, hidden, targets, inverse_N))
    logprob_N, entropy_N, lse_N = (x.reshape(-1)[: hidden.shape[0]] for x in outputs)
    return (logprob_N, entropy_N), (hidden, lm_head, targets, inverse_N, lse_N, entropy_N)


def _chunked_backward(softcap, size, kept, cotangents):
    hidden, lm_head, targets, inverse_N, lse_N, entropy_N = kept

    def one(d_head, chunk):
        hidden_C, targets_C, inverse_C, *rest = chunk
        z_CV, tanh_CV = _logits(softcap, hidden_C, lm_head, inverse_C)
        da_CV = _logit_gradient(softcap, z_CV, tanh_CV, targets_C, inverse_C, *rest)
        d_hidden_C, d_head_C = _matrix_gradients(hidden_C, lm_head, da_CV)
        return d_head + d_head_C, d_hidden_C

    chunks = _split(size, hidden, targets, inverse_N, lse_N, entropy_N, *cotangents)
    d_head, d_hidden = jax.lax.scan(one, jnp.zeros(lm_head.shape, jnp.float32), chunks)
    d_hidden = d_hidden.reshape(-1, hidden.shape[1])[: hidden.shape[0]]
    return d_hidden, d_head.astype(lm_head.dtype), None, None


_chunked_logprob.defvjp(_chunked_forward, _chunked_backward)
