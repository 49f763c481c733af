"""Steps with masks and shared prefixes on several devices say what one device says.

Run as a program it plays on 8 fake devices and prints what was said.
"""

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxconv_kernels import pack_mask

from jaxconv.models.config import DecoderConfig
from jaxconv.models.decoder import Decoder
from jaxconv.models.device_group import DeviceGroup
from jaxconv.models.handover import hand_over
from jaxconv.rollout.engine import Engine, EngineShape, Sampling

VOCABULARIES = (281, 5000)  # neither comes out even; the larger one is sampled from by cells
DEVICES = (1, 4)
SLOTS, PREFIX = 4, 20


def said(vocab: int, devices: int) -> list[list[int]]:
    """Tokens of four turns, each step with masks of its own that allow a tenth."""
    config = DecoderConfig(
        family="llama",
        vocab_size=vocab,
        embed_dim=32,
        num_layers=2,
        num_heads=8,
        num_kv_heads=4,
        head_dim=8,
        mlp_dim=48,
        max_positions=64,
    )
    model = jax.jit(Decoder, static_argnums=0)(config, jax.random.key(0))
    group = DeviceGroup(tuple(jax.devices()[:devices]))
    shape = EngineShape(
        slots=SLOTS, lengths=(32, 64), prefill_rows=(4,), prefill_tokens=(8,), burst=1
    )
    engine = Engine(config, shape, stop_ids=[vocab], key=jax.random.key(1), group=group)
    engine.weights = hand_over(model, [group])[group]
    rng = np.random.default_rng(0)
    prefix = rng.integers(1, vocab, PREFIX).tolist()
    engine.share(prefix)
    slots = [engine.open(stream) for stream in range(SLOTS)]
    for slot in slots:
        engine.say(slot, [*prefix, 7, 8 + slot], 12)
    sampling = {slots[0]: Sampling(0.0), slots[1]: Sampling(0.7, top_p=0.8)}
    turns = []
    while engine.speaking:
        engine.read()
        allowed = rng.random((SLOTS, vocab)) < 0.1
        engine.choose(np.asarray(pack_mask(jnp.asarray(allowed))), sampling)
        turns += engine.collect()
    return [turn.tokens for turn in sorted(turns, key=lambda turn: turn.slot)]


@pytest.mark.slow
def test_masks_and_prefixes_on_four_devices():
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    out = subprocess.run(
        [sys.executable, __file__], capture_output=True, text=True, env=environment, check=True
    )
    found = json.loads(out.stdout.splitlines()[-1])
    assert set(found) == {f"{v} on {d}" for v in VOCABULARIES for d in DEVICES}
    for vocab in VOCABULARIES:
        one, four = (found[f"{vocab} on {devices}"] for devices in DEVICES)
        assert one == four
        assert len({tuple(tokens) for tokens in one}) == SLOTS and len(one[0]) == 12


if __name__ == "__main__":
    print(json.dumps({f"{v} on {d}": said(v, d) for v in VOCABULARIES for d in DEVICES}))
