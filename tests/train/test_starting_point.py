"""Models from a config: what a checkpoint lacks is asked for by name."""

import subprocess
import sys

import jax
import ml_collections
import pytest

from jaxconv.data.tokenizer import train_tokenizer
from jaxconv.errors import Refused
from jaxconv.models import hf
from jaxconv.models.config import DecoderConfig
from jaxconv.models.decoder import Decoder
from jaxconv.train.starting_point import starting_decoder


@pytest.fixture
def start(tmp_path):
    """pad_token -> what a config makes of a checkpoint whose tokenizer has none."""
    tokenizer = train_tokenizer(["one two three"], 270)
    config = DecoderConfig("llama", len(tokenizer), 16, 1, 2, 1, 8, 24, 64, tie_embeddings=True)
    tokenizer.pad_token = None
    hf.save_pretrained(Decoder(config, jax.random.key(0)), tokenizer, tmp_path / "model")

    def make(pad_token: str):
        model = {
            "path": str(tmp_path / "model"),
            "pad_token": pad_token,
            "dtype": "float32",
            "remat": "none",
            "kernels": "auto",
        }
        mesh = {"strategy": "ddp", "data": 1, "tensor": 1}
        config = ml_collections.ConfigDict({"model": model, "mesh": mesh, "seed": 0})
        return starting_decoder(config, tmp_path / "tokenizer", lambda: iter(()), 64)

    return make


def test_a_missing_pad_token_is_asked_for(start):
    with pytest.raises(Refused, match=r"has no pad token; name one .* such as '<\|end\|>'"):
        start("")


def test_a_pad_token_must_be_in_the_vocabulary(start):
    with pytest.raises(Refused, match=r"config\.model\.pad_token='<nothing>'"):
        start("<nothing>")


def test_a_named_pad_token_is_exported(start, tmp_path):
    decoder, tokenizer = start("<|end|>")
    hf.save_pretrained(decoder, tokenizer, tmp_path / "again")
    again, tokenizer = hf.load_pretrained(tmp_path / "again")
    assert tokenizer.pad_token == "<|end|>"
    assert again.config.pad_token_id == tokenizer.pad_token_id


SPLIT = """
import sys
import jax
jax.config.update("jax_num_cpu_devices", 8)
import ml_collections
import numpy as np
from jaxconv.models import hf
from jaxconv.train.starting_point import load_decoder

model = {"dtype": "float32", "remat": "none", "kernels": "auto"}
mesh = {"strategy": "fsdp_tp", "data": 2, "tensor": 2}
config = ml_collections.ConfigDict({"model": model, "mesh": mesh})
seen = []
put = jax.device_put
def device_put(x, where=None):
    seen.extend((w.shape, where) for w in jax.tree.leaves(x) if isinstance(w, np.ndarray))
    return put(x, where)
jax.device_put = device_put
split, _ = load_decoder(sys.argv[1], config)
jax.device_put = put
whole, _ = hf.load_pretrained(sys.argv[1])
assert {where for _, where in seen} == set(jax.devices())
assert (split.config.vocab_size // 2, split.config.embed_dim // 2) in {shape for shape, _ in seen}
assert split.embed[...].shape not in {shape for shape, _ in seen}
for one, other in zip(jax.tree.leaves(split), jax.tree.leaves(whole), strict=True):
    np.testing.assert_array_equal(one, other)
"""


def test_no_device_is_sent_more_than_its_part_of_a_checkpoint(tmp_path):
    config = DecoderConfig("llama", 42, 16, 2, 4, 2, 8, 24, 64)
    hf.save_pretrained(Decoder(config, jax.random.key(0)), None, tmp_path / "model")
    done = subprocess.run(
        [sys.executable, "-c", SPLIT, str(tmp_path / "model")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
