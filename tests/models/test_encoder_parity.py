"""Hidden states against `transformers` on torch, from its checkpoints and into it."""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxconv.errors import Refused
from jaxconv.models.encoder import relative_buckets
from jaxconv.models.encoder_io import load_encoder, write_encoder

torch = pytest.importorskip("torch", reason="parity extra is not installed")
pytestmark = pytest.mark.parity

SIZES = {
    "vocab_size": 61,
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "max_position_embeddings": 300,
}
CASES = {
    "bert": ("bert", {}),
    "bert, three token types, large eps, tanh gelu": (
        "bert",
        {"type_vocab_size": 3, "layer_norm_eps": 0.1, "hidden_act": "gelu_new"},
    ),
    "bert, relu, tiny eps": ("bert", {"hidden_act": "relu", "layer_norm_eps": 1e-12}),
    "roberta": ("roberta", {"type_vocab_size": 1, "layer_norm_eps": 1e-5}),
    "roberta, another padding id": ("roberta", {"pad_token_id": 7}),
    "xlm-roberta": ("xlm-roberta", {"type_vocab_size": 1, "layer_norm_eps": 1e-5}),
    "mpnet": ("mpnet", {"layer_norm_eps": 1e-5}),
    "mpnet, more buckets than are used": ("mpnet", {"relative_attention_num_buckets": 40}),
}

SELDOM = ("bert", "bert, relu, tiny eps", "roberta", "mpnet")  # others cover their switches


def peer(family, changes, seed=0):
    """A model of `transformers` whose every weight matters."""
    import transformers

    config = transformers.AutoConfig.for_model(family, **SIZES | changes)
    model = transformers.AutoModel.from_config(config).eval()
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, w in model.named_parameters():
            w.normal_(1.0 if name.endswith("LayerNorm.weight") else 0.0, 0.3)
    return model


def theirs(model, tokens, mask, **more):
    with torch.no_grad():
        return model(
            input_ids=torch.tensor(tokens), attention_mask=torch.tensor(mask), **more
        ).last_hidden_state.numpy()


def rows(pad):
    """Two texts, one of which is padded."""
    tokens = np.random.default_rng(0).integers(8, 61, (2, 280))
    mask = np.ones_like(tokens)
    mask[1, 90:] = 0
    return np.where(mask, tokens, pad), mask


forward = jax.jit(lambda e, *rows: e(*rows))


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=[pytest.mark.slow] if case in SELDOM else []) for case in CASES],
)
def test_hidden_states_are_those_of_transformers_both_ways(case, tmp_path):
    family, changes = CASES[case]
    model = peer(family, changes)
    model.save_pretrained(tmp_path / "theirs")
    encoder = load_encoder(tmp_path / "theirs")
    tokens, mask = rows(model.config.pad_token_id)
    expected = theirs(model, tokens, mask)
    found = np.asarray(forward(encoder, tokens, None, mask))
    real = mask.astype(bool)
    np.testing.assert_allclose(found[real], expected[real], atol=2e-5)

    (tmp_path / "ours").mkdir()
    write_encoder(encoder, tmp_path / "ours")
    import transformers

    again = transformers.AutoModel.from_pretrained(tmp_path / "ours", add_pooling_layer=False)
    assert again.config.model_type == family
    np.testing.assert_allclose(theirs(again.eval(), tokens, mask)[real], expected[real], atol=1e-6)
    kept = load_file(tmp_path / "ours" / "model.safetensors")
    first = load_file(tmp_path / "theirs" / "model.safetensors")
    assert set(first) - set(kept) == {"pooler.dense.weight", "pooler.dense.bias"}
    for name, tensor in kept.items():
        np.testing.assert_array_equal(tensor, first[name])


def test_token_types_are_read(tmp_path):
    model = peer("bert", {})
    model.save_pretrained(tmp_path)
    tokens, mask = rows(0)
    types = (np.arange(280) >= 40).astype(int)[None].repeat(2, 0)
    expected = theirs(model, tokens, mask, token_type_ids=torch.tensor(types))
    found = np.asarray(forward(load_encoder(tmp_path), tokens, None, mask, types))
    np.testing.assert_allclose(found[mask == 1], expected[mask == 1], atol=2e-5)


def test_relative_buckets_are_those_of_mpnet():
    from transformers.models.mpnet.modeling_mpnet import MPNetEncoder

    position = torch.arange(600)
    theirs = MPNetEncoder.relative_position_bucket(position[None, :] - position[:, None])
    np.testing.assert_array_equal(relative_buckets(600), theirs.numpy())


def edit(folder, change):
    tensors = load_file(folder / "model.safetensors")
    save_file(change(tensors), folder / "model.safetensors", {"format": "pt"})


def test_checkpoints_of_models_with_a_head_and_of_old_versions_load(tmp_path):
    model = peer("bert", {})
    model.save_pretrained(tmp_path)
    plain = load_encoder(tmp_path)

    def old(tensors):
        renamed = {
            "bert."
            + name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
                "LayerNorm.bias", "LayerNorm.beta"
            ): x
            for name, x in tensors.items()
        }
        renamed["cls.predictions.bias"] = np.zeros(61, np.float32)
        renamed["bert.embeddings.position_ids"] = np.arange(300)[None]
        return renamed

    edit(tmp_path, old)
    for one, other in zip(
        jax.tree.leaves(plain), jax.tree.leaves(load_encoder(tmp_path)), strict=True
    ):
        np.testing.assert_array_equal(one, other)


def test_damage_is_named(tmp_path):
    peer("mpnet", {}).save_pretrained(tmp_path)
    edit(tmp_path, lambda t: {k: v for k, v in t.items() if "relative" not in k})
    with pytest.raises(Refused, match=r"encoder\.relative_attention_bias\.weight is missing"):
        load_encoder(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"hidden_size": 48}))
    with pytest.raises(Refused, match=r"word_embeddings\.weight has shape"):
        load_encoder(tmp_path)
