"""Published 7B and 9B architectures on abstract shapes: names, shapes and shards, no weights."""

import jax
import pytest

from jaxconv.models.decoder import Decoder
from jaxconv.models.hf import checkpoint_tensors
from jaxconv.models.hf_config import from_hf_dict
from jaxconv.models.safetensors_io import plan_files
from jaxconv.models.weights import hf_names, hf_shape, named_weights

torch = pytest.importorskip("torch", reason="parity extra is not installed")
pytestmark = pytest.mark.parity

# What their config.json says, and their number of weights.
PUBLISHED = {
    "Qwen2.5-7B": (
        {
            "model_type": "qwen2",
            "vocab_size": 152064,
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "sliding_window": 131072,
            "tie_word_embeddings": False,
        },
        7_615_616_512,
    ),
    "Mistral-7B-v0.1": (
        {
            "model_type": "mistral",
            "vocab_size": 32000,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "sliding_window": 4096,
            "tie_word_embeddings": False,
        },
        7_241_732_096,
    ),
    "gemma-2-9b": (
        {
            "model_type": "gemma2",
            "vocab_size": 256000,
            "hidden_size": 3584,
            "intermediate_size": 14336,
            "num_hidden_layers": 42,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 256,
        },
        9_241_705_984,
    ),
    "gemma-3-1b": (
        {
            "model_type": "gemma3_text",
            "vocab_size": 262144,
            "hidden_size": 1152,
            "intermediate_size": 6912,
            "num_hidden_layers": 26,
            "num_attention_heads": 4,
            "num_key_value_heads": 1,
            "head_dim": 256,
            "sliding_window": 512,
        },
        999_885_952,
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_names_shapes_and_shards_are_right(name):
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    raw, num_parameters = PUBLISHED[name]
    config = from_hf_dict(raw | {"torch_dtype": "bfloat16"})
    assert config.num_parameters == num_parameters
    abstract = jax.eval_shape(lambda: Decoder(config, jax.random.key(0)))
    ours = {x: hf_shape(param) for _, param in named_weights(abstract) for x in hf_names(param)}
    with torch.device("meta"):
        peer = AutoModelForCausalLM.from_config(CONFIG_MAPPING[raw["model_type"]](**raw))
    theirs = {x: tuple(tensor.shape) for x, tensor in peer.state_dict().items()}
    if config.tie_embeddings:
        del theirs["lm_head.weight"]
    assert ours == theirs

    files = plan_files(checkpoint_tensors(abstract, config.stored_dtype), 5e9)
    sizes = [sum(tensor.nbytes for tensor in shard) for shard in files.values()]
    assert sum(sizes) == 2 * num_parameters and max(sizes) <= 5e9
    assert len(sizes) == -(-sum(sizes) // 5e9)
    assert {x.name: x.shape for shard in files.values() for x in shard} == ours
