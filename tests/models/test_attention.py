"""The forms of self-attention: one function, whichever platform it is for."""

from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from jaxconv.errors import Refused
from jaxconv.models.attention import attention_form, causal_attention, splash
from jaxconv.models.config import DecoderConfig
from jaxconv.models.kernels import chosen

CONFIG = DecoderConfig(
    family="gemma2",
    vocab_size=32,
    embed_dim=32,
    num_layers=1,
    num_heads=4,
    num_kv_heads=2,
    head_dim=64,
    mlp_dim=32,
    max_positions=512,
    sliding_window=100,
    attention_softcap=20.0,
    kernels="xla",
)


def rows(length, dtype="float32"):
    rng = np.random.default_rng(0)
    q, k, v = (
        jnp.asarray(rng.normal(size=(2, length, heads, CONFIG.head_dim)), dtype)
        for heads in (CONFIG.num_heads, CONFIG.num_kv_heads, CONFIG.num_kv_heads)
    )
    # Two segments and padding in one row, one segment in the other.
    segments = np.ones((2, length), np.int32)
    segments[0, length // 3 :], segments[0, -5:] = 2, 0
    return q, k, v, jnp.asarray(segments)


@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("length", [200, 256])
def test_splash_attention_and_its_gradients_are_ours(window, length):
    q, k, v, segments = rows(length)
    weigh = jax.random.normal(jax.random.key(0), q.shape)

    def loss(q, k, v, attend, **options):
        return jnp.sum(attend(q, k, v, segments, CONFIG, window, **options) * weigh)

    ours, our_grads = jax.value_and_grad(loss, (0, 1, 2))(q, k, v, causal_attention)
    with jax.default_matmul_precision("float32"):
        theirs, grads = jax.value_and_grad(loss, (0, 1, 2))(q, k, v, splash, interpret=True)
    np.testing.assert_allclose(theirs, ours, rtol=1e-4)
    for a, b in zip(grads, our_grads, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-4)


def test_splash_attention_lowers_for_a_tpu_with_its_backward_pass():
    q, k, v, segments = rows(256, "bfloat16")
    config = replace(CONFIG, dtype="bfloat16", kernels="tpu")

    def loss(q, k, v):
        return causal_attention(q, k, v, segments, config, 100).astype(jnp.float32).sum()

    lowered = export.export(jax.jit(jax.grad(loss, (0, 1, 2))), platforms=["tpu"])(q, k, v)
    assert lowered.mlir_module().count("tpu_custom_call") >= 2


def test_the_platform_picks_the_form_and_the_config_overrides_it(monkeypatch):
    plain = replace(CONFIG, attention_softcap=None, dtype="bfloat16", kernels="auto")
    for platform, form in (("cpu", "xla"), ("tpu", "splash"), ("gpu", "cudnn")):
        monkeypatch.setattr(jax, "default_backend", lambda platform=platform: platform)
        assert attention_form(plain) == form
        assert attention_form(replace(plain, kernels="xla")) == "xla"
    for unfit in ({"dtype": "float32"}, {"head_dim": 256}, {"attention_softcap": 50.0}):
        assert attention_form(replace(plain, kernels="gpu", **unfit)) == "xla"


def test_a_report_tells_which_forms_ran():
    names = ("attention", "decode_attention", "linear_logprob", "prefill_attention", "sample")
    assert chosen(replace(CONFIG, kernels="auto"), [128, 256]) == dict.fromkeys(names, "xla")
    large = replace(CONFIG, kernels="tpu", vocab_size=151_936)
    assert chosen(large, [128]) == {
        "attention": "splash",
        "decode_attention": "tpu",
        "linear_logprob": "xla",
        "prefill_attention": "tpu",
        "sample": "tpu",
    }
    # A vocabulary that is small, or too large for the kernel, is sampled in XLA.
    for vocab_size in (4096, 262_145):
        assert chosen(replace(large, vocab_size=vocab_size), [128])["sample"] == "xla"


def test_a_report_tells_apart_caches_of_other_forms(monkeypatch):
    """On a Hopper GPU, of whose kernel a cache is a multiple of its blocks."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "devices", lambda: [SimpleNamespace(compute_capability="9.0")])
    config = replace(CONFIG, kernels="auto", dtype="bfloat16", head_dim=64, attention_softcap=None)
    assert chosen(config, [128, 256, 300])["decode_attention"] == (
        "gpu (cache of 128, 256), xla (cache of 300)"
    )
    with pytest.raises(Refused, match=r"config\.model\.kernels='gpu': .* 300 positions"):
        chosen(replace(config, kernels="gpu"), [300])
