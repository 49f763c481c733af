"""A tokenizer, a template and a small actor-critic that talks in short random turns."""

import jax
import pytest

from jaxconv.data.template import take_apart
from jaxconv.data.tokenizer import train_tokenizer
from jaxconv.models.config import DecoderConfig
from jaxconv.models.decode import unstack
from jaxconv.models.decoder import Decoder
from jaxconv.models.heads import ActorCritic, ValueHead


@pytest.fixture(scope="session")
def template():
    return take_apart(train_tokenizer(["talk as agent0 to agent1 and agent2"] * 3, 280))


@pytest.fixture(scope="session")
def make_model(template):
    """seed -> an actor-critic whose turns end after a few tokens and whose values vary."""
    config = DecoderConfig(
        family="llama",
        vocab_size=280,
        embed_dim=32,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        mlp_dim=48,
        max_positions=160,
    )

    def make(seed: int) -> ActorCritic:
        key = jax.random.key(seed)
        decoder = Decoder(config, key)
        head = decoder.lm_head[...] * 3
        # A louder column: the end token comes about every fifth time.
        head = head.at[:, template.end].multiply(4)
        decoder.lm_head[...] = head
        value_head = ValueHead(config.embed_dim, 0.25)
        value_head.kernel[...] = jax.random.normal(key, value_head.kernel.shape)
        return ActorCritic(decoder, value_head)

    return make


@pytest.fixture(scope="session")
def model(make_model):
    return make_model(0)


@pytest.fixture(scope="session")
def weights(model):
    return unstack(model)


@pytest.fixture(scope="session")
def config(model):
    return model.decoder.config
