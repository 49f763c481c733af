"""`config.json` in and out, and what is refused."""

import jax
import pytest

from jaxconv.errors import Refused
from jaxconv.models.config import DecoderConfig, RopeScaling
from jaxconv.models.decoder import Decoder

LLAMA = {
    "model_type": "llama",
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def test_version_4_and_version_5_spellings_mean_the_same():
    old = LLAMA | {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **LLAMA3}}
    new = LLAMA | {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3}}
    oldest = LLAMA | {"rope_theta": 5e5, "rope_scaling": {"type": "llama3", **LLAMA3}}
    read = DecoderConfig.from_hf_dict(old)
    assert read == DecoderConfig.from_hf_dict(new) == DecoderConfig.from_hf_dict(oldest)
    assert read.rope_theta == 5e5
    assert read.rope_scaling == RopeScaling("llama3", 8.0, 32, 1.0, 4.0)


def test_defaults_of_absent_keys():
    read = DecoderConfig.from_hf_dict(
        {k: v for k, v in LLAMA.items() if k != "num_key_value_heads"}
    )
    assert (read.num_kv_heads, read.head_dim, read.rope_theta) == (4, 8, 10000.0)
    assert not read.tie_embeddings
    read = DecoderConfig.from_hf_dict(LLAMA | {"model_type": "qwen3"})
    assert read.head_dim == 128 and read.qk_norm
    read = DecoderConfig.from_hf_dict(LLAMA | {"model_type": "qwen2", "sliding_window": 9})
    assert read.attention_bias and not read.attention_out_bias


@pytest.mark.parametrize(
    "extra",
    [
        {},
        {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
        {"eos_token_id": [3, 5], "bos_token_id": 1, "pad_token_id": 0, "torch_dtype": "bfloat16"},
        {"model_type": "qwen2", "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
        {"rope_scaling": {"rope_type": "llama3", **LLAMA3}},
        {
            "model_type": "qwen3",
            "rope_scaling": {
                "type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 32,
                "mscale": 1.0,
                "mscale_all_dim": 0.5,
                "truncate": False,
            },
        },
    ],
)
def test_written_and_read_again_is_the_same(extra):
    config = DecoderConfig.from_hf_dict(LLAMA | extra)
    assert DecoderConfig.from_hf_dict(config.to_hf_dict()) == config
    hash(config)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "mamba"}, ["model_type", "'mamba'", "llama, qwen2, qwen3"]),
        ({"hidden_act": "gelu"}, ["hidden_act", "'gelu'", "silu"]),
        ({"vocab_size": None}, ["vocab_size", "None"]),
        ({"num_key_value_heads": 3}, ["num_kv_heads", "3", "4"]),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, ["'dynamic'", "linear"]),
        ({"rope_scaling": {"type": "linear"}}, ["factor"]),
        ({"rope_scaling": {"type": "llama3", "factor": 2.0}}, ["low_freq_factor"]),
        ({"partial_rotary_factor": 0.5}, ["partial_rotary_factor", "0.5"]),
        (
            {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 32},
            ["sliding_window", "32"],
        ),
        ({"layer_types": ["sliding_attention"]}, ["layer_types", "sliding_attention"]),
        ({"quantization_config": {"bits": 4}}, ["quantization_config", "bits"]),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, ["differ by layer"]),
    ],
)
def test_what_is_not_computed_is_refused_by_name_and_value(change, words):
    with pytest.raises(Refused) as caught:
        DecoderConfig.from_hf_dict(LLAMA | change)
    message = str(caught.value)
    assert all(word in message for word in words), message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("field", "value"),
    [("dtype", "float16"), ("remat", "some"), ("head_dim", 7), ("num_layers", 0)],
)
def test_wrong_fields_are_refused(field, value):
    fields = {
        "family": "llama",
        "vocab_size": 10,
        "embed_dim": 16,
        "num_layers": 1,
        "num_heads": 2,
        "num_kv_heads": 2,
        "head_dim": 8,
        "mlp_dim": 16,
        "max_positions": 8,
    }
    with pytest.raises(Refused, match=f"{field}.*{value}"):
        DecoderConfig(**fields | {field: value})


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_num_parameters_counts_the_weights(family, biased, tied):
    keys = {"attention_bias": biased, "tie_word_embeddings": tied, "model_type": family}
    config = DecoderConfig.from_hf_dict(LLAMA | keys | {"mlp_bias": biased})
    model = jax.eval_shape(lambda: Decoder(config, jax.random.key(0)))
    assert config.num_parameters == sum(x.size for x in jax.tree.leaves(model))


def test_flops_count_each_multiply_add_twice():
    config = DecoderConfig.from_hf_dict(LLAMA | {"tie_word_embeddings": True})
    # q, o: 32x32; k, v: 32x16; three 32x48; twice; head 32x100; scores and mix 2x4x8 a key.
    matmuls = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48) + 32 * 100
    assert config.flops_per_token(10) == 2 * matmuls + 2 * 2 * 2 * 32 * 10
