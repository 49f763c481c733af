"""What writes answers in JSON with a checkpoint, on all devices of this process."""

from pathlib import Path

import jax

from jaxconv.models.device_group import device_groups, refuse_uneven
from jaxconv.models.handover import hand_over
from jaxconv.models.hf import load_pretrained
from jaxconv.rollout.constrained import Constrained
from jaxconv.rollout.engine import Engine
from jaxconv.rollout.grammar import Grammars
from jaxconv.rollout.shape import EngineShape

_LENGTH = 256  # tokens of the shortest cache; each next one is twice as long
_PREFILL_ROWS = (1, 8)
_PREFILL_TOKENS = (16, 64, 256)


def load_writers(
    folder: Path, end: int, *, slots: int, seed: int, tensor: int
) -> tuple[list[Constrained], int]:
    """(a writer on each group of devices, tokens that a stream may have).

    Args:
        folder: of the checkpoint, which holds a tokenizer.
        end: the token that ends a turn.
        slots: answers at a time, on all devices together.
        seed: of sampling.
        tensor: devices that hold one copy of the weights; `llm.tensor` of a config.
    """
    groups = device_groups(tensor, jax.local_devices(), "llm.tensor")
    dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    model, tokenizer = load_pretrained(folder, dtype=dtype)
    refuse_uneven(model.config, tensor, "llm.tensor")
    context = model.config.max_positions
    slots = -(-slots // len(groups))
    shape = EngineShape(
        slots=slots,
        lengths=_lengths(context),
        prefill_rows=tuple(sorted({min(n, slots) for n in _PREFILL_ROWS})),
        prefill_tokens=_PREFILL_TOKENS,
    )
    writers = []
    for group, weights in hand_over(model, groups).items():
        key = jax.random.key(seed)
        engine = Engine(model.config, shape, stop_ids=[end], key=key, group=group)
        engine.weights = weights
        writers.append(Constrained(engine, Grammars(tokenizer, model.config.vocab_size, end)))
    return writers, context


def _lengths(context: int) -> tuple[int, ...]:
    lengths = [min(_LENGTH, context)]
    while lengths[-1] < context:
        lengths.append(min(2 * lengths[-1], context))
    return tuple(lengths)
