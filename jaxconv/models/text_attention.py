"""Attention of texts that lie one after the other, each to itself, as a CPU does it quickest.

Texts of any length share one row without a gap, so that linear maps compute no padding. A loop
takes one text after the other: its scores are few enough to stay in the core's cache, and as many
as the next of a few widths asks for. Scores have their keys in front, because a CPU reduces over a
leading axis without shuffling, and values come transposed, which their product wants.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

WIDTHS = (64, 96, 128, 192, 256, 384, 512)
_SCORES = 1 << 18  # that are computed at once: a MB of float32


def text_attention(
    q_NHh: jax.Array,
    k_NHh: jax.Array,
    v_NHh: jax.Array,
    first_P: jax.Array,
    length_P: jax.Array,
    bias_HTT: jax.Array | None = None,
    *,
    longest: int,
) -> jax.Array:
    """Softmax attention of every token to all of its own text, [N, H, h]; scores are float32.

    Args:
        q_NHh, k_NHh, v_NHh: queries, keys and values of all texts.
        first_P: int, index of each text's first token.
        length_P: int, its tokens, longest first; 0 where there is no text.
        bias_HTT: float32 [H, T, S], added to the scores, T at least `longest`.
        longest: tokens that a text may have.
    """
    tokens, heads, width = q_NHh.shape
    q_ND, k_ND, v_ND = (x.reshape(tokens, -1) for x in (q_NHh, k_NHh, v_NHh))
    q_ND = q_ND * jnp.asarray(width**-0.5, q_ND.dtype)
    bias_HST = None if bias_HTT is None else bias_HTT.swapaxes(1, 2)
    out_ND = jnp.zeros_like(q_ND)
    shorter = 0
    for window in _windows(min(longest, tokens)):

        def attend(i, out_ND, window=window):
            # A window that would pass the end begins earlier.
            start = jnp.minimum(first_P[i], tokens - window)
            place = jnp.arange(window) - (first_P[i] - start)
            inside_T = (place >= 0) & (place < length_P[i])
            q_TD, k_TD, v_TD, before_TD = (
                jax.lax.dynamic_slice_in_dim(x, start, window) for x in (q_ND, k_ND, v_ND, out_ND)
            )
            bias = None if bias_HST is None else bias_HST[:, :window, :window]
            found_TD = _one_text(q_TD, k_TD, v_TD, inside_T, bias, heads)
            found_TD = jnp.where(inside_T[:, None], found_TD, before_TD)
            return jax.lax.dynamic_update_slice_in_dim(out_ND, found_TD, start, 0)

        begin, end = jnp.sum(length_P > window), jnp.sum(length_P > shorter)
        out_ND = jax.lax.fori_loop(begin, end, attend, out_ND)
        shorter = window
    return out_ND.reshape(tokens, heads, width)


def _one_text(q_TD, k_TD, v_TD, inside_S, bias_HST, heads: int) -> jax.Array:
    tokens = len(q_TD)
    most = max(_SCORES // tokens**2, 1)
    group = max(g for g in range(1, heads + 1) if heads % g == 0 and g <= most)
    hidden = jnp.where(inside_S, 0.0, jnp.finfo(jnp.float32).min)[:, None]

    def attend(part):
        q_GTh, k_GSh, v_GhS, bias_GST = part
        scores_GST = jnp.einsum("gsh,gth->gst", k_GSh, q_GTh, preferred_element_type=jnp.float32)
        scores_GST = scores_GST + (hidden if bias_GST is None else hidden + bias_GST)
        scores_GST = jnp.exp(scores_GST - jnp.max(scores_GST, axis=1, keepdims=True))
        total_GT = jnp.sum(scores_GST, axis=1)
        out_GhT = jnp.einsum("ghs,gst->ght", v_GhS, scores_GST.astype(v_GhS.dtype))
        return out_GhT / total_GT[:, None].astype(out_GhT.dtype)

    def split(x, order: Sequence[int]):
        x = x.reshape(tokens, heads, -1).transpose(order)
        return x.reshape(heads // group, group, *x.shape[1:])

    bias = None if bias_HST is None else bias_HST.reshape(-1, group, tokens, tokens)
    parts = split(q_TD, (1, 0, 2)), split(k_TD, (1, 0, 2)), split(v_TD, (1, 2, 0)), bias
    if group == heads:
        out = attend(jax.tree.map(lambda x: x[0], parts))
    else:
        out = jax.lax.map(attend, parts)
    return out.reshape(-1, tokens).T


def _windows(longest: int) -> list[int]:
    """Tokens of the windows for texts of up to so many tokens."""
    windows = list(WIDTHS)
    while windows[-1] < longest:
        windows.append(2 * windows[-1])
    return [*(w for w in windows if w < longest), longest]
