"""Which forms of attention and sampling a model runs on this platform, as a report tells them."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jaxconv_kernels.decode_attention import running as running_decode_attention
from jaxconv_kernels.prefill_attention import running as running_prefill_attention
from jaxconv_kernels.sampling import running as running_sampler

from jaxconv.errors import Refused
from jaxconv.models.attention import attention_form
from jaxconv.models.config import DecoderConfig


def chosen(config: DecoderConfig, lengths: Sequence[int], tensor: int = 1) -> dict[str, str]:
    """The form of each operation that has several, by the operation's name.

    Args:
        config: the model's.
        lengths: of the caches that its rollouts have.
        tensor: devices that share the heads and the vocabulary in a rollout.

    Raises:
        Refused: the config asks for kernels that do not take such caches.
    """
    dtype = jnp.dtype(config.dtype)
    heads, kv_heads = config.num_heads // tensor, config.num_kv_heads // tensor
    q_NTHh = jax.ShapeDtypeStruct((1, 1, heads, config.head_dim), dtype)
    q_BHh = jax.ShapeDtypeStruct((1, heads, config.head_dim), dtype)

    def decoding(length: int) -> str:
        try:
            return running_decode_attention(config.implementation, q_BHh, cache(length))
        except ValueError as error:
            raise Refused(f"config.model.kernels={config.kernels!r}: {error}") from None

    def prefilling(length: int) -> str:
        return running_prefill_attention(
            config.implementation, q_NTHh, cache(length), config.attention_softcap
        )

    def cache(length: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((1, kv_heads, length, config.head_dim), dtype)

    sampler = running_sampler(config.implementation, config.vocab_size)
    return {
        "attention": attention_form(config),
        "decode_attention": _by_length(decoding, lengths),
        "linear_logprob": "xla",
        "prefill_attention": _by_length(prefilling, lengths),
        "sample": sampler if tensor == 1 else "xla",  # of a vocabulary that is split
    }


def _by_length(form: Callable[[int], str], lengths: Sequence[int]) -> str:
    """The form, or each with its cache lengths where they differ."""
    by_form: dict[str, list[str]] = {}
    for length in lengths:
        by_form.setdefault(form(length), []).append(str(length))
    if len(by_form) == 1:
        return next(iter(by_form))
    return ", ".join(f"{name} (cache of {', '.join(of)})" for name, of in by_form.items())


def refuse_other_platforms(kernels: str) -> None:
    """Refuses kernels of a platform that this process does not compute on."""
    platform = jax.default_backend()
    if kernels not in ("auto", "xla", platform):
        raise Refused(
            f"config.model.kernels={kernels!r}; this process computes on {platform!r}, it may be "
            "'auto' or 'xla'"
        )
