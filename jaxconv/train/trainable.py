"""What is trained of a model: all of it, or an adapter over a base that rests.

Losses get the two apart, `trained` to differentiate and `resting` as a constant, and join them. So
a gradient, an optimizer's state and a checkpoint are as large as what is trained, and the base by
itself is the reference model, with no second copy of it.
"""

from typing import Any

import jax

from jaxconv.models.decoder import Decoder
from jaxconv.models.heads import ActorCritic
from jaxconv.models.lora import AdaptedDecoder, Adapter, LoraConfig, merge


def lora_config(config) -> LoraConfig | None:
    """The adapter that the section `lora` of a config asks for; None for rank 0."""
    c = config.lora
    if not c.rank:
        return None
    return LoraConfig(c.rank, c.alpha, tuple(c.targets), c.dropout, c.rslora)


def split(model: Any, lora: LoraConfig | None, key: jax.Array) -> tuple[Any, Decoder | None]:
    """(trained, resting) of a Decoder or an ActorCritic.

    Args:
        model: to start from.
        lora: None trains the whole model, and nothing rests.
        key: typed PRNG key of the adapter.
    """
    if lora is None:
        return model, None
    if isinstance(model, ActorCritic):
        adapter, base = split(model.decoder, lora, key)
        return ActorCritic(adapter, model.value_head), base
    return jax.jit(Adapter, static_argnums=(0, 1))(model.config, lora, key), model


def join(trained: Any, resting: Decoder | None) -> Any:
    """The model that `trained` and `resting` are the parts of; no array is copied."""
    if isinstance(trained, ActorCritic):
        return ActorCritic(join(trained.decoder, resting), trained.value_head)
    return AdaptedDecoder(resting, trained) if isinstance(trained, Adapter) else trained


def merged(trained: Any, resting: Decoder | None) -> Any:
    """The same model with its adapter, if there is one, added to the weights of the base."""
    if isinstance(trained, ActorCritic):
        return ActorCritic(merged(trained.decoder, resting), trained.value_head)
    return merge(join(trained, resting))
