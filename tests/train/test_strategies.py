"""Splitting a model over devices changes no loss and no gradient, and moves what it should alone.

Run as a program it prints what an update comes to under every strategy; it needs 8 devices.
"""

import collections
import functools
import json
import math
import os
import re
import subprocess
import sys

import jax
import numpy as np
import optax
import pytest

from jaxconv.data.batches import StreamBatch
from jaxconv.data.packing import TokenBatch
from jaxconv.models.config import DecoderConfig
from jaxconv.models.decoder import Decoder
from jaxconv.models.heads import ActorCritic, ValueHead
from jaxconv.models.lora import LoraConfig
from jaxconv.models.sharding import device_mesh
from jaxconv.objectives.ppo import PPOBatch, PPOCoefficients, ppo_loss
from jaxconv.train.actor_critic import evaluate_tokens
from jaxconv.train.likelihood import DPOObjective, sft_objective
from jaxconv.train.mesh import data_mesh, place, replicate, share_rows
from jaxconv.train.optimizer import make_optimizer
from jaxconv.train.ppo import PPOTokens
from jaxconv.train.state import TrainState
from jaxconv.train.trainable import split
from jaxconv.train.update import make_update

CONFIG = DecoderConfig(
    family="qwen2",
    vocab_size=64,
    embed_dim=32,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    mlp_dim=48,
    max_positions=64,
    attention_bias=True,
    sliding_window=6,
    sliding_layers=(False, True, True),
)
LORA = LoraConfig(2, 4.0, ("q_proj", "o_proj", "down_proj"), dropout=0.5)
MICROBATCHES, ROWS, WIDTH = 2, 8, 16
MESHES = {
    "ddp": {"data": 8},
    "fsdp": {"fsdp": 8},
    "fsdp and copies": {"data": 2, "fsdp": 4},
    "fsdp_tp": {"fsdp": 4, "tensor": 2},
    "fsdp_tp and copies": {"data": 2, "fsdp": 2, "tensor": 2},
}
CASES = ("sft", "sft of an adapter", "dpo", "ppo", "adamw", "adafactor", "muon")


def tokens(rng) -> TokenBatch:
    """Rows of two streams each, a preference pair, and some padding."""
    shape = (MICROBATCHES, ROWS, WIDTH)
    segments = np.repeat([1, 2, 0], [7, 7, 2])
    positions = np.concatenate([np.arange(7), np.arange(7), np.zeros(2, int)])
    return TokenBatch(
        tokens=rng.integers(0, CONFIG.vocab_size, shape).astype(np.int32),
        targets=rng.integers(0, CONFIG.vocab_size, shape).astype(np.int32),
        positions=np.broadcast_to(positions, shape).astype(np.int32),
        segment_ids=np.broadcast_to(segments, shape).astype(np.int32),
        mask=(rng.random(shape) < 0.6) & (segments > 0),
    )


def case(name: str):
    """(loss, optimizer, model, resting, batch)."""
    rng = np.random.default_rng(0)
    model = jax.jit(Decoder, static_argnums=0)(CONFIG, jax.random.key(0))
    seeds = rng.integers(0, 1 << 31, (MICROBATCHES, ROWS)).astype(np.uint32)
    batch = StreamBatch(tokens(rng), seeds, None)
    optimizer, resting, loss = optax.sgd(1.0), None, sft_objective
    if name == "sft of an adapter":
        model, resting = split(model, LORA, jax.random.key(1))
        model = jax.tree.map(lambda x: x + 0.1 * rng.normal(size=x.shape).astype("f4"), model)
    elif name == "dpo":
        shape = (MICROBATCHES, ROWS, 2 * (WIDTH // 2))
        batch = StreamBatch(batch.tokens, seeds, rng.normal(size=shape).astype(np.float32))
        loss = DPOObjective(0.5, "sigmoid", sft_weight=0.1)
    elif name == "ppo":
        head = ValueHead(CONFIG.embed_dim, 0.5)
        head.kernel[...] = 0.3 * jax.random.normal(jax.random.key(2), head.kernel.shape)
        model = ActorCritic(model, head)
        numbers = [rng.normal(size=batch.tokens.mask.shape).astype(np.float32) for _ in range(6)]
        batch = PPOTokens(batch.tokens, PPOBatch(*numbers, batch.tokens.mask))
        coefficients = PPOCoefficients(entropy_coef=0.01)

        def loss(model, batch, resting):
            found = evaluate_tokens(model, batch.tokens, value_gradient=0.1)
            return ppo_loss(*found, batch.ppo, coefficients=coefficients)

    elif name != "sft":
        optimizer = make_optimizer(
            optax.constant_schedule(0.1), kind=name, b2=0.9, weight_decay=0.1, clip_norm=0.5
        )
    return loss, optimizer, model, resting, batch


def update_on(mesh, name: str):
    """(compiled update, its arguments)."""
    loss, optimizer, model, resting, batch = case(name)
    state = TrainState.create(model, optimizer, mesh=mesh)
    arguments = (
        state,
        share_rows(batch, mesh),
        replicate(np.int32(MICROBATCHES), mesh),
        place(resting, mesh),
    )
    return make_update(loss, optimizer, mesh).lower(*arguments).compile(), arguments


def alone(line: str) -> bool:
    """Whether every device of a collective would tell itself alone."""
    if "replica_groups={{0},{1}," in line or "replica_groups=[8,1]" in line:
        return True
    axes = re.search(r"replica_groups=mesh\[([^]]*)\] {([^}]*)}", line)
    if axes is None:
        return False
    sizes = dict(re.findall(r"'([^']+)'=(\d+)", axes[1]))
    return all(sizes[name] == "1" for name in re.findall(r"'([^']+)'", axes[2]))


def collectives(hlo: str) -> dict[str, list[str]]:
    """Shapes of what devices exchange, by operation."""
    found = collections.defaultdict(list)
    # What a device would tell itself alone is no exchange.
    hlo = "\n".join(line for line in hlo.splitlines() if not alone(line))
    for shapes, operation in re.findall(
        r"= (\([^)]*\)|\S+) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)\(",
        hlo,
    ):
        found[operation] += re.findall(r"[a-z0-9]+\[[0-9,]*\]", shapes)
    return found


def apart(one, other, scale=None) -> float:
    """The largest difference of two trees of tensors, as a share of `scale`, or of each tensor's
    largest number."""
    shares = [0.0]
    for x, y in zip(*map(jax.tree.leaves, (one, other)), strict=True):
        x, y = np.asarray(x, float), np.asarray(y, float)
        difference = np.max(np.abs(x - y), initial=0)
        shares.append(difference and difference / (scale or np.max(np.abs(y))))
    return float(max(shares))


def compare(name: str, *mesh_names: str) -> dict:
    """What an update of a case comes to on meshes, beside what it does on one device."""
    update, arguments = update_on(data_mesh(1), name)
    before = jax.device_get(arguments[0].model)
    state, told = jax.device_get(update(*arguments))
    # Where steps are gradients (SGD at a rate of 1) this is the largest gradient.
    taken = jax.tree.map(lambda x, y: np.max(np.abs(x - y)), state.model, before)
    largest = float(max(jax.tree.leaves(taken)))
    found = {}
    for mesh_name in mesh_names:
        ddp = mesh_name == "ddp"
        mesh = data_mesh(ROWS) if ddp else device_mesh(**MESHES[mesh_name])
        update, arguments = update_on(mesh, name)
        places = [(x.sharding, x.ndim) for x in jax.tree.leaves(arguments[0])]
        updated = update(*arguments)
        stays = [
            x.sharding.is_equivalent_to(*was)
            for x, was in zip(jax.tree.leaves(updated[0]), places, strict=True)
        ]
        found[mesh_name] = {
            "numbers": apart(updated[1], told),
            "steps": apart(updated[0].model, state.model, largest),
            "moments": apart(updated[0].opt_state, state.opt_state),
            "stays": ddp or all(stays),
            "exchanged": collectives(update.as_text()),
        }
    return found


@functools.cache
def compared(name: str, *mesh_names: str) -> dict:
    done = subprocess.run(
        [sys.executable, __file__, name, *mesh_names],
        env={**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "8"},
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


QUICK = ("fsdp", "fsdp_tp and copies")


def test_fine_tuning_on_split_models_is_that_on_one_device():
    for found in compared("sft", *QUICK).values():
        assert_same_update("sft", found)


def assert_same_update(name: str, found: dict) -> None:
    assert found["numbers"] < 1e-5
    assert found["moments"] < 1e-5
    # Adam and Muon make large steps of the rounding errors of small gradients, so theirs are
    # compared as the moments that they keep of them.
    assert found["steps"] < (1e-2 if name in ("adamw", "muon") else 1e-5)
    assert found["stays"]


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_an_update_on_any_mesh_is_that_on_one_device(name):
    for found in compared(name, *MESHES).values():
        assert_same_update(name, found)


def sizes(shapes: list[str]) -> list[int]:
    """Elements of shapes such as f32[2,3]."""
    return [
        math.prod(map(int, filter(None, re.split(r"[^0-9]", s[s.index("[") :])))) for s in shapes
    ]


EXCHANGES = ("sft", *(pytest.param(name, marks=pytest.mark.slow) for name in ("dpo", "ppo")))


def exchanged(name: str, mesh_name: str) -> dict[str, list[str]]:
    # Slow ones are compared on all meshes anyway.
    return compared(name, *(QUICK if name == "sft" else MESHES))[mesh_name]["exchanged"]


@pytest.mark.parametrize("name", EXCHANGES)
def test_a_layer_is_gathered_where_it_is_used_and_its_gradient_scattered(name):
    found = exchanged(name, "fsdp")
    largest = CONFIG.vocab_size * CONFIG.embed_dim  # of one layer, or the head
    activations = ROWS * WIDTH * CONFIG.embed_dim
    assert largest < activations
    # Seven maps of a layer forward and backward, the head, and the ids of the tokens.
    assert len(found["all-gather"]) == 2 * 7 + 1 + 1
    assert max(sizes(found["all-gather"])) <= largest
    assert len(found["reduce-scatter"]) == 7 + 1
    # Norms, biases and numbers: no gradient of a matrix, no activations.
    assert max(sizes(found["all-reduce"])) <= CONFIG.num_layers * CONFIG.mlp_dim
    assert_no_batch_is_replicated(found, "fsdp")


@pytest.mark.parametrize("name", EXCHANGES)
def test_tensor_parallel_layers_exchange_two_activations_forward_and_two_backward(name):
    found = exchanged(name, "fsdp_tp and copies")
    local = f"f32[{ROWS // 4},{WIDTH},{CONFIG.embed_dim}]"
    assert found["all-reduce"].count(local) == 4
    assert max(sizes(found["all-gather"])) <= CONFIG.vocab_size * CONFIG.embed_dim // 2
    assert_no_batch_is_replicated(found, "fsdp_tp and copies")


def assert_no_batch_is_replicated(found: dict[str, list[str]], mesh_name: str) -> None:
    """Of rows no device gathers more than the ids of tokens, of which it looks up its share of
    the width: once, and from those alone who have other shares."""
    rows = ROWS // MESHES[mesh_name].get("data", 1)
    ends = (f"[{rows},{WIDTH}", f"[{MICROBATCHES},{rows},{WIDTH}")
    of_rows = [s for s in found["all-gather"] if s[s.index("[") :].startswith(ends)]
    assert of_rows == [f"s32[{rows},{WIDTH}]"]


if __name__ == "__main__":
    print(json.dumps(compare(*sys.argv[1:])))
