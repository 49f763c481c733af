"""A small actor-critic whose values vary."""

import jax
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
        return ActorCritic(Decoder(CONFIG, key), head)

    return make
