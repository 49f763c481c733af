"""Logits against `transformers` on torch, from its checkpoints and into it."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxconv.models.config import FAMILIES
from jaxconv.models.decoder import Decoder
from jaxconv.models.hf import load_pretrained, save_pretrained
from jaxconv.models.hf_config import from_hf_dict
from jaxconv.models.rope import rope_frequencies

torch = pytest.importorskip("torch", reason="parity extra is not installed")
pytestmark = pytest.mark.parity

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ROPE = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 3.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    "yarn, all set": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 16,
        "beta_fast": 20.0,
        "beta_slow": 2.0,
        "mscale": 0.7,
        "mscale_all_dim": 0.4,
        "truncate": False,
    },
}
CASES = {
    "llama": ("llama", {}, "default", 1e4),
    "llama one kv head, theta": ("llama", {"num_key_value_heads": 1}, "default", 5e5),
    "llama all heads, biases, tied": (
        "llama",
        {
            "num_key_value_heads": 4,
            "attention_bias": True,
            "mlp_bias": True,
            "tie_word_embeddings": True,
        },
        "linear",
        1e4,
    ),
    "llama head_dim": ("llama", {"head_dim": 12}, "llama3", 5e5),
    "qwen2": ("qwen2", {}, "default", 1e6),
    "qwen2 tied, yarn": ("qwen2", {"tie_word_embeddings": True}, "yarn", 1e6),
    "qwen3": ("qwen3", {"head_dim": 16}, "default", 1e6),
    "qwen3 biases, tied, yarn": (
        "qwen3",
        {"head_dim": 16, "attention_bias": True, "tie_word_embeddings": True},
        "yarn, all set",
        1e4,
    ),
    "qwen2 sliding late layers": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 2},
        "default",
        1e6,
    ),
    "qwen3 sliding by list": (
        "qwen3",
        {
            "use_sliding_window": True,
            "sliding_window": 20,
            "layer_types": ["sliding_attention", "full_attention", "full_attention"],
        },
        "default",
        1e6,
    ),
    "mistral": ("mistral", {"sliding_window": None, "head_dim": 12}, "default", 1e6),
    "mistral sliding": ("mistral", {"sliding_window": 7}, "default", 1e4),
    "gemma2": (
        "gemma2",
        {
            "sliding_window": 7,
            "head_dim": 12,
            "query_pre_attn_scalar": 21,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 1.5,
            "pad_token_id": 0,
        },
        "default",
        1e4,
    ),
    "gemma2 biases, one kv head, no caps, one scaled rope": (
        "gemma2",
        {
            "sliding_window": 30,
            "num_key_value_heads": 1,
            "attention_bias": True,
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
            "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
        },
        "linear",
        1e4,
    ),
    "gemma3_text": (
        "gemma3_text",
        {
            "num_hidden_layers": 7,
            "sliding_window": 7,
            "head_dim": 12,
            "query_pre_attn_scalar": 21,
        },
        {
            "full_attention": ROPE["linear"] | {"rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 300.0},
        },
        None,
    ),
    "gemma3_text untied, capped logits, biases, list of layers": (
        "gemma3_text",
        {
            "sliding_window": 20,
            "tie_word_embeddings": False,
            "attention_bias": True,
            "final_logit_softcapping": 3.0,
            "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
        },
        None,
        None,
    ),
}


def peer_model(family, extra, rope, theta):
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    if isinstance(rope, str):
        rope = ROPE[rope] | {"rope_theta": theta}
    config = CONFIG_MAPPING[family](**(SIZES | extra), rope_parameters=rope)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():  # every weight away from its trivial value
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def peer_logits(model, tokens):
    with torch.no_grad():
        return model(torch.tensor(np.asarray(tokens)).long()).logits.float().numpy()


def our_logits(model, tokens):
    return np.asarray(jax.jit(lambda m, t: m.logits(m(t)))(model, tokens))


TOKENS = jax.random.randint(jax.random.key(0), (2, 70), 0, SIZES["vocab_size"])


@pytest.mark.parametrize("case", CASES)
def test_logits_agree_in_both_directions(case, tmp_path):
    from transformers import AutoModelForCausalLM

    theirs = peer_model(*CASES[case])
    theirs.save_pretrained(tmp_path / "theirs")
    ours, tokenizer = load_pretrained(tmp_path / "theirs")
    assert tokenizer is None
    expected = peer_logits(theirs, TOKENS)
    np.testing.assert_allclose(our_logits(ours, TOKENS), expected, atol=1e-4)
    assert expected.std() > 0.1

    save_pretrained(ours, None, tmp_path / "ours")
    back, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", output_loading_info=True, attn_implementation="eager"
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    np.testing.assert_array_equal(peer_logits(back.eval(), TOKENS), expected)
    assert back.generation_config.eos_token_id == 2


@pytest.mark.parametrize("family", FAMILIES)
def test_our_own_weights_say_the_same_in_transformers(family, tmp_path):
    from transformers import AutoModelForCausalLM

    config = from_hf_dict(SIZES | {"model_type": family, "head_dim": 16})
    ours = Decoder(config, jax.random.key(1))
    save_pretrained(ours, None, tmp_path / "ours", max_shard_bytes=20_000)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
    np.testing.assert_allclose(our_logits(ours, TOKENS), peer_logits(theirs, TOKENS), atol=1e-4)


def test_the_text_part_of_gemma_3_with_images_says_the_same(tmp_path):
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    text = SIZES | {"sliding_window": 7, "head_dim": 12}
    vision = {
        "model_type": "siglip_vision_model",
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    torch.manual_seed(0)
    theirs = Gemma3ForConditionalGeneration(config).eval()
    theirs.save_pretrained(tmp_path)
    ours, _ = load_pretrained(tmp_path)
    assert ours.config.family == "gemma3_text"
    np.testing.assert_allclose(our_logits(ours, TOKENS), peer_logits(theirs, TOKENS), atol=1e-4)


def test_version_4_config_and_their_bfloat16_shards(tmp_path):
    from transformers import AutoModelForCausalLM

    theirs = peer_model("llama", {}, "llama3", 5e5).to(torch.bfloat16)
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = rope
    config["torch_dtype"] = config.pop("dtype")
    path.write_text(json.dumps(config))
    ours, _ = load_pretrained(tmp_path)
    assert ours.config.stored_dtype == "bfloat16"
    assert {x.dtype for x in jax.tree.leaves(ours)} == {jnp.dtype("float32")}
    # Read again: halving the model in place also halved its rotary constants.
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    expected = peer_logits(theirs.eval(), TOKENS)
    np.testing.assert_allclose(our_logits(ours, TOKENS), expected, atol=1e-4)


@pytest.mark.parametrize("rope", ROPE)
def test_rotary_frequencies_equal_theirs(rope):
    theirs = peer_model("llama", {"head_dim": 16}, rope, 5e5)
    config = from_hf_dict(theirs.config.to_dict())
    inv_freq, factor = rope_frequencies(config)
    np.testing.assert_allclose(inv_freq, theirs.model.rotary_emb.inv_freq.numpy(), rtol=3e-7)
    assert factor == pytest.approx(theirs.model.rotary_emb.attention_scaling, rel=1e-6)
