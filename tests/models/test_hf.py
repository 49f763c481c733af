"""Checkpoint folders: exact round trips, and one clear line for each kind of damage."""

import json
import resource
import shutil
import struct
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from jaxconv.data.tokenizer import CHAT_TEMPLATE, train_tokenizer
from jaxconv.errors import Failed, Refused
from jaxconv.models.config import DecoderConfig
from jaxconv.models.decoder import Decoder
from jaxconv.models.heads import ValueHead
from jaxconv.models.hf import (
    generation_config,
    load_pretrained,
    load_value_head,
    save_pretrained,
    save_value_head,
)

CONFIG = DecoderConfig(
    family="qwen3",
    vocab_size=40,
    embed_dim=16,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    mlp_dim=24,
    max_positions=32,
    qk_norm=True,
    eos_token_ids=(3,),
)
Q = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def model():
    return jax.jit(lambda: Decoder(CONFIG, jax.random.key(0)))()


@pytest.fixture
def folder(model, tmp_path):
    save_pretrained(model, None, tmp_path / "model")
    return tmp_path / "model"


def stored_bytes(folder):
    """name to (dtype, shape, bytes) of every tensor in every file, from the raw format."""
    found = {}
    for path in folder.glob("*.safetensors"):
        raw = path.read_bytes()
        (length,) = struct.unpack("<Q", raw[:8])
        for name, entry in json.loads(raw[8 : 8 + length]).items():
            if name != "__metadata__":
                start, end = (8 + length + offset for offset in entry["data_offsets"])
                found[name] = (entry["dtype"], tuple(entry["shape"]), raw[start:end])
    return found


def change(folder, edit):
    """Rewrites model.safetensors after `edit(tensors)`."""
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("tied", [False, True])
def test_export_import_export_gives_identical_bytes(stored, tied, tmp_path):
    config = replace(CONFIG, stored_dtype=stored, tie_embeddings=tied)
    first = Decoder(config, jax.random.key(5))
    save_pretrained(first, None, tmp_path / "a")
    loaded, _ = load_pretrained(tmp_path / "a")
    assert loaded.config == config
    assert {x.dtype for x in jax.tree.leaves(loaded)} == {jnp.dtype("float32")}
    save_pretrained(loaded, None, tmp_path / "b", max_shard_bytes=3000)
    assert not (tmp_path / "b" / "model.safetensors").exists()
    again, _ = load_pretrained(tmp_path / "b")
    save_pretrained(again, None, tmp_path / "c")
    a, b, c = (stored_bytes(tmp_path / name) for name in "abc")
    assert a == b == c
    assert len(a) == 2 * 11 + 2 + (not tied)
    assert {entry[0] for entry in a.values()} == {
        {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}[stored]
    }
    if stored == "float32":
        for x, y in zip(jax.tree.leaves(first), jax.tree.leaves(again), strict=True):
            np.testing.assert_array_equal(x, y)


def test_linear_maps_are_stored_as_outputs_by_inputs(model, folder):
    tensors = load_file(folder / "model.safetensors")
    q_DHh = model.layers.q[...][1]
    x = np.arange(16, dtype=np.float32)
    np.testing.assert_allclose(
        tensors[Q] @ x, jnp.einsum("d,dhk->hk", x, q_DHh).reshape(-1), rtol=1e-5
    )
    o_HhD = model.layers.o[...][1]
    x = np.arange(32, dtype=np.float32)
    np.testing.assert_allclose(
        tensors["model.layers.1.self_attn.o_proj.weight"] @ x,
        jnp.einsum("hk,hkd->d", x.reshape(4, 8), o_HhD),
        rtol=1e-4,
        atol=1e-3,
    )


def test_shards_respect_the_limit_and_the_index_is_complete(model, tmp_path):
    save_pretrained(model, None, tmp_path / "m", max_shard_bytes=4000)
    index = json.loads((tmp_path / "m" / "model.safetensors.index.json").read_text())
    sizes = {}
    for path in (tmp_path / "m").glob("*.safetensors"):
        with safe_open(path, framework="numpy") as handle:
            assert handle.metadata() == {"format": "pt"}
            for name in handle.keys():  # noqa: SIM118
                assert index["weight_map"][name] == path.name
                sizes.setdefault(path.name, []).append(handle.get_tensor(name).nbytes)
    assert all(sum(entry) <= 4000 for entry in sizes.values()) and len(sizes) > 3
    assert index["metadata"]["total_size"] == sum(map(sum, sizes.values()))


def test_dtype_sets_compute_only(folder):
    loaded, _ = load_pretrained(folder, dtype="bfloat16")
    assert loaded.config == replace(CONFIG, dtype="bfloat16")
    assert loaded.embed[...].dtype == jnp.float32
    with pytest.raises(Refused, match=r"dtype is 'int8'.*float32, bfloat16"):
        load_pretrained(folder, dtype="int8")


def test_end_tokens_of_the_generation_config_count(folder):
    (folder / "generation_config.json").write_text('{"eos_token_id": [7, 3]}')
    assert load_pretrained(folder)[0].config.eos_token_ids == (3, 7)


def drop_q(tensors):
    del tensors[Q]


def widen_q(tensors):
    tensors[Q] = np.zeros((32, 17), np.float32)


def add_bias(tensors):
    tensors["model.layers.0.self_attn.q_proj.bias"] = np.zeros(32, np.float32)


def whole_numbers(tensors):
    tensors[Q] = np.zeros((32, 16), np.int64)


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (drop_q, [Q, "missing", "[32, 16]"]),
        (widen_q, ["model.safetensors", Q, "[32, 17]", "[32, 16]"]),
        (add_bias, ["model.safetensors", "q_proj.bias", "not part"]),
        (whole_numbers, ["model.safetensors", Q, "I64", "F32"]),
    ],
)
def test_a_wrong_tensor_is_refused_by_name(folder, edit, words):
    change(folder, edit)
    refused(folder, words)


def refused(path, words):
    with pytest.raises(Refused) as caught:
        load_pretrained(path)
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in words), message


@pytest.mark.parametrize("keep", [0, 5, 300, -1])
def test_a_truncated_file_is_refused(folder, keep):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    refused(folder, ["model.safetensors", "not a whole safetensors file", "bytes"])


def test_missing_files_are_refused(model, folder, tmp_path):
    save_pretrained(model, None, tmp_path / "m", max_shard_bytes=4000)
    gone = sorted((tmp_path / "m").glob("model-*"))[1]
    gone.unlink()
    refused(tmp_path / "m", [gone.name, "missing", "index.json"])
    (folder / "model.safetensors").unlink()
    refused(folder, ["neither model.safetensors nor"])
    (folder / "config.json").unlink()
    refused(folder, ["config.json", "missing"])
    refused(tmp_path / "nowhere", ["nowhere", "no such folder"])


def test_an_index_that_leaves_the_folder_or_lies_is_refused(model, tmp_path):
    save_pretrained(model, None, tmp_path / "m", max_shard_bytes=4000)
    path = tmp_path / "m" / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    last = sorted(set(index["weight_map"].values()))[-1]
    lying = index["weight_map"] | {"model.embed_tokens.weight": last}
    path.write_text(json.dumps({"weight_map": lying}))
    refused(tmp_path / "m", [last, "model.embed_tokens.weight", "index.json"])
    escaping = index["weight_map"] | {"model.embed_tokens.weight": "../x.safetensors"}
    path.write_text(json.dumps({"weight_map": escaping}))
    refused(tmp_path / "m", ["../x.safetensors", "plain file name"])
    path.write_text("{")
    refused(tmp_path / "m", ["index.json", "JSON"])


def test_a_hub_id_that_cannot_be_fetched_is_refused_in_one_line(monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    refused("jaxconv-tests/there-is-no-such-model", ["there-is-no-such-model", "hub"])


def test_a_stored_copy_of_tied_embeddings_is_read_and_another_matrix_refused(tmp_path):
    config = replace(CONFIG, tie_embeddings=True)
    save_pretrained(Decoder(config, jax.random.key(0)), None, tmp_path / "m")
    embed = load_file(tmp_path / "m" / "model.safetensors")["model.embed_tokens.weight"]
    change(tmp_path / "m", lambda tensors: tensors.update({"lm_head.weight": embed}))
    load_pretrained(tmp_path / "m")
    change(tmp_path / "m", lambda tensors: tensors.update({"lm_head.weight": embed + 1}))
    refused(tmp_path / "m", ["lm_head.weight", "not part"])


def test_a_full_disk_leaves_the_old_checkpoint_and_nothing_else(model, folder):
    before = stored_bytes(folder)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (9000, limits[1]))
    try:
        with pytest.raises(Failed, match="cannot write checkpoint"):
            save_pretrained(model, None, folder)
        with pytest.raises(Failed, match="cannot write checkpoint"):
            save_pretrained(model, None, folder.parent / "new")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert stored_bytes(folder) == before
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


def test_the_older_checkpoint_is_loaded_where_a_kill_came_before_the_newer_had_its_name(folder):
    before = stored_bytes(folder)
    folder.rename(folder.parent / f".{folder.name}.old")
    load_pretrained(folder)
    assert not folder.exists()  # reading changes nothing
    assert stored_bytes(folder.parent / f".{folder.name}.old") == before


def test_an_old_checkpoint_is_replaced_whole_and_another_folder_is_not_touched(model, folder):
    (folder / "model-00001-of-00001.safetensors").write_bytes(b"stale")
    save_pretrained(model, None, folder)
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
    ]
    mine = folder.parent / "mine"
    mine.mkdir()
    (mine / "notes.txt").write_text("x")
    with pytest.raises(Refused, match="something other than a checkpoint"):
        save_pretrained(model, None, mine)
    assert (mine / "notes.txt").read_text() == "x"


def test_the_tokenizer_travels_with_the_model(model, tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<unk>": 0, "hello": 1, "there": 2}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>")
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    save_pretrained(model, tokenizer, tmp_path / "m")
    _, loaded = load_pretrained(tmp_path / "m")
    assert loaded("hello there you")["input_ids"] == [1, 2, 0]
    assert loaded.chat_template == tokenizer.chat_template
    (tmp_path / "m" / "tokenizer.json").write_text("{")
    refused(tmp_path / "m", ["tokenizer does not load"])


GENERATION = {
    "bos_token_id": 1,
    "eos_token_id": [7, 3],
    "pad_token_id": 0,
    "do_sample": True,
    "temperature": 0.7,
    "top_p": 0.8,
    "top_k": 20,
    "repetition_penalty": 1.05,
    "transformers_version": "4.50.0",
}


def test_the_source_s_generation_config_is_kept_whole(folder, tmp_path):
    (folder / "generation_config.json").write_text(json.dumps(GENERATION))
    loaded, _ = load_pretrained(folder)
    save_pretrained(loaded, None, tmp_path / "kept", generation=generation_config(folder))
    assert json.loads((tmp_path / "kept" / "generation_config.json").read_text()) == GENERATION
    changed = generation_config(folder) | {"temperature": 1.0}
    save_pretrained(loaded, None, tmp_path / "changed", generation=changed)
    assert generation_config(tmp_path / "changed") == GENERATION | {"temperature": 1.0}
    # Without it, the token ids that the model itself carries.
    save_pretrained(loaded, None, tmp_path / "bare")
    assert generation_config(tmp_path / "bare") == {"eos_token_id": [3, 7]}
    (folder / "generation_config.json").unlink()
    assert generation_config(folder) == {}


@pytest.mark.parametrize("template_file", ["tokenizer_config.json", "chat_template.jinja"])
def test_templates_special_and_added_tokens_survive(model, tmp_path, template_file):
    from transformers import AutoTokenizer

    words = train_tokenizer(["hello there"], 280)
    words.add_special_tokens({"bos_token": "<|begin|>", "extra_special_tokens": ["<|tool|>"]})
    words.add_tokens(["jaxconv"])
    save_pretrained(model, words, tmp_path / "source")
    if template_file == "tokenizer_config.json":  # where older versions keep it
        template = tmp_path / "source" / "chat_template.jinja"
        path = tmp_path / "source" / template_file
        content = json.loads(path.read_text()) | {"chat_template": template.read_text()}
        path.write_text(json.dumps(content))
        template.unlink()
    loaded, tokenizer = load_pretrained(tmp_path / "source")
    save_pretrained(loaded, tokenizer, tmp_path / "copy")
    copy = AutoTokenizer.from_pretrained(tmp_path / "copy")
    talk = [{"role": "user", "content": "hello jaxconv <|tool|>"}]
    for there in (tokenizer, copy):
        assert there.chat_template == CHAT_TEMPLATE
        assert there.special_tokens_map == words.special_tokens_map
        assert there.get_added_vocab() == words.get_added_vocab()
        assert there.get_vocab() == words.get_vocab()
        assert there.apply_chat_template(talk, add_generation_prompt=True) == (
            words.apply_chat_template(talk, add_generation_prompt=True)
        )
    assert copy.bos_token == "<|begin|>" and copy.eos_token == "<|end|>"
    assert len(copy("<|tool|>jaxconv", add_special_tokens=False)["input_ids"]) == 2


def test_the_text_part_of_an_image_and_text_model_is_loaded_and_says_so(tmp_path, caplog):
    config = replace(
        CONFIG,
        family="gemma3_text",
        sliding_window=4,
        sliding_layers=(True, False),
        rope_local_theta=1e4,
        tie_embeddings=True,
    )
    text = Decoder(config, jax.random.key(2))
    save_pretrained(text, None, tmp_path / "text")

    def wrap(tensors):
        for name in list(tensors):
            tensors["language_model." + name] = tensors.pop(name)
        tensors["vision_tower.embeddings.weight"] = np.zeros((3, 3), np.float32)
        tensors["multi_modal_projector.weight"] = np.zeros((3, 3), np.float32)

    shutil.copytree(tmp_path / "text", tmp_path / "both")
    change(tmp_path / "both", wrap)
    path = tmp_path / "both" / "config.json"
    path.write_text(
        json.dumps({"model_type": "gemma3", "text_config": json.loads(path.read_text())})
    )
    loaded, _ = load_pretrained(tmp_path / "both")
    assert "2 tensors of vision_tower and multi_modal_projector are left out" in caplog.text
    assert loaded.config == config
    save_pretrained(loaded, None, tmp_path / "again")
    assert stored_bytes(tmp_path / "again") == stored_bytes(tmp_path / "text")
    change(tmp_path / "both", lambda tensors: tensors.update({"audio.weight": np.zeros(3, "f4")}))
    refused(tmp_path / "both", ["audio.weight", "not part"])


def test_the_value_head_is_saved_beside_and_checked(folder):
    head = ValueHead(16, bias=2.5)
    head.kernel[...] = jnp.arange(16, dtype=jnp.float32)[:, None]
    save_value_head(head, folder)
    loaded = load_value_head(folder, 16)
    for x, y in zip(jax.tree.leaves(head), jax.tree.leaves(loaded), strict=True):
        np.testing.assert_array_equal(x, y)
    load_pretrained(folder)
    with pytest.raises(Refused, match=r"value_head.weight.*\[1, 16\].*\[1, 17\]"):
        load_value_head(folder, 17)
    with pytest.raises(Refused, match="missing"):
        load_value_head(folder.parent, 16)
