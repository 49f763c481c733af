"""A small actor-critic whose values vary."""

import jax
import numpy as np
import pytest

from jaxconv.models.config import DecoderConfig
from jaxconv.models.decoder import Decoder
from jaxconv.models.heads import ActorCritic, ValueHead

CONFIG = DecoderConfig(
    family="llama",
    vocab_size=40,
    embed_dim=16,
    num_layers=1,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    mlp_dim=24,
    max_positions=64,
    tie_embeddings=True,
)


@pytest.fixture(scope="session")
def small_actor_critic():
    """seed -> an actor-critic of `CONFIG`."""

    def make(seed: int = 0) -> ActorCritic:
        key = jax.random.key(seed)
        head = ValueHead(CONFIG.embed_dim, 0.5)
        head.kernel[...] = 0.3 * jax.random.normal(key, (CONFIG.embed_dim, 1))
        return ActorCritic(jax.jit(lambda key: Decoder(CONFIG, key))(key), head)

    return make


@pytest.fixture(scope="session")
def judge():
    """(model, streams, width) -> logits [N, W, V] and values [N, W], each stream alone in a row."""

    @jax.jit
    def run(model, tokens_NW):
        hidden = model.decoder(tokens_NW)
        return model.decoder.logits(hidden), model.value_head(hidden)

    def judge(model, streams, width):
        padded = np.zeros((len(streams), width), np.int32)
        for row, stream in zip(padded, streams, strict=True):
            row[: len(stream)] = stream
        return jax.device_get(run(model, padded))

    return judge
