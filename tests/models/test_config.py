"""`config.json` in and out, and what is refused."""

import jax
import numpy as np
import pytest

from jaxconv.errors import Refused
from jaxconv.models.config import FAMILIES, DecoderConfig, RopeScaling
from jaxconv.models.decoder import Decoder
from jaxconv.models.hf_config import from_hf_dict, to_hf_dict
from jaxconv.models.rope import rope_frequencies

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
    read = from_hf_dict(old)
    assert read == from_hf_dict(new) == from_hf_dict(oldest)
    assert read.rope_theta == 5e5
    assert read.rope_scaling == RopeScaling("llama3", 8.0, 32, 1.0, 4.0)


def test_defaults_of_absent_keys():
    read = from_hf_dict({k: v for k, v in LLAMA.items() if k != "num_key_value_heads"})
    assert (read.num_kv_heads, read.head_dim, read.rope_theta) == (4, 8, 10000.0)
    assert not read.tie_embeddings
    read = from_hf_dict(LLAMA | {"model_type": "qwen3"})
    assert read.head_dim == 128 and read.qk_norm
    read = from_hf_dict(LLAMA | {"model_type": "qwen2", "sliding_window": 9})
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
        {"model_type": "mistral", "sliding_window": None},
        {"model_type": "mistral", "sliding_window": 16},
        {"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 1},
        {
            "model_type": "qwen3",
            "use_sliding_window": True,
            "layer_types": ["sliding_attention", "full_attention"],
        },
        {"model_type": "gemma2"},
        {
            "model_type": "gemma2",
            "attn_logit_softcapping": None,
            "query_pre_attn_scalar": 144,
            "tie_word_embeddings": False,
        },
        {"model_type": "gemma3_text", "sliding_window_pattern": 2, "sliding_window": 16},
        {
            "model_type": "gemma3_text",
            "rope_theta": 5e5,
            "rope_local_base_freq": 500.0,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        },
    ],
)
def test_written_and_read_again_is_the_same(extra):
    config = from_hf_dict(LLAMA | extra)
    assert from_hf_dict(to_hf_dict(config)) == config
    hash(config)


FULL, SLIDING = "full_attention", "sliding_attention"


@pytest.mark.parametrize(
    ("extra", "windows"),
    [
        ({"sliding_window": 16}, [None] * 6),
        ({"model_type": "mistral"}, [4096] * 6),
        ({"model_type": "mistral", "sliding_window": None}, [None] * 6),
        ({"model_type": "qwen2", "sliding_window": 16, "max_window_layers": 4}, [None] * 6),
        (
            {
                "model_type": "qwen2",
                "use_sliding_window": True,
                "sliding_window": 16,
                "max_window_layers": 4,
            },
            [None] * 4 + [16] * 2,
        ),
        ({"model_type": "gemma2"}, [4096, None] * 3),
        ({"model_type": "gemma3_text", "sliding_window": 512}, [512] * 5 + [None]),
        (
            {"model_type": "gemma3_text", "sliding_window": 16, "sliding_window_pattern": 3},
            [16, 16, None] * 2,
        ),
        (
            {"model_type": "gemma2", "sliding_window": 16, "layer_types": [FULL, SLIDING] * 3},
            [None, 16] * 3,
        ),
    ],
)
def test_which_layers_slide(extra, windows):
    config = from_hf_dict(LLAMA | {"num_hidden_layers": 6} | extra)
    assert list(config.windows) == windows


def test_gemma_3_keeps_two_rotary_bases_in_either_spelling():
    gemma = LLAMA | {"model_type": "gemma3_text"}
    linear = {"rope_type": "linear", "factor": 8.0}
    old = gemma | {"rope_theta": 5e5, "rope_local_base_freq": 500.0, "rope_scaling": linear}
    sets = {
        FULL: linear | {"rope_theta": 5e5},
        SLIDING: {"rope_type": "default", "rope_theta": 500.0},
    }
    read = from_hf_dict(old)
    assert read == from_hf_dict(gemma | {"rope_parameters": sets})
    assert (read.rope_theta, read.rope_local_theta) == (5e5, 500.0)
    assert read.rope_scaling == RopeScaling("linear", 8.0)
    plain = from_hf_dict(gemma)
    assert (plain.rope_theta, plain.rope_local_theta, plain.rope_scaling) == (1e6, 1e4, None)
    full, _ = rope_frequencies(read)
    sliding, _ = rope_frequencies(read, slides=True)
    # Two of 256: pair 64 of 128 turns by theta ** -0.5, divided by 8 where it is scaled.
    assert full[64] == pytest.approx(5e5**-0.5 / 8) and sliding[64] == pytest.approx(500**-0.5)


def test_the_text_part_of_an_image_and_text_model_is_read():
    """Published files name in `text_config` only what differs from the defaults."""
    read = from_hf_dict(
        {
            "model_type": "gemma3",
            "eos_token_id": [1, 106],
            "torch_dtype": "bfloat16",
            "text_config": {
                "model_type": "gemma3_text",
                "hidden_size": 2560,
                "intermediate_size": 10240,
                "num_hidden_layers": 34,
                "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
                "sliding_window": 1024,
            },
            "vision_config": {"hidden_size": 1152},
        }
    )
    assert read.family == "gemma3_text" and read.stored_dtype == "bfloat16"
    assert (read.vocab_size, read.num_heads, read.num_kv_heads, read.head_dim) == (
        262208,
        8,
        4,
        256,
    )
    assert (read.bos_token_id, read.eos_token_ids, read.pad_token_id) == (2, (1, 106), 0)
    assert read.windows.count(None) == 34 // 6 and read.tie_embeddings
    with pytest.raises(Refused, match="text_config is None"):
        from_hf_dict({"model_type": "gemma3"})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "mamba"}, ["model_type", "'mamba'", "llama, mistral, qwen2"]),
        ({"hidden_act": "gelu"}, ["hidden_act", "'gelu'", "silu"]),
        ({"vocab_size": None}, ["vocab_size", "None"]),
        ({"num_key_value_heads": 3}, ["num_kv_heads", "3", "4"]),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, ["'dynamic'", "linear"]),
        ({"rope_scaling": {"type": "linear"}}, ["factor"]),
        ({"rope_scaling": {"type": "llama3", "factor": 2.0}}, ["low_freq_factor"]),
        ({"partial_rotary_factor": 0.5}, ["partial_rotary_factor", "0.5"]),
        ({"layer_types": ["sliding_attention"]}, ["layer_types", "sliding_attention"]),
        (
            {"model_type": "gemma2", "layer_types": ["chunked_attention"] * 2},
            ["layer_types", "chunked_attention", "sliding_attention"],
        ),
        ({"model_type": "gemma2", "layer_types": [FULL]}, ["layer_types", "2 times"]),
        ({"model_type": "mistral", "layer_types": [FULL, SLIDING]}, ["layer_types", "mistral"]),
        ({"model_type": "mistral", "attention_bias": True}, ["attention_bias", "mistral"]),
        ({"model_type": "gemma2", "sliding_window": None}, ["sliding_window", "None", "gemma2"]),
        ({"model_type": "gemma2", "sliding_window": 0}, ["sliding_window", "0"]),
        ({"model_type": "gemma2", "final_logit_softcapping": -1.0}, ["final_softcap", "-1.0"]),
        ({"model_type": "gemma2", "hidden_activation": "silu"}, ["hidden_activation", "silu"]),
        ({"model_type": "gemma3_text", "attn_logit_softcapping": 5.0}, ["softcapping", "5.0"]),
        (
            {"model_type": "gemma3_text", "use_bidirectional_attention": True},
            ["use_bidirectional_attention", "True"],
        ),
        (
            {"model_type": "gemma3_text", "rope_parameters": {"rope_theta": 1e4}},
            ["rope_parameters", "gemma3_text"],
        ),
        (
            {
                "model_type": "gemma3_text",
                "rope_parameters": {SLIDING: {"rope_type": "linear", "factor": 2.0}},
            },
            ["sliding_attention", "linear", "default"],
        ),
        ({"quantization_config": {"bits": 4}}, ["quantization_config", "bits"]),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, ["differ by layer"]),
    ],
)
def test_what_is_not_computed_is_refused_by_name_and_value(change, words):
    with pytest.raises(Refused) as caught:
        from_hf_dict(LLAMA | change)
    message = str(caught.value)
    assert all(word in message for word in words), message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("dtype", "float16"),
        ("remat", "some"),
        ("head_dim", 7),
        ("num_layers", 0),
        ("query_scalar", 4.0),
        ("rope_local_theta", 10.0),
        ("sliding_window", 8),
        ("attention_softcap", 8.0),
    ],
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


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_num_parameters_counts_the_weights(family, biased, tied):
    biased &= family != "mistral"
    keys = {"attention_bias": biased, "tie_word_embeddings": tied, "model_type": family}
    config = from_hf_dict(LLAMA | keys | {"mlp_bias": biased})
    model = jax.eval_shape(lambda: Decoder(config, jax.random.key(0)))
    assert config.num_parameters == sum(x.size for x in jax.tree.leaves(model))


def test_flops_count_each_multiply_add_twice():
    config = from_hf_dict(LLAMA | {"tie_word_embeddings": True})
    # q, o: 32x32; k, v: 32x16; three 32x48; twice; head 32x100; scores and mix 2x4x8 a key.
    matmuls = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48) + 32 * 100
    assert config.flops_per_token(10) == 2 * matmuls + 2 * 2 * 2 * 32 * 10


def test_flops_of_sliding_layers_stop_at_the_window():
    plain = from_hf_dict(LLAMA | {"model_type": "mistral", "sliding_window": None})
    sliding = from_hf_dict(LLAMA | {"model_type": "mistral", "sliding_window": 16})
    assert sliding.flops_per_token(10) == plain.flops_per_token(10)
    assert sliding.flops_per_token(40) == plain.flops_per_token(16)
    half = from_hf_dict(LLAMA | {"model_type": "gemma2", "sliding_window": 16, "head_dim": 8})
    row = np.arange(1, 65)
    seen = (row + np.minimum(row, 16)).sum() * 4 * 4 * 8
    np.testing.assert_allclose(half.flops_per_token(row).sum() - 64 * half.flops_per_token(0), seen)
