"""Adapters as `peft` reads and writes them: the same logits and gradients, and what is refused."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxconv.errors import Failed, Refused
from jaxconv.models.config import DecoderConfig
from jaxconv.models.hf import load_pretrained, save_pretrained
from jaxconv.models.lora import TARGETS, AdaptedDecoder, Adapter, LoraConfig, merge
from jaxconv.models.peft_io import load_adapter, save_adapter

CONFIG = DecoderConfig(
    family="llama",
    vocab_size=97,
    embed_dim=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    mlp_dim=56,
    max_positions=64,
)
LORA = LoraConfig(rank=4, alpha=6.5, targets=("q_proj", "o_proj", "down_proj"), dropout=0.25)
NAME = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GEMMA = {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 8}
FAMILIES = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "mistral": {"head_dim": 16, "sliding_window": None},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "gemma2": GEMMA,
    "gemma3_text": GEMMA,
}
TOKENS = np.random.default_rng(0).integers(0, 97, (2, 20))


def perturbed(adapter):
    """Away from B = 0."""
    rng = np.random.default_rng(1)
    return jax.tree.map(
        lambda w: w + 0.1 * jnp.asarray(rng.standard_normal(w.shape, np.float32)), adapter
    )


@pytest.fixture(scope="module")
def adapter():
    return perturbed(Adapter(CONFIG, LORA, jax.random.key(0)))


@pytest.fixture
def folder(adapter, tmp_path):
    save_adapter(adapter, tmp_path / "adapter", base_name="some/base")
    return tmp_path / "adapter"


def edit_config(folder, **changes):
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))


def edit_tensors(folder, edit):
    tensors = load_file(folder / "adapter_model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})


def assert_same(got, wanted):
    assert got.config == wanted.config
    assert jax.tree.structure(got) == jax.tree.structure(wanted)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        assert a.dtype == jnp.float32
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("rslora", [False, True])
def test_what_is_saved_loads_exactly(rslora, tmp_path):
    lora = LoraConfig(rank=2, alpha=4.0, targets=TARGETS, rslora=rslora)
    adapter = perturbed(Adapter(CONFIG, lora, jax.random.key(3)))
    save_adapter(adapter, tmp_path / "a", base_name="some/base")
    assert_same(load_adapter(tmp_path / "a", CONFIG), adapter)


def test_files_name_everything_as_peft_does(adapter, folder):
    config = json.loads((folder / "adapter_config.json").read_text())
    expected = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "some/base",
        "r": 4,
        "lora_alpha": 6.5,
        "lora_dropout": 0.25,
        "target_modules": ["q_proj", "o_proj", "down_proj"],
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "use_rslora": False,
        "use_dora": False,
    }
    assert {key: config[key] for key in expected} == expected
    tensors = load_file(folder / "adapter_model.safetensors")
    assert len(tensors) == 2 * 2 * 3
    np.testing.assert_array_equal(tensors[NAME], adapter.q_proj.a[...][1].T)
    np.testing.assert_array_equal(
        tensors["base_model.model.model.layers.0.self_attn.o_proj.lora_A.weight"],
        adapter.o_proj.a[...][0].reshape(32, 4).T,
    )
    np.testing.assert_array_equal(
        tensors["base_model.model.model.layers.0.mlp.down_proj.lora_B.weight"],
        adapter.down_proj.b[...][0].T,
    )


def test_bfloat16_tensors_become_float32(adapter, folder):
    def halve(tensors):
        for name, tensor in tensors.items():
            tensors[name] = tensor.astype(jnp.bfloat16)

    edit_tensors(folder, halve)
    assert_same(
        load_adapter(folder, CONFIG),
        jax.tree.map(lambda w: w.astype(jnp.bfloat16).astype(jnp.float32), adapter),
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3'; supported: 'LORA'"),
        ({"peft_type": ...}, "peft_type is None"),
        ({"use_dora": True}, "use_dora is True; supported: absent, null or false"),
        ({"bias": "all"}, "bias is 'all'; supported: 'none'"),
        ({"lora_bias": True}, "lora_bias is True"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out is True"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save is \['lm_head'\]"),
        ({"rank_pattern": {"q_proj": 8}}, r"rank_pattern is \{'q_proj': 8\}"),
        ({"alpha_pattern": {"q_proj": 8}}, "alpha_pattern is"),
        ({"layers_to_transform": [0]}, r"layers_to_transform is \[0\]"),
        ({"layer_replication": [[0, 2]]}, "layer_replication is"),
        ({"trainable_token_indices": [5]}, "trainable_token_indices is"),
        ({"of_a_later_version": 3}, "of_a_later_version is 3"),
        ({"task_type": "SEQ_CLS"}, "task_type is 'SEQ_CLS'; supported: 'CAUSAL_LM', None"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights is 'pissa_niter_4'"),
        ({"r": 0}, "rank is 0; it must be a positive integer"),
        ({"r": ...}, "rank is None"),
        ({"r": 8}, r"has shape \[4, 56\]; adapter_config.json with this base expects \[8, 56\]"),
        ({"lora_alpha": "8"}, "lora_alpha is '8'; it must be a number"),
        ({"lora_alpha": ...}, "lora_alpha is None"),
        ({"lora_dropout": 1.0}, "dropout is 1.0"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "target is 'embed_tokens'; it may be q"),
        ({"target_modules": ["q_proj", "v_proj"]}, "v_proj.lora_A.weight is missing"),
    ],
)
def test_what_is_not_computed_is_refused_by_name(folder, changes, message):
    edit_config(folder, **changes)
    with pytest.raises(Refused, match=message) as refusal:
        load_adapter(folder, CONFIG)
    assert str(folder) in str(refusal.value) and "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda tensors: tensors.pop(NAME), f"tensor {NAME} is missing"),
        (lambda tensors: tensors.update({NAME: tensors[NAME].T.copy()}), r"has shape \[32, 4\]"),
        (
            lambda tensors: tensors.update({"base_model.model.lm_head.lora_A.weight": np.ones(3)}),
            "it may be float32|is F64",
        ),
        (
            lambda tensors: tensors.update(
                {NAME.replace("layers.1", "layers.2"): tensors[NAME].copy()}
            ),
            "layers.2.self_attn.q_proj.lora_A.weight is not part of this architecture",
        ),
    ],
)
def test_other_tensors_are_refused_by_name(folder, edit, message):
    edit_tensors(folder, edit)
    with pytest.raises(Refused, match=message):
        load_adapter(folder, CONFIG)


def test_missing_files_are_refused(folder, tmp_path):
    with pytest.raises(Refused, match=r"adapter_config.json is missing"):
        load_adapter(tmp_path / "none", CONFIG)
    (folder / "adapter_model.safetensors").write_bytes(b"short")
    with pytest.raises(Refused, match=r"adapter_model.safetensors is not a whole safetensors"):
        load_adapter(folder, CONFIG)
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(Refused, match="adapters must be safetensors"):
        load_adapter(folder, CONFIG)


def test_an_older_adapter_stays_until_the_new_one_is_whole(adapter, folder, tmp_path, monkeypatch):
    other = jax.tree.map(lambda w: 2 * w, adapter)

    def full(descriptor):
        raise OSError(28, "full")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        with pytest.raises(Failed, match=r"cannot write checkpoint .*adapter.*full"):
            save_adapter(other, folder, base_name="some/base")
    assert_same(load_adapter(folder, CONFIG), adapter)
    save_adapter(other, folder, base_name="some/base")
    assert_same(load_adapter(folder, CONFIG), other)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]

    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("keep")
    with pytest.raises(Refused, match="holds something other than a checkpoint"):
        save_adapter(other, tmp_path / "notes", base_name="some/base")


@jax.jit
def our_logits(model, tokens_BT):
    return model.logits(model(tokens_BT))


def peer_base(family, folder):
    """A random `transformers` model, no weight at its trivial value, saved to `folder`."""
    torch = pytest.importorskip("torch", reason="parity extra is not installed")
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    config = CONFIG_MAPPING[family](**(SIZES | FAMILIES[family]))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return model


def peer_logits(model):
    torch = pytest.importorskip("torch")
    with torch.no_grad():
        return model(torch.tensor(TOKENS)).logits.numpy()


@pytest.mark.parity
@pytest.mark.parametrize("family", FAMILIES)
def test_peft_reads_our_adapters(family, tmp_path):
    peft = pytest.importorskip("peft", reason="parity extra is not installed")
    theirs = peer_base(family, tmp_path / "base")
    base, _ = load_pretrained(tmp_path / "base")
    lora = LoraConfig(rank=4, alpha=6.0, targets=TARGETS, dropout=0.1, rslora=family == "qwen3")
    ours = AdaptedDecoder(base, perturbed(Adapter(base.config, lora, jax.random.key(0))))
    save_adapter(ours.adapter, tmp_path / "adapter", base_name=str(tmp_path / "base"))

    before = peer_logits(theirs)
    adapted = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter").eval()
    expected = peer_logits(adapted)
    np.testing.assert_allclose(our_logits(ours, TOKENS), expected, atol=1e-5, rtol=1e-5)
    assert np.abs(expected - before).max() > 0.1
    with adapted.disable_adapter():  # the reference model
        np.testing.assert_allclose(
            our_logits(ours.base, TOKENS), peer_logits(adapted), atol=1e-5, rtol=1e-5
        )

    save_pretrained(ours, None, tmp_path / "merged")
    from transformers import AutoModelForCausalLM

    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    merged = peer_logits(adapted.merge_and_unload())
    np.testing.assert_allclose(peer_logits(exported), merged, atol=1e-5, rtol=1e-5)
    np.testing.assert_allclose(our_logits(merge(ours), TOKENS), merged, atol=1e-5, rtol=1e-5)


@pytest.mark.parity
@pytest.mark.parametrize(
    ("family", "targets"),
    [
        ("llama", "all-linear"),
        ("mistral", ["v_proj", "gate_proj"]),
        ("qwen2", r".*\.(q|down)_proj"),
        ("qwen3", "all-linear"),
        ("gemma2", "all-linear"),
        ("gemma3_text", ["o_proj", "up_proj"]),
    ],
)
def test_adapters_that_peft_makes_load_and_have_its_gradients(family, targets, tmp_path):
    peft = pytest.importorskip("peft", reason="parity extra is not installed")
    torch = pytest.importorskip("torch")
    theirs = peft.get_peft_model(
        peer_base(family, tmp_path / "base"),
        peft.LoraConfig(r=3, lora_alpha=5, target_modules=targets, task_type="CAUSAL_LM"),
    )
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    theirs.save_pretrained(tmp_path / "adapter")
    base, _ = load_pretrained(tmp_path / "base")
    adapter = load_adapter(tmp_path / "adapter", base.config)
    ours = AdaptedDecoder(base, adapter)
    np.testing.assert_allclose(our_logits(ours, TOKENS), peer_logits(theirs), atol=1e-5, rtol=1e-5)

    torch_tokens = torch.tensor(TOKENS)
    theirs(torch_tokens, labels=torch_tokens).loss.backward()
    grads = jax.jit(jax.grad(next_token_loss))(adapter, base, TOKENS)
    save_adapter(grads, tmp_path / "grads", base_name="")  # to their names and layout
    ours_by_name = load_file(tmp_path / "grads" / "adapter_model.safetensors")
    theirs_by_name = {
        name.replace(".default", ""): parameter.grad.numpy()
        for name, parameter in theirs.named_parameters()
        if parameter.requires_grad
    }
    assert ours_by_name.keys() == theirs_by_name.keys()
    for name, grad in theirs_by_name.items():
        np.testing.assert_allclose(ours_by_name[name], grad, atol=1e-5, err_msg=name)
        assert np.abs(grad).max() > 1e-4


def next_token_loss(adapter, base, tokens_BT):
    model = AdaptedDecoder(base, adapter)
    logp = jax.nn.log_softmax(model.logits(model(tokens_BT))[:, :-1])
    return -jnp.mean(jnp.take_along_axis(logp, tokens_BT[:, 1:, None], axis=-1))
